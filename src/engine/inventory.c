/*-------------------------------------------------------------------------
 *
 * inventory.c
 *		Lists of the VMs in an account and region, taken by the engine beside its sessions,
 *		or by a backend at once.
 *
 * A list is a series of calls: the pages of the list itself; then, of sessions whose
 * VM it lacks, what has become of those; and when what it means is written
 * (drift.c), the end of VMs that nobody needs.  All that is kept between the calls is in
 * memory: a list that is lost with its process is begun anew once its lease has run
 * out.  What ends a VM is committed before the call, and each call can be repeated.
 *
 * Whoever writes about a place has its row of agentvm.inventory locked; who cannot have
 * it at once, since a user has, gives the list up.
 *
 * The calls take tokens of the same buckets as those of sessions (rate.c).  A page for which
 * there is none is asked for later; so is one that is refused for that reason.
 *
 * Each place is listed once per interval, from a moment of its own on, so that the
 * calls are spread out; where there is nothing, once in twelve.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/ask.h"
#include "engine/identity.h"
#include "engine/inventory.h"
#include "engine/placement.h"
#include "engine/question.h"
#include "engine/retry.h"
#include "engine/shared.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "secret/credentials.h"
#include "storage/lock.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_sweep_inventory);

#define LEASE_S 300			 /* of a list, all its calls together, and longer if it has to wait */
#define MAX_REFUSED 8		 /* times in a row a call is repeated that the account does not grant */
#define IDLE_FACTOR 12		 /* intervals between lists where there is nothing */
#define SELDOM 5000			 /* times what it takes until all sessions are gone through again */
#define MAX_ERROR 300		 /* bytes kept */
#define CALL_MS 20000		 /* of a backend that sweeps */
#define WAIT_FOR_OTHERS_S 60 /* how long such a backend waits for a list under way */

static DbQuery claim_query = {
	"WITH due AS MATERIALIZED (SELECT account, provider, region FROM agentvm.inventory "
	"WHERE lane = $1 AND next_at <= clock_timestamp() ORDER BY next_at LIMIT $2 "
	"FOR UPDATE SKIP LOCKED) "
	"UPDATE agentvm.inventory i SET lease = $3, next_at = clock_timestamp() + $4 * interval '1 s' "
	"FROM due WHERE i.account = due.account AND i.provider = due.provider "
	"AND i.region = due.region RETURNING i.account, i.provider, i.region, i.failures",
	4,
	{INT2OID, INT4OID, INT8OID, INT4OID},
	.generic = true};

static DbQuery next_query = {
	"SELECT next_at FROM agentvm.inventory WHERE lane = $1 ORDER BY next_at LIMIT 1",
	1,
	{INT2OID},
	.generic = true};

static DbQuery lock_query = {
	"SELECT FROM agentvm.inventory WHERE account = $1 AND provider = $2 AND region = $3 "
	"AND lease = $4 FOR UPDATE SKIP LOCKED",
	4,
	{TEXTOID, TEXTOID, TEXTOID, INT8OID},
	.generic = true};

/* With the row locked: $5 when it is due; $6 whether the lease goes on until then. */
static DbQuery reschedule_query = {
	"UPDATE agentvm.inventory SET lease = CASE WHEN $6 THEN lease END, next_at = $5 "
	"WHERE account = $1 AND provider = $2 AND region = $3 AND lease = $4",
	6,
	{TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, BOOLOID},
	.generic = true};

/* With the row locked: $5 begun at, if it was whole; $6 VMs; $7 the error; $8 ms until the next. */
static DbQuery finish_query = {
	"UPDATE agentvm.inventory SET lease = NULL, listed_at = coalesce($5, listed_at), "
	"vms = CASE WHEN $5 IS NULL THEN vms ELSE $6 END, error = $7, "
	"failures = CASE WHEN $7 IS NULL THEN 0 ELSE failures + 1 END, "
	"active_at = CASE WHEN $5 IS NOT NULL AND $6 > 0 "
	"AND active_at IS DISTINCT FROM 'infinity' THEN clock_timestamp() ELSE active_at END, "
	"next_at = clock_timestamp() + (CASE WHEN $7 IS NULL AND $6 = 0 "
	"AND coalesce(active_at < clock_timestamp() - 2 * $8 * interval '1 ms', true) "
	"THEN $9 ELSE 1 END) * $8 * interval '1 ms' "
	"WHERE account = $1 AND provider = $2 AND region = $3 AND lease = $4",
	9,
	{TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INT4OID, TEXTOID, FLOAT8OID, INT4OID},
	.generic = true};

