# A real VM without a network card: the micro image (infra/microvm) in QEMU, as the provider libvirt starts it, with the
# gateway's cable as its only way out. Emulated, since KVM is not to be had everywhere.
#
#	my $guest = AgentVM::Guest->new($dir, $name, $script)->start;    # its socket is $dir/$name.sock
#	AgentVM::Guest::settings(GATEWAY_URL => ...);                    # a script that writes runtime.env: without AGENTVM_
#	$guest->says(qr/.../);                                           # on its console
# The script is run once as root, before the runtime is started; it may do without the latter, or never end.
package AgentVM::Guest;

use strict;
use warnings;
use parent 'AgentVM::Process';
use PostgreSQL::Test::Utils ();

our $port = 'org.agentvm.gateway';

# Why there can be no VM here, or undef
sub missing
{
	return 'no image: infra/microvm/build' unless $ENV{AGENTVM_IMAGES} && -e "$ENV{AGENTVM_IMAGES}/micro/kernel";
	return 'no qemu-system-x86_64' if system('qemu-system-x86_64 --version >/dev/null 2>&1') != 0;
	return undef;
}

sub new
{
	my ($class, $dir, $name, $script) = @_;
	my $disk = PostgreSQL::Test::Utils::tempdir('guest') . '/boot';
	PostgreSQL::Test::Utils::append_to_file($disk, "#!/bin/sh\n$script");
	truncate($disk, 64 * 1024);
	chmod(0600, $disk);
	my $image = "$ENV{AGENTVM_IMAGES}/micro";
	my $self = $class->SUPER::new("guest_$name", 'qemu-system-x86_64', '-accel', 'tcg', '-M', 'q35', '-m', 192, '-nodefaults', '-no-user-config', '-display', 'none', '-nic', 'none',
		'-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny', '-no-reboot', '-kernel', "$image/kernel", '-initrd', "$image/initrd", '-append', 'console=ttyS0 quiet panic=-1',
		'-serial', 'stdio', '-drive', "file=$disk,format=raw,if=none,id=boot", '-device', 'virtio-blk-pci,drive=boot,serial=agentvm-boot', '-device', 'virtio-serial-pci',
		'-chardev', "socket,id=gateway,path=$dir/$name.sock,server=on,wait=off", '-device', "virtserialport,chardev=gateway,name=$port");
	$self->{socket} = "$dir/$name.sock";
	return $self;
}

sub socket { return $_[0]{socket}; }

sub settings
{
	my (%settings) = @_;
	%settings = (GATEWAY_DEVICE => $port, BOOTSTRAP_INTERVAL => 1, BOOTSTRAP_TRIES => 1000, HTTP_TIMEOUT => 5, BACKOFF_MIN => 0.2, BACKOFF_MAX => 1, LOG_LEVEL => 'debug', %settings);
	return "umask 077\nmkdir -p /etc/agentvm\ncat >/etc/agentvm/runtime.env <<'END'\n" . join('', map { "AGENTVM_$_=$settings{$_}\n" } sort keys %settings) . "END\n";
}

1;
