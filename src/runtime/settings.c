/*-------------------------------------------------------------------------
 *
 * settings.c
 *		Settings of the runtime: lines KEY=VALUE of a file that only its owner may read.
 *
 * The file comes from the boot payload (see providers/boot.c) or from an
 * image.  It is read here rather than by systemd, so that the token in it is in
 * nobody's environment.
 *
 *-------------------------------------------------------------------------
 */
#include "settings.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/crypto.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../common/log.h"
#include "files.h"

#define MAX_FILE (64 * 1024)
#define TOKEN_KEY "AGENTVM_BOOTSTRAP_TOKEN"
#define PORT_NAME_CHARS "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-._"

typedef enum SettingKind
{
	SETTING_TEXT,
	SETTING_BOOL,
	SETTING_COUNT,
	SETTING_SECONDS,
	SETTING_IGNORED
} SettingKind;

/* One line per setting: what --help says is what is read. */
static const struct
{
	const char *key;
	SettingKind kind;
	size_t offset;
	double min, max;
	const char *value; /* default, as text; NULL: none */
	const char *help;
} known[] = {
#define AT(field) offsetof(Settings, field)
	{"AGENTVM_GATEWAY_URL", SETTING_TEXT, AT(gateway_url), 0, 0, NULL,
	 "https://HOST[:PORT][/PREFIX] of the gateway; needed"},
	{"AGENTVM_GATEWAY_DEVICE", SETTING_TEXT, AT(gateway_device), 0, 0, NULL,
	 "name of the virtio port, or path of the device, through which the gateway is reached; a VM "
	 "needs no network then, and http is allowed, since nothing leaves its host (default: dial "
	 "the host in the URL)"},
	{TOKEN_KEY, SETTING_TEXT, AT(bootstrap_token), 0, 0, NULL,
	 "works once; taken out of the file after that"},
	{"AGENTVM_CA_FILE", SETTING_TEXT, AT(ca_file), 0, 0, NULL,
	 "PEM file of the authorities to trust (default: the system's)"},
	{"AGENTVM_FINGERPRINT", SETTING_TEXT, AT(fingerprint_text), 0, 0, NULL,
	 "SHA-256 of the gateway's certificate in hex, colons allowed: no other certificate is "
	 "accepted, and of this one neither name nor dates matter; not together with AGENTVM_CA_FILE"},
	{"AGENTVM_ALLOW_INSECURE", SETTING_BOOL, AT(allow_insecure), 0, 1, "0",
	 "1 allows http:// to other hosts than this one"},
	{"AGENTVM_MODE", SETTING_TEXT, AT(mode), 0, 0, "session",
	 "session; or warm: env and repositories, without which no command runs, come once somebody "
	 "takes the VM"},
	{"AGENTVM_STATE_DIR", SETTING_TEXT, AT(state_dir), 0, 0, "/var/lib/agentvm",
	 "directory of session token, env.json and repos.json"},
	{"AGENTVM_WORK_DIR", SETTING_TEXT, AT(work_dir), 0, 0, "/workspace",
	 "directory into which repositories are cloned, in which commands run, and of paths that are "
	 "not absolute"},
	{"AGENTVM_POWEROFF_COMMAND", SETTING_TEXT, AT(poweroff_command), 0, 0, NULL,
	 "program, called without arguments, that powers the machine off (default: systemctl "
	 "poweroff, else poweroff, else the kernel is asked; as PID 1 the kernel is)"},
	{"AGENTVM_LOG_LEVEL", SETTING_TEXT, AT(log_level), 0, 0, "info",
	 "debug, info, warning or error"},
	{"AGENTVM_SESSION_ID", SETTING_IGNORED, 0, 0, 0, NULL, "for people who read the file"},
	{"AGENTVM_HEARTBEAT_INTERVAL", SETTING_SECONDS, AT(heartbeat_interval_ms), 0.1, 86400, "30",
	 "between heartbeats, until the control plane says otherwise"},
	{"AGENTVM_DEADLINE_GRACE", SETTING_SECONDS, AT(deadline_grace_ms), 0, 86400, "300",
	 "from the deadline to the power-off, until the control plane says otherwise"},
	{"AGENTVM_DEADMAN_ALLOWANCE", SETTING_SECONDS, AT(deadman_allowance_ms), 0.1, 2592000, "900",
	 "without control plane to the power-off, until the control plane says otherwise"},
	{"AGENTVM_BOOTSTRAP_TRIES", SETTING_COUNT, AT(bootstrap_tries), 1, 100000, "30",
	 "tries to bootstrap"},
	{"AGENTVM_BOOTSTRAP_INTERVAL", SETTING_SECONDS, AT(bootstrap_interval_ms), 0.01, 3600, "5",
	 "between tries to bootstrap, with jitter"},
	{"AGENTVM_HTTP_TIMEOUT", SETTING_SECONDS, AT(http_timeout_ms), 0.1, 600, "10",
	 "for a request, or for the channel to open"},
	{"AGENTVM_BACKOFF_MIN", SETTING_SECONDS, AT(backoff_min_ms), 0.01, 3600, "1",
	 "before the first new try of a heartbeat or the channel, with jitter"},
	{"AGENTVM_BACKOFF_MAX", SETTING_SECONDS, AT(backoff_max_ms), 0.01, 3600, "60",
	 "before any further one"},
	{"AGENTVM_POWEROFF_RETRY", SETTING_SECONDS, AT(poweroff_retry_ms), 0.1, 3600, "30",
	 "before the next way to power off is tried"},
	{"AGENTVM_CLONE_TIMEOUT", SETTING_SECONDS, AT(clone_timeout_ms), 0.1, 86400, "900",
	 "for git to clone a repository"},
	{"AGENTVM_MAX_COMMANDS", SETTING_COUNT, AT(max_commands), 1, 10000, "256",
	 "commands that run at once"},
	{"AGENTVM_OUTPUT_MEMORY", SETTING_COUNT, AT(output_memory), 1, 65536, NULL,
	 "MiB of memory for the output of all commands together; when it is exceeded, that of those "
	 "that have ended longest ago goes first (default: 64, or a quarter of the machine's memory "
	 "if that is less)"},
	{"AGENTVM_PIDS_LIMIT", SETTING_COUNT, AT(pids_limit), 0, 4194304, "1024",
	 "processes and threads of all commands together, where there are control groups (version "
	 "2); 0: as many as they like"},
#undef AT
};
#define NUM_KNOWN ((int) (sizeof(known) / sizeof(known[0])))

