# The providers "blocking" and "placed" of test/modules/agentvm_test_blocking.c: a VM is a file, a call can hang.
#
#	my $blocking = AgentVM::Blocking->new($node);                  # a directory for the VMs
#	my $node = new_node('main', conf => AgentVM::Blocking::conf());
#	provision($node, 'acme', $blocking->with(hang => 'create'));   # arguments of provision()
#	$blocking->release;                                            # hanging calls come back, and none hangs any more
package AgentVM::Blocking;

use strict;
use warnings;
use AgentVM::Test;
use Exporter 'import';
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

our @EXPORT = qw(prompt);

sub conf { return "agentvm.provider_libraries = 'agentvm_test_blocking'\n"; }

sub new
{
	my ($class, $node) = @_;
	my $self = bless { node => $node, dir => $node->basedir . '/vms' }, $class;
	-d $self->{dir} || mkdir $self->{dir} or die "could not make $self->{dir}: $!";
	return $self;
}

sub dir { return $_[0]{dir}; }

sub options { my ($self, %options) = @_; return json({ directory => $self->{dir}, %options }); }

sub with { my ($self, %options) = @_; return ("provider => 'blocking'", 'options => ' . $self->options(%options)); }

# What a VM has been through ("made\n" for each create), or 'none'
sub vm
{
	my ($self, $session) = @_;
	return -e "$self->{dir}/$session.vm" ? slurp_file("$self->{dir}/$session.vm") : 'none';
}
sub vms { my ($self) = @_; my @vms = glob "$self->{dir}/*.vm"; return scalar @vms; }

sub release { my ($self) = @_; append_to_file("$self->{dir}/go", ''); return; }
sub hang_again { my ($self) = @_; unlink "$self->{dir}/go"; return; }

# The runner of a database, as stat_dispatcher has it
sub runner { my ($self, $what, $dbname) = @_; return $self->{node}->safe_psql($dbname // 'postgres', "SELECT $what FROM agentvm.stat_dispatcher WHERE kind = 'runner'"); }

sub await_runner
{
	my ($self, $condition, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return await($self->{node}, "SELECT coalesce(bool_and($condition), false) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 't', name => $name // "the runner has $condition", timeout => 120);
}

# SQL that must be done (or fail with the SQLSTATE) within so many seconds
sub prompt
{
	my ($node, $sql, $seconds, $name, $sqlstate, %opt) = @_;
	my $started = time;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$sqlstate ? fails_with($node, $sql, $sqlstate, undef, $name, %opt) : psql_ok($node, $sql, $name, %opt);
	my $took = time - $started;
	return cmp_ok($took, '<', $seconds, sprintf('in %.2f s', $took));
}

1;
