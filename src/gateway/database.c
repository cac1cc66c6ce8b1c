/*-------------------------------------------------------------------------
 *
 * database.c
 *		A connection to the database that never blocks and comes back by itself.
 *
 * libpq in pipeline mode behind one uv_poll.  Connections are made on a thread of
 * libuv's, since libpq waits for names, tickets and files, whatever function begins
 * it.  A query that is not answered within ANSWER_S means that the server or the
 * network hangs: the connection is dropped and made anew, and whoever asked is told
 * that the outcome is unknown.
 *
 *-------------------------------------------------------------------------
 */
#include "database.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../common/log.h"

#define CONNECT_S 10
#define ANSWER_S 15
#define MIN_BACKOFF_MS 200
#define MAX_BACKOFF_MS 5000

/* Everything that a session of ours needs; no other role's rights are in reach afterwards. */
static const char *const set_up[] = {
	"SET ROLE agentvm_gateway",
	"SET search_path = ''",
	"SET statement_timeout = '10s'",
	"SET idle_in_transaction_session_timeout = '10s'",
	"SET default_transaction_isolation = 'read committed'",
	"SET default_transaction_read_only = off",
};
#define NUM_SET_UP ((int) (sizeof(set_up) / sizeof(set_up[0])))

typedef struct Query
{
	DatabaseAnswer answer;
	void *arg;
	uint64_t sent_at; /* ms of the loop's clock */
} Query;

/* One try to connect, on a thread. */
typedef struct Attempt
{
	uv_work_t work;
	Database *database; /* NULL: it has been closed meanwhile */
	char *conninfo;
	char *name;
	PGconn *connection;
} Attempt;

typedef enum Phase
{
	PHASE_AWAY,
	PHASE_CONNECTING,
	PHASE_SETTING_UP,
	PHASE_UP,
	PHASE_CLOSED
} Phase;

struct Database
{
	uv_loop_t *loop;
	char *conninfo;
	char *name;
	DatabaseEvents events;
	Phase phase;
	Attempt *attempt;
	PGconn *connection;
	uv_poll_t
		*poll; /* of the socket; its own allocation, since closing it takes a turn of the loop */
	uv_timer_t *timer; /* next try, or the deadline of what is under way */
	int backoff_ms;
	int set_up_left;
	bool complained;
	Query pending[DATABASE_MAX_PENDING]; /* a ring */
	int first;
	int count;
	PGresult *result; /* the first one's; it counts when the end of its transaction has come, too */
};

static void begin_connecting(Database *database);
static void on_socket(uv_poll_t *poll, int status, int events);

static void
free_handle(uv_handle_t *handle)
{
	free(handle);
}

static void
stop_poll(Database *database)
{
	if (database->poll == NULL)
		return;
	uv_poll_stop(database->poll);
	uv_close((uv_handle_t *) database->poll, free_handle);
	database->poll = NULL;
}

/* Watch the socket for these events. */
static void
watch(Database *database, int events)
{
	if (database->poll == NULL)
	{
		database->poll = calloc(1, sizeof(uv_poll_t));
		database->poll->data = database;
		uv_poll_init(database->loop, database->poll, PQsocket(database->connection));
	}
	uv_poll_start(database->poll, events, on_socket);
}

static void
on_timer(uv_timer_t *timer)
{
	Database *database = timer->data;

	if (database->phase == PHASE_AWAY)
		begin_connecting(database);
}

/* Say so, once. */
static void
complain(Database *database, const char *why)
{
	if (!database->complained)
	{
		char text[512];
		size_t len;

		snprintf(text, sizeof(text), "%s", why);
		for (len = strlen(text); len > 0 && text[len - 1] == '\n'; len--)
			text[len - 1] = '\0';
		log_line(LOG_LEVEL_WARNING, "database is away", "reason", text, NULL);
	}
	database->complained = true;
}

/* The connection is of no use any more: tell everybody, and try again later. */
static void
lose(Database *database, const char *why)
{
	complain(database, why);
	stop_poll(database);
	if (database->connection != NULL)
		PQfinish(database->connection);
	database->connection = NULL;
	database->phase = PHASE_AWAY;
	PQclear(database->result);
	database->result = NULL;
	while (database->count > 0)
	{
		Query query = database->pending[database->first];

		database->first = (database->first + 1) % DATABASE_MAX_PENDING;
		database->count--;
		query.answer(query.arg, NULL);
	}
	database->backoff_ms *= 2;
	if (database->backoff_ms > MAX_BACKOFF_MS)
		database->backoff_ms = MAX_BACKOFF_MS;
	/* some jitter: many gateways lose one server at the same moment */
	uv_timer_start(database->timer, on_timer,
				   database->backoff_ms / 2 + random() % database->backoff_ms, 0);
}

