/* agentvm--0.2.sql: tables, views, roles and functions of agentvm */

-- complain if the script is sourced in psql rather than by CREATE EXTENSION
\echo Use "CREATE EXTENSION agentvm CASCADE" to load this file. \quit

-- the owner of a database may have made functions and operators that match our calls better than PostgreSQL's own
SET LOCAL search_path = pg_catalog, pg_temp;

-- ---------------------------------------------------------------------------
-- Preconditions: nobody else's schema, nobody else's idea of our roles
-- ---------------------------------------------------------------------------

DO $$
DECLARE
	r text;
	a pg_catalog.pg_roles;
	member text;
BEGIN
	IF EXISTS (SELECT FROM pg_catalog.pg_namespace n
			   WHERE n.nspname OPERATOR(pg_catalog.=) 'agentvm'
				 AND (n.nspowner OPERATOR(pg_catalog.<>) (SELECT oid FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) current_user)
					  OR EXISTS (SELECT FROM pg_catalog.pg_depend d
								 WHERE d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass
								   AND d.refobjid OPERATOR(pg_catalog.=) n.oid
								   AND d.classid OPERATOR(pg_catalog.<>) 'pg_catalog.pg_extension'::pg_catalog.regclass))) THEN
		RAISE EXCEPTION 'schema "agentvm" belongs to another role or is not empty'
			USING ERRCODE = 'duplicate_schema', HINT = 'Drop or rename that schema, then create the extension again.';
	END IF;

	FOREACH r IN ARRAY ARRAY['agentvm_admin', 'agentvm_user', 'agentvm_gateway', 'agentvm_monitor'] LOOP
		SELECT * INTO a FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) r;
		IF NOT FOUND THEN
			EXECUTE pg_catalog.format('CREATE ROLE %I NOLOGIN', r);
		ELSIF a.rolsuper OR a.rolcanlogin THEN
			RAISE EXCEPTION 'role "%" exists and is a superuser or may log in', r
				USING ERRCODE = 'duplicate_object', HINT = 'agentvm grants rights to this role; rename the existing one, or make it NOLOGIN and NOSUPERUSER.';
		END IF;
		-- who made the role before us (CREATEROLE) may do all that it is given now; somebody may want just that
		FOR member IN
			SELECT DISTINCT m.rolname FROM pg_catalog.pg_auth_members g JOIN pg_catalog.pg_roles m ON m.oid = g.member
			WHERE g.roleid = a.oid AND g.admin_option AND NOT m.rolsuper
		LOOP
			RAISE WARNING 'role "%", which is no superuser, may grant role "%" to itself and others', member, r
				USING HINT = pg_catalog.format('If that is not meant to be: REVOKE %I FROM %I CASCADE, and look at who else is a member.', r, member);
		END LOOP;
	END LOOP;
END
$$;

-- The agentvm roles build on each other: an administrator may do all that a user may.
GRANT agentvm_user TO agentvm_admin;

-- ---------------------------------------------------------------------------
-- Tables
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.cluster_identity(OUT system_identifier bigint, OUT database oid, OUT restore_id uuid)
LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'agentvm_cluster_identity';
COMMENT ON FUNCTION agentvm.cluster_identity() IS 'what the row of agentvm.installation has to match before anything acts';

CREATE TABLE agentvm.installation (
	installation_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
	created_at timestamptz NOT NULL DEFAULT now(),
	system_identifier bigint,
	database oid,
	restore_id uuid,
	in_use boolean NOT NULL DEFAULT false,
	adopted_at timestamptz,
	adopted_by name
);
COMMENT ON TABLE agentvm.installation IS 'who we are: installation_id is the value of the tag agentvm-cluster, the rest says where; nothing acts unless there is one row, in use, that matches';
INSERT INTO agentvm.installation (system_identifier, database, restore_id) SELECT * FROM agentvm.cluster_identity();

CREATE TABLE agentvm.team (
	team_id text PRIMARY KEY,
	provider text,
	max_sessions int CHECK (max_sessions >= 0),
	max_vcpus int CHECK (max_vcpus >= 0),
	max_memory_mib int CHECK (max_memory_mib >= 0),
	min_lifetime interval CHECK (min_lifetime > interval '0'),
	max_lifetime interval CHECK (max_lifetime > interval '0'),
	bootstrap_timeout interval CHECK (bootstrap_timeout > interval '0'),
	heartbeat_timeout interval CHECK (heartbeat_timeout > interval '0'),
	created_at timestamptz NOT NULL DEFAULT now(),
	updated_at timestamptz NOT NULL DEFAULT now(),
	-- LISTEN asks for no right, so only who knows the name hears what is said: 192 random bits
	channel text NOT NULL DEFAULT 'agentvm_' || left(encode(sha256((gen_random_uuid()::text || gen_random_uuid()::text)::bytea), 'hex'), 48)
);
COMMENT ON TABLE agentvm.team IS 'tenants and their limits; NULL = the server''s default';

