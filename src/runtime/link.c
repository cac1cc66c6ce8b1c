/*-------------------------------------------------------------------------
 *
 * link.c
 *		Requests to the gateway, and the channel: HTTP and WebSocket by libwebsockets.
 *
 * The name is resolved first (resolve.h); libwebsockets gets an address, and the
 * name for Host and for TLS.  An address that does not answer is followed by the
 * next one.  Where the gateway is at the other end of a device, the address is that
 * of relay.h.  Answers and frames are bounded, and so is what waits to be sent;
 * redirects are not followed.
 *
 *-------------------------------------------------------------------------
 */
#include "link.h"

#include <libwebsockets.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../common/log.h"
#include "../protocol.h"
#include "answer.h"
#include "loop.h"
#include "relay.h"
#include "resolve.h"
#include "tls.h"

#define MAX_RETRY_AFTER_S 300
#define MAX_CALL (PROTOCOL_MAX_MESSAGE + 4)
#define MAX_TEXTS 4				/* that wait */
#define MAX_WAITING MAX_CALL	/* bytes of binary frames that wait, before one more */
#define BUFFER_SIZE (32 * 1024) /* for what is read at once */

/* A frame to be sent */
typedef struct Outgoing
{
	lws_dll2_t list;
	void *memory;
	char *bytes; /* in it, with room for libwebsockets before */
	size_t len;
} Outgoing;

struct Link
{
	bool is_channel;
	bool opened;
	char *path;
	char *authorization;
	char *body;				/* of a request */
	lws_dll2_owner_t texts; /* of a channel: frames that wait */
	lws_dll2_owner_t calls;
	size_t calls_len;
	LinkAnswered answered;
	const ChannelEvents *events;
	void *arg;

	Resolve *resolve;
	Addresses addresses;
	int next_address;
	struct lws *wsi;
	Timer timeout;
	Timer end; /* ends are told from here, never from within libwebsockets */
	int status;
	int close_code;
	int64_t date;
	int64_t retry_after_ms;
	bool complete;
	char problem[160];
	char *in;
	size_t in_len;
	size_t in_room;
};

static const Settings *settings;
static Link *on_cable; /* the channel whose calls go by the cable, or NULL */

static void
free_frame(Outgoing *frame)
{
	lws_dll2_remove(&frame->list);
	free(frame->memory);
	free(frame);
}

static void
free_frames(lws_dll2_owner_t *frames)
{
	while (frames->head != NULL)
		free_frame(lws_container_of(frames->head, Outgoing, list));
}

/* Let go of what has arrived. */
static void
let_go(Link *link)
{
	if (link->in != NULL)
		OPENSSL_cleanse(link->in, link->in_room);
	free(link->in);
	link->in = NULL;
	link->in_len = link->in_room = 0;
}

static void
free_link(Link *link)
{
	timer_stop(&link->timeout);
	timer_stop(&link->end);
	if (link == on_cable)
		on_cable = NULL;
	if (link->resolve != NULL)
		resolve_cancel(link->resolve);
	if (link->wsi != NULL)
	{
		/* it closes in its own time, and nobody listens any more */
		lws_set_wsi_user(link->wsi, NULL);
		lws_set_timeout(link->wsi, PENDING_TIMEOUT_USER_OK, LWS_TO_KILL_ASYNC);
	}
	let_go(link);
	OPENSSL_cleanse(link->authorization, strlen(link->authorization));
	free(link->authorization);
	free_frames(&link->texts);
	free_frames(&link->calls);
	free(link->body);
	free(link->path);
	free(link);
}

static void
tell_end(void *arg)
{
	Link *link = arg;
	const ChannelEvents *events = link->events;
	LinkAnswered answered = link->answered;
	void *whose = link->arg;
	Answer answer = {0};
	char problem[sizeof(link->problem)];
	int code = link->close_code;

	if (link->is_channel)
	{
		memcpy(problem, link->problem, sizeof(problem));
		free_link(link);
		events->closed(whose, code, problem);
		return;
	}
	answer.status = link->complete ? link->status : 0;
	answer.problem = link->problem;
	answer.body = link->in ? link->in : "";
	answer.len = link->in_len;
	answer.date = link->date;
	answer.retry_after_ms = link->retry_after_ms;
	answered(whose, &answer);
	free_link(link);
}

