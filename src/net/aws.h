/*-------------------------------------------------------------------------
 *
 * aws.h
 *		AWS over HTTP: endpoints, form bodies, signed requests, error classes.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_NET_AWS_H
#define AGENTVM_NET_AWS_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "net/http.h"
#include "providers/error_class.h"

/* A "Query" protocol form: name=value pairs, escaped as SigV4 wants them. */
typedef struct AwsForm
{
	StringInfoData body;
} AwsForm;

/* Begin a form for one action of an API version, e.g. "RunInstances", "2016-11-15". */
extern void aws_form_init(AwsForm *form, const char *action, const char *version);

/* Append one parameter; everything but A-Za-z0-9_.-~ is escaped (space as +, upper-case hex). */
extern void aws_form_add(AwsForm *form, const char *name, const char *value);

/* What follows AWS's host names in a region: "amazonaws.com", or China's. */
extern const char *aws_domain(const char *region);

/* Whether the text has the form of a region: ^[a-z]{2}(-[a-z]+)+-[0-9]+$ (it becomes a host name). */
extern bool aws_region_is_valid(const char *region);

/*
 * A signed POST of the form to a service ("ec2", "sts") of a region, at
 * agentvm.aws_endpoint_url if set, else at AWS's own host for it.  Palloc'd in
 * CurrentMemoryContext; refers to the secrets, which must outlive it.  NULL in
 * their place: it is not to be sent yet.  Raises AV010 for a region that is none,
 * AV001 when the secrets have no keys.
 */
extern HttpRequest *aws_form_request(const char *service, const char *region, AwsForm *form,
									 const SecretSet *secrets);

/*
 * A signed POST of a JSON document to a service that speaks "JSON 1.1" ("ssm"):
 * "target" is its X-Amz-Target, such as "AmazonSSM.PutParameter".  As above.
 */
extern HttpRequest *aws_json_request(const char *service, const char *region, const char *target,
									 const char *json, const SecretSet *secrets);

/* What an AWS reply says. */
typedef struct AwsError
{
	ErrorClass class; /* CLASS_NONE: success */
	const char *code; /* AWS's code, or one of ours: "NoReply", "HTTP 500"; NULL on success */
	const char
		*message; /* AWS's message, at most 500 bytes, no control characters; NULL on success */
} AwsError;

/* Whether a code says that temporary credentials are no good any more. */
extern bool aws_code_is_expired(const char *code);

/*
 * Judge a reply: by <Code> (or "__type" of JSON) first, whatever the HTTP status (capacity comes as
 * 5xx), then by status.  Source of the classes: AWS's EC2 error codes page and
 * the common errors page.
 */
extern AwsError aws_judge(const HttpReply *reply);

#endif /* AGENTVM_NET_AWS_H */
