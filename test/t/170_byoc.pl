# infra/byoc: the main job with exactly the rights of its policy, in a cloud that evaluates policies as AWS does (test/lib/iam.py);
# each right is needed, and what is missing is named; Terraform gives the same as CloudFormation
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Moto;
use AgentVM::Test;
use File::Basename qw(dirname);
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

my $byoc = dirname(__FILE__) . '/../../infra/byoc';
my $python = "$ENV{AGENTVM_VENV}/bin/python";
my $account = '123456789012';
my $moto = AgentVM::Moto->new('moto', '--iam');
my $node = new_node('main', moto => $moto);
my $cluster = $node->safe_psql('postgres', 'SELECT installation_id FROM agentvm.installation');
$node->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");

# Calls of the account's administrator, [service, method, arguments], which must work; their answers
sub account
{
	my @answers = $moto->calls(map { [ undef, @$_ ] } @_);
	die "$_->{error}: $_->{message}" for grep { $_->{error} } @answers;
	return @answers;
}
sub copy { return decode_json(encode_json($_[0])); }
sub list { my ($value) = @_; return ref $value eq 'ARRAY' ? @$value : ($value); }

# A user with a policy: a document, or the ARN of one; the keys
sub user_with
{
	my ($name, $policy) = @_;
	my @answers = account([ 'iam', 'create_user', { UserName => $name } ],
		[ 'iam', ref $policy ? ('put_user_policy', { UserName => $name, PolicyName => 'it', PolicyDocument => encode_json($policy) }) : ('attach_user_policy', { UserName => $name, PolicyArn => $policy }) ],
		[ 'iam', 'create_access_key', { UserName => $name } ]);
	my $key = $answers[2]{AccessKey};
	return { access_key_id => $key->{AccessKeyId}, secret_access_key => $key->{SecretAccessKey} };
}
sub allow { return { Version => '2012-10-17', Statement => [ { Effect => 'Allow', Action => $_[0], Resource => '*' } ] }; }

# ---- the stack ----

command_ok([ "$ENV{AGENTVM_VENV}/bin/cfn-lint", "$byoc/agentvm.yaml" ], 'cfn-lint has nothing to say');
my $external_id = '6f1ac1f8-3c65-4d0a-9b0f-1f1d6c1b7a51';
my $platform = user_with('platform', allow('sts:AssumeRole'));
my $stranger = user_with('stranger', allow('sts:AssumeRole'));
my %parameters = (Cluster => $cluster, ExternalId => $external_id, ControlPlaneArn => "arn:aws:iam::$account:user/platform");
my ($stacks) = (account([ 'cloudformation', 'create_stack', {
	StackName => 'agentvm', TemplateBody => slurp_file("$byoc/agentvm.yaml"), Capabilities => ['CAPABILITY_IAM'],
	Parameters => [ map { { ParameterKey => $_, ParameterValue => $parameters{$_} } } sort keys %parameters ]
} ], [ 'cloudformation', 'describe_stacks', {} ]))[1];
my %output = map { $_->{OutputKey} => $_->{OutputValue} } @{ $stacks->{Stacks}[0]{Outputs} };
my ($profile, $role, $policy, $attached) = account([ 'iam', 'get_instance_profile', { InstanceProfileName => $output{InstanceProfile} } ],
	[ 'iam', 'get_role', { RoleName => $output{RoleArn} =~ s{.*/}{}r } ],
	[ 'iam', 'get_policy_version', { PolicyArn => $output{PolicyArn}, VersionId => 'v1' } ],
	[ 'iam', 'list_attached_role_policies', { RoleName => $output{RoleArn} =~ s{.*/}{}r } ]);
my $instance_role = $profile->{InstanceProfile}{Roles}[0];
($role, $policy) = ($role->{Role}, $policy->{PolicyVersion}{Document});
my ($instance_policy, $others) = account([ 'iam', 'get_role_policy', { RoleName => $instance_role->{RoleName}, PolicyName => 'start-secret' } ],
	[ 'iam', 'list_attached_role_policies', { RoleName => $instance_role->{RoleName} } ]);
