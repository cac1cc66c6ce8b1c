/*-------------------------------------------------------------------------
 *
 * http.c
 *		Requests: bootstrap, heartbeats, and what operators ask.
 *
 * An answer from the database may come when its client has gone: then it is for
 * nobody (request_forget).
 *
 *-------------------------------------------------------------------------
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../common/log.h"
#include "server_private.h"

#define MAX_BOOT_ID 128
#define RETRY_AFTER_S 2

/* One HTTP request and its answer. */
struct Exchange
{
	struct lws *wsi;
	Server *server;
	Request *waiting; /* for the database */
	Turn turn;		  /* to ask it */
	bool is_open;
	bool has_body;		  /* as libwebsockets understands its length */
	bool whole;			  /* all of its body has arrived */
	uint64_t whole_round; /* of the loop, in which it has */
	bool headers_sent;
	bool closes; /* the connection, after the answer */
	bool is_bootstrap;
	bool is_hydration;
	bool answered;
	int status;
	char *answer;
	size_t answer_len;
	size_t written;
	char *body;
	size_t body_len;
	uint8_t hash[HASH_LEN];
};

const size_t exchange_size = sizeof(Exchange);

bool
parse_hash(const char *hex, uint8_t *hash)
{
	int i;

	if (hex == NULL || strlen(hex) != 2 * HASH_LEN ||
		strspn(hex, "0123456789abcdefABCDEF") != 2 * HASH_LEN)
		return false;
	for (i = 0; i < HASH_LEN; i++)
	{
		unsigned byte;

		sscanf(hex + 2 * i, "%2x", &byte);
		hash[i] = (uint8_t) byte;
	}
	return true;
}

/* ---- answers ---- */

static void
answer(Exchange *exchange, int status, const char *body)
{
	exchange->answered = true;
	exchange->status = status;
	exchange->answer_len = strlen(body);
	exchange->answer = malloc(exchange->answer_len + 1);
	memcpy(exchange->answer, body, exchange->answer_len + 1);
	exchange->server->counts.answers[status]++;
	(void) lws_rx_flow_control(exchange->wsi, 1); /* else it would not be written, either */
	lws_set_timer_usecs(exchange->wsi, (lws_usec_t) exchange->server->options->request_timeout_s *
										   LWS_USEC_PER_SEC);
	lws_callback_on_writable(exchange->wsi);
}

static const char *
reason_phrase(int status)
{
	switch (status)
	{
		case 200:
			return "OK";
		case 400:
			return "bad request";
		case 401:
			return "unknown token";
		case 404:
			return "no such path";
		case 405:
			return "wrong method";
		case 408:
			return "too slow";
		case 409:
			return "nobody has taken it";
		case 410:
			return "session ended";
		case 411:
			return "a length is needed";
		case 413:
			return "too large";
		case 429:
			return "too many refused tokens";
		default:
			return "try again later";
	}
}

static void
refuse(Exchange *exchange, int status)
{
	char body[80];

	snprintf(body, sizeof(body), "{\"error\": \"%s\"}", reason_phrase(status));
	answer(exchange, status, body);
}

static int
outcome_status(Outcome outcome)
{
	switch (outcome)
	{
		case OUTCOME_OK:
			return 200;
		case OUTCOME_UNKNOWN:
			return 401;
		case OUTCOME_GONE:
			return 410;
		case OUTCOME_BAD:
			return 400;
		case OUTCOME_NOT_READY:
			return 409;
		case OUTCOME_AWAY:
			break;
	}
	return 503;
}

static void
request_done(void *arg, Outcome outcome, Session *session, const char *body)
{
	Exchange *exchange = arg;

	exchange->waiting = NULL;
	if (outcome == OUTCOME_UNKNOWN)
		note_refused(exchange->server, exchange->wsi);
	if (outcome == OUTCOME_OK)
		answer(exchange, 200, body);
	else
		refuse(exchange, outcome_status(outcome));
}

/* ---- metrics ---- */

