# Commands in VMs, as SQL has them: what goes there, what comes back, in which form
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Control;
use AgentVM::Test;
use Digest::SHA qw(sha256_hex);
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $node = new_node('main', conf => "agentvm.max_output = '256kB'\nagentvm.max_file_size = '4MB'\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme'), agentvm.create_team('globex')");
make_role($node, 'alice', teams => ['acme']);
my $control = AgentVM::Control->new($node);
my $session = $control->session('acme');

sub execute { my ($arguments, $columns, $function) = @_; return $node->safe_psql('postgres', "SELECT " . ($columns // 'stdout') . " FROM agentvm." . ($function // 'exec') . "('$session', $arguments)"); }

# ---- what comes back ----
is(execute(q{'echo hello; echo oops >&2; exit 3'}, q{exit_code, stdout, stderr, duration BETWEEN '0' AND '10 s', timed_out, truncated}), "3|hello\n|oops\n|t|f|f", 'a command');
is(execute(q{'true'}, q{exit_code, length(stdout), length(stderr)}), '0|0|0', 'one that says nothing');
is(execute(q{'echo $1$GREETING "$(pwd)" "$HOME"', env => '{"GREETING": "hé\"llo"}', cwd => '/'}), "hé\"llo / " . $control->dir . "\n", 'environment and directory');
is(execute(q{'sleep 60', timeout => '1 s'}, 'exit_code, timed_out'), '124|t', 'a timeout is the runtime\'s, and no error');
is(execute(q{'kill -9 $$'}, 'exit_code, timed_out'), '137|f', 'a signal');
is(execute(q{'printf "a\0b\377c\303\251\342\202"'}, q{to_json(stdout)}), qq{"a\xef\xbf\xbdb\xef\xbf\xbdcé\xef\xbf\xbd\xef\xbf\xbd"}, 'NUL and what is not UTF-8 are replaced');
is(execute(q{'printf "a\0b\377"; printf "\0" >&2'}, q{encode(stdout, 'hex'), encode(stderr, 'hex')}, 'exec_bytes'), '610062ff|00', 'exec_bytes() has them as they are');
my $begin = time;
is(execute(q{'head -c 262144 /dev/urandom | tr "\000-\177" "\200-\377"'}, q{octet_length(stdout) > 262144}), 't', 'also where hardly anything is');
cmp_ok(time - $begin, '<', 10, 'quickly');
is(execute(q{'cat', stdin => '\x00ff41'}, q{encode(stdout, 'hex')}, 'exec_bytes'), '00ff41', 'so has stdin');

# output: in several chunks, and more than is kept
is(execute(q{'head -c 200000 /dev/zero | tr "\0" x; head -c 250000 /dev/zero | tr "\0" y >&2'}, q{md5(stdout) = md5(repeat('x', 200000)), md5(stderr) = md5(repeat('y', 250000)), truncated}), 't|t|f', 'more than one chunk of output');
is(execute(q{'echo begin; head -c 1000000 /dev/zero | tr "\0" x; echo end'}, q{length(stdout), left(stdout, 6), right(stdout, 5), truncated}), "262144|begin\n|xend\n|t", 'head and tail of too much');
cmp_ok(scalar($control->calls($session, 'output')), '>=', 2, 'it came in chunks');

# input: none, more than a chunk, more than is read
my $big = sha256_hex('0123456789abcdef' x 200_000);
is(execute(q{'sha256sum | cut -c1-64', stdin => convert_to(repeat('0123456789abcdef', 200000), 'UTF8')}), "$big\n", '3.2 MB of stdin');
my @inputs = $control->calls($session, 'input');
cmp_ok(scalar(@inputs), '>', 10, 'in pieces');
is(execute(q{'head -c 3', stdin => convert_to(repeat('0123456789abcdef', 200000), 'UTF8')}, 'exit_code, stdout'), '0|012', 'a command that does not read all of it');
is(execute(q{'sleep 2; wc -c', stdin => convert_to(repeat('0123456789abcdef', 200000), 'UTF8')}), "3200000\n", 'one that begins too late');
is(execute(q{'wc -c', stdin => ''}), "0\n", 'none at all');
fails_with($node, "SELECT agentvm.exec('$session', 'cat', stdin => decode(repeat('00', 4194305), 'hex'))", 'AV012', qr/"stdin" has 4194305 bytes/, 'too much');
$node->safe_psql('postgres', q{CREATE TABLE inputs (kind text, b bytea); ALTER TABLE inputs ALTER b SET STORAGE EXTERNAL;
	INSERT INTO inputs SELECT 'stored apart', decode(string_agg(md5(i::text), ''), 'hex') FROM generate_series(1, 100000) i;
	ALTER TABLE inputs ALTER b SET STORAGE EXTENDED; INSERT INTO inputs SELECT 'compressed', convert_to(repeat('0123456789abcdef', 100000), 'UTF8')});
is($node->safe_psql('postgres', "SELECT string_agg((stdout = encode(sha256(b), 'hex') || E'  -\n')::text, ',') FROM inputs, agentvm.exec('$session', 'sha256sum', stdin => b)"), 'true,true', 'stdin from a table, read in slices or not');

# ---- what goes there ----
my ($start) = grep { ($_->{env}{GREETING} // '') ne '' } $control->calls($session, 'start');
my $text = 'echo $1$GREETING "$(pwd)" "$HOME"';
my $me = $node->safe_psql('postgres', 'SELECT current_user');
is_deeply({ map { $_ => $start->{$_} } qw(op command_len input_len timeout_ms max_output lease_ms wait_ms age_ms cwd env owned) },
	{ op => 'start', command_len => length($text), input_len => 0, timeout_ms => 300_000, max_output => 262_144, lease_ms => 30_000, wait_ms => 20_000, age_ms => 0, cwd => '/', env => { GREETING => "h\x{e9}\"llo" }, owned => JSON::PP::true },
	'a start says what protocol.h asks for');
is_deeply($start->{audit}, { kind => 'exec', role => $me, sha256 => sha256_hex($text), bytes => length($text) }, 'what the log is told: not the text');
is(execute(q{'echo ' || repeat('x', 122875)}, q{length(stdout)}), 122876, 'the longest command');
$node->append_conf('postgresql.conf', 'agentvm.log_commands = on');
$node->reload;
$node->poll_query_until('postgres', q{SELECT current_setting('agentvm.log_commands') = 'on'});
$node->safe_psql('postgres', "SET SESSION AUTHORIZATION alice; SELECT agentvm.exec('$session', 'login --password hunter2hunter2 # é', env => '{\"PASSWORD\": \"hunter2hunter2\"}')");
my $audit = ($control->calls($session, 'start'))[-1]{audit};
is("$audit->{role}: $audit->{text}", "alice: login --password *** # \x{e9}", 'with agentvm.log_commands the text, too, but no value of env');
execute(q{repeat('"', 100000)});
$audit = ($control->calls($session, 'start'))[-1]{audit};
ok($audit->{text_cut} && length($audit->{text}) > 10_000 && length($audit->{text}) < 40_000, 'a long one is cut, and the log says so');

# ---- commands that outlive the statement ----
my $command = $node->safe_psql('postgres', "SELECT agentvm.exec_start('$session', 'read a; echo \"got \$a\"; read b; printf \"caf\\\\303\"; read c; printf \"\\\\251 \\\\377\"; exit 7', stdin => '\\x610a')");
like($command, qr/^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-/, 'exec_start() returns an id');
my ($begun) = grep { $_->{command} eq $command } $control->calls($session, 'start');
ok(!$begun->{owned} && $begun->{lease_ms} == 0 && $begun->{wait_ms} == 0 && $begun->{timeout_ms} == 3_600_000, 'which hangs on nobody');
await($node, "SELECT running, exit_code, timed_out, truncated FROM agentvm.exec_output('$session', '$command')", 'f|7|f|f', name => 'its end');
is($node->safe_psql('postgres', "SELECT to_json(stdout), stdout_next, stderr_next FROM agentvm.exec_output('$session', '$command')"), qq{"got a\\ncafé \xef\xbf\xbd"|13|0}, 'all that it has said');
is($node->safe_psql('postgres', "SELECT to_json(stdout), stdout_next FROM agentvm.exec_output('$session', '$command', 6)"), qq{"café \xef\xbf\xbd"|13}, 'from an offset on');
is($node->safe_psql('postgres', "SELECT stdout, stdout_next FROM agentvm.exec_output('$session', '$command', 13)"), '|13', 'nothing more');
is($node->safe_psql('postgres', "SELECT exit_code, to_json(stdout), timed_out, truncated FROM agentvm.exec_wait('$session', '$command')"), qq{7|"got a\\ncafé \xef\xbf\xbd"|f|f}, 'exec_wait() of one that has ended');
is($node->safe_psql('postgres', "SELECT agentvm.exec_kill('$session', '$command')"), 'f', 'which cannot be killed any more');

my $fifo = $control->dir . '/fifo';
system('mkfifo', '-m', '666', $fifo) == 0 or die 'mkfifo';
$command = $node->safe_psql('postgres', "SELECT agentvm.exec_start('$session', 'printf \"caf\\\\303\"; cat $fifo')");
await($node, "SELECT running, exit_code IS NULL, stdout, stdout_next FROM agentvm.exec_output('$session', '$command')", 't|t|caf|3', name => 'a character that is cut is held back');
is($node->safe_psql('postgres', "SELECT running, stdout, stdout_next FROM agentvm.exec_output('$session', '$command', 3)"), 't||3', 'for as long as it may be completed');
fails_with($node, "SELECT agentvm.exec_wait('$session', '$command', '1 s')", 'AV011', qr/did not end within 1 s.*HINT.*goes on/s, 'exec_wait() does not end it');
append_to_file($fifo, "\xa9!");
is($node->safe_psql('postgres', "SELECT exit_code, stdout FROM agentvm.exec_wait('$session', '$command', '1 min')"), '0|caf' . "\xc3\xa9!", 'it goes on');
is($node->safe_psql('postgres', "SELECT stdout, stdout_next FROM agentvm.exec_output('$session', '$command', 3)"), 'é!|6', 'and the character comes whole');

for my $signal (qw(TERM sigkill))
{
	$command = $node->safe_psql('postgres', "SELECT agentvm.exec_start('$session', 'sleep 100')");
	is($node->safe_psql('postgres', "SELECT agentvm.exec_kill('$session', '$command', '$signal')"), 't', "exec_kill() with $signal");
	is($node->safe_psql('postgres', "SELECT exit_code FROM agentvm.exec_wait('$session', '$command')"), $signal eq 'TERM' ? 143 : 137, 'ends it');
}
fails_with($node, "SELECT agentvm.$_", '42704', qr/no such command.*DETAIL.*runtime of session $session says so/s, "$_: of no command")
  for map { s/ID/'$session', '00000000-0000-7000-8000-000000000000'/r } 'exec_output(ID)', 'exec_wait(ID)', 'exec_kill(ID)';

# ---- who may, and when ----
for my $call (q{exec('ID', 'true')}, q{exec_bytes('ID', 'true')}, q{exec_start('ID', 'true')}, map({ "$_('ID', '$command')" } qw(exec_output exec_wait exec_kill)), q{upload('ID', 'f', '')}, q{download('ID', 'f')}, q{upload_tar('ID', '/f', '')}, q{download_tar('ID', '/f')})
{
	my $other = provision($node, 'globex');
	fails_with($node, as_role('alice', 'SELECT agentvm.' . ($call =~ s/ID/$other/r)), 'AV005', qr/session $other does not exist.*HINT.*another|belong/s, "$call: another team's session");
	await_state($node, $other, 'ready');
	fails_with($node, 'SELECT agentvm.' . ($call =~ s/ID/$other/r), '55000', qr/has no runtime.*HINT.*profile/s, "$call: without a runtime");
	$node->safe_psql('postgres', "SELECT agentvm.terminate('$other')");
	fails_with($node, 'SELECT agentvm.' . ($call =~ s/ID/$other/r), 'AV006', qr/(has ended|is ending): requested/, "$call: after its end");
}
my $early = provision($node, 'acme', q{options => '{"runtime": true}'});
fails_with($node, "SELECT agentvm.exec('$early', 'true')", 'AV007', qr/is not ready, but provisioning.*HINT.*CALL agentvm.await\('$early'\)/s, 'a session that is not ready');
fails_with($node, q{BEGIN; SELECT agentvm.exec(agentvm.provision('acme', options => '{"runtime": true}'), 'true')}, 'AV007', qr/not committed.*HINT.*COMMIT first/s, 'one of this transaction');
is(execute(q{'echo in a transaction'}, 'stdout'), "in a transaction\n", 'inside of a transaction');
is($node->safe_psql('postgres', "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT agentvm.extend('$session', '1 min') IS NOT NULL; SELECT stdout FROM agentvm.exec('$session', 'echo so')"), "t\nso\n", 'that has changed its row');
is($node->safe_psql('postgres', "SET SESSION AUTHORIZATION alice; SET default_transaction_read_only = on; SELECT stdout FROM agentvm.exec('$session', 'echo member')"), "member\n", 'by a member, read only');

# ---- odd surroundings ----
$node->safe_psql('postgres', q{CREATE SCHEMA trap; CREATE FUNCTION trap.eq(uuid, uuid) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped'; END $$; CREATE OPERATOR trap.= (FUNCTION = trap.eq, LEFTARG = uuid, RIGHTARG = uuid)});
is($node->safe_psql('postgres', "SET $_; SELECT stdout FROM agentvm.exec('$session', 'echo odd')"), "odd\n", $_)
  for "search_path = ''", 'search_path = trap, pg_catalog', "default_transaction_isolation = 'serializable'", 'default_transaction_read_only = on', "session_replication_role = 'replica'", 'row_security = off', "lock_timeout = '1ms'",
  "idle_in_transaction_session_timeout = '1ms'", "IntervalStyle = 'sql_standard'", 'standard_conforming_strings = off', "client_encoding = 'LATIN1'", 'enable_indexscan = off', "plan_cache_mode = 'force_generic_plan'", 'transform_null_equals = on';

# ---- many ----
my @sessions = ($session, map { $control->session('acme') } 1 .. 3);
my $nobody = '01234567-89ab-7def-8123-456789abcdef';
my $list = join(',', @sessions, $sessions[1], $nobody, 'NULL', $early);
is($node->safe_psql('postgres', "SELECT count(*), count(*) FILTER (WHERE exit_code = 0 AND stdout = E'hi\\n' AND sqlstate IS NULL AND error IS NULL), count(DISTINCT session_id) FROM agentvm.exec_many('{$list}', 'echo hi')"), '8|5|6', 'many at once, a row for each');
is($node->safe_psql('postgres', "SELECT coalesce(session_id::text, 'null'), sqlstate, error FROM agentvm.exec_many('{$list}', 'echo hi') WHERE exit_code IS NULL AND stdout IS NULL AND truncated IS NULL ORDER BY sqlstate"),
	"null|22004|session_id must not be null\n$nobody|AV005|session $nobody does not exist\n$early|AV007|session $early is not ready, but provisioning", 'with its own error');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.exec_many('{}', 'true')"), 0, 'none');
$begin = time;
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.exec_many(array_fill('$session'::uuid, ARRAY[40]), 'sleep 1; cat', stdin => 'x') WHERE stdout = 'x'"), 40, 'forty in one VM');
cmp_ok(time - $begin, '<', 20, 'beside each other');

# rows come as they are there: the slow one does not hold up the quick ones
my $client = AgentVM::Client->new($node);
$client->run('BEGIN');
my $slow = "CASE x WHEN 1 THEN 1 ELSE 0 END";
$client->run("DECLARE c CURSOR FOR SELECT (agentvm.exec_many('{$sessions[0],$sessions[1]}', 'mkdir $fifo.first 2>/dev/null && exec sleep 30; echo quick')).stdout");
$begin = time;
is($client->run('FETCH c'), "quick\n", 'a target list passes rows on as they finish');
cmp_ok(time - $begin, '<', 10, 'at once');
my $mark = $control->mark;
$client->run('CLOSE c; COMMIT');
my ($first) = grep { $_->{length} } $control->calls(undef, 'start', 0);
my $end = time + 10;
Time::HiRes::sleep(0.02) while !grep({ $_->{event} eq 'close' } $control->logged($mark)) && time < $end;
cmp_ok(time, '<', $end - 9, 'who stops reading ends the others: the connection is closed');
fails_with($node, "SELECT agentvm.exec_many('{$session}', 'true') FROM generate_series(1, 3) i WHERE 1 / (i - 2) IS NOT NULL", '22012', undef, 'an error of the statement itself');
is(execute(q{'echo well'}), "well\n", 'leaves nothing behind');
is($node->safe_psql('postgres', "SELECT string_agg(stdout, '') FROM (VALUES ('$sessions[1]'::uuid), ('$sessions[2]')) s (id), LATERAL agentvm.exec(id, 'printf x')"), 'xx', 'one after another');
is($node->safe_psql('postgres', "SELECT a.stdout || b.stdout FROM agentvm.exec('$session', 'printf a') a, agentvm.exec('$sessions[1]', 'printf b') b"), 'ab', 'two in one statement');
is($node->safe_psql('postgres', "SELECT (agentvm.exec_many('{$session,$sessions[1]}', 'printf m')).stdout, (agentvm.exec('$sessions[2]', 'printf e')).stdout"), "m|e\nm|", 'two that take turns');

# ---- other encodings: the VM speaks UTF-8 ----
for my $encoding (qw(LATIN1 SQL_ASCII EUC_JP))
{
	my $db = lc "db_$encoding";
	$node->safe_psql('postgres', "CREATE DATABASE $db ENCODING '$encoding' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'");
	$node->safe_psql($db, q{CREATE EXTENSION agentvm CASCADE; SELECT agentvm.create_team('acme')});
	my $there = $node->safe_psql($db, q{INSERT INTO agentvm.session (session_id, team_id, provider, state, runtime, next_check_at) SELECT gen_random_uuid(), 'acme', 'noop', 'ready', true, NULL RETURNING session_id});
	$node->safe_psql($db, "INSERT INTO agentvm.session_heartbeat (session_id, gateway_id) VALUES ('$there', 'gw1'); INSERT INTO agentvm.gateway (gateway_id, control_address) VALUES ('gw1', 'unix:" . $control->socket . "')");
	my $said = $node->safe_psql($db, qq{SET client_encoding = '$encoding'; SELECT encode(convert_to(stdout, '$encoding'), 'hex') FROM agentvm.exec('$there', 'printf "\\\\303\\\\251\\\\342\\\\202\\\\254\\\\343\\\\201\\\\202\\\\377\\\\0z"')});
	my %expected = (LATIN1 => 'e93f3f3f3f7a', SQL_ASCII => 'c3a9e282ace381823f3f7a', EUC_JP => '8fabb13fa4a23f3f7a');
	is($said, $expected{$encoding}, "$encoding: what it lacks is ?");
	$begin = time;
	is($node->safe_psql($db, qq{SELECT octet_length(stdout) FROM agentvm.exec('$there', 'for i in {1..80000}; do printf "\\352\\260\\200"; done')}), $encoding eq 'SQL_ASCII' ? 240_000 : 80_000, "$encoding: nothing but that");
	cmp_ok(time - $begin, '<', 10, "$encoding: quickly");
	my $sent = $encoding eq 'SQL_ASCII' ? "SET client_encoding = 'SQL_ASCII'; " : "SET client_encoding = 'UTF8'; ";
	is($node->safe_psql($db, $sent . qq{SELECT encode(stdout, 'hex') FROM agentvm.exec_bytes('$there', 'printf é\$X', env => '{"X": "é"}')}), 'c3a9c3a9', "$encoding: command and environment get there in UTF-8");
	fails_with($node, qq{SET client_encoding = 'SQL_ASCII'; SELECT agentvm.exec('$there', E'echo \\377')}, '22021', undef, 'bytes that mean nothing', dbname => $db) if $encoding eq 'SQL_ASCII';
}

# ---- secrets: env shows nowhere ----
my $secret = 'Zk3-planted-secret-9x';
$client = AgentVM::Client->new($node);
$client->run('SET log_statement = none; SET log_min_duration_statement = -1');
for my $function (qw(exec exec_bytes exec_start))
{
	$client->send("SELECT agentvm.$function('$session', 'exit 1', cwd => '/nowhere', env => '{\"TOKEN\": \"$secret\"}')");
	$client->answer;
	unlike($client->error, qr/$secret/, "$function(): not in an error");
}
$client->send("DO \$\$ BEGIN PERFORM agentvm.exec('$nobody', 'true', env => '{\"TOKEN\": \"$secret\"}'); END \$\$");
$client->answer;
like($client->error, qr/AV005/, 'an error in PL/pgSQL');
unlike($client->error, qr/$secret/, 'does not tell it, either');
$client->send("SELECT agentvm.exec('$session', 'sleep 3', env => '{\"TOKEN\": \"$secret\"}')");
await($node, 'SELECT query ~ \'agentvm.exec\(\): the statement is not shown\' FROM pg_stat_activity WHERE pid = ' . $client->pid, 't', name => 'pg_stat_activity does not show it');
$client->answer;
log_lacks($node, $secret, 'nor does the log');
unlike(encode_json([ map { $_->{audit} } $control->calls($session, 'start') ]), qr/$secret|hunter2hunter2/, 'nor what the log is told');

done_testing();
