# agentvm-runtime and those it believes: certificates, names, and a root with nothing in it but the binary
use strict;
use warnings;
use AgentVM::Certificates;
use AgentVM::Gateway;
use AgentVM::Runtime;
use AgentVM::Test;
use AgentVM::VM;
use File::Copy qw(copy);
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "agentvm.heartbeat_interval = 1\nagentvm.heartbeat_timeout = 600\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");

# ---- certificates ----
my $ca = authority('ca');
my $other_ca = authority('other');
my $good = certificate('good', 'ca', 'IP:127.0.0.1, DNS:gateway.test');
my $named = certificate('named', 'ca', 'DNS:elsewhere.test');
my $expired = certificate('expired', 'ca', 'IP:127.0.0.1', -1);

sub launched
{
	my $id = provision($node, 'acme', 'options => \'{"runtime": true}\'');
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$id'", 't', name => 'a session with a runtime');
	return $id;
}
# A runtime that is to be content with that gateway, or not
sub believes
{
	my ($gateway, $name, %settings) = @_;
	my $id = launched();
	my $vm = AgentVM::VM->new($gateway->url, bootstrap_token($node, $id), %settings)->start;
	$vm->says(qr/channel is open/, $name);
	$vm->says(qr/first heartbeat acknowledged/, 'and it beats');
	my ($resident) = slurp_file('/proc/' . $vm->pid . '/status') =~ /VmRSS:\s+(\d+) kB/;
	cmp_ok($resident * 1024, '<=', 6_000_000, "resident: $resident kB");
	return is($vm->stop, 0);
}
sub refuses
{
	my ($gateway, $name, $like, %settings) = @_;
	my $vm = AgentVM::VM->new($gateway->url, 'f' x 64, BOOTSTRAP_TRIES => 2, %settings)->start;
	$vm->exits(1, "$name is refused");
	like($vm->output, $like, 'for that reason');
	return unlike($vm->output . $gateway->output, qr/token is refused|msg=token token=ffff/, 'before any token is sent');
}

