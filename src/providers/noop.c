/*-------------------------------------------------------------------------
 *
 * noop.c
 *		A provider that only pretends: for tests, dry runs and as the default.
 *
 * It calls nobody.  Its VMs begin and end after the delays that the options
 * ask for, and it can fail in every way that a real provider does.  All that it
 * knows of a VM is in the session's handle:
 *
 *		launch_due		when the VM runs (epoch ms), from the first step on
 *		terminate_due	when the VM is gone, once it has been told to end
 *		failures		how often provisioning has failed as asked for
 *		power_due		when it is paused or runs again, while that is under way
 *		power_failures	how often that has failed as asked for
 *		paused			it is
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "datatype/timestamp.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "agentvm.h"
#include "db.h"
#include "providers/provider.h"

#define EPOCH_SHIFT_MS                                                                             \
	((int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY * INT64CONST(1000))

#define FAIL_LOST "lost"

static const ProviderOption noop_options[] = {
	{"launch_delay", 'd', true, "how long a launch takes"},
	{"terminate_delay", 'd', true, "how long the end of a VM takes"},
	{"fail", 's', true,
	 "how provisioning fails: credentials, capacity, quota, throttled, transient, permanent or "
	 "lost"},
	{"fail_times", 'i', true, "how often it fails before it succeeds; always when not set"},
	{"pause_delay", 'd', true, "how long a pause takes"},
	{"resume_delay", 'd', true, "how long it takes to go on after a pause"},
	{"pause_fail", 's', true, "how a pause fails: as in fail; fail_times counts for each"},
	{"resume_fail", 's', true, "how a resume fails"},
	{"runtime", 'b', true, "whether the VM is to run agentvm-runtime"},
	{NULL, 0, false, NULL}};

static const ProviderOption noop_secrets[] = {{NULL, 0, false, NULL}};

/* What the option "fail" can simulate; "lost" comes about in another way. */
static const struct
{
	const char *name;
	ErrorClass class;
	const char *code;
} failures[] = {
	{"credentials", CLASS_CREDENTIALS, "SimulatedCredentials"},
	{"capacity", CLASS_CAPACITY, "SimulatedCapacity"},
	{"quota", CLASS_QUOTA, "SimulatedQuota"},
	{"throttled", CLASS_THROTTLED, "SimulatedThrottled"},
	{"transient", CLASS_TRANSIENT, "SimulatedTransient"},
	{"permanent", CLASS_PERMANENT, "SimulatedPermanent"},
	{FAIL_LOST, CLASS_NOT_FOUND, "SimulatedLost"},
};

static int64
epoch_ms(TimestampTz at)
{
	return at / 1000 + EPOCH_SHIFT_MS;
}

/* Index into failures, or -1. */
static int
find_failure(const char *name)
{
	int i;

	for (i = 0; i < lengthof(failures); i++)
	{
		if (strcmp(failures[i].name, name) == 0)
			return i;
	}
	return -1;
}

static void
noop_validate(OptionScope scope, Jsonb *options)
{
	static const char *const fails[] = {"fail", "pause_fail", "resume_fail"};

	for (int i = 0; i < lengthof(fails); i++)
	{
		char *fail = option_text(options, fails[i]);

		if (fail != NULL && find_failure(fail) < 0)
			ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
					errmsg("invalid value for option \"%s\" of provider \"noop\"", fails[i]),
					errhint("Valid values: credentials, capacity, quota, throttled, transient, "
							"permanent, lost."),
					hide_caller());
	}
	if (option_int(options, "fail_times", 1) < 1)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("option \"fail_times\" of provider \"noop\" must be at least 1"),
				hide_caller());
}

/* Wait until a time has come; a very long delay is waited for in parts. */
static void
wait_until(int64 due, int64 now, ProviderStep *step)
{
	step->kind = STEP_WAIT;
	step->wait_ms = (int) Min(Max(due - now, 0), INT_MAX);
}

static void
fail_as(int failure, const char *option, ProviderStep *step)
{
	step->kind = STEP_FAILED;
	step->error_class = failures[failure].class;
	step->error_code = failures[failure].code;
	step->error_message = psprintf("simulated by option %s", option);
}

/*
 * Begin a launch: fail as asked for, or note when the VM will run.  Returns
 * whether the launch goes on in this step already.  A launch with a runtime
 * never does, so that the attempt and its bootstrap token are committed before
 * the VM could use it, as with a real provider.
 */
static bool
begin_launch(const ProviderContext *context, int failure, bool lost, int64 now, ProviderStep *step)
{
	int64 due = now + option_ms(context->options, "launch_delay", 0);
	int64 failed = handle_int(context->handle, "failures", 0);
	int fail_times = option_int(context->options, "fail_times", 0);

	if (failure >= 0 && !lost && (fail_times == 0 || failed < fail_times))
	{
		fail_as(failure, "fail", step);
		step->handle = handle_set_int(context->handle, "failures", failed + 1);
		return false;
	}

	step->handle = handle_set_int(context->handle, "launch_due", due);
	if (context->session->runtime)
		step->attempt = 1;
	if (lost)
		step->vm_id = psprintf("noop-%s", context->session->session_id);
	if (due <= now && !lost && !context->session->runtime)
		return true;

	wait_until(due, now, step);
	return false;
}

