# Sessions that never bootstrapped, fell silent or grew too old: the sweeps as SQL functions, then in the worker
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Runtime;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_node('main', conf => "agentvm.dispatchers = 0\n");
$node->safe_psql('postgres', <<'SQL');
SELECT agentvm.create_team('acme');
SELECT agentvm.create_profile('short', 'noop', runtime => true, bootstrap_timeout => '4 s', heartbeat_timeout => '4 s');
SELECT agentvm.create_profile('runtime', 'noop', runtime => true, heartbeat_timeout => '4 s');
SELECT agentvm.create_profile('patient', 'noop', runtime => true, heartbeat_timeout => '6 s');
SELECT agentvm.create_profile('warm', 'noop', runtime => true, heartbeat_timeout => '1 h');
SQL

sub sql  { return $node->safe_psql('postgres', $_[0]); }
sub dispatch { return sql('SET client_min_messages = error; CALL agentvm.dispatch()'); }

# A session with a runtime, launched
sub launched
{
	my ($profile, @arguments) = @_;
	my $session = sql("SET client_min_messages = error; SELECT agentvm.provision('acme', profile => '$profile'" . join('', map { ", $_" } @arguments) . ')');
	dispatch();
	is(state_of($node, $session), 'provisioning', 'launched, but its runtime has not reported');
	return $session;
}

# The same, having bootstrapped
sub ready
{
	my $session = launched(@_);
	bootstrap($node, $session);
	is(state_of($node, $session), 'ready', 'bootstrapped');
	return $session;
}

# Wait until a session has been silent for longer than so many seconds
sub silent
{
	my ($session, $seconds) = @_;
	return await($node, "SELECT coalesce(last_heartbeat_at, ready_at) + interval '$seconds s' < clock_timestamp() FROM agentvm.sessions WHERE session_id = '$session'",
		't', name => "silent for $seconds s");
}

# Bootstrap
my $session = launched('short');
my $patient = launched('runtime');
is(sql('SELECT agentvm.sweep_bootstrap()'), 0, 'nobody is late yet');
await($node, "SELECT launched_at + interval '4 s' < clock_timestamp() FROM agentvm.sessions WHERE session_id = '$session'");
is(sql('SELECT agentvm.sweep_bootstrap()'), 1, 'one is late');
is(sql('SELECT agentvm.sweep_bootstrap()'), 0, 'once');
is(state_of($node, $session), 'terminating bootstrap_timeout', 'and is to end');
is(bootstrap($node, $session, fails => 'AV006'), 1, 'too late');
dispatch();
is(state_of($node, $session), 'failed bootstrap_timeout', 'it has failed');
is(state_of($node, $patient), 'provisioning', 'the other one has time');

# Heartbeats
my $mute = ready('runtime');
my $beaten = ready('runtime');
heartbeat($node, $beaten);
is(sql('SELECT agentvm.sweep_heartbeat()'), 0, 'nobody is silent yet');
silent($_, 4) for $mute, $beaten;
heartbeat($node, $beaten);
is(sql('SELECT agentvm.sweep_heartbeat()'), 1, 'one is lost');
like(state_of($node, $mute), qr/^terminating heartbeat_timeout no heartbeat since it was ready/, 'the one that never beat');
is(state_of($node, $beaten), 'ready', 'a beat saves the other');
silent($beaten, 4);
is(sql('SELECT agentvm.sweep_heartbeat(0)'), 0, 'a limit of none');
is(sql('SELECT agentvm.sweep_heartbeat()'), 1, 'until it falls silent, too');
like(state_of($node, $beaten), qr/^terminating heartbeat_timeout last heartbeat \d+ s ago$/, 'the log says since when');
heartbeat($node, $beaten, fails => 'AV006');
dispatch();
is(sql("SELECT count(*) FROM agentvm.sessions WHERE state = 'terminated' AND end_reason = 'heartbeat_timeout' AND last_heartbeat_at IS NOT NULL"), 1, 'the last beat is kept with the tombstone');
is(sql('SELECT count(*) FROM agentvm.session_heartbeat'), 0, 'and no row of heartbeats is left');

# Silence while the server was down is nobody's fault
$session = ready('patient');
silent($session, 6);
$node->restart;
is(sql('SELECT agentvm.sweep_heartbeat()'), 0, 'after a restart everybody has his timeout again');
await($node, "SELECT pg_postmaster_start_time() + interval '6 s' < clock_timestamp()");
is(sql('SELECT agentvm.sweep_heartbeat()'), 1, 'and then no more');

