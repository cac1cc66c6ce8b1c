-- Every measurement begins with empty tables and no checkpoint under way
SET session_replication_role = replica;
TRUNCATE floor, agentvm.session, agentvm.session_event, agentvm.session_token, agentvm.session_heartbeat;
RESET session_replication_role;
CHECKPOINT;
