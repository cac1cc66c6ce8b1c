/*-------------------------------------------------------------------------
 *
 * team.c
 *		Teams, their limits and their members.
 *
 * A team is changed by administrators only.  Whoever changes what provision()
 * decides on, or makes or removes a team, holds the team's lock exclusively
 * until the end of the transaction; whoever adds something that belongs to a
 * team holds it shared.  The lock lives in the lock manager and not in the
 * team's row: provision() of a team without limits then writes nothing there.
 *
 * Members are roles.  Row-level security of all tables asks visible_teams(),
 * which therefore looks at team_member below SQL: there is no plan, no change
 * of user and no policy that could recurse, and parallel workers may call it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "executor/tuptable.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "agentvm.h"
#include "db.h"
#include "engine/identity.h"
#include "providers/provider.h"
#include "team/checks.h"
#include "team/team.h"

PG_FUNCTION_INFO_V1(agentvm_create_team);
PG_FUNCTION_INFO_V1(agentvm_alter_team);
PG_FUNCTION_INFO_V1(agentvm_drop_team);
PG_FUNCTION_INFO_V1(agentvm_add_member);
PG_FUNCTION_INFO_V1(agentvm_remove_member);
PG_FUNCTION_INFO_V1(agentvm_channel);
PG_FUNCTION_INFO_V1(agentvm_visible_teams);
PG_FUNCTION_INFO_V1(agentvm_sees_all);

/* ---- limits ---- */

/* In the order of the columns in the statements below. */
typedef enum TeamLimit
{
	LIMIT_MAX_SESSIONS,
	LIMIT_MAX_VCPUS,
	LIMIT_MAX_MEMORY_MIB,
	LIMIT_MIN_LIFETIME, /* from here on durations */
	LIMIT_MAX_LIFETIME,
	LIMIT_BOOTSTRAP_TIMEOUT,
	LIMIT_HEARTBEAT_TIMEOUT,
	LIMIT_COUNT
} TeamLimit;

static const char *const limit_names[LIMIT_COUNT] = {
	"max_sessions", "max_vcpus",		 "max_memory_mib",	  "min_lifetime",
	"max_lifetime", "bootstrap_timeout", "heartbeat_timeout",
};

#define KNOWN_LIMITS                                                                               \
	"max_sessions, max_vcpus, max_memory_mib, min_lifetime, max_lifetime, bootstrap_timeout, "     \
	"heartbeat_timeout"

/* Limits of a team, as statement parameters. */
typedef struct TeamLimits
{
	Datum values[LIMIT_COUNT];
	char nulls[LIMIT_COUNT];
	bool given[LIMIT_COUNT]; /* named by the caller */
} TeamLimits;

#define TEAM_ARGS (2 + LIMIT_COUNT)
#define TEAM_ARGTYPES                                                                              \
	{                                                                                              \
		TEXTOID, TEXTOID, INT4OID, INT4OID, INT4OID, INTERVALOID, INTERVALOID, INTERVALOID,        \
			INTERVALOID                                                                            \
	}

static DbQuery insert_team = {
	"INSERT INTO agentvm.team (team_id, provider, max_sessions, max_vcpus, max_memory_mib,"
	" min_lifetime, max_lifetime, bootstrap_timeout, heartbeat_timeout)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING",
	TEAM_ARGS,
	TEAM_ARGTYPES,
	NULL,
};

static DbQuery select_team = {
	"SELECT max_sessions, max_vcpus, max_memory_mib,"
	" min_lifetime, max_lifetime, bootstrap_timeout, heartbeat_timeout"
	" FROM agentvm.team WHERE team_id = $1 FOR NO KEY UPDATE",
	1,
	{TEXTOID},
	NULL,
};

static DbQuery update_team = {
	"UPDATE agentvm.team SET provider = coalesce($2, provider),"
	" max_sessions = $3, max_vcpus = $4, max_memory_mib = $5,"
	" min_lifetime = $6, max_lifetime = $7, bootstrap_timeout = $8, heartbeat_timeout = $9,"
	" updated_at = now() WHERE team_id = $1",
	TEAM_ARGS,
	TEAM_ARGTYPES,
	NULL,
};

static DbQuery former_team = {
	"SELECT FROM agentvm.former_team WHERE team_id = $1",
	1,
	{TEXTOID},
	NULL,
};

