# Where a launch is tried: markets, types, subnets; when a place is left, and when not; tokens that are of no use; never a second VM
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node();
my @subnets = @{ $moto->options->{subnet_ids} };
my %rest = %{ $moto->options };
delete $rest{instance_type};
sub sql { return $node->safe_psql('postgres', $_[0]); }
sub options { my ($team, %options) = @_; sql('SET log_statement = none; SELECT agentvm.set_provider(' . join(', ', literal($team), "'ec2'", json({ %rest, %options })) . ')'); return; }
options('acme', instance_types => [qw(t3.micro t3.small)]);

# Market, type and subnet of each launch asked for, in order; and the same from the log
sub places
{
	my (@calls) = @_;
	my %number = map { $subnets[$_] => $_ } 0 .. $#subnets;
	return join ' ', map { "$_->[0]:" . $_->[1] =~ s/^t3\.//r . ":$number{ $_->[2] }" } @calls;
}
sub asked { return places(map { my $a = $_->{args}; [ $a->{'InstanceMarketOptions.MarketType'} // 'on-demand', @$a{qw(InstanceType SubnetId)} ] } calls_for($faults, 'RunInstances', $_[0])); }
sub logged { return places(map { [ @{ $_->{tried} }{qw(market instance_type subnet)} ] } grep { $_->{operation} eq 'RunInstances' } events($node, $_[0])); }
sub tokens { my %seen; $seen{ $_->{args}{ClientToken} }++ for calls_for($faults, 'RunInstances', $_[0]); return scalar keys %seen; }
sub type_of { return sql("SELECT agentvm.inspect('$_[0]')->>'instance_type'"); }
# what takes the cloud a while we have looked at at once
sub launch_now { my (@arguments) = @_; my $session = launch($node, 'acme', undef, @arguments); hurry_to($node, $session, 'ready'); return $session; }
# what the cloud is to have of a session in the end; it is asked but once
my @expected;
sub expect { push @expected, [@_]; return; }
# wait for a launch that we do not hear of; its VM
sub launched
{
	my ($session, $before) = @_;
	my $end = time + 60;
	sleep 0.02 while $faults->count('RunInstances', 'launched') == $before && time < $end;
	return (map { $_->{id} } vms_of($moto, $session))[0];
}

# ---- the order ----
$faults->set(mode => 'capacity', action => 'RunInstances', n => 8);
my $session = launch_now();
my $order = 'spot:micro:0 spot:micro:1 spot:micro:2 spot:small:0 spot:small:1 spot:small:2 on-demand:micro:0 on-demand:micro:1 on-demand:micro:2';
is(asked($session), $order, 'spot before on-demand, of a market each type, of a type each subnet');
is(tokens($session), 9, 'each place has a token of its own');
is(logged($session), $order, 'the log says what was tried');
is(join(' ', map { "$_->{tried}{attempt}:" . ($_->{error_class} // 'done') } events($node, $session)), join(' ', map({ "$_:capacity" } 1 .. 8), '9:done'), 'and why it moved on');
is(column($node, $session, "purchase || ' ' || attempt"), 'on-demand 9', 'market and attempts are on the row');
is(type_of($session), 't3.micro', 'the instance is of that type, says inspect()');
expect($session, 'running', 'refusals for want of room');

$faults->clear;
$faults->set(mode => 'error', status => 400, code => 'Unsupported', message => 'not in this zone', action => 'RunInstances', match => 't3.micro');
$session = launch_now();
is(asked($session), 'spot:micro:0 spot:micro:1 spot:micro:2 spot:small:0', 'a type that no zone has: the next one');
is(type_of($session), 't3.small', 'is launched');

$faults->clear;
$faults->set(mode => 'error', status => 400, code => 'MaxSpotInstanceCountExceeded', action => 'RunInstances', market => 'spot');
$session = launch_now();
is(asked($session), 'spot:micro:0 on-demand:micro:0', 'a quota of spot is the same for all types and zones');

$faults->clear;
$faults->set(mode => 'capacity', action => 'RunInstances');
$session = launch($node, 'acme', 'failed');
is(asked($session), "$order on-demand:small:0 on-demand:small:1 on-demand:small:2", 'no capacity anywhere: each place is tried once');
like(state_of($node, $session), qr/^failed capacity /, 'and the session fails');
expect($session, '', 'no room anywhere');
$faults->clear;

# ---- whose list ----
sql(q{SELECT agentvm.create_profile('listed', 'ec2', options => '{"instance_types": ["t3.small", "t3.micro"]}', runtime => false),
	agentvm.create_profile('one', 'ec2', options => '{"instance_type": "t3.medium"}', runtime => false)});
is(type_of(launch_now(q{options => '{"instance_type": "t3.large"}'})), 't3.large', "a caller's type takes the place of the team's list");
is(type_of(launch_now("profile => 'one'")), 't3.medium', "and so does a profile's");
$session = launch_now("profile => 'one'", q{options => '{"instance_types": ["t3.small", "t3.micro"]}'});
is(type_of($session), 't3.small', "a caller's list takes the place of a profile's type");
is(sql("SELECT options ? 'instance_type' FROM agentvm.session WHERE session_id = '$session'"), 'f', 'nothing of it is kept');
options('acme', instance_type => 't3.large');
is(type_of(launch_now("profile => 'listed'")), 't3.small', "a profile's list takes the place of the team's type");
options('acme', instance_types => []);
is(type_of(launch_now()), 't3.large', 'an empty list is none: the default');
for my $bad ([ '["t3.small", "T3; --"]', qr/invalid value "T3; --" for option "instance_types"/ ], [ '["t3.small", 1]', qr/must be a list of strings/ ], [ '{}', qr/must be a list of strings/ ],
	[ JSON::PP::encode_json([ ('t3.small') x 17 ]), qr/has more than 16 members/ ], [ '["t3.small"], "instance_type": "t3.micro"', qr/"instance_type" and "instance_types" of provider "ec2" are both set/ ])
{
	fails_with($node, "SELECT agentvm.set_provider('acme', 'ec2', '{\"instance_types\": $bad->[0]}')", 'AV010', $bad->[1], "AV010 for a team: $bad->[0]");
	fails_with($node, "SELECT agentvm.provision('acme', profile => 'plain', options => '{\"instance_types\": $bad->[0]}')", 'AV010', $bad->[1], "AV010 for a caller: $bad->[0]");
}
options('acme', instance_types => [qw(t3.small t3.micro)]);
is(sql("SELECT agentvm.check_provider('acme')->>'ok'"), 'true', 'check_provider() likes a list');
is((grep { $_->{args}{DryRun} } $faults->requests('RunInstances'))[-1]{args}{InstanceType}, 't3.small', 'and asks for its first member');
options('acme', instance_types => ['t3.micro']);

# ---- unanswered, then no room: not left as long as it may launch yet ----
$node->append_conf('postgresql.conf', "agentvm.lease = '3s'\nagentvm.launch_settle = '1s'\n");
$node->reload;
await($node, 'SHOW agentvm.lease', '3s');
$faults->set(mode => 'slow', ms => 1500, action => 'RunInstances', n => 1);
$faults->set(mode => 'capacity', action => 'RunInstances', match => $subnets[0]);
my $before = $faults->count('RunInstances');
$session = launch($node, 'acme');
{ my $end = time + 60; sleep 0.01 while $faults->count('RunInstances') == $before && time < $end; }
$node->stop('immediate');
$node->start;
hurry_to($node, $session, 'ready');
is(tokens($session), 1, 'no room for the repeat of a call that a dead server had under way: no other place is tried');
is(column($node, $session, 'attempt'), 1, 'until the call has launched its VM');
expect($session, 'running', 'a call that a dead server had under way');
like((events($node, $session))[0]{error}, qr/^InsufficientInstanceCapacity/, 'though the repeat was refused');

$faults->clear;
$faults->set(mode => 'drop', action => 'RunInstances', n => 1);
$faults->set(mode => 'capacity', action => 'RunInstances', match => $subnets[0]);
$session = launch_now();
my @calls = calls_for($faults, 'RunInstances', $session);
is(tokens($session), 2, 'where it cannot launch any more the next place is tried');
is($calls[-1]{args}{SubnetId}, $subnets[1], 'in the next subnet');
cmp_ok($calls[-1]{at} - $calls[0]{at}, '>=', 2.8, 'and no sooner');
expect($session, 'running', 'dropped, then no room');
$faults->clear;

# ---- a token that came with other parameters ----
$faults->set(mode => 'lost', action => 'RunInstances', n => 1);
$faults->set(mode => 'error', code => 'IdempotentParameterMismatch', action => 'RunInstances', n => 1);
$session = launch_now();
is(column($node, $session, "purchase || ' ' || attempt"), 'spot 1', 'IdempotentParameterMismatch: the instance is looked for, and taken over; it is the first attempt');
expect($session, 'running', 'IdempotentParameterMismatch after a lost reply');
like(join(' ', map { $_->{error} // 'done' } events($node, $session)), qr/IdempotentParameterMismatch: /, 'the log tells why');

# the database is set back to before a launch, and would now ask for something else
$session = provision($node, 'acme');
my $vm = await_vm($node, $session);
sql("UPDATE agentvm.session SET vm_id = NULL, launched_at = NULL, running = false, handle = NULL, attempt = 0, ceiling_at = ceiling_at + interval '1 h', next_check_at = now() WHERE session_id = '$session'; SELECT agentvm.wake()");
hurry_until($node, "SELECT vm_id FROM agentvm.sessions WHERE session_id = '$session'", $vm, name => 'set back: the VM of before is taken over');
is($faults->count('RunInstances', 'mismatched'), 1, 'the cloud knew the token');
expect($session, 'running', 'a database that was set back');
as_gateway($node, 'SELECT agentvm.bootstrap(' . bytea_hash(bootstrap_token($moto, $vm)) . ', ' . bytea_hash('session token') . ", 'boot')");
is(column($node, $session, 'state'), 'ready', 'which can report with the token that it was given');

$faults->clear;
$faults->set(mode => 'drop', action => 'RunInstances', n => 1);
$faults->set(mode => 'error', code => 'IdempotentParameterMismatch', action => 'RunInstances', n => 1);
$session = launch_now();
@calls = calls_for($faults, 'RunInstances', $session);
is(tokens($session), 2, 'nothing is found: there is a new attempt');
cmp_ok($calls[-1]{at} - $calls[-2]{at}, '>=', 3.8, 'once nothing can appear any more');
is(column($node, $session, 'attempt'), 2, 'the second');
expect($session, 'running', 'IdempotentParameterMismatch of nothing');

$faults->clear;
$faults->set(mode => 'lost', action => 'RunInstances', n => 1);
$faults->set(mode => 'error', code => 'IdempotentParameterMismatch', action => 'RunInstances');
$faults->set(mode => 'slow', ms => 500, action => 'DescribeInstances');
$before = $faults->count('DescribeInstances');
$session = launch($node, 'acme');
{ my $end = time + 60; sleep 0.02 while $faults->count('DescribeInstances') == $before && time < $end; }
sql("SELECT agentvm.terminate('$session')");
hurry_to($node, $session, 'terminated requested');
expect($session, 'terminated', 'ended while it is looked for');

# ---- a token whose instance has ended ----
$faults->clear;
$faults->set(mode => 'lost', action => 'RunInstances', n => 1);
$faults->set(mode => 'throttle', action => 'RunInstances');
$before = $faults->count('RunInstances', 'launched');
$session = launch($node, 'acme');
$moto->terminate(launched($session, $before));
$faults->clear;
$faults->set(mode => 'error', code => 'IdempotentInstanceTerminated', action => 'RunInstances', n => 1);
hurry_to($node, $session, 'ready');
expect($session, 'running terminated', 'IdempotentInstanceTerminated before it was heard of');
is(column($node, $session, 'attempt'), 2, 'IdempotentInstanceTerminated before it was heard of: another attempt');
is(tokens($session), 2, 'with another token');

$faults->clear;
$faults->set(mode => 'lost', action => 'RunInstances', n => 1);
$faults->set(mode => 'throttle', action => 'RunInstances');
$before = $faults->count('RunInstances', 'launched');
$session = provision($node, 'acme');
$vm = launched($session, $before);
as_gateway($node, 'SELECT agentvm.bootstrap(' . bytea_hash(bootstrap_token($moto, $vm)) . ', ' . bytea_hash('another session token') . ", 'boot')");
is(column($node, $session, "state || (vm_id IS NULL)"), 'readytrue', 'a VM reports before the cloud has answered');
$moto->terminate($vm);
$faults->clear;
$faults->set(mode => 'error', code => 'IdempotentInstanceTerminated', action => 'RunInstances', n => 1);
sql("UPDATE agentvm.session SET next_check_at = now() WHERE session_id = '$session' AND lease IS NULL; SELECT agentvm.wake()");
hurry_to($node, $session, 'failed provider_lost IdempotentInstanceTerminated');
is(tokens($session), 1, 'IdempotentInstanceTerminated of one that has run: it is lost, and not launched anew');
expect($session, 'terminated', 'one that has run');

# ---- a token that never is of any use ----
$node->append_conf('postgresql.conf', "agentvm.lease = '1s'\n");
$node->reload;
$faults->clear;
$faults->set(mode => 'error', code => 'IdempotentParameterMismatch', action => 'RunInstances');
$session = launch($node, 'acme');
hurry_to($node, $session, 'failed provider_error IdempotentParameterMismatch');
is(tokens($session), 3, 'three attempts');
expect($session, '', 'tokens that never were of any use');
$faults->clear;

my %states;
push @{ $states{ $_->{tags}{'agentvm-session-id'} } }, $_->{state} eq 'running' ? "$_->{state} $_->{id}" : $_->{state} for $moto->instances;
foreach my $expected (@expected)
{
	my ($id, $states, $name) = @$expected;
	my $running = 'running ' . column($node, $id, "coalesce(vm_id, '')");
	is(join(', ', sort @{ $states{$id} // [] }), join(', ', split(/ /, $states)) =~ s/running/$running/r, "$name: what the cloud has in the end");
}

unlike(log_text($node), qr/PANIC|TRAP:|terminated by signal/, 'nothing has crashed');
done_testing();
