/*-------------------------------------------------------------------------
 *
 * ec2_launch.c
 *		Launching an EC2 instance, and following it until it runs.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "pgtime.h"

#include "db.h"
#include "providers/ec2.h"
#include "secret/secret.h"

#define DEFAULT_INSTANCE_TYPE "t3.large"
#define DEFAULT_VOLUME_DEVICE "/dev/sda1"
#define MAX_TAG_VALUE 256 /* characters */

#define POLL_FIRST_MS 2000
#define POLL_LAST_MS 10000
#define APPEARS_WITHIN_MS 60000 /* DescribeInstances knows a new instance by then */
#define MAX_AGAIN 2				/* attempts after tokens of no use */

static void
add_tag(AwsForm *form, int resource, int *n, const char *key, const char *value)
{
	if (value == NULL)
		return;
	(*n)++;
	aws_form_add(form, psprintf("TagSpecification.%d.Tag.%d.Key", resource, *n), key);
	aws_form_add(form, psprintf("TagSpecification.%d.Tag.%d.Value", resource, *n),
				 pnstrdup(value, pg_mbcharcliplen(value, strlen(value), MAX_TAG_VALUE)));
}

static void
add_tags(AwsForm *form, int resource, const char *type, const ProviderSession *session,
		 bool persistent)
{
	int n = 0;

	aws_form_add(form, psprintf("TagSpecification.%d.ResourceType", resource), type);
	add_tag(form, resource, &n, "Name", psprintf("agentvm-%s", session->session_id));
	add_tag(form, resource, &n, "agentvm-session-id", session->session_id);
	add_tag(form, resource, &n, "agentvm-team-id", session->team_id);
	add_tag(form, resource, &n, "agentvm-agent-id", session->agent_id);
	add_tag(form, resource, &n, "agentvm-managed-by", "agentvm");
	add_tag(form, resource, &n, "agentvm-cluster", session->cluster);
	if (persistent)
		add_tag(form, resource, &n, SPOT_TAG, PERSISTENT);
}

/* The instance types to try, at least one. */
static List *
instance_types(Jsonb *options)
{
	List *types = option_list(options, "instance_types");

	if (types == NIL)
		types = option_list(options, "instance_type");
	return types != NIL ? types : list_make1(DEFAULT_INSTANCE_TYPE);
}

/* The place of that number of types and subnets. */
static Ec2Place
place_of(Jsonb *options, const char *market, int64 type, int64 subnet)
{
	List *types = instance_types(options);
	List *subnets = option_list(options, "subnet_ids");
	Ec2Place place = {market, linitial(types), ""};

	if (type < list_length(types))
		place.type = list_nth(types, (int) type);
	if (subnet < list_length(subnets))
		place.subnet = list_nth(subnets, (int) subnet);
	return place;
}

static const char *
first_market(Jsonb *options)
{
	return option_bool(options, "spot", true) ? SPOT : ON_DEMAND;
}

Ec2Place
ec2_first_place(Jsonb *options)
{
	return place_of(options, first_market(options), 0, 0);
}

/* Where the attempt that is under way is to launch. */
static Ec2Place
attempt_place(const Ec2Step *step)
{
	return place_of(step->context->options, step->progress.market, step->progress.type,
					step->progress.subnet);
}

/* At most one VM per token: one token per attempt and place. */
static char *
client_token(const ProviderSession *session, int attempt, const Ec2Place *place)
{
	char *text = psprintf("%s|%s|%d|%s|%s|%s", session->cluster != NULL ? session->cluster : "",
						  session->session_id, attempt, place->market, place->subnet, place->type);
	uint8 digest[SHA256_LEN];

	sha256_bytes(text, strlen(text), digest);
	return sha256_text(digest);
}

/* "2026-01-31T12:34:56Z" */
static char *
utc_time(int64 epoch_s)
{
	pg_time_t at = (pg_time_t) epoch_s;
	char *text = palloc(32);

	pg_strftime(text, 32, "%Y-%m-%dT%H:%M:%SZ", pg_gmtime(&at));
	return text;
}

