/*-------------------------------------------------------------------------
 *
 * vms.h
 *		VMs without a network: each has a socket in a directory that we watch.
 *
 * The socket is the other end of a virtio port (see common/mux.h), where the VM's
 * QEMU listens.  Whoever connects first is talked to, the next one when he has
 * gone: so the VMs of a gateway that dies are there for any other that watches the
 * same directory.
 *
 * A VM may send whatever it likes.  What makes no sense costs it its connection,
 * for a time that doubles; its bytes, frames and streams come at a bounded rate,
 * except for what it has been asked for; memory is that of a Cable, and of what common/mux.h keeps.
 *
 *-------------------------------------------------------------------------
 */
#ifndef GATEWAY_VMS_H
#define GATEWAY_VMS_H

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#define VMS_MAX 1024 /* VMs at once: each has a descriptor, and one more for each of its streams */

typedef struct Vms Vms;

/* What is done with what comes from VMs. None of these may be NULL. */
typedef struct VmsEvents
{
	/*
	 * Serve a stream of this VM on this non-blocking socket, which belongs to the
	 * callee.  "vm" is a name that fits where addresses go (Peer), valid during the call.
	 */
	void (*serve)(void *arg, const char *vm, int fd);

	/*
	 * A message of so many bytes comes for a taker: returns it, with *at set to the
	 * room for its bytes, or NULL: it is thrown away.
	 */
	void *(*expect)(void *arg, void *taker, size_t len, uint8_t **at);

	/* It is whole, and the callee's again. taker NULL: it is not, or its taker has gone. */
	void (*come)(void *arg, void *taker, void *message);

	/* The next message from a taker, with *bytes and *len, which stays until "sent"; NULL: none. */
	void *(*next)(void *arg, void *taker, const uint8_t **bytes, size_t *len);

	/* It has been sent, or will not be: it is the callee's again. */
	void (*sent)(void *arg, void *message);

	void *arg;
} VmsEvents;

typedef struct VmsCounts
{
	unsigned vms; /* connected, and at the other end is a runtime */
	unsigned streams;
	uint64_t pauses; /* how often one has had to wait, having spent too much */
	uint64_t resets; /* connections given up, since what came made no sense */
} VmsCounts;

/*
 * Watch directories, up to a NULL, from now on; they must stay, "events" is copied.  One
 * that is not there, or may not be read, is logged and tried again.
 */
extern Vms *vms_create(uv_loop_t *loop, const char *const *dirs, const VmsEvents *events);
extern void vms_destroy(Vms *vms);

extern VmsCounts vms_counts(const Vms *vms);

/*
 * Messages of a VM, by the name that "serve" was called with, are from now on for
 * this taker, and its for the VM; vms_no_taker() ends that, if it is the one.
 */
extern void vms_set_taker(Vms *vms, const char *vm, void *taker);
extern void vms_no_taker(Vms *vms, const char *vm, void *taker);

/*
 * There is a message for a VM, which asks for something that may take so many bytes
 * to answer: for these it need not wait.
 */
extern void vms_ask(Vms *vms, const char *vm, size_t bytes);

/* Whether an entry of a directory is one that we would connect to. */
extern bool vms_is_socket(int dir, const char *name);

#endif /* GATEWAY_VMS_H */
