/*-------------------------------------------------------------------------
 *
 * engine.h
 *		Claim, act, record: the one engine that dispatchers, runners and CALL dispatch() run.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_ENGINE_H
#define AGENTVM_ENGINE_ENGINE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "engine/shared.h"

typedef struct Engine Engine;

/* How the surrounding process begins and ends a transaction. */
typedef struct EngineHost
{
	void (*begin)(void);
	void (*commit)(void);
} EngineHost;

/*
 * An engine for the sessions of a lane, in a new context below "parent"; deleting
 * the context closes all connections.  "slot" is the worker's, or NULL in a plain
 * backend, which then looks at all that is due, ignoring low-water marks.
 */
extern Engine *engine_create(MemoryContext parent, DispatcherSlot *slot, int lane, EngineHost host);

/* Delete the engine; calls under way are dropped and healed by their leases. */
extern void engine_destroy(Engine *engine);

/*
 * Claim up to "limit" due sessions, take each one step, commit, send what is to
 * be sent.  Outside a transaction.  Returns how many were claimed.
 */
extern int engine_claim(Engine *engine, int limit);

/* Move calls on, and record those that have been answered.  Outside a transaction. */
extern void engine_run(Engine *engine);

/* What to wait on, and how much is under way (replies not yet recorded included). */
extern int engine_fd(Engine *engine);
extern int engine_in_flight(Engine *engine);

/*
 * Whether there is so much in flight that answers come all the time, and nothing is to be done for those calls
 * but to take them in: then it is cheaper to let some gather.
 */
extern bool engine_only_waits(Engine *engine);

/*
 * When to look again at the latest, if nothing wakes us: when the next row may
 * be due, or a record is to be tried again whose row was locked.  DT_NOBEGIN: at once, more is due now.
 */
extern TimestampTz engine_next_look(Engine *engine);

/* Forget low-water marks: the next claims look at everything. */
extern void engine_look_at_everything(Engine *engine);

/*
 * Free the leases of processes that have died, so that their sessions are due
 * at once.  Outside a transaction.  Returns how many.
 */
extern int engine_reclaim(Engine *engine);

/*
 * Call after an error has been caught and its transaction aborted: the next
 * transactions take one session at a time, so that one that cannot be recorded
 * (a trigger of the administrator's that raises, say) holds up no other.
 */
extern void engine_after_error(Engine *engine);

#endif /* AGENTVM_ENGINE_ENGINE_H */
