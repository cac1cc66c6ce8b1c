/*-------------------------------------------------------------------------
 *
 * transport.h
 *		How an engine's calls leave: as HTTP requests, or on threads.
 *
 * What http.h says of its functions holds for both.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_TRANSPORT_H
#define AGENTVM_ENGINE_TRANSPORT_H

#include "postgres.h"

#include "net/http.h"

typedef struct Transport
{
	/* A client, and its end, which drops all its calls and never raises. */
	void *(*create)(void);
	void (*destroy)(void *client);
	/* What to wait on for readability, asked for before each wait; the transport's. */
	int (*fd)(void *client);
	/* How many more calls could begin now. */
	int (*room)(void *client);
	/* Begin a call for a provider; raises where the request cannot be sent at all. */
	void (*start)(void *client, const char *provider, const HttpRequest *request, void *arg);
	/* Move calls on without blocking. */
	void (*run)(void *client);
	/* Let calls that have been started leave at once; NULL: they do. */
	void (*push)(void *client);
	/* Whether calls have been started that have not left; NULL: there are none. */
	bool (*sending)(void *client);
	/* The next reply, in CurrentMemoryContext, and what its call was started with; or NULL. */
	HttpReply *(*finished)(void *client, void **arg);
} Transport;

/* Of a lane: LANE_HTTP, LANE_BLOCKING. */
extern const Transport *transport_of(int lane);

#endif /* AGENTVM_ENGINE_TRANSPORT_H */
