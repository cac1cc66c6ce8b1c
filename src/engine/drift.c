/*-------------------------------------------------------------------------
 *
 * drift.c
 *		What a list of VMs means: which differ from our sessions, and what follows.
 *
 * The list is of some moment after it was begun, the sessions are of now.  So a
 * session that has ended since is no reason to call its VM an orphan; and a session that is
 * live but has no VM yet may have its launch under way.
 *
 * Several teams may share an account: then a VM belongs to the team that its
 * session, or else its tag, names, if that team's own list covers the place.
 * Tags are the account's owner's to set; whatever they say only VMs in the account are
 * touched, and other teams see none of it.
 *
 * A session has lost its VM when the provider says that it has ended, or that he has stopped it
 * himself, or has not known it in two lists while nothing was heard of it.  If a good part of a
 * place's VMs is not known, that is more likely another account than their end: then the sessions
 * are left alone, and view drift tells.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/drift.h"
#include "engine/session_row.h"
#include "engine/wake.h"
#include "providers/provider.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#define MANY_UNKNOWN 10		  /* VMs that are not known: more, and more than a fifth, are no news */
#define APPEARS_WITHIN "60 s" /* after its launch a VM is in lists */

/*
 * The VMs of pages in parameter "n", each once; over: it has ended; halted: the provider has
 * stopped it, and lets nobody start it.
 */
#define VMS(n)                                                                                     \
	"(SELECT DISTINCT ON (r.vm_id) r.*, r.state IN ('shutting-down', 'terminated') AS over, "      \
	"r.state IN ('stopping', 'stopped') "                                                          \
	"AND coalesce(r.reason_code, '') LIKE 'Server.SpotInstance%' AS halted "                       \
	"FROM unnest($" n "::jsonb[]) AS p, jsonb_to_recordset(p) AS r(vm_id text, "                   \
	"session_id text, team_id text, agent_id text, state text, launched_at timestamptz, "          \
	"address text, purchase text, reason_code text, reason text) "                                 \
	"WHERE r.vm_id IS NOT NULL AND r.state IS NOT NULL ORDER BY r.vm_id) "

/* The live sessions of a place ($1, $2, $3): of a team, or on a host. */
#define SESSIONS                                                                                   \
	"(SELECT session_id, vm_id FROM agentvm.session WHERE team_id = $1 AND ended_at IS NULL "      \
	"AND provider = $2 AND region = $3 UNION ALL SELECT o.session_id, o.vm_id "                    \
	"FROM agentvm.placement p JOIN agentvm.session o USING (session_id) WHERE $1 = '' "            \
	"AND p.host = $3 AND o.ended_at IS NULL AND o.provider = $2) "

/* Those that have a VM which should be there; v is the list, begun at $4. */
#define MISSED                                                                                     \
	SESSIONS                                                                                       \
	"m JOIN agentvm.session s USING (session_id) LEFT JOIN v ON v.vm_id = s.vm_id "                \
	"WHERE s.vm_id IS NOT NULL AND s.running AND s.state <> 'terminating' "                        \
	"AND (v.over OR v.halted OR v.vm_id IS NULL AND s.launched_at < $4 - interval "                \
	"'" APPEARS_WITHIN "') "

static DbQuery missed_query = {"WITH v AS MATERIALIZED " VMS("5") "SELECT s.vm_id FROM " MISSED
																  "ORDER BY s.vm_id LIMIT 1000",
							   5,
							   {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, JSONBARRAYOID},
							   .generic = true};

#define UPSERT                                                                                     \
	"INSERT INTO agentvm.vm_drift AS d (account, provider, region, vm_id, kind, team_id, "         \
	"session_id, agent_id, vm_state, session_state, launched_at, address, purchase, "              \
	"first_seen_at, last_seen_at, quarantined, detail) "
#define ON_CONFLICT                                                                                \
	"ON CONFLICT (account, provider, region, vm_id) DO UPDATE SET kind = excluded.kind, "          \
	"team_id = excluded.team_id, session_id = excluded.session_id, "                               \
	"agent_id = excluded.agent_id, vm_state = excluded.vm_state, "                                 \
	"session_state = excluded.session_state, launched_at = excluded.launched_at, "                 \
	"address = excluded.address, purchase = excluded.purchase, "                                   \
	"last_seen_at = excluded.last_seen_at, "                                                       \
	"end_wanted = d.end_wanted AND d.kind = excluded.kind, "                                       \
	"detail = CASE WHEN d.kind = excluded.kind AND d.kind IN ('orphan', 'unknown') "               \
	"THEN coalesce(excluded.detail, d.detail) ELSE excluded.detail END, "                          \
	"first_seen_at = CASE WHEN d.kind = excluded.kind THEN d.first_seen_at "                       \
	"ELSE excluded.first_seen_at END, quarantined = excluded.quarantined"

