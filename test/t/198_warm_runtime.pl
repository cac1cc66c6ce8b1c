# A warm VM with the real runtime behind the real gateway: nothing of a session's before it is taken, all of it before the first command, whatever is lost on the way
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::FakeGateway;
use AgentVM::Gateway;
use AgentVM::Runtime;
use AgentVM::Test;
use AgentVM::VM;
use Digest::SHA qw(sha256_hex);
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

# so that no heartbeat tells of what others should have told
my $node = new_node('main', conf => "agentvm.heartbeat_interval = 300\nagentvm.heartbeat_timeout = 900\nagentvm.deadman_allowance = 1800\n");
my $control = PostgreSQL::Test::Utils::tempdir_short() . '/control';
$node->safe_psql('postgres', q{SELECT agentvm.create_team('acme'); SELECT agentvm.create_profile('vm', 'noop', options => '{"runtime": true}', runtime => true)});
$node->safe_psql('postgres', "INSERT INTO agentvm.gateway (gateway_id, control_address) VALUES ('gw1', 'unix:$control')");
my $gateway = AgentVM::Gateway->new($node, options => [ '--name', 'gw1', '--control', "unix:$control" ]);
my $client = AgentVM::Client->new($node);
my $source = PostgreSQL::Test::Utils::tempdir('repos');
system_or_bail('sh', '-c', "cd $source && git init -q -b main one && cd one && git config user.email a\@b && git config user.name a && echo first > file && git add file && git commit -qm first");
my $wants = "'acme', profile => 'vm', repos => '[{\"url\": \"file://$source/one\"}]', env => ";

sub warm
{
	my (%settings) = @_;
	my $id = $node->safe_psql('postgres', q{SELECT agentvm.provision_warm('acme', 'vm')});
	my $vm = AgentVM::VM->boot($node, $gateway, $id, MODE => 'warm', %settings);
	await_state($node, $id, 'warm');
	$vm->says(qr/first heartbeat acknowledged/, 'its runtime is on duty');
	return ($id, $vm);
}

