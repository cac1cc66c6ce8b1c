# A host that is reached by ssh (qemu+ssh://): the whole life of a VM there; connections that are cut, an sshd that is away,
# keys that are wrong; nobody is asked anything, and nobody else held up
use strict;
use warnings;
use AgentVM::Sshd;
use AgentVM::Stack;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

# who asks a question all the same waits for ever
my $askpass = PostgreSQL::Test::Utils::tempdir('askpass') . '/askpass';
append_to_file($askpass, "#!/bin/sh\nexec sleep 1000\n");
chmod(0755, $askpass);
@ENV{qw(SSH_ASKPASS DISPLAY)} = ($askpass, ':99');

my $stack = AgentVM::Stack->new(conf => "agentvm.lease = '12s'\n");
my ($node, $libvirt) = ($stack->node, $stack->libvirt);
my $sshd = AgentVM::Sshd->new($libvirt)->start;
sub sql { return $node->safe_psql('postgres', @_); }
sub check { return JSON::PP::decode_json(sql("SELECT agentvm.check_provider('acme') #> '{hosts,$_[0]}'")); }
sub only { sql("UPDATE agentvm.host SET enabled = name = '$_[0]'"); return; }
sub inspected { return sql("SELECT agentvm.inspect('$_[0]') ->> 'state'"); }
sub domains { my ($session) = @_; return scalar grep { $_ eq "agentvm-$session" } $libvirt->domains; }
sub plain { my $session = $stack->vm('plain'); await_state($node, $session, 'ready', timeout => $AgentVM::Stack::patience); return $session; }
sub ends { my ($session) = @_; psql_ok($node, "SELECT agentvm.terminate('$session')", 'terminate()'); return $stack->ended($session, 'requested'); }

$stack->profile('plain', {}, 'runtime => false');
$libvirt->host($node, name => 'far', uri => $sshd->uri, accel => 'tcg');
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a runner');

# ---- the whole life ----
only('far');
is($libvirt->daemon, undef, 'no libvirtd yet');
my $check = check('far');
ok($check->{ok}, 'the host is in order') or diag(JSON::PP->new->pretty->encode($check));
ok($libvirt->daemon, 'the connection has started one there');
my $session = $stack->ready('micro');
is(sql("SELECT region, vm_id FROM agentvm.sessions WHERE session_id = '$session'"), "far|agentvm-$session", 'where it is');
is(inspected($session), 'running', 'inspect()');
$stack->beats($session);

# ---- the connection is cut ----
cmp_ok($sshd->cut, '>=', 1, 'the connection is cut');
is(inspected($session), 'running', 'the next call makes another one');
$stack->beats($session);
my $daemon = $libvirt->daemon;
kill('STOP', $daemon);
my $plain = $stack->vm('plain');
await($node, "SELECT in_flight FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a launch is under way');
cmp_ok($sshd->cut, '>=', 1, 'cut in the middle of it');
await($node, "SELECT detail IS NOT NULL FROM agentvm.sessions WHERE session_id = '$plain'", 't', name => 'that is noticed');
note(state_of($node, $plain));
kill('CONT', $daemon);
await_state($node, $plain, 'ready', timeout => $AgentVM::Stack::patience);
is(domains($plain), 1, 'one VM');
is(scalar(my @pids = $libvirt->qemu($plain)), 1, 'one process');

# ---- the host cannot be reached: its sessions wait, the others do not ----
$sshd->stop;
my $late = $stack->vm('plain');
psql_ok($node, "SELECT agentvm.terminate('$plain')", 'terminate() of one that is there');
await($node, "SELECT detail ~ 'could not connect.*Connection refused' FROM agentvm.sessions WHERE session_id = '$late'", 't', name => 'it is said');
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$plain' AND detail ->> 'error' ~ 'could not connect'", 't', name => 'of the other, too');
note(state_of($node, $late));
fails_with($node, "SELECT agentvm.inspect('$session')", 'AV004', qr/Connection refused/, 'inspect() says it');
my $problem = check('far')->{problems}[0];
like("$problem->{what} $problem->{message} | $problem->{hint}", qr/^connection .*Connection refused.* \| Is the host up.*sshd/, 'check_provider() says it, and what to do');
only('here');
ends(plain());
is(sql("SELECT string_agg(state, ' ' ORDER BY session_id = '$late') FROM agentvm.sessions WHERE session_id IN ('$late', '$plain')"), 'terminating provisioning', 'a session elsewhere has come and gone: those here wait');
$stack->beats($session, 'the VM that is there does not notice');
$sshd->start;
await_state($node, $late, 'ready', timeout => $AgentVM::Stack::patience);
$stack->ended($plain, 'requested');
is(inspected($session), 'running', 'the host is back');
ends($_) foreach $late, $session;

# ---- what is wrong with a connection, and what to do ----
my $empty = PostgreSQL::Test::Utils::tempdir('known') . '/none';
append_to_file($empty, '');
my $changed = "$empty.changed";
append_to_file($changed, slurp_file("$sshd->{dir}/known_hosts") =~ s/(ssh-ed25519) .*/"$1 " . (split ' ', slurp_file($sshd->key('other') . '.pub'))[1]/er);
my @wrong = (
	stranger => { known_hosts => $empty }, qr/Host key verification failed.* \| .*known hosts/,
	changed => { known_hosts => $changed }, qr/CHANGED.* \| .*another SSH key/,
	unauthorized => { key => $sshd->key('other') }, qr/Permission denied \(publickey\).* \| .*authorized_keys/,
	bare => { socket => '/none', netcat => '/none/nc' }, qr/not found.* \| .*netcat/,
	socket => { socket => $libvirt->dir . '/none' }, qr/No such file or directory.* \| .*libvirt's daemon/);
while (my ($name, $uri, $like) = splice @wrong, 0, 3)
{
	$libvirt->host($node, name => $name, uri => $sshd->uri(%$uri), accel => 'tcg');
	only($name);
	my $began = time;
	my $said = check($name);
	$problem = $said->{problems}[0] // {};
	like(join(' | ', $problem->{message} // JSON::PP::encode_json($said), $problem->{hint} // ''), $like, "$name: check_provider() says it, and what to do");
	note(sprintf('%s after %.1f s', $problem->{message}, time - $began));
}

# ---- a socket that is named, as that of agentvm-libvirtd.service ----
$libvirt->host($node, name => 'named', uri => $sshd->uri(socket => $libvirt->dir . '/run/libvirt/libvirt-sock'), accel => 'tcg');
only('named');
ends(plain());

# ---- the end ----
my $ssh = sub { return scalar(my @all = AgentVM::Process::pids(cmdline => qr/^ssh\0.*\Q$sshd->{dir}\E/s)) };
cmp_ok($ssh->(), '>', 0, 'connections are kept');
$node->stop;
my $until = time + AgentVM::Process::timeout();
sleep 0.1 while $ssh->() && time < $until;
is($ssh->(), 0, 'as long as the server runs');
is(join(' ', $libvirt->domains, $libvirt->files, $libvirt->qemu), '', 'nothing is left');
done_testing();
