/*-------------------------------------------------------------------------
 *
 * provision.c
 *		provision() and provision_warm(): checks, quota and one row, all in the caller's transaction.
 *
 * Nothing is called here.  The row becomes visible to the dispatchers when the
 * caller commits, and is due at once; a rollback leaves nothing.
 *
 * Quota.  A team without limits takes a shared lock on its name in the lock
 * manager and never queues.  A team with limits takes the exclusive one, as late
 * as can be, and counts its live sessions with a snapshot taken after the lock
 * was granted, at whatever isolation level the caller runs: all that was
 * committed by holders before us is seen, and nobody comes after us before our
 * transaction has ended.  The engine never needs this lock.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/identity.h"
#include "engine/placement.h"
#include "engine/session_row.h"
#include "engine/shared.h"
#include "engine/wake.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "providers/provider.h"
#include "secret/credentials.h"
#include "session/request.h"
#include "session/session.h"
#include "session/warm.h"
#include "team/team.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_provision);
PG_FUNCTION_INFO_V1(agentvm_provision_warm);

/* What team, profile and provider configuration add. 0 and NULL: nothing said. */
typedef struct Resolved
{
	int64 max_sessions; /* -1: no limit, as for the two below */
	int64 max_vcpus;
	int64 max_memory_mib;
	int64 min_lifetime_s;
	int64 team_max_lifetime_s;
	int64 profile_max_lifetime_s;
	int64 bootstrap_timeout_s;
	int64 heartbeat_timeout_s;
	bool has_profile;
	char *profile_provider;
	char *team_provider;
	int vcpus;
	int memory_mib;
	int disk_gib;
	int runtime; /* -1: not said */
	Jsonb *profile_options;
	Jsonb *team_options;
	bool has_secrets;
	bool locked; /* the team is, and has no limits that count sessions */
} Resolved;

static DbQuery profile_query = {
	"SELECT provider, options, vcpus, memory_mib, disk_gib, runtime, "
	"extract(epoch FROM max_lifetime)::int8, extract(epoch FROM bootstrap_timeout)::int8, "
	"extract(epoch FROM heartbeat_timeout)::int8 FROM agentvm.profile "
	"WHERE name = $2 AND (team_id = $1 OR team_id IS NULL) ORDER BY team_id NULLS LAST LIMIT 1",
	2,
	{TEXTOID, TEXTOID}};

static DbKey team_key = {{"team"}, {"team_pkey"}, F_TEXTEQ};
static DbKey team_member_key = {{"team_member"}, {"team_member_pkey"}, F_TEXTEQ};
static DbKey provider_config_key = {{"provider_config"}, {"provider_config_pkey"}, F_TEXTEQ};
static DbKey provider_secret_key = {{"provider_secret"}, {"provider_secret_pkey"}, F_TEXTEQ};

/* Columns of agentvm.team and its satellites, in the order of the tables. */
enum
{
	TEAM_PROVIDER = 2,
	TEAM_MAX_SESSIONS,
	TEAM_MAX_VCPUS,
	TEAM_MAX_MEMORY_MIB,
	TEAM_MIN_LIFETIME,
	TEAM_MAX_LIFETIME,
	TEAM_BOOTSTRAP_TIMEOUT,
	TEAM_HEARTBEAT_TIMEOUT
};
#define MEMBER_ROLE 2
#define CONFIG_OPTIONS 3

/* Terminating sessions still count; no more is counted than is needed to refuse. */
static DbQuery count_query = {"SELECT count(*) FROM (SELECT FROM agentvm.session WHERE team_id = "
							  "$1 AND ended_at IS NULL LIMIT $2) s",
							  2,
							  {TEXTOID, INT8OID}};

static DbQuery sum_query = {
	"SELECT coalesce(sum(vcpus), 0), coalesce(sum(memory_mib), 0) FROM agentvm.session "
	"WHERE team_id = $1 AND ended_at IS NULL",
	1,
	{TEXTOID}};

/* In the order of the values that provision() gives. */
static DbInsert session_insert = {{"session"},
								  24,
								  {"session_id",
								   "team_id",
								   "agent_id",
								   "provider",
								   "profile",
								   "created_at",
								   "deadline_at",
								   "ceiling_at",
								   "tags",
								   "idempotency_key",
								   "created_by",
								   "args_hash",
								   "options",
								   "vcpus",
								   "memory_mib",
								   "disk_gib",
								   "runtime",
								   "bootstrap_timeout",
								   "heartbeat_timeout",
								   "payload_enc",
								   "key_id",
								   "lane",
								   "next_check_at",
								   "warm_key"}};
