-- The least that marking takes: claim what is due and write the mark, no events
WITH due AS MATERIALIZED (SELECT ctid FROM floor WHERE lane = 0 AND next_check_at <= clock_timestamp() FOR UPDATE SKIP LOCKED)
UPDATE floor f SET state = 'terminating', end_reason = 'max_lifetime', next_check_at = clock_timestamp() FROM due WHERE f.ctid = due.ctid;
