/*-------------------------------------------------------------------------
 *
 * state.h
 *		What outlives a restart of the runtime: who it is, and the times it must keep.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_STATE_H
#define RUNTIME_STATE_H

#include <stdbool.h>
#include <stdint.h>

#include "settings.h"

#define HEX_LEN 64 /* of 256 bits */

/* state_dir/session.json, which must never be lost */
typedef struct State
{
	char bootstrap_sha256[HEX_LEN + 1]; /* of the token that this session is bootstrapped with */
	char session_token[HEX_LEN + 1];	/* made here; only its hash ever leaves the machine ... */
	char session_token_sha256[HEX_LEN + 1]; /* ... in a bootstrap */
	char boot_id[64];						/* the kernel's, when the token was made */
	char session_id[64];					/* empty until the bootstrap has succeeded */
	bool
		hydrated; /* env.json and repos.json are there: from the bootstrap, or once a warm VM is taken */
	char channel[128];
	int64_t heartbeat_interval_ms;
	int64_t deadline_grace_ms;
	int64_t deadman_allowance_ms;
} State;

/*
 * Read the state that belongs to these settings, or begin and store a new one where
 * there is none or where it is of another bootstrap token (an image made from a
 * machine that had been used).  Returns NULL, or a static text that says what is
 * wrong.
 */
extern const char *state_open(State *state, const Settings *settings);

/* Write it to the disk; false, having logged why, when that fails. */
extern bool state_save(const State *state, const Settings *settings);

/* state_dir/times.json: in ms of CLOCK_BOOTTIME, and worth nothing after a reboot. */
typedef struct Times
{
	int64_t contact;  /* when the control plane was last heard of, or first missed */
	int64_t deadline; /* INT64_MAX: not known */
} Times;

/* Read them; false when there are none of this boot of the machine. */
extern bool times_read(Times *times, const Settings *settings);
extern void times_save(const Times *times, const Settings *settings);

/* Store a JSON document as state_dir/NAME, mode 0600; false, having logged why, when that fails. */
struct json_t;
extern bool state_store(const Settings *settings, const char *name, const struct json_t *document);

#endif /* RUNTIME_STATE_H */
