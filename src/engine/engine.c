/*-------------------------------------------------------------------------
 *
 * engine.c
 *		Claim, act, record: the one engine that dispatchers, runners and CALL dispatch() run.
 *
 * Claim: a short transaction picks due sessions, locks those that nobody else
 * holds, gives each its turn (turn.c) and writes a fresh lease number for those
 * that need the network, together with the handle that makes the call
 * repeatable.  Act: after the commit the requests are sent; no transaction,
 * lock or snapshot is held while they are under way.  Record: another short
 * transaction locks the rows of answered calls again, drops the replies whose
 * lease number is no longer the row's, and gives the others their next turn.
 *
 * Which due rows to pick.  Rows are read in order of next_check_at, from the
 * low-water mark on: index entries of rows handled already stay behind while
 * some transaction pins xmin, and reading them anew on every claim would cost
 * 100,000 buffers.  For the same reason the index is asked for the next row
 * ahead only once the last answer's time has come.  A team at its in-flight cap
 * is parked: the scan goes on past its rows without touching them and remembers
 * where the first one was; when the team has room again its rows are read from
 * there.  A row that a user has locked, or whose turn has raised an error, is
 * passed by.  All these marks are only hints: a commit below them lowers them
 * (wake.c), and a full pass every sweep_interval heals the rest, beside what
 * becomes due meanwhile.
 *
 * Where room is scarce, what is newly due and what is parked come first in turn,
 * and of parked teams that one which was served the longest ago: no number of
 * teams with a backlog keeps the others out.
 *
 * Calls that a provider can make for several sessions at once (Provider.join) gather
 * as long as claims bring more of them, and leave as one call: it counts as one against the
 * caps, and its answer is taken apart into one for each session, whose lease and record are
 * as ever.  That is a matter of milliseconds, or when thousands are due a second: where those
 * of hundreds of accounts are due in turn, a call for each would take longer.
 *
 * One session's error is its own affair.  The turns of a transaction are taken in
 * a subtransaction; if one raises (a trigger of the administrator's, say) the
 * batch is halved until it stands alone.  What a turn changes in memory takes
 * effect after the commit only.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/engine.h"
#include "engine/inventory.h"
#include "engine/rate.h"
#include "engine/retry.h"
#include "engine/transport.h"
#include "engine/turn.h"
#include "executor/instrument.h"
#include "lib/ilist.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

#define SCAN_CHUNK 600 /* rows or buffers that a claim reads, each of due, overlooked and parked */
#define RECORD_BATCH 128		 /* replies recorded in one transaction */
#define LISTS_AT_ONCE 8			 /* lists of VMs under way */
#define LOCKED_RETRY_US 100000	 /* how soon a record is tried again whose row a user has locked */
#define RAISED_RETRY_US 1000000	 /* the same after an error, twice as long each time */
#define RAISED_PAUSE_S 60		 /* how long a session is passed by whose claim has raised */
#define DEFAULT_TIMEOUT_MS 30000 /* of a call; never above two thirds of the lease */
#define GATHER_US 1000000		 /* a call for several sessions leaves after that at the latest */
#define JOINED_PER_TEAM 2000	 /* sessions of a team that wait for such calls at most, */
#define JOINED 20000			 /* and of all teams */

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
	char *bucket;		  /* of CallRate, whose token its call has taken; NULL: none */
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
	dlist_head lists_waiting;  /* lists of VMs that wait for logins */
	dlist_head lists_answered; /* and those that go on */
	int lists;				   /* so many are under way */
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

static DbQuery scan_query = {"SELECT session_id, team_id, next_check_at FROM agentvm.session "
							 "WHERE lane = $1 AND next_check_at > $2 AND next_check_at <= $3 "
							 "ORDER BY next_check_at LIMIT $4",
							 4,
							 {INT2OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID},
							 .generic = true};

/* The rows of one team among the next so many; the last of these in any case, so that the mark can move there. */
static DbQuery parked_query = {
	"SELECT session_id, team_id, next_check_at, n FROM ("
	"SELECT session_id, team_id, next_check_at, row_number() OVER (ORDER BY next_check_at) AS n "
	"FROM (SELECT session_id, team_id, next_check_at FROM agentvm.session "
	"WHERE lane = $1 AND next_check_at > $2 AND next_check_at <= $3 "
	"ORDER BY next_check_at LIMIT $4) i) o WHERE team_id = $5 OR n = $4 LIMIT $6",
	6,
	{INT2OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID, TEXTOID, INT4OID}};

static DbQuery ahead_query = {
	"SELECT next_check_at FROM agentvm.session "
	"WHERE lane = $1 AND next_check_at > $2 ORDER BY next_check_at LIMIT 1",
	2,
	{INT2OID, TIMESTAMPTZOID}};

/*
 * Leases end within one lease time, so only the near end of the index is read.
 * A holder that is missing from pg_stat_activity is dead; one whose start is
 * hidden from us, since the extension's owner is no superuser, may be alive.
 */
static DbQuery reclaim_query = {
	"WITH dead AS MATERIALIZED (SELECT session_id FROM agentvm.session s "
	"WHERE lane = $1 AND next_check_at > $2 AND next_check_at <= $2 + $3 * interval '1 ms' "
	"AND lease IS NOT NULL AND NOT EXISTS (SELECT FROM pg_stat_get_activity(NULL) a "
	"WHERE a.pid = s.lease_pid AND (a.backend_start = s.lease_start) IS NOT FALSE) "
	"FOR UPDATE SKIP LOCKED) "
	"UPDATE agentvm.session s SET lease = NULL, lease_pid = NULL, lease_start = NULL, "
	"next_check_at = clock_timestamp() FROM dead WHERE s.session_id = dead.session_id "
	"AND s.lease IS NOT NULL",
	3,
	{INT2OID, TIMESTAMPTZOID, INT4OID}};

static void
close_client(void *arg)
{
	Engine *engine = arg;

	if (engine->client != NULL)
		engine->transport->destroy(engine->client);
	engine->client = NULL;
	login_detach(engine);
}

