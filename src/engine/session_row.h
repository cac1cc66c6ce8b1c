/*-------------------------------------------------------------------------
 *
 * session_row.h
 *		A row of agentvm.session in memory: locked, changed, written back.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_SESSION_ROW_H
#define AGENTVM_ENGINE_SESSION_ROW_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "engine/state.h"
#include "providers/provider.h"
#include "storage/itemptr.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

/* Sessions that a transaction locks, and writes back one by one. */
typedef struct SessionBatch SessionBatch;

/* What the engine reads; the second part it may change, session_row_save() writes that part. */
typedef struct SessionRow
{
	pg_uuid_t session_id;
	char *id_text;
	char *team_id;
	char *agent_id;
	char *provider;
	TimestampTz created_at;
	TimestampTz deadline_at;
	TimestampTz ceiling_at;
	Jsonb *options;
	int vcpus;
	int memory_mib;
	int disk_gib;
	bool runtime;
	bool warm; /* no provision() has taken it yet */
	int64 bootstrap_timeout_us;
	char *key_id;
	char *cluster;
	int lane;

	SessionState saved_state; /* as the row has it */
	SessionState state;
	char *end_reason;
	char *detail;
	char *vm_id;
	char *region;
	char *address;
	char *purchase;
	int attempt;
	TimestampTz launched_at; /* 0: NULL, as for all times here */
	TimestampTz ready_at;
	TimestampTz resumed_at;
	TimestampTz ended_at;
	TimestampTz next_check_at; /* 0: NULL */
	int64 lease;			   /* 0: NULL */
	int retries;
	bool running;
	Jsonb *handle;

	SessionBatch *batch;   /* NULL: read without one */
	ItemPointerData place; /* where the row was last seen */
} SessionRow;

/*
 * Begin with sessions that are to be locked and saved, palloc'd in CurrentMemoryContext; end in the
 * same (sub)transaction, an abort does so, too.  Inside a db scope.
 */
extern SessionBatch *session_batch_begin(void);
extern void session_batch_end(SessionBatch *batch);

/*
 * Lock a session and read it, palloc'd in CurrentMemoryContext; NULL when there is none, when
 * somebody else has it locked, whom the engine does not wait for, or when it is not
 * due at "due_by" (DT_NOEND: due or not).
 */
extern SessionRow *session_row_lock(SessionBatch *batch, const pg_uuid_t *id, TimestampTz due_by);

/* Read one session without locking it; NULL when there is none.  Inside a db scope. */
extern SessionRow *session_row_read(const pg_uuid_t *id);

/*
 * Write the changeable part back; a lease is written with this process as its
 * owner.  Arranges for dispatchers and waiters to be woken at commit.  Inside a
 * db scope, with the row locked.
 */
extern void session_row_save(SessionRow *row);

/* The lease of a session as last committed, 0 when it has none or is gone.  Inside a db scope. */
extern int64 session_row_lease(const pg_uuid_t *id);

/*
 * Append to the log; what does not apply is NULL.  A change of state is logged by
 * the trigger, a new session by provision().  Inside a db scope.
 */
extern void event_add(const pg_uuid_t *session_id, const char *team_id, const char *kind,
					  const char *old_state, const char *new_state, const char *reason,
					  Jsonb *detail);

/* The same, of a row that we have, for all that is no change of state. */
extern void session_event_add(const SessionRow *row, const char *kind, const char *reason,
							  Jsonb *detail);

/* What a provider may see of the row; points into the row. */
extern ProviderSession *session_row_for_provider(const SessionRow *row);

#endif /* AGENTVM_ENGINE_SESSION_ROW_H */
