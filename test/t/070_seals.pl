# Seals of the log: every event in one of them, once, whatever commits late, rolls back or crashes, and nobody waits for it
use strict;
use warnings;
use AgentVM::Audit;
use AgentVM::Client;
use AgentVM::Test;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "agentvm.dispatchers = 2\nagentvm.sweep_interval = '100ms'\n");
my @teams = qw(acme globex initech);

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub last_event { return sql('SELECT max(event_id) FROM agentvm.session_event'); }

# What a writer of the log pays is what it paid in 0.1
is(sql("SELECT string_agg(indexrelid::regclass::text, ' ' ORDER BY indexrelid) FROM pg_index WHERE indrelid = 'agentvm.session_event'::regclass"),
	'agentvm.session_event_pkey agentvm.session_event_session', 'no other index on the log');
is(sql("SELECT count(*) FROM pg_trigger WHERE tgrelid = 'agentvm.session_event'::regclass AND tgtype & 4 <> 0"), 0, 'no trigger for INSERT');

sql("SELECT agentvm.create_team(t) FROM unnest('{@{[join ',', @teams]}}'::text[]) t");
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.event_seal_mark'), 0, 'nothing to seal yet');

# ---- a transaction that stays open, one that rolls back ----
my $late = AgentVM::Client->new($node);
$late->run("BEGIN; SELECT agentvm.provision('acme', agent_id => 'late')");
my $lost = AgentVM::Client->new($node);
$lost->run("BEGIN; SELECT agentvm.provision('acme')");
await_state($node, provision($node, $_), 'ready') for @teams;
await($node, $unsealed, 0, name => 'what is committed is sealed');
my $seen = last_event();
sql('SELECT agentvm.seal_audit() FROM generate_series(1, 5)');
is(sql("SELECT sealed_below < $seen FROM agentvm.event_seal_mark"), 't', 'the mark waits for those who may hold an id below');
$late->run('COMMIT');
$lost->run('ROLLBACK');
await($node, $settled, 't', name => 'then it goes on');
is(sql($unsealed), 0, 'and the late one is sealed');
is(sql(q(SELECT min(i) < (SELECT max(i) FROM agentvm.event_seal, unnest(event_ids) i WHERE team_id = 'acme' AND seal_id = 1) FROM agentvm.event_seal, unnest(event_ids) i
	WHERE team_id = 'acme' AND seal_id > 1)), 't', 'in a later seal');
sealed_well($node, @teams);

# ---- anybody can compute it again, with whatever settings ----
sql("INSERT INTO agentvm.session_event (session_id, team_id, at, kind, reason, detail) VALUES (gen_random_uuid(), 'globex', '1969-07-20 20:17:40.123456+00', 'test', E'\\u00fc\\n\"', '{\"b\": 1.10, \"a\": null}'), (gen_random_uuid(), 'globex', 'infinity', 'test', '', '[]')");
await($node, $unsealed, 0);
for my $seal (split /\n/, sql("SELECT seal_id FROM agentvm.event_seal WHERE team_id = 'globex'"))
{
	is(recomputed($node, 'globex', $seal), seal_hash($node, 'globex', $seal), "seal $seal as the README computes it");
}
my $newest = sql("SELECT max(seal_id) FROM agentvm.event_seal WHERE team_id = 'globex'");
cmp_ok($newest, '>', 1, 'more than one');
my $odd = '-c TimeZone=Asia/Kathmandu -c DateStyle=German -c IntervalStyle=iso_8601 -c extra_float_digits=-15 -c bytea_output=escape -c search_path=pg_catalog -c lc_numeric=C -c quote_all_identifiers=on';
is(recomputed($node, 'globex', $newest, options => $odd, encoding => 'LATIN1'), seal_hash($node, 'globex', $newest), 'with odd settings');
{
	local $ENV{PGOPTIONS} = $odd;
	is(problems($node, 'globex'), '', 'verify_audit() does not mind them either');
	sql("INSERT INTO agentvm.session_event (session_id, team_id, kind, detail) VALUES (gen_random_uuid(), 'globex', 'test', '{\"n\": 0.3}'); SELECT agentvm.seal_audit()");
}
is(problems($node, 'globex'), '', 'nor what was sealed with them');

