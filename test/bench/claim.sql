-- The two queries of an idle claim (scan_query and ahead_query of src/engine/engine.c), planned as the engine has them planned
INSERT INTO agentvm.session (session_id, team_id, provider, state, ready_at, running, next_check_at)
SELECT gen_random_uuid(), 'team' || 1 + i % 1000, 'noop', 'ready', now(), true, now() + random() * interval '2 hours' + interval '1 hour'
FROM generate_series(1, 100000) i;
VACUUM ANALYZE agentvm.session;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SET enable_sort = off;
SET jit = off;
PREPARE scan (int2, timestamptz, timestamptz, int4) AS
	SELECT session_id, team_id, next_check_at FROM agentvm.session
	WHERE lane = $1 AND next_check_at > $2 AND next_check_at <= $3 ORDER BY next_check_at LIMIT $4;
PREPARE ahead (int2, timestamptz) AS
	SELECT next_check_at FROM agentvm.session WHERE lane = $1 AND next_check_at > $2 ORDER BY next_check_at LIMIT 1;
CREATE FUNCTION pg_temp.explain(statement text, OUT plan jsonb) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE 'EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) ' || statement INTO plan;
END $$;
-- twice: the first time reads the catalogs and sets hint bits
SELECT pg_temp.explain('EXECUTE scan (0, now() - interval ''1 s'', now(), 1000)'), pg_temp.explain('EXECUTE ahead (0, now())') \g /dev/null
SELECT format('%s buffers, %s ms (%s)', sum((plan #>> '{0,Plan,Shared Hit Blocks}')::int + (plan #>> '{0,Plan,Shared Read Blocks}')::int),
	sum((plan #>> '{0,Execution Time}')::numeric), string_agg(DISTINCT plan #>> '{0,Plan,Plans,0,Node Type}', ', '))
FROM (VALUES ('EXECUTE scan (0, now() - interval ''1 s'', now(), 1000)'), ('EXECUTE ahead (0, now())')) q (statement), pg_temp.explain(statement);
