/*-------------------------------------------------------------------------
 *
 * warm.c
 *		Taking a warm VM for a request, instead of booting another.
 *
 * provision() takes one, if there is one that is what a new one would be: then it
 * writes into that row what it would have written into a new one.  Whoever has such
 * a row locked is passed by.  A team without warm VMs pays for a look at an
 * index that has nothing of it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/xact.h"
#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/identity.h"
#include "engine/turn.h"
#include "engine/wake.h"
#include "session/session.h"
#include "session/warm.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/timestamp.h"

static DbKey warm_key = {{"session"}, {"session_warm"}, F_TEXTEQ, 2};

/*
 * The one that has waited longest, unless it is about to be ended, or would end itself
 * before the session does.
 */
static DbQuery warm_query = {
	"SELECT session_id FROM agentvm.session WHERE team_id = $1 AND warm_key = $2 "
	"AND ended_at IS NULL AND state = 'warm' AND deadline_at > $3 AND ceiling_at >= $4 "
	"ORDER BY created_at LIMIT 1 FOR UPDATE SKIP LOCKED",
	4,
	{TEXTOID, BYTEAOID, TIMESTAMPTZOID, TIMESTAMPTZOID},
	.generic = true};

static const char *const warm_without[] = {"enable_seqscan", "enable_bitmapscan", "enable_sort",
										   "jit"};

/* As terminate() has it: next_check_at is left alone while somebody holds a lease. */
static DbQuery claim_query = {
	"UPDATE agentvm.session SET state = 'ready', warm_key = NULL, detail = NULL, "
	"ready_at = clock_timestamp(), agent_id = $2, tags = $3, idempotency_key = $4, "
	"args_hash = $5, created_by = $6, deadline_at = $7, ceiling_at = least(ceiling_at, $8), "
	"payload_enc = $9, payload_key_id = nullif($10, key_id), "
	"next_check_at = CASE WHEN lease IS NULL THEN least(next_check_at, $7) "
	"ELSE next_check_at END WHERE session_id = $1 RETURNING next_check_at, lane",
	10,
	{UUIDOID, TEXTOID, JSONBOID, TEXTOID, BYTEAOID, NAMEOID, TIMESTAMPTZOID, TIMESTAMPTZOID,
	 BYTEAOID, TEXTOID}};

static DbKey hydrating_key = {{"session_hydrating"}, {"session_hydrating_pkey"}, F_UUID_EQ};
static DbInsert hydrating_insert = {{"session_hydrating"}, 1, {"session_id"}};

/* It waits for nobody: a gateway has one connection for all its VMs. */
static DbQuery hydrated_query = {
	"WITH own AS MATERIALIZED (SELECT session_id FROM agentvm.session_hydrating "
	"WHERE session_id = $1 FOR UPDATE NOWAIT) "
	"DELETE FROM agentvm.session_hydrating h USING own WHERE h.session_id = own.session_id",
	1,
	{UUIDOID}};

/* Sessions that a transaction has taken, and which one. */
static LocalTransactionId claimed_in = InvalidLocalTransactionId;
static List *claimed = NIL; /* of pg_uuid_t *, in TopTransactionContext */

bool
warm_claimed_here(const pg_uuid_t *id)
{
	ListCell *lc;

	if (claimed_in != AvmLocalTransactionId())
		return false;
	foreach (lc, claimed)
	{
		if (memcmp(lfirst(lc), id, UUID_LEN) == 0)
			return true;
	}
	return false;
}

static void
note_claim(const pg_uuid_t *id)
{
	MemoryContext old = MemoryContextSwitchTo(TopTransactionContext);
	pg_uuid_t *copy = palloc(sizeof(pg_uuid_t));

	*copy = *id;
	if (claimed_in != AvmLocalTransactionId())
		claimed = NIL; /* the list went with its transaction */
	claimed_in = AvmLocalTransactionId();
	claimed = lappend(claimed, copy);
	MemoryContextSwitchTo(old);
}

