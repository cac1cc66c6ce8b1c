/*-------------------------------------------------------------------------
 *
 * cable.c
 *		One end of a cable: a mux between a file descriptor and sockets, one for each stream.
 *
 *-------------------------------------------------------------------------
 */
#include "cable.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_READ (32 * 1024)
#define MIN_PLACED 4096 /* a copy of less costs less than another read */

static void
close_stream(Cable *cable, int stream)
{
	cable->events.closing(cable->events.arg, cable->streams[stream]);
	close(cable->streams[stream]);
	cable->streams[stream] = -1;
}

static bool
opened(void *arg, int stream)
{
	Cable *cable = arg;

	cable->streams[stream] = cable->events.opened(cable->events.arg, stream);
	return cable->streams[stream] >= 0;
}

static size_t
deliver(void *arg, int stream, const uint8_t *bytes, size_t len)
{
	Cable *cable = arg;
	ssize_t n = send(cable->streams[stream], bytes, len, MSG_DONTWAIT | MSG_NOSIGNAL);

	if (n >= 0)
		return (size_t) n;
	if (errno == EAGAIN || errno == EINTR || errno == ENOBUFS)
		return 0;
	close_stream(cable, stream);
	return MUX_END;
}

static size_t
fetch(void *arg, int stream, uint8_t *bytes, size_t room)
{
	Cable *cable = arg;
	ssize_t n;

	do
		n = recv(cable->streams[stream], bytes, room, MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n > 0)
		return (size_t) n;
	if (n < 0 && errno == EAGAIN)
		return 0;
	close_stream(cable, stream);
	return MUX_END;
}

static void
closed(void *arg, int stream)
{
	close_stream(arg, stream);
}

static uint8_t *
expect(void *arg, size_t len)
{
	Cable *cable = arg;

	return cable->events.expect(cable->events.arg, len);
}

static void
message(void *arg, bool is_whole)
{
	Cable *cable = arg;

	cable->events.message(cable->events.arg, is_whole);
}

static bool
next(void *arg, const uint8_t **bytes, size_t *len)
{
	Cable *cable = arg;

	return cable->events.next(cable->events.arg, bytes, len);
}

static void
sent(void *arg)
{
	Cable *cable = arg;

	cable->events.sent(cable->events.arg);
}

void
cable_init(Cable *cable, const CableEvents *events)
{
	MuxEvents mux_events = {.opened = events->opened ? opened : NULL,
							.deliver = deliver,
							.fetch = fetch,
							.closed = closed,
							.expect = expect,
							.message = message,
							.next = next,
							.sent = sent,
							.arg = cable};
	int i;

	memset(cable, 0, sizeof(*cable));
	cable->events = *events;
	cable->mux = mux_create(&mux_events);
	cable->fd = -1;
	for (i = 0; i < MUX_STREAMS; i++)
		cable->streams[i] = -1;
}

void
cable_end(Cable *cable)
{
	int i;

	mux_free(cable->mux);
	cable->mux = NULL;
	for (i = 0; i < MUX_STREAMS; i++)
	{
		if (cable->streams[i] >= 0)
			close_stream(cable, i);
	}
}

void
cable_plug(Cable *cable, int fd)
{
	uint64_t nonce = 0;

	/* it need not be secret, only another one each time */
	if (getrandom(&nonce, sizeof(nonce), GRND_NONBLOCK) != sizeof(nonce) || nonce == 0)
	{
		struct timespec now;

		clock_gettime(CLOCK_BOOTTIME, &now);
		nonce = (uint64_t) now.tv_sec * 1000000000 + (uint64_t) now.tv_nsec + 1;
	}
	if (fd != cable->fd)
		cable->out_at = cable->out_len = 0;
	cable->fd = fd;
	mux_restart(cable->mux, nonce);
}

long
cable_read(Cable *cable, const char **problem)
{
	uint8_t bytes[MAX_READ];
	uint8_t *place = NULL;
	size_t room = mux_room(cable->mux, &place);
	bool is_placed = room >= MIN_PLACED;
	ssize_t n = is_placed ? read(cable->fd, place, room) : read(cable->fd, bytes, sizeof(bytes));

	*problem = NULL;
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -1;
	errno = 0;
	if (n == 0)
		return -1;
	if (is_placed)
		mux_placed(cable->mux, (size_t) n);
	else
		*problem = mux_input(cable->mux, bytes, (size_t) n);
	return *problem == NULL ? n : -1;
}

bool
cable_flush(Cable *cable, bool *more)
{
	*more = false;
	while (cable->fd >= 0)
	{
		const uint8_t *plain = NULL;
		size_t plain_len = 0;
		ssize_t n;

		if (cable->out_len == 0)
			plain = mux_plain(cable->mux, &plain_len);
		if (cable->out_len == 0 && plain_len == 0)
		{
			cable->out_at = 0;
			cable->out_len = mux_output(cable->mux, cable->out, sizeof(cable->out));
			if (cable->out_len == 0)
				break;
		}
		n = plain_len > 0 ? write(cable->fd, plain, plain_len)
						  : write(cable->fd, cable->out + cable->out_at, cable->out_len);
		if (n < 0 && errno != EAGAIN && errno != EINTR)
			return false;
		if (n <= 0)
		{
			*more = true;
			break;
		}
		if (plain_len > 0)
		{
			mux_plain_sent(cable->mux, (size_t) n);
			continue;
		}
		cable->out_at += (size_t) n;
		cable->out_len -= (size_t) n;
	}
	return true;
}

int
cable_attach(Cable *cable, int fd)
{
	int stream = mux_open(cable->mux);

	if (stream >= 0)
		cable->streams[stream] = fd;
	return stream;
}

void
cable_stream_event(Cable *cable, int stream, uint32_t events)
{
	if (cable->streams[stream] < 0)
		return;
	/* given up while it waited: what it wanted to say is to be said by nobody */
	if ((events & EPOLLHUP) && !mux_is_open(cable->mux, stream))
	{
		mux_close(cable->mux, stream);
		close_stream(cable, stream);
		return;
	}
	mux_ready(cable->mux, stream);
	mux_resume(cable->mux, stream);
}
