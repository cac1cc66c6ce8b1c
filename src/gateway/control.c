/*-------------------------------------------------------------------------
 *
 * control.c
 *		The control listener: what backends of the database ask of the VMs.
 *
 * A libwebsockets context of its own, not only a vhost: 4.1 lets a request's Host
 * choose among the vhosts of a context, so that what comes to one listener could
 * have itself served by the other.
 *
 * Reaching the listener is not enough: each request carries a ticket that only
 * somebody with the server's master key can make, for this session, this command
 * and this very message, and for a minute.  What is made with another key that the
 * server has by now is asked for; a key is asked for anew when it is old, since it
 * may have been taken out of the server's file.
 *
 *-------------------------------------------------------------------------
 */
#include <ctype.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utlist.h>

#include "../common/log.h"
#include "listener.h"
#include "server_private.h"

#define MAX_CONNECTIONS 1000
#define PIECE (64 * 1024) /* of an answer, that are written at once */
#define KEEPALIVE_S 600
#define TICKET_S 60		   /* how far ahead a ticket may end */
#define KEY_FRESH_MS 60000 /* for so long, a key is taken to be good */
#define ASK_MS 1000		   /* keys are asked for no more often */
#define LOG_MS 1000		   /* nor are bad tickets logged */
#define MAX_KEYS 4
#define MAX_KEY_ID 64 /* bytes */
#define KEY_LEN 32
#define TEXT_OID 25 /* catalog/pg_type.dat */

typedef struct Ticket
{
	char key_id[MAX_KEY_ID + 1];
	int64_t expires;
	char expires_text[21];
	unsigned char mac[HASH_LEN];
} Ticket;

typedef struct ControlKey
{
	char id[MAX_KEY_ID + 1]; /* empty: none */
	unsigned char bytes[KEY_LEN];
	uint64_t asked_at;
} ControlKey;

typedef enum Phase
{
	PHASE_IDLE,
	PHASE_BODY,	   /* it comes */
	PHASE_WAITING, /* for a key */
	PHASE_CALL,
	PHASE_ANSWERED
} Phase;

/* A connection, with the request that it has. */
typedef struct Connection
{
	Server *server;
	struct lws *wsi;
	Phase phase;
	bool is_whole;		  /* the request has arrived */
	uint64_t whole_round; /* of the loop, in which it has */
	bool headers_sent;
	bool closes;   /* after the answer */
	size_t length; /* of the body */
	Buffer *body;
	char session[37];
	Ticket ticket;
	Call *call;
	Owner owner;
	int status; /* of the answer; in PHASE_BODY: with which it is refused when it is whole, or 0 */
	Buffer *answer; /* with 200 */
	struct Connection *prev, *next;
} Connection;

typedef struct Control
{
	struct lws_vhost *vhost;
	struct lws_protocols protocols[2];
	Listener *listener;
	char path[MAX_CONTROL_PATH + 1]; /* of its socket; empty: it has none */
	struct stat file;
	Connection *all;
	ControlKey keys[MAX_KEYS];
	bool is_asking;
	bool has_none;				/* the last answer was that there are no keys for us */
	char asked[MAX_KEY_ID + 1]; /* for this one; empty: for the current one */
	uint64_t current_asked_at, other_asked_at;
	uint64_t logged_at;
} Control;

int
control_max_connections(const Options *options, rlim_t descriptors)
{
	if (options->control == NULL)
		return 0;
	return descriptors / 4 < MAX_CONNECTIONS ? (int) (descriptors / 4) : MAX_CONNECTIONS;
}

/* ---- answers ---- */

static const char *
reason_phrase(int status)
{
	switch (status)
	{
		case 400:
			return "bad request";
		case 401:
			return "bad ticket";
		case 404:
			return "no such path, or the session has no channel here";
		case 405:
			return "wrong method";
		case 408:
			return "too slow";
		case 409:
			return "session is not ready";
		case 410:
			return "session ended";
		case 411:
			return "a length is needed";
		case 413:
			return "too large";
		case 429:
			return "too many calls under way";
		case 502:
			return "channel lost";
		case 504:
			return "no answer";
		default:
			return "try again later";
	}
}

