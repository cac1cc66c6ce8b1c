# From the version before to this one: what a database has afterwards, and that nothing acts in between
use strict;
use warnings;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;

my ($old, $new) = ('0.1', '0.3');
my $node = new_node('main', extension => 0, databases => 'postgres,upgraded');
$node->safe_psql('postgres', 'CREATE EXTENSION agentvm CASCADE; CREATE DATABASE upgraded');
$node->safe_psql('upgraded', "CREATE EXTENSION agentvm VERSION '$old' CASCADE");
is($node->safe_psql('postgres', "SELECT extversion FROM pg_extension WHERE extname = 'agentvm'"), $new, 'a fresh one is the new version');

# ---- the new library with the old SQL: nothing acts, and everybody is told ----
my @up = (dbname => 'upgraded');
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 1, @up, name => 'a dispatcher is there');
my $pid = $node->safe_psql('upgraded', 'SELECT pid FROM agentvm.stat_dispatcher');
# what the old version had in it: a session in the middle of its launch, one that ended, their history, a member
$node->safe_psql('upgraded', <<'SQL');
CREATE ROLE alice IN ROLE agentvm_user;
INSERT INTO agentvm.team (team_id, max_sessions) VALUES ('acme', 5);
INSERT INTO agentvm.team_member (team_id, role) VALUES ('acme', 'alice'::regrole);
INSERT INTO agentvm.session (session_id, team_id, provider, created_by) VALUES ('01900000-0000-7000-8000-000000000001', 'acme', 'noop', 'alice');
INSERT INTO agentvm.session (session_id, team_id, provider, state, end_reason, ended_at, next_check_at) VALUES ('01900000-0000-7000-8000-000000000002', 'acme', 'noop', 'terminated', 'requested', now(), NULL);
INSERT INTO agentvm.session_event (session_id, team_id, kind, new_state) VALUES ('01900000-0000-7000-8000-000000000001', 'acme', 'state', 'provisioning');
-- and VMs that nobody could hear since
INSERT INTO agentvm.session (session_id, team_id, provider, state, running, runtime, created_at, ready_at, next_check_at, deadline_at)
	SELECT ('00000000-0000-7000-8000-00000000000' || i)::uuid, 'acme', 'noop', 'ready', true, true, now() - interval '1 h', now() - interval '1 h', now() + interval '1 d', now() + interval '1 d' FROM generate_series(1, 8) i;
INSERT INTO agentvm.session_heartbeat (session_id, last_heartbeat_at, lost_after) SELECT session_id, ready_at, '4 s' FROM agentvm.session WHERE state = 'ready';
SELECT agentvm.wake();
SQL
# an end without a reason, which the old library let pass
$node->safe_psql('upgraded', <<'SQL');
ALTER TABLE agentvm.session DROP CONSTRAINT session_is_sound;
INSERT INTO agentvm.session (session_id, team_id, provider, state, next_check_at) VALUES ('01900000-0000-7000-8000-000000000003', 'acme', 'noop', 'terminating', 'infinity');
ALTER TABLE agentvm.session ADD CONSTRAINT session_is_sound CHECK (agentvm.session_is_sound(state, end_reason, purchase, ended_at, next_check_at)) NOT VALID;
UPDATE pg_constraint SET convalidated = true WHERE conname = 'session_is_sound';
SQL
await($node, "SELECT ok FROM agentvm.health WHERE name = 'version'", 'f', @up, name => 'health says so');
is($node->safe_psql('upgraded', "SELECT detail FROM agentvm.health WHERE name = 'version'"),
	"the extension is of version $old, the library of version $new: run ALTER EXTENSION agentvm UPDATE, or install the newer library and restart", 'and what to do');
for my $call ("SELECT agentvm.provision('acme')", "SELECT agentvm.terminate('01900000-0000-7000-8000-000000000001')", "SELECT agentvm.create_team('x')", 'CALL agentvm.dispatch()', 'SELECT agentvm.sweep()')
{
	fails_with($node, $call, '55000', qr/extension agentvm is of version \Q$old\E in this database, but its library is of version \Q$new\E/, undef, @up);
}
is($node->safe_psql('upgraded', "SELECT state, lease, next_check_at <= now() FROM agentvm.session WHERE session_id = '01900000-0000-7000-8000-000000000001'"), 'provisioning||t', 'the session that is due waits');
my $before = $node->safe_psql('upgraded', 'SELECT * FROM agentvm.session_event');

# ---- a failed upgrade changes nothing; a real one brings everything to life ----
$node->safe_psql('upgraded', 'BEGIN; ALTER EXTENSION agentvm UPDATE; ROLLBACK');
is($node->safe_psql('upgraded', "SELECT extversion FROM pg_extension WHERE extname = 'agentvm'"), $old, 'an upgrade rolled back');
await($node, "SELECT now() > pg_postmaster_start_time() + interval '5 s'", 't', name => 'the server has been there for longer than VMs may be silent');
my $upgraded = $node->safe_psql('upgraded', 'ALTER EXTENSION agentvm UPDATE; SELECT clock_timestamp()');
await($node, "SELECT state FROM agentvm.session WHERE session_id = '01900000-0000-7000-8000-000000000001'", 'ready', @up, name => 'the launch goes on');
is($node->safe_psql('upgraded', 'SELECT pid FROM agentvm.stat_dispatcher'), $pid, 'in the same dispatcher');
is($node->safe_psql('upgraded', "SELECT state, end_reason FROM agentvm.session WHERE next_check_at = 'infinity'"), 'terminating|requested', 'an end without a reason has one');
is($node->safe_psql('upgraded', 'SELECT * FROM agentvm.session_event ORDER BY event_id LIMIT 1'), $before, 'history is as it was');
await($node, 'SELECT sum(cardinality(event_ids)) = (SELECT count(*) FROM agentvm.session_event) FROM agentvm.event_seal', 't', @up, name => 'and is sealed from its beginning');
is($node->safe_psql('upgraded', 'SET ROLE alice; SELECT count(*) FROM agentvm.sessions'), 11, 'a member is still one');
await($node, "SELECT count(*) FROM agentvm.sessions WHERE end_reason = 'heartbeat_timeout'", 8, @up, name => 'VMs that say nothing after it are lost');
is($node->safe_psql('upgraded', "SELECT min(at) > timestamptz '$upgraded' + interval '3 s' FROM agentvm.session_event WHERE reason = 'heartbeat_timeout'"), 't', 'but they have had their time, from the upgrade on');
my $said = () = log_text($node) =~ /LOG:  agentvm: the extension's version is \Q$old\E, the library's \Q$new\E/g;
is($said, 1, 'the log has told it once');

