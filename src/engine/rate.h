/*-------------------------------------------------------------------------
 *
 * rate.h
 *		How often a cloud account is called: token buckets, and calls made for several.
 *
 * An account grants each operation so many calls at once and so many a second
 * (CallRate says which); whoever asks more often is refused.  So a call that finds
 * no token in its bucket is not made: its session is due again when it is its turn,
 * with nothing sent and nothing on record of a try.
 *
 * A refusal all the same shows that others use up the account's grant, whom we
 * cannot see.  So the rate follows AIMD: halved by a refusal, raised by a fixed part
 * of the published rate with each other answer.  Of all rules as simple it is the one by
 * which several who share what none can measure come to equal shares.
 *
 * Nothing here is shared between processes: each worker has its part of the rate.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_RATE_H
#define AGENTVM_ENGINE_RATE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "providers/provider.h"

typedef struct Rates Rates;

/* How urgent a call is. */
typedef enum RateClaim
{
	RATE_NEW,	 /* it queues behind those that wait */
	RATE_WAITED, /* it takes a token if there is one */
	RATE_SPLIT,	 /* it was refused because of others: it goes into debt, but not deeply */
	RATE_MUST	 /* it follows an answer: it is made at once, into debt if need be */
} RateClaim;

/* Buckets of their own in a context. */
extern Rates *rates_create(MemoryContext context);

/*
 * Whether a call may be made now, as one of "peers" workers; then it has taken its token,
 * or there is room in a call that gathers under its "batch".  If not, *later is the time
 * to ask again.  Always true without limits (agentvm.api_rate = 0).  Never raises but for lack of memory.
 */
extern bool rates_admit(Rates *rates, const CallRate *rate, int peers, RateClaim claim,
						TimestampTz now, TimestampTz *later);

/* A call of that CallRate.batch gathers no more: the next one takes a token of its own. */
extern void rates_close(Rates *rates, const char *batch);

/* Take in how a call of that CallRate.bucket and .account was answered that was sent at "sent_at". */
extern void rates_learn(Rates *rates, const char *bucket, const char *account, ErrorClass class,
						TimestampTz sent_at, TimestampTz now);

/*
 * Take in that an account which CallRate.account calls "name" is "account": its buckets become
 * parts of that one's.  Cheap when it is known.  Never raises but for lack of memory.
 */
extern void rates_same_account(Rates *rates, const char *name, const char *account,
							   TimestampTz now);

/*
 * Forget buckets that are as new ones are, calls that nobody has come to make, and names of
 * accounts that have not been met for long.
 */
extern void rates_tidy(Rates *rates, TimestampTz now);

#endif /* AGENTVM_ENGINE_RATE_H */
