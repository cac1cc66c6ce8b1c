# Credentials of the database server's own machine: by version 2 of its metadata service, once, and only where that is allowed
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Metadata;
use AgentVM::Test;
use JSON::PP;
use Test::More;

my ($node, $faults, $moto) = ec2_node('main', start => 0);
my %keys = map { my $name = $_; $name => $moto->run('call', 'sts', 'assume_role', encode_json({ RoleArn => $moto->role($name, $name eq 'server' ? qw(ec2:* sts:*) : 'sts:*'), RoleSessionName => 'machine' }))->{Credentials} } qw(server other);
my $machine = AgentVM::Metadata->new(role => 'server', document => AgentVM::Metadata::role_document($keys{server}));
# nobody is to be asked on the way to it: there is a proxy for all but the test cloud, which is not there
my $endpoint = $machine->endpoint =~ s/127\.0\.0\.1/localhost/r;
local $ENV{AWS_EC2_METADATA_SERVICE_ENDPOINT} = "$endpoint/";
local $ENV{http_proxy} = 'http://127.0.0.1:9';
local $ENV{no_proxy} = '127.0.0.1';
$node->start;
create_extension($node);
my $options = json($moto->options);
$node->safe_psql('postgres', qq{SELECT agentvm.create_profile('plain', 'ec2', runtime => false);
	SELECT agentvm.create_team('acme', 'ec2'); SELECT agentvm.set_provider('acme', 'ec2', $options)});