static DbQuery keep_former_team = {
	"INSERT INTO agentvm.former_team (team_id)"
	" SELECT $1 WHERE EXISTS (SELECT FROM agentvm.session WHERE team_id = $1)"
	" OR EXISTS (SELECT FROM agentvm.session_event WHERE team_id = $1)"
	" ON CONFLICT (team_id) DO UPDATE SET dropped_at = EXCLUDED.dropped_at",
	1,
	{TEXTOID},
	NULL,
};

static DbQuery delete_team = {
	"DELETE FROM agentvm.team WHERE team_id = $1",
	1,
	{TEXTOID},
	NULL,
};

static DbQuery insert_member = {
	"INSERT INTO agentvm.team_member (team_id, role) VALUES ($1, $2) ON CONFLICT DO NOTHING",
	2,
	{TEXTOID, OIDOID},
	NULL,
};

static DbQuery delete_member = {
	"DELETE FROM agentvm.team_member WHERE team_id = $1 AND role = $2",
	2,
	{TEXTOID, OIDOID},
	NULL,
};

static DbQuery delete_dead_members = {
	"DELETE FROM agentvm.team_member m WHERE team_id = $1"
	" AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = m.role)",
	1,
	{TEXTOID},
	NULL,
};

static DbQuery rotate_channel = {
	"UPDATE agentvm.team SET channel = DEFAULT WHERE team_id = $1",
	1,
	{TEXTOID},
	NULL,
};

static DbQuery select_channel = {
	"SELECT channel FROM agentvm.team t WHERE team_id = $1 AND ($3 OR EXISTS"
	" (SELECT FROM agentvm.team_member m WHERE m.team_id = t.team_id"
	" AND pg_has_role($2, m.role, 'USAGE')))",
	3,
	{TEXTOID, OIDOID, BOOLOID},
	NULL,
};

static void
refuse_limit(TeamLimit limit, JsonbValue *value, const char *expected)
{
	ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("invalid value for limit \"%s\": %s", limit_names[limit], json_excerpt(value)),
			errdetail("It must be %s, or null for the server's default.", expected));
}

static Datum
parse_count(TeamLimit limit, Jsonb *document, JsonbValue *value)
{
	int64 count = handle_int(document, limit_names[limit], -1);

	if (count < 0 || count > PG_INT32_MAX)
		refuse_limit(limit, value, "an integer from 0 to 2147483647");
	return Int32GetDatum((int32) count);
}

static Datum
parse_duration(TeamLimit limit, Jsonb *document, JsonbValue *value)
{
	static const char *const expected =
		"an interval or a number of seconds, from 1 second to 366 days";
	MemoryContext oldcontext = CurrentMemoryContext;
	Interval *interval = (Interval *) palloc0(sizeof(Interval));
	volatile int64 ms = 0;

	/* It would speak of an option; say the same of a limit. */
	PG_TRY();
	{
		ms = option_ms(document, limit_names[limit], 0);
	}
	PG_CATCH();
	{
		if (geterrcode() != AVM_INVALID_CONFIGURATION)
			PG_RE_THROW();
		MemoryContextSwitchTo(oldcontext);
		FlushErrorState();
		refuse_limit(limit, value, expected);
	}
	PG_END_TRY();

	if (ms < 1000)
		refuse_limit(limit, value, expected);
	interval->time = ms * 1000;
	return IntervalPGetDatum(interval);
}

static int
find_limit(const JsonbValue *key)
{
	int i;

	for (i = 0; i < LIMIT_COUNT; i++)
	{
		if (strlen(limit_names[i]) == key->val.string.len &&
			memcmp(limit_names[i], key->val.string.val, key->val.string.len) == 0)
			return i;
	}
	return -1;
}

/* Put the limits that the caller named into *limits, and check them. */
static void
parse_limits(Jsonb *document, TeamLimits *limits)
{
	static const char budget[] = "daily_budget_usd";
	JsonbIterator *it = JsonbIteratorInit(&document->root);
	JsonbIteratorToken token;
	JsonbValue value;
	JsonbValue key;
	int limit = -1;

	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
		{
			key = value;
			limit = find_limit(&key);
			if (limit >= 0)
				continue;
			if (key.val.string.len == sizeof(budget) - 1 &&
				memcmp(key.val.string.val, budget, sizeof(budget) - 1) == 0)
				ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
						errmsg("daily_budget_usd is not supported by this version"));
			ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
					errmsg("unknown limit %s", json_excerpt(&key)),
					errhint("Known limits: %s.", KNOWN_LIMITS));
		}
		else if (token == WJB_VALUE)
		{
			bool isnull = value.type == jbvNull;

			limits->given[limit] = true;
			limits->nulls[limit] = isnull ? 'n' : ' ';
			if (isnull)
				limits->values[limit] = (Datum) 0;
			else if (limit < LIMIT_MIN_LIFETIME)
				limits->values[limit] = parse_count(limit, document, &value);
			else
				limits->values[limit] = parse_duration(limit, document, &value);
		}
	}
}

