/*-------------------------------------------------------------------------
 *
 * acts.c
 *		Calls under way: for a session each, or for several at once.
 *
 * Calls that a provider can make for several sessions at once (Provider.join) gather
 * as long as claims bring more of them, and leave as one call: it counts as one against the
 * caps, and its answer is taken apart into one for each session, whose lease and record are
 * as ever.  That is a matter of milliseconds, or when thousands are due a second: where those
 * of hundreds of accounts are due in turn, a call for each would take longer.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "engine/engine_private.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#define DEFAULT_TIMEOUT_MS 30000 /* of a call; never above two thirds of the lease */
#define GATHER_US 1000000		 /* a call for several sessions leaves after that at the latest */

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

void
act_keep_reply(Act *act, const HttpReply *reply)
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
			rates_learn(engine->rates, act->bucket, act->account, class,
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
			act_keep_reply(one, replies[i]);
		else /* those that are left together; where nobody has an answer, in halves */
			one->call.joint = unanswered < joint->count ? unanswered : (joint->count + 1) / 2;
		dlist_push_tail(&engine->answered, &one->node);
	}
	MemoryContextSwitchTo(old);
	act_release(engine, act);
}

void
act_answered(Engine *engine, Act *act)
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

void
act_send(Engine *engine, Act *act, HttpRequest *request)
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
		act_answered(engine, act);
}

/* What is counted of an act that comes ("by" 1) or goes (-1). */
static void
count_act(Engine *engine, Act *act, int by)
{
	TeamLoad *team = team_of(engine, act->team_id);

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
	act_send(engine, act, act->joint->request);
	MemoryContextSwitchTo(old);
}

void
acts_send_gathered(Engine *engine, bool all)
{
	TimestampTz now = GetCurrentTimestamp();
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &engine->gathering)
	{
		Act *act = dlist_container(Act, node, iter.cur);

		if (!all && act->joint->since > now - GATHER_US)
			continue;
		act->joint->since = DT_NOBEGIN; /* it leaves as soon as there is room */
		if (engine->in_flight < due_share(engine, avm_max_in_flight) &&
			team_of(engine, act->team_id)->in_flight <
				due_share(engine, avm_max_in_flight_per_team))
			send_joint(engine, act);
	}
}

/* An act of a team that counts as a call. */
static Act *
act_make(Engine *engine, const char *team_id, const char *provider)
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

		carrier = act_make(engine, act->team_id, act->provider);
		old = MemoryContextSwitchTo(carrier->context);
		carrier->call.operation = pstrdup(act->call.operation);
		carrier->bucket = act->bucket != NULL ? pstrdup(act->bucket) : NULL;
		carrier->account = act->account != NULL ? pstrdup(act->account) : NULL;
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

void
act_send_out(Engine *engine, Outgoing *out)
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
	act->bucket = act->account = NULL;
	if (out->rate != NULL && avm_api_rate > 0)
	{
		act->bucket = MemoryContextStrdup(act->context, out->rate->bucket);
		act->account = MemoryContextStrdup(act->context, out->rate->account);
	}
	if (act->joined)
		set_joined(engine, act, false);
	out->act = NULL; /* from here on it is in one of our lists */

	if (out->request == NULL)
		dlist_push_tail(&engine->waiting, &act->node);
	else if (out->rate != NULL && out->rate->batch != NULL)
		join(engine, act, out->request, out->rate);
	else
		act_send(engine, act, out->request);
}

void
act_release(Engine *engine, Act *act)
{
	count_act(engine, act, -1);
	MemoryContextDelete(act->context);
}

Act *
act_for(Engine *engine, const SessionRow *row)
{
	Act *act = act_make(engine, row->team_id, row->provider);

	act->session_id = row->session_id;
	return act;
}
