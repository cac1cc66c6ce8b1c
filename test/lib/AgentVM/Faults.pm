# nginx in front of the test cloud, which fails on command and counts (see test/faults/faults.lua for the modes).
#
#	my $faults = AgentVM::Faults->new($moto);             # without $moto: answers from a can
#	my $node = new_node('main', moto => $faults);         # in the cloud's place
#	$faults->set(mode => 'capacity', action => 'RunInstances', market => 'spot', n => 3);
#	$faults->set(mode => 'lost', action => 'RunInstances', n => 1);
#	$faults->set(mode => 'slow', chance => 5);            # five of a hundred calls; $faults->seed(42) to know which
#	$faults->counts->{cloud}{RunInstances};               # received, cloud (went through), faulted, replayed, mismatched, launched (tokens)
#	my @calls = $faults->requests('RunInstances');        # {at, seconds, status, outcome, args => {ClientToken => ...}}
package AgentVM::Faults;

use strict;
use warnings;
use File::Basename qw(dirname);
use HTTP::Tiny;
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Utils ();

my @started;

sub new
{
	my ($class, $moto) = @_;
	my $self = bless { dir => PostgreSQL::Test::Utils::tempdir('faults'), moto => $moto }, $class;
	my @command = (dirname(__FILE__) . '/../../faults/start', $self->{dir}, $moto ? $moto->endpoint : ());
	my ($out, $error);
	IPC::Run::run(\@command, '<', \undef, '>', \$out, '2>', \$error) or die "could not start nginx: $error";
	chomp($self->{endpoint} = $out);
	push @started, $self;
	return $self;
}

sub endpoint { return $_[0]{endpoint}; }

# For set_ec2: the cloud's own, or when canned such as look right
sub options
{
	my ($self) = @_;
	return $self->{moto}->options if $self->{moto};
	return {
		region => 'us-east-1', image_id => 'ami-12345678', instance_type => 't3.micro',
		subnet_ids => ['subnet-12345678'], security_group_ids => ['sg-12345678']
	};
}

sub secrets
{
	my ($self) = @_;
	return $self->{moto}->secrets if $self->{moto};
	return { access_key_id => 'AKIAIOSFODNN7EXAMPLE', secret_access_key => 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY' };
}

sub control
{
	my ($self, $command, %arguments) = @_;
	my $http = HTTP::Tiny->new(timeout => 10);
	my $form = join '&', map { "$_=" . $arguments{$_} =~ s/([^0-9A-Za-z])/sprintf '%%%02X', ord $1/ger } keys %arguments;
	my $reply = $http->post("$self->{endpoint}/_faults/$command", { content => $form });
	die "faults $command: $reply->{status} $reply->{content}" unless $reply->{success};
	return $reply->{content};
}

sub set   { my ($self, %rule) = @_; $self->control('set', %rule); return; }
sub seed  { my ($self, $seed) = @_; $self->control('seed', seed => $seed); return; }
sub clear { my ($self) = @_; $self->control('clear'); return; }
sub reset { my ($self) = @_; $self->control('reset'); return; }

# {received => {Action => n}, cloud => ..., faulted => ..., replayed => ..., mismatched => ...}
sub counts { my ($self) = @_; return decode_json($self->control('counts')); }

# How many calls of an action reached us; with a kind, how many of that kind
sub count { my ($self, $action, $kind) = @_; return $self->counts->{ $kind // 'received' }{$action} // 0; }

# What was asked for, in order of completion; with an action, only those
sub requests
{
	my ($self, $action) = @_;
	my @requests = map { decode_json($_) } split /\n/, PostgreSQL::Test::Utils::slurp_file("$self->{dir}/requests.log");
	foreach my $request (@requests)
	{
		my $body = delete $request->{body};
		$request->{args} = $body =~ /^\{/ ? decode_json($body) : { map { map { s/\+/ /gr =~ s/%([0-9A-Fa-f]{2})/chr hex $1/ger } split(/=/, $_, 2) } split(/&/, $body) };
	}
	return grep { !$action || $_->{action} eq $action } @requests;
}

sub stop
{
	my ($self) = @_;
	return if $self->{stopped}++;
	kill 'TERM', PostgreSQL::Test::Utils::slurp_file("$self->{dir}/nginx.pid") =~ /(\d+)/;
	return;
}

END { my $code = $?; $_->stop for @started; $? = $code; }

1;
