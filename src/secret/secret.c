/*-------------------------------------------------------------------------
 *
 * secret.c
 *		Values that cannot be printed, small sets of them, and hashes.
 *
 * A Secret is an opaque struct whose bytes live in a memory context.  A reset
 * callback of that context overwrites them, so that a secret is gone as soon
 * as the operation that needed it is, whether it ended well or with an error.
 * There is on purpose no function that frees one early or turns one into a
 * Datum.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <malloc.h>
#include <openssl/evp.h>
#include <string.h>

#include "nodes/pg_list.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/palloc.h"

#include "secret/secret.h"

/* Shorter secrets occur in ordinary text by chance; replacing them would destroy it. */
#define REDACT_MIN_LEN 4
#define REDACT_MARK "***"

struct Secret
{
	MemoryContextCallback wipe;
	size_t len;
	char bytes[FLEXIBLE_ARRAY_MEMBER]; /* and a NUL */
};

typedef struct NamedSecret
{
	char *field;
	Secret *secret;
} NamedSecret;

struct SecretSet
{
	MemoryContext context;
	List *members; /* of NamedSecret * */
};

static void
wipe_secret(void *arg)
{
	Secret *secret = (Secret *) arg;

	secret_wipe(secret->bytes, secret->len);
	secret->len = 0;
}

Secret *
secret_make(const char *bytes, size_t len)
{
	Secret *secret;

	secret = (Secret *) palloc(offsetof(Secret, bytes) + len + 1);
	secret->len = len;
	memcpy(secret->bytes, bytes, len);
	secret->bytes[len] = '\0';

	secret->wipe.func = wipe_secret;
	secret->wipe.arg = secret;
	MemoryContextRegisterResetCallback(CurrentMemoryContext, &secret->wipe);

	return secret;
}

const char *
secret_bytes(const Secret *secret)
{
	return secret->bytes;
}

size_t
secret_len(const Secret *secret)
{
	return secret->len;
}

void
secret_wipe(void *bytes, size_t len)
{
	explicit_bzero(bytes, len);
}

void
secret_free(void *bytes)
{
	if (bytes != NULL)
		secret_wipe(bytes, malloc_usable_size(bytes));
	free(bytes);
}

void *
secret_realloc(void *bytes, size_t size)
{
	size_t old_size = bytes != NULL ? malloc_usable_size(bytes) : 0;
	void *new;

	if (bytes != NULL && size <= old_size && size >= old_size / 2)
		return bytes;
	new = malloc(size);
	if (new == NULL || bytes == NULL)
		return new;
	memcpy(new, bytes, Min(old_size, size));
	secret_free(bytes);
	return new;
}

typedef struct LaterWipe
{
	MemoryContextCallback callback;
	void *bytes;
	size_t len;
} LaterWipe;

static void
wipe_bytes(void *arg)
{
	LaterWipe *later = (LaterWipe *) arg;

	secret_wipe(later->bytes, later->len);
}

void
secret_wipe_later(void *bytes, size_t len)
{
	LaterWipe *later = (LaterWipe *) palloc(sizeof(LaterWipe));

	later->callback.func = wipe_bytes;
	later->callback.arg = later;
	later->bytes = bytes;
	later->len = len;
	MemoryContextRegisterResetCallback(CurrentMemoryContext, &later->callback);
}

SecretSet *
secret_set_make(void)
{
	SecretSet *set = (SecretSet *) palloc(sizeof(SecretSet));

	set->context = CurrentMemoryContext;
	set->members = NIL;
	return set;
}

void
secret_set_add(SecretSet *set, const char *field, Secret *secret)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(set->context);
	NamedSecret *member = (NamedSecret *) palloc(sizeof(NamedSecret));

	member->field = pstrdup(field);
	member->secret = secret;
	set->members = lappend(set->members, member);
	MemoryContextSwitchTo(oldcontext);
}

const Secret *
secret_set_get(const SecretSet *set, const char *field)
{
	ListCell *cell;

	if (set == NULL)
		return NULL;

	foreach (cell, set->members)
	{
		NamedSecret *member = (NamedSecret *) lfirst(cell);

		if (strcmp(member->field, field) == 0)
			return member->secret;
	}
	return NULL;
}

