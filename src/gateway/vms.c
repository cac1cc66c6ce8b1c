/*-------------------------------------------------------------------------
 *
 * vms.c
 *		VMs without a network: each has a socket in a directory that we watch.
 *
 * All descriptors are in one epoll set, itself in libuv's loop.  Its events are
 * taken one at a time, since any of them may close others.
 *
 *-------------------------------------------------------------------------
 */
#include "vms.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "../common/cable.h"
#include "../common/log.h"
#include "options.h"

#define SUFFIX ".sock"
#define PREFIX "vm:"
#define MAX_NAME 47 /* what Peer has room for */

#define TICK_MS 100
#define SCAN_MS 10000	 /* directories are looked through so often, whatever inotify says */
#define RETRY_MIN_MS 100 /* doubled from try to try */
#define RETRY_MAX_MS 30000
#define GOOD_MS 60000	   /* a connection that has lasted so long begins at the minimum again */
#define EVENTS_PER_TURN 64 /* then others of libuv's loop have theirs */

/* What a VM may spend: bytes a second, with ALLOWANCE at once. */
#define RATE (4 * 1024 * 1024)
#define ALLOWANCE (4 * 1024 * 1024)
#define FRAME_COST 512					 /* of a frame, beside its bytes */
#define STREAM_COST (32 * 1024)			 /* of a new stream, or of a runtime that begins anew */
#define PROMISE_TICKS 50				 /* that a promise lasts, more or less */
#define MESSAGE_MS 30000				 /* for all of a message to come */
#define MAX_EXPECTED (256 * 1024 * 1024) /* what has been asked for is no more than that */

typedef struct Vm
{
	Vms *vms;
	int number; /* its place in vms->all */
	int dir;	/* its place in vms->dirs */
	char path[sizeof(((struct sockaddr_un *) NULL)->sun_path)];
	char name[MAX_NAME + 1];
	bool is_there;	 /* in the directory, when it was looked through */
	bool was_synced; /* when last looked at */
	bool is_known;	 /* the log knows it as connected */
	bool is_full;	 /* the socket takes no more for now */
	bool is_paused;	 /* it has spent too much */
	int failures;
	uint64_t connected_at;
	uint64_t retry_at; /* when it is not connected */
	double allowance;
	uint64_t allowed_at;
	uint64_t frames;		   /* of the mux, as far as paid for */
	char reason[64];		   /* of the last failure that was logged */
	bool is_reading;		   /* what is to be sent waits until that is done */
	void *taker;			   /* of messages; NULL: nobody */
	void *incoming, *outgoing; /* messages under way, or NULL */
	void *incoming_taker;	   /* NULL: he has gone meanwhile */
	uint64_t incoming_since;
	Cable cable;
} Vm;

struct Vms
{
	uv_loop_t *loop;
	const char *const *dirs;
	VmsEvents events;
	int watches[MAX_VM_SOCKETS]; /* inotify's, by place in dirs; -1: none */
	bool was_read[MAX_VM_SOCKETS];
	int epoll, inotify;
	uv_poll_t *poll;
	uv_timer_t *tick;
	uint64_t scan_at;
	bool is_full; /* there are more than VMS_MAX, and the log says so */
	uint64_t resets, pauses;
	Vm *all[VMS_MAX];
};

/* What an event of epoll belongs to. */
#define ABOUT_INOTIFY UINT32_MAX
#define ABOUT_CABLE MUX_STREAMS
#define ABOUT(vm, stream) ((uint32_t) (vm)->number << 8 | (uint32_t) (stream))

static void
watch(Vm *vm, int stream, int fd, uint32_t events, int how)
{
	struct epoll_event event = {.events = events, .data.u32 = ABOUT(vm, stream)};

	if (epoll_ctl(vm->vms->epoll, how, fd, &event) != 0)
		log_line(LOG_LEVEL_ERROR, "cannot watch a descriptor", "reason", strerror(errno), NULL);
}

static void
watch_cable(Vm *vm)
{
	watch(vm, ABOUT_CABLE, vm->cable.fd,
		  (vm->is_paused ? 0 : EPOLLIN) | (vm->is_full ? EPOLLOUT : 0), EPOLL_CTL_MOD);
}

/* ---- streams ---- */

static int
stream_opened(void *arg, int stream)
{
	Vm *vm = arg;
	int ends[2];

	vm->allowance -= STREAM_COST;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) != 0)
		return -1;
	watch(vm, stream, ends[0], CABLE_STREAM_EVENTS, EPOLL_CTL_ADD);
	/* what becomes of the other end is seen on ours */
	vm->vms->events.serve(vm->vms->events.arg, vm->name, ends[1]);
	return ends[0];
}

