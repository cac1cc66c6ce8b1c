# Providers from other libraries (test/modules), named by agentvm.provider_libraries
use strict;
use warnings;
use AgentVM::Test;
use Test::More;

my $node = new_node('main', conf => "agentvm.provider_libraries = 'agentvm_test_stranger, no_such_library, agentvm_test_provider'\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme'); SELECT agentvm.create_team('strange')");

my $session = provision($node, 'acme', "provider => 'tiny'", q(options => '{"name": "bob"}'));
await_state($node, $session, 'ready');
is($node->safe_psql('postgres', "SELECT provider || ' ' || vm_id FROM agentvm.sessions WHERE session_id = '$session'"), 'tiny tiny-bob', 'its step made the VM');
is($node->safe_psql('postgres', "SELECT agentvm.inspect('$session') ->> 'says'"), 'tiny', 'inspect() asks it, too');
psql_ok($node, "SELECT agentvm.terminate('$session')", 'terminate');
await_state($node, $session, 'terminated');

fails_with($node, "SELECT agentvm.provision('acme', provider => 'tiny', options => '{\"size\": 3}')", 'AV010', qr/unknown option "size".*Known options: name, broken/s, 'its options are checked');
my $broken = provision($node, 'acme', "provider => 'tiny'", q(options => '{"name": "bob", "broken": true}'));
await_state($node, $broken, 'failed');
like(state_of($node, $broken), qr/^failed provider_error StepFailed: the tiny provider is broken/, 'a step that raises is a failed step');

# A library that does not fit is told about and takes nobody with it
my ($code, $out, $error) = $node->psql('postgres', "SELECT agentvm.provision('strange', provider => 'stranger')");
like($error, qr/WARNING:.*"agentvm_test_stranger".*version 5 of the provider interface/, 'a library for another version of the interface: a clear warning');
like($error, qr/WARNING:.*"no_such_library"/, 'as for one that is missing');
like($error, qr/ERROR:.*stranger.*/, 'its provider does not exist');
like($error, qr/noop.*tiny|tiny.*noop/s, 'the known ones are named');
$session = provision($node, 'strange');
await_state($node, $session, 'ready');

# The setting may change while the server runs: a worker that no longer knows a provider fails for its sessions only
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.provider_libraries = ''; SELECT pg_reload_conf()");
await($node, 'SHOW agentvm.provider_libraries', '');
fails_with($node, "SELECT agentvm.provision('acme', provider => 'tiny')", 'AV010', qr/tiny/, 'without the library no such provider');
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.provider_libraries = 'agentvm_test_provider'; SELECT pg_reload_conf()");
await($node, 'SHOW agentvm.provider_libraries', 'agentvm_test_provider');
$session = provision($node, 'acme', "provider => 'tiny'", q(options => '{"name": "eve"}'));
await_state($node, $session, 'ready');

done_testing();
