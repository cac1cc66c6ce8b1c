/*-------------------------------------------------------------------------
 *
 * child.h
 *		Processes that we start, and those that PID 1 inherits.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_CHILD_H
#define RUNTIME_CHILD_H

#include <stdbool.h>
#include <stdint.h>

/* What became of it: exit code, or 128 + signal; "words" is the end of what it printed. */
typedef void (*ChildEnded)(void *arg, int code, const char *words);

/* Begin to take in signals and dead children; "terminate" is called for SIGTERM and SIGINT. */
extern bool child_setup(void (*terminate)(void));

/*
 * Start a program; argv[0] is looked up in PATH.  envp NULL: our environment.  It
 * has no terminal, no input, and none of our files.  After timeout_ms (0: never)
 * it is killed.  "ended" is called later, once; false, without that, when no
 * process can be made or too many are under way.
 */
extern bool child_start(char *const *argv, char *const *envp, int64_t timeout_ms, ChildEnded ended,
						void *arg);

/* Kill those that are left, without waiting. */
extern void child_kill_all(void);

#endif /* RUNTIME_CHILD_H */
