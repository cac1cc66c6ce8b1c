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

/*
 * Serve a stream of this VM on this non-blocking socket, which belongs to the
 * callee.  "vm" is a name that fits where addresses go (Peer), valid during the call.
 */
typedef void (*VmsServe)(void *arg, const char *vm, int fd);

typedef struct VmsCounts
{
	unsigned vms; /* connected, and at the other end is a runtime */
	unsigned streams;
	uint64_t pauses; /* how often one has had to wait, having spent too much */
	uint64_t resets; /* connections given up, since what came made no sense */
} VmsCounts;

/*
 * Watch directories, up to a NULL, from now on; they must stay.  One that is not
 * there, or may not be read, is logged and tried again.
 */
extern Vms *vms_create(uv_loop_t *loop, const char *const *dirs, VmsServe serve, void *arg);
extern void vms_destroy(Vms *vms);

extern VmsCounts vms_counts(const Vms *vms);

/*
 * A VM, by the name that VmsServe was called with, has been asked for something that
 * may take so many bytes to answer: for these it need not wait.
 */
extern void vms_expect(Vms *vms, const char *vm, size_t bytes);

/* Whether an entry of a directory is one that we would connect to. */
extern bool vms_is_socket(int dir, const char *name);

#endif /* GATEWAY_VMS_H */
