/*-------------------------------------------------------------------------
 *
 * crypt.c
 *		Encrypted columns, through pgcrypto's functions.
 *
 * pgcrypto exports no C symbols, so its SQL functions are called through the
 * function manager: the key and the plaintext are Datums and never part of any
 * SQL text, bind parameter or plan.  The functions are looked up in the schema
 * of the extension itself and must be its members, so that no search path and
 * no function of the same name can stand in for them.
 *
 * The plaintext is an envelope,
 *
 *		version (1 byte), then team, kind and field, each as a length (4 bytes,
 *		network order) and its bytes, then the value,
 *
 * so a stored value is worth nothing in any other row.  OpenPGP's modification
 * check inside makes sure that it has not been changed.
 *
 * Passwords and plaintexts live in a scratch context, with a callback that wipes
 * them when it is deleted: at the end, or by whoever cleans up after an error.
 *
 * A password of 256 random bits needs no stretching, hence s2k-mode=1.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/dependency.h"
#include "catalog/indexing.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "port/pg_bswap.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/syscache.h"

#include "agentvm.h"
#include "db.h"
#include "secret/keyring.h"
#include "secret/secret.h"

#define ENVELOPE_VERSION 1
#define PGP_OPTIONS "cipher-algo=aes256, s2k-mode=1, compress-algo=0"

/* pgcrypto's functions; forgotten whenever any function changes. */
static Oid encrypt_function = InvalidOid;
static Oid decrypt_function = InvalidOid;

static void
forget_functions(Datum arg, int cacheid, uint32 hashvalue)
{
	encrypt_function = InvalidOid;
	decrypt_function = InvalidOid;
}

/* OID and schema of extension pgcrypto; raises when it is not installed. */
static Oid
find_pgcrypto(Oid *schema)
{
	Relation relation;
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple tuple;
	Oid extension = InvalidOid;

	relation = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum("pgcrypto"));
	scan = systable_beginscan(relation, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		Form_pg_extension form = (Form_pg_extension) GETSTRUCT(tuple);

		extension = form->oid;
		*schema = form->extnamespace;
	}
	systable_endscan(scan);
	table_close(relation, AccessShareLock);

	if (!OidIsValid(extension))
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("extension pgcrypto is not installed in this database"), hide_caller());
	return extension;
}

static Oid
find_function(Oid extension, Oid schema, const char *name, int nargs, const Oid *argtypes)
{
	oidvector *arguments = buildoidvector(argtypes, nargs);
	Oid function;

	function = GetSysCacheOid3(PROCNAMEARGSNSP, Anum_pg_proc_oid, PointerGetDatum(name),
							   PointerGetDatum(arguments), ObjectIdGetDatum(schema));
	if (!OidIsValid(function) || getExtensionOfObject(ProcedureRelationId, function) != extension)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("extension pgcrypto has no function %s", name),
				errhint("Run ALTER EXTENSION pgcrypto UPDATE, or install it anew."), hide_caller());
	pfree(arguments);
	return function;
}

static void
find_functions(void)
{
	static bool registered = false;
	Oid encrypt_types[] = {BYTEAOID, TEXTOID, TEXTOID};
	Oid decrypt_types[] = {BYTEAOID, TEXTOID};
	Oid extension;
	Oid schema = InvalidOid;
	Oid encrypt;
	Oid decrypt;

	if (!registered)
	{
		CacheRegisterSyscacheCallback(PROCOID, forget_functions, (Datum) 0);
		registered = true;
	}
	if (OidIsValid(encrypt_function))
		return;

	extension = find_pgcrypto(&schema);
	encrypt = find_function(extension, schema, "pgp_sym_encrypt_bytea", 3, encrypt_types);
	decrypt = find_function(extension, schema, "pgp_sym_decrypt_bytea", 2, decrypt_types);
	encrypt_function = encrypt;
	decrypt_function = decrypt;
}

/* The primary message of every failure to decrypt; the detail tells them apart. */
static int
not_decrypted(const char *team, const char *kind, const char *field)
{
	return errmsg("could not decrypt the secret \"%s\" of team \"%s\" for \"%s\"", field, team,
				  kind);
}

static void
wipe_at_end(struct varlena *value)
{
	secret_wipe_later(VARDATA_ANY(value), VARSIZE_ANY_EXHDR(value));
}

static MemoryContext
make_scratch(void)
{
	return AllocSetContextCreate(CurrentMemoryContext, "agentvm plaintext", ALLOCSET_SMALL_SIZES);
}

static text *
make_password(const char *key)
{
	text *password = cstring_to_text_with_len(key, KEYRING_TEXT_LEN);

	wipe_at_end(password);
	return password;
}

static char *
put_part(char *at, const char *part, size_t len)
{
	uint32 length = pg_hton32((uint32) len);

	memcpy(at, &length, sizeof(length));
	memcpy(at + sizeof(length), part, len);
	return at + sizeof(length) + len;
}

