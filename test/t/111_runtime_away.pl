# agentvm-runtime when others fail it: lost answers, a gateway or a database that is away, answers that make no sense;
# and the machine's own end
use strict;
use warnings;
use AgentVM::FakeGateway;
use AgentVM::Gateway;
use AgentVM::Runtime;
use AgentVM::Test;
use AgentVM::VM;
use IO::Socket::INET;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_node('main', conf => "agentvm.heartbeat_interval = 1\nagentvm.heartbeat_timeout = 600\nagentvm.deadman_allowance = 700\nagentvm.deadline_grace = 2\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $gateway = AgentVM::Gateway->new($node);
my $url = $gateway->url;
my $token = 'f' x 64;

# One that is refused all the time: when it tries again is looked at in the end
my $refusing = AgentVM::FakeGateway->new(sub { return (503, {}, '') });
my $refused = AgentVM::VM->new($refusing->url, $token, BOOTSTRAP_INTERVAL => 0.5, BOOTSTRAP_TRIES => 24)->start;

sub launched
{
	my (@arguments) = @_;
	my $id = provision($node, 'acme', 'options => \'{"runtime": true}\'', @arguments);
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$id'", 't', name => 'a session with a runtime');
	return $id;
}
sub vm_of
{
	my ($id, %settings) = @_;
	my $vm = AgentVM::VM->new($url, bootstrap_token($node, $id), %settings)->start;
	await_state($node, $id, 'ready');
	return $vm;
}
sub beats_again
{
	my ($id, $name) = @_;
	my $last = $node->safe_psql('postgres', "SELECT coalesce(last_heartbeat_at, '-infinity') FROM agentvm.sessions WHERE session_id = '$id'");
	return await($node, "SELECT last_heartbeat_at > '$last' FROM agentvm.sessions WHERE session_id = '$id'", 't', name => $name);
}

# ---- the gateway says what time it is: by that deadlines are meant ----
my $dated = qr/^Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r?$/mi;
for ([ "POST /v1/heartbeat HTTP/1.1\r\n", "Content-Length: 2\r\n\r\n{}", qr/^HTTP\/1.1 401/ ],
	[ "GET /v1/channel HTTP/1.1\r\n", "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: agentvm.v1\r\n\r\n", qr/^HTTP\/1.1 101/ ])
{
	my ($line, $rest, $status) = @$_;
	my $client = IO::Socket::INET->new(PeerAddr => '127.0.0.1:' . $gateway->port) or die "could not connect: $!";
	print {$client} "${line}Host: localhost\r\nAuthorization: Bearer $token\r\n$rest";
	my $answer = '';
	$answer .= $_ // last while $answer !~ /\r\n\r\n/ && defined($_ = <$client>);
	like($answer, $status, 'an answer');
	like($answer, $dated, 'with a date');
}

# ---- a lost reply: the bootstrap commits when nobody waits for it any more ----
my $id = launched();
my $holder = $node->background_psql('postgres');
$holder->query_safe('BEGIN; LOCK TABLE agentvm.session_heartbeat IN EXCLUSIVE MODE');
my $vm = AgentVM::VM->new($url, bootstrap_token($node, $id))->start;
await($node, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'gw' AND wait_event_type = 'Lock'", 1, name => 'a bootstrap is under way');
$gateway->stop('KILL');
$holder->query_safe('COMMIT');
$holder->quit;
await_state($node, $id, 'ready', name => 'it has happened');
$vm->says(qr/bootstrap has not worked/, 'but the runtime has not heard of it');
$gateway->start;
$vm->says(qr/on duty/, 'the same bootstrap again gets the answer');
is(decode_json($vm->file('state/session.json'))->{session_id}, $id, 'the same session');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session_token WHERE session_id = '$id' AND kind = 'session'"), 1, 'with one session token');
beats_again($id, 'it beats');

# ---- away and back ----
$gateway->stop('KILL');
$vm->says(qr/heartbeat was not taken/, 'the gateway is gone');
$gateway->start;
beats_again($id, 'it is back, and so are the heartbeats');
$vm->says(qr/(channel is open.*){2}/s, 'and the channel');
$node->stop('immediate');
$vm->says(qr/heartbeat was not taken" status=503/, 'the database is gone');
$node->start;
beats_again($id, 'it is back');
$gateway->signal('STOP');
$vm->says(qr/not taken" reason=timeout/, 'a gateway that hangs');
$gateway->signal('CONT');
beats_again($id, 'it goes on');
$vm->stop;
$vm->start;
$gateway->stop('KILL');
$vm->says(qr/not taken/, 'a runtime that starts without gateway');
ok($vm->is_running, 'waits for one');
$gateway->start;
beats_again($id, 'and has it');
ok(!$vm->is_off, 'none of this ends the machine');
is($vm->stop, 0);

# ---- the deadline: the control plane is gone before it ----
$id = launched("max_lifetime => '8 s'");
$vm = vm_of($id);
beats_again($id, 'it knows its deadline');
$gateway->stop('KILL');
my $deadline = $node->safe_psql('postgres', "SELECT extract(epoch FROM deadline_at) FROM agentvm.sessions WHERE session_id = '$id'");
$vm->goes_off('the machine ends itself');
cmp_ok(time, '>=', $deadline + 2, 'after its deadline and the grace');
like($vm->output, qr/powers itself off" reason="its deadline has passed"/, 'for that');
$vm->says(qr/powers itself off/, 'it stays until it is off');
ok($vm->is_running, 'the runtime does not end before');
my $end = time + 60;
sleep 0.1 until time > $end || $vm->file('off') =~ /off.*off/s;
like($vm->file('off'), qr/off.*off/s, 'and tries again');
$vm->stop;

# ---- no control plane for the allowance ----
$node->append_conf('postgresql.conf', "agentvm.deadman_allowance = 6\n");
$node->reload;
$gateway->start;
$id = launched();
$vm = vm_of($id);
beats_again($id, 'a heartbeat') for 1 .. 8;
ok(!$vm->is_off, 'heartbeats keep it on');
$gateway->stop('KILL');
my $gone = time;
$vm->goes_off('without gateway it ends itself');
cmp_ok(time - $gone, '>', 3, 'when the allowance is used up');
like($vm->output, qr/powers itself off" reason="the control plane has been gone for too long"/, 'for that');
$vm->stop;
# a restart of the runtime does not begin it anew: some time has passed meanwhile
unlink $vm->dir . '/off';
my $contact = decode_json($vm->file('state/times.json'))->{contact};
$vm->start->goes_off('started again, it ends the machine again');
is(decode_json($vm->file('state/times.json'))->{contact}, $contact, 'a restart does not begin it anew');
$vm->stop;

# it counts from the first start on where there never was one; then tries are counted, too
my $lonely = AgentVM::VM->new('http://127.0.0.1:1', $token, DEADMAN_ALLOWANCE => 1)->start;
$lonely->goes_off('no bootstrap, no machine');
$lonely->stop;
# its clock is the one that goes on while a machine is suspended: here both are far apart
SKIP:
{
	my @suspended = qw(unshare --user --map-root-user --time --boottime 1000000);
	skip 'no time namespaces here', 1 if system("@suspended true 2>/dev/null") != 0;
	my $woken = AgentVM::VM->new('http://127.0.0.1:1', $token, DEADMAN_ALLOWANCE => 1);
	unshift @{ $woken->{command} }, @suspended;
	$woken->start->goes_off('the time of a suspension counts');
	$woken->stop;
}
my $tries = AgentVM::VM->new('http://127.0.0.1:1', $token, BOOTSTRAP_TRIES => 3)->start;
$tries->exits(1, 'tries are used up: exit code 1');
is(scalar(() = $tries->output =~ /bootstrap has not worked/g), 3, 'after as many as it should');

# ---- what a gateway may say ----
my $date = \&AgentVM::FakeGateway::date;
my $iso = \&AgentVM::FakeGateway::iso;
my $boot = \&AgentVM::FakeGateway::boot_answer;

# its clock is three hours ahead of ours: only it counts
my $off_at = time + 6;
my $fake = AgentVM::FakeGateway->new(sub {
	my ($request) = @_;
	my %clock = $date->(time + 3 * 3600);
	return (200, {%clock}, $boot->(deadline => $iso->(time + 4 * 3600))) if $request->{path} eq '/v1/bootstrap';
	return (404, {%clock}, '{}') if $request->{path} eq '/v1/channel';
	return (200, {%clock}, encode_json({ deadline => $iso->($off_at + 3 * 3600) }));
});
$vm = AgentVM::VM->new($fake->url, $token)->start;
$vm->says(qr/channel cannot be had/, 'a gateway without channel');
$vm->says(qr/first heartbeat acknowledged" by=POST/, 'is beaten by POST');
$vm->goes_off('a deadline is one of the server\'s clock');
cmp_ok(time, '>=', $off_at - 1, 'and comes when that says so');
like($vm->output, qr/its deadline has passed/, 'for that');
$vm->stop;
my @sent = $fake->requests('/v1/heartbeat');
is($sent[0]{headers}{authorization}, 'Bearer ' . decode_json($vm->file('state/session.json'))->{session_token}, 'it sends its session token');
$fake->stop('KILL');
# ... or two hours behind
$fake = AgentVM::FakeGateway->new(sub {
	my ($request) = @_;
	my %clock = $date->(time - 2 * 3600);
	return (200, {%clock}, $boot->(deadline => $iso->(time - 3600))) if $request->{path} eq '/v1/bootstrap';
	return (404, {%clock}, '{}') if $request->{path} eq '/v1/channel';
	return (200, {%clock}, encode_json({ deadline => $iso->(time - 3600) }));
});
$vm = AgentVM::VM->new($fake->url, $token)->start;
$end = time + 60;
sleep 0.1 until time > $end || $fake->requests('/v1/heartbeat') > 3;
cmp_ok(scalar($fake->requests('/v1/heartbeat')), '>', 3, 'a clock that is behind: it beats');
ok(!$vm->is_off && $vm->is_running, 'and is not off');
$vm->stop;
$fake->stop('KILL');

# answers that make no sense are no answers; a redirect is not followed; the last one is good
my $elsewhere = AgentVM::FakeGateway->new(sub { return (200, {}, '{}') });
my @answers = ([ 200, {}, '' ], [ 200, {}, '[]' ], [ 200, {}, '{"session_id": 1' ], [ 200, {}, $boot->(session_id => "x\n") ], [ 200, {}, $boot->(heartbeat_interval_s => 0) ],
	[ 200, {}, $boot->(heartbeat_interval_s => 1e300) ], [ 200, {}, $boot->(heartbeat_interval_s => 86401) ], [ 200, {}, $boot->(deadman_allowance_s => -1) ], [ 200, {}, $boot->(deadman_allowance_s => 30 * 86400 + 1) ],
	[ 200, {}, $boot->(deadline_grace_s => -1) ], [ 200, {}, $boot->(deadline_grace_s => 86401) ], [ 200, {}, $boot->(env => { 'A=B' => 'x' }) ], [ 200, {}, $boot->(deadline => 'soon') ], [ 200, {}, $boot->(channel => 'http://x/') ],
	[ 200, {}, $boot->(env => []) ], [ 200, {}, $boot->(env => { A => 1 }) ], [ 200, {}, $boot->(repos => [ {} ]) ], [ 200, {}, $boot->(env => { A => 'x' x (1024 * 1024) }) ],
	[ 302, { Location => $elsewhere->url . '/v1/bootstrap' }, '' ], [ 307, { Location => $elsewhere->url . '/v1/bootstrap' }, '' ], [ 404, {}, '' ], [ 500, {}, 'x' x 100000 ], [ 429, {}, '' ],
	[ 503, { 'Retry-After' => 2 }, '' ], [ 200, {}, $boot->(env => { BIG => 'x' x (900 * 1024) }) ]);
$fake = AgentVM::FakeGateway->new(sub {
	my ($request) = @_;
	return $request->{path} eq '/v1/bootstrap' ? @{ $answers[ $request->{number} - 1 ] } : (410, {}, '');
});
$vm = AgentVM::VM->new($fake->url, $token, BOOTSTRAP_INTERVAL => 0.05)->start;
$vm->exits(0, 'bootstrap worked in the end; then 410');
my @tried = $fake->requests('/v1/bootstrap');
is(scalar(@tried), scalar(@answers), 'each answer was asked for');
is(scalar(() = $vm->output =~ /bootstrap has not worked/g), @answers - 1, 'all but the last were refused');
is_deeply([ $elsewhere->requests ], [], 'nobody was redirected');
cmp_ok($tried[-1]{at} - $tried[-2]{at}, '>=', 1.9, 'Retry-After is honoured');
is(length(decode_json($vm->file('state/env.json'))->{BIG}), 900 * 1024, 'a large answer arrives whole');
my @bodies = map { decode_json($_->{body}) } @tried;
is_deeply($bodies[-1], $bodies[0], 'each try says the same');
is_deeply([ sort keys %{ $bodies[0] } ], [qw(boot_id hostname runtime_version session_token_sha256)], 'what the protocol says');
$fake->stop('KILL');

# Retry-After counts for heartbeats, too; what another boot has left of its times does not
$fake = AgentVM::FakeGateway->new(sub {
	my ($request) = @_;
	return (200, {}, $boot->()) if $request->{path} eq '/v1/bootstrap';
	return (404, {}, '') if $request->{path} eq '/v1/channel';
	return $request->{number} == 1 ? (503, { 'Retry-After' => 3 }, '') : (200, {}, encode_json({ deadline => $iso->(time + 3600) }));
});
$vm = AgentVM::VM->new($fake->url, $token)->start;
$vm->says(qr/first heartbeat acknowledged/, 'a heartbeat is taken at the second try');
@sent = $fake->requests('/v1/heartbeat');
cmp_ok($sent[1]{at} - $sent[0]{at}, '>=', 2.9, 'not before it may');
$vm->stop;
$vm->write_settings(BOOTSTRAP_TOKEN => undef);
my $times = decode_json($vm->file('state/times.json'));
unlink $vm->dir . '/state/times.json';
append_to_file($vm->dir . '/state/times.json', encode_json({ boot_id => 'another', contact => -1_000_000_000, deadline => 0 }));
$vm->start->says(qr/first heartbeat acknowledged/, 'it beats after a reboot');
ok(!$vm->is_off, 'and is not off');
is(decode_json($vm->file('state/times.json'))->{boot_id}, $times->{boot_id}, 'since its times are those of this boot');
$vm->stop;
$fake->stop('KILL');

# a session token that is not known: nobody of ours; the machine ends itself
$fake = AgentVM::FakeGateway->new(sub {
	my ($request) = @_;
	return $request->{path} eq '/v1/bootstrap' ? (200, {}, $boot->(deadman_allowance_s => 2)) : (401, {}, '');
});
$vm = AgentVM::VM->new($fake->url, $token)->start;
$vm->goes_off('a session token that is refused is no contact');
$vm->stop;
$fake->stop('KILL');

# a channel that opens and then says nothing, or nothing that makes sense
my @frames = ('x', '{}', '[]', '{"type": 1}', '{"type": "later", "more": [1]}', '{"type": "deadline"}', '{"type": "deadline", "deadline": "soon"}', '');
$fake = AgentVM::FakeGateway->new(sub {
	my ($request) = @_;
	my $number = $request->{number};
	return (200, {}, $boot->()) if $request->{path} eq '/v1/bootstrap';
	return (200, {}, encode_json({ deadline => $iso->(time + 3600) })) if $request->{path} eq '/v1/heartbeat';
	return (101, {}, $number == 1 ? [ @frames, '{"type": "hello"}', @frames ] : $number == 2 ? [ '{"type": "hello"}', 'x' x 70000 ] : [ '{"type": "hello"}', '{"type": "gone"}' ]);
});
$vm = AgentVM::VM->new($fake->url, $token, HTTP_TIMEOUT => 1)->start;
$vm->exits(0, 'a channel says that the session is gone');
like($vm->output, qr/(frame makes no sense.*){6}channel is open.*made anew.*channel was closed" reason="?frame is too large/s, 'frames without sense, no acknowledgement, a frame that is too large');
cmp_ok(scalar($fake->requests('/v1/heartbeat')), '>=', 1, 'a heartbeat that the channel does not acknowledge goes by POST');
is(scalar($fake->requests('/v1/channel')), 3, 'and the channel is made anew');
$fake->stop('KILL');

# user and password of a repository: for git only, in no argument
$fake = AgentVM::FakeGateway->new(sub {
	my ($request) = @_;
	return (200, {}, $boot->(repos => [ { url => "http://joe:pass%40word\@$request->{headers}{host}/private.git" } ])) if $request->{path} eq '/v1/bootstrap';
	return (404, {}, '') if $request->{path} =~ m{^/v1/};
	my $seen = join('', map { eval { slurp_file($_) } // '' } glob('/proc/[0-9]*/cmdline'));
	return (403, {}, '') if $request->{headers}{authorization} && $seen =~ /pass\@word|pass%40word/;
	return $request->{headers}{authorization} ? (404, {}, '') : (401, { 'WWW-Authenticate' => 'Basic realm="git"' }, '');
});
$vm = AgentVM::VM->new($fake->url, $token)->start;
$vm->says(qr/was not cloned" url=\S+private.git reason="git clone failed" git="?[^\n]*not found/, 'git has asked');
my ($asked) = grep { $_->{path} =~ /private/ && $_->{headers}{authorization} } $fake->requests;
is($asked->{headers}{authorization}, 'Basic am9lOnBhc3NAd29yZA==', 'with user and password');
$vm->stop;
$fake->stop('KILL');

# one whose server says nothing
my $mute = IO::Socket::INET->new(Listen => 5, LocalAddr => '127.0.0.1') or die "could not listen: $!";
$fake = AgentVM::FakeGateway->new(sub {
	my ($request) = @_;
	return (200, {}, $boot->(repos => [ { url => 'http://127.0.0.1:' . $mute->sockport . '/mute.git' } ])) if $request->{path} eq '/v1/bootstrap';
	return (404, {}, '');
});
$vm = AgentVM::VM->new($fake->url, $token, CLONE_TIMEOUT => 1)->start;
$vm->says(qr/was not cloned" url=\S+mute.git reason="git was killed"/, 'git is given so much time');
$vm->stop;
$fake->stop('KILL');

# not all of those that have lost a gateway come back at once
$refused->exits(1, 'tries, with time between them');
my @times = map { $_->{at} } $refusing->requests('/v1/bootstrap');
my @between = sort { $a <=> $b } map { $times[$_] - $times[ $_ - 1 ] } 1 .. $#times;
is(scalar(@times), 24, 'as many as were set');
cmp_ok($between[0], '>=', 0.39, sprintf 'at least four fifths of the interval apart: %.3f s', $between[0]);
cmp_ok($between[0], '<', 0.49, 'but not the interval itself');
$refusing->stop('KILL');

done_testing();
