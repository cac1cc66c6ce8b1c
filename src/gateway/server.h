/*-------------------------------------------------------------------------
 *
 * server.h
 *		HTTP and WebSocket: what VMs and operators send, and what they get.
 *
 *-------------------------------------------------------------------------
 */
#ifndef GATEWAY_SERVER_H
#define GATEWAY_SERVER_H

#include <stdbool.h>
#include <sys/resource.h>
#include <uv.h>

#include "options.h"

typedef struct Server Server;

/*
 * Listen, and serve on "loop" from now on.  Returns NULL, having logged why, when
 * the address cannot be had or the certificate cannot be used.
 */
extern Server *server_create(uv_loop_t *loop, const Options *options);

/* How many connections there may be with so many descriptors, all in all; may be negative. */
extern int server_max_connections(const Options *options, rlim_t descriptors);

/* Read certificate and key again; connections that are there keep theirs.  Logs the outcome. */
extern void server_reload(Server *server);

/* Take no more connections, answer 503, close the channels; open requests may finish. */
extern void server_drain(Server *server);

/* Whether nobody waits for an answer any more. */
extern bool server_is_idle(const Server *server);

/* To be called every minute or so: forgets what is not needed any more. */
extern void server_tick(Server *server);

/* Close all connections, answering nobody any more, and free everything. */
extern void server_destroy(Server *server);

#endif /* GATEWAY_SERVER_H */
