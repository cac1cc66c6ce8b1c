/*-------------------------------------------------------------------------
 *
 * commands.c
 *		Commands in VMs: one in one VM, or the same in many at once.
 *
 * A command is a task, which goes from answer to answer: start (with the first of the
 * input), the rest of the input, waiting for the end, and fetching what output there is
 * beyond the first chunk.  The runtime ends a command whose time is up; we wait somewhat
 * longer.
 *
 * While a task is under way the command in the VM hangs on us: it is killed when
 * the connection that has asked for it last is closed, and when nobody has asked for too
 * long.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <sys/resource.h>

#include "agentvm.h"
#include "db.h"
#include "lib/ilist.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "protocol.h"
#include "secret/secret.h"
#include "session/commands.h"
#include "session/session.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#define LEASE_MS 30000	   /* a command that nobody has asked for so long is killed */
#define LATE_MS 30000	   /* beyond its own timeout: by then the runtime has killed it */
#define ROOM_WAIT_MS 5000  /* for a command to read some of its input */
#define FULL_WAIT_MS 200   /* before more input for a command that takes none */
#define MAX_UNDER_WAY 1000 /* commands at once, and so connections */
#define OTHER_FILES 300	   /* descriptors that are not for connections */
#define MIN_UNDER_WAY 16
#define MAX_COLLECTING 8		 /* tasks that fetch large output at once: it is in our memory */
#define MAX_LOGGED_TEXT 32768	 /* bytes of a command's text in the log, as JSON */
#define FIRST_ROOM (1024 * 1024) /* bytes of output for which there is room at once */

typedef enum TaskPhase
{
	TASK_NEW,
	TASK_STARTING,
	TASK_FEEDING,	 /* more input is under way */
	TASK_FULL,		 /* it took none of it: waiting before the next try */
	TASK_WAITING,	 /* for its end */
	TASK_QUEUED,	 /* has ended; there is more output than one answer had room for */
	TASK_COLLECTING, /* which is being fetched */
	TASK_ENDED
} TaskPhase;

typedef struct Task
{
	dlist_node node;
	Exec *exec;
	MemoryContext context;
	pg_uuid_t session;
	pg_uuid_t command;
	bool begun_before; /* by exec_start(): it does not hang on us */
	Call *call;
	TaskPhase phase;
	StringInfoData header; /* of the message under way */
	int64 taken;		   /* bytes of the input */
	int64 give_up_at;	   /* of call_now_ms() */
	int64 offsets[2];	   /* bytes of stdout and stderr that we have seen */
	CallFailure own_failure;
	ExecResult result;
} Task;

struct Exec
{
	MemoryContext context;
	const ExecCommand *command;
	Calls *calls;
	dlist_head waiting; /* of Task: TASK_NEW, TASK_QUEUED */
	dlist_head ended;	/* TASK_ENDED, not yet returned */
	int under_way;
	int max_under_way;
	int collecting;
	int tasks;		/* not yet returned */
	Task *returned; /* by the last exec_finished() */
};

static const char *const stream_names[] = {"stdout", "stderr"};

/* ---- what is to be run ---- */

void
exec_set_text(ExecCommand *command, const char *text)
{
	int len = strlen(text);
	const char *utf8 = pg_server_to_any(text, len, PG_UTF8);

	if (utf8 != text)
		len = strlen(utf8);
	if (len == 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("argument \"command\" must not be empty")));
	if (len > PROTOCOL_MAX_COMMAND)
		ereport(ERROR, (errcode(AVM_OVER_LIMIT),
						errmsg("argument \"command\" has %d bytes, but a VM takes at most %d", len,
							   PROTOCOL_MAX_COMMAND),
						errhint("Hand a longer script in as stdin, or upload() it first.")));
	command->text = utf8;
	command->len = len;
}

