/*-------------------------------------------------------------------------
 *
 * call.c
 *		Calls to the runtimes in VMs, through the gateways that hold their channels.
 *
 * Before a message is sent, each time, the session is looked at: who may use it,
 * whether it is ready, which gateway it is at.  No byte of a message goes through the
 * database.
 *
 * What does not get through is tried again: the session's gateway may have been
 * restarted, its VM may be connecting to another one.  All operations of the
 * protocol may be repeated, so it does not matter for that whether the first try has
 * been passed on; it does for what the caller is told in the end.
 *
 * The HTTP client of a Calls is its own while it lives.  One is kept in the backend
 * for the next, for its open connections.  A call under way that is given up closes
 * its connection, and the gateway ends what depends on it: so every way out of here
 * leads through the reset callback of the Calls' context.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <sys/un.h>

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/shared.h"
#include "net/http.h"
#include "portability/instr_time.h"
#include "protocol.h"
#include "secret/secret.h"
#include "session/call.h"
#include "session/session.h"
#include "session/warm.h"
#include "tcop/dest.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#define REACH_MS 15000 /* what does not get through is tried again for so long */
#define FIRST_PAUSE_MS 20
#define LAST_PAUSE_MS 500
#define CONNECT_MS 5000
#define SPARE_MS 3000	 /* beyond what the gateway itself waits for an answer */
#define LAST_TRY_MS 2000 /* a repeated message gets so long at least */
#define TICKET_S                                                                                   \
	30 /* how long a ticket is good: a gateway takes a minute at most, so clocks may differ */
#define CHECK_CLIENT_MS 400 /* between looks whether the client is still there */
#define LONG_SLEEP_MS 60000
#define MAX_ADDRESS 1000 /* bytes of a control address */
#define MAX_CONNECTIONS                                                                            \
	4096 /* more than there are calls: to close one ends what was asked for on it last */

typedef enum Phase
{
	PHASE_IDLE,		 /* nothing sent, or the outcome taken */
	PHASE_TO_SEND,	 /* at not_before */
	PHASE_UNDER_WAY, /* the HTTP call is */
	PHASE_ANSWERED	 /* calls_answered() is to return it */
} Phase;

struct Call
{
	Calls *calls;
	pg_uuid_t session;
	char *session_text;
	char *what;
	void *arg;
	int64 reach_ms;
	bool outcome_matters;
	bool broke; /* some try may have been passed on, and has come to nothing */

	/* the message under way */
	Phase phase;
	CallMessage message;
	int64 first_sent_at; /* 0: not yet, as for the next two */
	int64 sent_at;
	int64 trouble_since; /* when it would have been answered, had all been well */
	int64 not_before;	 /* when to send it */
	int pause_ms;		 /* before the next try */
	bool maybe_passed;	 /* some try may have reached the runtime */
	char *gateway_id;	 /* to which it goes */
	HttpCall *http;

	/* what came of it */
	MemoryContext context; /* of the next two, or NULL */
	CallFailure *failure;
	Answer answer;
};

struct Calls
{
	MemoryContext context;
	MemoryContextCallback callback;
	HttpClient *client;
	Oid role;
	List *calls;
	int64 client_checked_at;
};

/* Where a message is to go. */
typedef struct Route
{
	char *gateway_id;
	char *address;
} Route;

static DbQuery route_query = {
	"SELECT h.gateway_id, g.control_address FROM agentvm.session_heartbeat h "
	"LEFT JOIN agentvm.gateway g USING (gateway_id) WHERE h.session_id = $1",
	1,
	{UUIDOID}};

/* Of the calls that have ended; NULL while one has it. */
static HttpClient *kept_client = NULL;

int64
call_now_ms(void)
{
	instr_time now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MILLISEC(now);
}

/* ---- the client ---- */

static void
destroy_kept_client(int code, Datum arg)
{
	http_client_destroy(kept_client);
	kept_client = NULL;
}

static HttpClient *
take_client(void)
{
	static bool registered = false;
	HttpClient *client = kept_client;

	if (client == NULL)
	{
		client = http_client_create();
		http_client_keep(client, MAX_CONNECTIONS);
	}
	kept_client = NULL;
	if (!registered)
		on_proc_exit(destroy_kept_client, (Datum) 0);
	registered = true;
	http_run(client); /* lets go of connections that have been idle for too long */
	return client;
}

