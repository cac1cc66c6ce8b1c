/*-------------------------------------------------------------------------
 *
 * exec.c
 *		exec() and its kin: what a caller hands in, and what he gets.
 *
 * Those that run or wait return their rows one by one, each as soon as it is there.
 * A target list passes them on like that; in FROM PostgreSQL gathers them first.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "procedure.h"
#include "protocol.h"
#include "secret/secret.h"
#include "session/commands.h"
#include "session/request.h"
#include "session/session.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

PG_FUNCTION_INFO_V1(agentvm_exec);
PG_FUNCTION_INFO_V1(agentvm_exec_bytes);
PG_FUNCTION_INFO_V1(agentvm_exec_start);
PG_FUNCTION_INFO_V1(agentvm_exec_output);
PG_FUNCTION_INFO_V1(agentvm_exec_wait);
PG_FUNCTION_INFO_V1(agentvm_exec_kill);
PG_FUNCTION_INFO_V1(agentvm_exec_many);

#define MAX_SESSIONS 1000 /* of one exec_many() */
#define MAX_CWD 4096	  /* bytes: what Linux takes as a path */

/* The rows of a function, between its calls. */
typedef struct Rows
{
	Exec *exec;
	ExecCommand command;
	Content input;
	bool hidden; /* env may hold secrets */
} Rows;

/* ---- arguments: in the order of exec(), exec_bytes(), exec_start(), exec_many() ---- */

enum
{
	ARG_SESSION,
	ARG_COMMAND,
	ARG_TIMEOUT,
	ARG_CWD,
	ARG_ENV,
	ARG_STDIN
};

static void
no_null(FunctionCallInfo fcinfo, int argument, const char *name)
{
	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("%s must not be null", name)));
}

static bool
has_env(FunctionCallInfo fcinfo)
{
	return !PG_ARGISNULL(ARG_ENV) && JB_ROOT_COUNT(PG_GETARG_JSONB_P(ARG_ENV)) > 0;
}

static char *
cwd_argument(FunctionCallInfo fcinfo)
{
	char *cwd;

	if (PG_ARGISNULL(ARG_CWD))
		return NULL;
	cwd = text_to_cstring(PG_GETARG_TEXT_PP(ARG_CWD));
	if (cwd[0] == '\0' || strlen(cwd) >= MAX_CWD)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("argument \"cwd\" must have 1 to %d bytes", MAX_CWD - 1),
						errdetail("It has %zu.", strlen(cwd))));
	return cwd;
}

/* Read the arguments into *rows, in CurrentMemoryContext, which lives as long. */
static void
read_arguments(FunctionCallInfo fcinfo, Rows *rows)
{
	ExecCommand *command = &rows->command;
	Jsonb *env = NULL;
	char *script;

	no_null(fcinfo, ARG_COMMAND, "command");
	no_null(fcinfo, ARG_TIMEOUT, "timeout");
	script = text_to_cstring(PG_GETARG_TEXT_PP(ARG_COMMAND));
	exec_set_text(command, script);
	command->timeout_ms = check_interval(PG_GETARG_INTERVAL_P(ARG_TIMEOUT), "timeout") * 1000;
	command->cwd = cwd_argument(fcinfo);
	if (!PG_ARGISNULL(ARG_ENV))
	{
		env = PG_GETARG_JSONB_P(ARG_ENV);
		check_document(env, 'o', "env");
		check_env(env);
	}
	if (rows->hidden)
	{
		StringInfoData json;

		initStringInfo(&json);
		(void) JsonbToCString(&json, &env->root, VARSIZE(env));
		secret_wipe_later(json.data, json.len);
		command->env = json.data;
		command->env_len = json.len;
	}
	if (!PG_ARGISNULL(ARG_STDIN))
	{
		content_open(&rows->input, PG_GETARG_DATUM(ARG_STDIN), "stdin");
		command->input = &rows->input;
	}
	command->audit = exec_audit(GetUserId(), command, script, env);
}

/* ---- rows ---- */

