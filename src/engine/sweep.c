/*-------------------------------------------------------------------------
 *
 * sweep.c
 *		Finding sessions that should end: never bootstrapped, silent, too old.
 *
 * Bootstrap and lifetime are deadlines on the row, which the engine meets by
 * itself when they are due; the functions here do the same on demand. Silence is
 * found here only: one scan of the narrow heartbeat table, then a second look
 * under the row lock, in a statement that sees beats committed meanwhile.
 *
 * A runtime that was warm and does not fetch what its session was taken with lets every
 * call wait.  Such sessions have a row in a table of hardly any.  A caller's transaction may
 * commit long after it has taken one, so time counts from when a sweep first sees the row.
 *
 * A session that is bound to a backend is of no use to anybody once that backend has
 * gone, or has left the CALL that needed it in any way.  Who needs it holds a lock of the lock
 * manager's, for his session (of client and server) but released by every abort; whoever
 * gets that lock at once knows that nobody needs it.
 *
 * A sweep writes its wish (state and reason) and makes the row due; it leaves
 * next_check_at alone while somebody holds a lease.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/command_row.h"
#include "engine/identity.h"
#include "engine/shared.h"
#include "engine/sweep.h"
#include "engine/wake.h"
#include "miscadmin.h"
#include "storage/lock.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/timestamp.h"

#define HOLD_MIN_SESSIONS 10
#define HOLD_MIN_FRACTION 0.2

/*
 * The candidates are near the front of the due index: the engine keeps
 * next_check_at at or before every deadline, or at the end of a lease.
 */
#define END_DUE(reason, condition)                                                                 \
	"WITH due AS MATERIALIZED (SELECT ctid FROM agentvm.session "                                  \
	"WHERE next_check_at <= clock_timestamp() + $2 * interval '1 ms' AND lane IN (0, 1) "          \
	"AND " condition " AND state NOT IN ('terminating', 'terminated', 'failed') "                  \
	"ORDER BY created_at LIMIT $1 FOR UPDATE SKIP LOCKED) "                                        \
	"UPDATE agentvm.session s SET state = 'terminating', end_reason = " reason ", "                \
	"detail = NULL, retries = 0, next_check_at = CASE WHEN lease IS NULL "                         \
	"THEN least(next_check_at, clock_timestamp()) ELSE next_check_at END "                         \
	"FROM due WHERE s.ctid = due.ctid RETURNING s.next_check_at, s.lane"

/* From the index to each row, and there again where it was locked; left alone the planner may read the whole table. */
static const char *const end_without[] = {"enable_hashjoin", "enable_mergejoin", "enable_seqscan"};

static DbQuery bootstrap_query = {END_DUE("'bootstrap_timeout'",
										  "state = 'provisioning' AND runtime AND "
										  "launched_at + bootstrap_timeout <= clock_timestamp()"),
								  2,
								  {INT8OID, INT4OID}};

static DbQuery lifetime_query = {
	END_DUE("CASE WHEN warm_key IS NULL THEN 'max_lifetime' ELSE 'idle' END",
			"deadline_at <= clock_timestamp()"),
	2,
	{INT8OID, INT4OID}};

#define HERE_SINCE "greatest($2, (SELECT max(adopted_at) FROM agentvm.installation))"

/*
 * Since when somebody could have heard a heartbeat: NULL when nobody listens
 * now; where no gateway is registered, since the server has been open ($2), or
 * the database was adopted or upgraded.  Every gateway's row carries the start
 * of the unbroken period as it stood at its last report.
 */
static DbQuery listening_query = {
	"SELECT CASE WHEN count(*) = 0 THEN " HERE_SINCE " "
	"WHEN max(last_report_at) > clock_timestamp() - $1 * interval '1 s' THEN "
	"greatest(" HERE_SINCE ", "
	"(SELECT listening_since FROM agentvm.gateway ORDER BY last_report_at DESC NULLS LAST LIMIT "
	"1)) "
	"END FROM agentvm.gateway",
	2,
	{INT4OID, TIMESTAMPTZOID}};

#define IS_SILENT                                                                                  \
	"greatest(h.last_heartbeat_at, s.ready_at, s.resumed_at, $1) + h.lost_after "                  \
	"< clock_timestamp() "                                                                         \
	"AND s.state IN ('ready', 'warm')"

