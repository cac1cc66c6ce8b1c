/*-------------------------------------------------------------------------
 *
 * run.c
 *		run(): a VM for one command.
 *
 * The session is committed bound to this backend, which holds it (sweep.c) until its
 * end has been committed, too.  Whatever becomes of us, the VM does not stay: an error
 * or a cancel is caught, and raised again once the end is committed; if it comes to
 * none of that, the backend's hold goes and the dispatchers end the session.
 *
 * Between two commits nothing may be caught but in a subtransaction, and in a
 * subtransaction nothing may be committed.  So it all goes in small steps, each in a
 * subtransaction of its own, with a commit after those that have looked at something:
 * no snapshot is held while we wait.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/shared.h"
#include "engine/sweep.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "procedure.h"
#include "session/commands.h"
#include "session/session.h"
#include "storage/condition_variable.h"
#include "storage/ipc.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_run);

/* Arguments of run() and of provision() */
enum
{
	ARG_TEAM,
	ARG_COMMAND,
	ARG_PROFILE,
	ARG_TIMEOUT
};
#define PROVISION_ARGS 10
#define PROVISION_TEAM 0
#define PROVISION_PROFILE 2

typedef struct Run
{
	MemoryContext context; /* outlives transactions */
	pg_uuid_t session;
	Oid role;
	ExecCommand command;
	SessionWait wait;
	bool ready;
	Exec *exec;
	const ExecResult *result;
	ErrorData *error; /* the first one */
} Run;

static DbQuery bind_query = {
	"UPDATE agentvm.session SET bound_pid = $2, bound_start = $3 WHERE session_id = $1 "
	"RETURNING runtime",
	3,
	{UUIDOID, INT4OID, TIMESTAMPTZOID}};

/* Whether this backend has a session bound to it. */
static bool is_bound = false;

/* Exit hook, after our locks are gone: nobody needs the session any more. */
static void
leave_behind(int code, Datum arg)
{
	if (is_bound)
		shared_publish_unbound();
}

/* Provision a session that is bound to us, in a transaction of its own. */
static void
provision_bound(FunctionCallInfo fcinfo, Run *run)
{
	static bool registered = false;
	LOCAL_FCINFO(call, PROVISION_ARGS);
	Datum values[3];
	DbScope scope;
	bool isnull;
	int i;

	InitFunctionCallInfoData(*call, NULL, PROVISION_ARGS, InvalidOid, NULL, NULL);
	for (i = 0; i < PROVISION_ARGS; i++)
		call->args[i].isnull = true;
	call->args[PROVISION_TEAM] = fcinfo->args[ARG_TEAM];
	call->args[PROVISION_PROFILE] = fcinfo->args[ARG_PROFILE];
	run->session = *DatumGetUUIDP(agentvm_provision(call));

	db_enter(&scope);
	values[0] = UUIDPGetDatum(&run->session);
	values[1] = Int32GetDatum(MyProcPid);
	values[2] = TimestampTzGetDatum(MyStartTimestamp);
	db_run(&bind_query, values, NULL);
	if (!DatumGetBool(db_value(0, 1, &isnull)))
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("agentvm.run() needs a VM with a runtime"),
						errhint("Use a profile that has one: runtime = true.")));
	bound_hold(&run->session);
	db_leave(&scope);

	if (!registered)
		on_shmem_exit(leave_behind, (Datum) 0);
	registered = true;
	is_bound = true;
	SPI_commit();
}

/* ---- steps: each in a subtransaction ---- */

static void
look(Run *run)
{
	SessionState state;

	run->ready = session_wait_look(&run->wait, &state);
}

static void
sleep_for_change(Run *run)
{
	session_wait_sleep(&run->wait);
}

static void
advance(Run *run)
{
	bool all_done;

	exec_advance(run->exec);
	run->result = exec_finished(run->exec, &all_done);
}

static void
sleep_for_answer(Run *run)
{
	exec_sleep(run->exec);
}

