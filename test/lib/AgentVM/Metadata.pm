# The metadata service of an EC2 machine, or what stands in for it (see test/lib/metadata.py), ended with the test.
#
#	my $machine = AgentVM::Metadata->new(role => 'server', document => role_document($keys));
#	local $ENV{AWS_EC2_METADATA_SERVICE_ENDPOINT} = $machine->endpoint;
#	$machine->set(seconds => 1);          # how it is from now on, see metadata.py
#	$machine->requests;                   # {method, path, status, headers => {...}}
package AgentVM::Metadata;

use strict;
use warnings;
use File::Basename qw(dirname);
use IPC::Run;
use JSON::PP;
use POSIX qw(strftime);
use PostgreSQL::Test::Utils ();
use Time::HiRes qw(sleep time);

my @started;

# What the page of a role has, for keys as AssumeRole gives them, good for so many seconds
sub role_document
{
	my ($keys, $seconds) = @_;
	return { Code => 'Success', Type => 'AWS-HMAC', AccessKeyId => $keys->{AccessKeyId}, SecretAccessKey => $keys->{SecretAccessKey}, Token => $keys->{SessionToken},
		LastUpdated => '2020-01-01T00:00:00Z', Expiration => strftime('%Y-%m-%dT%H:%M:%SZ', gmtime(time + ($seconds // 6 * 3600))) };
}

sub new
{
	my ($class, %machine) = @_;
	my $self = bless { dir => PostgreSQL::Test::Utils::tempdir('machine'), machine => {} }, $class;
	my $venv = $ENV{AGENTVM_VENV} or die 'AGENTVM_VENV is not set: run this by test/run or make check-tap';
	$self->set(%machine);
	$self->{process} = IPC::Run::start([ "$venv/bin/python", dirname(__FILE__) . '/../metadata.py', $self->{dir} ], '<', \undef, '>', \$self->{out}, '2>', \$self->{err});
	my $end = time + 60;
	while (($self->{out} // '') !~ /\n/)
	{
		die "metadata.py: $self->{err}" if time > $end || !$self->{process}->pumpable;
		$self->{process}->pump_nb;
		sleep 0.01;
	}
	chomp($self->{endpoint} = $self->{out});
	push @started, $self;
	return $self;
}

sub endpoint { return $_[0]{endpoint}; }

sub set
{
	my ($self, %machine) = @_;
	$self->{machine} = { %{ $self->{machine} }, %machine };
	open(my $file, '>', "$self->{dir}/machine.new") or die "could not write: $!";
	print $file encode_json($self->{machine});
	close $file;
	rename "$self->{dir}/machine.new", "$self->{dir}/machine.json" or die "could not rename: $!";
	return;
}

sub requests
{
	my ($self) = @_;
	my $log = "$self->{dir}/requests.log";
	return -e $log ? map { decode_json($_) } split /\n/, PostgreSQL::Test::Utils::slurp_file($log) : ();
}

sub stop
{
	my ($self) = @_;
	return if $self->{stopped}++;
	$self->{process}->kill_kill(grace => 5);
	return;
}

END { my $code = $?; $_->stop for @started; $? = $code; }

1;
