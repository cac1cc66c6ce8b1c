/*-------------------------------------------------------------------------
 *
 * aws_login.c
 *		Whom AWS takes us for: access keys, assumed roles, the server's own machine.
 *
 * What calls are signed with comes from, in this order: the team's access keys;
 * the server's environment; the metadata service of the server's machine.  The
 * last two only where the administrator allows it.  Where the team has set a
 * role, these are but what assumes it.
 *
 * The metadata service is asked as version 2 only: a token by PUT, then the name
 * of the machine's role, then its keys.  It is one hop away or not there at all,
 * so each call has two seconds.
 *
 * A role is assumed with the external id that we have made for the team, so that
 * no team can have us assume the role of another one's account, and for one kind
 * of operation: what is assumed to end VMs can launch none.  The
 * name of the role's session is the id of the agentvm session that needed it
 * first; others of the team share it until it is about to expire.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "lib/stringinfo.h"
#include "utils/datetime.h"
#include "utils/timestamp.h"

#include "net/aws.h"
#include "net/json.h"
#include "net/xml.h"
#include "providers/aws_login.h"
#include "secret/credentials.h"

#define STS_VERSION "2011-06-15"

#define METADATA "metadata"
#define METADATA_TIMEOUT_MS 2000
#define METADATA_TOKEN_S 60
#define ROLES_PATH "/latest/meta-data/iam/security-credentials/"

#define MARGIN_US (5 * 60 * INT64CONST(1000000)) /* before they expire, credentials count as old */
#define LEAST_US (10 * INT64CONST(1000000))		 /* but not right away, whatever our clock says */
#define LONGEST_S (12 * 3600)
#define ROLE_S 3600		/* the most that a role which was assumed by a role may have */
#define ROLE_ONCE_S 900 /* the least that there is: for a question */

/* What an operation is allowed to do with a role. */
typedef enum LoginKind
{
	KIND_LAUNCH,
	KIND_TERMINATE,
	KIND_POWER,
	KIND_INSPECT,
	KIND_CHECK
} LoginKind;

static const char *const kind_names[] = {"launch", "terminate", "power", "inspect", "check"};

static LoginKind
kind_of(ProviderOp op)
{
	switch (op)
	{
		case OP_PROVISION:
		case OP_TIDY:
			return KIND_LAUNCH;
		case OP_TERMINATE:
		case OP_LIST:
		case OP_REAP:
			return KIND_TERMINATE;
		case OP_PAUSE:
		case OP_RESUME:
			return KIND_POWER;
		case OP_INSPECT:
			return KIND_INSPECT;
		case OP_CHECK:
			return KIND_CHECK;
	}
	return KIND_INSPECT; /* keep compiler quiet */
}

static bool
has_keys(const SecretSet *secrets)
{
	return secret_set_get(secrets, "access_key_id") != NULL &&
		   secret_set_get(secrets, "secret_access_key") != NULL;
}

static bool
is_metadata(const char *login)
{
	return login != NULL && strncmp(login, METADATA, strlen(METADATA)) == 0;
}

/* Whether the payload of a session's boot is kept in SSM. */
static bool
uses_ssm(const LoginContext *context)
{
	char *delivery = option_text(context->options, "secret_delivery");

	return delivery != NULL && strcmp(delivery, "ssm") == 0;
}

/* Set a step's failure. */
static void
fail(LoginStep *step, ErrorClass class, const char *code, const char *message)
{
	step->kind = STEP_FAILED;
	step->error_class = class;
	step->error_code = code;
	step->error_message = message;
}