/*
 * One scan of the narrow table; sessions that cannot be silent yet are not even joined.
 * Those that are paused are silent by right, and no part of the fleet that is heard.
 */
static DbQuery silent_query = {
	"SELECT session_id, silent, (SELECT count(*) FROM agentvm.session_heartbeat) - away, longest "
	"FROM (SELECT h.session_id, greatest(h.last_heartbeat_at, s.ready_at, s.resumed_at) AS since, "
	"i.is_silent, count(*) FILTER (WHERE i.is_silent) OVER () AS silent, "
	"count(*) FILTER (WHERE s.state IN ('pausing', 'paused', 'resuming')) OVER () AS away, "
	"max(h.lost_after) FILTER (WHERE i.is_silent) OVER () AS longest "
	"FROM agentvm.session_heartbeat h JOIN agentvm.session s USING (session_id), "
	"LATERAL (SELECT " IS_SILENT " AS is_silent) i "
	"WHERE greatest(h.last_heartbeat_at, $1) + h.lost_after < $3) q "
	"WHERE is_silent ORDER BY since LIMIT $2",
	3,
	{TIMESTAMPTZOID, INT8OID, TIMESTAMPTZOID}};

static DbQuery silent_lock_query = {
	"SELECT session_id FROM agentvm.session WHERE session_id = ANY ($1) "
	"AND state IN ('ready', 'warm') FOR UPDATE SKIP LOCKED",
	1,
	{UUIDARRAYOID}};

static DbQuery silent_end_query = {
	"UPDATE agentvm.session s SET state = 'terminating', end_reason = 'heartbeat_timeout', "
	"detail = CASE WHEN h.last_heartbeat_at IS NULL THEN 'no heartbeat since it was ready' "
	"ELSE 'last heartbeat ' || round(extract(epoch FROM clock_timestamp() - h.last_heartbeat_at)) "
	"|| ' s ago' END, "
	"retries = 0, next_check_at = "
	"CASE WHEN s.lease IS NULL THEN clock_timestamp() ELSE s.next_check_at END "
	"FROM agentvm.session_heartbeat h WHERE s.session_id = ANY ($2) "
	"AND h.session_id = s.session_id AND " IS_SILENT " RETURNING s.next_check_at, s.lane",
	2,
	{TIMESTAMPTZOID, UUIDARRAYOID}};

/* Of those that have ended otherwise nothing is expected any more. */
static DbQuery not_hydrating_query = {
	"WITH over AS MATERIALIZED (SELECT h.session_id FROM agentvm.session_hydrating h "
	"WHERE NOT EXISTS (SELECT FROM agentvm.session s WHERE s.session_id = h.session_id "
	"AND s.state NOT IN ('terminating', 'terminated', 'failed')) FOR UPDATE SKIP LOCKED) "
	"DELETE FROM agentvm.session_hydrating h USING over WHERE h.session_id = over.session_id",
	0,
	{0}};

static DbQuery hydrating_query = {
	"WITH fresh AS MATERIALIZED (SELECT session_id FROM agentvm.session_hydrating "
	"WHERE seen_at IS NULL FOR UPDATE SKIP LOCKED) "
	"UPDATE agentvm.session_hydrating h SET seen_at = clock_timestamp() "
	"FROM fresh WHERE h.session_id = fresh.session_id",
	0,
	{0}};

/* From these few to their sessions. */
static const char *const hydrating_without[] = {"enable_hashjoin", "enable_mergejoin",
												"enable_seqscan", "enable_bitmapscan", "jit"};