/* It is over: of several reasons the first one counts. */
static void
end(Link *link, const char *problem)
{
	if (link->problem[0] == '\0' && problem != NULL)
		snprintf(link->problem, sizeof(link->problem), "%s", problem);
	timer_set(&link->end, 0, tell_end, link);
}

static void connect_next(Link *link);

static void
on_timeout(void *arg)
{
	end(arg, "timeout");
}

static void
on_resolved(void *arg, const Addresses *addresses, const char *problem)
{
	Link *link = arg;

	link->resolve = NULL;
	link->addresses = *addresses;
	if (problem != NULL)
	{
		char text[sizeof(link->problem)];

		snprintf(text, sizeof(text), "host name cannot be resolved: %s", problem);
		end(link, text);
		return;
	}
	connect_next(link);
}

static void
try_next_address(void *arg)
{
	connect_next(arg);
}

/* One address has not worked. */
static void
connection_failed(Link *link, const char *why)
{
	link->wsi = NULL;
	log_line(LOG_LEVEL_DEBUG, "connection failed", "address",
			 link->addresses.text[link->next_address - 1], "reason", why, NULL);
	/* unless its time is up already */
	if (link->problem[0] == '\0' && link->next_address < link->addresses.count)
		timer_set(&link->end, 0, try_next_address, link);
	else
		end(link, why);
}

static void
connect_next(Link *link)
{
	struct lws_client_connect_info info;
	const char *address = link->addresses.text[link->next_address++];
	char host[sizeof(settings->host) + 16];
	bool brackets = strchr(settings->host, ':') != NULL;

	snprintf(host, sizeof(host), "%s%s%s:%d", brackets ? "[" : "", settings->host,
			 brackets ? "]" : "", settings->port);
	if (settings->port == (settings->tls ? 443 : 80))
		*strrchr(host, ':') = '\0';
	memset(&info, 0, sizeof(info));
	info.context = loop_context();
	info.address = address;
	info.port = settings->port;
	info.path = link->path;
	info.host = host;
	info.alpn = "http/1.1";
	info.userdata = link;
	info.pwsi = &link->wsi;
	if (settings->tls)
		/* the certificate's name is tls.c's business */
		info.ssl_connection = LCCSCF_USE_SSL | LCCSCF_SKIP_SERVER_CERT_HOSTNAME_CHECK;
	info.ssl_connection |= LCCSCF_HTTP_NO_FOLLOW_REDIRECT;
	if (link->is_channel)
	{
		info.protocol = PROTOCOL_NAME;
		info.local_protocol_name = PROTOCOL_NAME;
	}
	else
	{
		info.method = "POST";
		info.protocol = NULL;
		info.local_protocol_name = "http";
	}
	/* on failure the callback may have been called with the reason, or not */
	if (lws_client_connect_via_info(&info) == NULL && !timer_is_set(&link->end))
		connection_failed(link, "no connection could be begun");
}

static Link *
make_link(const char *path, const char *token, void *arg)
{
	Link *link = calloc(1, sizeof(Link));
	size_t len = strlen(token) + sizeof("Bearer ");

	link->path = malloc(strlen(settings->prefix) + strlen(path) + 1);
	strcpy(link->path, settings->prefix);
	strcat(link->path, path);
	link->authorization = malloc(len);
	snprintf(link->authorization, len, "Bearer %s", token);
	link->arg = arg;
	link->date = NO_TIME;
	if (settings->gateway_device != NULL)
	{
		link->addresses.count = 1;
		snprintf(link->addresses.text[0], ADDRESS_LEN, "%s", relay_address());
		timer_set(&link->end, 0, try_next_address, link);
	}
	else
		link->resolve = resolve_start(settings->host, on_resolved, link);
	timer_set(&link->timeout, settings->http_timeout_ms, on_timeout, link);
	return link;
}

