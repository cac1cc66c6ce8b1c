# pause() and resume() on noop: states, who may when, failures, clocks, and whoever else acts on the session at the same time
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Runtime;
use AgentVM::Test;
use Test::More;

my $node = new_node('main', conf => "agentvm.sweep_interval = '1h'\n");
$node->safe_psql('postgres', <<'SQL');
SELECT agentvm.create_team('acme');
SELECT agentvm.create_profile('runtime', 'noop', runtime => true, heartbeat_timeout => '1 min');
SQL
make_role($node, 'alice', teams => ['acme']);
make_role($node, 'eve');

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub options { return 'options => ' . json({@_}); }
sub ready { my $session = launch($node, 'acme', undef, "profile => NULL", @_); await_state($node, $session, 'ready'); return $session; }
sub pause { return sql("SELECT agentvm.pause('$_[0]')"); }
sub resume { return sql("SELECT agentvm.resume('$_[0]')"); }
sub paused { my $session = ready(@_); pause($session); await_state($node, $session, 'paused'); return $session; }
sub changes { return sql("SELECT string_agg(new_state, ' ' ORDER BY event_id) FROM agentvm.session_event WHERE session_id = '$_[0]' AND kind = 'state'"); }
sub stays { my ($session, $state, $name) = @_; sql('CALL agentvm.dispatch()'); local $Test::Builder::Level = $Test::Builder::Level + 1; return is(state_of($node, $session), $state, $name); }

# ---- there and back ----
my $session = ready();
is($node->safe_psql('postgres', as_role('alice', "SELECT agentvm.pause('$session')")), 't', 'a member begins a pause');
is(sql("CALL agentvm.await('$session', 'paused')"), 'paused', 'which can be waited for');
is(sql("SELECT agentvm.inspect('$session')->>'state'"), 'paused', 'the provider has halted it');
is(pause($session), 'f', 'it is paused: there is nothing to begin');
is(sql("SELECT sessions FROM agentvm.fleet WHERE state = 'paused'"), 1, 'the fleet shows it');
is(sql("SELECT agentvm.extend('$session', '1 min') > now()"), 't', 'its deadline can be moved');
is(resume($session), 't', 'resume() begins the way back');
is(sql("CALL agentvm.await('$session')"), 'ready', 'which can be waited for');
is(resume($session), 'f', 'it runs: there is nothing to begin');
is(sql("SELECT agentvm.inspect('$session')->>'state'"), 'running', 'the provider lets it run');
is(sql("SELECT resumed_at > ready_at FROM agentvm.session WHERE session_id = '$session'"), 't', 'when that was is kept');
is(changes($session), 'provisioning ready pausing paused resuming ready', 'the log has every state');
pause($session);
await_state($node, $session, 'paused');
sql("SELECT agentvm.terminate('$session')");
await_state($node, $session, 'terminated');
pass('one that has been paused twice can be ended');

# ---- who may not, and when not ----
fails_with($node, "SELECT agentvm.$_('$session')", 'AV006', qr/is terminated and cannot be/, "$_() after the end") for qw(pause resume);
$session = ready();
for my $function (qw(pause resume))
{
	fails_with($node, as_role('eve', "SELECT agentvm.$function('$session')"), 'AV005', qr/does not exist/, "$function() of another team's");
	fails_with($node, "SELECT agentvm.$function(NULL)", '22004', qr/session_id/, "$function() of nothing");
}
fails_with($node, "BEGIN; SELECT agentvm.pause('$session'); SELECT agentvm.wait('$session', 'paused')", '55000', qr/COMMIT/, 'a wait before the commit would never end');
is(state_of($node, $session), 'ready', 'what is rolled back has not been');
my $early = launch($node, 'acme', 'provisioning', 'profile => NULL', options(launch_delay => '1 day'));
fails_with($node, "SELECT agentvm.$_('$early')", 'AV007', qr/is provisioning and cannot be/, "$_() before it is ready") for qw(pause resume);

# ---- on the way ----
my $going = ready(options(pause_delay => '1 day'));
is(pause($going) . pause($going), 'tf', 'a pause is begun once');
stays($going, 'pausing', 'it takes its time');
fails_with($node, "SELECT agentvm.resume('$going')", 'AV007', qr/is pausing.*'paused'/s, 'resume() has to wait for it');
my $coming = paused(options(resume_delay => '1 day'));
is(resume($coming) . resume($coming), 'tf', 'a resume is begun once');
stays($coming, 'resuming', 'it takes its time');
fails_with($node, "SELECT agentvm.pause('$coming')", 'AV007', qr/is resuming.*'ready'/s, 'pause() has to wait for it');
for my $under_way ($going, $coming, $session)
{
	sql("SELECT agentvm.terminate('$under_way')");
	await_state($node, $under_way, 'terminated');
}
is(changes($going), 'provisioning ready pausing terminating terminated', 'an end in the middle of a pause');
is(changes($coming), 'provisioning ready pausing paused resuming terminating terminated', 'and of a resume');

