/*-------------------------------------------------------------------------
 *
 * purge.h
 *		Taking away what has been kept for long enough.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_PURGE_H
#define AGENTVM_ENGINE_PURGE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "utils/uuid.h"

typedef enum PurgeStage
{
	PURGE_SESSIONS,
	PURGE_EVENTS,
	PURGE_STUBS,
	PURGE_MEMBERS,
	PURGE_TEAMS,
	PURGE_DONE
} PurgeStage;

/* One purge under way. */
typedef struct Purge
{
	PurgeStage stage;
	TimestampTz cutoff; /* what ended, or happened, before it goes */
	pg_uuid_t session;	/* the last one looked at */
	pg_uuid_t last;		/* look no further */
	TimestampTz seal;	/* the age of the last seal looked at */
	bool stubs;			/* some seal has become one */
	int64 removed;		/* sessions and events */
} Purge;

/*
 * Begin to purge what is older than "cutoff".  Sessions are looked for as far as
 * their ids, which begin with the time of creation, are older than it; with "all"
 * among all ids, since others than provision() may have made some of another kind.
 */
extern void purge_begin(Purge *purge, TimestampTz cutoff, bool all);

/*
 * One bounded step of it.  Inside a scope, with AUDIT_PURGE claimed.  Waits for
 * nobody's lock.  Returns whether that was all.
 */
extern bool purge_step(Purge *purge);

#endif /* AGENTVM_ENGINE_PURGE_H */
