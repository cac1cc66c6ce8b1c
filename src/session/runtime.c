/*-------------------------------------------------------------------------
 *
 * runtime.c
 *		What the gateway calls for the runtimes in the VMs: bootstrap, heartbeats.
 *
 * Hashes only: no token ever reaches the server.  A bootstrap token works once,
 * and only until the bootstrap deadline; the same token, session hash and boot
 * id again get the same answer, so that a lost reply locks nobody out.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/shared.h"
#include "engine/state.h"
#include "engine/sweep.h"
#include "engine/wake.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "procedure.h"
#include "providers/provider.h"
#include "secret/secret.h"
#include "session/session.h"
#include "session/warm.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/json.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_bootstrap);
PG_FUNCTION_INFO_V1(agentvm_hydrate);
PG_FUNCTION_INFO_V1(agentvm_authenticate);
PG_FUNCTION_INFO_V1(agentvm_heartbeat);
PG_FUNCTION_INFO_V1(agentvm_heartbeat_batch);
PG_FUNCTION_INFO_V1(agentvm_deadlines);
PG_FUNCTION_INFO_V1(agentvm_gateway_channel);

#define MAX_BATCH 10000	 /* heartbeats in one call */
#define MAX_PROBLEM 400	 /* bytes of what a runtime says */
#define REPORT_EVERY_S 5 /* a gateway's row is written no more often */

static DbQuery by_token_query = {
	"SELECT session_id FROM agentvm.session_token WHERE token_sha256 = $1 AND kind = $2",
	2,
	{BYTEAOID, TEXTOID}};

/*
 * It waits for nobody: a gateway has one connection for all its VMs, and somebody
 * may hold the row for as long as he likes.
 */
static DbQuery boot_lock_query = {
	"SELECT s.state, s.boot_id, s.team_id, s.payload_enc, "
	"coalesce(s.payload_key_id, s.key_id, ''), s.deadline_at, "
	"coalesce(s.launched_at + s.bootstrap_timeout > clock_timestamp(), true) "
	"FROM agentvm.session s WHERE s.session_id = $1 FOR UPDATE NOWAIT",
	1,
	{UUIDOID}};

/* After the lock: who had it before may have committed since the locking statement's snapshot. */
static DbQuery own_token_query = {
	"SELECT FROM agentvm.session_token "
	"WHERE session_id = $1 AND kind = 'session' AND token_sha256 = $2",
	2,
	{UUIDOID, BYTEAOID}};

static DbQuery boot_query = {
	"UPDATE agentvm.session SET state = CASE WHEN warm_key IS NULL THEN 'ready' ELSE 'warm' END, "
	"ready_at = clock_timestamp(), boot_id = $2, "
	"boot_info = $3, detail = NULL, "
	"next_check_at = CASE "
	"WHEN lease IS NULL AND running AND NOT coalesce(handle ? '" AVM_BOOT_LEFT "', false) "
	"THEN deadline_at "
	"WHEN lease IS NULL THEN clock_timestamp() ELSE next_check_at END "
	"WHERE session_id = $1 RETURNING next_check_at, lane",
	3,
	{UUIDOID, TEXTOID, JSONBOID}};

static DbQuery add_token_query = {
	"INSERT INTO agentvm.session_token (token_sha256, session_id, kind) VALUES ($1, $2, 'session') "
	"ON CONFLICT (token_sha256) DO NOTHING",
	2,
	{BYTEAOID, UUIDOID}};

static DbQuery add_heartbeat_query = {
	"INSERT INTO agentvm.session_heartbeat (session_id, lost_after) "
	"SELECT session_id, heartbeat_timeout FROM agentvm.session WHERE session_id = $1 "
	"ON CONFLICT (session_id) DO NOTHING",
	1,
	{UUIDOID}};

static DbQuery by_session_token_query = {
	"SELECT s.session_id, s.state, s.deadline_at FROM agentvm.session_token t "
	"JOIN agentvm.session s USING (session_id) WHERE t.token_sha256 = $1 AND t.kind = 'session'",
	1,
	{BYTEAOID}};

static DbQuery hydrate_query = {
	"SELECT s.session_id, s.state, s.team_id, s.payload_enc, "
	"coalesce(s.payload_key_id, s.key_id, ''), s.deadline_at FROM agentvm.session_token t "
	"JOIN agentvm.session s USING (session_id) WHERE t.token_sha256 = $1 AND t.kind = 'session'",
	1,
	{BYTEAOID}};