static void
stream_closing(void *arg, int fd)
{
	Vm *vm = arg;

	(void) epoll_ctl(vm->vms->epoll, EPOLL_CTL_DEL, fd, NULL);
}

/* ---- messages ---- */

static uint8_t *
message_expect(void *arg, size_t len)
{
	Vm *vm = arg;
	uint8_t *at = NULL;

	if (vm->taker == NULL)
		return NULL;
	vm->incoming = vm->vms->events.expect(vm->vms->events.arg, vm->taker, len, &at);
	vm->incoming_taker = vm->taker;
	vm->incoming_since = uv_now(vm->vms->loop);
	return vm->incoming != NULL ? at : NULL;
}

static void
message_came(void *arg, bool is_whole)
{
	Vm *vm = arg;
	void *message = vm->incoming;

	vm->incoming = NULL;
	vm->vms->events.come(vm->vms->events.arg, is_whole ? vm->incoming_taker : NULL, message);
}

static bool
message_next(void *arg, const uint8_t **bytes, size_t *len)
{
	Vm *vm = arg;

	if (vm->taker != NULL)
		vm->outgoing = vm->vms->events.next(vm->vms->events.arg, vm->taker, bytes, len);
	return vm->outgoing != NULL;
}

static void
message_sent(void *arg)
{
	Vm *vm = arg;
	void *message = vm->outgoing;

	vm->outgoing = NULL;
	vm->vms->events.sent(vm->vms->events.arg, message);
}

/* ---- connections ---- */

static void
disconnect(Vm *vm)
{
	int fd = vm->cable.fd;

	if (fd < 0)
		return;
	cable_plug(&vm->cable, -1);
	(void) epoll_ctl(vm->vms->epoll, EPOLL_CTL_DEL, fd, NULL);
	close(fd);
	if (vm->is_known)
		log_line(LOG_LEVEL_INFO, "VM is disconnected", "vm", vm->name, NULL);
	vm->is_known = vm->was_synced = false;
}

static void
forget(Vm *vm)
{
	disconnect(vm);
	cable_end(&vm->cable);
	vm->vms->all[vm->number] = NULL;
	free(vm);
}

/* Try again later, each time later than the time before. */
static void
retry_later(Vm *vm)
{
	uint64_t wait = RETRY_MAX_MS;

	if (vm->failures < 9 && (RETRY_MIN_MS << vm->failures) < RETRY_MAX_MS)
		wait = RETRY_MIN_MS << vm->failures++;
	vm->retry_at = uv_now(vm->vms->loop) + wait * 3 / 4 + (uint64_t) random() % (wait / 2);
}

/* It does not work, for this reason, which is said once. */
static void
fail(Vm *vm, LogLevel level, const char *reason)
{
	disconnect(vm);
	if (strcmp(vm->reason, reason) != 0)
		log_line(level, "VM cannot be talked to", "vm", vm->name, "socket", vm->path, "reason",
				 reason, NULL);
	snprintf(vm->reason, sizeof(vm->reason), "%s", reason);
	retry_later(vm);
}

static void
connect_to(Vm *vm)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct stat status;
	int fd;

	/* whoever may write there could also aim us at another's socket */
	if (lstat(vm->path, &status) != 0 || !S_ISSOCK(status.st_mode))
	{
		forget(vm);
		return;
	}
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	memcpy(address.sun_path, vm->path, sizeof(address.sun_path));
	if (fd < 0 || connect(fd, (struct sockaddr *) &address, sizeof(address)) != 0)
	{
		int error = errno;

		if (fd >= 0)
			close(fd);
		/* nobody listens: not yet, or not any more; or others wait there already */
		fail(vm, error == ECONNREFUSED || error == EAGAIN ? LOG_LEVEL_DEBUG : LOG_LEVEL_WARNING,
			 strerror(error));
		return;
	}
	vm->connected_at = uv_now(vm->vms->loop);
	vm->is_full = vm->is_paused = false;
	cable_plug(&vm->cable, fd);
	watch(vm, ABOUT_CABLE, fd, EPOLLIN | EPOLLOUT, EPOLL_CTL_ADD);
	vm->is_full = true;
}

