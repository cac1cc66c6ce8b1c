/*-------------------------------------------------------------------------
 *
 * dispatcher.c
 *		The background worker that serves a lane of one database: a dispatcher, or a
 *		runner for providers whose library blocks.
 *
 * It sleeps until a commit wakes it, a call is answered, or the next deadline is
 * due; there is no polling in between.  It waits on its own latch and on the
 * engine's one fd, so DROP DATABASE, SIGTERM and SIGHUP are answered at once
 * whatever is in flight.  An error ends the transaction, not the worker.
 *
 * A runner differs in three things: its calls are made on threads, it answers
 * questions of other backends, and what is to be done once per database it leaves
 * to the dispatchers.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "catalog/pg_extension.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "db.h"
#include "engine/announce.h"
#include "engine/audit.h"
#include "engine/engine.h"
#include "engine/identity.h"
#include "engine/inventory.h"
#include "engine/login.h"
#include "engine/question.h"
#include "engine/sweep.h"
#include "engine/threads.h"
#include "engine/worker.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "tcop/tcopprot.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"

#define ERROR_PAUSE_MS 1000
/* so long (us) after those before answers are taken in, where they come all the time */
#define GATHER_US 20000
#define STATEMENT_LIMIT_MS                                                                         \
	60000 /* statement_timeout is not armed for workers; a batch takes milliseconds */

