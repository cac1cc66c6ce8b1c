/*-------------------------------------------------------------------------
 *
 * keyring.c
 *		The key file: master keys that never enter the database.
 *
 * agentvm.key_file names a file of lines "id:base64 of 32 bytes"; the first key
 * encrypts, all of them decrypt.  What has been read is kept until the end of the
 * transaction and then wiped, so that no idle process holds a key; stat() before
 * use tells whether the file is still the same.
 *
 * The file is opened first and everything about it is then asked of the
 * descriptor, so that nobody can swap it between check and use.  The change
 * time is part of the file's identity: it moves with chmod() and chown() too,
 * so a file that has been opened up to others is refused at the next use.
 *
 * No message holds anything of a line of the file: whoever mistypes the format
 * may have put the key where the id belongs.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "access/xact.h"
#include "common/base64.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "agentvm.h"
#include "db.h"
#include "secret/keyring.h"
#include "secret/secret.h"

#define KEY_FILE_MAX (64 * 1024) /* bytes; more than a thousand keys */

/* File times move in ticks, so a file this young (s) may change again and look the same. */
#define KEY_FILE_YOUNG 2

/* What was checked this short a time (us) ago is not again: a transaction of the engine may use keys hundreds of times. */
#define KEY_FILE_CHECKED 10000

typedef struct Key
{
	char id[KEYRING_ID_MAX + 1];
	char text[KEYRING_TEXT_LEN + 1];
	uint8 bytes[KEYRING_KEY_LEN];
} Key;

/* Why there is no usable keyring. */
typedef struct KeyringProblem
{
	char *message;
	const char *hint; /* or NULL */
} KeyringProblem;

typedef struct Keyring
{
	MemoryContext context; /* holds path and keys; NULL: nothing is cached */
	char *path;
	struct stat identity;
	TimestampTz checked; /* when the file was last seen to be still the same */
	bool young;			 /* the file was so young when read that its times prove nothing */
	int nkeys;
	Key *keys;
} Keyring;

static Keyring keyring;

static void
keyring_forget(void)
{
	MemoryContext context = keyring.context;

	if (context == NULL)
		return;
	if (keyring.keys != NULL)
		secret_wipe(keyring.keys, keyring.nkeys * sizeof(Key));
	memset(&keyring, 0, sizeof(keyring));
	MemoryContextDelete(context);
}

/* At the end of the transaction that used them, the keys go. */
static void
forget_at_end(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PARALLEL_ABORT:
		case XACT_EVENT_PREPARE:
			keyring_forget();
			break;
		default:
			break;
	}
}

static bool
same_file(const struct stat *a, const struct stat *b)
{
	return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
		   a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec &&
		   a->st_ctim.tv_sec == b->st_ctim.tv_sec && a->st_ctim.tv_nsec == b->st_ctim.tv_nsec;
}

/*
 * Is this file fit to hold keys?  The rules are those of the server's own
 * private key for TLS: ours alone, or root's and readable by our group.
 */
static char *
check_file(const char *path, const struct stat *st)
{
	if (!S_ISREG(st->st_mode))
		return psprintf("key file \"%s\" is not a regular file", path);
	if (st->st_uid != geteuid() && st->st_uid != 0)
		return psprintf("key file \"%s\" must be owned by the server's user or by root", path);
	if (st->st_uid == geteuid() && (st->st_mode & (S_IRWXG | S_IRWXO)) != 0)
		return psprintf("key file \"%s\" has group or world access", path);
	if (st->st_uid != geteuid() && (st->st_mode & (S_IWGRP | S_IXGRP | S_IRWXO)) != 0)
		return psprintf(
			"key file \"%s\" is owned by root and open for more than reading by its group", path);
	if (st->st_uid != geteuid() && (st->st_mode & S_IRWXG) != 0 && st->st_gid != getegid())
		return psprintf(
			"key file \"%s\" is owned by root and readable by a group that is not the server's",
			path);
	if (st->st_size > KEY_FILE_MAX)
		return psprintf("key file \"%s\" is larger than %d bytes", path, KEY_FILE_MAX);
	return NULL;
}

/*
 * Read the whole file into "buffer" of KEY_FILE_MAX bytes.  Returns NULL, or
 * what is wrong.  A FIFO does not block it: O_NONBLOCK, then refused.
 */
static char *
read_file(const char *path, char *buffer, size_t *len, struct stat *st)
{
	char *problem = NULL;
	int fd;

	*len = 0;
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0)
		return psprintf("could not open key file \"%s\": %m", path);

	/* Nothing in this section raises (but out of memory), so the descriptor is always closed. */
	if (fstat(fd, st) != 0)
		problem = psprintf("could not stat key file \"%s\": %m", path);
	else
		problem = check_file(path, st);

	while (problem == NULL)
	{
		ssize_t got = read(fd, buffer + *len, KEY_FILE_MAX - *len);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			problem = psprintf("could not read key file \"%s\": %m", path);
		if (got <= 0)
			break;
		*len += got;
	}
	close(fd);

	return problem;
}

