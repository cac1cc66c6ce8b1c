/*-------------------------------------------------------------------------
 *
 * pause.c
 *		pause() and resume(): a VM that is halted for a while, and goes on.
 *
 * Both only write the wish; the engine calls the provider (turn.c).  What can be
 * told without a call is told here: that a provider, or a VM of this kind, cannot
 * be paused.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/session_row.h"
#include "engine/wake.h"
#include "miscadmin.h"
#include "session/session.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_pause);
PG_FUNCTION_INFO_V1(agentvm_resume);

/* As terminate() has it: next_check_at is left alone while somebody holds a lease. */
#define BEGIN_QUERY(from, to)                                                                      \
	"UPDATE agentvm.session SET state = '" to "', detail = NULL, retries = 0, "                    \
	"next_check_at = CASE WHEN lease IS NULL THEN least(next_check_at, $2) ELSE next_check_at "    \
	"END WHERE session_id = $1 AND state = '" from "' RETURNING next_check_at, lane"

static DbQuery pause_query = {BEGIN_QUERY("ready", "pausing"), 2, {UUIDOID, TIMESTAMPTZOID}};

static DbQuery resume_query = {BEGIN_QUERY("paused", "resuming"), 2, {UUIDOID, TIMESTAMPTZOID}};

/* One of the two ways. */
typedef struct Way
{
	DbQuery *query;
	SessionState from;
	SessionState during;
	SessionState to;
	const char *done; /* "paused" */
} Way;

static const Way pause_way = {&pause_query, STATE_READY, STATE_PAUSING, STATE_PAUSED, "paused"};
static const Way resume_way = {&resume_query, STATE_PAUSED, STATE_RESUMING, STATE_READY, "resumed"};

/* Whether a session in this state can begin to go that way; raises AV006 or AV007 where it never can from there. */
static bool
may_begin(const Way *way, const pg_uuid_t *id, const SessionFacts *facts)
{
	if (facts->state == way->from)
		return true;
	if (facts->state == way->during || facts->state == way->to)
		return false;
	if (facts->state == STATE_TERMINATING || state_is_ended(facts->state))
		ereport(ERROR, (errcode(AVM_SESSION_ENDED),
						errmsg("session %s is %s and cannot be %s", session_text(id),
							   state_name(facts->state), way->done)));
	ereport(ERROR, (errcode(AVM_NOT_READY),
					errmsg("session %s is %s and cannot be %s yet", session_text(id),
						   state_name(facts->state), way->done),
					facts->state == STATE_PROVISIONING && way == &resume_way
						? 0
						: errhint("Wait for it first: CALL agentvm.await('%s', '%s').",
								  session_text(id), state_name(way->from))));
	return false;
}

/* Raises where the provider cannot pause this VM. */
static void
check_pause(const pg_uuid_t *id)
{
	SessionRow *row = session_row_read(id);
	const Provider *provider;

	if (row == NULL)
		return; /* the update finds out */
	provider = provider_get(row->provider);
	if (provider->check_pause == NULL)
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						errmsg("session %s cannot be paused: provider \"%s\" has no such thing",
							   row->id_text, row->provider)));
	provider->check_pause(session_row_for_provider(row), row->options);
}

static Datum
begin(FunctionCallInfo fcinfo, const Way *way)
{
	Oid role = GetUserId();
	pg_uuid_t *id = session_id_argument(fcinfo, 0);
	Datum values[2] = {UUIDPGetDatum(id), TimestampTzGetDatum(GetCurrentTimestamp())};
	SessionFacts facts;
	DbScope scope;
	bool began = false;
	bool isnull;

	db_enter(&scope);
	session_facts(id, role, &facts);
	if (may_begin(way, id, &facts))
	{
		if (way == &pause_way)
			check_pause(id);
		db_run(way->query, values, NULL);
		began = SPI_processed > 0;
		if (began)
			wake_after_lock(DatumGetInt16(db_value(0, 2, &isnull)),
							DatumGetTimestampTz(db_value(0, 1, &isnull)));
		else
		{
			/* somebody has been faster */
			session_left_alone(id);
			session_facts(id, role, &facts);
			(void) may_begin(way, id, &facts);
		}
	}
	db_leave(&scope);
	PG_RETURN_BOOL(began);
}

Datum
agentvm_pause(PG_FUNCTION_ARGS)
{
	return begin(fcinfo, &pause_way);
}

Datum
agentvm_resume(PG_FUNCTION_ARGS)
{
	return begin(fcinfo, &resume_way);
}
