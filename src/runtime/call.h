/*-------------------------------------------------------------------------
 *
 * call.h
 *		Calls that come over the channel, and their way back.
 *
 * A call is answered at once, or later: it waits then, and is forgotten when the
 * channel is lost.  Answers leave one after the other; those with bytes are made
 * when there is room for them.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_CALL_H
#define RUNTIME_CALL_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "answer.h"
#include "link.h"
#include "loop.h"
#include "settings.h"

struct Command;

/* A call under way */
typedef struct Call
{
	lws_dll2_t list; /* of those that wait, or of those that can be answered */
	uint32_t number;
	json_t *answer; /* its header, once it is known */
	json_t *get;	/* header of a get, which is read when there is room for the answer */

	/* of command.c */
	struct Command *command; /* that it asks for; NULL: none */
	lws_dll2_t of;			 /* list of that command's calls */
	Timer wait;
	int64_t offsets[2]; /* of stdout and stderr */
	size_t lens[2];		/* how much of them the answer has */
	bool part;
	char *input; /* what there was no room for, from input_offset on; NULL: none */
	size_t input_len;
	int64_t input_offset;
} Call;

/* A frame has come over the channel. */
extern void call_take(Link *channel, const char *frame, size_t len);

/*
 * From here on calls are held back, as long as their channel lasts, until call_release():
 * the VM is not yet what they expect.
 */
extern void call_hold(void);
extern void call_release(void);

/* It can be answered: with a header, whose reference is taken over, or (NULL) as command_answer() says. */
extern void call_answer(Call *call, json_t *answer);

/* The same with an error, one of protocol.h. */
extern void call_fail(Call *call, const char *error, const char *message);

/* Send what can be answered, as far as there is room: after anything that may have led to that. */
extern void call_send(void);

/* Calls are forgotten: their channel is gone. */
extern void call_forget_all(void);

#endif /* RUNTIME_CALL_H */
