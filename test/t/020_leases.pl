# Leases: a reply counts only for its own lease, a launch outlives its worker and its session's end, and is one VM always
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(time);

my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.lease = '60s'\n");

# A launch whose answer takes its time; returns when the cloud has been asked
sub slow_launch
{
	my (%rule) = @_;
	my $before = $faults->count('RunInstances');
	$faults->set(action => 'RunInstances', n => 1, mode => 'slow', ms => 1500, %rule);
	my $session = launch($node, 'acme');
	asked($before);
	return $session;
}
sub asked
{
	my ($before) = @_;
	my $end = time + 30;
	Time::HiRes::sleep(0.01) while $faults->count('RunInstances') <= $before && time < $end;
	return;
}
sub lease_of { return $node->safe_psql('postgres', "SELECT lease FROM agentvm.session WHERE session_id = '$_[0]'"); }
sub tokens
{
	my ($session) = @_;
	my %seen = map { $_->{args}{ClientToken} => 1 } calls_for($faults, 'RunInstances', $session);
	return scalar keys %seen;
}

# Every claim has a number of its own; a reply to another one changes nothing
my $session = slow_launch();
my $lease = lease_of($session);
like($lease, qr/^\d+$/, 'the row is leased before the call');
psql_ok($node, "UPDATE agentvm.session SET lease = 4711, next_check_at = now() + interval '3 s' WHERE session_id = '$session'", 'somebody else holds the lease');
await($node, 'SELECT sum(stale_replies) FROM agentvm.stat_dispatcher', '1', name => 'the late reply is counted as stale');
is($node->safe_psql('postgres', "SELECT concat_ws(' ', state, vm_id, lease) FROM agentvm.session WHERE session_id = '$session'"),
	'provisioning 4711', 'and has changed nothing');
await_state($node, $session, 'ready');
is($faults->count('RunInstances'), 2, 'the next claim, when that lease had run out, asked again');
is(tokens($session), 1, 'with the same token');
is(scalar vms_of($moto, $session), 1, 'one VM');
is(column($node, $session, 'vm_id'), (vms_of($moto, $session))[0]{id}, 'which the row names');
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session WHERE lease IS NOT NULL'), 0, 'no lease is left when the work is done');

$session = slow_launch(ms => 3000, n => 2);
$lease = lease_of($session);
psql_ok($node, "UPDATE agentvm.session SET next_check_at = now() WHERE session_id = '$session'; SELECT agentvm.wake()", 'a lease runs out in mid-call');
await($node, "SELECT lease <> $lease FROM agentvm.session WHERE session_id = '$session'", 't', name => 'the next claim has a number of its own');
await_state($node, $session, 'ready');
await($node, 'SELECT sum(stale_replies) FROM agentvm.stat_dispatcher', '2', name => 'and the reply to the former one is stale');
is(scalar vms_of($moto, $session), 1, 'one VM');

# While the worker waits for an answer it holds nothing: no transaction, snapshot or lock
$session = slow_launch(ms => 6000);
await($node, "SELECT concat_ws(' ', state, xact_start, backend_xid, backend_xmin, (SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid)) FROM pg_stat_activity a WHERE backend_type = 'agentvm dispatcher'", 'idle 0', timeout => 4, name => 'no transaction, snapshot or lock in mid-call');
is($node->safe_psql('postgres', 'SELECT sum(in_flight) FROM agentvm.stat_dispatcher'), 1, 'which goes on');
await_state($node, $session, 'ready');

