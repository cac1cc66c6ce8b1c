/*-------------------------------------------------------------------------
 *
 * ec2.c
 *		VMs as EC2 instances in a team's own AWS account.
 *
 * One session is one instance, launched with RunInstances.  Markets and subnets
 * are tried in order: spot in every subnet, then on-demand in every subnet,
 * moving on only when AWS says that there is no capacity (or that the account's
 * spot quota is used up).  Each try is a launch attempt with a client token of
 * its own, derived from session, attempt, market and subnet.
 *
 * EC2 launches at most one instance per token, as long as every repeat of a
 * request is the same to the byte.  So the handle keeps all that the request
 * was made of: the encoded form without user data, and what the user data is
 * made of, without the bootstrap token, which is derived again.  "sent_at" in
 * the handle says: sent, not answered.  It is committed before the request
 * leaves, and removed only by an answer that settles the matter.  While it
 * stands, a launch is repeated with the same token in the same subnet, and a
 * termination looks for the instance by its tag until none can appear any more.
 *
 * An answer settles the matter if it is a success, or a refusal of a request
 * that was sent but once.  A refused repeat says nothing about the first one
 * (keys may have been revoked in between), save for lack of capacity: a token
 * that had launched would have been answered with its instance.
 *
 * This file has what all operations share, and all operations but the launch,
 * which is in ec2_launch.c; boot.c makes the user data.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "datatype/timestamp.h"
#include "mb/pg_wchar.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"

#include "db.h"
#include "providers/aws_login.h"
#include "providers/ec2.h"

#define MAX_LIST 16			 /* subnets, security groups */
#define MAX_VOLUME_GIB 16384 /* of gp3 */

#define DROP_PHASE "parameter" /* Ec2Progress.phase when there is no VM any more */

#define LOOK_FIRST_MS 2000
#define LOOK_LAST_MS 30000
#define YOUNG_MS (5 * INT64CONST(60000)) /* a younger instance needs more looks to be called gone */
#define LOOKS_IF_YOUNG 6
#define LOOKS 3

static const ProviderOption ec2_options[] = {
	{"region", 's', false, "AWS region, such as us-east-1"},
	{"role_arn", 's', false, "IAM role to assume, in set_provider() only"},
	{"image_id", 's', false, "AMI to boot"},
	{"instance_type", 's', true, "instance type; default t3.large"},
	{"subnet_ids", 'l', false, "subnets to try in this order; default: the default VPC's"},
	{"security_group_ids", 'l', false, "security groups of the instance"},
	{"instance_profile", 's', false, "name or ARN of the instance's IAM instance profile"},
	{"secret_delivery", 's', false, "how the VM gets its bootstrap token: user_data or ssm"},
	{"spot", 'b', true, "whether to try the spot market first; default true"},
	{"spot_max_price", 's', false, "highest spot price in USD an hour; default: on-demand price"},
	{"volume_size_gib", 'i', false, "size of the root volume; default: disk_gib, else the AMI's"},
	{"volume_device", 's', false, "device name of the root volume; default /dev/sda1"},
	{"key_name", 's', false, "EC2 key pair for SSH"},
	{NULL, 0, false, NULL}};

static const ProviderOption ec2_secrets[] = {
	{"access_key_id", 's', false, "AWS access key id"},
	{"secret_access_key", 's', false, "AWS secret access key"},
	{"session_token", 's', false, "AWS session token, for temporary keys"},
	{NULL, 0, false, NULL}};

/* The members of Ec2Progress by name. */
typedef struct ProgressMember
{
	const char *name;
	size_t offset;
} ProgressMember;

static const ProgressMember integers[] = {
	{"attempt", offsetof(Ec2Progress, attempt)},
	{"launched", offsetof(Ec2Progress, launched)},
	{"wait", offsetof(Ec2Progress, wait)},
	{"looks", offsetof(Ec2Progress, looks)},
	{"look_at", offsetof(Ec2Progress, look_at)},
	{"subnet", offsetof(Ec2Progress, subnet)},
	{"sends", offsetof(Ec2Progress, sends)},
	{"sent_at", offsetof(Ec2Progress, sent_at)},
	{"hard_stop", offsetof(Ec2Progress, boot.hard_stop)},
	{"longest", offsetof(Ec2Progress, boot.longest)},
	{"put", offsetof(Ec2Progress, put)},
	{"puts", offsetof(Ec2Progress, puts)},
	{"put_at", offsetof(Ec2Progress, put_at)},
};

