/*-------------------------------------------------------------------------
 *
 * threads.c
 *		Calls that block, each on a thread of its own, for a runner.
 *
 * A call is malloc'ed, since its thread may outlive whoever asked for it.  It is
 * in its client's list, of which only the main thread knows, until its reply has
 * been fetched or it is given up; its state and the pool's counters are under
 * one mutex, which is held for a few instructions.  A call that is given up
 * while its thread works belongs to that thread from then on.
 *
 * The main thread waits on one epoll fd: an eventfd that threads write to, and a
 * timer for the earliest timeout.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "agentvm.h"
#include "engine/threads.h"
#include "lib/ilist.h"
#include "providers/provider.h"
#include "signals.h"
#include "storage/fd.h"
#include "storage/ipc.h"

#define STACK_BYTES (1024 * 1024)

typedef enum CallState
{
	CALL_QUEUED,
	CALL_RUNNING,
	CALL_DONE,
	CALL_GIVEN_UP /* the thread frees it */
} CallState;

typedef struct Call
{
	dlist_node node;   /* of its client */
	struct Call *next; /* in the queue */
	CallState state;
	void (*perform)(const BlockingCall *call, BlockingReply *reply);
	BlockingCall call;
	BlockingReply reply;
	char *operation;
	char *target;
	char *body;
	int64 started_at; /* ms of the monotonic clock */
	int64 give_up_at;
	int64 done_at;
	void *arg;
} Call;

typedef struct ThreadClient
{
	dlist_node node; /* of all clients */
	dlist_head calls;
} ThreadClient;

/* The pool; one per process. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t queued = PTHREAD_COND_INITIALIZER;
static Call *queue_head = NULL;
static Call *queue_tail = NULL;
static int nqueued = 0;
static int nthreads = 0;
static int nidle = 0;
static int nstuck = 0;
static int nactive = 0;				 /* calls queued or running, and not given up */
static bool no_more_threads = false; /* the last one could not be made */

/* Of the main thread. */
static dlist_head clients = DLIST_STATIC_INIT(clients);
static int epoll_fd = -1;
static int event_fd = -1;
static int timer_fd = -1;

static int64
monotonic_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64) now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void
free_call(Call *call)
{
	free(call->operation);
	free(call->target);
	if (call->body != NULL)
		explicit_bzero(call->body, call->call.body_len); /* there may be a token in it */
	free(call->body);
	free(call->reply.body);
	free(call->reply.error);
	free(call);
}

/* ---- threads; no PostgreSQL here ---- */

static void
tell_main_thread(void)
{
	uint64_t one = 1;

	/* only a full counter fails, and that wakes as well */
	if (write(event_fd, &one, sizeof(one)) < 0)
		return;
}

/* Take the first call of the queue; under the mutex. */
static Call *
take_queued(void)
{
	Call *call = queue_head;

	queue_head = call->next;
	if (queue_head == NULL)
		queue_tail = NULL;
	call->next = NULL;
	nqueued--;
	return call;
}

static void *
thread_main(void *arg)
{
	pthread_mutex_lock(&mutex);
	for (;;)
	{
		Call *call;

		nidle++;
		while (queue_head == NULL)
			pthread_cond_wait(&queued, &mutex);
		nidle--;
		call = take_queued();
		call->state = CALL_RUNNING;
		/* its caller's patience began with the wait in the queue */
		call->call.timeout_ms = (int) Max(call->give_up_at - monotonic_ms(), 1);
		pthread_mutex_unlock(&mutex);

		call->perform(&call->call, &call->reply);

		pthread_mutex_lock(&mutex);
		if (call->state == CALL_GIVEN_UP)
		{
			nstuck--;
			free_call(call);
		}
		else
		{
			call->state = CALL_DONE;
			call->done_at = monotonic_ms();
			nactive--;
		}
		tell_main_thread();
	}
	return NULL;
}

/* ---- the main thread ---- */

/* One more thread, with all signals blocked; under the mutex. */
static void
add_thread(void)
{
	pthread_attr_t attributes;
	pthread_t thread;
	sigset_t saved;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	signals_block(&saved);
	no_more_threads = pthread_create(&thread, &attributes, thread_main, NULL) != 0;
	signals_restore(&saved);
	pthread_attr_destroy(&attributes);
	if (!no_more_threads)
		nthreads++;
}

