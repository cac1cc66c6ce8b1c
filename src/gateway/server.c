/*-------------------------------------------------------------------------
 *
 * server.c
 *		The listening socket, and the life of all that comes through it.
 *
 * libwebsockets parses; what it hands over is bounded: bodies and frames by size,
 * requests by time, connections by address, refused tokens by rate.
 *
 *-------------------------------------------------------------------------
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../common/log.h"
#include "listener.h"
#include "server_private.h"

#define MAX_HEADERS 8192
#define PING_S 30		  /* of a channel without traffic */
#define PING_TIMEOUT_S 90 /* then it is dead */

static const lws_retry_bo_t idle_rules = {
	.secs_since_valid_ping = PING_S,
	.secs_since_valid_hangup = PING_TIMEOUT_S,
};

/* libwebsockets's own words: what we need to know, it says through its callbacks */
static void
lws_log(int level, const char *line)
{
	char text[256];
	size_t len;

	snprintf(text, sizeof(text), "%s", line);
	for (len = strlen(text); len > 0 && text[len - 1] == '\n'; len--)
		text[len - 1] = '\0';
	log_line(level & LLL_ERR ? LOG_LEVEL_WARNING : LOG_LEVEL_DEBUG, "libwebsockets", "text", text,
			 NULL);
}

/* A connection has come; of a VM's socket, if that is given. */
static void
take_connection(Server *server, const char *vm, int fd)
{
	char address[48];

	if (vm != NULL)
		snprintf(address, sizeof(address), "%s", vm);
	else
		peer_address(NULL, fd, address, sizeof(address));
	if (!may_connect(server, address))
	{
		close(fd);
		return;
	}
	server->vm = vm;
	(void) lws_adopt_socket_vhost(server->vhost, fd); /* closes it if it cannot */
	server->vm = NULL;
}

static void
take_stream(void *arg, const char *vm, int fd)
{
	take_connection(arg, vm, fd);
}

static void
take_accepted(void *arg, int fd)
{
	take_connection(arg, NULL, fd);
}

static void
on_round(uv_prepare_t *rounds)
{
	((Server *) rounds->data)->round++;
}

int
server_max_connections(const Options *options, rlim_t descriptors)
{
	const int streams = VMS_MAX * PROTOCOL_CABLE_STREAMS;
	int left;

	if (descriptors > 4000000)
		descriptors = 4000000; /* more than can be asked for */
	left = (int) descriptors - SPARE_DESCRIPTORS - control_max_connections(options, descriptors);
	if (options->vm_sockets[0] == NULL)
		return left;
	/* a stream's other end is a connection */
	left -= VMS_MAX;
	return left / 2 < streams ? left / 2 : left - streams;
}

void
fill_context_info(Server *server, struct lws_context_creation_info *info, void **loops,
				  bool with_tls)
{
	const Options *options = server->options;

	memset(info, 0, sizeof(*info));
	info->port = CONTEXT_PORT_NO_LISTEN_SERVER;
	info->user = server;
	info->foreign_loops = loops;
	info->options = LWS_SERVER_OPTION_LIBUV | LWS_SERVER_OPTION_UV_NO_SIGSEGV_SIGFPE_SPIN |
					LWS_SERVER_OPTION_VALIDATE_UTF8 | LWS_SERVER_OPTION_EXPLICIT_VHOSTS;
	info->alpn = "http/1.1";
	info->timeout_secs = (unsigned) options->request_timeout_s;
	info->timeout_secs_ah_idle = (unsigned) options->request_timeout_s;
	info->max_http_header_data = MAX_HEADERS;
	if (with_tls && options->tls_cert != NULL)
	{
		info->ssl_cert_filepath = options->tls_cert;
		info->ssl_private_key_filepath = options->tls_key;
		info->options |= LWS_SERVER_OPTION_DO_SSL_GLOBAL_INIT;
		info->ssl_options_set = SSL_OP_NO_TLSv1 | SSL_OP_NO_TLSv1_1 | SSL_OP_NO_RENEGOTIATION;
	}
}

static void
database_up(void *arg)
{
	Server *server = arg;

	calls_up(server);
	control_up(server);
}

