/*-------------------------------------------------------------------------
 *
 * ec2.c
 *		VMs as EC2 instances in a team's own AWS account.
 *
 * One session is one instance, launched with RunInstances.  Places are tried in
 * order: spot before on-demand, of a market the instance types as they are listed,
 * of a type the subnets.  (Who lists types likes the first one best, wherever it
 * is; subnets are much the same.)  It moves on only when AWS says that there is no
 * capacity, or that the account's spot quota is used up.  Each try is a launch
 * attempt with a client token of its own, derived from session, attempt and place.
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
 * that had launched would have been answered with its instance.  But one that
 * is still on its way may launch later; so, for the time of a lease after the last
 * send that was not answered, a refused token is asked for once more rather than left.
 *
 * A token may be of no use.  IdempotentParameterMismatch: it came before, with other
 * parameters, as when the database has been set back to before the launch; then
 * there may be an instance, which is looked for by its tag and taken over, and only
 * once none can appear any more there is a new attempt.  IdempotentInstanceTerminated:
 * its instance has ended already, so that there is a new attempt at once.  Where the VM
 * has reported by itself it has run, and there is none.
 *
 * This file has what all operations share, and ends; the launch is in
 * ec2_launch.c, pauses in ec2_power.c, persistent spot requests in ec2_spot.c; boot.c makes the
 * user data.
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

#define MAX_LIST 16			 /* subnets, security groups, instance types */
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
	{"instance_types", 'l', true, "instance types to try in this order"},
	{"subnet_ids", 'l', false, "subnets to try in this order; default: the default VPC's"},
	{"security_group_ids", 'l', false, "security groups of the instance"},
	{"instance_profile", 's', false, "name or ARN of the instance's IAM instance profile"},
	{"secret_delivery", 's', false, "how the VM gets its bootstrap token: user_data or ssm"},
	{"spot", 'b', true, "whether to try the spot market first; default true"},
	{"spot_persistent", 'b', true,
	 "whether spot instances are of persistent requests, so that they can be paused; default "
	 "false"},
	{"spot_max_price", 's', false, "highest spot price in USD an hour; default: on-demand price"},
	{"volume_size_gib", 'i', false, "size of the root volume; default: disk_gib, else the AMI's"},
	{"volume_device", 's', false, "device name of the root volume; default /dev/sda1"},
	{"key_name", 's', false, "EC2 key pair for SSH"},
	{NULL, 0, false, NULL}};

static const char *const ec2_alternatives[][2] = {{"instance_type", "instance_types"},
												  {NULL, NULL}};

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
	{"type", offsetof(Ec2Progress, type)},
	{"subnet", offsetof(Ec2Progress, subnet)},
	{"sends", offsetof(Ec2Progress, sends)},
	{"sent_at", offsetof(Ec2Progress, sent_at)},
	{"open_at", offsetof(Ec2Progress, open_at)},
	{"again", offsetof(Ec2Progress, again)},
	{"hard_stop", offsetof(Ec2Progress, boot.hard_stop)},
	{"longest", offsetof(Ec2Progress, boot.longest)},
	{"put", offsetof(Ec2Progress, put)},
	{"puts", offsetof(Ec2Progress, puts)},
	{"put_at", offsetof(Ec2Progress, put_at)},
	{"put_open", offsetof(Ec2Progress, put_open)},
	{AVM_POWER_SENT, offsetof(Ec2Progress, power_sent)},
	{"cancelled", offsetof(Ec2Progress, cancelled)},
	{"request_until", offsetof(Ec2Progress, request_until)},
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
	{"request", offsetof(Ec2Progress, request)},
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

/* All members at once: to set one after the other is a tenth of what a launch costs. */
static Jsonb *
write_progress(Ec2Progress *progress)
{
	HandleMember members[lengthof(integers) + lengthof(texts)];
	int count = 0;

	for (int i = 0; i < lengthof(integers); i++)
	{
		if (INTEGER_AT(progress, i) != 0)
			members[count++] = (HandleMember){integers[i].name, NULL, INTEGER_AT(progress, i)};
	}
	for (int i = 0; i < lengthof(texts); i++)
	{
		if (TEXT_AT(progress, i) != NULL)
			members[count++] = (HandleMember){texts[i].name, TEXT_AT(progress, i), 0};
	}
	return handle_make(members, count);
}

