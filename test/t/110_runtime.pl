# agentvm-runtime as a VM has it: settings, bootstrap, heartbeats, the end, and what it leaves on disk and in the log
use strict;
use warnings;
use AgentVM::Gateway;
use AgentVM::Runtime;
use AgentVM::Test;
use AgentVM::VM;
use Digest::SHA qw(sha256_hex);
use IO::Select;
use IO::Socket::UNIX;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_node('main', conf => "agentvm.heartbeat_interval = 1\nagentvm.heartbeat_timeout = 600\nagentvm.deadman_allowance = 700\nagentvm.deadline_grace = 70\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $gateway = AgentVM::Gateway->new($node);

sub launched
{
	my (@arguments) = @_;
	my $id = provision($node, 'acme', 'options => \'{"runtime": true}\'', @arguments);
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$id'", 't', name => 'a session with a runtime');
	return $id;
}
sub beats { return $node->safe_psql('postgres', "SELECT last_heartbeat_at FROM agentvm.sessions WHERE session_id = '$_[0]'"); }
sub beats_again
{
	my ($id, $name) = @_;
	my $last = beats($id);
	return await($node, "SELECT last_heartbeat_at > '" . ($last || '-infinity') . "' FROM agentvm.sessions WHERE session_id = '$id'", 't', name => $name);
}

# ---- the program ----
my $binary = $AgentVM::VM::binary;
like(scalar `$binary --version`, qr/^agentvm-runtime [0-9.]+\n$/, '--version');
my $help = `$binary --help`;
like($help, qr/--config=FILE.*AGENTVM_GATEWAY_URL.*Exit codes: 0/s, '--help');
like($help, qr/AGENTVM_BOOTSTRAP_TRIES\n.*default: 30\).*\n +AGENTVM_BOOTSTRAP_INTERVAL .*\n.*default: 5\)/, 'it bootstraps 30 times, 5 s apart');
ok(index($help, $_) > 0, "--help tells of $_") for slurp_file("$ENV{TESTDIR}/src/providers/boot.c") =~ /add_env\(&env, "(\w+)"/g;
like(scalar `ldd $binary 2>&1`, qr/not a dynamic executable/, 'it needs no library');
my $stripped = PostgreSQL::Test::Utils::tempdir() . '/stripped';
is(system('strip', '-o', $stripped, $binary), 0, 'stripped');
cmp_ok(-s $stripped, '<', 8 * 1024 * 1024, 'it is small: ' . -s $stripped);

# ---- bad settings ----
my $token = 'f' x 64;
my $url = $gateway->url;
for ([ { GATEWAY_URL => undef }, qr/AGENTVM_GATEWAY_URL is missing/ ], [ { GATEWAY_URL => 'ftp://x' }, qr/is not https:/ ], [ { GATEWAY_URL => 'https://user@x' }, qr/is not https:/ ],
	[ { GATEWAY_URL => 'https://x:70000' }, qr/is not https:/ ], [ { GATEWAY_URL => 'http://gateway.example' }, qr/tokens in clear.*AGENTVM_ALLOW_INSECURE/ ],
	[ { GATEWAY_URL => 'http://127.0.0.1.example' }, qr/tokens in clear/ ], [ { BOOTSTRAP_TOKEN => undef }, qr/has no AGENTVM_BOOTSTRAP_TOKEN/ ], [ { BOOTSTRAP_TOKEN => 'short' }, qr/from 16 to 256/ ],
	[ { BOOTSTRAP_TOKEN => "with space and more" }, qr/no.* bearer token/ ], [ { MODE => 'other' }, qr/AGENTVM_MODE=other must be session or warm/ ],
	[ { HEARTBEAT_INTERVAL => 'soon' }, qr/AGENTVM_HEARTBEAT_INTERVAL=soon must be a number/ ], [ { BOOTSTRAP_TRIES => 0 }, qr/AGENTVM_BOOTSTRAP_TRIES=0 must be a number from 1/ ],
	[ { STATE_DIR => 'here' }, qr/absolute/ ], [ { STATE_DIR => '/proc/nothing' }, qr/AGENTVM_STATE_DIR/ ], [ { GATEWAY_URL => 'https://x', CA_FILE => '/nowhere' }, qr/AGENTVM_CA_FILE=\/nowhere/ ],
	[ { FINGERPRINT => 'ab' }, qr/64 hex digits/ ], [ { CA_FILE => '/x', FINGERPRINT => 'ab' x 32 }, qr/alternatives/ ], [ { LOG_LEVEL => 'loud' }, qr/AGENTVM_LOG_LEVEL=loud/ ])
{
	my ($settings, $like) = @$_;
	my $vm = AgentVM::VM->new($url, $token, %$settings)->start;
	$vm->exits(2, 'exit code 2 for ' . encode_json($settings));
	like($vm->output, $like, 'and says why');
	unlike($vm->output, qr/$token/, 'without the token');
}
my $open = AgentVM::VM->new($url, $token);
chmod 0640, $open->dir . '/runtime.env';
$open->start->exits(2, 'a file that others may read is refused');
like($open->output, qr/mode 0600, but has 0640/, 'and says why');
is(system("$binary --config=/nowhere 2>/dev/null") >> 8, 2, 'no file');
is(system("$binary --nonsense 2>/dev/null") >> 8, 2, 'an unknown option');
my $check = AgentVM::VM->new($url, $token);
is(scalar `$binary --check --config=@{[ $check->dir ]}/runtime.env`, "ok\n", '--check');
ok(!-e $check->dir . '/state', 'makes nothing');

# ---- a session's life ----
my $env = { SECRET_TOKEN => 'sesame-open', QUOTED => qq(a "b" \\ \n \$(rm) 'c') };
my $source = PostgreSQL::Test::Utils::tempdir('repos');
system_or_bail('sh', '-c', "cd $source && git init -q -b main one && cd one && git config user.email a\@b && git config user.name a && echo first > file && git add file && git commit -qm first && git tag v1 && echo second > file && git commit -qam second");
my $repos = [ { url => "file://$source/one" }, { url => "file://$source/one", ref => 'v1', path => 'deep/tagged' }, { url => "file://$source/nothing" },
	{ url => 'http://joe:pass%40word@127.0.0.1:1/private.git', path => 'private' }, { url => "file://$source/one", ref => '--orphan=x', path => 'dash' } ];
my $id = launched('env => ' . json($env), 'repos => ' . json($repos));
my $boot_token = bootstrap_token($node, $id);
my $vm = AgentVM::VM->new($url, $boot_token, SESSION_ID => $id, UNHEARD_OF => 'x');
link($vm->dir . '/runtime.env', $vm->dir . '/blocks') or die "could not link: $!";
$vm->start;
await_state($node, $id, 'ready', name => 'bootstrap: the session is ready');
$vm->says(qr/on duty/, 'and the runtime knows it');
my $state = decode_json($vm->file('state/session.json'));
is($state->{session_id}, $id, 'it knows its session');
like($state->{session_token}, qr/^[0-9a-f]{64}$/, 'its own token: 256 bits');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session_token WHERE kind = 'session' AND session_id = '$id' AND token_sha256 = '\\x" . sha256_hex($state->{session_token}) . "'"), 1, 'of which the server has the hash');
chomp(my $boot_id = slurp_file('/proc/sys/kernel/random/boot_id'));
is($node->safe_psql('postgres', "SELECT boot_id FROM agentvm.session WHERE session_id = '$id'"), $boot_id, 'and the boot id');
is($node->safe_psql('postgres', "SELECT boot_info->>'runtime_version' = '0.3' AND boot_info->>'hostname' <> '' FROM agentvm.session WHERE session_id = '$id'"), 't', 'version and host name');
$vm->says(qr/channel is open/, 'the channel is open');
$vm->says(qr/first heartbeat acknowledged.*by=channel/, 'and carries the heartbeats');
beats_again($id, "a heartbeat is in the table") for 1 .. 3;

is_deeply(decode_json($vm->file('state/env.json')), $env, 'env.json');
is_deeply(decode_json($vm->file('state/repos.json')), $repos, 'repos.json');
is($vm->file_mode("state/$_"), '0600', "$_ is for its owner only") for qw(session.json times.json env.json repos.json);
is($vm->file_mode('state'), '0700', 'and so is their directory');
is($vm->file_mode('runtime.env'), '0600', 'runtime.env keeps its mode');
unlike($vm->file('runtime.env'), qr/$boot_token|BOOTSTRAP_TOKEN/, 'the bootstrap token is erased');
like($vm->file('blocks'), qr/^\0+$/, 'and overwritten where it was');
like($vm->file('runtime.env'), qr/^AGENTVM_GATEWAY_URL=\Q$url\E$/m, 'and nothing else');
like($vm->output, qr/setting is not known.*AGENTVM_UNHEARD_OF/, 'a setting of another version is no obstacle');

$vm->says(qr/was not cloned.*\/one.*dash/, 'the last repository has had its turn');
is($vm->file('work/one/file'), "second\n", 'a repository is cloned');
is($vm->file('work/deep/tagged/file'), "first\n", 'at its ref and path');
like($vm->output, qr/was not cloned" url=file:\/\/\S+nothing reason="git clone failed"/, 'what cannot be cloned is told');
like($vm->output, qr/was not cloned" url=http:\/\/127.0.0.1:1\/private.git/, 'without its user and password');
ok(!-e $vm->dir . '/work/private', 'and leaves nothing');

my ($arguments) = slurp_file('/proc/' . $vm->pid . '/cmdline');
my $environment = slurp_file('/proc/' . $vm->pid . '/environ');
for my $secret ($boot_token, $state->{session_token}, 'sesame-open', 'pass@word', 'pass%40word')
{
	is(index($vm->output . $arguments . $environment, $secret), -1, 'in no log, argument or environment: ' . substr($secret, 0, 4) . '...');
}
like($vm->output, qr/token=@{[ substr($boot_token, 0, 4) ]}\.\.\.@{[ substr($boot_token, -4) ]}/, 'tokens are shown by their ends');
like(slurp_file('/proc/' . $vm->pid . '/limits'), qr/^Max core file size +0 +0 /m, 'no core file will hold them');
my ($resident) = slurp_file('/proc/' . $vm->pid . '/status') =~ /VmRSS:\s+(\d+) kB/;
cmp_ok($resident * 1024, '<=', 6_000_000, "resident: $resident kB");

# the deadline in force is kept, in ms since boot
sub deadline_is
{
	my ($id, $name) = @_;
	my $left = $node->safe_psql('postgres', "SELECT extract(epoch FROM deadline_at - clock_timestamp()) FROM agentvm.sessions WHERE session_id = '$id'");
	my ($uptime) = slurp_file('/proc/uptime') =~ /^(\S+)/;
	return abs(decode_json($vm->file('state/times.json'))->{deadline} / 1000 - $uptime - $left) < 3;
}
ok(deadline_is($id), 'it knows its deadline');
psql_ok($node, "SELECT agentvm.extend('$id', '3 hours')", 'extend()');
my $end = time + 60;
sleep 0.1 until deadline_is($id) || time > $end;
ok(deadline_is($id), 'a heartbeat brings the new one');

# a restart of the runtime
is($vm->stop, 0, 'SIGTERM is a clean end');
my $tries = () = $gateway->output =~ /msg=bootstrap /g;
$vm->start;
$vm->says(qr/on duty/, 'it goes on without bootstrap token');
beats_again($id, 'and beats');
is(scalar(() = $gateway->output =~ /msg=bootstrap /g), $tries, 'without another bootstrap');
is(decode_json($vm->file('state/session.json'))->{session_token}, $state->{session_token}, 'with the same session token');
$vm->signal('KILL')->code(60);
$vm->write_settings;    # a boot script that runs again
$vm->start->says(qr/on duty/, 'killed, and the bootstrap token is there again');
unlike($vm->file('runtime.env'), qr/BOOTSTRAP_TOKEN/, 'it is erased again');

# the end
my $asked = time;
psql_ok($node, "SELECT agentvm.terminate('$id')", 'terminate()');
$vm->exits(0, 'the runtime ends with the session');
like($vm->output, qr/the session has ended/, 'and says so');
ok(!$vm->is_off, 'it leaves the machine to systemd and the provider');
$vm->start->exits(0, 'started again, it ends again');

# ---- the way through a device is for the runtime only ----
my $relay = AgentVM::VM->new($url, 'f' x 64, GATEWAY_DEVICE => '/dev/ptmx', HTTP_TIMEOUT => 600)->start;
$relay->says(qr/bootstrapping/, 'a runtime with a device');
my ($socket) = slurp_file('/proc/net/unix') =~ /\@(agentvm-@{[ $relay->pid ]}-\w+)/;
my $intruder = IO::Socket::UNIX->new(Peer => "\0$socket");
ok($intruder, 'another process finds its socket');
$intruder->blocking(0);
ok(IO::Select->new($intruder)->can_read(AgentVM::Process::timeout()), 'and hears at once');
is(sysread($intruder, my $nothing, 1), 0, 'that it is not taken');
$relay->stop;

# ---- refused ----
my $second = launched();
my $stranger = AgentVM::VM->new($url, 'e' x 64)->start;
$stranger->exits(1, 'an unknown bootstrap token: exit code 1');
like($stranger->output, qr/bootstrap token is refused.*eeee\.\.\.eeee/, 'and says so');
is(scalar(() = $stranger->output =~ /bootstrap token is refused/g), 1, 'at once');
my $first = AgentVM::VM->new($url, bootstrap_token($node, $second))->start;
await_state($node, $second, 'ready');
AgentVM::VM->new($url, bootstrap_token($node, $second))->start->exits(1, 'a token that another machine has used: exit code 1');
psql_ok($node, "SELECT agentvm.terminate('$second')");
$first->exits(0);
AgentVM::VM->new($url, bootstrap_token($node, $second))->start->exits(0, 'of a session that has ended: exit code 0');

# an image made of a machine that was used: its state is of another session
my $third = launched();
my $image = AgentVM::VM->new($url, bootstrap_token($node, $third));
mkdir $image->dir . '/state';
append_to_file($image->dir . '/state/session.json', $vm->file('state/session.json'));
$image->start;
await_state($node, $third, 'ready', name => 'a state of another bootstrap token is not used');
isnt(decode_json($image->file('state/session.json'))->{session_token}, $state->{session_token}, 'nor its session token');
$image->stop;

done_testing();
