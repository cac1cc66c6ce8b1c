# What an instance is launched as, and what its user data does when it boots
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use IPC::Run qw(run);
use MIME::Base64;
use PostgreSQL::Test::Utils;
use Test::More;

my $certificate = "-----BEGIN CERTIFICATE-----\n" . encode_base64(join('', map { chr($_ % 251) } 1 .. 900)) . "-----END CERTIFICATE-----\n";
my $ca = PostgreSQL::Test::Utils::tempdir('ca') . '/ca.pem';
append_to_file($ca, $certificate);
my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.gateway_ca_file = '$ca'\n");

# ---- the instance ----
ec2_team($node, 'full', $moto, options => { instance_profile => 'agentvm-vm', volume_size_gib => 33, volume_device => '/dev/xvda', key_name => 'ops', spot_max_price => '0.05' });
$moto->run('call', 'ec2', 'create_key_pair', '{"KeyName": "ops"}');
my $session = launch($node, 'full', 'ready', "agent_id => 'coder é'");
my ($vm) = vms_of($moto, $session);
my $cluster = $node->safe_psql('postgres', 'SELECT installation_id FROM agentvm.installation');
my %tags = (
	Name => "agentvm-$session", 'agentvm-session-id' => $session, 'agentvm-team-id' => 'full', 'agentvm-agent-id' => "coder \x{e9}",
	'agentvm-managed-by' => 'agentvm', 'agentvm-cluster' => $cluster);
is_deeply($vm->{tags}, \%tags, 'tags of the instance');
my ($details) = map { @{ $_->{Instances} } } @{ $moto->run('call', 'ec2', 'describe_instances', qq({"InstanceIds": ["$vm->{id}"]}))->{Reservations} };
is($details->{SecurityGroups}[0]{GroupId}, $moto->options->{security_group_ids}[0], 'security group');
like($details->{IamInstanceProfile}{Arn}, qr/agentvm-vm$/, 'instance profile');
is($details->{KeyName}, 'ops', 'key pair');
is($details->{InstanceType}, $moto->options->{instance_type}, 'type');
my ($volume) = @{ $moto->run('call', 'ec2', 'describe_volumes', qq({"Filters": [{"Name": "attachment.instance-id", "Values": ["$vm->{id}"]}]}))->{Volumes} };
is($volume->{Size}, 33, 'size of the volume');
is_deeply({ map { $_->{Key} => $_->{Value} } @{ $volume->{Tags} } }, \%tags, 'tags of the volume');
my ($call) = calls_for($faults, 'RunInstances', $session);
my %asked = (
	'MetadataOptions.HttpTokens' => 'required', 'MetadataOptions.HttpPutResponseHopLimit' => 1, InstanceInitiatedShutdownBehavior => 'terminate',
	MinCount => 1, MaxCount => 1, 'BlockDeviceMapping.1.DeviceName' => '/dev/xvda', 'BlockDeviceMapping.1.Ebs.Encrypted' => 'true',
	'BlockDeviceMapping.1.Ebs.DeleteOnTermination' => 'true', 'InstanceMarketOptions.SpotOptions.MaxPrice' => '0.05');
is($call->{args}{$_}, $asked{$_}, "$_ = $asked{$_}") for sort keys %asked;

# without a word about it: the AMI's volume
$session = launch($node, 'acme', 'ready', "agent_id => repeat('ü', 60)");
($call) = calls_for($faults, 'RunInstances', $session);
is(scalar(grep { /^BlockDevice|^KeyName|^IamInst/ } keys %{ $call->{args} }), 0, 'what is not configured is not asked for');
my $script = decode_base64($call->{args}{UserData});
like($script, qr/^payload=''$/m, 'no runtime: no payload');
like($script, qr/shutdown -P/, 'but the power-off');
psql_ok($node, q{SELECT agentvm.create_profile('sized', 'ec2', runtime => false, disk_gib => 44)});
$session = launch($node, 'acme', 'ready', "profile => 'sized'");
is((calls_for($faults, 'RunInstances', $session))[0]{args}{'BlockDeviceMapping.1.Ebs.VolumeSize'}, 44, "disk_gib of the profile is the volume's size");

# ---- user data with a runtime ----
$session = provision($node, 'acme', "max_lifetime => '1 hour'");
await($node, "SELECT vm_id IS NOT NULL FROM agentvm.sessions WHERE session_id = '$session'");
($call) = calls_for($faults, 'RunInstances', $session);
$script = decode_base64($call->{args}{UserData});
cmp_ok(length $script, '<', 16384, 'user data below 16 KiB');
unlike($script, qr/\Q$session\E/, 'all values are inside the payload');

# what the runtime is told of what the VM is for
for my $mode (qw(session warm))
{
	my $vm = $mode eq 'session' ? $session : $node->safe_psql('postgres', "SELECT agentvm.provision_warm('acme')");
	await($node, "SELECT vm_id IS NOT NULL FROM agentvm.sessions WHERE session_id = '$vm'");
	my ($payload) = decode_base64((calls_for($faults, 'RunInstances', $vm))[0]{args}{UserData}) =~ /^payload='(.*)'$/m;
	like(decode_base64($payload), qr/^AGENTVM_MODE=$mode$/m, "AGENTVM_MODE=$mode");
}

