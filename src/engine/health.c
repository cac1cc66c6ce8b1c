/*-------------------------------------------------------------------------
 *
 * health.c
 *		The rows of views health, stat_provider and stat_dispatcher.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "access/xlog.h"
#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/identity.h"
#include "engine/shared.h"
#include "funcapi.h"
#include "procedure.h"
#include "secret/key_use.h"
#include "secret/secret.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_health);
PG_FUNCTION_INFO_V1(agentvm_stat_provider);
PG_FUNCTION_INFO_V1(agentvm_stat_dispatcher);

#define STUCK_RETRIES 3 /* failed tries after which an operator should look */
#define ONE_REFUSAL                                                                                \
	0.5 /* of the published rate is what a refusal leaves; that alone is no trouble */

static DbQuery stuck_query = {
	"SELECT count(*) FILTER (WHERE state = 'terminating' AND retries >= $1), "
	"count(*) FILTER (WHERE state = 'provisioning' AND retries >= $1), "
	"count(*) FILTER (WHERE next_check_at < clock_timestamp() - $2 * interval '1 ms'), "
	"count(*) FILTER (WHERE lane = 1), "
	"count(*) FILTER (WHERE state IN ('pausing', 'resuming') AND retries >= $1) "
	"FROM agentvm.session WHERE ended_at IS NULL",
	2,
	{INT4OID, INT4OID}};

static DbQuery hold_query = {
	"SELECT sweep || ' sweep would end ' || would_end || ' sessions, and has held since ' || "
	"to_char(held_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS \"UTC\"') FROM agentvm.sweep_hold",
	0,
	{0}};

static DbQuery inventory_query = {"SELECT count(*) FILTER (WHERE failures >= $1), max(account || ' "
								  "in ' || region || ': ' || error) "
								  "FILTER (WHERE failures >= $1), count(*) FROM agentvm.inventory",
								  1,
								  {INT4OID}};

static DbQuery quarantine_query = {
	"SELECT 'since ' || to_char(max(quarantined_since) AT TIME ZONE 'UTC', "
	"'YYYY-MM-DD HH24:MI:SS \"UTC\"'), (SELECT count(*) FROM agentvm.vm_drift WHERE quarantined) "
	"FROM agentvm.installation WHERE in_use",
	0,
	{0}};

static int64
count_at(int column)
{
	bool isnull;

	return DatumGetInt64(db_value(0, column, &isnull));
}

