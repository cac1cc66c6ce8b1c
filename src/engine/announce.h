/*-------------------------------------------------------------------------
 *
 * announce.h
 *		Tells each team, by NOTIFY on its channel, of changes of state.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_ANNOUNCE_H
#define AGENTVM_ENGINE_ANNOUNCE_H

#include "engine/engine.h"

/* Forget where we are: the next announce_begin() begins with what is committed from then on. */
extern void announce_forget(void);

/*
 * Become the one dispatcher of this database that announces, if there is no
 * other, and settle what there is nothing to say about any more: all that is
 * committed already.  Does nothing once that is done.  Outside a transaction;
 * never raises, but for a request to end.
 */
extern void announce_begin(DispatcherSlot *slot, EngineHost host);

/*
 * Announce what has been committed since the last time, if anything may have
 * been, in one transaction.  Outside a transaction; never raises, but for a
 * request to end.  Returns when to be called again at the latest (DT_NOBEGIN: at
 * once, there is more).
 */
extern TimestampTz announce_changes(DispatcherSlot *slot, EngineHost host);

#endif /* AGENTVM_ENGINE_ANNOUNCE_H */
