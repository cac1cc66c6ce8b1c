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

FrameKind
answer_frame(const char *text, size_t len, int64_t *deadline)
{
	json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL);
	const char *type = json_string_value(json_object_get(root, "type"));
	FrameKind kind = FRAME_UNKNOWN;

	if (type == NULL)
		kind = FRAME_BAD;
	else if (strcmp(type, "hello") == 0)
		kind = FRAME_HELLO;
	else if (strcmp(type, "gone") == 0)
		kind = FRAME_GONE;
	else if (strcmp(type, "deadline") == 0)
	{
		*deadline = deadline_of(root);
		kind = *deadline != NO_TIME ? FRAME_DEADLINE : FRAME_BAD;
	}
	json_decref(root);
	return kind;
}
