/*-------------------------------------------------------------------------
 *
 * settings.h
 *		Settings of the runtime: lines KEY=VALUE of a file that only its owner may read.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_SETTINGS_H
#define RUNTIME_SETTINGS_H

#include <stdbool.h>
#include <stdint.h>

#include "../protocol.h"

#define FINGERPRINT_LEN 32

typedef struct Settings
{
	const char *path; /* of the file */

	const char *gateway_url;
	char host[128];	 /* of gateway_url: a name or an address, without brackets */
	int port;		 /* of gateway_url */
	char prefix[64]; /* of gateway_url: what precedes our paths */
	bool tls;
	const char *gateway_device; /* virtio port that leads there; NULL: the network does */

	char *bootstrap_token; /* NULL once it has been used */
	const char *ca_file;
	const char *fingerprint_text;
	uint8_t fingerprint[FINGERPRINT_LEN]; /* if there is fingerprint_text */
	bool allow_insecure;
	const char *mode;
	const char *state_dir;
	const char *work_dir;
	const char *poweroff_command;
	const char *log_level;

	int64_t heartbeat_interval_ms; /* these three until the control plane says otherwise */
	int64_t deadline_grace_ms;
	int64_t deadman_allowance_ms;
	int bootstrap_tries;
	int64_t bootstrap_interval_ms;
	int64_t http_timeout_ms;
	int64_t backoff_min_ms;
	int64_t backoff_max_ms;
	int64_t poweroff_retry_ms;
	int64_t clone_timeout_ms;
	int max_commands;
	int output_memory; /* MiB; 0: by the machine's */
	int pids_limit;	   /* 0: none */
} Settings;

/*
 * Read the settings from a file.  Returns NULL, or a static text that says what is
 * wrong.  The strings live until the process ends.  Also sets the log's level.
 */
extern const char *settings_read(Settings *settings, const char *path);

/* Print all that can be set, one paragraph each. */
extern void settings_help(void);

/*
 * Take the bootstrap token out of the file, and out of the memory; true when it is
 * not there any more.
 */
extern bool settings_erase_token(Settings *settings);

#endif /* RUNTIME_SETTINGS_H */
