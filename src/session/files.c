/*-------------------------------------------------------------------------
 *
 * files.c
 *		Files in and out of VMs, in chunks; directories as tar archives.
 *
 * A transfer has an id, as a command has.  The gateway logs its beginning with the first
 * chunk and its end with the last, which are under way alone; several of those between
 * are, where chunks come quickly, and a runtime takes them in any order.
 *
 * An archive travels as a file in the VM's /tmp, which a program of the runtime's
 * packs or unpacks.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "db.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "protocol.h"
#include "session/call.h"
#include "session/commands.h"
#include "session/content.h"
#include "session/session.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_upload);
PG_FUNCTION_INFO_V1(agentvm_download);
PG_FUNCTION_INFO_V1(agentvm_upload_tar);
PG_FUNCTION_INFO_V1(agentvm_download_tar);

#define MAX_PATH_LEN 4096 /* bytes: what Linux takes as a path, with a NUL */
#define MAX_RESTARTS 3	  /* of a download whose file changes meanwhile */
#define FIRST_CHUNK (256 * 1024)
#define QUICK_MS 300	   /* a chunk that takes no longer may be followed by a larger one */
#define SLOW_MS 1500	   /* and one that takes longer by a smaller one */
#define MAX_AT_ONCE 4	   /* chunks under way */
#define TAR_TIMEOUT_S 3600 /* for packing or unpacking */
#define MAX_TAR_WORDS 1000 /* bytes that are shown of what that says */

/* What the runtime's program for archives exits with. */
#define TAR_DONE 0
#define TAR_NO_DIRECTORY 2
#define TAR_UNSAFE 3
#define TAR_NO_ARCHIVE 4
#define TAR_NO_SPACE 5

typedef struct Transfer
{
	Calls *calls;
	Call *call;
	pg_uuid_t id;
	const char *path;	 /* of the file */
	const char *shown;	 /* what the caller asked for */
	const char *words;	 /* for errors: what is done */
	const char *audit;	 /* JSON; NULL once it has been sent */
	MemoryContext chunk; /* of the chunk under way */
	int64 chunk_len;	 /* of the next one */
} Transfer;

/* A chunk under way, where several are. */
typedef struct Slot
{
	Call *call;
	MemoryContext context;
	StringInfoData header;
	int64 offset; /* in what is asked for */
	int64 len;	  /* 0: none is under way */
} Slot;

/* ---- arguments ---- */

static void
no_null(FunctionCallInfo fcinfo, int argument, const char *name)
{
	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("%s must not be null", name)));
}

static char *
path_argument(FunctionCallInfo fcinfo, bool must_be_absolute)
{
	char *path;

	no_null(fcinfo, 1, "path");
	path = text_to_cstring(PG_GETARG_TEXT_PP(1));
	if (path[0] == '\0' || strlen(path) >= MAX_PATH_LEN)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("argument \"path\" must have 1 to %d bytes", MAX_PATH_LEN - 1),
						errdetail("It has %zu.", strlen(path))));
	if (must_be_absolute && path[0] != '/')
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("path of a directory must begin with /, but is \"%s\"", path)));
	return path;
}

static char *
mode_argument(FunctionCallInfo fcinfo)
{
	char *mode;
	size_t len;

	no_null(fcinfo, 3, "mode");
	mode = text_to_cstring(PG_GETARG_TEXT_PP(3));
	len = strlen(mode);
	if (len < 1 || len > 5 || strspn(mode, "01234567") != len || strtol(mode, NULL, 8) > 07777)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("mode \"%s\" is not the octal form of permissions", mode),
						errhint("Examples are 0644 and 0755.")));
	return mode;
}

/* ---- transfers ---- */

/* "way" is upload or download; "size" is -1 where it is not known yet. */
static void
begin_transfer(Transfer *transfer, const pg_uuid_t *session, const char *way, const char *path,
			   const char *shown, int64 size)
{
	StringInfoData audit;

	transfer->calls = calls_create(GetUserId());
	transfer->words = psprintf("%s \"%s\"", way, shown);
	transfer->call = call_create(transfer->calls, session, transfer->words, PG_INT64_MAX, NULL);
	session_make_id(&transfer->id, GetCurrentTimestamp());
	transfer->path = path;
	transfer->shown = shown;
	transfer->chunk =
		AllocSetContextCreate(CurrentMemoryContext, "agentvm chunk", ALLOCSET_DEFAULT_SIZES);
	transfer->chunk_len = FIRST_CHUNK;
	initStringInfo(&audit);
	appendStringInfo(&audit, "{\"kind\": \"%s\"", way);
	header_text(&audit, "role", GetUserNameFromId(GetUserId(), false));
	header_text(&audit, "path", shown);
	if (size >= 0)
		header_int(&audit, "size", size);
	if (path != shown)
		header_json(&audit, "tar", "true");
	appendStringInfoChar(&audit, '}');
	transfer->audit = audit.data;
}

