/*-------------------------------------------------------------------------
 *
 * sigv4.h
 *		AWS Signature Version 4 of a request.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_NET_SIGV4_H
#define AGENTVM_NET_SIGV4_H

#include "agentvm.h"

#include "net/http.h"
#include "secret/secret.h"

/* The last signing key that was derived: for all requests of a day with the same keys; begins as zeros. */
typedef struct SigningKey
{
	bool known;
	uint8 of[SHA256_LEN]; /* hash of what it was derived from */
	uint8 key[SHA256_LEN];
} SigningKey;

/*
 * The headers to send with a request (request->sigv4 set, method POST, no query), signed as of "now": its
 * own, and Host, X-Amz-Date, X-Amz-Security-Token where there is a token, and Authorization.  A List of
 * char *, palloc'd.  All but the last are signed; none may be sent in another form.  Raises
 * XX000 for a request that this does not know how to sign.
 */
extern List *sigv4_sign(SigningKey *cache, const HttpRequest *request, time_t now);

/* Forget the key. */
extern void sigv4_forget(SigningKey *cache);

#endif /* AGENTVM_NET_SIGV4_H */