$instance_policy = $instance_policy->{PolicyDocument};
is(scalar @{ $others->{AttachedPolicies} }, 0, 'the role of the VMs has one policy');
is_deeply([ map { $_->{PolicyArn} } @{ $attached->{AttachedPolicies} } ],
	[ $output{PolicyArn} ], 'the role has the policy');
cmp_ok(length encode_json($policy), '<', 6144, 'which is as short as IAM wants it');

# ---- Terraform: the same ----

my %references = (
	'var.cluster' => $cluster, 'var.external_id' => $external_id, 'var.control_plane_arn' => $parameters{ControlPlaneArn}, 'var.region' => '*',
	'data.aws_partition.here.partition' => 'aws', 'data.aws_caller_identity.here.account_id' => $account, 'aws_iam_role.instance.arn' => $instance_role->{Arn});
my ($locals, $error);
IPC::Run::run([ $python, dirname(__FILE__) . '/../lib/terraform.py', "$byoc/terraform/main.tf", map { "$_=$references{$_}" } sort keys %references ],
	'<', \undef, '>', \$locals, '2>', \$error) or die $error;
my %same = (control_plane_policy => $policy, control_plane_trust => $role->{AssumeRolePolicyDocument}, instance_policy => $instance_policy,
	instance_trust => $instance_role->{AssumeRolePolicyDocument});
$locals = decode_json($locals);
is_deeply($locals->{$_}, $same{$_}, "Terraform has the same $_") for sort keys %same;
SKIP:
{
	my ($terraform) = grep { -x } map { ("$_/terraform", "$_/tofu") } split /:/, $ENV{PATH};
	skip 'no terraform here', 2 unless $terraform;
	local $ENV{CHECKPOINT_DISABLE} = 1;
	local $ENV{TF_CLI_CONFIG_FILE} = '/dev/null';
	command_ok([ $terraform, 'fmt', '-check', "$byoc/terraform" ], 'terraform fmt');

	# what needs AWS's provider is left out; the rest Terraform evaluates itself
	my $dir = PostgreSQL::Test::Utils::tempdir('terraform');
	my $text = join "\n", slurp_file("$byoc/terraform/main.tf") =~ /^((?:variable|locals) .*?^\}\n)/msg;
	$text =~ s/(data\.aws_[a-z_.]+|aws_iam_role\.instance\.arn)/"$references{$1}"/g for $text;
	$text =~ s/\$\{"([^"]*)"\}/$1/g;
	append_to_file("$dir/main.tf", $text . join '', map { "output \"$_\" {\n  value = local.$_\n}\n" } sort keys %same);
	my @arguments = map { /^var\.(.*)/ ? "-var=$1=$references{$_}" : () } sort keys %references;
	my $out;
	IPC::Run::run([ $terraform, "-chdir=$dir", 'init', '-input=false' ], '>', \$out, '2>&1') && IPC::Run::run([ $terraform, "-chdir=$dir", 'apply', '-auto-approve', '-input=false', @arguments ], '>', \$out, '2>&1') or die $out;
	IPC::Run::run([ $terraform, "-chdir=$dir", 'output', '-json' ], '>', \$out) or die;
	is_deeply({ map { $_ => decode_json($out)->{$_}{value} } keys %same }, \%same, 'and Terraform reads it so');
}

# ---- the main job ----

