/*-------------------------------------------------------------------------
 *
 * announce.c
 *		Tells each team, by NOTIFY on its channel, of changes of state.
 *
 * The log, agentvm.session_event, is the source.  One dispatcher per database
 * reads what is new there whenever a commit has changed some session's state, and
 * notifies in a transaction of its own: NOTIFY takes a lock of the whole cluster
 * at commit, which neither callers nor the engine's own transactions ever take.
 * The lock is tried for, never waited for; a queue that is full, or whatever else
 * goes wrong, loses hints and nothing more.
 *
 * Ids come from a sequence, so they become visible in another order than they
 * have been given out.  What is yet to be read is therefore a list of ranges: the
 * last one is open, and behind each id that has been seen the ids that were left
 * out remain as ranges of their own.  They belong to transactions that still run
 * or have been rolled back.  A transaction has its xid before it draws an id here,
 * so once all xids that had been assigned when the range was made have ended,
 * nothing more can appear in it.  A session's changes follow each other under its
 * row's lock: whoever sees one sees those before it, which have lower ids.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "catalog/pg_type.h"
#include "commands/async.h"
#include "miscadmin.h"
#include "storage/lock.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "agentvm.h"
#include "db.h"
#include "engine/announce.h"
#include "engine/state.h"

#define BATCH 500			  /* events read in one transaction */
#define MAX_RANGES 4096		  /* beyond that the oldest are given up */
#define LOOK_BACK 10000		  /* ids before the last one, that may yet be committed when we begin */
#define PAUSE_US 5000		  /* between two transactions that announce, so that changes gather */
#define LOCKED_PAUSE_US 20000 /* when somebody else notifies at this moment */
#define ERROR_PAUSE_US 1000000 /* after an error */
#define COMPLAIN_EVERY_US (60 * USECS_PER_SEC)

/* Ids, both ends included, that have not been seen. */
typedef struct Range
{
	int64 first;
	int64 last;				  /* PG_INT64_MAX: the open one */
	TransactionId settled_at; /* once all xids before this have ended, nothing appears in it */
} Range;

static struct
{
	bool begun;
	MemoryContext context; /* of the ranges */
	Range *ranges;		   /* by id; the last one is open */
	int nranges;
	int64 silent_to; /* up to here the open range was old when we began */
	TimestampTz not_before;
	TimestampTz look_at; /* even if nobody has told us of a change */
	TimestampTz complained_at;
} announcer;

static DbQuery last_query = {
	"SELECT coalesce(max(event_id), 0) FROM agentvm.session_event", 0, {0}};

static DbQuery events_query = {
	"SELECT e.event_id, e.session_id, e.old_state, e.new_state, e.reason, e.at, t.channel FROM "
	"(SELECT i.* FROM unnest($1, $2) AS r (first, last), LATERAL "
	"(SELECT event_id, session_id, team_id, old_state, "
	"CASE WHEN kind = 'state' THEN new_state END AS new_state, reason, at "
	"FROM agentvm.session_event WHERE event_id BETWEEN r.first AND r.last "
	"ORDER BY event_id LIMIT $3) AS i ORDER BY i.event_id LIMIT $3) AS e "
	"LEFT JOIN agentvm.team t ON t.team_id = e.team_id AND e.new_state IS NOT NULL "
	"ORDER BY e.event_id",
	3,
	{INT8ARRAYOID, INT8ARRAYOID, INT4OID}};

/* ---- what is said ---- */

/* ISO 8601 in UTC, whatever the settings are; in quotes, or null for a time that is none. */
static char *
json_time(TimestampTz at)
{
	struct pg_tm tm;
	fsec_t fsec;

	if (TIMESTAMP_NOT_FINITE(at) || timestamp2tm(at, NULL, &tm, &fsec, NULL, NULL) != 0 ||
		tm.tm_year < 0 || tm.tm_year > 9999)
		return "null";
	return psprintf("\"%04d-%02d-%02dT%02d:%02d:%02d.%06dZ\"", tm.tm_year, tm.tm_mon, tm.tm_mday,
					tm.tm_hour, tm.tm_min, tm.tm_sec, (int) fsec);
}

static char *
json_word(const char *word)
{
	return word != NULL ? psprintf("\"%s\"", word) : "null";
}

/*
 * What there is to say of the event in a row of the result, or NULL; *channel is
 * set.  What is no change between states of ours is left out, so that nothing in
 * the payload is anybody's free text.
 */
static char *
make_payload(uint64 row, char **channel)
{
	char *session_id = db_text(row, 2, CurrentMemoryContext);
	char *old_state = db_text(row, 3, CurrentMemoryContext);
	char *new_state = db_text(row, 4, CurrentMemoryContext);
	char *reason = db_text(row, 5, CurrentMemoryContext);
	bool isnull;
	TimestampTz at = DatumGetTimestampTz(db_value(row, 6, &isnull));
	int state;

	*channel = db_text(row, 7, CurrentMemoryContext);
	if (*channel == NULL || new_state == NULL || (state = state_find(new_state)) < 0 ||
		(old_state != NULL && state_find(old_state) < 0))
		return NULL;
	if (!reason_is_known(reason) || (state != STATE_TERMINATING && !state_is_ended(state)))
		reason = NULL;
	return psprintf(
		"{\"session_id\": \"%s\", \"old\": %s, \"new\": \"%s\", \"reason\": %s, \"at\": %s}",
		session_id, json_word(old_state), new_state, json_word(reason), json_time(at));
}

