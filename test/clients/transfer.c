/*-------------------------------------------------------------------------
 *
 * transfer.c
 *		Calls "put" and "get" without a channel: src/runtime/transfer.c, asked on stdin.
 *
 * Each line is the header of a call, with its bytes in hex as "hex", and is answered
 * by a line, likewise; "pass" lets "ms" of time go by.  The argument is the work
 * directory.
 *
 *-------------------------------------------------------------------------
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../src/runtime/loop.h"
#include "../../src/runtime/transfer.h"

static int64_t now = 1000;
static Timer *timer; /* the only one there is */
static int64_t due;

void
timer_set(Timer *which, int64_t ms, void (*fire)(void *arg), void *arg)
{
	timer = which;
	timer->fire = fire;
	timer->arg = arg;
	due = now + ms;
}

bool
timer_is_set(const Timer *which)
{
	return timer == which;
}

int64_t
boottime_ms(void)
{
	return now;
}

static void
pass(int64_t ms)
{
	int64_t until = now + ms;

	while (timer != NULL && due <= until)
	{
		Timer *fired = timer;

		timer = NULL;
		now = due;
		fired->fire(fired->arg);
	}
	now = until;
}

static char *
from_hex(const char *hex, size_t *len)
{
	char *bytes;

	*len = hex != NULL ? strlen(hex) / 2 : 0;
	bytes = malloc(*len + 1);
	for (size_t i = 0; bytes != NULL && i < *len; i++)
	{
		char two[3] = {hex[2 * i], hex[2 * i + 1], '\0'};

		bytes[i] = (char) strtol(two, NULL, 16);
	}
	return bytes;
}

static json_t *
to_hex(const char *bytes, size_t len)
{
	char *hex = malloc(2 * len + 1);
	json_t *text;

	if (hex == NULL)
		abort();
	hex[0] = '\0';
	for (size_t i = 0; i < len; i++)
		sprintf(hex + 2 * i, "%02x", (unsigned char) bytes[i]);
	text = json_string(hex);
	free(hex);
	return text;
}

int
main(int argc, char **argv)
{
	const Settings settings = {.work_dir = argv[argc - 1]};
	char *line = NULL;
	size_t size = 0;

	transfer_setup(&settings);
	while (getline(&line, &size, stdin) > 0)
	{
		json_t *header = json_loads(line, JSON_ALLOW_NUL, NULL);
		const char *op = json_string_value(json_object_get(header, "op"));
		json_t *answer = NULL;
		size_t len;
		char *bytes;

		if (op == NULL)
			abort();
		if (strcmp(op, "pass") == 0)
		{
			pass(json_integer_value(json_object_get(header, "ms")));
			answer = json_object();
		}
		else if (strcmp(op, "put") == 0)
		{
			bytes = from_hex(json_string_value(json_object_get(header, "hex")), &len);
			answer = transfer_put(header, bytes, len);
			free(bytes);
		}
		else
		{
			answer = transfer_get(header, &bytes, &len);
			if (bytes != NULL)
				json_object_set_new(answer, "hex", to_hex(bytes + TRANSFER_ROOM, len));
			free(bytes);
		}
		if (answer == NULL || json_dumpf(answer, stdout, JSON_COMPACT) != 0)
			abort();
		putchar('\n');
		fflush(stdout);
		json_decref(answer);
		json_decref(header);
	}
	free(line);
	return 0;
}
