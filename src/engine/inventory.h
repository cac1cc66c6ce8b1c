/*-------------------------------------------------------------------------
 *
 * inventory.h
 *		Lists of the VMs in an account and region, taken by the engine beside its sessions,
 *		or by a backend at once.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_INVENTORY_H
#define AGENTVM_ENGINE_INVENTORY_H

#include "postgres.h"

#include "engine/drift.h"
#include "engine/login.h"
#include "engine/turn.h"

typedef enum InventoryPhase
{
	INVENTORY_LIST, /* what is there */
	INVENTORY_LOOK, /* and what has become of what is missed */
	INVENTORY_REAP	/* end what nobody needs */
} InventoryPhase;

/* One list under way. */
typedef struct Inventory
{
	MemoryContext context; /* its own, with all that follows */
	MemoryContext step;	   /* of the call under way, for its reply, too */
	Place place;
	int64 lease;
	TimestampTz leased_until;
	TimestampTz started_at;
	int failures; /* of lists before */
	InventoryPhase phase;
	Jsonb *handle;
	List *pages;	/* of Jsonb: what the list has told */
	List *missed;	/* vm_ids that it lacks, */
	int asked;		/* so many of which have been asked for, */
	List *looked;	/* and the pages that came of it */
	List *ids;		/* vm_ids of the operation under way */
	List *sessions; /* of those that OP_REAP ends */
	List *reaped;	/* and its pages */
	int vms;
	char *error; /* of what has gone wrong, without stopping it */
	TurnCall call;
	CallRate *rate; /* of the call under way, in "step"; or NULL */
	bool waited;	/* for what the account grants: the next call has had its turn */
	int refused;	/* so often in a row, since the account grants no more */
} Inventory;

/* What a turn of a list needs next; nothing: it is over, or put off, and that has been recorded. */
typedef struct InventoryTurn
{
	HttpRequest *request; /* to be sent after commit; in inventory->step */
	LoginRef wait_for;	  /* without: the next turn is to come when this login is over, */
	TimestampTz later;	  /* or at this time; 0: none is */
} InventoryTurn;

/*
 * Claim up to "limit" lists of a lane that are due, in contexts below "parent"; a List
 * of Inventory *, in CurrentMemoryContext.  Inside a db scope.
 */
extern List *inventory_claim(MemoryContext parent, int lane, int limit);

/* When the next one is due, DT_NOEND: none.  Inside a db scope. */
extern TimestampTz inventory_next(int lane);

/*
 * Take a list a step further: "reply" answers its last request, NULL: begin, or go on after
 * a wait.  What its provider refuses is recorded and ends it.  Its calls take tokens of
 * "rates", as one of "peers" workers, like those of sessions: a list that has nothing yet and
 * finds none is due again when there is one; another one waits with what it has.  NULL:
 * a backend, which knows of no tokens.  Inside a db scope.
 */
extern void inventory_turn(Inventory *inventory, const HttpReply *reply, Rates *rates, int peers,
						   InventoryTurn *turn);

/*
 * Bring agentvm.inventory up to date: where there are sessions, or might be VMs; and look
 * for a failover.  Leaves it alone if somebody else is at it.  Inside a db scope.
 */
extern void inventory_refresh(void);

#endif /* AGENTVM_ENGINE_INVENTORY_H */
