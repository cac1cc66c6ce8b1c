/*-------------------------------------------------------------------------
 *
 * threads.h
 *		Calls that block, each on a thread of its own, for a runner.
 *
 * The threads of a process are one pool with one fd to wait on.  They have all
 * signals blocked, run Provider.perform() and nothing else, and touch nothing
 * of PostgreSQL.  A call that is past its timeout is answered without its
 * thread ("no answer", maybe sent); the thread counts as stuck until it comes
 * back, which it may never do, and is replaced, up to MAX_THREADS in all.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_THREADS_H
#define AGENTVM_ENGINE_THREADS_H

#include "engine/transport.h"

#define MAX_THREADS 64

/* The calls of its clients begin and end in the process's main thread. */
extern const Transport thread_transport;

/* How many threads are stuck. */
extern int threads_stuck(void);

/* Whether all threads are stuck and there can be no other: only a new process helps. */
extern bool threads_are_exhausted(void);

/*
 * From here on this process ends by _exit(), once PostgreSQL's own exit hooks
 * have run: those of libraries may wait for, or pull the rug from under, a
 * thread that is stuck in them.
 */
extern void threads_exit_quietly(void);

#endif /* AGENTVM_ENGINE_THREADS_H */