/*
 * ON CONFLICT alone would wait for whoever has a row locked that he has changed.
 *
 * Places with live sessions; and those that a team's configuration names, where a VM may be
 * whose session was lost with a primary.  With $3 all sessions are gone through, without it one
 * of each place that is known (LIMIT: whatever the planner thinks of their number).
 */
static DbQuery refresh_query = {
	"WITH c AS MATERIALIZED (SELECT c.team_id, c.provider, c.options FROM "
	"agentvm.provider_config c WHERE c.provider = ANY ($1) AND (c.options ? 'role_arn' "
	"OR EXISTS (SELECT FROM agentvm.provider_secret s WHERE s.team_id = c.team_id "
	"AND s.provider = c.provider))), "
	"w AS (SELECT team_id, provider, region, bool_or(active) AS active FROM ("
	"SELECT DISTINCT team_id, provider, region, true AS active FROM agentvm.session "
	"WHERE $3 AND ended_at IS NULL AND lane = 0 AND region IS NOT NULL AND provider = ANY ($1) "
	"UNION ALL SELECT i.account, i.provider, i.region, true FROM agentvm.inventory i, LATERAL "
	"(SELECT FROM agentvm.session s WHERE s.team_id = i.account AND s.ended_at IS NULL "
	"AND s.lane = 0 AND s.provider = i.provider AND s.region = i.region LIMIT 1) one "
	"WHERE NOT $3 AND i.lane = 0 AND i.provider = ANY ($1) "
	"UNION ALL SELECT team_id, provider, options->>'region', false FROM c "
	"UNION ALL SELECT c.team_id, c.provider, p.options->>'region', false FROM c "
	"JOIN agentvm.profile p ON p.provider = c.provider "
	"AND (p.team_id = c.team_id OR p.team_id IS NULL)) o WHERE region IS NOT NULL "
	"GROUP BY team_id, provider, region), "
	"gone AS MATERIALIZED (SELECT account, provider, region FROM agentvm.inventory i "
	"WHERE lane = 0 AND NOT EXISTS (SELECT FROM w WHERE w.team_id = i.account "
	"AND w.provider = i.provider AND w.region = i.region) "
	/* without credentials, or where nothing has been for long, there is nothing to ask */
	"AND (NOT EXISTS (SELECT FROM c WHERE c.team_id = i.account AND c.provider = i.provider) "
	"OR coalesce(active_at < clock_timestamp() - interval '1 day', true)) "
	"FOR UPDATE SKIP LOCKED), "
	"drift AS (DELETE FROM agentvm.vm_drift d USING gone WHERE d.account = gone.account "
	"AND d.provider = gone.provider AND d.region = gone.region), "
	"forgotten AS (DELETE FROM agentvm.inventory i USING gone WHERE i.account = gone.account "
	"AND i.provider = gone.provider AND i.region = gone.region), "
	"busy AS MATERIALIZED (SELECT i.account, i.provider, i.region FROM agentvm.inventory i "
	"JOIN w ON w.team_id = i.account AND w.provider = i.provider AND w.region = i.region "
	"WHERE w.active AND coalesce(i.active_at < clock_timestamp() - $2 * interval '1 ms', true) "
	"FOR UPDATE OF i SKIP LOCKED), "
	"marked AS (UPDATE agentvm.inventory i SET active_at = clock_timestamp(), "
	"next_at = least(next_at, clock_timestamp() + $2 * random() * interval '1 ms') FROM busy "
	"WHERE i.account = busy.account AND i.provider = busy.provider AND i.region = busy.region) "
	"INSERT INTO agentvm.inventory (account, provider, region, lane, next_at, active_at) "
	"SELECT team_id, provider, region, 0, clock_timestamp() + $2 * random() * interval '1 ms', "
	"CASE WHEN active THEN clock_timestamp() END FROM w WHERE NOT EXISTS (SELECT "
	"FROM agentvm.inventory i WHERE i.account = w.team_id AND i.provider = w.provider "
	"AND i.region = w.region) ON CONFLICT DO NOTHING",
	3,
	{TEXTARRAYOID, FLOAT8OID, BOOLOID}};