/* Reset callback of a Calls' context: give up what is under way.  Never raises. */
static void
let_go(void *arg)
{
	Calls *calls = arg;
	ListCell *lc;

	foreach (lc, calls->calls)
	{
		Call *call = lfirst(lc);

		if (call->http != NULL)
			http_cancel(call->http);
	}
	if (kept_client == NULL)
		kept_client = calls->client;
	else
		http_client_destroy(calls->client);
}

Calls *
calls_create(Oid role)
{
	MemoryContext context =
		AllocSetContextCreate(CurrentMemoryContext, "agentvm calls", ALLOCSET_DEFAULT_SIZES);
	Calls *calls = MemoryContextAllocZero(context, sizeof(Calls));

	calls->context = context;
	calls->role = role;
	calls->client = take_client();
	calls->callback.func = let_go;
	calls->callback.arg = calls;
	MemoryContextRegisterResetCallback(context, &calls->callback);
	return calls;
}

void
calls_destroy(Calls *calls)
{
	MemoryContextDelete(calls->context);
}

Call *
call_create(Calls *calls, const pg_uuid_t *session, const char *what, int64 reach_ms, void *arg)
{
	MemoryContext old = MemoryContextSwitchTo(calls->context);
	Call *call = palloc0(sizeof(Call));

	call->calls = calls;
	call->session = *session;
	call->session_text = session_text(session);
	call->what = pstrdup(what);
	call->arg = arg;
	call->reach_ms = Min(reach_ms, REACH_MS);
	calls->calls = lappend(calls->calls, call);
	MemoryContextSwitchTo(old);
	return call;
}

void
call_destroy(Call *call)
{
	Calls *calls = call->calls;

	calls->calls = list_delete_ptr(calls->calls, call);
	if (call->http != NULL)
		http_cancel(call->http);
	if (call->context != NULL)
		MemoryContextDelete(call->context);
	if (call->gateway_id != NULL)
		pfree(call->gateway_id);
	pfree(call->what);
	pfree(call->session_text);
	pfree(call);
}

void
call_outcome_matters(Call *call)
{
	call->outcome_matters = true;
}

bool
call_broke(const Call *call)
{
	return call->broke;
}

void *
call_arg(const Call *call)
{
	return call->arg;
}

const pg_uuid_t *
call_session(const Call *call)
{
	return &call->session;
}

const CallFailure *
call_failure(const Call *call)
{
	return call->failure;
}

const Answer *
call_answer(const Call *call)
{
	return &call->answer;
}

/* ---- outcomes ---- */

/* A context for what comes of the message under way, in place of the one before. */
static void
set_context(Call *call, MemoryContext context)
{
	if (call->context != NULL)
		MemoryContextDelete(call->context);
	call->context = context;
	call->failure = NULL;
}

