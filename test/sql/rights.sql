--
-- Who may see and do what
--
\set SHOW_CONTEXT never
\pset format unaligned
\pset tuples_only on
SET client_min_messages = warning;
CREATE ROLE regress_rights_admin IN ROLE agentvm_admin;
CREATE ROLE regress_rights_member IN ROLE agentvm_user;
CREATE ROLE regress_rights_group;
CREATE ROLE regress_rights_grouped IN ROLE agentvm_user, regress_rights_group;
CREATE ROLE regress_rights_other IN ROLE agentvm_user;
CREATE ROLE regress_rights_former IN ROLE agentvm_user;
CREATE ROLE regress_rights_gone IN ROLE agentvm_user;
CREATE ROLE regress_rights_monitor IN ROLE agentvm_monitor;
CREATE ROLE regress_rights_gateway IN ROLE agentvm_gateway;
CREATE ROLE regress_rights_powerless;
-- a member of the team by role, without the rights of agentvm_user
CREATE ROLE regress_rights_unable IN ROLE regress_rights_group;
RESET client_min_messages;

-- ---- the catalog ----
-- nobody outside has any right, on anything
SELECT p.oid::regprocedure FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE pronamespace = 'agentvm'::regnamespace AND a.grantee = 0;
SELECT c.oid::regclass FROM pg_class c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a WHERE relnamespace = 'agentvm'::regnamespace AND relkind IN ('r', 'v', 'm', 'S', 'p') AND a.grantee = 0;
SELECT nspname FROM pg_namespace, aclexplode(nspacl) a WHERE nspname = 'agentvm' AND (a.grantee = 0 OR (a.privilege_type = 'CREATE' AND a.grantee <> nspowner));
-- each function runs as its caller, and is explained; each table and view is, too
SELECT p.oid::regprocedure FROM pg_proc p WHERE pronamespace = 'agentvm'::regnamespace AND (prosecdef OR obj_description(oid, 'pg_proc') IS NULL);
SELECT c.oid::regclass FROM pg_class c WHERE relnamespace = 'agentvm'::regnamespace AND relkind IN ('r', 'v') AND obj_description(oid, 'pg_class') IS NULL;
-- tables have row-level security, views are barriers and tell of sessions only by way of who asks
SELECT c.oid::regclass FROM pg_class c WHERE relnamespace = 'agentvm'::regnamespace AND relkind = 'r' AND NOT relrowsecurity;
SELECT c.oid::regclass, reloptions FROM pg_class c WHERE relnamespace = 'agentvm'::regnamespace AND relkind = 'v' ORDER BY 1;
-- who may do what to which table and view
SELECT c.oid::regclass, a.grantee::regrole, string_agg(lower(a.privilege_type), ' ' ORDER BY a.privilege_type) FROM pg_class c, aclexplode(c.relacl) a
WHERE relnamespace = 'agentvm'::regnamespace AND a.grantee <> relowner GROUP BY 1, 2 ORDER BY 1::text, 2::text;
SELECT p.proname, string_agg(a.grantee::regrole::text, ' ' ORDER BY a.grantee::regrole::text) FROM pg_proc p LEFT JOIN aclexplode(p.proacl) a ON a.grantee <> p.proowner
WHERE pronamespace = 'agentvm'::regnamespace GROUP BY p.oid, 1 ORDER BY 1;
SELECT a.rolname, b.rolname FROM pg_auth_members m JOIN pg_roles a ON a.oid = m.roleid JOIN pg_roles b ON b.oid = m.member WHERE b.rolname LIKE 'agentvm%' ORDER BY 1, 2;
SELECT rolname FROM pg_roles WHERE rolname LIKE 'agentvm%' AND (rolsuper OR rolcanlogin OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls);