typedef enum RowForm
{
	ROW_TEXT,  /* exit_code, stdout, stderr, duration, timed_out, truncated */
	ROW_BYTES, /* the same as bytes */
	ROW_MANY   /* session_id, those, sqlstate, error */
} RowForm;

static Datum
stream_datum(const StringInfoData *stream, RowForm form, bool *truncated)
{
	if (form != ROW_BYTES)
		return PointerGetDatum(text_from_vm(stream->data, stream->len, truncated));
	return PointerGetDatum(cstring_to_text_with_len(stream->data, stream->len));
}

/* A row for a result; failures are raised where the row has no columns for them. */
static HeapTuple
make_row(TupleDesc desc, RowForm form, const ExecResult *result)
{
	Datum values[9];
	bool nulls[9];
	int column = 0;
	const CallFailure *failure = result->failure;
	bool truncated = result->truncated;
	Interval *duration;

	memset(nulls, true, sizeof(nulls));
	if (form == ROW_MANY)
	{
		nulls[0] = result->session == NULL;
		values[column++] = UUIDPGetDatum(result->session);
	}
	else if (failure != NULL)
		call_raise(failure);
	if (failure == NULL)
	{
		memset(nulls + column, false, 6);
		duration = palloc0(sizeof(Interval));
		duration->time = result->duration_ms * 1000;
		values[column++] = Int32GetDatum(result->exit_code);
		values[column++] = stream_datum(&result->streams[0], form, &truncated);
		values[column++] = stream_datum(&result->streams[1], form, &truncated);
		values[column++] = IntervalPGetDatum(duration);
		values[column++] = BoolGetDatum(result->timed_out);
		values[column++] = BoolGetDatum(truncated);
	}
	else
	{
		char *text = failure->detail ? psprintf("%s: %s", failure->message, failure->detail)
									 : failure->message;

		nulls[7] = nulls[8] = false;
		values[7] = CStringGetTextDatum(unpack_sql_state(failure->sqlstate));
		values[8] = CStringGetTextDatum(text);
	}
	return heap_form_tuple(desc, values, nulls);
}

/* In the context of all calls of the function. */
static Rows *
begin_rows(FunctionCallInfo fcinfo, FuncCallContext *context)
{
	Rows *rows = palloc0(sizeof(Rows));
	TupleDesc desc;

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "the function must return rows");
	context->tuple_desc = BlessTupleDesc(desc);
	context->user_fctx = rows;
	return rows;
}

static void
begin_exec(FunctionCallInfo fcinfo, Rows *rows)
{
	read_arguments(fcinfo, rows);
	rows->exec = exec_create(GetUserId(), &rows->command);
	exec_add(rows->exec, session_id_argument(fcinfo, ARG_SESSION), NULL);
}

static void
begin_many(FunctionCallInfo fcinfo, Rows *rows)
{
	ArrayType *array;
	Datum *ids;
	bool *nulls;
	int count;
	int i;

	no_null(fcinfo, ARG_SESSION, "session_ids");
	read_arguments(fcinfo, rows);
	array = PG_GETARG_ARRAYTYPE_P(ARG_SESSION);
	deconstruct_array(array, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR, &ids, &nulls, &count);
	if (count > MAX_SESSIONS)
		ereport(ERROR,
				(errcode(AVM_OVER_LIMIT), errmsg("%d sessions in one call are too many", count),
				 errdetail("At most %d are taken.", MAX_SESSIONS)));
	rows->exec = exec_create(GetUserId(), &rows->command);
	for (i = 0; i < count; i++)
		exec_add(rows->exec, nulls[i] ? NULL : DatumGetUUIDP(ids[i]), NULL);
}

static void
begin_wait(FunctionCallInfo fcinfo, Rows *rows)
{
	pg_uuid_t *session = session_id_argument(fcinfo, 0);

	no_null(fcinfo, 1, "command_id");
	no_null(fcinfo, 2, "timeout");
	rows->command.timeout_ms = check_interval(PG_GETARG_INTERVAL_P(2), "timeout") * 1000;
	rows->exec = exec_create(GetUserId(), &rows->command);
	exec_add_begun(rows->exec, session, PG_GETARG_UUID_P(1));
}

