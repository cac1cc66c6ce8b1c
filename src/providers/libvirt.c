/*-------------------------------------------------------------------------
 *
 * libvirt.c
 *		VMs on machines of ours, through libvirt.
 *
 * A library of its own, agentvm_libvirt.so, so that the core does not need
 * libvirt.  This file runs in PostgreSQL: it checks options and makes steps.  The
 * calls that it asks for are made on threads of a runner, in the other files.
 *
 * One session is one transient domain.  Its uuid is the session's id, so libvirt
 * makes no second one, and a launch whose answer was lost is repeated as it is:
 * it finds the domain, or makes it.  All that the VM has on its host lies in the
 * host's directory: SESSION.disk (what the guest has written over the image),
 * SESSION.boot (a disk with the boot script, and so the bootstrap token, which is
 * nowhere else), SESSION.sock (the gateway's end of the virtio port).
 *
 * "sent_at" in the handle says: a launch was sent and not answered.  While it
 * stands, a termination that finds nothing is repeated.  But it need not wait for
 * agentvm.launch_settle, since nothing of a launch can come after: a thread begins
 * no call after its time is up, that is within the lease, and a domain cannot be
 * made without its boot disk, which a termination removes first.
 *
 * "host_used" is the number of the first launch that may have left something on
 * the host: one that was answered by a refusal before it began has not.
 *
 * Whether guests run under KVM on a host is found out before the first launch
 * there that may use it, by booting the launch's kernel as a probe.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "nodes/value.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/varlena.h"

#include "db.h"
#include "providers/boot.h"
#include "providers/libvirt.h"
#include "providers/provider.h"
#include "secret/secret.h"

PG_MODULE_MAGIC;

extern PGDLLEXPORT void _PG_init(void);

#define MAX_PATH_LEN 512
#define MAX_CMDLINE 1024
#define MAX_VCPUS 288 /* of a q35 machine */

#define AGAIN_MS 2000 /* between looks for what may still come */
#define CALL_MS 60000 /* the engine allows less */
#define MAX_IMAGES 50 /* that one check looks at */

static const ProviderOption libvirt_options[] = {
	{"kernel", 's', false, "path of the kernel on the host"},
	{"initrd", 's', false, "path of the initial RAM disk on the host"},
	{"disk", 's', false, "path of a qcow2 or raw image on the host, booted as a private copy"},
	{"cmdline", 's', false, "more for the kernel's command line"},
	{"machine", 's', false, "auto, q35 or microvm"},
	{"network", 's', false, "libvirt network to plug a network card into; default: none at all"},
	{NULL, 0, false, NULL}};

static const ProviderOption libvirt_secrets[] = {{NULL, 0, false, NULL}};

/* One step of one operation. */
typedef struct Step
{
	const ProviderContext *context;
	const ProviderSession *session;
	ProviderStep *out;
	Jsonb *answer;		/* the reply's body, NULL: none */
	const char *reaped; /* the session whose VM is ended without one */
	bool untouched;		/* the call was refused before it had made anything */
	int64 now;			/* epoch ms */
} Step;

/* ---- checking options ---- */

static void
bad_option(const char *name, const char *hint)
{
	ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("invalid value for option \"%s\" of provider \"libvirt\"", name),
			errhint("%s", hint), hide_caller());
}

/* Whether a path is in a directory of images: a guest reads all that it boots. */
static bool
is_image(const char *path)
{
	List *directories;
	ListCell *cell;

	if (strstr(path, "/../") != NULL)
		return false;
	if (!SplitDirectoriesString(pstrdup(avm_image_directories), ',', &directories))
		return false;
	foreach (cell, directories)
	{
		if (path_is_prefix_of_path(lfirst(cell), path))
			return true;
	}
	return false;
}

