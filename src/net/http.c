/*-------------------------------------------------------------------------
 *
 * http.c
 *		Outbound HTTP: many calls in flight in one process, waited on as one fd.
 *
 * libcurl's multi interface tells, through two callbacks, which sockets it
 * waits for and when it next wants to be called.  The sockets go into an epoll
 * set, the time into a timerfd in that same set.  The epoll fd is itself
 * pollable, so a caller waits for its latch and for all of HTTP with one
 * WaitLatchOrSocket(), and every wait stays interruptible.  http_run() then
 * hands over to libcurl what is ready; it never blocks.
 *
 * Rules that this file keeps:
 *
 * - A callback never raises an error and never pallocs: longjmp through libcurl
 *	 would leave it in pieces.  It records what went wrong in the call and
 *	 returns a failure code.  Hence calls and their buffers are malloc'ed.
 * - libcurl resolves names on threads of its own.  They inherit the signal mask,
 *	 so all signals are blocked around every call that may start one; else a
 *	 thread could run a signal handler of PostgreSQL.  A name that is still being
 *	 resolved does not hold up a cancelled call (CURLOPT_QUICK_EXIT).
 * - libcurl is initialized in the process that uses it, never in the postmaster.
 * - It keeps copies of keys and tokens, and of what it derives from them.  It is
 *	 given an allocator that wipes what is freed; replies, which may be keys, are
 *	 kept in memory of the same kind.
 * - No redirects (credentials would follow), no other protocols than HTTP.
 * - Nothing that libcurl reports about the content of a reply becomes an error
 *	 text, only what it reports about the connection.
 *
 * libcurl silently repeats a POST on a new connection when a kept one dies
 * before the first byte of a reply.  Connections are kept all the same, since a
 * TLS handshake per call would cost far more; callers make their requests
 * idempotent with tokens.  It does mean that "could not connect" may follow
 * upon a request that did leave, so maybe_sent is not told from the error but
 * from what was done: it is false if no connection ever got as far as sending.
 * How often it sent is counted: the answer to a repeat says nothing about what
 * became of the first.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include <curl/curl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "lib/ilist.h"
#include "portability/instr_time.h"
#include "storage/fd.h"

#include "net/http.h"
#include "signals.h"

#define DEFAULT_TIMEOUT_MS 30000
#define CONNECT_TIMEOUT_MS 10000
#define MAX_REPLY_HEADERS (256 * 1024) /* bytes of headers before a call fails */
#define MAX_KEPT_CONNECTIONS 256	   /* of all, those in use included: beyond that none is kept */
#define MAX_IDLE_CONNECTION_S 15	   /* AWS drops idle connections after about 20 s */
#define CLOSE_WHEN_IDLE_MS 5000		   /* without any call, all kept connections go */
#define LARGE_BODY (64 * 1024) /* bytes; libcurl's own buffer would send it in several pieces */
#define SMALL_BUFFER                                                                               \
	(8 * 1024) /* bytes: libcurl's own is twice that, for each of 256 calls in flight */
#define LARGE_BUFFER (512 * 1024)
#define MAX_ROUNDS 16 /* of epoll_wait in one http_run */

struct HttpClient
{
	CURLM *multi;
	int epoll_fd;
	int timer_fd;
	bool broken; /* the multi handle refuses to work and must be replaced */
	bool wake;	 /* calls have ended that nobody was told of */
	bool now;	 /* libcurl wants to be called at once */
	int64 due;	 /* when it wants to be called next, ms on the timer's clock; 0: no time */
	int64 armed; /* when the timer goes off: not after "due", and often before it; 0: it does not */
	bool used;	 /* there may be connections that are kept */
	int in_flight; /* calls on either list */
	int unsent;	   /* of those under way: not sent yet, since their connections are being made */
	int max_kept;  /* connections */
	dlist_head running; /* of HttpCall, added to the multi handle */
	dlist_head ended;	/* of HttpCall, to be returned by http_finished */
};

struct HttpCall
{
	dlist_node node;
	HttpClient *client;
	CURL *easy; /* NULL if it could not be made */
	bool added; /* easy is in the multi handle */
	void *arg;
	instr_time started;

	/* the request: libcurl refers to these */
	struct curl_slist *headers;
	char *body;
	size_t body_len;

	/* the reply, as it comes in */
	char *reply;
	size_t reply_len;
	size_t reply_size;
	size_t max_reply;
	size_t headers_len;
	const char *problem; /* why a callback ended the call */
	char request_id[128];
	int retry_after_s;

