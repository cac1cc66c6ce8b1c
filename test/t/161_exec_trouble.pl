# Calls to VMs when something is in the way: lost answers, gateways that go, cancel, a client that goes, answers without sense
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Control;
use AgentVM::Test;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);

my $node = new_node('main', conf => "agentvm.max_output = '1MB'\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $control = AgentVM::Control->new($node);
my $session = $control->session('acme');
my $other = $control->session('acme');
my $dir = $control->dir;

sub run { my ($command, @arguments) = @_; return "SELECT exit_code, stdout FROM agentvm.exec('$session', " . join(', ', literal($command), @arguments) . ')'; }
# How often a command that appends to a file has run
sub ran { my ($name) = @_; return -e "$dir/$name" ? length(slurp_file("$dir/$name")) : 0; }
sub seconds { my ($code) = @_; my $begin = time; $code->(); return time - $begin; }

# ---- an answer that is lost: each operation is repeated, and takes effect once ----
for my $how ('lose', 'refuse', 404, 502, 503, 504, 500)
{
	my $file = "once_$how";
	$control->faults(map { { op => $_, do => $how, times => 2 } } qw(start input output put get kill));
	my $mark = $control->mark;
	is($node->safe_psql('postgres', run("wc -c; printf x >> $file; head -c 300000 /dev/zero; exit 4", "stdin => convert_to(repeat('i', 600000), 'UTF8')") =~ s/stdout/left(stdout, 7), length(stdout)/r),
		"4|600000\n|300007", "$how: a command") or diag(explain [ $control->logged($mark) ]);
	is(ran($file), 1, "$how: has run once");
	my %ids = map { $_->{command} => 1 } $control->calls($session, 'start', $mark);
	is(scalar(keys %ids), 1, "$how: a start is repeated as it was");
	my @ages = map { $_->{age_ms} } $control->calls($session, 'start', $mark);
	ok(@ages == 3 && $ages[0] == 0 && $ages[1] > 0 && $ages[2] > $ages[1], "$how: but says how old it is");
	is($node->safe_psql('postgres', "SELECT agentvm.upload('$session', '$file.up', convert_to(repeat('u', 700000), 'UTF8')), encode(sha256(agentvm.download('$session', '$file.up')), 'hex') = encode(sha256(convert_to(repeat('u', 700000), 'UTF8')), 'hex')"), '700000|t', "$how: files");
	my $command = $node->safe_psql('postgres', "SELECT agentvm.exec_start('$session', 'sleep 60')");
	is($node->safe_psql('postgres', "SELECT agentvm.exec_kill('$session', '$command'), (SELECT exit_code FROM agentvm.exec_wait('$session', '$command'))"), 't|143', "$how: a signal");
}
$control->faults;

# ---- it does not come back: which of the two is away, and what is known of the command ----
my %persist = (
	404 => [ 'AV009', qr/runtime of session $session cannot be reached.*DETAIL.*Gateway "gw1" has no channel to it/s ],
	503 => [ 'AV009', qr/gateway "gw1" cannot be reached.*DETAIL.*no database/s ],
	502 => [ 'AV009', qr/outcome unknown: runtime of session $session cannot be reached any more.*DETAIL.*channel to gateway "gw1" broke.*HINT.*may have run/s ],
	504 => [ 'AV009', qr/outcome unknown: runtime of session $session .*DETAIL.*does not answer/s ],
	lose => [ 'AV009', qr/outcome unknown: gateway "gw1" .*DETAIL.*No answer to a call/s ],
	hang => [ 'AV009', qr/outcome unknown: gateway "gw1" .*DETAIL.*No answer to a call/s ],
	400 => [ '58000', qr/gateway "gw1" does not understand/ ],
	401 => [ 'AV009', qr/gateway "gw1" refuses.*HINT.*clocks.*agentvm.key_file.*name/s ],
	409 => [ 'AV007', qr/is not ready/ ],
	410 => [ 'AV006', qr/has ended/ ],
	413 => [ 'AV012', qr/finds it too large/ ],
	429 => [ 'AV012', qr/too many calls/ ]);
for my $how (sort keys %persist)
{
	next if $how eq 'hang';
	$control->faults({ op => 'start', do => $how =~ /^\d/ ? $how + 0 : $how, times => 1000 });
	cmp_ok(seconds(sub { fails_with($node, run('true', "timeout => '2 s'"), @{ $persist{$how} }, "$how: start") }), '<', $how =~ /404|50.|lose/ ? 5 : 2, "$how: tried again where that makes sense, for as long as the command had");
	next unless $how =~ /404|50.|lose/;
	cmp_ok(scalar($control->calls($session, 'start')), '>', 3, "$how: several times");
	$control->faults({ op => 'output', do => $how =~ /^\d/ ? $how + 0 : $how, times => 1000 }, { op => 'start', do => { change => { running => JSON::PP::true, exit_code => undef } }, times => 1 });
	fails_with($node, run('true', "timeout => '1 s'"), 'AV009', qr/outcome unknown: .*cannot be reached any more/, "$how: once it has begun, its outcome is unknown");
}
$control->faults({ op => 'output', do => 'hang', times => 1000 });
my $command = $node->safe_psql('postgres', "SELECT agentvm.exec_start('$session', 'true')");
fails_with($node, "SELECT agentvm.exec_wait('$session', '$command', '1 s')", 'AV009', qr/^(?!.*outcome unknown).*gateway "gw1" cannot be reached/s, 'one that never answers');
$control->faults;
fails_with($node, "UPDATE agentvm.gateway SET control_address = '$_->[0]'; SELECT agentvm.exec('$session', 'true', timeout => '1 s')", $_->[1], $_->[2], "address $_->[0]")
  for [ "unix:$dir/nowhere", 'AV009', qr/gateway "gw1" cannot be reached.*DETAIL/s ], [ 'https://127.0.0.1:1', 'AV009', qr/gateway "gw1" cannot be reached/ ], map { [ $_, '23514', qr/control_address_is_sound/ ] } 'tcp:here', 'unix:/' . 'x' x 120, 'https://a b', 'https://' . 'x' x 2000;
fails_with($node, "UPDATE agentvm.gateway SET control_address = NULL; SELECT agentvm.exec('$session', 'true')", 'AV009', qr/gateway "gw1" passes no commands on.*HINT/s, 'a gateway without control listener');
$node->safe_psql('postgres', "UPDATE agentvm.gateway SET control_address = 'http://127.0.0.1:1'; ALTER SYSTEM SET agentvm.allow_insecure_endpoints = off; SELECT pg_reload_conf()");
await($node, 'SHOW agentvm.allow_insecure_endpoints', 'off');
fails_with($node, run('true'), 'AV010', qr/neither unix:.path nor https/, 'no plain http, unless that is allowed');
$node->safe_psql('postgres', "UPDATE agentvm.gateway SET control_address = 'unix:" . $control->socket . "'; ALTER SYSTEM RESET agentvm.allow_insecure_endpoints; SELECT pg_reload_conf()");
is($node->safe_psql('postgres', run('echo back')), "0|back\n", 'a Unix socket needs no permission');

# ---- tickets are of this server's key, the gateway's name, the session and the message ----
my $wrong = AgentVM::Control->new($node, name => 'gw2');
$node->safe_psql('postgres', q{UPDATE agentvm.gateway SET control_address = (SELECT control_address FROM agentvm.gateway WHERE gateway_id = 'gw2') WHERE gateway_id = 'gw1'});
fails_with($node, run('true'), @{ $persist{401} }, 'a ticket for gw1 is worth nothing at gw2');
$node->safe_psql('postgres', "UPDATE agentvm.gateway SET control_address = 'unix:" . $control->socket . "' WHERE gateway_id = 'gw1'");

# ---- the session comes to another gateway ----
my $client = AgentVM::Client->new($node);
$control->faults({ op => 'start', do => 404, times => 1000 });
$client->send(run('echo moved'));
sleep 0.05 until scalar(my @tries = $control->calls($session, 'start', $control->mark - 2)) >= 2;
$wrong->attach($session);
is($client->answer, "0|moved\n", 'a call goes to the gateway at which the session is now');
$control->faults;
$control->attach($session);

# ---- a gateway that is restarted in between ----
$client->send(run('sleep 1; echo survived'));
sleep 0.05 until grep { $_->{session} eq $session } grep { $_->{event} eq 'call' && ($_->{header}{command_len} // 0) == length('sleep 1; echo survived') } $control->logged;
$control->stop('KILL');
sleep 0.3;
$control->start;
$client->answer;
like($client->error, qr/AV009: outcome unknown: .*does not remember the command/, 'a runtime that has forgotten all: no second run') or diag($client->error);

# ---- what the runtime answers ----
my %word = (invalid => '22023', forgotten => 'AV009', no_command => '42704', no_file => '58P01', denied => '42501', wrong_file => '42809', no_space => '53100', busy => '53400', failed => '58030', nonsense => '58030');
for my $word (sort keys %word)
{
	$control->faults({ op => 'start', do => { change => { error => $word, message => "why\x1b[31m\n\x{e9}\x{20ac}\x{1}" } } });
	my $error = fails_with($node, run('true'), $word{$word}, $word eq 'forgotten' ? qr/outcome unknown: .*does not remember/ : qr/could not run a command: why \[31m /, "the runtime says $word");
	unlike($error, qr/[\x01\x1b]/, 'without control characters');
}
sub message { my ($header, $bytes) = @_; return { raw => unpack('H*', pack('N', length($header)) . $header . ($bytes // '')) }; }
my $ended = '"running": false, "exit_code": 0, "timed_out": false, "killed": false, "duration_ms": 1';
my $streams = '"stdout": {"total": 0, "from": 0, "len": 0, "lost": 0}, "stderr": {"total": 0, "from": 0, "len": 0, "lost": 0}';
my %nonsense = (
	'nothing' => { raw => '' }, 'no header' => { raw => '00000005' }, 'a header beyond the end' => { raw => '7fffffff7b7d' }, 'no JSON' => message('nonsense'), 'no object' => message('[1]'),
	'no UTF-8' => message("{\"error\": \"\xff\"}"), 'a NUL' => message("{\"error\": \"\\u0000\"}"), 'half a character' => message('{"message": "\ud800", "error": "x"}'), 'members of the wrong type' => message('{"running": "yes"}'),
	'deep' => message('[' x 5000), 'deep in a member' => message('{"a": ' . '[' x 150 . ']' x 150 . '}'), 'too large a number' => message('{' . $ended . ', "size": 1e400}'), 'a number beyond a bigint' => message('{"size": 99999999999999999999}'),
	'no exit code' => message('{"running": false, ' . $streams . '}'), 'an exit code beyond an int' => message('{' . ($ended =~ s/"exit_code": 0/"exit_code": 5000000000/r) . ", $streams}"),
	'no streams' => message("{$ended}"), 'less output than it says' => message("{$ended, " . ($streams =~ s/"len": 0/"len": 5/r) . '}'), 'more output than it says' => message("{$ended, $streams}", 'xyz'),
	'negative' => message("{$ended, " . ($streams =~ s/"total": 0/"total": -1/r) . '}'), 'a chunk that is too long' => message("{$ended, $streams}", 'x' x 300_000), 'a header that is too long' => message("{$ended, $streams" . ' ' x 100_000 . '}'),
	'more that never comes' => message("{$ended, " . ($streams =~ s/"total": 0/"total": 7/r) . '}'));
for my $what (sort keys %nonsense)
{
	# what never comes is asked for once more
	$control->faults({ op => 'start', do => $nonsense{$what} }, { op => 'output', do => $nonsense{$what} });
	fails_with($node, run('true'), '58000', qr/answer of the runtime of session $session makes no sense/, "an answer: $what");
}
$control->faults({ op => 'start', do => { raw => '00' x 1_300_000 }, times => 1000 });
fails_with($node, run('true', "timeout => '1 s'"), 'AV009', qr/too large/, 'an answer that is too long is not read to its end');
$control->faults({ op => 'start', session => $session, do => $nonsense{'too large a number'}, times => 100 });
is($node->safe_psql('postgres', "SELECT string_agg(coalesce(sqlstate, stdout), ',' ORDER BY sqlstate) FROM agentvm.exec_many('{$session,$other}', 'printf well')"), '58000,well', 'one that talks nonsense is in nobody else\'s way');
$control->faults({ op => 'input', do => { change => { taken => 1 << 40 } } });
fails_with($node, run('cat', "stdin => convert_to(repeat('i', 600000), 'UTF8')"), '58000', qr/makes no sense/, 'more input taken than there is');
$control->faults({ op => 'put', do => { change => { written => 5 } } });
fails_with($node, "SELECT agentvm.upload('$session', 'f', 'abc')", '58000', qr/makes no sense/, 'more written than there is');
$control->faults({ op => 'get', do => { change => { size => 0 } }, times => 9 });
fails_with($node, "SELECT agentvm.upload('$session', 'f', 'abc'), agentvm.download('$session', 'f')", '58000', qr/makes no sense/, 'more read than there is');
$control->faults({ op => 'get', do => { change => { size => 700_000 } }, times => 9 });
fails_with($node, "SELECT agentvm.download('$session', 'f')", '58000', qr/makes no sense/, 'less read than there is');
$control->faults;

# ---- who gives up tells the gateway: the connection is closed, and the command ends ----
sub ends_quickly
{
	my ($what, $how, $sqlstate, $statement) = @_;
	my $mark = $control->mark;
	my $pid_file = "$dir/pid";
	unlink $pid_file;
	my $begun = AgentVM::Client->new($node);
	$begun->send($statement // run("echo \$\$ > pid.new; mv pid.new pid; exec sleep 100"));
	my $end = time + 60;
	sleep 0.02 until -s $pid_file || time > $end;
	my $pid = slurp_file($pid_file);
	my $since = time;
	$how->($begun);
	sleep 0.01 while time < $since + 20 && !grep { $_->{event} eq 'close' } $control->logged($mark);
	cmp_ok(time - $since, '<', 1.2, "$what: the connection is closed");
	sleep 0.01 while time < $since + 20 && kill 0, $pid;
	cmp_ok(time - $since, '<', 1.7, "$what: and the command ended");
	return unless $sqlstate;
	$begun->answer;
	like($begun->error, qr/$sqlstate/, "$what: $sqlstate");
	return;
}
ends_quickly('cancel', sub { $node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $_[0]->pid . ')') }, '57014');
ends_quickly('cancel in a transaction', sub { $node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $_[0]->pid . ')') }, '57014', "BEGIN;\n" . run("echo \$\$ > pid.new; mv pid.new pid; exec sleep 100"));
ends_quickly('SIGTERM', sub { $node->safe_psql('postgres', 'SELECT pg_terminate_backend(' . $_[0]->pid . ')') });
ends_quickly('a client that is killed', sub { $_[0]{psql}->kill_kill(grace => 0); delete $_[0]{psql} });
ends_quickly('exec_many', sub { $node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $_[0]->pid . ')') }, '57014', "SELECT * FROM agentvm.exec_many('{$session,$other}', 'echo \$\$ > pid.new; mv pid.new pid; exec sleep 100')");
ends_quickly('an error that is caught', sub { $node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $_[0]->pid . ')') }, undef,
	"DO \$do\$ BEGIN PERFORM agentvm.exec('$session', 'echo \$\$ > pid.new; mv pid.new pid; exec sleep 100'); EXCEPTION WHEN query_canceled THEN PERFORM pg_sleep(3); END \$do\$");
cmp_ok(seconds(sub { fails_with($node, "SET statement_timeout = '700ms'; " . run('sleep 60'), '57014', qr/statement timeout/, 'statement_timeout') }), '<', 2, 'in time');
$control->faults({ op => 'start', do => 404, times => 1000 });
cmp_ok(seconds(sub { fails_with($node, "SET statement_timeout = '500ms'; " . run('true'), '57014', qr/statement timeout/, 'also while it tries again') }), '<', 2, 'in time');
$control->faults;
my $started = $node->safe_psql('postgres', "SELECT agentvm.exec_start('$session', 'sleep 2; echo went on')");
is($node->safe_psql('postgres', "SELECT stdout FROM agentvm.exec_wait('$session', '$started')"), "went on\n", 'what exec_start() has begun hangs on no connection');
$control->faults({ op => 'start', do => 'cut', times => 1 });
fails_with($node, run('sleep 25; echo too late'), 'AV009', qr/command was killed, since the connection to the gateway broke/, 'a connection that breaks while it runs');
$client = AgentVM::Client->new($node);
$client->run(run('true'));
$control->faults({ op => 'start', do => 'cut', times => 1 });
$client->send(run('sleep 25; echo too late'));
$client->answer;
like($client->error, qr/AV009: command was killed, since the connection to the gateway broke/, 'also one that was kept, of which only libcurl knows');
$control->faults;

# ---- no connection is let go of between two calls for a command that hangs on it ----
$control->faults({ op => 'start', do => { wait_ms => 0 }, times => 300 });
is($node->safe_psql('postgres', "SELECT count(*), concat_ws(' ', exit_code, stdout, sqlstate, error) FROM agentvm.exec_many(array_fill('$session'::uuid, ARRAY[300]), 'sleep 3; printf x') GROUP BY 2"), '300|0 x', '300 commands that take longer than their first call');
$control->faults;

# ---- the backend is as good as new ----
$client = AgentVM::Client->new($node);
$client->run(run('true'));
my ($connection) = map { $_->{connection} } ($control->calls($session))[-1];
my $mark = $control->mark;
$client->run(run('true')) for 1 .. 5;
is(scalar(grep { $_->{event} eq 'open' } $control->logged($mark)), 0, 'connections are kept from statement to statement');
my $fds = () = glob('/proc/' . $client->pid . '/fd/*');
for (1 .. 20)
{
	$client->send("SET statement_timeout = '50ms'; SELECT agentvm.exec_many('{$session,$other,$session}', 'sleep 10')");
	$client->answer;
	like($client->error, qr/57014/, 'given up') if $_ == 1;
}
$client->run('RESET statement_timeout');
is($client->run(run('echo good')), "0|good\n", 'after errors all is well');
cmp_ok(scalar(() = glob('/proc/' . $client->pid . '/fd/*')), '<=', $fds + 3, 'no file is left open');
is(scalar(threads($client->pid)), 0, 'nor a thread');

done_testing();
