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
 * Read and decrypt agentvm.provider_secret for (team, provider) into a set in
 * "context" (empty when there are none). Called between db_enter() and
 * db_leave().  Raises AV010 when a field does not decrypt.  The set is wiped
 * with its context.
 */
extern SecretSet *credentials_load(const char *team_id, const char *provider,
								   MemoryContext context);

#endif /* AGENTVM_SECRET_CREDENTIALS_H */
