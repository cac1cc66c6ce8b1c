/*-------------------------------------------------------------------------
 *
 * ec2_list.c
 *		Which instances of ours there are in an account and region, and the end of some.
 *
 * The list is asked for by the tag that names our installation, page by page, and
 * what AWS answers is looked at once more: an instance without that tag, or with
 * another installation's, is none of ours.  Some time after its end an instance
 * has no tags any more, so those that are missed are asked for by their ids.
 *
 * TerminateInstances ends all that it names or none; after a refusal each is asked for
 * by itself.  Spot requests that would launch others in their place are cancelled before.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "utils/fmgrprotos.h"
#include "utils/json.h"
#include "utils/jsonb.h"

#include "providers/ec2.h"

#define MAX_PAGES 1000
#define MAX_PAGE_BYTES (8 * 1024 * 1024)

/* Members of the handle. */
#define NEXT_TOKEN "next_token"
#define PAGES "pages"
#define SINGLE                                                                                     \
	"single"		  /* index of the instance that is asked for alone, from 1 on; 0: all at once */
#define STAGE "stage" /* of that, or of those */
#define STAGE_LOOK 0  /* which of them are of persistent spot requests? */
#define STAGE_CANCEL 1
#define STAGE_END 2
#define DROPPED "dropped" /* so many parameters of sessions have been asked for */

/* Append a member to an object that is being written, if there is a value. */
static void
add_member(StringInfo json, const char *name, const char *value)
{
	if (value == NULL || value[0] == '\0')
		return;
	appendStringInfo(json, "%s\"%s\":", json->data[json->len - 1] == '{' ? "" : ",", name);
	escape_json(json, value);
}

/* Describe an instance as OP_LIST has it, if it carries our tag or "any" may be told of. */
static void
add_instance(StringInfo json, XmlNode *item, const char *cluster, bool any)
{
	static const char *const facts[][2] = {{"state", "instanceState/name"},
										   {"launched_at", "launchTime"},
										   {"purchase", "instanceLifecycle"},
										   {"reason_code", "stateReason/code"},
										   {"reason", "stateReason/message"}};
	static const char *const tags[][2] = {{"session_id", "agentvm-session-id"},
										  {"team_id", "agentvm-team-id"},
										  {"agent_id", "agentvm-agent-id"}};
	char *vm_id = xml_below_text(item, "instanceId");
	char *address = xml_below_text(item, "ipAddress");
	int begin = json->len;
	bool ours = any;

	if (vm_id == NULL || !ec2_is_id(vm_id, "i-"))
		return;
	if (json->data[json->len - 1] != '[')
		appendStringInfoChar(json, ',');
	appendStringInfoChar(json, '{');
	add_member(json, "vm_id", vm_id);
	for (int i = 0; i < lengthof(facts); i++)
		add_member(json, facts[i][0], xml_below_text(item, facts[i][1]));
	if (address == NULL || address[0] == '\0')
		address = xml_below_text(item, "privateIpAddress");
	if (address != NULL && ec2_is_made_of(address, DIGITS "abcdef:.", 64))
		add_member(json, "address", address);
	for (XmlNode *tag = xml_below(item, "tagSet/item"); tag != NULL; tag = xml_next(tag))
	{
		char *key = xml_below_text(tag, "key");

		if (key == NULL || strncmp(key, "agentvm-", 8) != 0)
			continue;
		for (int i = 0; i < lengthof(tags); i++)
		{
			if (strcmp(key, tags[i][1]) == 0)
				add_member(json, tags[i][0], xml_below_text(tag, "value"));
		}
		if (strcmp(key, "agentvm-cluster") == 0)
		{
			char *value = xml_below_text(tag, "value");

			ours = ours || (value != NULL && strcmp(value, cluster) == 0);
		}
	}
	appendStringInfoChar(json, '}');
	if (!ours)
	{
		json->len = begin;
		json->data[begin] = '\0';
	}
}

static Jsonb *
read_document(const char *json)
{
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json)));
}

/* What an answer to DescribeInstances tells of. */
static Jsonb *
read_page(XmlDoc *doc, const char *cluster, bool any)
{
	XmlNode *reservation = xml_below(xml_root(doc), "reservationSet/item");
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfoChar(&json, '[');
	for (; reservation != NULL; reservation = xml_next(reservation))
	{
		XmlNode *item = xml_below(reservation, "instancesSet/item");

		for (; item != NULL; item = xml_next(item))
			add_instance(&json, item, cluster, any);
	}
	appendStringInfoChar(&json, ']');
	return read_document(json.data);
}