/* Like boot_lock_query it waits for nobody. */
static DbQuery unusable_query = {
	"WITH own AS MATERIALIZED (SELECT session_id FROM agentvm.session WHERE session_id = $1 "
	"AND state NOT IN ('terminating', 'terminated', 'failed') FOR UPDATE NOWAIT) "
	"UPDATE agentvm.session s SET state = 'terminating', end_reason = 'provider_error', "
	"detail = $2, retries = 0, next_check_at = "
	"CASE WHEN lease IS NULL THEN clock_timestamp() ELSE next_check_at END "
	"FROM own WHERE s.session_id = own.session_id RETURNING s.next_check_at, s.lane",
	2,
	{UUIDOID, TEXTOID}};

static DbQuery beat_query = {
	"UPDATE agentvm.session_heartbeat SET "
	"last_heartbeat_at = greatest(last_heartbeat_at, clock_timestamp()) WHERE session_id = $1",
	1,
	{UUIDOID}};

/*
 * Rows are locked in one order, that of their ids, and no row of agentvm.session
 * is ever locked here: with what is off in beats_without, the plan goes through
 * the sorted ids or through the primary key.  No time comes before -infinity:
 * stored, it would break all reckoning with it.
 */
static DbQuery beats_query = {
	"WITH b AS MATERIALIZED (SELECT id, max(coalesce(seen, clock_timestamp())) AS seen "
	"FROM unnest($1, $2) AS u (id, seen) WHERE id IS NOT NULL "
	"AND seen IS DISTINCT FROM '-infinity' GROUP BY id ORDER BY id) "
	"UPDATE agentvm.session_heartbeat h SET "
	"last_heartbeat_at = greatest(h.last_heartbeat_at, least(b.seen, clock_timestamp())) "
	"FROM b WHERE h.session_id = b.id",
	2,
	{UUIDARRAYOID, TIMESTAMPTZARRAYOID}};

static const char *const beats_without[] = {"enable_seqscan", "enable_bitmapscan",
											"enable_hashjoin", "enable_mergejoin", "jit"};

/*
 * Who is ending, in a table of hardly any rows; the wide rows of sessions are
 * read only where an id has no heartbeat of its own.
 */
static DbQuery ending_query = {
	"SELECT session_id FROM agentvm.session_ending WHERE session_id = ANY ($1)", 1, {UUIDARRAYOID}};

static DbQuery gone_query = {
	"SELECT b.id FROM (SELECT DISTINCT id FROM unnest($1) AS u (id) WHERE id IS NOT NULL) b "
	"LEFT JOIN agentvm.session s ON s.session_id = b.id "
	"WHERE s.session_id IS NULL OR s.state IN ('terminating', 'terminated', 'failed')",
	1,
	{UUIDARRAYOID}};

static DbQuery deadlines_query = {
	"SELECT session_id, deadline_at FROM agentvm.session WHERE session_id = ANY ($1) "
	"AND state NOT IN ('terminating', 'terminated', 'failed') ORDER BY session_id",
	1,
	{UUIDARRAYOID}};

/*
 * A gateway is known by its application_name.  Its row takes over the start of
 * the period in which some gateway has reported without a gap.
 */
static DbQuery report_query = {
	"UPDATE agentvm.gateway g SET last_report_at = clock_timestamp(), listening_since = "
	"coalesce((SELECT o.listening_since FROM agentvm.gateway o "
	"WHERE o.last_report_at > clock_timestamp() - $2 * interval '1 s' "
	"ORDER BY o.last_report_at DESC LIMIT 1), clock_timestamp()) "
	"WHERE g.gateway_id = current_setting('application_name') "
	"AND (g.last_report_at IS NULL OR g.last_report_at < clock_timestamp() - $1 * interval '1 s')",
	2,
	{INT4OID, INT4OID}};

/* A SHA-256 argument; raises 22004 or 22023. */
static Datum
hash_argument(FunctionCallInfo fcinfo, int argument, const char *name)
{
	bytea *hash;

	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("%s must not be null", name)));
	hash = PG_GETARG_BYTEA_PP(argument);
	if (VARSIZE_ANY_EXHDR(hash) != SHA256_LEN)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("%s must be the %d bytes of a SHA-256, but has %d", name, SHA256_LEN,
							   (int) VARSIZE_ANY_EXHDR(hash))));
	return PointerGetDatum(hash);
}

