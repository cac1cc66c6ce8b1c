/*-------------------------------------------------------------------------
 *
 * login.c
 *		Temporary credentials of teams: fetched once, shared, kept in memory only.
 *
 * The table is of the process: a dispatcher, or a backend.  An entry has a memory
 * context for what it keeps, and one for its fetch, in which all that the steps
 * allocate lives until the fetch is over; both are wiped of secrets as they go.
 *
 * A login that has failed is remembered for a moment: those who wait for it hear
 * of it, and so do those who come right after, without a call of their own.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "engine/login.h"
#include "engine/shared.h"
#include "engine/turn.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

#define MAX_CHAIN 4			  /* logins that need each other */
#define MAX_REQUESTS 8		  /* of one fetch */
#define FAILED_FOR_US 2000000 /* how long a failure is remembered */

typedef struct Login
{
	LoginRef ref; /* its key is the hash key */
	LoginState state;
	const void *owner; /* with LOGIN_UNDER_WAY */
	MemoryContext context;
	const Provider *provider;
	char *name; /* as login_needed() has it */

	/* the fetch */
	MemoryContext fetch;
	LoginContext what;
	SecretSet *kept;
	int requests;

	/* what came of it */
	SecretSet *secrets; /* NULL: it has failed, or is not over */
	TimestampTz good_until;
	ErrorClass error_class;
	char *operation;
	char *error_code;
	char *error_message;
	char *error_hint;
} Login;

static HTAB *logins = NULL;

/* Of logins that have left the table: a request that waits for its commit may still refer to them. */
static MemoryContext gone = NULL;

/* The engine of this process, if it has one: only it knows when that is so. */
static const void *attached = NULL;

static Login *
find_login(const LoginRef *ref)
{
	Login *login = NULL;

	if (logins != NULL && ref->id != 0)
		login = hash_search(logins, ref->key, HASH_FIND, NULL);
	return login != NULL && login->ref.id == ref->id ? login : NULL;
}

static void
remove_login(Login *login)
{
	MemoryContextSetParent(login->context, gone);
	hash_search(logins, login->ref.key, HASH_REMOVE, NULL);
}

void
login_tidy(const void *owner)
{
	TimestampTz now = GetCurrentTimestamp();
	HASH_SEQ_STATUS scan;
	Login *login;

	if (logins == NULL || (attached != NULL && attached != owner))
		return;
	hash_seq_init(&scan, logins);
	while ((login = hash_seq_search(&scan)) != NULL)
	{
		if (login->state == LOGIN_OVER && login->good_until <= now)
			remove_login(login);
	}
	MemoryContextDeleteChildren(gone);
}

static char *
copy_text(MemoryContext context, const char *text)
{
	return text != NULL ? MemoryContextStrdup(context, text) : NULL;
}

static Jsonb *
copy_document(Jsonb *document)
{
	Jsonb *copy;

	if (document == NULL)
		return NULL;
	copy = palloc(VARSIZE(document));
	memcpy(copy, document, VARSIZE(document));
	return copy;
}

/* Put a login into the table that somebody needs. */
static Login *
want(const LoginRef *ref, const Provider *provider, const char *name, const LoginContext *what)
{
	static uint64 last_id = 0;
	MemoryContext old = CurrentMemoryContext;
	MemoryContext context;
	MemoryContext fetch;
	Login *login;

	context = AllocSetContextCreate(TopMemoryContext, "agentvm login", ALLOCSET_SMALL_SIZES);
	fetch = AllocSetContextCreate(context, "agentvm login under way", ALLOCSET_SMALL_SIZES);
	login = hash_search(logins, ref->key, HASH_ENTER, NULL);
	memset((char *) login + sizeof(login->ref.key), 0, sizeof(Login) - sizeof(login->ref.key));
	login->context = context;
	login->fetch = fetch;
	login->ref.id = ++last_id;
	login->state = LOGIN_WANTED;
	login->provider = provider;

	MemoryContextSwitchTo(fetch);
	login->name = MemoryContextStrdup(context, name);
	login->kept = secret_set_make();
	login->what = *what;
	login->what.session_id = copy_text(fetch, what->session_id);
	login->what.cluster = copy_text(fetch, what->cluster);
	login->what.external_id = copy_text(fetch, what->external_id);
	login->what.via = copy_text(fetch, what->via);
	login->what.options = copy_document(what->options);
	login->what.team_options = copy_document(what->team_options);
	login->what.secrets = secret_set_copy(what->secrets);
	MemoryContextSwitchTo(old);
	return login;
}

