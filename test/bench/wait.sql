\set team random(1, 1000)
SELECT agentvm.provision('team' || :team::int, options => '{"launch_delay": "50ms"}') AS id \gset
INSERT INTO waited SELECT :id::uuid, agentvm.wait(:id::uuid), clock_timestamp();
