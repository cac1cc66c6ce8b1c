/*-------------------------------------------------------------------------
 *
 * state.c
 *		What outlives a restart of the runtime: who it is, and the times it must keep.
 *
 *-------------------------------------------------------------------------
 */
#include "state.h"

#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../common/log.h"
#include "files.h"

#define MAX_STATE (16 * 1024)
#define BOOT_ID_FILE "/proc/sys/kernel/random/boot_id"

static void
path_of(char *path, size_t size, const Settings *settings, const char *name)
{
	snprintf(path, size, "%s/%s", settings->state_dir, name);
}

static void
to_hex(const uint8_t *bytes, char *hex)
{
	int i;

	for (i = 0; i < HEX_LEN / 2; i++)
		sprintf(hex + 2 * i, "%02x", bytes[i]);
}

static bool
hash_hex(const char *text, char *hex)
{
	uint8_t hash[HEX_LEN / 2];

	if (EVP_Digest(text, strlen(text), hash, NULL, EVP_sha256(), NULL) != 1)
		return false;
	to_hex(hash, hex);
	return true;
}

/* The kernel's, different after each boot; empty where there is no /proc. */
static void
read_boot_id(char *boot_id, size_t size)
{
	char *content = file_read(BOOT_ID_FILE, 128, NULL);

	snprintf(boot_id, size, "%s", content ? content : "");
	boot_id[strcspn(boot_id, "\n")] = '\0';
	free(content);
}

static json_t *
load(const Settings *settings, const char *name)
{
	char path[PATH_MAX];
	char *content;
	size_t len;
	json_t *root;

	path_of(path, sizeof(path), settings, name);
	content = file_read(path, MAX_STATE, &len);
	if (content == NULL)
		return NULL;
	root = json_loadb(content, len, 0, NULL);
	OPENSSL_cleanse(content, len);
	free(content);
	return root;
}

static bool
save(const Settings *settings, const char *name, const json_t *root, bool sync)
{
	char path[PATH_MAX];
	char *text = json_dumps(root, JSON_COMPACT);
	bool ok;

	if (text == NULL)
		return false;
	path_of(path, sizeof(path), settings, name);
	ok = file_replace(path, text, strlen(text), sync);
	OPENSSL_cleanse(text, strlen(text));
	free(text);
	return ok;
}

bool
state_store(const Settings *settings, const char *name, const struct json_t *document)
{
	return save(settings, name, document, true);
}

static bool
text_of(json_t *root, const char *name, char *text, size_t size)
{
	const char *value = json_string_value(json_object_get(root, name));

	if (value == NULL || strlen(value) >= size)
		return false;
	strcpy(text, value);
	return true;
}

/* True when the file has the state of these settings' session. */
static bool
load_state(State *state, const Settings *settings)
{
	json_t *root = load(settings, "session.json");
	char hash[HEX_LEN + 1];
	bool ok;

	memset(state, 0, sizeof(*state));
	ok = text_of(root, "bootstrap_sha256", state->bootstrap_sha256,
				 sizeof(state->bootstrap_sha256)) &&
		 text_of(root, "session_token", state->session_token, sizeof(state->session_token)) &&
		 text_of(root, "boot_id", state->boot_id, sizeof(state->boot_id)) &&
		 text_of(root, "session_id", state->session_id, sizeof(state->session_id)) &&
		 text_of(root, "channel", state->channel, sizeof(state->channel)) &&
		 strlen(state->session_token) == HEX_LEN &&
		 hash_hex(state->session_token, state->session_token_sha256);
	/* a runtime that has stored none knew no warm VMs */
	state->hydrated =
		state->session_id[0] != '\0' && !json_is_false(json_object_get(root, "hydrated"));
	state->heartbeat_interval_ms =
		json_integer_value(json_object_get(root, "heartbeat_interval_ms"));
	state->deadline_grace_ms = json_integer_value(json_object_get(root, "deadline_grace_ms"));
	state->deadman_allowance_ms = json_integer_value(json_object_get(root, "deadman_allowance_ms"));
	json_decref(root);
	if (!ok || state->heartbeat_interval_ms <= 0 || state->deadman_allowance_ms <= 0)
		return false;
	return settings->bootstrap_token == NULL ? state->session_id[0] != '\0'
											 : hash_hex(settings->bootstrap_token, hash) &&
												   strcmp(hash, state->bootstrap_sha256) == 0;
}

