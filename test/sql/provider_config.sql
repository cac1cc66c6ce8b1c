--
-- A team's options and credentials for a provider; profiles
--
\set SHOW_CONTEXT never
\pset format unaligned
\pset tuples_only on
SET client_min_messages = warning;
CREATE ROLE regress_config_admin IN ROLE agentvm_admin;
CREATE ROLE regress_config_other IN ROLE agentvm_admin;
CREATE ROLE regress_config_member IN ROLE agentvm_user;
CREATE ROLE regress_config_stranger IN ROLE agentvm_user;
RESET client_min_messages;

-- what a statement that must fail says
CREATE FUNCTION public.regress_config_error(command text) RETURNS text LANGUAGE plpgsql AS $$
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
-- the stored secrets, as far as they can be told
CREATE FUNCTION public.regress_config_secrets(team text) RETURNS SETOF text LANGUAGE sql AS $$
	SELECT concat_ws(' ', provider, field, octet_length(value_enc) > 60, updated_by, position('EXAMPLE'::bytea IN value_enc))
	FROM agentvm.provider_secret WHERE team_id = team ORDER BY provider, field
$$;

SET ROLE regress_config_admin;
SELECT agentvm.create_team('regress_config');
SELECT agentvm.create_team('regress_config_b');
SELECT agentvm.add_member('regress_config', 'regress_config_member');
SELECT agentvm.add_member('regress_config_b', 'regress_config_stranger');

-- ---- set_provider: options are replaced as a whole ----
SELECT agentvm.set_provider('regress_config', 'noop', '{"launch_delay": "1s", "fail_times": 2}');
SET ROLE regress_config_other;
SELECT agentvm.set_provider('regress_config', 'noop', '{"runtime": false}', '{}');
SELECT provider, options, created_by, updated_by, updated_at > created_at FROM agentvm.provider_config WHERE team_id = 'regress_config';
SET ROLE regress_config_admin;
SELECT public.regress_config_error(format('SELECT agentvm.set_provider(%s)', arguments)) FROM (VALUES
	($$NULL, 'noop', '{}'$$), ($$'regress_config', NULL, '{}'$$), ($$'regress_config', 'noop', NULL$$),
	($$'nobody', 'noop', '{}'$$), ($$E'a\tb', 'noop', '{}'$$), ($$'regress_config', 'nowhere', '{}'$$),
	($$'regress_config', 'noop', '[]'$$), ($$'regress_config', 'noop', '5'$$), ($$'regress_config', 'noop', '{"delay": 1}'$$),
	($$'regress_config', 'noop', '{"fail": "often"}'$$), ($$'regress_config', 'noop', '{"launch_delay": true}'$$),
	($$'regress_config', 'noop', jsonb_build_object('fail', repeat('x', 70000))$$),
	($$'regress_config', 'noop', '{}', '[]'$$), ($$'regress_config', 'noop', '{}', 'null'$$), ($$'regress_config', 'noop', '{}', '"EXAMPLE"'$$),
	($$'regress_config', 'noop', '{}', '{"password": "EXAMPLE"}'$$)) AS v(arguments);

-- ---- secrets: write-only, one by one ----
SELECT agentvm.set_provider('regress_config', 'ec2', '{"region": "eu-west-1"}',
	'{"access_key_id": "AKIAEXAMPLE", "secret_access_key": "EXAMPLEKEY\"\\", "session_token": "EXAMPLETOKEN"}');
