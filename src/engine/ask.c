/*-------------------------------------------------------------------------
 *
 * ask.c
 *		A read-only question to a provider.
 *
 * The steps are taken in this backend, and so are the calls, but for those of a
 * provider whose library blocks: its runner makes them (question.c).
 *
 * The statement that asks holds its snapshot while it waits: that is the price
 * of a function; the calls are short and bounded by their timeout.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/ask.h"
#include "engine/placement.h"
#include "engine/question.h"
#include "engine/turn.h"
#include "miscadmin.h"
#include "secret/credentials.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#define ASK_TIMEOUT_MS 10000
#define MAX_STEPS 16

static DbQuery cluster_query = {"SELECT installation_id::text FROM agentvm.installation", 0, {0}};

/* As provision() finds them: a team's own hides one for all. */
static DbQuery profiles_query = {
	"SELECT name, options FROM (SELECT DISTINCT ON (name) name, options, provider "
	"FROM agentvm.profile WHERE team_id = $1 OR team_id IS NULL "
	"ORDER BY name, team_id NULLS LAST) p WHERE provider = $2 ORDER BY name",
	2,
	{TEXTOID, TEXTOID}};

/* What a question is about. */
typedef struct Ask
{
	const Provider *provider;
	ProviderContext context;
	LoginContext login;
	LoginRef signed_by;
	bool again; /* a login has been found to be expired */
} Ask;

/* The calls of a login, whose answers hold keys. */
static pg_noinline void
call_for_login(const void *owner, const LoginRef *ref)
{
	HttpRequest *request;
	HttpReply *reply = NULL;

	while ((request = login_step(ref, reply, owner)) != NULL)
	{
		if (request->timeout_ms <= 0)
			request->timeout_ms = ASK_TIMEOUT_MS;
		reply = http_perform(request);
		secret_wipe_later((char *) reply->body, reply->body_len);
	}
}

void
ask_fetch_login(const LoginRef *ref)
{
	/* an engine further up in this backend is at it, which goes on only after us */
	if (login_state(ref) == LOGIN_UNDER_WAY)
	{
		login_forget(ref);
		return;
	}
	PG_TRY();
	{
		call_for_login(ref, ref);
	}
	PG_CATCH();
	{
		login_abandon(ref);
		PG_RE_THROW();
	}
	PG_END_TRY();
}

/* Find what the question's calls are signed with; raises if that cannot be had. */
static void
log_in(Ask *asked)
{
	LoginFound found;

	for (int i = 0; i < MAX_STEPS; i++)
	{
		login_find(asked->provider, &asked->login, &found);
		if (found.secrets != NULL)
		{
			asked->context.secrets = found.secrets;
			asked->signed_by = found.ref;
			return;
		}
		if (found.failed)
		{
			/* whoever asks once more wants to know how it is now */
			login_forget(&found.ref);
			ereport(ERROR, (errcode(reason_sqlstate(class_end_reason(found.error_class))),
							errmsg("provider \"%s\" refused: %s", asked->provider->name,
								   found.error_code ? found.error_code
													: error_class_name(found.error_class)),
							found.error_message ? errdetail("%s", found.error_message) : 0,
							found.error_hint ? errhint("%s", found.error_hint) : 0));
		}
		ask_fetch_login(&found.ref);
	}
	ereport(ERROR, (errcode(AVM_PROVIDER_ERROR),
					errmsg("provider \"%s\" does not log in", asked->provider->name)));
}

/*
 * Step until the provider has answered or failed.  Returns whether "step" is its
 * answer; if not, it is a failed step.
 */
static bool
ask(Ask *asked, ProviderStep *step)
{
	ProviderContext *context = &asked->context;
	int i;

	for (i = 0; i < MAX_STEPS; i++)
	{
		context->now = GetCurrentTimestamp();
		provider_step(asked->provider, context, step);
		if (step->handle != NULL)
			context->handle = step->handle;
		context->reply = NULL;
		switch (step->kind)
		{
			case STEP_DONE:
				return true;
			case STEP_REQUEST:
				step->request->timeout_ms = ASK_TIMEOUT_MS;
				context->reply = asked->provider->perform != NULL
									 ? question_ask(asked->provider->name, step->request)
									 : http_perform(step->request);
				if (asked->signed_by.id != 0 && !asked->again &&
					asked->provider->login_expired(context->reply))
				{
					/* once more with a new one */
					asked->again = true;
					login_forget(&asked->signed_by);
					log_in(asked);
					context->reply = NULL;
				}
				break;
			case STEP_WAIT:
				(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
								 step->wait_ms, AvmWaitEvent("AgentvmAsk"));
				ResetLatch(MyLatch);
				CHECK_FOR_INTERRUPTS();
				break;
			case STEP_FAILED:
				return false;
		}
	}
	ereport(ERROR, (errcode(AVM_PROVIDER_ERROR),
					errmsg("provider \"%s\" did not come to an answer", asked->provider->name)));
	return false;
}

static Jsonb *
result_of(const ProviderStep *step)
{
	return step->result ? step->result : handle_set_text(NULL, "state", "unknown");
}

static const char *
code_of(const ProviderStep *step)
{
	return step->error_code ? step->error_code : error_class_name(step->error_class);
}

