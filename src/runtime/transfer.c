/*-------------------------------------------------------------------------
 *
 * transfer.c
 *		Files of the VM, written and read in parts.
 *
 *-------------------------------------------------------------------------
 */
#include "transfer.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../common/log.h"
#include "files.h"
#include "loop.h"

#define ID_LEN 36 /* of a uuid */
#define PART_PREFIX ".agentvm-"
#define MAX_LINKS 40 /* as the kernel */
#define MAX_UPLOADS 256
#define MAX_FINISHED 256
#define MAX_REMOVED 16
#define IDLE_MS (10 * 60 * 1000)
#define LOOK_MS (60 * 1000)

/* A file that is being written */
typedef struct Upload
{
	char id[ID_LEN + 1];
	char *part; /* where it is gathered; NULL: free place */
	char *target;
	int64_t used; /* boottime_ms() of its last part */
} Upload;

/* A file that is not in its directory any more */
typedef struct Removed
{
	char id[ID_LEN + 1]; /* empty: free place */
	int fd;
	int64_t used;
} Removed;

static const char *work_dir;
static Upload uploads[MAX_UPLOADS];
static char finished[MAX_FINISHED][ID_LEN + 1]; /* whose answers may have been lost; a ring */
static int last_finished;
static Removed removed[MAX_REMOVED];
static Timer idle;

void
transfer_setup(const Settings *settings)
{
	work_dir = settings->work_dir;
}

