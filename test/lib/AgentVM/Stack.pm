# All of it, with real VMs: a cluster, a gateway with a control listener, a libvirt of the test's own as host "here", the micro image as profile
# "micro", and team acme. VMs are emulated, and have no network card.
#
#	my $stack = AgentVM::Stack->new;                             # conf => lines, libvirt => a libvirt other than AgentVM::Libvirt->new
#	my $id = $stack->vm;                                         # provision(); vm('profile', more arguments of it)
#	my ($id, ...) = $stack->ready('micro', 2);                   # so many, provisioned together, that become ready
#	$stack->profile('other', {options => {...}}, 'max_lifetime => ...');
#	$stack->initrd('name', 'bin/x' => "#!/bin/sh\n...");         # an initrd with these files (scripts) as well, or in their place
#	$stack->beats($id);                                          # a check: its heartbeats go on
#	$stack->ended($id, 'reason');                                # a check: it ends for that, and nothing is left on the host
#	$stack->node, ->gateway, ->libvirt, ->qemu($id)
package AgentVM::Stack;

use strict;
use warnings;
use AgentVM::Gateway;
use AgentVM::Libvirt;
use AgentVM::QEMU;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

our $patience = 180;    # emulated, on a machine that does other things, too

sub new
{
	my ($class, %opt) = @_;
	my $self = bless { libvirt => $opt{libvirt} // AgentVM::Libvirt->new }, $class;
	$self->{node} = new_node('main', conf => "agentvm.provider_libraries = 'agentvm_libvirt'\nagentvm.gateway_url = 'http://gateway.test'\nagentvm.heartbeat_interval = 1\n"
		  . "agentvm.bootstrap_timeout = 600\nagentvm.heartbeat_timeout = 600\n" . ($opt{conf} // ''));
	my $control = 'unix:' . $self->{libvirt}->dir . '/control';
	$self->{node}->safe_psql('postgres', "INSERT INTO agentvm.gateway (gateway_id, control_address) VALUES ('gw', '$control')");
	$self->{gateway} = AgentVM::Gateway->new($self->{node}, options => [ '--name', 'gw', '--vm-sockets', $self->{libvirt}->vms, '--control', $control ]);
	$self->{libvirt}->host($self->{node});
	$self->{node}->safe_psql('postgres', "SELECT agentvm.create_team('acme', provider => 'libvirt'); SELECT agentvm.set_provider('acme', 'libvirt', '{}')");
	$self->profile('micro');
	return $self;
}

sub node { return $_[0]{node}; }
sub gateway { return $_[0]{gateway}; }
sub libvirt { return $_[0]{libvirt}; }
sub qemu { return scalar $_[0]{libvirt}->qemu($_[1]); }

sub profile
{
	my ($self, $name, $options, @more) = @_;
	my $image = micro_image();
	$options = { kernel => "$image/kernel", initrd => "$image/initrd", %{ $options // {} } };
	$self->{node}->safe_psql('postgres', 'SELECT agentvm.create_profile(' . join(', ', literal($name), "'libvirt'", 'options => ' . json($options), 'memory_mib => 256', @more) . ')');
	return;
}

# The kernel unpacks one archive after another
sub initrd
{
	my ($self, $name, %files) = @_;
	my $path = $self->{libvirt}->dir . "/$name.initrd";
	my $archive = slurp_file(micro_image() . '/initrd');
	my $inode = 100000;
	$archive .= "\0" x (-length($archive) % 512);
	for my $file (sort(keys %files), 'TRAILER!!!')
	{
		my $content = $files{$file} // '';
		my @fields = ($inode++, oct('100755'), 0, 0, 1, 0, length $content, 0, 0, 0, 0, length($file) + 1, 0);
		for my $part (join('', '070701', map { sprintf '%08x', $_ } @fields) . "$file\0", $content)
		{
			$archive .= $part;
			$archive .= "\0" x (-length($archive) % 4);
		}
	}
	append_to_file($path, $archive);
	return $path;
}

sub vm { my ($self, $profile, @arguments) = @_; return provision($self->{node}, 'acme', 'profile => ' . literal($profile // 'micro'), @arguments); }

sub ready
{
	my ($self, $profile, $count) = @_;
	my $began = time;
	my @ids = map { $self->vm($profile) } 1 .. ($count // 1);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	await_state($self->{node}, $_, 'ready', timeout => $patience, name => "a VM boots, and reports for duty") for @ids;
	note(sprintf 'after %.1f s', time - $began);
	return wantarray ? @ids : $ids[0];
}

sub last_beat { my ($self, $id) = @_; return $self->{node}->safe_psql('postgres', "SELECT coalesce(last_heartbeat_at, '-infinity') FROM agentvm.sessions WHERE session_id = '$id'"); }

sub beats
{
	my ($self, $id, $name) = @_;
	my $last = $self->last_beat($id);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return await($self->{node}, "SELECT state = 'ready' AND last_heartbeat_at > '$last' FROM agentvm.sessions WHERE session_id = '$id'", 't', timeout => $patience, name => $name // 'it beats')
	  || diag(state_of($self->{node}, $id), $self->{gateway}->output);
}

sub ended
{
	my ($self, $id, $reason, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	await($self->{node}, "SELECT CASE WHEN ended_at IS NOT NULL THEN end_reason END FROM agentvm.sessions WHERE session_id = '$id'", $reason, timeout => $patience, name => $name // "it ends: $reason")
	  || diag(state_of($self->{node}, $id));
	return $self->{libvirt}->nothing_left($id);
}

# A check: its QEMU comes to an end, which nobody else has done
sub powers_off
{
	my ($self, $id, $name) = @_;
	my $end = time + $patience;
	sleep 0.1 while $self->qemu($id) && time < $end;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok(!$self->qemu($id), $name);
}

1;
