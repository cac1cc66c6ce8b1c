/*-------------------------------------------------------------------------
 *
 * dispatch.c
 *		CALL agentvm.dispatch(): one pass of the engine in a plain backend.
 *
 * The same engine as in the dispatchers, with SPI_commit() between the steps.
 * Providers whose library blocks are left to their runner: a thread that hangs
 * would stay in somebody's session.
 * While it waits for answers it is in a transaction that holds no snapshot, so
 * it pins nothing.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "db.h"
#include "engine/engine.h"
#include "engine/identity.h"
#include "engine/sweep.h"
#include "engine/wake.h"
#include "procedure.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_dispatch);
PG_FUNCTION_INFO_V1(agentvm_wake);

/* A transaction is open already; the engine wants to see what is committed, and to write. */
static void
begin(void)
{
	XactIsoLevel = XACT_READ_COMMITTED;
	XactReadOnly = false;
}

static void
commit(void)
{
	SPI_commit();
}

Datum
agentvm_dispatch(PG_FUNCTION_ARGS)
{
	EngineHost host = {begin, commit};
	MemoryContext caller = CurrentMemoryContext;
	int limit = PG_ARGISNULL(0) ? 100 : PG_GETARG_INT32(0);
	int claimed = 0;
	TimestampTz last_claim_at = GetCurrentTimestamp();
	Engine *engine;
	DbScope scope;

	if (limit <= 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("max_sessions must be positive, but is %d", limit)));
	require_admin("dispatch sessions");
	require_no_transaction_block(fcinfo, "agentvm.dispatch()");
	if (!identity_permits("agentvm.dispatch()"))
		PG_RETURN_DATUM(procedure_result(fcinfo, Int32GetDatum(0)));

	if (SPI_connect_ext(SPI_OPT_NONATOMIC) != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	SPI_commit(); /* whatever the CALL itself looked at is not ours to keep */
	engine = engine_create(PortalContext, NULL, LANE_HTTP, host);

	(void) engine_reclaim(engine);
	begin();
	db_enter(&scope);
	(void) sweep_bound(limit);
	db_leave(&scope);
	commit();
	for (;;)
	{
		bool idle = engine_in_flight(engine) == 0;
		int more = claimed < limit ? engine_claim(engine, limit - claimed) : 0;

		engine_run(engine);
		if (more > 0)
		{
			claimed += more;
			last_claim_at = GetCurrentTimestamp();
			continue;
		}
		/* the rows looked at so far are not to be had, but there are others behind them */
		if (claimed < limit && engine_next_look(engine) == DT_NOBEGIN)
			continue;
		/* what is left after a whole lease is locked by a user: others will record it */
		if (idle || GetCurrentTimestamp() > last_claim_at + avm_lease_ms * INT64CONST(1000))
			break;
		(void) WaitLatchOrSocket(
			MyLatch, WL_LATCH_SET | WL_SOCKET_READABLE | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
			engine_fd(engine), 100, AvmWaitEvent("AgentvmDispatch"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	engine_destroy(engine);
	SPI_finish();
	MemoryContextSwitchTo(caller);
	PG_RETURN_DATUM(procedure_result(fcinfo, Int32GetDatum(claimed)));
}

Datum
agentvm_wake(PG_FUNCTION_ARGS)
{
	wake_workers(LANE_ALL, DT_NOBEGIN);
	PG_RETURN_VOID();
}
