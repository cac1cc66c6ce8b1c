/*-------------------------------------------------------------------------
 *
 * ec2_power.c
 *		Pausing: an instance is stopped, and started again.
 *
 * StopInstances and StartInstances have no token and need none: a repeat changes
 * nothing.  So a call whose answer is lost is sent again, and DescribeInstances
 * is asked until the instance is where it is to be.
 *
 * "power_sent" in the handle says how often the call may have been sent since the
 * matter was last settled; it is committed before the call leaves.  As long as it
 * stands, the engine does not give up.  It is settled by the instance being
 * there; by a refusal of a call that was sent but once; and by refusals with looks
 * in between that find the instance where it was.
 *
 * A one-time spot instance cannot be stopped; a persistent one can, and started again once
 * AWS has seen the stop through.  One that AWS has stopped is lost (ec2_spot.c).
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "db.h"
#include "providers/ec2.h"

/* Ec2Progress.phase of OP_PAUSE and OP_RESUME, one for each so that neither takes over the other's */
#define STOP_PHASE "stop"
#define STOP_LOOK_PHASE "stop-look"
#define START_PHASE "start"
#define START_LOOK_PHASE "start-look"

#define POLL_FIRST_MS 2000
#define POLL_LAST_MS 10000
#define LOOKS 4 /* in vain, until a refusal or the absence of an instance is believed */

/* One of the two ways. */
typedef struct Way
{
	const char *call;
	const char *phase;
	const char *look_phase;
	const char *from; /* states of the instance */
	const char *during;
	const char *to;
} Way;

static const Way stop_way = {STOP, STOP_PHASE, STOP_LOOK_PHASE, "running", "stopping", "stopped"};
static const Way start_way = {START,	 START_PHASE, START_LOOK_PHASE,
							  "stopped", "pending",	  "running"};

void
ec2_check_pause(const ProviderSession *session, Jsonb *options)
{
	if (session->vm_id == NULL || session->purchase == NULL)
		ereport(ERROR, (errcode(AVM_NOT_READY),
						errmsg("session %s cannot be paused yet: AWS has not told what it is",
							   session->session_id),
						errhint("Try again in a moment.")));
	if (strcmp(session->purchase, SPOT) == 0 && !ec2_is_persistent(options, SPOT))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("session %s cannot be paused: it is a one-time spot instance",
						session->session_id),
				 errdetail("AWS stops spot instances of persistent requests only."),
				 errhint("Sessions that are to be paused need option spot_persistent = true, or "
						 "spot = false.")));
}

static bool
is(const char *state, const char *name)
{
	return state != NULL && strcmp(state, name) == 0;
}

static void
send_call(Ec2Step *step, const Way *way, const char *vm_id)
{
	Ec2Progress *progress = &step->progress;
	AwsForm form;

	progress->phase = way->phase;
	progress->power_sent++;
	step->out->mutates = true;
	aws_form_init(&form, way->call, EC2_VERSION);
	aws_form_add(&form, "InstanceId.1", vm_id);
	ec2_send(step, "ec2", way->call, &form);
	ec2_limit(step, way->call, NULL);
}

/* The matter is settled: nothing of it is left in the handle. */
static void
settle(Ec2Progress *progress)
{
	progress->phase = NULL;
	progress->power_sent = progress->looks = progress->wait = 0;
}

static void
done(Ec2Step *step)
{
	settle(&step->progress);
	step->out->kind = STEP_DONE;
}

/* Look after a while. */
static void
look_later(Ec2Step *step, const Way *way)
{
	step->progress.phase = way->look_phase;
	ec2_wait(step, POLL_FIRST_MS, POLL_LAST_MS, 0);
}

/* The answer to the call itself. */
static void
take_answer(Ec2Step *step, const Way *way)
{
	Ec2Progress *progress = &step->progress;
	const HttpReply *reply = step->reply;
	AwsError error = aws_judge(reply);
	bool not_done;

	step->out->operation = way->call;
	progress->power_sent += Max(reply->sends - 1, 0);
	if (error.class == CLASS_NONE)
	{
		char *state = xml_text(ec2_parse(step), "//instancesSet/item/currentState/name");

		if (state == NULL)
			ec2_fail_malformed(step);
		else if (is(state, way->to))
		{
			/* its address may be another one */
			progress->phase = way->look_phase;
			ec2_send_describe(step, step->session->vm_id);
		}
		else
			look_later(step, way);
		return;
	}

	not_done = error.class == CLASS_THROTTLED || (reply->status == 0 && !reply->maybe_sent);
	if (error.class == CLASS_TRANSIENT || error.class == CLASS_THROTTLED)
	{
		if (not_done && progress->power_sent == 1)
			progress->power_sent = 0;
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}

	/*
	 * It is not where it can be called; or it has ended, and has lost the tags by which a
	 * policy knows it; or an earlier call may have been taken.
	 */
	if (error.class == CLASS_NOT_FOUND || strcmp(error.code, "IncorrectInstanceState") == 0 ||
		strcmp(error.code, "IncorrectSpotRequestState") == 0 ||
		(strcmp(error.code, "UnauthorizedOperation") == 0 && progress->looks == 0) ||
		(progress->power_sent > 1 && progress->looks < LOOKS))
	{
		if (progress->power_sent == 1)
			progress->power_sent = 0;
		ec2_note_error(step, &error);
		look_later(step, way);
		return;
	}
	settle(progress);
	ec2_fail(step, error.class, error.code, error.message);
}

