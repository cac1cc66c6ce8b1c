# Quotas hold whoever comes at once and at whatever isolation level; terminating sessions count until they have ended
use strict;
use warnings;
use AgentVM::Test;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "log_min_messages = fatal\n");
# Start psql with a script
my $scripts = 0;
sub start_psql
{
	my ($sql, $out) = @_;
	my $script = $node->basedir . '/client' . ++$scripts . '.sql';
	append_to_file($script, $sql);
	return IPC::Run::start([ 'psql', '-XAtq', '-v', 'retry=true', '-d', $node->connstr('postgres'), '-f', $script ], '<', \undef, '>', $out, '2>', '/dev/null');
}

# Run as many clients at once, each with the SQL, trying again after a serialization failure.
# Returns what they said, counted by SQLSTATE ('00000' for success)
sub clients
{
	my ($count, $level, $sql) = @_;
	my $script = join("\n", "SET default_transaction_isolation = '$level';", 'SELECT pg_advisory_lock_shared(1), pg_advisory_unlock_shared(1) \g /dev/null',
		(map { "\\if :retry\n$sql \\g /dev/null\n\\set state :SQLSTATE\nSELECT :'state' = '40001' AS retry \\gset\n\\endif" } 1 .. 20), '\echo :state', '');
	my $gate = $node->background_psql('postgres');    # they all start when this lock is let go
	my (@runs, %said);

	$gate->query_safe('SELECT pg_advisory_lock(1)');
	for (1 .. $count)
	{
		my $out = '';
		push @runs, [ start_psql($script, \$out), \$out ];
	}
	await($node, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted", $count, name => "$count clients are ready");
	$gate->query_safe('SELECT pg_advisory_unlock(1)');
	for my $run (@runs)
	{
		$run->[0]->finish;
		$said{ ${ $run->[1] } =~ /(\w{5})\s*$/ ? $1 : 'none' }++;
	}
	$gate->quit;
	return join(' ', map { "$_:$said{$_}" } sort keys %said);
}

for my $level ('read committed', 'repeatable read', 'serializable')
{
	my $team = 'limit ' . $level;
	$node->safe_psql('postgres', "SELECT agentvm.create_team('$team', limits => '{\"max_sessions\": 10}')");
	is(clients(32, $level, "SELECT agentvm.provision('$team', options => '{\"launch_delay\": \"1h\", \"terminate_delay\": \"1h\"}')"),
		'00000:10 AV003:22', "$level: 10 of 32 clients at once get one");
	is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE team_id = '$team'"), 10, "$level: 10 rows");
}

# ending still counts, ended no more
my $team = 'ends';
$node->safe_psql('postgres', "SELECT agentvm.create_team('$team', limits => '{\"max_sessions\": 1}')");
my $slow = provision($node, $team, "options => '{\"terminate_delay\": \"1h\"}'");
await_state($node, $slow, 'ready');
psql_ok($node, "SELECT agentvm.terminate('$slow')", 'terminate');
fails_with($node, "SELECT agentvm.provision('$team')", 'AV003', qr/at its limit \(max_sessions = 1\).*1 are in use, 1 more .*Sessions that are ending still count/s, 'a terminating session counts');
$node->safe_psql('postgres', "UPDATE agentvm.session SET handle = handle || '{\"terminate_due\": 0}', next_check_at = now(), lease = NULL WHERE session_id = '$slow'");
await_state($node, $slow, 'terminated');
my $next = provision($node, $team);
await_state($node, $next, 'ready');
pass('and once it has ended there is room');
fails_with($node, "SELECT agentvm.provision('$team')", 'AV003', undef, 'for one');
# in one transaction, too
psql_ok($node, "SELECT agentvm.terminate('$next')", 'terminate');
await_state($node, $next, 'terminated');
fails_with($node, "BEGIN; SELECT agentvm.provision('$team'); SELECT agentvm.provision('$team')", 'AV003', undef, 'the own transaction counts');

# vCPUs and memory, by profile
$node->safe_psql('postgres', <<'SQL');
SELECT agentvm.create_team('sizes', limits => '{"max_vcpus": 8, "max_memory_mib": 6000}');
SELECT agentvm.create_profile('two', 'noop', '{"launch_delay": "1h"}', vcpus => 2, memory_mib => 1000);
SELECT agentvm.create_profile('big', 'noop', '{"launch_delay": "1h"}', vcpus => 1, memory_mib => 5000);
SELECT agentvm.create_profile('vcpus', 'noop', vcpus => 1);
SQL
fails_with($node, "SELECT agentvm.provision('sizes')", 'AV010', qr/size is not known/, 'a size must be known where it counts');
fails_with($node, "SELECT agentvm.provision('sizes', profile => 'vcpus')", 'AV010', qr/size is not known/, 'each of them');
is(clients(8, 'read committed', "SELECT agentvm.provision('sizes', profile => 'two')"), '00000:4 AV003:4', '4 x 2 vCPUs of 8');
fails_with($node, "SELECT agentvm.provision('sizes', profile => 'big')", 'AV003', qr/limit \(max_vcpus = 8\).*8 are in use, 1 more/s, 'no more vCPUs');
$node->safe_psql('postgres', q(SELECT agentvm.alter_team('sizes', limits => '{"max_vcpus": null}')));
fails_with($node, "SELECT agentvm.provision('sizes', profile => 'big')", 'AV003', qr/limit \(max_memory_mib = 6000\).*4000 are in use, 5000 more/s, 'no more memory');
psql_ok($node, "SELECT agentvm.provision('sizes', profile => 'two') FROM generate_series(1, 2)", 'what fits exactly fits');
fails_with($node, "SELECT agentvm.provision('sizes', profile => 'two')", 'AV003', undef, 'and not one more');

# a limit that comes while calls are under way, and a team that goes
$node->safe_psql('postgres', q(SELECT agentvm.create_team('open')));
my $nothing = '';
my @busy = map { start_psql("SELECT agentvm.provision('open', options => '{\"launch_delay\": \"1h\"}');\n" x 300, \$nothing) } 1 .. 4;
await($node, "SELECT count(*) > 20 FROM agentvm.session WHERE team_id = 'open'");
psql_ok($node, q(SELECT agentvm.alter_team('open', limits => '{"max_sessions": 30}')), 'a limit comes');
my $then = $node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE team_id = 'open'");
$_->finish for @busy;
my $at_the_end = $node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE team_id = 'open'");
ok($at_the_end == ($then > 30 ? $then : 30), "no session after alter_team() returned above the limit ($then then, $at_the_end at the end)");

$node->safe_psql('postgres', q(SELECT agentvm.create_team('gone')));
@busy = map { start_psql("SELECT agentvm.provision('gone') AS id \\gset\nSELECT agentvm.terminate(:'id');\nSELECT agentvm.wait(:'id', 'terminated');\n" x 3000, \$nothing) } 1;
await($node, "SELECT count(*) > 10 FROM agentvm.session WHERE team_id = 'gone'");
await($node, "SELECT agentvm.drop_team('gone'), count(*) FROM agentvm.team WHERE team_id = 'gone'", '|1', name => 'drop_team() finds a moment without live sessions');
my $before = $node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE team_id = 'gone'");
$_->finish for @busy;
ok($before < 3000, "while calls were under way ($before of 3000 made)");
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE team_id = 'gone'"), $before, 'no session came after it');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE team_id = 'gone' AND ended_at IS NULL"), 0, 'and none lives');

done_testing();
