# What agentvm promises of provider ec2, in a real account: run by test/cloud/run, see README.md there. Whatever happens, nothing that
# it launches lives on: each part ends its own, the end of the test ends what carries this run's tag, and so does a watchdog, which is
# a process of its own
use strict;
use warnings;
use AgentVM::EC2 qw(column launch await_vm events);
use AgentVM::Gateway;
use AgentVM::Test;
use Cwd qw(abs_path);
use File::Basename qw(dirname);
use IPC::Run;
use JSON::PP;
use POSIX ();
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

sub setting { my ($name, $default) = @_; my $value = $ENV{"AGENTVM_CLOUD_$name"}; return defined $value && $value ne '' ? $value : $default; }

BEGIN { plan skip_all => 'no AGENTVM_CLOUD_REGION: see test/cloud/README.md' unless $ENV{AGENTVM_CLOUD_REGION}; }

my @aws = ("$ENV{AGENTVM_VENV}/bin/python", abs_path(dirname(__FILE__)) . '/aws.py');
my $endpoint = setting('ENDPOINT_URL', '');
my $gateway_url = setting('GATEWAY_URL', '');
my $patience = setting('PATIENCE', 90);      # s, for a launch and for an end
my $lifetime = setting('LIFETIME', 60);      # s
my $node = new_node('cloud', conf => "agentvm.aws_endpoint_url = '$endpoint'\nagentvm.allow_insecure_endpoints = " . ($endpoint ? 'on' : 'off') . "\n"
	  . ($gateway_url ? "agentvm.gateway_url = '$gateway_url'\n" : '') . (setting('CA_FILE') ? "agentvm.gateway_ca_file = '" . setting('CA_FILE') . "'\n" : ''));
my $run = $node->safe_psql('postgres', 'SELECT installation_id FROM agentvm.installation');
note("this run's tag: agentvm-cluster = $run");

# ---- before anything is launched: who ends it ----

my $me = $$;
my $watchdog = fork // die "could not fork: $!";
if (!$watchdog)
{
	# test/run and the like end what works in their directories
	open(STDIN, '<', '/dev/null');
	open(STDOUT, '>', PostgreSQL::Test::Utils::tempdir('watchdog') . '/log');
	open(STDERR, '>&', \*STDOUT);
	delete @ENV{ 'TMPDIR', grep { /^XDG_/ } keys %ENV };
	exec @aws, 'watchdog', $run, setting('MINUTES', 60), $me or POSIX::_exit(1);
}

# First the workers, which might launch another, then the VMs, then the watchdog
END
{
	my $code = $?;
	if ($me && $$ == $me)
	{
		$node->stop('immediate', fail_ok => 1);
		my $ended = system(@aws, 'end', $run) == 0;
		diag("VMs with the tag agentvm-cluster = $run may be left, unless the watchdog gets at them") unless $ended;
		kill 'KILL', $watchdog if $ended;
	}
	$? = $code;
}
$SIG{$_} = sub { BAIL_OUT('killed') } for qw(TERM INT HUP);

