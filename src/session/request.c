/*-------------------------------------------------------------------------
 *
 * request.c
 *		What provision() is asked for: its arguments, checked; their hash, by which a
 *		repeat is told from a conflict; and what of them the runtime gets.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "common/sha2.h"
#include "db.h"
#include "secret/secret.h"
#include "session/request.h"
#include "session/session.h"
#include "utils/builtins.h"
#include "utils/datum.h"

static DbQuery by_key_query = {
	"SELECT session_id, args_hash FROM agentvm.session WHERE team_id = $1 AND idempotency_key = $2",
	2,
	{TEXTOID, TEXTOID}};

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

void
request_read(FunctionCallInfo fcinfo, Request *request)
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

void
request_read_warm(FunctionCallInfo fcinfo, Request *request)
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

bytea *
request_hash(const Request *request)
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

bool
request_find(const Request *request, const bytea *hash, pg_uuid_t *found)
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

void
request_raise_conflict(const Request *request)
{
	ereport(ERROR,
			(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
			 errmsg("idempotency key \"%s\" was used concurrently", request->idempotency_key),
			 errhint("Try again.")));
	pg_unreachable();
}

bytea *
request_payload(const Request *request, const char *session_id, char **key_id)
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
