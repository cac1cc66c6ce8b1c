# The end of an instance: once, whatever has become of it, and never given up
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.lease = '2s'\nagentvm.launch_settle = '3s'\n");
ec2_team($node, 'demand', $moto, options => { spot => JSON::PP::false });

sub terminate { return $node->safe_psql('postgres', "SELECT agentvm.terminate('$_[0]')"); }

sub health { return $node->safe_psql('postgres', q{SELECT ok || ' ' || detail FROM agentvm.health WHERE name = 'terminate'}); }

# ---- plainly, and twice ----
my ($session, $gone, $protected) = map { launch($node, $_) } qw(acme acme demand);
hurry_to($node, $_, 'ready') for $session, $gone, $protected;
my ($vm, $gone_vm, $protected_vm) = map { column($node, $_, 'vm_id') } $session, $gone, $protected;
is(terminate($session) . terminate($session), 'tf', 'the first call begins the end, the second does not');
await_state($node, $session, 'terminated');
is(terminate($session), 'f', 'nor does a third, after the end');
is(scalar calls_for($faults, 'TerminateInstances', '', $vm), 1, 'one call to the cloud');

# ---- answers that get lost ----
$session = launch($node, 'demand', 'ready');
$faults->set(action => 'TerminateInstances', mode => $_, n => 1) for qw(drop lost 500 truncated html throttle);
terminate($session);
hurry_to($node, $session, 'terminated');
is($faults->count('TerminateInstances', 'faulted'), 6, 'no bad answer is taken for an end, none ends the trying');
$faults->clear;

# ---- ended behind our back ----
$moto->terminate($gone_vm);
terminate($gone);
await_state($node, $gone, 'terminated');

# ---- termination protection ----
sub protect { $moto->run('call', 'ec2', 'modify_instance_attribute', qq({"InstanceId": "$protected_vm", "DisableApiTermination": {"Value": $_[0]}})); return; }
protect('true');
like(health(), qr/^true/, 'health has nothing to say');
terminate($protected);
hurry_until($node, 'SELECT ok FROM agentvm.health WHERE name = $$terminate$$', 'f');
my $end;
like(health(), qr/^false 1 session/, 'an instance under protection is tried again, and seen in health');
like((events($node, $protected))[-1]{error}, qr/^OperationNotPermitted: /, 'the reason is in the log of the session');
is(state_of($node, $protected), 'terminating requested', 'it is not called ended');
protect('false');
hurry_to($node, $protected, 'terminated');
like(health(), qr/^true/, 'health is content again');

# ---- an instance that the cloud does not show yet ----
my $nothing = '<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><reservationSet/></DescribeInstancesResponse>';
$faults->set(action => 'DescribeInstances', mode => 'error', code => 'InvalidInstanceID.NotFound', message => 'not yet', n => 1);
$faults->set(action => 'DescribeInstances', mode => 'body', body => $nothing, n => 1);
$session = launch($node, 'acme');
hurry_to($node, $session, 'ready');
$faults->clear;

# ---- and one that is not known when it is to end: called gone after repeated looks only ----
sub looks { my ($id) = @_; return scalar calls_for($faults, 'DescribeInstances', '', $id); }
$vm = column($node, $session, 'vm_id');
my $looks = looks($vm);
$faults->set(action => $_, mode => 'error', code => 'InvalidInstanceID.NotFound', message => 'no such instance', n => 2) for qw(TerminateInstances DescribeInstances);
terminate($session);
hurry_to($node, $session, 'terminated');
cmp_ok(looks($vm) - $looks, '>=', 3, 'not found is not believed at once');
is(($moto->for_session($session))[0]{state}, 'terminated', 'and when the instance shows after all, it is ended');
$faults->clear;

$session = launch($node, 'acme', 'ready');
$vm = column($node, $session, 'vm_id');
my $old = launch($node, 'acme', 'ready');
my $old_vm = column($node, $old, 'vm_id');
$node->safe_psql('postgres', "UPDATE agentvm.session SET launched_at = launched_at - interval '1 hour', handle = handle - 'launched' WHERE session_id = '$old'");
my ($young_looks, $old_looks) = map { looks($_) } $vm, $old_vm;
$moto->reset;
set_ec2($node, $_, $moto, $_ eq 'demand' ? (options => { spot => JSON::PP::false }) : ()) for qw(acme demand);
# one after the other: looks at both at once would be shared, and made again where the cloud names only one of them
foreach my $each ($session, $old)
{
	terminate($each);
	hurry_to($node, $each, 'terminated');
}
is(looks($vm) - $young_looks, 6, 'an instance that never was: six looks while it could still appear');
is(looks($old_vm) - $old_looks, 3, 'three when it is old');
is(scalar calls_for($faults, 'TerminateInstances', '', $vm), 1, 'one call to end it');

