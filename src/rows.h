/*-------------------------------------------------------------------------
 *
 * rows.h
 *		Rows of one of our tables, below SQL: found by key, locked, changed.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ROWS_H
#define AGENTVM_ROWS_H

#include "db.h"
#include "storage/itemptr.h"

#define DB_TABLE_COLUMNS 48

/*
 * One of our tables, an index on its key, a uuid (unique, if rows are changed), and columns of it: the key, those that
 * are changed, then those that are only read.  Static, begins as
 * {{"table"}, {"index"}, number of columns, of these the key and those changed, {"key", ...}}.
 */
typedef struct DbTable
{
	DbRelation table;
	DbRelation index;
	int ncolumns;
	int nchanged; /* at most as many as a DbQuery has parameters */
	const char *columns[DB_TABLE_COLUMNS];
	int version; /* of the table for which the following holds */
	MemoryContext context;
	AttrNumber attnums[DB_TABLE_COLUMNS];
	DbQuery *query; /* the change in SQL, for tables that have more to them */
} DbTable;

typedef struct DbRows DbRows;

/*
 * Open a table for looking at its rows, and for locking and changing them if "change" is
 * true, which raises 25006 where nothing may be changed.  What it finds is as last
 * committed, plus this transaction's own changes.  One after the other is at hand.
 * Palloc'd in CurrentMemoryContext.  To be closed in the same (sub)transaction; an
 * abort does so, too.  Inside a db scope.
 */
extern DbRows *db_rows_open(DbTable *table, bool change);
extern void db_rows_close(DbRows *rows);

/*
 * Find the row with this key, without waiting for anybody: db_rows_lock() as SELECT ... FOR
 * UPDATE SKIP LOCKED does, db_rows_find() without a lock.  Returns false when there is
 * none, or somebody else has it locked.  *place is set to where the row is.
 */
extern bool db_rows_lock(DbRows *rows, const pg_uuid_t *key, ItemPointer place);
extern bool db_rows_find(DbRows *rows, const pg_uuid_t *key, ItemPointer place);

/* A column (from 0: the key) of the row at hand, valid until the next one is; *isnull is set. */
extern Datum db_rows_value(DbRows *rows, int column, bool *isnull);

/*
 * Change the row with this key, which is locked by us, as UPDATE agentvm.table SET ... WHERE
 * key = "key" would, at a third of its price: constraints, indexes and triggers are served by
 * the executor's own functions.  values[i] is of column i's type; it is
 * NULL where nulls[i] == 'n', and left alone where nulls[i] == 'k' (as the key is in any case).
 * A table to which somebody has given other triggers than AFTER UPDATE ... FOR EACH ROW, rules or
 * forced row-level security gets the SQL instead, and so does a transaction above READ
 * COMMITTED, for which others' changes are serialization failures.
 * "place" is where the row was, which need not be true any more; it is set to where it is now.
 * Raises whatever the UPDATE would raise, and an internal error when there is no such row.
 */
extern void db_rows_update(DbRows *rows, const pg_uuid_t *key, ItemPointer place, Datum *values,
						   const char *nulls);

#endif /* AGENTVM_ROWS_H */