/* The message has failed for good; the texts are copied. */
static void
fail(Call *call, int sqlstate, const char *message, const char *detail, const char *hint)
{
	MemoryContext context =
		AllocSetContextCreate(call->calls->context, "agentvm call", ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	CallFailure *failure = palloc(sizeof(CallFailure));

	failure->sqlstate = sqlstate;
	failure->message = pstrdup(message);
	failure->detail = detail ? pstrdup(detail) : NULL;
	failure->hint = hint ? pstrdup(hint) : NULL;
	MemoryContextSwitchTo(old);
	set_context(call, context);
	call->failure = failure;
	call->phase = PHASE_ANSWERED;
}

void
call_raise(const CallFailure *failure)
{
	ereport(ERROR, (errcode(failure->sqlstate), errmsg_internal("%s", failure->message),
					failure->detail ? errdetail_internal("%s", failure->detail) : 0,
					failure->hint ? errhint("%s", failure->hint) : 0));
	pg_unreachable();
}

/* What has come is no answer. */
static void
protest(Call *call)
{
	fail(call, ERRCODE_SYSTEM_ERROR,
		 psprintf("the answer of the runtime of session %s makes no sense", call->session_text),
		 psprintf("It was to %s.", call->what),
		 "Runtime, gateway and extension may be of versions that do not go together.");
}

void
call_protest(Call *call)
{
	protest(call);
	call->phase = PHASE_IDLE; /* it has been taken already */
}

/*
 * A try has not got through.  Try again, or, when the time for that is over, fail: "who"
 * is what cannot be reached, and "detail" says how it shows.
 */
static void
not_reached(Call *call, bool maybe_passed, const char *who, const char *detail)
{
	int64 now = call_now_ms();

	call->maybe_passed = call->maybe_passed || maybe_passed;
	call->broke = call->broke || maybe_passed;
	if (call->trouble_since == 0)
		call->trouble_since =
			call->sent_at == 0 ? now : Min(now, call->sent_at + Max(call->message.wait_ms, 0));
	if (now < call->trouble_since + call->reach_ms)
	{
		call->not_before = now + call->pause_ms;
		call->pause_ms = Min(2 * call->pause_ms, LAST_PAUSE_MS);
		call->phase = PHASE_TO_SEND;
		return;
	}
	if (warm_is_hydrating(&call->session))
		detail =
			psprintf("%s The VM was warm, and its runtime has not fetched yet what it was taken "
					 "with: before that it serves no call.",
					 detail);
	if (call->outcome_matters || (call->message.begins && call->maybe_passed))
		fail(call, AVM_UNREACHABLE, psprintf("outcome unknown: %s cannot be reached any more", who),
			 detail, "The command may have run, or be running.");
	else
		fail(call, AVM_UNREACHABLE, psprintf("%s cannot be reached", who), detail, NULL);
}

static char *
the_runtime(const Call *call)
{
	return psprintf("runtime of session %s", call->session_text);
}

static char *
the_gateway(const Call *call)
{
	return psprintf("gateway \"%s\"", call->gateway_id);
}

/* The runtime's words for what went wrong, as SQLSTATEs. */
static const struct
{
	const char *word;
	int sqlstate;
} words[] = {
	{CALL_INVALID, ERRCODE_INVALID_PARAMETER_VALUE},
	{CALL_FORGOTTEN, AVM_UNREACHABLE},
	{CALL_NO_COMMAND, ERRCODE_UNDEFINED_OBJECT},
	{CALL_NO_FILE, ERRCODE_UNDEFINED_FILE},
	{CALL_DENIED, ERRCODE_INSUFFICIENT_PRIVILEGE},
	{CALL_WRONG_FILE, ERRCODE_WRONG_OBJECT_TYPE},
	{CALL_NO_SPACE, ERRCODE_DISK_FULL},
	{CALL_BUSY, ERRCODE_CONFIGURATION_LIMIT_EXCEEDED},
	{CALL_FAILED, ERRCODE_IO_ERROR},
};

/* The runtime has answered that it could not. */
static void
refused(Call *call, const Answer *answer)
{
	int sqlstate = ERRCODE_IO_ERROR;
	int i;

	for (i = 0; i < lengthof(words); i++)
	{
		if (strcmp(answer->error, words[i].word) == 0)
			sqlstate = words[i].sqlstate;
	}
	if (strcmp(answer->error, CALL_FORGOTTEN) == 0)
		fail(call, sqlstate,
			 psprintf("outcome unknown: the runtime of session %s does not remember the command",
					  call->session_text),
			 answer->message, "The command may have run.");
	else
		fail(call, sqlstate, psprintf("could not %s: %s", call->what, answer->message),
			 psprintf("The runtime of session %s says so.", call->session_text), NULL);
}

/* The gateway's answer, or that there is none. */
static void
settle(Call *call, const HttpReply *reply)
{
	Answer answer;

	/* libcurl repeats by itself what a kept connection has swallowed */
	if (reply->sends > 1)
		call->maybe_passed = call->broke = true;
	switch (reply->status)
	{
		case 200:
			if (!answer_parse(reply->body, reply->body_len, &answer))
				protest(call);
			else if (answer.error != NULL)
				refused(call, &answer);
			else
			{
				call->answer = answer;
				call->phase = PHASE_ANSWERED;
			}
			break;
		case 0:
			not_reached(call, reply->maybe_sent, the_gateway(call),
						psprintf("No answer to a call: %s.", reply->error));
			break;
		case 404:
			not_reached(call, false, the_runtime(call),
						psprintf("Gateway \"%s\" has no channel to it.", call->gateway_id));
			break;
		case 502:
			not_reached(call, true, the_runtime(call),
						psprintf("Its channel to gateway \"%s\" broke.", call->gateway_id));
			break;
		case 503:
			not_reached(call, false, the_gateway(call), "It has no database, or is about to end.");
			break;
		case 504:
			not_reached(call, true, the_runtime(call),
						psprintf("It has a channel to gateway \"%s\", but does not answer.",
								 call->gateway_id));
			break;
		case 400:
			fail(call, ERRCODE_SYSTEM_ERROR,
				 psprintf("gateway \"%s\" does not understand a call", call->gateway_id),
				 psprintf("It was to %s.", call->what),
				 "Gateway and extension may be of versions that do not go together.");
			break;
		case 401:
			fail(call, AVM_UNREACHABLE,
				 psprintf("gateway \"%s\" refuses calls of this server", call->gateway_id),
				 "It does not take the ticket for good.",
				 "The clocks of both machines must agree, the server's agentvm.key_file must be "
				 "the one that the gateway's database uses, and the gateway must run under that "
				 "name.");
			break;
		case 409:
			fail(call, AVM_NOT_READY, psprintf("session %s is not ready", call->session_text), NULL,
				 NULL);
			break;
		case 410:
			fail(call, AVM_SESSION_ENDED, psprintf("session %s has ended", call->session_text),
				 NULL, "The log of the session is in agentvm.session_event.");
			break;
		case 413:
			fail(call, AVM_OVER_LIMIT,
				 psprintf("could not %s: gateway \"%s\" finds it too large", call->what,
						  call->gateway_id),
				 NULL, NULL);
			break;
		case 429:
			fail(call, AVM_OVER_LIMIT,
				 psprintf("could not %s: too many calls are under way", call->what),
				 psprintf("Gateway \"%s\" passes on no more for session %s.", call->gateway_id,
						  call->session_text),
				 NULL);
			break;
		default:
			not_reached(call, true, the_gateway(call),
						psprintf("It answered with status %d.", reply->status));
			break;
	}
}

/* ---- where to ---- */

static void
set_gateway(Call *call, const char *gateway_id)
{
	if (call->gateway_id != NULL && strcmp(call->gateway_id, gateway_id) == 0)
		return;
	if (call->gateway_id != NULL)
		pfree(call->gateway_id);
	call->gateway_id = NULL;
	call->gateway_id = MemoryContextStrdup(call->calls->context, gateway_id);
}

static void
not_ready(Call *call, const SessionFacts *facts)
{
	fail(call, AVM_NOT_READY,
		 psprintf("session %s is not ready, but %s", call->session_text, state_name(facts->state)),
		 facts->changed_here ? "It was changed in this transaction, which has not committed."
							 : NULL,
		 facts->changed_here ? "The provider is called only after commit: COMMIT first, then wait."
		 : facts->state == STATE_WARM ? "It waits for a provision() that takes it."
		 : facts->state == STATE_PAUSING || facts->state == STATE_PAUSED
			 ? psprintf("%sSELECT agentvm.resume('%s'), then wait: CALL agentvm.await('%s').",
						facts->state == STATE_PAUSED ? "" : "When it is paused: ",
						call->session_text, call->session_text)
			 : psprintf("Wait for it: CALL agentvm.await('%s').", call->session_text));
}

/*
 * Look at the session, and where its messages go; false: the call has failed, or is
 * to be tried again.  Inside a db scope; *route is in its memory.
 */
static bool
look_up(Call *call, Route *route)
{
	SessionFacts facts;
	Datum values[1] = {UUIDPGetDatum(&call->session)};

	if (!session_find(&call->session, call->calls->role, &facts))
		fail(call, AVM_NO_SUCH_SESSION, psprintf(SESSION_UNKNOWN, call->session_text), NULL,
			 SESSION_UNKNOWN_HINT);
	else if (facts.state == STATE_TERMINATING || state_is_ended(facts.state))
		fail(call, AVM_SESSION_ENDED,
			 psprintf(state_is_ended(facts.state) ? "session %s has ended: %s"
												  : "session %s is ending: %s",
					  call->session_text, facts.end_reason ? facts.end_reason : "unknown"),
			 facts.detail, "The log of the session is in agentvm.session_event.");
	else if (!facts.runtime)
		fail(call, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
			 psprintf("session %s has no runtime", call->session_text),
			 "Commands and files go through the program agentvm-runtime in the VM.",
			 "Provision it with a profile that has one: runtime = true.");
	else if (facts.state != STATE_READY)
		not_ready(call, &facts);
	else
	{
		db_run(&route_query, values, NULL);
		route->gateway_id = SPI_processed > 0 ? db_text(0, 1, CurrentMemoryContext) : NULL;
		route->address = SPI_processed > 0 ? db_text(0, 2, CurrentMemoryContext) : NULL;
		SPI_freetuptable(SPI_tuptable);
		if (route->gateway_id == NULL)
			not_reached(call, false, the_runtime(call), "No gateway has a channel to it.");
		else
		{
			set_gateway(call, route->gateway_id);
			if (route->address != NULL)
				return true;
			fail(call, AVM_UNREACHABLE,
				 psprintf("gateway \"%s\" passes no commands on", call->gateway_id),
				 "Column control_address of agentvm.gateway is empty.",
				 "Start the gateway with a control listener.");
		}
	}
	return false;
}

/* Take a control address apart; false, and the call has failed, where it is none. */
static bool
set_address(Call *call, const char *address, HttpRequest *request)
{
	const char *bad = NULL;
	const char *c;
	char path[128];
	size_t len = strlen(address);

	snprintf(path, sizeof(path), PROTOCOL_CALLS, call->session_text);
	for (c = address; *c != '\0'; c++)
	{
		if ((unsigned char) *c <= ' ' || (unsigned char) *c >= 0x7f)
			bad = "It contains blanks, control characters or letters beyond ASCII.";
	}
	while (len > 0 && address[len - 1] == '/')
		len--;
	if (len > MAX_ADDRESS)
		bad = "It is too long.";
	else if (strncmp(address, "unix:/", 6) == 0)
	{
		request->unix_socket = address + 5;
		request->url = psprintf("http://localhost%s", path);
		if (len - 5 >= sizeof(((struct sockaddr_un *) NULL)->sun_path))
			bad = "The path of the socket is too long.";
	}
	else if (strncmp(address, "https://", 8) == 0 ||
			 (strncmp(address, "http://", 7) == 0 && avm_allow_insecure_endpoints))
		request->url = psprintf("%.*s%s", (int) len, address, path);
	else
		bad = "It is neither unix:/path nor https://host:port.";
	if (bad != NULL)
		fail(call, AVM_INVALID_CONFIGURATION,
			 psprintf("control address of gateway \"%s\" cannot be used", call->gateway_id), bad,
			 "An administrator can set it right in table agentvm.gateway.");
	return bad == NULL;
}

/* ---- sending ---- */

static void
hex_text(const uint8 *bytes, size_t len, char *text)
{
	hex_encode((const char *) bytes, len, text);
	text[2 * len] = '\0';
}

/* SHA-256 of a message's two parts, in hex. */
static void
hash_message(const char *head, size_t head_len, const CallMessage *message, char *text)
{
	uint8 digest[SHA256_LEN];
	EVP_MD_CTX *hash = EVP_MD_CTX_new();
	bool done = hash != NULL && EVP_DigestInit_ex(hash, EVP_sha256(), NULL) == 1 &&
				EVP_DigestUpdate(hash, head, head_len) == 1 &&
				EVP_DigestUpdate(hash, message->bytes, message->len) == 1 &&
				EVP_DigestFinal_ex(hash, digest, NULL) == 1;

	EVP_MD_CTX_free(hash);
	if (!done)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not compute a SHA-256 hash")));
	hex_text(digest, SHA256_LEN, text);
}

/* The header that says that this server's backend sends this message. */
static char *
make_ticket(const Call *call, const char *head, size_t head_len)
{
	char *key_id = keyring_current_id();
	Secret *key = keyring_control_key(key_id, call->gateway_id);
	long long expires = (long long) time(NULL) + TICKET_S;
	char hash[2 * SHA256_LEN + 1];
	char mac_text[2 * SHA256_LEN + 1];
	uint8 mac[SHA256_LEN];
	unsigned int mac_len = 0;
	char *signed_text;

	hash_message(head, head_len, &call->message, hash);
	signed_text = psprintf("agentvm call\n%s\n%s\n%lld\n%s", call->session_text,
						   session_text(&call->message.command), expires, hash);
	if (HMAC(EVP_sha256(), secret_bytes(key), secret_len(key), (unsigned char *) signed_text,
			 strlen(signed_text), mac, &mac_len) == NULL ||
		mac_len != SHA256_LEN)
		ereport(ERROR, (errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not compute a ticket")));
	hex_text(mac, SHA256_LEN, mac_text);
	return psprintf("Authorization: Ticket %s:%lld:%s", key_id, expires, mac_text);
}

/* The bytes before those of the message, complete with what differs from try to try. */
static char *
make_head(Call *call, int wait_ms, size_t *len)
{
	StringInfoData header;
	char *head;

	initStringInfo(&header);
	enlargeStringInfo(&header, call->message.header->len + 100);
	appendBinaryStringInfo(&header, call->message.header->data, call->message.header->len);
	if (wait_ms >= 0)
		header_int(&header, "wait_ms", wait_ms);
	if (call->message.tells_age)
		header_int(&header, "age_ms",
				   call->first_sent_at == 0 ? 0 : call_now_ms() - call->first_sent_at);
	head = header_finish(&header, len);
	/* it may hold secrets */
	secret_wipe_later(head, *len);
	secret_wipe(header.data, header.len);
	return head;
}

/* In a context of its own, that goes right after. */
static void
send_message(Call *call, const Route *route)
{
	HttpRequest request = {0};
	int64 now = call_now_ms();
	int wait_ms = call->message.wait_ms;
	int grace_ms = PROTOCOL_CALL_GRACE_MS + SPARE_MS;

	/* who asks again has waited already */
	if (call->trouble_since != 0)
	{
		int64 left = call->trouble_since + call->reach_ms - now;

		grace_ms = Min(grace_ms, Max(left, LAST_TRY_MS));
		wait_ms = Min(wait_ms, 0);
	}
	if (!set_address(call, route->address, &request))
		return;
	request.method = "POST";
	request.body = make_head(call, wait_ms, &request.body_len);
	request.tail = call->message.bytes;
	request.tail_len = call->message.len;
	request.headers = list_make2(make_ticket(call, request.body, request.body_len),
								 "Content-Type: application/octet-stream");
	if (avm_gateway_ca_file[0] != '\0')
		request.ca_file = avm_gateway_ca_file;
	request.max_reply = PROTOCOL_MAX_MESSAGE;
	request.large_reply = call->message.much_comes;
	request.connect_ms = CONNECT_MS;
	request.timeout_ms = Max(wait_ms, 0) + grace_ms;
	call->http = http_start(call->calls->client, &request, call);
	call->phase = PHASE_UNDER_WAY;
	call->sent_at = now;
	if (call->first_sent_at == 0)
		call->first_sent_at = now;
}

void
call_send(Call *call, const CallMessage *message)
{
	Assert(call->phase == PHASE_IDLE);
	set_context(call, NULL);
	call->message = *message;
	call->first_sent_at = call->sent_at = call->trouble_since = call->not_before = 0;
	call->pause_ms = FIRST_PAUSE_MS;
	call->maybe_passed = false;
	call->phase = PHASE_TO_SEND;
}

/* ---- moving on ---- */

/* Send what is to be sent by now; false: there was nothing. */
static bool
send_due(Calls *calls)
{
	int64 now = call_now_ms();
	bool entered = false;
	DbScope scope;
	MemoryContext scratch = NULL;
	ListCell *lc;

	foreach (lc, calls->calls)
	{
		Call *call = lfirst(lc);
		MemoryContext old;
		Route route;

		if (call->phase != PHASE_TO_SEND || call->not_before > now)
			continue;
		if (!entered)
		{
			db_enter(&scope);
			scratch = AllocSetContextCreate(CurrentMemoryContext, "agentvm call to be sent",
											ALLOCSET_DEFAULT_SIZES);
			entered = true;
		}
		old = MemoryContextSwitchTo(scratch);
		if (look_up(call, &route))
			send_message(call, &route);
		MemoryContextSwitchTo(old);
		MemoryContextReset(scratch);
	}
	if (entered)
		db_leave(&scope);
	return entered;
}

/* Take the next reply from the client; false: there is none. */
static bool
take_reply(Calls *calls)
{
	MemoryContext context =
		AllocSetContextCreate(calls->context, "agentvm call", ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	void *arg;
	HttpReply *reply = http_finished(calls->client, &arg);
	Call *call = arg;

	if (reply != NULL)
	{
		call->http = NULL;
		set_context(call, NULL);
		settle(call, reply);
	}
	MemoryContextSwitchTo(old);
	if (reply != NULL && call->phase == PHASE_ANSWERED && call->failure == NULL)
		call->context = context; /* the answer is in it */
	else
		MemoryContextDelete(context);
	return reply != NULL;
}

void
calls_advance(Calls *calls)
{
	/* a reply may come before we would sleep for it, and nothing would tell of it any more */
	do
	{
		http_run(calls->client);
		while (take_reply(calls))
			;
	} while (send_due(calls));
}

Call *
calls_answered(Calls *calls)
{
	ListCell *lc;

	foreach (lc, calls->calls)
	{
		Call *call = lfirst(lc);

		if (call->phase == PHASE_ANSWERED)
		{
			call->phase = PHASE_IDLE;
			return call;
		}
	}
	return NULL;
}

/* A client that has gone waits for nothing; nobody would notice before the statement's end. */
static void
check_client(Calls *calls, int64 now)
{
	if (whereToSendOutput != DestRemote || MyProcPort == NULL ||
		now < calls->client_checked_at + CHECK_CLIENT_MS)
		return;
	calls->client_checked_at = now;
	if (!pq_check_connection())
	{
		ClientConnectionLost = true;
		InterruptPending = true;
	}
}

void
calls_sleep(Calls *calls, int64 until)
{
	int64 now = call_now_ms();
	ConditionVariable *changed = NULL;
	Call *paused = NULL;
	ListCell *lc;
	int rc;

	check_client(calls, now);
	CHECK_FOR_INTERRUPTS();
	until = Min(until, now + LONG_SLEEP_MS);
	if (whereToSendOutput == DestRemote)
		until = Min(until, now + CHECK_CLIENT_MS);
	foreach (lc, calls->calls)
	{
		Call *call = lfirst(lc);

		if (call->phase == PHASE_ANSWERED)
			return;
		if (call->phase == PHASE_TO_SEND)
		{
			until = Min(until, call->not_before);
			paused = call;
		}
	}
	if (until <= now)
		return;

	/* whoever changes a session, or gets its channel, says so there */
	if (paused != NULL)
		changed = shared_changed(&paused->session);
	if (changed != NULL)
		ConditionVariablePrepareToSleep(changed);
	rc = WaitLatchOrSocket(MyLatch,
						   WL_LATCH_SET | WL_SOCKET_READABLE | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						   http_client_fd(calls->client), until - now, AvmWaitEvent("AgentvmCall"));
	if (changed != NULL)
		ConditionVariableCancelSleep();
	if (rc & WL_LATCH_SET)
	{
		ResetLatch(MyLatch);
		if (changed != NULL)
			paused->not_before =
				Min(paused->not_before, Max(now, paused->sent_at + FIRST_PAUSE_MS));
	}
	CHECK_FOR_INTERRUPTS();
}

const Answer *
call_ask(Call *call, const CallMessage *message)
{
	Calls *calls = call->calls;

	call_send(call, message);
	for (;;)
	{
		calls_advance(calls);
		if (calls_answered(calls) != NULL)
			break;
		calls_sleep(calls, PG_INT64_MAX);
	}
	if (call->failure != NULL)
		call_raise(call->failure);
	return &call->answer;
}
