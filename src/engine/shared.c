/*-------------------------------------------------------------------------
 *
 * shared.c
 *		What all processes share: who dispatches where, wake-ups, counters.
 *
 * One LWLock guards the slots and the counters: it is held for a few
 * instructions and never while waiting.  A slot belongs to the dispatcher whose
 * pid it holds; only the launcher reserves slots, and only the exit hook of the
 * owner (or the launcher, once the worker is known to be gone) frees one.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>
#include <signal.h>

#include "agentvm.h"
#include "common/hashfn.h"
#include "engine/shared.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/procarray.h"
#include "storage/shmem.h"
#include "utils/timestamp.h"

#define MAX_HOLDS 16

/* A backend that wants a database for itself. */
typedef struct DatabaseHold
{
	int pid; /* 0: free */
	Oid database;
} DatabaseHold;

typedef struct Shared
{
	LWLock *lock;
	int launcher_pid;
	Latch *launcher_latch;
	TimestampTz open_since; /* 0: no launcher has come yet */
	Shortage shortage;
	DispatcherSlot slots[MAX_WORKERS];
	DatabaseHold holds[MAX_HOLDS];
	ConditionVariable changed[NUM_CHANGED_BUCKETS];
	ProviderStat stats[MAX_PROVIDER_STATS];
	char gateway_channel[NAMEDATALEN]; /* empty: none could be made */
	Question questions[MAX_QUESTIONS];
	Slowed slowed[MAX_SLOWED];
} Shared;

static Shared *shared = NULL;
static DispatcherSlot *my_slot = NULL;
static shmem_startup_hook_type prev_startup_hook = NULL;
#ifdef AVM_HAVE_SHMEM_REQUEST_HOOK
static shmem_request_hook_type prev_request_hook = NULL;
#endif

static void
shared_request(void)
{
#ifdef AVM_HAVE_SHMEM_REQUEST_HOOK
	if (prev_request_hook)
		prev_request_hook();
#endif
	RequestAddinShmemSpace(MAXALIGN(sizeof(Shared)));
	RequestNamedLWLockTranche("agentvm", 1);
}

/* LISTEN is not checked, so the name must not be guessed. */
static void
make_gateway_channel(void)
{
	uint64 random[2];

	if (pg_strong_random(random, sizeof(random)))
		snprintf(shared->gateway_channel, NAMEDATALEN, "agentvm_gateway_%016llx%016llx",
				 (unsigned long long) random[0], (unsigned long long) random[1]);
}

const char *
shared_gateway_channel(void)
{
	return shared != NULL && shared->gateway_channel[0] != '\0' ? shared->gateway_channel : NULL;
}

static void
shared_startup(void)
{
	bool found;
	int i;

	if (prev_startup_hook)
		prev_startup_hook();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	shared = ShmemInitStruct("agentvm", sizeof(Shared), &found);
	if (!found)
	{
		memset(shared, 0, sizeof(Shared));
		shared->lock = &(GetNamedLWLockTranche("agentvm"))->lock;
		for (i = 0; i < NUM_CHANGED_BUCKETS; i++)
			ConditionVariableInit(&shared->changed[i]);
		make_gateway_channel();
	}
	LWLockRelease(AddinShmemInitLock);
}

void
shared_init(void)
{
#ifdef AVM_HAVE_SHMEM_REQUEST_HOOK
	prev_request_hook = shmem_request_hook;
	shmem_request_hook = shared_request;
#else
	shared_request();
#endif
	prev_startup_hook = shmem_startup_hook;
	shmem_startup_hook = shared_startup;
}

bool
shared_available(void)
{
	return shared != NULL;
}

int
shared_serving(int lane)
{
	int serving = 0;
	int i;

	if (shared == NULL)
		return 0;
	LWLockAcquire(shared->lock, LW_SHARED);
	for (i = 0; i < MAX_WORKERS; i++)
	{
		if (shared->slots[i].database == MyDatabaseId && shared->slots[i].lane == lane &&
			shared->slots[i].serves)
			serving++;
	}
	LWLockRelease(shared->lock);
	return serving;
}