static void
watch(int fd)
{
	struct epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};

	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
		ereport(ERROR, (errcode_for_socket_access(), errmsg("could not watch a descriptor: %m")));
}

/* The pool's descriptors, made with the first client and kept for good. */
static void
open_pool(void)
{
	if (epoll_fd >= 0)
		return;
	event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (event_fd < 0 || timer_fd < 0 || epoll_fd < 0)
		ereport(FATAL, (errcode_for_socket_access(), errmsg("could not make a descriptor: %m")));
	watch(event_fd);
	watch(timer_fd);
}

/* Have the fd become readable at the earliest timeout of a call. */
static void
arm_timer(void)
{
	struct itimerspec when = {{0, 0}, {0, 0}};
	int64 earliest = PG_INT64_MAX;
	dlist_iter c;
	dlist_iter i;

	dlist_foreach(c, &clients)
	{
		dlist_foreach(i, &dlist_container(ThreadClient, node, c.cur)->calls) earliest =
			Min(earliest, dlist_container(Call, node, i.cur)->give_up_at);
	}
	if (earliest != PG_INT64_MAX)
	{
		when.it_value.tv_sec = earliest / 1000;
		when.it_value.tv_nsec = earliest % 1000 * 1000000 + 1;
	}
	(void) timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

static void *
create(void)
{
	ThreadClient *client;

	open_pool();
	client = malloc(sizeof(ThreadClient));
	if (client == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	dlist_init(&client->calls);
	dlist_push_tail(&clients, &client->node);
	return client;
}

/* Take a call that has not begun out of the queue; under the mutex. */
static void
unqueue(Call *call)
{
	Call **link = &queue_head;
	Call *before = NULL;

	while (*link != call)
	{
		before = *link;
		link = &before->next;
	}
	*link = call->next;
	if (queue_tail == call)
		queue_tail = before;
	nqueued--;
}

/*
 * Let go of a call whatever its state, which is returned as it was.  It is still
 * there afterwards unless it was running: then it is the thread's.
 */
static CallState
give_up(Call *call)
{
	CallState state;

	pthread_mutex_lock(&mutex);
	state = call->state;
	if (state == CALL_QUEUED)
		unqueue(call);
	else if (state == CALL_RUNNING)
	{
		call->state = CALL_GIVEN_UP;
		nstuck++;
	}
	if (state != CALL_DONE)
		nactive--;
	pthread_mutex_unlock(&mutex);
	return state;
}

static void
destroy(void *client)
{
	ThreadClient *mine = client;
	dlist_mutable_iter i;

	dlist_foreach_modify(i, &mine->calls)
	{
		Call *call = dlist_container(Call, node, i.cur);

		dlist_delete(&call->node);
		if (give_up(call) != CALL_RUNNING)
			free_call(call);
	}
	dlist_delete(&mine->node);
	free(mine);
	arm_timer();
}

static int
fd(void *client)
{
	return epoll_fd;
}

static int
room(void *client)
{
	int free_threads;

	pthread_mutex_lock(&mutex);
	free_threads = MAX_THREADS - nstuck - nactive;
	pthread_mutex_unlock(&mutex);
	return Max(free_threads, 0);
}

static void
start(void *client, const char *name, const HttpRequest *request, void *arg)
{
	const Provider *provider = provider_find(name);
	Call *call;
	bool refused;

	if (provider == NULL || provider->perform == NULL)
		ereport(ERROR, (errcode(AVM_INVALID_CONFIGURATION),
						errmsg("provider \"%s\" makes no calls on threads", name)));
	call = calloc(1, sizeof(Call));
	if (call != NULL)
	{
		call->operation = strdup(request->method ? request->method : "");
		call->target = strdup(request->url ? request->url : "");
		call->body = calloc(1, request->body_len + 1);
	}
	if (call == NULL || call->operation == NULL || call->target == NULL || call->body == NULL)
	{
		if (call != NULL)
			free_call(call);
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	}
	if (request->body_len > 0)
		memcpy(call->body, request->body, request->body_len);
	call->call.operation = call->operation;
	call->call.target = call->target;
	call->call.body = call->body;
	call->call.body_len = request->body_len;
	call->call.timeout_ms = request->timeout_ms;
	call->perform = provider->perform;
	call->started_at = monotonic_ms();
	call->give_up_at = call->started_at + request->timeout_ms;
	call->arg = arg;

	pthread_mutex_lock(&mutex);
	if (nqueued >= nidle && nthreads < MAX_THREADS)
		add_thread();
	refused = nthreads == 0;
	if (!refused)
	{
		call->state = CALL_QUEUED;
		if (queue_tail != NULL)
			queue_tail->next = call;
		else
			queue_head = call;
		queue_tail = call;
		nqueued++;
		nactive++;
		pthread_cond_signal(&queued);
	}
	pthread_mutex_unlock(&mutex);
	if (refused)
	{
		free_call(call);
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_RESOURCES),
						errmsg("no thread can be started for the call")));
	}
	dlist_push_tail(&((ThreadClient *) client)->calls, &call->node);
	arm_timer();
}

