-- All sessions reach their deadline at once: seconds from there until the last call for an end left, and until the last session had ended
SELECT clock_timestamp() + interval '10 seconds' AS deadline \gset
UPDATE agentvm.session SET deadline_at = :'deadline', next_check_at = :'deadline';
SELECT agentvm.wake() \g /dev/null
SELECT clock_timestamp() < :'deadline' AS intime \gset
DO $$
BEGIN
	WHILE EXISTS (SELECT FROM agentvm.session WHERE ended_at IS NULL) LOOP
		COMMIT;
		PERFORM pg_sleep(0.1);
	END LOOP;
END $$;
SELECT CASE WHEN :'intime' AND bool_and(detail ->> 'http_status' = '200') AND count(DISTINCT session_id) = (SELECT count(*) FROM agentvm.session)
	THEN extract(epoch FROM max(at - (detail ->> 'ms')::int * interval '1 ms') - :'deadline') ELSE 'NaN' END,
	(SELECT extract(epoch FROM max(ended_at) - :'deadline') FROM agentvm.session)
FROM agentvm.session_event WHERE kind = 'provider_call' AND detail ->> 'operation' = 'TerminateInstances';
