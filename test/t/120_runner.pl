# Providers whose library blocks: calls on threads of a runner, asked from backends, with and without hosts
use strict;
use warnings;
use AgentVM::Blocking;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(time);

my $node = new_node('main', conf => "agentvm.provider_libraries = 'agentvm_test_blocking'\nagentvm.sweep_interval = '1h'\n");    # what wakes the runner is commits
my $blocking = AgentVM::Blocking->new($node);
my $dir = $blocking->dir;
sub sql { return $node->safe_psql('postgres', @_); }
sub options { my (%o) = @_; return "options => " . $blocking->options(%o); }
sub vm { return $blocking->vm(@_); }
sql("SELECT agentvm.create_team('acme'); SELECT agentvm.set_provider('acme', 'blocking', '{}')");

# ---- the runner is there, and seen ----
await($node, "SELECT kind || ' ' || dispatcher || ' ' || stuck FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 'runner 0 0', name => 'a runner serves the database');
is(sql("SELECT backend_type FROM pg_stat_activity WHERE pid = (SELECT pid FROM agentvm.stat_dispatcher WHERE kind = 'runner')"), 'agentvm runner', 'pg_stat_activity says what it is');
is(sql("SELECT ok, detail FROM agentvm.health WHERE name = 'runner'"), 't|a runner serves this database', 'and so does health');

# ---- a VM begins and ends ----
my $session = provision($node, 'acme', "provider => 'blocking'", options());
await_state($node, $session, 'ready');
is(vm($session), "made\n", 'made once');
is(sql("SELECT lane, lease, vm_id FROM agentvm.session WHERE session_id = '$session'"), "1||vm-$session", 'in lane 1');
is(sql("SELECT detail->>'status' || ' ' || (detail ? 'http_status')::text FROM agentvm.session_event WHERE session_id = '$session' AND kind = 'provider_call'"), '200 false', 'the call is in the log');
is(sql("SELECT agentvm.inspect('$session') ->> 'says'"), 'running', 'inspect() asks the runner');
is(sql("SELECT agentvm.check_provider('acme', 'blocking') ->> 'says'"), 'fine', 'check_provider(), too');
psql_ok($node, "SELECT agentvm.terminate('$session')", 'terminate');
await_state($node, $session, 'terminated');
is(vm($session), 'none', 'nothing is left');
like(sql("SELECT string_agg(operation, ' ' ORDER BY operation) FROM agentvm.stat_provider WHERE provider = 'blocking'"), qr/^create destroy$/, 'the calls are counted');

# ---- commits and answers wake it, not the clock ----
my $started = time;
for (1 .. 20)
{
	my $next = provision($node, 'acme', "provider => 'blocking'", options());
	sql("SELECT agentvm.wait('$next', timeout => '25 s'); SELECT agentvm.terminate('$next'); SELECT agentvm.wait('$next', 'terminated', timeout => '25 s')");
}
cmp_ok(time - $started, '<', 20, sprintf('20 sessions one after the other in %.1f s', time - $started));

# ---- answers that are none ----
$session = provision($node, 'acme', "provider => 'blocking'", options(fail => 'capacity'));
await_state($node, $session, 'failed');
is(state_of($node, $session), 'failed capacity Refused: no', 'a refusal is classified by the step');
$session = provision($node, 'acme', "provider => 'blocking'", options(fail => 'silent'));
await($node, "SELECT detail ~ 'NoAnswer: the line went dead' FROM agentvm.sessions WHERE session_id = '$session'", 't', name => 'no answer, maybe done');
sql("SELECT agentvm.terminate('$session')");
await_state($node, $session, 'terminated');
$session = provision($node, 'acme', "provider => 'blocking'", options(fail => 'large'));
await($node, "SELECT detail ~ 'larger than 1048576 bytes' FROM agentvm.sessions WHERE session_id = '$session'", 't', name => 'an answer that is too large');
sql("SELECT agentvm.terminate('$session')");
await_state($node, $session, 'terminated');

# ---- CALL dispatch() leaves the lane alone ----
sql("ALTER SYSTEM SET agentvm.dispatchers = 0; SELECT pg_reload_conf()");
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 0, name => 'without dispatchers no runner');
my ($code, $out, $error) = $node->psql('postgres', "SELECT agentvm.provision('acme', provider => 'blocking', " . options() . ')');
like($error, qr/WARNING:  no agentvm runner serves this database, so the session is not launched/, 'provision() warns');
$session = $out;
is(sql('CALL agentvm.dispatch()'), 0, 'dispatch() does not take it');
is(state_of($node, $session), 'provisioning', 'it waits');
like(sql("SELECT ok, detail FROM agentvm.health WHERE name = 'runner'"), qr/^f\|no runner serves this database: agentvm.dispatchers is 0/, 'health says why');
fails_with($node, "SELECT agentvm.check_provider('acme', 'blocking')", 'AV009', qr/no agentvm runner.*agentvm\.health/s, 'nobody can ask');
fails_with($node, "SELECT agentvm.inspect('$session')", 'AV009', qr/no agentvm runner/, 'nor inspect');
sql("ALTER SYSTEM RESET agentvm.dispatchers; SELECT pg_reload_conf()");
await_state($node, $session, 'ready');