Server *
server_create(uv_loop_t *loop, const Options *options)
{
	Server *server = calloc(1, sizeof(Server));
	struct lws_context_creation_info info;
	void *loops[] = {loop};
	const SessionEvents events = {channel_ended, channel_claimed, database_up, server};
	const VmsEvents vms_events = {take_stream,	channel_expect, channel_come,
								  channel_next, channel_sent,	server};
	struct rlimit files;
	int listener = listen_on(options->listen, options->port);

	if (listener < 0)
	{
		log_line(LOG_LEVEL_ERROR, "cannot listen", "address", options->listen, "reason",
				 strerror(errno), NULL);
		free(server);
		return NULL;
	}
	server->loop = loop;
	server->options = options;
	getrlimit(RLIMIT_NOFILE, &files);
	server->descriptors = files.rlim_cur;
	lws_set_log_level(LLL_ERR | LLL_WARN, lws_log);
	fill_context_info(server, &info, loops, true);
	server->protocols[0] = (struct lws_protocols){
		.name = "http", .callback = http_callback, .per_session_data_size = exchange_size};
	server->protocols[1] = (struct lws_protocols){.name = PROTOCOL_NAME,
												  .callback = channel_callback,
												  .per_session_data_size = channel_size,
												  .rx_buffer_size = 1024};
	info.protocols = server->protocols;
	info.retry_and_idle_policy = &idle_rules;
	info.keepalive_timeout = 75;
	info.max_http_header_pool2 = 4096;
	info.pt_serv_buf_size = SERVICE_BUFFER;
	info.fd_limit_per_thread = (unsigned) options->max_connections + SPARE_DESCRIPTORS;
	server->sessions = sessions_create(loop, options->database, options->name, &events);
	calls_create(server);
	server->context = lws_create_context(&info);
	if (server->context != NULL)
		server->vhost = lws_create_vhost(server->context, &info);
	if (server->vhost == NULL)
		log_line(LOG_LEVEL_ERROR, "cannot serve", NULL);
	if (server->vhost == NULL || !control_create(server))
	{
		close(listener);
		if (server->context != NULL)
			lws_context_destroy(server->context);
		sessions_destroy(server->sessions);
		calls_destroy(server);
		free(server);
		return NULL;
	}
	server->turns = calloc(1, sizeof(uv_timer_t));
	uv_timer_init(loop, server->turns);
	server->turns->data = server;
	server->rounds = calloc(1, sizeof(uv_prepare_t));
	uv_prepare_init(loop, server->rounds);
	server->rounds->data = server;
	uv_prepare_start(server->rounds, on_round);
	server->listener = listener_create(loop, listener, take_accepted, server);
	server->vms = vms_create(loop, options->vm_sockets, &vms_events);
	return server;
}

static bool
use_certificate(SSL_CTX *tls, const Options *options)
{
	return tls == NULL ||
		   (SSL_CTX_use_certificate_chain_file(tls, options->tls_cert) == 1 &&
			SSL_CTX_use_PrivateKey_file(tls, options->tls_key, SSL_FILETYPE_PEM) == 1);
}

void
server_reload(Server *server)
{
	const char *problem = options_problem(server->options);

	if (server->tls == NULL)
		return;
	if (problem == NULL && (!use_certificate(server->tls, server->options) ||
							!use_certificate(server->control_tls, server->options)))
		problem = "the certificate cannot be used";
	if (problem == NULL)
		log_line(LOG_LEVEL_INFO, "certificate read", "file", server->options->tls_cert, NULL);
	else
		log_line(LOG_LEVEL_ERROR, "certificate not read: the one before stays", "reason", problem,
				 NULL);
}

void
server_drain(Server *server)
{
	server->draining = true;
	sessions_each_attached(server->sessions, channel_drain);
}

bool
server_is_idle(const Server *server)
{
	return server->open_requests == 0 && server->counts.channels == 0;
}

void
server_tick(Server *server)
{
	forget_peers(server);
}

static void
free_handle(uv_handle_t *handle)
{
	free(handle);
}

void
server_destroy(Server *server)
{
	Peer *peer, *next;

	listener_destroy(server->listener);
	control_destroy(server);
	uv_close((uv_handle_t *) server->rounds, free_handle);
	lws_context_destroy(server->context);
	vms_destroy(server->vms); /* channels let go of them */
	sessions_destroy(server->sessions);
	calls_destroy(server);
	uv_close((uv_handle_t *) server->turns, free_handle);
	HASH_ITER(hh, server->peers, peer, next)
	{
		HASH_DEL(server->peers, peer);
		free(peer);
	}
	free(server);
}