static void
ask_page(Ec2Step *step, const char *next_token)
{
	List *ids = step->context->vm_ids;
	AwsForm form;
	ListCell *lc;
	int n = 0;

	aws_form_init(&form, DESCRIBE, EC2_VERSION);
	/* as a filter, for which ids that are not known are no error */
	aws_form_add(&form, "Filter.1.Name", ids != NIL ? "instance-id" : "tag:agentvm-cluster");
	foreach (lc, ids)
		aws_form_add(&form, psprintf("Filter.1.Value.%d", ++n), lfirst(lc));
	if (ids == NIL)
		aws_form_add(&form, "Filter.1.Value.1", step->context->cluster);
	aws_form_add(&form, "MaxResults", CppAsString2(AVM_MAX_LISTED));
	if (next_token != NULL)
		aws_form_add(&form, "NextToken", next_token);
	ec2_send(step, "ec2", DESCRIBE, &form);
	ec2_limit(step, DESCRIBE_BY_FILTER, NULL);
	step->out->request->max_reply = MAX_PAGE_BYTES;
}

void
ec2_list(Ec2Step *step)
{
	Jsonb *handle = step->context->handle;
	AwsError error;
	char *next;
	int64 pages;

	step->out->operation = DESCRIBE;
	if (step->reply == NULL)
	{
		ask_page(step, option_text(handle, NEXT_TOKEN));
		return;
	}
	error = aws_judge(step->reply);
	if (error.class != CLASS_NONE)
	{
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}
	step->doc = xml_parse_list(step->reply->body, step->reply->body_len, AVM_MAX_LISTED);
	if (xml_root(step->doc) == NULL || xml_count(step->doc, "/DescribeInstancesResponse") == 0)
	{
		ec2_fail_malformed(step);
		return;
	}
	ec2_learn_account(step, step->doc);
	step->out->result = read_page(step->doc, step->context->cluster, step->context->vm_ids != NIL);
	next = xml_below_text(xml_root(step->doc), "nextToken");
	pages = handle_int(handle, PAGES, 0) + 1;
	if (next == NULL || next[0] == '\0')
		step->out->kind = STEP_DONE;
	else if (pages >= MAX_PAGES)
		ec2_fail(step, CLASS_PERMANENT, "TooManyPages", "the list of instances does not end");
	else
	{
		step->out->handle = handle_set_int(handle_set_text(NULL, NEXT_TOKEN, next), PAGES, pages);
		ask_page(step, next);
	}
}

/* Name all to a call, or the one with this number. */
static void
add_ids(AwsForm *form, const char *name, Ec2Step *step, int64 single)
{
	List *ids = step->context->vm_ids;
	ListCell *lc;
	int n = 0;

	if (single > 0)
		ids = list_make1(list_nth(ids, (int) single - 1));
	foreach (lc, ids)
		aws_form_add(form, psprintf("%s.%d", name, ++n), lfirst(lc));
}

/* Send the call of a stage, for all or for the one with this number. */
static void
ask_stage(Ec2Step *step, int64 single, int stage, const char *action, AwsForm *form)
{
	step->out->mutates = stage != STAGE_LOOK;
	step->out->handle = handle_set_int(handle_set_int(NULL, SINGLE, single), STAGE, stage);
	ec2_send(step, "ec2", action, form);
	ec2_limit(step, stage == STAGE_LOOK ? DESCRIBE_BY_FILTER : action, NULL);
}

/* Begin with all, or with the one with this number. */
static void
ask_requests(Ec2Step *step, int64 single)
{
	AwsForm form;

	aws_form_init(&form, DESCRIBE, EC2_VERSION);
	aws_form_add(&form, "Filter.1.Name", "instance-id");
	add_ids(&form, "Filter.1.Value", step, single);
	aws_form_add(&form, "Filter.2.Name", "tag:" SPOT_TAG);
	aws_form_add(&form, "Filter.2.Value.1", PERSISTENT);
	ask_stage(step, single, STAGE_LOOK, DESCRIBE, &form);
	step->out->request->max_reply = MAX_PAGE_BYTES;
}

static void
ask_end(Ec2Step *step, int64 single)
{
	AwsForm form;

	aws_form_init(&form, TERMINATE, EC2_VERSION);
	add_ids(&form, "InstanceId", step, single);
	ask_stage(step, single, STAGE_END, TERMINATE, &form);
}

