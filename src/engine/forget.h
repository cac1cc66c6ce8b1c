/*-------------------------------------------------------------------------
 *
 * forget.h
 *		Letting go of sessions without a call to their provider.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_FORGET_H
#define AGENTVM_ENGINE_FORGET_H

#include "agentvm.h"

#include "nodes/execnodes.h"

/*
 * Make tombstones (end_reason "orphan") of all live sessions; "detail" says why
 * and by whom.  Those that may have a VM are put into the set, if rsinfo is not
 * NULL: session_id, team_id, provider, vm_id, region.  Waits for whoever has a
 * session locked.  Inside a scope.
 */
extern void forget_sessions(const char *detail, ReturnSetInfo *rsinfo);

/* Refuse, from here on and in this process, to drop the extension while VMs live.  Called from _PG_init. */
extern void forget_guard_init(void);

#endif /* AGENTVM_ENGINE_FORGET_H */
