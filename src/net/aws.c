/*-------------------------------------------------------------------------
 *
 * aws.c
 *		AWS over HTTP: endpoints, form bodies, signed requests, error classes.
 *
 * EC2 and STS speak AWS's "Query" protocol: a form is POSTed to "/", the answer
 * is XML; SSM is POSTed JSON, and answers with it.  libcurl signs (Signature Version 4); this file keeps to the subset
 * in which every libcurl since 7.88 signs correctly: a POST to "/" without a
 * query, no header that is empty, repeated or a prefix of another, and the user
 * agent set apart from the headers.  The form is escaped the way in which AWS
 * canonicalizes it.
 *
 * A region becomes part of a host name that is sent signatures, so its form is
 * checked here once more, whoever has checked it before.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include "mb/pg_wchar.h"

#include "net/aws.h"
#include "net/json.h"
#include "net/xml.h"

#define MAX_MESSAGE 500 /* bytes of AWS's message that are kept */
#define MAX_REGION 40

/*
 * What AWS's codes mean to us; a trailing asterisk stands for any rest.
 * Sources: the EC2 API's error codes page, the common errors page of STS.
 * The first match counts.
 */
static const struct
{
	const char *code;
	ErrorClass class;
} error_codes[] = {
	{"InsufficientInstanceCapacity", CLASS_CAPACITY},
	{"UnfulfillableCapacity", CLASS_CAPACITY},
	{"SpotMaxPriceTooLow", CLASS_CAPACITY},
	{"Unsupported", CLASS_CAPACITY},
	{"InsufficientFreeAddressesInSubnet", CLASS_CAPACITY},
	{"InsufficientCapacity", CLASS_CAPACITY},
	{"InsufficientHostCapacity", CLASS_CAPACITY},
	{"InsufficientVolumeCapacity", CLASS_CAPACITY},
	{"ReservationCapacityExceeded", CLASS_CAPACITY},

	{"RequestLimitExceeded", CLASS_THROTTLED},
	{"EC2ThrottledException", CLASS_THROTTLED},
	{"Throttling*", CLASS_THROTTLED},
	{"RequestThrottled*", CLASS_THROTTLED},
	{"TooManyRequestsException", CLASS_THROTTLED},
	{"SlowDown", CLASS_THROTTLED},
	{"BandwidthLimitExceeded", CLASS_THROTTLED},
	{"PriorRequestNotComplete", CLASS_THROTTLED},

	{"RequestTimeout*", CLASS_TRANSIENT},
	{"InternalError", CLASS_TRANSIENT},
	{"InternalFailure", CLASS_TRANSIENT},
	{"ServerInternal", CLASS_TRANSIENT},
	{"ServiceUnavailable", CLASS_TRANSIENT},
	{"Unavailable", CLASS_TRANSIENT},

	{"AuthFailure", CLASS_CREDENTIALS},
	{"InvalidClientTokenId", CLASS_CREDENTIALS},
	{"SignatureDoesNotMatch", CLASS_CREDENTIALS},
	{"IncompleteSignature", CLASS_CREDENTIALS},
	{"MissingAuthenticationToken", CLASS_CREDENTIALS},
	{"UnrecognizedClientException", CLASS_CREDENTIALS},
	{"InvalidSignatureException", CLASS_CREDENTIALS},
	{"UnauthorizedOperation", CLASS_CREDENTIALS},
	{"AccessDenied*", CLASS_CREDENTIALS},
	{"OptInRequired", CLASS_CREDENTIALS},
	{"Blocked", CLASS_CREDENTIALS},
	{"PendingVerification", CLASS_CREDENTIALS},
	{"RequestExpired", CLASS_CREDENTIALS},
	{"ExpiredToken*", CLASS_CREDENTIALS},
	{"NotAuthorized", CLASS_CREDENTIALS},
	{"RegionDisabledException", CLASS_CREDENTIALS},

	{"VcpuLimitExceeded", CLASS_QUOTA},
	{"InstanceLimitExceeded", CLASS_QUOTA},
	{"MaxSpotInstanceCountExceeded", CLASS_QUOTA},
	{"MaxSpotFleetRequestCountExceeded", CLASS_QUOTA},
	{"VolumeLimitExceeded", CLASS_QUOTA},
	{"NetworkInterfaceLimitExceeded", CLASS_QUOTA},
	{"ResourceLimitExceeded", CLASS_QUOTA},
	{"TagLimitExceeded", CLASS_QUOTA},

	{"InvalidInstanceID.NotFound", CLASS_NOT_FOUND},
	{"InvalidSpotInstanceRequestID.NotFound", CLASS_NOT_FOUND},
	{"IdempotentInstanceTerminated", CLASS_NOT_FOUND},
	{"IdempotentParameterMismatch", CLASS_PERMANENT},
};

