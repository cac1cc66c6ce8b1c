/*-------------------------------------------------------------------------
 *
 * question.c
 *		A call of a provider whose library blocks, made for somebody else.
 *
 * A question lies in shared memory.  Its state says whose it is; the state is
 * changed under the lock, the contents are written and read outside of it.  An
 * asker that gives up, for whatever reason, takes its question back, or leaves
 * it to the runner that has taken it; a runner that ends answers what it has
 * taken (shared.c).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "engine/question.h"
#include "engine/threads.h"
#include "miscadmin.h"
#include "providers/provider.h"
#include "storage/ipc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#define POLL_MS 50		  /* between looks for a free place */
#define ALLOWANCE_MS 2000 /* beyond the call's own timeout, until the runner must have said so */

/* ---- the asker ---- */

static void
raise_no_runner(const char *provider)
{
	ereport(ERROR, (errcode(AVM_UNREACHABLE),
					errmsg("no agentvm runner serves this database, and provider \"%s\" can be "
						   "asked through one only",
						   provider),
					shared_available()
						? errhint("Name the database in agentvm.databases and the provider's "
								  "library in agentvm.provider_libraries, and see row \"runner\" "
								  "of agentvm.health.")
						: errhint("Add agentvm to shared_preload_libraries and restart.")));
}

/* Take a free question, or NULL. */
static Question *
begin_question(void)
{
	Question *question = NULL;
	int i;

	shared_lock(LW_EXCLUSIVE);
	for (i = 0; i < MAX_QUESTIONS && question == NULL; i++)
	{
		if (shared_questions()[i].state == QUESTION_FREE)
			question = &shared_questions()[i];
	}
	if (question != NULL)
	{
		question->state = QUESTION_BEGUN;
		question->given_up = false;
		question->database = MyDatabaseId;
		question->runner_pid = 0;
		question->asker = MyLatch;
	}
	shared_unlock();
	return question;
}

static void
set_state(Question *question, QuestionState state)
{
	shared_lock(LW_EXCLUSIVE);
	question->state = state;
	shared_unlock();
}

/* Let go of a question, answered or not; also at an error, and when this backend exits. */
static void
let_go(int code, Datum arg)
{
	Question *question = (Question *) DatumGetPointer(arg);

	shared_lock(LW_EXCLUSIVE);
	if (question->state == QUESTION_TAKEN)
		question->given_up = true;
	else
		question->state = QUESTION_FREE;
	shared_unlock();
}

static void
nap(long ms)
{
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, ms,
					 AvmWaitEvent("AgentvmAsk"));
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}

/* Append to the question's text; raises AV012 when it is full. */
static void
put(Question *question, const char *bytes, size_t len)
{
	if (question->len + len > QUESTION_SIZE)
		ereport(ERROR,
				(errcode(AVM_OVER_LIMIT),
				 errmsg("the question to the provider is larger than %d bytes", QUESTION_SIZE)));
	if (len > 0)
		memcpy(question->text + question->len, bytes, len);
	question->len += len;
}

static void
put_string(Question *question, const char *string)
{
	put(question, string ? string : "", string ? strlen(string) + 1 : 1);
}

static HttpReply *
read_answer(const Question *question)
{
	HttpReply *reply = palloc0(sizeof(HttpReply));
	size_t error_len = strlen(question->text) + 1;

	reply->status = question->status;
	reply->maybe_sent = question->maybe_sent;
	reply->millis = question->millis;
	reply->retry_after_s = -1;
	reply->sends = 1;
	reply->error = question->has_error ? pstrdup(question->text) : NULL;
	reply->body_len = question->len - error_len;
	reply->body = pnstrdup(question->text + error_len, reply->body_len);
	return reply;
}

/* Whether it has been answered; wakes the runner as long as none has taken it. */
static bool
is_answered(Question *question)
{
	QuestionState state;

	shared_lock(LW_SHARED);
	state = question->state;
	shared_unlock();
	if (state == QUESTION_ASKED && !shared_wake_runner())
		raise_no_runner(question->provider);
	return state == QUESTION_ANSWERED;
}