/*
 * What a gateway that holds this session's channel has to hear of the event, or NULL:
 * the id of one that begins to end; of one that is warm no more, with a word before it.
 */
static char *
gateway_payload(uint64 row)
{
	char *id = db_text(row, 2, CurrentMemoryContext);
	char *old_state = db_text(row, 3, CurrentMemoryContext);
	char *new_state = db_text(row, 4, CurrentMemoryContext);

	if (new_state == NULL || shared_gateway_channel() == NULL)
		return NULL;
	if (strcmp(new_state, state_name(STATE_TERMINATING)) == 0)
		return id;
	if (old_state != NULL && strcmp(old_state, state_name(STATE_WARM)) == 0)
		return psprintf("claimed %s", id);
	return NULL;
}

/* ---- what is yet to be read ---- */

static void
add_range(int64 first, int64 last, TransactionId settled_at)
{
	Range *range;

	if (first > last)
		return;
	if (announcer.nranges == MAX_RANGES)
	{
		/* whoever has not committed for so long is not waited for any longer */
		memmove(announcer.ranges, announcer.ranges + 1, (MAX_RANGES - 1) * sizeof(Range));
		announcer.nranges--;
	}
	range = &announcer.ranges[announcer.nranges++];
	range->first = first;
	range->last = last;
	range->settled_at = settled_at;
}

/*
 * Take the ids that have been seen out of the ranges, and drop ranges in which
 * nothing can appear any more: those that were settled at "xmin", which is older
 * than the look.  The look went up to "looked_to".  Ids that are left out for the
 * first time may be anybody's with an xid before "next_xid".
 */
static void
take_out(const int64 *seen, int count, int64 looked_to, TransactionId xmin, TransactionId next_xid)
{
	Range *old = announcer.ranges;
	int nold = announcer.nranges;
	int s = 0;
	int i;

	/* each id splits one range in two, at most */
	announcer.ranges = MemoryContextAlloc(announcer.context, (nold + count) * sizeof(Range));
	announcer.nranges = 0;
	for (i = 0; i < nold; i++)
	{
		bool open = old[i].last == PG_INT64_MAX;
		bool settled = !open && TransactionIdFollowsOrEquals(xmin, old[i].settled_at);
		TransactionId settled_at = open ? next_xid : old[i].settled_at;
		int64 first = old[i].first;

		for (; s < count && seen[s] <= old[i].last; s++)
		{
			if (!settled)
				add_range(first, seen[s] - 1, settled_at);
			first = seen[s] + 1;
		}
		if (open || !settled || old[i].last > looked_to)
			add_range(first, old[i].last, settled_at);
	}
	pfree(old);
}

/* ---- transactions ---- */

