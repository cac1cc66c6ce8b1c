/*-------------------------------------------------------------------------
 *
 * agentvm.c
 *		Module load: settings, shared memory, background workers.
 *
 * The library works without being preloaded: SQL functions, CALL dispatch() and
 * the sweeps need nothing from shared memory.  Preloaded, it runs the launcher
 * and its dispatchers, and wakes them at commit.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "agentvm.h"
#include "engine/database_hook.h"
#include "engine/forget.h"
#include "engine/identity.h"
#include "engine/shared.h"
#include "engine/wake.h"
#include "engine/worker.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/guc.h"
#include "utils/varlena.h"

AVM_MODULE_MAGIC("agentvm", AGENTVM_VERSION);

char *avm_databases;
char *avm_provider_libraries;
char *avm_image_directories;
char *avm_key_file;
char *avm_default_provider;
int avm_dispatchers;
int avm_max_in_flight;
int avm_max_in_flight_per_team;
double avm_api_rate;
int avm_sweep_interval_ms;
int avm_batch_size;
int avm_bootstrap_timeout_s;
int avm_heartbeat_interval_s;
int avm_heartbeat_timeout_s;
int avm_max_lifetime_s;
int avm_max_lifetime_ceiling_s;
int avm_deadline_grace_s;
int avm_deadman_allowance_s;
int avm_lease_ms;
int avm_max_output_kib;
int avm_max_file_size_kib;
bool avm_log_commands;
int avm_retention_s;
int avm_launch_settle_s;
int avm_inventory_interval_s;
int avm_orphan_grace_s;
char *avm_gateway_url;
char *avm_gateway_ca_file;
char *avm_aws_endpoint_url;
bool avm_allow_insecure_endpoints;
bool avm_environment_credentials;

extern void _PG_init(void);

/* A list of names separated by commas, as in search_path. */
static bool
check_name_list(char **newval, void **extra, GucSource source)
{
	char *copy = pstrdup(*newval);
	List *names;
	bool ok = SplitIdentifierString(copy, ',', &names);

	if (!ok)
		GUC_check_errdetail("It must be a list of names separated by commas.");
	return ok;
}

/* A list of absolute paths separated by commas. */
static bool
check_directory_list(char **newval, void **extra, GucSource source)
{
	List *directories;
	ListCell *cell;
	bool ok = SplitDirectoriesString(pstrdup(*newval), ',', &directories);

	foreach (cell, directories)
		ok = ok && is_absolute_path((char *) lfirst(cell));
	if (!ok)
		GUC_check_errdetail("It must be a list of absolute paths separated by commas.");
	return ok;
}

/* Empty, or a URL of a server; plain http is judged when it is used. */
static bool
check_url(char **newval, void **extra, GucSource source)
{
	const char *c;

	if (**newval == '\0')
		return true;
	if (strncmp(*newval, "https://", 8) != 0 && strncmp(*newval, "http://", 7) != 0)
	{
		GUC_check_errdetail("It must begin with https:// (or http:// where "
							"agentvm.allow_insecure_endpoints is on).");
		return false;
	}
	for (c = *newval; *c != '\0'; c++)
	{
		if ((unsigned char) *c <= ' ' || (unsigned char) *c == 0x7f ||
			strchr("\"'\\`$<>", *c) != NULL)
		{
			GUC_check_errdetail("It holds a character that does not belong in a URL.");
			return false;
		}
	}
	return true;
}

static void
define_string(const char *name, const char *description, char **variable, const char *boot,
			  GucStringCheckHook check)
{
	DefineCustomStringVariable(name, description, NULL, variable, boot, PGC_SIGHUP, 0, check, NULL,
							   NULL);
}

static void
define_int(const char *name, const char *description, int *variable, int boot, int min, int max,
		   int unit)
{
	DefineCustomIntVariable(name, description, NULL, variable, boot, min, max, PGC_SIGHUP, unit,
							NULL, NULL, NULL);
}