sub one { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub setting { my ($line, $shown) = @_; $node->append_conf('postgresql.conf', "$line\n"); $node->reload; await($node, "SELECT setting FROM pg_settings WHERE name = '" . $line =~ s/ .*//r . "'", $shown); return; }
sub asked { my @requests = $machine->requests; return scalar @requests; }

# ---- off ----
fails_with($node, "SELECT agentvm.provision('acme', profile => 'plain')", 'AV010', qr/no credentials/, 'off: a team without credentials is refused');
fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV001', qr/MissingCredentials/, 'check_provider() says so, too');
is(asked(), 0, 'the machine is not asked');

# ---- on ----
setting('agentvm.environment_credentials = on', 'on');
$machine->set(seconds => 0.5);
my @sessions = map { provision($node, 'acme', "profile => 'plain'") } 1 .. 10;
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 10);
is(scalar $moto->running, 10, 'ten sessions');
my @requests = $machine->requests;
my $roles = '/latest/meta-data/iam/security-credentials/';
is_deeply([ map { "$_->{method} $_->{path} $_->{status}" } @requests ], [ 'PUT /latest/api/token 200', "GET $roles 200", "GET ${roles}server 200" ], 'the machine is asked once: a token, the role, its keys');
like($requests[0]{headers}{'x-aws-ec2-metadata-token-ttl-seconds'}, qr/^\d+$/, 'the token is asked for some time');
is($requests[1]{headers}{'x-aws-ec2-metadata-token'}, $requests[2]{headers}{'x-aws-ec2-metadata-token'}, 'the token is shown');
unlike(encode_json(\@requests), qr/authorization|\Q$keys{server}{AccessKeyId}\E/i, 'nothing is signed there');
$machine->set(seconds => 0);
one('SELECT agentvm.terminate(session_id) FROM agentvm.sessions');
await($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0);
is(asked(), 3, 'the end takes the same keys');
like(one("SELECT agentvm.check_provider('acme') ->> 'arn'"), qr{assumed-role/server/machine}, 'check_provider() shows whose they are');
is(asked(), 6, 'and asks the machine for itself');

# as the base of a role
my $arn = $moto->role('customer', 'ec2:*');
$node->safe_psql('postgres', "SELECT agentvm.create_team('globex', 'ec2'); SELECT agentvm.set_provider('globex', 'ec2', " . json({ %{ $moto->options }, role_arn => $arn }) . ')');
my $session = launch($node, 'globex', 'ready');
is(asked(), 6, 'the dispatcher still has them, to assume a role with');
my ($call) = $faults->requests('AssumeRole');
is_deeply([ @{ $call->{args} }{qw(RoleArn RoleSessionName ExternalId)} ], [ $arn, $session, one("SELECT external_id FROM agentvm.team WHERE team_id = 'globex'") ], 'which is assumed as ever');
like(one("SELECT agentvm.check_provider('globex') ->> 'arn'"), qr{assumed-role/customer/check}, 'check_provider() goes all the way');

# ---- expired ones ----
$machine->set(role => 'other', document => AgentVM::Metadata::role_document($keys{other}));
my $before = asked();
$faults->set(action => 'RunInstances', mode => 'error', status => 400, code => 'ExpiredToken', n => 1);
my $failed = launch($node, 'acme', 'failed');
cmp_ok(asked(), '>', $before, 'keys that have expired: the machine is asked again');
like(state_of($node, $failed), qr/assumed-role\/other\//, 'and what it has now is used');
$machine->set(role => 'server', document => AgentVM::Metadata::role_document($keys{server}, 310));
$faults->set(action => 'RunInstances', mode => 'error', status => 400, code => 'ExpiredToken', n => 1);
push @sessions, launch($node, 'acme', 'ready');
$before = asked();
my $end = time + 60;
while (asked() == $before && time < $end) { launch($node, 'acme', 'ready'); }
cmp_ok(asked(), '>', $before, 'keys near their end are fetched anew');
# the base of a role has expired: the role is assumed with new keys, after a while
$machine->set(document => AgentVM::Metadata::role_document($keys{server}));
$before = asked();
$faults->set(action => 'AssumeRole', mode => 'error', status => 400, code => 'ExpiredToken', n => 1);
$node->safe_psql('postgres', "SELECT agentvm.set_provider('globex', 'ec2', " . json({ %{ $moto->options }, role_arn => $moto->role('customer2', 'ec2:*') }) . ')');
my $based = provision($node, 'globex', "profile => 'plain'");
hurry_to($node, $based, 'ready');
cmp_ok(asked(), '>', $before, 'keys with which no role can be assumed any more are fetched anew');

# ---- a machine that is not well ----
# Have the dispatcher forget what it knows: keys, which AWS says have expired; a failure, which it remembers for two seconds
sub forget
{
	$faults->clear;
	$faults->set(action => 'RunInstances', mode => 'error', status => 400, code => 'ExpiredToken', n => 1);
	await($node, "SELECT coalesce(max(ended_at) < now() - interval '2.5 s', true) FROM agentvm.sessions WHERE state = 'failed'", 't', name => 'no failure is remembered');
	return;
}

sub sick
{
	my ($name, $pages, $outcome) = @_;
	$machine->set(pages => $pages);
	forget();
	my $sick = provision($node, 'acme', "profile => 'plain'");
	if ($outcome eq 'ready')
	{
		await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$sick' AND detail ->> 'error_class' = 'transient'");
		$machine->set(pages => {});
		hurry_to($node, $sick, 'ready');
	}
	else { await_state($node, $sick, 'failed'); }
	like(state_of($node, $sick), $outcome eq 'ready' ? qr/^ready/ : qr/^failed invalid_credentials MissingCredentials.*$outcome/, $name);
	return $sick;
}
sick('no role', { $roles => [ 404, '' ] }, '404');
sick('no version 2', { '/latest/api/token' => [ 403, '' ] }, '403');
ok(!(grep { $_->{path} ne '/latest/api/token' && !$_->{headers}{'x-aws-ec2-metadata-token'} } $machine->requests), 'version 1 is never tried');
sick('no name of a role', { $roles => [ 200, '../../etc' ] }, 'has no role');
sick('no keys', { "${roles}server" => [ 200, '{"Code": "AssumeRoleUnauthorizedAccess"}' ] }, 'AssumeRoleUnauthorizedAccess');
sick('no document', { "${roles}server" => [ 200, '[[[' x 10000 ] }, 'no document');
sick('no text', { "${roles}server" => [ 200, '{"Code": "Success", "AccessKeyId": 7}' ] }, 'Success');
my $busy = sick('too busy', { '/latest/api/token' => [ 503, '' ] }, 'ready');
one("SELECT agentvm.terminate('$busy')");
$machine->set(pages => {}, seconds => 10);
forget();
my $slow = provision($node, 'acme', "profile => 'plain'");
await_state($node, $slow, 'failed', timeout => 20);
like(state_of($node, $slow), qr/^failed invalid_credentials MissingCredentials.*does not answer/, 'no answer: two seconds, twice');
$machine->set(seconds => 0);

# ---- the rest of AWS's variables ----
{
	local $ENV{AWS_EC2_METADATA_DISABLED} = 'true';
	$node->restart;
	fails_with($node, "SELECT agentvm.provision('acme', profile => 'plain')", 'AV010', qr/no credentials/, 'AWS_EC2_METADATA_DISABLED');
}
delete $ENV{AWS_EC2_METADATA_SERVICE_ENDPOINT};
$node->restart;
SKIP:
{
	skip 'this is a machine of EC2', 1 if -e '/sys/class/dmi/id/sys_vendor' && PostgreSQL::Test::Utils::slurp_file('/sys/class/dmi/id/sys_vendor') =~ /^Amazon EC2/;
	fails_with($node, "SELECT agentvm.provision('acme', profile => 'plain')", 'AV010', qr/no credentials/, 'a machine that is not of EC2 is not asked');
}
$ENV{AWS_EC2_METADATA_SERVICE_ENDPOINT} = $endpoint;
$node->restart;

# ---- plain http is for it alone ----
$before = asked();
setting('agentvm.allow_insecure_endpoints = off', 'off');
my ($code, $out, $error) = $node->psql('postgres', "SELECT agentvm.check_provider('acme')");
like($error, qr/without TLS/, 'the endpoint of AWS itself needs TLS');
cmp_ok(asked(), '>', $before, 'the metadata service has none');
setting('agentvm.allow_insecure_endpoints = on', 'on');

for my $secret (map { @$_{qw(SecretAccessKey SessionToken)} } values %keys) { log_lacks($node, $secret, 'no secret in the log'); }
one("SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE ended_at IS NULL");
hurry_until($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0);
is(scalar $moto->running, 0, 'nothing runs');
done_testing();
