/*-------------------------------------------------------------------------
 *
 * identity.c
 *		Whether this database is the one that its rows speak of.
 *
 * A restored or copied database must never launch or end anything by itself: the
 * original may live, and the VMs are the original's.  So a row of
 * agentvm.installation says whom the sessions belong to: the installation's
 * uuid, the cluster's system identifier, the database's OID, and the restore
 * that the cluster has come from, if any.  Workers, dispatch() and the sweeps act
 * only while there is exactly one such row, it is in use, and all of it matches;
 * otherwise an administrator has to decide with adopt_cluster().
 *
 * The row that CREATE EXTENSION makes is not in use, and pg_dump leaves it out
 * until it is.  create_team() or provision() takes it into use, which a restore
 * never calls.  So whatever arrives first when a dump is restored, in parallel
 * or not, nothing acts on it: before the dump's own row has come none is in
 * use, and afterwards there are two.
 *
 * A base backup has the system identifier of its origin.  The postmaster sees at
 * its start that it begins from one (recovery.signal, or backup_label without
 * standby.signal, which would mean failover) and writes a fresh id into a file
 * in the data directory.  The file stays; a database is in order again once its
 * row has the same id.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/htup_details.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "agentvm.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "common/file_perm.h"
#include "db.h"
#include "engine/drift.h"
#include "engine/forget.h"
#include "engine/identity.h"
#include "engine/wake.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_cluster_identity);
PG_FUNCTION_INFO_V1(agentvm_adopt_cluster);

#define RESTORE_FILE "agentvm.restored"
#define UUID_TEXT_LEN 36

/* The restore that this server has come from; empty: none, as far as we know. */
static char restore_id[UUID_TEXT_LEN + 1];
static bool restore_id_known = false;

static DbKey installation_key = {{"installation"}, {"installation_pkey"}, InvalidOid};

static DbQuery live_query = {"SELECT FROM agentvm.session WHERE ended_at IS NULL LIMIT 1", 0, {0}};

/* Where the row was copied while it was not in use, what begins here is another installation. */
static DbQuery use_query = {
	"UPDATE agentvm.installation SET in_use = true, "
	"installation_id = CASE WHEN system_identifier = $1 AND database = $2 THEN installation_id "
	"ELSE gen_random_uuid() END, system_identifier = $1, database = $2, restore_id = $3 "
	"WHERE NOT in_use AND (SELECT count(*) = 1 FROM agentvm.installation) "
	"AND NOT EXISTS (SELECT FROM agentvm.session WHERE ended_at IS NULL)",
	3,
	{INT8OID, OIDOID, UUIDOID}};

/* Two who adopt wait for each other; those who only look wait for nobody. */
static DbQuery lock_query = {"LOCK TABLE agentvm.installation IN SHARE ROW EXCLUSIVE MODE", 0, {0}};

static DbQuery clear_query = {
	"DELETE FROM agentvm.installation WHERE installation_id IS DISTINCT FROM $1", 1, {UUIDOID}};

static DbQuery adopt_query = {
	"INSERT INTO agentvm.installation AS i (installation_id, system_identifier, database, "
	"restore_id, in_use, adopted_at, adopted_by) "
	"VALUES (coalesce($4, gen_random_uuid()), $1, $2, $3, true, clock_timestamp(), $5) "
	"ON CONFLICT (installation_id) DO UPDATE SET system_identifier = $1, database = $2, "
	"restore_id = $3, in_use = true, adopted_at = excluded.adopted_at, adopted_by = $5",
	5,
	{INT8OID, OIDOID, UUIDOID, UUIDOID, NAMEOID}};

/* ---- the restore file ---- */

static bool
is_uuid_text(const char *text)
{
	int i;

	for (i = 0; i < UUID_TEXT_LEN; i++)
	{
		bool dash = i == 8 || i == 13 || i == 18 || i == 23;

		if (dash ? text[i] != '-' : strchr("0123456789abcdef", text[i]) == NULL || text[i] == '\0')
			return false;
	}
	return true;
}