static void
check_path(Jsonb *options, const char *name)
{
	char *path = option_text(options, name);

	if (path != NULL &&
		(path[0] != '/' || path[strlen(path) - 1] == '/' || !boot_is_printable(path, MAX_PATH_LEN)))
		bad_option(name, "Give the absolute path of a file on the hosts, in printable ASCII.");
	if (path != NULL && !is_image(path))
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("option \"%s\" of provider \"libvirt\" is not in agentvm.image_directories",
					   name),
				errhint("Give a path without \"..\", beneath one of: %s.", avm_image_directories),
				hide_caller());
}

static void
needs(Jsonb *options, const char *name, const char *other)
{
	if (option_text(options, name) != NULL && option_text(options, other) == NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("option \"%s\" of provider \"libvirt\" needs option \"%s\"", name, other),
				hide_caller());
}

static void
libvirt_validate(OptionScope scope, Jsonb *options)
{
	char *value;

	check_path(options, "kernel");
	check_path(options, "initrd");
	check_path(options, "disk");
	if ((value = option_text(options, "cmdline")) != NULL && !boot_is_printable(value, MAX_CMDLINE))
		bad_option("cmdline", "Give parameters of the kernel, in printable ASCII.");
	if ((value = option_text(options, "machine")) != NULL && strcmp(value, "auto") != 0 &&
		strcmp(value, "q35") != 0 && strcmp(value, "microvm") != 0)
		bad_option("machine", "Valid values: auto, q35, microvm.");
	if ((value = option_text(options, "network")) != NULL &&
		(!boot_is_printable(value, 64) || strpbrk(value, " /") != NULL))
		bad_option("network", "Give the name of a network that libvirt has on the hosts.");

	if (scope != OPTIONS_LAUNCH)
		return;
	if (option_text(options, "kernel") == NULL && option_text(options, "disk") == NULL)
		ereport(
			ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("neither option \"kernel\" nor option \"disk\" of provider \"libvirt\" is set"),
			errhint("Set one with agentvm.set_provider() or in the profile."), hide_caller());
	needs(options, "initrd", "kernel");
	needs(options, "cmdline", "kernel");
}

static void
libvirt_check_launch(Jsonb *options, bool runtime)
{
	if (runtime)
		(void) boot_script_size(LV_GATEWAY_PORT);
}

/* ---- ends of a step ---- */

static void
fail(Step *step, ErrorClass class, const char *code, const char *message)
{
	step->out->kind = STEP_FAILED;
	step->out->error_class = class;
	step->out->error_code = code;
	step->out->error_message = message;
}

/*
 * Whether the call has done what it was to do; if not, the step has failed, and
 * *settled says whether that is all there will be of it.
 */
static bool
succeeded(Step *step, bool *settled)
{
	const HttpReply *reply = step->context->reply;
	JsonbValue *error;
	Jsonb *details;
	char *body;
	int class;

	*settled = reply->status != 0 || !reply->maybe_sent;
	if (reply->status == 0)
	{
		step->untouched = *settled;
		fail(step, CLASS_TRANSIENT, "NoReply", reply->error);
		return false;
	}
	body = pg_any_to_server(reply->body, reply->body_len, PG_UTF8);
	step->answer = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(body)));
	if (reply->status == LV_DONE)
		return true;
	error = option_value(step->answer, "error");
	if (error == NULL)
	{
		fail(step, CLASS_PERMANENT, "MalformedReply", NULL);
		return false;
	}
	details = JsonbValueToJsonb(error);
	step->untouched = !option_bool(details, "began", true);
	class = option_int(details, "class", CLASS_PERMANENT);
	if (class <= CLASS_NONE || class >= NUM_ERROR_CLASSES)
		class = CLASS_PERMANENT;
	fail(step, class, option_text(details, "code"), option_text(details, "message"));
	return false;
}

/* ---- requests ---- */

static Jsonb *
copy_options(Jsonb *request, Jsonb *options)
{
	static const char *const names[] = {"kernel",  "initrd",  "disk",
										"cmdline", "machine", "network"};

	for (int i = 0; i < lengthof(names); i++)
	{
		char *value = option_text(options, names[i]);

		if (value != NULL)
			request = handle_set_text(request, names[i], value);
	}
	return request;
}