static const ProgressMember texts[] = {
	{"phase", offsetof(Ec2Progress, phase)},
	{"vm_id", offsetof(Ec2Progress, vm_id)},
	{"region", offsetof(Ec2Progress, region)},
	{"market", offsetof(Ec2Progress, market)},
	{"key", offsetof(Ec2Progress, boot.key)},
	{"env", offsetof(Ec2Progress, boot.env)},
	{"ca", offsetof(Ec2Progress, boot.ca)},
	{"form", offsetof(Ec2Progress, form)},
	{AVM_BOOT_LEFT, offsetof(Ec2Progress, parameter)},
};

#define INTEGER_AT(progress, i) (*(int64 *) ((char *) (progress) + integers[i].offset))
#define TEXT_AT(progress, i) (*(const char **) ((char *) (progress) + texts[i].offset))

/* ---- the handle ---- */

static void
read_progress(Jsonb *handle, Ec2Progress *progress)
{
	memset(progress, 0, sizeof(Ec2Progress));
	for (int i = 0; i < lengthof(integers); i++)
		INTEGER_AT(progress, i) = handle_int(handle, integers[i].name, 0);
	for (int i = 0; i < lengthof(texts); i++)
		TEXT_AT(progress, i) = option_text(handle, texts[i].name);
}

static Jsonb *
write_progress(Ec2Progress *progress)
{
	Jsonb *handle = NULL;

	for (int i = 0; i < lengthof(integers); i++)
	{
		if (INTEGER_AT(progress, i) != 0)
			handle = handle_set_int(handle, integers[i].name, INTEGER_AT(progress, i));
	}
	for (int i = 0; i < lengthof(texts); i++)
	{
		if (TEXT_AT(progress, i) != NULL)
			handle = handle_set_text(handle, texts[i].name, TEXT_AT(progress, i));
	}
	return handle != NULL ? handle : handle_set_text(NULL, "phase", NULL);
}

/* Forget the launch attempt: it is settled. */
void
ec2_settle_launch(Ec2Progress *progress)
{
	progress->subnet = progress->sends = progress->sent_at = 0;
	progress->market = progress->form = NULL;
	memset(&progress->boot, 0, sizeof(progress->boot));
}

/* ---- ways in which a step ends ---- */

void
ec2_note_error(Ec2Step *step, const AwsError *error)
{
	step->out->error_class = error->class;
	step->out->error_code = error->code;
	step->out->error_message = error->message;
}

void
ec2_fail(Ec2Step *step, ErrorClass class, const char *code, const char *message)
{
	step->out->kind = STEP_FAILED;
	step->out->error_class = class;
	step->out->error_code = code;
	step->out->error_message = message;
}

void
ec2_fail_malformed(Ec2Step *step)
{
	ec2_fail(step, CLASS_TRANSIENT, "MalformedReply", "AWS's answer is not what this call answers");
}

/* Wait for a time that doubles from "first" to "last", but not beyond "until" (0: no bound). */
void
ec2_wait(Ec2Step *step, int first, int last, int64 until)
{
	Ec2Progress *progress = &step->progress;

	progress->wait = progress->wait < first ? first : Min(progress->wait * 2, last);
	step->out->kind = STEP_WAIT;
	step->out->wait_ms = (int) progress->wait;
	if (until > step->now)
		step->out->wait_ms = (int) Min(progress->wait, until - step->now);
}

/* The region of the session's VM, or of the one to be. */
const char *
ec2_region(Ec2Step *step)
{
	const char *region = step->context->region;

	if (step->session != NULL)
		region = step->session->region;
	if (region == NULL)
		region = step->progress.region;
	if (region == NULL)
		region = option_text(step->context->options, "region");
	return region;
}

/* What calls are signed with; NULL as long as that is not known. */
const SecretSet *
ec2_signer(const Ec2Step *step)
{
	return step->context->login_pending ? NULL : step->context->secrets;
}

void
ec2_send(Ec2Step *step, const char *service, const char *action, AwsForm *form)
{
	step->out->kind = STEP_REQUEST;
	step->out->operation = action;
	step->out->request = aws_form_request(service, ec2_region(step), form, ec2_signer(step));
}