Link *
link_post(const char *path, const char *token, const char *body, LinkAnswered answered, void *arg)
{
	Link *link = make_link(path, token, arg);

	link->body = strdup(body);
	link->answered = answered;
	return link;
}

Link *
link_channel(const char *path, const char *token, const ChannelEvents *events, void *arg)
{
	Link *link = make_link(path, token, arg);

	link->is_channel = true;
	link->events = events;
	return link;
}

/* Have a frame sent, whose memory becomes ours; false when there is none for more. */
static bool
add_frame(Link *link, lws_dll2_owner_t *frames, void *memory, char *bytes, size_t len)
{
	Outgoing *frame = memory != NULL ? calloc(1, sizeof(Outgoing)) : NULL;

	if (frame == NULL)
	{
		free(memory);
		return false;
	}
	frame->memory = memory;
	frame->bytes = bytes;
	frame->len = len;
	lws_dll2_add_tail(&frame->list, frames);
	lws_callback_on_writable(link->wsi);
	return true;
}

bool
link_send(Link *link, const char *text)
{
	size_t len = strlen(text);
	char *memory;

	if (link->wsi == NULL || !link->opened || link->texts.count >= MAX_TEXTS)
		return false;
	memory = malloc(LWS_PRE + len);
	if (memory == NULL)
		return false;
	memcpy(memory + LWS_PRE, text, len);
	return add_frame(link, &link->texts, memory, memory + LWS_PRE, len);
}

bool
link_is_free(const Link *link)
{
	return link->texts.head == NULL;
}

bool
link_has_room(const Link *link)
{
	return link->wsi != NULL && link->opened &&
		   (link == on_cable ? relay_waiting() : link->calls_len) < MAX_WAITING;
}

void
link_call(Link *link, void *memory, char *bytes, size_t len)
{
	_Static_assert(LINK_ROOM >= LWS_PRE, "room for libwebsockets");
	if (link == on_cable)
		relay_send(memory, bytes, len);
	else if (add_frame(link, &link->calls, memory, bytes, len))
		link->calls_len += len;
}

static void
cable_message_came(const char *bytes, size_t len)
{
	if (on_cable != NULL && !timer_is_set(&on_cable->end))
		on_cable->events->call(on_cable->arg, bytes, len);
}

static void
cable_message_sent(void)
{
	if (on_cable != NULL)
		on_cable->events->sent(on_cable->arg);
}

void
link_use_cable(Link *link)
{
	static const RelayEvents events = {cable_message_came, cable_message_sent};

	if (settings->gateway_device == NULL || !link_send(link, "{\"type\": \"cable\"}"))
		return;
	on_cable = link;
	relay_take_messages(&events, MAX_CALL);
}

void
link_drop(Link *link)
{
	free_link(link);
}

/* ---- libwebsockets' side ---- */

static int64_t
date_of(struct lws *wsi)
{
	char text[64];

	return lws_hdr_copy(wsi, text, sizeof(text), WSI_TOKEN_HTTP_DATE) > 0 ? parse_http_date(text)
																		  : NO_TIME;
}

/* Keep what has arrived, "more" of which will follow at once; false when it is too much. */
static bool
take(Link *link, const void *bytes, size_t len, size_t more, size_t max)
{
	if (len > max - link->in_len || more > max - link->in_len - len)
		return false;
	if (link->in_len + len + 1 > link->in_room)
	{
		size_t room = more > 0 ? link->in_len + len + more + 1 : (link->in_len + len + 1) * 2;
		char *new = malloc(room);

		if (new == NULL)
			return false;
		memcpy(new, link->in ? link->in : "", link->in_len);
		if (link->in != NULL)
			OPENSSL_cleanse(link->in, link->in_room);
		free(link->in);
		link->in = new;
		link->in_room = room;
	}
	memcpy(link->in + link->in_len, bytes, len);
	link->in_len += len;
	link->in[link->in_len] = '\0';
	return true;
}

