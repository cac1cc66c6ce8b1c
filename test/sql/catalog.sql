--
-- What the tables are like: times, indexes, room for HOT updates, what pg_dump takes along; ciphers
--
\pset format unaligned
\pset tuples_only on
-- every time is timestamptz; those that must exist have a default, but for seals, which only the engine makes
SELECT attrelid::regclass, attname FROM pg_attribute WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'agentvm'::regnamespace AND relkind = 'r')
	AND atttypid IN ('timestamp'::regtype, 'date'::regtype, 'time'::regtype, 'timetz'::regtype) AND attnum > 0;
SELECT attrelid::regclass || '.' || attname FROM pg_attribute WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'agentvm'::regnamespace AND relkind = 'r')
	AND attnum > 0 AND atttypid = 'timestamptz'::regtype AND attnotnull AND NOT atthasdef ORDER BY 1;
SELECT attrelid::regclass || '.' || attname FROM pg_attribute WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'agentvm'::regnamespace AND relkind = 'r')
	AND attnum > 0 AND atttypid = 'timestamptz'::regtype AND NOT attnotnull ORDER BY (attrelid::regclass || '.' || attname) COLLATE "C";
-- a plain INSERT by other tooling works, with no time given
BEGIN;
INSERT INTO agentvm.team (team_id) VALUES ('regress_plain');
INSERT INTO agentvm.team_member (team_id, role) VALUES ('regress_plain', current_user::regrole);
INSERT INTO agentvm.former_team (team_id) VALUES ('regress_plain');
INSERT INTO agentvm.provider_config (team_id, provider) VALUES ('regress_plain', 'noop');
INSERT INTO agentvm.provider_secret (team_id, provider, field, value_enc, key_id) VALUES ('regress_plain', 'noop', 'x', '', 'k');
INSERT INTO agentvm.profile (name, provider) VALUES ('regress_plain', 'noop');
INSERT INTO agentvm.session (session_id, team_id, provider) VALUES ('00000000-0000-7000-8000-00000000ccc1', 'regress_plain', 'noop');
INSERT INTO agentvm.session_event (session_id, team_id, kind) VALUES ('00000000-0000-7000-8000-00000000ccc1', 'regress_plain', 'test');
INSERT INTO agentvm.session_heartbeat (session_id) VALUES ('00000000-0000-7000-8000-00000000ccc1');
INSERT INTO agentvm.session_ending (session_id) VALUES ('00000000-0000-7000-8000-00000000ccc1');
INSERT INTO agentvm.session_hydrating (session_id) VALUES ('00000000-0000-7000-8000-00000000ccc1');
INSERT INTO agentvm.session_token (token_sha256, session_id, kind) VALUES (sha256(''), '00000000-0000-7000-8000-00000000ccc1', 'session');
INSERT INTO agentvm.gateway (gateway_id) VALUES ('regress_plain');
ROLLBACK;

-- the indexes of the tables that every session goes through: no more, and state is in none of them, nor in a predicate
SELECT regexp_replace(indexdef, '^CREATE ', '') FROM pg_indexes WHERE schemaname = 'agentvm' AND tablename IN ('session', 'session_heartbeat', 'session_event') ORDER BY tablename, indexname;
SELECT relname, relpersistence, substring(array_to_string(reloptions, ',') FROM 'fillfactor=\d+') FROM pg_class WHERE oid IN ('agentvm.session'::regclass, 'agentvm.session_heartbeat'::regclass) ORDER BY 1;
-- so a change of state stays HOT where next_check_at does not move, as of a session on lease: by users, and with bootstrap()
BEGIN;
INSERT INTO agentvm.team (team_id) VALUES ('regress_hot');
INSERT INTO agentvm.session (session_id, team_id, provider, runtime, launched_at, lease, next_check_at, key_id)
	SELECT ('00000000-0000-7000-8000-00000000ddd' || i)::uuid, 'regress_hot', 'noop', true, now(), 1, now() + interval '1 hour', 'k' FROM generate_series(1, 3) i;
INSERT INTO agentvm.session_token (token_sha256, session_id, kind) VALUES (sha256('boot'), '00000000-0000-7000-8000-00000000ddd1', 'bootstrap');
CREATE TEMP TABLE before AS SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relid = 'agentvm.session'::regclass;
SELECT agentvm.bootstrap(sha256('boot'), sha256('session'), 'boot') IS NOT NULL;
SELECT agentvm.terminate('00000000-0000-7000-8000-00000000ddd1'), agentvm.terminate('00000000-0000-7000-8000-00000000ddd2');
SELECT agentvm.extend('00000000-0000-7000-8000-00000000ddd3', '1 s') IS NOT NULL;
SELECT n.n_tup_upd - b.n_tup_upd, n.n_tup_hot_upd - b.n_tup_hot_upd FROM before b, pg_stat_xact_user_tables n WHERE n.relid = 'agentvm.session'::regclass;
ROLLBACK;

-- what pg_dump leaves out: nothing but what a restored database has to find out by itself
SELECT c.oid::regclass FROM pg_class c, pg_extension e WHERE extname = 'agentvm' AND relnamespace = 'agentvm'::regnamespace AND relkind IN ('r', 'S', 'p', 'm') AND NOT c.oid = ANY (extconfig) ORDER BY 1;
SELECT pg_describe_object('pg_class'::regclass, t, 0), extcondition[i] FROM pg_extension, unnest(extconfig) WITH ORDINALITY AS u (t, i) WHERE extname = 'agentvm' AND extcondition[i] <> '' ORDER BY 1;

-- credentials: aes256 (9), a salted key (1: s2k-mode), each field with a salt of its own
SELECT agentvm.create_team('regress_cipher');
SELECT agentvm.set_provider('regress_cipher', 'ec2', '{}', '{"access_key_id": "SAME", "secret_access_key": "SAME"}');
SELECT field, get_byte(value_enc, 0) & 63 AS packet, get_byte(value_enc, 2) AS version, get_byte(value_enc, 3) AS cipher, get_byte(value_enc, 4) AS s2k FROM agentvm.provider_secret WHERE team_id = 'regress_cipher' ORDER BY field;
SELECT count(DISTINCT substr(value_enc, 7, 8)) FROM agentvm.provider_secret WHERE team_id = 'regress_cipher';
SELECT agentvm.drop_team('regress_cipher');

-- the public columns of a session
SELECT string_agg(attname || ' ' || atttypid::regtype, ', ' ORDER BY attnum) FROM pg_attribute WHERE attrelid = 'agentvm.sessions'::regclass AND attnum > 0;
