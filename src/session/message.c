/*-------------------------------------------------------------------------
 *
 * message.c
 *		Messages to and from the runtimes in VMs, and text from VMs.
 *
 * What is sent is built in the server's encoding and converted as a whole.  What
 * comes is another's: a VM may be hostile, and one of many in exec_many() must not
 * end the statement for the others.  So answers are read with the JSON parser's own
 * interface, which returns errors, and not as a jsonb, which raises them.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "agentvm.h"
#include "catalog/namespace.h"
#include "common/jsonapi.h"
#include "db.h"
#include "mb/pg_wchar.h"
#include "port/pg_bswap.h"
#include "protocol.h"
#include "session/message.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/memutils.h"

#define LENGTH_SIZE 4	 /* bytes of the length before a header */
#define MAX_BRACKETS 200 /* of an answer's header: its parser is recursive */
#define MAX_MESSAGE 400	 /* bytes of an error's message that are shown */
#define MAX_TEXT (MaxAllocSize / 2 - 1024 * 1024) /* bytes: half of what a row may have */
#define MAX_WORD 128							  /* bytes of an error's name, of a version */
#define CONVERT_AT_ONCE 8192					  /* bytes */

/* ---- headers ---- */

void
header_begin(StringInfo header, const char *op, const pg_uuid_t *command)
{
	appendStringInfo(header, "{\"op\": \"%s\", \"command\": \"%s\"", op,
					 DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(command))));
}

void
header_json(StringInfo header, const char *name, const char *json)
{
	appendStringInfo(header, ", \"%s\": %s", name, json);
}

void
header_text(StringInfo header, const char *name, const char *value)
{
	if (value == NULL)
	{
		header_json(header, name, "null");
		return;
	}
	appendStringInfo(header, ", \"%s\": ", name);
	escape_json(header, value);
}

void
header_int(StringInfo header, const char *name, int64 value)
{
	appendStringInfo(header, ", \"%s\": %lld", name, (long long) value);
}

char *
header_finish(const StringInfo header, size_t *len)
{
	char *utf8 = pg_server_to_any(header->data, header->len, PG_UTF8);
	size_t utf8_len = utf8 == header->data ? header->len : strlen(utf8);
	uint32 length = pg_hton32((uint32) utf8_len + 1);
	char *result;

	if (utf8_len + 1 > PROTOCOL_MAX_HEADER)
		ereport(ERROR,
				(errcode(AVM_OVER_LIMIT), errmsg("arguments are too long to be sent to the VM"),
				 errdetail("In UTF-8 and as JSON they have %zu bytes, of which at most %d "
						   "can be sent.",
						   utf8_len + 1, PROTOCOL_MAX_HEADER),
				 hide_caller()));
	result = palloc(LENGTH_SIZE + utf8_len + 1);
	memcpy(result, &length, LENGTH_SIZE);
	memcpy(result + LENGTH_SIZE, utf8, utf8_len);
	result[LENGTH_SIZE + utf8_len] = '}';
	*len = LENGTH_SIZE + utf8_len + 1;
	return result;
}

/* ---- answers ---- */

