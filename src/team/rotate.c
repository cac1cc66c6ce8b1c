/*-------------------------------------------------------------------------
 *
 * rotate.c
 *		rotate_keys(): encrypt anew, with the key file's first key, what other keys
 *		have encrypted.
 *
 * It runs beside everything else.  It waits for nobody's lock (SKIP LOCKED), and
 * since a function cannot commit, it ends after half a second of holding locks of
 * its own, and is called again until nothing is left.  Killed in the middle, it
 * leaves what earlier calls have done.
 *
 * Rows whose key the file lacks are not even looked at; a row that does not
 * decrypt is told of and left as it is, so that it stands in nobody's way.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "storage/latch.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "agentvm.h"
#include "db.h"
#include "engine/turn.h"
#include "engine/wake.h"
#include "secret/key_use.h"
#include "secret/secret.h"

PG_FUNCTION_INFO_V1(agentvm_rotate_keys);

#define CHUNK 100		   /* rows locked at once */
#define HOLD_LOCKS_MS 500  /* then leave the rest to the next call */
#define LOCKED_TRIES 50	   /* when all that is left is locked by others */
#define LOCKED_PAUSE_MS 20 /* between them */
#define MAX_WARNINGS 10	   /* about rows that do not decrypt, in one call */

/* What one call has done. */
typedef struct Rotation
{
	MemoryContext row_context; /* of one row: its secret is wiped with it */
	Datum usable;			   /* ids of the keys that are to be got rid of, and are in the file */
	TimestampTz first_lock_at; /* 0: none yet */
	int done;
	int failed;
} Rotation;

static DbQuery secrets_query = {
	"SELECT team_id, provider, field, value_enc, key_id FROM agentvm.provider_secret"
	" WHERE key_id = ANY ($1) AND (team_id, provider, field) > ($2, $3, $4)"
	" ORDER BY team_id, provider, field LIMIT $5 FOR NO KEY UPDATE SKIP LOCKED",
	5,
	{TEXTARRAYOID, TEXTOID, TEXTOID, TEXTOID, INT4OID},
	NULL,
};

/* By whom and when it was last set stays as it was: it is the same secret. */
static DbQuery update_secret = {
	"UPDATE agentvm.provider_secret SET value_enc = $4, key_id = $5"
	" WHERE team_id = $1 AND provider = $2 AND field = $3",
	5,
	{TEXTOID, TEXTOID, TEXTOID, BYTEAOID, TEXTOID},
	NULL,
};

/* The payload of a session that is ending is asked for by nobody: the engine has that row for itself. */
static DbQuery payloads_query = {
	"SELECT session_id, team_id, payload_enc, coalesce(payload_key_id, key_id), next_check_at"
	" FROM agentvm.session WHERE coalesce(payload_key_id, key_id) = ANY ($1) AND session_id > $2"
	" AND payload_enc IS NOT NULL AND ended_at IS NULL AND state <> 'terminating'"
	" ORDER BY session_id LIMIT $3 FOR NO KEY UPDATE SKIP LOCKED",
	3,
	{TEXTARRAYOID, UUIDOID, INT4OID},
	NULL,
};

static DbQuery update_payload = {
	"UPDATE agentvm.session SET payload_enc = $2, payload_key_id = $3 WHERE session_id = $1",
	3,
	{UUIDOID, BYTEAOID, TEXTOID},
	NULL,
};

/* A row that is encrypted with another key than the current one. */
typedef struct Encrypted
{
	char *team_id;
	char *kind;	 /* provider, or "session" */
	char *field; /* or session id */
	bytea *value;
	char *key_id;
	Datum session_id;
	TimestampTz next_check_at; /* of a session; 0: NULL */
} Encrypted;

/* Whether this call has held locks long enough.  One that has achieved nothing yet goes on. */
static bool
is_over(const Rotation *rotation)
{
	return rotation->done > 0 && TimestampDifferenceExceeds(rotation->first_lock_at,
															GetCurrentTimestamp(), HOLD_LOCKS_MS);
}

