/*-------------------------------------------------------------------------
 *
 * login.h
 *		Temporary credentials of teams: fetched once, shared, kept in memory only.
 *
 * Provider.login_needed() says which login a call needs.  Those that are known are
 * one table per process; one that is not known is fetched by whoever drives it:
 * the engine, beside its other calls, while the sessions that need it wait with
 * their lease (engine.c); a backend that asks a question, at once (ask.c).
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_LOGIN_H
#define AGENTVM_ENGINE_LOGIN_H

#include "postgres.h"

#include "providers/provider.h"
#include "secret/credentials.h"

/* Names a login of this process, also when it is gone. */
typedef struct LoginRef
{
	uint8 key[SHA256_LEN];
	uint64 id; /* another one for each fetch; 0: none */
} LoginRef;

typedef enum LoginState
{
	LOGIN_OVER,		/* has come, has failed, or is gone */
	LOGIN_WANTED,	/* nobody fetches it yet */
	LOGIN_UNDER_WAY /* somebody does */
} LoginState;

/* What there is to sign with. */
typedef struct LoginFound
{
	const SecretSet *secrets; /* NULL: the login is to be waited for, or has failed */
	LoginRef
		ref; /* the login that they are from, or that is to be waited for; id 0: the team's own */
	bool failed;
	ErrorClass error_class; /* with failed */
	const char *operation;
	const char *error_code;
	const char *error_message;
	const char *error_hint; /* or NULL */
} LoginFound;

/*
 * Find what a team's calls are signed with: context->secrets, and what logins
 * bring for them.  One that is missing is put into the table as wanted.  What is found is
 * valid until login_tidy().
 */
extern void login_find(const Provider *provider, const LoginContext *context, LoginFound *found);

/* How far it is. */
extern LoginState login_state(const LoginRef *ref);

/*
 * Take a login a step further: "reply" to its last request, or NULL to begin.
 * "owner" is whoever drives it.  Returns the next request, in memory of the login, or NULL
 * when it is over.  Inside a transaction; never raises over what a reply says.
 */
extern HttpRequest *login_step(const LoginRef *ref, const HttpReply *reply, const void *owner);

/* Whoever looks next has to fetch another one: it has expired, say. */
extern void login_forget(const LoginRef *ref);

/*
 * Wipe what has expired, has failed a while ago or has been forgotten.  Not while a
 * request of the owner that was made with something found is still to be sent;
 * without effect if an engine is attached to this process that is not the owner.
 */
extern void login_tidy(const void *owner);

/* Forget the logins that an owner has under way.  Never raises. */
extern void login_abandon(const void *owner);

/* An engine of this process begins, and goes; the latter never raises. */
extern void login_attach(const void *owner);
extern void login_detach(const void *owner);

#endif /* AGENTVM_ENGINE_LOGIN_H */
