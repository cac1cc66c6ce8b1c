/*-------------------------------------------------------------------------
 *
 * audit.h
 *		The log's seals: made, checked, and kept up by a dispatcher.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_AUDIT_H
#define AGENTVM_ENGINE_AUDIT_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "engine/engine.h"

/* What only one process at a time does, per database. */
typedef enum AuditTask
{
	AUDIT_SEAL = 1,
	AUDIT_PURGE
} AuditTask;

/*
 * Claim a task until the end of the transaction; with "wait" false returns false
 * at once where somebody else has it, or the extension is not here.  No user can
 * take this lock but by the functions that do the task.
 */
extern bool audit_claim(AuditTask task, bool wait);

/*
 * Until db_leave(), have statements planned with index scans wherever there are
 * any, whatever the statistics say.
 */
extern void audit_plan_by_index(void);

/* One walk over the events that may be unsealed; begins as {0}, and may be given up anywhere. */
typedef struct SealWalk
{
	Oid table; /* InvalidOid: it has not begun */
	int64 next;
	int64 last;
	int64 sealed_below; /* as it stood at the beginning, as the others */
	int64 seen;
	uint64 seen_next_xid;
	uint64 xmin;
	uint64 next_xid;
} SealWalk;

/*
 * Go on with a walk until it is over (returns true) or time is up, of which at
 * least one block is sealed; *sealed is raised by the number of events.  Inside
 * a scope, with AUDIT_SEAL claimed.
 */
extern bool audit_seal(SealWalk *walk, TimestampTz stop_at, int64 *sealed);

/*
 * What a dispatcher does about the log between its passes: where it is the
 * first one of its database, and it is time, one short transaction of sealing or
 * purging.  Outside a transaction.  Returns "until", or an earlier time at which
 * to be called again.
 */
extern TimestampTz audit_work(DispatcherSlot *slot, EngineHost host, TimestampTz until);

/* Whether this backend may change the log: set by purge.c around its own statements only. */
extern bool audit_log_is_open;

#endif /* AGENTVM_ENGINE_AUDIT_H */
