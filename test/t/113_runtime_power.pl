# How agentvm-runtime powers a machine off where it is not PID 1: systemctl first, then whatever else there is, the kernel at
# last. In a root and namespaces of its own; systemctl and poweroff are stand-ins that say what they were asked
use strict;
use warnings;
use AgentVM::Process;
use AgentVM::VM;
use File::Copy qw(copy);
use PostgreSQL::Test::Utils;
use Test::More;

my @namespaces = ('unshare', '--user', '--map-root-user', '--pid', '--fork', '--mount');
plan skip_all => 'no user namespaces here, or none that may mount /proc' if system("@namespaces sh -c 'mount -t proc proc /proc' 2>/dev/null") != 0;

# A machine without a control plane: what is in its log when it has gone off; programs are [name, exit code]
sub goes_off
{
	my (@programs) = @_;
	my $root = PostgreSQL::Test::Utils::tempdir('machine');
	mkdir "$root/$_" for qw(etc proc dev bin sbin);
	copy('/bin/busybox', "$root/bin/busybox");
	copy($AgentVM::VM::binary, "$root/bin/agentvm-runtime");
	symlink('busybox', "$root/bin/$_") for qw(sh echo mount);
	for (@programs)
	{
		my ($name, $code) = @$_;
		append_to_file("$root/$name", "#!/bin/sh\necho \"$name \$*\" >>/log\nexit $code\n");
		chmod 0755, "$root/$name";
	}
	chmod 0755, glob "$root/bin/*";
	append_to_file("$root/etc/runtime.env", "AGENTVM_GATEWAY_URL=http://127.0.0.1:1\nAGENTVM_BOOTSTRAP_TOKEN=0123456789abcdef\nAGENTVM_DEADMAN_ALLOWANCE=0.3\nAGENTVM_POWEROFF_RETRY=1\n");
	chmod 0600, "$root/etc/runtime.env";
	# the shell is PID 1, so that the runtime is not
	my $machine = AgentVM::Process->new('machine', @namespaces, '--net', '--kill-child', 'sh', '-c',
		'mount --rbind /dev "$0/dev" && exec chroot "$0" /bin/sh -c "mount -t proc proc /proc; PATH=/bin; agentvm-runtime --config=/etc/runtime.env; echo \"ended: \$?\""', $root);
	$machine->start;
	# reboot() ends PID 1 of its namespace by SIGINT, which unshare passes on
	is($machine->code(AgentVM::Process::timeout()), 130, 'the machine goes off') || diag($machine->output);
	like($machine->output, qr/powers? off|power/i, 'and says so');
	return -e "$root/log" ? slurp_file("$root/log") : '';
}

is(goes_off([ 'bin/systemctl', 0 ], [ 'sbin/poweroff', 0 ], [ 'bin/poweroff', 0 ]), "bin/systemctl poweroff\nsbin/poweroff \nbin/poweroff \n", 'systemctl is asked; while nothing comes of it, the next');
is(goes_off([ 'bin/systemctl', 1 ], [ 'sbin/poweroff', 0 ]), "bin/systemctl poweroff\nsbin/poweroff \n", 'one that fails is followed by the next');
is(goes_off([ 'sbin/poweroff', 1 ]), "sbin/poweroff \n", 'so is one that there is none of');
is(goes_off(), '', 'the kernel remains');
done_testing();