/* The strings in an environment. */
static SecretSet *
secrets_of(Jsonb *env)
{
	SecretSet *set = secret_set_make();
	JsonbIterator *it = JsonbIteratorInit(&env->root);
	JsonbIteratorToken token;
	JsonbValue v;

	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		if (token == WJB_VALUE && v.type == jbvString)
			secret_set_add(set, "", secret_make(v.val.string.val, v.val.string.len));
	}
	return set;
}

/* Append the text as JSON as far as there is room for it in the log; false: it was cut. */
static bool
append_logged_text(StringInfo audit, const char *text)
{
	StringInfoData json;
	int len = strlen(text);
	bool whole = true;

	initStringInfo(&json);
	escape_json(&json, text);
	while (json.len > MAX_LOGGED_TEXT)
	{
		whole = false;
		len = pg_mbcliplen(text, len, len / 2);
		resetStringInfo(&json);
		escape_json(&json, pnstrdup(text, len));
	}
	appendStringInfo(audit, ", \"text\": %s", json.data);
	return whole;
}

char *
exec_audit(Oid role, const ExecCommand *command, const char *text, Jsonb *secrets)
{
	uint8 digest[SHA256_LEN];
	char hex[2 * SHA256_LEN + 1];
	StringInfoData audit;

	initStringInfo(&audit);
	appendStringInfoString(&audit, "{\"kind\": \"exec\"");
	header_text(&audit, "role", GetUserNameFromId(role, false));
	sha256_bytes(command->text, command->len, digest);
	hex_encode((char *) digest, SHA256_LEN, hex);
	hex[2 * SHA256_LEN] = '\0';
	header_text(&audit, "sha256", hex);
	header_int(&audit, "bytes", command->len);
	if (avm_log_commands)
	{
		char *shown = secrets ? secret_redact(secrets_of(secrets), text) : pstrdup(text);

		if (!append_logged_text(&audit, shown))
			header_json(&audit, "text_cut", "true");
	}
	appendStringInfoChar(&audit, '}');
	return audit.data;
}

/* ---- messages ---- */

static void
begin_header(Task *task, const char *op)
{
	if (task->header.data == NULL)
		initStringInfo(&task->header);
	resetStringInfo(&task->header);
	header_begin(&task->header, op, &task->command);
	if (!task->begun_before && !task->exec->command->detached)
		header_json(&task->header, "owned", "true");
}

static void
send_to(Task *task, const char *bytes, size_t len, int wait_ms, TaskPhase phase)
{
	CallMessage message = {task->command, &task->header, bytes, len, wait_ms};

	message.tells_age = message.begins = phase == TASK_STARTING;
	message.much_comes = phase == TASK_COLLECTING;
	task->phase = phase;
	call_send(task->call, &message);
}

static int64
wait_for(const Task *task)
{
	return Max(0, Min(PROTOCOL_MAX_WAIT_MS, task->give_up_at - call_now_ms()));
}

static void
send_start(Task *task)
{
	const ExecCommand *command = task->exec->command;
	int64 input_len = command->input ? command->input->len : 0;
	int64 first = Min(input_len, PROTOCOL_MAX_PART - (int64) command->len);
	const char *bytes = command->text;
	StringInfo header = &task->header;

	/* room for all of it, so that no copy of what may be secret is left behind */
	initStringInfo(header);
	enlargeStringInfo(header, command->env_len + 1024);
	begin_header(task, "start");
	if (command->env != NULL)
		header_json(header, "env", command->env);
	if (command->tar != NULL)
		header_json(header, "tar", command->tar);
	header_int(header, "command_len", command->len);
	header_int(header, "input_len", input_len);
	header_text(header, "cwd", command->cwd);
	header_int(header, "timeout_ms", command->timeout_ms);
	header_int(header, "max_output", avm_max_output_kib * INT64CONST(1024));
	header_int(header, "lease_ms", command->detached ? 0 : LEASE_MS);
	header_json(header, "audit", command->audit);
	secret_wipe_later(header->data, header->maxlen);

	if (first > 0)
	{
		char *joined = palloc(command->len + first);

		if (command->len > 0)
			memcpy(joined, command->text, command->len);
		memcpy(joined + command->len, content_read(command->input, 0, first), first);
		bytes = joined;
	}
	task->taken = first;
	task->give_up_at = call_now_ms() + command->timeout_ms + LATE_MS;
	send_to(task, bytes, command->len + first,
			first < input_len || command->detached ? 0 : wait_for(task), TASK_STARTING);
}

