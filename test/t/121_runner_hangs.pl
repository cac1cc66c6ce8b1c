# Calls that hang for ever: nobody waits for them, and all else goes on
use strict;
use warnings;
use AgentVM::Blocking;
use AgentVM::Client;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_node('main', databases => 'postgres, served', conf => AgentVM::Blocking::conf() . "agentvm.lease = '3s'\nrestart_after_crash = on\n");
my $blocking = AgentVM::Blocking->new($node);
sub sql { return $node->safe_psql('postgres', @_); }
sql("SELECT agentvm.create_team('acme'); SELECT agentvm.create_team('globex'); SELECT agentvm.create_team('initech'); CREATE DATABASE other");
$blocking->await_runner('pid > 0', 'a runner serves the database');

# ---- a launch hangs, and others go on ----
my $hung = provision($node, 'acme', $blocking->with(hang => 'create'));
$blocking->await_runner('in_flight = 1');
{
	my @threads = threads($blocking->runner('pid'));
	cmp_ok(scalar @threads, '>', 0, 'it is made on a thread');
	is(join(' ', map { unblocked($_) } @threads), '', 'which gets no signal');
}
prompt($node, 'DROP DATABASE other', 1, 'DROP DATABASE of another database');
my $session = provision($node, 'acme', $blocking->with());
is(sql("SELECT agentvm.wait('$session', timeout => '60 s')"), 'ready', 'another session of the same team goes on');
$session = provision($node, 'acme');
is(sql("SELECT agentvm.wait('$session', timeout => '60 s')"), 'ready', 'and one of another provider');
await($node, "SELECT detail FROM agentvm.sessions WHERE session_id = '$hung'", 'NoAnswer: no answer within 2000 ms', name => 'two thirds of the lease: then the call is given up');
$blocking->await_runner('stuck >= 1', 'its thread is stuck');
is($blocking->vm($hung), 'none', 'no VM yet');
sql("SELECT agentvm.terminate('$hung')");
await_state($node, $hung, 'terminated', name => 'what hangs in its launch can be ended');
$blocking->release;
$blocking->await_runner('stuck = 0 AND in_flight = 0', 'threads that come back are used again');
$blocking->hang_again;

# ---- SIGTERM and kill -9 in mid-call: another runner takes over, as soon as it is there ----
sql("ALTER SYSTEM SET agentvm.lease = '10min'; SELECT pg_reload_conf()");
my $runner = $blocking->runner('pid');
$session = provision($node, 'acme', $blocking->with(hang => 'create'));
$blocking->await_runner('in_flight = 1');
my $started = time;
sql("SELECT pg_terminate_backend($runner)");
$blocking->await_runner("pid <> $runner", 'SIGTERM: another runner');
$blocking->release;
await_state($node, $session, 'ready', timeout => 120);
is($blocking->vm($session), "made\n", 'made once: the first call had not come that far');
$blocking->hang_again;
$session = provision($node, 'acme', $blocking->with(hang => 'create'));
$blocking->await_runner('in_flight = 1');
$runner = $blocking->runner('pid');
kill 'KILL', $runner;
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner' AND pid <> $runner", 1, name => 'kill -9: the server comes back with another runner', timeout => 120);
$blocking->release;
await_state($node, $session, 'ready', timeout => 120);
is($blocking->vm($session), "made\n", 'made once');
$blocking->hang_again;

sql("ALTER SYSTEM RESET agentvm.lease; SELECT pg_reload_conf()");

# ---- another database: who asks much in this one leaves it room to ask ----
$node->safe_psql('postgres', 'CREATE DATABASE served');
create_extension($node, 'served');
$node->safe_psql('served', "SELECT agentvm.create_team('acme'); SELECT agentvm.set_provider('acme', 'blocking', " . $blocking->options . ')');
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, dbname => 'served', name => 'a runner of its own', timeout => 120);
sql("SELECT agentvm.set_provider('globex', 'blocking', " . $blocking->options(hang => 'check') . ')');
my @askers = map { AgentVM::Client->new($node) } 1 .. 10;
$_->send("SELECT agentvm.check_provider('globex', 'blocking')") foreach @askers;
await($node, "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND wait_event_type = 'Extension' AND pid IN (" . join(', ', map { $_->pid } @askers) . ')', 10, name => 'more questions than there are places');
prompt($node, "SELECT agentvm.check_provider('acme', 'blocking')", 4, 'another database asks', undef, dbname => 'served');
is(scalar(grep { $_->busy } @askers), 10, 'while all of these wait');
$blocking->release;
is(join(' ', map { $_->answer } @askers), join(' ', ('{"says": "fine"}') x 10), 'and are answered in the end');
$_->quit foreach @askers;
$blocking->hang_again;

