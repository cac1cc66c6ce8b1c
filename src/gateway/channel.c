/*-------------------------------------------------------------------------
 *
 * channel.c
 *		The WebSocket of a session.
 *
 *-------------------------------------------------------------------------
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "../common/log.h"
#include "server_private.h"

#define CLOSE_WAIT_S 3							  /* for the other side to hang up */
#define FRAMES_PER_SECOND 20					  /* of one channel, with as much burst */
#define WRITE_CLOSE ((enum lws_write_protocol) 4) /* the one that lws-write.h keeps back */

#define FRAGMENT (32 * 1024) /* of a binary frame that is sent */
#define MAX_INCOMING (PROTOCOL_MAX_MESSAGE + 4)
#define MIN_PIECE 256 /* a fragment that comes counts as so many bytes at least */
#define MAX_COST (2 * MAX_INCOMING)
#define INCOMING_S 30 /* for all of a message to come */
#define MAX_NOTES 1024
#define MAX_PARTS 3 /* in which an end of a command comes */

/* The end of a command, of which the runtime is to be told that it has been committed. */
typedef struct Note
{
	struct Note *next;
	char command[37];
} Note;

/* One WebSocket. */
struct Channel
{
	struct lws *wsi;
	Server *server;
	Request *waiting;
	Turn turn; /* to ask whose token it is */
	Session *session;
	uint8_t hash[HASH_LEN];
	char out[96];	/* the one frame that is to be sent */
	int close_code; /* then close with this */
	bool is_closed;
	bool tells_claim; /* it is to be sent that its session has been taken */
	bool is_cut;	  /* in the middle of a message, after which no text can be sent */
	bool by_cable;	  /* calls and answers go as messages of the VM's cable */
	double allowance; /* frames that may come now */
	uint64_t allowed_at;
	ChannelCalls calls;
	Note *notes; /* to be sent, as is the queue */
	unsigned notes_count;
	Buffer *queue;
	Buffer *incoming; /* binary, and not whole yet */
	size_t incoming_cost;
	unsigned frame_parts;
	size_t frame_len;
	char frame[512];
};

const size_t channel_size = sizeof(Channel);

static void
send_frame(Channel *channel, const char *text, int close_code)
{
	snprintf(channel->out, sizeof(channel->out), "%s", text);
	channel->close_code = close_code;
	lws_callback_on_writable(channel->wsi);
}

void
channel_push(Channel *channel, Buffer *message)
{
	const Peer *peer = lws_get_opaque_user_data(channel->wsi);

	DL_APPEND(channel->queue, message);
	/* the largest of answers, with what frames cost on the cable */
	if (peer->is_vm)
		vms_ask(channel->server->vms, peer->address, 2 * MAX_INCOMING);
	else
		lws_callback_on_writable(channel->wsi);
}

void *
channel_next(void *arg, void *taker, const uint8_t **bytes, size_t *len)
{
	Channel *channel = taker;
	Buffer *message = channel->queue;

	if (message == NULL || channel->close_code != 0)
		return NULL;
	DL_DELETE(channel->queue, message);
	call_taken(message->call);
	*bytes = message->bytes + message->at;
	*len = message->end - message->at;
	return message;
}

void
channel_sent(void *arg, void *message)
{
	buffer_free(arg, message);
}

void *
channel_expect(void *arg, void *taker, size_t len, uint8_t **at)
{
	Channel *channel = taker;
	Buffer *message = NULL;
	int code = 0;

	if (channel->close_code != 0)
		return NULL;
	if (channel->calls.by_number == NULL)
		code = LWS_CLOSE_STATUS_POLICY_VIOLATION; /* nobody has asked */
	else if (len > MAX_INCOMING)
		code = LWS_CLOSE_STATUS_MESSAGE_TOO_LARGE;
	else if ((message = buffer_make(arg, len)) == NULL)
		code = PROTOCOL_CLOSE_AWAY;
	if (message == NULL)
	{
		channel_close(channel, code);
		return NULL;
	}
	*at = message->bytes + message->end;
	message->end += len;
	return message;
}

