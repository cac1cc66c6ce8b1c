-- Every measurement begins with empty tables and no checkpoint under way
ALTER TABLE agentvm.session_event DISABLE TRIGGER append_only;
ALTER TABLE agentvm.event_seal DISABLE TRIGGER append_only;
TRUNCATE floor, agentvm.session, agentvm.session_event, agentvm.event_seal, agentvm.session_token, agentvm.session_heartbeat, agentvm.session_ending, agentvm.session_hydrating, agentvm.placement, agentvm.inventory, agentvm.vm_drift;
ALTER TABLE agentvm.session_event ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE agentvm.event_seal ENABLE ALWAYS TRIGGER append_only;
CHECKPOINT;
