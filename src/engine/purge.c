/*-------------------------------------------------------------------------
 *
 * purge.c
 *		Taking away what has been kept for long enough.
 *
 * Four things in turn, each in bounded steps: tombstones, with their tokens and
 * heartbeats; events, by whole seals, so that what is left can still be checked;
 * members whose role has been dropped; and the memory of dropped teams of which
 * nothing is left.  A seal whose events are gone stays as a stub, since the next
 * one's hash stands on its own; of the stubs before a team's first full seal only
 * the last one is needed.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/audit.h"
#include "engine/purge.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_purge);

#define SESSIONS_PER_STEP 500
#define SEALS_PER_STEP 100
#define EVENTS_PER_STEP 4000
#define MEMBERS_PER_STEP 500
#define MAX_AGE_DAYS INT64CONST(36525)

/* In order of the primary key: ids begin with the time of creation. */
static DbQuery session_query = {
	"WITH seen AS MATERIALIZED (SELECT session_id, ended_at FROM agentvm.session "
	"WHERE session_id > $1 AND session_id <= $2 ORDER BY session_id LIMIT $3), "
	"old AS MATERIALIZED (SELECT s.session_id FROM agentvm.session s "
	"WHERE s.session_id IN (SELECT session_id FROM seen WHERE ended_at < $4) AND s.ended_at < $4 "
	"FOR UPDATE SKIP LOCKED), "
	"token AS (DELETE FROM agentvm.session_token t USING old WHERE t.session_id = old.session_id), "
	"beat AS (DELETE FROM agentvm.session_heartbeat h USING (SELECT b.session_id FROM old "
	"JOIN agentvm.session_heartbeat b USING (session_id) FOR UPDATE OF b SKIP LOCKED) f "
	"WHERE h.session_id = f.session_id), "
	"command AS (DELETE FROM agentvm.command c USING (SELECT d.command_id FROM old "
	"JOIN agentvm.command d USING (session_id) FOR UPDATE OF d SKIP LOCKED) f "
	"WHERE c.command_id = f.command_id), "
	"gone AS (DELETE FROM agentvm.session s USING old WHERE s.session_id = old.session_id "
	"RETURNING 1) "
	"SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM seen), "
	"(SELECT session_id FROM seen ORDER BY session_id DESC LIMIT 1)",
	4,
	{UUIDOID, UUIDOID, INT8OID, TIMESTAMPTZOID}};

/*
 * The next seals by age that are no stubs yet; at least those of one moment, and
 * no more than hold so many events.  One that holds an event of a live session
 * stays.  Each step begins where the last one ended, since what that has taken
 * away is still in the index.
 */
static DbQuery event_query = {
	"WITH seen AS MATERIALIZED (SELECT team_id, seal_id, event_ids, newest_at FROM ("
	"SELECT *, sum(cardinality(event_ids)) OVER w AS events, "
	"first_value(newest_at) OVER w AS first FROM ("
	"SELECT team_id, seal_id, event_ids, newest_at FROM agentvm.event_seal "
	"WHERE purged_at IS NULL AND newest_at < $1 AND newest_at > $2 "
	"ORDER BY newest_at FETCH FIRST $3 ROWS WITH TIES) o "
	"WINDOW w AS (ORDER BY newest_at)) o WHERE newest_at = first OR events <= $4), "
	"held AS (SELECT DISTINCT seen.team_id, seen.seal_id FROM seen, unnest(seen.event_ids) AS i "
	"JOIN agentvm.session_event e ON e.event_id = i "
	"LEFT JOIN agentvm.session l ON l.session_id = e.session_id AND l.ended_at IS NULL "
	"WHERE e.at >= $1 OR l.session_id IS NOT NULL), "
	"old AS MATERIALIZED (SELECT * FROM seen s WHERE NOT EXISTS (SELECT FROM held h "
	"WHERE h.team_id = s.team_id AND h.seal_id = s.seal_id)), "
	"gone AS (DELETE FROM agentvm.session_event e USING (SELECT unnest(event_ids) AS id FROM old) "
	"i "
	"WHERE e.event_id = i.id RETURNING 1), "
	"stub AS (UPDATE agentvm.event_seal s SET event_ids = '{}', purged_at = clock_timestamp() "
	"FROM old WHERE s.team_id = old.team_id AND s.seal_id = old.seal_id) "
	"SELECT (SELECT count(*) FROM gone), (SELECT max(newest_at) FROM seen)",
	4,
	{TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID, INT8OID}};

