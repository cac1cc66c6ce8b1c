/*-------------------------------------------------------------------------
 *
 * loop.c
 *		The one loop: libwebsockets' own, with one epoll fd for everything else.
 *
 *-------------------------------------------------------------------------
 */
#include "loop.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "../common/log.h"

#define EVENTS_PER_TURN 16	  /* then libwebsockets has its own */
#define READ_SIZE (64 * 1024) /* bytes of a connection that are read at once */

typedef struct Watched
{
	LoopReady ready; /* NULL: it is not watched */
	void *arg;
} Watched;

static struct lws_context *context;
static int epoll_fd = -1;
static Watched *watched; /* by fd */
static int num_watched;
static bool stopping;
static int code;

/* libwebsockets' own words, without their line's end */
static void
lws_said(int level, const char *line)
{
	char text[256];

	snprintf(text, sizeof(text), "%s", line);
	text[strcspn(text, "\n")] = '\0';
	log_line(level & LLL_ERR ? LOG_LEVEL_WARNING : LOG_LEVEL_DEBUG, "connection", "text", text,
			 NULL);
}

bool
loop_create(const struct lws_protocols *protocols, void *tls)
{
	static const lws_retry_bo_t idle_rules = {.secs_since_valid_ping = 30,
											  .secs_since_valid_hangup = 90};
	struct lws_context_creation_info info;
	lws_sock_file_fd_type fd;

	lws_set_log_level(LLL_ERR | LLL_WARN, lws_said);
	memset(&info, 0, sizeof(info));
	info.port = CONTEXT_PORT_NO_LISTEN;
	info.protocols = protocols;
	info.retry_and_idle_policy = &idle_rules;
	info.fd_limit_per_thread = 64;
	info.pt_serv_buf_size = READ_SIZE;
	info.provided_client_ssl_ctx = tls;
	info.uid = (uid_t) -1;
	info.gid = (gid_t) -1;
	if (tls != NULL)
		info.options = LWS_SERVER_OPTION_DO_SSL_GLOBAL_INIT;
	context = lws_create_context(&info);
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	fd.filefd = epoll_fd;
	if (context == NULL || epoll_fd < 0 ||
		lws_adopt_descriptor_vhost(lws_get_vhost_by_name(context, "default"),
								   LWS_ADOPT_RAW_FILE_DESC, fd, protocols[0].name, NULL) == NULL)
	{
		log_line(LOG_LEVEL_ERROR, "cannot make an event loop", NULL);
		return false;
	}
	return true;
}

struct lws_context *
loop_context(void)
{
	return context;
}

void
loop_destroy(void)
{
	if (context != NULL)
		lws_context_destroy(context);
	context = NULL;
}

int
loop_run(void)
{
	while (!stopping && lws_service(context, 0) >= 0)
		;
	return stopping ? code : 1;
}

void
loop_stop(int exit_code)
{
	if (!stopping)
		code = exit_code;
	stopping = true;
	lws_cancel_service(context);
}

bool
loop_is_stopping(void)
{
	return stopping;
}

void
loop_events(void)
{
	struct epoll_event event;

	int i;

	/* one at a time: a handler may unwatch others */
	for (i = 0; i < EVENTS_PER_TURN && epoll_wait(epoll_fd, &event, 1, 0) == 1; i++)
	{
		if (event.data.fd < num_watched && watched[event.data.fd].ready != NULL)
			watched[event.data.fd].ready(watched[event.data.fd].arg, event.events);
	}
}

bool
loop_watch(int fd, uint32_t events, LoopReady ready, void *arg)
{
	struct epoll_event event = {.events = events, .data.fd = fd};

	if (fd >= num_watched)
	{
		int room = (fd + 1) * 2;
		Watched *more = realloc(watched, (size_t) room * sizeof(Watched));

		if (more == NULL)
		{
			log_line(LOG_LEVEL_ERROR, "cannot watch a file", "reason", strerror(errno), NULL);
			return false;
		}
		memset(more + num_watched, 0, (size_t) (room - num_watched) * sizeof(Watched));
		watched = more;
		num_watched = room;
	}
	if (epoll_ctl(epoll_fd, watched[fd].ready != NULL ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd,
				  &event) != 0)
	{
		log_line(LOG_LEVEL_ERROR, "cannot watch a file", "reason", strerror(errno), NULL);
		return false;
	}
	watched[fd].ready = ready;
	watched[fd].arg = arg;
	return true;
}

void
loop_unwatch(int fd)
{
	if (fd < 0 || fd >= num_watched || watched[fd].ready == NULL)
		return;
	watched[fd].ready = NULL;
	(void) epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

static void
on_sul(lws_sorted_usec_list_t *sul)
{
	Timer *timer = (Timer *) sul;

	timer->fire(timer->arg);
}

void
timer_set(Timer *timer, int64_t ms, void (*fire)(void *arg), void *arg)
{
	timer->fire = fire;
	timer->arg = arg;
	lws_sul_schedule(context, 0, &timer->sul, on_sul, (ms > 0 ? ms : 0) * LWS_US_PER_MS + 1);
}

void
timer_stop(Timer *timer)
{
	lws_sul_schedule(context, 0, &timer->sul, on_sul, LWS_SET_TIMER_USEC_CANCEL);
}

bool
timer_is_set(const Timer *timer)
{
	return timer->sul.list.owner != NULL;
}

int64_t
boottime_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return (int64_t) now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int64_t
jittered(int64_t ms)
{
	uint32_t random = 0;

	if (getrandom(&random, sizeof(random), GRND_NONBLOCK) != sizeof(random))
		random = (uint32_t) boottime_ms(); /* too early after boot for better ones */
	return ms - ms / 5 + (int64_t) (random % 1024) * (2 * ms / 5) / 1023;
}
