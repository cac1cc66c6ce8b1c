--
-- provision(): arguments, resolution, what is stored
--
\set SHOW_CONTEXT never
\pset format unaligned
\pset tuples_only on
SET client_min_messages = warning;
CREATE ROLE regress_provision_user IN ROLE agentvm_user;
CREATE ROLE regress_provision_stranger IN ROLE agentvm_user;
RESET client_min_messages;
-- what a call that must fail says, and that it has left nothing
CREATE FUNCTION public.regress_provision_error(arguments text) RETURNS text LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
	state text; message text; detail text; hint text; before bigint;
BEGIN
	SELECT count(*) INTO before FROM agentvm.sessions;
	BEGIN
		EXECUTE format('SELECT agentvm.provision(%s)', arguments);
		RETURN 'no error: ' || arguments;
	EXCEPTION WHEN OTHERS THEN
		GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
	END;
	IF (SELECT count(*) FROM agentvm.sessions) <> before THEN
		RETURN 'stored: ' || arguments;
	END IF;
	RETURN concat_ws(' | ', state, message, nullif(detail, ''), nullif(hint, ''));
END
$$;
-- the row of a session, without what differs each time; it is launched in an hour, so that no dispatcher changes it meanwhile
CREATE FUNCTION public.regress_provision_row(id uuid) RETURNS jsonb LANGUAGE sql AS $$
	SELECT jsonb_strip_nulls(to_jsonb(s)) - ARRAY['session_id', 'next_check_at', 'args_hash', 'payload_enc', 'created_at', 'deadline_at', 'ceiling_at', 'handle', 'lane', 'retries', 'attempt', 'running', 'detail']
		|| jsonb_build_object('lifetime', deadline_at - created_at, 'ceiling', ceiling_at - created_at)
	FROM agentvm.session s WHERE session_id = id
$$;
CREATE TEMP TABLE before AS SELECT (SELECT count(*) FROM agentvm.session) AS sessions, (SELECT count(*) FROM agentvm.session_event) AS events;

SELECT agentvm.create_team('regress_provision');
SELECT agentvm.create_team('regress_provision_b', 'noop', '{"min_lifetime": "10 minutes", "max_lifetime": "1 hour", "bootstrap_timeout": "70s", "heartbeat_timeout": "50s"}');
SELECT agentvm.create_team('regress_provision_ec2', 'ec2');
SELECT agentvm.add_member(team_id, 'regress_provision_user') FROM agentvm.team WHERE team_id LIKE 'regress_provision%';
SELECT agentvm.create_profile('regress_shape', 'noop', '{"launch_delay": "2h"}', NULL, 1, 512, 10);
SELECT agentvm.create_profile('regress_shape', 'noop', '{"launch_delay": "3h", "fail_times": 3}', 'regress_provision_b', 2, 1024, 20, true, '80s', '60s', '30 minutes');
SELECT agentvm.create_profile('regress_other', 'noop', team_id => 'regress_provision_b');
SELECT agentvm.create_profile('regress_long', 'noop', '{"launch_delay": "1h"}', max_lifetime => '20 hours');
SELECT agentvm.create_profile('regress_ec2', 'ec2');

-- ---- arguments ----
SET ROLE regress_provision_user;
-- ids
SELECT public.regress_provision_error(arguments) FROM (VALUES
	($$NULL$$), ($$''$$), ($$' a'$$), ($$'a '$$), ($$E'a\nb'$$), ($$E'a\x01'$$), ($$E'a\x7f'$$), ($$repeat('x', 129)$$),
	($$'regress_provision', ''$$), ($$'regress_provision', E'a\tb'$$), ($$'regress_provision', repeat('x', 129)$$),
	($$'regress_provision', profile => ''$$), ($$'regress_provision', profile => E'\r'$$), ($$'regress_provision', profile => repeat('x', 129)$$),
	($$'regress_provision', provider => ''$$), ($$'regress_provision', provider => E'no\nop'$$), ($$'regress_provision', provider => repeat('x', 129)$$),
	($$'regress_provision', idempotency_key => ''$$), ($$'regress_provision', idempotency_key => E'\x1b'$$), ($$'regress_provision', idempotency_key => repeat('x', 129)$$)) AS v(arguments);
