/*-------------------------------------------------------------------------
 *
 * signals.h
 *		No signal for a thread that is not the main one.
 *
 * A thread inherits the mask of the one that starts it, and PostgreSQL's signal
 * handlers are for the main thread only.  So signals are blocked around whatever
 * may start a thread.  Free of PostgreSQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SIGNALS_H
#define AGENTVM_SIGNALS_H

#include <pthread.h>
#include <signal.h>

/* Block all signals but those of faults, which would kill without a trace if they were blocked. */
static inline void
signals_block(sigset_t *saved)
{
	sigset_t all;

	sigfillset(&all);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGILL);
	sigdelset(&all, SIGSYS);
	sigdelset(&all, SIGABRT);
	sigdelset(&all, SIGTRAP);
	(void) pthread_sigmask(SIG_SETMASK, &all, saved);
}

static inline void
signals_restore(const sigset_t *saved)
{
	(void) pthread_sigmask(SIG_SETMASK, saved, NULL);
}

#endif /* AGENTVM_SIGNALS_H */