const char *
state_open(State *state, const Settings *settings)
{
	static char problem[512];
	uint8_t token[HEX_LEN / 2];

	if (!make_directories(settings->state_dir, 0700))
	{
		snprintf(problem, sizeof(problem), "AGENTVM_STATE_DIR=%s: %s", settings->state_dir,
				 strerror(errno));
		return problem;
	}
	if (load_state(state, settings))
		return NULL;
	if (settings->bootstrap_token == NULL)
	{
		snprintf(problem, sizeof(problem),
				 "%s has no AGENTVM_BOOTSTRAP_TOKEN, and %s/session.json has no session",
				 settings->path, settings->state_dir);
		return problem;
	}
	memset(state, 0, sizeof(*state));
	read_boot_id(state->boot_id, sizeof(state->boot_id));
	if (state->boot_id[0] == '\0')
		return BOOT_ID_FILE " cannot be read";
	if (RAND_bytes(token, sizeof(token)) != 1)
		return "no random bytes are to be had";
	to_hex(token, state->session_token);
	OPENSSL_cleanse(token, sizeof(token));
	if (!hash_hex(state->session_token, state->session_token_sha256) ||
		!hash_hex(settings->bootstrap_token, state->bootstrap_sha256))
		return "SHA-256 does not work";
	state->heartbeat_interval_ms = settings->heartbeat_interval_ms;
	state->deadline_grace_ms = settings->deadline_grace_ms;
	state->deadman_allowance_ms = settings->deadman_allowance_ms;
	/* before the token's hash is known to anybody: whoever restarts must have the same one */
	if (!state_save(state, settings))
	{
		snprintf(problem, sizeof(problem), "AGENTVM_STATE_DIR=%s cannot be written",
				 settings->state_dir);
		return problem;
	}
	return NULL;
}

bool
state_save(const State *state, const Settings *settings)
{
	json_t *root = json_pack("{s:s, s:s, s:s, s:s, s:b, s:s, s:I, s:I, s:I}", "bootstrap_sha256",
							 state->bootstrap_sha256, "session_token", state->session_token,
							 "boot_id", state->boot_id, "session_id", state->session_id, "hydrated",
							 state->hydrated, "channel", state->channel, "heartbeat_interval_ms",
							 (json_int_t) state->heartbeat_interval_ms, "deadline_grace_ms",
							 (json_int_t) state->deadline_grace_ms, "deadman_allowance_ms",
							 (json_int_t) state->deadman_allowance_ms);
	bool ok = save(settings, "session.json", root, true);

	json_decref(root);
	return ok;
}

bool
times_read(Times *times, const Settings *settings)
{
	json_t *root = load(settings, "times.json");
	const char *of = json_string_value(json_object_get(root, "boot_id"));
	json_t *contact = json_object_get(root, "contact");
	json_t *deadline = json_object_get(root, "deadline");
	char boot_id[64];
	bool ok;

	read_boot_id(boot_id, sizeof(boot_id));
	ok = of != NULL && strcmp(of, boot_id) == 0 && json_is_integer(contact) &&
		 json_is_integer(deadline);
	if (ok)
	{
		times->contact = json_integer_value(contact);
		times->deadline = json_integer_value(deadline);
	}
	json_decref(root);
	return ok;
}

void
times_save(const Times *times, const Settings *settings)
{
	char boot_id[64];
	json_t *root;

	read_boot_id(boot_id, sizeof(boot_id));
	root = json_pack("{s:s, s:I, s:I}", "boot_id", boot_id, "contact", (json_int_t) times->contact,
					 "deadline", (json_int_t) times->deadline);
	(void) save(settings, "times.json", root, false); /* a crash of the machine voids them anyway */
	json_decref(root);
}
