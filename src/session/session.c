/*-------------------------------------------------------------------------
 *
 * session.c
 *		Functions on one session: terminate, extend, status, inspect; and the
 *		triggers that hold the state machine.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "agentvm.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "db.h"
#include "engine/ask.h"
#include "engine/command_row.h"
#include "engine/session_row.h"
#include "engine/shared.h"
#include "engine/wake.h"
#include "miscadmin.h"
#include "session/session.h"
#include "session/warm.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_terminate);
PG_FUNCTION_INFO_V1(agentvm_extend);
PG_FUNCTION_INFO_V1(agentvm_status);
PG_FUNCTION_INFO_V1(agentvm_inspect);
PG_FUNCTION_INFO_V1(agentvm_session_is_sound);
PG_FUNCTION_INFO_V1(agentvm_session_transition);

#define MAX_REASON 500 /* bytes of terminate()'s free text */

static DbQuery facts_query = {
	"SELECT s.state, s.end_reason, s.detail, s.next_check_at, s.xmin, "
	"$3 OR EXISTS (SELECT FROM agentvm.team_member m WHERE m.team_id = s.team_id "
	"AND pg_has_role($2, m.role, 'USAGE')), s.ceiling_at, s.runtime "
	"FROM agentvm.session s WHERE s.session_id = $1",
	3,
	{UUIDOID, OIDOID, BOOLOID}};

/*
 * The wish is written, and the row made due; while somebody holds a lease it
 * moves next_check_at itself, once its call has been answered.
 */
static DbQuery terminate_query = {
	"UPDATE agentvm.session SET state = 'terminating', end_reason = 'requested', detail = $2, "
	"retries = 0, next_check_at = CASE WHEN lease IS NULL THEN least(next_check_at, $3) "
	"ELSE next_check_at END "
	"WHERE session_id = $1 AND state NOT IN ('terminating', 'terminated', 'failed') "
	"RETURNING next_check_at, lane",
	3,
	{UUIDOID, TEXTOID, TIMESTAMPTZOID}};

/*
 * next_check_at stays at the old deadline: the engine looks then, and finds the
 * new one.
 */
static DbQuery extend_query = {
	"UPDATE agentvm.session SET deadline_at = deadline_at + $2 "
	"WHERE session_id = $1 AND state NOT IN ('terminating', 'terminated', 'failed') "
	"AND deadline_at + $2 <= ceiling_at RETURNING deadline_at, next_check_at, lane",
	2,
	{UUIDOID, INTERVALOID}};

static DbQuery due_query = {
	"SELECT next_check_at, lane FROM agentvm.session WHERE session_id = $1", 1, {UUIDOID}};

static DbKey ending_key = {{"session_ending"}, {"session_ending_pkey"}, F_UUID_EQ};
static DbInsert ending_insert = {{"session_ending"}, 1, {"session_id"}};

static DbQuery has_ended_query = {
	"DELETE FROM agentvm.session_ending WHERE session_id = $1", 1, {UUIDOID}};

/* A VM that is gone takes no room. */
static DbQuery displace_query = {
	"DELETE FROM agentvm.placement WHERE session_id = $1", 1, {UUIDOID}};

pg_uuid_t *
session_id_argument(FunctionCallInfo fcinfo, int argument)
{
	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("session_id must not be null")));
	return PG_GETARG_UUID_P(argument);
}

char *
session_text(const pg_uuid_t *id)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)));
}

pg_noreturn static void
raise_no_such_session(const pg_uuid_t *id)
{
	ereport(ERROR, (errcode(AVM_NO_SUCH_SESSION), errmsg(SESSION_UNKNOWN, session_text(id)),
					errhint(SESSION_UNKNOWN_HINT)));
	pg_unreachable();
}

bool
session_find(const pg_uuid_t *id, Oid role, SessionFacts *facts)
{
	Datum values[3] = {UUIDPGetDatum(id), ObjectIdGetDatum(role),
					   BoolGetDatum(caller_is_admin(role))};
	bool isnull;

	db_run(&facts_query, values, NULL);
	if (SPI_processed == 0 || !DatumGetBool(db_value(0, 6, &isnull)) || isnull)
		return false;
	facts->state = state_parse(db_text(0, 1, CurrentMemoryContext));
	facts->end_reason = db_text(0, 2, CurrentMemoryContext);
	facts->detail = db_text(0, 3, CurrentMemoryContext);
	facts->next_check_at = DatumGetTimestampTz(db_value(0, 4, &isnull));
	if (isnull)
		facts->next_check_at = 0;
	facts->changed_here =
		TransactionIdIsCurrentTransactionId(DatumGetTransactionId(db_value(0, 5, &isnull)));
	/* for everybody else it is not ready yet */
	if (facts->state == STATE_READY && facts->changed_here && warm_claimed_here(id))
		facts->state = STATE_WARM;
	facts->ceiling_at = DatumGetTimestampTz(db_value(0, 7, &isnull));
	facts->runtime = DatumGetBool(db_value(0, 8, &isnull));
	SPI_freetuptable(SPI_tuptable);
	return true;
}

