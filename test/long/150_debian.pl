# infra/microvm debian: boots into systemd, is told by its boot disk, has its tools and its disk, and powers off
use strict;
use warnings;
use AgentVM::QEMU;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $debian = debian_image();
my $began = time;

# A machine whose boot script starts the runtime, which finds no gateway, and then does what is given
sub booted
{
	my ($script, %options) = @_;
	return AgentVM::QEMU->new($debian, memory => 512, %options, boot => <<"END")->start;
#!/bin/sh
umask 077
mkdir -p /etc/agentvm
cat >/etc/agentvm/runtime.env <<'ENV'
AGENTVM_SESSION_ID=01234567-89ab-7def-8123-456789abcdef
AGENTVM_GATEWAY_URL=http://127.0.0.1:1
AGENTVM_BOOTSTRAP_TOKEN=@{[ 'f' x 64 ]}
AGENTVM_DEADMAN_ALLOWANCE=40
ENV
systemctl restart --no-block agentvm-runtime.service
{
$script} >/dev/console 2>&1 &
exit 0
END
}

my $machine = booted(<<'END', cmdline => 'systemd.journald.forward_to_console=1');
	until systemctl --quiet is-active agentvm-runtime agentvm-grow; do sleep 0.2; [ "$((n = n + 1))" -lt 300 ] || break; done
	echo "tools $(git --version) $(python3 --version) node $(node --version) end"
	echo "disk $(df --output=size -BG / | tail -1) name $(hostname) left $(ls /run | grep -c agentvm-boot)"
	echo "gettys $(systemctl list-units --no-legend 'getty@*' 'serial-getty@*' | wc -l) failed $(systemctl --failed --no-legend | wc -l)"
	echo "waited $(systemctl is-active systemd-networkd-wait-online) online $(systemctl is-active network-online.target) networkd $(systemctl is-active systemd-networkd)"
	echo "links $(ls /sys/class/net) modules $(modinfo -F filename overlay) runtimes $(pgrep -c agentvm-runtime)"
END
$machine->says(qr/msg=bootstrapping/, 'the runtime has started');
note(sprintf 'after %.1f s', time - $began);
$machine->says(qr/links .*end|links lo modules/, 'the boot script has run');
like($machine->output, qr/tools git version 2\S+ Python 3\S+ node v\d\S+ end/, 'git, python3 and nodejs');
like($machine->output, qr/disk +8G name agentvm-01234567-89ab-7def-8123-456789abcdef left 0/, 'the file system is as large as the disk; the machine has its name');
like($machine->output, qr/gettys 0 failed 0/, 'no getty; nothing has failed');
like($machine->output, qr/waited inactive online active networkd active/, 'nothing has waited for a network');
like($machine->output, qr/links lo modules \/lib\/modules\S+overlay.ko runtimes 1/, 'no network but lo; modules are there; one runtime');
$machine->exits(0, 'without control plane it powers off after the allowance');
like($machine->output, qr/powers itself off" reason="the control plane has been gone/, 'by itself');
like($machine->output, qr/Stopped agentvm-runtime.service|systemd-shutdown|poweroff.target/, 'through systemd');

# with a network card, of QEMU's own network
$machine = booted(<<'END', more => [ '-netdev', 'user,id=net', '-device', 'virtio-net-pci,netdev=net' ]);
	until systemctl --quiet is-active agentvm-runtime; do sleep 0.2; [ "$((n = n + 1))" -lt 300 ] || break; done
	# by now
	echo "address $(ip -4 -o addr show scope global | cut -d' ' -f2-7) route $(ip route show default)"
	echo "waited $(systemctl is-active systemd-networkd-wait-online) server $(resolvectl dns | grep -o 10.0.2.3) by $(grep ^nameserver /etc/resolv.conf) failed $(systemctl --failed --no-legend | wc -l)"
	systemctl poweroff
END
$machine->says(qr/waited .*failed/, 'a machine with a card', while_running => 1);
like($machine->output, qr/address e\S+ +inet 10.0.2.15\/24 .*route default via 10.0.2.2 /, 'it has an address before the runtime starts');
like($machine->output, qr/waited active server 10.0.2.3 by nameserver 127.0.0.53 failed 0/, 'and asks for names there');
$machine->exits(0, 'it powers off');

done_testing();