CREATE TABLE agentvm.team_member (
	team_id text NOT NULL REFERENCES agentvm.team ON DELETE CASCADE,
	role regrole NOT NULL, -- a dump carries its name, so that it is the same role in another cluster
	created_at timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (team_id, role)
);
COMMENT ON TABLE agentvm.team_member IS 'database roles that act for a team; a dropped role counts as no member';

CREATE TABLE agentvm.former_team (
	team_id text PRIMARY KEY,
	dropped_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE agentvm.former_team IS 'dropped teams whose history is still kept: the id is not given to anybody else meanwhile';

CREATE TABLE agentvm.provider_config (
	team_id text NOT NULL REFERENCES agentvm.team ON DELETE CASCADE,
	provider text NOT NULL,
	options jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(options) = 'object'),
	created_at timestamptz NOT NULL DEFAULT now(),
	created_by name NOT NULL DEFAULT current_user,
	updated_at timestamptz NOT NULL DEFAULT now(),
	updated_by name NOT NULL DEFAULT current_user,
	PRIMARY KEY (team_id, provider)
);
COMMENT ON TABLE agentvm.provider_config IS 'a team''s settings for a provider; nothing secret';

CREATE TABLE agentvm.provider_secret (
	team_id text NOT NULL,
	provider text NOT NULL,
	field text NOT NULL,
	value_enc bytea NOT NULL,
	key_id text NOT NULL,
	updated_at timestamptz NOT NULL DEFAULT now(),
	updated_by name NOT NULL DEFAULT current_user,
	PRIMARY KEY (team_id, provider, field),
	FOREIGN KEY (team_id, provider) REFERENCES agentvm.provider_config ON DELETE CASCADE
);
COMMENT ON TABLE agentvm.provider_secret IS 'a team''s credentials, each field encrypted by itself with a key of agentvm.key_file and bound to its place';

CREATE TABLE agentvm.profile (
	name text NOT NULL,
	team_id text REFERENCES agentvm.team ON DELETE CASCADE,
	provider text NOT NULL,
	vcpus int CHECK (vcpus > 0),
	memory_mib int CHECK (memory_mib > 0),
	disk_gib int CHECK (disk_gib > 0),
	options jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(options) = 'object'),
	runtime boolean,
	bootstrap_timeout interval CHECK (bootstrap_timeout > interval '0'),
	heartbeat_timeout interval CHECK (heartbeat_timeout > interval '0'),
	max_lifetime interval CHECK (max_lifetime > interval '0'),
	created_at timestamptz NOT NULL DEFAULT now(),
	updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX profile_of_all ON agentvm.profile (name) WHERE team_id IS NULL;
CREATE UNIQUE INDEX profile_of_team ON agentvm.profile (team_id, name) WHERE team_id IS NOT NULL;
COMMENT ON TABLE agentvm.profile IS 'named shapes of VMs; team_id NULL = for all teams';

-- One constraint in C instead of six in SQL: PostgreSQL parses the stored text of every constraint anew for each
-- statement, which was half the cost of provision().
CREATE FUNCTION agentvm.session_is_sound(state text, end_reason text, purchase text, ended_at timestamptz, next_check_at timestamptz)
RETURNS boolean LANGUAGE C IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'agentvm_session_is_sound';
COMMENT ON FUNCTION agentvm.session_is_sound(text, text, text, timestamptz, timestamptz) IS 'holds columns of agentvm.session to known values, and tombstones to what they must have';

CREATE TABLE agentvm.session (
	session_id uuid PRIMARY KEY,
	team_id text NOT NULL,
	agent_id text,
	provider text NOT NULL,
	profile text,
	state text NOT NULL DEFAULT 'provisioning',
	end_reason text,
	detail text,
	vm_id text,
	region text,
	address text,
	purchase text,
	attempt int NOT NULL DEFAULT 1,
	created_at timestamptz NOT NULL DEFAULT now(),
	launched_at timestamptz,
	ready_at timestamptz,
	deadline_at timestamptz NOT NULL DEFAULT now() + interval '2 hours',
	ended_at timestamptz,
	tags jsonb NOT NULL DEFAULT '{}',
	idempotency_key text,
	created_by name NOT NULL DEFAULT current_user,
	-- internal from here on
	args_hash bytea,
	options jsonb NOT NULL DEFAULT '{}',
	vcpus int,
	memory_mib int,
	disk_gib int,
	runtime boolean NOT NULL DEFAULT false,
	bootstrap_timeout interval NOT NULL DEFAULT interval '180 seconds',
	heartbeat_timeout interval NOT NULL DEFAULT interval '120 seconds',
	ceiling_at timestamptz NOT NULL DEFAULT now() + interval '24 hours',
	payload_enc bytea,
	key_id text,
	boot_id text,
	boot_info jsonb,
	lane smallint NOT NULL DEFAULT 0,
	next_check_at timestamptz DEFAULT now(),
	lease bigint,
	lease_pid int,
	lease_start timestamptz,
	retries int NOT NULL DEFAULT 0,
	running boolean NOT NULL DEFAULT false,
	final_heartbeat_at timestamptz,
	handle jsonb,
	payload_key_id text, -- of payload_enc, where that is not key_id any more: rotate_keys(); key_id stays that of the bootstrap token
	CONSTRAINT session_is_sound CHECK (agentvm.session_is_sound(state, end_reason, purchase, ended_at, next_check_at))
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.05); -- every row changes about six times, and most stay for a month
COMMENT ON TABLE agentvm.session IS 'one row per VM, also after its end; see view agentvm.sessions';

