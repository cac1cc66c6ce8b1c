/*-------------------------------------------------------------------------
 *
 * db.c
 *		Talking to our own tables, and who the caller is.
 *
 * Entry points run as whoever calls them.  They take GetUserId() first, check
 * what that role may do, and then step into a scope (db_enter) in which they
 * are the extension's owner, so that callers need no right on any table and no
 * row-level security applies.  Errors leave a scope by the abort of the
 * (sub)transaction, which undoes user, settings and SPI connection.
 *
 * Above READ COMMITTED a transaction reads as of its first statement.  For the
 * control plane that would be wrong: quotas, idempotency keys and states have to
 * be checked against what is true now.  So db_run() takes a fresh snapshot, and
 * as foreign keys do in ri_triggers.c it passes the transaction's snapshot as
 * the one to cross-check with: changing a row that others have changed or made
 * since then is still a serialization failure.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "mb/pg_wchar.h"
#include "pgstat.h"
#include "nodes/makefuncs.h"
#include "optimizer/optimizer.h"
#include "rewrite/rewriteHandler.h"
#include "tcop/utility.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/numeric.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "agentvm.h"
#include "db.h"

#define SCOPE_SEARCH_PATH "agentvm, pg_catalog, pg_temp"

#define MAX_INTERVAL_S (366 * INT64CONST(86400))

/*
 * The extension's owner, InvalidOid when it has to be looked up.  pg_extension
 * sends no invalidation messages of its own before 18, but whatever changes its
 * row for us changes functions or the schema with it: DROP EXTENSION drops
 * them, ALTER EXTENSION UPDATE makes some, and REASSIGN OWNED gives them away.
 */
static Oid extension_owner = InvalidOid;

static void
forget_owner(Datum arg, int cacheid, uint32 hashvalue)
{
	extension_owner = InvalidOid;
}

char *
extension_version(Oid *owner)
{
	Relation relation = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple tuple;
	char *version = NULL;

	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum("agentvm"));
	scan = systable_beginscan(relation, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		bool isnull;

		version = TextDatumGetCString(
			heap_getattr(tuple, Anum_pg_extension_extversion, RelationGetDescr(relation), &isnull));
		if (owner != NULL)
			*owner = ((Form_pg_extension) GETSTRUCT(tuple))->extowner;
	}
	systable_endscan(scan);
	table_close(relation, AccessShareLock);
	return version;
}

static Oid
find_owner(void)
{
	static bool registered = false;
	Oid owner = InvalidOid;
	char *version;

	if (!registered)
	{
		CacheRegisterSyscacheCallback(PROCOID, forget_owner, (Datum) 0);
		CacheRegisterSyscacheCallback(NAMESPACEOID, forget_owner, (Datum) 0);
		registered = true;
	}

	/* What others have committed counts from here on, not only from the next lock on a table. */
	AcceptInvalidationMessages();
	if (OidIsValid(extension_owner))
		return extension_owner;

	version = extension_version(&owner);
	if (version == NULL)
		ereport(ERROR, errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				errmsg("extension agentvm is not installed in this database"),
				errhint("Run CREATE EXTENSION agentvm CASCADE."), hide_caller());
	if (strcmp(version, AGENTVM_VERSION) != 0)
		ereport(ERROR, errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				errmsg("extension agentvm is of version %s in this database, but its library is of "
					   "version %s",
					   version, AGENTVM_VERSION),
				errhint("Run ALTER EXTENSION agentvm UPDATE; where the library is the older one, "
						"install the newer one and restart the server."),
				hide_caller());

	extension_owner = owner;
	return owner;
}

