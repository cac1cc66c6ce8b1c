/*-------------------------------------------------------------------------
 *
 * database_hook.c
 *		Letting go of a database that somebody wants for himself.
 *
 * These commands fail while anybody is connected to the database.  The backend
 * that runs one puts a hold on it in shared memory, so that the launcher starts
 * nobody there, asks its workers to end, waits until they have, and lifts
 * the hold when its transaction has ended, or its subtransaction has failed: only
 * then does the launcher see what has become of the database.  A hold whose
 * backend has died is void.  Only who may run the command stops anybody: else a
 * failing DROP by a stranger would be a way to disturb.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "agentvm.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "engine/database_hook.h"
#include "engine/shared.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "tcop/utility.h"
#include "utils/timestamp.h"

#define LET_GO_MS 5000 /* then the command itself says who is in the way */

static ProcessUtility_hook_type prev_utility_hook = NULL;

/* The (sub)transaction that has put a hold on a database, and so is to lift it. */
static SubTransactionId holder = InvalidSubTransactionId;
static bool databases_changed = false; /* a command of this transaction, to tell the launcher */

/* Text of an option of a command, or NULL. */
static char *
option_of(List *options, const char *name)
{
	ListCell *lc;

	foreach (lc, options)
	{
		DefElem *option = lfirst_node(DefElem, lc);

		if (strcmp(option->defname, name) == 0 && option->arg != NULL)
			return defGetString(option);
	}
	return NULL;
}

/* The database that a command needs for itself, or NULL; *makes: it asks for CREATEDB, too. */
static const char *
wanted_database(Node *command, bool *makes)
{
	*makes = IsA(command, CreatedbStmt) || IsA(command, RenameStmt);
	switch (nodeTag(command))
	{
		case T_DropdbStmt:
			return castNode(DropdbStmt, command)->dbname;
		case T_RenameStmt:
			if (castNode(RenameStmt, command)->renameType == OBJECT_DATABASE)
				return castNode(RenameStmt, command)->subname;
			return NULL;
		case T_AlterDatabaseStmt:
			if (option_of(castNode(AlterDatabaseStmt, command)->options, "tablespace") != NULL)
				return castNode(AlterDatabaseStmt, command)->dbname;
			return NULL;
		case T_CreatedbStmt:
			return option_of(castNode(CreatedbStmt, command)->options, "template");
		default:
			return NULL;
	}
}

/* The database to be let go, InvalidOid for none: there, served, and the caller's to command. */
static Oid
database_to_release(Node *command)
{
	bool makes;
	const char *name = wanted_database(command, &makes);
	Oid database;

	if (name == NULL || !shared_available())
		return InvalidOid;
	database = get_database_oid(name, true);
	if (!OidIsValid(database) || database == MyDatabaseId)
		return InvalidOid;
	if (!AvmOwnsDatabase(database, GetUserId()) || (makes && !have_createdb_privilege()))
		return InvalidOid;
	return database;
}

/* Ask the workers to end, and wait until they have, but not for ever. */
static void
release_database(Oid database)
{
	TimestampTz give_up_at = GetCurrentTimestamp() + LET_GO_MS * INT64CONST(1000);

	while (shared_stop_workers(database) > 0 && GetCurrentTimestamp() < give_up_at)
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 10,
						 AvmWaitEvent("AgentvmLetGo"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/* The launcher may look again, and sees what the command has done. */
static void
lift_hold(void)
{
	if (holder != InvalidSubTransactionId)
		shared_hold_database(InvalidOid);
	holder = InvalidSubTransactionId;
	databases_changed = false;
	shared_wake_launcher();
}

static void
at_end(XactEvent event, void *arg)
{
	if ((holder != InvalidSubTransactionId || databases_changed) &&
		(event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE))
		lift_hold();
}

static void
at_subtransaction_end(SubXactEvent event, SubTransactionId mine, SubTransactionId parent, void *arg)
{
	if (holder == InvalidSubTransactionId || holder != mine)
		return;
	if (event == SUBXACT_EVENT_ABORT_SUB)
		lift_hold();
	else if (event == SUBXACT_EVENT_COMMIT_SUB)
		holder = parent;
}

static void
agentvm_utility(PlannedStmt *pstmt, const char *queryString, bool readOnlyTree,
				ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *queryEnv,
				DestReceiver *dest, QueryCompletion *qc)
{
	Oid database = database_to_release(pstmt->utilityStmt);
	ProcessUtility_hook_type next = prev_utility_hook ? prev_utility_hook : standard_ProcessUtility;

	/* the launcher serves a new database, or one that takes connections again, at once */
	if (IsA(pstmt->utilityStmt, CreatedbStmt) || IsA(pstmt->utilityStmt, AlterDatabaseStmt))
		databases_changed = true;
	if (OidIsValid(database))
	{
		holder = GetCurrentSubTransactionId();
		shared_hold_database(database);
		release_database(database);
	}
	next(pstmt, queryString, readOnlyTree, context, params, queryEnv, dest, qc);
}

void
database_hook_init(void)
{
	prev_utility_hook = ProcessUtility_hook;
	ProcessUtility_hook = agentvm_utility;
	RegisterXactCallback(at_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
}