/* Once a purge, and not at each step, which would read all that the others have deleted. */
static DbQuery stub_query = {"WITH t AS MATERIALIZED (SELECT team_id, coalesce(min(seal_id) FILTER "
							 "(WHERE purged_at IS NULL), max(seal_id) + 1) AS first FROM "
							 "agentvm.event_seal GROUP BY team_id) "
							 "DELETE FROM agentvm.event_seal s USING t "
							 "WHERE s.team_id = t.team_id AND s.seal_id < t.first - 1",
							 0,
							 {0}};

/*
 * As remove_member() does it: whoever was a member knows the channel.  Both rows
 * are had at once or not at all, since some user may have the team's locked.
 */
static DbQuery member_query = {
	"WITH dead AS MATERIALIZED (SELECT m.team_id, m.role FROM agentvm.team_member m "
	"JOIN agentvm.team t USING (team_id) "
	"WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = m.role) "
	"ORDER BY m.team_id, m.role LIMIT $1 "
	"FOR UPDATE OF m SKIP LOCKED FOR NO KEY UPDATE OF t SKIP LOCKED), "
	"gone AS (DELETE FROM agentvm.team_member m USING dead "
	"WHERE m.team_id = dead.team_id AND m.role = dead.role RETURNING m.team_id), "
	"rotated AS (UPDATE agentvm.team t SET channel = DEFAULT "
	"FROM (SELECT DISTINCT team_id FROM dead) d WHERE t.team_id = d.team_id) "
	"SELECT count(*) FROM gone",
	1,
	{INT8OID}};

/* The tables are read only where seals say that all of a team's events are gone. */
static DbQuery team_query = {
	"WITH empty AS MATERIALIZED (SELECT f.team_id FROM agentvm.former_team f "
	"WHERE f.dropped_at < $1 AND NOT EXISTS (SELECT FROM agentvm.event_seal s "
	"WHERE s.team_id = f.team_id AND s.purged_at IS NULL)), "
	"gone AS (DELETE FROM agentvm.former_team f USING empty WHERE f.team_id = empty.team_id "
	"AND NOT EXISTS (SELECT FROM agentvm.session s WHERE s.team_id = f.team_id) "
	"AND NOT EXISTS (SELECT FROM agentvm.session_event e WHERE e.team_id = f.team_id) "
	"RETURNING f.team_id) "
	"DELETE FROM agentvm.event_seal s USING gone WHERE s.team_id = gone.team_id",
	1,
	{TIMESTAMPTZOID}};

/* Run a statement for which the log is open, whatever becomes of it. */
static void
run_open(DbQuery *query, Datum *values)
{
	audit_log_is_open = true;
	PG_TRY();
	{
		db_run(query, values, NULL);
	}
	PG_FINALLY();
	{
		audit_log_is_open = false;
	}
	PG_END_TRY();
}

static int64
count_at(int column)
{
	bool isnull;

	return DatumGetInt64(db_value(0, column, &isnull));
}