static void
noop_provision(const ProviderContext *context, ProviderStep *step)
{
	int64 now = epoch_ms(context->now);
	int64 due = handle_int(context->handle, "launch_due", -1);
	char *fail = option_text(context->options, "fail");
	int failure = fail != NULL ? find_failure(fail) : -1;
	bool lost = fail != NULL && strcmp(fail, FAIL_LOST) == 0;

	step->operation = "launch";

	/* Nothing is under way that could outlive this, so there is no reply to take in. */
	if (context->ending)
	{
		step->kind = STEP_DONE;
		return;
	}

	if (due < 0)
	{
		if (!begin_launch(context, failure, lost, now, step))
			return;
	}
	else if (due > now)
	{
		wait_until(due, now, step);
		return;
	}
	else if (lost)
	{
		fail_as(failure, "fail", step);
		return;
	}

	step->kind = STEP_DONE;
	step->running = true;
	step->vm_id = psprintf("noop-%s", context->session->session_id);
}

static void
noop_terminate(const ProviderContext *context, ProviderStep *step)
{
	int64 now = epoch_ms(context->now);
	int64 due = handle_int(context->handle, "terminate_due", -1);

	step->operation = "terminate";
	step->kind = STEP_DONE;
	if (context->session->vm_id == NULL)
		return;

	if (due < 0)
	{
		due = now + option_ms(context->options, "terminate_delay", 0);
		step->handle = handle_set_int(context->handle, "terminate_due", due);
	}
	if (due > now)
		wait_until(due, now, step);
}

/* All of these can be paused. */
static void
noop_check_pause(const ProviderSession *session, Jsonb *options)
{
}

static void
noop_power(const ProviderContext *context, ProviderStep *step)
{
	bool pauses = context->op == OP_PAUSE;
	const char *option = pauses ? "pause_fail" : "resume_fail";
	char *fail = option_text(context->options, option);
	int fail_times = option_int(context->options, "fail_times", 0);
	int64 failed = handle_int(context->handle, "power_failures", 0);
	int64 now = epoch_ms(context->now);
	int64 due = handle_int(context->handle, "power_due", -1);
	Jsonb *handle = context->handle;

	step->operation = pauses ? "pause" : "resume";
	if (due < 0 && fail != NULL && (fail_times == 0 || failed < fail_times))
	{
		fail_as(find_failure(fail), option, step);
		step->handle = handle_set_int(handle, "power_failures", failed + 1);
		return;
	}
	if (due < 0)
	{
		due = now + option_ms(context->options, pauses ? "pause_delay" : "resume_delay", 0);
		handle = handle_set_int(handle, "power_due", due);
		handle = handle_set_text(handle, "power_failures", NULL);
	}
	if (due > now)
		wait_until(due, now, step);
	else
	{
		step->kind = STEP_DONE;
		handle = handle_set_text(handle, "power_due", NULL);
		handle = pauses ? handle_set_bool(handle, "paused", true)
						: handle_set_text(handle, "paused", NULL);
	}
	step->handle = handle;
}

static void
noop_inspect(const ProviderContext *context, ProviderStep *step)
{
	int64 now = epoch_ms(context->now);
	int64 launch_due = handle_int(context->handle, "launch_due", -1);
	int64 terminate_due = handle_int(context->handle, "terminate_due", -1);
	char *fail = option_text(context->options, "fail");
	const char *vm_id = context->session->vm_id;
	const char *state;

	if (vm_id == NULL)
		state = launch_due >= 0 ? "pending" : "not_found";
	else if (terminate_due >= 0)
		state = terminate_due > now ? "shutting-down" : "not_found";
	else if (launch_due > now)
		state = "pending";
	else if (fail != NULL && strcmp(fail, FAIL_LOST) == 0)
		state = "not_found";
	else if (option_bool(context->handle, "paused", false))
		state = "paused";
	else
		state = "running";

	step->operation = "inspect";
	step->kind = STEP_DONE;
	step->result = handle_set_text(NULL, "state", state);
	step->result = handle_set_text(step->result, "vm_id", vm_id);
}

static void
noop_check(ProviderStep *step)
{
	Datum good = DirectFunctionCall1(jsonb_in, CStringGetDatum("{\"ok\": true}"));

	step->operation = "check";
	step->kind = STEP_DONE;
	step->result = DatumGetJsonbP(good);
}

static void
noop_step(const ProviderContext *context, ProviderStep *step)
{
	switch (context->op)
	{
		case OP_PROVISION:
			noop_provision(context, step);
			break;
		case OP_TERMINATE:
			noop_terminate(context, step);
			break;
		case OP_TIDY: /* it leaves nothing of a boot */
			step->kind = STEP_DONE;
			break;
		case OP_PAUSE:
		case OP_RESUME:
			noop_power(context, step);
			break;
		case OP_INSPECT:
			noop_inspect(context, step);
			break;
		case OP_CHECK:
			noop_check(step);
			break;
		case OP_LIST: /* there is nobody to ask but ourselves */
		case OP_REAP:
			break;
	}
}

const Provider noop_provider = {
	.abi = AVM_PROVIDER_ABI,
	.name = "noop",
	.options = noop_options,
	.secrets = noop_secrets,
	.runtime_default = false,
	.needs_secrets = false,
	.validate = noop_validate,
	.check_pause = noop_check_pause,
	.step = noop_step,
};