#define NUM_INSERT_ARGS 24

static DbQuery insert_once_query = {
	"INSERT INTO agentvm.session (session_id, team_id, agent_id, provider, profile, created_at, "
	"deadline_at, ceiling_at, tags, idempotency_key, created_by, args_hash, options, vcpus, "
	"memory_mib, disk_gib, runtime, bootstrap_timeout, heartbeat_timeout, payload_enc, key_id, "
	"lane, next_check_at, warm_key) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, "
	"$13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24) "
	"ON CONFLICT (team_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING",
	NUM_INSERT_ARGS,
	{UUIDOID,		 TEXTOID,		 TEXTOID,  TEXTOID, TEXTOID,		TIMESTAMPTZOID,
	 TIMESTAMPTZOID, TIMESTAMPTZOID, JSONBOID, TEXTOID, NAMEOID,		BYTEAOID,
	 JSONBOID,		 INT4OID,		 INT4OID,  INT4OID, BOOLOID,		INTERVALOID,
	 INTERVALOID,	 BYTEAOID,		 TEXTOID,  INT2OID, TIMESTAMPTZOID, BYTEAOID}};

/* ---- resolution ---- */

static int64
int_or(int column, int64 fallback)
{
	bool isnull;
	Datum value = db_value(0, column, &isnull);

	if (isnull)
		return fallback;
	switch (SPI_gettypeid(SPI_tuptable->tupdesc, column))
	{
		case INT4OID:
			return DatumGetInt32(value);
		case BOOLOID:
			return DatumGetBool(value) ? 1 : 0;
		default:
			return DatumGetInt64(value);
	}
}

static Jsonb *
jsonb_or_null(int column)
{
	bool isnull;
	Datum value = db_value(0, column, &isnull);

	return isnull ? NULL : (Jsonb *) PG_DETOAST_DATUM_COPY(value);
}

/* What the profile says, if one is asked for and exists. */
static void
resolve_profile(const Request *request, Resolved *resolved)
{
	Datum values[2];

	resolved->runtime = -1;
	if (request->profile == NULL)
		return;
	values[0] = CStringGetTextDatum(request->team_id);
	values[1] = CStringGetTextDatum(request->profile);
	db_run(&profile_query, values, NULL);
	resolved->has_profile = SPI_processed > 0;
	if (resolved->has_profile)
	{
		resolved->profile_provider = db_text(0, 1, CurrentMemoryContext);
		resolved->profile_options = jsonb_or_null(2);
		resolved->vcpus = int_or(3, 0);
		resolved->memory_mib = int_or(4, 0);
		resolved->disk_gib = int_or(5, 0);
		resolved->runtime = int_or(6, -1);
		resolved->profile_max_lifetime_s = int_or(7, 0);
		resolved->bootstrap_timeout_s = int_or(8, 0);
		resolved->heartbeat_timeout_s = int_or(9, 0);
	}
	SPI_freetuptable(SPI_tuptable);
}

/* An integer or (in seconds) interval column of the team's row, or the fallback. */
static int64
team_number(const DbLookup *lookup, HeapTuple row, int column, int64 fallback)
{
	bool isnull;
	Datum value = db_lookup_value(lookup, row, column, &isnull);
	Interval *interval;

	if (isnull)
		return fallback;
	if (column < TEAM_MIN_LIFETIME)
		return DatumGetInt32(value);
	interval = DatumGetIntervalP(value);
	return interval->time / USECS_PER_SEC +
		   (interval->day + INT64CONST(30) * interval->month) * SECS_PER_DAY;
}