static void
send_input(Task *task)
{
	const Content *input = task->exec->command->input;
	int64 len = Min(input->len - task->taken, PROTOCOL_MAX_PART);

	begin_header(task, "input");
	header_int(&task->header, "offset", task->taken);
	send_to(task, content_read(input, task->taken, len), len, ROOM_WAIT_MS, TASK_FEEDING);
}

static void
send_output(Task *task, int64 wait_ms, TaskPhase phase)
{
	int i;

	begin_header(task, "output");
	for (i = 0; i < lengthof(task->offsets); i++)
		header_int(&task->header, stream_names[i], task->offsets[i]);
	send_to(task, NULL, 0, wait_ms, phase);
}

/* ---- from answer to answer ---- */

static void
end_task(Task *task, const CallFailure *failure)
{
	task->result.failure = failure;
	task->phase = TASK_ENDED;
	dlist_push_tail(&task->exec->ended, &task->node);
}

static void
fail_task(Task *task, int sqlstate, const char *message, const char *hint)
{
	task->own_failure.sqlstate = sqlstate;
	task->own_failure.message = pstrdup(message);
	task->own_failure.hint = hint ? pstrdup(hint) : NULL;
	end_task(task, &task->own_failure);
}

/* It has not ended, and nobody waits for it any longer. */
static void
time_is_up(Task *task)
{
	if (task->begun_before)
		fail_task(task, AVM_TIMED_OUT,
				  psprintf("command %s did not end within %lld s", session_text(&task->command),
						   (long long) task->exec->command->timeout_ms / 1000),
				  "It goes on by itself; see agentvm.exec_output().");
	else
		fail_task(task, AVM_UNREACHABLE,
				  psprintf("outcome unknown: the runtime of session %s has not ended the command "
						   "in time",
						   session_text(&task->session)),
				  "The command may be running.");
}

/*
 * Take the bytes of an answer; false where nothing has come though there should be
 * more.  *more: there is.
 */
static bool
take_output(Task *task, const Answer *answer, bool *more)
{
	int64 max_output = avm_max_output_kib * INT64CONST(1024);
	const char *bytes = answer->bytes;
	bool progress = false;
	int i;

	*more = false;
	for (i = 0; i < lengthof(answer->streams); i++)
	{
		const AnswerStream *stream = &answer->streams[i];
		StringInfo kept = &task->result.streams[i];
		int64 from = stream->len > 0 ? stream->from : Max(stream->from, task->offsets[i]);
		int64 room = max_output - kept->len;

		if (from < task->offsets[i])
			return false;
		if (from > task->offsets[i] || stream->lost > 0 || stream->len > room)
			task->result.truncated = true;
		progress = progress || from > task->offsets[i] || stream->len > 0;
		if (kept->data == NULL)
		{
			initStringInfo(kept);
			enlargeStringInfo(
				kept, Max(stream->len, Min(FIRST_ROOM, Max(stream->total - stream->lost, 0))));
		}
		appendBinaryStringInfo(kept, bytes, Min(stream->len, room));
		bytes += stream->len;
		task->offsets[i] = from + stream->len;
		/* more than was to be kept: the rest is not asked for */
		if (stream->len > room)
			task->offsets[i] = stream->total;
		*more = *more || task->offsets[i] < stream->total;
	}
	return progress || !*more;
}