/* Images of a set of options, as objects of a list, each path once; false when there are too many. */
static bool
list_images(StringInfo list, List **paths, const char *profile, Jsonb *options)
{
	static const char *const names[] = {"kernel", "initrd", "disk"};

	for (int i = 0; i < lengthof(names); i++)
	{
		char *path = option_text(options, names[i]);

		if (path == NULL || list_member(*paths, makeString(path)))
			continue;
		if (list_length(*paths) >= MAX_IMAGES)
			return false;
		*paths = lappend(*paths, makeString(path));
		appendStringInfo(list, "%s{\"what\": \"%s\", \"path\": ", list->len > 1 ? ", " : "",
						 names[i]);
		escape_json(list, path);
		if (profile != NULL)
		{
			appendStringInfoString(list, ", \"profile\": ");
			escape_json(list, profile);
		}
		appendStringInfoChar(list, '}');
	}
	return true;
}

/* What a check looks at: images of the team's options, then of the profiles that it may use. */
static Jsonb *
add_images(Jsonb *request, const ProviderContext *context)
{
	StringInfoData list;
	List *paths = NIL;
	ListCell *lc;
	bool all;

	initStringInfo(&list);
	appendStringInfoChar(&list, '[');
	all = list_images(&list, &paths, NULL, context->options);
	foreach (lc, context->profiles)
	{
		ProviderProfile *profile = lfirst(lc);

		if (all)
			all = list_images(&list, &paths, profile->name, profile->options);
	}
	appendStringInfoChar(&list, ']');
	request = handle_set_document(
		request, "images",
		DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(list.data))));
	return handle_set_int(request, "images_left_out", !all);
}

/* Whether the VM is to run under KVM: 1, 0, or -1 if the host has to be probed first. */
static int
wants_kvm(Step *step)
{
	const ProviderHost *host = step->context->host;

	if (strcmp(host->accel, "auto") != 0)
		return strcmp(host->accel, "kvm") == 0;
	/* only an image of ours knows how to be a probe */
	if (host->kvm < 0 && option_text(step->context->options, "kernel") == NULL)
		return 0;
	return host->kvm;
}

/*
 * Ask for a call.  "script" (with its length) is the boot script of a launch, and
 * is wiped here.
 */
static void
send(Step *step, const char *operation, bool mutates, char *script, int script_len)
{
	const ProviderHost *host = step->context->host;
	const ProviderSession *session = step->session;
	HttpRequest *request = palloc0(sizeof(HttpRequest));
	size_t directory_len = strlen(host->directory);
	Jsonb *ask;
	char *text;
	char *utf8;
	StringInfoData body;

	while (directory_len > 1 && host->directory[directory_len - 1] == '/')
		directory_len--;
	ask = handle_set_text(NULL, "directory", pnstrdup(host->directory, directory_len));
	ask = handle_set_text(ask, "accel", host->accel);
	ask = handle_set_text(ask, "cluster",
						  session != NULL ? session->cluster : step->context->cluster);
	ask = copy_options(ask, step->context->options);
	if (step->context->op == OP_CHECK)
		ask = add_images(ask, step->context);
	if (step->reaped != NULL)
		ask = handle_set_text(ask, "session", step->reaped);
	if (session != NULL)
	{
		ask = handle_set_text(ask, "session", session->session_id);
		ask = handle_set_text(ask, "team", session->team_id);
		ask = handle_set_int(ask, "vcpus", session->vcpus);
		ask = handle_set_int(ask, "memory_mib", session->memory_mib);
		ask = handle_set_int(ask, "disk_gib", session->disk_gib);
		ask = handle_set_int(ask, "runtime", session->runtime);
		ask = handle_set_int(ask, "kvm", wants_kvm(step) == 1);
	}

	text = JsonbToCString(NULL, &ask->root, VARSIZE(ask));
	utf8 = pg_server_to_any(text, strlen(text), PG_UTF8);
	initStringInfo(&body);
	enlargeStringInfo(&body, strlen(utf8) + script_len + 2);
	appendStringInfoString(&body, utf8);
	if (script != NULL)
	{
		appendStringInfoChar(&body, '\n');
		appendBinaryStringInfo(&body, script, script_len);
		secret_wipe(script, script_len);
		secret_wipe_later(body.data, body.len);
	}

	request->method = operation;
	request->url = host->uri;
	request->body = body.data;
	request->body_len = body.len;
	request->timeout_ms = CALL_MS;
	step->out->kind = STEP_REQUEST;
	step->out->operation = operation;
	step->out->mutates = mutates;
	step->out->request = request;
}