	/* the end */
	CURLcode result;
	long status;
	bool maybe_sent;
	int sends;
	int millis;
	char error[CURL_ERROR_SIZE];
};

static bool curl_ready = false;

StaticAssertDecl(HTTP_MAX_REPLY == 1024 * 1024, "on_body names another limit");

/* ---- callbacks of libcurl: no ereport, no palloc ---- */

static int
on_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *socket_arg)
{
	HttpClient *client = arg;
	struct epoll_event event = {0};
	int op = socket_arg == NULL ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;

	if (what == CURL_POLL_REMOVE)
	{
		/* It may be closed by now, and so have left the set by itself. */
		epoll_ctl(client->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
		curl_multi_assign(client->multi, fd, NULL);
		return 0;
	}

	event.data.fd = fd;
	if (what & CURL_POLL_IN)
		event.events |= EPOLLIN;
	if (what & CURL_POLL_OUT)
		event.events |= EPOLLOUT;
	if (epoll_ctl(client->epoll_fd, op, fd, &event) != 0)
	{
		/* What libcurl knew of this number and what the kernel knows may differ after a close. */
		if (op == EPOLL_CTL_ADD && errno == EEXIST)
			op = EPOLL_CTL_MOD;
		else if (op == EPOLL_CTL_MOD && errno == ENOENT)
			op = EPOLL_CTL_ADD;
		else
			return -1;
		if (epoll_ctl(client->epoll_fd, op, fd, &event) != 0)
			return -1;
	}
	curl_multi_assign(client->multi, fd, client);
	return 0;
}

/* Milliseconds on the timer's clock. */
static int64
clock_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64CONST(1000) + now.tv_nsec / 1000000;
}

/* Have the timer go off then; a time that has come makes the fd readable at once. */
static int
arm(HttpClient *client, int64 at)
{
	struct itimerspec when = {{0, 0}, {at / 1000, at % 1000 * 1000000}};

	client->armed = at;
	return timerfd_settime(client->timer_fd, TFD_TIMER_ABSTIME, &when, NULL) == 0 ? 0 : -1;
}

/*
 * Each call has a timeout, so that the next of them moves with each that ends: the timer
 * is left as it is while that is not too late, and set again when it has gone off.
 */
static int
on_timer(CURLM *multi, long timeout_ms, void *arg)
{
	HttpClient *client = arg;

	if (timeout_ms == 0)
	{
		client->now = true;
		return 0;
	}
	if (timeout_ms < 0 && client->in_flight == 0 && client->used)
		timeout_ms = CLOSE_WHEN_IDLE_MS;
	/* a ms more than asked for: libcurl's own clock is finer */
	client->due = timeout_ms < 0 ? 0 : clock_ms() + timeout_ms + 1;
	if (client->due == 0 || (client->armed != 0 && client->armed <= client->due))
		return 0;
	return arm(client, client->due);
}

/* The timer has gone off: whether it is time for what it was set for. */
static bool
time_has_come(HttpClient *client)
{
	client->armed = 0;
	if (client->due == 0)
		return false;
	if (clock_ms() < client->due)
	{
		(void) arm(client, client->due);
		return false;
	}
	client->due = 0;
	return true;
}

/* Programs that the server runs are not to inherit a connection. */
static curl_socket_t
on_open(void *arg, curlsocktype purpose, struct curl_sockaddr *address)
{
	int fd = socket(address->family, address->socktype | SOCK_CLOEXEC, address->protocol);

	return fd >= 0 ? fd : CURL_SOCKET_BAD;
}

/* A request is about to be sent on a connection that is ready, for the first time or again. */
static int
on_send(void *arg, char *remote_ip, char *local_ip, int remote_port, int local_port)
{
	HttpCall *call = arg;

	if (call->sends++ == 0)
		call->client->unsent--;
	return CURL_PREREQFUNC_OK;
}

static size_t
on_body(char *data, size_t size, size_t nmemb, void *arg)
{
	HttpCall *call = arg;
	size_t len = size * nmemb;

	if (len > call->max_reply - call->reply_len)
	{
		call->problem =
			call->max_reply == HTTP_MAX_REPLY ? "reply is larger than 1 MiB" : "reply is too large";
		return 0;
	}
	if (call->reply_len + len >= call->reply_size) /* with room for a NUL */
	{
		size_t want = call->reply_size == 0 ? 4096 : call->reply_size * 2;
		curl_off_t announced = 0;
		char *grown;

		/* a large one need not be moved as it grows */
		if (call->reply_size == 0 &&
			curl_easy_getinfo(call->easy, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &announced) ==
				CURLE_OK &&
			announced > 0 && announced <= call->max_reply)
			want = announced + 1;
		while (want <= call->reply_len + len)
			want *= 2;
		/* keys come in small replies; a file of a VM's may be large */
		grown = call->max_reply == HTTP_MAX_REPLY ? secret_realloc(call->reply, want)
												  : realloc(call->reply, want);
		if (grown == NULL)
		{
			call->problem = "out of memory";
			return 0;
		}
		call->reply = grown;
		call->reply_size = want;
	}
	memcpy(call->reply + call->reply_len, data, len);
	call->reply_len += len;
	return len;
}