static void
take_end(Task *task, const Answer *answer)
{
	Exec *exec = task->exec;
	bool more;

	if (!take_output(task, answer, &more))
	{
		call_protest(task->call);
		end_task(task, call_failure(task->call));
		return;
	}
	if (answer->killed == 1 && !task->begun_before && call_broke(task->call))
	{
		fail_task(task, AVM_UNREACHABLE,
				  "command was killed, since the connection to the gateway broke", NULL);
		return;
	}
	task->result.exit_code = (int) answer->exit_code;
	task->result.duration_ms = answer->duration_ms;
	task->result.timed_out = answer->timed_out == 1;
	if (!more)
		end_task(task, NULL);
	else if (task->phase == TASK_COLLECTING)
		send_output(task, 0, TASK_COLLECTING);
	else
	{
		task->phase = TASK_QUEUED;
		dlist_push_head(&exec->waiting, &task->node);
	}
}

/* An answer tells that the command goes on. */
static void
go_on(Task *task)
{
	const ExecCommand *command = task->exec->command;

	bool all_taken = command->input == NULL || task->taken >= command->input->len;

	if (command->detached && all_taken)
		end_task(task, NULL);
	else if (call_now_ms() >= task->give_up_at)
		time_is_up(task);
	else if (!all_taken)
		send_input(task);
	else
		send_output(task, wait_for(task), TASK_WAITING);
}

/* The answer to an "input". */
static void
take_taken(Task *task, const Answer *answer)
{
	int64 before = task->taken;

	if (answer->taken < before || answer->taken > task->exec->command->input->len)
	{
		call_protest(task->call);
		end_task(task, call_failure(task->call));
		return;
	}
	task->taken = answer->taken;
	/* it does not read now; or it has ended, and never will */
	if (task->taken == before)
		send_output(task, FULL_WAIT_MS, TASK_FULL);
	else
		go_on(task);
}

/* What has come of a task's message leads to the next one. */
static void
take_step(Task *task)
{
	const CallFailure *failure = call_failure(task->call);
	const Answer *answer = call_answer(task->call);
	MemoryContext old = MemoryContextSwitchTo(task->context);

	if (failure != NULL && task->phase == TASK_FEEDING &&
		(failure->sqlstate == ERRCODE_UNDEFINED_OBJECT ||
		 failure->sqlstate == ERRCODE_INVALID_PARAMETER_VALUE))
	{
		/* an ended command takes no input */
		task->taken = task->exec->command->input->len;
		send_output(task, 0, TASK_WAITING);
	}
	else if (failure != NULL)
		end_task(task, failure);
	else if (task->phase == TASK_FEEDING)
		take_taken(task, answer);
	else if (!answer_is_output(answer))
	{
		call_protest(task->call);
		end_task(task, call_failure(task->call));
	}
	else
	{
		if (task->phase == TASK_STARTING && !task->exec->command->detached)
			call_outcome_matters(task->call);
		if (answer->running == 1)
			go_on(task);
		else if (task->exec->command->detached)
			end_task(task, NULL);
		else
			take_end(task, answer);
	}
	MemoryContextSwitchTo(old);
}

/* ---- all of them ---- */

/* How many connections there is room for, beside the files that the server opens. */
static int
most_under_way(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur < OTHER_FILES + MIN_UNDER_WAY)
		return MIN_UNDER_WAY;
	return Min(limit.rlim_cur - OTHER_FILES, MAX_UNDER_WAY);
}

