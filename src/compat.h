/*-------------------------------------------------------------------------
 *
 * compat.h
 *		Every difference between PostgreSQL 14 and 18 that agentvm meets.
 *
 * No other file tests PG_VERSION_NUM.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_COMPAT_H
#define AGENTVM_COMPAT_H

#include "access/xact.h"
#include "catalog/pg_database.h"
#include "common/jsonapi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "utils/acl.h"
#include "utils/guc.h"
#include "utils/wait_event.h"
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

/* 16 gave worker entry points and exported symbols one marker for all platforms; 14 has it too. */
#ifndef PGDLLEXPORT
#define PGDLLEXPORT
#endif

/* 15 renamed the call that reserves a prefix of settings. */
#if PG_VERSION_NUM < 150000
#define MarkGUCPrefixReserved(prefix) EmitWarningsOnPlaceholders(prefix)
#endif

/* 15 asks for shared memory in a hook of its own; before, _PG_init did it. */
#if PG_VERSION_NUM >= 150000
#define AVM_HAVE_SHMEM_REQUEST_HOOK 1
#endif

/* 16 merged the ownership checks of all kinds of objects. */
#if PG_VERSION_NUM >= 160000
#define AvmOwnsDatabase(database, role) object_ownercheck(DatabaseRelationId, database, role)
#else
#define AvmOwnsDatabase(database, role) pg_database_ownercheck(database, role)
#endif

/* 15.4 and its contemporaries mark a database whose DROP was interrupted; older ones never have it. */
#ifdef DATCONNLIMIT_INVALID_DB
#define AVM_CONNLIMIT_INVALID_DB DATCONNLIMIT_INVALID_DB
#else
#define AVM_CONNLIMIT_INVALID_DB (-2)
#endif

/* 17 gives extensions wait events of their own name. */
#if PG_VERSION_NUM >= 170000
#define AvmWaitEvent(name) WaitEventExtensionNew(name)
#else
#define AvmWaitEvent(name) ((uint32) PG_WAIT_EXTENSION)
#endif

/* 17 moved the local transaction id into a struct. */
#if PG_VERSION_NUM >= 170000
#define AvmLocalTransactionId() (MyProc->vxid.lxid)
#else
#define AvmLocalTransactionId() (MyProc->lxid)
#endif

/* 16 lets the actions of the JSON parser fail. */
#if PG_VERSION_NUM >= 160000
typedef JsonParseErrorType JsonActionResult;
#define JSON_ACTION_OK JSON_SUCCESS
#else
typedef void JsonActionResult;
#define JSON_ACTION_OK
#endif

/* 17 lets the caller bring the lexer's struct. */
#if PG_VERSION_NUM >= 170000
#define AvmJsonLexer(json, len, encoding)                                                          \
	makeJsonLexContextCstringLen(NULL, json, len, encoding, true)
#else
#define AvmJsonLexer(json, len, encoding) makeJsonLexContextCstringLen(json, len, encoding, true)
#endif

/* 18 puts the marker before a declaration; gcc's form of it, which the others know, can stand there too. */
#if PG_VERSION_NUM < 180000
#define pg_noreturn pg_attribute_noreturn()
#endif

/* 18 can count what an index scan does. */
#if PG_VERSION_NUM >= 180000
#define AvmIndexBeginscan(table, index, snapshot, nkeys)                                           \
	index_beginscan(table, index, snapshot, NULL, nkeys, 0)
#else
#define AvmIndexBeginscan(table, index, snapshot, nkeys)                                           \
	index_beginscan(table, index, snapshot, nkeys, 0)
#endif

/* 18 carries the extension's name and version in the magic block. */
#if PG_VERSION_NUM >= 180000
#define AVM_MODULE_MAGIC(modname, modversion)                                                      \
	PG_MODULE_MAGIC_EXT(.name = modname, .version = modversion)
#else
#define AVM_MODULE_MAGIC(modname, modversion) PG_MODULE_MAGIC
#endif

/* Of libpq/libpq.h, which is of no use where GSSAPI's headers are not installed. */
extern bool pq_check_connection(void);

#endif /* AGENTVM_COMPAT_H */
