/*-------------------------------------------------------------------------
 *
 * transfer.c
 *		Files in and out: the calls put and get.
 *
 *-------------------------------------------------------------------------
 */
#include "transfer.h"

#include "../protocol.h"

json_t *
transfer_put(const json_t *header, const char *bytes, size_t len)
{
	return json_pack("{s:s, s:s}", "error", CALL_INVALID, "message", "no files here");
}

json_t *
transfer_get(const json_t *header, char **bytes, size_t *len)
{
	*bytes = NULL;
	*len = 0;
	return transfer_put(header, NULL, 0);
}
