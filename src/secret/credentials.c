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

/* Where AWS's own tools look for credentials. */
static const struct
{
	const char *field;
	const char *variable;
	bool required;
} environment[] = {
	{"access_key_id", "AWS_ACCESS_KEY_ID", true},
	{"secret_access_key", "AWS_SECRET_ACCESS_KEY", true},
	{"session_token", "AWS_SESSION_TOKEN", false},
};

typedef struct EncryptedField
{
	char *field;
	bytea *value;
	char *key_id;
} EncryptedField;

static const char *
environment_value(int i)
{
	const char *value = getenv(environment[i].variable);

	return value != NULL && value[0] != '\0' ? value : NULL;
}

bool
credentials_in_environment(const char *provider)
{
	if (!avm_environment_credentials || strcmp(provider, "ec2") != 0)
		return false;
	for (int i = 0; i < lengthof(environment); i++)
	{
		if (environment[i].required && environment_value(i) == NULL)
			return false;
	}
	return true;
}

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
	if (count == 0 && credentials_in_environment(provider))
	{
		for (i = 0; i < lengthof(environment); i++)
		{
			const char *value = environment_value(i);

			if (value != NULL)
				secret_set_add(set, environment[i].field, secret_make(value, strlen(value)));
		}
	}
	MemoryContextSwitchTo(oldcontext);

	return set;
}