bool
aws_is_role_arn(const char *text)
{
	const char *p;

	/* arn:PARTITION:iam::ACCOUNT:role/PATH/NAME */
	if (strlen(text) > 600 || strncmp(text, "arn:aws", 7) != 0)
		return false;
	p = text + 7 + strspn(text + 7, "-abcdefghijklmnopqrstuvwxyz");
	if (strncmp(p, ":iam::", 6) != 0 || strspn(p + 6, "0123456789") != 12 ||
		strncmp(p + 18, ":role/", 6) != 0)
		return false;
	p += 24;
	return *p != '\0' && p[strlen(p) - 1] != '/' &&
		   strspn(p, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+=,.@-/") ==
			   strlen(p);
}

char *
aws_login_needed(const LoginContext *context)
{
	char *role = option_text(context->team_options, "role_arn");
	char *url;

	if (context->via == NULL && secret_set_is_empty(context->secrets))
	{
		/* "ec2": all providers that are AWS have the server's credentials in common */
		url = credentials_metadata_url("ec2");
		return url != NULL ? psprintf(METADATA " %s", url) : NULL;
	}
	if (role == NULL || !has_keys(context->secrets) ||
		(context->via != NULL && !is_metadata(context->via)))
		return NULL;
	return psprintf(
		"role %s %s%s %s %s %s", role, kind_names[kind_of(context->op)],
		uses_ssm(context) ? " ssm" : "", context->external_id != NULL ? context->external_id : "",
		context->cluster != NULL ? context->cluster : "", secret_set_digest(context->secrets));
}

bool
aws_login_expired(const HttpReply *reply)
{
	AwsError error;

	if (reply->status < 400)
		return false;
	error = aws_judge(reply);
	return error.class != CLASS_NONE && aws_code_is_expired(error.code);
}

/* "2026-01-31T12:34:56Z", or DT_NOEND where it is no such thing. */
static TimestampTz
read_time(const char *text)
{
	int year, month, day, hour, minute, second;

	if (text == NULL ||
		sscanf(text, "%4d-%2d-%2dT%2d:%2d:%2d", &year, &month, &day, &hour, &minute, &second) !=
			6 ||
		year < 1970 || month < 1 || month > 12 || day < 1 || day > 31 || hour < 0 || hour > 23 ||
		minute < 0 || minute > 59 || second < 0 || second > 60)
		return DT_NOEND;
	return (date2j(year, month, day) - POSTGRES_EPOCH_JDATE) * USECS_PER_DAY +
		   hour * USECS_PER_HOUR + minute * USECS_PER_MINUTE + second * USECS_PER_SEC;
}

/*
 * Until when credentials may be used for new calls: "expires" as AWS has it, and
 * at most so many seconds from now, since the clocks may differ.
 */
static TimestampTz
good_until(const LoginContext *context, const char *expires, int64 longest_s)
{
	TimestampTz until = Min(context->now + longest_s * USECS_PER_SEC, read_time(expires));

	return Max(until - MARGIN_US, context->now + LEAST_US);
}

/* ---- the metadata service ---- */

static void
ask_metadata(LoginStep *step, const char *method, const char *url, const Secret *token,
			 const char *operation)
{
	HttpRequest *request = palloc0(sizeof(HttpRequest));

	request->method = method;
	request->url = url;
	request->metadata = true;
	request->metadata_token = token;
	if (token == NULL)
		request->headers =
			list_make1(psprintf("X-aws-ec2-metadata-token-ttl-seconds: %d", METADATA_TOKEN_S));
	request->timeout_ms = METADATA_TIMEOUT_MS;
	step->kind = STEP_REQUEST;
	step->operation = operation;
	step->request = request;
}

/* Whether the reply is of use; else the step has failed. */
static bool
metadata_answered(const HttpReply *reply, LoginStep *step)
{
	if (reply->status == 200 && reply->body_len > 0)
		return true;
	if (reply->status == 429 || reply->status >= 500)
		fail(step, CLASS_TRANSIENT, psprintf("HTTP %d", reply->status),
			 "the metadata service of the server's machine is not well");
	else if (reply->status == 0)
		fail(step, CLASS_CREDENTIALS, "MissingCredentials",
			 psprintf("the metadata service of the server's machine does not answer: %s",
					  reply->error != NULL ? reply->error : "no reply"));
	else
	{
		fail(step, CLASS_CREDENTIALS, "MissingCredentials",
			 psprintf("the metadata service of the server's machine answers with HTTP status %d",
					  reply->status));
		step->error_hint = "Attach an instance profile to the machine of the database server.";
	}
	return false;
}

/* The first line of the answer if it is the name of a role. */
static char *
role_name(const HttpReply *reply)
{
	size_t len = strcspn(reply->body, "\r\n");
	char *name = pnstrdup(reply->body, len);

	return len > 0 && len <= 64 &&
				   strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
								"0123456789_+=,.@-") == len
			   ? name
			   : NULL;
}

