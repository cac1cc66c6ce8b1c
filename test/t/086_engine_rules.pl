# Rules of the engine that show in rows: who may touch a lease, whose lease is void, when to try again, what a sweep looks at twice
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Runtime;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_node('main', conf => "agentvm.dispatchers = 0\n");
sub sql { return $node->safe_psql('postgres', $_[0]); }
sub dispatch { return sql('SET client_min_messages = error; CALL agentvm.dispatch(1000)'); }
sql("SELECT agentvm.create_team('acme'); CREATE TABLE public.kept AS SELECT session_id, lease, lease_pid, lease_start, next_check_at FROM agentvm.session");

# Rows as other tooling would make them, with fields given as SQL; the ids
my $ids = 0;
sub rows
{
	my ($count, %fields) = @_;
	%fields = (session_id => "('00000000-0000-7000-8000-' || lpad(to_hex($ids + i), 12, '0'))::uuid", team_id => "'acme'", provider => "'noop'", %fields);
	$ids += $count;
	my @names = sort keys %fields;
	return split /\n/, sql('INSERT INTO agentvm.session (' . join(', ', @names) . ') SELECT ' . join(', ', @fields{@names}) . " FROM generate_series(1, $count) i RETURNING session_id");
}
sub row { my ($id) = rows(1, @_); return $id; }
my %ready = (state => "'ready'", ready_at => "now() - interval '1 hour'", running => 'true', next_check_at => "now() + interval '1 hour'", deadline_at => "now() + interval '1 hour'");

# ---- a lease that somebody holds: users and sweeps write their wish, and leave it alone ----
my $holder = AgentVM::Client->new($node);
my %leased = (lease => 4711, lease_pid => $holder->pid, lease_start => '(SELECT backend_start FROM pg_stat_activity WHERE pid = ' . $holder->pid . ')', next_check_at => "now() + interval '40 s'");
my %of = (
	extend => row(%ready, %leased), terminate => row(%ready, %leased), lifetime => row(%ready, %leased, deadline_at => "now() - interval '1 s'"),
	bootstrap_timeout => row(%leased, runtime => 'true', running => 'true', launched_at => "now() - interval '1 hour'"),
	bootstrap => row(%leased, runtime => 'true', running => 'true', launched_at => 'now()', key_id => "'k1'"), silent => row(%ready, %leased, runtime => 'true'));
sql("INSERT INTO agentvm.session_heartbeat (session_id, lost_after) VALUES ('$of{silent}', '1 ms'); INSERT INTO agentvm.session_token VALUES (" . AgentVM::Runtime::token_hash($node, $of{bootstrap}, 1) . ", '$of{bootstrap}', 'bootstrap')");
sql('INSERT INTO public.kept SELECT session_id, lease, lease_pid, lease_start, next_check_at FROM agentvm.session');
sql("SELECT agentvm.extend('$of{extend}', '2 hours'); SELECT agentvm.terminate('$of{terminate}')");
bootstrap($node, $of{bootstrap});
is(sql('SELECT agentvm.sweep()'), 3, 'three are past their time');
is(sql("SELECT string_agg(concat_ws(' ', state, end_reason), ', ' ORDER BY session_id) FROM agentvm.session"),
	'ready, terminating requested, terminating max_lifetime, terminating bootstrap_timeout, ready, terminating heartbeat_timeout', 'extend(), terminate(), the sweeps and bootstrap() have done what they do');
is(sql("SELECT deadline_at > now() + interval '2 hours' FROM agentvm.session WHERE session_id = '$of{extend}'"), 't', 'the deadline has moved');
my $touched = 'SELECT count(*) FROM agentvm.session s JOIN public.kept k USING (session_id) WHERE ROW(s.lease, s.lease_pid, s.lease_start, s.next_check_at) IS DISTINCT FROM ROW(k.lease, k.lease_pid, k.lease_start, k.next_check_at)';
is(sql($touched), 0, 'and leave lease and next_check_at alone');
is(dispatch(), 0, 'nor does anybody claim what a living process holds');
is(sql($touched), 0, 'or touch it');

# ---- a process of the same number is not the same process ----
sql("UPDATE agentvm.session SET lease_start = lease_start - interval '1 hour' WHERE state = 'terminating'");
is(dispatch(), 4, 'the lease of one that has had the number before is void');
is(sql("SELECT string_agg(DISTINCT state, ' ') FROM agentvm.session WHERE end_reason IS NOT NULL"), 'failed terminated', 'and the work is done');
sql('DELETE FROM agentvm.session');

