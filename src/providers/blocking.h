/*-------------------------------------------------------------------------
 *
 * blocking.h
 *		What a call of a provider whose library blocks is asked, and answers.
 *
 * Free of PostgreSQL, since it is seen by threads that may not touch it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_BLOCKING_H
#define AGENTVM_PROVIDERS_BLOCKING_H

#include <stdbool.h>
#include <stddef.h>

/*
 * A call of a provider whose library blocks, as its thread sees it: what the step
 * put into the HttpRequest.
 */
typedef struct BlockingCall
{
	const char *operation; /* request->method */
	const char *target;	   /* request->url */
	const char *body;	   /* "" when there is none */
	size_t body_len;
	int timeout_ms; /* the caller gives up then; the thread should, too, if it can */
} BlockingCall;

/* Its answer, which comes zeroed; becomes the HttpReply that the next step sees. */
typedef struct BlockingReply
{
	int status;		 /* the provider's own meaning, above 0; 0: no answer, see error */
	bool maybe_done; /* without an answer: it may have taken effect */
	char *body; /* malloc()ed, NULL for none; at most HTTP_MAX_REPLY bytes; the runner frees it */
	size_t body_len;
	char *error; /* malloc()ed, or NULL; never holds a secret; the runner frees it */
} BlockingReply;

#endif /* AGENTVM_PROVIDERS_BLOCKING_H */