static void
define_settings(void)
{
	const int day_s = 24 * 3600;

	define_string("agentvm.databases", "Databases that dispatchers serve, separated by commas.",
				  &avm_databases, "postgres", check_name_list);
	define_string("agentvm.provider_libraries",
				  "Libraries that add providers, separated by commas.", &avm_provider_libraries, "",
				  check_name_list);
	define_string("agentvm.image_directories",
				  "Directories on hosts with the images that may be booted, separated by commas.",
				  &avm_image_directories, "/var/lib/agentvm/images,/var/cache/agentvm/images",
				  check_directory_list);
	define_string("agentvm.key_file",
				  "File of the master keys, one \"id:base64\" a line; the first one encrypts.",
				  &avm_key_file, "", NULL);
	define_string("agentvm.default_provider", "Provider for teams and profiles that name none.",
				  &avm_default_provider, "noop", NULL);
	define_int("agentvm.dispatchers", "Dispatchers per served database.", &avm_dispatchers, 1, 0,
			   MAX_DISPATCHERS, 0);
	define_int("agentvm.max_in_flight",
			   "Provider calls under way at once, over all dispatchers of a database.",
			   &avm_max_in_flight, 256, 1, 10000, 0);
	define_int("agentvm.max_in_flight_per_team", "Provider calls under way at once for one team.",
			   &avm_max_in_flight_per_team, 32, 1, 10000, 0);
	DefineCustomRealVariable(
		"agentvm.api_rate",
		"How often cloud accounts are called, as a multiple of what they grant; 0: no limit.", NULL,
		&avm_api_rate, 1, 0, 1000, PGC_SIGHUP, 0, NULL, NULL, NULL);
	define_int("agentvm.sweep_interval",
			   "Time between sweeps for silent sessions, and the longest sleep of a dispatcher.",
			   &avm_sweep_interval_ms, 30000, 100, 3600 * 1000, GUC_UNIT_MS);
	define_int("agentvm.batch_size", "Sessions that one claim or sweep takes at most.",
			   &avm_batch_size, 100, 1, 10000, 0);
	define_int("agentvm.bootstrap_timeout", "Time from launch in which a runtime must report.",
			   &avm_bootstrap_timeout_s, 180, 1, day_s, GUC_UNIT_S);
	define_int("agentvm.heartbeat_interval", "Time between heartbeats that runtimes are told.",
			   &avm_heartbeat_interval_s, 30, 1, day_s, GUC_UNIT_S);
	define_int("agentvm.heartbeat_timeout", "Silence after which a session is lost.",
			   &avm_heartbeat_timeout_s, 120, 1, day_s, GUC_UNIT_S);
	define_int("agentvm.max_lifetime", "Lifetime of a session when nobody says.",
			   &avm_max_lifetime_s, 120 * 60, 1, 366 * day_s, GUC_UNIT_S);
	define_int("agentvm.max_lifetime_ceiling", "Lifetime that no session exceeds.",
			   &avm_max_lifetime_ceiling_s, day_s, 1, 366 * day_s, GUC_UNIT_S);
	define_int("agentvm.deadline_grace", "Time after its deadline at which a VM powers itself off.",
			   &avm_deadline_grace_s, 5 * 60, 0, day_s, GUC_UNIT_S);
	define_int("agentvm.deadman_allowance",
			   "Time without control plane after which a VM powers itself off.",
			   &avm_deadman_allowance_s, 15 * 60, 1, 30 * day_s, GUC_UNIT_S);
	define_int("agentvm.lease",
			   "Time for which a worker owns a session it works on; calls are aborted at two "
			   "thirds of it.",
			   &avm_lease_ms, 60000, 1000, 3600 * 1000, GUC_UNIT_MS);
	define_int("agentvm.retention", "Time for which ended sessions and events are kept.",
			   &avm_retention_s, 30 * day_s, 1, INT_MAX, GUC_UNIT_S);
	define_int("agentvm.launch_settle",
			   "Time for which a VM is looked for whose launch was never answered.",
			   &avm_launch_settle_s, 300, 1, day_s, GUC_UNIT_S);
	define_int("agentvm.inventory_interval",
			   "Time between lists of the VMs in an account and region; 0: never.",
			   &avm_inventory_interval_s, 300, 0, day_s, GUC_UNIT_S);
	define_int("agentvm.orphan_grace", "Age at which a VM without a session is ended.",
			   &avm_orphan_grace_s, 600, 1, 30 * day_s, GUC_UNIT_S);
	define_string("agentvm.gateway_url", "URL that VMs dial; needed by profiles with a runtime.",
				  &avm_gateway_url, "", check_url);
	define_string("agentvm.gateway_ca_file",
				  "Authority that VMs trust for the gateway, if not a public one (PEM).",
				  &avm_gateway_ca_file, "", NULL);
	define_string("agentvm.aws_endpoint_url", "Endpoint for all AWS calls instead of AWS's own.",
				  &avm_aws_endpoint_url, "", check_url);
	DefineCustomBoolVariable("agentvm.allow_insecure_endpoints",
							 "Allow endpoints without TLS (for tests).", NULL,
							 &avm_allow_insecure_endpoints, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable(
		"agentvm.environment_credentials",
		"Let teams without credentials of their own use the server's (for development).", NULL,
		&avm_environment_credentials, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
	define_int("agentvm.max_output", "Output of a command that is kept, of each stream.",
			   &avm_max_output_kib, 16 * 1024, 1, 256 * 1024, GUC_UNIT_KB);
	define_int("agentvm.max_file_size", "Largest file that upload() and download() take.",
			   &avm_max_file_size_kib, 256 * 1024, 1, 1000 * 1024, GUC_UNIT_KB);
	DefineCustomBoolVariable("agentvm.log_commands",
							 "Keep the text of commands in agentvm.session_event.", NULL,
							 &avm_log_commands, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
	MarkGUCPrefixReserved("agentvm");
}

void
_PG_init(void)
{
	define_settings();
	wake_init();
	forget_guard_init();
	if (!process_shared_preload_libraries_in_progress)
		return;
	identity_init();
	shared_init();
	worker_init();
	database_hook_init();
}
