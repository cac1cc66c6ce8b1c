/*-------------------------------------------------------------------------
 *
 * turn.c
 *		One session's turn: from what the row says to what happens next.
 *
 * Level-triggered: nothing here knows why a row is due.  It looks at the state,
 * the deadlines and the provider's progress, and goes on until it needs the
 * network or has to wait.  The row is locked and has just been read, so a
 * terminate() or a bootstrap that came while a call was under way is seen here.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/placement.h"
#include "engine/retry.h"
#include "engine/shared.h"
#include "engine/turn.h"
#include "rows.h"
#include "secret/credentials.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

#define MAX_DETAIL 500	   /* bytes of an error kept on the row and in events */
#define MIN_LAUNCH_TRIES 3 /* before a launch is given up */
#define MAX_ROUNDS 16	   /* steps of one turn without network or waiting */

typedef struct ConfigEntry
{
	char *team_id;
	char *provider;
	Credentials *credentials;
	char *error;
} ConfigEntry;

static DbQuery forget_token_query = {
	"DELETE FROM agentvm.session_token WHERE session_id = $1 AND kind = 'bootstrap'", 1, {UUIDOID}};

static DbTable tokens = {{"session_token"}, {"session_token_session"}, 1, 1, {"session_id"}};

static DbInsert token_insert = {{"session_token"}, 3, {"token_sha256", "session_id", "kind"}};

ErrorData *
abort_subtransaction(MemoryContext context, ResourceOwner owner)
{
	ErrorData *error;

	MemoryContextSwitchTo(context);
	error = CopyErrorData();
	FlushErrorState();
	RollbackAndReleaseCurrentSubTransaction();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	if (error->sqlerrcode == ERRCODE_QUERY_CANCELED || error->sqlerrcode == ERRCODE_ADMIN_SHUTDOWN)
		ReThrowError(error);
	return error;
}

const Credentials *
config_credentials(ConfigCache *configs, const char *team_id, const char *provider,
				   const char **error)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	MemoryContext old;
	ConfigEntry *volatile entry;
	ListCell *lc;

	foreach (lc, configs->entries)
	{
		entry = lfirst(lc);
		if (strcmp(entry->team_id, team_id) == 0 && strcmp(entry->provider, provider) == 0)
		{
			*error = entry->error;
			return entry->credentials;
		}
	}

	old = MemoryContextSwitchTo(configs->context);
	entry = palloc0(sizeof(ConfigEntry));
	entry->team_id = pstrdup(team_id);
	entry->provider = pstrdup(provider);
	configs->entries = lappend(configs->entries, entry);
	MemoryContextSwitchTo(old);

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		entry->credentials = credentials_load(team_id, provider, configs->context);
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		ErrorData *caught = abort_subtransaction(context, owner);

		entry->credentials = NULL;
		entry->error = MemoryContextStrdup(
			configs->context,
			caught->detail ? psprintf("%s: %s", caught->message, caught->detail) : caught->message);
	}
	PG_END_TRY();
	*error = entry->error;
	return entry->credentials;
}

void
provider_step(const Provider *provider, const ProviderContext *context, ProviderStep *step)
{
	MemoryContext memory = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	memset(step, 0, sizeof(*step));
	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(memory);
	PG_TRY();
	{
		provider->step(context, step);
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(memory);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		ErrorData *caught = abort_subtransaction(memory, owner);

		memset(step, 0, sizeof(*step));
		step->kind = STEP_FAILED;
		step->error_class = CLASS_PERMANENT;
		step->error_code = "StepFailed";
		step->error_message = caught->message;
	}
	PG_END_TRY();
}

/* "code: message" of a failed step: bounded, printable, without any secret. */
static char *
step_error(const ProviderStep *step, const SecretSet *secrets)
{
	char *text =
		psprintf("%s%s%s", step->error_code ? step->error_code : "error",
				 step->error_message ? ": " : "", step->error_message ? step->error_message : "");
	int len;
	char *c;

	/* providers answer in UTF-8, if at all: what is no text for this database becomes '?' */
	text = secret_redact(secrets, text);
	for (c = text; *c != '\0'; c++)
	{
		if ((unsigned char) *c < ' ' || (unsigned char) *c >= 0x7f)
			*c = '?';
	}
	len = strlen(text);
	if (len > MAX_DETAIL)
		memcpy(text + MAX_DETAIL - 3, "...", 4);
	return text;
}

