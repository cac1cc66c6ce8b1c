/*-------------------------------------------------------------------------
 *
 * command.c
 *		Commands of the session: run once each, remembered for a while.
 *
 * A command has ended when its shell has: processes that it leaves behind may keep
 * its pipes, from which we read as long as we remember it, so that nothing stops
 * them.  Whoever sends the same command again is told of the first one; one that
 * may have run and is not remembered is refused.
 *
 *-------------------------------------------------------------------------
 */
#include "command.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <openssl/crypto.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../common/log.h"
#include "cgroup.h"
#include "child.h"
#include "files.h"
#include "loop.h"
#include "output.h"

#define NUM_BUCKETS 1024
#define MAX_ENDED 4096						/* that are remembered */
#define MAX_LINGERING 1024					/* of these, with pipes that somebody has kept */
#define MAX_UNREAD (1024 * 1024)			/* of a command, that it has not read yet */
#define MAX_INPUT_MEMORY (32 * 1024 * 1024) /* of all of them */
#define MIB (1024 * 1024)
#define DEFAULT_OUTPUT_MEMORY 64 /* MiB */
#define GRACE_MS 2000			 /* from TERM to KILL */
#define LOOK_MS 200				 /* for what a shell has left behind, in that time */
#define EXIT_TIMED_OUT 124
#define MAX_ENV (1024 * 1024) /* env.json */
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

typedef struct Command Command;

typedef struct Stream
{
	Command *command;
	int fd; /* our end of its pipe; -1: closed */
	Output output;
} Stream;

typedef struct Input
{
	int fd;		  /* our end of its pipe; -1: what comes is not wanted any more */
	char *buffer; /* what it has not read yet */
	size_t begin;
	size_t end;
	size_t room;
	int64_t taken; /* so far, of total */
	int64_t total;
} Input;

struct Command
{
	lws_dll2_t list;	/* of those that run, or those that have ended */
	lws_dll2_t telling; /* while its end is not noted */
	lws_dll2_t keeping; /* when it has ended and there is output of it */
	Command *next;		/* of the same bucket */
	char id[COMMAND_ID_LEN + 1];
	bool is_running;
	bool timed_out;
	bool killed;
	bool has_cgroup;
	int exit_code;
	int64_t started; /* boottime_ms() */
	int64_t ended;
	Child child;
	pid_t group;	 /* its process group; 0: there is none of that id any more, or may not be */
	int64_t kill_at; /* when those that TERM has not ended are killed; 0: they are not */
	Timer timer;	 /* for its time, and then for kill_at */
	int64_t lease_ms;
	Timer lease;
	Stream streams[2]; /* stdout, stderr */
	Input input;
	lws_dll2_owner_t calls; /* that wait for it */
};

static const Settings *settings;
static size_t max_memory;
static int max_lingering;
static int64_t forgets_before; /* what has been sent by then may have run without our knowing it */
static Command *buckets[NUM_BUCKETS];
static lws_dll2_owner_t running;
static lws_dll2_owner_t ended; /* by their ends */
static lws_dll2_owner_t kept;  /* of these, those with output */
static lws_dll2_owner_t told;  /* ends that the channel has been told, and that are not noted */
static lws_dll2_owner_t untold;
static int num_lingering;
static size_t input_memory;
static Link *channel;

static const char *user, *home;

/* ---- who is who ---- */

static Command **
bucket_of(const char *id)
{
	uint32_t hash = 2166136261U;

	for (; *id != '\0'; id++)
		hash = (hash ^ (uint8_t) *id) * 16777619U;
	return &buckets[hash % NUM_BUCKETS];
}

static Command *
find(const char *id)
{
	Command *command = *bucket_of(id);

	while (command != NULL && strcmp(command->id, id) != 0)
		command = command->next;
	return command;
}

/* ---- memory of outputs ---- */

/* Let go of some output: of what has ended longest ago, else of the longest one that is growing. */
static bool
release_output(void)
{
	Output *longest = NULL;

	if (kept.head != NULL)
	{
		Command *command = lws_container_of(kept.head, Command, keeping);

		output_drop(&command->streams[0].output);
		output_drop(&command->streams[1].output);
		lws_dll2_remove(&command->keeping);
		return true;
	}
	lws_start_foreach_dll(lws_dll2_t *, at, running.head)
	{
		Command *command = lws_container_of(at, Command, list);
		int i;

		for (i = 0; i < 2; i++)
		{
			if (longest == NULL || output_kept(&command->streams[i].output) > output_kept(longest))
				longest = &command->streams[i].output;
		}
	}
	lws_end_foreach_dll(at);
	return longest != NULL && output_shrink(longest);
}

