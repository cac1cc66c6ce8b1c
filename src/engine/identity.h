/*-------------------------------------------------------------------------
 *
 * identity.h
 *		Whether this database is the one that its rows speak of.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_IDENTITY_H
#define AGENTVM_ENGINE_IDENTITY_H

#include "agentvm.h"

typedef enum IdentityState
{
	IDENTITY_UNUSED,   /* nothing has happened here yet, so there is nothing to act on */
	IDENTITY_IN_ORDER, /* act */
	IDENTITY_FOREIGN,  /* a copy, until an administrator has decided what it is to be */
} IdentityState;

/* What an administrator can do about IDENTITY_FOREIGN: a hint. */
#define IDENTITY_HINT                                                                              \
	"Call agentvm.adopt_cluster('takeover') if this database succeeds the one it was copied "      \
	"from, or agentvm.adopt_cluster('fork') if that one lives on."

/*
 * Called from _PG_init in the postmaster, before anything runs: notes it, in a
 * file of the data directory, when this start is one from a backup.  Raises
 * nothing.
 */
extern void identity_init(void);

/*
 * Look at agentvm.installation as it is now.  With IDENTITY_FOREIGN, *problem is
 * what does not match, as a palloc'd phrase; else NULL.  In a transaction; needs no
 * scope, but the extension in this library's version.
 */
extern IdentityState identity_look(char **problem);

/*
 * For functions that act: true when they may, false when there is nothing to act
 * on yet.  Raises 55000 when the database has to be adopted first, and 25006 on
 * a standby; "function" is named in that.
 */
extern bool identity_permits(const char *function);

/*
 * The first call of the API that makes something takes a database into use; a
 * restore never calls it.  Does nothing when sessions have come here otherwise.
 * Costs two look-ups in catalog caches once this process has seen it in use.
 * Inside a scope.
 */
extern void identity_take_into_use(void);

#endif /* AGENTVM_ENGINE_IDENTITY_H */