/* Log a provider call that changes something or has failed. */
static void
log_call(const SessionRow *row, const char *operation, const HttpReply *reply,
		 const ProviderStep *step, const char *error)
{
	Jsonb *detail = handle_set_text(NULL, "operation", operation);

	if (reply != NULL)
	{
		if (reply->status != 0)
			detail = handle_set_int(detail, row->lane == LANE_HTTP ? "http_status" : "status",
									reply->status);
		if (reply->request_id != NULL)
			detail = handle_set_text(detail, "request_id", reply->request_id);
		detail = handle_set_int(detail, "ms", reply->millis);
	}
	if (step->tried != NULL)
		detail = handle_set_document(detail, "tried", step->tried);
	if (step->error_class != CLASS_NONE)
	{
		detail = handle_set_text(detail, "error_class", error_class_name(step->error_class));
		detail = handle_set_text(detail, "error", error);
	}
	session_event_add(row, "provider_call", NULL, detail);
}

/* Whether a session has tokens; of a new one that is told sooner than they are deleted. */
static bool
has_tokens(const pg_uuid_t *session_id)
{
	DbRows *rows = db_rows_open(&tokens, false);
	ItemPointerData place;
	bool found = db_rows_find(rows, session_id, &place);

	db_rows_close(rows);
	return found;
}

/* A new launch attempt: its bootstrap token's hash is committed with it, the one before becomes void. */
static void
begin_attempt(SessionRow *row, int attempt)
{
	Datum values[3];

	row->attempt = attempt;
	if (!row->runtime || row->key_id == NULL)
		return;
	else
	{
		Secret *token = keyring_bootstrap_token(row->key_id, row->id_text, attempt);
		bytea *hash = palloc(VARHDRSZ + SHA256_LEN);

		SET_VARSIZE(hash, VARHDRSZ + SHA256_LEN);
		secret_sha256(token, (uint8 *) VARDATA(hash));
		if (has_tokens(&row->session_id))
		{
			values[0] = UUIDPGetDatum(&row->session_id);
			db_run(&forget_token_query, values, NULL);
		}
		values[0] = PointerGetDatum(hash);
		values[1] = UUIDPGetDatum(&row->session_id);
		values[2] = CStringGetTextDatum("bootstrap");
		db_insert(&token_insert, values, NULL);
	}
}

void
session_begin_end(SessionRow *row, const char *end_reason, const char *detail)
{
	if (row->state == STATE_TERMINATING || state_is_ended(row->state))
		return;
	row->state = STATE_TERMINATING;
	row->end_reason = pstrdup(end_reason);
	row->detail = detail ? pstrdup(detail) : NULL;
	row->retries = 0;
}

/* Whether a session that has no VM reported by its runtime is past its time for that. */
static bool
bootstrap_is_due(const SessionRow *row)
{
	return row->state == STATE_PROVISIONING && row->runtime && row->launched_at != 0;
}

static void
enforce_deadlines(SessionRow *row, TimestampTz now)
{
	if (row->deadline_at <= now)
		session_begin_end(row, row->warm ? "idle" : "max_lifetime", NULL);
	else if (bootstrap_is_due(row) && row->launched_at + row->bootstrap_timeout_us <= now)
		session_begin_end(row, "bootstrap_timeout", NULL);
}

/* Take over what the provider has told about the VM. */
static void
learn(SessionRow *row, const ProviderStep *step, TimestampTz now)
{
	if (step->handle != NULL)
		row->handle = step->handle;
	if (step->attempt > 0)
		begin_attempt(row, step->attempt);
	if (step->vm_id != NULL)
	{
		row->vm_id = pstrdup(step->vm_id);
		if (row->launched_at == 0)
			row->launched_at = now;
	}
	if (step->region != NULL)
		row->region = pstrdup(step->region);
	if (step->address != NULL)
		row->address = pstrdup(step->address);
	if (step->purchase != NULL)
		row->purchase = pstrdup(step->purchase);
	if (step->running)
		row->running = true;
}

/* A step that would need a login that has failed. */
static void
fail_without_login(ProviderStep *step, const LoginFound *login)
{
	memset(step, 0, sizeof(*step));
	step->kind = STEP_FAILED;
	step->operation = login->operation;
	step->error_class = login->error_class;
	step->error_code = login->error_code;
	step->error_message = login->error_message;
}

/* What the calls of an operation are signed with. */
static void
find_login(const SessionRow *row, const Provider *provider, ProviderOp op,
		   const Credentials *credentials, TimestampTz now, LoginFound *found)
{
	LoginContext context = {0};

	memset(found, 0, sizeof(*found));
	if (provider == NULL || credentials == NULL)
		return;
	context.op = op;
	context.session_id = row->id_text;
	context.cluster = row->cluster;
	context.external_id = credentials->external_id;
	context.options = row->options;
	context.team_options = credentials->options;
	context.secrets = credentials->secrets;
	context.now = now;
	login_find(provider, &context, found);
}