Exec *
exec_create(Oid role, const ExecCommand *command)
{
	MemoryContext context =
		AllocSetContextCreate(CurrentMemoryContext, "agentvm commands", ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	Exec *exec = palloc0(sizeof(Exec));

	exec->context = context;
	exec->command = command;
	dlist_init(&exec->waiting);
	dlist_init(&exec->ended);
	exec->max_under_way = most_under_way();
	exec->calls = calls_create(role);
	MemoryContextSwitchTo(old);
	return exec;
}

void
exec_destroy(Exec *exec)
{
	MemoryContextDelete(exec->context);
}

static Task *
add_task(Exec *exec, const pg_uuid_t *session)
{
	MemoryContext context =
		AllocSetContextCreate(exec->context, "agentvm command", ALLOCSET_SMALL_SIZES);
	Task *task = MemoryContextAllocZero(context, sizeof(Task));

	task->exec = exec;
	task->context = context;
	if (session != NULL)
	{
		task->session = *session;
		task->result.session = &task->session;
		task->call = call_create(exec->calls, session,
								 exec->command->tar ? "pack or unpack files" : "run a command",
								 exec->command->timeout_ms, task);
	}
	exec->tasks++;
	return task;
}

void
exec_add(Exec *exec, const pg_uuid_t *session, pg_uuid_t *command_id)
{
	Task *task = add_task(exec, session);
	MemoryContext old = MemoryContextSwitchTo(task->context);

	session_make_id(&task->command, GetCurrentTimestamp());
	if (command_id != NULL)
		*command_id = task->command;
	if (session == NULL)
		fail_task(task, ERRCODE_NULL_VALUE_NOT_ALLOWED, "session_id must not be null", NULL);
	else
		dlist_push_tail(&exec->waiting, &task->node);
	MemoryContextSwitchTo(old);
}

void
exec_add_begun(Exec *exec, const pg_uuid_t *session, const pg_uuid_t *command_id)
{
	Task *task = add_task(exec, session);

	task->command = *command_id;
	task->begun_before = true;
	task->give_up_at = call_now_ms() + exec->command->timeout_ms;
	dlist_push_tail(&exec->waiting, &task->node);
}

/* Begin what there is room for. */
static void
begin_waiting(Exec *exec)
{
	dlist_mutable_iter i;

	dlist_foreach_modify(i, &exec->waiting)
	{
		Task *task = dlist_container(Task, node, i.cur);
		MemoryContext old;

		if (task->phase == TASK_NEW ? exec->under_way >= exec->max_under_way
									: exec->collecting >= MAX_COLLECTING)
			continue;
		dlist_delete(&task->node);
		old = MemoryContextSwitchTo(task->context);
		if (task->phase == TASK_QUEUED)
		{
			exec->collecting++;
			send_output(task, 0, TASK_COLLECTING);
		}
		else
		{
			exec->under_way++;
			if (task->begun_before)
				send_output(task, wait_for(task), TASK_WAITING);
			else
				send_start(task);
		}
		MemoryContextSwitchTo(old);
	}
}

void
exec_advance(Exec *exec)
{
	Call *call;

	begin_waiting(exec);
	calls_advance(exec->calls);
	while ((call = calls_answered(exec->calls)) != NULL)
	{
		Task *task = call_arg(call);
		bool collected = task->phase == TASK_COLLECTING;

		take_step(task);
		if (task->phase == TASK_QUEUED || task->phase == TASK_ENDED)
		{
			if (collected)
				exec->collecting--;
			else
				exec->under_way--;
		}
	}
	begin_waiting(exec);
	calls_advance(exec->calls);
}

ExecResult *
exec_finished(Exec *exec, bool *all_done)
{
	if (exec->returned != NULL)
	{
		if (exec->returned->call != NULL)
			call_destroy(exec->returned->call);
		MemoryContextDelete(exec->returned->context);
		exec->returned = NULL;
	}
	*all_done = exec->tasks == 0;
	if (dlist_is_empty(&exec->ended))
		return NULL;
	exec->returned = dlist_container(Task, node, dlist_pop_head_node(&exec->ended));
	exec->tasks--;
	return &exec->returned->result;
}

void
exec_sleep(Exec *exec)
{
	if (dlist_is_empty(&exec->ended))
		calls_sleep(exec->calls, PG_INT64_MAX);
}

ExecResult *
exec_next(Exec *exec)
{
	MemoryContext old = MemoryContextSwitchTo(exec->context);
	ExecResult *result;
	bool all_done;

	while ((result = exec_finished(exec, &all_done)) == NULL && !all_done)
	{
		exec_advance(exec);
		exec_sleep(exec);
	}
	MemoryContextSwitchTo(old);
	return result;
}