my $gateway = AgentVM::Gateway->new($node, tls => $good);
believes($gateway, 'a CA file', CA_FILE => $ca);
believes($gateway, 'a fingerprint', FINGERPRINT => fingerprint($good->[0]));
believes($gateway, 'a fingerprint without colons, in lower case', FINGERPRINT => lc(fingerprint($good->[0]) =~ s/://gr));
refuses($gateway, 'a certificate of another CA', qr/certificate is refused.*unable to get local issuer/, CA_FILE => $other_ca);
refuses($gateway, 'a certificate of no public CA', qr/certificate is refused/);
refuses($gateway, 'another fingerprint', qr/has another fingerprint/, FINGERPRINT => fingerprint($named->[0]));
$gateway->stop;
$gateway = AgentVM::Gateway->new($node, tls => $named);
refuses($gateway, 'a certificate for another name', qr/certificate is refused.*IP address mismatch/, CA_FILE => $ca);
$gateway->stop;
$gateway = AgentVM::Gateway->new($node, tls => $expired);
refuses($gateway, 'an expired certificate', qr/certificate is refused.*has expired/, CA_FILE => $ca);
believes($gateway, 'one that is pinned is good whatever its dates', FINGERPRINT => fingerprint($expired->[0]));
$gateway->stop;

# ---- nothing but the binary ----
my @namespaces = ('unshare', '--user', '--map-root-user', '--pid', '--fork', '--mount');
if (system("@namespaces sh -c 'mount -t proc proc /proc' 2>/dev/null") != 0)
{
	note('no user namespaces here, or none that may mount /proc: the rest is left out');
	done_testing();
	exit;
}

# A loopback interface, and a name server on it that knows one name
my $names = PostgreSQL::Test::Utils::tempdir() . '/names';
append_to_file($names, <<'PERL');
use IO::Socket::INET;
my ($any, $up) = (undef, pack('a16s', 'lo', 0x41) . "\0" x 22);
socket($any, AF_INET, SOCK_DGRAM, 0) && ioctl($any, 0x8914, $up) or die "could not set lo up: $!";
my $server = IO::Socket::INET->new(Proto => 'udp', LocalAddr => '127.0.0.1:53') or die "could not listen: $!";
while (my $from = $server->recv(my $query, 512))
{
	my $known = substr($query, 12) =~ /^\x07gateway\x04test\x00\x00\x01/;
	my ($question) = substr($query, 12) =~ /^([^\0]*\0....)/s;
	$server->send(substr($query, 0, 2) . pack('n5', 0x8180, 1, $known ? 1 : 0, 0, 0) . $question . ($known ? pack('n3NnC4', 0xc00c, 1, 1, 60, 4, 127, 0, 0, 1) : ''), 0, $from);
}
PERL

# An image: the binary, its settings, the CA, and where names come from. /dev stands for what a kernel would mount there,
# which nobody but the real root may. With "busybox" it has that as well, as its /bin and first program; with
# "authorities" there is no AGENTVM_CA_FILE, but the public ones' file with our CA at its end
sub image
{
	my ($gateway, %files) = @_;
	my ($busybox, $authorities) = delete @files{qw(busybox authorities)};
	my $root = PostgreSQL::Test::Utils::tempdir('image');
	my $id = launched();
	system_or_bail('strip', '-o', "$root/init", $AgentVM::VM::binary);
	mkdir "$root/$_" for qw(etc proc dev);
	my ($trust, @first) = ('', '/init');
	if ($busybox)
	{
		mkdir "$root/bin";
		copy('/bin/busybox', "$root/bin/busybox");
		chmod 0755, "$root/bin/busybox";
		symlink('busybox', "$root/bin/$_") for qw(sh echo ls);
		@first = ('/bin/sh', '-c', 'echo "libraries: $(echo /lib* /usr/lib* /etc/nsswitch.conf)"; exec "$0" "$@"', '/init');
	}
	if ($authorities)
	{
		mkdir "$root/etc/$_" for qw(ssl ssl/certs);
		append_to_file("$root/etc/ssl/certs/ca-certificates.crt", slurp_file('/etc/ssl/certs/ca-certificates.crt') . slurp_file($ca));
	}
	else
	{
		copy($ca, "$root/etc/ca.pem");
		$trust = "AGENTVM_CA_FILE=/etc/ca.pem\n";
	}
	append_to_file("$root/etc/$_", $files{$_}) for keys %files;
	append_to_file("$root/etc/runtime.env", "AGENTVM_GATEWAY_URL=https://gateway.test:" . $gateway->port . "\nAGENTVM_BOOTSTRAP_TOKEN=" . bootstrap_token($node, $id) . "\n${trust}AGENTVM_BOOTSTRAP_INTERVAL=0.5\n");
	chmod 0600, "$root/etc/runtime.env";
	# the gateway is in there, too: it needs but the database's socket
	my $machine = AgentVM::Process->new('image', @namespaces, '--net', '--kill-child', 'sh', '-c',
		'mount --rbind /dev "$0/dev" && { perl "$1" & root=$0; shift; "$@" & exec chroot "$root" ' . join(' ', map { "'" . $_ . "'" } @first) . ' --config=/etc/runtime.env quiet --splash; }', $root, $names, @{ $gateway->{command} });
	return ($id, $machine, "$root/etc/runtime.env", $root);
}

$gateway = AgentVM::Gateway->new($node, tls => $good);
$gateway->stop;    # its port and command are used
# KiB of the process that has that root and that name
sub resident
{
	my ($root, $name) = @_;
	for my $process (glob '/proc/[0-9]*')
	{
		my $status = (readlink("$process/root") // '') eq $root ? eval { slurp_file("$process/status") } // '' : '';
		return $1 if $status =~ /^Name:\t\Q$name\E\n.*^VmRSS:\s+(\d+) kB/ms;
	}
	return 1e9;
}
for ([ 'by DNS', 'resolv.conf' => "nameserver 127.0.0.1\n" ], [ 'by /etc/hosts', hosts => "127.0.0.1 gateway.test\n" ],
	[ 'by DNS, among busybox, the gateway\'s CA among the public ones', 'resolv.conf' => "nameserver 127.0.0.1\n", busybox => 1, authorities => 1 ])
{
	my ($how, %files) = @$_;
	my ($id, $machine, undef, $root) = image($gateway, %files);
	$machine->start;
	await_state($node, $id, 'ready', name => "in an empty root, as PID 1: $how") || diag($machine->output);
	$machine->says(qr/first heartbeat acknowledged/, 'it beats');
	like($machine->output, qr{^libraries: /lib\* /usr/lib\* /etc/nsswitch.conf$}m, 'where there is no library that could resolve a name') if $files{busybox};
	my $resident = resident($root, 'init');
	cmp_ok($resident * 1024, '<=', 6_000_000, "resident: $resident kB");
	psql_ok($node, "SELECT agentvm.terminate('$id')");
	# in a namespace of its own reboot() ends PID 1 by SIGINT, which unshare passes on
	is($machine->code(AgentVM::Process::timeout()), 130, 'as PID 1 it powers off when its session has ended') || diag($machine->output);
	like($machine->output, qr/the session has ended.*powering off/s, 'for that');
}
my ($id, $machine, $settings) = image($gateway, 'resolv.conf' => "nameserver 127.0.0.1\n", hosts => "127.0.0.1 other.test\n");
append_to_file($settings, "AGENTVM_GATEWAY_URL=https://nowhere.test\nAGENTVM_BOOTSTRAP_TRIES=2\nAGENTVM_BOOTSTRAP_INTERVAL=0.1\n");
is($machine->start->code(AgentVM::Process::timeout()), 130, 'a machine that cannot bootstrap powers off');
like($machine->output, qr/host name cannot be resolved.*bootstrap is given up.*powering off/s, 'for that');

done_testing();
