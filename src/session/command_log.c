/*-------------------------------------------------------------------------
 *
 * command_log.c
 *		What the gateway calls for commands: who has the channel, tickets' key, the log.
 *
 * No row of agentvm.session is locked here: a gateway has one connection for all
 * its VMs, and somebody may hold such a row for as long as he likes.  So a session
 * may end beside a command_started() that has just found it ready; what that leaves
 * in agentvm.command is taken by the next sweep.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/command_row.h"
#include "engine/session_row.h"
#include "engine/state.h"
#include "engine/wake.h"
#include "funcapi.h"
#include "providers/provider.h"
#include "secret/secret.h"
#include "session/session.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_attach);
PG_FUNCTION_INFO_V1(agentvm_control_key);
PG_FUNCTION_INFO_V1(agentvm_command_started);
PG_FUNCTION_INFO_V1(agentvm_command_ended);

#define MAX_ATTACHED 10000 /* sessions in one call */

/* In one order, that of the ids, as heartbeats are. */
static DbQuery attach_query = {
	"WITH b AS MATERIALIZED (SELECT session_id FROM agentvm.session_heartbeat "
	"WHERE session_id = ANY ($1) AND gateway_id IS DISTINCT FROM "
	"current_setting('application_name') ORDER BY session_id FOR UPDATE) "
	"UPDATE agentvm.session_heartbeat h SET gateway_id = current_setting('application_name') "
	"FROM b WHERE h.session_id = b.session_id RETURNING h.session_id",
	1,
	{UUIDARRAYOID}};

static const char *const attach_without[] = {"enable_seqscan", "enable_hashjoin",
											 "enable_mergejoin", "jit"};

static DbQuery registered_query = {
	"SELECT current_setting('application_name'), EXISTS (SELECT FROM agentvm.gateway "
	"WHERE gateway_id = current_setting('application_name'))",
	0,
	{0}};

static DbQuery state_query = {
	"SELECT state, team_id FROM agentvm.session WHERE session_id = $1", 1, {UUIDOID}};

static DbQuery begin_query = {
	"INSERT INTO agentvm.command (command_id, session_id, team_id, kind, role) "
	"VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
	5,
	{UUIDOID, UUIDOID, TEXTOID, TEXTOID, NAMEOID}};

static DbQuery logged_query = {
	"SELECT FROM agentvm.session_event WHERE session_id = $1 AND kind = $2 "
	"AND detail ->> 'command' = $3 LIMIT 1",
	3,
	{UUIDOID, TEXTOID, TEXTOID}};

static DbQuery end_query = {
	"DELETE FROM agentvm.command c WHERE command_id = $1 AND session_id = $2 "
	"RETURNING " COMMAND_ENDED,
	2,
	{UUIDOID, UUIDOID}};

Datum
agentvm_attach(PG_FUNCTION_ARGS)
{
	ArrayType *ids;
	DbScope scope;
	Datum values[1];
	int count;
	uint64 i;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("session_ids must not be null")));
	ids = PG_GETARG_ARRAYTYPE_P(0);
	count = ArrayGetNItems(ARR_NDIM(ids), ARR_DIMS(ids));
	if (count > MAX_ATTACHED)
		ereport(ERROR,
				(errcode(AVM_OVER_LIMIT), errmsg("%d sessions in one call are too many", count),
				 errdetail("At most %d are taken.", MAX_ATTACHED)));
	db_enter(&scope);
	db_plan_without(attach_without, lengthof(attach_without));
	values[0] = PointerGetDatum(ids);
	db_run(&attach_query, values, NULL);
	for (i = 0; i < SPI_processed; i++)
	{
		bool isnull;

		wake_waiters(DatumGetUUIDP(db_value(i, 1, &isnull)));
	}
	db_leave(&scope);
	PG_RETURN_VOID();
}

Datum
agentvm_control_key(PG_FUNCTION_ARGS)
{
	TupleDesc desc;
	HeapTuple tuple;
	DbScope scope;
	MemoryContext caller = CurrentMemoryContext;
	char *gateway_id;
	char *key_id;
	Secret *key;
	bytea *bytes;
	Datum values[2];
	bool nulls[2] = {false, false};
	bool isnull;

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "control_key() must return a row");
	db_enter(&scope);
	db_run(&registered_query, NULL, NULL);
	gateway_id = db_text(0, 1, caller);
	if (!DatumGetBool(db_value(0, 2, &isnull)))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("gateway \"%s\" is not registered", gateway_id),
				 errhint("INSERT INTO agentvm.gateway (gateway_id) VALUES ('%s').", gateway_id)));
	db_leave(&scope);
	key_id = PG_ARGISNULL(0) ? keyring_current_id() : text_to_cstring(PG_GETARG_TEXT_PP(0));
	key = keyring_control_key(key_id, gateway_id);
	bytes = (bytea *) palloc(VARHDRSZ + secret_len(key));
	SET_VARSIZE(bytes, VARHDRSZ + secret_len(key));
	memcpy(VARDATA(bytes), secret_bytes(key), secret_len(key));
	values[0] = CStringGetTextDatum(key_id);
	values[1] = PointerGetDatum(bytes);
	tuple = heap_form_tuple(desc, values, nulls);
	secret_wipe(VARDATA(bytes), secret_len(key));
	secret_wipe_later(tuple->t_data, tuple->t_len);
	PG_RETURN_DATUM(HeapTupleGetDatum(tuple));
}

