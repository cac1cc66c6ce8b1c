# Answers that leave open whether the launch has happened: it is repeated to the byte, and there is one VM
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;

my ($node, $faults, $moto) = ec2_node();
my @one;    # sessions that must have one instance each

# What was sent for a session: how many calls, tokens and bodies
sub sent
{
	my ($session) = @_;
	my (%tokens, %bodies);
	my @calls = calls_for($faults, 'RunInstances', $session);
	foreach my $args (map { $_->{args} } @calls)
	{
		$tokens{ $args->{ClientToken} }++;
		$bodies{ join '&', map { "$_=$args->{$_}" } sort keys %$args }++;
	}
	return { calls => scalar @calls, tokens => scalar keys %tokens, bodies => scalar keys %bodies };
}

# The next n launches fail by a fault; the session, a runtime in it so that the user data carry a token, must come up all the same
sub survives
{
	my ($name, $n, %fault) = @_;
	$faults->set(action => 'RunInstances', n => $n, %fault);
	my $session = provision($node, 'acme');
	hurry_until($node, "SELECT vm_id IS NOT NULL FROM agentvm.sessions WHERE session_id = '$session'", 't', name => "$name: launched in the end");
	my $sent = sent($session);
	cmp_ok($sent->{calls}, '>=', 2, "$name: sent again");
	is($sent->{tokens}, 1, "$name: with the same client token");
	is($sent->{bodies}, 1, "$name: and the very same bytes");
	is(column($node, $session, 'attempt'), 1, "$name: it is one attempt");
	is(column($node, $session, 'detail IS NULL OR state = $$provisioning$$'), 't', "$name: no session fails of it");
	push @one, $session;
	$faults->clear;
	return $session;
}

survives('lost reply', 1, mode => 'lost');
is($faults->count('RunInstances', 'replayed'), 1, 'the cloud saw the token twice');
survives('dropped before', 1, mode => 'drop');
my $session = survives('500', 2, mode => '500');
like((events($node, $session))[0]{error}, qr/^InternalError: /, '500: the failed call is in the log of the session');
survives('502 in HTML', 1, mode => 'html');
survives('half an answer', 1, mode => 'truncated');
survives('HTML as a success', 1, mode => 'body', status => 200, body => '<html>welcome to the hotel</html>');
survives('another document', 1, mode => 'body', status => 200, body => '<?xml version="1.0"?><DescribeInstancesResponse/>');
survives('a success without words', 1, mode => 'body', status => 200, body => '');
survives('throttled', 2, mode => 'throttle');
survives('429', 1, mode => 'error', status => 429, code => 'TooManyRequestsException');

# an entity bomb and an answer without end are refused, not swallowed
survives('entities', 1, mode => 'body', status => 200, body => '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]><RunInstancesResponse><instancesSet><item>'
	  . '<instanceId>i-1&a;</instanceId></item></instancesSet></RunInstancesResponse>');
survives('2 MiB', 1, mode => 'body', status => 200, body => 'x' x 1024, repeat => 2048);

# a success that names no instance but something else is no success
survives('odd id', 1, mode => 'body', status => 200,
	body => '<RunInstancesResponse><instancesSet><item><instanceId>i-1; DROP TABLE</instanceId></item></instancesSet></RunInstancesResponse>');

# throttling is a fault of the account, not of the session: still counted, never given up for
is($node->safe_psql('postgres', q{SELECT throttled >= 2 AND transient >= 5 FROM agentvm.stat_provider WHERE operation = 'RunInstances'}),
	't', 'errors are counted by class');

# the refusal of a repeat says nothing about the first send: the instance is looked for, and ended
$node->append_conf('postgresql.conf', "agentvm.lease = '2s'\nagentvm.launch_settle = '2s'\n");
$node->reload;
$faults->set(action => 'RunInstances', mode => 'lost', n => 1);
$faults->set(action => 'RunInstances', mode => 'error', code => 'AuthFailure', message => 'no');
$session = launch($node, 'acme');
hurry_to($node, $session, 'failed');
like(state_of($node, $session), qr/^failed \w+ AuthFailure: no$/, 'AuthFailure after a lost reply: failed');
$faults->clear;
is(join(' ', map { $_->{state} } vms_of($moto, $session)), 'terminated', 'the instance of the lost reply was found and ended');

# no capacity for a repeat means none for the first send: a token that has launched is answered with its instance
$faults->set(action => 'RunInstances', mode => 'lost', n => 1);
$faults->set(action => 'RunInstances', mode => 'capacity');
$session = launch($node, 'acme', 'ready');
is(column($node, $session, "purchase || ' ' || attempt"), 'spot 1', 'lost reply, then no capacity: the first attempt was good');
push @one, $session;
$faults->clear;

my %count;
$count{ $_->{tags}{'agentvm-session-id'} }++ for vms_of($moto, @one);
is(join(' ', map { $count{$_} // 0 } @one), join(' ', (1) x @one), 'one VM for every session, in any state');
is($faults->count('RunInstances', 'mismatched'), 0, 'no token was ever used with other parameters');
done_testing();