static char problem[512];

#define PROBLEM(...) (snprintf(problem, sizeof(problem), __VA_ARGS__), problem)

void
settings_help(void)
{
	int i;

	for (i = 0; i < NUM_KNOWN; i++)
		printf("  %s%s\n        %s%s%s%s\n", known[i].key,
			   known[i].kind == SETTING_SECONDS ? " (seconds)" : "", known[i].help,
			   known[i].value ? " (default: " : "", known[i].value ? known[i].value : "",
			   known[i].value ? ")" : "");
}

static const char *
set(Settings *settings, int i, const char *value)
{
	char *field = (char *) settings + known[i].offset;
	double number = 0;
	char *end = (char *) value;

	if (known[i].kind == SETTING_COUNT || known[i].kind == SETTING_SECONDS ||
		known[i].kind == SETTING_BOOL)
	{
		if (isdigit((unsigned char) value[0]))
			number = strtod(value, &end);
		if (end == value || *end != '\0' || strspn(value, "0123456789.") != strlen(value) ||
			!(number >= known[i].min && number <= known[i].max) ||
			(known[i].kind != SETTING_SECONDS && number != (int) number))
			return PROBLEM("%s=%s must be a number from %g to %g", known[i].key, value,
						   known[i].min, known[i].max);
	}
	switch (known[i].kind)
	{
		case SETTING_TEXT:
			*(const char **) field = value[0] != '\0' ? value : NULL;
			break;
		case SETTING_BOOL:
			*(bool *) field = number != 0;
			break;
		case SETTING_COUNT:
			*(int *) field = (int) number;
			break;
		case SETTING_SECONDS:
			*(int64_t *) field = (int64_t) (number * 1000);
			break;
		case SETTING_IGNORED:
			break;
	}
	return NULL;
}

/* A line of the file: a comment, or KEY=VALUE with nothing quoted. */
static const char *
read_line(Settings *settings, char *line, int number)
{
	char *value;
	size_t len = strlen(line);
	int i;

	if (len > 0 && line[len - 1] == '\r')
		line[--len] = '\0';
	if (line[strspn(line, " \t")] == '\0' || line[0] == '#')
		return NULL;
	value = strchr(line, '=');
	if (value == NULL) /* the line itself might hold a secret */
		return PROBLEM("%s: line %d is not KEY=VALUE", settings->path, number);
	*value++ = '\0';
	for (i = 0; i < NUM_KNOWN; i++)
	{
		if (strcmp(line, known[i].key) == 0)
			return set(settings, i, value);
	}
	/* a newer control plane may write more than we know */
	log_line(LOG_LEVEL_WARNING, "setting is not known and ignored", "key", line, NULL);
	return NULL;
}

