# A libvirt of the test's own (qemu:///session, run by the server's user), and a small guest that tells what it sees.
#
#	my $libvirt = AgentVM::Libvirt->new;               # before the node starts, which takes over the environment
#	$libvirt->host($node);                             # a row of agentvm.host; $libvirt->host($node, name => 'b', vcpus => 2)
#	$libvirt->options;                                 # {kernel, initrd} of the guest
#	$libvirt->domains;                                 # names of those that are there
#	$libvirt->files;                                   # what lies in the host's directory
#	my %seen = $libvirt->guest($session);              # what the guest says over its virtio port, once it has run its boot disk
#	$libvirt->qemu($session);                          # the pid of its QEMU; $libvirt->daemon that of libvirtd
package AgentVM::Libvirt;

use strict;
use warnings;
use AgentVM::Process ();
use AgentVM::Test;
use File::Temp ();
use IO::Socket::UNIX;
use PostgreSQL::Test::Utils ();
use Test::More;
use Time::HiRes qw(sleep time);

my @all;

# /init of the guest. Over its port it says what it sees, again and again
my $init = <<'SH';
#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /bin /proc /sys /dev /tmp /etc
/bin/busybox --install -s /bin
mount -t proc proc /proc
grep -q agentvm.probe /proc/cmdline && poweroff -f
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk virtio_console; do insmod /modules/$module.ko; done
for disk in /sys/block/vd?; do
	[ "$(cat $disk/serial)" != agentvm-boot ] || boot=${disk##*/}
done
tr -d '\000' < /dev/$boot > /tmp/boot
sh /tmp/boot > /tmp/log 2>&1
said=$?
for port in /sys/class/virtio-ports/*; do
	[ "$(cat $port/name)" != org.agentvm.gateway ] || device=/dev/${port##*/}
done
grep -q agentvm.off /proc/cmdline && poweroff -f
{
	echo "boot=$boot $(cat /sys/block/$boot/ro) $said $(tail -1 /tmp/log)"
	echo "uptime=$(cut -d' ' -f1 /proc/uptime)"
	echo "disks=$(cd /sys/block && echo vd?)"
	echo "interfaces=$(cd /sys/class/net && echo *)"
	echo "modes=$(stat -c '%n %a' /etc/agentvm /etc/agentvm/* | sed 's,/etc/agentvm,,' | tr '\n' ';')"
	echo "armed=$(ps | grep -c '[s]leep [0-9]*; systemctl poweroff')"
	sed 's/^/env:/' /etc/agentvm/runtime.env
	echo end
} > /tmp/said
while [ "$device" ]; do cat /tmp/said > $device; sleep 1; done
while :; do sleep 1000; done
SH

