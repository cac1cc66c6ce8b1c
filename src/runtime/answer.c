/*-------------------------------------------------------------------------
 *
 * answer.c
 *		Reading what the gateway says: bytes in, checked values out.
 *
 *-------------------------------------------------------------------------
 */
#include "answer.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#define DAY_S INT64_C(86400)
#define MAX_MS (INT64_C(1) << 40)
#define MAX_OFFSET (INT64_C(1) << 53) /* JSON's numbers are exact so far */
#define MAX_OUTPUT (INT64_C(1) << 30)

/* Exactly n digits; -1 for anything else. */
static int
digits(const char **at, int n)
{
	int value = 0;

	while (n-- > 0)
	{
		if (!isdigit((unsigned char) **at))
			return -1;
		value = value * 10 + *(*at)++ - '0';
	}
	return value;
}

static bool
skip(const char **at, char expected)
{
	if (**at != expected)
		return false;
	(*at)++;
	return true;
}

/* Seconds since 1970 of a UTC date and time (proleptic Gregorian); NO_TIME when a part is out of range. */
static int64_t
epoch_seconds(int year, int month, int day, int hour, int minute, int second)
{
	static const int before[] = {0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334};
	int64_t days;

	if (year < 1970 || month < 1 || month > 12 || day < 1 || day > 31 || hour < 0 || hour > 23 ||
		minute < 0 || minute > 59 || second < 0 || second > 60)
		return NO_TIME;
	days = (int64_t) (year - 1970) * 365 + before[month - 1] + day - 1;
	/* leap days of the years before, and of this one from March on */
	year -= month <= 2;
	days += year / 4 - year / 100 + year / 400 - (1969 / 4 - 1969 / 100 + 1969 / 400);
	return days * DAY_S + hour * 3600 + minute * 60 + second;
}

int64_t
parse_time(const char *text)
{
	int part[6];
	static const char after[] = "--T::";
	int64_t seconds;
	int64_t ms = 0;
	int scale = 100;
	int i;

	for (i = 0; i < 6; i++)
	{
		part[i] = digits(&text, i == 0 ? 4 : 2);
		if (part[i] < 0 || (i < 5 && !skip(&text, after[i])))
			return NO_TIME;
	}
	seconds = epoch_seconds(part[0], part[1], part[2], part[3], part[4], part[5]);
	if (seconds == NO_TIME)
		return NO_TIME;
	if (skip(&text, '.'))
	{
		if (!isdigit((unsigned char) *text))
			return NO_TIME;
		for (; isdigit((unsigned char) *text); text++, scale /= 10)
			ms += (*text - '0') * scale;
	}
	if (skip(&text, 'Z'))
		return *text == '\0' ? seconds * 1000 + ms : NO_TIME;
	if (*text == '+' || *text == '-')
	{
		int sign = *text++ == '+' ? -1 : 1;
		int hours = digits(&text, 2);
		int minutes = skip(&text, ':') ? digits(&text, 2) : 0;

		if (hours < 0 || hours > 15 || minutes < 0 || minutes > 59 || *text != '\0')
			return NO_TIME;
		return (seconds + sign * (hours * 3600 + minutes * 60)) * 1000 + ms;
	}
	return NO_TIME;
}

int64_t
parse_http_date(const char *text)
{
	static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
	char month[4];
	const char *found;
	int day, year, hour, minute, second, end = 0;
	int64_t seconds;

	if (sscanf(text, "%*3[A-Za-z], %2d %3[A-Za-z] %4d %2d:%2d:%2d GMT%n", &day, month, &year, &hour,
			   &minute, &second, &end) != 6 ||
		end == 0 || text[end] != '\0')
		return NO_TIME;
	found = strstr(months, month);
	if (found == NULL || strlen(month) != 3 || (found - months) % 3 != 0)
		return NO_TIME;
	seconds = epoch_seconds(year, (int) (found - months) / 3 + 1, day, hour, minute, second);
	return seconds == NO_TIME ? NO_TIME : seconds * 1000;
}

static int64_t
deadline_of(json_t *root)
{
	const char *text = json_string_value(json_object_get(root, "deadline"));

	return text != NULL ? parse_time(text) : NO_TIME;
}

/* A number of seconds from min to max, as milliseconds; -1 for anything else. */
static int64_t
seconds_of(json_t *root, const char *name, int64_t min, int64_t max)
{
	json_t *member = json_object_get(root, name);

	if (!json_is_integer(member) || json_integer_value(member) < min ||
		json_integer_value(member) > max)
		return -1;
	return json_integer_value(member) * 1000;
}

/* A plain path of ours: what goes into a request line. */
static bool
is_path(const char *text)
{
	return text[0] == '/' && strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
										  "0123456789/-._~") == strlen(text);
}