void
db_enter(DbScope *scope)
{
	Oid owner = find_owner();
	int rc;

	rc = SPI_connect();
	if (rc != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed: %s", SPI_result_code_string(rc));

	GetUserIdAndSecContext(&scope->saved_user, &scope->saved_security);
	SetUserIdAndSecContext(owner, scope->saved_security | SECURITY_LOCAL_USERID_CHANGE);

	/* In a scope within a scope the path stands already; setting it is the dearest part of this. */
	scope->guc_level = NewGUCNestLevel();
	if (strcmp(namespace_search_path, SCOPE_SEARCH_PATH) != 0)
		(void) set_config_option("search_path", SCOPE_SEARCH_PATH, PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_SAVE, true, 0, false);
	/* "replica" would leave out our triggers: states without events, references to nothing */
	if (SessionReplicationRole != SESSION_REPLICATION_ROLE_ORIGIN)
		(void) set_config_option("session_replication_role", "origin", PGC_SUSET, PGC_S_SESSION,
								 GUC_ACTION_SAVE, true, 0, false);
}

void
db_leave(DbScope *scope)
{
	int rc;

	AtEOXact_GUC(true, scope->guc_level);
	SetUserIdAndSecContext(scope->saved_user, scope->saved_security);
	rc = SPI_finish();
	if (rc != SPI_OK_FINISH)
		elog(ERROR, "SPI_finish failed: %s", SPI_result_code_string(rc));
}

void
db_plan_without(const char *const *settings, int count)
{
	int i;

	for (i = 0; i < count; i++)
		(void) set_config_option(settings[i], "off", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE,
								 true, 0, false);
}

void
db_run(DbQuery *query, Datum *values, const char *nulls)
{
	MemoryContext caller = CurrentMemoryContext;
	Snapshot snapshot = InvalidSnapshot;
	Snapshot crosscheck = InvalidSnapshot;
	int rc;

	if (query->plan == NULL)
	{
		SPIPlanPtr plan = SPI_prepare_cursor(query->sql, query->nargs, query->argtypes,
											 query->generic ? CURSOR_OPT_GENERIC_PLAN : 0);

		if (plan == NULL)
			elog(ERROR, "SPI_prepare failed: %s: %s", SPI_result_code_string(SPI_result),
				 query->sql);
		rc = SPI_keepplan(plan);
		if (rc != 0)
			elog(ERROR, "SPI_keepplan failed: %s", SPI_result_code_string(rc));
		query->plan = plan;
	}

	/* READ COMMITTED needs none of this: SPI takes a new snapshot for each query. */
	if (IsolationUsesXactSnapshot())
	{
		CommandCounterIncrement(); /* see all that this transaction has done */
		snapshot = GetLatestSnapshot();
		crosscheck = GetTransactionSnapshot();
	}

	rc = SPI_execute_snapshot(query->plan, values, nulls, snapshot, crosscheck, false, true, 0);
	MemoryContextSwitchTo(caller); /* SPI leaves us in a context that db_leave() frees */
	if (rc < 0)
		elog(ERROR, "SPI_execute_snapshot failed: %s: %s", SPI_result_code_string(rc), query->sql);
}

Datum
db_value(uint64 row, int column, bool *isnull)
{
	if (SPI_tuptable == NULL || row >= SPI_processed || column < 1 ||
		column > SPI_tuptable->tupdesc->natts)
		elog(ERROR, "result has no column %d in row " UINT64_FORMAT, column, row);
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column, isnull);
}

char *
db_text(uint64 row, int column, MemoryContext context)
{
	bool isnull;
	Datum value = db_value(row, column, &isnull);
	Oid type = SPI_gettypeid(SPI_tuptable->tupdesc, column);
	MemoryContext oldcontext;
	char *result = NULL;

	if (isnull)
		return NULL;

	oldcontext = MemoryContextSwitchTo(context);
	switch (type)
	{
		case TEXTOID:
			result = TextDatumGetCString(value);
			break;
		case NAMEOID:
			result = pstrdup(NameStr(*DatumGetName(value)));
			break;
		case UUIDOID:
			result = DatumGetCString(DirectFunctionCall1(uuid_out, value));
			break;
		default:
			elog(ERROR, "column %d is neither text nor name nor uuid, but of type %u", column,
				 type);
	}
	MemoryContextSwitchTo(oldcontext);

	return result;
}

void
db_set_text(Datum *values, char *nulls, int i, const char *text)
{
	nulls[i] = text ? ' ' : 'n';
	values[i] = text ? CStringGetTextDatum(text) : (Datum) 0;
}

Datum
db_text_array(List *texts)
{
	Datum *elements = palloc(sizeof(Datum) * Max(list_length(texts), 1));
	int n = 0;
	ListCell *lc;

	foreach (lc, texts)
		elements[n++] = CStringGetTextDatum(lfirst(lc));
	return PointerGetDatum(construct_array(elements, n, TEXTOID, -1, false, TYPALIGN_INT));
}

/* ---- below SQL ---- */

static DbRelation *watched = NULL;

/* Relcache callback */
static void
forget_relation(Datum arg, Oid relation)
{
	DbRelation *r;

	for (r = watched; r != NULL; r = r->next)
	{
		if (!OidIsValid(relation) || r->oid == relation)
			r->oid = InvalidOid;
	}
}

