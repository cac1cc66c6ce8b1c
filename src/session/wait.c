/*-------------------------------------------------------------------------
 *
 * wait.c
 *		wait() and await(): sleep until a session has reached a state.
 *
 * Whoever changes a session's state broadcasts, after commit, on a condition
 * variable that the session shares with others of its bucket; the waiter then
 * looks with a fresh snapshot.  Without shared memory it looks after 20 ms, then
 * less and less often, up to every 500 ms.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "db.h"
#include "engine/shared.h"
#include "miscadmin.h"
#include "procedure.h"
#include "session/session.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_wait);
PG_FUNCTION_INFO_V1(agentvm_await);

#define FIRST_PAUSE_MS 20
#define LAST_PAUSE_MS 500
#define MISSED_WAKE_MS 5000 /* COMMIT PREPARED broadcasts nothing */

void
session_wait_begin(SessionWait *wait, const pg_uuid_t *id, Oid role, SessionState until,
				   int64 timeout_s)
{
	ConditionVariable *changed = shared_changed(id);

	wait->session_id = *id;
	wait->role = role;
	wait->until = until;
	wait->timeout_s = timeout_s;
	wait->give_up_at = GetCurrentTimestamp() + timeout_s * USECS_PER_SEC;
	wait->pause_ms = FIRST_PAUSE_MS;
	if (changed != NULL)
		ConditionVariablePrepareToSleep(changed);
}

/* States that can be waited for; an end is an end, whichever was asked for. */
static void
read_arguments(FunctionCallInfo fcinfo, SessionWait *wait)
{
	char *until;
	int state;

	(void) session_id_argument(fcinfo, 0);
	if (PG_ARGISNULL(1) || PG_ARGISNULL(2))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
						errmsg("%s must not be null", PG_ARGISNULL(1) ? "until" : "timeout")));
	until = text_to_cstring(PG_GETARG_TEXT_PP(1));
	state = state_find(until);
	if (state < 0 || state == STATE_PROVISIONING || state == STATE_PAUSING ||
		state == STATE_RESUMING)
		ereport(
			ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("cannot wait until \"%s\"", until),
			 errhint("Known states are warm, ready, paused, terminating, terminated and failed.")));
	session_wait_begin(wait, session_id_argument(fcinfo, 0), GetUserId(), state,
					   check_interval(PG_GETARG_INTERVAL_P(2), "timeout"));
}

/* Whether the wait is over; raises when it can never be. */
static bool
is_reached(const SessionWait *wait, const SessionFacts *facts)
{
	bool for_end = wait->until == STATE_TERMINATING || state_is_ended(wait->until);

	if (facts->state == wait->until || (for_end && state_is_ended(facts->state)))
		return true;
	if (!for_end && (facts->state == STATE_TERMINATING || state_is_ended(facts->state)))
		session_raise_ended(&wait->session_id, facts);
	if (wait->until == STATE_WARM && facts->state != STATE_PROVISIONING)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("session %s is %s and will never be warm",
							   session_text(&wait->session_id), state_name(facts->state)),
						errhint("A provision() may have taken it.")));
	/* only what has failed leaves a word on a session that is ready or paused */
	if (facts->detail != NULL && ((wait->until == STATE_PAUSED && facts->state == STATE_READY) ||
								  (wait->until == STATE_READY && facts->state == STATE_PAUSED)))
		ereport(ERROR,
				(errcode(AVM_PROVIDER_ERROR),
				 errmsg("session %s could not be %s", session_text(&wait->session_id),
						wait->until == STATE_PAUSED ? "paused" : "resumed"),
				 errdetail("%s", facts->detail),
				 errhint("It is %s as before, and may be told again.", state_name(facts->state))));
	if (facts->changed_here)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("this wait could never end: the session was changed in this "
							   "transaction, which has not committed"),
						errhint("The provider is called only after commit: COMMIT first, then wait "
								"in a new transaction.")));
	return false;
}

void
session_wait_sleep(SessionWait *wait)
{
	ConditionVariable *changed = shared_changed(&wait->session_id);
	int64 left_ms = (wait->give_up_at - GetCurrentTimestamp()) / 1000 + 1;

	if (left_ms <= 0)
	{
		ConditionVariableCancelSleep();
		ereport(ERROR,
				(errcode(AVM_TIMED_OUT),
				 errmsg("session %s did not become %s within %lld s",
						DatumGetCString(
							DirectFunctionCall1(uuid_out, UUIDPGetDatum(&wait->session_id))),
						state_name(wait->until), (long long) wait->timeout_s),
				 errhint("It goes on by itself; see agentvm.status() and agentvm.session_event.")));
	}
	if (changed != NULL)
	{
		(void) ConditionVariableTimedSleep(changed, Min(left_ms, MISSED_WAKE_MS),
										   AvmWaitEvent("AgentvmWait"));
		return;
	}
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
					 Min(left_ms, wait->pause_ms), AvmWaitEvent("AgentvmWait"));
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
	wait->pause_ms = Min(wait->pause_ms * 2, LAST_PAUSE_MS);
}

bool
session_wait_look(const SessionWait *wait, SessionState *state)
{
	SessionFacts facts;
	DbScope scope;
	bool reached;

	db_enter(&scope);
	session_facts(&wait->session_id, wait->role, &facts);
	reached = is_reached(wait, &facts);
	*state = facts.state;
	db_leave(&scope);
	return reached;
}

/* A "procedure" commits before it sleeps, so that no snapshot is held. */
static SessionState
wait_for(SessionWait *wait, bool procedure)
{
	SessionState state;

	for (;;)
	{
		bool reached = session_wait_look(wait, &state);

		if (procedure)
			SPI_commit();
		if (reached)
			break;
		session_wait_sleep(wait);
	}
	ConditionVariableCancelSleep();
	return state;
}

Datum
agentvm_wait(PG_FUNCTION_ARGS)
{
	SessionWait wait = {0};

	read_arguments(fcinfo, &wait);
	PG_RETURN_TEXT_P(cstring_to_text(state_name(wait_for(&wait, false))));
}

Datum
agentvm_await(PG_FUNCTION_ARGS)
{
	MemoryContext caller = CurrentMemoryContext;
	SessionWait wait = {0};
	SessionState state;

	read_arguments(fcinfo, &wait);
	require_no_transaction_block(fcinfo, "agentvm.await()");
	if (SPI_connect_ext(SPI_OPT_NONATOMIC) != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	state = wait_for(&wait, true);
	SPI_finish();
	MemoryContextSwitchTo(caller);
	PG_RETURN_DATUM(procedure_result(fcinfo, CStringGetTextDatum(state_name(state))));
}