/* Where the value of a header begins if the line is that header, else NULL. */
static const char *
header_value(const char *line, size_t len, const char *name)
{
	size_t name_len = strlen(name);
	const char *end = line + len;

	if (len <= name_len || pg_strncasecmp(line, name, name_len) != 0 || line[name_len] != ':')
		return NULL;
	for (line += name_len + 1; line < end && (*line == ' ' || *line == '\t'); line++)
		;
	return line;
}

static size_t
on_header(char *data, size_t size, size_t nmemb, void *arg)
{
	HttpCall *call = arg;
	size_t len = size * nmemb;
	const char *end = data + len;
	const char *value;

	call->headers_len += len;
	if (call->headers_len > MAX_REPLY_HEADERS)
	{
		call->problem = "reply headers are larger than 256 KiB";
		return 0;
	}

	if ((value = header_value(data, len, "x-amzn-requestid")) != NULL ||
		(value = header_value(data, len, "x-amz-request-id")) != NULL)
	{
		size_t n = 0;

		while (value<end && * value> ' ' && *value < 0x7f && n < sizeof(call->request_id) - 1)
			call->request_id[n++] = *value++;
		call->request_id[n] = '\0';
	}
	else if ((value = header_value(data, len, "retry-after")) != NULL)
	{
		int seconds = -1;

		/* The other form, a date, is not used by those we call. */
		while (value < end && *value >= '0' && *value <= '9' && seconds < 1000000)
			seconds = Max(seconds, 0) * 10 + (*value++ - '0');
		call->retry_after_s = seconds;
	}
	return len;
}

/* ---- clients ---- */

/* Prepare libcurl in this process. */
static void
init_curl(void)
{
	sigset_t saved;
	CURLcode rc;

	if (curl_ready)
		return;
	if (IsPostmasterEnvironment && !IsUnderPostmaster)
		elog(ERROR, "HTTP is not to be used in the postmaster");
	signals_block(&saved);
	rc = curl_global_init_mem(CURL_GLOBAL_DEFAULT, malloc, secret_free, secret_realloc, strdup,
							  calloc);
	signals_restore(&saved);
	if (rc != CURLE_OK)
		ereport(ERROR, (errcode(ERRCODE_SYSTEM_ERROR),
						errmsg("could not initialize libcurl: %s", curl_easy_strerror(rc))));
	curl_ready = true;
}

/* Give the client a new multi handle; false when out of memory. */
static bool
open_multi(HttpClient *client)
{
	CURLM *multi = curl_multi_init();

	if (multi == NULL)
		return false;
	client->multi = multi;
	client->broken = false;
	curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, on_socket);
	curl_multi_setopt(multi, CURLMOPT_SOCKETDATA, client);
	curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, on_timer);
	curl_multi_setopt(multi, CURLMOPT_TIMERDATA, client);
	curl_multi_setopt(multi, CURLMOPT_PIPELINING, (long) CURLPIPE_NOTHING);
	curl_multi_setopt(multi, CURLMOPT_MAX_HOST_CONNECTIONS, 0L);
	curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, (long) client->max_kept);
	return true;
}

/*
 * Close the connections that are kept, each of which holds the keys that it was
 * made for.  There must be no call under way.
 */
static void
forget_connections(HttpClient *client)
{
	curl_multi_cleanup(client->multi);
	client->used = false;
	client->broken = !open_multi(client);
	if (client->broken)
		client->multi = NULL;
}

