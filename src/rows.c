/*-------------------------------------------------------------------------
 *
 * rows.c
 *		Rows of one of our tables, below SQL: found by key, locked, changed.
 *
 * An UPDATE of one row by its key costs several times what the change itself does:
 * a plan is instantiated, and the CHECK constraints and the conditions of triggers are
 * read from their text, anew for each statement.  Here they are made ready once for as
 * many rows as a transaction changes.  What happens to a row is done by the
 * functions by which logical replication applies changes.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/relscan.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_trigger.h"
#include "commands/trigger.h"
#include "executor/executor.h"
#include "tcop/utility.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "agentvm.h"
#include "compat.h"
#include "rows.h"

struct DbRows
{
	DbTable *table;
	Relation relation;
	Relation index;
	Snapshot snapshot;	/* of its opening */
	IndexScanDesc scan; /* with scan_snapshot; NULL: none yet */
	Snapshot scan_snapshot;
	TupleTableSlot *row; /* at hand */

	/* of the first change on */
	EState *estate;
	ResultRelInfo *result; /* NULL: by SQL */
	TupleTableSlot *changed;
};

/* Find out where the columns are, and what changes them in SQL. */
static void
prepare_table(DbTable *table, Relation relation)
{
	TupleDesc desc = RelationGetDescr(relation);
	MemoryContext context;
	MemoryContext old;
	StringInfoData sql;
	int i;

	/* the query is in the context; the plan is not */
	if (table->query != NULL && table->query->plan != NULL)
		SPI_freeplan(table->query->plan);
	if (table->context != NULL)
		MemoryContextDelete(table->context);
	table->query = NULL;
	table->context = NULL;

	context = AllocSetContextCreate(TopMemoryContext, "agentvm table", ALLOCSET_SMALL_SIZES);
	old = MemoryContextSwitchTo(context);
	initStringInfo(&sql); /* of no use where nothing is changed */
	appendStringInfo(&sql, "UPDATE agentvm.%s SET ", table->table.name);
	table->query = palloc0(sizeof(DbQuery));
	for (i = 0; i < table->ncolumns; i++)
	{
		AttrNumber attnum = get_attnum(RelationGetRelid(relation), table->columns[i]);

		if (attnum == InvalidAttrNumber)
			elog(ERROR, "there is no column %s in agentvm.%s", table->columns[i],
				 table->table.name);
		table->attnums[i] = attnum;
		if (i < table->nchanged)
			table->query->argtypes[i] = TupleDescAttr(desc, attnum - 1)->atttypid;
		if (i > 0 && i < table->nchanged)
			appendStringInfo(&sql, "%s%s = $%d", i > 1 ? ", " : "", table->columns[i], i + 1);
	}
	appendStringInfo(&sql, " WHERE %s = $1", table->columns[0]);
	table->query->sql = sql.data;
	table->query->nargs = table->nchanged;
	table->query->generic = true;
	MemoryContextSwitchTo(old);
	table->context = context;
	table->version = table->table.version;
}

DbRows *
db_rows_open(DbTable *table, bool change)
{
	LOCKMODE mode = change ? RowExclusiveLock : AccessShareLock;
	DbRows *rows = palloc0(sizeof(DbRows));

	if (change)
	{
		PreventCommandIfReadOnly("UPDATE");
		PreventCommandIfParallelMode("UPDATE");
	}
	rows->table = table;
	rows->relation = table_open(db_relation_oid(&table->table), mode);
	/* anew, if it has changed while we waited for the lock */
	(void) db_relation_oid(&table->table);
	if (table->version != table->table.version)
		prepare_table(table, rows->relation);
	rows->index = index_open(db_relation_oid(&table->index), mode);
	rows->row = table_slot_create(rows->relation, NULL);
	CommandCounterIncrement();
	rows->snapshot = RegisterSnapshot(GetLatestSnapshot());
	return rows;
}

void
db_rows_close(DbRows *rows)
{
	if (rows->estate != NULL)
	{
		if (rows->result != NULL)
			ExecCloseIndices(rows->result);
		ExecResetTupleTable(rows->estate->es_tupleTable, false);
		FreeExecutorState(rows->estate);
	}
	ExecDropSingleTupleTableSlot(rows->row);
	if (rows->scan != NULL)
		index_endscan(rows->scan);
	UnregisterSnapshot(rows->snapshot);
	index_close(rows->index, NoLock);
	table_close(rows->relation, NoLock);
	pfree(rows);
}

/* Have the row with this key at hand, if the snapshot has one. */
static bool
look_up(DbRows *rows, Snapshot snapshot, const pg_uuid_t *key)
{
	ScanKeyData scankey;

	if (rows->scan != NULL && rows->scan_snapshot != snapshot)
	{
		index_endscan(rows->scan);
		rows->scan = NULL;
	}
	if (rows->scan == NULL)
		rows->scan = AvmIndexBeginscan(rows->relation, rows->index, snapshot, 1);
	rows->scan_snapshot = snapshot;
	ScanKeyInit(&scankey, 1, BTEqualStrategyNumber, F_UUID_EQ, UUIDPGetDatum(key));
	index_rescan(rows->scan, &scankey, 1, NULL, 0);
	return index_getnext_slot(rows->scan, ForwardScanDirection, rows->row);
}

bool
db_rows_find(DbRows *rows, const pg_uuid_t *key, ItemPointer place)
{
	if (!look_up(rows, rows->snapshot, key))
		return false;
	*place = rows->row->tts_tid;
	return true;
}

