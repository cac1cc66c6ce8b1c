/*-------------------------------------------------------------------------
 *
 * sessions.h
 *		Who is who, and heartbeats: gathered, flushed in one call, then acknowledged.
 *
 *-------------------------------------------------------------------------
 */
#ifndef GATEWAY_SESSIONS_H
#define GATEWAY_SESSIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "database.h"

#define HASH_LEN 32

typedef struct Sessions Sessions;
typedef struct Session Session;
typedef struct Request Request;

typedef enum Outcome
{
	OUTCOME_OK,
	OUTCOME_UNKNOWN, /* no such token, or not this one's to use */
	OUTCOME_GONE,	 /* the session has ended */
	OUTCOME_NOT_READY,
	OUTCOME_BAD, /* the request makes no sense to the database */
	OUTCOME_AWAY /* the database is away, or nobody knows: try again */
} Outcome;

/*
 * What came of a request.  "session" is there with OUTCOME_OK and _GONE, valid
 * during the call; "body" with OUTCOME_OK: JSON for the client, of a heartbeat
 * {"deadline"}, of a bootstrap or hydration the database's answer.
 */
typedef void (*RequestDone)(void *arg, Outcome outcome, Session *session, const char *body);

typedef struct SessionEvents
{
	void (*ended)(void *attached);	 /* a session has ended while something is attached to it */
	void (*claimed)(void *attached); /* the same of one that was warm, and has been taken */
	void (*up)(void *arg);			 /* the database is there, or there again */
	void *arg;
} SessionEvents;

/* "events" is copied. */
extern Sessions *sessions_create(uv_loop_t *loop, const char *conninfo, const char *name,
								 const SessionEvents *events);
extern void sessions_destroy(Sessions *sessions);

/*
 * What time it is, in seconds since 1970, by the database's clock, which deadlines
 * are meant by; by our own until the database has been heard.
 */
extern time_t sessions_time(const Sessions *sessions);

/* Whether the database can be asked now. */
extern bool sessions_ready(const Sessions *sessions);

/*
 * Ask the database; "done" is called once, later or before this returns, unless
 * request_forget() is called first.  Returns NULL if it has been called already.
 */
extern Request *sessions_bootstrap(Sessions *sessions, const uint8_t *token_hash,
								   const uint8_t *session_hash, const char *boot_id,
								   const char *info, RequestDone done, void *arg);
extern Request *sessions_authenticate(Sessions *sessions, const uint8_t *hash, RequestDone done,
									  void *arg);

/* What a warm VM needs once it has been taken; or, with a problem, that it cannot be used. */
extern Request *sessions_hydrate(Sessions *sessions, const uint8_t *hash, const char *problem,
								 RequestDone done, void *arg);

/* A sign of life: "done" follows when it has been committed. */
extern Request *sessions_heartbeat(Sessions *sessions, const uint8_t *hash, RequestDone done,
								   void *arg);

/* Whether the session of this token is remembered: the database need not be asked whose it is. */
extern bool sessions_know(Sessions *sessions, const uint8_t *hash);

/* Nobody waits for the answer any more; what was asked may still take effect. */
extern void request_forget(Request *request);

/*
 * Attach something (a channel) to a session; returns what was attached before,
 * or NULL.  It is told of the session's end through SessionEvents, and the database
 * that the session is to be found here.
 */
extern void *session_attach(Sessions *sessions, Session *session, void *attached);

/* Detach it, if it is still what is attached. */
extern void session_detach(Session *session, void *attached);

/* Call "tell" for everything that is attached. */
extern void sessions_each_attached(Sessions *sessions, void (*tell)(void *attached));

/* The session of that id, if it is remembered, or NULL; valid until the loop goes on. */
extern Session *sessions_find(Sessions *sessions, const char *id);

/* What is attached to a session, or NULL; whether it has ended, as far as is known. */
extern void *session_attached(const Session *session);
extern bool session_has_ended(const Session *session);

/*
 * Whether its VM may tell of one more end of a command: so many at once, as a runtime
 * may have to say after an outage, then no more than a few a second and one for each
 * session_expect_end().
 */
extern bool session_may_tell_end(Sessions *sessions, Session *session);
extern void session_expect_end(Session *session);

/* The connection that all this uses, for what else a gateway asks. */
extern Database *sessions_database(Sessions *sessions);

/* What the result of a query means; NULL is a lost connection.  What is unexpected is logged. */
extern Outcome sessions_outcome(const PGresult *result);

/* Whether it is the text of a uuid as PostgreSQL writes it. */
extern bool is_uuid(const char *text);

/* The session's id as text, 36 characters. */
extern const char *session_id_text(const Session *session);

typedef struct SessionCounts
{
	uint64_t bootstraps, heartbeats, batches, failed_batches, ended;
	unsigned known, waiting;
} SessionCounts;

extern SessionCounts sessions_counts(const Sessions *sessions);

#endif /* GATEWAY_SESSIONS_H */
