-- Seconds until nothing is due
SELECT clock_timestamp() AS started \gset
DO $$
BEGIN
	WHILE EXISTS (SELECT FROM agentvm.session WHERE lane = 0 AND next_check_at <= clock_timestamp()) LOOP
		COMMIT;
		PERFORM pg_sleep(0.1);
	END LOOP;
END $$;
SELECT extract(epoch FROM clock_timestamp() - :'started');
