/*-------------------------------------------------------------------------
 *
 * boot.c
 *		What a VM is told at its first boot.
 *
 * The boot script is a constant text plus one base64 payload and two numbers,
 * and nothing else is ever interpolated.  It arms a power-off at the ceiling of
 * the session's lifetime, for which no control plane is needed (VMs end when
 * they shut down), then unpacks the payload: files of text lines.  It is POSIX
 * sh and runs under bash with systemd as well as under busybox without.
 *
 * A launch that is repeated must send the very same bytes.  So what goes into
 * the payload is settled once per attempt and kept in the handle, except for
 * the bootstrap token: that is derived anew each time, so that it never gets
 * into a table.  (EC2 answers a new version of the script between two sends of
 * one launch with IdempotentParameterMismatch, which the launch survives.)
 *
 *-------------------------------------------------------------------------
 */
#include "agentvm.h"

#include <openssl/evp.h>

#include "lib/stringinfo.h"
#include "storage/fd.h"
#include "utils/timestamp.h"

#include "db.h"
#include "providers/boot.h"
#include "secret/secret.h"

#define MAX_CA_FILE (64 * 1024)

#define EPOCH_SHIFT_MS                                                                             \
	((int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY * INT64CONST(1000))

/* Stands for the bootstrap token in what the handle keeps. */
#define TOKEN_MARK "@bootstrap-token@"

/* The script: what comes before the numbers and the payload, after, and last. */
static const char boot_script_head[] = "#!/bin/sh\n"
									   "# Written by agentvm. All that varies is in the next three "
									   "lines.\n";

static const char boot_script_tail[] =
	"umask 077\n"
	"mkdir -p /etc/agentvm\n"
	"\n"
	"# Whatever else happens, this machine ends itself by then; armed again at every boot.\n"
	"echo \"$hard_stop $longest\" > /etc/agentvm/hard-stop\n"
	"cat > /etc/agentvm/hard-stop.sh <<'END'\n"
	"#!/bin/sh\n"
	"read -r hard_stop longest < /etc/agentvm/hard-stop\n"
	"left=$((hard_stop - $(date +%s)))\n"
	"[ \"$left\" -le \"$longest\" ] || left=$longest\n"
	"minutes=$(((left + 59) / 60))\n"
	"[ \"$minutes\" -ge 1 ] || minutes=1\n"
	"shutdown -P \"+$minutes\" 2> /dev/null\n"
	"$(command -v nohup) sh -c \\\n"
	"\t\"sleep $((minutes * 60 + 60)); systemctl poweroff -f || poweroff -f\" \\\n"
	"\t> /dev/null 2>&1 < /dev/null &\n"
	"END\n"
	"chmod 0700 /etc/agentvm/hard-stop.sh\n"
	"[ ! -d /var/lib/cloud/scripts/per-boot ] ||\n"
	"\tcp /etc/agentvm/hard-stop.sh /var/lib/cloud/scripts/per-boot/agentvm-hard-stop\n"
	"sh /etc/agentvm/hard-stop.sh\n"
	"\n"
	"# A payload: for each file a line \"MODE PATH LINES\", then its lines.\n"
	"unpack() {\n"
	"\tprintf %s \"$1\" | base64 -d | while read -r mode path lines; do\n"
	"\t\twhile [ \"$lines\" -gt 0 ]; do\n"
	"\t\t\tIFS= read -r line || break\n"
	"\t\t\tprintf '%s\\n' \"$line\"\n"
	"\t\t\tlines=$((lines - 1))\n"
	"\t\tdone > \"$path.new\" && chmod \"$mode\" \"$path.new\" && mv -f \"$path.new\" \"$path\"\n"
	"\tdone\n"
	"}\n"
	"unpack \"$payload\"\n";

/*
 * The payload is elsewhere: what has been unpacked is the region and the name of
 * the parameter that has it.  Python is there wherever cloud-init is, which runs
 * this.  The variables are those of AWS's own tools, for tests.
 */
static const char boot_script_fetch[] =
	"\n"
	"unpack \"$(python3 - <<'END'\n"
	"import hashlib, hmac, json, os, sys, time, urllib.request\n"
	"\n"
	"region, name = open(\"/etc/agentvm/parameter\").read().split()\n"
	"machine = os.environ.get(\"AWS_EC2_METADATA_SERVICE_ENDPOINT\", \"http://169.254.169.254\")\n"
	"domain = \"amazonaws.com.cn\" if region.startswith(\"cn-\") else \"amazonaws.com\"\n"
	"ssm = os.environ.get(\"AWS_ENDPOINT_URL_SSM\", \"https://ssm.%s.%s\" % (region, domain))\n"
	"near = urllib.request.build_opener(urllib.request.ProxyHandler({}))\n"
	"far = urllib.request.build_opener()\n"
	"\n"
	"\n"
	"def call(opener, method, url, headers, body=None):\n"
	"    request = urllib.request.Request(url, data=body, headers=headers, method=method)\n"
	"    with opener.open(request, timeout=10) as reply:\n"
	"        return reply.read(1 << 20).decode()\n"
	"\n"
	"\n"
	"def digest(text):\n"
	"    return hashlib.sha256(text).hexdigest()\n"
	"\n"
	"\n"
	"def fetch():\n"
	"    token = call(near, \"PUT\", machine + \"/latest/api/token\",\n"
	"                 {\"X-aws-ec2-metadata-token-ttl-seconds\": \"60\"})\n"
	"    roles = machine + \"/latest/meta-data/iam/security-credentials/\"\n"
	"    token = {\"X-aws-ec2-metadata-token\": token}\n"
	"    role = call(near, \"GET\", roles, token).split()[0]\n"
	"    keys = json.loads(call(near, \"GET\", roles + role, token))\n"
	"\n"
	"    body = json.dumps({\"Name\": name, \"WithDecryption\": True}).encode()\n"
	"    now = time.strftime(\"%Y%m%dT%H%M%SZ\", time.gmtime())\n"
	"    scope = \"%s/%s/ssm/aws4_request\" % (now[:8], region)\n"
	"    headers = {\"content-type\": \"application/x-amz-json-1.1\", \"host\": "
	"ssm.split(\"//\")[1],\n"
	"               \"x-amz-date\": now, \"x-amz-security-token\": keys[\"Token\"],\n"
	"               \"x-amz-target\": \"AmazonSSM.GetParameter\"}\n"
	"    names = \";\".join(sorted(headers))\n"
	"    lines = \"\".join(\"%s:%s\\n\" % header for header in sorted(headers.items()))\n"
	"    request = \"POST\\n/\\n\\n%s\\n%s\\n%s\" % (lines, names, digest(body))\n"
	"    text = \"AWS4-HMAC-SHA256\\n%s\\n%s\\n%s\" % (now, scope, digest(request.encode()))\n"
	"    key = (\"AWS4\" + keys[\"SecretAccessKey\"]).encode()\n"
	"    for part in scope.split(\"/\") + [text]:\n"
	"        key = hmac.new(key, part.encode(), hashlib.sha256).digest()\n"
	"    headers[\"authorization\"] = (\"AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, "
	"Signature=%s\"\n"
	"                                % (keys[\"AccessKeyId\"], scope, names, key.hex()))\n"
	"    return json.loads(call(far, \"POST\", ssm + \"/\", headers, "
	"body))[\"Parameter\"][\"Value\"]\n"
	"\n"
	"\n"
	"# the machine's role may come a while after the machine\n"
	"for again in range(60):\n"
	"    try:\n"
	"        print(fetch())\n"
	"        break\n"
	"    except Exception as error:\n"
	"        print(\"agentvm: could not read parameter %s: %s\" % (name, type(error).__name__), "
	"file=sys.stderr)\n"
	"        time.sleep(min(again + 1, 10))\n"
	"END\n"
	")\"\n"
	"rm -f /etc/agentvm/parameter\n";

static const char boot_script_end[] =
	"if systemctl cat agentvm-runtime.service > /dev/null 2>&1; then\n"
	"\tsystemctl restart --no-block agentvm-runtime.service\n"
	"fi\n"
	"exit 0\n";

int64
boot_epoch_ms(TimestampTz at)
{
	return at / 1000 + EPOCH_SHIFT_MS;
}

bool
boot_is_printable(const char *text, size_t max_len)
{
	size_t len = strlen(text);

	for (; *text != '\0'; text++)
	{
		if (*text < 0x20 || *text > 0x7e)
			return false;
	}
	return len > 0 && len <= max_len;
}

/*
 * Append "NAME=value" to runtime.env.  It is read by systemd and may be by a
 * shell, so what would have to be quoted is refused.
 */
static void
add_env(StringInfo env, const char *name, const char *value)
{
	if (!boot_is_printable(value, 2048) || strpbrk(value, " \"'`\\$#") != NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("value for %s of the VM has characters that are not allowed there", name));
	appendStringInfo(env, "%s=%s\n", name, value);
}

/* The gateway's certificate authority, with lines ended by newlines. */
static char *
read_ca_file(void)
{
	char *buffer = palloc(MAX_CA_FILE + 2);
	StringInfoData text;
	FILE *file;
	size_t len;

	file = AllocateFile(avm_gateway_ca_file, "r");
	if (file == NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("could not open agentvm.gateway_ca_file \"%s\": %m", avm_gateway_ca_file));
	len = fread(buffer, 1, MAX_CA_FILE + 1, file);
	FreeFile(file);
	buffer[len] = '\0';
	if (len > MAX_CA_FILE)
		ereport(ERROR, errcode(AVM_OVER_LIMIT),
				errmsg("agentvm.gateway_ca_file \"%s\" is larger than %d bytes",
					   avm_gateway_ca_file, MAX_CA_FILE));
	if (strlen(buffer) != len || strstr(buffer, "-----BEGIN CERTIFICATE-----") == NULL ||
		strstr(buffer, "PRIVATE KEY") != NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("agentvm.gateway_ca_file \"%s\" is no file of PEM certificates only",
					   avm_gateway_ca_file));

	/* Comments between certificates may be in any encoding: only ASCII goes into the handle. */
	initStringInfo(&text);
	for (size_t i = 0; i < len; i++)
	{
		if (buffer[i] == '\n' || (buffer[i] >= 0x20 && buffer[i] < 0x7f))
			appendStringInfoCharMacro(&text, buffer[i]);
	}
	if (text.data[text.len - 1] != '\n')
		appendStringInfoChar(&text, '\n');
	return text.data;
}

void
boot_plan(BootPlan *plan, const ProviderSession *session, int64 now, const char *device)
{
	int64 ceiling = session->ceiling_at != 0 ? boot_epoch_ms(session->ceiling_at)
											 : now + avm_max_lifetime_ceiling_s * INT64CONST(1000);
	StringInfoData env;

	memset(plan, 0, sizeof(*plan));
	plan->hard_stop = ceiling / 1000 + avm_deadline_grace_s;
	plan->longest = Max(plan->hard_stop - now / 1000, 60);
	if (!session->runtime)
		return;

	if (avm_gateway_url == NULL || avm_gateway_url[0] == '\0')
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("agentvm.gateway_url is not set, and the VM's runtime needs it"));
	if (session->boot_key_id == NULL)
		elog(ERROR, "session has no key for its bootstrap token");
	plan->key = pstrdup(session->boot_key_id);

	initStringInfo(&env);
	add_env(&env, "AGENTVM_SESSION_ID", session->session_id);
	add_env(&env, "AGENTVM_GATEWAY_URL", avm_gateway_url);
	if (device != NULL)
		add_env(&env, "AGENTVM_GATEWAY_DEVICE", device);
	add_env(&env, "AGENTVM_BOOTSTRAP_TOKEN", TOKEN_MARK);
	add_env(&env, "AGENTVM_HEARTBEAT_INTERVAL", psprintf("%d", avm_heartbeat_interval_s));
	add_env(&env, "AGENTVM_DEADLINE_GRACE", psprintf("%d", avm_deadline_grace_s));
	add_env(&env, "AGENTVM_DEADMAN_ALLOWANCE", psprintf("%d", avm_deadman_allowance_s));
	add_env(&env, "AGENTVM_MODE", session->warm ? "warm" : "session");
	if (avm_gateway_ca_file != NULL && avm_gateway_ca_file[0] != '\0')
	{
		add_env(&env, "AGENTVM_CA_FILE", "/etc/agentvm/gateway-ca.pem");
		plan->ca = read_ca_file();
	}
	plan->env = env.data;
}

