# A libvirtd that is root's (qemu:///system): the same life of a VM
use strict;
use warnings;
use AgentVM::QEMU;
use AgentVM::Stack;
use AgentVM::SystemLibvirt;
use AgentVM::Test;
use File::Copy qw(copy);
use PostgreSQL::Test::Utils qw(slurp_file);
use Test::More;
use Time::HiRes qw(sleep time);

my $lacks = AgentVM::SystemLibvirt->lacks;
plan skip_all => $lacks if $lacks;

# where the libvirtd sees it, which has a /var/cache of its own
my $libvirt = AgentVM::SystemLibvirt->new;
my $image = $libvirt->dir . '/image';
mkdir $image;
copy(micro_image() . "/$_", "$image/$_") or die "$_: $!" for qw(kernel initrd);
$ENV{AGENTVM_MICRO} = $image;

my $stack = AgentVM::Stack->new(libvirt => $libvirt);
my $node = $stack->node;
sub sql { return $node->safe_psql('postgres', @_); }
sub inspected { return sql("SELECT agentvm.inspect('$_[0]') ->> 'state'"); }
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a runner');
sql("UPDATE agentvm.host SET accel = 'tcg'");

like(slurp_file('/proc/' . $libvirt->daemon . '/uid_map'), qr/^\s*0\s+$>\s+1$/, 'its libvirtd is root, as which we are known to it');
my $check = JSON::PP::decode_json(sql("SELECT agentvm.check_provider('acme') #> '{hosts,here}'"));
ok($check->{ok}, 'the host is in order') or diag(JSON::PP->new->pretty->encode($check), $libvirt->output);

my $session = $stack->ready('micro') or diag($libvirt->output);
is(inspected($session), 'running', 'inspect()');
is(join(' ', $libvirt->domains), "agentvm-$session", 'one domain');
is(join(' ', $libvirt->files), "$session.boot $session.sock", 'its files');
$stack->beats($session);

my ($daemon, $qemu) = ($libvirt->daemon, $libvirt->qemu($session));
kill('KILL', $daemon);
my $end = time + AgentVM::Process::timeout();
sleep 0.1 until ($libvirt->daemon // $daemon) != $daemon || time > $end;
$libvirt->await;
isnt($libvirt->daemon, $daemon, 'libvirtd is killed, and another one comes');
await($node, "SELECT agentvm.inspect('$session') ->> 'state'", 'running', name => 'which knows the VM');
is($libvirt->qemu($session), $qemu, 'it is the same');
$stack->beats($session);

# ---- a network, for those whose profile names it ----
$libvirt->network('agents0');
$stack->profile('online', { network => 'agents0' });
my $online = $stack->ready('online') or diag($libvirt->output);
my $exec = "SELECT rtrim(stdout || stderr, E'\\n') FROM agentvm.exec('%s', '%s')";
await($node, sprintf($exec, $online, 'echo GET /hello | nc -w 10 192.168.77.1 8080'), 'hello from outside', timeout => 60, name => 'a VM whose profile names a network has an address, and reaches what is there') or diag($libvirt->output);
like(sql(sprintf($exec, $online, 'ip -4 -o addr show dev eth0')), qr/192\.168\.77\.\d\d\/24/, 'its address is of that network');
$stack->beats($online);
is(sql(sprintf($exec, $session, 'cd /sys/class/net; echo *; echo GET /hello | nc -w 10 192.168.77.1 8080 2>/dev/null || echo no')), "lo\nno", 'a VM beside it, whose profile names none, has none, and reaches nothing');
psql_ok($node, "SELECT agentvm.terminate('$online')");
$stack->ended($online, 'requested');
$stack->profile('lost', { network => 'nowhere' });
my $lost = $stack->vm('lost');
await($node, "SELECT end_reason || ' ' || (detail ~ 'nowhere') FROM agentvm.sessions WHERE session_id = '$lost'", 'provider_error true', timeout => 60, name => 'a network that is not there is named in the error')
  or diag(state_of($node, $lost));

psql_ok($node, "SELECT agentvm.terminate('$session')", 'terminate()');
$stack->ended($session, 'requested');
is(join(' ', $libvirt->domains, $libvirt->files, $libvirt->qemu), '', 'nothing is left');
done_testing();
