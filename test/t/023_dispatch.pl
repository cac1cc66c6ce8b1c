# CALL agentvm.dispatch() in a server that does not preload the library: the same engine, by hand
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my $faults = AgentVM::Faults->new;
my $node = new_node('main', preload => undef, moto => $faults);
$node->safe_psql('postgres', "ALTER SYSTEM SET default_transaction_isolation = 'serializable'; ALTER SYSTEM SET default_transaction_read_only = on; SELECT pg_reload_conf()");
await($node, 'SHOW default_transaction_read_only', 'on');
my $rw = 'SET default_transaction_read_only = off;';

sub sql { return $node->safe_psql('postgres', "$rw\n$_[0]"); }
sub dispatch { return $node->safe_psql('postgres', 'CALL agentvm.dispatch(' . ($_[0] // '') . ')'); }

sql("SELECT agentvm.create_team('acme'); SELECT agentvm.create_team('cloud', 'ec2'); SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");
sql("SET log_statement = none; SELECT agentvm.set_provider('cloud', 'ec2', " . json($faults->options) . ', ' . json($faults->secrets) . ')');

# What the engine's transactions are, by a trigger
sql(<<'SQL');
CREATE TABLE level (level text);
CREATE FUNCTION note_level() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.level VALUES (current_setting('transaction_isolation')); RETURN NULL; END $$;
CREATE TRIGGER note_level AFTER UPDATE ON agentvm.session FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION note_level();
SQL

# The life of a session
my ($code, $session, $warning) = $node->psql('postgres', "$rw SELECT agentvm.provision('acme')");
like($warning, qr/WARNING:  no agentvm dispatcher serves this database/, 'provision() warns');
like($warning, qr/HINT:.*shared_preload_libraries.*CALL agentvm\.dispatch\(\)/, 'with a hint');
is(state_of($node, $session), 'provisioning', 'nothing happens by itself');
my $waiter = AgentVM::Client->new($node);
$waiter->send("SELECT agentvm.wait('$session')");
is(dispatch(), 1, 'dispatch() handles it, in a server whose transactions are serializable and read-only by default');
is($waiter->answer, 'ready', 'wait() sees it');
is($node->safe_psql('postgres', 'SELECT DISTINCT level FROM level'), 'read committed', 'having worked at READ COMMITTED');
sql('DROP TRIGGER note_level ON agentvm.session');
is(dispatch(), 0, 'nothing is left to do');
sql("SELECT agentvm.terminate('$session')");
is(dispatch(), 1, 'dispatch() ends it');
is(state_of($node, $session), 'terminated requested', 'terminated');
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.stat_dispatcher'), 0, 'stat_dispatcher is empty');
is($node->safe_psql('postgres', "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'"), 'f', 'health says what is missing');

# Who may call it, and from where
fails_with($node, "BEGIN; CALL agentvm.dispatch();", '25001', qr/HINT:.*autocommit/, 'not in a transaction block');
my $block = 'DO $$ DECLARE handled int; BEGIN CALL agentvm.dispatch(10, handled); END $$;';
psql_ok($node, $block, 'but from PL/pgSQL');
fails_with($node, "BEGIN; $block", '25001', qr/autocommit/, 'unless that is in one');
fails_with($node, 'CALL agentvm.dispatch(0)', '22023', qr/max_sessions/, 'max_sessions must be positive');
$node->safe_psql('postgres', "$rw CREATE ROLE alice; GRANT agentvm_user TO alice; CREATE ROLE boss; GRANT agentvm_admin TO boss");
fails_with($node, as_role('alice', 'CALL agentvm.dispatch()'), '42501', qr/permission denied/, 'agentvm_user may not call it');
psql_ok($node, as_role('boss', 'CALL agentvm.dispatch()'), 'agentvm_admin may');

# While it waits for an answer it pins nothing
$faults->set(mode => 'canned', ms => 1500, action => 'RunInstances');
$session = sql("SELECT agentvm.provision('cloud', profile => 'plain')");
my $worker = AgentVM::Client->new($node);
$worker->send('CALL agentvm.dispatch()');
await($node, "SELECT lease IS NOT NULL FROM agentvm.session WHERE session_id = '$session'");
is($node->safe_psql('postgres', "SELECT concat_ws(' ', backend_xmin, backend_xid) FROM pg_stat_activity WHERE pid = " . $worker->pid), '', 'it holds no snapshot while it waits');
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_locks WHERE pid = " . $worker->pid . " AND locktype <> 'virtualxid'"), 0, 'and no lock');
is($worker->answer, 1, 'it returns when the call is answered');
is(state_of($node, $session), 'ready', 'having recorded it');

# It can be cancelled in mid-call; the lease of a backend that has gone is taken over at once, with the same token
$session = sql("SELECT agentvm.provision('cloud', profile => 'plain')");
$worker->send('CALL agentvm.dispatch()');
await($node, "SELECT lease IS NOT NULL FROM agentvm.session WHERE session_id = '$session'");
my $started = time;
$node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $worker->pid . ')');
$worker->answer;
like($worker->error, qr/57014/, 'dispatch() can be cancelled');
cmp_ok(time - $started, '<', 1, 'at once');
is(dispatch(), 0, 'the backend lives, so its lease stands');
$worker->quit;
await($node, 'SELECT count(*) FROM pg_stat_activity WHERE pid = ' . $worker->{pid}, 0);
is(dispatch(), 1, 'it has gone, so its lease is void');
is(state_of($node, $session), 'ready', 'launched');
my %tokens = map { $_->{args}{ClientToken} => 1 } calls_for($faults, 'RunInstances', $session);
is(scalar keys %tokens, 1, 'with one token');

# Several share the work; a limit is a limit, and all that is due is done although a team has a cap
$faults->reset;
$faults->set(mode => 'canned', ms => 100);
sql("SELECT agentvm.provision('cloud', profile => 'plain') FROM generate_series(1, 60)");
is(dispatch(10), 10, 'no more than max_sessions');
my @workers = map { AgentVM::Client->new($node) } 1 .. 4;
$_->send('CALL agentvm.dispatch(1000)') for @workers;
my @handled = map { $_->answer } @workers;
my $sum = 0;
$sum += $_ for @handled;
is($sum, 50, "four callers share the others (@handled)");
is($faults->count('RunInstances'), 60, 'each is launched once');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE state = 'ready' AND team_id = 'cloud' AND lease IS NULL"), 62, 'all are ready');
$node->safe_psql('postgres', "LOAD 'agentvm'; ALTER SYSTEM SET agentvm.max_in_flight_per_team = 3; SELECT pg_reload_conf()");
sql("SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE state = 'ready'");
cmp_ok(dispatch(1000), '>=', 62, 'one caller does all that is due, three calls at a time');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.sessions WHERE state <> 'terminated'"), 0, 'nothing is left');

done_testing();