/* Whether a reply says that the call's login has expired, and the call is worth another try with a new one. */
static bool
login_has_expired(const Provider *provider, const HttpReply *reply, const TurnCall *call)
{
	return provider != NULL && reply != NULL && call->login.id != 0 && !call->again &&
		   provider->login_expired(reply);
}

/* Whether something of the boot is left that is to be taken away. */
static bool
boot_is_left(const SessionRow *row)
{
	return (row->state == STATE_READY || row->state == STATE_WARM || row->state == STATE_PAUSED) &&
		   row->handle != NULL && option_value(row->handle, AVM_BOOT_LEFT) != NULL;
}

/* What the row asks for at its provider; false: nothing. */
static bool
wanted_op(const SessionRow *row, ProviderOp *op)
{
	if (row->state == STATE_TERMINATING)
		*op = OP_TERMINATE;
	else if (!row->running)
		*op =
			OP_PROVISION; /* also of one that is pausing: a runtime may report before we have looked */
	else if (row->state == STATE_PAUSING)
		*op = OP_PAUSE;
	else if (row->state == STATE_RESUMING)
		*op = OP_RESUME;
	else if (boot_is_left(row))
		*op = OP_TIDY;
	else
		return false;
	return true;
}

/* Whether the state has been changed while an operation's call was under way, and asks for another one. */
static bool
is_overtaken(const SessionRow *row, ProviderOp op)
{
	switch (op)
	{
		case OP_PROVISION:
			return row->state == STATE_TERMINATING;
		case OP_TIDY:
			return row->state != STATE_READY && row->state != STATE_WARM &&
				   row->state != STATE_PAUSED;
		case OP_PAUSE:
			return row->state != STATE_PAUSING;
		case OP_RESUME:
			return row->state != STATE_RESUMING;
		case OP_TERMINATE:
		case OP_INSPECT:
		case OP_CHECK:
		case OP_LIST:
		case OP_REAP:
			break;
	}
	return false;
}

/*
 * A pause or resume has failed: whether it is tried again.  It is if it may have taken
 * effect: nobody is told that a VM runs which is about to halt.  Else the session is
 * what it was before, and says why.
 */
static bool
power_goes_on(SessionRow *row, const ProviderStep *step, char *error)
{
	if (step->error_class == CLASS_NOT_FOUND)
	{
		session_begin_end(row, class_end_reason(step->error_class), error);
		return false;
	}
	row->detail = error;
	if (step->error_class == CLASS_THROTTLED || step->error_class == CLASS_TRANSIENT ||
		(row->handle != NULL && option_value(row->handle, AVM_POWER_SENT) != NULL))
	{
		row->retries++;
		return true;
	}
	row->state = row->state == STATE_PAUSING ? STATE_READY : STATE_PAUSED;
	row->retries = 0;
	return false;
}

/*
 * Whether the call that a step asks for may be made now, else *later.  What answers
 * an answer goes at once, since the step has taken that in: there are no more such calls
 * than answers.
 */
static bool
call_is_granted(const SessionRow *row, ProviderStep *step, const HttpReply *reply,
				const TurnCall *call, Rates *rates, int peers, TimestampTz now, TimestampTz *later)
{
	CallRate *rate = step->rate;
	int joint = call != NULL ? call->joint : 0;
	RateClaim claim = RATE_WAITED;

	if (rate == NULL)
		return true;
	if (joint > 0 && joint < rate->limit && rate->batch != NULL)
	{
		rate->limit = joint;
		rate->batch = joint > 1 ? psprintf("%s/%d", rate->batch, joint) : NULL;
	}
	if (reply != NULL)
		claim = RATE_MUST;
	else if (joint > 0)
		claim = RATE_SPLIT;
	else if (call == NULL && row->next_check_at <= row->created_at)
		claim = RATE_NEW;
	return rates_admit(rates, rate, peers, claim, now, later);
}

