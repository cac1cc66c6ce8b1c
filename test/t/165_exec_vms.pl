# Commands and files in real VMs, by SQL alone: through gateway and cable, whatever dies on the way
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Stack;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my $stack = AgentVM::Stack->new(conf => "agentvm.max_output = '256kB'\n");
my ($node, $gateway) = ($stack->node, $stack->gateway);
make_role($node, 'app', login => 1, teams => ['acme']);
make_role($node, 'other', login => 1);
my $patience = $AgentVM::Stack::patience;

sub exec_sql { my ($vm, $command, @more) = @_; return join(', ', "agentvm.exec('$vm'", literal($command), @more) . ')'; }
sub run_in { my ($vm, $command, @more) = @_; return $node->safe_psql('postgres', 'SELECT stdout FROM ' . exec_sql($vm, $command, @more)); }
# the server logs a caller's own statement, if told to
sub app { return "SET log_statement = none; SET SESSION AUTHORIZATION app;\n$_[0]"; }

# Whether such a process is in the VM
sub runs { my ($vm, $what) = @_; return "SELECT trim(stdout, E'\\n') FROM " . exec_sql($vm, "ps -o args | grep -c '^$what'"); }

my ($one, $two) = $stack->ready('micro', 2);

# ---- exec ----
psql_ok($node, app('SELECT 1 FROM ' . exec_sql($one, 'true')), 'right after it is ready, a member may run commands in it');
is($node->safe_psql('postgres', 'SELECT exit_code, stdout, stderr, timed_out, truncated, duration < \'1 minute\' FROM ' . exec_sql($one, 'echo out; echo err >&2; exit 3')),
	"3|out\n|err\n|f|f|t", 'exit code and both streams');
is(run_in($one, 'echo "$A-$B"; pwd; id -u', "env => '{\"A\": \"a b\", \"B\": \"\$A\"}'", "cwd => '/tmp'"), "a b-\$A\n/tmp\n0\n", 'environment and directory');
is(run_in($one, 'wc -c', "stdin => convert_to(repeat('x', 1000000), 'UTF8')"), "1000000\n", 'a million bytes of input');
is(run_in($one, 'true', "stdin => convert_to(repeat('x', 1000000), 'UTF8')"), '', 'that are not read');
is($node->safe_psql('postgres', "SELECT stdout = E'a\\u00e4\\ufffd\\ufffdb' FROM " . exec_sql($one, q(printf 'a\303\244\377\000b'))), 't', 'what is no text is replaced');
is($node->safe_psql('postgres', "SELECT stdout FROM agentvm.exec_bytes('$one', " . literal(q(printf 'a\377\000b')) . ')'), '\x61ff0062', 'exec_bytes() has it all');
is($node->safe_psql('postgres', "SELECT length(stdout) BETWEEN 200000 AND 262144, left(stdout, 2), right(stdout, 7), truncated, exit_code FROM " . exec_sql($one, 'seq 1 300000')),
	"t|1\n|300000\n|t|0", 'of much output the beginning and the end');

is(run_in($one, q(if grep -q '^model name.*TCG' /proc/cpuinfo && grep -qw erms /proc/cpuinfo; then echo slow; fi)), '', 'no emulated processor asks for copies byte by byte');

# ---- its time ----
my $began = time;
is($node->safe_psql('postgres', 'SELECT exit_code, stdout, timed_out FROM ' . exec_sql($one, "echo before; trap '' TERM; sleep 987 & wait; sleep 987", "timeout => '2 s'")), "124|before\n|t",
	'a command that ignores TERM is ended, with what it has said');
cmp_ok(time - $began, '<', 20, 'in time');
is($node->safe_psql('postgres', runs($one, 'sleep 987')), 0, 'and all of its processes with it');

# ---- cancelled, or its caller is gone ----
for my $how (qw(pg_cancel_backend pg_terminate_backend))
{
	my $client = AgentVM::Client->new($node);
	$client->send('SELECT * FROM ' . exec_sql($one, 'echo begun >/tmp/begun; sleep 876'));
	await($node, runs($one, 'sleep 876'), 1, name => 'a command is under way');
	my $cancelled = time;
	psql_ok($node, "SELECT $how(" . $client->pid . ')');
	await($node, runs($one, 'sleep 876'), 0, name => "$how(): it is killed in the VM");
	cmp_ok(time - $cancelled, '<', 3, 'at once');
}
fails_with($node, "SET statement_timeout = '1s'; SELECT * FROM " . exec_sql($one, 'sleep 765'), '57014', qr/statement timeout/, 'statement_timeout');
await($node, runs($one, 'sleep 765'), 0, name => 'does the same');