/* Read the team's row into "resolved"; false when there is none. */
static bool
read_team(const char *team_id, Resolved *resolved)
{
	Datum key = CStringGetTextDatum(team_id);
	DbLookup lookup;
	HeapTuple row;

	db_lookup_begin(&lookup, &team_key, 1, &key);
	row = db_lookup_next(&lookup);
	if (row != NULL)
	{
		bool isnull;
		Datum provider = db_lookup_value(&lookup, row, TEAM_PROVIDER, &isnull);

		resolved->team_provider = isnull ? NULL : TextDatumGetCString(provider);
		resolved->max_sessions = team_number(&lookup, row, TEAM_MAX_SESSIONS, -1);
		resolved->max_vcpus = team_number(&lookup, row, TEAM_MAX_VCPUS, -1);
		resolved->max_memory_mib = team_number(&lookup, row, TEAM_MAX_MEMORY_MIB, -1);
		resolved->min_lifetime_s = team_number(&lookup, row, TEAM_MIN_LIFETIME, 0);
		resolved->team_max_lifetime_s = team_number(&lookup, row, TEAM_MAX_LIFETIME, 0);
		if (resolved->bootstrap_timeout_s == 0)
			resolved->bootstrap_timeout_s =
				team_number(&lookup, row, TEAM_BOOTSTRAP_TIMEOUT, avm_bootstrap_timeout_s);
		if (resolved->heartbeat_timeout_s == 0)
			resolved->heartbeat_timeout_s =
				team_number(&lookup, row, TEAM_HEARTBEAT_TIMEOUT, avm_heartbeat_timeout_s);
	}
	db_lookup_end(&lookup);
	return row != NULL;
}

/* Whether "role" has the rights of one of the team's members; a dropped member is none. */
static bool
acts_for_team(const char *team_id, Oid role)
{
	Datum key = CStringGetTextDatum(team_id);
	DbLookup lookup;
	HeapTuple row;
	bool found = false;

	if (caller_is_admin(role))
		return true;
	db_lookup_begin(&lookup, &team_member_key, 1, &key);
	while (!found && (row = db_lookup_next(&lookup)) != NULL)
	{
		bool isnull;
		Oid member = DatumGetObjectId(db_lookup_value(&lookup, row, MEMBER_ROLE, &isnull));

		found = has_privs_of_role(role, member);
	}
	db_lookup_end(&lookup);
	return found;
}

/* The team's own settings for a provider, and whether it has credentials for it. */
static void
read_provider_config(const char *team_id, const char *provider, Resolved *resolved)
{
	Datum keys[2] = {CStringGetTextDatum(team_id), CStringGetTextDatum(provider)};
	DbLookup lookup;
	HeapTuple row;

	db_lookup_begin(&lookup, &provider_config_key, 2, keys);
	row = db_lookup_next(&lookup);
	if (row != NULL)
	{
		bool isnull;

		resolved->team_options =
			(Jsonb *) PG_DETOAST_DATUM_COPY(db_lookup_value(&lookup, row, CONFIG_OPTIONS, &isnull));
	}
	db_lookup_end(&lookup);
	if (row == NULL)
		return;
	db_lookup_begin(&lookup, &provider_secret_key, 2, keys);
	resolved->has_secrets = db_lookup_next(&lookup) != NULL;
	db_lookup_end(&lookup);
}

/* The provider that a session gets: the caller's word, then the profile's, the team's, the server's. */
static const char *
provider_name(const Request *request, const Resolved *resolved)
{
	return request->provider			? request->provider
		   : resolved->profile_provider ? resolved->profile_provider
		   : resolved->team_provider	? resolved->team_provider
										: avm_default_provider;
}

static bool
is_limited(const Resolved *resolved)
{
	return resolved->max_sessions >= 0 || resolved->max_vcpus >= 0 || resolved->max_memory_mib >= 0;
}

static void
resolve(const Request *request, Oid role, Resolved *resolved)
{
	const char *team_id = request->team_id;

	resolve_profile(request, resolved);
	if (!acts_for_team(team_id, role))
		raise_no_such_team(team_id);
	/* what is read under the lock stays true: a team without limits need not be read again */
	resolved->locked = team_lock_at_once(team_id, ShareLock);
	if (!read_team(team_id, resolved))
		raise_no_such_team(team_id);
	if (resolved->locked && is_limited(resolved))
	{
		team_unlock(team_id, ShareLock);
		resolved->locked = false;
	}
	read_provider_config(team_id, provider_name(request, resolved), resolved);
}

/* Team's options, overridden by the profile's, overridden by the caller's. */
static Jsonb *
merge_options(const Provider *provider, const Resolved *resolved, const Request *request)
{
	Jsonb *merged =
		provider_merge_options(provider, resolved->team_options, resolved->profile_options);

	return provider_merge_options(provider, merged, request->options);
}

