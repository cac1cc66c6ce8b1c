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

#define NO_TIME INT64_MIN

/* What a bootstrap is answered with. */
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
	FRAME_GONE
} FrameKind;

/*
 * Read the answer to a bootstrap.  Returns NULL, or a static text that says what is
 * wrong with it; on success answer->root is to be released with json_decref().
 */
extern const char *answer_boot(const char *text, size_t len, BootAnswer *answer);

/* The deadline (ms since 1970) in the answer to a heartbeat, or NO_TIME. */
extern int64_t answer_deadline(const char *text, size_t len);

/* What a frame of the channel is; sets *deadline for FRAME_DEADLINE. */
extern FrameKind answer_frame(const char *text, size_t len, int64_t *deadline);

/* ms since 1970 of "2026-01-31T12:34:56[.789](Z|+hh[:mm])", or NO_TIME. */
extern int64_t parse_time(const char *text);

/* ms since 1970 of an HTTP date "Sat, 31 Jan 2026 12:34:56 GMT", or NO_TIME. */
extern int64_t parse_http_date(const char *text);

#endif /* RUNTIME_ANSWER_H */
