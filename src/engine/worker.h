/*-------------------------------------------------------------------------
 *
 * worker.h
 *		Background workers: the launcher of the cluster, the dispatchers and runners
 *		of its databases.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_WORKER_H
#define AGENTVM_ENGINE_WORKER_H

#include "agentvm.h"

/* What a worker is started for: its bgw_extra. */
typedef struct WorkerTask
{
	Oid database;
	int lane;
	int index;
} WorkerTask;

/* Register the launcher; called from _PG_init while preloading. */
extern void worker_init(void);

/*
 * Put the settings of this process that are meant for clients, and would disturb
 * a worker, where they do not: what the configuration, or ALTER DATABASE or ALTER
 * ROLE, says about them does not count.  Call it once connected.
 */
extern void worker_settings(void);

/* Entry points, found by name when the postmaster starts the workers. */
extern PGDLLEXPORT void agentvm_launcher_main(Datum arg);
extern PGDLLEXPORT void agentvm_dispatcher_main(Datum arg);

#endif /* AGENTVM_ENGINE_WORKER_H */
