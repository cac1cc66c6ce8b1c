/*-------------------------------------------------------------------------
 *
 * audit.c
 *		The log's seals: made, checked, and kept up by a dispatcher.
 *
 * Events are append-only: a trigger refuses UPDATE, DELETE and TRUNCATE to
 * everybody but purge.c.  Who gets around it, as a superuser can by switching
 * the trigger off, is found out: per team, events are sealed in batches by a
 * SHA-256 over their rows and the seal before.  That is done by a dispatcher,
 * some time after the events have been committed; whoever writes an event does
 * nothing for it.
 *
 * Event ids commit out of order, so a seal lists its events one by one, and one
 * that commits late goes into a later seal.  A seal's events are all from one
 * block of BLOCK ids: then the seals of a block, found by index, tell which of its events
 * are sealed, and each look is bounded.
 *
 * So as not to look at all blocks each time there is a mark, sealed_below: below
 * it everything is sealed that will ever appear there.  Each walk notes the
 * largest id it saw ("seen") and then the next transaction id.  Whoever holds a
 * smaller event id has a smaller transaction id, since our own code writes a row
 * before it makes an event.  (It may well be above the snapshot's xmax, which is
 * only the first id after those that have ended.)  So a later walk whose
 * snapshot's xmin has come that far has seen, and sealed, all there is up to
 * "seen".  What turns up below the mark nevertheless was put there by hand, is
 * never sealed, and verify_audit() tells.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/transam.h"
#include "agentvm.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "db.h"
#include "engine/audit.h"
#include "engine/purge.h"
#include "funcapi.h"
#include "procedure.h"
#include "storage/lock.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_event_is_append_only);
PG_FUNCTION_INFO_V1(agentvm_seal_audit);
PG_FUNCTION_INFO_V1(agentvm_verify_audit);

#define BLOCK 2000		  /* ids; index event_seal_block has the same number */
#define BLOCK_TEXT "2000" /* the same in SQL */
#define SLICE_US 20000	  /* how long a dispatcher seals or purges at a time, */
#define REST_US 100000	  /* and how long it then does not */
#define AFTER_ERROR_S 60  /* a dispatcher leaves it alone for so long after an error */
#define PURGE_INTERVAL_S 3600

bool audit_log_is_open = false;

/*
 * What is hashed, which README.md explains to others: lines of text in the
 * database's encoding, each a JSON array that looks the same whatever the
 * settings, and each with a newline at its end; first the seal itself, then its
 * events as listed.
 */
#define MICROSECONDS(time) "trunc(extract(epoch FROM " time ") * 1000000)"
#define SEAL_LINE                                                                                  \
	"jsonb_build_array(s.team_id, s.seal_id, " MICROSECONDS(                                       \
		"s.sealed_at") ", "                                                                        \
					   "encode(s.previous, 'hex'))::text"
#define EVENT_LINE                                                                                 \
	"jsonb_build_array(e.event_id, e.session_id, e.team_id, " MICROSECONDS(                        \
		"e.at") ", e.kind, "                                                                       \
				"e.old_state, e.new_state, e.reason, e.detail)::text"
#define SEAL_HASH(lines)                                                                           \
	"sha256(convert_to(" SEAL_LINE " || E'\\n' || " lines " || E'\\n', "                           \
	"getdatabaseencoding()::text))"

/* ---- append-only ---- */

Datum
agentvm_event_is_append_only(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("agentvm.event_is_append_only() is a trigger")));
	if (!audit_log_is_open)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("agentvm.%s is append-only",
						RelationGetRelationName(((TriggerData *) fcinfo->context)->tg_relation)),
				 errhint("Old events are removed by agentvm.purge().")));
	return PointerGetDatum(NULL);
}

/* ---- one at a time ---- */

static Oid
seal_table(void)
{
	return get_relname_relid("event_seal", get_namespace_oid("agentvm", true));
}

bool
audit_claim(AuditTask task, bool wait)
{
	Oid table = seal_table();
	LOCKTAG tag;

	if (!OidIsValid(table))
		return false;
	PreventCommandDuringRecovery("agentvm functions that write");
	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, table, task, 0);
	return LockAcquire(&tag, ExclusiveLock, false, !wait) != LOCKACQUIRE_NOT_AVAIL;
}

void
audit_plan_by_index(void)
{
	/* scan types that are off make a plan look dear enough for just-in-time compilation */
	static const char *const off[] = {"enable_seqscan", "enable_bitmapscan", "enable_sort", "jit"};

	db_plan_without(off, lengthof(off));
}

/* ---- sealing ---- */

