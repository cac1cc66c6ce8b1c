/*-------------------------------------------------------------------------
 *
 * sessions.c
 *		Who is who, and heartbeats: gathered, flushed in one call, then acknowledged.
 *
 * A session token's hash is looked up once and then remembered.  Heartbeats wait
 * for at most FLUSH_MS, then go to the database in one statement that also reads
 * the deadlines; only its result, which means that it has committed, is passed
 * on.  A session that the result lacks has ended.
 *
 * Nothing here is needed to survive: what a gateway has forgotten it asks anew.
 *
 *-------------------------------------------------------------------------
 */
#include "sessions.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <endian.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <uthash.h>
#include <utlist.h>

#include "../common/log.h"

#define FLUSH_MS 50			   /* gather heartbeats for so long */
#define MAX_BATCH 2000		   /* heartbeats in one statement */
#define REPORT_MS 10000		   /* an empty batch says that we listen */
#define FORGET_MS (10 * 60000) /* of a session that nobody has mentioned since */
#define ATTACH_MS 10		   /* gather sessions to be attached for so long */
#define ENDS_AT_ONCE 1024	   /* of commands, that a VM may tell of */
#define ENDS_PER_SECOND 20	   /* and then */
#define UUID_LEN 16

/* OIDs of PostgreSQL's built-in types, which never change (catalog/pg_type.dat) */
#define BYTEA_OID 17
#define TEXT_OID 25
#define UUID_OID 2950
#define UUID_ARRAY_OID 2951

#define PG_EPOCH INT64_C(946684800) /* 2000-01-01 in seconds since 1970 */

struct Session
{
	uint8_t hash[HASH_LEN]; /* key of by_hash */
	uint8_t id[UUID_LEN];	/* key of by_id */
	char id_text[37];
	void *attached;
	int users; /* requests and batches that point here */
	bool has_ended;
	bool attach_due; /* the database has to hear that it is here */
	float ends;		 /* of commands, that its VM may tell of now */
	uint64_t ends_at;
	uint64_t mentioned_at;
	UT_hash_handle hh;	  /* by hash */
	UT_hash_handle hh_id; /* by id */
};

struct Request
{
	Sessions *sessions;
	RequestDone done; /* NULL: nobody waits any more */
	void *arg;
	uint8_t hash[HASH_LEN]; /* of the session token */
	Session *session;
	bool beats; /* goes on as a heartbeat once it is known who it is */
	Request *prev, *next;
};

struct Sessions
{
	uv_loop_t *loop;
	Database *database;
	SessionEvents events;
	Session *by_hash;
	Session *by_id;
	Request *gathered; /* heartbeats for the next batch */
	int gathered_count;
	uint64_t last_batch_at;
	int64_t clock; /* the database's, less the loop's: milliseconds since 1970; 0: not known yet */
	uv_timer_t *flush;
	uv_timer_t *tick;
	uv_timer_t *attach;
	bool any_attach_due;
	SessionCounts counts;
};

/* Heartbeats on their way to the database, or only the question which of these sessions live. */
typedef struct Batch
{
	Sessions *sessions;
	Request *requests;
	bool beats;
} Batch;

/* ---- sessions ---- */

static void
id_to_text(const uint8_t *id, char *text)
{
	int i;

	for (i = 0; i < UUID_LEN; i++)
	{
		if (i == 4 || i == 6 || i == 8 || i == 10)
			*text++ = '-';
		text += sprintf(text, "%02x", id[i]);
	}
}

static bool
id_from_text(const char *text, uint8_t *id)
{
	unsigned byte;
	int i;

	for (i = 0; i < UUID_LEN; i++)
	{
		if ((i == 4 || i == 6 || i == 8 || i == 10) && *text++ != '-')
			return false;
		if (!isxdigit((unsigned char) text[0]) || !isxdigit((unsigned char) text[1]) ||
			sscanf(text, "%2x", &byte) != 1)
			return false;
		id[i] = (uint8_t) byte;
		text += 2;
	}
	return *text == '\0';
}

