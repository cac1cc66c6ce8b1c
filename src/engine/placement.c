/*-------------------------------------------------------------------------
 *
 * placement.c
 *		Which of our hosts a VM is on.
 *
 * A session is placed in the transaction of the claim that begins its launch:
 * the room that it takes is committed before anything is asked of the host.  A
 * lock that nobody but the engine takes makes placements come one after the
 * other, each seeing what those before it have committed; what others do at the
 * same time (a session is abandoned, say) only makes more room.  The row goes
 * when the state of its session becomes an ended one: session_transition, so
 * that no way to end leaves it behind.
 *
 * Hosts are the administrators' to change at any time, so the engine takes their
 * locks only if they are to be had at once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "agentvm.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "db.h"
#include "engine/placement.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_host_changed);

#define HOST_COLUMNS "h.name, h.uri, h.directory, h.accel, h.kvm"

static DbQuery host_query = {"SELECT " HOST_COLUMNS
							 " FROM agentvm.placement p JOIN agentvm.host h ON h.name = p.host "
							 "WHERE p.session_id = $1",
							 1,
							 {UUIDOID}};

static DbQuery host_named_query = {
	"SELECT " HOST_COLUMNS " FROM agentvm.host h WHERE h.name = $1", 1, {TEXTOID}};

static DbQuery hosts_query = {
	"SELECT " HOST_COLUMNS " FROM agentvm.host h WHERE h.enabled ORDER BY h.name", 0, {0}};

static DbQuery room_query = {
	"SELECT h.name, h.vcpus - p.vcpus, h.memory_mib - p.memory_mib FROM agentvm.host h, "
	"LATERAL (SELECT coalesce(sum(vcpus), 0)::int8 AS vcpus, "
	"coalesce(sum(memory_mib), 0)::int8 AS memory_mib "
	"FROM agentvm.placement WHERE host = h.name) p WHERE h.enabled",
	0,
	{0}};

/* A host that is about to be used stays as it is, until that is committed; without waiting. */
static DbQuery lock_query = {
	"SELECT FROM agentvm.host WHERE name = $1 AND enabled FOR SHARE SKIP LOCKED", 1, {TEXTOID}};

static DbQuery lock_again_query = {
	"SELECT FROM agentvm.host h WHERE name = (SELECT host FROM agentvm.placement "
	"WHERE session_id = $1) FOR SHARE SKIP LOCKED",
	1,
	{UUIDOID}};

/* As is_used() */
static DbQuery used_query = {
	"SELECT FROM agentvm.placement p JOIN agentvm.session s USING (session_id) WHERE p.host = $1 "
	"AND (s.vm_id IS NOT NULL OR s.launched_at IS NOT NULL OR s.handle ? '" AVM_HOST_USED
	"') LIMIT 1",
	1,
	{TEXTOID}};

static DbQuery place_query = {
	"INSERT INTO agentvm.placement (session_id, host, vcpus, memory_mib) VALUES ($1, $2, $3, $4)",
	4,
	{UUIDOID, TEXTOID, INT4OID, INT4OID}};

static DbQuery largest_query = {
	"SELECT count(*), count(*) FILTER (WHERE vcpus >= $1 AND memory_mib >= $2), "
	"(array_agg(vcpus ORDER BY memory_mib DESC, vcpus DESC))[1], max(memory_mib) "
	"FROM agentvm.host WHERE enabled",
	2,
	{INT4OID, INT4OID}};

static DbQuery kvm_query = {
	"UPDATE agentvm.host SET kvm = $2 WHERE name = (SELECT name FROM agentvm.host "
	"WHERE name = $1 AND uri = $3 AND kvm IS DISTINCT FROM $2 FOR NO KEY UPDATE SKIP LOCKED)",
	3,
	{TEXTOID, BOOLOID, TEXTOID}};

/* What a host has left. */
typedef struct Room
{
	char *name;
	int64 vcpus;
	int64 memory_mib;
} Room;

/* A ProviderHost of a row of the last result. */
static ProviderHost *
host_from_result(uint64 row, MemoryContext context)
{
	ProviderHost *host = MemoryContextAllocZero(context, sizeof(ProviderHost));
	bool isnull;
	Datum kvm = db_value(row, 5, &isnull);

	host->kvm = isnull ? -1 : DatumGetBool(kvm);
	host->name = db_text(row, 1, context);
	host->uri = db_text(row, 2, context);
	host->directory = db_text(row, 3, context);
	host->accel = db_text(row, 4, context);
	return host;
}

