/*-------------------------------------------------------------------------
 *
 * engine_private.h
 *		What the files of the engine share: engine.c, due.c (what to claim), acts.c (calls under way).
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_ENGINE_PRIVATE_H
#define AGENTVM_ENGINE_ENGINE_PRIVATE_H

#include "postgres.h"

#include "agentvm.h"
#include "engine/engine.h"
#include "engine/inventory.h"
#include "engine/rate.h"
#include "engine/transport.h"
#include "engine/turn.h"
#include "lib/ilist.h"
#include "utils/hsearch.h"

/* A call for several sessions. */
typedef struct Joint
{
	const char *batch; /* of CallRate */
	int limit;
	HttpRequest *request; /* of one of them */
	dlist_head acts;	  /* of the sessions */
	int count;
	TimestampTz since;
} Joint;

/*
 * A session whose call is under way, or answered and not yet recorded; or a call of a
 * login, or for several sessions.
 */
typedef struct Act
{
	dlist_node node;
	MemoryContext context;
	LoginRef fetches;	  /* it is no session's call, but one of this login, */
	Inventory *inventory; /* or of this list, */
	Joint *joint;		  /* or one for these */
	bool joined;		  /* it is one of those: it does not count as a call of its own */
	char *member;		  /* of CallRate, with joined */
	char *bucket;		  /* of CallRate, whose token its call has taken; NULL: none, */
	char *account;		  /* and of that */
	pg_uuid_t session_id;
	int64 lease;
	char *team_id;
	char *provider;
	TurnCall call;
	LoginRef waits_for;		/* no call is under way, but this login is awaited */
	HttpReply *reply;		/* NULL while under way, and after a login */
	TimestampTz not_before; /* do not try to record earlier */
	TimestampTz leased_until;
	int failures; /* records that raised */
} Act;

/* A request of the batch that waits for the commit; what is to be true of its act then. */
typedef struct Outgoing
{
	Act *act;
	bool fresh; /* the act was made for this request: without it, it goes */
	TurnCall call;
	LoginRef wait_for; /* without a request */
	int64 lease;
	TimestampTz leased_until;
	HttpRequest *request;
	CallRate *rate; /* of the request, or NULL */
} Outgoing;

/* What a claim or record is about: a session, and its answered call if it has one. */
typedef struct Job
{
	pg_uuid_t session_id; /* sorted by this and the lease */
	int64 lease;		  /* of the act; 0 for a claim */
	Act *act;			  /* NULL for a claim */
	TimestampTz due;	  /* next_check_at as a claim has read it */
	bool done;			  /* the row was ours, and its turn has been taken */
	bool raised;
} Job;

/* A session that claims pass by, as long as it is due at the same time as it was. */
typedef struct PassedBy
{
	pg_uuid_t session_id; /* hash key */
	TimestampTz due;
	TimestampTz until; /* DT_NOEND: somebody has it locked, until a commit says otherwise */
} PassedBy;

typedef struct TeamLoad
{
	char team_id[AVM_MAX_ID + 1]; /* hash key */
	int in_flight;
	int joined;				 /* sessions that wait for calls for several, which count once */
	int chosen;				 /* for the claim at hand */
	TimestampTz parked_from; /* its due rows begin after this; DT_NOEND: none are parked */
	uint64 served;			 /* when its parked rows were last looked at */
	TimestampTz slow_until;	 /* the provider throttles this team's account */
	int slow_count;
} TeamLoad;