/* Whoever has the row of session_hydrating decides: the sweep, or the runtime that comes after all. */
static DbQuery unhydrated_query = {
	"WITH late AS MATERIALIZED (SELECT s.session_id FROM agentvm.session_hydrating h "
	"JOIN agentvm.session s USING (session_id) WHERE s.state = 'ready' AND h.seen_at IS NOT NULL "
	"AND greatest(h.seen_at, s.resumed_at, $2) + s.bootstrap_timeout <= clock_timestamp() "
	"ORDER BY h.seen_at LIMIT $1 FOR UPDATE SKIP LOCKED), "
	"over AS (DELETE FROM agentvm.session_hydrating h USING late "
	"WHERE h.session_id = late.session_id) "
	"UPDATE agentvm.session s SET state = 'terminating', end_reason = 'bootstrap_timeout', "
	"detail = 'the VM was warm, and its runtime has not fetched what it was taken with within ' "
	"|| round(extract(epoch FROM s.bootstrap_timeout)) || ' s', retries = 0, next_check_at = "
	"CASE WHEN lease IS NULL THEN clock_timestamp() ELSE next_check_at END "
	"FROM late WHERE s.session_id = late.session_id RETURNING s.next_check_at, s.lane",
	2,
	{INT8OID, TIMESTAMPTZOID}};

static DbQuery hold_read_query = {
	"SELECT held_at + $1 <= clock_timestamp() FROM agentvm.sweep_hold WHERE sweep = 'heartbeat'",
	1,
	{INTERVALOID}};

static DbQuery hold_query = {
	"INSERT INTO agentvm.sweep_hold (sweep, held_at, would_end) "
	"VALUES ('heartbeat', clock_timestamp(), $1) ON CONFLICT (sweep) DO NOTHING",
	1,
	{INT8OID}};

static DbQuery unhold_query = {
	"DELETE FROM agentvm.sweep_hold h USING (SELECT sweep FROM agentvm.sweep_hold "
	"WHERE sweep = 'heartbeat' FOR UPDATE SKIP LOCKED) f WHERE h.sweep = f.sweep",
	0,
	{0}};

/* What session_row.c has left behind: a look-up by key for each row of a table of hardly any. */
static DbQuery over_query = {
	"SELECT e.session_id FROM agentvm.session_ending e WHERE coalesce((SELECT s.ended_at IS NOT "
	"NULL FROM agentvm.session s WHERE s.session_id = e.session_id), true)",
	0,
	{0}};

static DbQuery forget_beats_query = {
	"WITH free AS MATERIALIZED (SELECT session_id FROM agentvm.session_heartbeat "
	"WHERE session_id = ANY ($1) FOR UPDATE SKIP LOCKED), "
	"beat AS (DELETE FROM agentvm.session_heartbeat h USING free "
	"WHERE h.session_id = free.session_id) "
	"DELETE FROM agentvm.session_ending e WHERE session_id = ANY ($1) "
	"AND (session_id IN (SELECT session_id FROM free) OR NOT EXISTS "
	"(SELECT FROM agentvm.session_heartbeat h WHERE h.session_id = e.session_id))",
	1,
	{UUIDARRAYOID}};

static DbQuery bound_query = {
	"SELECT session_id FROM agentvm.session WHERE bound_pid IS NOT NULL AND ended_at IS NULL "
	"AND state <> 'terminating' LIMIT $1",
	1,
	{INT8OID}};

static const char *const bound_without[] = {"enable_seqscan", "enable_bitmapscan", "jit"};

static DbQuery unbound_query = {
	"WITH free AS MATERIALIZED (SELECT session_id FROM agentvm.session WHERE session_id = ANY ($1) "
	"AND state NOT IN ('terminating', 'terminated', 'failed') FOR UPDATE SKIP LOCKED) "
	"UPDATE agentvm.session s SET state = 'terminating', end_reason = 'requested', "
	"detail = 'the backend that it was for needs it no more', retries = 0, next_check_at = "
	"CASE WHEN lease IS NULL THEN clock_timestamp() ELSE next_check_at END "
	"FROM free WHERE s.session_id = free.session_id RETURNING s.next_check_at, s.lane",
	1,
	{UUIDARRAYOID}};

/* Tell the workers about the rows that the last statement returned: next_check_at, lane. */
static int
wake_for_result(void)
{
	uint64 i;
	bool isnull;

	for (i = 0; i < SPI_processed; i++)
		wake_workers(DatumGetInt16(db_value(i, 2, &isnull)),
					 DatumGetTimestampTz(db_value(i, 1, &isnull)));
	return (int) SPI_processed;
}

static int64
limit_of(int max_sessions)
{
	return max_sessions < 0 ? PG_INT64_MAX : max_sessions;
}