void
channel_come(void *arg, void *taker, void *message)
{
	Channel *channel = taker;
	int code;

	if (channel == NULL || channel->close_code != 0)
	{
		buffer_free(arg, message);
		return;
	}
	channel->server->counts.frames++;
	code = calls_answer(arg, channel, message);
	if (code != 0)
		channel_close(channel, code);
}

void
channel_drop(Channel *channel, Buffer *message)
{
	DL_DELETE(channel->queue, message);
}

ChannelCalls *
channel_calls(Channel *channel)
{
	return &channel->calls;
}

void
channel_close(Channel *channel, int code)
{
	if (channel->close_code == 0)
		send_frame(channel, "", code);
}

void
channel_note(Channel *channel, const char *command)
{
	Note *note;

	if (channel->close_code != 0)
		return; /* it says so again on its next channel */
	if (channel->notes_count == MAX_NOTES)
	{
		channel_close(channel, PROTOCOL_CLOSE_AWAY);
		return;
	}
	note = calloc(1, sizeof(Note));
	snprintf(note->command, sizeof(note->command), "%s", command);
	LL_APPEND(channel->notes, note);
	channel->notes_count++;
	lws_callback_on_writable(channel->wsi);
}

/* It is not its session's any more: what it has under way is lost. */
static void
let_go(Channel *channel)
{
	const Peer *peer = lws_get_opaque_user_data(channel->wsi);

	if (channel->by_cable)
		vms_no_taker(channel->server->vms, peer->address, channel);
	channel->by_cable = false;
	channel->session = NULL;
	channel->is_cut = channel->is_cut || (channel->queue != NULL && channel->queue->is_begun);
	calls_lost(channel->server, channel);
	buffer_free(channel->server, channel->incoming);
	channel->incoming = NULL;
}

static int
outcome_close(Outcome outcome)
{
	switch (outcome)
	{
		case OUTCOME_UNKNOWN:
			return PROTOCOL_CLOSE_UNKNOWN;
		case OUTCOME_GONE:
			return PROTOCOL_CLOSE_GONE;
		default:
			return PROTOCOL_CLOSE_AWAY;
	}
}

static void
channel_authenticated(void *arg, Outcome outcome, Session *session, const char *body)
{
	Channel *channel = arg;
	Channel *before;

	channel->waiting = NULL;
	if (outcome == OUTCOME_UNKNOWN)
		note_refused(channel->server, channel->wsi);
	if (outcome != OUTCOME_OK)
	{
		send_frame(channel, "", outcome_close(outcome));
		return;
	}
	channel->session = session;
	before = session_attach(channel->server->sessions, session, channel);
	if (before != NULL && before != channel)
	{
		let_go(before);
		send_frame(before, "", PROTOCOL_CLOSE_REPLACED);
	}
	send_frame(channel, "{\"type\": \"hello\"}", 0);
}

static void
authenticate(void *arg, bool may)
{
	Channel *channel = arg;

	if (may)
		channel->waiting = sessions_authenticate(channel->server->sessions, channel->hash,
												 channel_authenticated, channel);
	else
		send_frame(channel, "", PROTOCOL_CLOSE_AWAY);
}

static void
channel_beaten(void *arg, Outcome outcome, Session *session, const char *body)
{
	Channel *channel = arg;
	char text[96];

	channel->waiting = NULL;
	if (channel->close_code != 0)
		return;
	if (outcome == OUTCOME_OK)
	{
		/* {"deadline": ...} with a type */
		snprintf(text, sizeof(text), "{\"type\": \"deadline\", %s", body + 1);
		send_frame(channel, text, 0);
	}
	else if (outcome == OUTCOME_GONE)
		send_frame(channel, "{\"type\": \"gone\"}", PROTOCOL_CLOSE_GONE);
	/* else: the database is away; the runtime beats again, and the channel stays */
}

void
channel_ended(void *attached)
{
	Channel *channel = attached;

	let_go(channel);
	send_frame(channel, "{\"type\": \"gone\"}", PROTOCOL_CLOSE_GONE);
}

void
channel_claimed(void *attached)
{
	Channel *channel = attached;

	channel->tells_claim = true;
	lws_callback_on_writable(channel->wsi);
}

