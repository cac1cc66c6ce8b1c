# Seals after pg_dump and restore into another cluster, and in databases of other encodings: as they were, and going on
use strict;
use warnings;
use AgentVM::Audit;
use AgentVM::Client;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "agentvm.sweep_interval = '100ms'\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team(t) FROM unnest('{acme,globex}'::text[]) t");
for my $round (1 .. 3)
{
	await_state($node, provision($node, $_), 'ready') for qw(acme globex);
	await($node, $settled, 't', name => 'sealed');
}
# transaction ids that another cluster will not have come to
$node->safe_psql('postgres', 'DO $$ BEGIN FOR i IN 1 .. 3000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$');
my $open = AgentVM::Client->new($node);
$open->run("BEGIN; SELECT agentvm.provision('acme')");
my $late = provision($node, 'acme');
await_state($node, $late, 'ready');
await($node, $unsealed, 0, name => 'sealed but for one that is still open');
is($node->safe_psql('postgres', 'SELECT seen IS NOT NULL FROM agentvm.event_seal_mark'), 't', 'the mark waits for it');
$node->safe_psql('postgres', 'ALTER SYSTEM SET agentvm.dispatchers = 0; SELECT pg_reload_conf()');
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 0);
$node->safe_psql('postgres', "INSERT INTO agentvm.session_event (session_id, team_id, kind) VALUES ('$late', 'acme', 'test')");

my $file = $node->basedir . '/dump';
command_ok([ 'pg_dump', '-f', $file, '-d', $node->connstr('postgres') ], 'pg_dump, with an event that is not sealed yet');
$open->run('COMMIT');
my %was = map { $_ => $node->safe_psql('postgres', "SELECT seal_id, sha256 FROM agentvm.event_seal WHERE team_id = '$_' ORDER BY 1") } qw(acme globex);

for my $ahead (0, 1)
{
	my $other = new_node("other$ahead", extension => 0, databases => '', conf => "agentvm.sweep_interval = '100ms'\n");
	$other->safe_psql('postgres', 'CREATE DATABASE restored');
	if ($ahead)
	{
		$other->stop;
		# 2^20 ids are one segment of the commit log
		command_ok([ 'pg_resetwal', '-x', 0x100000 * 8, '-D', $other->data_dir ], 'a cluster whose transaction ids are far ahead');
		append_to_file($other->data_dir . '/pg_xact/0008', "\0" x 262144);
		$other->start;
	}
	$other->safe_psql('restored', 'SELECT pg_current_xact_id()') for 1 .. 5;
	command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-o', '/dev/null', '-d', $other->connstr('restored'), '-f', $file ], 'restored');
	my @there = (dbname => 'restored');
	is(problems($other, $_, @there), '', "$_ is in order") for qw(acme globex);
	is($other->safe_psql('restored', "SELECT seal_id, sha256 FROM agentvm.event_seal WHERE team_id = '$_' ORDER BY 1"), $was{$_}, 'its seals are as they were') for qw(acme globex);
	is(recomputed($other, 'acme', 2, @there), seal_hash($other, 'acme', 2, @there), 'an outsider agrees');
	fails_with($other, 'DELETE FROM agentvm.event_seal', '42501', undef, 'append-only', @there);

	$other->safe_psql('restored', 'SELECT agentvm.seal_audit()');
	is($other->safe_psql('restored', $unsealed), 0, 'what was not sealed is');
	$other->safe_psql('restored', 'SELECT agentvm.seal_audit()') for 1 .. 3;
	is($other->safe_psql('restored', $settled), 't', 'and the mark has come to the end');
	$other->safe_psql('restored', "INSERT INTO agentvm.session_event (session_id, team_id, kind) VALUES ('$late', 'acme', 'test'); SELECT agentvm.seal_audit()");
	is(problems($other, $_, @there), '', "$_ is in order as it goes on") for qw(acme globex);
	is($other->safe_psql('restored', 'SELECT count(*) - count(DISTINCT i) FROM agentvm.event_seal, unnest(event_ids) i'), 0, 'nothing is sealed twice');
	cmp_ok($other->safe_psql('restored', "SELECT agentvm.purge('0')"), '>=', 0, 'purged');
	is(problems($other, 'acme', @there), '', 'in order');
	$other->stop;
}

# ---- a database in which bytes are but bytes ----
$node->safe_psql('postgres', "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0; CREATE DATABASE latin ENCODING 'WIN1252' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0");
for my $db (qw(ascii latin))
{
	create_extension($node, $db);
	$node->safe_psql($db, "SELECT agentvm.create_team('acme')");
	# bytes that are no UTF-8, and one that WIN1252 does not define
	$node->safe_psql($db, "SET client_encoding = '" . ($db eq 'ascii' ? 'SQL_ASCII' : 'WIN1252') . "'; INSERT INTO agentvm.session_event (session_id, team_id, kind, reason, detail)
		VALUES (gen_random_uuid(), 'acme', 'test', E'\\xe4\\x81', jsonb_build_object('detail', E'\\xfc'))");
	is($node->safe_psql($db, 'SELECT agentvm.seal_audit()'), 1, "$db: sealed");
	is(problems($node, 'acme', dbname => $db), '', "$db: in order");
	is(recomputed($node, 'acme', 1, dbname => $db), seal_hash($node, 'acme', 1, dbname => $db), "$db: an outsider agrees");
}
done_testing();
