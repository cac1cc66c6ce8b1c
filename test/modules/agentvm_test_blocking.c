/*-------------------------------------------------------------------------
 *
 * agentvm_test_blocking.c
 *		Two providers whose calls block, for tests: "blocking", and "placed", whose
 *		VMs are on hosts.
 *
 * A VM is a file <directory>/<session>.vm.  The directory is the host's, or an
 * option.  A call that hangs does so until the file <directory>/go is there.  As
 * with many a library, exit() waits for the calls that are under way.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fmgr.h"
#include "providers/provider.h"

PG_MODULE_MAGIC;

extern void _PG_init(void);

static const ProviderOption blocking_options[] = {
	{"directory", 's', true, "where the VMs are, without a host"},
	{"sleep_ms", 'i', true, "how long each call takes"},
	{"hang", 's', true, "the call that hangs: create, destroy, inspect or check"},
	{"fail", 's', true, "how create fails: capacity, permanent, silent, large, or away until go"},
	{"kvm", 'i', true, "what create learns of the host: 1 or -1"},
	{"timeout_ms", 'i', true, "of each call"},
	{NULL}};

static const ProviderOption no_secrets[] = {{NULL}};

static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;
static int under_way = 0;

static int
count_calls(int change)
{
	int count;

	pthread_mutex_lock(&counting);
	count = under_way += change;
	pthread_mutex_unlock(&counting);
	return count;
}

static void
wait_for_calls(void)
{
	while (count_calls(0) > 0)
		usleep(20000);
}

/* ---- on a thread ---- */

static bool
signals_are_blocked(void)
{
	static const int expected[] = {SIGTERM, SIGINT,	 SIGHUP, SIGUSR1,
								   SIGUSR2, SIGALRM, SIGURG, SIGCHLD};
	sigset_t blocked;
	int i;

	pthread_sigmask(SIG_SETMASK, NULL, &blocked);
	for (i = 0; i < lengthof(expected); i++)
	{
		if (!sigismember(&blocked, expected[i]))
			return false;
	}
	return true;
}

static void
say(BlockingReply *reply, int status, const char *text)
{
	reply->status = status;
	reply->body = strdup(text);
	reply->body_len = strlen(text);
}

/* The body: "<sleep in ms> <hang> <fail>". */
static void
make_call(const BlockingCall *call, BlockingReply *reply)
{
	char file[MAXPGPATH];
	char go[MAXPGPATH];
	char hang[16] = "";
	char fail[16] = "";
	char *slash;
	int sleep_ms = 0;

	if (!signals_are_blocked())
	{
		reply->error = strdup("a thread has signals that are not blocked");
		return;
	}
	if (sscanf(call->body, "%d %15s %15s", &sleep_ms, hang, fail) != 3)
	{
		reply->error = strdup("not the body that the step has made");
		return;
	}
	snprintf(file, sizeof(file), "%s.vm", call->target);
	snprintf(go, sizeof(go), "%s", call->target);
	slash = strrchr(go, '/');
	if (slash != NULL)
		snprintf(slash, sizeof(go) - (slash - go), "/go");
	if (sleep_ms > 0)
		usleep((useconds_t) sleep_ms * 1000);
	while (strcmp(hang, call->operation) == 0 && access(go, F_OK) != 0)
		usleep(20000);

	if (strcmp(call->operation, "create") == 0)
	{
		FILE *vm;

		if (strcmp(fail, "silent") == 0)
		{
			reply->maybe_done = true;
			reply->error = strdup("the line went dead");
			return;
		}
		if (strcmp(fail, "large") == 0)
		{
			reply->status = 200;
			reply->body_len = HTTP_MAX_REPLY + 1;
			reply->body = calloc(1, reply->body_len);
			return;
		}
		if (strcmp(fail, "away") == 0 && access(go, F_OK) != 0)
		{
			reply->error = strdup("nobody is there");
			return;
		}
		if (strcmp(fail, "none") != 0 && strcmp(fail, "away") != 0)
		{
			say(reply, strcmp(fail, "capacity") == 0 ? 503 : 400, "no");
			return;
		}
		vm = fopen(file, "a");
		if (vm == NULL || fputs("made\n", vm) < 0 || fclose(vm) != 0)
			say(reply, 400, "no such directory");
		else
			say(reply, 200, "made");
	}
	else if (strcmp(call->operation, "destroy") == 0)
		say(reply, unlink(file) == 0 ? 200 : 404, "gone");
	else if (strcmp(call->operation, "inspect") == 0)
		say(reply, 200, access(file, F_OK) == 0 ? "running" : "gone");
	else if (slash != NULL && (*slash = '\0', access(go, F_OK)) != 0 && strcmp(go, "/nowhere") != 0)
		say(reply, 400, "no such directory");
	else
		say(reply, 200, "fine");
}

