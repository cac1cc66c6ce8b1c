/*-------------------------------------------------------------------------
 *
 * check_provider.c
 *		check_provider(): do a team's credentials work?
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/ask.h"
#include "miscadmin.h"
#include "utils/builtins.h"

PG_FUNCTION_INFO_V1(agentvm_check_provider);

static DbQuery config_query = {"SELECT coalesce($2, t.provider, $3), c.options FROM agentvm.team t "
							   "LEFT JOIN agentvm.provider_config c ON c.team_id = t.team_id "
							   "AND c.provider = coalesce($2, t.provider, $3) WHERE t.team_id = $1",
							   3,
							   {TEXTOID, TEXTOID, TEXTOID}};

Datum
agentvm_check_provider(PG_FUNCTION_ARGS)
{
	MemoryContext caller = CurrentMemoryContext;
	char *team_id;
	char *provider;
	Jsonb *options = NULL;
	DbScope scope;
	Datum values[3];
	char nulls[3] = {' ', ' ', ' '};
	bool isnull;
	Datum value;

	require_admin("check a provider");
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("team_id must not be null")));
	team_id = check_identifier(PG_GETARG_TEXT_PP(0), "team_id");
	values[0] = CStringGetTextDatum(team_id);
	nulls[1] = PG_ARGISNULL(1) ? 'n' : ' ';
	values[1] = PG_ARGISNULL(1) ? (Datum) 0 : PG_GETARG_DATUM(1);
	values[2] = CStringGetTextDatum(avm_default_provider);

	db_enter(&scope);
	db_run(&config_query, values, nulls);
	if (SPI_processed == 0)
		raise_no_such_team(team_id);
	provider = db_text(0, 1, caller);
	value = db_value(0, 2, &isnull);
	if (!isnull)
	{
		MemoryContext old = MemoryContextSwitchTo(caller);

		options = (Jsonb *) PG_DETOAST_DATUM_COPY(value);
		MemoryContextSwitchTo(old);
	}
	db_leave(&scope);
	if (options == NULL)
		options = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum("{}")));
	PG_RETURN_JSONB_P(provider_ask(OP_CHECK, team_id, provider, options, NULL));
}
