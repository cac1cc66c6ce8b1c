/*-------------------------------------------------------------------------
 *
 * ec2_check.c
 *		check_provider(): whose credentials these are, and what they may do.
 *
 * Whose they are is asked first; all else is asked only of those who are known.
 * A launch is asked for as a dry run, of the very request that a session would send, so that
 * it tells of wrong options, too.  Where AWS says what is missing in a coded
 * form only, it is asked to decode it.  Nothing is changed by any of this: the
 * parameter that is deleted is none.
 *
 * Whether VMs may be ended, stopped and started cannot be asked without one, nor whether
 * spot requests may be cancelled.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "mb/pg_wchar.h"
#include "utils/fmgrprotos.h"

#include "net/json.h"
#include "providers/ec2.h"

#define DECODE "DecodeAuthorizationMessage"
#define IDENTITY "GetCallerIdentity"
#define CODED "Encoded authorization failure message:"
#define MAX_SHOWN 300 /* bytes of AWS's message that are shown */

/* What the answer has to be like; the last part of the handle. */
#define PHASE "phase"
#define RESULT "result"
#define PROBLEM "problem" /* the member of "missing" that waits for its decoding */

/* Codes that tell of an option, and which. */
static const char *const option_codes[][2] = {
	{"InvalidAMIID", "image_id"},
	{"InvalidSubnet", "subnet_ids"},
	{"InvalidGroup", "security_group_ids"},
	{"InvalidSecurityGroup", "security_group_ids"},
	{"InvalidKeyPair", "key_name"},
	{"InvalidBlockDeviceMapping", "volume_device"},
	{"InvalidIamInstanceProfile", "instance_profile"},
};

static Jsonb *
text_document(const char *text)
{
	JsonbValue value;

	value.type = jbvString;
	value.val.string.val = (char *) text;
	value.val.string.len = strlen(text);
	return JsonbValueToJsonb(&value);
}

static Jsonb *
document(const char *json)
{
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json)));
}

/* As much of a message as is shown. */
static char *
excerpt(const char *message)
{
	return pnstrdup(message, pg_mbcliplen(message, strlen(message), MAX_SHOWN));
}

/* A copy of an object with one more member in a list that it has. */
static Jsonb *
add_to_list(Jsonb *object, const char *name, Jsonb *member)
{
	JsonbValue *value = option_value(object, name);
	Jsonb *list = value != NULL ? JsonbValueToJsonb(value) : document("[]");

	list = DatumGetJsonbP(
		DirectFunctionCall2(jsonb_concat, JsonbPGetDatum(list), JsonbPGetDatum(member)));
	return handle_set_document(object, name, list);
}

static Jsonb *
result_so_far(const ProviderContext *context)
{
	JsonbValue *value = option_value(context->handle, RESULT);

	return value != NULL ? JsonbValueToJsonb(value) : document("{}");
}

/* Keep where we are, and go on. */
static void
keep(Ec2Step *step, const char *phase, Jsonb *result, Jsonb *problem)
{
	Jsonb *handle = handle_set_text(NULL, PHASE, phase);

	handle = handle_set_document(handle, RESULT, result);
	if (problem != NULL)
		handle = handle_set_document(handle, PROBLEM, problem);
	step->out->handle = handle;
}

/*
 * The team's options; where they do not say what to boot, with those of the first
 * profile that does.
 */
static Jsonb *
launch_options(const ProviderContext *context)
{
	ListCell *lc;

	if (option_text(context->options, "image_id") != NULL)
		return context->options;
	foreach (lc, context->profiles)
	{
		ProviderProfile *profile = lfirst(lc);

		if (option_text(profile->options, "image_id") != NULL)
			return provider_merge_options(&ec2_provider, context->options, profile->options);
	}
	return NULL;
}

static void
ask_describe(Ec2Step *step, Jsonb *result)
{
	AwsForm form;

	keep(step, DESCRIBE, result, NULL);
	aws_form_init(&form, DESCRIBE, EC2_VERSION);
	aws_form_add(&form, "DryRun", "true");
	ec2_send(step, "ec2", DESCRIBE, &form);
}