/* A part of a frame has come. */
static void
take_frame(Link *link, struct lws *wsi, const void *bytes, size_t len)
{
	bool is_call = lws_frame_is_binary(wsi) != 0;

	if (timer_is_set(&link->end))
		return;
	if (lws_is_first_fragment(wsi))
		link->in_len = 0;
	if (!take(link, bytes, len, lws_remaining_packet_payload(wsi),
			  is_call ? MAX_CALL : PROTOCOL_MAX_FRAME))
	{
		/*
		 * Whoever tells libwebsockets so in the middle of a frame, with a reason, has
		 * it write the rest beyond the end of its buffer.
		 */
		end(link, "frame is too large");
		return;
	}
	if (!lws_is_final_fragment(wsi) || lws_remaining_packet_payload(wsi) != 0)
		return;
	if (!is_call)
		link->events->frame(link->arg, link->in, link->in_len);
	else
	{
		link->events->call(link->arg, link->in, link->in_len);
		let_go(link); /* few are as large */
	}
}

/* Send a frame: text goes before calls, and each goes whole. */
static int
write_frame(Link *link, struct lws *wsi)
{
	bool is_text = link->texts.head != NULL;
	lws_dll2_t *first = is_text ? link->texts.head : link->calls.head;
	Outgoing *frame;
	int n;

	if (first == NULL)
		return 0;
	frame = lws_container_of(first, Outgoing, list);
	n = lws_write(wsi, (unsigned char *) frame->bytes, frame->len,
				  is_text ? LWS_WRITE_TEXT : LWS_WRITE_BINARY);
	if (n < (int) frame->len)
		return -1;
	if (!is_text)
		link->calls_len -= frame->len;
	free_frame(frame);
	link->events->sent(link->arg);
	if (link->texts.head != NULL || link->calls.head != NULL)
		lws_callback_on_writable(wsi);
	return 0;
}

static int
add_headers(Link *link, struct lws *wsi, unsigned char **at, unsigned char *limit)
{
	static const char type[] = "application/json";
	char len[24];

	if (lws_add_http_header_by_token(wsi, WSI_TOKEN_HTTP_AUTHORIZATION,
									 (unsigned char *) link->authorization,
									 (int) strlen(link->authorization), at, limit))
		return -1;
	if (link->is_channel)
		return 0;
	snprintf(len, sizeof(len), "%zu", strlen(link->body));
	if (lws_add_http_header_by_token(wsi, WSI_TOKEN_HTTP_CONTENT_TYPE, (const unsigned char *) type,
									 sizeof(type) - 1, at, limit) ||
		lws_add_http_header_by_token(wsi, WSI_TOKEN_HTTP_CONTENT_LENGTH, (unsigned char *) len,
									 (int) strlen(len), at, limit))
		return -1;
	lws_client_http_body_pending(wsi, 1);
	lws_callback_on_writable(wsi);
	return 0;
}

/* Write the body, whole: it is far smaller than what is buffered. */
static int
write_body(Link *link, struct lws *wsi)
{
	size_t len = strlen(link->body);
	unsigned char *buffer = malloc(LWS_PRE + len);
	int n;

	memcpy(buffer + LWS_PRE, link->body, len);
	n = lws_write(wsi, buffer + LWS_PRE, len, LWS_WRITE_HTTP_FINAL);
	free(buffer);
	return n < (int) len ? -1 : 0;
}

