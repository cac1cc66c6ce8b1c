# agentvm.key_file: who may read it, what it may hold, and that it is read anew when it has changed
use strict;
use warnings;
use AgentVM::Process;
use AgentVM::Test;
use MIME::Base64 qw(encode_base64);
use Test::More;

my $node = new_node('main');
my $keys = $node->basedir . '/own_keys';
my $secrets = q{'{"access_key_id": "AKIAPLANTEDPLANTED00", "secret_access_key": "planted"}'};
my $set = "SET log_statement = none; SELECT agentvm.set_provider('acme', 'ec2', '{}', $secrets)";
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");

sub key { return encode_base64($_[0] x ($_[1] // 32), '') }

sub write_keys
{
	my ($mode, @lines) = @_;
	unlink $keys;
	open my $file, '>', $keys or die $!;
	print $file map { "$_\n" } @lines;
	close $file;
	chmod $mode, $keys;
	return;
}

sub refused
{
	my ($name, $message) = @_;
	my ($code, undef, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$set");
	isnt($code, 0, "$name: refused");
	like($err, qr/AV010: .*$message/s, "$name: says why");
	unlike($err, qr/planted|\Q${\ key('a')}\E/i, "$name: without key or secret");
	is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.provider_secret'), 0, "$name: nothing is stored");
	return;
}

# without the setting: an error with a way out
$node->append_conf('postgresql.conf', "agentvm.key_file = ''\n");
$node->reload;
await($node, 'SHOW agentvm.key_file', '');
refused('no setting', 'key_file is not set.*HINT:  Create one with');

$node->append_conf('postgresql.conf', "agentvm.key_file = '$keys'\n");
$node->reload;
await($node, 'SHOW agentvm.key_file', $keys);
refused('no file', 'could not open|No such file');
foreach my $mode (0640, 0644, 0660, 0604, 0602)
{
	write_keys($mode, 'k1:' . key('a'));
	refused(sprintf('mode %04o', $mode), 'permission|mode|group|others');
}
my %malformed = (
	'nothing' => [],
	'no colon' => ['k1'],
	'no base64' => ['k1:%%%%'],
	'31 bytes' => ['k1:' . key('a', 31)],
	'33 bytes' => ['k1:' . key('a', 33)],
	'no id' => [':' . key('a')],
	'odd id' => ['k 1:' . key('a')],
	'twice the same id' => ['k1:' . key('a'), 'k1:' . key('b')]);
foreach my $name (sort keys %malformed)
{
	write_keys(0600, @{ $malformed{$name} });
	refused($name, 'key_file|key file');
}
unlink $keys;
mkdir $keys;
refused('a directory', 'regular file|directory');
rmdir $keys;

# a good one is taken at once; the first line encrypts
write_keys(0600, '# master keys', '', 'k2:' . key('b'), 'k1:' . key('a'));
psql_ok($node, $set, 'a good file');
is($node->safe_psql('postgres', 'SELECT string_agg(DISTINCT key_id, $$,$$) FROM agentvm.provider_secret'), 'k2', 'the first line encrypts');
write_keys(0400, 'k3:' . key('c'), 'k2:' . key('b'));
psql_ok($node, $set, 'a new key, read-only');
is($node->safe_psql('postgres', 'SELECT string_agg(DISTINCT key_id, $$,$$) FROM agentvm.provider_secret'), 'k3', 'it is used at once');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.provider_secret WHERE position('planted'::bytea IN value_enc) > 0"), 0, 'in the column it is not in the clear');

# a file that comes and goes while view health looks at it, once for each key that is needed
write_keys(0600, 'k1:' . key('a'));
rename $keys, "$keys.aside";
$node->safe_psql('postgres', "INSERT INTO agentvm.session (session_id, team_id, provider, next_check_at, runtime, key_id) SELECT gen_random_uuid(), 'acme', 'noop', NULL, true, 'k' || i FROM generate_series(1, 2000) i");
my $flicker = AgentVM::Process->new('flicker', 'perl', '-e', 'while (getppid == $ARGV[1]) { link "$ARGV[0].aside", $ARGV[0]; select undef, undef, undef, .003; unlink $ARGV[0]; select undef, undef, undef, .003 }', $keys, $$);
$flicker->start;
my %seen;
for my $try (1 .. 40)
{
	my ($code, $out, $err) = $node->psql('postgres', "SELECT ok FROM agentvm.health WHERE name = 'key_file'");
	$seen{ $code == 0 ? $out : $err }++;
	last if $code;
}
is(join(' ', sort keys %seen), 'f t', 'view health, while the key file comes and goes') or diag(explain(\%seen));
$flicker->stop;
done_testing();
