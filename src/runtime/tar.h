/*-------------------------------------------------------------------------
 *
 * tar.h
 *		Directories as tar archives: agentvm-runtime --tar-extract and --tar-create.
 *
 * Each is a process of its own, which does nothing else: its working directory
 * is not where it was when these return.  What is wrong is said on stderr.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_TAR_H
#define RUNTIME_TAR_H

/* exit codes; 1: anything else */
#define TAR_DONE 0
#define TAR_NO_DIRECTORY 2
#define TAR_UNSAFE 3
#define TAR_NO_ARCHIVE 4
#define TAR_NO_SPACE 5

/*
 * Unpack a tar archive (old, ustar, pax or GNU; by itself or in gzip) into a
 * directory, which is made if need be, mode 0755.  The file is removed in any case.
 *
 * All of the archive is looked at before anything is made.  It is TAR_UNSAFE, and
 * nothing is changed, if it has a name that is absolute or has ".."; a name that
 * passes through a symbolic link, of the archive or of the directory; a symbolic
 * link that is absolute, goes up past the directory, or goes up after it has gone
 * down; a hard link to what is not in the directory; or anything other than
 * files, directories and links.  TAR_NO_ARCHIVE: no tar archive, or a damaged one.
 * TAR_NO_SPACE: its files are larger than what is free, or that ended on the way.
 *
 * Modes and times of modification are kept; all belongs to the user that runs
 * this, and what the archive says of owners counts only for set-user-ID and
 * set-group-ID, which are kept where they match.  Files that are in the way are
 * replaced; the directory itself keeps its mode.
 */
extern int tar_extract(const char *directory, const char *file);

/*
 * Write what is in a directory into a new file, mode 0600, as a GNU tar archive: it
 * takes any name as it is, which pax does not, and every tar reads it.  Names are
 * relative to the directory, which has no entry itself.  Files, directories, links
 * of both kinds; times in seconds; holes of files become zeros.  Left out are
 * sockets, pipes and devices, what goes away meanwhile, and the file itself.  There is
 * no file if it fails.
 */
extern int tar_create(const char *directory, const char *file);

#endif /* RUNTIME_TAR_H */
