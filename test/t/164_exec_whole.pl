# Commands and files through the real gateway and the real runtime, as processes of this machine
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Gateway;
use AgentVM::Test;
use AgentVM::VM;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);

my $node = new_node('main', conf => "agentvm.heartbeat_interval = 1\nagentvm.max_output = '1MB'\n");
my $control = PostgreSQL::Test::Utils::tempdir_short() . '/control';
$node->safe_psql('postgres', q{SELECT agentvm.create_team('acme'); SELECT agentvm.create_profile('vm', 'noop', options => '{"runtime": true}', runtime => true)});
$node->safe_psql('postgres', "INSERT INTO agentvm.gateway (gateway_id, control_address) VALUES ('gw1', 'unix:$control')");
my $gateway = AgentVM::Gateway->new($node, options => [ '--name', 'gw1', '--control', "unix:$control" ]);

sub ready { my $session = provision($node, 'acme', q{profile => 'vm'}); my $vm = AgentVM::VM->boot($node, $gateway, $session); await_state($node, $session, 'ready'); return ($session, $vm); }

my ($session, $vm) = ready();
my $work = $vm->dir . '/work';
my $client = AgentVM::Client->new($node);
sub execute { my ($arguments, $columns) = @_; return $client->run("SELECT $columns FROM agentvm.exec('$session', $arguments)"); }

# ---- commands ----
is(execute(q{'echo hello; echo oops >&2; exit 3'}, 'exit_code, stdout, stderr, timed_out, truncated'), "3|hello\n|oops\n|f|f", 'a command');
is(execute(q{'wc -c', stdin => convert_to(repeat('x', 3000000), 'UTF8')}, 'stdout'), "3000000\n", 'input in pieces');
is(execute(q{'head -c 3', stdin => convert_to(repeat('x', 3000000), 'UTF8')}, 'stdout'), 'xxx', 'of which not all is read');
is(execute(q{'head -c 1000000 /dev/zero | tr "\0" x'}, 'length(stdout), truncated'), '1000000|f', 'output in chunks');
is(execute(q{'echo a; head -c 3000000 /dev/zero | tr "\0" x; echo z'}, 'length(stdout), left(stdout, 2), right(stdout, 2), truncated'), "1048576|a\n|z\n|t", 'too much output');
is(execute(q{'sleep 100', timeout => '1 s'}, 'exit_code, timed_out'), '124|t', 'a timeout');
is(execute(q{'echo $GREETING $PWD', env => '{"GREETING": "hi"}', cwd => '/'}, 'stdout'), "hi /\n", 'environment and directory');
is(execute(q{'true', cwd => '/nowhere'}, 'exit_code > 0, length(stderr) > 0'), 't|t', 'no such directory');
my $command = $client->run("SELECT agentvm.exec_start('$session', 'echo a; sleep 2; echo b')");
await($node, "SELECT stdout, stdout_next, running FROM agentvm.exec_output('$session', '$command')", "a\n|2|t", name => 'what it has said so far');
is($client->run("SELECT stdout FROM agentvm.exec_wait('$session', '$command')"), "a\nb\n", 'and in the end');
$command = $client->run("SELECT agentvm.exec_start('$session', 'sleep 100')");
is($client->run("SELECT agentvm.exec_kill('$session', '$command'), (SELECT exit_code FROM agentvm.exec_wait('$session', '$command')), agentvm.exec_kill('$session', '$command')"), 't|143|f', 'a signal');

# ---- cancel ----
my $other = AgentVM::Client->new($node);
$other->send("SELECT agentvm.exec('$session', 'exec sleep 98765')");
my $end = time + 30;
sleep 0.02 until AgentVM::Process::pids(cmdline => qr/^sleep\0+98765/) || time > $end;
my $since = time;
$node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $other->pid . ')');
sleep 0.02 while AgentVM::Process::pids(cmdline => qr/^sleep\0+98765/) && time < $since + 30;
cmp_ok(time - $since, '<', 1, 'a command is gone within a second of its cancel');
$other->answer;

