/*-------------------------------------------------------------------------
 *
 * exec.c
 *		Commands in VMs: exec() and its kin.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "fmgr.h"

PG_FUNCTION_INFO_V1(agentvm_exec);
PG_FUNCTION_INFO_V1(agentvm_exec_bytes);
PG_FUNCTION_INFO_V1(agentvm_exec_start);
PG_FUNCTION_INFO_V1(agentvm_exec_output);
PG_FUNCTION_INFO_V1(agentvm_exec_wait);
PG_FUNCTION_INFO_V1(agentvm_exec_kill);
PG_FUNCTION_INFO_V1(agentvm_exec_many);

Datum
agentvm_exec(PG_FUNCTION_ARGS)
{
	elog(ERROR, "exec");
}

Datum
agentvm_exec_bytes(PG_FUNCTION_ARGS)
{
	elog(ERROR, "exec_bytes");
}

Datum
agentvm_exec_start(PG_FUNCTION_ARGS)
{
	elog(ERROR, "exec_start");
}

Datum
agentvm_exec_output(PG_FUNCTION_ARGS)
{
	elog(ERROR, "exec_output");
}

Datum
agentvm_exec_wait(PG_FUNCTION_ARGS)
{
	elog(ERROR, "exec_wait");
}

Datum
agentvm_exec_kill(PG_FUNCTION_ARGS)
{
	elog(ERROR, "exec_kill");
}

Datum
agentvm_exec_many(PG_FUNCTION_ARGS)
{
	elog(ERROR, "exec_many");
}