static void
raise_gone(const pg_uuid_t *id)
{
	ereport(ERROR, (errcode(AVM_SESSION_ENDED),
					errmsg("session %s has ended",
						   DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id))))));
}

/* The answer to a runtime that has reported for duty. */
static Jsonb *
boot_answer(const pg_uuid_t *id, const char *team_id, const bytea *payload, const char *key_id,
			TimestampTz deadline)
{
	char *id_text = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)));
	char deadline_text[MAXDATELEN + 1];
	StringInfoData answer;
	Jsonb *result;

	JsonEncodeDateTime(deadline_text, TimestampTzGetDatum(deadline), TIMESTAMPTZOID, NULL);
	initStringInfo(&answer);
	appendStringInfo(&answer,
					 "{\"session_id\": \"%s\", \"heartbeat_interval_s\": %d, \"deadline\": \"%s\", "
					 "\"deadline_grace_s\": %d, \"deadman_allowance_s\": %d, \"files\": [], "
					 "\"channel\": \"/v1/channel\"",
					 id_text, avm_heartbeat_interval_s, deadline_text, avm_deadline_grace_s,
					 avm_deadman_allowance_s);
	if (payload != NULL)
	{
		Secret *plain = secret_decrypt(team_id, "session", id_text, payload, key_id);

		/* {"env": {...}, "repos": [...]}, as provision() wrote it */
		appendStringInfoString(&answer, ", ");
		appendBinaryStringInfo(&answer, secret_bytes(plain) + 1, secret_len(plain) - 1);
	}
	else
		appendStringInfoString(&answer, ", \"env\": {}, \"repos\": []}");
	result = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(answer.data)));
	secret_wipe(answer.data, answer.len);
	return result;
}

Datum
agentvm_bootstrap(PG_FUNCTION_ARGS)
{
	MemoryContext caller = CurrentMemoryContext;
	Datum token = hash_argument(fcinfo, 0, "token_sha256");
	Datum session_token = hash_argument(fcinfo, 1, "session_token_sha256");
	Jsonb *info;
	char *boot_id;
	DbScope scope;
	Datum values[3];
	char nulls[3] = {' ', ' ', ' '};
	SessionState state;
	char *used_by;
	char *team_id;
	char *key_id;
	bytea *payload = NULL;
	TimestampTz deadline;
	bool in_time;
	bool isnull;
	pg_uuid_t id;
	Jsonb *answer;

	if (PG_ARGISNULL(2))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("boot_id must not be null")));
	boot_id = check_identifier(PG_GETARG_TEXT_PP(2), "boot_id");
	info = PG_ARGISNULL(3) ? NULL : PG_GETARG_JSONB_P(3);
	if (info != NULL)
		check_document(info, 'o', "info");

	db_enter(&scope);
	values[0] = token;
	values[1] = CStringGetTextDatum("bootstrap");
	db_run(&by_token_query, values, NULL);
	if (SPI_processed == 0)
	{
		db_leave(&scope);
		PG_RETURN_NULL();
	}
	id = *DatumGetUUIDP(db_value(0, 1, &isnull));

	values[0] = UUIDPGetDatum(&id);
	db_run(&boot_lock_query, values, NULL);
	if (SPI_processed == 0)
	{
		db_leave(&scope);
		PG_RETURN_NULL();
	}
	state = state_parse(db_text(0, 1, CurrentMemoryContext));
	used_by = db_text(0, 2, CurrentMemoryContext);
	team_id = db_text(0, 3, CurrentMemoryContext);
	{
		Datum value = db_value(0, 4, &isnull);

		if (!isnull)
			payload = DatumGetByteaPCopy(value);
	}
	key_id = db_text(0, 5, CurrentMemoryContext);
	deadline = DatumGetTimestampTz(db_value(0, 6, &isnull));
	in_time = DatumGetBool(db_value(0, 7, &isnull));

	if (state == STATE_TERMINATING || state_is_ended(state))
		raise_gone(&id);
	if (used_by != NULL)
	{
		/* a repeat by the same runtime, whose reply was lost; anybody else is turned away */
		values[1] = session_token;
		db_run(&own_token_query, values, NULL);
		if (strcmp(used_by, boot_id) != 0 || SPI_processed == 0)
		{
			db_leave(&scope);
			PG_RETURN_NULL();
		}
	}
	else
	{
		bool taken;

		values[0] = session_token;
		values[1] = UUIDPGetDatum(&id);
		taken = !in_time || state != STATE_PROVISIONING;
		if (!taken)
		{
			db_run(&add_token_query, values, NULL);
			taken = SPI_processed == 0; /* another session has this hash */
		}
		if (taken)
		{
			db_leave(&scope);
			PG_RETURN_NULL();
		}
		values[0] = UUIDPGetDatum(&id);
		values[1] = CStringGetTextDatum(boot_id);
		nulls[2] = info ? ' ' : 'n';
		values[2] = PointerGetDatum(info);
		db_run(&boot_query, values, nulls);
		wake_after_lock(DatumGetInt16(db_value(0, 2, &isnull)),
						DatumGetTimestampTz(db_value(0, 1, &isnull)));
		db_run(&add_heartbeat_query, values, NULL);
	}
	answer = boot_answer(&id, team_id, payload, key_id, deadline);
	{
		MemoryContext old = MemoryContextSwitchTo(caller);

		answer = (Jsonb *) PG_DETOAST_DATUM_COPY(JsonbPGetDatum(answer));
		MemoryContextSwitchTo(old);
	}
	db_leave(&scope);
	PG_RETURN_JSONB_P(answer);
}