static void
keep_output(Output *output, const char *bytes, size_t len)
{
	while (output_memory() + OUTPUT_ROOM > max_memory)
	{
		if (!release_output())
		{
			output_lose(output, len);
			return;
		}
	}
	output_append(output, bytes, len);
}

/* ---- calls that wait ---- */

static void on_lease(void *arg);

/* Somebody has asked for it. */
static void
touch(Command *command)
{
	if (command->is_running && command->lease_ms > 0)
		timer_set(&command->lease, command->lease_ms, on_lease, command);
}

void
command_let_go(Call *call)
{
	timer_stop(&call->wait);
	if (call->input != NULL)
	{
		input_memory -= call->input_len;
		free(call->input);
		call->input = NULL;
	}
	if (call->command != NULL)
	{
		lws_dll2_remove(&call->of);
		touch(call->command);
		call->command = NULL;
	}
}

static void
hold(Call *call, Command *command)
{
	call->command = command;
	lws_dll2_add_tail(&call->of, &command->calls);
	touch(command);
}

static json_t *
input_answer(const Command *command)
{
	return json_pack("{s:I}", "taken", (json_int_t) command->input.taken);
}

static void
wait_is_over(void *arg)
{
	Call *call = arg;

	call_answer(call, call->input != NULL ? input_answer(call->command) : NULL);
	call_send();
}

/* Whether what a call waits for is there. */
static bool
has_news(const Call *call)
{
	const Command *command = call->command;
	int i;

	if (!command->is_running)
		return true;
	for (i = 0; i < 2 && call->part; i++)
	{
		if (command->streams[i].output.total > call->offsets[i])
			return true;
	}
	return false;
}

/* Answer those calls whose time has come. */
static void
tell_news(Command *command)
{
	lws_start_foreach_dll_safe(lws_dll2_t *, at, next, command->calls.head)
	{
		Call *call = lws_container_of(at, Call, of);

		if (call->input == NULL && timer_is_set(&call->wait) && has_news(call))
			call_answer(call, NULL);
	}
	lws_end_foreach_dll_safe(at, next);
	call_send();
}

/* ---- input ---- */

static void on_input(void *arg, uint32_t events);

static void
free_buffer(Input *input)
{
	input_memory -= input->room;
	free(input->buffer);
	input->buffer = NULL;
	input->begin = input->end = input->room = 0;
}

/* No more will be read, or all has been: what else comes is taken and thrown away. */
static void
close_input(Command *command)
{
	Input *input = &command->input;

	if (input->fd >= 0)
	{
		loop_unwatch(input->fd);
		close(input->fd);
		input->fd = -1;
	}
	free_buffer(input);
}

/* Hand over as much as goes into the pipe. */
static void
write_input(Command *command)
{
	Input *input = &command->input;

	while (input->fd >= 0 && input->begin < input->end)
	{
		ssize_t n = write(input->fd, input->buffer + input->begin, input->end - input->begin);

		if (n < 0 && errno == EAGAIN)
		{
			loop_watch(input->fd, EPOLLOUT, on_input, command);
			return;
		}
		if (n < 0)
		{
			close_input(command); /* nobody reads any more */
			return;
		}
		input->begin += (size_t) n;
	}
	if (input->fd < 0)
		return;
	loop_unwatch(input->fd);
	if (input->taken == input->total)
		close_input(command);
	else
		free_buffer(input);
}

