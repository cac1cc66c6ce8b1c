/*-------------------------------------------------------------------------
 *
 * libvirt_thread.h
 *		What the files of the provider "libvirt" share that run on threads.
 *
 * They may not touch PostgreSQL: they include nothing of it, allocate with
 * malloc(), and talk to libvirt.  JSON is libvirt's own yajl, not jansson, whose
 * json_object() would be PostgreSQL's function of that name in a server.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_LIBVIRT_THREAD_H
#define AGENTVM_PROVIDERS_LIBVIRT_THREAD_H

#include <stdbool.h>
#include <stdint.h>

#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>
#include <yajl/yajl_gen.h>
#include <yajl/yajl_tree.h>

#include "providers/blocking.h"
#include "providers/error_class.h"
#include "providers/libvirt.h"

#define LV_BOOT_SERIAL "agentvm-boot" /* serial number of the disk with the boot script */
#define LV_NAMESPACE "urn:agentvm:vm" /* of the element in a domain's metadata */

/* An error of a job, as it goes into the reply. */
typedef struct LvError
{
	ErrorClass class;
	bool no_answer;	  /* the connection failed under the call: it may have taken effect */
	int system_error; /* errno on the host, if libvirt told one */
	char code[64];
	char message[480];
} LvError;

/* One call on its thread. */
typedef struct LvJob
{
	const char *uri;
	yajl_val ask;		/* the request's JSON object */
	const char *script; /* what follows it */
	size_t script_len;
	int64_t deadline; /* lv_now() by which the caller has given up */
	virConnectPtr conn;
	yajl_gen result; /* an object that is open, for the operation to fill */
	bool mutating;	 /* something has been sent that may take effect */
	bool failed;
	LvError error;
} LvJob;

/* ---- libvirt_host.c: connections, errors, pools ---- */

/* Milliseconds of a clock that only goes on. */
extern int64_t lv_now(void);

/* Member of the request: text, or NULL; a number, or 0. */
extern const char *lv_text(const LvJob *job, const char *name);
extern int lv_int(const LvJob *job, const char *name);

/* Add a member to the result; a NULL text is left out. */
extern void lv_put_text(LvJob *job, const char *name, const char *value);
extern void lv_put_int(LvJob *job, const char *name, int64_t value);
extern void lv_put_bool(LvJob *job, const char *name, bool value);

/* A name of a member, or a text of a list. */
extern void lv_put_string(LvJob *job, const char *text);

/* Text by format, malloc'ed; ends the process when memory is out. */
extern char *lv_format(const char *format, ...) __attribute__((format(printf, 1, 2)));

/*
 * The job has failed, by our own finding, or as libvirt's last error on this
 * thread tells; "what" is what was tried.  The first failure counts.  Return
 * false, so that callers can return it.
 */
extern bool lv_fail(LvJob *job, ErrorClass class, const char *code, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
extern bool lv_fail_libvirt(LvJob *job, const char *what);

/*
 * Whether the job's connection has survived the call that has just failed; if
 * not, the job fails by that call's error.  To be asked in place of
 * virConnectIsAlive(), which forgets libvirt's last error, as every call does,
 * also those that free something.
 */
extern bool lv_alive(LvJob *job, const char *what);

/* Code of libvirt's last error on this thread, VIR_ERR_OK if there is none. */
extern int lv_error_code(void);

/* False, with the job failed, once its caller has given up: nothing may be begun any more. */
extern bool lv_in_time(LvJob *job);

/*
 * Connect the job to its host, over a connection that all threads share.  A host
 * that does not answer holds up one thread at most, others fail after a while.
 */
extern bool lv_connect(LvJob *job);

/* Give the connection back; one that is broken is not used again. */
extern void lv_disconnect(LvJob *job);

/* Whether the URI is of this machine. */
extern bool lv_is_local(const char *uri);

/*
 * The storage pool of a directory, made if there is none.  NULL, with the job
 * failed, when the directory is not there or not readable.
 */
extern virStoragePoolPtr lv_pool(LvJob *job, const char *directory);

/* The volume of an image file, found by its path; NULL, with the job failed, if there is none. */
extern virStorageVolPtr lv_image(LvJob *job, const char *path);

/* The volume of that name, looked for in the directory anew if unknown; NULL if there is none. */
extern virStorageVolPtr lv_volume(virStoragePoolPtr pool, const char *name);

/*
 * Only one thread at a time works for a session (uuid text).  False, with the job
 * failed, if another one does, perhaps one whose caller has given up.
 */
extern bool lv_session_enter(LvJob *job, const char *session);
extern void lv_session_leave(const char *session);

/* ---- libvirt_xml.c: documents; malloc'ed text ---- */

/* How a VM is made. */
typedef struct LvMachine
{
	bool kvm;
	bool probe;		   /* a VM that is only to boot and power itself off */
	char *boot_volume; /* path of the disk with the boot script; NULL: none */
	char *disk;		   /* path of the overlay; NULL: none */
	char *socket;	   /* path of the gateway's socket; NULL: no runtime */
} LvMachine;

extern char *lv_pool_xml(const char *name, const char *directory);
extern char *lv_raw_volume_xml(const char *name, uint64_t bytes);
extern char *lv_overlay_xml(const char *name, uint64_t bytes, const char *base,
							const char *base_format);
extern char *lv_domain_xml(const LvJob *job, const char *name, const LvMachine *machine);

/* Value of an attribute or text of the first node that the XPath names, or NULL. */
extern char *lv_xpath(const char *xml, const char *path);

/* ---- libvirt_vm.c: operations on a VM ---- */

/* Path or volume name of a session's file: "SESSION.SUFFIX", below the directory if asked for. */
extern char *lv_file(const LvJob *job, bool path, const char *suffix);

/*
 * Metadata of a domain of ours: values of cluster, session, team, malloc'ed, or
 * NULL.  False if it is not ours.
 */
extern bool lv_owner(virDomainPtr domain, char **cluster, char **session, char **team);

/* "running", "paused", ... */
extern const char *lv_state_name(virDomainPtr domain);

extern bool lv_launch(LvJob *job);
extern bool lv_terminate(LvJob *job);

/* Halt the guest's processors, its memory kept, and let them go on; one that is so already is success. */
extern bool lv_pause(LvJob *job);
extern bool lv_resume(LvJob *job);

extern bool lv_inspect(LvJob *job);
extern bool lv_list(LvJob *job);

/* ---- libvirt_check.c: what a host can do ---- */

/*
 * Find out whether the hypervisor offers KVM, which is not to say that it works.
 * Fails when it does not tell what it offers.
 */
extern bool lv_has_kvm(LvJob *job, bool *kvm);

extern bool lv_probe(LvJob *job);
extern bool lv_check(LvJob *job);

#endif /* AGENTVM_PROVIDERS_LIBVIRT_THREAD_H */
