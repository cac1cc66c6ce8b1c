/*-------------------------------------------------------------------------
 *
 * calls.c
 *		Calls under way: from a control connection down a channel, and the answers back.
 *
 * What is to be logged is committed before a call is passed on.  The end of a
 * command, which its runtime tells, is written as soon as the database is there,
 * and only then is the runtime told that it may forget it.
 *
 * A call whose client has gone, or whose time is up, stays as a record of its
 * number until the runtime has answered it.
 *
 *-------------------------------------------------------------------------
 */
#include <arpa/inet.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "../common/log.h"
#include "server_private.h"

#define TICK_MS 100
#define RETRY_MS 1000	 /* of an end that could not be logged */
#define MAX_RECORDS 1024 /* calls that one channel leaves unanswered */
#define MAX_ENDS 65536	 /* to be logged, in all */
#define BUFFER_AT (LWS_PRE + 64)
#define MAX_BYTES INT64_C(1000000000000000) /* what numbers of a VM may say */

/* OIDs of PostgreSQL's built-in types, which never change (catalog/pg_type.dat) */
#define TEXT_OID 25
#define UUID_OID 2950

typedef enum CallOp
{
	OP_START,
	OP_TRANSFER, /* put, get */
	OP_OTHER
} CallOp;

/* A session's command. */
typedef struct CommandKey
{
	char session[37];
	char command[37];
} CommandKey;

struct Call
{
	Server *server;
	CommandKey key;
	CallOp op;
	bool is_put;
	bool is_owned;
	bool is_last;
	bool is_repeated;
	bool is_begun;
	bool is_logged; /* its start, by this call */
	int wait_ms;
	uint64_t deadline;
	json_t *audit;	 /* what is to be logged before; NULL: nothing */
	Buffer *message; /* its request, until it has been sent */
	Channel *channel;
	uint32_t number; /* key of the channel's by_number */
	Owner *owner;	 /* who is to own its command */
	CallDone done;	 /* NULL: nobody waits any more */
	void *arg;
	Call *prev, *next;
	UT_hash_handle hh;
};

typedef struct Owned
{
	CommandKey key;
	Owner *owner;
	bool is_transfer;
	uint64_t bytes; /* of a download */
	struct Owned *prev, *next;
	UT_hash_handle hh;
} Owned;

/* The end of a command, to be logged. */
typedef struct End
{
	Server *server;
	CommandKey key;
	char *detail;
	bool is_told; /* by the VM, which is to hear when that is done */
	bool is_sent;
	uint64_t retry_at;
	Call *call; /* that is answered then, with this status */
	int status;
	UT_hash_handle hh;
} End;

typedef struct Calls
{
	Call *all; /* that have begun, and are not only records */
	Owned *owned;
	End *ends;
	uv_timer_t *tick;
} Calls;

static void on_tick(uv_timer_t *timer);

/* ---- buffers ---- */

Buffer *
buffer_make(Server *server, size_t size)
{
	Buffer *buffer;

	size += BUFFER_AT;
	if (server->buffered + size > (size_t) server->options->max_call_memory * 1024 * 1024)
		return NULL;
	buffer = malloc(sizeof(Buffer) + size);
	memset(buffer, 0, sizeof(Buffer));
	buffer->size = size;
	buffer->at = buffer->end = BUFFER_AT;
	server->buffered += size;
	return buffer;
}

Buffer *
buffer_grow(Server *server, Buffer *buffer, size_t size)
{
	Buffer *larger;

	size += BUFFER_AT;
	if (server->buffered + size - buffer->size >
		(size_t) server->options->max_call_memory * 1024 * 1024)
		return NULL;
	server->buffered += size - buffer->size;
	larger = malloc(sizeof(Buffer) + size);
	memcpy(larger, buffer, sizeof(Buffer) + buffer->end);
	larger->size = size;
	OPENSSL_cleanse(buffer->bytes, buffer->end);
	free(buffer);
	return larger;
}

