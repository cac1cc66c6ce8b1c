/*-------------------------------------------------------------------------
 *
 * worker.h
 *		Background workers: the launcher of the cluster, the dispatchers of its databases.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_WORKER_H
#define AGENTVM_ENGINE_WORKER_H

#include "agentvm.h"

/* Register the launcher; called from _PG_init while preloading. */
extern void worker_init(void);

/* Entry points, found by name when the postmaster starts the workers. */
extern PGDLLEXPORT void agentvm_launcher_main(Datum arg);
extern PGDLLEXPORT void agentvm_dispatcher_main(Datum arg);

#endif /* AGENTVM_ENGINE_WORKER_H */