/* Read the file, unless we know what it holds; returns what is wrong with it, or NULL. */
static const char *
read_restore_file(void)
{
	char text[UUID_TEXT_LEN + 1] = "";
	int len;
	int fd;

	if (restore_id_known)
		return NULL;
	fd = OpenTransientFile(RESTORE_FILE, O_RDONLY | PG_BINARY);
	if (fd < 0)
	{
		restore_id_known = errno == ENOENT;
		return restore_id_known ? NULL : strerror(errno);
	}
	len = read(fd, text, UUID_TEXT_LEN);
	if (len < 0)
	{
		const char *why = strerror(errno);

		CloseTransientFile(fd);
		return why;
	}
	CloseTransientFile(fd);
	if (len < UUID_TEXT_LEN || !is_uuid_text(text))
		return "it does not hold a restore id";
	strcpy(restore_id, text);
	restore_id_known = true;
	return NULL;
}

/* Write the file so that it outlives a crash; false, having logged why, when that fails. */
static bool
write_restore_file(void)
{
	const char *temporary = RESTORE_FILE ".tmp";
	char line[UUID_TEXT_LEN + 2];
	bool written = false;
	int fd;

	snprintf(line, sizeof(line), "%s\n", restore_id);
	fd = OpenTransientFilePerm(temporary, O_CREAT | O_TRUNC | O_WRONLY | PG_BINARY,
							   pg_file_create_mode);
	if (fd >= 0)
	{
		errno = ENOSPC; /* what a short write means */
		written = write(fd, line, strlen(line)) == strlen(line) && pg_fsync(fd) == 0;
		if (!written)
			ereport(LOG, (errcode_for_file_access(),
						  errmsg("agentvm: could not write file \"%s\": %m", temporary)));
		CloseTransientFile(fd);
	}
	else
		ereport(LOG, (errcode_for_file_access(),
					  errmsg("agentvm: could not create file \"%s\": %m", temporary)));
	if (!written)
		return false;
	return durable_rename(temporary, RESTORE_FILE, LOG) == 0;
}

/* Whether the data directory has a file of this name, as far as can be told. */
static bool
may_exist(const char *name)
{
	struct stat status;

	return stat(name, &status) == 0 || errno != ENOENT;
}

void
identity_init(void)
{
	unsigned char bytes[16];

	if (IsBinaryUpgrade || !IsPostmasterEnvironment || IsUnderPostmaster)
		return;
	if (may_exist(STANDBY_SIGNAL_FILE) ||
		!(may_exist(RECOVERY_SIGNAL_FILE) || may_exist(BACKUP_LABEL_FILE)))
	{
		(void) read_restore_file(); /* all others inherit it */
		return;
	}

	if (!pg_strong_random(bytes, sizeof(bytes)))
		memset(bytes, 0, sizeof(bytes)); /* no row has this one either */
	bytes[6] = (bytes[6] & 0x0f) | 0x40;
	bytes[8] = (bytes[8] & 0x3f) | 0x80;
	snprintf(restore_id, sizeof(restore_id),
			 "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", bytes[0],
			 bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7], bytes[8],
			 bytes[9], bytes[10], bytes[11], bytes[12], bytes[13], bytes[14], bytes[15]);
	restore_id_known = true;
	if (write_restore_file())
		ereport(LOG, (errmsg("agentvm: this server is started from a backup: nothing is dispatched "
							 "until its databases are adopted"),
					  errhint(IDENTITY_HINT)));
	else
		ereport(LOG,
				(errmsg("agentvm: this server is started from a backup, which is not remembered "
						"beyond this run: nothing is dispatched in it"),
				 errhint("Make the data directory writable for the server and start it again from "
						 "the backup. After another restart agentvm would act on the VMs of the "
						 "original.")));
}

/* ---- looking ---- */

/* Our own identity, as the three parameters that the queries have in common. */
static void
set_identity(Datum *values, char *nulls)
{
	values[0] = Int64GetDatum((int64) GetSystemIdentifier());
	values[1] = ObjectIdGetDatum(MyDatabaseId);
	nulls[2] = restore_id[0] != '\0' ? ' ' : 'n';
	if (restore_id[0] != '\0')
		values[2] = DirectFunctionCall1(uuid_in, CStringGetDatum(restore_id));
}

static void
add_problem(StringInfo problems, const char *problem)
{
	appendStringInfo(problems, "%s%s", problems->len > 0 ? "; " : "", problem);
}

/* A row of agentvm.installation; what it does not know is 0 or empty. */
typedef struct Installation
{
	pg_uuid_t id;
	bool in_use;
	bool uncommitted; /* by our own transaction */
	uint64 system_identifier;
	Oid database;
	char restore_id[UUID_TEXT_LEN + 1];
} Installation;