static void
end(Run *run)
{
	DbScope scope;

	db_enter(&scope);
	(void) session_end(&run->session,
					   run->error ? "agentvm.run() has failed" : "agentvm.run() has finished");
	db_leave(&scope);
}

/* Take a step; false: it has failed, and run->error is set. */
static bool
take(Run *run, void (*step)(Run *))
{
	MemoryContext old = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	volatile bool done = false;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(run->context);
	PG_TRY();
	{
		step(run);
		ReleaseCurrentSubTransaction();
		done = true;
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(run->context);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		if (run->error == NULL)
			run->error = error;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	CurrentResourceOwner = owner;
	return done;
}

/* Wait until the VM is ready and run the command there; false: something has failed. */
static bool
run_command(Run *run)
{
	session_wait_begin(&run->wait, &run->session, run->role, STATE_READY,
					   avm_max_lifetime_ceiling_s);
	for (;;)
	{
		if (!take(run, look))
			return false;
		SPI_commit();
		if (run->ready)
			break;
		if (!take(run, sleep_for_change))
			return false;
	}
	ConditionVariableCancelSleep();

	MemoryContextSwitchTo(run->context);
	run->exec = exec_create(run->role, &run->command);
	exec_add(run->exec, &run->session, NULL);
	for (;;)
	{
		if (!take(run, advance))
			return false;
		SPI_commit();
		if (run->result != NULL)
			return true;
		if (!take(run, sleep_for_answer))
			return false;
	}
}

/* End the session, and let go of it. */
static void
end_session(Run *run)
{
	bool ended = take(run, end);

	SPI_commit();
	bound_release(&run->session);
	is_bound = false;
	if (!ended)
		shared_publish_unbound();
}

static void
read_arguments(FunctionCallInfo fcinfo, Run *run)
{
	char *script;

	if (PG_ARGISNULL(ARG_COMMAND) || PG_ARGISNULL(ARG_TIMEOUT))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be null", PG_ARGISNULL(ARG_COMMAND) ? "command" : "timeout")));
	script = text_to_cstring(PG_GETARG_TEXT_PP(ARG_COMMAND));
	exec_set_text(&run->command, script);
	run->command.timeout_ms = check_interval(PG_GETARG_INTERVAL_P(ARG_TIMEOUT), "timeout") * 1000;
	run->command.audit = exec_audit(run->role, &run->command, script, NULL);
}

Datum
agentvm_run(PG_FUNCTION_ARGS)
{
	MemoryContext caller = CurrentMemoryContext;
	Run *run;
	Datum values[3];
	bool nulls[3] = {false, false, false};

	require_no_transaction_block(fcinfo, "agentvm.run()");
	if (SPI_connect_ext(SPI_OPT_NONATOMIC) != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	MemoryContextSwitchTo(PortalContext);
	run = palloc0(sizeof(Run));
	run->context = AllocSetContextCreate(PortalContext, "agentvm run", ALLOCSET_DEFAULT_SIZES);
	run->role = GetUserId();
	MemoryContextSwitchTo(run->context);
	read_arguments(fcinfo, run);

	provision_bound(fcinfo, run);
	if (run_command(run) && run->result->failure == NULL)
	{
		MemoryContextSwitchTo(caller);
		values[0] = Int32GetDatum(run->result->exit_code);
		values[1] = PointerGetDatum(
			text_from_vm(run->result->streams[0].data, run->result->streams[0].len, NULL));
		values[2] = PointerGetDatum(
			text_from_vm(run->result->streams[1].data, run->result->streams[1].len, NULL));
	}
	/* what is under way goes first: it would only keep the VM busy */
	if (run->error != NULL && run->exec != NULL)
		exec_destroy(run->exec);
	end_session(run);
	if (run->error != NULL)
		ReThrowError(run->error);
	if (run->result->failure != NULL)
		call_raise(run->result->failure);
	exec_destroy(run->exec);
	SPI_finish();
	MemoryContextSwitchTo(caller);
	PG_RETURN_DATUM(procedure_row(fcinfo, values, nulls));
}