static bool
is_key_id(const char *id, size_t len)
{
	size_t i;

	if (len < 1 || len > KEYRING_ID_MAX)
		return false;
	for (i = 0; i < len; i++)
	{
		char c = id[i];

		if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
			  c == '.' || c == '_' || c == '-'))
			return false;
	}
	return true;
}

/*
 * Decode the canonical base64 text of a key.  The last digit before the padding
 * carries four bits of the key; pg_b64_decode would let any others pass, and
 * two texts would then be one key here but two passwords for pgcrypto.
 */
static bool
decode_key(const char *text, size_t len, uint8 *bytes)
{
	/* void *: char * until 17, uint8 * from 18 on */
	void *decoded = bytes;

	if (len != KEYRING_TEXT_LEN || memchr(text, '=', len) != text + len - 1 ||
		strchr("AEIMQUYcgkosw048", text[len - 2]) == NULL)
		return false;
	return pg_b64_decode(text, len, decoded, KEYRING_KEY_LEN) == KEYRING_KEY_LEN;
}

/*
 * Parse one line, already without blanks at its ends, into a key.  Returns
 * NULL, or what is wrong with it.
 */
static const char *
parse_line(const char *line, size_t len, Key *key)
{
	const char *colon = memchr(line, ':', len);

	if (colon == NULL)
		return "expected \"id:key\"";
	if (!is_key_id(line, colon - line))
		return "the key id must be 1 to 64 letters, digits, dots, underscores or hyphens";
	if (!decode_key(colon + 1, line + len - (colon + 1), key->bytes))
		return "the key must be 32 bytes in base64";

	memcpy(key->id, line, colon - line);
	key->id[colon - line] = '\0';
	memcpy(key->text, colon + 1, KEYRING_TEXT_LEN);
	key->text[KEYRING_TEXT_LEN] = '\0';
	return NULL;
}

static const Key *
find_key(const char *id)
{
	int i;

	for (i = 0; i < keyring.nkeys; i++)
	{
		if (strcmp(keyring.keys[i].id, id) == 0)
			return &keyring.keys[i];
	}
	return NULL;
}

/* Fill keyring.keys, for which there is room. */
static char *
parse_file(const char *path, const char *buffer, size_t len)
{
	const char *end = buffer + len;
	const char *line = buffer;
	int number = 0;

	while (line < end)
	{
		const char *newline = memchr(line, '\n', end - line);
		const char *next = newline ? newline + 1 : end;
		const char *last = newline ? newline : end;

		number++;
		while (line < last && (*line == ' ' || *line == '\t'))
			line++;
		while (line < last && (last[-1] == ' ' || last[-1] == '\t' || last[-1] == '\r'))
			last--;

		if (line < last && *line != '#')
		{
			Key *key = &keyring.keys[keyring.nkeys];
			const char *wrong;

			wrong = parse_line(line, last - line, key);
			if (wrong == NULL && find_key(key->id) != NULL)
				wrong = "the key id is used twice";
			if (wrong != NULL)
			{
				secret_wipe(key, sizeof(Key));
				return psprintf("key file \"%s\", line %d: %s", path, number, wrong);
			}
			keyring.nkeys++;
		}
		line = next;
	}

	if (keyring.nkeys == 0)
		return psprintf("key file \"%s\" contains no key", path);
	return NULL;
}

static int
count_lines(const char *buffer, size_t len)
{
	int lines = 1;
	size_t i;

	for (i = 0; i < len; i++)
	{
		if (buffer[i] == '\n')
			lines++;
	}
	return lines;
}

/* Read the file anew. */
static char *
keyring_load(const char *path)
{
	static bool registered = false;
	char buffer[KEY_FILE_MAX];
	size_t len;
	struct stat st;
	char *problem;
	MemoryContext context;

	if (!registered)
	{
		RegisterXactCallback(forget_at_end, NULL);
		registered = true;
	}

	problem = read_file(path, buffer, &len, &st);
	if (problem == NULL)
	{
		int lines = count_lines(buffer, len);

		context = AllocSetContextCreate(TopMemoryContext, "agentvm keyring", ALLOCSET_SMALL_SIZES);
		keyring.context = context;
		keyring.path = MemoryContextStrdup(context, path);
		keyring.keys = (Key *) MemoryContextAllocZero(context, lines * sizeof(Key));
		keyring.identity = st;
		keyring.checked = GetCurrentTimestamp();
		keyring.young = time(NULL) - st.st_ctim.tv_sec < KEY_FILE_YOUNG;

		problem = parse_file(path, buffer, len);
		if (problem != NULL)
			keyring_forget();
	}
	secret_wipe(buffer, sizeof(buffer));

	return problem;
}