/*
 * All rows, those in use first, as last committed plus our own changes.  Below
 * SQL, since dispatchers look before each pass.
 */
static List *
read_installations(void)
{
	List *rows = NIL;
	DbLookup lookup;
	HeapTuple tuple;

	db_lookup_begin(&lookup, &installation_key, 0, NULL);
	while ((tuple = db_lookup_next(&lookup)) != NULL)
	{
		static const char *const columns[] = {"installation_id", "in_use", "system_identifier",
											  "database", "restore_id"};
		Installation *row = palloc0(sizeof(Installation));
		Datum values[lengthof(columns)];
		bool nulls[lengthof(columns)] = {false};
		int i;

		for (i = 0; i < lengthof(columns); i++)
			values[i] = db_lookup_value(
				&lookup, tuple, SPI_fnumber(RelationGetDescr(lookup.table), columns[i]), &nulls[i]);
		row->id = *DatumGetUUIDP(values[0]);
		row->in_use = DatumGetBool(values[1]);
		row->uncommitted =
			TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(tuple->t_data));
		if (!nulls[2])
			row->system_identifier = (uint64) DatumGetInt64(values[2]);
		if (!nulls[3])
			row->database = DatumGetObjectId(values[3]);
		if (!nulls[4])
			strlcpy(row->restore_id, DatumGetCString(DirectFunctionCall1(uuid_out, values[4])),
					sizeof(row->restore_id));
		rows = row->in_use ? lcons(row, rows) : lappend(rows, row);
	}
	db_lookup_end(&lookup);
	return rows;
}

/* What of a row is not ours. */
static void
compare_row(const Installation *row, StringInfo problems)
{
	if (row->system_identifier != GetSystemIdentifier())
		add_problem(problems, psprintf("the cluster's system identifier is " UINT64_FORMAT
									   ", not " UINT64_FORMAT,
									   GetSystemIdentifier(), row->system_identifier));
	if (row->database != MyDatabaseId)
		add_problem(problems,
					psprintf("the database's OID is %u, not %u", MyDatabaseId, row->database));
	if (strcmp(row->restore_id, restore_id) == 0)
		return;
	if (restore_id[0] != '\0')
		add_problem(problems, "the server has been restored from a backup");
	else
		add_problem(problems, psprintf("file \"%s\" with restore id %s is missing from the data "
									   "directory",
									   RESTORE_FILE, row->restore_id));
}

static bool
has_live_sessions(void)
{
	DbScope scope;
	bool found;

	db_enter(&scope);
	db_run(&live_query, NULL, NULL);
	found = SPI_processed > 0;
	db_leave(&scope);
	return found;
}

IdentityState
identity_look(char **problem)
{
	const char *unreadable = read_restore_file();
	List *rows = read_installations();
	Installation *first = rows != NIL ? linitial(rows) : NULL;
	StringInfoData problems;

	initStringInfo(&problems);
	*problem = NULL;
	if (list_length(rows) == 1 && !first->in_use)
	{
		if (!has_live_sessions())
			return IDENTITY_UNUSED;
		add_problem(&problems, "live sessions were brought into a database that was not in use, "
							   "without the row of agentvm.installation that is theirs");
	}
	else if (list_length(rows) != 1)
		add_problem(&problems, psprintf("agentvm.installation has %d rows%s", list_length(rows),
										rows != NIL ? ": a dump was restored here" : ""));
	if (unreadable != NULL)
		add_problem(&problems, psprintf("file \"%s\" in the data directory cannot be read: %s",
										RESTORE_FILE, unreadable));
	else if (first != NULL && first->in_use)
		compare_row(first, &problems);
	if (problems.len == 0)
		return IDENTITY_IN_ORDER;
	*problem = problems.data;
	return IDENTITY_FOREIGN;
}

bool
identity_permits(const char *function)
{
	IdentityState state;
	DbScope scope;
	char *problem;

	PreventCommandDuringRecovery(function);
	db_enter(&scope);
	state = identity_look(&problem);
	db_leave(&scope);
	if (state == IDENTITY_FOREIGN)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("cannot execute %s: this database is a copy that nobody has adopted",
							   function),
						errdetail("What does not match: %s.", problem), errhint(IDENTITY_HINT)));
	return state == IDENTITY_IN_ORDER;
}

