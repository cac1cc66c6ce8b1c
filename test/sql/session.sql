--
-- Functions on one session; the state machine, the log and the checks that the database holds
--
\set SHOW_CONTEXT never
\pset format unaligned
\pset tuples_only on
SET client_min_messages = warning;
CREATE ROLE regress_session_user IN ROLE agentvm_user;
CREATE ROLE regress_session_stranger IN ROLE agentvm_user;
RESET client_min_messages;
CREATE FUNCTION public.regress_session_error(command text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	state text; message text; detail text; hint text;
BEGIN
	EXECUTE command;
	RETURN 'no error: ' || command;
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
	RETURN regexp_replace(concat_ws(' | ', state, message, nullif(detail, ''), nullif(hint, '')), '[0-9a-f]{8}-[0-9a-f-]{27}', 'UUID', 'g');
END
$$;
SELECT agentvm.create_team('regress_session');
SELECT agentvm.create_team('regress_session_b');
SELECT agentvm.add_member('regress_session', 'regress_session_user');
SELECT agentvm.add_member('regress_session_b', 'regress_session_stranger');

-- ---- the life of a session ----
SET ROLE regress_session_user;
SELECT agentvm.provision('regress_session', 'coder', tags => '{"a": 1}', idempotency_key => 'k') AS id \gset
SELECT agentvm.wait(:'id');
SELECT agentvm.status(:'id') = s FROM agentvm.sessions s WHERE session_id = :'id';
SELECT team_id, agent_id, provider, profile, state, end_reason, vm_id = 'noop-' || session_id, region, purchase, attempt, launched_at >= created_at, ready_at >= launched_at,
	last_heartbeat_at, deadline_at - created_at, ended_at, tags, idempotency_key, created_by FROM agentvm.status(:'id');
SELECT agentvm.inspect(:'id') ->> 'state';
SELECT agentvm.terminate(:'id', 'no more work');
SELECT agentvm.terminate(:'id', 'said twice');
SELECT agentvm.wait(:'id', 'terminated');
SELECT agentvm.terminate(:'id');
SELECT state, end_reason, detail, ended_at >= ready_at FROM agentvm.status(:'id');
SELECT old_state, new_state, reason, detail FROM agentvm.session_event WHERE session_id = :'id' AND kind = 'state' ORDER BY event_id;
-- ended: next_check_at is NULL, no lease is left
RESET ROLE;
SELECT next_check_at, lease, lease_pid FROM agentvm.session WHERE session_id = :'id';
SET ROLE regress_session_user;

-- terminate(): the reason
SELECT agentvm.provision('regress_session', options => '{"launch_delay": "1h"}') AS id2 \gset
SELECT public.regress_session_error(format('SELECT agentvm.terminate(%L, %s)', :'id2', reason)) FROM (VALUES ($$E'a\nb'$$), ($$E'\x7f'$$), ($$repeat('x', 501)$$)) AS v(reason);
SELECT state, detail FROM agentvm.status(:'id2');
SELECT agentvm.terminate(:'id2', NULL);
SELECT agentvm.wait(:'id2', 'terminated');
SELECT state, end_reason, detail FROM agentvm.status(:'id2');
SELECT agentvm.provision('regress_session', options => '{"launch_delay": "1h"}') AS id2 \gset
SELECT agentvm.terminate(:'id2', repeat('x', 500));
SELECT agentvm.wait(:'id2', 'terminated');
SELECT end_reason, length(detail) FROM agentvm.status(:'id2');

-- a rolled back terminate() has not happened
SELECT agentvm.provision('regress_session', options => '{"launch_delay": "1h"}', max_lifetime => '1 hour') AS live \gset
BEGIN;
SELECT agentvm.terminate(:'live');
SELECT state FROM agentvm.status(:'live');
ROLLBACK;
SELECT state, end_reason FROM agentvm.status(:'live');

-- ---- no such session, and another team's: the same words ----
SET ROLE regress_session_stranger;
SELECT public.regress_session_error(format('SELECT %s', replace(call, '?', quote_literal(:'live')))) AS another_team,
	public.regress_session_error(format('SELECT %s', replace(call, '?', quote_literal(:'live')))) = public.regress_session_error(format('SELECT %s', replace(call, '?', '''00000000-0000-7000-8000-000000000000''')))
FROM (VALUES ('agentvm.terminate(?)'), ('agentvm.status(?)'), ('agentvm.inspect(?)'), ('agentvm.wait(?)'), ($$agentvm.wait(?, 'terminated', '1 day')$$), ($$agentvm.extend(?, '1 minute')$$)) AS v(call);
-- neither do the arguments tell
SELECT public.regress_session_error(format('SELECT agentvm.extend(%L, ''20 days'')', :'live'));
SELECT count(*) FROM agentvm.sessions;
SET ROLE regress_session_user;
SELECT public.regress_session_error(format('SELECT %s', call)) FROM (VALUES ('agentvm.terminate(NULL)'), ('agentvm.status(NULL)'), ('agentvm.inspect(NULL)'), ('agentvm.wait(NULL)'), ($$agentvm.extend(NULL, '1 minute')$$)) AS v(call);

-- ---- extend() ----
SELECT public.regress_session_error(format('SELECT agentvm.extend(%L, %s)', :'live', by)) FROM (VALUES ('NULL'), ($$'0'$$), ($$'-1 second'$$), ($$'0.9 seconds'$$), ($$'178000000 years'$$)) AS v(by);
SELECT agentvm.extend(:'live', '30 minutes') - created_at FROM agentvm.status(:'live');
SELECT deadline_at - created_at FROM agentvm.status(:'live');
SELECT left(public.regress_session_error(format('SELECT agentvm.extend(%L, ''22:30:01'')', :'live')), 68);
SELECT agentvm.extend(:'live', '22:30:00') - created_at FROM agentvm.status(:'live');
SELECT left(public.regress_session_error(format('SELECT agentvm.extend(%L, ''1 s'')', :'live')), 68);
SELECT deadline_at - created_at FROM agentvm.status(:'live');
SELECT public.regress_session_error(format('SELECT agentvm.extend(%L, ''1 minute'')', :'id'));

-- ---- wait() ----
SELECT public.regress_session_error(format('SELECT agentvm.wait(%L, %s)', :'live', arguments)) FROM (VALUES
	('NULL'), ($$'ready', NULL$$), ($$''$$), ($$'READY'$$), ($$'provisioning'$$), ($$'pausing'$$), ($$'resuming'$$), ($$'gone'$$),
	($$'ready', '0'$$), ($$'ready', '-5 seconds'$$), ($$'ready', '100 years'$$), ($$'ready', '367 days'$$)) AS v(arguments);
SELECT public.regress_session_error(format('SELECT agentvm.wait(%L, %s)', :'live', $$'ready', '1 second'$$));
-- the reason of the end, with its code; the end itself can be waited for
SELECT public.regress_session_error(format('SELECT agentvm.wait(%L)', :'id'));
SELECT agentvm.wait(:'id', until, '1 second') FROM unnest('{terminating, terminated, failed}'::text[]) until;
SELECT agentvm.provision('regress_session', options => jsonb_build_object('fail', fail)) AS id INTO TEMP failing FROM unnest('{credentials, capacity, quota, permanent, lost}'::text[]) fail;
SELECT DISTINCT agentvm.wait(id, 'failed') FROM failing;
SELECT public.regress_session_error(format('SELECT agentvm.wait(%L)', id)) FROM failing;
SELECT state, end_reason FROM failing, LATERAL agentvm.status(id);
-- it can never be over within the transaction that provisions, changes or ends the session
BEGIN;
SELECT agentvm.provision('regress_session') AS id2 \gset
SAVEPOINT a;
SELECT public.regress_session_error(format('SELECT agentvm.wait(%L)', :'id2'));
SELECT agentvm.terminate(:'live');
SELECT public.regress_session_error(format('SELECT agentvm.wait(%L, ''terminated'')', :'live'));
SELECT agentvm.wait(:'live', 'terminating');
ROLLBACK TO a;
SELECT public.regress_session_error(format('SELECT agentvm.wait(%L)', :'id2'));
ROLLBACK;
SELECT public.regress_session_error(format('SELECT agentvm.wait(%L)', :'id2'));
-- it sees the latest state, also where the snapshot is older
SELECT agentvm.provision('regress_session', options => '{"launch_delay": "0.5s"}') AS id4 \gset
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT count(*) FROM agentvm.sessions WHERE team_id = 'regress_session_b';
SELECT agentvm.wait(:'id4');
COMMIT;

-- ---- await() ----
SELECT agentvm.provision('regress_session') AS id3 \gset
CALL agentvm.await(:'id3');
CALL agentvm.await(:'id3', 'ready', '1 second');
CALL agentvm.await(:'id3', 'nothing');
CALL agentvm.await(NULL);
BEGIN;
CALL agentvm.await(:'id3');
ROLLBACK;
SELECT public.regress_session_error(format('CALL agentvm.await(%L)', :'id3'));
SELECT agentvm.terminate(:'id3');
CALL agentvm.await(:'id3', 'terminated');
\set VERBOSITY sqlstate
CALL agentvm.await(:'live', 'ready', '1 second');
\set VERBOSITY default

-- ---- plain SQL by other tooling ----
RESET ROLE;
INSERT INTO agentvm.session (session_id, team_id, provider) VALUES ('00000000-0000-7000-8000-00000000ccc1', 'regress_session', 'noop');
SELECT agentvm.wait('00000000-0000-7000-8000-00000000ccc1');
SELECT deadline_at - created_at, ceiling_at - created_at, created_by = current_user, tags, attempt FROM agentvm.session WHERE session_id = '00000000-0000-7000-8000-00000000ccc1';
UPDATE agentvm.session SET state = 'terminating', end_reason = 'requested', next_check_at = now() WHERE session_id = '00000000-0000-7000-8000-00000000ccc1';
SELECT agentvm.wait('00000000-0000-7000-8000-00000000ccc1', 'terminated');

-- ---- the state machine, every pair ----
CREATE TEMP TABLE states (n int GENERATED ALWAYS AS IDENTITY, state text, follows text[]);
INSERT INTO states (state, follows) VALUES
	('provisioning', '{ready, warm, terminating}'), ('warm', '{ready, terminating}'), ('ready', '{pausing, terminating}'), ('pausing', '{paused, ready, terminating}'),
	('paused', '{resuming, terminating}'), ('resuming', '{ready, paused, terminating}'), ('terminating', '{terminated, failed}'), ('terminated', '{}'), ('failed', '{}');
INSERT INTO agentvm.session (session_id, team_id, provider, next_check_at, state, end_reason, ended_at)
	SELECT ('00000000-0000-7000-8000-00000000dd0' || n)::uuid, 'regress_session', 'noop', NULL, state,
		CASE WHEN state ~ '^(term|fail)' THEN 'requested' END, CASE WHEN state IN ('terminated', 'failed') THEN now() END FROM states;
-- try a change, tell how it went, and undo it
CREATE FUNCTION pg_temp.try(id uuid, becomes text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	events bigint;
BEGIN
	UPDATE agentvm.session SET state = becomes, end_reason = CASE WHEN becomes ~ '^(term|fail)' THEN 'requested' END,
		ended_at = CASE WHEN becomes IN ('terminated', 'failed') THEN now() END WHERE session_id = id;
	SELECT count(*) INTO events FROM agentvm.session_event e WHERE e.session_id = id AND new_state = becomes;
	RAISE EXCEPTION USING ERRCODE = 'ZZ000', MESSAGE = format('allowed, %s event', events);
EXCEPTION WHEN OTHERS THEN
	RETURN CASE SQLSTATE WHEN 'ZZ000' THEN SQLERRM ELSE SQLSTATE END;
END
$$;
SELECT a.state || ' -> ' || b.state AS change, answer FROM states a, states b, LATERAL (SELECT pg_temp.try(('00000000-0000-7000-8000-00000000dd0' || a.n)::uuid, b.state) AS answer) t
WHERE a.state <> b.state AND answer <> CASE WHEN b.state = ANY (a.follows) THEN 'allowed, 1 event' ELSE '23000' END;
SELECT count(*), count(*) FILTER (WHERE pg_temp.try(('00000000-0000-7000-8000-00000000dd0' || a.n)::uuid, b.state) LIKE 'allowed%') FROM states a, states b WHERE a.state <> b.state;
UPDATE agentvm.session SET state = 'ready', end_reason = NULL, ended_at = NULL WHERE session_id = '00000000-0000-7000-8000-00000000dd08';
UPDATE agentvm.session SET state = 'warm' WHERE session_id = '00000000-0000-7000-8000-00000000dd03';
SELECT state FROM agentvm.session WHERE session_id IN ('00000000-0000-7000-8000-00000000dd08', '00000000-0000-7000-8000-00000000dd03') ORDER BY 1;
-- not by several rows in one statement, nor by one that forgets the rest of a tombstone
UPDATE agentvm.session SET state = 'ready' WHERE session_id IN ('00000000-0000-7000-8000-00000000dd01', '00000000-0000-7000-8000-00000000dd05');
SELECT state FROM agentvm.session WHERE session_id IN ('00000000-0000-7000-8000-00000000dd01', '00000000-0000-7000-8000-00000000dd05') ORDER BY 1;
\set VERBOSITY terse
UPDATE agentvm.session SET state = 'terminated' WHERE session_id = '00000000-0000-7000-8000-00000000dd07';
\set VERBOSITY default
-- terminate() and extend() of every state
SELECT state, public.regress_session_error(format('SELECT agentvm.extend(%L, ''1 s'')', session_id)) ~ '^no error' AS extended, agentvm.terminate(session_id)
FROM states s, LATERAL (SELECT ('00000000-0000-7000-8000-00000000dd0' || n)::uuid AS session_id) i ORDER BY n;

-- ---- the log is append-only, whoever asks ----
SELECT public.regress_session_error(command) FROM (VALUES
	($$UPDATE agentvm.session_event SET reason = NULL$$), ($$UPDATE agentvm.session_event SET reason = NULL WHERE false$$), ($$DELETE FROM agentvm.session_event$$), ($$DELETE FROM agentvm.session_event WHERE event_id = 0$$),
	($$TRUNCATE agentvm.session_event$$), ($$INSERT INTO agentvm.session_event (event_id, session_id, team_id, kind) VALUES (1, '00000000-0000-7000-8000-00000000dd08', 'regress_session', 'x')$$)) AS v(command);

-- ---- what a row may hold ----
SELECT regexp_replace(public.regress_session_error('INSERT INTO agentvm.session (session_id, team_id, provider, next_check_at' || columns || ') VALUES (''00000000-0000-7000-8000-00000000eee1'', ''regress_session'', ''noop'', NULL' || vals || ')'),
	' \| Failing row.*', '') FROM (VALUES
	(', state', $$, 'running'$$), (', state', ', NULL'), (', state, end_reason, ended_at', $$, 'terminated', 'bored', now()$$), (', state, end_reason', $$, 'terminated', 'requested'$$),
	(', state, ended_at', $$, 'terminated', now()$$), (', ended_at', ', now()'), (', end_reason', $$, 'requested'$$), (', purchase', $$, 'stolen'$$), (', state', $$, 'terminating'$$), (', tags', ', NULL'), (', deadline_at', ', NULL'),
	(', attempt', ', NULL'), (', created_by', ', NULL'), (', options', ', NULL')) AS v(columns, vals);
SELECT public.regress_session_error($$INSERT INTO agentvm.session (session_id, team_id, provider, state, end_reason, ended_at) VALUES ('00000000-0000-7000-8000-00000000eee1', 'regress_session', 'noop', 'failed', 'quota', now())$$) ~ '^23514';
SELECT regexp_replace(public.regress_session_error(command), ' \| Failing row.*', '') FROM (VALUES
	($$INSERT INTO agentvm.session_token VALUES ('\x00', '00000000-0000-7000-8000-00000000eee1', 'session')$$),
	($$INSERT INTO agentvm.session_token VALUES (sha256(''), '00000000-0000-7000-8000-00000000eee1', 'other')$$),
	($$INSERT INTO agentvm.team (team_id, max_sessions) VALUES ('regress_session_c', -1)$$), ($$INSERT INTO agentvm.team (team_id, max_lifetime) VALUES ('regress_session_c', '0')$$),
	($$INSERT INTO agentvm.profile (name, provider, vcpus) VALUES ('regress_p', 'noop', 0)$$), ($$INSERT INTO agentvm.profile (name, provider, options) VALUES ('regress_p', 'noop', '[]')$$),
	($$INSERT INTO agentvm.provider_config (team_id, provider, options) VALUES ('regress_session', 'noop', '[]')$$)) AS v(command);

-- clean up
DELETE FROM agentvm.session WHERE session_id::text LIKE '00000000-0000-7000-8000-00000000dd0_';
SELECT count(*) FROM agentvm.session WHERE team_id LIKE 'regress_session%' AND agentvm.terminate(session_id);
SELECT DISTINCT agentvm.wait(session_id, 'terminated') FROM agentvm.session WHERE team_id LIKE 'regress_session%';
SELECT agentvm.drop_team('regress_session');
SELECT agentvm.drop_team('regress_session_b');
DELETE FROM agentvm.session WHERE team_id LIKE 'regress_session%';
DELETE FROM agentvm.session_token WHERE NOT EXISTS (SELECT FROM agentvm.session s WHERE s.session_id = session_token.session_id);
DELETE FROM agentvm.former_team WHERE team_id LIKE 'regress_session%';
DROP FUNCTION public.regress_session_error(text);
DROP ROLE regress_session_user, regress_session_stranger;