/* Forget the launch attempt: it is settled. */
void
ec2_settle_launch(Ec2Progress *progress)
{
	progress->type = progress->subnet = 0;
	progress->sends = progress->sent_at = progress->open_at = 0;
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
	ec2_limit(step, DESCRIBE, vm_id);
}

/*
 * Calls that EC2 grants an account in a region by default, and how many instances one
 * may be for.  Source: "Request throttling for the Amazon EC2 API".  What is not here
 * is too rare to come near its limit.
 */
static const struct
{
	const char *operation;
	int burst;
	int per_second;
	int members;
} limits[] = {
	{RUN, 5, 2, 1},
	{START, 5, 2, 1},
	{TERMINATE, 100, 5, 1000},
	{CANCEL, 50, 5, 100}, /* as all that changes something and has no limit of its own */
	{DESCRIBE, 50, 10, 200},
	{DESCRIBE_BY_FILTER, 100, 20, 1},
};

/*
 * The account that the step's calls are made in, as far as it can be told without one: that
 * of the team's role, else the one that its access key is of, whose number answers tell.
 */
static char *
account_name(Ec2Step *step)
{
	char *role = option_text(step->context->options, "role_arn");
	const Secret *key = secret_set_get(step->context->secrets, "access_key_id");
	uint8 digest[SHA256_LEN];

	if (role != NULL && aws_is_role_arn(role))
		return psprintf("%.12s", strstr(role, ":iam::") + strlen(":iam::"));
	secret_sha256(key, digest);
	return psprintf("key %.12s", sha256_text(digest));
}

void
ec2_limit(Ec2Step *step, const char *operation, const char *id)
{
	if (ec2_signer(step) == NULL)
		return; /* it will not be sent */
	for (int i = 0; i < lengthof(limits); i++)
	{
		CallRate *rate;

		if (strcmp(limits[i].operation, operation) != 0)
			continue;
		rate = step->out->rate = palloc0(sizeof(CallRate));
		rate->bucket = psprintf("%s %s", operation, ec2_region(step));
		rate->account = account_name(step);
		rate->burst = limits[i].burst;
		rate->per_second = limits[i].per_second;
		if (id == NULL || (!ec2_is_id(id, "i-") && !ec2_is_id(id, "sir-")))
			return;
		rate->batch = psprintf("%s %s %.32s", operation, ec2_region(step),
							   secret_set_digest(step->context->secrets));
		rate->member = id;
		rate->limit = limits[i].members;
	}
}

void
ec2_add_living(AwsForm *form, int filter)
{
	static const char *const states[] = {"pending", "running", "stopping", "stopped"};

	aws_form_add(form, psprintf("Filter.%d.Name", filter), "instance-state-name");
	for (int i = 0; i < lengthof(states); i++)
		aws_form_add(form, psprintf("Filter.%d.Value.%d", filter, i + 1), states[i]);
}