/* The gateway is to end: another one will do, once what is under way has been answered. */
void
channel_drain(void *attached)
{
	Channel *channel = attached;

	channel->calls.drains = channel->calls.under_way > 0;
	if (!channel->calls.drains)
		channel_close(channel, PROTOCOL_CLOSE_AWAY);
}

/* A whole frame has come: {"type": ...}. Returns a close code, or 0. */
static int
channel_frame(Channel *channel)
{
	json_t *root;
	const char *type;
	int code = 0;

	channel->server->counts.frames++;
	if (channel->session == NULL)
		return 0; /* not yet known, or ending */
	root = json_loadb(channel->frame, channel->frame_len, JSON_REJECT_DUPLICATES, NULL);
	type = json_string_value(json_object_get(root, "type"));
	if (type == NULL)
		code = LWS_CLOSE_STATUS_INVALID_PAYLOAD;
	else if (strcmp(type, "heartbeat") == 0 && channel->waiting == NULL)
		channel->waiting =
			sessions_heartbeat(channel->server->sessions, channel->hash, channel_beaten, channel);
	else if (strcmp(type, "cable") == 0)
	{
		const Peer *peer = lws_get_opaque_user_data(channel->wsi);

		channel->by_cable = peer->is_vm;
		if (peer->is_vm)
			vms_set_taker(channel->server->vms, peer->address, channel);
	}
	else if (strcmp(type, "ended") == 0)
	{
		code = calls_told_end(channel->server, channel->session, root);
		/* there is another bound on these; one may come in parts, as reads happen to end */
		channel->allowance += channel->frame_parts < MAX_PARTS ? channel->frame_parts : MAX_PARTS;
	}
	/* types that we do not know are for later versions */
	json_decref(root);
	return code;
}

/* Whether one more frame is too many for now: a token bucket. */
static bool
too_many_frames(Channel *channel)
{
	uint64_t now = uv_now(channel->server->loop);

	channel->allowance += (now - channel->allowed_at) * FRAMES_PER_SECOND / 1000.0;
	channel->allowed_at = now;
	if (channel->allowance > FRAMES_PER_SECOND)
		channel->allowance = FRAMES_PER_SECOND;
	channel->allowance -= 1;
	return channel->allowance < 0;
}

/* Some of a binary frame has come, which can only be an answer. Returns a close code, or 0. */
static int
take_binary(Channel *channel, const void *bytes, size_t len)
{
	Server *server = channel->server;
	Buffer *incoming = channel->incoming;
	size_t size;

	const Peer *peer = lws_get_opaque_user_data(channel->wsi);

	if (channel->session == NULL || channel->calls.by_number == NULL || peer->is_vm)
		return LWS_CLOSE_STATUS_POLICY_VIOLATION; /* nobody has asked, or not this way */
	if (incoming == NULL)
	{
		incoming = buffer_make(server, len < 2048 ? 2048 : len);
		if (incoming == NULL)
			return PROTOCOL_CLOSE_AWAY;
		channel->incoming = incoming;
		channel->incoming_cost = 0;
		lws_set_timer_usecs(channel->wsi, (lws_usec_t) INCOMING_S * LWS_USEC_PER_SEC);
	}
	channel->incoming_cost += len < MIN_PIECE ? MIN_PIECE : len;
	size = incoming->end - incoming->at + len;
	if (size > MAX_INCOMING || channel->incoming_cost > MAX_COST)
		return LWS_CLOSE_STATUS_MESSAGE_TOO_LARGE;
	if (incoming->end + len > incoming->size)
	{
		incoming = buffer_grow(server, incoming, 2 * size < MAX_INCOMING ? 2 * size : MAX_INCOMING);
		if (incoming == NULL)
			return PROTOCOL_CLOSE_AWAY;
		channel->incoming = incoming;
	}
	memcpy(incoming->bytes + incoming->end, bytes, len);
	incoming->end += len;
	if (!lws_is_final_fragment(channel->wsi) || lws_remaining_packet_payload(channel->wsi) > 0)
		return 0;
	channel->incoming = NULL;
	lws_set_timer_usecs(channel->wsi, LWS_SET_TIMER_USEC_CANCEL);
	server->counts.frames++;
	return calls_answer(server, channel, incoming);
}

