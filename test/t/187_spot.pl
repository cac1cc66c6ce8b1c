# Persistent spot requests: their instances can be paused, and on no way on which one ends does AWS launch another in its place
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use JSON::PP;
use List::Util qw(max);
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.lease = '2s'\nagentvm.launch_settle = '1s'\nagentvm.orphan_grace = '1s'\nagentvm.dispatchers = 1\nagentvm.api_rate = 0\n");
ec2_team($node, 'keeps', $moto, options => { spot_persistent => JSON::PP::true });

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub request { return sql("SELECT handle ->> 'request' FROM agentvm.session WHERE session_id = '$_[0]'"); }
# A session that is ready, its VM, its request
sub ready
{
	my ($team) = @_;
	my $session = launch($node, $team // 'keeps');
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	hurry_to($node, $session, 'ready');
	return ($session, split /\|/, sql("SELECT vm_id, handle ->> 'request' FROM agentvm.session WHERE session_id = '$session'"));
}
sub seen { my ($session) = @_; return join ' ', map { $_->{state} } vms_of($moto, $session); }
sub refuse { my ($action, $code, %rule) = @_; $faults->set(action => $action, mode => 'error', code => $code, message => 'no', %rule); return; }
sub hurried { my ($session, $way, $state) = @_; sql("SELECT agentvm.$way('$session')"); local $Test::Builder::Level = $Test::Builder::Level + 1; return hurry_to($node, $session, $state); }
sub asked { my ($action, $before) = @_; local $Test::Builder::Level = $Test::Builder::Level + 1; return await_that(sub { $faults->count($action) > $before }, "the cloud is asked for $action"); }
sub expire { return $moto->calls([ undef, 'ec2', 'cancel_spot_instance_requests', { SpotInstanceRequestIds => \@_ } ]); }
sub list { return join ', ', map { "'$_'" } @_; }
# The ends of a request and its instance of which the cloud has been asked, in order
sub ends
{
	my ($vm, $request) = @_;
	my %name = ($vm => 'end', $request => 'cancel');
	return join ' ', map { my $args = $_->{args}; map { $name{ $args->{$_} } // () } keys %$args } grep { $_->{action} =~ /^(Cancel|Terminate)/ && $_->{outcome} !~ /error|drop/ } $faults->requests;
}
sub instance
{
	my ($vm, $state, $reason, %tags) = @_;
	return '<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><reservationSet><item><instancesSet><item>' . "<instanceId>$vm</instanceId>"
	  . "<instanceState><name>$state</name></instanceState><stateReason><code>$reason</code><message>because</message></stateReason><tagSet>"
	  . join('', map { "<item><key>$_</key><value>$tags{$_}</value></item>" } sort keys %tags) . '</tagSet></item></instancesSet></item></reservationSet></DescribeInstancesResponse>';
}

# ---- the launch ----
my ($session, $vm, $request) = ready();
my %args = %{ (calls_for($faults, 'RunInstances', $session))[0]{args} };
my $spot = 'InstanceMarketOptions.SpotOptions';
is(join(' ', map { $args{$_} } "$spot.SpotInstanceType", "$spot.InstanceInterruptionBehavior", 'InstanceInitiatedShutdownBehavior'), 'persistent stop stop', 'a persistent request, whose instance is stopped where it would end by itself');
is(sql("SELECT timestamptz '" . $args{"$spot.ValidUntil"} . "' = date_trunc('second', ceiling_at) + interval '5 minutes' FROM agentvm.session WHERE session_id = '$session'"), 't', 'the request expires at the hard stop of its VM');
my %tags;
foreach my $n (1 .. 3)
{
	$tags{ $args{"TagSpecification.$n.ResourceType"} }{ $args{"TagSpecification.$n.Tag.$_.Key"} } = $args{"TagSpecification.$n.Tag.$_.Value"} for grep { defined $args{"TagSpecification.$n.Tag.$_.Key"} } 1 .. 9;
}
is_deeply([ map { $tags{$_}{'agentvm-session-id'} } qw(instance volume spot-instances-request) ], [ ($session) x 3 ], 'instance, volume and request are tagged');
is($tags{instance}{'agentvm-spot'}, 'persistent', 'the instance says what it is');
like($request, qr/^sir-/, 'the request is in the handle');
my ($one_time, $one_time_vm) = ready('acme');
is(scalar(grep { /^TagSpecification\.3/ || /ValidUntil/ } keys %{ (calls_for($faults, 'RunInstances', $one_time))[0]{args} }), 0, 'a one-time request is what it was');
is(request($one_time), '', 'and not kept');
fails_with($node, "SELECT agentvm.pause('$one_time')", '0A000', qr/one-time.*spot_persistent = true/s, 'it cannot be paused: the hint names the option');
my $demand = launch($node, 'acme', undef, q{options => '{"spot_persistent": true, "spot": false}'});
hurry_to($node, $demand, 'ready');
is(column($node, $demand, 'purchase') . request($demand), 'on-demand', 'a caller may set the option, which means nothing on demand');

# ---- paused and resumed ----
hurried($session, 'pause', 'paused');
is(seen($session), 'stopped', 'paused: the instance is stopped');
foreach my $code (qw(InsufficientInstanceCapacity SpotMaxPriceTooLow))
{
	refuse('StartInstances', $code, n => 1);
	hurried($session, 'resume', "paused $code: no");
}
refuse('StartInstances', 'IncorrectSpotRequestState', n => 2);
hurried($session, 'resume', 'ready');
is(seen($session), 'running', 'a request that has not yet seen the stop is waited for; then it runs');

# ---- ended: running, and paused, which AWS ends by itself when the request is cancelled ----
hurried($session, 'terminate', 'terminated');
is(ends($vm, $request), 'cancel end', 'the request is cancelled, then the instance ended');
is(join(' ', map { $_->{operation} } (events($node, $session))[ -2, -1 ]), 'CancelSpotInstanceRequests TerminateInstances', 'both are in the log');
($session, $vm, $request) = ready();
hurried($session, 'pause', 'paused');
hurried($session, 'terminate', 'terminated');
is(ends($vm, $request), 'cancel end', 'the same of one that is paused');
hurried($_, 'terminate', 'terminated') for $one_time, $demand;
is($faults->count('CancelSpotInstanceRequests'), 2, 'nothing else has such a request');

# ---- bad answers: nothing is ended before the request is known to be cancelled ----
($session, $vm, $request) = ready();
$faults->set(action => 'CancelSpotInstanceRequests', mode => $_, n => 1) for qw(drop lost 500 truncated html throttle);
$faults->set(action => 'CancelSpotInstanceRequests', mode => 'body', body => '<CancelSpotInstanceRequestsResponse><spotInstanceRequestSet><item>'
	. "<spotInstanceRequestId>$request</spotInstanceRequestId><state>active</state></item></spotInstanceRequestSet></CancelSpotInstanceRequestsResponse>", n => 1);
refuse('CancelSpotInstanceRequests', 'InvalidSpotInstanceRequestID.NotFound', n => 1);
hurried($session, 'terminate', 'terminated');
is($faults->count('CancelSpotInstanceRequests', 'faulted'), 8, 'after every bad answer it is cancelled once more');
like(ends($vm, $request), qr/^(cancel )+end$/, 'then the instance is ended, and not before');
$faults->clear;

# ---- refused: as long as the instance lives it is not ended ----
($session, $vm, $request) = ready();
refuse('CancelSpotInstanceRequests', 'UnauthorizedOperation', status => 403);
sql("SELECT agentvm.terminate('$session')");
hurry_until($node, "SELECT retries > 1 FROM agentvm.session WHERE session_id = '$session'");
is(seen($session) . ' ' . ends($vm, $request), 'running ', 'without the right to cancel nothing is ended');
like((events($node, $session))[-1]{error}, qr/cancelling its spot request is not allowed|UnauthorizedOperation/, 'the log says why');
$faults->clear;
hurry_to($node, $session, 'terminated');
is(ends($vm, $request), 'cancel end', 'until the right is there');

# nor is it refused for ever: one that is gone for long has no tags; nor has a request that has expired
($session, $vm, $request) = ready();
refuse('CancelSpotInstanceRequests', 'UnauthorizedOperation', status => 403);
$faults->set(action => 'DescribeInstances', mode => 'body', body => instance($vm, 'terminated', 'Client.UserInitiatedShutdown'));
hurried($session, 'terminate', 'terminated');
is(ends($vm, $request), '', 'an instance that has ended needs no end');
$faults->clear;
($session, $vm, $request) = ready();
sql("UPDATE agentvm.session SET handle = handle || '{\"request_until\": 1}' WHERE session_id = '$session'");
expire($request);
refuse('CancelSpotInstanceRequests', 'UnauthorizedOperation', status => 403);
hurried($session, 'terminate', 'terminated');
is(ends($vm, $request), 'end', 'a request that has expired needs no cancellation');
$faults->clear;

# ---- ended by somebody else: AWS has launched another one, which a policy may not allow to end; but the session does not end silently ----
($session, $vm, $request) = ready();
$moto->terminate($vm);
my ($other) = map { $_->{id} } grep { !%{ $_->{tags} } } $moto->running;
refuse('TerminateInstances', 'UnauthorizedOperation', status => 403, match => $other);
$faults->set(action => 'DescribeInstances', mode => '500', n => 1);
sql("SELECT agentvm.terminate('$session')");
hurry_until($node, "SELECT retries > 2 FROM agentvm.session WHERE session_id = '$session'");
is(state_of($node, $session), 'terminating requested', 'an instance that took the place of one that somebody has ended is not forgotten');
like((events($node, $session))[-1]{error}, qr/an instance that AWS has launched for spot request \Q$request\E lives, but ending it is not allowed/, 'the log says why');
$faults->clear;
hurry_to($node, $session, 'terminated');
is(ends($vm, $request) . ' ' . ends($other, 'x'), 'cancel end end', 'until it may be ended');

# ---- where the id is not known: AWS has not told it, or the session was adopted and has no handle ----
for my $handle (q{handle || '{"request": "?"}'}, 'NULL')
{
	($session, $vm, $request) = ready();
	sql("UPDATE agentvm.session SET handle = $handle WHERE session_id = '$session'");
	$faults->set(action => 'DescribeInstances', mode => '500', n => 1);
	refuse('DescribeInstances', 'InvalidInstanceID.NotFound', n => 1);
	hurried($session, 'terminate', 'terminated');
	is(ends($vm, $request), 'cancel end', "the instance is asked: handle $handle");
	$faults->clear;
}
($one_time, $vm) = ready('acme');
sql("UPDATE agentvm.session SET handle = NULL WHERE session_id = '$one_time'");
my $cancels = $faults->count('CancelSpotInstanceRequests');
hurried($one_time, 'terminate', 'terminated');
is($faults->count('CancelSpotInstanceRequests'), $cancels, 'one that is one-time says so');

# ---- terminate() amid the launch; a launch whose answer is lost ----
my $before = $faults->count('RunInstances');
$faults->set(action => 'RunInstances', mode => 'slow', ms => 500, n => 1);
my $amid = launch($node, 'keeps');
asked('RunInstances', $before);
hurried($amid, 'terminate', 'terminated');
$faults->set(action => 'RunInstances', mode => 'lost', n => 1);
$faults->set(action => 'RunInstances', mode => 'drop');
$before = $faults->count('RunInstances', 'cloud');
my $lost = launch($node, 'keeps');
await_that(sub { $faults->count('RunInstances', 'cloud') > $before }, 'a launch has reached the cloud');
hurry_until($node, "SELECT retries > 0 FROM agentvm.session WHERE session_id = '$lost'");
hurried($lost, 'terminate', 'terminated');
is(ends(column($node, $_, 'vm_id'), 'x'), 'end', 'one that is ended amid its launch, or found by its tag, has had a VM') for $amid, $lost;
$faults->clear;

# ---- crashes amid each of the two calls ----
for my $action (qw(CancelSpotInstanceRequests TerminateInstances))
{
	($session, $vm, $request) = ready();
	my ($count, $taken) = ($faults->count($action), $faults->count($action, 'cloud'));
	$faults->set(action => $action, mode => 'slow', ms => 1000, n => 1);
	sql("SELECT agentvm.terminate('$session')");
	asked($action, $count);
	$node->stop('immediate');
	$node->start;
	hurry_to($node, $session, 'terminated');
	my $end = time + 10;    # one that was cut off may never come
	sleep 0.05 while $faults->count($action, 'cloud') < $taken + 2 && time < $end;
	like(ends($vm, $request), qr/^cancel.*end/, "a crash amid $action: cancelled, and ended");
	$faults->clear;
}

# ---- many at once, one of them with a request that AWS does not know ----
my @sessions = split /\n/, sql("SELECT agentvm.provision('keeps', profile => 'plain') FROM generate_series(1, 5)");
hurry_until($node, "SELECT count(*) FROM agentvm.session WHERE state = 'ready' AND session_id IN (" . list(@sessions) . ')', 5, name => 'five are ready');
expire(request($sessions[0]));
sql("UPDATE agentvm.session SET handle = handle || '{\"request\": \"sir-0123456789\"}' WHERE session_id = '$sessions[0]'");
my $since = time;
sql('SELECT agentvm.terminate(session_id) FROM agentvm.session WHERE session_id IN (' . list(@sessions) . ')');
hurry_until($node, "SELECT count(*) FROM agentvm.session WHERE state = 'terminated' AND session_id IN (" . list(@sessions) . ')', 5, name => 'and ended');
my @calls = grep { $_->{at} - $_->{seconds} >= $since } $faults->requests('CancelSpotInstanceRequests');
is(max(map { scalar grep { /^SpotInstanceRequestId/ } keys %{ $_->{args} } } @calls), 5, 'the requests are cancelled together');

# ---- without a session: inventory ends them, requests first, also where one of them is refused ----
sub sweep { return sql("SELECT agentvm.sweep_inventory('keeps')"); }
my @orphans = map { [ ready($_) ] } qw(keeps keeps keeps acme);
sql("BEGIN; UPDATE agentvm.session SET state = 'terminating', end_reason = 'requested', next_check_at = 'infinity' WHERE session_id = '$_->[0]';
	UPDATE agentvm.session SET state = 'terminated', ended_at = clock_timestamp(), next_check_at = NULL WHERE session_id = '$_->[0]'; COMMIT") for @orphans;
sql("UPDATE agentvm.session SET team_id = 'keeps' WHERE session_id = '$orphans[3][0]'");
refuse('CancelSpotInstanceRequests', 'UnauthorizedOperation', status => 403, match => $orphans[1][2]);
sweep();
await($node, "SELECT bool_and(launched_at < clock_timestamp() - interval '2.1 s') FROM agentvm.vm_drift WHERE kind = 'orphan'", 't', name => 'they are older than the grace, of which the cloud tells whole seconds');
sweep();
is(join(' | ', map { ends(@$_[ 1, 2 ]) } @orphans[ 0 .. 2 ]), 'cancel end |  | cancel end', 'orphans are ended, requests first, but for one whose request may not be cancelled');
is(ends($orphans[3][1], 'x'), 'end', 'and one-time ones just so');
$faults->clear;
sweep();
is(ends(@{ $orphans[1] }[ 1, 2 ]), 'cancel end', 'until it may');

# ---- interrupted: AWS has stopped it, and nobody else can start it ----
my $cluster = sql('SELECT installation_id FROM agentvm.installation');
($session, $vm, $request) = ready();
$faults->set(action => 'DescribeInstances', mode => 'body', body => instance($vm, 'stopped', 'Server.SpotInstanceShutdown', 'agentvm-cluster' => $cluster, 'agentvm-session-id' => $session), n => 2);
sweep();
$faults->clear;
hurry_to($node, $session, 'failed provider_lost spot interruption: Server.SpotInstanceShutdown: because');
is(ends($vm, $request), 'cancel end', 'an interruption ends the session, its request and its instance');
($session, $vm, $request) = ready();
$faults->set(action => 'DescribeInstances', mode => 'body', body => instance($vm, 'stopped', 'Server.SpotInstanceShutdown'), n => 1);
hurried($session, 'pause', 'failed provider_lost Server.SpotInstanceShutdown: because');
$faults->clear;
is(ends($vm, $request), 'cancel end', 'also one amid a pause');
($session, $vm, $request) = ready();
hurried($session, 'pause', 'paused');
is(sweep(), 0, 'one that we have stopped is no loss');

# ---- nothing is left: AWS has launched no other one in the place of any, which would have no tags ----
sql('SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE ended_at IS NULL');
hurry_until($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0);
my @instances = $moto->instances;
is(join(' ', map { $_->{id} } grep { !%{ $_->{tags} } } @instances), $other, 'nothing took the place of what has ended, but for that of which somebody else was the end');
is(scalar(grep { $_->{state} ne 'terminated' } @instances), 0, 'nothing is left');
done_testing();