/* The session of that id, made if it is new, known by this token from now on. */
static Session *
remember(Sessions *sessions, const uint8_t *id, const uint8_t *hash)
{
	Session *session;

	HASH_FIND(hh_id, sessions->by_id, id, UUID_LEN, session);
	if (session == NULL)
	{
		session = calloc(1, sizeof(Session));
		memcpy(session->id, id, UUID_LEN);
		memcpy(session->hash, hash, HASH_LEN);
		id_to_text(id, session->id_text);
		session->ends = ENDS_AT_ONCE;
		session->ends_at = uv_now(sessions->loop);
		HASH_ADD(hh_id, sessions->by_id, id, UUID_LEN, session);
		HASH_ADD(hh, sessions->by_hash, hash, HASH_LEN, session);
	}
	session->mentioned_at = uv_now(sessions->loop);
	return session;
}

static Session *
find(Sessions *sessions, const uint8_t *hash)
{
	Session *session;

	HASH_FIND(hh, sessions->by_hash, hash, HASH_LEN, session);
	if (session != NULL)
		session->mentioned_at = uv_now(sessions->loop);
	return session;
}

/* Take it out of the tables; it is freed when nobody points to it any more. */
static void
forget(Sessions *sessions, Session *session)
{
	HASH_DELETE(hh, sessions->by_hash, session);
	HASH_DELETE(hh_id, sessions->by_id, session);
	free(session);
}

/* The session has ended: whatever is attached hears of it. */
static void
end(Sessions *sessions, Session *session)
{
	void *attached = session->attached;

	if (session->has_ended)
		return;
	session->has_ended = true;
	session->attached = NULL;
	sessions->counts.ended++;
	log_line(LOG_LEVEL_INFO, "session has ended", "session", session->id_text, NULL);
	if (attached != NULL)
		sessions->events.ended(attached);
}

Session *
sessions_find(Sessions *sessions, const char *id)
{
	uint8_t bytes[UUID_LEN];
	Session *session = NULL;

	if (id_from_text(id, bytes))
		HASH_FIND(hh_id, sessions->by_id, bytes, UUID_LEN, session);
	return session;
}

void *
session_attached(const Session *session)
{
	return session->attached;
}

bool
session_has_ended(const Session *session)
{
	return session->has_ended;
}

bool
session_may_tell_end(Sessions *sessions, Session *session)
{
	uint64_t now = uv_now(sessions->loop);

	if (session->ends < ENDS_AT_ONCE)
	{
		session->ends += (float) (now - session->ends_at) * ENDS_PER_SECOND / 1000;
		if (session->ends > ENDS_AT_ONCE)
			session->ends = ENDS_AT_ONCE;
	}
	session->ends_at = now;
	if (session->ends < 1)
		return false;
	session->ends -= 1;
	return true;
}

void
session_expect_end(Session *session)
{
	session->ends += 1;
}

Database *
sessions_database(Sessions *sessions)
{
	return sessions->database;
}

bool
is_uuid(const char *text)
{
	uint8_t id[UUID_LEN];
	char canonical[37];

	if (!id_from_text(text, id))
		return false;
	id_to_text(id, canonical);
	return strcmp(canonical, text) == 0;
}

void
session_detach(Session *session, void *attached)
{
	if (session->attached == attached)
		session->attached = NULL;
}

void
sessions_each_attached(Sessions *sessions, void (*tell)(void *attached))
{
	Session *session, *next;

	HASH_ITER(hh, sessions->by_hash, session, next)
	{
		if (session->attached != NULL)
			tell(session->attached);
	}
}

const char *
session_id_text(const Session *session)
{
	return session->id_text;
}

/* ---- requests ---- */

static Request *
make_request(Sessions *sessions, const uint8_t *hash, RequestDone done, void *arg)
{
	Request *request = calloc(1, sizeof(Request));

	request->sessions = sessions;
	request->done = done;
	request->arg = arg;
	memcpy(request->hash, hash, HASH_LEN);
	sessions->counts.waiting++;
	return request;
}

static void
set_session(Request *request, Session *session)
{
	request->session = session;
	session->users++;
}

static void
finish(Request *request, Outcome outcome, const char *body)
{
	Session *session = request->session;

	request->sessions->counts.waiting--;
	if (request->done != NULL)
		request->done(request->arg, outcome, session, body);
	if (session != NULL)
		session->users--;
	free(request);
}

void
request_forget(Request *request)
{
	request->done = NULL;
}

static const char *
sqlstate(const PGresult *result)
{
	const char *state = PQresultErrorField(result, PG_DIAG_SQLSTATE);

	return state ? state : "";
}

