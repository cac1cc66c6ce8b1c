# secret_delivery = 'ssm': the boot payload is a parameter, which the VM reads with its role, and which is gone afterwards, whatever happens
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Metadata;
use AgentVM::Test;
use IPC::Run;
use JSON::PP;
use MIME::Base64;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $certificate = "-----BEGIN CERTIFICATE-----\n" . ('A' x 63 . "\n") x 12 . "-----END CERTIFICATE-----\n";
my $ca = PostgreSQL::Test::Utils::tempdir('ca') . '/ca.pem';
append_to_file($ca, $certificate);
my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.gateway_ca_file = '$ca'\nagentvm.lease = '3s'\n");
my %ssm = (instance_profile => 'agentvm-vm', secret_delivery => 'ssm');
set_ec2($node, 'acme', $moto, options => \%ssm);
my $cluster = $node->safe_psql('postgres', 'SELECT installation_id FROM agentvm.installation');

sub one { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub parameters { return map { $_->{Name} } @{ $moto->run('call', 'ssm', 'describe_parameters')->{Parameters} }; }
sub operations { my ($session, $which) = @_; return join ' ', map { $_->{operation} } grep { !$which || $_->{operation} =~ $which } events($node, $session); }
sub puts { my ($session) = @_; return grep { $_->{args}{Name} =~ /\Q$session\E$/ } $faults->requests('PutParameter'); }
sub name_of { return "/agentvm/$cluster/$_[0]"; }

sub report
{
	my ($token, $name) = @_;
	return as_gateway($node, 'SELECT agentvm.bootstrap(' . bytea_hash($token) . ', ' . bytea_hash($name) . ", 'boot-1')");
}
# The files of a payload
sub files
{
	my (@lines) = split /^/, $_[0];
	my %files;
	while (@lines)
	{
		my ($path, $count) = shift(@lines) =~ /^0600 (\S+) (\d+)$/ or return { error => 'no payload' };
		$files{$path} = join '', splice @lines, 0, $count;
	}
	return \%files;
}
sub token_in { my ($put) = @_; return files(decode_base64($put->{args}{Value}))->{'/etc/agentvm/runtime.env'} =~ /^AGENTVM_BOOTSTRAP_TOKEN=(\w{64})$/m ? $1 : undef; }

# ---- options ----
fails_with($node, q{SELECT agentvm.set_provider('acme', 'ec2', '{"secret_delivery": "mail"}')}, 'AV010', qr/secret_delivery/, 'there are two ways');
ec2_team($node, 'bare', $moto, options => { secret_delivery => 'ssm' });
fails_with($node, "SELECT agentvm.provision('bare')", 'AV010', qr/instance_profile.*ssm:GetParameter/s, 'the VM needs a role to read it with');
my $plain = launch($node, 'bare', 'ready');
is(scalar puts($plain), 0, 'without a runtime there is nothing to deliver');
fails_with($node, qq{SELECT agentvm.provision('acme', options => '{"secret_delivery": "user_data"}')}, 'AV010', qr/secret_delivery/, 'a caller does not choose');

# ---- a session ----
my $session = provision($node, 'acme');
my $vm = await_vm($node, $session);
my ($put) = puts($session);
is_deeply([ @{ $put->{args} }{qw(Name Type Tier Overwrite)} ], [ name_of($session), 'SecureString', 'Standard', JSON::PP::true ], 'the parameter');
is_deeply([ parameters() ], [ name_of($session) ], 'it is there');
my $token = token_in($put);
my $script = $moto->user_data($vm);
unlike($script, qr/\Q$token\E|\Q$session\E/, 'user data has neither the token nor any other value in clear');
my ($payload) = map { decode_base64($_) } $script =~ /^payload='(.*)'$/m;
is_deeply(files($payload), { '/etc/agentvm/parameter' => "us-east-1\n" . name_of($session) . "\n" }, 'its payload is where to look, and nothing else');
cmp_ok(length $script, '<', 16384, 'it is short enough');
is(operations($session), 'PutParameter RunInstances', 'written before the launch');
unlike(one("SELECT s::text || (SELECT string_agg(e::text, ' ') FROM agentvm.session_event e) FROM agentvm.session s WHERE session_id = '$session'"), qr/\Q$token\E/, 'the token is in no table');

# ---- its boot: the real script, with /etc and the commands of the system replaced ----
my $keys = $moto->run('call', 'sts', 'assume_role', encode_json({ RoleArn => $moto->role('vm', 'ssm:GetParameter'), RoleSessionName => 'vm' }))->{Credentials};
my $machine = AgentVM::Metadata->new(role => undef);    # it comes a moment later
my $box = PostgreSQL::Test::Utils::tempdir('vm');
mkdir "$box/bin";
foreach my $command (qw(shutdown systemctl poweroff nohup))
{
	append_to_file("$box/bin/$command", "#!/bin/bash\necho $command \"\$*\" >>$box/ran\n");
	chmod 0755, "$box/bin/$command";
}

# Begin to boot with a script; it answers with what it complains of
sub boot
{
	my ($text, @shell) = @_;
	my $encoded = encode_base64(decode_base64($text =~ /^payload='(.*)'$/m ? $1 : '') =~ s{ /etc/agentvm}{ $box/etc/agentvm}gr, '');
	# what comes out of the parameter, too
	my $here = $text =~ s{^payload='.*'$}{payload='$encoded'}mr =~ s{/etc/agentvm|/var/lib/cloud}{$box$&}gr =~ s{read -r mode path lines; do}{read -r mode path lines; do path=$box/etc/agentvm/\${path##*/}}r;
	local $ENV{PATH} = "$box/bin:$ENV{PATH}";
	local $ENV{AWS_EC2_METADATA_SERVICE_ENDPOINT} = $machine->endpoint;
	local $ENV{AWS_ENDPOINT_URL_SSM} = $faults->endpoint;
	my $said = '';
	return IPC::Run::start([ @shell, '-c', $here ], '<', \undef, '>', '/dev/null', '2>', \$said, IPC::Run::timeout(120)), \$said;
}
my ($boot, $complaint) = boot($script, 'dash', '-eu');
my $end = time + 60;
while (time < $end && !grep { $_->{path} =~ /security-credentials/ && $_->{status} == 404 } $machine->requests) { $boot->pump_nb; sleep 0.05; }
$machine->set(role => 'vm', document => AgentVM::Metadata::role_document($keys));
ok($boot->finish, 'the boot script runs');
my $said = $$complaint;
like($said, qr/^(agentvm: could not read parameter \Q${\ name_of($session)}\E: HTTPError\n)+$/, 'the VM asks until its role is there, and says so');
my %value = map { split /=/, $_, 2 } split /\n/, slurp_file("$box/etc/agentvm/runtime.env");
is($value{AGENTVM_BOOTSTRAP_TOKEN}, $token, 'the token has arrived');
is($value{AGENTVM_SESSION_ID}, $session, 'with all the rest');
is(slurp_file("$box/etc/agentvm/gateway-ca.pem"), $certificate, 'and the authority');
is(sprintf('%04o', (stat "$box/etc/agentvm/$_")[2] & 07777), '0600', "$_ is for root only") for qw(runtime.env gateway-ca.pem);
ok(!-e "$box/etc/agentvm/parameter", 'where it was is not kept');
like(slurp_file("$box/ran"), qr/^shutdown -P.*^systemctl restart --no-block agentvm-runtime.service$/ms, 'the power-off is armed first, the runtime started last');
is(scalar(grep { $_->{action} eq 'GetParameter' && $_->{status} == 200 } $faults->requests), 1, 'it was read by a signed call, once');
unlink "$box/etc/agentvm/runtime.env";
($boot, $complaint) = boot($script, 'bash', '-euo', 'pipefail');
ok($boot->finish, 'bash runs it, too');
is($$complaint, '', 'without a complaint, now that the role is there');
ok(-e "$box/etc/agentvm/runtime.env", 'with the same files');

# ---- gone once the runtime has reported ----
is(decode_json(report($token, 'first'))->{session_id}, $session, 'the runtime reports');
await($node, "SELECT handle ? 'boot_left' FROM agentvm.session WHERE session_id = '$session'", 'f');
is_deeply([ parameters() ], [], 'the parameter is gone');
is(state_of($node, $session), 'ready', 'the session goes on');
is(one("SELECT next_check_at = deadline_at FROM agentvm.session WHERE session_id = '$session'"), 't', 'and is next looked at when its time is up');
one("SELECT agentvm.terminate('$session')");
await_state($node, $session, 'terminated');
is(operations($session), 'PutParameter RunInstances DeleteParameter TerminateInstances', 'its end has nothing more to take away');

# a deletion that fails is tried again, and harms nobody
$faults->set(action => 'DeleteParameter', mode => 'error', status => 400, code => 'AccessDeniedException', message => 'no', n => 2);
$session = provision($node, 'acme');
await_vm($node, $session);
await($node, "SELECT running FROM agentvm.session WHERE session_id = '$session'");
report(token_in(puts($session)), 'second');
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$session' AND detail ->> 'operation' = 'DeleteParameter' AND detail ->> 'error_class' = 'credentials'");
is(state_of($node, $session), 'ready', 'a refusal leaves the session ready');
my $hurry = "UPDATE agentvm.session SET next_check_at = now() WHERE session_id = '$session' AND lease IS NULL; SELECT agentvm.wake(); ";
$end = time + 60;
one($hurry) while one("SELECT handle ? 'boot_left' FROM agentvm.session WHERE session_id = '$session'") eq 't' && time < $end;
is_deeply([ parameters() ], [], 'it is asked again until the parameter is gone');
$faults->clear;
# the end comes while it is at that
$faults->set(action => 'DeleteParameter', mode => '500');
my $busy = provision($node, 'acme');
await_vm($node, $busy);
report(token_in(puts($busy)), 'busy');
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$busy' AND detail ->> 'operation' = 'DeleteParameter'");
one("SELECT agentvm.terminate('$busy')");
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$busy' AND detail ->> 'operation' = 'TerminateInstances'");
is((vms_of($moto, $busy))[0]{state}, 'terminated', 'the VM ends though its parameter does not');
is(column($node, $busy, 'state'), 'terminating', 'but the session is not over');
$faults->clear;
hurry_to($node, $busy, 'terminated');
is_deeply([ parameters() ], [], 'until that is gone, too');

# ---- an end before it reports ----
$session = provision($node, 'acme');
await_vm($node, $session);
one("SELECT agentvm.terminate('$session')");
hurry_to($node, $session, 'terminated');
is_deeply([ parameters() ], [], 'the end takes the parameter away');
is(operations($session), 'PutParameter RunInstances TerminateInstances DeleteParameter', 'after the VM');

# ---- one parameter, several attempts ----
$faults->set(action => 'RunInstances', market => 'spot', mode => 'capacity');
$session = provision($node, 'acme');
$vm = await_vm($node, $session);
my @puts = puts($session);
is(scalar @puts, 4, 'four attempts write four times');
is(scalar(grep { $_->{args}{Name} eq name_of($session) } @puts), 4, 'the same parameter');
is($moto->run('call', 'ssm', 'get_parameter', encode_json({ Name => name_of($session), WithDecryption => JSON::PP::true }))->{Parameter}{Value}, $puts[3]{args}{Value}, 'which has what the last one needs');
is(report(token_in($puts[0]), 'third'), '', "an earlier attempt's token is void");
is(decode_json(report(token_in($puts[3]), 'third'))->{session_id}, $session, 'the last one works');
$faults->clear;

# ---- writes that are lost, refused, or in the middle of a crash ----
$faults->set(action => 'PutParameter', mode => 'lost', n => 3);
$session = provision($node, 'acme');
hurry_until($node, "SELECT vm_id IS NOT NULL FROM agentvm.session WHERE session_id = '$session'");
@puts = puts($session);
cmp_ok(scalar @puts, '>=', 2, 'a write that was not answered is repeated');
is(scalar(grep { $_->{args}{Value} eq $puts[0]{args}{Value} } @puts), scalar @puts, 'the same to the byte');
is(scalar vms_of($moto, $session), 1, 'one VM');
$faults->clear;
one("SELECT agentvm.terminate('$session')");
hurry_to($node, $session, 'terminated');

$faults->set(action => 'PutParameter', mode => 'slow', ms => 1500);
$session = provision($node, 'acme');
await($node, "SELECT handle ? 'boot_left' FROM agentvm.session WHERE session_id = '$session'");
$node->restart('immediate');
$faults->clear;
$vm = await_vm($node, $session);
is(scalar vms_of($moto, $session), 1, 'a crash between the write and the launch: one VM');
is(decode_json(report(token_in((puts($session))[-1]), 'crash'))->{session_id}, $session, 'which can report');
await($node, "SELECT handle ? 'boot_left' FROM agentvm.session WHERE session_id = '$session'", 'f');
is_deeply([ grep { /\Q$session\E/ } parameters() ], [], 'and leaves no parameter');

# the end, while a write is on its way: what arrives late is taken away as well
$faults->set(action => 'PutParameter', mode => 'lost');
$session = provision($node, 'acme');
await($node, "SELECT detail ~ 'NoReply' FROM agentvm.sessions WHERE session_id = '$session'");
is_deeply([ grep { /\Q$session\E/ } parameters() ], [ name_of($session) ], 'a write that was lost has been done');
one("SELECT agentvm.terminate('$session')");
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$session' AND detail ->> 'operation' = 'DeleteParameter'");
my $sent_at = one("SELECT (handle ->> 'put_at')::bigint FROM agentvm.session WHERE session_id = '$session'");
is(column($node, $session, 'state'), 'terminating', 'deleted, but not believed yet');
# while we have the row nothing more is asked for, however long the late one takes
my $holder = AgentVM::Client->new($node);
$holder->run("BEGIN; SELECT FROM agentvm.session WHERE session_id = '$session' FOR UPDATE");
$moto->run('call', 'ssm', 'put_parameter', encode_json({ Name => name_of($session), Value => 'late', Type => 'SecureString' }));
$holder->run('COMMIT');
hurry_to($node, $session, 'terminated');
cmp_ok(one("SELECT extract(epoch FROM ended_at) * 1000 FROM agentvm.sessions WHERE session_id = '$session'"), '>=', $sent_at + 3000, 'but after a whole lease');
is_deeply([ grep { /\Q$session\E/ } parameters() ], [], 'when the late one is gone, too');
is(scalar vms_of($moto, $session), 0, 'nothing was launched');
$faults->clear;

# who may not write: no parameter, and an end that does not wait for the right to delete it
my $may_not = $moto->user('ec2:*', 'sts:*');
ec2_team($node, 'poor', $moto, options => \%ssm, secrets => $may_not);
$session = provision($node, 'poor');
await_state($node, $session, 'failed');
like(state_of($node, $session), qr/^failed invalid_credentials AccessDenied/, 'a refusal ends the session');
is(operations($session), 'PutParameter', 'with no other call');
my $check = decode_json(one("SELECT agentvm.check_provider('poor')"));
is_deeply([ map { $_->{action} } grep { $_->{action} =~ /ssm/ } @{ $check->{missing} } ], ['ssm:DeleteParameter'], 'check_provider() says what is missing');
$check = decode_json(one("SELECT agentvm.check_provider('acme')"));
ok((grep { $_ eq 'ssm:DeleteParameter' } @{ $check->{allowed} }), 'or not');

# with a role: the right to write goes with the launch, and to this installation's parameters only
my $arn = $moto->role('launcher', 'ec2:*', 'ssm:*', 'iam:PassRole');
ec2_team($node, 'role', $moto, options => { %ssm, role_arn => $arn });
$session = provision($node, 'role');
await_vm($node, $session);
one("SELECT agentvm.terminate('$session')");
hurry_to($node, $session, 'terminated');
my @policies = map { decode_json($_->{args}{Policy})->{Statement} } grep { $_->{args}{RoleArn} eq $arn } $faults->requests('AssumeRole');
my @ssm = map { my ($statement) = grep { $_->{Action}[0] =~ /^ssm/ } @$_; "@{ $statement->{Action} } $statement->{Resource}" } @policies;
is_deeply(\@ssm, [ "ssm:PutParameter ssm:DeleteParameter arn:aws:ssm:*:*:parameter/agentvm/$cluster/*", "ssm:DeleteParameter arn:aws:ssm:*:*:parameter/agentvm/$cluster/*" ], 'the policies of a role');

# ---- rows that have been lost, as after a failover: their VMs are ended, and what was kept for their boots goes first ----
my @lost = map { provision($node, 'acme') } 1, 2;
my @orphans = map { await_vm($node, $_) } @lost;
hurry_until($node, "SELECT count(*) FROM agentvm.session WHERE lease IS NOT NULL", 0);
one("DELETE FROM agentvm.session WHERE session_id = '$_'; DELETE FROM agentvm.session_token WHERE session_id = '$_'") for @lost;
is_deeply([ sort { $a cmp $b } parameters() ], [ sort { $a cmp $b } map { name_of($_) } @lost ], 'their parameters are there');
$node->append_conf('postgresql.conf', "agentvm.orphan_grace = '1s'\n");
$node->reload;
$faults->set(action => 'DeleteParameter', mode => 'throttle', n => 1);
sub states { my %state = map { $_->{id} => $_->{state} } $moto->instances; return join(' ', @state{@orphans}); }
$end = time + 60;
my @left;
do { one('SELECT agentvm.sweep_inventory()'); push @left, scalar parameters(); } until states() eq 'terminated terminated' || time > $end;
is(states(), 'terminated terminated', 'VMs of lost rows are reaped, though a parameter is not deleted at once');
is_deeply([ parameters() ], [], 'no parameter is left');
cmp_ok(scalar(grep { $_ == 2 } @left), '>=', 1, 'a list that could not delete one has ended no VM');

# ---- size ----
append_to_file($ca, "-----BEGIN CERTIFICATE-----\n" . ('A' x 63 . "\n") x 40 . "-----END CERTIFICATE-----\n");
$session = provision($node, 'acme');
await_vm($node, $session);
is((puts($session))[0]{args}{Tier}, 'Advanced', 'above 4 KB: the advanced tier');
append_to_file($ca, "-----BEGIN CERTIFICATE-----\n" . ('A' x 63 . "\n") x 60 . "-----END CERTIFICATE-----\n");
fails_with($node, "SELECT agentvm.provision('acme')", 'AV012', qr/parameter of SSM/, 'above 8 KB: refused');

# ---- all is over ----
one('SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE ended_at IS NULL');
hurry_until($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0);
is_deeply([ parameters() ], [], 'no parameter is left');
is(scalar $moto->running, 0, 'nothing runs');
log_lacks($node, $token, 'no token in the log');
log_lacks($node, (puts($session))[0]{args}{Value}, 'no payload either');
done_testing();