static bool
is_loopback(const char *host)
{
	struct in_addr v4;
	struct in6_addr v6;

	if (strcmp(host, "localhost") == 0)
		return true;
	if (inet_pton(AF_INET, host, &v4) == 1)
		return (ntohl(v4.s_addr) >> 24) == 127;
	return inet_pton(AF_INET6, host, &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

/* Take the URL apart; true when it is one that we can use. */
static bool
read_url(Settings *settings)
{
	const char *c = settings->gateway_url;
	const char *host;
	size_t len;

	settings->tls = strncmp(c, "https://", 8) == 0;
	if (!settings->tls && strncmp(c, "http://", 7) != 0)
		return false;
	c += settings->tls ? 8 : 7;
	host = c;
	if (*c == '[')
	{
		host = ++c;
		len = strspn(c, "0123456789abcdefABCDEF:.");
		c += len;
		if (*c++ != ']')
			return false;
	}
	else
	{
		len = strspn(c, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-._");
		c += len;
	}
	if (len == 0 || len >= sizeof(settings->host))
		return false;
	memcpy(settings->host, host, len);
	settings->port = settings->tls ? 443 : 80;
	if (*c == ':')
	{
		char *end;
		long port = isdigit((unsigned char) c[1]) ? strtol(c + 1, &end, 10) : 0;

		if (port < 1 || port > 65535)
			return false;
		settings->port = (int) port;
		c = end;
	}
	if (*c != '\0' && *c != '/')
		return false;
	len = strlen(c);
	while (len > 0 && c[len - 1] == '/')
		len--;
	if (len >= sizeof(settings->prefix) ||
		strspn(c, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-._~/") < len)
		return false;
	memcpy(settings->prefix, c, len);
	return true;
}

static bool
read_fingerprint(Settings *settings)
{
	const char *c = settings->fingerprint_text;
	int i;

	for (i = 0; i < FINGERPRINT_LEN; i++)
	{
		unsigned byte;

		if (i > 0 && *c == ':')
			c++;
		if (!isxdigit((unsigned char) c[0]) || !isxdigit((unsigned char) c[1]) ||
			sscanf(c, "%2x", &byte) != 1)
			return false;
		settings->fingerprint[i] = (uint8_t) byte;
		c += 2;
	}
	return *c == '\0';
}

static const char *
check(Settings *settings)
{
	const char *c;
	int level;

	if (settings->gateway_url == NULL)
		return PROBLEM("%s: AGENTVM_GATEWAY_URL is missing", settings->path);
	if (!read_url(settings))
		return PROBLEM("AGENTVM_GATEWAY_URL=%s is not https://HOST[:PORT][/PREFIX]",
					   settings->gateway_url);
	if (settings->gateway_device != NULL && settings->gateway_device[0] != '/' &&
		settings->gateway_device[strspn(settings->gateway_device, PORT_NAME_CHARS)] != '\0')
		return PROBLEM("AGENTVM_GATEWAY_DEVICE=%s is neither the name of a virtio port nor an "
					   "absolute path",
					   settings->gateway_device);
	if (!settings->tls && !settings->allow_insecure && settings->gateway_device == NULL &&
		!is_loopback(settings->host))
		return PROBLEM("AGENTVM_GATEWAY_URL=%s would send tokens in clear: use https, or set "
					   "AGENTVM_ALLOW_INSECURE=1",
					   settings->gateway_url);
	if (settings->ca_file != NULL && settings->fingerprint_text != NULL)
		return "AGENTVM_CA_FILE and AGENTVM_FINGERPRINT are alternatives: set one of them";
	if (settings->fingerprint_text != NULL && !read_fingerprint(settings))
		return PROBLEM("AGENTVM_FINGERPRINT=%s is not the 64 hex digits of a SHA-256",
					   settings->fingerprint_text);
	if (settings->mode == NULL ||
		(strcmp(settings->mode, "session") != 0 && strcmp(settings->mode, "warm") != 0))
		return PROBLEM("AGENTVM_MODE=%s must be session or warm",
					   settings->mode ? settings->mode : "");
	if (settings->state_dir == NULL || settings->state_dir[0] != '/' ||
		settings->work_dir == NULL || settings->work_dir[0] != '/')
		return "AGENTVM_STATE_DIR and AGENTVM_WORK_DIR must be absolute paths";
	if (settings->poweroff_command != NULL && settings->poweroff_command[0] != '/')
		return PROBLEM("AGENTVM_POWEROFF_COMMAND=%s must be an absolute path",
					   settings->poweroff_command);
	level = log_level_find(settings->log_level ? settings->log_level : "");
	if (level < 0)
		return PROBLEM("AGENTVM_LOG_LEVEL=%s must be debug, info, warning or error",
					   settings->log_level ? settings->log_level : "");
	log_set_level((LogLevel) level);
	if (settings->backoff_max_ms < settings->backoff_min_ms)
		return "AGENTVM_BACKOFF_MAX must not be less than AGENTVM_BACKOFF_MIN";
	if (settings->bootstrap_token != NULL)
	{
		for (c = settings->bootstrap_token; *c != '\0'; c++)
		{
			if (!isalnum((unsigned char) *c) && strchr("-._~+/=", *c) == NULL)
				return "AGENTVM_BOOTSTRAP_TOKEN is not a bearer token";
		}
		if (c - settings->bootstrap_token < 16 ||
			c - settings->bootstrap_token > PROTOCOL_MAX_TOKEN)
			return PROBLEM("AGENTVM_BOOTSTRAP_TOKEN must have from 16 to %d characters",
						   PROTOCOL_MAX_TOKEN);
	}
	return NULL;
}

const char *
settings_read(Settings *settings, const char *path)
{
	struct stat status;
	const char *wrong = NULL;
	char *content, *line, *next;
	size_t len;
	int i, number = 0;

	memset(settings, 0, sizeof(*settings));
	settings->path = path;
	for (i = 0; i < NUM_KNOWN; i++)
	{
		if (known[i].value != NULL)
			(void) set(settings, i, known[i].value);
	}
	if (stat(path, &status) != 0)
		return PROBLEM("%s: %s", path, strerror(errno));
	if (!S_ISREG(status.st_mode) || (status.st_mode & 077) != 0)
		return PROBLEM("%s holds a token: it must be a file with mode 0600, but has %04o", path,
					   (unsigned) (status.st_mode & 07777));
	if (status.st_uid != geteuid() && status.st_uid != 0)
		return PROBLEM("%s belongs to another user", path);
	content = file_read(path, MAX_FILE, &len);
	if (content == NULL)
		return PROBLEM("%s: %s", path, strerror(errno));
	if (strlen(content) != len)
		return PROBLEM("%s is no text file", path);
	for (line = content; line != NULL && wrong == NULL; line = next)
	{
		next = strchr(line, '\n');
		if (next != NULL)
			*next++ = '\0';
		wrong = read_line(settings, line, ++number);
	}
	return wrong ? wrong : check(settings);
}

bool
settings_erase_token(Settings *settings)
{
	char *content, *kept, *at;
	const char *line, *next;
	size_t len;
	int old;
	bool ok;

	if (settings->bootstrap_token == NULL)
		return true;
	content = file_read(settings->path, MAX_FILE, &len);
	old = open(settings->path, O_WRONLY | O_CLOEXEC);
	if (content == NULL || old < 0)
	{
		log_line(LOG_LEVEL_ERROR, "cannot erase the bootstrap token", "file", settings->path,
				 "reason", strerror(errno), NULL);
		free(content);
		if (old >= 0)
			close(old);
		return false;
	}
	kept = at = malloc(len + 1);
	for (line = content; *line != '\0'; line = next)
	{
		next = line + strcspn(line, "\n");
		next += *next == '\n';
		if (strncmp(line, TOKEN_KEY "=", strlen(TOKEN_KEY) + 1) != 0)
		{
			memcpy(at, line, (size_t) (next - line));
			at += next - line;
		}
	}
	ok = file_replace(settings->path, kept, (size_t) (at - kept), true);
	if (ok)
		file_wipe(old); /* its blocks are free now, but not yet overwritten */
	close(old);
	OPENSSL_cleanse(content, len);
	free(content);
	free(kept);
	if (ok)
	{
		OPENSSL_cleanse(settings->bootstrap_token, strlen(settings->bootstrap_token));
		settings->bootstrap_token = NULL;
	}
	return ok;
}