# Somebody takes it, by a statement of his own
sub take { my ($id, $name) = @_; return is($client->run("SELECT agentvm.provision($wants '{\"WHO\": \"$name\"}')"), $id, "$name takes it"); }
sub who { my ($id, $timeout) = @_; return $client->run("SELECT stdout FROM agentvm.exec('$id', 'echo \$WHO', timeout => '1 min')"); }
sub dispatchers { my ($signal) = @_; kill $signal, split(/\n/, $node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher')); return; }
sub hydrations { my ($vm) = @_; return scalar(() = $vm->output =~ /msg=hydrated/g); }

# ---- before, and after ----
my ($id, $vm) = warm();
like($vm->output, qr/on duty.*mode=warm/, 'it knows that it is warm');
ok(!-e $vm->dir . "/state/$_", "it has no $_") for qw(env.json repos.json);
fails_with($node, "SELECT agentvm.exec('$id', 'true')", 'AV007', qr/is not ready, but warm.*HINT.*waits for a provision/s, 'and runs no command');
ok(!-e $vm->dir . '/work/one', 'nor is there a repository');
my $begin = time;
take($id, 'alice');
sleep 0.002 until -e $vm->dir . '/state/env.json' || time > $begin + 60;
my $took = time - $begin;
cmp_ok($took, '<', 1, sprintf('it has its environment after %.3f s', $took));
$vm->says(qr/repository is there/, 'and its repository');
is_deeply(decode_json($vm->file('state/env.json')), { WHO => 'alice' }, 'env.json');
is($vm->file('work/one/file'), "first\n", 'and the clone');
is($vm->file_mode("state/$_"), '0600', "$_ is for its owner only") for qw(env.json repos.json);
is(who($id), "alice\n", 'a command sees it');
is($vm->stop, 0, 'a restart');
$vm->start->says(qr/channel is open/, 'it is back');
is(who($id), "alice\n", 'and has what it had');
is(hydrations($vm), 1, 'without asking again');
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session_hydrating'), 0, 'nor is it expected to');
psql_ok($node, "SELECT agentvm.terminate('$id')");
$vm->exits(0, 'the runtime ends with the session');

# ---- at once: nobody has told it, and a command or a file is there ----
for my $first ('command', 'file')
{
	($id, $vm) = warm();
	dispatchers('STOP');
	take($id, 'bob');
	is($client->run("SELECT agentvm.upload('$id', 'one/new', 'x')"), 1, 'a file that comes first') if $first eq 'file';
	is(who($id), "bob\n", 'a command right after has the environment');
	is(hydrations($vm), 1, 'for which the runtime has asked by itself');
	dispatchers('CONT');
	psql_ok($node, "SELECT agentvm.terminate('$id')");
	$vm->exits(0);
}
($id, $vm) = warm();
fails_with($node, "BEGIN; SELECT agentvm.exec(agentvm.provision($wants '{}'), 'true')", 'AV007', qr/session $id is not ready, but warm.*has not committed.*COMMIT first/s, 'but not within the transaction that takes it, which gives it back');
is($client->run("SELECT agentvm.provision($wants '{\"WHO\": \"carol\"}')") . ' ' . who($id), "$id carol\n", 'so it has with all awake');
psql_ok($node, "SELECT agentvm.terminate('$id')");
$vm->exits(0);

# ---- taken while the runtime is down; while the gateway is; and when it crashes half-way ----
($id, $vm) = warm();
is($vm->stop, 0, 'the runtime is down');
$vm->start->says(qr/first heartbeat acknowledged/, 'and up again: still warm');
is(state_of($node, $id), 'warm', 'as is its session');
$vm->signal('KILL')->code(60);
take($id, 'dave');
$vm->start;
is(who($id), "dave\n", 'taken while it was down');
psql_ok($node, "SELECT agentvm.terminate('$id')");
$vm->exits(0);

($id, $vm) = warm();
$gateway->stop;
take($id, 'erin');
$gateway->start;
$vm->says(qr/msg=hydrated/, 'taken while the gateway was down: it asks when it has a channel again');
is(who($id), "erin\n", 'and runs commands');
psql_ok($node, "SELECT agentvm.terminate('$id')");
$vm->exits(0);

# what it has fetched is not all on its disk
($id, $vm) = warm();
dispatchers('STOP');
take($id, 'frank');
$vm->stop;
append_to_file($vm->dir . '/state/env.json', '{"WHO": "somebody"}');
$vm->start;
is(who($id), "frank\n", 'a crash in between: it is fetched again');
dispatchers('CONT');
psql_ok($node, "SELECT agentvm.terminate('$id')");
$vm->exits(0);

# ---- a heartbeat is enough ----
$node->append_conf('postgresql.conf', 'agentvm.heartbeat_interval = 1');
$node->reload;
$node->poll_query_until('postgres', q{SELECT current_setting('agentvm.heartbeat_interval') = '1s'}) or die 'no reload';
($id, $vm) = warm();
dispatchers('STOP');
take($id, 'grace');
$vm->says(qr/msg=hydrated/, 'the deadline that its heartbeat brings is another one');
dispatchers('CONT');

# ---- a VM that cannot take it over ends ----
my ($bad, $full) = warm();
chmod 0500, $full->dir . '/state';
take($bad, 'heidi');
await_state($node, $bad, 'failed', name => 'one whose disk takes nothing ends');
like(state_of($node, $bad), qr/^failed provider_error the VM could not take over env and repos: env.json/, 'and says why');
chmod 0700, $full->dir . '/state';
$full->exits(0, 'the runtime ends with it');
unlike($full->output, qr/msg=hydrated/, 'without ever being what it was not');

# ---- what the gateway may ask ----
my $plain = $node->safe_psql('postgres', q{SELECT agentvm.provision_warm('acme', 'vm')});
await($node, "SELECT running FROM agentvm.session WHERE session_id = '$plain'");
bootstrap($node, $plain);
is(state_of($node, $plain), 'warm', 'bootstrap() makes it warm');
my $hash = AgentVM::Runtime::session_hash($plain);
is($node->safe_psql('postgres', as_role('agentvm_gateway', "SELECT agentvm.hydrate($hash$_)")), "{\"session_id\": \"$plain\"}", "hydrate() before it is taken ($_)") for '', ", 'problem'";
is(state_of($node, $plain), 'warm', 'and no problem ends it');
is($client->run("SELECT agentvm.provision($wants '{\"A\": \"b\"}')"), $plain, 'taken');
fails_with($node, "SELECT agentvm.exec('$plain', 'true', timeout => '1 s')", 'AV009', qr/DETAIL: +No gateway has a channel to it\. The VM was warm, and its runtime has not fetched yet what it was taken with/, 'until it has come, a call that gets nowhere says so');
is($node->safe_psql('postgres', as_role('agentvm_gateway', "SELECT h - 'deadline' - 'session_id' FROM agentvm.hydrate($hash) h")) =~ s/\s//gr,
	'{"env":{"A":"b"},"files":[],"repos":[{"url":"file://' . $source . '/one"}],"channel":"/v1/channel","deadline_grace_s":300,"deadman_allowance_s":1800,"heartbeat_interval_s":1}', 'hydrate() after');
fails_with($node, "SELECT agentvm.exec('$plain', 'true', timeout => '1 s')", 'AV009', qr/^(?!.*was warm)/s, 'then it does not');
is($node->safe_psql('postgres', as_role('agentvm_gateway', 'SELECT agentvm.hydrate(sha256(\'x\')) IS NULL')), 't', 'of an unknown token');
my $open = AgentVM::Client->new($node);
$open->run("BEGIN; SELECT FROM agentvm.session WHERE session_id = '$plain' FOR UPDATE");
fails_with($node, as_role('agentvm_gateway', "SELECT agentvm.hydrate($hash, 'x')"), '55P03', undef, 'it waits for nobody');
$open->run('ROLLBACK');
$node->safe_psql('postgres', as_role('agentvm_gateway', "SELECT agentvm.hydrate($hash, E'no\\tdisk')"));
await_state($node, $plain, 'failed');
is(state_of($node, $plain), 'failed provider_error the VM could not take over env and repos: no?disk', 'a problem ends it');
fails_with($node, as_role('agentvm_gateway', "SELECT agentvm.hydrate($hash)"), 'AV006', undef, 'and then it is gone');

# ---- answers that are lost or make no sense ----
my $fake = AgentVM::FakeGateway->new(sub {
	my ($request) = @_;
	return (200, {}, AgentVM::FakeGateway::boot_answer(env => {})) if $request->{path} eq '/v1/bootstrap';
	return (200, {}, '{"deadline": "2099-01-01T00:00:00Z"}') if $request->{path} eq '/v1/heartbeat';
	return (101, {}, ['{"type": "hello"}']) if $request->{path} eq '/v1/channel';
	return (409, {}, '{}') if $request->{number} == 1;
	return (503, {}, '{}') if $request->{number} == 2;
	return (200, {}, '{"env": ') if $request->{number} == 3;
	return (200, {}, AgentVM::FakeGateway::boot_answer(env => { WHO => 'ivan' }));
}, acknowledges => 1);
my $patient = AgentVM::VM->new($fake->url, 'f' x 64, MODE => 'warm', BACKOFF_MIN => 0.05)->start;
$patient->says(qr/channel is open/, 'a runtime of another gateway');
my $pending = $fake->send({ op => 'start', command => '00000000-0000-7000-8000-000000000001', command_len => 9, wait_ms => 10000 }, 'echo $WHO');
my ($answer, $bytes) = $fake->answer($pending);
is($bytes, "ivan\n", 'a call waits until it has all');
is(scalar(grep { $_->{path} eq '/v1/hydrate' } $fake->requests), 4, 'which takes as long as it takes');

done_testing();
