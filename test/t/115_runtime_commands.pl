# agentvm-runtime and the commands of its session: what they say, get and leave behind, run once each, bounded
use strict;
use warnings;
use AgentVM::FakeGateway;
use AgentVM::Process;
use AgentVM::VM;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $gateway = AgentVM::FakeGateway->on_duty(env => { SESSION => 'its', BOTH => 'session' });
my $vm = AgentVM::VM->new($gateway->url, 'f' x 64, OUTPUT_MEMORY => 8, MAX_COMMANDS => 256);
my $dir = $vm->dir;
my $number = 0;

sub id { return sprintf('0192a000-0000-7000-8000-%012x', ++$number); }
# The header of a start, and the bytes
sub start_of
{
	my ($text, %header) = @_;
	my $input = delete $header{input} // '';
	$header{env} = { HOME => $dir, %{ $header{env} } } if ref($header{env} //= {}) eq 'HASH';    # whose login says nothing
	return ({ op => 'start', command => id(), command_len => length $text, cwd => undef, timeout_ms => 60000, max_output => 1 << 20, input_len => length $input, age_ms => 0, lease_ms => 0,
			wait_ms => 20000, %header }, $text . substr($input, 0, 262144 - length $text));
}
# Begin a command without waiting for it: its id
sub begin
{
	my ($header, $bytes) = start_of(@_);
	my ($answer) = $gateway->call({ %$header, wait_ms => 0 }, $bytes);
	is($answer->{error}, undef, 'a command begins') or diag explain $answer;
	return $header->{command};
}
# All that a command has said, once it has ended: the last answer, with the bytes as out and err
sub finish
{
	my ($id, $answer, $bytes) = @_;
	my %offset = (stdout => 0, stderr => 0);
	my %said = (stdout => '', stderr => '');
	my $more = 1;
	my $end = time + AgentVM::Process::timeout();
	while ($more && time < $end)
	{
		($answer, $bytes) = $gateway->call({ op => 'output', command => $id, %offset, wait_ms => 20000 }) unless $answer && !$answer->{running};
		return $answer if $answer->{error};
		if ($answer->{running}) { $answer = undef; next }
		$more = 0;
		foreach my $stream ('stdout', 'stderr')
		{
			my $of = $answer->{$stream};
			$said{$stream} .= substr($bytes, 0, $of->{len}, '');
			$offset{$stream} = $of->{from} + $of->{len};
			$more ||= $offset{$stream} < $of->{total};
		}
		last unless $more;
		$answer = undef;
	}
	return { %{ $answer // {} }, out => $said{stdout}, err => $said{stderr} };
}
# Run a command to its end
sub run
{
	my ($header, $bytes) = start_of(@_);
	my @answer = $gateway->call($header, $bytes);
	return { %{ finish($header->{command}, @answer) }, command => $header->{command} };
}
sub error_of { my ($answer) = $gateway->call(@_); return $answer->{error}; }
# Wait until a condition holds; a check
sub soon
{
	my ($name, $condition) = @_;
	my $end = time + AgentVM::Process::timeout();
	my $holds;
	sleep 0.02 until ($holds = $condition->()) || time > $end;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($holds, $name) || diag($vm->output);
}
sub resident { my ($kb) = slurp_file('/proc/' . $vm->pid . '/status') =~ /VmRSS:\s+(\d+) kB/; return $kb; }
sub files { return scalar(my @files = glob('/proc/' . $vm->pid . '/fd/*')); }
# Processes whose environment has this
sub marked { my ($mark) = @_; return grep { (eval { slurp_file("/proc/$_/stat") } // ') Z ') !~ /\) Z / } AgentVM::Process::pids(environ => qr/(^|\0)MARK=$mark\0/); }
sub on_duty { return $vm->start->says(qr/channel is open/, 'on duty'); }

mkdir "$dir/work";
on_duty();

# ---- what it says, and how it ends ----
my $ran = run('echo one; echo two >&2; echo three; exit 3');
is("$ran->{out}|$ran->{err}|$ran->{exit_code}", "one\nthree\n|two\n|3", 'both streams and the exit code');
ok(!$ran->{running} && !$ran->{timed_out} && !$ran->{killed}, 'it has ended by itself');
is("$ran->{stdout}{total} $ran->{stdout}{lost} $ran->{stderr}{total}", '10 0 4', 'nothing is lost');
cmp_ok($ran->{duration_ms}, '<', 60000, 'it took so long');
is(run('kill -9 $$')->{exit_code}, 137, 'ended by a signal: 128 + its number');
is(run('')->{exit_code}, 0, 'no text at all');
is(run('no-such-program')->{exit_code}, 127, 'a program that there is none of');
$ran = run('printf "\0\377\n"');
is($ran->{out}, "\0\377\n", 'bytes are left as they are');
is(run(': ' . 'x' x 122000 . '; echo long')->{out}, "long\n", 'a text as long as may be');

# ---- where, as whom, with what ----
is(run('pwd')->{out}, "$dir/work\n", 'it runs in work_dir');
is(run('pwd', cwd => '/')->{out}, "/\n", 'or elsewhere');
$ran = run('pwd', cwd => '/nowhere');
is("$ran->{exit_code} $ran->{out}$ran->{err}", "127 agentvm: /nowhere: No such file or directory\n", 'a directory that there is none of is told on stderr');
my %env = map { split(/=/, $_, 2) } split(/\n/, run('env', env => { CALL => 'a "b" c', BOTH => 'call', HOME => '/', '1A' => 'odd' })->{out});
is_deeply([ @env{qw(SESSION CALL BOTH LANG SHELL)} ], [ 'its', 'a "b" c', 'call', 'C.UTF-8', '/bin/bash' ], "the session's environment, and that of the call, which comes first");
my ($name, $home) = (getpwuid($>))[ 0, 7 ];
my ($plain, $bytes) = start_of('echo $USER $LOGNAME $HOME');
delete $plain->{env};
is(($gateway->call($plain, $bytes))[1], "$name $name $home\n", 'who it is');
is(join(' ', grep { /AGENTVM|TEST|PG/ } keys %env), '', "the runtime's own environment is none of its business");
my ($limits, $ours) = map { slurp_file($_) =~ /^Max open files +(\d+)/m } '/proc/self/limits', '/proc/' . $vm->pid . '/limits';
$ran = run('umask; ulimit -n; ulimit -c; cat /proc/self/oom_score_adj; ls /proc/self/fd | wc -l; grep -E "Sig(Blk|Ign)" /proc/self/status; ps -o sid= $$ | tr -d " "; echo $$; tty');
my @is = split(/\n/, $ran->{out});
is("$is[0] $is[1] $is[2]", "0022 $limits 0", 'umask, limit of files as it was, no core');
cmp_ok($is[3], '>', slurp_file('/proc/' . $vm->pid . '/oom_score_adj') + 0, 'it ends before the runtime when memory is short');
is($is[4], 4, 'it has none of our files');
# but for two of libc's own
is("$is[5] $is[6]" =~ s/\t00000001800/\t00000000000/r, "SigBlk:\t0000000000000000 SigIgn:\t0000000000000000", 'no signal is blocked or ignored');
is($is[7], $is[8], 'in a session of its own');
is($is[9], 'not a tty', 'without a terminal');

# ---- input ----
is(run('cat')->{out}, '', 'no input: its end at once');
is(run('cat; echo end', input => "some\n")->{out}, "some\nend\n", 'a little input');
my $much = join('', map { sprintf("%07d\n", $_) } 1 .. 400_000);
# Feed what the start has not had; the answers' "taken"
sub feed
{
	my ($id, $input, $first, %header) = @_;
	my $taken = $first;
	while ($taken < length $input)
	{
		my ($answer) = $gateway->call({ op => 'input', command => $id, offset => $taken, wait_ms => 10000, %header }, substr($input, $taken, 262144));
		return $answer if $answer->{error} || $answer->{taken} == $taken;
		$taken = $answer->{taken};
	}
	return { taken => $taken };
}
(my $header, $bytes) = start_of('sha256sum', input => $much);
$gateway->call({ %$header, wait_ms => 0 }, $bytes);
my $first = length($bytes) - $header->{command_len};
feed($header->{command}, $much, $first);
require Digest::SHA;
is(finish($header->{command})->{out}, Digest::SHA::sha256_hex($much) . "  -\n", 'megabytes of input');
is_deeply(($gateway->call({ op => 'input', command => $header->{command}, offset => 5 }, 'again'))[0], { taken => length $much }, 'what has been taken is not taken again');
is(error_of({ op => 'input', command => $header->{command}, offset => length $much }, 'more'), 'invalid', 'nor more than was said');

# one that does not read yet: bounded, and waited for
my $gate = "$dir/gate";
($header, $bytes) = start_of("until [ -e $gate ]; do sleep 0.05; done; sha256sum", input => $much);
$gateway->call({ %$header, wait_ms => 0 }, $bytes);
$first = length($bytes) - $header->{command_len};
my $stuck = feed($header->{command}, $much, $first, wait_ms => 100)->{taken};
cmp_ok($stuck, '>=', 1 << 20, 'one that does not read: a megabyte is taken');
cmp_ok($stuck, '<', 1200 * 1024, 'and no more');
my $pending = $gateway->send({ op => 'input', command => $header->{command}, offset => $stuck - 10, wait_ms => 20000 }, substr($much, $stuck - 10, 200_000));
append_to_file($gate, '');
cmp_ok(($gateway->answer($pending))[0]{taken}, '>', $stuck, 'who waits for room gets some');
is(($gateway->call({ op => 'input', command => $header->{command}, offset => 1 << 30 }, ''))[0]{error}, 'invalid', 'an offset that cannot be');
feed($header->{command}, $much, ($gateway->call({ op => 'input', command => $header->{command}, offset => 0 }, ''))[0]{taken});
is(finish($header->{command})->{out}, Digest::SHA::sha256_hex($much) . "  -\n", 'in the end it has all');

($header, $bytes) = start_of("exec <&-; until [ -e $gate.2 ]; do sleep 0.05; done; echo done", input => $much);
$gateway->call({ %$header, wait_ms => 0 }, $bytes);
is(feed($header->{command}, $much, length($bytes) - $header->{command_len})->{taken}, length $much, 'one that closes its input: all is taken, and thrown away');
append_to_file("$gate.2", '');
is(finish($header->{command})->{out}, "done\n", 'and nothing comes of that');
is(run('exec >&- 2>&-; sleep 0.1; exit 4')->{exit_code}, 4, 'one that closes its output is waited for');

# ---- output that does not end, or is a lot ----
$ran = run('head -c 50000000 /dev/zero | tr "\0" a; echo; head -c 50000000 /dev/zero | tr "\0" b; echo; echo last', max_output => 10000);
is($ran->{stdout}{total}, 100_000_007, 'all of 100 MB has been read');
is($ran->{stdout}{lost}, 100_000_007 - 10000, 'all but max_output is lost');
is($ran->{out}, 'a' x 5000 . 'b' x 4994 . "\nlast\n", 'what is left is its begin and its end');
$ran = run('printf 123456', max_output => 5);
is("$ran->{out} $ran->{stdout}{lost}", '12456 1', 'five bytes of six');
$ran = run('printf 123456', max_output => 0);
is("$ran->{out} $ran->{stdout}{lost}", ' 6', 'none of six');
is(length(run('head -c 3000000 /dev/zero', max_output => 4 << 20)->{out}), 3_000_000, 'more than one answer holds');
my $before = resident();
my @floods = map { begin('head -c 30000000 /dev/zero', max_output => 16 << 20) } 1 .. 4;
my %flooded = map { $_ => finish($_) } @floods;
is(join(' ', map { $_->{stdout}{total} } values %flooded), join(' ', (30_000_000) x 4), 'four times 30 MB, each with 16 MB to be kept');
cmp_ok(resident() - $before, '<', 12 * 1024, "in 8 MB of memory: $before kB before, " . resident() . ' now');
cmp_ok($_->{stdout}{total} - $_->{stdout}{lost}, '<', 8 << 20, 'so much of it is kept') for values %flooded;
my @three = map { run('head -c 3000000 /dev/zero; exit 6', max_output => 16 << 20) } 1 .. 3;
is(join(' ', map { length $_->{out} } @three), '3000000 3000000 3000000', 'what is said now is kept');
is(join(' ', map { ($gateway->call({ op => 'output', command => $_->{command} }))[0]{stdout}{lost} } @three), '3000000 0 0', 'what was said longest ago makes room');
is(($gateway->call({ op => 'output', command => $three[0]{command} }))[0]{exit_code}, 6, 'but what came of it is known');

# parts, while it runs
my $talker = begin("echo first; until [ -e $gate.3 ]; do sleep 0.05; done; echo second; sleep 600", max_output => 1000);
my ($answer, $said) = $gateway->call({ op => 'output', command => $talker, stdout => 0, stderr => 0, wait_ms => 20000, part => JSON::PP::true });
is($said, "first\n", 'with part: what there is');
ok($answer->{running}, 'of one that runs');
is($answer->{exit_code}, undef, 'and has no exit code');
$pending = $gateway->send({ op => 'output', command => $talker, stdout => 6, stderr => 0, wait_ms => 20000, part => JSON::PP::true });
($answer, $said) = $gateway->call({ op => 'output', command => $talker, stdout => 6, wait_ms => 50, part => JSON::PP::true });
is("$answer->{stdout}{len} $said", '0 ', 'the wait is over: nothing new');
($answer, $said) = $gateway->call({ op => 'output', command => $talker, stdout => 0, wait_ms => 50 });
is("$answer->{stdout}{total} $answer->{stdout}{len}", '6 0', 'without part, none of one that runs');
append_to_file("$gate.3", '');
($answer, $said) = $gateway->answer($pending);
is($said, "second\n", 'who waits hears at once');
is_deeply(($gateway->call({ op => 'kill', command => $talker, signal => 15 }))[0], { running => JSON::PP::true }, 'kill');
$ran = finish($talker);
is("$ran->{exit_code} $ran->{out}", "143 first\nsecond\n", 'it is dead, and what it said is there');
ok($ran->{killed} && !$ran->{timed_out}, 'and why is known');
is_deeply(($gateway->call({ op => 'kill', command => $talker, signal => 9 }))[0], { running => JSON::PP::false }, 'once more: it has ended');

# ---- time ----
my $asked = time;
$ran = run('trap "" TERM; (trap "" TERM; sleep 600) & (exec sleep 601) & echo partial; while :; do sleep 1; done', timeout_ms => 3000, env => { MARK => "late$$" });
is("$ran->{exit_code} $ran->{timed_out} $ran->{out}", "124 1 partial\n", 'its time is up: 124, with what it said');
cmp_ok(time - $asked, '>=', 5, 'one that ignores TERM has two seconds');
soon('and its processes go with it', sub { !marked("late$$") });
$asked = time;
$ran = run('trap "echo cleaned; exit 0" TERM; sleep 600 & wait', timeout_ms => 3000);
is("$ran->{exit_code} $ran->{timed_out} $ran->{out}", "124 1 cleaned\n", 'one that ends by TERM: 124, too');
cmp_ok(time - $asked, '<', 4.9, 'at once');
$ran = run('(trap "" TERM; while :; do sleep 0.1; done) & sleep 600', timeout_ms => 3000, env => { MARK => "grandchild$$" });
is($ran->{exit_code}, 124, 'one whose child ignores TERM');
ok(scalar(marked("grandchild$$")), 'the child is there yet') or diag("gone");
soon('and is killed a little later', sub { !marked("grandchild$$") });
my $leased = begin('sleep 600', lease_ms => 500, env => { MARK => "leased$$" });
$asked = time;
$gateway->call({ op => 'output', command => $leased, wait_ms => 1000 });
cmp_ok(time - $asked, '>=', 1, 'a command with a lease goes on while somebody waits for it');
ok(marked("leased$$"), 'and a little longer');
soon('and ends when nobody has asked for it', sub { !marked("leased$$") });
$ran = finish($leased);
ok($ran->{exit_code} == 143 && $ran->{killed}, 'that is how it has ended');

# ---- what it leaves behind ----
$asked = time;
$ran = run('(sleep 0.2; while [ ! -e ' . "$gate.4" . ' ]; do echo flood; sleep 0.01; done; touch ' . "$gate.5) & echo done", env => { MARK => "left$$" });
is($ran->{out}, "done\n", 'a child that keeps the pipes: the command has ended');
cmp_ok(time - $asked, '<', 60, 'and is not waited for');
ok(marked("left$$"), 'the child lives');
sleep 0.5;
is(finish($ran->{command})->{out}, "done\n", 'and what it says is not the command\'s');
append_to_file("$gate.4", '');
soon('nothing has hindered it', sub { -e "$gate.5" });

# ---- once each ----
($header, $bytes) = start_of("echo ran >> $dir/count; cat; exit 7", input => 'x');
my @pending = map { $gateway->send({ %$header, age_ms => $_ }, $bytes) } 0 .. 4;
is(join(' ', map { ($gateway->answer($_))[0]{exit_code} } @pending), '7 7 7 7 7', 'the same start, five times: one answer');
is(slurp_file("$dir/count"), "ran\n", 'and one effect');
is(error_of({ op => $_, command => id(), signal => 9 }), 'no_command', "$_ of one that there is none of") for qw(output input kill);
my ($late) = start_of("echo again >> $dir/count", age_ms => 1000);
is(($gateway->call($late, "echo again >> $dir/count"))[0]{exit_code}, 0, 'one that was sent a while ago, of a session that has just begun, can only be new');

# ---- what makes no sense ----
my %good = %{ (start_of('true'))[0] };
for ([ {}, 'no header' ], [ { op => 'other', command => id() }, 'another op' ], [ { op => 'start' }, 'no id' ], [ { op => 'output', command => 'x' }, 'an id that is none' ],
	[ { %good, command => id(), command_len => 100 }, 'a text that is not there' ], [ { %good, command => id(), cwd => 1 }, 'a cwd that is none' ], [ { %good, command => id(), env => { 'A=B' => 'c' } }, 'a bad name in env' ],
	[ { %good, command => id(), env => [] }, 'an env that is none' ], [ { %good, command => id(), timeout_ms => -1 }, 'a time that is none' ], [ { %good, command => id(), command_len => 1 }, 'more input than is said' ],
	[ { %good, command => id(), wait_ms => 20001 }, 'a wait that is too long' ], [ { op => 'kill', command => $talker, signal => 1 }, 'another signal' ],
	[ { %good, command => id(), tar => { extract => 'relative', file => '/x' }, command_len => 0, input_len => 4 }, 'a path that is not absolute' ])
{
	my ($header, $name) = @$_;
	is(error_of($header, 'true'), 'invalid', "refused: $name");
}
is(error_of({ %good, command => id(), command_len => 4 }, "tr\0e"), 'invalid', 'refused: a NUL in the text');
my $client = $gateway->ask(['call'], pack('N', 1 << 30));
is(($gateway->answer($client))[0]{error}, 'invalid', 'refused: a header that is longer than the message');
$gateway->does('raw', AgentVM::FakeGateway::frame(2, 'abc'));
is(run('echo alive')->{out}, "alive\n", 'what has no number is ignored');

# ---- the gateway is told of ends until it has noted them ----
sub ends { my ($id) = @_; return grep { $_->{command} eq $id } $gateway->frames('ended'); }
$gateway->does('note', 0);
$ran = run('echo out; echo error >&2; exit 5');
my $id = $ran->{command};
soon('the gateway is told of an end', sub { ends($id) });
my ($end) = ends($id);
is(join(' ', @$end{qw(exit_code stdout_bytes stderr_bytes)}, $end->{timed_out} ? 1 : 0), '5 4 6 0', 'with what came of it');
is($end->{duration_ms}, $ran->{duration_ms}, 'and how long it took');
my @noted = map { $_->{command} } grep { $_->{command} ne $id } $gateway->frames('ended');
sub again { my ($name) = @_; my $opened = () = $vm->output =~ /channel is open/g; $gateway->does('drop'); return soon($name, sub { (() = $vm->output =~ /channel is open/g) > $opened }); }
my $waits = $gateway->send({ op => 'output', command => begin('sleep 1'), wait_ms => 20000 });
again('the channel is lost, and there is another');
soon('it is told again', sub { ends($id) == 2 });
is(scalar($gateway->answer($waits)), undef, 'a call on the lost channel has no answer');
again('and once more');
soon('and again', sub { ends($id) == 3 });
$gateway->does('note', 1);
again('now ends are noted');
soon('it is told', sub { ends($id) == 4 });
$gateway->does('say', encode_json({ type => 'noted', command => id() }));
again('another channel');
is(run('echo more')->{out}, "more\n", 'and more commands');
is(scalar(ends($id)), 4, 'but what has been noted is not told again');
is(scalar(grep { ends($_) != 1 } @noted), 0, 'nor was what had been noted at once');

# ---- many ----
my $beats = () = $gateway->frames('heartbeat');
my $began = time;
my @many = map { $gateway->send(start_of("sleep 2; head -c 20000 /dev/zero; echo $_ >&2")) } 1 .. 200;
my @answers = map { [ $gateway->answer($_) ] } @many;
my $took = time - $began;
is(scalar(grep { $_->[0]{exit_code} == 0 && length($_->[1]) > 20000 && $_->[0]{stdout}{lost} == 0 } @answers), 200, '200 commands at once');
is(join(' ', map { substr($_->[1], 20000) =~ /(\d+)/ } @answers), join(' ', 1 .. 200), 'each with what it has said');
my @at = map { $_->{at} } grep { $_->{at} > $began } $gateway->frames('heartbeat');
cmp_ok(scalar(@at), '>=', int($took / 1.2) - 1, "heartbeats go on: " . @at . " in $took s");
ok(!grep({ $at[$_] - $at[ $_ - 1 ] > 3 } 1 .. $#at), 'none is late');
my @blocking = map { begin('sleep 600', env => { MARK => "many$$" }) } 1 .. 5;
$vm->stop;
soon('commands end with the runtime', sub { !marked("many$$") });

# ---- a restart: nobody knows what has run ----
on_duty();
is(error_of({ op => 'output', command => $id }), 'no_command', 'commands of an earlier process are not known');
($header, $bytes) = start_of("echo again >> $dir/count", age_ms => 30000);
is(error_of($header, $bytes), 'forgotten', 'one that may have run before is refused');
is(slurp_file("$dir/count") =~ s/again\n//r, "ran\n", 'and has had no effect');
is(($gateway->call({ %$header, age_ms => 0 }, $bytes))[0]{exit_code}, 0, 'a new one runs');

# ---- thousands of short ones, in a VM that nothing has run in ----
$vm->stop;
$vm = AgentVM::VM->new($gateway->url, 'f' x 64, OUTPUT_MEMORY => 8);
on_duty();
my $open = files();
my $old = run("echo old >> $dir/count; exit 8")->{command};
my $since = time;
my $recent;
for my $round (1 .. 84)
{
	my @round = map { [ start_of('exit 9') ] } 1 .. 50;
	$recent = $round[0][0]{command};
	$_ = $gateway->send(@$_) for @round;
	my @codes = map { ($gateway->answer($_))[0]{exit_code} } @round;
	is("@codes", join(' ', (9) x 50), "round $round") if grep { $_ != 9 } @codes;
}
cmp_ok(files(), '<=', $open, 'no file is left open by 4,200 short commands');
cmp_ok(resident(), '<', 16 * 1024, 'nor much memory: ' . resident() . ' kB');
is(scalar(AgentVM::Process::pids(stat => qr/^\d+ \(.*\) Z @{[ $vm->pid ]} /)), 0, 'nor a dead child');
# the last 4,096 are remembered
my $age = int((time - $since) * 1000) + 1;
is(error_of({ op => 'output', command => $old }), 'no_command', 'one that has ended so long ago is not known any more');
my ($again, $text) = start_of("echo old >> $dir/count", age_ms => $age);
is(error_of({ %$again, command => $old }, $text), 'forgotten', 'and not run again');
is(slurp_file("$dir/count") =~ s/.*^(?=old)//msr, "old\n", 'it has run once');
is(($gateway->call({ %$again, command => $recent }, $text))[0]{exit_code}, 9, 'a later one is known');
is(($gateway->call({ %$again, command => id(), age_ms => 0 }, $text))[0]{exit_code}, 0, 'and a new one runs');

# ---- no more than so many ----
$vm->stop;
$vm->write_settings(MAX_COMMANDS => 3);
on_duty();
@three = map { begin('sleep 600') } 1 .. 3;
is(error_of(start_of('true')), 'busy', 'one more than may run');
$gateway->call({ op => 'kill', command => $three[0], signal => 9 });
is(finish($three[0])->{exit_code}, 137, 'one less');
is(run('echo place')->{out}, "place\n", 'and there is room again');
$vm->stop;

# ---- no bash ----
my $bin = "$dir/bin";
mkdir $bin;
symlink("/bin/sh", "$bin/sh");
$vm->start(PATH => $bin)->says(qr/channel is open/);
is(run('echo "$0 $SHELL"')->{out}, "sh /bin/sh\n", 'without bash it is sh');
unlink "$bin/sh";
$ran = run('echo none');
is("$ran->{exit_code} $ran->{err}", "127 agentvm: sh: No such file or directory\n", 'without a shell: 127, and why');
append_to_file("$bin/sh", 'nothing');
$ran = run('echo none');
is("$ran->{exit_code} $ran->{err}", "126 agentvm: sh: Permission denied\n", 'one that cannot be run: 126');
$vm->stop;

# ---- control groups, where the test can have one of its own ----
SKIP:
{
	my ($own) = slurp_file('/proc/self/cgroup') =~ /^0::(.*)/m;
	my ($top) = grep { -e "$_/cgroup.controllers" } '/sys/fs/cgroup', '/sys/fs/cgroup/unified';
	my $group = ($top // '') . ($own // '') . "/agentvm-test-$$";
	skip 'no control group can be made here', 1 unless $top && defined $own && mkdir($group);
	my $contained = AgentVM::Process->new('contained', 'sh', '-c', 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"', 'sh', $group, @{ $vm->{command} });
	$vm->write_settings(PIDS_LIMIT => 50);
	$contained->start->says(qr/channel is open/, 'a runtime in a group of its own', while_running => 1);
	$vm->{pid} = $contained->pid;
	my $groups = "$group/commands";
	$ran = run('cat /proc/self/cgroup; setsid sleep 600 >/dev/null 2>&1 &', env => { MARK => "grouped$$" });
	like($ran->{out}, qr{^0::\Q$own\E/?agentvm-test-$$/commands/$ran->{command}$}m, 'a command is in a group of its own');
	soon('what it has left behind runs', sub { marked("grouped$$") });
	$gateway->call({ op => 'kill', command => $ran->{command}, signal => 9 });
	soon('and is killed with it, in whatever session it is', sub { !marked("grouped$$") });
	$ran = run('setsid sh -c "trap : TERM; while :; do sleep 0.2; done" & sleep 600', timeout_ms => 1000, env => { MARK => "escaped$$" });
	is($ran->{exit_code}, 124, 'one whose time is up');
	soon('takes those with it that have left its process group', sub { !marked("escaped$$") });
	$ran = run('true');
	ok(!-e "$groups/$ran->{command}", 'the group of one that leaves nothing behind is gone');
  SKIP:
	{
		skip 'the controller pids is not to be had here', 1 unless -e "$groups/pids.max";
		is(slurp_file("$groups/pids.max"), "50\n", 'the processes of all are bounded');
		my $bomb = begin(':(){ :|:& };:', env => { MARK => "bomb$$" });
		soon('a fork bomb goes so far', sub { slurp_file("$groups/pids.current") >= 50 });
		is(run('echo here')->{out}, "here\n", 'and no further: others run beside it');
		$gateway->call({ op => 'kill', command => $bomb, signal => 9 });
		soon('it is killed, all of it', sub { !marked("bomb$$") });
	}
	$contained->stop;
	$vm->{pid} = undef;
	soon('nothing is left', sub { system('find', $group, '-depth', '-type', 'd', '-exec', 'rmdir', '{}', '+') == 0 });
}

done_testing();