/* Take bytes over; returns how many there was room for. */
static size_t
take_input(Command *command, const char *bytes, size_t len)
{
	Input *input = &command->input;
	size_t has = input->end - input->begin;

	if (input->fd >= 0)
	{
		if (len > MAX_UNREAD - has)
			len = MAX_UNREAD - has;
		if (len > input->room - input->end)
		{
			size_t room = has + len > 2 * input->room ? has + len : 2 * input->room;
			char *buffer = NULL;

			if (room > MAX_UNREAD)
				room = MAX_UNREAD;
			if (has + len <= input->room)
				memmove(input->buffer, input->buffer + input->begin, has);
			else if (input_memory + room - input->room > MAX_INPUT_MEMORY ||
					 (buffer = malloc(room)) == NULL)
				return 0;
			else
			{
				memcpy(buffer, input->buffer != NULL ? input->buffer + input->begin : "", has);
				free(input->buffer);
				input_memory += room - input->room;
				input->buffer = buffer;
				input->room = room;
			}
			input->begin = 0;
			input->end = has;
		}
		memcpy(input->buffer + input->end, bytes, len);
		input->end += len;
	}
	input->taken += (int64_t) len;
	write_input(command);
	return len;
}

/* Take what an input call has that has not been taken before; true when that was some, or all. */
static bool
take_from(Command *command, int64_t offset, const char *bytes, size_t len)
{
	int64_t known = command->input.taken - offset;

	if (known < 0 || known >= (int64_t) len)
		return true;
	return take_input(command, bytes + known, len - (size_t) known) > 0;
}

/* There may be room: calls that have waited for it come first. */
static void
go_on_with_input(Command *command)
{
	lws_start_foreach_dll_safe(lws_dll2_t *, at, next, command->calls.head)
	{
		Call *call = lws_container_of(at, Call, of);

		if (call->input != NULL && timer_is_set(&call->wait) &&
			take_from(command, call->input_offset, call->input, call->input_len))
			call_answer(call, input_answer(command));
	}
	lws_end_foreach_dll_safe(at, next);
	call_send();
}

static void
on_input(void *arg, uint32_t events)
{
	Command *command = arg;

	write_input(command);
	go_on_with_input(command);
}

static void
input(Call *call, Command *command, const CallFrame *said)
{
	if (said->offset + (int64_t) said->len > command->input.total)
	{
		call_fail(call, CALL_INVALID, "there is more input than was said at the start");
		return;
	}
	hold(call, command);
	if (!take_from(command, said->offset, said->bytes, said->len) && said->wait_ms > 0 &&
		input_memory + said->len <= MAX_INPUT_MEMORY && (call->input = malloc(said->len)) != NULL)
	{
		memcpy(call->input, said->bytes, said->len);
		call->input_len = said->len;
		call->input_offset = said->offset;
		input_memory += said->len;
		timer_set(&call->wait, said->wait_ms, wait_is_over, call);
		return;
	}
	call_answer(call, input_answer(command));
}

/* ---- output ---- */

static void
close_stream(Stream *stream)
{
	const Command *command = stream->command;

	if (stream->fd < 0)
		return;
	loop_unwatch(stream->fd);
	close(stream->fd);
	stream->fd = -1;
	if (!command->is_running && command->streams[0].fd < 0 && command->streams[1].fd < 0)
		num_lingering--;
}

/* Read at most so many bytes, and keep them if they are its own; returns how many there were. */
static size_t
read_stream(Stream *stream, size_t max)
{
	static char buffer[OUTPUT_CHUNK];
	ssize_t n = read(stream->fd, buffer, max < sizeof(buffer) ? max : sizeof(buffer));

	if (n > 0 && stream->command->is_running)
		keep_output(&stream->output, buffer, (size_t) n);
	if (n == 0 || (n < 0 && errno != EAGAIN))
		close_stream(stream);
	return n > 0 ? (size_t) n : 0;
}

static void
on_stream(void *arg, uint32_t events)
{
	Stream *stream = arg;

	if (read_stream(stream, OUTPUT_CHUNK) > 0 && stream->command->is_running)
		tell_news(stream->command);
}

/* What its pipe holds now, and no more: others may go on writing. */
static void
drain(Stream *stream)
{
	int left = 0;
	size_t n = 1;

	if (stream->fd < 0 || ioctl(stream->fd, FIONREAD, &left) != 0)
		return;
	for (; left > 0 && n > 0; left -= (int) n)
		n = read_stream(stream, (size_t) left);
	if (stream->fd >= 0)
		(void) read_stream(stream, 1); /* most likely it is the end */
}

/* ---- the end ---- */