HttpClient *
http_client_create(void)
{
	HttpClient *client;
	struct epoll_event event = {0};

	init_curl();
	client = calloc(1, sizeof(HttpClient));
	if (client == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	dlist_init(&client->running);
	dlist_init(&client->ended);
	client->max_kept = MAX_KEPT_CONNECTIONS;

	/*
	 * fd.c hears of these two only, not of libcurl's sockets: with more than a third
	 * of its limit told to it, it would refuse the epoll fd of the next
	 * WaitLatchOrSocket().
	 */
	ReserveExternalFD();
	ReserveExternalFD();
	client->timer_fd = -1;
	client->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (client->epoll_fd >= 0)
		client->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	event.events = EPOLLIN;
	event.data.fd = client->timer_fd;
	if (client->timer_fd < 0 ||
		epoll_ctl(client->epoll_fd, EPOLL_CTL_ADD, client->timer_fd, &event) != 0)
	{
		int save_errno = errno;

		http_client_destroy(client);
		errno = save_errno;
		ereport(ERROR, (errcode_for_socket_access(),
						errmsg("could not create the event queue of an HTTP client: %m")));
	}
	if (!open_multi(client))
	{
		http_client_destroy(client);
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	}
	return client;
}

/* Take a call from libcurl and from its list, and free it.  Never raises. */
static void
free_call(HttpCall *call)
{
	HttpClient *client = call->client;
	sigset_t saved;

	signals_block(&saved);
	if (call->added)
	{
		curl_multi_remove_handle(client->multi, call->easy);
		if (call->sends == 0)
			client->unsent--;
	}
	/* Not kept for another call: curl_easy_reset() would leave the keys in it. */
	if (call->easy != NULL)
		curl_easy_cleanup(call->easy);
	client->in_flight--;
	if (client->in_flight == 0)
		on_timer(client->multi, -1, client);
	signals_restore(&saved);

	/* A header may be a session token, the body may hold a bootstrap token. */
	for (struct curl_slist *header = call->headers; header != NULL; header = header->next)
		secret_wipe(header->data, strlen(header->data));
	curl_slist_free_all(call->headers);
	if (call->body != NULL)
		secret_wipe(call->body, call->body_len);
	free(call->body);
	if (call->max_reply == HTTP_MAX_REPLY)
		secret_free(call->reply);
	else
		free(call->reply);
	dlist_delete(&call->node);
	free(call);
}

void
http_client_destroy(HttpClient *client)
{
	sigset_t saved;

	if (client == NULL)
		return;
	while (!dlist_is_empty(&client->running))
		free_call(dlist_head_element(HttpCall, node, &client->running));
	while (!dlist_is_empty(&client->ended))
		free_call(dlist_head_element(HttpCall, node, &client->ended));

	signals_block(&saved);
	if (client->multi != NULL)
		curl_multi_cleanup(client->multi);
	signals_restore(&saved);

	if (client->timer_fd >= 0)
		close(client->timer_fd);
	if (client->epoll_fd >= 0)
		close(client->epoll_fd);
	ReleaseExternalFD();
	ReleaseExternalFD();
	free(client);
}

void
http_client_keep(HttpClient *client, int connections)
{
	client->max_kept = connections;
	if (client->multi != NULL)
		curl_multi_setopt(client->multi, CURLMOPT_MAXCONNECTS, (long) connections);
}

void
http_cancel(HttpCall *call)
{
	free_call(call);
}

int
http_client_fd(HttpClient *client)
{
	if (client->now || client->wake)
		(void) arm(client, 1);
	return client->epoll_fd;
}

bool
http_is_sending(HttpClient *client)
{
	return client->unsent > 0;
}

/* ---- beginning a call ---- */

static bool
has_control_characters(const char *text)
{
	for (; *text != '\0'; text++)
	{
		if ((unsigned char) *text < 0x20 || *text == 0x7f)
			return true;
	}
	return false;
}

static void
check_secret(const Secret *secret, const char *name)
{
	if (secret != NULL && (has_control_characters(secret_bytes(secret)) ||
						   strlen(secret_bytes(secret)) != secret_len(secret)))
		ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
						errmsg("%s contains control characters", name)));
}

/* Raise AV010 for what must not be sent. */
static void
check_request(const HttpRequest *request)
{
	ListCell *lc;

	if (pg_strncasecmp(request->url, "http://", 7) == 0)
	{
		if (!avm_allow_insecure_endpoints && !request->metadata && request->unix_socket == NULL)
			ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
							errmsg("refusing to call an endpoint without TLS"),
							errhint("Use an https URL, or set agentvm.allow_insecure_endpoints.")));
	}
	else if (pg_strncasecmp(request->url, "https://", 8) != 0)
		ereport(ERROR,
				(errcode(AVM_INVALID_CONFIGURATION), errmsg("endpoint is not an https URL")));
	if (has_control_characters(request->url) || strchr(request->url, ' ') != NULL)
		ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
						errmsg("endpoint URL contains blanks or control characters")));

	if (request->method[0] == '\0' ||
		strspn(request->method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") != strlen(request->method))
		elog(ERROR, "invalid HTTP method");
	foreach (lc, request->headers)
	{
		const char *header = lfirst(lc);
		const char *colon = strchr(header, ':');

		/* libcurl takes a header without a value for an order to leave it out. */
		if (colon == NULL || colon == header || colon[1 + strspn(colon + 1, " ")] == '\0')
			elog(ERROR, "malformed HTTP header");
		if (has_control_characters(header))
			ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
							errmsg("value of HTTP header \"%.*s\" contains control characters",
								   (int) (colon - header), header)));
	}
	check_secret(request->access_key, "access key");
	check_secret(request->secret_key, "secret key");
	check_secret(request->session_token, "session token");
	check_secret(request->metadata_token, "metadata token");
}