void
ec2_send_describe(Ec2Step *step, const char *vm_id)
{
	AwsForm form;

	aws_form_init(&form, DESCRIBE, EC2_VERSION);
	aws_form_add(&form, "InstanceId.1", vm_id);
	ec2_send(step, "ec2", DESCRIBE, &form);
}

/* Look for a live instance by the session's tag. */
static void
send_lookup(Ec2Step *step)
{
	AwsForm form;

	aws_form_init(&form, DESCRIBE, EC2_VERSION);
	aws_form_add(&form, "Filter.1.Name", "tag:agentvm-session-id");
	aws_form_add(&form, "Filter.1.Value.1", step->session->session_id);
	aws_form_add(&form, "Filter.2.Name", "instance-state-name");
	aws_form_add(&form, "Filter.2.Value.1", "pending");
	aws_form_add(&form, "Filter.2.Value.2", "running");
	aws_form_add(&form, "Filter.2.Value.3", "stopping");
	aws_form_add(&form, "Filter.2.Value.4", "stopped");
	ec2_send(step, "ec2", DESCRIBE, &form);
}

XmlDoc *
ec2_parse(Ec2Step *step)
{
	step->doc = xml_parse(step->reply->body, step->reply->body_len);
	return step->doc;
}

char *
ec2_learn_instance(Ec2Step *step, XmlDoc *doc)
{
	char *address = xml_text(doc, "//instancesSet/item/ipAddress");

	if (address == NULL || address[0] == '\0')
		address = xml_text(doc, "//instancesSet/item/privateIpAddress");
	if (address != NULL && ec2_is_made_of(address, DIGITS "abcdef:.", 64))
		step->out->address = address;
	return xml_text(doc, "//instancesSet/item/instanceState/name");
}

/* ---- checking options ---- */

void
ec2_bad_option(const char *name, const char *value, const char *hint)
{
	ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("invalid value \"%s\" for option \"%s\" of provider \"ec2\"",
				   pnstrdup(value, pg_mbcliplen(value, strlen(value), 100)), name),
			errhint("%s", hint), hide_caller());
}

/* Whether the text is a prefix plus at least one of [0-9a-z]. */
bool
ec2_is_id(const char *text, const char *prefix)
{
	size_t len = strlen(prefix);
	const char *rest = text + len;

	return strncmp(text, prefix, len) == 0 && *rest != '\0' && strlen(rest) <= 64 &&
		   strspn(rest, "0123456789abcdefghijklmnopqrstuvwxyz") == strlen(rest);
}

bool
ec2_is_made_of(const char *text, const char *characters, size_t max_len)
{
	size_t len = strlen(text);

	return len > 0 && len <= max_len && strspn(text, characters) == len;
}

static void
check_id_list(Jsonb *options, const char *name, const char *prefix, const char *hint)
{
	List *ids = option_list(options, name);
	ListCell *lc;

	if (list_length(ids) > MAX_LIST)
		ereport(
			ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("option \"%s\" of provider \"ec2\" has more than %d members", name, MAX_LIST),
			hide_caller());
	foreach (lc, ids)
	{
		if (!ec2_is_id(lfirst(lc), prefix))
			ec2_bad_option(name, lfirst(lc), hint);
	}
}