my $full = user_with('agentvm-full', $output{PolicyArn});
account([ 'ec2', 'create_key_pair', { KeyName => 'operators' } ]);
my %options = (instance_profile => $output{InstanceProfile}, key_name => 'operators');
ec2_team($node, 'acme', $moto, secrets => $full, options => \%options);
like($node->safe_psql('postgres', "SELECT agentvm.check_provider('acme')"), qr/"ok": true/, 'check_provider() is content');
my $session = launch($node, 'acme', 'ready');
my $vm = column($node, $session, 'vm_id');
my ($seen) = $moto->for_session($session);
is("$seen->{state} $seen->{market} $seen->{tags}{'agentvm-cluster'}", "running spot $cluster", 'a VM runs, launched with these rights only');
my %pausable = map { $_ => launch($node, 'acme', 'ready', "options => '{$_}'") } '"spot": false', '"spot_persistent": true';
like($node->safe_psql('postgres', "SELECT agentvm.inspect('$session')"), qr/"state": "running"/, 'and can be looked at');
foreach my $case ([ 'pause', 'paused', 'stopped' ], [ 'resume', 'ready', 'running' ])
{
	my ($way, $state, $instance) = @$case;
	$node->safe_psql('postgres', "SELECT agentvm.$way('$_')") for values %pausable;
	hurry_to($node, $_, $state) for values %pausable;
	is(join(' ', map { $_->{state} } $moto->for_session($pausable{$_})), $instance, "$way(): $_") for sort keys %pausable;
}
$node->safe_psql('postgres', "SELECT agentvm.terminate('$_')") for $session, values %pausable;
await_state($node, $_, 'terminated') for $session, values %pausable;
is(scalar $moto->running, 0, 'and ended');

# ---- one right less ----

# The policy without an action of a statement, or without one of several resources: a team with such keys
my %team;
sub less
{
	my ($sid, $what) = @_;
	my $less = copy($policy);
	my ($statement) = grep { $_->{Sid} eq $sid } @{ $less->{Statement} };
	my $member = $what =~ /^arn:/ ? 'Resource' : 'Action';
	$statement->{$member} = [ grep { $_ ne $what } list($statement->{$member}) ];
	$less->{Statement} = [ grep { $_->{Sid} ne $sid } @{ $less->{Statement} } ] unless @{ $statement->{$member} };
	my $name = 'less' . keys %team;
	my $keys = user_with($name, $less);
	ec2_team($node, $name, $moto, secrets => $keys, options => \%options);
	$team{$name} = $keys;
	return ($name, $keys);
}

# What the launch asks for, and the Sid that gives it
my @launch = map { [ 'LaunchFrom', $_, 'ec2:RunInstances', qr{\Q${\ (/([a-z-]+)\/\*$/)[0]}\E/} ] } list((grep { $_->{Sid} eq 'LaunchFrom' } @{ $policy->{Statement} })[0]{Resource});
push @launch, [ 'LaunchInstance', 'ec2:RunInstances', 'ec2:RunInstances', qr{instance/} ], [ 'LaunchVolume', 'ec2:RunInstances', 'ec2:RunInstances', qr{volume/} ],
  [ 'TagAtLaunch', 'ec2:CreateTags', 'ec2:CreateTags', qr{instance/} ],
  [ 'TagAtLaunch', (grep { /spot/ } list((grep { $_->{Sid} eq 'TagAtLaunch' } @{ $policy->{Statement} })[0]{Resource})), 'ec2:CreateTags', qr{spot-instances-request/} ], [ 'PassInstanceRole', 'iam:PassRole', 'iam:PassRole', qr{role/} ];
my %tried;
my $persistent = q{options => '{"spot_persistent": true}'};
foreach my $case (@launch)
{
	my ($sid, $without, $action, $resource) = @$case;
	$tried{"$sid $action"} = 1;
	my ($team) = less($sid, $without);
	$session = launch($node, $team, 'failed', $persistent);
	like(state_of($node, $session), qr/^failed invalid_credentials UnauthorizedOperation: .* is not authorized to perform: $action on resource: \S*$resource/,
		"without $sid $without: the launch is refused, and the row says what is missing");
	fails_with($node, "SELECT agentvm.wait('$session', timeout => '9 seconds')", 'AV001', qr/\Q$action\E/, 'wait() says AV001 and names it');
}
is(scalar $moto->running, 0, 'and nothing was launched');

$tried{'Look ec2:DescribeInstances'} = 1;
my ($team) = less('Look', 'ec2:DescribeInstances');
$session = launch($node, $team, 'failed');
like(state_of($node, $session), qr/^failed invalid_credentials UnauthorizedOperation: .*ec2:DescribeInstances/, 'without ec2:DescribeInstances: a launch cannot be followed');
is(scalar $moto->running, 0, 'and its VM is ended');

