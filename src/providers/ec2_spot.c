/*-------------------------------------------------------------------------
 *
 * ec2_spot.c
 *		Persistent spot requests, whose instances can be stopped and started.
 *
 * Whenever an instance of such a request has ended, AWS launches another one, of which
 * nobody knows: it has no tags.  So on every way on which we end an instance its
 * request is cancelled first, and what can be ended only is not ended if that is refused.
 * A repeat of the cancellation changes nothing, so that after a crash it is made once more.
 *
 * "request" in the handle is that of the session's instance, if that is persistent.  Where AWS
 * has not told its id with the instance, or there is no handle, as in a session that was adopted,
 * the instance is looked at first: by its tag it says what it is.
 *
 * We are not the only ones by whom an instance may end.  One that shuts itself down
 * is stopped rather than terminated, and the request expires when the VM's hard stop comes.
 * Where an instance had ended before its request was cancelled, those that the request has launched
 * are looked for and ended; a policy that goes by tags does not allow that, but then the
 * session does not end silently.
 *
 * An interruption stops the instance, too; AWS starts it when there is room again, and
 * nobody else can.  To us it counts as lost.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "providers/ec2.h"

/* Ec2Progress.phase of OP_TERMINATE */
#define LOOK_PHASE "request"
#define CANCEL_PHASE "cancel"
#define OTHERS_PHASE "others" /* is there one that took the instance's place? */
#define END_OTHER_PHASE "end-other"

#define UNKNOWN_REQUEST "?" /* Ec2Progress.request: there is one */

bool
ec2_is_persistent(Jsonb *options, const char *market)
{
	return market != NULL && strcmp(market, SPOT) == 0 &&
		   option_bool(options, "spot_persistent", false);
}

bool
ec2_was_interrupted(XmlDoc *doc)
{
	char *state = xml_text(doc, "//instancesSet/item/instanceState/name");
	char *code = xml_text(doc, "//instancesSet/item/stateReason/code");

	return state != NULL && (strcmp(state, "stopping") == 0 || strcmp(state, "stopped") == 0) &&
		   code != NULL && strncmp(code, INTERRUPTED, strlen(INTERRUPTED)) == 0;
}

/* The id of the request of the first instance in an answer, or NULL. */
static char *
request_in(XmlDoc *doc)
{
	char *id = xml_text(doc, "//instancesSet/item/spotInstanceRequestId");

	return id != NULL && ec2_is_id(id, "sir-") ? id : NULL;
}

void
ec2_learn_request(Ec2Step *step, XmlDoc *doc)
{
	Ec2Progress *progress = &step->progress;

	if (!ec2_is_persistent(step->context->options, step->out->purchase))
		return;
	progress->request = request_in(doc);
	if (progress->request == NULL)
		progress->request = UNKNOWN_REQUEST;
	progress->request_until = progress->boot.hard_stop;
}

void
ec2_cancel_form(AwsForm *form, List *requests)
{
	ListCell *lc;
	int n = 0;

	aws_form_init(form, CANCEL, EC2_VERSION);
	foreach (lc, requests)
		aws_form_add(form, psprintf("SpotInstanceRequestId.%d", ++n), lfirst(lc));
}

/* Whether there is a request, and AWS has told which. */
static bool
is_known(const Ec2Progress *progress)
{
	return progress->request != NULL && strcmp(progress->request, UNKNOWN_REQUEST) != 0;
}

/* The first instance in an answer, or NULL. */
static XmlNode *
instance_in(XmlDoc *doc)
{
	return xml_below(xml_below(xml_root(doc), "reservationSet/item"), "instancesSet/item");
}

/* Whether an instance says of itself that its request is persistent. */
static bool
says_persistent(XmlNode *instance)
{
	for (XmlNode *tag = xml_below(instance, "tagSet/item"); tag != NULL; tag = xml_next(tag))
	{
		char *key = xml_below_text(tag, "key");
		char *value = xml_below_text(tag, "value");

		if (key != NULL && strcmp(key, SPOT_TAG) == 0)
			return value != NULL && strcmp(value, PERSISTENT) == 0;
	}
	return false;
}

/* There is no request that would launch anything: the reply has been taken in. */
static bool
let_go(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;

	if (is_known(progress))
		progress->cancelled = 1;
	else
		progress->request = NULL;
	progress->phase = NULL;
	progress->looks = progress->wait = 0;
	step->reply = NULL;
	return true;
}

/* What the instance says; returns whether it is known what to do, else the step has ended. */
static bool
take_look(Ec2Step *step, const char *vm_id)
{
	Ec2Progress *progress = &step->progress;
	AwsError error = aws_judge(step->reply);
	XmlNode *instance = NULL;
	char *id = NULL;

	step->out->operation = DESCRIBE;
	if (error.class == CLASS_NONE)
	{
		XmlDoc *doc = ec2_parse(step);

		if (xml_count(doc, "/DescribeInstancesResponse") == 0)
		{
			ec2_fail_malformed(step);
			return false;
		}
		instance = instance_in(doc);
		id = request_in(doc);
	}
	else if (strcmp(error.code, NOT_FOUND_CODE) != 0)
	{
		ec2_fail(step, error.class, error.code, error.message);
		return false;
	}

	if (id != NULL && (progress->request != NULL || says_persistent(instance)))
	{
		progress->vm_id = vm_id;
		progress->request = id;
		step->reply = NULL;
		return true;
	}
	if ((progress->request != NULL || instance == NULL) && ec2_look_again(step, LOOK_PHASE))
		return false;
	progress->vm_id = vm_id;
	return let_go(step);
}

