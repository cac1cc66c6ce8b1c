/*-------------------------------------------------------------------------
 *
 * forget.c
 *		Letting go of sessions without a call to their provider: on purpose only.
 *
 * A fork leaves its copy's sessions to the original; abandon() leaves them to
 * whoever reads what it returns.  DROP EXTENSION would do the same silently, so
 * it is refused while there are VMs.  There are many ways to drop an extension
 * (by what it requires, its schema, its owner), but all of them pass the
 * object access hook on their way to table agentvm.session; DROP DATABASE does
 * not.  Where the library is not preloaded, an event trigger loads it in time.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "agentvm.h"
#include "catalog/dependency.h"
#include "catalog/namespace.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "commands/event_trigger.h"
#include "commands/extension.h"
#include "db.h"
#include "engine/forget.h"
#include "engine/session_row.h"
#include "executor/tuptable.h"
#include "miscadmin.h"
#include "procedure.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_abandon);
PG_FUNCTION_INFO_V1(agentvm_guard_drop);

#define MAX_NAMED 10 /* sessions that an error names */

static object_access_hook_type prev_access_hook = NULL;

static DbQuery lock_query = {"SELECT session_id FROM agentvm.session WHERE ended_at IS NULL "
							 "ORDER BY session_id FOR UPDATE",
							 0,
							 {0}};

static DbQuery tokens_query = {
	"DELETE FROM agentvm.session_token WHERE session_id = ANY ($1)", 1, {UUIDARRAYOID}};

/* A live session has, or may yet have, a VM once its launch has been sent. */
static bool
may_have_vm(const SessionRow *row)
{
	return row->vm_id != NULL || row->handle != NULL || row->lease != 0;
}