/* A uuid argument; raises 22004. */
static pg_uuid_t *
command_id_argument(FunctionCallInfo fcinfo)
{
	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("command_id must not be null")));
	return PG_GETARG_UUID_P(1);
}

static Jsonb *
detail_argument(FunctionCallInfo fcinfo, int argument)
{
	Jsonb *detail;

	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("detail must not be null")));
	detail = PG_GETARG_JSONB_P(argument);
	check_document(detail, 'o', "detail");
	return detail;
}

static char *
uuid_text(const pg_uuid_t *id)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)));
}

/* The team of a session that is ready; raises AV005, AV006 or AV007. */
static char *
team_of_ready(const pg_uuid_t *id)
{
	Datum values[1] = {UUIDPGetDatum(id)};
	SessionState state;

	db_run(&state_query, values, NULL);
	if (SPI_processed == 0)
		ereport(ERROR,
				(errcode(AVM_NO_SUCH_SESSION), errmsg("session %s does not exist", uuid_text(id))));
	state = state_parse(db_text(0, 1, CurrentMemoryContext));
	if (state == STATE_TERMINATING || state_is_ended(state))
		ereport(ERROR, (errcode(AVM_SESSION_ENDED), errmsg("session %s has ended", uuid_text(id))));
	if (state != STATE_READY)
		ereport(ERROR, (errcode(AVM_NOT_READY),
						errmsg("session %s is %s, not ready", uuid_text(id), state_name(state))));
	return db_text(0, 2, CurrentMemoryContext);
}

Datum
agentvm_command_started(PG_FUNCTION_ARGS)
{
	pg_uuid_t *session_id = session_id_argument(fcinfo, 0);
	pg_uuid_t *command_id = command_id_argument(fcinfo);
	Jsonb *detail = detail_argument(fcinfo, 3);
	char *role = option_text(detail, "role");
	char *kind;
	char *team_id;
	char *event;
	DbScope scope;
	Datum values[5];
	bool is_new;

	if (PG_ARGISNULL(2))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("kind must not be null")));
	kind = text_to_cstring(PG_GETARG_TEXT_PP(2));
	if (strcmp(kind, "exec") != 0 && strcmp(kind, "upload") != 0 && strcmp(kind, "download") != 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("kind must be exec, upload or download")));
	if (role == NULL || role[0] == '\0' || strlen(role) >= NAMEDATALEN)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("detail must tell the role, in at most %d bytes", NAMEDATALEN - 1)));

	db_enter(&scope);
	team_id = team_of_ready(session_id);
	event = psprintf("%s_started", kind);
	/* who asks again may do so after the end, when the row is gone */
	if (option_bool(detail, "repeated", false))
	{
		values[0] = UUIDPGetDatum(session_id);
		values[1] = CStringGetTextDatum(event);
		values[2] = CStringGetTextDatum(uuid_text(command_id));
		db_run(&logged_query, values, NULL);
		if (SPI_processed > 0)
		{
			db_leave(&scope);
			PG_RETURN_BOOL(false);
		}
	}
	values[0] = UUIDPGetDatum(command_id);
	values[1] = UUIDPGetDatum(session_id);
	values[2] = CStringGetTextDatum(team_id);
	values[3] = CStringGetTextDatum(kind);
	values[4] = DirectFunctionCall1(namein, CStringGetDatum(role));
	db_run(&begin_query, values, NULL);
	is_new = SPI_processed > 0;
	if (is_new)
		event_add(session_id, team_id, event, NULL, NULL, NULL,
				  handle_set_text(detail, "command", uuid_text(command_id)));
	db_leave(&scope);
	PG_RETURN_BOOL(is_new);
}

Datum
agentvm_command_ended(PG_FUNCTION_ARGS)
{
	pg_uuid_t *session_id = session_id_argument(fcinfo, 0);
	pg_uuid_t *command_id = command_id_argument(fcinfo);
	Jsonb *detail = detail_argument(fcinfo, 2);
	Datum values[2] = {UUIDPGetDatum(command_id), UUIDPGetDatum(session_id)};
	DbScope scope;
	bool was_under_way;

	db_enter(&scope);
	db_run(&end_query, values, NULL);
	was_under_way = commands_log_ends(detail, true) > 0;
	db_leave(&scope);
	PG_RETURN_BOOL(was_under_way);
}