void
purge_begin(Purge *purge, TimestampTz cutoff, bool all)
{
	memset(purge, 0, sizeof(Purge));
	purge->cutoff = cutoff;
	purge->seal = DT_NOBEGIN;
	memset(purge->last.data, 0xff, UUID_LEN);
	if (!all)
	{
		/* what a version 7 id begins with that was made at the cutoff */
		uint64 millis = (cutoff + (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY) / 1000;
		int i;

		for (i = 0; i < 6; i++)
			purge->last.data[i] = (unsigned char) (millis >> (8 * (5 - i)));
	}
}

static bool
purge_sessions(Purge *purge)
{
	Datum values[4] = {UUIDPGetDatum(&purge->session), UUIDPGetDatum(&purge->last),
					   Int64GetDatum(SESSIONS_PER_STEP), TimestampTzGetDatum(purge->cutoff)};
	bool over;
	bool isnull;

	db_run(&session_query, values, NULL);
	purge->removed += count_at(1);
	over = count_at(2) < SESSIONS_PER_STEP;
	if (!over)
		purge->session = *DatumGetUUIDP(db_value(0, 3, &isnull));
	SPI_freetuptable(SPI_tuptable);
	return over;
}

static bool
purge_events(Purge *purge)
{
	Datum values[4] = {TimestampTzGetDatum(purge->cutoff), TimestampTzGetDatum(purge->seal),
					   Int64GetDatum(SEALS_PER_STEP), Int64GetDatum(EVENTS_PER_STEP)};
	bool over;

	run_open(&event_query, values);
	purge->removed += count_at(1);
	purge->stubs = purge->stubs || count_at(1) > 0;
	purge->seal = DatumGetTimestampTz(db_value(0, 2, &over));
	SPI_freetuptable(SPI_tuptable);
	return over;
}

static int64
purge_members(void)
{
	Datum values[1] = {Int64GetDatum(MEMBERS_PER_STEP)};
	int64 gone;

	db_run(&member_query, values, NULL);
	gone = count_at(1);
	SPI_freetuptable(SPI_tuptable);
	return gone;
}

bool
purge_step(Purge *purge)
{
	Datum values[1] = {TimestampTzGetDatum(purge->cutoff)};

	CHECK_FOR_INTERRUPTS();
	switch (purge->stage)
	{
		case PURGE_SESSIONS:
			if (purge_sessions(purge))
				purge->stage = PURGE_EVENTS;
			break;
		case PURGE_EVENTS:
			if (purge_events(purge))
				purge->stage = PURGE_STUBS;
			break;
		case PURGE_STUBS:
			if (purge->stubs)
				run_open(&stub_query, NULL);
			purge->stage = PURGE_MEMBERS;
			break;
		case PURGE_MEMBERS:
			if (purge_members() < MEMBERS_PER_STEP)
				purge->stage = PURGE_TEAMS;
			break;
		case PURGE_TEAMS:
			run_open(&team_query, values);
			purge->stage = PURGE_DONE;
			break;
		case PURGE_DONE:
			break;
	}
	return purge->stage == PURGE_DONE;
}

Datum
agentvm_purge(PG_FUNCTION_ARGS)
{
	TimestampTz now = GetCurrentTimestamp();
	SealWalk walk = {0};
	Purge purge;
	DbScope scope;
	Interval *age;
	int64 days;
	int64 microseconds;
	int64 sealed = 0;

	require_admin("purge");
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("older_than must not be null")));
	age = PG_GETARG_INTERVAL_P(0);
	/* months and days count as 30 days and 24 hours; nothing overflows, and what is infinite is far out */
	days = (int64) age->month * 30 + age->day;
	microseconds = age->time;
	if (days < -MAX_AGE_DAYS || days > MAX_AGE_DAYS ||
		microseconds < -MAX_AGE_DAYS * USECS_PER_DAY || microseconds > MAX_AGE_DAYS * USECS_PER_DAY)
		microseconds = -1;
	else
		microseconds += days * USECS_PER_DAY;
	if (microseconds < 0 || microseconds > MAX_AGE_DAYS * USECS_PER_DAY)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("older_than must be between 0 and 100 years")));
	purge_begin(&purge, now - microseconds, true);

	db_enter(&scope);
	audit_plan_by_index();
	(void) audit_claim(AUDIT_PURGE, true);
	(void) audit_claim(AUDIT_SEAL, true);
	(void) audit_seal(&walk, DT_NOEND, &sealed);
	while (!purge_step(&purge))
		;
	db_leave(&scope);
	PG_RETURN_INT64(purge.removed);
}
