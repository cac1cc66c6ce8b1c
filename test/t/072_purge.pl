# What is kept no longer: tombstones, events by whole seals, members whose role is gone, dropped teams; by hand and by the dispatcher; and what stays
use strict;
use warnings;
use AgentVM::Audit;
use AgentVM::Client;
use AgentVM::Test;
use Test::More;

my $node = new_node('main', conf => "agentvm.dispatchers = 0\n");
$ENV{PGOPTIONS} = '-c client_min_messages=error';

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub dispatched { return sql('CALL agentvm.dispatch()'); }
sub seals { return sql("SELECT string_agg(seal_id || CASE WHEN purged_at IS NULL THEN ':' || cardinality(event_ids) ELSE '' END, ' ' ORDER BY seal_id) FROM agentvm.event_seal WHERE team_id = '$_[0]'"); }
sub left { return sql("SELECT count(*) FROM agentvm.$_[0] WHERE team_id = '$_[1]'"); }

# A session that has ended, so many days ago, with all its events sealed
sub ended
{
	my ($team, $days, @arguments) = @_;
	my $session = provision($node, $team, @arguments);
	dispatched();
	sql("SELECT agentvm.terminate('$session')");
	dispatched();
	sql("UPDATE agentvm.session SET ended_at = ended_at - interval '$days days' WHERE session_id = '$session'") if $days;
	return $session;
}

# An old event, sealed by itself
sub old_event
{
	my ($team, $session, $days) = @_;
	return sql("INSERT INTO agentvm.session_event (session_id, team_id, at, kind) VALUES ('$session', '$team', now() - interval '$days days', 'test'); SELECT agentvm.seal_audit()");
}

sql("SELECT agentvm.create_team(t) FROM unnest('{acme,globex,gone}'::text[]) t");
sql("SELECT agentvm.create_profile('runtime', 'noop', runtime => true)");

# ---- arguments ----
fails_with($node, "SELECT agentvm.purge('$_')", '22023', qr/older_than must be between/, "older than $_") for '-1 s', '-1 us', '1 day -25 h', '102 years', '-178000000 years', '178000000 years', '-9000000000000 s', '9000000000000 s';
fails_with($node, 'SELECT agentvm.purge(NULL)', '22004', qr/older_than/, 'NULL');
is(sql("SELECT agentvm.purge('$_')"), 0, "nothing is older than $_") for '100 years', '0', '1 mon -1 s';

# ---- tombstones ----
my $old = ended('acme', 10, "idempotency_key => 'k'", "profile => 'runtime'");
my $young = ended('acme', 0);
my $live = provision($node, 'acme', "profile => 'runtime'");
dispatched();
sql("UPDATE agentvm.session SET created_at = now() - interval '1 year' WHERE session_id = '$live'");
# of somebody else's making: no version 7 id, no events
sql("INSERT INTO agentvm.session (session_id, team_id, provider, state, end_reason, ended_at, next_check_at) VALUES ('ffffffff-0000-4000-8000-000000000000', 'acme', 'noop', 'terminated', 'requested', now() - interval '1 year', NULL)");
sql("INSERT INTO agentvm.session_heartbeat (session_id) VALUES ('$old')");
is(provision($node, 'acme', "idempotency_key => 'k'", "profile => 'runtime'"), $old, 'a tombstone knows its key');
my $events = left('session_event', 'acme');
my $holder = AgentVM::Client->new($node);
$holder->run("BEGIN; SELECT FROM agentvm.session WHERE session_id = '$old' FOR UPDATE");
is(sql("SET statement_timeout = '20s'; SELECT agentvm.purge('2 days')"), 1, 'the one that somebody has locked is left, and nobody waited');
$holder->run('COMMIT');
is(sql("SELECT agentvm.purge('2 days')"), 1, 'the next purge takes it');
is(sql("SELECT string_agg(session_id::text, ' ' ORDER BY session_id) FROM agentvm.session"), join(' ', sort $young, $live), 'the others are there');
is(sql("SELECT count(*) FROM agentvm.session_token WHERE session_id = '$live'") . sql("SELECT count(*) FROM agentvm.session_token WHERE session_id = '$old'"), '10', 'its token is gone');
is(sql("SELECT string_agg(session_id::text, ' ') FROM agentvm.session_heartbeat WHERE session_id <> '$live'"), '', 'and its heartbeat');
is(left('session_event', 'acme'), $events, 'no event is that old');
my $again = provision($node, 'acme', "idempotency_key => 'k'", "profile => 'runtime'");
isnt($again, $old, 'the key is forgotten with the tombstone');
fails_with($node, "SELECT agentvm.status('$old')", 'AV005', undef, 'as is the session');