-- ---- two teams with a session each ----
SELECT agentvm.create_team('regress_rights');
SELECT agentvm.create_team('regress_rights_b');
SELECT agentvm.add_member('regress_rights', m::name) FROM unnest('{regress_rights_member, regress_rights_group, regress_rights_former, regress_rights_gone, regress_rights_gateway, regress_rights_powerless}'::text[]) m;
SELECT agentvm.add_member('regress_rights_b', 'regress_rights_other');
SELECT agentvm.remove_member('regress_rights', 'regress_rights_former');
DROP ROLE regress_rights_gone; -- a dropped role as a member disturbs nobody from here on
SELECT count(*) FROM agentvm.team_member m WHERE team_id = 'regress_rights' AND NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = m.role);
SELECT agentvm.set_provider(team_id, 'noop', '{"launch_delay": "1h"}') FROM agentvm.team WHERE team_id LIKE 'regress_rights%';
SELECT agentvm.create_profile('regress_rights_p', 'noop', team_id => 'regress_rights');
SELECT agentvm.create_profile('regress_rights_all', 'noop');
SET ROLE regress_rights_member;
SELECT agentvm.provision('regress_rights', 'coder') AS id \gset
SET ROLE regress_rights_other;
SELECT agentvm.provision('regress_rights_b', 'coder') AS id_b \gset
RESET ROLE;

