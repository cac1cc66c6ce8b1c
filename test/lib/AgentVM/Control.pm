# A gateway's control listener and the runtimes behind it, as test/clients/control.py plays them; and sessions that it has.
#
#	my $control = AgentVM::Control->new($node);          # gateway gw1, registered in database postgres
#	my $session = $control->session('acme');             # ready, and at this gateway
#	$control->faults({ op => 'start', do => 'lose' });   # what goes wrong from here on; none: nothing
#	$control->calls($session, 'start');                  # the headers of calls so far, each with {at}, {length}, {connection}
#	$control->dir;                                       # where relative paths in the VMs are
package AgentVM::Control;

use strict;
use warnings;
use parent 'AgentVM::Process';
use AgentVM::Runtime;
use AgentVM::Test;
use File::Basename qw(dirname);
use JSON::PP;
use PostgreSQL::Test::Utils ();

sub new
{
	my ($class, $node, %opt) = @_;
	my $name = $opt{name} // 'gw1';
	my $dir = PostgreSQL::Test::Utils::tempdir_short();
	my $socket = "$dir/control.sock";
	my $self = $class->SUPER::new("control_$name", "$ENV{AGENTVM_VENV}/bin/python", dirname(__FILE__) . '/../../clients/control.py', $socket, $node->basedir . '/keys', $name, $dir);
	@$self{qw(node gateway dir socket dbname)} = ($node, $name, $dir, $socket, $opt{dbname} // 'postgres');
	$node->safe_psql($self->{dbname}, "INSERT INTO agentvm.gateway (gateway_id, control_address) VALUES ('$name', 'unix:$socket')") unless $opt{unregistered};
	$self->faults;
	$self->start;
	return $self;
}

sub dir { return $_[0]{dir}; }
sub socket { return $_[0]{socket}; }

sub start
{
	my ($self) = @_;
	$self->SUPER::start;
	$self->says(qr/^ready$/m, "$self->{name} listens");
	return $self;
}

sub faults
{
	my ($self, @faults) = @_;
	my $file = "$self->{dir}/faults";
	open(my $out, '>', "$file.new") or die "could not write $file: $!";
	print {$out} encode_json(\@faults);
	close($out) or die "could not write $file: $!";
	rename("$file.new", $file) or die "could not rename $file: $!";
	return;
}

# All that has been logged; a mark to begin from is a number of lines
sub logged
{
	my ($self, $from) = @_;
	return () unless -e "$self->{dir}/log";
	my @lines = split(/\n/, PostgreSQL::Test::Utils::slurp_file("$self->{dir}/log"));
	return map { decode_json($_) } @lines[ ($from // 0) .. $#lines ];
}

sub mark { my ($self) = @_; return scalar(my @all = $self->logged); }

sub calls
{
	my ($self, $session, $op, $from) = @_;
	return map { { %{ $_->{header} }, at => $_->{at}, length => $_->{bytes}, connection => $_->{connection} } }
	  grep { $_->{event} eq 'call' && (!$session || $_->{session} eq $session) && (!$op || $_->{header}{op} eq $op) } $self->logged($from);
}

# A session that is ready, without one of the functions under test
sub session
{
	my ($self, $team, @arguments) = @_;
	my $session = provision($self->{node}, $team, q{options => '{"runtime": true}'}, @arguments);
	$self->{node}->poll_query_until('postgres', "SELECT running FROM agentvm.session WHERE session_id = '$session'") or die "$session does not run";
	bootstrap($self->{node}, $session);
	$self->attach($session);
	return $session;
}

# The gateway has the channels of these sessions now, as agentvm.attach() has it
sub attach
{
	my ($self, @sessions) = @_;
	my $list = join(',', @sessions);
	$self->{node}->safe_psql($self->{dbname}, "UPDATE agentvm.session_heartbeat SET gateway_id = '$self->{gateway}' WHERE session_id = ANY ('{$list}')");
	return;
}

1;
