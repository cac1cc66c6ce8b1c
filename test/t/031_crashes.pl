# The server is killed again and again amid launches and ends: nothing is stuck, nothing leaks, no session gets a second VM
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep);

my $seed = $ENV{AGENTVM_SEED} // int(rand(1_000_000));
srand($seed);
note("AGENTVM_SEED=$seed");

my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.dispatchers = 2\nagentvm.lease = '3s'\nagentvm.launch_settle = '2s'\n");
$faults->set(mode => 'slow', ms => 400, action => 'RunInstances');
$faults->set(mode => 'slow', ms => 150, action => $_) for qw(TerminateInstances DescribeInstances);

my $sessions = 50;
foreach my $round (1 .. 10)
{
	# a few begin, with and without a runtime; one of them is to end while its launch is under way, and one that lives, at whatever stage
	$node->safe_psql('postgres', "SELECT agentvm.provision('acme', profile => CASE WHEN n % 2 = 0 THEN 'plain' END) FROM generate_series(1, $sessions / 10) n");
	sleep rand(0.3);
	$node->safe_psql('postgres', q{SELECT agentvm.terminate(session_id) FROM ((SELECT session_id FROM agentvm.sessions WHERE ended_at IS NULL ORDER BY session_id DESC LIMIT 1)
		UNION (SELECT session_id FROM agentvm.sessions WHERE ended_at IS NULL ORDER BY random() LIMIT 1)) s});
	sleep rand(0.3);
	$node->stop('immediate');
	$node->start;
}
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.sessions'), $sessions, 'no session is lost');

# the runtimes do not report; so a launched VM is as far as those get
my $settled = q{SELECT count(*) FROM agentvm.sessions s WHERE NOT (state IN ('ready', 'terminated') OR state = 'provisioning' AND vm_id IS NOT NULL)};
await($node, $settled, 0, name => 'no session is stuck');
my %expected = map { split /\|/ } split /\n/, $node->safe_psql('postgres', q{SELECT session_id, CASE WHEN state = 'terminated' THEN 'terminated' ELSE 'running' END FROM agentvm.sessions});
my (%vms, %state);
foreach my $vm ($moto->instances) { $vms{ $vm->{tags}{'agentvm-session-id'} }++; $state{ $vm->{tags}{'agentvm-session-id'} } = $vm->{state}; }
is(join(' ', grep { $_ > 1 } values %vms), '', 'no session ever had a second VM');
is(join(' ', sort grep { $state{$_} eq 'running' } keys %state), join(' ', sort grep { $expected{$_} eq 'running' } keys %expected), 'running instances are those of live sessions');
cmp_ok(scalar(grep { $_ eq 'terminated' } values %state), '>=', 2, 'some had been launched and ended');
is($faults->count('RunInstances', 'mismatched'), 0, 'a repeated launch was the same to the byte');
note(join ' ', 'repeats that the cloud saw:', $faults->count('RunInstances', 'replayed'));

$node->safe_psql('postgres', 'SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE ended_at IS NULL');
await($node, q{SELECT count(*) FROM agentvm.sessions WHERE state = 'terminated'}, $sessions, name => 'all end');
is(scalar $moto->running, 0, 'nothing runs');
is($node->safe_psql('postgres', q{SELECT count(*) FROM agentvm.session WHERE lease IS NOT NULL OR next_check_at IS NOT NULL OR handle IS NOT NULL}), 0, 'and nothing is left to do');
unlike(log_text($node), qr/PANIC|TRAP:|terminated by signal (6|11)/, 'no process crashed by itself');
done_testing();
