/*-------------------------------------------------------------------------
 *
 * libvirt_check.c
 *		What a host can do: the KVM probe, and the preflight of check_provider().
 *
 * That there is a /dev/kvm does not mean that guests run under it: there are
 * machines on which they hang.  So the probe boots one that is to do nothing but
 * power itself off, and only a guest that has done so proves KVM.
 *
 * This side of the provider knows nothing of PostgreSQL (see libvirt_thread.h).
 *
 *-------------------------------------------------------------------------
 */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "providers/libvirt_thread.h"

#define PROBE_MS 15000
#define PROBE_MARGIN_MS 5000 /* to take the probe away again */
#define FRESH_MS 60000		 /* a probe's answer is good for those who asked meanwhile */
#define LOOK_MS 200
#define MAX_DOMAINS 500 /* listed: the answer has to fit a question (QUESTION_SIZE) */

/* ---- the probe ---- */

typedef enum Verdict
{
	RUNNING,
	SWITCHED_OFF, /* by the guest itself */
	ENDED		  /* otherwise */
} Verdict;

/* A probe that is under way; freed with its callback. */
typedef struct Probe
{
	pthread_mutex_t lock;
	char *name;
	Verdict verdict;
} Probe;

/* The last answers, by URI, so that many first launches make one probe. */
typedef struct Answer
{
	struct Answer *next;
	char *uri;
	int64_t at;
	bool kvm;
	bool busy;
} Answer;

static pthread_mutex_t answers_lock = PTHREAD_MUTEX_INITIALIZER;
static Answer *answers = NULL; /* as many as there are URIs */

/* A name that nobody else has for something that does not last. */
static char *
unique_name(const char *what)
{
	static unsigned int number = 0;

	return lv_format("agentvm-%s-%d-%u-%lld", what, (int) getpid(),
					 __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED), (long long) lv_now());
}

static void
free_probe(void *arg)
{
	Probe *probe = arg;

	free(probe->name);
	free(probe);
}

/* On the thread of the event loop. */
static int
on_lifecycle(virConnectPtr conn, virDomainPtr domain, int event, int detail, void *arg)
{
	Probe *probe = arg;
	const char *name = virDomainGetName(domain);

	if (name == NULL || strcmp(name, probe->name) != 0)
		return 0;
	pthread_mutex_lock(&probe->lock);
	if (probe->verdict == RUNNING && event == VIR_DOMAIN_EVENT_SHUTDOWN &&
		detail != VIR_DOMAIN_EVENT_SHUTDOWN_HOST)
		probe->verdict = SWITCHED_OFF;
	else if (probe->verdict == RUNNING && event == VIR_DOMAIN_EVENT_STOPPED)
		probe->verdict = detail == VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN ? SWITCHED_OFF : ENDED;
	pthread_mutex_unlock(&probe->lock);
	return 0;
}

static void
pause_ms(int ms)
{
	(void) nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L},
					 NULL);
}

/* What the hypervisor says of a kind of domain, or NULL if it has none. */
static char *
capabilities(LvJob *job, const char *virttype)
{
	return virConnectGetDomainCapabilities(job->conn, NULL, "x86_64", "q35", virttype, 0);
}

bool
lv_has_kvm(LvJob *job, bool *kvm)
{
	char *xml = capabilities(job, "kvm");

	*kvm = xml != NULL;
	free(xml);
	if (*kvm)
		return true;
	/* there is none only if there would be something else */
	xml = capabilities(job, "qemu");
	if (xml == NULL)
		return lv_fail_libvirt(job, "capabilities");
	free(xml);
	return true;
}

/*
 * The probe could not be started under KVM, as libvirt's last error tells.  That
 * is for want of KVM only if the very same starts without; else the job fails.
 */
static void
blame_kvm(LvJob *job, const LvMachine *probe)
{
	LvMachine machine = *probe;
	LvError none = {0};
	virDomainPtr domain;
	char *name;
	char *xml;

	lv_fail_libvirt(job, "probe");
	if (job->error.class != CLASS_PERMANENT)
		return;
	job->failed = false;
	job->error = none;
	if (!lv_in_time(job))
		return;
	machine.kvm = false;
	name = unique_name("probe");
	xml = lv_domain_xml(job, name, &machine);
	domain = virDomainCreateXML(job->conn, xml, VIR_DOMAIN_START_AUTODESTROY);
	free(name);
	free(xml);
	if (domain == NULL)
	{
		lv_fail_libvirt(job, "probe");
		return;
	}
	(void) virDomainDestroyFlags(domain, 0);
	virDomainFree(domain);
}

