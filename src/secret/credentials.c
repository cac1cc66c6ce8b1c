/*-------------------------------------------------------------------------
 *
 * credentials.c
 *		A team's credentials for a provider, decrypted.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "storage/fd.h"
#include "utils/builtins.h"

#include "agentvm.h"
#include "db.h"
#include "secret/credentials.h"
#include "secret/secret.h"

static DbQuery select_secrets = {
	"SELECT s.field, s.value_enc, s.key_id, t.external_id, c.options FROM agentvm.team t"
	" LEFT JOIN agentvm.provider_config c ON c.team_id = t.team_id AND c.provider = $2"
	" LEFT JOIN agentvm.provider_secret s ON s.team_id = t.team_id AND s.provider = $2"
	" WHERE t.team_id = $1 ORDER BY s.field",
	2,
	{TEXTOID, TEXTOID},
	NULL,
};

#define METADATA_URL "http://169.254.169.254"

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

/* Whether a provider is AWS, and the server's own credentials for it may be used. */
static bool
server_may_be_asked(const char *provider)
{
	return avm_environment_credentials && strcmp(provider, "ec2") == 0;
}

static bool
in_environment(const char *provider)
{
	if (!server_may_be_asked(provider))
		return false;
	for (int i = 0; i < lengthof(environment); i++)
	{
		if (environment[i].required && environment_value(i) == NULL)
			return false;
	}
	return true;
}

/* Whether the first line of a file of the kernel's begins like this, in any case. */
static bool
file_begins(const char *path, const char *prefix)
{
	char line[64];
	FILE *file = AllocateFile(path, "r");
	bool found;

	if (file == NULL)
		return false;
	found = fgets(line, sizeof(line), file) != NULL &&
			pg_strncasecmp(line, prefix, strlen(prefix)) == 0;
	FreeFile(file);
	return found;
}

/* Elsewhere nobody is to be asked at that address, and nobody's answer waited for. */
static bool
runs_on_ec2(void)
{
	return file_begins("/sys/class/dmi/id/sys_vendor", "Amazon EC2") ||
		   file_begins("/sys/hypervisor/uuid", "ec2");
}

char *
credentials_metadata_url(const char *provider)
{
	const char *disabled = getenv("AWS_EC2_METADATA_DISABLED");
	const char *url = getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT");
	size_t len;

	if (!server_may_be_asked(provider) ||
		(disabled != NULL && pg_strcasecmp(disabled, "true") == 0))
		return NULL;
	if (url == NULL || url[0] == '\0')
		return runs_on_ec2() ? pstrdup(METADATA_URL) : NULL;
	for (len = strlen(url); len > 0 && url[len - 1] == '/'; len--)
		;
	return pnstrdup(url, len);
}

bool
credentials_of_server(const char *provider)
{
	return in_environment(provider) || credentials_metadata_url(provider) != NULL;
}

Credentials *
credentials_load(const char *team_id, const char *provider, MemoryContext context)
{
	MemoryContext oldcontext;
	Datum values[2];
	EncryptedField *fields;
	Credentials *credentials = MemoryContextAllocZero(context, sizeof(Credentials));
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
		Datum value;

		if (i == 0)
		{
			credentials->external_id = db_text(i, 4, context);
			value = db_value(i, 5, &isnull);
			if (!isnull)
			{
				oldcontext = MemoryContextSwitchTo(context);
				credentials->options = (Jsonb *) PG_DETOAST_DATUM_COPY(value);
				MemoryContextSwitchTo(oldcontext);
			}
		}
		value = db_value(i, 2, &isnull);
		if (isnull)
		{
			count = 0; /* the one row of a team without secrets */
			break;
		}
		fields[i].field = db_text(i, 1, CurrentMemoryContext);
		fields[i].value = DatumGetByteaPCopy(value);
		fields[i].key_id = db_text(i, 3, CurrentMemoryContext);
	}

	oldcontext = MemoryContextSwitchTo(context);
	credentials->secrets = set = secret_set_make();
	for (i = 0; i < count; i++)
		secret_set_add(
			set, fields[i].field,
			secret_decrypt(team_id, provider, fields[i].field, fields[i].value, fields[i].key_id));
	if (count == 0 && in_environment(provider))
	{
		for (i = 0; i < lengthof(environment); i++)
		{
			const char *value = environment_value(i);

			if (value != NULL)
				secret_set_add(set, environment[i].field, secret_make(value, strlen(value)));
		}
	}
	MemoryContextSwitchTo(oldcontext);

	return credentials;
}
