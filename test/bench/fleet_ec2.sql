-- So many live sessions, launched in so many accounts; how many there are
SELECT count(agentvm.provision('account' || 1 + i % :accounts, profile => 'bare')) FROM generate_series(1, :launches) i \g /dev/null
DO $$
BEGIN
	WHILE EXISTS (SELECT FROM agentvm.session WHERE state = 'provisioning') LOOP
		COMMIT;
		PERFORM pg_sleep(0.1);
	END LOOP;
END $$;
SELECT count(*) FROM agentvm.session WHERE state = 'ready';