# ---- refused by the provider: as before, and says why ----
$session = ready(options(pause_fail => 'permanent', resume_fail => 'capacity', fail_times => 1));
pause($session);
fails_with($node, "SELECT agentvm.wait('$session', 'paused', '20 s')", 'AV004', qr/could not be paused.*SimulatedPermanent.*may be told again/s, 'whoever waits for the pause is told');
is(state_of($node, $session), 'ready SimulatedPermanent: simulated by option pause_fail', 'a pause that was refused: ready');
is(sql("SELECT detail->>'detail' FROM agentvm.session_event WHERE session_id = '$session' AND old_state = 'pausing'"), 'SimulatedPermanent: simulated by option pause_fail', 'the log has the reason');
is(pause($session), 't', 'told again');
is(sql("CALL agentvm.await('$session', 'paused')"), 'paused', 'it works');
is(state_of($node, $session), 'paused', 'and the reason is gone');
resume($session);
fails_with($node, "SELECT agentvm.wait('$session', 'ready', '20 s')", 'AV004', qr/could not be resumed.*SimulatedCapacity/s, 'whoever waits for the resume is told');
is(state_of($node, $session), 'paused SimulatedCapacity: simulated by option resume_fail', 'a resume that was refused: paused');
resume($session);
is(sql("CALL agentvm.await('$session')"), 'ready', 'told again');
is(changes($session), 'provisioning ready pausing ready pausing paused resuming paused resuming ready', 'all of it is in the log');

# ---- not now: tried again, and seen in health ----
my $health = q{SELECT ok || ' ' || detail FROM agentvm.health WHERE name = 'pause'};
for my $class (qw(transient throttled))
{
	$session = ready(options(pause_fail => $class, fail_times => 2));
	pause($session);
	hurry_to($node, $session, 'paused');
	is(changes($session), 'provisioning ready pausing paused', "$class: tried again until it works");
}
like(sql($health), qr/^true 0 /, 'health is content');
$session = ready(options(pause_fail => 'transient'));
pause($session);
hurry_until($node, "SELECT ok FROM agentvm.health WHERE name = 'pause'", 'f');
like(sql($health), qr/^false 1 pauses/, 'one that fails again and again shows in health');
like(state_of($node, $session), qr/^pausing SimulatedTransient/, 'and on its row');
sql("SELECT agentvm.terminate('$session')");
await_state($node, $session, 'terminated');

# ---- gone ----
$session = ready(options(pause_fail => 'lost'));
pause($session);
await_state($node, $session, 'failed');
like(state_of($node, $session), qr/^failed provider_lost SimulatedLost/, 'a VM that is gone when it is to be paused');
$session = paused(options(resume_fail => 'lost'));
resume($session);
await_state($node, $session, 'failed');
like(state_of($node, $session), qr/^failed provider_lost SimulatedLost/, 'and when it is to go on');

# ---- the lifetime goes on ----
$session = paused("max_lifetime => '3 s'");
$going = ready(options(pause_delay => '1 day'), "max_lifetime => '3 s'");
pause($going);
await_state($node, $_, 'terminated') for $session, $going;
is(state_of($node, $_), 'terminated max_lifetime', 'its deadline ends one that is paused, or on its way there') for $session, $going;
$session = paused();
sql("UPDATE agentvm.session SET deadline_at = now() - interval '1 s', next_check_at = now() + interval '1 s' WHERE session_id = '$session'");
is(sql('SELECT agentvm.sweep_lifetime()'), 1, 'so does the sweep');