static DbQuery mark_query = {
	"SELECT coalesce(m.sealed_below, 0), m.seen, m.seen_next_xid, pg_snapshot_xmin(now), "
	"(SELECT max(event_id) FROM agentvm.session_event) "
	"FROM pg_current_snapshot() AS now LEFT JOIN agentvm.event_seal_mark m ON true",
	0,
	{0}};

static DbQuery move_mark_query = {"INSERT INTO agentvm.event_seal_mark AS m (sealed_below, seen, "
								  "seen_next_xid) VALUES ($1, $2, $3) "
								  "ON CONFLICT (only_row) DO UPDATE SET "
								  "sealed_below = greatest(m.sealed_below, EXCLUDED.sealed_below), "
								  "seen = EXCLUDED.seen, seen_next_xid = EXCLUDED.seen_next_xid",
								  3,
								  {INT8OID, INT8OID, XID8OID}};

static DbQuery next_query = {
	"SELECT min(event_id) FROM agentvm.session_event WHERE event_id >= $1", 1, {INT8OID}};

/* Seal what is unsealed of one block, team by team. */
static DbQuery seal_query = {
	"WITH line AS MATERIALIZED ("
	"SELECT e.team_id, e.event_id, e.at, " EVENT_LINE " AS line FROM agentvm.session_event e "
	"WHERE e.event_id BETWEEN $1 AND $2 AND e.event_id NOT IN (SELECT unnest(s.event_ids) "
	"FROM agentvm.event_seal s WHERE s.event_ids[1] / " BLOCK_TEXT " = $3)), "
	"s AS MATERIALIZED ("
	"SELECT b.*, coalesce(p.seal_id, 0) + 1 AS seal_id, p.sha256 AS previous, $4 AS sealed_at "
	"FROM (SELECT team_id, array_agg(event_id ORDER BY event_id) AS event_ids, "
	"string_agg(line, E'\\n' ORDER BY event_id) AS lines, max(at) AS newest_at "
	"FROM line GROUP BY team_id) b "
	"LEFT JOIN LATERAL (SELECT o.seal_id, o.sha256 FROM agentvm.event_seal o "
	"WHERE o.team_id = b.team_id ORDER BY o.seal_id DESC LIMIT 1) p ON true) "
	"INSERT INTO agentvm.event_seal (team_id, seal_id, event_ids, newest_at, sealed_at, previous, "
	"sha256) SELECT team_id, seal_id, event_ids, newest_at, sealed_at, previous, " SEAL_HASH(
		"lines") " FROM s RETURNING cardinality(event_ids)",
	4,
	{INT8OID, INT8OID, INT8OID, TIMESTAMPTZOID}};

static void
begin_walk(SealWalk *walk)
{
	bool isnull;

	walk->table = seal_table();
	db_run(&mark_query, NULL, NULL);
	walk->sealed_below = DatumGetInt64(db_value(0, 1, &isnull));
	walk->seen = DatumGetInt64(db_value(0, 2, &isnull));
	if (isnull)
		walk->seen = -1;
	walk->seen_next_xid = DatumGetUInt64(db_value(0, 3, &isnull));
	walk->xmin = DatumGetUInt64(db_value(0, 4, &isnull));
	walk->last = DatumGetInt64(db_value(0, 5, &isnull));
	if (isnull)
		walk->last = walk->sealed_below;
	walk->next = walk->sealed_below + 1;
	/* after the snapshot: it covers all that the snapshot shows */
	walk->next_xid = U64FromFullTransactionId(ReadNextFullTransactionId());
	SPI_freetuptable(SPI_tuptable);
}

/* The first id, from the walk's next one on, that there is; false: none up to its last. */
static bool
find_next(SealWalk *walk)
{
	Datum values[1] = {Int64GetDatum(walk->next)};
	bool isnull;

	if (walk->next > walk->last)
		return false;
	db_run(&next_query, values, NULL);
	walk->next = DatumGetInt64(db_value(0, 1, &isnull));
	SPI_freetuptable(SPI_tuptable);
	return !isnull && walk->next <= walk->last;
}

/* All up to the walk's last id is sealed, as far as it was there when the walk began. */
static void
end_walk(const SealWalk *walk)
{
	Datum values[3] = {Int64GetDatum(walk->sealed_below), Int64GetDatum(walk->last),
					   UInt64GetDatum(walk->next_xid)};
	char nulls[3] = {' ', ' ', ' '};

	if (walk->last <= walk->sealed_below)
		return; /* there was nothing, and nobody need be told */
	if (walk->seen >= 0 && walk->seen_next_xid <= walk->xmin)
	{
		values[0] = Int64GetDatum(walk->seen);
		if (walk->seen == walk->last)
			nulls[1] = nulls[2] = 'n';
	}
	else if (walk->seen >= 0 && walk->seen_next_xid <= walk->next_xid)
		return; /* some transaction of that time is still under way */
	/* else: none was noted, or in another cluster, of which this is a dump */
	db_run(&move_mark_query, values, nulls);
}

