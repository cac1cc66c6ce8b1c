/*-------------------------------------------------------------------------
 *
 * gateway.c
 *		libFuzzer on the gateway: its requests, frames and notifications.
 *
 * The whole gateway but main(), behind libwebsockets, on its own loop. Clients
 * are socketpairs, adopted as if they had been accepted.  The database stands in
 * at the boundary of libpq: the connection functions are below, results are
 * libpq's own.  The clock that libuv and libwebsockets see is ours, so that
 * nothing is waited for.
 *
 * An input is a story: bytes for the current connection, and between them steps,
 * each a MARK, a letter, and its text up to the next MARK (see do_step()).  Built
 * three times: TARGET_channel begins with an open channel, and its bytes are frames;
 * TARGET_control with an open channel and a connection of the control listener, to
 * which its bytes go.
 *
 * What is wrong is told with abort(): something that is left when all clients
 * have gone, a token in an answer, an answer that is none, a call that a channel
 * gets without a good ticket.
 *
 *-------------------------------------------------------------------------
 */
#include <fcntl.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../../src/common/log.h"
#include "../../src/gateway/server_private.h"

#ifdef TARGET_channel
#define FIRST_LETTER 't'
#else
#define FIRST_LETTER 'w'
#endif
#if defined(TARGET_channel) || defined(TARGET_control)
#define BEGINS_WITH_CHANNEL true
#else
#define BEGINS_WITH_CHANNEL false
#endif

#define MARK 0x1e
#define MAX_STEPS 64
#define MAX_CLIENTS 4
#define TOKEN "of-the-session-" /* and a digit */
#define CONTROL_KEY "the key that tickets are made of"
#define COMMAND "cccccccc-0000-4000-8000-00000000000" /* and a digit */