static const char *
check_boot(json_t *root, BootAnswer *answer)
{
	const char *id = json_string_value(json_object_get(root, "session_id"));
	const char *channel = json_string_value(json_object_get(root, "channel"));
	const char *key;
	json_t *value;
	size_t i;

	if (!json_is_object(root))
		return "it is no JSON object";
	if (id == NULL || id[0] == '\0' || strlen(id) >= sizeof(answer->session_id) ||
		strspn(id, "0123456789abcdefABCDEF-") != strlen(id))
		return "session_id is no id";
	if (channel == NULL || strlen(channel) >= sizeof(answer->channel) || !is_path(channel))
		return "channel is no path";
	strcpy(answer->session_id, id);
	strcpy(answer->channel, channel);
	answer->heartbeat_interval_ms = seconds_of(root, "heartbeat_interval_s", 1, DAY_S);
	answer->deadline_grace_ms = seconds_of(root, "deadline_grace_s", 0, DAY_S);
	answer->deadman_allowance_ms = seconds_of(root, "deadman_allowance_s", 1, 30 * DAY_S);
	if (answer->heartbeat_interval_ms < 0)
		return "heartbeat_interval_s is out of range";
	if (answer->deadline_grace_ms < 0)
		return "deadline_grace_s is out of range";
	if (answer->deadman_allowance_ms < 0)
		return "deadman_allowance_s is out of range";
	answer->deadline = deadline_of(root);
	if (answer->deadline == NO_TIME)
		return "deadline is no time";
	answer->env = json_object_get(root, "env");
	answer->repos = json_object_get(root, "repos");
	if (!json_is_object(answer->env) || !json_is_array(answer->repos))
		return "env or repos is missing";
	json_object_foreach(answer->env, key, value)
	{
		if (!json_is_string(value) || key[0] == '\0' || strchr(key, '=') != NULL)
			return "env holds something else than strings";
	}
	json_array_foreach(answer->repos, i, value)
	{
		if (json_string_value(json_object_get(value, "url")) == NULL)
			return "a repository has no url";
	}
	return NULL;
}

const char *
answer_boot(const char *text, size_t len, BootAnswer *answer)
{
	const char *problem;

	memset(answer, 0, sizeof(*answer));
	/* without JSON_ALLOW_NUL: no string holds a NUL */
	answer->root = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL);
	problem = check_boot(answer->root, answer);
	if (problem != NULL)
	{
		json_decref(answer->root);
		memset(answer, 0, sizeof(*answer));
	}
	return problem;
}

int64_t
answer_deadline(const char *text, size_t len)
{
	json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL);
	int64_t deadline = deadline_of(root);

	json_decref(root);
	return deadline;
}

/* Take a uuid over, in lower case; false when it is none. */
static bool
take_id(const json_t *value, char *id)
{
	const char *text = json_string_value(value);
	int i;

	if (text == NULL || strlen(text) != COMMAND_ID_LEN)
		return false;
	for (i = 0; i < COMMAND_ID_LEN; i++)
	{
		bool is_dash = i == 8 || i == 13 || i == 18 || i == 23;

		if (is_dash ? text[i] != '-' : !isxdigit((unsigned char) text[i]))
			return false;
		id[i] = (char) tolower((unsigned char) text[i]);
	}
	id[i] = '\0';
	return true;
}

FrameKind
answer_frame(const char *text, size_t len, Frame *frame)
{
	json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL);
	const char *type = json_string_value(json_object_get(root, "type"));

	memset(frame, 0, sizeof(*frame));
	frame->kind = FRAME_UNKNOWN;
	if (type == NULL)
		frame->kind = FRAME_BAD;
	else if (strcmp(type, "hello") == 0)
		frame->kind = FRAME_HELLO;
	else if (strcmp(type, "gone") == 0)
		frame->kind = FRAME_GONE;
	else if (strcmp(type, "claimed") == 0)
		frame->kind = FRAME_CLAIMED;
	else if (strcmp(type, "deadline") == 0)
	{
		frame->deadline = deadline_of(root);
		frame->kind = frame->deadline != NO_TIME ? FRAME_DEADLINE : FRAME_BAD;
	}
	else if (strcmp(type, "noted") == 0)
		frame->kind =
			take_id(json_object_get(root, "command"), frame->command) ? FRAME_NOTED : FRAME_BAD;
	json_decref(root);
	return frame->kind;
}

/* A number from 0 to max, or what stands for a missing one; -1 for anything else. */
static int64_t
number_of(const json_t *root, const char *name, int64_t missing, int64_t max)
{
	json_t *member = json_object_get(root, name);

	if (member == NULL || json_is_null(member))
		return missing;
	if (!json_is_integer(member) || json_integer_value(member) < 0 ||
		json_integer_value(member) > max)
		return -1;
	return json_integer_value(member);
}

static bool
is_absolute(const char *path)
{
	return path != NULL && path[0] == '/';
}

static const char *
check_tar(CallFrame *call, const json_t *tar)
{
	const char *extract = json_string_value(json_object_get(tar, "extract"));
	const char *create = json_string_value(json_object_get(tar, "create"));

	call->tar_flag = extract != NULL ? "--tar-extract" : "--tar-create";
	call->tar_path = extract != NULL ? extract : create;
	call->tar_file = json_string_value(json_object_get(tar, "file"));
	if ((extract != NULL) == (create != NULL) || !is_absolute(call->tar_path) ||
		!is_absolute(call->tar_file))
		return "tar makes no sense";
	return call->command_len > 0 ? "there is both a command and tar" : NULL;
}