/* Our own hosts, of the placed providers $1. */
static DbQuery hosts_query = {
	"WITH w AS (SELECT p AS provider, h.name AS region FROM agentvm.host h, "
	"unnest($1::text[]) AS p WHERE h.enabled OR EXISTS (SELECT FROM agentvm.placement o "
	"WHERE o.host = h.name)), "
	"gone AS MATERIALIZED (SELECT account, provider, region FROM agentvm.inventory i "
	"WHERE lane = 1 AND NOT EXISTS (SELECT FROM w WHERE w.provider = i.provider "
	"AND w.region = i.region) FOR UPDATE SKIP LOCKED), "
	"drift AS (DELETE FROM agentvm.vm_drift d USING gone WHERE d.account = gone.account "
	"AND d.provider = gone.provider AND d.region = gone.region), "
	"forgotten AS (DELETE FROM agentvm.inventory i USING gone WHERE i.account = gone.account "
	"AND i.provider = gone.provider AND i.region = gone.region) "
	"INSERT INTO agentvm.inventory (account, provider, region, lane, next_at, active_at) "
	"SELECT '', provider, region, 1, clock_timestamp() + $2 * random() * interval '1 ms', "
	"'infinity' FROM w WHERE NOT EXISTS (SELECT FROM agentvm.inventory i WHERE i.account = '' "
	"AND i.provider = w.provider AND i.region = w.region) ON CONFLICT DO NOTHING",
	2,
	{TEXTARRAYOID, FLOAT8OID}};

static DbQuery cluster_query = {"SELECT installation_id::text FROM agentvm.installation ORDER BY "
								"in_use DESC, created_at LIMIT 1",
								0,
								{0}};

static DbQuery places_query = {
	"SELECT account, provider, region FROM agentvm.inventory i WHERE $1 IS NULL OR account = $1 "
	"ORDER BY account, provider, region",
	1,
	{TEXTOID}};

/* For itself alone: a lease stands for somebody whose process may have died. */
static DbQuery take_query = {
	"WITH free AS MATERIALIZED (SELECT FROM agentvm.inventory WHERE account = $1 "
	"AND provider = $2 AND region = $3 AND (lease IS NULL OR next_at <= clock_timestamp()) "
	"FOR UPDATE SKIP LOCKED) "
	"UPDATE agentvm.inventory SET lease = $4 WHERE account = $1 AND provider = $2 "
	"AND region = $3 AND EXISTS (SELECT FROM free) RETURNING failures",
	4,
	{TEXTOID, TEXTOID, TEXTOID, INT8OID}};

static DbQuery there_query = {
	"SELECT FROM agentvm.inventory WHERE account = $1 AND provider = $2 AND region = $3",
	3,
	{TEXTOID, TEXTOID, TEXTOID}};

static DbQuery count_query = {
	"SELECT count(*) FROM agentvm.vm_drift WHERE $1 IS NULL OR team_id = $1", 1, {TEXTOID}};

static int64
fresh_number(void)
{
	uint64 bits;

	if (!pg_strong_random(&bits, sizeof(bits)))
		elog(ERROR, "could not generate a lease number");
	return (int64) (bits & PG_INT64_MAX);
}

static Inventory *
make_inventory(MemoryContext parent, const char *account, const char *provider, const char *region,
			   int64 lease, int failures)
{
	MemoryContext context =
		AllocSetContextCreate(parent, "agentvm inventory", ALLOCSET_SMALL_SIZES);
	Inventory *inventory = MemoryContextAllocZero(context, sizeof(Inventory));

	inventory->context = context;
	inventory->step =
		AllocSetContextCreate(context, "agentvm inventory call", ALLOCSET_DEFAULT_SIZES);
	inventory->place.account = MemoryContextStrdup(context, account);
	inventory->place.provider = MemoryContextStrdup(context, provider);
	inventory->place.region = MemoryContextStrdup(context, region);
	inventory->lease = lease;
	inventory->failures = failures;
	inventory->started_at = GetCurrentTimestamp();
	inventory->leased_until = inventory->started_at + LEASE_S * USECS_PER_SEC;
	return inventory;
}

