/*-------------------------------------------------------------------------
 *
 * libvirt_host.c
 *		Connections to hypervisors, shared by all threads; errors; directories.
 *
 * There is one connection for each URI.  Who finds none opens it while others
 * wait, but not for long, so that a host that does not answer holds up one
 * thread only.  A thread runs libvirt's event loop: without it there are no
 * keepalive messages, and a call to a host that has died would never end.
 *
 * This side of the provider knows nothing of PostgreSQL (see libvirt_thread.h).
 *
 *-------------------------------------------------------------------------
 */
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <libxml/parser.h>

#include "providers/libvirt_thread.h"
#include "signals.h"

#define KEEPALIVE_S 5
#define KEEPALIVE_COUNT 3
#define OPEN_PATIENCE_MS 5000 /* for somebody else to have opened a connection */
#define OPEN_LOST_MS 60000	  /* who has not opened it by then may never do so */

typedef struct Host
{
	struct Host *next;
	char *uri;
	virConnectPtr conn; /* NULL: none */
	int64_t opening;	/* since when somebody opens it, 0: nobody does */
} Host;

typedef struct Busy
{
	struct Busy *next;
	char session[40];
} Busy;

/* guards all below */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t opened;
static Host *hosts = NULL; /* never freed: as many as there are URIs */
static Busy *busy = NULL;

static pthread_once_t once = PTHREAD_ONCE_INIT;

int64_t
lv_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static yajl_val
member(const LvJob *job, const char *name, yajl_type type)
{
	const char *path[] = {name, NULL};

	return yajl_tree_get(job->ask, path, type);
}

const char *
lv_text(const LvJob *job, const char *name)
{
	return YAJL_GET_STRING(member(job, name, yajl_t_string));
}

int
lv_int(const LvJob *job, const char *name)
{
	yajl_val value = member(job, name, yajl_t_number);

	return YAJL_IS_INTEGER(value) ? (int) YAJL_GET_INTEGER(value) : 0;
}

void
lv_put_string(LvJob *job, const char *text)
{
	yajl_gen_string(job->result, (const unsigned char *) text, strlen(text));
}

void
lv_put_text(LvJob *job, const char *name, const char *value)
{
	if (value == NULL)
		return;
	lv_put_string(job, name);
	lv_put_string(job, value);
}

void
lv_put_int(LvJob *job, const char *name, int64_t value)
{
	lv_put_string(job, name);
	yajl_gen_integer(job->result, value);
}

void
lv_put_bool(LvJob *job, const char *name, bool value)
{
	lv_put_string(job, name);
	yajl_gen_bool(job->result, value);
}

char *
lv_format(const char *format, ...)
{
	char *text = NULL;
	va_list args;
	int len;

	va_start(args, format);
	len = vasprintf(&text, format, args);
	va_end(args);
	if (len < 0)
		abort();
	return text;
}

/* ---- errors ---- */

bool
lv_fail(LvJob *job, ErrorClass class, const char *code, const char *format, ...)
{
	va_list args;

	if (job->failed)
		return false;
	job->failed = true;
	job->error.class = class;
	snprintf(job->error.code, sizeof(job->error.code), "%s", code);
	va_start(args, format);
	vsnprintf(job->error.message, sizeof(job->error.message), format, args);
	va_end(args);
	for (char *c = job->error.message; *c != '\0'; c++)
	{
		if (*c < ' ' || *c > '~')
			*c = *c == '\n' ? ' ' : '?';
	}
	return false;
}

int
lv_error_code(void)
{
	virErrorPtr error = virGetLastError();

	return error != NULL ? error->code : VIR_ERR_OK;
}

/* Whether there was no room, as QEMU and the kernel put it. */
static bool
says_no_room(const char *message)
{
	static const char *const texts[] = {"Cannot allocate memory", "cannot set up guest memory",
										"No space left on device", "Disk quota exceeded",
										"Too many open files"};

	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++)
	{
		if (strstr(message, texts[i]) != NULL)
			return true;
	}
	return false;
}

