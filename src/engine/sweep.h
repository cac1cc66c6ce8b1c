/*-------------------------------------------------------------------------
 *
 * sweep.h
 *		Finding sessions that should end: never bootstrapped, silent, too old.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_SWEEP_H
#define AGENTVM_ENGINE_SWEEP_H

#include "postgres.h"

#include "utils/uuid.h"

/* Seconds without a report after which a gateway listens no more; it reports every 10 s. */
#define GATEWAY_SILENT_S 30

/*
 * Each marks up to "max_sessions" sessions (a negative number: all that are due)
 * as terminating, oldest first, and returns how many. A session that somebody
 * else has locked is left for the next time. Inside a db scope.
 */
extern int sweep_bootstrap(int max_sessions);
extern int sweep_heartbeat(int max_sessions);
extern int sweep_lifetime(int max_sessions);

/*
 * The same with sessions whose warm VM has been taken, and whose runtime has not fetched within
 * bootstrap_timeout what it was taken with.  Not while nobody listens to runtimes.
 */
extern int sweep_hydration(int max_sessions);

/*
 * The same with sessions that are bound to a backend, by bound_pid, and are not needed by any
 * more: nobody has bound_hold() on them.
 */
extern int sweep_bound(int max_sessions);

/*
 * Hold a session that is bound to this backend, before that has been committed, until
 * bound_release(), the abort of a transaction, or the end of the backend: whatever comes
 * first.  Inside a db scope.
 */
extern void bound_hold(const pg_uuid_t *id);
extern void bound_release(const pg_uuid_t *id);

#endif /* AGENTVM_ENGINE_SWEEP_H */