static void
make_table(void)
{
	HASHCTL ctl = {0};

	gone = AllocSetContextCreate(TopMemoryContext, "agentvm logins gone", ALLOCSET_SMALL_SIZES);
	ctl.keysize = SHA256_LEN;
	ctl.entrysize = sizeof(Login);
	ctl.hcxt = TopMemoryContext;
	logins = hash_create("agentvm logins", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
}

static void
login_key(const Provider *provider, const char *name, LoginRef *ref)
{
	char *text = psprintf("%s %s", provider->name, name);

	sha256_bytes(text, strlen(text), ref->key);
}

void
login_find(const Provider *provider, const LoginContext *context, LoginFound *found)
{
	LoginContext at = *context;

	memset(found, 0, sizeof(*found));
	found->secrets = context->secrets;
	if (provider->login_needed == NULL)
		return;
	if (logins == NULL)
		make_table();
	for (int i = 0; i < MAX_CHAIN; i++)
	{
		char *name;
		Login *login;

		at.now = GetCurrentTimestamp();
		name = provider->login_needed(&at);
		if (name == NULL)
			return;
		login_key(provider, name, &found->ref);
		login = hash_search(logins, found->ref.key, HASH_FIND, NULL);
		if (login != NULL && login->state == LOGIN_OVER && login->good_until <= at.now)
		{
			remove_login(login);
			login = NULL;
		}
		if (login == NULL)
			login = want(&found->ref, provider, name, &at);
		found->ref.id = login->ref.id;
		found->secrets = login->secrets;
		if (login->secrets == NULL)
		{
			found->failed = login->state == LOGIN_OVER;
			found->error_class = login->error_class;
			found->operation = login->operation;
			found->error_code = login->error_code;
			found->error_message = login->error_message;
			found->error_hint = login->error_hint;
			return;
		}
		at.secrets = login->secrets;
		at.via = login->name;
	}
	elog(ERROR, "provider \"%s\" needs one login after the other", provider->name);
}

LoginState
login_state(const LoginRef *ref)
{
	Login *login = find_login(ref);

	return login != NULL ? login->state : LOGIN_OVER;
}

/* The provider's step in a subtransaction: what it raises is a failure. */
static void
provider_login_step(Login *login, const HttpReply *reply, LoginStep *step)
{
	MemoryContext memory = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	memset(step, 0, sizeof(*step));
	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(memory);
	PG_TRY();
	{
		login->provider->login_step(&login->what, reply, login->kept, step);
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
		step->error_code = "LoginFailed";
		step->error_message = caught->message;
		step->error_hint = caught->hint;
	}
	PG_END_TRY();
}

/* The fetch is over: keep what came of it, and nothing else. */
static void
finish(Login *login, const LoginStep *step)
{
	MemoryContextSwitchTo(login->context);
	if (step->kind == STEP_DONE)
	{
		login->secrets = secret_set_copy(step->secrets);
		login->good_until = step->good_until;
	}
	else
	{
		/* told to administrators and kept in events: without any of what it was about */
		login->error_class = step->error_class != CLASS_NONE ? step->error_class : CLASS_PERMANENT;
		login->operation = copy_text(login->context, step->operation);
		login->error_code = copy_text(login->context, step->error_code);
		if (step->error_message != NULL)
			login->error_message =
				secret_redact(login->what.secrets, secret_redact(login->kept, step->error_message));
		login->error_hint = copy_text(login->context, step->error_hint);
		login->good_until = GetCurrentTimestamp() + FAILED_FOR_US;
	}
	login->state = LOGIN_OVER;
	login->owner = NULL;
	login->kept = NULL;
	memset(&login->what, 0, sizeof(login->what));
	MemoryContextDelete(login->fetch);
	login->fetch = NULL;
}

/* The login of a name has brought what is refused as too old. */
static void
forget_name(const Provider *provider, const char *name)
{
	LoginRef ref;
	Login *login;

	login_key(provider, name, &ref);
	login = hash_search(logins, ref.key, HASH_FIND, NULL);
	if (login != NULL)
		remove_login(login);
}

HttpRequest *
login_step(const LoginRef *ref, const HttpReply *reply, const void *owner)
{
	Login *login = find_login(ref);
	MemoryContext old = CurrentMemoryContext;
	LoginStep step;

	if (login == NULL || login->state == LOGIN_OVER)
		return NULL;
	login->state = LOGIN_UNDER_WAY;
	login->owner = owner;
	login->what.now = GetCurrentTimestamp();
	MemoryContextSwitchTo(login->fetch);
	provider_login_step(login, reply, &step);
	if (step.kind == STEP_REQUEST && ++login->requests > MAX_REQUESTS)
	{
		step.kind = STEP_FAILED;
		step.error_class = CLASS_PERMANENT;
		step.error_code = "StepLoop";
		step.error_message = "the provider goes round in circles";
	}
	if (reply != NULL)
		shared_count_call(login->provider->name, step.operation != NULL ? step.operation : "login",
						  step.kind == STEP_FAILED ? step.error_class : CLASS_NONE, reply->millis);
	if (step.kind == STEP_FAILED && reply != NULL && login->what.via != NULL &&
		login->provider->login_expired(reply))
		forget_name(login->provider, login->what.via);
	if (step.kind != STEP_REQUEST)
		finish(login, &step);
	MemoryContextSwitchTo(old);
	return step.kind == STEP_REQUEST ? step.request : NULL;
}

void
login_forget(const LoginRef *ref)
{
	Login *login = find_login(ref);

	if (login != NULL)
		remove_login(login);
}

void
login_attach(const void *owner)
{
	attached = owner;
	login_tidy(owner);
}

void
login_detach(const void *owner)
{
	login_abandon(owner);
	if (attached == owner)
		attached = NULL;
}

void
login_abandon(const void *owner)
{
	HASH_SEQ_STATUS scan;
	Login *login;

	if (logins == NULL)
		return;
	hash_seq_init(&scan, logins);
	while ((login = hash_seq_search(&scan)) != NULL)
	{
		if (login->state == LOGIN_UNDER_WAY && login->owner == owner)
			remove_login(login);
	}
}
