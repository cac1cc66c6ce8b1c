# Warm VMs: provision() takes one that is what a new one would be, each once, without waiting for anybody; those that nobody takes end
use strict;
use warnings;
use AgentVM::Runtime;
use AgentVM::Test;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "log_min_messages = fatal\n");
$node->safe_psql('postgres', q{SELECT agentvm.create_team(t) FROM unnest('{acme,globex,rush}'::text[]) t; SELECT agentvm.create_profile('shape', 'noop', '{"launch_delay": "1ms"}')});
make_role($node, 'alice', teams => ['acme']);
make_role($node, 'bob', teams => ['globex']);

sub warm
{
	my ($team, @arguments) = @_;
	my $id = $node->safe_psql('postgres', "SELECT agentvm.provision_warm(" . join(', ', literal($team), @arguments) . ")");
	await_state($node, $id, 'warm');
	return $id;
}
sub row { my ($id, $columns) = @_; return $node->safe_psql('postgres', "SELECT $columns FROM agentvm.session WHERE session_id = '$id'"); }
sub ends { my (@ids) = @_; $node->safe_psql('postgres', "SELECT agentvm.terminate(i) FROM unnest('{" . join(',', @ids) . "}'::uuid[]) i"); await_state($node, $_, 'terminated|failed') for @ids; return; }

# ---- one VM, from its launch to its end ----
my $first = $node->safe_psql('postgres', "SET ROLE alice; SELECT agentvm.provision_warm('acme', idle_timeout => '10 minutes')");
is($node->safe_psql('postgres', "SELECT agentvm.wait('$first', 'warm')"), 'warm', 'wait() for it');
is(row($first, 'agent_id IS NULL, tags, created_by, idempotency_key IS NULL, deadline_at - created_at, next_check_at <= deadline_at'), "t|{}|alice|t|00:10:00|t", 'it belongs to no agent, and its deadline is its idle timeout');
fails_with($node, "SELECT agentvm.wait('$first', 'ready', '1 s')", 'AV011', qr/did not become ready/, 'it does not become ready by itself');
fails_with($node, "SELECT agentvm.pause('$first')", 'AV007', qr/is warm and cannot be paused yet/, 'it cannot be paused');
is(provision($node, 'acme', q{agent_id => 'coder', tags => '{"a": 1}', idempotency_key => 'k', max_lifetime => '1 h'}), $first, 'provision() takes it');
is(row($first, q{state, agent_id, tags, created_by = current_user, idempotency_key, warm_key IS NULL, deadline_at BETWEEN now() + interval '59 min' AND now() + interval '1 h'}), 'ready|coder|{"a": 1}|t|k|t|t', 'and makes it its own');
is($node->safe_psql('postgres', "SELECT string_agg(concat_ws(' ', old_state, new_state, reason), ', ' ORDER BY event_id) FROM agentvm.session_event WHERE session_id = '$first' AND kind = 'state'"),
	'provisioning, provisioning warm, warm ready claimed', 'the log tells of it');
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session_hydrating'), 0, 'without a runtime nobody has to fetch anything');
fails_with($node, "SELECT agentvm.wait('$first', 'warm')", '55000', qr/is ready and will never be warm/, 'nobody waits in vain for what is over');
is(provision($node, 'acme', q{agent_id => 'coder', tags => '{"a": 1}', idempotency_key => 'k', max_lifetime => '1 h'}), $first, 'the same key again: the same session');
fails_with($node, q{SELECT agentvm.provision('acme', idempotency_key => 'k')}, 'AV008', undef, 'with other arguments');
isnt(my $cold = provision($node, 'acme'), $first, 'there is none left: the next one boots');
await_state($node, $cold, 'ready');
is($node->safe_psql('postgres', "SELECT agentvm.extend('$first', '1 h') IS NOT NULL, agentvm.terminate('$first')"), 't|t', 'extend() and terminate() as of any other');
await_state($node, $first, 'terminated');
ends($cold);

