/*-------------------------------------------------------------------------
 *
 * rate.c
 *		How often a cloud account is called: token buckets, and calls made for several.
 *
 * Who finds no token is given a slot: a time at which there will be one, behind all
 * slots given before.  Slots are not kept by name, since whoever has one is a row
 * whose next_check_at has come, at whichever worker that may be; so a row
 * that has waited takes any token that there is, and one that is new takes none as long
 * as slots are to come, unless there are so many that nobody can be waiting for them.
 * Tokens are never kept for a slot whose row does not come.
 *
 * Whose account an access key is of is not known before an answer has told.  Until then
 * the key has buckets of its own; then what it has spent is taken from its account's.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "engine/rate.h"
#include "engine/shared.h"
#include "utils/hsearch.h"
#include "utils/timestamp.h"

#define MAX_BUCKETS 4096
#define KEY_SIZE 128					  /* bytes of a bucket's or batch's name that count */
#define MIN_FACTOR (1.0 / 32)			  /* of the published rate is what refusals leave */
#define RECOVERY (1.0 / 20)				  /* of the published rate is what an answer brings back */
#define SPLIT_DEBT 100					  /* tokens beside a full bucket: for 7 times in halves */
#define ENOUGH 0.999					  /* of a token: sums of fractions are not exact */
#define LONGEST_US (300 * USECS_PER_SEC)  /* until a row that waits asks again at the latest */
#define MARGIN_US 2000					  /* a row comes that much later than its token */
#define IDLE_US (600 * USECS_PER_SEC)	  /* after that a bucket is forgotten, */
#define UNUSED_US (7200 * USECS_PER_SEC)  /* and after that whose a key is: lists ask each hour */
#define ABANDONED_US (60 * USECS_PER_SEC) /* after that nobody comes to make a call any more */

typedef struct Bucket
{
	char name[KEY_SIZE]; /* hash key: CallRate's bucket and account */
	int account_at;		 /* where in it that begins */
	double size;		 /* tokens that it holds at most */
	double per_second;	 /* ours, as published */
	double factor;		 /* of that is granted */
	double tokens;		 /* below 0: a debt */
	TimestampTz filled_at;
	TimestampTz halved_at;
	TimestampTz slot; /* the last one that was given */
	int left;		  /* sessions that it has room for */
} Bucket;

/* A call that gathers sessions; its token is taken. */
typedef struct Gathering
{
	char name[KEY_SIZE]; /* hash key */
	int members;
	TimestampTz since;
} Gathering;

/* An account by another name. */
typedef struct AccountName
{
	char name[KEY_SIZE]; /* hash key */
	char account[KEY_SIZE];
	TimestampTz used_at;
} AccountName;

struct Rates
{
	HTAB *buckets;
	HTAB *gathering;
	HTAB *aliases;
};

Rates *
rates_create(MemoryContext context)
{
	Rates *rates = MemoryContextAllocZero(context, sizeof(Rates));
	HASHCTL ctl = {0};

	ctl.keysize = KEY_SIZE;
	ctl.hcxt = context;
	ctl.entrysize = sizeof(Bucket);
	rates->buckets =
		hash_create("agentvm buckets", 64, &ctl, HASH_ELEM | HASH_STRINGS | HASH_CONTEXT);
	ctl.entrysize = sizeof(Gathering);
	rates->gathering =
		hash_create("agentvm gathering calls", 64, &ctl, HASH_ELEM | HASH_STRINGS | HASH_CONTEXT);
	ctl.entrysize = sizeof(AccountName);
	rates->aliases =
		hash_create("agentvm accounts", 64, &ctl, HASH_ELEM | HASH_STRINGS | HASH_CONTEXT);
	return rates;
}

/* Add what has come in since the last look. */
static void
refill(Bucket *bucket, TimestampTz now)
{
	double seconds =
		now > bucket->filled_at ? (double) (now - bucket->filled_at) / USECS_PER_SEC : 0;
	double size = Max(bucket->size * bucket->factor, 1);

	bucket->tokens = Min(bucket->tokens + seconds * bucket->per_second * bucket->factor, size);
	bucket->filled_at = now;
}

static void
forget(Rates *rates, Bucket *bucket)
{
	if (bucket->factor < 1)
		shared_note_rate(bucket->name, 1);
	hash_search(rates->buckets, bucket->name, HASH_REMOVE, NULL);
}

