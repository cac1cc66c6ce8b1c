/*-------------------------------------------------------------------------
 *
 * procedure.h
 *		What SQL procedures written in C need: no transaction block, one INOUT result.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROCEDURE_H
#define AGENTVM_PROCEDURE_H

#include "agentvm.h"

/*
 * Raise 25001, with a hint about autocommit, when the procedure was called where
 * it may not commit: inside a transaction block, or from a function.
 */
extern void require_no_transaction_block(FunctionCallInfo fcinfo, const char *procedure);

/* The row that a procedure with exactly one INOUT argument returns; palloc'd. */
extern Datum procedure_result(FunctionCallInfo fcinfo, Datum value);

#endif /* AGENTVM_PROCEDURE_H */