/* The list, begun at $4, was seen at $6; $7: what has no session is quarantined. */
static DbQuery seen_query = {
	"WITH v AS MATERIALIZED " VMS(
		"5") ", "
			 "i AS (SELECT *, CASE WHEN session_id ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' "
			 "THEN session_id::uuid END AS id FROM v), "
			 /* LIMIT: each is looked up by its key, whatever the planner thinks of their number */
			 "f AS (SELECT i.*, s.session_id IS NOT NULL AS known, s.state AS session_state, "
			 "s.ended_at, "
			 "s.vm_id AS session_vm, coalesce(s.team_id, i.team_id, $1) AS owner FROM i "
			 "LEFT JOIN LATERAL (SELECT * FROM agentvm.session o WHERE o.session_id = i.id LIMIT "
			 "1) s "
			 "ON true), "
			 "k AS (SELECT *, CASE WHEN over THEN NULL WHEN NOT known THEN 'unknown' "
			 "WHEN ended_at < $4 THEN 'orphan' WHEN ended_at IS NOT NULL THEN NULL "
			 "WHEN session_vm <> vm_id THEN 'orphan' WHEN session_vm IS NULL THEN NULL "
			 "WHEN session_state IN ('ready', 'warm') AND state <> 'running' "
			 "OR session_state = 'paused' AND state <> 'stopped' THEN 'state' END AS kind FROM f "
			 "WHERE $1 = '' OR owner = $1 OR NOT EXISTS (SELECT FROM agentvm.inventory i "
			 "WHERE i.account = f.owner AND i.provider = $2 AND i.region = $3)), "
			 "w AS (" UPSERT "SELECT $1, $2, $3, vm_id, kind, CASE WHEN $1 <> '' THEN $1 "
			 "ELSE (SELECT t.team_id FROM agentvm.team t WHERE t.team_id = k.owner) END, id, "
			 "agent_id, "
			 "state, session_state, launched_at, address, purchase, $6, $6, "
			 "kind IN ('orphan', 'unknown') AND $7, "
			 "CASE WHEN kind = 'orphan' AND ended_at IS NULL THEN 'its session has VM ' || "
			 "session_vm "
			 "WHEN kind = 'unknown' AND $1 <> '' AND owner <> $1 "
			 "THEN 'its tag says that it is of team ' || owner END "
			 "FROM k WHERE kind IS NOT NULL " ON_CONFLICT
			 ") SELECT count(*) FILTER (WHERE NOT over) FROM v",
	7,
	{TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, JSONBARRAYOID, TIMESTAMPTZOID, BOOLOID},
	.generic = true};

/* Of those missed that were asked for by themselves ($8): what came of that ($7). */
static DbQuery missing_query = {
	"WITH v AS MATERIALIZED " VMS("5") ", l AS MATERIALIZED " VMS("7") UPSERT
	"SELECT $1, $2, $3, s.vm_id, CASE WHEN NOT l.over AND v.over IS NULL THEN 'state' "
	"ELSE 'missing' END, s.team_id, s.session_id, s.agent_id, "
	"coalesce(l.state, v.state, 'not found'), s.state, s.launched_at, s.address, s.purchase, $6, "
	"$6, false, CASE WHEN NOT l.over AND v.over IS NULL "
	"THEN 'it carries our tag agentvm-cluster no more' "
	"ELSE left(concat_ws(': ', coalesce(l.reason_code, v.reason_code), "
	"coalesce(l.reason, v.reason)), 400) END "
	"FROM (SELECT s.* FROM " MISSED "AND s.vm_id = ANY ($8)) s "
	"LEFT JOIN v ON v.vm_id = s.vm_id LEFT JOIN l ON l.vm_id = s.vm_id " ON_CONFLICT,
	8,
	{TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, JSONBARRAYOID, TIMESTAMPTZOID, JSONBARRAYOID,
	 TEXTARRAYOID}};

/*
 * Of those missing in the list seen at $4, begun at $5: what is sure, and what two lists did not know.
 * As sweeps do it: the wish is written, and while somebody holds a lease, he comes to it.
 */