Outcome
sessions_outcome(const PGresult *result)
{
	const char *state;

	if (result == NULL)
		return OUTCOME_AWAY;
	if (PQresultStatus(result) == PGRES_TUPLES_OK)
		return PQntuples(result) > 0 && !PQgetisnull(result, 0, 0) ? OUTCOME_OK : OUTCOME_UNKNOWN;
	state = sqlstate(result);
	if (strcmp(state, "AV006") == 0)
		return OUTCOME_GONE;
	if (strcmp(state, "AV005") == 0)
		return OUTCOME_UNKNOWN;
	if (strcmp(state, "AV007") == 0)
		return OUTCOME_NOT_READY;
	if (strncmp(state, "22", 2) == 0 || strcmp(state, "AV012") == 0)
		return OUTCOME_BAD;
	if (strcmp(state, "55P03") == 0)
		return OUTCOME_AWAY; /* somebody has the session's row: no news, it is tried again */
	log_line(LOG_LEVEL_WARNING, "database refuses a call", "sqlstate", state, "reason",
			 PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY), NULL);
	return OUTCOME_AWAY;
}

/* ---- bootstrap ---- */

/* The database has answered with a document and the session's id, or not. */
static void
pass_on(Request *request, const PGresult *result, const char *what)
{
	Outcome outcome = sessions_outcome(result);

	if (outcome == OUTCOME_OK)
	{
		set_session(request, remember(request->sessions, (const uint8_t *) PQgetvalue(result, 0, 1),
									  request->hash));
		log_line(LOG_LEVEL_INFO, what, "session", request->session->id_text, NULL);
		finish(request, OUTCOME_OK, PQgetvalue(result, 0, 0));
	}
	else
		finish(request, outcome, NULL);
}

static void
bootstrap_answered(void *arg, const PGresult *result)
{
	Request *request = arg;

	request->sessions->counts.bootstraps += sessions_outcome(result) == OUTCOME_OK;
	pass_on(request, result, "bootstrap");
}

static void
hydration_answered(void *arg, const PGresult *result)
{
	if (sessions_outcome(result) == OUTCOME_OK && PQgetvalue(result, 0, 2)[0] == 0)
		finish(arg, OUTCOME_NOT_READY, NULL);
	else
		pass_on(arg, result, "hydration");
}

Request *
sessions_bootstrap(Sessions *sessions, const uint8_t *token_hash, const uint8_t *session_hash,
				   const char *boot_id, const char *info, RequestDone done, void *arg)
{
	static const Oid types[] = {BYTEA_OID, BYTEA_OID, TEXT_OID, TEXT_OID};
	const char *values[] = {(const char *) token_hash, (const char *) session_hash, boot_id, info};
	const int lengths[] = {HASH_LEN, HASH_LEN, (int) strlen(boot_id), (int) strlen(info)};
	const int formats[] = {1, 1, 1, 1};
	Request *request = make_request(sessions, session_hash, done, arg);

	if (database_send(sessions->database,
					  "SELECT a::text, (a->>'session_id')::uuid FROM "
					  "agentvm.bootstrap($1, $2, $3, $4::jsonb) a",
					  4, types, values, lengths, formats, bootstrap_answered, request))
		return request;
	finish(request, OUTCOME_AWAY, NULL);
	return NULL;
}

Request *
sessions_hydrate(Sessions *sessions, const uint8_t *hash, const char *problem, RequestDone done,
				 void *arg)
{
	static const Oid types[] = {BYTEA_OID, TEXT_OID};
	const char *values[] = {(const char *) hash, problem};
	const int lengths[] = {HASH_LEN, problem != NULL ? (int) strlen(problem) : 0};
	const int formats[] = {1, 1};
	Request *request = make_request(sessions, hash, done, arg);

	if (database_send(sessions->database,
					  "SELECT a::text, (a->>'session_id')::uuid, a ? 'env' "
					  "FROM agentvm.hydrate($1, $2) a",
					  2, types, values, lengths, formats, hydration_answered, request))
		return request;
	finish(request, OUTCOME_AWAY, NULL);
	return NULL;
}

/* ---- heartbeats ---- */

static void
put_int32(char **at, uint32_t value)
{
	value = htonl(value);
	memcpy(*at, &value, 4);
	*at += 4;
}

