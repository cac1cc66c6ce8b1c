# Spot first, then on-demand; subnets in their order; and what is on record of it
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;

my ($node, $faults, $moto) = ec2_node();
my @subnets = @{ $moto->options->{subnet_ids} };
ec2_team($node, 'one', $moto, options => { subnet_ids => [ $subnets[0] ] });
ec2_team($node, 'demand', $moto, options => { spot => JSON::PP::false });

# market and subnet of each launch asked for, in order
sub tries
{
	my ($session) = @_;
	my %name = map { $subnets[$_] => $_ } 0 .. $#subnets;
	return join ' ', map { ($_->{args}{'InstanceMarketOptions.MarketType'} // 'on-demand') . $name{ $_->{args}{SubnetId} } }
	  calls_for($faults, 'RunInstances', $session);
}

my $session = launch($node, 'acme', 'ready');
is(tries($session), 'spot0', 'spot is tried first');
is(column($node, $session, "purchase || ' ' || attempt"), 'spot 1', 'the row says so');
is((vms_of($moto, $session))[0]{market}, 'spot', 'and the cloud, too');
my ($call) = calls_for($faults, 'RunInstances', $session);
is($call->{args}{'InstanceMarketOptions.SpotOptions.SpotInstanceType'}, 'one-time', 'a one-time request');
is($call->{args}{'InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior'}, 'terminate', 'that an interruption ends');

my @fallen_back;
foreach my $code (qw(InsufficientInstanceCapacity SpotMaxPriceTooLow MaxSpotInstanceCountExceeded InstanceLimitExceeded UnfulfillableCapacity Unsupported))
{
	$faults->set(mode => 'error', status => $code =~ /^Ins.*Cap/ ? 500 : 400, code => $code, message => 'none left', action => 'RunInstances', market => 'spot');
	$session = launch($node, 'one', 'ready');
	is(tries($session), 'spot0 on-demand0', "$code of spot: one on-demand launch");
	is(column($node, $session, "purchase || ' ' || attempt"), 'on-demand 2', 'market and attempt on the row');
	my @tokens = map { $_->{args}{ClientToken} } calls_for($faults, 'RunInstances', $session);
	isnt($tokens[0], $tokens[1], 'each attempt has a token of its own');
	push @fallen_back, $session;
	like((events($node, $session))[0]{error}, qr/^$code: none left$/, 'the refusal is in the log of the session');
	$faults->clear;
}

is(join(' ', sort map { "$_->{market} $_->{state}" } vms_of($moto, @fallen_back)), join(' ', ('on-demand running') x @fallen_back), 'one instance each, on demand');

$faults->set(mode => 'error', status => 400, code => 'VcpuLimitExceeded', message => 'all used', action => 'RunInstances');
$session = launch($node, 'one', 'failed');
is(tries($session), 'spot0', 'VcpuLimitExceeded counts all markets: nothing else is tried');
is(state_of($node, $session), 'failed quota VcpuLimitExceeded: all used', 'the session failed over it');
fails_with($node, "SELECT agentvm.wait('$session', timeout => '9 seconds')", 'AV003', qr/quota/, 'wait() says AV003');
$faults->clear;

$session = launch($node, 'demand', 'ready');
is(tries($session), 'on-demand0', 'spot = false of the team is honoured');
is(column($node, $session, 'purchase'), 'on-demand', 'and recorded');
$session = launch($node, 'acme', 'ready', q{options => '{"spot": false}'});
is(tries($session), 'on-demand0', 'spot = false of the caller is honoured');
$session = launch($node, 'demand', 'ready', q{options => '{"spot": true, "instance_type": "t3.small"}'});
is(tries($session), 'spot0', "the caller's spot = true wins over the team's");
is((vms_of($moto, $session))[0]{type}, 't3.small', 'as does the instance type');

$faults->set(mode => 'capacity', action => 'RunInstances', n => 4);
$session = launch($node, 'acme', 'ready');
is(tries($session), 'spot0 spot1 spot2 on-demand0 on-demand1', 'every subnet of a market, then the other market');
is(column($node, $session, "purchase || ' ' || attempt"), 'on-demand 5', 'every attempt is counted');
is((vms_of($moto, $session))[0]{subnet}, $subnets[1], 'the instance is in the subnet that had room');
$faults->clear;

$faults->set(mode => 'capacity', action => 'RunInstances');
$session = launch($node, 'acme', 'failed');
is(tries($session), 'spot0 spot1 spot2 on-demand0 on-demand1 on-demand2', 'all are tried once');
like(state_of($node, $session), qr/^failed capacity InsufficientInstanceCapacity: /, 'no capacity anywhere: failed');
fails_with($node, "SELECT agentvm.wait('$session', timeout => '9 seconds')", 'AV002', qr/capacity/, 'wait() says AV002');
is(scalar vms_of($moto, $session), 0, 'and nothing was launched');

done_testing();