/* Look for a live instance by the session's tag. */
static void
send_lookup(Ec2Step *step)
{
	AwsForm form;

	aws_form_init(&form, DESCRIBE, EC2_VERSION);
	aws_form_add(&form, "Filter.1.Name", "tag:agentvm-session-id");
	aws_form_add(&form, "Filter.1.Value.1", step->session->session_id);
	ec2_add_living(&form, 2);
	ec2_send(step, "ec2", DESCRIBE, &form);
	ec2_limit(step, DESCRIBE_BY_FILTER, NULL);
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

/* A list that is not too long. */
static List *
checked_list(Jsonb *options, const char *name)
{
	List *members = option_list(options, name);

	if (list_length(members) > MAX_LIST)
		ereport(
			ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("option \"%s\" of provider \"ec2\" has more than %d members", name, MAX_LIST),
			hide_caller());
	return members;
}

static void
check_id_list(Jsonb *options, const char *name, const char *prefix, const char *hint)
{
	List *ids = checked_list(options, name);
	ListCell *lc;

	foreach (lc, ids)
	{
		if (!ec2_is_id(lfirst(lc), prefix))
			ec2_bad_option(name, lfirst(lc), hint);
	}
}

static void
check_instance_type(const char *name, const char *value)
{
	if (!ec2_is_made_of(value, LOWER DIGITS ".-", 64))
		ec2_bad_option(name, value, "An instance type looks like \"t3.large\".");
}

void
ec2_validate(OptionScope scope, Jsonb *options)
{
	List *types = checked_list(options, "instance_types");
	ListCell *lc;
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
	if ((value = option_text(options, "instance_type")) != NULL)
		check_instance_type("instance_type", value);
	foreach (lc, types)
		check_instance_type("instance_types", lfirst(lc));
	if (value != NULL && option_value(options, "instance_types") != NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("options \"instance_type\" and \"instance_types\" of provider \"ec2\" "
					   "are both set"),
				errhint("Set one of them: \"instance_type\" stands for a list of one."),
				hide_caller());
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
	ec2_limit(step, TERMINATE, vm_id);
}

void
ec2_enter_phase(Ec2Progress *progress, const char *phase)
{
	if (progress->phase == NULL || strcmp(progress->phase, phase) != 0)
	{
		progress->phase = phase;
		progress->looks = progress->wait = 0;
	}
}

void
ec2_look_later(Ec2Step *step, const char *phase, int64 until)
{
	ec2_enter_phase(&step->progress, phase);
	ec2_wait(step, LOOK_FIRST_MS, LOOK_LAST_MS, until);
}

bool
ec2_look_again(Ec2Step *step, const char *phase)
{
	Ec2Progress *progress = &step->progress;
	int64 launched = progress->launched;
	int needed;

	if (launched == 0 && step->session->launched_at != 0)
		launched = boot_epoch_ms(step->session->launched_at);
	needed = step->now < launched + YOUNG_MS ? LOOKS_IF_YOUNG : LOOKS;
	if (++progress->looks >= needed)
		return false;
	ec2_look_later(step, phase, 0);
	return true;
}

/* End an instance that none will follow. */
static void
end_vm(Ec2Step *step, const char *vm_id)
{
	Ec2Progress *progress = &step->progress;
	const HttpReply *reply = step->reply;
	bool confirming = progress->phase != NULL && strcmp(progress->phase, CONFIRM_PHASE) == 0;
	bool refused = progress->phase != NULL && strcmp(progress->phase, REFUSED_PHASE) == 0;
	bool active = progress->request != NULL && progress->cancelled == 0;
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
		ec2_enter_phase(progress, REFUSED_PHASE);
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
			ec2_look_later(step, CONFIRM_PHASE, 0);
		return;
	}

	if (error.class == CLASS_NONE && xml_count(doc, "/DescribeInstancesResponse") == 0)
	{
		ec2_fail_malformed(step);
		return;
	}
	state = xml_text(doc, "//instancesSet/item/instanceState/name");
	if (state == NULL)
	{
		if (!ec2_look_again(step, progress->phase))
			step->out->kind = STEP_DONE;
	}
	else if (strcmp(state, "shutting-down") == 0 || strcmp(state, "terminated") == 0)
		step->out->kind = STEP_DONE;
	else if (refused)
	{
		progress->phase = NULL;
		step->out->operation = active ? CANCEL : TERMINATE;
		ec2_fail(step, CLASS_CREDENTIALS, "UnauthorizedOperation",
				 active ? "the instance lives, but cancelling its spot request is not allowed"
						: "the instance lives, but ending it is not allowed");
	}
	else
		send_terminate(step, vm_id);
}

