# Ten minutes without the database or without the gateways end no session; after that silence counts again, at most one timeout later
use strict;
use warnings;
use AgentVM::Runtime;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my $fleet = 400;
my $node = new_node('main', conf => "agentvm.dispatchers = 0\n");
sub sql { return $node->safe_psql('postgres', $_[0]); }

# A fleet with a VM each that has beaten until now; $timeout: after which silence a session is lost
sub fleet
{
	my ($timeout) = @_;
	sql(<<"SQL");
DELETE FROM agentvm.session_heartbeat;
DELETE FROM agentvm.session;
DELETE FROM agentvm.sweep_hold;
INSERT INTO agentvm.session (session_id, team_id, provider, state, ready_at, running, runtime, next_check_at, deadline_at)
	SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'acme', 'noop', 'ready', now(), true, true, now() + '1 day', now() + '1 day' FROM generate_series(1, $fleet) i;
INSERT INTO agentvm.session_heartbeat (session_id, last_heartbeat_at, lost_after) SELECT session_id, now(), '$timeout' FROM agentvm.session;
SQL
	return;
}

# Time goes by: all that is stored happened so much earlier
sub later
{
	my ($interval) = @_;
	sql(<<"SQL");
UPDATE agentvm.session SET ready_at = ready_at - interval '$interval', created_at = created_at - interval '$interval';
UPDATE agentvm.session_heartbeat SET last_heartbeat_at = last_heartbeat_at - interval '$interval';
UPDATE agentvm.gateway SET last_report_at = last_report_at - interval '$interval', listening_since = listening_since - interval '$interval';
UPDATE agentvm.sweep_hold SET held_at = held_at - interval '$interval';
SQL
	return;
}
sub beats { my ($which) = @_; return "SELECT FROM agentvm.heartbeat_batch((SELECT array_agg(session_id) FROM agentvm.session WHERE $which), (SELECT array_agg(now()) FROM agentvm.session WHERE $which));"; }
# What a sweep ends while some are heard, in one go: the time between would count
sub swept { my ($which) = @_; return sql(beats($which) . 'SELECT agentvm.sweep_heartbeat()'); }
sub live { return sql("SELECT count(*) FROM agentvm.session WHERE state = 'ready'"); }
sub held { return sql("SELECT ok FROM agentvm.health WHERE name = 'sweep_hold'") eq 'f' ? 'held' : 'not held'; }
my $sweep = 'SELECT agentvm.sweep_heartbeat()';
my $odd = "('x' || right(session_id::text, 1))::bit(4) & B'0001' = B'0001'";

sql("SELECT agentvm.create_team('acme')");

# ---- the database was down ----
fleet('2 min');
later('11 min');
$node->restart;
is(sql($sweep), 0, 'eleven minutes of silence, but the server has only just started');
is(held(), 'not held', 'this is no mass dying either');
sql("ALTER SYSTEM SET agentvm.dispatchers = 1; SELECT pg_reload_conf()");
await($node, 'SELECT passes > 2 FROM agentvm.stat_dispatcher', 't', name => 'dispatchers sweep again');
is(live(), $fleet, 'nobody was ended');
sql("ALTER SYSTEM RESET agentvm.dispatchers; ALTER SYSTEM SET agentvm.dispatchers = 0; SELECT pg_reload_conf()");
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 0);

# ---- who comes back lives, who does not is lost: one timeout after the start, when the hold has held for one more ----
fleet('3 s');
later('11 min');
$node->restart;
is(swept($odd), 0, 'the rest has a whole timeout from the start');
await($node, "SELECT pg_postmaster_start_time() + interval '3 s' < clock_timestamp()", 't', name => 'a timeout after the start');
is(swept($odd), 0, 'half of the fleet at once: held');
is(held(), 'held', 'and health says so');
like(log_text($node), qr/would end 200 of 400 sessions and holds/, 'as does the log');
await($node, "SELECT held_at + interval '3 s' < clock_timestamp() FROM agentvm.sweep_hold", 't', name => 'one more timeout');
is(swept($odd), 200, 'then it acts');
is(sql("SELECT string_agg(DISTINCT concat_ws(' ', state, end_reason, $odd), ', ') FROM agentvm.session"), 'ready t, terminating heartbeat_timeout f', 'on those that are silent still');
sql($sweep);
is(held(), 'not held', 'and holds no longer');

# ---- a hold is let go of when they come back ----
fleet('3 s');
later('1 min');
await($node, "SELECT pg_postmaster_start_time() + interval '3 s' < clock_timestamp()");
is(sql($sweep), 0, 'all at once: held');
is(swept('true'), 0, 'they beat again');
is(held(), 'not held', 'so that nothing is held any more');
later('1 min');
is(sql($sweep), 0, 'the next time begins anew');
is(held(), 'held', 'with a hold');