/* Append a copy of a header; false when out of memory. */
static bool
add_header(HttpCall *call, const char *header)
{
	struct curl_slist *longer = curl_slist_append(call->headers, header);

	if (longer == NULL)
		return false;
	call->headers = longer;
	return true;
}

/* Append a header whose value is a secret; false when out of memory. */
static bool
add_secret_header(HttpCall *call, const char *name, const Secret *value)
{
	size_t size = strlen(name) + strlen(": ") + secret_len(value) + 1;
	char *header = malloc(size);
	bool added = false;

	if (header != NULL)
	{
		snprintf(header, size, "%s: %s", name, secret_bytes(value));
		added = add_header(call, header);
	}
	secret_free(header);
	return added;
}

/* Hand the request to the easy handle; what libcurl does not copy, the call keeps. */
static CURLcode
set_up_call(HttpCall *call, const HttpRequest *request)
{
	CURL *easy = call->easy;
	CURLcode rc = CURLE_OK;
	long timeout_ms = request->timeout_ms > 0 ? request->timeout_ms : DEFAULT_TIMEOUT_MS;
	long connect_ms = request->connect_ms > 0 ? request->connect_ms : CONNECT_TIMEOUT_MS;
	ListCell *lc;

#define SETOPT(option, value)                                                                      \
	do                                                                                             \
	{                                                                                              \
		if (rc == CURLE_OK)                                                                        \
			rc = curl_easy_setopt(easy, (option), (value));                                        \
	} while (0)

	SETOPT(CURLOPT_URL, request->url);
	SETOPT(CURLOPT_DISALLOW_USERNAME_IN_URL, 1L);
	SETOPT(CURLOPT_PROTOCOLS_STR,
		   avm_allow_insecure_endpoints || request->metadata || request->unix_socket != NULL
			   ? "http,https"
			   : "https");
	if (request->unix_socket != NULL)
		SETOPT(CURLOPT_UNIX_SOCKET_PATH, request->unix_socket);
	if (request->unix_socket != NULL || request->metadata)
		SETOPT(CURLOPT_PROXY, "");
	SETOPT(CURLOPT_FOLLOWLOCATION, 0L);
	SETOPT(CURLOPT_HTTP_VERSION, (long) CURL_HTTP_VERSION_1_1);
	SETOPT(CURLOPT_NOSIGNAL, 1L);
#if LIBCURL_VERSION_NUM >= 0x075700
	SETOPT(CURLOPT_QUICK_EXIT, 1L);
#endif
	SETOPT(CURLOPT_TIMEOUT_MS, timeout_ms);
	SETOPT(CURLOPT_CONNECTTIMEOUT_MS, Min(timeout_ms, connect_ms));
	SETOPT(CURLOPT_MAXAGE_CONN, (long) MAX_IDLE_CONNECTION_S);
	SETOPT(CURLOPT_USERAGENT, "agentvm/" AGENTVM_VERSION);

	SETOPT(CURLOPT_SSL_VERIFYPEER, 1L);
	SETOPT(CURLOPT_SSL_VERIFYHOST, 2L);
	SETOPT(CURLOPT_SSLVERSION, (long) CURL_SSLVERSION_TLSv1_2);
	if (request->ca_file != NULL)
	{
		/* and nobody else: a build may know a directory of public ones, too */
		SETOPT(CURLOPT_CAINFO, request->ca_file);
		SETOPT(CURLOPT_CAPATH, (char *) NULL);
#if LIBCURL_VERSION_NUM >= 0x075700
		SETOPT(CURLOPT_CA_CACHE_TIMEOUT, 0L); /* it may be another file of that name by now */
#endif
	}

	SETOPT(CURLOPT_BUFFERSIZE, request->large_reply ? (long) LARGE_BUFFER : (long) SMALL_BUFFER);
	SETOPT(CURLOPT_PRIVATE, (char *) call);
	SETOPT(CURLOPT_ERRORBUFFER, call->error);
	SETOPT(CURLOPT_WRITEFUNCTION, on_body);
	SETOPT(CURLOPT_WRITEDATA, call);
	SETOPT(CURLOPT_HEADERFUNCTION, on_header);
	SETOPT(CURLOPT_HEADERDATA, call);
	SETOPT(CURLOPT_OPENSOCKETFUNCTION, on_open);
	SETOPT(CURLOPT_PREREQFUNCTION, on_send);
	SETOPT(CURLOPT_PREREQDATA, call);

	if (request->body != NULL || strcmp(request->method, "POST") == 0)
	{
		size_t body_len = request->body != NULL ? request->body_len : 0;
		size_t tail_len = request->tail != NULL ? request->tail_len : 0;

		call->body_len = body_len + tail_len;
		call->body = malloc(call->body_len + 1);
		if (call->body == NULL)
			return CURLE_OUT_OF_MEMORY;
		if (body_len > 0)
			memcpy(call->body, request->body, body_len);
		if (tail_len > 0)
			memcpy(call->body + body_len, request->tail, tail_len);
		call->body[call->body_len] = '\0';
		if (call->body_len > LARGE_BODY)
			SETOPT(CURLOPT_UPLOAD_BUFFERSIZE, (long) LARGE_BUFFER);
		SETOPT(CURLOPT_POST, 1L);
		SETOPT(CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t) call->body_len);
		SETOPT(CURLOPT_POSTFIELDS, call->body);
	}
	else
		SETOPT(CURLOPT_HTTPGET, 1L);
	if (strcmp(request->method, request->body != NULL ? "POST" : "GET") != 0 &&
		strcmp(request->method, "POST") != 0)
		SETOPT(CURLOPT_CUSTOMREQUEST, request->method);

	foreach (lc, request->headers)
	{
		if (!add_header(call, lfirst(lc)))
			return CURLE_OUT_OF_MEMORY;
	}
	/* where much is sent, libcurl would wait a second for leave to do so */
	if (request->tail_len > 0 && !add_header(call, "Expect:"))
		return CURLE_OUT_OF_MEMORY;
	if (request->sigv4 != NULL)
	{
		SETOPT(CURLOPT_AWS_SIGV4, request->sigv4);
		SETOPT(CURLOPT_USERNAME, secret_bytes(request->access_key));
		SETOPT(CURLOPT_PASSWORD, secret_bytes(request->secret_key));
	}
	if (request->session_token != NULL &&
		!add_secret_header(call, "X-Amz-Security-Token", request->session_token))
		return CURLE_OUT_OF_MEMORY;
	if (request->metadata_token != NULL &&
		!add_secret_header(call, "X-aws-ec2-metadata-token", request->metadata_token))
		return CURLE_OUT_OF_MEMORY;
	SETOPT(CURLOPT_HTTPHEADER, call->headers);
