/*-------------------------------------------------------------------------
 *
 * ask.c
 *		A read-only question to a provider, answered in this backend.
 *
 * The statement that asks holds its snapshot while it waits: that is the price
 * of a function; the calls are short and bounded by their timeout.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "db.h"
#include "engine/ask.h"
#include "engine/turn.h"
#include "miscadmin.h"
#include "secret/credentials.h"
#include "utils/timestamp.h"

#define ASK_TIMEOUT_MS 10000
#define MAX_STEPS 16

Jsonb *
provider_ask(ProviderOp op, const char *team_id, const char *provider_name, Jsonb *options,
			 const SessionRow *row)
{
	const Provider *provider = provider_get(provider_name);
	ProviderContext context = {0};
	SecretSet *secrets;
	DbScope scope;
	int i;

	{
		MemoryContext caller = CurrentMemoryContext;

		db_enter(&scope);
		secrets = credentials_load(team_id, provider_name, caller);
		db_leave(&scope);
		MemoryContextSwitchTo(caller);
	}
	context.op = op;
	context.session = row ? session_row_for_provider(row) : NULL;
	context.options = options;
	context.secrets = secrets;
	context.handle = row ? row->handle : NULL;

	for (i = 0; i < MAX_STEPS; i++)
	{
		ProviderStep step;

		context.now = GetCurrentTimestamp();
		provider_step(provider, &context, &step);
		if (step.handle != NULL)
			context.handle = step.handle;
		context.reply = NULL;
		switch (step.kind)
		{
			case STEP_DONE:
				return step.result ? step.result : handle_set_text(NULL, "state", "unknown");
			case STEP_REQUEST:
				step.request->timeout_ms = ASK_TIMEOUT_MS;
				context.reply = http_perform(step.request);
				break;
			case STEP_WAIT:
				(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
								 step.wait_ms, AvmWaitEvent("AgentvmAsk"));
				ResetLatch(MyLatch);
				CHECK_FOR_INTERRUPTS();
				break;
			case STEP_FAILED:
				ereport(ERROR, (errcode(reason_sqlstate(class_end_reason(step.error_class))),
								errmsg("provider \"%s\" refused: %s", provider_name,
									   step.error_code ? step.error_code
													   : error_class_name(step.error_class)),
								step.error_message
									? errdetail("%s", secret_redact(secrets, step.error_message))
									: 0));
		}
	}
	ereport(ERROR, (errcode(AVM_PROVIDER_ERROR),
					errmsg("provider \"%s\" did not come to an answer", provider_name)));
	return NULL;
}