# ---- many at once ----
{
	my @clients = map { AgentVM::Client->new($node) } 1 .. 8;
	$began = time;
	$clients[$_]->send("SELECT stdout FROM " . exec_sql($one, "sleep 2; echo $_")) for 0 .. 7;
	$stack->beats($one, 'the heartbeat goes on beside them');
	is(join(' ', map { $_->answer } @clients), join(' ', map { "$_\n" } 0 .. 7), 'eight commands at once, each with its own output') or diag(map { $_->error } @clients);
	cmp_ok(time - $began, '<', 14, 'none waits for another');
}
is($node->safe_psql('postgres', "SELECT string_agg(concat_ws(' ', session_id = '$two', exit_code, stdout, sqlstate, error), ',' ORDER BY session_id = '$two', sqlstate) FROM agentvm.exec_many(ARRAY['$one', '$two', '00000000-0000-7000-8000-000000000000']::uuid[], 'hostname')"),
	"f AV005 session 00000000-0000-7000-8000-000000000000 does not exist,f 0 agentvm-$one\n,t 0 agentvm-$two\n", 'exec_many(): each VM its own answer, or error');

# ---- commands that outlive their statement ----
my $command = $node->safe_psql('postgres', "SELECT agentvm.exec_start('$one', 'echo first; read line </tmp/go; echo \$line; exit 5') FROM " . exec_sql($one, 'mkfifo /tmp/go'));
await($node, "SELECT stdout FROM agentvm.exec_output('$one', '$command')", "first\n", name => 'exec_output() while it runs');
is($node->safe_psql('postgres', "SELECT kind, role FROM agentvm.command WHERE command_id = '$command'"), 'exec|' . $node->safe_psql('postgres', 'SELECT current_user'), 'what is under way can be seen');
fails_with($node, "SELECT * FROM agentvm.exec_wait('$one', '$command', '1 s')", 'AV011', undef, 'exec_wait() has a time limit');
psql_ok($node, 'SELECT 1 FROM ' . exec_sql($one, 'echo second >/tmp/go'));
is($node->safe_psql('postgres', "SELECT exit_code, stdout FROM agentvm.exec_wait('$one', '$command')"), "5|first\nsecond\n", 'exec_wait() has all');
is($node->safe_psql('postgres', "SELECT running, exit_code, stdout, stdout_next FROM agentvm.exec_output('$one', '$command', 6)"), "f|5|second\n|13", 'and exec_output() what is after an offset');
await($node, "SELECT count(*) FROM agentvm.command WHERE command_id = '$command'", 0, name => 'it is under way no more');
$command = $node->safe_psql('postgres', "SELECT agentvm.exec_start('$one', 'sleep 654')");
is($node->safe_psql('postgres', "SELECT agentvm.exec_kill('$one', '$command'), (SELECT exit_code FROM agentvm.exec_wait('$one', '$command')), agentvm.exec_kill('$one', '$command', 'KILL')"), 't|143|f', 'exec_kill()');
fails_with($node, "SELECT * FROM agentvm.exec_output('$one', gen_random_uuid())", '42704', undef, 'an unknown command');

# ---- files ----
is($node->safe_psql('postgres', "SELECT agentvm.upload('$one', '/srv/new/dir/file', convert_to(repeat('0123456789', 100000), 'UTF8'), '0750')"), 1000000, 'upload()');
is(run_in($one, 'stat -c "%a %s" /srv/new/dir/file; ls -A /srv/new/dir'), "750 1000000\nfile\n", 'mode, size, and nothing beside it');
is($node->safe_psql('postgres', "SELECT sha256(agentvm.download('$one', '/srv/new/dir/file')) = sha256(convert_to(repeat('0123456789', 100000), 'UTF8'))"), 't', 'download()');
is($node->safe_psql('postgres', "SELECT convert_from(agentvm.download('$one', '/srv/new/dir/file', 999995, 100), 'UTF8')"), '56789', 'a part of it');
is($node->safe_psql('postgres', "SELECT agentvm.upload('$two', '/tmp/copy', agentvm.download('$one', '/srv/new/dir/file')), (SELECT stdout FROM " . exec_sql($two, 'sha256sum </tmp/copy | cut -c1-8') . ')'),
	'1000000|' . run_in($one, 'sha256sum </srv/new/dir/file | cut -c1-8'), 'from one VM to another');
