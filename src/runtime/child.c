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
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "loop.h"

#define MAX_JOBS 8
#define MAX_WORDS 512
#define CHUNK 4096
#define PIPE_CHUNKS 16 /* what a pipe holds */
#define MAX_REAPED 256 /* before others have their turn */
#define MAX_FILES 65536
#define COMMAND_OOM_SCORE 200

extern char **environ;

/* A process of which only the end, and the end of what it prints, matter */
typedef struct Job
{
	Child child; /* pid 0: free place */
	int output;	 /* our end of the pipe */
	char words[MAX_WORDS];
	size_t len;
	ChildEnded ended;
	void *arg;
	Timer timeout;
} Job;

static lws_dll2_owner_t children;
static Job jobs[MAX_JOBS];
static int signals = -1;
static void (*on_terminate)(void);
static Timer reap_timer;
static struct rlimit files_limit; /* as we were given it */
static int oom_score;			  /* of commands */

#if defined(__x86_64__)
#define HAS_QUICK_START
static char quick_stack[64 * 1024]
	__attribute__((aligned(16))); /* of a child, see start_quickly() */
#endif

/* ---- their end ---- */

static void
reap(void *arg)
{
	int status;
	pid_t pid;
	int n = 0;

	while (n++ < MAX_REAPED && (pid = waitpid(-1, &status, WNOHANG)) > 0)
	{
		lws_start_foreach_dll(lws_dll2_t *, at, children.head)
		{
			Child *child = lws_container_of(at, Child, list);

			if (child->pid == pid)
			{
				lws_dll2_remove(&child->list);
				child->pid = 0;
				child->exited(child->arg,
							  WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
				break;
			}
		}
		lws_end_foreach_dll(at);
	}
	if (n > MAX_REAPED)
		timer_set(&reap_timer, 0, reap, NULL);
}

static void
on_signal(void *arg, uint32_t events)
{
	struct signalfd_siginfo info;

	if (read(signals, &info, sizeof(info)) != sizeof(info))
		return;
	if (info.ssi_signo == SIGCHLD)
		reap(NULL);
	else
		on_terminate();
}

/* Commands end before us, and before what else the machine needs, when memory is short. */
static int
command_oom_score(void)
{
	char text[16] = "";
	int fd = open("/proc/self/oom_score_adj", O_RDONLY | O_CLOEXEC);
	int ours;

	if (fd >= 0)
	{
		(void) !read(fd, text, sizeof(text) - 1);
		close(fd);
	}
	ours = atoi(text);
	return ours < COMMAND_OOM_SCORE ? COMMAND_OOM_SCORE : ours < 1000 ? ours + 1 : ours;
}

bool
child_setup(void (*terminate)(void))
{
	struct rlimit limit;
	sigset_t set;
	int i;

	on_terminate = terminate;
	if (getrlimit(RLIMIT_NOFILE, &files_limit) == 0)
	{
		limit.rlim_max = files_limit.rlim_max;
		limit.rlim_cur = limit.rlim_max < MAX_FILES ? limit.rlim_max : MAX_FILES;
		(void) setrlimit(RLIMIT_NOFILE, &limit);
	}
	oom_score = command_oom_score();
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	signals = sigprocmask(SIG_BLOCK, &set, NULL) == 0
				  ? signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK)
				  : -1;
	if (signals < 0)
		return false;
	/* what whoever started us ignores is not to be ignored by commands */
	for (i = 1; i < NSIG; i++)
		signal(i, SIG_DFL);
	signal(SIGPIPE, SIG_IGN);
	return loop_watch(signals, EPOLLIN, on_signal, NULL);
}

/* ---- their beginning ---- */

static void
write_to(int fd, const char *text)
{
	if (fd >= 0)
		(void) !write(fd, text, strlen(text));
}

