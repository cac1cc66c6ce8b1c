/*-------------------------------------------------------------------------
 *
 * db.h
 *		Talking to our own tables: as the extension's owner, with a safe search
 *		path, through saved plans; and who the caller is.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_DB_H
#define AGENTVM_DB_H

#include "agentvm.h"

#include "access/htup.h"
#include "executor/spi.h"
#include "utils/jsonb.h"
#include "utils/relcache.h"
#include "utils/snapshot.h"
#include "utils/uuid.h"

/*
 * The version of the extension in this database as a palloc'd string, NULL when
 * it is not installed; *owner (if not NULL) is set to its owner.  Reads the
 * catalog each time.
 */
extern char *extension_version(Oid *owner);

/* A stretch of code that runs as the extension's owner, inside an SPI connection. */
typedef struct DbScope
{
	Oid saved_user;
	int saved_security;
	int guc_level;
} DbScope;

/*
 * Connect to SPI, become the owner of extension agentvm, and set search_path to
 * "agentvm, pg_catalog, pg_temp" until db_leave().  An error in between is undone by the
 * transaction's abort.  Raises 55000 when the extension is not installed here, or
 * in another version than the library's.
 * Results that must survive db_leave() are copied with SPI_palloc or into a
 * context of the caller's.
 */
extern void db_enter(DbScope *scope);
extern void db_leave(DbScope *scope);

/* Turn settings of the planner off until db_leave(). */
extern void db_plan_without(const char *const *settings, int count);

/* A statement with a plan that is prepared on first use and saved for the process. */
typedef struct DbQuery
{
	const char *sql;
	int nargs;
	Oid argtypes[24];
	bool generic; /* planned once, whatever its values are: there is one way to do it */
	SPIPlanPtr plan;
} DbQuery;

/*
 * Run a query inside a scope; values[i] is SQL NULL where nulls[i] == 'n'
 * (nulls may be NULL: none).  Results are in SPI_processed and SPI_tuptable.
 * Never reads with a stale snapshot: every call sees all that is committed when
 * it starts, whatever the isolation level, plus this transaction's own changes.
 * Leaves CurrentMemoryContext as it was.  Raises whatever the query raises.
 */
extern void db_run(DbQuery *query, Datum *values, const char *nulls);

/* Column "column" (from 1) of row "row" (from 0) of the last result; *isnull is set. */
extern Datum db_value(uint64 row, int column, bool *isnull);

/* The same as a palloc'd C string in "context", or NULL; for text, name and uuid columns only. */
extern char *db_text(uint64 row, int column, MemoryContext context);

/* Make values[i] and nulls[i] of a text, which may be NULL; palloc'd. */
extern void db_set_text(Datum *values, char *nulls, int i, const char *text);

/* A text[] of a List of char *, palloc'd, as an argument. */
extern Datum db_text_array(List *texts);

/* ---- below SQL, for the hot path ---- */

/* A relation of ours by name; what has been found out about it is forgotten when it changes. */
typedef struct DbRelation
{
	const char *name;
	Oid oid;	 /* InvalidOid until looked up */
	int version; /* another one for each look-up */
	bool watched;
	struct DbRelation *next;
} DbRelation;

/* Its OID; inside a scope.  Once a lock on it has been waited for, ask again whether "version" is the same. */
extern Oid db_relation_oid(DbRelation *relation);

/* One of our tables, the index to look into and how its columns compare; static, begins as {{"table"}, {"index"}, F_...EQ, first}. */
typedef struct DbKey
{
	DbRelation table;
	DbRelation index;
	RegProcedure equal;
	AttrNumber first; /* column of the table that is the index's first; 0 stands for 1 */
} DbKey;

typedef struct DbLookup
{
	Relation table;
	struct SysScanDescData *scan;
	Snapshot snapshot;
} DbLookup;

/*
 * Find the rows of one of our tables whose columns from key->first on (in the order of
 * both table and index, all of the type that key->equal compares) have the given values, as last committed
 * plus this transaction's own changes.  db_lookup_next() returns them one by
 * one, valid until the next call, then NULL; db_lookup_end() closes in any case.
 * Costs a tenth of a query.  Inside a scope.
 */