bool
secret_set_is_empty(const SecretSet *set)
{
	return set == NULL || set->members == NIL;
}

SecretSet *
secret_set_copy(const SecretSet *set)
{
	SecretSet *copy = secret_set_make();
	ListCell *cell;

	if (set == NULL)
		return copy;
	foreach (cell, set->members)
	{
		NamedSecret *member = (NamedSecret *) lfirst(cell);

		secret_set_add(copy, member->field,
					   secret_make(member->secret->bytes, member->secret->len));
	}
	return copy;
}

/* Hash of hashes: the length of no member can shift what the next one means. */
char *
secret_set_digest(const SecretSet *set)
{
	uint8 digest[SHA256_LEN] = {0};
	ListCell *cell;

	foreach (cell, set != NULL ? set->members : NIL)
	{
		NamedSecret *member = (NamedSecret *) lfirst(cell);
		uint8 parts[3 * SHA256_LEN];

		memcpy(parts, digest, SHA256_LEN);
		sha256_bytes(member->field, strlen(member->field), parts + SHA256_LEN);
		secret_sha256(member->secret, parts + 2 * SHA256_LEN);
		sha256_bytes(parts, sizeof(parts), digest);
	}
	return sha256_text(digest);
}

/*
 * All occurrences of all secrets are marked first and replaced afterwards.
 * Replacing them one after the other, longest first or not, would leave the
 * rest of a secret behind where two of them overlap.
 */
char *
secret_redact(const SecretSet *set, const char *text)
{
	size_t len = strlen(text);
	bool *covered;
	bool any = false;
	char *result;
	char *out;
	size_t i;
	ListCell *cell;

	if (set == NULL || set->members == NIL || len < REDACT_MIN_LEN)
		return pstrdup(text);

	covered = (bool *) palloc0(len * sizeof(bool));
	foreach (cell, set->members)
	{
		const Secret *secret = ((NamedSecret *) lfirst(cell))->secret;
		const char *at = text;

		if (secret->len < REDACT_MIN_LEN)
			continue;
		while ((at = memmem(at, text + len - at, secret->bytes, secret->len)) != NULL)
		{
			memset(covered + (at - text), true, secret->len);
			any = true;
			at++;
		}
	}

	if (!any)
	{
		pfree(covered);
		return pstrdup(text);
	}

	/* A mark is shorter than what it stands for, so the result always fits. */
	StaticAssertStmt(sizeof(REDACT_MARK) - 1 <= REDACT_MIN_LEN, "the mark is too long");
	result = out = (char *) palloc(len + 1);
	for (i = 0; i < len; i++)
	{
		if (!covered[i])
			*out++ = text[i];
		else if (i == 0 || !covered[i - 1])
		{
			memcpy(out, REDACT_MARK, sizeof(REDACT_MARK) - 1);
			out += sizeof(REDACT_MARK) - 1;
		}
	}
	*out = '\0';
	pfree(covered);

	return result;
}

void
sha256_bytes(const void *bytes, size_t len, uint8 digest[SHA256_LEN])
{
	/* since OpenSSL 3 EVP_sha256() is looked up by its name for each digest, at the price of 500 bytes */
	static const EVP_MD *sha256 = NULL;
	unsigned int digest_len = 0;

#if OPENSSL_VERSION_NUMBER >= 0x30000000L
	if (sha256 == NULL)
		sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
#endif
	if (sha256 == NULL)
		sha256 = EVP_sha256();
	if (EVP_Digest(bytes, len, digest, &digest_len, sha256, NULL) != 1 || digest_len != SHA256_LEN)
		ereport(ERROR, errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not compute a SHA-256 hash"));
}

char *
sha256_text(const uint8 digest[SHA256_LEN])
{
	char *text = palloc(2 * SHA256_LEN + 1);

	hex_encode((const char *) digest, SHA256_LEN, text);
	text[2 * SHA256_LEN] = '\0';
	return text;
}

void
secret_sha256(const Secret *secret, uint8 digest[SHA256_LEN])
{
	sha256_bytes(secret->bytes, secret->len, digest);
}
