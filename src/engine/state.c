/*-------------------------------------------------------------------------
 *
 * state.c
 *		The states of a session, the changes that are allowed, the reasons for an end.
 *
 *	  provisioning -> ready | warm | terminating
 *	  warm         -> ready | terminating
 *	  ready        -> pausing -> paused -> resuming -> ready
 *	  pausing      -> ready (pause failed), resuming -> paused (resume failed)
 *	  any live     -> terminating -> terminated | failed
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "engine/state.h"

static const char *const state_names[] = {"provisioning", "warm",		"ready",
										  "pausing",	  "paused",		"resuming",
										  "terminating",  "terminated", "failed"};

#define BIT(state) (1 << (state))

/* For each state, the set of states that may follow it. */
static const int may_follow[] = {
	[STATE_PROVISIONING] = BIT(STATE_READY) | BIT(STATE_WARM) | BIT(STATE_TERMINATING),
	[STATE_WARM] = BIT(STATE_READY) | BIT(STATE_TERMINATING),
	[STATE_READY] = BIT(STATE_PAUSING) | BIT(STATE_TERMINATING),
	[STATE_PAUSING] = BIT(STATE_PAUSED) | BIT(STATE_READY) | BIT(STATE_TERMINATING),
	[STATE_PAUSED] = BIT(STATE_RESUMING) | BIT(STATE_TERMINATING),
	[STATE_RESUMING] = BIT(STATE_READY) | BIT(STATE_PAUSED) | BIT(STATE_TERMINATING),
	[STATE_TERMINATING] = BIT(STATE_TERMINATED) | BIT(STATE_FAILED),
	[STATE_TERMINATED] = 0,
	[STATE_FAILED] = 0,
};

int
state_find(const char *name)
{
	int i;

	for (i = 0; i < lengthof(state_names); i++)
	{
		if (strcmp(name, state_names[i]) == 0)
			return i;
	}
	return -1;
}

SessionState
state_parse(const char *name)
{
	int found = state_find(name);

	if (found < 0)
		elog(ERROR, "unknown session state \"%s\"", name);
	return (SessionState) found;
}

const char *
state_name(SessionState state)
{
	return state_names[state];
}

bool
state_is_ended(SessionState state)
{
	return state == STATE_TERMINATED || state == STATE_FAILED;
}

bool
state_may_become(SessionState from, SessionState to)
{
	return (may_follow[from] & BIT(to)) != 0;
}

/* The reasons, whether they are somebody's failure, and what a caller is told of them. */
static const struct
{
	const char *name;
	bool failed;
	int sqlstate;
} reasons[] = {
	{"requested", false, AVM_SESSION_ENDED},
	{"bootstrap_timeout", true, AVM_PROVIDER_ERROR},
	{"heartbeat_timeout", false, AVM_SESSION_ENDED},
	{"max_lifetime", false, AVM_SESSION_ENDED},
	{"idle", false, AVM_SESSION_ENDED},
	{"invalid_credentials", true, AVM_INVALID_CREDENTIALS},
	{"capacity", true, AVM_CAPACITY},
	{"quota", true, AVM_QUOTA},
	{"budget", false, AVM_QUOTA},
	{"provider_error", true, AVM_PROVIDER_ERROR},
	{"provider_lost", true, AVM_PROVIDER_ERROR},
	{"pool_shrunk", false, AVM_SESSION_ENDED},
	{"orphan", false, AVM_SESSION_ENDED},
};

/* Index into reasons[], or -1. */
static int
reason_find(const char *end_reason)
{
	int i;

	for (i = 0; end_reason != NULL && i < lengthof(reasons); i++)
	{
		if (strcmp(end_reason, reasons[i].name) == 0)
			return i;
	}
	return -1;
}

bool
reason_is_known(const char *end_reason)
{
	return reason_find(end_reason) >= 0;
}

SessionState
reason_end_state(const char *end_reason)
{
	int found = reason_find(end_reason);

	return found >= 0 && reasons[found].failed ? STATE_FAILED : STATE_TERMINATED;
}

int
reason_sqlstate(const char *end_reason)
{
	int found = reason_find(end_reason);

	return found >= 0 ? reasons[found].sqlstate : AVM_SESSION_ENDED;
}

const char *
class_end_reason(ErrorClass class)
{
	switch (class)
	{
		case CLASS_CREDENTIALS:
			return "invalid_credentials";
		case CLASS_CAPACITY:
			return "capacity";
		case CLASS_QUOTA:
			return "quota";
		case CLASS_NOT_FOUND:
			return "provider_lost";
		case CLASS_NONE:
		case CLASS_THROTTLED:
		case CLASS_TRANSIENT:
		case CLASS_PERMANENT:
			break;
	}
	return "provider_error";
}
