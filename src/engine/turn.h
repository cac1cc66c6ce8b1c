/*-------------------------------------------------------------------------
 *
 * turn.h
 *		One session's turn: from what the row says to what happens next.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_TURN_H
#define AGENTVM_ENGINE_TURN_H

#include "postgres.h"

#include "engine/login.h"
#include "engine/rate.h"
#include "engine/session_row.h"
#include "providers/provider.h"
#include "utils/resowner.h"

/* Credentials of the (team, provider) pairs met in one transaction. */
typedef struct ConfigCache
{
	MemoryContext context;
	List *entries;
} ConfigCache;

/* A call that a turn asks for, and the next one has the answer of. */
typedef struct TurnCall
{
	ProviderOp op;
	const char *operation;
	bool mutates;
	LoginRef login; /* what it is signed with */
	bool again;		/* it repeats one whose login had expired */
	bool counted;	/* the reply is a part of one that has been taken into account */
	int joint; /* not answered, since others of its call were refused: may be made for so many; 0: any */
} TurnCall;

/* What a turn found to do. */
typedef struct TurnResult
{
	HttpRequest *request; /* to be sent after commit, or NULL */
	CallRate *rate;		  /* with request; or NULL */
	TurnCall call;		  /* with request */
	LoginRef wait_for; /* without: the next turn is to come when this login is over; id 0: none */
	ErrorClass last_class;	/* how the last step went, for throttling */
	ErrorClass reply_class; /* the one that took in the reply */
	const char *account;	/* whose the reply says it is, or NULL */
} TurnResult;

/*
 * Take the locked row as far as it goes without the network: first "reply" (to
 * "call"; NULL: none), then whatever is due.  Changes the row in
 * memory, writes events and tokens, but does not save the row: the caller sets
 * the lease if there is a request or a login to wait for, and saves.  "call" may be
 * NULL without a reply.  A call that its account does not grant yet is
 * not asked for: the row is due again when it may be.  "peers": how many workers share
 * what is granted.  Inside a db scope.
 */
extern void session_turn(SessionRow *row, const HttpReply *reply, const TurnCall *call,
						 ConfigCache *configs, Rates *rates, int peers, TurnResult *result);

/*
 * Begin the end of a live session; "detail" may be NULL.  No effect on one that is ending or has ended.
 */
extern void session_begin_end(SessionRow *row, const char *end_reason, const char *detail);

/*
 * The credentials of a team for a provider, decrypted at most once per cache.
 * On failure returns NULL and sets *error to a palloc'd text.
 */
extern const Credentials *config_credentials(ConfigCache *configs, const char *team_id,
											 const char *provider, const char **error);

/*
 * Run one step of a provider in a subtransaction: an error that it raises
 * becomes a failed step of class permanent.  Cancellation passes through.
 */
extern void provider_step(const Provider *provider, const ProviderContext *context,
						  ProviderStep *step);

/*
 * Leave an internal subtransaction in PG_CATCH: "context" and "owner" become
 * current again.  Returns the error's data, or throws it on when somebody wants
 * this backend to stop.
 */
extern ErrorData *abort_subtransaction(MemoryContext context, ResourceOwner owner);

#endif /* AGENTVM_ENGINE_TURN_H */
