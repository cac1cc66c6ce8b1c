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
#include "utils/uuid.h"

/* What a caller's function needs to know of a session before it acts. */
typedef struct SessionFacts
{
	SessionState state;
	char *end_reason;
	char *detail;
	TimestampTz next_check_at; /* 0: never */
	TimestampTz ceiling_at;
	bool
		changed_here; /* this transaction has written the row: its engine work begins after commit */
} SessionFacts;

/* A uuid argument that must be there; raises 22004. */
extern pg_uuid_t *session_id_argument(FunctionCallInfo fcinfo, int argument);

/*
 * The latest committed facts (plus our own changes) about a session that "role"
 * may act on.  Raises AV005 when there is none, or it is another team's.
 * Inside a db scope; palloc'd in CurrentMemoryContext as it is after db_enter.
 */
extern void session_facts(const pg_uuid_t *id, Oid role, SessionFacts *facts);

/* Raise the error that belongs to a session that is ending or has ended. */
pg_noreturn extern void session_raise_ended(const pg_uuid_t *id, const SessionFacts *facts);

#endif /* AGENTVM_SESSION_SESSION_H */
