/*-------------------------------------------------------------------------
 *
 * request.h
 *		What provision() is asked for.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_REQUEST_H
#define AGENTVM_REQUEST_H

#include "agentvm.h"

#include "fmgr.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

/* The arguments, checked. Strings are NULL where not given. */
typedef struct Request
{
	char *team_id;
	char *agent_id;
	char *profile;
	char *provider;
	char *idempotency_key;
	Jsonb *env;
	Jsonb *repos;
	Jsonb *tags;
	Jsonb *options;
	int64 max_lifetime_s; /* 0: not given */
	int64 idle_timeout_s; /* of a warm VM; 0: it is none */
} Request;

/*
 * Read and check the arguments of provision(), and of provision_warm(); palloc'd.  Raises
 * 22004 without a team, 22023 and AV012 for what is no identifier, document or interval.
 */
extern void request_read(FunctionCallInfo fcinfo, Request *request);
extern void request_read_warm(FunctionCallInfo fcinfo, Request *request);

/* Raise 22023 unless it is an environment: names that a shell takes, values that are strings. */
extern void check_env(Jsonb *env);

/* SHA-256 over all arguments but the key, palloc'd, so that a repeat can be told from a conflict. */
extern bytea *request_hash(const Request *request);

/*
 * Set *found to the session that already has this request's key, if any; the same arguments give
 * the same session, others raise AV008.  Inside a db scope.
 */
extern bool request_find(const Request *request, const bytea *hash, pg_uuid_t *found);

/*
 * Raise 40001: the key's row was there and is not; its transaction has been undone, or it
 * has ended and gone.
 */
pg_noreturn extern void request_raise_conflict(const Request *request);

/*
 * Environment and repositories for the runtime of a session, encrypted, palloc'd, and by which
 * key; nobody else ever gets them, so without a runtime they are not kept at all.
 */
extern bytea *request_payload(const Request *request, const char *session_id, char **key_id);

#endif /* AGENTVM_REQUEST_H */
