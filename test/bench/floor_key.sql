\set team random(1, 1000)
\set key random(1, 1000000000000)
INSERT INTO floor (session_id, team_id, provider, created_at, deadline_at, ceiling_at, tags, created_by, options, runtime, bootstrap_timeout, heartbeat_timeout, lane, next_check_at, idempotency_key, args_hash)
VALUES (gen_random_uuid(), 'team' || :team::int, 'noop', now(), now() + interval '2 hours', now() + interval '24 hours', '{}', 'app', '{}', false, interval '180 s', interval '120 s', 0, now(), 'key-' || :key::bigint,
	'\x6a09e667bb67ae853c6ef372a54ff53a510e527f9b05688c1f83d9ab5be0cd19');