#undef SETOPT

	return rc;
}

/* Move a call that libcurl has ended, or never had, to the ended ones. */
static void
end_call(HttpCall *call, CURLcode result)
{
	HttpClient *client = call->client;
	instr_time now;

	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, call->started);
	call->millis = (int) INSTR_TIME_GET_MILLISEC(now);
	call->result = result;
	if (call->added)
	{
		long request_size = 0;
		curl_off_t pretransfer_us = 0;

		curl_easy_getinfo(call->easy, CURLINFO_RESPONSE_CODE, &call->status);
		curl_easy_getinfo(call->easy, CURLINFO_REQUEST_SIZE, &request_size);
		curl_easy_getinfo(call->easy, CURLINFO_PRETRANSFER_TIME_T, &pretransfer_us);
		curl_multi_remove_handle(client->multi, call->easy);
		call->added = false;
		if (call->sends == 0)
			client->unsent--;
		call->maybe_sent = request_size > 0 || pretransfer_us > 0;
	}
	dlist_delete(&call->node);
	dlist_push_tail(&client->ended, &call->node);
}

static const Secret *
copy_secret(const Secret *secret)
{
	return secret != NULL ? secret_make(secret_bytes(secret), secret_len(secret)) : NULL;
}

static const char *
copy_text(const char *text)
{
	return text != NULL ? pstrdup(text) : NULL;
}

