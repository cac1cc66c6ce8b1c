/*-------------------------------------------------------------------------
 *
 * placement.h
 *		Which of our hosts a VM is on: tables agentvm.host and agentvm.placement.
 *
 * For providers that are "placed" only.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_PLACEMENT_H
#define AGENTVM_ENGINE_PLACEMENT_H

#include "postgres.h"

#include "engine/session_row.h"
#include "nodes/pg_list.h"
#include "providers/provider.h"

/* The size of a VM that nobody has said anything about. */
#define PLACEMENT_VCPUS 1
#define PLACEMENT_MEMORY_MIB 512

/*
 * The engine's: the host of a session's VM, palloc'd, NULL when it has none yet.
 * With "make" it is given one: the enabled host with the most room that fits,
 * which also becomes the row's region.  Returns false when that could not be
 * done, with "failure" a failed step that says why: capacity, or transient where
 * somebody has the hosts locked, since the engine waits for nobody's lock.
 * Inside a scope, with the session's row locked.
 */
extern bool placement_of(SessionRow *row, bool make, ProviderHost **host, ProviderStep *failure);

/* The host of a session's VM, or NULL, for whoever may wait for locks.  Inside a scope. */
extern ProviderHost *placement_host(const pg_uuid_t *session_id);

/* The host of that name, enabled or not, or NULL.  Inside a scope. */
extern ProviderHost *placement_host_named(const char *name);

/* All enabled hosts, a List of ProviderHost *, by name.  Inside a scope. */
extern List *placement_hosts(void);

/*
 * Raise AV010 when no host is enabled, AV012 when no enabled one could hold a VM
 * of this size even if it were empty.  Inside a scope.
 */
extern void placement_check(const char *provider, int vcpus, int memory_mib);

/* Note whether guests run under KVM on a host (1, -1; 0: nothing learned).  Inside a scope. */
extern void placement_learn_kvm(const ProviderHost *host, int kvm);

#endif /* AGENTVM_ENGINE_PLACEMENT_H */