void
ec2_validate(OptionScope scope, Jsonb *options)
{
	char *value;
	int size;

	if ((value = option_text(options, "region")) != NULL && !aws_region_is_valid(value))
		ec2_bad_option("region", value, "A region looks like \"us-east-1\".");
	if ((value = option_text(options, "role_arn")) != NULL)
	{
		if (!aws_is_role_arn(value))
			ec2_bad_option("role_arn", value,
						   "A role's ARN looks like \"arn:aws:iam::123456789012:role/name\".");
		if (scope == OPTIONS_PROFILE)
			ec2_bad_option("role_arn", value,
						   "It is a team's: set it with agentvm.set_provider().");
	}
	if ((value = option_text(options, "image_id")) != NULL && !ec2_is_id(value, "ami-"))
		ec2_bad_option("image_id", value, "An image id looks like \"ami-0123456789abcdef0\".");
	if ((value = option_text(options, "instance_type")) != NULL &&
		!ec2_is_made_of(value, LOWER DIGITS ".-", 64))
		ec2_bad_option("instance_type", value, "An instance type looks like \"t3.large\".");
	check_id_list(options, "subnet_ids", "subnet-",
				  "A subnet id looks like \"subnet-0123456789abcdef0\".");
	check_id_list(options, "security_group_ids", "sg-",
				  "A security group id looks like \"sg-0123456789abcdef0\".");
	if ((value = option_text(options, "instance_profile")) != NULL &&
		(!boot_is_printable(value, 512) || strchr(value, ' ') != NULL))
		ec2_bad_option("instance_profile", value,
					   "Give the name or the ARN of an instance profile.");
	if ((value = option_text(options, "secret_delivery")) != NULL &&
		strcmp(value, "user_data") != 0 && strcmp(value, SSM) != 0)
		ec2_bad_option("secret_delivery", value, "It is \"user_data\" or \"ssm\".");
	if ((value = option_text(options, "spot_max_price")) != NULL &&
		(!ec2_is_made_of(value, DIGITS ".", 16) || strtod(value, NULL) <= 0 ||
		 strchr(value, '.') != strrchr(value, '.')))
		ec2_bad_option("spot_max_price", value,
					   "A price is a positive decimal number, such as 0.05.");
	if ((value = option_text(options, "volume_device")) != NULL &&
		(strncmp(value, "/dev/", 5) != 0 || !ec2_is_made_of(value + 5, LOWER DIGITS, 32)))
		ec2_bad_option("volume_device", value, "A device name looks like \"/dev/sda1\".");
	if ((value = option_text(options, "key_name")) != NULL && !boot_is_printable(value, 255))
		ec2_bad_option("key_name", value, "Give the name of an EC2 key pair.");
	if ((value = option_text(options, "volume_size_gib")) != NULL)
	{
		size = option_int(options, "volume_size_gib", 0);
		if (size < 1 || size > MAX_VOLUME_GIB)
			ec2_bad_option("volume_size_gib", value,
						   "A volume has from 1 to " CppAsString2(MAX_VOLUME_GIB) " GiB.");
	}

	if (scope == OPTIONS_LAUNCH)
	{
		const char *const required[] = {"region", "image_id"};

		for (int i = 0; i < lengthof(required); i++)
		{
			if (option_text(options, required[i]) == NULL)
				ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
						errmsg("option \"%s\" of provider \"ec2\" is not set", required[i]),
						errhint("Set it with agentvm.set_provider() or in the profile."),
						hide_caller());
		}
	}
}

/* ---- TerminateInstances ---- */

static void
send_terminate(Ec2Step *step, const char *vm_id)
{
	AwsForm form;

	step->progress.phase = NULL;
	step->out->mutates = true;
	aws_form_init(&form, TERMINATE, EC2_VERSION);
	aws_form_add(&form, "InstanceId.1", vm_id);
	ec2_send(step, "ec2", TERMINATE, &form);
}

/* A series of looks begins, unless it is under way. */
static void
enter_phase(Ec2Progress *progress, const char *phase)
{
	if (progress->phase == NULL || strcmp(progress->phase, phase) != 0)
	{
		progress->phase = phase;
		progress->looks = progress->wait = 0;
	}
}

/* The next look, later than the last one. */
static void
look_later(Ec2Step *step, const char *phase, int64 until)
{
	enter_phase(&step->progress, phase);
	ec2_wait(step, LOOK_FIRST_MS, LOOK_LAST_MS, until);
}

/* One more look has found nothing: is that proof enough? */
static void
look_failed(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	int64 launched = progress->launched;
	int needed;

	if (launched == 0 && step->session->launched_at != 0)
		launched = boot_epoch_ms(step->session->launched_at);
	needed = step->now < launched + YOUNG_MS ? LOOKS_IF_YOUNG : LOOKS;
	if (++progress->looks >= needed)
		step->out->kind = STEP_DONE;
	else
		look_later(step, "confirm", 0);
}

