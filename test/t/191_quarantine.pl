# A failover and a takeover: VMs whose rows may have been lost are shown and left alone until somebody decides
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $grace = 2;
my ($primary, $faults, $moto) = ec2_node('primary', init => { allows_streaming => 1 }, conf => "agentvm.orphan_grace = '${grace}s'\nagentvm.inventory_interval = '1s'\n");
my $kept = launch($primary, 'acme', 'ready');
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;
$primary->wait_for_catchup($standby);
await($primary, 'SELECT vms FROM agentvm.inventory', 1, name => 'the primary lists');
sub states { my %state = map { $_->{id} => $_->{state} } $moto->instances; return join(' ', map { $state{$_} } @_); }
sub health { my ($node) = @_; return $node->safe_psql('postgres', "SELECT ok || ' ' || detail FROM agentvm.health WHERE name = 'quarantine'"); }

# ---- launches that never came to the standby, which takes over ----
$standby->stop;
my @lost = map { launch($primary, 'acme', 'ready', $_) } "agent_id => 'coder'", "agent_id => 'x'", "agent_id => 'y'", "agent_id => 'z'";
my @vms = map { column($primary, $_, 'vm_id') } @lost;
$primary->stop('immediate');
$standby->start;
$standby->promote;
my $found = "SELECT count(*) FROM agentvm.drift WHERE kind = 'unknown' AND quarantined AND vm_id IN (" . join(', ', map { "'$_'" } @vms) . ')';
await($standby, $found, 4, name => 'their VMs are unknown to the promoted one, and quarantined');
await($standby, "SELECT min(first_seen_at) < clock_timestamp() - interval '$grace s' - interval '2 s' FROM agentvm.drift", 't', name => 'the grace passes');
is(states(@vms), join(' ', ('running') x 4), 'none is ended');
is($faults->count('TerminateInstances'), 0, 'nor was it tried');
like(health($standby), qr/^false 4 VMs without a session are left alone since 2/, 'health says what to do');
is(column($standby, $kept, 'state'), 'ready', 'what it knows goes on');

# ---- adopted ----
is($standby->safe_psql('postgres', "SELECT agentvm.adopt_vm('$vms[0]')"), $lost[0], 'an unknown VM is adopted by its tags');
is($standby->safe_psql('postgres', "SELECT state, team_id, agent_id, provider, region, vm_id, runtime, purchase, deadline_at > now() + interval '1 h' FROM agentvm.session WHERE session_id = '$lost[0]'"),
	"ready|acme|coder|ec2|us-east-1|$vms[0]|f|spot|t", 'as a session');
is($standby->safe_psql('postgres', "SELECT count(*) FROM agentvm.drift WHERE vm_id = '$vms[0]'"), 0, 'which it now has');
fails_with($standby, "SELECT agentvm.adopt_vm('$vms[0]')", '42704', qr/no VM/, 'once');
is($standby->safe_psql('postgres', "SELECT reason, new_state FROM agentvm.session_event WHERE session_id = '$lost[0]'"), 'adopted|ready', 'the log tells');
await($standby, "SELECT count(*) FROM agentvm.inventory WHERE listed_at > (SELECT ready_at FROM agentvm.session WHERE session_id = '$lost[0]')", 1, name => 'the next list');
is($standby->safe_psql('postgres', "SELECT count(*) FROM agentvm.drift WHERE vm_id = '$vms[0]'"), 0, 'finds nothing amiss');
$standby->safe_psql('postgres', "SELECT agentvm.terminate('$lost[0]')");
hurry_to($standby, $lost[0], 'terminated requested');
is(states($vms[0]), 'terminated', 'it can be ended');