static void
end_transfer(Transfer *transfer)
{
	MemoryContextDelete(transfer->chunk);
	calls_destroy(transfer->calls);
}

/* How long a chunk has taken tells how large the next one should be: a link may be slow. */
static void
choose_chunk_len(Transfer *transfer, int64 took_ms)
{
	if (took_ms <= QUICK_MS)
		transfer->chunk_len = Min(2 * transfer->chunk_len, PROTOCOL_MAX_CHUNK);
	else if (took_ms > SLOW_MS)
		transfer->chunk_len = Max(transfer->chunk_len / 2, FIRST_CHUNK / 4);
}

/* What the header of each chunk has. */
static void
begin_chunk(const Transfer *transfer, StringInfo header, const char *op, int64 offset)
{
	initStringInfo(header);
	header_begin(header, op, &transfer->id);
	header_text(header, "path", transfer->path);
	header_json(header, "owned", "true");
	header_int(header, "offset", offset);
}

/* The answer to the next chunk, whose header is complete but for what the log needs; in the chunk's context. */
static const Answer *
ask_chunk(Transfer *transfer, StringInfo header, const char *bytes, int64 len, bool last,
		  bool much_comes)
{
	CallMessage message = {transfer->id, header, bytes, len, -1};
	int64 began = call_now_ms();
	const Answer *answer;

	if (last)
		header_json(header, "last", "true");
	if (transfer->audit != NULL)
	{
		header_json(header, "audit", transfer->audit);
		message.tells_age = true;
	}
	message.much_comes = much_comes;
	answer = call_ask(transfer->call, &message);
	transfer->audit = NULL;
	choose_chunk_len(transfer, call_now_ms() - began);
	return answer;
}

static void
protest(Transfer *transfer)
{
	call_protest(transfer->call);
	call_raise(call_failure(transfer->call));
}

/* ---- several chunks at once ---- */

/* How chunks are sent or asked for, and their answers taken in; false: no more of them. */
typedef struct Way
{
	void (*send)(Transfer *transfer, Slot *slot, void *arg);
	bool (*take)(Transfer *transfer, const Slot *slot, const Answer *answer, void *arg);
	void *arg;
} Way;

/* Send a slot's chunk, whose header is complete. */
static void
send_slot(Transfer *transfer, Slot *slot, const char *bytes, bool much_comes)
{
	CallMessage message = {transfer->id,  &slot->header,
						   bytes,		  bytes != NULL ? slot->len : 0,
						   .wait_ms = -1, .much_comes = much_comes};

	call_send(slot->call, &message);
}

/* Whether several chunks may be under way: all of the largest size then. */
static bool
is_quick(const Transfer *transfer)
{
	return transfer->chunk_len > FIRST_CHUNK;
}

/*
 * Move what lies between "from" and "to"; false: no more was wanted.  All chunks have been
 * answered then, since the gateway would take one that is given up for the end of the
 * transfer.
 */
static bool
move_between(Transfer *transfer, int64 from, int64 to, const Way *way)
{
	Slot slots[MAX_AT_ONCE] = {0};
	int64 chunk_len = is_quick(transfer) ? PROTOCOL_MAX_CHUNK : transfer->chunk_len;
	int most = is_quick(transfer) ? MAX_AT_ONCE : 1;
	int under_way = 0;
	bool goes_on = true;
	int i;

	for (i = 0; i < most; i++)
	{
		slots[i].call = call_create(transfer->calls, call_session(transfer->call), transfer->words,
									PG_INT64_MAX, &slots[i]);
		slots[i].context =
			AllocSetContextCreate(transfer->chunk, "agentvm slot", ALLOCSET_SMALL_SIZES);
	}
	for (;;)
	{
		Call *call;

		for (i = 0; i < most && goes_on && from < to; i++)
		{
			MemoryContext old;

			if (slots[i].len > 0)
				continue;
			slots[i].offset = from;
			slots[i].len = Min(to - from, chunk_len);
			from += slots[i].len;
			under_way++;
			MemoryContextReset(slots[i].context);
			old = MemoryContextSwitchTo(slots[i].context);
			way->send(transfer, &slots[i], way->arg);
			MemoryContextSwitchTo(old);
		}
		if (under_way == 0)
			break;
		calls_advance(transfer->calls);
		while ((call = calls_answered(transfer->calls)) != NULL)
		{
			Slot *slot = call_arg(call);

			if (call_failure(call) != NULL)
				call_raise(call_failure(call));
			goes_on = way->take(transfer, slot, call_answer(call), way->arg) && goes_on;
			slot->len = 0;
			under_way--;
		}
		if (under_way > 0 && (under_way == most || from >= to || !goes_on))
			calls_sleep(transfer->calls, PG_INT64_MAX);
	}
	for (i = 0; i < most; i++)
	{
		call_destroy(slots[i].call);
		MemoryContextDelete(slots[i].context);
	}
	return goes_on;
}

