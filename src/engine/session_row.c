/*-------------------------------------------------------------------------
 *
 * session_row.c
 *		A row of agentvm.session in memory: locked, changed, written back.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/session_row.h"
#include "engine/wake.h"
#include "rows.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

/* Columns of agentvm.session: those that session_row_save() writes come first. */
enum
{
	SESSION_ID,
	STATE,
	END_REASON,
	DETAIL,
	VM_ID,
	REGION,
	ADDRESS,
	PURCHASE,
	ATTEMPT,
	LAUNCHED_AT,
	READY_AT,
	RESUMED_AT,
	ENDED_AT,
	NEXT_CHECK_AT,
	LEASE,
	LEASE_PID,
	LEASE_START,
	RETRIES,
	RUNNING,
	HANDLE,
	PAYLOAD,
	KEY_ID,
	PAYLOAD_KEY_ID,
	FINAL_HEARTBEAT_AT,
	SAVED,
	TEAM_ID = SAVED,
	AGENT_ID,
	PROVIDER,
	CREATED_AT,
	DEADLINE_AT,
	CEILING_AT,
	OPTIONS,
	VCPUS,
	MEMORY_MIB,
	DISK_GIB,
	RUNTIME,
	BOOTSTRAP_TIMEOUT,
	LANE,
	WARM_KEY,
	COLUMNS
};

static DbTable sessions = {{"session"},
						   {"session_pkey"},
						   COLUMNS,
						   SAVED,
						   {[SESSION_ID] = "session_id",
							[STATE] = "state",
							[END_REASON] = "end_reason",
							[DETAIL] = "detail",
							[VM_ID] = "vm_id",
							[REGION] = "region",
							[ADDRESS] = "address",
							[PURCHASE] = "purchase",
							[ATTEMPT] = "attempt",
							[LAUNCHED_AT] = "launched_at",
							[READY_AT] = "ready_at",
							[RESUMED_AT] = "resumed_at",
							[ENDED_AT] = "ended_at",
							[NEXT_CHECK_AT] = "next_check_at",
							[LEASE] = "lease",
							[LEASE_PID] = "lease_pid",
							[LEASE_START] = "lease_start",
							[RETRIES] = "retries",
							[RUNNING] = "running",
							[HANDLE] = "handle",
							[PAYLOAD] = "payload_enc",
							[KEY_ID] = "key_id",
							[PAYLOAD_KEY_ID] = "payload_key_id",
							[FINAL_HEARTBEAT_AT] = "final_heartbeat_at",
							[TEAM_ID] = "team_id",
							[AGENT_ID] = "agent_id",
							[PROVIDER] = "provider",
							[CREATED_AT] = "created_at",
							[DEADLINE_AT] = "deadline_at",
							[CEILING_AT] = "ceiling_at",
							[OPTIONS] = "options",
							[VCPUS] = "vcpus",
							[MEMORY_MIB] = "memory_mib",
							[DISK_GIB] = "disk_gib",
							[RUNTIME] = "runtime",
							[BOOTSTRAP_TIMEOUT] = "bootstrap_timeout",
							[LANE] = "lane",
							[WARM_KEY] = "warm_key"}};

StaticAssertDecl(SAVED <= lengthof(((DbQuery *) NULL)->argtypes),
				 "more columns are saved than a query has parameters");

static DbQuery installation_query = {
	"SELECT installation_id FROM agentvm.installation ORDER BY in_use DESC, created_at LIMIT 1"};

static DbQuery lease_query = {
	"SELECT lease FROM agentvm.session WHERE session_id = $1", 1, {UUIDOID}};

static DbQuery last_beat_query = {
	"SELECT last_heartbeat_at FROM agentvm.session_heartbeat WHERE session_id = $1", 1, {UUIDOID}};

/*
 * Somebody may hold a beat in a transaction that stays open: then the row is left
 * for the sweep, and until that has taken it the runtime's beats go on being told
 * that the session is gone.
 */
static DbQuery unbeat_query = {
	"WITH free AS MATERIALIZED (SELECT session_id FROM agentvm.session_heartbeat "
	"WHERE session_id = $1 FOR UPDATE SKIP LOCKED) "
	"DELETE FROM agentvm.session_heartbeat h USING free WHERE h.session_id = free.session_id",
	1,
	{UUIDOID}};