# ---- ended; released ----
is($standby->safe_psql('postgres', "SELECT agentvm.end_vm('$vms[1]')"), 't', 'one is to be ended');
await($standby, "SELECT count(*) FROM agentvm.drift WHERE vm_id = '$vms[1]'", 0, name => 'it is');
is(states(@vms), 'terminated terminated running running', 'alone');
is($standby->safe_psql('postgres', 'SELECT agentvm.release_quarantine()'), 2, 'the others are released');
await($standby, $found =~ s/AND quarantined//r, 0, name => 'and ended');
is(states(@vms), join(' ', ('terminated') x 4), 'in the cloud');
is(health($standby), 'true VMs without a session are ended by themselves', 'health is content');
is($standby->safe_psql('postgres', 'SELECT count(*) FROM agentvm.installation WHERE quarantined_since IS NULL AND timeline = 2'), 1, 'the quarantine is over');

# ---- a takeover; of an account in which all is as it should be it ends by itself ----
$standby->safe_psql('postgres', "UPDATE agentvm.installation SET system_identifier = 1");
await($standby, "SELECT ok FROM agentvm.health WHERE name = 'identity'", 'f', name => 'a copy');
fails_with($standby, "SELECT agentvm.$_", '55000', qr/adopt/, "which does not act: $_") for 'sweep_inventory()', "end_vm('i-1')", "adopt_vm('i-1')", 'release_quarantine()';
my $image = $moto->options->{image_id};
my $cluster = $standby->safe_psql('postgres', 'SELECT installation_id FROM agentvm.installation');
sub made
{
	my %tags = ('agentvm-cluster' => $cluster, @_);
	return $moto->run('call', 'ec2', 'run_instances', encode_json({ ImageId => $image, MinCount => 1, MaxCount => 1, InstanceType => 't3.micro',
		TagSpecifications => [ { ResourceType => 'instance', Tags => [ map { { Key => $_, Value => $tags{$_} } } sort keys %tags ] } ] }))->{Instances}[0]{InstanceId};
}
my $vm = made();
my $session = $standby->safe_psql('postgres', 'SELECT gen_random_uuid()');
my $foreign = made('agentvm-session-id' => $session, 'agentvm-team-id' => 'other');
my $stopped = made('agentvm-session-id' => $session, 'agentvm-team-id' => 'acme');
$moto->run('call', 'ec2', 'stop_instances', encode_json({ InstanceIds => [$stopped] }));
$standby->safe_psql('postgres', "SELECT agentvm.adopt_cluster('takeover')");
await($standby, "SELECT count(*) FROM agentvm.drift WHERE quarantined AND vm_id IN ('$vm', '$foreign', '$stopped')", 3, name => 'a takeover quarantines, too');
fails_with($standby, "SELECT agentvm.adopt_vm('$vm')", '55000', qr/Its tags name no session/, 'a VM that names no session cannot be adopted');
fails_with($standby, "SELECT agentvm.adopt_vm('$foreign')", '55000', qr/Its tags name another team/, 'nor one in the account of another team than it names');
fails_with($standby, "SELECT agentvm.adopt_vm('$stopped')", '55000', qr/It does not run/, 'nor one that is stopped');
await($standby, "SELECT min(first_seen_at) < clock_timestamp() - interval '$grace s' - interval '2 s' FROM agentvm.drift", 't', name => 'the grace passes');
is(states($vm, $foreign, $stopped), 'running running stopped', 'they live');
$standby->safe_psql('postgres', "SELECT agentvm.end_vm('$_')") for $vm, $foreign, $stopped;
await($standby, 'SELECT quarantined_since IS NULL FROM agentvm.installation', 't', name => 'when nothing is left and all lists have been whole, the quarantine ends');
is(states($vm, $foreign, $stopped), 'terminated terminated terminated', 'with its last VM ended');

# ---- a fork: what carries the old uuid is none of ours ----
$vm = made();
$standby->safe_psql('postgres', "SELECT agentvm.adopt_cluster('fork')");
my $at = $standby->safe_psql('postgres', 'SELECT clock_timestamp()');
await($standby, "SELECT count(*) FROM agentvm.inventory WHERE listed_at > timestamptz '$at' + interval '$grace s'", 1, name => 'the fork lists');
is($standby->safe_psql('postgres', 'SELECT count(*) FROM agentvm.drift'), 0, 'and finds nothing');
is(states($vm, column($standby, $kept, 'vm_id')), 'running running', "the original's VMs live");
unlike(log_text($_), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed') for $primary, $standby;
done_testing();
