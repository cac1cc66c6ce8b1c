/*-------------------------------------------------------------------------
 *
 * wake.c
 *		What a transaction has to tell others once it has committed.
 *
 * Callers' transactions never NOTIFY (it takes a cluster-wide lock at commit);
 * they set latches instead, after their changes have become visible.  The abort
 * of a transaction that had a row locked tells the dispatchers, too: they may
 * have passed it by.
 * COMMIT PREPARED tells nobody; the full pass of every sweep_interval is for
 * that.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "engine/shared.h"
#include "engine/wake.h"
#include "utils/timestamp.h"

static TimestampTz pending_due = DT_NOEND;
static TimestampTz pending_ahead = DT_NOEND; /* the earliest of those that are still to come */
static uint64 pending_changed = 0;			 /* a bit per bucket */
static bool pending_locked = false;

StaticAssertDecl(NUM_CHANGED_BUCKETS <= 64, "buckets do not fit the mask");

static void
wake_xact_callback(XactEvent event, void *arg)
{
	int bucket;

	switch (event)
	{
		case XACT_EVENT_COMMIT:
			if (pending_due != DT_NOEND)
				shared_publish_due(pending_due, pending_ahead);
			for (bucket = 0; pending_changed != 0; bucket++, pending_changed >>= 1)
			{
				if (pending_changed & 1)
					shared_broadcast(bucket);
			}
			break;
		case XACT_EVENT_ABORT:
			if (pending_locked)
				shared_publish_due(DT_NOBEGIN, DT_NOEND);
			break;
		case XACT_EVENT_PREPARE:
			break;
		default:
			return;
	}
	pending_due = DT_NOEND;
	pending_ahead = DT_NOEND;
	pending_changed = 0;
	pending_locked = false;
}

void
wake_init(void)
{
	RegisterXactCallback(wake_xact_callback, NULL);
}

void
wake_dispatchers(TimestampTz due)
{
	pending_due = Min(pending_due, due);
	if (due > GetCurrentTimestamp())
		pending_ahead = Min(pending_ahead, due);
}

void
wake_waiters(const pg_uuid_t *session_id)
{
	pending_changed |= UINT64CONST(1) << shared_changed_bucket(session_id);
}

void
wake_after_lock(TimestampTz due)
{
	wake_dispatchers(due);
	pending_locked = true;
}
