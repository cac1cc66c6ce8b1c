-- The first :due sessions reach their deadline
UPDATE :target SET deadline_at = now(), next_check_at = now() WHERE session_id <= ('00000000-0000-7000-8000-' || lpad(to_hex(:due), 12, '0'))::uuid;
VACUUM ANALYZE :target;
CHECKPOINT;
