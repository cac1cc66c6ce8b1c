/*-------------------------------------------------------------------------
 *
 * ec2_joint.c
 *		TerminateInstances, CancelSpotInstanceRequests and DescribeInstances for many sessions
 *		at once.
 *
 * The answer is made into one for each instance, as EC2 would have given it to a
 * call for that one alone, so that a step need not know in whose company it asked.
 *
 * A call with one bad id does nothing at all.  EC2 names those that it refuses, as
 * far as it can: they have the refusal for an answer, and the others are to be asked for again.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "lib/stringinfo.h"

#include "providers/ec2.h"

#define REPLY_PER_MEMBER 16384 /* bytes: an instance with 50 long tags */
#define MAX_SHARED 16384	   /* bytes of an answer that all get */

/* An instance, or a spot request, and its place among the members. */
typedef struct Member
{
	const char *id;
	int place;
} Member;

HttpRequest *
ec2_join(const HttpRequest *request, const char *const *members, int count)
{
	HttpRequest *joint = palloc(sizeof(HttpRequest));
	const char *member =
		strrchr(request->body, '&'); /* "&InstanceId.1=i-0123": the last parameter */
	const char *number = member != NULL ? strstr(member, ".1=") : NULL;
	StringInfoData body;

	Assert(number != NULL);
	initStringInfo(&body);
	appendBinaryStringInfo(&body, request->body, member - request->body);
	for (int i = 0; i < count; i++)
		appendStringInfo(&body, "%.*s.%d=%s", (int) (number - member), member, i + 1, members[i]);
	*joint = *request;
	joint->body = body.data;
	joint->body_len = body.len;
	joint->max_reply = Max(HTTP_MAX_REPLY, count * REPLY_PER_MEMBER);
	joint->large_reply = true;
	return joint;
}

static int
compare_members(const void *a, const void *b)
{
	return strcmp(((const Member *) a)->id, ((const Member *) b)->id);
}

static Member *
sort_members(const char *const *members, int count)
{
	Member *sorted = palloc(sizeof(Member) * count);

	for (int i = 0; i < count; i++)
	{
		sorted[i].id = members[i];
		sorted[i].place = i;
	}
	qsort(sorted, count, sizeof(Member), compare_members);
	return sorted;
}

/* A reply is that of an instance, if it is one of the members, whoever asked for it. */
static void
set_reply(Member *sorted, int count, const char *id, HttpReply *reply, HttpReply **replies)
{
	Member key = {id, 0};
	Member *member = bsearch(&key, sorted, count, sizeof(Member), compare_members);

	if (member == NULL)
		return;
	while (member > sorted && strcmp(member[-1].id, id) == 0)
		member--;
	for (; member < sorted + count && strcmp(member->id, id) == 0; member++)
		replies[member->place] = reply;
}

/* A copy of a reply with another body. */
static HttpReply *
with_body(const HttpReply *reply, const char *body)
{
	HttpReply *copy = palloc(sizeof(HttpReply));

	*copy = *reply;
	copy->body = body;
	copy->body_len = strlen(body);
	return copy;
}

/* The same for all that have none. */
static void
set_others(HttpReply *reply, int count, HttpReply **replies)
{
	for (int i = 0; i < count; i++)
	{
		if (replies[i] == NULL)
			replies[i] = reply;
	}
}

/* A refusal is that of the members whose ids stand in it. */
static void
set_named(const HttpReply *reply, Member *sorted, int count, HttpReply **replies)
{
	HttpReply *shared = with_body(reply, pnstrdup(reply->body, Min(reply->body_len, MAX_SHARED)));
	size_t prefix_len = strcspn(sorted->id, "-") + 1;
	char *prefix = pnstrdup(sorted->id, prefix_len);
	const char *p = reply->body;

	while ((p = strstr(p, prefix)) != NULL)
	{
		size_t len = prefix_len + strspn(p + prefix_len, LOWER DIGITS);

		set_reply(sorted, count, pnstrdup(p, len), shared, replies);
		p += len;
	}
}

/* Each item of a list is the answer for the member that it names, between "before" and "after". */
static void
set_items(const HttpReply *reply, XmlNode *list, const char *name, const char *before,
		  const char *after, Member *sorted, int count, HttpReply **replies)
{
	for (XmlNode *item = xml_below(list, "item"); item != NULL; item = xml_next(item))
	{
		char *id = xml_below_text(item, name);

		if (id != NULL)
			set_reply(sorted, count, id,
					  with_body(reply, psprintf("%s%s%s", before, xml_source(item), after)),
					  replies);
	}
}

#define TERMINATE_BEFORE "<TerminateInstancesResponse><instancesSet>"
#define TERMINATE_AFTER "</instancesSet></TerminateInstancesResponse>"
#define CANCEL_BEFORE "<CancelSpotInstanceRequestsResponse><spotInstanceRequestSet>"
#define CANCEL_AFTER "</spotInstanceRequestSet></CancelSpotInstanceRequestsResponse>"
#define DESCRIBE_BEFORE "<DescribeInstancesResponse><reservationSet><item><instancesSet>"
#define DESCRIBE_AFTER "</instancesSet></item></reservationSet></DescribeInstancesResponse>"

ErrorClass
ec2_split(const HttpReply *reply, const char *const *members, int count, HttpReply **replies)
{
	AwsError error = aws_judge(reply);
	Member *sorted = sort_members(members, count);
	XmlDoc *doc;
	bool describes;
	bool cancels;

	if (error.class == CLASS_THROTTLED || error.class == CLASS_TRANSIENT ||
		(error.class == CLASS_CREDENTIALS && strcmp(error.code, "UnauthorizedOperation") != 0))
	{
		/* that has nothing to do with the instances */
		set_others(with_body(reply, pnstrdup(reply->body, Min(reply->body_len, MAX_SHARED))), count,
				   replies);
		return error.class;
	}
	if (error.class != CLASS_NONE)
	{
		set_named(reply, sorted, count, replies);
		return error.class;
	}

	doc = xml_parse_list(reply->body, reply->body_len, count);
	describes = xml_count(doc, "/DescribeInstancesResponse") > 0;
	cancels = xml_count(doc, "/CancelSpotInstanceRequestsResponse") > 0;
	if (!describes && !cancels && xml_count(doc, "/TerminateInstancesResponse") == 0)
	{
		/* no answer to this call */
		set_others(with_body(reply, ""), count, replies);
		error.class = CLASS_TRANSIENT;
	}
	else if (describes)
	{
		for (XmlNode *item = xml_below(xml_root(doc), "reservationSet/item"); item != NULL;
			 item = xml_next(item))
			set_items(reply, xml_below(item, "instancesSet"), "instanceId", DESCRIBE_BEFORE,
					  DESCRIBE_AFTER, sorted, count, replies);
		set_others(with_body(reply, DESCRIBE_BEFORE DESCRIBE_AFTER), count, replies);
	}
	else if (cancels)
	{
		set_items(reply, xml_below(xml_root(doc), "spotInstanceRequestSet"),
				  "spotInstanceRequestId", CANCEL_BEFORE, CANCEL_AFTER, sorted, count, replies);
		set_others(with_body(reply, CANCEL_BEFORE CANCEL_AFTER), count, replies);
	}
	else
	{
		set_items(reply, xml_below(xml_root(doc), "instancesSet"), "instanceId", TERMINATE_BEFORE,
				  TERMINATE_AFTER, sorted, count, replies);
		set_others(with_body(reply, TERMINATE_BEFORE TERMINATE_AFTER), count, replies);
	}
	xml_free(doc);
	return error.class;
}