/* The instance is where it was: was the call taken, and why has nothing come of it? */
static void
take_standstill(Ec2Step *step, const Way *way, XmlDoc *doc)
{
	Ec2Progress *progress = &step->progress;
	char *code = xml_text(doc, "//instancesSet/item/stateReason/code");
	char *message = xml_text(doc, "//instancesSet/item/stateReason/message");

	/*
	 * A start that was taken may fail all the same: "Server.InsufficientInstanceCapacity".
	 * The first time it may be why the instance was stopped before.
	 */
	if (++progress->looks > 1 && code != NULL && strncmp(code, "Server.", 7) == 0)
	{
		settle(progress);
		ec2_fail(step,
				 strcmp(code, "Server.InsufficientInstanceCapacity") == 0 ? CLASS_CAPACITY
																		  : CLASS_PERMANENT,
				 code, message != NULL ? message : "the instance did not start");
	}
	else if (progress->looks > 2 * LOOKS)
	{
		char *text = psprintf("the instance stays %s", way->from);

		settle(progress);
		ec2_fail(step, CLASS_PERMANENT, way->call, text);
	}
	else
	{
		progress->phase = way->phase;
		ec2_wait(step, POLL_FIRST_MS, POLL_LAST_MS, 0);
	}
}

/* What DescribeInstances says. */
static void
take_look(Ec2Step *step, const Way *way)
{
	Ec2Progress *progress = &step->progress;
	AwsError error = aws_judge(step->reply);
	XmlDoc *doc = NULL;
	char *state;

	step->out->operation = DESCRIBE;
	if (error.class == CLASS_NONE)
		doc = ec2_parse(step);
	else if (strcmp(error.code, NOT_FOUND_CODE) != 0)
	{
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}
	if (error.class == CLASS_NONE && xml_count(doc, "/DescribeInstancesResponse") == 0)
	{
		ec2_fail_malformed(step);
		return;
	}

	state = ec2_learn_instance(step, doc);
	if (state == NULL)
	{
		if (++progress->looks < LOOKS)
			look_later(step, way);
		else
			ec2_fail(step, CLASS_NOT_FOUND, NOT_FOUND_CODE, "the instance does not exist");
	}
	else if (is(state, "shutting-down") || is(state, "terminated") || ec2_was_interrupted(doc))
	{
		char *code = xml_text(doc, "//instancesSet/item/stateReason/code");
		char *message = xml_text(doc, "//instancesSet/item/stateReason/message");

		ec2_fail(step, CLASS_NOT_FOUND, code != NULL ? code : "InstanceTerminated",
				 message != NULL ? message : "the instance has ended");
	}
	else if (is(state, way->to))
		done(step);
	else if (is(state, way->from))
		take_standstill(step, way, doc);
	else
	{
		/* on its way; or on the other one, at whose end it can be called */
		progress->looks = 0;
		look_later(step, way);
	}
}

void
ec2_power(Ec2Step *step)
{
	const Way *way = step->context->op == OP_PAUSE ? &stop_way : &start_way;
	Ec2Progress *progress = &step->progress;
	bool looking = is(progress->phase, way->look_phase);

	step->out->operation = looking ? DESCRIBE : way->call;
	if (!looking && !is(progress->phase, way->phase))
		settle(progress); /* of what was before, nothing counts here */
	if (step->session->vm_id == NULL)
		ec2_fail(step, CLASS_PERMANENT, "NoInstance", "the session has no instance");
	else if (step->reply != NULL && looking)
		take_look(step, way);
	else if (step->reply != NULL)
		take_answer(step, way);
	else if (looking)
		ec2_send_describe(step, step->session->vm_id);
	else
		send_call(step, way, step->session->vm_id);
}