/* Boot the probe under KVM.  Fails when that tells nothing of KVM. */
static bool
boot_probe(LvJob *job, bool *kvm)
{
	LvMachine machine = {.kvm = true, .probe = true};
	Probe *probe = calloc(1, sizeof(Probe));
	int64_t until = lv_now() + PROBE_MS;
	bool cut_short = until > job->deadline - PROBE_MARGIN_MS;
	virDomainPtr domain;
	Verdict verdict = RUNNING;
	int callback;
	char *xml;

	if (cut_short)
		until = job->deadline - PROBE_MARGIN_MS;
	if (probe == NULL)
		abort();
	pthread_mutex_init(&probe->lock, NULL);
	probe->name = unique_name("probe");
	callback = virConnectDomainEventRegisterAny(job->conn, NULL, VIR_DOMAIN_EVENT_ID_LIFECYCLE,
												VIR_DOMAIN_EVENT_CALLBACK(on_lifecycle), probe,
												free_probe);
	if (callback < 0)
	{
		free_probe(probe);
		return lv_fail_libvirt(job, "events");
	}

	xml = lv_domain_xml(job, probe->name, &machine);
	/* it must not outlive us: it may hang */
	domain = virDomainCreateXML(job->conn, xml, VIR_DOMAIN_START_AUTODESTROY);
	free(xml);
	*kvm = false;
	if (domain == NULL)
		blame_kvm(job, &machine);
	else
	{
		while (verdict == RUNNING && lv_now() < until)
		{
			pause_ms(LOOK_MS);
			pthread_mutex_lock(&probe->lock);
			verdict = probe->verdict;
			pthread_mutex_unlock(&probe->lock);
		}
		*kvm = verdict == SWITCHED_OFF;
		if (verdict == RUNNING)
			(void) virDomainDestroyFlags(domain, 0);
		virDomainFree(domain);
		if (verdict != SWITCHED_OFF && virConnectIsAlive(job->conn) != 1)
			lv_fail(job, CLASS_TRANSIENT, "NoAnswer", "the host was lost while it was probed");
		else if (verdict == RUNNING && cut_short)
			lv_fail(job, CLASS_TRANSIENT, "TooLate",
					"agentvm.lease leaves too little time to find out whether the host has KVM");
	}
	(void) virConnectDomainEventDeregisterAny(job->conn, callback);
	return !job->failed;
}

static Answer *
find_answer(const char *uri)
{
	Answer *answer;

	for (answer = answers; answer != NULL; answer = answer->next)
	{
		if (strcmp(answer->uri, uri) == 0)
			return answer;
	}
	answer = calloc(1, sizeof(Answer));
	if (answer == NULL)
		abort();
	answer->uri = lv_format("%s", uri);
	answer->at = -FRESH_MS;
	answer->next = answers;
	answers = answer;
	return answer;
}

/* Result: {"kvm": whether a guest runs under KVM on this host}. */
bool
lv_probe(LvJob *job)
{
	int64_t asked = lv_now();
	bool known = false;
	bool kvm = false;
	Answer *answer;

	if (!lv_connect(job))
		return false;
	if (!lv_has_kvm(job, &kvm))
		return false;
	if (!kvm)
	{
		lv_put_bool(job, "kvm", false);
		return true;
	}

	/* one probe at a time; who has waited for another's takes its answer */
	pthread_mutex_lock(&answers_lock);
	answer = find_answer(job->uri);
	while (answer->busy && lv_now() < job->deadline)
	{
		pthread_mutex_unlock(&answers_lock);
		pause_ms(LOOK_MS);
		pthread_mutex_lock(&answers_lock);
	}
	if (answer->busy)
		lv_fail(job, CLASS_TRANSIENT, "Busy", "another probe of this host is under way");
	else if (answer->at > asked)
	{
		known = true;
		kvm = answer->kvm;
	}
	else
		answer->busy = true;
	pthread_mutex_unlock(&answers_lock);
	if (job->failed)
		return false;

	if (!known)
	{
		bool good = lv_in_time(job) && boot_probe(job, &kvm);

		pthread_mutex_lock(&answers_lock);
		answer->busy = false;
		if (good)
		{
			answer->kvm = kvm;
			answer->at = lv_now();
		}
		pthread_mutex_unlock(&answers_lock);
		if (!good)
			return false;
	}
	lv_put_bool(job, "kvm", kvm);
	return true;
}