/* What a runtime says is wrong with it, as a detail: what is no plain text becomes '?'. */
static char *
problem_detail(text *problem)
{
	char *said = text_to_cstring(problem);
	char *c;

	if (strlen(said) > MAX_PROBLEM)
		said[MAX_PROBLEM] = '\0';
	for (c = said; *c != '\0'; c++)
	{
		if ((unsigned char) *c < ' ' || (unsigned char) *c >= 0x7f)
			*c = '?';
	}
	return psprintf("the VM could not take over env and repos: %s", said);
}

/* The session ends, since its VM cannot be what was promised. */
static void
end_unusable(const pg_uuid_t *id, text *problem)
{
	Datum values[2] = {UUIDPGetDatum(id), CStringGetTextDatum(problem_detail(problem))};
	bool isnull;

	db_run(&unusable_query, values, NULL);
	if (SPI_processed > 0)
		wake_after_lock(DatumGetInt16(db_value(0, 2, &isnull)),
						DatumGetTimestampTz(db_value(0, 1, &isnull)));
}

Datum
agentvm_hydrate(PG_FUNCTION_ARGS)
{
	MemoryContext caller = CurrentMemoryContext;
	Datum values[1] = {hash_argument(fcinfo, 0, "session_token_sha256")};
	bytea *payload = NULL;
	SessionState state;
	Jsonb *answer;
	DbScope scope;
	MemoryContext old;
	Datum value;
	char *team_id;
	char *key_id;
	TimestampTz deadline;
	pg_uuid_t id;
	bool isnull;

	db_enter(&scope);
	db_run(&hydrate_query, values, NULL);
	if (SPI_processed == 0)
	{
		db_leave(&scope);
		PG_RETURN_NULL();
	}
	id = *DatumGetUUIDP(db_value(0, 1, &isnull));
	state = state_parse(db_text(0, 2, CurrentMemoryContext));
	team_id = db_text(0, 3, CurrentMemoryContext);
	value = db_value(0, 4, &isnull);
	if (!isnull)
		payload = DatumGetByteaPCopy(value);
	key_id = db_text(0, 5, CurrentMemoryContext);
	deadline = DatumGetTimestampTz(db_value(0, 6, &isnull));
	if (state == STATE_TERMINATING || state_is_ended(state))
		raise_gone(&id);
	if (state == STATE_PROVISIONING || state == STATE_WARM)
		answer = handle_set_text(NULL, "session_id", session_text(&id)); /* no error: it is usual */
	else
	{
		if (!PG_ARGISNULL(1))
		{
			end_unusable(&id, PG_GETARG_TEXT_PP(1));
			payload = NULL;
		}
		else
			warm_hydrated(&id);
		answer = boot_answer(&id, team_id, payload, key_id, deadline);
	}
	old = MemoryContextSwitchTo(caller);
	answer = (Jsonb *) PG_DETOAST_DATUM_COPY(JsonbPGetDatum(answer));
	MemoryContextSwitchTo(old);
	db_leave(&scope);
	PG_RETURN_JSONB_P(answer);
}

/*
 * The live session of a session token and its deadline: false when the token is
 * unknown; raises AV006 when the session has ended or is ending.
 */
