# A runner over many calls: its memory, its descriptors and its threads stay what they are
use strict;
use warnings;
use AgentVM::Blocking;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => AgentVM::Blocking::conf() . "agentvm.max_in_flight_per_team = 64\n");
my $blocking = AgentVM::Blocking->new($node);
sub sql { return $node->safe_psql('postgres', @_); }
sql("SELECT agentvm.create_team('acme'); SELECT agentvm.set_provider('acme', 'blocking', '{}')");
$blocking->await_runner('pid > 0', 'a runner serves the database');
my $pid = $blocking->runner('pid');

sub status { my ($field) = @_; my ($value) = slurp_file("/proc/$pid/status") =~ /^\Q$field\E:\s+(\d+)/m; return $value; }
# of the pool: PostgreSQL opens one more while it waits
sub descriptors { my @fds = grep { (readlink($_) // '') =~ /eventfd|timerfd/ } glob("/proc/$pid/fd/*"); return scalar @fds; }

# 2 calls for each session, and one for each question
sub round
{
	my ($sessions, $questions) = @_;
	my $done = sql("SELECT count(*) FROM agentvm.sessions WHERE state = 'terminated'");
	sql("SELECT count(*) FROM (SELECT agentvm.provision('acme', " . join(', ', $blocking->with()) . ") FROM generate_series(1, $sessions)) p");
	await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", $sessions, name => "$sessions are ready");
	sql("SELECT count(*) FROM (SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE state = 'ready') t");
	await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'terminated'", $done + $sessions, name => 'and ended');
	sql("SELECT count(agentvm.check_provider('acme', 'blocking')) FROM generate_series(1, $questions)");
	return;
}
round(200, 50);
my ($memory, $descriptors) = (status('RssAnon'), descriptors());
cmp_ok(status('Threads'), '<=', 65, 'no more threads than the pool may have');
round(500, 500) for 1 .. 2;
is($blocking->runner('pid'), $pid, 'the same runner');
is(descriptors(), $descriptors, 'as many descriptors after 3000 calls');
cmp_ok(status('Threads'), '<=', 65, 'no more threads');
my $growth = status('RssAnon') - $memory;
note("resident memory: $memory kB, $growth kB more after 3000 calls");
SKIP:
{
	skip 'a checker keeps what was freed', 1 if slurp_file("/proc/$pid/maps") =~ /libasan/;
	cmp_ok($growth, '<', 2048, 'its memory stays what it was');
}

# ---- no room for its process: health says so ----
$node->safe_psql('postgres', 'ALTER SYSTEM SET max_worker_processes = 4; ALTER SYSTEM SET max_parallel_workers = 0');
$node->restart;
await($node, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 't', name => 'the dispatcher comes first');
await($node, "SELECT detail FROM agentvm.health WHERE name = 'runner'", 'a runner serves this database', name => 'with room for one of the server, launcher, dispatcher and runner');
$node->safe_psql('postgres', 'ALTER SYSTEM SET max_worker_processes = 3');
$node->restart;
await($node, "SELECT ok || ' ' || detail FROM agentvm.health WHERE name = 'runner'", 'false no runner serves this database: max_worker_processes (3) leaves no room for one', name => 'without');
await($node, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 't', name => 'the dispatcher still comes first');
like(log_text($node), qr/could not start a runner/, 'the log says it, too');
done_testing();