void
ec2_run_form(AwsForm *form, const ProviderSession *session, Jsonb *options, const Ec2Place *place,
			 const char *token, int64 until)
{
	bool persistent = ec2_is_persistent(options, place->market);
	char *value;
	int volume_gib;
	int n = 0;
	ListCell *lc;

	aws_form_init(form, RUN, EC2_VERSION);
	if (token != NULL)
		aws_form_add(form, "ClientToken", token);
	aws_form_add(form, "MinCount", "1");
	aws_form_add(form, "MaxCount", "1");
	aws_form_add(form, "ImageId", option_text(options, "image_id"));
	aws_form_add(form, "InstanceType", place->type);
	/* what has ended would be launched once more */
	aws_form_add(form, "InstanceInitiatedShutdownBehavior", persistent ? "stop" : "terminate");
	aws_form_add(form, "MetadataOptions.HttpEndpoint", "enabled");
	aws_form_add(form, "MetadataOptions.HttpTokens", "required");
	aws_form_add(form, "MetadataOptions.HttpPutResponseHopLimit", "1");
	if (place->subnet[0] != '\0')
		aws_form_add(form, "SubnetId", place->subnet);
	foreach (lc, option_list(options, "security_group_ids"))
		aws_form_add(form, psprintf("SecurityGroupId.%d", ++n), lfirst(lc));
	if ((value = option_text(options, "instance_profile")) != NULL)
		aws_form_add(form,
					 strncmp(value, "arn:", 4) == 0 ? "IamInstanceProfile.Arn"
													: "IamInstanceProfile.Name",
					 value);
	if ((value = option_text(options, "key_name")) != NULL)
		aws_form_add(form, "KeyName", value);
	if (strcmp(place->market, SPOT) == 0)
	{
		aws_form_add(form, "InstanceMarketOptions.MarketType", "spot");
		aws_form_add(form, "InstanceMarketOptions.SpotOptions.SpotInstanceType",
					 persistent ? PERSISTENT : "one-time");
		aws_form_add(form, "InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior",
					 persistent ? "stop" : "terminate");
		if (persistent && until != 0)
			aws_form_add(form, "InstanceMarketOptions.SpotOptions.ValidUntil", utc_time(until));
		if ((value = option_text(options, "spot_max_price")) != NULL)
			aws_form_add(form, "InstanceMarketOptions.SpotOptions.MaxPrice", value);
	}
	volume_gib = option_int(options, "volume_size_gib", session->disk_gib);
	if (volume_gib > 0)
	{
		value = option_text(options, "volume_device");
		aws_form_add(form, "BlockDeviceMapping.1.DeviceName",
					 value != NULL ? value : DEFAULT_VOLUME_DEVICE);
		aws_form_add(form, "BlockDeviceMapping.1.Ebs.VolumeSize", psprintf("%d", volume_gib));
		aws_form_add(form, "BlockDeviceMapping.1.Ebs.VolumeType", "gp3");
		aws_form_add(form, "BlockDeviceMapping.1.Ebs.DeleteOnTermination", "true");
		aws_form_add(form, "BlockDeviceMapping.1.Ebs.Encrypted", "true");
	}
	add_tags(form, 1, "instance", session, persistent);
	add_tags(form, 2, "volume", session, false);
	if (persistent)
		add_tags(form, 3, "spot-instances-request", session, false);
}

/* Begin an attempt in the progress's place: settle every byte of its request. */
static void
begin_attempt(Ec2Step *step)
{
	const ProviderSession *session = step->session;
	Jsonb *options = step->context->options;
	Ec2Progress *progress = &step->progress;
	Ec2Place place = attempt_place(step);
	AwsForm form;

	ec2_validate(OPTIONS_LAUNCH, options);

	progress->attempt++;
	progress->sends = progress->sent_at = progress->open_at = progress->wait = 0;
	progress->region = option_text(options, "region");
	boot_plan(&progress->boot, session, step->now, NULL);
	ec2_run_form(&form, session, options, &place,
				 client_token(session, (int) progress->attempt, &place), progress->boot.hard_stop);
	progress->form = form.body.data;
}

