# The provider libvirt without a VM: its options, its hosts, and libvirt's own mock (test:///default)
use strict;
use warnings;
use AgentVM::Libvirt;
use AgentVM::Test;
use PostgreSQL::Test::Utils ();
use Test::More;

my $libvirt = AgentVM::Libvirt->new;
my $node = new_node('main', conf => "agentvm.provider_libraries = 'agentvm_libvirt'\nagentvm.launch_settle = '1s'\n");
sub sql { return $node->safe_psql('postgres', @_); }
sub set_options { return "SELECT agentvm.set_provider('acme', 'libvirt', " . json($_[0]) . ')'; }
sql("SELECT agentvm.create_team('acme', provider => 'libvirt')");
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a runner');

# ---- names: a server has functions that others have, too (json_object), and is asked first ----
sub functions { my ($file) = @_; my ($out) = PostgreSQL::Test::Utils::run_command([ 'nm', '-D', '--defined-only', $file ]); return $out =~ / T ([^\s@]+)/g; }
my ($bin, $lib) = map { chomp(my $dir = `pg_config --$_`); $dir } qw(bindir pkglibdir);
my %server = map { $_ => 1 } functions("$bin/postgres");
my ($linked) = PostgreSQL::Test::Utils::run_command([ 'ldd', "$lib/agentvm_libvirt.so" ]);
my @libraries = grep { !m{/(libc|libm)\.so} } $linked =~ /=> (\/\S+)/g;
cmp_ok(scalar @libraries, '>', 5, 'libraries that come with libvirt');
is(join(' ', map { my $file = $_; map { "$file: $_" } grep { $server{$_} } functions($file) } @libraries), '', 'none has a name that is the server\'s');

# ---- options ----
foreach my $path ('vmlinuz', 'a/b', '', '/dir/', "/a\nb", '/ä', '/' . 'x' x 600)
{
	fails_with($node, set_options({ $_ => $path }), 'AV010', qr/option "$_"/, "no $_: " . substr($path =~ s/\n/\\n/r, 0, 20)) for qw(kernel disk);
}
foreach my $path ($node->data_dir . '/PG_VERSION', $node->basedir . '/keys', '/srvother/x', '/srv/../etc/passwd', '/srv/a/../../etc/passwd', '/etc/srv/x')
{
	fails_with($node, set_options({ $_ => $path }), 'AV010', qr/option "$_" .*is not in agentvm.image_directories.*HINT:.*\/srv/s, "$_ is no image: $path") for qw(kernel initrd disk);
}
fails_with($node, "SELECT agentvm.create_profile('keys', 'libvirt', options => " . json({ disk => '/etc/passwd' }) . ')', 'AV010', qr/image_directories/, 'nor in a profile');
fails_with($node, set_options({ machine => 'pc' }), 'AV010', qr/auto, q35, microvm/, 'no such machine');
fails_with($node, set_options({ cmdline => "a\nb" }), 'AV010', qr/cmdline/, 'a command line is printable');
fails_with($node, set_options({ network => 'a b' }), 'AV010', qr/network/, 'a name of a network');
fails_with($node, set_options({ emulator => '/bin/sh' }), 'AV010', qr/unknown option.*cmdline/s, 'no other options');
fails_with($node, "SELECT agentvm.provision('acme')", 'AV010', qr/neither option "kernel" nor option "disk"/, 'something to boot');
psql_ok($node, set_options({ disk => '/srv/image', initrd => '/srv/initrd' }), 'a part of the options');
fails_with($node, "SELECT agentvm.provision('acme')", 'AV010', qr/"initrd".* needs option "kernel"/, 'which must fit together');
psql_ok($node, set_options({ kernel => '/srv/a kernel & <one>', initrd => "/srv/it's", cmdline => q{a="b" c='d' <&>]]>} }), 'paths of all kinds');
fails_with($node, "SELECT agentvm.provision('acme', options => '{\"$_\": \"/a\"}')", 'AV010', qr/not for callers/, "$_ is not for callers") for qw(kernel initrd disk cmdline machine network);
fails_with($node, "SELECT agentvm.provision('acme')", 'AV010', qr/needs a host.*INSERT INTO agentvm.host/s, 'a host');

# ---- the mock: the whole way without a VM ----
$libvirt->host($node, name => 'mock', uri => 'test:///default', accel => 'tcg');
my @sessions = map { provision($node, 'acme', 'options => NULL') } 1 .. 3;
await($node, "SELECT count(*) FROM agentvm.sessions WHERE vm_id = 'agentvm-' || session_id AND region = 'mock'", 3, name => 'launched, and where it is known');
is(sql("SELECT state FROM agentvm.sessions WHERE session_id = '$sessions[0]'"), 'provisioning', 'with a runtime it is not ready by that');
is(sql("SELECT agentvm.inspect('$sessions[0]') ->> x FROM unnest('{state,vm_id,host,accel,vcpus,memory_mib}'::text[]) x"),
	"running\nagentvm-$sessions[0]\nmock\ntest\n1\n512", 'inspect()');