# Lifetime, limits, and locks of users
my @old = split /\n/, sql("SET client_min_messages = error; SELECT agentvm.provision('acme', max_lifetime => '4 s') FROM generate_series(1, 4)");
dispatch();
is(sql('SELECT agentvm.sweep_lifetime()'), 0, 'nobody is too old yet');
await($node, "SELECT bool_and(deadline_at < clock_timestamp()) FROM agentvm.sessions WHERE state = 'ready'");
my $user = AgentVM::Client->new($node);
$user->run('BEGIN');
$user->run("SELECT agentvm.terminate('$old[2]', 'done with it')");
is(sql(q(SET statement_timeout = '10 s'; SELECT agentvm.sweep_lifetime(1))), 1, 'no more than asked for');
is(state_of($node, $old[0]), 'terminating max_lifetime', 'the oldest first');
is(sql(q(SET statement_timeout = '10 s'; SELECT agentvm.sweep())), 2, 'all sweeps, all that are due; nobody waits for a lock');
$user->run('COMMIT');
is(state_of($node, $old[2]), 'terminating requested done with it', 'who was first keeps his reason');
dispatch();
is(sql("SELECT count(*) FROM agentvm.sessions WHERE session_id IN ('" . join("', '", @old) . "') AND state = 'terminated'"), 4, 'all have ended');
fails_with($node, 'SELECT agentvm.sweep(-1)', '22023', qr/max_sessions/, 'a negative limit');
make_role($node, 'alice', teams => ['acme']);
fails_with($node, as_role('alice', "SELECT agentvm.$_()"), '42501', qr/permission denied/, "$_() is not for users") for qw(sweep sweep_bootstrap sweep_heartbeat sweep_lifetime);

# So many at once are more likely our own deafness: one more timeout is given
my @many = map { ready('runtime') } 1 .. 11;
silent($many[-1], 4);
is(sql('SELECT agentvm.sweep_heartbeat()'), 0, '11 of 11: the sweep holds');
is(sql("SELECT ok || ' ' || (detail ~ 'would end 11 sessions') FROM agentvm.health WHERE name = 'sweep_hold'"), 'false true', 'and says so in health');
like(log_text($node), qr/would end 11 of 11 sessions and holds/, 'and in the log');
await($node, "SELECT held_at + interval '4 s' < clock_timestamp() FROM agentvm.sweep_hold");
is(sql('SELECT agentvm.sweep_heartbeat(4)'), 4, 'one timeout later it goes on');
is(sql('SELECT agentvm.sweep_heartbeat()'), 7, 'with all of them');
sql('SELECT agentvm.sweep_heartbeat()');
is(sql("SELECT ok FROM agentvm.health WHERE name = 'sweep_hold'"), 't', 'and holds no more');
dispatch();

# A runtime that was warm, and does not fetch what its session was taken with
sub warm
{
	my $id = sql(q{SET client_min_messages = error; SELECT agentvm.provision_warm('acme', 'warm')});
	dispatch();
	bootstrap($node, $id);
	is(state_of($node, $id), 'warm', 'a warm VM');
	sql("UPDATE agentvm.session SET bootstrap_timeout = '4 s' WHERE session_id = '$id'");
	return $id;
}
sub taken
{
	my $id = warm();
	is(sql(q{SELECT agentvm.provision('acme', profile => 'warm', env => '{"A": "b"}')}), $id, 'is taken');
	return $id;
}
sub hydrate { my ($id) = @_; return sql(as_role('agentvm_gateway', 'SELECT agentvm.hydrate(' . AgentVM::Runtime::session_hash($id) . ") ->> 'env'")); }
sub waited { my (@ids) = @_; return await($node, "SELECT bool_and(greatest(seen_at, resumed_at) + interval '4 s' < clock_timestamp()) FROM agentvm.session_hydrating JOIN agentvm.session USING (session_id) WHERE session_id IN ('" . join("', '", @ids) . "')", 't', name => 'they have had their time'); }
my $hydrating = 'SELECT count(*) FROM agentvm.session_hydrating';

