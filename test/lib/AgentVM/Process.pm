# A program that runs beside the test: its output in a file, killed when the test ends.
#
#	my $process = AgentVM::Process->new($name, @command);
#	$process->start;                       # or start(KEY => 'value') with changes of the environment
#	$process->signal('TERM');
#	$process->exits(0, 'what it shows');   # a check: waits until it has ended, with this exit code
#	$process->says(qr/ready/, 'what it shows');   # a check: waits until its output has that
#	AgentVM::Process::memory_of($pid, 'p');       # what it has in memory of its own; 's': shared
#	AgentVM::Process::pids(cmdline => qr/x/);     # of all processes whose file of that name in /proc is like this
package AgentVM::Process;

use strict;
use warnings;
use POSIX qw(:sys_wait_h);
use PostgreSQL::Test::Utils ();
use Test::More;
use Time::HiRes qw(sleep time);

my @all;

sub new
{
	my ($class, $name, @command) = @_;
	my $self = bless { name => $name, command => [@command], log => PostgreSQL::Test::Utils::tempdir($name) . '/log' }, $class;
	push @all, $self;
	return $self;
}

sub pids
{
	my ($name, $like) = @_;
	my @pids;
	foreach my $pid (map { m{(\d+)} } glob '/proc/[0-9]*')
	{
		open(my $file, '<', "/proc/$pid/$name") or next;
		push @pids, $pid if join('', <$file>) =~ $like;
	}
	return @pids;
}

# The private memory of a process, or what it shares; undef where the kernel does not let us see it
sub memory_of
{
	my ($pid, $how) = @_;
	my $text = '';
	open(my $maps, '<', "/proc/$pid/maps") or return;
	open(my $memory, '<:raw', "/proc/$pid/mem") or return;
	while (my $line = <$maps>)
	{
		no warnings 'portable';
		my ($from, $to) = $line =~ /^([0-9a-f]+)-([0-9a-f]+) rw.$how / or next;
		return if hex($to) - hex($from) > 1 << 40;    # the shadow of AddressSanitizer: nobody reads terabytes
		sysseek($memory, hex $from, 0) or next;
		for (my $left = hex($to) - hex($from); $left > 0;)
		{
			my $got = sysread($memory, my $chunk, $left > 1 << 20 ? 1 << 20 : $left) or last;
			$text .= $chunk if $chunk =~ /[^\0]/;
			$left -= $got;
		}
	}
	return $text eq '' ? undef : $text;
}
sub timeout { return $PostgreSQL::Test::Utils::timeout_default // 180; }

sub start
{
	my ($self, %environment) = @_;
	die "$self->{name} is running" if $self->{pid};
	$self->{from} = -s $self->{log} // 0;
	$self->{pid} = fork // die "could not fork: $!";
	return $self if $self->{pid};
	delete @ENV{ grep { /^AGENTVM_/ } keys %ENV };
	@ENV{ keys %environment } = values %environment;
	open(STDIN, '<', '/dev/null') and open(STDOUT, '>>', $self->{log}) and open(STDERR, '>&', \*STDOUT) or POSIX::_exit(126);
	exec { $self->{command}[0] } @{ $self->{command} } or POSIX::_exit(127);
}

sub pid { return $_[0]{pid}; }
sub signal { my ($self, $signal) = @_; kill $signal, $self->{pid} if $self->{pid}; return $self; }

# All that it has printed; with from_start, since its last start
sub output
{
	my ($self, %opt) = @_;
	return '' unless -e $self->{log};
	my $text = PostgreSQL::Test::Utils::slurp_file($self->{log});
	return $opt{from_start} ? substr($text, $self->{from}) : $text;
}

sub is_running { my ($self) = @_; return $self->{pid} && !defined $self->code(0); }

# Its exit code (128 + signal), or undef while it runs for longer than that many seconds
sub code
{
	my ($self, $seconds) = @_;
	my $end = time + $seconds;
	return $self->{code} unless $self->{pid};
	while (waitpid($self->{pid}, WNOHANG) == 0)
	{
		return undef if time >= $end;
		sleep 0.02;
	}
	$self->{code} = $? & 127 ? 128 + ($? & 127) : $? >> 8;
	$self->{pid} = undef;
	return $self->{code};
}

sub exits
{
	my ($self, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is($self->code(timeout()), $expected, $name // "$self->{name} exits with $expected") || diag($self->output);
}

sub says
{
	my ($self, $like, $name, %opt) = @_;
	my $end = time + timeout();
	sleep 0.02 while $self->output(from_start => 1) !~ $like && time < $end && (!$opt{while_running} || $self->is_running);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return like($self->output(from_start => 1), $like, $name // "$self->{name} says $like");
}

sub stop { my ($self, $signal) = @_; $self->signal($signal // 'TERM'); return $self->code(timeout()) // $self->signal('KILL')->code(10); }

END { my $code = $?; $_->signal('KILL') for @all; $? = $code; }

1;
