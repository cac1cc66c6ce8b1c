# Keys, tokens and secrets of sessions are nowhere where somebody could read them; rows of secrets are worth nothing elsewhere
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use MIME::Base64;
use PostgreSQL::Test::Utils;
use Test::More;

my ($node, $faults, $moto) = ec2_node('main', preload => ['pg_stat_statements'], conf => <<'CONF');
log_min_messages = debug5
log_statement = none
pg_stat_statements.track = all
CONF
$node->safe_psql('postgres', 'CREATE EXTENSION pg_stat_statements');
make_role($node, 'member', teams => ['acme']);
make_role($node, 'monitor', grants => ['agentvm_monitor']);
make_role($node, 'admin', grants => ['agentvm_admin']);

# ---- plant ----
my %planted = (
	'access key' => $moto->secrets->{access_key_id},
	'secret key' => $moto->secrets->{secret_access_key},
	'wrong key' => 'wJalrXUtnFEMI-planted-and-wrong',
	'env secret' => 'env-planted-4711',
	'repo token' => 'ghp-planted-0815',
	'master key' => slurp_file($node->basedir . '/keys') =~ s/^k1:|\n//gr);
my $session = provision($node, 'acme', qq{env => '{"TOKEN": "$planted{'env secret'}"}'}, qq{repos => '[{"url": "https://x:$planted{'repo token'}\@git.example/a"}]'});
my $vm = await_vm($node, $session);
$planted{'bootstrap token'} = bootstrap_token($moto, $vm);
like(as_gateway($node, 'SELECT agentvm.bootstrap(' . bytea_hash($planted{'bootstrap token'}) . ', ' . bytea_hash('session-token-planted') . ", 'boot-1')"),
	qr/$planted{'env secret'}.*$planted{'repo token'}/, 'the runtime gets what was planted');
$planted{'session token'} = 'session-token-planted';

# a text, and the forms that a dump or a log might have it in
sub forms { my ($text) = @_; return ($text, unpack('H*', $text), encode_base64($text, ''), substr(encode_base64($text, ''), 0, -4)); }

# None of what was planted is in the text
sub nowhere
{
	my ($text, $name) = @_;
	my @found = grep { my $what = $_; grep { index($text, $_) >= 0 } forms($planted{$what}) } sort keys %planted;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(join(', ', @found), '', $name);
}

# ---- errors of set_provider(), its own and the server's ----
my $errors = '';
sub fail_to_set
{
	my ($what, $secrets, $before) = @_;
	my ($code, $out, $error) = $node->psql('postgres', ($before // '') . "SELECT agentvm.set_provider('acme', 'ec2', " . json($moto->options) . ", $secrets)");
	isnt($code . $error, '0', "set_provider() fails: $what");
	$errors .= $error;
	return;
}
my $key = literal($planted{'wrong key'});
fail_to_set('an unknown field', "jsonb_build_object('secret_key', $key)");
fail_to_set('a value of the wrong type', "jsonb_build_object('secret_access_key', jsonb_build_array($key))");
fail_to_set('a control character', "jsonb_build_object('secret_access_key', $key || E'\\n')");
fail_to_set('too long', "jsonb_build_object('secret_access_key', repeat($key, 1000))");
fail_to_set('no object', "to_jsonb($key\::text)");
fail_to_set('no such team', "NULL); SELECT agentvm.set_provider('nobody', 'ec2', '{}', jsonb_build_object('secret_access_key', $key)");
fail_to_set('not allowed', "jsonb_build_object('secret_access_key', $key)", 'SET ROLE agentvm_user; SET log_min_error_statement = panic;');
fail_to_set('read-only', "jsonb_build_object('secret_access_key', $key)", 'SET default_transaction_read_only = on;');
$node->safe_psql('postgres', "CREATE FUNCTION wrap(s jsonb) RETURNS void LANGUAGE plpgsql AS \$\$BEGIN PERFORM agentvm.set_provider('acme', 'ec2', '{}', s); END\$\$");
fail_to_set('inside PL/pgSQL', "(SELECT NULL::jsonb)); SELECT wrap(jsonb_build_object('secret_key', $key)");
my $holder = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), map { ('-c', $_) } 'BEGIN', 'LOCK agentvm.provider_secret', 'SELECT pg_sleep(60) /* holder */' ],
	'<', \undef, '>', '/dev/null', '2>', '/dev/null');
await($node, q{SELECT count(*) FROM pg_stat_activity WHERE query ~ 'holder' AND wait_event = 'PgSleep'}, 1);
fail_to_set('a lock timeout', "jsonb_build_object('secret_access_key', $key)", "SET lock_timeout = '100ms';");
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ 'holder' AND wait_event = 'PgSleep'});
$holder->finish;
nowhere($errors, 'no error text shows a secret');

