/*-------------------------------------------------------------------------
 *
 * sigv4.c
 *		AWS Signature Version 4 of a request.
 *
 * libcurl can sign, too, but puts its strings together character by character and derives the
 * signing key anew for each request, which took a tenth of all that a launch costs;
 * and the keys would stay in its handles.
 *
 * What is signed is what is sent: every header of ours, Host included, and the hash of
 * the body.  The key that signs depends on the day, the region and the service, not on the
 * request: the last one is kept.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <time.h>

#include "lib/stringinfo.h"

#include "net/sigv4.h"

#define ALGORITHM "AWS4-HMAC-SHA256"
#define TERMINATOR "aws4_request"
#define DAY_LEN 8 /* of a time such as 20150830T123600Z */

/* A header as it is signed. */
typedef struct SignedHeader
{
	char *name; /* in lower case */
	const char *value;
} SignedHeader;

static int
compare_headers(const void *a, const void *b)
{
	return strcmp(((const SignedHeader *) a)->name, ((const SignedHeader *) b)->name);
}

static void
hmac(const void *key, int key_len, const char *text, size_t len, uint8 digest[SHA256_LEN])
{
	unsigned int digest_len = 0;

	if (HMAC(EVP_sha256(), key, key_len, (const unsigned char *) text, len, digest, &digest_len) ==
			NULL ||
		digest_len != SHA256_LEN)
		ereport(ERROR, errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not sign a request"));
}

/* The signing key of a secret key for a scope, "day/region/service/aws4_request". */
static void
derive_key(SigningKey *cache, const Secret *secret, const char *scope)
{
	size_t scope_len = strlen(scope);
	size_t secret_size = strlen("AWS4") + secret_len(secret);
	size_t size = secret_size + scope_len;
	char *text = palloc(size);
	uint8 of[SHA256_LEN];

	memcpy(text, "AWS4", strlen("AWS4"));
	memcpy(text + strlen("AWS4"), secret_bytes(secret), secret_len(secret));
	memcpy(text + secret_size, scope, scope_len);
	sha256_bytes(text, size, of);
	if (!cache->known || memcmp(cache->of, of, SHA256_LEN) != 0)
	{
		uint8 key[SHA256_LEN];
		const char *part = scope;

		cache->known = false;
		for (;;)
		{
			size_t len = strcspn(part, "/");

			if (part == scope)
				hmac(text, (int) secret_size, part, len, key);
			else
				hmac(key, SHA256_LEN, part, len, key);
			if (part[len] == '\0')
				break;
			part += len + 1;
		}
		memcpy(cache->key, key, SHA256_LEN);
		memcpy(cache->of, of, SHA256_LEN);
		cache->known = true;
		secret_wipe(key, SHA256_LEN);
	}
	secret_wipe(text, size);
	pfree(text);
}

void
sigv4_forget(SigningKey *cache)
{
	secret_wipe(cache, sizeof(SigningKey));
}

static void
append_hash(StringInfo to, const void *bytes, size_t len)
{
	static const char digits[] = "0123456789abcdef";
	uint8 digest[SHA256_LEN];

	sha256_bytes(bytes, len, digest);
	for (int i = 0; i < SHA256_LEN; i++)
	{
		appendStringInfoCharMacro(to, digits[digest[i] >> 4]);
		appendStringInfoCharMacro(to, digits[digest[i] & 15]);
	}
}

/* The headers of ours that a request is sent with, in no order. */
static List *
headers_to_sign(const HttpRequest *request, const char *date, const char **path)
{
	const char *host = strstr(request->url, "://");
	size_t host_len;
	List *headers = list_copy(request->headers);

	if (host == NULL || strchr(request->url, '?') != NULL || strchr(request->url, '#') != NULL)
		elog(ERROR, "a request with this URL cannot be signed");
	host += strlen("://");
	host_len = strcspn(host, "/");
	*path = host[host_len] != '\0' ? host + host_len : "/";
	headers = lappend(headers, psprintf("Host: %.*s", (int) host_len, host));
	headers = lappend(headers, psprintf("X-Amz-Date: %s", date));
	if (request->session_token != NULL)
	{
		char *header = psprintf("X-Amz-Security-Token: %s", secret_bytes(request->session_token));

		secret_wipe_later(header, strlen(header));
		headers = lappend(headers, header);
	}
	return headers;
}

List *
sigv4_sign(SigningKey *cache, const HttpRequest *request, time_t now)
{
	struct tm tm;
	char date[] = "20150830T123600Z";
	const char *path;
	char *scope;
	char *authorization;
	List *headers;
	SignedHeader *sorted;
	StringInfoData text;
	StringInfoData names;
	StringInfoData to_sign;
	uint8 signature[SHA256_LEN];
	int size = 128;
	int count;
	ListCell *lc;

	if (strcmp(request->method, "POST") != 0 || request->tail != NULL)
		elog(ERROR, "only a plain POST can be signed");
	if (gmtime_r(&now, &tm) == NULL ||
		strftime(date, sizeof(date), "%Y%m%dT%H%M%SZ", &tm) != sizeof(date) - 1)
		elog(ERROR, "could not tell the time of a request");
	scope = psprintf("%.*s/%s/" TERMINATOR, DAY_LEN, date, request->sigv4);
	headers = headers_to_sign(request, date, &path);

	/* the canonical request, which does not move as it grows: a session token may be in it */
	initStringInfo(&text);
	count = list_length(headers);
	sorted = palloc(sizeof(SignedHeader) * count);
	foreach (lc, headers)
	{
		const char *header = lfirst(lc);
		size_t len = strcspn(header, ":");
		SignedHeader *to = &sorted[foreach_current_index(lc)];

		to->name = pnstrdup(header, len);
		for (char *c = to->name; *c != '\0'; c++)
			*c = pg_ascii_tolower(*c);
		to->value = header + len + 1 + strspn(header + len + 1, " ");
		/* inner runs of blanks, and those at the end, would have to be taken out */
		size += 2 * (int) len + strlen(to->value) + 3;
		if (strstr(to->value, "  ") != NULL || to->value[strlen(to->value) - 1] == ' ')
			elog(ERROR, "a header with this value cannot be signed");
	}
	qsort(sorted, count, sizeof(SignedHeader), compare_headers);
	initStringInfo(&names);
	enlargeStringInfo(&text, size + (int) strlen(path));
	appendStringInfoString(&text, "POST\n");
	appendStringInfoString(&text, path);
	appendStringInfoString(&text, "\n\n");
	for (int i = 0; i < count; i++)
	{
		appendStringInfoString(&text, sorted[i].name);
		appendStringInfoChar(&text, ':');
		appendStringInfoString(&text, sorted[i].value);
		appendStringInfoChar(&text, '\n');
		if (i > 0)
			appendStringInfoChar(&names, ';');
		appendStringInfoString(&names, sorted[i].name);
	}
	appendStringInfoChar(&text, '\n');
	appendStringInfoString(&text, names.data);
	appendStringInfoChar(&text, '\n');
	append_hash(&text, request->body != NULL ? request->body : "", request->body_len);

	initStringInfo(&to_sign);
	appendStringInfoString(&to_sign, ALGORITHM "\n");
	appendStringInfoString(&to_sign, date);
	appendStringInfoChar(&to_sign, '\n');
	appendStringInfoString(&to_sign, scope);
	appendStringInfoChar(&to_sign, '\n');
	append_hash(&to_sign, text.data, text.len);
	secret_wipe(text.data, text.len);

	derive_key(cache, request->secret_key, scope);
	hmac(cache->key, SHA256_LEN, to_sign.data, to_sign.len, signature);
	authorization =
		psprintf("Authorization: " ALGORITHM " Credential=%s/%s, SignedHeaders=%s, Signature=%s",
				 secret_bytes(request->access_key), scope, names.data, sha256_text(signature));
	secret_wipe_later(authorization, strlen(authorization));
	return lappend(headers, authorization);
}