bool
audit_seal(SealWalk *walk, TimestampTz stop_at, int64 *sealed)
{
	/* of an extension that is gone, and has come again? */
	if (walk->table != seal_table())
		walk->table = InvalidOid;
	if (!OidIsValid(walk->table))
		begin_walk(walk);

	while (find_next(walk))
	{
		int64 block = walk->next / BLOCK;
		int64 end = Min((block + 1) * BLOCK - 1, walk->last);
		Datum values[4] = {Int64GetDatum(walk->next), Int64GetDatum(end), Int64GetDatum(block),
						   TimestampTzGetDatum(GetCurrentTimestamp())};
		uint64 i;
		bool isnull;

		CHECK_FOR_INTERRUPTS();
		db_run(&seal_query, values, NULL);
		for (i = 0; i < SPI_processed; i++)
			*sealed += DatumGetInt32(db_value(i, 1, &isnull));
		SPI_freetuptable(SPI_tuptable);
		walk->next = end + 1;
		if (GetCurrentTimestamp() >= stop_at)
			return false;
	}
	end_walk(walk);
	walk->table = InvalidOid;
	return true;
}

Datum
agentvm_seal_audit(PG_FUNCTION_ARGS)
{
	SealWalk walk = {0};
	DbScope scope;
	int64 sealed = 0;

	require_admin("seal the audit log");
	db_enter(&scope);
	audit_plan_by_index();
	(void) audit_claim(AUDIT_SEAL, true);
	(void) audit_seal(&walk, DT_NOEND, &sealed);
	db_leave(&scope);
	PG_RETURN_INT64(sealed);
}

/* ---- in a dispatcher ---- */

/* One slice of sealing; returns whether the walk is over. */
static bool
seal_slice(SealWalk *walk, EngineHost host)
{
	/* worked on a copy: an error leaves the walk where the last commit was */
	SealWalk next = *walk;
	DbScope scope;
	int64 sealed = 0;
	bool over = true;

	host.begin();
	db_enter(&scope);
	audit_plan_by_index();
	if (audit_claim(AUDIT_SEAL, false))
		over = audit_seal(&next, GetCurrentTimestamp() + SLICE_US, &sealed);
	db_leave(&scope);
	host.commit();
	*walk = next;
	return over;
}

/* One slice of the purge; returns whether it is over. */
static bool
purge_slice(Purge *purge, EngineHost host)
{
	Purge next = *purge;
	TimestampTz stop_at = GetCurrentTimestamp() + SLICE_US;
	DbScope scope;
	bool over;

	host.begin();
	db_enter(&scope);
	audit_plan_by_index();
	over = !audit_claim(AUDIT_PURGE, false);
	while (!over)
	{
		over = purge_step(&next);
		if (GetCurrentTimestamp() >= stop_at)
			break;
	}
	db_leave(&scope);
	host.commit();
	*purge = next;
	return over;
}

TimestampTz
audit_work(DispatcherSlot *slot, EngineHost host, TimestampTz until)
{
	static SealWalk walk = {0};
	static Purge purge = {PURGE_DONE};
	static TimestampTz next_seal = 0;
	static TimestampTz next_purge = 0;
	static TimestampTz pause_until = 0; /* the last slice has raised an error */
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz seal_interval = avm_sweep_interval_ms * INT64CONST(1000);
	TimestampTz purge_interval =
		Min(PURGE_INTERVAL_S * USECS_PER_SEC, avm_retention_s * USECS_PER_SEC / 10);
	TimestampTz next;
	int peers;

	/* the settings may have changed since */
	next_seal = Min(next_seal, now + seal_interval);
	next_purge = Min(next_purge, now + purge_interval);
	next = Max(Min(next_seal, next_purge), pause_until);
	if (now < next)
		return Min(until, next);

	pause_until = now + AFTER_ERROR_S * USECS_PER_SEC;
	if (shared_rank(slot, &peers) > 0)
	{
		/* the first dispatcher does it; whoever becomes that begins within an interval */
		next_seal = now + seal_interval;
		next_purge = Max(next_purge, next_seal);
	}
	else if (now >= next_seal)
		next_seal = seal_slice(&walk, host) ? now + seal_interval : GetCurrentTimestamp() + REST_US;
	else
	{
		if (purge.stage == PURGE_DONE)
			purge_begin(&purge, now - avm_retention_s * USECS_PER_SEC, false);
		if (purge_slice(&purge, host))
		{
			purge.stage = PURGE_DONE;
			next_purge = now + purge_interval;
		}
		else
			next_purge = GetCurrentTimestamp() + REST_US;
	}
	pause_until = 0;
	return Min(until, Min(next_seal, next_purge));
}

