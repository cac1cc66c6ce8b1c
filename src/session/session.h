/*-------------------------------------------------------------------------
 *
 * session.h
 *		What the files of this room share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SESSION_SESSION_H
#define AGENTVM_SESSION_SESSION_H

#include "agentvm.h"

#include "datatype/timestamp.h"
#include "engine/state.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

/* What a caller's function needs to know of a session before it acts. */
typedef struct SessionFacts
{
	SessionState state;
	char *end_reason;
	char *detail;
	TimestampTz next_check_at; /* 0: never */
	TimestampTz ceiling_at;
	bool runtime; /* a runtime in its VM is to report, or has */
	bool
		changed_here; /* this transaction has written the row: its engine work begins after commit */
} SessionFacts;

/* Of the one error for a session that does not exist, and one of another team's. */
#define SESSION_UNKNOWN "session %s does not exist"
#define SESSION_UNKNOWN_HINT                                                                       \
	"It may also belong to a team that the current role is not a member of."

/* A uuid argument that must be there; raises 22004. */
extern pg_uuid_t *session_id_argument(FunctionCallInfo fcinfo, int argument);

/* A uuid as text, palloc'd. */
extern char *session_text(const pg_uuid_t *id);

/* A new id, version 7, for what is made at "now".  Raises where there is no randomness. */
extern void session_make_id(pg_uuid_t *id, TimestampTz now);

/* provision() itself, for those who call it from C: without flinfo. */
extern PGDLLEXPORT Datum agentvm_provision(PG_FUNCTION_ARGS);

/*
 * The facts as session_facts() tells them; false where there is no session that "role"
 * may act on.
 */
extern bool session_find(const pg_uuid_t *id, Oid role, SessionFacts *facts);

/*
 * The latest committed facts (plus our own changes) about a session that "role"
 * may act on.  Raises AV005 when there is none, or it is another team's.
 * Inside a db scope; palloc'd in CurrentMemoryContext as it is after db_enter.
 */
extern void session_facts(const pg_uuid_t *id, Oid role, SessionFacts *facts);

/* Raise the error that belongs to a session that is ending or has ended. */
pg_noreturn extern void session_raise_ended(const pg_uuid_t *id, const SessionFacts *facts);

/*
 * To be called where an UPDATE has found nothing to do: if that was because somebody else had
 * changed the row meanwhile, it holds the row's lock all the same, and workers that pass it
 * by look again when that is over.  Inside a db scope.
 */
extern void session_left_alone(const pg_uuid_t *id);

/*
 * Begin the end of a session for whoever has a right to that, which is not looked at;
 * "detail" may be NULL.  False: it was ending already.  Inside a db scope.
 */
extern bool session_end(const pg_uuid_t *id, const char *detail);

/* Somebody waits for a session to be in a state. */
typedef struct SessionWait
{
	pg_uuid_t session_id;
	Oid role;
	SessionState until;
	TimestampTz give_up_at;
	int64 timeout_s;
	int pause_ms;
} SessionWait;

/*
 * Begin to wait, by a condition variable if there is shared memory: it is for the caller
 * to end that by ConditionVariableCancelSleep(), unless he raises.
 */
extern void session_wait_begin(SessionWait *wait, const pg_uuid_t *id, Oid role, SessionState until,
							   int64 timeout_s);

/*
 * Whether the session is there now; *state is set.  Needs a transaction.  Raises AV005, and
 * what session_raise_ended() does, or 55000 where it can never be.
 */
extern bool session_wait_look(const SessionWait *wait, SessionState *state);

/* Sleep until something may have changed, or it is time to look anyway; AV011 when time is up. */
extern void session_wait_sleep(SessionWait *wait);

#endif /* AGENTVM_SESSION_SESSION_H */
