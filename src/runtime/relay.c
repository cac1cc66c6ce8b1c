/*-------------------------------------------------------------------------
 *
 * relay.c
 *		The gateway at the other end of a virtio port: for VMs without a network.
 *
 * The socket has a name of the abstract kind, which needs no file system and no
 * network interface; connections of other processes are not taken.
 *
 *-------------------------------------------------------------------------
 */
#include "relay.h"

#include <libwebsockets.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../common/cable.h"
#include "../common/log.h"
#include "loop.h"

#define PORTS "/sys/class/virtio-ports"
#define LOOK_MS 200	   /* for the port, or for somebody at its other end */
#define REPAIR_MS 1000 /* before the next try, when what came made no sense */
#define READS 64	   /* in a row: a port gives a page at a time */

static const Settings *settings;
static char address[64];
static int listener = -1;
static Cable cable;
static bool is_up;		/* somebody is at the other end; cable.fd is watched */
static bool was_synced; /* when last looked at */
static Timer look_timer;
static bool is_full;	/* the port takes no more for now */
static char reason[64]; /* why the port cannot be used, as logged last */
static int numbers[MUX_STREAMS];

/* A message, on its way in or out */
typedef struct Message
{
	lws_dll2_t list;
	void *memory;
	const uint8_t *bytes;
	size_t len;
} Message;

static const RelayEvents *message_events; /* NULL: there are none */
static size_t max_message;
static Message *coming;
static lws_dll2_owner_t come;  /* and not yet handed over */
static lws_dll2_owner_t going; /* the first one is the mux's, perhaps */
static size_t going_len;
static bool is_settling;
static bool was_sent;

static void look(void *arg);

/* ---- messages ---- */

static void
free_message(Message *message)
{
	lws_dll2_remove(&message->list);
	free(message->memory);
	free(message);
}

static uint8_t *
expect(void *arg, size_t len)
{
	if (message_events == NULL || len > max_message ||
		(coming = calloc(1, sizeof(Message))) == NULL)
		return NULL;
	coming->memory = malloc(len);
	coming->bytes = coming->memory;
	coming->len = len;
	if (coming->memory == NULL)
	{
		free(coming);
		coming = NULL;
		return NULL;
	}
	return coming->memory;
}

static void
message_came(void *arg, bool is_whole)
{
	if (is_whole)
		lws_dll2_add_tail(&coming->list, &come);
	else
		free_message(coming);
	coming = NULL;
}

static bool
next_message(void *arg, const uint8_t **bytes, size_t *len)
{
	const Message *message;

	if (going.head == NULL)
		return false;
	message = lws_container_of(going.head, Message, list);
	*bytes = message->bytes;
	*len = message->len;
	return true;
}

static void
message_sent(void *arg)
{
	Message *message = lws_container_of(going.head, Message, list);

	going_len -= message->len;
	free_message(message);
	was_sent = true;
}

/* What waits is for an other end that is not there any more. */
static void
drop_messages(void)
{
	while (going.head != NULL)
		free_message(lws_container_of(going.head, Message, list));
	going_len = 0;
}

/* Hand over what has come. */
static void
hand_over(void)
{
	while (come.head != NULL)
	{
		Message *message = lws_container_of(come.head, Message, list);

		lws_dll2_remove(&message->list);
		message_events->came((const char *) message->bytes, message->len);
		free_message(message);
	}
}

void
relay_take_messages(const RelayEvents *events, size_t max)
{
	message_events = events;
	max_message = max;
}

size_t
relay_waiting(void)
{
	return going_len;
}

/* ---- the port ---- */

/* The device of the port of that name. */
static bool
find_device(char *path, size_t size)
{
	const char *name = settings->gateway_device;
	DIR *ports;
	const struct dirent *port;
	bool found = false;

	if (name[0] == '/')
		return (size_t) snprintf(path, size, "%s", name) < size;
	ports = opendir(PORTS);
	while (ports != NULL && !found && (port = readdir(ports)) != NULL)
	{
		char text[128];
		ssize_t n = -1;
		int file;

		if (port->d_name[0] == '.')
			continue;
		(void) snprintf(path, size, PORTS "/%.64s/name", port->d_name);
		file = open(path, O_RDONLY | O_CLOEXEC);
		if (file >= 0)
		{
			n = read(file, text, sizeof(text) - 1);
			close(file);
		}
		if (n <= 0)
			continue;
		text[n] = '\0';
		text[strcspn(text, "\n")] = '\0';
		found = strcmp(text, name) == 0;
		(void) snprintf(path, size, "/dev/%.64s", port->d_name);
	}
	if (ports != NULL)
		closedir(ports);
	return found;
}

/* The port cannot be used for now, for this reason, which is said once: come again. */
static void
go_down(const char *why, int64_t ms)
{
	if (is_up)
		loop_unwatch(cable.fd);
	is_up = false;
	if (strcmp(why, reason) != 0)
		log_line(LOG_LEVEL_WARNING, "no way to the gateway", "device", settings->gateway_device,
				 "reason", why, NULL);
	snprintf(reason, sizeof(reason), "%s", why);
	cable_plug(&cable, cable.fd); /* what streams there were have ended */
	drop_messages();
	was_synced = false;
	timer_set(&look_timer, ms, look, NULL);
}

