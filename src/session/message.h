/*-------------------------------------------------------------------------
 *
 * message.h
 *		Messages to and from the runtimes in VMs: protocol.h's "Calls", and text
 *		from VMs in the server's encoding.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SESSION_MESSAGE_H
#define AGENTVM_SESSION_MESSAGE_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/uuid.h"

#define MAX_OFFSET (INT64CONST(1) << 53) /* numbers that JSON carries everywhere */

/* ---- headers of messages: a JSON object in the making ---- */

/*
 * Begin a header: {"op", "command"; without its closing brace.  Appends to a
 * StringInfo of the caller's, in the server's encoding, as do the next ones.
 */
extern void header_begin(StringInfo header, const char *op, const pg_uuid_t *command);

/* Append a member; a NULL text is null.  "json" is put in as it stands. */
extern void header_text(StringInfo header, const char *name, const char *value);
extern void header_int(StringInfo header, const char *name, int64 value);
extern void header_json(StringInfo header, const char *name, const char *json);

/*
 * The bytes that a message begins with: length, and the header with its closing
 * brace, in UTF-8; *len is set.  Palloc'd.  Raises AV012 when the header is longer than the
 * protocol allows, and 22021 where its text has no form in UTF-8.
 */
extern char *header_finish(const StringInfo header, size_t *len);

/* ---- answers ---- */

/* How a stream of a command's output stands. */
typedef struct AnswerStream
{
	int64 total; /* bytes that the command has written */
	int64 from;	 /* offset of the bytes that came with the answer */
	int64 len;	 /* how many those are */
	int64 lost;	 /* bytes that are not kept */
} AnswerStream;

/* An answer of a runtime; numbers that it does not have are -1. */
typedef struct Answer
{
	char *error;   /* CALL_..., or NULL */
	char *message; /* with an error: foreign text, fit to be shown; never NULL then */
	int running;   /* 1, 0 */
	bool has_exit_code;
	int64 exit_code;
	int timed_out;
	int killed;
	int64 duration_ms;
	AnswerStream streams[2]; /* stdout, stderr */
	int64 taken;
	int64 written;
	int any_order;
	int64 size;
	char *version; /* or NULL */
	const char *bytes;
	size_t len;
} Answer;

/*
 * Take a message of a runtime apart; false when it makes no sense.  The VM may be
 * hostile: nothing in it raises an error but lack of memory.  What is in *answer is
 * palloc'd, or points into "message".
 */
extern bool answer_parse(const char *message, size_t len, Answer *answer);

/* Whether it is the answer to "start" or "output", and all in it fits together. */
extern bool answer_is_output(const Answer *answer);

/* ---- text ---- */

/*
 * Bytes of a VM as text in the server's encoding.  What is not UTF-8, and NUL, becomes
 * U+FFFD; where the server's encoding has no such character, as for all others that it
 * lacks, "?".  It may become three times as long as the bytes, but is cut so that two of
 * them fit into a row; *cut (if not NULL) is set then, else left alone.  Palloc'd.  Interruptible;
 * raises only out of memory.
 */
extern text *text_from_vm(const char *bytes, size_t len, bool *cut);

/* The same as a C string of at most "max" bytes, without control characters. */
extern char *words_from_vm(const char *bytes, size_t len, size_t max);

/* How many bytes at the end are the beginning of a character in UTF-8 whose rest may follow. */
extern size_t utf8_unfinished(const char *bytes, size_t len);

#endif /* AGENTVM_SESSION_MESSAGE_H */
