# Nobody's open transaction, failing trigger or aborted work delays the sessions of others. With sweep_interval = 1h nothing
# here is healed by the periodic pass: what happens in time is due to marks and latches.
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Runtime ();
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', conf => <<'CONF');
agentvm.sweep_interval = '1h'
max_prepared_transactions = 10
agentvm.max_in_flight_per_team = 1
CONF
$node->safe_psql('postgres', "SELECT agentvm.create_team('other')");
my $alice = AgentVM::Client->new($node);
my $bob = AgentVM::Client->new($node);

# A noop session becomes ready in less than a second
sub served
{
	my ($name, $team) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $started = time;
	my $session = provision($node, $team // 'other');
	$node->safe_psql('postgres', "SELECT agentvm.wait('$session', timeout => '10 s')");
	cmp_ok(time - $started, '<', 1, $name);
	return $session;
}

# Seconds from the event to the moment at which the session was launched
sub launched_after
{
	my ($session) = @_;
	return $node->safe_psql('postgres', "SELECT extract(epoch FROM launched_at) FROM agentvm.sessions WHERE session_id = '$session'");
}

# terminate(), extend() and provision() in transactions that stay open
my @held = map { served('a session is served') } 1, 2;
$alice->run('BEGIN');
$alice->run("SELECT agentvm.terminate('$held[0]')");
$bob->run('BEGIN');
$bob->run("SELECT agentvm.extend('$held[1]', '1 hour')");
my $carol = AgentVM::Client->new($node);
$carol->run('BEGIN');
my $unborn = $carol->run("SELECT agentvm.provision('other')");
served('another one is, while terminate(), extend() and provision() are held open') for 1 .. 3;
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.sessions WHERE session_id = '$unborn'"), 0, 'what is not committed is not seen');
$alice->run('COMMIT');
my $committed = time;
await_state($node, $held[0], 'terminated');
cmp_ok(time - $committed, '<', 1, 'a terminate() begins when it commits');
$bob->run('ROLLBACK');

# A heartbeat in a transaction that stays open, of a session that ends
$node->safe_psql('postgres', "SELECT agentvm.create_profile('runtime', 'noop', runtime => true)");
my $beating = provision($node, 'other', "profile => 'runtime'");
await($node, "SELECT running FROM agentvm.session WHERE session_id = '$beating'");
AgentVM::Runtime::bootstrap($node, $beating);
$alice->run('BEGIN');
$alice->run('SELECT agentvm.heartbeat(' . AgentVM::Runtime::session_hash($beating) . ')');
$node->safe_psql('postgres', "SELECT agentvm.terminate('$beating')");
await_state($node, $beating, 'terminated', timeout => 10);
served('others are served while a heartbeat of a session that has ended is held open') for 1 .. 2;
my $gone = "SELECT agentvm.heartbeat_batch('{$beating}', '{now}')";
psql_ok($node, "SET statement_timeout = '10 s'; SELECT agentvm.sweep_heartbeat(), agentvm.purge('0')", 'neither a sweep nor a purge waits for it');
$alice->run('COMMIT');
is($node->safe_psql('postgres', $gone), $beating, 'its VM, should it beat on, is told that it is gone');
$node->safe_psql('postgres', 'SELECT agentvm.sweep_heartbeat()');
is($node->safe_psql('postgres', 'SELECT (SELECT count(*) FROM agentvm.session_heartbeat), (SELECT count(*) FROM agentvm.session_ending)'), '0|0', 'the next sweep leaves nothing of it');
is($node->safe_psql('postgres', $gone), $beating, 'and the VM is told so as before');

# A transaction that was open for long: its row is older than all that was handled meanwhile, and yet found at once
sleep 2 - (time - $committed) if time - $committed < 2;
served('sessions are handled meanwhile');
$committed = $carol->run('COMMIT; SELECT extract(epoch FROM clock_timestamp())');
await_state($node, $unborn, 'ready');
cmp_ok(launched_after($unborn) - $committed, '<', 1, 'the launch begins within a second of a late COMMIT');
is($node->safe_psql('postgres', "SELECT created_at < to_timestamp($committed) - interval '1 s' FROM agentvm.sessions WHERE session_id = '$unborn'"), 't',
	'though the row was written long before');

# Rolled back: no row, no event, no call
$alice->run('BEGIN');
my $never = $alice->run("SELECT agentvm.provision('acme', profile => 'plain')");
$alice->run('ROLLBACK');
served('a session after it');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE session_id = '$never'"), 0, 'a rolled back provision() leaves no row');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session_event WHERE session_id = '$never'"), 0, 'no event');
is_deeply($faults->counts->{received}, {}, 'and no call');

