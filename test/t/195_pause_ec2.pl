# pause() and resume() on EC2: the instance is stopped and started, whatever becomes of the calls; a stop in flight loses no terminate(), and a crash nothing
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Runtime;
use AgentVM::Test;
use JSON::PP;
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.lease = '3s'\n");
ec2_team($node, 'demand', $moto, options => { spot => JSON::PP::false });

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub pause { return sql("SELECT agentvm.pause('$_[0]')"); }
sub resume { return sql("SELECT agentvm.resume('$_[0]')"); }
sub vm { return column($node, $_[0], 'vm_id'); }
sub seen { my ($session) = @_; return join ' ', map { $_->{state} } vms_of($moto, $session); }
sub changes { return sql("SELECT string_agg(new_state, ' ' ORDER BY event_id) FROM agentvm.session_event WHERE session_id = '$_[0]' AND kind = 'state'"); }
sub calls { my ($session, $action) = @_; return scalar calls_for($faults, $action, '', vm($session)); }
sub asked { my ($action, $before) = @_; my $end = time + 30; sleep 0.01 while $faults->count($action) <= $before && time < $end; return; }
sub ready { return launch($node, 'demand', 'ready', @_); }
# Its next pause or resume, seen to its end
sub hurried { my ($session, $way, $state) = @_; sql("SELECT agentvm.$way('$session')"); local $Test::Builder::Level = $Test::Builder::Level + 1; return hurry_to($node, $session, $state); }
sub instance
{
	my ($state, $reason) = @_;
	return '<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><reservationSet><item><instancesSet><item><instanceId>i-1</instanceId>'
	  . "<instanceState><name>$state</name></instanceState>" . ($reason ? "<stateReason><code>$reason</code><message>because</message></stateReason>" : '') . '</item></instancesSet></item></reservationSet></DescribeInstancesResponse>';
}
sub looks { my ($n, @instance) = @_; $faults->set(action => 'DescribeInstances', mode => 'body', body => instance(@instance), n => $n); return; }

# ---- there and back ----
my $session = ready();
hurried($session, 'pause', 'paused');
is(seen($session), 'stopped', 'paused: the instance is stopped');
is(calls($session, 'StopInstances'), 1, 'by one call');
is(sql("SELECT agentvm.inspect('$session')->>'state'"), 'stopped', 'inspect() says so');
hurried($session, 'resume', 'ready');
is(seen($session), 'running', 'resumed: it runs');
is(calls($session, 'StartInstances'), 1, 'by one call');
is(join(' ', map { $_->{operation} } events($node, $session)), 'RunInstances StopInstances StartInstances', 'the log has the calls');
is(sql("SELECT handle ?| '{phase,power_sent,looks}' FROM agentvm.session WHERE session_id = '$session'"), 'f', 'nothing of it is left in the handle');

# ---- spot, and what is not known yet ----
my $spot = launch($node, 'acme', 'ready');
fails_with($node, "SELECT agentvm.pause('$spot')", '0A000', qr/one-time spot instance.*option spot_persistent = true, or spot = false/s, 'a one-time spot instance cannot be paused');
is(state_of($node, $spot) . ' ' . calls($spot, 'StopInstances'), 'ready 0', 'nothing has happened');
sql("UPDATE agentvm.session SET purchase = NULL WHERE session_id = '$spot'");
fails_with($node, "SELECT agentvm.pause('$spot')", 'AV007', qr/cannot be paused yet/, 'nor one of which it is not known what it is');
is(sql("SELECT agentvm.terminate('$spot')"), 't', 'it can be ended');

# ---- answers that get lost, both ways ----
for my $case ([ 'pause', 'StopInstances', 'paused', 'stopped' ], [ 'resume', 'StartInstances', 'ready', 'running' ])
{
	my ($way, $action, $state, $instance) = @$case;
	$faults->set(action => $action, mode => $_, n => 1) for qw(drop lost 500 truncated html throttle);
	$faults->set(action => $action, mode => 'error', code => 'IncorrectInstanceState', message => 'not now', n => 1);
	my $looked = $faults->count('DescribeInstances', 'faulted');
	$faults->set(action => 'DescribeInstances', mode => $_, n => 1) for qw(500 truncated throttle);
	$faults->set(action => 'DescribeInstances', mode => 'error', code => 'InvalidInstanceID.NotFound', message => 'not yet', n => 1);
	my $before = $faults->count($action, 'faulted');
	hurried($session, $way, $state);
	is(seen($session), $instance, "$way: done in the end");
	is($faults->count($action, 'faulted') - $before, 7, 'after every bad answer it goes on');
	is($faults->count('DescribeInstances', 'faulted') - $looked, 4, 'also to the question how it stands');
	$faults->clear;
}
is(changes($session), 'provisioning ready' . ' pausing paused resuming ready' x 2, 'and never went back');

