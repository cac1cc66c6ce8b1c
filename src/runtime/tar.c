/*-------------------------------------------------------------------------
 *
 * tar.c
 *		Directories as tar archives.
 *
 * An archive is read twice: once to see that nothing in it leads out of the
 * directory, and then to unpack it by libarchive, whose own checks are on, too.
 *
 * No name that is unpacked passes through a symbolic link, so ".." at the beginning
 * of a link's target goes up from where its name says that it is; and since ".." is
 * nowhere else in a target, no chain of links leads further up than its first steps do.
 *
 *-------------------------------------------------------------------------
 */
#include "tar.h"

#include <archive.h>
#include <archive_entry.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "files.h"

#define TAR_FAILED 1
#define MAX_ENTRIES 1000000 /* of an archive that is unpacked: their names are in memory */
#define BLOCK (64 * 1024)	/* read and written at once */

/* An archive being looked at */
typedef struct Look
{
	int directory; /* that it goes into; -1: that is not there */
	json_t *seen;  /* by name: a symbolic link's target, true for a directory, false for a file */
	int entries;
	int64_t size;  /* of the files' content */
	int64_t space; /* that there is for it */
} Look;

/* An archive being written */
typedef struct Writer
{
	struct archive *archive;
	struct archive_entry_linkresolver *links;
	int directory;
	struct stat file;	 /* the archive itself */
	char path[PATH_MAX]; /* where we are; empty: the directory itself */
} Writer;

