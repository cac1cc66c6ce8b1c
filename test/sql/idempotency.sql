--
-- provision() with an idempotency key: the same arguments give the same session, others are refused
--
\set SHOW_CONTEXT never
\pset format unaligned
\pset tuples_only on
SET client_min_messages = warning;
CREATE ROLE regress_key_user IN ROLE agentvm_user;
RESET client_min_messages;
SELECT agentvm.create_team('regress_key', limits => '{"max_sessions": 2}');
SELECT agentvm.create_team('regress_key_b');
SELECT agentvm.add_member('regress_key', 'regress_key_user');
SELECT agentvm.create_profile('regress_key_profile', 'noop', '{"launch_delay": "1h"}');
SELECT agentvm.create_profile('regress_key_other', 'noop', '{"launch_delay": "1h"}');

SELECT agentvm.provision('regress_key', 'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour') AS id \gset
-- again, by the same and by another caller, in another order, with blanks, in other units
CREATE FUNCTION public.regress_key_again(arguments text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	id uuid;
BEGIN
	EXECUTE format('SELECT agentvm.provision(%s)', arguments) INTO id;
	RETURN id;
EXCEPTION WHEN OTHERS THEN
	RETURN concat_ws(' | ', SQLSTATE, SQLERRM);
END
$$;
SELECT public.regress_key_again(arguments) = :'id' FROM (VALUES
	($$'regress_key', 'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour'$$),
	($$'regress_key', 'coder', 'regress_key_profile', 'noop', 'k', '{"B":"2","A":"1"}', '[ { "ref" : "y", "url" : "x" } ]', '{"u": 2, "t": 1}', '{"fail_times": 1, "runtime": true}', '60 minutes'$$)) AS v(arguments);
SET ROLE regress_key_user;
SELECT agentvm.provision('regress_key', 'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour') = :'id';
RESET ROLE;
-- each argument counts
SELECT public.regress_key_again(format('''regress_key'', %s', arguments)) FROM (VALUES
	($$NULL, 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour'$$),
	($$'coder2', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour'$$),
	($$'coder', 'regress_key_other', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour'$$),
	($$'coder', 'regress_key_profile', NULL, 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour'$$),
	($$'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "3"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour'$$),
	($$'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "z"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour'$$),
	($$'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": "1", "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour'$$),
	($$'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 2}', '1 hour'$$),
	($$'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '61 minutes'$$),
	($$'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}'$$),
	($$idempotency_key => 'k'$$)) AS v(arguments);
-- what one argument loses the next does not win
SELECT agentvm.provision('regress_key_b', 'a', 'regress_key_profile', idempotency_key => 'borders') AS id2 \gset
SELECT public.regress_key_again($$'regress_key_b', NULL, 'regress_key_profile', idempotency_key => 'borders'$$);
-- a key is a team's own
SELECT agentvm.provision('regress_key_b', 'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour') = :'id';
-- the repeat asks for no more: neither room, nor the profile, nor a lifetime that is still allowed
SELECT count(agentvm.provision('regress_key', profile => 'regress_key_profile'));
SELECT public.regress_key_again($$'regress_key', profile => 'regress_key_profile'$$);
SELECT agentvm.alter_team('regress_key', limits => '{"max_lifetime": "10 minutes", "max_sessions": 0}');
SELECT agentvm.drop_profile('regress_key_profile');
SELECT agentvm.provision('regress_key', 'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour') = :'id';
-- also when the session has ended
SELECT agentvm.terminate(:'id');
SELECT agentvm.wait(:'id', 'terminated');
SELECT agentvm.provision('regress_key', 'coder', 'regress_key_profile', 'noop', 'k', '{"A": "1", "B": "2"}', '[{"url": "x", "ref": "y"}]', '{"t": 1, "u": 2}', '{"runtime": true, "fail_times": 1}', '1 hour') = :'id';
SELECT public.regress_key_again($$'regress_key', idempotency_key => 'k'$$);
-- twice in one transaction
BEGIN;
SELECT agentvm.provision('regress_key_b', idempotency_key => 'twice', options => '{"launch_delay": "1h"}') AS id3 \gset
SELECT agentvm.provision('regress_key_b', idempotency_key => 'twice', options => '{"launch_delay": "1h"}') = :'id3';
SELECT count(DISTINCT agentvm.provision('regress_key_b', idempotency_key => 'twice', options => '{"launch_delay": "1h"}')) FROM generate_series(1, 3);
COMMIT;
-- a row made by other tooling has no hash of arguments: nothing is the same as it
INSERT INTO agentvm.session (session_id, team_id, provider, idempotency_key, next_check_at) VALUES ('00000000-0000-7000-8000-00000000fff1', 'regress_key_b', 'noop', 'plain', NULL);
SELECT public.regress_key_again($$'regress_key_b', idempotency_key => 'plain'$$);
SELECT team_id, idempotency_key, count(*) FROM agentvm.session WHERE team_id LIKE 'regress_key%' GROUP BY 1, 2 ORDER BY 1, 2;

-- clean up
DELETE FROM agentvm.session WHERE session_id = '00000000-0000-7000-8000-00000000fff1';
SELECT count(*) FROM agentvm.session WHERE team_id LIKE 'regress_key%' AND agentvm.terminate(session_id);
SELECT DISTINCT agentvm.wait(session_id, 'terminated') FROM agentvm.session WHERE team_id LIKE 'regress_key%';
SELECT agentvm.drop_team(team_id) FROM agentvm.team WHERE team_id LIKE 'regress_key%';
SELECT agentvm.drop_profile('regress_key_other');
DELETE FROM agentvm.session WHERE team_id LIKE 'regress_key%';
DELETE FROM agentvm.session_token WHERE NOT EXISTS (SELECT FROM agentvm.session s WHERE s.session_id = session_token.session_id);
DELETE FROM agentvm.former_team WHERE team_id LIKE 'regress_key%';
DROP FUNCTION public.regress_key_again(text);
DROP ROLE regress_key_user;