foreach my $case ([ 'OwnInstances', 'ec2:TerminateInstances' ], [ 'OwnSpotRequests', 'ec2:CancelSpotInstanceRequests', $persistent ])
{
	my ($sid, $right, @options) = @$case;
	$tried{"$sid $right"} = 1;
	($team) = less($sid, $right);
	$session = launch($node, $team, 'ready', @options);
	$node->safe_psql('postgres', "SELECT agentvm.terminate('$session')");
	await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$session' AND detail::text ~ 'not authorized to perform: $right'", 't',
		name => "without $right: the events say so");
	is(state_of($node, $session) =~ /^terminating/ && scalar $moto->running, 1, 'the session has not ended, nor its VM');
	account([ 'iam', 'put_user_policy', { UserName => $team, PolicyName => 'it', PolicyDocument => encode_json($policy) } ]);
	hurry_to($node, $session, 'terminated');
	is(scalar $moto->running, 0, 'until the right is there');
}

foreach my $case ([ 'ec2:StopInstances', 'pause', 'ready', 'paused' ], [ 'ec2:StartInstances', 'resume', 'paused', 'ready' ])
{
	my ($right, $way, $before, $after) = @$case;
	$tried{"OwnInstances $right"} = 1;
	my ($team) = less('OwnInstances', $right);
	my $session = launch($node, $team, 'ready', "options => '{\"spot\": false}'");
	$node->safe_psql('postgres', "SELECT agentvm.pause('$session')") if $way eq 'resume';
	hurry_to($node, $session, $before);
	$node->safe_psql('postgres', "SELECT agentvm.$way('$session')");
	hurry_to($node, $session, "$before UnauthorizedOperation: .* is not authorized to perform: $right");
	account([ 'iam', 'put_user_policy', { UserName => $team, PolicyName => 'it', PolicyDocument => encode_json($policy) } ]);
	$node->safe_psql('postgres', "SELECT agentvm.$way('$session')");
	hurry_to($node, $session, $after);
	$node->safe_psql('postgres', "SELECT agentvm.terminate('$session')");
	hurry_to($node, $session, 'terminated');
}

# What the calls of the provider do not tell apart, asked directly
sub may { my ($keys, @calls) = @_; return map { $_->{error} ? "$_->{error}: $_->{message}" : 'yes' } $moto->calls(map { [ $keys, @$_ ] } @calls); }
my $parameter = { Name => "/agentvm/$cluster/$session", Value => 'x', Type => 'SecureString' };
my %launch = (
	ImageId => $moto->cloud->{image_id}, InstanceType => 't3.micro', MinCount => 1, MaxCount => 1, SubnetId => $moto->cloud->{subnet_ids}[0],
	SecurityGroupIds => $moto->cloud->{security_group_ids}, MetadataOptions => { HttpTokens => 'required' });
sub tagged
{
	my (%tags) = @_;
	my @tags = map { { Key => $_, Value => $tags{$_} } } sort keys %tags;
	return (TagSpecifications => [ map { { ResourceType => $_, Tags => \@tags } } qw(instance volume spot-instances-request) ],
		InstanceMarketOptions => { MarketType => 'spot', SpotOptions => { SpotInstanceType => 'persistent', InstanceInterruptionBehavior => 'stop' } });
}
my %ours = ('agentvm-managed-by' => 'agentvm', 'agentvm-cluster' => $cluster);
my ($answer) = $moto->calls([ $full, 'ec2', 'run_instances', { %launch, tagged(%ours) } ]);
my ($own, $own_request) = @{ $answer->{Instances}[0] }{qw(InstanceId SpotInstanceRequestId)};
my @calls = (
	[ 'StartSecrets', 'ssm:PutParameter', 'ssm', 'put_parameter', $parameter ],
	[ 'StartSecrets', 'ssm:DeleteParameter', 'ssm', 'delete_parameter', { Name => $parameter->{Name} } ],
	[ 'SpotRole', 'iam:CreateServiceLinkedRole', 'iam', 'create_service_linked_role', { AWSServiceName => 'spot.amazonaws.com' } ],
	[ 'Explain', 'sts:DecodeAuthorizationMessage', 'sts', 'decode_authorization_message', { EncodedMessage => 'x' } ]);