# ---- a fifth and ten sessions are the bounds ----
fleet('3 s');
later('1 min');
# 80 of 400 are silent
is(swept("session_id > '00000000-0000-7000-8000-000000000050'"), 80, 'a fifth of the fleet is ended at once');
fleet('3 s');
later('1 min');
is(swept("session_id > '00000000-0000-7000-8000-000000000051'"), 0, 'one more is held');

# ---- who is paused is silent by right, and makes the fleet no larger ----
fleet('3 s');
later('1 min');
sql("UPDATE agentvm.session SET state = '$_' WHERE session_id > '00000000-0000-7000-8000-000000000064'") for qw(pausing paused);
is(swept("session_id > '00000000-0000-7000-8000-00000000001e' AND state = 'ready'"), 0, '30 of the 100 that are not paused: held');
is(held(), 'held', 'although they are few beside the 300 that are');

# ---- the gateways were gone ----
fleet('2 min');
sql("INSERT INTO agentvm.gateway (gateway_id) VALUES ('gw1'), ('gw2')");
report($node, 'gw1');
later('11 min');
is(sql($sweep), 0, 'no gateway has reported for eleven minutes: nobody could be heard');
is(held(), 'not held', 'nothing is held for that');
report($node, 'gw2');
is(sql($sweep), 0, 'one is back: everybody has a whole timeout again');
sql("UPDATE agentvm.gateway SET listening_since = listening_since - interval '119 s'");
is(sql($sweep), 0, 'which is not over yet');
sql("UPDATE agentvm.gateway SET listening_since = listening_since - interval '2 s'");
sql("UPDATE agentvm.session_heartbeat SET last_heartbeat_at = now() WHERE session_id > '00000000-0000-7000-8000-000000000005'");
# the server has started a few seconds ago, too: that is its word against the gateways'
is(sql($sweep), 0, 'nor is that from the start of the server');
sql("UPDATE agentvm.session_heartbeat SET lost_after = '1 s'");
await($node, "SELECT pg_postmaster_start_time() + interval '1 s' < clock_timestamp() AND max(last_heartbeat_at) + interval '1 s' < clock_timestamp() FROM agentvm.session_heartbeat");
sql("UPDATE agentvm.session_heartbeat SET last_heartbeat_at = clock_timestamp() + interval '1 min' WHERE session_id > '00000000-0000-7000-8000-000000000005'");
is(sql($sweep), 5, 'after that silence counts');
is(sql("SELECT count(*) FROM agentvm.session WHERE state = 'ready'"), $fleet - 5, 'and a beat of the future, as of a clock that was set back, counts as one');
sql('DELETE FROM agentvm.gateway');

# ---- no beat at all ----
fleet('3 s');
sql("UPDATE agentvm.session_heartbeat SET last_heartbeat_at = NULL WHERE session_id <= '00000000-0000-7000-8000-000000000002'");
is(sql($sweep), 0, 'who never beat has a timeout from when it was ready');
sql("UPDATE agentvm.session SET ready_at = now() - interval '1 min' WHERE session_id = '00000000-0000-7000-8000-000000000001'");
is(sql($sweep), 1, 'and no more');
like(sql("SELECT detail FROM agentvm.session WHERE state = 'terminating'"), qr/no heartbeat since it was ready/, 'which is said');

# ---- clocks of gateways that are wrong ----
fleet('3 s');
later('1 min');
my ($a, $b, $c, $d) = map { "00000000-0000-7000-8000-00000000000$_" } 1 .. 4;
is(sql("SELECT string_agg(heartbeat_batch::text, ' ') FROM agentvm.heartbeat_batch(
	ARRAY['$d', NULL, '$a', '$b', '$a', '$c', '00000000-0000-7000-9000-000000000000', '$c']::uuid[],
	ARRAY['4713-01-01 BC', now(), '1970-01-01', '2999-12-31', now(), NULL, now(), '-infinity']::timestamptz[])"), '00000000-0000-7000-9000-000000000000', 'only what is not there is gone');
is(sql("SELECT string_agg((last_heartbeat_at BETWEEN clock_timestamp() - interval '30 s' AND clock_timestamp())::text, ' ' ORDER BY session_id) FROM agentvm.session_heartbeat WHERE session_id <= '$d'"),
	'true true true false', 'twice the same: the later one; the future and NULL: now; the past takes nothing back');
is(sql("SELECT last_heartbeat_at > now() - interval '2 min' FROM agentvm.session_heartbeat WHERE session_id = '$d'"), 't', 'not even to 4713 BC');
sql(beats("session_id > '$c'"));
later('1 min');
is(swept("session_id > '$a'"), 1, 'a beat of the far future saves nobody for longer');
fails_with($node, "SELECT agentvm.heartbeat_batch(ARRAY['$a', '$b']::uuid[], ARRAY[now()])", '2202E', qr/same length/);
fails_with($node, "SELECT agentvm.heartbeat_batch(ARRAY['$a']::uuid[], ARRAY[now(), now()])", '2202E', qr/same length/);

done_testing();
