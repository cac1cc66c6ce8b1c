/*-------------------------------------------------------------------------
 *
 * database_hook.h
 *		Letting go of a database that somebody wants for himself.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_DATABASE_HOOK_H
#define AGENTVM_ENGINE_DATABASE_HOOK_H

/*
 * Install the utility hook; called from _PG_init while preloading.  DROP
 * DATABASE, ALTER DATABASE RENAME and SET TABLESPACE, and CREATE DATABASE
 * TEMPLATE then stop the dispatchers of the database first, from whichever
 * database they are run, and the launcher starts them again when the command is
 * over, whatever its outcome, if the database is still to be served.
 */
extern void database_hook_init(void);

#endif /* AGENTVM_ENGINE_DATABASE_HOOK_H */