Engine *
engine_create(MemoryContext parent, DispatcherSlot *slot, int lane, EngineHost host)
{
	MemoryContext context = AllocSetContextCreate(parent, "agentvm engine", ALLOCSET_DEFAULT_SIZES);
	Engine *engine = MemoryContextAllocZero(context, sizeof(Engine));
	HASHCTL ctl = {0};

	engine->context = context;
	engine->batch = AllocSetContextCreate(context, "agentvm batch", ALLOCSET_DEFAULT_SIZES);
	engine->slot = slot;
	engine->host = host;
	engine->lane = lane;
	engine->transport = transport_of(lane);
	engine->peers = 1;
	engine->low = DT_NOBEGIN;
	engine->behind = DT_NOEND;
	engine->next_due = DT_NOBEGIN;
	engine->rates = rates_create(context);
	dlist_init(&engine->gathering);
	dlist_init(&engine->under_way);
	dlist_init(&engine->answered);
	dlist_init(&engine->waiting);
	dlist_init(&engine->login_answered);
	dlist_init(&engine->lists_waiting);
	dlist_init(&engine->lists_answered);
	engine->next_list = slot != NULL ? DT_NOBEGIN : DT_NOEND;
	ctl.keysize = AVM_MAX_ID + 1;
	ctl.entrysize = sizeof(TeamLoad);
	ctl.hcxt = context;
	engine->teams = hash_create("agentvm teams", 64, &ctl, HASH_ELEM | HASH_STRINGS | HASH_CONTEXT);
	ctl.keysize = sizeof(pg_uuid_t);
	ctl.entrysize = sizeof(PassedBy);
	engine->passed_by =
		hash_create("agentvm passed by", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	engine->client = engine->transport->create();
	login_attach(engine);
	engine->on_delete.func = close_client;
	engine->on_delete.arg = engine;
	MemoryContextRegisterResetCallback(context, &engine->on_delete);
	return engine;
}

void
engine_destroy(Engine *engine)
{
	MemoryContextDelete(engine->context);
}

int
engine_fd(Engine *engine)
{
	return engine->transport->fd(engine->client);
}

int
engine_in_flight(Engine *engine)
{
	return engine->in_flight + engine->joined;
}

/* ---- transactions ---- */

/*
 * What the planner may not use in the engine.  The price of a scan type that is
 * off makes any plan look dear enough for just-in-time compilation, so that has
 * to be off, too.
 */
static const char *const planner_off[] = {"enable_seqscan", "enable_bitmapscan", "enable_sort",
										  "jit"};

/*
 * Begin a transaction as the extension's owner.  Left alone the planner takes a
 * bitmap scan and a sort for a claim with many rows due, at 200 times the
 * buffers, and a bitmap scan never lets dead index entries be cleaned.
 */
static void
begin_batch(Engine *engine, DbScope *scope)
{
	engine->host.begin();
	/*
	 * What is committed before a call must survive a crash after it.  The commit
	 * comes after db_leave(), so this lasts to the end of the transaction.
	 */
	if (synchronous_commit == SYNCHRONOUS_COMMIT_OFF)
		(void) set_config_option("synchronous_commit", "local", PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_LOCAL, true, 0, false);
	db_enter(scope);
	db_plan_without(planner_off, lengthof(planner_off));
	MemoryContextReset(engine->batch);
	engine->outgoing = NIL;
	engine->settled = NIL;
	engine->finished = 0;
	engine->configs.context = engine->batch;
	engine->configs.entries = NIL;
	MemoryContextSwitchTo(engine->batch);
}

static TeamLoad *team_load(Engine *engine, const char *team_id);
static void release_act(Engine *engine, Act *act);
static int our_share(Engine *engine, int total);

/* In PG_CATCH: a reply, in memory of the act, that tells of the error. */
static HttpReply *
reply_of_error(Act *act)
{
	MemoryContext old = MemoryContextSwitchTo(act->context);
	ErrorData *error = CopyErrorData();
	HttpReply *reply = palloc0(sizeof(HttpReply));

	FlushErrorState();
	reply->error = error->message;
	reply->body = "";
	reply->retry_after_s = -1;
	MemoryContextSwitchTo(old);
	return reply;
}

/* Keep a copy of a reply with its act. */
static void
keep_reply(Act *act, const HttpReply *reply)
{
	MemoryContext old = MemoryContextSwitchTo(act->context);

	act->reply = palloc(sizeof(HttpReply));
	*act->reply = *reply;
	act->reply->body = pnstrdup(reply->body, reply->body_len);
	act->reply->error = reply->error ? pstrdup(reply->error) : NULL;
	act->reply->request_id = reply->request_id ? pstrdup(reply->request_id) : NULL;
	MemoryContextSwitchTo(old);
}

static const char **
joint_members(Joint *joint)
{
	const char **members = palloc(sizeof(char *) * joint->count);
	dlist_iter iter;
	int i = 0;

	dlist_foreach(iter, &joint->acts) members[i++] = dlist_container(Act, node, iter.cur)->member;
	return members;
}

/* Have the provider take a reply apart; where it raises, all are told why. */
static ErrorClass
split_reply(Act *act, HttpReply **replies)
{
	ErrorClass volatile class = CLASS_PERMANENT;

	PG_TRY();
	{
		class = provider_find(act->provider)
					->split(act->reply, joint_members(act->joint), act->joint->count, replies);
	}
	PG_CATCH();
	{
		HttpReply *reply = reply_of_error(act);
		int i;

		for (i = 0; i < act->joint->count; i++)
			replies[i] = reply;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(act->context);
	return class;
}

/* The reply to a call for several sessions: take it apart, for each its own. */
static void
hand_out(Engine *engine, Act *act)
{
	MemoryContext old = MemoryContextSwitchTo(act->context);
	Joint *joint = act->joint;
	HttpReply **replies = palloc0(sizeof(HttpReply *) * joint->count);
	int unanswered = 0;
	int i;

	if (joint->count == 1)
		replies[0] = act->reply;
	else
	{
		ErrorClass class = split_reply(act, replies);

		shared_count_call(act->provider, act->call.operation, class, act->reply->millis);
		if (act->bucket != NULL)
			rates_learn(engine->rates, act->bucket, class,
						GetCurrentTimestamp() - act->reply->millis * INT64CONST(1000),
						GetCurrentTimestamp());
	}
	for (i = 0; i < joint->count; i++)
		unanswered += replies[i] == NULL;
	for (i = 0; !dlist_is_empty(&joint->acts); i++)
	{
		Act *one = dlist_container(Act, node, dlist_pop_head_node(&joint->acts));

		one->call.counted = joint->count > 1;
		if (replies[i] != NULL)
			keep_reply(one, replies[i]);
		else /* those that are left together; where nobody has an answer, in halves */
			one->call.joint = unanswered < joint->count ? unanswered : (joint->count + 1) / 2;
		dlist_push_tail(&engine->answered, &one->node);
	}
	MemoryContextSwitchTo(old);
	release_act(engine, act);
}

/* An act whose call has been answered goes where that is taken in. */
static void
push_answered(Engine *engine, Act *act)
{
	dlist_head *where = act->fetches.id != 0	 ? &engine->login_answered
						: act->inventory != NULL ? &engine->lists_answered
												 : &engine->answered;

	if (act->joint != NULL)
		hand_out(engine, act);
	else
		dlist_push_tail(where, &act->node);
}

static void
start_call(Engine *engine, Act *act, HttpRequest *request)
{
	if (act->joint != NULL && act->joint->count > 1)
		request = provider_find(act->provider)
					  ->join(request, joint_members(act->joint), act->joint->count);
	if (request->timeout_ms <= 0)
		request->timeout_ms = DEFAULT_TIMEOUT_MS;
	request->timeout_ms = Min(request->timeout_ms, avm_lease_ms * 2 / 3);
	engine->transport->start(engine->client, act->provider, request, act);
}

/* Hand a request to the transport; one that may not be sent (plain http, say) is answered by that. */
static void
send_request(Engine *engine, Act *act, HttpRequest *request)
{
	MemoryContext old = CurrentMemoryContext;

	act->reply = NULL;
	PG_TRY();
	{
		start_call(engine, act, request);
		dlist_push_tail(&engine->under_way, &act->node);
	}
	PG_CATCH();
	{
		act->reply = reply_of_error(act);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	if (act->reply != NULL)
		push_answered(engine, act);
}

/* What is counted of an act that comes ("by" 1) or goes (-1). */
static void
count_act(Engine *engine, Act *act, int by)
{
	TeamLoad *team = team_load(engine, act->team_id);

	*(act->joined ? &team->joined : &team->in_flight) += by;
	*(act->joined ? &engine->joined : &engine->in_flight) += by;
}

static void
set_joined(Engine *engine, Act *act, bool joined)
{
	count_act(engine, act, -1);
	act->joined = joined;
	count_act(engine, act, 1);
}

/* A call for several sessions leaves. */
static void
send_joint(Engine *engine, Act *act)
{
	MemoryContext old = MemoryContextSwitchTo(act->context);

	dlist_delete(&act->node);
	set_joined(engine, act, false);
	rates_close(engine->rates, act->joint->batch);
	send_request(engine, act, act->joint->request);
	MemoryContextSwitchTo(old);
}

/* Let the calls for several sessions go that have gathered: all of them, or those that have for long enough. */
static void
send_gathered(Engine *engine, bool all)
{
	TimestampTz now = GetCurrentTimestamp();
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &engine->gathering)
	{
		Act *act = dlist_container(Act, node, iter.cur);

		if (!all && act->joint->since > now - GATHER_US)
			continue;
		act->joint->since = DT_NOBEGIN; /* it leaves as soon as there is room */
		if (engine->in_flight < our_share(engine, avm_max_in_flight) &&
			team_load(engine, act->team_id)->in_flight <
				our_share(engine, avm_max_in_flight_per_team))
			send_joint(engine, act);
	}
}

/* An act of a team that counts as a call. */
static Act *
new_act(Engine *engine, const char *team_id, const char *provider)
{
	MemoryContext context =
		AllocSetContextCreate(engine->context, "agentvm act", ALLOCSET_SMALL_SIZES);
	Act *act = MemoryContextAllocZero(context, sizeof(Act));

	act->context = context;
	act->team_id = MemoryContextStrdup(context, team_id);
	act->provider = MemoryContextStrdup(context, provider);
	count_act(engine, act, 1);
	return act;
}

/* Have a session's call made together with others. */
static void
join(Engine *engine, Act *act, HttpRequest *request, const CallRate *rate)
{
	Act *carrier = NULL;
	Joint *joint;
	dlist_iter iter;

	dlist_foreach(iter, &engine->gathering)
	{
		Act *other = dlist_container(Act, node, iter.cur);

		if (strcmp(other->joint->batch, rate->batch) == 0 &&
			strcmp(other->provider, act->provider) == 0)
		{
			carrier = other;
			break;
		}
	}
	if (carrier == NULL)
	{
		MemoryContext old;

		carrier = new_act(engine, act->team_id, act->provider);
		old = MemoryContextSwitchTo(carrier->context);
		carrier->call.operation = pstrdup(act->call.operation);
		carrier->bucket = act->bucket != NULL ? pstrdup(act->bucket) : NULL;
		carrier->joint = palloc0(sizeof(Joint));
		carrier->joint->batch = pstrdup(rate->batch);
		carrier->joint->limit = rate->limit;
		carrier->joint->request = http_request_copy(request);
		dlist_init(&carrier->joint->acts);
		carrier->joint->since = GetCurrentTimestamp();
		MemoryContextSwitchTo(old);
		set_joined(engine, carrier, true); /* it counts as a call from when it leaves */
		dlist_push_tail(&engine->gathering, &carrier->node);
	}
	joint = carrier->joint;
	act->member = MemoryContextStrdup(act->context, rate->member);
	set_joined(engine, act, true);
	dlist_push_tail(&joint->acts, &act->node);
	joint->count++;
	if (joint->count >= joint->limit)
		send_joint(engine, carrier);
}

/* A turn takes effect: its request is sent, or its session waits for a login. */
static void
send_out(Engine *engine, Outgoing *out)
{
	Act *act = out->act;

	if (!out->fresh)
		dlist_delete(&act->node);
	act->call = out->call;
	if (out->call.operation != NULL)
		act->call.operation = MemoryContextStrdup(act->context, out->call.operation);
	act->waits_for = out->wait_for;
	act->lease = out->lease;
	act->leased_until = out->leased_until;
	act->failures = 0;
	act->reply = NULL;
	act->not_before = 0;
	act->bucket = NULL;
	if (out->rate != NULL && avm_api_rate > 0)
		act->bucket = MemoryContextStrdup(act->context, out->rate->bucket);
	if (act->joined)
		set_joined(engine, act, false);
	out->act = NULL; /* from here on it is in one of our lists */

	if (out->request == NULL)
		dlist_push_tail(&engine->waiting, &act->node);
	else if (out->rate != NULL && out->rate->batch != NULL)
		join(engine, act, out->request, out->rate);
	else
		send_request(engine, act, out->request);
}

/* Commit, then let the turns take effect: forget what is over, send what was waiting. */
static void
commit_batch(Engine *engine, DbScope *scope)
{
	ListCell *lc;

	db_leave(scope);
	engine->host.commit();
	MemoryContextSwitchTo(engine->batch);

	engine->have_suspect = false;
	if (engine->slot != NULL)
		engine->slot->recorded += engine->finished;
	foreach (lc, engine->settled)
	{
		Act *act = lfirst(lc);

		dlist_delete(&act->node);
		release_act(engine, act);
	}
	engine->settled = NIL;
	foreach (lc, engine->outgoing)
		send_out(engine, lfirst(lc));
	engine->outgoing = NIL;
	MemoryContextSwitchTo(engine->context);
	MemoryContextReset(engine->batch);
	if (engine->slot != NULL)
		engine->slot->in_flight = engine->in_flight;
}

/* ---- acts and teams ---- */

static TeamLoad *
team_load(Engine *engine, const char *team_id)
{
	char key[AVM_MAX_ID + 1];
	TeamLoad *team;
	bool found;

	strlcpy(key, team_id, sizeof(key));
	team = hash_search(engine->teams, key, HASH_ENTER, &found);
	if (!found)
	{
		team->in_flight = 0;
		team->joined = 0;
		team->chosen = 0;
		team->parked_from = DT_NOEND;
		team->served = 0;
		team->slow_until = DT_NOBEGIN;
		team->slow_count = 0;
	}
	return team;
}

static void
release_act(Engine *engine, Act *act)
{
	count_act(engine, act, -1);
	MemoryContextDelete(act->context);
}

/* An act for a row whose turn asked for a request. */
static Act *
make_act(Engine *engine, const SessionRow *row)
{
	Act *act = new_act(engine, row->team_id, row->provider);

	act->session_id = row->session_id;
	return act;
}

/* A lease number that nobody has had. */
static int64
fresh_lease(void)
{
	uint64 bits;

	do
	{
		if (!pg_strong_random(&bits, sizeof(bits)))
			elog(ERROR, "could not generate a lease number");
		bits &= PG_INT64_MAX;
	} while (bits == 0);
	return (int64) bits;
}

/*
 * How an act was answered.  What its account grants of the operation is known, or else
 * throttling answers slow the team: its next claims wait, twice as long each time,
 * until an answer is of another kind.
 */
static void
note_throttling(Engine *engine, const Act *act, const TurnResult *result)
{
	TeamLoad *team = team_load(engine, act->team_id);
	TimestampTz now = GetCurrentTimestamp();

	if (act->bucket != NULL)
	{
		if (act->reply != NULL && !act->call.counted)
			rates_learn(engine->rates, act->bucket, result->reply_class,
						now - act->reply->millis * INT64CONST(1000), now);
		return;
	}
	if (result->last_class != CLASS_THROTTLED)
	{
		team->slow_count = 0;
		return;
	}
	if (team->slow_until > now)
		return; /* calls that were under way already */
	team->slow_count++;
	team->slow_until =
		now + retry_delay_ms(team->slow_count, RETRY_CAP_LAUNCH_MS) * INT64CONST(1000);
}

/* Give a locked row its turn and save it; "act" is NULL for a row just claimed. */
static void
take_turn(Engine *engine, SessionRow *row, Act *act)
{
	TurnResult result;

	session_turn(row, act ? act->reply : NULL, act ? &act->call : NULL, &engine->configs,
				 engine->rates, engine->peers, &result);
	if (act != NULL)
		note_throttling(engine, act, &result);

	if (result.request != NULL || result.wait_for.id != 0)
	{
		Outgoing *out = palloc0(sizeof(Outgoing));

		out->fresh = act == NULL;
		if (act == NULL)
			act = make_act(engine, row);
		out->act = act;
		out->call = result.call;
		if (result.request != NULL && out->call.operation == NULL)
			out->call.operation = "call";
		out->wait_for = result.wait_for;
		out->request = result.request;
		out->rate = result.rate;
		engine->outgoing = lappend(engine->outgoing, out);
		/* its own: if what follows the commit raises, the last reply is none to this request */
		row->lease = out->lease = fresh_lease();
		row->next_check_at = out->leased_until =
			GetCurrentTimestamp() + avm_lease_ms * INT64CONST(1000);
	}
	else
	{
		row->lease = 0;
		engine->finished++;
		if (act != NULL)
			engine->settled = lappend(engine->settled, act);
	}
	session_row_save(row);
	if (row->next_check_at != 0)
		engine->next_due = Min(engine->next_due, row->next_check_at);
}

/* By session, then by lease. */
static int
compare_jobs(const void *a, const void *b)
{
	const Job *x = a;
	const Job *y = b;
	int order = memcmp(&x->session_id, &y->session_id, sizeof(pg_uuid_t));

	if (order == 0)
		order = x->lease < y->lease ? -1 : x->lease > y->lease;
	return order;
}

/* Lock the rows that nobody else has locked, and give those that are ours their turns. */
static void
lock_and_take_turns(Engine *engine, Job *jobs, int count, TimestampTz due_by)
{
	pg_uuid_t *ids = palloc(sizeof(pg_uuid_t) * count);
	ListCell *lc;
	int i;

	for (i = 0; i < count; i++)
		ids[i] = jobs[i].session_id;
	foreach (lc, session_rows_lock(ids, count, due_by))
	{
		SessionRow *row = lfirst(lc);
		Job key = {row->session_id, jobs[0].act ? row->lease : 0};
		Job *job = bsearch(&key, jobs, count, sizeof(Job), compare_jobs);

		if (job == NULL)
			continue; /* the lease is another one by now */
		take_turn(engine, row, job->act);
		job->done = true;
	}
}

/* Undo the effects in memory of the turns after the first so many. */
static void
forget_turns(Engine *engine, int outgoing, int settled, int finished)
{
	int i;

	for (i = outgoing; i < list_length(engine->outgoing); i++)
	{
		Outgoing *out = list_nth(engine->outgoing, i);

		if (out->fresh && out->act != NULL)
			release_act(engine, out->act);
	}
	engine->outgoing = list_truncate(engine->outgoing, outgoing);
	engine->settled = list_truncate(engine->settled, settled);
	engine->finished = finished;
}

/*
 * Turns for as many of the (sorted) jobs as nobody else has locked, all in one
 * subtransaction.  If it raises, each half is tried again by itself; a session
 * that raises alone is marked and left as it was.
 */
static void
take_turns(Engine *engine, Job *jobs, int count, TimestampTz due_by)
{
	ResourceOwner owner = CurrentResourceOwner;
	int outgoing = list_length(engine->outgoing);
	int settled = list_length(engine->settled);
	int finished = engine->finished;
	ErrorData *volatile error = NULL;
	int i;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(engine->batch);
	PG_TRY();
	{
		lock_and_take_turns(engine, jobs, count, due_by);
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(engine->batch);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		forget_turns(engine, outgoing, settled, finished);
		error = abort_subtransaction(engine->batch, owner);
	}
	PG_END_TRY();
	if (error == NULL)
		return;

	for (i = 0; i < count; i++)
		jobs[i].done = false;
	if (count > 1)
	{
		take_turns(engine, jobs, count / 2, due_by);
		take_turns(engine, jobs + count / 2, count - count / 2, due_by);
		return;
	}
	jobs[0].raised = true;
	ereport(
		engine->slot ? LOG : WARNING,
		(errcode(error->sqlerrcode),
		 errmsg("agentvm: session %s is put off: %s",
				DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&jobs[0].session_id))),
				error->message),
		 error->context ? errcontext("%s", error->context) : 0));
}

