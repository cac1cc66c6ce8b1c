# rotate_keys() beside traffic, killed and called again; the old key taken away; keys that are missing or wrong
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Test;
use IPC::Run qw(start);
use JSON::PP;
use MIME::Base64 qw(encode_base64);
use PostgreSQL::Test::Utils;
use Test::More;

my $teams = 300;
my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.bootstrap_timeout = '1h'\n");
my $file = $node->basedir . '/keys';
my %key = (slurp_file($file) =~ /^(k1):(.*)$/m, map { $_ => encode_base64($_ x 16, '') } qw(k2 k3 k9));

# The key file with these keys in this order, swapped in as an editor does it
sub write_keys
{
	my ($path, @keys) = @_;
	open(my $new, '>', "$path.new") or die $!;
	print $new map { /:/ ? "$_\n" : "$_:$key{$_}\n" } @keys;
	close $new;
	chmod 0600, "$path.new";
	rename "$path.new", $path or die $!;
	return;
}

# rotate_keys() until nothing is left; how much it was, and what the last call has said
sub rotate
{
	my (%opt) = @_;
	my ($total, $said) = (0);
	while (1)
	{
		my ($code, $count, $error) = $node->psql($opt{dbname} // 'postgres', "SET lock_timeout = '20s'; SELECT agentvm.rotate_keys()");
		die $error if $code;
		($total, $said) = ($total + $count, $error);
		return ($total, $said) if $count == 0;
	}
}

sub health { return $node->safe_psql($_[0] // 'postgres', "SELECT ok, detail FROM agentvm.health WHERE name = 'keys'"); }
sub bootstrap { my ($token, $name) = @_; return decode_json(as_gateway($node, 'SELECT agentvm.bootstrap(' . bytea_hash($token) . ', ' . bytea_hash($name) . ", 'boot')")); }

# ---- before: secrets of many teams, a session that is ready, one whose launch is not answered yet ----
my $secrets = q{'{"access_key_id": "AKIAEXAMPLE", "secret_access_key": "example"}'};
$node->safe_psql('postgres', "SET log_statement = none; SELECT agentvm.create_team('t' || n, 'ec2'), agentvm.set_provider('t' || n, 'ec2', '{}', $secrets) FROM generate_series(1, $teams) n; SELECT agentvm.create_team('noop')");
my @env = (q{env => '{"A": "b"}'});
my $ready = provision($node, 'acme', @env);
my $ready_token = bootstrap_token($moto, await_vm($node, $ready));
is_deeply(bootstrap($ready_token, 'ready')->{env}, { A => 'b' }, 'a session is ready');
$faults->set(mode => 'throttle', action => 'RunInstances');
my $launching = provision($node, 'acme', @env);
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$launching' AND kind = 'provider_call'", 't', name => 'another one is in the middle of its launch');
is(health(), 't|no key but the first one is needed', 'health has nothing to tell');
is((rotate())[0], 0, 'nothing to rotate');

# ---- a new key; killed in the middle, nothing is half done ----
write_keys($file, 'k2', 'k1');
like(health(), qr/^t\|keys that are needed beside the first one: "k1": 60\d provider secrets, env and repos of 2 sessions, 1 launch under way \(until /, 'health names the old key');
my $old = "SELECT count(*) FROM agentvm.provider_secret WHERE key_id = 'k1'";
my $before = $node->safe_psql('postgres', $old);
my ($lock, $victim) = map { AgentVM::Client->new($node) } 1, 2;
$lock->run('BEGIN; LOCK TABLE agentvm.session IN EXCLUSIVE MODE');
$victim->send('SELECT agentvm.rotate_keys()');
await($node, 'SELECT wait_event_type FROM pg_stat_activity WHERE pid = ' . $victim->pid, 'Lock', name => 'a rotation has done the secrets');
$node->safe_psql('postgres', 'SELECT pg_terminate_backend(' . $victim->pid . ')');
await($node, 'SELECT count(*) FROM pg_stat_activity WHERE pid = ' . $victim->pid, 0, name => 'and is killed before the sessions');
is($node->safe_psql('postgres', $old), $before, 'it has left nothing behind');
$lock->run('COMMIT');

# locks of others are waited for by nobody, and told of
$lock->run("BEGIN; SELECT FROM agentvm.provider_secret WHERE team_id = 't1' FOR UPDATE; SELECT FROM agentvm.session WHERE session_id = '$ready' FOR UPDATE");
my ($count, $said) = rotate();
is($count, $before - 1, 'what others have locked is passed by');
like($said, qr/WARNING:  3 rows are locked by other transactions/, 'with a warning');
$lock->run('COMMIT');

# ---- beside traffic ----
write_keys($file, 'k3', 'k2', 'k1');
my $traffic = $node->basedir . '/traffic.sql';
append_to_file($traffic, <<"SQL");
SET log_statement = none;
SET client_min_messages = warning;
SELECT agentvm.set_provider('t' || 1 + floor(random() * $teams)::int, 'ec2', '{}', $secrets);
SELECT agentvm.provision('noop', env => '{"A": "b"}', options => '{"runtime": true}');
DO \$\$
DECLARE
	answer jsonb;
BEGIN
	SELECT agentvm.bootstrap(token_sha256, sha256(session_id::text::bytea), 'boot') INTO answer FROM (SELECT t.token_sha256, session_id FROM agentvm.session_token t JOIN agentvm.session s USING (session_id)
		WHERE team_id = 'noop' AND kind = 'bootstrap' AND state = 'provisioning' LIMIT 1 FOR UPDATE OF s SKIP LOCKED) t;
	ASSERT answer IS NULL OR answer -> 'env' ->> 'A' = 'b', answer;
END
\$\$;
SQL
my $stop = $node->basedir . '/stop';
my @errors = ('') x 3;
my @callers = map { start([ 'bash', '-c', 'until [ -e "$1" ]; do psql -Xq -o /dev/null -d "$2" -f "$3"; done', 'loop', $stop, $node->connstr('postgres'), $traffic ], '<', \undef, '2>', \$errors[$_]) } 0 .. $#errors;
await($node, "SELECT count(*) > 10 FROM agentvm.sessions WHERE team_id = 'noop' AND state = 'ready'");
($count, $said) = rotate();
cmp_ok($count, '>', 100, 'secrets are rotated beside traffic');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.provider_secret WHERE key_id <> 'k3'"), 0, 'all of them');
await($node, "SELECT count(*) > 30 FROM agentvm.sessions WHERE team_id = 'noop' AND state = 'ready'");
append_to_file($stop, '');
$_->finish for @callers;
is(join('', @errors), '', 'which met no error');

# ---- what is left is the launch under way, with the key that its token is made of ----
($count, $said) = rotate();
like($said, qr/NOTICE:  key "k1" is still needed: 1 launch under way \(until [^)]+ at the latest\)\n.*HINT:  Launches under way keep their key/s, 'told by a notice');
like(health(), qr/^t\|keys that are needed beside the first one: "k1": 1 launch under way/, 'and by health');
is($node->safe_psql('postgres', "SELECT key_id, payload_key_id FROM agentvm.session WHERE session_id = '$launching'"), 'k1|k3', 'its env is rotated, its token not');

# without that key the launch waits, and goes on when it is back
write_keys($file, 'k3');
$faults->clear;
hurry_until($node, "SELECT state, detail FROM agentvm.sessions WHERE session_id = '$launching'", qq{provisioning|SecretUnavailable: key file "$file" has no key "k1"}, name => 'without the key of its token it waits');
like(health(), qr/^f\|keys that are needed and that the key file lacks: "k1": 1 launch under way/, 'health says what is missing');
write_keys($file, 'k3', 'k1');
hurry_until($node, "SELECT vm_id IS NOT NULL AND running FROM agentvm.session WHERE session_id = '$launching'", 't', name => 'with it, it goes on');
like((rotate())[1], qr/^$/, 'then nothing is left to tell');
is(health(), 't|no key but the first one is needed', 'and no other key is needed');

# ---- the old keys are gone: everything works ----
write_keys($file, 'k3');
is_deeply(bootstrap(bootstrap_token($moto, column($node, $launching, 'vm_id')), 'launching')->{env}, { A => 'b' }, 'the session in mid-launch bootstraps');
is_deeply(bootstrap($ready_token, 'ready')->{env}, { A => 'b' }, 'the ready one gets its answer again');
launch($node, 'acme', 'ready');
like($node->safe_psql('postgres', "SELECT agentvm.check_provider('acme')"), qr/"ok": true/, "the team's credentials work");
$node->safe_psql('postgres', "SELECT agentvm.terminate('$ready')");
hurry_to($node, $ready, 'terminated');

# ---- a key that is missing for one team, whose sessions wait, while those of another come and go ----
ec2_team($node, 'other', $moto);
write_keys($file, 'k2', 'k3');
set_ec2($node, 'acme', $moto);
write_keys($file, 'k3');
my $waiting = launch($node, 'acme');
$node->safe_psql('postgres', "SELECT agentvm.terminate('$launching')");
hurry_until($node, "SELECT string_agg(DISTINCT state, ' ' ORDER BY state) FROM agentvm.session WHERE session_id IN ('$waiting', '$launching') AND retries > 2", 'provisioning terminating', name => 'sessions whose credentials do not decrypt are tried again');
like(state_of($node, $waiting), qr/^provisioning SecretUnavailable: could not decrypt the secret "access_key_id" of team "acme" for "ec2": The key file has no key "k2"/, 'the session says why');
my $other = launch($node, 'other', 'ready');
$node->safe_psql('postgres', "SELECT agentvm.terminate('$other')");
hurry_to($node, $other, 'terminated');
fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV010', qr/could not decrypt.*The key file has no key "k2"/s, 'so does check_provider()');
($count, $said) = rotate();
like($said, qr/^[^\n]*NOTICE:  key "k2" is still needed: 2 provider secrets\nHINT:  The key file lacks it: put it back/, 'and rotate_keys()');
like(health(), qr/^f\|keys that are needed and that the key file lacks: "k2": 2 provider secrets/, 'and health');

# the same id with other bytes
write_keys($file, 'k3', "k2:$key{k9}");
fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV010', qr/could not decrypt the secret "access_key_id" of team "acme" for "ec2".*The key "k2" in the key file is not the one/s, 'a wrong key is told of');
(my $code, $count, $said) = $node->psql('postgres', 'SELECT agentvm.rotate_keys()');
is("$code $count", '0 0', 'rotate_keys() leaves it alone');
like($said, qr/WARNING:  could not decrypt the secret "access_key_id" of team "acme".*WARNING:  could not decrypt the secret "secret_access_key".*NOTICE:  key "k2" is still needed/s, 'and says so');
unlike($said, qr/\Q$_\E/, 'without a key') for values %key;

# no usable file at all; another one by ALTER SYSTEM
for (['gone', sub { unlink $file }, 'could not open'], ['empty', sub { write_keys($file) }, 'contains no key'], ['open to all', sub { write_keys($file, 'k3'); chmod 0644, $file }, 'group or world access'])
{
	my ($what, $do, $why) = @$_;
	$do->();
	fails_with($node, 'SELECT agentvm.rotate_keys()', 'AV010', qr/$why/, "key file $what: AV010");
	fails_with($node, "SELECT agentvm.provision('noop', options => '{\"runtime\": true}')", 'AV010', qr/$why/, 'also of provision() with a runtime');
	like($node->safe_psql('postgres', "SELECT ok, detail FROM agentvm.health WHERE name = 'key_file'"), qr/^f\|.*$why/, 'health says why');
	await_state($node, provision($node, 'noop'), 'ready');
}
write_keys("$file.moved", 'k3', 'k2');
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.key_file = '$file.moved'");
$node->reload;
hurry_to($node, $waiting, 'ready');
hurry_to($node, $launching, 'terminated');
rotate();
is(health(), 't|no key but the first one is needed', 'all is well again');

# ---- a dump, restored where the key file is another one ----
$node->safe_psql('postgres', 'CREATE DATABASE restored');
command_ok([ 'pg_dump', '-f', $node->basedir . '/dump', '-d', $node->connstr('postgres') ], 'pg_dump');
command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-o', '/dev/null', '-d', $node->connstr('restored'), '-f', $node->basedir . '/dump' ], 'restore');
write_keys("$file.moved", 'k9');
my @there = (dbname => 'restored');
fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV010', qr/no key "k3"/, 'what was encrypted elsewhere does not decrypt', @there);
like(health('restored'), qr/^f\|keys that are needed and that the key file lacks: "k3": 60\d provider secrets/, 'health says so');
is((rotate(@there))[0], 0, 'nothing can be rotated');
psql_ok($node, "SET log_statement = none; SELECT agentvm.set_provider('t1', 'ec2', '{}', $secrets)", 'new secrets can be set', @there);
write_keys("$file.moved", 'k9', 'k3');
cmp_ok((rotate(@there))[0], '>=', 600, 'with the old key beside its own, all is rotated');
is($node->safe_psql('restored', 'SELECT string_agg(DISTINCT key_id, $$ $$) FROM agentvm.provider_secret'), 'k9', 'to its own');

$node->stop('fast');
log_lacks($node, $_, 'no key in the log') for values %key;
done_testing();
