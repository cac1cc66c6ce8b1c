# Waking up: nothing polls. sweep_interval is an hour, so whatever happens within a second is due to a latch or a broadcast
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(time);

my $node = new_node('main', conf => "agentvm.sweep_interval = '1h'\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $slow = q(options => '{"launch_delay": "2 s"}');
my $client = AgentVM::Client->new($node);
my $other = AgentVM::Client->new($node);

# Milliseconds from one event in the log of a session to another
sub events_apart
{
	my ($session, $from, $to) = @_;
	return $node->safe_psql('postgres', "SELECT extract(epoch FROM max(at) FILTER (WHERE new_state = '$to') - max(at) FILTER (WHERE new_state = '$from')) * 1000 "
		  . "FROM agentvm.session_event WHERE session_id = '$session'");
}
sub waiting
{
	my ($pid) = @_;
	return await($node, "SELECT state = 'active' AND wait_event IS NOT NULL FROM pg_stat_activity WHERE pid = $pid", 't', name => 'it waits');
}

# A commit wakes the dispatcher, a change wakes who waits for it
my $session;
foreach (1 .. 3)
{
	$session = $client->run("SELECT agentvm.provision('acme')");
	is($client->run("SELECT agentvm.wait('$session')"), 'ready', 'ready');
	cmp_ok(events_apart($session, 'provisioning', 'ready'), '<', 1000, 'a launch begins within a second of its COMMIT');
}
my $asleep = $node->safe_psql('postgres', 'SELECT passes FROM agentvm.stat_dispatcher');
$client->send("SELECT agentvm.wait('$session', 'terminated')");
waiting($client->pid);
$other->run('BEGIN');
$other->run("SELECT agentvm.terminate('$session')");
ok($client->busy, 'a terminate() that has not committed wakes nobody');
$other->run('COMMIT');
my $committed = time;
is($client->answer, 'terminated', 'the COMMIT does');
cmp_ok(time - $committed, '<', 0.5, 'at once, and the next change, too');
cmp_ok($node->safe_psql('postgres', 'SELECT passes FROM agentvm.stat_dispatcher') - $asleep, '<', 10, 'the dispatcher has slept in between');
is($client->run("SELECT agentvm.wait('$session', 'failed')"), 'terminated', 'an end is an end');
is($client->run("SELECT agentvm.terminate('$session')"), 'f', 'a second terminate() begins nothing');

# Deadlines: the dispatcher wakes up by itself, exactly then
$session = $client->run("SELECT agentvm.provision('acme', options => '{\"launch_delay\": \"1 s\"}', max_lifetime => '2 s')");
is($client->run("SELECT agentvm.wait('$session')"), 'ready', 'a launch that takes a second');
is($client->run("SELECT agentvm.wait('$session', 'terminated')"), 'terminated', 'a lifetime of two');
cmp_ok(abs($node->safe_psql('postgres', "SELECT extract(epoch FROM ended_at - deadline_at) FROM agentvm.sessions WHERE session_id = '$session'")), '<', 0.5, 'ends in time');

# wait() that cannot succeed, or does not
my $hint = qr/HINT:.*COMMIT first/s;
fails_with($node, "BEGIN; SELECT agentvm.wait(agentvm.provision('acme'))", '55000', $hint, 'wait() in the transaction that provisioned says so at once');
fails_with($node, "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT agentvm.wait(agentvm.provision('acme'))", '55000', $hint, 'at any isolation level');
$session = provision($node, 'acme');
await_state($node, $session, 'ready');
fails_with($node, "BEGIN; SAVEPOINT a; SELECT agentvm.terminate('$session'); RELEASE a; SELECT agentvm.wait('$session', 'terminated')", '55000', $hint, 'or that terminated');
fails_with($node, "SELECT agentvm.wait('$session', 'paused', '1 s')", 'AV011', qr/did not become paused within 1 s/, 'a timeout');
my $started = time;
fails_with($node, "SET statement_timeout = '300ms'; SELECT agentvm.wait('$session', 'terminated')", '57014', qr/statement timeout/, 'statement_timeout');
cmp_ok(time - $started, '<', 1.5, 'in time');
fails_with($node, "SELECT agentvm.wait('$session', 'sleepy')", '22023', qr/Known states/, 'no such state');
fails_with($node, "SELECT agentvm.wait('00000000-0000-7000-8000-000000000000')", 'AV005', qr/does not exist/, 'no such session');
$client->send("SELECT agentvm.wait('$session', 'terminated')");
waiting($client->pid);
$started = time;
psql_ok($node, 'SELECT pg_cancel_backend(' . $client->pid . ')', 'cancel it');
$client->answer;
like($client->error, qr/57014: canceling statement due to user request/, 'cancelled');
cmp_ok(time - $started, '<', 0.5, 'at once');
my $failed = provision($node, 'acme', q(options => '{"fail": "quota"}'));
fails_with($node, "SELECT agentvm.wait('$failed')", 'AV003', qr/has ended: quota.*DETAIL:.*SimulatedQuota/s, 'a session that failed: why');
$node->safe_psql('postgres', "SELECT agentvm.terminate('$session')");
fails_with($node, "SELECT agentvm.wait('$session')", 'AV006', qr/(has ended|is ending): requested/, 'one that was ended');

# A snapshot that is older than the change does not hide it
$client->run('BEGIN ISOLATION LEVEL REPEATABLE READ');
$client->run('SELECT count(*) FROM agentvm.sessions');
$session = provision($node, 'acme');
is($client->run("SELECT agentvm.wait('$session')"), 'ready', 'wait() under REPEATABLE READ sees the present');
is($client->run("SELECT count(*) FROM agentvm.sessions WHERE session_id = '$session'"), 0, 'while the snapshot stays');
$client->run('COMMIT');

# await() is wait() without a snapshot
$session = provision($node, 'acme', $slow);
$client->send("CALL agentvm.await('$session')");
$other->send("SELECT agentvm.wait('$session')");
waiting($_->pid) for $client, $other;
is($node->safe_psql('postgres', 'SELECT backend_xmin IS NULL FROM pg_stat_activity WHERE pid = ' . $client->pid), 't', 'await() holds no snapshot while it waits');
is($node->safe_psql('postgres', 'SELECT backend_xmin IS NULL FROM pg_stat_activity WHERE pid = ' . $other->pid), 'f', 'wait() does, as any function');
is($client->answer, 'ready', 'await() returns the state');
is($other->answer, 'ready', 'as wait() does');
cmp_ok(abs($client->seconds - $other->seconds), '<', 0.3, 'at the same time');
fails_with($node, "BEGIN; CALL agentvm.await('$session')", '25001', qr/HINT:.*autocommit/s, 'await() in a transaction block');
fails_with($node, "CALL agentvm.await('$session', 'terminated', '1 s')", 'AV011', qr/within 1 s/, 'its timeout');
fails_with($node, "SET statement_timeout = '300ms'; CALL agentvm.await('$session', 'terminated')", '57014', qr/statement timeout/, 'statement_timeout');
fails_with($node, "CALL agentvm.await('$failed')", 'AV003', qr/quota/, 'why a session ended');

# After an error in mid-wait the backend waits as well as before
is($client->run("SELECT agentvm.wait('$session')"), 'ready', 'still well');

done_testing();