/* A timestamptz as PostgreSQL sends it: microseconds since 2000. */
static int64_t
get_micros(const char *value)
{
	uint64_t bits;

	memcpy(&bits, value, 8);
	return (int64_t) be64toh(bits);
}

/* Note what time it is in the database. */
static void
set_clock(Sessions *sessions, const char *value)
{
	uv_update_time(sessions->loop);
	sessions->clock =
		(int64_t) PG_EPOCH * 1000 + get_micros(value) / 1000 - (int64_t) uv_now(sessions->loop);
}

time_t
sessions_time(const Sessions *sessions)
{
	if (sessions->clock == 0)
		return time(NULL);
	return (time_t) ((sessions->clock + (int64_t) uv_now(sessions->loop)) / 1000);
}

/* {"deadline": "2026-01-31T12:34:56.789Z"} */
static void
deadline_body(const char *value, char *body, size_t size)
{
	int64_t micros = get_micros(value);
	time_t seconds;
	struct tm utc;
	char stamp[32];

	seconds = PG_EPOCH + (micros >= 0 ? micros / 1000000 : -((-micros + 999999) / 1000000));
	gmtime_r(&seconds, &utc);
	strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &utc);
	snprintf(body, size, "{\"deadline\": \"%s.%03dZ\"}", stamp,
			 (int) (((micros % 1000000) + 1000000) % 1000000 / 1000));
}

static int
compare_ids(const Request *a, const Request *b)
{
	return memcmp(a->session->id, b->session->id, UUID_LEN);
}

/* The batch has committed (or not): the result has a row for each session that lives, sorted by id as the batch is. */
static void
batch_answered(void *arg, const PGresult *result)
{
	Batch *batch = arg;
	Sessions *sessions = batch->sessions;
	bool ok = result != NULL && PQresultStatus(result) == PGRES_TUPLES_OK;
	int rows = ok ? PQntuples(result) : 0;
	int row = 0;
	Request *request, *next;

	if (!ok)
	{
		sessions->counts.failed_batches += batch->beats;
		(void) sessions_outcome(result); /* tells why */
	}
	if (rows > 0)
		set_clock(sessions, PQgetvalue(result, 0, 2));
	DL_FOREACH_SAFE(batch->requests, request, next)
	{
		char body[64];

		DL_DELETE(batch->requests, request);
		if (!ok)
		{
			finish(request, OUTCOME_AWAY, NULL);
			continue;
		}
		while (row < rows && memcmp(PQgetvalue(result, row, 0), request->session->id, UUID_LEN) < 0)
			row++;
		if (row < rows && memcmp(PQgetvalue(result, row, 0), request->session->id, UUID_LEN) == 0)
		{
			sessions->counts.heartbeats += batch->beats;
			deadline_body(PQgetvalue(result, row, 1), body, sizeof(body));
			finish(request, OUTCOME_OK, body);
		}
		else
		{
			end(sessions, request->session);
			finish(request, OUTCOME_GONE, NULL);
		}
	}
	free(batch);
}

/*
 * The binary form of a uuid[] in malloc'ed memory, with room for so many: dimensions,
 * flags, element type, length and lower bound, then the elements that are put there.
 */
#define ARRAY_HEAD 20

static char *
make_array(size_t room)
{
	return calloc(1, ARRAY_HEAD + room * (4 + UUID_LEN));
}

static void
put_id(char **at, const uint8_t *id)
{
	put_int32(at, UUID_LEN);
	memcpy(*at, id, UUID_LEN);
	*at += UUID_LEN;
}

/* Its head; returns its length. */
static int
finish_array(char *array, size_t count)
{
	char *at = array;

	put_int32(&at, count > 0 ? 1 : 0);
	put_int32(&at, 0);
	put_int32(&at, UUID_OID);
	put_int32(&at, (uint32_t) count);
	put_int32(&at, 1);
	return count > 0 ? (int) (ARRAY_HEAD + count * (4 + UUID_LEN)) : 12;
}