static void
forget(Command *command)
{
	Command **at = bucket_of(command->id);
	int i;

	while (*at != command)
		at = &(*at)->next;
	*at = command->next;
	while (command->calls.head != NULL)
	{
		Call *call = lws_container_of(command->calls.head, Call, of);

		command_let_go(call);
		if (call->answer == NULL)
			call_fail(call, CALL_NO_COMMAND, "it is not remembered any more");
	}
	for (i = 0; i < 2; i++)
	{
		close_stream(&command->streams[i]);
		output_drop(&command->streams[i].output);
	}
	timer_stop(&command->timer);
	if (command->has_cgroup)
		cgroup_abandon(command->id);
	lws_dll2_remove(&command->list);
	lws_dll2_remove(&command->telling);
	lws_dll2_remove(&command->keeping);
	free(command);
}

/* Forget what has ended longest ago, and close its pipes: as much as there is too much of. */
static void
forget_some(void)
{
	while (ended.count > MAX_ENDED)
	{
		Command *command = lws_container_of(ended.head, Command, list);
		/* its first message was on its way for so long at most */
		int64_t sent = command->started + PROTOCOL_CALL_GRACE_MS;

		if (sent > forgets_before)
			forgets_before = sent;
		forget(command);
	}
	lws_start_foreach_dll(lws_dll2_t *, at, ended.head)
	{
		Command *command = lws_container_of(at, Command, list);

		if (num_lingering <= max_lingering)
			break;
		close_stream(&command->streams[0]);
		close_stream(&command->streams[1]);
	}
	lws_end_foreach_dll(at);
}

/* Send a signal to all of its processes; false when we know of none. */
static bool
send_signal(const Command *command, int signal_number)
{
	if (command->has_cgroup && cgroup_signal(command->id, signal_number) > 0)
		return true;
	if (command->group == 0)
		return false;
	return kill(-command->group, signal_number) == 0 ||
		   /* it has not come to making its group */
		   (command->is_running && kill(command->group, signal_number) == 0);
}

/* Kill what TERM has not ended, when it is time. */
static void
look_after(void *arg)
{
	Command *command = arg;
	int64_t left = command->kill_at - boottime_ms();

	/* soon after the last process of the group the kernel may use its id for others */
	if (!command->is_running && command->group != 0 && kill(-command->group, 0) != 0)
		command->group = 0;
	if (left <= 0)
		(void) send_signal(command, SIGKILL);
	if (left <= 0 || (!command->is_running && command->group == 0 && !command->has_cgroup))
	{
		command->kill_at = 0;
		if (!command->is_running)
			command->group = 0;
		return;
	}
	timer_set(&command->timer, left < LOOK_MS ? left : LOOK_MS, look_after, command);
}

static void
end(Command *command)
{
	if (command->kill_at != 0)
		return;
	(void) send_signal(command, SIGTERM);
	command->kill_at = boottime_ms() + GRACE_MS;
	look_after(command);
}

static void
on_timeout(void *arg)
{
	Command *command = arg;

	command->timed_out = true;
	end(command);
}

static void
on_lease(void *arg)
{
	Command *command = arg;

	if (command->calls.head != NULL)
		touch(command);
	else
	{
		command->killed = true;
		end(command);
	}
}

static void
on_exited(void *arg, int code)
{
	Command *command = arg;
	char text[16];
	int i;

	drain(&command->streams[0]);
	drain(&command->streams[1]);
	close_input(command);
	timer_stop(&command->lease);
	command->is_running = false;
	command->ended = boottime_ms();
	command->exit_code = command->timed_out ? EXIT_TIMED_OUT : code;
	for (i = 0; i < 2; i++)
		output_trim(&command->streams[i].output);
	if (command->streams[0].fd >= 0 || command->streams[1].fd >= 0)
		num_lingering++;
	if (command->kill_at != 0)
		look_after(command);
	else
	{
		timer_stop(&command->timer);
		command->group = 0;
	}
	lws_dll2_remove(&command->list);
	lws_dll2_add_tail(&command->list, &ended);
	lws_dll2_add_tail(&command->keeping, &kept);
	lws_dll2_add_tail(&command->telling, &untold);
	snprintf(text, sizeof(text), "%d", command->exit_code);
	log_line(LOG_LEVEL_DEBUG, "command has ended", "command", command->id, "code", text, NULL);
	go_on_with_input(command);
	tell_news(command);
	command_tell();
	/* takes long enough for somebody to wait for it in vain */
	if (command->has_cgroup)
		command->has_cgroup = !cgroup_remove(command->id);
	forget_some();
}

