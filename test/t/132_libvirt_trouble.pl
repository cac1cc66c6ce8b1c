# Real VMs by the provider libvirt when things go wrong: libvirtd that stops answering, dies or is away; a server that is
# killed in mid-call, or restarted; a VM that vanishes. Never a second VM, nothing left, nobody else held up
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Libvirt;
use AgentVM::Test;
use PostgreSQL::Test::Utils qw(append_to_file system_or_bail);
use Test::More;
use Time::HiRes qw(sleep time);

my $libvirt = AgentVM::Libvirt->new;
my $image = $libvirt->options;
# the libvirtd's qemu-img waits while there is a file "hold"
my $bin = $libvirt->dir . '/bin';
mkdir $bin;
append_to_file("$bin/qemu-img", "#!/bin/sh\nwhile [ -e $bin/hold ]; do : > $bin/held; sleep 0.1; done\nexec /usr/bin/qemu-img \"\$\@\"\n");
chmod(0755, "$bin/qemu-img");
$ENV{PATH} = "$bin:$ENV{PATH}";
my $node = new_node('main', conf => "agentvm.provider_libraries = 'agentvm_libvirt'\nagentvm.lease = '12s'\nagentvm.launch_settle = '10min'\nrestart_after_crash = on\n");
sub sql { return $node->safe_psql('postgres', @_); }
sub inspected { return sql("SELECT agentvm.inspect('$_[0]') ->> 'state'"); }
sub launched { my $session = provision($node, 'acme', "profile => 'plain'"); await_state($node, $session, 'ready', timeout => 120); return $session; }
sub terminate { psql_ok($node, "SELECT agentvm.terminate('$_[0]')", 'terminate()'); return; }
sub ends { terminate($_[0]); await_state($node, $_[0], 'terminated', timeout => 120); $libvirt->nothing_left($_[0]); return; }
sub stop_daemon { my $pid = $libvirt->daemon; kill('STOP', $pid) == 1 or die 'no libvirtd'; return $pid; }
sub runner_pid { return sql("SELECT pid FROM agentvm.stat_dispatcher WHERE kind = 'runner'"); }
# after kill9: the processes of the server that is gone have to notice first
sub start_again
{
	my $end = time + AgentVM::Process::timeout();
	do { sleep 0.2; delete $node->{_pid} } until $node->start(fail_ok => 1) || time > $end;
	return;
}
# how long a statement took, in seconds
sub seconds { my ($code) = @_; my $began = time; $code->(); return time - $began; }

sql("SELECT agentvm.create_team('acme', provider => 'libvirt'); SELECT agentvm.set_provider('acme', 'libvirt', " . json($image) . ')');
sql("SELECT agentvm.create_profile('plain', 'libvirt', memory_mib => 256, runtime => false); CREATE DATABASE other");
$libvirt->host($node, accel => 'tcg');
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a runner');
my $steady = launched();

