/*-------------------------------------------------------------------------
 *
 * ec2_parameter.c
 *		The payload of a boot as a parameter of SSM, for secret_delivery = 'ssm'.
 *
 * User data can be read by whoever may describe the instance, and stays for as
 * long as that lives.  So it may hold the name of a SecureString parameter
 * instead, which the VM reads with the role of its instance profile, and which
 * is deleted once the runtime has reported, or when the session ends.
 *
 * A session has one parameter, whatever the number of its launch attempts: a
 * later one overwrites it.  Its bytes are the same each time that the same attempt
 * writes it, so a write that may have been lost is just repeated.  The name is in the handle, and
 * so committed, before it is written the first time: whatever happens then, the end
 * of the session deletes it.  If a write was never answered, also one that was then
 * repeated, it is deleted once more when no copy of it can be on its way any more.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "lib/stringinfo.h"

#include "db.h"
#include "providers/ec2.h"
#include "secret/secret.h"

#define MAX_STANDARD 4096 /* bytes of a value in SSM's standard tier, which costs nothing */
#define MAX_ADVANCED 8192
#define WAIT_FIRST_MS 1000
#define WAIT_LAST_MS 30000

bool
ec2_uses_parameter(Jsonb *options, bool runtime)
{
	char *delivery = option_text(options, "secret_delivery");

	return runtime && delivery != NULL && strcmp(delivery, SSM) == 0;
}

char *
ec2_parameter_name(const char *cluster, const char *session_id)
{
	return psprintf("/agentvm/%s/%s", cluster, session_id);
}

/* The step's request: a call of SSM. */
static void
send(Ec2Step *step, const char *operation, const char *json)
{
	step->out->kind = STEP_REQUEST;
	step->out->operation = operation;
	step->out->mutates = true;
	step->out->request = aws_json_request(
		SSM, ec2_region(step), psprintf("AmazonSSM.%s", operation), json, ec2_signer(step));
}

void
ec2_put_parameter(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	StringInfoData json;
	char *payload;
	int len;

	payload =
		boot_payload(&progress->boot, step->session->session_id, (int) progress->attempt, &len);
	progress->parameter = ec2_parameter_name(step->session->cluster, step->session->session_id);
	progress->phase = PUT_PHASE;
	progress->puts++;
	progress->put_open = progress->put_at;
	progress->put_at = step->now;

	/* base64, ids: nothing in it has to be escaped */
	initStringInfo(&json);
	enlargeStringInfo(&json, len + 1024);
	appendStringInfo(&json,
					 "{\"Name\":\"%s\",\"Value\":\"%s\",\"Type\":\"SecureString\","
					 "\"Overwrite\":true,\"Tier\":\"%s\"}",
					 progress->parameter, payload, len <= MAX_STANDARD ? "Standard" : "Advanced");
	secret_wipe(payload, len);
	secret_wipe_later(json.data, json.len);

	/* the payload's token counts from the moment at which it leaves */
	step->out->attempt = (int) progress->attempt;
	step->out->region = progress->region;
	send(step, PUT_PARAMETER, json.data);
}

bool
ec2_parameter_is_put(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	const HttpReply *reply = step->reply;
	AwsError error = aws_judge(reply);
	bool refused;

	step->out->operation = PUT_PARAMETER;
	progress->phase = NULL;
	progress->puts += Max(reply->sends - 1, 0);
	if (error.class == CLASS_NONE)
	{
		progress->put = progress->attempt;
		progress->puts = 0;
		/* one before it that was not answered may arrive yet */
		if (reply->sends <= 1)
			progress->put_at = progress->put_open;
		progress->put_open = 0;
		return true;
	}

	/* As with a launch: a refusal settles the matter if nothing has been sent before. */
	refused = error.class != CLASS_TRANSIENT || (reply->status == 0 && !reply->maybe_sent);
	if (refused && progress->puts <= 1)
	{
		progress->puts = 0;
		progress->put_at = progress->put_open;
		progress->put_open = 0;
		if (progress->put == 0 && progress->put_at == 0)
			progress->parameter = NULL;
	}
	ec2_fail(step, error.class, error.code, error.message);
	return false;
}

void
ec2_delete_parameter(Ec2Step *step, const char *name)
{
	send(step, DELETE_PARAMETER, psprintf("{\"Name\":\"%s\"}", name));
}

AwsError
ec2_parameter_deleted(const HttpReply *reply)
{
	AwsError error = aws_judge(reply);

	if (error.class != CLASS_NONE && strcmp(error.code, "ParameterNotFound") == 0)
		error.class = CLASS_NONE;
	return error;
}

void
ec2_drop_parameter(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	int64 settled = progress->put_at + avm_lease_ms;
	AwsError error;

	step->out->operation = DELETE_PARAMETER;
	if (progress->parameter == NULL)
	{
		step->out->kind = STEP_DONE;
		return;
	}
	if (step->reply == NULL)
	{
		ec2_delete_parameter(step, progress->parameter);
		return;
	}

	error = ec2_parameter_deleted(step->reply);
	if (error.class != CLASS_NONE)
		ec2_fail(step, error.class, error.code, error.message);
	else if (progress->put_at != 0 && step->now < settled)
		ec2_wait(step, WAIT_FIRST_MS, WAIT_LAST_MS, settled);
	else
	{
		progress->parameter = NULL;
		progress->phase = NULL;
		progress->put = progress->puts = progress->put_at = progress->put_open = 0;
		step->out->kind = STEP_DONE;
	}
}

void
ec2_check_parameter(Jsonb *options)
{
	int len;

	if (option_text(options, "instance_profile") == NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("option \"secret_delivery\" of provider \"ec2\" is \"ssm\", but "
					   "\"instance_profile\" is not set"),
				errhint("The VM reads its parameter with the role of its instance profile, which "
						"needs ssm:GetParameter for it."),
				hide_caller());
	len = boot_payload_size();
	if (len > MAX_ADVANCED)
		ereport(ERROR, errcode(AVM_OVER_LIMIT),
				errmsg("boot payload of %d bytes, more than the %d that a parameter of SSM takes",
					   len, MAX_ADVANCED),
				errhint("The file that agentvm.gateway_ca_file names takes most of it: leave only "
						"the gateway's authority in it."),
				hide_caller());
}