List *
inventory_claim(MemoryContext parent, int lane, int limit)
{
	int64 lease = fresh_number();
	Datum values[4] = {Int16GetDatum(lane), Int32GetDatum(limit), Int64GetDatum(lease),
					   Int32GetDatum(LEASE_S)};
	List *claimed = NIL;
	uint64 i;

	if (avm_inventory_interval_s == 0)
		return NIL;
	db_run(&claim_query, values, NULL);
	for (i = 0; i < SPI_processed; i++)
	{
		bool isnull;

		claimed = lappend(claimed, make_inventory(parent, db_text(i, 1, CurrentMemoryContext),
												  db_text(i, 2, CurrentMemoryContext),
												  db_text(i, 3, CurrentMemoryContext), lease,
												  DatumGetInt32(db_value(i, 4, &isnull))));
	}
	SPI_freetuptable(SPI_tuptable);
	return claimed;
}

TimestampTz
inventory_next(int lane)
{
	Datum values[1] = {Int16GetDatum(lane)};
	TimestampTz next = DT_NOEND;
	bool isnull;

	if (avm_inventory_interval_s == 0)
		return next;
	db_run(&next_query, values, NULL);
	if (SPI_processed > 0)
		next = DatumGetTimestampTz(db_value(0, 1, &isnull));
	SPI_freetuptable(SPI_tuptable);
	return next;
}

static void
set_inventory(Datum *values, const Inventory *inventory)
{
	values[0] = CStringGetTextDatum(inventory->place.account);
	values[1] = CStringGetTextDatum(inventory->place.provider);
	values[2] = CStringGetTextDatum(inventory->place.region);
	values[3] = Int64GetDatum(inventory->lease);
}

/* Have the row to ourselves until the end of the transaction; false: it is somebody else's. */
static bool
lock_row(const Inventory *inventory)
{
	Datum values[4];

	set_inventory(values, inventory);
	db_run(&lock_query, values, NULL);
	return SPI_processed > 0;
}

/* The list is over: whole, unless it has failed before anything could be written. */
static void
finish(const Inventory *inventory, bool whole)
{
	Datum values[9];
	char nulls[9] = {' ', ' ', ' ', ' ', ' ', ' ', ' ', ' ', ' '};
	double interval_ms = Max(avm_inventory_interval_s, 1) * 1000.0;

	if (!lock_row(inventory))
		return;
	set_inventory(values, inventory);
	nulls[4] = whole ? ' ' : 'n';
	values[4] = TimestampTzGetDatum(inventory->started_at);
	values[5] = Int32GetDatum(inventory->vms);
	nulls[6] = inventory->error != NULL ? ' ' : 'n';
	if (inventory->error != NULL)
	{
		values[6] = CStringGetTextDatum(inventory->error);
		interval_ms = Min(interval_ms, retry_delay_ms(inventory->failures + 1, interval_ms));
	}
	values[7] = Float8GetDatum(interval_ms);
	values[8] = Int32GetDatum(IDLE_FACTOR);
	db_run(&finish_query, values, nulls);
}

/*
 * Let somebody begin the list at that time, or have it ourselves until then; false: it is
 * somebody else's.
 */
static bool
reschedule(const Inventory *inventory, TimestampTz at, bool keep)
{
	Datum values[6];

	if (!lock_row(inventory))
		return false;
	set_inventory(values, inventory);
	values[4] = TimestampTzGetDatum(at);
	values[5] = BoolGetDatum(keep);
	db_run(&reschedule_query, values, NULL);
	return true;
}

/* Have the list until then, and for as long as it may take; false: it is somebody else's. */
static bool
keep_until(Inventory *inventory, TimestampTz later)
{
	if (later + LEASE_S / 2 * USECS_PER_SEC <= inventory->leased_until)
		return true;
	inventory->leased_until = later + LEASE_S * USECS_PER_SEC;
	return reschedule(inventory, inventory->leased_until, true);
}

