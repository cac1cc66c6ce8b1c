# One team's backlog of slow calls beside another team's single launches: these begin at once, and no claim reads much to find
# them. Buffers are those of the dispatcher's own statements. With more rows: test/long/backlog_stress.pl
use strict;
use warnings;
use AgentVM::Claims;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use List::Util qw(max);
use Test::More;
use Time::HiRes qw(sleep time);

my $rows = $ENV{AGENTVM_BACKLOG} // 10000;
my $faults = AgentVM::Faults->new;
my $node = new_node('main', moto => $faults, preload => ['auto_explain'], conf => <<"CONF");
agentvm.max_in_flight_per_team = 32
agentvm.sweep_interval = '4s'
$claims_conf
CONF
$node->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");
ec2_team($node, $_, $faults) for qw(many one some much);

# Seconds from provision() of a single launch to its request, which is the newest
sub launch_time
{
	my ($team) = @_;
	my $started = time;
	my $session = launch($node, $team);
	await($node, "SELECT lease IS NOT NULL OR launched_at IS NOT NULL FROM agentvm.session WHERE session_id = '$session'", 't', name => "a session of team $team is claimed");
	return time - $started;
}

$faults->set(mode => 'canned', ms => 5000, log => 0);
# due in another order than they lie in the table, as after retries
$node->safe_psql('postgres', "BEGIN; SELECT count(agentvm.provision('many', profile => 'plain')) FROM generate_series(1, $rows);
	UPDATE agentvm.session SET next_check_at = now() - random() * interval '1 hour'; COMMIT");
await($node, 'SELECT sum(in_flight) FROM agentvm.stat_dispatcher', 32, name => "a team with $rows due launches has as many in flight as it may");
$node->safe_psql('postgres', "ALTER SYSTEM SET auto_explain.log_min_duration = 0; SELECT pg_reload_conf()");

# beside the backlog, for longer than the passes over all that are made every sweep_interval
my $offset = -s $node->logfile;
my $until = time + 10;
my @times;
while (time < $until) { push @times, launch_time('one'); sleep 0.3; }
cmp_ok(max(@times), '<', 1, 'each single launch begins within a second: ' . scalar @times . ' of them, the slowest ' . max(@times) . ' s');
# a second team that reaches its cap, whose few rows lie behind the backlog
$node->safe_psql('postgres', "SELECT count(agentvm.provision('some', profile => 'plain')) FROM generate_series(1, 40)");
await($node, "SELECT count(*) FROM agentvm.session WHERE team_id = 'some' AND launched_at IS NOT NULL", 40, name => 'a second team goes beyond its cap and back');
my @claims = map { $_->[0] } claims(PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset));
cmp_ok(scalar @claims, '>', @times, 'the log has the claims: ' . scalar @claims);
cmp_ok(max(@claims), '<', 2000, 'and none has read 2000 buffers: ' . max(@claims) . ' at most');
is($node->safe_psql('postgres', "SELECT count(*) <= 32 FROM agentvm.session WHERE team_id = 'many' AND lease IS NOT NULL"), 't', 'no more of the backlog is claimed than may be in flight');

# teams with a backlog whose caps together are all that may be in flight: what becomes free is not all theirs
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.max_in_flight = 64; SELECT pg_reload_conf()");
$node->safe_psql('postgres', "SELECT count(agentvm.provision('much', profile => 'plain')) FROM generate_series(1, 1000)");
await($node, 'SELECT sum(in_flight) FROM agentvm.stat_dispatcher', 64, name => 'another team with a backlog, and no room for a third');
cmp_ok(launch_time('one'), '<', 5, 'which has its turn, too') for 1 .. 3;
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session_event WHERE kind = 'provider_call' AND detail ? 'error'"), 0, 'no call has failed');

done_testing();