RESET ROLE;
SELECT public.regress_config_secrets('regress_config');
CREATE TEMP TABLE before AS SELECT field, value_enc FROM agentvm.provider_secret WHERE team_id = 'regress_config';
-- NULL leaves all, a field leaves the others, a JSON null deletes, also what is not there
SET ROLE regress_config_other;
SELECT agentvm.set_provider('regress_config', 'ec2', '{}');
SELECT agentvm.set_provider('regress_config', 'ec2', '{"region": "eu-west-2"}', '{"secret_access_key": "OTHEREXAMPLE", "session_token": null}');
SELECT agentvm.set_provider('regress_config', 'ec2', '{"region": "eu-west-2"}', '{"session_token": null}');
RESET ROLE;
SELECT public.regress_config_secrets('regress_config');
SELECT field, n.value_enc = b.value_enc FROM agentvm.provider_secret n JOIN before b USING (field) WHERE team_id = 'regress_config' ORDER BY field;
SET ROLE regress_config_admin;
SELECT public.regress_config_error(format('SELECT agentvm.set_provider(''regress_config'', ''ec2'', ''{}'', %s)', secrets)) FROM (VALUES
	($$'{"access_key": "EXAMPLE"}'$$), ($$'{"access_key_id": ""}'$$), ($$'{"access_key_id": 5}'$$), ($$'{"access_key_id": true}'$$),
	($$'{"access_key_id": ["EXAMPLE"]}'$$), ($$'{"access_key_id": {"a": "EXAMPLE"}}'$$), ($$'{"access_key_id": "EXAMPLE\n"}'$$),
	($$'{"access_key_id": "EXAMPLE\u007f"}'$$), ($$jsonb_build_object('access_key_id', repeat('EXAMPLE', 600))$$),
	($$'{"access_key_id": "EXAMPLE", "secret_access_key": 1}'$$)) AS v(secrets);
SELECT public.regress_config_error($$SELECT agentvm.set_provider('nobody', 'ec2', '{}', '{"access_key_id": "EXAMPLE"}')$$);
SELECT agentvm.set_provider('regress_config_b', 'ec2', '{}', jsonb_build_object('access_key_id', repeat('x', 4096)));
-- a region becomes a host name that gets signatures
SELECT region, left(public.regress_config_error(format('SELECT agentvm.set_provider(''regress_config_b'', ''ec2'', jsonb_build_object(''region'', %L))', region)), 9) FROM (VALUES
	('us-east-1'), ('us-gov-west-1'), ('ap-southeast-12'), (''), ('us'), ('us-1'), ('us-east'), ('us-east-'), ('us-east1'), ('u-east-1'), ('usa-east-1'), ('us--1'), ('us-east--1'), ('US-EAST-1'), ('us-East-1'), ('us-east-1a'), ('us-east-1-a'),
	('us-east-1.'), ('us-east-1.evil.example'), ('evil.example'), ('evil.example/us-east-1'), ('us-east-1/'), ('us-east-1@evil.example'), ('us-east-1:443'), ('us-east-1#'), ('us-east-1?'), ('us-east-1%2e'), ('us-east-1 '), (' us-east-1'), (E'us-east-1\n'),
	('us-' || repeat('e', 200) || '-1')) AS v(region);
SELECT public.regress_config_error($$SELECT agentvm.set_provider('regress_config_b', 'ec2', '{"endpoint": "https://evil.example"}')$$);
-- an error has changed nothing
SELECT options FROM agentvm.provider_config WHERE team_id = 'regress_config' AND provider = 'ec2';
RESET ROLE;
SELECT public.regress_config_secrets('regress_config');
SELECT field, n.value_enc = b.value_enc FROM agentvm.provider_secret n JOIN before b USING (field) WHERE team_id = 'regress_config' ORDER BY field;
DROP TABLE before;

-- ---- who may see and do what ----
SET ROLE regress_config_admin;
SELECT count(*) FROM agentvm.provider_secret;
SET ROLE regress_config_member;
SELECT count(*) FROM agentvm.provider_secret;
SELECT team_id, provider, options FROM agentvm.provider_config ORDER BY team_id, provider;
SELECT agentvm.set_provider('regress_config', 'noop', '{}');
SET ROLE regress_config_stranger;
SELECT team_id, provider, options FROM agentvm.provider_config ORDER BY team_id, provider;
RESET ROLE;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA agentvm TO regress_config_stranger;
SET ROLE regress_config_stranger;
SELECT public.regress_config_error(format('SELECT agentvm.%s', call)) FROM (VALUES
	($$set_provider('regress_config_b', 'noop', '{}')$$), ($$drop_provider('regress_config_b', 'ec2')$$),
	($$create_profile('regress_small', 'noop')$$), ($$drop_profile('regress_small')$$)) AS v(call);
RESET ROLE;
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA agentvm FROM regress_config_stranger;

