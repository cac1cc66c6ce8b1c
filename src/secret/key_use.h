/*-------------------------------------------------------------------------
 *
 * key_use.h
 *		What in the database still needs which master key.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SECRET_KEY_USE_H
#define AGENTVM_SECRET_KEY_USE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"

typedef struct KeyUse
{
	char *key_id;
	int64 secrets;	   /* fields of provider_secret */
	int64 payloads;	   /* env and repos of sessions that may still ask for them */
	int64 launches;	   /* launches under way, whose bootstrap token comes from the key */
	TimestampTz until; /* when the last of these has bootstrapped or ended, at the latest */
} KeyUse;

/*
 * The keys that something committed (or written by this transaction) needs, by
 * id, as a palloc'd List of KeyUse *.  Inside a scope.
 */
extern List *key_uses(void);

/* What needs the key, palloc'd: "3 provider secrets, 1 launch (until ...)". */
extern char *key_use_text(const KeyUse *use);

#endif /* AGENTVM_SECRET_KEY_USE_H */
