# kill -9 of the worker at each of the six points of claim, act and record, of a launch and of an end: what the row says then, and that there is one VM
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', init => { allows_streaming => 1 }, conf => <<'CONF');
restart_after_crash = off
agentvm.sweep_interval = '1h'
agentvm.lease = '5min'
CONF
# what a user does goes on while the worker's commits wait
$ENV{PGOPTIONS} = '-c synchronous_commit=local';
$node->safe_psql('postgres', <<'SQL');
CREATE FUNCTION public.stop_here() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$;
SQL
sub sql { return $node->safe_psql('postgres', $_[0]); }
sub until_true
{
	my ($what, $code) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;
	my $true;
	sleep 0.01 until ($true = $code->()) || time > $end;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return $true || fail("$what: in vain");
}
sub worker { return sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher'"); }
sub worker_waits { my ($event, $name) = @_; local $Test::Builder::Level = $Test::Builder::Level + 1; return await($node, "SELECT wait_event FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher'", $event, name => $name); }
my @clients;

# Let the worker stop in the middle of a transaction that changes a row like this
sub stop_before_commit
{
	my ($when) = @_;
	push @clients, my $client = AgentVM::Client->new($node);
	$client->run('SELECT pg_advisory_lock(1)');
	sql("CREATE TRIGGER stop_here AFTER UPDATE ON agentvm.session FOR EACH ROW WHEN ($when) EXECUTE FUNCTION public.stop_here()");
	return;
}

# Let it stop right after its next commit: that waits for a standby that there is none of
sub stop_after_commit
{
	sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'; SELECT pg_reload_conf()");
	push @clients, my $client = AgentVM::Client->new($node);
	$client->run("SET synchronous_commit = on");
	until_true('a commit waits', sub {
		return 1 if $client->busy && sql('SELECT wait_event FROM pg_stat_activity WHERE pid = ' . $client->pid) eq 'SyncRep';
		$client->send('CREATE TEMP TABLE t (); DROP TABLE t') unless $client->busy;
		return 0;
	});
	return;
}

# The worker is killed, and the server ends with it; it starts again without one
sub killed
{
	my ($worker) = @_;
	sql('ALTER SYSTEM SET agentvm.dispatchers = 0; ALTER SYSTEM RESET synchronous_standby_names');
	kill('KILL', $worker) == 1 or die "kill: $!";
	until_true('the server ends', sub { !-e $node->data_dir . '/postmaster.pid' });
	$node->_update_pid(0);
	for (@clients) { $_->{psql}->kill_kill if $_->{psql}; delete $_->{psql}; }
	@clients = ();
	$node->start;
	sql('DROP TRIGGER IF EXISTS stop_here ON agentvm.session');
	return;
}
# The worker is there, has done what it does at its start, and sleeps at least until the end of a lease
sub settled { return await($node, "SELECT sleeping_until > now() + interval '1 min' FROM agentvm.stat_dispatcher", 't', name => 'a worker that sleeps'); }

# The action of the call, what a record of its answer changes in the row, and what then is true of it
my %operation = (
	launch => { action => 'RunInstances', recorded => 'OLD.vm_id IS NULL AND NEW.vm_id IS NOT NULL', has => 'vm_id IS NOT NULL' },
	end => { action => 'TerminateInstances', recorded => 'OLD.ended_at IS NULL AND NEW.ended_at IS NOT NULL', has => 'ended_at IS NOT NULL' });
my @points = (
	{ name => 'before the claim commits', calls => 1, leased => 'false' },
	{ name => 'after the claim has committed, before the call', calls => 1, leased => 'true' },
	{ name => 'the call has been sent, and not yet heard', calls => 2, leased => 'true' },
	{ name => 'the cloud has done it, and the answer is not read', calls => 2, leased => 'true' },
	{ name => 'the answer is read, before the record commits', calls => 2, leased => 'true' },
	{ name => 'after the record has committed', calls => 1, recorded => 1 });
$points[ $_ - 1 ]{number} = $_ for 1 .. 6;

# Let the worker die at that point of an operation which $begin begins; then let another one go on. The calls there were before
sub crash
{
	my ($what, $point, $session, $begin) = @_;
	my $o = $operation{$what};
	my $n = $point->{number};
	my $before = $faults->count($o->{action});
	my $worker = worker();
	my $done = sub { my $runs = grep { $_->{state} eq 'running' } vms_of($moto, $session->()); return $what eq 'launch' ? $runs : !$runs; };

	$faults->set(action => $o->{action}, mode => 'slow', ms => 2000, n => 1) if $n == 3 || $n == 4 || $n == 6;
	stop_before_commit('OLD.lease IS NULL AND NEW.lease IS NOT NULL') if $n == 1;
	stop_after_commit() if $n == 2;
	stop_before_commit($o->{recorded}) if $n == 5;
	$begin->();
	worker_waits('advisory', "$what: it has claimed") if $n == 1;
	worker_waits('SyncRep', "$what: it has committed the claim") if $n == 2;
	until_true('the call is sent', sub { $faults->count($o->{action}) > $before }) if $n > 2;
	worker_waits('advisory', "$what: it has the answer") if $n == 5;
	kill('STOP', $worker) if $n == 3 || $n == 4 || $n == 6;    # it does not come to read the answer
	stop_after_commit() if $n == 6;
	if ($n == 4 || $n == 6)
	{
		until_true('the cloud has done it', $done);
		until_true('and answered', sub { $faults->requests($o->{action}) > $before });
	}
	if ($n == 6)
	{
		kill('CONT', $worker);
		worker_waits('SyncRep', "$what: it has committed the record");
	}
	is($faults->count($o->{action}) - $before, $n < 3 ? 0 : 1, "$what: calls so far");
	killed($worker);

	my $row = sub { sql("SELECT ($_[0])::text FROM agentvm.session WHERE session_id = '" . $session->() . "'") };
	is($row->('lease IS NOT NULL'), $point->{leased}, "$what: whether the row is leased") if $point->{leased};
	is($row->($o->{has}), $point->{recorded} ? 'true' : 'false', "$what: whether the answer is on the row");
	is($row->("coalesce(handle ? 'form', false)"), $n > 1 ? 'true' : 'false', 'what is to be sent is on the row before it is sent') if $what eq 'launch' && $n < 6;
	ok($done->(), "$what: the cloud has done it") if $n > 3;
	sql('ALTER SYSTEM RESET agentvm.dispatchers; SELECT pg_reload_conf()');
	return $before;
}

sub check_calls
{
	my ($what, $point, $before) = @_;
	is($faults->count($operation{$what}{action}) - $before, $point->{calls}, "$what, $point->{name}: $point->{calls} calls in all");
	$faults->clear;
	return;
}

foreach my $point (@points)
{
	my $session;
	settled();
	my $before = crash('launch', $point, sub { $session }, sub { $session = launch($node, 'acme') });
	await_state($node, $session, 'ready');
	check_calls('launch', $point, $before);
	my %bodies;
	foreach my $call (calls_for($faults, 'RunInstances', $session)) { $bodies{ join '&', map { "$_=$call->{args}{$_}" } sort keys %{ $call->{args} } }++; }
	is(scalar keys %bodies, 1, "launch, $point->{name}: the same token and the very same bytes");
	is(join(' ', map { $_->{id} } vms_of($moto, $session)), column($node, $session, 'vm_id'), "launch, $point->{name}: one VM, which the row names");

	settled();
	$before = crash('end', $point, sub { $session }, sub { sql("SELECT agentvm.terminate('$session')") });
	await_state($node, $session, 'terminated');
	settled();
	check_calls('end', $point, $before);
	is(join(' ', map { $_->{state} } vms_of($moto, $session)), 'terminated', "end, $point->{name}: the VM is gone");
	is(sql("SELECT string_agg(new_state, ' ' ORDER BY event_id) FROM agentvm.session_event WHERE session_id = '$session' AND kind = 'state'"), 'provisioning ready terminating terminated', "end, $point->{name}: each change is in the log once");
}
is($faults->count('RunInstances', 'mismatched'), 0, 'no token was ever used with other parameters');
is(scalar $moto->running, 0, 'nothing runs');
unlike(log_text($node), qr/PANIC|TRAP:|terminated by signal (6|11)/, 'no process crashed by itself');
done_testing();