static void
blocking_perform(const BlockingCall *call, BlockingReply *reply)
{
	count_calls(1);
	make_call(call, reply);
	count_calls(-1);
}

/* ---- steps ---- */

static void
ask(const ProviderContext *context, ProviderStep *step, const char *operation)
{
	const char *directory =
		context->host ? context->host->directory : option_text(context->options, "directory");
	const char *hang = option_text(context->options, "hang");
	const char *fail = option_text(context->options, "fail");
	HttpRequest *request = palloc0(sizeof(HttpRequest));

	request->method = operation;
	request->url = psprintf("%s/%s", directory ? directory : "/nowhere",
							context->session ? context->session->session_id : "check");
	request->body = psprintf("%d %s %s", option_int(context->options, "sleep_ms", 0),
							 hang ? hang : "none", fail ? fail : "none");
	request->body_len = strlen(request->body);
	request->timeout_ms = option_int(context->options, "timeout_ms", 0);
	step->kind = STEP_REQUEST;
	step->request = request;
	step->operation = operation;
	step->mutates = context->op == OP_PROVISION || context->op == OP_TERMINATE;
}

static void
refuse(const ProviderContext *context, ProviderStep *step)
{
	const HttpReply *reply = context->reply;

	step->kind = STEP_FAILED;
	step->error_class = reply->status == 0	   ? CLASS_TRANSIENT
						: reply->status == 503 ? CLASS_CAPACITY
											   : CLASS_PERMANENT;
	step->error_code =
		reply->status == 0 ? (reply->maybe_sent ? "NoAnswer" : "NotSent") : "Refused";
	step->error_message = reply->status == 0 ? reply->error : reply->body;
	if (reply->status == 0 && !reply->maybe_sent)
		step->handle = handle_set_text(context->handle, AVM_HOST_USED, NULL);
}

static void
blocking_step(const ProviderContext *context, ProviderStep *step)
{
	static const char *const operations[] = {"create", "destroy", "inspect", "check"};
	const HttpReply *reply = context->reply;
	bool good = reply != NULL && (reply->status == 200 || reply->status == 404);

	step->operation = operations[context->op];
	if (context->op == OP_TERMINATE && context->handle == NULL)
	{
		step->kind = STEP_DONE;
		return;
	}
	if (reply == NULL && !context->ending)
	{
		ask(context, step, operations[context->op]);
		if (context->op == OP_PROVISION)
			step->handle = handle_set_text(context->handle, AVM_HOST_USED, "yes");
		return;
	}
	if (reply != NULL && !good)
	{
		refuse(context, step);
		return;
	}
	step->kind = STEP_DONE;
	switch (context->op)
	{
		case OP_PROVISION:
			if (reply == NULL)
				return;
			step->running = true;
			step->vm_id = psprintf("vm-%s", context->session->session_id);
			step->host_kvm = option_int(context->options, "kvm", 0);
			break;
		case OP_TIDY:
		case OP_LIST:
		case OP_REAP:
		case OP_PAUSE:
		case OP_RESUME:
		case OP_TERMINATE:
			break;
		case OP_CHECK:
			step->host_kvm = option_int(context->options, "kvm", 0);
			/* FALLTHROUGH */
		case OP_INSPECT:
			step->result = handle_set_text(NULL, "says", reply->body);
			step->result =
				handle_set_text(step->result, "host", context->host ? context->host->name : NULL);
			break;
	}
}

static const Provider blocking_provider = {
	.abi = AVM_PROVIDER_ABI,
	.name = "blocking",
	.options = blocking_options,
	.secrets = no_secrets,
	.perform = blocking_perform,
	.step = blocking_step,
};

static const Provider placed_provider = {
	.abi = AVM_PROVIDER_ABI,
	.name = "placed",
	.options = blocking_options,
	.secrets = no_secrets,
	.placed = true,
	.perform = blocking_perform,
	.step = blocking_step,
};

void
_PG_init(void)
{
	atexit(wait_for_calls);
	agentvm_register_provider(&blocking_provider);
	agentvm_register_provider(&placed_provider);
}
