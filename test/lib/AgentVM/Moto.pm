# The test cloud (see test/lib/cloud.py), ended with the test.
#
#	my $moto = AgentVM::Moto->new;                        # ->new('name', '--iam'): with IAM as AWS evaluates it
#	$moto->endpoint; $moto->options; $moto->secrets;      # for agentvm.aws_endpoint_url and set_provider (Test's set_ec2)
#	$moto->instances; $moto->running; $moto->for_session($uuid);   # lists of {id, state, market, subnet, zone, token, tags}
package AgentVM::Moto;

use strict;
use warnings;
use File::Basename qw(dirname);
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Utils ();
use Test::More ();

my @started;

sub new
{
	my ($class, $name, @options) = @_;
	my $self = bless { dir => PostgreSQL::Test::Utils::tempdir($name // 'moto') }, $class;
	push @started, $self;
	$self->{cloud} = $self->run('start', @options);
	return $self;
}

# A command of cloud.py; what it answers
sub run
{
	my ($self, $command, @arguments) = @_;
	my $venv = $ENV{AGENTVM_VENV} or die 'AGENTVM_VENV is not set: run this by test/run or make check-tap';
	my @command = ("$venv/bin/python", dirname(__FILE__) . '/../cloud.py', $command, $self->{dir}, @arguments);
	my ($out, $error);
	IPC::Run::run(\@command, '<', \undef, '>', \$out, '2>', \$error) or die "cloud.py $command: $error";
	return $out =~ /^[\[{]/ ? decode_json($out) : $out;
}

sub endpoint { return $_[0]{cloud}{endpoint}; }
sub cloud    { return $_[0]{cloud}; }
sub secrets  { my $cloud = $_[0]{cloud}; return { map { $_ => $cloud->{$_} } qw(access_key_id secret_access_key) }; }

sub options
{
	my $cloud = $_[0]{cloud};
	return { map { $_ => $cloud->{$_} } qw(region image_id instance_type subnet_ids security_group_ids) };
}

sub instances { return @{ $_[0]->run('instances') }; }
sub running   { return @{ $_[0]->run('instances', '--running') }; }
sub for_session { my ($self, $session) = @_; return grep { ($_->{tags}{'agentvm-session-id'} // '') eq $session } $self->instances; }

sub user_data { my ($self, $id) = @_; return $self->run('user-data', $id); }
sub files     { my ($self, $id) = @_; return $self->run('files',     $id); }
sub terminate { my ($self, @ids) = @_; return $self->run('terminate', @ids); }

# Another account of that number: what set_ec2 and ec2_team take, (options => ..., secrets => ...)
sub account
{
	my ($self, $number) = @_;
	my $cloud = $self->run('account', $number);
	return (options => options({ cloud => $cloud }), secrets => secrets({ cloud => $cloud }));
}

# Keys of a user who may only do these: $moto->user('ec2:DescribeInstances')
sub user { my ($self, @actions) = @_; return $self->run('user', @actions); }

# A role that may only do these; its ARN
sub role { my ($self, $name, @actions) = @_; return $self->run('role', $name, @actions) =~ s/\s+$//r; }

# Boto3 calls, [keys as user() returns them or undef for ours, service, method, arguments]; what they answer, or {error, message}
sub calls { my ($self, @calls) = @_; return @{ $self->run('calls', encode_json(\@calls)) }; }

# Forget all instances. The keys, subnets and groups are new ones: call set_ec2 again
sub reset { my ($self) = @_; $self->{cloud} = $self->run('reset'); return; }

sub stop
{
	my ($self) = @_;
	kill 'TERM', delete $self->{cloud}{pid} if $self->{cloud}{pid};
	return;
}

END { my $code = $?; $_->stop for @started; $? = $code; }

1;