/* Send the next part of the first message of the queue. */
static int
write_binary(Channel *channel)
{
	Buffer *message = channel->queue;
	size_t len = message->end - message->at;
	bool is_first = !message->is_begun;
	bool is_last = len <= FRAGMENT;
	int written;

	if (!is_last)
		len = FRAGMENT;
	message->is_begun = true;
	written = lws_write(channel->wsi, message->bytes + message->at, len,
						lws_write_ws_flags(LWS_WRITE_BINARY, is_first, is_last));
	if (written < (int) len)
		return -1;
	message->at += len;
	if (is_last)
	{
		DL_DELETE(channel->queue, message);
		call_sent(message->call);
	}
	return 0;
}

static int
write_text(Channel *channel, const char *text)
{
	unsigned char buffer[LWS_PRE + sizeof(channel->out)];
	size_t size = strlen(text);

	memcpy(buffer + LWS_PRE, text, size);
	return lws_write(channel->wsi, buffer + LWS_PRE, size, LWS_WRITE_TEXT) < (int) size ? -1 : 0;
}

/*
 * Send the close frame ourselves and let the other side hang up: in 4.1
 * lws_close_reason() is lost with libuv.
 */
static int
write_close(Channel *channel)
{
	unsigned char buffer[LWS_PRE + 2];

	if (channel->is_closed)
		return 0;
	channel->is_closed = true;
	buffer[LWS_PRE] = (unsigned char) (channel->close_code >> 8);
	buffer[LWS_PRE + 1] = (unsigned char) channel->close_code;
	lws_set_timeout(channel->wsi, PENDING_TIMEOUT_CLOSE_ACK, CLOSE_WAIT_S);
	return lws_write(channel->wsi, buffer + LWS_PRE, 2, WRITE_CLOSE) < 2 ? -1 : 0;
}

/* Send one thing of what there is to send; text goes first, but not into the middle of something. */
static int
write_next(Channel *channel)
{
	const Peer *peer = lws_get_opaque_user_data(channel->wsi);
	/* those of a VM at a cable go by that */
	bool has_message = channel->queue != NULL && !peer->is_vm;
	bool in_message = has_message && channel->queue->is_begun;
	char text[sizeof(channel->out)];
	int result;

	if (channel->is_cut)
		channel->out[0] = '\0';
	if (channel->out[0] != '\0' && !in_message)
	{
		memcpy(text, channel->out, sizeof(text));
		channel->out[0] = '\0';
		result = write_text(channel, text);
	}
	else if (channel->close_code != 0 && (channel->out[0] == '\0' || !in_message))
		return write_close(channel);
	else if (channel->tells_claim && !in_message)
	{
		channel->tells_claim = false;
		result = write_text(channel, "{\"type\": \"claimed\"}");
	}
	else if (channel->notes != NULL && !in_message)
	{
		Note *note = channel->notes;

		LL_DELETE(channel->notes, note);
		channel->notes_count--;
		snprintf(text, sizeof(text), "{\"type\": \"noted\", \"command\": \"%s\"}", note->command);
		free(note);
		result = write_text(channel, text);
	}
	else if (has_message)
		result = write_binary(channel);
	else
		return 0;
	if (result == 0 &&
		(channel->out[0] != '\0' || channel->close_code != 0 || channel->tells_claim ||
		 channel->notes != NULL || (channel->queue != NULL && !peer->is_vm)))
		lws_callback_on_writable(channel->wsi);
	return result;
}

/* lws_return_http_status() would speak HTTP/1.0 at this stage. */
void
refuse_upgrade(struct lws *wsi, int status)
{
	unsigned char buffer[LWS_PRE + 128];
	int len = snprintf((char *) buffer + LWS_PRE, 128,
					   "HTTP/1.1 %d Refused\r\nContent-Length: 0\r\nConnection: close\r\n%s\r\n",
					   status, status == 503 || status == 429 ? "Retry-After: 5\r\n" : "");

	server_of(wsi)->counts.answers[status]++;
	(void) lws_write(wsi, buffer + LWS_PRE, (size_t) len, LWS_WRITE_HTTP_HEADERS);
}