static int
end_due(DbQuery *query, int max_sessions)
{
	Datum values[2] = {Int64GetDatum(limit_of(max_sessions)), Int32GetDatum(avm_lease_ms)};

	db_plan_without(end_without, lengthof(end_without));
	db_run(query, values, NULL);
	return wake_for_result();
}

int
sweep_bootstrap(int max_sessions)
{
	return end_due(&bootstrap_query, max_sessions);
}

int
sweep_lifetime(int max_sessions)
{
	return end_due(&lifetime_query, max_sessions);
}

/* Since when somebody listens to runtimes; false: nobody does, and silence means nothing. */
static bool
somebody_listens(Datum *since)
{
	Datum values[2] = {Int32GetDatum(GATEWAY_SILENT_S), TimestampTzGetDatum(shared_open_since())};
	bool isnull;

	db_run(&listening_query, values, NULL);
	*since = db_value(0, 1, &isnull);
	return !isnull;
}

int
sweep_hydration(int max_sessions)
{
	Datum values[2] = {Int64GetDatum(limit_of(max_sessions))};
	int count;

	db_plan_without(hydrating_without, lengthof(hydrating_without));
	db_run(&not_hydrating_query, NULL, NULL);
	if (!somebody_listens(&values[1]))
		return 0;
	db_run(&unhydrated_query, values, NULL);
	count = wake_for_result();
	db_run(&hydrating_query, NULL, NULL);
	return count;
}

