/*-------------------------------------------------------------------------
 *
 * child.h
 *		Processes that we start, and those that PID 1 inherits.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_CHILD_H
#define RUNTIME_CHILD_H

#include <libwebsockets.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* What became of it: exit code, or 128 + signal. */
typedef void (*ChildExited)(void *arg, int code);

/* A process under way; part of what it belongs to, zeroed at first. */
typedef struct Child
{
	lws_dll2_t list;
	pid_t pid; /* 0: there is none; also the id of its process group and session */
	ChildExited exited;
	void *arg;
} Child;

/* What it is to be.  It has none of our files, and no signal is blocked or ignored. */
typedef struct ChildSpec
{
	char *const *argv; /* argv[0] is looked up in our PATH */
	char *const *envp; /* NULL: our environment */
	const char *cwd;   /* NULL: ours */
	int files[3];	   /* its standard files; -1: /dev/null */
	int cgroup;		   /* directory of a control group: where it is to be; -1: where we are */
	bool is_command;   /* somebody else's: ends before us when memory is short, has an ordinary
							 * umask, and says on stderr why it cannot be started (126, or 127) */
	bool is_quick;	   /* nothing of this is on a file system that we have not looked at: its start
							 * may be waited for */
} ChildSpec;

/* As ChildExited; "words" is the end of what it printed. */
typedef void (*ChildEnded)(void *arg, int code, const char *words);

/*
 * Begin to take in signals and dead children; "terminate" is called for SIGTERM and
 * SIGINT.  As many files as may be can be opened by us from then on.
 */
extern bool child_setup(void (*terminate)(void));

/*
 * Start a process.  "exited" is called later, once, child->pid being 0 then; until
 * then the Child must stay.  Returns false, without that, with errno, when no process
 * can be made.
 */
extern bool child_spawn(Child *child, const ChildSpec *spec, ChildExited exited, void *arg);

/*
 * Start a program; argv[0] is looked up in PATH.  envp NULL: our environment.  It
 * has no terminal, no input, and none of our files.  After timeout_ms (0: never)
 * it is killed.  "ended" is called later, once; false, without that, when no
 * process can be made or too many are under way.
 */
extern bool child_start(char *const *argv, char *const *envp, int64_t timeout_ms, ChildEnded ended,
						void *arg);

/* Kill the process groups of those that are left, without waiting. */
extern void child_kill_all(void);

#endif /* RUNTIME_CHILD_H */
