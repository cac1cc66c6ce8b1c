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
 * Warm VMs.  provision() takes one, if there is one that is what a new one would
 * be: then it writes into that row what it would have written into a new one.
 * Whoever has such a row locked is passed by.  A team without warm VMs pays for one
 * look into an index that has nothing of it.
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
#include "engine/placement.h"
#include "engine/session_row.h"
#include "engine/shared.h"
#include "engine/turn.h"
#include "engine/wake.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "providers/provider.h"
#include "secret/credentials.h"
#include "secret/secret.h"
#include "session/session.h"
#include "storage/bufmgr.h"
#include "team/team.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/datum.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_provision);
PG_FUNCTION_INFO_V1(agentvm_provision_warm);

/* The arguments, checked. Strings are NULL where not given. */
typedef struct Request
{
	char *team_id;
	char *agent_id;
	char *profile;
	char *provider;
	char *idempotency_key;
	Jsonb *env;
	Jsonb *repos;
	Jsonb *tags;
	Jsonb *options;
	int64 max_lifetime_s; /* 0: not given */
	int64 idle_timeout_s; /* of a warm VM; 0: it is none */
} Request;

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

static DbQuery by_key_query = {
	"SELECT session_id, args_hash FROM agentvm.session WHERE team_id = $1 AND idempotency_key = $2",
	2,
	{TEXTOID, TEXTOID}};

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

/* ---- arguments ---- */

static char *
optional_identifier(FunctionCallInfo fcinfo, int argument, const char *name)
{
	return PG_ARGISNULL(argument) ? NULL : check_identifier(PG_GETARG_TEXT_PP(argument), name);
}

static Jsonb *
empty_document(char kind)
{
	return DatumGetJsonbP(
		DirectFunctionCall1(jsonb_in, CStringGetDatum(kind == 'o' ? "{}" : "[]")));
}

static Jsonb *
document(FunctionCallInfo fcinfo, int argument, char kind, const char *name)
{
	Jsonb *value;

	if (PG_ARGISNULL(argument))
		return empty_document(kind);
	value = PG_GETARG_JSONB_P(argument);
	check_document(value, kind, name);
	return value;
}

static void
bad_document(const char *argument, const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("%s has the wrong shape", argument),
			 errdetail("%s", detail), hide_caller()));
}

/* Whether a shell takes it as a variable's name. Letters are ASCII's, whatever the locale. */
static bool
is_variable_name(const char *name, int len)
{
	static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_";
	int i;

	for (i = 0; i < len; i++)
	{
		bool digit = name[i] >= '0' && name[i] <= '9';

		if (digit ? i == 0 : memchr(letters, name[i], sizeof(letters) - 1) == NULL)
			return false;
	}
	return len > 0;
}

void
check_env(Jsonb *env)
{
	JsonbIterator *it = JsonbIteratorInit(&env->root);
	JsonbIteratorToken token;
	JsonbValue v;

	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
		{
			if (!is_variable_name(v.val.string.val, v.val.string.len))
				bad_document("env", "Names of environment variables consist of letters, digits and "
									"_, and do not begin with a digit.");
		}
		else if (token == WJB_VALUE && v.type != jbvString)
			bad_document("env", "Values of environment variables are strings.");
	}
}

/* Tags: values that are strings, numbers or booleans. */
static void
check_tags(Jsonb *tags)
{
	JsonbIterator *it = JsonbIteratorInit(&tags->root);
	JsonbIteratorToken token;
	JsonbValue v;

	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		if (token == WJB_VALUE && v.type != jbvString && v.type != jbvNumeric && v.type != jbvBool)
			bad_document("tags", "Values of tags are strings, numbers or booleans.");
	}
}

/* Whether nothing is left of a path without its slashes. */
static bool
is_root(const char *path, int len)
{
	while (len > 0 && path[len - 1] == '/')
		len--;
	return len == 0;
}