/* In the child: it cannot be what it was to be. */
static void
refuse(const ChildSpec *spec, const char *what)
{
	int code = errno == ENOENT || errno == ENOTDIR ? 127 : 126;

	if (spec->is_command)
		dprintf(2, "agentvm: %s: %s\n", what, strerror(errno));
	_exit(code);
}

/* In the child: nothing of ours but the three standard files; it may have our memory, see start_quickly(). */
static void
run(const ChildSpec *spec)
{
	int files[3];
	sigset_t none;
	int fd, i;

	setsid();
	if (spec->is_command)
	{
		char text[16];

		snprintf(text, sizeof(text), "%d", oom_score);
		write_to(open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC), text);
		if (getpriority(PRIO_PROCESS, 0) != 0)
			(void) setpriority(PRIO_PROCESS, 0, 0);
		(void) umask(022);
	}
	for (i = 0; i < 3; i++)
	{
		fd = spec->files[i] >= 0 ? spec->files[i] : open("/dev/null", O_RDWR | O_CLOEXEC);
		/* out of the way of the three */
		files[i] = fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
		if (files[i] < 0)
			_exit(126);
	}
	for (i = 0; i < 3; i++)
	{
		if (dup2(files[i], i) < 0)
			_exit(126);
	}
#ifdef SYS_close_range
	if (syscall(SYS_close_range, 3, ~0U, 0) != 0)
#endif
	{
		for (fd = 3; fd < MAX_FILES; fd++)
			close(fd);
	}
	(void) setrlimit(RLIMIT_NOFILE, &files_limit);
	signal(SIGPIPE, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (spec->cwd != NULL && chdir(spec->cwd) != 0)
		refuse(spec, spec->cwd);
	execvpe(spec->argv[0], spec->argv, spec->envp != NULL ? spec->envp : environ);
	refuse(spec, spec->argv[0]);
}

/*
 * As fork(), into a control group.  A process that is born in its group costs
 * nothing more; to move one there waits for all processors, which takes 10 ms and
 * more: cgroups(7), CLONE_INTO_CGROUP.  Kernels before 5.7 cannot do that.
 */
static pid_t
fork_into(int cgroup)
{
	struct clone_args how = {
		.flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t) cgroup};
	pid_t pid = (pid_t) syscall(SYS_clone3, &how, sizeof(how));
	int procs;

	/* else its group cannot be had that way, or no system call that new is let through */
	if (pid >= 0 || errno == EAGAIN || errno == ENOMEM)
		return pid;
	pid = fork();
	if (pid == 0)
	{
		procs = openat(cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC);
		write_to(procs, "0");
	}
	return pid;
}

#ifdef HAS_QUICK_START
/*
 * As vfork(), into a control group if there is one: the child has our memory, and we
 * wait, until it is another program.  A copy of our page tables costs more than
 * all else that is done for a short command, since each page is copied, too, that we
 * write to after that.  Returns as fork(), but only to us; -1 with errno.
 */
static pid_t
start_quickly(const ChildSpec *spec)
{
	struct clone_args how = {.flags = CLONE_VM | CLONE_VFORK,
							 .exit_signal = SIGCHLD,
							 .stack = (uint64_t) (uintptr_t) quick_stack,
							 .stack_size = sizeof(quick_stack)};
	register void (*child)(const ChildSpec *) __asm__("r8") = run;
	register const ChildSpec *of_child __asm__("r9") = spec;
	long pid;

	if (spec->cgroup >= 0)
	{
		how.flags |= CLONE_INTO_CGROUP;
		how.cgroup = (uint64_t) spec->cgroup;
	}
	/* the child, whose stack is another one, must not come back to here */
	__asm__ volatile("syscall\n\t"
					 "test %%rax, %%rax\n\t"
					 "jnz 1f\n\t"
					 "xor %%ebp, %%ebp\n\t"
					 "mov %%r9, %%rdi\n\t"
					 "call *%%r8\n\t"
					 "hlt\n"
					 "1:"
					 : "=a"(pid)
					 : "0"((long) SYS_clone3), "D"(&how), "S"(sizeof(how)), "r"(child),
					   "r"(of_child)
					 : "rcx", "r11", "memory", "cc");
	if (pid >= 0)
		return (pid_t) pid;
	errno = (int) -pid;
	return -1;
}
#endif

