/*-------------------------------------------------------------------------
 *
 * command_row.c
 *		Rows of agentvm.command, and how they end.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "db.h"
#include "engine/command_row.h"
#include "engine/session_row.h"
#include "providers/provider.h"
#include "utils/timestamp.h"

/* It waits for nobody: what somebody holds is left for the next sweep. */
#define END_FREE(of)                                                                               \
	"WITH free AS MATERIALIZED (SELECT c.command_id FROM agentvm.command c WHERE " of              \
	" FOR UPDATE SKIP LOCKED) DELETE FROM agentvm.command c USING free "                           \
	"WHERE c.command_id = free.command_id "                                                        \
	"RETURNING " COMMAND_ENDED

static DbQuery end_session_query = {END_FREE("c.session_id = $1"), 1, {UUIDOID}};

static DbQuery end_left_query = {
	END_FREE("coalesce((SELECT s.ended_at IS NOT NULL FROM agentvm.session s "
			 "WHERE s.session_id = c.session_id), true)"),
	0,
	{0}};

uint64
commands_log_ends(Jsonb *detail, bool is_known)
{
	SPITupleTable *rows = SPI_tuptable;
	uint64 count = SPI_processed;
	uint64 i;

	for (i = 0; i < count; i++)
	{
		HeapTuple row = rows->vals[i];
		TupleDesc desc = rows->tupdesc;
		Jsonb *all = detail;
		pg_uuid_t *session_id;
		bool isnull;

		session_id = DatumGetUUIDP(SPI_getbinval(row, desc, 1, &isnull));
		all = handle_set_text(all, "command", SPI_getvalue(row, desc, 2));
		all = handle_set_text(all, "role", SPI_getvalue(row, desc, 4));
		if (is_known && option_value(all, "duration_ms") == NULL)
		{
			TimestampTz began = DatumGetTimestampTz(SPI_getbinval(row, desc, 6, &isnull));

			all =
				handle_set_int(all, "duration_ms", Max((GetCurrentTimestamp() - began) / 1000, 0));
		}
		event_add(session_id, SPI_getvalue(row, desc, 5),
				  psprintf("%s_ended", SPI_getvalue(row, desc, 3)), NULL, NULL, NULL, all);
	}
	return count;
}

void
commands_end(const pg_uuid_t *session_id)
{
	Datum values[1] = {UUIDPGetDatum(session_id)};

	db_run(session_id ? &end_session_query : &end_left_query, session_id ? values : NULL, NULL);
	if (SPI_processed > 0)
		(void) commands_log_ends(handle_set_text(NULL, "outcome", "unknown"), false);
}
