/*-------------------------------------------------------------------------
 *
 * drift.h
 *		What a list of VMs means: which differ from our sessions, and what follows.
 *
 * The rows of agentvm.vm_drift of a place are written only by who has locked its row of
 * agentvm.inventory, so that nobody waits for anybody.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_DRIFT_H
#define AGENTVM_ENGINE_DRIFT_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"

/* Where VMs are listed. */
typedef struct Place
{
	char *account; /* a team; empty: our own hosts */
	char *provider;
	char *region; /* or host */
} Place;

/*
 * Those live sessions of a place whose VM is not among the living of a list: a List
 * of vm_ids (char *), to be asked for by themselves.  "pages" is a List of Jsonb
 * as OP_LIST has them; "started_at" is when the list was begun.  Inside a db scope, as
 * all functions here; nothing is written.
 */
extern List *drift_missed(const Place *place, List *pages, TimestampTz started_at);

/*
 * Write what differs, given the list and what came of asking for "missed" by
 * themselves ("looked", as pages), and begin the end of sessions that have lost their VM.
 * Returns how many VMs the list has that are not ended.
 */
extern int drift_write(const Place *place, List *pages, List *missed, List *looked,
					   TimestampTz started_at);

/*
 * The next VMs of a place that are to be ended, of those that the last list had: a List
 * of vm_ids, at most AVM_MAX_LISTED.  They are noted as asked for, so each is returned once
 * a list.  *sessions is set to a List of the ids (char *) of the sessions that they name and
 * that do not live (any more).
 */
extern List *drift_to_end(const Place *place, TimestampTz started_at, List **sessions);

/*
 * Log that the end of these VMs has been asked for: "ended" is a List of Jsonb as OP_REAP has them,
 * of those that were; the others keep "error" (may be NULL), of which the log tells, too.
 */
extern void drift_log_end(const Place *place, List *asked, List *ended, const char *error,
						  int millis);

/*
 * Look whether this server has been promoted since the last look: then VMs without a
 * session are quarantined, and all lists are due.  Cheap when it has not.
 */
extern void drift_look_for_failover(void);

/* The same, as adopt_cluster() has found it: "quarantine" for a takeover. */
extern void drift_begin_anew(bool quarantine);

#endif /* AGENTVM_ENGINE_DRIFT_H */
