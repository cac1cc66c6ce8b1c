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
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#define ROW_COLUMNS                                                                                \
	"s.session_id, s.team_id, s.agent_id, s.provider, s.created_at, s.deadline_at, s.ceiling_at, " \
	"s.options, s.vcpus, s.memory_mib, s.disk_gib, s.runtime, "                                    \
	"(extract(epoch FROM s.bootstrap_timeout) * 1000000)::int8, s.key_id, "                        \
	"(SELECT installation_id FROM agentvm.installation ORDER BY in_use DESC, created_at LIMIT "    \
	"1), s.lane, "                                                                                 \
	"s.state, s.end_reason, s.detail, s.vm_id, s.region, s.address, s.purchase, s.attempt, "       \
	"s.launched_at, s.ready_at, s.ended_at, s.next_check_at, s.lease, s.retries, s.running, "      \
	"s.handle, s.resumed_at, s.warm_key IS NOT NULL "

/*
 * The engine never waits for a lock of a user.  The candidates come with their
 * ids, so that the primary key finds them.
 */
static DbQuery lock_query = {
	"SELECT " ROW_COLUMNS "FROM agentvm.session s "
	"WHERE s.session_id = ANY ($1) AND ($2 = 'infinity' OR s.next_check_at <= $2) "
	"FOR UPDATE SKIP LOCKED",
	2,
	{UUIDARRAYOID, TIMESTAMPTZOID}};

static DbQuery read_query = {
	"SELECT " ROW_COLUMNS "FROM agentvm.session s WHERE s.session_id = $1", 1, {UUIDOID}};

static DbQuery lease_query = {
	"SELECT lease FROM agentvm.session WHERE session_id = $1", 1, {UUIDOID}};

static DbQuery save_query = {
	"UPDATE agentvm.session SET state = $2, end_reason = $3, detail = $4, vm_id = $5, region = $6, "
	"address = $7, purchase = $8, attempt = $9, launched_at = $10, ready_at = $11, ended_at = $12, "
	"next_check_at = $13, lease = $14, "
	"lease_pid = CASE WHEN $14 IS NOT NULL THEN $15 END, "
	"lease_start = CASE WHEN $14 IS NOT NULL THEN $16 END, "
	"retries = $17, running = $18, resumed_at = $20, "
	/* at the end nothing is kept that only a live VM needs */
	"handle = CASE WHEN $12 IS NULL THEN $19 END, "
	"payload_enc = CASE WHEN $12 IS NULL THEN payload_enc END, "
	"key_id = CASE WHEN $12 IS NULL THEN key_id END, "
	"payload_key_id = CASE WHEN $12 IS NULL THEN payload_key_id END, "
	"final_heartbeat_at = CASE WHEN $12 IS NOT NULL THEN "
	"(SELECT h.last_heartbeat_at FROM agentvm.session_heartbeat h WHERE h.session_id = $1) END "
	"WHERE session_id = $1",
	20,
	{UUIDOID,		 TEXTOID,		 TEXTOID,		 TEXTOID,  TEXTOID,
	 TEXTOID,		 TEXTOID,		 TEXTOID,		 INT4OID,  TIMESTAMPTZOID,
	 TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID,  INT4OID,
	 TIMESTAMPTZOID, INT4OID,		 BOOLOID,		 JSONBOID, TIMESTAMPTZOID},
	/* a plan made for NULLs looks cheaper each time, which costs more than it saves */
	true};

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

static DbInsert event_insert = {
	{"session_event"},
	7,
	{"session_id", "team_id", "kind", "old_state", "new_state", "reason", "detail"}};

static Jsonb *
copy_jsonb(uint64 row, int column, MemoryContext context)
{
	bool isnull;
	Datum value = db_value(row, column, &isnull);
	MemoryContext old;
	Jsonb *copy;

	if (isnull)
		return NULL;
	old = MemoryContextSwitchTo(context);
	copy = (Jsonb *) PG_DETOAST_DATUM_COPY(value);
	MemoryContextSwitchTo(old);
	return copy;
}

static int64
get_int(uint64 row, int column, int size)
{
	bool isnull;
	Datum value = db_value(row, column, &isnull);

	if (isnull)
		return 0;
	switch (size)
	{
		case 1:
			return DatumGetBool(value);
		case 2:
			return DatumGetInt16(value);
		case 4:
			return DatumGetInt32(value);
		default:
			return DatumGetInt64(value);
	}
}

