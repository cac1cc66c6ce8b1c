# What everybody expects of a background worker that lives in a server for months: it pins nothing, tells what it does, counts
# what it writes, and costs backends no memory; tables are tuned for it; pg_upgrade meets none
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $faults = AgentVM::Faults->new;
my $node = new_node('main', moto => $faults, conf => "agentvm.sweep_interval = '1h'\nautovacuum_naptime = '1s'\n");
sub sql { return $node->safe_psql('postgres', $_[0]); }
sql("SELECT agentvm.create_team('noop'), agentvm.create_profile('plain', 'ec2', runtime => false)");
ec2_team($node, 'acme', $faults);
my $activity = sub { return "SELECT $_[0] FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher'"; };

# ---- who it is, and what it does while a call is under way: nothing that others would have to wait for ----
$faults->set(mode => 'canned', ms => 3000, action => 'RunInstances');
my $called = launch($node, 'acme');
await($node, 'SELECT in_flight FROM agentvm.stat_dispatcher', 1, name => 'a call is under way');
is(sql($activity->("concat_ws('|', application_name, datname, state, xact_start, backend_xid, backend_xmin)")), 'agentvm dispatcher 0|postgres|idle', 'its worker has no transaction and no snapshot');
is(sql("SELECT count(*) FROM pg_locks WHERE locktype <> 'virtualxid' AND pid = (" . $activity->('pid') . ')'), 0, 'nor any lock');
like(sql($activity->('query')), qr/^agentvm: /, 'it says what it did last');
is(sql("SELECT application_name FROM pg_stat_activity WHERE backend_type = 'agentvm launcher'"), 'agentvm launcher', 'so does the launcher');
my $hang = AgentVM::Client->new($node);
$hang->run('BEGIN; LOCK TABLE agentvm.session');
sql('SELECT agentvm.wake()');
await($node, $activity->("concat_ws('|', state, query, wait_event_type)"), 'active|agentvm: claim and record|Lock', name => 'at work it is active');
$hang->run('COMMIT');
await_state($node, $called, 'ready');

# ---- autovacuum sees what it writes, though it sleeps for an hour ----
my $updates = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relid = 'agentvm.session'::regclass";
sleep 1.2;    # nobody reports more than once a second
my $before = sql($updates);
for (1 .. 5)
{
	my $session = provision($node, 'noop');
	await_state($node, $session, 'ready');
}
await($node, "SELECT ($updates) >= $before + 5", 't', name => 'each of its updates is counted before it sleeps', timeout => 15);

# ---- calls leave nothing behind in a backend ----
my $memory = sub { return $_[0]->run("SELECT used_bytes FROM pg_backend_memory_contexts WHERE name = 'TopMemoryContext'"); };
my $calls = sub { return "DO \$\$ BEGIN FOR i IN 1 .. $_[0] LOOP PERFORM agentvm.provision('noop', options => '{\"launch_delay\": \"1h\"}'); COMMIT; END LOOP; END \$\$"; };
$hang->run($calls->(200));
$before = $memory->($hang);
$hang->run($calls->(2000));
cmp_ok($memory->($hang) - $before, '<', 16384, '2000 transactions with a provision() grow TopMemoryContext by less than 16 kB');

# ---- one in ten sessions changed is enough for a vacuum: PostgreSQL itself would wait for one in five ----
my $vacuums = "SELECT autovacuum_count FROM pg_stat_user_tables WHERE relid = 'agentvm.session'::regclass";
sql(<<'SQL');
INSERT INTO agentvm.session (session_id, team_id, provider, next_check_at) SELECT gen_random_uuid(), 'noop', 'noop', 'infinity' FROM generate_series(1, 20000);
SQL
sql('VACUUM ANALYZE agentvm.session');
$before = sql($vacuums);
sql("UPDATE agentvm.session SET tags = '{\"a\": 1}' WHERE session_id IN (SELECT session_id FROM agentvm.session WHERE next_check_at = 'infinity' LIMIT 2200)");
await($node, "SELECT ($vacuums) > $before", 't', name => 'agentvm.session is vacuumed');

# ---- no table loses its rows in a crash, no name of a setting goes unknown ----
is(sql("SELECT count(*) FROM pg_class WHERE relnamespace = 'agentvm'::regnamespace AND relkind IN ('r', 'i', 'S', 't') AND relpersistence <> 'p'"), 0, 'nothing is UNLOGGED');
fails_with($node, "SET agentvm.no_such_setting = 'x'", '42602', qr/reserved prefix|invalid configuration parameter/, 'settings that do not exist are refused');

# ---- binary upgrade: a server in which pg_upgrade works has none of us ----
$node->stop;
my @start = ('pg_ctl', '-D', $node->data_dir, '-l', $node->logfile, '-w', 'start');
command_ok([ @start, '-o', '-b --cluster-name=main' ], 'a server in binary upgrade mode');
is(sql("SELECT count(*) FROM pg_stat_activity WHERE backend_type ~ 'agentvm'"), 0, 'has no worker of ours');
is(sql('SELECT count(*) > 0 FROM agentvm.sessions'), 't', 'but all that we have');
command_ok([ 'pg_ctl', '-D', $node->data_dir, '-w', 'stop' ], 'it stops');
$node->start;
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 1, name => 'and in an ordinary one we are back');
unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