int
channel_callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in,
				 size_t len)
{
	Server *server = server_of(wsi);
	Channel *channel = user;

	switch (reason)
	{
		case LWS_CALLBACK_FILTER_PROTOCOL_CONNECTION:
		{
			char path[64];
			uint8_t hash[HASH_LEN];
			int status = 0;

			if (lws_hdr_copy(wsi, path, sizeof(path), WSI_TOKEN_GET_URI) <= 0 ||
				strcmp(path, PROTOCOL_CHANNEL) != 0)
				status = 404;
			else if (server->draining)
				status = 503;
			else
				status = check_token(server, wsi, true, hash);
			if (status == 0)
				return 0;
			refuse_upgrade(wsi, status);
			return -1;
		}

		case LWS_CALLBACK_ADD_HEADERS:
		{
			struct lws_process_html_args *headers = in;
			unsigned char *at = (unsigned char *) headers->p;
			int failed = add_date(wsi, &at, at + headers->max_len);

			headers->max_len -= (int) (at - (unsigned char *) headers->p);
			headers->p = (char *) at;
			return failed;
		}

		case LWS_CALLBACK_ESTABLISHED:
			memset(channel, 0, sizeof(*channel));
			channel->wsi = wsi;
			channel->server = server;
			channel->allowance = FRAMES_PER_SECOND;
			channel->allowed_at = uv_now(server->loop);
			server->counts.channels++;
			if (!read_token(wsi, channel->hash))
			{
				send_frame(channel, "", PROTOCOL_CLOSE_UNKNOWN);
				return 0;
			}
			if (!wait_for_turn(server, wsi, true, channel->hash, &channel->turn, authenticate,
							   channel))
				authenticate(channel, true);
			return 0;

		case LWS_CALLBACK_RECEIVE:
			if (channel->close_code != 0)
				return 0;
			if (lws_frame_is_binary(wsi))
			{
				int code = take_binary(channel, in, len);

				if (code != 0)
					send_frame(channel, "", code);
				return 0;
			}
			if (too_many_frames(channel))
			{
				send_frame(channel, "", LWS_CLOSE_STATUS_POLICY_VIOLATION);
				return 0;
			}
			if (lws_is_first_fragment(wsi))
				channel->frame_len = channel->frame_parts = 0;
			channel->frame_parts++;
			if (channel->frame_len + len > sizeof(channel->frame))
			{
				send_frame(channel, "", LWS_CLOSE_STATUS_MESSAGE_TOO_LARGE);
				return 0;
			}
			memcpy(channel->frame + channel->frame_len, in, len);
			channel->frame_len += len;
			if (lws_is_final_fragment(wsi) && lws_remaining_packet_payload(wsi) == 0)
			{
				int code = channel_frame(channel);

				if (code != 0)
					send_frame(channel, "", code);
			}
			return 0;

		case LWS_CALLBACK_SERVER_WRITEABLE:
			return write_next(channel);

		case LWS_CALLBACK_TIMER:
			if (channel->server != NULL && channel->incoming != NULL)
				channel_close(channel, LWS_CLOSE_STATUS_POLICY_VIOLATION);
			return 0;

		case LWS_CALLBACK_CLOSED:
			if (channel->server == NULL)
				return 0; /* it was refused */
			server->counts.channels--;
			if (channel->waiting != NULL)
				request_forget(channel->waiting);
			channel->waiting = NULL;
			leave_queue(server, &channel->turn);
			if (channel->session != NULL)
				session_detach(channel->session, channel);
			let_go(channel);
			while (channel->notes != NULL)
			{
				Note *note = channel->notes;

				LL_DELETE(channel->notes, note);
				free(note);
			}
			return 0;

		default:
			/* connections are counted for all protocols in one place */
			if (reason == LWS_CALLBACK_WSI_DESTROY)
				return http_callback(wsi, reason, NULL, in, len);
			return 0;
	}
}
