# Whose credentials are used: the team's own; the server's environment if the administrator allows that; never another team's
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use JSON::PP;
use Test::More;

my ($node, $faults, $moto) = ec2_node('main', start => 0);

# temporary credentials of a role, which count only together with their session token
$moto->run('call', 'iam', 'create_role', encode_json({ RoleName => 'worker',
	AssumeRolePolicyDocument => '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}]}' }));
$moto->run('call', 'iam', 'put_role_policy', encode_json({ RoleName => 'worker', PolicyName => 'all',
	PolicyDocument => '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": ["ec2:*", "sts:*"], "Resource": "*"}]}' }));
my $role = $moto->run('call', 'sts', 'assume_role', '{"RoleArn": "arn:aws:iam::123456789012:role/worker", "RoleSessionName": "test"}')->{Credentials};
local $ENV{AWS_ACCESS_KEY_ID} = $role->{AccessKeyId};
local $ENV{AWS_SECRET_ACCESS_KEY} = $role->{SecretAccessKey};
local $ENV{AWS_SESSION_TOKEN} = $role->{SessionToken};
$node->start;
create_extension($node);
my $options = json($moto->options);
$node->safe_psql('postgres', qq{
	SELECT agentvm.create_profile('plain', 'ec2', runtime => false);
	SELECT agentvm.create_team('acme', 'ec2'); SELECT agentvm.set_provider('acme', 'ec2', $options);
	SELECT agentvm.create_team('bare', 'ec2');});

sub setting
{
	my ($value) = @_;
	$node->append_conf('postgresql.conf', "agentvm.environment_credentials = $value\n");
	$node->reload;
	await($node, 'SHOW agentvm.environment_credentials', $value);
	return;
}

is($node->safe_psql('postgres', 'SHOW agentvm.environment_credentials'), 'off', 'off by default');
fails_with($node, "SELECT agentvm.provision('acme', profile => 'plain')", 'AV010', qr/no credentials/, 'off: a team without credentials is refused');
fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV001', qr/MissingCredentials/, 'check_provider() says so, too');

setting('on');
my $session = launch($node, 'acme', 'ready');
is(scalar vms_of($moto, $session), 1, "on: launched with the server's");
like($node->safe_psql('postgres', "SELECT agentvm.check_provider('acme')"), qr/assumed-role\/worker/, 'check_provider() shows whose they are');
fails_with($node, "SELECT agentvm.provision('bare', profile => 'plain')", 'AV010', qr/"region"/, 'the rest of the configuration is still needed');

# what the team has of its own comes first, even if it is wrong, and is never mixed with the server's
set_ec2($node, 'acme', $moto, secrets => { access_key_id => $role->{AccessKeyId}, secret_access_key => $role->{SecretAccessKey} });
my $failed = launch($node, 'acme', 'failed');
like(state_of($node, $failed), qr/^failed invalid_credentials /, "a team's own credentials get no help from the server's");
set_ec2($node, 'acme', $moto, secrets => { access_key_id => $role->{AccessKeyId}, secret_access_key => $role->{SecretAccessKey}, session_token => $role->{SessionToken} });
my $own = launch($node, 'acme', 'ready');
ok($own, 'with their session token they work');

# keys in one field only cannot be mistaken for none
set_ec2($node, 'acme', $moto, secrets => { secret_access_key => undef, session_token => undef });
$failed = launch($node, 'acme', 'failed');
like(state_of($node, $failed), qr/MissingCredentials/, 'nor does half a set');
set_ec2($node, 'acme', $moto, secrets => { access_key_id => undef });

setting('off');
fails_with($node, "SELECT agentvm.provision('acme', profile => 'plain')", 'AV010', qr/no credentials/, 'off again: refused again');
setting('on');
$node->safe_psql('postgres', "SELECT agentvm.terminate('$_')") for $session, $own;
await_state($node, $_, 'terminated') for $session, $own;

# on, but nothing there
delete @ENV{qw(AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN)};
$node->restart;
fails_with($node, "SELECT agentvm.provision('acme', profile => 'plain')", 'AV010', qr/no credentials/, 'on, but the environment is empty: refused');
is(scalar $moto->running, 0, 'nothing runs');
log_lacks($node, $role->{$_}, "no $_ in the server log") for qw(SecretAccessKey SessionToken);
done_testing();
