/*-------------------------------------------------------------------------
 *
 * libvirt_vm.c
 *		Launching, ending and looking at a VM.
 *
 * The session's id is the domain's uuid, so libvirt itself keeps a repeated
 * launch from making a second VM.  A launch makes the VM's files, and the domain
 * last; a termination takes away the boot disk first, without which a launch
 * that is still under way somewhere cannot create its domain any more.
 *
 * This side of the provider knows nothing of PostgreSQL (see libvirt_thread.h).
 *
 *-------------------------------------------------------------------------
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "providers/libvirt_thread.h"

#define GIB (UINT64_C(1) << 30)
#define BOOT_DISK_STEP 65536 /* bytes; boot disks are multiples of it */
#define GONE_WITHIN_MS 10000

char *
lv_file(const LvJob *job, bool path, const char *suffix)
{
	return lv_format("%s%s%s.%s", path ? lv_text(job, "directory") : "", path ? "/" : "",
					 lv_text(job, "session"), suffix);
}

static char *
domain_name(const LvJob *job)
{
	return lv_format(LV_NAME "%s", lv_text(job, "session"));
}

bool
lv_owner(virDomainPtr domain, char **cluster, char **session, char **team)
{
	char *xml = virDomainGetMetadata(domain, VIR_DOMAIN_METADATA_ELEMENT, LV_NAMESPACE, 0);

	*cluster = *session = *team = NULL;
	if (xml == NULL)
		return false;
	*cluster = lv_xpath(xml, "//*[local-name()='cluster']");
	*session = lv_xpath(xml, "//*[local-name()='session']");
	*team = lv_xpath(xml, "//*[local-name()='team']");
	free(xml);
	return true;
}

const char *
lv_state_name(virDomainPtr domain)
{
	int state;

	if (virDomainGetState(domain, &state, NULL, 0) < 0)
		return NULL;
	switch (state)
	{
		case VIR_DOMAIN_RUNNING:
		case VIR_DOMAIN_BLOCKED:
			return "running";
		case VIR_DOMAIN_PAUSED:
		case VIR_DOMAIN_PMSUSPENDED:
			return "paused";
		case VIR_DOMAIN_SHUTDOWN:
			return "shutting-down";
		case VIR_DOMAIN_CRASHED:
			return "crashed";
		default:
			return "stopped";
	}
}

/*
 * The session's domain, NULL if there is none.  Fails if libvirt does not say,
 * or if the domain is somebody else's.
 */
static bool
find_domain(LvJob *job, virDomainPtr *domain)
{
	const char *ours = lv_text(job, "cluster");
	char *cluster;
	char *session;
	char *team;
	bool mine;
	int code;

	*domain = virDomainLookupByUUIDString(job->conn, lv_text(job, "session"));
	if (*domain == NULL)
		return lv_error_code() == VIR_ERR_NO_DOMAIN || lv_fail_libvirt(job, "look-up");
	mine = lv_owner(*domain, &cluster, &session, &team);
	code = lv_error_code();
	if (!mine && code != VIR_ERR_NO_DOMAIN && code != VIR_ERR_NO_DOMAIN_METADATA)
	{
		lv_fail_libvirt(job, "metadata");
		job->error.class = CLASS_TRANSIENT;
	}
	mine = mine && cluster != NULL && ours != NULL && strcmp(cluster, ours) == 0;
	free(cluster);
	free(session);
	free(team);
	if (mine)
		return true;

	virDomainFree(*domain);
	*domain = NULL;
	/* it may be gone by now */
	if (code == VIR_ERR_NO_DOMAIN)
		return true;
	return lv_fail(job, CLASS_PERMANENT, "NotOurs",
				   "there is a domain with the session's uuid that this installation has not made");
}