static void
add_file(StringInfo payload, const char *path, const char *content)
{
	int lines = 0;

	for (const char *p = content; *p != '\0'; p++)
		lines += *p == '\n';
	appendStringInfo(payload, "0600 %s %d\n%s", path, lines, content);
}

char *
boot_base64(const char *bytes, int len)
{
	char *text = palloc((len + 2) / 3 * 4 + 1);

	/* ends it with a NUL; in a third of the time of PostgreSQL's own */
	(void) EVP_EncodeBlock((unsigned char *) text, (const unsigned char *) bytes, len);
	return text;
}

char *
boot_payload(const BootPlan *plan, const char *session_id, int attempt, int *len)
{
	StringInfoData payload;
	char *encoded;

	/* Room for all of it at once: a buffer that grows leaves its former self behind. */
	initStringInfo(&payload);
	enlargeStringInfo(&payload, (plan->env != NULL ? strlen(plan->env) : 0) +
									(plan->ca != NULL ? strlen(plan->ca) : 0) + 1024);
	if (plan->env != NULL && plan->key != NULL)
	{
		char *mark = strstr(plan->env, TOKEN_MARK);
		const Secret *token;
		StringInfoData env;

		if (mark == NULL)
			elog(ERROR, "boot environment has no place for the token");
		token = keyring_bootstrap_token(plan->key, session_id, attempt);
		initStringInfo(&env);
		enlargeStringInfo(&env, strlen(plan->env) + secret_len(token));
		appendBinaryStringInfo(&env, plan->env, mark - plan->env);
		appendStringInfoString(&env, secret_bytes(token));
		appendStringInfoString(&env, mark + strlen(TOKEN_MARK));
		add_file(&payload, "/etc/agentvm/runtime.env", env.data);
		secret_wipe(env.data, env.len);
	}
	if (plan->ca != NULL)
		add_file(&payload, "/etc/agentvm/gateway-ca.pem", plan->ca);

	encoded = boot_base64(payload.data, payload.len);
	secret_wipe(payload.data, payload.len);
	*len = strlen(encoded);
	return encoded;
}