/* ---- logins ---- */

/* Take a login further: begin it ("act" is NULL), or with the answer to its last call. */
static void
step_login(Engine *engine, LoginRef ref, Act *act)
{
	DbScope scope;
	HttpRequest *request;

	begin_batch(engine, &scope);
	request = login_step(&ref, act != NULL ? act->reply : NULL, engine);
	commit_batch(engine, &scope);
	if (act != NULL)
	{
		dlist_delete(&act->node);
		MemoryContextDelete(act->context);
	}
	if (request != NULL)
	{
		MemoryContext context =
			AllocSetContextCreate(engine->context, "agentvm login call", ALLOCSET_SMALL_SIZES);

		act = MemoryContextAllocZero(context, sizeof(Act));
		act->context = context;
		act->fetches = ref;
		act->provider = "";
		send_request(engine, act, request);
	}
}

/*
 * Begin the logins that somebody waits for, move those on whose call has been
 * answered, and give the sessions whose login is over another turn.
 */
static void
run_logins(Engine *engine)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &engine->waiting)
	{
		Act *act = dlist_container(Act, node, iter.cur);

		if (login_state(&act->waits_for) == LOGIN_WANTED)
			step_login(engine, act->waits_for, NULL);
	}
	dlist_foreach_modify(iter, &engine->lists_waiting)
	{
		Act *act = dlist_container(Act, node, iter.cur);

		if (login_state(&act->waits_for) == LOGIN_WANTED)
			step_login(engine, act->waits_for, NULL);
	}
	while (!dlist_is_empty(&engine->login_answered))
	{
		Act *act = dlist_head_element(Act, node, &engine->login_answered);

		step_login(engine, act->fetches, act);
	}
	dlist_foreach_modify(iter, &engine->waiting)
	{
		Act *act = dlist_container(Act, node, iter.cur);

		if (login_state(&act->waits_for) != LOGIN_OVER)
			continue;
		dlist_delete(&act->node);
		dlist_push_tail(&engine->answered, &act->node);
	}
	dlist_foreach_modify(iter, &engine->lists_waiting)
	{
		Act *act = dlist_container(Act, node, iter.cur);

		if (login_state(&act->waits_for) != LOGIN_OVER)
			continue;
		dlist_delete(&act->node);
		push_answered(engine, act);
	}
}