/* Facts of a domain, into the result. */
static void
describe(LvJob *job, virDomainPtr domain)
{
	char *xml = virDomainGetXMLDesc(domain, 0);
	char *type = xml != NULL ? lv_xpath(xml, "/domain/@type") : NULL;
	char *machine = xml != NULL ? lv_xpath(xml, "/domain/os/type/@machine") : NULL;
	virDomainInfo info;

	if (type != NULL)
		lv_put_text(job, "accel",
					strcmp(type, "kvm") == 0 ? "kvm" : (strcmp(type, "qemu") == 0 ? "tcg" : type));
	if (machine != NULL)
		lv_put_text(job, "machine", machine);
	if (virDomainGetInfo(domain, &info) == 0)
	{
		lv_put_int(job, "vcpus", info.nrVirtCpu);
		lv_put_int(job, "memory_mib", (int64_t) info.maxMem / 1024);
	}
	free(type);
	free(machine);
	free(xml);
}

/* ---- a VM's files ---- */

/* Remove a file if it is there. */
static bool
remove_volume(LvJob *job, virStoragePoolPtr pool, const char *suffix)
{
	char *name = lv_file(job, false, suffix);
	virStorageVolPtr volume = virStorageVolLookupByName(pool, name);
	bool done = true;

	if (volume == NULL)
		done = lv_error_code() == VIR_ERR_NO_STORAGE_VOL || lv_fail_libvirt(job, name);
	else if (virStorageVolDelete(volume, 0) < 0 && lv_error_code() != VIR_ERR_NO_STORAGE_VOL)
		done = lv_fail_libvirt(job, name);
	if (volume != NULL)
		virStorageVolFree(volume);
	free(name);
	return done;
}

/*
 * Make a file, in place of one that somebody has left.  The pool learns of files
 * by being told: one that it has not seen is found by looking.
 */
static virStorageVolPtr
make_volume(LvJob *job, virStoragePoolPtr pool, const char *suffix, const char *xml)
{
	virStorageVolPtr volume;

	if (!lv_in_time(job) || !remove_volume(job, pool, suffix))
		return NULL;
	job->mutating = true;
	volume = virStorageVolCreateXML(pool, xml, 0);
	if (volume == NULL && lv_alive(job, suffix) && virStoragePoolRefresh(pool, 0) == 0 &&
		remove_volume(job, pool, suffix) && lv_in_time(job))
		volume = virStorageVolCreateXML(pool, xml, 0);
	if (volume == NULL)
		lv_fail_libvirt(job, suffix);
	return volume;
}

static bool
upload(LvJob *job, virStorageVolPtr volume)
{
	virStreamPtr stream = virStreamNew(job->conn, 0);
	size_t sent = 0;

	if (stream == NULL ||
		virStorageVolUpload(volume, stream, 0, (unsigned long long) job->script_len, 0) < 0)
	{
		/* libvirt's mock has no uploads, and no guest that would read them */
		bool mock = lv_error_code() == VIR_ERR_NO_SUPPORT &&
					strcmp(virConnectGetType(job->conn), "TEST") == 0;

		/* before the stream is freed, which forgets the error */
		if (!mock)
			lv_fail_libvirt(job, "upload of the boot disk");
		if (stream != NULL)
			virStreamFree(stream);
		return mock;
	}
	while (sent < job->script_len)
	{
		int n = virStreamSend(stream, job->script + sent, job->script_len - sent);

		if (n < 0)
			break;
		sent += n;
	}
	if (sent < job->script_len || virStreamFinish(stream) < 0)
	{
		lv_fail_libvirt(job, "upload of the boot disk");
		if (sent < job->script_len)
			virStreamAbort(stream);
	}
	virStreamFree(stream);
	return !job->failed;
}

/* The disk that the boot script is on, and nothing else is. */
static bool
make_boot_disk(LvJob *job, virStoragePoolPtr pool, LvMachine *machine)
{
	uint64_t size = (job->script_len / BOOT_DISK_STEP + 1) * BOOT_DISK_STEP;
	char *name = lv_file(job, false, "boot");
	char *xml = lv_raw_volume_xml(name, size);
	virStorageVolPtr volume = make_volume(job, pool, "boot", xml);

	free(name);
	free(xml);
	if (volume == NULL)
		return false;
	if (lv_in_time(job) && upload(job, volume))
		machine->boot_volume = lv_file(job, true, "boot");
	virStorageVolFree(volume);
	return machine->boot_volume != NULL;
}