/* The script with a payload in it, which is wiped; with "fetch", that tells where the payload is. */
static char *
make_script(const BootPlan *plan, char *payload, bool fetch, int *len)
{
	StringInfoData script;

	initStringInfo(&script);
	enlargeStringInfo(&script, sizeof(boot_script_head) + sizeof(boot_script_tail) +
								   sizeof(boot_script_fetch) + sizeof(boot_script_end) +
								   strlen(payload) + 1024);
	appendStringInfoString(&script, boot_script_head);
	appendStringInfo(&script,
					 "hard_stop=" INT64_FORMAT "\nlongest=" INT64_FORMAT "\npayload='%s'\n",
					 plan->hard_stop, plan->longest, payload);
	appendStringInfoString(&script, boot_script_tail);
	if (fetch)
		appendStringInfoString(&script, boot_script_fetch);
	appendStringInfoString(&script, boot_script_end);
	secret_wipe(payload, strlen(payload));
	*len = script.len;
	return script.data;
}

char *
boot_script(const BootPlan *plan, const char *session_id, int attempt, int *len)
{
	return make_script(plan, boot_payload(plan, session_id, attempt, len), false, len);
}

char *
boot_script_of_parameter(const BootPlan *plan, const char *region, const char *name, int *len)
{
	StringInfoData payload;

	initStringInfo(&payload);
	add_file(&payload, "/etc/agentvm/parameter", psprintf("%s\n%s\n", region, name));
	return make_script(plan, boot_base64(payload.data, payload.len), true, len);
}