/* The envelope of "len" bytes for one place; with none, the head that it must begin with. */
static bytea *
make_envelope(const char *team, const char *kind, const char *field, const char *bytes, size_t len)
{
	size_t team_len = strlen(team);
	size_t kind_len = strlen(kind);
	size_t field_len = strlen(field);
	size_t size = VARHDRSZ + 1 + 3 * sizeof(uint32) + team_len + kind_len + field_len + len;
	bytea *envelope = (bytea *) palloc(size);
	char *at = VARDATA(envelope);

	SET_VARSIZE(envelope, size);
	*at++ = ENVELOPE_VERSION;
	at = put_part(at, team, team_len);
	at = put_part(at, kind, kind_len);
	at = put_part(at, field, field_len);
	if (len > 0)
		memcpy(at, bytes, len);
	wipe_at_end(envelope);
	return envelope;
}

/*
 * The value in an envelope, as a secret in "context", or NULL when the envelope
 * is for another place.
 */
static Secret *
open_envelope(const char *team, const char *kind, const char *field, const bytea *envelope,
			  MemoryContext context)
{
	bytea *head = make_envelope(team, kind, field, NULL, 0);
	size_t head_len = VARSIZE_ANY_EXHDR(head);
	MemoryContext oldcontext;
	Secret *secret;

	if (VARSIZE_ANY_EXHDR(envelope) < head_len ||
		memcmp(VARDATA_ANY(envelope), VARDATA_ANY(head), head_len) != 0)
		return NULL;

	oldcontext = MemoryContextSwitchTo(context);
	secret = secret_make(VARDATA_ANY(envelope) + head_len, VARSIZE_ANY_EXHDR(envelope) - head_len);
	MemoryContextSwitchTo(oldcontext);
	return secret;
}

bytea *
secret_encrypt(const char *team, const char *kind, const char *field, const char *bytes, size_t len,
			   char **key_id)
{
	HiddenCaller hide;
	MemoryContext context = CurrentMemoryContext;
	MemoryContext scratch;
	const char *key;
	Datum encrypted;
	bytea *result;

	hide_caller_begin(&hide);
	find_functions();
	*key_id = keyring_current_id();
	key = keyring_key_text(*key_id);
	if (key == NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("the key file has changed during encryption"), errhint("Try again."));

	scratch = make_scratch();
	MemoryContextSwitchTo(scratch);
	encrypted = OidFunctionCall3(
		encrypt_function, PointerGetDatum(make_envelope(team, kind, field, bytes, len)),
		PointerGetDatum(make_password(key)), CStringGetTextDatum(PGP_OPTIONS));
	MemoryContextSwitchTo(context);
	result = DatumGetByteaPCopy(encrypted);
	MemoryContextDelete(scratch);
	hide_caller_end(&hide);

	return result;
}

/*
 * pgcrypto's decryption, or NULL when it finds the key wrong or the value
 * damaged.  It says so by raising; the subtransaction is what makes it safe to
 * go on after that.
 */
static bytea *
try_decrypt(const bytea *value, const text *password)
{
	MemoryContext oldcontext = CurrentMemoryContext;
	ResourceOwner oldowner = CurrentResourceOwner;
	bytea *volatile result = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(oldcontext);

	PG_TRY();
	{
		result = DatumGetByteaP(
			OidFunctionCall2(decrypt_function, PointerGetDatum(value), PointerGetDatum(password)));
		wipe_at_end(result);
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(oldcontext);
		CurrentResourceOwner = oldowner;
	}
	PG_CATCH();
	{
		ErrorData *error;
		int category;

		MemoryContextSwitchTo(oldcontext);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(oldcontext);
		CurrentResourceOwner = oldowner;

		/* Cancel, shutdown and lack of memory say nothing about the value. */
		category = ERRCODE_TO_CATEGORY(error->sqlerrcode);
		if (category == ERRCODE_OPERATOR_INTERVENTION || category == ERRCODE_INSUFFICIENT_RESOURCES)
			ReThrowError(error);
		FreeErrorData(error);
		result = NULL;
	}
	PG_END_TRY();

	return result;
}

Secret *
secret_decrypt(const char *team, const char *kind, const char *field, const bytea *value,
			   const char *key_id)
{
	HiddenCaller hide;
	MemoryContext context = CurrentMemoryContext;
	MemoryContext scratch;
	const char *key;
	bytea *envelope;
	Secret *secret = NULL;

	hide_caller_begin(&hide);
	find_functions();
	key = keyring_key_text(key_id);
	if (key == NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION), not_decrypted(team, kind, field),
				errdetail("The key file has no key \"%s\".", key_id),
				errhint("Put that key back into the file named by agentvm.key_file."));

	scratch = make_scratch();
	MemoryContextSwitchTo(scratch);
	envelope = try_decrypt(value, make_password(key));
	if (envelope == NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION), not_decrypted(team, kind, field),
				errdetail("The key \"%s\" in the key file is not the one that it was encrypted "
						  "with, or the stored value is damaged.",
						  key_id));

	secret = open_envelope(team, kind, field, envelope, context);
	if (secret == NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION), not_decrypted(team, kind, field),
				errdetail("The stored value was made for another team, provider or field: the row "
						  "has been copied from elsewhere."));

	MemoryContextSwitchTo(context);
	MemoryContextDelete(scratch);
	hide_caller_end(&hide);

	return secret;
}