/* Keep what has gone wrong, without any secret. */
static void
note_error(Inventory *inventory, const SecretSet *secrets, const char *code, const char *message)
{
	char *text = psprintf("%s%s%s", code != NULL ? code : "error", message != NULL ? ": " : "",
						  message != NULL ? message : "");

	text = secret_redact(secrets, text);
	text[pg_mbcliplen(text, strlen(text), MAX_ERROR)] = '\0';
	inventory->error = MemoryContextStrdup(inventory->context, text);
}

static List *
keep_texts(Inventory *inventory, List *texts)
{
	MemoryContext old = MemoryContextSwitchTo(inventory->context);
	List *kept = NIL;
	ListCell *lc;

	foreach (lc, texts)
		kept = lappend(kept, pstrdup(lfirst(lc)));
	MemoryContextSwitchTo(old);
	return kept;
}

static Jsonb *
keep_document(Inventory *inventory, Jsonb *document)
{
	Jsonb *copy = MemoryContextAlloc(inventory->context, VARSIZE(document));

	memcpy(copy, document, VARSIZE(document));
	return copy;
}

/* Keep a page of an operation. */
static void
keep_page(Inventory *inventory, Jsonb *page)
{
	List **pages = inventory->phase == INVENTORY_LIST	? &inventory->pages
				   : inventory->phase == INVENTORY_LOOK ? &inventory->looked
														: &inventory->reaped;
	MemoryContext old;

	page = keep_document(inventory, page);
	old = MemoryContextSwitchTo(inventory->context);
	*pages = lappend(*pages, page);
	MemoryContextSwitchTo(old);
}

static ProviderOp
operation_of(const Inventory *inventory)
{
	return inventory->phase == INVENTORY_REAP ? OP_REAP : OP_LIST;
}

/* Begin to end what is to be ended; false: there is nothing more. */
static bool
begin_reaping(Inventory *inventory)
{
	List *sessions;
	List *ids = drift_to_end(&inventory->place, inventory->started_at, &sessions);

	inventory->phase = INVENTORY_REAP;
	inventory->handle = NULL;
	inventory->reaped = NIL;
	inventory->ids = keep_texts(inventory, ids);
	inventory->sessions = keep_texts(inventory, sessions);
	return ids != NIL;
}

/* The operation is over: go on to the next one; false: that was all. */
static bool
go_on(Inventory *inventory, int millis)
{
	Place *place = &inventory->place;

	inventory->handle = NULL;
	switch (inventory->phase)
	{
		case INVENTORY_LIST:
			inventory->missed =
				keep_texts(inventory, drift_missed(place, inventory->pages, inventory->started_at));
			inventory->phase = INVENTORY_LOOK;
			/* FALLTHROUGH */
		case INVENTORY_LOOK:
			inventory->ids = NIL;
			for (; inventory->asked < list_length(inventory->missed) &&
				   list_length(inventory->ids) < AVM_MAX_LISTED;
				 inventory->asked++)
			{
				MemoryContext old = MemoryContextSwitchTo(inventory->context);

				inventory->ids =
					lappend(inventory->ids, list_nth(inventory->missed, inventory->asked));
				MemoryContextSwitchTo(old);
			}
			if (inventory->ids != NIL)
				return true;
			if (!lock_row(inventory))
				return false;
			inventory->vms = drift_write(place, inventory->pages, inventory->missed,
										 inventory->looked, inventory->started_at);
			break;
		case INVENTORY_REAP:
			if (!lock_row(inventory))
				return false;
			drift_log_end(place, inventory->ids, inventory->reaped, inventory->error, millis);
			break;
	}
	if (begin_reaping(inventory))
		return true;
	finish(inventory, true);
	return false;
}

/*
 * The account does not grant the call yet that the handle asks for.  As long as the list has
 * nothing, not even a refusal, there is nothing to keep for it.
 */
static void
wait_until(Inventory *inventory, TimestampTz later, InventoryTurn *turn)
{
	if (inventory->phase == INVENTORY_LIST && inventory->pages == NIL && inventory->refused == 0)
		(void) reschedule(inventory, later, false);
	else if (keep_until(inventory, later))
	{
		inventory->waited = true;
		turn->later = later;
	}
}