HttpRequest *
http_request_copy(const HttpRequest *request)
{
	HttpRequest *copy = palloc(sizeof(HttpRequest));
	ListCell *lc;

	*copy = *request;
	copy->method = copy_text(request->method);
	copy->url = copy_text(request->url);
	copy->headers = NIL;
	foreach (lc, request->headers)
		copy->headers = lappend(copy->headers, pstrdup(lfirst(lc)));
	copy->body = request->body != NULL ? pnstrdup(request->body, request->body_len) : NULL;
	copy->tail = request->tail != NULL ? pnstrdup(request->tail, request->tail_len) : NULL;
	copy->sigv4 = copy_text(request->sigv4);
	copy->access_key = copy_secret(request->access_key);
	copy->secret_key = copy_secret(request->secret_key);
	copy->session_token = copy_secret(request->session_token);
	copy->metadata_token = copy_secret(request->metadata_token);
	copy->ca_file = copy_text(request->ca_file);
	copy->unix_socket = copy_text(request->unix_socket);
	return copy;
}

HttpCall *
http_start(HttpClient *client, const HttpRequest *request, void *arg)
{
	HttpCall *call;
	CURLcode rc;
	sigset_t saved;

	check_request(request);
	if (request->sigv4 != NULL && (request->access_key == NULL || request->secret_key == NULL))
		elog(ERROR, "a signed request needs keys");

	call = calloc(1, sizeof(HttpCall));
	if (call == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	call->client = client;
	call->arg = arg;
	call->retry_after_s = -1;
	call->max_reply = request->max_reply > 0 ? request->max_reply : HTTP_MAX_REPLY;
	INSTR_TIME_SET_CURRENT(call->started);

	/* From here on nothing raises. */
	signals_block(&saved);
	if (client->broken && dlist_is_empty(&client->running))
		forget_connections(client);
	dlist_push_tail(&client->running, &call->node);
	client->in_flight++;
	client->used = true;

	call->easy = curl_easy_init();
	if (call->easy == NULL || client->multi == NULL)
		rc = CURLE_OUT_OF_MEMORY;
	else
		rc = set_up_call(call, request);
	if (rc == CURLE_OK)
	{
		if (curl_multi_add_handle(client->multi, call->easy) == CURLM_OK)
		{
			call->added = true;
			client->unsent++;
		}
		else
			rc = CURLE_FAILED_INIT;
	}
	if (!call->added)
	{
		end_call(call, rc);
		client->wake = true;
	}
	signals_restore(&saved);
	return call;
}

/* ---- moving on ---- */

/* Hand over to libcurl what is ready. */
static void
move_on(HttpClient *client)
{
	struct epoll_event events[64];
	int running;

	/* The set is level triggered: what is not reached today wakes the caller again. */
	for (int round = 0; round < MAX_ROUNDS && client->multi != NULL; round++)
	{
		int n = epoll_wait(client->epoll_fd, events, lengthof(events), 0);
		bool expired = false;
		CURLMcode rc = CURLM_OK;

		if (n <= 0 && !client->now)
			break;
		for (int i = 0; i < n && rc == CURLM_OK; i++)
		{
			int mask = 0;

			if (events[i].data.fd == client->timer_fd)
			{
				uint64 ticks;

				if (read(client->timer_fd, &ticks, sizeof(ticks)) > 0)
					expired = time_has_come(client);
				continue;
			}
			if (events[i].events & EPOLLIN)
				mask |= CURL_CSELECT_IN;
			if (events[i].events & EPOLLOUT)
				mask |= CURL_CSELECT_OUT;
			if (events[i].events & (EPOLLERR | EPOLLHUP))
				mask |= CURL_CSELECT_ERR;
			rc = curl_multi_socket_action(client->multi, events[i].data.fd, mask, &running);
		}
		if (expired && client->in_flight == 0 && client->used)
		{
			forget_connections(client);
			continue;
		}
		if ((expired || client->now) && rc == CURLM_OK)
		{
			client->now = false;
			rc = curl_multi_socket_action(client->multi, CURL_SOCKET_TIMEOUT, 0, &running);
		}
		if (rc != CURLM_OK)
		{
			client->broken = true;
			break;
		}
	}
}

/* Take from libcurl what has ended. */
static void
take_ended(HttpClient *client)
{
	CURLMsg *message;
	int left;

	while (client->multi != NULL && (message = curl_multi_info_read(client->multi, &left)) != NULL)
	{
		CURL *easy = message->easy_handle;
		CURLcode result = message->data.result;
		char *call;

		if (message->msg != CURLMSG_DONE)
			continue;
		curl_easy_getinfo(easy, CURLINFO_PRIVATE, &call);
		end_call((HttpCall *) call, result);
	}

	/* A multi handle that fails does so for good: end all, http_start makes a new one. */
	while (client->broken && !dlist_is_empty(&client->running))
		end_call(dlist_head_element(HttpCall, node, &client->running), CURLE_ABORTED_BY_CALLBACK);
}

void
http_run(HttpClient *client)
{
	sigset_t saved;

	signals_block(&saved);
	move_on(client);
	take_ended(client);
	client->wake = false;
	if (client->multi == NULL)
		client->now = false;
	signals_restore(&saved);
}

void
http_push(HttpClient *client)
{
	if (!client->now)
		return;
	http_run(client);
	client->wake = !dlist_is_empty(&client->ended);
}

/* Why there is no reply, without anything that the other side may have sent. */
static char *
error_text(const HttpCall *call)
{
	char *text;

	if (call->problem != NULL)
		return pstrdup(call->problem);
	switch (call->result)
	{
		case CURLE_COULDNT_RESOLVE_PROXY:
		case CURLE_COULDNT_RESOLVE_HOST:
		case CURLE_COULDNT_CONNECT:
		case CURLE_SSL_CONNECT_ERROR:
		case CURLE_PEER_FAILED_VERIFICATION:
		case CURLE_SSL_CACERT_BADFILE:
		case CURLE_OPERATION_TIMEDOUT:
			text = pstrdup(call->error[0] != '\0' ? call->error : curl_easy_strerror(call->result));
			break;
		default:
			text = pstrdup(curl_easy_strerror(call->result));
			break;
	}

	/* A certificate may name anything, in any encoding. */
	for (char *p = text; *p != '\0'; p++)
	{
		if ((unsigned char) *p < 0x20 || (unsigned char) *p >= 0x7f)
			*p = '?';
	}
	return text;
}

/* The body of a reply, in CurrentMemoryContext. */
static char *
take_body(HttpCall *call)
{
	char *body;

	if (call->reply != NULL && call->max_reply != HTTP_MAX_REPLY)
	{
		/* it may be large, and need not be wiped: the context frees it where it is */
		MemoryContextCallback *at_end = palloc0(sizeof(MemoryContextCallback));

		body = call->reply;
		at_end->func = free;
		at_end->arg = body;
		MemoryContextRegisterResetCallback(CurrentMemoryContext, at_end);
		call->reply = NULL;
	}
	else
	{
		body = palloc(call->reply_len + 1);
		if (call->reply_len > 0)
			memcpy(body, call->reply, call->reply_len);
	}
	body[call->reply_len] = '\0';
	return body;
}

HttpReply *
http_finished(HttpClient *client, void **arg)
{
	HttpCall *call;
	HttpReply *reply;

	if (dlist_is_empty(&client->ended))
		return NULL;
	call = dlist_head_element(HttpCall, node, &client->ended);

	/* Should memory run out here, the call stays where it is. */
	reply = palloc0(sizeof(HttpReply));
	reply->millis = call->millis;
	reply->sends = call->sends;
	reply->retry_after_s = call->retry_after_s;
	if (call->request_id[0] != '\0')
		reply->request_id = pstrdup(call->request_id);
	/* libcurl takes "HTTP/21703" for HTTP/2 and a status of 1703 */
	if (call->result == CURLE_OK && call->status >= 100 && call->status <= 999)
	{
		reply->status = (int) call->status;
		reply->maybe_sent = true;
		reply->body = take_body(call);
		reply->body_len = call->reply_len;
	}
	else
	{
		reply->error = call->result == CURLE_OK ? "reply has no status" : error_text(call);
		reply->maybe_sent = call->maybe_sent;
		reply->body = "";
	}
	*arg = call->arg;
	free_call(call);
	return reply;
}

/* ---- one call in a backend ---- */

HttpReply *
http_perform(const HttpRequest *request)
{
	static uint32 wait_event = 0;
	HttpClient *client;
	HttpReply *volatile reply = NULL;

	if (wait_event == 0)
		wait_event = AvmWaitEvent("AgentvmHttp");

	client = http_client_create();
	PG_TRY();
	{
		http_start(client, request, NULL);
		for (;;)
		{
			void *arg;
			int rc;

			http_run(client);
			reply = http_finished(client, &arg);
			if (reply != NULL)
				break;
			rc = WaitLatchOrSocket(
				MyLatch, WL_LATCH_SET | WL_SOCKET_READABLE | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
				http_client_fd(client), 1000, wait_event);
			if (rc & WL_LATCH_SET)
				ResetLatch(MyLatch);
			CHECK_FOR_INTERRUPTS();
		}
	}
	PG_FINALLY();
	{
		http_client_destroy(client);
	}
	PG_END_TRY();
	return reply;
}