# the ceiling is that of the session, not of the time that the VM has waited
$node->safe_psql('postgres', q{SELECT agentvm.create_team('short', limits => '{"max_lifetime": "1 hour"}')});
my $waited = warm('short', "idle_timeout => '1 h'");
is(row($waited, 'ceiling_at - created_at'), '02:00:00', 'its own ceiling leaves room for the whole of the session');
is(provision($node, 'short'), $waited, 'taken');
is(row($waited, q{deadline_at = ceiling_at AND deadline_at BETWEEN now() + interval '59 min' AND now() + interval '1 h'}), 't', 'but not more');
fails_with($node, "SELECT agentvm.extend('$waited', '1 min')", 'AV012', undef, 'by no extend()');
my $tired = warm('short', "idle_timeout => '1 h'");
$node->safe_psql('postgres', "UPDATE agentvm.session SET ceiling_at = now() + interval '50 min' WHERE session_id = '$tired'");
isnt(provision($node, 'short'), $tired, 'one that would power itself off before the deadline is not taken');
is(provision($node, 'short', q{max_lifetime => '40 min'}), $tired, 'unless the deadline comes before that');
fails_with($node, q{SELECT agentvm.provision_warm('short', idle_timeout => '61 min')}, 'AV012', qr/idle_timeout is 3660 s, but at most 3600 s/, 'nor does it wait for longer');
fails_with($node, "SELECT agentvm.provision_warm('acme', idle_timeout => $_->[0])", $_->[1], qr/idle_timeout/, "idle_timeout => $_->[0]") for [ 'NULL', '22004' ], [ "'0'", '22023' ];

# ---- which one: of the same team, profile, provider and options; the oldest ----
my %kept = (plain => warm('acme'), shaped => warm('acme', "'shape'"), large => warm('acme', "options => '{\"launch_delay\": \"2ms\"}'"), theirs => warm('globex'));
my $younger = warm('acme');
is($node->safe_psql('postgres', "SET ROLE alice; SELECT agentvm.provision('acme', 'a', 'shape')"), $kept{shaped}, 'the one of the profile');
is($node->safe_psql('postgres', "SET ROLE alice; SELECT agentvm.provision('acme', options => '{\"launch_delay\": \"2ms\"}')"), $kept{large}, 'the one with these options');
is($node->safe_psql('postgres', "SET ROLE alice; SELECT agentvm.provision('acme')"), $kept{plain}, 'the one that has waited longest');
is($node->safe_psql('postgres', "SET ROLE alice; SELECT agentvm.provision('acme')"), $younger, 'then the next one');
my $alone = $node->safe_psql('postgres', "SET ROLE alice; SELECT agentvm.provision('acme')");
isnt($alone, $kept{theirs}, "and none of another team");
fails_with($node, as_role('bob', q{SELECT agentvm.provision_warm('acme')}), '42704', qr/team "acme" does not exist/, 'who is no member makes none');
fails_with($node, as_role('bob', "SELECT agentvm.wait('$kept{shaped}', 'warm')"), 'AV005', undef, 'and sees none');
is($node->safe_psql('postgres', "SET ROLE bob; SELECT string_agg(session_id::text, '') FROM agentvm.sessions"), $kept{theirs}, "but his own team's");
fails_with($node, q{SELECT agentvm.provision_warm('acme', 'nothing')}, '42704', qr/profile "nothing"/, 'a profile that does not exist');
fails_with($node, q{SELECT agentvm.provision_warm('acme', options => '{"nothing": 1}')}, 'AV010', qr/nothing/, 'an option that does not exist');
ends(@kept{qw(plain shaped large theirs)}, $younger, $alone);

