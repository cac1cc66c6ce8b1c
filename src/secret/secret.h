/*-------------------------------------------------------------------------
 *
 * secret.h
 *		Keys and secrets: the keyring, encrypted columns, bootstrap tokens.
 *
 * A Secret has no printable form: no function turns one into an error, a log
 * line, a Datum for SPI or a GUC.  Its bytes are wiped when its memory context
 * is reset or deleted.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SECRET_SECRET_H
#define AGENTVM_SECRET_SECRET_H

#include "postgres.h"

typedef struct Secret Secret;
typedef struct SecretSet SecretSet;

/* ---- unprintable values (secret.c) ---- */

/*
 * Copy "len" bytes into a new secret in CurrentMemoryContext.  A NUL follows
 * the bytes, so that text secrets can be handed to C libraries.
 */
extern Secret *secret_make(const char *bytes, size_t len);

/* The bytes, NUL-terminated; valid as long as the secret. */
extern const char *secret_bytes(const Secret *secret);

/* Number of bytes, without the NUL. */
extern size_t secret_len(const Secret *secret);

/* Overwrite memory in a way that the compiler may not remove. */
extern PGDLLEXPORT void secret_wipe(void *bytes, size_t len);

/* The same when CurrentMemoryContext, in which the bytes are, is reset or deleted; until then they stay where they are. */
extern PGDLLEXPORT void secret_wipe_later(void *bytes, size_t len);

/*
 * free() and realloc() for a C library that holds secrets in memory of malloc():
 * what is given back is overwritten, also where it only moves.
 */
extern void secret_free(void *bytes);
extern void *secret_realloc(void *bytes, size_t size);

/* ---- named secrets of one (team, provider) (secret.c) ---- */

/* An empty set in CurrentMemoryContext. */
extern SecretSet *secret_set_make(void);

/* Add a secret under a field name; the set keeps the pointer and copies the name. */
extern void secret_set_add(SecretSet *set, const char *field, Secret *secret);

/* The secret of that name, or NULL. A NULL set is empty. */
extern const Secret *secret_set_get(const SecretSet *set, const char *field);

/* Whether there is none in it. */
extern bool secret_set_is_empty(const SecretSet *set);

/* A copy, with secrets of its own, in CurrentMemoryContext. */
extern SecretSet *secret_set_copy(const SecretSet *set);

/*
 * 64 hexadecimal digits, palloc'd, that are the same for two sets only if they
 * have the same secrets under the same names in the same order.
 */
extern char *secret_set_digest(const SecretSet *set);

/*
 * Copy of "text" with every occurrence of every secret of 4 bytes or more
 * replaced by "***".  Palloc'd.  A NULL set replaces nothing.
 */
extern char *secret_redact(const SecretSet *set, const char *text);

/* ---- keyring (keyring.c) ---- */

/*
 * The id of the key that encrypts now: the first line of agentvm.key_file.
 * Raises AV010, with a hint how to make a key file, when the setting is empty
 * or the file is missing, wrongly owned or too open (0600 owned by the server's
 * user, or 0640 owned by root with the server's group), or malformed.  The file
 * is read again whenever it has changed.  Palloc'd.
 */
extern char *keyring_current_id(void);

/*
 * NULL when the keyring is usable, and *current_id as above, else a palloc'd
 * sentence that says what is wrong (for view health), and NULL.  Never raises.
 */
extern char *keyring_problem(char **current_id);

/* The same, and a key of that id has to be there. */
extern char *keyring_key_problem(const char *key_id);

/*
 * The 64 hexadecimal digits of HMAC-SHA256(key, "<session id>:<attempt>"): the
 * bootstrap token of one launch attempt, the same on every call.  Raises AV010
 * when the key is not in the key file.
 */
extern Secret *keyring_bootstrap_token(const char *key_id, const char *session_id, int attempt);

/*
 * The 32 bytes of HMAC-SHA256(key, "agentvm control:<gateway id>"): what tickets
 * for the control listener of that gateway are made with.  Raises AV010 when the
 * key is not in the key file.
 */
extern Secret *keyring_control_key(const char *key_id, const char *gateway_id);

/* SHA-256 of a text secret, as the gateway computes it from the bearer token. */
#define SHA256_LEN 32
extern void secret_sha256(const Secret *secret, uint8 digest[SHA256_LEN]);

/* Lower-case hexadecimal text of a hash, palloc'd. */
extern char *sha256_text(const uint8 digest[SHA256_LEN]);

/* SHA-256 of any bytes. */
extern void sha256_bytes(const void *bytes, size_t len, uint8 digest[SHA256_LEN]);

/* ---- encrypted columns (crypt.c), through pgcrypto ---- */

/*
 * Encrypt bytes for one place: the envelope inside the ciphertext names owner
 * (team), kind (provider, or "session") and field, so that a row copied
 * elsewhere does not decrypt.  Returns a palloc'd bytea and sets *key_id to the
 * palloc'd id of the key used.  Needs a transaction.  Raises AV010 without key.
 */
extern bytea *secret_encrypt(const char *team, const char *kind, const char *field,
							 const char *bytes, size_t len, char **key_id);

/*
 * The reverse.  Raises AV010 when the key is missing, the key is wrong, or the
 * envelope names another place; the message tells which, never a byte of it.
 * Needs a transaction.  The secret lives in CurrentMemoryContext.
 */
extern Secret *secret_decrypt(const char *team, const char *kind, const char *field,
							  const bytea *value, const char *key_id);

#endif /* AGENTVM_SECRET_SECRET_H */
