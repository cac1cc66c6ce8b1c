/*-------------------------------------------------------------------------
 *
 * deadman.c
 *		The machine's own end: after its deadline, or without control plane for too long.
 *
 * All is reckoned in CLOCK_BOOTTIME, which no clock setting moves and which
 * counts while the machine is suspended.  A deadline is a time of the server's
 * clock: how far that is from our boot the server's Date header says.  As long
 * as there was none, it is taken from our own wall clock, once, at the first
 * contact, so that a later jump of that clock changes nothing.
 *
 *-------------------------------------------------------------------------
 */
#include "deadman.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "../common/log.h"
#include "answer.h"
#include "loop.h"
#include "power.h"

static const Settings *settings;
static const State *state;
static Times times;
static int timer = -1;
static int64_t server_zero = NO_TIME; /* the server's clock when our boot time was 0 */
static bool struck;

static int64_t
off_at(void)
{
	int64_t lonely = times.contact + state->deadman_allowance_ms;
	int64_t late =
		times.deadline == INT64_MAX ? INT64_MAX : times.deadline + state->deadline_grace_ms;

	return lonely < late ? lonely : late;
}

static void
arm(void)
{
	struct itimerspec when = {{0, 0}, {0, 0}};
	int64_t ms = off_at();

	if (ms < 1)
		ms = 1; /* zero would disarm it */
	when.it_value.tv_sec = ms / 1000;
	when.it_value.tv_nsec = ms % 1000 * 1000000;
	if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL) != 0)
		log_line(LOG_LEVEL_ERROR, "cannot arm the power-off", "reason", strerror(errno), NULL);
}

static void
on_timer(void *arg, uint32_t events)
{
	uint64_t count;

	if (read(timer, &count, sizeof(count)) != sizeof(count) || boottime_ms() < off_at() || struck)
		return;
	struck = true;
	log_line(LOG_LEVEL_WARNING, "the machine powers itself off", "reason",
			 boottime_ms() >= times.contact + state->deadman_allowance_ms
				 ? "the control plane has been gone for too long"
				 : "its deadline has passed",
			 NULL);
	loop_unwatch(timer);
	power_off(settings);
}

bool
deadman_start(const Settings *with, const State *of)
{
	settings = with;
	state = of;
	if (!times_read(&times, settings))
	{
		times.contact = boottime_ms(); /* not yet missed */
		times.deadline = INT64_MAX;
		times_save(&times, settings);
	}
	timer = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC | TFD_NONBLOCK);
	if (timer < 0)
	{
		log_line(LOG_LEVEL_ERROR, "cannot make a timer", "reason", strerror(errno), NULL);
		return false;
	}
	loop_watch(timer, EPOLLIN, on_timer, NULL);
	arm();
	return true;
}

void
deadman_clock(int64_t date)
{
	if (date == NO_TIME)
		return;
	server_zero = date - boottime_ms();
}

void
deadman_contact(int64_t deadline)
{
	int64_t now = boottime_ms();

	if (server_zero == NO_TIME)
	{
		struct timespec wall;

		clock_gettime(CLOCK_REALTIME, &wall);
		server_zero = (int64_t) wall.tv_sec * 1000 + wall.tv_nsec / 1000000 - now;
	}
	times.contact = now;
	times.deadline = deadline - server_zero;
	times_save(&times, settings);
	arm();
}

bool
deadman_has_struck(void)
{
	return struck;
}
