# Real VMs by the provider libvirt, under TCG: launched, looked at, ended, and nothing left
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Libvirt;
use AgentVM::Test;
use Digest::SHA qw(sha256_hex);
use IO::Socket::UNIX;
use MIME::Base64;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $libvirt = AgentVM::Libvirt->new;
my $image = $libvirt->options;
# an emulator that can be told to let the probe fail under KVM, or hang as it does where KVM is broken
my $bin = $libvirt->dir . '/bin';
mkdir $bin;
append_to_file("$bin/qemu-system-x86_64", <<"SH");
#!/bin/sh
PATH=$ENV{PATH}
case "\$*" in *agentvm-probe*"-accel kvm"*)
	[ ! -e "$bin/no-kvm" ] || { echo 'failed to initialize kvm: Operation not permitted' >&2; exit 1; }
	[ ! -e "$bin/hang" ] || for argument; do
		shift
		case "\$argument" in kvm) argument=tcg ;; host*) argument=max ;; esac
		set -- "\$@" "\$argument"
	done ;;
esac
exec qemu-system-x86_64 "\$@"
SH
chmod(0755, "$bin/qemu-system-x86_64");
$ENV{PATH} = "$bin:$ENV{PATH}";
my $node = new_node('main', conf => "agentvm.provider_libraries = 'agentvm_libvirt'\n");
sub sql { return $node->safe_psql('postgres', @_); }
sub content { my ($path) = @_; open(my $file, '<', $path) or return ''; return join('', <$file>); }
sub inspected { my ($session, @names) = @_; return join(' ', map { $_ // '' } @{ JSON::PP::decode_json(sql("SELECT agentvm.inspect('$session')")) }{@names}); }
sub profile
{
	my ($name, $options, @more) = @_;
	sql('SELECT agentvm.create_profile(' . join(', ', literal($name), "'libvirt'", 'options => ' . json({ %$image, %$options }), @more) . ')');
	return;
}
sub ends
{
	my ($session) = @_;
	psql_ok($node, "SELECT agentvm.terminate('$session')", 'terminate()');
	await_state($node, $session, 'terminated', timeout => 120);
	$libvirt->nothing_left($session);
	is(sql("SELECT count(*) FROM agentvm.placement WHERE session_id = '$session'"), 0, 'nor a place taken');
	return;
}

sql("SELECT agentvm.create_team('acme', provider => 'libvirt'); SELECT agentvm.set_provider('acme', 'libvirt', " . json($image) . ')');
profile('plain', {}, 'runtime => false', 'memory_mib => 256');
profile('whole', {}, 'memory_mib => 256', "bootstrap_timeout => '1 hour'");
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a runner');

# ---- a host that takes a connection and says nothing: what comes of it takes a minute, and is seen at the end ----
my $silent = $libvirt->dir . '/silent';
my $listener = IO::Socket::UNIX->new(Local => $silent, Listen => 5) or die "no socket: $!";
my %host = (name => 'silent', uri => "qemu+unix:///session?socket=$silent", accel => 'tcg');
$libvirt->host($node, %host);
my @askers = map { AgentVM::Client->new($node) } 1 .. 2;
$_->send("SELECT agentvm.check_provider('acme')") foreach @askers;
my $silence_began = time;
my $held = $listener->accept;
await($node, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Extension' AND pid IN (" . join(', ', map { $_->pid } @askers) . ')', 2, name => 'two ask');
sql('DELETE FROM agentvm.host');

# ---- the host, before ----
$libvirt->host($node);
my %check = %{ JSON::PP::decode_json(sql("SELECT agentvm.check_provider('acme')")) };
ok($check{ok}, 'the host is in order') or diag(JSON::PP->new->pretty->encode(\%check));
like($check{hosts}{here}{emulator}, qr/qemu-system-x86_64$/, 'it has an emulator');
my @checks = map { my %one; $one{handle} = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "SELECT agentvm.check_provider('acme')" ], '>', \$one{out}, '2>', \$one{error}); \%one } 1 .. 6;
$_->{handle}->finish foreach @checks;
is(join(' ', map { JSON::PP::decode_json($_->{out})->{ok} ? 'ok' : $_->{out} . $_->{error} } @checks), 'ok ok ok ok ok ok', 'six checks at once are in nobody\'s way');
is("@{[ $libvirt->files ]}", '', 'checks leave nothing behind');

# ---- as many VMs as it lists, with the longest names of teams: the answer has room for them ----
my $cluster = sql('SELECT installation_id FROM agentvm.installation');
my $team = '&quot;' x 128;
append_to_file($libvirt->dir . '/many.xml', '<node>' . join('', map { my $id = sprintf('00000000-0000-7000-8000-%012d', $_);
	"<domain type='test'><name>agentvm-$id</name><uuid>$id</uuid><metadata><agentvm:vm xmlns:agentvm='urn:agentvm:vm'><agentvm:cluster>$cluster</agentvm:cluster>"
	. "<agentvm:session>$id</agentvm:session><agentvm:team>$team</agentvm:team></agentvm:vm></metadata><memory>1024</memory><os><type>hvm</type></os></domain>" } 1 .. 600) . '</node>');
$libvirt->host($node, name => 'many', uri => 'test:///default', accel => 'tcg');
# a superuser can get round the trigger, which refuses files
sql("SET session_replication_role = replica; UPDATE agentvm.host SET uri = 'test://" . $libvirt->dir . "/many.xml' WHERE name = 'many'");
sql("UPDATE agentvm.host SET enabled = name = 'many'");
is(sql(q{SELECT count(*), count(DISTINCT d ->> 'session'), min(d ->> 'team') = repeat('"', 128) FROM jsonb_array_elements(agentvm.check_provider('acme') #> '{hosts,many,domains}') d}), '500|500|t', '500 VMs are listed at most');
sql("DELETE FROM agentvm.host WHERE name = 'many'; UPDATE agentvm.host SET enabled = true");

# ---- without a runtime: running is ready ----
my $began = time;
my $session = provision($node, 'acme', "profile => 'plain'");
await_state($node, $session, 'ready', timeout => 120);
note(sprintf('ready after %.2f s', time - $began));
is(sql("SELECT vm_id, region, attempt FROM agentvm.sessions WHERE session_id = '$session'"), "agentvm-$session|here|1", 'what is known of it');
is(sql('SELECT kvm FROM agentvm.host'), inspected($session, 'accel') eq 'kvm' ? 't' : 'f', 'and of the host: whether guests run under KVM there');
is("@{[ $libvirt->domains ]}", "agentvm-$session", 'one domain');
is("@{[ $libvirt->files ]}", "$session.boot", 'one file: no runtime, no socket');
fails_with($node, "UPDATE agentvm.host SET directory = '/tmp'", '55006', qr/host "here" has VMs/, 'where they are is not changed');
is(inspected($session, qw(state vm_id host accel vcpus memory_mib)), "running agentvm-$session here tcg 1 256", 'inspect()');
my $xml = $libvirt->virsh('dumpxml', "agentvm-$session");
like($xml, qr{<agentvm:vm xmlns:agentvm="urn:agentvm:vm">\s*<agentvm:cluster>\Q@{[ sql('SELECT installation_id FROM agentvm.installation') ]}\E</agentvm:cluster>\s*<agentvm:session>$session</agentvm:session>\s*<agentvm:team>acme<}, 'the metadata');
unlike($xml, qr/<interface|<graphics|<video/, 'no network card, nothing to look at');
sql("SELECT agentvm.pause('$session')");
await_state($node, $session, 'paused');
like($libvirt->virsh('domstate', "agentvm-$session"), qr/^paused/, 'pause() halts the domain');
is(inspected($session, 'state'), 'paused', 'inspect() of one that is paused');
sql("SELECT agentvm.resume('$session')");
await_state($node, $session, 'ready');
like($libvirt->virsh('domstate', "agentvm-$session"), qr/^running/, 'resume() lets it go on');
$libvirt->virsh('suspend', "agentvm-$session");
is(sql("SELECT agentvm.pause('$session')"), 't', 'one that somebody else has halted');
await_state($node, $session, 'paused');
is(sql("SELECT handle ? 'power_sent' FROM agentvm.session WHERE session_id = '$session'"), 'f', 'nothing of it is left in the handle');
ends($session);
is(inspected($session, 'state'), 'not_found', 'inspect() of one that is gone');
is(sql(qq{SELECT string_agg(detail ->> 'operation' || ' ' || (detail ->> 'status'), ' ' ORDER BY event_id) FROM agentvm.session_event WHERE session_id = '$session' AND kind = 'provider_call'}),
	'launch 1 pause 1 resume 1 pause 1 terminate 1', 'the log');

# ---- an end for silence tells whether the VM was gone ----
foreach my $gone (0, 1)
{
	$session = provision($node, 'acme', "profile => 'plain'");
	await_state($node, $session, 'ready', timeout => 120);
	$libvirt->virsh('destroy', "agentvm-$session") if $gone;
	sql("UPDATE agentvm.session SET state = 'terminating', end_reason = 'heartbeat_timeout', next_check_at = now() WHERE session_id = '$session'; SELECT agentvm.wake()");
	await_state($node, $session, 'terminated|failed', timeout => 120);
	is(sql("SELECT end_reason FROM agentvm.sessions WHERE session_id = '$session'"), $gone ? 'provider_lost' : 'heartbeat_timeout', $gone ? 'the VM was gone' : 'the VM was there');
	$libvirt->nothing_left($session);
}

# ---- with one: what the guest sees ----
$session = provision($node, 'acme', "profile => 'whole'");
await($node, "SELECT vm_id IS NOT NULL FROM agentvm.sessions WHERE session_id = '$session'");
my %guest = $libvirt->guest($session);
is($guest{boot}, 'vda 1 0 ', 'the boot disk, read only; its script ends well and says nothing, under busybox');
is($guest{disks}, 'vda', 'no other disk');
is($guest{interfaces}, 'lo', 'no network');
is($guest{modes}, ' 700;/hard-stop 600;/hard-stop.sh 700;/runtime.env 600;', 'files that are for root only');
is($guest{armed}, 1, 'the power-off is armed');
is($guest{'env:AGENTVM_SESSION_ID'}, $session, 'runtime.env: the session');
is($guest{'env:AGENTVM_GATEWAY_DEVICE'}, 'org.agentvm.gateway', 'runtime.env: the port');
is($guest{'env:AGENTVM_GATEWAY_URL'}, 'https://gateway.example', 'runtime.env: the gateway');
note("up after $guest{uptime} s");
my $token = $guest{'env:AGENTVM_BOOTSTRAP_TOKEN'};
like($token, qr/^[0-9a-f]{64}$/, 'runtime.env: the token');
is(sql("SELECT count(*) FROM agentvm.session_token WHERE token_sha256 = '\\x@{[ sha256_hex($token) ]}' AND session_id = '$session'"), 1, 'it is the one that was committed');
is("@{[ $libvirt->files ]}", "$session.boot $session.sock", 'the files on the host');
is(sprintf('%04o', (stat($libvirt->vms . "/$session.boot"))[2] & 07777), '0600', 'the boot disk is for its user only');

# the token: on that disk, and nowhere else
my $payload = slurp_file($libvirt->vms . "/$session.boot") =~ /^payload='(.*)'$/m ? decode_base64($1) : '';
like($payload, qr/TOKEN=$token/, 'the token is on the boot disk');
my ($secret) = slurp_file($libvirt->vms . "/$session.boot") =~ /^payload='(.*)'$/m;
foreach my $needle ($token, substr($secret, 0, 60))
{
	my @found = grep { index(content($_), $needle) >= 0 } glob('/proc/[0-9]*/cmdline'), glob('/proc/[0-9]*/environ');
	is("@found", '', 'no command line and no environment has the token');
	ok(index($libvirt->virsh('dumpxml', '--security-info', "agentvm-$session"), $needle) < 0, 'nor dumpxml');
	is(scalar(grep { index(slurp_file($_), $needle) >= 0 } glob($libvirt->dir . '/home/.cache/libvirt/qemu/log/*'), $node->logfile), 0, 'nor a log');
	ok(index(sql('SELECT detail FROM agentvm.session_event'), $needle) < 0, 'nor the audit log');
	ok(index(sql('SELECT handle FROM agentvm.session'), $needle) < 0, 'nor the handle');
}
ends($session);

# ---- a disk: a private copy of an image ----
my $base = $libvirt->dir . '/base';
system_or_bail('qemu-img', 'create', '-q', '-f', 'qcow2', "$base.img", '1G');
system_or_bail('qemu-img', 'create', '-q', '-f', 'raw', "$base.raw", '64M');
profile('qcow2', { disk => "$base.img" }, 'memory_mib => 256', 'disk_gib => 2');
profile('raw', { disk => "$base.raw" }, 'memory_mib => 256');
profile('small', { disk => "$base.img" }, 'memory_mib => 256', 'runtime => false', 'disk_gib => 1');
foreach my $kind (qw(qcow2 raw))
{
	$session = provision($node, 'acme', "profile => '$kind'");
	await($node, "SELECT vm_id IS NOT NULL FROM agentvm.sessions WHERE session_id = '$session'");
	%guest = $libvirt->guest($session);
	is("$guest{disks} | $guest{boot}", 'vda vdb | vdb 1 0 ', "$kind: the disk comes first, then the boot disk");
	my ($out) = run_command([ 'qemu-img', 'info', '--force-share', $libvirt->vms . "/$session.disk" ]);
	like($out, qr/file format: qcow2/, 'an overlay');
	like($out, $kind eq 'raw' ? qr/virtual size: 64 MiB.*backing file format: raw/s : qr/virtual size: 2 GiB.*backing file format: qcow2/s, 'on the image, of its format and the size that was asked for');
	ends($session);
}
system_or_bail('qemu-img', 'resize', '-q', "$base.img", '3G');
$libvirt->virsh('pool-refresh', $_) foreach grep { /\S/ } split /\n/, $libvirt->virsh('pool-list', '--name');
$session = provision($node, 'acme', "profile => 'small'");
await_state($node, $session, 'failed');
like(state_of($node, $session), qr/^failed provider_error DiskTooSmall: disk_gib is 1, but image/, 'a disk cannot be smaller than its image');
$libvirt->nothing_left($session);

# ---- what is missing, and what is too much ----
my %wrong = (
	kernel => [ { kernel => '/nonexistent/vmlinuz' }, qr/^failed provider_error Libvirt\d+: start: .*nonexistent.vmlinuz/ ],
	disk => [ { disk => $libvirt->dir . '/none.img' }, qr/^failed provider_error NoImage: image file ".*none.img" is not on the host/ ],
	network => [ { network => 'nowhere' }, qr/^failed provider_error Libvirt43: start: .*nowhere/ ],
	microvm => [ { machine => 'microvm' }, qr/^failed provider_error Libvirt\d+: start: / ]);
foreach my $what (sort keys %wrong)
{
	profile($what, $wrong{$what}[0], 'runtime => false', 'memory_mib => 256');
	$session = provision($node, 'acme', "profile => '$what'");
	await_state($node, $session, 'failed');
	like(state_of($node, $session), $wrong{$what}[1], "$what: told");
	$libvirt->nothing_left($session);
}
sql('UPDATE agentvm.host SET memory_mib = 2000000000');
profile('huge', {}, 'runtime => false', 'memory_mib => 16000000');
$session = provision($node, 'acme', "profile => 'huge'");
await_state($node, $session, 'failed', timeout => 120);
like(state_of($node, $session), qr/^failed capacity Libvirt1: start: .*Cannot allocate memory/, 'more memory than there is');
fails_with($node, "CALL agentvm.await('$session')", 'AV002', undef, 'that is a lack of capacity');
$libvirt->nothing_left($session);
sql("UPDATE agentvm.host SET directory = " . literal($libvirt->dir . '/none'));
$session = provision($node, 'acme', "profile => 'plain'");
await_state($node, $session, 'failed');
like(state_of($node, $session), qr/^failed provider_error Libvirt38: directory ".*none"/, 'a directory that is not there');
like(sql("SELECT agentvm.check_provider('acme') #> '{hosts,here,problems}'"), qr/"what": "directory"/, 'check_provider() tells');
mkdir($libvirt->dir . '/none', 0500);
like(sql("SELECT agentvm.check_provider('acme') #> '{hosts,here,problems}'"), qr/"what": "directory".*Permission denied/, 'nor may it be written');
sql('UPDATE agentvm.host SET directory = ' . literal($libvirt->vms));
my $offered = sql("SELECT agentvm.check_provider('acme') #>> '{hosts,here,kvm_offered}'") eq 'true';
SKIP:
{
	skip 'KVM is offered here', 1 if $offered;
	sql("UPDATE agentvm.host SET accel = 'kvm'");
	like(sql("SELECT agentvm.check_provider('acme') #> '{hosts,here,problems}'"), qr/"what": "accelerator"/, 'no KVM where there is none');
	sql("UPDATE agentvm.host SET accel = 'auto'");
	sql("UPDATE agentvm.host SET kvm = true");
	$session = provision($node, 'acme', "profile => 'plain'");
	await_state($node, $session, 'ready', timeout => 120);
	is(inspected($session, 'accel') . ' ' . sql('SELECT kvm FROM agentvm.host'), 'tcg f', 'a host that has had KVM, and has it no more: the VM runs without');
	ends($session);
}
SKIP:
{
	skip 'KVM is not offered here', 1 unless $offered;
	sql('UPDATE agentvm.host SET kvm = NULL');
	$session = provision($node, 'acme', "profile => 'kernel'");
	await_state($node, $session, 'failed', timeout => 120);
	like(state_of($node, $session), qr/^failed provider_error/, 'a kernel that is not there');
	is(sql('SELECT kvm IS NULL FROM agentvm.host'), 't', 'says nothing about KVM');

	sql("ALTER SYSTEM SET agentvm.lease = '12s'; SELECT pg_reload_conf()");
	append_to_file("$bin/no-kvm", '');
	$session = provision($node, 'acme', "profile => 'plain'");
	await_state($node, $session, 'ready', timeout => 120);
	is(inspected($session, 'accel') . ' ' . sql('SELECT kvm FROM agentvm.host'), 'tcg f', 'an emulator that does not start under KVM, but without: there is none');
	ends($session);
	unlink "$bin/no-kvm";
	append_to_file("$bin/hang", '');
	sql("UPDATE agentvm.host SET kvm = NULL; SELECT agentvm.set_provider('acme', 'libvirt', " . json({ %$image, cmdline => 'rdinit=/none' }) . ')');
	$session = provision($node, 'acme', "profile => 'plain'");
	await($node, "SELECT detail ~ 'TooLate: agentvm.lease leaves too little time' FROM agentvm.sessions WHERE session_id = '$session'", 't', timeout => 120, name => 'a probe that is cut short');
	is(sql('SELECT kvm IS NULL FROM agentvm.host'), 't', 'says nothing about KVM either');
	sql('ALTER SYSTEM RESET agentvm.lease; SELECT pg_reload_conf()');
	ends($session);
}
sql("SELECT agentvm.set_provider('acme', 'libvirt', " . json({ %$image, disk => '/nonexistent/disk' }) . ')');
like(sql("SELECT agentvm.check_provider('acme') #> '{hosts,here,problems}'"), qr/"what": "disk".*nonexistent/, 'an image that is not there');
chmod(0, $image->{initrd});
sql("SELECT agentvm.set_provider('acme', 'libvirt', " . json($image) . ')');
like(sql("SELECT agentvm.check_provider('acme') #> '{hosts,here,problems}'"), qr/"what": "initrd"/, 'one that may not be read');
chmod(0644, $image->{initrd});

# ---- many at once, and one that is not ours ----
my @sessions = map { provision($node, 'acme', "profile => 'plain'") } 1 .. 4;
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 4, timeout => 120);
is(scalar $libvirt->domains, 4, 'as many domains');
is_deeply([ sort split /\n/, sql("SELECT d ->> 'session' FROM jsonb_array_elements(agentvm.check_provider('acme') #> '{hosts,here,domains}') d") ], [ sort @sessions ], 'check_provider() lists them');
sql('SELECT agentvm.terminate(session_id) FROM agentvm.sessions');
await($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0, timeout => 120);
is(join(' ', $libvirt->domains, $libvirt->files, $libvirt->qemu), '', 'nothing is left');
is(sql('SELECT count(*) FROM agentvm.placement'), 0, 'no place is taken');

# ---- the host that was silent: one thread is in its hands, and the others try anew, now that somebody is there ----
like(join(' ', sort map { $_->answer } @askers), qr/no answer within \d+ ms.*could not connect to .*: it does not answer/, 'one has waited for it, the other for that one, not as long');
is(sql("SELECT stuck FROM agentvm.stat_dispatcher WHERE kind = 'runner'"), 1, 'one thread is stuck');
unlink $silent;
symlink($libvirt->dir . '/run/libvirt/libvirt-sock', $silent) or die "no link: $!";
sql('DELETE FROM agentvm.host');
$libvirt->host($node, %host);
await($node, "SELECT agentvm.check_provider('acme') #> '{hosts,silent}' ? 'libvirt'", 't', name => 'after a minute', timeout => 90);
note(sprintf('after %.1f s', time - $silence_began));
close $held;
await($node, "SELECT stuck FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 0, name => 'no thread is stuck any more');
is(sql("SELECT agentvm.check_provider('acme') #> '{hosts,silent}' ? 'libvirt'"), 't', 'the one that was late is in nobody\'s way');
done_testing();