/* Send these, whose order is changed. */
static void
send_batch(Sessions *sessions, Request *requests, bool beats)
{
	static const char beat[] =
		/* NULL: the time is the server's, whatever our clock says */
		"WITH b AS MATERIALIZED (SELECT count(*) AS gone FROM agentvm.heartbeat_batch($1, "
		"array_fill(NULL::timestamptz, ARRAY[cardinality($1)]))) "
		"SELECT d.session_id, d.deadline_at, clock_timestamp() FROM b, agentvm.deadlines($1) d "
		"WHERE b.gone >= 0 ORDER BY d.session_id";
	static const char look[] =
		"SELECT d.session_id, d.deadline_at, clock_timestamp() FROM agentvm.deadlines($1) d "
		"ORDER BY d.session_id";
	static const Oid types[] = {UUID_ARRAY_OID};
	Batch *batch = calloc(1, sizeof(Batch));
	Request *request, *previous = NULL;
	const char *values[1];
	int lengths[1];
	const int formats[] = {1};
	char *array, *at;
	int count = 0;

	batch->sessions = sessions;
	batch->requests = requests;
	batch->beats = beats;
	DL_SORT(batch->requests, compare_ids);

	DL_FOREACH(batch->requests, request)
	count++;
	array = make_array((size_t) count);
	at = array + ARRAY_HEAD;
	count = 0;
	DL_FOREACH(batch->requests, request)
	{
		if (previous != NULL && compare_ids(previous, request) == 0)
			continue;
		put_id(&at, request->session->id);
		count++;
		previous = request;
	}
	values[0] = array;
	lengths[0] = finish_array(array, (size_t) count);

	if (!database_send(sessions->database, beats ? beat : look, 1, types, values, lengths, formats,
					   batch_answered, batch))
		batch_answered(batch, NULL);
	free(array);
}

/* Send what has been gathered, also if that is nothing. */
static void
flush_batch(Sessions *sessions)
{
	Request *gathered = sessions->gathered;

	uv_timer_stop(sessions->flush);
	sessions->gathered = NULL;
	sessions->gathered_count = 0;
	sessions->last_batch_at = uv_now(sessions->loop);
	sessions->counts.batches++;
	send_batch(sessions, gathered, true);
}

static void
on_flush(uv_timer_t *timer)
{
	flush_batch(timer->data);
}

static void
gather(Request *request)
{
	Sessions *sessions = request->sessions;

	/* before this one is in it: whoever has it gathered expects no answer yet */
	if (sessions->gathered_count >= MAX_BATCH)
		flush_batch(sessions);
	DL_APPEND(sessions->gathered, request);
	if (++sessions->gathered_count == 1)
		uv_timer_start(sessions->flush, on_flush, FLUSH_MS, 0);
}

/* ---- who is it? ---- */

static void
authenticated(void *arg, const PGresult *result)
{
	Request *request = arg;
	Outcome outcome = sessions_outcome(result);

	if (outcome == OUTCOME_OK)
		set_session(request, remember(request->sessions, (const uint8_t *) PQgetvalue(result, 0, 0),
									  request->hash));
	if (outcome == OUTCOME_OK && request->beats && request->done != NULL)
		gather(request);
	else
		finish(request, outcome, NULL);
}

static Request *
ask(Sessions *sessions, const uint8_t *hash, bool beats, RequestDone done, void *arg)
{
	static const Oid types[] = {BYTEA_OID};
	const char *values[] = {(const char *) hash};
	const int lengths[] = {HASH_LEN};
	const int formats[] = {1};
	Request *request = make_request(sessions, hash, done, arg);
	Session *session = find(sessions, hash);

	request->beats = beats;
	if (!database_is_up(sessions->database))
	{
		finish(request, OUTCOME_AWAY, NULL);
		return NULL;
	}
	if (session != NULL && session->has_ended)
	{
		finish(request, OUTCOME_GONE, NULL);
		return NULL;
	}
	if (session != NULL)
	{
		set_session(request, session);
		if (beats)
		{
			gather(request);
			return request;
		}
		finish(request, OUTCOME_OK, NULL);
		return NULL;
	}
	if (database_send(sessions->database, "SELECT agentvm.authenticate($1)", 1, types, values,
					  lengths, formats, authenticated, request))
		return request;
	finish(request, OUTCOME_AWAY, NULL);
	return NULL;
}

Request *
sessions_authenticate(Sessions *sessions, const uint8_t *hash, RequestDone done, void *arg)
{
	return ask(sessions, hash, false, done, arg);
}

