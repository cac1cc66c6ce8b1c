# What the gateway calls for the runtimes in the VMs: bootstrap, authenticate, heartbeat, heartbeat_batch, its own row
use strict;
use warnings;
use AgentVM::Test;
use Digest::SHA qw(hmac_sha256_hex sha256_hex);
use JSON::PP;
use MIME::Base64;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "agentvm.heartbeat_interval = 17\nagentvm.deadman_allowance = 700\nagentvm.deadline_grace = 70\n");
my ($key) = slurp_file($node->basedir . '/keys') =~ /^k1:(\S+)$/m;
my $gateway = make_role($node, 'gate', grants => ['agentvm_gateway']);
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
make_role($node, 'alice', teams => ['acme']);

# SQL literal of the hash of a token; the bootstrap token of a session; a call as the gateway makes it
sub hash { return "'\\x" . sha256_hex($_[0]) . "'"; }
sub token { my ($id, $attempt) = @_; return hmac_sha256_hex("$id:" . ($attempt // 1), decode_base64($key)); }
sub gate { return as_role($gateway, "SELECT agentvm.$_[0]"); }

sub launched
{
	my (@arguments) = @_;
	my $id = provision($node, 'acme', 'options => \'{"runtime": true}\'', @arguments);
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$id'", 't', name => 'a VM with a runtime is launched');
	return $id;
}

# ---- bootstrap ----
my $env = { SECRET_TOKEN => 'sesame-open', QUOTED => qq(a "b" \\ \n \$(rm) 'c') };
my $repos = [ { url => 'https://example.com/vault.git', ref => 'main', path => 'src' } ];
my $id = launched('env => ' . json($env), 'repos => ' . json($repos));
is($node->safe_psql('postgres', "SELECT state, attempt FROM agentvm.sessions WHERE session_id = '$id'"), 'provisioning|1', 'it is not ready before its runtime says so');
my $boot = 'bootstrap(' . hash(token($id)) . ', ' . hash('session token') . ", 'boot 1', '{\"hostname\": \"vm\"}')";
my $answer = decode_json(psql_ok($node, gate($boot), 'bootstrap'));
is($answer->{session_id}, $id, 'the answer names the session');
is_deeply($answer->{env}, $env, 'env is delivered as it was given');
is_deeply($answer->{repos}, $repos, 'repos, too');
is_deeply([ @$answer{qw(heartbeat_interval_s deadman_allowance_s deadline_grace_s files channel)} ], [ 17, 700, 70, [], '/v1/channel' ], 'with the settings');
is($node->safe_psql('postgres', "SELECT '$answer->{deadline}'::timestamptz = deadline_at FROM agentvm.sessions WHERE session_id = '$id'"), 't', 'and the deadline');
is($node->safe_psql('postgres', "SELECT state, ready_at IS NOT NULL, last_heartbeat_at FROM agentvm.sessions WHERE session_id = '$id'"), 'ready|t|', 'it is ready');

# a lost reply is no lockout; anybody else is turned away
is_deeply(decode_json($node->safe_psql('postgres', gate($boot))), $answer, 'the same call gets the same answer');
is(psql_ok($node, gate('bootstrap(' . hash(token($id)) . ', ' . hash('other token') . ", 'boot 1')")), '', 'another session token does not');
is(psql_ok($node, gate('bootstrap(' . hash(token($id)) . ', ' . hash('session token') . ", 'boot 2')")), '', 'another boot does not');
is(psql_ok($node, gate('bootstrap(' . hash('nothing') . ', ' . hash('x') . ", 'boot 1')")), '', 'an unknown token does not');
is(psql_ok($node, gate('bootstrap(' . hash(token($id, 2)) . ', ' . hash('x') . ", 'boot 1')")), '', 'nor does one of another attempt');
is(psql_ok($node, gate('bootstrap(' . hash('session token') . ', ' . hash('x') . ", 'boot 1')")), '', 'nor does a session token in its place');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session_token WHERE kind = 'session'"), 1, 'and nothing is stored for them');

# nothing of it in clear, in no table: not as text, not as bytes
my $dump = '';
run_log([ 'pg_dump', '-d', $node->connstr('postgres') ], '>', \$dump);
ok($dump =~ /COPY agentvm.session /, 'there is a dump');
for my $secret ('sesame-open', 'vault.git', token($id), 'session token')
{
	ok(index($dump, $secret) < 0 && index($dump, unpack('H*', $secret)) < 0, "'$secret' is not in it");
}
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session_event WHERE detail::text ~ 'sesame|vault'"), 0, 'nor in events');

# another session cannot take a token that is taken
my $second = launched();
is(psql_ok($node, gate('bootstrap(' . hash(token($second)) . ', ' . hash('session token') . ", 'boot 1')")), '', 'a session token of another session is refused');
is($node->safe_psql('postgres', "SELECT state, boot_id FROM agentvm.session WHERE session_id = '$second'"), 'provisioning|', 'and changes nothing');
is(psql_ok($node, gate('bootstrap(' . hash(token($second)) . ', ' . hash(token($second)) . ", 'boot 1')")), '', 'nor is the bootstrap token one');
is(psql_ok($node, "BEGIN; UPDATE agentvm.session SET launched_at = now() - bootstrap_timeout WHERE session_id = '$second';\n" . gate('bootstrap(' . hash(token($second)) . ', ' . hash('second') . ", 'b')") . ';ROLLBACK'),
	'', 'after the bootstrap timeout it is worth nothing');
like(psql_ok($node, gate('bootstrap(' . hash(token($second)) . ', ' . hash('second') . ", 'b', NULL)")), qr/"env": \{\}.*"repos": \[\]/, 'before that it is; without env and repos they are empty');

# other tooling has left the payload without a key
my $keyless = launched('env => ' . json($env));
$node->safe_psql('postgres', "UPDATE agentvm.session SET key_id = NULL WHERE session_id = '$keyless'");
fails_with($node, gate('bootstrap(' . hash(token($keyless)) . ', ' . hash('keyless') . ", 'b')"), 'AV010', qr/has no key ""/, 'a payload without a key');
$node->safe_psql('postgres', "DELETE FROM agentvm.session WHERE session_id = '$keyless'");

# arguments
for (['NULL, ?', '22004'], ['?, NULL', '22004'], ["'', ?", '22023'], ["'\\x00', ?", '22023'], ["?, '\\x" . '00' x 33 . "'", '22023'], [ "?, '\\x" . '00' x 31 . "'", '22023'])
{
	my ($arguments, $state) = @$_;
	fails_with($node, gate('bootstrap(' . $arguments =~ s/\?/hash('x')/er . ", 'b')"), $state, qr/token_sha256 must/);
}
my $two = hash('x') . ', ' . hash('y');
fails_with($node, gate("bootstrap($two, NULL)"), '22004', qr/boot_id/);
fails_with($node, gate("bootstrap($two, '')"), '22023', qr/boot_id/);
fails_with($node, gate("bootstrap($two, repeat('x', 129))"), '22023', qr/boot_id/);
fails_with($node, gate("bootstrap($two, E'\\n')"), '22023', qr/boot_id/);
fails_with($node, gate("bootstrap($two, 'b', '[]')"), '22023', qr/info/);
fails_with($node, gate("bootstrap($two, 'b', jsonb_build_object('a', repeat('x', 65536)))"), 'AV012', qr/info/);
for my $function ('authenticate', 'heartbeat')
{
	fails_with($node, gate("$function(NULL)"), '22004');
	fails_with($node, gate("$function('\\x0102')"), '22023');
	is(psql_ok($node, gate("$function(" . hash('nothing') . ')')), '', "$function: unknown");
	is(psql_ok($node, gate("$function(" . hash(token($id)) . ')')), '', "$function: a bootstrap token is none");
}

# ---- authenticate, heartbeat ----
is(psql_ok($node, gate('authenticate(' . hash('session token') . ')')), $id, 'authenticate');
is($node->safe_psql('postgres', "SELECT count(last_heartbeat_at) FROM agentvm.session_heartbeat"), 0, 'is no heartbeat');
is(psql_ok($node, as_role($gateway, 'SET TimeZone = UTC; SELECT extract(epoch FROM agentvm.heartbeat(' . hash('session token') . '))')),
	$node->safe_psql('postgres', "SELECT extract(epoch FROM deadline_at) FROM agentvm.sessions WHERE session_id = '$id'"), 'heartbeat answers with the deadline');
my $extended = $node->safe_psql('postgres', "SELECT agentvm.extend('$id', '1 hour')");
is(psql_ok($node, gate('heartbeat(' . hash('session token') . ')')), $extended, 'the one in force after extend()');
is($node->safe_psql('postgres', "SELECT now() - last_heartbeat_at < '1 minute' FROM agentvm.sessions WHERE session_id = '$id'"), 't', 'the beat is seen');

# ---- heartbeat_batch ----
sub batch { my ($ids, $seen) = @_; return gate("heartbeat_batch($ids, $seen)"); }
sub last_beat { return $node->safe_psql('postgres', "SELECT last_heartbeat_at FROM agentvm.session_heartbeat WHERE session_id = '$_[0]'"); }
fails_with($node, batch('NULL', "'{}'"), '22004');
fails_with($node, batch("'{}'", 'NULL'), '22004');
fails_with($node, batch("'{$id}'", "'{}'"), '2202E');
fails_with($node, batch("'{{$id},{$id}}'", 'ARRAY[now(), now()]'), '2202E');
fails_with($node, batch('array_fill(gen_random_uuid(), ARRAY[10001])', 'array_fill(now(), ARRAY[10001])'), 'AV012', qr/10001 heartbeats/);
is(psql_ok($node, as_role($gateway, "SELECT count(*) FROM agentvm.heartbeat_batch((SELECT array_agg(gen_random_uuid()) FROM generate_series(1, 10000)), array_fill(now(), ARRAY[10000]))")), 10000, '10000 are taken; unknown ids are gone');
is(psql_ok($node, batch("'{}'", "'{}'")), '', 'an empty batch');
$node->safe_psql('postgres', 'UPDATE agentvm.session_heartbeat SET last_heartbeat_at = NULL');
is(psql_ok($node, batch("ARRAY['$second', NULL, '$id', '$id']::uuid[]", "ARRAY[now() - interval '10 s', now(), now() - interval '30 s', now() - interval '20 s']")), '', 'unsorted, with a NULL and twice the same id');
is($node->safe_psql('postgres', "SELECT string_agg(round(extract(epoch FROM now() - last_heartbeat_at) / 10)::text, ' ' ORDER BY session_id = '$id') FROM agentvm.session_heartbeat"), '1 2', 'the latest counts');
my $before = last_beat($id);
psql_ok($node, batch("'{$id}'", "ARRAY[now() - interval '1 hour']"), 'an older beat');
is(last_beat($id), $before, 'takes nothing back');
psql_ok($node, batch("'{$id}'", "'{-infinity}'"), 'one of -infinity');
psql_ok($node, "UPDATE agentvm.session_heartbeat SET last_heartbeat_at = NULL WHERE session_id = '$second'", 'where there was none');
psql_ok($node, batch("'{$second}'", "'{-infinity}'"), 'either');
is(last_beat($second), '', 'is not stored');
psql_ok($node, batch("'{$id, $second}'", "ARRAY[now() + interval '1 hour', 'infinity']"), 'beats of the future');
is($node->safe_psql('postgres', 'SELECT bool_and(last_heartbeat_at <= clock_timestamp() AND last_heartbeat_at > clock_timestamp() - interval \'20 s\') FROM agentvm.session_heartbeat'), 't', 'are of now');
psql_ok($node, "UPDATE agentvm.session_heartbeat SET last_heartbeat_at = NULL", 'none');
psql_ok($node, batch("'{$id}'", "'{NULL}'"), 'NULL');
is($node->safe_psql('postgres', "SELECT now() - last_heartbeat_at < '1 minute' FROM agentvm.session_heartbeat WHERE session_id = '$id'"), 't', 'is now, too');

# ---- ending: the VM may run on and beat, and is told ----
my $both = "SELECT string_agg(g::text, ' ') FROM agentvm.heartbeat_batch('{$second, $id}', array_fill(now(), ARRAY[2])) g";
is($node->safe_psql('postgres', "BEGIN; DO \$\$ BEGIN PERFORM agentvm.terminate('$id'); END \$\$; $both; ROLLBACK"), $id, 'a batch names who is terminating');
is($node->safe_psql('postgres', $both), '', 'and nobody else');

# ---- ended ----
psql_ok($node, "SELECT agentvm.terminate('$id')", 'terminate');
await_state($node, $id, 'terminated');
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session_ending'), 0, 'nobody is ending any more');
fails_with($node, gate("$_(" . hash('session token') . ')'), 'AV006', qr/has ended/, "$_ of an ended session") for 'authenticate', 'heartbeat';
fails_with($node, gate($boot), 'AV006', qr/has ended/, 'bootstrap of an ended session');
is(join(' ', sort split(/\s+/, psql_ok($node, batch("'{$second, $id, $id, 00000000-0000-7000-8000-000000000000}'", 'array_fill(now(), ARRAY[4])')))), "00000000-0000-7000-8000-000000000000 $id", 'a batch names those that are gone, once');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session_heartbeat WHERE session_id = '$id'"), 0, 'its heartbeat row is gone');
is($node->safe_psql('postgres', "SELECT last_heartbeat_at IS NOT NULL FROM agentvm.sessions WHERE session_id = '$id'"), 't', 'the last beat is remembered');
is($node->safe_psql('postgres', "SELECT payload_enc IS NULL FROM agentvm.session WHERE session_id = '$id'"), 't', 'env and repos are not kept any longer');
$id = launched();
psql_ok($node, "SELECT agentvm.terminate('$id')", 'terminate before bootstrap');
fails_with($node, gate('bootstrap(' . hash(token($id)) . ', ' . hash('third') . ", 'b')"), 'AV006', undef, 'a session that never was ready');

# ---- a runtime that does not report in time ----
$node->safe_psql('postgres', "SELECT agentvm.create_profile('hasty', 'noop', runtime => true, bootstrap_timeout => '1 second')");
$id = provision($node, 'acme', "profile => 'hasty'");
await_state($node, $id, 'failed');
like(state_of($node, $id), qr/^failed bootstrap_timeout/, 'the bootstrap timeout ends it');
fails_with($node, "SELECT agentvm.wait('$id')", 'AV004', qr/bootstrap_timeout/);

# ---- heartbeats stay HOT: batches of a fifth, as of a fleet that beats at all times ----
$node->safe_psql('postgres', <<'SQL');
INSERT INTO agentvm.session_heartbeat (session_id) SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid FROM generate_series(1, 5000) i;
SELECT pg_stat_reset();
SQL
my $beats = join("\n", map { my $n = $_; "SELECT count(*) FROM agentvm.heartbeat_batch((SELECT array_agg(('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid) FROM generate_series(1, 5000) i WHERE i % 5 = $n % 5), array_fill(now(), ARRAY[1000]));" } 1 .. 20);
psql_ok($node, "SET ROLE $gateway;\n$beats", '20 batches');
await($node, "SELECT n_tup_upd >= 20000 AND n_tup_hot_upd > 0.98 * n_tup_upd FROM pg_stat_user_tables WHERE relname = 'session_heartbeat'", 't', name => '98% of the updates are HOT')
  || diag($node->safe_psql('postgres', "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'session_heartbeat'"));

# ---- the gateway's own row ----
my $empty = "SELECT agentvm.heartbeat_batch('{}', '{}')";
sub gateways { return $node->safe_psql('postgres', "SELECT string_agg(concat_ws(' ', gateway_id, last_report_at > now() - interval '1 minute', round(extract(epoch FROM now() - listening_since) / 100)), ', ' ORDER BY gateway_id) FROM agentvm.gateway"); }
psql_ok($node, as_role($gateway, "INSERT INTO agentvm.gateway (gateway_id) VALUES ('g1'), ('g2')"), 'gateways register themselves');
psql_ok($node, as_role($gateway, "SET application_name = 'elsewhere'; $empty"), 'a client of another name');
is(gateways(), 'g1, g2', 'reports for nobody');
psql_ok($node, as_role($gateway, "SET application_name = 'g1'; $empty"), 'a report');
is(gateways(), 'g1 t 0, g2', 'is kept');
$node->safe_psql('postgres', "UPDATE agentvm.gateway SET listening_since = now() - interval '500 s', last_report_at = now() - interval '20 s' WHERE gateway_id = 'g1'");
psql_ok($node, as_role($gateway, "SET application_name = 'g2'; $empty"), 'another gateway');
is(gateways(), 'g1 t 5, g2 t 5', 'takes over the period in which some gateway listens');
$node->safe_psql('postgres', "UPDATE agentvm.gateway SET last_report_at = now() - interval '300 s'");
psql_ok($node, as_role($gateway, "SET application_name = 'g1'; $empty"), 'after a gap');
is(gateways(), 'g1 t 0, g2 f 5', 'the period begins anew');

done_testing();
