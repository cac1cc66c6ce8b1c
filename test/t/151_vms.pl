# Real VMs, from provision() to the end: what they reach, their tokens, and what may happen to gateway, database and host
use strict;
use warnings;
use AgentVM::Runtime;
use AgentVM::Stack;
use AgentVM::Test;
use HTTP::Tiny;
use JSON::PP ();
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep time);

my $stack = AgentVM::Stack->new;
my ($node, $gateway, $libvirt) = ($stack->node, $stack->gateway, $stack->libvirt);

# ---- what a guest reaches: as root, before its runtime starts; it tells by the name that it gives itself ----
my $port = $gateway->port;
my $here = (gethostbyname((POSIX::uname())[1]))[4];
my $address = $here ? join('.', unpack('C4', $here)) : '10.0.2.2';
$stack->profile('nosy', { initrd => $stack->initrd('nosy', 'bin/agentvm-look' => <<"SH", 'bin/agentvm-boot' => <<'SH') });
#!/bin/sh
said="links-\$(echo \$(ls /sys/class/net) | tr ' ' -).routes-\$(tail -n +2 /proc/net/route | wc -l)"
for to in 127.0.0.1:$port 10.0.2.2:$port $address:$port 8.8.8.8:53; do
	if nc -w 2 \${to%:*} \${to##*:} </dev/null 2>/dev/null; then said=\$said.reaches; else said=\$said.no; fi
done
echo "\$said" >/proc/sys/kernel/hostname
SH
#!/bin/sh
tr -d '\000' </dev/vda >/run/boot
sh /run/boot
agentvm-look
SH
my $nosy = $stack->ready('nosy');
is($node->safe_psql('postgres', "SELECT boot_info ->> 'hostname' FROM agentvm.session WHERE session_id = '$nosy'"), 'links-lo.routes-0.no.no.no.no',
	"a guest has no network, and reaches neither the host's loopback nor the host nor an outside address");
$stack->beats($nosy, 'but the gateway');
psql_ok($node, "SELECT agentvm.terminate('$nosy')");
$stack->ended($nosy, 'requested');

# ---- ready ----
my ($one, $two) = $stack->ready('micro', 2);
is(join(' ', sort $libvirt->domains), join(' ', sort map { "agentvm-$_" } $one, $two), 'two domains');
is($node->safe_psql('postgres', "SELECT boot_info ->> 'hostname' FROM agentvm.session WHERE session_id = '$one'"), "agentvm-$one", 'a VM has the name of its domain');
$stack->beats($_) for $one, $two, $one, $two;

# ---- tokens ----
sub post
{
	my ($path, $token, $body) = @_;
	return HTTP::Tiny->new->post($gateway->url . $path, { headers => { Authorization => "Bearer $token", 'Content-Type' => 'application/json' }, content => $body // '{}' })->{status};
}
my $thief = '{"session_token_sha256": "' . 'ab' x 32 . '", "boot_id": "other", "runtime_version": "x", "hostname": "x"}';
is(post('/v1/bootstrap', bootstrap_token($node, $one), $thief), 401, 'a bootstrap token that has been used is good for nobody else');
$stack->beats($one, 'its owner goes on');
psql_ok($node, "SELECT agentvm.terminate('$two')");
$stack->ended($two, 'requested');
is(post('/v1/bootstrap', bootstrap_token($node, $two), $thief), 410, 'nor is that of a session that has ended');

# a VM that is given the token of another session, which has used it: it does not become that session
my $token = bootstrap_token($node, $one);
$stack->profile('impostor', { initrd => $stack->initrd('impostor', 'bin/agentvm-boot' => <<"SH") }, "bootstrap_timeout => '90 seconds'");
#!/bin/sh
tr -d '\\000' </dev/vda >/run/boot
sh /run/boot
sed -i 's/^AGENTVM_BOOTSTRAP_TOKEN=.*/AGENTVM_BOOTSTRAP_TOKEN=$token/' /etc/agentvm/runtime.env
echo AGENTVM_BOOTSTRAP_TRIES=2 >>/etc/agentvm/runtime.env
echo AGENTVM_BOOTSTRAP_INTERVAL=1 >>/etc/agentvm/runtime.env
SH
my $impostor = $stack->vm('impostor');
await($node, "SELECT vm_id IS NOT NULL FROM agentvm.sessions WHERE session_id = '$impostor'", 't', timeout => 120);
$stack->powers_off($impostor, "a VM with another session's token is refused, and powers off");
my $ends = substr($token, 0, 4) . '...' . substr($token, -4);
like($gateway->output, qr/VM is connected" vm=vm:$impostor.*msg=token token=\Q$ends\E(?!.*msg=bootstrap)/s, 'the gateway has had that token from it, and no bootstrap came of it');
is($node->safe_psql('postgres', "SELECT state FROM agentvm.sessions WHERE session_id = '$impostor'"), 'provisioning', 'its session is not ready');
$stack->beats($one, 'the other one goes on');

# ---- the gateway is killed, and another one comes ----
my $qemu = $stack->qemu($one);
$gateway->stop('KILL');
$gateway->start;
$stack->beats($one, 'the gateway was killed: the VM goes on with the next') for 1, 2;

# ---- the server restarts, and then crashes ----
$node->restart;
$stack->beats($one, 'the server has been restarted: the VM goes on') for 1, 2;
is(JSON::PP::decode_json($node->safe_psql('postgres', "SELECT agentvm.inspect('$one')"))->{state}, 'running', 'and is known to the new server');
$node->stop('immediate');
$node->start;
$stack->beats($one, 'the server has crashed: the VM goes on') for 1, 2;
is($stack->qemu($one), $qemu, 'it is the same one');
psql_ok($node, "SELECT agentvm.terminate('$impostor')") if $node->safe_psql('postgres', "SELECT state FROM agentvm.sessions WHERE session_id = '$impostor'") eq 'provisioning';
await_state($node, $impostor, 'terminated|failed', timeout => 180);
$libvirt->nothing_left($impostor);

# ---- the session ends while nobody takes the VM away: the gateway says so, and it powers off ----
my $runner = $node->safe_psql('postgres', "SELECT pid FROM agentvm.stat_dispatcher WHERE kind = 'runner'");
kill 'STOP', $runner;
psql_ok($node, "SELECT agentvm.terminate('$one')");
$stack->powers_off($one, '410: a VM whose session has ended powers off by itself');
is(state_of($node, $one), 'terminating requested', 'before anybody has ended it');
kill 'CONT', $runner;
$stack->ended($one, 'requested', 'and so the session ends');

# ---- a VM falls silent ----
$stack->profile('watched', {}, "heartbeat_timeout => '15 seconds'");
my $silent = $stack->ready('watched');
$stack->beats($silent);
kill 'STOP', $stack->qemu($silent);
$stack->ended($silent, 'heartbeat_timeout', 'a frozen VM is noticed, and taken away');

is(join(' ', $libvirt->domains, $libvirt->files, $libvirt->qemu), '', 'nothing is left on the host');
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.placement'), 0, 'all room is free again');

done_testing();
