/*-------------------------------------------------------------------------
 *
 * wake.h
 *		What a transaction has to tell others once it has committed.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_WAKE_H
#define AGENTVM_ENGINE_WAKE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "engine/shared.h" /* lanes */
#include "utils/uuid.h"

/* Register the transaction callback, once per process; called from _PG_init. */
extern void wake_init(void);

/*
 * This transaction wrote (or left, under its row lock) a session whose
 * next_check_at is "due": at COMMIT the workers of this database that serve its
 * lane (LANE_ALL: all) lower their low-water marks to it, and those that would
 * sleep longer are woken.
 */
extern void wake_workers(int lane, TimestampTz due);

/*
 * This transaction changed the state of a session: at COMMIT whoever waits for it
 * is woken, and so is the dispatcher that announces changes.
 */
extern void wake_waiters(const pg_uuid_t *session_id);

/*
 * The same for a row that was there before: the workers may have passed it
 * by while we had it locked, so an ABORT makes them look again, too.
 */
extern void wake_after_lock(int lane, TimestampTz due);

#endif /* AGENTVM_ENGINE_WAKE_H */