# ---- the reverse: SQL of a version that this library does not know ----
$node->safe_psql('upgraded', "UPDATE pg_extension SET extversion = '9.9' WHERE extname = 'agentvm'; SELECT agentvm.wake()");
await($node, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 'f', @up, name => 'newer SQL is not served either');
fails_with($node, "SELECT agentvm.provision('acme')", '55000', qr/is of version 9\.9.*install the newer one/s, 'nor called', @up);
$node->safe_psql('upgraded', "UPDATE pg_extension SET extversion = '$new' WHERE extname = 'agentvm'; SELECT agentvm.wake()");

# ---- fresh and upgraded are the same, object by object ----
# Every query gives rows (what, text) that must not depend on OIDs or on the order in which things were made.
my %catalog = (
	members => <<'SQL',
SELECT pg_describe_object(classid, objid, objsubid) FROM pg_depend WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
	AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'agentvm')
SQL
	relations => <<'SQL',
SELECT concat_ws(' ', c.oid::regclass, relkind, relpersistence, relrowsecurity, relforcerowsecurity, relreplident, reloptions, relowner::regrole,
	(SELECT array_agg(a::text ORDER BY a::text) FROM unnest(relacl) a), obj_description(c.oid, 'pg_class')) FROM pg_class c
SQL
	columns => <<'SQL',
SELECT concat_ws(' ', c.oid::regclass, row_number() OVER (PARTITION BY c.oid ORDER BY attnum), attname, format_type(atttypid, atttypmod), attnotnull, attidentity,
	attgenerated, attstorage, attcollation::regcollation, attacl, pg_get_expr(adbin, adrelid), col_description(c.oid, attnum))
FROM pg_class c JOIN pg_attribute a ON attrelid = c.oid LEFT JOIN pg_attrdef ON adrelid = c.oid AND adnum = attnum
SQL
	constraints => "SELECT concat_ws(' ', conrelid::regclass, conname, pg_get_constraintdef(oid), convalidated) FROM pg_constraint c",
	indexes => 'SELECT pg_get_indexdef(c.oid) FROM pg_class c',
	views => 'SELECT pg_get_viewdef(c.oid) FROM pg_class c',
	sequences => 'SELECT concat_ws(\' \', seqrelid::regclass, seqtypid::regtype, seqstart, seqincrement, seqcache) FROM pg_sequence JOIN pg_class c ON c.oid = seqrelid',
	routines => <<'SQL',
SELECT concat_ws(' ', pg_get_functiondef(c.oid), proowner::regrole, (SELECT array_agg(a::text ORDER BY a::text) FROM unnest(proacl) a), obj_description(c.oid, 'pg_proc')) FROM pg_proc c
SQL
	triggers => "SELECT concat_ws(' ', pg_get_triggerdef(t.oid), tgenabled) FROM pg_trigger t JOIN pg_class c ON tgrelid = c.oid WHERE NOT tgisinternal",
	event_triggers => "SELECT concat_ws(' ', evtname, evtevent, evttags, evtenabled, evtfoid::regproc) FROM pg_event_trigger",
	policies => <<'SQL',
SELECT concat_ws(' ', polrelid::regclass, polname, polcmd, polpermissive, (SELECT array_agg(r::regrole::text ORDER BY 1) FROM unnest(polroles) r),
	pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)) FROM pg_policy JOIN pg_class c ON polrelid = c.oid
SQL
	types => "SELECT concat_ws(' ', typname, typtype, typcategory) FROM pg_type c",
	dumped => "SELECT concat_ws(' ', t::regclass, c) FROM pg_extension, unnest(extconfig, extcondition) AS u (t, c) WHERE extname = 'agentvm'",
);
my %in_schema = (relations => 'relnamespace', columns => 'relnamespace', constraints => 'connamespace', indexes => 'relnamespace', views => 'relnamespace', sequences => 'relnamespace',
	routines => 'pronamespace', types => 'typnamespace');
my %only = (columns => 'AND attnum > 0 AND NOT attisdropped', indexes => "AND relkind = 'i'", views => "AND relkind = 'v'", relations => "AND relkind <> 't'", routines => "AND prokind <> 'a'");
for my $what (sort keys %catalog)
{
	my $query = $catalog{$what} . ($in_schema{$what} ? " WHERE $in_schema{$what} = 'agentvm'::regnamespace " . ($only{$what} // '') : '');
	my ($fresh, $upgraded) = map { [ split(/\x1e/, $node->safe_psql($_, "SET search_path = pg_catalog; SELECT string_agg(x, E'\\x1e' ORDER BY x COLLATE \"C\") FROM ($query) AS q (x)")) ] } 'postgres', 'upgraded';
	ok($what eq 'event_triggers' || @$fresh, "there are $what");
	is_deeply($upgraded, $fresh, "$what are the same, upgraded as fresh");
}

done_testing();