/* Members that mean something, and where their values go. */
static const struct
{
	const char *name;
	enum
	{
		A_BOOL,
		A_INT,
		A_TEXT
	} type;
	size_t offset;
} members[] = {
	{"error", A_TEXT, offsetof(Answer, error)},
	{"message", A_TEXT, offsetof(Answer, message)},
	{"running", A_BOOL, offsetof(Answer, running)},
	{"exit_code", A_INT, offsetof(Answer, exit_code)},
	{"timed_out", A_BOOL, offsetof(Answer, timed_out)},
	{"killed", A_BOOL, offsetof(Answer, killed)},
	{"duration_ms", A_INT, offsetof(Answer, duration_ms)},
	{"stdout.total", A_INT, offsetof(Answer, streams[0].total)},
	{"stdout.from", A_INT, offsetof(Answer, streams[0].from)},
	{"stdout.len", A_INT, offsetof(Answer, streams[0].len)},
	{"stdout.lost", A_INT, offsetof(Answer, streams[0].lost)},
	{"stderr.total", A_INT, offsetof(Answer, streams[1].total)},
	{"stderr.from", A_INT, offsetof(Answer, streams[1].from)},
	{"stderr.len", A_INT, offsetof(Answer, streams[1].len)},
	{"stderr.lost", A_INT, offsetof(Answer, streams[1].lost)},
	{"taken", A_INT, offsetof(Answer, taken)},
	{"written", A_INT, offsetof(Answer, written)},
	{"any_order", A_BOOL, offsetof(Answer, any_order)},
	{"size", A_INT, offsetof(Answer, size)},
	{"version", A_TEXT, offsetof(Answer, version)},
};

typedef struct Reading
{
	Answer *answer;
	int depth; /* of brackets that are open */
	const char *outer;
	const char *name; /* of the member that comes next: at depth 1, or "outer.name" */
	bool wrong;
} Reading;

static JsonActionResult
on_open(void *state)
{
	((Reading *) state)->depth++;
	return JSON_ACTION_OK;
}

static JsonActionResult
on_close(void *state)
{
	((Reading *) state)->depth--;
	return JSON_ACTION_OK;
}

static JsonActionResult
on_member(void *state, char *name, bool isnull)
{
	Reading *reading = state;

	if (reading->depth == 1)
		reading->outer = reading->name = name;
	else if (reading->depth == 2 && strlen(name) < 16 &&
			 (strcmp(reading->outer, "stdout") == 0 || strcmp(reading->outer, "stderr") == 0))
		reading->name = psprintf("%s.%s", reading->outer, name);
	else
		reading->name = "";
	return JSON_ACTION_OK;
}

/* An integer in the range that JSON's numbers have everywhere. */
static bool
read_number(const char *token, int64 *value)
{
	char *end;

	errno = 0;
	*value = strtoll(token, &end, 10);
	return errno == 0 && *end == '\0' && *value >= -MAX_OFFSET && *value <= MAX_OFFSET;
}

static JsonActionResult
on_scalar(void *state, char *token, JsonTokenType type)
{
	Reading *reading = state;
	int i;

	for (i = 0; i < lengthof(members); i++)
	{
		char *place = (char *) reading->answer + members[i].offset;

		if (reading->depth == 0 || type == JSON_TOKEN_NULL ||
			strcmp(reading->name, members[i].name) != 0)
			continue;
		if (members[i].type == A_BOOL && (type == JSON_TOKEN_TRUE || type == JSON_TOKEN_FALSE))
			*(int *) place = type == JSON_TOKEN_TRUE;
		else if (members[i].type == A_INT && type == JSON_TOKEN_NUMBER &&
				 read_number(token, (int64 *) place))
		{
			if (place == (char *) &reading->answer->exit_code)
				reading->answer->has_exit_code = true;
		}
		else if (members[i].type == A_TEXT && type == JSON_TOKEN_STRING)
			*(char **) place = token;
		else
			reading->wrong = true;
	}
	return JSON_ACTION_OK;
}

static bool
has_few_brackets(const char *json, size_t len)
{
	int brackets = 0;
	size_t i;

	for (i = 0; i < len; i++)
	{
		if (json[i] == '{' || json[i] == '[')
			brackets++;
	}
	return brackets <= MAX_BRACKETS;
}

