/*-------------------------------------------------------------------------
 *
 * team.h
 *		Teams: their lock, and what the session room needs of them.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_TEAM_TEAM_H
#define AGENTVM_TEAM_TEAM_H

#include "postgres.h"

#include "storage/lockdefs.h"

/*
 * Lock a team until the end of the transaction, in the lock manager and not in
 * its row, so that provision() of unlimited teams writes nothing and never
 * queues: ShareLock for provision() of a team without quota, ExclusiveLock for
 * one with a quota and for alter_team() and drop_team().  Two teams whose ids
 * hash alike merely wait for each other.
 */
extern void team_lock(const char *team_id, LOCKMODE mode);

/* The same if nobody is in the way; returns whether it has the lock. */
extern bool team_lock_at_once(const char *team_id, LOCKMODE mode);

/* Give up a lock taken by these before the end of the transaction. */
extern void team_unlock(const char *team_id, LOCKMODE mode);

#endif /* AGENTVM_TEAM_TEAM_H */