void
buffer_free(Server *server, Buffer *buffer)
{
	if (buffer == NULL)
		return;
	server->buffered -= buffer->size;
	/* env and files may be secret */
	OPENSSL_cleanse(buffer->bytes, buffer->end);
	free(buffer);
}

static uint32_t
get_number(const unsigned char *bytes)
{
	uint32_t number;

	memcpy(&number, bytes, 4);
	return ntohl(number);
}

static void
put_number(unsigned char *bytes, uint32_t number)
{
	number = htonl(number);
	memcpy(bytes, &number, 4);
}

/* The header of a message, or NULL if that makes no sense. */
static json_t *
read_header(const unsigned char *message, size_t len, size_t *header_len)
{
	json_t *header;

	if (len < 4 || len > PROTOCOL_MAX_MESSAGE)
		return NULL;
	*header_len = get_number(message);
	if (*header_len > PROTOCOL_MAX_HEADER || *header_len > len - 4)
		return NULL;
	header = json_loadb((const char *) message + 4, *header_len, JSON_REJECT_DUPLICATES, NULL);
	if (json_is_object(header))
		return header;
	json_decref(header);
	return NULL;
}

/* ---- ends ---- */

static void finish(Call *call, int status, Buffer *message);
static void free_call(Call *call);

static void
start_tick(Server *server)
{
	if (!uv_is_active((uv_handle_t *) server->calls->tick))
		uv_timer_start(server->calls->tick, on_tick, TICK_MS, TICK_MS);
}

static void
free_end(End *end)
{
	Call *call = end->call;

	HASH_DEL(end->server->calls->ends, end);
	end->server->call_counts.ends--;
	if (call != NULL)
	{
		finish(call, end->status, NULL);
		free_call(call);
	}
	free(end->detail);
	free(end);
}

static void
end_logged(void *arg, const PGresult *result)
{
	End *end = arg;
	Server *server = end->server;
	Outcome outcome = sessions_outcome(result);

	end->is_sent = false;
	if (outcome == OUTCOME_AWAY)
	{
		end->retry_at = uv_now(server->loop) + RETRY_MS;
		start_tick(server);
		return;
	}
	if (end->is_told && outcome == OUTCOME_OK)
	{
		Session *session = sessions_find(server->sessions, end->key.session);

		if (session != NULL && session_attached(session) != NULL)
			channel_note(session_attached(session), end->key.command);
	}
	free_end(end);
}

static void
send_end(End *end)
{
	static const Oid types[] = {UUID_OID, UUID_OID, TEXT_OID};
	static const int formats[] = {0, 0, 0};
	static const int lengths[] = {0, 0, 0};
	const char *values[] = {end->key.session, end->key.command, end->detail};

	if (!end->is_sent && uv_now(end->server->loop) >= end->retry_at)
		end->is_sent = database_send(sessions_database(end->server->sessions),
									 "SELECT agentvm.command_ended($1, $2, $3::jsonb)", 3, types,
									 values, lengths, formats, end_logged, end);
	if (!end->is_sent)
		start_tick(end->server);
}

/* Log the end of a command, whose detail becomes ours; NULL if there is one to be logged already. */
static End *
log_end(Server *server, const CommandKey *key, json_t *detail, bool is_told)
{
	End *end;

	HASH_FIND(hh, server->calls->ends, key, sizeof(*key), end);
	if (end != NULL)
	{
		end->is_told = end->is_told || is_told;
		json_decref(detail);
		return NULL;
	}
	end = calloc(1, sizeof(End));
	end->server = server;
	end->key = *key;
	end->detail = json_dumps(detail, JSON_COMPACT);
	end->is_told = is_told;
	json_decref(detail);
	HASH_ADD(hh, server->calls->ends, key, sizeof(end->key), end);
	server->call_counts.ends++;
	send_end(end);
	return end;
}