static DbQuery lost_query = {
	"WITH a AS (SELECT *, vm_state IN ('shutting-down', 'terminated', 'stopping', 'stopped') "
	"AS sure "
	"FROM agentvm.vm_drift WHERE account = $1 AND provider = $2 AND region = $3 "
	"AND kind = 'missing' AND last_seen_at = $4), "
	"u AS (SELECT count(*) > $6 AND count(*) * 5 > (SELECT count(*) FROM " SESSIONS "s) AS many "
	"FROM a WHERE NOT sure), "
	"d AS MATERIALIZED (SELECT session_id, vm_id, vm_state, sure, detail, CASE "
	"WHEN NOT sure THEN 'vm_not_found' WHEN detail LIKE 'Server.SpotInstance%' "
	"THEN 'spot_interruption' ELSE 'vm_ended' END AS why FROM a, u "
	"WHERE sure OR NOT many AND first_seen_at < $5 "
	"AND NOT EXISTS (SELECT FROM agentvm.session_heartbeat h WHERE h.session_id = a.session_id "
	"AND h.last_heartbeat_at > a.first_seen_at)), "
	"free AS MATERIALIZED (SELECT s.session_id FROM agentvm.session s JOIN d USING (session_id) "
	"WHERE s.vm_id = d.vm_id AND s.state NOT IN ('terminating', 'terminated', 'failed') "
	"FOR UPDATE OF s SKIP LOCKED) "
	"UPDATE agentvm.session s SET state = 'terminating', end_reason = 'provider_lost', "
	"detail = CASE why WHEN 'vm_not_found' THEN 'the provider does not know the VM' "
	"WHEN 'spot_interruption' THEN 'spot interruption: ' || d.detail "
	"ELSE concat_ws(': ', 'the VM has ended', nullif(d.detail, '')) END, retries = 0, "
	"next_check_at = CASE WHEN s.lease IS NULL THEN clock_timestamp() ELSE s.next_check_at END "
	"FROM d JOIN free USING (session_id) WHERE s.session_id = d.session_id "
	"RETURNING s.session_id, s.team_id, s.next_check_at, s.lane, s.vm_id, d.why, d.vm_state, "
	"d.detail",
	6,
	{TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID}};

static DbQuery gone_query = {
	"DELETE FROM agentvm.vm_drift WHERE account = $1 AND provider = $2 AND region = $3 "
	"AND last_seen_at < $4",
	4,
	{TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID},
	.generic = true};

static DbQuery to_end_query = {
	"WITH due AS MATERIALIZED (SELECT vm_id FROM agentvm.vm_drift WHERE account = $1 "
	"AND provider = $2 AND region = $3 AND kind IN ('orphan', 'unknown') AND last_seen_at >= $4 "
	"AND (ended_at IS NULL OR ended_at < $4) AND (end_wanted OR NOT quarantined "
	"AND greatest(first_seen_at, launched_at) <= clock_timestamp() - $5 * interval '1 s') "
	"ORDER BY vm_id LIMIT $6) "
	"UPDATE agentvm.vm_drift d SET ended_at = clock_timestamp(), detail = NULL FROM due "
	"WHERE d.account = $1 AND d.provider = $2 AND d.region = $3 AND d.vm_id = due.vm_id "
	"RETURNING d.vm_id, CASE WHEN NOT EXISTS (SELECT FROM agentvm.session s "
	"WHERE s.session_id = d.session_id AND s.ended_at IS NULL) THEN d.session_id END",
	6,
	{TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, INT4OID, INT4OID},
	.generic = true};

static DbQuery ended_query = {
	"WITH e AS MATERIALIZED " VMS(
		"5") " SELECT d.vm_id, d.session_id, d.team_id, d.kind, "
			 "e.vm_id IS NOT NULL FROM agentvm.vm_drift d LEFT JOIN e USING (vm_id) "
			 "WHERE account = $1 AND provider = $2 AND region = $3 AND vm_id = ANY ($4)",
	5,
	{TEXTOID, TEXTOID, TEXTOID, TEXTARRAYOID, JSONBARRAYOID}};

static DbQuery refused_query = {
	"UPDATE agentvm.vm_drift SET detail = $5 WHERE account = $1 AND provider = $2 "
	"AND region = $3 AND vm_id = $4",
	5,
	{TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID}};

/* The first eight digits of a segment's name are the timeline: that much is the same in all versions. */
#define TIMELINE "('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int"

static DbQuery timeline_query = {
	"SELECT timeline IS DISTINCT FROM " TIMELINE " FROM agentvm.installation WHERE in_use", 0, {0}};