/* ---- checking ---- */

static DbQuery may_verify_query = {
	"SELECT CASE WHEN $3 THEN EXISTS (SELECT FROM agentvm.team WHERE team_id = $1) "
	"OR EXISTS (SELECT FROM agentvm.former_team WHERE team_id = $1) "
	"ELSE EXISTS (SELECT FROM agentvm.team_member m WHERE m.team_id = $1 "
	"AND pg_has_role($2, m.role, 'USAGE')) END",
	3,
	{TEXTOID, OIDOID, BOOLOID}};

/* One statement, so that seals made or purged meanwhile do not confuse it. */
static DbQuery verify_query = {
	"WITH s AS MATERIALIZED (SELECT *, lag(seal_id) OVER w AS id_before, "
	"lag(sha256) OVER w AS sha256_before FROM agentvm.event_seal WHERE team_id = $1 "
	"WINDOW w AS (ORDER BY seal_id)), "
	"item AS MATERIALIZED (SELECT s.seal_id, i.event_id, i.n, e.team_id, " EVENT_LINE " AS line, "
	"count(*) OVER (PARTITION BY i.event_id) AS times "
	"FROM s, unnest(s.event_ids) WITH ORDINALITY AS i (event_id, n) "
	"LEFT JOIN agentvm.session_event e ON e.event_id = i.event_id), "
	"sum AS (SELECT seal_id, string_agg(line, E'\\n' ORDER BY n) AS lines, "
	"bool_and(coalesce(team_id = $1, false)) AS complete FROM item GROUP BY seal_id) "
	/* the chain */
	"SELECT seal_id, NULL::bigint AS event_id, CASE WHEN id_before IS NULL "
	"THEN 'the seals before this one are missing' ELSE format('seals %s to %s are missing', "
	"id_before + 1, seal_id - 1) END AS problem "
	"FROM s WHERE seal_id <> coalesce(id_before + 1, CASE WHEN purged_at IS NULL THEN 1 "
	"ELSE seal_id END) "
	"UNION ALL SELECT seal_id, NULL, 'the seal does not follow from the one before' "
	"FROM s WHERE CASE seal_id WHEN id_before + 1 THEN previous IS DISTINCT FROM sha256_before "
	"WHEN 1 THEN previous IS NOT NULL ELSE false END "
	/* each seal */
	"UNION ALL SELECT s.seal_id, NULL, 'the hash is wrong: an event or the seal was changed' "
	"FROM s LEFT JOIN sum USING (seal_id) "
	"WHERE (s.purged_at IS NULL OR s.event_ids <> '{}') AND coalesce(sum.complete, true) "
	"AND s.sha256 IS DISTINCT FROM " SEAL_HASH(
		"sum.lines") " "
					 /* each event */
					 "UNION ALL SELECT seal_id, event_id, CASE WHEN team_id IS NULL THEN 'the "
					 "event is missing' "
					 "WHEN team_id <> $1 THEN 'the event was given to another team' "
					 "ELSE 'the event is in more than one seal' END "
					 "FROM item WHERE team_id IS DISTINCT FROM $1 OR times > 1 "
					 "UNION ALL SELECT NULL, e.event_id, 'the event is in no seal of its team' "
					 "FROM agentvm.session_event e WHERE e.team_id = $1 "
					 "AND e.event_id <= (SELECT sealed_below FROM agentvm.event_seal_mark) "
					 "AND NOT EXISTS (SELECT FROM item i WHERE i.event_id = e.event_id) "
					 "ORDER BY 1, 2, 3",
	1,
	{TEXTOID}};

Datum
agentvm_verify_audit(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Oid role = GetUserId();
	Datum values[3] = {(Datum) 0, ObjectIdGetDatum(role), BoolGetDatum(caller_is_admin(role))};
	char *team_id;
	DbScope scope;
	uint64 i;
	bool isnull;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("team_id must not be null")));
	team_id = check_identifier(PG_GETARG_TEXT_PP(0), "team_id");
	values[0] = CStringGetTextDatum(team_id);

	begin_set(fcinfo);
	db_enter(&scope);
	db_run(&may_verify_query, values, NULL);
	if (!DatumGetBool(db_value(0, 1, &isnull)))
		raise_no_such_team(team_id);
	db_run(&verify_query, values, NULL);
	for (i = 0; i < SPI_processed; i++)
	{
		Datum row[3];
		bool nulls[3];
		int c;

		for (c = 0; c < 3; c++)
			row[c] = db_value(i, c + 1, &nulls[c]);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, row, nulls);
	}
	db_leave(&scope);
	return (Datum) 0;
}
