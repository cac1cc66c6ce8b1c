# What provision() asks of the server's settings; what its errors leave in the log
use strict;
use warnings;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main');
my $keys = $node->basedir . '/keys';
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme'); SELECT agentvm.create_team('full', limits => '{\"max_sessions\": 0}'); SELECT agentvm.create_team('short', limits => '{\"max_lifetime\": \"30 minutes\"}')");
$node->safe_psql('postgres', "SELECT agentvm.create_profile('with', 'noop', runtime => true); SELECT agentvm.create_profile('without', 'noop', runtime => false)");

# Set something, and wait until new connections have it
sub set
{
	my ($name, $value) = @_;
	$node->append_conf('postgresql.conf', "$name = '$value'\n");
	$node->reload;
	return await($node, "SELECT current_setting('$name')", $value, name => "$name = '$value'");
}
sub stored { return $node->safe_psql('postgres', 'SELECT (SELECT count(*) FROM agentvm.session), (SELECT count(*) FROM agentvm.session_event), (SELECT count(*) FROM agentvm.session_token)'); }
my $none = stored();

# ---- a runtime needs a gateway to dial ----
set('agentvm.gateway_url', '');
fails_with($node, "SELECT agentvm.provision('acme', options => '{\"runtime\": true}')", 'AV010', qr/needs agentvm.gateway_url.*HINT/s, 'no gateway: by option');
fails_with($node, "SELECT agentvm.provision('acme', profile => 'with')", 'AV010', qr/needs agentvm.gateway_url/, 'no gateway: by profile');
is(stored(), $none, 'nothing is stored');
psql_ok($node, "SELECT agentvm.provision('acme')", 'without a runtime it needs none');
psql_ok($node, "SELECT agentvm.provision('acme', profile => 'without')", 'nor by profile');
psql_ok($node, "SELECT agentvm.provision('acme', profile => 'with', options => '{\"runtime\": false}')", 'nor by option against the profile');
set('agentvm.gateway_url', 'https://gateway.example');
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 3);

# ---- a runtime needs a key for its token, and for env ----
$none = stored();
my $runtime = "options => '{\"runtime\": true}'";
set('agentvm.key_file', '');
fails_with($node, "SELECT agentvm.provision('acme', $runtime)", 'AV010', qr/agentvm.key_file is not set.*HINT:  Create one with/s, 'no key file');
set('agentvm.key_file', "$keys.none");
fails_with($node, "SELECT agentvm.provision('acme', $runtime)", 'AV010', qr/could not open key file/, 'a key file that is not there');
append_to_file("$keys.none", '');
chmod 0600, "$keys.none";
fails_with($node, "SELECT agentvm.provision('acme', $runtime)", 'AV010', qr/contains no key/, 'an empty one');
set('agentvm.key_file', $keys);
chmod 0644, $keys;
fails_with($node, "SELECT agentvm.provision('acme', env => '{\"A\": \"b\"}', $runtime)", 'AV010', qr/has group or world access/, 'one that others may read');
chmod 0600, $keys;
is(stored(), $none, 'nothing is stored');
psql_ok($node, "SELECT agentvm.provision('acme', env => '{\"A\": \"b\"}', $runtime)", 'and a proper one');

# ---- lifetimes, timeouts, the default provider ----
sub lifetimes
{
	my ($id) = @_;
	return $node->safe_psql('postgres', "SELECT extract(epoch FROM deadline_at - created_at)::int, extract(epoch FROM ceiling_at - created_at)::int, extract(epoch FROM bootstrap_timeout)::int, extract(epoch FROM heartbeat_timeout)::int
		FROM agentvm.session WHERE session_id = '$id'");
}
is(lifetimes(provision($node, 'acme')), '7200|86400|180|120', 'the defaults');
set('agentvm.max_lifetime', '50min');
set('agentvm.bootstrap_timeout', '90s');
set('agentvm.heartbeat_timeout', '45s');
set('agentvm.max_lifetime_ceiling', '1h');
is(lifetimes(provision($node, 'acme')), '3000|3600|90|45', 'the settings');
is(lifetimes(provision($node, 'short')), '1800|1800|90|45', 'a team that has less');
fails_with($node, "SELECT agentvm.provision('acme', max_lifetime => '61 minutes')", 'AV012', qr/at most 3600 s are allowed/, 'no more than the ceiling');
set('agentvm.max_lifetime', '2h');
is(lifetimes(provision($node, 'acme')), '3600|3600|90|45', 'a default above the ceiling is lowered to it');
set('agentvm.default_provider', 'ec2');
fails_with($node, "SELECT agentvm.provision('acme')", 'AV010', qr/provider "ec2"/, 'the default provider');
psql_ok($node, "SELECT agentvm.provision('acme', provider => 'noop')", 'an argument goes before it');
set('agentvm.default_provider', 'nowhere');
fails_with($node, "SELECT agentvm.provision('acme')", 'AV010', qr/unknown provider "nowhere".*HINT:  Known providers: .*noop/s, 'a default that does not exist');
set('agentvm.default_provider', 'noop');

# ---- no error shows a statement with env in the log, nor PL/pgSQL's context to anybody ----
my $env = "env => '{\"TOKEN\": \"sesame\"}'";
my $quiet = 'SET log_statement = none; SET log_min_error_statement = debug5; SET log_error_verbosity = verbose;';
for my $arguments (
	"'full', $env", "'nobody', $env", "'acme', $env, profile => 'nothing'", "'acme', $env, options => '{\"x\": 1}'", "'acme', $env, options => '{\"fail\": \"x\"}'", "'acme', $env, tags => '[]'", "'acme', $env, max_lifetime => '-1 s'",
	"'acme', $env, agent_id => ''", "'acme', $env, max_lifetime => '3 days'", "'acme', env => '{\"TOKEN\": [\"sesame\"]}'", "'acme', env => '[\"sesame\"]'", "'acme', env => jsonb_build_object('sesame=', '')",
	"'acme', env => jsonb_build_object('TOKEN', repeat('sesame', 20000))", "'acme', $env, provider => 'ec2'", "'acme', $env, idempotency_key => E'\\n'")
{
	my ($out, $error);
	$node->psql('postgres', "$quiet SELECT agentvm.provision($arguments)", stderr => \$error);
	like($error, qr/ERROR/, "fails: $arguments");
	unlike($error =~ s/^LINE 1:.*//mr, qr/sesame/, 'without telling');
	$node->psql('postgres', "$quiet DO \$\$ BEGIN PERFORM agentvm.provision($arguments); END \$\$", stderr => \$error);
	unlike($error, qr/sesame|PL/, 'nor within PL/pgSQL');
}
psql_ok($node, "$quiet SELECT agentvm.provision('acme', $env)", 'a warning');
psql_ok($node, "SELECT agentvm.provision('acme', idempotency_key => 'k')", 'a key');
fails_with($node, "$quiet SELECT agentvm.provision('acme', $env, idempotency_key => 'k')", 'AV008');
# also not an error of PostgreSQL's own: waiting for the team's lock ends by a timeout
my $lock = $node->background_psql('postgres');
$lock->query_safe("BEGIN; SELECT agentvm.alter_team('full')");
fails_with($node, "$quiet SET lock_timeout = '100ms'; SELECT agentvm.provision('full', $env)", '55P03');
fails_with($node, "$quiet SET statement_timeout = '100ms'; SELECT agentvm.provision('full', $env)", '57014');
$lock->quit;
log_lacks($node, 'sesame', 'nor in the log');
like(log_text($node), qr/team "full" is at its limit/, 'which has the errors');

done_testing();
