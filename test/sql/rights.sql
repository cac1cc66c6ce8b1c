--
-- Ways around the rights, and who the caller is; who may do what is test/t/091_matrix.pl's
--
\set SHOW_CONTEXT never
\pset format unaligned
\pset tuples_only on
SET client_min_messages = warning;
CREATE ROLE regress_rights_member IN ROLE agentvm_user;
CREATE ROLE regress_rights_group;
CREATE ROLE regress_rights_grouped IN ROLE agentvm_user, regress_rights_group;
CREATE ROLE regress_rights_other IN ROLE agentvm_user;
CREATE ROLE regress_rights_gone IN ROLE agentvm_user;
CREATE ROLE regress_rights_monitor IN ROLE agentvm_monitor;
CREATE ROLE regress_rights_powerless;
RESET client_min_messages;

-- ---- the catalog ----
-- each function runs as its caller, and is explained; each table and view is, too
SELECT p.oid::regprocedure FROM pg_proc p WHERE pronamespace = 'agentvm'::regnamespace AND (prosecdef OR obj_description(oid, 'pg_proc') IS NULL);
SELECT c.oid::regclass FROM pg_class c WHERE relnamespace = 'agentvm'::regnamespace AND relkind IN ('r', 'v') AND obj_description(oid, 'pg_class') IS NULL;
-- tables have row-level security, views are barriers and tell of sessions only by way of who asks
SELECT c.oid::regclass FROM pg_class c WHERE relnamespace = 'agentvm'::regnamespace AND relkind = 'r' AND NOT relrowsecurity;
SELECT c.oid::regclass, reloptions FROM pg_class c WHERE relnamespace = 'agentvm'::regnamespace AND relkind = 'v' ORDER BY 1;
-- the roles' own rights
SELECT a.rolname, b.rolname FROM pg_auth_members m JOIN pg_roles a ON a.oid = m.roleid JOIN pg_roles b ON b.oid = m.member WHERE b.rolname LIKE 'agentvm%' ORDER BY 1, 2;
SELECT rolname FROM pg_roles WHERE rolname LIKE 'agentvm%' AND (rolsuper OR rolcanlogin OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls);

