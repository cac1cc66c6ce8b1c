/*-------------------------------------------------------------------------
 *
 * launcher.c
 *		One launcher per cluster keeps the dispatchers and runners running.
 *
 * The launcher is connected to no database, so it sees shared catalogs only:
 * agentvm.databases says which databases to serve, and a dispatcher that finds
 * no extension in its database simply waits for it.  There is one owner of
 * restarts: the postmaster restarts the launcher, the launcher starts
 * dispatchers (BGW_NEVER_RESTART) and backs off from those that fail.
 *
 * A slot in shared memory is reserved before the worker is registered and taken
 * by the worker's pid when it runs; so a launcher that was restarted sees which
 * dispatchers are there and starts none twice.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "agentvm.h"
#include "catalog/pg_database.h"
#include "engine/shared.h"
#include "engine/worker.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"

#define MIN_BACKOFF_MS 1000
#define MAX_BACKOFF_MS 60000
#define TICK_MS 10000	 /* how soon a database that was just created is noticed */
#define HEALTHY_MS 10000 /* a worker that lived so long has not failed */

/* What the launcher knows about one worker it should keep running. */
typedef struct Wanted
{
	WorkerTask task;
	BackgroundWorkerHandle *handle; /* of the last start, NULL: none by this launcher */
	TimestampTz started_at;
	TimestampTz not_before;
	int backoff_ms;
	bool wanted; /* still asked for */
} Wanted;

static List *all_wanted = NIL; /* in TopMemoryContext */

/* There was no room for one more worker: then others need not try for a while, either. */
static bool short_of_workers = false;
static TimestampTz no_workers_before = 0;
static int no_workers_ms = MIN_BACKOFF_MS;

void
worker_init(void)
{
	BackgroundWorker worker = {0};

	if (IsBinaryUpgrade)
		return;
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = 5;
	strlcpy(worker.bgw_library_name, "agentvm", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "agentvm_launcher_main", sizeof(worker.bgw_function_name));
	strlcpy(worker.bgw_name, "agentvm launcher", sizeof(worker.bgw_name));
	strlcpy(worker.bgw_type, "agentvm launcher", sizeof(worker.bgw_type));
	RegisterBackgroundWorker(&worker);
}

static void
launcher_exit(int code, Datum arg)
{
	shared_set_launcher(NULL);
}

static bool
is_for(const Wanted *wanted, Oid database, int lane, int index)
{
	return wanted->task.database == database && wanted->task.lane == lane &&
		   wanted->task.index == index;
}

/* Note that (database, lane, index) should run. */
static void
want(Oid database, int lane, int index)
{
	MemoryContext old;
	ListCell *lc;
	Wanted *wanted;

	foreach (lc, all_wanted)
	{
		wanted = lfirst(lc);
		if (is_for(wanted, database, lane, index))
		{
			wanted->wanted = true;
			return;
		}
	}
	old = MemoryContextSwitchTo(TopMemoryContext);
	wanted = palloc0(sizeof(Wanted));
	wanted->task.database = database;
	wanted->task.lane = lane;
	wanted->task.index = index;
	wanted->wanted = true;
	wanted->backoff_ms = MIN_BACKOFF_MS;
	all_wanted = lappend(all_wanted, wanted);
	MemoryContextSwitchTo(old);
}

static int
by_index(const ListCell *a, const ListCell *b)
{
	const WorkerTask *x = &((const Wanted *) lfirst(a))->task;
	const WorkerTask *y = &((const Wanted *) lfirst(b))->task;

	return x->index != y->index ? x->index - y->index : x->lane - y->lane;
}

/*
 * Read agentvm.databases and pg_database into all_wanted: the first dispatcher of
 * every database, then its runner if libraries add providers, before the second
 * dispatcher of any.  Returns whether that many can run.
 */
