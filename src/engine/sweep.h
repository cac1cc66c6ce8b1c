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

#endif /* AGENTVM_ENGINE_SWEEP_H */