foreach my $case (@calls)
{
	my ($sid, $action, @call) = @$case;
	$tried{"$sid $action"} = 1;
	my (undef, $keys) = less($sid, $action);
	like((may($keys, \@call))[0], qr/not authorized to perform: $action /, "without $action: refused");
	# the test cloud has nothing to decode
	like((may($full, \@call))[0], $action =~ /Decode/ ? qr/^(?!.*not authorized)/s : qr/^yes$/, 'with it: done');
}
is_deeply([ sort keys %tried ], [ sort map { my $statement = $_; map { "$statement->{Sid} $_" } list($statement->{Action}) } @{ $policy->{Statement} } ],
	'that was every action of the policy');

# ---- and no more than that ----

my ($foreign, $plain) = map { $_->{Instances}[0] } (account(
	[ 'ec2', 'run_instances', { %launch, tagged(%ours, 'agentvm-cluster' => 'c' x 36) } ],
	[ 'ec2', 'run_instances', { %launch, tagged('name' => 'x') } ],
	[ 'iam', 'create_role', { RoleName => 'admin', AssumeRolePolicyDocument => encode_json($instance_role->{AssumeRolePolicyDocument}) } ],
	[ 'iam', 'create_instance_profile', { InstanceProfileName => 'admin' } ],
	[ 'iam', 'add_role_to_instance_profile', { InstanceProfileName => 'admin', RoleName => 'admin' } ],
	[ 'ssm', 'put_parameter', { %$parameter, Name => '/app/password' } ]))[ 0, 1 ];
my ($foreign_request, $plain_request) = map { $_->{SpotInstanceRequestId} } $foreign, $plain;
($foreign, $plain) = map { $_->{InstanceId} } $foreign, $plain;
my %refused = (
	"cancelling another installation's request" => [ 'ec2', 'cancel_spot_instance_requests', { SpotInstanceRequestIds => [$foreign_request] } ],
	'cancelling a request of the account' => [ 'ec2', 'cancel_spot_instance_requests', { SpotInstanceRequestIds => [$plain_request] } ],
	'cancelling its own request together with one of the account' => [ 'ec2', 'cancel_spot_instance_requests', { SpotInstanceRequestIds => [ $own_request, $plain_request ] } ],
	'making a request look like its own' => [ 'ec2', 'create_tags', { Resources => [$plain_request], Tags => [ map { { Key => $_, Value => $ours{$_} } } sort keys %ours ] } ],
	(map { my $method = $_; ("$method of another installation's VM" => [ 'ec2', $method, { InstanceIds => [$foreign] } ], "$method of a VM of the account" => [ 'ec2', $method, { InstanceIds => [$plain] } ],
		"$method of its own VM together with a VM of the account" => [ 'ec2', $method, { InstanceIds => [ $own, $plain ] } ]) } qw(terminate_instances stop_instances start_instances)),
	'making a VM look like its own' => [ 'ec2', 'create_tags', { Resources => [$plain], Tags => [ map { { Key => $_, Value => $ours{$_} } } sort keys %ours ] } ],
	'changing tags of its own VM' => [ 'ec2', 'create_tags', { Resources => [$own], Tags => [ map { { Key => $_, Value => $ours{$_} } } sort keys %ours ] } ],
	'a launch without tags' => [ 'ec2', 'run_instances', {%launch} ],
	'a launch for another installation' => [ 'ec2', 'run_instances', { %launch, tagged(%ours, 'agentvm-cluster' => 'c' x 36) } ],
	'a launch with a tag that means something to others' => [ 'ec2', 'run_instances', { %launch, tagged(%ours, 'cost-center' => '1') } ],
	'a launch with IMDSv1' => [ 'ec2', 'run_instances', { %launch, tagged(%ours), MetadataOptions => { HttpTokens => 'optional' } } ],
	'a launch with another role' => [ 'ec2', 'run_instances', { %launch, tagged(%ours), IamInstanceProfile => { Name => 'admin' } } ],
	'reading user data' => [ 'ec2', 'describe_instance_attribute', { InstanceId => $plain, Attribute => 'userData' } ],
	'reading a start secret' => [ 'ssm', 'get_parameter', { Name => $parameter->{Name} } ],
	"writing another installation's" => [ 'ssm', 'put_parameter', { %$parameter, Name => '/agentvm/' . 'c' x 36 . '/x' } ],
	'writing any other parameter' => [ 'ssm', 'put_parameter', { %$parameter, Name => '/app/password' } ],
	'deleting any other parameter' => [ 'ssm', 'delete_parameter', { Name => '/app/password' } ],
	'a role for another service' => [ 'iam', 'create_service_linked_role', { AWSServiceName => 'ecs.amazonaws.com' } ],
	'making a user' => [ 'iam', 'create_user', { UserName => 'x' } ]);
