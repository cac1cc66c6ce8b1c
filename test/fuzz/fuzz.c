/*-------------------------------------------------------------------------
 *
 * fuzz.c
 *		libFuzzer inside a server: whatever others send us, from the first byte.
 *
 * The library is built with clang's sanitizers and this file in it; a
 * stand-alone backend then calls agentvm_fuzz(target, libFuzzer's arguments...).
 * So the real objects are run on the real memory contexts, errors and jsonb, and
 * nothing stands in for the server.
 *
 * Memory comes from a context with the smallest blocks there are, where all but
 * tiny allocations are malloc's own, which AddressSanitizer watches over.
 *
 * What is wrong is told with __builtin_trap(): an error raised where none may
 * be, an internal error, text that no database of ours would take.
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "net/aws.h"
#include "net/http.h"
#include "net/xml.h"
#include "providers/aws_login.h"
#include "providers/ec2.h"
#include "providers/options.h"
#include "providers/provider.h"
#include "secret/keyring.h"
#include "secret/secret.h"

#define MAX_ANSWER (64 * 1024)

/* libFuzzer's, declared in none of clang's C headers */
extern int LLVMFuzzerRunDriver(int *argc, char ***argv,
							   int (*run)(const uint8_t *data, size_t size));

PG_FUNCTION_INFO_V1(agentvm_fuzz);

typedef struct Target
{
	const char *name;
	void (*run)(const char *data, size_t size); /* a NUL follows the data */
	bool may_raise;								/* an error that users may see is in order */
} Target;

static const Target *target;
static MemoryContext context;

static void
check(bool good)
{
	if (!good)
		__builtin_trap();
}

/* Text that may go into a table, an error or jsonb. */
static void
check_text(const char *text)
{
	check(text == NULL || pg_verify_mbstr(PG_UTF8, text, strlen(text), true));
}

/* ---- answers ---- */

static HttpReply *
make_reply(int status, const char *body, size_t len)
{
	HttpReply *reply = palloc0(sizeof(HttpReply));

	reply->status = status;
	reply->maybe_sent = true;
	reply->sends = 1;
	reply->body = body;
	reply->body_len = len;
	reply->retry_after_s = -1;
	return reply;
}

static void
run_xml(const char *data, size_t size)
{
	static const char *const paths[] = {"/DescribeInstancesResponse",
										"//instancesSet/item/instanceId",
										"//Error/Message",
										"//a",
										"/a/b",
										"//a/b/c"};
	XmlDoc *doc = xml_parse(data, size);

	for (int i = 0; i < lengthof(paths); i++)
	{
		char *text = xml_text(doc, paths[i]);

		check_text(text);
		check((text == NULL) == (xml_count(doc, paths[i]) == 0));
		for (; text != NULL && *text != '\0'; text++)
			check((unsigned char) *text >= 0x20 && *text != 0x7f);
	}
	xml_free(doc);
}

static void
check_judgement(const HttpReply *reply)
{
	AwsError error = aws_judge(reply);

	check((error.class == CLASS_NONE) == (reply->status >= 200 && reply->status < 300));
	check((error.class == CLASS_NONE) == (error.code == NULL));
	check((error.class == CLASS_NONE) == (error.message == NULL));
	check_text(error.code);
	check_text(error.message);
	check(error.code == NULL || strlen(error.code) <= 100);
	check(error.message == NULL || strlen(error.message) <= 500);
}

static void
run_aws(const char *data, size_t size)
{
	if (size >= 2)
		check_judgement(make_reply(((unsigned char) data[0] << 8 | (unsigned char) data[1]) % 1000,
								   data + 2, size - 2));
}

/*
 * The answer to a call for three instances, two of which are the same: each member's
 * own is of that instance or none, if it says that the call has worked.
 */