/* ---- lists of VMs ---- */

static void
release_list(Engine *engine, Act *act)
{
	engine->lists--;
	MemoryContextDelete(act->inventory->context);
}

/* Give a list that is in none of our queues its turn. */
static void
step_list(Engine *engine, Act *act)
{
	Inventory *inventory = act->inventory;
	InventoryTurn turn;
	DbScope scope;

	engine->list_at_hand = act;
	begin_batch(engine, &scope);
	inventory_turn(inventory, act->reply, &turn);
	commit_batch(engine, &scope);
	engine->list_at_hand = NULL;

	act->context = inventory->step;
	act->reply = NULL;
	act->waits_for = turn.wait_for;
	if (turn.request != NULL)
		send_request(engine, act, turn.request);
	else if (turn.wait_for.id != 0)
		dlist_push_tail(&engine->lists_waiting, &act->node);
	else
	{
		release_list(engine, act);
		/* there is room for another one */
		engine->next_list = Min(engine->next_list, GetCurrentTimestamp());
	}
}

/* Begin lists that are due, and move those on whose call has been answered. */
static void
run_lists(Engine *engine)
{
	TimestampTz now = GetCurrentTimestamp();

	if (engine->next_list <= now && engine->lists < LISTS_AT_ONCE)
	{
		DbScope scope;
		List *claimed;
		List *acts = NIL;
		ListCell *lc;

		begin_batch(engine, &scope);
		claimed = inventory_claim(engine->context, engine->lane, LISTS_AT_ONCE - engine->lists);
		engine->next_list = inventory_next(engine->lane);
		MemoryContextSwitchTo(engine->context);
		foreach (lc, claimed)
		{
			Inventory *inventory = lfirst(lc);
			Act *act = MemoryContextAllocZero(inventory->context, sizeof(Act));

			act->context = inventory->step;
			act->inventory = inventory;
			act->provider = inventory->place.provider;
			acts = lappend(acts, act);
		}
		commit_batch(engine, &scope);
		/* of an error before this nothing is left but the leases */
		foreach (lc, acts)
		{
			engine->lists++;
			push_answered(engine, lfirst(lc));
		}
		list_free(acts);
	}
	while (!dlist_is_empty(&engine->lists_answered))
	{
		Act *act = dlist_head_element(Act, node, &engine->lists_answered);

		dlist_delete(&act->node);
		step_list(engine, act);
	}
}