/* ---- the preflight ---- */

typedef struct Finding
{
	struct Finding *next;
	const char *what;
	const char *hint;	 /* what to do about it */
	const char *profile; /* whose options it is in; NULL: the team's, or none */
	char *message;
} Finding;

/* What has been found so far. */
typedef struct Check
{
	LvJob *job;
	Finding *problems; /* what is missing */
	Finding *warnings; /* what may become a problem */
} Check;

static Finding *tell(Finding **list, const char *what, const char *hint, const char *format, ...)
	__attribute__((format(printf, 4, 5)));

/* Append to a list. */
static Finding *
tell(Finding **list, const char *what, const char *hint, const char *format, ...)
{
	Finding *finding = calloc(1, sizeof(Finding));
	va_list args;

	va_start(args, format);
	if (finding == NULL || vasprintf(&finding->message, format, args) < 0)
		abort();
	va_end(args);
	finding->what = what;
	finding->hint = hint;
	for (char *c = finding->message; *c != '\0'; c++)
	{
		if (*c < ' ' || *c > '~')
			*c = *c == '\n' ? ' ' : '?';
	}
	while (*list != NULL)
		list = &(*list)->next;
	*list = finding;
	return finding;
}

/* Into the result, and free them. */
static void
put_findings(LvJob *job, const char *name, Finding *list)
{
	lv_put_string(job, name);
	yajl_gen_array_open(job->result);
	while (list != NULL)
	{
		Finding *next = list->next;

		yajl_gen_map_open(job->result);
		lv_put_text(job, "what", list->what);
		lv_put_text(job, "message", list->message);
		lv_put_text(job, "hint", list->hint);
		lv_put_text(job, "profile", list->profile);
		yajl_gen_map_close(job->result);
		free(list->message);
		free(list);
		list = next;
	}
	yajl_gen_array_close(job->result);
}

static const char *
last_message(void)
{
	const char *message = virGetLastErrorMessage();

	return message != NULL ? message : "unknown error";
}

/* The failure of the job becomes a problem of the list. */
static Finding *
tell_failure(Check *check, const char *what, const char *hint)
{
	LvJob *job = check->job;
	LvError none = {0};
	Finding *finding = tell(&check->problems, what, hint, "%s", job->error.message);

	job->failed = false;
	job->error = none;
	return finding;
}

/* What to do about a connection that failed. */
static const char *
connection_hint(const LvJob *job)
{
	static const struct
	{
		const char *says;
		const char *hint;
	} hints[] = {
		{"HOST IDENTIFICATION HAS CHANGED",
		 "The host has another SSH key than the known one. If that is right, replace it in the "
		 "known hosts of the server's user."},
		{"host key",
		 "Add the host's SSH key, having compared it, to the known hosts of the server's "
		 "user (~/.ssh/known_hosts, or what the URI names)."},
		{"Permission denied (",
		 "Put the public key of the server's user (or of the URI's keyfile), which may have no "
		 "passphrase, into ~/.ssh/authorized_keys of the URI's user on the host."},
		{" not found",
		 "The host needs virt-ssh-helper (Debian: libvirt-daemon), or, for a URI with a socket, a "
		 "netcat (Debian: netcat-openbsd)."},
		{"'ssh' in path", "Install ssh where the server runs (Debian: openssh-client)."},
		{"ssh: ", "Is the host up, does its name resolve, and does its sshd listen where the URI "
				  "says?"},
	};

	for (size_t i = 0; i < sizeof(hints) / sizeof(hints[0]); i++)
	{
		if (strcasestr(job->error.message, hints[i].says) != NULL)
			return hints[i].hint;
	}
	return "Is libvirt's daemon installed (Debian: libvirt-daemon, libvirt-daemon-driver-qemu), "
		   "running, and may the server's user connect?";
}