static void
ask_run(Ec2Step *step, Jsonb *result)
{
	ProviderSession session = {0};
	Jsonb *options = launch_options(step->context);
	Ec2Place place;
	AwsForm form;

	if (options == NULL)
	{
		Jsonb *problem = handle_set_text(NULL, "option", "image_id");

		problem = handle_set_text(problem, "error", "neither the team nor a profile sets it");
		problem =
			handle_set_text(problem, "hint", "Set it with agentvm.set_provider() or in a profile.");
		ask_describe(step, add_to_list(result, "problems", problem));
		return;
	}
	place = ec2_first_place(options);
	session.session_id = "check";
	session.cluster = step->context->cluster;
	keep(step, RUN, result, NULL);
	ec2_run_form(&form, &session, options, &place, NULL, 0);
	aws_form_add(&form, "DryRun", "true");
	ec2_send(step, "ec2", RUN, &form);
}

static void
ask_parameter(Ec2Step *step, Jsonb *result)
{
	keep(step, DELETE_PARAMETER, result, NULL);
	step->out->kind = STEP_REQUEST;
	step->out->operation = DELETE_PARAMETER;
	step->out->request = aws_json_request(
		SSM, ec2_region(step), "AmazonSSM." DELETE_PARAMETER,
		psprintf("{\"Name\":\"/agentvm/%s/check\"}", step->context->cluster), ec2_signer(step));
}

/* All has been asked. */
static void
finish(Ec2Step *step, Jsonb *result)
{
	static const char *const not_checked[] = {"ec2:" TERMINATE, "ec2:" STOP, "ec2:" START,
											  "ec2:" CANCEL};
	bool ok = option_value(result, "missing") == NULL && option_value(result, "problems") == NULL;

	for (int i = 0; i < lengthof(not_checked); i++)
		result = add_to_list(result, "not_checked", text_document(not_checked[i]));
	step->out->kind = STEP_DONE;
	step->out->result = handle_set_bool(result, "ok", ok);
}

/* What comes after an operation has been judged. */
static void
go_on(Ec2Step *step, const char *asked, Jsonb *result)
{
	char *delivery = option_text(step->context->options, "secret_delivery");

	if (strcmp(asked, RUN) == 0)
		ask_describe(step, result);
	else if (strcmp(asked, DESCRIBE) == 0 && delivery != NULL && strcmp(delivery, SSM) == 0)
		ask_parameter(step, result);
	else
		finish(step, result);
}

