/*-------------------------------------------------------------------------
 *
 * options.c
 *		Settings of the gateway: flags, or environment variables of the same names.
 *
 *-------------------------------------------------------------------------
 */
#include "options.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../common/log.h"
#include "vms.h"

#ifndef AGENTVM_VERSION
#define AGENTVM_VERSION "unknown"
#endif

typedef enum OptionKind
{
	OPTION_TEXT,
	OPTION_LIST,
	OPTION_NUMBER,
	OPTION_FLAG,
	OPTION_LEVEL
} OptionKind;

/* One line per option: what --help says is what is parsed. */
static const struct
{
	const char *name;
	OptionKind kind;
	size_t offset;
	int min, max;
	const char *value; /* default, as text; NULL: none */
	const char *help;
} known[] = {
#define AT(field) offsetof(Options, field)
	{"database", OPTION_TEXT, AT(database), 0, 0, "",
	 "libpq connection string or URI; what it lacks comes from PGHOST, PGPASSFILE and so on"},
	{"name", OPTION_TEXT, AT(name), 0, 0, NULL,
	 "this gateway's id in agentvm.gateway (default: the host's name)"},
	{"listen", OPTION_TEXT, AT(listen), 0, 0, "127.0.0.1", "IP address to listen on"},
	{"port", OPTION_NUMBER, AT(port), 1, 65535, "8443", "TCP port to listen on"},
	{"tls-cert", OPTION_TEXT, AT(tls_cert), 0, 0, NULL,
	 "PEM file of the certificate and its chain; read again on SIGHUP"},
	{"tls-key", OPTION_TEXT, AT(tls_key), 0, 0, NULL, "PEM file of its private key"},
	{"allow-plaintext", OPTION_FLAG, AT(allow_plaintext), 0, 1, NULL,
	 "allow plain HTTP on an address that is not a loopback one"},
	{"vm-sockets", OPTION_LIST, AT(vm_sockets), 0, 0, NULL,
	 "directory of sockets *.sock of VMs without a network: each is connected to, and what comes "
	 "through it is served as if it came to the port; may be given more than once, or several "
	 "with colons between them"},
	{"control", OPTION_TEXT, AT(control), 0, 0, NULL,
	 "where backends of the database ask for commands and files of VMs: unix:/PATH, or "
	 "ADDRESS:PORT "
	 "with the same certificate (without, on loopback addresses only, unless --allow-plaintext); "
	 "agentvm.gateway.control_address tells them"},
	{"max-call-memory", OPTION_NUMBER, AT(max_call_memory), 1, 65536, "256",
	 "MiB that such calls may take in all; beyond, they are to be tried again"},
	{"max-connections", OPTION_NUMBER, AT(max_connections), MIN_CONNECTIONS, 1000000, "20000",
	 "connections in all; fewer if the limit of open files (ulimit -n) is too low for as many"},
	{"max-per-address", OPTION_NUMBER, AT(max_per_address), 1, 1000000, "1000",
	 "connections from one address (VMs behind one NAT share theirs)"},
	{"request-timeout", OPTION_NUMBER, AT(request_timeout_s), 1, 600, "10",
	 "seconds in which a whole request must have arrived"},
	{"unauthenticated-rate", OPTION_NUMBER, AT(unauthenticated_rate), 1, 1000000, "60",
	 "refused tokens per address and minute, beyond which those that are not known wait for their "
	 "turn"},
	{"unauthenticated-lookups", OPTION_NUMBER, AT(unauthenticated_lookups), 0, 1000000, "200",
	 "such turns a second, in all, each address in turn; who gets none in time gets 429"},
	{"metrics-from", OPTION_TEXT, AT(metrics_from), 0, 0, "127.0.0.0/8,::1",
	 "who may read /metrics: addresses or networks, with commas between them (0.0.0.0/0,::/0: "
	 "anybody); VMs by their sockets never may"},
	{"drain", OPTION_NUMBER, AT(drain_s), 0, 600, "10",
	 "seconds for open requests to finish after SIGTERM"},
	{"log-level", OPTION_LEVEL, AT(log_level), 0, 0, "info", "debug, info, warning or error"},
	{"check", OPTION_FLAG, AT(check), 0, 1, NULL,
	 "verify settings, files and database connection, say what is wrong, and exit"},
#undef AT
};
#define NUM_KNOWN ((int) (sizeof(known) / sizeof(known[0])))