struct Engine
{
	MemoryContext context;
	MemoryContext batch; /* of one transaction and the sends after it */
	MemoryContextCallback on_delete;
	const Transport *transport;
	void *client; /* of the transport */
	DispatcherSlot *slot;
	EngineHost host;
	int lane;
	int peers; /* workers that share the work of this database, */
	int rank;  /* and which of them we are */
	HTAB *teams;
	HTAB *passed_by;
	Rates *rates;
	dlist_head gathering; /* calls for several that have not left yet */
	dlist_head under_way;
	dlist_head answered;
	dlist_head waiting;		   /* for logins */
	dlist_head login_answered; /* calls of logins */
	dlist_head lists_waiting;  /* lists of VMs that wait for logins, */
	dlist_head lists_held;	   /* those that wait for what their account grants, */
	dlist_head lists_answered; /* and those that go on */
	int lists;				   /* so many there are, */
	int held;				   /* of which so many are held */
	Act *list_at_hand;		   /* taken out of all these */
	TimestampTz next_list;	   /* when to claim the next ones */
	int in_flight;
	int joined;
	TimestampTz low;	  /* low-water mark: nothing older is due that is not parked */
	TimestampTz behind;	  /* a pass over all below it has come so far; DT_NOEND: there is none */
	TimestampTz next_due; /* no next_check_at ahead is earlier; DT_NOBEGIN: not known */
	uint64 looks;		  /* at parked rows so far */
	bool due_first;		  /* the next claim begins with what is due, not with what is parked */
	bool more;			  /* more is due than the last claim took */
	bool full;			  /* the last claim found no room at all */
	int one_at_a_time;	  /* so many transactions are for one session only */
	Job suspect;		  /* what the transaction at hand is about, if it is one session only */
	bool have_suspect;
	List *outgoing; /* the transaction's effects, in batch: requests to send, */
	List *settled;	/* acts that are over, */
	int finished;	/* and turns that ended without a request */
	ConfigCache configs;
};

/* Rows that a claim is about to lock. */
typedef struct Candidates
{
	Job *jobs;
	int count;
	int limit;
} Candidates;

/* ---- due.c: inside a db scope, but for the first three ---- */

/* What is known of a team, made if it is new; valid until the next due_begin(). */
extern TeamLoad *team_of(Engine *engine, const char *team_id);

/* Our part of what all workers of this lane in this database may have in flight together. */
extern int due_share(Engine *engine, int total);

/*
 * Begin a claim: marks go down to "lowest" (DT_NOBEGIN: look at everything), what was chosen in the
 * last one is forgotten, and so are teams that need not be remembered.
 */
extern void due_begin(Engine *engine, TimestampTz lowest);

/* Choose rows that are due by "now" until chosen->limit is reached, moving the marks. */
extern void due_choose(Engine *engine, Candidates *chosen, TimestampTz now);

/* Set engine->next_due to when the next row after "now" is due, so that we know how long to sleep. */
extern void due_look_ahead(Engine *engine, TimestampTz now);

/* Let claims pass by a session that is due at "due", until then; DT_NOEND: until a commit says otherwise. */
extern void due_pass_by(Engine *engine, const pg_uuid_t *id, TimestampTz due, TimestampTz until);

/* When what was parked or passed by is to be looked at again; DT_NOBEGIN: now. */
extern TimestampTz due_next(Engine *engine);

/* Forget all marks: the next claims look at everything. */
extern void due_everything(Engine *engine);

/* ---- acts.c ---- */

/* An act for a row whose turn has asked for a request; counted until act_release(). */
extern Act *act_for(Engine *engine, const SessionRow *row);
extern void act_release(Engine *engine, Act *act);

/* Hand a request to the transport; one that may not be sent (plain http, say) is answered by that. */
extern void act_send(Engine *engine, Act *act, HttpRequest *request);

/* A turn takes effect: its request is sent, or its session waits for a login. */
extern void act_send_out(Engine *engine, Outgoing *out);

/* Let the calls for several sessions go that have gathered: all of them, or those that have for long enough. */
extern void acts_send_gathered(Engine *engine, bool all);

/* Keep a copy of a reply with its act. */
extern void act_keep_reply(Act *act, const HttpReply *reply);

/* An act whose call has been answered goes where that is taken in. */
extern void act_answered(Engine *engine, Act *act);

#endif /* AGENTVM_ENGINE_ENGINE_PRIVATE_H */
