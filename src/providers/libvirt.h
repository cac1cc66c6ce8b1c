/*-------------------------------------------------------------------------
 *
 * libvirt.h
 *		What the two sides of the provider "libvirt" agree on.
 *
 * libvirt.c runs in PostgreSQL and makes steps.  All other files run on threads
 * that may not touch PostgreSQL (libvirt_thread.h).  Between them goes a line of
 * JSON, and after it, for a launch, the boot script; back comes JSON.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_LIBVIRT_H
#define AGENTVM_PROVIDERS_LIBVIRT_H

#include "providers/blocking.h"

/* The operations: BlockingCall.operation, the names of calls in events and statistics. */
#define LV_LAUNCH "launch"
#define LV_TERMINATE "terminate"
#define LV_PAUSE "pause"
#define LV_RESUME "resume"
#define LV_INSPECT "inspect"
#define LV_PROBE "probe"
#define LV_CHECK "check"
#define LV_LIST "list"

/* BlockingReply.status: the body is the result, or an object "error" of class, code, message,
 * and began: whether something may have been made. */
#define LV_DONE 1
#define LV_REFUSED 2

#define LV_NAME "agentvm-" /* of a domain, before its session's id */

#define LV_GATEWAY_PORT "org.agentvm.gateway" /* the virtio port of a VM with a runtime */

/* Code of the error of a launch under KVM on a host that has none any more. */
#define LV_NO_KVM "NoKvm"

/* Bytes of a host's directory: a socket's path, "/SESSION.sock" included, has at most 107. */
#define LV_MAX_DIRECTORY 64

/* Make a call; the provider's perform(). */
extern void lv_perform(const BlockingCall *call, BlockingReply *reply);

#endif /* AGENTVM_PROVIDERS_LIBVIRT_H */