DispatcherSlot *
shared_slots(void)
{
	return shared->slots;
}

void
shared_lock(LWLockMode mode)
{
	LWLockAcquire(shared->lock, mode);
}

void
shared_unlock(void)
{
	LWLockRelease(shared->lock);
}

/* Whether a living backend holds the database; under the lock. */
static bool
is_held(Oid database)
{
	int i;

	for (i = 0; i < MAX_HOLDS; i++)
	{
		DatabaseHold *hold = &shared->holds[i];

		if (hold->pid != 0 && hold->database == database && BackendPidGetProc(hold->pid) != NULL)
			return true;
	}
	return false;
}

DispatcherSlot *
shared_reserve(Oid database, int lane, int index)
{
	DispatcherSlot *slot = NULL;
	int first =
		lane * MAX_DISPATCHERS; /* a lane's slots are its own, so that none starves the other */
	int i;

	/* One lock for both: who puts a hold on the database later finds the slot taken. */
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (i = first; i < first + MAX_DISPATCHERS && slot == NULL && !is_held(database); i++)
	{
		if (shared->slots[i].database == InvalidOid)
			slot = &shared->slots[i];
	}
	if (slot != NULL)
	{
		memset(slot, 0, sizeof(*slot));
		slot->database = database;
		slot->lane = lane;
		slot->index = index;
		slot->started_at = GetCurrentTimestamp();
	}
	LWLockRelease(shared->lock);
	return slot;
}

void
shared_set_shortage(Shortage shortage)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	shared->shortage = shortage;
	LWLockRelease(shared->lock);
}

bool
shared_launcher(Shortage *shortage)
{
	bool runs;

	LWLockAcquire(shared->lock, LW_SHARED);
	runs = shared->launcher_pid != 0;
	*shortage = shared->shortage;
	LWLockRelease(shared->lock);
	return runs;
}

void
shared_set_launcher(Latch *latch)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	/* who ends takes nobody's place but his own */
	if (latch != NULL || shared->launcher_pid == MyProcPid)
	{
		shared->launcher_pid = latch != NULL ? MyProcPid : 0;
		shared->launcher_latch = latch;
		if (shared->open_since == 0)
			shared->open_since = GetCurrentTimestamp();
	}
	LWLockRelease(shared->lock);
}

TimestampTz
shared_open_since(void)
{
	TimestampTz since;

	if (shared == NULL)
		return PgStartTime;
	LWLockAcquire(shared->lock, LW_SHARED);
	since = shared->open_since;
	LWLockRelease(shared->lock);
	return since != 0 ? since : GetCurrentTimestamp();
}

void
shared_wake_launcher(void)
{
	if (shared == NULL)
		return;
	LWLockAcquire(shared->lock, LW_SHARED);
	if (shared->launcher_latch != NULL)
		SetLatch(shared->launcher_latch);
	LWLockRelease(shared->lock);
}

void
shared_hold_database(Oid database)
{
	int i;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (i = 0; i < MAX_HOLDS; i++)
	{
		DatabaseHold *hold = &shared->holds[i];

		if (OidIsValid(database) && (hold->pid == 0 || BackendPidGetProc(hold->pid) == NULL))
		{
			hold->pid = MyProcPid;
			hold->database = database;
			break;
		}
		if (!OidIsValid(database) && hold->pid == MyProcPid)
			hold->pid = 0;
	}
	LWLockRelease(shared->lock);
}

bool
shared_is_held(Oid database)
{
	bool held;

	LWLockAcquire(shared->lock, LW_SHARED);
	held = is_held(database);
	LWLockRelease(shared->lock);
	return held;
}

