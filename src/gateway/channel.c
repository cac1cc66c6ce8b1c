/*-------------------------------------------------------------------------
 *
 * channel.c
 *		The WebSocket of a session.
 *
 *-------------------------------------------------------------------------
 */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "../common/log.h"
#include "server_private.h"

#define CLOSE_WAIT_S 3							  /* for the other side to hang up */
#define FRAMES_PER_SECOND 20					  /* of one channel, with as much burst */
#define WRITE_CLOSE ((enum lws_write_protocol) 4) /* the one that lws-write.h keeps back */

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
	double allowance; /* frames that may come now */
	uint64_t allowed_at;
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
	before = session_attach(session, channel);
	if (before != NULL && before != channel)
	{
		before->session = NULL;
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

	channel->session = NULL;
	send_frame(channel, "{\"type\": \"gone\"}", PROTOCOL_CLOSE_GONE);
}

/* The gateway is to end: another one will do. */
void
channel_drain(void *attached)
{
	Channel *channel = attached;

	send_frame(channel, "", PROTOCOL_CLOSE_AWAY);
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
			if (too_many_frames(channel))
			{
				send_frame(channel, "", LWS_CLOSE_STATUS_POLICY_VIOLATION);
				return 0;
			}
			if (lws_is_first_fragment(wsi))
				channel->frame_len = 0;
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
			if (channel->out[0] != '\0')
			{
				unsigned char buffer[LWS_PRE + sizeof(channel->out)];
				size_t size = strlen(channel->out);

				memcpy(buffer + LWS_PRE, channel->out, size);
				channel->out[0] = '\0';
				if (lws_write(wsi, buffer + LWS_PRE, size, LWS_WRITE_TEXT) < (int) size)
					return -1;
				if (channel->close_code != 0)
					lws_callback_on_writable(wsi);
				return 0;
			}
			if (channel->close_code != 0)
				return write_close(channel);
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
			channel->session = NULL;
			return 0;

		default:
			/* connections are counted for all protocols in one place */
			if (reason == LWS_CALLBACK_WSI_DESTROY)
				return http_callback(wsi, reason, NULL, in, len);
			return 0;
	}
}