# The answer to a call whose row a user has locked is kept until the lock goes
$faults->set(action => 'RunInstances', n => 1, mode => 'slow', ms => 500);
my $session = launch($node, 'acme');
await($node, "SELECT lease IS NOT NULL FROM agentvm.session WHERE session_id = '$session'");
$alice->run('BEGIN');
$alice->run("SELECT agentvm.extend('$session', '1 hour')");
my $end = time + 30;
sleep 0.01 until $faults->requests('RunInstances') || time > $end;
served('others are served') for 1 .. 2;
is(state_of($node, $session), 'provisioning', 'the record waits for the user');
$alice->run('COMMIT');
$committed = time;
await($node, "SELECT vm_id IS NOT NULL FROM agentvm.session WHERE session_id = '$session'");
cmp_ok(time - $committed, '<', 1, 'and is done right after');
await_state($node, $session, 'ready');
is($faults->count('RunInstances'), 1, 'without another call');
is(scalar vms_of($moto, $session), 1, 'one VM');

# Whoever changes a team, its members, its provider or a profile, or has its quota locked, delays none of its sessions
$faults->set(action => 'RunInstances', n => 1, mode => 'slow', ms => 1500);
my @changed = (launch($node, 'acme'), provision($node, 'other', q(options => '{"launch_delay": "1 s"}')), provision($node, 'other', "profile => 'runtime'"));
$alice->run('BEGIN');
$alice->run(q(SELECT agentvm.alter_team(t, limits => '{"max_sessions": 100}'), agentvm.set_provider(t, 'noop', '{}'), agentvm.create_profile('p', 'noop', team_id => t), agentvm.add_member(t, current_user), agentvm.provision(t, provider => 'noop') FROM unnest('{acme,other}'::text[]) t));
$alice->run('SELECT FROM agentvm.team, agentvm.installation FOR UPDATE; SELECT FROM agentvm.provider_secret, agentvm.provider_config, agentvm.team_member FOR UPDATE; SELECT FROM agentvm.session_token FOR UPDATE; SELECT FROM agentvm.profile FOR UPDATE');
await_state($node, $changed[$_], 'ready', timeout => 10) for 0, 1;
$node->safe_psql('postgres', "SELECT agentvm.terminate('$_')") for @changed;
await_state($node, $_, 'terminated', timeout => 10) for @changed;
$alice->run('ROLLBACK');

# A team at its cap (1) whose next session is locked goes on with the one after it
$faults->set(action => 'RunInstances', n => 1, mode => 'slow', ms => 1000);
my ($first, $locked, $next) = map { launch($node, 'acme') } 1 .. 3;
$alice->run('BEGIN');
$alice->run("SELECT agentvm.terminate('$locked')");
await_state($node, $first, 'ready');
await_state($node, $next, 'ready', timeout => 10);
my $passes = $node->safe_psql('postgres', 'SELECT sum(passes) FROM agentvm.stat_dispatcher');
sleep 0.5;
cmp_ok($node->safe_psql('postgres', 'SELECT sum(passes) FROM agentvm.stat_dispatcher') - $passes, '<', 10, 'and nobody spins on the locked one');
$alice->run('ROLLBACK');
$committed = time;
await($node, "SELECT lease IS NOT NULL OR launched_at IS NOT NULL FROM agentvm.session WHERE session_id = '$locked'");
cmp_ok(time - $committed, '<', 1, 'which is claimed right after the ROLLBACK');