int
shared_stop_workers(Oid database)
{
	int count = 0;
	int i;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (i = 0; i < MAX_WORKERS; i++)
	{
		if (shared->slots[i].database != database)
			continue;
		count++;
		if (shared->slots[i].pid != 0)
			kill(shared->slots[i].pid, SIGTERM);
	}
	LWLockRelease(shared->lock);
	return count;
}

/* We announce no more: wake our peers, one of whom will.  Under the lock. */
static void
stop_announcing(DispatcherSlot *slot)
{
	int i;

	for (i = 0; slot->announces && i < MAX_WORKERS; i++)
	{
		DispatcherSlot *other = &shared->slots[i];

		if (other != slot && other->database == slot->database && other->lane == slot->lane &&
			other->pid != 0)
			SetLatch(other->latch);
	}
	slot->announces = false;
}

/* The questions that this runner has taken will not be answered; under the lock. */
static void
drop_questions(void)
{
	int i;

	for (i = 0; i < MAX_QUESTIONS; i++)
	{
		Question *question = &shared->questions[i];

		if (question->state != QUESTION_TAKEN || question->runner_pid != MyProcPid)
			continue;
		question->status = 0;
		question->maybe_sent = true;
		question->has_error = true;
		question->millis = 0;
		question->len = snprintf(question->text, QUESTION_SIZE, "the runner has ended") + 1;
		question->state = QUESTION_ANSWERED;
		SetLatch(question->asker);
	}
}

/* Exit hook of a worker: free our slot and what we had taken, and tell the launcher. */
static void
shared_detach(int code, Datum arg)
{
	if (my_slot == NULL)
		return;
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	if (my_slot->pid == MyProcPid)
	{
		stop_announcing(my_slot);
		memset(my_slot, 0, sizeof(DispatcherSlot));
	}
	drop_questions();
	if (shared->launcher_latch != NULL)
		SetLatch(shared->launcher_latch);
	LWLockRelease(shared->lock);
	my_slot = NULL;
}

DispatcherSlot *
shared_attach(Oid database, int lane, int index)
{
	int i;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (i = 0; i < MAX_WORKERS && my_slot == NULL; i++)
	{
		DispatcherSlot *slot = &shared->slots[i];

		if (slot->database == database && slot->lane == lane && slot->index == index &&
			slot->pid == 0)
		{
			slot->pid = MyProcPid;
			slot->latch = MyLatch;
			slot->started_at = GetCurrentTimestamp();
			slot->committed_due = DT_NOBEGIN;
			slot->committed_ahead = DT_NOEND;
			my_slot = slot;
		}
	}
	LWLockRelease(shared->lock);
	if (my_slot != NULL)
		before_shmem_exit(shared_detach, (Datum) 0);
	return my_slot;
}

void
shared_serve(DispatcherSlot *slot, bool serve)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	slot->serves = serve;
	if (!serve)
		stop_announcing(slot);
	LWLockRelease(shared->lock);
}

bool
shared_announce(DispatcherSlot *slot)
{
	bool other = false;
	int i;

	if (slot->announces)
		return true;
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (i = 0; i < MAX_WORKERS; i++)
		other =
			other || (shared->slots[i].database == slot->database && shared->slots[i].announces);
	slot->announces = !other;
	LWLockRelease(shared->lock);
	return slot->announces;
}

bool
shared_take_unbound(DispatcherSlot *slot)
{
	bool unbound;

	/* set before our latch was */
	if (!slot->unbound)
		return false;
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	unbound = slot->unbound;
	slot->unbound = false;
	LWLockRelease(shared->lock);
	return unbound;
}

void
shared_publish_unbound(void)
{
	int i;

	if (shared == NULL)
		return;
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (i = 0; i < MAX_WORKERS; i++)
	{
		DispatcherSlot *slot = &shared->slots[i];

		if (slot->database != MyDatabaseId || slot->lane != LANE_HTTP || slot->pid == 0)
			continue;
		slot->unbound = true;
		slot->sleeping_until = DT_NOBEGIN;
		SetLatch(slot->latch);
	}
	LWLockRelease(shared->lock);
}