sub new
{
	my ($class) = @_;
	# sockets have short paths
	my $dir = File::Temp::tempdir('/tmp/avXXXXXX');
	# test/lib/env.sh removes what a test leaves that is killed
	PostgreSQL::Test::Utils::append_to_file("$dir/of", ($ENV{TMPDIR} // '') . "\n");
	my $self = bless({ dir => $dir, owner => $$, uri => 'qemu:///session' }, $class);
	mkdir("$dir/$_", 0700) or die "could not make $dir/$_: $!" for qw(run home home/.config home/.cache vms);
	my %env = (AGENTVM_IMAGES => $dir, HOME => "$dir/home", XDG_RUNTIME_DIR => "$dir/run", XDG_CONFIG_HOME => "$dir/home/.config", XDG_CACHE_HOME => "$dir/home/.cache");
	$ENV{$_} = $env{$_} for keys %env;
	push @all, $self;
	return $self;
}

sub dir { return $_[0]{dir}; }
sub vms { return "$_[0]{dir}/vms"; }

sub _run
{
	my ($self, @command) = @_;
	my ($out, $error);
	IPC::Run::run(\@command, '<', \undef, '>', \$out, '2>', \$error) or die "@command: $error$out";
	return $out;
}

# The guest's kernel and initrd, made from the distribution's packages
sub options
{
	my ($self) = @_;
	my $image = "$self->{dir}/image";
	if (!-e $image)
	{
		mkdir $image;
		my ($kernel) = $self->_run(qw(apt-cache depends linux-image-cloud-amd64)) =~ /Depends: (linux-image-[0-9]\S+)/ or die 'which kernel?';
		$self->_run('sh', '-euc', <<'SH', 'sh', $image, $kernel);
cd "$1"
apt-get -q download "$2" > log 2>&1 || { cat log >&2 && exit 1; }
dpkg-deb -x linux-image-*.deb package
mv package/boot/vmlinuz-* kernel
mkdir -p root/bin root/modules
find package/lib/modules -name 'virtio*.ko' -exec mv {} root/modules/ ';'
cp "$(command -v busybox)" root/bin/
cat > root/init
chmod 755 root/init
SH
		PostgreSQL::Test::Utils::append_to_file("$image/root/init", $init);
		$self->_run('sh', '-euc', 'cd "$1/root" && find . | busybox cpio -o -H newc > ../initrd 2>/dev/null && cd .. && rm -rf root package ./*.deb', 'sh', $image);
	}
	return { kernel => "$image/kernel", initrd => "$image/initrd" };
}

# Register this libvirt as a host
sub host
{
	my ($self, $node, %column) = @_;
	%column = (name => 'here', uri => $self->{uri}, directory => $self->vms, vcpus => 8, memory_mib => 4096, %column);
	my @names = sort keys %column;
	# a superuser gets round the trigger: the tests' ssh is a program of theirs
	my $first = $column{uri} =~ /command=/ ? 'SET session_replication_role = replica; ' : '';
	psql_ok($node, $first . 'INSERT INTO agentvm.host (' . join(', ', @names) . ') VALUES (' . join(', ', map { literal($column{$_}) } @names) . ')', "host $column{name}");
	return;
}

sub virsh { my ($self, @arguments) = @_; return $self->_run('virsh', '-q', '-c', $self->{uri}, @arguments); }
sub domains { my ($self) = @_; return grep { /\S/ } split /\n/, $self->virsh('list', '--all', '--name'); }

sub files
{
	my ($self) = @_;
	opendir(my $dir, $self->vms) or die 'no ' . $self->vms;
	return sort grep { !/^\.\.?$/ } readdir $dir;
}

# Pid of the session's libvirtd, or undef
sub daemon
{
	my ($self) = @_;
	my $file = "$self->{dir}/run/libvirt/libvirtd.pid";
	return unless -s $file;
	my ($pid) = PostgreSQL::Test::Utils::slurp_file($file) =~ /(\d+)/;
	return kill(0, $pid) ? $pid : undef;
}

# Pids of the QEMUs of this libvirt, or of one session
sub qemu
{
	my ($self, $session) = @_;
	my @pids;
	foreach my $file (glob '/proc/[0-9]*/cmdline')
	{
		my ($pid) = $file =~ /(\d+)/;
		open(my $handle, '<', $file) or next;
		my $line = join('', <$handle>) // '';
		push @pids, $pid if $line =~ /^[^\0]*qemu-system/ && index($line, "$self->{dir}/") >= 0 && (!$session || index($line, $session) >= 0);
	}
	return wantarray ? @pids : $pids[0];
}

# What the guest says, as pairs; its runtime.env under env:NAME. Waits for it
sub guest
{
	my ($self, $session) = @_;
	my $path = $self->vms . "/$session.sock";
	my $end = time + AgentVM::Process::timeout();
	my ($text, $socket) = ('');
	while (time < $end)
	{
		$socket //= IO::Socket::UNIX->new(Peer => $path);
		if (!$socket) { sleep 0.1; next; }
		my $bits = '';
		vec($bits, fileno($socket), 1) = 1;
		next unless select($bits, undef, undef, 0.5);
		sysread($socket, $text, 65536, length $text) or undef $socket;
		return map { /^(env:\w+|\w+)=(.*)$/ ? ($1 => $2) : () } split(/\n/, $1) if $text =~ /^(boot=.*?)^end$/ms;
	}
	diag("the guest of $session says nothing but: $text");
	return;
}

# A check: nothing of the session is left on the host
sub nothing_left
{
	my ($self, $session, $name) = @_;
	my @left = ((grep { /\Q$session/ } $self->domains), (grep { /^\Q$session/ } $self->files), $self->qemu($session));
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is("@left", '', $name // 'no domain, no file, no process is left');
}

sub stop
{
	my ($self) = @_;
	my $pid = $self->daemon;
	kill('CONT', $pid) if $pid;
	kill('TERM', $pid) if $pid;
	kill('KILL', $self->qemu);
	for (1 .. 100) { last unless $pid && kill(0, $pid); sleep 0.05; }
	kill('KILL', $pid) if $pid && kill(0, $pid);
	PostgreSQL::Test::Utils::system_log('rm', '-rf', $self->{dir});
	return;
}

# After the clusters of the test, which would start another libvirtd
sub DESTROY { }
END
{
	my $status = $?;
	foreach my $self (@all) { $self->stop if $self->{owner} == $$; }
	$? = $status;
}

1;
