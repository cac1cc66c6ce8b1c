# A gateway in trouble: few descriptors, names that do not resolve, ends that nobody told it, neighbours who invent tokens
use strict;
use warnings;
use AgentVM::Gateway;
use AgentVM::Process;
use AgentVM::Runtime;
use AgentVM::Test;
use Digest::SHA qw(sha256_hex);
use HTTP::Tiny;
use IO::Select;
use IO::Socket::INET;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use POSIX qw(sysconf _SC_CLK_TCK);
use Test::More;
use Time::HiRes qw(sleep time);
use Time::Piece ();

my $timeout = AgentVM::Process::timeout();
my $node = new_node('main');
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $gateway = AgentVM::Gateway->new($node, options => [ '--unauthenticated-rate', 5, '--unauthenticated-lookups', 20 ]);
my @command = @{ $gateway->{command} };
my $http = HTTP::Tiny->new(timeout => $timeout);

# Another gateway: options after the usual ones, by way of a shell's command if one is given
sub other
{
	my ($shell, @options) = @_;
	my $port = PostgreSQL::Test::Cluster::get_free_port();
	my @arguments = (@command, '--port', $port, @options);
	my $other = AgentVM::Process->new('other', $shell ? ('sh', '-c', "$shell; exec \"\$@\"", 'sh', @arguments) : @arguments);
	$other->{port} = $port;
	$other->{url} = "http://127.0.0.1:$port";
	return $other;
}
# Wait for something; whether it came to be
sub until_true { my ($true) = @_; my $end = time + $timeout; sleep 0.02 until $true->() || time > $end; return $true->(); }
sub status { my ($url) = @_; return $http->get($url)->{status}; }
sub metric { my ($of, $name) = @_; return $http->get("$of->{url}/metrics")->{content} =~ /^agentvm_gateway_$name (\S+)$/m ? $1 : undef; }
sub connected { my ($port, %opt) = @_; return IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port, Timeout => $timeout, %opt) // die "could not connect: $@"; }
sub cpu { my ($pid) = @_; my @fields = split / /, slurp_file("/proc/$pid/stat") =~ s/.*\) //sr; return ($fields[11] + $fields[12]) / sysconf(_SC_CLK_TCK); }
sub lines { my ($of) = @_; return scalar(() = $of->output =~ /\n/g); }
# Those of the connections that the other side has closed
sub closed { return grep { IO::Select->new($_)->can_read(0) && !sysread($_, my $byte, 1) } @_; }

my $tokens = 0;
sub invented { return sha256_hex('invented ' . ++$tokens); }
sub request { my ($path, $token, $body) = @_; return "POST $path HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer $token\r\nContent-Length: " . length($body) . "\r\n\r\n$body"; }
sub bootstrap_body { my ($token) = @_; return '{"boot_id": "b", "session_token_sha256": "' . sha256_hex($token) . '"}'; }
sub session
{
	my $id = provision($node, 'acme', 'options => \'{"runtime": true}\'');
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$id'", 't', name => 'a session');
	return { id => $id, token => invented() };
}
sub reports { my ($vm, $to) = @_; return is($http->post("$to->{url}/v1/bootstrap", { headers => { authorization => 'Bearer ' . bootstrap_token($node, $vm->{id}) }, content => bootstrap_body($vm->{token}) })->{status}, 200, 'bootstrap'); }

# ---- a channel ----
sub channel
{
	my ($port, $token) = @_;
	my $socket = connected($port);
	syswrite($socket, "GET /v1/channel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Protocol: agentvm.v1\r\nAuthorization: Bearer $token\r\n\r\n");
	return { socket => $socket, in => '' };
}
# Whether it says so, in time
sub hears
{
	my ($channel, $like) = @_;
	my $end = time + $timeout;
	while ($channel->{in} !~ $like && time < $end)
	{
		next unless IO::Select->new($channel->{socket})->can_read($end - time);
		sysread($channel->{socket}, $channel->{in}, 4096, length($channel->{in})) or last;
	}
	return $channel->{in} =~ $like;
}
sub close_code { my ($code) = @_; my $frame = "\x88\x02" . pack('n', $code); return qr/\Q$frame\E/; }

