/*-------------------------------------------------------------------------
 *
 * http.h
 *		Outbound HTTP: many calls in flight in one process, waited on as one fd.
 *
 * A client owns a curl multi handle, an epoll fd that holds curl's sockets and
 * a timerfd in the same epoll set, so that a caller waits with
 * WaitLatchOrSocket(MyLatch, ..., http_client_fd(client), ...) and every wait
 * stays interruptible.  No callback of curl ever raises an error; what goes
 * wrong is told in HttpReply.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_NET_HTTP_H
#define AGENTVM_NET_HTTP_H

#include "postgres.h"

#include "nodes/pg_list.h"
#include "secret/secret.h"

#define HTTP_MAX_REPLY (1024 * 1024) /* bytes of a reply body that are kept before the call fails */

typedef struct HttpClient HttpClient;
typedef struct HttpCall HttpCall;

/*
 * What to send.  Lives in the memory of whoever builds it; http_start copies
 * what it needs, so it may be freed right after.
 */
typedef struct HttpRequest
{
	const char *method; /* "GET", "POST" */
	const char *url;	/* http:// only through a Unix socket, to the metadata service, or with
						   * agentvm.allow_insecure_endpoints; checked here */
	List *headers;		/* of char *, "Name: value"; no secret */
	const char *body;	/* NULL: none */
	size_t body_len;	/* bytes */
	const char *tail;	/* what follows the body, so that nobody has to join the two, or NULL */
	size_t tail_len;	/* bytes */
	const char *sigv4;	/* CURLOPT_AWS_SIGV4 value such as "aws:amz:us-east-1:ec2", or NULL */
	const Secret *access_key;	 /* with sigv4 */
	const Secret *secret_key;	 /* with sigv4 */
	const Secret *session_token; /* X-Amz-Security-Token, or NULL */
	bool metadata; /* the machine's own metadata service: without TLS by nature, past any proxy */
	const Secret *metadata_token; /* X-aws-ec2-metadata-token, or NULL */
	const char *ca_file;		  /* NULL: the system's authorities */
	const char *unix_socket; /* path of a socket to talk to in place of the URL's host, or NULL */
	size_t max_reply;		 /* bytes of the reply's body; 0: HTTP_MAX_REPLY */
	bool large_reply;		 /* one of many kB is to be expected */
	int connect_ms;			 /* for the connection alone; 0: 10 s */
	int timeout_ms; /* whole call; 0: 30 s; the engine lowers it to two thirds of the lease */
} HttpRequest;

/* What came back; allocated in, or freed with, the memory context current at http_finished(). */
typedef struct HttpReply
{
	int status;		   /* HTTP status, 100 to 999, or 0 when no reply came */
	const char *error; /* NULL, or why there is no usable reply; never holds a secret */
	bool maybe_sent;   /* without a reply: the request may have reached the server */
	int sends;		   /* how often libcurl sent it; above 1, an earlier send went unanswered */
	const char *body;  /* NUL-terminated; "" when empty */
	size_t body_len;   /* bytes, at most max_reply of the request */
	const char *request_id; /* x-amzn-requestid or x-amz-request-id header, or NULL */
	int retry_after_s;		/* Retry-After in seconds, or -1 */
	int millis;				/* how long the call took */
} HttpReply;

/* A copy with texts and secrets of its own, in CurrentMemoryContext. */
extern HttpRequest *http_request_copy(const HttpRequest *request);

/*
 * Make a client.  Initializes libcurl in this process on first use (never in
 * the postmaster).  Raises out of memory or system errors.  The caller owns the
 * client and calls http_client_destroy(), also on error paths.
 */
extern HttpClient *http_client_create(void);

/* Abort all calls, close every fd, free the client.  Never raises. */
extern void http_client_destroy(HttpClient *client);

/*
 * As long as there are no more connections than that, those in use included, one whose
 * call has been answered is kept for the next.
 */
extern void http_client_keep(HttpClient *client, int connections);

/* The fd to wait on for readability, asked for before each wait; belongs to the client. */
extern int http_client_fd(HttpClient *client);

/*
 * Begin a call; "arg" comes back from http_finished().  Copies the request.
 * Raises AV010 for a URL that is not https (or http where allowed) and for
 * values with control characters; otherwise failures come as a reply.
 */
extern HttpCall *http_start(HttpClient *client, const HttpRequest *request, void *arg);

/*
 * Let go of a call that http_finished() has not returned: there will be no reply.
 * If its request is under way, its connection is closed, which tells the server.
 * Never raises.
 */
extern void http_cancel(HttpCall *call);

/* Move all calls on as far as they go without blocking.  Signals are blocked meanwhile. */
extern void http_run(HttpClient *client);

/*
 * Let calls that have just been started leave, rather than at the next http_run(); what else there is to do
 * makes the fd readable.
 */
extern void http_push(HttpClient *client);

/* Whether there are calls whose request has not left yet, since their connections are being made. */
extern bool http_is_sending(HttpClient *client);

/*
 * The next call that has ended, or NULL.  Sets *arg to what http_start() was
 * given.  The reply is allocated in CurrentMemoryContext and is the caller's.
 */
extern HttpReply *http_finished(HttpClient *client, void **arg);

/*
 * One call, start to end, in this backend: waits interruptibly (cancel and
 * statement_timeout end it).  For functions that a user calls.
 */
extern HttpReply *http_perform(const HttpRequest *request);

#endif /* AGENTVM_NET_HTTP_H */
