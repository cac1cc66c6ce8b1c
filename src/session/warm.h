/*-------------------------------------------------------------------------
 *
 * warm.h
 *		Taking a warm VM for a request, instead of booting another.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_WARM_H
#define AGENTVM_WARM_H

#include "agentvm.h"

#include "datatype/timestamp.h"
#include "session/request.h"

/*
 * Whether the team has warm VMs, of whatever shape, that are ours to give: those of a copied
 * database are the other one's, too.  Costs next to nothing where there are none.
 * Inside a db scope.
 */
extern bool warm_may_take(const char *team_id);

/* What a claim goes by, and what it writes. */
typedef struct WarmClaim
{
	const Request *request;
	const bytea *shape;
	bytea *hash; /* of the request; NULL: it has no key */
	Name created_by;
	bool runtime;
	bool has_payload;
	TimestampTz now;
	TimestampTz deadline;
	TimestampTz ceiling;
} WarmClaim;

/*
 * Take the oldest warm VM of that shape into *id, without waiting for anybody; a
 * rollback gives it back.  False: there is none.  With a key it may instead be the session of
 * somebody who has committed the same request meanwhile; raises AV008 and 40001 as
 * request_find() and request_raise_conflict().  Inside a db scope.
 */
extern bool warm_claim(const WarmClaim *claim, pg_uuid_t *id);

/* Whether the open transaction has taken this session, which was warm. */
extern bool warm_claimed_here(const pg_uuid_t *id);

/*
 * The runtime of a session has come for what the session was taken with; raises 55P03 where
 * somebody is ending it for not having done so, or the same is under way.  Nothing
 * to do where it has come before, or the VM was never warm.  Inside a db scope.
 */
extern void warm_hydrated(const pg_uuid_t *id);

/* Whether a session's VM was warm, and its runtime has not come yet for what it was taken with. */
extern bool warm_is_hydrating(const pg_uuid_t *id);

#endif /* AGENTVM_WARM_H */
