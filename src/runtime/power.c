/*-------------------------------------------------------------------------
 *
 * power.c
 *		The end of the machine, and its beginning where we are PID 1.
 *
 *-------------------------------------------------------------------------
 */
#include "power.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../common/log.h"
#include "child.h"
#include "loop.h"

#define PATIENCE_MS 5000 /* for processes to end after SIGTERM */

static const Settings *settings;
static Timer timer;
static int tries;

/* Mount a file system unless something that it would bring is there already. */
static void
mount_missing(const char *type, const char *where, const char *sign, unsigned long flags,
			  const char *options)
{
	if (access(sign, F_OK) == 0)
		return;
	(void) mkdir(where, 0755);
	if (mount(type, where, type, flags, options) != 0)
		log_line(LOG_LEVEL_WARNING, "cannot mount", "on", where, "reason", strerror(errno), NULL);
}

void
power_setup_init(void)
{
	struct stat root, run;

	mount_missing("proc", "/proc", "/proc/self", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_missing("sysfs", "/sys", "/sys/kernel", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_missing("cgroup2", "/sys/fs/cgroup", "/sys/fs/cgroup/cgroup.procs",
				  MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_missing("devtmpfs", "/dev", "/dev/null", MS_NOSUID, "mode=0755");
	if (stat("/", &root) == 0 && (stat("/run", &run) != 0 || run.st_dev == root.st_dev))
		mount_missing("tmpfs", "/run", "", MS_NOSUID | MS_NODEV, "mode=0755");
	if (getenv("PATH") == NULL)
		(void) setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	if (chdir("/") != 0)
		log_line(LOG_LEVEL_WARNING, "cannot change to /", "reason", strerror(errno), NULL);
}

void
power_off_now(void)
{
	int64_t until = boottime_ms() + PATIENCE_MS;
	int signal_number = SIGTERM;

	log_line(LOG_LEVEL_INFO, "powering off", NULL);
	for (;;)
	{
		kill(-1, signal_number);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD)
			break;
		if (boottime_ms() > until)
		{
			if (signal_number == SIGKILL)
				break;
			signal_number = SIGKILL;
			until += PATIENCE_MS;
		}
		usleep(20000);
	}
	sync();
	reboot(RB_POWER_OFF);
	log_line(LOG_LEVEL_ERROR, "cannot power off", "reason", strerror(errno), NULL);
	exit(1);
}

static void try_to_power_off(void *arg);

static void
ended(void *arg, int code, const char *words)
{
	char text[16];

	if (code == 0)
		return; /* on its way */
	snprintf(text, sizeof(text), "%d", code);
	log_line(LOG_LEVEL_WARNING, "power-off command failed", "code", text, "words", words, NULL);
	if (settings->poweroff_command == NULL)
		timer_set(&timer, 0, try_to_power_off, NULL);
}

static void
try_to_power_off(void *arg)
{
	char *commands[][3] = {
		{"systemctl", "poweroff", NULL}, {"/sbin/poweroff", NULL, NULL}, {"poweroff", NULL, NULL}};
	char *own[] = {(char *) settings->poweroff_command, NULL};
	int number = tries++;

	timer_set(&timer, settings->poweroff_retry_ms, try_to_power_off, NULL);
	if (settings->poweroff_command != NULL)
	{
		if (!child_start(own, NULL, settings->poweroff_retry_ms, ended, NULL))
			log_line(LOG_LEVEL_ERROR, "cannot start the power-off command", NULL);
		return;
	}
	if (getpid() == 1)
		power_off_now();
	if (number < 3 && child_start(commands[number], NULL, settings->poweroff_retry_ms, ended, NULL))
		return;
	sync();
	reboot(RB_POWER_OFF);
	log_line(LOG_LEVEL_ERROR, "cannot power off", "reason", strerror(errno), NULL);
}

void
power_off(const Settings *with)
{
	settings = with;
	try_to_power_off(NULL);
}
