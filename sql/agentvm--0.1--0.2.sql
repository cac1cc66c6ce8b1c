/* agentvm--0.1--0.2.sql: from 0.1 to 0.2; what it makes is what agentvm--0.2.sql makes, to which 060_upgrade.pl holds both */

-- complain if the script is sourced in psql rather than by ALTER EXTENSION
\echo Use "ALTER EXTENSION agentvm UPDATE TO '0.2'" to load this file. \quit

-- the owner of a database may have made functions and operators that match our calls better than PostgreSQL's own
SET LOCAL search_path = pg_catalog, pg_temp;

-- ---------------------------------------------------------------------------
-- Tables
-- ---------------------------------------------------------------------------

-- A dump carries a role's name, so that it is the same role in another cluster; a dropped role has but its number.
ALTER TABLE agentvm.team_member ALTER COLUMN role TYPE regrole;
SELECT pg_catalog.pg_extension_config_dump('agentvm.team_member', 'WHERE EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = role)');

-- LISTEN asks for no right, so only who knows the name hears what is said: 192 random bits
ALTER TABLE agentvm.team ADD COLUMN channel text NOT NULL DEFAULT 'agentvm_' || left(encode(sha256((gen_random_uuid()::text || gen_random_uuid()::text)::bytea), 'hex'), 48);

-- every row changes about six times, and most stay for a month
ALTER TABLE agentvm.session SET (autovacuum_vacuum_scale_factor = 0.05);

-- of payload_enc, where that is not key_id any more: rotate_keys(); key_id stays that of the bootstrap token
ALTER TABLE agentvm.session ADD COLUMN payload_key_id text;

-- the library's session_is_sound() asks for a reason now; other tooling may have left it out
UPDATE agentvm.session SET end_reason = 'requested' WHERE state = 'terminating' AND end_reason IS NULL;

CREATE TABLE agentvm.session_ending (
	session_id uuid PRIMARY KEY
);
COMMENT ON TABLE agentvm.session_ending IS 'sessions with a runtime that are terminating: heartbeats look here, not into the wide rows';
INSERT INTO agentvm.session_ending SELECT session_id FROM agentvm.session WHERE state = 'terminating' AND runtime;
SELECT pg_catalog.pg_extension_config_dump('agentvm.session_ending', '');
ALTER TABLE agentvm.session_ending ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON agentvm.session_ending FROM PUBLIC;

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

SELECT pg_catalog.pg_extension_config_dump('agentvm.event_seal', '');
SELECT pg_catalog.pg_extension_config_dump('agentvm.event_seal_mark', '');
ALTER TABLE agentvm.event_seal ENABLE ROW LEVEL SECURITY;
ALTER TABLE agentvm.event_seal_mark ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON agentvm.event_seal, agentvm.event_seal_mark FROM PUBLIC;
GRANT SELECT ON agentvm.event_seal, agentvm.event_seal_mark TO agentvm_admin;
GRANT SELECT ON agentvm.event_seal TO agentvm_user;
CREATE POLICY admin ON agentvm.event_seal FOR SELECT TO agentvm_admin USING (true);
CREATE POLICY admin ON agentvm.event_seal_mark FOR SELECT TO agentvm_admin USING (true);
CREATE POLICY member ON agentvm.event_seal FOR SELECT TO agentvm_user
	USING (team_id = ANY ((SELECT agentvm.visible_teams())::text[]));

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