/*
 * Whether an answer to a call that takes tokens says that the account grants no more, and the
 * call is to be repeated.  The end of VMs may begin anew with each repetition, so that there
 * only the end of the operation counts as progress.
 */
static bool
is_refused(Inventory *inventory, const ProviderStep *step, const CallRate *rate)
{
	if (step->kind != STEP_FAILED || step->error_class != CLASS_THROTTLED)
	{
		if (inventory->phase != INVENTORY_REAP || step->kind == STEP_DONE)
			inventory->refused = 0;
	}
	else if (rate != NULL && avm_api_rate > 0)
		return ++inventory->refused <= MAX_REFUSED;
	return false;
}

/*
 * Whether a call may be made now; else when: *later.  One for another page queues like a new
 * one; ends are few, and may have waited before they began anew.
 */
static bool
is_granted(const Inventory *inventory, const CallRate *rate, Rates *rates, int peers,
		   TimestampTz *later)
{
	bool next_page = inventory->phase != INVENTORY_REAP && inventory->pages != NIL;
	RateClaim claim = next_page && !inventory->waited ? RATE_NEW : RATE_WAITED;

	return rates == NULL || rate == NULL ||
		   rates_admit(rates, rate, peers, claim, GetCurrentTimestamp(), later);
}

/* What the calls of the operation are signed with. */
static void
find_login(const Inventory *inventory, const Provider *provider, const Credentials *credentials,
		   Jsonb *options, const char *cluster, LoginFound *found)
{
	LoginContext login = {0};

	login.op = operation_of(inventory);
	login.cluster = cluster;
	login.external_id = credentials->external_id;
	login.options = options;
	login.team_options = credentials->options;
	login.secrets = credentials->secrets;
	login.now = GetCurrentTimestamp();
	login_find(provider, &login, found);
}

/* The turn itself; raises where the database does. */
static void
take_turn(Inventory *inventory, const HttpReply *reply, Rates *rates, int peers,
		  InventoryTurn *turn)
{
	CallRate *answered = rates != NULL ? inventory->rate : NULL;
	const Provider *provider = provider_find(inventory->place.provider);
	ProviderHost *host = NULL;
	Credentials *credentials;
	Jsonb *options;
	char *cluster;

	inventory->rate = NULL;
	if (provider == NULL || !provider->lists)
	{
		note_error(inventory, NULL, "UnknownProvider", inventory->place.provider);
		finish(inventory, false);
		return;
	}
	if (provider->placed)
		host = placement_host_named(inventory->place.region);
	if (provider->placed && host == NULL)
	{
		note_error(inventory, NULL, "NoHost", "there is no host of this name any more");
		finish(inventory, false);
		return;
	}
	db_run(&cluster_query, NULL, NULL);
	cluster = db_text(0, 1, CurrentMemoryContext);
	/* what is to be sent after the commit refers to the secrets */
	credentials =
		credentials_load(inventory->place.account, inventory->place.provider, inventory->step);
	options = credentials->options;
	if (options == NULL)
		options = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum("{}")));
	for (;;)
	{
		ProviderContext context = {0};
		ProviderStep step;
		LoginFound login;
		TimestampTz later;
		int millis = reply != NULL ? reply->millis : 0;
		MemoryContext old;

		if (reply != NULL && inventory->call.login.id != 0 && !inventory->call.again &&
			provider->login_expired(reply))
		{
			/* the same once more, with a new one */
			login_forget(&inventory->call.login);
			inventory->call.again = true;
			reply = NULL;
		}
		find_login(inventory, provider, credentials, options, cluster, &login);
		if (login.secrets == NULL && login.failed)
		{
			note_error(inventory, NULL, login.error_code, login.error_message);
			finish(inventory, inventory->phase == INVENTORY_REAP);
			return;
		}
		context.op = operation_of(inventory);
		context.cluster = cluster;
		context.host = host;
		context.region = inventory->place.region;
		context.vm_ids = inventory->ids;
		context.vm_sessions = inventory->sessions;
		context.options = options;
		context.secrets = login.secrets;
		context.login_pending = login.secrets == NULL;
		context.external_id = credentials->external_id;
		context.handle = inventory->handle;
		context.reply = reply;
		context.now = GetCurrentTimestamp();
		old = MemoryContextSwitchTo(inventory->step);
		provider_step(provider, &context, &step);
		MemoryContextSwitchTo(old);

		if (step.kind == STEP_REQUEST && context.login_pending)
		{
			/* taken again, with the same answer's lack, once there is something to sign with */
			turn->wait_for = login.ref;
			return;
		}
		if (reply != NULL)
			shared_count_call(provider->name, inventory->call.operation, step.error_class,
							  reply->millis);
		if (reply != NULL && answered != NULL)
		{
			rates_learn(rates, answered->bucket, answered->account, step.error_class,
						context.now - millis * INT64CONST(1000), context.now);
			if (step.account != NULL)
				rates_same_account(rates, answered->account, step.account, context.now);
		}
		if (reply != NULL && is_refused(inventory, &step, answered))
		{
			/* the same once more, when there is a token */
			reply = NULL;
			continue;
		}
		if (step.result != NULL)
			keep_page(inventory, step.result);
		if (step.error_class != CLASS_NONE)
			note_error(inventory, login.secrets, step.error_code, step.error_message);
		switch (step.kind)
		{
			case STEP_REQUEST:
				if (step.handle != NULL)
					inventory->handle = keep_document(inventory, step.handle);
				if (!is_granted(inventory, step.rate, rates, peers, &later))
				{
					wait_until(inventory, later, turn);
					return;
				}
				inventory->waited = false;
				inventory->call.operation = MemoryContextStrdup(inventory->context, step.operation);
				inventory->call.login = login.ref;
				inventory->rate = step.rate;
				turn->request = step.request;
				return;
			case STEP_DONE:
				break;
			case STEP_WAIT: /* there is nothing to wait for */
			case STEP_FAILED:
				if (inventory->error == NULL)
					note_error(inventory, NULL, "StepFailed", NULL);
				if (inventory->phase == INVENTORY_REAP)
				{
					/* the list was whole, and the log is to tell of what was asked for */
					if (lock_row(inventory))
						drift_log_end(&inventory->place, inventory->ids, inventory->reaped,
									  inventory->error, millis);
				}
				finish(inventory, inventory->phase == INVENTORY_REAP);
				return;
		}
		inventory->call.again = false;
		reply = NULL;
		if (!go_on(inventory, millis))
			return;
	}
}

