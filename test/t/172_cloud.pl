# test/cloud, which is meant for a real account, against the test cloud: its contract holds there, and whatever happens to the test,
# nothing that it has launched lives on
use strict;
use warnings;
use AgentVM::Faults;
use AgentVM::Moto;
use AgentVM::Process;
use Cwd qw(abs_path);
use File::Basename qw(dirname);
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $cloud = abs_path(dirname(__FILE__) . '/../cloud');
my $python = "$ENV{AGENTVM_VENV}/bin/python";
my $moto = AgentVM::Moto->new;
my $faults = AgentVM::Faults->new($moto);
my $account = $moto->cloud;
my %settings = (
	AGENTVM_VENV => $ENV{AGENTVM_VENV}, AGENTVM_CLOUD_ENDPOINT_URL => $faults->endpoint, AGENTVM_CLOUD_REGION => $account->{region}, AGENTVM_CLOUD_IMAGE_ID => $account->{image_id},
	AGENTVM_CLOUD_ACCESS_KEY_ID => $account->{access_key_id}, AGENTVM_CLOUD_SECRET_ACCESS_KEY => $account->{secret_access_key},
	AGENTVM_CLOUD_SUBNET_IDS => join(',', @{ $account->{subnet_ids} }), AGENTVM_CLOUD_SECURITY_GROUP_IDS => $account->{security_group_ids}[0],
	AGENTVM_CLOUD_LIFETIME => 5, AGENTVM_CLOUD_MINUTES => 5);
# moto sells at any price
$faults->set(mode => 'error', action => 'RunInstances', match => '0.0001', status => 400, code => 'SpotMaxPriceTooLow', message => 'Your Spot request price is too low.');

sub launched { my ($tag) = @_; my ($answer) = $moto->calls([ undef, 'ec2', 'run_instances', { ImageId => $account->{image_id}, InstanceType => 't3.micro', MinCount => 1, MaxCount => 1,
	TagSpecifications => [ { ResourceType => 'instance', Tags => [ { Key => 'agentvm-cluster', Value => $tag } ] } ] } ]); return $answer->{Instances}[0]{InstanceId}; }
sub state_of_vm { my ($id) = @_; return (map { $_->{state} } grep { $_->{id} eq $id } $moto->instances)[0]; }
sub awaited
{
	my ($name, $test) = @_;
	my $end = time + AgentVM::Process::timeout();
	my $seen;
	sleep 0.2 until ($seen = $test->()) || time > $end;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($seen, $name);
}

# ---- without an account ----

my ($code, $out) = (0, '');
{
	local %ENV = map { /^AGENTVM_CLOUD/ ? () : ($_ => $ENV{$_}) } keys %ENV;
	IPC::Run::run([ 'bash', "$cloud/run" ], '<', \undef, '>', \$out, '2>&1');
	is($? >> 8, 2, 'without an account nothing is done');
	like($out, qr/AGENTVM_CLOUD_REGION is not set/, 'and it says what is missing');
}

# ---- the contract ----

my $contract = AgentVM::Process->new('contract', $^X, (map { "-I$_" } @INC), "$cloud/contract.pl");
my $foreign = launched('somebody else');
$contract->start(%settings);
$contract->exits(0, 'the contract holds') or diag($contract->output);
my ($run) = $contract->output =~ /^# this run's tag: agentvm-cluster = ([0-9a-f-]{36})$/m;
cmp_ok(scalar(grep { ($_->{tags}{'agentvm-cluster'} // '') eq $run } $moto->instances), '>', 3, 'it has launched some VMs');
is(join(' ', map { $_->{id} } $moto->running), $foreign, 'none of which lives, and nothing else was ended');
sub watchdogs { return AgentVM::Process::pids(cmdline => qr/aws\.py\0watchdog\0/); }
is(scalar watchdogs(), 0, 'its watchdog has gone');

# ---- a test that is ended in the middle ----

$contract->start(%settings, AGENTVM_CLOUD_LIFETIME => 3600);
awaited('a VM runs', sub { grep { $_->{id} ne $foreign } $moto->running });
my ($watchdog) = watchdogs();
is(readlink "/proc/$watchdog/cwd", '/', 'the watchdog is out of the way of those who clean up');
$contract->signal('TERM');
$contract->exits(255, 'a test that is ended');
is(join(' ', map { $_->{id} } $moto->running), $foreign, 'has ended its VM');
is(scalar watchdogs(), 0, 'and its watchdog');

# ---- a test that is killed ----

my $ours = launched('ours');
my $test = AgentVM::Process->new('test', 'sleep', 600)->start;
my $dog = AgentVM::Process->new('dog', $python, "$cloud/aws.py", 'watchdog', 'ours', 5, $test->pid)->start(%settings);
$dog->says(qr/^watching$/m, 'a watchdog');
$dog->signal($_) for qw(TERM HUP INT);
$faults->set(mode => '500', action => 'TerminateInstances', n => 6);
is(state_of_vm($ours), 'running', 'lets a test do its work');
$test->signal('KILL')->code(10);
$dog->exits(0, 'and ends when that is killed');
is(state_of_vm($ours), 'terminated', 'what it has left behind, also when that takes more than one try');

# ---- a test that takes too long ----

$ours = launched('ours');
$test = AgentVM::Process->new('test', 'sleep', 600)->start;
$dog = AgentVM::Process->new('dog', $python, "$cloud/aws.py", 'watchdog', 'ours', 0.02, $test->pid)->start(%settings);
$dog->exits(0, 'a watchdog whose time is up');
is(state_of_vm($ours), 'terminated', 'ends the VM');
is($test->code(10), 128 + 15, 'and the test');
is(state_of_vm($foreign), 'running', 'and nothing else');
done_testing();