# ---- a cloud that echoes them, keys that are wrong ----
$faults->set(action => 'RunInstances', mode => 'error', code => 'AuthFailure', n => 1,
	message => "your key $planted{'access key'} with $planted{'secret key'} is no good");
my $failed = launch($node, 'acme', 'failed');
is(state_of($node, $failed), 'failed invalid_credentials AuthFailure: your key *** with *** is no good', 'what the cloud echoes is blanked out');
$faults->set(action => 'GetCallerIdentity', mode => 'error', code => 'AuthFailure', n => 1, message => "no $planted{'secret key'}");
fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV001', qr/no \*\*\*/, 'in errors, too');
ec2_team($node, 'wrong', $moto, secrets => { %{ $moto->secrets }, secret_access_key => $planted{'wrong key'} });
launch($node, 'wrong', 'failed');

# ---- rows of secrets, moved ----
$node->safe_psql('postgres', q{SELECT agentvm.create_team('thief', 'ec2', '{"bootstrap_timeout": "2 seconds"}');
	SELECT agentvm.create_team('mixed', 'ec2', '{"bootstrap_timeout": "2 seconds"}')});
my $options = json($moto->options);
$node->safe_psql('postgres', "SELECT agentvm.set_provider(t, 'ec2', $options) FROM unnest('{thief,mixed}'::text[]) t");
set_ec2($node, 'mixed', $moto);
$node->safe_psql('postgres', q{INSERT INTO agentvm.provider_secret (team_id, provider, field, value_enc, key_id)
	SELECT 'thief', provider, field, value_enc, key_id FROM agentvm.provider_secret WHERE team_id = 'acme';
	UPDATE agentvm.provider_secret SET value_enc = (SELECT value_enc FROM agentvm.provider_secret WHERE team_id = 'mixed' AND field = 'access_key_id')
	WHERE team_id = 'mixed' AND field = 'secret_access_key'});
my $calls = $faults->count('RunInstances');
my ($thief, $mixed) = map { launch($node, $_) } qw(thief mixed);
my $good = launch($node, 'acme', 'ready');
await_state($node, $_, 'failed') for $thief, $mixed;
like(state_of($node, $thief), qr/^failed provider_error SecretUnavailable: could not decrypt the secret "access_key_id" of team "thief"/, 'a secret copied to another team does not decrypt');
like(state_of($node, $mixed), qr/^failed provider_error SecretUnavailable: could not decrypt the secret "secret_access_key" of team "mixed"/, 'nor does one copied to another field');
fails_with($node, "SELECT agentvm.check_provider('thief')", 'AV010', qr/could not decrypt/, 'check_provider() says so');
is($faults->count('RunInstances'), $calls + 1, 'nobody but the rightful owner has called the cloud');

# ---- where they could be read ----
my $tables = q{SELECT c.oid::regclass::text FROM pg_class c WHERE relnamespace = 'agentvm'::regnamespace AND relkind IN ('r', 'v')};
my $rows = sub {
	my ($role) = @_;
	my @readable = split /\n/, $node->safe_psql('postgres', "SET ROLE $role; $tables AND has_table_privilege(oid, 'SELECT') ORDER BY 1");
	return (scalar @readable, join "\n", map { $node->safe_psql('postgres', "SET ROLE $role; SELECT t::text FROM $_ t") } @readable);
};
foreach my $role (qw(member monitor admin postgres))
{
	my ($count, $text) = $rows->($role eq 'postgres' ? $node->safe_psql('postgres', 'SELECT current_user') : $role);
	cmp_ok($count, '>=', 2, "$role reads $count tables and views");
	like($text, qr/\Q$session\E/, 'with sessions in them') if $role ne 'monitor';
	nowhere($text, "and none of what was planted, role $role");
}
nowhere($node->safe_psql('postgres', q{SELECT a::text FROM pg_stat_activity a WHERE backend_type ~ 'agentvm'}), 'not in pg_stat_activity');
like($node->safe_psql('postgres', 'SELECT query FROM pg_stat_statements'), qr/agentvm\.set_provider/, 'pg_stat_statements has seen set_provider()');
nowhere($node->safe_psql('postgres', 'SELECT s::text FROM pg_stat_statements s'), 'but not what it was given');
my $dump = $node->basedir . '/dump.sql';
$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-f', $dump ], 'pg_dump');
like(slurp_file($dump), qr/\Q$session\E/, 'the dump has the sessions');
nowhere(slurp_file($dump), 'but none of the secrets in the clear');
$node->stop('fast');
my $log = log_text($node);
like($log, qr/DEBUG:/, 'the server log is at its wordiest');
nowhere($log, 'and does not have them');
unlike($log, qr/STATEMENT:.*set_provider/, 'nor any statement of a set_provider() that failed');
done_testing();
