/*-------------------------------------------------------------------------
 *
 * run.c
 *		run(): a VM for one command.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "fmgr.h"

PG_FUNCTION_INFO_V1(agentvm_run);

Datum
agentvm_run(PG_FUNCTION_ARGS)
{
	elog(ERROR, "run");
}