void
session_facts(const pg_uuid_t *id, Oid role, SessionFacts *facts)
{
	if (!session_find(id, role, facts))
		raise_no_such_session(id);
}

void
session_raise_ended(const pg_uuid_t *id, const SessionFacts *facts)
{
	const char *reason = facts->end_reason ? facts->end_reason : "unknown";

	ereport(ERROR, (errcode(reason_sqlstate(reason)),
					state_is_ended(facts->state)
						? errmsg("session %s has ended: %s", session_text(id), reason)
						: errmsg("session %s is ending: %s", session_text(id), reason),
					facts->detail ? errdetail("%s", facts->detail) : 0,
					errhint("The log of the session is in agentvm.session_event.")));
	pg_unreachable();
}

void
session_left_alone(const pg_uuid_t *id)
{
	Datum values[1] = {UUIDPGetDatum(id)};
	bool isnull;
	TimestampTz due;

	db_run(&due_query, values, NULL);
	if (SPI_processed == 0)
		return;
	due = DatumGetTimestampTz(db_value(0, 1, &isnull));
	if (!isnull)
		wake_after_lock(DatumGetInt16(db_value(0, 2, &isnull)), due);
}

bool
session_end(const pg_uuid_t *id, const char *detail)
{
	Datum values[3] = {UUIDPGetDatum(id), (Datum) 0, TimestampTzGetDatum(GetCurrentTimestamp())};
	char nulls[3] = {' ', detail ? ' ' : 'n', ' '};
	bool isnull;

	if (detail != NULL)
		values[1] = CStringGetTextDatum(detail);
	db_run(&terminate_query, values, nulls);
	if (SPI_processed == 0)
	{
		session_left_alone(id);
		return false;
	}
	wake_after_lock(DatumGetInt16(db_value(0, 2, &isnull)),
					DatumGetTimestampTz(db_value(0, 1, &isnull)));
	return true;
}

Datum
agentvm_terminate(PG_FUNCTION_ARGS)
{
	Oid role = GetUserId();
	pg_uuid_t *id = session_id_argument(fcinfo, 0);
	char *detail = NULL;
	SessionFacts facts;
	DbScope scope;
	bool began;

	if (!PG_ARGISNULL(1))
	{
		char *reason = text_to_cstring(PG_GETARG_TEXT_PP(1));
		const char *c;

		if (strlen(reason) > MAX_REASON)
			ereport(ERROR, (errcode(AVM_OVER_LIMIT),
							errmsg("reason is %zu bytes long, but at most %d are kept",
								   strlen(reason), MAX_REASON)));
		for (c = reason; *c != '\0'; c++)
		{
			if ((unsigned char) *c < ' ' || *c == 0x7f)
				ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
								errmsg("reason must not hold control characters")));
		}
		if (strcmp(reason, "requested") != 0)
			detail = reason;
	}

	db_enter(&scope);
	session_facts(id, role, &facts);
	began = session_end(id, detail);
	db_leave(&scope);
	PG_RETURN_BOOL(began);
}

