# A machine of QEMU's own, without libvirt and without our server: to see what an image does. Its console is the output.
#
#	my $machine = AgentVM::QEMU->new(micro_image(), boot => "echo hello\n", cmdline => 'agentvm.probe')->start;
#	$machine->says(qr/hello/, 'what it shows');
#	$machine->exits(0, 'it has powered itself off');
package AgentVM::QEMU;

use strict;
use warnings;
use parent -norequire, 'AgentVM::Process';
use AgentVM::Process;
use Exporter 'import';
use File::Basename qw(dirname);
use PostgreSQL::Test::Utils ();

our @EXPORT = qw(micro_image debian_image);
our $build = dirname(__FILE__) . '/../../../infra/microvm/build';

# The directory of an image: made before by test/run, else now
sub micro_image { return image('micro'); }
sub debian_image { return image('debian'); }
sub image
{
	my ($kind) = @_;
	my $dir = $ENV{ 'AGENTVM_' . uc $kind };
	return $dir if $dir;
	my @output = readpipe("$build $kind");
	die "$build $kind failed" if $?;
	chomp($dir = $output[-1]);
	return $ENV{ 'AGENTVM_' . uc $kind } = $dir;
}

# Options: boot (the script on the boot disk; none: no such disk), cmdline (more of it), memory (MiB), more (arguments of QEMU)
sub new
{
	my ($class, $image, %opt) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir('machine');
	my (@disks, $cmdline);
	if (-e "$image/disk.qcow2")
	{
		system('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', "$image/disk.qcow2", '-F', 'qcow2', "$dir/disk", '8G') == 0 or die 'qemu-img failed';
		@disks = ('-drive', "if=none,id=root,file=$dir/disk,format=qcow2", '-device', 'virtio-blk-pci,drive=root');
		$cmdline = 'root=/dev/vda rw';
	}
	if (defined $opt{boot})
	{
		open(my $file, '>', "$dir/boot") or die "$dir/boot: $!";
		print $file $opt{boot}, "\0" x (-length($opt{boot}) % 512);
		close($file);
		push @disks, '-drive', "if=none,id=boot,file=$dir/boot,format=raw,readonly=on", '-device', 'virtio-blk-pci,drive=boot,serial=agentvm-boot';
	}
	return $class->SUPER::new('machine', 'qemu-system-x86_64', '-nodefaults', '-no-user-config', '-machine', 'q35,accel=tcg', '-cpu', 'max', '-m', $opt{memory} // 256,
		'-display', 'none', '-serial', 'stdio', '-no-reboot', '-kernel', "$image/kernel", '-initrd', "$image/initrd",
		'-append', join(' ', 'console=ttyS0 quiet no_timer_check panic=-1', grep { defined } $cmdline, $opt{cmdline}), '-device', 'virtio-rng-pci', @disks, @{ $opt{more} // [] });
}

1;
