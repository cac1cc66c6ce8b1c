# pg_cron does the work where agentvm is not preloaded: launches, sweeps and ends come from scheduled CALLs only. The packaged pg_cron has
# no schedules below a minute, so the jobs are "@reboot" ones, which run when the server starts, and the server is restarted
use strict;
use warnings;
use AgentVM::Test;
use Test::More;

plan skip_all => 'pg_cron is not installed' unless -e `pg_config --pkglibdir` =~ s/\n//r . '/pg_cron.so';

my $node = new_node('main', preload => undef, extension => 0, conf => <<'CONF');
shared_preload_libraries = 'pg_cron'
cron.database_name = 'postgres'
cron.log_run = on
CONF
create_extension($node);
$node->safe_psql('postgres', 'CREATE EXTENSION pg_cron');
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
make_role($node, 'scheduler', login => 1, grants => ['agentvm_admin', 'pg_read_all_settings']);
$node->safe_psql('postgres', 'GRANT USAGE ON SCHEMA cron TO scheduler; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA cron TO scheduler');

# Both of pg_cron's ways to run a job: a connection of its own, and a background worker
for my $workers ('off', 'on')
{
	my $name = $workers eq 'on' ? 'background workers' : 'connections';
	my ($out, $error);

	$node->safe_psql('postgres', "TRUNCATE cron.job_run_details; DELETE FROM cron.job");
	$node->append_conf('postgresql.conf', "cron.use_background_workers = $workers\ncron.host = '" . $node->host . "'\n");
	$node->restart;
	$node->psql('postgres', "SELECT agentvm.provision('acme')", stdout => \$out, stderr => \$error);
	my $session = $out;
	like($error, qr/WARNING:  no agentvm dispatcher serves this database.*HINT:  Add agentvm to shared_preload_libraries/s, 'a call says that nobody works here');
	my $old = provision($node, 'acme', "max_lifetime => '1 second'", "options => '{\"launch_delay\": \"1h\"}'");
	is($node->safe_psql('postgres', "SELECT string_agg(state, ' ') FROM agentvm.sessions WHERE session_id IN ('$session', '$old')"), 'provisioning provisioning', 'nobody does');

	# a scheduled CALL
	$node->safe_psql('postgres', "SET ROLE scheduler; SELECT cron.schedule('dispatch', '\@reboot', 'CALL agentvm.dispatch()')");
	$node->restart;
	await_state($node, $session, 'ready');
	await($node, "SELECT status FROM cron.job_run_details WHERE command ~ 'dispatch'", 'succeeded', name => "$name: CALL agentvm.dispatch() succeeded")
	  || diag($node->safe_psql('postgres', 'SELECT * FROM cron.job_run_details'));

	# a wait without shared memory looks by itself
	is($node->safe_psql('postgres', "SELECT agentvm.wait('$session')"), 'ready', 'wait() needs no preloading');

	# scheduled sweeps
	await($node, "SELECT deadline_at < now() FROM agentvm.sessions WHERE session_id = '$old'", 't', name => 'a session is past its deadline');
	$node->safe_psql('postgres', "DELETE FROM cron.job; TRUNCATE cron.job_run_details; SET ROLE scheduler; SELECT cron.schedule(f, '\@reboot', 'SELECT agentvm.' || f || '()') FROM unnest('{sweep_bootstrap, sweep_heartbeat, sweep_lifetime}'::text[]) f");
	$node->restart;
	await($node, "SELECT count(*) FROM cron.job_run_details WHERE status = 'succeeded'", 3, name => "$name: three sweeps succeeded")
	  || diag($node->safe_psql('postgres', 'SELECT * FROM cron.job_run_details'));
	is(state_of($node, $old), 'terminating max_lifetime', 'sweep_lifetime() has begun the end');
	is(state_of($node, $session), 'ready', 'of that one only');

	# and their work is done by a dispatch() again
	$node->safe_psql('postgres', "DELETE FROM cron.job; SET ROLE scheduler; SELECT cron.schedule('both', '\@reboot', 'CALL agentvm.dispatch(max_sessions => 10)')");
	psql_ok($node, "SELECT agentvm.terminate('$session')", 'terminate');
	$node->restart;
	await_state($node, $_, 'terminated') for $session, $old;
}

$node->stop;

# Beside the dispatchers, a schedule disturbs nothing
$node = new_node('both', preload => ['pg_cron'], conf => "cron.database_name = 'postgres'\ncron.host = '" . $node->host . "'\n");
$node->safe_psql('postgres', "CREATE EXTENSION pg_cron; SELECT agentvm.create_team('acme'); SELECT cron.schedule(c, '\@reboot', c) FROM unnest('{SELECT agentvm.sweep(),CALL agentvm.dispatch()}'::text[]) c");
my @sessions = map { provision($node, 'acme') } 1 .. 20;
$node->restart;
await($node, "SELECT count(*) FROM cron.job_run_details WHERE status = 'succeeded'", 2, name => 'both jobs succeeded');
await_state($node, $_, 'ready') for @sessions;
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session_event WHERE new_state = 'ready'"), 20, 'each became ready once');

done_testing();
