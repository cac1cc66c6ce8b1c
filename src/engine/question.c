/*-------------------------------------------------------------------------
 *
 * question.c
 *		A call of a provider whose library blocks, made for somebody else.
 *
 * A question lies in shared memory, in a place that belongs to its asker until he
 * lets go of it: when he has the answer, or gives up for whatever reason.  The
 * runner copies it, makes the call, and writes the answer if the question is still
 * there; a runner that ends answers what it has taken (shared.c).  So a place is
 * held by a living asker only, however long the call hangs.
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

#define POLL_MS 50 /* between looks for a free place */
#define MAX_CALLS                                                                                  \
	16 /* for questions at once in a runner, also of those that nobody waits for any more */
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

/* Take a free question, or NULL: there is none, or this database has its share. */
static Question *
begin_question(void)
{
	Question *question = NULL;
	int ours = 0;
	int i;

	shared_lock(LW_EXCLUSIVE);
	for (i = 0; i < MAX_QUESTIONS; i++)
	{
		Question *other = &shared_questions()[i];

		if (other->state == QUESTION_FREE)
			question = other;
		else if (other->database == MyDatabaseId)
			ours++;
	}
	if (ours >= MAX_QUESTIONS / 2)
		question = NULL;
	if (question != NULL)
	{
		question->state = QUESTION_BEGUN;
		question->ticket++;
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

	set_state(question, QUESTION_FREE);
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

/* A call that is made for a question; the question may be another one by now. */
typedef struct QuestionCall
{
	Question *question;
	uint64 ticket;
} QuestionCall;

static void *client = NULL;
static int calls = 0; /* of the client */

static void
answer(const QuestionCall *call, const HttpReply *reply)
{
	Question *question = call->question;
	const char *error = reply->error;
	size_t error_len = error ? strlen(error) : 0;
	bool fits = error_len + 1 + reply->body_len <= QUESTION_SIZE;

	if (!fits)
	{
		error = "the answer is too large";
		error_len = strlen(error);
	}
	shared_lock(LW_EXCLUSIVE);
	if (question->state == QUESTION_TAKEN && question->ticket == call->ticket)
	{
		question->status = fits ? reply->status : 0;
		question->maybe_sent = reply->maybe_sent;
		question->has_error = error != NULL;
		question->millis = reply->millis;
		memcpy(question->text, error ? error : "", error_len + 1);
		question->len = error_len + 1;
		if (fits)
		{
			memcpy(question->text + question->len, reply->body, reply->body_len);
			question->len += reply->body_len;
		}
		question->state = QUESTION_ANSWERED;
		SetLatch(question->asker);
	}
	shared_unlock();
}

/*
 * Take a question of this database that nobody has taken yet: its request, all
 * in "text", which has QUESTION_SIZE bytes.  Returns false when there is none.
 */
static bool
take_question(QuestionCall *call, char *provider, HttpRequest *request, char *text)
{
	size_t len = 0;
	int i;

	call->question = NULL;
	shared_lock(LW_EXCLUSIVE);
	for (i = 0; i < MAX_QUESTIONS && call->question == NULL; i++)
	{
		Question *question = &shared_questions()[i];

		if (question->state != QUESTION_ASKED || question->database != MyDatabaseId)
			continue;
		question->state = QUESTION_TAKEN;
		question->runner_pid = MyProcPid;
		call->question = question;
		call->ticket = question->ticket;
		memcpy(provider, question->provider, NAMEDATALEN);
		request->timeout_ms = question->timeout_ms;
		len = question->len;
		memcpy(text, question->text, len);
	}
	shared_unlock();
	if (call->question == NULL)
		return false;
	request->method = text;
	request->url = request->method + strlen(request->method) + 1;
	request->body = request->url + strlen(request->url) + 1;
	request->body_len = len - (request->body - text);
	return true;
}

/* Begin the call that a question asks for; what cannot be begun is answered by that. */
static void
begin_call(const QuestionCall *call, const char *provider, const HttpRequest *request)
{
	MemoryContext context = CurrentMemoryContext;
	QuestionCall *kept = MemoryContextAlloc(TopMemoryContext, sizeof(QuestionCall));

	*kept = *call;
	PG_TRY();
	{
		thread_transport.start(client, provider, request, kept);
		calls++;
	}
	PG_CATCH();
	{
		HttpReply reply = {.retry_after_s = -1, .body = ""};
		ErrorData *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		reply.error = error->message;
		answer(call, &reply);
		pfree(kept);
	}
	PG_END_TRY();
}

void
questions_run(void)
{
	static MemoryContext memory = NULL;
	static char *text = NULL;
	char provider[NAMEDATALEN];
	HttpRequest request = {0};
	QuestionCall call;
	MemoryContext old;
	HttpReply *reply;
	void *arg;

	if (memory == NULL)
		memory =
			AllocSetContextCreate(TopMemoryContext, "agentvm questions", ALLOCSET_DEFAULT_SIZES);
	if (text == NULL)
		text = MemoryContextAlloc(TopMemoryContext, QUESTION_SIZE);
	if (client == NULL)
		client = thread_transport.create();
	old = MemoryContextSwitchTo(memory);
	/* without run(): what it takes off the pool's fd may be about the engine's calls, too */
	while ((reply = thread_transport.finished(client, &arg)) != NULL)
	{
		answer(arg, reply);
		pfree(arg);
		calls--;
	}
	while (calls < MAX_CALLS && take_question(&call, provider, &request, text))
		begin_call(&call, provider, &request);
	MemoryContextSwitchTo(old);
	MemoryContextReset(memory);
}