/* ---- claim ---- */

/* Our part of what all workers of this lane in this database may have in flight together. */
static int
our_share(Engine *engine, int total)
{
	return total / engine->peers + (engine->rank < total % engine->peers ? 1 : 0);
}

static int
team_room(Engine *engine, TeamLoad *team, TimestampTz now)
{
	if (team->slow_until > now)
		return 0;
	return Min(our_share(engine, avm_max_in_flight_per_team) - team->in_flight,
			   JOINED_PER_TEAM - team->joined) -
		   team->chosen;
}

/* ---- what claims pass by ---- */

static void
pass_by(Engine *engine, const pg_uuid_t *id, TimestampTz due, TimestampTz until)
{
	PassedBy *entry = hash_search(engine->passed_by, id, HASH_ENTER, NULL);

	entry->due = due;
	entry->until = until;
}

static bool
is_passed_by(Engine *engine, const pg_uuid_t *id, TimestampTz due)
{
	PassedBy *entry = hash_search(engine->passed_by, id, HASH_FIND, NULL);

	return entry != NULL && entry->due == due;
}

/*
 * Look again at what raised long enough ago, and at what a commit below
 * "lowest" may have unlocked; returns the lowest mark with these.  What lies
 * below all marks is looked at by nobody and need not be remembered.
 */