# ---- a transaction that takes one ----
my @pair = (warm('acme'), warm('acme'));
my $open = $node->background_psql('postgres', on_error_stop => 0);
is($open->query_safe("BEGIN; SELECT agentvm.provision('acme', 'a')"), $pair[0], 'taken in a transaction');
is($node->safe_psql('postgres', "SELECT state FROM agentvm.sessions WHERE session_id = '$pair[0]'"), 'warm', 'of which nobody knows');
sub at_once { my ($key) = @_; return psql_ok($node, "SET lock_timeout = '2s'; SELECT agentvm.provision('acme', idempotency_key => '$key')", 'somebody waits for nobody'); }
is(at_once('second'), $pair[1], 'and takes the other one');
isnt(my $third = at_once('third'), $pair[0], 'and the next one none');
is($open->query_safe('ROLLBACK; SELECT 1'), 1, 'it is rolled back');
is(row($pair[0], 'state, agent_id IS NULL, warm_key IS NOT NULL'), 'warm|t|t', 'which gives it back');
is(provision($node, 'acme'), $pair[0], 'to whoever comes');
my $again = warm('acme');
$open->query_safe("BEGIN; SAVEPOINT s; SELECT agentvm.provision('acme'); ROLLBACK TO s");
is($open->query_safe("SELECT agentvm.wait('$again', 'warm')"), 'warm', 'so does a savepoint');
is($open->query_safe("SELECT agentvm.provision('acme')"), $again, 'after which it can be had again');
$open->query_safe('COMMIT');
fails_with($node, "BEGIN; SELECT agentvm.wait(agentvm.provision('acme'), 'ready', '1 s')", '55000', qr/could never end/, 'no wait for a cold one of the same transaction');
my $same = warm('acme');
fails_with($node, "BEGIN; SELECT agentvm.provision('acme'); SELECT agentvm.wait('$same', 'ready', '1 s')", '55000', qr/could never end.*COMMIT first/s, 'nor for a warm one: it is not ready for anybody else');
is($node->safe_psql('postgres', "SELECT agentvm.provision('acme'); SELECT agentvm.wait('$same', 'ready', '1 s')"), "$same\nready", 'after its commit it is');

# the same key, at once: one takes a VM and the other gets the same session, whether that one was warm or not
for my $second ('warm', 'cold')
{
	my @ids = map { warm('acme') } $second eq 'warm' ? (1, 2) : ();
	my $one = $open->query_safe("BEGIN; SELECT agentvm.provision('acme', idempotency_key => 'both $second')");
	@ids = (warm('acme')) if $second eq 'cold';
	my $out = '';
	my $other = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "SELECT agentvm.provision('acme', idempotency_key => 'both $second')" ], '<', \undef, '>', \$out);
	await($node, q{SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'provision'}, 1, name => 'the same key in another transaction waits');
	$open->query_safe('COMMIT');
	$other->finish;
	is($out, "$one\n", "and gets the same session ($second)");
	my @left = grep { $_ ne $one } @ids;
	is(row($left[0], 'state, warm_key IS NOT NULL'), 'warm|t', 'the VM that it had chosen is given back');
	is(provision($node, 'acme'), $left[0], 'for the next one');
}
$open->quit;

# ---- a copy of the database has the same rows, but not the VMs ----
my $ours = warm('globex');
$node->safe_psql('postgres', 'UPDATE agentvm.installation SET system_identifier = system_identifier + 1');
isnt(my $copied = provision($node, 'globex'), $ours, 'a copy takes none');
$node->safe_psql('postgres', 'UPDATE agentvm.installation SET system_identifier = system_identifier - 1');
is(provision($node, 'globex'), $ours, 'the original does');

# ---- what it costs: scans of the table and of its indexes, by one provision() ----
sub scans { my ($team) = @_; return $node->safe_psql('postgres', "BEGIN; SELECT FROM agentvm.provision('$team'); SELECT seq_scan, idx_scan FROM pg_stat_xact_all_tables WHERE relid = 'agentvm.session'::regclass; ROLLBACK"); }
is(scans('globex'), '0|1', 'a team without warm VMs: a look into one index');
warm('globex');
is(scans('globex'), '0|3', 'with one: a look, the choice, the row');
ends($copied);