# ---- a launch that was sent and never answered, then a crash ----
$faults->set(action => 'RunInstances', mode => 'lost', n => 1);
$faults->set(action => 'RunInstances', mode => 'drop');
$session = launch($node, 'acme');
$end = time + 60;
sleep 0.02 while $faults->count('RunInstances', 'cloud') < 1 && time < $end;
sleep 0.02 until $moto->for_session($session) || time > $end;
$node->stop('immediate');
$node->start;
is(column($node, $session, 'vm_id IS NULL'), 't', 'after the crash the row names no VM');
$faults->set(action => 'DescribeInstances', mode => 'body', body => $nothing, n => 2);
terminate($session);
hurry_to($node, $session, 'terminated');
my @vms = $moto->for_session($session);
is(join(' ', map { $_->{state} } @vms), 'terminated', 'its instance is found by tag, although not at once, and ended');
is(column($node, $session, 'vm_id'), $vms[0]{id}, 'and is on record');
is(column($node, $session, 'purchase'), 'spot', 'with its market');
$faults->clear;

# ---- one that never arrived: the end is believed when none can appear any more ----
my $before = () = calls_for($faults, 'DescribeInstances', 'x');
$faults->set(action => 'RunInstances', mode => '500');
$session = launch($node, 'acme');
await($node, "SELECT detail ~ 'InternalError' FROM agentvm.sessions WHERE session_id = '$session'");
terminate($session);
hurry_to($node, $session, 'terminated');
my ($last) = reverse calls_for($faults, 'RunInstances', $session);
my @lookups = calls_for($faults, 'DescribeInstances', $session);
cmp_ok(scalar @lookups, '>=', 3, 'several looks by tag');
cmp_ok($lookups[-1]{at} - ($last->{at} - $last->{seconds}), '>=', 4.9, 'the last one later than lease and launch_settle after the last send');
$faults->clear;

# ---- one that was throttled has not happened ----
$faults->set(action => 'RunInstances', mode => 'throttle');
$session = launch($node, 'acme');
await($node, "SELECT detail ~ 'RequestLimitExceeded' FROM agentvm.sessions WHERE session_id = '$session'");
terminate($session);
hurry_to($node, $session, 'terminated');
is(scalar calls_for($faults, 'DescribeInstances', $session), 0, 'a throttled launch needs no looks');
$faults->clear;

# ---- terminate() while the launch is in flight ----
$faults->set(action => 'RunInstances', mode => 'slow', ms => 700, n => 1);
my $launches = $faults->count('RunInstances');
$session = launch($node, 'demand');
$end = time + 60;
sleep 0.01 while $faults->count('RunInstances') == $launches && time < $end;
terminate($session);
await_state($node, $session, 'terminated');
is(join(' ', map { $_->{state} } $moto->for_session($session)), 'terminated', 'a launch under way is ended when it arrives');
$faults->clear;

# ---- ended, or stopped, at AWS before we saw it run ----
$faults->set(action => 'DescribeInstances', mode => '500');
$session = launch($node, 'demand');
my $stopped = launch($node, 'demand');
$moto->terminate(await_vm($node, $session));
$moto->run('stop-instance', await_vm($node, $stopped));
$launches = $faults->count('RunInstances');
$faults->clear;
hurry_to($node, $session, 'failed provider_lost');
hurry_to($node, $stopped, 'failed provider_error InstanceStopped');
is($faults->count('RunInstances'), $launches, 'nothing was launched in its place');

# ---- keys that die before the VM does ----
$session = launch($node, 'acme', 'ready');
set_ec2($node, 'acme', $moto, secrets => { %{ $moto->secrets }, secret_access_key => 'revoked' });
terminate($session);
hurry_until($node, 'SELECT ok FROM agentvm.health WHERE name = $$terminate$$', 'f');
like((events($node, $session))[-1]{error}, qr/^AuthFailure: /, 'revoked keys do not end the trying');
set_ec2($node, 'acme', $moto);
hurry_to($node, $session, 'terminated');

is(scalar $moto->running, 0, 'nothing runs');
done_testing();
