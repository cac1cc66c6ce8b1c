-- So many more like each session, as the canned endpoint's lists have them, and all with heartbeats
INSERT INTO agentvm.session SELECT r.* FROM agentvm.session s CROSS JOIN generate_series(1, :copies) i, LATERAL jsonb_populate_record(s, jsonb_build_object(
	'session_id', lpad(to_hex(i), 8, '0') || substr(s.session_id::text, 9), 'vm_id', 'i-' || lpad(to_hex(i), 8, '0') || right(s.vm_id, 9))) r ORDER BY i;
UPDATE agentvm.session SET runtime = true, deadline_at = at, next_check_at = at
FROM (SELECT session_id, now() + random() * interval '2 hours' + interval '1 hour' AS at FROM agentvm.session) d WHERE d.session_id = session.session_id;
INSERT INTO agentvm.session_heartbeat (session_id, last_heartbeat_at, lost_after) SELECT session_id, now(), interval '3 hours' FROM agentvm.session
ON CONFLICT (session_id) DO UPDATE SET last_heartbeat_at = excluded.last_heartbeat_at, lost_after = excluded.lost_after;
VACUUM FULL ANALYZE agentvm.session;
VACUUM ANALYZE;
CHECKPOINT;