static ProviderHost *
read_host(DbQuery *query, Datum key)
{
	Datum values[1] = {key};
	ProviderHost *host = NULL;

	db_run(query, values, NULL);
	if (SPI_processed > 0)
		host = host_from_result(0, CurrentMemoryContext);
	SPI_freetuptable(SPI_tuptable);
	return host;
}

ProviderHost *
placement_host(const pg_uuid_t *session_id)
{
	return read_host(&host_query, UUIDPGetDatum(session_id));
}

ProviderHost *
placement_host_named(const char *name)
{
	return read_host(&host_named_query, CStringGetTextDatum(name));
}

List *
placement_hosts(void)
{
	List *hosts = NIL;
	uint64 i;

	db_run(&hosts_query, NULL, NULL);
	for (i = 0; i < SPI_processed; i++)
		hosts = lappend(hosts, host_from_result(i, CurrentMemoryContext));
	SPI_freetuptable(SPI_tuptable);
	return hosts;
}

/* By room, the most first. */
static int
compare_rooms(const void *a, const void *b)
{
	const Room *x = a;
	const Room *y = b;

	if (x->memory_mib != y->memory_mib)
		return x->memory_mib > y->memory_mib ? -1 : 1;
	if (x->vcpus != y->vcpus)
		return x->vcpus > y->vcpus ? -1 : 1;
	return strcmp(x->name, y->name);
}

static Room *
read_rooms(int *count)
{
	Room *rooms;
	bool isnull;
	uint64 i;

	db_run(&room_query, NULL, NULL);
	*count = (int) SPI_processed;
	rooms = palloc(sizeof(Room) * Max(*count, 1));
	for (i = 0; i < SPI_processed; i++)
	{
		rooms[i].name = db_text(i, 1, CurrentMemoryContext);
		rooms[i].vcpus = DatumGetInt64(db_value(i, 2, &isnull));
		rooms[i].memory_mib = DatumGetInt64(db_value(i, 3, &isnull));
	}
	SPI_freetuptable(SPI_tuptable);
	qsort(rooms, *count, sizeof(Room), compare_rooms);
	return rooms;
}

/* Whether the hosts can be read and locked without waiting for an administrator's LOCK TABLE. */
static bool
lock_tables(void)
{
	Oid schema = get_namespace_oid("agentvm", false);
	Oid placement = get_relname_relid("placement", schema);

	if (!ConditionalLockRelationOid(get_relname_relid("host", schema), RowExclusiveLock) ||
		!ConditionalLockRelationOid(placement, RowExclusiveLock))
		return false;
	return true;
}

/* Only the engine takes this lock, and holds it until its batch is committed. */
static void
lock_placements(void)
{
	Oid placement = get_relname_relid("placement", get_namespace_oid("agentvm", false));

	LockDatabaseObject(RelationRelationId, placement, 0, ExclusiveLock);
}

static void
fail(ProviderStep *failure, ErrorClass class, const char *code, const char *message)
{
	memset(failure, 0, sizeof(*failure));
	failure->kind = STEP_FAILED;
	failure->operation = "place";
	failure->error_class = class;
	failure->error_code = code;
	failure->error_message = message;
}

static bool
place(SessionRow *row, ProviderStep *failure)
{
	int vcpus = row->vcpus > 0 ? row->vcpus : PLACEMENT_VCPUS;
	int memory_mib = row->memory_mib > 0 ? row->memory_mib : PLACEMENT_MEMORY_MIB;
	bool passed_by = false;
	Datum values[4];
	Room *rooms;
	int count;
	int i;

	lock_placements();
	rooms = read_rooms(&count);
	values[0] = UUIDPGetDatum(&row->session_id);
	values[2] = Int32GetDatum(vcpus);
	values[3] = Int32GetDatum(memory_mib);
	for (i = 0; i < count; i++)
	{
		if (rooms[i].vcpus < vcpus || rooms[i].memory_mib < memory_mib)
			continue;
		values[1] = CStringGetTextDatum(rooms[i].name);
		db_run(&lock_query, &values[1], NULL);
		if (SPI_processed == 0)
		{
			passed_by = true;
			continue;
		}
		db_run(&place_query, values, NULL);
		row->region = rooms[i].name;
		row->vcpus = vcpus;
		row->memory_mib = memory_mib;
		return true;
	}
	if (passed_by)
		fail(failure, CLASS_TRANSIENT, "HostLocked", "somebody changes the host that has room");
	else if (count == 0)
		fail(failure, CLASS_CAPACITY, "NoHost", "no host is enabled");
	else
		fail(failure, CLASS_CAPACITY, "NoRoom",
			 psprintf("no enabled host has room for %d vCPUs and %d MiB of memory: the largest "
					  "room is %lld vCPUs and %lld MiB, on host %s",
					  vcpus, memory_mib, (long long) Max(rooms[0].vcpus, 0),
					  (long long) Max(rooms[0].memory_mib, 0), rooms[0].name));
	return false;
}