void
identity_take_into_use(void)
{
	static Oid seen_in_use = InvalidOid; /* the table, so that DROP EXTENSION makes us look anew */
	Oid table = get_relname_relid("installation", get_namespace_oid("agentvm", false));
	Datum values[3];
	char nulls[3] = {' ', ' ', ' '};
	List *rows;

	if (table == seen_in_use)
		return;
	rows = read_installations();
	if (rows != NIL && ((Installation *) linitial(rows))->in_use)
	{
		/* our own transaction may yet abort */
		if (!((Installation *) linitial(rows))->uncommitted)
			seen_in_use = table;
		return;
	}
	if (read_restore_file() != NULL)
		return; /* nothing is dispatched, and health says why */
	set_identity(values, nulls);
	db_run(&use_query, values, nulls);
	wake_workers(LANE_ALL, GetCurrentTimestamp());
}

/* ---- SQL ---- */

static void
raise_unreadable(const char *why)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("file \"%s\" in the data directory cannot be read: %s", RESTORE_FILE, why),
			 errhint("It says from which restore the server has come. Make it readable for "
					 "the server, or remove it if the server never was restored.")));
}

/* What a row of agentvm.installation has to match here. */
Datum
agentvm_cluster_identity(PG_FUNCTION_ARGS)
{
	const char *unreadable = read_restore_file();
	char parameters[3] = {' ', ' ', ' '};
	Datum values[3] = {0};
	bool nulls[3] = {false, false, false};
	TupleDesc desc;

	if (unreadable != NULL)
		raise_unreadable(unreadable);
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "agentvm.cluster_identity() returns a row");
	set_identity(values, parameters);
	nulls[2] = parameters[2] == 'n';
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

/*
 * The installation that a takeover carries on: the one in use, or else the one
 * there is.  NULL when there is none.
 */
static pg_uuid_t *
successor_of(void)
{
	List *rows = read_installations();

	if (rows == NIL)
		return NULL;
	if (list_length(rows) > 1 && ((Installation *) lsecond(rows))->in_use)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("more than one installation was in use: which one to take over is "
							   "not known"),
						errhint("Delete the others from agentvm.installation, or call "
								"agentvm.adopt_cluster('fork').")));
	return &((Installation *) linitial(rows))->id;
}

Datum
agentvm_adopt_cluster(PG_FUNCTION_ARGS)
{
	char *mode = PG_ARGISNULL(0) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(0));
	Name role = palloc0(sizeof(NameData));
	const char *unreadable;
	pg_uuid_t *successor = NULL;
	bool fork;
	DbScope scope;
	Datum values[5];
	char nulls[5] = {' ', ' ', ' ', ' ', ' '};
	char *problem;

	require_admin("adopt this database");
	fork = mode != NULL && strcmp(mode, "fork") == 0;
	if (mode == NULL || (!fork && strcmp(mode, "takeover") != 0))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 mode ? errmsg("unknown mode \"%s\"", mode) : errmsg("mode must not be null"),
				 errhint("Known modes are takeover (this database succeeds the one it was "
						 "copied from) and fork (that one lives on).")));
	PreventCommandDuringRecovery("agentvm.adopt_cluster()");
	unreadable = read_restore_file();
	if (unreadable != NULL)
		raise_unreadable(unreadable);
	namestrcpy(role, GetUserNameFromId(GetUserId(), false));

	db_enter(&scope);
	db_run(&lock_query, NULL, NULL);
	if (!fork && identity_look(&problem) == IDENTITY_IN_ORDER)
	{
		ereport(NOTICE,
				(errmsg("this database is the one that its installation belongs to: nothing to "
						"take over")));
		db_leave(&scope);
		PG_RETURN_VOID();
	}

	if (fork)
		forget_sessions(psprintf("forked by %s: its VM, if any, is left to the installation that "
								 "this database was copied from",
								 NameStr(*role)),
						NULL);
	else
		successor = successor_of();
	set_identity(values, nulls);
	values[4] = NameGetDatum(role);
	nulls[3] = nulls[0] = successor ? ' ' : 'n';
	values[3] = UUIDPGetDatum(successor);
	{
		Datum keep[1] = {values[3]};

		db_run(&clear_query, keep, nulls);
	}
	nulls[0] = ' ';
	db_run(&adopt_query, values, nulls);
	/* of a fork's VMs none is left; what a takeover finds may be what the original was about to note */
	drift_begin_anew(!fork);
	db_leave(&scope);

	wake_workers(LANE_ALL, DT_NOBEGIN);
	PG_RETURN_VOID();
}
