-- So many live sessions become due for no reason, in one transaction
UPDATE agentvm.session SET next_check_at = clock_timestamp() WHERE session_id <= ('00000000-0000-7000-8000-' || lpad(to_hex(:due), 12, '0'))::uuid;
SELECT agentvm.wake();