void
worker_settings(void)
{
	static const char *const settings[][2] = {
#ifdef USE_LZ4
		/* a handle with its request is compressed at each launch, which takes ten times as long by pglz */
		{"default_toast_compression", "lz4"},
#endif
		{"default_transaction_deferrable", "off"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_read_only", "off"},
		{"exit_on_error", "off"},
		{"jit", "off"},
		{"lock_timeout", "0"},
		{"role", "none"},
		{"search_path", ""},
		{"session_replication_role", "origin"},
		{"transaction_timeout", "0"}, /* since 17 */
	};
	int i;

	for (i = 0; i < lengthof(settings); i++)
	{
		if (GetConfigOption(settings[i][0], true, false) != NULL)
			SetConfigOption(settings[i][0], settings[i][1], PGC_SUSET, PGC_S_SESSION);
	}
}

static void
begin(void)
{
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	enable_timeout_after(STATEMENT_TIMEOUT, STATEMENT_LIMIT_MS);
	pgstat_report_activity(STATE_RUNNING, "agentvm: claim and record");
}

static void
commit(void)
{
	disable_timeout(STATEMENT_TIMEOUT, false);
	PopActiveSnapshot();
	CommitTransactionCommand();
	pgstat_report_stat(false);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/*
 * Whether the sessions of this database are ours to act on; that they are not is
 * told once.
 */
static IdentityState
look_at_identity(void)
{
	static bool complained = false;
	IdentityState state;
	char *problem;

	state = identity_look(&problem);
	if (state == IDENTITY_FOREIGN && !complained)
		ereport(LOG,
				(errmsg("agentvm: database \"%s\" is a copy that nobody has adopted: nothing is "
						"dispatched",
						get_database_name(MyDatabaseId)),
				 errdetail("What does not match: %s.", problem), errhint(IDENTITY_HINT)));
	complained = state == IDENTITY_FOREIGN;
	return state;
}

/*
 * Whether the extension is here, in the version that this library was built for,
 * and in that case whether its sessions are ours.  The lock makes a DROP EXTENSION under way either wait for us or be seen.
 */
static bool
extension_is_ready(IdentityState *identity)
{
	static bool complained = false;
	Oid extension;
	char *version;
	bool ready = false;

	begin();
	extension = get_extension_oid("agentvm", true);
	if (OidIsValid(extension))
	{
		LockDatabaseObject(ExtensionRelationId, extension, 0, AccessShareLock);
		ready = get_extension_oid("agentvm", true) == extension;
	}
	version = ready ? extension_version(NULL) : NULL;
	if (version != NULL && strcmp(version, AGENTVM_VERSION) != 0)
	{
		ready = false;
		if (!complained)
			ereport(LOG,
					(errmsg("agentvm: the extension's version is %s, the library's %s: nothing is "
							"dispatched",
							version, AGENTVM_VERSION),
					 errhint("Run ALTER EXTENSION agentvm UPDATE, or restart the server after "
							 "installing the library.")));
		complained = true;
	}
	else
		complained = false;
	*identity = version != NULL && ready ? look_at_identity() : IDENTITY_FOREIGN;
	commit();
	return ready && *identity == IDENTITY_IN_ORDER;
}

/* End what backends have left behind. */
static void
end_unbound(void)
{
	DbScope scope;

	begin();
	db_enter(&scope);
	(void) sweep_bound(avm_batch_size);
	db_leave(&scope);
	commit();
}

/* What the first dispatcher does about the lists of VMs, a few times per interval of theirs. */
static void
refresh_inventory(DispatcherSlot *slot)
{
	static TimestampTz next = 0;
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz interval = avm_inventory_interval_s * USECS_PER_SEC / 3;
	DbScope scope;
	int peers;

	next = Min(next, now + interval);
	if (interval == 0 || now < next || shared_rank(slot, &peers) > 0)
		return;
	next = now + interval;
	begin();
	db_enter(&scope);
	inventory_refresh();
	db_leave(&scope);
	commit();
}

/* What is done once per sweep_interval. */
static void
periodic(Engine *engine, DispatcherSlot *slot, int lane)
{
	DbScope scope;

	engine_look_at_everything(engine);
	(void) engine_reclaim(engine);
	login_tidy(engine);
	if (lane != LANE_HTTP)
		return;
	begin();
	db_enter(&scope);
	(void) sweep_heartbeat(avm_batch_size);
	(void) sweep_hydration(avm_batch_size);
	db_leave(&scope);
	commit();
	end_unbound();
	refresh_inventory(slot);
}

/* One round: everything that can be done now. Returns when to look again. */
static TimestampTz
pass(Engine *engine, DispatcherSlot *slot, int lane, TimestampTz *next_periodic)
{
	TimestampTz now = GetCurrentTimestamp();

	if (now >= *next_periodic)
	{
		*next_periodic = now + avm_sweep_interval_ms * INT64CONST(1000);
		periodic(engine, slot, lane);
	}
	if (shared_take_unbound(slot))
		end_unbound();
	engine_run(engine);
	(void) engine_claim(engine, avm_batch_size);
	return Min(engine_next_look(engine), *next_periodic);
}

/*
 * Where answers come in one after the other, each by itself would cost a pass, most of which
 * is the same for one and for many.  What is committed meanwhile does not wait: returns
 * whether that has ended the pause.
 */
static bool
gather(TimestampTz until)
{
	long ms = (until - GetCurrentTimestamp()) / 1000;

	return ms > 0 && (WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, ms,
								AvmWaitEvent("AgentvmDispatcher")) &
					  WL_LATCH_SET) != 0;
}

/* What only a runner does in a pass. */
static void
run_threads(DispatcherSlot *slot)
{
	questions_run();
	slot->stuck = threads_stuck();
	if (!threads_are_exhausted())
		return;
	ereport(LOG,
			(errmsg("agentvm: all %d threads of the runner are stuck in calls that do not come "
					"back: it ends, to be started anew",
					slot->stuck)));
	proc_exit(1);
}

void
agentvm_dispatcher_main(Datum arg)
{
	EngineHost host = {begin, commit};
	sigjmp_buf local_sigjmp_buf;
	DispatcherSlot *slot;
	Engine *volatile engine = NULL;
	volatile TimestampTz pause_until = 0;
	IdentityState identity;
	static TimestampTz next_periodic = 0; /* static: it must survive the jump */
	WorkerTask task;

	memcpy(&task, MyBgworkerEntry->bgw_extra, sizeof(task));
	if (task.lane == LANE_BLOCKING)
		threads_exit_quietly();
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(task.database, InvalidOid, 0);
	slot = shared_attach(task.database, task.lane, task.index);
	if (slot == NULL)
		proc_exit(0); /* another one is there already */

	SetConfigOption("application_name", MyBgworkerEntry->bgw_name, PGC_USERSET, PGC_S_SESSION);
	worker_settings();

	if (sigsetjmp(local_sigjmp_buf, 1) != 0)
	{
		error_context_stack = NULL;
		HOLD_INTERRUPTS();
		disable_all_timeouts(false);
		EmitErrorReport();
		AbortCurrentTransaction();
		MemoryContextSwitchTo(TopMemoryContext);
		FlushErrorState();
		if (engine != NULL)
			engine_after_error(engine);
		RESUME_INTERRUPTS();
		pgstat_report_activity(STATE_IDLE, NULL);
		pause_until = GetCurrentTimestamp() + ERROR_PAUSE_MS * INT64CONST(1000);
	}
	PG_exception_stack = &local_sigjmp_buf;

	for (;;)
	{
		TimestampTz pass_began;
		TimestampTz until;
		int events = WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH;
		pgsocket fd = PGINVALID_SOCKET;

		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			next_periodic = Min(next_periodic,
								GetCurrentTimestamp() + avm_sweep_interval_ms * INT64CONST(1000));
		}

		pass_began = GetCurrentTimestamp();
		/* what is committed after this look wakes us again; a new engine looks at everything */
		if (engine == NULL)
			(void) shared_take_due(slot, &until);
		if (GetCurrentTimestamp() < pause_until)
			until = pause_until;
		else if (!extension_is_ready(&identity))
		{
			/* one that is not in use yet comes to life with the first commit that wakes us */
			shared_serve(slot, identity == IDENTITY_UNUSED);
			if (engine != NULL)
				engine_destroy(engine);
			engine = NULL;
			if (task.lane == LANE_HTTP)
				announce_forget();
			until = GetCurrentTimestamp() + avm_sweep_interval_ms * INT64CONST(1000);
		}
		else
		{
			if (engine == NULL)
			{
				engine = engine_create(TopMemoryContext, slot, task.lane, host);
				next_periodic = 0;
				shared_serve(slot, true);
			}
			if (task.lane == LANE_HTTP)
			{
				announce_begin(slot, host);
				until = pass(engine, slot, task.lane, &next_periodic);
				until = Min(until, announce_changes(slot, host));
				until = audit_work(slot, host, until);
			}
			else
			{
				until = pass(engine, slot, task.lane, &next_periodic);
				run_threads(slot);
			}
		}

		/* after an error we sleep whatever is committed meanwhile */
		if (until <= GetCurrentTimestamp() ||
			(!shared_sleep_until(slot, until) && until != pause_until))
			continue;
		if (engine != NULL && engine_only_waits(engine) && until != pause_until &&
			gather(Min(until, pass_began + GATHER_US)))
			continue;
		if (engine != NULL && until != pause_until)
		{
			fd = engine_fd(engine);
			events |= WL_SOCKET_READABLE;
		}
		(void) WaitLatchOrSocket(
			MyLatch, events, fd,
			Min(Max(1, (until - GetCurrentTimestamp() + 999) / 1000), 3600 * 1000L),
			task.lane == LANE_HTTP ? AvmWaitEvent("AgentvmDispatcher")
								   : AvmWaitEvent("AgentvmRunner"));
	}
}