static ErrorClass
classify(const virError *error, const char *message)
{
	switch (error->code)
	{
		case VIR_ERR_NO_MEMORY:
			return CLASS_CAPACITY;
		case VIR_ERR_NO_DOMAIN:
		case VIR_ERR_NO_STORAGE_VOL:
			return CLASS_NOT_FOUND;
		case VIR_ERR_RPC:
		case VIR_ERR_NO_CONNECT:
		case VIR_ERR_INVALID_CONN:
		case VIR_ERR_RESOURCE_BUSY:
		case VIR_ERR_OPERATION_TIMEOUT:
		case VIR_ERR_OPERATION_ABORTED:
		case VIR_ERR_OPERATION_INVALID: /* something is going on that passes */
		case VIR_ERR_DOM_EXIST:
			return CLASS_TRANSIENT;
		case VIR_ERR_AUTH_FAILED:
		case VIR_ERR_AUTH_CANCELLED:
		case VIR_ERR_AUTH_UNAVAILABLE:
		case VIR_ERR_ACCESS_DENIED:
			return CLASS_PERMANENT;
		case VIR_ERR_SYSTEM_ERROR:
			switch (error->int1)
			{
				case ENOMEM:
				case ENOSPC:
				case EDQUOT:
					return CLASS_CAPACITY;
				case ECONNREFUSED:
				case ECONNRESET:
				case ETIMEDOUT:
				case EHOSTUNREACH:
				case ENETUNREACH:
				case EPIPE:
				case EAGAIN:
				case EINTR:
					return CLASS_TRANSIENT;
			}
			break;
	}
	if (strstr(message, "asynchronous jobs running") !=
		NULL) /* a pool that is busy has no code of its own */
		return CLASS_TRANSIENT;
	return says_no_room(message) ? CLASS_CAPACITY : CLASS_PERMANENT;
}

static bool
is_alive(const LvJob *job)
{
	return virConnectIsAlive(job->conn) == 1;
}

static bool
fail_by(LvJob *job, const virError *error, const char *what)
{
	bool first = !job->failed;

	if (error == NULL || error->code == VIR_ERR_OK)
		lv_fail(job, CLASS_PERMANENT, "Libvirt", "%s: failed without a reason", what);
	else
	{
		const char *message = error->message != NULL ? error->message : "no message";
		char code[32];

		snprintf(code, sizeof(code), "Libvirt%d", error->code);
		lv_fail(job, classify(error, message), code, "%s: %s", what, message);
		if (first && error->code == VIR_ERR_SYSTEM_ERROR)
			job->error.system_error = error->int1;
	}
	/* what broke is the line, not the call */
	if (job->conn != NULL && !is_alive(job))
	{
		job->error.class = CLASS_TRANSIENT;
		job->error.no_answer = true;
	}
	return false;
}

bool
lv_fail_libvirt(LvJob *job, const char *what)
{
	return fail_by(job, virGetLastError(), what);
}

bool
lv_alive(LvJob *job, const char *what)
{
	virErrorPtr error;

	if (job->failed)
		return false;
	error = virSaveLastError();
	if (!is_alive(job))
		fail_by(job, error, what);
	if (error != NULL)
		virFreeError(error);
	return !job->failed;
}

bool
lv_in_time(LvJob *job)
{
	if (!job->failed && lv_now() < job->deadline)
		return true;
	return lv_fail(job, CLASS_TRANSIENT, "TooLate", "the host took too long");
}

/* ---- connections ---- */

static void
say_nothing(void *arg, virErrorPtr error)
{
}

static void *
run_events(void *arg)
{
	for (;;)
	{
		/* it fails only for want of memory */
		if (virEventRunDefaultImpl() < 0)
			(void) nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
	}
	return NULL;
}

/* Once in a process. */
static void
begin(void)
{
	pthread_condattr_t attributes;
	pthread_attr_t detached;
	pthread_t thread;
	sigset_t saved;

	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&opened, &attributes);
	xmlInitParser();
	virSetErrorFunc(NULL, say_nothing);
	if (virInitialize() < 0 || virEventRegisterDefaultImpl() < 0)
		return;
	signals_block(&saved);
	pthread_attr_init(&detached);
	pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
	(void) pthread_create(&thread, &detached, run_events, NULL);
	signals_restore(&saved);
}