Oid
db_relation_oid(DbRelation *relation)
{
	static int version = 0;

	if (OidIsValid(relation->oid))
		return relation->oid;
	if (watched == NULL)
		CacheRegisterRelcacheCallback(forget_relation, (Datum) 0);
	if (!relation->watched)
	{
		relation->next = watched;
		relation->watched = true;
		watched = relation;
	}
	relation->version = ++version;
	relation->oid = get_relname_relid(relation->name, get_namespace_oid("agentvm", false));
	if (!OidIsValid(relation->oid))
		elog(ERROR, "there is no relation agentvm.%s", relation->name);
	return relation->oid;
}

void
db_lookup_begin(DbLookup *lookup, DbKey *key, int nkeys, const Datum *keys)
{
	ScanKeyData scankeys[2];
	int i;

	Assert(nkeys <= lengthof(scankeys));
	CommandCounterIncrement();
	lookup->snapshot = RegisterSnapshot(GetLatestSnapshot());
	lookup->table = table_open(db_relation_oid(&key->table), AccessShareLock);
	for (i = 0; i < nkeys; i++)
		ScanKeyEntryInitialize(&scankeys[i], 0, Max(key->first, 1) + i, BTEqualStrategyNumber,
							   InvalidOid, DEFAULT_COLLATION_OID, key->equal, keys[i]);
	lookup->scan = systable_beginscan(lookup->table, db_relation_oid(&key->index), true,
									  lookup->snapshot, nkeys, scankeys);
}

HeapTuple
db_lookup_next(DbLookup *lookup)
{
	return systable_getnext(lookup->scan);
}

void
db_lookup_end(DbLookup *lookup)
{
	systable_endscan(lookup->scan);
	table_close(lookup->table, AccessShareLock);
	UnregisterSnapshot(lookup->snapshot);
}

Datum
db_lookup_value(const DbLookup *lookup, HeapTuple row, int column, bool *isnull)
{
	return heap_getattr(row, column, RelationGetDescr(lookup->table), isnull);
}

/* Find out where the values go, and what goes into the other columns. */
static void
prepare_insert(DbInsert *insert, Relation table)
{
	TupleDesc desc = RelationGetDescr(table);
	MemoryContext context =
		AllocSetContextCreate(TopMemoryContext, "agentvm insert", ALLOCSET_SMALL_SIZES);
	Bitmapset *given = NULL;
	StringInfoData names;
	StringInfoData parameters;
	MemoryContext old;
	int i;

	/* the query is in the context; the plan is not */
	if (insert->query != NULL && insert->query->plan != NULL)
		SPI_freeplan(insert->query->plan);
	if (insert->context != NULL)
		MemoryContextDelete(insert->context);
	insert->context = NULL;
	insert->query = NULL;
	insert->defaults = NIL;

	old = MemoryContextSwitchTo(context);
	insert->query = palloc0(sizeof(DbQuery));
	initStringInfo(&names);
	initStringInfo(&parameters);
	for (i = 0; i < insert->ncolumns; i++)
	{
		AttrNumber attnum = get_attnum(RelationGetRelid(table), insert->columns[i]);

		if (attnum == InvalidAttrNumber)
			elog(ERROR, "there is no column %s in agentvm.%s", insert->columns[i],
				 insert->table.name);
		insert->attnums[i] = attnum;
		given = bms_add_member(given, attnum);
		insert->query->argtypes[i] = TupleDescAttr(desc, attnum - 1)->atttypid;
		appendStringInfo(&names, "%s%s", i ? ", " : "", insert->columns[i]);
		appendStringInfo(&parameters, "%s$%d", i ? ", " : "", i + 1);
	}
	insert->query->nargs = insert->ncolumns;
	insert->query->sql = psprintf("INSERT INTO agentvm.%s (%s) VALUES (%s)", insert->table.name,
								  names.data, parameters.data);
	for (i = 1; i <= desc->natts; i++)
	{
		Node *value;

		if (TupleDescAttr(desc, i - 1)->attisdropped || TupleDescAttr(desc, i - 1)->attgenerated ||
			bms_is_member(i, given))
			continue;
		value = build_column_default(table, i);
		if (value != NULL)
			insert->defaults =
				lappend(insert->defaults,
						makeTargetEntry(expression_planner((Expr *) value), i, NULL, false));
	}
	MemoryContextSwitchTo(old);
	insert->context = context;
	insert->version = insert->table.version;
}