/* Say what is wrong with a name, which may have any characters, and return the code. */
static int complain(int code, const char *name, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

static int
complain(int code, const char *name, const char *format, ...)
{
	va_list arguments;

	fputs("agentvm-runtime: ", stderr);
	if (name[0] == '\0')
		name = "."; /* the directory itself */
	for (; *name != '\0'; name++)
		fputc(iscntrl((unsigned char) *name) ? '?' : *name, stderr);
	fputs(": ", stderr);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	return code;
}

static int
complain_errno(const char *name, int error)
{
	return complain(error == ENOSPC || error == EDQUOT ? TAR_NO_SPACE : TAR_FAILED, name, "%s",
					strerror(error));
}

/* What libarchive says of a failure; "code" unless it is for want of space. */
static int
complain_archive(int code, const char *name, struct archive *archive)
{
	int error = archive_errno(archive);
	const char *words = archive_error_string(archive);

	if (error == ENOSPC || error == EDQUOT)
		return complain_errno(name, error);
	return complain(code, name, "%s", words != NULL ? words : "out of memory");
}

/* ---- extract: what is safe ---- */

/*
 * Take out of a name what has no meaning: "./a//b/" is "a/b", and "." is empty.
 * Returns TAR_DONE, or complains.
 */
static int
clean_name(const char *name, char *clean)
{
	size_t len = 0;
	const char *part, *end;

	if (name[0] == '/')
		return complain(TAR_UNSAFE, name, "is absolute");
	for (part = name; *part != '\0'; part = end)
	{
		end = strchrnul(part, '/');
		if (end - part == 2 && memcmp(part, "..", 2) == 0)
			return complain(TAR_UNSAFE, name, "leads out of the directory");
		if (end > part && !(end - part == 1 && *part == '.'))
		{
			if (len + 1 + (size_t) (end - part) >= PATH_MAX)
				return complain(TAR_FAILED, name, "%s", strerror(ENAMETOOLONG));
			if (len > 0)
				clean[len++] = '/';
			memcpy(clean + len, part, (size_t) (end - part));
			len += (size_t) (end - part);
		}
		if (*end == '/')
			end++;
	}
	clean[len] = '\0';
	return TAR_DONE;
}

/* What is at a name when the archive has come so far: as in Look.seen; NULL: out of memory. */
static json_t *
kind_of(Look *look, const char *name)
{
	json_t *kind = json_object_get(look->seen, name);
	struct stat status;

	if (kind != NULL)
		return kind;
	kind = json_true();
	if (look->directory >= 0 && fstatat(look->directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0 &&
		!S_ISDIR(status.st_mode))
	{
		/* of whose target nothing is known */
		kind = S_ISLNK(status.st_mode) ? json_string("") : json_false();
	}
	return json_object_set_new_nocheck(look->seen, name, kind) == 0 ? kind : NULL;
}

/* No directory on the way to a name is a symbolic link. */
static int
check_way(Look *look, char *name)
{
	for (char *slash = strchr(name, '/'); slash != NULL; slash = strchr(slash + 1, '/'))
	{
		json_t *kind;

		*slash = '\0';
		kind = kind_of(look, name);
		*slash = '/';
		if (kind == NULL)
			return complain_errno(name, ENOMEM);
		if (json_is_string(kind))
			return complain(TAR_UNSAFE, name, "passes through a symbolic link");
	}
	return TAR_DONE;
}

/* A symbolic link of that name leads nowhere outside. */
static int
check_target(const char *name, const char *target)
{
	int depth = 0;
	bool down = false;
	const char *part, *end;

	if (target == NULL || target[0] == '\0')
		return complain(TAR_UNSAFE, name, "is a symbolic link to nothing");
	if (target[0] == '/')
		return complain(TAR_UNSAFE, name, "is a symbolic link to an absolute path");
	for (part = name; (part = strchr(part, '/')) != NULL; part++)
		depth++;
	for (part = target; *part != '\0'; part = end)
	{
		end = strchrnul(part, '/');
		if (end - part == 2 && memcmp(part, "..", 2) == 0)
		{
			if (down || --depth < 0)
				return complain(TAR_UNSAFE, name,
								"is a symbolic link that leads, or may lead, out of the directory");
		}
		else if (end > part && !(end - part == 1 && *part == '.'))
			down = true;
		if (*end == '/')
			end++;
	}
	return TAR_DONE;
}

/* What a hard link is then; NULL, having complained, with *code. */
static json_t *
check_hard_link(Look *look, const char *name, const char *target, int *code)
{
	char clean[PATH_MAX];
	json_t *kind;

	*code = clean_name(target, clean);
	if (*code == TAR_DONE)
		*code = check_way(look, clean);
	if (*code != TAR_DONE)
		return NULL;
	kind = kind_of(look, clean);
	if (kind == NULL)
		*code = complain_errno(name, ENOMEM);
	else if (json_is_string(kind) && json_string_length(kind) == 0)
		*code = complain(TAR_UNSAFE, name, "is a hard link to a symbolic link of the directory");
	else if (json_is_string(kind)) /* from another place, it leads somewhere else */
		*code = check_target(name, json_string_value(kind));
	return *code == TAR_DONE ? json_incref(kind) : NULL;
}

/* Look at an entry; its name, cleaned, is put in its place. */
static int
check_entry(Look *look, struct archive_entry *entry)
{
	const char *name = archive_entry_pathname(entry);
	/* in this order, as libarchive goes by them when it unpacks */
	const char *hard_link = archive_entry_hardlink(entry);
	const char *symlink = archive_entry_symlink(entry);
	mode_t type = archive_entry_filetype(entry);
	char clean[PATH_MAX];
	json_t *kind = NULL;
	int code;

	if (name == NULL)
		return complain(TAR_NO_ARCHIVE, "archive", "has an entry without a name");
	code = clean_name(name, clean);
	if (code == TAR_DONE)
		code = check_way(look, clean);
	if (code != TAR_DONE)
		return code;
	if (hard_link != NULL)
		kind = check_hard_link(look, clean, hard_link, &code);
	else if (symlink != NULL || type == AE_IFLNK)
	{
		code = check_target(clean, symlink);
		kind = json_string_nocheck(symlink);
	}
	else if (type == AE_IFDIR || type == AE_IFREG)
		kind = json_boolean(type == AE_IFDIR);
	else
		code = complain(TAR_UNSAFE, name, "is a device, a pipe or a socket");
	if (code == TAR_DONE && clean[0] == '\0' && (hard_link != NULL || type != AE_IFDIR))
		code = complain(TAR_UNSAFE, name, "would take the place of the directory");
	if (code != TAR_DONE)
		json_decref(kind);
	else if (++look->entries > MAX_ENTRIES)
		code = complain(TAR_FAILED, "archive", "has more than %d entries", MAX_ENTRIES);
	else if (json_object_set_new_nocheck(look->seen, clean, kind) != 0)
		code = complain_errno(name, ENOMEM);
	archive_entry_copy_pathname(entry, clean);
	return code;
}

/* ---- extract ---- */

static struct archive *
open_archive(int fd, int *code)
{
	struct archive *archive = archive_read_new();

	*code = TAR_DONE;
	if (archive == NULL || lseek(fd, 0, SEEK_SET) != 0)
		*code = complain_errno("archive", archive == NULL ? ENOMEM : errno);
	else if (archive_read_support_format_tar(archive) != ARCHIVE_OK ||
			 archive_read_support_filter_gzip(archive) != ARCHIVE_OK)
		*code = complain_archive(TAR_FAILED, "archive", archive);
	else if (archive_read_open_fd(archive, fd, BLOCK) != ARCHIVE_OK)
		*code = complain_archive(TAR_NO_ARCHIVE, "archive", archive);
	if (*code == TAR_DONE)
		return archive;
	archive_read_free(archive);
	return NULL;
}

/*
 * Take the content of an entry, into the directory unless "disk" is NULL, and add
 * up its size, holes excepted.
 */
static int
take_content(struct archive *archive, struct archive *disk, const char *name, Look *look)
{
	const void *bytes;
	size_t len;
	la_int64_t offset;
	int found;

	while ((found = archive_read_data_block(archive, &bytes, &len, &offset)) >= ARCHIVE_WARN &&
		   found != ARCHIVE_EOF)
	{
		look->size += (int64_t) len;
		if (disk == NULL && look->size > look->space)
			return complain_errno(name, ENOSPC);
		if (disk != NULL && archive_write_data_block(disk, bytes, len, offset) < ARCHIVE_OK)
			return complain_archive(TAR_FAILED, name, disk);
	}
	return found == ARCHIVE_EOF ? TAR_DONE : complain_archive(TAR_NO_ARCHIVE, name, archive);
}

/* Make what an entry says; of what could not be kept, a word is enough. */
static int
take_entry(struct archive *archive, struct archive *disk, struct archive_entry *entry, Look *look)
{
	const char *name = archive_entry_pathname(entry);
	int done = archive_write_header(disk, entry);
	int code;

	if (done == ARCHIVE_OK && archive_entry_size(entry) > 0)
	{
		code = take_content(archive, disk, name, look);
		if (code != TAR_DONE)
			return code;
	}
	if (done == ARCHIVE_OK)
		done = archive_write_finish_entry(disk);
	if (done == ARCHIVE_OK)
		return TAR_DONE;
	code = complain_archive(TAR_FAILED, name, disk);
	return done < ARCHIVE_WARN ? code : TAR_DONE;
}

/* Go through the archive: look at all of it, or with "disk" unpack it. */
static int
go_through(int fd, struct archive *disk, Look *look)
{
	int code;
	struct archive *archive = open_archive(fd, &code);
	struct archive_entry *entry;
	int found = ARCHIVE_EOF;

	look->seen = json_object();
	if (look->seen == NULL)
		code = complain_errno("archive", ENOMEM);
	/* a warning is of names that are no UTF-8, or of what we do not look at */
	while (code == TAR_DONE &&
		   (found = archive_read_next_header(archive, &entry)) >= ARCHIVE_WARN &&
		   found != ARCHIVE_EOF)
	{
		code = check_entry(look, entry);
		if (code != TAR_DONE)
			break;
		if (disk == NULL)
			code = take_content(archive, NULL, archive_entry_pathname(entry), look);
		else if (archive_entry_pathname(entry)[0] != '\0')
			code = take_entry(archive, disk, entry, look);
	}
	if (code == TAR_DONE && found != ARCHIVE_EOF)
		code = complain_archive(TAR_NO_ARCHIVE, "archive", archive);
	json_decref(look->seen);
	archive_read_free(archive);
	return code;
}

/* Make the directory and unpack into it what has been found safe. */
static int
unpack(const char *directory, int fd, Look *look)
{
	struct archive *disk;
	int code;

	if (!make_directories(directory, 0755) || chdir(directory) != 0)
		return complain_errno(directory, errno);
	disk = archive_write_disk_new();
	if (disk == NULL)
		return complain_errno(directory, ENOMEM);
	(void) archive_write_disk_set_options(
		disk, ARCHIVE_EXTRACT_PERM | ARCHIVE_EXTRACT_TIME | ARCHIVE_EXTRACT_SECURE_SYMLINKS |
				  ARCHIVE_EXTRACT_SECURE_NODOTDOT | ARCHIVE_EXTRACT_SECURE_NOABSOLUTEPATHS);
	code = go_through(fd, disk, look);
	if (archive_write_close(disk) < ARCHIVE_WARN && code == TAR_DONE)
		code = complain_archive(TAR_FAILED, directory, disk);
	archive_write_free(disk);
	return code;
}

int
tar_extract(const char *directory, const char *file)
{
	int fd = open(file, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	int error = errno;
	Look look = {.directory = -1, .space = file_space(directory)};
	int code;

	(void) unlink(file);
	if (fd < 0)
		return complain_errno(file, error);
	look.directory = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (look.directory < 0 && errno != ENOENT)
		code = errno == ENOTDIR ? complain(TAR_NO_DIRECTORY, directory, "%s", strerror(errno))
								: complain_errno(directory, errno);
	else
		code = go_through(fd, NULL, &look);
	if (code == TAR_DONE)
		code = unpack(directory, fd, &look);
	if (look.directory >= 0)
		close(look.directory);
	close(fd);
	return code;
}

/* ---- create ---- */

/* Write a file's content as far as the entry says: it may have grown or shrunk since. */
static int
put_content(Writer *writer, int fd, int64_t size)
{
	static char bytes[BLOCK];
	int64_t left = size;

	while (left > 0)
	{
		ssize_t n = read(fd, bytes, left < BLOCK ? (size_t) left : BLOCK);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return complain_errno(writer->path, errno);
		if (n == 0) /* libarchive fills it with zeros */
		{
			(void) complain(0, writer->path, "became shorter as it was read");
			break;
		}
		if (archive_write_data(writer->archive, bytes, (size_t) n) < 0)
			return complain_archive(TAR_FAILED, writer->path, writer->archive);
		left -= n;
	}
	return TAR_DONE;
}

static int
put_entry(Writer *writer, struct archive_entry *entry, int fd)
{
	struct archive_entry *later = NULL; /* no format of tar has any */
	int code = TAR_DONE;

	archive_entry_linkify(writer->links, &entry, &later);
	if (archive_write_header(writer->archive, entry) < ARCHIVE_WARN)
		code = complain_archive(TAR_FAILED, writer->path, writer->archive);
	else if (fd >= 0 && archive_entry_size(entry) > 0)
		code = put_content(writer, fd, archive_entry_size(entry));
	archive_entry_free(entry);
	return code;
}

static int put_directory(Writer *writer);

/* Write what is at writer->path, and below it. */
static int
put_path(Writer *writer)
{
	char target[PATH_MAX];
	struct archive_entry *entry;
	struct stat status;
	ssize_t len;
	int fd = -1;
	int code;

	if (fstatat(writer->directory, writer->path, &status, AT_SYMLINK_NOFOLLOW) != 0)
		return errno == ENOENT ? TAR_DONE : complain_errno(writer->path, errno);
	if (status.st_dev == writer->file.st_dev && status.st_ino == writer->file.st_ino)
		return TAR_DONE;
	if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode) && !S_ISLNK(status.st_mode))
		return complain(TAR_DONE, writer->path, "is left out: a device, a pipe or a socket");
	if (S_ISREG(status.st_mode))
	{
		fd = openat(writer->directory, writer->path,
					O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
		if (fd < 0)
			return errno == ENOENT ? TAR_DONE : complain_errno(writer->path, errno);
		if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode))
		{
			close(fd);
			return complain(TAR_FAILED, writer->path, "became something else as it was read");
		}
	}
	entry = archive_entry_new();
	if (entry == NULL)
		code = complain_errno(writer->path, ENOMEM);
	else
	{
		archive_entry_copy_stat(entry, &status);
		archive_entry_copy_pathname(entry, writer->path);
		len = S_ISLNK(status.st_mode)
				  ? readlinkat(writer->directory, writer->path, target, sizeof(target) - 1)
				  : 0;
		if (len >= 0)
		{
			target[len] = '\0';
			if (len > 0)
				archive_entry_copy_symlink(entry, target);
			code = put_entry(writer, entry, fd);
		}
		else
		{
			code = complain_errno(writer->path, errno);
			archive_entry_free(entry);
		}
	}
	if (fd >= 0)
		close(fd);
	return code == TAR_DONE && S_ISDIR(status.st_mode) ? put_directory(writer) : code;
}