# ---- silence ----
# Ready, with a heart that beat an hour ago
sub silent_since
{
	my ($session, $interval) = @_;
	return sql("UPDATE agentvm.session SET ready_at = now() - interval '$interval', resumed_at = resumed_at - interval '$interval' WHERE session_id = '$session';
		UPDATE agentvm.session_heartbeat SET last_heartbeat_at = now() - interval '$interval' WHERE session_id = '$session';
		UPDATE agentvm.installation SET adopted_at = now() - interval '1 day'");
}
sub beating
{
	my $session = launch($node, 'acme', undef, "profile => 'runtime'", options(runtime => \1, @_));
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$session'");
	bootstrap($node, $session);
	heartbeat($node, $session);
	return $session;
}
$session = beating();
($going, $coming) = (beating(pause_delay => '1 day'), beating(resume_delay => '1 day'));
pause($_) for $session, $going, $coming;
await_state($node, $_, 'paused') for $session, $coming;
resume($coming);
like(heartbeat($node, $_), qr/^\d{4}-/, 'a beat that comes all the same is answered') for $session, $going, $coming;
fails_with($node, "SELECT agentvm.exec('$session', 'true')", 'AV007', qr/not ready, but paused.*SELECT agentvm\.resume\('$session'\)/s, 'a command for one that is paused: what to do');
fails_with($node, "SELECT agentvm.exec('$going', 'true')", 'AV007', qr/not ready, but pausing.*When it is paused: SELECT agentvm\.resume/s, 'the same while it pauses');
# silence counts from the start of the server, too
await($node, "SELECT pg_postmaster_start_time() + interval '1 s' < clock_timestamp()");
sql("UPDATE agentvm.session_heartbeat SET lost_after = '1 s'");
silent_since($_, '1 hour') for $session, $going, $coming;
is(sql('SELECT agentvm.sweep_heartbeat()'), 0, 'silence means nothing while a session is paused, or on its way');
resume($session);
await_state($node, $session, 'ready');
sql("UPDATE agentvm.session SET resumed_at = resumed_at + interval '1 min' WHERE session_id = '$session'");
is(sql('SELECT agentvm.sweep_heartbeat()'), 0, 'after that it counts from the resume, however old the last beat');
silent_since($session, '1 hour');
is(sql('SELECT agentvm.sweep_heartbeat()'), 1, 'and a VM that never speaks again is lost');
await_state($node, $session, 'terminated');
is(sql("SELECT end_reason FROM agentvm.sessions WHERE session_id = '$session'"), 'heartbeat_timeout', 'as any that falls silent');
sql("SELECT agentvm.terminate('$_')") for $going, $coming;

# ---- somebody else at the same time ----
my ($first, $second) = map { AgentVM::Client->new($node) } 1, 2;
# what the first one has done commits while the second one waits for its row; what the second one then gets
sub against
{
	my ($session, $before, $after) = @_;
	$first->run("BEGIN; SELECT agentvm.$before('$session')");
	$second->send("SELECT agentvm.$after('$session')");
	await($node, 'SELECT wait_event_type FROM pg_stat_activity WHERE pid = ' . $second->pid, 'Lock', name => "$after() waits for who does $before()");
	$first->run('COMMIT');
	return $second->answer;
}
$session = ready();
is(against($session, 'pause', 'pause'), 'f', 'of two pauses one begins');
await_state($node, $session, 'paused');
is(against($session, 'resume', 'resume'), 'f', 'of two resumes, too');
await_state($node, $session, 'ready');
is(against($session, 'pause', 'terminate'), 't', 'terminate() after a pause that has just been begun');
await_state($node, $session, 'terminated');
# the engine may have had the row in between
like(changes($session), qr/^provisioning ready pausing paused resuming ready pausing (paused )?terminating terminated$/, 'the end wins');
$session = ready();
against($session, 'terminate', 'pause');
like($second->error, qr/AV006.*cannot be paused/, 'pause() after an end that has just been begun');
await_state($node, $session, 'terminated');
# an UPDATE that finds nothing to do keeps the row's lock all the same: who gets it first, engine or user, differs
for my $ending (map { ready() } 1 .. 10)
{
	$first->run("BEGIN; SELECT agentvm.terminate('$ending')");
	$second->run('BEGIN');
	$second->send("SELECT agentvm.terminate('$ending')");
	await($node, 'SELECT wait_event_type FROM pg_stat_activity WHERE pid = ' . $second->pid, 'Lock', name => 'terminate() waits for who does terminate()');
	$first->run('COMMIT');
	is($second->answer, 'f', 'of two ends one begins');
	sql('CALL agentvm.dispatch()');
	$second->run('COMMIT');
	await_state($node, $ending, 'terminated');
}
# the engine looks at the row only when who has it locked lets go
$session = ready();
$first->run("BEGIN; SELECT agentvm.pause('$session')");
sql('CALL agentvm.dispatch()');
$first->run('ROLLBACK');
stays($session, 'ready', 'a pause that is taken back has not been');
done_testing();
