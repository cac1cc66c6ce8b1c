/*-------------------------------------------------------------------------
 *
 * agentvm.h
 *		What every room may use: settings and SQLSTATEs.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_H
#define AGENTVM_H

#include "postgres.h"

#include "compat.h"

#define AGENTVM_VERSION "0.3"

/* SQLSTATEs that applications rely on; README.md lists them for users. */
#define AVM_INVALID_CREDENTIALS MAKE_SQLSTATE('A', 'V', '0', '0', '1')
#define AVM_CAPACITY MAKE_SQLSTATE('A', 'V', '0', '0', '2')
#define AVM_QUOTA MAKE_SQLSTATE('A', 'V', '0', '0', '3')
#define AVM_PROVIDER_ERROR MAKE_SQLSTATE('A', 'V', '0', '0', '4')
#define AVM_NO_SUCH_SESSION MAKE_SQLSTATE('A', 'V', '0', '0', '5')
#define AVM_SESSION_ENDED MAKE_SQLSTATE('A', 'V', '0', '0', '6')
#define AVM_NOT_READY MAKE_SQLSTATE('A', 'V', '0', '0', '7')
#define AVM_IDEMPOTENCY_CONFLICT MAKE_SQLSTATE('A', 'V', '0', '0', '8')
#define AVM_UNREACHABLE MAKE_SQLSTATE('A', 'V', '0', '0', '9')
#define AVM_INVALID_CONFIGURATION MAKE_SQLSTATE('A', 'V', '0', '1', '0')
#define AVM_TIMED_OUT MAKE_SQLSTATE('A', 'V', '0', '1', '1')
#define AVM_OVER_LIMIT MAKE_SQLSTATE('A', 'V', '0', '1', '2')

/* Limits on what a caller may hand in, in bytes. */
#define AVM_MAX_ID 128				 /* team, agent, profile, idempotency key */
#define AVM_MAX_DOCUMENT (64 * 1024) /* env, tags, repos, options: each */

/* Settings (agentvm.*); times are in the unit that the name says. All reload with SIGHUP. */
extern char *avm_databases;
extern char *avm_provider_libraries;
extern char *avm_image_directories;
extern char *avm_key_file;
extern char *avm_default_provider;
extern int avm_dispatchers;
extern int avm_max_in_flight;
extern int avm_max_in_flight_per_team;
extern double avm_api_rate;
extern int avm_sweep_interval_ms;
extern int avm_batch_size;
extern int avm_bootstrap_timeout_s;
extern int avm_heartbeat_interval_s;
extern int avm_heartbeat_timeout_s;
extern int avm_max_lifetime_s;
extern int avm_max_lifetime_ceiling_s;
extern int avm_deadline_grace_s;
extern int avm_deadman_allowance_s;
extern PGDLLEXPORT int avm_lease_ms; /* these marked ones are for libraries of providers, too */
extern int avm_retention_s;
extern int avm_launch_settle_s;
extern int avm_inventory_interval_s; /* 0: no lists by themselves */
extern int avm_orphan_grace_s;
extern char *avm_gateway_url;
extern char *avm_gateway_ca_file;
extern char *avm_aws_endpoint_url;
extern bool avm_allow_insecure_endpoints;
extern bool avm_environment_credentials;
extern int avm_max_output_kib;
extern int avm_max_file_size_kib;
extern bool avm_log_commands;

#endif /* AGENTVM_H */