static int
not_itself(const struct dirent *found)
{
	return strcmp(found->d_name, ".") != 0 && strcmp(found->d_name, "..") != 0;
}

/* Write what is in the directory at writer->path, in order of names. */
static int
put_directory(Writer *writer)
{
	size_t len = strlen(writer->path);
	struct dirent **found;
	int code = TAR_DONE;
	int n =
		scandirat(writer->directory, len > 0 ? writer->path : ".", &found, not_itself, alphasort);

	if (n < 0)
		return errno == ENOENT ? TAR_DONE : complain_errno(writer->path, errno);
	for (int i = 0; i < n; i++)
	{
		if (code == TAR_DONE)
		{
			int more = snprintf(writer->path + len, sizeof(writer->path) - len, "%s%s",
								len > 0 ? "/" : "", found[i]->d_name);

			code = (size_t) more < sizeof(writer->path) - len
					   ? put_path(writer)
					   : complain_errno(writer->path, ENAMETOOLONG);
			writer->path[len] = '\0';
		}
		free(found[i]);
	}
	free(found);
	return code;
}

static const char *unfinished;

/* Whoever ends us does not want half an archive. */
static void
on_terminate(int signal_number)
{
	(void) unlink(unfinished);
	_exit(128 + signal_number);
}

static int
write_archive(Writer *writer, int fd)
{
	int code;

	writer->archive = archive_write_new();
	writer->links = archive_entry_linkresolver_new();
	if (writer->archive == NULL || writer->links == NULL)
		code = complain_errno("archive", ENOMEM);
	else if (archive_write_set_format_gnutar(writer->archive) != ARCHIVE_OK ||
			 archive_write_set_bytes_per_block(writer->archive, BLOCK) != ARCHIVE_OK ||
			 archive_write_set_bytes_in_last_block(writer->archive, 1) != ARCHIVE_OK ||
			 archive_write_open_fd(writer->archive, fd) != ARCHIVE_OK)
		code = complain_archive(TAR_FAILED, "archive", writer->archive);
	else
	{
		archive_entry_linkresolver_set_strategy(writer->links, archive_format(writer->archive));
		code = put_directory(writer);
		if (code == TAR_DONE && archive_write_close(writer->archive) != ARCHIVE_OK)
			code = complain_archive(TAR_FAILED, "archive", writer->archive);
	}
	if (code != TAR_DONE && writer->archive != NULL)
		(void) archive_write_fail(writer->archive); /* or it would write an end */
	archive_write_free(writer->archive);
	archive_entry_linkresolver_free(writer->links);
	return code;
}

int
tar_create(const char *directory, const char *file)
{
	Writer writer = {.directory = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
	int fd, code;

	if (writer.directory < 0)
		return errno == ENOENT || errno == ENOTDIR
				   ? complain(TAR_NO_DIRECTORY, directory, "%s", strerror(errno))
				   : complain_errno(directory, errno);
	fd = open(file, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
	{
		code = complain_errno(file, errno);
		close(writer.directory);
		return code;
	}
	unfinished = file;
	signal(SIGTERM, on_terminate);
	signal(SIGINT, on_terminate);
	signal(SIGHUP, on_terminate);
	code = fstat(fd, &writer.file) == 0 ? write_archive(&writer, fd) : complain_errno(file, errno);
	if (close(fd) != 0 && code == TAR_DONE)
		code = complain_errno(file, errno);
	if (code != TAR_DONE)
		(void) unlink(file);
	close(writer.directory);
	return code;
}