static void
answer(Connection *connection, int status, Buffer *message)
{
	Server *server = connection->server;

	connection->phase = PHASE_ANSWERED;
	connection->status = status;
	connection->answer = message;
	buffer_free(server, connection->body);
	connection->body = NULL;
	server->call_counts.outcomes[status]++;
	if (status == 503 && server->draining)
		owner_gone(server, &connection->owner, true); /* it goes elsewhere with them */
	lws_set_timer_usecs(connection->wsi,
						(lws_usec_t) server->options->request_timeout_s * LWS_USEC_PER_SEC);
	lws_callback_on_writable(connection->wsi);
}

static void
call_done(void *arg, int status, Buffer *message)
{
	Connection *connection = arg;

	connection->call = NULL;
	answer(connection, status, message);
}

/* ---- tickets ---- */

static int
note_bad_ticket(Connection *connection, const char *why)
{
	Server *server = connection->server;
	Control *control = server->control;

	server->call_counts.bad_tickets++;
	if (control->logged_at == 0 || uv_now(server->loop) - control->logged_at >= LOG_MS)
	{
		char count[32];

		snprintf(count, sizeof(count), "%llu",
				 (unsigned long long) server->call_counts.bad_tickets);
		log_line(LOG_LEVEL_WARNING, "bad ticket", "session", connection->session, "reason", why,
				 "so-far", count, NULL);
		control->logged_at = uv_now(server->loop);
	}
	return 401;
}

/* "Ticket KEY-ID:EXPIRES:MAC" */
static bool
read_ticket(struct lws *wsi, Ticket *ticket)
{
	char header[sizeof("Ticket ") + MAX_KEY_ID + 1 + 20 + 1 + 2 * HASH_LEN + 1];
	int len = lws_hdr_copy(wsi, header, sizeof(header), WSI_TOKEN_HTTP_AUTHORIZATION);
	char *key_id = header + strlen("Ticket ");
	char *expires, *mac;

	if (len <= 0 || strncasecmp(header, "Ticket ", 7) != 0)
		return false;
	expires = strchr(key_id, ':');
	mac = expires != NULL ? strchr(expires + 1, ':') : NULL;
	if (mac == NULL)
		return false;
	*expires++ = '\0';
	*mac++ = '\0';
	if (key_id[0] == '\0' || strlen(key_id) > MAX_KEY_ID ||
		strspn(key_id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") !=
			strlen(key_id) ||
		expires[0] == '\0' || strlen(expires) > 15 ||
		strspn(expires, "0123456789") != strlen(expires) || !parse_hash(mac, ticket->mac))
		return false;
	snprintf(ticket->key_id, sizeof(ticket->key_id), "%s", key_id);
	snprintf(ticket->expires_text, sizeof(ticket->expires_text), "%s", expires);
	ticket->expires = strtoll(expires, NULL, 10);
	return true;
}

static bool
is_in_time(Connection *connection)
{
	int64_t now = (int64_t) sessions_time(connection->server->sessions);

	return connection->ticket.expires >= now && connection->ticket.expires <= now + TICKET_S;
}

/* The key is there: do what is asked, if the ticket is for that. */
static void
check_ticket(Connection *connection, const ControlKey *key)
{
	Server *server = connection->server;
	Buffer *body = connection->body;
	unsigned char hash[HASH_LEN], mac[HASH_LEN];
	char hex[2 * HASH_LEN + 1];
	char text[256];
	bool is_good;
	Call *call;
	int i;

	is_good = EVP_Digest(body->bytes + body->at, body->end - body->at, hash, NULL, EVP_sha256(),
						 NULL) == 1;
	call = call_make(server, connection->session, body);
	if (call == NULL)
	{
		answer(connection, 400, NULL);
		return;
	}
	connection->body = NULL;
	for (i = 0; i < HASH_LEN; i++)
		sprintf(hex + 2 * i, "%02x", hash[i]);
	snprintf(text, sizeof(text), "agentvm call\n%s\n%s\n%s\n%s", connection->session,
			 call_command(call), connection->ticket.expires_text, hex);
	is_good = is_good &&
			  HMAC(EVP_sha256(), key->bytes, KEY_LEN, (const unsigned char *) text, strlen(text),
				   mac, NULL) != NULL &&
			  CRYPTO_memcmp(mac, connection->ticket.mac, HASH_LEN) == 0;
	if (!is_good || !is_in_time(connection))
	{
		call_forget(call);
		answer(connection,
			   note_bad_ticket(connection, is_good ? "it has expired" : "it is for something else"),
			   NULL);
		return;
	}
	connection->phase = PHASE_CALL;
	connection->call = call;
	lws_set_timer_usecs(connection->wsi, LWS_SET_TIMER_USEC_CANCEL);
	call_begin(call, &connection->owner, call_done, connection);
}

static const ControlKey *
find_key(Server *server, const char *id)
{
	Control *control = server->control;
	int i;

	for (i = 0; i < MAX_KEYS; i++)
	{
		ControlKey *key = &control->keys[i];

		if (key->id[0] != '\0' && strcmp(key->id, id) == 0 &&
			uv_now(server->loop) - key->asked_at < KEY_FRESH_MS)
			return key;
	}
	return NULL;
}

static void
keep_key(Server *server, const char *id, const char *bytes)
{
	Control *control = server->control;
	ControlKey *place = &control->keys[0];
	int i;

	for (i = 0; i < MAX_KEYS; i++)
	{
		ControlKey *key = &control->keys[i];

		if (strcmp(key->id, id) == 0)
		{
			place = key;
			break;
		}
		if (key->id[0] == '\0' || (place->id[0] != '\0' && key->asked_at < place->asked_at))
			place = key;
	}
	snprintf(place->id, sizeof(place->id), "%s", id);
	memcpy(place->bytes, bytes, KEY_LEN);
	place->asked_at = uv_now(server->loop);
}

static void serve_waiting(Server *server);

static void
key_answered(void *arg, const PGresult *result)
{
	Server *server = arg;
	Control *control = server->control;
	bool is_current = control->asked[0] == '\0';
	Connection *connection, *next;

	control->is_asking = false;
	*(is_current ? &control->current_asked_at : &control->other_asked_at) = uv_now(server->loop);
	if (result != NULL && PQresultStatus(result) == PGRES_TUPLES_OK && PQntuples(result) == 1 &&
		PQgetlength(result, 0, 1) == KEY_LEN)
	{
		keep_key(server, PQgetvalue(result, 0, 0), PQgetvalue(result, 0, 1));
		control->has_none = false;
	}
	else
	{
		const char *state = PQresultErrorField(result, PG_DIAG_SQLSTATE);

		/* a name of somebody's invention, or nothing is to be had at all */
		control->has_none = is_current || state == NULL || strcmp(state, "AV010") != 0;
		if (control->has_none && result != NULL)
			log_line(LOG_LEVEL_WARNING, "tickets cannot be checked", "reason",
					 PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY), NULL);
	}
	if (control->has_none)
	{
		DL_FOREACH_SAFE(control->all, connection, next)
		{
			if (connection->phase == PHASE_WAITING)
				answer(connection, 503, NULL);
		}
	}
	serve_waiting(server);
}