/* Build a SessionRow in "context" from a row of the last result. */
static SessionRow *
row_from_result(uint64 i, MemoryContext context)
{
	SessionRow *row = MemoryContextAllocZero(context, sizeof(SessionRow));
	bool isnull;
	int c = 1;

	memcpy(&row->session_id, DatumGetUUIDP(db_value(i, c, &isnull)), sizeof(pg_uuid_t));
	row->id_text = db_text(i, c++, context);
	row->team_id = db_text(i, c++, context);
	row->agent_id = db_text(i, c++, context);
	row->provider = db_text(i, c++, context);
	row->created_at = get_int(i, c++, 8);
	row->deadline_at = get_int(i, c++, 8);
	row->ceiling_at = get_int(i, c++, 8);
	row->options = copy_jsonb(i, c++, context);
	row->vcpus = get_int(i, c++, 4);
	row->memory_mib = get_int(i, c++, 4);
	row->disk_gib = get_int(i, c++, 4);
	row->runtime = get_int(i, c++, 1);
	row->bootstrap_timeout_us = get_int(i, c++, 8);
	row->key_id = db_text(i, c++, context);
	row->cluster = db_text(i, c++, context);
	row->lane = get_int(i, c++, 2);
	row->state = row->saved_state = state_parse(db_text(i, c++, context));
	row->end_reason = db_text(i, c++, context);
	row->detail = db_text(i, c++, context);
	row->vm_id = db_text(i, c++, context);
	row->region = db_text(i, c++, context);
	row->address = db_text(i, c++, context);
	row->purchase = db_text(i, c++, context);
	row->attempt = get_int(i, c++, 4);
	row->launched_at = get_int(i, c++, 8);
	row->ready_at = get_int(i, c++, 8);
	row->ended_at = get_int(i, c++, 8);
	row->next_check_at = get_int(i, c++, 8);
	row->lease = get_int(i, c++, 8);
	row->retries = get_int(i, c++, 4);
	row->running = get_int(i, c++, 1);
	row->handle = copy_jsonb(i, c++, context);
	row->resumed_at = get_int(i, c++, 8);
	row->warm = get_int(i, c++, 1);
	return row;
}

List *
session_rows_lock(const pg_uuid_t *ids, int count, TimestampTz due_by)
{
	MemoryContext context = CurrentMemoryContext;
	Datum *elements = palloc(sizeof(Datum) * Max(count, 1));
	Datum values[2];
	List *rows = NIL;
	uint64 i;

	for (i = 0; i < count; i++)
		elements[i] = UUIDPGetDatum(&ids[i]);
	values[0] =
		PointerGetDatum(construct_array(elements, count, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
	values[1] = TimestampTzGetDatum(due_by);
	db_run(&lock_query, values, NULL);

	for (i = 0; i < SPI_processed; i++)
	{
		SessionRow *row = row_from_result(i, context);
		MemoryContext old = MemoryContextSwitchTo(context);

		rows = lappend(rows, row);
		MemoryContextSwitchTo(old);
	}
	SPI_freetuptable(SPI_tuptable);
	return rows;
}

SessionRow *
session_row_read(const pg_uuid_t *id)
{
	MemoryContext context = CurrentMemoryContext;
	Datum values[1] = {UUIDPGetDatum(id)};
	SessionRow *row = NULL;

	db_run(&read_query, values, NULL);
	if (SPI_processed > 0)
		row = row_from_result(0, context);
	SPI_freetuptable(SPI_tuptable);
	return row;
}

int64
session_row_lease(const pg_uuid_t *id)
{
	Datum values[1] = {UUIDPGetDatum(id)};
	int64 lease;

	db_run(&lease_query, values, NULL);
	lease = SPI_processed > 0 ? get_int(0, 1, 8) : 0;
	SPI_freetuptable(SPI_tuptable);
	return lease;
}

/* Put a text, time or document into an argument array, NULL where it is absent. */
static void
set_text(Datum *values, char *nulls, int i, const char *text)
{
	nulls[i] = text ? ' ' : 'n';
	values[i] = text ? CStringGetTextDatum(text) : (Datum) 0;
}

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

void
session_row_save(SessionRow *row)
{
	Datum values[20];
	char nulls[20];

	memset(nulls, ' ', sizeof(nulls));
	values[0] = UUIDPGetDatum(&row->session_id);
	set_text(values, nulls, 1, state_name(row->state));
	set_text(values, nulls, 2, row->end_reason);
	set_text(values, nulls, 3, row->detail);
	set_text(values, nulls, 4, row->vm_id);
	set_text(values, nulls, 5, row->region);
	set_text(values, nulls, 6, row->address);
	set_text(values, nulls, 7, row->purchase);
	values[8] = Int32GetDatum(row->attempt);
	set_time(values, nulls, 9, row->launched_at);
	set_time(values, nulls, 10, row->ready_at);
	set_time(values, nulls, 11, row->ended_at);
	set_time(values, nulls, 12, row->next_check_at);
	nulls[13] = row->lease != 0 ? ' ' : 'n';
	values[13] = Int64GetDatum(row->lease);
	values[14] = Int32GetDatum(MyProcPid);
	values[15] = TimestampTzGetDatum(MyStartTimestamp);
	values[16] = Int32GetDatum(row->retries);
	values[17] = BoolGetDatum(row->running);
	set_jsonb(values, nulls, 18, row->handle);
	set_time(values, nulls, 19, row->resumed_at);
	db_run(&save_query, values, nulls);

	if (state_is_ended(row->state) && row->runtime)
	{
		db_run(&unbeat_query, values, NULL);
		if (SPI_processed == 0)
			db_run(&still_beats_query, values, NULL);
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
	set_text(values, nulls, 1, team_id);
	set_text(values, nulls, 2, kind);
	set_text(values, nulls, 3, old_state);
	set_text(values, nulls, 4, new_state);
	set_text(values, nulls, 5, reason);
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