static DbQuery still_beats_query = {
	"INSERT INTO agentvm.session_ending (session_id) SELECT session_id "
	"FROM agentvm.session_heartbeat WHERE session_id = $1 ON CONFLICT DO NOTHING",
	1,
	{UUIDOID}};

struct SessionBatch
{
	DbRows *rows;
	char *cluster;
};

static DbInsert event_insert = {
	{"session_event"},
	7,
	{"session_id", "team_id", "kind", "old_state", "new_state", "reason", "detail"}};

/* Text, document or number of a column of the row at hand; NULL is NULL or 0. */
static char *
get_text(DbRows *rows, int column)
{
	bool isnull;
	Datum value = db_rows_value(rows, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

static Jsonb *
get_jsonb(DbRows *rows, int column)
{
	bool isnull;
	Datum value = db_rows_value(rows, column, &isnull);

	return isnull ? NULL : (Jsonb *) PG_DETOAST_DATUM_COPY(value);
}

static int64
get_int8(DbRows *rows, int column)
{
	bool isnull;
	Datum value = db_rows_value(rows, column, &isnull);

	return isnull ? 0 : DatumGetInt64(value);
}

static int
get_int4(DbRows *rows, int column)
{
	bool isnull;
	Datum value = db_rows_value(rows, column, &isnull);

	return isnull ? 0 : DatumGetInt32(value);
}

static bool
get_bool(DbRows *rows, int column)
{
	bool isnull;
	Datum value = db_rows_value(rows, column, &isnull);

	return !isnull && DatumGetBool(value);
}

/* As extract(epoch FROM interval) has it. */
static int64
get_interval_us(DbRows *rows, int column)
{
	bool isnull;
	Interval *span = DatumGetIntervalP(db_rows_value(rows, column, &isnull));

	if (isnull)
		return 0;
	return span->time + span->day * USECS_PER_DAY +
		   (int64) (span->month / MONTHS_PER_YEAR * DAYS_PER_YEAR * USECS_PER_DAY) +
		   span->month % MONTHS_PER_YEAR * DAYS_PER_MONTH * USECS_PER_DAY;
}

/* A SessionRow of the row at hand. */
static SessionRow *
make_row(DbRows *rows, char *cluster)
{
	SessionRow *row = palloc0(sizeof(SessionRow));
	bool isnull;

	row->session_id = *DatumGetUUIDP(db_rows_value(rows, SESSION_ID, &isnull));
	row->id_text = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&row->session_id)));
	row->team_id = get_text(rows, TEAM_ID);
	row->agent_id = get_text(rows, AGENT_ID);
	row->provider = get_text(rows, PROVIDER);
	row->created_at = get_int8(rows, CREATED_AT);
	row->deadline_at = get_int8(rows, DEADLINE_AT);
	row->ceiling_at = get_int8(rows, CEILING_AT);
	row->options = get_jsonb(rows, OPTIONS);
	row->vcpus = get_int4(rows, VCPUS);
	row->memory_mib = get_int4(rows, MEMORY_MIB);
	row->disk_gib = get_int4(rows, DISK_GIB);
	row->runtime = get_bool(rows, RUNTIME);
	row->bootstrap_timeout_us = get_interval_us(rows, BOOTSTRAP_TIMEOUT);
	row->key_id = get_text(rows, KEY_ID);
	row->cluster = cluster;
	row->lane = DatumGetInt16(db_rows_value(rows, LANE, &isnull));
	row->state = row->saved_state = state_parse(get_text(rows, STATE));
	row->end_reason = get_text(rows, END_REASON);
	row->detail = get_text(rows, DETAIL);
	row->vm_id = get_text(rows, VM_ID);
	row->region = get_text(rows, REGION);
	row->address = get_text(rows, ADDRESS);
	row->purchase = get_text(rows, PURCHASE);
	row->attempt = get_int4(rows, ATTEMPT);
	row->launched_at = get_int8(rows, LAUNCHED_AT);
	row->ready_at = get_int8(rows, READY_AT);
	row->resumed_at = get_int8(rows, RESUMED_AT);
	row->ended_at = get_int8(rows, ENDED_AT);
	row->next_check_at = get_int8(rows, NEXT_CHECK_AT);
	row->lease = get_int8(rows, LEASE);
	row->retries = get_int4(rows, RETRIES);
	row->running = get_bool(rows, RUNNING);
	row->handle = get_jsonb(rows, HANDLE);
	(void) db_rows_value(rows, WARM_KEY, &isnull);
	row->warm = !isnull;
	return row;
}