# ---- refused: as before, at once when it is clear that nothing has happened ----
sub refuse { my ($action, $code, %rule) = @_; $faults->set(action => $action, mode => 'error', code => $code, message => 'no', %rule); return; }
my $stops = calls($session, 'StopInstances');
refuse('StopInstances', 'UnsupportedOperation');
hurried($session, 'pause', 'ready UnsupportedOperation: no');
is(calls($session, 'StopInstances') - $stops, 1, 'a stop that is refused is not repeated');
is(seen($session), 'running', 'the instance runs');
$faults->clear;

# an earlier one may have been taken: what does the instance say?
$stops = calls($session, 'StopInstances');
$faults->set(action => 'StopInstances', mode => 'drop', n => 1);
refuse('StopInstances', 'UnsupportedOperation');
hurried($session, 'pause', 'ready UnsupportedOperation: no');
cmp_ok(calls($session, 'StopInstances') - $stops, '>=', 5, 'after one without an answer a refusal is believed only when the instance has been seen to run again and again');
$faults->clear;
$faults->set(action => 'StopInstances', mode => 'lost', n => 1);
refuse('StopInstances', 'UnsupportedOperation');
hurried($session, 'pause', 'paused');
$faults->clear;

# a start without capacity, said at once, and said by an instance that falls back
refuse('StartInstances', 'InsufficientInstanceCapacity', status => 500, n => 1);
hurried($session, 'resume', 'paused InsufficientInstanceCapacity: no');
is(seen($session), 'stopped', 'no capacity: it stays paused');
looks(3, 'stopped', 'Server.InsufficientInstanceCapacity');
hurried($session, 'resume', 'paused Server.InsufficientInstanceCapacity: because');
$faults->clear;
looks(1, 'stopped', 'Server.ScheduledStop');
hurried($session, 'resume', 'ready');
is(seen($session), 'running', 'why it was stopped once is no reason');
$faults->clear;
looks(100, 'running');
hurried($session, 'pause', 'ready StopInstances: the instance stays running');
$faults->clear;
$moto->calls([ undef, 'ec2', 'start_instances', { InstanceIds => [ vm($session) ] } ]);

# ---- no rights: told, and the session is ready; but not while the stop may have been taken ----
refuse('StopInstances', 'UnauthorizedOperation', status => 403);
hurried($session, 'pause', 'ready UnauthorizedOperation: no');
$faults->clear;
$faults->set(action => 'DescribeInstances', mode => 'auth');
pause($session);
hurry_until($node, "SELECT retries > 2 FROM agentvm.session WHERE session_id = '$session'");
like(state_of($node, $session), qr/^pausing AuthFailure/, 'keys that die when the stop has been sent: it is not called ready');
is(sql("SELECT ok FROM agentvm.health WHERE name = 'pause'"), 'f', 'health shows it');
$faults->clear;
hurry_to($node, $session, 'paused');

# ---- gone ----
refuse('StartInstances', 'IncorrectInstanceState');
looks(1, 'terminated', 'Client.UserInitiatedShutdown');
hurried($session, 'resume', 'failed provider_lost Client.UserInitiatedShutdown: because');
$faults->clear;
$session = ready();
refuse($_, 'InvalidInstanceID.NotFound') for qw(StopInstances DescribeInstances TerminateInstances);
hurried($session, 'pause', 'failed provider_lost InvalidInstanceID.NotFound');
$faults->clear;
$moto->terminate(vm($session));