fails_with($node, "SELECT agentvm.download('$one', '/nowhere')", '58P01', qr/\/nowhere/, 'no such file');
fails_with($node, "SELECT agentvm.download('$one', '/srv')", '42809', undef, 'a directory');
run_in($one, 'mkdir -p /srv/tree/empty && echo x >/srv/tree/x && ln -s x /srv/tree/link');
cmp_ok($node->safe_psql('postgres', "SELECT agentvm.upload_tar('$two', '/srv/copied', agentvm.download_tar('$one', '/srv/tree'))"), '>', 0, 'a directory as a tar archive, to another VM');
is(run_in($two, 'cd /srv/copied && find . | sort && cat link; ls -A /tmp | grep agentvm'), ".\n./empty\n./link\n./x\nx\n", 'all of it, and no archive is left');
fails_with($node, "SELECT agentvm.upload_tar('$two', '/srv/copied', 'no archive at all')", '22023', undef, 'what is no archive');
is(run_in($one, 'ls -A /tmp | grep agentvm; true'), '', 'nor where it came from');

# ---- who may, and when ----
fails_with($node, "SET SESSION AUTHORIZATION other; SELECT * FROM " . exec_sql($one, 'true'), 'AV005', undef, 'another team');
{
	my $young = $stack->vm;
	fails_with($node, 'SELECT * FROM ' . exec_sql($young, 'true'), 'AV007', undef, 'a VM that is not ready');
	psql_ok($node, "SELECT agentvm.terminate('$young')");
	fails_with($node, 'SELECT * FROM ' . exec_sql($young, 'true'), 'AV006', undef, 'or is ending');
}

# ---- the log ----
psql_ok($node, app('BEGIN; SELECT 1 FROM ' . exec_sql($one, 'echo rolled back >/tmp/rolled', "env => '{\"TOKEN\": \"planted-secret\"}'") . '; ROLLBACK'));
await($node, <<"SQL", 'exec_started,exec_ended|t|t|0', name => 'a command of a transaction that is rolled back is in the log: who, what, how it ended');
SELECT string_agg(kind, ',' ORDER BY event_id), bool_and(detail ->> 'role' = 'app'), bool_or(detail ->> 'sha256' = encode(sha256('echo rolled back >/tmp/rolled'), 'hex')), max(detail ->> 'exit_code')
FROM agentvm.session_event WHERE session_id = '$one' AND detail ->> 'command' = (SELECT max(detail ->> 'command') FROM agentvm.session_event WHERE detail ->> 'sha256' = encode(sha256('echo rolled back >/tmp/rolled'), 'hex'))
SQL
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session_event e WHERE e::text ~ ('rolled back|planted-' || 'secret')"), 0, 'neither its text nor its environment');
log_lacks($node, 'planted-secret');
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.log_commands = on; SELECT pg_reload_conf()");
await($node, 'SHOW agentvm.log_commands', 'on');
run_in($one, 'echo seen $T planted-too', "env => '{\"T\": \"planted-too\"}'");
is($node->safe_psql('postgres', "SELECT count(*) FILTER (WHERE e::text ~ 'echo seen'), count(*) FILTER (WHERE e::text ~ 'planted-too') FROM agentvm.session_event e"), '1|0', 'agentvm.log_commands: the text, without what is in the environment');

# ---- what a hostile guest, or a careless agent, does to its VM ----
is($node->safe_psql('postgres', 'SELECT timed_out, truncated FROM ' . exec_sql($two, ':() { : | : & }; :; sleep 5; :', "timeout => '10 s'")) =~ /^[tf]/, 1, 'a fork bomb');
await($node, 'SELECT exit_code FROM ' . exec_sql($two, 'true'), 0, timeout => 90, name => 'is over');
$stack->beats($two, 'the runtime lives on');
is($node->safe_psql('postgres', 'SELECT exit_code, truncated, length(stdout) BETWEEN 200000 AND 262144 FROM ' . exec_sql($two, 'head -c 200000000 /dev/zero | tr "\0" x')), '0|t|t', 'a flood of output');
$stack->beats($two);

