/* agentvm--0.1--0.2.sql: from 0.1 to 0.2; what it makes is what agentvm--0.2.sql makes, to which 060_upgrade.pl holds both */

-- complain if the script is sourced in psql rather than by ALTER EXTENSION
\echo Use "ALTER EXTENSION agentvm UPDATE TO '0.2'" to load this file. \quit

-- ---------------------------------------------------------------------------
-- Tables
-- ---------------------------------------------------------------------------

-- A dump carries a role's name, so that it is the same role in another cluster; a dropped role has but its number.
ALTER TABLE agentvm.team_member ALTER COLUMN role TYPE regrole;
SELECT pg_catalog.pg_extension_config_dump('agentvm.team_member', 'WHERE EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = role)');

-- of payload_enc, where that is not key_id any more: rotate_keys(); key_id stays that of the bootstrap token
ALTER TABLE agentvm.session ADD COLUMN payload_key_id text;

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

-- refuses with session_replication_role = replica, too
ALTER TABLE agentvm.session_event ENABLE ALWAYS TRIGGER append_only;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON agentvm.event_seal
	FOR EACH STATEMENT EXECUTE FUNCTION agentvm.event_is_append_only();
ALTER TABLE agentvm.event_seal ENABLE ALWAYS TRIGGER append_only;

-- ---------------------------------------------------------------------------
-- Teams, members, profiles, providers
-- ---------------------------------------------------------------------------

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

-- ---------------------------------------------------------------------------
-- Rights
-- ---------------------------------------------------------------------------

REVOKE ALL ON ALL ROUTINES IN SCHEMA agentvm FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agentvm.rotate_keys() TO agentvm_admin;
GRANT EXECUTE ON FUNCTION agentvm.seal_audit(), agentvm.purge(interval) TO agentvm_admin;
GRANT EXECUTE ON FUNCTION agentvm.verify_audit(text) TO agentvm_user;

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

-- Dispatchers idle while library and extension differ: they go on when this has committed.
SELECT agentvm.wake();
