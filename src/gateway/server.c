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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../common/log.h"
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

/* A stream of a VM: as if it had come to the port. */
static void
take_stream(void *arg, const char *vm, int fd)
{
	Server *server = arg;

	if (!may_connect(server, vm))
	{
		close(fd);
		return;
	}
	server->vm = vm;
	(void) lws_adopt_socket_vhost(server->listener, fd); /* closes it if it cannot */
	server->vm = NULL;
}

Server *
server_create(uv_loop_t *loop, const Options *options)
{
	Server *server = calloc(1, sizeof(Server));
	struct lws_context_creation_info info;
	void *loops[] = {loop};

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
	info.port = options->port;
	info.iface = options->listen;
	info.protocols = server->protocols;
	info.user = server;
	info.foreign_loops = loops;
	info.options = LWS_SERVER_OPTION_LIBUV | LWS_SERVER_OPTION_UV_NO_SIGSEGV_SIGFPE_SPIN |
				   LWS_SERVER_OPTION_VALIDATE_UTF8 | LWS_SERVER_OPTION_FAIL_UPON_UNABLE_TO_BIND;
	info.alpn = "http/1.1";
	info.retry_and_idle_policy = &idle_rules;
	info.timeout_secs = (unsigned) options->request_timeout_s;
	info.timeout_secs_ah_idle = (unsigned) options->request_timeout_s;
	info.keepalive_timeout = 75;
	info.max_http_header_data = MAX_HEADERS;
	info.max_http_header_pool2 = 4096;
	info.pt_serv_buf_size = 4096;
	info.fd_limit_per_thread = (unsigned) options->max_connections + 64;
	if (options->tls_cert != NULL)
	{
		info.ssl_cert_filepath = options->tls_cert;
		info.ssl_private_key_filepath = options->tls_key;
		info.options |= LWS_SERVER_OPTION_DO_SSL_GLOBAL_INIT;
		info.ssl_options_set = SSL_OP_NO_TLSv1 | SSL_OP_NO_TLSv1_1 | SSL_OP_NO_RENEGOTIATION;
	}
	server->sessions = sessions_create(loop, options->database, options->name, channel_ended);
	/* an IPv4 address is bound as such only where IPv6 is off */
	if (strchr(options->listen, ':') == NULL)
		info.options |= LWS_SERVER_OPTION_DISABLE_IPV6;
	info.options |= LWS_SERVER_OPTION_EXPLICIT_VHOSTS;
	server->context = lws_create_context(&info);
	if (server->context != NULL)
		server->listener = lws_create_vhost(server->context, &info);
	if (server->listener == NULL)
	{
		log_line(LOG_LEVEL_ERROR, "cannot listen", "address", options->listen, NULL);
		if (server->context != NULL)
			lws_context_destroy(server->context);
		sessions_destroy(server->sessions);
		free(server);
		return NULL;
	}
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

void
server_destroy(Server *server)
{
	Peer *peer, *next;

	vms_destroy(server->vms);
	lws_context_destroy(server->context);
	sessions_destroy(server->sessions);
	HASH_ITER(hh, server->peers, peer, next)
	{
		HASH_DEL(server->peers, peer);
		free(peer);
	}
	free(server);
}
