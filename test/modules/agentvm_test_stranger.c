/*-------------------------------------------------------------------------
 *
 * agentvm_test_stranger.c
 *		A provider that was built for another version of the interface.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "providers/provider.h"

PG_MODULE_MAGIC;

extern void _PG_init(void);

/* Of a struct of another version nothing but the first member may be read. */
static const Provider strange_provider = {
	.abi = AVM_PROVIDER_ABI + 1,
	.name = (const char *) 1,
};

void
_PG_init(void)
{
	agentvm_register_provider(&strange_provider);
}