Request *
sessions_heartbeat(Sessions *sessions, const uint8_t *hash, RequestDone done, void *arg)
{
	return ask(sessions, hash, true, done, arg);
}

bool
sessions_know(Sessions *sessions, const uint8_t *hash)
{
	return find(sessions, hash) != NULL;
}

/* ---- where sessions are to be found ---- */

typedef struct Attachment
{
	Sessions *sessions;
	int count;
	uint8_t ids[][UUID_LEN];
} Attachment;

static void
attach_answered(void *arg, const PGresult *result)
{
	Attachment *attachment = arg;
	Sessions *sessions = attachment->sessions;
	int i;

	/* it returns void: a row that is empty */
	if (result == NULL || PQresultStatus(result) != PGRES_TUPLES_OK)
	{
		(void) sessions_outcome(result); /* tells why */
		for (i = 0; i < attachment->count; i++)
		{
			Session *session;

			HASH_FIND(hh_id, sessions->by_id, attachment->ids[i], UUID_LEN, session);
			if (session != NULL)
				session->attach_due = sessions->any_attach_due =
					true; /* at the next tick, or when the database is there */
		}
	}
	free(attachment);
}

static void
send_attachment(Attachment *attachment)
{
	static const Oid types[] = {UUID_ARRAY_OID};
	static const int formats[] = {1};
	char *array = make_array((size_t) attachment->count);
	const char *values[] = {array};
	char *at = array + ARRAY_HEAD;
	int lengths[1];
	int i;

	for (i = 0; i < attachment->count; i++)
		put_id(&at, attachment->ids[i]);
	lengths[0] = finish_array(array, (size_t) attachment->count);
	if (!database_send(attachment->sessions->database, "SELECT agentvm.attach($1)", 1, types,
					   values, lengths, formats, attach_answered, attachment))
		attach_answered(attachment, NULL);
	free(array);
}

/* Tell the database of those that it has to hear of. */
static void
attach_due(Sessions *sessions)
{
	const size_t size = sizeof(Attachment) + MAX_BATCH * UUID_LEN;
	Attachment *attachment = NULL;
	Session *session, *next;

	if (!sessions->any_attach_due || !database_is_up(sessions->database))
		return;
	sessions->any_attach_due = false;
	HASH_ITER(hh, sessions->by_hash, session, next)
	{
		if (!session->attach_due)
			continue;
		session->attach_due = false;
		if (session->attached == NULL || session->has_ended)
			continue;
		if (attachment == NULL)
		{
			attachment = calloc(1, size);
			attachment->sessions = sessions;
		}
		memcpy(attachment->ids[attachment->count++], session->id, UUID_LEN);
		if (attachment->count == MAX_BATCH)
		{
			send_attachment(attachment);
			attachment = NULL;
		}
	}
	if (attachment != NULL)
		send_attachment(attachment);
}

static void
on_attach(uv_timer_t *timer)
{
	attach_due(timer->data);
}

void *
session_attach(Sessions *sessions, Session *session, void *attached)
{
	void *before = session->attached;

	session->attached = attached;
	session->attach_due = sessions->any_attach_due = true;
	if (!uv_is_active((uv_handle_t *) sessions->attach))
		uv_timer_start(sessions->attach, on_attach, ATTACH_MS, 0);
	return before;
}

/* ---- ends that the database tells of ---- */

/* Which sessions have ended while nobody listened? */
static void
look_for_ended(Sessions *sessions)
{
	Request *requests = NULL;
	Session *session, *next;
	int count = 0;

	HASH_ITER(hh, sessions->by_hash, session, next)
	{
		Request *request;

		if (session->has_ended)
			continue;
		request = make_request(sessions, session->hash, NULL, NULL);
		set_session(request, session);
		DL_APPEND(requests, request);
		if (++count == MAX_BATCH)
		{
			send_batch(sessions, requests, false);
			requests = NULL;
			count = 0;
		}
	}
	if (count > 0)
		send_batch(sessions, requests, false);
}

static void
listening(void *arg, const PGresult *result)
{
	if (result != NULL && PQresultStatus(result) != PGRES_COMMAND_OK)
		(void) sessions_outcome(
			result); /* tells why; ends are then noticed at the next heartbeat */
}