static void
log_outcome(Server *server, const CommandKey *key, const char *outcome)
{
	(void) log_end(server, key, json_pack("{s:s}", "outcome", outcome), false);
}

void
calls_up(Server *server)
{
	End *end, *next;

	HASH_ITER(hh, server->calls->ends, end, next)
	{
		end->retry_at = 0;
		send_end(end);
	}
}

/* Pass on a number of the VM's, if there is one, within bounds. */
static void
copy_number(json_t *to, const json_t *from, const char *name, int64_t min, int64_t max)
{
	const json_t *value = json_object_get(from, name);
	int64_t number;

	if (!json_is_integer(value))
		return;
	number = json_integer_value(value);
	json_object_set_new(to, name, json_integer(number < min ? min : number > max ? max : number));
}

int
calls_told_end(Server *server, Session *session, json_t *frame)
{
	const char *command = json_string_value(json_object_get(frame, "command"));
	CommandKey key = {0};
	json_t *detail;
	End *end;

	if (command == NULL || !is_uuid(command))
		return LWS_CLOSE_STATUS_INVALID_PAYLOAD;
	memcpy(key.session, session_id_text(session), sizeof(key.session));
	memcpy(key.command, command, sizeof(key.command));
	HASH_FIND(hh, server->calls->ends, &key, sizeof(key), end);
	if (end == NULL && !session_may_tell_end(server->sessions, session))
		return LWS_CLOSE_STATUS_POLICY_VIOLATION;
	if (end == NULL && server->call_counts.ends >= MAX_ENDS)
		return PROTOCOL_CLOSE_AWAY; /* it says so again on its next channel */
	detail = json_object();
	copy_number(detail, frame, "exit_code", -255, 255);
	copy_number(detail, frame, "duration_ms", 0, MAX_BYTES);
	copy_number(detail, frame, "stdout_bytes", 0, MAX_BYTES);
	copy_number(detail, frame, "stderr_bytes", 0, MAX_BYTES);
	if (json_is_boolean(json_object_get(frame, "timed_out")))
		json_object_set(detail, "timed_out", json_object_get(frame, "timed_out"));
	(void) log_end(server, &key, detail, true);
	return 0;
}

/* ---- whose commands they are ---- */

static void
disown(Server *server, Owned *owned)
{
	HASH_DEL(server->calls->owned, owned);
	DL_DELETE(owned->owner->all, owned);
	free(owned);
}

static Owned *
find_owned(Server *server, const CommandKey *key)
{
	Owned *owned;

	HASH_FIND(hh, server->calls->owned, key, sizeof(*key), owned);
	return owned;
}

static void
own(Call *call)
{
	Calls *calls = call->server->calls;
	Owned *owned = find_owned(call->server, &call->key);

	if (owned == NULL)
	{
		owned = calloc(1, sizeof(Owned));
		owned->key = call->key;
		HASH_ADD(hh, calls->owned, key, sizeof(owned->key), owned);
	}
	else
		DL_DELETE(owned->owner->all, owned);
	owned->owner = call->owner;
	owned->is_transfer = call->op == OP_TRANSFER;
	DL_APPEND(call->owner->all, owned);
}

static void pass(Call *call);

/* Have a command killed by a call that nobody waits for. */
static void
kill_command(Server *server, const CommandKey *key)
{
	Buffer *message = buffer_make(server, 256);
	char *header;
	Call *call;

	if (message == NULL)
		return; /* its lease will end it */
	header = (char *) message->bytes + message->end + 4;
	put_number(message->bytes + message->end,
			   (uint32_t) sprintf(header, "{\"op\": \"kill\", \"command\": \"%s\", \"signal\": 9}",
								  key->command));
	message->end += 4 + strlen(header);
	call = call_make(server, key->session, message);
	call->is_begun = true;
	pass(call);
}

