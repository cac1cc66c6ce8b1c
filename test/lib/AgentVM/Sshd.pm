# An sshd of the test's own, run by its user on a port of its own: the way to a libvirt on "another" machine, whose
# sessions are those of the AgentVM::Libvirt given.
#
#	my $sshd = AgentVM::Sshd->new($libvirt)->start;
#	$sshd->uri;                                  # qemu+ssh://...; uri(socket => path, netcat => path, key => path, known_hosts => path)
#	$sshd->key('other');                         # path of a key that is not authorized
#	$sshd->cut;                                  # the connections break; how many
#	$sshd->stop;                                 # likewise, and no more are taken until start()
package AgentVM::Sshd;

use strict;
use warnings;
use parent -norequire, 'AgentVM::Process';
use AgentVM::Process;
use IO::Socket::INET;
use PostgreSQL::Test::Cluster ();
use PostgreSQL::Test::Utils ();
use Time::HiRes qw(sleep time);

sub new
{
	my ($class, $libvirt) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir('sshd');
	my $self = $class->SUPER::new('sshd', '/usr/sbin/sshd', '-D', '-e', '-f', "$dir/config");
	$self->{dir} = $dir;
	$self->{port} = PostgreSQL::Test::Cluster::get_free_port();
	my $host_key = PostgreSQL::Test::Utils::slurp_file($self->key('host') . '.pub');
	PostgreSQL::Test::Utils::append_to_file("$dir/known_hosts", "[127.0.0.1]:$self->{port} $host_key");
	PostgreSQL::Test::Utils::append_to_file("$dir/authorized_keys", PostgreSQL::Test::Utils::slurp_file($self->key('good') . '.pub'));
	PostgreSQL::Test::Utils::append_to_file("$dir/config", <<"CONF");
ListenAddress 127.0.0.1:$self->{port}
HostKey @{[ $self->key('host') ]}
AuthorizedKeysFile $dir/authorized_keys
AuthenticationMethods publickey
PidFile none
StrictModes no
UsePAM no
SetEnv @{[ join ' ', map { "$_=$ENV{$_}" } grep { /^XDG_/ } sort keys %ENV ]}
CONF
	return $self;
}

# Path of a private key, which is made if there is none of that name
sub key
{
	my ($self, $name) = @_;
	my $path = "$self->{dir}/key-$name";
	PostgreSQL::Test::Utils::system_or_bail('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', $name, '-f', $path) unless -e $path;
	return $path;
}

# What the user that runs the test has in ~/.ssh is left out of it, which only a program in ssh's place can do
sub uri
{
	my ($self, %opt) = @_;
	my $known_hosts = $opt{known_hosts} // "$self->{dir}/known_hosts";
	my $ssh = "$self->{dir}/ssh-" . ++$self->{programs};
	PostgreSQL::Test::Utils::append_to_file($ssh, "#!/bin/sh\nexec ssh -F /dev/null -o UserKnownHostsFile=$known_hosts -o GlobalKnownHostsFile=/dev/null -o IdentitiesOnly=yes -o IdentityAgent=none \"\$\@\"\n");
	chmod(0755, $ssh);
	return "qemu+ssh://@{[ scalar getpwuid $> ]}\@127.0.0.1:$self->{port}/session?command=$ssh&keyfile=@{[ $opt{key} // $self->key('good') ]}" . join('', map { $opt{$_} ? "&$_=$opt{$_}" : () } qw(socket netcat));
}

# Waits until it listens
sub start
{
	my ($self) = @_;
	my $end = time + AgentVM::Process::timeout();
	$self->SUPER::start;
	until (IO::Socket::INET->new(PeerAddr => "127.0.0.1:$self->{port}"))
	{
		die 'sshd does not listen: ' . $self->output if time > $end || !$self->is_running;
		sleep 0.05;
	}
	return $self;
}

# Pids of those that serve connections: an sshd has a child for each, which has another one, which runs the command
sub sessions
{
	my ($self) = @_;
	my @pids = $self->{pid} // ();
	for (my $i = 0; $i < @pids; $i++) { push @pids, AgentVM::Process::pids(stat => qr/^\d+ \(.*\) \S $pids[$i] /); }
	return @pids[1 .. $#pids];
}

# Kill those
sub cut
{
	my ($self) = @_;
	return kill('KILL', $self->sessions);
}

# No more connections, and those that are there are cut
sub stop
{
	my ($self) = @_;
	my @sessions = $self->sessions;
	my $code = $self->SUPER::stop;
	kill('KILL', @sessions);
	return $code;
}

1;