static void
put_session(ReturnSetInfo *rsinfo, const SessionRow *row)
{
	const char *texts[] = {row->team_id, row->provider, row->vm_id, row->region};
	Datum values[1 + lengthof(texts)] = {UUIDPGetDatum(&row->session_id)};
	bool nulls[1 + lengthof(texts)] = {false};
	int i;

	for (i = 0; i < lengthof(texts); i++)
	{
		nulls[i + 1] = texts[i] == NULL;
		if (texts[i] != NULL)
			values[i + 1] = CStringGetTextDatum(texts[i]);
	}
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

void
forget_sessions(const char *detail, ReturnSetInfo *rsinfo)
{
	MemoryContext caller = CurrentMemoryContext;
	MemoryContext per_row;
	pg_uuid_t *ids;
	Datum *elements;
	Datum values[1];
	uint64 count;
	uint64 i;
	bool isnull;

	db_run(&lock_query, NULL, NULL);
	count = SPI_processed;
	ids = MemoryContextAllocHuge(caller, sizeof(pg_uuid_t) * Max(count, 1));
	elements = MemoryContextAllocHuge(caller, sizeof(Datum) * Max(count, 1));
	for (i = 0; i < count; i++)
	{
		ids[i] = *DatumGetUUIDP(db_value(i, 1, &isnull));
		elements[i] = UUIDPGetDatum(&ids[i]);
	}
	SPI_freetuptable(SPI_tuptable);

	per_row = AllocSetContextCreate(caller, "agentvm forget", ALLOCSET_DEFAULT_SIZES);
	for (i = 0; i < count; i++)
	{
		SessionRow *row;

		CHECK_FOR_INTERRUPTS();
		MemoryContextReset(per_row);
		MemoryContextSwitchTo(per_row);
		row = session_row_read(&ids[i]);
		if (row == NULL)
			continue; /* it was locked: a trigger of the administrator's */
		if (rsinfo != NULL && may_have_vm(row))
			put_session(rsinfo, row);
		row->end_reason = "orphan";
		row->detail = pstrdup(detail);
		row->lease = 0;
		row->next_check_at = 0;
		if (row->state != STATE_TERMINATING)
		{
			/* the log tells of every state, also of one that lasts no time */
			row->state = STATE_TERMINATING;
			session_row_save(row);
		}
		row->state = reason_end_state(row->end_reason);
		row->ended_at = GetCurrentTimestamp();
		session_row_save(row);
	}
	MemoryContextSwitchTo(caller);
	MemoryContextDelete(per_row);

	/* a runtime that calls here must not be told that its session has ended: it would power off */
	values[0] =
		PointerGetDatum(construct_array(elements, count, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
	db_run(&tokens_query, values, NULL);
}

Datum
agentvm_abandon(PG_FUNCTION_ARGS)
{
	char *role = GetUserNameFromId(GetUserId(), false);
	DbScope scope;

	require_admin("abandon all sessions");
	PreventCommandDuringRecovery("agentvm.abandon()");
	begin_set(fcinfo);
	db_enter(&scope);
	forget_sessions(psprintf("abandoned by %s: its VM, if any, was left as it was", role),
					(ReturnSetInfo *) fcinfo->resultinfo);
	db_leave(&scope);
	return (Datum) 0;
}

/* ---- DROP EXTENSION ---- */

/* Whether a column of a row that is about to go has a value; its TOAST table may have gone already. */
static bool
has_value(Relation table, TupleTableSlot *slot, const char *column, Datum *value)
{
	AttrNumber number = get_attnum(RelationGetRelid(table), column);
	bool isnull = true;

	if (number != InvalidAttrNumber)
		*value = slot_getattr(slot, number, &isnull);
	return !isnull;
}

/* Raise unless no session of the table has a VM, as may_have_vm() sees it. */
static void
refuse_to_orphan(Oid relation)
{
	Relation table = table_open(relation, NoLock); /* whoever drops it has locked it */
	Snapshot snapshot = RegisterSnapshot(GetLatestSnapshot());
	TableScanDesc scan = table_beginscan(table, snapshot, 0, NULL);
	TupleTableSlot *slot = table_slot_create(table, NULL);
	StringInfoData named;
	int64 count = 0;

	initStringInfo(&named);
	while (table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		Datum id;
		Datum vm_id;
		Datum other;
		bool has_vm;

		if (has_value(table, slot, "ended_at", &other) ||
			!has_value(table, slot, "session_id", &id))
			continue;
		has_vm = has_value(table, slot, "vm_id", &vm_id);
		if (!has_vm && !has_value(table, slot, "handle", &other) &&
			!has_value(table, slot, "lease", &other))
			continue;
		if (count++ >= MAX_NAMED)
			continue;
		appendStringInfo(&named, "%s%s", count > 1 ? ", " : "",
						 DatumGetCString(DirectFunctionCall1(uuid_out, id)));
		if (has_vm && !VARATT_IS_EXTERNAL(DatumGetPointer(vm_id)))
			appendStringInfo(&named, " (%s)", TextDatumGetCString(vm_id));
	}
	ExecDropSingleTupleTableSlot(slot);
	table_endscan(scan);
	UnregisterSnapshot(snapshot);
	table_close(table, NoLock);
	if (count == 0)
		return;
	if (count > MAX_NAMED)
		appendStringInfo(&named, " and %lld more", (long long) (count - MAX_NAMED));
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_IN_USE),
			 errmsg("cannot drop extension agentvm while its VMs live"),
			 errdetail("Live sessions that have a VM or may have one: %s.", named.data),
			 errhint("Terminate them and wait for their end, or let go of them with SELECT * FROM "
					 "agentvm.abandon().")));
}

static bool
is_session_table(Oid relation)
{
	char *name = get_rel_name(relation);
	Oid extension;

	if (name == NULL || strcmp(name, "session") != 0 ||
		get_rel_namespace(relation) != get_namespace_oid("agentvm", true))
		return false;
	extension = getExtensionOfObject(RelationRelationId, relation);
	return OidIsValid(extension) && extension == get_extension_oid("agentvm", true);
}

static void
agentvm_object_access(ObjectAccessType access, Oid class, Oid object, int column, void *arg)
{
	if (prev_access_hook)
		prev_access_hook(access, class, object, column, arg);
	/* scripts of extensions, ours among them, know what they do */
	if (access == OAT_DROP && class == RelationRelationId && column == 0 && !creating_extension &&
		!IsBinaryUpgrade && is_session_table(object))
		refuse_to_orphan(object);
}

void
forget_guard_init(void)
{
	prev_access_hook = object_access_hook;
	object_access_hook = agentvm_object_access;
}

/* Event trigger before whatever may drop the extension: that the library is loaded is all. */
Datum
agentvm_guard_drop(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_EVENT_TRIGGER(fcinfo))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("agentvm.guard_drop() is an event trigger")));
	return PointerGetDatum(NULL);
}