static int
callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in, size_t len)
{
	Link *link = user;

	if (reason == LWS_CALLBACK_RAW_RX_FILE)
	{
		loop_events();
		return 0;
	}
	/* what is not one of ours any more is on its way out */
	if (link == NULL)
		return reason == LWS_CALLBACK_RECEIVE_CLIENT_HTTP || reason == LWS_CALLBACK_CLIENT_RECEIVE
				   ? -1
				   : 0;

	switch (reason)
	{
		case LWS_CALLBACK_CLIENT_APPEND_HANDSHAKE_HEADER:
		{
			unsigned char **at = in;

			return add_headers(link, wsi, at, *at + len);
		}

		case LWS_CALLBACK_CLIENT_CONNECTION_ERROR:
			connection_failed(link, in ? in : "no connection");
			return 0;

			/* requests */

		case LWS_CALLBACK_CLIENT_HTTP_WRITEABLE:
			lws_client_http_body_pending(wsi, 0);
			return write_body(link, wsi);

		case LWS_CALLBACK_ESTABLISHED_CLIENT_HTTP:
		{
			char text[16];

			link->status = (int) lws_http_client_http_response(wsi);
			link->date = date_of(wsi);
			if (lws_hdr_copy(wsi, text, sizeof(text), WSI_TOKEN_HTTP_RETRY_AFTER) > 0)
			{
				long seconds = atol(text);

				link->retry_after_ms =
					seconds > 0
						? LWS_MS_PER_SEC *
							  (int64_t) (seconds < MAX_RETRY_AFTER_S ? seconds : MAX_RETRY_AFTER_S)
						: 0;
			}
			return 0;
		}

		case LWS_CALLBACK_RECEIVE_CLIENT_HTTP:
		{
			char buffer[LWS_PRE + 4096];
			char *at = buffer + LWS_PRE;
			int room = sizeof(buffer) - LWS_PRE;
			int result = lws_http_client_read(wsi, &at, &room);

			OPENSSL_cleanse(buffer, sizeof(buffer));
			return result < 0 ? -1 : 0;
		}

		case LWS_CALLBACK_RECEIVE_CLIENT_HTTP_READ:
			if (take(link, in, len, 0, PROTOCOL_MAX_ANSWER))
				return 0;
			end(link, "answer is too large");
			return -1;

		case LWS_CALLBACK_COMPLETED_CLIENT_HTTP:
			link->complete = true;
			return -1; /* one request, one connection */

		case LWS_CALLBACK_CLOSED_CLIENT_HTTP:
			link->wsi = NULL;
			end(link, "connection was closed before the answer's end");
			return 0;

			/* the channel */

		case LWS_CALLBACK_CLIENT_FILTER_PRE_ESTABLISH:
			link->date = date_of(wsi);
			return 0;

		case LWS_CALLBACK_CLIENT_ESTABLISHED:
			link->opened = true;
			timer_stop(&link->timeout);
			link->events->opened(link->arg, link->date);
			return 0;

		case LWS_CALLBACK_CLIENT_WRITEABLE:
			return write_frame(link, wsi);

		case LWS_CALLBACK_CLIENT_RECEIVE:
			take_frame(link, wsi, in, len);
			return 0;

		case LWS_CALLBACK_WS_PEER_INITIATED_CLOSE:
			if (len >= 2)
				link->close_code = ((unsigned char *) in)[0] << 8 | ((unsigned char *) in)[1];
			return 0;

		case LWS_CALLBACK_CLIENT_CLOSED:
			link->wsi = NULL;
			end(link, link->close_code != 0 ? "closed by the gateway" : "connection was lost");
			return 0;

		default:
			return 0;
	}
}

static const struct lws_protocols protocols[] = {
	{"http", callback, 0, 0, 0, NULL, 0},
	{PROTOCOL_NAME, callback, 0, BUFFER_SIZE, 0, NULL, MAX_CALL + LWS_PRE},
	{NULL, NULL, 0, 0, 0, NULL, 0},
};

const char *
link_setup(const Settings *with)
{
	SSL_CTX *tls = NULL;
	const char *problem = NULL;

	settings = with;
	if (settings->tls && (tls = tls_create(settings, &problem)) == NULL)
		return problem;
	return loop_create(protocols, tls) ? NULL : "no event loop";
}