/* ---- launch ---- */

static Jsonb *
set_int(Jsonb *handle, const char *name, int64 value)
{
	return value != 0 ? handle_set_int(handle, name, value) : handle_set_text(handle, name, NULL);
}

/* What the boot script is made of, out of the handle. */
static void
read_plan(Jsonb *handle, BootPlan *plan)
{
	plan->hard_stop = handle_int(handle, "hard_stop", 0);
	plan->longest = handle_int(handle, "longest", 0);
	plan->key = option_text(handle, "key");
	plan->env = option_text(handle, "env");
	plan->ca = option_text(handle, "ca");
}

static Jsonb *
write_plan(Jsonb *handle, const BootPlan *plan)
{
	handle = set_int(handle, "hard_stop", plan->hard_stop);
	handle = set_int(handle, "longest", plan->longest);
	handle = handle_set_text(handle, "key", plan->key);
	handle = handle_set_text(handle, "env", plan->env);
	return handle_set_text(handle, "ca", plan->ca);
}

/* What no host could make true, and the engine cannot know. */
static bool
fits(Step *step)
{
	const ProviderSession *session = step->session;
	const char *message = NULL;

	if (strlen(step->context->host->directory) > LV_MAX_DIRECTORY)
		message = "the host's directory is longer than " CppAsString2(
			LV_MAX_DIRECTORY) " bytes, too long for the path of a socket";
	else if (session->vcpus > MAX_VCPUS)
		message = "a VM has at most " CppAsString2(MAX_VCPUS) " vCPUs";
	else if (session->disk_gib > 0 && option_text(step->context->options, "disk") == NULL)
		message = "disk_gib needs option disk: there is no disk to make larger";
	if (message != NULL)
		fail(step, CLASS_PERMANENT, "BadShape", message);
	return message == NULL;
}

/* Send the launch, for the first time or once more; all of it is in the handle by then. */
static void
send_launch(Step *step)
{
	Jsonb *handle = step->context->handle;
	BootPlan plan;
	char *script;
	int len;

	if (handle_int(handle, "launches", 0) == 0)
	{
		libvirt_validate(OPTIONS_LAUNCH, step->context->options);
		boot_plan(&plan, step->session, step->now, LV_GATEWAY_PORT);
		handle = write_plan(handle, &plan);
		step->out->attempt = 1; /* its token is committed with this step */
	}
	handle = handle_set_int(handle, "launches", handle_int(handle, "launches", 0) + 1);
	if (handle_int(handle, AVM_HOST_USED, 0) == 0)
		handle = handle_set_int(handle, AVM_HOST_USED, handle_int(handle, "launches", 0));
	handle = handle_set_int(handle, "sent_at", step->now);
	handle = handle_set_text(handle, "phase", LV_LAUNCH);
	read_plan(handle, &plan);
	script = boot_script(&plan, step->session->session_id, 1, &len);
	send(step, LV_LAUNCH, true, script, len);
	step->out->handle = handle;
}

static void
take_probe(Step *step)
{
	bool settled;

	step->out->operation = LV_PROBE;
	if (!succeeded(step, &settled))
		return;
	step->out->host_kvm = option_bool(step->answer, "kvm", false) ? 1 : -1;
	if (step->context->ending)
		step->out->kind = STEP_DONE;
	else
	{
		/* the launch is asked for by the next step, which sees what has been learned */
		step->out->kind = STEP_WAIT;
		step->out->handle = handle_set_text(step->context->handle, "phase", NULL);
	}
}

