/*-------------------------------------------------------------------------
 *
 * procedure.h
 *		What SQL procedures and set-returning functions written in C need.
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

/* The same with as many as there are values. */
extern Datum procedure_row(FunctionCallInfo fcinfo, Datum *values, bool *nulls);

/*
 * Begin the materialized result of a set-returning function: rows, or single
 * values, are then put into rsinfo->setResult. Raises 0A000 where no set can be
 * returned.  One form for 14 to 18: InitMaterializedSRF() is 15's, and for rows
 * only.
 */
extern void begin_set(FunctionCallInfo fcinfo);

#endif /* AGENTVM_PROCEDURE_H */
