/*-------------------------------------------------------------------------
 *
 * loop.h
 *		The one loop: libwebsockets' own, with one epoll fd for everything else.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_LOOP_H
#define RUNTIME_LOOP_H

#include <libwebsockets.h>
#include <stdbool.h>
#include <stdint.h>

/* Something is to be done later, once; part of what it belongs to, zeroed at first. */
typedef struct Timer
{
	lws_sorted_usec_list_t sul; /* must be the first */
	void (*fire)(void *arg);
	void *arg;
} Timer;

typedef void (*LoopReady)(void *arg, uint32_t events);

/*
 * Make the loop; "protocols" are those of the connections (see link.c) and the
 * first of them passes LWS_CALLBACK_RAW_RX_FILE on to loop_events().  "tls" is the
 * SSL_CTX for connections, or NULL.  Returns false, having logged why.
 */
extern bool loop_create(const struct lws_protocols *protocols, void *tls);
extern struct lws_context *loop_context(void);
extern void loop_destroy(void);

/* Run until loop_stop(); returns the exit code that it was given. */
extern int loop_run(void);
extern void loop_stop(int exit_code);
extern bool loop_is_stopping(void);

/* What epoll has: called from the protocol's callback. */
extern void loop_events(void);

/*
 * Call "ready" whenever one of these epoll events is there.  Watching an fd anew
 * changes its events.  An fd is to be unwatched before it is closed; unwatching one
 * that is not watched does nothing.  Returns false, having logged why.
 */
extern bool loop_watch(int fd, uint32_t events, LoopReady ready, void *arg);
extern void loop_unwatch(int fd);

/* (Re)start a timer, or stop it; the clock is CLOCK_MONOTONIC. */
extern void timer_set(Timer *timer, int64_t ms, void (*fire)(void *arg), void *arg);
extern void timer_stop(Timer *timer);
extern bool timer_is_set(const Timer *timer);

/* Milliseconds since boot, with those in which the machine was suspended; no clock setting moves them. */
extern int64_t boottime_ms(void);

/* ms, more or less by at most a fifth. */
extern int64_t jittered(int64_t ms);

#endif /* RUNTIME_LOOP_H */
