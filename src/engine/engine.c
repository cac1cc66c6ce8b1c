/*-------------------------------------------------------------------------
 *
 * engine.c
 *		Claim, act, record: the one engine that dispatchers, runners and CALL dispatch() run.
 *
 * Claim: a short transaction picks due sessions, locks those that nobody else
 * holds (due.c says which), gives each its turn (turn.c) and writes a fresh lease number for those
 * that need the network, together with the handle that makes the call
 * repeatable.  Act: after the commit the requests are sent (acts.c); no transaction,
 * lock or snapshot is held while they are under way.  Record: another short
 * transaction locks the rows of answered calls again, drops the replies whose
 * lease number is no longer the row's, and gives the others their next turn.
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
#include "engine/engine_private.h"
#include "engine/retry.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

#define RECORD_BATCH 128		/* replies recorded in one transaction */
#define LISTS_AT_ONCE 8			/* lists of VMs under way, beside those that are held, */
#define LISTS_KEPT 32			/* and with them */
#define LOCKED_RETRY_US 100000	/* how soon a record is tried again whose row a user has locked */
#define RAISED_RETRY_US 1000000 /* the same after an error, twice as long each time */
#define RAISED_PAUSE_S 60		/* how long a session is passed by whose claim has raised */
#define GATHER_FROM 64 /* calls in flight, from which on answers come one after the other */
#define JOINED 20000   /* sessions that wait for calls for several at most */

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
	dlist_init(&engine->lists_held);
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

bool
engine_only_waits(Engine *engine)
{
	return engine->in_flight >= GATHER_FROM &&
		   (engine->transport->sending == NULL || !engine->transport->sending(engine->client));
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
		act_release(engine, act);
	}
	engine->settled = NIL;
	foreach (lc, engine->outgoing)
		act_send_out(engine, lfirst(lc));
	engine->outgoing = NIL;
	MemoryContextSwitchTo(engine->context);
	MemoryContextReset(engine->batch);
	if (engine->slot != NULL)
		engine->slot->in_flight = engine->in_flight;
}

/* A lease number that nobody has had: counted on from a random one, since those are dear. */
static int64
fresh_lease(void)
{
	static uint64 last = 0;

	if (last == 0 && !pg_strong_random(&last, sizeof(last)))
		elog(ERROR, "could not generate a lease number");
	do
		last = (last + 1) & PG_INT64_MAX;
	while (last == 0);
	return (int64) last;
}

/*
 * How an act was answered.  What its account grants of the operation is known, or else
 * throttling answers slow the team: its next claims wait, twice as long each time,
 * until an answer is of another kind.
 */
static void
note_throttling(Engine *engine, const Act *act, const TurnResult *result)
{
	TeamLoad *team = team_of(engine, act->team_id);
	TimestampTz now = GetCurrentTimestamp();

	if (act->bucket != NULL)
	{
		if (act->reply != NULL && !act->call.counted)
			rates_learn(engine->rates, act->bucket, act->account, result->reply_class,
						now - act->reply->millis * INT64CONST(1000), now);
		if (result->account != NULL)
			rates_same_account(engine->rates, act->account, result->account, now);
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
			act = act_for(engine, row);
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
	SessionBatch *batch;
	int i;

	db_inserts_keep();
	batch = session_batch_begin();

	/* several jobs may be of the same session: a lease that is not the row's is an old one */
	for (i = 0; i < count; i++)
	{
		Job *job = &jobs[i];
		SessionRow *row = session_row_lock(batch, &job->session_id, due_by);

		if (row == NULL || (job->act != NULL && row->lease != job->lease))
			continue;
		take_turn(engine, row, job->act);
		job->done = true;
	}
	session_batch_end(batch);
	db_inserts_end();
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
			act_release(engine, out->act);
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
		act_send(engine, act, request);
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
		act_answered(engine, act);
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
	inventory_turn(inventory, act->reply, engine->rates, engine->peers, &turn);
	commit_batch(engine, &scope);
	engine->list_at_hand = NULL;

	act->context = inventory->step;
	act->reply = NULL;
	act->waits_for = turn.wait_for;
	if (turn.request != NULL)
		act_send(engine, act, turn.request);
	else if (turn.wait_for.id != 0)
		dlist_push_tail(&engine->lists_waiting, &act->node);
	else if (turn.later != 0)
	{
		act->not_before = turn.later;
		dlist_push_tail(&engine->lists_held, &act->node);
		engine->held++;
	}
	else
	{
		release_list(engine, act);
		/* there is room for another one */
		engine->next_list = Min(engine->next_list, GetCurrentTimestamp());
	}
}

/* How many more lists there may be. */
static int
room_for_lists(const Engine *engine)
{
	return Min(LISTS_AT_ONCE - (engine->lists - engine->held), LISTS_KEPT - engine->lists);
}

/* Begin lists that are due, and move those on whose call has been answered, or may be made by now. */
static void
run_lists(Engine *engine)
{
	TimestampTz now = GetCurrentTimestamp();
	dlist_mutable_iter iter;

	if (engine->next_list <= now && room_for_lists(engine) > 0)
	{
		DbScope scope;
		List *claimed;
		List *acts = NIL;
		ListCell *lc;

		begin_batch(engine, &scope);
		claimed = inventory_claim(engine->context, engine->lane, room_for_lists(engine));
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
			act_answered(engine, lfirst(lc));
		}
		list_free(acts);
	}
	dlist_foreach_modify(iter, &engine->lists_held)
	{
		Act *act = dlist_container(Act, node, iter.cur);

		if (act->not_before > now)
			continue;
		dlist_delete(&act->node);
		engine->held--;
		act_answered(engine, act);
	}
	while (!dlist_is_empty(&engine->lists_answered))
	{
		Act *act = dlist_head_element(Act, node, &engine->lists_answered);

		dlist_delete(&act->node);
		step_list(engine, act);
	}
}