static void
stop(Call *call, Command *command, int signal_number)
{
	bool was_running = command->is_running;

	if (was_running)
		command->killed = true;
	(void) send_signal(command, signal_number);
	call_answer(call, json_pack("{s:b}", "running", was_running));
}

void
command_kill_all(void)
{
	lws_start_foreach_dll(lws_dll2_t *, at, running.head)
	{
		(void) send_signal(lws_container_of(at, Command, list), SIGKILL);
	}
	lws_end_foreach_dll(at);
}

/* ---- the beginning ---- */

/* Whether a program is in our PATH. */
static bool
has_program(const char *name)
{
	const char *at = getenv("PATH");
	char path[PATH_MAX];

	while (at != NULL && *at != '\0')
	{
		size_t len = strcspn(at, ":");

		if ((size_t) snprintf(path, sizeof(path), "%.*s/%s", (int) len, at, name) < sizeof(path) &&
			access(path, X_OK) == 0)
			return true;
		at += len + (at[len] == ':');
	}
	return false;
}

static bool
is_directory(const char *path)
{
	struct stat status;

	return stat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

/* Its whole environment: ours is none of its business. */
static char **
make_environment(const json_t *own, const char *shell)
{
	char path[PATH_MAX];
	char *text;
	size_t len = 0;
	json_t *all, *stored;
	const char *key, *search = getenv("PATH");
	json_t *value;
	char **envp, **at;

	all = json_pack("{s:s, s:s, s:s, s:s, s:s, s:s}", "PATH",
					search != NULL && search[0] != '\0' ? search : DEFAULT_PATH, "HOME", home,
					"USER", user, "LOGNAME", user, "SHELL", shell, "LANG", "C.UTF-8");
	snprintf(path, sizeof(path), "%s/env.json", settings->state_dir);
	text = file_read(path, MAX_ENV, &len);
	stored = text != NULL ? json_loadb(text, len, 0, NULL) : NULL;
	if (text != NULL)
		OPENSSL_cleanse(text, len);
	free(text);
	if (json_is_object(stored))
		(void) json_object_update(all, stored);
	json_decref(stored);
	if (own != NULL)
		(void) json_object_update(all, (json_t *) own);
	envp = at = calloc(json_object_size(all) + 1, sizeof(char *));
	json_object_foreach(all, key, value)
	{
		if (at != NULL && json_is_string(value) &&
			asprintf(at, "%s=%s", key, json_string_value(value)) >= 0)
			at++;
	}
	if (at != NULL)
		*at = NULL;
	json_decref(all);
	return envp;
}

static void
free_environment(char **envp)
{
	char **at;

	for (at = envp; at != NULL && *at != NULL; at++)
	{
		OPENSSL_cleanse(*at, strlen(*at));
		free(*at);
	}
	free(envp);
}

/* Run it, with these ends of its pipes; false, with errno, when it cannot be. */
static bool
spawn(Command *command, const CallFrame *said, const int *files)
{
	bool has_bash = has_program("bash");
	char *text = strndup(said->bytes, said->command_len);
	char *shell[] = {has_bash ? "bash" : "sh", "-lc", text, NULL};
	char *tar[] = {"/proc/self/exe", (char *) said->tar_flag, (char *) said->tar_path,
				   (char *) said->tar_file, NULL};
	ChildSpec spec = {.argv = said->tar_flag != NULL ? tar : shell,
					  .envp = make_environment(said->env, has_bash ? "/bin/bash" : "/bin/sh"),
					  .cwd = said->cwd,
					  .files = {files[0], files[1], files[2]},
					  .is_command = true,
					  .is_quick = said->cwd == NULL};
	bool ok;
	int error;

	if (spec.cwd == NULL)
		spec.cwd = is_directory(settings->work_dir) ? settings->work_dir
				   : is_directory(home)				? home
													: "/";
	spec.cgroup = cgroup_make(command->id);
	command->has_cgroup = spec.cgroup >= 0;
	ok = text != NULL && spec.envp != NULL &&
		 child_spawn(&command->child, &spec, on_exited, command);
	error = errno;
	if (spec.cgroup >= 0)
		close(spec.cgroup);
	if (!ok && command->has_cgroup)
		(void) cgroup_remove(command->id);
	if (text != NULL)
		OPENSSL_cleanse(text, said->command_len);
	free(text);
	free_environment((char **) spec.envp);
	errno = error;
	return ok;
}

/* Make a pipe of which one end is ours, at the place in "files" of the other one; -1 with errno. */
static int
make_pipe(int *files, int which)
{
	int ends[2];
	int ours = which == 0;

	if (pipe2(ends, O_CLOEXEC) != 0)
		return -1;
	files[which] = ends[!ours];
	(void) fcntl(ends[ours], F_SETFL, O_NONBLOCK);
	return ends[ours];
}

/* All that a new command needs; false, with errno. */
static bool
begin(Command *command, const CallFrame *said)
{
	int files[3] = {-1, -1, -1};
	bool ok = true;
	int error, i;

	for (i = 0; i < 2; i++)
	{
		Stream *stream = &command->streams[i];

		stream->command = command;
		output_init(&stream->output, said->max_output);
		stream->fd = make_pipe(files, 1 + i);
		ok = ok && stream->fd >= 0 && loop_watch(stream->fd, EPOLLIN, on_stream, stream);
	}
	command->input.total = said->input_len;
	command->input.fd = ok && said->input_len > 0 ? make_pipe(files, 0) : -1;
	ok = ok && (said->input_len == 0 || command->input.fd >= 0) && spawn(command, said, files);
	error = errno;
	for (i = 0; i < 3; i++)
	{
		if (files[i] >= 0)
			close(files[i]);
	}
	if (!ok)
	{
		close_input(command);
		close_stream(&command->streams[0]);
		close_stream(&command->streams[1]);
	}
	errno = error;
	return ok;
}

static void
output(Call *call, Command *command, const CallFrame *said)
{
	hold(call, command);
	call->offsets[0] = said->stdout_offset;
	call->offsets[1] = said->stderr_offset;
	call->part = said->part;
	if (said->wait_ms == 0 || has_news(call))
		call_answer(call, NULL);
	else
		timer_set(&call->wait, said->wait_ms, wait_is_over, call);
}

static void
start(Call *call, const CallFrame *said)
{
	size_t input_len = said->len - said->command_len;
	Command **bucket = bucket_of(said->command);
	Command *command;

	if (said->age_ms > 0 && boottime_ms() - said->age_ms <= forgets_before)
	{
		call_fail(call, CALL_FORGOTTEN, "it may have run before, which nobody remembers");
		return;
	}
	if (running.count >= (uint32_t) settings->max_commands ||
		input_memory + input_len > MAX_INPUT_MEMORY ||
		(command = calloc(1, sizeof(Command))) == NULL)
	{
		call_fail(call, CALL_BUSY, "too many commands are running");
		return;
	}
	strcpy(command->id, said->command);
	command->started = boottime_ms();
	command->is_running = true;
	if (!begin(command, said))
	{
		call_fail(call,
				  errno == EMFILE || errno == EAGAIN || errno == ENOMEM ? CALL_BUSY : CALL_FAILED,
				  strerror(errno));
		free(command);
		return;
	}
	command->group = command->child.pid;
	command->lease_ms = said->lease_ms;
	command->next = *bucket;
	*bucket = command;
	lws_dll2_add_tail(&command->list, &running);
	log_line(LOG_LEVEL_DEBUG, "command begins", "command", command->id, NULL);
	if (said->timeout_ms > 0)
		timer_set(&command->timer, said->timeout_ms, on_timeout, command);
	(void) take_input(command, said->bytes + said->command_len, input_len);
	output(call, command, said);
}

void
command_call(Call *call, const CallFrame *said)
{
	Command *command = find(said->command);

	if (command == NULL && said->op == OP_START)
		start(call, said);
	else if (command == NULL)
		call_fail(call, CALL_NO_COMMAND, "there is no such command");
	else if (said->op == OP_INPUT)
		input(call, command, said);
	else if (said->op == OP_KILL)
		stop(call, command, said->signal);
	else
		output(call, command, said);
}

/* ---- answers ---- */

json_t *
command_answer(Call *call, size_t *len)
{
	const Command *command = call->command;
	int64_t until = command->is_running ? boottime_ms() : command->ended;
	size_t room = call->part || !command->is_running ? PROTOCOL_MAX_PART : 0;
	json_t *streams[2];
	int i;

	*len = 0;
	for (i = 0; i < 2; i++)
	{
		const Output *said = &command->streams[i].output;

		call->lens[i] = output_find(said, &call->offsets[i], room - *len);
		*len += call->lens[i];
		streams[i] = json_pack("{s:I, s:I, s:I, s:I}", "total", (json_int_t) said->total, "from",
							   (json_int_t) call->offsets[i], "len", (json_int_t) call->lens[i],
							   "lost", (json_int_t) output_lost(said));
	}
	return json_pack(
		"{s:b, s:o, s:b, s:b, s:I, s:o, s:o}", "running", command->is_running, "exit_code",
		command->is_running ? json_null() : json_integer(command->exit_code), "timed_out",
		command->timed_out, "killed", command->killed, "duration_ms",
		(json_int_t) (until - command->started), "stdout", streams[0], "stderr", streams[1]);
}

void
command_copy(const Call *call, char *bytes)
{
	int i;

	for (i = 0; i < 2; i++)
	{
		output_copy(&call->command->streams[i].output, call->offsets[i], bytes, call->lens[i]);
		bytes += call->lens[i];
	}
}

/* ---- what the gateway is told ---- */

void
command_tell(void)
{
	Command *command;
	json_t *frame;
	char *text;

	/* one at a time: heartbeats have not to wait for many */
	if (channel == NULL || untold.head == NULL || !link_is_free(channel))
		return;
	command = lws_container_of(untold.head, Command, telling);
	frame = json_pack(
		"{s:s, s:s, s:i, s:I, s:I, s:I, s:b}", "type", "ended", "command", command->id, "exit_code",
		command->exit_code, "duration_ms", (json_int_t) (command->ended - command->started),
		"stdout_bytes", (json_int_t) command->streams[0].output.total, "stderr_bytes",
		(json_int_t) command->streams[1].output.total, "timed_out", command->timed_out);
	text = json_dumps(frame, JSON_COMPACT);
	if (text != NULL && link_send(channel, text))
	{
		lws_dll2_remove(&command->telling);
		lws_dll2_add_tail(&command->telling, &told);
	}
	free(text);
	json_decref(frame);
}

void
command_set_channel(Link *with)
{
	channel = with;
	if (channel == NULL)
		call_forget_all();
	while (told.tail != NULL)
	{
		lws_dll2_t *last = told.tail;

		lws_dll2_remove(last);
		lws_dll2_add_head(last, &untold);
	}
	command_tell();
}

void
command_noted(const char *id)
{
	Command *command = find(id);

	if (command != NULL)
		lws_dll2_remove(&command->telling);
}

/* ---- setup ---- */

/* Our user, as /etc/passwd has him: what libc has for that would load libraries. */
static void
look_up_user(void)
{
	FILE *file = fopen("/etc/passwd", "re");
	const struct passwd *entry;
	char number[16];

	while (file != NULL && (entry = fgetpwent(file)) != NULL)
	{
		if (entry->pw_uid == geteuid())
		{
			user = strdup(entry->pw_name);
			home = strdup(entry->pw_dir);
			break;
		}
	}
	if (file != NULL)
		fclose(file);
	snprintf(number, sizeof(number), "%u", (unsigned) geteuid());
	if (user == NULL)
		user = geteuid() == 0 ? "root" : strdup(number);
	if (home == NULL || home[0] != '/')
		home = geteuid() == 0 && is_directory("/root") ? "/root" : "/";
}

void
command_setup(const Settings *with, bool is_first)
{
	int64_t mib = with->output_memory;
	struct rlimit files;

	settings = with;
	if (mib == 0)
	{
		int64_t quarter = (int64_t) sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE) / 4 / MIB;

		mib = quarter < 1 ? 1 : quarter < DEFAULT_OUTPUT_MEMORY ? quarter : DEFAULT_OUTPUT_MEMORY;
	}
	max_memory = (size_t) mib * MIB;
	max_lingering = MAX_LINGERING;
	if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < 65536)
	{
		int left = ((int) files.rlim_cur - 3 * settings->max_commands - 64) / 2;

		if (left < max_lingering)
			max_lingering = left > 8 ? left : 8;
	}
	forgets_before = is_first ? INT64_MIN : boottime_ms() + PROTOCOL_CALL_GRACE_MS;
	look_up_user();
	cgroup_setup(settings->pids_limit);
}
