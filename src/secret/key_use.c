/*-------------------------------------------------------------------------
 *
 * key_use.c
 *		What in the database still needs which master key.
 *
 * A session has two uses for keys.  Its payload is encrypted with one, and can be
 * encrypted anew at any time; nobody may ask for it any more once the session is
 * ending.  Its bootstrap token is made of one, and as long as the launch may have
 * to be repeated, with the very same bytes, that key cannot change.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/timestamp.h"

#include "agentvm.h"
#include "db.h"
#include "secret/key_use.h"

static DbQuery uses_query = {
	"SELECT key_id, sum(secrets)::int8, sum(payloads)::int8, sum(launches)::int8, max(until) FROM "
	"(SELECT key_id, count(*) AS secrets, 0 AS payloads, 0 AS launches, NULL::timestamptz AS until "
	"FROM agentvm.provider_secret GROUP BY 1 "
	"UNION ALL SELECT coalesce(payload_key_id, key_id), 0, count(*), 0, NULL "
	"FROM agentvm.session WHERE ended_at IS NULL AND state <> 'terminating' "
	"AND payload_enc IS NOT NULL GROUP BY 1 "
	"UNION ALL SELECT key_id, 0, 0, count(*), max(CASE WHEN state = 'provisioning' THEN "
	"least(deadline_at, launched_at + bootstrap_timeout) ELSE deadline_at END) "
	"FROM agentvm.session WHERE ended_at IS NULL AND state <> 'terminating' "
	"AND runtime AND NOT running AND key_id IS NOT NULL GROUP BY 1) AS u "
	"GROUP BY key_id ORDER BY key_id COLLATE \"C\"",
	0,
	{0},
	NULL,
};

List *
key_uses(void)
{
	List *uses = NIL;
	uint64 i;

	db_run(&uses_query, NULL, NULL);
	for (i = 0; i < SPI_processed; i++)
	{
		KeyUse *use = (KeyUse *) palloc0(sizeof(KeyUse));
		bool isnull;
		Datum until;

		use->key_id = db_text(i, 1, CurrentMemoryContext);
		use->secrets = DatumGetInt64(db_value(i, 2, &isnull));
		use->payloads = DatumGetInt64(db_value(i, 3, &isnull));
		use->launches = DatumGetInt64(db_value(i, 4, &isnull));
		until = db_value(i, 5, &isnull);
		use->until = isnull ? DT_NOEND : DatumGetTimestampTz(until);
		/* other tooling may have left a payload without a key: nothing needs what nobody knows */
		if (use->key_id != NULL)
			uses = lappend(uses, use);
	}
	SPI_freetuptable(SPI_tuptable);
	return uses;
}

char *
key_use_text(const KeyUse *use)
{
	StringInfoData text;

	initStringInfo(&text);
	if (use->secrets > 0)
		appendStringInfo(&text, "%lld provider secret%s", (long long) use->secrets,
						 use->secrets == 1 ? "" : "s");
	if (use->payloads > 0)
		appendStringInfo(&text, "%senv and repos of %lld session%s", text.len > 0 ? ", " : "",
						 (long long) use->payloads, use->payloads == 1 ? "" : "s");
	if (use->launches > 0)
		appendStringInfo(&text, "%s%lld launch%s under way (until %s at the latest)",
						 text.len > 0 ? ", " : "", (long long) use->launches,
						 use->launches == 1 ? "" : "es", timestamptz_to_str(use->until));
	return text.data;
}
