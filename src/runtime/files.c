/*-------------------------------------------------------------------------
 *
 * files.c
 *		Small files, read and replaced whole.
 *
 *-------------------------------------------------------------------------
 */
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "../common/log.h"

char *
file_read(const char *path, size_t max, size_t *len)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	char *content;
	size_t got = 0;
	ssize_t n = -1;

	if (fd < 0)
		return NULL;
	content = malloc(max + 2);
	while (content != NULL && got <= max && (n = read(fd, content + got, max + 1 - got)) > 0)
		got += (size_t) n;
	close(fd);
	if (content == NULL || n < 0 || got > max)
	{
		if (got > max)
			errno = EFBIG;
		free(content);
		return NULL;
	}
	content[got] = '\0';
	if (len != NULL)
		*len = got;
	return content;
}

static bool
write_all(int fd, const char *content, size_t len)
{
	while (len > 0)
	{
		ssize_t n = write(fd, content, len);

		if (n < 0)
			return false;
		content += n;
		len -= (size_t) n;
	}
	return true;
}

static bool
sync_directory(const char *path)
{
	char directory[PATH_MAX];
	char *slash;
	bool ok;
	int fd;

	snprintf(directory, sizeof(directory), "%s", path);
	slash = strrchr(directory, '/');
	if (slash == NULL)
		strcpy(directory, ".");
	else
		slash[slash == directory] = '\0';
	fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ok = fsync(fd) == 0;
	close(fd);
	return ok;
}

bool
file_replace(const char *path, const char *content, size_t len, bool sync)
{
	char new[PATH_MAX];
	int fd;
	bool ok;

	snprintf(new, sizeof(new), "%s.new", path);
	unlink(new); /* of a crash, perhaps with another mode or owner */
	fd = open(new, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	ok = fd >= 0 && write_all(fd, content, len) && (!sync || fsync(fd) == 0);
	if (fd >= 0 && close(fd) != 0)
		ok = false;
	ok = ok && rename(new, path) == 0 && (!sync || sync_directory(path));
	if (!ok)
		log_line(LOG_LEVEL_ERROR, "cannot write a file", "file", path, "reason", strerror(errno),
				 NULL);
	return ok;
}

void
file_wipe(int fd)
{
	static const char zeros[4096];
	struct stat status;
	off_t left;

	if (fstat(fd, &status) != 0 || lseek(fd, 0, SEEK_SET) != 0)
		return;
	for (left = status.st_size; left > 0; left -= (off_t) sizeof(zeros))
	{
		if (!write_all(fd, zeros, left < (off_t) sizeof(zeros) ? (size_t) left : sizeof(zeros)))
			return;
	}
	(void) fsync(fd);
}

bool
make_directories(const char *path, unsigned mode)
{
	char directory[PATH_MAX];
	char *c;

	if (strlen(path) >= sizeof(directory))
	{
		errno = ENAMETOOLONG;
		return false;
	}
	strcpy(directory, path);
	for (c = directory + 1; *c != '\0'; c++)
	{
		if (*c != '/')
			continue;
		*c = '\0';
		(void) mkdir(directory, mode);
		*c = '/';
	}
	return mkdir(directory, mode) == 0 || errno == EEXIST;
}

int64_t
file_space(const char *path)
{
	char nearest[PATH_MAX];
	struct statvfs status;
	uint64_t free_blocks;
	char *slash;

	snprintf(nearest, sizeof(nearest), "%s", path);
	while (statvfs(nearest, &status) != 0)
	{
		if (errno != ENOENT || strcmp(nearest, "/") == 0 || strcmp(nearest, ".") == 0)
			return INT64_MAX;
		slash = strrchr(nearest, '/');
		if (slash == NULL)
			strcpy(nearest, ".");
		else
			slash[slash == nearest] = '\0';
	}
	free_blocks = geteuid() == 0 ? status.f_bfree : status.f_bavail;
	if (status.f_blocks == 0 || status.f_frsize == 0 ||
		free_blocks > (uint64_t) INT64_MAX / status.f_frsize)
		return INT64_MAX;
	return (int64_t) (free_blocks * status.f_frsize);
}