void
shared_take_changed(DispatcherSlot *slot)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	slot->changed = false;
	LWLockRelease(shared->lock);
}

TimestampTz
shared_take_due(DispatcherSlot *slot, TimestampTz *ahead)
{
	TimestampTz due;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	due = slot->committed_due;
	*ahead = slot->committed_ahead;
	slot->committed_due = DT_NOEND;
	slot->committed_ahead = DT_NOEND;
	slot->sleeping_until = DT_NOBEGIN;
	slot->last_pass_at = GetCurrentTimestamp();
	slot->passes++;
	LWLockRelease(shared->lock);
	return due;
}

int
shared_rank(DispatcherSlot *slot, int *peers)
{
	int rank = 0;
	int i;

	*peers = 1;
	LWLockAcquire(shared->lock, LW_SHARED);
	for (i = 0; i < MAX_WORKERS; i++)
	{
		DispatcherSlot *other = &shared->slots[i];

		if (other == slot || other->database != slot->database || other->lane != slot->lane ||
			!other->serves)
			continue;
		(*peers)++;
		if (other->index < slot->index)
			rank++;
	}
	LWLockRelease(shared->lock);
	return rank;
}

bool
shared_sleep_until(DispatcherSlot *slot, TimestampTz until)
{
	bool sleep;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	sleep = slot->committed_due >= until;
	slot->sleeping_until = until;
	LWLockRelease(shared->lock);
	return sleep;
}

void
shared_publish(const TimestampTz due[NUM_LANES], const TimestampTz ahead[NUM_LANES], bool changed)
{
	int i;

	if (shared == NULL)
		return;
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (i = 0; i < MAX_WORKERS; i++)
	{
		DispatcherSlot *slot = &shared->slots[i];

		if (slot->database != MyDatabaseId || slot->pid == 0)
			continue;
		slot->committed_due = Min(slot->committed_due, due[slot->lane]);
		slot->committed_ahead = Min(slot->committed_ahead, ahead[slot->lane]);
		/* the extension may only just have been created: wake those who look for it, too */
		if (!slot->serves || due[slot->lane] < slot->sleeping_until)
		{
			slot->sleeping_until = DT_NOBEGIN;
			SetLatch(slot->latch);
		}
		/* its own changes it announces anyway, before it sleeps */
		if (changed && slot->announces && !slot->changed)
		{
			slot->changed = true;
			if (slot != my_slot)
				SetLatch(slot->latch);
		}
	}
	LWLockRelease(shared->lock);
}

Question *
shared_questions(void)
{
	return shared->questions;
}

bool
shared_wake_runner(void)
{
	bool found = false;
	int i;

	if (shared == NULL)
		return false;
	LWLockAcquire(shared->lock, LW_SHARED);
	for (i = 0; i < MAX_WORKERS && !found; i++)
	{
		DispatcherSlot *slot = &shared->slots[i];

		found = slot->database == MyDatabaseId && slot->lane == LANE_BLOCKING && slot->serves;
		if (found)
			SetLatch(slot->latch);
	}
	LWLockRelease(shared->lock);
	return found;
}

int
shared_changed_bucket(const pg_uuid_t *session_id)
{
	return hash_bytes(session_id->data, UUID_LEN) % NUM_CHANGED_BUCKETS;
}

ConditionVariable *
shared_changed(const pg_uuid_t *session_id)
{
	return shared ? &shared->changed[shared_changed_bucket(session_id)] : NULL;
}

void
shared_broadcast(int bucket)
{
	if (shared != NULL)
		ConditionVariableBroadcast(&shared->changed[bucket]);
}

