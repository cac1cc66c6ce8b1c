# A name that takes 20 s to resolve, on a thread of libcurl's: that thread gets no signal, and nobody waits for it
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $cloud = bless { endpoint => 'http://slow.test:9' }, 'AgentVM::Faults';    # there is none
my $timeout = $PostgreSQL::Test::Utils::timeout_default;
chomp(my $libraries = `pg_config --pkglibdir`);
my $library = "$libraries/agentvm_test_names.so";
plan skip_all => 'built for a checker, which has to be preloaded first' if slurp_file($library) =~ /__asan_/;
my $node;
{
	local $ENV{LD_PRELOAD} = $library;
	$node = new_node('main', moto => $cloud, conf => "agentvm.sweep_interval = '1h'\n");
}
sub sql { return $node->safe_psql('postgres', $_[0]); }
my $client = AgentVM::Client->new($node);

sub await_thread
{
	my ($pid, $name) = @_;
	my $end = time + $timeout;
	sleep 0.005 until threads($pid) || time > $end;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	ok(scalar threads($pid), "$name: a thread looks for the name");
	return is(join(' ', map { unblocked($_) } threads($pid)), '', 'with all signals blocked that mean something to PostgreSQL');
}

sql("SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");
ec2_team($node, 'acme', $cloud);

# a backend
$client->send("SELECT agentvm.check_provider('acme')");
await_thread($client->pid, 'check_provider()');
my $started = time;
sql('SELECT pg_cancel_backend(' . $client->pid . ')');
$client->answer;
cmp_ok(time - $started, '<', 1, 'it is cancelled at once');
like($client->error, qr/57014/, 'with the right SQLSTATE');
is($client->run('SELECT 1'), 1, 'and goes on');

# a dispatcher
my $pid = sql('SELECT pid FROM agentvm.stat_dispatcher');
launch($node, 'acme');
await_thread($pid, 'the dispatcher');
sql("SELECT agentvm.create_team('noop')");
$started = time;
is(sql("SELECT agentvm.wait('" . provision($node, 'noop') . "')"), 'ready', 'another session is served meanwhile');
cmp_ok(time - $started, '<', 2, 'at once');
sql('CREATE DATABASE other');
$started = time;
sql('DROP DATABASE other');
cmp_ok(time - $started, '<', 1, 'nobody else waits');
$started = time;
is(sql("SELECT pg_terminate_backend($pid, 10000)"), 't', 'it can be terminated');
cmp_ok(time - $started, '<', 1, 'at once');
unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