static const Provider *
resolve_provider(const Request *request, const Resolved *resolved)
{
	if (request->profile != NULL && !resolved->has_profile)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
						errmsg("profile \"%s\" does not exist for team \"%s\"", request->profile,
							   request->team_id)));
	if (request->provider != NULL && resolved->profile_provider != NULL &&
		strcmp(request->provider, resolved->profile_provider) != 0)
		ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
						errmsg("provider \"%s\" contradicts profile \"%s\", which is for \"%s\"",
							   request->provider, request->profile, resolved->profile_provider)));
	return provider_get(provider_name(request, resolved));
}

/* Lifetime in seconds, and the ceiling that extend() may reach. */
static int64
resolve_lifetime(const Request *request, const Resolved *resolved, int64 *ceiling)
{
	int64 lifetime;

	*ceiling = avm_max_lifetime_ceiling_s;
	if (resolved->team_max_lifetime_s > 0)
		*ceiling = Min(*ceiling, resolved->team_max_lifetime_s);

	if (request->max_lifetime_s == 0)
	{
		lifetime = resolved->profile_max_lifetime_s > 0 ? resolved->profile_max_lifetime_s
														: avm_max_lifetime_s;
		lifetime = Min(lifetime, *ceiling);
		return Max(lifetime, Min(resolved->min_lifetime_s, *ceiling));
	}
	if (request->max_lifetime_s > *ceiling)
		ereport(
			ERROR,
			(errcode(AVM_OVER_LIMIT),
			 errmsg("max_lifetime is %lld s, but at most %lld s are allowed for team \"%s\"",
					(long long) request->max_lifetime_s, (long long) *ceiling, request->team_id)));
	if (request->max_lifetime_s < resolved->min_lifetime_s)
		ereport(ERROR,
				(errcode(AVM_OVER_LIMIT),
				 errmsg("max_lifetime is %lld s, but at least %lld s are asked of team \"%s\"",
						(long long) request->max_lifetime_s, (long long) resolved->min_lifetime_s,
						request->team_id)));
	return request->max_lifetime_s;
}

/*
 * The same of a warm VM: how long it waits, and a ceiling by which whoever takes it still
 * has all the time that he may ask for.
 */
static int64
resolve_idle_timeout(const Request *request, int64 *ceiling)
{
	if (request->idle_timeout_s > *ceiling)
		ereport(
			ERROR,
			(errcode(AVM_OVER_LIMIT),
			 errmsg("idle_timeout is %lld s, but at most %lld s are allowed for team \"%s\"",
					(long long) request->idle_timeout_s, (long long) *ceiling, request->team_id)));
	*ceiling += request->idle_timeout_s;
	return request->idle_timeout_s;
}

static bool
resolve_runtime(const Provider *provider, const Resolved *resolved, Jsonb *options)
{
	bool runtime = resolved->runtime >= 0 ? resolved->runtime : provider->runtime_default;

	runtime = option_bool(options, "runtime", runtime);
	if (runtime && avm_gateway_url[0] == '\0')
		ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
						errmsg("a session with a runtime needs agentvm.gateway_url"),
						errhint("Set agentvm.gateway_url to the URL that VMs reach a gateway at, "
								"or use a profile with runtime = false.")));
	return runtime;
}

/* ---- quota ---- */

static void
over_quota(const char *team_id, const char *what, int64 limit, int64 used, int64 wanted)
{
	ereport(ERROR,
			(errcode(AVM_QUOTA),
			 errmsg("team \"%s\" is at its limit (%s = %lld)", team_id, what, (long long) limit),
			 errdetail("%lld are in use, %lld more were asked for.", (long long) used,
					   (long long) wanted),
			 errhint("Sessions that are ending still count until they have ended.")));
}

/* Lock the team until the end of the transaction, as its limits ask, and read them again. */
static void
lock_for_quota(const char *team_id, Resolved *resolved)
{
	bool exclusive = is_limited(resolved);

	while (!resolved->locked)
	{
		LOCKMODE mode = exclusive ? ExclusiveLock : ShareLock;

		team_lock(team_id, mode);
		/* alter_team() and drop_team() take the lock, too */
		if (!read_team(team_id, resolved))
			raise_no_such_team(team_id);
		resolved->locked = exclusive || !is_limited(resolved);
		if (!resolved->locked)
		{
			/* it got a limit between our first look and the lock */
			team_unlock(team_id, mode);
			exclusive = true;
		}
	}
}

