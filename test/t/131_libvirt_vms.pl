# Real VMs by the provider libvirt, under TCG: launched, looked at, ended, and nothing left
use strict;
use warnings;
use AgentVM::Libvirt;
use AgentVM::Test;
use Digest::SHA qw(sha256_hex);
use MIME::Base64;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $libvirt = AgentVM::Libvirt->new;
my $image = $libvirt->options;
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
	return;
}

sql("SELECT agentvm.create_team('acme', provider => 'libvirt'); SELECT agentvm.set_provider('acme', 'libvirt', " . json($image) . ')');
profile('plain', {}, 'runtime => false', 'memory_mib => 256');
profile('whole', {}, 'memory_mib => 256', "bootstrap_timeout => '1 hour'");
$libvirt->host($node);
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a runner');

# ---- the host, before ----
my %check = %{ JSON::PP::decode_json(sql("SELECT agentvm.check_provider('acme')")) };
ok($check{ok}, 'the host is in order') or diag(JSON::PP->new->pretty->encode(\%check));
like($check{hosts}{here}{emulator}, qr/qemu-system-x86_64$/, 'it has an emulator');
my @checks = map { my %one; $one{handle} = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "SELECT agentvm.check_provider('acme')" ], '>', \$one{out}, '2>', \$one{error}); \%one } 1 .. 6;
$_->{handle}->finish foreach @checks;
is(join(' ', map { JSON::PP::decode_json($_->{out})->{ok} ? 'ok' : $_->{out} . $_->{error} } @checks), 'ok ok ok ok ok ok', 'six checks at once are in nobody\'s way');
is("@{[ $libvirt->files ]}", '', 'checks leave nothing behind');

# ---- without a runtime: running is ready ----
my $began = time;
my $session = provision($node, 'acme', "profile => 'plain'");
await_state($node, $session, 'ready', timeout => 120);
note(sprintf('ready after %.2f s', time - $began));
is(sql("SELECT vm_id, region, attempt FROM agentvm.sessions WHERE session_id = '$session'"), "agentvm-$session|here|1", 'what is known of it');
is(sql('SELECT kvm FROM agentvm.host'), 'f', 'and of the host: no guest runs under KVM there');
is("@{[ $libvirt->domains ]}", "agentvm-$session", 'one domain');
is("@{[ $libvirt->files ]}", "$session.boot", 'one file: no runtime, no socket');
fails_with($node, "UPDATE agentvm.host SET directory = '/tmp'", '55006', qr/host "here" has VMs/, 'where they are is not changed');
is(inspected($session, qw(state vm_id host accel vcpus memory_mib)), "running agentvm-$session here tcg 1 256", 'inspect()');
my $xml = $libvirt->virsh('dumpxml', "agentvm-$session");
like($xml, qr{<agentvm:vm xmlns:agentvm="urn:agentvm:vm">\s*<agentvm:cluster>\Q@{[ sql('SELECT installation_id FROM agentvm.installation') ]}\E</agentvm:cluster>\s*<agentvm:session>$session</agentvm:session>\s*<agentvm:team>acme<}, 'the metadata');
unlike($xml, qr/<interface|<graphics|<video/, 'no network card, nothing to look at');
$libvirt->virsh('suspend', "agentvm-$session");
is(inspected($session, 'state'), 'paused', 'inspect() of one that is paused');
ends($session);
is(inspected($session, 'state'), 'not_found', 'inspect() of one that is gone');
is(sql(qq{SELECT string_agg(detail ->> 'operation' || ' ' || (detail ->> 'status'), ' ' ORDER BY event_id) FROM agentvm.session_event WHERE session_id = '$session' AND kind = 'provider_call'}),
	'launch 1 terminate 1', 'the log');

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
sql("UPDATE agentvm.host SET accel = 'kvm'");
like(sql("SELECT agentvm.check_provider('acme') #> '{hosts,here,problems}'"), qr/"what": "accelerator"/, 'no KVM where there is none');
sql("UPDATE agentvm.host SET accel = 'auto'");
sql("UPDATE agentvm.host SET kvm = true");
$session = provision($node, 'acme', "profile => 'plain'");
await_state($node, $session, 'ready', timeout => 120);
is(inspected($session, 'accel') . ' ' . sql('SELECT kvm FROM agentvm.host'), 'tcg f', 'a host that has had KVM, and has it no more: the VM runs without');
ends($session);
SKIP:
{
	skip 'KVM is not offered here', 2 unless sql("SELECT agentvm.check_provider('acme') #>> '{hosts,here,kvm_offered}'") eq 'true';
	sql("UPDATE agentvm.host SET kvm = NULL; SELECT agentvm.set_provider('acme', 'libvirt', " . json({ %$image, kernel => '/nonexistent/kernel' }) . ')');
	$session = provision($node, 'acme', "profile => 'plain'");
	await_state($node, $session, 'failed', timeout => 120);
	like(state_of($node, $session), qr/^failed provider_error/, 'a kernel that is not there');
	is(sql('SELECT kvm IS NULL FROM agentvm.host'), 't', 'says nothing about KVM');
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
done_testing();