/*
 * Make "keyring" what the file says now.  Returns false, with nothing cached,
 * when it is not usable, and why.
 */
static bool
keyring_refresh(KeyringProblem *problem)
{
	struct stat st;

	problem->message = NULL;
	problem->hint = NULL;

	if (avm_key_file == NULL || avm_key_file[0] == '\0')
	{
		keyring_forget();
		problem->message = pstrdup("agentvm.key_file is not set");
		problem->hint =
			"Create one with: umask 077; printf 'k1:%s\\n' \"$(openssl rand -base64 32)\" > FILE; "
			"then set agentvm.key_file and reload.";
		return false;
	}

	if (keyring.context != NULL && strcmp(keyring.path, avm_key_file) == 0)
	{
		TimestampTz now = GetCurrentTimestamp();

		if (now >= keyring.checked && now < keyring.checked + KEY_FILE_CHECKED)
			return true;
		if (!keyring.young && stat(avm_key_file, &st) == 0 && same_file(&st, &keyring.identity))
		{
			keyring.checked = now;
			return true;
		}
	}

	keyring_forget();
	problem->message = keyring_load(avm_key_file);
	if (problem->message == NULL)
		return true;

	problem->hint =
		"It holds lines \"id:key\", the key being 32 bytes in base64. It must be owned by the "
		"server's "
		"user with permissions 0600 or less, or by root with the server's group and 0640 or less.";
	return false;
}

/*
 * As keyring_refresh, but raises.  The statement is kept out of the log: it may
 * be the set_provider() that brings secrets.
 */
static void
keyring_require(void)
{
	KeyringProblem problem;

	if (!keyring_refresh(&problem))
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION), errmsg_internal("%s", problem.message),
				errhint("%s", problem.hint), hide_caller());
}

char *
keyring_current_id(void)
{
	keyring_require();
	return pstrdup(keyring.keys[0].id);
}

char *
keyring_problem(char **current_id)
{
	KeyringProblem problem;

	*current_id = NULL;
	if (!keyring_refresh(&problem))
		return problem.message;
	*current_id = pstrdup(keyring.keys[0].id);
	return NULL;
}

char *
keyring_key_problem(const char *key_id)
{
	KeyringProblem problem;

	if (!keyring_refresh(&problem))
		return problem.message;
	if (find_key(key_id) == NULL)
		return psprintf("key file \"%s\" has no key \"%s\"", keyring.path, key_id);
	return NULL;
}

const char *
keyring_key_text(const char *key_id)
{
	const Key *key;

	keyring_require();
	key = find_key(key_id);
	return key ? key->text : NULL;
}

/*
 * HMAC-SHA256 of a text with the key of that id, which has to be there; "what" names
 * the result in the message of an error.
 */
static void
keyring_hmac(const char *key_id, const char *text, const char *what, uint8 digest[SHA256_LEN])
{
	const Key *key;
	unsigned int digest_len = 0;

	keyring_require();
	key = find_key(key_id);
	if (key == NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("key file \"%s\" has no key \"%s\"", keyring.path, key_id),
				errhint("Put that key back into the file; keys can go once nothing uses them."),
				hide_caller());
	if (HMAC(EVP_sha256(), key->bytes, KEYRING_KEY_LEN, (const unsigned char *) text, strlen(text),
			 digest, &digest_len) == NULL ||
		digest_len != SHA256_LEN)
		ereport(ERROR, errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not compute %s", what));
}

Secret *
keyring_bootstrap_token(const char *key_id, const char *session_id, int attempt)
{
	char *message = psprintf("%s:%d", session_id, attempt);
	uint8 digest[SHA256_LEN];
	char hex[2 * SHA256_LEN];
	Secret *token;

	keyring_hmac(key_id, message, "a bootstrap token", digest);
	hex_encode((const char *) digest, SHA256_LEN, hex);
	token = secret_make(hex, sizeof(hex));
	secret_wipe(digest, sizeof(digest));
	secret_wipe(hex, sizeof(hex));
	pfree(message);

	return token;
}

Secret *
keyring_control_key(const char *key_id, const char *gateway_id)
{
	char *message = psprintf("agentvm control:%s", gateway_id);
	uint8 digest[SHA256_LEN];
	Secret *key;

	keyring_hmac(key_id, message, "a gateway's control key", digest);
	key = secret_make((const char *) digest, SHA256_LEN);
	secret_wipe(digest, sizeof(digest));
	pfree(message);

	return key;
}
