/*-------------------------------------------------------------------------
 *
 * child.c
 *		Processes that we start, and those that PID 1 inherits.
 *
 *-------------------------------------------------------------------------
 */
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "loop.h"

#define MAX_CHILDREN 8
#define MAX_WORDS 512
#define CHUNK 4096
#define PIPE_CHUNKS 16 /* what a pipe holds */

extern char **environ;

typedef struct Child
{
	pid_t pid;	/* 0: free place */
	int output; /* our end of the pipe */
	char words[MAX_WORDS];
	size_t len;
	ChildEnded ended;
	void *arg;
	Timer timeout;
} Child;

static Child children[MAX_CHILDREN];
static int signals = -1;
static void (*on_terminate)(void);

/* Read some of what it prints and keep the end, so that no flood fills our memory; as read(). */
static ssize_t
read_output(Child *child)
{
	char text[MAX_WORDS + CHUNK];
	ssize_t n = read(child->output, text + child->len, CHUNK);
	size_t len;

	if (n <= 0)
		return n;
	memcpy(text, child->words, child->len);
	len = child->len + (size_t) n;
	child->len = len < MAX_WORDS ? len : MAX_WORDS - 1;
	memcpy(child->words, text + len - child->len, child->len);
	return n;
}

static void
on_output(void *arg, uint32_t events)
{
	Child *child = arg;

	if (read_output(child) == 0)
		loop_unwatch(child->output);
}

/* The last line that it printed. */
static char *
last_line(Child *child)
{
	char *line;

	child->words[child->len] = '\0';
	while (child->len > 0 && child->words[child->len - 1] == '\n')
		child->words[--child->len] = '\0';
	line = strrchr(child->words, '\n');
	return line != NULL ? line + 1 : child->words;
}

static void
reap(void)
{
	int status;
	pid_t pid;
	int i;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
	{
		for (i = 0; i < MAX_CHILDREN; i++)
		{
			Child child;
			int chunks = 0;

			if (children[i].pid != pid)
				continue;
			/* no more than that: processes of its own may go on printing */
			while (read_output(&children[i]) > 0 && ++chunks < PIPE_CHUNKS)
				;
			loop_unwatch(children[i].output);
			close(children[i].output);
			timer_stop(&children[i].timeout);
			child = children[i];
			memset(&children[i], 0, sizeof(Child));
			child.ended(child.arg, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
						last_line(&child));
			break;
		}
	}
}

static void
on_signal(void *arg, uint32_t events)
{
	struct signalfd_siginfo info;

	if (read(signals, &info, sizeof(info)) != sizeof(info))
		return;
	if (info.ssi_signo == SIGCHLD)
		reap();
	else
		on_terminate();
}

bool
child_setup(void (*terminate)(void))
{
	sigset_t set;

	on_terminate = terminate;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	signals = sigprocmask(SIG_BLOCK, &set, NULL) == 0
				  ? signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK)
				  : -1;
	if (signals < 0)
		return false;
	signal(SIGPIPE, SIG_IGN);
	loop_watch(signals, EPOLLIN, on_signal, NULL);
	return true;
}

static void
on_timeout(void *arg)
{
	Child *child = arg;

	kill(-child->pid, SIGKILL); /* its process group; the end is told by SIGCHLD */
}

/* In the child: nothing of ours but the three standard files. */
static void
run(char *const *argv, char *const *envp, int output)
{
	sigset_t none;
	int fd;

	setsid();
	sigemptyset(&none);
	signal(SIGPIPE, SIG_DFL);
	fd = open("/dev/null", O_RDONLY);
	if (fd < 0 || dup2(fd, 0) < 0 || dup2(output, 1) < 0 || dup2(output, 2) < 0)
		_exit(126);
#ifdef SYS_close_range
	if (syscall(SYS_close_range, 3, ~0U, 0) != 0)
#endif
	{
		for (fd = 3; fd < 1024; fd++)
			close(fd);
	}
	sigprocmask(SIG_SETMASK, &none, NULL);
	execvpe(argv[0], argv, envp != NULL ? envp : environ);
	_exit(127);
}

bool
child_start(char *const *argv, char *const *envp, int64_t timeout_ms, ChildEnded ended, void *arg)
{
	Child *child = children;
	int ends[2];

	while (child < children + MAX_CHILDREN && child->pid != 0)
		child++;
	if (child == children + MAX_CHILDREN)
		return false;
	if (pipe2(ends, O_CLOEXEC) != 0)
		return false;
	child->pid = fork();
	if (child->pid == 0)
		run(argv, envp, ends[1]);
	close(ends[1]);
	if (child->pid < 0)
	{
		close(ends[0]);
		child->pid = 0;
		return false;
	}
	child->output = ends[0];
	(void) fcntl(child->output, F_SETFL, O_NONBLOCK);
	loop_watch(child->output, EPOLLIN, on_output, child);
	child->ended = ended;
	child->arg = arg;
	if (timeout_ms > 0)
		timer_set(&child->timeout, timeout_ms, on_timeout, child);
	return true;
}

void
child_kill_all(void)
{
	int i;

	for (i = 0; i < MAX_CHILDREN; i++)
	{
		if (children[i].pid != 0)
			kill(-children[i].pid, SIGKILL);
	}
}