/* AGENTVM_GATEWAY_TLS_CERT for "tls-cert" */
static const char *
variable_name(const char *option)
{
	static char name[64];
	char *c;

	snprintf(name, sizeof(name), "AGENTVM_GATEWAY_%s", option);
	for (c = name; *c != '\0'; c++)
		*c = *c == '-' ? '_' : toupper((unsigned char) *c);
	return name;
}

static void
print_help(void)
{
	int i;

	printf(
		"agentvm-gateway is the door that VMs knock on: bootstrap, heartbeats, command channel.\n\n"
		"Usage: agentvm-gateway [OPTION]...\n\n"
		"Each option can also be set in the environment: AGENTVM_GATEWAY_PORT for --port.\n\n");
	for (i = 0; i < NUM_KNOWN; i++)
		printf("  --%s%s\n        %s%s%s%s\n", known[i].name,
			   known[i].kind == OPTION_FLAG ? "" : "=VALUE", known[i].help,
			   known[i].value && known[i].value[0] ? " (default: " : "",
			   known[i].value && known[i].value[0] ? known[i].value : "",
			   known[i].value && known[i].value[0] ? ")" : "");
	printf("  --help\n        this text\n  --version\n        the version\n\n"
		   "Signals: SIGHUP reads the certificate again, SIGTERM and SIGINT drain and end.\n"
		   "The database role should be a member of agentvm_gateway and of nothing else.\n");
}

static void
refuse(const char *name, const char *value, const char *why)
{
	fprintf(stderr, "agentvm-gateway: --%s=%s: %s\n", name, value, why);
	exit(2);
}

static void
set_option(Options *options, int i, const char *value)
{
	char *field = (char *) options + known[i].offset;

	switch (known[i].kind)
	{
		case OPTION_TEXT:
			*(const char **) field = value;
			break;
		case OPTION_LIST:
		{
			const char **list = (const char **) field;
			char *copy = strdup(value);
			char *state;
			char *item;
			int n = 0;

			while (list[n] != NULL)
				n++;
			for (item = strtok_r(copy, ":", &state); item; item = strtok_r(NULL, ":", &state))
			{
				if (n == MAX_VM_SOCKETS)
					refuse(known[i].name, value, "there are too many");
				list[n++] = item; /* the copy lives as long as the process */
			}
			break;
		}
		case OPTION_NUMBER:
		{
			char *end;
			long number;
			static char why[64];

			errno = 0;
			number = strtol(value, &end, 10);
			snprintf(why, sizeof(why), "must be a number from %d to %d", known[i].min,
					 known[i].max);
			if (errno != 0 || end == value || *end != '\0' || number < known[i].min ||
				number > known[i].max)
				refuse(known[i].name, value, why);
			*(int *) field = (int) number;
			break;
		}
		case OPTION_FLAG:
			if (strcmp(value, "on") != 0 && strcmp(value, "off") != 0)
				refuse(known[i].name, value, "must be on or off");
			*(bool *) field = strcmp(value, "on") == 0;
			break;
		case OPTION_LEVEL:
			*(int *) field = log_level_find(value);
			if (*(int *) field < 0)
				refuse(known[i].name, value, "must be debug, info, warning or error");
			break;
	}
}

void
options_parse(Options *options, int argc, char **argv)
{
	static char hostname[HOST_NAME_MAX + 1];
	struct option longs[NUM_KNOWN + 3];
	bool is_given[NUM_KNOWN] = {false};
	int i;

	memset(options, 0, sizeof(*options));
	memset(longs, 0, sizeof(longs));
	for (i = 0; i < NUM_KNOWN; i++)
	{
		const char *value = getenv(variable_name(known[i].name));

		longs[i].name = known[i].name;
		longs[i].has_arg = known[i].kind == OPTION_FLAG ? optional_argument : required_argument;
		longs[i].val = i;
		if (value == NULL || value[0] == '\0')
			value = known[i].value;
		if (value != NULL)
			set_option(options, i, value);
	}
	longs[NUM_KNOWN].name = "help";
	longs[NUM_KNOWN].val = NUM_KNOWN;
	longs[NUM_KNOWN + 1].name = "version";
	longs[NUM_KNOWN + 1].val = NUM_KNOWN + 1;

	for (;;)
	{
		int found = getopt_long(argc, argv, "", longs, NULL);

		if (found == -1)
			break;
		if (found == NUM_KNOWN)
		{
			print_help();
			exit(0);
		}
		if (found == NUM_KNOWN + 1)
		{
			printf("agentvm-gateway %s\n", AGENTVM_VERSION);
			exit(0);
		}
		if (found < 0 || found >= NUM_KNOWN)
		{
			fprintf(stderr, "Try --help.\n");
			exit(2);
		}
		/* a list of the environment is not added to */
		if (known[found].kind == OPTION_LIST && !is_given[found])
			memset((char *) options + known[found].offset, 0, sizeof(options->vm_sockets));
		is_given[found] = true;
		set_option(options, found, optarg ? optarg : "on");
	}
	if (optind < argc)
	{
		fprintf(stderr, "agentvm-gateway: \"%s\" is not an option; try --help\n", argv[optind]);
		exit(2);
	}
	if (options->name == NULL)
	{
		gethostname(hostname, sizeof(hostname) - 1);
		options->name = hostname;
	}
}