# ---- the database of a hung call is dropped; so is the extension ----
$node->safe_psql('served', "SELECT agentvm.provision('acme', " . join(', ', $blocking->with(hang => 'create')) . ')');
await($node, "SELECT in_flight FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, dbname => 'served');
prompt($node, 'DROP DATABASE served', 1, 'DROP DATABASE with a call that hangs in it');
sql("SELECT agentvm.provision('acme', " . join(', ', $blocking->with(hang => 'create')) . ')');
$blocking->await_runner('in_flight = 1');
$runner = $blocking->runner('pid');
prompt($node, 'SELECT count(*) FROM agentvm.abandon(); DROP EXTENSION agentvm', 2, 'DROP EXTENSION with a call that hangs');
create_extension($node);
sql("SELECT agentvm.create_team('$_')") for qw(acme globex initech);
is(sql("SELECT pid FROM agentvm.stat_dispatcher WHERE kind = 'runner'"), $runner, 'the runner is still there');
$session = provision($node, 'acme', $blocking->with());
await_state($node, $session, 'ready');

# ---- whoever asks can stop waiting ----
my $asked = provision($node, 'acme', $blocking->with(hang => 'inspect'));
await_state($node, $asked, 'ready');
sql("SELECT agentvm.set_provider('globex', 'blocking', " . $blocking->options(hang => 'check') . ')');
prompt($node, "SET statement_timeout = '300ms'; SELECT agentvm.inspect('$asked')", 2, 'inspect(): statement_timeout', '57014');
prompt($node, "SET statement_timeout = '300ms'; SELECT agentvm.check_provider('globex', 'blocking')", 2, 'check_provider(): statement_timeout', '57014');
for my $stop (qw(pg_cancel_backend pg_terminate_backend))
{
	my $user = AgentVM::Client->new($node);
	$user->send("SELECT agentvm.inspect('$asked')");
	await($node, 'SELECT wait_event_type || state FROM pg_stat_activity WHERE pid = ' . $user->pid, 'Extensionactive', name => 'a backend asks');
	$started = time;
	sql("SELECT $stop(" . $user->pid . ')');
	await($node, 'SELECT count(*) FROM pg_stat_activity WHERE state = \'active\' AND pid = ' . $user->pid, 0, name => $stop);
	cmp_ok(time - $started, '<', 2, 'at once');
	$user->{psql}->kill_kill;
	delete $user->{psql};
}
# nobody's place is held by who has gone: as many as there are places, and again as many
for (1 .. 12) { $node->psql('postgres', "SET statement_timeout = '50ms'; SELECT agentvm.inspect('$asked')"); }
sql("SELECT agentvm.set_provider('initech', 'blocking', '{}')");
is(sql("SELECT agentvm.check_provider('initech', 'blocking')"), '{"says": "fine"}', 'questions that were given up take nobody\'s place');
prompt($node, "SELECT agentvm.inspect('$asked')", 30, 'who waits gets an error', 'AV004');
$blocking->release;
is(sql("SELECT agentvm.inspect('$asked') ->> 'says'"), 'running', 'and once the other side is well, an answer');
$blocking->await_runner('stuck = 0', 'no thread is stuck any more');
$blocking->hang_again;

# ---- a runner that ends leaves nobody waiting ----
my $user = AgentVM::Client->new($node);
$user->send("SELECT agentvm.inspect('$asked')");
await($node, 'SELECT wait_event_type || state FROM pg_stat_activity WHERE pid = ' . $user->pid, 'Extensionactive', name => 'a backend asks');
sleep 0.5;
$runner = $blocking->runner('pid');
$started = time;
sql("SELECT pg_terminate_backend($runner)");
$user->answer;
like($user->error, qr/the runner has ended/, 'the runner ends: its asker is told');
cmp_ok(time - $started, '<', 2, 'at once');
$blocking->await_runner("pid <> $runner", 'another runner');

# ---- all threads are stuck ----
sql("ALTER SYSTEM SET agentvm.lease = '1s'; ALTER SYSTEM SET agentvm.max_in_flight_per_team = 64; SELECT pg_reload_conf()");
$runner = $blocking->runner('pid');
my $offset = length log_text($node);
sql("SELECT count(*) FROM (SELECT agentvm.provision('acme', " . join(', ', $blocking->with(hang => 'create')) . ') FROM generate_series(1, 70)) p');
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner' AND pid <> $runner", 1, name => 'all threads are stuck: another runner', timeout => 120);
like(substr(log_text($node), $offset), qr/LOG:  agentvm: all 64 threads of the runner are stuck/, 'the log says why');
sql("SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE state = 'provisioning'");
$session = provision($node, 'globex', $blocking->with());
await_state($node, $session, 'ready', name => 'a launch in the meantime', timeout => 120);
$blocking->release;
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state IN ('provisioning', 'terminating')", 0, name => 'all end', timeout => 120);
unlike(log_text($node), qr/PANIC|TRAP:|terminated by signal (6|11)/, 'no process crashed by itself');
done_testing();
