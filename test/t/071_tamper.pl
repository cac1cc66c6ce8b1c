# The log refuses changes to everybody; who gets around that is found out; who may ask
use strict;
use warnings;
use AgentVM::Audit;
use AgentVM::Test;
use Test::More;

my $node = new_node('main', conf => "agentvm.dispatchers = 0\n");

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Three rounds of events for two teams, each round sealed by itself
sql("SET client_min_messages = error; SELECT agentvm.create_team('acme'), agentvm.create_team('globex')");
for my $round (1 .. 3)
{
	sql("SET client_min_messages = error; SELECT agentvm.provision('acme'), agentvm.provision('globex')");
	sql('CALL agentvm.dispatch()');
	sql('SELECT agentvm.seal_audit()');
}
sql('SELECT agentvm.seal_audit() FROM generate_series(1, 3)') for 1 .. 2;
is(sql($settled), 't', 'all is sealed');
is(sql("SELECT string_agg(seal_id || ':' || cardinality(event_ids), ' ' ORDER BY seal_id) FROM agentvm.event_seal WHERE team_id = 'acme'"), '1:2 2:2 3:2', 'in three seals each');
is(problems($node, $_), '', "$_ is in order") for qw(acme globex);

# ---- append-only ----
for my $table (qw(session_event event_seal))
{
	for my $sql ("UPDATE agentvm.$table SET team_id = 'x'", "DELETE FROM agentvm.$table", "DELETE FROM agentvm.$table WHERE false", "TRUNCATE agentvm.$table",
		"INSERT INTO agentvm.$table SELECT * FROM agentvm.$table ON CONFLICT DO NOTHING", "COPY agentvm.$table TO '/dev/null'")
	{
		my $insert = $sql =~ /^INSERT|^COPY/;
		$sql =~ s/SELECT/OVERRIDING SYSTEM VALUE SELECT/ if $table eq 'session_event';
		if ($insert) { psql_ok($node, $sql); next; }
		fails_with($node, $sql, '42501', qr/agentvm\.$table is append-only/, "a superuser may not $sql");
		fails_with($node, "SET session_replication_role = replica; $sql", '42501', qr/append-only/, 'nor as a replica');
	}
}
fails_with($node, 'SELECT agentvm.event_is_append_only()', '39P01', qr/is a trigger/, 'the trigger function is not called by hand');
# what purge() opens it closes again, also when it fails in between
sql(q(CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$;
	CREATE TRIGGER refuse BEFORE DELETE ON agentvm.session_event FOR EACH STATEMENT EXECUTE FUNCTION public.refuse()));
fails_with($node, "SELECT agentvm.purge('0')", 'P0001', qr/refused/, 'a purge that fails');
my (undef, undef, $error) = $node->psql('postgres', "SELECT agentvm.purge('0'); DELETE FROM agentvm.event_seal", on_error_stop => 0);
like($error, qr/refused.*event_seal is append-only/s, 'leaves the log closed');
sql('DROP TRIGGER refuse ON agentvm.session_event');
is(problems($node, $_), '', "$_ is in order") for qw(acme globex);

# ---- what a superuser does with the triggers off ----
my @acme = split /\n/, sql("SELECT event_id FROM agentvm.session_event WHERE team_id = 'acme' ORDER BY 1");
my @globex = split /\n/, sql("SELECT event_id FROM agentvm.session_event WHERE team_id = 'globex' ORDER BY 1");
my $hash = 'the hash is wrong: an event or the seal was changed';
my $chain = 'the seal does not follow from the one before';