/* End an instance whose id is known. */
static void
terminate_vm(Ec2Step *step, const char *vm_id)
{
	Ec2Progress *progress = &step->progress;
	const HttpReply *reply = step->reply;
	bool confirming = progress->phase != NULL && strcmp(progress->phase, "confirm") == 0;
	bool refused = progress->phase != NULL && strcmp(progress->phase, "refused") == 0;
	AwsError error;
	XmlDoc *doc;
	char *state;

	if (reply == NULL)
	{
		if (confirming || refused)
			ec2_send_describe(step, vm_id);
		else
			send_terminate(step, vm_id);
		return;
	}

	step->out->operation = confirming || refused ? DESCRIBE : TERMINATE;
	error = aws_judge(reply);
	if (!confirming && !refused && error.class != CLASS_NONE &&
		strcmp(error.code, "UnauthorizedOperation") == 0)
	{
		/* one that has ended loses its tags, by which a policy tells which are ours */
		ec2_note_error(step, &error);
		enter_phase(progress, "refused");
		ec2_send_describe(step, vm_id);
		return;
	}
	if (error.class != CLASS_NONE && strcmp(error.code, NOT_FOUND_CODE) != 0)
	{
		progress->looks = 0; /* not-found looks count in a row only */
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}
	doc = error.class == CLASS_NONE ? ec2_parse(step) : NULL;

	if (!confirming && !refused)
	{
		state = xml_text(doc, "//instancesSet/item/currentState/name");
		if (error.class == CLASS_NONE && state == NULL)
			ec2_fail_malformed(step);
		else if (state != NULL &&
				 (strcmp(state, "shutting-down") == 0 || strcmp(state, "terminated") == 0))
			step->out->kind = STEP_DONE;
		else
			look_later(step, "confirm", 0);
		return;
	}

	if (error.class == CLASS_NONE && xml_count(doc, "/DescribeInstancesResponse") == 0)
	{
		ec2_fail_malformed(step);
		return;
	}
	state = xml_text(doc, "//instancesSet/item/instanceState/name");
	if (state == NULL)
		look_failed(step);
	else if (strcmp(state, "shutting-down") == 0 || strcmp(state, "terminated") == 0)
		step->out->kind = STEP_DONE;
	else if (refused)
	{
		progress->phase = NULL;
		step->out->operation = TERMINATE;
		ec2_fail(step, CLASS_CREDENTIALS, "UnauthorizedOperation",
				 "the instance lives, but ending it is not allowed");
	}
	else
		send_terminate(step, vm_id);
}

/* A launch was sent and never answered: find its instance, or make sure that there is none. */
static void
terminate_unanswered(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	const HttpReply *reply = step->reply;
	int64 settled = progress->sent_at + avm_lease_ms + avm_launch_settle_s * INT64CONST(1000);
	AwsError error;
	XmlDoc *doc;
	char *vm_id;

	step->out->operation = DESCRIBE;
	if (reply == NULL)
	{
		progress->look_at = step->now;
		send_lookup(step);
		return;
	}

	error = aws_judge(reply);
	if (error.class != CLASS_NONE)
	{
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}
	doc = ec2_parse(step);
	if (xml_count(doc, "/DescribeInstancesResponse") == 0)
	{
		ec2_fail_malformed(step);
		return;
	}

	vm_id = xml_text(doc, "//instancesSet/item/instanceId");
	if (vm_id != NULL && ec2_is_id(vm_id, "i-"))
	{
		ec2_learn_instance(step, doc);
		step->out->vm_id = progress->vm_id = vm_id;
		step->out->purchase = progress->market;
		step->out->region = ec2_region(step);
		ec2_settle_launch(progress);
		send_terminate(step, vm_id);
		return;
	}

	enter_phase(progress, "lookup");
	if (++progress->looks >= LOOKS && progress->look_at >= settled)
	{
		ec2_settle_launch(progress);
		step->out->kind = STEP_DONE;
	}
	else
		look_later(step, "lookup", settled);
}

static void
ec2_terminate(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	const char *vm_id = step->session->vm_id != NULL ? step->session->vm_id : progress->vm_id;

	/* the VM is gone, and the parameter of its boot is left */
	if (progress->phase != NULL && strcmp(progress->phase, DROP_PHASE) == 0)
	{
		ec2_drop_parameter(step);
		return;
	}
	if (vm_id != NULL)
		terminate_vm(step, vm_id);
	else if (progress->sent_at != 0)
		terminate_unanswered(step);
	else
	{
		step->out->operation = TERMINATE;
		step->out->kind = STEP_DONE;
	}

	if (step->out->kind == STEP_DONE && progress->parameter != NULL)
	{
		progress->phase = DROP_PHASE;
		step->reply = NULL;
		ec2_drop_parameter(step);
	}
}

/* ---- what EC2 says ---- */