static void
run_joint(const char *data, size_t size)
{
	static const char *const members[] = {"i-0b", "i-0a", "i-0b"};
	HttpReply *replies[lengthof(members)] = {0};
	HttpReply *reply;
	ErrorClass class;

	if (size < 2)
		return;
	reply = make_reply(((unsigned char) data[0] << 8 | (unsigned char) data[1]) % 1000, data + 2,
					   size - 2);
	class = ec2_split(reply, members, lengthof(members), replies);
	check((replies[0] == NULL) == (replies[2] == NULL));
	for (int i = 0; i < lengthof(members); i++)
	{
		XmlDoc *doc;
		char *id;

		check(class != CLASS_NONE || replies[i] != NULL);
		if (replies[i] == NULL)
			continue;
		check(strlen(replies[i]->body) <= replies[i]->body_len);
		check(replies[i]->body[replies[i]->body_len] == '\0');
		check(replies[i]->status == reply->status);
		if (class != CLASS_NONE)
			continue;
		doc = xml_parse(replies[i]->body, replies[i]->body_len);
		id = xml_text(doc, "//instancesSet/item/instanceId");
		check(xml_count(doc, "//instancesSet/item/instanceId") != 1 || strcmp(id, members[i]) == 0);
		xml_free(doc);
	}
}

/*
 * An operation of ec2 from its beginning, each request answered with the next
 * piece of the data: an octet for the status, then the body, up to a NUL.
 */
static void
run_ec2(const char *data, size_t size)
{
	static const int statuses[] = {200, 400, 403, 429, 500, 503, 0, 302};
	const char *end = data + size;
	ProviderSession session = {0};
	ProviderContext step_context = {0};
	SecretSet *secrets = secret_set_make();
	unsigned char how = size > 0 ? *data++ : 0;

	session.session_id = "0198c0de-0000-7000-8000-000000000000";
	session.team_id = "team";
	session.agent_id = "agent";
	session.cluster = "0198c0de-0000-7000-8000-000000000001";
	session.created_at = GetCurrentTimestamp();
	session.deadline_at = session.ceiling_at = session.created_at + USECS_PER_HOUR;
	secret_set_add(secrets, "access_key_id", secret_make("AKIAIOSFODNN7EXAMPLE", 20));
	secret_set_add(secrets, "secret_access_key", secret_make("secret", 6));
	step_context.op = (ProviderOp[]){OP_PROVISION, OP_TERMINATE, OP_INSPECT, OP_CHECK}[how & 3];
	step_context.session = step_context.op == OP_CHECK ? NULL : &session;
	step_context.secrets = secrets;
	step_context.options = DatumGetJsonbP(DirectFunctionCall1(
		jsonb_in, CStringGetDatum("{\"region\": \"us-east-1\", \"image_id\": \"ami-0\", "
								  "\"subnet_ids\": [\"subnet-0\", \"subnet-1\"]}")));
	if (how & 4)
		session.vm_id = "i-0123456789abcdef0";
	step_context.cluster = session.cluster;
	if (how & 32)
		step_context.handle = handle_set_text(NULL, AVM_BOOT_LEFT, "/agentvm/0/0");
	if (how & 8)
		step_context.handle = handle_set_int(NULL, "sent_at", boot_epoch_ms(session.created_at));

	for (int round = 0; round < 64; round++)
	{
		ProviderStep step = {0};

		step_context.now = GetCurrentTimestamp();
		step_context.ending =
			step_context.op == OP_PROVISION && step_context.reply != NULL && (how & 16);
		ec2_provider.step(&step_context, &step);
		check(step.kind != STEP_FAILED || step.error_class != CLASS_NONE);
		check(step.kind != STEP_WAIT || step.wait_ms >= 0);
		check(step.vm_id == NULL || ec2_is_id(step.vm_id, "i-"));
		check(step.address == NULL || strlen(step.address) <= 64);
		check_text(step.error_code);
		check_text(step.error_message);
		check_text(step.region);
		check_text(step.purchase);
		if (step.result != NULL)
			check_text(JsonbToCString(NULL, &step.result->root, VARSIZE(step.result)));
		if (step.handle != NULL)
			step_context.handle = step.handle;
		if (step.vm_id != NULL)
			session.vm_id = step.vm_id;
		step_context.reply = NULL;
		if (step.kind == STEP_REQUEST)
		{
			const char *body = data + 1;
			size_t len;

			check(step.request != NULL && step.operation != NULL);
			if (data >= end)
				break;
			len = strlen(body);
			step_context.reply = make_reply(statuses[*data & 7], body, len);
			data = body + len + 1;
		}
		else if (step.kind != STEP_WAIT)
			break;
	}
}