static const char *
check_start(CallFrame *call)
{
	json_t *cwd = json_object_get(call->root, "cwd");
	const char *key;
	json_t *value, *tar;
	int64_t command_len = number_of(call->root, "command_len", 0, PROTOCOL_MAX_COMMAND);

	call->timeout_ms = number_of(call->root, "timeout_ms", 0, MAX_MS);
	call->max_output = number_of(call->root, "max_output", MAX_OUTPUT, MAX_OFFSET);
	if (call->max_output > MAX_OUTPUT)
		call->max_output = MAX_OUTPUT;
	call->input_len = number_of(call->root, "input_len", 0, MAX_OFFSET);
	call->age_ms = number_of(call->root, "age_ms", 0, MAX_MS);
	call->lease_ms = number_of(call->root, "lease_ms", 0, MAX_MS);
	if (command_len < 0 || (size_t) command_len > call->len)
		return "command_len is out of range";
	call->command_len = (size_t) command_len;
	if (memchr(call->bytes, '\0', call->command_len) != NULL)
		return "the command has a NUL in it";
	if (call->timeout_ms < 0 || call->age_ms < 0 || call->lease_ms < 0)
		return "a time is out of range";
	if (call->max_output < 0)
		return "max_output is out of range";
	if (call->input_len < 0 || (size_t) call->input_len < call->len - call->command_len)
		return "input_len is out of range";
	call->cwd = json_string_value(cwd);
	if (call->cwd == NULL ? cwd != NULL && !json_is_null(cwd) : call->cwd[0] == '\0')
		return "cwd is no path";
	call->env = json_object_get(call->root, "env");
	if (json_is_null(call->env))
		call->env = NULL;
	if (call->env != NULL && !json_is_object(call->env))
		return "env is no object";
	json_object_foreach(call->env, key, value)
	{
		if (!json_is_string(value) || key[0] == '\0' || strchr(key, '=') != NULL)
			return "env holds something else than strings";
	}
	tar = json_object_get(call->root, "tar");
	return tar != NULL && !json_is_null(tar) ? check_tar(call, tar) : NULL;
}

static const char *
check_call(CallFrame *call)
{
	static const char *const ops[] = {"start", "input", "output", "kill", "put", "get"};
	const char *op = json_string_value(json_object_get(call->root, "op"));
	const char *problem = NULL;
	int i;

	if (!json_is_object(call->root))
		return "the header is no JSON object";
	for (i = 0; op != NULL && i < 6 && strcmp(op, ops[i]) != 0; i++)
		;
	if (op == NULL || i == 6)
		return "op is none that is known";
	call->op = (CallOp) i;
	if (!take_id(json_object_get(call->root, "command"), call->command))
		return "command is no uuid";
	if (call->op == OP_PUT || call->op == OP_GET)
		return NULL; /* their members are read by those who know files */
	if (call->op == OP_START && (problem = check_start(call)) != NULL)
		return problem;
	call->wait_ms = number_of(call->root, "wait_ms", 0, PROTOCOL_MAX_WAIT_MS);
	call->offset = number_of(call->root, "offset", 0, MAX_OFFSET);
	call->stdout_offset = number_of(call->root, "stdout", 0, MAX_OFFSET);
	call->stderr_offset = number_of(call->root, "stderr", 0, MAX_OFFSET);
	call->part = json_is_true(json_object_get(call->root, "part"));
	if (call->wait_ms < 0)
		return "wait_ms is out of range";
	if (call->offset < 0 || call->stdout_offset < 0 || call->stderr_offset < 0)
		return "an offset is out of range";
	if (call->op == OP_KILL)
	{
		call->signal = (int) number_of(call->root, "signal", 15, 15);
		if (call->signal != 9 && call->signal != 15)
			return "signal is neither 9 nor 15";
	}
	return NULL;
}

static uint32_t
big_endian(const char *bytes)
{
	const uint8_t *b = (const uint8_t *) bytes;

	return (uint32_t) b[0] << 24 | (uint32_t) b[1] << 16 | (uint32_t) b[2] << 8 | b[3];
}

const char *
answer_call(const char *frame, size_t len, CallFrame *call)
{
	const char *problem;
	uint32_t header_len;

	memset(call, 0, sizeof(*call));
	if (len < 4)
		return "it is too short";
	call->number = big_endian(frame);
	if (len < 8)
		return "it is too short";
	header_len = big_endian(frame + 4);
	if (header_len > PROTOCOL_MAX_HEADER || header_len > len - 8)
		return "the header's length is out of range";
	call->bytes = frame + 8 + header_len;
	call->len = len - 8 - header_len;
	if (call->len > PROTOCOL_MAX_CHUNK)
		return "there are too many bytes";
	call->root = json_loadb(frame + 8, header_len, JSON_REJECT_DUPLICATES, NULL);
	problem = check_call(call);
	if (problem != NULL)
	{
		json_decref(call->root);
		call->root = NULL;
	}
	return problem;
}