static TimestampTz
stop_passing_by(Engine *engine, TimestampTz lowest)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz floor = Min(engine->low, engine->behind);
	HASH_SEQ_STATUS scan;
	TeamLoad *team;
	PassedBy *entry;

	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
		floor = Min(floor, team->parked_from);
	hash_seq_init(&scan, engine->passed_by);
	while ((entry = hash_seq_search(&scan)) != NULL)
	{
		bool locked = entry->until == DT_NOEND;

		if (locked ? lowest <= entry->due : entry->until <= now)
			lowest = Min(lowest, entry->due);
		else if (!locked || entry->due > floor)
			continue;
		hash_search(engine->passed_by, &entry->session_id, HASH_REMOVE, NULL);
	}
	return lowest;
}

typedef struct Candidates
{
	Job *jobs;
	int count;
	int limit;
} Candidates;

static void
choose(Candidates *chosen, TeamLoad *team, const pg_uuid_t *id, TimestampTz due)
{
	Job *job = &chosen->jobs[chosen->count++];

	memset(job, 0, sizeof(Job));
	job->session_id = *id;
	job->due = due;
	team->chosen++;
}

/* Choose rows of a parked team that has room again, reading no more than so many. */
static void
choose_parked_of(Engine *engine, TeamLoad *team, int room, int budget, Candidates *chosen,
				 TimestampTz now)
{
	int limit = room + 1 + Min(hash_get_num_entries(engine->passed_by), SCAN_CHUNK);
	TimestampTz last = team->parked_from;
	bool all = true; /* nothing is left after the rows read */
	Datum values[6];
	uint64 i;
	bool isnull;

	values[0] = Int16GetDatum(engine->lane);
	values[1] = TimestampTzGetDatum(team->parked_from);
	values[2] = TimestampTzGetDatum(now);
	values[3] = Int32GetDatum(budget);
	values[4] = CStringGetTextDatum(team->team_id);
	values[5] = Int32GetDatum(limit);
	db_run(&parked_query, values, NULL);
	for (i = 0; i < SPI_processed && room > 0; i++)
	{
		pg_uuid_t *id = DatumGetUUIDP(db_value(i, 1, &isnull));

		last = DatumGetTimestampTz(db_value(i, 3, &isnull));
		if (DatumGetInt64(db_value(i, 4, &isnull)) == budget)
			all = false;
		if (is_passed_by(engine, id, last) ||
			strcmp(db_text(i, 2, CurrentMemoryContext), team->team_id) != 0)
			continue;
		choose(chosen, team, id, last);
		room--;
	}
	/*
	 * Rows of the same microsecond may be left, so the next look begins at it and
	 * not after it, unless that were where this one began.
	 */
	if (all && SPI_processed < limit && room > 0)
		team->parked_from = DT_NOEND;
	else
		team->parked_from = last - 1 > team->parked_from || room == 0 ? last - 1 : last;
	SPI_freetuptable(SPI_tuptable);
}

static int
compare_served(const void *a, const void *b)
{
	uint64 x = (*(TeamLoad *const *) a)->served;
	uint64 y = (*(TeamLoad *const *) b)->served;

	return x < y ? -1 : x > y;
}

static int64
buffers_read(void)
{
	return pgBufferUsage.shared_blks_hit + pgBufferUsage.shared_blks_read;
}

/* Choose rows of parked teams that have room again, those first that have waited longest. */
static void
choose_parked(Engine *engine, Candidates *chosen, TimestampTz now)
{
	int64 until = buffers_read() + SCAN_CHUNK;
	TeamLoad **waiting = palloc(sizeof(TeamLoad *) * (hash_get_num_entries(engine->teams) + 1));
	HASH_SEQ_STATUS scan;
	TeamLoad *team;
	int count = 0;
	int i;

	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		if (team->parked_from != DT_NOEND && team_room(engine, team, now) > 0)
			waiting[count++] = team;
	}
	qsort(waiting, count, sizeof(TeamLoad *), compare_served);
	for (i = 0; i < count; i++)
	{
		int room = Min(team_room(engine, waiting[i], now), chosen->limit - chosen->count);
		int64 budget = until - buffers_read();

		if (room <= 0 || budget <= 0)
			break;
		waiting[i]->served = ++engine->looks;
		choose_parked_of(engine, waiting[i], room, (int) budget, chosen, now);
	}
}

/*
 * Choose from what is due after *from and up to "to", in order, parking teams
 * that have no room.  Moves *from; returns whether there is more.
 */
