\set batch random(0, :live / 1000 - 1)
SELECT count(*) FROM agentvm.heartbeat_batch((SELECT ids FROM batch WHERE n = :batch), array_fill(now(), ARRAY[1000]));
