-- Seconds from the commit of so many provisions until the last one is ready
INSERT INTO came SELECT agentvm.provision('team' || 1 + i % 1000), clock_timestamp() FROM generate_series(1, :count) i;
SELECT clock_timestamp() AS committed \gset
DO $$
BEGIN
	WHILE EXISTS (SELECT FROM agentvm.session WHERE lane = 0 AND next_check_at <= clock_timestamp()) LOOP
		COMMIT;
		PERFORM pg_sleep(0.05);
	END LOOP;
END $$;
SELECT extract(epoch FROM max(ready_at) - :'committed') FROM agentvm.session JOIN came USING (session_id);