sub account { my ($command) = @_; my $out; IPC::Run::run([ @aws, $command, $run ], '<', \undef, '>', \$out) or die "aws.py $command"; return @{ decode_json($out) }; }
sub vms { my ($session) = @_; return grep { !$session || ($_->{tags}{'agentvm-session-id'} // '') eq $session } account('list'); }
sub living { return grep { $_->{state} =~ /^(pending|running)$/ } vms(@_); }
sub until_true { my ($name, $test) = @_; my $end = time + $patience; sleep 1 until $test->() || time > $end; local $Test::Builder::Level = $Test::Builder::Level + 1; return ok($test->(), $name); }

# End a session, and see that it has
sub finish
{
	my ($session, $name) = @_;
	$node->safe_psql('postgres', "SELECT agentvm.terminate('$session')");
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$session'", 'terminated', timeout => $patience, name => "$name: ended") || diag(state_of($node, $session));
	is(scalar living($session), 0, "$name: no VM lives");
	return;
}

my %options = (region => setting('REGION'), image_id => setting('IMAGE_ID') // BAIL_OUT('AGENTVM_CLOUD_IMAGE_ID is not set'), instance_type => setting('INSTANCE_TYPE', 't3.micro'));
foreach (qw(SUBNET_IDS SECURITY_GROUP_IDS)) { $options{ lc $_ } = [ split /[, ]+/, setting($_) ] if setting($_); }
$options{instance_profile} = setting('INSTANCE_PROFILE') if setting('INSTANCE_PROFILE');
my %secrets = map { setting($_) ? (lc $_ => setting($_)) : () } qw(ACCESS_KEY_ID SECRET_ACCESS_KEY SESSION_TOKEN);
sub team
{
	my ($name, $options, $secrets) = @_;
	$node->safe_psql('postgres', "SELECT agentvm.create_team('$name', 'ec2', limits => '{\"min_lifetime\": \"1s\"}'); SET log_statement = none; SELECT agentvm.set_provider('$name', 'ec2', "
		  . json({ %options, %$options }) . ', ' . json($secrets) . ')');
	return;
}
$node->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");
team('acme', { spot => JSON::PP::false }, \%secrets);

# A session of a team, running, and what it took
sub started
{
	my ($team, $name, @arguments) = @_;
	my $begun = time;
	my $session = launch($node, $team, undef, @arguments);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$session'", 'ready', timeout => $patience, name => "$name: runs within $patience s") || diag(state_of($node, $session));
	note(sprintf '%s: %.1f s', $name, time - $begun);
	return $session;
}

# ---- the account ----

like(psql_ok($node, "SELECT agentvm.check_provider('acme')", 'check_provider()'), qr/"ok": true/, 'the account is there');

# ---- launch, look, end twice ----

my $session = started('acme', 'on-demand', "idempotency_key => 'one'");
my @vms = vms($session);
is(scalar @vms, 1, 'one VM');
is("$vms[0]{id} $vms[0]{market}", column($node, $session, 'vm_id') . ' on-demand', 'it is that of the row');
is($vms[0]{imds}, 'required', 'without IMDSv1') unless $endpoint;
is($vms[0]{tags}{$_}, { 'agentvm-managed-by' => 'agentvm', 'agentvm-team-id' => 'acme', 'agentvm-cluster' => $run }->{$_}, "tag $_") for qw(agentvm-managed-by agentvm-team-id agentvm-cluster);
like($node->safe_psql('postgres', "SELECT agentvm.inspect('$session')"), qr/"state": "running"/, 'inspect() sees it run');
is($node->safe_psql('postgres', "SELECT agentvm.provision('acme', profile => 'plain', idempotency_key => 'one')"), $session, 'asked again with the same key: the same session');

# ---- pause and resume ----

sub there_and_back
{
	my ($session, $name) = @_;
	foreach my $case ([ 'pause', 'paused', 'stopped' ], [ 'resume', 'ready', 'running' ])
	{
		my ($way, $state, $vm) = @$case;
		is($node->safe_psql('postgres', "SELECT agentvm.$way('$session')"), 't', "$name: $way()");
		await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$session'", $state, timeout => $patience, name => "$name: $way(): within $patience s") || diag(state_of($node, $session));
		is(join(' ', map { "$_->{id} $_->{state}" } vms($session)), column($node, $session, 'vm_id') . " $vm", "$name: the VM is $vm");
	}
	return;
}
there_and_back($session, 'on-demand');
finish($session, 'on-demand');
is($node->safe_psql('postgres', "SELECT agentvm.terminate('$session')"), 'f', 'ended again: nothing to do');
is(scalar vms($session), 1, 'and there was never another VM');

# ---- spot, and from spot to on-demand ----

team('thrifty', { spot => JSON::PP::true, spot_persistent => JSON::PP::true, spot_max_price => '0.0001' }, \%secrets);
$session = started('thrifty', 'spot to on-demand');
is(column($node, $session, 'purchase'), 'on-demand', 'a price nobody sells at: on-demand');
like(join(' ', map { $_->{error} // '' } events($node, $session)), qr/SpotMaxPriceTooLow|InsufficientInstanceCapacity|MaxSpotInstanceCountExceeded/, 'the events say why');
is(join(' ', map { $_->{market} } living($session)), 'on-demand', 'one VM, on-demand');
finish($session, 'spot to on-demand');
is(scalar account('requests'), 0, 'a request that was refused is not left for later');

# ---- persistent spot ----

team('keeps', { spot => JSON::PP::true, spot_persistent => JSON::PP::true }, \%secrets);
$session = started('keeps', 'persistent spot');
SKIP:
{
	skip 'no spot capacity', 6 unless column($node, $session, 'purchase') eq 'spot';
	is(scalar account('requests'), 1, 'there is a request');
	there_and_back($session, 'persistent spot');
}
finish($session, 'persistent spot');
is(scalar account('requests'), 0, 'which AWS does not launch from any more');

# ---- bad credentials ----

team('wrongkey', {}, { %secrets, secret_access_key => 'x' . substr($secrets{secret_access_key}, 1) });
$session = launch($node, 'wrongkey');
await($node, "SELECT state || ' ' || end_reason FROM agentvm.sessions WHERE session_id = '$session'", 'failed invalid_credentials', timeout => 10, name => 'bad credentials fail within 10 s');
is(scalar vms($session), 0, 'nothing was launched');
log_lacks($node, $secrets{secret_access_key});

# ---- gone behind its back ----

$session = started('acme', 'ended by somebody else');
system(@aws, 'end', $run, column($node, $session, 'vm_id'));
finish($session, 'ended by somebody else');

# ---- lifetime ----

$session = started('acme', 'lifetime', "max_lifetime => '$lifetime seconds'");
await($node, "SELECT state || ' ' || end_reason FROM agentvm.sessions WHERE session_id = '$session'", 'terminated max_lifetime', timeout => $lifetime + $patience, name => 'its lifetime ends it');
is(scalar living($session), 0, 'and its VM');

# ---- a runtime ----

SKIP:
{
	skip 'no AGENTVM_CLOUD_GATEWAY_URL, at which VMs reach this machine', 1 unless $gateway_url;
	my ($port) = $gateway_url =~ /:(\d+)\/?$/;
	my $gateway = AgentVM::Gateway->new($node, port => setting('GATEWAY_PORT', $port // ($gateway_url =~ /^https/ ? 443 : 80)), setting('GATEWAY_CERT') ? (tls => [ setting('GATEWAY_CERT'), setting('GATEWAY_KEY') ]) : (),
		options => [ '--listen', '0.0.0.0' ]);
	$node->safe_psql('postgres', "SELECT agentvm.create_profile('full', 'ec2', runtime => true)");
	my $begun = time;
	$session = launch($node, 'acme', undef, "profile => 'full'");
	await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$session'", 'ready', timeout => 180, name => 'the runtime of a VM reports') || diag(state_of($node, $session), $gateway->output);
	note(sprintf 'boot: %.1f s', time - $begun);
	my $beat = "SELECT last_heartbeat_at FROM agentvm.sessions WHERE session_id = '$session'";
	my $first = $node->safe_psql('postgres', $beat);
	until_true('its heart beats', sub { $node->safe_psql('postgres', $beat) ne $first });
	finish($session, 'runtime');
}

is(scalar living(), 0, 'nothing is left');
done_testing();