/* The next row; "hide": what the caller said may hold secrets, and shows nowhere. */
static Datum
next_row(FunctionCallInfo fcinfo, RowForm form, void (*begin)(FunctionCallInfo, Rows *),
		 const char *hide)
{
	FuncCallContext *context;
	HiddenCaller hidden;
	const ExecResult *result;
	HeapTuple row = NULL;
	Rows *rows;

	if (SRF_IS_FIRSTCALL())
	{
		MemoryContext old;

		context = SRF_FIRSTCALL_INIT();
		old = MemoryContextSwitchTo(context->multi_call_memory_ctx);
		rows = begin_rows(fcinfo, context);
		rows->hidden = hide != NULL && has_env(fcinfo);
		if (rows->hidden)
		{
			hide_caller_begin(&hidden);
			hide_activity(hide);
		}
		begin(fcinfo, rows);
		MemoryContextSwitchTo(old);
	}
	else
	{
		context = SRF_PERCALL_SETUP();
		rows = context->user_fctx;
		if (rows->hidden)
			hide_caller_begin(&hidden);
	}
	result = exec_next(rows->exec);
	if (result != NULL)
		row = make_row(context->tuple_desc, form, result);
	if (rows->hidden)
		hide_caller_end(&hidden);
	if (row == NULL)
		SRF_RETURN_DONE(context);
	SRF_RETURN_NEXT(context, HeapTupleGetDatum(row));
}

Datum
agentvm_exec(PG_FUNCTION_ARGS)
{
	return next_row(fcinfo, ROW_TEXT, begin_exec, "agentvm.exec()");
}

Datum
agentvm_exec_bytes(PG_FUNCTION_ARGS)
{
	return next_row(fcinfo, ROW_BYTES, begin_exec, "agentvm.exec_bytes()");
}

Datum
agentvm_exec_many(PG_FUNCTION_ARGS)
{
	return next_row(fcinfo, ROW_MANY, begin_many, "agentvm.exec_many()");
}

Datum
agentvm_exec_wait(PG_FUNCTION_ARGS)
{
	return next_row(fcinfo, ROW_TEXT, begin_wait, NULL);
}

/* ---- commands that outlive the statement ---- */

Datum
agentvm_exec_start(PG_FUNCTION_ARGS)
{
	pg_uuid_t *id = palloc(sizeof(pg_uuid_t));
	Rows rows = {0};
	HiddenCaller hidden;
	const ExecResult *result;

	rows.hidden = has_env(fcinfo);
	if (rows.hidden)
	{
		hide_caller_begin(&hidden);
		hide_activity("agentvm.exec_start()");
	}
	rows.command.detached = true;
	read_arguments(fcinfo, &rows);
	rows.exec = exec_create(GetUserId(), &rows.command);
	exec_add(rows.exec, session_id_argument(fcinfo, ARG_SESSION), id);
	result = exec_next(rows.exec);
	if (result->failure != NULL)
		call_raise(result->failure);
	exec_destroy(rows.exec);
	if (rows.hidden)
		hide_caller_end(&hidden);
	PG_RETURN_UUID_P(id);
}

/* Ask how a command stands, and for what it has said after the offsets. */
static const Answer *
ask_output(Call *call, const pg_uuid_t *command, int64 stdout_after, int64 stderr_after)
{
	CallMessage message = {*command};
	const Answer *answer;
	StringInfoData header;

	initStringInfo(&header);
	header_begin(&header, "output", command);
	header_int(&header, "stdout", stdout_after);
	header_int(&header, "stderr", stderr_after);
	header_json(&header, "part", "true");
	message.header = &header;
	answer = call_ask(call, &message);
	if (!answer_is_output(answer))
	{
		call_protest(call);
		call_raise(call_failure(call));
	}
	return answer;
}