/* Ask for a key, or with NULL for the current one; false: that cannot be now. */
static bool
ask_for_key(Server *server, const char *id)
{
	static const Oid types[] = {TEXT_OID};
	static const int formats[] = {0};
	static const int lengths[] = {0};
	const char *values[] = {id};
	Control *control = server->control;

	if (!control->is_asking)
	{
		snprintf(control->asked, sizeof(control->asked), "%s", id != NULL ? id : "");
		*(id != NULL ? &control->other_asked_at : &control->current_asked_at) =
			uv_now(server->loop);
		control->is_asking = database_send(sessions_database(server->sessions),
										   "SELECT key_id, key FROM agentvm.control_key($1)", 1,
										   types, values, lengths, formats, key_answered, server);
	}
	return control->is_asking;
}

static bool
was_asked(Server *server, uint64_t at)
{
	return at != 0 && uv_now(server->loop) - at < ASK_MS;
}

/*
 * Check the tickets whose keys are there.  For others the current key is asked for,
 * which is the one that they should be of; then that one of them whose turn it is,
 * once a second, so that invented names do not keep the database busy.
 */
static void
serve_waiting(Server *server)
{
	Control *control = server->control;
	Connection *connection, *next;

	DL_FOREACH_SAFE(control->all, connection, next)
	{
		const char *id = connection->ticket.key_id;
		const ControlKey *key;

		if (connection->phase != PHASE_WAITING)
			continue;
		key = find_key(server, id);
		if (key != NULL)
			check_ticket(connection, key);
		else if (control->is_asking)
			continue;
		else if (!was_asked(server, control->current_asked_at))
		{
			if (!ask_for_key(server, NULL))
				answer(connection, 503, NULL);
		}
		else if (was_asked(server, control->other_asked_at))
			answer(connection,
				   control->has_none ? 503 : note_bad_ticket(connection, "its key is not known"),
				   NULL);
		else if (!ask_for_key(server, id))
			answer(connection, 503, NULL);
	}
}