# ---- events ----
my $other = ended('globex', 0);
sql('SELECT agentvm.seal_audit()');
old_event('globex', $_, 30) for $other, $other, $live, $other, $other;
# not sealed yet: purge() does that first
sql("INSERT INTO agentvm.session_event (session_id, team_id, at, kind) VALUES ('$other', 'globex', now() - interval '30 days', 'test')");
is(seals('globex'), '1:4 2:1 3:1 4:1 5:1 6:1', 'old events, one of them of a live session');
is(sql("SELECT agentvm.purge('31 days')"), 0, 'not as old as that');
my $anchor = seal_hash($node, 'globex', 2);
is(sql("SELECT agentvm.purge('25 days')"), 5, 'those that are old enough are gone, but that of the live session');
is(seals('globex'), '1:4 2 3 4:1 5 6 7', 'by whole seals, of which stubs remain');
is(seal_hash($node, 'globex', 2), $anchor, 'with their hashes');
is(problems($node, 'globex'), '', 'what is left is in order');
is(sql("SELECT agentvm.purge('25 days')"), 0, 'and stays');
# of one seal with an event that is younger, or of a live session, all stay
sql("INSERT INTO agentvm.session_event (session_id, team_id, at, kind) SELECT '$other', 'globex', now() - n * interval '1 day', 'test' FROM generate_series(20, 40, 10) n; SELECT agentvm.seal_audit()");
sql("INSERT INTO agentvm.session_event (session_id, team_id, at, kind) SELECT CASE n WHEN 30 THEN uuid '$live' ELSE '$other' END, 'globex', now() - n * interval '1 day', 'test' FROM generate_series(30, 50, 10) n; SELECT agentvm.seal_audit()");
is(sql("SELECT agentvm.purge('25 days')"), 0, 'a seal with a younger event, and one with an event of a live session');
is(sql("SELECT agentvm.purge('15 days')"), 3, 'when all of it is old enough it goes');
is(seals('globex'), '1:4 2 3 4:1 5 6 7 8 9:3', 'that with the live one does not');
# the stubs before the first full seal shrink to the last
sql("SELECT agentvm.purge('0')");
is(seals('globex'), '3 4:1 5 6 7 8 9:3', 'one stub before the first full seal is enough');
is(problems($node, 'globex'), '', 'in order');
is(left('session_event', 'acme') > 0 && left('session', 'acme'), 2, 'live sessions, with their events');
sql('SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE ended_at IS NULL');
dispatched();
is(sql('SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL'), 0, 'they end');
sql("SELECT agentvm.purge('0')");
is(sql('SELECT count(*) FROM agentvm.session_event') . seals('globex') . ' ' . seals('acme') =~ s/\d+/n/r, '09 n', 'then all goes but the last stub of each team');
old_event('globex', $other, 1);
is(seals('globex'), '9 10:1', 'on which the next seal stands');
is(problems($node, 'globex'), '', 'in order');
# a stub that is not the last is evidence as well
is(sql(q{BEGIN; ALTER TABLE agentvm.event_seal DISABLE TRIGGER append_only; UPDATE agentvm.event_seal SET sha256 = sha256(sha256) WHERE purged_at IS NOT NULL;
	SELECT concat_ws(' ', seal_id, problem) FROM agentvm.verify_audit('globex'); ROLLBACK}), '10 the seal does not follow from the one before', 'a stub that was changed');

# ---- members whose role has been dropped ----
sub dead { return sql('SELECT string_agg(DISTINCT team_id, $$ $$ ORDER BY team_id) FROM agentvm.team_member m WHERE NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = m.role)'); }
sub channel { return sql("SELECT channel FROM agentvm.team WHERE team_id = '$_[0]'"); }
make_role($node, $_, teams => [qw(acme globex)]) for qw(stays goes goes_later);
my %channel = map { $_ => channel($_) } qw(acme globex gone);
is(sql("SELECT agentvm.purge('100 years')") . dead() . channel('acme'), "0$channel{acme}", 'as long as all of them are there, nothing changes');
sql('DROP OWNED BY goes; DROP ROLE goes');
is(dead(), 'acme globex', 'the rows of a dropped role');
$holder->run("BEGIN; SELECT FROM agentvm.team WHERE team_id = 'globex' FOR UPDATE");
is(sql("SET statement_timeout = '20s'; SELECT agentvm.purge('100 years')"), 0, 'a purge counts no members, and waits for nobody');
is(dead(), 'globex', 'it sweeps the rows of all teams but one that somebody has locked');
$holder->run('COMMIT');
sql("INSERT INTO agentvm.team_member (team_id, role) SELECT 'globex', n::oid::regrole FROM generate_series(400000000, 400001200) n");
sql("SELECT agentvm.purge('100 years')");
is(dead(), '', 'the next one takes these, however many');
is(sql("SELECT string_agg(concat_ws(' ', team_id, role), ', ' ORDER BY team_id, role::text) FROM agentvm.team_member"), 'acme goes_later, acme stays, globex goes_later, globex stays', 'who has a role stays');
isnt(channel($_), $channel{$_}, "who knew the channel of $_ does not know the new one") for qw(acme globex);
is(channel('gone'), $channel{gone}, 'a team that nobody has left keeps its own');