SELECT pg_catalog.pg_extension_config_dump('agentvm.host', '');
SELECT pg_catalog.pg_extension_config_dump('agentvm.placement', '');
ALTER TABLE agentvm.host ENABLE ROW LEVEL SECURITY;
ALTER TABLE agentvm.placement ENABLE ROW LEVEL SECURITY;
REVOKE ALL ON agentvm.host, agentvm.placement FROM PUBLIC;
GRANT SELECT ON agentvm.host, agentvm.placement TO agentvm_admin;
CREATE POLICY admin ON agentvm.host FOR SELECT TO agentvm_admin USING (true);
CREATE POLICY admin ON agentvm.placement FOR SELECT TO agentvm_admin USING (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON agentvm.host TO agentvm_admin;
CREATE POLICY admin_writes ON agentvm.host TO agentvm_admin USING (true) WITH CHECK (true);

CREATE FUNCTION agentvm.host_changed() RETURNS trigger LANGUAGE C AS 'MODULE_PATHNAME', 'agentvm_host_changed';
COMMENT ON FUNCTION agentvm.host_changed() IS 'refuses a uri that would do more than connect; notes when a host has been changed, refuses another uri or directory while it has VMs, and forgets what was learned of it when it is another machine';

CREATE TRIGGER changed BEFORE INSERT OR UPDATE ON agentvm.host FOR EACH ROW EXECUTE FUNCTION agentvm.host_changed();

-- the dispatchers' view has two more columns; whatever is built on it stays
ALTER FUNCTION agentvm.stat_dispatcher_get() RENAME TO former_stat_dispatcher_get;
CREATE FUNCTION agentvm.stat_dispatcher_get(OUT dispatcher int, OUT pid int, OUT started_at timestamptz, OUT last_pass_at timestamptz,
	OUT in_flight int, OUT passes bigint, OUT claimed bigint, OUT recorded bigint, OUT stale_replies bigint, OUT sleeping_until timestamptz,
	OUT kind text, OUT stuck int)
RETURNS SETOF record LANGUAGE C STRICT VOLATILE AS 'MODULE_PATHNAME', 'agentvm_stat_dispatcher';
COMMENT ON FUNCTION agentvm.stat_dispatcher_get() IS 'the rows of view stat_dispatcher, from shared memory';
CREATE OR REPLACE VIEW agentvm.stat_dispatcher AS SELECT * FROM agentvm.stat_dispatcher_get();
COMMENT ON VIEW agentvm.stat_dispatcher IS 'the dispatchers and runners that serve this database; stuck: threads of a runner that hang in a call';
DROP FUNCTION agentvm.former_stat_dispatcher_get();
COMMENT ON PROCEDURE agentvm.dispatch(int, int) IS 'one pass of the engine in this backend: claim, call providers, record; commits in between. Providers whose library blocks (libvirt) are left to their runner';

-- refuses with session_replication_role = replica, too
ALTER TABLE agentvm.session_event ENABLE ALWAYS TRIGGER append_only;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON agentvm.event_seal
	FOR EACH STATEMENT EXECUTE FUNCTION agentvm.event_is_append_only();
ALTER TABLE agentvm.event_seal ENABLE ALWAYS TRIGGER append_only;

-- Who we are: the one installation that 0.1 knew is this one. Which restore it has seen is not known, so that a server
-- that has seen one asks first.
CREATE FUNCTION agentvm.cluster_identity(OUT system_identifier bigint, OUT database oid, OUT restore_id uuid)
LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'agentvm_cluster_identity';
COMMENT ON FUNCTION agentvm.cluster_identity() IS 'what the row of agentvm.installation has to match before anything acts';

ALTER TABLE agentvm.installation DROP COLUMN only_row, ADD PRIMARY KEY (installation_id), ADD COLUMN system_identifier bigint, ADD COLUMN database oid,
	ADD COLUMN restore_id uuid, ADD COLUMN in_use boolean NOT NULL DEFAULT false, ADD COLUMN adopted_at timestamptz, ADD COLUMN adopted_by name;
COMMENT ON TABLE agentvm.installation IS 'who we are: installation_id is the value of the tag agentvm-cluster, the rest says where; nothing acts unless there is one row, in use, that matches';
UPDATE agentvm.installation SET in_use = true, (system_identifier, database) = (SELECT c.system_identifier, c.database FROM agentvm.cluster_identity() c);
SELECT pg_catalog.pg_extension_config_dump('agentvm.installation', 'WHERE in_use');

-- ---------------------------------------------------------------------------
-- Teams, members, profiles, providers
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.channel(team_id text) RETURNS text
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_channel';
COMMENT ON FUNCTION agentvm.channel(text) IS 'where to LISTEN for changes of state of a team''s sessions; another one once a member has been removed';

CREATE FUNCTION agentvm.rotate_keys() RETURNS int
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_rotate_keys';
COMMENT ON FUNCTION agentvm.rotate_keys() IS 'encrypt anew, with the first key of agentvm.key_file, some of what other keys have encrypted; how much. 0 = nothing is left: call it until then';

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
-- What a copy of this database may do, and the end of the extension
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.guard_drop() RETURNS event_trigger LANGUAGE C AS 'MODULE_PATHNAME', 'agentvm_guard_drop';
COMMENT ON FUNCTION agentvm.guard_drop() IS 'loads the library, which refuses to drop the extension while VMs live, where it is not preloaded';

CREATE EVENT TRIGGER agentvm_guard_drop ON ddl_command_start WHEN TAG IN ('DROP EXTENSION', 'DROP SCHEMA', 'DROP OWNED')
	EXECUTE FUNCTION agentvm.guard_drop();
COMMENT ON EVENT TRIGGER agentvm_guard_drop IS 'the extension is not dropped while VMs live';

CREATE FUNCTION agentvm.adopt_cluster(mode text) RETURNS void
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_adopt_cluster';
COMMENT ON FUNCTION agentvm.adopt_cluster(text) IS 'make a restored or copied database act: takeover: it succeeds the original; fork: the original lives on and keeps the VMs';

CREATE FUNCTION agentvm.abandon(OUT session_id uuid, OUT team_id text, OUT provider text, OUT vm_id text, OUT region text)
RETURNS SETOF record LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_abandon';
COMMENT ON FUNCTION agentvm.abandon() IS 'forget every live session without a call to its provider; returns those that may have a VM, which somebody must now look after';

CREATE FUNCTION agentvm.deadlines(session_ids uuid[], OUT session_id uuid, OUT deadline_at timestamptz) RETURNS SETOF record
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_deadlines';
COMMENT ON FUNCTION agentvm.deadlines(uuid[]) IS 'the deadlines in force of those sessions that live, by id';

CREATE FUNCTION agentvm.gateway_channel() RETURNS text
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_gateway_channel';
COMMENT ON FUNCTION agentvm.gateway_channel() IS 'where gateways LISTEN for the ids of sessions that begin to end; NULL where no dispatcher can be';

-- ---------------------------------------------------------------------------
-- Rights
-- ---------------------------------------------------------------------------

REVOKE ALL ON ALL ROUTINES IN SCHEMA agentvm FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agentvm.deadlines(uuid[]), agentvm.gateway_channel() TO agentvm_gateway;
GRANT EXECUTE ON FUNCTION agentvm.channel(text) TO agentvm_user;
GRANT EXECUTE ON FUNCTION agentvm.rotate_keys() TO agentvm_admin;
GRANT EXECUTE ON FUNCTION agentvm.seal_audit(), agentvm.purge(interval) TO agentvm_admin;
GRANT EXECUTE ON FUNCTION agentvm.verify_audit(text) TO agentvm_user;
GRANT EXECUTE ON FUNCTION agentvm.adopt_cluster(text), agentvm.abandon() TO agentvm_admin;
GRANT EXECUTE ON FUNCTION agentvm.stat_dispatcher_get(), agentvm.cluster_identity() TO agentvm_admin, agentvm_monitor;

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
UPDATE agentvm.installation SET adopted_at = pg_catalog.clock_timestamp();

-- Dispatchers idle while library and extension differ: they go on when this has committed.
SELECT agentvm.wake();
