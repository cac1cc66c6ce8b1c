/*-------------------------------------------------------------------------
 *
 * cable.h
 *		One end of a cable: a mux between a file descriptor and sockets, one for each stream.
 *
 * For a loop with epoll.  A stream's socket is watched for EPOLLIN | EPOLLOUT |
 * EPOLLRDHUP | EPOLLET from cable_attach() or "opened" on, and then every event is
 * passed to cable_stream_event().
 *
 *-------------------------------------------------------------------------
 */
#ifndef COMMON_CABLE_H
#define COMMON_CABLE_H

#include "mux.h"

#define CABLE_STREAM_EVENTS (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)

typedef struct CableEvents
{
	/*
	 * The other end has opened a stream: returns a socket for it, which is
	 * non-blocking and belongs to the cable from now on, or -1 to refuse. NULL: it
	 * may not.
	 */
	int (*opened)(void *arg, int stream);

	/* A stream's socket is about to be closed: not to be watched any more. */
	void (*closing)(void *arg, int fd);

	/* Messages: as in MuxEvents. */
	uint8_t *(*expect)(void *arg, size_t len);
	void (*message)(void *arg, bool is_whole);
	bool (*next)(void *arg, const uint8_t **bytes, size_t *len);
	void (*sent)(void *arg);

	void *arg;
} CableEvents;

typedef struct Cable
{
	CableEvents events;
	Mux *mux;
	int fd; /* -1: not plugged in. Never blocks */
	int streams[MUX_STREAMS];
	size_t out_at, out_len;
	uint8_t out[4 * PROTOCOL_CABLE_PAYLOAD];
} Cable;

/* Make *cable one that is not plugged in. */
extern void cable_init(Cable *cable, const CableEvents *events);

/* End all streams and free what belongs to the cable; its fd stays open. */
extern void cable_end(Cable *cable);

/*
 * Begin on this fd, or with -1 on none.  What was to be sent is dropped if the fd
 * is another one than before.  Streams end, except for those that wait to be opened.
 */
extern void cable_plug(Cable *cable, int fd);

/*
 * The fd is readable: take some of it, at most 32 kB.  Returns how many bytes there
 * were, or 0 for none, or -1: the other end makes no sense, and *problem is a static
 * text that says why; or *problem is NULL, and the fd is at its end (errno 0) or lost.
 */
extern long cable_read(Cable *cable, const char **problem);

/*
 * Send what there is to send.  To be called after anything else.  Returns false
 * with errno when the fd is lost; *more tells whether to come again when it is
 * writable.
 */
extern bool cable_flush(Cable *cable, bool *more);

/* Open a stream for a non-blocking socket, which belongs to the cable then; -1 when there are too many. */
extern int cable_attach(Cable *cable, int fd);

/* These events of epoll have come for a stream's socket. */
extern void cable_stream_event(Cable *cable, int stream, uint32_t events);

#endif /* COMMON_CABLE_H */
