/*-------------------------------------------------------------------------
 *
 * wake.c
 *		What a transaction has to tell others once it has committed.
 *
 * Callers' transactions never NOTIFY (it takes a cluster-wide lock at commit);
 * they set latches instead, after their changes have become visible, and a flag
 * that lets a dispatcher announce them (announce.c).  The abort
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
static uint64 pending_changed[NUM_CHANGED_BUCKETS / 64]; /* a bit per bucket */
static bool pending_any_changed = false;
static bool pending_locked = false;

StaticAssertDecl(NUM_CHANGED_BUCKETS % 64 == 0, "buckets do not fill the mask");

static void
broadcast_changed(void)
{
	int word;
	int bucket;

	for (word = 0; word < lengthof(pending_changed); word++)
	{
		uint64 bits = pending_changed[word];

		for (bucket = 64 * word; bits != 0; bucket++, bits >>= 1)
		{
			if (bits & 1)
				shared_broadcast(bucket);
		}
	}
}

static void
wake_xact_callback(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_COMMIT:
			if (pending_due != DT_NOEND || pending_any_changed)
				shared_publish(pending_due, pending_ahead, pending_any_changed);
			if (pending_any_changed)
				broadcast_changed();
			break;
		case XACT_EVENT_ABORT:
			if (pending_locked)
				shared_publish(DT_NOBEGIN, DT_NOEND, false);
			break;
		case XACT_EVENT_PREPARE:
			break;
		default:
			return;
	}
	pending_due = DT_NOEND;
	pending_ahead = DT_NOEND;
	if (pending_any_changed)
		memset(pending_changed, 0, sizeof(pending_changed));
	pending_any_changed = false;
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
	int bucket = shared_changed_bucket(session_id);

	pending_changed[bucket / 64] |= UINT64CONST(1) << (bucket % 64);
	pending_any_changed = true;
}

void
wake_after_lock(TimestampTz due)
{
	wake_dispatchers(due);
	pending_locked = true;
}
