/*-------------------------------------------------------------------------
 *
 * boot.h
 *		The script that a VM runs as root at its first boot, whatever the provider.
 *
 * How it gets there is the provider's: EC2's user data, a disk of libvirt's.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_BOOT_H
#define AGENTVM_PROVIDERS_BOOT_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "providers/provider.h"

/* What a script is made of, settled once per launch attempt; a provider keeps it in its handle. */
typedef struct BootPlan
{
	int64 hard_stop; /* epoch s of the VM's own end */
	int64 longest;	 /* s from launch to there, should the VM's clock be wrong */
	const char *key; /* id of the bootstrap token's key, NULL: no runtime */
	const char *env; /* runtime.env, with a mark in the token's place; NULL: no runtime */
	const char *ca;	 /* gateway-ca.pem, or NULL */
} BootPlan;

/* Milliseconds since 1970. */
extern PGDLLEXPORT int64 boot_epoch_ms(TimestampTz at);

/* Whether the text has 1 to max_len characters, all of them printable ASCII. */
extern PGDLLEXPORT bool boot_is_printable(const char *text, size_t max_len);

/*
 * Settle what the script of a new attempt is made of; "now" is in epoch ms.
 * "device" names the virtio port by which the runtime reaches the gateway, NULL:
 * by network.  Raises AV010.
 */
extern PGDLLEXPORT void boot_plan(BootPlan *plan, const ProviderSession *session, int64 now,
								  const char *device);

/*
 * The script, the same on every call with the same arguments; sets *len.  It
 * holds the bootstrap token: wipe it after use.
 */
extern PGDLLEXPORT char *boot_script(const BootPlan *plan, const char *session_id, int attempt,
									 int *len);

/*
 * The script for a VM that is to fetch its payload from a parameter of SSM, with
 * what it finds there in place of the payload.  Sets *len.  It holds no secret.
 */
extern char *boot_script_of_parameter(const BootPlan *plan, const char *region, const char *name,
									  int *len);

/* That payload, in base64; sets *len.  It holds the bootstrap token: wipe it after use. */
extern char *boot_payload(const BootPlan *plan, const char *session_id, int attempt, int *len);

/* How long it would be now: as boot_script_size(). */
extern int boot_payload_size(void);

/*
 * How long the script of a session with a runtime would be now, in bytes: all
 * that varies in size between sessions is known before there is one.  Raises
 * AV010 or AV012 for what would keep it from being made.
 */
extern PGDLLEXPORT int boot_script_size(const char *device);

/* Base64 of bytes, palloc'd. */
extern char *boot_base64(const char *bytes, int len);

#endif /* AGENTVM_PROVIDERS_BOOT_H */