bool
child_spawn(Child *child, const ChildSpec *spec, ChildExited exited, void *arg)
{
	pid_t pid = -1;

#ifdef HAS_QUICK_START
	if (spec->is_quick)
		pid = start_quickly(spec);
#endif
	/* as some kernels need it, or do not let through */
	if (pid < 0)
		pid = spec->cgroup >= 0 ? fork_into(spec->cgroup) : fork();
	if (pid == 0)
		run(spec);
	if (pid < 0)
		return false;
	child->pid = pid;
	child->exited = exited;
	child->arg = arg;
	lws_dll2_add_tail(&child->list, &children);
	return true;
}

void
child_kill_all(void)
{
	lws_start_foreach_dll(lws_dll2_t *, at, children.head)
	{
		kill(-lws_container_of(at, Child, list)->pid, SIGKILL);
	}
	lws_end_foreach_dll(at);
}

/* ---- jobs ---- */

/* Read some of what it prints and keep the end, so that no flood fills our memory; as read(). */
static ssize_t
read_output(Job *job)
{
	char text[MAX_WORDS + CHUNK];
	ssize_t n = read(job->output, text + job->len, CHUNK);
	size_t len;

	if (n <= 0)
		return n;
	memcpy(text, job->words, job->len);
	len = job->len + (size_t) n;
	job->len = len < MAX_WORDS ? len : MAX_WORDS - 1;
	memcpy(job->words, text + len - job->len, job->len);
	return n;
}

static void
on_output(void *arg, uint32_t events)
{
	Job *job = arg;

	if (read_output(job) == 0)
		loop_unwatch(job->output);
}

/* The last line that it printed. */
static char *
last_line(Job *job)
{
	char *line;

	job->words[job->len] = '\0';
	while (job->len > 0 && job->words[job->len - 1] == '\n')
		job->words[--job->len] = '\0';
	line = strrchr(job->words, '\n');
	return line != NULL ? line + 1 : job->words;
}

static void
on_exited(void *arg, int code)
{
	Job *job = arg;
	Job copy;
	int chunks = 0;

	/* no more than that: processes of its own may go on printing */
	while (read_output(job) > 0 && ++chunks < PIPE_CHUNKS)
		;
	loop_unwatch(job->output);
	close(job->output);
	timer_stop(&job->timeout);
	copy = *job;
	memset(job, 0, sizeof(Job));
	copy.ended(copy.arg, code, last_line(&copy));
}

static void
on_timeout(void *arg)
{
	Job *job = arg;

	kill(-job->child.pid, SIGKILL); /* its process group; the end is told by SIGCHLD */
}

bool
child_start(char *const *argv, char *const *envp, int64_t timeout_ms, ChildEnded ended, void *arg)
{
	ChildSpec spec = {.argv = argv, .envp = envp, .files = {-1, -1, -1}, .cgroup = -1};
	Job *job = jobs;
	int ends[2];
	bool ok;

	while (job < jobs + MAX_JOBS && job->child.pid != 0)
		job++;
	if (job == jobs + MAX_JOBS)
		return false;
	if (pipe2(ends, O_CLOEXEC) != 0)
		return false;
	spec.files[1] = spec.files[2] = ends[1];
	ok = child_spawn(&job->child, &spec, on_exited, job);
	close(ends[1]);
	if (!ok)
	{
		close(ends[0]);
		return false;
	}
	job->output = ends[0];
	(void) fcntl(job->output, F_SETFL, O_NONBLOCK);
	loop_watch(job->output, EPOLLIN, on_output, job);
	job->ended = ended;
	job->arg = arg;
	if (timeout_ms > 0)
		timer_set(&job->timeout, timeout_ms, on_timeout, job);
	return true;
}