static void
on_too_late(uv_timer_t *timer)
{
	Database *database = timer->data;

	if (database->phase == PHASE_CONNECTING)
		/* no more than that: libpq has a time limit of its own for each host */
		complain(database, "connecting takes long");
	else if (database->count > 0 &&
			 uv_now(database->loop) - database->pending[database->first].sent_at >= ANSWER_S * 1000)
		lose(database, "no answer to a query");
}

static void
set_up_answered(void *arg, const PGresult *result)
{
	Database *database = arg;

	if (result == NULL || database->phase != PHASE_SETTING_UP)
		return;
	if (PQresultStatus(result) != PGRES_COMMAND_OK)
	{
		/* the phase stays: lose() must not be called from within read_results() */
		log_line(LOG_LEVEL_ERROR, "database refuses the gateway", "reason",
				 PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY), "hint",
				 "the role must be a member of agentvm_gateway", NULL);
		database->set_up_left = -1;
		return;
	}
	if (database->set_up_left > 0 && --database->set_up_left == 0)
	{
		database->phase = PHASE_UP;
		database->backoff_ms = MIN_BACKOFF_MS;
		database->complained = false;
		log_line(LOG_LEVEL_INFO, "database is there", NULL);
		if (database->events.up != NULL)
			database->events.up(database->events.arg);
	}
}

static void
flush(Database *database)
{
	int left = PQflush(database->connection);

	if (left < 0)
		lose(database, PQerrorMessage(database->connection));
	else
		watch(database, UV_READABLE | (left > 0 ? UV_WRITABLE : 0));
}

static bool
enqueue(Database *database, const char *sql, int count, const Oid *types, const char *const *values,
		const int *lengths, const int *formats, DatabaseAnswer answer, void *arg)
{
	Query *query;

	if (database->count >= DATABASE_MAX_PENDING ||
		PQsendQueryParams(database->connection, sql, count, types, values, lengths, formats, 1) !=
			1 ||
		PQpipelineSync(database->connection) != 1)
		return false;
	query = &database->pending[(database->first + database->count++) % DATABASE_MAX_PENDING];
	query->answer = answer;
	query->arg = arg;
	query->sent_at = uv_now(database->loop);
	return true;
}

static void
connected(Database *database)
{
	int i;

	database->phase = PHASE_SETTING_UP;
	uv_timer_start(database->timer, on_too_late, 1000, 1000);
	if (PQsetnonblocking(database->connection, 1) != 0 ||
		PQenterPipelineMode(database->connection) != 1)
	{
		lose(database, PQerrorMessage(database->connection));
		return;
	}
	database->set_up_left = NUM_SET_UP;
	for (i = 0; i < NUM_SET_UP; i++)
		enqueue(database, set_up[i], 0, NULL, NULL, NULL, NULL, set_up_answered, database);
	flush(database);
}

/*
 * Take all results that have arrived to those who asked.  A result comes before
 * its transaction commits, which may yet fail: the sync point tells that it has.
 */
static void
read_results(Database *database)
{
	while (database->count > 0 && !PQisBusy(database->connection))
	{
		PGresult *result = PQgetResult(database->connection);

		if (result == NULL)
		{
			/* the end of one query's results; its sync point follows */
			if (database->result == NULL)
				return;
		}
		else if (PQresultStatus(result) == PGRES_PIPELINE_SYNC)
		{
			Query query = database->pending[database->first];
			PGresult *whole = database->result;

			PQclear(result);
			database->result = NULL;
			database->first = (database->first + 1) % DATABASE_MAX_PENDING;
			database->count--;
			query.answer(query.arg, whole);
			PQclear(whole);
		}
		else if (database->result == NULL || PQresultStatus(result) == PGRES_FATAL_ERROR)
		{
			PQclear(database->result);
			database->result = result;
		}
		else
			PQclear(result);
	}
}

static void
on_socket(uv_poll_t *poll, int status, int events)
{
	Database *database = poll->data;
	PGnotify *notice;

	if (PQconsumeInput(database->connection) != 1)
	{
		lose(database, PQerrorMessage(database->connection));
		return;
	}
	read_results(database);
	while ((notice = PQnotifies(database->connection)) != NULL)
	{
		if (database->events.notified != NULL)
			database->events.notified(database->events.arg, notice->relname, notice->extra);
		PQfreemem(notice);
	}
	if (database->phase == PHASE_SETTING_UP && database->set_up_left < 0)
		lose(database, "it refuses the gateway");
	else if (PQstatus(database->connection) != CONNECTION_OK)
		lose(database, PQerrorMessage(database->connection));
	else
		flush(database);
}

