# The gateway's side of the cable: sockets come and go, and VMs send whatever they like. Here the test is the VM.
use strict;
use warnings;
use AgentVM::Gateway;
use AgentVM::Test;
use HTTP::Tiny;
use IO::Select;
use IO::Socket::UNIX;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my ($HELLO, $OPEN, $DATA, $CREDIT, $CLOSE) = 1 .. 5;
my $VERSION = 3;
my $MAGIC = "agentvm:";
my $node = new_node('main');
my $base = PostgreSQL::Test::Utils::tempdir_short();
my ($dir, $later, $many) = ("$base/a", "$base/b", "$base/c");
mkdir $_ for $dir, $many;
my $timeout = AgentVM::Process::timeout();

# ---- a VM: what QEMU and a guest would do ----
my $nonce = 0;
sub vm
{
	my ($name, $in) = @_;
	my $path = ($in // $dir) . "/$name.sock";
	my $listener = IO::Socket::UNIX->new(Local => $path, Listen => 1) or die "$path: $!";
	return { path => $path, listener => $listener, name => $name };
}
# The gateway's connection; undef when none comes for that long
sub plugged
{
	my ($vm, $seconds) = @_;
	return undef unless IO::Select->new($vm->{listener})->can_read($seconds // $timeout);
	$vm->{cable} = $vm->{listener}->accept;
	$vm->{cable}->blocking(0);
	$vm->{in} = '';
	return $vm->{at} = time;
}
sub frame
{
	my ($kind, $number, $bytes) = @_;
	my $frame = pack('CC', $kind, $number) . ($bytes // '');
	return $frame =~ s/([\xc0\xdb])/$1 eq "\xc0" ? "\xdb\xdc" : "\xdb\xdd"/ger . "\xc0";
}
# Write all, or as much as goes within the time; returns how much
sub put
{
	my ($vm, $bytes, $seconds) = @_;
	my ($done, $end) = (0, time + ($seconds // $timeout));
	while ($done < length($bytes) && time < $end)
	{
		IO::Select->new($vm->{cable})->can_write($end - time) or last;
		my $n = syswrite($vm->{cable}, $bytes, 65536, $done);
		last if !defined $n && !$!{EAGAIN};
		$done += $n // 0;
	}
	return $done;
}
# The next frame: [kind, number, bytes]; undef when there is none for that long, or the cable has been cut
sub take
{
	my ($vm, $seconds) = @_;
	my $end = time + ($seconds // $timeout);
	while (1)
	{
		while ($vm->{in} =~ s/^\xc0*([^\xc0]+)\xc0//s)
		{
			my ($kind, $number, $bytes) = unpack('CCa*', $1 =~ s/\xdb([\xdc\xdd])/$1 eq "\xdc" ? "\xc0" : "\xdb"/ger);
			return [ $kind, $number, $bytes ];
		}
		return undef unless $end > time && IO::Select->new($vm->{cable})->can_read($end - time);
		my $n = sysread($vm->{cable}, $vm->{in}, 65536, length($vm->{in}));
		next if !defined $n && $!{EAGAIN};
		return undef unless $n;
	}
}
sub is_cut
{
	my ($vm, $seconds) = @_;
	my $end = time + ($seconds // $timeout);
	while ((my $left = $end - time) > 0)
	{
		next unless IO::Select->new($vm->{cable})->can_read($left);
		my $n = sysread($vm->{cable}, my $bytes, 65536);
		return 1 if defined $n ? $n == 0 : !$!{EAGAIN};
	}
	return 0;
}
# A guest that begins anew
sub synced
{
	my ($vm) = @_;
	my $own = pack('Q>', ++$nonce);
	put($vm, "\xc0" . frame($HELLO, $VERSION, $MAGIC . $own . "\0" x 8));
	while (my $frame = take($vm))
	{
		next unless $frame->[0] == $HELLO;
		my ($theirs, $known) = unpack("x8a8a8", $frame->[2]);
		put($vm, frame($HELLO, $VERSION, $MAGIC . $own . $theirs));
		return 1 if $known eq $own;
	}
	return 0;
}
sub ready { my ($vm) = @_; return plugged($vm) && synced($vm); }
# What a request on a stream is answered with, at once, and until the gateway closes it if it is to: it does after one without a body
sub request
{
	my ($vm, $stream, $path, %opt) = @_;
	my $answer = '';
	put($vm, frame($OPEN, $stream)) unless $opt{is_open};
	put($vm, frame($DATA, $stream, "GET $path HTTP/1.1\r\nHost: x\r\n" . ($opt{headers} // '') . ($opt{stays} ? "Content-Length: 2\r\n\r\n{}" : "\r\n")));
	while (my $frame = take($vm))
	{
		next unless $frame->[1] == $stream;
		last if $frame->[0] == $CLOSE;
		next unless $frame->[0] == $DATA;
		$answer .= $frame->[2];
		put($vm, frame($CREDIT, $stream, pack('N', length($frame->[2]))));
		last if $answer =~ /\r\ncontent-length: (\d+)\r\n.*?\r\n\r\n(.*)$/si && length($2) >= $1;
	}
	put($vm, frame($CLOSE, $stream)) unless $opt{stays};
	while (!$opt{stays} && (my $frame = take($vm)))
	{
		last if $frame->[0] == $CLOSE && $frame->[1] == $stream;
	}
	return $answer;
}

# ---- what is in the directory when it starts ----
my $first = vm('first');
my $stale = vm('stale');
close($stale->{listener});
append_to_file("$dir/file.sock", '');
my $canary = vm('canary', $base);
symlink($canary->{path}, "$dir/link.sock");
my $other = vm('other.socket');
rename("$dir/other.socket.sock", "$dir/other.socket");
my ($longest, $long) = (vm('y' x 44), vm('x' x 45));
my $gateway = AgentVM::Gateway->new($node, options => [ '--vm-sockets', $dir, '--vm-sockets', $later, '--vm-sockets', $many, '--unauthenticated-rate', 5 ]);
sub metric
{
	my ($name) = @_;
	return HTTP::Tiny->new->get($gateway->url . '/metrics')->{content} =~ /^agentvm_gateway_$name (\S+)$/m ? $1 : undef;
}
sub resident { return slurp_file('/proc/' . $gateway->pid . '/status') =~ /VmRSS:\s+(\d+) kB/ ? $1 : die; }
sub files { return scalar(() = glob('/proc/' . $gateway->pid . '/fd/*')); }

ok(ready($first), 'a socket that was there is connected to');
like(request($first, 0, '/healthz'), qr/^HTTP\/1.1 200 .*"ok"/s, 'and what comes through is served');
like(request($first, 15, '/nowhere'), qr/^HTTP\/1.1 404 /, 'on the last stream as well');
my $second = vm('second');
my $came = time;
ok(ready($second), 'one that comes later, too');
cmp_ok($second->{at} - $came, '<', 5, 'at once: ' . ($second->{at} - $came) . ' s');
is(metric('vms'), 2, 'metrics: two VMs');
is(plugged($canary, 0), undef, 'a link is not followed');
my $swapped = vm('swapped');
close($swapped->{listener});
$gateway->says(qr/cannot be talked to" vm=vm:swapped .*refused/, 'a socket where nobody listens is tried again');
symlink($canary->{path}, "$dir/.link") and rename("$dir/.link", $swapped->{path}) or die "could not make a link: $!";
is(plugged($canary, 2), undef, 'unless it has become a link meanwhile');
chmod 0444, $canary->{path};
is(plugged($other, 0), undef, 'nor is anything else touched');
ok(ready($longest), 'a name may be long');
like($gateway->output, qr/too long a name.*x{45}/, 'one that is too long is told');
unlike($gateway->output, qr/too long a name.*y{44}/, 'as no other is');
ok($gateway->is_running, 'stale sockets and files do no harm');

# ---- a directory that comes later ----
like($gateway->output, qr/cannot be looked for.*directory=\Q$later\E/, 'a directory that is not there is told');
mkdir $later;
my $third = vm('third', $later);
ok(ready($third), 'and watched when it has come');
like(request($third, 1, '/healthz'), qr/^HTTP\/1.1 200 /, 'its VM is served');

# ---- a VM that restarts, and one whose bytes were cut ----
like(request($second, 3, '/healthz', stays => 1), qr/ 200 /, 'a connection that stays open');
is(metric('vm_streams'), 1, 'is counted');
put($second, substr(frame($DATA, 3, 'GET / HTTP/1.1'), 0, 9));
ok(synced($second), 'a runtime that begins anew in the middle of a frame');
like(request($second, 3, '/healthz'), qr/ 200 /, 'has the stream for itself');
is(metric('vm_resets_total'), 0, 'without trouble');

# ---- streams: as many as there are, and the flow ----
like(request($second, $_, '/healthz', stays => 1), qr/ 200 /, "stream $_") for 0 .. 15;
like(request($second, $_, '/healthz', is_open => 1), qr/ 200 /, "and again: $_") for 0 .. 15;

# ---- tokens that are refused: by VM ----
my $bad = "Authorization: Bearer @{[ 'f' x 64 ]}\r\n";
sub status_of_token { my ($vm) = @_; return request($vm, 2, '/v1/channel', headers => "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: agentvm.v1\r\n") =~ /^HTTP\/1.1 (\d+)/ ? $1 : 'none'; }
is(status_of_token($second), 401, "refused token $_") for 1 .. 5;
is(status_of_token($second), 429, 'too many of one VM');
is(status_of_token($third), 401, 'do not count for another one');

# ---- nonsense ----
my @nonsense = ([ frame($OPEN, 16), frame($DATA, 0, 'x'), frame($CREDIT, 1, "\0\0\0\1"), frame(77, 0), "\xdb\x01\xc0" ],
	[ frame($DATA, 5), 'x' x 20000 . "\xc0", frame($OPEN, 1) . frame($OPEN, 1), frame($OPEN, 1) . frame($CREDIT, 1, pack('N', 1)), frame($HELLO, 1, $MAGIC . "x" x 16) ]);
my (@came, $came_number, @bad);
for my $i (0, 1)
{
	my $vm = $bad[$i] = vm("bad$i");
	for my $nonsense (@{ $nonsense[$i] })
	{
		ok(ready($vm), 'connected');
		push @came, $vm->{at};
		put($vm, $nonsense);
		ok(is_cut($vm), 'nonsense costs it the connection');
	}
	my @waits = map { $came[ $_ + 1 ] - $came[$_] } 5 * $i, 5 * $i + 3;
	cmp_ok($waits[1], '>', 2 * $waits[0], sprintf('for longer each time: %.1f, then %.1f s', @waits));
}
is(metric('vm_resets_total'), scalar(@came), 'they are counted');
ok(synced($_) && request($_, 0, '/healthz') =~ / 200 /, "the VM $_->{name} has not noticed") for $first, $second, $third;
my $told = () = $gateway->output =~ /cannot be talked to" vm=vm:bad[01]/g;
cmp_ok($told, '<=', scalar(@came), "the log says little of it: $told");

# ---- floods ----
close($_->{listener}) and unlink $_->{path} for @bad;
my $garbage = join('', map { chr(int(rand(256))) } 1 .. 100000);
my $greetings = join('', map { frame($HELLO, $VERSION, $MAGIC . pack("Q>Q>", $_ + 1000, 0)) } 1 .. 20000);
my $requests = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" x 440;
# How a VM begins, and what it says from then on, again and again
my %floods = (
	'random bytes' => [ \&plugged, sub { return $garbage x 10; } ],
	'empty frames' => [ \&ready, sub { return "\xc0" x 1000000; } ],
	'greetings' => [ \&ready, sub { return $greetings; } ],
	'streams opened and closed' => [
		\&ready,
		sub {
			my ($vm) = @_;
			put($vm, join('', map { frame($OPEN, $_) . frame($CLOSE, $_) } 0 .. 15));
			my $closed = 0;
			while (my $frame = take($vm, 2)) { last if $frame->[0] == $CLOSE && ++$closed == 16; }
			return '';
		} ],
	'requests on all streams, whose answers are not read' => [
		sub {
			my ($vm) = @_;
			ready($vm);
			return put($vm, join('', map { my $stream = $_; frame($OPEN, $stream), map { frame($DATA, $stream, substr($requests, 4000 * $_, 4000)) } 0 .. 3 } 0 .. 15));
		},
		sub { sleep 0.3; return ''; } ]);
my $files = files();
for my $name (sort keys %floods)
{
	my $vm = vm('flood' . ++$came_number);
	my ($begin, $go_on) = @{ $floods{$name} };
	my $lines = () = $gateway->output =~ /\n/g;
	my $before = resident();
	my ($sent, $slowest, $asked) = (0, 0, 0);
	$begin->($vm);
	my $end = time + 4;
	while (time < $end)
	{
		$sent += put($vm, $go_on->($vm), 0.3);
		my $at = time;
		request($first, 4, '/healthz') =~ / 200 / or last;
		$asked++;
		$slowest = time - $at if time - $at > $slowest;
	}
	cmp_ok($asked, '>=', 5, "$name: others are served, $asked times");
	cmp_ok($slowest, '<', 2, sprintf('in %.4f s', $slowest));
	cmp_ok($sent, '<', 40_000_000, "at a bounded rate: $sent bytes");
	my $more = (() = $gateway->output =~ /\n/g) - $lines;
	cmp_ok($more, '<', 300, "the log stays short: $more lines");
	cmp_ok(resident() - $before, '<', 4 * 1024, 'and so does memory: ' . (resident() - $before) . ' kB more');
	close($vm->{cable});
	close($vm->{listener});
	unlink $vm->{path};
}
my $end = time + $timeout;
sleep 0.2 while files() > $files && time < $end;
cmp_ok(files(), '<=', $files, 'no file is left open');

# ---- more than it has places for: said once each time ----
sub is_told
{
	my ($like, $times, $name) = @_;
	my $end = time + $timeout;
	my $told;
	sleep 0.1 until ($told = () = $gateway->output =~ /$like/g) >= $times || time > $end;
	return is($told, $times, $name);
}
for my $time (1, 2)
{
	for my $n (1 .. 1030) { close(IO::Socket::UNIX->new(Local => "$many/$n.sock", Listen => 1) // die "$many/$n.sock: $!"); }
	is_told(qr/too many VMs' sockets/, $time, 'more than 1024 sockets are told');
	unlink glob("$many/*");
	rmdir $many;
	is_told(qr/cannot be looked for" directory=\Q$many\E/, $time, 'they are gone');
	next if $time == 2;
	mkdir $many;
	is_told(qr/watching for VMs' sockets" directory=\Q$many\E/, 1, 'and their directory is back');
}

# ---- what a crash of the host leaves, with infra/systemd/agentvm.tmpfiles ----
SKIP:
{
	skip 'no systemd-tmpfiles', 5 unless grep { -x "$_/systemd-tmpfiles" } split(/:/, $ENV{PATH});
	my $root = PostgreSQL::Test::Utils::tempdir('root');
	my ($vms, $logs) = ("$root/var/lib/agentvm/vms", "$root/var/cache/agentvm-vm/libvirt/qemu/log");
	system_or_bail('mkdir', '-p', $vms, $logs);
	append_to_file($_, 'x') for "$vms/a.sock", "$vms/a.disk", "$logs/a.log";
	append_to_file("$root/soon", slurp_file("$ENV{TESTDIR}/infra/systemd/agentvm.tmpfiles") =~ s/\b30d$/1s/mr);
	my $tidy = sub { return system('systemd-tmpfiles', "--root=$root", @_) == 0; };
	my $left = sub { return join(' ', map { s/.*\///r } glob("$vms/* $logs/*")); };
	ok($tidy->('--create', '--remove', '--clean', "$ENV{TESTDIR}/infra/systemd/agentvm.tmpfiles"), 'systemd-tmpfiles takes it');
	is($left->(), 'a.disk a.sock a.log', 'while the host is up, it removes nothing that is new');
	ok($tidy->('--boot', '--remove', "$ENV{TESTDIR}/infra/systemd/agentvm.tmpfiles"), 'at boot');
	is($left->(), 'a.disk a.log', 'it removes the sockets');
	my $end = time + $timeout;
	sleep 0.2 while $tidy->('--clean', "$root/soon") && -e "$logs/a.log" && time < $end;
	is($left->(), 'a.disk', 'and logs that are old');
}

# ---- settings ----
sub checked { my (@arguments) = @_; my ($out, $error) = run_command([ @{ $gateway->{command} }[ 0 .. 2 ], '--check', '--max-connections', 100, @arguments ]); return $out . $error; }
is(checked('--vm-sockets', "$dir:$later"), 'ok', '--check: all is well, whatever is behind a link');
like(checked('--vm-sockets', "$base/none"), qr/--vm-sockets=\S+none: No such file/, 'a directory that is not there');
chmod 0000, $later;
like(checked('--vm-sockets', $later), qr/--vm-sockets=\Q$later\E: Permission denied/, 'one that may not be read');
like(checked("--vm-sockets=$dir", "--vm-sockets=$later"), qr/Permission denied/, 'or the second one');
chmod 0755, $later;
chmod 0444, $third->{path};
like(checked('--vm-sockets', $later), qr/third.sock may not be connected to: Permission denied/, 'a socket that may not be written to');
{
	local $ENV{AGENTVM_GATEWAY_VM_SOCKETS} = "$base/none:$base/none2";
	like(checked(), qr/none: No such file/, 'by the environment');
	is(checked('--vm-sockets', $dir), 'ok', 'which flags replace');
}
like(checked(map { ('--vm-sockets', $dir) } 1 .. 17), qr/too many/, 'no more than 16');

# ---- a connection outlives its file ----
unlink $third->{path};
rmdir $later or die "could not remove $later: $!";
mkdir $later;
my $fourth = vm('fourth', $later);
ok(ready($fourth), 'a directory that is another one is looked through');
like(request($third, 1, '/healthz'), qr/^HTTP\/1.1 200 /, 'a VM of the one before is still served');

# ---- a VM counts as one address ----
mkdir "$base/c";
my $bounded = AgentVM::Gateway->new($node, options => [ '--vm-sockets', "$base/c", '--max-per-address', 3 ]);
my $greedy = vm('greedy', "$base/c");
ok(ready($greedy), 'a gateway that takes three connections of each');
like(request($greedy, $_, '/healthz', stays => 1), qr/ 200 /, "stream $_") for 0 .. 2;
is(request($greedy, 3, '/healthz', stays => 1), '', 'and no fourth one');
is($bounded->stop, 0);

# ---- the end ----
is($gateway->stop, 0, 'SIGTERM ends it');
ok(is_cut($first), 'and the connections');
$gateway->start;
ok(ready($first), 'the next one has them');
done_testing();