/* A disk that has what the base image has until the guest writes to it. */
static bool
make_disk(LvJob *job, virStoragePoolPtr pool, LvMachine *machine)
{
	const char *path = lv_text(job, "disk");
	uint64_t size = (uint64_t) lv_int(job, "disk_gib") * GIB;
	virStorageVolPtr base = lv_image(job, path);
	virStorageVolPtr volume = NULL;
	virStorageVolInfo info;
	char *description = NULL;
	char *format = NULL;
	char *name;
	char *xml;

	if (base == NULL)
		return false;
	if (virStorageVolGetInfo(base, &info) < 0 ||
		(description = virStorageVolGetXMLDesc(base, 0)) == NULL)
		lv_fail_libvirt(job, path);
	virStorageVolFree(base);
	if (job->failed)
		return false;
	format = lv_xpath(description, "/volume/target/format/@type");
	free(description);

	if (format == NULL || (strcmp(format, "qcow2") != 0 && strcmp(format, "raw") != 0))
		lv_fail(job, CLASS_PERMANENT, "BadImage", "image \"%s\" is neither qcow2 nor raw", path);
	else if (size != 0 && size < info.capacity)
		lv_fail(job, CLASS_PERMANENT, "DiskTooSmall",
				"disk_gib is %d, but image \"%s\" has %llu bytes", lv_int(job, "disk_gib"), path,
				(unsigned long long) info.capacity);
	else
	{
		name = lv_file(job, false, "disk");
		xml = lv_overlay_xml(name, size != 0 ? size : info.capacity, path, format);
		volume = make_volume(job, pool, "disk", xml);
		free(name);
		free(xml);
	}
	free(format);
	if (volume == NULL)
		return false;
	virStorageVolFree(volume);
	machine->disk = lv_file(job, true, "disk");
	return true;
}

/* ---- launch ---- */

/* A launch has found the domain: good if it runs.  Lets go of it. */
static bool
take_domain(LvJob *job, virDomainPtr domain)
{
	const char *state = lv_state_name(domain);

	/* a libvirtd that was started anew takes down a VM whose start was interrupted */
	if (state == NULL || strcmp(state, "running") != 0)
		lv_fail(job, CLASS_TRANSIENT, "NotRunning", "the domain is there, but does not run");
	else
		describe(job, domain);
	virDomainFree(domain);
	return !job->failed;
}

/* If it fails, *taken says whether another launch has made a domain of the files. */
static bool
start_domain(LvJob *job, const LvMachine *machine, bool *taken)
{
	char *name = domain_name(job);
	char *xml = lv_domain_xml(job, name, machine);
	virDomainPtr domain;

	free(name);
	if (!lv_in_time(job))
	{
		free(xml);
		return false;
	}
	job->mutating = true;
	domain = virDomainCreateXML(job->conn, xml, 0);
	free(xml);
	if (domain == NULL)
	{
		LvError why;

		/* somebody else's launch of the same VM may have won */
		lv_fail_libvirt(job, "start");
		why = job->error;
		if (why.no_answer)
			return false;
		job->failed = false;
		if (!find_domain(job, &domain) || domain == NULL)
		{
			bool kvm;

			job->failed = false;
			if (machine->kvm && lv_has_kvm(job, &kvm) && !kvm)
				return lv_fail(job, CLASS_TRANSIENT, LV_NO_KVM,
							   "there is no KVM on the host any more");
			job->failed = true;
			job->error = why;
			return false;
		}
		*taken = true;
		return take_domain(job, domain);
	}
	describe(job, domain);
	virDomainFree(domain);
	return true;
}