/* A login, each request answered with the next piece of the data, as above: the machine's, or a role. */
static void
run_login(const char *data, size_t size)
{
	static const int statuses[] = {200, 400, 403, 429, 500, 503, 0, 302};
	const char *end = data + size;
	LoginContext login = {0};
	SecretSet *kept = secret_set_make();
	SecretSet *secrets = secret_set_make();
	const HttpReply *reply = NULL;
	unsigned char how = size > 0 ? *data++ : 0;

	login.op = OP_PROVISION;
	login.session_id = "0198c0de-0000-7000-8000-000000000000";
	login.cluster = login.external_id = "0198c0de-0000-7000-8000-000000000001";
	login.options = login.team_options = DatumGetJsonbP(DirectFunctionCall1(
		jsonb_in, CStringGetDatum("{\"region\": \"us-east-1\", "
								  "\"role_arn\": \"arn:aws:iam::123456789012:role/x\"}")));
	login.secrets = secrets;
	avm_environment_credentials = true;
	setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1", 1);
	if (how & 1)
	{
		secret_set_add(secrets, "access_key_id", secret_make("AKIAIOSFODNN7EXAMPLE", 20));
		secret_set_add(secrets, "secret_access_key", secret_make("secret", 6));
	}
	check(aws_login_needed(&login) != NULL);

	for (;;)
	{
		LoginStep step = {0};
		const char *body;
		size_t len;

		login.now = GetCurrentTimestamp();
		aws_login_step(&login, reply, kept, &step);
		check(step.kind != STEP_WAIT);
		check(step.kind != STEP_FAILED || step.error_class != CLASS_NONE);
		check(step.kind != STEP_DONE ||
			  (secret_set_get(step.secrets, "secret_access_key") != NULL &&
			   secret_set_get(step.secrets, "session_token") != NULL &&
			   step.good_until > login.now && step.good_until < login.now + USECS_PER_DAY));
		check_text(step.error_code);
		check_text(step.error_message);
		if (step.kind != STEP_REQUEST || data >= end)
			break;
		check(step.request != NULL && step.operation != NULL);
		body = data + 1;
		len = strlen(body);
		reply = make_reply(statuses[*data & 7], body, len);
		data = body + len + 1;
	}
}

/* ---- HTTP: a server that answers with the data, to the real client ---- */

static pthread_mutex_t answer_lock = PTHREAD_MUTEX_INITIALIZER;
static char answer[MAX_ANSWER];
static size_t answer_len;
static int listener = -1;

/* On a thread of its own; touches nothing of the server's. */
static void *
serve(void *arg)
{
	for (;;)
	{
		char buffer[MAX_ANSWER];
		size_t len = 0;
		int fd = accept(listener, NULL, NULL);

		if (fd < 0)
			continue;
		while (len < sizeof(buffer) && (len < 4 || memcmp(buffer + len - 4, "\r\n\r\n", 4) != 0))
		{
			ssize_t got = recv(fd, buffer + len, sizeof(buffer) - len, 0);

			if (got <= 0)
				break;
			len += got;
		}
		pthread_mutex_lock(&answer_lock);
		len = answer_len;
		memcpy(buffer, answer, len);
		pthread_mutex_unlock(&answer_lock);
		(void) !send(fd, buffer, len, MSG_NOSIGNAL);
		close(fd);
	}
	return NULL;
}

static const char *
server_url(void)
{
	static char url[64];
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof(address);
	sigset_t all;
	sigset_t saved;
	pthread_t thread;

	if (listener >= 0)
		return url;
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *) &address, len) != 0 ||
		listen(listener, 16) != 0 || getsockname(listener, (struct sockaddr *) &address, &len) != 0)
		elog(FATAL, "could not listen: %m");
	snprintf(url, sizeof(url), "http://127.0.0.1:%d/", ntohs(address.sin_port));
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &saved);
	if (pthread_create(&thread, NULL, serve, NULL) != 0)
		elog(FATAL, "could not start a thread");
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	return url;
}

