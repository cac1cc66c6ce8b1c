# The whole loop with nothing pretended: a VM by the provider libvirt boots the micro image, its runtime reaches a real
# gateway through the virtio port, beats, outlives the server, and is missed when it is gone
use strict;
use warnings;
use AgentVM::Gateway;
use AgentVM::Libvirt;
use AgentVM::QEMU;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my $image = micro_image();
my $libvirt = AgentVM::Libvirt->new;
my $node = new_node('main', conf => "agentvm.provider_libraries = 'agentvm_libvirt'\nagentvm.heartbeat_interval = '1s'\nagentvm.heartbeat_timeout = '20s'\nagentvm.bootstrap_timeout = '10min'\n");
sub sql { return $node->safe_psql('postgres', @_); }
my $gateway = AgentVM::Gateway->new($node, options => [ '--vm-sockets', $libvirt->vms ]);
sql("ALTER SYSTEM SET agentvm.gateway_url = '" . $gateway->url . q{'; SELECT pg_reload_conf(); SELECT agentvm.create_team('acme', provider => 'libvirt')});
sql(q{SELECT agentvm.create_profile('micro', 'libvirt', memory_mib => 256, options => } . json({ kernel => "$image/kernel", initrd => "$image/initrd" }) . ')');
$libvirt->host($node);
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a runner');

my $began = time;
my $session = provision($node, 'acme', "profile => 'micro'", q{env => '{"A": "b"}'});
await_state($node, $session, 'ready', timeout => 300) or diag($gateway->output);
note(sprintf('ready after %.2f s', time - $began));
is(sql("SELECT region, vm_id FROM agentvm.sessions WHERE session_id = '$session'"), "here|agentvm-$session", 'where it is');
my $beat = "SELECT count(*) FROM agentvm.sessions WHERE session_id = '$session' AND last_heartbeat_at > ";
await($node, $beat . literal(sql('SELECT now()')), 1, timeout => 120, name => 'it beats');
$node->restart;
await($node, $beat . literal(sql('SELECT now()')), 1, timeout => 120, name => 'after a restart of the server, too');
is(sql("SELECT state FROM agentvm.sessions WHERE session_id = '$session'"), 'ready', 'it has outlived it');
kill('KILL', $libvirt->qemu($session));
await_state($node, $session, 'failed', timeout => 120);
like(state_of($node, $session), qr/^failed provider_lost the VM was gone/, 'a VM that vanishes is missed');
is(sql("SELECT string_agg(concat_ws(' ', new_state, reason), ', ' ORDER BY event_id DESC) FROM (SELECT * FROM agentvm.session_event WHERE session_id = '$session' AND old_state IS NOT NULL ORDER BY event_id DESC LIMIT 2) e"),
	'failed provider_lost, terminating heartbeat_timeout', 'the log tells both');
$libvirt->nothing_left($session);

$session = provision($node, 'acme', "profile => 'micro'");
await_state($node, $session, 'ready', timeout => 300);
sql("SELECT agentvm.pause('$session')");
await_state($node, $session, 'paused');
sql("SELECT agentvm.resume('$session')");
await_state($node, $session, 'ready');
await($node, $beat =~ s/'[0-9a-f-]{36}'/'$session'/r . literal(sql("SELECT resumed_at FROM agentvm.session WHERE session_id = '$session'")), 1, timeout => 120, name => 'after a pause it goes on, and beats');
psql_ok($node, "SELECT agentvm.terminate('$session')", 'terminate()');
await_state($node, $session, 'terminated', timeout => 120);
$libvirt->nothing_left($session);
done_testing();