static bool
read_wanted(void)
{
	List *databases = NIL;
	int count = 0;
	Relation relation;
	TableScanDesc scan;
	HeapTuple tuple;
	char *names;
	List *list;
	ListCell *lc;
	int i;

	foreach (lc, all_wanted)
		((Wanted *) lfirst(lc))->wanted = false;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	names = pstrdup(avm_databases);
	if (!SplitIdentifierString(names, ',', &list))
	{
		ereport(LOG, (errcode(AVM_INVALID_CONFIGURATION),
					  errmsg("agentvm.databases is not a list of names: \"%s\"", avm_databases)));
		list = NIL;
	}
	/* a plain scan: without a database there are no catalog caches to look into */
	relation = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(relation, 0, NULL);
	while (HeapTupleIsValid(tuple = heap_getnext(scan, ForwardScanDirection)))
	{
		Form_pg_database database = (Form_pg_database) GETSTRUCT(tuple);

		if (!database->datallowconn || database->datistemplate ||
			database->datconnlimit == AVM_CONNLIMIT_INVALID_DB)
			continue;
		foreach (lc, list)
		{
			if (strcmp(lfirst(lc), NameStr(database->datname)) != 0)
				continue;
			databases = lappend_oid(databases, database->oid);
			break;
		}
	}
	table_endscan(scan);
	table_close(relation, AccessShareLock);
	for (i = 0; i < avm_dispatchers; i++)
	{
		foreach (lc, databases)
		{
			if (count++ < MAX_DISPATCHERS)
				want(lfirst_oid(lc), LANE_HTTP, i);
		}
	}
	if (avm_dispatchers > 0 && avm_provider_libraries[0] != '\0')
	{
		foreach (lc, databases)
		{
			if (foreach_current_index(lc) < MAX_DISPATCHERS)
				want(lfirst_oid(lc), LANE_BLOCKING, 0);
		}
	}
	CommitTransactionCommand();
	MemoryContextSwitchTo(TopMemoryContext);
	list_sort(all_wanted, by_index);
	return count <= MAX_DISPATCHERS;
}

/* Start a worker in a slot of its own; false when no slot or no worker can be had now. */
static bool
start_worker(Wanted *wanted)
{
	const char *kind = wanted->task.lane == LANE_HTTP ? "dispatcher" : "runner";
	BackgroundWorker worker = {0};
	DispatcherSlot *slot =
		shared_reserve(wanted->task.database, wanted->task.lane, wanted->task.index);

	/* somebody wants the database just now, or surplus dispatchers are still ending */
	if (slot == NULL)
		return false;

	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker.bgw_library_name, "agentvm", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "agentvm_dispatcher_main", sizeof(worker.bgw_function_name));
	snprintf(worker.bgw_name, sizeof(worker.bgw_name), "agentvm %s %d", kind, wanted->task.index);
	snprintf(worker.bgw_type, sizeof(worker.bgw_type), "agentvm %s", kind);
	memcpy(worker.bgw_extra, &wanted->task, sizeof(WorkerTask));
	worker.bgw_notify_pid = MyProcPid;

	if (wanted->handle != NULL)
		pfree(wanted->handle);
	wanted->handle = NULL;
	wanted->started_at = GetCurrentTimestamp();
	if (RegisterDynamicBackgroundWorker(&worker, &wanted->handle))
	{
		no_workers_ms = MIN_BACKOFF_MS;
		return true;
	}

	shared_lock(LW_EXCLUSIVE);
	memset(slot, 0, sizeof(*slot));
	shared_unlock();
	wanted->handle = NULL;
	wanted->started_at = 0;
	no_workers_before = GetCurrentTimestamp() + no_workers_ms * INT64CONST(1000);
	no_workers_ms = Min(no_workers_ms * 2, TICK_MS);
	if (!short_of_workers)
		ereport(LOG, (errmsg("agentvm: could not start a %s", kind),
					  errhint("Consider increasing max_worker_processes. It is tried again, "
							  "quietly, until there is room.")));
	short_of_workers = true;
	return false;
}

/* Say what there is too little of, so that view health can tell. */
static void
report_shortage(bool enough_slots)
{
	static bool complained = false;

	if (!enough_slots && !complained)
		ereport(LOG, (errmsg("agentvm: no more than %d dispatchers can run in one cluster",
							 MAX_DISPATCHERS),
					  errhint("Reduce agentvm.dispatchers, or the number of databases in "
							  "agentvm.databases.")));
	complained = !enough_slots;
	shared_set_shortage(short_of_workers ? SHORT_OF_WORKERS
						: !enough_slots	 ? SHORT_OF_SLOTS
										 : SHORT_OF_NOTHING);
}

