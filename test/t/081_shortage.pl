# Too few worker processes for the dispatchers, or even for the launcher, and too many dispatchers for anybody: it is said
# once in the log and as long as it lasts in view health, what runs goes on, and it passes by itself
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

# the server's own logical replication launcher takes one, ours one
my $node = new_node('main', databases => 'postgres, second', conf => "max_worker_processes = 3\nagentvm.dispatchers = 0\nmax_parallel_workers = 3\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
$node->safe_psql('postgres', 'CREATE DATABASE second');
create_extension($node, 'second');

sub configure { $node->safe_psql('postgres', "ALTER SYSTEM SET $_[0] = '$_[1]'; SELECT pg_reload_conf()"); return; }
sub running { return "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher'" . ($_[0] ? " AND datname = '$_[0]'" : ''); }
# Both at once: dispatchers that are too many leave one by one
sub health
{
	my ($db, $ok, $like, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return await($node, "SELECT ok = '$ok' AND detail ~ '$like' FROM agentvm.health WHERE name = 'dispatcher'", 't', dbname => $db, name => "$name, and health says why")
	  || diag($node->safe_psql($db, "SELECT * FROM agentvm.health WHERE name = 'dispatcher'"));
}
sub log_count { my ($offset, $like) = @_; my $count = () = slurp_file($node->logfile, $offset) =~ /$like/g; return $count; }

# ---- a worker of somebody else's takes the last place ----
health('postgres', 'f', '^0 of 0 .*agentvm\.dispatchers is 0', 'none is wanted');
my $other = AgentVM::Client->new($node);
my $force = $other->run("SELECT name FROM pg_settings WHERE name IN ('force_parallel_mode', 'debug_parallel_query')");
$other->run("SET $force = on");
$other->send('SELECT pg_sleep(600)');
await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'parallel worker'", 1);
my $offset = -s $node->logfile;
configure('agentvm.dispatchers', 1);
health($_, 'f', '^0 of 1 .*max_worker_processes \(3\)', "$_: no dispatcher can be had") for qw(postgres second);
sleep 4;
is(log_count($offset, qr/LOG:  agentvm/), 1, 'the log says it once, for all of them, however often it is tried');
$node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $other->pid . ')');
$other->answer;
await($node, running(), 1, name => 'one starts by itself as soon as there is room', timeout => 20);
my $served = $node->safe_psql('postgres', "SELECT datname FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher'");
my ($lacking) = grep { $_ ne $served } qw(postgres second);
health($served, 't', '^1 of 1 dispatchers serve this database$', 'all is well where it serves');
health($lacking, 'f', '^0 of 1 .*max_worker_processes', 'but not in the other database');
configure('agentvm.databases', $lacking);
health($lacking, 't', '^1 of 1', 'which gets it when the first one is served no more');
health($served, 'f', '^0 of 1 .*see agentvm\.databases$', 'where that is now the reason');

# ---- no place for the launcher itself ----
configure('max_worker_processes', 1);
configure('agentvm.databases', 'postgres, second');
$node->restart;
health('postgres', 'f', 'launcher does not run.*max_worker_processes', 'without a launcher');
my (undef, $session, $warning) = $node->psql('postgres', "SELECT agentvm.provision('acme')");
like($warning, qr/WARNING:  no agentvm dispatcher/, 'a call warns');
psql_ok($node, 'CALL agentvm.dispatch()', 'dispatch() works by hand');
is(state_of($node, $session), 'ready', 'as without workers at all');

# ---- more than there are slots for ----
configure('max_worker_processes', 80);
configure('agentvm.databases', 'postgres');
configure('agentvm.dispatchers', 64);
$node->restart;
await($node, running('postgres'), 64, name => 'as many dispatchers as there can be');
health('postgres', 't', '^64 of 64', 'are no shortage');
$offset = -s $node->logfile;
configure('agentvm.databases', 'postgres, second');
await($node, running($_), 32, name => "two databases share them: $_") for qw(postgres second);
health($_, 'f', '^32 of 64 .*no more than 64', "$_: fewer than asked for") for qw(postgres second);
is(log_count($offset, qr/LOG:  agentvm: no more than 64 dispatchers.*\n.*HINT/), 1, 'the log says it once, with a hint');
configure('agentvm.dispatchers', 1);
health($_, 't', '^1 of 1', "$_: fewer are asked for") for qw(postgres second);
$session = provision($node, 'acme');
await_state($node, $session, 'ready');
unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