# ---- placed ones need a host ----
fails_with($node, "SELECT agentvm.provision('acme', provider => 'placed')", 'AV010', qr/needs a host.*INSERT INTO agentvm\.host/s, 'without a host');
is(sql("SELECT agentvm.check_provider('acme', 'placed')"), '{"ok": false, "error": "no host is enabled", "hosts": {}}', 'check_provider() says so, too');
sql("INSERT INTO agentvm.host (name, directory, vcpus, memory_mib) VALUES ('one', '$dir', 4, 2048), ('two', '$dir', 4, 1024), ('off', '$dir', 64, 65536); UPDATE agentvm.host SET enabled = false WHERE name = 'off'");
is(sql("SELECT bool_and(updated_at > created_at) FROM agentvm.host WHERE name = 'off'"), 't', 'when a host was changed is noted');
is(sql("SELECT agentvm.check_provider('acme', 'placed')"), '{"ok": true, "hosts": {"one": {"host": "one", "says": "fine"}, "two": {"host": "two", "says": "fine"}}}', 'each enabled host is asked');
sql("UPDATE agentvm.host SET directory = '$dir/none' WHERE name = 'two'; SELECT agentvm.set_provider('acme', 'placed', '{\"kvm\": 1}')");
is(sql("SELECT agentvm.check_provider('acme', 'placed')"), '{"ok": false, "hosts": {"one": {"host": "one", "says": "fine"}, "two": {"ok": false, "error": "Refused", "detail": "no such directory", "error_class": "permanent"}}}', 'one that refuses keeps the others from nothing');
is(sql("SELECT string_agg(name || coalesce(kvm::text, '?'), ' ' ORDER BY name) FROM agentvm.host"), 'off? onetrue two?', 'a check may learn of KVM');
is(sql("UPDATE agentvm.host SET kvm = NULL WHERE name = 'one'; BEGIN READ ONLY; SELECT agentvm.check_provider('acme', 'placed') ->> 'ok'; COMMIT"), 'false', 'in a read-only transaction, too, which learns nothing');
sql("UPDATE agentvm.host SET directory = '$dir' WHERE name = 'two'; SELECT agentvm.set_provider('acme', 'placed', '{}')");
$session = provision($node, 'acme', "provider => 'placed'", options(kvm => -1));
await_state($node, $session, 'ready');
is(sql("SELECT host, p.vcpus, p.memory_mib, region, s.vcpus, s.memory_mib FROM agentvm.placement p JOIN agentvm.session s USING (session_id) WHERE session_id = '$session'"), 'one|1|512|one|1|512', 'placed where there is the most room, with the default size');
is(sql("SELECT agentvm.inspect('$session')"), '{"host": "one", "says": "running"}', 'inspect() knows the host');
is(sql("SELECT string_agg(name || coalesce(kvm::text, '?'), ' ' ORDER BY name) FROM agentvm.host"), 'off? onefalse two?', 'what was learned of its KVM is kept');
fails_with($node, "DELETE FROM agentvm.host WHERE name = 'one'", '23503', qr/placement/, 'a host with VMs cannot be deleted');
sql("SELECT agentvm.terminate('$session')");
await_state($node, $session, 'terminated');
sql("UPDATE agentvm.host SET uri = 'qemu:///system' WHERE name = 'one'");
is(sql("SELECT kvm FROM agentvm.host WHERE name = 'one'"), '', 'and forgotten when it is another machine');
is(sql('SELECT count(*) FROM agentvm.placement'), 0, 'its room is free again');
sql("SELECT agentvm.create_profile('big', 'placed', vcpus => 5, memory_mib => 512); SELECT agentvm.create_profile('huge', 'placed', memory_mib => 2049); SELECT agentvm.create_profile('most', 'placed', memory_mib => 2000)");
fails_with($node, "SELECT agentvm.provision('acme', profile => '$_')", 'AV012', qr/no host is large enough.*4 vCPUs and 2048 MiB/s, "$_: more than any enabled host has") for qw(big huge);

