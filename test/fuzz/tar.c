/*-------------------------------------------------------------------------
 *
 * tar.c
 *		libFuzzer on --tar-extract: whatever the archive, nothing leads out.
 *
 * The input is an archive, in which headers get the checksum that they should have.
 * It is unpacked into a directory that is emptied for each; beside that there is a
 * directory that must stay as it is.
 *
 *-------------------------------------------------------------------------
 */
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../src/runtime/tar.h"

#define TAR_BLOCK 512
#define CHECKSUM 148 /* where it is in a header, and eight bytes long */

extern int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
extern int LLVMFuzzerInitialize(int *argc, char ***argv);

static char base[PATH_MAX];	  /* of all that there is here */
static char inside[PATH_MAX]; /* that archives go into */
static int here;			  /* where libFuzzer is */

/* never compiled away */
#define CHECK(condition)                                                                           \
	do                                                                                             \
	{                                                                                              \
		if (!(condition))                                                                          \
		{                                                                                          \
			dprintf(STDERR_FILENO, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                 \
			abort();                                                                               \
		}                                                                                          \
	} while (0)

static int
remove_one(const char *path, const struct stat *status, int type, struct FTW *where)
{
	return remove(path);
}

/* before what is in them */
static int
open_directory(const char *path, const struct stat *status, int type, struct FTW *where)
{
	return S_ISDIR(status->st_mode) ? chmod(path, 0700) : 0;
}

static void
remove_all(const char *path)
{
	while (nftw(path, open_directory, 16, FTW_PHYS) == 0 && access(path, F_OK) == 0)
		(void) nftw(path, remove_one, 16, FTW_PHYS | FTW_DEPTH);
}

static void
at_exit(void)
{
	CHECK(chdir("/") == 0);
	remove_all(base);
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	int fd;

	CHECK(snprintf(base, sizeof(base), "%s/agentvm-fuzz.XXXXXX",
				   getenv("TMPDIR") != NULL ? getenv("TMPDIR") : "/tmp") < (int) sizeof(base));
	CHECK(mkdtemp(base) != NULL && realpath(base, inside) != NULL && strcpy(base, inside) != NULL);
	CHECK(snprintf(inside, sizeof(inside), "%s/in", base) < (int) sizeof(inside));
	CHECK((here = open(".", O_RDONLY | O_DIRECTORY)) >= 0 && chdir(base) == 0);
	CHECK(mkdir("outside", 0755) == 0);
	fd = open("outside/file", O_WRONLY | O_CREAT | O_EXCL, 0644);
	CHECK(fd >= 0 && write(fd, "outside", 7) == 7 && close(fd) == 0);
	CHECK(chmod("outside", 0555) == 0 && fchdir(here) == 0);
	CHECK(atexit(at_exit) == 0);
	/* not what it complains of; the checkers write to the descriptor itself */
	stderr = fopen("/dev/null", "w");
	CHECK(stderr != NULL);
	return 0;
}

/* What has been unpacked is of the kinds that may be, and links lead to nothing elsewhere. */
static int
check_one(const char *path, const struct stat *status, int type, struct FTW *where)
{
	char leads_to[PATH_MAX];

	CHECK(S_ISREG(status->st_mode) || S_ISDIR(status->st_mode) || S_ISLNK(status->st_mode));
	if (S_ISLNK(status->st_mode) && realpath(path, leads_to) != NULL)
		CHECK(strncmp(leads_to, inside, strlen(inside)) == 0 &&
			  (leads_to[strlen(inside)] == '\0' || leads_to[strlen(inside)] == '/'));
	return 0;
}

/* Nothing has changed that is not in the directory. */
static void
check_outside(void)
{
	char content[16];
	struct stat status;
	int fd = open("outside/file", O_RDONLY | O_NOFOLLOW);

	CHECK(fd >= 0 && read(fd, content, sizeof(content)) == 7 && memcmp(content, "outside", 7) == 0);
	CHECK(fstat(fd, &status) == 0 && status.st_nlink == 1 && S_ISREG(status.st_mode) &&
		  (status.st_mode & 07777) == 0644);
	close(fd);
	/* a directory's links: itself, its name, and its directories */
	CHECK(stat("outside", &status) == 0 && (status.st_mode & 07777) == 0555);
	CHECK(stat(".", &status) == 0 &&
		  (status.st_nlink == (access("in", F_OK) == 0 ? 4 : 3) || status.st_nlink == 1));
	CHECK(access("archive", F_OK) != 0 && errno == ENOENT);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *archive = malloc(size + 1);
	int fd, code;

	CHECK(chdir(base) == 0);
	fd = open("archive", O_WRONLY | O_CREAT | O_EXCL, 0600);
	CHECK(archive != NULL && fd >= 0);
	memcpy(archive, data, size);
	for (size_t at = 0; at + TAR_BLOCK <= size; at += TAR_BLOCK)
	{
		unsigned sum = 0;
		char text[8];

		if (memcmp(archive + at + 257, "ustar", 5) != 0)
			continue;
		memset(archive + at + CHECKSUM, ' ', 8);
		for (int i = 0; i < TAR_BLOCK; i++)
			sum += archive[at + i];
		snprintf(text, sizeof(text), "%06o", sum);
		memcpy(archive + at + CHECKSUM, text, 7);
	}
	CHECK(write(fd, archive, size) == (ssize_t) size && close(fd) == 0);
	free(archive);

	code = tar_extract("in", "archive");
	CHECK(chdir(base) == 0);
	CHECK((code != TAR_UNSAFE && code != TAR_NO_ARCHIVE) || access("in", F_OK) != 0);
	check_outside();
	if (access("in", F_OK) == 0)
	{
		(void) nftw("in", open_directory, 16, FTW_PHYS);
		CHECK(nftw("in", check_one, 16, FTW_PHYS) == 0);
		remove_all("in");
	}
	CHECK(fchdir(here) == 0);
	return 0;
}