static void
check_emulator(Check *check)
{
	LvJob *job = check->job;
	const char *accel = lv_text(job, "accel");
	char *xml = capabilities(job, "qemu");
	char *path = xml != NULL ? lv_xpath(xml, "/domainCapabilities/path") : NULL;
	LvError none = {0};
	bool kvm;

	if (path != NULL)
		lv_put_text(job, "emulator", path);
	else
		tell(&check->problems, "emulator", "Install QEMU on the host (Debian: qemu-system-x86).",
			 "no emulator for x86_64: %s", last_message());
	if (!lv_has_kvm(job, &kvm))
	{
		/* which has been told */
		job->failed = false;
		job->error = none;
	}
	if (path != NULL && accel != NULL && strcmp(accel, "kvm") == 0 && !kvm)
		tell(&check->problems, "accelerator",
			 "Let the user that QEMU runs as open /dev/kvm (group kvm), or set the host's accel to "
			 "auto or tcg.",
			 "the host's accel is kvm, but KVM cannot be used there");
	lv_put_bool(job, "kvm_offered", kvm);
	free(path);
	free(xml);
}

/* Whether the file can be read there, by reading its first byte. */
static void
check_image(Check *check, const char *what, const char *path, const char *profile)
{
	LvJob *job = check->job;
	virStorageVolPtr volume = lv_image(job, path);
	virStreamPtr stream;
	char byte;

	if (volume == NULL)
	{
		tell_failure(check, what,
					 "Put the image there, readable by the user that libvirtd runs as.")
			->profile = profile;
		return;
	}
	stream = virStreamNew(job->conn, 0);
	if (stream == NULL || virStorageVolDownload(volume, stream, 0, 1, 0) < 0 ||
		virStreamRecv(stream, &byte, 1) != 1)
		tell(&check->problems, what, "Make it readable by the user that libvirtd runs as.",
			 "image \"%s\": %s", path, last_message())
			->profile = profile;
	if (stream != NULL)
	{
		(void) virStreamAbort(stream);
		virStreamFree(stream);
	}
	virStorageVolFree(volume);
}

static const char *
text_of(yajl_val object, const char *name)
{
	const char *path[] = {name, NULL};

	return YAJL_GET_STRING(yajl_tree_get(object, path, yajl_t_string));
}

static void
check_images(Check *check)
{
	LvJob *job = check->job;
	const char *path[] = {"images", NULL};
	yajl_val images = yajl_tree_get(job->ask, path, yajl_t_array);
	size_t n = YAJL_IS_ARRAY(images) ? YAJL_GET_ARRAY(images)->len : 0;
	size_t i;

	for (i = 0; i < n && lv_now() < job->deadline; i++)
	{
		yajl_val image = YAJL_GET_ARRAY(images)->values[i];

		if (text_of(image, "what") != NULL && text_of(image, "path") != NULL)
			check_image(check, text_of(image, "what"), text_of(image, "path"),
						text_of(image, "profile"));
	}
	if (i < n || lv_int(job, "images_left_out") != 0)
		tell(&check->warnings, "images", "Drop profiles that nobody uses.",
			 "only the first %zu images have been looked at, those of other profiles have not", i);
}

/* Make and remove a file there. */
static void
check_directory(Check *check)
{
	LvJob *job = check->job;
	const char *directory = lv_text(job, "directory");
	virStoragePoolPtr pool;
	virStorageVolPtr volume;
	virStoragePoolInfo info;
	char *name;
	char *xml;

	if (directory == NULL || directory[0] != '/' || strlen(directory) > LV_MAX_DIRECTORY)
	{
		tell(&check->problems, "directory", "Give the host a shorter, absolute directory.",
			 "the host's directory is no absolute path of at most %d bytes", LV_MAX_DIRECTORY);
		return;
	}
	pool = lv_pool(job, directory);
	if (pool == NULL)
	{
		tell_failure(check, "directory",
					 "Make the directory, owned by the user that libvirtd runs as, mode 0700 or "
					 "with an ACL for the gateway.");
		return;
	}
	name = unique_name("check");
	xml = lv_raw_volume_xml(name, 4096);
	volume = virStorageVolCreateXML(pool, xml, 0);
	if (volume == NULL)
		tell(&check->problems, "directory",
			 "Make it writable for the user that libvirtd runs as, with room for the disks of VMs.",
			 "directory \"%s\": %s", directory, last_message());
	else
	{
		(void) virStorageVolDelete(volume, 0);
		virStorageVolFree(volume);
	}
	if (virStoragePoolRefresh(pool, 0) == 0 && virStoragePoolGetInfo(pool, &info) == 0)
		lv_put_int(job, "free_mib", (int64_t) (info.available >> 20));
	virStoragePoolFree(pool);
	free(name);
	free(xml);
}