static void
take_machine_keys(const LoginContext *context, const HttpReply *reply, LoginStep *step)
{
	static const char *const fields[][2] = {{"access_key_id", "AccessKeyId"},
											{"secret_access_key", "SecretAccessKey"},
											{"session_token", "Token"}};

	step->secrets = secret_set_make();
	for (int i = 0; i < lengthof(fields); i++)
	{
		Secret *secret = json_secret(reply->body, reply->body_len, fields[i][1]);

		if (secret == NULL)
		{
			char *code = json_text(reply->body, reply->body_len, "Code");

			fail(step, CLASS_CREDENTIALS, "MissingCredentials",
				 psprintf("the metadata service of the server's machine has no keys for its role: "
						  "%.100s",
						  code != NULL ? code : "no document"));
			return;
		}
		secret_set_add(step->secrets, fields[i][0], secret);
	}
	step->kind = STEP_DONE;
	step->good_until =
		good_until(context, json_text(reply->body, reply->body_len, "Expiration"), LONGEST_S);
}

static void
metadata_step(const LoginContext *context, const HttpReply *reply, SecretSet *kept, LoginStep *step)
{
	char *url = credentials_metadata_url("ec2");
	const Secret *token = secret_set_get(kept, "token");
	const Secret *name = secret_set_get(kept, "name");
	const char *operation = token == NULL ? "PutMetadataToken" : "GetMetadata";

	step->operation = operation;
	if (url == NULL) /* the setting has changed meanwhile */
		fail(step, CLASS_CREDENTIALS, "MissingCredentials",
			 "the metadata service of the server's machine may not be used");
	else if (reply == NULL ||
			 (reply->status == 0 && token == NULL && secret_set_get(kept, "tried") == NULL))
	{
		if (reply != NULL)
			secret_set_add(kept, "tried", secret_make("", 0));
		ask_metadata(step, "PUT", psprintf("%s/latest/api/token", url), NULL, operation);
	}
	else if (!metadata_answered(reply, step))
		return;
	else if (token == NULL)
	{
		token = secret_make(reply->body, strcspn(reply->body, "\r\n"));
		secret_set_add(kept, "token", (Secret *) token);
		ask_metadata(step, "GET", psprintf("%s" ROLES_PATH, url), token, "GetMetadata");
	}
	else if (name == NULL)
	{
		char *role = role_name(reply);

		if (role == NULL)
		{
			fail(step, CLASS_CREDENTIALS, "MissingCredentials",
				 "the machine of the database server has no role");
			return;
		}
		secret_set_add(kept, "name", secret_make(role, strlen(role)));
		ask_metadata(step, "GET", psprintf("%s" ROLES_PATH "%s", url, role), token, "GetMetadata");
	}
	else
		take_machine_keys(context, reply, step);
}

/* ---- assumed roles ---- */

static void
add_statement(StringInfo policy, const char *actions, const char *resource, const char *condition)
{
	appendStringInfo(policy, "%s{\"Effect\":\"Allow\",\"Action\":[%s],\"Resource\":\"%s\"%s%s}",
					 policy->len > 0 ? "," : "", actions, resource,
					 condition != NULL ? ",\"Condition\":" : "",
					 condition != NULL ? condition : "");
}

/*
 * A policy that narrows the role to an operation.  It grants nothing that the
 * role itself is not allowed.
 */
static char *
session_policy(const LoginContext *context, const char *partition)
{
	LoginKind kind = kind_of(context->op);
	StringInfoData policy;

	initStringInfo(&policy);
	add_statement(&policy, "\"ec2:DescribeInstances\"", "*", NULL);
	if (kind == KIND_LAUNCH || kind == KIND_CHECK)
	{
		add_statement(&policy, "\"ec2:RunInstances\",\"ec2:CreateTags\"", "*", NULL);
		add_statement(&policy, "\"iam:PassRole\"", "*",
					  "{\"StringLike\":{\"iam:PassedToService\":\"ec2.*\"}}");
		/* the account's first spot instance ever */
		add_statement(&policy, "\"iam:CreateServiceLinkedRole\"", "*",
					  "{\"StringEquals\":{\"iam:AWSServiceName\":\"spot.amazonaws.com\"}}");
	}
	/* what EC2 and SSM encrypt in the caller's name: volumes, also at a start; parameters */
	if (kind == KIND_LAUNCH || kind == KIND_CHECK || kind == KIND_POWER)
		add_statement(&policy, "\"kms:*\"", "*",
					  "{\"StringLike\":{\"kms:ViaService\":[\"ec2.*\",\"ssm.*\"]}}");
	if ((kind == KIND_TERMINATE || kind == KIND_POWER) && context->cluster != NULL)
		add_statement(&policy,
					  kind == KIND_TERMINATE
						  ? "\"ec2:TerminateInstances\",\"ec2:CancelSpotInstanceRequests\""
						  : "\"ec2:StopInstances\",\"ec2:StartInstances\"",
					  "*",
					  psprintf("{\"StringEquals\":{\"ec2:ResourceTag/agentvm-cluster\":\"%s\"}}",
							   context->cluster));
	if (kind == KIND_CHECK)
		add_statement(&policy, "\"sts:DecodeAuthorizationMessage\"", "*", NULL);
	if (uses_ssm(context) && kind != KIND_INSPECT && kind != KIND_POWER && context->cluster != NULL)
		add_statement(
			&policy,
			kind == KIND_LAUNCH ? "\"ssm:PutParameter\",\"ssm:DeleteParameter\""
								: "\"ssm:DeleteParameter\"",
			psprintf("arn:%s:ssm:*:*:parameter/agentvm/%s/*", partition, context->cluster), NULL);
	return psprintf("{\"Version\":\"2012-10-17\",\"Statement\":[%s]}", policy.data);
}