static Host *
find_host(const char *uri)
{
	Host *host;

	for (host = hosts; host != NULL; host = host->next)
	{
		if (strcmp(host->uri, uri) == 0)
			return host;
	}
	host = calloc(1, sizeof(Host));
	if (host == NULL)
		abort();
	host->uri = lv_format("%s", uri);
	host->next = hosts;
	hosts = host;
	return host;
}

/* Whether somebody opens its connection who is not given up yet; under the lock. */
static bool
is_being_opened(const Host *host)
{
	return host->opening != 0 && lv_now() < host->opening + OPEN_LOST_MS;
}

/* A server has nobody who would answer ssh's questions, so it is not to ask any. */
static virConnectPtr
open_connection(const char *uri)
{
	bool ssh = strstr(uri, "+ssh://") != NULL;
	char *whole =
		lv_format("%s%s", uri, !ssh ? "" : (strchr(uri, '?') != NULL ? "&no_tty=1" : "?no_tty=1"));
	virConnectPtr conn;

	virResetLastError();
	conn = virConnectOpen(whole);
	free(whole);
	return conn;
}

bool
lv_connect(LvJob *job)
{
	int64_t until = lv_now() + OPEN_PATIENCE_MS;
	int64_t began = 0;
	struct timespec at;
	virConnectPtr conn = NULL;
	virConnectPtr dead = NULL;
	Host *host;

	pthread_once(&once, begin);
	if (until > job->deadline)
		until = job->deadline;
	at.tv_sec = until / 1000;
	at.tv_nsec = until % 1000 * 1000000;

	pthread_mutex_lock(&lock);
	host = find_host(job->uri);
	while (is_being_opened(host))
	{
		if (pthread_cond_timedwait(&opened, &lock, &at) == ETIMEDOUT)
			break;
	}
	if (is_being_opened(host))
	{
		pthread_mutex_unlock(&lock);
		return lv_fail(job, CLASS_TRANSIENT, "NoConnection",
					   "could not connect to %s: it does not answer", job->uri);
	}
	if (host->conn != NULL && virConnectIsAlive(host->conn) == 1)
	{
		conn = host->conn;
		virConnectRef(conn);
	}
	else
	{
		dead = host->conn;
		host->conn = NULL;
		host->opening = began = lv_now();
	}
	pthread_mutex_unlock(&lock);
	if (conn != NULL)
	{
		job->conn = conn;
		return true;
	}

	if (dead != NULL)
		virConnectClose(dead);
	conn = open_connection(job->uri);
	if (conn != NULL)
		(void) virConnectSetKeepAlive(conn, KEEPALIVE_S, KEEPALIVE_COUNT);

	pthread_mutex_lock(&lock);
	/* who is late has been replaced: the connection is for this job only */
	if (host->opening == began)
	{
		host->opening = 0;
		host->conn = conn;
		if (conn != NULL)
			virConnectRef(conn);
		pthread_cond_broadcast(&opened);
	}
	pthread_mutex_unlock(&lock);

	if (conn == NULL)
	{
		lv_fail_libvirt(job, "could not connect");
		/* it may be starting, or on its way back */
		if (job->error.class == CLASS_PERMANENT && lv_error_code() == VIR_ERR_SYSTEM_ERROR)
			job->error.class = CLASS_TRANSIENT;
		return false;
	}
	job->conn = conn;
	return true;
}

void
lv_disconnect(LvJob *job)
{
	if (job->conn != NULL)
		virConnectClose(job->conn);
	job->conn = NULL;
}

bool
lv_is_local(const char *uri)
{
	return strstr(uri, ":///") != NULL;
}

/* ---- directories ---- */

/* A name that is the same for the same directory. */
static char *
pool_name(const char *directory)
{
	uint64_t hash = UINT64_C(14695981039346656037);

	for (const char *c = directory; *c != '\0'; c++)
		hash = (hash ^ (unsigned char) *c) * UINT64_C(1099511628211);
	return lv_format("agentvm-%016llx", (unsigned long long) hash);
}