/* The request is whole: check its ticket as soon as its key is there. */
static void
wait_for_key(Connection *connection)
{
	const ControlKey *key = find_key(connection->server, connection->ticket.key_id);

	connection->phase = PHASE_WAITING;
	if (key != NULL)
		check_ticket(connection, key);
	else
		serve_waiting(connection->server);
}

/* ---- requests ---- */

/* The session of "/v1/sessions/SESSION/calls". */
static bool
read_path(const char *path, char *session)
{
	char known[128];

	if (strlen(path) != strlen(PROTOCOL_CALLS) - 2 + 36)
		return false;
	snprintf(session, 37, "%s", path + strcspn(PROTOCOL_CALLS, "%"));
	snprintf(known, sizeof(known), PROTOCOL_CALLS, session);
	return strcmp(path, known) == 0 && is_uuid(session);
}

/* The headers have arrived. */
static void
begin_request(Connection *connection, const char *path)
{
	Server *server = connection->server;
	struct lws *wsi = connection->wsi;
	bool is_post = lws_hdr_total_length(wsi, WSI_TOKEN_POST_URI) > 0;
	long length = body_length(wsi);

	connection->phase = PHASE_BODY;
	connection->is_whole = connection->headers_sent = false;
	connection->session[0] = '\0';
	connection->status = 0;
	server->open_requests++;
	lws_set_timer_usecs(wsi, (lws_usec_t) server->options->request_timeout_s * LWS_USEC_PER_SEC);
	if (length == LENGTH_WRONG)
		answer(connection, 400, NULL);
	else if (!is_post)
		answer(connection, read_path(path, connection->session) ? 405 : 404, NULL);
	else if (length == LENGTH_NONE)
		answer(connection, 411, NULL);
	else if (length == 0)
		answer(connection, 400, NULL); /* while one without a body waits, 4.1 reads in circles */
	else if (length > PROTOCOL_MAX_MESSAGE)
		answer(connection, 413, NULL);
	/* else its body follows, and is let come: who is cut off in sending may not see the answer */
	else if (!read_path(path, connection->session))
		connection->status = 404;
	else if (!read_ticket(wsi, &connection->ticket))
		connection->status = note_bad_ticket(connection, "it is none");
	else if (!is_in_time(connection))
		connection->status = note_bad_ticket(connection, "it has expired");
	else if (server->draining)
		connection->status = 503;
	else
	{
		connection->length = (size_t) length;
		connection->body = buffer_make(server, connection->length);
		if (connection->body == NULL)
			connection->status = 503;
	}
}

static void
end_request(Connection *connection)
{
	if (connection->phase == PHASE_IDLE)
		return;
	connection->phase = PHASE_IDLE;
	connection->server->open_requests--;
	buffer_free(connection->server, connection->body);
	buffer_free(connection->server, connection->answer);
	connection->body = connection->answer = NULL;
}

/* The client is gone, or we end. */
static void
end_connection(Connection *connection)
{
	Server *server = connection->server;

	if (connection->call != NULL)
	{
		server->call_counts.outcomes[499]++;
		call_forget(connection->call);
		connection->call = NULL;
	}
	owner_gone(server, &connection->owner, false);
	end_request(connection);
}