void
owner_gone(Server *server, Owner *owner, bool keep)
{
	while (owner->all != NULL)
	{
		CommandKey key = owner->all->key;
		bool is_transfer = owner->all->is_transfer;

		disown(server, owner->all);
		if (!keep && is_transfer)
			log_outcome(server, &key, "abandoned");
		else if (!keep)
			kill_command(server, &key);
	}
}

/* ---- calls ---- */

static bool
read_flag(json_t *header, const char *name, bool *value)
{
	const json_t *flag = json_object_get(header, name);

	*value = json_is_true(flag);
	return flag == NULL || json_is_boolean(flag);
}

static bool
audit_is_sound(const json_t *audit)
{
	const char *kind = json_string_value(json_object_get(audit, "kind"));

	return kind != NULL &&
		   (strcmp(kind, "exec") == 0 || strcmp(kind, "upload") == 0 ||
			strcmp(kind, "download") == 0) &&
		   json_is_string(json_object_get(audit, "role"));
}

Call *
call_make(Server *server, const char *session, Buffer *message)
{
	unsigned char *start = message->bytes + message->at;
	size_t len = message->end - message->at;
	size_t header_len;
	json_t *header = read_header(start, len, &header_len);
	const char *op = json_string_value(json_object_get(header, "op"));
	const char *command = json_string_value(json_object_get(header, "command"));
	json_t *wait = json_object_get(header, "wait_ms");
	json_t *audit = json_object_get(header, "audit");
	bool is_owned = false, is_last = false;
	Call *call = NULL;

	if (op != NULL && command != NULL && is_uuid(command) &&
		len - 4 - header_len <= PROTOCOL_MAX_CHUNK &&
		(wait == NULL || (json_is_integer(wait) && json_integer_value(wait) >= 0 &&
						  json_integer_value(wait) <= PROTOCOL_MAX_WAIT_MS)) &&
		(audit == NULL || audit_is_sound(audit)) && read_flag(header, "owned", &is_owned) &&
		read_flag(header, "last", &is_last))
	{
		call = calloc(1, sizeof(Call));
		call->server = server;
		memcpy(call->key.session, session, sizeof(call->key.session));
		memcpy(call->key.command, command, sizeof(call->key.command));
		call->is_put = strcmp(op, "put") == 0;
		call->op = strcmp(op, "start") == 0					? OP_START
				   : call->is_put || strcmp(op, "get") == 0 ? OP_TRANSFER
															: OP_OTHER;
		call->is_owned = is_owned;
		call->is_last = is_last;
		call->is_repeated = json_integer_value(json_object_get(header, "age_ms")) > 0;
		call->wait_ms = (int) json_integer_value(wait);
		call->audit = json_incref(audit);
		call->message = message;
	}
	if (call != NULL && (audit != NULL || json_object_get(header, "owned") != NULL ||
						 json_object_get(header, "last") != NULL))
	{
		char *text;
		size_t text_len;

		json_object_del(header, "audit");
		json_object_del(header, "owned");
		json_object_del(header, "last");
		text = json_dumps(header, JSON_COMPACT);
		text_len = strlen(text);
		if (text_len <= header_len)
		{
			message->at += header_len - text_len;
			put_number(message->bytes + message->at, (uint32_t) text_len);
			memcpy(message->bytes + message->at + 4, text, text_len);
		}
		else
		{
			/* numbers that we write in another way than they were written */
			call->message = NULL;
			free_call(call);
			call = NULL;
		}
		OPENSSL_cleanse(text, text_len);
		free(text);
	}
	json_decref(header);
	return call;
}

const char *
call_command(const Call *call)
{
	return call->key.command;
}

static void
free_call(Call *call)
{
	json_decref(call->audit);
	buffer_free(call->server, call->message);
	free(call);
}