void
ec2_add_result(Ec2Step *step, XmlDoc *doc, const char *name, const char *path)
{
	char *value = xml_text(doc, path);

	if (value != NULL && value[0] != '\0')
		step->out->result = handle_set_text(step->out->result, name, value);
}

/* What EC2 says of the session's instance, found by id, or by tag before it has one. */
static void
ec2_inspect(Ec2Step *step)
{
	const char *vm_id = step->session->vm_id != NULL ? step->session->vm_id : step->progress.vm_id;
	const HttpReply *reply = step->reply;
	AwsError error;
	XmlDoc *doc = NULL;

	step->out->operation = DESCRIBE;
	if (reply == NULL)
	{
		if (vm_id != NULL)
			ec2_send_describe(step, vm_id);
		else
			send_lookup(step);
		return;
	}

	error = aws_judge(reply);
	if (error.class == CLASS_NONE)
	{
		doc = ec2_parse(step);
		if (xml_count(doc, "/DescribeInstancesResponse") == 0)
		{
			ec2_fail_malformed(step);
			return;
		}
	}
	else if (strcmp(error.code, NOT_FOUND_CODE) != 0)
	{
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}

	step->out->kind = STEP_DONE;
	step->out->result = handle_set_text(NULL, "state", "not_found");
	if (xml_count(doc, "//instancesSet/item/instanceId") == 0)
		return;
	ec2_add_result(step, doc, "state", "//instancesSet/item/instanceState/name");
	ec2_add_result(step, doc, "instance_id", "//instancesSet/item/instanceId");
	ec2_add_result(step, doc, "instance_type", "//instancesSet/item/instanceType");
	ec2_add_result(step, doc, "address", "//instancesSet/item/privateIpAddress");
	ec2_add_result(step, doc, "address", "//instancesSet/item/ipAddress");
	ec2_add_result(step, doc, "launch_time", "//instancesSet/item/launchTime");
	step->out->result = handle_set_text(step->out->result, "lifecycle", ON_DEMAND);
	ec2_add_result(step, doc, "lifecycle", "//instancesSet/item/instanceLifecycle");
	ec2_add_result(step, doc, "state_reason", "//instancesSet/item/stateReason/message");
}

/* Whether there are keys to sign with. */
static bool
has_keys(const SecretSet *secrets)
{
	return secret_set_get(secrets, "access_key_id") != NULL &&
		   secret_set_get(secrets, "secret_access_key") != NULL;
}

static void
ec2_step(const ProviderContext *context, ProviderStep *out)
{
	Ec2Step step = {0};

	step.context = context;
	step.session = context->session;
	step.reply = context->reply;
	step.out = out;
	step.now = boot_epoch_ms(context->now);
	read_progress(context->handle, &step.progress);

	/* An end may need no call; all else does, and is refused like a call with bad keys. */
	if (context->op != OP_TERMINATE && context->reply == NULL && !context->ending &&
		!context->login_pending && !has_keys(context->secrets))
	{
		ec2_fail(&step, CLASS_CREDENTIALS, "MissingCredentials",
				 "the team has no access_key_id and secret_access_key");
		return;
	}

	switch (context->op)
	{
		case OP_PROVISION:
			ec2_provision(&step);
			out->handle = write_progress(&step.progress);
			break;
		case OP_TERMINATE:
			ec2_terminate(&step);
			out->handle = write_progress(&step.progress);
			break;
		case OP_TIDY:
			ec2_drop_parameter(&step);
			out->handle = write_progress(&step.progress);
			break;
		case OP_INSPECT:
			ec2_inspect(&step);
			break;
		case OP_CHECK:
			ec2_check(&step);
			break;
		case OP_LIST:
			ec2_list(&step);
			break;
		case OP_REAP:
			ec2_reap(&step);
			break;
	}
	xml_free(step.doc);
}

const Provider ec2_provider = {
	.abi = AVM_PROVIDER_ABI,
	.name = "ec2",
	.options = ec2_options,
	.secrets = ec2_secrets,
	.runtime_default = true,
	.needs_secrets = true,
	.lists = true,
	.validate = ec2_validate,
	.check_launch = ec2_check_launch,
	.login_needed = aws_login_needed,
	.login_step = aws_login_step,
	.login_expired = aws_login_expired,
	.step = ec2_step,
};