/* Whether an INSERT is more than constraints and indexes. */
static bool
insert_needs_sql(Relation table)
{
	const TriggerDesc *triggers = table->trigdesc;

	return table->rd_rel->relkind != RELKIND_RELATION || table->rd_rel->relispartition ||
		   table->rd_rules != NULL || table->rd_rel->relforcerowsecurity ||
		   (triggers != NULL &&
			(triggers->trig_insert_before_row || triggers->trig_insert_after_row ||
			 triggers->trig_insert_before_statement || triggers->trig_insert_after_statement));
}

/* What rows are inserted with: made ready by the first, and kept for those that follow. */
typedef struct Inserter
{
	DbInsert *insert;
	int version; /* of what follows, as insert->version */
	Relation table;
	EState *estate;
	ResultRelInfo *result;
	TupleTableSlot *slot;
	List *defaults; /* ExprState, as in insert->defaults; NULL for constants */
} Inserter;

/* Those that are kept, as long as this (sub)transaction lasts: an error has closed them. */
static struct
{
	bool open;
	LocalTransactionId transaction;
	SubTransactionId subtransaction;
	MemoryContext context;
	List *inserters;
} kept;

static bool
inserters_are_kept(void)
{
	return kept.open && kept.transaction == AvmLocalTransactionId() &&
		   kept.subtransaction == GetCurrentSubTransactionId();
}

static Inserter *
begin_inserting(DbInsert *insert, Relation table)
{
	EState *estate = CreateExecutorState();
	MemoryContext old = MemoryContextSwitchTo(estate->es_query_cxt);
	Inserter *inserter = palloc0(sizeof(Inserter));
	ListCell *lc;

	inserter->insert = insert;
	inserter->version = insert->version;
	inserter->table = table;
	inserter->estate = estate;
	inserter->result = makeNode(ResultRelInfo);
	InitResultRelInfo(inserter->result, table, 0, NULL, 0);
	ExecOpenIndices(inserter->result, false);
	inserter->slot = ExecInitExtraTupleSlot(estate, RelationGetDescr(table), &TTSOpsVirtual);
	foreach (lc, insert->defaults)
	{
		Expr *value = ((TargetEntry *) lfirst(lc))->expr;

		inserter->defaults =
			lappend(inserter->defaults, IsA(value, Const) ? NULL : ExecInitExpr(value, NULL));
	}
	MemoryContextSwitchTo(old);
	return inserter;
}

static void
end_inserting(Inserter *inserter)
{
	ExecCloseIndices(inserter->result);
	ExecResetTupleTable(inserter->estate->es_tupleTable, false);
	table_close(inserter->table, NoLock);
	FreeExecutorState(inserter->estate);
}

static void
insert_row(Inserter *inserter, Datum *values, const char *nulls)
{
	DbInsert *insert = inserter->insert;
	EState *estate = inserter->estate;
	MemoryContext old = MemoryContextSwitchTo(GetPerTupleMemoryContext(estate));
	TupleTableSlot *slot = ExecClearTuple(inserter->slot);
	ListCell *lc;
	ListCell *state;
	int i;

	memset(slot->tts_isnull, true, sizeof(bool) * slot->tts_tupleDescriptor->natts);
	for (i = 0; i < insert->ncolumns; i++)
	{
		slot->tts_values[insert->attnums[i] - 1] = values[i];
		slot->tts_isnull[insert->attnums[i] - 1] = nulls != NULL && nulls[i] == 'n';
	}
	forboth(lc, insert->defaults, state, inserter->defaults)
	{
		TargetEntry *entry = lfirst(lc);
		bool *isnull = &slot->tts_isnull[entry->resno - 1];
		Datum *value = &slot->tts_values[entry->resno - 1];

		if (lfirst(state) == NULL)
		{
			*value = ((Const *) entry->expr)->constvalue;
			*isnull = ((Const *) entry->expr)->constisnull;
		}
		else
			*value =
				ExecEvalExprSwitchContext(lfirst(state), GetPerTupleExprContext(estate), isnull);
	}
	ExecStoreVirtualTuple(slot);
	ExecSimpleRelationInsert(inserter->result, estate, slot);
	ExecClearTuple(slot);
	MemoryContextSwitchTo(old);
	ResetPerTupleExprContext(estate);
}

