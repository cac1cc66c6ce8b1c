# The launcher: a dispatcher that fails again and again, one that dies or whose database is wanted while it starts, a launcher
# that dies meanwhile. A lock on pg_tablespace holds a dispatcher up after it has connected and before it has taken its
# slot: it has to look up the database's own default_tablespace.
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_node('main', databases => 'postgres, served', conf => "agentvm.sweep_interval = '1h'\nlog_min_messages = log\n");
my $space = PostgreSQL::Test::Utils::tempdir('space');
my $timeout = $PostgreSQL::Test::Utils::timeout_default;
sub sql { return $node->safe_psql('postgres', $_[0]); }
sql("CREATE TABLESPACE space LOCATION '$space'");
sql('CREATE DATABASE served');
create_extension($node, 'served');
my $dispatchers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = 'served'";
my $launcher = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'agentvm launcher'";
my $starting = "SELECT string_agg(pid::text, ' ') FROM pg_locks WHERE relation = 'pg_tablespace'::regclass AND NOT granted";
await($node, $dispatchers, 1, name => 'a dispatcher serves');
sql('ALTER DATABASE served SET default_tablespace = space');
my $locker = AgentVM::Client->new($node);
my $observer = AgentVM::Client->new($node);    # who connects while the lock is held cannot plan a query: this one has what it needs

# As await(), by the observer
sub seen
{
	my ($query, $expected, $name) = @_;
	my $end = time + $timeout;
	my $answer;
	sleep 0.02 until ($answer = $observer->run($query)) eq $expected || time > $end;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is($answer, $expected, $name);
}
$observer->run($_) for $starting, $launcher, $dispatchers, 'SELECT count(*) FROM pg_locks WHERE pid = 0';

# Have a dispatcher begin, and stay in the middle of that; its pid
sub held_up
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$locker->run('BEGIN; LOCK TABLE pg_tablespace IN ACCESS EXCLUSIVE MODE');
	$observer->run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = 'served'");
	seen("SELECT count(*) FROM ($starting) s (pids) WHERE pids IS NOT NULL", 1, "$name: one is starting");
	return $observer->run($starting);
}
sub one_serves
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	await($node, $dispatchers, 1, timeout => $timeout, name => $name);
	return is($node->safe_psql('served', 'SELECT count(*) FROM agentvm.stat_dispatcher'), 1, 'and no other');
}

# one that fails at once, every time: it is tried again at ever longer intervals
my $data = $node->data_dir . '/base/' . sql("SELECT oid FROM pg_database WHERE datname = 'served'");
rename("$data/PG_VERSION", "$data/PG_VERSION.away") or die "could not rename $data/PG_VERSION: $!";
my $offset = -s $node->logfile;
my $failures = sub { my $count = () = slurp_file($node->logfile, $offset) =~ /FATAL:.*is not a valid data directory/g; return $count; };
my $fails = sub { my ($times) = @_; my $end = time + $timeout; sleep 0.05 until $failures->() >= $times || time > $end; return time; };
sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = 'served'");
my $begun = $fails->(1);
cmp_ok($fails->(3) - $begun, '>', 11, 'a dispatcher that fails is tried again 4 s and then 8 s later');
is($failures->(), 3, 'and not in between');
is(sql("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = 'postgres'"), 1, 'another database is served meanwhile');
rename("$data/PG_VERSION.away", "$data/PG_VERSION") or die $!;
my $before = sql($launcher);
sql("SELECT pg_terminate_backend($before)");
await($node, "SELECT count(*) FROM ($launcher) l WHERE pid <> $before", 1, timeout => $timeout, name => 'a new launcher');
one_serves('knows of no failures');

# it dies before it has taken the slot that was kept for it
my $pid = held_up('it dies');
$observer->run("SELECT pg_terminate_backend($pid)");
seen("SELECT count(*) FROM pg_locks WHERE pid = $pid", 0, 'it has gone');
$locker->run('COMMIT');
one_serves('another one is started');

# the launcher dies: the next one knows nothing of it, and starts one of its own
$pid = held_up('the launcher dies');
$before = $observer->run($launcher);
$observer->run("SELECT pg_terminate_backend($before)");
seen("SELECT count(*) FROM ($starting) s (pids) WHERE pids ~ ' '", 1, 'the next launcher starts another one');
isnt($observer->run($launcher), $before, 'it is another launcher');
$locker->run('COMMIT');
await($node, "SELECT count(*) FROM pg_locks WHERE relation = 'pg_tablespace'::regclass", 0, name => 'both begin');
one_serves('one of them takes the slot');
is($node->safe_psql('served', "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'"), 't', 'health knows of the launcher');

# both die: what they had begun is in nobody's way
$pid = held_up('both die');
$before = $observer->run($launcher);
$observer->run("SELECT pg_terminate_backend($before), pg_terminate_backend($pid)");
seen("SELECT count(*) FROM pg_stat_activity WHERE pid = $before", 0, 'both go');
$locker->run('COMMIT');
await($node, "SELECT count(*) FROM ($launcher) l WHERE pid <> $before", 1, timeout => $timeout, name => 'another launcher');
one_serves('and another dispatcher');

# a command wants the database while the dispatcher starts: it waits for it to go, since nobody can tell it before
my $owner = AgentVM::Client->new($node);
held_up('RENAME');
$owner->send('ALTER DATABASE served RENAME TO renamed');
seen('SELECT wait_event_type FROM pg_stat_activity WHERE pid = ' . $owner->pid, 'Extension', 'the command waits');
$locker->run('COMMIT');
$owner->answer;
is($owner->error, '', 'and is done');
cmp_ok($owner->seconds, '<', 5, 'before it gives up');
sql('ALTER DATABASE renamed RENAME TO served');
one_serves('served again');

# whoever held a database and has been killed holds it no more; nor does one who has left a transaction open elsewhere
sql('ALTER DATABASE served RESET default_tablespace');
$owner->run('BEGIN; ALTER DATABASE served RENAME TO renamed');
await($node, $dispatchers, 0, name => 'a held database has none');
sql('SELECT pg_terminate_backend(' . $owner->pid . ')');
one_serves('it is served when the holder has died');

unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
