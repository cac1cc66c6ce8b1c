/*-------------------------------------------------------------------------
 *
 * database.h
 *		A connection to the database that never blocks and comes back by itself.
 *
 * Queries are pipelined: many may be under way, each in a transaction of its
 * own, answered in the order they were sent.
 *
 *-------------------------------------------------------------------------
 */
#ifndef GATEWAY_DATABASE_H
#define GATEWAY_DATABASE_H

#include <libpq-fe.h>
#include <stdbool.h>
#include <uv.h>

#define DATABASE_MAX_PENDING 32768 /* queries under way at once; more than there are connections */

typedef struct Database Database;

/*
 * What becomes of a query: its result, or NULL when the connection was lost and
 * nobody knows whether it took effect.  The result is freed after the call.
 */
typedef void (*DatabaseAnswer)(void *arg, const PGresult *result);

typedef struct DatabaseEvents
{
	void (*up)(void *arg); /* connected, and after each reconnect */
	void (*notified)(void *arg, const char *channel, const char *payload);
	void *arg;
} DatabaseEvents;

/*
 * Begin to connect; what "conninfo" lacks comes from the environment.  The
 * connection takes the role agentvm_gateway.  Never fails: it tries again.
 * "events" is copied, and its functions may be NULL.
 */
extern Database *database_open(uv_loop_t *loop, const char *conninfo, const char *name,
							   const DatabaseEvents *events);

/* Drop the connection (each query under way is answered with NULL) and free everything. */
extern void database_close(Database *database);

extern bool database_is_up(const Database *database);

/*
 * Send a query with binary results.  values[i] NULL is SQL NULL; formats[i] is
 * 1 for binary.  Returns false, without a call of "answer", when the database is
 * away or too much is under way.
 */
extern bool database_send(Database *database, const char *sql, int count, const Oid *types,
						  const char *const *values, const int *lengths, const int *formats,
						  DatabaseAnswer answer, void *arg);

/*
 * Connect once, blocking for at most 10 s, and see that the role may call what a
 * gateway calls.  Returns NULL, or a malloc'ed text that says what is wrong.
 */
extern char *database_problem(const char *conninfo, const char *name);

#endif /* GATEWAY_DATABASE_H */