void
db_inserts_keep(void)
{
	kept.open = true;
	kept.transaction = AvmLocalTransactionId();
	kept.subtransaction = GetCurrentSubTransactionId();
	kept.context = CurrentMemoryContext;
	kept.inserters = NIL;
}

void
db_inserts_end(void)
{
	ListCell *lc;

	foreach (lc, kept.inserters)
		end_inserting(lfirst(lc));
	kept.open = false;
	kept.inserters = NIL;
}

/* The inserter that is kept for this, or NULL. */
static Inserter *
find_inserter(DbInsert *insert)
{
	ListCell *lc;

	foreach (lc, kept.inserters)
	{
		Inserter *inserter = lfirst(lc);

		if (inserter->insert == insert && inserter->version == insert->version)
			return inserter;
	}
	return NULL;
}

void
db_insert(DbInsert *insert, Datum *values, const char *nulls)
{
	bool keep = inserters_are_kept();
	Inserter *inserter = keep ? find_inserter(insert) : NULL;
	Relation table;

	if (inserter == NULL)
	{
		table = table_open(db_relation_oid(&insert->table), RowExclusiveLock);
		/* anew, if it has changed while we waited for the lock */
		(void) db_relation_oid(&insert->table);
		if (insert->version != insert->table.version)
			prepare_insert(insert, table);
		if (insert_needs_sql(table))
		{
			db_run(insert->query, values, nulls);
			table_close(table, NoLock);
			return;
		}
		PreventCommandIfReadOnly("INSERT");
		PreventCommandIfParallelMode("INSERT");
		if (keep)
		{
			MemoryContext old = MemoryContextSwitchTo(kept.context);

			inserter = begin_inserting(insert, table);
			kept.inserters = lappend(kept.inserters, inserter);
			MemoryContextSwitchTo(old);
		}
		else
			inserter = begin_inserting(insert, table);
	}
	insert_row(inserter, values, nulls);
	CommandCounterIncrement();
	if (!keep)
		end_inserting(inserter);
}

/* ---- the caller ---- */

bool
caller_is_admin(Oid role)
{
	Oid admin;

	if (superuser_arg(role))
		return true;
	admin = get_role_oid("agentvm_admin", true);
	return OidIsValid(admin) && has_privs_of_role(role, admin);
}

void
require_admin(const char *what)
{
	if (!caller_is_admin(GetUserId()))
		ereport(ERROR, errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				errmsg("permission denied to %s", what),
				errhint("Only members of role agentvm_admin may do this."), hide_caller());
}

void
raise_no_such_team(const char *team_id)
{
	ereport(ERROR, errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("team \"%s\" does not exist", team_id),
			errdetail("Or the current role is not a member of it; the two are not told apart."),
			errhint("An administrator can create teams and add members to them."), hide_caller());
	pg_unreachable();
}

/* Error context callback */
static void
hide_statement(void *arg)
{
	(void) hide_caller();
}

void
hide_caller_begin(HiddenCaller *hidden)
{
	hidden->outer = error_context_stack;
	hidden->callback.callback = hide_statement;
	hidden->callback.arg = NULL;
	hidden->callback.previous = NULL; /* the others are left out */
	error_context_stack = &hidden->callback;
}

void
hide_caller_end(HiddenCaller *hidden)
{
	error_context_stack = hidden->outer;
}

void
hide_activity(const char *function)
{
	char *blank = palloc0(pgstat_track_activity_query_size);

	/* A shorter text would leave the end of the statement in shared memory. */
	memset(blank, ' ', pgstat_track_activity_query_size - 1);
	pgstat_report_activity(STATE_RUNNING, blank);
	snprintf(blank, pgstat_track_activity_query_size,
			 "%s: the statement is not shown, it may hold secrets", function);
	pgstat_report_activity(STATE_RUNNING, blank);
	pfree(blank);
}

static bool
has_control_character(const char *string)
{
	const unsigned char *c;

	for (c = (const unsigned char *) string; *c != '\0'; c++)
	{
		if (*c < 0x20 || *c == 0x7f)
			return true;
		/* U+0080 to U+009F */
		if (*c == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0 && GetDatabaseEncoding() == PG_UTF8)
			return true;
	}
	return false;
}