/* A duration among the limits in seconds, or -1 where there is none. */
static int64
limit_seconds(const TeamLimits *limits, TeamLimit limit)
{
	Interval *interval;

	if (limits->nulls[limit] == 'n')
		return -1;
	interval = DatumGetIntervalP(limits->values[limit]);
	return ((int64) interval->month * DAYS_PER_MONTH + interval->day) * SECS_PER_DAY +
		   interval->time / USECS_PER_SEC;
}

/*
 * Check what holds between limits, once they are merged.  What the caller did
 * not name is left in peace, so that a ceiling lowered since does not stand in
 * the way of another change.
 */
static void
check_limits(const TeamLimits *limits)
{
	int64 shortest = limit_seconds(limits, LIMIT_MIN_LIFETIME);
	int64 longest = limit_seconds(limits, LIMIT_MAX_LIFETIME);

	if (limits->given[LIMIT_MIN_LIFETIME])
		check_ceiling(shortest, "min_lifetime");
	if (limits->given[LIMIT_MAX_LIFETIME])
		check_ceiling(longest, "max_lifetime");
	if ((limits->given[LIMIT_MIN_LIFETIME] || limits->given[LIMIT_MAX_LIFETIME]) && longest >= 0 &&
		shortest > longest)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("min_lifetime is longer than max_lifetime"));
}

/* Run insert_team or update_team. */
static void
write_team(DbQuery *query, const char *team_id, const char *provider, const TeamLimits *limits)
{
	Datum values[TEAM_ARGS];
	char nulls[TEAM_ARGS];

	values[0] = CStringGetTextDatum(team_id);
	nulls[0] = ' ';
	values[1] = provider ? CStringGetTextDatum(provider) : (Datum) 0;
	nulls[1] = provider ? ' ' : 'n';
	memcpy(values + 2, limits->values, sizeof(limits->values));
	memcpy(nulls + 2, limits->nulls, sizeof(limits->nulls));
	db_run(query, values, nulls);
}

/* ---- teams ---- */

Datum
agentvm_create_team(PG_FUNCTION_ARGS)
{
	DbScope scope;
	TeamLimits limits;
	Datum values[1];
	char *team_id;
	char *provider;

	require_admin("create a team");
	team_id = identifier_argument(fcinfo, 0, "team_id");
	provider = optional_identifier_argument(fcinfo, 1, "provider");
	if (provider != NULL)
		provider_get(provider);

	memset(&limits, 0, sizeof(limits));
	memset(limits.nulls, 'n', sizeof(limits.nulls));
	parse_limits(object_argument(fcinfo, 2, "limits"), &limits);
	check_limits(&limits);

	db_enter(&scope);
	identity_take_into_use();
	team_lock(team_id, ExclusiveLock);

	values[0] = CStringGetTextDatum(team_id);
	db_run(&former_team, values, NULL);
	if (SPI_processed > 0)
		ereport(ERROR, errcode(ERRCODE_DUPLICATE_OBJECT),
				errmsg("team \"%s\" has existed before", team_id),
				errhint("The history of that team is still kept; choose another id."));

	write_team(&insert_team, team_id, provider, &limits);
	if (SPI_processed == 0)
		ereport(ERROR, errcode(ERRCODE_DUPLICATE_OBJECT),
				errmsg("team \"%s\" already exists", team_id));
	db_leave(&scope);

	PG_RETURN_VOID();
}

