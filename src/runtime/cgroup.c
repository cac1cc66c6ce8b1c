/*-------------------------------------------------------------------------
 *
 * cgroup.c
 *		Control groups (version 2) of commands: what they have started, and how many.
 *
 * Below systemd our own group is delegated to us (Delegate=yes).  It may have
 * controllers for groups below only when no process is in it itself, so that we
 * move into a leaf:
 *
 *	agentvm-runtime.service/runtime			we
 *	agentvm-runtime.service/commands		pids.max
 *	agentvm-runtime.service/commands/UUID	a command, and whatever it has started
 *	agentvm-runtime.service/commands/others	what remained of commands that are forgotten
 *
 *-------------------------------------------------------------------------
 */
#include "cgroup.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "../common/log.h"
#include "files.h"

#define CGROUP2_MAGIC 0x63677270
#define MAX_PROCS (1024 * 1024) /* bytes of cgroup.procs */
#define OTHERS "others"
#define TRIES 10 /* processes may be forking */

static char root[PATH_MAX / 2]; /* of the commands' groups; empty: there are none */

/* Write to a file of a group; false, with errno. */
static bool
write_to(const char *group, const char *file, const char *text)
{
	char path[PATH_MAX];
	int fd;
	bool ok;

	snprintf(path, sizeof(path), "%s/%s", group, file);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ok = write(fd, text, strlen(text)) == (ssize_t) strlen(text);
	close(fd);
	return ok;
}

/* Where version 2 is mounted, also beside version 1; NULL: nowhere. */
static const char *
mount_point(void)
{
	static const char *const places[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"};
	struct statfs status;
	int i;

	for (i = 0; i < 2; i++)
	{
		if (statfs(places[i], &status) == 0 && status.f_type == CGROUP2_MAGIC)
			return places[i];
	}
	return NULL;
}

/* Our own group, "/" being the root; false: there is none. */
static bool
own_group(char *path, size_t size)
{
	char *content = file_read("/proc/self/cgroup", 16384, NULL);
	char *line, *next;
	bool found = false;

	for (line = content; line != NULL && !found; line = next)
	{
		next = strchr(line, '\n');
		if (next != NULL)
			*next++ = '\0';
		if (strncmp(line, "0::/", 4) == 0)
			found = (size_t) snprintf(path, size, "%s", line + 3) < size;
	}
	free(content);
	return found;
}

static bool
make(const char *path)
{
	return mkdir(path, 0755) == 0 || errno == EEXIST;
}

/* Let the groups below one have a bound of processes. */
static bool
enable_pids(const char *group)
{
	return write_to(group, "cgroup.subtree_control", "+pids");
}

/* Find or make the commands' group; returns what is in the way, or NULL. */
static const char *
find_root(bool *has_pids)
{
	const char *top = mount_point();
	char own[PATH_MAX / 4];
	char base[PATH_MAX / 2 - 16];
	char leaf[PATH_MAX / 2];

	if (top == NULL)
		return "cgroup version 2 is not mounted";
	if (getpid() == 1)
	{
		*has_pids = enable_pids(top);
		snprintf(root, sizeof(root), "%s/agentvm", top);
		return make(root) ? NULL : strerror(errno);
	}
	if (!own_group(own, sizeof(own)) || strcmp(own, "/") == 0)
		return "there is no group of our own";
	snprintf(base, sizeof(base), "%s%s", top, own);
	snprintf(leaf, sizeof(leaf), "%s/runtime", base);
	snprintf(root, sizeof(root), "%s/commands", base);
	if (!make(leaf) || !make(root) || !write_to(leaf, "cgroup.procs", "0"))
		return strerror(errno);
	*has_pids = enable_pids(base);
	return NULL;
}

void
cgroup_setup(int pids_limit)
{
	bool has_pids = false;
	char text[16] = "max";
	const char *problem = find_root(&has_pids);
	DIR *groups;
	const struct dirent *group;

	if (problem != NULL)
	{
		root[0] = '\0';
		log_line(LOG_LEVEL_INFO, "commands have no control groups: their processes are not bounded",
				 "reason", problem, NULL);
		return;
	}
	if (pids_limit > 0)
		snprintf(text, sizeof(text), "%d", pids_limit);
	if (!has_pids || !write_to(root, "pids.max", text))
		log_line(pids_limit > 0 ? LOG_LEVEL_WARNING : LOG_LEVEL_DEBUG,
				 "the processes of commands are not bounded", "reason", strerror(errno), NULL);
	/* of an earlier process */
	groups = opendir(root);
	while (groups != NULL && (group = readdir(groups)) != NULL)
	{
		if (group->d_type == DT_DIR && group->d_name[0] != '.' &&
			strcmp(group->d_name, OTHERS) != 0)
			cgroup_abandon(group->d_name);
	}
	if (groups != NULL)
		closedir(groups);
}

int
cgroup_make(const char *name)
{
	char path[PATH_MAX];

	if (root[0] == '\0')
		return -1;
	snprintf(path, sizeof(path), "%s/%s", root, name);
	if (!make(path))
		return -1;
	snprintf(path, sizeof(path), "%s/%s/cgroup.procs", root, name);
	return open(path, O_WRONLY | O_CLOEXEC);
}

/* Do something with each process of a group; returns how many there are. */
static int
each(const char *name, void (*act)(pid_t pid, int arg), int arg)
{
	char path[PATH_MAX];
	char *content, *at;
	int n = 0;

	snprintf(path, sizeof(path), "%s/%s/cgroup.procs", root, name);
	content = file_read(path, MAX_PROCS, NULL);
	for (at = content; at != NULL && *at != '\0';)
	{
		char *end;
		long pid = strtol(at, &end, 10);

		if (end == at)
			break;
		if (pid > 0) /* 0: of another namespace */
			act((pid_t) pid, arg);
		n++;
		at = end + (*end == '\n');
	}
	free(content);
	return n;
}

static void
send_signal(pid_t pid, int signal_number)
{
	kill(pid, signal_number);
}

static void
move_to_others(pid_t pid, int arg)
{
	char group[PATH_MAX];
	char text[16];

	snprintf(group, sizeof(group), "%s/" OTHERS, root);
	snprintf(text, sizeof(text), "%d", (int) pid);
	(void) write_to(group, "cgroup.procs", text);
}

int
cgroup_signal(const char *name, int signal_number)
{
	char group[PATH_MAX];
	int n;

	n = each(name, send_signal, signal_number);
	snprintf(group, sizeof(group), "%s/%s", root, name);
	/* those that are being made as well, where the kernel can do that */
	if (signal_number == SIGKILL && n > 0 && !write_to(group, "cgroup.kill", "1"))
	{
		int tries = TRIES;

		while (--tries > 0 && each(name, send_signal, signal_number) > 0)
			;
	}
	return n;
}

bool
cgroup_remove(const char *name)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s/%s", root, name);
	return rmdir(path) == 0 || errno == ENOENT;
}

void
cgroup_abandon(const char *name)
{
	char path[PATH_MAX];
	int tries = TRIES;

	snprintf(path, sizeof(path), "%s/" OTHERS, root);
	(void) make(path);
	while (!cgroup_remove(name) && --tries > 0)
		(void) each(name, move_to_others, 0);
}