/* Repositories: objects with url, and perhaps ref and path, all strings. */
static void
check_repos(Jsonb *repos)
{
	JsonbIterator *it = JsonbIteratorInit(&repos->root);
	JsonbIteratorToken token;
	JsonbValue v;

	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		JsonbIterator *members;
		JsonbValue m;
		bool has_url = false;
		bool is_url = false;
		bool is_path = false;

		if (token != WJB_ELEM)
			continue;
		if (v.type != jbvBinary || !JsonContainerIsObject(v.val.binary.data))
			bad_document("repos", "Each element is an object with url, and perhaps ref and path.");
		members = JsonbIteratorInit(v.val.binary.data);
		while ((token = JsonbIteratorNext(&members, &m, true)) != WJB_DONE)
		{
			if (token == WJB_KEY)
			{
				char *key = pnstrdup(m.val.string.val, m.val.string.len);

				is_url = strcmp(key, "url") == 0;
				is_path = strcmp(key, "path") == 0;
				if (!is_url && !is_path && strcmp(key, "ref") != 0)
					bad_document(
						"repos",
						psprintf("Unknown member \"%s\"; the known ones are url, ref and path.",
								 key));
			}
			else if (token == WJB_VALUE)
			{
				if (m.type != jbvString || m.val.string.len == 0)
					bad_document("repos", "url, ref and path are strings that are not empty.");
				if (is_path && is_root(m.val.string.val, m.val.string.len))
					ereport(ERROR,
							(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							 errmsg("repos has the wrong shape"),
							 errdetail("The path of a repository is \"/\"."),
							 errhint("Name a directory of its own, or leave path out: it then is "
									 "the last part of the URL."),
							 hide_caller()));
				has_url = has_url || is_url;
			}
		}
		if (!has_url)
			bad_document("repos", "Each element needs a url.");
	}
}

static char *
team_argument(FunctionCallInfo fcinfo)
{
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("team_id must not be null")));
	return check_identifier(PG_GETARG_TEXT_PP(0), "team_id");
}

static void
read_request(FunctionCallInfo fcinfo, Request *request)
{
	request->team_id = team_argument(fcinfo);
	request->agent_id = optional_identifier(fcinfo, 1, "agent_id");
	request->profile = optional_identifier(fcinfo, 2, "profile");
	request->provider = optional_identifier(fcinfo, 3, "provider");
	request->idempotency_key = optional_identifier(fcinfo, 4, "idempotency_key");
	request->env = document(fcinfo, 5, 'o', "env");
	request->repos = document(fcinfo, 6, 'a', "repos");
	request->tags = document(fcinfo, 7, 'o', "tags");
	request->options = document(fcinfo, 8, 'o', "options");
	request->max_lifetime_s =
		PG_ARGISNULL(9) ? 0 : check_interval(PG_GETARG_INTERVAL_P(9), "max_lifetime");
	check_env(request->env);
	check_repos(request->repos);
	check_tags(request->tags);
}

/* The same of provision_warm(). */
static void
read_warm_request(FunctionCallInfo fcinfo, Request *request)
{
	request->team_id = team_argument(fcinfo);
	request->profile = optional_identifier(fcinfo, 1, "profile");
	request->provider = optional_identifier(fcinfo, 2, "provider");
	request->options = document(fcinfo, 3, 'o', "options");
	if (PG_ARGISNULL(4))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("idle_timeout must not be null")));
	request->idle_timeout_s = check_interval(PG_GETARG_INTERVAL_P(4), "idle_timeout");
	request->env = empty_document('o');
	request->repos = empty_document('a');
	request->tags = empty_document('o');
}

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