/* The ids in column 1 of the last result. */
static Datum
result_ids(void)
{
	Datum *ids = palloc(sizeof(Datum) * Max(SPI_processed, 1));
	bool isnull;
	uint64 i;

	for (i = 0; i < SPI_processed; i++)
		ids[i] = db_value(i, 1, &isnull);
	return PointerGetDatum(
		construct_array(ids, SPI_processed, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
}

/* Take away beats of sessions that have ended. */
static void
forget_beats(void)
{
	Datum values[1];

	db_run(&over_query, NULL, NULL);
	if (SPI_processed == 0)
		return;
	values[0] = result_ids();
	db_run(&forget_beats_query, values, NULL);
}

/*
 * Claim the row of sweep_hold until the end of the transaction; false where
 * somebody else has it: to insert it all the same would be to wait for him.
 */
static bool
claim_hold(void)
{
	Oid table = get_relname_relid("sweep_hold", get_namespace_oid("agentvm", false));
	LOCKTAG tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, table, 0, 0);
	return LockAcquire(&tag, ExclusiveLock, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

/*
 * Whether to leave everybody alone this time: so many at once are more likely
 * our own deafness than their deaths.  One more timeout is given, no more.
 */
static bool
hold_back(int64 silent, int64 fleet, Datum longest_timeout)
{
	Datum values[1];
	bool isnull;

	if (silent <= HOLD_MIN_SESSIONS || silent <= fleet * HOLD_MIN_FRACTION)
	{
		db_run(&unhold_query, NULL, NULL);
		return false;
	}
	values[0] = longest_timeout;
	db_run(&hold_read_query, values, NULL);
	if (SPI_processed > 0)
		return !DatumGetBool(db_value(0, 1, &isnull));
	if (!claim_hold())
		return true;
	values[0] = Int64GetDatum(silent);
	db_run(&hold_query, values, NULL);
	ereport(LOG, (errmsg("agentvm: heartbeat sweep would end %lld of %lld sessions and holds for "
						 "one more timeout",
						 (long long) silent, (long long) fleet)));
	return true;
}

int
sweep_heartbeat(int max_sessions)
{
	Datum values[3];
	Datum floor;
	Datum longest;
	Datum ids;
	int64 silent;
	int64 fleet;
	bool isnull;

	forget_beats();
	commands_end(NULL);
	if (!somebody_listens(&floor))
		return 0;
	values[0] = floor;
	values[1] = Int64GetDatum(limit_of(max_sessions));
	values[2] = TimestampTzGetDatum(GetCurrentTimestamp()); /* the clock is dear, a million times */
	db_run(&silent_query, values, NULL);
	if (SPI_processed == 0)
	{
		hold_back(0, 0, (Datum) 0);
		return 0;
	}
	silent = DatumGetInt64(db_value(0, 2, &isnull));
	fleet = DatumGetInt64(db_value(0, 3, &isnull));
	longest = PointerGetDatum(DatumGetIntervalP(db_value(0, 4, &isnull)));
	ids = result_ids();
	if (hold_back(silent, fleet, longest))
		return 0;

	values[0] = ids;
	db_run(&silent_lock_query, values, NULL);
	values[0] = floor;
	values[1] = result_ids();
	db_run(&silent_end_query, values, NULL);
	return wake_for_result();
}

/* The lock of a bound session: two that share a name only hold up each other's sweep. */
static void
bound_tag(const pg_uuid_t *id, LOCKTAG *tag)
{
	Oid table = get_relname_relid("session", get_namespace_oid("agentvm", false));
	uint32 high;
	uint16 low;

	/* the random part */
	memcpy(&high, id->data + 10, sizeof(high));
	memcpy(&low, id->data + 14, sizeof(low));
	SET_LOCKTAG_OBJECT(*tag, MyDatabaseId, table, high, low);
}

void
bound_hold(const pg_uuid_t *id)
{
	LOCKTAG tag;

	bound_tag(id, &tag);
	(void) LockAcquire(&tag, ShareLock, true, false);
}

void
bound_release(const pg_uuid_t *id)
{
	LOCKTAG tag;

	bound_tag(id, &tag);
	(void) LockRelease(&tag, ShareLock, true);
}

int
sweep_bound(int max_sessions)
{
	Datum values[1] = {Int64GetDatum(limit_of(max_sessions))};
	Datum *ids;
	int count = 0;
	uint64 i;

	db_plan_without(bound_without, lengthof(bound_without));
	db_run(&bound_query, values, NULL);
	ids = palloc(sizeof(Datum) * Max(SPI_processed, 1));
	for (i = 0; i < SPI_processed; i++)
	{
		LOCKTAG tag;
		bool isnull;

		ids[count] = db_value(i, 1, &isnull);
		bound_tag(DatumGetUUIDP(ids[count]), &tag);
		if (LockAcquire(&tag, ExclusiveLock, false, true) != LOCKACQUIRE_NOT_AVAIL)
			count++;
	}
	if (count == 0)
		return 0;
	values[0] =
		PointerGetDatum(construct_array(ids, count, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
	db_run(&unbound_query, values, NULL);
	return wake_for_result();
}

/* ---- SQL ---- */

static Datum
sweep_from_sql(FunctionCallInfo fcinfo, const char *function, int (*const *sweeps)(int))
{
	int max_sessions = PG_ARGISNULL(0) ? -1 : PG_GETARG_INT32(0);
	int count = 0;
	DbScope scope;

	if (!PG_ARGISNULL(0) && max_sessions < 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("max_sessions must not be negative, but is %d", max_sessions)));
	require_admin("sweep sessions");
	if (!identity_permits(function))
		PG_RETURN_INT32(0);
	db_enter(&scope);
	for (; *sweeps != NULL && (max_sessions < 0 || count < max_sessions); sweeps++)
		count += (*sweeps)(max_sessions < 0 ? -1 : max_sessions - count);
	db_leave(&scope);
	PG_RETURN_INT32(count);
}

#define SWEEP_FUNCTION(name, ...)                                                                  \
	PG_FUNCTION_INFO_V1(agentvm_##name);                                                           \
	Datum agentvm_##name(PG_FUNCTION_ARGS)                                                         \
	{                                                                                              \
		static int (*const sweeps[])(int) = {__VA_ARGS__, NULL};                                   \
		return sweep_from_sql(fcinfo, "agentvm." #name "()", sweeps);                              \
	}

SWEEP_FUNCTION(sweep_bootstrap, sweep_bootstrap, sweep_hydration)
SWEEP_FUNCTION(sweep_heartbeat, sweep_heartbeat)
SWEEP_FUNCTION(sweep_lifetime, sweep_lifetime)
SWEEP_FUNCTION(sweep, sweep_lifetime, sweep_bootstrap, sweep_hydration, sweep_heartbeat,
			   sweep_bound)