static void
begin(EngineHost host, DbScope *scope)
{
	host.begin();
	/* nothing is lost with a hint: wait for no disk and no standby */
	(void) set_config_option("synchronous_commit", "off", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	db_enter(scope);
}

/*
 * The lock that NOTIFY takes at commit (see PreCommit_Notify()): somebody who waits
 * for a standby may hold it for long.
 */
static bool
try_notify_lock(void)
{
	LOCKTAG tag;

	SET_LOCKTAG_OBJECT(tag, InvalidOid, DatabaseRelationId, InvalidOid, 0);
	return LockAcquire(&tag, AccessExclusiveLock, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

static void
look_up_last(EngineHost host)
{
	DbScope scope;
	bool isnull;
	int64 last;
	Range *range;

	/*
	 * A queue that has been full stays so by itself: who notifies makes room only
	 * after it has found some (asyncQueueAdvanceTail()), except that to ask how full
	 * it is makes room as well.
	 */
	begin(host, &scope);
	(void) DirectFunctionCall1(pg_notification_queue_usage, (Datum) 0);
	db_run(&last_query, NULL, NULL);
	last = DatumGetInt64(db_value(0, 1, &isnull));
	db_leave(&scope);
	host.commit();

	announcer.context =
		AllocSetContextCreate(TopMemoryContext, "agentvm announcer", ALLOCSET_DEFAULT_SIZES);
	announcer.ranges = MemoryContextAlloc(announcer.context, sizeof(Range));
	range = &announcer.ranges[0];
	range->first = last - Min(last, LOOK_BACK) + 1;
	range->last = PG_INT64_MAX;
	announcer.nranges = 1;
	announcer.silent_to = last;
	announcer.look_at = DT_NOBEGIN;
	announcer.begun = true;
}

/* Read a batch of events, and notify; whether there may be more. */
static bool
announce_batch(EngineHost host)
{
	DbScope scope;
	MemoryContext context;
	Datum values[3];
	Datum *firsts = palloc(announcer.nranges * sizeof(Datum));
	Datum *lasts = palloc(announcer.nranges * sizeof(Datum));
	int64 seen[BATCH];
	int64 last_seen = 0;
	int count;
	TransactionId xmin;
	TransactionId next_xid;
	int64 open_from = announcer.ranges[announcer.nranges - 1].first;
	bool locked = false;
	int i;

	context = CurrentMemoryContext;
	begin(host, &scope);
	MemoryContextSwitchTo(context);
	for (i = 0; i < announcer.nranges; i++)
	{
		firsts[i] = Int64GetDatum(announcer.ranges[i].first);
		lasts[i] = Int64GetDatum(announcer.ranges[i].last);
	}
	values[0] = PointerGetDatum(construct_array(firsts, announcer.nranges, INT8OID, sizeof(int64),
												FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	values[1] = PointerGetDatum(construct_array(lasts, announcer.nranges, INT8OID, sizeof(int64),
												FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	values[2] = Int32GetDatum(BATCH);
	xmin = GetLatestSnapshot()->xmin;
	db_run(&events_query, values, NULL);
	next_xid = ReadNextTransactionId();
	count = SPI_processed;
	for (i = 0; i < count; i++)
	{
		char *channel;
		char *payload;
		char *for_gateway;
		bool isnull;

		seen[i] = last_seen = DatumGetInt64(db_value(i, 1, &isnull));
		if (last_seen >= open_from && last_seen <= announcer.silent_to)
			continue;
		payload = make_payload(i, &channel);
		if (payload == NULL)
			continue;
		if (!locked && !(locked = try_notify_lock()))
			break;
		Async_Notify(channel, payload);
		for_gateway = gateway_payload(i);
		if (for_gateway != NULL)
			Async_Notify(shared_gateway_channel(), for_gateway);
	}
	db_leave(&scope);
	host.commit();

	if (i < count)
	{
		announcer.not_before = GetCurrentTimestamp() + LOCKED_PAUSE_US;
		return true;
	}
	take_out(seen, count, count < BATCH ? PG_INT64_MAX : last_seen, xmin, next_xid);
	if (locked)
		announcer.not_before = GetCurrentTimestamp() + PAUSE_US;
	return count == BATCH;
}

/* An error has been caught: hints are lost, the engine goes on. */
static void
give_up(MemoryContext context)
{
	/* of its own: FreeErrorData() does not free all that an error in SQL brings */
	MemoryContext own =
		AllocSetContextCreate(context, "agentvm announcer's error", ALLOCSET_SMALL_SIZES);
	ErrorData *error;
	TimestampTz now = GetCurrentTimestamp();

	HOLD_INTERRUPTS();
	disable_all_timeouts(false);
	MemoryContextSwitchTo(own);
	error = CopyErrorData();
	AbortCurrentTransaction();
	MemoryContextSwitchTo(own);
	FlushErrorState();
	if (now >= announcer.complained_at + COMPLAIN_EVERY_US)
	{
		announcer.complained_at = now;
		ereport(LOG, (errcode(error->sqlerrcode),
					  errmsg("agentvm: changes of state are not announced: %s", error->message),
					  errdetail("Whoever listens has to read the tables. This is told once a "
								"minute at most.")));
	}
	MemoryContextSwitchTo(context);
	MemoryContextDelete(own);
	announce_forget();
	announcer.not_before = now + ERROR_PAUSE_US;
	RESUME_INTERRUPTS();
}

void
announce_forget(void)
{
	if (announcer.context != NULL)
		MemoryContextDelete(announcer.context);
	announcer.context = NULL;
	announcer.begun = false;
}

void
announce_begin(DispatcherSlot *slot, EngineHost host)
{
	MemoryContext context = CurrentMemoryContext;

	if (announcer.begun || GetCurrentTimestamp() < announcer.not_before || !shared_announce(slot))
		return;
	PG_TRY();
	{
		look_up_last(host);
		MemoryContextSwitchTo(context);
	}
	PG_CATCH();
	{
		give_up(context);
	}
	PG_END_TRY();
}

TimestampTz
announce_changes(DispatcherSlot *slot, EngineHost host)
{
	MemoryContext context = CurrentMemoryContext;
	MemoryContext scratch;
	TimestampTz now = GetCurrentTimestamp();
	volatile bool more = false;

	if (!announcer.begun)
		return announcer.not_before > now ? announcer.not_before : DT_NOEND;
	if (!slot->changed && now < announcer.look_at)
		return DT_NOEND;
	if (now < announcer.not_before)
		return announcer.not_before;

	/* before our snapshot: whoever commits after it sets it again */
	shared_take_changed(slot);
	announcer.look_at = now + avm_sweep_interval_ms * INT64CONST(1000);
	scratch = AllocSetContextCreate(context, "agentvm announcement", ALLOCSET_DEFAULT_SIZES);
	PG_TRY();
	{
		MemoryContextSwitchTo(scratch);
		more = announce_batch(host);
		MemoryContextSwitchTo(context);
	}
	PG_CATCH();
	{
		give_up(context);
	}
	PG_END_TRY();
	MemoryContextDelete(scratch);
	if (more)
		announcer.look_at = DT_NOBEGIN;
	return more ? announcer.not_before : DT_NOEND;
}
