\set team random(1, 1000)
\set key random(1, 1000000000000)
SELECT agentvm.provision('team' || :team::int, idempotency_key => 'key-' || :key::bigint);
