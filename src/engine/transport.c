/*-------------------------------------------------------------------------
 *
 * transport.c
 *		How an engine's calls leave: as HTTP requests, or on threads.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "engine/shared.h"
#include "engine/threads.h"
#include "engine/transport.h"

static void *
create(void)
{
	return http_client_create();
}

static void
destroy(void *client)
{
	http_client_destroy(client);
}

static int
fd(void *client)
{
	return http_client_fd(client);
}

static int
room(void *client)
{
	return INT_MAX;
}

static void
start(void *client, const char *provider, const HttpRequest *request, void *arg)
{
	(void) http_start(client, request, arg);
}

static void
run(void *client)
{
	http_run(client);
}

static void
push(void *client)
{
	http_push(client);
}

static bool
sending(void *client)
{
	return http_is_sending(client);
}

static HttpReply *
finished(void *client, void **arg)
{
	return http_finished(client, arg);
}

static const Transport http_transport = {create, destroy, fd,	   room,	start,
										 run,	 push,	  sending, finished};

const Transport *
transport_of(int lane)
{
	return lane == LANE_BLOCKING ? &thread_transport : &http_transport;
}
