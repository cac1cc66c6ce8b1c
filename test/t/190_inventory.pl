# Truth: VMs that no session has, sessions that have no VM, and what is done about either; nobody else's VM is touched
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Test;
use JSON::PP;
use Test::More;
use Time::HiRes qw(sleep);

my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.orphan_grace = '1h'\n");
sub one { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
my $cluster = one('SELECT installation_id FROM agentvm.installation');
my $foreign = '00000000-0000-4000-8000-000000000000';

# What sweep_inventory() finds; the rows of view drift as "kind vm", of a team or all
sub sweep { my ($team) = @_; return one('SELECT agentvm.sweep_inventory(' . literal($team) . ')'); }
sub drift { my ($vm) = @_; return one("SELECT string_agg(concat_ws(' ', kind, vm_state, session_state, detail), ', ') FROM agentvm.drift WHERE vm_id = '$vm'"); }
# The states of VMs in the cloud
sub states { my %state = map { $_->{id} => $_->{state} } $moto->instances; return join(' ', map { $state{$_} } @_); }

# Instances made behind our back, each with tags without their "agentvm-"
sub made
{
	my @calls = map { my $tags = $_; [ undef, 'ec2', 'run_instances', { ImageId => $moto->options->{image_id}, MinCount => 1, MaxCount => 1, InstanceType => 't3.micro',
		%$tags ? (TagSpecifications => [ { ResourceType => 'instance', Tags => [ map { { Key => "agentvm-$_", Value => $tags->{$_} } } sort keys %$tags ] } ]) : () } ] } @_;
	return map { $_->{Instances}[0]{InstanceId} } $moto->calls(@calls);
}
sub uuid { return one('SELECT gen_random_uuid()'); }

# Another grace; with one of a second all VMs made so far are past it
sub grace
{
	my ($grace) = @_;
	$node->append_conf('postgresql.conf', "agentvm.orphan_grace = '$grace'\n");
	$node->reload;
	await($node, 'SHOW agentvm.orphan_grace', $grace);
	return age() if $grace eq '1s';
	return;
}
sub age { sleep 2.1; return; }    # the cloud tells whole seconds

# Calls that would end a VM
sub ends { my ($vm) = @_; return scalar calls_for($faults, 'TerminateInstances', '', $vm); }

# An answer to the list that is not the cloud's
sub answer
{
	my ($next, @vms) = @_;
	my $items = join '', map { my $vm = $_; "<item><instanceId>$vm->{id}</instanceId><instanceState><code>16</code><name>$vm->{state}</name></instanceState><launchTime>2006-08-25T12:34:56.000Z</launchTime>"
		. ($vm->{code} ? "<stateReason><code>$vm->{code}</code><message>$vm->{message}</message></stateReason>" : '')
		. '<tagSet>' . join('', map { "<item><key>agentvm-$_</key><value>$vm->{tags}{$_}</value></item>" } sort keys %{ $vm->{tags} // {} }) . '</tagSet></item>' } @vms;
	return '<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><reservationSet><item><instancesSet>' . $items . '</instancesSet></item></reservationSet>' . ($next ? "<nextToken>$next</nextToken>" : '') . '</DescribeInstancesResponse>';
}
sub answered { my (@answer) = @_; $faults->set(mode => 'body', action => 'DescribeInstances', match => 'tag:agentvm-cluster', n => 1, body => answer(@answer)); return; }

# ---- all as it should be ----
my ($steady, $second) = map { launch($node, 'acme', 'ready') } 1, 2;
is(sweep(), 0, 'nothing differs');
is(one("SELECT account, provider, region, vms, error, lease FROM agentvm.inventory WHERE listed_at IS NOT NULL"), 'acme|ec2|us-east-1|2||', 'a list was made');
my ($list) = grep { ($_->{args}{'Filter.1.Name'} // '') eq 'tag:agentvm-cluster' } $faults->requests('DescribeInstances');
is($list->{args}{'Filter.1.Value.1'}, $cluster, 'of what carries our uuid');

# ---- VMs that no session knows; those of others; a launch that may be under way ----
$faults->set(mode => 'lost', action => 'RunInstances', n => 1);
$faults->set(mode => 'throttle', action => 'RunInstances');
my $launching = launch($node, 'acme');
await($node, "SELECT handle ? 'sent_at' AND lease IS NULL AND vm_id IS NULL FROM agentvm.session WHERE session_id = '$launching'", 't', name => 'a launch is not answered');
my ($in_flight) = map { $_->{id} } vms_of($moto, $launching);
ok($in_flight, 'but its VM is there');
my $named = uuid();
my ($unknown, $nameless, @others) = made({ cluster => $cluster, 'session-id' => $named, 'team-id' => 'acme', 'agent-id' => 'coder', 'managed-by' => 'agentvm' }, { cluster => $cluster },
	{ cluster => $foreign, 'session-id' => uuid(), 'team-id' => 'acme', 'managed-by' => 'agentvm' }, { 'session-id' => uuid(), 'managed-by' => 'agentvm' }, {}, { cluster => "${cluster}0" });
is(sweep(), 2, 'two VMs are found that no session has');
is(drift($unknown), 'unknown running', 'one whose session is unknown');
is(one("SELECT kind, team_id, session_id, region, quarantined FROM agentvm.drift WHERE vm_id = '$unknown'"), "unknown|acme|$named|us-east-1|f", 'with what its tags say');
is(drift($nameless), 'unknown running', 'one that names none');
one("UPDATE agentvm.vm_drift SET first_seen_at = first_seen_at - interval '2 h'");
sweep();
is(ends($unknown) + ends($nameless), 0, 'they are too young to be ended, by their launch');
my @all = map { { id => column($node, $_, 'vm_id'), state => 'running', tags => { cluster => $cluster, 'session-id' => $_ } } } $steady, $second;
my @old = (@all, { id => $unknown, state => 'running', tags => { cluster => $cluster, 'session-id' => $named } }, { id => $nameless, state => 'running', tags => { cluster => $cluster } });
answered(undef, @old);
one("UPDATE agentvm.vm_drift SET first_seen_at = clock_timestamp() WHERE vm_id = '$nameless'");
sweep();
is(states($unknown, $nameless), 'terminated running', 'one is old enough, the other has only just been seen');
is(drift($unknown), 'unknown running', 'what was ended is told of until a list says so');
is(one("SELECT ended_at IS NOT NULL FROM agentvm.drift WHERE vm_id = '$unknown'"), 't', 'with when it was');
is(one("SELECT kind, reason, detail->>'vm_id', detail->>'error' FROM agentvm.session_event WHERE session_id = '$named'"), "inventory|unknown|$unknown|", 'and the log tells');
grace('1s');
one("UPDATE agentvm.vm_drift SET first_seen_at = first_seen_at - interval '2 h'");
sweep();
is(sweep(), 0, 'nothing is left');
is(states($nameless, @others, $in_flight), 'terminated' . ' running' x 5, 'what carries another uuid or none lives, and so does the VM of the launch');
is(join(' ', map { ends($_) } @others, $in_flight), '0 0 0 0 0', 'nobody has tried to end them');

# the cloud may say what it likes: only our uuid counts
answered(undef, { id => 'i-0f0f0f0f0f0f0f0f0', state => 'running', tags => { cluster => $foreign, 'session-id' => uuid() } }, @all);
is(sweep(), 0, "another installation's VM in the answer is not looked at");
$faults->clear;
hurry_to($node, $launching, 'ready');
is(column($node, $launching, 'vm_id'), $in_flight, 'the launch has got its VM');

# ---- orphans: ended together; one that may not be ended keeps none of the others ----
my @ended = map { launch($node, 'acme', 'ready') } 1 .. 3;
my @vms = map { column($node, $_, 'vm_id') } @ended;
one("BEGIN; UPDATE agentvm.session SET state = 'terminating', end_reason = 'requested', next_check_at = 'infinity' WHERE session_id = '$_';
	UPDATE agentvm.session SET state = 'terminated', ended_at = clock_timestamp(), next_check_at = NULL WHERE session_id = '$_'; COMMIT") for @ended;
grace('1h');
is(sweep(), 3, 'VMs of sessions that have ended');
is(drift($vms[0]), 'orphan running terminated', 'are orphans');
$moto->run('call', 'ec2', 'modify_instance_attribute', qq({"InstanceId": "$vms[1]", "DisableApiTermination": {"Value": true}}));
grace('1s');
my $before = $faults->count('TerminateInstances');
sweep();
is(states(@vms), 'terminated running terminated', 'they are ended, but for one under protection');
is($faults->count('TerminateInstances') - $before, 4, 'by one call, and after its refusal one for each');
like(drift($vms[1]), qr/^orphan running terminated OperationNotPermitted: /, 'that one says why');
like(one("SELECT error FROM agentvm.inventory WHERE account = 'acme'"), qr/^OperationNotPermitted: /, 'and so does the list');
like(one("SELECT detail->>'error' FROM agentvm.session_event WHERE session_id = '$ended[1]' AND kind = 'inventory'"), qr/^OperationNotPermitted: /, 'and the log');
$moto->run('call', 'ec2', 'modify_instance_attribute', qq({"InstanceId": "$vms[1]", "DisableApiTermination": {"Value": false}}));
$before = $faults->count('TerminateInstances');
sweep();
is(states($vms[1]) . ($faults->count('TerminateInstances') - $before), 'terminated1', 'the next list ends it, by one call');
is(sweep() . one("SELECT failures FROM agentvm.inventory WHERE account = 'acme'"), '00', 'and all is well');

# one whose session ended after the list was begun is no orphan
answered(undef, { id => $vms[0], state => 'running', tags => { cluster => $cluster, 'session-id' => $ended[0] } }, map { { id => column($node, $_, 'vm_id'), state => 'running', tags => { cluster => $cluster, 'session-id' => $_ } } } $steady, $second, $launching);
one("UPDATE agentvm.session SET ended_at = 'infinity' WHERE session_id = '$ended[0]'");
is(sweep(), 0, 'what has ended since the list began');
$faults->clear;

# ---- sessions that have lost their VM ----
grace('1h');
my $vm = column($node, $second, 'vm_id');
$moto->terminate($vm);
sweep();
hurry_to($node, $second, 'failed');
like(state_of($node, $second), qr/^failed provider_lost the VM has ended: Client\.UserInitiatedShutdown: /, 'a VM that has ended takes its session with it');
is(one("SELECT reason, detail->>'vm_id' FROM agentvm.session_event WHERE session_id = '$second' AND kind = 'inventory'"), "vm_ended|$vm", 'the log tells');

my $spot = launch($node, 'acme', 'ready');
answered(undef, { id => column($node, $spot, 'vm_id'), state => 'terminated', code => 'Server.SpotInstanceTermination', message => 'Spot instance termination', tags => { cluster => $cluster } },
	map { { id => column($node, $_, 'vm_id'), state => 'running', tags => { cluster => $cluster, 'session-id' => $_ } } } $steady, $launching);
$faults->set(mode => 'body', action => 'DescribeInstances', match => 'instance-id', n => 1, body => answer());
sweep();
hurry_to($node, $spot, 'failed');
is(state_of($node, $spot), 'failed provider_lost spot interruption: Server.SpotInstanceTermination: Spot instance termination', 'an interruption of spot is told apart');
is(one("SELECT reason FROM agentvm.session_event WHERE session_id = '$spot' AND kind = 'inventory'"), 'spot_interruption', 'in the log, too');
$faults->clear;

# not known at all: by two lists, if it was launched a while ago, and nothing is heard of it
my $lost = launch($node, 'acme', 'ready');
my $real = column($node, $lost, 'vm_id');
one("UPDATE agentvm.session SET vm_id = 'i-0123456789abcdef0' WHERE session_id = '$lost'");
sweep();
is(drift('i-0123456789abcdef0'), '', 'a VM that has only just been launched need not be listed yet');
is(drift($real), 'orphan running ready its session has VM i-0123456789abcdef0', 'a second VM of a session is an orphan');
one("UPDATE agentvm.session SET launched_at = now() - interval '1 h' WHERE session_id = '$lost'");
sweep();
is(drift('i-0123456789abcdef0'), 'missing not found ready ', 'it is missed');
is(column($node, $lost, 'state'), 'ready', 'one list is not proof enough');
one("INSERT INTO agentvm.session_heartbeat (session_id, last_heartbeat_at, lost_after) VALUES ('$lost', clock_timestamp(), '1 d')");
sweep() for 1, 2;
is(column($node, $lost, 'state'), 'ready', 'nor are more, if something is heard of it');
one("DELETE FROM agentvm.session_heartbeat WHERE session_id = '$lost'");
sweep();
like(state_of($node, $lost), qr/^(terminating|failed) provider_lost the provider does not know the VM$/, 'then it is lost');
hurry_to($node, $lost, 'failed');

# a VM that somebody has taken the tag from is there all the same
my $untagged = launch($node, 'acme', 'ready');
$vm = column($node, $untagged, 'vm_id');
one("UPDATE agentvm.session SET launched_at = now() - interval '1 h' WHERE session_id = '$untagged'");
$moto->run('call', 'ec2', 'delete_tags', qq({"Resources": ["$vm"], "Tags": [{"Key": "agentvm-cluster"}]}));
sweep() for 1, 2;
is(drift($vm) . column($node, $untagged, 'state'), 'state running ready it carries our tag agentvm-cluster no moreready', 'a VM without its tag');

# stopped by somebody
$vm = column($node, $steady, 'vm_id');
$moto->run('stop-instance', $vm);
sweep();
is(drift($vm), 'state stopped ready', 'states that differ are told');
$moto->run('call', 'ec2', 'start_instances', qq({"InstanceIds": ["$vm"]}));
sweep();
is(drift($vm), '', 'until they do not any more');

# somebody is at the session: only the wish is written
my $held = launch($node, 'acme', 'ready');
$moto->terminate(column($node, $held, 'vm_id'));
my $client = AgentVM::Client->new($node);
my $owner = $client->run('SELECT pg_backend_pid()');
one("UPDATE agentvm.session SET lease = 42, lease_pid = $owner, lease_start = (SELECT backend_start FROM pg_stat_activity WHERE pid = $owner), next_check_at = '2100-01-01 UTC' WHERE session_id = '$held'");
sweep();
is(one("SELECT state, end_reason, lease, next_check_at = '2100-01-01 UTC' FROM agentvm.session WHERE session_id = '$held'"), 'terminating|provider_lost|42|t', 'the lease is its holder\'s');
one("UPDATE agentvm.session SET lease = NULL, next_check_at = now() WHERE session_id = '$held'; SELECT agentvm.wake()");
hurry_to($node, $held, 'failed');

# so many at once that it must be something else
one("INSERT INTO agentvm.session (session_id, team_id, provider, region, vm_id, state, running, launched_at, created_at, next_check_at, deadline_at)
	SELECT gen_random_uuid(), 'acme', 'ec2', 'us-east-1', 'i-0000000000000' || to_char(i, 'FM0000'), 'ready', true, now() - interval '1 h', now() - interval '1 h', now() + interval '1 d', now() + interval '1 d' FROM generate_series(1, 250) i");
sweep() for 1, 2;
is(one("SELECT count(*) FROM agentvm.drift WHERE kind = 'missing'"), 250, 'all of them are asked for, and told of');
is(one("SELECT count(*) FROM agentvm.session WHERE vm_id LIKE 'i-0000000000000%' AND state = 'ready'"), 250, 'but none is ended');
one("DELETE FROM agentvm.session WHERE vm_id LIKE 'i-0000000000000%' AND vm_id > 'i-00000000000000010'");
sweep();
is(one("SELECT count(*) FROM agentvm.session WHERE vm_id LIKE 'i-0000000000000%' AND end_reason = 'provider_lost'"), 10, 'ten are');

# ---- pages ----
answered('more', { id => 'i-00000000000000aaa', state => 'running', tags => { cluster => $cluster } });
answered(undef, { id => 'i-00000000000000bbb', state => 'pending', tags => { cluster => $cluster } });
sweep();
is(drift('i-00000000000000aaa') . drift('i-00000000000000bbb'), 'unknown runningunknown pending', 'a list of two pages');
is(scalar(grep { ($_->{args}{NextToken} // '') eq 'more' } $faults->requests('DescribeInstances')), 1, 'the second asked for by the first');
$faults->clear;
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE session_id = '$steady' AND state = 'ready'"), 1, 'a session that one list lacks goes on');

# a list that fails changes nothing, and shows
$faults->set(mode => $_, action => 'DescribeInstances', n => 1) for qw(500 html truncated);
answered('more', { id => 'i-00000000000000ccc', state => 'running', tags => { cluster => $cluster } });
$faults->set(mode => 'throttle', action => 'DescribeInstances', n => 1);
my $listed = one("SELECT listed_at FROM agentvm.inventory WHERE account = 'acme'");
sweep() for 1 .. 3;
is(one("SELECT failures, error IS NOT NULL, listed_at = '$listed' FROM agentvm.inventory WHERE account = 'acme'"), '3|t|t', 'bad answers are no lists');
like(one("SELECT ok || ' ' || detail FROM agentvm.health WHERE name = 'inventory'"), qr/^false 1 of 1 lists of VMs fail, of which acme in us-east-1: /, 'health says so');
sweep();
is(drift('i-00000000000000ccc'), '', 'half a list is none');
sweep();
is(one("SELECT ok FROM agentvm.health WHERE name = 'inventory'"), 't', 'and all is well again');

# ---- two teams in one account, one of them by a role ----
my $arn = $moto->role('agentvm', 'ec2:*');
ec2_team($node, 'beta', $moto, options => { role_arn => $arn });
make_role($node, $_, teams => [$_]) for qw(acme beta);
($unknown) = made({ cluster => $cluster, 'session-id' => uuid(), 'team-id' => 'beta' });
sweep();
is(one("SELECT string_agg(team_id, ' ') FROM agentvm.drift WHERE vm_id = '$unknown'"), 'beta', 'a VM is told of by the list of its team');
is(join(' ', map { one(as_role($_, "SELECT count(*) FROM agentvm.drift WHERE vm_id = '$unknown'")) } qw(acme beta)), '0 1', 'and seen by its members');
grace('1s');
$before = $faults->count('AssumeRole');
sweep('beta');
is(states($unknown), 'terminated', 'what a role may do, it does');
is($faults->count('AssumeRole') - $before, 1, 'list and end as one');

# ---- the dispatcher does it by itself, and waits for no user ----
grace('1h');
$node->append_conf('postgresql.conf', "agentvm.inventory_interval = '1s'\n");
$client->run('BEGIN');
my ($waiting) = made({ cluster => $cluster, 'session-id' => uuid(), 'team-id' => 'acme' });
$node->reload;
await($node, "SELECT count(*) FROM agentvm.drift WHERE vm_id = '$waiting'", 1, name => 'the dispatcher finds it');
is($client->run("SELECT agentvm.end_vm('$waiting')"), 't', 'somebody has it ended, and leaves his transaction open');
my ($beta) = made({ cluster => $cluster, 'session-id' => uuid(), 'team-id' => 'beta' });
await($node, "SELECT count(*) FROM agentvm.drift WHERE vm_id = '$beta'", 1, name => 'lists of others go on');
is(one("SELECT agentvm.end_vm('$beta')"), 't', 'its VM is to be ended, too');
await($node, "SELECT count(*) FROM agentvm.drift WHERE vm_id = '$beta'", 0, name => 'and is');
is(column($node, launch($node, 'acme', 'ready'), 'state'), 'ready', 'sessions are served');
is(states($waiting, $beta), 'running terminated', 'nothing has come of the other one yet');
$client->run('COMMIT');
await($node, "SELECT count(*) FROM agentvm.drift WHERE vm_id = '$waiting'", 0, name => 'then it is ended, too');
is(one("SELECT agentvm.end_vm('$waiting')"), 'f', 'what is gone cannot be ended');
is(states($waiting, @others) . join('', map { ends($_) } @others), 'terminated' . ' running' x 4 . '0000', "in the cloud, and nobody else's VM was ever touched");
is(column($node, $steady, 'state'), 'ready', 'nor the session that has been there all the time');
unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');
done_testing();