static bool
choose_between(Engine *engine, Candidates *chosen, TimestampTz *from, TimestampTz to,
			   TimestampTz now)
{
	Datum values[4];
	TimestampTz first = DT_NOEND;
	TimestampTz at = *from;
	bool more;
	uint64 i;

	if (chosen->count >= chosen->limit)
		return true;
	values[0] = Int16GetDatum(engine->lane);
	values[1] = TimestampTzGetDatum(*from);
	values[2] = TimestampTzGetDatum(to);
	values[3] = Int32GetDatum(SCAN_CHUNK);
	db_run(&scan_query, values, NULL);
	for (i = 0; i < SPI_processed; i++)
	{
		bool isnull;
		pg_uuid_t *id = DatumGetUUIDP(db_value(i, 1, &isnull));
		TeamLoad *team;

		at = DatumGetTimestampTz(db_value(i, 3, &isnull));
		first = Min(first, at);
		if (is_passed_by(engine, id, at))
			continue;
		team = team_load(engine, db_text(i, 2, CurrentMemoryContext));
		if (team->parked_from != DT_NOEND || team_room(engine, team, now) <= 0)
		{
			/* order within a team is kept: once parked, it is served from its own mark */
			team->parked_from = Min(team->parked_from, at - 1);
			continue;
		}
		if (chosen->count >= chosen->limit)
		{
			*from = at - 1;
			SPI_freetuptable(SPI_tuptable);
			return true;
		}
		choose(chosen, team, id, at);
	}
	more = SPI_processed >= SCAN_CHUNK;
	if (!more)
		*from = to;
	else /* look again at the last microsecond, which may go on, unless that were all we saw */
		*from = first < at ? at - 1 : at;
	SPI_freetuptable(SPI_tuptable);
	return more;
}

/* Choose from what is due above the low-water mark, then from what a pass over all finds below it. */
static void
choose_due(Engine *engine, Candidates *chosen, TimestampTz now)
{
	TimestampTz low = engine->low;

	engine->more = choose_between(engine, chosen, &engine->low, now, now);
	if (engine->behind == DT_NOEND)
		return;
	if (choose_between(engine, chosen, &engine->behind, low, now))
		engine->more = true;
	else
		engine->behind = DT_NOEND;
}

/* When the next row is due, so that we know how long to sleep. */
static void
look_ahead(Engine *engine, TimestampTz now)
{
	Datum values[2];
	bool isnull;

	values[0] = Int16GetDatum(engine->lane);
	values[1] = TimestampTzGetDatum(now);
	db_run(&ahead_query, values, NULL);
	engine->next_due = SPI_processed > 0 ? DatumGetTimestampTz(db_value(0, 1, &isnull)) : DT_NOEND;
	SPI_freetuptable(SPI_tuptable);
}

/* Forget what was chosen in the last claim, and teams that need not be remembered. */
static void
begin_choosing(Engine *engine, TimestampTz lowest)
{
	HASH_SEQ_STATUS scan;
	TeamLoad *team;

	lowest = stop_passing_by(engine, lowest);
	if (lowest == DT_NOBEGIN)
		engine->behind = DT_NOBEGIN;
	else
		engine->low = Min(engine->low, lowest - 1);
	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		team->chosen = 0;
		if (team->parked_from != DT_NOEND && lowest <= team->parked_from)
			team->parked_from = lowest == DT_NOBEGIN ? lowest : lowest - 1;
		if (team->in_flight == 0 && team->joined == 0 && team->parked_from == DT_NOEND &&
			team->slow_until < GetCurrentTimestamp() && team->slow_count == 0)
			hash_search(engine->teams, team->team_id, HASH_REMOVE, NULL);
	}
}

/* engine_claim() without what has to be done after each claim. */
static int
claim(Engine *engine, int limit)
{
	DbScope scope;
	Candidates chosen = {0};
	TimestampTz now;
	TimestampTz lowest = DT_NOEND;
	TimestampTz ahead = DT_NOEND;
	int claimed = 0;
	int i;

	/* before our snapshot: whoever commits after it lowers the mark for the next claim */
	if (engine->slot != NULL)
	{
		lowest = shared_take_due(engine->slot, &ahead);
		engine->rank = shared_rank(engine->slot, &engine->peers);
	}
	else if (!engine->more)
		engine_look_at_everything(engine);
	/* whoever commits without saying when says that anything may be */
	engine->next_due = lowest == DT_NOBEGIN ? lowest : Min(engine->next_due, ahead);
	begin_choosing(engine, lowest);

	chosen.limit = Min(limit, avm_batch_size);
	chosen.limit = Min(chosen.limit, our_share(engine, avm_max_in_flight) - engine->in_flight);
	chosen.limit = Min(chosen.limit, JOINED - engine->joined);
	chosen.limit = Min(chosen.limit, engine->transport->room(engine->client));
	engine->full = chosen.limit <= 0;
	if (engine->full)
		return 0; /* the next record makes room, and asks again */
	if (engine->one_at_a_time > 0)
	{
		engine->one_at_a_time--;
		chosen.limit = 1;
	}

	begin_batch(engine, &scope);
	now = GetCurrentTimestamp();
	chosen.jobs = palloc(sizeof(Job) * chosen.limit);
	if (engine->due_first)
	{
		choose_due(engine, &chosen, now);
		/* behind rows of parked teams there may be some of others: the room is kept for these */
		engine->due_first = engine->more && chosen.count == 0;
		if (!engine->due_first)
			choose_parked(engine, &chosen, now);
	}
	else
	{
		choose_parked(engine, &chosen, now);
		choose_due(engine, &chosen, now);
		engine->due_first = true;
	}
	if (chosen.count > 0)
	{
		qsort(chosen.jobs, chosen.count, sizeof(Job), compare_jobs);
		/* of an error that take_turns() lets through, too: statement_timeout ends the whole batch */
		engine->suspect = chosen.jobs[0];
		engine->have_suspect = chosen.count == 1;
		take_turns(engine, chosen.jobs, chosen.count, now);
	}
	for (i = 0; i < chosen.count; i++)
	{
		Job *job = &chosen.jobs[i];

		if (job->done)
			claimed++;
		else
			pass_by(engine, &job->session_id, job->due,
					job->raised ? now + RAISED_PAUSE_S * USECS_PER_SEC : DT_NOEND);
	}
	if (engine->slot != NULL)
		engine->slot->claimed += claimed;
	if (engine->next_due <= now)
		look_ahead(engine, now);
	commit_batch(engine, &scope);
	run_logins(engine);
	return claimed;
}

int
engine_claim(Engine *engine, int limit)
{
	int claimed = claim(engine, limit);

	/* as long as there is more to claim, which may be more for them, calls for several stay */
	if (!dlist_is_empty(&engine->gathering))
		send_gathered(engine, engine_next_look(engine) != DT_NOBEGIN);
	return claimed;
}

/* ---- record ---- */

