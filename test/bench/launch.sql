-- Seconds from the commit of so many provisions until the last answer was recorded
BEGIN;
SELECT count(agentvm.provision('ec2')) FROM generate_series(1, :launches) \g /dev/null
COMMIT;
SELECT clock_timestamp() AS committed \gset
CREATE OR REPLACE PROCEDURE await_launches(wanted bigint) LANGUAGE plpgsql AS $$
BEGIN
	WHILE (SELECT count(*) FROM agentvm.session_event WHERE kind = 'provider_call') < wanted LOOP
		COMMIT;
		PERFORM pg_sleep(0.1);
	END LOOP;
END $$;
CALL await_launches(:launches);
SELECT CASE WHEN count(*) = :launches AND bool_and(detail ->> 'http_status' = '200') THEN extract(epoch FROM max(at) - :'committed') ELSE 'NaN' END
FROM agentvm.session_event WHERE kind = 'provider_call';