/* The uuid of the installation, in CurrentMemoryContext. */
static char *
installation(void)
{
	char *id;

	db_run(&installation_query, NULL, NULL);
	id = SPI_processed > 0 ? db_text(0, 1, CurrentMemoryContext) : NULL;
	SPI_freetuptable(SPI_tuptable);
	return id;
}

SessionBatch *
session_batch_begin(void)
{
	SessionBatch *batch = palloc(sizeof(SessionBatch));

	batch->cluster = installation();
	batch->rows = db_rows_open(&sessions, true);
	return batch;
}

void
session_batch_end(SessionBatch *batch)
{
	db_rows_close(batch->rows);
	pfree(batch);
}

SessionRow *
session_row_lock(SessionBatch *batch, const pg_uuid_t *id, TimestampTz due_by)
{
	ItemPointerData place;
	SessionRow *row;

	if (!db_rows_lock(batch->rows, id, &place))
		return NULL;
	if (due_by != DT_NOEND)
	{
		TimestampTz due = get_int8(batch->rows, NEXT_CHECK_AT);

		if (due == 0 || due > due_by)
			return NULL;
	}
	row = make_row(batch->rows, batch->cluster);
	row->batch = batch;
	row->place = place;
	return row;
}

SessionRow *
session_row_read(const pg_uuid_t *id)
{
	char *cluster =
		installation(); /* first: it may have to wait, and the row is to be as it is then */
	DbRows *rows = db_rows_open(&sessions, false);
	ItemPointerData place;
	SessionRow *row = NULL;

	if (db_rows_find(rows, id, &place))
	{
		row = make_row(rows, cluster);
		row->place = place;
	}
	db_rows_close(rows);
	return row;
}

int64
session_row_lease(const pg_uuid_t *id)
{
	Datum values[1] = {UUIDPGetDatum(id)};
	bool isnull;
	int64 lease;

	db_run(&lease_query, values, NULL);
	lease = SPI_processed > 0 ? DatumGetInt64(db_value(0, 1, &isnull)) : 0;
	if (SPI_processed > 0 && isnull)
		lease = 0;
	SPI_freetuptable(SPI_tuptable);
	return lease;
}

/* Put a time or document into an argument array, NULL where it is absent. */
static void
set_time(Datum *values, char *nulls, int i, TimestampTz time)
{
	nulls[i] = time != 0 ? ' ' : 'n';
	values[i] = TimestampTzGetDatum(time);
}

static void
set_jsonb(Datum *values, char *nulls, int i, Jsonb *document)
{
	nulls[i] = document ? ' ' : 'n';
	values[i] = PointerGetDatum(document);
}

/* When the runtime was last heard of: a tombstone keeps that, the narrow table does not. */
static void
set_final_heartbeat(Datum *values, char *nulls, const SessionRow *row)
{
	Datum key[1] = {UUIDPGetDatum(&row->session_id)};
	bool isnull = true;

	db_run(&last_beat_query, key, NULL);
	if (SPI_processed > 0)
		values[FINAL_HEARTBEAT_AT] = db_value(0, 1, &isnull);
	SPI_freetuptable(SPI_tuptable);
	nulls[FINAL_HEARTBEAT_AT] = isnull ? 'n' : ' ';
}