/* Whether something of the session is on its host, or may be. */
static bool
is_used(const SessionRow *row)
{
	return row->vm_id != NULL || row->launched_at != 0 ||
		   (row->handle != NULL && option_value(row->handle, AVM_HOST_USED) != NULL);
}

bool
placement_of(SessionRow *row, bool make, ProviderHost **host, ProviderStep *failure)
{
	Datum values[1] = {UUIDPGetDatum(&row->session_id)};

	*host = NULL;
	if (!lock_tables())
	{
		fail(failure, CLASS_TRANSIENT, "HostLocked", "somebody has locked the table of hosts");
		return false;
	}
	*host = placement_host(&row->session_id);
	if (!make || (*host != NULL && is_used(row)))
		return true;
	if (*host == NULL)
	{
		if (!place(row, failure))
			return false;
	}
	else
	{
		/* the host's trigger cannot see yet what the next step begins */
		db_run(&lock_again_query, values, NULL);
		if (SPI_processed == 0)
		{
			fail(failure, CLASS_TRANSIENT, "HostLocked", "somebody changes the session's host");
			*host = NULL;
			return false;
		}
	}
	*host = placement_host(&row->session_id);
	return true;
}

void
placement_check(const char *provider, int vcpus, int memory_mib)
{
	Datum values[2] = {Int32GetDatum(vcpus), Int32GetDatum(memory_mib)};
	bool isnull;
	int64 enabled;
	int64 fitting;

	db_run(&largest_query, values, NULL);
	enabled = DatumGetInt64(db_value(0, 1, &isnull));
	fitting = DatumGetInt64(db_value(0, 2, &isnull));
	if (enabled == 0)
		ereport(ERROR,
				(errcode(AVM_INVALID_CONFIGURATION),
				 errmsg("provider \"%s\" needs a host for its VMs, and none is enabled", provider),
				 errhint("An administrator adds one: INSERT INTO agentvm.host (name, directory, "
						 "vcpus, memory_mib) VALUES (...).")));
	if (fitting == 0)
		ereport(ERROR, (errcode(AVM_OVER_LIMIT),
						errmsg("no host is large enough for %d vCPUs and %d MiB of memory", vcpus,
							   memory_mib),
						errdetail("The largest enabled one has %d vCPUs and %d MiB.",
								  DatumGetInt32(db_value(0, 3, &isnull)),
								  DatumGetInt32(db_value(0, 4, &isnull))),
						errhint("Use a profile with smaller vcpus and memory_mib.")));
	SPI_freetuptable(SPI_tuptable);
}

void
placement_learn_kvm(const ProviderHost *host, int kvm)
{
	Datum values[3];

	if (host == NULL || kvm == 0 || host->kvm == (kvm > 0))
		return;
	values[0] = CStringGetTextDatum(host->name);
	values[1] = BoolGetDatum(kvm > 0);
	values[2] = CStringGetTextDatum(host->uri);
	db_run(&kvm_query, values, NULL);
}

/* Whether the rows have different texts in a column, which may not be NULL. */
static bool
differs(const TriggerData *trigger, const char *column)
{
	TupleDesc desc = RelationGetDescr(trigger->tg_relation);
	int number = SPI_fnumber(desc, column);
	bool old_null;
	bool new_null;
	Datum old_value = heap_getattr(trigger->tg_trigtuple, number, desc, &old_null);
	Datum new_value = heap_getattr(trigger->tg_newtuple, number, desc, &new_null);

	return old_null || new_null ||
		   strcmp(TextDatumGetCString(old_value), TextDatumGetCString(new_value)) != 0;
}