void
session_turn(SessionRow *row, const HttpReply *reply, const TurnCall *call, ConfigCache *configs,
			 Rates *rates, int peers, TurnResult *result)
{
	const Provider *provider = provider_find(row->provider);
	const char *config_error = NULL;
	const char *missing = NULL;
	const Credentials *credentials =
		config_credentials(configs, row->team_id, row->provider, &config_error);
	ProviderOp op = call != NULL ? call->op : OP_PROVISION;
	const char *operation = reply != NULL ? call->operation : NULL;
	bool mutates = reply != NULL && call->mutates;
	TimestampTz retry_at = DT_NOEND;
	TimestampTz now;
	int round;

	memset(result, 0, sizeof(*result));
	result->call.again = call != NULL && reply == NULL && call->again;
	/* a row of other tooling, older than the constraint that would refuse to write it back */
	if (row->state == STATE_TERMINATING && row->end_reason == NULL)
		row->end_reason = pstrdup("requested");
	for (round = 0;; round++)
	{
		ProviderContext context = {0};
		ProviderStep step;
		ProviderHost *host = NULL;
		LoginFound login;
		char *error = NULL;
		bool needs_login = false;
		bool expired = login_has_expired(provider, reply, call);
		bool launched;
		bool unavailable;
		bool placed = true;

		now = GetCurrentTimestamp();
		enforce_deadlines(row, now);
		if (state_is_ended(row->state))
			break;
		if (reply == NULL && !wanted_op(row, &op))
			break;

		context.op = op;
		context.session = session_row_for_provider(row);
		context.options = row->options;
		find_login(row, provider, op, credentials, now, &login);
		context.secrets = login.secrets;
		context.login_pending = credentials != NULL && login.secrets == NULL;
		context.external_id = credentials != NULL ? credentials->external_id : NULL;
		context.handle = row->handle;
		context.reply = reply;
		context.now = now;
		context.ending = row->state == STATE_TERMINATING && op != OP_TERMINATE && op != OP_TIDY;
		if (provider != NULL && provider->placed)
		{
			placed = placement_of(row, op == OP_PROVISION && !context.ending, &host, &step);
			/* if not, the step is repeated later, from its handle */
			context.host = host;
			context.session = session_row_for_provider(row);
		}

		/*
		 * An end may need no credentials: where there is nothing to end.  A launch
		 * needs the key of its bootstrap token, too.
		 */
		missing = config_error;
		if (missing == NULL && op == OP_PROVISION && row->runtime && !row->running &&
			row->key_id != NULL)
			missing = keyring_key_problem(row->key_id);
		unavailable = missing != NULL;
		if (provider != NULL && placed && round < MAX_ROUNDS &&
			(!unavailable || op == OP_TERMINATE))
		{
			provider_step(provider, &context, &step);
			unavailable = unavailable && step.kind == STEP_FAILED;
			needs_login = context.login_pending && step.kind == STEP_REQUEST;
			if (needs_login && !login.failed && reply == NULL)
			{
				/* the step is taken again once there is something to sign with */
				result->wait_for = login.ref;
				return;
			}
			if (needs_login && login.failed)
			{
				/* after an answer it counts as sent, which it was not: that is on the safe side */
				if (reply != NULL)
					learn(row, &step, now);
				fail_without_login(&step, &login);
			}
		}
		if (provider == NULL || (placed && unavailable) || round >= MAX_ROUNDS)
		{
			memset(&step, 0, sizeof(step));
			step.kind = STEP_FAILED;
			step.error_class = CLASS_TRANSIENT;
			step.error_code = provider == NULL	? "UnknownProvider"
							  : missing != NULL ? "SecretUnavailable"
												: "StepLoop";
			step.error_message = provider == NULL  ? row->provider
								 : missing != NULL ? missing
												   : "the provider goes round in circles";
		}

		if (step.kind == STEP_REQUEST && !needs_login &&
			!call_is_granted(row, &step, reply, call, rates, peers, now, &retry_at))
		{
			/* the step is repeated when its turn comes, from its handle */
			if (row->state == STATE_PROVISIONING && row->launched_at == 0)
				row->detail = psprintf("%s waits for what the account grants", step.operation);
			break;
		}

		if (step.kind == STEP_FAILED && step.error_class == CLASS_NONE)
			step.error_class = CLASS_PERMANENT;
		result->last_class = step.error_class;
		if (reply != NULL)
		{
			result->reply_class = step.error_class;
			result->account = step.account;
		}
		if (step.error_class != CLASS_NONE)
			error = step_error(&step, login.secrets);
		if (reply != NULL && !call->counted)
			shared_count_call(row->provider, operation, step.error_class, reply->millis);
		if (step.error_class != CLASS_NONE || (reply != NULL && mutates))
			log_call(row, operation ? operation : step.operation, reply, &step, error);
		learn(row, &step, now);
		placement_learn_kvm(host, step.host_kvm);
		reply = NULL;
		operation = NULL;
		mutates = false;

		if (expired)
		{
			login_forget(&call->login);
			result->call.again = true;
		}

		if (is_overtaken(row, op))
			continue; /* the reply has been taken in; now what is wanted */

		if (expired && step.kind == STEP_FAILED)
			continue; /* the step has taken in the refusal; now once more, with a new login */

		if (step.kind == STEP_REQUEST && needs_login)
		{
			result->wait_for = login.ref;
			return;
		}
		if (step.kind == STEP_REQUEST)
		{
			result->request = step.request;
			result->rate = step.rate;
			result->call.op = op;
			result->call.operation = step.operation;
			result->call.mutates = step.mutates;
			result->call.login = login.ref;
			return;
		}
		if (step.kind == STEP_WAIT)
		{
			retry_at = now + step.wait_ms * INT64CONST(1000);
			if (step.error_class == CLASS_NONE)
				row->retries = 0;
			break;
		}
		if (op == OP_TIDY)
		{
			/* nor does it give up, but nothing else depends on it */
			row->retries = step.kind == STEP_FAILED ? row->retries + 1 : 0;
			if (step.kind == STEP_DONE && !boot_is_left(row))
				break;
			retry_at = now + retry_delay_ms(Max(row->retries, 1), RETRY_CAP_TERMINATE_MS) *
								 INT64CONST(1000);
			break;
		}
		if (step.kind == STEP_DONE)
		{
			row->retries = 0;
			if (op == OP_TERMINATE)
			{
				/* the log tells of every state, also of one that lasts no time */
				if (row->saved_state != STATE_TERMINATING)
					session_row_save(row);
				/* silence has had a cause */
				if (step.was_gone && strcmp(row->end_reason, "heartbeat_timeout") == 0)
				{
					row->end_reason = pstrdup("provider_lost");
					row->detail = pstrdup("the VM was gone when it was to be ended");
				}
				row->state = reason_end_state(row->end_reason);
				row->ended_at = now;
				break;
			}
			if (op == OP_PAUSE || op == OP_RESUME)
			{
				row->state = op == OP_PAUSE ? STATE_PAUSED : STATE_READY;
				row->detail = NULL;
				if (op == OP_RESUME)
					row->resumed_at = now;
				continue;
			}
			row->running = true;
			if (row->launched_at == 0)
				row->launched_at = now;
			if (!row->runtime && row->state == STATE_PROVISIONING)
			{
				row->state = row->warm ? STATE_WARM : STATE_READY;
				row->ready_at = now;
			}
			if (row->state != STATE_TERMINATING)
				row->detail = NULL;
			continue;
		}

		/* STEP_FAILED */
		if (op == OP_TERMINATE)
		{
			/* never gives up; view health shows it */
			row->retries++;
			retry_at =
				now + retry_delay_ms(row->retries, RETRY_CAP_TERMINATE_MS) * INT64CONST(1000);
			break;
		}
		if (op == OP_PAUSE || op == OP_RESUME)
		{
			if (!power_goes_on(row, &step, error))
				continue;
			retry_at = now + retry_delay_ms(row->retries, RETRY_CAP_LAUNCH_MS) * INT64CONST(1000);
			break;
		}
		/* a VM that is launched is judged by its runtime, not by our failure to look at it */
		launched = row->state != STATE_PROVISIONING || (row->runtime && row->launched_at != 0);
		if (step.error_class == CLASS_THROTTLED || step.error_class == CLASS_TRANSIENT ||
			(launched && step.error_class != CLASS_NOT_FOUND))
		{
			if (step.error_class == CLASS_TRANSIENT && !launched && row->launched_at == 0 &&
				row->retries >= MIN_LAUNCH_TRIES &&
				row->created_at + row->bootstrap_timeout_us <= now)
			{
				session_begin_end(row, "provider_error", error);
				continue;
			}
			row->retries++;
			if (row->state == STATE_PROVISIONING)
				row->detail = error;
			retry_at = now + retry_delay_ms(row->retries, RETRY_CAP_LAUNCH_MS) * INT64CONST(1000);
			break;
		}
		session_begin_end(row, class_end_reason(step.error_class), error);
	}

	/* When to look again; a tombstone is never due. */
	row->next_check_at = 0;
	if (state_is_ended(row->state))
		return;
	row->next_check_at = retry_at;
	if (row->state != STATE_TERMINATING)
	{
		row->next_check_at = Min(row->next_check_at, row->deadline_at);
		if (bootstrap_is_due(row))
			row->next_check_at =
				Min(row->next_check_at, row->launched_at + row->bootstrap_timeout_us);
	}
	else if (row->next_check_at == DT_NOEND)
		row->next_check_at = now;
}
