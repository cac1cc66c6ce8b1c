# The extension is not dropped while VMs live, whichever way it goes; abandon() lets go of them
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Runtime;
use AgentVM::Test;
use Test::More;

# every way to drop it, each in a database that was made for it: what is dropped, by whom
my %way = (
	'DROP EXTENSION agentvm' => '',
	'DROP EXTENSION agentvm CASCADE' => '',
	'DROP EXTENSION IF EXISTS nothing, agentvm' => '',
	'DROP EXTENSION pgcrypto CASCADE' => '',
	'DROP SCHEMA agentvm CASCADE' => '',
	'DROP SCHEMA crypto CASCADE' => 'CREATE SCHEMA crypto; CREATE EXTENSION pgcrypto SCHEMA crypto;',
	'DROP OWNED BY owner CASCADE' => 'SET SESSION AUTHORIZATION owner;',
	'DO $$ BEGIN EXECUTE \'DROP EXTENSION agentvm\'; END $$' => '',
);

foreach my $preload ([], undef)
{
	my $how = $preload ? 'preloaded' : 'not preloaded';
	my $node = new_node($preload ? 'with' : 'without', preload => $preload, conf => "agentvm.databases = 'nobody'\n");
	my @db = (dbname => 'way');
	$node->safe_psql('postgres', 'CREATE ROLE owner SUPERUSER');
	my $n = 0;
	foreach my $drop (sort keys %way)
	{
		$node->safe_psql('postgres', 'DROP DATABASE IF EXISTS way');
		$node->safe_psql('postgres', 'CREATE DATABASE way');
		$node->safe_psql('way', "SET client_min_messages = error; $way{$drop} CREATE EXTENSION agentvm CASCADE; SELECT agentvm.create_team('acme')");
		my $waiting = $node->safe_psql('way', "SET client_min_messages = error; SELECT agentvm.provision('acme')");
		psql_ok($node, "BEGIN; $drop; ROLLBACK", "$how: $drop: one whose launch was never begun is no obstacle", @db);
		$node->safe_psql('way', 'CALL agentvm.dispatch()');
		fails_with($node, $drop, '55006', qr/cannot drop extension agentvm while its VMs live\nDETAIL:  Live sessions.*: $waiting \(noop-$waiting\)\.\nHINT:.*agentvm\.abandon\(\)/, "$how: $drop: refused", @db);
		is($node->safe_psql('way', 'SELECT state FROM agentvm.sessions'), 'ready', 'all is as it was');
		psql_ok($node, "BEGIN; SELECT * FROM agentvm.abandon(); $drop; ROLLBACK", "$how: $drop: works in the transaction of abandon()", @db);
		$node->safe_psql('way', 'SELECT * FROM agentvm.abandon()');
		psql_ok($node, $drop, "$how: $drop: works without a VM", @db);
		is($node->safe_psql('way', "SELECT count(*) FROM pg_extension WHERE extname = 'agentvm'"), 0, 'it is gone');
		is($node->safe_psql('way', "SELECT count(*) FROM pg_event_trigger"), 0, 'with all that is its own');
	}
	next unless $preload;

	# ---- what is not refused ----
	$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
	my @sessions = sort map { $node->safe_psql('postgres', "SET client_min_messages = error; SELECT agentvm.provision('acme', options => '{\"runtime\": true}')") } 1 .. 13;
	$node->safe_psql('postgres', 'CALL agentvm.dispatch()');
	bootstrap($node, $sessions[0]);
	heartbeat($node, $sessions[0]);
	psql_ok($node, 'CREATE SCHEMA s; CREATE TABLE s.session (session_id uuid); INSERT INTO s.session VALUES (NULL); DROP TABLE s.session; DROP SCHEMA s CASCADE; CREATE EXTENSION citext; DROP EXTENSION citext', 'other tables, schemas and extensions');
	$node->safe_psql('postgres', 'CREATE DATABASE plain');
	psql_ok($node, 'CREATE SCHEMA agentvm; CREATE TABLE agentvm.session (session_id uuid, vm_id text, ended_at timestamptz); INSERT INTO agentvm.session VALUES (gen_random_uuid(), $$i-1$$, NULL); DROP SCHEMA agentvm CASCADE', 'somebody else\'s table of the same name', dbname => 'plain');
	psql_ok($node, 'ALTER EXTENSION agentvm UPDATE', 'ALTER EXTENSION');
	$node->safe_psql('postgres', 'CREATE DATABASE copied TEMPLATE postgres');
	psql_ok($node, 'DROP DATABASE copied', 'DROP DATABASE');

	# ---- the message names ten ----
	my $error = fails_with($node, 'DROP EXTENSION agentvm', '55006', qr/ and 3 more\.$/m, 'thirteen live: ten are named');
	is(scalar(() = $error =~ /\(noop-/g), 10, 'not more');

	# ---- abandon() ----
	make_role($node, 'alice', teams => ['acme']);
	$node->safe_psql('postgres', 'CREATE ROLE boss IN ROLE agentvm_admin');
	fails_with($node, as_role('alice', 'SELECT * FROM agentvm.abandon()'), '42501', qr/permission denied/, 'abandon() is for administrators');
	$node->safe_psql('postgres', "SELECT agentvm.terminate('$sessions[1]', 'my own reason'); UPDATE agentvm.session SET region = 'here' WHERE session_id = '$sessions[0]'");
	my $unsent = $node->safe_psql('postgres', "SET client_min_messages = error; SELECT agentvm.provision('acme')");
	my $waiter = AgentVM::Client->new($node);
	$waiter->send("SELECT agentvm.wait('$sessions[2]', 'ready', '60 s')");
	my $holder = AgentVM::Client->new($node);
	$holder->run("BEGIN; SELECT agentvm.extend('$sessions[3]', '1 s')");
	my $worker = AgentVM::Client->new($node);
	$worker->send("SET ROLE boss; SELECT * FROM agentvm.abandon() ORDER BY session_id");
	await($node, "SELECT wait_event_type FROM pg_stat_activity WHERE pid = " . $worker->pid, 'Lock', name => 'it waits for a transaction that has a session locked');
	$holder->run('COMMIT');
	my @rows = split /\n/, $worker->answer;
	is_deeply(\@rows, [ map { "$_|acme|noop|" . ($_ eq $sessions[0] ? "noop-$_|here" : "noop-$_|") } @sessions ], 'it returns what may have a VM, and not what was never begun');
	$waiter->answer;
	like($waiter->error, qr/AV006.*has ended: orphan/, 'who waits is told');
	is($node->safe_psql('postgres', 'SELECT DISTINCT state, end_reason, detail FROM agentvm.sessions'), 'terminated|orphan|abandoned by boss: its VM, if any, was left as it was', 'all are tombstones that say who did it');
	is($node->safe_psql('postgres', "SELECT string_agg(concat_ws('>', old_state, new_state, reason), ' ' ORDER BY event_id) FROM agentvm.session_event WHERE session_id = '$sessions[1]' AND kind = 'state' AND old_state IS NOT NULL"),
		'provisioning>terminating>requested terminating>terminated>orphan', 'so does the log');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session_heartbeat'), 0, 'no heartbeat is left');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session_token'), 0, 'nor a token');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session_ending'), 0, 'nor anybody who is ending');
	is($node->safe_psql('postgres', 'SELECT count(final_heartbeat_at) FROM agentvm.session'), 1, 'the last heartbeat is remembered');
	is(heartbeat($node, $sessions[0]), '', 'its runtime is unknown: it is not told to power off');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.abandon()'), 0, 'nothing is left to abandon');
	is($node->safe_psql('postgres', 'CALL agentvm.dispatch()'), 0, 'or to do');
	psql_ok($node, 'DROP EXTENSION agentvm', 'now it may go');
}
done_testing();
