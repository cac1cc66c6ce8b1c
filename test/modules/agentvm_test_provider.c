/*-------------------------------------------------------------------------
 *
 * agentvm_test_provider.c
 *		The smallest provider that another library can add: its VMs run at once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "providers/provider.h"

PG_MODULE_MAGIC;

extern void _PG_init(void);

static const ProviderOption tiny_options[] = {
	{"name", 's', true, "what the VM is called"}, {"broken", 'b', true, "raise an error"}, {NULL}};

static const ProviderOption no_secrets[] = {{NULL}};

static void
tiny_step(const ProviderContext *context, ProviderStep *step)
{
	if (context->op == OP_PROVISION && option_bool(context->options, "broken", false))
		ereport(ERROR, (errmsg("the tiny provider is broken")));
	step->kind = STEP_DONE;
	step->operation = "tiny";
	if (context->op == OP_PROVISION)
	{
		step->running = true;
		step->vm_id = psprintf("tiny-%s", option_text(context->options, "name"));
	}
	if (context->op == OP_INSPECT || context->op == OP_CHECK)
		step->result = handle_set_text(NULL, "says", "tiny");
}

static const Provider tiny_provider = {
	.abi = AVM_PROVIDER_ABI,
	.name = "tiny",
	.options = tiny_options,
	.secrets = no_secrets,
	.step = tiny_step,
};

void
_PG_init(void)
{
	agentvm_register_provider(&tiny_provider);
}