static void
put_check(ReturnSetInfo *rsinfo, const char *name, bool ok, const char *detail)
{
	Datum values[3] = {CStringGetTextDatum(name), BoolGetDatum(ok), (Datum) 0};
	bool nulls[3] = {false, false, detail == NULL};

	if (detail != NULL)
		values[2] = CStringGetTextDatum(detail);
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

static void
put_count(ReturnSetInfo *rsinfo, const char *name, int64 count, const char *what)
{
	put_check(rsinfo, name, count == 0, psprintf("%lld %s", (long long) count, what));
}

/* How many dispatchers serve this database, and why there are not as many as are asked for. */
static void
put_dispatchers(ReturnSetInfo *rsinfo)
{
	int serving = shared_serving(LANE_HTTP);
	Shortage shortage = SHORT_OF_NOTHING;
	bool launcher = shared_available() && shared_launcher(&shortage);
	const char *why;

	if (RecoveryInProgress())
	{
		put_check(rsinfo, "dispatcher", true, "this is a standby: dispatchers start at promotion");
		return;
	}
	if (!shared_available())
		why = "agentvm is not in shared_preload_libraries: only CALL agentvm.dispatch() works here";
	else if (!launcher)
		why = "the launcher does not run: see max_worker_processes and the server's log";
	else if (avm_dispatchers == 0)
		why = "agentvm.dispatchers is 0";
	else if (serving < avm_dispatchers && shortage == SHORT_OF_WORKERS)
		why = psprintf("max_worker_processes (%d) leaves no room for more", max_worker_processes);
	else if (serving < avm_dispatchers && shortage == SHORT_OF_SLOTS)
		why = psprintf("no more than %d can run in one cluster", MAX_DISPATCHERS);
	else if (serving == 0)
		why = "see agentvm.databases";
	else
		why = NULL;

	put_check(rsinfo, "dispatcher", serving > 0 && why == NULL,
			  psprintf("%d of %d dispatchers serve this database%s%s", serving, avm_dispatchers,
					   why ? ": " : "", why ? why : ""));
}

/* Whether lists of VMs come, and whether an administrator is to decide about some. */
static void
put_inventory(ReturnSetInfo *rsinfo)
{
	Datum values[1] = {Int32GetDatum(STUCK_RETRIES)};
	char *since;
	int64 count;

	db_run(&inventory_query, values, NULL);
	count = count_at(1);
	put_check(rsinfo, "inventory", count == 0,
			  count > 0 ? psprintf("%lld of %lld lists of VMs fail, of which %s", (long long) count,
								   (long long) count_at(3), db_text(0, 2, CurrentMemoryContext))
						: psprintf("%lld lists of VMs are made", (long long) count_at(3)));
	db_run(&quarantine_query, NULL, NULL);
	count = count_at(2);
	since = db_text(0, 1, CurrentMemoryContext);
	if (count > 0)
		put_check(rsinfo, "quarantine", false,
				  psprintf("%lld VMs without a session are left alone%s%s: see agentvm.drift, then "
						   "adopt_vm(), end_vm() or release_quarantine()",
						   (long long) count, since ? " " : "", since ? since : ""));
	else
		put_check(
			rsinfo, "quarantine", true,
			since
				? psprintf("%s VMs without a session would be left alone, but none is found", since)
				: "VMs without a session are ended by themselves");
}

/* Whether a runner serves this database where one is needed. */
static void
put_runner(ReturnSetInfo *rsinfo, int64 blocking_sessions)
{
	bool named = avm_provider_libraries[0] != '\0';
	int serving = shared_serving(LANE_BLOCKING);
	Shortage shortage = SHORT_OF_NOTHING;
	const char *why;

	if (RecoveryInProgress())
		put_check(rsinfo, "runner", true, "this is a standby: runners start at promotion");
	else if (serving > 0)
		put_check(rsinfo, "runner", true, "a runner serves this database");
	else if (!named && blocking_sessions == 0)
		put_check(rsinfo, "runner", true,
				  "none is needed: agentvm.provider_libraries names no library");
	else
	{
		if (!named)
			why = psprintf("%lld live sessions need one, but agentvm.provider_libraries names no "
						   "library",
						   (long long) blocking_sessions);
		else if (!shared_available())
			why = "agentvm is not in shared_preload_libraries";
		else if (!shared_launcher(&shortage))
			why = "the launcher does not run: see max_worker_processes and the server's log";
		else if (avm_dispatchers == 0)
			why = "agentvm.dispatchers is 0";
		else if (shortage == SHORT_OF_WORKERS)
			why =
				psprintf("max_worker_processes (%d) leaves no room for one", max_worker_processes);
		else
			why = "see agentvm.databases";
		put_check(rsinfo, "runner", false, psprintf("no runner serves this database: %s", why));
	}
}

/* Which accounts have been found to grant less than was published. */
static void
put_slowed(ReturnSetInfo *rsinfo)
{
	StringInfoData text;
	bool ok = true;
	int count;
	Slowed *slowed = shared_slowed(&count);
	int i;

	initStringInfo(&text);
	for (i = 0; i < count; i++)
	{
		appendStringInfo(&text, "%s%s: %d%%", i > 0 ? "; " : "", slowed[i].bucket,
						 (int) rint(slowed[i].factor * 100));
		ok = ok && slowed[i].factor >= ONE_REFUSAL;
	}
	put_check(rsinfo, "throttled", ok,
			  count == 0 ? "no account is called more slowly than published"
						 : psprintf("called more slowly than published: %s", text.data));
}

/* Whether the key file is usable, and has all keys that something needs. */
static void
put_keys(ReturnSetInfo *rsinfo)
{
	List *uses = key_uses();
	char *current;
	char *problem = keyring_problem(&current);
	StringInfoData missing;
	StringInfoData old;
	ListCell *lc;

	put_check(rsinfo, "key_file", problem == NULL || uses == NIL,
			  problem ? problem : "the key file is usable");

	initStringInfo(&missing);
	initStringInfo(&old);
	foreach (lc, uses)
	{
		KeyUse *use = (KeyUse *) lfirst(lc);
		/* the file may have become usable since: what we have said of it stands */
		bool there = current != NULL && keyring_key_problem(use->key_id) == NULL;
		StringInfo list = there ? &old : &missing;

		if (list == &missing || strcmp(use->key_id, current) != 0)
			appendStringInfo(list, "%s\"%s\": %s", list->len > 0 ? "; " : "", use->key_id,
							 key_use_text(use));
	}
	if (missing.len > 0)
		put_check(rsinfo, "keys", false,
				  psprintf("keys that are needed and that the key file lacks: %s", missing.data));
	else if (old.len > 0)
		put_check(rsinfo, "keys", true,
				  psprintf("keys that are needed beside the first one: %s", old.data));
	else
		put_check(rsinfo, "keys", true, "no key but the first one is needed");
}

Datum
agentvm_health(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Datum values[2] = {Int32GetDatum(STUCK_RETRIES), Int32GetDatum(2 * avm_sweep_interval_ms)};
	DbScope scope;
	char *version;
	char *problem;
	IdentityState identity;

	begin_set(fcinfo);
	put_dispatchers(rsinfo);

	version = extension_version(NULL);
	if (version == NULL || strcmp(version, AGENTVM_VERSION) != 0)
	{
		/* our tables are not what we know: there is no more to be said */
		put_check(rsinfo, "version", false,
				  psprintf("the extension is of version %s, the library of version %s: run ALTER "
						   "EXTENSION agentvm UPDATE, or install the newer library and restart",
						   version ? version : "(none)", AGENTVM_VERSION));
		return (Datum) 0;
	}
	put_check(rsinfo, "version", true,
			  psprintf("extension and library are of version %s", version));
	identity = identity_look(&problem);
	put_check(rsinfo, "identity", identity != IDENTITY_FOREIGN,
			  identity == IDENTITY_IN_ORDER ? "the sessions are this database's own"
			  : identity == IDENTITY_UNUSED
				  ? "not in use yet: the first create_team() or provision() begins"
				  : psprintf("nothing acts before agentvm.adopt_cluster('takeover' or 'fork'): %s",
							 problem));
	db_enter(&scope);

	put_keys(rsinfo);
	db_run(&stuck_query, values, NULL);
	put_count(rsinfo, "terminate", count_at(1),
			  "sessions cannot be terminated at their provider and are tried again");
	put_count(rsinfo, "launch", count_at(2),
			  "launches have failed several times and are tried again");
	put_count(rsinfo, "pause", count_at(5),
			  "pauses and resumes have failed several times and are tried again");
	put_count(rsinfo, "backlog", count_at(3),
			  "sessions are overdue for more than two sweep intervals");
	put_runner(rsinfo, count_at(4));
	put_slowed(rsinfo);
	put_inventory(rsinfo);

	db_run(&hold_query, NULL, NULL);
	put_check(rsinfo, "sweep_hold", SPI_processed == 0,
			  SPI_processed == 0 ? "no sweep holds" : db_text(0, 1, CurrentMemoryContext));
	db_leave(&scope);
	return (Datum) 0;
}

Datum
agentvm_stat_provider(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	ProviderStat *stats;
	int count;
	int i;

	begin_set(fcinfo);
	stats = shared_provider_stats(&count);
	for (i = 0; i < count; i++)
	{
		Datum values[12];
		bool nulls[12] = {false};
		int class;

		values[0] = CStringGetTextDatum(stats[i].provider);
		values[1] = CStringGetTextDatum(stats[i].operation);
		values[2] = Int64GetDatum(stats[i].calls);
		for (class = CLASS_CREDENTIALS; class < NUM_ERROR_CLASSES; class ++)
			values[2 + class] = Int64GetDatum(stats[i].errors[class]);
		values[10] = Float8GetDatum(shared_latency_quantile(&stats[i], 0.5));
		values[11] = Float8GetDatum(shared_latency_quantile(&stats[i], 0.99));
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	return (Datum) 0;
}

StaticAssertDecl(CLASS_CREDENTIALS == 1 && CLASS_PERMANENT == 7,
				 "columns of stat_provider follow the classes");

Datum
agentvm_stat_dispatcher(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	DispatcherSlot slots[MAX_WORKERS];
	int count = 0;
	int i;

	begin_set(fcinfo);
	if (!shared_available())
		return (Datum) 0;
	shared_lock(LW_SHARED);
	for (i = 0; i < MAX_WORKERS; i++)
	{
		if (shared_slots()[i].database == MyDatabaseId && shared_slots()[i].pid != 0)
			slots[count++] = shared_slots()[i];
	}
	shared_unlock();
	for (i = 0; i < count; i++)
	{
		Datum values[12];
		bool nulls[12] = {false};

		values[0] = Int32GetDatum(slots[i].index);
		values[1] = Int32GetDatum(slots[i].pid);
		values[2] = TimestampTzGetDatum(slots[i].started_at);
		values[3] = TimestampTzGetDatum(slots[i].last_pass_at);
		nulls[3] = slots[i].last_pass_at == 0;
		values[4] = Int32GetDatum(slots[i].in_flight);
		values[5] = Int64GetDatum(slots[i].passes);
		values[6] = Int64GetDatum(slots[i].claimed);
		values[7] = Int64GetDatum(slots[i].recorded);
		values[8] = Int64GetDatum(slots[i].stale_replies);
		values[9] = TimestampTzGetDatum(slots[i].sleeping_until);
		nulls[9] = slots[i].sleeping_until == DT_NOBEGIN || slots[i].sleeping_until == 0;
		values[10] = CStringGetTextDatum(slots[i].lane == LANE_BLOCKING ? "runner" : "dispatcher");
		values[11] = Int32GetDatum(slots[i].stuck);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	return (Datum) 0;
}
