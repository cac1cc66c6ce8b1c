/*-------------------------------------------------------------------------
 *
 * libvirt_perform.c
 *		A call on its thread: from the request's bytes to the reply's.
 *
 * This side of the provider knows nothing of PostgreSQL (see libvirt_thread.h).
 *
 *-------------------------------------------------------------------------
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "providers/libvirt_thread.h"

#define MARGIN_MS 1000 /* by which we are done before the caller gives up */

typedef struct Operation
{
	const char *name;
	bool (*run)(LvJob *job);
	bool of_vm;		/* there must be a session */
	bool exclusive; /* only one at a time for a session */
} Operation;

static const Operation operations[] = {
	{LV_LAUNCH, lv_launch, true, true},	   {LV_TERMINATE, lv_terminate, true, true},
	{LV_PAUSE, lv_pause, true, true},	   {LV_RESUME, lv_resume, true, true},
	{LV_INSPECT, lv_inspect, true, false}, {LV_PROBE, lv_probe, false, false},
	{LV_CHECK, lv_check, false, false},	   {LV_LIST, lv_list, false, false},
};

static void
run(LvJob *job, const char *name)
{
	const char *session = lv_text(job, "session");
	const char *directory = lv_text(job, "directory");

	for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++)
	{
		const Operation *operation = &operations[i];

		if (strcmp(operation->name, name) != 0)
			continue;
		if (operation->of_vm && (session == NULL || directory == NULL))
		{
			lv_fail(job, CLASS_PERMANENT, "BadRequest", "no session or no directory");
			return;
		}
		if (operation->exclusive && !lv_session_enter(job, session))
			return;
		(void) operation->run(job);
		lv_disconnect(job);
		if (operation->exclusive)
			lv_session_leave(session);
		return;
	}
	lv_fail(job, CLASS_PERMANENT, "BadRequest", "unknown operation");
}

static yajl_gen
open_result(void)
{
	yajl_gen result = yajl_gen_alloc(NULL);

	if (result == NULL)
		abort();
	yajl_gen_map_open(result);
	return result;
}

/* In place of what there is of a result. */
static void
put_error(LvJob *job)
{
	yajl_gen_free(job->result);
	job->result = open_result();
	lv_put_string(job, "error");
	yajl_gen_map_open(job->result);
	lv_put_int(job, "class", job->error.class);
	lv_put_text(job, "code", job->error.code);
	lv_put_text(job, "message", job->error.message);
	lv_put_bool(job, "began", job->mutating);
	yajl_gen_map_close(job->result);
}

void
lv_perform(const BlockingCall *call, BlockingReply *reply)
{
	const char *newline = call->body_len > 0 ? memchr(call->body, '\n', call->body_len) : NULL;
	size_t len = newline != NULL ? (size_t) (newline - call->body) : call->body_len;
	const unsigned char *text;
	size_t text_len;
	char problem[128];
	char *line;
	LvJob job = {0};

	job.uri = call->target;
	job.deadline = lv_now() + call->timeout_ms;
	if (call->timeout_ms > 3 * MARGIN_MS)
		job.deadline -= MARGIN_MS;
	line = lv_format("%.*s", (int) len, call->body);
	job.ask = yajl_tree_parse(line, problem, sizeof(problem));
	free(line);
	job.script = newline != NULL ? newline + 1 : "";
	job.script_len = newline != NULL ? call->body_len - len - 1 : 0;
	job.result = open_result();
	if (job.ask == NULL)
		lv_fail(&job, CLASS_PERMANENT, "BadRequest", "the request is no JSON: %s", problem);
	else
		run(&job, call->operation);

	if (job.failed && job.error.no_answer)
	{
		reply->maybe_done = job.mutating;
		reply->error = lv_format("%s: %s", job.error.code, job.error.message);
	}
	else
	{
		reply->status = job.failed ? LV_REFUSED : LV_DONE;
		if (job.failed)
			put_error(&job);
		yajl_gen_map_close(job.result);
		if (yajl_gen_get_buf(job.result, &text, &text_len) == yajl_gen_status_ok)
		{
			reply->body = lv_format("%.*s", (int) text_len, (const char *) text);
			reply->body_len = text_len;
		}
	}
	yajl_tree_free(job.ask);
	yajl_gen_free(job.result);
}