/* What has to be cancelled first, if anything. */
static void
take_requests(Ec2Step *step, int64 single)
{
	XmlNode *reservation;
	List *requests = NIL;
	AwsForm form;

	step->doc = xml_parse_list(step->reply->body, step->reply->body_len, AVM_MAX_LISTED);
	if (xml_root(step->doc) == NULL || xml_count(step->doc, "/DescribeInstancesResponse") == 0)
	{
		ec2_fail_malformed(step);
		return;
	}
	reservation = xml_below(xml_root(step->doc), "reservationSet/item");
	for (; reservation != NULL; reservation = xml_next(reservation))
	{
		XmlNode *item = xml_below(reservation, "instancesSet/item");

		for (; item != NULL; item = xml_next(item))
		{
			char *id = xml_below_text(item, "spotInstanceRequestId");

			if (id != NULL && ec2_is_id(id, "sir-"))
				requests = lappend(requests, id);
		}
	}
	if (requests == NIL)
	{
		ask_end(step, single);
		return;
	}
	ec2_cancel_form(&form, requests);
	ask_stage(step, single, STAGE_CANCEL, CANCEL, &form);
}

/*
 * The payloads of boots that were kept as parameters, one by one, before the VMs: while
 * those are there somebody comes back to them.  False: none is left.
 */
static bool
drop_parameters(Ec2Step *step)
{
	List *sessions = step->context->vm_sessions;
	int64 dropped = handle_int(step->context->handle, DROPPED, 0);

	if (!ec2_uses_parameter(step->context->options, true))
		return false;
	if (step->reply == NULL && dropped > 0)
		dropped--; /* that answer has been lost */
	else if (step->reply != NULL)
	{
		AwsError error = ec2_parameter_deleted(step->reply);

		step->out->operation = DELETE_PARAMETER;
		if (error.class == CLASS_THROTTLED || error.class == CLASS_TRANSIENT)
		{
			ec2_fail(step, error.class, error.code, error.message);
			return true;
		}
		if (error.class != CLASS_NONE)
			ec2_note_error(step, &error); /* what may not be deleted keeps no VM alive */
	}
	if (dropped >= list_length(sessions))
		return false;
	step->out->handle = handle_set_int(NULL, DROPPED, dropped + 1);
	ec2_delete_parameter(step,
						 ec2_parameter_name(step->context->cluster, list_nth(sessions, dropped)));
	return true;
}

void
ec2_reap(Ec2Step *step)
{
	static const char *const calls[] = {DESCRIBE, CANCEL, TERMINATE};
	int64 single = handle_int(step->context->handle, SINGLE, -1);
	int stage = (int) handle_int(step->context->handle, STAGE, STAGE_LOOK);
	int count = list_length(step->context->vm_ids);
	AwsError error;
	XmlNode *item;
	StringInfoData json;

	if (single < 0)
	{
		if (!drop_parameters(step))
			ask_requests(step, 0);
		return;
	}
	step->out->operation = calls[stage];
	if (step->reply == NULL)
	{
		/* what is cancelled stays so */
		ask_requests(step, single);
		return;
	}
	error = aws_judge(step->reply);
	if (error.class == CLASS_THROTTLED || error.class == CLASS_TRANSIENT)
	{
		ec2_fail(step, error.class, error.code, error.message);
		return;
	}
	if (stage == STAGE_CANCEL &&
		(error.class == CLASS_NONE || (single > 0 && strcmp(error.code, NO_REQUEST_CODE) == 0)))
	{
		if (error.class == CLASS_NONE &&
			xml_count(ec2_parse(step), "/CancelSpotInstanceRequestsResponse") == 0)
			ec2_fail_malformed(step);
		else
			ask_end(step, single);
		return;
	}
	if (error.class != CLASS_NONE)
	{
		/* which of them it was is not told in a way that could be relied on */
		if (stage != STAGE_LOOK && single < count && count > 1)
		{
			ec2_note_error(step, &error);
			ask_requests(step, single + 1);
		}
		else
			ec2_fail(step, error.class, error.code, error.message);
		return;
	}
	if (stage == STAGE_LOOK)
	{
		take_requests(step, single);
		return;
	}
	item = xml_below(xml_root(ec2_parse(step)), "instancesSet/item");
	if (item == NULL)
	{
		ec2_fail_malformed(step);
		return;
	}
	initStringInfo(&json);
	appendStringInfoChar(&json, '[');
	for (; item != NULL; item = xml_next(item))
	{
		char *vm_id = xml_below_text(item, "instanceId");

		if (vm_id == NULL || !ec2_is_id(vm_id, "i-"))
			continue;
		appendStringInfoString(&json, json.len > 1 ? ",{" : "{");
		add_member(&json, "vm_id", vm_id);
		add_member(&json, "state", xml_below_text(item, "currentState/name"));
		appendStringInfoChar(&json, '}');
	}
	appendStringInfoChar(&json, ']');
	step->out->result = read_document(json.data);
	if (single > 0 && single < count)
		ask_requests(step, single + 1);
	else
		step->out->kind = STEP_DONE;
}
