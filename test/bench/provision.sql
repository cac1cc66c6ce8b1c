\set team random(1, 1000)
SELECT agentvm.provision('team' || :team::int);