sql(q(SELECT agentvm.create_team('small', limits => '{"max_vcpus": 1}')));
$session = provision($node, 'small', "provider => 'placed'", options());
await_state($node, $session, 'ready');
fails_with($node, "SELECT agentvm.provision('small', provider => 'placed', " . options() . ')', 'AV003', qr/max_vcpus = 1.*1 are in use, 1 more/s, 'the default size counts against the limits of the team');
sql("SELECT agentvm.terminate('$session')");
await_state($node, $session, 'terminated');

# ---- no room, and none of the engine's business with locks ----
my $most = provision($node, 'acme', "profile => 'most'", options());
await_state($node, $most, 'ready');
my $second = provision($node, 'acme', "profile => 'most'", options());
await_state($node, $second, 'failed');
is(state_of($node, $second), 'failed capacity NoRoom: no enabled host has room for 1 vCPUs and 2000 MiB of memory: the largest room is 4 vCPUs and 1024 MiB, on host two', 'no room: the largest one is told');
my $user = $node->background_psql('postgres');
for my $lock ("SELECT FROM agentvm.host WHERE name = 'two' FOR UPDATE", 'LOCK TABLE agentvm.host')
{
	$user->query_safe("BEGIN; $lock");
	$session = provision($node, 'acme', "provider => 'blocking'", options());
	await_state($node, $session, 'ready');
	my $held = sql("BEGIN; SET LOCAL lock_timeout = '100ms'; INSERT INTO agentvm.session (session_id, team_id, provider, lane, options, created_by) VALUES (gen_random_uuid(), 'acme', 'placed', 1, " . json({ directory => $dir }) . "::jsonb, 'x') RETURNING session_id; SELECT agentvm.wake(); COMMIT");
	($held) = $held =~ /([0-9a-f-]{36})/;
	await($node, "SELECT detail ~ 'HostLocked' FROM agentvm.sessions WHERE session_id = '$held'", 't', name => "under $lock the engine waits for nobody");
	$session = provision($node, 'acme', "provider => 'blocking'", options());
	await_state($node, $session, 'ready', name => 'and goes on');
	$user->query_safe('COMMIT');
	await_state($node, $held, 'ready');
}
$user->quit;
sql('SELECT count(*) FROM agentvm.abandon()');
is(sql('SELECT count(*) FROM agentvm.placement'), 0, 'abandon() frees what was placed');
done_testing();