/* The line of /proc/PID/cgroup that systemd works with, or NULL. */
static char *
service_of(const char *pid)
{
	char *path = lv_format("/proc/%s/cgroup", pid);
	FILE *file = fopen(path, "re");
	char line[1024];
	char *found = NULL;

	free(path);
	while (file != NULL && found == NULL && fgets(line, sizeof(line), file) != NULL)
	{
		char *group;

		line[strcspn(line, "\n")] = '\0';
		if (strncmp(line, "0::", 3) == 0)
			group = line + 3;
		else if (strstr(line, ":name=systemd:") != NULL)
			group = strchr(line, '/');
		else
			continue;
		if (group != NULL && strstr(group, ".service") != NULL)
			found = lv_format("%s", group);
	}
	if (file != NULL)
		fclose(file);
	return found;
}

/*
 * A libvirtd in the service that PostgreSQL runs in ends with it, and its VMs,
 * too.
 */
static void
check_cgroup(Check *check)
{
	LvJob *job = check->job;
	char *ours = service_of("self");
	DIR *processes;
	struct dirent *entry;

	if (!lv_is_local(job->uri) || ours == NULL || (processes = opendir("/proc")) == NULL)
	{
		free(ours);
		return;
	}
	while ((entry = readdir(processes)) != NULL)
	{
		char *path;
		char *theirs;
		char name[32] = "";
		FILE *file;

		if (!isdigit((unsigned char) entry->d_name[0]))
			continue;
		path = lv_format("/proc/%s/comm", entry->d_name);
		file = fopen(path, "re");
		free(path);
		if (file == NULL)
			continue;
		if (fgets(name, sizeof(name), file) == NULL)
			name[0] = '\0';
		fclose(file);
		if (strcmp(name, "libvirtd\n") != 0 && strcmp(name, "virtqemud\n") != 0)
			continue;
		theirs = service_of(entry->d_name);
		if (theirs != NULL && strcmp(ours, theirs) == 0)
		{
			tell(&check->warnings, "cgroup",
				 "Run it by infra/systemd/agentvm-libvirtd.service, and name its socket in the "
				 "host's uri.",
				 "libvirtd (process %s) runs inside PostgreSQL's own service: it and its VMs end "
				 "with it, and share its memory limit",
				 entry->d_name);
			free(theirs);
			break;
		}
		free(theirs);
	}
	closedir(processes);
	free(ours);
}

/* VMs of ours that are there. */
static void
put_domains(LvJob *job)
{
	const char *ours = lv_text(job, "cluster");
	virDomainPtr *domains = NULL;
	int n = virConnectListAllDomains(job->conn, &domains, 0);
	int listed = 0;

	lv_put_string(job, "domains");
	yajl_gen_array_open(job->result);
	for (int i = 0; i < n; i++)
	{
		char *cluster;
		char *session;
		char *team;

		if (listed < MAX_DOMAINS && lv_owner(domains[i], &cluster, &session, &team))
		{
			if (cluster != NULL && (ours == NULL || strcmp(cluster, ours) == 0))
			{
				listed++;
				yajl_gen_map_open(job->result);
				lv_put_text(job, "name", virDomainGetName(domains[i]));
				lv_put_text(job, "state", lv_state_name(domains[i]));
				lv_put_text(job, "cluster", cluster);
				lv_put_text(job, "session", session);
				lv_put_text(job, "team", team);
				yajl_gen_map_close(job->result);
			}
			free(cluster);
			free(session);
			free(team);
		}
		virDomainFree(domains[i]);
	}
	free(domains);
	yajl_gen_array_close(job->result);
}

/*
 * Result: {"ok", "libvirt", "emulator", "kvm_offered", "free_mib", "problems", "warnings",
 * "domains"}.  What is missing is no failure of the call.
 */
bool
lv_check(LvJob *job)
{
	Check all = {.job = job};
	Check *check = &all;
	unsigned long version;

	if (!lv_connect(job))
		tell_failure(check, "connection", connection_hint(job));
	else
	{
		if (virConnectGetLibVersion(job->conn, &version) == 0)
		{
			char *text =
				lv_format("%lu.%lu.%lu", version / 1000000, version / 1000 % 1000, version % 1000);

			lv_put_text(job, "libvirt", text);
			free(text);
		}
		check_emulator(check);
		check_directory(check);
		check_images(check);
		check_cgroup(check);
		put_domains(job);
	}
	lv_put_bool(job, "ok", check->problems == NULL);
	put_findings(job, "problems", check->problems);
	put_findings(job, "warnings", check->warnings);
	return true;
}