static json_t *failure(const char *code, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

static json_t *
failure(const char *code, const char *format, ...)
{
	char message[PATH_MAX + 256];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(message, sizeof(message), format, arguments);
	va_end(arguments);
	return json_pack("{s:s, s:s}", "error", code, "message", message);
}

/* What could not be done to a file, and why, as the system says. */
static json_t *
failure_errno(const char *what, const char *path, int error)
{
	const char *code = CALL_FAILED;

	switch (error)
	{
		case ENOENT:
		case ENOTDIR:
			code = CALL_NO_FILE;
			break;
		case EACCES:
		case EPERM:
		case EROFS:
			code = CALL_DENIED;
			break;
		case EISDIR:
		case ENXIO:
		case ENODEV:
			code = CALL_WRONG_FILE;
			break;
		case ENOSPC:
		case EDQUOT:
		case ENOMEM:
			code = CALL_NO_SPACE;
			break;
	}
	return failure(code, "%s %s: %s", what, path, strerror(error));
}

static json_t *
wrong_file(const char *path, mode_t mode)
{
	return failure(CALL_WRONG_FILE, "%s is %s", path,
				   S_ISDIR(mode) ? "a directory" : "no regular file");
}

/* ---- what is remembered ---- */

static Upload *
find_upload(const char *id)
{
	for (int i = 0; i < MAX_UPLOADS; i++)
	{
		if (uploads[i].part != NULL && strcmp(uploads[i].id, id) == 0)
			return &uploads[i];
	}
	return NULL;
}

static Removed *
find_removed(const char *id)
{
	for (int i = 0; i < MAX_REMOVED; i++)
	{
		if (strcmp(removed[i].id, id) == 0)
			return &removed[i];
	}
	return NULL;
}

static bool
is_finished(const char *id)
{
	for (int i = 0; i < MAX_FINISHED; i++)
	{
		if (strcmp(finished[i], id) == 0)
			return true;
	}
	return false;
}

static void
forget_upload(Upload *upload)
{
	free(upload->part);
	free(upload->target);
	memset(upload, 0, sizeof(*upload));
}

static void
forget_removed(Removed *file)
{
	close(file->fd);
	memset(file, 0, sizeof(*file));
}

/* Let go of what nobody has asked for in a while. */
static void
look_for_idle(void *arg)
{
	int64_t now = boottime_ms();
	bool any = false;

	for (int i = 0; i < MAX_UPLOADS; i++)
	{
		if (uploads[i].part == NULL)
			continue;
		if (now - uploads[i].used >= IDLE_MS)
		{
			unlink(uploads[i].part);
			forget_upload(&uploads[i]);
		}
		else
			any = true;
	}
	for (int i = 0; i < MAX_REMOVED; i++)
	{
		if (removed[i].id[0] == '\0')
			continue;
		if (now - removed[i].used >= IDLE_MS)
			forget_removed(&removed[i]);
		else
			any = true;
	}
	if (any)
		timer_set(&idle, LOOK_MS, look_for_idle, NULL);
}

static void
expect_idle(void)
{
	if (!timer_is_set(&idle))
		timer_set(&idle, LOOK_MS, look_for_idle, NULL);
}

static void
keep_removed(const char *id, int fd)
{
	Removed *place = removed;

	for (int i = 1; i < MAX_REMOVED && place->id[0] != '\0'; i++)
	{
		if (removed[i].id[0] == '\0' || removed[i].used < place->used)
			place = &removed[i];
	}
	if (place->id[0] != '\0')
		forget_removed(place);
	strcpy(place->id, id);
	place->fd = fd;
	place->used = boottime_ms();
	expect_idle();
}

/* ---- what a header says ---- */

/* The uuid of the transfer, or NULL: it becomes part of a name. */
static const char *
id_of(const json_t *header)
{
	const char *id = json_string_value(json_object_get(header, "command"));

	return id != NULL && strlen(id) == ID_LEN && strspn(id, "0123456789abcdefABCDEF-") == ID_LEN
			   ? id
			   : NULL;
}

/* A number of bytes, or -1. */
static int64_t
bytes_of(const json_t *header, const char *name)
{
	const json_t *value = json_object_get(header, name);

	return json_is_integer(value) && json_integer_value(value) >= 0 ? json_integer_value(value)
																	: -1;
}

/* The mode, which is octal text, or -1. */
static int
mode_of(const json_t *header)
{
	const char *text = json_string_value(json_object_get(header, "mode"));

	if (text == NULL || text[0] == '\0' || strlen(text) > 5 ||
		strspn(text, "01234567") != strlen(text))
		return -1;
	return strtol(text, NULL, 8) <= 07777 ? (int) strtol(text, NULL, 8) : -1;
}

/* Make an absolute path of the header's; false when it is none that can be. */
static bool
path_of(const json_t *header, char *path)
{
	const json_t *value = json_object_get(header, "path");
	const char *text = json_string_value(value);
	int len;

	if (text == NULL || text[0] == '\0' || strlen(text) != json_string_length(value))
		return false;
	len = text[0] == '/' ? snprintf(path, PATH_MAX, "%s", text)
						 : snprintf(path, PATH_MAX, "%s/%s", work_dir, text);
	return len < PATH_MAX;
}

/* ---- put ---- */

/* Put the file that a symbolic link leads to in its place; 0, or an errno. */
static int
follow(char *path)
{
	for (int i = 0; i < MAX_LINKS; i++)
	{
		char link[PATH_MAX];
		ssize_t len = readlink(path, link, sizeof(link));
		size_t before = (size_t) (strrchr(path, '/') + 1 - path);

		if (len < 0) /* EINVAL: it is no link */
			return errno == EINVAL || errno == ENOENT ? 0 : errno;
		if (link[0] == '/')
			before = 0;
		if (before + (size_t) len >= PATH_MAX)
			return ENAMETOOLONG;
		memcpy(path + before, link, (size_t) len);
		path[before + (size_t) len] = '\0';
	}
	return ELOOP;
}

/* Find out where the file and its parts go; NULL, or what is wrong. */
static json_t *
choose_places(Upload *upload, const char *id, const json_t *header)
{
	const char *name = json_string_value(json_object_get(header, "path"));
	char path[PATH_MAX], part[PATH_MAX];
	const char *last;
	int len, error;

	if (!path_of(header, path))
		return failure(CALL_INVALID, "the path is empty, or too long");
	error = follow(path);
	if (error != 0)
		return failure_errno("write", name, error);
	last = strrchr(path, '/') + 1;
	if (last[0] == '\0' || strcmp(last, ".") == 0 || strcmp(last, "..") == 0)
		return wrong_file(name, S_IFDIR);
	len = snprintf(part, sizeof(part), "%.*s" PART_PREFIX "%s", (int) (last - path), path, id);
	if (len >= (int) sizeof(part))
		return failure_errno("write", name, ENAMETOOLONG);
	upload->part = strdup(part);
	upload->target = strdup(path);
	strcpy(upload->id, id);
	if (upload->part != NULL && upload->target != NULL)
		return NULL;
	forget_upload(upload);
	return failure_errno("write", name, ENOMEM);
}

/* With the first part: the directory is there, and the disk large enough. */
static json_t *
prepare(const Upload *upload, const char *name, int64_t size)
{
	char *last = strrchr(upload->part, '/');
	int error = 0;

	/* a part that is there has taken some of it */
	if (access(upload->part, F_OK) != 0 && file_space(upload->part) < size)
		return failure(CALL_NO_SPACE, "write %s: %s", name, strerror(ENOSPC));
	*last = '\0';
	if (last != upload->part && !make_directories(upload->part, 0755))
		error = errno;
	*last = '/';
	return error != 0 ? failure_errno("make the directory of", name, error) : NULL;
}

/*
 * Open the file in which the parts are gathered, made if "first"; -1, with errno.
 * It may be there from an earlier try, but has to be ours alone.
 */
static int
open_part(const char *path, bool first)
{
	int fd = open(path,
				  O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC | (first ? O_CREAT : 0),
				  0600);
	struct stat status;

	if (fd < 0)
		return -1;
	if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_nlink == 1 &&
		status.st_uid == geteuid())
		return fd;
	close(fd);
	errno = EPERM;
	return -1;
}