void
inventory_turn(Inventory *inventory, const HttpReply *reply, Rates *rates, int peers,
			   InventoryTurn *turn)
{
	MemoryContext memory = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	MemoryContext done = inventory->step; /* with the reply in it */

	memset(turn, 0, sizeof(*turn));
	inventory->step =
		AllocSetContextCreate(inventory->context, "agentvm inventory call", ALLOCSET_DEFAULT_SIZES);
	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(memory);
	PG_TRY();
	{
		take_turn(inventory, reply, rates, peers, turn);
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(memory);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		ErrorData *error = abort_subtransaction(memory, owner);

		memset(turn, 0, sizeof(*turn));
		note_error(inventory, NULL, "TurnFailed", error->message);
		finish(inventory, false);
	}
	PG_END_TRY();
	MemoryContextDelete(done);
}

/* ---- where to list ---- */

/* Claim the work of a refresh until the end of the transaction; false: somebody else is at it. */
static bool
claim_refresh(bool wait)
{
	Oid table = get_relname_relid("inventory", get_namespace_oid("agentvm", false));
	LOCKTAG tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, table, 0, 0);
	return LockAcquire(&tag, ExclusiveLock, false, !wait) != LOCKACQUIRE_NOT_AVAIL;
}

static void
refresh(bool all)
{
	Datum values[3];

	values[2] = BoolGetDatum(all);
	values[1] = Float8GetDatum(Max(avm_inventory_interval_s, 1) * 1000.0);
	for (int placed = 0; placed <= 1; placed++)
	{
		values[0] = db_text_array(provider_names_listing(placed == 1));
		db_run(placed == 1 ? &hosts_query : &refresh_query, values, NULL);
	}
	drift_look_for_failover();
}

