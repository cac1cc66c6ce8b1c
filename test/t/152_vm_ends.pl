# Real VMs that come to nothing, or to their end: no runtime, too old, ended while they boot, nobody left to answer to; and one that is taken warm before
use strict;
use warnings;
use AgentVM::Stack;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my $stack = AgentVM::Stack->new(conf => "agentvm.deadman_allowance = 20\nagentvm.deadline_grace = 600\n");
my ($node, $libvirt) = ($stack->node, $stack->libvirt);

# ---- an image without a runtime ----
$stack->profile('mute', { initrd => $stack->initrd('mute', 'bin/agentvm-runtime' => "#!/bin/sh\nwhile :; do sleep 1000; done\n") }, "bootstrap_timeout => '20 seconds'");
my $mute = $stack->vm('mute');
await($node, "SELECT vm_id IS NOT NULL FROM agentvm.sessions WHERE session_id = '$mute'", 't', timeout => 120, name => 'an image without a runtime is launched');
ok($stack->qemu($mute), 'and runs');
my $warm = $node->safe_psql('postgres', q{SELECT agentvm.provision_warm('acme', 'micro')});    # which boots meanwhile
$stack->ended($mute, 'bootstrap_timeout', 'it never reports for duty');

# ---- a warm VM, and whoever takes it ----
await_state($node, $warm, 'warm', timeout => $AgentVM::Stack::patience, name => 'a VM that waits for whoever takes it');
my $qemu = $stack->qemu($warm);
fails_with($node, "SELECT agentvm.exec('$warm', 'true')", 'AV007', qr/waits for a provision/, 'until then it runs nothing');
is($stack->vm('micro', q{env => '{"WHO": "alice"}'}), $warm, 'it is taken');
is($node->safe_psql('postgres', "SELECT stdout FROM agentvm.exec('$warm', 'echo \$WHO; hostname')"), "alice\nagentvm-$warm\n", 'and has what its session was asked for with');
is($stack->qemu($warm), $qemu, 'it is the same VM');
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session_hydrating'), 0, 'nothing is missing');
psql_ok($node, "SELECT agentvm.terminate('$warm')");
$stack->ended($warm, 'requested');

# ---- a lifetime ----
$stack->profile('short', {}, "max_lifetime => '40 seconds'");
my $short = $stack->ready('short');
$stack->ended($short, 'max_lifetime', 'a lifetime comes to its end');
my $lived = $node->safe_psql('postgres', "SELECT extract(epoch FROM ended_at - created_at) FROM agentvm.sessions WHERE session_id = '$short'");
cmp_ok($lived, '>=', 40, "and not before: $lived s");

# ---- terminate() while it is launched, and while it boots ----
my $young = $stack->vm;
psql_ok($node, "SELECT agentvm.terminate('$young')", 'terminate() at once');
$stack->ended($young, 'requested');
my $booting = $stack->vm;
await($node, "SELECT vm_id IS NOT NULL FROM agentvm.sessions WHERE session_id = '$booting'", 't', timeout => 120);
psql_ok($node, "SELECT agentvm.terminate('$booting')", 'terminate() while it boots');
is($node->safe_psql('postgres', "SELECT ready_at FROM agentvm.sessions WHERE session_id = '$booting'"), '', 'before it is ready');
$stack->ended($booting, 'requested');

# ---- no database: the VM ends itself ----
$stack->profile('lonely', {}, "heartbeat_timeout => '30 seconds'");
my $lonely = $stack->ready('lonely');
$stack->beats($lonely);
my $stopped = time;
$node->stop;
$stack->powers_off($lonely, 'without a database the VM powers itself off');
cmp_ok(time - $stopped, '>', 15, sprintf 'after its allowance of 20 s: %.1f s', time - $stopped);
my $end = time + 60;
sleep 0.1 while $libvirt->domains && time < $end;
is(join(' ', $libvirt->domains), '', 'its domain is gone');
$node->start;
$stack->ended($lonely, 'provider_lost', 'the server learns of it by its silence');

is(join(' ', $libvirt->domains, $libvirt->files, $libvirt->qemu), '', 'nothing is left on the host');

done_testing();
