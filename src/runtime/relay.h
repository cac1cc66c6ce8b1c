/*-------------------------------------------------------------------------
 *
 * relay.h
 *		The gateway at the other end of a virtio port: for VMs without a network.
 *
 * libwebsockets connects to a socket of ours, and each connection becomes a stream
 * of the cable (common/mux.h) that the port is.
 *
 * What such a port does, as seen with Linux 6.1 and QEMU 7.2: While nobody is
 * connected to the socket on the host, poll() says POLLIN | POLLHUP, read() returns
 * 0 and write() fails with EAGAIN (without O_NONBLOCK it would hang).  POLLHUP ends
 * when somebody connects; it is not seen at all when the next one comes quickly
 * enough.  What the one before had sent may still be read then; what had been
 * written to the port and not yet been taken by the host is lost.  While the one on
 * the host does not read, some 4 MB can be written, then EAGAIN.  What is sent while
 * the port is closed is read when it is opened again.  It can be opened once at a
 * time (EBUSY).
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_RELAY_H
#define RUNTIME_RELAY_H

#include <stdbool.h>
#include <stddef.h>

#include "settings.h"

/* What becomes of messages of the cable; called from the loop. */
typedef struct RelayEvents
{
	void (*came)(const char *bytes, size_t len); /* valid during the call */
	void (*sent)(void);							 /* fewer of ours wait */
} RelayEvents;

/*
 * Begin to relay, if the settings name a device; one that is not there yet is
 * waited for.  Returns false, having logged why, when there can be no socket.
 */
extern bool relay_start(const Settings *settings);

/* Where to connect to, as libwebsockets takes it. */
extern const char *relay_address(void);

/* Take messages of at most so many bytes; "events" must stay. */
extern void relay_take_messages(const RelayEvents *events, size_t max);

/*
 * Send "len" bytes at "bytes", which is in a piece of malloc()'s memory that becomes
 * the relay's.  It is lost when the other end is.
 */
extern void relay_send(void *memory, const char *bytes, size_t len);

/* How many bytes of messages wait to be sent. */
extern size_t relay_waiting(void);

#endif /* RUNTIME_RELAY_H */