void
session_row_save(SessionRow *row)
{
	bool ended = row->ended_at != 0;
	DbRows *rows = row->batch != NULL ? row->batch->rows : db_rows_open(&sessions, true);
	Datum values[SAVED] = {0};
	char nulls[SAVED];

	memset(nulls, ' ', sizeof(nulls));
	db_set_text(values, nulls, STATE, state_name(row->state));
	db_set_text(values, nulls, END_REASON, row->end_reason);
	db_set_text(values, nulls, DETAIL, row->detail);
	db_set_text(values, nulls, VM_ID, row->vm_id);
	db_set_text(values, nulls, REGION, row->region);
	db_set_text(values, nulls, ADDRESS, row->address);
	db_set_text(values, nulls, PURCHASE, row->purchase);
	values[ATTEMPT] = Int32GetDatum(row->attempt);
	set_time(values, nulls, LAUNCHED_AT, row->launched_at);
	set_time(values, nulls, READY_AT, row->ready_at);
	set_time(values, nulls, RESUMED_AT, row->resumed_at);
	set_time(values, nulls, ENDED_AT, row->ended_at);
	set_time(values, nulls, NEXT_CHECK_AT, row->next_check_at);
	values[LEASE] = Int64GetDatum(row->lease);
	values[LEASE_PID] = Int32GetDatum(MyProcPid);
	values[LEASE_START] = TimestampTzGetDatum(MyStartTimestamp);
	if (row->lease == 0)
		nulls[LEASE] = nulls[LEASE_PID] = nulls[LEASE_START] = 'n';
	values[RETRIES] = Int32GetDatum(row->retries);
	values[RUNNING] = BoolGetDatum(row->running);
	/* at the end nothing is kept that only a live VM needs */
	set_jsonb(values, nulls, HANDLE, ended ? NULL : row->handle);
	nulls[PAYLOAD] = nulls[KEY_ID] = nulls[PAYLOAD_KEY_ID] = ended ? 'n' : 'k';
	nulls[FINAL_HEARTBEAT_AT] = 'n';
	if (ended)
		set_final_heartbeat(values, nulls, row);
	db_rows_update(rows, &row->session_id, &row->place, values, nulls);
	if (row->batch == NULL)
		db_rows_close(rows);

	if (state_is_ended(row->state) && row->runtime)
	{
		Datum key[1] = {UUIDPGetDatum(&row->session_id)};

		db_run(&unbeat_query, key, NULL);
		if (SPI_processed == 0)
			db_run(&still_beats_query, key, NULL);
	}
	row->saved_state = row->state;
	if (row->next_check_at != 0)
		wake_workers(row->lane, row->next_check_at);
}

void
event_add(const pg_uuid_t *session_id, const char *team_id, const char *kind, const char *old_state,
		  const char *new_state, const char *reason, Jsonb *detail)
{
	Datum values[7];
	char nulls[7];

	nulls[0] = ' ';
	values[0] = UUIDPGetDatum(session_id);
	db_set_text(values, nulls, 1, team_id);
	db_set_text(values, nulls, 2, kind);
	db_set_text(values, nulls, 3, old_state);
	db_set_text(values, nulls, 4, new_state);
	db_set_text(values, nulls, 5, reason);
	set_jsonb(values, nulls, 6, detail);
	db_insert(&event_insert, values, nulls);
}

void
session_event_add(const SessionRow *row, const char *kind, const char *reason, Jsonb *detail)
{
	event_add(&row->session_id, row->team_id, kind, NULL, NULL, reason, detail);
}

ProviderSession *
session_row_for_provider(const SessionRow *row)
{
	ProviderSession *session = palloc0(sizeof(ProviderSession));

	session->session_id = row->id_text;
	session->team_id = row->team_id;
	session->agent_id = row->agent_id;
	session->cluster = row->cluster;
	session->vm_id = row->vm_id;
	session->region = row->region;
	session->address = row->address;
	session->purchase = row->purchase;
	session->attempt = row->attempt;
	session->vcpus = row->vcpus;
	session->memory_mib = row->memory_mib;
	session->disk_gib = row->disk_gib;
	session->runtime = row->runtime;
	session->warm = row->warm;
	session->boot_key_id = row->key_id;
	session->created_at = row->created_at;
	session->launched_at = row->launched_at;
	session->ready_at = row->ready_at;
	session->deadline_at = row->deadline_at;
	session->ceiling_at = row->ceiling_at;
	return session;
}