# ---- terminate() while the stop is in flight, when its answer is lost, and just as the instance is seen to have stopped ----
for my $rule ({ action => 'StopInstances', mode => 'slow', ms => 700 }, { action => 'StopInstances', mode => 'lost' }, { action => 'DescribeInstances', mode => 'slow', ms => 700 })
{
	$session = ready();
	my $before = $faults->count($rule->{action});
	$faults->set(n => 1, %$rule);
	pause($session);
	asked($rule->{action}, $before);
	is(sql("SELECT agentvm.terminate('$session')"), 't', "terminate() amid a pause: $rule->{action} $rule->{mode}");
	hurry_to($node, $session, 'terminated');
	is(seen($session), 'terminated', 'the instance is gone');
	is(changes($session), 'provisioning ready pausing terminating terminated', 'nothing came in between');
	$faults->clear;
}
log_lacks($node, 'is put off', 'no answer was taken for what it was not any more');
$session = ready();
hurried($session, 'pause', 'paused');
sql("SELECT agentvm.terminate('$session')");
hurry_to($node, $session, 'terminated');
is(seen($session), 'terminated', 'terminate() of one that is paused');

# ---- crashes in the middle ----
$session = ready();
for my $case ([ 'pause', 'StopInstances', 'paused', 'stopped' ], [ 'resume', 'StartInstances', 'ready', 'running' ])
{
	my ($way, $action, $state, $instance) = @$case;
	my ($before, $taken) = ($faults->count($action), $faults->count($action, 'cloud'));
	$faults->set(action => $action, mode => 'slow', ms => 1500, n => 1);
	sql("SELECT agentvm.$way('$session')");
	asked($action, $before);
	$node->stop('immediate');
	$node->start;
	hurry_to($node, $session, $state);
	# the first one is still on its way, and must not get there later than the next case's
	my $end = time + 30;
	sleep 0.05 while $faults->count($action, 'cloud') < $taken + 2 && time < $end;
	is(seen($session), $instance, "a crash amid $way(): it goes on");
	$faults->clear;
}

# ---- its runtime reports before we have seen the instance run; the tidying up after its boot ----
ec2_team($node, 'ssm', $moto, options => { spot => JSON::PP::false, instance_profile => 'agentvm-vm', secret_delivery => 'ssm' });
$faults->set(action => 'DescribeInstances', mode => '500');
$session = launch($node, 'ssm', undef, 'profile => NULL');
await_vm($node, $session);
$faults->set(action => 'DeleteParameter', mode => '500');
bootstrap($node, $session);
is(state_of($node, $session) . ' ' . sql("SELECT running FROM agentvm.session WHERE session_id = '$session'"), 'ready f', 'ready, but not yet seen to run');
my $before = $faults->count('StopInstances');
pause($session);
hurry_until($node, "SELECT retries > 0 FROM agentvm.session WHERE session_id = '$session'");
is($faults->count('StopInstances'), $before, 'it is looked at first');
$faults->clear;
$faults->set(action => 'DeleteParameter', mode => '500');
hurry_to($node, $session, 'paused');
is($faults->count('StopInstances'), $before + 1, 'then stopped');
$faults->clear;
sql("UPDATE agentvm.session SET next_check_at = now() WHERE session_id = '$session' AND lease IS NULL; SELECT agentvm.wake()");
await($node, "SELECT handle ? 'boot_left' FROM agentvm.session WHERE session_id = '$session'", 'f', name => 'what its boot has left is taken away while it is paused');

# ---- while the tidying up goes on, a pause does not wait for it ----
$session = launch($node, 'ssm', undef, 'profile => NULL');
await($node, "SELECT running FROM agentvm.session WHERE session_id = '$session'");
$before = $faults->count('DeleteParameter');
$faults->set(action => 'DeleteParameter', mode => 'slow', ms => 700, n => 1);
$faults->set(action => 'DeleteParameter', mode => '500', n => 1);
bootstrap($node, $session);
asked('DeleteParameter', $before);
pause($session);
await_state($node, $session, 'paused', timeout => 30);    # by itself: nobody makes it due
is(seen($session), 'stopped', 'paused amid the tidying up');
hurried($session, 'resume', 'ready');

sql('SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE ended_at IS NULL');
hurry_until($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0);
is(scalar(grep { $_->{state} ne 'terminated' } $moto->instances), 0, 'nothing is left');
done_testing();
