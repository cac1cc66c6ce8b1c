/*-------------------------------------------------------------------------
 *
 * checks.c
 *		Arguments and conditions that the functions of this room share.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"

#include "agentvm.h"
#include "db.h"
#include "team/checks.h"

/* Bytes of a caller's key or value that a message shows. */
#define EXCERPT_LEN 64

static DbQuery team_exists = {
	"SELECT FROM agentvm.team WHERE team_id = $1",
	1,
	{TEXTOID},
	NULL,
};

static DbQuery live_sessions = {
	"SELECT count(*) FROM agentvm.session"
	" WHERE team_id = $1 AND ended_at IS NULL AND ($2 IS NULL OR provider = $2)",
	2,
	{TEXTOID, TEXTOID},
	NULL,
};

void
require_argument(FunctionCallInfo fcinfo, int argno, const char *argument)
{
	if (PG_ARGISNULL(argno))
		ereport(ERROR, errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				errmsg("argument \"%s\" must not be null", argument));
}

char *
identifier_argument(FunctionCallInfo fcinfo, int argno, const char *argument)
{
	require_argument(fcinfo, argno, argument);
	return check_identifier(PG_GETARG_TEXT_PP(argno), argument);
}

char *
optional_identifier_argument(FunctionCallInfo fcinfo, int argno, const char *argument)
{
	if (PG_ARGISNULL(argno))
		return NULL;
	return check_identifier(PG_GETARG_TEXT_PP(argno), argument);
}

Jsonb *
object_argument(FunctionCallInfo fcinfo, int argno, const char *argument)
{
	Jsonb *object;

	if (PG_ARGISNULL(argno))
		return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum("{}")));

	object = PG_GETARG_JSONB_P(argno);
	check_document(object, 'o', argument);
	return object;
}

void
require_team_exists(const char *team_id)
{
	Datum values[1];

	values[0] = CStringGetTextDatum(team_id);
	db_run(&team_exists, values, NULL);
	if (SPI_processed == 0)
		ereport(ERROR, errcode(ERRCODE_UNDEFINED_OBJECT),
				errmsg("team \"%s\" does not exist", team_id));
}

int64
count_live_sessions(const char *team_id, const char *provider)
{
	Datum values[2];
	char nulls[2] = {' ', ' '};
	bool isnull;

	values[0] = CStringGetTextDatum(team_id);
	values[1] = provider ? CStringGetTextDatum(provider) : (Datum) 0;
	nulls[1] = provider ? ' ' : 'n';
	db_run(&live_sessions, values, nulls);
	return DatumGetInt64(db_value(0, 1, &isnull));
}

void
check_ceiling(int64 seconds, const char *argument)
{
	if (seconds > avm_max_lifetime_ceiling_s)
		ereport(
			ERROR, errcode(AVM_OVER_LIMIT),
			errmsg("%s is above the ceiling of %d seconds", argument, avm_max_lifetime_ceiling_s),
			errhint("The ceiling is the setting agentvm.max_lifetime_ceiling."));
}

char *
json_excerpt(JsonbValue *value)
{
	Jsonb *document;
	char *text;
	int len;
	int shown;

	if (value->type == jbvBinary)
		text = JsonbToCString(NULL, value->val.binary.data, value->val.binary.len);
	else
	{
		document = JsonbValueToJsonb(value);
		text = JsonbToCString(NULL, &document->root, VARSIZE(document));
	}

	len = strlen(text);
	if (len <= EXCERPT_LEN)
		return text;
	shown = pg_mbcliplen(text, len, EXCERPT_LEN);
	return psprintf("%.*s...", shown, text);
}