-- what each role sees: rows of the two teams, or the error
CREATE FUNCTION public.regress_rights_sees(relation text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	rows bigint; own bigint;
BEGIN
	IF relation IN ('team', 'team_member', 'provider_config', 'session', 'session_event', 'sessions', 'fleet', 'profile', 'provider_secret') THEN
		EXECUTE format('SELECT count(DISTINCT team_id), count(DISTINCT team_id) FILTER (WHERE team_id = %L) FROM agentvm.%I WHERE team_id LIKE ''regress_rights%%''', 'regress_rights', relation) INTO rows, own;
		RETURN format('%s/%s', own, rows);
	END IF;
	EXECUTE format('SELECT count(*) FROM agentvm.%I', relation) INTO rows;
	RETURN 'may';
EXCEPTION WHEN insufficient_privilege THEN
	RETURN '-';
END
$$;
CREATE FUNCTION public.regress_rights_view() RETURNS text LANGUAGE sql AS $$
	SELECT rpad(current_user, 25) || string_agg(relation || ' ' || public.regress_rights_sees(relation), ', ' ORDER BY n)
	FROM unnest('{team, team_member, provider_config, profile, sessions, fleet, session_event, session, session_token, session_heartbeat, provider_secret, former_team, gateway, installation, sweep_hold, stat_provider, stat_dispatcher, health}'::text[]) WITH ORDINALITY AS r (relation, n)
$$;
SELECT public.regress_rights_view();
SET ROLE regress_rights_admin; SELECT public.regress_rights_view();
SET ROLE regress_rights_member; SELECT public.regress_rights_view();
SET ROLE regress_rights_grouped; SELECT public.regress_rights_view();
SET ROLE regress_rights_other; SELECT public.regress_rights_view();
SET ROLE regress_rights_former; SELECT public.regress_rights_view();
SET ROLE regress_rights_monitor; SELECT public.regress_rights_view();
SET ROLE regress_rights_gateway; SELECT public.regress_rights_view();
SET ROLE regress_rights_powerless; SELECT public.regress_rights_view();
-- other people's rows are not there, whichever way one looks
SET ROLE regress_rights_other;
SELECT count(*) FROM agentvm.sessions WHERE session_id = :'id';
SELECT team_id, agent_id FROM agentvm.sessions WHERE team_id LIKE 'regress_rights%';
SELECT count(*) FROM agentvm.session_event WHERE session_id = :'id';
SELECT team_id, sum(sessions) FROM agentvm.fleet WHERE team_id LIKE 'regress_rights%' GROUP BY 1;
-- a leaky function sees only what its caller may see
CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS $$ BEGIN RAISE NOTICE 'leaked %', $1; RETURN true; END $$;
SELECT count(*) FROM agentvm.sessions WHERE pg_temp.leak(team_id) AND team_id LIKE 'regress_rights%';
SELECT count(*) FROM agentvm.fleet WHERE pg_temp.leak(team_id) AND team_id LIKE 'regress_rights%';
SELECT count(*) FROM agentvm.team WHERE pg_temp.leak(team_id);
DROP FUNCTION pg_temp.leak(text);
RESET ROLE;

-- ---- what each role may call: the SQLSTATE, or the answer ----
CREATE FUNCTION public.regress_rights_calls(call text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	answer text;
BEGIN
	EXECUTE 'SELECT ' || call INTO answer;
	RAISE EXCEPTION USING ERRCODE = 'ZZ000', MESSAGE = CASE WHEN answer ~ '^[0-9a-f-]{36}$' THEN 'uuid' ELSE 'may' END;
EXCEPTION WHEN OTHERS THEN
	RETURN CASE SQLSTATE WHEN 'ZZ000' THEN SQLERRM ELSE SQLSTATE END;
END
$$;
CREATE FUNCTION public.regress_rights_all_calls(id uuid) RETURNS text LANGUAGE sql AS $$
	SELECT rpad(current_user, 25) || string_agg(split_part(call, '(', 1) || ' ' || public.regress_rights_calls('agentvm.' || format(call, id)), ', ' ORDER BY n)
	FROM unnest(ARRAY['provision(''regress_rights'')', 'terminate(%L)', 'wait(%L, ''terminating'', ''1 s'')', 'status(%L)', 'inspect(%L)', 'extend(%L, ''1 s'')',
		'create_team(''regress_rights_c'')', 'alter_team(''regress_rights'')', 'drop_team(''regress_rights_b'')', 'add_member(''regress_rights'', current_user)', 'remove_member(''regress_rights'', ''regress_rights_member'')',
		'set_provider(''regress_rights'', ''noop'', ''{}'')', 'check_provider(''regress_rights'')', 'drop_provider(''regress_rights'', ''noop'')', 'create_profile(''regress_rights_q'', ''noop'')', 'drop_profile(''regress_rights_all'')',
		'sweep()', 'wake()', 'bootstrap(sha256(''''), sha256(''''), ''x'')', 'authenticate(sha256(''''))', 'heartbeat(sha256(''''))', 'heartbeat_batch(''{}'', ''{}'')',
		'visible_teams()', 'sees_all()', 'health_get()', 'stat_provider_get()', 'stat_dispatcher_get()']) WITH ORDINALITY AS c (call, n)
$$;
SET ROLE regress_rights_admin; SELECT public.regress_rights_all_calls(:'id');
SET ROLE regress_rights_member; SELECT public.regress_rights_all_calls(:'id');
SET ROLE regress_rights_grouped; SELECT public.regress_rights_all_calls(:'id');
SET ROLE regress_rights_other; SELECT public.regress_rights_all_calls(:'id');
SET ROLE regress_rights_former; SELECT public.regress_rights_all_calls(:'id');
SET ROLE regress_rights_monitor; SELECT public.regress_rights_all_calls(:'id');
SET ROLE regress_rights_gateway; SELECT public.regress_rights_all_calls(:'id');
SET ROLE regress_rights_powerless; SELECT public.regress_rights_all_calls(:'id');
CALL agentvm.dispatch();
\set VERBOSITY sqlstate
CALL agentvm.await(:'id');
\set VERBOSITY default
SET ROLE regress_rights_member;
CALL agentvm.dispatch();
-- who inherits nothing has to become the member first
RESET ROLE;
ALTER ROLE regress_rights_grouped NOINHERIT;
SET ROLE regress_rights_grouped; SELECT public.regress_rights_all_calls(:'id') LIKE '%provision 42501%';
RESET ROLE;
ALTER ROLE regress_rights_grouped INHERIT;
GRANT agentvm_user TO regress_rights_unable;
SET ROLE regress_rights_unable; SELECT public.regress_rights_calls(format('agentvm.status(%L)', :'id'));
RESET ROLE;
REVOKE agentvm_user FROM regress_rights_unable;
-- EXECUTE alone, given by mistake, opens nothing of another team
GRANT USAGE ON SCHEMA agentvm TO regress_rights_powerless;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA agentvm TO regress_rights_powerless;
SELECT agentvm.remove_member('regress_rights', 'regress_rights_powerless');
SET ROLE regress_rights_powerless; SELECT public.regress_rights_all_calls(:'id');
RESET ROLE;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA agentvm FROM regress_rights_powerless;

-- ---- who the caller is: created_by and membership under SET ROLE, a SECURITY DEFINER wrapper, a trigger ----
CREATE FUNCTION public.regress_rights_wrapper() RETURNS uuid LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog AS $$ SELECT agentvm.provision('regress_rights', 'wrapped') $$;
CREATE FUNCTION public.regress_rights_plain() RETURNS uuid LANGUAGE sql AS $$ SELECT agentvm.provision('regress_rights', 'plain') $$;
CREATE TABLE public.regress_rights_job (job text, session uuid);
CREATE FUNCTION public.regress_rights_trigger() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.session := agentvm.provision('regress_rights', NEW.job); RETURN NEW; END $$;
CREATE FUNCTION public.regress_rights_definer_trigger() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$ BEGIN NEW.session := agentvm.provision('regress_rights', NEW.job); RETURN NEW; END $$;
ALTER FUNCTION public.regress_rights_wrapper() OWNER TO regress_rights_member;
ALTER FUNCTION public.regress_rights_definer_trigger() OWNER TO regress_rights_member;
GRANT INSERT, SELECT ON public.regress_rights_job TO PUBLIC;
CREATE TRIGGER job BEFORE INSERT ON public.regress_rights_job FOR EACH ROW EXECUTE FUNCTION public.regress_rights_trigger();
SET ROLE regress_rights_grouped;
SELECT public.regress_rights_plain() IS NOT NULL;
INSERT INTO public.regress_rights_job VALUES ('by trigger');
SELECT current_user, current_setting('search_path');
SET ROLE regress_rights_powerless;
SELECT public.regress_rights_wrapper() IS NOT NULL;
SELECT public.regress_rights_calls('public.regress_rights_plain()');
INSERT INTO public.regress_rights_job VALUES ('refused');
SELECT current_user, current_setting('search_path');
RESET ROLE;
DROP TRIGGER job ON public.regress_rights_job;
CREATE TRIGGER job BEFORE INSERT ON public.regress_rights_job FOR EACH ROW EXECUTE FUNCTION public.regress_rights_definer_trigger();
SET ROLE regress_rights_powerless;
INSERT INTO public.regress_rights_job VALUES ('by definer trigger');
SELECT current_user, current_setting('search_path');
-- an error within leaves the caller who it is
DO $$ BEGIN PERFORM public.regress_rights_wrapper() FROM agentvm.sessions; EXCEPTION WHEN OTHERS THEN RAISE NOTICE '% %', SQLSTATE, current_user; END $$;
SET ROLE regress_rights_other;
DO $$ BEGIN PERFORM agentvm.provision('regress_rights'); EXCEPTION WHEN OTHERS THEN RAISE NOTICE '% %', SQLSTATE, current_user; END $$;
SELECT current_user, current_setting('search_path');
RESET ROLE;
SELECT agent_id, created_by FROM agentvm.session WHERE team_id = 'regress_rights' AND agent_id <> 'coder' ORDER BY 1;

-- clean up
SELECT count(*) FROM agentvm.session WHERE team_id LIKE 'regress_rights%' AND agentvm.terminate(session_id);
SELECT DISTINCT agentvm.wait(session_id, 'terminated') FROM agentvm.session WHERE team_id LIKE 'regress_rights%';
SELECT agentvm.drop_team('regress_rights');
SELECT agentvm.drop_team('regress_rights_b');
SELECT agentvm.drop_profile('regress_rights_all');
DELETE FROM agentvm.session WHERE team_id LIKE 'regress_rights%';
DELETE FROM agentvm.former_team WHERE team_id LIKE 'regress_rights%';
SET client_min_messages = warning;
DROP TABLE public.regress_rights_job;
DROP FUNCTION public.regress_rights_sees(text), public.regress_rights_view(), public.regress_rights_calls(text), public.regress_rights_all_calls(uuid), public.regress_rights_wrapper(), public.regress_rights_plain(),
	public.regress_rights_trigger(), public.regress_rights_definer_trigger();
REVOKE ALL ON SCHEMA agentvm FROM regress_rights_powerless;
DROP ROLE regress_rights_admin, regress_rights_member, regress_rights_group, regress_rights_grouped, regress_rights_other, regress_rights_former, regress_rights_monitor, regress_rights_gateway, regress_rights_powerless, regress_rights_unable;