my $client = AgentVM::Client->new($node);
my $slow = warm();
$client->run('BEGIN');
is($client->run(q{SELECT agentvm.provision('acme', profile => 'warm')}), $slow, 'is taken, by somebody who is slow to commit');
my ($hydrated, $deaf, $locked, $asleep, $over) = map { taken() } 1 .. 5;
my $cold = ready('warm');
sql("UPDATE agentvm.session SET bootstrap_timeout = '1 s' WHERE session_id = '$cold'");
is(sql($hydrating), 5, 'a row for each that is taken and has not hydrated');
is(hydrate($hydrated), '{"A": "b"}', 'a runtime fetches what is there for it');
sql("SELECT agentvm.terminate('$over'); SELECT agentvm.pause('$asleep')");
dispatch();
is(state_of($node, $asleep), 'paused', 'one is paused');
is(sql('SELECT agentvm.sweep_bootstrap()'), 0, 'nobody is late yet');
is(sql($hydrating), 3, 'who has hydrated, or has ended, is done with');
is(hydrate($hydrated), '{"A": "b"}', 'a reply that was lost');
$user->run("BEGIN; SELECT FROM agentvm.session WHERE session_id = '$deaf' FOR UPDATE; SELECT FROM agentvm.session_hydrating WHERE session_id = '$locked' FOR UPDATE");
waited($deaf, $locked);
is(sql(q(SET statement_timeout = '10 s'; SELECT agentvm.sweep_bootstrap())), 0, 'who is late, and locked, is left for the next time');
fails_with($node, as_role('agentvm_gateway', 'SELECT agentvm.hydrate(' . AgentVM::Runtime::session_hash($locked) . ')'), '55P03', undef, 'nor does a runtime wait for whoever decides about it');
is(hydrate($deaf), '{"A": "b"}', 'but a session that somebody has locked does not stand in its way');
$user->run('ROLLBACK');
is(sql('SELECT agentvm.sweep_bootstrap(0)'), 0, 'a limit of none');
is(sql('SELECT agentvm.sweep_bootstrap()'), 1, 'one is late');
$client->run('COMMIT');
is(sql('SELECT agentvm.sweep_bootstrap()'), 0, 'once; and whose taking has been committed late has all his time');
is(state_of($node, $locked), 'terminating bootstrap_timeout the VM was warm, and its runtime has not fetched what it was taken with within 4 s', 'and is to end');
is(sql("SELECT reason, detail->>'detail' ~ 'not fetched' FROM agentvm.session_event WHERE session_id = '$locked' AND kind = 'state' ORDER BY event_id DESC LIMIT 1"), 'bootstrap_timeout|t', 'as the log says');
fails_with($node, as_role('agentvm_gateway', 'SELECT agentvm.hydrate(' . AgentVM::Runtime::session_hash($locked) . ')'), 'AV006', undef, 'too late');
dispatch();
like(state_of($node, $locked), qr/^failed bootstrap_timeout/, 'it has failed');
fails_with($node, "SELECT agentvm.wait('$locked')", 'AV004', qr/has not fetched/, 'and whoever waits for it is told');
waited($slow);
sql("SELECT agentvm.resume('$asleep')");
dispatch();
is(sql('SELECT agentvm.sweep()'), 1, 'who was slow to commit is late in the end; who was paused is not');
like(state_of($node, $slow), qr/^terminating bootstrap_timeout/, 'that one');
dispatch();
is(join(' ', map { state_of($node, $_) } $hydrated, $deaf, $cold, $asleep), 'ready ready ready ready', 'who has hydrated, or was never warm, is left alone');

# While a gateway is registered, silence counts only from when it listens
sql("INSERT INTO agentvm.gateway (gateway_id) VALUES ('gw1'), ('gw2')");
$session = ready('runtime');
silent($session, 4);
waited($asleep);
is(sql('SELECT agentvm.sweep_bootstrap()'), 0, 'no gateway listens: nobody could have come for what is there for him');
is(sql('SELECT agentvm.sweep_heartbeat()'), 0, 'no gateway listens: nobody is lost');
report($node, 'gw1');
is(sql('SELECT agentvm.sweep()'), 0, 'one has just begun to listen');
my $since = sql("SELECT listening_since FROM agentvm.gateway WHERE gateway_id = 'gw1'");
await($node, "SELECT timestamptz '$since' + interval '4 s' < clock_timestamp()");
report($node, 'gw2');
is(sql("SELECT listening_since FROM agentvm.gateway WHERE gateway_id = 'gw2'"), $since, 'another one takes over the period');
is(sql('SELECT agentvm.sweep_heartbeat()'), 1, 'it has listened for a timeout: lost');
is(sql('SELECT agentvm.sweep_bootstrap()'), 1, 'and so is who was paused when his time began');
is(sql($hydrating), 0, 'nobody is waited for any more');
sql("UPDATE agentvm.gateway SET last_report_at = last_report_at - interval '31 s', listening_since = listening_since - interval '1 hour'");
$session = ready('runtime');
silent($session, 4);
is(sql('SELECT agentvm.sweep_heartbeat()'), 0, 'all have fallen silent: nobody is lost');
report($node, 'gw1');
is(sql("SELECT listening_since > now() - interval '10 s' FROM agentvm.gateway WHERE gateway_id = 'gw1'"), 't', 'and the next report begins a new period');
is(sql('SELECT agentvm.sweep_heartbeat()'), 0, 'in which everybody has his timeout again');
sql('DELETE FROM agentvm.gateway');

# The worker does all this by itself
sql("ALTER SYSTEM SET agentvm.dispatchers = 1; SELECT pg_reload_conf()");
my $alive = ready('runtime');
$mute = ready('runtime');
my $late = launched('short');
my $unhydrated = warm();
is(sql(q{SELECT agentvm.provision('acme', profile => 'warm')}), $unhydrated, 'is taken');
my $old = provision($node, 'acme', "max_lifetime => '2 s'");
my $end = time + 3;
while (time < $end)
{
	heartbeat($node, $alive);
	sleep 0.2;
}
await_state($node, $late, 'failed');
is(state_of($node, $late), 'failed bootstrap_timeout', 'never bootstrapped');
await_state($node, $unhydrated, 'failed');
like(state_of($node, $unhydrated), qr/^failed bootstrap_timeout the VM was warm/, 'never hydrated');
await_state($node, $old, 'terminated');
is(state_of($node, $old), 'terminated max_lifetime', 'too old');
await_state($node, $mute, 'terminated');
is(sql("SELECT end_reason FROM agentvm.sessions WHERE session_id = '$mute'"), 'heartbeat_timeout', 'silent');
is(state_of($node, $alive), 'ready', 'the one that beats lives');

done_testing();
