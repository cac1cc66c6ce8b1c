# While a snapshot keeps the index entries of rows handled long ago, claims read few buffers all the same; beats stay HOT. With a
# million sessions: test/long/million_stress.pl
use strict;
use warnings;
use AgentVM::Claims;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use List::Util qw(max);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep);

my $live = $ENV{AGENTVM_LIVE} // 20000;
my $drained = $ENV{AGENTVM_DRAINED} // 5000;
my $calls = 1000;    # each of which leaves an entry at the end of its lease, in the future
my $faults = AgentVM::Faults->new;
my $node = new_node('main', moto => $faults, preload => ['auto_explain'], conf => <<"CONF");
agentvm.max_in_flight_per_team = 256
agentvm.sweep_interval = '1h'
max_wal_size = '8GB'
$claims_conf
CONF
sub sql { return $node->safe_psql('postgres', $_[0]); }
sql("SELECT agentvm.create_profile('plain', 'ec2', runtime => false); SELECT agentvm.create_team('acme')");
ec2_team($node, $_, $faults) for qw(many one);
sql(<<"SQL");
INSERT INTO agentvm.session (session_id, team_id, provider, state, ready_at, running, runtime, next_check_at, deadline_at)
	SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'acme', 'noop', 'ready', now(), true, true, at, at
	FROM (SELECT i, now() + interval '1 hour' + random() * interval '2 hours' AS at FROM generate_series(1, $live) i) s;
INSERT INTO agentvm.session_heartbeat (session_id, last_heartbeat_at) SELECT session_id, now() FROM agentvm.session;
VACUUM ANALYZE;
SQL

# The claims of a few single launches
sub is_bounded
{
	my ($what) = @_;
	sql("ALTER SYSTEM SET auto_explain.log_min_duration = 0; SELECT pg_reload_conf()");
	sleep 0.2;
	my $offset = -s $node->logfile;
	for (1 .. 10)
	{
		my $session = launch($node, 'one');
		await($node, "SELECT launched_at IS NOT NULL FROM agentvm.session WHERE session_id = '$session'", 't', name => "$what: a launch");
	}
	my @claims = claims(slurp_file($node->logfile, $offset));
	sql("ALTER SYSTEM RESET auto_explain.log_min_duration; SELECT pg_reload_conf()");
	cmp_ok(scalar @claims, '>=', 10, "$what: the log has " . scalar @claims . ' claims');
	my $most = max(map { $_->[0] } @claims);
	cmp_ok($most, '<', 100, "$what: none reads 100 buffers ($most)");
	return;
}

$faults->set(mode => 'canned', log => 0);
is_bounded('nothing due');

my $pin = AgentVM::Client->new($node);
$pin->run('BEGIN ISOLATION LEVEL REPEATABLE READ');
$pin->run('SELECT count(*) FROM agentvm.team');
sql("UPDATE agentvm.session SET next_check_at = clock_timestamp() WHERE session_id <= ('00000000-0000-7000-8000-' || lpad(to_hex($drained), 12, '0'))::uuid; SELECT agentvm.wake()");
sql("SELECT count(agentvm.provision('many', profile => 'plain')) FROM generate_series(1, $calls)");
await($node, "SELECT count(*) FROM agentvm.session WHERE next_check_at <= now()", 0, timeout => 300, name => "$drained rows are handled");
await($node, "SELECT count(*) FROM agentvm.session WHERE team_id = 'many' AND launched_at IS NOT NULL AND lease IS NULL", $calls, timeout => 300, name => "and $calls calls made");
is_bounded('with a pinned xmin');
$pin->run('COMMIT');

# beats: of a tenth at a time
sql('SELECT pg_stat_reset()');
sql("SELECT count(*) FROM agentvm.heartbeat_batch((SELECT array_agg(session_id) FROM agentvm.session_heartbeat WHERE right(session_id::text, 2) = lpad(to_hex($_), 2, '0')), "
	  . "(SELECT array_agg(now()) FROM agentvm.session_heartbeat WHERE right(session_id::text, 2) = lpad(to_hex($_), 2, '0')))") for 0 .. 49;
await($node, "SELECT n_tup_upd > 0 AND n_tup_hot_upd = n_tup_upd FROM pg_stat_user_tables WHERE relname = 'session_heartbeat'", 't', name => 'all updates of heartbeats are HOT');

done_testing();