/* A record has raised: try again somewhat later, as long as the lease lasts. */
static void
note_failure(Engine *engine, Act *act)
{
	TimestampTz now = GetCurrentTimestamp();

	act->not_before = now + (RAISED_RETRY_US << Min(act->failures, 6));
	act->failures++;
	if (act->not_before <= act->leased_until)
		return;
	dlist_delete(&act->node);
	release_act(engine, act);
}

static void
record(Engine *engine, Job *jobs, int count)
{
	DbScope scope;
	int i;

	begin_batch(engine, &scope);
	qsort(jobs, count, sizeof(Job), compare_jobs);
	engine->suspect = jobs[0];
	engine->have_suspect = count == 1;
	take_turns(engine, jobs, count, DT_NOEND);
	engine->have_suspect = count == 1 && jobs[0].done;

	/* What is left has raised, or was locked by somebody, or has a newer lease, or is gone. */
	for (i = 0; i < count; i++)
	{
		Act *act = jobs[i].act;

		if (jobs[i].done)
			continue;
		if (jobs[i].raised)
			note_failure(engine, act);
		else if (session_row_lease(&act->session_id) == act->lease)
			act->not_before = GetCurrentTimestamp() + LOCKED_RETRY_US;
		else
		{
			if (engine->slot != NULL)
				engine->slot->stale_replies++;
			dlist_delete(&act->node);
			release_act(engine, act);
		}
	}
	commit_batch(engine, &scope);
}

void
engine_run(Engine *engine)
{
	HttpReply *reply;
	void *arg;

	if (!dlist_is_empty(&engine->gathering))
		send_gathered(engine, false);
	engine->transport->run(engine->client);
	for (;;)
	{
		MemoryContext old = MemoryContextSwitchTo(engine->batch);
		Act *act;

		reply = engine->transport->finished(engine->client, &arg);
		MemoryContextSwitchTo(old);
		if (reply == NULL)
			break;
		act = arg;
		keep_reply(act, reply);
		if (act->fetches.id != 0)
		{
			/* it holds keys */
			old = MemoryContextSwitchTo(act->context);
			secret_wipe_later((char *) act->reply->body, reply->body_len);
			secret_wipe((char *) reply->body, reply->body_len);
			MemoryContextSwitchTo(old);
		}
		dlist_delete(&act->node);
		push_answered(engine, act);
	}

	for (;;)
	{
		Job batch[RECORD_BATCH];
		int limit = engine->one_at_a_time > 0 ? 1 : RECORD_BATCH;
		int count = 0;
		TimestampTz now;
		dlist_iter iter;

		run_logins(engine);
		run_lists(engine);
		now = GetCurrentTimestamp();
		dlist_foreach(iter, &engine->answered)
		{
			Act *act = dlist_container(Act, node, iter.cur);

			if (act->not_before <= now && count < limit)
			{
				memset(&batch[count], 0, sizeof(Job));
				batch[count].session_id = act->session_id;
				batch[count].lease = act->lease;
				batch[count++].act = act;
			}
		}
		if (count == 0)
			break;
		if (engine->one_at_a_time > 0)
			engine->one_at_a_time--;
		record(engine, batch, count);
	}
}

TimestampTz
engine_next_look(Engine *engine)
{
	TimestampTz next = engine->next_due;
	HASH_SEQ_STATUS scan;
	TeamLoad *team;
	PassedBy *entry;
	dlist_iter iter;

	/* without room nothing can be done before a call is answered, which wakes us */
	if (engine->full)
		next = DT_NOEND;
	else if (engine->more)
		return DT_NOBEGIN;
	dlist_foreach(iter, &engine->answered) next =
		Min(next, dlist_container(Act, node, iter.cur)->not_before);
	if (engine->lists < LISTS_AT_ONCE)
		next = Min(next, engine->next_list);
	if (engine->full)
		return next;
	hash_seq_init(&scan, engine->passed_by);
	while ((entry = hash_seq_search(&scan)) != NULL)
		next = Min(next, entry->until);
	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		if (team->parked_from == DT_NOEND)
			continue;
		team->chosen = 0;
		if (team_room(engine, team, GetCurrentTimestamp()) > 0)
			next = DT_NOBEGIN;
		else if (team->slow_until > GetCurrentTimestamp())
			next = Min(next, team->slow_until);
	}
	return next;
}

void
engine_look_at_everything(Engine *engine)
{
	HASH_SEQ_STATUS scan;
	TeamLoad *team;

	engine->behind = DT_NOBEGIN;
	engine->next_due = DT_NOBEGIN;
	rates_tidy(engine->rates, GetCurrentTimestamp());
	if (engine->slot != NULL)
		engine->next_list = DT_NOBEGIN;
	(void) stop_passing_by(engine, DT_NOBEGIN);
	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		/* still parked: only rows of others are to be found by going through all */
		if (team->parked_from != DT_NOEND)
			team->parked_from = DT_NOBEGIN;
	}
}

int
engine_reclaim(Engine *engine)
{
	DbScope scope;
	Datum values[3];
	int freed;

	begin_batch(engine, &scope);
	values[0] = Int16GetDatum(engine->lane);
	values[1] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[2] = Int32GetDatum(avm_lease_ms);
	db_run(&reclaim_query, values, NULL);
	freed = SPI_processed;
	commit_batch(engine, &scope);
	return freed;
}

void
engine_after_error(Engine *engine)
{
	dlist_iter iter;
	bool suspect = engine->have_suspect;
	Job *job = &engine->suspect;

	/* nothing of the transaction has taken effect, and a login may have lost its call */
	if (engine->list_at_hand != NULL)
		release_list(engine, engine->list_at_hand);
	engine->list_at_hand = NULL;
	forget_turns(engine, 0, 0, 0);
	login_abandon(engine);
	MemoryContextSwitchTo(engine->context);
	MemoryContextReset(engine->batch);

	engine->have_suspect = false;
	dlist_foreach(iter, &engine->answered) dlist_container(Act, node, iter.cur)->not_before =
		GetCurrentTimestamp() + LOCKED_RETRY_US;
	if (suspect && job->act != NULL)
		note_failure(engine, job->act);
	else if (suspect)
		pass_by(engine, &job->session_id, job->due,
				GetCurrentTimestamp() + RAISED_PAUSE_S * USECS_PER_SEC);
	engine->low = DT_NOBEGIN;
	engine->next_due = DT_NOBEGIN;
	engine->one_at_a_time = 64;
}
