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
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../common/log.h"
#include "server_private.h"

#define MAX_HEADERS 8192
#define SPARE_DESCRIPTORS 64 /* for all but connections */
#define PAUSE_MS 200		 /* when there are no descriptors left */
#define PING_S 30			 /* of a channel without traffic */
#define PING_TIMEOUT_S 90	 /* then it is dead */

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

static void on_connections(uv_poll_t *poll, int status, int events);

static void
on_pause_ended(uv_timer_t *timer)
{
	Server *server = timer->data;

	uv_poll_start(server->listener, UV_READABLE, on_connections);
}

/*
 * We accept ourselves: libwebsockets 4.1 would run in circles when there are no
 * descriptors left.  One at a time, so that those who have gone meanwhile are not
 * counted any more.
 */
static void
on_connections(uv_poll_t *poll, int status, int events)
{
	static const int on = 1;
	Server *server = poll->data;
	int listener, fd;

	uv_fileno((uv_handle_t *) poll, &listener);
	fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	if (fd >= 0)
	{
		(void) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		take_connection(server, NULL, fd);
		server->cannot_accept = false;
	}
	else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
	{
		if (!server->cannot_accept)
			log_line(LOG_LEVEL_ERROR, "connections cannot be accepted: they wait", "reason",
					 strerror(errno), NULL);
		server->cannot_accept = true;
		uv_poll_stop(poll);
		uv_timer_start(server->pause, on_pause_ended, PAUSE_MS, 0);
	}
	/* else it has gone already */
}

static void
on_round(uv_prepare_t *rounds)
{
	((Server *) rounds->data)->round++;
}

static int
listen_on(const char *address, int port)
{
	static const int on = 1;
	struct sockaddr_storage name = {0};
	socklen_t len;
	int fd;

	if (uv_ip6_addr(address, port, (struct sockaddr_in6 *) &name) == 0)
		len = sizeof(struct sockaddr_in6);
	else
	{
		uv_ip4_addr(address, port, (struct sockaddr_in *) &name);
		len = sizeof(struct sockaddr_in);
	}
	fd = socket(name.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd >= 0 && (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
					bind(fd, (struct sockaddr *) &name, len) != 0 || listen(fd, SOMAXCONN) != 0))
	{
		int error = errno;

		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

int
server_max_connections(const Options *options, rlim_t descriptors)
{
	const int streams = VMS_MAX * PROTOCOL_CABLE_STREAMS;
	int left;

	if (descriptors > 4000000)
		descriptors = 4000000; /* more than can be asked for */
	left = (int) descriptors - SPARE_DESCRIPTORS;
	if (options->vm_sockets[0] == NULL)
		return left;
	/* a stream's other end is a connection */
	left -= VMS_MAX;
	return left / 2 < streams ? left / 2 : left - streams;
}

Server *
server_create(uv_loop_t *loop, const Options *options)
{
	Server *server = calloc(1, sizeof(Server));
	struct lws_context_creation_info info;
	void *loops[] = {loop};
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
	lws_set_log_level(LLL_ERR | LLL_WARN, lws_log);
	memset(&info, 0, sizeof(info));
	server->protocols[0] = (struct lws_protocols){
		.name = "http", .callback = http_callback, .per_session_data_size = exchange_size};
	server->protocols[1] = (struct lws_protocols){.name = PROTOCOL_NAME,
												  .callback = channel_callback,
												  .per_session_data_size = channel_size,
												  .rx_buffer_size = 1024};
	info.port = CONTEXT_PORT_NO_LISTEN_SERVER;
	info.protocols = server->protocols;
	info.user = server;
	info.foreign_loops = loops;
	info.options = LWS_SERVER_OPTION_LIBUV | LWS_SERVER_OPTION_UV_NO_SIGSEGV_SIGFPE_SPIN |
				   LWS_SERVER_OPTION_VALIDATE_UTF8 | LWS_SERVER_OPTION_EXPLICIT_VHOSTS;
	info.alpn = "http/1.1";
	info.retry_and_idle_policy = &idle_rules;
	info.timeout_secs = (unsigned) options->request_timeout_s;
	info.timeout_secs_ah_idle = (unsigned) options->request_timeout_s;
	info.keepalive_timeout = 75;
	info.max_http_header_data = MAX_HEADERS;
	info.max_http_header_pool2 = 4096;
	info.pt_serv_buf_size = 4096;
	info.fd_limit_per_thread = (unsigned) options->max_connections + SPARE_DESCRIPTORS;
	if (options->tls_cert != NULL)
	{
		info.ssl_cert_filepath = options->tls_cert;
		info.ssl_private_key_filepath = options->tls_key;
		info.options |= LWS_SERVER_OPTION_DO_SSL_GLOBAL_INIT;
		info.ssl_options_set = SSL_OP_NO_TLSv1 | SSL_OP_NO_TLSv1_1 | SSL_OP_NO_RENEGOTIATION;
	}
	server->sessions = sessions_create(loop, options->database, options->name, channel_ended);
	server->context = lws_create_context(&info);
	if (server->context != NULL)
		server->vhost = lws_create_vhost(server->context, &info);
	if (server->vhost == NULL)
	{
		log_line(LOG_LEVEL_ERROR, "cannot serve", NULL);
		close(listener);
		if (server->context != NULL)
			lws_context_destroy(server->context);
		sessions_destroy(server->sessions);
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
	server->pause = calloc(1, sizeof(uv_timer_t));
	uv_timer_init(loop, server->pause);
	server->pause->data = server;
	server->listener = calloc(1, sizeof(uv_poll_t));
	uv_poll_init(loop, server->listener, listener);
	server->listener->data = server;
	uv_poll_start(server->listener, UV_READABLE, on_connections);
	server->vms = vms_create(loop, options->vm_sockets, take_stream, server);
	return server;
}

void
server_reload(Server *server)
{
	const char *problem = options_problem(server->options);

	if (server->tls == NULL)
		return;
	if (problem == NULL &&
		(SSL_CTX_use_certificate_chain_file(server->tls, server->options->tls_cert) != 1 ||
		 SSL_CTX_use_PrivateKey_file(server->tls, server->options->tls_key, SSL_FILETYPE_PEM) != 1))
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
	int listener;

	uv_fileno((uv_handle_t *) server->listener, &listener);
	uv_close((uv_handle_t *) server->listener, free_handle);
	close(listener);
	uv_close((uv_handle_t *) server->rounds, free_handle);
	uv_close((uv_handle_t *) server->pause, free_handle);
	vms_destroy(server->vms);
	lws_context_destroy(server->context);
	sessions_destroy(server->sessions);
	uv_close((uv_handle_t *) server->turns, free_handle);
	HASH_ITER(hh, server->peers, peer, next)
	{
		HASH_DEL(server->peers, peer);
		free(peer);
	}
	free(server);
}