Datum
agentvm_extend(PG_FUNCTION_ARGS)
{
	Oid role = GetUserId();
	pg_uuid_t *id = session_id_argument(fcinfo, 0);
	SessionFacts facts;
	DbScope scope;
	Datum values[2];
	TimestampTz deadline;
	bool isnull;

	if (PG_ARGISNULL(1))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("by must not be null")));
	(void) check_interval(PG_GETARG_INTERVAL_P(1), "by");

	db_enter(&scope);
	session_facts(id, role, &facts);
	values[0] = UUIDPGetDatum(id);
	values[1] = PG_GETARG_DATUM(1);
	db_run(&extend_query, values, NULL);
	if (SPI_processed == 0)
	{
		session_left_alone(id);
		session_facts(id, role, &facts);
		if (facts.state == STATE_TERMINATING || state_is_ended(facts.state))
			ereport(ERROR, (errcode(AVM_SESSION_ENDED),
							errmsg("session %s is %s and cannot be extended", session_text(id),
								   state_name(facts.state))));
		ereport(ERROR,
				(errcode(AVM_OVER_LIMIT),
				 errmsg("session %s cannot be extended beyond its ceiling", session_text(id)),
				 errdetail("The ceiling is %s.",
						   DatumGetCString(DirectFunctionCall1(
							   timestamptz_out, TimestampTzGetDatum(facts.ceiling_at)))),
				 errhint("It was set by the team's max_lifetime and "
						 "agentvm.max_lifetime_ceiling when the session was made.")));
	}
	deadline = DatumGetTimestampTz(db_value(0, 1, &isnull));
	/* we held the row's lock: whoever passed it by meanwhile looks again */
	wake_after_lock(DatumGetInt16(db_value(0, 3, &isnull)),
					DatumGetTimestampTz(db_value(0, 2, &isnull)));
	db_leave(&scope);
	PG_RETURN_TIMESTAMPTZ(deadline);
}

/* As the caller, through the view: what it may not see, it does not see. */
Datum
agentvm_status(PG_FUNCTION_ARGS)
{
	static SPIPlanPtr plan = NULL;
	pg_uuid_t *id = session_id_argument(fcinfo, 0);
	Datum values[1] = {UUIDPGetDatum(id)};
	Oid types[1] = {UUIDOID};
	Datum result;
	bool isnull;

	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	if (plan == NULL)
	{
		plan = SPI_prepare(
			"SELECT s FROM agentvm.sessions s WHERE s.session_id OPERATOR(pg_catalog.=) $1", 1,
			types);
		if (plan == NULL || SPI_keepplan(plan) != 0)
			elog(ERROR, "could not prepare the status query");
	}
	if (SPI_execute_plan(plan, values, NULL, true, 1) != SPI_OK_SELECT)
		elog(ERROR, "the status query failed");
	if (SPI_processed == 0)
		raise_no_such_session(id);
	result = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	result = SPI_datumTransfer(result, false, -1);
	SPI_finish();
	return result;
}

Datum
agentvm_inspect(PG_FUNCTION_ARGS)
{
	Oid role = GetUserId();
	pg_uuid_t *id = session_id_argument(fcinfo, 0);
	MemoryContext caller = CurrentMemoryContext;
	SessionFacts facts;
	DbScope scope;
	SessionRow *row;
	MemoryContext old;

	db_enter(&scope);
	session_facts(id, role, &facts);
	old = MemoryContextSwitchTo(caller);
	row = session_row_read(id);
	MemoryContextSwitchTo(old);
	if (row == NULL)
		raise_no_such_session(id); /* a purge has taken it meanwhile */
	db_leave(&scope);
	PG_RETURN_JSONB_P(provider_ask(OP_INSPECT, row->team_id, row->provider, row->options, row));
}

static void
unsound(const char *detail)
{
	ereport(ERROR, (errcode(ERRCODE_CHECK_VIOLATION), errmsg("row of agentvm.session is not sound"),
					errdetail("%s", detail)));
}

/* CHECK of agentvm.session: known values; an end has a reason; a tombstone says when, and is never due again. */
Datum
agentvm_session_is_sound(PG_FUNCTION_ARGS)
{
	char *reason = PG_ARGISNULL(1) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(1));
	bool has_ended_at = !PG_ARGISNULL(3);
	char *name;
	int state;

	if (PG_ARGISNULL(0))
		PG_RETURN_BOOL(true); /* the NOT NULL constraint says it better */
	name = text_to_cstring(PG_GETARG_TEXT_PP(0));
	state = state_find(name);
	if (state < 0)
		unsound(psprintf("State \"%s\" is not known.", name));
	if (reason != NULL && !reason_is_known(reason))
		unsound(psprintf("End reason \"%s\" is not known.", reason));
	if (!PG_ARGISNULL(2))
	{
		char *purchase = text_to_cstring(PG_GETARG_TEXT_PP(2));

		if (strcmp(purchase, "spot") != 0 && strcmp(purchase, "on-demand") != 0)
			unsound(psprintf("Purchase \"%s\" is neither spot nor on-demand.", purchase));
	}
	if (state_is_ended(state) != has_ended_at)
		unsound("A session has ended_at if and only if it is terminated or failed.");
	if (has_ended_at && !PG_ARGISNULL(4))
		unsound("A session that has ended has no next_check_at.");
	if ((reason != NULL) != (state == STATE_TERMINATING || has_ended_at))
		unsound("A session has an end_reason if and only if it is terminating or has ended.");
	PG_RETURN_BOOL(true);
}