/*
 * The slot that stands for a wanted worker: a running one, or one that is
 * being started.  A reservation whose worker has ended without taking it, or
 * that a former launcher left, is freed.
 */
static bool
has_slot(Wanted *wanted)
{
	bool found = false;
	pid_t pid;
	int i;

	shared_lock(LW_EXCLUSIVE);
	for (i = 0; i < MAX_WORKERS && !found; i++)
	{
		DispatcherSlot *slot = &shared_slots()[i];

		if (!is_for(wanted, slot->database, slot->lane, slot->index))
			continue;
		if (slot->pid == 0 && (wanted->handle == NULL ||
							   GetBackgroundWorkerPid(wanted->handle, &pid) == BGWH_STOPPED))
			memset(slot, 0, sizeof(*slot));
		else
			found = true;
	}
	shared_unlock();
	return found;
}

/* Stop workers of databases that are not to be served any more, and surplus ones. */
static void
stop_unwanted(void)
{
	int i;

	shared_lock(LW_SHARED);
	for (i = 0; i < MAX_WORKERS; i++)
	{
		DispatcherSlot *slot = &shared_slots()[i];
		bool wanted = false;
		ListCell *lc;

		foreach (lc, all_wanted)
		{
			Wanted *w = lfirst(lc);

			if (is_for(w, slot->database, slot->lane, slot->index))
				wanted = w->wanted;
		}
		if (slot->pid != 0 && !wanted)
			kill(slot->pid, SIGTERM);
	}
	shared_unlock();
}

void
agentvm_launcher_main(Datum arg)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	worker_settings();
	pgstat_report_appname("agentvm launcher");
	before_shmem_exit(launcher_exit, (Datum) 0);
	shared_set_launcher(MyLatch);

	for (;;)
	{
		TimestampTz now;
		TimestampTz wake;
		ListCell *lc;
		bool enough_slots;
		bool lacking = false;

		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}

		enough_slots = read_wanted();
		stop_unwanted();
		now = GetCurrentTimestamp();
		wake = now + TICK_MS * INT64CONST(1000);
		foreach (lc, all_wanted)
		{
			Wanted *wanted = lfirst(lc);

			/* also of one that is no longer wanted: a reservation that nobody took is freed */
			if (has_slot(wanted))
				continue;
			if (!wanted->wanted)
			{
				if (wanted->handle != NULL)
					pfree(wanted->handle);
				pfree(wanted);
				all_wanted = foreach_delete_current(all_wanted, lc);
				continue;
			}
			if (shared_is_held(wanted->task.database))
			{
				/* whoever holds it wakes us, unless he dies */
				wake = Min(wake, now + MIN_BACKOFF_MS * INT64CONST(1000));
				wanted->started_at = 0;
				continue;
			}
			/* it has ended: at once if it lived, with back-off if it fails again and again */
			if (wanted->started_at != 0 && wanted->not_before <= wanted->started_at)
			{
				if (now - wanted->started_at > HEALTHY_MS * INT64CONST(1000))
					wanted->backoff_ms = MIN_BACKOFF_MS;
				else
					wanted->backoff_ms = Min(wanted->backoff_ms * 2, MAX_BACKOFF_MS);
				wanted->not_before = now + wanted->backoff_ms * INT64CONST(1000);
			}
			if (wanted->not_before > now)
				wake = Min(wake, wanted->not_before);
			else if (no_workers_before > now || !start_worker(wanted))
			{
				lacking = lacking || short_of_workers;
				wake = Min(wake, Max(no_workers_before, now + MIN_BACKOFF_MS * INT64CONST(1000)));
			}
		}
		short_of_workers = lacking;
		report_shortage(enough_slots);

		pgstat_report_activity(STATE_IDLE, NULL);
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 Max(1, (wake - GetCurrentTimestamp()) / 1000),
						 AvmWaitEvent("AgentvmLauncher"));
	}
}