/* Forget the bucket that was used the longest ago. */
static void
forget_oldest(Rates *rates)
{
	HASH_SEQ_STATUS scan;
	Bucket *bucket;
	Bucket *oldest = NULL;

	hash_seq_init(&scan, rates->buckets);
	while ((bucket = hash_seq_search(&scan)) != NULL)
	{
		if (oldest == NULL || bucket->filled_at < oldest->filled_at)
			oldest = bucket;
	}
	if (oldest != NULL)
		forget(rates, oldest);
}

/* What is known of an account's name, or NULL. */
static AccountName *
find_alias(Rates *rates, const char *account, TimestampTz now)
{
	char key[KEY_SIZE];
	AccountName *alias;

	strlcpy(key, account, sizeof(key));
	alias = hash_search(rates->aliases, key, HASH_FIND, NULL);
	if (alias != NULL)
		alias->used_at = now;
	return alias;
}

/* Write a bucket's name; returns where the account begins in it. */
static int
bucket_name(char *key, const char *bucket, const char *account)
{
	snprintf(key, KEY_SIZE, "%s %s", bucket, account);
	return (int) Min(strlen(bucket) + 1, strlen(key));
}

/* The bucket of a call, filled up to now. */
static Bucket *
find_bucket(Rates *rates, const CallRate *rate, int peers, TimestampTz now)
{
	AccountName *alias = find_alias(rates, rate->account, now);
	char key[KEY_SIZE];
	int account_at = bucket_name(key, rate->bucket, alias != NULL ? alias->account : rate->account);
	Bucket *bucket = hash_search(rates->buckets, key, HASH_FIND, NULL);

	if (bucket == NULL)
	{
		if (hash_get_num_entries(rates->buckets) >= MAX_BUCKETS)
			forget_oldest(rates);
		bucket = hash_search(rates->buckets, key, HASH_ENTER, NULL);
		bucket->account_at = account_at;
		bucket->factor = 1;
		bucket->tokens = rate->burst * avm_api_rate / peers;
		bucket->filled_at = now;
		bucket->halved_at = bucket->slot = DT_NOBEGIN;
		bucket->left = 0;
	}
	/* the setting, or the number of workers, may have changed */
	bucket->size = rate->burst * avm_api_rate / peers;
	bucket->per_second = rate->per_second * avm_api_rate / peers;
	refill(bucket, now);
	return bucket;
}

/* The next time at which there may be a token that is nobody's. */
static TimestampTz
next_slot(Bucket *bucket, int members, TimestampTz now)
{
	double per_second = bucket->per_second * bucket->factor;
	double interval = USECS_PER_SEC / per_second;
	double wait = Max(1 - bucket->tokens, 0) * interval;
	TimestampTz first = now + (TimestampTz) Min(wait, LONGEST_US);

	if (bucket->slot == DT_NOBEGIN || bucket->slot + interval / 2 < first)
	{
		bucket->slot = first;
		bucket->left = members;
	}
	else if (bucket->left <= 0)
	{
		bucket->slot += (TimestampTz) Min(interval, LONGEST_US);
		bucket->left = members;
	}
	bucket->slot = Min(bucket->slot, now + LONGEST_US);
	bucket->left--;
	return bucket->slot + MARGIN_US;
}

static bool
may_take(const Bucket *bucket, RateClaim claim, TimestampTz now)
{
	switch (claim)
	{
		case RATE_NEW:
			return bucket->tokens >= ENOUGH &&
				   (bucket->slot <= now || bucket->tokens >= Max(bucket->size / 2, 2));
		case RATE_WAITED:
			return bucket->tokens >= ENOUGH;
		case RATE_SPLIT:
			return bucket->tokens > -bucket->size - SPLIT_DEBT;
		case RATE_MUST:
			return true;
	}
	return true; /* keep compiler quiet */
}

bool
rates_admit(Rates *rates, const CallRate *rate, int peers, RateClaim claim, TimestampTz now,
			TimestampTz *later)
{
	char key[KEY_SIZE];
	Bucket *bucket;

	if (avm_api_rate <= 0)
		return true;
	if (rate->batch != NULL)
	{
		Gathering *gathering;

		strlcpy(key, rate->batch, sizeof(key));
		gathering = hash_search(rates->gathering, key, HASH_FIND, NULL);
		if (gathering != NULL && gathering->members < rate->limit)
		{
			gathering->members++;
			return true;
		}
	}

	bucket = find_bucket(rates, rate, peers, now);
	if (!may_take(bucket, claim, now))
	{
		*later = next_slot(bucket, rate->batch != NULL ? rate->limit : 1, now);
		return false;
	}
	bucket->tokens -= 1;
	if (rate->batch != NULL)
	{
		Gathering *gathering = hash_search(rates->gathering, key, HASH_ENTER, NULL);

		gathering->members = 1;
		gathering->since = now;
	}
	return true;
}