/* The value under the current key, or NULL (having told why) when it does not decrypt. */
static bytea *
encrypt_anew(Rotation *rotation, const Encrypted *row, char **key_id)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	bytea *volatile value = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		Secret *plain =
			secret_decrypt(row->team_id, row->kind, row->field, row->value, row->key_id);

		value = secret_encrypt(row->team_id, row->kind, row->field, secret_bytes(plain),
							   secret_len(plain), key_id);
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		ErrorData *error = abort_subtransaction(context, owner);

		if (error->sqlerrcode != AVM_INVALID_CONFIGURATION)
			ReThrowError(error);
		if (rotation->failed++ < MAX_WARNINGS)
			ereport(WARNING, errcode(error->sqlerrcode), errmsg_internal("%s", error->message),
					error->detail ? errdetail_internal("%s", error->detail) : 0,
					error->hint ? errhint("%s", error->hint) : 0);
	}
	PG_END_TRY();

	return value;
}

static void
rotate_row(Rotation *rotation, const Encrypted *row)
{
	MemoryContext oldcontext;
	Datum values[5];
	char *key_id;
	bytea *value;

	CHECK_FOR_INTERRUPTS();
	if (rotation->first_lock_at == 0)
		rotation->first_lock_at = GetCurrentTimestamp();

	oldcontext = MemoryContextSwitchTo(rotation->row_context);
	value = encrypt_anew(rotation, row, &key_id);
	if (value != NULL && row->session_id != (Datum) 0)
	{
		values[0] = row->session_id;
		values[1] = PointerGetDatum(value);
		values[2] = CStringGetTextDatum(key_id);
		db_run(&update_payload, values, NULL);
	}
	else if (value != NULL)
	{
		values[0] = CStringGetTextDatum(row->team_id);
		values[1] = CStringGetTextDatum(row->kind);
		values[2] = CStringGetTextDatum(row->field);
		values[3] = PointerGetDatum(value);
		values[4] = CStringGetTextDatum(key_id);
		db_run(&update_secret, values, NULL);
	}
	if (value != NULL)
		rotation->done++;
	/* workers may have passed it by while we had it locked */
	if (row->next_check_at != 0)
		wake_after_lock(LANE_ALL, row->next_check_at);
	MemoryContextSwitchTo(oldcontext);
	MemoryContextReset(rotation->row_context);
}

/* Lock the next rows of one table, behind "last" (NULL: from the start); *count is set. */
static Encrypted *
next_rows(const Rotation *rotation, bool sessions, const Encrypted *last, int *count)
{
	static const pg_uuid_t least = {{0}};
	Encrypted *rows;
	Datum values[5];
	int i;

	values[0] = rotation->usable;
	if (sessions)
	{
		values[1] = last ? last->session_id : UUIDPGetDatum(&least);
		values[2] = Int32GetDatum(CHUNK);
		db_run(&payloads_query, values, NULL);
	}
	else
	{
		values[1] = CStringGetTextDatum(last ? last->team_id : "");
		values[2] = CStringGetTextDatum(last ? last->kind : "");
		values[3] = CStringGetTextDatum(last ? last->field : "");
		values[4] = Int32GetDatum(CHUNK);
		db_run(&secrets_query, values, NULL);
	}

	*count = SPI_processed;
	rows = (Encrypted *) palloc0(CHUNK * sizeof(Encrypted));
	for (i = 0; i < *count; i++)
	{
		Encrypted *row = &rows[i];
		bool isnull;
		Datum due;

		row->team_id = db_text(i, sessions ? 2 : 1, CurrentMemoryContext);
		row->kind = sessions ? "session" : db_text(i, 2, CurrentMemoryContext);
		row->field = db_text(i, sessions ? 1 : 3, CurrentMemoryContext);
		row->value = DatumGetByteaPCopy(db_value(i, sessions ? 3 : 4, &isnull));
		row->key_id = db_text(i, sessions ? 4 : 5, CurrentMemoryContext);
		if (!sessions)
			continue;
		row->session_id = DirectFunctionCall1(uuid_in, CStringGetDatum(row->field));
		due = db_value(i, 5, &isnull);
		row->next_check_at = isnull ? 0 : DatumGetTimestampTz(due);
	}
	SPI_freetuptable(SPI_tuptable);
	return rows;
}

