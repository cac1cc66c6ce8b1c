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
#define IDLE_US (600 * USECS_PER_SEC)	  /* after that a bucket is forgotten */
#define ABANDONED_US (60 * USECS_PER_SEC) /* after that nobody comes to make a call any more */

typedef struct Bucket
{
	char name[KEY_SIZE]; /* hash key */
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

struct Rates
{
	HTAB *buckets;
	HTAB *gathering;
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

/* The bucket of a call, filled up to now. */
static Bucket *
find_bucket(Rates *rates, const CallRate *rate, int peers, TimestampTz now)
{
	char key[KEY_SIZE];
	Bucket *bucket;
	bool found;

	strlcpy(key, rate->bucket, sizeof(key));
	bucket = hash_search(rates->buckets, key, HASH_FIND, NULL);
	if (bucket == NULL)
	{
		if (hash_get_num_entries(rates->buckets) >= MAX_BUCKETS)
			forget_oldest(rates);
		bucket = hash_search(rates->buckets, key, HASH_ENTER, &found);
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
rates_learn(Rates *rates, const char *bucket_name, ErrorClass class, TimestampTz sent_at,
			TimestampTz now)
{
	char key[KEY_SIZE];
	Bucket *bucket;
	double before;

	strlcpy(key, bucket_name, sizeof(key));
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

void
rates_tidy(Rates *rates, TimestampTz now)
{
	HASH_SEQ_STATUS scan;
	Bucket *bucket;
	Gathering *gathering;

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
}
