/*-------------------------------------------------------------------------
 *
 * commands.h
 *		Commands in VMs: one in one VM, or the same in many at once.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SESSION_COMMANDS_H
#define AGENTVM_SESSION_COMMANDS_H

#include "postgres.h"

#include "session/call.h"
#include "session/content.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

typedef struct Exec Exec;

/* What is to be run; all of it has to stay. */
typedef struct ExecCommand
{
	const char *text; /* UTF-8, or NULL with tar */
	size_t len;
	const char *tar;	  /* JSON, in place of a text: {"extract" or "create", "file"} */
	const char *cwd;	  /* or NULL */
	const char *env;	  /* JSON, or NULL */
	size_t env_len;		  /* bytes */
	const Content *input; /* or NULL */
	int64 timeout_ms;
	bool detached;	   /* only begin it: it does not hang on us */
	const char *audit; /* JSON */
} ExecCommand;

/* What came of it in one VM. */
typedef struct ExecResult
{
	const pg_uuid_t *session;	/* NULL where none was named */
	const CallFailure *failure; /* or NULL, and the rest is set */
	int exit_code;
	StringInfoData streams[2]; /* stdout, stderr: bytes as they came */
	int64 duration_ms;
	bool timed_out;
	bool truncated; /* something is missing in a stream */
} ExecResult;

/*
 * The JSON that tells the log what is about to be run.  "secrets" is env, or NULL: its values
 * are not in there, also where they are in the text.  Palloc'd.
 */
extern char *exec_audit(Oid role, const ExecCommand *command, const char *text, Jsonb *secrets);

/*
 * Check a text that is to be run, and make it the command's.  Raises 22023 when it is empty,
 * AV012 when it is too long, 22021 where it has no form in UTF-8.
 */
extern void exec_set_text(ExecCommand *command, const char *text);

/*
 * The commands of a statement, by "role", in a new context below CurrentMemoryContext.
 * When that goes, what is under way is given up and the gateway ends it; it has to be one
 * that goes with an error.
 */
extern Exec *exec_create(Oid role, const ExecCommand *command);
extern void exec_destroy(Exec *exec);

/*
 * Run the command in the VM of a session, too; NULL: a result that says that this is none.
 * Its own id is put into *command_id, if that is not NULL.
 */
extern void exec_add(Exec *exec, const pg_uuid_t *session, pg_uuid_t *command_id);

/* In place of exec_add(): wait for one that has been begun by exec_start(). */
extern void exec_add_begun(Exec *exec, const pg_uuid_t *session, const pg_uuid_t *command_id);

/* Do all that can be done without waiting.  Needs a transaction. */
extern void exec_advance(Exec *exec);

/*
 * The next one that has ended, valid until the next call, or NULL; *all_done is set when
 * there will be no more.
 */
extern ExecResult *exec_finished(Exec *exec, bool *all_done);

/* Wait until there may be something to do.  Interruptible. */
extern void exec_sleep(Exec *exec);

/* exec_advance() and exec_sleep() until there is a result; NULL when there are no more. */
extern ExecResult *exec_next(Exec *exec);

#endif /* AGENTVM_SESSION_COMMANDS_H */