/* Write all of it there; 0, or an errno. */
static int
write_at(int fd, const char *bytes, size_t len, int64_t offset)
{
	while (len > 0)
	{
		ssize_t n = pwrite(fd, bytes, len, offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? errno : EIO;
		bytes += n;
		len -= (size_t) n;
		offset += n;
	}
	return 0;
}

/* Something other than a file may be where it goes, and is not to be replaced. */
static json_t *
look_at_target(const Upload *upload, const char *name)
{
	struct stat status;

	if (lstat(upload->target, &status) == 0 && !S_ISREG(status.st_mode) && !S_ISLNK(status.st_mode))
		return wrong_file(name, status.st_mode);
	return NULL;
}

/* Write a part, and with the last one let the file appear; NULL, or what is wrong. */
static json_t *
write_part(Upload *upload, const json_t *header, const char *bytes, size_t len)
{
	const char *name = json_string_value(json_object_get(header, "path"));
	int64_t offset = bytes_of(header, "offset");
	int64_t size = bytes_of(header, "size");
	struct stat status;
	json_t *problem = look_at_target(upload, name);
	int fd, error;

	if (problem == NULL && offset == 0)
		problem = prepare(upload, name, size);
	if (problem != NULL)
		return problem;
	fd = open_part(upload->part, offset == 0);
	if (fd < 0 && errno == ENOENT && offset > 0)
		return failure(CALL_FAILED, "write %s: its beginning is not here any more", name);
	if (fd < 0)
		return failure_errno("write", name, errno);
	/* those between may come in any order; all have been answered before the last one is sent */
	if (fstat(fd, &status) != 0 || (offset + (int64_t) len == size && status.st_size < offset))
	{
		close(fd);
		return failure(CALL_INVALID, "write %s: what comes before byte %" PRId64 " is missing",
					   name, offset);
	}
	error = write_at(fd, bytes, len, offset);
	if (error == 0 && offset + (int64_t) len == size)
	{
		if (fstat(fd, &status) != 0 || status.st_size != size)
			problem = failure(CALL_INVALID, "write %s: its parts do not agree on its size", name);
		else if (fchmod(fd, (mode_t) mode_of(header)) != 0)
			error = errno;
		if (close(fd) != 0 && error == 0)
			error = errno;
		if (error == 0 && problem == NULL && rename(upload->part, upload->target) != 0)
			error = errno;
	}
	else if (close(fd) != 0 && error == 0)
		error = errno;
	if (error != 0 && problem == NULL)
		problem = failure_errno("write", name, error);
	return problem;
}

json_t *
transfer_put(const json_t *header, const char *bytes, size_t len)
{
	const char *id = id_of(header);
	int64_t offset = bytes_of(header, "offset");
	int64_t size = bytes_of(header, "size");
	Upload *upload;
	json_t *problem;

	if (id == NULL || mode_of(header) < 0 || offset < 0 || size < offset ||
		len > PROTOCOL_MAX_CHUNK || (int64_t) len > size - offset)
		return failure(CALL_INVALID, "put: the header makes no sense");
	if (!is_finished(id))
	{
		upload = find_upload(id);
		if (upload == NULL)
		{
			for (upload = uploads; upload < uploads + MAX_UPLOADS && upload->part != NULL; upload++)
				;
			if (upload == uploads + MAX_UPLOADS)
				return failure(CALL_BUSY, "too many files are being written");
			problem = choose_places(upload, id, header);
			if (problem != NULL)
				return problem;
		}
		upload->used = boottime_ms();
		problem = write_part(upload, header, bytes, len);
		if (problem != NULL)
		{
			unlink(upload->part);
			forget_upload(upload);
			return problem;
		}
		if (offset + (int64_t) len == size)
		{
			last_finished = (last_finished + 1) % MAX_FINISHED;
			strcpy(finished[last_finished], id);
			forget_upload(upload);
		}
		else
			expect_idle();
	}
	return json_pack("{s:I, s:b}", "written", (json_int_t) (offset + (int64_t) len), "any_order",
					 1);
}

/* ---- get ---- */

/* Read up to that many bytes from there; how many there were, or -1 with errno. */
static ssize_t
read_at(int fd, char *bytes, size_t len, int64_t offset)
{
	size_t got = 0;

	while (got < len)
	{
		ssize_t n = pread(fd, bytes + got, len - got, offset + (int64_t) got);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		if (n == 0)
			break;
		got += (size_t) n;
	}
	return (ssize_t) got;
}

/*
 * Where a file ends of which "len" bytes were asked for at "offset" and "got" were
 * there.  What the kernel makes up as it is read says 0, or a page, or too much.
 */
static int64_t
size_of(int fd, int64_t told, int64_t offset, int64_t len, int64_t got)
{
	int64_t end = offset + got;
	char more;

	if (got < len)
		return got > 0 || offset < told ? end : told;
	return told > end || read_at(fd, &more, 1, end) != 1 ? (told > end ? told : end) : end + 1;
}

static json_t *
read_part(int fd, const char *name, int64_t offset, size_t length, char **bytes, size_t *len)
{
	struct stat status;
	char version[96];
	json_t *answer = NULL;
	char *content;
	ssize_t got;
	int error;

	if (fstat(fd, &status) != 0)
		return failure_errno("read", name, errno);
	if (!S_ISREG(status.st_mode))
		return wrong_file(name, status.st_mode);
	content = malloc(TRANSFER_ROOM + length);
	if (content == NULL)
		return failure_errno("read", name, ENOMEM);
	got = read_at(fd, content + TRANSFER_ROOM, length, offset);
	error = errno;
	if (got >= 0)
	{
		snprintf(version, sizeof(version), "%jx-%jx-%jx-%jx.%09ld", (uintmax_t) status.st_dev,
				 (uintmax_t) status.st_ino, (uintmax_t) status.st_size,
				 (uintmax_t) status.st_mtim.tv_sec, status.st_mtim.tv_nsec);
		answer = json_pack(
			"{s:I, s:s}", "size",
			(json_int_t) size_of(fd, status.st_size, offset, (int64_t) length, (int64_t) got),
			"version", version);
	}
	if (answer == NULL)
	{
		free(content);
		return got < 0 ? failure_errno("read", name, error) : NULL;
	}
	*bytes = content;
	*len = (size_t) got;
	return answer;
}

json_t *
transfer_get(const json_t *header, char **bytes, size_t *len)
{
	const char *id = id_of(header);
	const char *name = json_string_value(json_object_get(header, "path"));
	int64_t offset = bytes_of(header, "offset");
	int64_t length = bytes_of(header, "length");
	char path[PATH_MAX];
	Removed *kept;
	json_t *answer;
	int fd;

	*bytes = NULL;
	*len = 0;
	if (id == NULL || offset < 0 || length < 0 || length > PROTOCOL_MAX_CHUNK ||
		offset > INT64_MAX - length - 1)
		return failure(CALL_INVALID, "get: the header makes no sense");
	if (!path_of(header, path))
		return failure(CALL_INVALID, "the path is empty, or too long");
	kept = find_removed(id);
	if (kept != NULL)
	{
		kept->used = boottime_ms();
		return read_part(kept->fd, name, offset, (size_t) length, bytes, len);
	}
	/* not to wait for the writer of a pipe */
	fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (fd < 0)
		return failure_errno("open", name, errno);
	answer = read_part(fd, name, offset, (size_t) length, bytes, len);
	if (*bytes == NULL || !json_is_true(json_object_get(header, "remove")))
	{
		close(fd);
		return answer;
	}
	if (unlink(path) != 0)
		log_line(LOG_LEVEL_WARNING, "cannot remove a file", "file", path, "reason", strerror(errno),
				 NULL);
	keep_removed(id, fd);
	return answer;
}