static void
lost(Vm *vm, const char *problem)
{
	bool was_good = uv_now(vm->vms->loop) - vm->connected_at > GOOD_MS;

	if (was_good)
	{
		vm->failures = 0;
		vm->reason[0] = '\0';
	}
	if (problem != NULL)
	{
		vm->vms->resets++;
		fail(vm, LOG_LEVEL_WARNING, problem);
		return;
	}
	disconnect(vm);
	retry_later(vm);
}

/* Send what there is, and see what has become of it all. */
static void
settle(Vm *vm)
{
	bool was_full = vm->is_full;
	bool was_paused = vm->is_paused;

	if (vm->cable.fd < 0 || vm->is_reading)
		return;
	if (!cable_flush(&vm->cable, &vm->is_full))
	{
		lost(vm, NULL);
		return;
	}
	vm->is_paused = vm->allowance < 0;
	vm->vms->pauses += vm->is_paused && !was_paused;
	if (vm->is_full != was_full || vm->is_paused != was_paused)
		watch_cable(vm);
	if (mux_is_synced(vm->cable.mux) != vm->was_synced)
	{
		vm->was_synced = !vm->was_synced;
		vm->allowance -= STREAM_COST;
		if (!vm->is_known)
			log_line(LOG_LEVEL_INFO, "VM is connected", "vm", vm->name, NULL);
		else if (!vm->was_synced)
			log_line(LOG_LEVEL_DEBUG, "VM's runtime begins anew", "vm", vm->name, NULL);
		vm->is_known = true;
	}
}

static void
cable_event(Vm *vm, uint32_t events)
{
	const char *problem;
	long n;

	if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && (!vm->is_paused || !(events & EPOLLIN)))
	{
		vm->is_reading = true;
		n = cable_read(&vm->cable, &problem);
		vm->is_reading = false;
		if (n < 0)
		{
			lost(vm, problem);
			return;
		}
		vm->allowance -=
			(double) n + FRAME_COST * (double) (mux_frames(vm->cable.mux) - vm->frames);
		vm->frames = mux_frames(vm->cable.mux);
	}
	settle(vm);
}

/* ---- directories ---- */