sql(q{SELECT agentvm.create_profile('plain', 'libvirt', runtime => false, vcpus => 2, memory_mib => 1024); SELECT agentvm.create_profile('large', 'libvirt', runtime => false, disk_gib => 2)});
my $plain = provision($node, 'acme', "profile => 'plain'");
await_state($node, $plain, 'ready');
is(sql("SELECT agentvm.inspect('$plain') ->> x FROM unnest('{state,vcpus,memory_mib}'::text[]) x"), "running\n2\n1024", "the profile's shape");
my $large = provision($node, 'acme', "profile => 'large'");
await_state($node, $large, 'failed');
like(state_of($node, $large), qr/^failed provider_error BadShape: disk_gib needs option disk/, 'a disk that there is not cannot be larger');

# ---- check_provider(): what is missing, and what is there ----
my %check = %{ JSON::PP::decode_json(sql("SELECT agentvm.check_provider('acme')")) };
ok(!$check{ok}, 'the mock is not in order');
is_deeply([ map { $_->{what} } @{ $check{hosts}{mock}{problems} } ], [qw(emulator kernel initrd)], 'no emulator, no images');
ok(!(grep { !$_->{hint} || !$_->{message} } @{ $check{hosts}{mock}{problems} }), 'each with what to do');
my $cluster = sql('SELECT installation_id FROM agentvm.installation');
is_deeply([ sort map { "$_->{session} $_->{team} $_->{cluster} $_->{state}" } @{ $check{hosts}{mock}{domains} } ], [ sort map { "$_ acme $cluster running" } @sessions, $plain ], 'our domains, and no others');

# ---- images of profiles, too: those that the team may use, each file once ----
sub images { return join(', ', map { join(' ', grep { defined } @$_{qw(what profile)}) } grep { $_->{what} =~ /kernel|initrd|disk/ } @{ $check{hosts}{mock}{problems} }); }
sub profile { my ($name, $options, @more) = @_; sql('SELECT agentvm.create_profile(' . join(', ', literal($name), "'libvirt'", 'options => ' . json($options), @more) . ')'); return; }
sql("SELECT agentvm.create_team('other'); SELECT agentvm.create_profile('hidden', 'noop', team_id => 'acme')");
profile('a', { kernel => '/srv/a', disk => '/srv/b' });
profile('hidden', { disk => '/srv/hidden' });
profile('own', { disk => '/srv/c', initrd => '/srv/a' }, "team_id => 'acme'");
profile('own', { disk => '/srv/not/own' });
profile('theirs', { disk => '/srv/theirs' }, "team_id => 'other'");
%check = %{ JSON::PP::decode_json(sql("SELECT agentvm.check_provider('acme')")) };
is(images(), 'kernel, initrd, kernel a, disk a, disk own', 'which file of which profile is missing');
is(scalar @{ $check{hosts}{mock}{warnings} }, 0, 'no warnings');
profile("many$_", { disk => "/srv/many/$_" }) foreach 1 .. 48;
%check = %{ JSON::PP::decode_json(sql("SELECT agentvm.check_provider('acme')")) };
is(scalar(my @images = split(/, /, images())), 50, 'not without bound');
like($check{hosts}{mock}{warnings}[0]{message}, qr/^only the first 50 images/, 'which is said');

# ---- the end ----
sql('SELECT agentvm.terminate(session_id) FROM agentvm.sessions');
await($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0);
is(sql("SELECT jsonb_array_length(agentvm.check_provider('acme') #> '{hosts,mock,domains}')"), 0, 'no domain is left');
is(sql("SELECT agentvm.inspect('$plain') ->> 'state'"), 'not_found', 'inspect() of one that is gone');
is(sql('SELECT count(*) FROM agentvm.placement'), 0, 'and no placement');

# ---- hosts that are none ----
sub fails_on
{
	my ($name, %host) = @_;
	sql("DELETE FROM agentvm.host");
	$libvirt->host($node, name => 'bad', accel => 'tcg', %host);
	my $check = sql("SELECT agentvm.check_provider('acme')");
	my $session = provision($node, 'acme', "profile => 'plain'");
	await($node, "SELECT detail IS NOT NULL FROM agentvm.sessions WHERE session_id = '$session'", 't', name => $name);
	my $state = state_of($node, $session);
	sql("SELECT agentvm.terminate('$session')") if $state =~ /^provisioning/;
	return ($check, $state, $session);
}
my ($answer, $state, $session) = fails_on('no libvirtd', uri => "qemu+unix:///session?socket=" . $libvirt->dir . '/none');
like($answer, qr/"ok": false.*"what": "connection"/, 'check_provider() tells');
like($state, qr/^provisioning Libvirt38: could not connect/, 'may come back: it is tried again');
await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$session'", 'terminating');
$node->safe_psql('postgres', "UPDATE agentvm.host SET uri = 'test:///default'");
await_state($node, $session, 'terminated', timeout => 120);
($answer, $state) = fails_on('a long directory', uri => 'test:///default', directory => '/' . 'x' x 64);
like($answer, qr/"what": "directory"/, 'check_provider() tells');
like($state, qr/BadShape: the host's directory is longer/, 'the directory is too long for a socket');
await($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0, timeout => 120, name => 'and the session can end');
($answer, $state) = fails_on('a hypervisor that does not tell what it has', uri => 'test:///default', accel => 'auto');
like($state, qr/provider_error Libvirt\d+: capabilities/, 'it cannot be asked for KVM');
is(sql('SELECT kvm IS NULL FROM agentvm.host'), 't', 'and nothing is learned from that');
await($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0, timeout => 120);
done_testing();