static void
run(void *client)
{
	uint64_t count;

	/* only so that the fd is not readable any more; what has happened is seen by finished() */
	while (read(event_fd, &count, sizeof(count)) > 0)
		;
	while (read(timer_fd, &count, sizeof(count)) > 0)
		;
}

/* A call of the client that has been answered or is past its time, or NULL. */
static Call *
next_finished(ThreadClient *client)
{
	int64 now = monotonic_ms();
	Call *found = NULL;
	dlist_iter i;

	pthread_mutex_lock(&mutex);
	dlist_foreach(i, &client->calls)
	{
		Call *call = dlist_container(Call, node, i.cur);

		if (call->state == CALL_DONE || call->give_up_at <= now)
		{
			found = call;
			break;
		}
	}
	pthread_mutex_unlock(&mutex);
	return found;
}

/* Take over what a thread has answered. */
static void
copy_reply(const BlockingReply *from, HttpReply *reply)
{
	reply->status = Max(from->status, 0);
	reply->maybe_sent = reply->status == 0 && from->maybe_done;
	if (from->error != NULL)
		reply->error = pstrdup(from->error);
	else if (reply->status == 0)
		reply->error = "the call was not answered";
	if (from->body == NULL)
		return;
	if (from->body_len > HTTP_MAX_REPLY)
	{
		reply->maybe_sent = true;
		reply->status = 0;
		reply->error = psprintf("the answer is larger than %d bytes", HTTP_MAX_REPLY);
		return;
	}
	reply->body = pnstrdup(from->body, from->body_len);
	reply->body_len = from->body_len;
}

static HttpReply *
finished(void *client, void **arg)
{
	Call *call = next_finished(client);
	HttpReply *reply;

	if (call == NULL)
		return NULL;
	reply = palloc0(sizeof(HttpReply));
	reply->body = "";
	reply->retry_after_s = -1;
	reply->sends = 1;

	dlist_delete(&call->node);
	*arg = call->arg;
	reply->millis = (int) (monotonic_ms() - call->started_at);
	switch (give_up(call))
	{
		case CALL_DONE:
			reply->millis = (int) (call->done_at - call->started_at);
			copy_reply(&call->reply, reply);
			free_call(call);
			break;
		case CALL_QUEUED:
			reply->sends = 0;
			reply->error = psprintf("no thread was free within %d ms", call->call.timeout_ms);
			free_call(call);
			break;
		default:
			/* the call is the thread's, and may be gone by now */
			reply->maybe_sent = true;
			reply->error = psprintf("no answer within %d ms", reply->millis);
			break;
	}
	arm_timer();
	return reply;
}

const Transport thread_transport = {create, destroy, fd, room, start, run, NULL, NULL, finished};

int
threads_stuck(void)
{
	int stuck;

	pthread_mutex_lock(&mutex);
	stuck = nstuck;
	pthread_mutex_unlock(&mutex);
	return stuck;
}

bool
threads_are_exhausted(void)
{
	bool exhausted;

	pthread_mutex_lock(&mutex);
	exhausted = nstuck > 0 && nstuck == nthreads && (nthreads >= MAX_THREADS || no_more_threads);
	pthread_mutex_unlock(&mutex);
	return exhausted;
}

static void
end_process(int code, Datum arg)
{
	_exit(code);
}

void
threads_exit_quietly(void)
{
	on_proc_exit(end_process, (Datum) 0);
}