sub refuses
{
	my ($keys, $name, %calls) = @_;
	my @names = sort keys %calls;
	my @answers = may($keys, @calls{@names});
	like($answers[$_], qr/^(UnauthorizedOperation|AccessDenied\w*): .*not authorized to perform/, "$name: $names[$_]") for 0 .. $#names;
	return;
}
refuses($full, 'refused', %refused);
is(join(' ', may($full, [ 'ec2', 'cancel_spot_instance_requests', { SpotInstanceRequestIds => [$own_request] } ], [ 'ec2', 'terminate_instances', { InstanceIds => [$own] } ])), 'yes yes', 'its own VM it may end, and the request before');

# A VM reads what it knows the name of, and nothing else
account([ 'ssm', 'put_parameter', $parameter ]);
my $inside = user_with('inside', $instance_policy);
is((may($inside, [ 'ssm', 'get_parameter', { Name => $parameter->{Name}, WithDecryption => JSON::PP::true } ]))[0], 'yes', 'a VM may read its start secret');
refuses($inside, 'a VM may not',
	'another parameter' => [ 'ssm', 'get_parameter', { Name => '/app/password' } ],
	'a list of names' => [ 'ssm', 'describe_parameters', {} ],
	'all below a path' => [ 'ssm', 'get_parameters_by_path', { Path => "/agentvm/$cluster" } ],
	'several at once' => [ 'ssm', 'get_parameters', { Names => [ $parameter->{Name} ] } ],
	'writing' => [ 'ssm', 'put_parameter', { %$parameter, Overwrite => JSON::PP::true } ],
	'deleting' => [ 'ssm', 'delete_parameter', { Name => $parameter->{Name} } ],
	'instances' => [ 'ec2', 'describe_instances', {} ]);

# ---- the role ----

my %role = (RoleArn => $output{RoleArn}, RoleSessionName => 'session');
my ($good, @bad) = $moto->calls(
	[ $platform, 'sts', 'assume_role', { %role, ExternalId => $external_id } ], [ $platform, 'sts', 'assume_role', {%role} ],
	[ $platform, 'sts', 'assume_role', { %role, ExternalId => 'external-id-of-other' } ], [ $stranger, 'sts', 'assume_role', { %role, ExternalId => $external_id } ]);
my $credentials = $good->{Credentials};
ok($credentials, 'the control plane assumes the role with the external id');
like($bad[$_]{message} // '', qr/not authorized to perform: sts:AssumeRole/, ('not without', 'not with that of another team', 'and nobody else does')[$_]) for 0 .. 2;
my $assumed = { access_key_id => $credentials->{AccessKeyId}, secret_access_key => $credentials->{SecretAccessKey}, session_token => $credentials->{SessionToken} };
ec2_team($node, 'assumed', $moto, secrets => $assumed, options => \%options);
$session = launch($node, 'assumed', 'ready');
$node->safe_psql('postgres', "SELECT agentvm.terminate('$session')");
await_state($node, $session, 'terminated');
refuses($assumed, 'refused with its keys', %refused);
log_lacks($node, $full->{secret_access_key});
done_testing();