static void
put_metric(char **at, const char *end, const char *name, const char *type, const char *help,
		   const char *labels, double value)
{
	if (help != NULL)
		*at += snprintf(*at, end - *at, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
	*at += snprintf(*at, end - *at, "%s%s %.0f\n", name, labels, value);
}

static void
put_by_status(char **at, const char *end, const char *name, const char *help,
			  const uint64_t *counts)
{
	int status;

	for (status = 0; status < 600; status++)
	{
		char labels[32];

		if (counts[status] == 0)
			continue;
		snprintf(labels, sizeof(labels), "{status=\"%d\"}", status);
		put_metric(at, end, name, "counter", help, labels, (double) counts[status]);
		help = NULL;
	}
}

/* What all VMs do together is not for each of them to know. */
static bool
may_read_metrics(const Exchange *exchange)
{
	struct sockaddr_storage client;
	socklen_t len = sizeof(client);

	return getpeername(lws_get_socket_fd(exchange->wsi), (struct sockaddr *) &client, &len) == 0 &&
		   options_metrics_for(exchange->server->options, &client);
}

static void
answer_metrics(Exchange *exchange)
{
	Server *server = exchange->server;
	SessionCounts s = sessions_counts(server->sessions);
	VmsCounts v = vms_counts(server->vms);
	char text[16384];
	char *at = text;
	const char *end = text + sizeof(text);

	put_metric(&at, end, "agentvm_gateway_database_up", "gauge",
			   "Whether the database can be asked.", "", sessions_ready(server->sessions));
	put_metric(&at, end, "agentvm_gateway_connections", "gauge", "Open connections.", "",
			   server->counts.connections);
	put_metric(&at, end, "agentvm_gateway_channels", "gauge", "Open command channels.", "",
			   server->counts.channels);
	put_metric(&at, end, "agentvm_gateway_sessions_known", "gauge",
			   "Sessions whose tokens are remembered.", "", s.known);
	put_metric(&at, end, "agentvm_gateway_requests_waiting", "gauge",
			   "Requests that wait for the database.", "", s.waiting);
	put_metric(&at, end, "agentvm_gateway_bootstraps_total", "counter",
			   "Bootstraps that succeeded.", "", (double) s.bootstraps);
	put_metric(&at, end, "agentvm_gateway_heartbeats_total", "counter",
			   "Heartbeats committed and acknowledged.", "", (double) s.heartbeats);
	put_metric(&at, end, "agentvm_gateway_batches_total", "counter", "Calls of heartbeat_batch().",
			   "", (double) s.batches);
	put_metric(&at, end, "agentvm_gateway_batches_failed_total", "counter",
			   "Calls of heartbeat_batch() without a result.", "", (double) s.failed_batches);
	put_metric(&at, end, "agentvm_gateway_sessions_ended_total", "counter",
			   "Ends of sessions that were noticed here.", "", (double) s.ended);
	put_metric(&at, end, "agentvm_gateway_frames_total", "counter", "Frames received on channels.",
			   "", (double) server->counts.frames);
	put_metric(&at, end, "agentvm_gateway_connections_refused_total", "counter",
			   "Connections refused for their number.", "",
			   (double) server->counts.refused_connections);
	put_metric(&at, end, "agentvm_gateway_vms", "gauge",
			   "VMs that are connected through sockets of theirs.", "", v.vms);
	put_metric(&at, end, "agentvm_gateway_vm_streams", "gauge", "Connections through such sockets.",
			   "", v.streams);
	put_metric(&at, end, "agentvm_gateway_vm_pauses_total", "counter",
			   "How often such a VM has had to wait for what it had spent too much of.", "",
			   (double) v.pauses);
	put_metric(&at, end, "agentvm_gateway_vm_resets_total", "counter",
			   "Such sockets left since what came made no sense.", "", (double) v.resets);
	put_by_status(&at, end, "agentvm_gateway_http_responses_total", "Answers, by status.",
				  server->counts.answers);
	if (server->control != NULL)
	{
		put_metric(&at, end, "agentvm_gateway_control_connections", "gauge",
				   "Connections of backends.", "", server->call_counts.connections);
		put_metric(&at, end, "agentvm_gateway_calls_under_way", "gauge",
				   "Calls of backends that are not answered yet.", "",
				   server->call_counts.under_way);
		put_metric(&at, end, "agentvm_gateway_command_ends_waiting", "gauge",
				   "Ends of commands that are not in the log yet.", "", server->call_counts.ends);
		put_metric(&at, end, "agentvm_gateway_call_memory_bytes", "gauge", "Bytes of such calls.",
				   "", (double) server->buffered);
		put_metric(&at, end, "agentvm_gateway_call_bytes_down_total", "counter",
				   "Bytes of calls passed to VMs.", "", (double) server->call_counts.bytes_down);
		put_metric(&at, end, "agentvm_gateway_call_bytes_up_total", "counter",
				   "Bytes of their answers.", "", (double) server->call_counts.bytes_up);
		put_metric(&at, end, "agentvm_gateway_bad_tickets_total", "counter",
				   "Calls refused for their tickets.", "",
				   (double) server->call_counts.bad_tickets);
		put_by_status(&at, end, "agentvm_gateway_calls_total",
					  "Calls by status; 499: the client went before the answer.",
					  server->call_counts.outcomes);
	}
	answer(exchange, 200, text);
}

/* ---- requests ---- */

static bool
path_is(const char *path, const char *known)
{
	return strcmp(path, known) == 0;
}

static void
bootstrap(Exchange *exchange)
{
	json_t *root = json_loadb(exchange->body ? exchange->body : "", exchange->body_len,
							  JSON_REJECT_DUPLICATES, NULL);
	const char *boot_id = json_string_value(json_object_get(root, "boot_id"));
	uint8_t session_hash[HASH_LEN];
	json_t *info;
	char *info_text;
	const char *key;
	json_t *value;

	if (!json_is_object(root) || boot_id == NULL || boot_id[0] == '\0' ||
		strlen(boot_id) > MAX_BOOT_ID ||
		!parse_hash(json_string_value(json_object_get(root, "session_token_sha256")), session_hash))
	{
		json_decref(root);
		refuse(exchange, 400);
		return;
	}
	/* what else there is is for the administrator's eyes; not the hash, of which nobody else has to know */
	info = json_object();
	json_object_foreach(root, key, value)
	{
		if (strcmp(key, "session_token_sha256") != 0 && strcmp(key, "boot_id") != 0)
			json_object_set(info, key, value);
	}
	info_text = json_dumps(info, JSON_COMPACT);
	exchange->waiting = sessions_bootstrap(exchange->server->sessions, exchange->hash, session_hash,
										   boot_id, info_text, request_done, exchange);
	free(info_text);
	json_decref(info);
	json_decref(root);
}

static void
hydrate(Exchange *exchange)
{
	json_t *root = json_loadb(exchange->body ? exchange->body : "", exchange->body_len,
							  JSON_REJECT_DUPLICATES, NULL);
	json_t *problem = json_object_get(root, "problem");

	if (!json_is_object(root) || (problem != NULL && !json_is_string(problem)))
		refuse(exchange, 400);
	else
		exchange->waiting = sessions_hydrate(exchange->server->sessions, exchange->hash,
											 json_string_value(problem), request_done, exchange);
	json_decref(root);
}

/* Ask the database, if it may be asked. */
static void
ask(void *arg, bool may)
{
	Exchange *exchange = arg;

	if (!may)
		refuse(exchange, 429);
	else if (exchange->is_bootstrap)
		bootstrap(exchange);
	else if (exchange->is_hydration)
		hydrate(exchange);
	else
		exchange->waiting =
			sessions_heartbeat(exchange->server->sessions, exchange->hash, request_done, exchange);
}

static void
body_complete(Exchange *exchange)
{
	exchange->whole = true;
	exchange->whole_round = exchange->server->round;
	if (exchange->answered)
		return;
	/* 4.1 would not read what comes until the answer, and be told of it in circles */
	if (!exchange->has_body)
		(void) lws_rx_flow_control(exchange->wsi, 0);
	if (!wait_for_turn(exchange->server, exchange->wsi, !exchange->is_bootstrap, exchange->hash,
					   &exchange->turn, ask, exchange))
		ask(exchange, true);
}

long
body_length(struct lws *wsi)
{
	char text[24];
	int len = lws_hdr_copy(wsi, text, sizeof(text), WSI_TOKEN_HTTP_CONTENT_LENGTH);

	if (lws_hdr_total_length(wsi, WSI_TOKEN_HTTP_TRANSFER_ENCODING) > 0)
		return LENGTH_WRONG;
	if (lws_hdr_total_length(wsi, WSI_TOKEN_HTTP_CONTENT_LENGTH) == 0)
		return LENGTH_NONE;
	if (len <= 0 || strspn(text, "0123456789") != (size_t) len)
		return LENGTH_WRONG;
	return strtol(text, NULL, 10);
}

/* The headers have arrived. */
static void
begin_exchange(Exchange *exchange, struct lws *wsi, Server *server, const char *path)
{
	bool post = lws_hdr_total_length(wsi, WSI_TOKEN_POST_URI) > 0;
	bool get = lws_hdr_total_length(wsi, WSI_TOKEN_GET_URI) > 0;
	long length = body_length(wsi);

	memset(exchange, 0, sizeof(*exchange));
	exchange->wsi = wsi;
	exchange->server = server;
	exchange->is_open = true;
	server->open_requests++;
	lws_set_timer_usecs(wsi, (lws_usec_t) server->options->request_timeout_s * LWS_USEC_PER_SEC);
	exchange->is_bootstrap = path_is(path, PROTOCOL_BOOTSTRAP);
	exchange->is_hydration = path_is(path, PROTOCOL_HYDRATE);
	if (length == LENGTH_WRONG)
		refuse(exchange, 400);
	else if (path_is(path, "/healthz") || path_is(path, "/readyz") || path_is(path, "/metrics"))
	{
		if (path_is(path, "/metrics") && !may_read_metrics(exchange))
			refuse(exchange, 404);
		else if (!get)
			refuse(exchange, 405);
		else if (path_is(path, "/metrics"))
			answer_metrics(exchange);
		else if (path_is(path, "/readyz") &&
				 (server->draining || !sessions_ready(server->sessions)))
			refuse(exchange, 503);
		else
			answer(exchange, 200, "{\"status\": \"ok\"}");
	}
	else if (!exchange->is_bootstrap && !exchange->is_hydration &&
			 !path_is(path, PROTOCOL_HEARTBEAT) && !path_is(path, PROTOCOL_CHANNEL))
		refuse(exchange, 404);
	else if (!post || path_is(path, PROTOCOL_CHANNEL))
		refuse(exchange, 405);
	else if (length == LENGTH_NONE)
		refuse(exchange, 411);
	else if (length > PROTOCOL_MAX_REQUEST)
		refuse(exchange, 413);
	else if (server->draining)
		refuse(exchange, 503);
	else
	{
		int status = check_token(server, wsi, !exchange->is_bootstrap, exchange->hash);

		if (status != 0)
			refuse(exchange, status);
		/* else its body follows, even if it is empty */
	}
}

static void
end_exchange(Exchange *exchange)
{
	if (!exchange->is_open)
		return;
	exchange->is_open = false;
	exchange->server->open_requests--;
	if (exchange->waiting != NULL)
		request_forget(exchange->waiting);
	exchange->waiting = NULL;
	leave_queue(exchange->server, &exchange->turn);
	if (exchange->answer != NULL)
		OPENSSL_cleanse(exchange->answer, exchange->answer_len); /* a bootstrap's holds env */
	free(exchange->answer);
	free(exchange->body);
	exchange->answer = exchange->body = NULL;
}

int
add_date(struct lws *wsi, unsigned char **at, unsigned char *end)
{
	char date[40];
	time_t now = sessions_time(server_of(wsi)->sessions);
	struct tm utc;
	int len = (int) strftime(date, sizeof(date), "%a, %d %b %Y %H:%M:%S GMT", gmtime_r(&now, &utc));

	return lws_add_http_header_by_token(wsi, WSI_TOKEN_HTTP_DATE, (unsigned char *) date, len, at,
										end);
}

/*
 * Whether the connection may have another request after this one.
 *
 * The headers of that one must not be among what libwebsockets has read ahead: 4.1
 * would take them for its body, too, free them, and go on reading there.  What
 * comes with the end of a body is seen as more of it, and ends the connection, when
 * the loop begins its next round.  What comes with the headers of a request that
 * has no body, is not seen at all while that one is served.
 */
static bool
may_go_on(const Exchange *exchange)
{
	if (!exchange->has_body || !exchange->whole || exchange->whole_round == exchange->server->round)
		return false;
	return exchange->status != 400 && !exchange->server->draining;
}

bool
add_headers(struct lws *wsi, int status, const char *type, int retry_s, bool closes, size_t len,
			unsigned char **at, unsigned char *end)
{
	char retry[16];
	int n = snprintf(retry, sizeof(retry), "%d", retry_s);

	return !lws_add_http_header_status(wsi, (unsigned) status, at, end) &&
		   !lws_add_http_header_by_token(wsi, WSI_TOKEN_HTTP_CONTENT_TYPE,
										 (const unsigned char *) type, (int) strlen(type), at,
										 end) &&
		   !lws_add_http_header_by_token(wsi, WSI_TOKEN_HTTP_CACHE_CONTROL,
										 (const unsigned char *) "no-store", 8, at, end) &&
		   ((status != 503 && status != 429) ||
			!lws_add_http_header_by_token(wsi, WSI_TOKEN_HTTP_RETRY_AFTER,
										  (const unsigned char *) retry, n, at, end)) &&
		   (!closes ||
			!lws_add_http_header_by_token(wsi, WSI_TOKEN_CONNECTION,
										  (const unsigned char *) "close", 5, at, end)) &&
		   !lws_add_http_header_content_length(wsi, len, at, end);
}

/* Returns -1 where libwebsockets should close the connection: other values mean nothing to it here. */
static int
write_answer(Exchange *exchange)
{
	struct lws *wsi = exchange->wsi;
	unsigned char buffer[LWS_PRE + 4096];
	unsigned char *at = buffer + LWS_PRE;
	unsigned char *end = buffer + sizeof(buffer);
	const char *type = exchange->status == 200 && exchange->answer[0] == '#'
						   ? "text/plain; version=0.0.4; charset=utf-8"
						   : "application/json";
	size_t room;
	int n;

	if (!exchange->answered)
		return 0;
	if (!exchange->headers_sent)
	{
		exchange->closes = !may_go_on(exchange);
		if (!add_headers(wsi, exchange->status, type, RETRY_AFTER_S + (int) (random() % 4),
						 exchange->closes, exchange->answer_len, &at, end) ||
			add_date(wsi, &at, end) ||
			lws_finalize_write_http_header(wsi, buffer + LWS_PRE, &at, end))
			return -1;
		exchange->headers_sent = true;
		lws_callback_on_writable(wsi);
		return 0;
	}
	room = exchange->answer_len - exchange->written;
	if (room > sizeof(buffer) - LWS_PRE)
		room = sizeof(buffer) - LWS_PRE;
	memcpy(buffer + LWS_PRE, exchange->answer + exchange->written, room);
	exchange->written += room;
	n = lws_write(wsi, buffer + LWS_PRE, room,
				  exchange->written == exchange->answer_len ? LWS_WRITE_HTTP_FINAL
															: LWS_WRITE_HTTP);
	OPENSSL_cleanse(buffer, sizeof(buffer));
	if (n < (int) room)
		return -1;
	if (exchange->written < exchange->answer_len)
	{
		lws_callback_on_writable(wsi);
		return 0;
	}
	lws_set_timer_usecs(wsi, LWS_SET_TIMER_USEC_CANCEL);
	end_exchange(exchange);
	return exchange->closes || lws_http_transaction_completed(wsi) != 0 ? -1 : 0;
}

Server *
server_of(struct lws *wsi)
{
	return lws_context_user(lws_get_context(wsi));
}

int
http_callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in, size_t len)
{
	Server *server = server_of(wsi);
	Exchange *exchange = user;

	switch (reason)
	{
		case LWS_CALLBACK_OPENSSL_LOAD_EXTRA_SERVER_VERIFY_CERTS:
			server->tls = user;
			return 0;

		case LWS_CALLBACK_SERVER_NEW_CLIENT_INSTANTIATED:
		{
			char address[48];
			Peer *peer;

			if (server->vm != NULL)
				snprintf(address, sizeof(address), "%s", server->vm);
			else
				peer_address(wsi, -1, address, sizeof(address));
			peer = peer_of(server, address);
			peer->is_vm = server->vm != NULL;
			peer->connections++;
			server->counts.connections++;
			lws_set_opaque_user_data(wsi, peer);
			return 0;
		}

		case LWS_CALLBACK_WSI_DESTROY:
		{
			Peer *peer = lws_get_opaque_user_data(wsi);

			if (peer != NULL)
			{
				peer->connections--;
				server->counts.connections--;
				lws_set_opaque_user_data(wsi, NULL);
			}
			return 0;
		}

			/*
			 * HTTP/1.1 and WebSockets: HTTP/2 would come with no limits of ours.
			 * "in" may have been freed already, if it is neither.
			 */
		case LWS_CALLBACK_HTTP_CONFIRM_UPGRADE:
		{
			char upgrade[16];

			return lws_hdr_copy(wsi, upgrade, sizeof(upgrade), WSI_TOKEN_UPGRADE) > 0 &&
						   strcasecmp(upgrade, "websocket") == 0
					   ? 0
					   : -1;
		}

		case LWS_CALLBACK_RAW_ADOPT:
			return -1;

		case LWS_CALLBACK_FILTER_PROTOCOL_CONNECTION:
			/* a WebSocket of no subprotocol, or of the name that this callback has */
			refuse_upgrade(wsi, 400);
			return -1;

		case LWS_CALLBACK_HTTP:
			begin_exchange(exchange, wsi, server, in);
			return 0;

		case LWS_CALLBACK_HTTP_BODY:
			if (exchange == NULL || !exchange->is_open || exchange->whole)
				return -1;
			exchange->has_body = len > 0;
			if (exchange->answered || len == 0)
				return 0;
			if (exchange->body_len + len > PROTOCOL_MAX_REQUEST)
			{
				refuse(exchange, 413);
				return 0;
			}
			exchange->body = realloc(exchange->body, exchange->body_len + len);
			memcpy(exchange->body + exchange->body_len, in, len);
			exchange->body_len += len;
			return 0;

		case LWS_CALLBACK_HTTP_BODY_COMPLETION:
			if (exchange == NULL || !exchange->is_open || exchange->whole)
				return -1;
			body_complete(exchange);
			return 0;

		case LWS_CALLBACK_TIMER:
			if (exchange == NULL || !exchange->is_open || exchange->waiting != NULL ||
				exchange->turn.peer != NULL)
				return 0; /* the database has a time limit of its own, and so have turns */
			if (exchange->answered)
				return -1; /* it does not read its answer */
			refuse(exchange, 408);
			return 0;

		case LWS_CALLBACK_HTTP_WRITEABLE:
			return exchange != NULL && exchange->is_open ? write_answer(exchange) : 0;

		case LWS_CALLBACK_CLOSED_HTTP:
		case LWS_CALLBACK_HTTP_DROP_PROTOCOL:
			if (exchange != NULL)
				end_exchange(exchange);
			return 0;

		default:
			return 0;
	}
}
