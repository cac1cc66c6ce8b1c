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

static TimestampTz pending_due[NUM_LANES] = {DT_NOEND, DT_NOEND};
/* the earliest of those that are still to come */
static TimestampTz pending_ahead[NUM_LANES] = {DT_NOEND, DT_NOEND};
static bool pending_any_due = false;
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
			if (pending_any_due || pending_any_changed)
				shared_publish(pending_due, pending_ahead, pending_any_changed);
			if (pending_any_changed)
				broadcast_changed();
			break;
		case XACT_EVENT_ABORT:
			if (pending_locked)
			{
				static const TimestampTz at_once[NUM_LANES] = {DT_NOBEGIN, DT_NOBEGIN};
				static const TimestampTz never[NUM_LANES] = {DT_NOEND, DT_NOEND};

				shared_publish(at_once, never, false);
			}
			break;
		case XACT_EVENT_PREPARE:
			break;
		default:
			return;
	}
	if (pending_any_due)
	{
		int lane;

		for (lane = 0; lane < NUM_LANES; lane++)
			pending_due[lane] = pending_ahead[lane] = DT_NOEND;
	}
	pending_any_due = false;
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
wake_workers(int lane, TimestampTz due)
{
	int i;

	for (i = 0; i < NUM_LANES; i++)
	{
		if (lane != LANE_ALL && lane != i)
			continue;
		pending_due[i] = Min(pending_due[i], due);
		if (due > GetCurrentTimestamp())
			pending_ahead[i] = Min(pending_ahead[i], due);
	}
	pending_any_due = true;
}

void
wake_waiters(const pg_uuid_t *session_id)
{
	int bucket = shared_changed_bucket(session_id);

	pending_changed[bucket / 64] |= UINT64CONST(1) << (bucket % 64);
	pending_any_changed = true;
}

void
wake_after_lock(int lane, TimestampTz due)
{
	wake_workers(lane, due);
	pending_locked = true;
}
