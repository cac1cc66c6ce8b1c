/* agentvm--0.2--0.3.sql: commands and files. A fresh 0.3 is made by agentvm--0.2.sql and this one */

-- complain if the script is sourced in psql rather than by CREATE or ALTER EXTENSION
\echo Use "CREATE EXTENSION agentvm CASCADE" or "ALTER EXTENSION agentvm UPDATE TO '0.3'" to load this file. \quit

-- the owner of a database may have made functions and operators that match our calls better than PostgreSQL's own
SET LOCAL search_path = pg_catalog, pg_temp;

-- ---------------------------------------------------------------------------
-- Tables
-- ---------------------------------------------------------------------------

ALTER TABLE agentvm.session_heartbeat ADD COLUMN gateway_id text;
COMMENT ON COLUMN agentvm.session_heartbeat.gateway_id IS 'the gateway that holds the session''s channel, as last heard';
COMMENT ON COLUMN agentvm.gateway.control_address IS 'where backends reach its control listener: unix:/path/of/socket or https://host:port; NULL: commands do not pass through it';

-- Backends go where control_address says: only administrators set it.  Until now gateways could, too, and nothing used it.
REVOKE INSERT, UPDATE, DELETE ON agentvm.gateway FROM agentvm_gateway;
GRANT INSERT (gateway_id) ON agentvm.gateway TO agentvm_gateway;
UPDATE agentvm.gateway SET control_address = NULL;
ALTER TABLE agentvm.gateway ADD CONSTRAINT control_address_is_sound CHECK (control_address ~ '^unix:/[!-~]{1,99}$'
	OR control_address ~ '^https?://([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\]):[1-9][0-9]{0,4}$');

-- by agentvm.run(): the backend without which the session is not needed any more
ALTER TABLE agentvm.session ADD COLUMN bound_pid int, ADD COLUMN bound_start timestamptz;
CREATE INDEX session_bound ON agentvm.session (bound_pid) WHERE bound_pid IS NOT NULL AND ended_at IS NULL;

-- by agentvm.pause() and agentvm.resume()
ALTER TABLE agentvm.session ADD COLUMN resumed_at timestamptz;
COMMENT ON COLUMN agentvm.session.resumed_at IS 'when the VM was last seen to run again after a pause: its silence counts from then';

