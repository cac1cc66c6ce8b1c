/*-------------------------------------------------------------------------
 *
 * shared.h
 *		What all processes share: who dispatches where, wake-ups, counters.
 *
 * Exists only when the library is preloaded; every function here does the
 * sensible thing (nothing, or "none") when it is not.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_SHARED_H
#define AGENTVM_ENGINE_SHARED_H

#include "agentvm.h"

#include "datatype/timestamp.h"
#include "providers/error_class.h"
#include "storage/condition_variable.h"
#include "utils/uuid.h"

#define MAX_DISPATCHERS 64				  /* in the whole cluster */
#define MAX_WORKERS (2 * MAX_DISPATCHERS) /* as many runners */

/* Who works on a session: its column "lane". */
#define LANE_HTTP 0		/* dispatchers: calls are HTTP requests of the event loop */
#define LANE_BLOCKING 1 /* runners: calls block, each on a thread */
#define NUM_LANES 2
#define LANE_ALL (-1)

/* A dispatcher or runner as others see it. */
typedef struct DispatcherSlot
{
	Oid database; /* InvalidOid: free */
	int lane;
	int index; /* 0 .. agentvm.dispatchers - 1 within its database */
	int pid;   /* 0 while it is being started */
	Latch *latch;
	bool serves;	/* runs, and the extension is there */
	bool announces; /* the one of its database that does */
	bool unbound;	/* a backend has left sessions behind that were bound to it */
	bool changed;	/* some state has been changed by a commit since it last looked */
	/*
	 * The earliest next_check_at that somebody committed since this dispatcher
	 * last looked: the dispatcher's low-water mark may not stay above it.
	 */
	TimestampTz committed_due;
	TimestampTz committed_ahead; /* the earliest of those that were still to come */
	TimestampTz sleeping_until;	 /* a commit that is due later need not wake it */
	TimestampTz started_at;
	TimestampTz last_pass_at;
	int in_flight;
	int stuck; /* threads of a runner whose call was given up and has not come back */
	uint64 passes;
	uint64 claimed;
	uint64 recorded;
	uint64 stale_replies;
} DispatcherSlot;

/* Request and attach shared memory; called from _PG_init while preloading. */
extern void shared_init(void);

/* Whether the library was preloaded. */
extern bool shared_available(void);

/* How many dispatchers, or runners, serve the current database. */
extern int shared_serving(int lane);

/* ---- the launcher's side ---- */

/* The array of MAX_WORKERS slots; read and written under the lock. */
extern DispatcherSlot *shared_slots(void);
extern void shared_lock(LWLockMode mode);
extern void shared_unlock(void);

/*
 * Reserve a slot for the worker (database, lane, index), which the launcher is
 * about to start.  NULL if somebody holds the database, or no slot is free.
 */
extern DispatcherSlot *shared_reserve(Oid database, int lane, int index);

/* Tell everybody that this process is the launcher; with NULL, that it is no more. */
extern void shared_set_launcher(Latch *latch);

/*
 * Since when this server has taken writes: its start, its promotion, or the end
 * of its last crash recovery.  The launcher begins with that (memory is new after
 * a crash); as long as it has not, the time is now.  Without preloading it is the
 * postmaster's start, which is all that can be known then.
 */
extern TimestampTz shared_open_since(void);

/* What keeps the launcher from running all the dispatchers that are asked for. */
typedef enum Shortage
{
	SHORT_OF_NOTHING,
	SHORT_OF_WORKERS, /* max_worker_processes */
	SHORT_OF_SLOTS	  /* MAX_DISPATCHERS */
} Shortage;

/* Tell everybody what there is too little of. */
extern void shared_set_shortage(Shortage shortage);

/* Whether there is a launcher; *shortage is set to what it last told. */
extern bool shared_launcher(Shortage *shortage);

/* Set the launcher's latch. */
extern void shared_wake_launcher(void);

/* ---- who wants a database for himself (database_hook.c) ---- */

/*
 * Put this backend's hold on a database, or lift it (InvalidOid).  While it
 * stands, and the backend lives, no dispatcher is started there.  When there is
 * no room for a hold nothing happens, and the command may find the database in
 * use.
 */
extern void shared_hold_database(Oid database);

/* Whether a living backend holds the database. */
extern bool shared_is_held(Oid database);

/* Send SIGTERM to the dispatchers and runners of a database; how many slots it still has. */
extern int shared_stop_workers(Oid database);

/* ---- the dispatcher's side ---- */

/*
 * Take the slot that the launcher reserved for (database, lane, index);
 * registers an exit hook that clears it, and only if it still holds our pid.
 * NULL if another process holds it.
 */
extern DispatcherSlot *shared_attach(Oid database, int lane, int index);

/* Set or clear whether commits wake us, i.e. whether we serve the database. */
extern void shared_serve(DispatcherSlot *slot, bool serve);

/* Read and reset committed_due and committed_ahead (DT_NOEND: nothing), and note that a pass begins. */
extern TimestampTz shared_take_due(DispatcherSlot *slot, TimestampTz *ahead);