-- teams, profiles, providers
SELECT public.regress_provision_error(arguments) FROM (VALUES
	($$'regress_nobody'$$), ($$'regress_provision', profile => 'regress_nothing'$$), ($$'regress_provision', profile => 'regress_other'$$),
	($$'regress_provision', profile => 'REGRESS_SHAPE'$$),
	($$'regress_provision', provider => 'nowhere'$$), ($$'regress_provision', provider => 'NOOP'$$),
	($$'regress_provision', profile => 'regress_shape', provider => 'ec2'$$), ($$'regress_provision', profile => 'regress_ec2', provider => 'noop'$$),
	($$'regress_provision', profile => 'regress_ec2'$$), ($$'regress_provision_ec2'$$)) AS v(arguments);
-- documents: their shape
SELECT public.regress_provision_error(format('''regress_provision'', %s', arguments)) FROM (VALUES
	($$env => '[]'$$), ($$env => '5'$$), ($$env => '"a"'$$), ($$env => 'null'$$), ($$env => '{"A": 1}'$$), ($$env => '{"A": null}'$$), ($$env => '{"A": true}'$$),
	($$env => '{"A": {"B": "c"}}'$$), ($$env => '{"A": []}'$$), ($$env => '{"": "x"}'$$), ($$env => '{"1A": "x"}'$$), ($$env => '{"A B": "x"}'$$), ($$env => '{"A=B": "x"}'$$), ($$env => '{"A;rm": "x"}'$$),
	($$repos => '{}'$$), ($$repos => '5'$$), ($$repos => 'null'$$), ($$repos => '["a"]'$$), ($$repos => '[[]]'$$), ($$repos => '[null]'$$), ($$repos => '[{}]'$$), ($$repos => '[{"url": ""}]'$$),
	($$repos => '[{"url": 5}]'$$), ($$repos => '[{"url": {}}]'$$), ($$repos => '[{"url": "a", "branch": "b"}]'$$), ($$repos => '[{"url": "a", "ref": null}]'$$), ($$repos => '[{"url": "a"}, {"ref": "a"}]'$$),
	($$repos => '[{"url": "a", "path": "/"}]'$$), ($$repos => '[{"url": "a", "path": "a"}, {"url": "a", "path": "///"}]'$$),
	($$tags => '[]'$$), ($$tags => '"a"'$$), ($$tags => 'null'$$), ($$tags => '{"a": {}}'$$), ($$tags => '{"a": [1]}'$$), ($$tags => '{"a": null}'$$),
	($$options => '[]'$$), ($$options => '1'$$), ($$options => 'null'$$)) AS v(arguments);
-- documents: their size as text, one by one
SELECT public.regress_provision_error(format('''regress_provision'', %s', arguments)) FROM (VALUES
	($$env => jsonb_build_object('A', repeat('x', 65536))$$), ($$repos => jsonb_build_array(jsonb_build_object('url', repeat('x', 65536)))$$),
	($$tags => jsonb_build_object('a', repeat('x', 65536))$$), ($$options => jsonb_build_object('fail', repeat('x', 65536))$$),
	($$env => jsonb_build_object('A', repeat('x', 65536 - 8))$$), ($$tags => jsonb_build_object('a', repeat(E'\n', 40000))$$),
	($$tags => (SELECT jsonb_object_agg('k' || i, i) FROM generate_series(1, 6000) i)$$), ($$tags => '{"a": 1e70000}'$$)) AS v(arguments);
-- 64 KiB are still fine
BEGIN;
SELECT agentvm.provision('regress_provision', tags => jsonb_build_object('a', repeat('x', 65536 - 9))) IS NOT NULL;
ROLLBACK;
-- options: unknown, not for callers, of the wrong kind
SELECT public.regress_provision_error(arguments) FROM (VALUES
	($$'regress_provision', options => '{"nothing": 1}'$$), ($$'regress_provision', options => '{"launch_delay": []}'$$), ($$'regress_provision', options => '{"launch_delay": "soon"}'$$),
	($$'regress_provision', options => '{"fail": "often"}'$$), ($$'regress_provision', options => '{"fail_times": "x"}'$$), ($$'regress_provision', options => '{"runtime": "yes"}'$$),
	($$'regress_provision_ec2', options => '{"region": "eu-west-1"}'$$), ($$'regress_provision_ec2', options => '{"subnet_ids": ["subnet-1"]}'$$),
	($$'regress_provision_ec2', options => '{"security_group_ids": ["sg-1"]}'$$), ($$'regress_provision_ec2', options => '{"instance_profile": "x"}'$$),
	($$'regress_provision_ec2', options => '{"role_arn": "x"}'$$)) AS v(arguments);
-- lifetimes
SELECT public.regress_provision_error(format('''regress_provision'', max_lifetime => %L', lifetime)) FROM (VALUES
	('0'), ('-1 hour'), ('0.5 s'), ('1 month -30 days'), ('178000000 years'), ('-178000000 years'), ('2147483647 days'), ('367 days'), ('1 year 2 days'), ('24:00:01'), ('1 day 1 second')) AS v(lifetime);
SELECT public.regress_provision_error(format('''regress_provision_b'', max_lifetime => %L', lifetime)) FROM (VALUES
	('1 hour 1 second'), ('9 minutes 59 seconds'), ('2 days')) AS v(lifetime);
-- the same words for a team that is not there and one that is another's
SET ROLE regress_provision_stranger;
SELECT public.regress_provision_error($$'regress_provision'$$) = replace(public.regress_provision_error($$'regress_nobody'$$), 'regress_nobody', 'regress_provision');
SELECT public.regress_provision_error($$'regress_provision', profile => 'regress_nothing'$$);
SELECT public.regress_provision_error($$'regress_provision_b', profile => 'regress_other', provider => 'ec2', options => '{"nothing": 1}', max_lifetime => '20 days'$$);
RESET ROLE;
-- nothing is stored by all that
SELECT (SELECT count(*) FROM agentvm.session) - sessions, (SELECT count(*) FROM agentvm.session_event) - events FROM before;

-- ---- what is stored ----
SET ROLE regress_provision_user;
SELECT agentvm.provision('regress_provision', options => '{"launch_delay": "1h"}') AS plain \gset
SELECT agentvm.provision('regress_provision', 'coder', 'regress_shape', 'noop', 'key 1', '{"A_1": "x"}', '[{"url": "https://example.com/a.git", "ref": "main", "path": "a"}]',
	'{"purpose": "test", "n": 1, "b": true}', '{"launch_delay": "1h", "runtime": true}', '24 hours') AS full \gset
SELECT agentvm.provision('regress_provision', NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{"launch_delay": "1h"}', NULL) AS nulls \gset
RESET ROLE;
SELECT public.regress_provision_row(:'plain');
SELECT public.regress_provision_row(:'full');
SELECT public.regress_provision_row(:'nulls') = public.regress_provision_row(:'plain');
SELECT kind, old_state, new_state, reason, detail FROM agentvm.session_event WHERE session_id = :'plain' AND kind = 'state';
-- env and repos are encrypted, and kept nowhere else
SELECT payload_enc IS NOT NULL, key_id FROM agentvm.session WHERE session_id = :'full';
SELECT s::text ~ 'A_1|example.com' FROM agentvm.session s WHERE session_id = :'full';
SELECT count(*) FROM agentvm.session WHERE position('example.com'::bytea IN payload_enc) > 0;
-- without a runtime nobody would ever get them: they are not kept
SELECT agentvm.provision('regress_provision', env => '{"A": "x"}', options => '{"launch_delay": "1h"}') AS ignored \gset
SELECT payload_enc IS NULL, key_id IS NULL FROM agentvm.session WHERE session_id = :'ignored';

-- ---- resolution: argument, profile, team, server; a team's own profile before that for all ----
SELECT agentvm.provision('regress_provision', profile => 'regress_shape') AS id \gset
SELECT public.regress_provision_row(:'id');
SELECT agentvm.provision('regress_provision_b', profile => 'regress_shape') AS id \gset
SELECT public.regress_provision_row(:'id');
SELECT agentvm.provision('regress_provision_b', profile => 'regress_shape', options => '{"runtime": false, "launch_delay": "1h"}', max_lifetime => '10 minutes') AS id \gset
SELECT public.regress_provision_row(:'id');
SELECT agentvm.provision('regress_provision_b', options => '{"launch_delay": "1h"}') AS id \gset
SELECT public.regress_provision_row(:'id');
SELECT agentvm.provision('regress_provision_ec2', provider => 'noop', options => '{"launch_delay": "1h"}') AS id \gset
SELECT public.regress_provision_row(:'id') ->> 'provider';
SELECT agentvm.provision('regress_provision_ec2', profile => 'regress_shape') AS id \gset
SELECT public.regress_provision_row(:'id') ->> 'provider';
-- a profile's lifetime gives way to the team's; the minimum lifts what nobody asked for
SELECT agentvm.provision('regress_provision', profile => 'regress_long') AS id \gset
SELECT public.regress_provision_row(:'id') -> 'lifetime';
SELECT agentvm.provision('regress_provision_b', profile => 'regress_long') AS id \gset
SELECT public.regress_provision_row(:'id') -> 'lifetime';
SELECT agentvm.alter_team('regress_provision_b', limits => '{"min_lifetime": "45 minutes"}');
SELECT agentvm.provision('regress_provision_b', profile => 'regress_shape') AS id \gset
SELECT public.regress_provision_row(:'id') -> 'lifetime';
-- a team's options below the profile's, below the caller's
SELECT agentvm.set_provider('regress_provision', 'noop', '{"launch_delay": "4h", "terminate_delay": "1ms", "fail_times": 9}');
SELECT agentvm.create_profile('regress_layer', 'noop', '{"launch_delay": "5h", "fail_times": 8}');
SELECT agentvm.provision('regress_provision', profile => 'regress_layer', options => '{"fail_times": 7}') AS id \gset
SELECT public.regress_provision_row(:'id') -> 'options';

-- ---- ids: version 7, in order of time ----
CREATE TEMP TABLE made (n serial, id uuid);
DO $$
BEGIN
	FOR i IN 1..50 LOOP
		INSERT INTO made (id) SELECT agentvm.provision('regress_provision');
		PERFORM pg_catalog.clock_timestamp() FROM generate_series(1, 100);
	END LOOP;
END
$$;
SELECT count(DISTINCT id), bool_and(id::text ~ '^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$') FROM made;
SELECT array_agg(n ORDER BY id) = array_agg(n ORDER BY n) FROM made;
SELECT bool_and(('x' || translate(left(id::text, 13), '-', ''))::bit(48)::bigint = floor(extract(epoch FROM s.created_at) * 1000)) FROM made JOIN agentvm.session s ON s.session_id = id;

-- ---- a rollback leaves nothing, of the whole or of a part ----
CREATE TEMP TABLE rolled AS SELECT (SELECT count(*) FROM agentvm.session) AS sessions;
BEGIN;
SELECT agentvm.provision('regress_provision', idempotency_key => 'rolled') AS rolled \gset
ROLLBACK;
SELECT count(*) FROM agentvm.session WHERE session_id = :'rolled';
SELECT count(*) FROM agentvm.session_event WHERE session_id = :'rolled';
BEGIN;
SAVEPOINT a;
SELECT agentvm.provision('regress_provision', idempotency_key => 'rolled') AS rolled \gset
ROLLBACK TO a;
SELECT agentvm.provision('regress_provision', idempotency_key => 'rolled', options => '{"launch_delay": "1h"}') AS kept \gset
COMMIT;
SELECT count(*) FROM agentvm.session WHERE session_id = :'rolled';
SELECT (SELECT count(*) FROM agentvm.session) - sessions FROM rolled;

-- clean up
SELECT count(*) FILTER (WHERE agentvm.terminate(session_id)) = count(*) FROM agentvm.session WHERE team_id LIKE 'regress_provision%' AND ended_at IS NULL AND state <> 'terminating';
SELECT DISTINCT agentvm.wait(session_id, 'terminated') FROM agentvm.session WHERE team_id LIKE 'regress_provision%';
SELECT agentvm.drop_team(team_id) FROM agentvm.team WHERE team_id LIKE 'regress_provision%';
SELECT agentvm.drop_profile(name) FROM agentvm.profile WHERE name LIKE 'regress_%';
DELETE FROM agentvm.session WHERE team_id LIKE 'regress_provision%';
DELETE FROM agentvm.session_token WHERE NOT EXISTS (SELECT FROM agentvm.session s WHERE s.session_id = session_token.session_id);
DELETE FROM agentvm.former_team WHERE team_id LIKE 'regress_provision%';
SELECT count(*) FROM agentvm.session_token;
SELECT count(*) FROM agentvm.session_heartbeat;
DROP FUNCTION public.regress_provision_error(text), public.regress_provision_row(uuid);
DROP ROLE regress_provision_user, regress_provision_stranger;