/* Settle the plan of a session that could be; raises for what would keep it from being made. */
static void
plan_for_size(BootPlan *plan, ProviderSession *session, const char *device)
{
	/* env and repositories would travel in clear, and whoever is on the way could answer; a port has no way */
	if (device == NULL && avm_gateway_url != NULL &&
		pg_strncasecmp(avm_gateway_url, "http://", 7) == 0 && !avm_allow_insecure_endpoints)
		ereport(
			ERROR, errcode(AVM_INVALID_CONFIGURATION), errmsg("agentvm.gateway_url is without TLS"),
			errhint("Use an https URL, or set agentvm.allow_insecure_endpoints."), hide_caller());
	memset(session, 0, sizeof(*session));
	session->session_id = "00000000-0000-0000-0000-000000000000";
	session->runtime = true;
	session->boot_key_id = keyring_current_id();
	boot_plan(plan, session, boot_epoch_ms(GetCurrentTimestamp()), device);
}

int
boot_payload_size(void)
{
	ProviderSession session;
	BootPlan plan;
	char *payload;
	int len;

	plan_for_size(&plan, &session, NULL);
	payload = boot_payload(&plan, session.session_id, 1, &len);
	secret_wipe(payload, len);
	return len;
}

int
boot_script_size(const char *device)
{
	ProviderSession session;
	BootPlan plan;
	char *script;
	int len;

	plan_for_size(&plan, &session, device);
	script = boot_script(&plan, session.session_id, 1, &len);
	secret_wipe(script, len);
	return len;
}
