/*-------------------------------------------------------------------------
 *
 * credentials.c
 *		A team's credentials for a provider, decrypted.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"

#include "agentvm.h"
#include "db.h"
#include "secret/credentials.h"
#include "secret/secret.h"

static DbQuery select_secrets = {
	"SELECT field, value_enc, key_id FROM agentvm.provider_secret"
	" WHERE team_id = $1 AND provider = $2 ORDER BY field",
	2,
	{TEXTOID, TEXTOID},
	NULL,
};

typedef struct EncryptedField
{
	char *field;
	bytea *value;
	char *key_id;
} EncryptedField;

SecretSet *
credentials_load(const char *team_id, const char *provider, MemoryContext context)
{
	MemoryContext oldcontext;
	Datum values[2];
	EncryptedField *fields;
	SecretSet *set;
	uint64 count;
	uint64 i;

	values[0] = CStringGetTextDatum(team_id);
	values[1] = CStringGetTextDatum(provider);
	db_run(&select_secrets, values, NULL);

	/* Out of SPI's hands first: decryption runs a subtransaction. */
	count = SPI_processed;
	fields = (EncryptedField *) palloc0(Max(count, 1) * sizeof(EncryptedField));
	for (i = 0; i < count; i++)
	{
		bool isnull;

		fields[i].field = db_text(i, 1, CurrentMemoryContext);
		fields[i].value = DatumGetByteaPCopy(db_value(i, 2, &isnull));
		fields[i].key_id = db_text(i, 3, CurrentMemoryContext);
	}

	oldcontext = MemoryContextSwitchTo(context);
	set = secret_set_make();
	for (i = 0; i < count; i++)
		secret_set_add(
			set, fields[i].field,
			secret_decrypt(team_id, provider, fields[i].field, fields[i].value, fields[i].key_id));
	MemoryContextSwitchTo(oldcontext);

	return set;
}
