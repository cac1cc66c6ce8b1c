# A psql that stays connected, for what needs a transaction held open or a statement under way.
#
#	my $alice = AgentVM::Client->new($node);
#	$alice->run('BEGIN'); $alice->run("SELECT agentvm.terminate('$session')");   # waits; the output, dies on an error
#	$alice->send("SELECT agentvm.wait('$session')");                            # does not wait
#	is($alice->answer, 'ready'); $alice->error; $alice->seconds;                # of what was sent
#	$alice->pid; $alice->busy; $alice->quit;
package AgentVM::Client;

use strict;
use warnings;
use IPC::Run;
use PostgreSQL::Test::Utils ();
use Time::HiRes qw(sleep time);

sub new
{
	my ($class, $node, %opt) = @_;
	my $self = bless { in => '', out => '', err => '', count => 0, node => $node }, $class;
	my @command = ('psql', '-XAtq', '-v', 'VERBOSITY=verbose', '-d', $node->connstr($opt{dbname} // 'postgres'));
	$self->{psql} = IPC::Run::start(\@command, '<', \$self->{in}, '>', \$self->{out}, '2>', \$self->{err});
	$self->{pid} = $self->run('SELECT pg_backend_pid()');
	return $self;
}

sub pid   { return $_[0]{pid}; }
sub error { return $_[0]{error}; }

# Begin a statement
sub send
{
	my ($self, $sql) = @_;
	my $mark = 'done ' . ++$self->{count};
	@$self{ 'out', 'err', 'sent_at' } = ('', '', time);
	$self->{in} .= "$sql\n;\n\\echo $mark\n\\warn $mark\n";
	$self->{psql}->pump_nb;
	return;
}

# Whether it is still under way
sub busy
{
	my ($self) = @_;
	my $mark = "done $self->{count}\n";
	$self->{psql}->pump_nb;
	return $self->{out} !~ /^$mark/m || $self->{err} !~ /^$mark/m;
}

# What it has answered, when it has; undef after 60 s
sub answer
{
	my ($self) = @_;
	my $end = time + 60;
	while ($self->busy)
	{
		return if time > $end;
		sleep 0.005;
	}
	$self->{seconds} = time - $self->{sent_at};
	my $answer = $self->{out} =~ s/^done \d+\n//mr;
	$self->{error} = $self->{err} =~ s/^done \d+\n//mr;
	chomp $answer;
	return $answer;
}
sub seconds { return $_[0]{seconds}; }

sub run
{
	my ($self, $sql) = @_;
	$self->send($sql);
	my $answer = $self->answer;
	die "$sql: " . ($self->{error} // 'no answer') if !defined $answer || $self->{error} =~ /ERROR|FATAL/;
	return $answer;
}

sub quit
{
	my ($self) = @_;
	my $psql = delete $self->{psql} or return;
	$self->{in} .= "\\q\n";
	$psql->finish;
	return;
}

sub DESTROY { my ($self) = @_; local $?; eval { $self->quit }; return; }

1;