/*
 * The uris that libvirt may be given, since it runs programs for some, skips
 * verification for others, and quotes any file that test:///FILE names.  Nothing
 * is percent-encoded, which libvirt decodes, nor separated by semicolons.
 */
#define SAFE_NAME "[A-Za-z0-9][A-Za-z0-9._-]*"
#define SAFE_AUTHORITY "(" SAFE_NAME "@)?(" SAFE_NAME "|\\[[0-9A-Fa-f:.]+\\])(:[0-9]+)?"
#define SAFE_PARAMETER                                                                             \
	"((socket|keyfile|known_hosts|pkipath)=/[A-Za-z0-9._/+~@-]+|sshauth=[a-z,-]+|no_tty=[01]|"     \
	"mode=(auto|legacy|direct)|proxy=(auto|native))"
#define SAFE_URI                                                                                   \
	"^(test:///default|(qemu(\\+unix)?://|qemu(\\+(tls|ssh|libssh|libssh2))?://" SAFE_AUTHORITY    \
	")/(system|session)(\\?" SAFE_PARAMETER "(&" SAFE_PARAMETER ")*)?)$"

static void
check_uri(const TriggerData *trigger, HeapTuple tuple)
{
	TupleDesc desc = RelationGetDescr(trigger->tg_relation);
	bool isnull;
	Datum uri = heap_getattr(tuple, SPI_fnumber(desc, "uri"), desc, &isnull);

	/* the table refuses NULL */
	if (!isnull && !DatumGetBool(DirectFunctionCall2Coll(textregexeq, C_COLLATION_OID, uri,
														 CStringGetTextDatum(SAFE_URI))))
		ereport(
			ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("uri of host is not allowed: \"%s\"", TextDatumGetCString(uri)),
			 errhint("Give qemu[+TRANSPORT]://[[USER@]HOST[:PORT]]/system or /session; transports: "
					 "unix, tls, ssh, libssh, libssh2; parameters: socket, keyfile, known_hosts, "
					 "pkipath, sshauth, no_tty, mode, proxy.")));
}

/* VMs and their files are found by what the host's row says: raise 55006 if there may be any. */
static void
refuse_if_used(const TriggerData *trigger)
{
	TupleDesc desc = RelationGetDescr(trigger->tg_relation);
	Datum values[1];
	bool isnull;
	bool used;
	DbScope scope;

	values[0] = heap_getattr(trigger->tg_trigtuple, SPI_fnumber(desc, "name"), desc, &isnull);
	db_enter(&scope);
	db_run(&used_query, values, NULL);
	used = SPI_processed > 0;
	db_leave(&scope);
	if (used)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("host \"%s\" has VMs, which would not be found at another uri or directory",
						TextDatumGetCString(values[0])),
				 errhint("Add the other one as another host, disable this one, and terminate its "
						 "sessions.")));
}

/*
 * BEFORE INSERT OR UPDATE of a host: refuses uris that would do more than connect.
 * On UPDATE notes when; refuses what would lose VMs; what was learned of a machine
 * does not hold for another one.
 */
Datum
agentvm_host_changed(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	TupleDesc desc;
	int columns[2];
	Datum values[2];
	bool nulls[2] = {false, true};
	bool moved;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_BEFORE(trigger->tg_event))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("agentvm.host_changed() is a trigger on agentvm.host")));
	if (!TRIGGER_FIRED_BY_UPDATE(trigger->tg_event))
	{
		check_uri(trigger, trigger->tg_trigtuple);
		return PointerGetDatum(trigger->tg_trigtuple);
	}
	moved = differs(trigger, "uri");
	if (moved)
		check_uri(trigger, trigger->tg_newtuple);
	if (moved || differs(trigger, "directory"))
		refuse_if_used(trigger);
	desc = RelationGetDescr(trigger->tg_relation);
	columns[0] = SPI_fnumber(desc, "updated_at");
	columns[1] = SPI_fnumber(desc, "kvm");
	values[0] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[1] = (Datum) 0;
	return PointerGetDatum(heap_modify_tuple_by_cols(trigger->tg_newtuple, desc, moved ? 2 : 1,
													 columns, values, nulls));
}
