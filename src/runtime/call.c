/*-------------------------------------------------------------------------
 *
 * call.c
 *		Calls that come over the channel, and their way back.
 *
 *-------------------------------------------------------------------------
 */
#include "call.h"

#include <arpa/inet.h>
#include <malloc.h>
#include <openssl/crypto.h>
#include <stdlib.h>
#include <string.h>

#include "../common/log.h"
#include "command.h"
#include "transfer.h"

#define MAX_CALLS (2 * PROTOCOL_CALLS_UNDER_WAY) /* no gateway has as many under way */
#define TRIM_MS 2000							 /* after a call */
#define MAX_HELD (4 * 1024 * 1024)				 /* bytes of calls that are held back */

static Link *channel;
static lws_dll2_owner_t waiting;
static lws_dll2_owner_t ready;
static Timer trim_timer;
static bool is_sending;

/* A call that is held back, as it has come. */
typedef struct Held
{
	lws_dll2_t list;
	size_t len;
	char frame[];
} Held;

static bool holds;
static lws_dll2_owner_t held;
static size_t held_bytes;

/*
 * Give back to the system what has been freed: not with each call, since the next
 * one is likely to need it, and new pages are dear.
 */
static void
trim(void *arg)
{
	(void) malloc_trim(0);
}

static void
forget(Call *call)
{
	lws_dll2_remove(&call->list);
	command_let_go(call);
	json_decref(call->answer);
	json_decref(call->get);
	free(call);
}

void
call_answer(Call *call, json_t *answer)
{
	json_decref(call->answer);
	call->answer = answer;
	timer_stop(&call->wait);
	lws_dll2_remove(&call->list);
	lws_dll2_add_tail(&call->list, &ready);
}

void
call_fail(Call *call, const char *error, const char *message)
{
	/* a message with a name of a file in it may be no UTF-8 */
	json_t *text = json_string(message);

	call_answer(call, json_pack("{s:s, s:o}", "error", error, "message",
								text != NULL ? text : json_string("")));
}

/*
 * Put the answer's frame together, of which "bytes", malloc'ed and ours, is a part of a
 * file, or NULL; false when there is no memory for it.
 */
static bool
send_answer(const Call *call, json_t *answer, char *bytes, size_t len)
{
	char *header = json_dumps(answer, JSON_COMPACT);
	size_t header_len = header != NULL ? strlen(header) : 0;
	uint32_t words[2] = {htonl(call->number), htonl((uint32_t) header_len)};
	size_t head_len = sizeof(words) + header_len;
	bool has_room = bytes != NULL && LINK_ROOM + head_len <= TRANSFER_ROOM;
	char *memory = bytes;
	char *frame = NULL;

	if (header == NULL || header_len > PROTOCOL_MAX_HEADER || len > PROTOCOL_MAX_CHUNK)
	{
		free(header);
		free(bytes);
		return false;
	}
	/* the bytes of a file stay where they are */
	if (has_room)
		frame = bytes + TRANSFER_ROOM - head_len;
	else if ((memory = malloc(LINK_ROOM + head_len + len)) != NULL)
	{
		frame = memory + LINK_ROOM;
		if (bytes != NULL)
			memcpy(frame + head_len, bytes + TRANSFER_ROOM, len);
		else if (len > 0)
			command_copy(call, frame + head_len);
	}
	if (frame != NULL)
	{
		memcpy(frame, words, sizeof(words));
		memcpy(frame + sizeof(words), header, header_len);
		link_call(channel, memory, frame, head_len + len);
	}
	if (!has_room)
		free(bytes);
	free(header);
	return frame != NULL;
}

void
call_send(void)
{
	/* what is sent may be sent at once, and lead back here */
	if (is_sending)
		return;
	is_sending = true;
	while (ready.head != NULL && link_has_room(channel))
	{
		Call *call = lws_container_of(ready.head, Call, list);
		char *bytes = NULL;
		size_t len = 0;

		if (call->get != NULL)
			call->answer = transfer_get(call->get, &bytes, &len);
		else if (call->answer == NULL)
			call->answer = command_answer(call, &len);
		if (!send_answer(call, call->answer, bytes, len))
			log_line(LOG_LEVEL_ERROR, "a call cannot be answered", NULL);
		forget(call);
	}
	is_sending = false;
	if (!timer_is_set(&trim_timer))
		timer_set(&trim_timer, TRIM_MS, trim, NULL);
}

/* Keep a call for later; false when there are too many. */
static bool
hold_back(const char *frame, size_t len)
{
	Held *one = held_bytes + len <= MAX_HELD ? calloc(1, sizeof(Held) + len) : NULL;

	if (one == NULL)
		return false;
	one->len = len;
	memcpy(one->frame, frame, len);
	lws_dll2_add_tail(&one->list, &held);
	held_bytes += len;
	return true;
}

/* The first of those that are held back is none any more. */
static Held *
take_held(void)
{
	Held *one = lws_container_of(held.head, Held, list);

	lws_dll2_remove(&one->list);
	held_bytes -= one->len;
	return one;
}

static void
free_held(Held *one)
{
	OPENSSL_cleanse(one->frame, one->len); /* env and files may be secret */
	free(one);
}

void
call_hold(void)
{
	holds = true;
}

void
call_release(void)
{
	holds = false;
	while (held.head != NULL)
	{
		Held *one = take_held();

		call_take(channel, one->frame, one->len);
		free_held(one);
	}
}

void
call_take(Link *from, const char *frame, size_t len)
{
	CallFrame said;
	const char *problem;
	Call *call;

	channel = from;
	if (holds && hold_back(frame, len))
		return;
	problem = answer_call(frame, len, &said);
	if (len < 4 || waiting.count + ready.count >= MAX_CALLS ||
		(call = calloc(1, sizeof(Call))) == NULL)
	{
		log_line(LOG_LEVEL_WARNING, "a call is ignored", "reason",
				 problem != NULL ? problem : "there are too many", NULL);
		json_decref(said.root);
		return;
	}
	call->number = said.number;
	lws_dll2_add_tail(&call->list, &waiting);
	if (problem != NULL)
		call_fail(call, CALL_INVALID, problem);
	else if (holds)
		call_fail(call, CALL_BUSY, "the VM is not yet what the session needs");
	else if (said.op == OP_GET)
	{
		call->get = json_incref(said.root);
		call_answer(call, NULL);
	}
	else if (said.op == OP_PUT)
		call_answer(call, transfer_put(said.root, said.bytes, said.len));
	else
		command_call(call, &said);
	json_decref(said.root);
	call_send();
}

void
call_forget_all(void)
{
	while (waiting.head != NULL)
		forget(lws_container_of(waiting.head, Call, list));
	while (ready.head != NULL)
		forget(lws_container_of(ready.head, Call, list));
	while (held.head != NULL)
		free_held(take_held());
	channel = NULL;
}
