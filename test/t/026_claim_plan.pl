# How claims read the table: in the order of one index, whatever else the planner fancies; few buffers, nothing twice
use strict;
use warnings;
use AgentVM::Test;
use Test::More;

my $node = new_node('main', conf => <<'CONF');
agentvm.dispatchers = 0
shared_preload_libraries = 'agentvm, auto_explain'
auto_explain.log_min_duration = 0
auto_explain.log_nested_statements = on
auto_explain.log_analyze = on
auto_explain.log_buffers = on
auto_explain.log_timing = off
auto_explain.log_level = log
jit_above_cost = 0
random_page_cost = 100
CONF
my $plans = 0;

# The plans that the last dispatch() used for its look at what is due
sub claim_plans
{
	my ($what) = @_;
	my $offset = -s $node->logfile;
	$node->safe_psql('postgres', 'CALL agentvm.dispatch(50)');
	my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset);
	my @plans = grep { /Query Text: SELECT session_id, .*next_check_at > \$2 AND next_check_at <= \$3 ORDER BY/ } split /^(?=\d{4}-\d\d-\d\d )/m, $log;
	isnt(scalar @plans, 0, "$what: the claim's plans are in the log");
	unlike($log, qr/JIT:/, 'no plan of the engine is compiled');
	return @plans;
}
sub is_index_scan
{
	my ($what, $buffers) = @_;
	my @plans = claim_plans($what);
	is(scalar(grep { !/Index Scan using session_due on (agentvm\.)?session/ } @plans), 0, 'each is a scan of the one index');
	is(scalar(grep { /Sort|Bitmap|Seq Scan/ } @plans), 0, 'without a sort, a bitmap, a scan of the table');
	my ($most) = sort { $b <=> $a } map { /Limit .*?Buffers: shared (?:hit=(\d+))?(?: read=(\d+))?/s ? ($1 // 0) + ($2 // 0) : 1e9 } @plans;
	cmp_ok($most, '<', $buffers, "and reads less than $buffers buffers ($most)");
	return;
}

$node->safe_psql('postgres', <<'SQL');
SELECT agentvm.create_team('acme'); SELECT agentvm.create_team('other');
INSERT INTO agentvm.session (session_id, team_id, provider, next_check_at, deadline_at)
	SELECT gen_random_uuid(), 'acme', 'noop', now() - random() * interval '1 hour', now() + interval '1 day' FROM generate_series(1, 20000) i;
SQL
is_index_scan('20000 due, in no order, no statistics', 2500);
$node->safe_psql('postgres', 'VACUUM ANALYZE agentvm.session');
is_index_scan('the same with fresh statistics', 2500);
$node->safe_psql('postgres', "UPDATE agentvm.session SET next_check_at = now() + interval '1 day' WHERE next_check_at < now(); VACUUM ANALYZE agentvm.session");
is_index_scan('nothing due', 20);

# who has been taken warm and has not come: a few rows, and the sessions of these
{
	$node->safe_psql('postgres', "INSERT INTO agentvm.session_hydrating SELECT session_id, now() FROM agentvm.session WHERE state = 'ready' LIMIT 3; INSERT INTO agentvm.session_hydrating VALUES (gen_random_uuid());
		UPDATE agentvm.session s SET bootstrap_timeout = '1 us' FROM (SELECT session_id FROM agentvm.session_hydrating LIMIT 1) h WHERE s.session_id = h.session_id");
	for my $statistics ('', 'with statistics')
	{
		my $offset = -s $node->logfile;
		is($node->safe_psql('postgres', 'SELECT agentvm.sweep_bootstrap()'), $statistics ? 0 : 1, "a sweep of those that have not hydrated $statistics");
		my @plans = grep { /Query Text: .*session_hydrating/ } split /^(?=\d{4}-\d\d-\d\d )/m, PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset);
		is(scalar @plans, 3, 'its three plans');
		is(scalar(grep { /Seq Scan on (?:agentvm\.)?session s|Bitmap|JIT:/ } @plans), 0, 'none looks at all sessions');
		my ($most) = sort { $b <=> $a } map { /Buffers: shared (?:hit=(\d+))?(?: read=(\d+))?/ ? ($1 // 0) + ($2 // 0) : 0 } @plans;
		cmp_ok($most, '<', 200, "nor reads many buffers ($most)");
		$node->safe_psql('postgres', 'VACUUM ANALYZE agentvm.session_hydrating');
	}
	is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session_hydrating'), 2, 'those that are late, or have gone, are left out');
	$node->safe_psql('postgres', 'CALL agentvm.dispatch()');
}
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE state = 'ready'"), 99, 'each dispatch() took its 50');

done_testing();