/* What has been sent leaves. */
static void
push(Engine *engine)
{
	if (engine->transport->push != NULL)
		engine->transport->push(engine->client);
}

/* ---- claim ---- */

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
	due_begin(engine, lowest);

	chosen.limit = Min(limit, avm_batch_size);
	chosen.limit = Min(chosen.limit, due_share(engine, avm_max_in_flight) - engine->in_flight);
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
	due_choose(engine, &chosen, now);
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
			due_pass_by(engine, &job->session_id, job->due,
						job->raised ? now + RAISED_PAUSE_S * USECS_PER_SEC : DT_NOEND);
	}
	if (engine->slot != NULL)
		engine->slot->claimed += claimed;
	if (engine->next_due <= now)
		due_look_ahead(engine, now);
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
		acts_send_gathered(engine, engine_next_look(engine) != DT_NOBEGIN);
	push(engine);
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
	act_release(engine, act);
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
			act_release(engine, act);
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
		acts_send_gathered(engine, false);
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
		act_keep_reply(act, reply);
		if (act->fetches.id != 0)
		{
			/* it holds keys */
			old = MemoryContextSwitchTo(act->context);
			secret_wipe_later((char *) act->reply->body, reply->body_len);
			secret_wipe((char *) reply->body, reply->body_len);
			MemoryContextSwitchTo(old);
		}
		dlist_delete(&act->node);
		act_answered(engine, act);
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
	push(engine);
}

TimestampTz
engine_next_look(Engine *engine)
{
	TimestampTz next = engine->next_due;
	dlist_iter iter;

	/* without room nothing can be done before a call is answered, which wakes us */
	if (engine->full)
		next = DT_NOEND;
	else if (engine->more)
		return DT_NOBEGIN;
	dlist_foreach(iter, &engine->answered) next =
		Min(next, dlist_container(Act, node, iter.cur)->not_before);
	dlist_foreach(iter, &engine->lists_held) next =
		Min(next, dlist_container(Act, node, iter.cur)->not_before);
	if (room_for_lists(engine) > 0)
		next = Min(next, engine->next_list);
	if (engine->full)
		return next;
	return Min(next, due_next(engine));
}

void
engine_look_at_everything(Engine *engine)
{
	due_everything(engine);
	rates_tidy(engine->rates, GetCurrentTimestamp());
	if (engine->slot != NULL)
		engine->next_list = DT_NOBEGIN;
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
		due_pass_by(engine, &job->session_id, job->due,
					GetCurrentTimestamp() + RAISED_PAUSE_S * USECS_PER_SEC);
	engine->low = DT_NOBEGIN;
	engine->next_due = DT_NOBEGIN;
	engine->one_at_a_time = 64;
}
