/*-------------------------------------------------------------------------
 *
 * resolve.c
 *		Addresses of a host name, by c-ares: libc's own look-up needs shared libraries.
 *
 *-------------------------------------------------------------------------
 */
#include "resolve.h"

#include <ares.h>
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "loop.h"

#define QUERY_MS 2000
#define QUERY_TRIES 2

struct Resolve
{
	ares_channel channel;
	bool has_channel;
	Resolved done; /* NULL: cancelled */
	void *arg;
	Addresses addresses;
	const char *problem;
	bool finished;
	Timer timer;
};

/* Never from within c-ares, which would go on with what has been freed. */
static void
finish(void *arg)
{
	Resolve *resolve = arg;
	Resolved done = resolve->done;

	resolve->done = NULL;
	if (resolve->has_channel)
		ares_destroy(resolve->channel); /* calls on_answer() if there was none */
	resolve->has_channel = false;
	timer_stop(&resolve->timer);
	if (done != NULL)
		done(resolve->arg, &resolve->addresses, resolve->problem);
	free(resolve);
}

static void
on_answer(void *arg, int status, int timeouts, struct ares_addrinfo *answer)
{
	Resolve *resolve = arg;
	struct ares_addrinfo_node *node;
	Addresses *addresses = &resolve->addresses;

	resolve->finished = true;
	for (node = answer ? answer->nodes : NULL; node != NULL && addresses->count < MAX_ADDRESSES;
		 node = node->ai_next)
	{
		const void *address = node->ai_family == AF_INET6
								  ? (void *) &((struct sockaddr_in6 *) node->ai_addr)->sin6_addr
								  : (void *) &((struct sockaddr_in *) node->ai_addr)->sin_addr;

		if (inet_ntop(node->ai_family, address, addresses->text[addresses->count], ADDRESS_LEN))
			addresses->count++;
	}
	if (answer != NULL)
		ares_freeaddrinfo(answer);
	if (addresses->count == 0)
		resolve->problem = status == ARES_SUCCESS ? "it has no address" : ares_strerror(status);
}

static void wait_for_answer(Resolve *resolve);

static void
on_timeout(void *arg)
{
	Resolve *resolve = arg;

	ares_process_fd(resolve->channel, ARES_SOCKET_BAD, ARES_SOCKET_BAD);
	wait_for_answer(resolve);
}

static void
wait_for_answer(Resolve *resolve)
{
	struct timeval longest = {QUERY_MS / 1000, 0};
	struct timeval room;
	struct timeval *left = ares_timeout(resolve->channel, &longest, &room);

	if (resolve->finished)
		timer_set(&resolve->timer, 0, finish, resolve);
	else
		timer_set(&resolve->timer, left->tv_sec * 1000 + left->tv_usec / 1000 + 1, on_timeout,
				  resolve);
}

/* The socket's number is not known to the handler: its place says which Resolve it belongs to. */
typedef struct Socket
{
	Resolve *resolve;
	int fd;
	struct Socket *next;
} Socket;

static Socket *sockets;

static void
on_socket(void *arg, uint32_t events)
{
	Socket *socket = arg;
	Resolve *resolve = socket->resolve;
	int fd = socket->fd;

	ares_process_fd(resolve->channel,
					events & (EPOLLIN | EPOLLERR | EPOLLHUP) ? fd : ARES_SOCKET_BAD,
					events & EPOLLOUT ? fd : ARES_SOCKET_BAD);
	wait_for_answer(resolve);
}

static void
on_socket_state(void *arg, ares_socket_t fd, int readable, int writable)
{
	Socket **place = &sockets;
	Socket *socket;

	while (*place != NULL && (*place)->fd != fd)
		place = &(*place)->next;
	socket = *place;
	if (!readable && !writable)
	{
		if (socket == NULL)
			return;
		loop_unwatch(fd);
		*place = socket->next;
		free(socket);
		return;
	}
	if (socket == NULL)
	{
		socket = calloc(1, sizeof(Socket));
		socket->resolve = arg;
		socket->fd = fd;
		*place = socket;
	}
	loop_watch(fd, (readable ? EPOLLIN : 0) | (writable ? EPOLLOUT : 0), on_socket, socket);
}

Resolve *
resolve_start(const char *host, Resolved done, void *arg)
{
	Resolve *resolve = calloc(1, sizeof(Resolve));
	struct ares_addrinfo_hints hints;
	struct ares_options options;
	struct in_addr v4;
	struct in6_addr v6;
	int status;

	resolve->done = done;
	resolve->arg = arg;
	if (inet_pton(AF_INET, host, &v4) == 1 || inet_pton(AF_INET6, host, &v6) == 1)
	{
		snprintf(resolve->addresses.text[0], ADDRESS_LEN, "%s", host);
		resolve->addresses.count = 1;
		resolve->finished = true;
		timer_set(&resolve->timer, 0, finish, resolve);
		return resolve;
	}
	memset(&options, 0, sizeof(options));
	options.timeout = QUERY_MS;
	options.tries = QUERY_TRIES;
	options.sock_state_cb = on_socket_state;
	options.sock_state_cb_data = resolve;
	status = ares_init_options(&resolve->channel, &options,
							   ARES_OPT_TIMEOUTMS | ARES_OPT_TRIES | ARES_OPT_SOCK_STATE_CB);
	if (status != ARES_SUCCESS)
	{
		resolve->problem = ares_strerror(status);
		resolve->finished = true;
		timer_set(&resolve->timer, 0, finish, resolve);
		return resolve;
	}
	resolve->has_channel = true;
	memset(&hints, 0, sizeof(hints));
	hints.ai_family = AF_UNSPEC;
	ares_getaddrinfo(resolve->channel, host, NULL, &hints, on_answer, resolve);
	wait_for_answer(resolve);
	return resolve;
}

void
resolve_cancel(Resolve *resolve)
{
	resolve->done = NULL;
	timer_set(&resolve->timer, 0, finish, resolve);
}
