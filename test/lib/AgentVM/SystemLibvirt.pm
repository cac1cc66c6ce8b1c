# A privileged libvirt of the test's own (qemu:///system): its libvirtd is root of a user namespace, with directories of
# its own in place of /var/lib/libvirt and the others, and networks of its own only. Its processes all end with it.
#
#	plan skip_all => ... if AgentVM::SystemLibvirt->lacks;
#	my $libvirt = AgentVM::SystemLibvirt->new;       # as AgentVM::Libvirt
package AgentVM::SystemLibvirt;

use strict;
use warnings;
use parent -norequire, 'AgentVM::Libvirt';
use AgentVM::Libvirt;
use AgentVM::Process;
use PostgreSQL::Test::Utils ();
use Time::HiRes qw(sleep time);

my @unshare = qw(unshare --user --map-root-user --mount --net --pid --fork --kill-child --mount-proc);

# A namespace of an ordinary user has no setgroups(), which libvirt calls before it starts QEMU
my $setgroups = 'int setgroups(unsigned long n, const void *groups) { return 0; }';

# Its init: DIR [TUN]. Who kills libvirtd gets another one, as from systemd
my $init = <<'SH';
for dir in /run /etc/libvirt /var/lib /var/cache /var/log; do mount -t tmpfs tmpfs $dir; done
mkdir -p /run/libvirt /run/lock /var/lib/libvirt /var/cache/libvirt /var/log/libvirt
cp "$1/etc/qemu.conf" /etc/libvirt/
# whom libvirt looks for, whatever it is told
{ cat /etc/passwd && echo libvirt-qemu:x:0:0::/:/bin/false; } > "$1/etc/passwd"
{ cat /etc/group && echo libvirt-qemu:x:0:; } > "$1/etc/group"
for file in passwd group; do mount --bind "$1/etc/$file" /etc/$file; done
[ ! "$2" ] || mount --bind "$2" /dev/net/tun
while :; do LD_PRELOAD=$1/setgroups.so libvirtd -f "$1/etc/libvirtd.conf" || sleep 0.1; done
SH

# Why there can be none here, or undef
sub lacks
{
	my ($out, $error);
	return if IPC::Run::run([ @unshare, 'sh', '-euc', 'mount -t tmpfs tmpfs /run' ], '<', \undef, '>', \$out, '2>', \$error);
	chomp $error;
	return "no user namespaces here: $error";
}

sub new
{
	my ($class) = @_;
	my $self = $class->SUPER::new;
	my $dir = $self->dir;
	mkdir "$dir/$_" or die "$dir/$_: $!" for qw(etc system);
	PostgreSQL::Test::Utils::append_to_file("$dir/etc/libvirtd.conf", "unix_sock_dir = \"$dir/system\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n");
	PostgreSQL::Test::Utils::append_to_file("$dir/etc/qemu.conf", join("\n", 'user = "root"', 'group = "root"', 'security_driver = "none"', 'cgroup_controllers = []', 'namespaces = []', 'stdio_handler = "file"', 'remember_owner = 0', ''));
	IPC::Run::run([qw(cc -shared -fPIC -x c -o), "$dir/setgroups.so", '-'], '<', \$setgroups) or die 'cc';
	$self->{uri} = "qemu+unix:///system?socket=$dir/system/libvirt-sock";
	$self->{process} = AgentVM::Process->new('libvirtd', @unshare, 'sh', '-euc', $init, 'sh', $dir, $ENV{AGENTVM_TUN} // '')->start;
	$self->await;
	return $self;
}

# A network of libvirt's, 192.168.77.0/24, whose guests get an address and reach one web server at 192.168.77.1:8080, which
# knows /hello; and nothing else. Its servers run in the foreground of libvirtd's namespaces
sub network
{
	my ($self, $name) = @_;
	my @inside = ('nsenter', '--target', $self->daemon, '--user', '--net', '--preserve-credentials');
	$self->_run(@inside, 'sh', '-euc', "ip link add $name type bridge && ip address add 192.168.77.1/24 dev $name && ip link set $name up");
	PostgreSQL::Test::Utils::append_to_file("$self->{dir}/network.xml", "<network><name>$name</name><forward mode='bridge'/><bridge name='$name'/></network>");
	$self->_run('virsh', '-q', '-c', $self->{uri}, 'net-create', "$self->{dir}/network.xml");
	mkdir "$self->{dir}/web" or die "$self->{dir}/web: $!";
	PostgreSQL::Test::Utils::append_to_file("$self->{dir}/web/hello", "hello from outside\n");
	push @{ $self->{servers} },
	  AgentVM::Process->new('dhcp', @inside, 'dnsmasq', '--no-daemon', '--conf-file=/dev/null', '--port=0', "--interface=$name", '--dhcp-range=192.168.77.10,192.168.77.99', "--dhcp-leasefile=$self->{dir}/leases")->start,
	  AgentVM::Process->new('web', @inside, 'python3', '-m', 'http.server', '--bind', '192.168.77.1', '--directory', "$self->{dir}/web", '8080')->start;
	return;
}

# Waits until it answers
sub await
{
	my ($self) = @_;
	my $end = time + AgentVM::Process::timeout();
	my ($out, $error);
	until (IPC::Run::run([ 'virsh', '-q', '-c', $self->{uri}, 'uri' ], '<', \undef, '>', \$out, '2>', \$error))
	{
		die "libvirtd does not answer: $error" . $self->{process}->output if time > $end || !$self->{process}->is_running;
		sleep 0.1;
	}
	return;
}

sub daemon
{
	my ($self) = @_;
	my ($pid) = AgentVM::Process::pids(cmdline => qr{^libvirtd\0-f\0\Q$self->{dir}/});
	return $pid;
}

sub output { return $_[0]{process}->output; }

sub stop
{
	my ($self) = @_;
	$_->stop('KILL') for @{ $self->{servers} // [] }, $self->{process};
	return $self->SUPER::stop;
}

1;