static int64
offset_argument(FunctionCallInfo fcinfo, int argument, const char *name)
{
	int64 offset;

	no_null(fcinfo, argument, name);
	offset = PG_GETARG_INT64(argument);
	if (offset < 0 || offset > MAX_OFFSET)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("%s must be an offset that the call before has returned", name),
						errdetail("It is %lld.", (long long) offset)));
	return offset;
}

Datum
agentvm_exec_output(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	pg_uuid_t *session = session_id_argument(fcinfo, 0);
	int64 after[2];
	Calls *calls;
	const Answer *answer;
	const char *bytes;
	Datum values[8];
	bool nulls[8] = {false};
	bool truncated = false;
	int i;

	no_null(fcinfo, 1, "command_id");
	after[0] = offset_argument(fcinfo, 2, "stdout_after");
	after[1] = offset_argument(fcinfo, 3, "stderr_after");
	begin_set(fcinfo);
	calls = calls_create(GetUserId());
	answer =
		ask_output(call_create(calls, session, "read the output of a command", PG_INT64_MAX, NULL),
				   PG_GETARG_UUID_P(1), after[0], after[1]);
	bytes = answer->bytes;
	for (i = 0; i < lengthof(after); i++)
	{
		const AnswerStream *stream = &answer->streams[i];
		int64 next = stream->len > 0 ? stream->from : Max(after[i], stream->from);
		int64 len = stream->len;

		truncated = truncated || next > after[i];
		/* the rest of a character that is cut off comes with the next chunk */
		if (answer->running == 1 || next + len < stream->total)
		{
			size_t unfinished = utf8_unfinished(bytes, len);

			if (answer->running == 1 || unfinished < len)
				len -= unfinished;
		}
		values[2 + i] = PointerGetDatum(text_from_vm(bytes, len, NULL));
		values[4 + i] = Int64GetDatum(next + len);
		bytes += stream->len;
	}
	values[0] = BoolGetDatum(answer->running == 1);
	nulls[1] = answer->running == 1;
	values[1] = Int32GetDatum(nulls[1] ? 0 : (int32) answer->exit_code);
	values[6] = BoolGetDatum(answer->timed_out == 1);
	values[7] = BoolGetDatum(truncated);
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	calls_destroy(calls);
	return (Datum) 0;
}

/* 15 or 9, of a name with or without SIG, in any case. */
static int
signal_argument(FunctionCallInfo fcinfo)
{
	char *name;
	const char *bare;

	no_null(fcinfo, 2, "signal");
	name = text_to_cstring(PG_GETARG_TEXT_PP(2));
	bare = pg_strncasecmp(name, "SIG", 3) == 0 ? name + 3 : name;
	if (pg_strcasecmp(bare, "TERM") == 0)
		return 15;
	if (pg_strcasecmp(bare, "KILL") == 0)
		return 9;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("cannot send signal \"%s\"", name),
			 errhint("Known signals are TERM and KILL.")));
}

Datum
agentvm_exec_kill(PG_FUNCTION_ARGS)
{
	pg_uuid_t *session = session_id_argument(fcinfo, 0);
	pg_uuid_t *command;
	CallMessage message = {{{0}}};
	StringInfoData header;
	bool running;
	Calls *calls;
	Call *call;
	int number;

	no_null(fcinfo, 1, "command_id");
	command = PG_GETARG_UUID_P(1);
	number = signal_argument(fcinfo);
	calls = calls_create(GetUserId());
	call = call_create(calls, session, "send a signal to a command", PG_INT64_MAX, NULL);
	running = ask_output(call, command, 0, 0)->running == 1;
	if (running)
	{
		initStringInfo(&header);
		header_begin(&header, "kill", command);
		header_int(&header, "signal", number);
		message.command = *command;
		message.header = &header;
		message.wait_ms = -1;
		(void) call_ask(call, &message);
	}
	calls_destroy(calls);
	PG_RETURN_BOOL(running);
}