static void
run_http(const char *data, size_t size)
{
	HttpRequest request = {.method = "GET", .url = server_url(), .timeout_ms = 5000};
	HttpReply *reply;

	pthread_mutex_lock(&answer_lock);
	answer_len = Min(size, sizeof(answer));
	memcpy(answer, data, answer_len);
	pthread_mutex_unlock(&answer_lock);

	reply = http_perform(&request);
	check(reply != NULL && reply->body != NULL && reply->body[reply->body_len] == '\0');
	check(reply->body_len <= HTTP_MAX_REPLY);
	check((reply->status == 0) == (reply->error != NULL));
	check(reply->status >= 0 && reply->status <= 999);
	check(reply->retry_after_s >= -1 && reply->retry_after_s < 10000000);
	check(reply->millis < 4000); /* the answer has an end, so nothing is to be waited for */
	for (const char *p = reply->request_id; p != NULL && *p != '\0'; p++)
		check(*p > ' ' && *p < 0x7f);
	for (const char *p = reply->error; p != NULL && *p != '\0'; p++)
		check(*p >= ' ' && *p < 0x7f);
	check_judgement(reply);
}

/* ---- what users and administrators write ---- */

static void
run_options(const char *data, size_t size)
{
	const Provider *provider = size > 0 && (*data & 4) ? &noop_provider : &ec2_provider;
	OptionScope scope = size > 0 ? *data & 3 : 0;
	Jsonb *options;

	if (size < 2 || memchr(data + 1, '\0', size - 1) != NULL ||
		!pg_verify_mbstr(PG_UTF8, data + 1, size - 1, true))
		return; /* the server itself would have refused it */
	options = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(data + 1)));
	for (const ProviderOption *option = provider->options; option->name != NULL; option++)
	{
		(void) option_text(options, option->name);
		(void) option_bool(options, option->name, false);
		(void) option_int(options, option->name, 0);
		(void) option_list(options, option->name);
		(void) handle_set_int(handle_set_text(options, option->name, NULL), option->name, 1);
	}
	provider_check_options(provider, scope, options);
	for (const ProviderOption *option = provider->options; option->name != NULL; option++)
	{
		if (option->type == 'd')
			check(option_ms(options, option->name, 0) >= 0);
	}
}

static void
run_keyring(const char *data, size_t size)
{
	int fd = open(avm_key_file, O_WRONLY | O_TRUNC | O_CREAT | O_CLOEXEC, 0600);
	char *id;

	check(fd >= 0 && write(fd, data, size) == (ssize_t) size && close(fd) == 0);
	if (keyring_problem(&id) == NULL)
	{
		check(strlen(id) >= 1 && strlen(id) <= KEYRING_ID_MAX);
		check(strlen(keyring_key_text(id)) == KEYRING_TEXT_LEN);
		(void) keyring_bootstrap_token(id, "session", 1);
	}
}

static const Target targets[] = {
	{"xml", run_xml, false},		 {"aws", run_aws, false},	  {"ec2", run_ec2, false},
	{"login", run_login, false},	 {"http", run_http, false},	  {"options", run_options, true},
	{"keyring", run_keyring, false}, {"joint", run_joint, false},
};

static int
run_one(const uint8_t *data, size_t size)
{
	MemoryContext old = MemoryContextSwitchTo(context);
	char *copy = MemoryContextAlloc(context, size + 1);

	memcpy(copy, data, size);
	copy[size] = '\0';
	PG_TRY();
	{
		target->run(copy, size);
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		if (!target->may_raise || ERRCODE_TO_CATEGORY(error->sqlerrcode) == ERRCODE_INTERNAL_ERROR)
		{
			fprintf(stderr, "raised: %s\n", error->message);
			__builtin_trap();
		}
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	MemoryContextReset(context);
	return 0;
}

/* agentvm_fuzz(VARIADIC text[]): the target, then libFuzzer's arguments; does not return. */
Datum
agentvm_fuzz(PG_FUNCTION_ARGS)
{
	Datum *words;
	int nwords;
	char **argv;

	deconstruct_array(PG_GETARG_ARRAYTYPE_P(0), TEXTOID, -1, false, TYPALIGN_INT, &words, NULL,
					  &nwords);
	argv = palloc0((nwords + 1) * sizeof(char *));
	for (int i = 0; i < nwords; i++)
		argv[i] = TextDatumGetCString(words[i]);
	for (int i = 0; i < lengthof(targets); i++)
	{
		if (strcmp(argv[0], targets[i].name) == 0)
			target = &targets[i];
	}
	if (target == NULL)
		elog(ERROR, "unknown target \"%s\"", argv[0]);
	context = AllocSetContextCreate(TopMemoryContext, "fuzz", 0, 1024, 1024);
	LLVMFuzzerRunDriver(&nwords, &argv, run_one);
	PG_RETURN_VOID();
}