-- The one index for all work that has a deadline: state is in neither key nor predicate, so that a change of state can stay HOT.
CREATE INDEX session_due ON agentvm.session (lane, next_check_at) WHERE next_check_at IS NOT NULL;
CREATE INDEX session_live ON agentvm.session (team_id) WHERE ended_at IS NULL;
CREATE UNIQUE INDEX session_idempotency ON agentvm.session (team_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

CREATE TABLE agentvm.session_heartbeat (
	session_id uuid PRIMARY KEY,
	last_heartbeat_at timestamptz,
	lost_after interval NOT NULL DEFAULT interval '120 seconds'
) WITH (fillfactor = 70);
COMMENT ON TABLE agentvm.session_heartbeat IS 'the last sign of life of each session that has a runtime; narrow, so that beats stay HOT';

CREATE TABLE agentvm.session_ending (
	session_id uuid PRIMARY KEY
);
COMMENT ON TABLE agentvm.session_ending IS 'sessions with a runtime that are terminating: heartbeats look here, not into the wide rows';

CREATE TABLE agentvm.session_token (
	token_sha256 bytea PRIMARY KEY CHECK (octet_length(token_sha256) = 32),
	session_id uuid NOT NULL,
	kind text NOT NULL CHECK (kind IN ('bootstrap', 'session'))
);
CREATE INDEX session_token_session ON agentvm.session_token (session_id);
COMMENT ON TABLE agentvm.session_token IS 'SHA-256 of bootstrap and session tokens; the tokens themselves never reach the server';

CREATE TABLE agentvm.session_event (
	event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	session_id uuid NOT NULL,
	team_id text NOT NULL,
	at timestamptz NOT NULL DEFAULT clock_timestamp(),
	kind text NOT NULL,
	old_state text,
	new_state text,
	reason text,
	detail jsonb
);
CREATE INDEX session_event_session ON agentvm.session_event (session_id);
COMMENT ON TABLE agentvm.session_event IS 'append-only log: every change of state, and every provider call that changes something or fails';

CREATE TABLE agentvm.event_seal (
	team_id text NOT NULL,
	seal_id bigint NOT NULL,
	event_ids bigint[] NOT NULL,
	newest_at timestamptz NOT NULL,
	sealed_at timestamptz NOT NULL DEFAULT now(),
	previous bytea,
	sha256 bytea NOT NULL CHECK (octet_length(sha256) = 32),
	purged_at timestamptz,
	PRIMARY KEY (team_id, seal_id)
);
-- finds the seals of a block of event ids; audit.c has the same number
CREATE INDEX event_seal_block ON agentvm.event_seal ((event_ids[1] / 2000));
CREATE INDEX event_seal_age ON agentvm.event_seal (newest_at) WHERE purged_at IS NULL;
COMMENT ON TABLE agentvm.event_seal IS 'per team a chain of seals, numbered from 1, each with the SHA-256 of its events and of the seal before; purged_at: the events are gone';

CREATE TABLE agentvm.event_seal_mark (
	only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
	sealed_below bigint NOT NULL,
	seen bigint,
	seen_next_xid xid8
);
COMMENT ON TABLE agentvm.event_seal_mark IS 'how far events are sealed: all up to sealed_below; seen, once the transactions before seen_next_xid have ended';

CREATE TABLE agentvm.gateway (
	gateway_id text PRIMARY KEY,
	control_address text,
	listening_since timestamptz,
	last_report_at timestamptz,
	created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE agentvm.gateway IS 'registered gateways; while one is registered, silence counts only from when gateways listen';

CREATE TABLE agentvm.sweep_hold (
	sweep text PRIMARY KEY,
	held_at timestamptz NOT NULL DEFAULT now(),
	would_end bigint NOT NULL
);
COMMENT ON TABLE agentvm.sweep_hold IS 'sweeps that wait one more timeout because they would end a large part of the fleet; shown in view health';

CREATE TABLE agentvm.host (
	name text PRIMARY KEY CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$'),
	uri text NOT NULL DEFAULT 'qemu:///session',
	directory text NOT NULL CHECK (directory ~ '^/'),
	vcpus int NOT NULL CHECK (vcpus > 0),
	memory_mib int NOT NULL CHECK (memory_mib > 0),
	enabled boolean NOT NULL DEFAULT true,
	accel text NOT NULL DEFAULT 'auto' CHECK (accel IN ('auto', 'kvm', 'tcg')),
	kvm boolean, -- whether a guest has been seen to run under KVM there; NULL: not known yet
	created_at timestamptz NOT NULL DEFAULT now(),
	updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE agentvm.host IS 'machines of ours that run VMs, and how much of each may be used; not enabled: nothing new is placed there';

CREATE TABLE agentvm.placement (
	session_id uuid PRIMARY KEY REFERENCES agentvm.session ON DELETE CASCADE,
	host text NOT NULL REFERENCES agentvm.host,
	vcpus int NOT NULL,
	memory_mib int NOT NULL
);
CREATE INDEX placement_host ON agentvm.placement (host);
COMMENT ON TABLE agentvm.placement IS 'which host the VM of a session is on, or is to be, and the room it takes there, until the session has ended';

-- one statement for each: a second call in the same one fails on the row of pg_extension that the first has updated
DO $$
DECLARE
	t text;
BEGIN
	FOREACH t IN ARRAY ARRAY['agentvm.team', 'agentvm.team_member', 'agentvm.former_team', 'agentvm.provider_config', 'agentvm.provider_secret',
							 'agentvm.profile', 'agentvm.session', 'agentvm.session_heartbeat', 'agentvm.session_ending', 'agentvm.session_token', 'agentvm.session_event',
							 'agentvm.session_event_event_id_seq', 'agentvm.event_seal', 'agentvm.event_seal_mark', 'agentvm.gateway', 'agentvm.host', 'agentvm.placement', 'agentvm.installation'] LOOP
		PERFORM pg_catalog.pg_extension_config_dump(t::pg_catalog.regclass, CASE t
			-- a dropped role has but its number, which may be another role's elsewhere
			WHEN 'agentvm.team_member' THEN 'WHERE EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = role)'
			-- what nobody has used has no identity to keep
			WHEN 'agentvm.installation' THEN 'WHERE in_use' ELSE '' END);
	END LOOP;
END
$$;

-- ---------------------------------------------------------------------------
-- Who sees what
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.visible_teams() RETURNS text[]
LANGUAGE C STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'agentvm_visible_teams';
COMMENT ON FUNCTION agentvm.visible_teams() IS 'teams that the current role acts for; row-level security is written on it';

CREATE FUNCTION agentvm.sees_all() RETURNS boolean
LANGUAGE C STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'agentvm_sees_all';
COMMENT ON FUNCTION agentvm.sees_all() IS 'whether the current role is an administrator or a monitor of all teams';

DO $$
DECLARE
	t text;
BEGIN
	FOREACH t IN ARRAY ARRAY['installation', 'team', 'team_member', 'former_team', 'provider_config', 'provider_secret', 'profile', 'session',
							 'session_heartbeat', 'session_ending', 'session_token', 'session_event', 'event_seal', 'event_seal_mark', 'gateway', 'host', 'placement', 'sweep_hold'] LOOP
		EXECUTE format('ALTER TABLE agentvm.%I ENABLE ROW LEVEL SECURITY', t);
		EXECUTE format('REVOKE ALL ON agentvm.%I FROM PUBLIC', t);
	END LOOP;
	FOREACH t IN ARRAY ARRAY['installation', 'team', 'team_member', 'former_team', 'provider_config', 'profile', 'session_event', 'event_seal', 'event_seal_mark',
							 'gateway', 'host', 'placement', 'sweep_hold'] LOOP
		EXECUTE format('GRANT SELECT ON agentvm.%I TO agentvm_admin', t);
		EXECUTE format('CREATE POLICY admin ON agentvm.%I FOR SELECT TO agentvm_admin USING (true)', t);
	END LOOP;
	FOREACH t IN ARRAY ARRAY['team', 'team_member', 'provider_config', 'session_event', 'event_seal'] LOOP
		EXECUTE format('GRANT SELECT ON agentvm.%I TO agentvm_user', t);
		EXECUTE format('CREATE POLICY member ON agentvm.%I FOR SELECT TO agentvm_user
						USING (team_id = ANY ((SELECT agentvm.visible_teams())::text[]))', t);
	END LOOP;
END
$$;
GRANT SELECT ON agentvm.profile TO agentvm_user;
CREATE POLICY member ON agentvm.profile FOR SELECT TO agentvm_user
	USING (team_id IS NULL OR team_id = ANY ((SELECT agentvm.visible_teams())::text[]));

-- Gateways register and report; administrators register them for others.
GRANT SELECT, INSERT, UPDATE, DELETE ON agentvm.gateway TO agentvm_admin;
CREATE POLICY admin_writes ON agentvm.gateway TO agentvm_admin USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON agentvm.gateway TO agentvm_gateway;
CREATE POLICY gateway ON agentvm.gateway TO agentvm_gateway USING (true) WITH CHECK (true);

-- Hosts are the administrators' own list; what is placed on them is the engine's.
GRANT SELECT, INSERT, UPDATE, DELETE ON agentvm.host TO agentvm_admin;
CREATE POLICY admin_writes ON agentvm.host TO agentvm_admin USING (true) WITH CHECK (true);

GRANT USAGE ON SCHEMA agentvm TO agentvm_admin, agentvm_user, agentvm_gateway, agentvm_monitor;

-- ---------------------------------------------------------------------------
-- Views: security barriers with an explicit membership predicate, since a view that its owner runs bypasses RLS
-- ---------------------------------------------------------------------------

CREATE VIEW agentvm.sessions WITH (security_barrier) AS
SELECT s.session_id, s.team_id, s.agent_id, s.provider, s.profile, s.state, s.end_reason, s.detail, s.vm_id, s.region, s.address,
	   s.purchase, s.attempt, s.created_at, s.launched_at, s.ready_at,
	   coalesce(h.last_heartbeat_at, s.final_heartbeat_at) AS last_heartbeat_at, s.deadline_at, s.ended_at, s.tags,
	   s.idempotency_key, s.created_by
FROM agentvm.session s LEFT JOIN agentvm.session_heartbeat h USING (session_id)
WHERE (SELECT agentvm.sees_all()) OR s.team_id = ANY ((SELECT agentvm.visible_teams())::text[]);
COMMENT ON VIEW agentvm.sessions IS 'the sessions that the current role may see, ended ones included';

CREATE VIEW agentvm.fleet WITH (security_barrier) AS
SELECT team_id, provider, state, count(*) AS sessions
FROM agentvm.session
WHERE (SELECT agentvm.sees_all()) OR team_id = ANY ((SELECT agentvm.visible_teams())::text[])
GROUP BY team_id, provider, state;
COMMENT ON VIEW agentvm.fleet IS 'sessions by team, provider and state';

CREATE FUNCTION agentvm.stat_provider_get(OUT provider text, OUT operation text, OUT calls bigint, OUT credentials bigint,
	OUT capacity bigint, OUT throttled bigint, OUT quota bigint, OUT not_found bigint, OUT transient bigint, OUT permanent bigint,
	OUT p50_ms double precision, OUT p99_ms double precision)
RETURNS SETOF record LANGUAGE C STRICT VOLATILE AS 'MODULE_PATHNAME', 'agentvm_stat_provider';
COMMENT ON FUNCTION agentvm.stat_provider_get() IS 'the rows of view stat_provider, from shared memory';

CREATE VIEW agentvm.stat_provider AS SELECT * FROM agentvm.stat_provider_get();
COMMENT ON VIEW agentvm.stat_provider IS 'provider calls made by the dispatchers of this database since the server started: errors by class, latency';

CREATE FUNCTION agentvm.stat_dispatcher_get(OUT dispatcher int, OUT pid int, OUT started_at timestamptz, OUT last_pass_at timestamptz,
	OUT in_flight int, OUT passes bigint, OUT claimed bigint, OUT recorded bigint, OUT stale_replies bigint, OUT sleeping_until timestamptz,
	OUT kind text, OUT stuck int)
RETURNS SETOF record LANGUAGE C STRICT VOLATILE AS 'MODULE_PATHNAME', 'agentvm_stat_dispatcher';
COMMENT ON FUNCTION agentvm.stat_dispatcher_get() IS 'the rows of view stat_dispatcher, from shared memory';

CREATE VIEW agentvm.stat_dispatcher AS SELECT * FROM agentvm.stat_dispatcher_get();
COMMENT ON VIEW agentvm.stat_dispatcher IS 'the dispatchers and runners that serve this database; stuck: threads of a runner that hang in a call';

CREATE FUNCTION agentvm.health_get(OUT name text, OUT ok boolean, OUT detail text)
RETURNS SETOF record LANGUAGE C STRICT VOLATILE AS 'MODULE_PATHNAME', 'agentvm_health';
COMMENT ON FUNCTION agentvm.health_get() IS 'the rows of view health';

CREATE VIEW agentvm.health AS SELECT * FROM agentvm.health_get();
COMMENT ON VIEW agentvm.health IS 'what an operator should look at: one row per check, ok = false where something is wrong';

REVOKE ALL ON agentvm.sessions, agentvm.fleet, agentvm.stat_provider, agentvm.stat_dispatcher, agentvm.health FROM PUBLIC;
GRANT SELECT ON agentvm.sessions, agentvm.fleet TO agentvm_user, agentvm_admin, agentvm_monitor;
GRANT SELECT ON agentvm.stat_provider, agentvm.stat_dispatcher, agentvm.health TO agentvm_admin, agentvm_monitor;

-- ---------------------------------------------------------------------------
-- The state machine, held by the database (on UPDATE only, so that a dump restores)
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.session_transition() RETURNS trigger LANGUAGE C AS 'MODULE_PATHNAME', 'agentvm_session_transition';
COMMENT ON FUNCTION agentvm.session_transition() IS 'refuses changes of state that the design does not know, and logs the others';

CREATE TRIGGER session_transition AFTER UPDATE ON agentvm.session
	FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION agentvm.session_transition();

CREATE FUNCTION agentvm.host_changed() RETURNS trigger LANGUAGE C AS 'MODULE_PATHNAME', 'agentvm_host_changed';
COMMENT ON FUNCTION agentvm.host_changed() IS 'refuses a uri that would do more than connect; notes when a host has been changed, refuses another uri or directory while it has VMs, and forgets what was learned of it when it is another machine';

CREATE TRIGGER changed BEFORE INSERT OR UPDATE ON agentvm.host FOR EACH ROW EXECUTE FUNCTION agentvm.host_changed();

CREATE FUNCTION agentvm.event_is_append_only() RETURNS trigger LANGUAGE C AS 'MODULE_PATHNAME', 'agentvm_event_is_append_only';
COMMENT ON FUNCTION agentvm.event_is_append_only() IS 'refuses changes to the log';

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON agentvm.session_event
	FOR EACH STATEMENT EXECUTE FUNCTION agentvm.event_is_append_only();
ALTER TABLE agentvm.session_event ENABLE ALWAYS TRIGGER append_only;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON agentvm.event_seal
	FOR EACH STATEMENT EXECUTE FUNCTION agentvm.event_is_append_only();
ALTER TABLE agentvm.event_seal ENABLE ALWAYS TRIGGER append_only;

CREATE FUNCTION agentvm.guard_drop() RETURNS event_trigger LANGUAGE C AS 'MODULE_PATHNAME', 'agentvm_guard_drop';
COMMENT ON FUNCTION agentvm.guard_drop() IS 'loads the library, which refuses to drop the extension while VMs live, where it is not preloaded';

CREATE EVENT TRIGGER agentvm_guard_drop ON ddl_command_start WHEN TAG IN ('DROP EXTENSION', 'DROP SCHEMA', 'DROP OWNED')
	EXECUTE FUNCTION agentvm.guard_drop();
COMMENT ON EVENT TRIGGER agentvm_guard_drop IS 'the extension is not dropped while VMs live';

-- ---------------------------------------------------------------------------
-- Teams, members, profiles, providers
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.create_team(team_id text, provider text DEFAULT NULL, limits jsonb DEFAULT '{}') RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_create_team';
COMMENT ON FUNCTION agentvm.create_team(text, text, jsonb) IS 'make a team; limits: max_sessions, max_vcpus, max_memory_mib, min_lifetime, max_lifetime, bootstrap_timeout, heartbeat_timeout';

CREATE FUNCTION agentvm.alter_team(team_id text, provider text DEFAULT NULL, limits jsonb DEFAULT NULL) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_alter_team';
COMMENT ON FUNCTION agentvm.alter_team(text, text, jsonb) IS 'change a team''s provider or the limits named; a JSON null sets a limit back to the server''s default';

CREATE FUNCTION agentvm.drop_team(team_id text) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_drop_team';
COMMENT ON FUNCTION agentvm.drop_team(text) IS 'remove a team, its members, profiles and credentials; refused while sessions live';

CREATE FUNCTION agentvm.add_member(team_id text, member name) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_add_member';
COMMENT ON FUNCTION agentvm.add_member(text, name) IS 'let a database role, and all roles that inherit it, act for a team';

CREATE FUNCTION agentvm.remove_member(team_id text, member name) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_remove_member';
COMMENT ON FUNCTION agentvm.remove_member(text, name) IS 'take a database role out of a team';

CREATE FUNCTION agentvm.channel(team_id text) RETURNS text
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_channel';
COMMENT ON FUNCTION agentvm.channel(text) IS 'where to LISTEN for changes of state of a team''s sessions; another one once a member has been removed';

CREATE FUNCTION agentvm.set_provider(team_id text, provider text, options jsonb, secrets jsonb DEFAULT NULL) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_set_provider';
COMMENT ON FUNCTION agentvm.set_provider(text, text, jsonb, jsonb) IS 'set a team''s options and credentials for a provider; secrets are write-only: NULL leaves them, a JSON null deletes that field';

CREATE FUNCTION agentvm.rotate_keys() RETURNS int
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_rotate_keys';
COMMENT ON FUNCTION agentvm.rotate_keys() IS 'encrypt anew, with the first key of agentvm.key_file, some of what other keys have encrypted; how much. 0 = nothing is left: call it until then';

CREATE FUNCTION agentvm.check_provider(team_id text, provider text DEFAULT NULL) RETURNS jsonb
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_check_provider';
COMMENT ON FUNCTION agentvm.check_provider(text, text) IS 'ask the provider, with a read-only call, whether the team''s credentials work';

CREATE FUNCTION agentvm.drop_provider(team_id text, provider text) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_drop_provider';
COMMENT ON FUNCTION agentvm.drop_provider(text, text) IS 'forget a team''s options and credentials for a provider; refused while live sessions use it';

CREATE FUNCTION agentvm.create_profile(name text, provider text, options jsonb DEFAULT '{}', team_id text DEFAULT NULL,
	vcpus int DEFAULT NULL, memory_mib int DEFAULT NULL, disk_gib int DEFAULT NULL, runtime boolean DEFAULT NULL,
	bootstrap_timeout interval DEFAULT NULL, heartbeat_timeout interval DEFAULT NULL, max_lifetime interval DEFAULT NULL) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_create_profile';
COMMENT ON FUNCTION agentvm.create_profile(text, text, jsonb, text, int, int, int, boolean, interval, interval, interval) IS 'name a shape of VM, for one team or (team_id NULL) for all';

CREATE FUNCTION agentvm.drop_profile(name text, team_id text DEFAULT NULL) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_drop_profile';
COMMENT ON FUNCTION agentvm.drop_profile(text, text) IS 'remove a profile; sessions that were made with it are not touched';

-- ---------------------------------------------------------------------------
-- Sessions
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.provision(team_id text, agent_id text DEFAULT NULL, profile text DEFAULT NULL, provider text DEFAULT NULL,
	idempotency_key text DEFAULT NULL, env jsonb DEFAULT '{}', repos jsonb DEFAULT '[]', tags jsonb DEFAULT '{}',
	options jsonb DEFAULT '{}', max_lifetime interval DEFAULT NULL) RETURNS uuid
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_provision';
COMMENT ON FUNCTION agentvm.provision(text, text, text, text, text, jsonb, jsonb, jsonb, jsonb, interval) IS 'ask for a VM; it is launched after the calling transaction commits, and never if it does not';

CREATE FUNCTION agentvm.terminate(session_id uuid, reason text DEFAULT 'requested') RETURNS boolean
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_terminate';
COMMENT ON FUNCTION agentvm.terminate(uuid, text) IS 'ask for the end of a VM; true if this call began the end';

CREATE FUNCTION agentvm.wait(session_id uuid, until text DEFAULT 'ready', timeout interval DEFAULT '5 minutes') RETURNS text
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_wait';
COMMENT ON FUNCTION agentvm.wait(uuid, text, interval) IS 'wait until a session reaches a state: warm, ready, paused, terminating, terminated or failed (either end counts for both)';

CREATE PROCEDURE agentvm.await(session_id uuid, until text DEFAULT 'ready', timeout interval DEFAULT '5 minutes', INOUT state text DEFAULT NULL)
LANGUAGE C AS 'MODULE_PATHNAME', 'agentvm_await';
COMMENT ON PROCEDURE agentvm.await(uuid, text, interval, text) IS 'wait() without a snapshot held while it waits; not inside a transaction block';

CREATE FUNCTION agentvm.status(session_id uuid) RETURNS agentvm.sessions
LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'agentvm_status';
COMMENT ON FUNCTION agentvm.status(uuid) IS 'the session as the control plane knows it';

CREATE FUNCTION agentvm.inspect(session_id uuid) RETURNS jsonb
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_inspect';
COMMENT ON FUNCTION agentvm.inspect(uuid) IS 'the session as the provider tells it right now';

CREATE FUNCTION agentvm.extend(session_id uuid, by interval) RETURNS timestamptz
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_extend';
COMMENT ON FUNCTION agentvm.extend(uuid, interval) IS 'move the deadline of a session; never past its ceiling';

-- ---------------------------------------------------------------------------
-- The engine, by hand
-- ---------------------------------------------------------------------------

CREATE PROCEDURE agentvm.dispatch(max_sessions int DEFAULT 100, INOUT handled int DEFAULT NULL)
LANGUAGE C AS 'MODULE_PATHNAME', 'agentvm_dispatch';
COMMENT ON PROCEDURE agentvm.dispatch(int, int) IS 'one pass of the engine in this backend: claim, call providers, record; commits in between. Providers whose library blocks (libvirt) are left to their runner';

CREATE FUNCTION agentvm.sweep_bootstrap(max_sessions int DEFAULT NULL) RETURNS int
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_sweep_bootstrap';
COMMENT ON FUNCTION agentvm.sweep_bootstrap(int) IS 'begin the end of sessions that did not bootstrap in time; how many';

CREATE FUNCTION agentvm.sweep_heartbeat(max_sessions int DEFAULT NULL) RETURNS int
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_sweep_heartbeat';
COMMENT ON FUNCTION agentvm.sweep_heartbeat(int) IS 'begin the end of sessions that have fallen silent; how many';

CREATE FUNCTION agentvm.sweep_lifetime(max_sessions int DEFAULT NULL) RETURNS int
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_sweep_lifetime';
COMMENT ON FUNCTION agentvm.sweep_lifetime(int) IS 'begin the end of sessions that are past their deadline; how many';

CREATE FUNCTION agentvm.sweep(max_sessions int DEFAULT NULL) RETURNS int
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_sweep';
COMMENT ON FUNCTION agentvm.sweep(int) IS 'all three sweeps; how many sessions are newly to end';

CREATE FUNCTION agentvm.adopt_cluster(mode text) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_adopt_cluster';
COMMENT ON FUNCTION agentvm.adopt_cluster(text) IS 'make a restored or copied database act: takeover: it succeeds the original; fork: the original lives on and keeps the VMs';

CREATE FUNCTION agentvm.abandon(OUT session_id uuid, OUT team_id text, OUT provider text, OUT vm_id text, OUT region text)
RETURNS SETOF record LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_abandon';
COMMENT ON FUNCTION agentvm.abandon() IS 'forget every live session without a call to its provider; returns those that may have a VM, which somebody must now look after';

-- ---------------------------------------------------------------------------
-- The log's seals, and what is kept no longer
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.seal_audit() RETURNS bigint
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_seal_audit';
COMMENT ON FUNCTION agentvm.seal_audit() IS 'seal all committed events that are not sealed yet; how many. The dispatchers do it by themselves';

CREATE FUNCTION agentvm.verify_audit(team_id text) RETURNS TABLE (seal_id bigint, event_id bigint, problem text)
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_verify_audit';
COMMENT ON FUNCTION agentvm.verify_audit(text) IS 'check a team''s sealed events against their seals; no row: all is in order';

CREATE FUNCTION agentvm.purge(older_than interval) RETURNS bigint
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_purge';
COMMENT ON FUNCTION agentvm.purge(interval) IS 'remove sessions that ended before that, and sealed events older than that but for those of live sessions; how many sessions and events together';

-- ---------------------------------------------------------------------------
-- What the gateway calls; hashes only, so that no token ever reaches the server
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.bootstrap(token_sha256 bytea, session_token_sha256 bytea, boot_id text, info jsonb DEFAULT '{}') RETURNS jsonb
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_bootstrap';
COMMENT ON FUNCTION agentvm.bootstrap(bytea, bytea, text, jsonb) IS 'a runtime reports for duty: makes its session ready and returns what it needs; NULL: unknown, expired or used token';

CREATE FUNCTION agentvm.authenticate(session_token_sha256 bytea) RETURNS uuid
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_authenticate';
COMMENT ON FUNCTION agentvm.authenticate(bytea) IS 'the session of a session token; NULL: unknown';

CREATE FUNCTION agentvm.heartbeat(session_token_sha256 bytea) RETURNS timestamptz
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_heartbeat';
COMMENT ON FUNCTION agentvm.heartbeat(bytea) IS 'a sign of life; returns the deadline in force; NULL: unknown token';

CREATE FUNCTION agentvm.heartbeat_batch(session_ids uuid[], seen_at timestamptz[]) RETURNS SETOF uuid
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_heartbeat_batch';
COMMENT ON FUNCTION agentvm.heartbeat_batch(uuid[], timestamptz[]) IS 'many signs of life at once; returns the sessions that are gone. An empty batch reports that the gateway listens';

CREATE FUNCTION agentvm.deadlines(session_ids uuid[], OUT session_id uuid, OUT deadline_at timestamptz) RETURNS SETOF record
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_deadlines';
COMMENT ON FUNCTION agentvm.deadlines(uuid[]) IS 'the deadlines in force of those sessions that live, by id';

CREATE FUNCTION agentvm.gateway_channel() RETURNS text
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_gateway_channel';
COMMENT ON FUNCTION agentvm.gateway_channel() IS 'where gateways LISTEN for the ids of sessions that begin to end; NULL where no dispatcher can be';

-- Wakes the dispatchers of this database when this transaction commits.
CREATE FUNCTION agentvm.wake() RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_wake';
COMMENT ON FUNCTION agentvm.wake() IS 'wake the dispatchers of this database when this transaction commits';

-- ---------------------------------------------------------------------------
-- Rights
-- ---------------------------------------------------------------------------

REVOKE ALL ON ALL ROUTINES IN SCHEMA agentvm FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agentvm.visible_teams(), agentvm.sees_all() TO agentvm_user, agentvm_monitor;
GRANT EXECUTE ON FUNCTION
	agentvm.provision(text, text, text, text, text, jsonb, jsonb, jsonb, jsonb, interval), agentvm.terminate(uuid, text),
	agentvm.wait(uuid, text, interval), agentvm.status(uuid), agentvm.inspect(uuid), agentvm.extend(uuid, interval),
	agentvm.channel(text)
	TO agentvm_user;
GRANT EXECUTE ON PROCEDURE agentvm.await(uuid, text, interval, text) TO agentvm_user;
GRANT EXECUTE ON FUNCTION
	agentvm.create_team(text, text, jsonb), agentvm.alter_team(text, text, jsonb), agentvm.drop_team(text),
	agentvm.add_member(text, name), agentvm.remove_member(text, name), agentvm.set_provider(text, text, jsonb, jsonb),
	agentvm.check_provider(text, text), agentvm.drop_provider(text, text), agentvm.rotate_keys(),
	agentvm.create_profile(text, text, jsonb, text, int, int, int, boolean, interval, interval, interval),
	agentvm.drop_profile(text, text), agentvm.sweep_bootstrap(int), agentvm.sweep_heartbeat(int), agentvm.sweep_lifetime(int),
	agentvm.sweep(int), agentvm.wake(), agentvm.adopt_cluster(text), agentvm.abandon()
	TO agentvm_admin;
GRANT EXECUTE ON PROCEDURE agentvm.dispatch(int, int) TO agentvm_admin;
GRANT EXECUTE ON FUNCTION agentvm.seal_audit(), agentvm.purge(interval) TO agentvm_admin;
GRANT EXECUTE ON FUNCTION agentvm.verify_audit(text) TO agentvm_user;
GRANT EXECUTE ON FUNCTION agentvm.stat_provider_get(), agentvm.stat_dispatcher_get(), agentvm.health_get(), agentvm.cluster_identity()
	TO agentvm_admin, agentvm_monitor;
GRANT EXECUTE ON FUNCTION agentvm.bootstrap(bytea, bytea, text, jsonb), agentvm.authenticate(bytea), agentvm.heartbeat(bytea),
	agentvm.heartbeat_batch(uuid[], timestamptz[]), agentvm.deadlines(uuid[]), agentvm.gateway_channel() TO agentvm_gateway;

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

SELECT agentvm.wake();