/* Fill in the limits that the caller did not name.  Raises 42704 for an unknown team. */
static void
merge_limits(const char *team_id, TeamLimits *limits)
{
	Datum values[1];
	int i;

	values[0] = CStringGetTextDatum(team_id);
	db_run(&select_team, values, NULL);
	if (SPI_processed == 0)
		ereport(ERROR, errcode(ERRCODE_UNDEFINED_OBJECT),
				errmsg("team \"%s\" does not exist", team_id));

	for (i = 0; i < LIMIT_COUNT; i++)
	{
		bool duration = i >= LIMIT_MIN_LIFETIME;
		bool isnull;
		Datum value;

		if (limits->given[i])
			continue;
		value = db_value(0, i + 1, &isnull);
		limits->nulls[i] = isnull ? 'n' : ' ';
		if (!isnull)
			limits->values[i] =
				datumCopy(value, !duration, duration ? sizeof(Interval) : sizeof(int32));
	}
}

Datum
agentvm_alter_team(PG_FUNCTION_ARGS)
{
	DbScope scope;
	TeamLimits limits;
	char *team_id;
	char *provider;

	require_admin("alter a team");
	team_id = identifier_argument(fcinfo, 0, "team_id");
	provider = optional_identifier_argument(fcinfo, 1, "provider");
	if (provider != NULL)
		provider_get(provider);

	memset(&limits, 0, sizeof(limits));
	parse_limits(object_argument(fcinfo, 2, "limits"), &limits);

	db_enter(&scope);
	team_lock(team_id, ExclusiveLock);
	merge_limits(team_id, &limits);
	check_limits(&limits);
	write_team(&update_team, team_id, provider, &limits);
	db_leave(&scope);

	PG_RETURN_VOID();
}

Datum
agentvm_drop_team(PG_FUNCTION_ARGS)
{
	DbScope scope;
	Datum values[1];
	char *team_id;
	int64 live;

	require_admin("drop a team");
	team_id = identifier_argument(fcinfo, 0, "team_id");

	db_enter(&scope);
	team_lock(team_id, ExclusiveLock);
	require_team_exists(team_id);

	live = count_live_sessions(team_id, NULL);
	if (live > 0)
		ereport(
			ERROR, errcode(ERRCODE_OBJECT_IN_USE),
			errmsg_plural("team \"%s\" has %lld live session", "team \"%s\" has %lld live sessions",
						  (unsigned long) live, team_id, (long long) live),
			errhint("Terminate them with agentvm.terminate(), and wait until they have ended."));

	/*
	 * While rows about the old team are kept, nobody else may get its id: its
	 * members would see them.
	 */
	values[0] = CStringGetTextDatum(team_id);
	db_run(&keep_former_team, values, NULL);
	db_run(&delete_team, values, NULL);
	db_leave(&scope);

	PG_RETURN_VOID();
}

/* ---- members ---- */

/*
 * Common part of add_member() and remove_member().  Returns whether the role was
 * (or was not yet) a member, and clears away members whose role is gone.  Whoever
 * is a member no more knows the channel: from then on it is another one.
 */
static bool
change_member(DbQuery *change, const char *team_id, Oid role)
{
	DbScope scope;
	Datum values[2];
	bool changed;
	bool fewer;

	db_enter(&scope);
	team_lock(team_id, ShareLock);
	require_team_exists(team_id);

	values[0] = CStringGetTextDatum(team_id);
	values[1] = ObjectIdGetDatum(role);
	db_run(&delete_dead_members, values, NULL);
	fewer = SPI_processed > 0;
	db_run(change, values, NULL);
	changed = SPI_processed > 0;
	if (fewer || (changed && change == &delete_member))
		db_run(&rotate_channel, values, NULL);
	db_leave(&scope);

	return changed;
}

Datum
agentvm_add_member(PG_FUNCTION_ARGS)
{
	char *team_id;
	Oid role;

	require_admin("add a member to a team");
	team_id = identifier_argument(fcinfo, 0, "team_id");
	require_argument(fcinfo, 1, "member");
	role = get_role_oid(NameStr(*PG_GETARG_NAME(1)), false);
	change_member(&insert_member, team_id, role);

	PG_RETURN_VOID();
}

Datum
agentvm_remove_member(PG_FUNCTION_ARGS)
{
	char *team_id;
	char *member;
	Oid role;

	require_admin("remove a member from a team");
	team_id = identifier_argument(fcinfo, 0, "team_id");
	require_argument(fcinfo, 1, "member");
	member = NameStr(*PG_GETARG_NAME(1));
	role = get_role_oid(member, false);
	if (!change_member(&delete_member, team_id, role))
		ereport(NOTICE, errmsg("role \"%s\" is not a member of team \"%s\"", member, team_id));

	PG_RETURN_VOID();
}