/* ---- to the VM ---- */

typedef struct Upload
{
	const Content *content;
	const char *mode;
} Upload;

static void
begin_put(const Transfer *transfer, StringInfo header, const Upload *upload, int64 offset)
{
	begin_chunk(transfer, header, "put", offset);
	header_text(header, "mode", upload->mode);
	header_int(header, "size", upload->content->len);
}

static void
put_slot(Transfer *transfer, Slot *slot, void *arg)
{
	const Upload *upload = arg;

	begin_put(transfer, &slot->header, upload, slot->offset);
	send_slot(transfer, slot, content_read(upload->content, slot->offset, slot->len), false);
}

/* The chunk that goes so far has been written. */
static void
check_written(Transfer *transfer, const Answer *answer, int64 end)
{
	if (answer->written != end)
		protest(transfer);
}

static bool
slot_was_put(Transfer *transfer, const Slot *slot, const Answer *answer, void *arg)
{
	check_written(transfer, answer, slot->offset + slot->len);
	return true;
}

/* A chunk by itself; in the chunk's context, which is reset first. */
static const Answer *
put_chunk(Transfer *transfer, const Upload *upload, int64 offset, int64 len)
{
	MemoryContext old;
	StringInfoData header;
	const Answer *answer;

	MemoryContextReset(transfer->chunk);
	old = MemoryContextSwitchTo(transfer->chunk);
	begin_put(transfer, &header, upload, offset);
	answer = ask_chunk(transfer, &header, content_read(upload->content, offset, len), len,
					   offset + len == upload->content->len, false);
	check_written(transfer, answer, offset + len);
	MemoryContextSwitchTo(old);
	return answer;
}

static void
put_file(Transfer *transfer, const Content *content, const char *mode)
{
	Upload upload = {content, mode};
	Way way = {put_slot, slot_was_put, &upload};
	int64 offset = 0;

	do
	{
		int64 len = Min(content->len - offset, transfer->chunk_len);
		bool any_order = put_chunk(transfer, &upload, offset, len)->any_order == 1;
		int64 last;

		offset += len;
		last = content->len - Min(content->len - offset, transfer->chunk_len);
		if (any_order && is_quick(transfer) && offset < last)
		{
			(void) move_between(transfer, offset, last, &way);
			offset = last;
		}
	} while (offset < content->len);
}

/* ---- from the VM ---- */

typedef struct Download
{
	int64 file_offset; /* of the content */
	char *content;
	const char *version; /* of the file */
	int64 size;
} Download;

static void
begin_get(const Transfer *transfer, StringInfo header, int64 offset, int64 len)
{
	begin_chunk(transfer, header, "get", offset);
	header_int(header, "length", len);
}

/* Whether this can be a chunk from there of that length. */
static bool
is_chunk(const Answer *answer, int64 offset, int64 len)
{
	return answer->version != NULL && answer->size >= 0 && answer->len <= len &&
		   (answer->len == 0 || offset + (int64) answer->len <= answer->size);
}

/* A chunk of a file; in the chunk's context, which is reset first. */
static const Answer *
get_chunk(Transfer *transfer, int64 offset, int64 len, bool last, bool remove)
{
	MemoryContext old;
	StringInfoData header;
	const Answer *answer;

	MemoryContextReset(transfer->chunk);
	old = MemoryContextSwitchTo(transfer->chunk);
	begin_get(transfer, &header, offset, len);
	if (remove)
		header_json(&header, "remove", "true");
	answer = ask_chunk(transfer, &header, NULL, 0, last, len > 0);
	if (!is_chunk(answer, offset, len))
		protest(transfer);
	MemoryContextSwitchTo(old);
	return answer;
}

static void
get_slot(Transfer *transfer, Slot *slot, void *arg)
{
	const Download *download = arg;

	begin_get(transfer, &slot->header, download->file_offset + slot->offset, slot->len);
	send_slot(transfer, slot, NULL, true);
}