# ---- libvirtd stops answering in mid-call ----
my $daemon = stop_daemon();
my $session = provision($node, 'acme', "profile => 'plain'");
await($node, "SELECT in_flight FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a launch is under way');
cmp_ok(seconds(sub { sql('DROP DATABASE other') }), '<', 1, 'an unrelated DROP DATABASE takes under 1 s');
my $took = seconds(sub { fails_with($node, "SET statement_timeout = '500ms'; SELECT agentvm.inspect('$steady')", '57014', undef, 'inspect() obeys statement_timeout') });
cmp_ok($took, '<', 3, 'at once');
$took = seconds(sub { fails_with($node, "SET statement_timeout = '500ms'; SELECT agentvm.check_provider('acme')", '57014', undef, 'so does check_provider()') });
cmp_ok($took, '<', 3, 'at once');
await($node, "SELECT detail ~ 'NoReply' FROM agentvm.sessions WHERE session_id = '$session'", 't', timeout => 120, name => 'the launch has not been answered');
kill('CONT', $daemon);
await_state($node, $session, 'ready', timeout => 120);
is(scalar(grep { $_ eq "agentvm-$session" } $libvirt->domains), 1, 'it goes on: one domain');
ends($session);
is(inspected($steady), 'running', 'the other VM did not notice');

# ---- the same, and the session is to end meanwhile ----
stop_daemon();
$session = provision($node, 'acme', "profile => 'plain'");
await($node, "SELECT in_flight FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a launch is under way');
terminate($session);
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$session' AND detail ->> 'operation' = 'terminate'", 't', timeout => 120, name => 'no answer to the end either');
is(sql("SELECT state FROM agentvm.sessions WHERE session_id = '$session'"), 'terminating', 'so it is not over');
is(sql("SELECT count(*) FROM agentvm.placement WHERE session_id = '$session'"), 1, 'and its place is not given away');
kill('CONT', $daemon);
await_state($node, $session, 'terminated', timeout => 120);
$libvirt->nothing_left($session);

# ---- the runner is killed in mid-call ----
stop_daemon();
$session = provision($node, 'acme', "profile => 'plain'");
await($node, "SELECT in_flight FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a launch is under way');
my $runner = runner_pid();
kill('KILL', $runner);
$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM agentvm.stat_dispatcher WHERE kind = 'runner' AND pid <> $runner") or die 'no new runner';
kill('CONT', $daemon);
await_state($node, $session, 'ready', timeout => 120);
is(scalar(grep { $_ eq "agentvm-$session" } $libvirt->domains), 1, 'crash restart: one domain');
is(scalar(my @pids = $libvirt->qemu($session)), 1, 'one process');
is(inspected($steady), 'running', 'the other one lives through it');
ends($session);

# ---- the same, and the session is to end: another runner finds nothing at once, and looks again ----
stop_daemon();
$session = provision($node, 'acme', "profile => 'plain'");
await($node, "SELECT in_flight FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a launch is under way');
terminate($session);
$runner = runner_pid();
kill('KILL', $runner);
$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM agentvm.stat_dispatcher WHERE kind = 'runner' AND pid <> $runner") or die 'no new runner';
kill('CONT', $daemon);
await_state($node, $session, 'terminated', timeout => 120);
is(sql("SELECT ended_at >= created_at + interval '12 s' FROM agentvm.sessions WHERE session_id = '$session'"), 't', 'it is not over before the lease of the launch is');
$libvirt->nothing_left($session);

# ---- the runner is killed when the VM is there, and nobody has taken that down: the same VM, with its own files ----
stop_daemon();
$session = provision($node, 'acme', "profile => 'plain'");
await($node, "SELECT in_flight FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a launch is under way');
my $holder = AgentVM::Client->new($node);
$holder->run('BEGIN');
$holder->run("SELECT 1 FROM agentvm.session WHERE session_id = '$session' FOR UPDATE");
kill('CONT', $daemon);
my $until = time + AgentVM::Process::timeout();
sleep 0.1 until (grep { $_ eq "agentvm-$session" } $libvirt->domains) || time > $until;
my @before = ((stat($libvirt->vms . "/$session.boot"))[1], $libvirt->qemu($session));
$runner = runner_pid();
kill('KILL', $runner);
$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM agentvm.stat_dispatcher WHERE kind = 'runner' AND pid <> $runner") or die 'no new runner';
await_state($node, $session, 'ready', timeout => 120);
is_deeply([ (stat($libvirt->vms . "/$session.boot"))[1], $libvirt->qemu($session) ], \@before, 'the launch that is repeated leaves it as it is');
ends($session);

# ---- the server is killed just when the VM is being made ----
foreach my $wait (0.02, 0.1, 0.2, 0.3)
{
	$session = provision($node, 'acme', "profile => 'plain'");
	sleep $wait;
	$node->kill9;
	start_again();
	await_state($node, $session, 'ready', timeout => 120);
	is(scalar(@pids = $libvirt->qemu($session)), 1, "killed after $wait s: one VM");
	is("@{[ sort grep { /^$session/ } $libvirt->files ]}", "$session.boot", 'and its file');
	ends($session);
}
is(inspected($steady), 'running', 'the other one lives through it');

# ---- the database is restarted; libvirtd dies; both are adopted again ----
my $qemu = $libvirt->qemu($steady);
$node->restart;
is(state_of($node, $steady), 'ready', 'a restart of the database');
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a runner');
is(inspected($steady), 'running', 'the VM is known');
kill('KILL', $daemon);
await($node, "SELECT agentvm.inspect('$steady') ->> 'state'", 'running', timeout => 120, name => 'libvirtd is killed: another one is started, which knows the VM');
isnt($libvirt->daemon, $daemon, 'another one');
is($libvirt->qemu($steady), $qemu, 'the same QEMU');

# ---- libvirtd dies in the middle of a launch: it is repeated ----
foreach my $wait (0, 0.02, 0.05, 0.1, 0.2)
{
	$session = provision($node, 'acme', "profile => 'plain'");
	await($node, "SELECT count(*) > 0 FROM agentvm.session WHERE session_id = '$session' AND (handle ? 'sent_at' OR vm_id IS NOT NULL)", 't', name => 'a launch is sent');
	sleep $wait;
	kill('KILL', $libvirt->daemon // ());
	await_state($node, $session, 'ready', timeout => 120, name => "libvirtd died $wait s later: ready all the same");
	is(inspected($session), 'running', 'there it is');
	ends($session);
}

# ---- its directory cannot be read when it is to end: the end waits, so that nothing stays ----
$session = launched();
chmod(0, $libvirt->vms);
kill('KILL', $libvirt->daemon);
terminate($session);
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$session' AND detail ->> 'error' ~ 'directory.*Permission denied'", 't', timeout => 120, name => 'it is told');
is(sql("SELECT state FROM agentvm.sessions WHERE session_id = '$session'"), 'terminating', 'and not over');
$libvirt->virsh('destroy', "agentvm-$session");
sql("UPDATE agentvm.session SET end_reason = 'heartbeat_timeout' WHERE session_id = '$session'");
chmod(0700, $libvirt->vms);
await_state($node, $session, 'terminated', timeout => 120, name => 'that the VM is gone by then says nothing: an earlier end may have reached it');
$libvirt->nothing_left($session);

# ---- a libvirtd that does not even take a connection: one thread waits for it, the others do not ----
$daemon = stop_daemon();
$node->restart;
my @sessions = map { provision($node, 'acme', "profile => 'plain'") } 1 .. 3;
await($node, "SELECT count(*) FROM agentvm.sessions WHERE detail ~ 'NoConnection'", 2, timeout => 120, name => 'two are told that it does not answer');
cmp_ok(seconds(sub { sql('CREATE DATABASE other; DROP DATABASE other') }), '<', 5, 'DROP DATABASE meanwhile');
kill('CONT', $daemon);
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 4, timeout => 120, name => 'they go on when it answers');
is(scalar $libvirt->domains, 4, 'one domain each');
ends($_) foreach @sessions;
is(inspected($steady), 'running', 'the other one lives through it');

# ---- VMs that hang, or vanish ----
$session = launched();
$qemu = $libvirt->qemu($session);
kill('STOP', $qemu);
terminate($session);
$until = time + AgentVM::Process::timeout();
sleep 0.02 while -e $libvirt->vms . "/$session.boot" && time < $until;
ok(kill(0, $qemu), 'the boot disk goes first, so that a launch that is still under way comes to nothing');
await_state($node, $session, 'terminated', timeout => 120);
$libvirt->nothing_left($session);
$qemu = $libvirt->qemu($steady);
kill('KILL', $qemu);
await($node, "SELECT agentvm.inspect('$steady') ->> 'state'", 'not_found', name => 'inspect(): the VM has vanished');
ends($steady);
$session = launched();
$libvirt->virsh('destroy', "agentvm-$session");
ends($session);
$session = launched();
$daemon = $libvirt->daemon;
kill('KILL', $daemon, $libvirt->qemu($session));
ends($session);

# ---- not ours: left alone ----
$session = launched();
my $xml = $libvirt->virsh('dumpxml', "agentvm-$session");
$libvirt->virsh('metadata', "agentvm-$session", '--uri', 'urn:agentvm:vm', '--key', 'agentvm', '--set', '<vm><cluster>another</cluster></vm>');
fails_with($node, "SELECT agentvm.inspect('$session')", 'AV004', qr/NotOurs/, 'a domain of another installation is not looked at');
terminate($session);
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$session' AND detail ->> 'error' ~ 'NotOurs'", 't', name => 'nor ended');
is("@{[ $libvirt->domains ]}", "agentvm-$session", 'it is there');
my ($ours) = $xml =~ m{<agentvm:cluster>(.*?)<};
$libvirt->virsh('metadata', "agentvm-$session", '--uri', 'urn:agentvm:vm', '--key', 'agentvm', '--set', "<vm><cluster>$ours</cluster></vm>");
await_state($node, $session, 'terminated', timeout => 120);
$libvirt->nothing_left($session);

# ---- another launch makes the domain meanwhile, and it does not run: that is no success, and its files are left alone ----
my $other = launched();
my $base = $libvirt->dir . '/base.img';
system_or_bail('qemu-img', 'create', '-q', '-f', 'qcow2', $base, '64M');
sql("SELECT agentvm.create_profile('disk', 'libvirt', memory_mib => 256, runtime => false, options => " . json({ disk => $base }) . ')');
append_to_file("$bin/hold", '');
$session = provision($node, 'acme', "profile => 'disk'");
$until = time + AgentVM::Process::timeout();
sleep 0.1 until -e "$bin/held" || time > $until;
$xml = $libvirt->virsh('dumpxml', '--inactive', "agentvm-$other");
$xml =~ s/(<name>agentvm-|<uuid>|<agentvm:session>)$other/$1$session/g;
append_to_file("$bin/xml", $xml);
$libvirt->virsh('create', "$bin/xml", '--paused');
unlink "$bin/hold";
await($node, "SELECT detail ~ 'NotRunning' FROM agentvm.sessions WHERE session_id = '$session'", 't', name => 'a domain is there, and paused');
is(sql("SELECT state FROM agentvm.sessions WHERE session_id = '$session'"), 'provisioning', 'so the session waits');
is("@{[ grep { /^$session/ } $libvirt->files ]}", "$session.boot $session.disk", 'the files are there');
$libvirt->virsh('resume', "agentvm-$session");
await_state($node, $session, 'ready', timeout => 120);
ends($_) foreach $session, $other;

# ---- made persistent by somebody: gone all the same ----
$session = launched();
system('sh', '-c', "virsh -q -c qemu:///session dumpxml agentvm-$session > " . $libvirt->dir . '/xml && virsh -q -c qemu:///session define ' . $libvirt->dir . '/xml') == 0 or die 'define';
ends($session);

is(join(' ', $libvirt->domains, $libvirt->files, $libvirt->qemu), '', 'nothing is left');
is(sql('SELECT count(*) FROM agentvm.placement'), 0, 'no place is taken');
unlike(log_text($node), qr/libvirt.*error :/, 'libvirt writes nothing into the log');
done_testing();