bool
answer_parse(const char *message, size_t len, Answer *answer)
{
	Reading reading = {answer, 0, "", "", false};
	JsonSemAction actions = {0};
	uint32 header_len;
	const char *header = message + LENGTH_SIZE;

	memset(answer, 0, sizeof(*answer));
	answer->running = answer->timed_out = answer->killed = answer->any_order = -1;
	answer->duration_ms = answer->taken = answer->written = answer->size = -1;
	memset(answer->streams, 0xff, sizeof(answer->streams)); /* -1 */

	if (len < LENGTH_SIZE)
		return false;
	memcpy(&header_len, message, LENGTH_SIZE);
	header_len = pg_ntoh32(header_len);
	if (header_len > len - LENGTH_SIZE || header_len > PROTOCOL_MAX_HEADER ||
		len - LENGTH_SIZE - header_len > PROTOCOL_MAX_CHUNK ||
		pg_encoding_verifymbstr(PG_UTF8, header, header_len) != header_len ||
		!has_few_brackets(header, header_len))
		return false;

	actions.semstate = &reading;
	actions.object_start = actions.array_start = on_open;
	actions.object_end = actions.array_end = on_close;
	actions.object_field_start = on_member;
	actions.scalar = on_scalar;
	if (pg_parse_json(AvmJsonLexer(pnstrdup(header, header_len), header_len, PG_UTF8), &actions) !=
			JSON_SUCCESS ||
		reading.wrong)
		return false;

	answer->bytes = header + header_len;
	answer->len = len - LENGTH_SIZE - header_len;
	if (answer->error != NULL)
	{
		const char *words = answer->message ? answer->message : "";

		answer->error = words_from_vm(answer->error, strlen(answer->error), MAX_WORD);
		answer->message = words_from_vm(words, strlen(words), MAX_MESSAGE);
	}
	return answer->version == NULL || strlen(answer->version) <= MAX_WORD;
}

bool
answer_is_output(const Answer *answer)
{
	int64 len = 0;
	int i;

	if (answer->running < 0 ||
		(answer->running == 0 && (!answer->has_exit_code || answer->exit_code < INT_MIN ||
								  answer->exit_code > INT_MAX || answer->duration_ms < 0)))
		return false;
	for (i = 0; i < lengthof(answer->streams); i++)
	{
		const AnswerStream *stream = &answer->streams[i];

		if (stream->total < 0 || stream->from < 0 || stream->len < 0 || stream->lost < 0 ||
			stream->len > PROTOCOL_MAX_CHUNK ||
			(stream->len > 0 && stream->from + stream->len > stream->total))
			return false;
		len += stream->len;
	}
	return len == answer->len;
}

/* ---- text ---- */

static const char replacement[] = "\xef\xbf\xbd"; /* U+FFFD */

/* Append bytes as UTF-8 that is valid; "mark" stands for each byte that is not. */
static void
append_marked(StringInfo out, const char *bytes, size_t len, const char *mark)
{
	size_t mark_len = strlen(mark);
	size_t i = 0;

	while (i < len)
	{
		int char_len = pg_utf_mblen((const unsigned char *) bytes + i);

		if (bytes[i] != '\0' && char_len <= len - i &&
			pg_utf8_islegal((const unsigned char *) bytes + i, char_len))
		{
			appendBinaryStringInfo(out, bytes + i, char_len);
			i += char_len;
		}
		else
		{
			appendBinaryStringInfo(out, mark, mark_len);
			i++;
		}
	}
}

/* The same, quickly where all is valid. */
static void
append_valid(StringInfo out, const char *bytes, size_t len, const char *mark)
{
	while (len > 0)
	{
		size_t at_once = Min(len, CONVERT_AT_ONCE);

		CHECK_FOR_INTERRUPTS();
		/* a character across the border is seen whole the next time */
		if (at_once < len)
			at_once -= utf8_unfinished(bytes, at_once);
		/* it reads on to the end, wherever it finds something: not to be asked again for the rest */
		if (pg_encoding_verifymbstr(PG_UTF8, bytes, at_once) == at_once)
			appendBinaryStringInfo(out, bytes, at_once);
		else
			append_marked(out, bytes, at_once, mark);
		bytes += at_once;
		len -= at_once;
	}
}