bool
db_rows_lock(DbRows *rows, const pg_uuid_t *key, ItemPointer place)
{
	TM_FailureData failure;

	/* the lock is on the newest version, which is at hand then */
	if (!db_rows_find(rows, key, place) ||
		table_tuple_lock(rows->relation, place, rows->snapshot, rows->row,
						 GetCurrentCommandId(true), LockTupleExclusive, LockWaitSkip,
						 TUPLE_LOCK_FLAG_FIND_LAST_VERSION, &failure) != TM_Ok)
		return false;
	*place = rows->row->tts_tid;
	return true;
}

Datum
db_rows_value(DbRows *rows, int column, bool *isnull)
{
	return slot_getattr(rows->row, rows->table->attnums[column], isnull);
}

/* ---- changes ---- */

/* Whether an UPDATE is more than constraints, indexes and triggers after it for each row. */
static bool
update_needs_sql(Relation relation)
{
	const TriggerDesc *triggers = relation->trigdesc;
	int i;

	if (IsolationUsesXactSnapshot() || relation->rd_rel->relkind != RELKIND_RELATION ||
		relation->rd_rel->relispartition || relation->rd_rules != NULL ||
		relation->rd_rel->relforcerowsecurity)
		return true;
	if (triggers == NULL)
		return false;
	/* which columns change is not told: a trigger that asks would not fire */
	for (i = 0; i < triggers->numtriggers; i++)
	{
		if (TRIGGER_FOR_UPDATE(triggers->triggers[i].tgtype) && triggers->triggers[i].tgnattr > 0)
			return true;
	}
	return triggers->trig_update_before_row || triggers->trig_update_before_statement ||
		   triggers->trig_update_after_statement || triggers->trig_update_old_table ||
		   triggers->trig_update_new_table;
}

/* Make ready what all changes need. */
static void
begin_updates(DbRows *rows)
{
	MemoryContext old;

	rows->estate = CreateExecutorState();
	old = MemoryContextSwitchTo(rows->estate->es_query_cxt);
	if (!update_needs_sql(rows->relation))
	{
		rows->result = makeNode(ResultRelInfo);
		InitResultRelInfo(rows->result, rows->relation, 0, NULL, 0);
		ExecOpenIndices(rows->result, false);
		/* where triggers find it */
		rows->estate->es_opened_result_relations = list_make1(rows->result);
	}
	rows->changed =
		ExecInitExtraTupleSlot(rows->estate, RelationGetDescr(rows->relation), &TTSOpsVirtual);
	MemoryContextSwitchTo(old);
}

/* Have the newest version of a row at hand that is locked by us. */
static void
fetch(DbRows *rows, const pg_uuid_t *key, ItemPointer place)
{
	bool isnull;

	if (ItemPointerIsValid(place) &&
		table_tuple_fetch_row_version(rows->relation, place, SnapshotSelf, rows->row) &&
		memcmp(DatumGetUUIDP(db_rows_value(rows, 0, &isnull)), key, sizeof(pg_uuid_t)) == 0)
		return;
	if (!look_up(rows, SnapshotSelf, key))
		elog(ERROR, "a row of agentvm.%s is gone that was locked", rows->table->table.name);
}

void
db_rows_update(DbRows *rows, const pg_uuid_t *key, ItemPointer place, Datum *values,
			   const char *nulls)
{
	DbTable *table = rows->table;
	int natts = RelationGetDescr(rows->relation)->natts;
	TupleTableSlot *slot;
	int i;

	if (rows->estate == NULL)
		begin_updates(rows);
	fetch(rows, key, place);
	slot_getallattrs(rows->row);
	slot = ExecClearTuple(rows->changed);
	memcpy(slot->tts_values, rows->row->tts_values, sizeof(Datum) * natts);
	memcpy(slot->tts_isnull, rows->row->tts_isnull, sizeof(bool) * natts);
	for (i = 1; i < table->nchanged; i++)
	{
		if (nulls[i] == 'k')
			continue;
		slot->tts_values[table->attnums[i] - 1] = values[i];
		slot->tts_isnull[table->attnums[i] - 1] = nulls[i] == 'n';
	}
	ExecStoreVirtualTuple(slot);

	if (rows->result != NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(GetPerTupleMemoryContext(rows->estate));

		AfterTriggerBeginQuery();
		ExecSimpleRelationUpdate(rows->result, rows->estate, NULL, rows->row, slot);
		*place = slot->tts_tid;
		/* what a trigger's function keeps from call to call is there for the next row */
		MemoryContextSwitchTo(rows->estate->es_query_cxt);
		AfterTriggerEndQuery(rows->estate);
		MemoryContextSwitchTo(old);
		ResetPerTupleExprContext(rows->estate);
		CommandCounterIncrement();
	}
	else
	{
		Datum all[DB_TABLE_COLUMNS];
		char all_nulls[DB_TABLE_COLUMNS];

		for (i = 0; i < table->nchanged; i++)
		{
			all[i] = slot->tts_values[table->attnums[i] - 1];
			all_nulls[i] = slot->tts_isnull[table->attnums[i] - 1] ? 'n' : ' ';
		}
		db_run(table->query, all, all_nulls);
		if (SPI_processed != 1)
			elog(ERROR, "a row of agentvm.%s has not been changed", table->table.name);
		ItemPointerSetInvalid(place);
	}
}