extern int LLVMFuzzerInitialize(int *argc, char ***argv);
extern int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define check(good) ((good) ? (void) 0 : wrong(#good))

static void
wrong(const char *what)
{
	fprintf(stderr, "not so: %s\n", what);
	abort();
}

/* ---- the clock ---- */

static int64_t skipped_ms;

/* libFuzzer reads the time of day, which stays what it is. */
int
clock_gettime(clockid_t id, struct timespec *time)
{
	int result = (int) syscall(SYS_clock_gettime, id, time);

	if (id == CLOCK_MONOTONIC || id == CLOCK_MONOTONIC_COARSE || id == CLOCK_BOOTTIME)
	{
		time->tv_sec += skipped_ms / 1000;
		time->tv_nsec += skipped_ms % 1000 * 1000000;
		if (time->tv_nsec >= 1000000000)
		{
			time->tv_sec++;
			time->tv_nsec -= 1000000000;
		}
	}
	return result;
}

/* ---- the database ---- */

typedef enum Mood
{
	MOOD_GOOD,
	MOOD_EMPTY, /* no row */
	MOOD_NULL,
	MOOD_GONE, /* AV006 */
	MOOD_BAD,  /* 22P02 */
	MOOD_FAIL, /* 57014 */
	MOOD_SLOW, /* no answer until another mood comes */
	MOOD_HALF, /* an answer, but its end not until another mood comes */
	MOOD_LOST, /* the connection breaks when it is asked */
	NUM_MOODS
} Mood;

typedef enum Stage
{
	STAGE_RESULT,
	STAGE_END,
	STAGE_SYNC
} Stage;

struct pg_conn
{
	int fd;
	bool is_lost;
	unsigned count;
	Stage stage;
	PGresult *results[64]; /* a ring of those that are still to be read */
	unsigned first;
	PGnotify *notice;
};

static PGconn *connection; /* the gateway's, while it has one */
static Mood mood;
static bool big_answers;
static const char *state; /* SQLSTATE of the last error */

static PGresult *
make_result(int columns)
{
	PGresult *result = PQmakeEmptyPGresult(NULL, PGRES_TUPLES_OK);
	PGresAttDesc attributes[] = {
		{.name = "a", .format = 1}, {.name = "b", .format = 1}, {.name = "c", .format = 1}};

	PQsetResultAttrs(result, columns, attributes);
	return result;
}

/* What a query is answered with in the mood of now. */
static PGresult *
answer_query(const char *sql, const char *const *values, const int *lengths)
{
	static char id[16] = "\0a sessions id.";
	static char text[100 * 1024];
	static char now[8] = {0, 2, 0xf, 3, 4, 5, 6, 7};
	PGresult *result;
	int i;

	if (strncmp(sql, "SET ", 4) == 0 || strncmp(sql, "LISTEN ", 7) == 0)
		return PQmakeEmptyPGresult(NULL, PGRES_COMMAND_OK);
	if (mood == MOOD_GONE || mood == MOOD_BAD || mood == MOOD_FAIL)
		return PQmakeEmptyPGresult(NULL, PGRES_FATAL_ERROR);
	if (strstr(sql, "agentvm.attach") != NULL)
	{
		result = make_result(1);
		PQsetvalue(result, 0, 0, "", 0);
	}
	else if (strstr(sql, "agentvm.command_") != NULL)
	{
		result = make_result(1);
		if (mood != MOOD_EMPTY)
			PQsetvalue(result, 0, 0, mood == MOOD_NULL ? "\0" : "\1", 1);
	}
	else if (strstr(sql, "agentvm.control_key") != NULL)
	{
		result = make_result(2);
		if (mood != MOOD_EMPTY)
		{
			PQsetvalue(result, 0, 0, "k1", 2);
			PQsetvalue(result, 0, 1, CONTROL_KEY, mood == MOOD_NULL ? 5 : 32);
		}
	}
	else if (strstr(sql, "gateway_channel") != NULL)
	{
		result = make_result(2);
		PQsetvalue(result, 0, 0, "channel", 7);
		PQsetvalue(result, 0, 1, now, 8);
	}
	else if (strstr(sql, "agentvm.deadlines") != NULL)
	{
		/* those that live, in their order: in one mood nobody does, in another only the first */
		result = make_result(3);
		for (i = 0; lengths[0] > 20 && i < (lengths[0] - 20) / 20; i++)
		{
			if (mood == MOOD_EMPTY || (mood == MOOD_NULL && i > 0))
				break;
			PQsetvalue(result, i, 0, (char *) values[0] + 24 + 20 * i, 16);
			PQsetvalue(result, i, 1, (char *) values[0] + 24 + 20 * i, 8);
			PQsetvalue(result, i, 2, now, 8);
		}
	}
	else
	{
		bool is_hydration = strstr(sql, "agentvm.hydrate") != NULL;
		bool is_bootstrap = is_hydration || strstr(sql, "agentvm.bootstrap") != NULL;

		result = make_result(is_hydration ? 3 : is_bootstrap ? 2 : 1);
		id[0] = (char) (values[0][0] & 3);
		if (mood == MOOD_NULL)
			PQsetvalue(result, 0, 0, NULL, -1);
		else if (is_bootstrap && mood != MOOD_EMPTY)
		{
			memset(text, 'x', sizeof(text));
			PQsetvalue(result, 0, 0, text, big_answers ? (int) sizeof(text) : 100);
			PQsetvalue(result, 0, 1, id, 16);
			if (is_hydration) /* somebody has taken it, or nobody */
				PQsetvalue(result, 0, 2, values[0][0] & 1 ? "\1" : "\0", 1);
		}
		else if (mood != MOOD_EMPTY)
			PQsetvalue(result, 0, 0, id, 16);
	}
	return result;
}

static void
set_mood(Mood new)
{
	static const char *const states[NUM_MOODS] = {
		[MOOD_GONE] = "AV006", [MOOD_BAD] = "22P02", [MOOD_FAIL] = "57014"};

	mood = new;
	state = states[mood];
	if (connection != NULL)
		eventfd_write(connection->fd, 1);
}

PGconn *
PQconnectdbParams(const char *const *keywords, const char *const *values, int expand)
{
	connection = calloc(1, sizeof(PGconn));
	connection->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	return connection;
}

/* Threads are not for here: the order of things must not change. */
int
uv_queue_work(uv_loop_t *of, uv_work_t *work, uv_work_cb begin, uv_after_work_cb end)
{
	begin(work);
	end(work, 0);
	return 0;
}

void
PQfinish(PGconn *conn)
{
	while (conn->count-- > 0)
		PQclear(conn->results[conn->first++ % 64]);
	free(conn->notice);
	close(conn->fd);
	free(conn);
	connection = NULL;
}

ConnStatusType
PQstatus(const PGconn *conn)
{
	return conn->is_lost ? CONNECTION_BAD : CONNECTION_OK;
}

char *
PQerrorMessage(const PGconn *conn)
{
	return "no reason\n";
}

int
PQsocket(const PGconn *conn)
{
	return conn->fd;
}

int
PQsetnonblocking(PGconn *conn, int arg)
{
	return 0;
}

int
PQenterPipelineMode(PGconn *conn)
{
	return 1;
}

int
PQpipelineSync(PGconn *conn)
{
	return 1;
}

int
PQflush(PGconn *conn)
{
	return conn->is_lost ? -1 : 0;
}

int
PQsendQueryParams(PGconn *conn, const char *sql, int count, const Oid *types,
				  const char *const *values, const int *lengths, const int *formats, int format)
{
	if (conn->count == 64)
		return 0;
	conn->results[(conn->first + conn->count++) % 64] = answer_query(sql, values, lengths);
	if (mood == MOOD_LOST)
		conn->is_lost = true;
	eventfd_write(conn->fd, 1);
	return 1;
}

int
PQconsumeInput(PGconn *conn)
{
	eventfd_t value;

	(void) eventfd_read(conn->fd, &value);
	return !conn->is_lost;
}

int
PQisBusy(PGconn *conn)
{
	if (conn->stage == STAGE_RESULT)
		return conn->count == 0 || mood == MOOD_SLOW;
	return mood == MOOD_HALF;
}

PGresult *
PQgetResult(PGconn *conn)
{
	switch (conn->stage)
	{
		case STAGE_RESULT:
			conn->stage = STAGE_END;
			conn->count--;
			return conn->results[conn->first++ % 64];
		case STAGE_END:
			conn->stage = STAGE_SYNC;
			return NULL;
		default:
			conn->stage = STAGE_RESULT;
			return PQmakeEmptyPGresult(NULL, PGRES_PIPELINE_SYNC);
	}
}

PGnotify *
PQnotifies(PGconn *conn)
{
	PGnotify *notice = conn->notice;

	conn->notice = NULL;
	return notice;
}

char *
PQresultErrorField(const PGresult *result, int field)
{
	return field == PG_DIAG_SQLSTATE ? (char *) state : "a reason";
}

/* In one piece, as libpq does it: what is read beyond its end is found. */
static void
notify(const char *payload, size_t len)
{
	if (connection == NULL || connection->notice != NULL)
		return;
	connection->notice = malloc(sizeof(PGnotify) + len + 1);
	connection->notice->relname = "channel";
	connection->notice->extra = (char *) (connection->notice + 1);
	memcpy(connection->notice->extra, payload, len);
	connection->notice->extra[len] = '\0';
	eventfd_write(connection->fd, 1);
}

/* ---- clients ---- */

typedef struct Client
{
	int fd;		   /* -1: closed */
	char head[12]; /* the first bytes that came */
	size_t head_len;
} Client;

static uv_loop_t loop;
static Options options;
static Server *server;
static Client clients[MAX_CLIENTS];
static int current;

static void
run_loop(int turns)
{
	while (turns-- > 0)
		uv_run(&loop, UV_RUN_NOWAIT);
}

/* Time passes, in steps, so that what is set by one timer is seen by the next. */
static void
pass_time(int64_t ms, int steps)
{
	int i;

	for (i = 0; i < steps; i++)
	{
		skipped_ms += ms / steps;
		run_loop(3);
	}
}

static void
read_answers(Client *client)
{
	char buffer[65536];
	ssize_t got;

	while (client->fd >= 0 && (got = recv(client->fd, buffer, sizeof(buffer), MSG_DONTWAIT)) > 0)
	{
		size_t part = sizeof(client->head) - client->head_len;

		if (part > (size_t) got)
			part = (size_t) got;
		memcpy(client->head + client->head_len, buffer, part);
		client->head_len += part;
		check(memcmp(client->head, "HTTP/1.", client->head_len < 7 ? client->head_len : 7) == 0);
		/* a WebSocket gives back what a ping has sent */
		if (memcmp(client->head + 9, "101", 3) != 0)
			check(memmem(buffer, (size_t) got, TOKEN, strlen(TOKEN)) == NULL);
	}
}

static void
close_client(Client *client)
{
	read_answers(client);
	if (client->fd >= 0)
		close(client->fd);
	client->fd = -1;
}

static void
send_bytes(const void *bytes, size_t len)
{
	if (clients[current].fd >= 0)
		(void) !send(clients[current].fd, bytes, len, MSG_DONTWAIT | MSG_NOSIGNAL);
	run_loop(3);
}

static void
connect_to(struct lws_context *context)
{
	int fds[2];
	int i;

	for (i = 0; i < MAX_CLIENTS && clients[i].fd >= 0; i++)
		;
	if (i == MAX_CLIENTS)
		return;
	check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
	current = i;
	memset(&clients[i], 0, sizeof(Client));
	clients[i].fd = fds[0];
	check(lws_adopt_socket_vhost(lws_get_vhost_by_name(context, "default"), fds[1]) != NULL);
	run_loop(3);
}

static void
connect_client(void)
{
	connect_to(server->context);
}

/* The session of the channel of that digit, as the database says. */
static void
session_of(char digit, char *id)
{
	char token[sizeof(TOKEN) + 1];
	unsigned char hash[32];

	snprintf(token, sizeof(token), TOKEN "%c", '0' + (digit & 7));
	check(EVP_Digest(token, strlen(token), hash, NULL, EVP_sha256(), NULL) == 1);
	snprintf(id, 37, "%02x612073-6573-7369-6f6e-732069642e00", hash[0] & 3);
}

/*
 * A call of the session of the first digit and the command of the second one: a
 * header's members up to a newline, then bytes.  With a good ticket, or one that is
 * for something else.
 */
static void
send_call(const char *text, size_t len, bool is_good)
{
	char session[37], command[37];
	unsigned char body[8192];
	char ticket[256], request[sizeof(body) + 512];
	unsigned char hash[32], mac[32];
	char hex[65];
	const char *newline;
	size_t header_len, at;
	long long expires = (long long) sessions_time(server->sessions) + 30;
	int i;

	if (len < 2 || len > 4096)
		return;
	session_of(text[0], session);
	snprintf(command, sizeof(command), COMMAND "%c", '0' + (text[1] & 7));
	text += 2;
	len -= 2;
	newline = memchr(text, '\n', len);
	header_len = newline != NULL ? (size_t) (newline - text) : len;
	at = (size_t) sprintf((char *) body + 4, "{\"command\": \"%s\"%s", command,
						  header_len > 0 ? ", " : "");
	memcpy(body + 4 + at, text, header_len);
	at += header_len;
	body[4 + at++] = '}';
	body[0] = body[1] = 0;
	body[2] = (unsigned char) (at >> 8);
	body[3] = (unsigned char) at;
	at += 4;
	if (newline != NULL)
	{
		memcpy(body + at, newline + 1, len - header_len - 1);
		at += len - header_len - 1;
	}
	check(EVP_Digest(body, at, hash, NULL, EVP_sha256(), NULL) == 1);
	for (i = 0; i < 32; i++)
		sprintf(hex + 2 * i, "%02x", hash[i]);
	snprintf(ticket, sizeof(ticket), "agentvm call\n%s\n%s\n%lld\n%s", session, command, expires,
			 hex);
	HMAC(EVP_sha256(), CONTROL_KEY, 32, (unsigned char *) ticket, strlen(ticket), mac, NULL);
	mac[7] ^= !is_good;
	for (i = 0; i < 32; i++)
		sprintf(hex + 2 * i, "%02x", mac[i]);
	i = snprintf(request, 512,
				 "POST " PROTOCOL_CALLS " HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n"
				 "Authorization: Ticket k1:%lld:%s\r\n\r\n",
				 session, at, expires, hex);
	memcpy(request + i, body, at);
	{
		unsigned before = server->call_counts.under_way;

		send_bytes(request, (size_t) i + at);
		check(is_good || server->call_counts.under_way <= before);
	}
}

static void
connect_channel(char digit)
{
	char request[512];
	int len = snprintf(request, sizeof(request),
					   "GET " PROTOCOL_CHANNEL " HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
					   "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
					   "Sec-WebSocket-Protocol: " PROTOCOL_NAME "\r\n"
					   "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
					   "Authorization: Bearer " TOKEN "%c\r\n\r\n",
					   '0' + (digit & 7));

	connect_client();
	send_bytes(request, (size_t) len);
	run_loop(3);
}

/* The first byte is the one of the frame's first: FIN, reserved bits, opcode. */
static void
send_frame(uint8_t first, const char *payload, size_t len)
{
	uint8_t frame[8192] = {first};
	size_t at = 1;
	size_t i;

	if (len > sizeof(frame) - 16)
		len = sizeof(frame) - 16;
	if (len < 126)
		frame[at++] = (uint8_t) (0x80 | len);
	else
	{
		frame[at++] = 0x80 | 126;
		frame[at++] = (uint8_t) (len >> 8);
		frame[at++] = (uint8_t) len;
	}
	for (i = 0; i < 4; i++)
		frame[at++] = (uint8_t) (0x11 * i);
	for (i = 0; i < len; i++)
		frame[at++] = (uint8_t) payload[i] ^ (uint8_t) (0x11 * (i % 4));
	send_bytes(frame, at);
}

/* An answer to the call of that number: a header up to a newline, then bytes. */
static void
send_answer(const char *text, size_t len)
{
	char frame[8192] = {0};
	const char *newline;
	size_t header_len;

	if (len < 1 || len > 4096)
		return;
	frame[3] = text[0];
	text++;
	len--;
	newline = memchr(text, '\n', len);
	header_len = newline != NULL ? (size_t) (newline - text) : len;
	frame[6] = (char) (header_len >> 8);
	frame[7] = (char) header_len;
	memcpy(frame + 8, text, header_len);
	if (newline != NULL)
		memcpy(frame + 8 + header_len, newline + 1, len - header_len - 1);
	send_frame(0x82, frame, 8 + (newline != NULL ? len - 1 : len));
}

static void
do_step(char letter, const char *text, size_t len)
{
	uint8_t number = len > 0 ? (uint8_t) *text : 0;

	switch (letter)
	{
		case 'w': /* write bytes as they are */
			send_bytes(text, len);
			break;
		case 'f': /* a frame, its first byte given */
			if (len > 0)
				send_frame(number, text + 1, len - 1);
			break;
		case 't': /* a text frame */
			send_frame(0x81, text, len);
			break;
		case 'c': /* a new connection of the control listener */
			connect_to(server->control_context);
			send_bytes(text, len);
			break;
		case 'k': /* a call by that */
			send_call(text, len, true);
			break;
		case 'K': /* with a ticket that is not good */
			send_call(text, len, false);
			break;
		case 'a':
			send_answer(text, len);
			break;
		case 'L': /* so many fragments of 8 kB */
		{
			static const char zeros[8000];
			int i;

			for (i = 0; i < number % 64; i++)
			{
				send_frame(i == 0 ? 0x02 : 0x00, zeros, sizeof(zeros));
				run_loop(3);
			}
			break;
		}
		case 'n': /* a new connection */
			connect_client();
			send_bytes(text, len);
			break;
		case 'N': /* a new channel of the session of that digit */
			connect_channel((char) number);
			break;
		case 'u': /* use that connection from now on */
			current = number % MAX_CLIENTS;
			break;
		case 'x':
			close_client(&clients[current]);
			run_loop(3);
			break;
		case 's':
			if (clients[current].fd >= 0)
				shutdown(clients[current].fd, SHUT_WR);
			run_loop(3);
			break;
		case 'r':
			read_answers(&clients[current]);
			run_loop(3);
			break;
		case 'p': /* so many tenths of a second pass */
			pass_time(number * 100, number > 20 ? 4 : 1);
			break;
		case 'd': /* the database's mood */
			set_mood((Mood) (number % NUM_MOODS));
			run_loop(3);
			break;
		case 'b': /* answers to bootstraps are big */
			big_answers = true;
			break;
		case 'e': /* it notifies */
			notify(text, len);
			run_loop(3);
			break;
		case 'D': /* SIGTERM */
			server_drain(server);
			run_loop(3);
			break;
		default:
			break;
	}
}

/* Everybody goes; nothing may be left. */
static void
clean_up(void)
{
	int i;

	set_mood(MOOD_GOOD);
	big_answers = false;
	for (i = 0; i < MAX_CLIENTS; i++)
		close_client(&clients[i]);
	run_loop(5);
	for (i = 0; i < 50 && (server->counts.connections > 0 || !sessions_ready(server->sessions) ||
						   sessions_counts(server->sessions).waiting > 0 ||
						   server->call_counts.connections > 0 || server->call_counts.ends > 0);
		 i++)
		pass_time(1000, 1);
	server->draining = false;
	check(server->counts.connections == 0);
	check(server->counts.channels == 0);
	check(server->open_requests == 0);
	check(server->call_counts.connections == 0);
	check(server->call_counts.under_way == 0);
	check(server->call_counts.ends == 0);
	check(server->buffered == 0);
	check(sessions_ready(server->sessions));
	check(sessions_counts(server->sessions).waiting == 0);
	/* and what is remembered is forgotten */
	if (sessions_counts(server->sessions).known > 0)
		pass_time(20 * 60000, 2);
	pass_time(70000, 1);
	server_tick(server);
	check(sessions_counts(server->sessions).known == 0);
	check(server->peers == NULL);
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	static char control[64];
	int i;

	snprintf(control, sizeof(control), "unix:/tmp/agentvm-fuzz-%d", (int) getpid());
	log_set_level(LOG_LEVEL_ERROR);
	srandom(1);
	options = (Options){.database = "",
						.name = "fuzz",
						.listen = "127.0.0.1",
						.port = 0,
						.max_connections = 1000,
						.max_per_address = 1000,
						.request_timeout_s = 10,
						.unauthenticated_rate = 20,
						.unauthenticated_lookups = 5,
						.metrics_from = "",
						.control = control,
						.max_call_memory = 1,
						.drain_s = 10};
	for (i = 0; i < MAX_CLIENTS; i++)
		clients[i].fd = -1;
	uv_loop_init(&loop);
	server = server_create(&loop, &options);
	check(server != NULL);
	(void) unlink(control + 5); /* nobody comes that way */
	clean_up();
	return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const char *at = (const char *) data;
	const char *end = at + size;
	int steps;

	current = 0;
	if (BEGINS_WITH_CHANNEL)
		connect_channel(0);
	else
		connect_client();
#ifdef TARGET_control
	connect_to(server->control_context);
#endif
	for (steps = 0; at < end && steps < MAX_STEPS; steps++)
	{
		char letter = FIRST_LETTER;
		const char *text = at;

		if (*at == MARK)
		{
			if (at + 1 == end)
				break;
			letter = at[1];
			text = at + 2;
		}
		at = memchr(text, MARK, (size_t) (end - text));
		if (at == NULL)
			at = end;
		do_step(letter, text, (size_t) (at - text));
	}
	clean_up();
	return 0;
}