/* Send the attempt's request, for the first time or once more. */
static void
send_launch(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	AwsForm form;
	char *script;
	char *encoded;
	int len;

	if (ec2_uses_parameter(step->context->options, step->session->runtime))
	{
		if (progress->put != progress->attempt)
		{
			ec2_put_parameter(step);
			return;
		}
		script = boot_script_of_parameter(
			&progress->boot, progress->region,
			ec2_parameter_name(step->session->cluster, step->session->session_id), &len);
	}
	else
		script =
			boot_script(&progress->boot, step->session->session_id, (int) progress->attempt, &len);
	if (len > MAX_USER_DATA)
	{
		secret_wipe(script, len);
		ec2_settle_launch(progress);
		step->out->operation = RUN;
		ec2_fail(
			step, CLASS_PERMANENT, "UserDataTooLong",
			psprintf("user data of %d bytes, more than the %d that EC2 takes", len, MAX_USER_DATA));
		return;
	}

	encoded = boot_base64(script, len);
	secret_wipe(script, len);
	initStringInfo(&form.body);
	appendStringInfoString(&form.body, progress->form);
	enlargeStringInfo(&form.body, 3 * strlen(encoded) + 64);
	aws_form_add(&form, "UserData", encoded);
	secret_wipe(encoded, strlen(encoded));
	secret_wipe_later(form.body.data, form.body.len);

	/* A new token comes with a new attempt, whose bootstrap token the engine commits with it. */
	if (progress->sends == 0)
		step->out->attempt = (int) progress->attempt;
	progress->sends++;
	progress->open_at = progress->sent_at;
	progress->sent_at = step->now;
	step->out->mutates = true;
	step->out->region = progress->region;
	ec2_send(step, "ec2", RUN, &form);
	ec2_limit(step, RUN, NULL);
}

/* Whether the place has no room, rather than the request a fault. */
static bool
is_for_want_of_room(const AwsError *error)
{
	return error->class == CLASS_CAPACITY ||
		   strcmp(error->code, "MaxSpotInstanceCountExceeded") == 0 ||
		   strcmp(error->code, "InstanceLimitExceeded") == 0;
}

/* Whether there is another place to try after this refusal for want of room; moves on to it. */
static bool
next_place(Ec2Step *step, const AwsError *error)
{
	Ec2Progress *progress = &step->progress;
	Jsonb *options = step->context->options;

	if (error->class == CLASS_CAPACITY)
	{
		if (progress->subnet + 1 < list_length(option_list(options, "subnet_ids")))
		{
			progress->subnet++;
			return true;
		}
		if (progress->type + 1 < list_length(instance_types(options)))
		{
			progress->type++;
			progress->subnet = 0;
			return true;
		}
	}
	if (strcmp(progress->market, SPOT) == 0)
	{
		progress->market = ON_DEMAND;
		progress->type = progress->subnet = 0;
		return true;
	}
	return false;
}

/* Whether there may be a new attempt: it is not to end, and no VM of it has run. */
static bool
may_begin(const Ec2Step *step)
{
	return !step->context->ending && step->session->ready_at == 0;
}

/* A new attempt, in the place that the progress names. */
static void
launch_anew(Ec2Step *step)
{
	begin_attempt(step);
	send_launch(step);
}

/* The last send was answered, and has launched nothing. */
static void
forget_send(Ec2Progress *progress)
{
	progress->sends = Max(progress->sends - 1, 0);
	progress->sent_at = progress->sends > 0 ? progress->open_at : 0;
}

/* What was asked for, in the event of the call. */
static void
note_tried(Ec2Step *step)
{
	Ec2Place place = attempt_place(step);
	Jsonb *tried = handle_set_int(NULL, "attempt", step->progress.attempt);

	tried = handle_set_text(tried, "market", place.market);
	tried = handle_set_text(tried, "instance_type", place.type);
	if (place.subnet[0] != '\0')
		tried = handle_set_text(tried, "subnet", place.subnet);
	step->out->tried = tried;
}