# What the log has of calls: those that change something, and failures; the others are but counted
my ($logged, @more) = events($node, $session);
is("$logged->{operation} $logged->{http_status} " . ($logged->{ms} >= 6000), 'RunInstances 200 1', 'a launch is in the log: what, how it ended, how long it took');
is(scalar @more, 0, 'and nothing else');
cmp_ok($faults->count('DescribeInstances'), '>', 0, 'though the cloud was asked more');
cmp_ok($node->safe_psql('postgres', "SELECT calls FROM agentvm.stat_provider WHERE operation = 'DescribeInstances'"), '>', 0, 'which is counted');
my $answer = '<Response><Errors><Error><Code>InternalError</Code><Message>later</Message></Error></Errors></Response>';
$faults->set(action => 'RunInstances', n => 1, mode => 'raw', head => "HTTP/1.1 500 X\r\nContent-Type: text/xml\r\nx-amzn-RequestId: 11d8e1a5-request\r\nContent-Length: " . length($answer) . "\r\n\r\n", piece => $answer);
$session = launch($node, 'acme', 'ready');
($logged) = events($node, $session);
is(join(' ', map { $logged->{$_} } qw(operation http_status error_class error request_id)), 'RunInstances 500 transient InternalError: later 11d8e1a5-request', 'so is one that has failed: with class, error and request id');

# terminate() while the launch is in flight
my $before = $faults->count('RunInstances');
$session = slow_launch();
is($node->safe_psql('postgres', "SELECT agentvm.terminate('$session')"), 't', 'terminate() in mid-launch');
is(state_of($node, $session), 'terminating requested', 'waits for the launch');
is($node->safe_psql('postgres', "SELECT lease IS NOT NULL AND next_check_at > now() + interval '30 s' FROM agentvm.session WHERE session_id = '$session'"),
	't', 'and leaves its lease alone');
await_state($node, $session, 'terminated');
is($faults->count('RunInstances'), $before + 1, 'launched once');
is(join(' ', map { $_->{state} } vms_of($moto, $session)), 'terminated', 'the VM that was launched is gone');
is(column($node, $session, 'vm_id'), (vms_of($moto, $session))[0]{id}, 'the row knows which it was');

# The worker ends in mid-call (never kill -9): another one takes over its lease at once
$before = $faults->count('RunInstances');
$session = slow_launch(ms => 3000);
my $pid = $node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher');
my $started = time;
psql_ok($node, "SELECT pg_terminate_backend($pid)", 'the dispatcher is told to end');
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE pid <> $pid", '1', name => 'another one starts by itself');
await_state($node, $session, 'ready');
cmp_ok(time - $started, '<', 20, 'long before the lease of 60 s has run out');
is($faults->count('RunInstances'), $before + 2, 'it asked again');
is(tokens($session), 1, 'with the same token');
is(scalar vms_of($moto, $session), 1, 'one VM');

# A worker that lives keeps its lease whatever others think of it
$session = slow_launch();
psql_ok($node, 'CALL agentvm.dispatch()', 'dispatch() beside it');
await_state($node, $session, 'ready');
is(scalar calls_for($faults, 'RunInstances', $session), 1, 'leaves it alone');

# Retries are kept in the row
$faults->set(action => 'RunInstances', n => 2, mode => '500');
$session = launch($node, 'acme');
foreach my $retry (1, 2)
{
	await($node, "SELECT retries >= $retry FROM agentvm.session WHERE session_id = '$session'", 't', name => "retry $retry is on the row");
	is($node->safe_psql('postgres', "SELECT lease IS NULL AND next_check_at BETWEEN now() AND now() + interval '4 s' AND detail ~ 'InternalError' "
		  . "FROM agentvm.session WHERE session_id = '$session' AND retries = $retry"), 't', 'with the time of the next try, and why');
}
await_state($node, $session, 'ready');
my @calls = calls_for($faults, 'RunInstances', $session);
is(join(' ', map { $_->{status} } @calls), '500 500 200', 'refused twice, then launched');
my @gaps = map { $calls[$_]{at} - $calls[ $_ - 1 ]{at} } 1, 2;
cmp_ok($gaps[0], '>', 0.45, 'the first pause is of 1 s, give or take a half');
cmp_ok($gaps[1], '>', 0.95, 'the second one of 2 s');
is(tokens($session), 1, 'never a new token');
is(scalar vms_of($moto, $session), 1, 'one VM');
is($node->safe_psql('postgres', "SELECT retries FROM agentvm.session WHERE session_id = '$session'"), 0, 'success clears the count');
is(column($node, $session, 'detail'), '', 'and the error');

done_testing();