/* Append text in the escapes of a form, in UTF-8. */
static void
append_escaped(StringInfo body, const char *text)
{
	static const char hex[] = "0123456789ABCDEF";
	static const char plain[] =
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~";
	static bool is_plain[256];
	char *utf8 = pg_server_to_any(text, strlen(text), PG_UTF8);
	const char *p = utf8;

	if (!is_plain['A'])
	{
		for (const char *c = plain; *c != '\0'; c++)
			is_plain[(unsigned char) *c] = true;
	}
	for (;;)
	{
		const char *run = p;
		unsigned char c;

		while (is_plain[(unsigned char) *p])
			p++;
		appendBinaryStringInfo(body, run, p - run);
		c = (unsigned char) *p++;
		if (c == '\0')
			break;
		if (c == ' ')
			appendStringInfoCharMacro(body, '+');
		else
		{
			appendStringInfoCharMacro(body, '%');
			appendStringInfoCharMacro(body, hex[c >> 4]);
			appendStringInfoCharMacro(body, hex[c & 15]);
		}
	}
	if (utf8 != text)
	{
		secret_wipe(utf8, strlen(utf8)); /* user data has a token */
		pfree(utf8);
	}
}

void
aws_form_init(AwsForm *form, const char *action, const char *version)
{
	initStringInfo(&form->body);
	aws_form_add(form, "Action", action);
	aws_form_add(form, "Version", version);
}

void
aws_form_add(AwsForm *form, const char *name, const char *value)
{
	if (form->body.len > 0)
		appendStringInfoChar(&form->body, '&');
	append_escaped(&form->body, name);
	appendStringInfoChar(&form->body, '=');
	append_escaped(&form->body, value);
}

bool
aws_region_is_valid(const char *region)
{
	const char *p = region;
	int words = 0;

	if (region == NULL || strlen(region) > MAX_REGION)
		return false;
	for (int i = 0; i < 2; i++, p++)
	{
		if (*p < 'a' || *p > 'z')
			return false;
	}
	while (p[0] == '-' && p[1] >= 'a' && p[1] <= 'z')
	{
		for (p++; *p >= 'a' && *p <= 'z'; p++)
			;
		words++;
	}
	if (words == 0 || p[0] != '-' || p[1] < '0' || p[1] > '9')
		return false;
	for (p++; *p >= '0' && *p <= '9'; p++)
		;
	return *p == '\0';
}

const char *
aws_domain(const char *region)
{
	return strncmp(region, "cn-", 3) == 0 ? "amazonaws.com.cn" : "amazonaws.com";
}

/* Where a service of a region is called. */
static char *
service_url(const char *service, const char *region)
{
	if (avm_aws_endpoint_url != NULL && avm_aws_endpoint_url[0] != '\0')
	{
		size_t len = strlen(avm_aws_endpoint_url);

		while (len > 0 && avm_aws_endpoint_url[len - 1] == '/')
			len--;
		return psprintf("%.*s/", (int) len, avm_aws_endpoint_url);
	}
	return psprintf("https://%s.%s.%s/", service, region, aws_domain(region));
}

static HttpRequest *
make_request(const char *service, const char *region, const char *content_type,
			 const SecretSet *secrets)
{
	HttpRequest *request = palloc0(sizeof(HttpRequest));

	if (!aws_region_is_valid(region))
		ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
						errmsg("invalid AWS region \"%s\"", region != NULL ? region : ""),
						errhint("A region looks like \"us-east-1\".")));

	request->access_key = secret_set_get(secrets, "access_key_id");
	request->secret_key = secret_set_get(secrets, "secret_access_key");
	request->session_token = secret_set_get(secrets, "session_token");
	if (secrets != NULL && (request->access_key == NULL || request->secret_key == NULL))
		ereport(ERROR, (errcode(AVM_INVALID_CREDENTIALS), errmsg("AWS credentials are incomplete"),
						errhint("Set the secrets \"access_key_id\" and \"secret_access_key\" with "
								"agentvm.set_provider().")));

	request->method = "POST";
	request->url = service_url(service, region);
	request->headers = list_make1(psprintf("Content-Type: %s", content_type));
	request->sigv4 = psprintf("aws:amz:%s:%s", region, service);
	return request;
}