/* It is answered; what is left of it is only a record. */
static void
finish(Call *call, int status, Buffer *message)
{
	Server *server = call->server;
	CallDone done = call->done;
	Channel *channel = call->channel;

	if (done == NULL)
	{
		buffer_free(server, message);
		return;
	}
	call->done = NULL;
	DL_DELETE(server->calls->all, call);
	server->call_counts.under_way--;
	if (channel != NULL)
		channel_calls(channel)->under_way--;
	if (status != 0)
		done(call->arg, status, message);
	if (channel != NULL && channel_calls(channel)->under_way == 0 && channel_calls(channel)->drains)
		channel_drain(channel);
}

/* It was not passed on, and will not be: the runtime has not seen it. */
static void
give_up(Call *call, int status)
{
	End *end = NULL;

	if (call->is_logged)
		end = log_end(call->server, &call->key,
					  json_pack("{s:s}", "outcome", status == 0 ? "abandoned" : "not passed on"),
					  false);
	if (end != NULL && call->done != NULL)
	{
		/* whoever hears of it may try elsewhere, where its start is to be logged anew */
		end->call = call;
		end->status = status;
		return;
	}
	finish(call, status, NULL);
	free_call(call);
}

static void
take_from_channel(Call *call)
{
	HASH_DEL(channel_calls(call->channel)->by_number, call);
	if (call->done != NULL)
		channel_calls(call->channel)->under_way--;
	call->channel = NULL;
}

/* Pass it down the channel of its session, if there is one. */
static void
pass(Call *call)
{
	Server *server = call->server;
	Session *session = sessions_find(server->sessions, call->key.session);
	Channel *channel = session != NULL ? session_attached(session) : NULL;
	ChannelCalls *calls = channel != NULL ? channel_calls(channel) : NULL;
	Buffer *message = call->message;
	const Call *same;

	if (channel != NULL && HASH_COUNT(calls->by_number) >= MAX_RECORDS)
	{
		channel_close(channel, LWS_CLOSE_STATUS_POLICY_VIOLATION);
		channel = NULL;
	}
	if (channel == NULL ||
		(call->done != NULL && (calls->drains || calls->under_way >= PROTOCOL_CALLS_UNDER_WAY)))
	{
		give_up(call, session != NULL && session_has_ended(session) ? 410
					  : channel == NULL								? 404
					  : calls->drains								? 503
																	: 429);
		return;
	}
	do
	{
		call->number = ++calls->last_number;
		HASH_FIND(hh, calls->by_number, &call->number, sizeof(call->number), same);
	} while (same != NULL);
	HASH_ADD(hh, calls->by_number, number, sizeof(call->number), call);
	call->channel = channel;
	if (call->done != NULL)
		calls->under_way++;
	if (call->is_owned && call->owner != NULL)
		own(call);
	if (call->op == OP_START)
		session_expect_end(session);
	message->at -= 4;
	put_number(message->bytes + message->at, call->number);
	message->call = call;
	server->call_counts.bytes_down += message->end - message->at;
	channel_push(channel, message);
}

void
call_sent(Call *call)
{
	buffer_free(call->server, call->message);
	call->message = NULL;
}

void
call_taken(Call *call)
{
	call->message->call = NULL;
	call->message = NULL;
}

static int
outcome_status(Outcome outcome)
{
	switch (outcome)
	{
		case OUTCOME_OK:
			return 200;
		case OUTCOME_UNKNOWN:
			return 404;
		case OUTCOME_GONE:
			return 410;
		case OUTCOME_NOT_READY:
			return 409;
		case OUTCOME_BAD:
			return 400;
		case OUTCOME_AWAY:
			break;
	}
	return 503;
}

/* Its start has been committed, or not. */
static void
start_logged(void *arg, const PGresult *result)
{
	Call *call = arg;
	Outcome outcome = sessions_outcome(result);

	if (outcome != OUTCOME_OK)
	{
		give_up(call, outcome_status(outcome));
		return;
	}
	call->is_logged = PQgetvalue(result, 0, 0)[0] != 0;
	if (call->done == NULL)
		give_up(call, 0);
	else
		pass(call);
}