/*
 * Read the first network of a list, as one of IPv6 (of which IPv4's are a part), and
 * go on to the next.  Returns false where there is none.
 */
static bool
next_network(const char **list, struct in6_addr *network, int *bits)
{
	static const struct in6_addr mapped = {.s6_addr = {[10] = 0xff, [11] = 0xff}};
	char text[64];
	size_t len = strcspn(*list, ",");
	char *slash;
	int most;

	if (len >= sizeof(text))
		return false;
	memcpy(text, *list, len);
	text[len] = '\0';
	*list += len + ((*list)[len] == ',');
	slash = strchr(text, '/');
	if (slash != NULL)
		*slash++ = '\0';
	most = strchr(text, ':') != NULL ? 128 : 32;
	*network = mapped;
	if (inet_pton(most == 32 ? AF_INET : AF_INET6, text,
				  network->s6_addr + (most == 32 ? 12 : 0)) != 1)
		return false;
	*bits = most;
	if (slash != NULL && (slash[0] == '\0' || slash[strspn(slash, "0123456789")] != '\0' ||
						  strlen(slash) > 3 || (*bits = atoi(slash)) > most))
		return false;
	*bits += 128 - most;
	return true;
}

int
options_control(const Options *options, const char **address, int *port)
{
	static char host[64];
	unsigned char parsed[sizeof(struct in6_addr)];
	const char *control = options->control;
	const char *colon = control != NULL ? strrchr(control, ':') : NULL;
	size_t len;

	if (control == NULL)
		return 0;
	if (strncmp(control, "unix:", 5) == 0)
	{
		*address = control + 5;
		return control[5] == '/' && strlen(control + 5) <= MAX_CONTROL_PATH ? 'u' : -1;
	}
	if (colon == NULL || colon[1] == '\0' || strspn(colon + 1, "0123456789") != strlen(colon + 1) ||
		strlen(colon + 1) > 5 || (*port = atoi(colon + 1)) < 1 || *port > 65535)
		return -1;
	len = (size_t) (colon - control);
	if (control[0] == '[' && len > 2 && control[len - 1] == ']')
	{
		control++;
		len -= 2;
	}
	if (len >= sizeof(host))
		return -1;
	memcpy(host, control, len);
	host[len] = '\0';
	*address = host;
	return inet_pton(AF_INET, host, parsed) == 1 || inet_pton(AF_INET6, host, parsed) == 1 ? 't'
																						   : -1;
}

bool
options_metrics_for(const Options *options, const struct sockaddr_storage *client)
{
	struct in6_addr address = {.s6_addr = {[10] = 0xff, [11] = 0xff}};
	const char *list = options->metrics_from;
	struct in6_addr network;
	int bits;

	if (client->ss_family == AF_INET6)
		address = ((const struct sockaddr_in6 *) client)->sin6_addr;
	else if (client->ss_family == AF_INET)
		memcpy(address.s6_addr + 12, &((const struct sockaddr_in *) client)->sin_addr, 4);
	else
		return false;
	while (*list != '\0' && next_network(&list, &network, &bits))
	{
		int whole = bits / 8;

		if (memcmp(address.s6_addr, network.s6_addr, (size_t) whole) == 0 &&
			(bits % 8 == 0 ||
			 (address.s6_addr[whole] ^ network.s6_addr[whole]) >> (8 - bits % 8) == 0))
			return true;
	}
	return false;
}

