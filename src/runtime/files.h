/*-------------------------------------------------------------------------
 *
 * files.h
 *		Small files, read and replaced whole.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_FILES_H
#define RUNTIME_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * The content of a file of at most "max" bytes, malloc'ed and ended by a NUL;
 * *len may be NULL.  Returns NULL, with errno, where it cannot be had.
 */
extern char *file_read(const char *path, size_t max, size_t *len);

/*
 * Replace a file, mode 0600, or make it: readers and crashes see the old content
 * or the new one.  With "sync" it is on the disk when this returns.  Returns
 * false, having logged why.
 */
extern bool file_replace(const char *path, const char *content, size_t len, bool sync);

/* Overwrite with zeros what an open file holds, as far as the file system lets us. */
extern void file_wipe(int fd);

/* mkdir -p; new directories get the mode.  Returns false, with errno. */
extern bool make_directories(const char *path, unsigned mode);

/*
 * How many bytes can be written to the file system of a path, or of the nearest
 * directory on the way to it that exists; INT64_MAX where it does not say.
 */
extern int64_t file_space(const char *path);

#endif /* RUNTIME_FILES_H */
