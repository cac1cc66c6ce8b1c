# What a cloud echoes of keys is blanked out; rows of secrets are worth nothing elsewhere (where secrets could be read: 093_secrets_search.pl)
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;

my ($node, $faults, $moto) = ec2_node('main');
my $secrets = $moto->secrets;

# ---- a cloud that echoes them ----
$faults->set(action => 'RunInstances', mode => 'error', code => 'AuthFailure', n => 1,
	message => "your key $secrets->{access_key_id} with $secrets->{secret_access_key} is no good");
my $failed = launch($node, 'acme', 'failed');
is(state_of($node, $failed), 'failed invalid_credentials AuthFailure: your key *** with *** is no good', 'what the cloud echoes is blanked out');
$faults->set(action => 'GetCallerIdentity', mode => 'error', code => 'AuthFailure', n => 1, message => "no $secrets->{secret_access_key}");
fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV001', qr/no \*\*\*/, 'in errors, too');
log_lacks($node, $secrets->{secret_access_key}, 'nor is it in the log');

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
done_testing();