/* False: the file has changed meanwhile. */
static bool
slot_was_got(Transfer *transfer, const Slot *slot, const Answer *answer, void *arg)
{
	const Download *download = arg;

	if (!is_chunk(answer, download->file_offset + slot->offset, slot->len))
		protest(transfer);
	if (strcmp(answer->version, download->version) != 0 || answer->size != download->size)
		return false;
	if ((int64) answer->len != slot->len)
		protest(transfer);
	memcpy(download->content + slot->offset, answer->bytes, slot->len);
	return true;
}

static void
too_large(Transfer *transfer, int64 size, int64 limit, bool remove)
{
	/* so that the log has its end, and no archive stays behind */
	(void) get_chunk(transfer, 0, 0, true, remove);
	ereport(ERROR,
			(errcode(AVM_OVER_LIMIT),
			 errmsg("\"%s\" has %lld bytes, but at most %lld can be downloaded at once",
					transfer->shown, (long long) size, (long long) limit),
			 remove ? errdetail("That is the size of its archive.") : 0,
			 remove ? errhint("The limit is agentvm.max_file_size.")
					: errhint("Read it in parts, with agentvm.download(session_id, path, offset, "
							  "length). The limit is agentvm.max_file_size.")));
}

/*
 * One try to read "length" bytes (-1: all) from "offset" on.  NULL: the file has
 * changed meanwhile.
 */
static bytea *
try_file(Transfer *transfer, int64 offset, int64 length, bool remove)
{
	int64 limit = avm_max_file_size_kib * INT64CONST(1024);
	bytea *content = NULL;
	char *version = NULL;
	int64 want = length < 0 ? transfer->chunk_len : Min(length, transfer->chunk_len);
	int64 size = 0;
	int64 wanted = length;
	int64 got = 0;
	bool last = length >= 0 && length <= want;

	for (;;)
	{
		const Answer *answer = get_chunk(transfer, offset + got, want, last, remove && last);

		if (content == NULL)
		{
			version = pstrdup(answer->version);
			size = answer->size;
			wanted = Max(0, length < 0 ? size - offset : Min(length, size - offset));
			if (wanted > limit)
				too_large(transfer, size, limit, remove);
			content = palloc(VARHDRSZ + wanted);
		}
		else if (strcmp(version, answer->version) != 0 || size != answer->size)
		{
			pfree(content);
			return NULL;
		}
		if (answer->len > wanted - got || (answer->len == 0 && want > 0 && got < wanted))
			protest(transfer);
		if (answer->len > 0)
			memcpy(VARDATA(content) + got, answer->bytes, answer->len);
		got += answer->len;
		if (got == wanted && last)
			break;
		want = Min(wanted - got, transfer->chunk_len);
		if (wanted - got > want)
		{
			/* all but the last one */
			int64 to = wanted - want;

			Download download = {offset, VARDATA(content), version, size};
			Way way = {get_slot, slot_was_got, &download};

			if (!move_between(transfer, got, to, &way))
			{
				pfree(content);
				return NULL;
			}
			got = to;
			want = wanted - got;
		}
		/* the end has to be told, too, of a file that one chunk holds */
		last = true;
	}
	SET_VARSIZE(content, VARHDRSZ + wanted);
	return content;
}

static bytea *
get_file(Transfer *transfer, int64 offset, int64 length, bool remove)
{
	bytea *content = NULL;
	int tries;

	for (tries = 0; content == NULL && tries <= MAX_RESTARTS; tries++)
		content = try_file(transfer, offset, length, remove);
	if (content == NULL)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("file \"%s\" changes while it is read", transfer->shown),
						errhint("Make a copy of it first, with agentvm.exec().")));
	return content;
}

Datum
agentvm_upload(PG_FUNCTION_ARGS)
{
	pg_uuid_t *session = session_id_argument(fcinfo, 0);
	char *path = path_argument(fcinfo, false);
	char *mode = mode_argument(fcinfo);
	Transfer transfer;
	Content content;

	no_null(fcinfo, 2, "content");
	content_open(&content, PG_GETARG_DATUM(2), "content");
	begin_transfer(&transfer, session, "upload", path, path, content.len);
	put_file(&transfer, &content, mode);
	end_transfer(&transfer);
	PG_RETURN_INT64(content.len);
}

static int64
number_argument(FunctionCallInfo fcinfo, int argument, const char *name)
{
	int64 number;

	no_null(fcinfo, argument, name);
	number = PG_GETARG_INT64(argument);
	if (number < 0 || number > MAX_OFFSET)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must be a number of bytes, but is %lld", name, (long long) number)));
	return number;
}

