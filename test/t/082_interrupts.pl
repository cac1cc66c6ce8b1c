# Whoever waits for a provider can be cancelled, timed out and terminated: at once, with the right SQLSTATE, without a trace.
# The death of any process by kill -9 restarts the whole cluster in mid-call, and leaves one VM
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.dispatchers = 0\nagentvm.sweep_interval = '1h'\nrestart_after_crash = on\n");
sub sql { return $node->safe_psql('postgres', $_[0]); }
sub until_true { my ($what) = @_; my $end = time + 60; sleep 0.01 until $what->() || time > $end; return; }

# Event queues, timers and sockets that a process has open
sub fds { my ($pid) = @_; return join(' ', sort grep { /eventpoll|timerfd|socket/ } map { (readlink($_) // '') =~ s/socket:.*/socket/r } glob("/proc/$pid/fd/*")); }

my $vm = launch($node, 'acme');
sql('CALL agentvm.dispatch()');
await_vm($node, $vm);
my $idle = sql("SET client_min_messages = error; SELECT agentvm.create_team('idle', 'noop'); SELECT agentvm.provision('idle', max_lifetime => '10 hours')") =~ s/\s//gr;
sql("UPDATE agentvm.session SET next_check_at = 'infinity' WHERE session_id = '$idle'");

$faults->set(mode => 'slow', ms => 20000);
my %statements = (
	'check_provider()' => [ "SELECT agentvm.check_provider('acme')", 'GetCallerIdentity' ],
	'inspect()'        => [ "SELECT agentvm.inspect('$vm')", 'DescribeInstances' ],
	'dispatch()'       => [ 'CALL agentvm.dispatch()', 'RunInstances' ],
	'wait()'           => [ "SELECT agentvm.wait('$idle')" ],
	'await()'          => [ "CALL agentvm.await('$idle')" ],
	'a block'          => [ "DO \$\$ BEGIN PERFORM agentvm.check_provider('acme'); EXCEPTION WHEN division_by_zero THEN NULL; END \$\$", 'GetCallerIdentity' ],
);

# Begin a statement by way of the code given, with a provider that will not answer in time, and come back when it waits
sub begin
{
	my ($name, $pid, $begin) = @_;
	my ($statement, $action) = @{ $statements{$name} };
	provision($node, 'acme', "profile => 'plain'") if $name eq 'dispatch()';
	my $before = $action ? $faults->count($action) : 0;
	$begin->($statement);
	until_true(sub { $action ? $faults->count($action) > $before : sql("SELECT wait_event = 'Extension' OR wait_event ~ 'Agentvm' FROM pg_stat_activity WHERE state = 'active' AND pid = $pid") eq 't' });
	return;
}

foreach my $name (sort keys %statements)
{
	my $client = AgentVM::Client->new($node);
	my $pid = $client->pid;
	my $fds = fds($pid);
	my $started;

	foreach my $way (qw(cancel timeout))
	{
		$client->run("SET statement_timeout = '700ms'") if $way eq 'timeout';
		begin($name, $pid, sub { $client->send($_[0]) });
		$started = time;
		sql("SELECT pg_cancel_backend($pid)") if $way eq 'cancel';
		$client->answer;
		cmp_ok(time - $started, '<', $way eq 'cancel' ? 1 : 1.7, "$name ends at once: $way");
		like($client->error, $way eq 'cancel' ? qr/ERROR:  57014: canceling statement due to user request/ : qr/ERROR:  57014: canceling statement due to statement timeout/, 'with the right SQLSTATE');
		$client->run('RESET statement_timeout');
	}
	is($client->run("SELECT count(*) > 0 FROM agentvm.health"), 't', 'the session is as well as before');
	is(fds($pid), $fds, 'and has nothing open that it had not');
	$client->quit;

	my ($out, $error) = ('', '');
	my $victim;
	begin($name, "(SELECT max(pid) FROM pg_stat_activity WHERE application_name = 'victim')", sub {
		my @command = ('psql', '-XAtq', '-v', 'VERBOSITY=verbose', '-d', $node->connstr('postgres') . ' application_name=victim', '-c', $_[0]);
		$victim = IPC::Run::start(\@command, '<', \undef, '>', \$out, '2>', \$error);
	});
	$pid = sql("SELECT pid FROM pg_stat_activity WHERE application_name = 'victim'");
	$started = time;
	is(sql("SELECT pg_terminate_backend($pid, 5000)"), 't', "$name: terminated");
	$victim->finish;
	cmp_ok(time - $started, '<', 1, 'at once');
	like($error, qr/FATAL:  57P01: terminating connection due to administrator command/, 'which says so');
}

# ---- the dispatcher: in mid-call, and while it waits for a lock on a whole table ----
$faults->clear;
sql("UPDATE agentvm.session SET next_check_at = 'infinity' WHERE ended_at IS NULL; ALTER SYSTEM SET agentvm.dispatchers = 1; SELECT pg_reload_conf()");
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 1);
my $pid = sql('SELECT pid FROM agentvm.stat_dispatcher');
# of a dispatcher, while it waits: to wait takes one of its own
sub waits { return until_true(sub { sql("SELECT wait_event_type FROM pg_stat_activity WHERE pid = $pid") eq 'Extension' }); }
sub waiting_fds { waits(); return fds($pid) =~ s/ ?socket//gr; }
my $fds = waiting_fds();
$faults->set(mode => 'slow', ms => 1500, action => 'RunInstances');
my $session = launch($node, 'acme');
until_true(sub { sql('SELECT in_flight FROM agentvm.stat_dispatcher') });
my $offset = -s $node->logfile;
sql("SELECT pg_cancel_backend($pid)");
until_true(sub { slurp_file($node->logfile, $offset) =~ /ERROR:  canceling statement/ });
await_vm($node, $session);
is(scalar calls_for($faults, 'RunInstances', $session), 1, 'a dispatcher that is cancelled in mid-call takes the answer all the same');
my $locker = AgentVM::Client->new($node);
$locker->run('BEGIN; LOCK TABLE agentvm.session');
sql('SELECT agentvm.wake()');
await($node, "SELECT wait_event_type FROM pg_stat_activity WHERE pid = $pid", 'Lock');
sql("SELECT pg_cancel_backend($pid)");
await($node, "SELECT wait_event_type FROM pg_stat_activity WHERE pid = $pid", 'Extension', name => 'one that waits for a lock lets go of it');
await($node, "SELECT wait_event_type FROM pg_stat_activity WHERE pid = $pid", 'Lock', name => 'and tries again');
$locker->run('COMMIT');
await_vm($node, launch($node, 'acme'));
is(sql('SELECT pid FROM agentvm.stat_dispatcher'), $pid, 'it is the same dispatcher');
until_true(sub { waiting_fds() eq $fds });
is(waiting_fds(), $fds, 'with the same fds');
$locker->run('BEGIN; LOCK TABLE agentvm.session');
sql('SELECT agentvm.wake()');
await($node, "SELECT wait_event_type FROM pg_stat_activity WHERE pid = $pid", 'Lock');
my $started = time;
is(sql("SELECT pg_terminate_backend($pid, 5000)"), 't', 'one that waits for a lock is terminated');
cmp_ok(time - $started, '<', 1, 'at once');
$locker->quit;

# ---- kill -9 in mid-call: a bystander, the dispatcher, the launcher ----
sql("ALTER SYSTEM SET agentvm.dispatchers = 2; SELECT pg_reload_conf()");
my @sessions;
foreach my $victim ('client backend', 'agentvm dispatcher', 'agentvm launcher')
{
	await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher'", 2, name => 'two dispatchers');
	my $before = $faults->count('RunInstances');
	push @sessions, $session = launch($node, 'acme');
	until_true(sub { $faults->count('RunInstances') > $before });
	my $bystander = AgentVM::Client->new($node);
	my $before_crash = sql('SELECT min(backend_start) FROM pg_stat_activity');
	my $target = $victim eq 'client backend' ? $bystander->pid : sql("SELECT min(pid) FROM pg_stat_activity WHERE backend_type = '$victim'");
	is(kill('KILL', $target), 1, "kill -9 of a $victim");
	await($node, "SELECT min(backend_start) > '$before_crash' FROM pg_stat_activity", 't', name => 'the cluster restarts by itself');
	await($node, "SELECT string_agg(dispatcher::text, ' ' ORDER BY dispatcher) FROM agentvm.stat_dispatcher", '0 1', name => 'with both dispatchers, once each');
	await_vm($node, $session);
	$bystander->{psql}->kill_kill;
	delete $bystander->{psql};
}
is(scalar vms_of($moto, @sessions), 3, 'one VM for each session');
is($faults->count('RunInstances', 'mismatched'), 0, 'the repeats were the same to the byte');
unlike(log_text($node), qr/PANIC|TRAP|signal (6|11)\b/, 'nothing has crashed by itself');

done_testing();