extern void db_lookup_begin(DbLookup *lookup, DbKey *key, int nkeys, const Datum *keys);
extern HeapTuple db_lookup_next(DbLookup *lookup);
extern void db_lookup_end(DbLookup *lookup);

/* A column (from 1) of a row that was found; *isnull is set. */
extern Datum db_lookup_value(const DbLookup *lookup, HeapTuple row, int column, bool *isnull);

#define DB_INSERT_COLUMNS 24

/* An INSERT of one row of values; static, begins as {{"table"}, number of columns, {"column", ...}}. */
typedef struct DbInsert
{
	DbRelation table;
	int ncolumns;
	const char *columns[DB_INSERT_COLUMNS];
	int version; /* of the table for which the following holds */
	MemoryContext context;
	AttrNumber attnums[DB_INSERT_COLUMNS];
	List *defaults; /* of the other columns: TargetEntry */
	DbQuery *query; /* the same in SQL, for tables that have more to them */
} DbInsert;

/*
 * Insert a row into one of our tables, as INSERT INTO agentvm.table (columns)
 * VALUES (values) would, at half its price: defaults, constraints and indexes
 * are served by the executor's own functions.  A table to which somebody has
 * given triggers for INSERT, rules or forced row-level security gets the SQL
 * instead.  The values are of the columns' types; values[i] is NULL where
 * nulls[i] == 'n' (nulls may be NULL: none).  Inside a scope.  Raises whatever
 * the INSERT would raise.
 */
extern void db_insert(DbInsert *insert, Datum *values, const char *nulls);

/*
 * From db_inserts_keep() to db_inserts_end(), in the same (sub)transaction, db_insert() keeps what it has
 * made ready for a table, which costs more than a row does; in CurrentMemoryContext.  An abort ends it, too.
 * Does not nest.
 */
extern void db_inserts_keep(void);
extern void db_inserts_end(void);

/* ---- the caller ---- */

/* Whether "role" has the rights of agentvm_admin (superusers do). */
extern bool caller_is_admin(Oid role);

/* Raises 42501 unless the current user has the rights of agentvm_admin; "what" ends "permission denied to ...". */
extern void require_admin(const char *what);

/*
 * Raise 42704: the same error for a team that does not exist and one that the
 * caller is no member of.
 */
pg_noreturn extern void raise_no_such_team(const char *team_id);

/* ---- checking what callers hand in ---- */

/*
 * A copy of a text argument as an identifier: 1..AVM_MAX_ID bytes, no control
 * characters, no leading or trailing blank.  Raises 22023 naming the argument.
 */
extern char *check_identifier(text *value, const char *argument);

/*
 * Raise 22023 unless the document is a JSON object ('o') or array ('a'), or
 * AV012 when its text is over AVM_MAX_DOCUMENT bytes. Statement and context are
 * kept out of the log.
 */
extern void check_document(Jsonb *document, char kind, const char *argument);

/* A positive, finite interval in seconds; raises 22023 naming the argument (1 s .. 366 days). */
extern int64 check_interval(Interval *interval, const char *argument);

/* ereport decoration for functions that take secrets. */
#define hide_caller() errhidestmt(true), errhidecontext(true)

/*
 * The same for every message from here to hide_caller_end(), also those of
 * PostgreSQL itself: the statement may hold secrets, and so may the SQL that
 * PL/pgSQL would tell of.  An error needs no hide_caller_end().
 */
typedef struct HiddenCaller
{
	ErrorContextCallback callback;
	ErrorContextCallback *outer;
} HiddenCaller;

extern void hide_caller_begin(HiddenCaller *hidden);
extern void hide_caller_end(HiddenCaller *hidden);

/*
 * Put a text that names the function in the place of the statement that others
 * see in pg_stat_activity, now and once it is done, and that a report of a
 * deadlock shows: the statement may hold secrets.
 */
extern void hide_activity(const char *function);

#endif /* AGENTVM_DB_H */