-- ---- two teams with a session each ----
SELECT agentvm.create_team('regress_rights');
SELECT agentvm.create_team('regress_rights_b');
SELECT agentvm.add_member('regress_rights', m::name) FROM unnest('{regress_rights_member, regress_rights_group, regress_rights_gone, regress_rights_powerless}'::text[]) m;
SELECT agentvm.add_member('regress_rights_b', 'regress_rights_other');
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
SELECT count(*) FROM agentvm.session_event WHERE pg_temp.leak(team_id);
DROP FUNCTION pg_temp.leak(text);
-- nor does an error that shows a value
SELECT count(*) FROM agentvm.sessions WHERE team_id::int = 0;
SELECT count(*) FROM agentvm.provider_config WHERE options::text::int = 0 OR team_id::int = 0;
-- nor a plan that was made for another role, nor one for parallel workers
SET ROLE regress_rights_member;
PREPARE regress_rights_team AS SELECT team_id FROM agentvm.team WHERE team_id LIKE 'regress_rights%';
PREPARE regress_rights_sessions AS SELECT DISTINCT team_id FROM agentvm.sessions WHERE team_id LIKE 'regress_rights%';
EXECUTE regress_rights_team;
EXECUTE regress_rights_sessions;
SELECT team_id FROM agentvm.status(:'id');
SET ROLE regress_rights_other;
EXECUTE regress_rights_team;
EXECUTE regress_rights_sessions;
\set VERBOSITY sqlstate
SELECT team_id FROM agentvm.status(:'id');
\set VERBOSITY default
SET parallel_setup_cost = 0;
SET parallel_tuple_cost = 0;
SET min_parallel_table_scan_size = 0;
SELECT DISTINCT team_id FROM agentvm.sessions WHERE team_id LIKE 'regress_rights%';
SELECT team_id FROM agentvm.team WHERE team_id LIKE 'regress_rights%';
RESET parallel_setup_cost;
RESET parallel_tuple_cost;
RESET min_parallel_table_scan_size;
DEALLOCATE ALL;
-- nor COPY, nor one who asks, as pg_dump does, for all rows or an error
COPY agentvm.team (team_id) TO STDOUT;
SET row_security = off;
SELECT team_id FROM agentvm.team;
SELECT team_id FROM agentvm.sessions WHERE team_id LIKE 'regress_rights%';
RESET row_security;
-- nor a view over ours, whoever owns it: it shows what the one who asks may see, to others nothing
RESET ROLE;
CREATE VIEW public.regress_rights_v_member AS SELECT session_id, team_id FROM agentvm.sessions WHERE team_id LIKE 'regress_rights%';
CREATE VIEW public.regress_rights_v_monitor AS SELECT session_id, team_id FROM agentvm.sessions WHERE team_id LIKE 'regress_rights%';
CREATE VIEW public.regress_rights_v_team AS SELECT team_id FROM agentvm.team WHERE team_id LIKE 'regress_rights%';
ALTER VIEW public.regress_rights_v_member OWNER TO regress_rights_member;
ALTER VIEW public.regress_rights_v_monitor OWNER TO regress_rights_monitor;
ALTER VIEW public.regress_rights_v_team OWNER TO regress_rights_member;
GRANT SELECT ON public.regress_rights_v_member, public.regress_rights_v_monitor, public.regress_rights_v_team TO PUBLIC;
SET ROLE regress_rights_member; SELECT v.team_id, m.team_id, t.team_id FROM public.regress_rights_v_member v, public.regress_rights_v_monitor m, public.regress_rights_v_team t;
SET ROLE regress_rights_other; SELECT v.team_id, m.team_id, t.team_id FROM public.regress_rights_v_member v, public.regress_rights_v_monitor m, public.regress_rights_v_team t;
SET ROLE regress_rights_powerless; SELECT * FROM public.regress_rights_v_member;
SELECT * FROM public.regress_rights_v_monitor;
SELECT * FROM public.regress_rights_v_team;
RESET ROLE;
DROP VIEW public.regress_rights_v_member, public.regress_rights_v_monitor, public.regress_rights_v_team;
-- nor the planner's statistics
ANALYZE agentvm.session, agentvm.team, agentvm.team_member, agentvm.provider_config, agentvm.profile, agentvm.session_event;
SELECT count(*) > 0 FROM pg_stats WHERE schemaname = 'agentvm';
SET ROLE regress_rights_monitor; SELECT count(*) FROM pg_stats WHERE schemaname = 'agentvm';
SET ROLE agentvm_admin; SELECT count(*) FROM pg_stats WHERE schemaname = 'agentvm';
SET ROLE regress_rights_other; SELECT count(*) FROM pg_stats WHERE schemaname = 'agentvm';
-- nor the sequence of the events, which provision() has just moved
SELECT agentvm.provision('regress_rights_b', idempotency_key => 'same') AS id_of_b \gset
SELECT currval('agentvm.session_event_event_id_seq');
SELECT lastval();
-- a key is a team's own
SET ROLE regress_rights_member;
SELECT agentvm.provision('regress_rights', idempotency_key => 'same') <> :'id_of_b';
SELECT team_id, idempotency_key FROM agentvm.sessions WHERE idempotency_key = 'same';
RESET ROLE;

-- ---- what a role may call: the SQLSTATE, or the answer ----
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
	FROM unnest(ARRAY['provision(''regress_rights'')', 'terminate(%L)', 'wait(%L, ''terminating'', ''1 s'')', 'status(%L)', 'inspect(%L)', 'extend(%L, ''1 s'')', 'channel(''regress_rights'')',
		'create_team(''regress_rights_c'')', 'alter_team(''regress_rights'')', 'drop_team(''regress_rights_b'')', 'add_member(''regress_rights'', current_user)', 'remove_member(''regress_rights'', ''regress_rights_member'')',
		'set_provider(''regress_rights'', ''noop'', ''{}'')', 'check_provider(''regress_rights'')', 'drop_provider(''regress_rights'', ''noop'')', 'create_profile(''regress_rights_q'', ''noop'')', 'drop_profile(''regress_rights_all'')', 'rotate_keys()',
		'sweep()', 'wake()', 'bootstrap(sha256(''''), sha256(''''), ''x'')', 'authenticate(sha256(''''))', 'heartbeat(sha256(''''))', 'heartbeat_batch(''{}'', ''{}'')',
		'visible_teams()', 'sees_all()', 'health_get()', 'stat_provider_get()', 'stat_dispatcher_get()']) WITH ORDINALITY AS c (call, n)
$$;
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
DROP FUNCTION public.regress_rights_calls(text), public.regress_rights_all_calls(uuid), public.regress_rights_wrapper(), public.regress_rights_plain(),
	public.regress_rights_trigger(), public.regress_rights_definer_trigger();
REVOKE ALL ON SCHEMA agentvm FROM regress_rights_powerless;
DROP ROLE regress_rights_member, regress_rights_group, regress_rights_grouped, regress_rights_other, regress_rights_monitor, regress_rights_powerless;