static void
rotate_table(Rotation *rotation, bool sessions)
{
	MemoryContext contexts[2];
	MemoryContext oldcontext = CurrentMemoryContext;
	Encrypted *last = NULL;
	int count = CHUNK;
	int turn;

	/* two, since the last row of one chunk tells where the next one begins */
	contexts[0] = AllocSetContextCreate(oldcontext, "agentvm rotation", ALLOCSET_DEFAULT_SIZES);
	contexts[1] = AllocSetContextCreate(oldcontext, "agentvm rotation", ALLOCSET_DEFAULT_SIZES);
	for (turn = 0; count == CHUNK && !is_over(rotation); turn = 1 - turn)
	{
		Encrypted *rows;
		int i;

		MemoryContextSwitchTo(contexts[turn]);
		rows = next_rows(rotation, sessions, last, &count);
		for (i = 0; i < count; i++)
			rotate_row(rotation, &rows[i]);
		last = &rows[Max(count, 1) - 1];
		MemoryContextReset(contexts[1 - turn]);
	}
	MemoryContextSwitchTo(oldcontext);
	MemoryContextDelete(contexts[0]);
	MemoryContextDelete(contexts[1]);
}

/* Find out which keys are to be got rid of; how many rows they have encrypted. */
static int64
find_keys(Rotation *rotation)
{
	ArrayBuildState *usable = initArrayResult(TEXTOID, CurrentMemoryContext, false);
	char *current = keyring_current_id();
	int64 rows = 0;
	ListCell *lc;

	foreach (lc, key_uses())
	{
		KeyUse *use = (KeyUse *) lfirst(lc);

		if (strcmp(use->key_id, current) == 0 || keyring_key_problem(use->key_id) != NULL)
			continue;
		rows += use->secrets + use->payloads;
		accumArrayResult(usable, CStringGetTextDatum(use->key_id), false, TEXTOID,
						 CurrentMemoryContext);
	}
	rotation->usable = makeArrayResult(usable, CurrentMemoryContext);
	return rows;
}

/* Tell which keys must stay in the key file, and why. */
static void
tell_what_is_left(void)
{
	char *current = keyring_current_id();
	ListCell *lc;

	foreach (lc, key_uses())
	{
		KeyUse *use = (KeyUse *) lfirst(lc);
		bool there = keyring_key_problem(use->key_id) == NULL;

		if (strcmp(use->key_id, current) == 0)
			continue;
		ereport(NOTICE, errmsg("key \"%s\" is still needed: %s", use->key_id, key_use_text(use)),
				!there ? errhint("The key file lacks it: put it back.")
				: use->secrets + use->payloads > 0
					? errhint("Call agentvm.rotate_keys() again.")
					: errhint("Launches under way keep their key: leave it in the key file until "
							  "view agentvm.health names it no more."));
	}
}

Datum
agentvm_rotate_keys(PG_FUNCTION_ARGS)
{
	Rotation rotation;
	DbScope scope;
	int64 rows;
	int tries;

	require_admin("rotate keys");
	PreventCommandDuringRecovery("agentvm.rotate_keys()");
	memset(&rotation, 0, sizeof(rotation));
	db_enter(&scope);
	rotation.row_context =
		AllocSetContextCreate(CurrentMemoryContext, "agentvm rotated row", ALLOCSET_DEFAULT_SIZES);
	for (tries = 0;; tries++)
	{
		rotation.failed = 0;
		rows = find_keys(&rotation);
		if (rows > 0)
		{
			rotate_table(&rotation, false);
			rotate_table(&rotation, true);
		}
		if (rotation.done > 0 || rows <= rotation.failed || tries >= LOCKED_TRIES)
			break;
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, LOCKED_PAUSE_MS,
						 AvmWaitEvent("AgentvmRotateKeys"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	if (rotation.done == 0 && rows > rotation.failed)
		ereport(WARNING, errcode(ERRCODE_WARNING),
				errmsg("%lld rows are locked by other transactions",
					   (long long) (rows - rotation.failed)),
				errhint("Call agentvm.rotate_keys() again."));
	tell_what_is_left();
	db_leave(&scope);

	PG_RETURN_INT32(rotation.done);
}
