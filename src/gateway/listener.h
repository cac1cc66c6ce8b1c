/*-------------------------------------------------------------------------
 *
 * listener.h
 *		Accepting connections, also when there are no descriptors left.
 *
 *-------------------------------------------------------------------------
 */
#ifndef GATEWAY_LISTENER_H
#define GATEWAY_LISTENER_H

#include <uv.h>

typedef struct Listener Listener;

/* A connection: a non-blocking socket, which belongs to the callee. */
typedef void (*ListenerTake)(void *arg, int fd);

/* A socket that listens on an IP address, or -1 with errno. */
extern int listen_on(const char *address, int port);

/*
 * The same on a path, for its owner and group; what an ended process has left there is
 * replaced.  EADDRINUSE: somebody listens there, or it is no socket.
 */
extern int listen_on_path(const char *path);

/* Have connections of a listening socket, which becomes the listener's, taken from now on. */
extern Listener *listener_create(uv_loop_t *loop, int fd, ListenerTake take, void *arg);
extern void listener_destroy(Listener *listener);

#endif /* GATEWAY_LISTENER_H */