# ---- many at once ----
my $count = 8;
$node->safe_psql('postgres', "SELECT agentvm.provision_warm('rush') FROM generate_series(1, $count)");
await($node, "SELECT count(*) FROM agentvm.sessions WHERE team_id = 'rush' AND state = 'warm'", $count, name => "$count warm VMs");
my $gate = $node->background_psql('postgres');
$gate->query_safe('SELECT pg_advisory_lock(1)');
my @runs = map {
	my $out = '';
	[ IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', 'SELECT pg_advisory_lock_shared(1)', '-c', "SELECT 'got ' || agentvm.provision('rush', 'agent $_')" ], '<', \undef, '>', \$out), \$out ]
} 1 .. 2 * $count;
await($node, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted", 2 * $count, name => 'twice as many claimers are ready');
$gate->query_safe('SELECT pg_advisory_unlock(1)');
$_->[0]->finish for @runs;
my %got;
$got{$_}++ for map { ${ $_->[1] } =~ /got (\S+)/ } @runs;
is(scalar(keys %got), 2 * $count, 'each has a session of his own');
is($node->safe_psql('postgres', "SELECT count(*), count(DISTINCT session_id), count(DISTINCT s.agent_id) FROM agentvm.session_event e JOIN agentvm.session s USING (session_id) WHERE e.team_id = 'rush' AND e.reason = 'claimed'"),
	"$count|$count|$count", 'each VM has been taken once');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.sessions WHERE team_id = 'rush' AND agent_id IS NULL"), 0, 'and none is left');
$gate->quit;

# ---- limits, and those that nobody takes ----
$node->safe_psql('postgres', q{SELECT agentvm.create_team('few', limits => '{"max_sessions": 2}')});
my @few = (warm('few'), warm('few'));
fails_with($node, q{SELECT agentvm.provision_warm('few')}, 'AV003', qr/max_sessions = 2/, 'a warm VM counts');
is(provision($node, 'few'), $few[0], 'but to take one needs no more room');
is(provision($node, 'few'), $few[1], 'nor the next one');
fails_with($node, q{SELECT agentvm.provision('few')}, 'AV003', qr/max_sessions = 2/, 'a new one does');
my $broken = $node->safe_psql('postgres', q{SELECT agentvm.provision_warm('acme', options => '{"fail": "capacity"}')});
await_state($node, $broken, 'failed', name => 'one that cannot be had fails');
isnt(my $whole = provision($node, 'acme', q{options => '{"fail": "capacity"}'}), $broken, 'and is never taken');
my $idle = warm('acme', "idle_timeout => '2 s'");
await_state($node, $idle, 'terminated', name => 'one that nobody takes ends');
is(state_of($node, $idle), 'terminated idle', 'since it is idle');
$node->safe_psql('postgres', q{ALTER SYSTEM SET agentvm.databases = ''});
my $swept = warm('acme', "idle_timeout => '1 h'");
$node->safe_psql('postgres', "UPDATE agentvm.session SET deadline_at = now() WHERE session_id = '$swept'");
isnt(my $late = provision($node, 'acme'), $swept, 'past its idle timeout it is not taken any more');
$node->reload;
$node->poll_query_until('postgres', 'SELECT count(*) = 0 FROM agentvm.stat_dispatcher') or die 'dispatchers';
$node->safe_psql('postgres', "UPDATE agentvm.session SET next_check_at = now() WHERE session_id = '$swept' AND state = 'warm'");
is($node->safe_psql('postgres', 'SELECT agentvm.sweep_lifetime()') . ' ' . row($swept, 'end_reason'), '1 idle', 'sweep_lifetime() ends it, too');

done_testing();