# Do it, look, undo it: the problems that verify_audit() finds for a team, in the same transaction
sub tampered
{
	my ($sql, $expected, $name, $team) = @_;
	$team //= 'acme';
	$sql =~ s/\b(event|seal)\b(?= SET| WHERE| \()/$1 eq 'event' ? 'agentvm.session_event' : 'agentvm.event_seal'/ge;
	my $found = sql("SET client_min_messages = error; BEGIN; ALTER TABLE agentvm.session_event DISABLE TRIGGER append_only; ALTER TABLE agentvm.event_seal DISABLE TRIGGER append_only; $sql;
		SELECT concat_ws(' ', coalesce(seal_id::text, '-'), coalesce(event_id::text, '-'), problem) FROM agentvm.verify_audit('$team'); ROLLBACK");
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is($found, join("\n", @$expected), $name);
}

tampered('SELECT WHERE false', [], 'nothing');
tampered("UPDATE event SET detail = '{\"a\": 1}' WHERE event_id = $acme[2]", ["2 - $hash"], 'a changed detail');
tampered("UPDATE event SET reason = '' WHERE event_id = $acme[2]", ["2 - $hash"], 'an empty text for none');
tampered("UPDATE event SET at = at + interval '1 us' WHERE event_id = $acme[5]", ["3 - $hash"], 'a microsecond');
tampered("UPDATE event SET session_id = gen_random_uuid() WHERE event_id = $acme[0]", ["1 - $hash"], 'another session');
tampered("UPDATE event SET old_state = new_state, new_state = old_state WHERE event_id = $acme[1]", ["1 - $hash"], 'two columns swapped');
tampered("UPDATE event SET team_id = 'globex' WHERE event_id = $acme[2]", ["2 $acme[2] the event was given to another team"], 'an event of another team');
tampered("UPDATE event SET team_id = 'globex' WHERE event_id = $acme[2]", ["- $acme[2] the event is in no seal of its team"], 'that team is told, too', 'globex');
tampered("DELETE FROM event WHERE event_id = $acme[3]", ["2 $acme[3] the event is missing"], 'a deleted event');
tampered("INSERT INTO agentvm.session_event (event_id, session_id, team_id, kind) OVERRIDING SYSTEM VALUE VALUES (-5, gen_random_uuid(), 'acme', 'x')", ['- -5 the event is in no seal of its team'], 'an event before all others');
tampered("DELETE FROM event WHERE event_id = $globex[2]; INSERT INTO agentvm.session_event (event_id, session_id, team_id, kind) OVERRIDING SYSTEM VALUE VALUES ($globex[2], gen_random_uuid(), 'acme', 'x')",
	["- $globex[2] the event is in no seal of its team"], 'an event among others');
tampered("UPDATE event SET event_id = DEFAULT WHERE event_id = $acme[3]", ["2 $acme[3] the event is missing"], 'an event that is moved to the end');
tampered("WITH a AS (DELETE FROM event WHERE event_id IN ($acme[2], $acme[3]) RETURNING *) SELECT; INSERT INTO agentvm.session_event (event_id, session_id, team_id, kind) OVERRIDING SYSTEM VALUE VALUES ($acme[2], gen_random_uuid(), 'acme', 'x'), ($acme[3], gen_random_uuid(), 'acme', 'x')",
	["2 - $hash"], 'two events replaced');
tampered("DELETE FROM seal WHERE team_id = 'acme' AND seal_id = 2", [ "3 - seals 2 to 2 are missing", map { "- $_ the event is in no seal of its team" } @acme[ 2, 3 ] ], 'a seal in the middle');
tampered("DELETE FROM seal WHERE team_id = 'acme' AND seal_id = 1", [ "2 - the seals before this one are missing", map { "- $_ the event is in no seal of its team" } @acme[ 0, 1 ] ], 'the first one');
tampered("DELETE FROM seal WHERE team_id = 'acme' AND seal_id = 3", [ map { "- $_ the event is in no seal of its team" } @acme[ 4, 5 ] ], 'the last one');
tampered("DELETE FROM seal WHERE team_id = 'acme'", [ map { "- $_ the event is in no seal of its team" } @acme ], 'all');
tampered("DELETE FROM seal WHERE team_id = 'acme' AND seal_id = 2; DELETE FROM event WHERE event_id IN ($acme[2], $acme[3])", ['3 - seals 2 to 2 are missing'], 'a seal with its events');
tampered("DELETE FROM seal WHERE team_id = 'acme' AND seal_id = 2; UPDATE seal SET seal_id = 2 WHERE team_id = 'acme' AND seal_id = 3; DELETE FROM event WHERE event_id IN ($acme[2], $acme[3])",
	[ "2 - $hash", "2 - $chain" ], 'the next one in its place');
tampered("UPDATE seal SET sha256 = (SELECT sha256 FROM agentvm.event_seal o WHERE o.team_id = 'acme' AND o.seal_id = 5 - event_seal.seal_id) WHERE team_id = 'acme' AND seal_id > 1",
	[ "2 - $hash", "3 - $hash", "3 - $chain" ], 'two hashes swapped');
tampered("UPDATE seal SET seal_id = -seal_id WHERE team_id = 'acme'; UPDATE seal SET seal_id = (ARRAY[1, 3, 2])[-seal_id] WHERE team_id = 'acme'",
	[ "2 - $hash", "2 - $chain", "3 - $hash", "3 - $chain" ], 'two seals swapped');
tampered("UPDATE seal SET event_ids = ARRAY[event_ids[2], event_ids[1]] WHERE team_id = 'acme' AND seal_id = 1", ["1 - $hash"], 'another order of events');
tampered("UPDATE seal SET event_ids = event_ids || event_ids[1] WHERE team_id = 'acme' AND seal_id = 1",
	[ "1 $acme[0] the event is in more than one seal", "1 $acme[0] the event is in more than one seal", "1 - $hash" ], 'an event twice');
tampered("UPDATE seal SET event_ids = '{}' WHERE team_id = 'acme' AND seal_id = 1", [ "1 - $hash", map { "- $_ the event is in no seal of its team" } @acme[ 0, 1 ] ], 'an empty seal');
tampered("UPDATE seal SET event_ids = '{}', purged_at = now() WHERE team_id = 'acme' AND seal_id = 1", [ map { "- $_ the event is in no seal of its team" } @acme[ 0, 1 ] ], 'a purge that was none');
tampered("UPDATE seal SET purged_at = now() WHERE team_id = 'acme' AND seal_id = 1; UPDATE event SET reason = 'x' WHERE event_id = $acme[0]", ["1 - $hash"], 'called purged, but still there');
tampered("UPDATE seal SET sealed_at = sealed_at - interval '1 day' WHERE team_id = 'acme' AND seal_id = 3", ["3 - $hash"], 'an earlier seal');
tampered("UPDATE seal SET previous = sha256(previous) WHERE team_id = 'acme' AND seal_id = 2", [ "2 - $hash", "2 - $chain" ], 'another chain');
tampered("UPDATE seal SET previous = sha256 WHERE team_id = 'acme' AND seal_id = 1", [ "1 - $hash", "1 - $chain" ], 'something before the first one');
tampered("UPDATE seal SET team_id = 'globex', seal_id = 4 WHERE team_id = 'acme' AND seal_id = 3",
	[ (map { "4 $_ the event was given to another team" } @acme[ 4, 5 ]), "4 - $chain" ], 'a seal of another team', 'globex');
is(problems($node, $_), '', "$_ is in order again") for qw(acme globex);

# ---- what is not sealed yet is no problem; it is sealed as it is then ----
sql("SET client_min_messages = error; SELECT agentvm.provision('acme')");
is(problems($node, 'acme'), '', 'an unsealed event');
is(sql('SELECT agentvm.seal_audit()'), 1, 'is sealed when asked for');
is(problems($node, 'acme'), '', 'and in order');

# ---- who may ----
make_role($node, 'alice', teams => ['acme']);
make_role($node, 'boss', grants => ['agentvm_admin']);
make_role($node, 'watcher', grants => ['agentvm_monitor']);
is(sql(as_role('alice', "SELECT count(*) FROM agentvm.verify_audit('acme')")), 0, 'a member, for its team');
is(sql(as_role('boss', "SELECT count(*) FROM agentvm.verify_audit('globex')")), 0, 'an administrator, for any');
fails_with($node, as_role('alice', "SELECT * FROM agentvm.verify_audit('globex')"), '42704', qr/team "globex" does not exist/, 'no member of another team');
fails_with($node, as_role($_, "SELECT * FROM agentvm.verify_audit('nobody')"), '42704', qr/team "nobody" does not exist/, 'nor of none') for qw(alice boss);
fails_with($node, as_role('watcher', "SELECT * FROM agentvm.verify_audit('acme')"), '42501', undef, 'nor a monitor');
fails_with($node, 'SELECT * FROM agentvm.verify_audit(NULL)', '22004', qr/team_id/, 'no team at all');
for my $call ('seal_audit()', "purge('1 day')")
{
	fails_with($node, as_role('alice', "SELECT agentvm.$call"), '42501', undef, "$call is not for members");
	psql_ok($node, as_role('boss', "SELECT agentvm.$call"), 'but for administrators');
}
is(sql(as_role('alice', 'SELECT DISTINCT team_id FROM agentvm.event_seal')), 'acme', "members see their team's seals");
is(sql(as_role('alice', q(SELECT count(*) FROM agentvm.event_seal s JOIN agentvm.session_event e ON e.event_id = ANY (event_ids)))), sql("SELECT count(*) FROM agentvm.session_event WHERE team_id = 'acme'"), 'with all that was sealed');
fails_with($node, as_role('alice', 'SELECT * FROM agentvm.event_seal_mark'), '42501', undef, 'but not the mark');
is(recomputed($node, 'acme', 2, options => '-c role=alice'), seal_hash($node, 'acme', 2), 'and compute the hashes themselves');
is(sql('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM agentvm.team; SELECT agentvm.seal_audit() >= 0; COMMIT') =~ s/\s+/ /r, '2 t', 'in a transaction above READ COMMITTED');

done_testing();
