/*-------------------------------------------------------------------------
 *
 * loop.c
 *		The one loop: libwebsockets' own, with one epoll fd for everything else.
 *
 *-------------------------------------------------------------------------
 */
#include "loop.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "../common/log.h"

#define MAX_WATCHED 64

static struct lws_context *context;
static int epoll_fd = -1;
static struct
{
	bool used;
	int fd;
	LoopReady ready;
	void *arg;
} watched[MAX_WATCHED];
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

	/* one at a time: a handler may unwatch others */
	if (epoll_wait(epoll_fd, &event, 1, 0) == 1 && watched[event.data.u32].used)
		watched[event.data.u32].ready(watched[event.data.u32].arg, event.events);
}

void
loop_watch(int fd, uint32_t events, LoopReady ready, void *arg)
{
	struct epoll_event event = {.events = events};
	int i, place = -1;

	for (i = 0; i < MAX_WATCHED; i++)
	{
		if (watched[i].used && watched[i].fd == fd)
			break;
		if (!watched[i].used && place < 0)
			place = i;
	}
	if (i == MAX_WATCHED && place < 0)
	{
		log_line(LOG_LEVEL_ERROR, "too many files are watched", NULL);
		return;
	}
	event.data.u32 = (uint32_t) (i < MAX_WATCHED ? i : place);
	if (epoll_ctl(epoll_fd, i < MAX_WATCHED ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) != 0)
		log_line(LOG_LEVEL_ERROR, "cannot watch a file", NULL);
	watched[event.data.u32].used = true;
	watched[event.data.u32].fd = fd;
	watched[event.data.u32].ready = ready;
	watched[event.data.u32].arg = arg;
}

void
loop_unwatch(int fd)
{
	int i;

	for (i = 0; i < MAX_WATCHED; i++)
	{
		if (watched[i].used && watched[i].fd == fd)
		{
			watched[i].used = false;
			(void) epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
		}
	}
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