/* There is an instance, and an answer that tells of it. */
static void
take_instance(Ec2Step *step, XmlDoc *doc)
{
	Ec2Progress *progress = &step->progress;
	char *state;

	ec2_learn_id(step, doc);
	state = ec2_learn_instance(step, doc);
	ec2_settle_launch(progress);
	progress->launched = step->now;
	progress->wait = 0;
	step->out->running = state != NULL && strcmp(state, "running") == 0;
	if (step->context->ending || step->out->running)
		step->out->kind = STEP_DONE;
	else
		ec2_wait(step, POLL_FIRST_MS, POLL_LAST_MS, 0);
}

/*
 * The attempt's token was used for something else.  What has used it is ours: nobody
 * else can know the token.  So there may be an instance; as long as that is not known
 * there is no other attempt.
 */
static void
find_launch(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	Ec2Search search = ec2_search(step, FIND_PHASE);

	if (search == SEARCH_GOES_ON)
		return;
	progress->phase = NULL;
	progress->looks = progress->wait = 0;
	if (search == SEARCH_FOUND)
	{
		take_instance(step, step->doc);
		return;
	}
	if (may_begin(step) && progress->again < MAX_AGAIN)
	{
		progress->again++;
		launch_anew(step);
		return;
	}
	ec2_settle_launch(progress);
	ec2_fail(step, step->session->ready_at != 0 ? CLASS_NOT_FOUND : CLASS_PERMANENT, MISMATCH_CODE,
			 "the client token was used for another request, which has launched nothing");
}

static void
take_launch_reply(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	const HttpReply *reply = step->reply;
	AwsError error = aws_judge(reply);
	bool settled;

	step->out->operation = RUN;
	note_tried(step);
	if (reply->sends > 1)
	{
		progress->sends += reply->sends - 1;
		progress->open_at = progress->sent_at;
	}
	if (error.class == CLASS_NONE)
	{
		XmlDoc *doc = ec2_parse(step);
		char *vm_id = xml_text(doc, "//instancesSet/item/instanceId");

		if (vm_id == NULL || !ec2_is_id(vm_id, "i-"))
			ec2_fail_malformed(step);
		else
			take_instance(step, doc);
		return;
	}

	/* Did not happen, or may have: the same request again, after a while. */
	if (error.class == CLASS_TRANSIENT || error.class == CLASS_THROTTLED)
	{
		if (error.class == CLASS_THROTTLED || (reply->status == 0 && !reply->maybe_sent))
			forget_send(progress);
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}

	if (strcmp(error.code, MISMATCH_CODE) == 0)
	{
		ec2_note_error(step, &error);
		progress->phase = FIND_PHASE;
		progress->looks = progress->wait = 0;
		step->reply = NULL;
		(void) ec2_search(step, FIND_PHASE);
		return;
	}
	if (strcmp(error.code, ENDED_CODE) == 0 && may_begin(step) && progress->again < MAX_AGAIN)
	{
		ec2_note_error(step, &error);
		progress->again++;
		launch_anew(step);
		return;
	}

	/* Refused; settled unless an earlier send of the same token was never answered. */
	settled = progress->sends <= 1 || strcmp(error.code, ENDED_CODE) == 0;
	if (!settled && is_for_want_of_room(&error))
	{
		int64 until = progress->open_at + avm_lease_ms;

		/* one that has launched would have been answered; one on its way launches by then */
		settled = step->now >= until;
		if (!settled && !step->context->ending)
		{
			ec2_note_error(step, &error);
			forget_send(progress);
			ec2_wait(step, POLL_FIRST_MS, POLL_LAST_MS, until);
			return;
		}
	}
	if (settled && is_for_want_of_room(&error) && may_begin(step) && next_place(step, &error))
	{
		ec2_note_error(step, &error);
		launch_anew(step);
		return;
	}
	if (settled)
		ec2_settle_launch(progress);
	ec2_fail(step, error.class, error.code, error.message);
}