char *
check_identifier(text *value, const char *argument)
{
	char *identifier;
	size_t len;

	if (value == NULL)
		ereport(ERROR, errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				errmsg("argument \"%s\" must not be null", argument), hide_caller());

	identifier = text_to_cstring(value);
	len = strlen(identifier);
	if (len < 1 || len > AVM_MAX_ID)
		ereport(ERROR, errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				errmsg("argument \"%s\" must have 1 to %d bytes", argument, AVM_MAX_ID),
				errdetail("It has %zu.", len), hide_caller());
	if (has_control_character(identifier))
		ereport(ERROR, errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				errmsg("argument \"%s\" must not contain control characters", argument),
				hide_caller());
	if (identifier[0] == ' ' || identifier[len - 1] == ' ')
		ereport(ERROR, errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				errmsg("argument \"%s\" must not begin or end with a blank", argument),
				hide_caller());

	return identifier;
}

/* How long a JSON string is when it is written out. */
static int64
quoted_length(const char *string, int len)
{
	int64 total = len + 2;
	int i;

	for (i = 0; i < len; i++)
	{
		unsigned char c = string[i];

		if (c == '"' || c == '\\' || c == '\b' || c == '\f' || c == '\n' || c == '\r' || c == '\t')
			total += 1;
		else if (c < ' ')
			total += 5;
	}
	return total;
}

static int64
scalar_length(const JsonbValue *value)
{
	char *digits;
	int64 len;

	switch (value->type)
	{
		case jbvNull:
			return 4;
		case jbvBool:
			return value->val.boolean ? 4 : 5;
		case jbvString:
			return quoted_length(value->val.string.val, value->val.string.len);
		case jbvNumeric:
			digits = DatumGetCString(
				DirectFunctionCall1(numeric_out, NumericGetDatum(value->val.numeric)));
			len = strlen(digits);
			pfree(digits);
			return len;
		default:
			elog(ERROR, "unexpected type of jsonb value: %d", (int) value->type);
	}
	return 0;
}

/*
 * Is the document's text longer than "limit"?  It is added up, brackets,
 * commas, colons and blanks included, rather than built: [1e131071, ...] takes ten bytes a number in binary and 131 kB as text.
 */
static bool
longer_than(Jsonb *document, int64 limit)
{
	JsonbIterator *iterator = JsonbIteratorInit(&document->root);
	JsonbIteratorToken token;
	JsonbValue value;
	int64 total = 0;

	while ((token = JsonbIteratorNext(&iterator, &value, false)) != WJB_DONE)
	{
		switch (token)
		{
			case WJB_BEGIN_ARRAY:
				total += 2 + 2 * Max(value.val.array.nElems - 1, 0);
				break;
			case WJB_BEGIN_OBJECT:
				total += 2 + 2 * Max(value.val.object.nPairs - 1, 0);
				break;
			case WJB_KEY:
				total += scalar_length(&value) + 2;
				break;
			case WJB_ELEM:
			case WJB_VALUE:
				total += scalar_length(&value);
				break;
			default:
				break;
		}
		if (total > limit)
			return true;
	}
	return false;
}

void
check_document(Jsonb *document, char kind, const char *argument)
{
	bool fits;

	if (kind == 'o')
		fits = JB_ROOT_IS_OBJECT(document);
	else
		fits = JB_ROOT_IS_ARRAY(document) && !JB_ROOT_IS_SCALAR(document);
	if (!fits)
		ereport(
			ERROR, errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			errmsg("argument \"%s\" must be a JSON %s", argument, kind == 'o' ? "object" : "array"),
			hide_caller());

	if (longer_than(document, AVM_MAX_DOCUMENT))
		ereport(ERROR, errcode(AVM_OVER_LIMIT),
				errmsg("argument \"%s\" is longer than %d bytes", argument, AVM_MAX_DOCUMENT),
				hide_caller());
}

int64
check_interval(Interval *interval, const char *argument)
{
	int64 seconds;

	/*
	 * Months and days count as 30 days and 24 hours.  Nothing can overflow here,
	 * and the infinite intervals of 17, all of whose fields are the largest or
	 * smallest there are, come out far beyond the limits.
	 */
	seconds =
		((int64) interval->month * 30 + interval->day) * 86400 + interval->time / USECS_PER_SEC;
	if (interval->time % USECS_PER_SEC < 0)
		seconds--;

	if (seconds < 1 || seconds > MAX_INTERVAL_S)
		ereport(ERROR, errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				errmsg("argument \"%s\" must be between 1 second and 366 days", argument),
				hide_caller());
	return seconds;
}