# ---- many requests at once: each connection has its way to make the next one, undef for none ----
sub start_flood
{
	my ($port, $count, %opt) = @_;
	return map { { socket => connected($port, %opt), next => sub { return request('/v1/heartbeat', invented(), '{}'); } } } 1 .. $count;
}
sub ask { my ($one) = @_; my $text = $one->{next}->() // return; $one->{in} = ''; $one->{asked} = time; return syswrite($one->{socket}, $text); }
# Go on until it is true, or the time is over
sub go_on
{
	my ($all, $until) = @_;
	my %of = map { fileno($_->{socket}) => $_ } @$all;
	my $select = IO::Select->new(map { $_->{socket} } @$all);
	my $end = time + $timeout;
	until ($until->() || time > $end)
	{
		for my $socket ($select->can_read(0.1))
		{
			my $one = $of{ fileno($socket) };
			sysread($socket, $one->{in}, 65536, length($one->{in})) or die 'hung up on';
			next unless $one->{in} =~ /^HTTP\/1.1 (\d+) .*?\r\ncontent-length: (\d+)\r\n.*?\r\n\r\n(.*)$/si && length($3) >= $2;
			$one->{status} = $1;
			$one->{statuses}{$1}++;
			$one->{retry} = $one->{in} =~ /\r\nretry-after: (\d+)\r\n/i ? $1 : undef;
			$one->{took} = time - $one->{asked};
			ask($one);
		}
	}
	return;
}
# What one asks once, and what the answer is, in a flood of others
sub in_flood
{
	my ($flood, $port, $text, %opt) = @_;
	my @texts = ($text);
	my $one = { socket => connected($port, %opt), next => sub { return shift @texts; } };
	ask($one);
	go_on([ @$flood, $one ], sub { return $one->{status}; });
	return $one;
}

# ---- who may read /metrics ----
is(status($gateway->url . '/metrics'), 200, '/metrics is for this host');
for ([ '127.0.0.2', 404 ], [ '127.0.0.2/31', 404 ], [ '127.0.0.0/31', 200 ], [ '::1,127.0.0.1', 200 ], [ '0.0.0.0/0', 200 ], [ '::/0', 200 ], [ '::1', 404 ], [ '126.0.0.0/7', 200 ], [ '124.0.0.0/7', 404 ])
{
	my ($networks, $expected) = @$_;
	my $other = other('', '--metrics-from', $networks)->start;
	until_true(sub { return status("$other->{url}/healthz") == 200 });
	is(status("$other->{url}/metrics"), $expected, "--metrics-from=$networks: $expected");
	$other->stop;
}
for my $bad ('localhost', '127.0.0.1/33', '::1/129', '127.0.0.1/', '127.0.0.1/x', '127.0.0.1,,::1', '1' x 100)
{
	my ($out, $error) = run_command([ @command, '--check', '--metrics-from', $bad ]);
	like($error, qr/not a list of networks/, "--metrics-from=$bad");
}

# ---- a host whose name does not resolve ----
chomp(my $libraries = `pg_config --pkglibdir`);
my $library = "$libraries/agentvm_test_names.so";
SKIP: {
	skip 'built for a checker, which has to be preloaded first', 4 if slurp_file($library) =~ /__asan_/;
	my $slow = other('', '--database', 'host=slow.test dbname=postgres user=gw');
	my $started = time;
	$slow->start(LD_PRELOAD => $library);
	ok(until_true(sub { return threads($slow->pid) && status("$slow->{url}/healthz") == 200 }), 'it serves while a thread looks for the name');
	is(status("$slow->{url}/readyz"), 503, 'without its database');
	is($slow->stop, 0, 'and can be ended');
	cmp_ok(time - $started, '<', 15, 'before the name is given up');
}
my $lists = other('ulimit -c unlimited || :', '--database', 'host=localhost,' . $node->host . ' port=1,' . $node->port . ' dbname=postgres user=gw')->start;
ok(until_true(sub { return status("$lists->{url}/readyz") == 200 }), 'of several hosts it takes the one that is there');
# a core would hold tokens
like(slurp_file('/proc/' . $lists->pid . '/limits'), qr/^Max core file size +0 +0 /m, 'it leaves no core, however it was started');
$lists->stop;

# ---- its clock is wrong: deadlines are meant by the database's, which Date tells ----
SKIP: {
	skip 'built for a checker, which has to be preloaded first', 4 if slurp_file($library) =~ /__asan_/;
	my $ahead = other('', '--database', $node->connstr('postgres') . ' user=gw')->start(LD_PRELOAD => glob('/usr/lib/*/faketime/libfaketime.so.1'), FAKETIME => '+3h', FAKETIME_DONT_FAKE_MONOTONIC => 1);
	ok(until_true(sub { return status("$ahead->{url}/readyz") == 200 }), 'three hours ahead');
	my $says = sub { my ($reply) = @_; return abs(Time::Piece->strptime($reply->{headers}{date}, '%a, %d %b %Y %T GMT')->epoch - $node->safe_psql('postgres', 'SELECT extract(epoch FROM clock_timestamp())')); };
	cmp_ok($says->($http->get("$ahead->{url}/healthz")), '<', 60, 'it tells the time of the database');
	my $vm = session();
	reports($vm, $ahead);
	cmp_ok($says->($http->post("$ahead->{url}/v1/heartbeat", { headers => { authorization => "Bearer $vm->{token}" } })), '<', 60, 'with heartbeats, too');
	$ahead->stop;
}

# ---- sessions that end while it has no database ----
my ($attached, $detached, $living) = map { session() } 1 .. 3;
reports($_, $gateway) for $attached, $detached, $living;
my $channel = channel($gateway->port, $attached->{token});
my $other_channel = channel($gateway->port, $living->{token});
ok(hears($_, qr/"hello"/), 'a channel') for $channel, $other_channel;
my $beats = metric($gateway, 'heartbeats_total');
$node->safe_psql('postgres', "ALTER ROLE gw NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'gw'");
ok(until_true(sub { return status($gateway->url . '/readyz') == 503 }), 'its database is away');
$node->safe_psql('postgres', "SELECT agentvm.terminate('$_->{id}')") for $attached, $detached;
await_state($node, $_->{id}, 'terminated') for $attached, $detached;
$node->safe_psql('postgres', 'ALTER ROLE gw LOGIN');
ok(until_true(sub { return status($gateway->url . '/readyz') == 200 }), 'and there again');
my $back = time;
ok(hears($channel, close_code(4410)), 'the channel of a session that has ended is closed, without a heartbeat');
cmp_ok(time - $back, '<', 5, sprintf('soon: %.2f s', time - $back));
like($gateway->output, qr/session has ended" session=$detached->{id}/, 'it knows of the one without a channel, too');
ok(hears(channel($gateway->port, $detached->{token}), close_code(4410)), 'which does not get one any more');
ok(until_true(sub { return metric($gateway, 'channels') == 1 }), 'the one of a session that lives stays');
unlike($other_channel->{in}, qr/gone/, 'unasked');
is(metric($gateway, 'heartbeats_total'), $beats, 'nobody has beaten for it');

# ---- neighbours who invent tokens ----
my ($stranger, $newcomer) = map { session() } 1 .. 2;
my $elsewhere = AgentVM::Gateway->new($node);
reports($stranger, $elsewhere);
$elsewhere->stop;
my @flood = start_flood($gateway->port, 60);
my $began = time;
ask($_) for @flood;
go_on(\@flood, sub { return time - $began > 2; });
my $one = in_flood(\@flood, $gateway->port, request('/v1/heartbeat', $stranger->{token}, '{}'));
is($one->{status}, 200, sprintf('a session that this gateway has not met gets in at the first try, in %.1f s', $one->{took}));
$one = in_flood(\@flood, $gateway->port, request('/v1/bootstrap', bootstrap_token($node, $newcomer->{id}), bootstrap_body($newcomer->{token})));
is($one->{status}, 200, sprintf('so does a bootstrap, in %.1f s', $one->{took}));
my $took = time - $began;
my %statuses;
for my $flooding (@flood) { $statuses{$_} += $flooding->{statuses}{$_} for keys %{ $flooding->{statuses} }; }
cmp_ok($statuses{401}, '<=', @flood + 20 + 20 * $took + 20, sprintf('the database is asked at a bounded rate: %d tokens in %.1f s', $statuses{401}, $took));
cmp_ok($statuses{401}, '>=', 20, 'but it is asked');
my $late = channel($gateway->port, $stranger->{token});
go_on(\@flood, sub { return hears($late, qr/"hello"/); });
like($late->{in}, qr/"hello"/, 'and a channel');
close($_->{socket}) for @flood;

# at one look-up a second nobody waits for ever; each address has its turn
my $tight = other('', '--unauthenticated-rate', 1, '--unauthenticated-lookups', 1)->start;
until_true(sub { return status("$tight->{url}/readyz") == 200 });
is($http->post("$tight->{url}/v1/heartbeat", { headers => { authorization => 'Bearer ' . invented() }, content => '{}' })->{status}, 401, 'a token of each address');
in_flood([], $tight->{port}, request('/v1/heartbeat', invented(), '{}'), LocalAddr => '127.0.0.2');
@flood = start_flood($tight->{port}, 30);
ask($_) for @flood;
my $slow_channel = channel($tight->{port}, invented());
go_on(\@flood, sub { return grep { ($_->{statuses}{401} // 0) > 0 } @flood; });
$one = in_flood(\@flood, $tight->{port}, request('/v1/heartbeat', $stranger->{token}, '{}'), LocalAddr => '127.0.0.2');
is($one->{status}, 200, sprintf('one address does not wait for another: %.1f s', $one->{took}));
go_on(\@flood, sub { return grep { ($_->{statuses}{429} // 0) > 0 } @flood; });
my ($refused) = grep { $_->{status} && $_->{status} == 429 } @flood;
ok($refused, 'who gets no turn in time gets 429') && cmp_ok($refused->{retry}, '>', 0, 'with Retry-After');
ok(hears($slow_channel, close_code(4503)), 'or, as a channel, is told to come again');
is(status("$tight->{url}/healthz"), 200, 'all else is served');
ask($_) for @flood;
close($_->{socket}) for @flood, $one, $slow_channel;
ok(until_true(sub { return metric($tight, 'connections') == 1 }), 'who leaves the queue is forgotten');
$tight->stop;

# ---- few descriptors ----
my ($out, $error) = run_command([ 'sh', '-c', 'ulimit -n 70; exec "$@"', 'sh', @command, '--check' ]);
like($error, qr/limit of open files \(ulimit -n\) is 70, of which 6 connections remain; there should be 20000/, 'too few to begin with: --check refuses them');
is($out, '', 'and does not say ok');
my $few = other('ulimit -n 70')->start;
$few->exits(2, 'so does a start');
($out, $error) = run_command([ 'sh', '-c', 'ulimit -n 3000; exec "$@"', 'sh', @command, '--check', '--vm-sockets', $node->basedir ]);
like($error, qr/max-connections=20000 open-files-limit=3000 connections=956$/m, "VMs' sockets need some: --check tells how many remain");
is($out, 'ok', 'which will do');

$few = other('ulimit -n 128')->start;
$few->says(qr/fewer connections .* max-connections=20000 open-files-limit=128 connections=64$/m, 'fewer than it is to have: it says how many');
until_true(sub { return status("$few->{url}/readyz") == 200 });
my ($used, $said, @idle) = (cpu($few->pid), lines($few), map { connected($few->{port}) } 1 .. 200);
ok(until_true(sub { return closed(@idle) >= 200 - 64 }), 'the others are turned away');
close($_) for splice(@idle, 0);
ok(until_true(sub { return metric($few, 'connections') == 1 }), 'and as soon as there is room, the next is served');
cmp_ok(cpu($few->pid) - $used, '<', 2, 'without running in circles');
cmp_ok(lines($few) - $said, '<', 20, 'or flooding the log');
$few->stop;

$few = other('ulimit -Sn 100', '--max-connections', 300)->start;
until_true(sub { return status("$few->{url}/readyz") == 200 });
@idle = map { connected($few->{port}) } 1 .. 200;
ok(until_true(sub { return metric($few, 'connections') == 201 }), 'a soft limit is raised');
unlike($few->output, qr/fewer connections/, 'without a word');
# none are left, whatever it reckoned with
system('prlimit', '--pid', $few->pid, '--nofile=50:') == 0 or die 'could not lower the limit';
($used, $said) = (cpu($few->pid), lines($few));
my $waits = connected($few->{port});
syswrite($waits, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
$few->says(qr/cannot be accepted: they wait.*Too many open files/, 'one that cannot be accepted');
sleep 3;    # for so long it could run in circles
cmp_ok(cpu($few->pid) - $used, '<', 1, 'it does not run in circles: ' . (cpu($few->pid) - $used) . ' s');
cmp_ok(lines($few) - $said, '<', 5, 'and says it once');
syswrite($idle[0], "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
ok(IO::Select->new($idle[0])->can_read($timeout), 'those that are there are served');
system('prlimit', '--pid', $few->pid, '--nofile=1000:') == 0 or die 'could not raise the limit';
ok(IO::Select->new($waits)->can_read($timeout), 'and the one that waits, when it can be');
is($few->stop, 0, 'the end');
is($gateway->stop, 0, 'of both');
done_testing();