void
inventory_refresh(void)
{
	static TimestampTz next_all = 0;
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz longest = avm_inventory_interval_s * USECS_PER_SEC * IDLE_FACTOR;
	bool all = now >= next_all;

	if (!claim_refresh(false))
		return;
	refresh(all);
	if (all)
		next_all = now + Min((GetCurrentTimestamp() - now) * SELDOM, longest);
}

/* ---- SQL ---- */

/* Make this list with calls from this backend. */
static void
list_here(Inventory *inventory)
{
	const Provider *provider = provider_get(inventory->place.provider);
	HttpReply *reply = NULL;

	for (;;)
	{
		InventoryTurn turn;
		DbScope scope;

		db_enter(&scope);
		inventory_turn(inventory, reply, NULL, 1, &turn);
		db_leave(&scope);
		MemoryContextSwitchTo(inventory->step);
		reply = NULL;
		if (turn.request != NULL)
		{
			turn.request->timeout_ms = CALL_MS;
			reply = provider->perform != NULL ? question_ask(provider->name, turn.request)
											  : http_perform(turn.request);
		}
		else if (turn.wait_for.id != 0)
			ask_fetch_login(&turn.wait_for);
		else
			return;
	}
}

/* Take a place for ourselves, waiting for whoever lists it; NULL: it is gone, or takes too long. */
static Inventory *
take_place(const Place *place, MemoryContext context)
{
	TimestampTz until = GetCurrentTimestamp() + WAIT_FOR_OTHERS_S * USECS_PER_SEC;
	int64 lease = fresh_number();

	for (;;)
	{
		Datum values[4];
		DbScope scope;
		bool isnull;
		bool there = false;
		Inventory *inventory = NULL;

		db_enter(&scope);
		values[0] = CStringGetTextDatum(place->account);
		values[1] = CStringGetTextDatum(place->provider);
		values[2] = CStringGetTextDatum(place->region);
		values[3] = Int64GetDatum(lease);
		db_run(&take_query, values, NULL);
		if (SPI_processed > 0)
			inventory = make_inventory(context, place->account, place->provider, place->region,
									   lease, DatumGetInt32(db_value(0, 1, &isnull)));
		else
		{
			db_run(&there_query, values, NULL);
			there = SPI_processed > 0;
		}
		db_leave(&scope);
		if (inventory != NULL || !there || GetCurrentTimestamp() > until)
			return inventory;
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 50,
						 AvmWaitEvent("AgentvmInventory"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

Datum
agentvm_sweep_inventory(PG_FUNCTION_ARGS)
{
	MemoryContext caller = CurrentMemoryContext;
	Datum values[1] = {(Datum) 0};
	char nulls[1] = {PG_ARGISNULL(0) ? 'n' : ' '};
	List *places = NIL;
	DbScope scope;
	ListCell *lc;
	int64 count;
	bool isnull;
	uint64 i;

	require_admin("sweep the inventory");
	if (!PG_ARGISNULL(0))
		values[0] = CStringGetTextDatum(check_identifier(PG_GETARG_TEXT_PP(0), "team_id"));
	if (!identity_permits("agentvm.sweep_inventory()"))
		PG_RETURN_INT32(0);

	db_enter(&scope);
	(void) claim_refresh(true);
	refresh(true);
	db_run(&places_query, values, nulls);
	MemoryContextSwitchTo(caller);
	for (i = 0; i < SPI_processed; i++)
	{
		Place *place = palloc(sizeof(Place));

		place->account = db_text(i, 1, caller);
		place->provider = db_text(i, 2, caller);
		place->region = db_text(i, 3, caller);
		places = lappend(places, place);
	}
	db_leave(&scope);
	MemoryContextSwitchTo(caller);

	foreach (lc, places)
	{
		Inventory *inventory = take_place(lfirst(lc), caller);

		CHECK_FOR_INTERRUPTS();
		if (inventory == NULL)
			continue;
		login_tidy(inventory);
		list_here(inventory);
		MemoryContextSwitchTo(caller);
		MemoryContextDelete(inventory->context);
	}

	db_enter(&scope);
	db_run(&count_query, values, nulls);
	count = DatumGetInt64(db_value(0, 1, &isnull));
	db_leave(&scope);
	PG_RETURN_INT32((int32) count);
}
