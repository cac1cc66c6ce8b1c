/*-------------------------------------------------------------------------
 *
 * profile.c
 *		Profiles: named shapes of VMs, for one team or for all.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "agentvm.h"
#include "db.h"
#include "providers/provider.h"
#include "team/checks.h"
#include "team/team.h"

PG_FUNCTION_INFO_V1(agentvm_create_profile);
PG_FUNCTION_INFO_V1(agentvm_drop_profile);

/* Arguments of create_profile(), which are the parameters of its INSERT too. */
enum
{
	ARG_NAME,
	ARG_PROVIDER,
	ARG_OPTIONS,
	ARG_TEAM_ID,
	ARG_VCPUS,
	ARG_MEMORY_MIB,
	ARG_DISK_GIB,
	ARG_RUNTIME,
	ARG_BOOTSTRAP_TIMEOUT,
	ARG_HEARTBEAT_TIMEOUT,
	ARG_MAX_LIFETIME,
	ARG_COUNT
};

static DbQuery insert_profile = {
	"INSERT INTO agentvm.profile (name, provider, options, team_id, vcpus, memory_mib, disk_gib,"
	" runtime, bootstrap_timeout, heartbeat_timeout, max_lifetime)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT DO NOTHING",
	ARG_COUNT,
	{TEXTOID, TEXTOID, JSONBOID, TEXTOID, INT4OID, INT4OID, INT4OID, BOOLOID, INTERVALOID,
	 INTERVALOID, INTERVALOID},
	NULL,
};

static DbQuery delete_profile = {
	"DELETE FROM agentvm.profile WHERE name = $1 AND team_id IS NOT DISTINCT FROM $2",
	2,
	{TEXTOID, TEXTOID},
	NULL,
};

static void
check_range(FunctionCallInfo fcinfo, int argno, const char *argument, int lowest, int highest)
{
	int32 value;

	if (PG_ARGISNULL(argno))
		return;
	value = PG_GETARG_INT32(argno);
	if (value < lowest || value > highest)
		ereport(ERROR, errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				errmsg("%s must be between %d and %d, not %d", argument, lowest, highest, value));
}

/* A duration in seconds, or -1 when it is NULL. */
static int64
check_duration(FunctionCallInfo fcinfo, int argno, const char *argument)
{
	if (PG_ARGISNULL(argno))
		return -1;
	return check_interval(PG_GETARG_INTERVAL_P(argno), argument);
}

Datum
agentvm_create_profile(PG_FUNCTION_ARGS)
{
	DbScope scope;
	Datum values[ARG_COUNT];
	char nulls[ARG_COUNT];
	char *name;
	char *team_id;
	const Provider *provider;
	Jsonb *options;
	int i;

	require_admin("create a profile");
	name = identifier_argument(fcinfo, ARG_NAME, "name");
	provider = provider_get(identifier_argument(fcinfo, ARG_PROVIDER, "provider"));
	options = object_argument(fcinfo, ARG_OPTIONS, "options");
	provider_check_options(provider, OPTIONS_PROFILE, options);
	team_id = optional_identifier_argument(fcinfo, ARG_TEAM_ID, "team_id");
	check_range(fcinfo, ARG_VCPUS, "vcpus", 1, 1024);
	check_range(fcinfo, ARG_MEMORY_MIB, "memory_mib", 64, 16777216);
	check_range(fcinfo, ARG_DISK_GIB, "disk_gib", 1, 65536);
	check_duration(fcinfo, ARG_BOOTSTRAP_TIMEOUT, "bootstrap_timeout");
	check_duration(fcinfo, ARG_HEARTBEAT_TIMEOUT, "heartbeat_timeout");
	check_ceiling(check_duration(fcinfo, ARG_MAX_LIFETIME, "max_lifetime"), "max_lifetime");

	db_enter(&scope);
	if (team_id != NULL)
	{
		team_lock(team_id, ShareLock);
		require_team_exists(team_id);
	}

	for (i = 0; i < ARG_COUNT; i++)
	{
		values[i] = PG_GETARG_DATUM(i);
		nulls[i] = PG_ARGISNULL(i) ? 'n' : ' ';
	}
	values[ARG_OPTIONS] = JsonbPGetDatum(options);
	nulls[ARG_OPTIONS] = ' ';
	db_run(&insert_profile, values, nulls);
	if (SPI_processed == 0)
		ereport(ERROR, errcode(ERRCODE_DUPLICATE_OBJECT),
				team_id ? errmsg("profile \"%s\" of team \"%s\" already exists", name, team_id)
						: errmsg("profile \"%s\" already exists", name));
	db_leave(&scope);

	PG_RETURN_VOID();
}

Datum
agentvm_drop_profile(PG_FUNCTION_ARGS)
{
	DbScope scope;
	Datum values[2];
	char nulls[2] = {' ', ' '};
	char *name;
	char *team_id;

	require_admin("drop a profile");
	name = identifier_argument(fcinfo, 0, "name");
	team_id = optional_identifier_argument(fcinfo, 1, "team_id");

	db_enter(&scope);
	values[0] = CStringGetTextDatum(name);
	values[1] = team_id ? CStringGetTextDatum(team_id) : (Datum) 0;
	nulls[1] = team_id ? ' ' : 'n';
	db_run(&delete_profile, values, nulls);
	if (SPI_processed == 0)
		ereport(ERROR, errcode(ERRCODE_UNDEFINED_OBJECT),
				team_id ? errmsg("profile \"%s\" of team \"%s\" does not exist", name, team_id)
						: errmsg("profile \"%s\" does not exist", name));
	db_leave(&scope);

	PG_RETURN_VOID();
}