static DbQuery quarantine_query = {"SELECT quarantined_since FROM agentvm.installation "
								   "WHERE in_use AND quarantined_since IS NOT NULL",
								   0,
								   {0}};

static DbQuery begin_query = {"UPDATE agentvm.installation SET timeline = " TIMELINE
							  ", quarantined_since = "
							  "CASE WHEN $1 THEN clock_timestamp() END WHERE in_use",
							  1,
							  {BOOLOID}};

static DbQuery all_due_query = {
	"WITH free AS MATERIALIZED (SELECT account, provider, region FROM agentvm.inventory "
	"FOR UPDATE SKIP LOCKED) UPDATE agentvm.inventory i SET next_at = clock_timestamp(), "
	"lease = NULL FROM free WHERE i.account = free.account AND i.provider = free.provider "
	"AND i.region = free.region",
	0,
	{0}};

/* Once all lists have been whole since, and nothing was found that somebody has to decide on. */
static DbQuery release_query = {
	"UPDATE agentvm.installation i SET quarantined_since = NULL FROM (SELECT installation_id "
	"FROM agentvm.installation WHERE in_use AND quarantined_since IS NOT NULL "
	"FOR UPDATE SKIP LOCKED) f WHERE i.installation_id = f.installation_id "
	"AND NOT EXISTS (SELECT FROM agentvm.vm_drift WHERE quarantined) "
	"AND NOT EXISTS (SELECT FROM agentvm.inventory v WHERE v.listed_at IS NULL "
	"OR v.listed_at < i.quarantined_since + $1 * interval '1 s')",
	1,
	{INT4OID}};

static Datum
document_array(List *documents)
{
	Datum *elements = palloc(sizeof(Datum) * Max(list_length(documents), 1));
	int n = 0;
	ListCell *lc;

	foreach (lc, documents)
		elements[n++] = JsonbPGetDatum((Jsonb *) lfirst(lc));
	return PointerGetDatum(construct_array(elements, n, JSONBOID, -1, false, TYPALIGN_INT));
}

static void
set_place(Datum *values, const Place *place)
{
	values[0] = CStringGetTextDatum(place->account);
	values[1] = CStringGetTextDatum(place->provider);
	values[2] = CStringGetTextDatum(place->region);
}

/* The texts in column 1 of the last result. */
static List *
result_texts(void)
{
	List *texts = NIL;
	uint64 i;

	for (i = 0; i < SPI_processed; i++)
		texts = lappend(texts, db_text(i, 1, CurrentMemoryContext));
	SPI_freetuptable(SPI_tuptable);
	return texts;
}

List *
drift_missed(const Place *place, List *pages, TimestampTz started_at)
{
	Datum values[5];

	set_place(values, place);
	values[3] = TimestampTzGetDatum(started_at);
	values[4] = document_array(pages);
	db_run(&missed_query, values, NULL);
	return result_texts();
}

/* Begin the end of sessions that have lost their VM, as the list "seen" says. */
static void
end_lost(const Place *place, TimestampTz seen, TimestampTz started_at)
{
	Datum values[6];
	SPITupleTable *lost;
	uint64 count;
	uint64 i;

	set_place(values, place);
	values[3] = TimestampTzGetDatum(seen);
	values[4] = TimestampTzGetDatum(started_at);
	values[5] = Int64GetDatum(MANY_UNKNOWN);
	db_run(&lost_query, values, NULL);
	lost = SPI_tuptable;
	count = SPI_processed;
	for (i = 0; i < count; i++)
	{
		bool isnull;
		pg_uuid_t id;
		char *team_id;
		char *reason;
		Jsonb *detail;

		SPI_tuptable = lost;
		id = *DatumGetUUIDP(db_value(i, 1, &isnull));
		team_id = db_text(i, 2, CurrentMemoryContext);
		wake_workers(DatumGetInt16(db_value(i, 4, &isnull)),
					 DatumGetTimestampTz(db_value(i, 3, &isnull)));
		reason = db_text(i, 6, CurrentMemoryContext);
		detail = handle_set_text(NULL, "vm_id", db_text(i, 5, CurrentMemoryContext));
		detail = handle_set_text(detail, "vm_state", db_text(i, 7, CurrentMemoryContext));
		detail = handle_set_text(detail, "state_reason", db_text(i, 8, CurrentMemoryContext));
		event_add(&id, team_id, "inventory", NULL, NULL, reason, detail);
	}
}

static bool
is_quarantined(void)
{
	db_run(&quarantine_query, NULL, NULL);
	return SPI_processed > 0;
}

