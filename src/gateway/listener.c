/*-------------------------------------------------------------------------
 *
 * listener.c
 *		Accepting connections, also when there are no descriptors left.
 *
 *-------------------------------------------------------------------------
 */
#include "listener.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "../common/log.h"

#define PAUSE_MS 200 /* when there are no descriptors left */

struct Listener
{
	int fd;
	ListenerTake take;
	void *arg;
	uv_poll_t *poll;
	uv_timer_t *pause;
	bool cannot_accept; /* and the log says so */
};

static void on_connections(uv_poll_t *poll, int status, int events);

static void
on_pause_ended(uv_timer_t *timer)
{
	Listener *listener = timer->data;

	uv_poll_start(listener->poll, UV_READABLE, on_connections);
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
	Listener *listener = poll->data;
	int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	if (fd >= 0)
	{
		/* not for those of a path */
		(void) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		listener->take(listener->arg, fd);
		listener->cannot_accept = false;
	}
	else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
	{
		if (!listener->cannot_accept)
			log_line(LOG_LEVEL_ERROR, "connections cannot be accepted: they wait", "reason",
					 strerror(errno), NULL);
		listener->cannot_accept = true;
		uv_poll_stop(poll);
		uv_timer_start(listener->pause, on_pause_ended, PAUSE_MS, 0);
	}
	/* else it has gone already */
}

/* Bind and listen; closes the socket where that fails. */
static int
begin_listening(int fd, const struct sockaddr *name, socklen_t len)
{
	if (fd >= 0 && (bind(fd, name, len) != 0 || listen(fd, SOMAXCONN) != 0))
	{
		int error = errno;

		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

int
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
	if (fd >= 0)
		(void) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	return begin_listening(fd, (struct sockaddr *) &name, len);
}

/* Whether there is a socket on which nobody listens any more. */
static bool
is_stale(const struct sockaddr_un *name)
{
	struct stat status;
	bool is_refused;
	int fd;

	if (lstat(name->sun_path, &status) != 0 || !S_ISSOCK(status.st_mode))
		return false;
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	is_refused = fd >= 0 && connect(fd, (const struct sockaddr *) name, sizeof(*name)) != 0 &&
				 errno == ECONNREFUSED;
	if (fd >= 0)
		close(fd);
	return is_refused;
}

int
listen_on_path(const char *path)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	mode_t mask;
	int fd;

	memcpy(name.sun_path, path, strnlen(path, sizeof(name.sun_path) - 1));
	if (is_stale(&name))
		(void) unlink(path);
	mask = umask(0117);
	fd = begin_listening(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0),
						 (struct sockaddr *) &name, sizeof(name));
	umask(mask);
	return fd;
}

Listener *
listener_create(uv_loop_t *loop, int fd, ListenerTake take, void *arg)
{
	Listener *listener = calloc(1, sizeof(Listener));

	listener->fd = fd;
	listener->take = take;
	listener->arg = arg;
	listener->pause = calloc(1, sizeof(uv_timer_t));
	uv_timer_init(loop, listener->pause);
	listener->pause->data = listener;
	listener->poll = calloc(1, sizeof(uv_poll_t));
	uv_poll_init(loop, listener->poll, fd);
	listener->poll->data = listener;
	uv_poll_start(listener->poll, UV_READABLE, on_connections);
	return listener;
}

static void
free_handle(uv_handle_t *handle)
{
	free(handle);
}

void
listener_destroy(Listener *listener)
{
	uv_close((uv_handle_t *) listener->poll, free_handle);
	uv_close((uv_handle_t *) listener->pause, free_handle);
	close(listener->fd);
	free(listener);
}