void
rates_close(Rates *rates, const char *batch)
{
	char key[KEY_SIZE];

	strlcpy(key, batch, sizeof(key));
	hash_search(rates->gathering, key, HASH_REMOVE, NULL);
}

void
rates_learn(Rates *rates, const char *bucket_text, const char *account, ErrorClass class,
			TimestampTz sent_at, TimestampTz now)
{
	AccountName *alias = find_alias(rates, account, now);
	char key[KEY_SIZE];
	Bucket *bucket;
	double before;

	bucket_name(key, bucket_text, alias != NULL ? alias->account : account);
	bucket = hash_search(rates->buckets, key, HASH_FIND, NULL);
	if (bucket == NULL || class == CLASS_TRANSIENT)
		return; /* no answer says nothing */
	refill(bucket, now);
	before = bucket->factor;
	if (class != CLASS_THROTTLED)
		bucket->factor = Min(bucket->factor + RECOVERY, 1);
	else if (sent_at > bucket->halved_at) /* else it has left before we knew */
	{
		bucket->factor = Max(bucket->factor / 2, MIN_FACTOR);
		bucket->tokens = Min(bucket->tokens, 0);
		bucket->halved_at = now;
	}
	if (bucket->factor != before)
		shared_note_rate(bucket->name, bucket->factor);
}

/* What has been spent of a bucket is taken from the same one of the account, and the bucket goes. */
static void
move_bucket(Rates *rates, Bucket *from, const char *account, TimestampTz now)
{
	char grant[KEY_SIZE];
	char key[KEY_SIZE];
	Bucket *to;
	int account_at;

	strlcpy(grant, from->name, Max(from->account_at, 1)); /* without the space */
	account_at = bucket_name(key, grant, account);
	to = hash_search(rates->buckets, key, HASH_FIND, NULL);
	refill(from, now);
	if (to == NULL)
	{
		/* room for one: "from" has it */
		to = hash_search(rates->buckets, key, HASH_ENTER, NULL);
		memcpy((char *) to + KEY_SIZE, (char *) from + KEY_SIZE, sizeof(Bucket) - KEY_SIZE);
		to->account_at = account_at;
	}
	else
	{
		double debt;

		refill(to, now);
		debt = Min(Min(to->tokens, from->tokens), 0);
		to->tokens = Max(to->tokens - (from->size - from->tokens), debt);
		to->factor = Min(to->factor, from->factor);
		to->halved_at = Max(to->halved_at, from->halved_at);
		to->slot = Max(to->slot, from->slot);
		to->left = 0;
	}
	forget(rates, from);
	if (to->factor < 1)
		shared_note_rate(to->name, to->factor);
}

void
rates_same_account(Rates *rates, const char *name, const char *account, TimestampTz now)
{
	AccountName *alias = find_alias(rates, name, now);
	HASH_SEQ_STATUS scan;
	Bucket *bucket;
	char key[KEY_SIZE];

	if (strcmp(name, account) == 0 || (alias != NULL && strcmp(alias->account, account) == 0))
		return;
	strlcpy(key, name, sizeof(key));
	if (alias == NULL && hash_get_num_entries(rates->aliases) >= MAX_BUCKETS)
		return; /* until some are forgotten */
	alias = hash_search(rates->aliases, key, HASH_ENTER, NULL);
	strlcpy(alias->account, account, sizeof(alias->account));
	alias->used_at = now;
	hash_seq_init(&scan, rates->buckets);
	while ((bucket = hash_seq_search(&scan)) != NULL)
	{
		if (strcmp(bucket->name + bucket->account_at, key) == 0)
			move_bucket(rates, bucket, alias->account, now);
	}
}

void
rates_tidy(Rates *rates, TimestampTz now)
{
	HASH_SEQ_STATUS scan;
	Bucket *bucket;
	Gathering *gathering;
	AccountName *alias;

	hash_seq_init(&scan, rates->buckets);
	while ((bucket = hash_seq_search(&scan)) != NULL)
	{
		if (bucket->filled_at + IDLE_US < now)
			forget(rates, bucket);
	}
	hash_seq_init(&scan, rates->gathering);
	while ((gathering = hash_seq_search(&scan)) != NULL)
	{
		if (gathering->since + ABANDONED_US < now)
			hash_search(rates->gathering, gathering->name, HASH_REMOVE, NULL);
	}
	hash_seq_init(&scan, rates->aliases);
	while ((alias = hash_seq_search(&scan)) != NULL)
	{
		if (alias->used_at + UNUSED_US < now)
			hash_search(rates->aliases, alias->name, HASH_REMOVE, NULL);
	}
}
