/*-------------------------------------------------------------------------
 *
 * files.c
 *		Files in and out of VMs.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "fmgr.h"

PG_FUNCTION_INFO_V1(agentvm_upload);
PG_FUNCTION_INFO_V1(agentvm_download);
PG_FUNCTION_INFO_V1(agentvm_upload_tar);
PG_FUNCTION_INFO_V1(agentvm_download_tar);

Datum
agentvm_upload(PG_FUNCTION_ARGS)
{
	elog(ERROR, "upload");
}

Datum
agentvm_download(PG_FUNCTION_ARGS)
{
	elog(ERROR, "download");
}

Datum
agentvm_upload_tar(PG_FUNCTION_ARGS)
{
	elog(ERROR, "upload_tar");
}

Datum
agentvm_download_tar(PG_FUNCTION_ARGS)
{
	elog(ERROR, "download_tar");
}