static void
channel_answered(void *arg, const PGresult *result)
{
	Sessions *sessions = arg;
	char listen[128];

	if (sessions_outcome(result) != OUTCOME_OK)
		return;
	set_clock(sessions, PQgetvalue(result, 0, 1));
	snprintf(listen, sizeof(listen), "LISTEN \"%.63s\"", PQgetvalue(result, 0, 0));
	(void) database_send(sessions->database, listen, 0, NULL, NULL, NULL, NULL, listening, NULL);
	look_for_ended(sessions); /* after LISTEN, so that none can slip through between them */
}

/* Connected anew: notifications are asked for again, and that we listen is said at once. */
static void
on_up(void *arg)
{
	Sessions *sessions = arg;
	Session *session, *next;

	(void) database_send(sessions->database, "SELECT agentvm.gateway_channel(), clock_timestamp()",
						 0, NULL, NULL, NULL, NULL, channel_answered, sessions);
	flush_batch(sessions);
	/* it may be another server by now, or one that has lost its last commits */
	HASH_ITER(hh, sessions->by_hash, session, next)
	session->attach_due = sessions->any_attach_due = true;
	attach_due(sessions);
	sessions->events.up(sessions->events.arg);
}

/*
 * The payload is the id of a session that has ended or is ending; or, with a word
 * before it, of one that was warm and has been taken.
 */
static void
on_notified(void *arg, const char *channel, const char *payload)
{
	static const char claimed[] = "claimed ";
	bool is_claimed = strncmp(payload, claimed, strlen(claimed)) == 0;
	Sessions *sessions = arg;
	Session *session = sessions_find(sessions, payload + (is_claimed ? strlen(claimed) : 0));

	if (session == NULL)
		return;
	if (!is_claimed)
		end(sessions, session);
	else if (session->attached != NULL)
		sessions->events.claimed(session->attached);
}

/* ---- life ---- */

static void
on_tick(uv_timer_t *timer)
{
	Sessions *sessions = timer->data;
	Session *session, *next;
	uint64_t now = uv_now(sessions->loop);

	HASH_ITER(hh, sessions->by_hash, session, next)
	{
		if (session->users == 0 && session->attached == NULL &&
			now - session->mentioned_at > FORGET_MS)
			forget(sessions, session);
	}
	attach_due(sessions);
	if (database_is_up(sessions->database) && now - sessions->last_batch_at >= REPORT_MS)
		flush_batch(sessions);
}

static void
free_handle(uv_handle_t *handle)
{
	free(handle);
}

static uv_timer_t *
make_timer(Sessions *sessions)
{
	uv_timer_t *timer = calloc(1, sizeof(uv_timer_t));

	timer->data = sessions;
	uv_timer_init(sessions->loop, timer);
	return timer;
}

Sessions *
sessions_create(uv_loop_t *loop, const char *conninfo, const char *name,
				const SessionEvents *session_events)
{
	Sessions *sessions = calloc(1, sizeof(Sessions));
	DatabaseEvents events = {on_up, on_notified, sessions};

	sessions->loop = loop;
	sessions->events = *session_events;
	sessions->flush = make_timer(sessions);
	sessions->tick = make_timer(sessions);
	sessions->attach = make_timer(sessions);
	uv_timer_start(sessions->tick, on_tick, 1000, 1000);
	sessions->database = database_open(loop, conninfo, name, &events);
	return sessions;
}

void
sessions_destroy(Sessions *sessions)
{
	Request *request, *next_request;
	Session *session, *next;

	database_close(sessions->database); /* answers all that is under way */
	DL_FOREACH_SAFE(sessions->gathered, request, next_request)
	{
		DL_DELETE(sessions->gathered, request);
		finish(request, OUTCOME_AWAY, NULL);
	}
	HASH_ITER(hh, sessions->by_hash, session, next)
	forget(sessions, session);
	uv_close((uv_handle_t *) sessions->flush, free_handle);
	uv_close((uv_handle_t *) sessions->tick, free_handle);
	uv_close((uv_handle_t *) sessions->attach, free_handle);
	free(sessions);
}

bool
sessions_ready(const Sessions *sessions)
{
	return database_is_up(sessions->database);
}

SessionCounts
sessions_counts(const Sessions *sessions)
{
	SessionCounts counts = sessions->counts;

	counts.known = HASH_CNT(hh, sessions->by_hash);
	return counts;
}