-- ---- drop_provider ----
INSERT INTO agentvm.session (session_id, team_id, provider, next_check_at) VALUES ('00000000-0000-7000-8000-00000000bbb1', 'regress_config', 'noop', NULL);
SET ROLE regress_config_admin;
SELECT public.regress_config_error(format('SELECT agentvm.drop_provider(%s)', arguments)) FROM (VALUES
	($$'regress_config', 'noop'$$), ($$NULL, 'noop'$$), ($$'regress_config', NULL$$), ($$'nobody', 'noop'$$),
	($$'regress_config_b', 'noop'$$), ($$'regress_config', 'nowhere'$$)) AS v(arguments);
SELECT agentvm.drop_provider('regress_config', 'ec2');
RESET ROLE;
SELECT public.regress_config_secrets('regress_config');
DELETE FROM agentvm.session WHERE team_id = 'regress_config';
SET ROLE regress_config_admin;
SELECT agentvm.drop_provider('regress_config', 'noop');
SELECT count(*) FROM agentvm.provider_config WHERE team_id = 'regress_config';

-- ---- profiles ----
SELECT agentvm.create_profile('regress_small', 'noop');
SELECT agentvm.create_profile('regress_small', 'noop', NULL, 'regress_config');
SELECT agentvm.create_profile('regress_large', 'noop', '{"launch_delay": "1s"}', 'regress_config', 1024, 16777216, 65536, true, '1 minute', '2 minutes', '1 day');
SELECT agentvm.create_profile('regress_hidden', 'noop', team_id => 'regress_config_b', vcpus => 1, memory_mib => 64, disk_gib => 1, runtime => false);
SELECT to_jsonb(p) - 'created_at' - 'updated_at' FROM agentvm.profile p WHERE name LIKE 'regress%' ORDER BY name COLLATE "C", team_id NULLS FIRST;
SELECT public.regress_config_error(format('SELECT agentvm.create_profile(%s)', arguments)) FROM (VALUES
	($$'regress_small', 'noop'$$), ($$'regress_small', 'noop', team_id => 'regress_config'$$), ($$NULL, 'noop'$$), ($$'p', NULL$$), ($$'', 'noop'$$),
	($$E'p\x01', 'noop'$$), ($$'p', 'nowhere'$$), ($$'p', 'noop', team_id => 'nobody'$$), ($$'p', 'noop', team_id => ' '$$),
	($$'p', 'noop', '[]'$$), ($$'p', 'noop', '{"size": 1}'$$), ($$'p', 'noop', '{"fail_times": 0}'$$),
	($$'p', 'noop', vcpus => 0$$), ($$'p', 'noop', vcpus => 1025$$), ($$'p', 'noop', memory_mib => 63$$), ($$'p', 'noop', memory_mib => 16777217$$),
	($$'p', 'noop', disk_gib => -1$$), ($$'p', 'noop', disk_gib => 65537$$), ($$'p', 'noop', bootstrap_timeout => '0'$$),
	($$'p', 'noop', heartbeat_timeout => '-1 second'$$), ($$'p', 'noop', max_lifetime => '100 years'$$), ($$'p', 'noop', max_lifetime => '2 days'$$)) AS v(arguments);
-- members see those for all and their own
SET ROLE regress_config_member;
SELECT name, team_id FROM agentvm.profile WHERE name LIKE 'regress%' ORDER BY name COLLATE "C", team_id NULLS FIRST;
SET ROLE regress_config_admin;
SELECT agentvm.drop_profile('regress_small');
SELECT public.regress_config_error(format('SELECT agentvm.drop_profile(%s)', arguments)) FROM (VALUES
	($$'regress_small'$$), ($$NULL$$), ($$'regress_large'$$), ($$'regress_large', 'regress_config_b'$$), ($$'regress_large', 'nobody'$$)) AS v(arguments);
SELECT agentvm.drop_profile('regress_small', 'regress_config');
SELECT name, team_id FROM agentvm.profile WHERE name LIKE 'regress%' ORDER BY name COLLATE "C";

-- clean up
SELECT agentvm.drop_team('regress_config');
SELECT agentvm.drop_team('regress_config_b');
SELECT count(*) FROM agentvm.profile WHERE name LIKE 'regress%';
RESET ROLE;
SELECT count(*) FROM agentvm.provider_secret WHERE team_id LIKE 'regress%';
DROP FUNCTION public.regress_config_error(text), public.regress_config_secrets(text);
DROP ROLE regress_config_admin, regress_config_other, regress_config_member, regress_config_stranger;
