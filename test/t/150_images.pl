# infra/microvm: the micro image is the same wherever it is built, boots, is told by its boot disk, and powers off
use strict;
use warnings;
use AgentVM::QEMU;
use File::Compare;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $micro = micro_image();
my $dir = PostgreSQL::Test::Utils::tempdir('images');

# ---- building ----
sub build
{
	my ($log, @arguments) = @_;
	my $pid = fork // die;
	return $pid if $pid;
	open(STDOUT, '>', $log) and open(STDERR, '>&', \*STDOUT);
	exec $AgentVM::QEMU::build, @arguments or POSIX::_exit(127);
}
sub built
{
	waitpid(build("$dir/log", @_), 0);
	return $? >> 8;
}
sub left { return join(' ', sort map { s/.*\///r } glob("$_[0]/* $_[0]/.build.*")); }

my $began = time;
is(built('micro', "$dir/elsewhere/deep"), 0, 'an image is built by ' . (getpwuid($>))[0]) || diag(slurp_file("$dir/log"));
cmp_ok(time - $began, '<', 60, sprintf 'in time: %.1f s', time - $began);
is((split /\n/, slurp_file("$dir/log"))[-1] =~ s/.*\///r, readlink("$dir/elsewhere/deep/micro"), 'says where it is');
is(compare("$dir/elsewhere/deep/micro/$_", "$micro/$_"), 0, "the same bytes as elsewhere: $_") for qw(kernel initrd);
is(left("$dir/elsewhere/deep") =~ s/-\w+//r, 'micro micro', 'and nothing else');
my $inode = (stat("$dir/elsewhere/deep/micro/kernel"))[1];
is(built('micro', "$dir/elsewhere/deep"), 0, 'once more');
is((stat("$dir/elsewhere/deep/micro/kernel"))[1], $inode, 'it is there already');

{
	local $ENV{http_proxy} = 'http://127.0.0.1:1';
	local $ENV{https_proxy} = 'http://127.0.0.1:1';
	is(built('micro', "$dir/offline"), 1, 'without a network it fails');
	like(slurp_file("$dir/log"), qr/a package cannot be downloaded/, 'and says why');
	is(left("$dir/offline"), '', 'and leaves nothing');
}
my $pid = build("$dir/log", 'micro', "$dir/interrupted");
my $end = time + 120;
sleep 0.02 until left("$dir/interrupted") || time > $end;
kill 'TERM', $pid;
waitpid($pid, 0);
is($? >> 8, 130, 'interrupted');
is(left("$dir/interrupted"), '', 'it leaves nothing');
is(built('small'), 2, 'an unknown kind');
is(built('micro', "$dir/with space"), 2, 'a directory of unusual name');

# ---- booting ----
my $env = "AGENTVM_SESSION_ID=01234567-89ab-7def-8123-456789abcdef\nAGENTVM_GATEWAY_URL=http://127.0.0.1:1\nAGENTVM_BOOTSTRAP_TOKEN=" . 'f' x 64 . "\n";
sub script { return "#!/bin/sh\nmkdir -p /etc/agentvm\n(umask 077; cat > /etc/agentvm/runtime.env) <<'END'\n$env$_[0]END\n" . ($_[1] // ''); }

my $machine = AgentVM::QEMU->new($micro, cmdline => 'agentvm.probe')->start;
$began = time;
$machine->exits(0, 'the probe boots, and powers off');
like($machine->output, qr/agentvm: probe/, 'having said so');
note(sprintf 'that took %.1f s', time - $began);

$machine = AgentVM::QEMU->new($micro)->start;
$machine->exits(0, 'without a boot disk the machine is off, too');
like($machine->output, qr/agentvm-runtime: .*runtime.env: No such file/, 'for want of settings');

$machine = AgentVM::QEMU->new($micro, boot => "echo failing\nexit 3\n")->start;
$machine->exits(0, 'a boot script that fails');
like($machine->output, qr/failing\r?\nagentvm: the boot disk's script failed: 3/, 'is told of');

# the rest of the script outlives the boot, as a child of PID 1
$machine = AgentVM::QEMU->new($micro, boot => script("AGENTVM_DEADMAN_ALLOWANCE=8\n", <<'END'))->start;
echo "mode $(stat -c %a /etc/agentvm/runtime.env) umask $(umask)"
echo "disk $(cat /sys/block/vda/serial) links $(ls /sys/class/net)"
{
	until [ "$(cat /proc/1/comm)" = agentvm-runtime ]; do usleep 100000; done
	for n in 1 2 3 4 5; do (true &) ; done
	sh -c 'sleep 0.2 & sleep 0.1 &'
	sleep 1
	echo "name $(hostname) zombies $(cat /proc/[0-9]*/stat | grep -c ') Z ') left $(ls /run | grep -c boot)"
	echo "mounts $(cut -d' ' -f2 /proc/mounts | sort -u | tr '\n' ' ')"
	echo "resident $(sed -n 's/^VmRSS:[^0-9]*//p' /proc/1/status)"
} >/dev/console 2>&1 &
END
$began = time;
$machine->says(qr/msg=bootstrapping/, 'the runtime has started');
note(sprintf 'after %.1f s', time - $began);
$machine->says(qr/mode 600 umask 0077/, 'the boot script has run before');
like($machine->output, qr/disk agentvm-boot links lo\r?\n/, 'there is no network but lo');
$machine->says(qr/resident \d+ kB/, 'PID 1 is the runtime');
like($machine->output, qr/name agentvm-01234567-89ab-7def-8123-456789abcdef zombies 0 left 0/, 'it reaps children; the machine has its name; no script is left');
like($machine->output, qr/mounts \/ \/dev \/proc \/run \/sys /, 'what is mounted');
cmp_ok(($machine->output =~ /resident (\d+) kB/)[0], '<=', 6 * 1024, 'resident: ' . ($machine->output =~ /resident (\d+)/)[0] . ' kB');
$machine->exits(0, 'without control plane it powers off after the allowance');
like($machine->output, qr/powers itself off" reason="the control plane has been gone/, 'by itself');
unlike($machine->output, qr/f{64}/, 'the token is not on the console');

done_testing();