/* Returns -1 where libwebsockets should close the connection. */
static int
write_answer(Connection *connection)
{
	struct lws *wsi = connection->wsi;
	Buffer *message = connection->answer;
	unsigned char buffer[LWS_PRE + 4096];
	unsigned char *at = buffer + LWS_PRE;
	unsigned char *end = buffer + sizeof(buffer);
	char text[128];
	const char *type = message != NULL ? "application/octet-stream" : "application/json";
	size_t len;

	if (connection->phase != PHASE_ANSWERED)
		return 0;
	if (!connection->headers_sent)
	{
		/*
		 * What remains of a request that was refused half-way is not read; and see
		 * may_go_on() in http.c, of what was sent ahead.
		 */
		connection->closes = !connection->is_whole ||
							 connection->whole_round == connection->server->round ||
							 connection->status == 400 || connection->server->draining;
		snprintf(text, sizeof(text), "{\"error\": \"%s\"}", reason_phrase(connection->status));
		len = message != NULL ? message->end - message->at : strlen(text);
		if (!add_headers(wsi, connection->status, type, 1, connection->closes, len, &at, end) ||
			lws_finalize_http_header(wsi, &at, end))
			return -1;
		connection->headers_sent = true;
		/* what is short goes with them, and all is one write */
		if (len <= (size_t) (end - at))
		{
			memcpy(at, message != NULL ? (char *) message->bytes + message->at : text, len);
			at += len;
			if (message != NULL)
				message->at += len;
		}
		len = (size_t) (at - buffer - LWS_PRE);
		if (lws_write(wsi, buffer + LWS_PRE, len, LWS_WRITE_HTTP_HEADERS) < (int) len)
			return -1;
	}
	else
	{
		len = message->end - message->at;
		if (len > PIECE)
			len = PIECE;
		if (lws_write(wsi, message->bytes + message->at, len,
					  len == message->end - message->at ? LWS_WRITE_HTTP_FINAL : LWS_WRITE_HTTP) <
			(int) len)
			return -1;
		message->at += len;
	}
	if (message != NULL && message->at < message->end)
	{
		lws_callback_on_writable(wsi);
		return 0;
	}
	lws_set_timer_usecs(wsi, LWS_SET_TIMER_USEC_CANCEL);
	end_request(connection);
	return connection->closes || lws_http_transaction_completed(wsi) != 0 ? -1 : 0;
}

static int
control_callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in,
				 size_t len)
{
	Server *server = server_of(wsi);
	Connection *connection = NULL;

	switch (reason)
	{
		case LWS_CALLBACK_OPENSSL_LOAD_EXTRA_SERVER_VERIFY_CERTS:
			server->control_tls = user;
			return 0;

		case LWS_CALLBACK_SERVER_NEW_CLIENT_INSTANTIATED:
			connection = calloc(1, sizeof(Connection));
			connection->server = server;
			connection->wsi = wsi;
			DL_APPEND(server->control->all, connection);
			server->call_counts.connections++;
			lws_set_opaque_user_data(wsi, connection);
			return 0;

			/* HTTP/1.1 and nothing else */
		case LWS_CALLBACK_HTTP_CONFIRM_UPGRADE:
		case LWS_CALLBACK_RAW_ADOPT:
		case LWS_CALLBACK_FILTER_PROTOCOL_CONNECTION:
			return -1;

		case LWS_CALLBACK_HTTP:
		case LWS_CALLBACK_HTTP_BODY:
		case LWS_CALLBACK_HTTP_BODY_COMPLETION:
		case LWS_CALLBACK_TIMER:
		case LWS_CALLBACK_HTTP_WRITEABLE:
		case LWS_CALLBACK_CLOSED_HTTP:
		case LWS_CALLBACK_WSI_DESTROY:
			connection = lws_get_opaque_user_data(wsi);
			break;

		default:
			return 0;
	}
	if (connection == NULL)
		return reason == LWS_CALLBACK_HTTP ? -1 : 0;
	switch (reason)
	{
			/* see http.c: a request before the answer to the one before */
		case LWS_CALLBACK_HTTP:
			if (connection->phase != PHASE_IDLE)
				return -1;
			begin_request(connection, in);
			return 0;

		case LWS_CALLBACK_HTTP_BODY:
			if (connection->phase == PHASE_IDLE || connection->is_whole)
				return -1;
			if (connection->phase != PHASE_BODY || connection->status != 0)
				return 0;
			if (connection->body->end - connection->body->at + len > connection->length)
				return -1;
			memcpy(connection->body->bytes + connection->body->end, in, len);
			connection->body->end += len;
			return 0;

		case LWS_CALLBACK_HTTP_BODY_COMPLETION:
			if (connection->phase == PHASE_IDLE || connection->is_whole)
				return -1;
			connection->is_whole = true;
			connection->whole_round = server->round;
			if (connection->phase == PHASE_BODY && connection->status != 0)
				answer(connection, connection->status, NULL);
			else if (connection->phase == PHASE_BODY)
				wait_for_key(connection);
			return 0;

		case LWS_CALLBACK_TIMER:
			if (connection->phase == PHASE_ANSWERED)
				return -1; /* it does not read its answer */
			if (connection->phase == PHASE_BODY)
				answer(connection, 408, NULL);
			return 0;

		case LWS_CALLBACK_HTTP_WRITEABLE:
			return write_answer(connection);

		case LWS_CALLBACK_CLOSED_HTTP:
			end_connection(connection);
			return 0;

		default:
			end_connection(connection);
			DL_DELETE(server->control->all, connection);
			server->call_counts.connections--;
			lws_set_opaque_user_data(wsi, NULL);
			free(connection);
			return 0;
	}
}