static void
log_start(Call *call)
{
	static const Oid types[] = {UUID_OID, UUID_OID, TEXT_OID, TEXT_OID};
	static const int formats[] = {0, 0, 0, 0};
	static const int lengths[] = {0, 0, 0, 0};
	const char *values[4] = {call->key.session, call->key.command};
	json_t *detail = json_copy(call->audit);
	char *text;
	bool is_sent;

	values[2] = json_string_value(json_object_get(call->audit, "kind"));
	json_object_del(detail, "kind");
	if (call->is_repeated)
		json_object_set_new(detail, "repeated", json_true());
	text = json_dumps(detail, JSON_COMPACT);
	values[3] = text;
	is_sent = database_send(sessions_database(call->server->sessions),
							"SELECT agentvm.command_started($1, $2, $3, $4::jsonb)", 4, types,
							values, lengths, formats, start_logged, call);
	OPENSSL_cleanse(text, strlen(text));
	free(text);
	json_decref(detail);
	if (!is_sent)
		give_up(call, 503);
}

void
call_begin(Call *call, Owner *owner, CallDone done, void *arg)
{
	Server *server = call->server;
	Session *session = sessions_find(server->sessions, call->key.session);
	Channel *channel = session != NULL ? session_attached(session) : NULL;

	call->is_begun = true;
	call->owner = owner;
	call->done = done;
	call->arg = arg;
	call->deadline = uv_now(server->loop) + (uint64_t) call->wait_ms + PROTOCOL_CALL_GRACE_MS;
	DL_APPEND(server->calls->all, call);
	server->call_counts.under_way++;
	start_tick(server);
	if (server->draining)
		give_up(call, 503);
	else if (session != NULL && session_has_ended(session))
		give_up(call, 410);
	else if (channel == NULL)
		give_up(call, 404);
	else if (channel_calls(channel)->under_way >= PROTOCOL_CALLS_UNDER_WAY)
		give_up(call, 429);
	else if (call->audit != NULL)
		log_start(call);
	else
		pass(call);
}

/* Nobody waits for it any more, who is told this status (0: who is not there). */
static void
leave(Call *call, int status)
{
	call->owner = NULL;
	if (call->channel != NULL && call->message != NULL && !call->message->is_begun)
	{
		/* the runtime will not see it */
		channel_drop(call->channel, call->message);
		take_from_channel(call);
		if (call->is_logged)
			log_outcome(call->server, &call->key, status == 0 ? "abandoned" : "not passed on");
		finish(call, status, NULL);
		free_call(call);
		return;
	}
	/* else it stays, for the answer of the database or the runtime to come to */
	finish(call, status, NULL);
}

void
call_forget(Call *call)
{
	if (!call->is_begun)
		free_call(call);
	else
		leave(call, 0);
}

/* What an error of the runtime's is called in the log. */
static const char *
error_name(const char *error)
{
	static const char *const known[] = {CALL_INVALID,  CALL_FORGOTTEN, CALL_NO_COMMAND,
										CALL_NO_FILE,  CALL_DENIED,	   CALL_WRONG_FILE,
										CALL_NO_SPACE, CALL_BUSY,	   CALL_FAILED};
	size_t i;

	for (i = 0; i < sizeof(known) / sizeof(known[0]); i++)
	{
		if (strcmp(error, known[i]) == 0)
			return known[i];
	}
	return CALL_FAILED;
}