pg_noreturn static void
raise_refused(const Ask *asked, const ProviderStep *step)
{
	ereport(ERROR, (errcode(reason_sqlstate(class_end_reason(step->error_class))),
					errmsg("provider \"%s\" refused: %s", asked->provider->name, code_of(step)),
					step->error_message ? errdetail("%s", secret_redact(asked->context.secrets,
																		step->error_message))
										: 0));
	pg_unreachable();
}

/* Whether a host's answer says that it is in order; one that says nothing is. */
static bool
says_ok(Jsonb *answer)
{
	return !JB_ROOT_IS_OBJECT(answer) || option_bool(answer, "ok", true);
}

/* What a check has learned of a host is kept, where it may be. */
static void
keep_kvm(const ProviderHost *host, int kvm)
{
	MemoryContext caller = CurrentMemoryContext;
	DbScope scope;

	if (XactReadOnly || RecoveryInProgress())
		return;
	db_enter(&scope);
	placement_learn_kvm(host, kvm);
	db_leave(&scope);
	MemoryContextSwitchTo(caller);
}

/* OP_CHECK of a placed provider: of each enabled host, whatever the others say. */
static Jsonb *
ask_hosts(Ask *asked, List *hosts)
{
	Jsonb *answers = handle_set_text(NULL, "-", NULL);
	Jsonb *answer;
	bool ok = hosts != NIL;
	ListCell *lc;

	foreach (lc, hosts)
	{
		ProviderHost *host = lfirst(lc);
		ProviderStep step;

		asked->context.host = host;
		asked->context.handle = NULL;
		if (ask(asked, &step))
			answer = result_of(&step);
		else
		{
			answer = handle_set_bool(NULL, "ok", false);
			answer = handle_set_text(answer, "error_class", error_class_name(step.error_class));
			answer = handle_set_text(answer, "error", code_of(&step));
			if (step.error_message != NULL)
				answer = handle_set_text(answer, "detail",
										 secret_redact(asked->context.secrets, step.error_message));
		}
		if (step.host_kvm != 0)
			keep_kvm(host, step.host_kvm);
		ok = ok && says_ok(answer);
		answers = handle_set_document(answers, host->name, answer);
	}
	answer = handle_set_document(NULL, "hosts", answers);
	if (hosts == NIL)
		answer = handle_set_text(answer, "error", "no host is enabled");
	return handle_set_bool(answer, "ok", ok);
}

static List *
load_profiles(const char *team_id, const char *provider, MemoryContext context)
{
	Datum values[2] = {CStringGetTextDatum(team_id), CStringGetTextDatum(provider)};
	List *profiles = NIL;
	MemoryContext old;
	uint64 i;

	db_run(&profiles_query, values, NULL);
	old = MemoryContextSwitchTo(context);
	for (i = 0; i < SPI_processed; i++)
	{
		ProviderProfile *profile = palloc(sizeof(ProviderProfile));
		bool isnull;

		profile->name = db_text(i, 1, context);
		profile->options = (Jsonb *) PG_DETOAST_DATUM_COPY(db_value(i, 2, &isnull));
		profiles = lappend(profiles, profile);
	}
	MemoryContextSwitchTo(old);
	return profiles;
}

Jsonb *
provider_ask(ProviderOp op, const char *team_id, const char *provider_name, Jsonb *options,
			 const SessionRow *row)
{
	MemoryContext caller = CurrentMemoryContext;
	Ask asked = {provider_get(provider_name)};
	List *hosts = NIL;
	Credentials *credentials;
	ProviderStep step;
	DbScope scope;
	bool answered;

	db_enter(&scope);
	if (row == NULL)
	{
		db_run(&cluster_query, NULL, NULL);
		asked.context.cluster = SPI_processed > 0 ? db_text(0, 1, caller) : NULL;
		asked.context.profiles = load_profiles(team_id, provider_name, caller);
	}
	credentials = credentials_load(team_id, provider_name, caller);
	MemoryContextSwitchTo(caller);
	if (asked.provider->placed && row != NULL)
		asked.context.host = placement_host(&row->session_id);
	else if (asked.provider->placed)
		hosts = placement_hosts();
	db_leave(&scope);
	MemoryContextSwitchTo(caller);

	asked.context.op = op;
	asked.context.session = row ? session_row_for_provider(row) : NULL;
	asked.context.options = options;
	asked.context.handle = row ? row->handle : NULL;
	asked.context.external_id = credentials->external_id;
	asked.login.op = op;
	asked.login.session_id = row ? row->id_text : NULL;
	asked.login.cluster = row ? row->cluster : asked.context.cluster;
	asked.login.external_id = credentials->external_id;
	asked.login.options = options;
	asked.login.team_options = credentials->options;
	asked.login.secrets = credentials->secrets;
	login_tidy(&asked);
	log_in(&asked);
	if (asked.provider->placed && row == NULL)
		return ask_hosts(&asked, hosts);
	answered = ask(&asked, &step);
	if (op == OP_CHECK)
		login_forget(&asked.signed_by); /* the next check is to see how it is then */
	if (!answered)
		raise_refused(&asked, &step);
	return result_of(&step);
}