# ---- when nothing happens nothing is written ----
await($node, $settled, 't', name => 'settled');
my $xmax = sql('SELECT pg_snapshot_xmax(pg_current_snapshot())');
my $passes = sql('SELECT min(passes) FROM agentvm.stat_dispatcher');
await($node, "SELECT min(passes) > $passes + 5 FROM agentvm.stat_dispatcher", 't', name => 'some passes later');
is(sql('SELECT pg_snapshot_xmax(pg_current_snapshot())'), $xmax, 'no transaction has written');

# ---- nobody waits: not the sealer for a user, not a user for the sealer ----
my $user = AgentVM::Client->new($node);
$user->run("BEGIN; SELECT agentvm.seal_audit()");
my $session = provision($node, 'acme');
await_state($node, $session, 'ready', name => 'another one seals, and stays in its transaction: sessions are launched all the same');
$user->run('COMMIT');
await($node, $unsealed, 0, name => 'and sealed afterwards');
$user->run("BEGIN; SELECT agentvm.terminate('$session')");
provision($node, 'acme');
await($node, $unsealed, 0, name => 'a user holds a lock on a session: what is committed is sealed');
$user->run('COMMIT');

# ---- many at once, and sealers in the way of each other ----
my $script = $node->basedir . '/script';
append_to_file($script, <<'SQL');
\set team random(1, 3)
\set end random(1, 5)
BEGIN;
SELECT agentvm.provision((ARRAY['acme', 'globex', 'initech'])[:team]);
\if :end = 1
ROLLBACK;
\else
COMMIT;
\endif
SQL
append_to_file("$script.seal", "SELECT agentvm.seal_audit();\n");

sub pgbench
{
	my (@arguments) = @_;
	return IPC::Run::start([ 'pgbench', '-n', @arguments, $node->connstr('postgres') ], '>', '/dev/null', '2>', '/dev/null');
}
my @runs = (pgbench('-c', 4, '-t', 150, '-f', $script), pgbench('-c', 2, '-t', 40, '-f', "$script.seal"));
$late->run("BEGIN; SELECT agentvm.provision('initech')");
my $held = sql('SELECT last_value FROM agentvm.session_event_event_id_seq');
# the first dispatcher goes: the other one, or its successor, takes over
sql('SELECT pg_terminate_backend(pid) FROM agentvm.stat_dispatcher ORDER BY dispatcher LIMIT 1');
ok($_->finish, 'pgbench') for @runs;
await($node, $unsealed, 0, name => 'all is sealed that is there');
cmp_ok(sql('SELECT sealed_below FROM agentvm.event_seal_mark'), '<=', $held, 'an open transaction holds the mark');
$late->run('COMMIT');
await($node, $settled, 't', name => 'until it ends');
is(sql($unsealed), 0, 'all is sealed');
sealed_well($node, @teams);

# ---- crashes ----
for my $round (1 .. 3)
{
	my @runs = (pgbench('-c', 3, '-T', 60, '-f', $script), pgbench('-c', 1, '-T', 60, '-f', "$script.seal"));
	my $goal = sql('SELECT sum(cardinality(event_ids)) + 150 FROM agentvm.event_seal');
	await($node, "SELECT sum(cardinality(event_ids)) > $goal FROM agentvm.event_seal", 't', name => 'writers and sealers are at work');
	$node->stop('immediate');
	$_->finish for @runs;
	$node->start;
}
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'provisioning'", 0);
await($node, $settled, 't', name => 'after crashes, too, all is sealed');
is(sql($unsealed), 0, 'to the last one');
sealed_well($node, @teams);

# ---- a log from before there were seals: in slices, to the end ----
sql("INSERT INTO agentvm.session_event (session_id, team_id, kind, new_state) SELECT gen_random_uuid(), 'old' || n % 3, 'state', 'x' FROM generate_series(1, 30000) n");
await($node, $settled, 't', name => '30,000 events at once');
is(sql("SELECT count(*), sum(cardinality(event_ids)), max(cardinality(event_ids)) <= 2000 FROM agentvm.event_seal WHERE team_id LIKE 'old%'") =~ s/^\d+//r, '|30000|t', 'in seals of no more than 2000');
is(sql('SELECT agentvm.seal_audit()'), 0, 'nothing is left to seal');
# ids may jump
sql("SELECT setval('agentvm.session_event_event_id_seq', 4000000000000000)");
provision($node, 'acme');
await($node, $settled, 't', name => 'a far jump of the ids');
sealed_well($node, 'acme');
ok(log_text($node) !~ /PANIC|TRAP:|terminated by signal/, 'no process crashed by itself');
done_testing();