/* Under the lock: is there room for one more? */
static void
check_quota(const char *team_id, const Resolved *resolved)
{
	Datum values[2] = {CStringGetTextDatum(team_id), (Datum) 0};
	bool isnull;

	if (resolved->max_sessions >= 0)
	{
		int64 used;

		values[1] = Int64GetDatum(resolved->max_sessions);
		db_run(&count_query, values, NULL);
		used = DatumGetInt64(db_value(0, 1, &isnull));
		SPI_freetuptable(SPI_tuptable);
		if (used >= resolved->max_sessions)
			over_quota(team_id, "max_sessions", resolved->max_sessions, used, 1);
	}
	if (resolved->max_vcpus >= 0 || resolved->max_memory_mib >= 0)
	{
		int64 vcpus;
		int64 memory;

		db_run(&sum_query, values, NULL);
		vcpus = DatumGetInt64(db_value(0, 1, &isnull));
		memory = DatumGetInt64(db_value(0, 2, &isnull));
		SPI_freetuptable(SPI_tuptable);
		if ((resolved->max_vcpus >= 0 && resolved->vcpus == 0) ||
			(resolved->max_memory_mib >= 0 && resolved->memory_mib == 0))
			ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
							errmsg("team \"%s\" has a limit on vCPUs or memory, but the session's "
								   "size is not known",
								   team_id),
							errhint("Use a profile that states vcpus and memory_mib.")));
		if (resolved->max_vcpus >= 0 && vcpus + resolved->vcpus > resolved->max_vcpus)
			over_quota(team_id, "max_vcpus", resolved->max_vcpus, vcpus, resolved->vcpus);
		if (resolved->max_memory_mib >= 0 &&
			memory + resolved->memory_mib > resolved->max_memory_mib)
			over_quota(team_id, "max_memory_mib", resolved->max_memory_mib, memory,
					   resolved->memory_mib);
	}
}

/* ---- identity ---- */

/*
 * A version 7 UUID (RFC 9562): milliseconds, then microseconds within them in
 * the 12 bits of rand_a so that ids of one backend sort by time, then random.
 */
void
session_make_id(pg_uuid_t *id, TimestampTz now)
{
	int64 us = now + (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY;
	uint64 ms = us / 1000;
	uint32 sub = (uint32) ((us % 1000) * 4096 / 1000);
	int i;

	if (!pg_strong_random(id->data + 8, 8))
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not generate random values")));
	for (i = 0; i < 6; i++)
		id->data[i] = (unsigned char) (ms >> (8 * (5 - i)));
	id->data[6] = 0x70 | (sub >> 8);
	id->data[7] = sub & 0xff;
	id->data[8] = 0x80 | (id->data[8] & 0x3f);
}

/* SHA-256 of all that a VM is made of, so that one can stand for another. */
static bytea *
hash_shape(const Request *request, const Provider *provider, const Resolved *resolved,
		   Jsonb *options, bool runtime)
{
	bytea *hash = palloc(VARHDRSZ + SHA256_LEN);
	StringInfoData all;

	initStringInfo(&all);
	appendStringInfo(&all, "%s\n%s%s\n%d %d %d %d %lld\n", provider->name,
					 request->profile ? "profile " : "", request->profile ? request->profile : "",
					 resolved->vcpus, resolved->memory_mib, resolved->disk_gib, runtime,
					 (long long) resolved->heartbeat_timeout_s);
	(void) JsonbToCString(&all, &options->root, VARSIZE(options));
	SET_VARSIZE(hash, VARHDRSZ + SHA256_LEN);
	sha256_bytes(all.data, all.len, (uint8 *) VARDATA(hash));
	pfree(all.data);
	return hash;
}

/* Calling where nobody works is never a silent no-op; said once per transaction. */
static void
warn_unless_served(int lane)
{
	static LocalTransactionId warned = InvalidLocalTransactionId;

	if (shared_serving(lane) > 0 || warned == AvmLocalTransactionId())
		return;
	warned = AvmLocalTransactionId();
	if (lane == LANE_BLOCKING)
	{
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("no agentvm runner serves this database, so the session is not launched"),
				 errhint("Row \"runner\" of agentvm.health says why. CALL agentvm.dispatch() does "
						 "not launch it either.")));
		return;
	}
	ereport(WARNING,
			(errcode(ERRCODE_WARNING),
			 errmsg("no agentvm dispatcher serves this database, so the session is not launched by "
					"itself"),
			 shared_available()
				 ? errhint("Add the database to agentvm.databases, or run CALL agentvm.dispatch().")
				 : errhint("Add agentvm to shared_preload_libraries and restart, or run CALL "
						   "agentvm.dispatch() from time to time.")));
}