/* It is not a port any more. */
static void
give_up_port(void)
{
	int fd = cable.fd;

	go_down(strerror(errno), REPAIR_MS);
	cable_plug(&cable, -1);
	close(fd);
}

static void on_port(void *arg, uint32_t events);

/* Send what there is, as much as the port takes; false when it is not one any more. */
static bool
flush(void)
{
	bool done;

	is_settling = true;
	do
	{
		was_sent = false;
		done = cable_flush(&cable, &is_full);
		/* there may be more where that came from */
		if (done && was_sent)
			message_events->sent();
	} while (done && was_sent && !is_full);
	is_settling = false;
	return done;
}

/* Send what there is, and see what has become of it all. */
static void
settle(void)
{
	bool was_full = is_full;

	if (!is_up || is_settling)
		return;
	if (!flush())
	{
		give_up_port();
		return;
	}
	if (is_full != was_full)
		loop_watch(cable.fd, EPOLLIN | (is_full ? EPOLLOUT : 0), on_port, NULL);
	if (mux_is_synced(cable.mux) != was_synced)
	{
		was_synced = !was_synced;
		if (!was_synced)
			drop_messages();
		log_line(LOG_LEVEL_INFO, was_synced ? "gateway is connected" : "gateway begins anew",
				 "device", settings->gateway_device, NULL);
		reason[0] = '\0';
	}
}

static void
on_port(void *arg, uint32_t events)
{
	const char *problem;
	long n = events & (EPOLLIN | EPOLLHUP | EPOLLERR) ? 1 : 0;
	int reads = 0;

	is_settling = true; /* not before all has been handed over */
	while (n > 0 && reads++ < READS)
	{
		n = cable_read(&cable, &problem);
		hand_over();
		if (n < 0)
		{
			if (problem != NULL)
				go_down(problem, REPAIR_MS);
			else if (errno == 0)
				go_down("nobody is at its other end", LOOK_MS);
			else
				give_up_port();
			is_settling = false;
			return;
		}
	}
	is_settling = false;
	settle();
}

void
relay_send(void *memory, const char *bytes, size_t len)
{
	Message *message = calloc(1, sizeof(Message));

	if (message == NULL || !mux_is_synced(cable.mux))
	{
		free(message);
		free(memory);
		return;
	}
	message->memory = memory;
	message->bytes = (const uint8_t *) bytes;
	message->len = len;
	lws_dll2_add_tail(&message->list, &going);
	going_len += len;
	settle();
}

/* See whether the port is there, and somebody at its other end. */
static void
look(void *arg)
{
	struct pollfd port;

	if (cable.fd < 0)
	{
		char path[160];
		int fd = -1;

		errno = ENODEV;
		if (find_device(path, sizeof(path)))
			fd = open(path, O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
		if (fd < 0)
		{
			go_down(strerror(errno), LOOK_MS);
			return;
		}
		cable_plug(&cable, fd);
	}
	port = (struct pollfd){.fd = cable.fd, .events = POLLIN};
	if (poll(&port, 1, 0) == 1 && (port.revents & POLLHUP))
	{
		go_down("nobody is at its other end", LOOK_MS);
		return;
	}
	is_up = true;
	is_full = false;
	loop_watch(cable.fd, EPOLLIN, on_port, NULL);
	settle();
}

/* ---- its streams ---- */

static void
on_stream(void *arg, uint32_t events)
{
	cable_stream_event(&cable, *(int *) arg, events);
	settle();
}

static void
stream_closing(void *arg, int fd)
{
	loop_unwatch(fd);
}

static void
on_connection(void *arg, uint32_t events)
{
	int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	struct ucred peer;
	socklen_t len = sizeof(peer);
	int stream;

	if (fd < 0)
		return;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) != 0 || peer.pid != getpid() ||
		(stream = cable_attach(&cable, fd)) < 0)
	{
		close(fd);
		return;
	}
	loop_watch(fd, CABLE_STREAM_EVENTS, on_stream, &numbers[stream]);
	settle();
}

bool
relay_start(const Settings *with)
{
	static const CableEvents events = {.closing = stream_closing,
									   .expect = expect,
									   .message = message_came,
									   .next = next_message,
									   .sent = message_sent};
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	uint64_t random = 0;
	socklen_t len;
	int i;

	settings = with;
	if (settings->gateway_device == NULL)
		return true;
	for (i = 0; i < MUX_STREAMS; i++)
		numbers[i] = i;
	cable_init(&cable, &events);
	(void) !getrandom(&random, sizeof(random), GRND_NONBLOCK);
	snprintf(address, sizeof(address), "+@agentvm-%d-%016llx", (int) getpid(),
			 (unsigned long long) random);
	/* the same name with a NUL in place of the @ */
	len = (socklen_t) (offsetof(struct sockaddr_un, sun_path) + strlen(address) - 1);
	memcpy(name.sun_path + 1, address + 2, strlen(address) - 2);
	listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *) &name, len) != 0 ||
		listen(listener, MUX_STREAMS) != 0)
	{
		log_line(LOG_LEVEL_ERROR, "cannot listen to ourselves", "reason", strerror(errno), NULL);
		return false;
	}
	loop_watch(listener, EPOLLIN, on_connection, NULL);
	look(NULL);
	return true;
}

const char *
relay_address(void)
{
	return address;
}
