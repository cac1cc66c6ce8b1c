\set batch random(0, :live / 1000 - 1)
UPDATE agentvm.session_heartbeat h SET last_heartbeat_at = b.seen FROM unnest((SELECT ids FROM batch WHERE n = :batch), array_fill(now(), ARRAY[1000])) b (id, seen) WHERE h.session_id = b.id;
