# A real VM without a network card, as the provider libvirt starts it: the cable to the gateway is its only way out.
#
#	my $guest = AgentVM::Guest->new($dir, $name, $script)->start;    # its socket is $dir/$name.sock
#	AgentVM::Guest::settings(GATEWAY_URL => ...);                    # a script that writes runtime.env: without AGENTVM_
#	$guest->says(qr/.../);                                           # on its console
# The script is run once as root, before the runtime is started; it may never end.
package AgentVM::Guest;

use strict;
use warnings;
use AgentVM::QEMU;
use parent -norequire, 'AgentVM::QEMU';

our $port = 'org.agentvm.gateway';

sub new
{
	my ($class, $dir, $name, $script) = @_;
	return $class->SUPER::new(micro_image(), boot => "#!/bin/sh\n$script", memory => 192,
		more => [ '-nic', 'none', '-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny', '-device', 'virtio-serial-pci',
			'-chardev', "socket,id=gateway,path=$dir/$name.sock,server=on,wait=off", '-device', "virtserialport,chardev=gateway,name=$port" ]);
}

sub settings
{
	my (%settings) = @_;
	%settings = (GATEWAY_DEVICE => $port, BOOTSTRAP_INTERVAL => 1, BOOTSTRAP_TRIES => 1000, HTTP_TIMEOUT => 5, BACKOFF_MIN => 0.2, BACKOFF_MAX => 1, LOG_LEVEL => 'debug', %settings);
	return "umask 077\nmkdir -p /etc/agentvm\ncat >/etc/agentvm/runtime.env <<'END'\n" . join('', map { "AGENTVM_$_=$settings{$_}\n" } sort keys %settings) . "END\n";
}

1;