/* What an answer says of its command: that it has ended, perhaps. */
static void
look_at_answer(Call *call, const json_t *header, size_t bytes)
{
	const char *error = json_string_value(json_object_get(header, "error"));
	Owned *owned = find_owned(call->server, &call->key);
	bool is_over = json_is_false(json_object_get(header, "running"));

	if (owned != NULL && owned->is_transfer && !call->is_put)
		owned->bytes += bytes;
	if (error != NULL)
	{
		bool is_lost = strcmp(error, CALL_FORGOTTEN) == 0 || strcmp(error, CALL_NO_COMMAND) == 0;

		is_over = is_lost || call->op != OP_OTHER;
		if (is_lost)
			log_outcome(call->server, &call->key, "unknown");
		else if (is_over)
			(void) log_end(call->server, &call->key, json_pack("{s:s}", "error", error_name(error)),
						   false);
	}
	else if (call->op == OP_TRANSFER && call->is_last)
	{
		json_t *detail = json_object();

		is_over = true;
		json_object_set_new(detail, "bytes",
							json_integer((json_int_t) (owned != NULL ? owned->bytes : bytes)));
		if (call->is_put)
		{
			json_t *written = json_object();

			/* "written" of a VM, by our name for it */
			copy_number(written, header, "written", 0, MAX_BYTES);
			json_object_set(detail, "bytes", json_object_get(written, "written"));
			json_decref(written);
		}
		(void) log_end(call->server, &call->key, detail, false);
	}
	if (is_over && owned != NULL)
		disown(call->server, owned);
}

int
calls_answer(Server *server, Channel *channel, Buffer *message)
{
	size_t len = message->end - message->at;
	uint32_t number;
	size_t header_len;
	json_t *header;
	Call *call = NULL;

	server->call_counts.bytes_up += len;
	if (len >= 4)
	{
		number = get_number(message->bytes + message->at);
		HASH_FIND(hh, channel_calls(channel)->by_number, &number, sizeof(number), call);
	}
	if (call == NULL || call->message != NULL)
	{
		buffer_free(server, message);
		return LWS_CLOSE_STATUS_POLICY_VIOLATION; /* nobody has asked */
	}
	message->at += 4;
	header = read_header(message->bytes + message->at, len - 4, &header_len);
	if (header == NULL)
	{
		buffer_free(server, message);
		return LWS_CLOSE_STATUS_INVALID_PAYLOAD;
	}
	HASH_DEL(channel_calls(channel)->by_number, call);
	look_at_answer(call, header, len - 8 - header_len);
	json_decref(header);
	finish(call, 200, message);
	free_call(call);
	return 0;
}

void
calls_lost(Server *server, Channel *channel)
{
	ChannelCalls *calls = channel_calls(channel);
	Call *call, *next;

	calls->drains = false; /* whoever lets go of it closes it */
	HASH_ITER(hh, calls->by_number, call, next)
	{
		Buffer *message = call->message;
		bool is_begun = message != NULL && message->is_begun;

		if (message != NULL)
			channel_drop(channel, message);
		take_from_channel(call);
		if (message != NULL && !is_begun)
			give_up(call, 404);
		else
		{
			finish(call, 502, NULL);
			free_call(call);
		}
	}
}

/* ---- life ---- */

static void
on_tick(uv_timer_t *timer)
{
	Server *server = timer->data;
	Calls *calls = server->calls;
	Call *call, *next;
	End *end, *next_end;

	DL_FOREACH_SAFE(calls->all, call, next)
	{
		/* one that is with the database has that one's time limit */
		if (uv_now(server->loop) >= call->deadline && call->channel != NULL)
			leave(call, 504);
	}
	HASH_ITER(hh, calls->ends, end, next_end)
	send_end(end);
	if (calls->all == NULL && calls->ends == NULL)
		uv_timer_stop(timer);
}

void
calls_create(Server *server)
{
	server->calls = calloc(1, sizeof(Calls));
	server->calls->tick = calloc(1, sizeof(uv_timer_t));
	uv_timer_init(server->loop, server->calls->tick);
	server->calls->tick->data = server;
}

static void
free_handle(uv_handle_t *handle)
{
	free(handle);
}

void
calls_destroy(Server *server)
{
	End *end, *next;

	HASH_ITER(hh, server->calls->ends, end, next)
	{
		end->call = NULL;
		free_end(end);
	}
	uv_close((uv_handle_t *) server->calls->tick, free_handle);
	free(server->calls);
	server->calls = NULL;
}