# ---- the gateway dies in the middle ----
{
	my $client = AgentVM::Client->new($node);
	$client->send('SELECT exit_code, stdout FROM ' . exec_sql($one, 'echo run >>/tmp/ran; sleep 4; cat /tmp/ran'));
	await($node, "SELECT convert_from(agentvm.download('$one', '/tmp/ran'), 'UTF8')", "run\n", name => 'a command is under way');
	$gateway->stop('KILL');
	$gateway->start;
	is($client->answer, "0|run\n", 'the gateway is killed, and the command has run once') or diag($client->error);
	await($node, "SELECT count(*) FROM agentvm.command WHERE session_id = '$one'", 0, timeout => $patience, name => 'its end is in the log');
}
{
	# all that has a meaning on the cable is in it
	my $content = "decode(repeat('00c0dbdcdd065a', 2000000), 'hex')";
	my @clients = map { AgentVM::Client->new($node) } 1 .. 2;
	$clients[$_]->send("SELECT agentvm.upload('$one', '/tmp/large$_', $content)") for 0, 1;
	await($node, "SELECT count(*) FROM agentvm.command WHERE session_id = '$one' AND kind = 'upload'", 2, name => 'two transfers at once are under way');
	await($node, "SELECT stdout::bigint > 0 FROM " . exec_sql($one, 'cat /tmp/.agentvm-* | wc -c'), 't', name => 'the first bytes are there');
	$gateway->stop('KILL');
	$gateway->start;
	is($_->answer, 14_000_000, 'the gateway is killed, and a transfer goes on') or diag($_->error) for @clients;
	$clients[$_]->send("SELECT agentvm.download('$one', '/tmp/large$_') = $content") for 0, 1;
	await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$one' AND kind = 'download_started' AND detail->>'path' LIKE '/tmp/large_'", 't', name => 'back again');
	$gateway->stop('KILL');
	$gateway->start;
	is($_->answer, 't', 'once more, and what comes is what was sent') or diag($_->error) for @clients;
	await($node, "SELECT count(*) FROM agentvm.command WHERE session_id = '$one'", 0, timeout => $patience, name => 'their ends are in the log');
}
$gateway->stop('KILL');
fails_with($node, 'SELECT * FROM ' . exec_sql($one, 'true'), 'AV009', qr/gateway/, 'no gateway');
$gateway->start;
await($node, 'SELECT exit_code FROM ' . exec_sql($one, 'true'), 0, timeout => $patience, name => 'it is there again');

# ---- run() ----
is($node->safe_psql('postgres', "CALL agentvm.run('acme', 'echo ran; echo e >&2; exit 9', 'micro')"), "9|ran\n|e\n", 'CALL run()');
await($node, "SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL AND session_id NOT IN ('$one', '$two')", 0, timeout => $patience, name => 'its VM ends');
{
	my $client = AgentVM::Client->new($node);
	$client->send("CALL agentvm.run('acme', 'sleep 543', 'micro')");
	my $its = "SELECT session_id FROM agentvm.sessions WHERE state = 'ready' AND session_id NOT IN ('$one', '$two')";
	await($node, "SELECT count(*) FROM ($its) s", 1, timeout => $patience, name => 'a VM of run()');
	my $vm = $node->safe_psql('postgres', $its);
	await($node, "SELECT count(*) FROM agentvm.command WHERE session_id = '$vm'", 1, name => 'in which the command runs');
	is($node->safe_psql('postgres', "SELECT backend_xmin IS NULL FROM pg_stat_activity WHERE pid = " . $client->pid), 't', 'no snapshot is held meanwhile');
	psql_ok($node, 'SELECT pg_terminate_backend(' . $client->pid . ')');
	$stack->ended($vm, 'requested', 'its backend dies, and so does the VM');
}

# ---- the end ----
{
	my $client = AgentVM::Client->new($node);
	$client->send('SELECT * FROM ' . exec_sql($two, 'sleep 432'));
	await($node, "SELECT count(*) FROM agentvm.command WHERE session_id = '$two'", 1, name => 'a command is under way');
	psql_ok($node, "SELECT agentvm.terminate('$two')");
	$client->answer;
	like($client->error, qr/AV006/, 'whoever waits for a command is told that the VM ends');
	$stack->ended($two, 'requested');
	is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.command WHERE session_id = '$two'"), 0, 'nothing runs in it any more');
}
psql_ok($node, "SELECT agentvm.terminate('$one')");
$stack->ended($one, 'requested');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.command"), 0, 'no command is under way anywhere');
is($node->safe_psql('postgres', "SELECT agentvm.seal_audit() >= 0, (SELECT count(*) FROM agentvm.verify_audit('acme'))"), 't|0', 'the log is sound');

done_testing();