/*
 * Whether this dispatcher is the one of its database that announces changes; it
 * becomes it if there is none.  Who announces does so until it serves no more.
 */
extern bool shared_announce(DispatcherSlot *slot);

/*
 * The NOTIFY channel on which gateways are told the ids of sessions that begin to
 * end, another one after each start of the server; NULL where nobody announces.
 */
extern const char *shared_gateway_channel(void);

/* Whether slot->unbound was set; it is reset. */
extern bool shared_take_unbound(DispatcherSlot *slot);

/* Reset slot->changed; what is committed from here on sets it again. */
extern void shared_take_changed(DispatcherSlot *slot);

/* How many workers of our lane serve our database, ourselves included, and how many of them come before us. */
extern int shared_rank(DispatcherSlot *slot, int *peers);

/*
 * Publish until when we are going to sleep.  Returns false if something that is
 * due earlier was committed meanwhile: do not sleep, look again.
 */
extern bool shared_sleep_until(DispatcherSlot *slot, TimestampTz until);

/* ---- wake-ups at commit ---- */

/*
 * Lower committed_due of all workers of the database to their lane's "due", and
 * committed_ahead to its "ahead"; wake those that would sleep beyond "due".  If
 * states have "changed", tell the one that announces.
 */
extern void shared_publish(const TimestampTz due[NUM_LANES], const TimestampTz ahead[NUM_LANES],
						   bool changed);

/* Tell the dispatchers of the database that this backend leaves sessions behind that are bound to it. */
extern void shared_publish_unbound(void);

/* The condition variable that waiters of a session sleep on (shared by many sessions), or NULL. */
extern ConditionVariable *shared_changed(const pg_uuid_t *session_id);
extern int shared_changed_bucket(const pg_uuid_t *session_id);
extern void shared_broadcast(int bucket);

/* So many that a change hardly ever wakes somebody who waits for another session. */
#define NUM_CHANGED_BUCKETS 4096

/* ---- questions to a runner (question.c) ---- */

#define MAX_QUESTIONS 8			   /* under way in the whole cluster */
#define QUESTION_SIZE (256 * 1024) /* bytes of a question, and of its answer */

typedef enum QuestionState
{
	QUESTION_FREE,
	QUESTION_BEGUN,	  /* the asker writes it */
	QUESTION_ASKED,	  /* a runner may take it */
	QUESTION_TAKEN,	  /* the runner has copied it and makes the call */
	QUESTION_ANSWERED /* the asker reads it */
} QuestionState;

/*
 * Belongs to its asker, who may let go of it at any time; a runner reads and
 * writes it under the lock, and only if it is still the one that it has taken.
 */
typedef struct Question
{
	QuestionState state;
	uint64 ticket; /* another one for each question */
	Oid database;
	int runner_pid; /* who has taken it */
	Latch *asker;
	char provider[NAMEDATALEN];
	int timeout_ms;
	int status; /* of the answer, as are the next ones */
	bool maybe_sent;
	bool has_error;
	int millis;
	size_t len;
	char text
		[QUESTION_SIZE]; /* operation, target, body; or error, body: but for the body NUL-terminated */
} Question;

/* The array of MAX_QUESTIONS. */
extern Question *shared_questions(void);

/* Set the latch of the runner that serves the current database; false when there is none. */
extern bool shared_wake_runner(void);

/* ---- counters per provider and operation ---- */

#define STAT_BUCKETS 64
typedef struct ProviderStat
{
	Oid database; /* InvalidOid: free */
	char provider[NAMEDATALEN];
	char operation[NAMEDATALEN];
	uint64 calls;
	uint64 errors[NUM_ERROR_CLASSES];
	uint64 latency[STAT_BUCKETS]; /* bucket i counts calls of about 2^(i/4) ms */
} ProviderStat;

#define MAX_PROVIDER_STATS 128

/* Count one answered call. */
extern void shared_count_call(const char *provider, const char *operation, ErrorClass class,
							  int millis);

/* Palloc'd copy of the counters of the current database; *count is set. */
extern ProviderStat *shared_provider_stats(int *count);

/* Latency in ms below which the fraction "q" (0..1) of a row's calls stayed; 0 without calls. */
extern double shared_latency_quantile(const ProviderStat *stat, double q);

/* ---- accounts that are called more slowly than was published ---- */

#define MAX_SLOWED 64
typedef struct Slowed
{
	int pid; /* of the dispatcher that does so; 0: free */
	Oid database;
	char bucket[128]; /* CallRate.bucket */
	double factor;	  /* of the published rate is left */
} Slowed;

/* Tell of a bucket of this dispatcher's; a factor of 1: it is as published. Without effect in other processes. */
extern void shared_note_rate(const char *bucket, double factor);

/* Palloc'd copy of what dispatchers of the current database have told; *count is set. */
extern Slowed *shared_slowed(int *count);

#endif /* AGENTVM_ENGINE_SHARED_H */