Datum
agentvm_download(PG_FUNCTION_ARGS)
{
	pg_uuid_t *session = session_id_argument(fcinfo, 0);
	char *path = path_argument(fcinfo, false);
	int64 offset = 0;
	int64 length = -1;
	Transfer transfer;
	bytea *content;

	if (PG_NARGS() == 4)
	{
		int64 limit = avm_max_file_size_kib * INT64CONST(1024);

		offset = number_argument(fcinfo, 2, "offset");
		length = number_argument(fcinfo, 3, "length");
		if (length > limit)
			ereport(ERROR,
					(errcode(AVM_OVER_LIMIT),
					 errmsg("length is %lld bytes, but at most %lld can be downloaded at once",
							(long long) length, (long long) limit),
					 errhint("The limit is agentvm.max_file_size.")));
	}
	begin_transfer(&transfer, session, "download", path, path, -1);
	content = get_file(&transfer, offset, length, false);
	end_transfer(&transfer);
	PG_RETURN_BYTEA_P(content);
}

/* ---- directories ---- */

/* Where an archive is while it travels. */
static char *
archive_path(void)
{
	pg_uuid_t id;

	session_make_id(&id, GetCurrentTimestamp());
	return psprintf("/tmp/.agentvm-%s.tar", session_text(&id));
}

static int
tar_sqlstate(int exit_code)
{
	switch (exit_code)
	{
		case TAR_NO_DIRECTORY:
			return ERRCODE_UNDEFINED_FILE;
		case TAR_UNSAFE:
		case TAR_NO_ARCHIVE:
			return ERRCODE_INVALID_PARAMETER_VALUE;
		case TAR_NO_SPACE:
			return ERRCODE_DISK_FULL;
		default:
			return ERRCODE_IO_ERROR;
	}
}

/* Have the runtime "extract" an archive into the directory, or "create" one of it. */
static void
run_tar(const pg_uuid_t *session, const char *what, const char *directory, const char *file)
{
	ExecCommand command = {0};
	const ExecResult *result;
	StringInfoData json;
	StringInfoData audit;
	Exec *exec;

	initStringInfo(&json);
	appendStringInfo(&json, "{\"%s\": ", what);
	escape_json(&json, directory);
	header_text(&json, "file", file);
	appendStringInfoChar(&json, '}');
	initStringInfo(&audit);
	appendStringInfoString(&audit, "{\"kind\": \"exec\"");
	header_text(&audit, "role", GetUserNameFromId(GetUserId(), false));
	header_text(&audit, "tar", what);
	header_text(&audit, "path", directory);
	appendStringInfoChar(&audit, '}');

	command.tar = json.data;
	command.audit = audit.data;
	command.timeout_ms = TAR_TIMEOUT_S * 1000;
	exec = exec_create(GetUserId(), &command);
	exec_add(exec, session, NULL);
	result = exec_next(exec);
	if (result->failure != NULL)
		call_raise(result->failure);
	if (result->exit_code != TAR_DONE)
		ereport(ERROR,
				(errcode(tar_sqlstate(result->exit_code)),
				 strcmp(what, "extract") == 0 ? errmsg("could not unpack into \"%s\"", directory)
											  : errmsg("could not pack \"%s\"", directory),
				 errdetail_internal("%s", words_from_vm(result->streams[1].data,
														result->streams[1].len, MAX_TAR_WORDS))));
	exec_destroy(exec);
}

Datum
agentvm_upload_tar(PG_FUNCTION_ARGS)
{
	pg_uuid_t *session = session_id_argument(fcinfo, 0);
	char *directory = path_argument(fcinfo, true);
	char *file = archive_path();
	Transfer transfer;
	Content content;

	no_null(fcinfo, 2, "content");
	content_open(&content, PG_GETARG_DATUM(2), "content");
	begin_transfer(&transfer, session, "upload", file, directory, content.len);
	put_file(&transfer, &content, "0600");
	end_transfer(&transfer);
	run_tar(session, "extract", directory, file);
	PG_RETURN_INT64(content.len);
}

Datum
agentvm_download_tar(PG_FUNCTION_ARGS)
{
	pg_uuid_t *session = session_id_argument(fcinfo, 0);
	char *directory = path_argument(fcinfo, true);
	char *file = archive_path();
	Transfer transfer;
	bytea *content;

	run_tar(session, "create", directory, file);
	begin_transfer(&transfer, session, "download", file, directory, -1);
	content = get_file(&transfer, 0, -1, true);
	end_transfer(&transfer);
	PG_RETURN_BYTEA_P(content);
}