HttpReply *
question_ask(const char *provider, const HttpRequest *request)
{
	TimestampTz give_up_at =
		TimestampTzPlusMilliseconds(GetCurrentTimestamp(), request->timeout_ms + ALLOWANCE_MS);
	HttpReply *volatile reply = NULL;
	Question *volatile question; /* survives the jump */

	if (shared_serving(LANE_BLOCKING) == 0)
		raise_no_runner(provider);
	while ((question = begin_question()) == NULL)
	{
		if (GetCurrentTimestamp() >= give_up_at)
			ereport(ERROR, (errcode(AVM_UNREACHABLE),
							errmsg("too many questions to providers are under way"),
							errhint("Try again in a while.")));
		nap(POLL_MS);
	}

	PG_ENSURE_ERROR_CLEANUP(let_go, PointerGetDatum(question));
	{
		strlcpy(question->provider, provider, NAMEDATALEN);
		question->timeout_ms = request->timeout_ms;
		question->len = 0;
		put_string(question, request->method);
		put_string(question, request->url);
		put(question, request->body, request->body_len);
		set_state(question, QUESTION_ASKED);
		while (!is_answered(question) && GetCurrentTimestamp() < give_up_at)
			nap(1000);
		if (is_answered(question))
			reply = read_answer(question);
	}
	PG_END_ENSURE_ERROR_CLEANUP(let_go, PointerGetDatum(question));
	let_go(0, PointerGetDatum(question));
	if (reply == NULL)
		ereport(ERROR, (errcode(AVM_UNREACHABLE),
						errmsg("the agentvm runner of this database did not answer"),
						errhint("See agentvm.stat_dispatcher, and the server's log.")));
	return reply;
}

/* ---- the runner ---- */

static void
answer(Question *question, const HttpReply *reply)
{
	size_t error_len = reply->error ? strlen(reply->error) : 0;
	bool too_large = error_len + 1 + reply->body_len > QUESTION_SIZE;

	question->status = too_large ? 0 : reply->status;
	question->maybe_sent = reply->maybe_sent;
	question->has_error = too_large || reply->error != NULL;
	question->millis = reply->millis;
	question->len = 0;
	if (too_large)
		put_string(question, "the answer is too large");
	else
	{
		put_string(question, reply->error);
		put(question, reply->body, reply->body_len);
	}
	shared_lock(LW_EXCLUSIVE);
	question->state = question->given_up ? QUESTION_FREE : QUESTION_ANSWERED;
	if (question->state == QUESTION_ANSWERED)
		SetLatch(question->asker);
	shared_unlock();
}

/* Begin the call that a question asks for; what it says comes from this database's own backends. */
static void
begin_call(void *client, Question *question)
{
	MemoryContext context = CurrentMemoryContext;
	HttpRequest request = {0};

	request.method = question->text;
	request.url = request.method + strlen(request.method) + 1;
	request.body = request.url + strlen(request.url) + 1;
	request.body_len = question->len - (request.body - question->text);
	request.timeout_ms = question->timeout_ms;
	PG_TRY();
	{
		thread_transport.start(client, question->provider, &request, question);
	}
	PG_CATCH();
	{
		HttpReply reply = {.retry_after_s = -1, .body = ""};
		ErrorData *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		reply.error = error->message;
		answer(question, &reply);
	}
	PG_END_TRY();
}

/* A question of this database that nobody has taken yet, taken; or NULL. */
static Question *
take_question(void)
{
	Question *question = NULL;
	int i;

	shared_lock(LW_EXCLUSIVE);
	for (i = 0; i < MAX_QUESTIONS && question == NULL; i++)
	{
		Question *candidate = &shared_questions()[i];

		if (candidate->state == QUESTION_ASKED && candidate->database == MyDatabaseId)
			question = candidate;
	}
	if (question != NULL)
	{
		question->state = QUESTION_TAKEN;
		question->runner_pid = MyProcPid;
	}
	shared_unlock();
	return question;
}

void
questions_run(void)
{
	static void *client = NULL;
	static MemoryContext memory = NULL;
	MemoryContext old;
	Question *question;
	HttpReply *reply;
	void *arg;

	if (memory == NULL)
		memory =
			AllocSetContextCreate(TopMemoryContext, "agentvm questions", ALLOCSET_DEFAULT_SIZES);
	if (client == NULL)
		client = thread_transport.create();
	old = MemoryContextSwitchTo(memory);
	while ((question = take_question()) != NULL)
		begin_call(client, question);
	thread_transport.run(client);
	while ((reply = thread_transport.finished(client, &arg)) != NULL)
		answer(arg, reply);
	MemoryContextSwitchTo(old);
	MemoryContextReset(memory);
}