/* What the trigger reads of a row. */
enum
{
	ROW_SESSION_ID,
	ROW_TEAM_ID,
	ROW_STATE,
	ROW_END_REASON,
	ROW_DETAIL,
	ROW_RUNTIME,
	ROW_LANE,
	ROW_COLUMNS
};

/* Where they are: looked up once per statement, since names are compared one by one. */
static const AttrNumber *
row_columns(FunctionCallInfo fcinfo, TupleDesc desc)
{
	static const char *const names[ROW_COLUMNS] = {"session_id", "team_id", "state", "end_reason",
												   "detail",	 "runtime", "lane"};
	AttrNumber *columns = fcinfo->flinfo->fn_extra;
	int i;

	if (columns != NULL)
		return columns;
	columns = MemoryContextAlloc(fcinfo->flinfo->fn_mcxt, sizeof(AttrNumber) * ROW_COLUMNS);
	for (i = 0; i < ROW_COLUMNS; i++)
		columns[i] = SPI_fnumber(desc, names[i]);
	fcinfo->flinfo->fn_extra = columns;
	return columns;
}

/* A text column of a trigger's tuple, or NULL. */
static char *
text_column(HeapTuple tuple, TupleDesc desc, AttrNumber column)
{
	bool isnull;
	Datum value = heap_getattr(tuple, column, desc, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

/* Tell heartbeats that a session is ending; whoever may do so holds its row's lock. */
static void
begin_end(const pg_uuid_t *id)
{
	Datum values[1] = {UUIDPGetDatum(id)};
	DbLookup lookup;
	bool known;

	db_lookup_begin(&lookup, &ending_key, 1, values);
	known = db_lookup_next(&lookup) != NULL;
	db_lookup_end(&lookup);
	if (!known)
		db_insert(&ending_insert, values, NULL);
}

/* AFTER UPDATE of the state: refuse what the design does not know, log the rest. */
Datum
agentvm_session_transition(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	HeapTuple row;
	TupleDesc desc;
	const AttrNumber *columns;
	DbScope scope;
	char *old_state;
	char *new_state;
	char *detail;
	SessionState from;
	SessionState to;
	pg_uuid_t *id;
	Datum values[1];
	bool isnull;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_BY_UPDATE(trigger->tg_event))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("agentvm.session_transition() is a trigger on agentvm.session")));
	desc = RelationGetDescr(trigger->tg_relation);
	columns = row_columns(fcinfo, desc);
	row = trigger->tg_newtuple;
	id = DatumGetUUIDP(heap_getattr(row, columns[ROW_SESSION_ID], desc, &isnull));
	old_state = text_column(trigger->tg_trigtuple, desc, columns[ROW_STATE]);
	new_state = text_column(row, desc, columns[ROW_STATE]);
	detail = text_column(row, desc, columns[ROW_DETAIL]);
	from = state_parse(old_state);
	to = state_parse(new_state);
	if (!state_may_become(from, to))
		ereport(ERROR, (errcode(ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION),
						errmsg("session %s cannot go from %s to %s", session_text(id),
							   state_name(from), state_name(to)),
						state_is_ended(from)
							? errdetail("An ended session is a tombstone: nothing revives it.")
							: 0));

	db_enter(&scope);
	event_add(id, text_column(row, desc, columns[ROW_TEAM_ID]), "state", old_state, new_state,
			  from == STATE_WARM && to == STATE_READY
				  ? "claimed"
				  : text_column(row, desc, columns[ROW_END_REASON]),
			  detail ? handle_set_text(NULL, "detail", detail) : NULL);
	values[0] = UUIDPGetDatum(id);
	if (DatumGetBool(heap_getattr(row, columns[ROW_RUNTIME], desc, &isnull)))
	{
		if (to == STATE_TERMINATING)
			begin_end(id);
		else if (state_is_ended(to))
		{
			db_run(&has_ended_query, values, NULL);
			commands_end(id);
		}
	}
	if (state_is_ended(to) &&
		DatumGetInt16(heap_getattr(row, columns[ROW_LANE], desc, &isnull)) == LANE_BLOCKING)
		db_run(&displace_query, values, NULL);
	db_leave(&scope);
	wake_waiters(id);
	return PointerGetDatum(NULL);
}