# A trigger of the administrator's that raises for one session, whatever is written to it
$faults->set(action => 'RunInstances', n => 3, mode => 'slow', ms => 700);
$node->safe_psql('postgres', <<'SQL');
SELECT agentvm.create_team('cursed');
CREATE FUNCTION curse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'cursed'; END $$;
CREATE TRIGGER curse BEFORE UPDATE ON agentvm.session FOR EACH ROW WHEN (NEW.team_id = 'cursed') EXECUTE FUNCTION curse();
SQL
my $cursed = provision($node, 'cursed');
served('others are served while one session cannot be claimed') for 1 .. 3;
psql_ok($node, 'CALL agentvm.dispatch()', 'dispatch() fails for nobody');
like(log_text($node), qr/session $cursed is put off: cursed/, 'the log says which session, and why');
is(state_of($node, $cursed), 'provisioning', 'it stays as it was');
psql_ok($node, 'DROP TRIGGER curse ON agentvm.session', 'the trigger goes');
psql_ok($node, 'CALL agentvm.dispatch()', 'and dispatch() launches it');
is(state_of($node, $cursed), 'ready', 'at once');

# The same in mid-call: the answers that were read together with its own are not lost
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.max_in_flight_per_team = 10; SELECT pg_reload_conf()");
$faults->clear;
$faults->set(action => 'RunInstances', mode => 'slow', ms => 1000);
my $calls = $faults->count('RunInstances');
my @sessions = split /\n/, $node->safe_psql('postgres', "SELECT agentvm.provision('acme', profile => 'plain') FROM generate_series(1, 4)");
await($node, "SELECT count(*) FROM agentvm.session WHERE lease IS NOT NULL", 4);
$node->safe_psql('postgres', "CREATE TRIGGER curse BEFORE UPDATE ON agentvm.session FOR EACH ROW WHEN (NEW.session_id = '$sessions[1]') EXECUTE FUNCTION curse()");
await_state($node, $sessions[$_], 'ready', timeout => 5) for 0, 2, 3;
is($faults->count('RunInstances'), $calls + 4, 'nobody was launched again');
psql_ok($node, 'DROP TRIGGER curse ON agentvm.session', 'the trigger goes');
await_state($node, $sessions[1], 'ready', timeout => 15);
is(scalar vms_of($moto, @sessions), 4, 'one VM each');

# Nothing that users and gateways call notifies, which would take a lock of the whole cluster: then it could not be prepared
my $mine = served('a session to call about');
my $born = provision($node, 'other', "profile => 'runtime'");
await($node, "SELECT running FROM agentvm.session WHERE session_id = '$born'");
$alice->run('BEGIN');
$alice->run("SELECT agentvm.provision('other'), agentvm.extend('$mine', '1 s'), agentvm.terminate('$mine')");
$alice->run('SELECT agentvm.bootstrap(' . AgentVM::Runtime::token_hash($node, $born, 1) . ', ' . AgentVM::Runtime::session_hash($born) . ", 'boot')");
$alice->run('SELECT agentvm.heartbeat(' . AgentVM::Runtime::session_hash($born) . "), agentvm.heartbeat_batch('{$born}', '{now}'), agentvm.sweep()");
$alice->run("SELECT agentvm.create_team('t'), agentvm.add_member('t', current_user), agentvm.remove_member('t', current_user), agentvm.drop_team('t')");
$alice->run("PREPARE TRANSACTION 'all of them'");
$alice->run("ROLLBACK PREPARED 'all of them'");
pass('a transaction with all of them can be prepared');

# COMMIT PREPARED wakes nobody: the slow tick finds it
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.sweep_interval = '1s'; SELECT pg_reload_conf(); SELECT agentvm.wake()");
$alice->run('BEGIN');
my $prepared = $alice->run("SELECT agentvm.provision('other')");
$alice->run("PREPARE TRANSACTION 'p'");
served('others are served');
$alice->run("COMMIT PREPARED 'p'");
await_state($node, $prepared, 'ready', timeout => 5);

done_testing();
