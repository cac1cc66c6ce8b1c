/*-------------------------------------------------------------------------
 *
 * transfer.h
 *		Files of the VM, written and read in parts: the calls "put" and "get" of
 *		protocol.h.
 *
 * What is known of a transfer is on the disk, or else only saves work: after a
 * restart of the runtime one goes on where it was.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_TRANSFER_H
#define RUNTIME_TRANSFER_H

#include <jansson.h>
#include <stddef.h>

#include "settings.h"

/* Before the others, once; the settings are kept.  Paths that are not absolute are in work_dir. */
extern void transfer_setup(const Settings *settings);

/*
 * Write a part of a file: header {command, path, mode, size, offset} and its bytes.
 *
 * Parts come in order, each as often as may be; "command" (a uuid) names the
 * transfer.  They are gathered in .agentvm-COMMAND beside the file, mode 0600,
 * which takes the file's place with the last of them: readers see the old file or
 * the new one.  Directories on the way are made, mode 0755.  Where the path is a
 * symbolic link, the file that it leads to is replaced, or made there.  The new
 * file belongs to the runtime's user and has the mode that is told.  It is
 * written, but not forced to the disk.
 *
 * A transfer that fails, or of which no part has come for 10 minutes, leaves
 * nothing; those of before a restart are not known, and their parts stay.
 *
 * Returns {written}, in bytes, or {error, message}: a new reference, or NULL
 * without memory.  CALL_INVALID: the header makes no sense, or a part is missing;
 * CALL_WRONG_FILE: there is something other than a file; CALL_NO_SPACE: told
 * with the first part, if it is clear by then; CALL_BUSY: too many are under way;
 * CALL_NO_FILE, CALL_DENIED, CALL_FAILED as the system says.
 */
extern json_t *transfer_put(const json_t *header, const char *bytes, size_t len);

/*
 * Read a part of a file: header {command, path, offset, length, remove}.
 *
 * Returns {size, version}, and in *bytes, malloc'ed, after TRANSFER_ROOM bytes for
 * the caller's use the *len of its bytes that there are; or {error, message}, with *bytes NULL and *len 0.  A new reference,
 * or NULL without memory.  "size", in bytes, is where the file ends if its end is
 * known: for files that only the kernel makes up (in /proc, say) it is what has
 * been read, and one more when that is not all.  Another version is another file
 * or one that has been changed.  With "remove" the file is gone after this; the
 * same call within 10 minutes still has its bytes.
 *
 * CALL_INVALID: the header makes no sense; CALL_WRONG_FILE: no regular file;
 * others as with transfer_put().
 */
#define TRANSFER_ROOM 512
extern json_t *transfer_get(const json_t *header, char **bytes, size_t *len);

#endif /* RUNTIME_TRANSFER_H */