# ---- many: more than fit into one step of a purge, of sessions and of seals, these all of one moment, or each of its own ----
sql("INSERT INTO agentvm.session (session_id, team_id, provider, state, end_reason, ended_at, next_check_at) SELECT gen_random_uuid(), 'acme', 'noop', 'terminated', 'requested', now() - interval '50 days', NULL FROM generate_series(1, 1200)");
sql("INSERT INTO agentvm.session_event (session_id, team_id, at, kind) SELECT gen_random_uuid(), team || t, now() - interval '50 days' - t * apart, 'test' FROM generate_series(1, 250) t, generate_series(1, 20) e, (VALUES ('many', interval '0'), ('apart', interval '1 s')) k (team, apart)");
sql('SELECT agentvm.seal_audit()');
is(sql("SELECT count(*) >= 250, count(DISTINCT newest_at) FROM agentvm.event_seal WHERE team_id LIKE 'many%'"), 't|1', 'seals of one moment');
cmp_ok(sql("SELECT count(DISTINCT newest_at) FROM agentvm.event_seal WHERE team_id LIKE 'apart%'"), '>=', 250, 'and of different ones');
is(sql("SELECT agentvm.purge('40 days')"), 1200 + 2 * 250 * 20, 'one purge takes away many');
is(sql("SELECT (SELECT count(*) FROM agentvm.session WHERE ended_at < now() - interval '40 days') + (SELECT count(*) FROM agentvm.session_event WHERE at < now() - interval '40 days')"), 0, 'and all');
fails_with($node, "SELECT agentvm.purge('40 days'); DELETE FROM agentvm.session_event", '42501', qr/append-only/, 'after which the log is closed, in the same session, too');

# ---- a dropped team ----
ended('gone', 0);
sql("SELECT agentvm.drop_team('gone')");
fails_with($node, "SELECT agentvm.create_team('gone')", '42710', undef, 'its id is kept');
sql("SELECT agentvm.purge('1 hour')");
fails_with($node, "SELECT agentvm.create_team('gone')", '42710', undef, 'while its history is');
is(sql("SELECT count(*) FROM agentvm.verify_audit('gone')"), 0, 'which can be checked');
# a tombstone that somebody has locked keeps it, too
$holder->run("BEGIN; SELECT FROM agentvm.session WHERE team_id = 'gone' FOR UPDATE");
sql("SELECT agentvm.purge('0')");
is(left('session_event', 'gone') . left('session', 'gone'), '01', 'a tombstone is left');
fails_with($node, "SELECT agentvm.create_team('gone')", '42710', undef, 'and keeps the id');
$holder->run('ROLLBACK');
sql("SELECT agentvm.purge('0')");
is(left($_, 'gone'), 0, "nothing is left in $_") for qw(session session_event event_seal former_team);
psql_ok($node, "SELECT agentvm.create_team('gone')", 'then the id is free');

# ---- one at a time, and in nobody's way ----
ended('acme', 1);
$holder->run("BEGIN; SELECT agentvm.purge('12 hours')");
my $second = AgentVM::Client->new($node);
$second->send("SELECT agentvm.purge('12 hours')");
await($node, "SELECT wait_event_type FROM pg_stat_activity WHERE pid = " . $second->pid, 'Lock', name => 'a second purge waits for the first');
my $new = provision($node, 'acme');
dispatched();
is(state_of($node, $new), 'ready', 'nobody else does');
$holder->run('ROLLBACK');
is($second->answer, '1', 'then it goes on');

# ---- the dispatcher, by agentvm.retention ----
sql("ALTER SYSTEM SET agentvm.dispatchers = 2; SELECT pg_reload_conf()");
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 2);
ended('acme', 20);
await($node, $unsealed, 0);
is(left('session', 'acme'), 2, 'nothing is older than 30 days');
sql("ALTER SYSTEM SET agentvm.retention = '2 s'; SELECT pg_reload_conf()");
await($node, "SELECT string_agg(session_id::text, ' ') FROM agentvm.session", $new, name => 'what has ended goes after 2 s');
await($node, "SELECT count(*) FROM agentvm.event_seal WHERE purged_at IS NULL AND NOT EXISTS (SELECT FROM agentvm.session_event WHERE event_id = ANY (event_ids) AND session_id = '$new')",
	0, name => 'and all seals but those with an event of a live session');
is(state_of($node, $new), 'ready', 'the live session is there');
cmp_ok(left('session_event', 'acme'), '>', 0, 'with its own');
is(problems($node, $_), '', "$_ is in order") for qw(acme globex);
provision($node, 'globex') for 1 .. 20;
sql("SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE ended_at IS NULL");
await($node, 'SELECT count(*) FROM agentvm.session', 0, name => 'sessions come and go');
await($node, 'SELECT count(*) FROM agentvm.session_event', 0, name => 'so does the log');
await($node, "SELECT bool_and(seals <= 1) FROM (SELECT count(*) AS seals FROM agentvm.event_seal GROUP BY team_id) s", 't', name => 'of the seals one stub a team');
is(problems($node, $_), '', "$_ is in order") for qw(acme globex);
$channel{acme} = channel('acme');
sql('DROP OWNED BY goes_later; DROP ROLE goes_later');
await($node, 'SELECT count(*) FROM agentvm.team_member', 2, name => 'members whose role is dropped go, too');
isnt(channel('acme'), $channel{acme}, 'with the name of the channel');
done_testing();
