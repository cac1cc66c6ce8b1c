-- Commands and files: what is refused before anything is sent anywhere
SELECT agentvm.create_team('exec_team');
CREATE FUNCTION pg_temp.try(statement text, OUT result text) LANGUAGE plpgsql AS $$
DECLARE
	d text; h text;
BEGIN
	EXECUTE statement INTO result;
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS d = PG_EXCEPTION_DETAIL, h = PG_EXCEPTION_HINT;
	result := concat_ws(' | ', SQLSTATE, SQLERRM, nullif(d, ''), nullif(h, ''));
END
$$;
\set nobody_text '\'01234567-89ab-7def-8123-456789abcdef\''

-- nulls
SELECT call, pg_temp.try('SELECT agentvm.' || call) FROM unnest(ARRAY[
	$$exec(NULL, 'true')$$, $$exec(:nobody, NULL)$$, $$exec(:nobody, 'true', NULL)$$, $$exec_bytes(NULL, 'true')$$, $$exec_start(NULL, 'true')$$,
	$$exec_output(NULL, :nobody)$$, $$exec_output(:nobody, NULL)$$, $$exec_output(:nobody, :nobody, NULL)$$, $$exec_output(:nobody, :nobody, 0, NULL)$$,
	$$exec_wait(NULL, :nobody)$$, $$exec_wait(:nobody, NULL)$$, $$exec_wait(:nobody, :nobody, NULL)$$,
	$$exec_kill(NULL, :nobody)$$, $$exec_kill(:nobody, NULL)$$, $$exec_kill(:nobody, :nobody, NULL)$$, $$exec_many(NULL, 'true')$$,
	$$upload(NULL, 'f', '')$$, $$upload(:nobody, NULL, '')$$, $$upload(:nobody, 'f', NULL)$$, $$upload(:nobody, 'f', '', NULL)$$,
	$$download(NULL, 'f')$$, $$download(:nobody, NULL)$$, $$download(:nobody, 'f', NULL, 1)$$, $$download(:nobody, 'f', 1, NULL)$$,
	$$upload_tar(NULL, '/f', '')$$, $$upload_tar(:nobody, NULL, '')$$, $$upload_tar(:nobody, '/f', NULL)$$, $$download_tar(NULL, '/f')$$, $$download_tar(:nobody, NULL)$$
	]) WITH ORDINALITY AS u (named, n), LATERAL replace(named, ':nobody', $$'01234567-89ab-7def-8123-456789abcdef'$$) AS call ORDER BY n;

-- values
SELECT left(call, 70) AS call, pg_temp.try('SELECT agentvm.' || replace(call, 'ID', :nobody_text)) FROM unnest(ARRAY[
	$$exec('ID', '')$$, $$exec('ID', repeat('x', 122881))$$, $$exec('ID', 'true', '0')$$, $$exec('ID', 'true', '-1 s')$$, $$exec('ID', 'true', '400 days')$$,
	$$exec('ID', 'true', cwd => '')$$, $$exec('ID', 'true', cwd => repeat('/x', 3000))$$,
	$$exec('ID', 'true', env => '[]')$$, $$exec('ID', 'true', env => '"x"')$$, $$exec('ID', 'true', env => '{"1A": "x"}')$$, $$exec('ID', 'true', env => '{"A=": "x"}')$$, $$exec('ID', 'true', env => '{"A": 1}')$$,
	$$exec('ID', 'true', env => jsonb_build_object('A', repeat('x', 70000)))$$,
	$$exec_many('{}', '')$$, $$exec_many(array_fill('ID'::uuid, ARRAY[1001]), 'true')$$,
	$$exec_output('ID', 'ID', -1)$$, $$exec_output('ID', 'ID', 0, 9223372036854775807)$$, $$exec_wait('ID', 'ID', '0')$$,
	$$exec_kill('ID', 'ID', 'HUP')$$, $$exec_kill('ID', 'ID', 'SIG')$$, $$exec_kill('ID', 'ID', '9')$$,
	$$upload('ID', '', '')$$, $$upload('ID', repeat('x', 4096), '')$$, $$upload('ID', 'f', '', '')$$, $$upload('ID', 'f', '', '0888')$$, $$upload('ID', 'f', '', '10000')$$, $$upload('ID', 'f', '', 'rw')$$,
	$$download('ID', '')$$, $$download('ID', 'f', -1, 1)$$, $$download('ID', 'f', 1, -1)$$, $$download('ID', 'f', 1, 268435457)$$,
	$$upload_tar('ID', 'f', '')$$, $$download_tar('ID', 'f')$$
	]) WITH ORDINALITY AS u (call, n) ORDER BY n;

-- no such session, whatever is asked of it
SELECT call, pg_temp.try('SELECT agentvm.' || replace(call, 'ID', :nobody_text)) FROM unnest(ARRAY[
	$$exec('ID', 'true')$$, $$exec('ID', 'true', env => '{"A": "b"}')$$, $$exec_bytes('ID', 'true')$$, $$exec_start('ID', 'true')$$, $$exec_output('ID', 'ID')$$, $$exec_wait('ID', 'ID')$$, $$exec_kill('ID', 'ID')$$,
	$$upload('ID', 'f', '')$$, $$download('ID', 'f')$$, $$download('ID', 'f', 0, 1)$$, $$upload_tar('ID', '/f', '')$$, $$download_tar('ID', '/f')$$
	]) WITH ORDINALITY AS u (call, n) ORDER BY n;
SELECT session_id, exit_code, stdout, duration, sqlstate, error FROM agentvm.exec_many(ARRAY[:nobody_text, NULL]::uuid[], 'true') ORDER BY sqlstate;
SELECT count(*) FROM agentvm.exec_many('{}', 'true');

-- sessions that take no commands
SELECT agentvm.provision('exec_team') AS plain \gset
CALL agentvm.await(:'plain');
SELECT replace(pg_temp.try(format('SELECT agentvm.exec(%L, ''true'')', :'plain')), :'plain', 'ID');
SELECT agentvm.terminate(:'plain');
CALL agentvm.await(:'plain', 'terminated');
SELECT replace(pg_temp.try(format('SELECT agentvm.exec(%L, ''true'')', :'plain')), :'plain', 'ID');

-- run(): arguments, and where it may not be
CALL agentvm.run('exec_team', NULL);
CALL agentvm.run('exec_team', '');
CALL agentvm.run('exec_team', 'true', timeout => '0');
CALL agentvm.run(NULL, 'true');
CALL agentvm.run('nobody', 'true');
CALL agentvm.run('exec_team', 'true', 'nothing');
CALL agentvm.run('exec_team', 'true');
BEGIN;
CALL agentvm.run('exec_team', 'true');
ROLLBACK;
SELECT count(*) FROM agentvm.session WHERE team_id = 'exec_team';
SELECT agentvm.drop_team('exec_team');