# ---- files ----
is($client->run("SELECT agentvm.upload('$session', 'dir/large', convert_to(repeat('0123456789abcdef', 100000), 'UTF8'), '0700'), agentvm.download('$session', '$work/dir/large') = convert_to(repeat('0123456789abcdef', 100000), 'UTF8')"), '1600000|t', 'a file, there and back');
is($client->run("SELECT agentvm.upload('$session', 'dir/empty', ''), length(agentvm.download('$session', 'dir/empty')), agentvm.download('$session', 'dir/large', 16, 3)"), '0|0|\x303132', 'an empty one, and a page');
fails_with($node, "SELECT agentvm.download('$session', $_->[0])", $_->[1], qr/could not download/, "$_->[0]: $_->[1]") for [ "'nowhere'", '58P01' ], [ "'dir'", '42809' ];
cmp_ok($client->run("SELECT agentvm.upload_tar('$session', '$work/copy', agentvm.download_tar('$session', '$work/dir'))"), '>', 1_600_000, 'a directory, there and back');
is(slurp_file("$work/copy/large"), slurp_file("$work/dir/large"), 'is the same');
is(join(' ', glob('/tmp/.agentvm-*.tar')), '', 'no archive stays behind');
fails_with($node, "SELECT agentvm.upload_tar('$session', '$work/copy', 'no archive')", '22023', qr/could not unpack into/, 'no archive');
fails_with($node, "SELECT agentvm.download_tar('$session', '$work/nowhere')", '58P01', qr/could not pack/, 'no directory');

# ---- none of these bytes is in the database's log, nor do they take a transaction of the caller's ----
my $bytes = q{convert_to((SELECT string_agg(md5(i::text), '') FROM generate_series(1, 100000) i), 'UTF8')};
my $lsn = $client->run('SELECT pg_current_wal_insert_lsn()');
is($client->run("BEGIN; SELECT agentvm.upload('$session', 'bytes', $bytes), sha256(agentvm.download('$session', 'bytes')) = sha256($bytes), (SELECT stdout FROM agentvm.exec('$session', 'wc -c; head -c 1000000 bytes >&2', stdin => $bytes)), pg_current_xact_id_if_assigned() IS NULL; COMMIT"),
	"3200000|t|3200000\n|t", 'ten megabytes, within a transaction that has not become one');
cmp_ok($client->run("SELECT pg_current_wal_insert_lsn() - '$lsn'"), '<', 1_000_000, 'nor have they been written');

# ---- many ----
my @more = map { [ ready() ] } 1 .. 3;
my $list = join(',', $session, map { $_->[0] } @more);
is($client->run("SELECT count(*), count(DISTINCT session_id) FROM agentvm.exec_many((SELECT array_agg(id) FROM unnest('{$list}'::uuid[]) id, generate_series(1, 50)), 'echo hi') WHERE stdout = E'hi\\n'"), '200|4', '200 commands in four VMs');

# ---- a gateway that is restarted ----
$other->send("SELECT stdout FROM agentvm.exec('$session', 'sleep 3; echo survived')");
$end = time + 30;
sleep 0.02 until AgentVM::Process::pids(cmdline => qr/survived/) || time > $end;
$gateway->stop('KILL');
$gateway->start;
is($other->answer, "survived\n", 'a command goes on, and its end is told') or diag($other->error);
is(execute(q{'echo back'}, 'stdout'), "back\n", 'what comes next, too');

# ---- run() ----
$other->send("CALL agentvm.run('acme', 'echo done; exit 5', 'vm')");
$node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM agentvm.session WHERE bound_pid IS NOT NULL AND state = 'provisioning'}) or die;
my $once = $node->safe_psql('postgres', 'SELECT session_id FROM agentvm.session WHERE bound_pid IS NOT NULL');
my $twin = AgentVM::VM->boot($node, $gateway, $once);
is($other->answer, "5|done\n|", 'run()') or diag($other->error);
await_state($node, $once, 'terminated');

# ---- the log ----
await($node, 'SELECT count(*) FROM agentvm.command', 0, name => 'nothing is under way any more');
my $me = $node->safe_psql('postgres', 'SELECT current_user');
is($node->safe_psql('postgres', q{SELECT string_agg(DISTINCT detail ->> 'role', ',') FROM agentvm.session_event WHERE kind LIKE '%\_started'}), $me, 'the log says who');
is($node->safe_psql('postgres', q{SELECT count(*) FROM agentvm.session_event s WHERE kind ~ '^(exec|upload|download)_started$' AND NOT EXISTS (SELECT FROM agentvm.session_event e WHERE e.session_id = s.session_id AND e.kind = replace(s.kind, 'started', 'ended') AND e.detail ->> 'command' = s.detail ->> 'command')}), 0, 'each beginning has its end');
is($node->safe_psql('postgres', q{SELECT detail ->> 'exit_code', detail ->> 'stdout_bytes', detail ->> 'stderr_bytes' FROM agentvm.session_event WHERE kind = 'exec_ended' ORDER BY event_id LIMIT 1}), '3|6|5', 'and how it was');

done_testing();
