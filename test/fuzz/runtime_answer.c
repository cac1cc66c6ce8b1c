/*-------------------------------------------------------------------------
 *
 * runtime_answer.c
 *		libFuzzer on what the runtime reads of a gateway: answers, frames, calls, times.
 *
 * The first byte chooses what is read.  See "make fuzz-runtime".
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "../../src/runtime/answer.h"

extern int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What has been accepted is within the bounds that the rest relies on. */
static void
check_boot(const char *text, size_t len)
{
	BootAnswer answer;
	const char *key;
	json_t *value;
	size_t i;

	if (answer_boot(text, len, &answer) != NULL)
	{
		if (answer.root != NULL)
			abort();
		return;
	}
	if (answer.session_id[0] == '\0' || answer.channel[0] != '/' ||
		strpbrk(answer.channel, " \r\n") != NULL || answer.heartbeat_interval_ms < 1000 ||
		answer.deadman_allowance_ms < 1000 || answer.deadline_grace_ms < 0 ||
		answer.deadline == NO_TIME)
		abort();
	json_object_foreach(answer.env, key, value)
	{
		if (json_string_value(value) == NULL || strchr(key, '=') != NULL)
			abort();
	}
	json_array_foreach(answer.repos, i, value)
	{
		if (json_string_value(json_object_get(value, "url")) == NULL)
			abort();
	}
	json_decref(answer.root);
}

static bool
is_id(const char *text)
{
	return strlen(text) == COMMAND_ID_LEN && strspn(text, "0123456789abcdef-") == COMMAND_ID_LEN;
}

static void
check_call(const char *frame, size_t len)
{
	CallFrame call;
	const char *key;
	json_t *value;

	if (answer_call(frame, len, &call) != NULL)
	{
		if (call.root != NULL)
			abort();
		return;
	}
	if (!is_id(call.command) || call.bytes < frame + 8 || call.bytes + call.len != frame + len ||
		call.len > PROTOCOL_MAX_CHUNK || call.command_len > call.len ||
		call.command_len > PROTOCOL_MAX_COMMAND ||
		memchr(call.bytes, '\0', call.command_len) != NULL || call.timeout_ms < 0 ||
		call.max_output < 0 || call.age_ms < 0 || call.lease_ms < 0 || call.wait_ms < 0 ||
		call.wait_ms > PROTOCOL_MAX_WAIT_MS || call.offset < 0 || call.stdout_offset < 0 ||
		call.stderr_offset < 0 ||
		(call.op == OP_START && (size_t) call.input_len < call.len - call.command_len) ||
		(call.op == OP_KILL && call.signal != 9 && call.signal != 15) ||
		(call.tar_flag != NULL &&
		 (call.tar_path[0] != '/' || call.tar_file[0] != '/' || call.command_len > 0)))
		abort();
	json_object_foreach(call.env, key, value)
	{
		if (json_string_value(value) == NULL || key[0] == '\0' || strchr(key, '=') != NULL)
			abort();
	}
	json_decref(call.root);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	/* ended by a NUL for those that read strings, and of its very size for AddressSanitizer */
	char *text;
	size_t len;
	int64_t time = NO_TIME;
	Frame frame;

	if (size == 0)
		return 0;
	len = size - 1;
	text = malloc(len + 1);
	memcpy(text, data + 1, len);
	text[len] = '\0';
	switch (data[0] % 6)
	{
		case 0:
			check_boot(text, len);
			break;
		case 1:
			if (answer_frame(text, len, &frame) == FRAME_NOTED && !is_id(frame.command))
				abort();
			time = frame.kind == FRAME_DEADLINE ? frame.deadline : NO_TIME;
			if (frame.kind == FRAME_DEADLINE && time == NO_TIME)
				abort();
			break;
		case 2:
			(void) answer_deadline(text, len);
			break;
		case 3:
			time = parse_time(text);
			break;
		case 4:
			time = parse_http_date(text);
			break;
		case 5:
			check_call(text, len);
			break;
	}
	/* years of four digits: nothing that is reckoned with such times overflows */
	if (time != NO_TIME &&
		(time < -1000 * INT64_C(86400) || time > INT64_C(253402300800000) + 86400000))
		abort();
	free(text);
	return 0;
}