static PGconn *
connect_to(const char *conninfo, const char *name)
{
	const char *const keywords[] = {"dbname",
									"application_name",
									"client_encoding",
									"keepalives_idle",
									"keepalives_interval",
									"keepalives_count",
									"connect_timeout",
									NULL};
	const char *const values[] = {conninfo, name, "UTF8", "10", "5", "3", "10", NULL};

	return PQconnectdbParams(keywords, values, 1);
}

/* On the thread: nothing of the database is touched. */
static void
try_to_connect(uv_work_t *work)
{
	Attempt *attempt = work->data;

	attempt->connection = connect_to(attempt->conninfo, attempt->name);
}

static void
tried_to_connect(uv_work_t *work, int status)
{
	Attempt *attempt = work->data;
	Database *database = attempt->database;

	if (database == NULL)
		PQfinish(attempt->connection);
	else
	{
		database->attempt = NULL;
		database->connection = attempt->connection;
		if (PQstatus(database->connection) == CONNECTION_OK)
			connected(database);
		else
			lose(database, PQerrorMessage(database->connection));
	}
	free(attempt->conninfo);
	free(attempt->name);
	free(attempt);
}

static void
begin_connecting(Database *database)
{
	Attempt *attempt = calloc(1, sizeof(Attempt));

	attempt->work.data = attempt;
	attempt->database = database;
	attempt->conninfo = strdup(database->conninfo);
	attempt->name = strdup(database->name);
	database->attempt = attempt;
	database->phase = PHASE_CONNECTING;
	uv_timer_start(database->timer, on_too_late, CONNECT_S * 1000, 0);
	uv_queue_work(database->loop, &attempt->work, try_to_connect, tried_to_connect);
}

Database *
database_open(uv_loop_t *loop, const char *conninfo, const char *name, const DatabaseEvents *events)
{
	Database *database = calloc(1, sizeof(Database));

	database->loop = loop;
	database->conninfo = strdup(conninfo);
	database->name = strdup(name);
	database->events = *events;
	database->backoff_ms = MIN_BACKOFF_MS;
	database->timer = calloc(1, sizeof(uv_timer_t));
	database->timer->data = database;
	uv_timer_init(loop, database->timer);
	begin_connecting(database);
	return database;
}

void
database_close(Database *database)
{
	database->complained = true;
	database->events.up = NULL;
	if (database->attempt != NULL)
		database->attempt->database = NULL;
	lose(database, "closing");
	uv_timer_stop(database->timer);
	uv_close((uv_handle_t *) database->timer, free_handle);
	free(database->conninfo);
	free(database->name);
	free(database);
}

bool
database_is_up(const Database *database)
{
	return database->phase == PHASE_UP;
}

bool
database_send(Database *database, const char *sql, int count, const Oid *types,
			  const char *const *values, const int *lengths, const int *formats,
			  DatabaseAnswer answer, void *arg)
{
	if (database->phase != PHASE_UP ||
		!enqueue(database, sql, count, types, values, lengths, formats, answer, arg))
		return false;
	/* what cannot be written now is written when the socket takes it; a loss is noticed there, too */
	watch(database, UV_READABLE | UV_WRITABLE);
	return true;
}

char *
database_problem(const char *conninfo, const char *name)
{
	PGconn *connection = connect_to(conninfo, name);
	char *problem = NULL;
	int i;

	if (PQstatus(connection) != CONNECTION_OK)
		problem = strdup(PQerrorMessage(connection));
	for (i = 0; i < NUM_SET_UP && problem == NULL; i++)
	{
		PGresult *result = PQexec(connection, set_up[i]);

		if (PQresultStatus(result) != PGRES_COMMAND_OK)
			problem = strdup(PQresultErrorMessage(result));
		PQclear(result);
	}
	if (problem == NULL)
	{
		/* not kept: it would say that a gateway listens */
		PGresult *result =
			PQexec(connection, "BEGIN; SELECT agentvm.heartbeat_batch('{}', '{}'); ROLLBACK");

		if (PQresultStatus(result) != PGRES_COMMAND_OK)
			problem = strdup(PQresultErrorMessage(result));
		PQclear(result);
	}
	PQfinish(connection);
	return problem;
}