# run it as the VM would, with /etc and the commands of the system replaced
my $box = PostgreSQL::Test::Utils::tempdir('vm');
mkdir "$box/bin";
foreach my $command (qw(shutdown systemctl poweroff nohup))
{
	append_to_file("$box/bin/$command", "#!/bin/bash\necho $command \"\$*\" >>$box/ran\n");
	chmod 0755, "$box/bin/$command";
}
my $payload = $script =~ /^payload='(.*)'$/m ? decode_base64($1) : '';
my $encoded = encode_base64($payload =~ s{ /etc/agentvm}{ $box/etc/agentvm}gr, '');
my $here = $script =~ s{^payload='.*'$}{payload='$encoded'}mr =~ s{/etc/agentvm|/var/lib/cloud}{$box$&}gr =~ s{mkdir -p }{mkdir -p $box/var/lib/cloud/scripts/per-boot }r;
my $now = time;
{
	local $ENV{PATH} = "$box/bin:$ENV{PATH}";
	my $error;
	ok(run([ 'bash', '-euo', 'pipefail', '-c', $here ], '<', \undef, '>', '/dev/null', '2>', \$error), 'the script runs') or diag $error;
	is($error, '', 'without a complaint');
}
my $env = slurp_file("$box/etc/agentvm/runtime.env");
my %value = map { split /=/, $_, 2 } split /\n/, $env;
is($value{AGENTVM_SESSION_ID}, $session, 'runtime.env: the session');
is($value{AGENTVM_GATEWAY_URL}, 'https://gateway.example', 'runtime.env: the gateway');
like($value{AGENTVM_BOOTSTRAP_TOKEN}, qr/^[0-9a-f]{64}$/, 'runtime.env: the bootstrap token');
is($value{AGENTVM_CA_FILE}, '/etc/agentvm/gateway-ca.pem', 'runtime.env: where the authority is');
is("$value{AGENTVM_HEARTBEAT_INTERVAL} $value{AGENTVM_DEADLINE_GRACE} $value{AGENTVM_DEADMAN_ALLOWANCE}", '30 300 900', 'runtime.env: the times');
is(slurp_file("$box/etc/agentvm/gateway-ca.pem"), $certificate, 'the authority arrives as it was');
is(sprintf('%04o', (stat "$box/etc/agentvm/$_")[2] & 07777), '0600', "$_ is for root only") for qw(runtime.env gateway-ca.pem);
is(sprintf('%04o', (stat "$box/etc/agentvm")[2] & 07777), '0700', 'so is the directory');
my ($minutes) = slurp_file("$box/ran") =~ /^shutdown -P \+(\d+)$/m;
ok($minutes >= 24 * 60 + 5 - 1 && $minutes <= 24 * 60 + 5 + 1, 'power-off at the ceiling of the lifetime (24 h) and 5 min of grace') or diag $minutes;
ok(-x "$box/var/lib/cloud/scripts/per-boot/agentvm-hard-stop", 'armed again at every boot');
like(slurp_file("$box/ran"), qr/^nohup sh -c sleep \d+; systemctl poweroff -f/m, 'and by force should that hang');
like(slurp_file("$box/ran"), qr/^systemctl restart --no-block agentvm-runtime.service$/m, 'the runtime is started');

# a clock that is years behind or ahead does not move the end far away, or into the past
foreach my $then ($now - 86400 * 900, $now + 86400 * 900)
{
	unlink "$box/ran";
	append_to_file("$box/bin/date", "#!/bin/bash\necho $then\n");
	chmod 0755, "$box/bin/date";
	local $ENV{PATH} = "$box/bin:$ENV{PATH}";
	run([ 'bash', "$box/etc/agentvm/hard-stop.sh" ]);
	unlink "$box/bin/date";
	($minutes) = slurp_file("$box/ran") =~ /^shutdown -P \+(\d+)$/m;
	ok($minutes >= 1 && $minutes <= 24 * 60 + 6, 'a wrong clock: power-off all the same') or diag $minutes;
}

# ---- 16 KiB ----
my $calls = $faults->count('RunInstances');
foreach my $size (11_000, 20_000)
{
	append_to_file($ca, "-----BEGIN CERTIFICATE-----\n" . ('A' x 63 . "\n") x ($size / 64) . "-----END CERTIFICATE-----\n");
	fails_with($node, "SELECT agentvm.provision('acme')", 'AV012', qr/user data|larger/, "an authority of $size bytes is too much for user data");
}
psql_ok($node, "SELECT agentvm.provision('acme', profile => 'plain')", 'who needs no runtime does not care');
unlink $ca;
fails_with($node, "SELECT agentvm.provision('acme')", 'AV010', qr/gateway_ca_file/, 'nor can it be missing');
await($node, 'SELECT count(*) FROM agentvm.sessions WHERE state = $$ready$$', 4);
is($faults->count('RunInstances'), $calls + 1, 'no call was made for those');
done_testing();