bool
lv_launch(LvJob *job)
{
	LvMachine machine = {0};
	virDomainPtr domain = NULL;
	virStoragePoolPtr pool;
	bool taken = false;

	if (!lv_connect(job) || !find_domain(job, &domain))
		return false;
	if (domain != NULL)
		return take_domain(job, domain);

	pool = lv_pool(job, lv_text(job, "directory"));
	if (pool == NULL)
		return false;
	machine.kvm = lv_int(job, "kvm") != 0;
	if (lv_int(job, "runtime") != 0)
		machine.socket = lv_file(job, true, "sock");
	if ((lv_text(job, "disk") == NULL || make_disk(job, pool, &machine)) &&
		make_boot_disk(job, pool, &machine) && start_domain(job, &machine, &taken))
		;
	else if (!job->error.no_answer && !taken)
	{
		/* what has been made of it is of no use; a termination takes away what stays */
		LvError why = job->error;

		remove_volume(job, pool, "boot");
		remove_volume(job, pool, "disk");
		job->failed = true;
		job->error = why;
	}
	free(machine.boot_volume);
	free(machine.disk);
	free(machine.socket);
	virStoragePoolFree(pool);
	return !job->failed;
}

/* ---- terminate ---- */

/* End the domain, and see it gone; the result tells whether it was so before. */
static bool
end_domain(LvJob *job)
{
	virDomainPtr domain = NULL;
	int64_t until = lv_now() + GONE_WITHIN_MS;
	bool was_there = false;

	for (;;)
	{
		if (!find_domain(job, &domain))
			return false;
		if (domain == NULL)
		{
			lv_put_int(job, "was_gone", !was_there);
			return true;
		}
		was_there = true;
		if (!lv_in_time(job) || lv_now() > until)
		{
			virDomainFree(domain);
			return lv_fail(job, CLASS_TRANSIENT, "StillThere", "the domain does not end");
		}
		job->mutating = true;
		if (virDomainDestroyFlags(domain, 0) < 0 && lv_error_code() != VIR_ERR_NO_DOMAIN &&
			lv_error_code() != VIR_ERR_OPERATION_INVALID)
			lv_fail_libvirt(job, "destroy");
		/* somebody may have made it persistent */
		else if (virDomainIsPersistent(domain) == 1 &&
				 virDomainUndefineFlags(domain, VIR_DOMAIN_UNDEFINE_MANAGED_SAVE |
													VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA |
													VIR_DOMAIN_UNDEFINE_NVRAM) < 0)
			lv_fail_libvirt(job, "undefine");
		virDomainFree(domain);
		if (job->failed)
			return false;
		usleep(20000);
	}
}

/* Libvirt removes the socket with its domain, unless it was not there to see the end. */
static void
remove_socket(LvJob *job)
{
	struct stat status;
	char *path;

	if (!lv_is_local(job->uri))
		return;
	path = lv_file(job, true, "sock");
	if (lstat(path, &status) == 0 && S_ISSOCK(status.st_mode))
		(void) unlink(path);
	free(path);
}

bool
lv_terminate(LvJob *job)
{
	virStoragePoolPtr pool;
	LvError none = {0};
	bool ended;

	if (!lv_connect(job))
		return false;

	/* no directory, no files; but there may be a domain */
	pool = lv_pool(job, lv_text(job, "directory"));
	if (pool == NULL && (job->error.no_answer || job->error.system_error != ENOENT))
		return false;
	if (pool != NULL)
	{
		/* files that another libvirtd has made, or an earlier life of this one */
		char *name = lv_file(job, false, "boot");
		virStorageVolPtr volume = lv_volume(pool, name);

		if (volume != NULL)
			virStorageVolFree(volume);
		free(name);
		job->mutating = true;
		remove_volume(job, pool, "boot"); /* tried again below */
	}
	job->failed = false;
	job->error = none;

	ended = end_domain(job);
	if (ended && pool != NULL)
		ended = remove_volume(job, pool, "boot") && remove_volume(job, pool, "disk");
	if (ended)
		remove_socket(job);
	if (pool != NULL)
		virStoragePoolFree(pool);
	return ended;
}