static void
take_launch(Step *step)
{
	Jsonb *handle = step->context->handle;
	bool settled;

	step->out->operation = LV_LAUNCH;
	if (succeeded(step, &settled))
	{
		step->out->kind = STEP_DONE;
		step->out->running = true;
		step->out->vm_id = psprintf(LV_NAME "%s", step->session->session_id);
		step->out->handle = handle_set_text(handle, "sent_at", NULL);
		return;
	}
	if (step->out->error_code != NULL && strcmp(step->out->error_code, LV_NO_KVM) == 0)
		step->out->host_kvm = -1; /* with accel auto, the next try does without */
	/* a refusal says nothing of an earlier launch that was not answered */
	if (step->untouched &&
		handle_int(handle, AVM_HOST_USED, 0) == handle_int(handle, "launches", 0))
		handle = handle_set_text(handle, AVM_HOST_USED, NULL);
	if (settled && handle_int(handle, "unanswered", 0) == 0)
		step->out->handle = handle_set_text(handle, "sent_at", NULL);
	else if (!settled)
		step->out->handle = handle_set_int(handle, "unanswered", 1);
}

static void
libvirt_provision(Step *step)
{
	char *phase = option_text(step->context->handle, "phase");
	bool probing = phase != NULL && strcmp(phase, LV_PROBE) == 0;

	step->out->operation = LV_LAUNCH;
	if (step->context->reply != NULL)
	{
		if (probing)
			take_probe(step);
		else
			take_launch(step);
	}
	else if (step->context->ending)
		fail(step, CLASS_TRANSIENT, "SessionEnding", "the session is to end");
	else if (step->context->host == NULL)
		fail(step, CLASS_TRANSIENT, "NoHost", "the session has no host");
	else if (!fits(step))
		;
	else if (wants_kvm(step) < 0)
	{
		send(step, LV_PROBE, false, NULL, 0);
		step->out->handle = handle_set_text(step->context->handle, "phase", LV_PROBE);
	}
	else
		send_launch(step);
}

/* ---- the other operations ---- */

static void
libvirt_terminate(Step *step)
{
	Jsonb *handle = step->context->handle;
	int64 sent_at = handle_int(handle, "sent_at", 0);
	bool settled;

	step->out->operation = LV_TERMINATE;
	if (handle_int(handle, "launches", 0) == 0)
		step->out->kind = STEP_DONE; /* nothing was ever sent */
	else if (step->context->host == NULL)
		fail(step, CLASS_TRANSIENT, "NoHost", "the session has no host");
	else if (step->context->reply == NULL)
	{
		send(step, LV_TERMINATE, true, NULL, 0);
		step->out->handle =
			handle_set_int(handle, "terminations", handle_int(handle, "terminations", 0) + 1);
	}
	else if (!succeeded(step, &settled))
		;
	else if (sent_at != 0 && step->now < sent_at + avm_lease_ms)
	{
		step->out->kind = STEP_WAIT;
		step->out->wait_ms = (int) Min(AGAIN_MS, sent_at + avm_lease_ms - step->now);
	}
	else
	{
		step->out->kind = STEP_DONE;
		/* an earlier call may have ended it, and its answer been lost */
		step->out->was_gone = handle_int(handle, "terminations", 0) == 1 &&
							  handle_int(step->answer, "was_gone", 0) != 0;
	}
}

/* Any of them can be halted. */
static void
libvirt_check_pause(const ProviderSession *session, Jsonb *options)
{
}

static void
libvirt_power(Step *step)
{
	const char *operation = step->context->op == OP_PAUSE ? LV_PAUSE : LV_RESUME;
	Jsonb *handle = step->context->handle;
	int64 sent = handle_int(handle, AVM_POWER_SENT, 0);
	bool settled;

	step->out->operation = operation;
	if (step->context->host == NULL)
		fail(step, CLASS_TRANSIENT, "NoHost", "the session has no host");
	else if (step->context->reply == NULL)
	{
		send(step, operation, true, NULL, 0);
		step->out->handle = handle_set_int(handle, AVM_POWER_SENT, sent + 1);
	}
	else
	{
		if (succeeded(step, &settled))
			step->out->kind = STEP_DONE;
		/* a refusal comes from a look at the domain, but for one that says that a call hangs */
		if (step->out->kind == STEP_DONE || step->out->error_class != CLASS_TRANSIENT ||
			(settled && sent <= 1))
			step->out->handle = handle_set_text(handle, AVM_POWER_SENT, NULL);
	}
}