void
shared_count_call(const char *provider, const char *operation, ErrorClass class, int millis)
{
	ProviderStat *free_row = NULL;
	ProviderStat *row = NULL;
	int bucket;
	int i;

	if (shared == NULL || operation == NULL)
		return;
	bucket = millis <= 1 ? 0 : Min(STAT_BUCKETS - 1, (int) ceil(4 * log2(millis)));

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (i = 0; i < MAX_PROVIDER_STATS && row == NULL; i++)
	{
		ProviderStat *candidate = &shared->stats[i];

		if (candidate->database == MyDatabaseId && strcmp(candidate->provider, provider) == 0 &&
			strcmp(candidate->operation, operation) == 0)
			row = candidate;
		else if (candidate->database == InvalidOid && free_row == NULL)
			free_row = candidate;
	}
	if (row == NULL && free_row != NULL)
	{
		row = free_row;
		row->database = MyDatabaseId;
		strlcpy(row->provider, provider, NAMEDATALEN);
		strlcpy(row->operation, operation, NAMEDATALEN);
	}
	if (row != NULL)
	{
		row->calls++;
		row->errors[class]++;
		row->latency[bucket]++;
	}
	LWLockRelease(shared->lock);
}

ProviderStat *
shared_provider_stats(int *count)
{
	ProviderStat *copy = palloc(sizeof(ProviderStat) * MAX_PROVIDER_STATS);
	int i;

	*count = 0;
	if (shared == NULL)
		return copy;
	LWLockAcquire(shared->lock, LW_SHARED);
	for (i = 0; i < MAX_PROVIDER_STATS; i++)
	{
		if (shared->stats[i].database == MyDatabaseId)
			copy[(*count)++] = shared->stats[i];
	}
	LWLockRelease(shared->lock);
	return copy;
}

double
shared_latency_quantile(const ProviderStat *stat, double q)
{
	uint64 seen = 0;
	int i;

	for (i = 0; i < STAT_BUCKETS; i++)
	{
		seen += stat->latency[i];
		if (stat->calls > 0 && seen >= q * stat->calls)
			return i == 0 ? 1 : pow(2, i / 4.0);
	}
	return 0;
}

/* Under the lock: whether a worker of that pid is there. */
static bool
has_slot(int pid)
{
	int i;

	for (i = 0; i < MAX_WORKERS; i++)
	{
		if (shared->slots[i].pid == pid)
			return true;
	}
	return false;
}

void
shared_note_rate(const char *bucket, double factor)
{
	Slowed *free_row = NULL;
	Slowed *row = NULL;
	int i;

	if (shared == NULL || my_slot == NULL)
		return;
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (i = 0; i < MAX_SLOWED && row == NULL; i++)
	{
		Slowed *candidate = &shared->slowed[i];

		if (candidate->pid == MyProcPid && strcmp(candidate->bucket, bucket) == 0)
			row = candidate;
		else if (free_row == NULL && (candidate->pid == 0 || !has_slot(candidate->pid)))
			free_row = candidate;
	}
	if (row == NULL && factor < 1 && free_row != NULL)
	{
		row = free_row;
		row->pid = MyProcPid;
		row->database = MyDatabaseId;
		strlcpy(row->bucket, bucket, sizeof(row->bucket));
	}
	if (row != NULL)
	{
		row->factor = factor;
		if (factor >= 1)
			row->pid = 0;
	}
	LWLockRelease(shared->lock);
}

Slowed *
shared_slowed(int *count)
{
	Slowed *copy = palloc(sizeof(Slowed) * MAX_SLOWED);
	int i;

	*count = 0;
	if (shared == NULL)
		return copy;
	LWLockAcquire(shared->lock, LW_SHARED);
	for (i = 0; i < MAX_SLOWED; i++)
	{
		if (shared->slowed[i].pid != 0 && shared->slowed[i].database == MyDatabaseId &&
			has_slot(shared->slowed[i].pid))
			copy[(*count)++] = shared->slowed[i];
	}
	LWLockRelease(shared->lock);
	return copy;
}