/* ---- pause, resume ---- */

static bool
halt(LvJob *job, bool pauses)
{
	const char *from = pauses ? "running" : "paused";
	const char *to = pauses ? "paused" : "running";
	virDomainPtr domain = NULL;
	const char *state;

	if (!lv_connect(job) || !find_domain(job, &domain))
		return false;
	if (domain == NULL)
		return lv_fail(job, CLASS_NOT_FOUND, "NoDomain", "the domain is gone");
	state = lv_state_name(domain);
	if (state == NULL)
		lv_fail_libvirt(job, "state");
	else if (strcmp(state, from) == 0 && lv_in_time(job))
	{
		job->mutating = true;
		if ((pauses ? virDomainSuspend(domain) : virDomainResume(domain)) < 0)
			lv_fail_libvirt(job, pauses ? "suspend" : "resume");
	}
	else if (!job->failed && strcmp(state, to) != 0)
		lv_fail(job, CLASS_NOT_FOUND, "NotRunning", "the domain is there, but %s", state);
	virDomainFree(domain);
	return !job->failed;
}

bool
lv_pause(LvJob *job)
{
	return halt(job, true);
}

bool
lv_resume(LvJob *job)
{
	return halt(job, false);
}

/* ---- inspect ---- */

bool
lv_inspect(LvJob *job)
{
	virDomainPtr domain = NULL;
	const char *state = NULL;

	if (!lv_connect(job) || !find_domain(job, &domain))
		return false;
	if (domain != NULL)
	{
		state = lv_state_name(domain);
		if (state == NULL && lv_error_code() != VIR_ERR_NO_DOMAIN)
			lv_fail_libvirt(job, "state");
	}
	lv_put_text(job, "state", state != NULL ? state : "not_found");
	if (state != NULL)
	{
		char *name = domain_name(job);

		lv_put_text(job, "vm_id", name);
		free(name);
		describe(job, domain);
	}
	if (domain != NULL)
		virDomainFree(domain);
	return !job->failed;
}

/* ---- list ---- */

/* What the contract of OP_LIST calls a state. */
static const char *
listed_state(virDomainPtr domain)
{
	const char *state = lv_state_name(domain);

	if (state == NULL || strcmp(state, "crashed") == 0)
		return "terminated";
	return strcmp(state, "paused") == 0 ? "stopped" : state;
}

/* Result: {"vms": [...]}, as OP_LIST has them, of the domains of this installation. */
bool
lv_list(LvJob *job)
{
	const char *ours = lv_text(job, "cluster");
	virDomainPtr *domains = NULL;
	int n;

	if (!lv_connect(job))
		return false;
	n = virConnectListAllDomains(job->conn, &domains, 0);
	if (n < 0)
		return lv_fail_libvirt(job, "list");
	lv_put_string(job, "vms");
	yajl_gen_array_open(job->result);
	for (int i = 0; i < n; i++)
	{
		char *cluster = NULL;
		char *session = NULL;
		char *team = NULL;
		int code;

		if (lv_owner(domains[i], &cluster, &session, &team))
		{
			if (cluster != NULL && ours != NULL && strcmp(cluster, ours) == 0)
			{
				yajl_gen_map_open(job->result);
				lv_put_text(job, "vm_id", virDomainGetName(domains[i]));
				lv_put_text(job, "state", listed_state(domains[i]));
				lv_put_text(job, "session_id", session);
				lv_put_text(job, "team_id", team);
				yajl_gen_map_close(job->result);
			}
		}
		else
		{
			/* one that has just gone, or is somebody else's; with any other error the list is none */
			code = lv_error_code();
			if (code != VIR_ERR_NO_DOMAIN && code != VIR_ERR_NO_DOMAIN_METADATA)
				lv_fail_libvirt(job, "metadata");
		}
		free(cluster);
		free(session);
		free(team);
		virDomainFree(domains[i]);
	}
	free(domains);
	yajl_gen_array_close(job->result);
	return !job->failed;
}