static bool
live_session(Datum token, pg_uuid_t *id, TimestampTz *deadline)
{
	Datum values[1] = {token};
	SessionState state;
	bool isnull;

	db_run(&by_session_token_query, values, NULL);
	if (SPI_processed == 0)
		return false;
	*id = *DatumGetUUIDP(db_value(0, 1, &isnull));
	state = state_parse(db_text(0, 2, CurrentMemoryContext));
	*deadline = DatumGetTimestampTz(db_value(0, 3, &isnull));
	if (state == STATE_TERMINATING || state_is_ended(state))
		raise_gone(id);
	return true;
}

Datum
agentvm_authenticate(PG_FUNCTION_ARGS)
{
	Datum token = hash_argument(fcinfo, 0, "session_token_sha256");
	pg_uuid_t *id = palloc(sizeof(pg_uuid_t));
	TimestampTz deadline;
	DbScope scope;
	bool known;

	db_enter(&scope);
	known = live_session(token, id, &deadline);
	db_leave(&scope);
	if (!known)
		PG_RETURN_NULL();
	PG_RETURN_UUID_P(id);
}

Datum
agentvm_heartbeat(PG_FUNCTION_ARGS)
{
	Datum token = hash_argument(fcinfo, 0, "session_token_sha256");
	pg_uuid_t id;
	TimestampTz deadline;
	DbScope scope;
	bool known;

	db_enter(&scope);
	known = live_session(token, &id, &deadline);
	if (known)
	{
		Datum values[1] = {UUIDPGetDatum(&id)};

		db_run(&beat_query, values, NULL);
	}
	db_leave(&scope);
	if (!known)
		PG_RETURN_NULL();
	PG_RETURN_TIMESTAMPTZ(deadline);
}

Datum
agentvm_heartbeat_batch(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	ArrayType *ids;
	ArrayType *seen;
	DbScope scope;
	Datum values[2];
	int count;
	uint64 i;

	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
						errmsg("session_ids and seen_at must not be null")));
	ids = PG_GETARG_ARRAYTYPE_P(0);
	seen = PG_GETARG_ARRAYTYPE_P(1);
	count = ArrayGetNItems(ARR_NDIM(ids), ARR_DIMS(ids));
	if (ARR_NDIM(ids) > 1 || count != ArrayGetNItems(ARR_NDIM(seen), ARR_DIMS(seen)))
		ereport(ERROR, (errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR),
						errmsg("session_ids and seen_at must be lists of the same length")));
	if (count > MAX_BATCH)
		ereport(ERROR,
				(errcode(AVM_OVER_LIMIT), errmsg("%d heartbeats in one call are too many", count),
				 errdetail("At most %d are taken.", MAX_BATCH)));

	begin_set(fcinfo);
	db_enter(&scope);
	values[0] = Int32GetDatum(REPORT_EVERY_S);
	values[1] = Int32GetDatum(GATEWAY_SILENT_S);
	db_run(&report_query, values, NULL);
	if (count > 0)
	{
		SPITupleTable *gone;
		uint64 ngone;

		values[0] = PointerGetDatum(ids);
		values[1] = PointerGetDatum(seen);
		db_run(&ending_query, values, NULL);
		gone = SPI_tuptable;
		ngone = SPI_processed;
		db_plan_without(beats_without, lengthof(beats_without));
		db_run(&beats_query, values, NULL);
		if (SPI_processed < count)
		{
			/* some have no heartbeat, or are named twice */
			db_run(&gone_query, values, NULL);
			gone = SPI_tuptable;
			ngone = SPI_processed;
		}
		for (i = 0; i < ngone; i++)
		{
			bool isnull;
			Datum id = SPI_getbinval(gone->vals[i], gone->tupdesc, 1, &isnull);

			tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, &id, &isnull);
		}
	}
	db_leave(&scope);
	return (Datum) 0;
}

Datum
agentvm_deadlines(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	DbScope scope;
	Datum ids[1];
	uint64 i;

	begin_set(fcinfo);
	if (PG_ARGISNULL(0))
		return (Datum) 0;
	ids[0] = PG_GETARG_DATUM(0);
	db_enter(&scope);
	db_run(&deadlines_query, ids, NULL);
	for (i = 0; i < SPI_processed; i++)
	{
		Datum values[2];
		bool nulls[2];

		values[0] = db_value(i, 1, &nulls[0]);
		values[1] = db_value(i, 2, &nulls[1]);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	db_leave(&scope);
	return (Datum) 0;
}

Datum
agentvm_gateway_channel(PG_FUNCTION_ARGS)
{
	const char *channel = shared_gateway_channel();

	if (channel == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(channel));
}