static void
set_optional_text(Datum *values, char *nulls, int i, const char *text)
{
	nulls[i] = text ? ' ' : 'n';
	values[i] = text ? CStringGetTextDatum(text) : (Datum) 0;
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

/* SHA-256 over all arguments but the key, so that a repeat can be told from a conflict. */
static bytea *
hash_request(const Request *request)
{
	bytea *hash = palloc(VARHDRSZ + SHA256_LEN);
	const char *texts[3] = {request->agent_id, request->profile, request->provider};
	Jsonb *documents[4] = {request->env, request->repos, request->tags, request->options};
	StringInfoData all;
	int i;

	initStringInfo(&all);
	for (i = 0; i < lengthof(texts); i++)
	{
		int32 len = texts[i] ? strlen(texts[i]) : -1;

		appendBinaryStringInfo(&all, (char *) &len, sizeof(len));
		if (texts[i] != NULL)
			appendStringInfoString(&all, texts[i]);
	}
	/* jsonb keeps one form for equal documents, as text */
	for (i = 0; i < lengthof(documents); i++)
	{
		(void) JsonbToCString(&all, &documents[i]->root, VARSIZE(documents[i]));
		appendStringInfoChar(&all, '\n');
	}
	appendStringInfo(&all, "%lld", (long long) request->max_lifetime_s);
	SET_VARSIZE(hash, VARHDRSZ + SHA256_LEN);
	sha256_bytes(all.data, all.len, (uint8 *) VARDATA(hash));
	secret_wipe(all.data, all.len);
	pfree(all.data);
	return hash;
}

/* The session that already has this key, if any; the same arguments give the same session. */
static bool
find_by_key(const Request *request, const bytea *hash, pg_uuid_t *found)
{
	Datum values[2] = {CStringGetTextDatum(request->team_id),
					   CStringGetTextDatum(request->idempotency_key)};
	bool isnull;
	Datum stored;

	db_run(&by_key_query, values, NULL);
	if (SPI_processed == 0)
		return false;
	*found = *DatumGetUUIDP(db_value(0, 1, &isnull));
	stored = db_value(0, 2, &isnull); /* NULL where other tooling made the row */
	if (isnull ||
		!datumIsEqual(PointerGetDatum(hash), PointerGetDatum(PG_DETOAST_DATUM(stored)), false, -1))
		ereport(ERROR, (errcode(AVM_IDEMPOTENCY_CONFLICT),
						errmsg("idempotency key \"%s\" was used before with other arguments",
							   request->idempotency_key),
						errhint("Use a new key for a new request."), hide_caller()));
	SPI_freetuptable(SPI_tuptable);
	return true;
}

/* Its row was there and is not: its transaction has been undone, or it has ended and gone. */
pg_noreturn static void
raise_key_conflict(const Request *request)
{
	ereport(ERROR,
			(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
			 errmsg("idempotency key \"%s\" was used concurrently", request->idempotency_key),
			 errhint("Try again.")));
	pg_unreachable();
}

/*
 * Environment and repositories for the runtime, encrypted; nobody else ever
 * gets them, so without a runtime they are not kept at all.
 */
static bytea *
make_payload(const Request *request, const char *session_id, char **key_id)
{
	StringInfoData text;
	bytea *encrypted;

	initStringInfo(&text);
	appendStringInfoString(&text, "{\"env\": ");
	(void) JsonbToCString(&text, &request->env->root, VARSIZE(request->env));
	appendStringInfoString(&text, ", \"repos\": ");
	(void) JsonbToCString(&text, &request->repos->root, VARSIZE(request->repos));
	appendStringInfoChar(&text, '}');
	encrypted =
		secret_encrypt(request->team_id, "session", session_id, text.data, text.len, key_id);
	secret_wipe(text.data, text.len);
	pfree(text.data);
	return encrypted;
}

/* ---- warm VMs ---- */

/* Sessions that a transaction has taken, and which one. */
static LocalTransactionId claimed_in = InvalidLocalTransactionId;
static List *claimed = NIL; /* of pg_uuid_t *, in TopTransactionContext */

bool
session_claimed_here(const pg_uuid_t *id)
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

/* Whether the team's warm VMs are ours to give: those of a copied database are the other one's, too. */
static bool
may_take_warm(const char *team_id)
{
	char *problem;

	return has_warm(team_id) && identity_look(&problem) == IDENTITY_IN_ORDER;
}

/* What a claim goes by, and what it writes. */
typedef struct Claim
{
	const Request *request;
	const bytea *shape;
	bytea *hash; /* of the request; NULL: it has no key */
	Name created_by;
	bool has_payload;
	TimestampTz now;
	TimestampTz deadline;
	TimestampTz ceiling;
} Claim;

/* Take a warm VM into *id; false where there is none. */
static bool
claim_warm(const Claim *claim, pg_uuid_t *id)
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
		payload = make_payload(request, session_text(id), &key_id);

	memset(nulls, ' ', sizeof(nulls));
	values[0] = UUIDPGetDatum(id);
	set_optional_text(values, nulls, 1, request->agent_id);
	values[2] = JsonbPGetDatum(request->tags);
	set_optional_text(values, nulls, 3, request->idempotency_key);
	nulls[4] = claim->hash ? ' ' : 'n';
	values[4] = PointerGetDatum(claim->hash);
	values[5] = NameGetDatum(claim->created_by);
	values[6] = TimestampTzGetDatum(claim->deadline);
	values[7] = TimestampTzGetDatum(claim->ceiling);
	nulls[8] = payload ? ' ' : 'n';
	values[8] = PointerGetDatum(payload);
	set_optional_text(values, nulls, 9, key_id);
	db_run(&claim_query, values, nulls);
	wake_after_lock(DatumGetInt16(db_value(0, 2, &isnull)),
					DatumGetTimestampTz(db_value(0, 1, &isnull)));
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
claim_warm_once(const Claim *claim, pg_uuid_t *id)
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
	if (failed && !find_by_key(claim->request, claim->hash, id))
		raise_key_conflict(claim->request);
	return failed || found;
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
		hash = hash_request(request);
		if (find_by_key(request, hash, id))
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
	if (request->idle_timeout_s > 0 || may_take_warm(request->team_id))
		shape = hash_shape(request, provider, &resolved, options, runtime);
	if (shape != NULL && request->idle_timeout_s == 0)
	{
		Claim claim = {.request = request,
					   .shape = shape,
					   .hash = hash,
					   .created_by = created_by,
					   .has_payload = has_payload && runtime,
					   .now = now,
					   .deadline = now + lifetime * USECS_PER_SEC,
					   .ceiling = now + ceiling * USECS_PER_SEC};

		if (hash != NULL ? claim_warm_once(&claim, id) : claim_warm(&claim, id))
		{
			db_leave(&scope);
			return;
		}
		shape = NULL;
	}

	session_make_id(id, now);
	if (runtime && has_payload)
		payload = make_payload(request, session_text(id), &key_id);
	else if (runtime)
		key_id = keyring_current_id();

	memset(nulls, ' ', sizeof(nulls));
	values[0] = UUIDPGetDatum(id);
	values[1] = CStringGetTextDatum(request->team_id);
	set_optional_text(values, nulls, 2, request->agent_id);
	values[3] = CStringGetTextDatum(provider->name);
	set_optional_text(values, nulls, 4, request->profile);
	values[5] = TimestampTzGetDatum(now);
	values[6] = TimestampTzGetDatum(now + lifetime * USECS_PER_SEC);
	values[7] = TimestampTzGetDatum(now + ceiling * USECS_PER_SEC);
	values[8] = JsonbPGetDatum(request->tags);
	set_optional_text(values, nulls, 9, request->idempotency_key);
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
	set_optional_text(values, nulls, 20, key_id);
	values[21] = Int16GetDatum(lane);
	values[22] = TimestampTzGetDatum(now);
	nulls[23] = shape ? ' ' : 'n';
	values[23] = PointerGetDatum(shape);

	lock_for_quota(request->team_id, &resolved);
	if (is_limited(&resolved))
	{
		/* whoever held the lock before us may have used our key, and the last room with it */
		if (request->idempotency_key != NULL && find_by_key(request, hash, id))
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
			if (!find_by_key(request, hash, id))
				raise_key_conflict(request);
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
	read_request(fcinfo, &request);
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
	read_warm_request(fcinfo, &request);
	provision(&request, id);
	PG_RETURN_UUID_P(id);
}
