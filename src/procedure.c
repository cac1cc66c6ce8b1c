/*-------------------------------------------------------------------------
 *
 * procedure.c
 *		What SQL procedures written in C need: no transaction block, one INOUT result.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "agentvm.h"
#include "nodes/parsenodes.h"
#include "procedure.h"

void
require_no_transaction_block(FunctionCallInfo fcinfo, const char *procedure)
{
	if (fcinfo->context == NULL || !IsA(fcinfo->context, CallContext) ||
		castNode(CallContext, fcinfo->context)->atomic)
		ereport(ERROR, (errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
						errmsg("%s cannot run inside a transaction block", procedure),
						errdetail("It commits while it works."),
						errhint("CALL it with autocommit on: not between BEGIN and COMMIT, and not "
								"from a function.")));
}

Datum
procedure_result(FunctionCallInfo fcinfo, Datum value)
{
	TupleDesc desc;
	bool isnull = false;

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "a procedure with an INOUT argument returns a row");
	return HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), &value, &isnull));
}
