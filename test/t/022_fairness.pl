# One team's backlog or throttled account starves nobody; what is in flight is bounded, and full means idle, not busy
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my $faults = AgentVM::Faults->new;
my $node = new_node('main', moto => $faults, conf => <<'CONF');
agentvm.max_in_flight_per_team = 4
agentvm.sweep_interval = '1h'
CONF
$node->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");
ec2_team($node, $_, $faults) for qw(many one throttled);

# Calls that were under way at once, at most, from when each came and went
sub most_at_once
{
	my (@calls) = @_;
	my ($most, $now) = (0, 0);
	my @edges = sort { $a->[0] <=> $b->[0] || $a->[1] <=> $b->[1] } map { ([ $_->{at} - $_->{seconds} + 0.005, 1 ], [ $_->{at}, -1 ]) } @calls;
	foreach my $edge (@edges)
	{
		$now += $edge->[1];
		$most = $now if $now > $most;
	}
	return $most;
}

# Seconds from provision() until it is on the row that its VM is launched
sub launch_time
{
	my ($team) = @_;
	my $started = time;
	my $session = launch($node, $team);
	await($node, "SELECT lease IS NOT NULL OR launched_at IS NOT NULL FROM agentvm.session WHERE session_id = '$session'", 't', name => "a session of team $team is claimed");
	return time - $started;
}

$faults->set(mode => 'canned', ms => 500, action => 'RunInstances');
$node->safe_psql('postgres', "SELECT agentvm.provision('many', profile => 'plain') FROM generate_series(1, 2000)");
await($node, 'SELECT sum(in_flight) FROM agentvm.stat_dispatcher', 4, name => 'a team with 2000 due launches has as many in flight as it may');
cmp_ok(launch_time('one'), '<', 1, 'and another team is served within a second') for 1 .. 3;
my $launched = $node->safe_psql('postgres', "SELECT count(*) FROM agentvm.sessions WHERE team_id = 'many' AND launched_at IS NOT NULL");
my $started = time;
await($node, "SELECT count(*) >= $launched + 16 FROM agentvm.sessions WHERE team_id = 'many' AND launched_at IS NOT NULL");
cmp_ok(time - $started, '<', 4, 'the backlog moves on by its 8 launches a second');
my @calls = grep { my $a = $_->{args}; grep { ($a->{$_} // '') eq 'many' } keys %$a } $faults->requests('RunInstances');
is(most_at_once(@calls), 4, 'never more than its cap at once');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE team_id = 'many' AND lease IS NOT NULL") <= 4, 1, 'nor claimed');

# Several dispatchers share the cap, also one that is smaller than their number
foreach my $cap (4, 2)
{
	$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.dispatchers = 3; ALTER SYSTEM SET agentvm.max_in_flight_per_team = $cap; SELECT pg_reload_conf()");
	await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher WHERE sleeping_until IS NOT NULL OR passes > 1', 3, name => 'three dispatchers');
	my $since = time + 1.2;
	sleep 2.5;
	@calls = grep { $_->{at} - $_->{seconds} > $since } $faults->requests('RunInstances');
	is(most_at_once(@calls), $cap, "have $cap calls of the team in flight together");
}
$node->safe_psql('postgres', 'ALTER SYSTEM RESET agentvm.dispatchers; SELECT pg_reload_conf()');
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 1, name => 'one is left');

# The whole database's cap, with work waiting: the dispatcher sleeps until a call is answered
$node->safe_psql('postgres', 'ALTER SYSTEM SET agentvm.max_in_flight = 2; ALTER SYSTEM SET agentvm.max_in_flight_per_team = 10; SELECT pg_reload_conf()');
$faults->clear;
$faults->set(mode => 'canned', ms => 1500, action => 'RunInstances');
await($node, 'SELECT sum(in_flight) FROM agentvm.stat_dispatcher', 2, name => 'max_in_flight bounds all teams together');
sub passes { return $node->safe_psql('postgres', 'SELECT sum(passes) FROM agentvm.stat_dispatcher'); }
my $passes = passes();
launch($node, 'one');
sleep 1;
cmp_ok(passes() - $passes, '<', 20, 'and while it is reached nobody spins');
$node->safe_psql('postgres', "DELETE FROM agentvm.session WHERE team_id <> 'throttled'");
$node->safe_psql('postgres', 'ALTER SYSTEM RESET agentvm.max_in_flight; SELECT pg_reload_conf()');

# A throttled account is slowed down by itself
$faults->clear;
my $throttle = sub { $faults->set(mode => 'throttle', action => 'RunInstances', n => $_[0]) };
await($node, 'SELECT sum(in_flight) FROM agentvm.stat_dispatcher', 0, name => 'all is answered');
$throttle->(10);
my $before = $faults->count('RunInstances');
my @sessions = split /\n/, $node->safe_psql('postgres', "SELECT agentvm.provision('throttled', profile => 'plain') FROM generate_series(1, 30)");
await($node, "SELECT count(*) > 0 FROM agentvm.session WHERE team_id = 'throttled' AND detail ~ 'RequestLimitExceeded'", 't', name => 'an account is throttled');
is($faults->count('RunInstances') - $before, 10, 'with the calls that were in flight: no others follow');
$faults->clear;
cmp_ok(launch_time('one'), '<', 1, 'another team does not notice') for 1 .. 2;
await($node, "SELECT count(*) FROM agentvm.sessions WHERE team_id = 'throttled' AND state = 'ready'", 30, name => 'in the end all are launched');
is($faults->count('RunInstances', 'replayed'), 0, 'each once');

done_testing();