/* The answer to the cancellation; as above. */
static bool
take_cancelled(Ec2Step *step, const char *vm_id)
{
	Ec2Progress *progress = &step->progress;
	AwsError error = aws_judge(step->reply);
	bool expired = progress->request_until != 0 && step->now / 1000 > progress->request_until;

	step->out->operation = CANCEL;
	if (error.class == CLASS_NONE)
	{
		char *state = xml_text(ec2_parse(step), "//spotInstanceRequestSet/item/state");

		if (state == NULL)
			ec2_fail_malformed(step);
		else if (strcmp(state, "cancelled") == 0 || strcmp(state, "closed") == 0 ||
				 strcmp(state, "completed") == 0)
			return let_go(step);
		else
			ec2_look_later(step, CANCEL_PHASE, 0);
		return false;
	}
	if (strcmp(error.code, NO_REQUEST_CODE) == 0)
	{
		ec2_note_error(step, &error);
		return (expired || !ec2_look_again(step, CANCEL_PHASE)) && let_go(step);
	}
	if (strcmp(error.code, "UnauthorizedOperation") == 0)
	{
		/* one that has been gone for long has lost its tags, by which a policy tells which are ours */
		ec2_note_error(step, &error);
		if (expired)
			return let_go(step);
		ec2_enter_phase(progress, REFUSED_PHASE);
		ec2_send_describe(step, vm_id);
		return false;
	}
	progress->looks = 0;
	ec2_fail(step, error.class, error.code, error.message);
	return false;
}

bool
ec2_request_is_gone(Ec2Step *step, const char *vm_id)
{
	Ec2Progress *progress = &step->progress;
	const char *phase = progress->phase != NULL ? progress->phase : "";
	const char *purchase = step->session->purchase;
	AwsForm form;

	if (strcmp(phase, CONFIRM_PHASE) == 0 || strcmp(phase, REFUSED_PHASE) == 0)
		return true; /* that is not about the request, or about no more than its cancellation */
	if (step->reply != NULL)
	{
		if (strcmp(phase, LOOK_PHASE) == 0)
		{
			if (!take_look(step, vm_id))
				return false;
		}
		else if (strcmp(phase, CANCEL_PHASE) == 0)
		{
			if (!take_cancelled(step, vm_id))
				return false;
		}
		else
			return true;
	}

	/* what has no handle of its launch was adopted */
	if ((progress->request != NULL && !is_known(progress)) ||
		(progress->request == NULL && progress->vm_id == NULL && purchase != NULL &&
		 strcmp(purchase, SPOT) == 0))
	{
		ec2_enter_phase(progress, LOOK_PHASE);
		ec2_send_describe(step, vm_id);
		return false;
	}
	if (progress->request == NULL || progress->cancelled != 0)
		return true;
	ec2_enter_phase(progress, CANCEL_PHASE);
	ec2_cancel_form(&form, list_make1(unconstify(char *, progress->request)));
	step->out->mutates = true;
	ec2_send(step, "ec2", CANCEL, &form);
	ec2_limit(step, CANCEL, progress->request);
	return false;
}

bool
ec2_ends_others(const Ec2Progress *progress)
{
	return progress->phase != NULL && (strcmp(progress->phase, OTHERS_PHASE) == 0 ||
									   strcmp(progress->phase, END_OTHER_PHASE) == 0);
}

/* Look for instances of the request that live. */
static void
look_for_others(Ec2Step *step)
{
	AwsForm form;

	ec2_enter_phase(&step->progress, OTHERS_PHASE);
	aws_form_init(&form, DESCRIBE, EC2_VERSION);
	aws_form_add(&form, "Filter.1.Name", "spot-instance-request-id");
	aws_form_add(&form, "Filter.1.Value.1", step->progress.request);
	ec2_add_living(&form, 2);
	ec2_send(step, "ec2", DESCRIBE, &form);
	ec2_limit(step, DESCRIBE_BY_FILTER, NULL);
}

void
ec2_end_others(Ec2Step *step)
{
	Ec2Progress *progress = &step->progress;
	bool ending = progress->phase != NULL && strcmp(progress->phase, END_OTHER_PHASE) == 0;
	AwsError error;
	AwsForm form;
	char *vm_id;
	char *state;

	if (step->reply == NULL)
	{
		look_for_others(step);
		return;
	}
	step->out->operation = ending ? TERMINATE : DESCRIBE;
	error = aws_judge(step->reply);
	if (ending)
		ec2_look_later(step, OTHERS_PHASE, 0);
	if (ending && strcmp(error.code != NULL ? error.code : "", "UnauthorizedOperation") == 0)
		error.message = psprintf("an instance that AWS has launched for spot request %s lives, but "
								 "ending it is not allowed",
								 progress->request);
	if (error.class != CLASS_NONE)
		ec2_fail(step, error.class, error.code, error.message);
	if (ending || error.class != CLASS_NONE)
		return;
	if (xml_count(ec2_parse(step), "/DescribeInstancesResponse") == 0)
	{
		ec2_fail_malformed(step);
		return;
	}
	vm_id = xml_text(step->doc, "//instancesSet/item/instanceId");
	state = xml_text(step->doc, "//instancesSet/item/instanceState/name");
	if (vm_id == NULL || !ec2_is_id(vm_id, "i-") || state == NULL ||
		strcmp(state, "shutting-down") == 0 || strcmp(state, "terminated") == 0)
	{
		step->out->kind = STEP_DONE;
		return;
	}
	ec2_enter_phase(progress, END_OTHER_PHASE);
	step->out->mutates = true;
	aws_form_init(&form, TERMINATE, EC2_VERSION);
	aws_form_add(&form, "InstanceId.1", vm_id);
	ec2_send(step, "ec2", TERMINATE, &form);
}
