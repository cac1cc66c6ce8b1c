/*-------------------------------------------------------------------------
 *
 * log.c
 *		Structured lines on stderr: time, level, message, then key=value pairs.
 *
 *-------------------------------------------------------------------------
 */
#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define MAX_LINE 2048

static const char *const names[] = {"debug", "info", "warning", "error"};
static LogLevel lowest = LOG_LEVEL_INFO;

int
log_level_find(const char *name)
{
	int i;

	for (i = 0; i < 4; i++)
	{
		if (strcmp(name, names[i]) == 0)
			return i;
	}
	return -1;
}

void
log_set_level(LogLevel level)
{
	lowest = level;
}

typedef struct Line
{
	char text[MAX_LINE];
	size_t len;
} Line;

static void
put(Line *line, const char *text)
{
	for (; *text != '\0' && line->len < MAX_LINE - 2; text++)
		line->text[line->len++] = *text;
}

/* As a JSON string, unless it is a plain word. */
static void
put_value(Line *line, const char *value)
{
	const char *c;
	int plain = value[0] != '\0';

	for (c = value; *c != '\0'; c++)
	{
		if ((unsigned char) *c <= ' ' || *c == '"' || *c == '=' || *c == '\\' ||
			(unsigned char) *c == 0x7f)
			plain = 0;
	}
	if (plain)
	{
		put(line, value);
		return;
	}
	put(line, "\"");
	for (c = value; *c != '\0'; c++)
	{
		char escaped[8] = {*c, '\0'};

		if (*c == '"' || *c == '\\')
			snprintf(escaped, sizeof(escaped), "\\%c", *c);
		else if ((unsigned char) *c < ' ' || (unsigned char) *c == 0x7f)
			snprintf(escaped, sizeof(escaped), "\\u%04x", (unsigned char) *c);
		put(line, escaped);
	}
	put(line, "\"");
}

void
log_line(LogLevel level, const char *message, ...)
{
	Line line = {.len = 0};
	struct timespec now;
	struct tm utc;
	char stamp[40];
	va_list pairs;
	const char *key;

	if (level < lowest)
		return;
	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &utc);
	strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &utc);
	put(&line, "time=");
	put(&line, stamp);
	snprintf(stamp, sizeof(stamp), ".%03ldZ", now.tv_nsec / 1000000);
	put(&line, stamp);
	put(&line, " level=");
	put(&line, names[level]);
	put(&line, " msg=");
	put_value(&line, message);
	va_start(pairs, message);
	while ((key = va_arg(pairs, const char *)) != NULL)
	{
		const char *value = va_arg(pairs, const char *);

		if (value == NULL)
			continue;
		put(&line, " ");
		put(&line, key);
		put(&line, "=");
		put_value(&line, value);
	}
	va_end(pairs);
	line.text[line.len++] = '\n';
	(void) fwrite(line.text, 1, line.len,
				  stderr); /* one write: lines of several threads or processes stay whole */
}

const char *
log_token(const char *token)
{
	static char masked[16];
	size_t len = strlen(token);

	/* of a short one the ends would be most of it */
	if (len < 16)
		return "(short)";
	snprintf(masked, sizeof(masked), "%.4s...%s", token, token + len - 4);
	return masked;
}
