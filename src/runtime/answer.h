/*-------------------------------------------------------------------------
 *
 * answer.h
 *		Reading what the gateway says: bytes in, checked values out.
 *
 * Nothing in here touches files, the network or the clock.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_ANSWER_H
#define RUNTIME_ANSWER_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../protocol.h"

#define NO_TIME INT64_MIN
#define COMMAND_ID_LEN 36 /* a uuid, in lower case */

/* What a bootstrap, or a hydration, is answered with. */
typedef struct BootAnswer
{
	char session_id[64];
	char channel[128]; /* path of the WebSocket */
	int64_t heartbeat_interval_ms;
	int64_t deadline_grace_ms;
	int64_t deadman_allowance_ms;
	int64_t deadline; /* ms since 1970 */
	json_t *root;	  /* owns the two below */
	json_t *env;	  /* object of strings */
	json_t *repos;	  /* array of objects */
} BootAnswer;

typedef enum FrameKind
{
	FRAME_BAD,	   /* no JSON object with a type */
	FRAME_UNKNOWN, /* of a type for later versions */
	FRAME_HELLO,
	FRAME_DEADLINE,
	FRAME_NOTED,
	FRAME_CLAIMED,
	FRAME_GONE
} FrameKind;

/* What a frame of the channel says. */
typedef struct Frame
{
	FrameKind kind;
	int64_t deadline;				  /* of FRAME_DEADLINE, in ms since 1970 */
	char command[COMMAND_ID_LEN + 1]; /* of FRAME_NOTED */
} Frame;

typedef enum CallOp
{
	OP_START,
	OP_INPUT,
	OP_OUTPUT,
	OP_KILL,
	OP_PUT,
	OP_GET
} CallOp;

/* A call, as protocol.h describes it; of another op than that, members are 0. */
typedef struct CallFrame
{
	uint32_t number;
	CallOp op;
	char command[COMMAND_ID_LEN + 1];
	json_t *root;	   /* the header; owns the strings and env */
	const char *bytes; /* what follows the header, in the frame */
	size_t len;

	size_t command_len;	  /* start: of the bytes, is its text */
	const char *cwd;	  /* start: or NULL */
	json_t *env;		  /* start: object of strings, or NULL */
	const char *tar_flag; /* start: "--tar-extract" or "--tar-create" in place of a text, or NULL */
	const char *tar_path;
	const char *tar_file;
	int64_t timeout_ms;
	int64_t max_output;
	int64_t input_len;
	int64_t age_ms;
	int64_t lease_ms;

	int64_t wait_ms;	   /* start, input, output */
	int64_t offset;		   /* input */
	int64_t stdout_offset; /* start, output */
	int64_t stderr_offset;
	bool part;
	int signal; /* kill */
} CallFrame;

/*
 * Read the answer to a bootstrap.  Returns NULL, or a static text that says what is
 * wrong with it; on success answer->root is to be released with json_decref().
 */
extern const char *answer_boot(const char *text, size_t len, BootAnswer *answer);

/* The deadline (ms since 1970) in the answer to a heartbeat, or NO_TIME. */
extern int64_t answer_deadline(const char *text, size_t len);

/* What a text frame of the channel is, and says. */
extern FrameKind answer_frame(const char *text, size_t len, Frame *frame);

/*
 * Read a binary frame: a call.  Returns NULL, or a static text that says what is wrong
 * with it; on success call->root is to be released with json_decref(), and the frame
 * must stay as long as call->bytes is used.  A frame of 4 bytes or more has a number
 * in any case.
 */
extern const char *answer_call(const char *frame, size_t len, CallFrame *call);

/* ms since 1970 of "2026-01-31T12:34:56[.789](Z|+hh[:mm])", or NO_TIME. */
extern int64_t parse_time(const char *text);

/* ms since 1970 of an HTTP date "Sat, 31 Jan 2026 12:34:56 GMT", or NO_TIME. */
extern int64_t parse_http_date(const char *text);

#endif /* RUNTIME_ANSWER_H */