HttpRequest *
aws_form_request(const char *service, const char *region, AwsForm *form, const SecretSet *secrets)
{
	HttpRequest *request =
		make_request(service, region, "application/x-www-form-urlencoded; charset=utf-8", secrets);

	request->body = form->body.data;
	request->body_len = form->body.len;
	return request;
}

HttpRequest *
aws_json_request(const char *service, const char *region, const char *target, const char *json,
				 const SecretSet *secrets)
{
	HttpRequest *request = make_request(service, region, "application/x-amz-json-1.1", secrets);

	request->headers = lappend(request->headers, psprintf("X-Amz-Target: %s", target));
	request->body = json;
	request->body_len = strlen(json);
	return request;
}

/* The class of a code that the table knows, else CLASS_NONE. */
static ErrorClass
class_of_code(const char *code)
{
	for (int i = 0; i < lengthof(error_codes); i++)
	{
		const char *known = error_codes[i].code;
		size_t len = strlen(known);

		if (known[len - 1] == '*' ? strncmp(code, known, len - 1) == 0 : strcmp(code, known) == 0)
			return error_codes[i].class;
	}
	return CLASS_NONE;
}

/* The class of an HTTP status whose code says nothing; "anonymous": there is no code at all. */
static ErrorClass
class_of_status(int status, bool anonymous)
{
	if (status == 429)
		return CLASS_THROTTLED;
	if (status >= 500 || status == 408)
		return CLASS_TRANSIENT;
	if (anonymous && (status == 401 || status == 403))
		return CLASS_CREDENTIALS;
	return CLASS_PERMANENT;
}

bool
aws_code_is_expired(const char *code)
{
	return strcmp(code, "RequestExpired") == 0 || strncmp(code, "ExpiredToken", 12) == 0;
}

AwsError
aws_judge(const HttpReply *reply)
{
	AwsError result = {CLASS_NONE, NULL, NULL};
	XmlDoc *doc;
	char *code = NULL;
	char *message = NULL;

	if (reply->status >= 200 && reply->status < 300)
		return result;
	if (reply->status == 0)
	{
		result.class = CLASS_TRANSIENT;
		result.code = "NoReply";
		result.message = reply->error != NULL ? reply->error : "no reply";
		return result;
	}

	doc = xml_parse(reply->body, reply->body_len);
	if (doc != NULL)
	{
		code = xml_text(doc, "//Error/Code");
		message = xml_text(doc, "//Error/Message");
		xml_free(doc);
	}
	else if ((code = json_text(reply->body, reply->body_len, "__type")) != NULL)
	{
		/* "com.amazonaws.ssm#ParameterNotFound" */
		if (strchr(code, '#') != NULL)
			code = strrchr(code, '#') + 1;
		message = json_text(reply->body, reply->body_len, "message");
		if (message == NULL)
			message = json_text(reply->body, reply->body_len, "Message");
	}

	if (code == NULL || code[0] == '\0')
	{
		result.class = class_of_status(reply->status, true);
		result.code = psprintf("HTTP %d", reply->status);
		result.message =
			psprintf("the endpoint answered with HTTP status %d and no AWS error", reply->status);
		return result;
	}

	/* State reasons and some services put the side at fault in front. */
	if (strncmp(code, "Client.", 7) == 0 || strncmp(code, "Server.", 7) == 0)
		code += 7;
	code[pg_mbcliplen(code, strlen(code), 100)] = '\0';
	if (message == NULL)
		message = pstrdup("");
	message[pg_mbcliplen(message, strlen(message), MAX_MESSAGE)] = '\0';

	result.class = class_of_code(code);
	if (result.class == CLASS_NONE)
		result.class = class_of_status(reply->status, false);
	result.code = code;
	result.message = message;
	return result;
}
