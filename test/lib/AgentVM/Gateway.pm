# The real gateway, in front of a cluster.
#
#	my $gateway = AgentVM::Gateway->new($node);                           # plain HTTP on a free port of 127.0.0.1, started
#	my $gateway = AgentVM::Gateway->new($node, tls => [$certificate, $key]);
#	my $gateway = AgentVM::Gateway->new($node, port => 8443);             # that port
#	my $gateway = AgentVM::Gateway->new($node, options => ['--vm-sockets', $dir]);
#	$gateway->stop('KILL'); $gateway->start;                              # the same port again
package AgentVM::Gateway;

use strict;
use warnings;
use parent 'AgentVM::Process';
use File::Basename qw(dirname);
use HTTP::Tiny;
use PostgreSQL::Test::Cluster;
use Time::HiRes qw(sleep time);

sub new
{
	my ($class, $node, %opt) = @_;
	my $port = $opt{port} // PostgreSQL::Test::Cluster::get_free_port();
	my $self = $class->SUPER::new('gateway', dirname(__FILE__) . '/../../../src/gateway/agentvm-gateway', '--database', $node->connstr('postgres') . ' user=gw',
		'--port', $port, '--unauthenticated-rate', 1000, '--log-level', 'debug', $opt{tls} ? ('--tls-cert', $opt{tls}[0], '--tls-key', $opt{tls}[1]) : (), @{ $opt{options} // [] });
	$self->{port} = $port;
	$self->{url} = ($opt{tls} ? 'https' : 'http') . "://127.0.0.1:$port";
	$node->safe_psql('postgres', "DO \$\$ BEGIN IF to_regrole('gw') IS NULL THEN CREATE ROLE gw LOGIN IN ROLE agentvm_gateway; END IF; END \$\$");
	$self->start;
	return $self;
}

sub url { return $_[0]{url}; }
sub port { return $_[0]{port}; }

# Returns when it has the database
sub start
{
	my ($self) = @_;
	$self->SUPER::start;
	my $end = time + AgentVM::Process::timeout();
	my $http = HTTP::Tiny->new(timeout => 5, verify_SSL => 0);
	until ($self->{url} =~ /^https/ ? $self->output(from_start => 1) =~ /database is there/ : $http->get("$self->{url}/readyz")->{success})
	{
		die 'gateway does not get ready: ' . $self->output if time > $end || !$self->is_running;
		sleep 0.05;
	}
	return $self;
}

1;