static bool
is_loopback(const char *address)
{
	struct in_addr v4;
	struct in6_addr v6;

	if (inet_pton(AF_INET, address, &v4) == 1)
		return (ntohl(v4.s_addr) >> 24) == 127;
	return inet_pton(AF_INET6, address, &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

const char *
options_problem(const Options *options)
{
	static char problem[512];
	unsigned char address[sizeof(struct in6_addr)];
	const char *control = NULL;
	int port, kind = options_control(options, &control, &port);
	const char *metrics_from = options->metrics_from;
	struct in6_addr network;
	SSL_CTX *context;
	bool usable;
	int bits;

	if (inet_pton(AF_INET, options->listen, address) != 1 &&
		inet_pton(AF_INET6, options->listen, address) != 1)
	{
		snprintf(problem, sizeof(problem), "--listen=%s is not an IP address", options->listen);
		return problem;
	}
	while (*metrics_from != '\0')
	{
		if (!next_network(&metrics_from, &network, &bits))
		{
			snprintf(problem, sizeof(problem), "--metrics-from=%s is not a list of networks",
					 options->metrics_from);
			return problem;
		}
	}
	if ((options->tls_cert == NULL) != (options->tls_key == NULL))
		return "--tls-cert and --tls-key are needed together";
	if (kind < 0)
	{
		snprintf(
			problem, sizeof(problem),
			"--control=%s is neither unix:/PATH, of at most %d bytes, nor ADDRESS:PORT with an IP "
			"address",
			options->control, MAX_CONTROL_PATH);
		return problem;
	}
	if (kind == 't' && options->tls_cert == NULL && !is_loopback(control) &&
		!options->allow_plaintext)
	{
		snprintf(problem, sizeof(problem),
				 "--control=%s without TLS: give --tls-cert and --tls-key, or --allow-plaintext if "
				 "something in front of this gateway speaks TLS",
				 options->control);
		return problem;
	}
	if (options->tls_cert == NULL)
	{
		if (is_loopback(options->listen) || options->allow_plaintext)
			return NULL;
		snprintf(problem, sizeof(problem),
				 "--listen=%s without TLS: give --tls-cert and --tls-key, or --allow-plaintext if "
				 "something in front of this gateway speaks TLS",
				 options->listen);
		return problem;
	}
	context = SSL_CTX_new(TLS_server_method());
	usable = context != NULL && SSL_CTX_use_certificate_chain_file(context, options->tls_cert) == 1;
	if (!usable)
		snprintf(problem, sizeof(problem), "--tls-cert=%s: %s", options->tls_cert,
				 ERR_reason_error_string(ERR_peek_last_error()));
	else if (SSL_CTX_use_PrivateKey_file(context, options->tls_key, SSL_FILETYPE_PEM) != 1)
	{
		usable = false;
		snprintf(problem, sizeof(problem), "--tls-key=%s: %s", options->tls_key,
				 ERR_reason_error_string(ERR_peek_last_error()));
	}
	else if (SSL_CTX_check_private_key(context) != 1)
	{
		usable = false;
		snprintf(problem, sizeof(problem), "--tls-key=%s is not the key of --tls-cert=%s",
				 options->tls_key, options->tls_cert);
	}
	ERR_clear_error();
	SSL_CTX_free(context);
	return usable ? NULL : problem;
}

const char *
options_vm_sockets_problem(const Options *options)
{
	static char problem[512];
	const char *const *dir;

	for (dir = options->vm_sockets; *dir != NULL; dir++)
	{
		DIR *entries = opendir(*dir);
		const struct dirent *entry;

		if (entries == NULL || faccessat(dirfd(entries), ".", X_OK, AT_EACCESS) != 0)
		{
			snprintf(problem, sizeof(problem), "--vm-sockets=%s: %s", *dir, strerror(errno));
			if (entries != NULL)
				closedir(entries);
			return problem;
		}
		while ((entry = readdir(entries)) != NULL)
		{
			if (vms_is_socket(dirfd(entries), entry->d_name) &&
				faccessat(dirfd(entries), entry->d_name, W_OK, AT_EACCESS) != 0)
			{
				snprintf(problem, sizeof(problem),
						 "--vm-sockets=%s: %s may not be connected to: %s", *dir, entry->d_name,
						 strerror(errno));
				closedir(entries);
				return problem;
			}
		}
		closedir(entries);
	}
	return NULL;
}
