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

/*
 * Whether the server's environment has credentials for the provider, for teams
 * without any of their own, and agentvm.environment_credentials allows it.
 */
extern bool credentials_in_environment(const char *provider);

/*
 * Read and decrypt agentvm.provider_secret for (team, provider) into a set in
 * "context"; when there are none, take the environment's, if it may be used,
 * else the set is empty.  Called between db_enter() and
 * db_leave().  Raises AV010 when a field does not decrypt.  The set is wiped
 * with its context.
 */
extern SecretSet *credentials_load(const char *team_id, const char *provider,
								   MemoryContext context);

#endif /* AGENTVM_SECRET_CREDENTIALS_H */