/* ---- life ---- */

static void
take_connection(void *arg, int fd)
{
	static const int on = 1, idle_s = 10, interval_s = 5, count = 3;
	Server *server = arg;

	if (server->draining ||
		server->call_counts.connections >=
			(unsigned) control_max_connections(server->options, server->descriptors))
	{
		close(fd);
		return;
	}
	if (server->control->path[0] == '\0')
	{
		/* a client whose host dies does not say so, and its commands are to be killed */
		(void) setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
		(void) setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
		(void) setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
		(void) setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
	}
	(void) lws_adopt_socket_vhost(server->control->vhost, fd); /* closes it if it cannot */
}

bool
control_create(Server *server)
{
	const char *address = NULL;
	int port = 0;
	int kind = options_control(server->options, &address, &port);
	void *loops[] = {server->loop};
	struct lws_context_creation_info info;
	Control *control;
	int fd;

	if (kind == 0)
		return true;
	fd = kind == 'u' ? listen_on_path(address) : listen_on(address, port);
	if (fd < 0)
	{
		log_line(LOG_LEVEL_ERROR, "cannot listen", "control", server->options->control, "reason",
				 strerror(errno), NULL);
		return false;
	}
	control = server->control = calloc(1, sizeof(Control));
	if (kind == 'u')
	{
		snprintf(control->path, sizeof(control->path), "%s", address);
		(void) lstat(control->path, &control->file);
	}
	control->protocols[0] = (struct lws_protocols){.name = "calls", .callback = control_callback};
	fill_context_info(server, &info, loops, kind == 't');
	info.protocols = control->protocols;
	info.pt_serv_buf_size = SERVICE_BUFFER;
	info.timeout_secs += 5; /* we tell it before */
	info.keepalive_timeout = KEEPALIVE_S;
	info.max_http_header_pool2 = MAX_CONNECTIONS;
	info.fd_limit_per_thread = MAX_CONNECTIONS + SPARE_DESCRIPTORS;
	server->control_context = lws_create_context(&info);
	if (server->control_context != NULL)
		control->vhost = lws_create_vhost(server->control_context, &info);
	if (control->vhost == NULL)
	{
		log_line(LOG_LEVEL_ERROR, "cannot serve", "control", server->options->control, NULL);
		close(fd);
		return false;
	}
	control->listener = listener_create(server->loop, fd, take_connection, server);
	log_line(LOG_LEVEL_INFO, "listening", "control", server->options->control, NULL);
	return true;
}

void
control_destroy(Server *server)
{
	Control *control = server->control;
	Connection *connection;
	struct stat now;

	if (control == NULL)
		return;
	/* what they own is not given up by them, but by us: it has its leases */
	DL_FOREACH(control->all, connection)
	{
		if (connection->call != NULL)
			call_forget(connection->call);
		connection->call = NULL;
		owner_gone(server, &connection->owner, true);
	}
	listener_destroy(control->listener);
	if (control->path[0] != '\0' && lstat(control->path, &now) == 0 &&
		now.st_dev == control->file.st_dev && now.st_ino == control->file.st_ino)
		(void) unlink(control->path);
	lws_context_destroy(server->control_context);
	OPENSSL_cleanse(control->keys, sizeof(control->keys));
	free(control);
	server->control = NULL;
}

void
control_up(Server *server)
{
	/* so that the first call need not wait, and what is wrong is in the log before */
	if (server->control != NULL)
		(void) ask_for_key(server, NULL);
}