virStoragePoolPtr
lv_pool(LvJob *job, const char *directory)
{
	char *name = pool_name(directory);
	char *xml = lv_pool_xml(name, directory);
	char *what = lv_format("directory \"%s\"", directory);
	virStoragePoolPtr pool = NULL;

	/* Another thread, or another client, may make it at the same time. */
	for (int tries = 0; pool == NULL && tries < 3; tries++)
	{
		pool = virStoragePoolLookupByName(job->conn, name);
		if (pool == NULL && lv_error_code() == VIR_ERR_NO_STORAGE_POOL)
			pool = virStoragePoolLookupByTargetPath(job->conn, directory);
		if (pool == NULL && lv_alive(job, what))
			pool = virStoragePoolCreateXML(job->conn, xml, 0);
	}
	if (pool == NULL)
		lv_fail_libvirt(job, what);
	else if (virStoragePoolIsActive(pool) == 0 && virStoragePoolCreate(pool, 0) < 0)
	{
		virErrorPtr error = virSaveLastError();

		/* unless another thread has just done so */
		if (virStoragePoolIsActive(pool) != 1)
		{
			fail_by(job, error, what);
			virStoragePoolFree(pool);
			pool = NULL;
		}
		if (error != NULL)
			virFreeError(error);
	}
	free(what);
	free(name);
	free(xml);
	return pool;
}

virStorageVolPtr
lv_volume(virStoragePoolPtr pool, const char *name)
{
	virStorageVolPtr volume = virStorageVolLookupByName(pool, name);

	if (volume == NULL && lv_error_code() == VIR_ERR_NO_STORAGE_VOL &&
		virStoragePoolRefresh(pool, 0) == 0)
		volume = virStorageVolLookupByName(pool, name);
	return volume;
}

virStorageVolPtr
lv_image(LvJob *job, const char *path)
{
	virStorageVolPtr volume = virStorageVolLookupByPath(job->conn, path);
	virStoragePoolPtr pool;
	const char *slash = strrchr(path, '/');
	char *directory;

	if (volume != NULL)
		return volume;
	directory = slash == path ? lv_format("/") : lv_format("%.*s", (int) (slash - path), path);
	pool = lv_pool(job, directory);
	free(directory);
	if (pool == NULL)
		return NULL;
	volume = lv_volume(pool, slash + 1);
	if (volume == NULL)
	{
		/* before the pool is freed, which forgets the error */
		if (lv_error_code() == VIR_ERR_NO_STORAGE_VOL)
			lv_fail(job, CLASS_PERMANENT, "NoImage",
					"image file \"%s\" is not on the host, or not readable there", path);
		else
			lv_fail_libvirt(job, path);
	}
	virStoragePoolFree(pool);
	return volume;
}

/* ---- one thread for each session ---- */

bool
lv_session_enter(LvJob *job, const char *session)
{
	Busy *entry = calloc(1, sizeof(Busy));
	Busy *other;

	if (entry == NULL)
		abort();
	snprintf(entry->session, sizeof(entry->session), "%s", session);
	pthread_mutex_lock(&lock);
	for (other = busy; other != NULL; other = other->next)
	{
		if (strcmp(other->session, entry->session) == 0)
			break;
	}
	if (other == NULL)
	{
		entry->next = busy;
		busy = entry;
	}
	pthread_mutex_unlock(&lock);
	if (other == NULL)
		return true;
	free(entry);
	return lv_fail(job, CLASS_TRANSIENT, "Busy", "an earlier call for this VM is still under way");
}

void
lv_session_leave(const char *session)
{
	Busy *found = NULL;

	pthread_mutex_lock(&lock);
	for (Busy **at = &busy; *at != NULL; at = &(*at)->next)
	{
		if (strcmp((*at)->session, session) == 0)
		{
			found = *at;
			*at = found->next;
			break;
		}
	}
	pthread_mutex_unlock(&lock);
	free(found);
}