/* Append valid UTF-8 in the server's encoding; "?" for what that does not have. */
static void
append_converted(StringInfo out, const char *utf8, size_t len)
{
	int encoding = GetDatabaseEncoding();
	Oid conversion = FindDefaultConversionProc(PG_UTF8, encoding);
	unsigned char *buffer = palloc(CONVERT_AT_ONCE * MAX_CONVERSION_GROWTH + 1);

	while (len > 0)
	{
		int left = pg_encoding_mbcliplen(PG_UTF8, utf8, len, CONVERT_AT_ONCE);

		CHECK_FOR_INTERRUPTS();
		len -= left;
		while (left > 0)
		{
			int done = 0;

			if (OidIsValid(conversion))
			{
				done = pg_do_encoding_conversion_buf(
					conversion, PG_UTF8, encoding, (unsigned char *) unconstify(char *, utf8), left,
					buffer, CONVERT_AT_ONCE * MAX_CONVERSION_GROWTH + 1, true);
				appendStringInfoString(out, (char *) buffer);
			}
			else
			{
				while (done < left && !IS_HIGHBIT_SET(utf8[done]))
					done++;
				appendBinaryStringInfo(out, utf8, done);
			}
			if (done < left)
			{
				appendStringInfoChar(out, '?');
				done += pg_utf_mblen((const unsigned char *) utf8 + done);
			}
			utf8 += done;
			left -= done;
		}
	}
	pfree(buffer);
}

/* The text, after "skip" bytes that are left for a varlena's head. */
static void
convert(StringInfo out, int skip, const char *bytes, size_t len)
{
	StringInfoData valid;
	int encoding = GetDatabaseEncoding();

	initStringInfo(out);
	enlargeStringInfo(out, skip + len);
	out->len = skip;
	if (encoding == PG_UTF8 || encoding == PG_SQL_ASCII)
	{
		append_valid(out, bytes, len, encoding == PG_UTF8 ? replacement : "?");
		return;
	}
	initStringInfo(&valid);
	enlargeStringInfo(&valid, len);
	append_valid(&valid, bytes, len, replacement);
	append_converted(out, valid.data, valid.len);
	pfree(valid.data);
}

text *
text_from_vm(const char *bytes, size_t len, bool *cut)
{
	StringInfoData out;

	convert(&out, VARHDRSZ, bytes, len);
	if (out.len > MAX_TEXT)
	{
		out.len =
			VARHDRSZ + pg_mbcliplen(out.data + VARHDRSZ, out.len - VARHDRSZ, MAX_TEXT - VARHDRSZ);
		if (cut != NULL)
			*cut = true;
	}
	SET_VARSIZE(out.data, out.len);
	return (text *) out.data;
}

char *
words_from_vm(const char *bytes, size_t len, size_t max)
{
	StringInfoData out;
	char *c;

	convert(&out, 0, bytes, Min(len, 4 * max));
	out.data[pg_mbcliplen(out.data, out.len, max)] = '\0';
	for (c = out.data; *c != '\0'; c++)
	{
		if ((unsigned char) *c < ' ' || *c == 0x7f)
			*c = ' ';
		/* U+0080 to U+009F */
		else if (GetDatabaseEncoding() == PG_UTF8 && (unsigned char) c[0] == 0xc2 &&
				 (unsigned char) c[1] >= 0x80 && (unsigned char) c[1] < 0xa0)
			c[0] = c[1] = ' ';
	}
	return out.data;
}

size_t
utf8_unfinished(const char *bytes, size_t len)
{
	size_t back;

	for (back = 1; back <= 3 && back <= len; back++)
	{
		unsigned char c = bytes[len - back];

		if (c >= 0xc2 && c <= 0xf4)
			return pg_utf_mblen((const unsigned char *) bytes + len - back) > back ? back : 0;
		if (c < 0x80 || c > 0xbf)
			break;
	}
	return 0;
}
