-- So many live sessions that beat, their deadlines within three hours, and their ids in batches of 1000 spread over all
INSERT INTO agentvm.session (session_id, team_id, provider, state, ready_at, running, runtime, next_check_at, deadline_at)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'team' || 1 + i % 1000, 'noop', 'ready', now(), true, true, at, at
FROM (SELECT i, now() + random() * interval '2 hours' + interval '1 hour' AS at FROM generate_series(1, :live) i) s;
INSERT INTO agentvm.session_heartbeat (session_id, last_heartbeat_at, lost_after) SELECT session_id, now(), interval '3 hours' FROM agentvm.session;
SET client_min_messages = error;
DROP TABLE IF EXISTS batch;
CREATE TABLE batch AS SELECT i % (:live / 1000) AS n, array_agg(('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid ORDER BY i) AS ids
FROM generate_series(1, :live) i GROUP BY 1;
CREATE UNIQUE INDEX ON batch (n);
VACUUM ANALYZE;
CHECKPOINT;
