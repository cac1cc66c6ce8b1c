--
-- Teams, their limits, their members
--
\set SHOW_CONTEXT never
\pset format unaligned
\pset tuples_only on
SET client_min_messages = warning;
CREATE ROLE regress_team_admin IN ROLE agentvm_admin;
CREATE ROLE regress_team_monitor IN ROLE agentvm_monitor;
CREATE ROLE regress_team_stranger;
CREATE ROLE regress_team_alice IN ROLE agentvm_user;
CREATE ROLE regress_team_group;
CREATE ROLE regress_team_bob IN ROLE agentvm_user, regress_team_group;
CREATE ROLE regress_team_carol NOINHERIT IN ROLE regress_team_group;
CREATE ROLE regress_team_gone;
GRANT USAGE ON SCHEMA agentvm TO regress_team_stranger;
GRANT USAGE ON SCHEMA agentvm TO regress_team_carol;
GRANT EXECUTE ON FUNCTION agentvm.visible_teams() TO regress_team_carol;
RESET client_min_messages;

-- what a statement that must fail says
CREATE FUNCTION public.regress_team_error(command text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	state text; message text; detail text; hint text;
BEGIN
	EXECUTE command;
	RETURN 'no error: ' || command;
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
	RETURN concat_ws(' | ', state, message, nullif(detail, ''), nullif(hint, ''));
END
$$;

-- ---- create_team ----
SET ROLE regress_team_admin;
SELECT agentvm.create_team('regress_one');
SELECT agentvm.create_team('regress_two', provider => 'noop', limits => '{"max_sessions": 10, "max_vcpus": 40.0, "max_memory_mib": 0,
	"min_lifetime": "1 minute", "max_lifetime": 7200, "bootstrap_timeout": "90s", "heartbeat_timeout": null}');
SELECT agentvm.create_team('regress_three', NULL, NULL);
SELECT agentvm.create_team('regress "four" o''clock');
SELECT to_jsonb(t) - '{channel,created_at,external_id,updated_at}'::text[] FROM agentvm.team t WHERE team_id LIKE 'regress%' ORDER BY team_id COLLATE "C";
SELECT current_user, current_setting('search_path');

SELECT public.regress_team_error(format('SELECT agentvm.create_team(%s)', arguments)) FROM (VALUES
	($$NULL$$), ($$''$$), ($$'   '$$), ($$' a'$$), ($$'a '$$), ($$E'a\nb'$$), ($$E'a\x7fb'$$), ($$repeat('x', 129)$$),
	($$'regress_one'$$), ($$'regress_x', 'nowhere'$$), ($$'regress_x', ''$$)) AS v(arguments);
SELECT public.regress_team_error(format('SELECT agentvm.create_team(''regress_x'', limits => %L)', limits)) FROM (VALUES
	('[]'), ('5'), ('null'), ('{"max_session": 1}'), (E'{"a\\nb": 1}'), ('{"daily_budget_usd": 5}'), ('{"daily_budget_usd": null}'),
	('{"max_sessions": -1}'), ('{"max_sessions": 2147483648}'), ('{"max_sessions": 1.5}'), ('{"max_sessions": "5"}'), ('{"max_sessions": [5]}'),
	('{"max_vcpus": true}'), ('{"max_memory_mib": 1e400}'), ('{"max_memory_mib": {}}'),
	('{"max_lifetime": "soon"}'), ('{"max_lifetime": 0}'), ('{"max_lifetime": 0.5}'), ('{"max_lifetime": "-1 hour"}'), ('{"max_lifetime": 1e300}'), ('{"max_lifetime": "367 days"}'),
	('{"max_lifetime": true}'), ('{"max_lifetime": ["1 hour"]}'), (format('{"max_lifetime": "%s"}', repeat('x', 100))),
	('{"max_lifetime": "25 hours"}'), ('{"min_lifetime": "25 hours"}'), ('{"min_lifetime": "2 hours", "max_lifetime": "1 hour"}'),
	(format('{"max_sessions": "%s"}', repeat('x', 70000)))) AS v(limits);
SELECT public.regress_team_error($$SELECT agentvm.create_team('regress_x', limits => jsonb_object_agg('k' || i, i)) FROM generate_series(1, 10000) i$$);
SELECT count(*) FROM agentvm.team WHERE team_id = 'regress_x';

-- ---- alter_team ----
SELECT agentvm.alter_team('regress_two', limits => '{"max_sessions": 20, "bootstrap_timeout": null, "min_lifetime": "90s"}');
SELECT agentvm.alter_team('regress_one', 'ec2');
SELECT agentvm.alter_team('regress_one');
SELECT to_jsonb(t) - '{channel,created_at,external_id,updated_at}'::text[], updated_at > created_at FROM agentvm.team t WHERE team_id IN ('regress_one', 'regress_two') ORDER BY team_id;
SELECT public.regress_team_error(format('SELECT agentvm.alter_team(%s)', arguments)) FROM (VALUES
	($$NULL$$), ($$'nobody'$$), ($$'regress_two', 'nowhere'$$), ($$'regress_two', ''$$), ($$'regress_two', limits => '{"max_lifetime": 60}'$$),
	($$'regress_two', limits => '{"min_lifetime": "3 hours"}'$$), ($$'regress_two', limits => '{"max_lifetime": "2 days"}'$$),
	($$'regress_two', limits => '{"x": 1}'$$), ($$'regress_two', limits => '[]'$$)) AS v(arguments);
-- both at once is fine, where each alone was not
SELECT agentvm.alter_team('regress_two', limits => '{"min_lifetime": "3 hours", "max_lifetime": "4 hours"}');
SELECT min_lifetime, max_lifetime, max_sessions FROM agentvm.team WHERE team_id = 'regress_two';
-- all or nothing
BEGIN;
SELECT agentvm.create_team('regress_x');
SELECT agentvm.alter_team('regress_x', limits => '{"max_sessions": 1}');
ROLLBACK;
SELECT count(*) FROM agentvm.team WHERE team_id = 'regress_x';
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT agentvm.create_team('regress_x', limits => '{"max_sessions": 1}');
SELECT agentvm.alter_team('regress_x', limits => '{"max_sessions": 2}');
SELECT max_sessions FROM agentvm.team WHERE team_id = 'regress_x';
SELECT agentvm.drop_team('regress_x');
COMMIT;

-- ---- members ----
SELECT agentvm.add_member('regress_one', 'regress_team_alice');
SELECT agentvm.add_member('regress_one', 'regress_team_alice');
SELECT agentvm.add_member('regress_two', 'regress_team_group');
SELECT agentvm.add_member('regress_three', 'regress_team_alice');
SELECT agentvm.add_member('regress_three', 'regress_team_bob');
SELECT agentvm.add_member('regress_three', 'regress_team_gone');
SELECT public.regress_team_error(format('SELECT agentvm.%s', call)) FROM (VALUES
	('add_member(NULL, NULL)'), ($$add_member('regress_one', NULL)$$), ($$add_member('nobody', 'regress_team_alice')$$),
	($$add_member('regress_one', 'regress_team_nobody')$$), ($$add_member('regress_one', 'public')$$),
	($$remove_member(NULL, 'regress_team_alice')$$), ($$remove_member('regress_one', NULL)$$), ($$remove_member('nobody', 'regress_team_alice')$$),
	($$remove_member('regress_one', 'regress_team_nobody')$$)) AS v(call);
SELECT team_id, role::regrole FROM agentvm.team_member ORDER BY team_id, role::regrole::text;

-- who sees what: through membership, inheritance, but not without it
SET ROLE regress_team_alice;
SELECT unnest(agentvm.visible_teams()) ORDER BY 1;
SELECT agentvm.sees_all();
SELECT team_id FROM agentvm.team ORDER BY 1;
SELECT team_id, role::regrole FROM agentvm.team_member ORDER BY team_id, role::regrole::text;
SET ROLE regress_team_bob;
SELECT unnest(agentvm.visible_teams()) ORDER BY 1;
SELECT team_id FROM agentvm.team ORDER BY 1;
SET ROLE regress_team_carol;
SELECT agentvm.visible_teams();
RESET ROLE;
REVOKE regress_team_group FROM regress_team_bob;
SET ROLE regress_team_bob;
SELECT agentvm.visible_teams();
RESET ROLE;
SELECT agentvm.remove_member('regress_three', 'regress_team_bob');
SET ROLE regress_team_bob;
SELECT agentvm.visible_teams();
SELECT count(*) FROM agentvm.team;
SELECT count(*) FROM agentvm.sessions;
SET ROLE regress_team_monitor;
SELECT agentvm.visible_teams(), agentvm.sees_all();
SELECT count(*) FROM agentvm.team;
SET ROLE regress_team_admin;
SELECT agentvm.visible_teams(), agentvm.sees_all();
SET ROLE regress_team_stranger;
SELECT agentvm.visible_teams();

-- a dropped role is no member and disturbs nobody, superusers included
RESET ROLE;
DROP ROLE regress_team_gone;
SELECT count(*) FROM agentvm.team_member WHERE team_id = 'regress_three';
SELECT agentvm.remove_member('regress_three', 'regress_team_alice');
SELECT agentvm.remove_member('regress_three', 'regress_team_alice');
SELECT count(*) FROM agentvm.team_member WHERE team_id = 'regress_three';
SELECT agentvm.add_member('regress_three', 'regress_team_bob');
DROP ROLE regress_team_bob;
SELECT team FROM unnest(agentvm.visible_teams()) AS team WHERE team LIKE 'regress%' ORDER BY 1;
SELECT agentvm.add_member('regress_three', 'regress_team_alice');
SELECT role::regrole FROM agentvm.team_member WHERE team_id = 'regress_three';

-- ---- who may do all this ----
SET ROLE regress_team_alice;
SELECT agentvm.create_team('regress_x');
RESET ROLE;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA agentvm TO regress_team_stranger;
SET ROLE regress_team_stranger;
SELECT public.regress_team_error(format('SELECT agentvm.%s', call)) FROM (VALUES
	($$create_team('regress_x')$$), ($$create_team(NULL)$$), ($$alter_team('regress_one')$$), ($$drop_team('regress_one')$$),
	($$add_member('regress_one', 'regress_team_stranger')$$), ($$remove_member('regress_one', 'regress_team_alice')$$)) AS v(call);
RESET ROLE;
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA agentvm FROM regress_team_stranger;
-- an application's SECURITY DEFINER function is a legitimate caller, also from a trigger
CREATE FUNCTION public.regress_team_signup() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
	PERFORM agentvm.create_team(NEW.id);
	PERFORM agentvm.add_member(NEW.id, 'regress_team_alice');
	RETURN NEW;
END
$$;
ALTER FUNCTION public.regress_team_signup() OWNER TO regress_team_admin;
CREATE TABLE public.regress_team_customer (id text);
CREATE TRIGGER signup BEFORE INSERT ON public.regress_team_customer FOR EACH ROW EXECUTE FUNCTION public.regress_team_signup();
GRANT INSERT ON public.regress_team_customer TO regress_team_stranger;
SET ROLE regress_team_stranger;
INSERT INTO public.regress_team_customer VALUES ('regress_signed_up');
INSERT INTO public.regress_team_customer VALUES ('regress_signed_up');
SELECT current_user, current_setting('search_path');
SET ROLE regress_team_alice;
SELECT team_id FROM agentvm.team ORDER BY 1;

-- ---- drop_team ----
RESET ROLE;
INSERT INTO agentvm.session (session_id, team_id, provider, next_check_at) VALUES
	('00000000-0000-7000-8000-00000000aaa1', 'regress_one', 'noop', NULL), ('00000000-0000-7000-8000-00000000aaa2', 'regress_one', 'noop', NULL);
SET ROLE regress_team_admin;
SELECT public.regress_team_error($$SELECT agentvm.drop_team('regress_one')$$);
RESET ROLE;
UPDATE agentvm.session SET state = 'terminating', end_reason = 'requested' WHERE team_id = 'regress_one';
UPDATE agentvm.session SET state = 'terminated', ended_at = now(), next_check_at = NULL WHERE session_id = '00000000-0000-7000-8000-00000000aaa1';
SET ROLE regress_team_admin;
SELECT public.regress_team_error($$SELECT agentvm.drop_team('regress_one')$$);
RESET ROLE;
UPDATE agentvm.session SET state = 'terminated', ended_at = now(), next_check_at = NULL WHERE session_id = '00000000-0000-7000-8000-00000000aaa2';
SET ROLE regress_team_admin;
SELECT agentvm.create_profile('regress_profile', 'noop', team_id => 'regress_one');
SELECT agentvm.set_provider('regress_one', 'noop', '{}');
SELECT agentvm.drop_team('regress_one');
SELECT public.regress_team_error(format('SELECT agentvm.%s', call)) FROM (VALUES
	($$drop_team('regress_one')$$), ($$drop_team(NULL)$$), ($$create_team('regress_one')$$)) AS v(call);
SELECT count(*) FROM agentvm.team_member WHERE team_id = 'regress_one';
SELECT count(*) FROM agentvm.profile WHERE team_id = 'regress_one';
SELECT team_id, dropped_at <= now() FROM agentvm.former_team WHERE team_id LIKE 'regress%';
-- a team without history may come again
SELECT agentvm.drop_team('regress_two');
SELECT agentvm.create_team('regress_two');

-- clean up
SELECT agentvm.drop_team(team_id) FROM agentvm.team WHERE team_id LIKE 'regress%';
RESET ROLE;
DELETE FROM agentvm.session WHERE team_id = 'regress_one';
DELETE FROM agentvm.former_team WHERE team_id = 'regress_one';
SET client_min_messages = warning;
DROP TABLE public.regress_team_customer;
DROP FUNCTION public.regress_team_signup(), public.regress_team_error(text);
REVOKE ALL ON SCHEMA agentvm FROM regress_team_stranger, regress_team_carol;
REVOKE ALL ON FUNCTION agentvm.visible_teams() FROM regress_team_carol;
DROP ROLE regress_team_admin, regress_team_monitor, regress_team_stranger, regress_team_alice, regress_team_group, regress_team_carol;