/* End an instance whose id is known. */
static void
terminate_vm(Ec2Step *step, const char *vm_id)
{
	char *before;

	if (ec2_ends_others(&step->progress))
	{
		ec2_end_others(step);
		return;
	}
	if (!ec2_request_is_gone(step, vm_id))
		return;
	end_vm(step, vm_id);
	if (step->out->kind != STEP_DONE || step->progress.request == NULL)
		return;
	before = xml_text(step->doc, "//instancesSet/item/previousState/name");
	if (before != NULL && strcmp(before, "shutting-down") != 0 && strcmp(before, "terminated") != 0)
		return; /* it was us, and after the request */
	step->reply = NULL;
	ec2_end_others(step);
}

Ec2Search
ec2_search(Ec2Step *step, const char *phase)
{
	Ec2Progress *progress = &step->progress;
	const HttpReply *reply = step->reply;
	int64 settled = progress->sent_at + avm_lease_ms + avm_launch_settle_s * INT64CONST(1000);
	AwsError error;
	char *vm_id;

	step->out->operation = DESCRIBE;
	if (reply == NULL)
	{
		progress->look_at = step->now;
		send_lookup(step);
		return SEARCH_GOES_ON;
	}

	error = aws_judge(reply);
	if (error.class != CLASS_NONE)
	{
		ec2_fail(step, error.class, error.code, error.message);
		return SEARCH_GOES_ON;
	}
	ec2_parse(step);
	if (xml_count(step->doc, "/DescribeInstancesResponse") == 0)
	{
		ec2_fail_malformed(step);
		return SEARCH_GOES_ON;
	}

	vm_id = xml_text(step->doc, "//instancesSet/item/instanceId");
	if (vm_id != NULL && ec2_is_id(vm_id, "i-"))
		return SEARCH_FOUND;
	ec2_enter_phase(progress, phase);
	if (++progress->looks >= LOOKS && progress->look_at >= settled)
		return SEARCH_IN_VAIN;
	ec2_look_later(step, phase, settled);
	return SEARCH_GOES_ON;
}

void
ec2_learn_account(Ec2Step *step, XmlDoc *doc)
{
	/* of RunInstances, of DescribeInstances: nobody is told of another one's reservations */
	char *owner = xml_below_text(xml_root(doc), "ownerId");

	if (owner == NULL)
		owner = xml_below_text(xml_root(doc), "reservationSet/item/ownerId");
	if (owner != NULL && strlen(owner) == 12 && strspn(owner, DIGITS) == 12)
		step->out->account = owner;
}

void
ec2_learn_id(Ec2Step *step, XmlDoc *doc)
{
	Ec2Progress *progress = &step->progress;
	char *lifecycle = xml_text(doc, "//instancesSet/item/instanceLifecycle");

	step->out->vm_id = progress->vm_id = xml_text(doc, "//instancesSet/item/instanceId");
	step->out->region = ec2_region(step);
	ec2_learn_account(step, doc);
	step->out->purchase = progress->market;
	if (lifecycle != NULL && strcmp(lifecycle, SPOT) == 0)
		step->out->purchase = SPOT;
	ec2_learn_request(step, doc);
}

/* A launch was sent and never answered: find its instance, or make sure that there is none. */
static void
terminate_unanswered(Ec2Step *step)
{
	switch (ec2_search(step, "lookup"))
	{
		case SEARCH_GOES_ON:
			break;
		case SEARCH_FOUND:
			ec2_learn_instance(step, step->doc);
			ec2_learn_id(step, step->doc);
			ec2_settle_launch(&step->progress);
			step->progress.phase = NULL;
			step->reply = NULL;
			terminate_vm(step, step->progress.vm_id);
			break;
		case SEARCH_IN_VAIN:
			ec2_settle_launch(&step->progress);
			step->out->kind = STEP_DONE;
			break;
	}
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
		case OP_PAUSE:
		case OP_RESUME:
			ec2_power(&step);
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
	.alternatives = ec2_alternatives,
	.check_pause = ec2_check_pause,
	.login_needed = aws_login_needed,
	.login_step = aws_login_step,
	.login_expired = aws_login_expired,
	.join = ec2_join,
	.split = ec2_split,
	.step = ec2_step,
};
