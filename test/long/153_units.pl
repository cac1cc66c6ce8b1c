# infra/systemd under a real systemd, in a machine of QEMU's: PostgreSQL, the gateway, a runtime and a libvirtd of its own, by the
# units and as their comments say. What is checked in there is in 153_units.bash
use strict;
use warnings;
use AgentVM::QEMU;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

plan skip_all => 'what has checks built in does not run in the machine' if $ENV{SANITIZE};
my $began = time;
my $dir = PostgreSQL::Test::Utils::tempdir('units');
my $log = "$dir/build.log";
system('bash', '-c', <<'END', 'build', $ENV{TESTDIR}, $dir, micro_image()) == 0 or BAIL_OUT(slurp_file($log));
set -euo pipefail
cd "$2"
exec >build.log 2>&1
config=$("$1/test/lib/env.sh" server_config)
packages=(systemd-sysv dbus "postgresql-$("$config" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')" procps curl openssl
	libvirt-daemon libvirt-daemon-driver-qemu qemu-system-x86 qemu-utils
	libxml2 libyajl2 libwebsockets17 libwebsockets-evlib-uv libjansson4)

# as the README has them installed
make -s -C "$1" install install-libvirt install-gateway install-runtime PG_CONFIG="$config" DESTDIR="$2/overlay" bindir=/usr/local/bin
install -D -m 644 -t overlay/var/cache/agentvm/images/micro "$3"/{kernel,initrd}
install -D -m 644 -t overlay/etc/systemd/system "$1"/infra/systemd/agentvm-{gateway,libvirtd,runtime}.service
install -m 644 -t overlay "$1"/infra/systemd/agentvm.tmpfiles # where the comments of the units are followed
install -D "$1/test/long/153_units.bash" overlay/usr/local/sbin/units
printf '%s\n' '[Service]' 'ExecStart=/usr/local/sbin/units' >overlay/etc/systemd/system/units.service
mkdir overlay/etc/systemd/system/multi-user.target.wants
ln -s ../units.service overlay/etc/systemd/system/multi-user.target.wants/
echo gw1 >overlay/etc/hostname
echo '127.0.0.1 localhost' >overlay/etc/hosts
tar -C overlay --owner=0 --group=0 -cf overlay.tar .
rm -r overlay

mmdebstrap --quiet --variant=minbase --format=tar --include="${packages[*]}" \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
	--essential-hook='mkdir -p "$1/etc/postgresql-common/createcluster.d" && echo "create_main_cluster = false" >"$1/etc/postgresql-common/createcluster.d/none.conf"' \
	--customize-hook="tar-in $2/overlay.tar /" \
	--customize-hook='chroot "$1" systemctl --quiet mask getty@.service serial-getty@.service console-getty.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer' \
	bookworm root.tar
mkdir root image
truncate -s 4G disk
fakeroot sh -euc 'tar -C root --exclude="./dev/*" --numeric-owner -xf root.tar
	mke2fs -q -t ext4 -m 0 -E lazy_itable_init=1 -d root disk'
rm -rf root root.tar overlay.tar
qemu-img convert -q -O qcow2 disk image/disk.qcow2
rm disk
ln -s "$3"/{kernel,initrd} image/
END
note(sprintf 'image after %.0f s', time - $began);

my $machine = AgentVM::QEMU->new("$dir/image", memory => 3072, cmdline => 'systemd.show_status=0', more => [ '-smp', 2, '-nic', 'none' ])->start;
is($machine->code(900), 0, 'the machine has done its work and powered itself off');
note(sprintf 'ended after %.0f s', time - $began);
my $said = $machine->output =~ s/\r//gr;
ok($1 eq 'ok', $2) while $said =~ /^.*?units: ((?:not )?ok) - (.*)/mg;
like($said, qr/^units: end$/m, 'and has come to its end');
(Test::More->builder->is_passing ? \&note : \&diag)->($said);

done_testing();
