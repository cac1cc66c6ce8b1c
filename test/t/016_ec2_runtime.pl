# A VM reports with the token of its user data, beats, falls silent, and is taken away
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use JSON::PP;
use Test::More;

my ($node, $faults, $moto) = ec2_node();

sub bootstrap_sql
{
	my ($token, $session_token, $boot) = @_;
	return 'SELECT agentvm.bootstrap(' . bytea_hash($token) . ', ' . bytea_hash($session_token) . ", '$boot', '{\"hostname\": \"vm\"}')";
}
sub bootstrap { return as_gateway($node, bootstrap_sql(@_)); }
sub heartbeat { return as_gateway($node, 'SELECT agentvm.heartbeat(' . bytea_hash($_[0]) . ')'); }

# A session with a runtime whose VM has been launched, and its bootstrap token
sub booting
{
	my (@arguments) = @_;
	my $session = provision($node, 'acme', @arguments);
	return ($session, bootstrap_token($moto, await_vm($node, $session)));
}

# ---- bootstrap ----
my ($session, $token) = booting(q{env => '{"KEY": "v a l"}', repos => '[{"url": "https://git.example/a"}]'});
is(state_of($node, $session), 'provisioning', 'a running instance is not ready before its runtime says so');
my ($other, $other_token) = booting();
isnt($token, $other_token, 'every session has a token of its own');
is(bootstrap('0' x 64, 'mine', 'boot-1'), '', 'an unknown token: nothing');
my $answer = decode_json(bootstrap($token, 'mine', 'boot-1'));
is($answer->{session_id}, $session, 'bootstrap: the session');
is_deeply([ $answer->{env}, $answer->{repos} ], [ { KEY => 'v a l' }, [ { url => 'https://git.example/a' } ] ], 'env and repos arrive');
is(state_of($node, $session), 'ready', 'the session is ready');
is_deeply(decode_json(bootstrap($token, 'mine', 'boot-1')), $answer, 'the same again, after a lost reply: the same answer');
is(bootstrap($token, 'another', 'boot-1'), '', 'another hash: nothing');
is(bootstrap($token, 'mine', 'boot-2'), '', 'another boot: nothing');
is(bootstrap($other_token, 'mine', 'boot-1'), '', "another session's hash: nothing");
is(state_of($node, $other), 'provisioning', 'and that changed nothing');
is(as_gateway($node, 'SELECT agentvm.authenticate(' . bytea_hash('mine') . ')'), $session, 'the session token is known');
is(as_gateway($node, 'SELECT agentvm.authenticate(' . bytea_hash($token) . ')'), '', 'the bootstrap token is none');

# ---- heartbeats, and their deadline ----
is(heartbeat('mine'), column($node, $session, 'deadline_at'), 'a heartbeat is answered with the deadline');
$node->safe_psql('postgres', "SELECT agentvm.extend('$session', '10 minutes')");
is(heartbeat('mine'), column($node, $session, 'deadline_at'), 'with the new one after extend()');
is(heartbeat('unknown'), '', 'an unknown token: nothing');
is_deeply(decode_json(bootstrap($token, 'mine', 'boot-1'))->{env}, { KEY => 'v a l' }, 'a repeat is still answered in full');

# ---- silence ----
$node->safe_psql('postgres', q{SELECT agentvm.create_profile('short', 'ec2', heartbeat_timeout => '2 seconds')});
my ($silent, $silent_token) = booting("profile => 'short'");
bootstrap($silent_token, 'silent', 'boot-1');
heartbeat('silent');
await_state($node, $silent, 'terminated');
like(state_of($node, $silent), qr/^terminated heartbeat_timeout last heartbeat \d+ s ago$/, 'silence ends the session');
is(($moto->for_session($silent))[0]{state}, 'terminated', 'and the instance');
fails_with($node, 'SET ROLE agentvm_gateway; SELECT agentvm.heartbeat(' . bytea_hash('silent') . ')', 'AV006', qr/has ended/, 'a heartbeat after the end: AV006');
fails_with($node, 'SET ROLE agentvm_gateway; ' . bootstrap_sql($silent_token, 'silent', 'boot-1'), 'AV006', qr/has ended/, 'and so is a bootstrap');
is(state_of($node, $session), 'ready', 'others are not touched');

# ---- never reported; past its lifetime ----
$node->safe_psql('postgres', q{SELECT agentvm.create_profile('late', 'ec2', bootstrap_timeout => '1 second');
	SELECT agentvm.create_profile('brief', 'ec2', runtime => false, max_lifetime => '4 seconds')});
my ($late, $late_token) = booting("profile => 'late'");
await_state($node, $late, 'failed');
is(state_of($node, $late), 'failed bootstrap_timeout', 'who does not report in time has failed');
fails_with($node, 'SET ROLE agentvm_gateway; ' . bootstrap_sql($late_token, 'late', 'boot-1'), 'AV006', undef, 'and is told so when it does at last');
my $brief = launch($node, 'acme', 'ready', "profile => 'brief'");
await_state($node, $brief, 'terminated');
is(state_of($node, $brief), 'terminated max_lifetime', 'a lifetime ends');
is(join(' ', map { $_->{state} } vms_of($moto, $late, $brief)), 'terminated terminated', 'the instances are gone');

# ---- only the last attempt's token works ----
$faults->set(action => 'RunInstances', market => 'spot', mode => 'capacity', n => 3);
my ($moved, $moved_token) = booting();
my @tokens = map { my ($script) = MIME::Base64::decode_base64($_->{args}{UserData}); MIME::Base64::decode_base64($script =~ /^payload='(.*)'$/m) =~ /TOKEN=(\w+)/ }
  calls_for($faults, 'RunInstances', $moved);
is(scalar @tokens, 4, 'four attempts');
is($tokens[3], $moved_token, 'the instance has the last one');
is(bootstrap($_, 'moved', 'boot-1'), '', 'the token of an earlier attempt is void') for @tokens[ 0 .. 2 ];
is(decode_json(bootstrap($moved_token, 'moved', 'boot-1'))->{session_id}, $moved, 'the last one works');

# ---- a VM that reports before its launch was answered ----
$faults->set(action => 'RunInstances', mode => 'lost', n => 1);
$faults->set(action => 'RunInstances', mode => 'drop');
my $early = provision($node, 'acme');
await($node, "SELECT detail ~ 'NoReply' FROM agentvm.sessions WHERE session_id = '$early'");
my ($vm) = $moto->for_session($early);
bootstrap(bootstrap_token($moto, $vm->{id}), 'early', 'boot-1');
like(state_of($node, $early), qr/^ready/, 'it is ready');
$faults->clear;
$faults->set(action => 'RunInstances', mode => 'auth');
hurry_until($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$early' AND detail ->> 'error_class' = 'credentials'", 't', name => 'the repeat is refused');
like(state_of($node, $early), qr/^ready/, 'it stays ready: it is alive, whatever our keys may do');
$faults->clear;
is(await_vm($node, $early), $vm->{id}, 'the answer is fetched later');
heartbeat('early');

$node->safe_psql('postgres', 'SELECT agentvm.terminate(session_id) FROM agentvm.sessions');
await($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0);
is(scalar $moto->running, 0, 'nothing runs');
is($node->safe_psql('postgres', q{SELECT count(*) FROM agentvm.session_token WHERE kind = 'bootstrap' AND session_id NOT IN (SELECT session_id FROM agentvm.session)}), 0, 'no token without a session');
done_testing();