/* How long an assumed role is asked for, in seconds. */
static int
role_duration(const LoginContext *context)
{
	LoginKind kind = kind_of(context->op);

	return kind == KIND_INSPECT || kind == KIND_CHECK ? ROLE_ONCE_S : ROLE_S;
}

static void
assume_role(const LoginContext *context, const char *role, LoginStep *step)
{
	char *region = option_text(context->options, "region");
	AwsForm form;

	if (region == NULL)
		region = option_text(context->team_options, "region");
	aws_form_init(&form, "AssumeRole", STS_VERSION);
	aws_form_add(&form, "RoleArn", role);
	aws_form_add(&form, "RoleSessionName",
				 context->session_id != NULL ? context->session_id
											 : kind_names[kind_of(context->op)]);
	aws_form_add(&form, "ExternalId", context->external_id);
	aws_form_add(&form, "DurationSeconds", psprintf("%d", role_duration(context)));
	aws_form_add(&form, "Policy",
				 session_policy(context, pnstrdup(role + 4, strcspn(role + 4, ":"))));
	step->kind = STEP_REQUEST;
	step->request = aws_form_request("sts", region, &form, context->secrets);
}

static void
take_role(const LoginContext *context, const HttpReply *reply, LoginStep *step)
{
	static const char *const fields[][2] = {
		{"access_key_id", "//AssumeRoleResult/Credentials/AccessKeyId"},
		{"secret_access_key", "//AssumeRoleResult/Credentials/SecretAccessKey"},
		{"session_token", "//AssumeRoleResult/Credentials/SessionToken"}};
	XmlDoc *doc = xml_parse(reply->body, reply->body_len);
	bool whole = true;

	step->secrets = secret_set_make();
	for (int i = 0; i < lengthof(fields); i++)
	{
		Secret *secret = xml_secret(doc, fields[i][1]);

		if (secret != NULL)
			secret_set_add(step->secrets, fields[i][0], secret);
		whole = whole && secret != NULL;
	}
	if (whole)
	{
		step->kind = STEP_DONE;
		step->good_until =
			good_until(context, xml_text(doc, "//AssumeRoleResult/Credentials/Expiration"),
					   role_duration(context));
	}
	else
		fail(step, CLASS_TRANSIENT, "MalformedReply",
			 "AWS's answer is not what AssumeRole answers");
	xml_free(doc);
}

static void
role_step(const LoginContext *context, const HttpReply *reply, LoginStep *step)
{
	char *role = option_text(context->team_options, "role_arn");
	AwsError error;

	step->operation = "AssumeRole";
	if (reply == NULL)
	{
		assume_role(context, role, step);
		return;
	}
	error = aws_judge(reply);
	if (error.class == CLASS_NONE)
	{
		take_role(context, reply, step);
		return;
	}
	fail(step, error.class, error.code, error.message);
	/* the machine's own keys are renewed before they expire: the next try has the new ones */
	if (context->via != NULL && aws_code_is_expired(error.code))
		step->error_class = CLASS_TRANSIENT;
	else if (error.class == CLASS_CREDENTIALS)
		step->error_hint =
			psprintf("Role \"%s\" has to trust whom the server is there, with the condition "
					 "sts:ExternalId = \"%s\", and who that is has to be allowed sts:AssumeRole.",
					 role, context->external_id);
}

void
aws_login_step(const LoginContext *context, const HttpReply *reply, SecretSet *kept,
			   LoginStep *step)
{
	/* as login_needed() has had it */
	if (context->via == NULL && secret_set_is_empty(context->secrets))
		metadata_step(context, reply, kept, step);
	else
		role_step(context, reply, step);
}