int
drift_write(const Place *place, List *pages, List *missed, List *looked, TimestampTz started_at)
{
	TimestampTz seen = GetCurrentTimestamp();
	bool quarantined;
	Datum values[8];
	bool isnull;
	int count;

	drift_look_for_failover();
	quarantined = is_quarantined();
	set_place(values, place);
	values[3] = TimestampTzGetDatum(started_at);
	values[4] = document_array(pages);
	values[5] = TimestampTzGetDatum(seen);
	values[6] = BoolGetDatum(quarantined);
	db_run(&seen_query, values, NULL);
	count = (int) DatumGetInt64(db_value(0, 1, &isnull));
	if (missed != NIL)
	{
		values[6] = document_array(looked);
		values[7] = db_text_array(missed);
		db_run(&missing_query, values, NULL);
		end_lost(place, seen, started_at);
	}
	values[3] = TimestampTzGetDatum(seen);
	db_run(&gone_query, values, NULL);
	return count;
}

List *
drift_to_end(const Place *place, TimestampTz started_at, List **sessions)
{
	Datum values[6];
	uint64 i;

	set_place(values, place);
	values[3] = TimestampTzGetDatum(started_at);
	values[4] = Int32GetDatum(avm_orphan_grace_s);
	values[5] = Int32GetDatum(AVM_MAX_LISTED);
	db_run(&to_end_query, values, NULL);
	*sessions = NIL;
	for (i = 0; i < SPI_processed; i++)
	{
		char *session = db_text(i, 2, CurrentMemoryContext);

		if (session != NULL)
			*sessions = lappend(*sessions, session);
	}
	return result_texts();
}

void
drift_log_end(const Place *place, List *asked, List *ended, const char *error, int millis)
{
	Datum values[5];
	SPITupleTable *rows;
	uint64 count;
	uint64 i;

	set_place(values, place);
	values[3] = db_text_array(asked);
	values[4] = document_array(ended);
	db_run(&ended_query, values, NULL);
	rows = SPI_tuptable;
	count = SPI_processed;
	for (i = 0; i < count; i++)
	{
		char *vm_id;
		char *team_id;
		char *kind;
		Jsonb *detail;
		pg_uuid_t id = {{0}}; /* of a VM that names no session */
		bool done;
		bool isnull;
		Datum value;

		SPI_tuptable = rows;
		vm_id = db_text(i, 1, CurrentMemoryContext);
		value = db_value(i, 2, &isnull);
		if (!isnull)
			id = *DatumGetUUIDP(value);
		team_id = db_text(i, 3, CurrentMemoryContext);
		kind = db_text(i, 4, CurrentMemoryContext);
		done = DatumGetBool(db_value(i, 5, &isnull));
		detail = handle_set_text(NULL, "operation", "end of a VM without a session");
		detail = handle_set_text(detail, "vm_id", vm_id);
		detail = handle_set_text(detail, "provider", place->provider);
		detail = handle_set_text(detail, "region", place->region);
		detail = handle_set_int(detail, "ms", millis);
		if (!done)
			detail = handle_set_text(detail, "error", error != NULL ? error : "refused");
		event_add(&id, team_id != NULL ? team_id : "", "inventory", NULL, NULL, kind, detail);
		if (!done)
		{
			values[3] = CStringGetTextDatum(vm_id);
			values[4] = CStringGetTextDatum(error != NULL ? error : "refused");
			db_run(&refused_query, values, NULL);
		}
	}
}

void
drift_begin_anew(bool quarantine)
{
	Datum values[1] = {BoolGetDatum(quarantine)};

	db_run(&begin_query, values, NULL);
	db_run(&all_due_query, NULL, NULL);
}

void
drift_look_for_failover(void)
{
	Datum values[1] = {Int32GetDatum(avm_orphan_grace_s)};
	bool isnull;

	db_run(&timeline_query, NULL, NULL);
	if (SPI_processed == 0)
		return;
	if (DatumGetBool(db_value(0, 1, &isnull)))
	{
		drift_begin_anew(true);
		ereport(LOG, (errmsg("agentvm: this server has been promoted: VMs that are found without "
							 "a session are quarantined"),
					  errhint("View agentvm.drift tells of them; agentvm.adopt_vm(), "
							  "agentvm.end_vm() and agentvm.release_quarantine() decide.")));
		return;
	}
	db_run(&quarantine_query, NULL, NULL);
	if (SPI_processed > 0)
		db_run(&release_query, values, NULL);
}