CREATE TABLE agentvm.command (
	command_id uuid PRIMARY KEY,
	session_id uuid NOT NULL,
	team_id text NOT NULL,
	kind text NOT NULL CHECK (kind IN ('exec', 'upload', 'download')),
	role name NOT NULL,
	started_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX command_session ON agentvm.command (session_id);
COMMENT ON TABLE agentvm.command IS 'commands and transfers of files under way: begun, as the log says, and not known to have ended';
SELECT pg_catalog.pg_extension_config_dump('agentvm.command', '');
ALTER TABLE agentvm.command ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON agentvm.command FROM PUBLIC;
GRANT SELECT ON agentvm.command TO agentvm_user;
CREATE POLICY admin ON agentvm.command FOR SELECT TO agentvm_admin USING (true);
CREATE POLICY member ON agentvm.command FOR SELECT TO agentvm_user
	USING (team_id = ANY ((SELECT agentvm.visible_teams())::text[]));

-- for roles that a team's customers let us assume: made by us, so that no team can ask for another one's
ALTER TABLE agentvm.team ADD COLUMN external_id text NOT NULL DEFAULT gen_random_uuid()::text;
COMMENT ON COLUMN agentvm.team.external_id IS 'what the trust policy of a role of the team has to ask for (sts:ExternalId); not secret';

-- ---------------------------------------------------------------------------
-- Commands
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.exec(session_id uuid, command text, timeout interval DEFAULT '5 minutes', cwd text DEFAULT NULL,
	env jsonb DEFAULT '{}', stdin bytea DEFAULT NULL)
RETURNS TABLE (exit_code int, stdout text, stderr text, duration interval, timed_out boolean, truncated boolean)
LANGUAGE C VOLATILE ROWS 1 AS 'MODULE_PATHNAME', 'agentvm_exec';
COMMENT ON FUNCTION agentvm.exec(uuid, text, interval, text, jsonb, bytea) IS 'run a command in the VM and wait for its end; exit_code 124 and timed_out when its time is up';

CREATE FUNCTION agentvm.exec_bytes(session_id uuid, command text, timeout interval DEFAULT '5 minutes', cwd text DEFAULT NULL,
	env jsonb DEFAULT '{}', stdin bytea DEFAULT NULL)
RETURNS TABLE (exit_code int, stdout bytea, stderr bytea, duration interval, timed_out boolean, truncated boolean)
LANGUAGE C VOLATILE ROWS 1 AS 'MODULE_PATHNAME', 'agentvm_exec_bytes';
COMMENT ON FUNCTION agentvm.exec_bytes(uuid, text, interval, text, jsonb, bytea) IS 'exec() with the exact bytes of the output';

CREATE FUNCTION agentvm.exec_start(session_id uuid, command text, timeout interval DEFAULT '1 hour', cwd text DEFAULT NULL,
	env jsonb DEFAULT '{}', stdin bytea DEFAULT NULL) RETURNS uuid
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_exec_start';
COMMENT ON FUNCTION agentvm.exec_start(uuid, text, interval, text, jsonb, bytea) IS 'begin a command in the VM that outlives the statement; the id to ask for it with';

CREATE FUNCTION agentvm.exec_output(session_id uuid, command_id uuid, stdout_after bigint DEFAULT 0, stderr_after bigint DEFAULT 0)
RETURNS TABLE (running boolean, exit_code int, stdout text, stderr text, stdout_next bigint, stderr_next bigint, timed_out boolean, truncated boolean)
LANGUAGE C VOLATILE ROWS 1 AS 'MODULE_PATHNAME', 'agentvm_exec_output';
COMMENT ON FUNCTION agentvm.exec_output(uuid, uuid, bigint, bigint) IS 'what a command has said after these offsets, without waiting; and the offsets to go on with';

CREATE FUNCTION agentvm.exec_wait(session_id uuid, command_id uuid, timeout interval DEFAULT '5 minutes')
RETURNS TABLE (exit_code int, stdout text, stderr text, duration interval, timed_out boolean, truncated boolean)
LANGUAGE C VOLATILE ROWS 1 AS 'MODULE_PATHNAME', 'agentvm_exec_wait';
COMMENT ON FUNCTION agentvm.exec_wait(uuid, uuid, interval) IS 'wait for the end of a command that exec_start() has begun; AV011 when it goes on';

CREATE FUNCTION agentvm.exec_kill(session_id uuid, command_id uuid, signal text DEFAULT 'TERM') RETURNS boolean
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_exec_kill';
COMMENT ON FUNCTION agentvm.exec_kill(uuid, uuid, text) IS 'send TERM or KILL to a command and all its processes; false: it has ended';

CREATE FUNCTION agentvm.exec_many(session_ids uuid[], command text, timeout interval DEFAULT '5 minutes', cwd text DEFAULT NULL,
	env jsonb DEFAULT '{}', stdin bytea DEFAULT NULL)
RETURNS TABLE (session_id uuid, exit_code int, stdout text, stderr text, duration interval, timed_out boolean, truncated boolean,
	sqlstate text, error text)
LANGUAGE C VOLATILE ROWS 20 AS 'MODULE_PATHNAME', 'agentvm_exec_many';
COMMENT ON FUNCTION agentvm.exec_many(uuid[], text, interval, text, jsonb, bytea) IS 'the same command in many VMs at once: a row for each as it finishes, with its own error';

-- ---------------------------------------------------------------------------
-- Files
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.upload(session_id uuid, path text, content bytea, mode text DEFAULT '0644') RETURNS bigint
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_upload';
COMMENT ON FUNCTION agentvm.upload(uuid, text, bytea, text) IS 'write a file in the VM, whole or not at all; directories on the way are made; the number of bytes';

CREATE FUNCTION agentvm.download(session_id uuid, path text) RETURNS bytea
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_download';
COMMENT ON FUNCTION agentvm.download(uuid, text) IS 'read a file of the VM';

CREATE FUNCTION agentvm.download(session_id uuid, path text, "offset" bigint, length bigint) RETURNS bytea
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_download';
COMMENT ON FUNCTION agentvm.download(uuid, text, bigint, bigint) IS 'read a part of a file of the VM; fewer bytes at its end';

CREATE FUNCTION agentvm.upload_tar(session_id uuid, path text, content bytea) RETURNS bigint
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_upload_tar';
COMMENT ON FUNCTION agentvm.upload_tar(uuid, text, bytea) IS 'unpack a tar archive into a directory of the VM, which is made if need be; nothing in it may lead out of there; the number of bytes';

CREATE FUNCTION agentvm.download_tar(session_id uuid, path text) RETURNS bytea
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_download_tar';
COMMENT ON FUNCTION agentvm.download_tar(uuid, text) IS 'a directory of the VM as a tar archive';

-- ---------------------------------------------------------------------------
-- Pauses
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.pause(session_id uuid) RETURNS boolean
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_pause';
COMMENT ON FUNCTION agentvm.pause(uuid) IS 'halt a session''s VM, which keeps its disks; true if this call began it, false if it is under way or done';

CREATE FUNCTION agentvm.resume(session_id uuid) RETURNS boolean
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_resume';
COMMENT ON FUNCTION agentvm.resume(uuid) IS 'let a paused session''s VM go on; true if this call began it, false if it is under way or done';

-- ---------------------------------------------------------------------------
-- Warm VMs
-- ---------------------------------------------------------------------------

ALTER TABLE agentvm.session ADD COLUMN warm_key bytea;
COMMENT ON COLUMN agentvm.session.warm_key IS 'of a warm VM, until provision() takes it: SHA-256 of what a request has to ask for to get it';
-- state is in neither key nor predicate, as with the other indexes
CREATE INDEX session_warm ON agentvm.session (team_id, warm_key, created_at) WHERE warm_key IS NOT NULL AND ended_at IS NULL;

CREATE TABLE agentvm.session_hydrating (
	session_id uuid PRIMARY KEY,
	seen_at timestamptz
);
COMMENT ON TABLE agentvm.session_hydrating IS 'sessions whose warm VM has been taken, until its runtime has fetched what it was taken with';
COMMENT ON COLUMN agentvm.session_hydrating.seen_at IS 'when a sweep first saw it, and somebody listened: its bootstrap_timeout counts from then';
SELECT pg_catalog.pg_extension_config_dump('agentvm.session_hydrating', '');
ALTER TABLE agentvm.session_hydrating ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON agentvm.session_hydrating FROM PUBLIC;

CREATE FUNCTION agentvm.provision_warm(team_id text, profile text DEFAULT NULL, provider text DEFAULT NULL, options jsonb DEFAULT '{}',
	idle_timeout interval DEFAULT '30 minutes') RETURNS uuid
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_provision_warm';
COMMENT ON FUNCTION agentvm.provision_warm(text, text, text, jsonb, interval) IS 'ask for a VM in advance: it boots and waits, warm, for a provision() with the same profile, provider and options, which takes it at once';

CREATE FUNCTION agentvm.hydrate(session_token_sha256 bytea, problem text DEFAULT NULL) RETURNS jsonb
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_hydrate';
COMMENT ON FUNCTION agentvm.hydrate(bytea, text) IS 'what the runtime of a warm VM needs once provision() has taken it, until then no more than the session''s id; NULL: unknown token; AV006: gone. With a problem: it cannot be used, and is ended';

COMMENT ON FUNCTION agentvm.sweep_bootstrap(int) IS 'begin the end of sessions that did not bootstrap in time, or, taken warm, did not fetch in time what they were taken with; how many';

-- ---------------------------------------------------------------------------
-- All of it at once
-- ---------------------------------------------------------------------------

CREATE PROCEDURE agentvm.run(team_id text, command text, profile text DEFAULT NULL, timeout interval DEFAULT '5 minutes', INOUT exit_code int DEFAULT NULL,
	INOUT stdout text DEFAULT NULL, INOUT stderr text DEFAULT NULL)
LANGUAGE C AS 'MODULE_PATHNAME', 'agentvm_run';
COMMENT ON PROCEDURE agentvm.run(text, text, text, interval, int, text, text) IS 'provision a VM, run a command in it, and end the VM whatever happens; not inside a transaction block';

-- ---------------------------------------------------------------------------
-- What the gateway calls
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.attach(session_ids uuid[]) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_attach';
COMMENT ON FUNCTION agentvm.attach(uuid[]) IS 'this gateway (its application_name is its gateway_id) has the channels of these sessions now';

CREATE FUNCTION agentvm.control_key(INOUT key_id text DEFAULT NULL, OUT key bytea) RETURNS record
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_control_key';
COMMENT ON FUNCTION agentvm.control_key(text) IS 'what tickets for this gateway are made with: of the named master key, or of the current one';

CREATE FUNCTION agentvm.command_started(session_id uuid, command_id uuid, kind text, detail jsonb) RETURNS boolean
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_command_started';
COMMENT ON FUNCTION agentvm.command_started(uuid, uuid, text, jsonb) IS 'log that a command or a file (kind: exec, upload, download) is about to be passed to a VM; false: it has been logged before; AV006, AV007: it may not be passed';

CREATE FUNCTION agentvm.command_ended(session_id uuid, command_id uuid, detail jsonb) RETURNS boolean
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_command_ended';
COMMENT ON FUNCTION agentvm.command_ended(uuid, uuid, jsonb) IS 'log what came of a command; false: it was not under way, or has been logged before';

-- ---------------------------------------------------------------------------
-- Truth: what providers have of ours, and what differs
-- ---------------------------------------------------------------------------

ALTER TABLE agentvm.installation ADD COLUMN timeline int, ADD COLUMN quarantined_since timestamptz;
COMMENT ON COLUMN agentvm.installation.timeline IS 'of the server''s WAL when it was last looked at: another one means failover';
COMMENT ON COLUMN agentvm.installation.quarantined_since IS 'since a failover or takeover: VMs found without a session are not ended by themselves; NULL: they are';
UPDATE agentvm.installation SET timeline = ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int;

CREATE TABLE agentvm.inventory (
	account text NOT NULL,
	provider text NOT NULL,
	region text NOT NULL,
	lane smallint NOT NULL DEFAULT 0,
	next_at timestamptz NOT NULL DEFAULT now(),
	lease bigint,
	active_at timestamptz,
	listed_at timestamptz,
	vms int,
	failures int NOT NULL DEFAULT 0,
	error text,
	PRIMARY KEY (account, provider, region)
);
CREATE INDEX inventory_due ON agentvm.inventory (lane, next_at);
COMMENT ON TABLE agentvm.inventory IS 'where VMs are listed: whose account (a team''s, or empty: our own hosts), which region or host, and how it went';
COMMENT ON COLUMN agentvm.inventory.next_at IS 'the next list; with a lease: until then somebody else is at it';
COMMENT ON COLUMN agentvm.inventory.active_at IS 'when there last were sessions or VMs: where there are none for a while lists are made less often';
COMMENT ON COLUMN agentvm.inventory.listed_at IS 'when the last list was begun that was whole';

CREATE TABLE agentvm.vm_drift (
	account text NOT NULL,
	provider text NOT NULL,
	region text NOT NULL,
	vm_id text NOT NULL,
	kind text NOT NULL CHECK (kind IN ('orphan', 'unknown', 'missing', 'state')),
	team_id text,
	session_id uuid,
	agent_id text,
	vm_state text NOT NULL,
	session_state text,
	launched_at timestamptz,
	address text,
	purchase text,
	first_seen_at timestamptz NOT NULL DEFAULT now(),
	last_seen_at timestamptz NOT NULL DEFAULT now(),
	quarantined boolean NOT NULL DEFAULT false,
	end_wanted boolean NOT NULL DEFAULT false,
	ended_at timestamptz,
	detail text,
	PRIMARY KEY (account, provider, region, vm_id)
);
COMMENT ON TABLE agentvm.vm_drift IS 'the rows of view drift, as the last list of each account and region has them; written only by who holds the row of agentvm.inventory';
COMMENT ON COLUMN agentvm.vm_drift.ended_at IS 'when its provider was last asked to end it';
COMMENT ON COLUMN agentvm.vm_drift.end_wanted IS 'by end_vm(): the next list ends it, whatever its age';

ALTER TABLE agentvm.inventory ENABLE ROW LEVEL SECURITY;
ALTER TABLE agentvm.vm_drift ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON agentvm.inventory, agentvm.vm_drift FROM PUBLIC;
GRANT SELECT ON agentvm.inventory, agentvm.vm_drift TO agentvm_admin;
CREATE POLICY admin ON agentvm.inventory FOR SELECT TO agentvm_admin USING (true);
CREATE POLICY admin ON agentvm.vm_drift FOR SELECT TO agentvm_admin USING (true);

CREATE VIEW agentvm.drift WITH (security_barrier) AS
SELECT kind, team_id, session_id, vm_id, provider, region, vm_state, session_state, first_seen_at, last_seen_at, quarantined, ended_at, detail
FROM agentvm.vm_drift
WHERE (SELECT agentvm.sees_all()) OR team_id = ANY ((SELECT agentvm.visible_teams())::text[]);
COMMENT ON VIEW agentvm.drift IS 'where providers and sessions differ: orphan: a VM whose session has ended or has another one; unknown: a VM without a session; missing: a session without its VM; state: they differ in state';
REVOKE ALL ON agentvm.drift FROM PUBLIC;
GRANT SELECT ON agentvm.drift TO agentvm_user, agentvm_admin, agentvm_monitor;

CREATE FUNCTION agentvm.sweep_inventory(team_id text DEFAULT NULL) RETURNS int
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_sweep_inventory';
COMMENT ON FUNCTION agentvm.sweep_inventory(text) IS 'list the VMs of a team''s accounts, or of all, at once, and do what the sweep does about them; how many differ';

CREATE FUNCTION agentvm.end_vm(vm_id text) RETURNS boolean
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_end_vm';
COMMENT ON FUNCTION agentvm.end_vm(text) IS 'have a VM that is an orphan or unknown ended by the next list, which is due at once, whether quarantined or not; false: there is none';

CREATE FUNCTION agentvm.adopt_vm(vm_id text) RETURNS uuid
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_adopt_vm';
COMMENT ON FUNCTION agentvm.adopt_vm(text) IS 'make a session, without a runtime, of a VM that is unknown, from its tags; the session';

CREATE FUNCTION agentvm.release_quarantine() RETURNS int
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_release_quarantine';
COMMENT ON FUNCTION agentvm.release_quarantine() IS 'after a failover or takeover: leave the VMs that are still quarantined to the sweep, which ends them; how many';

-- ---------------------------------------------------------------------------
-- Rights
-- ---------------------------------------------------------------------------

REVOKE ALL ON ALL ROUTINES IN SCHEMA agentvm FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agentvm.pause(uuid), agentvm.resume(uuid), agentvm.provision_warm(text, text, text, jsonb, interval)
	TO agentvm_user;
GRANT EXECUTE ON FUNCTION
	agentvm.exec(uuid, text, interval, text, jsonb, bytea), agentvm.exec_bytes(uuid, text, interval, text, jsonb, bytea),
	agentvm.exec_start(uuid, text, interval, text, jsonb, bytea), agentvm.exec_output(uuid, uuid, bigint, bigint),
	agentvm.exec_wait(uuid, uuid, interval), agentvm.exec_kill(uuid, uuid, text),
	agentvm.exec_many(uuid[], text, interval, text, jsonb, bytea),
	agentvm.upload(uuid, text, bytea, text), agentvm.download(uuid, text), agentvm.download(uuid, text, bigint, bigint),
	agentvm.upload_tar(uuid, text, bytea), agentvm.download_tar(uuid, text)
	TO agentvm_user;
GRANT EXECUTE ON PROCEDURE agentvm.run(text, text, text, interval, int, text, text) TO agentvm_user;
GRANT EXECUTE ON FUNCTION agentvm.attach(uuid[]), agentvm.control_key(text), agentvm.command_started(uuid, uuid, text, jsonb),
	agentvm.command_ended(uuid, uuid, jsonb), agentvm.hydrate(bytea, text) TO agentvm_gateway;
GRANT EXECUTE ON FUNCTION agentvm.sweep_inventory(text), agentvm.end_vm(text), agentvm.adopt_vm(text), agentvm.release_quarantine()
	TO agentvm_admin;

-- This database's default privileges may have given rights to others: nobody has any that are not granted above.
DO $$
DECLARE
	r record;
BEGIN
	FOR r IN
		SELECT o.kind, o.name, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::pg_catalog.regrole::text END AS grantee
		FROM (SELECT 'SCHEMA' AS kind, oid::pg_catalog.regnamespace::text AS name, nspowner AS owner, nspacl AS acl
				FROM pg_catalog.pg_namespace WHERE nspname = 'agentvm'
			  UNION ALL SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, oid::pg_catalog.regclass::text, relowner, relacl
				FROM pg_catalog.pg_class WHERE relnamespace = 'agentvm'::pg_catalog.regnamespace AND relkind IN ('r', 'v', 'S')
			  UNION ALL SELECT 'ROUTINE', oid::pg_catalog.regprocedure::text, proowner, proacl
				FROM pg_catalog.pg_proc WHERE pronamespace = 'agentvm'::pg_catalog.regnamespace) o,
			 pg_catalog.aclexplode(o.acl) a
		WHERE a.grantee <> o.owner AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles g WHERE g.oid = a.grantee
			AND g.rolname IN ('agentvm_admin', 'agentvm_user', 'agentvm_gateway', 'agentvm_monitor'))
		GROUP BY 1, 2, 3
	LOOP
		EXECUTE format('REVOKE ALL ON %s %s FROM %s', r.kind, r.name, r.grantee);
	END LOOP;
END
$$;

-- No heartbeat was taken while library and extension differed: silence counts from here.
UPDATE agentvm.installation SET adopted_at = pg_catalog.clock_timestamp() WHERE in_use;

-- Dispatchers idle while library and extension differ: they go on when this has committed.
SELECT agentvm.wake();
