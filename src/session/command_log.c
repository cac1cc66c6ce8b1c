/*-------------------------------------------------------------------------
 *
 * command_log.c
 *		What the gateway calls for commands: who has the channel, tickets' key, the log.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "fmgr.h"

PG_FUNCTION_INFO_V1(agentvm_attach);
PG_FUNCTION_INFO_V1(agentvm_control_key);
PG_FUNCTION_INFO_V1(agentvm_command_started);
PG_FUNCTION_INFO_V1(agentvm_command_ended);

Datum
agentvm_attach(PG_FUNCTION_ARGS)
{
	elog(ERROR, "attach");
}

Datum
agentvm_control_key(PG_FUNCTION_ARGS)
{
	elog(ERROR, "control_key");
}

Datum
agentvm_command_started(PG_FUNCTION_ARGS)
{
	elog(ERROR, "command_started");
}

Datum
agentvm_command_ended(PG_FUNCTION_ARGS)
{
	elog(ERROR, "command_ended");
}
