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
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "loop.h"

#define MAX_CHILDREN 8
#define MAX_WORDS 512

extern char **environ;

typedef struct Child
{
	pid_t pid; /* 0: free place */
	int output;
	ChildEnded ended;
	void *arg;
	Timer timeout;
} Child;

static Child children[MAX_CHILDREN];
static int signals = -1;
static void (*on_terminate)(void);

/* The last line that it printed. */
static void
read_words(int fd, char *words)
{
	off_t size = lseek(fd, 0, SEEK_END);
	off_t from = size > MAX_WORDS - 1 ? size - (MAX_WORDS - 1) : 0;
	ssize_t n = pread(fd, words, MAX_WORDS - 1, from);
	char *line;

	words[n > 0 ? n : 0] = '\0';
	while (n > 0 && words[n - 1] == '\n')
		words[--n] = '\0';
	line = strrchr(words, '\n');
	if (line != NULL)
		memmove(words, line + 1, strlen(line));
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
			Child child = children[i];
			char words[MAX_WORDS];

			if (child.pid != pid)
				continue;
			timer_stop(&children[i].timeout);
			memset(&children[i], 0, sizeof(Child));
			read_words(child.output, words);
			close(child.output);
			child.ended(child.arg, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
						words);
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

	while (child < children + MAX_CHILDREN && child->pid != 0)
		child++;
	if (child == children + MAX_CHILDREN)
		return false;
	child->output = memfd_create("output", MFD_CLOEXEC);
	if (child->output < 0)
		return false;
	child->pid = fork();
	if (child->pid == 0)
		run(argv, envp, child->output);
	if (child->pid < 0)
	{
		close(child->output);
		child->pid = 0;
		return false;
	}
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
