/*-------------------------------------------------------------------------
 *
 * keyring.h
 *		What only the room "secret" may know of the key file.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SECRET_KEYRING_H
#define AGENTVM_SECRET_KEYRING_H

#include "postgres.h"

#define KEYRING_ID_MAX 64	/* bytes of a key id */
#define KEYRING_KEY_LEN 32	/* bytes of a key */
#define KEYRING_TEXT_LEN 44 /* the same in base64 */

/*
 * The base64 text of a key, KEYRING_TEXT_LEN bytes and a NUL, or NULL when the
 * key file has none of that id.  Valid until the next call of any keyring
 * function.  Raises AV010 when the key file is not usable.
 */
extern const char *keyring_key_text(const char *key_id);

#endif /* AGENTVM_SECRET_KEYRING_H */
