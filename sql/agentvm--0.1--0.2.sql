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

-- ---------------------------------------------------------------------------
-- Teams, members, profiles, providers
-- ---------------------------------------------------------------------------

CREATE FUNCTION agentvm.rotate_keys() RETURNS int
LANGUAGE C VOLATILE AS 'MODULE_PATHNAME', 'agentvm_rotate_keys';
COMMENT ON FUNCTION agentvm.rotate_keys() IS 'encrypt anew, with the first key of agentvm.key_file, some of what other keys have encrypted; how much. 0 = nothing is left: call it until then';

-- ---------------------------------------------------------------------------
-- Rights
-- ---------------------------------------------------------------------------

REVOKE ALL ON ALL ROUTINES IN SCHEMA agentvm FROM PUBLIC;
GRANT EXECUTE ON FUNCTION agentvm.rotate_keys() TO agentvm_admin;

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
