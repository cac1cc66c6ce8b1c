/*-------------------------------------------------------------------------
 *
 * provider_config.c
 *		A team's options and credentials for a provider.
 *
 * set_provider() replaces the options as a whole and, of the secrets, only
 * those that it is given.  Its statement holds secrets in clear, so nothing
 * that is raised while it runs shows the statement in the server's log, or the
 * context to anybody: an error context callback sees to that for every message,
 * also for those of PostgreSQL itself.  No message holds anything of a secret's
 * value.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"

#include "agentvm.h"
#include "db.h"
#include "providers/provider.h"
#include "secret/secret.h"
#include "team/checks.h"
#include "team/team.h"

#define MAX_SECRET_LEN 4096

PG_FUNCTION_INFO_V1(agentvm_set_provider);
PG_FUNCTION_INFO_V1(agentvm_drop_provider);

static DbQuery upsert_config = {
	"INSERT INTO agentvm.provider_config (team_id, provider, options, created_by, updated_by)"
	" VALUES ($1, $2, $3, $4, $4)"
	" ON CONFLICT (team_id, provider) DO UPDATE"
	" SET options = EXCLUDED.options, updated_at = now(), updated_by = EXCLUDED.updated_by",
	4,
	{TEXTOID, TEXTOID, JSONBOID, TEXTOID},
	NULL,
};

static DbQuery upsert_secret = {
	"INSERT INTO agentvm.provider_secret (team_id, provider, field, value_enc, key_id, updated_by)"
	" VALUES ($1, $2, $3, $4, $5, $6)"
	" ON CONFLICT (team_id, provider, field) DO UPDATE"
	" SET value_enc = EXCLUDED.value_enc, key_id = EXCLUDED.key_id,"
	" updated_at = now(), updated_by = EXCLUDED.updated_by",
	6,
	{TEXTOID, TEXTOID, TEXTOID, BYTEAOID, TEXTOID, TEXTOID},
	NULL,
};

static DbQuery delete_secret = {
	"DELETE FROM agentvm.provider_secret WHERE team_id = $1 AND provider = $2 AND field = $3",
	3,
	{TEXTOID, TEXTOID, TEXTOID},
	NULL,
};

static DbQuery delete_config = {
	"DELETE FROM agentvm.provider_config WHERE team_id = $1 AND provider = $2",
	2,
	{TEXTOID, TEXTOID},
	NULL,
};

/* What set_provider() was called with. */
typedef struct ProviderSetting
{
	char *team_id;
	const Provider *provider;
	Jsonb *options;
	Jsonb *secrets; /* or NULL */
	char *caller;
} ProviderSetting;

/* The provider's names of secrets, for a hint. */
static char *
known_secrets(const Provider *provider)
{
	const ProviderOption *secret;
	StringInfoData names;

	initStringInfo(&names);
	for (secret = provider->secrets; secret->name != NULL; secret++)
		appendStringInfo(&names, "%s%s", names.len > 0 ? ", " : "", secret->name);
	return names.len > 0 ? names.data : pstrdup("none");
}

/* The provider's own, constant name of a secret; raises AV010 when it knows none of that name. */
static const char *
find_secret(const Provider *provider, JsonbValue *key)
{
	const ProviderOption *secret;

	for (secret = provider->secrets; secret->name != NULL; secret++)
	{
		if (strlen(secret->name) == key->val.string.len &&
			memcmp(secret->name, key->val.string.val, key->val.string.len) == 0)
			return secret->name;
	}

	ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("unknown secret %s for provider \"%s\"", json_excerpt(key), provider->name),
			errhint("Known secrets: %s.", known_secrets(provider)));
	return NULL; /* keep compiler quiet */
}

static void
check_secret(const char *field, const JsonbValue *value)
{
	bool good = value->type == jbvNull;
	int i;

	if (value->type == jbvString)
	{
		good = value->val.string.len >= 1 && value->val.string.len <= MAX_SECRET_LEN;
		for (i = 0; good && i < value->val.string.len; i++)
		{
			unsigned char c = value->val.string.val[i];

			good = c >= 0x20 && c != 0x7f;
		}
	}

	if (!good)
		ereport(
			ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("invalid value for secret \"%s\"", field),
			errdetail("It must be a string of 1 to %d bytes without control characters, or null "
					  "to delete it.",
					  MAX_SECRET_LEN));
}