Datum
agentvm_channel(PG_FUNCTION_ARGS)
{
	Oid role = GetUserId();
	MemoryContext caller = CurrentMemoryContext;
	DbScope scope;
	Datum values[3];
	char *team_id = identifier_argument(fcinfo, 0, "team_id");
	char *channel;

	db_enter(&scope);
	values[0] = CStringGetTextDatum(team_id);
	values[1] = ObjectIdGetDatum(role);
	values[2] = BoolGetDatum(caller_is_admin(role));
	db_run(&select_channel, values, NULL);
	if (SPI_processed == 0)
		raise_no_such_team(team_id);
	channel = db_text(0, 1, caller);
	db_leave(&scope);

	PG_RETURN_TEXT_P(cstring_to_text(channel));
}

/* OID of one of our tables, or InvalidOid. */
static Oid
table_oid(const char *name)
{
	Oid schema = get_namespace_oid("agentvm", true);

	return OidIsValid(schema) ? get_relname_relid(name, schema) : InvalidOid;
}

/*
 * Whether a member row makes "user" act for its team.  A superuser has the
 * privileges of any OID, so there it takes a look whether the role still lives;
 * nobody else has those of a dropped role.
 */
static bool
acts_as(Oid user, bool superuser, Oid role)
{
	return has_privs_of_role(user, role) &&
		   (!superuser || SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(role)));
}

Datum
agentvm_visible_teams(PG_FUNCTION_ARGS)
{
	Oid user = GetUserId();
	bool superuser = superuser_arg(user);
	Oid table = table_oid("team_member");
	ArrayBuildState *teams;
	Relation relation;
	TupleTableSlot *slot;
	TableScanDesc scan;
	AttrNumber team_column;
	AttrNumber role_column;

	if (!OidIsValid(table))
		PG_RETURN_ARRAYTYPE_P(construct_empty_array(TEXTOID));

	teams = initArrayResult(TEXTOID, CurrentMemoryContext, false);
	relation = table_open(table, AccessShareLock);
	team_column = get_attnum(table, "team_id");
	role_column = get_attnum(table, "role");
	slot = table_slot_create(relation, NULL);
	scan = table_beginscan(relation, GetActiveSnapshot(), 0, NULL);

	while (table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		bool isnull;
		Oid role = DatumGetObjectId(slot_getattr(slot, role_column, &isnull));

		CHECK_FOR_INTERRUPTS();
		if (acts_as(user, superuser, role))
			accumArrayResult(teams, slot_getattr(slot, team_column, &isnull), isnull, TEXTOID,
							 CurrentMemoryContext);
	}

	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	table_close(relation, AccessShareLock);

	PG_RETURN_DATUM(makeArrayResult(teams, CurrentMemoryContext));
}

Datum
agentvm_sees_all(PG_FUNCTION_ARGS)
{
	Oid user = GetUserId();
	Oid monitor;

	if (caller_is_admin(user))
		PG_RETURN_BOOL(true);
	monitor = get_role_oid("agentvm_monitor", true);
	PG_RETURN_BOOL(OidIsValid(monitor) && has_privs_of_role(user, monitor));
}

/* ---- the lock ---- */

/* The lock's name: table agentvm.team as the class, a hash of the id as the object. */
static void
lock_name(const char *team_id, Oid *class, Oid *object)
{
	*class = table_oid("team");
	if (!OidIsValid(*class))
		ereport(ERROR, errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				errmsg("extension agentvm is not installed in this database"));
	*object = DatumGetUInt32(hash_any((const unsigned char *) team_id, strlen(team_id)));
}

void
team_lock(const char *team_id, LOCKMODE mode)
{
	Oid class;
	Oid object;

	/* better than what the lock manager would say */
	PreventCommandDuringRecovery("agentvm functions that write");
	lock_name(team_id, &class, &object);
	LockDatabaseObject(class, object, 0, mode);
}

bool
team_lock_at_once(const char *team_id, LOCKMODE mode)
{
	LOCKTAG tag;
	Oid class;
	Oid object;

	lock_name(team_id, &class, &object);
	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, class, object, 0);
	return LockAcquire(&tag, mode, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

void
team_unlock(const char *team_id, LOCKMODE mode)
{
	Oid class;
	Oid object;

	lock_name(team_id, &class, &object);
	UnlockDatabaseObject(class, object, 0, mode);
}