/* The action that a message says is not allowed, or NULL. */
static char *
action_in(const char *message)
{
	static const char mark[] = "is not authorized to perform: ";
	const char *at = strstr(message, mark);
	size_t len;

	if (at == NULL)
		return NULL;
	at += strlen(mark);
	len = strspn(at, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-");
	return len > 0 && len < 100 ? pnstrdup(at, len) : NULL;
}

/* Add what is not allowed, with what to do about it. */
static Jsonb *
add_missing(Ec2Step *step, Jsonb *result, Jsonb *problem)
{
	char *action = option_text(problem, "action");
	char *resource = option_text(problem, "resource");
	char *arn = option_text(result, "arn");
	char *who = arn != NULL ? arn : "the team";
	char *hint;

	if (strcmp(action, "iam:PassRole") == 0)
		hint = psprintf("Allow %s iam:PassRole for the role of instance profile \"%s\".", who,
						option_text(step->context->options, "instance_profile"));
	else
		hint = psprintf("Allow %s %s%s%s.", who, action, resource != NULL ? " on " : "",
						resource != NULL ? resource : "");
	return add_to_list(result, "missing", handle_set_text(problem, "hint", hint));
}

/* A refusal that is about rights: note it, decoded if need be.  Goes on. */
static void
take_refusal(Ec2Step *step, const char *asked, const AwsError *error, Jsonb *result)
{
	XmlDoc *doc = ec2_parse(step);
	char *message = doc != NULL ? xml_long_text(doc, "//Error/Message") : NULL;
	char *coded;
	char *action;
	Jsonb *problem;

	if (message == NULL)
		message = pstrdup(error->message);
	coded = strstr(message, CODED);
	if (coded != NULL)
	{
		*coded = '\0';
		coded += strlen(CODED);
		coded += strspn(coded, " ");
	}
	action = action_in(message);
	if (action == NULL)
		action = psprintf("%s:%s", strcmp(asked, DELETE_PARAMETER) == 0 ? SSM : "ec2", asked);
	problem = handle_set_text(NULL, "action", action);
	problem = handle_set_text(problem, "error", error->code);
	problem = handle_set_text(problem, "message", excerpt(message));
	if (coded != NULL && coded[0] != '\0')
	{
		AwsForm form;

		keep(step, DECODE, handle_set_text(result, "asked", asked), problem);
		aws_form_init(&form, DECODE, STS_VERSION);
		aws_form_add(&form, "EncodedMessage", coded);
		ec2_send(step, "sts", DECODE, &form);
		return;
	}
	go_on(step, asked, add_missing(step, result, problem));
}

/* What a refusal was about, if we may know that. */
static void
take_decoded(Ec2Step *step, Jsonb *result)
{
	JsonbValue *value = option_value(step->context->handle, PROBLEM);
	Jsonb *problem = JsonbValueToJsonb(value);
	char *asked = option_text(result, "asked");
	char *text = xml_long_text(ec2_parse(step), "//DecodedMessage");
	AwsError error = aws_judge(step->reply);

	result = handle_set_text(result, "asked", NULL);
	if (error.class == CLASS_NONE && text != NULL)
	{
		char *action = json_text(text, strlen(text), "context/action");
		char *resource = json_text(text, strlen(text), "context/resource");

		if (action != NULL && strlen(action) < 100)
			problem = handle_set_text(problem, "action", action);
		if (resource != NULL && strlen(resource) < 600)
			problem = handle_set_text(problem, "resource", resource);
	}
	else if (error.class != CLASS_NONE)
		problem = handle_set_text(problem, "decoding", error.code);
	go_on(step, asked, add_missing(step, result, problem));
}

/* The answer to a dry run, or to the deletion of what is not there. */
static void
take_answer(Ec2Step *step, const char *asked, Jsonb *result)
{
	AwsError error = aws_judge(step->reply);
	const char *service = strcmp(asked, DELETE_PARAMETER) == 0 ? SSM : "ec2";
	Jsonb *problem;

	if (error.class == CLASS_NONE || strcmp(error.code, "DryRunOperation") == 0 ||
		strcmp(error.code, "ParameterNotFound") == 0)
	{
		go_on(step, asked,
			  add_to_list(result, "allowed", text_document(psprintf("%s:%s", service, asked))));
		return;
	}
	if (error.class == CLASS_TRANSIENT || error.class == CLASS_THROTTLED ||
		aws_code_is_expired(error.code))
	{
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}
	if (error.class == CLASS_CREDENTIALS)
	{
		take_refusal(step, asked, &error, result);
		return;
	}

	problem = handle_set_text(NULL, "action", psprintf("%s:%s", service, asked));
	problem = handle_set_text(problem, "error", error.code);
	problem = handle_set_text(problem, "message", excerpt(error.message));
	for (int i = 0; i < lengthof(option_codes); i++)
	{
		if (strncmp(error.code, option_codes[i][0], strlen(option_codes[i][0])) == 0)
			problem = handle_set_text(problem, "hint",
									  psprintf("Look at option \"%s\".", option_codes[i][1]));
	}
	go_on(step, asked, add_to_list(result, "problems", problem));
}

/* Who we are: the one answer without which there is no other. */
static void
take_identity(Ec2Step *step)
{
	AwsError error = aws_judge(step->reply);
	Jsonb *result;
	XmlDoc *doc;

	if (error.class != CLASS_NONE)
	{
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}
	doc = ec2_parse(step);
	if (xml_count(doc, "//GetCallerIdentityResult/Account") == 0)
	{
		ec2_fail_malformed(step);
		return;
	}
	ec2_add_result(step, doc, "account", "//GetCallerIdentityResult/Account");
	ec2_add_result(step, doc, "arn", "//GetCallerIdentityResult/Arn");
	result = step->out->result;
	step->out->result = NULL;
	result = handle_set_text(result, "external_id", step->context->external_id);
	ask_run(step, add_to_list(result, "allowed", text_document("sts:" IDENTITY)));
}

void
ec2_check(Ec2Step *step)
{
	char *phase = option_text(step->context->handle, PHASE);
	AwsForm form;

	step->out->operation = phase != NULL ? phase : IDENTITY;
	if (step->reply == NULL)
	{
		/* from the beginning, also when it has got a new login in the middle */
		step->out->handle = document("{}");
		aws_form_init(&form, IDENTITY, STS_VERSION);
		ec2_send(step, "sts", IDENTITY, &form);
	}
	else if (phase == NULL)
		take_identity(step);
	else if (strcmp(phase, DECODE) == 0)
		take_decoded(step, result_so_far(step->context));
	else
		take_answer(step, phase, result_so_far(step->context));
}