bool
vms_is_socket(int dir, const char *name)
{
	size_t len = strlen(name);
	struct stat status;

	return len > strlen(SUFFIX) && name[0] != '.' &&
		   strcmp(name + len - strlen(SUFFIX), SUFFIX) == 0 &&
		   fstatat(dir, name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISSOCK(status.st_mode);
}

static Vm *
find_vm(Vms *vms, const char *name)
{
	int i;

	for (i = 0; i < VMS_MAX; i++)
	{
		if (vms->all[i] != NULL && strcmp(vms->all[i]->name, name) == 0)
			return vms->all[i];
	}
	return NULL;
}

/* The VM of that socket, made if it is new; NULL if there cannot be one. */
static Vm *
vm_of(Vms *vms, int dir, const char *entry)
{
	static const CableEvents events = {.opened = stream_opened,
									   .closing = stream_closing,
									   .expect = message_expect,
									   .message = message_came,
									   .next = message_next,
									   .sent = message_sent};
	char path[sizeof(((Vm *) NULL)->path)];
	char name[MAX_NAME + 1];
	int name_len = (int) (strlen(entry) - strlen(SUFFIX));
	CableEvents own = events;
	Vm *vm;
	int i, place = -1;

	if ((size_t) snprintf(path, sizeof(path), "%s/%s", vms->dirs[dir], entry) >= sizeof(path) ||
		strlen(PREFIX) + (size_t) name_len > MAX_NAME)
	{
		log_line(LOG_LEVEL_WARNING, "a VM's socket has too long a name", "socket", entry, NULL);
		return NULL;
	}
	for (i = 0; i < VMS_MAX; i++)
	{
		if (vms->all[i] == NULL)
			place = place < 0 ? i : place;
		else if (vms->all[i]->dir == dir && strcmp(vms->all[i]->path, path) == 0)
			return vms->all[i];
	}
	snprintf(name, sizeof(name), PREFIX "%.*s", name_len, entry);
	/* what is for a VM is not for another one of the same name */
	if (find_vm(vms, name) != NULL)
		(void) snprintf(name, sizeof(name), "vm:%d/%.*s", dir, MAX_NAME - 6, entry);
	if (find_vm(vms, name) != NULL)
		return NULL;
	if (place < 0)
	{
		if (!vms->is_full)
			log_line(LOG_LEVEL_ERROR, "there are too many VMs' sockets", "socket", path, NULL);
		vms->is_full = true;
		return NULL;
	}
	vm = calloc(1, sizeof(Vm));
	vm->vms = vms;
	vm->number = place;
	vm->dir = dir;
	memcpy(vm->path, path, sizeof(path));
	memcpy(vm->name, name, sizeof(vm->name));
	vm->retry_at = uv_now(vms->loop);
	vm->allowance = ALLOWANCE;
	vm->allowed_at = uv_now(vms->loop);
	own.arg = vm;
	cable_init(&vm->cable, &own);
	vms->all[place] = vm;
	return vm;
}

static void
scan_dir(Vms *vms, int dir)
{
	DIR *entries = opendir(vms->dirs[dir]);
	const struct dirent *entry;

	if (entries == NULL)
	{
		if (vms->was_read[dir])
			log_line(LOG_LEVEL_ERROR, "VMs' sockets cannot be looked for", "directory",
					 vms->dirs[dir], "reason", strerror(errno), NULL);
		vms->was_read[dir] = false;
		return;
	}
	if (!vms->was_read[dir])
		log_line(LOG_LEVEL_INFO, "watching for VMs' sockets", "directory", vms->dirs[dir], NULL);
	vms->was_read[dir] = true;
	while ((entry = readdir(entries)) != NULL)
	{
		Vm *vm = NULL;

		if (vms_is_socket(dirfd(entries), entry->d_name))
			vm = vm_of(vms, dir, entry->d_name);
		if (vm != NULL)
			vm->is_there = true;
	}
	closedir(entries);
}

/* Find what has come and what has gone. */
static void
scan(Vms *vms)
{
	int i;

	vms->scan_at = uv_now(vms->loop) + SCAN_MS;
	for (i = 0; i < VMS_MAX; i++)
	{
		if (vms->all[i] != NULL)
			vms->all[i]->is_there = false;
	}
	for (i = 0; vms->dirs[i] != NULL; i++)
	{
		/* the directory may be another one of that name by now; the same one keeps its watch */
		vms->watches[i] =
			inotify_add_watch(vms->inotify, vms->dirs[i],
							  IN_CREATE | IN_MOVED_TO | IN_ATTRIB | IN_DELETE_SELF | IN_MOVE_SELF);
		scan_dir(vms, i);
	}
	for (i = 0; i < VMS_MAX; i++)
	{
		Vm *vm = vms->all[i];

		/* a connection outlives its file */
		if (vm != NULL && !vm->is_there && vm->cable.fd < 0)
			forget(vm);
		if (vms->all[i] == NULL)
			vms->is_full = false;
	}
}

/* A socket has come, or another one of that name, or its rights have changed. */
static void
entry_changed(Vms *vms, const struct inotify_event *event)
{
	int i;

	for (i = 0; vms->dirs[i] != NULL; i++)
	{
		int dir;
		Vm *vm;

		if (vms->watches[i] != event->wd)
			continue;
		dir = open(vms->dirs[i], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		vm = dir >= 0 && vms_is_socket(dir, event->name) ? vm_of(vms, i, event->name) : NULL;
		if (dir >= 0)
			close(dir);
		if (vm != NULL && vm->cable.fd < 0)
		{
			vm->failures = 0;
			vm->retry_at = uv_now(vms->loop);
			connect_to(vm);
		}
	}
}

static void
read_inotify(Vms *vms)
{
	_Alignas(struct inotify_event) char buffer[4096];
	ssize_t n = read(vms->inotify, buffer, sizeof(buffer));
	ssize_t at = 0;

	while (at < n)
	{
		const struct inotify_event *event = (const struct inotify_event *) (buffer + at);

		at += (ssize_t) (sizeof(*event) + event->len);
		if (event->len > 0)
			entry_changed(vms, event);
		else if (event->mask & (IN_Q_OVERFLOW | IN_DELETE_SELF | IN_MOVE_SELF | IN_ATTRIB))
			vms->scan_at = 0; /* at the next tick */
	}
}

/* ---- the loop ---- */

static void
on_events(uv_poll_t *poll, int status, int what)
{
	Vms *vms = poll->data;
	int i;

	for (i = 0; i < EVENTS_PER_TURN; i++)
	{
		struct epoll_event event;
		int stream;
		Vm *vm;

		if (epoll_wait(vms->epoll, &event, 1, 0) != 1)
			break;
		if (event.data.u32 == ABOUT_INOTIFY)
		{
			read_inotify(vms);
			continue;
		}
		vm = vms->all[event.data.u32 >> 8];
		stream = event.data.u32 & 0xff;
		if (vm == NULL)
			continue;
		if (stream == ABOUT_CABLE)
			cable_event(vm, event.events);
		else
		{
			cable_stream_event(&vm->cable, stream, event.events);
			settle(vm);
		}
	}
}

static void
on_tick(uv_timer_t *timer)
{
	Vms *vms = timer->data;
	uint64_t now = uv_now(vms->loop);
	int i;

	if (now >= vms->scan_at)
		scan(vms);
	for (i = 0; i < VMS_MAX; i++)
	{
		Vm *vm = vms->all[i];

		if (vm == NULL)
			continue;
		/* more than that it may have been promised, which is to be used soon */
		if (vm->allowance > ALLOWANCE)
			vm->allowance -= (vm->allowance - ALLOWANCE) / PROMISE_TICKS;
		else
		{
			vm->allowance += (double) (now - vm->allowed_at) * RATE / 1000;
			if (vm->allowance > ALLOWANCE)
				vm->allowance = ALLOWANCE;
		}
		vm->allowed_at = now;
		if (vm->incoming != NULL && now - vm->incoming_since > MESSAGE_MS)
			lost(vm, "a message that has no end");
		if (vm->cable.fd >= 0)
			settle(vm);
		else if (now >= vm->retry_at)
			connect_to(vm);
	}
}

Vms *
vms_create(uv_loop_t *loop, const char *const *dirs, const VmsEvents *events)
{
	Vms *vms = calloc(1, sizeof(Vms));
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = ABOUT_INOTIFY};
	int i;

	vms->loop = loop;
	vms->dirs = dirs;
	vms->events = *events;
	if (dirs[0] == NULL)
		return vms;
	for (i = 0; dirs[i] != NULL; i++)
		vms->was_read[i] = true;
	vms->epoll = epoll_create1(EPOLL_CLOEXEC);
	vms->inotify = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	if (vms->inotify >= 0)
		(void) epoll_ctl(vms->epoll, EPOLL_CTL_ADD, vms->inotify, &event);
	else
		log_line(LOG_LEVEL_WARNING, "no inotify: sockets are looked for now and then", "reason",
				 strerror(errno), NULL);
	vms->poll = malloc(sizeof(*vms->poll));
	uv_poll_init(loop, vms->poll, vms->epoll);
	vms->poll->data = vms;
	uv_poll_start(vms->poll, UV_READABLE, on_events);
	vms->tick = malloc(sizeof(*vms->tick));
	uv_timer_init(loop, vms->tick);
	vms->tick->data = vms;
	uv_timer_start(vms->tick, on_tick, 0, TICK_MS);
	return vms;
}

static void
free_handle(uv_handle_t *handle)
{
	free(handle);
}

void
vms_destroy(Vms *vms)
{
	int i;

	if (vms->poll != NULL)
	{
		for (i = 0; i < VMS_MAX; i++)
		{
			if (vms->all[i] != NULL)
				forget(vms->all[i]);
		}
		uv_close((uv_handle_t *) vms->poll, free_handle);
		uv_close((uv_handle_t *) vms->tick, free_handle);
		close(vms->epoll);
		if (vms->inotify >= 0)
			close(vms->inotify);
	}
	free(vms);
}

void
vms_set_taker(Vms *vms, const char *name, void *taker)
{
	Vm *vm = find_vm(vms, name);

	if (vm == NULL || vm->taker == taker)
		return;
	vm->taker = taker;
	vm->incoming_taker = NULL;
	if (taker != NULL)
		settle(vm);
}

void
vms_no_taker(Vms *vms, const char *name, void *taker)
{
	Vm *vm = find_vm(vms, name);

	if (vm != NULL && vm->taker == taker)
		vms_set_taker(vms, name, NULL);
}

void
vms_ask(Vms *vms, const char *name, size_t bytes)
{
	Vm *vm = find_vm(vms, name);

	if (vm == NULL)
		return;
	if (vm->allowance < MAX_EXPECTED)
		vm->allowance += (double) bytes;
	settle(vm);
}

VmsCounts
vms_counts(const Vms *vms)
{
	VmsCounts counts = {.resets = vms->resets, .pauses = vms->pauses};
	int i;

	for (i = 0; i < VMS_MAX; i++)
	{
		if (vms->all[i] == NULL)
			continue;
		counts.vms += mux_is_synced(vms->all[i]->cable.mux);
		counts.streams += (unsigned) mux_streams(vms->all[i]->cable.mux);
	}
	return counts;
}
