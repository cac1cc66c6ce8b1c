/*-------------------------------------------------------------------------
 *
 * state.h
 *		The states of a session, the changes that are allowed, the reasons for an end.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_STATE_H
#define AGENTVM_ENGINE_STATE_H

#include "postgres.h"

#include "providers/error_class.h"

typedef enum SessionState
{
	STATE_PROVISIONING,
	STATE_WARM,
	STATE_READY,
	STATE_PAUSING,
	STATE_PAUSED,
	STATE_RESUMING,
	STATE_TERMINATING,
	STATE_TERMINATED,
	STATE_FAILED
} SessionState;

/* The state of that name; raises an internal error for any other (a CHECK holds the column to these). */
extern SessionState state_parse(const char *name);

/* The state of that name, or -1. */
extern int state_find(const char *name);

/* The name as it stands in column session.state. */
extern const char *state_name(SessionState state);

/* Whether the VM is gone for good: terminated or failed. */
extern bool state_is_ended(SessionState state);

/* Whether design section 6 allows a change from one state to the other. */
extern bool state_may_become(SessionState from, SessionState to);

/* Whether design section 6 knows the reason. */
extern bool reason_is_known(const char *end_reason);

/* The end state that belongs to an end_reason: failed or terminated. */
extern SessionState reason_end_state(const char *end_reason);

/* The SQLSTATE that tells a caller about a session that ended for this reason. */
extern int reason_sqlstate(const char *end_reason);

/* The end_reason that a failed launch gets by the class of its error. */
extern const char *class_end_reason(ErrorClass class);

#endif /* AGENTVM_ENGINE_STATE_H */
