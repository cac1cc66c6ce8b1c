/*-------------------------------------------------------------------------
 *
 * credentials.h
 *		A team's credentials for a provider, decrypted.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SECRET_CREDENTIALS_H
#define AGENTVM_SECRET_CREDENTIALS_H

#include "secret/secret.h"
#include "utils/jsonb.h"

/* What a team has to show to a provider. */
typedef struct Credentials
{
	SecretSet *secrets;		 /* never NULL */
	const char *external_id; /* of the team; NULL: there is no such team any more */
	Jsonb *options;			 /* of the team for this provider, as they are now, or NULL */
} Credentials;

/*
 * Whether the server itself has credentials for the provider, in its environment
 * or (where it runs on EC2) from its machine's metadata service, for teams without
 * any of their own, and agentvm.environment_credentials allows it.
 */
extern bool credentials_of_server(const char *provider);

/*
 * Where the metadata service of the server's machine is, without a slash at the
 * end, or NULL where there is none or it may not be used.  Palloc'd.
 */
extern char *credentials_metadata_url(const char *provider);

/*
 * Read and decrypt agentvm.provider_secret for (team, provider) into a set in
 * "context"; when there are none, take the environment's, if it may be used,
 * else the set is empty.  The rest is in "context", too.  Called between db_enter()
 * and db_leave().  Raises AV010 when a field does not decrypt.  The set is wiped
 * with its context.
 */
extern Credentials *credentials_load(const char *team_id, const char *provider,
									 MemoryContext context);

#endif /* AGENTVM_SECRET_CREDENTIALS_H */
