# The launcher and its dispatchers: how many, where, and what happens when one ends or none can be had
use strict;
use warnings;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

# room for two dispatchers beside the launcher and the server's own logical replication launcher
my $node = new_node('main', conf => "max_worker_processes = 4\nagentvm.sweep_interval = '1h'\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");

sub configure { $node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.$_[0] = '$_[1]'; SELECT pg_reload_conf()"); return; }
sub dispatchers { return "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = '$_[0]'"; }
sub served
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $session = provision($node, 'acme');
	return is($node->safe_psql('postgres', "SELECT agentvm.wait('$session', 'ready', '5 s')"), 'ready', $name);
}

# How many
served('one dispatcher serves');
configure('dispatchers', 2);
await($node, dispatchers('postgres'), 2, name => 'two');
is($node->safe_psql('postgres', 'SELECT string_agg(dispatcher::text, $$ $$ ORDER BY dispatcher) FROM agentvm.stat_dispatcher'), '0 1', 'stat_dispatcher shows both');
served('they serve');
configure('dispatchers', 0);
await($node, dispatchers('postgres'), 0, name => 'none');
my (undef, undef, $warning) = $node->psql('postgres', "SELECT agentvm.provision('acme')");
like($warning, qr/WARNING:  no agentvm dispatcher serves this database.*HINT:.*agentvm\.databases/s, 'provision() warns, with a hint');
configure('dispatchers', 1);
await($node, dispatchers('postgres'), 1, name => 'one again');
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 3, name => 'which begins with what was left');

# Where
$node->safe_psql('postgres', 'CREATE DATABASE second');
create_extension($node, 'second');
configure('databases', 'postgres, second, no_such_database, template1');
await($node, dispatchers('second'), 1, name => 'a database that is added is served');
is($node->safe_psql('second', "SELECT agentvm.create_team('acme'); SELECT agentvm.wait(id) FROM (SELECT 1) x, LATERAL (SELECT NULL::uuid WHERE false) y (id)"), '', 'its extension works');
$node->safe_psql('second', "SELECT agentvm.provision('acme')");
await($node, "SELECT state FROM agentvm.sessions", 'ready', dbname => 'second');
is($node->safe_psql('second', 'SELECT count(*) FROM agentvm.stat_dispatcher'), 1, 'each sees its own dispatchers');
configure('databases', 'second');
await($node, dispatchers('postgres'), 0, name => 'one that is removed is left');
await($node, dispatchers('second'), 1, name => 'the other one stays');
configure('databases', 'postgres');
await($node, dispatchers('postgres'), 1, name => 'and back');
await($node, dispatchers('second'), 0, name => 'at once');
served('which serves');
my ($code, undef, $error) = $node->psql('postgres', q(ALTER SYSTEM SET agentvm.databases = 'a,,b'));
isnt($code, 0, 'a list that is none is refused');

# Out of workers: it is said once, with a hint; what runs goes on
my $offset = -s $node->logfile;
configure('dispatchers', 4);
await($node, dispatchers('postgres'), 2, name => 'two of four can be had');
sleep 3;
my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset);
my $said = () = $log =~ /LOG:  agentvm: could not start a dispatcher/g;
like($log, qr/could not start a dispatcher\n.*HINT:  Consider increasing max_worker_processes/, 'the log says that no worker can be had');
is($said, 1, 'once');
served('the others serve');
configure('dispatchers', 1);
await($node, dispatchers('postgres'), 1, name => 'fewer are wanted');

# One owner of restarts
my $pid = $node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher');
my $launcher = $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'agentvm launcher'");
psql_ok($node, "SELECT pg_terminate_backend($launcher)", 'the launcher ends');
await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm launcher' AND pid <> $launcher", 1, name => 'another one starts');
is($node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher'), $pid, 'the dispatcher goes on meanwhile, and is not doubled');
psql_ok($node, "SELECT pg_terminate_backend($pid)", 'a dispatcher ends');
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE pid <> $pid", 1, name => 'another one starts');
is($node->safe_psql('postgres', dispatchers('postgres')), 1, 'not two');
served('and serves');
unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