/* Whether the team has any warm VM, of whatever shape; nearly all have none. */
static bool
has_warm(const char *team_id)
{
	Relation index = index_open(db_relation_oid(&warm_key.index), AccessShareLock);
	bool used = RelationGetNumberOfBlocks(index) > 1; /* more than the page that says what it is */
	Datum key;
	DbLookup lookup;
	bool found;

	index_close(index, NoLock);
	if (!used)
		return false;
	key = CStringGetTextDatum(team_id);
	db_lookup_begin(&lookup, &warm_key, 1, &key);
	found = db_lookup_next(&lookup) != NULL;
	db_lookup_end(&lookup);
	return found;
}

bool
warm_may_take(const char *team_id)
{
	char *problem;

	return has_warm(team_id) && identity_look(&problem) == IDENTITY_IN_ORDER;
}

/* Take a warm VM into *id; false where there is none. */
static bool
claim_warm(const WarmClaim *claim, pg_uuid_t *id)
{
	const Request *request = claim->request;
	bytea *payload = NULL;
	char *key_id = NULL;
	Datum values[10] = {CStringGetTextDatum(request->team_id), PointerGetDatum(claim->shape),
						TimestampTzGetDatum(claim->now), TimestampTzGetDatum(claim->deadline)};
	char nulls[10];
	bool isnull;

	db_plan_without(warm_without, lengthof(warm_without));
	db_run(&warm_query, values, NULL);
	if (SPI_processed == 0)
		return false;
	*id = *DatumGetUUIDP(db_value(0, 1, &isnull));
	if (claim->has_payload)
		payload = request_payload(request, session_text(id), &key_id);

	memset(nulls, ' ', sizeof(nulls));
	values[0] = UUIDPGetDatum(id);
	db_set_text(values, nulls, 1, request->agent_id);
	values[2] = JsonbPGetDatum(request->tags);
	db_set_text(values, nulls, 3, request->idempotency_key);
	nulls[4] = claim->hash ? ' ' : 'n';
	values[4] = PointerGetDatum(claim->hash);
	values[5] = NameGetDatum(claim->created_by);
	values[6] = TimestampTzGetDatum(claim->deadline);
	values[7] = TimestampTzGetDatum(claim->ceiling);
	nulls[8] = payload ? ' ' : 'n';
	values[8] = PointerGetDatum(payload);
	db_set_text(values, nulls, 9, key_id);
	db_run(&claim_query, values, nulls);
	wake_after_lock(DatumGetInt16(db_value(0, 2, &isnull)),
					DatumGetTimestampTz(db_value(0, 1, &isnull)));
	if (claim->runtime)
		db_insert(&hydrating_insert, values, NULL);
	note_claim(id);
	return true;
}

/*
 * The same; where somebody else's transaction with the same idempotency key has
 * committed meanwhile, his session it is, and the VM stays what it was.  Lock and
 * change are both in the subtransaction: a row that two transactions of one family
 * have marked would stay in the way of claims until a vacuum.
 */
static bool
claim_warm_once(const WarmClaim *claim, pg_uuid_t *id)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	volatile bool failed = false;
	volatile bool found = false;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		found = claim_warm(claim, id);
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		ErrorData *error = abort_subtransaction(context, owner);

		if (error->sqlerrcode != ERRCODE_UNIQUE_VIOLATION)
			ReThrowError(error);
		failed = true;
	}
	PG_END_TRY();
	if (failed && !request_find(claim->request, claim->hash, id))
		request_raise_conflict(claim->request);
	return failed || found;
}

bool
warm_claim(const WarmClaim *claim, pg_uuid_t *id)
{
	return claim->hash != NULL ? claim_warm_once(claim, id) : claim_warm(claim, id);
}

void
warm_hydrated(const pg_uuid_t *id)
{
	Datum values[1] = {UUIDPGetDatum(id)};

	db_run(&hydrated_query, values, NULL);
}

bool
warm_is_hydrating(const pg_uuid_t *id)
{
	Datum values[1] = {UUIDPGetDatum(id)};
	DbLookup lookup;
	DbScope scope;
	bool found;

	db_enter(&scope);
	db_lookup_begin(&lookup, &hydrating_key, 1, values);
	found = db_lookup_next(&lookup) != NULL;
	db_lookup_end(&lookup);
	db_leave(&scope);
	return found;
}