/* Follow the instance until it runs. */
static void
poll_launch(Ec2Step *step, const char *vm_id)
{
	Ec2Progress *progress = &step->progress;
	const HttpReply *reply = step->reply;
	AwsError error;
	XmlDoc *doc;
	char *state;

	step->out->operation = DESCRIBE;
	if (reply == NULL)
	{
		if (step->context->ending)
			step->out->kind = STEP_DONE;
		else
			ec2_send_describe(step, vm_id);
		return;
	}

	error = aws_judge(reply);
	if (error.class != CLASS_NONE && strcmp(error.code, NOT_FOUND_CODE) != 0)
	{
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}
	doc = error.class == CLASS_NONE ? ec2_parse(step) : NULL;
	if (error.class == CLASS_NONE && xml_count(doc, "/DescribeInstancesResponse") == 0)
	{
		ec2_fail_malformed(step);
		return;
	}
	state = ec2_learn_instance(step, doc);

	if (step->context->ending)
		step->out->kind = STEP_DONE;
	else if (state == NULL)
	{
		int64 launched = progress->launched;

		if (launched == 0 && step->session->launched_at != 0)
			launched = boot_epoch_ms(step->session->launched_at);
		if (step->now < launched + APPEARS_WITHIN_MS)
			ec2_wait(step, POLL_FIRST_MS, POLL_LAST_MS, 0);
		else
			ec2_fail(step, CLASS_NOT_FOUND, NOT_FOUND_CODE, "the instance does not exist");
	}
	else if (strcmp(state, "running") == 0)
	{
		step->out->kind = STEP_DONE;
		step->out->running = true;
	}
	else if (strcmp(state, "pending") == 0)
		ec2_wait(step, POLL_FIRST_MS, POLL_LAST_MS, 0);
	else if (strcmp(state, "shutting-down") == 0 || strcmp(state, "terminated") == 0 ||
			 ec2_was_interrupted(doc))
	{
		char *code = xml_text(doc, "//instancesSet/item/stateReason/code");
		char *message = xml_text(doc, "//instancesSet/item/stateReason/message");

		ec2_fail(step, CLASS_NOT_FOUND, code != NULL ? code : "InstanceTerminated",
				 message != NULL ? message : "the instance has ended while it started");
	}
	else
		ec2_fail(step, CLASS_PERMANENT, "InstanceStopped",
				 psprintf("the instance is in state \"%s\" instead of running", state));
}

void
ec2_provision(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	const char *vm_id = step->session->vm_id != NULL ? step->session->vm_id : progress->vm_id;

	if (vm_id != NULL)
		poll_launch(step, vm_id);
	else if (progress->phase != NULL && strcmp(progress->phase, FIND_PHASE) == 0)
		find_launch(step);
	else if (step->reply != NULL && progress->phase != NULL &&
			 strcmp(progress->phase, PUT_PHASE) == 0)
	{
		if (!ec2_parameter_is_put(step))
			return;
		step->reply = NULL;
		ec2_provision(step);
	}
	else if (step->reply != NULL)
		take_launch_reply(step);
	else if (step->context->ending)
	{
		step->out->operation = RUN;
		ec2_fail(step, CLASS_TRANSIENT, "SessionEnding", "the session is to end");
	}
	else
	{
		if (progress->form == NULL)
		{
			progress->market = first_market(step->context->options);
			begin_attempt(step);
		}
		send_launch(step);
	}
}

/* All that varies in size between sessions is known before there is one. */
void
ec2_check_launch(Jsonb *options, bool runtime)
{
	int len = runtime ? boot_script_size(NULL) : 0;

	if (ec2_uses_parameter(options, runtime))
		ec2_check_parameter(options);
	else if (len > MAX_USER_DATA)
		ereport(
			ERROR, errcode(AVM_OVER_LIMIT),
			errmsg("user data of %d bytes, more than the %d that EC2 takes", len, MAX_USER_DATA),
			errhint("The file that agentvm.gateway_ca_file names takes most of it: leave only "
					"the gateway's authority in it."),
			hide_caller());
}