# ---- when to try again: the least of a cap and a second doubled each time, give or take a half; kept in the row ----
sub tries
{
	my ($state, $retries, $low, $high) = @_;
	rows(150, provider => "'nowhere'", retries => $retries, state => "'$state'", $state eq 'terminating' ? (end_reason => "'requested'") : ());
	is(dispatch(), 150, "$state, $retries tries so far: one more each");
	my ($least, $most, $counted) = split /\|/, sql('SELECT min(s), max(s), bool_and(retries = ' . ($retries + 1) . ') FROM (SELECT extract(epoch FROM next_check_at - e.at) AS s, retries FROM agentvm.session JOIN agentvm.session_event e USING (session_id) WHERE kind = $$provider_call$$) d');
	is($counted, 't', 'the row has the count');
	my $middle = ($low + $high) / 2;
	# the event is logged some time after the clock was read, all of them in one transaction
	ok($least > $low - 3 && $least < $low + ($middle - $low) / 3, "the soonest comes after little more than $low s") or diag($least);
	ok($most <= $high && $most > $high - ($middle - $low) / 3 - 3, "the latest after little less than $high s") or diag($most);
	sql('DELETE FROM agentvm.session; ALTER TABLE agentvm.session_event DISABLE TRIGGER append_only; DELETE FROM agentvm.session_event; ALTER TABLE agentvm.session_event ENABLE ALWAYS TRIGGER append_only');
	return;
}
tries('provisioning', 4, 8, 24);
tries('terminating', 5, 16, 48);
tries('provisioning', 6, 30, 90);
tries('provisioning', 1000, 30, 90);
tries('terminating', 1000, 150, 450);

# ---- an end without a reason, from before the constraint asked for one ----
sql('ALTER TABLE agentvm.session DROP CONSTRAINT session_is_sound');
row(%ready, state => "'terminating'", next_check_at => 'now()');
sql('ALTER TABLE agentvm.session ADD CONSTRAINT session_is_sound CHECK (agentvm.session_is_sound(state, end_reason, purchase, ended_at, next_check_at)) NOT VALID');
is(dispatch(), 1, 'it has its turn');
is(sql("SELECT concat_ws(' ', state, end_reason) FROM agentvm.session"), 'terminated requested', 'and ends');
sql('DELETE FROM agentvm.session; ALTER TABLE agentvm.session VALIDATE CONSTRAINT session_is_sound');

# ---- who is found silent is looked at again under the lock: a beat that has come meanwhile counts ----
my ($beats, $silent) = map { row(%ready, runtime => 'true') } 1, 2;
sql("INSERT INTO agentvm.session_heartbeat (session_id, lost_after) SELECT session_id, '1 s' FROM agentvm.session");
await($node, "SELECT pg_postmaster_start_time() + interval '1 s' < clock_timestamp()");
my $sweeper = AgentVM::Client->new($node);
$holder->run('BEGIN; LOCK TABLE agentvm.session IN EXCLUSIVE MODE');    # it may be read, and no row of it locked
$sweeper->send('SELECT agentvm.sweep_heartbeat()');
await($node, 'SELECT wait_event_type FROM pg_stat_activity WHERE pid = ' . $sweeper->pid, 'Lock', name => 'a sweep has found two, and wants their locks');
sql("SELECT agentvm.heartbeat_batch('{$beats}', '{infinity}')");
sql("UPDATE agentvm.session_heartbeat SET lost_after = '10 min' WHERE session_id = '$beats'");    # however long the rest takes
$holder->run('COMMIT');
is($sweeper->answer, 1, 'one has beaten in between');
is(state_of($node, $beats), 'ready', 'and lives');
like(state_of($node, $silent), qr/^terminating heartbeat_timeout/, 'the other ends');
sql('DELETE FROM agentvm.session; DELETE FROM agentvm.session_heartbeat; DELETE FROM agentvm.session_ending');

# ---- ten at once are no reason to hold, eleven are ----
sub silent_rows { my ($count) = @_; rows($count, %ready, runtime => 'true'); sql("INSERT INTO agentvm.session_heartbeat (session_id, lost_after) SELECT session_id, '1 ms' FROM agentvm.session"); return; }
silent_rows(10);
is(sql('SELECT agentvm.sweep_heartbeat()'), 10, 'all of ten sessions');
sql('DELETE FROM agentvm.session; DELETE FROM agentvm.session_heartbeat; DELETE FROM agentvm.session_ending');

# ---- a sweep that somebody's open transaction has held, or let go, is waited for by nobody ----
my $held = 'SELECT count(*) FROM agentvm.sweep_hold';
my $sweep = q(SET statement_timeout = '10 s'; SELECT agentvm.sweep_heartbeat());
silent_rows(11);
sql("UPDATE agentvm.session_heartbeat SET lost_after = '1 s'");
await($node, "SELECT clock_timestamp() > pg_postmaster_start_time() + interval '1 s'");
$holder->run('BEGIN; SELECT agentvm.sweep_heartbeat()');
is(sql($sweep) . sql($held), '00', 'eleven of eleven: held by one that does not commit, and by the next one for him');
$holder->run('ROLLBACK');
is(sql($sweep) . sql($held), '01', 'he is gone: held by the next one');
sql("UPDATE agentvm.session_heartbeat SET lost_after = '10 min'");
$holder->run('BEGIN; SELECT agentvm.sweep_heartbeat()');
is(sql($sweep) . sql($held), '01', 'the same when it is let go');
$holder->run('COMMIT');
is(sql($held), 0, 'it is');
done_testing();