/* A session for the request, into *id */
static void
provision(const Request *request, pg_uuid_t *id)
{
	Oid role = GetUserId();
	Name created_by = palloc0(sizeof(NameData));
	Resolved resolved = {0};
	Interval bootstrap_timeout = {0};
	Interval heartbeat_timeout = {0};
	const Provider *provider;
	Jsonb *options;
	DbScope scope;
	Datum values[NUM_INSERT_ARGS];
	char nulls[NUM_INSERT_ARGS];
	bytea *hash = NULL;
	bytea *payload = NULL;
	bytea *shape = NULL; /* of warm VMs */
	char *key_id = NULL;
	bool runtime;
	bool has_payload;
	int64 lifetime;
	int64 ceiling;
	int lane;
	TimestampTz now = GetCurrentTimestamp();

	namestrcpy(created_by, GetUserNameFromId(role, false));

	db_enter(&scope);
	resolve(request, role, &resolved);
	/* before anything that may have changed since the key was first used: profile, provider, quota */
	if (request->idempotency_key != NULL)
	{
		hash = request_hash(request);
		if (request_find(request, hash, id))
		{
			db_leave(&scope);
			return;
		}
	}
	provider = resolve_provider(request, &resolved);
	if (JB_ROOT_COUNT(request->options) > 0)
		provider_check_options(provider, OPTIONS_CALLER, request->options);
	options = merge_options(provider, &resolved, request);
	provider_check_options(provider, OPTIONS_LAUNCH, options);
	if (provider->needs_secrets && !resolved.has_secrets && !credentials_of_server(provider->name))
		ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
						errmsg("team \"%s\" has no credentials for provider \"%s\"",
							   request->team_id, provider->name),
						errhint("An administrator sets them with agentvm.set_provider().")));
	lifetime = resolve_lifetime(request, &resolved, &ceiling);
	if (request->idle_timeout_s > 0)
		lifetime = resolve_idle_timeout(request, &ceiling);
	runtime = resolve_runtime(provider, &resolved, options);
	if (provider->check_launch != NULL)
		provider->check_launch(options, runtime);
	lane = provider->perform != NULL ? LANE_BLOCKING : LANE_HTTP;
	if (provider->placed)
	{
		if (resolved.vcpus == 0)
			resolved.vcpus = PLACEMENT_VCPUS;
		if (resolved.memory_mib == 0)
			resolved.memory_mib = PLACEMENT_MEMORY_MIB;
		placement_check(provider->name, resolved.vcpus, resolved.memory_mib);
	}

	identity_take_into_use();
	has_payload = JB_ROOT_COUNT(request->env) > 0 || JB_ROOT_COUNT(request->repos) > 0;
	if (has_payload && !runtime)
		ereport(
			WARNING,
			(errcode(ERRCODE_WARNING),
			 errmsg(
				 "env and repos are ignored: the session has no runtime that could receive them"),
			 hide_caller()));
	if (request->idle_timeout_s > 0 || warm_may_take(request->team_id))
		shape = hash_shape(request, provider, &resolved, options, runtime);
	if (shape != NULL && request->idle_timeout_s == 0)
	{
		WarmClaim claim = {.request = request,
						   .shape = shape,
						   .hash = hash,
						   .created_by = created_by,
						   .runtime = runtime,
						   .has_payload = has_payload && runtime,
						   .now = now,
						   .deadline = now + lifetime * USECS_PER_SEC,
						   .ceiling = now + ceiling * USECS_PER_SEC};

		if (warm_claim(&claim, id))
		{
			db_leave(&scope);
			return;
		}
		shape = NULL;
	}

	session_make_id(id, now);
	if (runtime && has_payload)
		payload = request_payload(request, session_text(id), &key_id);
	else if (runtime)
		key_id = keyring_current_id();

	memset(nulls, ' ', sizeof(nulls));
	values[0] = UUIDPGetDatum(id);
	values[1] = CStringGetTextDatum(request->team_id);
	db_set_text(values, nulls, 2, request->agent_id);
	values[3] = CStringGetTextDatum(provider->name);
	db_set_text(values, nulls, 4, request->profile);
	values[5] = TimestampTzGetDatum(now);
	values[6] = TimestampTzGetDatum(now + lifetime * USECS_PER_SEC);
	values[7] = TimestampTzGetDatum(now + ceiling * USECS_PER_SEC);
	values[8] = JsonbPGetDatum(request->tags);
	db_set_text(values, nulls, 9, request->idempotency_key);
	values[10] = NameGetDatum(created_by);
	nulls[11] = hash ? ' ' : 'n';
	values[11] = PointerGetDatum(hash);
	values[12] = JsonbPGetDatum(options);
	nulls[13] = resolved.vcpus > 0 ? ' ' : 'n';
	values[13] = Int32GetDatum(resolved.vcpus);
	nulls[14] = resolved.memory_mib > 0 ? ' ' : 'n';
	values[14] = Int32GetDatum(resolved.memory_mib);
	nulls[15] = resolved.disk_gib > 0 ? ' ' : 'n';
	values[15] = Int32GetDatum(resolved.disk_gib);
	values[16] = BoolGetDatum(runtime);
	bootstrap_timeout.time = resolved.bootstrap_timeout_s * USECS_PER_SEC;
	values[17] = IntervalPGetDatum(&bootstrap_timeout);
	heartbeat_timeout.time = resolved.heartbeat_timeout_s * USECS_PER_SEC;
	values[18] = IntervalPGetDatum(&heartbeat_timeout);
	nulls[19] = payload ? ' ' : 'n';
	values[19] = PointerGetDatum(payload);
	db_set_text(values, nulls, 20, key_id);
	values[21] = Int16GetDatum(lane);
	values[22] = TimestampTzGetDatum(now);
	nulls[23] = shape ? ' ' : 'n';
	values[23] = PointerGetDatum(shape);

	lock_for_quota(request->team_id, &resolved);
	if (is_limited(&resolved))
	{
		/* whoever held the lock before us may have used our key, and the last room with it */
		if (request->idempotency_key != NULL && request_find(request, hash, id))
		{
			db_leave(&scope);
			return;
		}
		check_quota(request->team_id, &resolved);
	}
	if (request->idempotency_key == NULL)
		db_insert(&session_insert, values, nulls);
	else
	{
		db_run(&insert_once_query, values, nulls);
		if (SPI_processed == 0)
		{
			/* somebody else's transaction with the same key committed first */
			if (!request_find(request, hash, id))
				request_raise_conflict(request);
			db_leave(&scope);
			return;
		}
	}
	event_add(id, request->team_id, "state", NULL, "provisioning", NULL, NULL);
	db_leave(&scope);

	wake_workers(lane, now);
	warn_unless_served(lane);
}

static bool
has_content(FunctionCallInfo fcinfo, int argument)
{
	return !PG_ARGISNULL(argument) && JB_ROOT_COUNT(PG_GETARG_JSONB_P(argument)) > 0;
}

/* env and repos may hold secrets: no message shows the statement, whoever raises it. */
Datum
agentvm_provision(PG_FUNCTION_ARGS)
{
	pg_uuid_t *id = palloc(sizeof(pg_uuid_t));
	Request request = {0};
	HiddenCaller hidden;

	hide_caller_begin(&hidden);
	if (has_content(fcinfo, 5) || has_content(fcinfo, 6))
		hide_activity("agentvm.provision()");
	PreventCommandDuringRecovery("agentvm.provision()");
	request_read(fcinfo, &request);
	provision(&request, id);
	hide_caller_end(&hidden);
	PG_RETURN_UUID_P(id);
}

Datum
agentvm_provision_warm(PG_FUNCTION_ARGS)
{
	pg_uuid_t *id = palloc(sizeof(pg_uuid_t));
	Request request = {0};

	PreventCommandDuringRecovery("agentvm.provision_warm()");
	request_read_warm(fcinfo, &request);
	provision(&request, id);
	PG_RETURN_UUID_P(id);
}