/* Encrypt and store one field, or delete it. */
static void
write_secret(const ProviderSetting *setting, const char *field, const JsonbValue *value)
{
	Datum values[6];
	char *key_id;

	values[0] = CStringGetTextDatum(setting->team_id);
	values[1] = CStringGetTextDatum(setting->provider->name);
	values[2] = CStringGetTextDatum(field);
	if (value->type == jbvNull)
	{
		db_run(&delete_secret, values, NULL);
		return;
	}

	values[3] =
		PointerGetDatum(secret_encrypt(setting->team_id, setting->provider->name, field,
									   value->val.string.val, value->val.string.len, &key_id));
	values[4] = CStringGetTextDatum(key_id);
	values[5] = CStringGetTextDatum(setting->caller);
	db_run(&upsert_secret, values, NULL);
}

/*
 * Check all secrets, and with "write" store them.  The values stay where they
 * are inside the document, so that there is but one copy of them to wipe.
 */
static void
visit_secrets(const ProviderSetting *setting, bool write)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue value;
	const char *field = NULL;

	if (setting->secrets == NULL)
		return;

	it = JsonbIteratorInit(&setting->secrets->root);
	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			field = find_secret(setting->provider, &value);
		else if (token == WJB_VALUE)
		{
			check_secret(field, &value);
			if (write)
				write_secret(setting, field, &value);
		}
	}
}

static void
write_setting(const ProviderSetting *setting)
{
	DbScope scope;
	Datum values[4];

	db_enter(&scope);
	team_lock(setting->team_id, ShareLock);
	require_team_exists(setting->team_id);

	values[0] = CStringGetTextDatum(setting->team_id);
	values[1] = CStringGetTextDatum(setting->provider->name);
	values[2] = JsonbPGetDatum(setting->options);
	values[3] = CStringGetTextDatum(setting->caller);
	db_run(&upsert_config, values, NULL);
	visit_secrets(setting, true);
	db_leave(&scope);
}

static void
set_provider(FunctionCallInfo fcinfo)
{
	ProviderSetting setting;
	Oid caller = GetUserId();

	memset(&setting, 0, sizeof(setting));
	require_admin("configure a provider");
	setting.caller = GetUserNameFromId(caller, false);
	setting.team_id = identifier_argument(fcinfo, 0, "team_id");
	setting.provider = provider_get(identifier_argument(fcinfo, 1, "provider"));
	require_argument(fcinfo, 2, "options");
	setting.options = object_argument(fcinfo, 2, "options");
	provider_check_options(setting.provider, OPTIONS_TEAM, setting.options);

	if (PG_ARGISNULL(3))
	{
		write_setting(&setting);
		return;
	}

	setting.secrets = PG_GETARG_JSONB_P(3);
	PG_TRY();
	{
		/* No check_document(): it would print the secrets to measure them. */
		if (!JB_ROOT_IS_OBJECT(setting.secrets))
			ereport(ERROR, errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					errmsg("argument \"secrets\" must be a JSON object"));
		visit_secrets(&setting, false);
		write_setting(&setting);
	}
	PG_FINALLY();
	{
		if ((Pointer) setting.secrets != DatumGetPointer(PG_GETARG_DATUM(3)))
			secret_wipe(VARDATA(setting.secrets), VARSIZE(setting.secrets) - VARHDRSZ);
	}
	PG_END_TRY();
}

Datum
agentvm_set_provider(PG_FUNCTION_ARGS)
{
	HiddenCaller hidden;

	hide_caller_begin(&hidden);
	if (!PG_ARGISNULL(3))
		hide_activity("agentvm.set_provider()");
	set_provider(fcinfo);
	hide_caller_end(&hidden);

	PG_RETURN_VOID();
}

Datum
agentvm_drop_provider(PG_FUNCTION_ARGS)
{
	DbScope scope;
	Datum values[2];
	char *team_id;
	char *provider;
	int64 live;

	require_admin("drop a provider's configuration");
	team_id = identifier_argument(fcinfo, 0, "team_id");
	provider = identifier_argument(fcinfo, 1, "provider");

	db_enter(&scope);
	team_lock(team_id, ExclusiveLock);
	require_team_exists(team_id);

	live = count_live_sessions(team_id, provider);
	if (live > 0)
		ereport(
			ERROR, errcode(ERRCODE_OBJECT_IN_USE),
			errmsg_plural("team \"%s\" has %lld live session with provider \"%s\"",
						  "team \"%s\" has %lld live sessions with provider \"%s\"",
						  (unsigned long) live, team_id, (long long) live, provider),
			errhint("Terminate them with agentvm.terminate(), and wait until they have ended."));

	values[0] = CStringGetTextDatum(team_id);
	values[1] = CStringGetTextDatum(provider);
	db_run(&delete_config, values, NULL);
	if (SPI_processed == 0)
		ereport(ERROR, errcode(ERRCODE_UNDEFINED_OBJECT),
				errmsg("team \"%s\" has no configuration for provider \"%s\"", team_id, provider));
	db_leave(&scope);

	PG_RETURN_VOID();
}