/* A question, whose answer is the result. */
static void
ask(Step *step, const char *operation)
{
	bool settled;

	step->out->operation = operation;
	if (step->context->host == NULL)
	{
		step->out->kind = STEP_DONE;
		step->out->result = handle_set_text(NULL, "state", "not_found");
	}
	else if (step->context->reply == NULL)
		send(step, operation, false, NULL, 0);
	else if (succeeded(step, &settled))
	{
		step->out->kind = STEP_DONE;
		step->out->result = step->answer;
		if (step->session != NULL)
			step->out->result =
				handle_set_text(step->out->result, "host", step->context->host->name);
	}
}

/* The list has the domains that carry our metadata, however it is asked for. */
static void
list(Step *step)
{
	ask(step, LV_LIST);
	if (step->out->kind == STEP_DONE)
	{
		JsonbValue *vms = option_value(step->out->result, "vms");

		step->out->result = vms != NULL ? JsonbValueToJsonb(vms) : NULL;
	}
}

/* End them one by one, as a session of theirs would. */
static void
reap(Step *step)
{
	List *vms = step->context->vm_ids;
	int done = (int) handle_int(step->context->handle, "done", 0);
	const char *vm_id = list_nth(vms, done);
	bool settled;

	step->out->operation = LV_TERMINATE;
	if (step->context->reply != NULL)
	{
		if (succeeded(step, &settled))
		{
			Jsonb *vm = handle_set_text(NULL, "vm_id", vm_id);

			vm = handle_set_text(vm, "state", "terminated");
			step->out->result = DatumGetJsonbP(DirectFunctionCall2(
				jsonb_concat, DirectFunctionCall1(jsonb_in, CStringGetDatum("[]")),
				JsonbPGetDatum(vm)));
		}
		step->out->kind = STEP_DONE;
		if (++done >= list_length(vms))
			return;
		vm_id = list_nth(vms, done);
	}
	step->reaped = vm_id + Min(strlen(vm_id), strlen(LV_NAME));
	send(step, LV_TERMINATE, true, NULL, 0);
	step->out->handle = handle_set_int(NULL, "done", done);
}

static void
libvirt_step(const ProviderContext *context, ProviderStep *out)
{
	Step step = {0};

	step.context = context;
	step.session = context->session;
	step.out = out;
	step.now = boot_epoch_ms(context->now);
	switch (context->op)
	{
		case OP_PROVISION:
			libvirt_provision(&step);
			break;
		case OP_TERMINATE:
			libvirt_terminate(&step);
			break;
		case OP_TIDY: /* it leaves nothing of a boot */
			out->kind = STEP_DONE;
			break;
		case OP_INSPECT:
			ask(&step, LV_INSPECT);
			break;
		case OP_CHECK:
			ask(&step, LV_CHECK);
			break;
		case OP_PAUSE:
		case OP_RESUME:
			libvirt_power(&step);
			break;
		case OP_LIST:
			list(&step);
			break;
		case OP_REAP:
			reap(&step);
			break;
	}
}

static const Provider libvirt_provider = {
	.abi = AVM_PROVIDER_ABI,
	.name = "libvirt",
	.options = libvirt_options,
	.secrets = libvirt_secrets,
	.runtime_default = true,
	.placed = true,
	.lists = true,
	.perform = lv_perform,
	.validate = libvirt_validate,
	.check_launch = libvirt_check_launch,
	.check_pause = libvirt_check_pause,
	.step = libvirt_step,
};

void
_PG_init(void)
{
	agentvm_register_provider(&libvirt_provider);
}
