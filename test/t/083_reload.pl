# Every setting: what the README says of it is so, an invalid value is refused and the old one stays, and a reload takes
# effect in the dispatcher that runs. (How many dispatchers and where: 028; provider libraries: 027; what provision() asks of
# the settings: 043; key files: 044.)
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use File::Basename qw(dirname);
use MIME::Base64 qw(decode_base64);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

$ENV{AWS_ACCESS_KEY_ID} = 'AKIAIOSFODNN7ENVIRON';
$ENV{AWS_SECRET_ACCESS_KEY} = 'environment';
my ($faults, $elsewhere) = map { AgentVM::Faults->new } 1, 2;
my $node = new_node('main', moto => $faults);
my $conf = $node->data_dir . '/postgresql.auto.conf';
sub sql { return $node->safe_psql('postgres', $_[0]); }

# ---- README, context, default ----
my %unit = (ms => 1, s => 1000, min => 60000, h => 3600000, d => 86400000, kB => 1, MB => 1024);
my %documented = slurp_file(dirname(__FILE__) . '/../../README.md') =~ /^\| `(agentvm\.\w+)` \| *(\S*?)`? *\|/mg;
my %settings = map { my ($name, @rest) = split /\|/, $_, -1; ($name => \@rest) }
  split /\n/, sql("SELECT name, context, vartype, coalesce(unit, ''), boot_val, coalesce(min_val, '') FROM pg_settings WHERE name ~ '^agentvm\\.'");
is(join(' ', sort keys %documented), join(' ', sort keys %settings), 'the README has every setting');
foreach my $name (sort keys %settings)
{
	my ($context, undef, $unit, $default) = @{ $settings{$name} };
	my ($number, $its_unit) = ($documented{$name} // '') =~ /^(\d+)([A-Za-z]+)$/;
	is($context, 'sighup', "$name can be reloaded");
	is($number ? $number * $unit{$its_unit} : ($documented{$name} // '') =~ s/`//gr, $unit ? $default * $unit{$unit} : $default, 'its default is that of the README');
}
fails_with($node, "SET $_ = DEFAULT", '55P02', undef, "not by a user: $_") for 'agentvm.databases', 'agentvm.key_file', 'agentvm.allow_insecure_endpoints';

# ---- invalid values ----
my %invalid = (
	'agentvm.databases' => "a,,b", 'agentvm.provider_libraries' => '"a', 'agentvm.image_directories' => '/a, b', 'agentvm.gateway_url' => 'gateway.example', 'agentvm.aws_endpoint_url' => 'https://a b',
	map { $_ => $settings{$_}[1] eq 'bool' ? 'maybe' : $settings{$_}[4] - 1 } grep { $settings{$_}[1] ne 'string' } keys %settings);
my $values = "SELECT string_agg(name || '=' || setting, ' ' ORDER BY name) FROM pg_settings WHERE name ~ '^agentvm\\.'";
my $before = sql($values);
my $pid = sql('SELECT pid FROM agentvm.stat_dispatcher');
fails_with($node, "ALTER SYSTEM SET $_ = '$invalid{$_}'", '22023', qr/parameter "$_"/, "$_ = '$invalid{$_}' is refused") for sort keys %invalid;
my $offset = -s $node->logfile;
append_to_file($conf, join('', map { "$_ = '$invalid{$_}'\n" } keys %invalid));
$node->reload;
my $end = time + 30;
sleep 0.05 until slurp_file($node->logfile, $offset) =~ /contains errors/ || time > $end;
my $log = slurp_file($node->logfile, $offset);
is(join(' ', grep { $log !~ /LOG:  .*parameter "$_"/ } sort keys %invalid), '', 'in a file they are told about in the log, one by one');
is(sql($values), $before, 'and the old values stay');
sql("ALTER SYSTEM RESET $_") for keys %invalid;

# ---- in the dispatcher ----
# Set one, and wait until the postmaster has it: all processes are told by then
sub set
{
	my ($name, $value) = @_;
	sql("ALTER SYSTEM SET agentvm.$name = '$value'");
	$node->reload;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return await($node, "SHOW agentvm.$name", $value, name => "$name = '$value'");
}
sub dispatcher { return sql("SELECT $_[0] FROM agentvm.stat_dispatcher"); }
sub forget { $faults->reset; sql("UPDATE agentvm.session SET next_check_at = 'infinity', lease = NULL, lease_pid = NULL, lease_start = NULL WHERE ended_at IS NULL"); return; }
sub slow { $faults->set(mode => 'canned', ms => $_[0], action => 'RunInstances'); return; }
sub launched { my ($name) = @_; my $session = launch($node, 'acme'); local $Test::Builder::Level = $Test::Builder::Level + 1; await($node, "SELECT launched_at IS NOT NULL FROM agentvm.session WHERE session_id = '$session'", 't', name => $name); return $session; }
sql("SELECT agentvm.create_profile('plain', 'ec2', runtime => false), agentvm.create_profile('runtime', 'ec2', runtime => true), agentvm.create_team('noop')");
ec2_team($node, 'acme', $faults);

# how much at once: more is taken as soon as more is allowed
sub in_flight { my ($count) = @_; local $Test::Builder::Level = $Test::Builder::Level + 1; return await($node, 'SELECT in_flight FROM agentvm.stat_dispatcher', $count, name => "$count in flight"); }
foreach my $name (qw(max_in_flight max_in_flight_per_team))
{
	set($name, 2);
	slow(3000);
	sql("SELECT agentvm.provision('acme', profile => 'plain') FROM generate_series(1, 5)");
	in_flight(2);
	sleep 0.3;
	in_flight(2);
	set($name, 4);
	in_flight(4);
	set($name, 100);
	in_flight(5);
	in_flight(0);
}
forget();

# how many in one claim: a dozen sessions take a dozen passes, or one or two
sub passes_for_dozen
{
	my $passes = dispatcher('passes');
	sql("SELECT agentvm.provision('noop') FROM generate_series(1, 12)");
	await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'provisioning' AND team_id = 'noop'", 0, name => 'a dozen sessions');
	return dispatcher('passes') - $passes;
}
set('sweep_interval', '1h');
set('batch_size', 1);
cmp_ok(passes_for_dozen(), '>=', 12, 'one by one');
set('batch_size', 50);
cmp_ok(passes_for_dozen(), '<', 8, 'all at once');

# how long it sleeps, once all there was to do has been done
my $passes;
$end = time + $PostgreSQL::Test::Utils::timeout_default;
do { $passes = dispatcher('passes'); sleep 0.7; } until dispatcher('passes') == $passes || time > $end;
is(dispatcher('passes'), $passes, 'an hour of sleep');
set('sweep_interval', '100ms');
await($node, "SELECT passes > $passes + 5 FROM agentvm.stat_dispatcher", 't', name => 'ends by a reload');
sql('ALTER SYSTEM RESET agentvm.sweep_interval');
$node->reload;

# leases, and with them how long a call may take
foreach my $lease ('2min', '10s')
{
	set('lease', $lease);
	slow(1000);
	my $session = launch($node, 'acme');
	await($node, "SELECT extract(epoch FROM next_check_at - now()) BETWEEN " . ($lease eq '10s' ? '5 AND 10' : '100 AND 120') . " FROM agentvm.session WHERE session_id = '$session' AND lease IS NOT NULL", 't', name => "a lease of $lease");
	forget();
}
set('lease', '6s');
slow(20000);
my $session = launch($node, 'acme');
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$session' AND kind = 'provider_call' AND (detail ->> 'ms')::int BETWEEN 3900 AND 5500", 't', name => 'a call is given up at two thirds of it');
sql('ALTER SYSTEM RESET agentvm.lease');
$node->reload;
forget();

# where the cloud is, and whether one may talk to it
set('aws_endpoint_url', $elsewhere->endpoint);
launched('a launch elsewhere');
is(join(' ', $faults->count('RunInstances'), $elsewhere->count('RunInstances')), '0 1', 'went there');
set('aws_endpoint_url', $faults->endpoint);
launched('and back');
is(join(' ', $faults->count('RunInstances'), $elsewhere->count('RunInstances')), '1 1', 'went back');
set('allow_insecure_endpoints', 'off');
$session = launch($node, 'acme');
await($node, "SELECT detail ~ 'without TLS' FROM agentvm.sessions WHERE session_id = '$session'", 't', name => 'no plain http is spoken any more');
is($faults->count('RunInstances'), 1, 'and nothing sent');
my $boots = "BEGIN; SELECT agentvm.provision('acme', profile => 'runtime'); ROLLBACK";
set('gateway_url', 'http://gateway.example');
fails_with($node, $boots, 'AV010', qr/gateway_url is without TLS.*HINT/s, 'nor is any VM told to');
set('gateway_url', 'https://gateway.example');
psql_ok($node, $boots, 'but with TLS');
set('allow_insecure_endpoints', 'on');
set('gateway_url', 'http://gateway.example');
psql_ok($node, $boots, 'until it is allowed again');
hurry_until($node, "SELECT launched_at IS NOT NULL FROM agentvm.session WHERE session_id = '$session'", 't', name => 'and launches go on');

# keys and credentials
my $keys = $node->basedir . '/keys';
append_to_file("$keys.other", 'k1:' . MIME::Base64::encode_base64('x' x 32, '') . "\n");
chmod 0600, "$keys.other";
set('key_file', "$keys.other");
$session = launch($node, 'acme');
await($node, "SELECT detail ~ '^SecretUnavailable' FROM agentvm.sessions WHERE session_id = '$session'", 't', name => 'with another key file the credentials cannot be read');
set('key_file', $keys);
hurry_until($node, "SELECT launched_at IS NOT NULL FROM agentvm.session WHERE session_id = '$session'", 't', name => 'with the right one they can');
sql("SELECT agentvm.create_team('bare', 'ec2'); SELECT agentvm.set_provider('bare', 'ec2', " . json($faults->options) . ')');
set('environment_credentials', 'on');
$session = launch($node, 'bare');
await($node, "SELECT launched_at IS NOT NULL FROM agentvm.session WHERE session_id = '$session'", 't', name => "the environment's credentials are used");
set('environment_credentials', 'off');
fails_with($node, "SELECT agentvm.provision('bare', profile => 'plain')", 'AV010', qr/credentials/, 'and no more');

# what a VM is told
sub boot
{
	my $before = $faults->count('RunInstances');
	launch($node, 'acme', undef, "profile => 'runtime'");
	my $end = time + 30;
	sleep 0.02 until $faults->requests('RunInstances') > $before || time > $end;
	my $script = decode_base64(($faults->requests('RunInstances'))[-1]{args}{UserData});
	my ($payload) = $script =~ /^payload='(.*)'$/m;
	return decode_base64($payload);
}
my $ca = $node->basedir . '/ca.pem';
append_to_file($ca, "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n");
set('gateway_url', 'https://other.example');
set('gateway_ca_file', $ca);
set('heartbeat_interval', '17s');
set('deadline_grace', '71s');
set('deadman_allowance', '177s');
my $told = boot();
like($told, qr/^\Q$_\E$/m, "a VM is told $_")
  for 'AGENTVM_GATEWAY_URL=https://other.example', 'AGENTVM_HEARTBEAT_INTERVAL=17', 'AGENTVM_DEADLINE_GRACE=71', 'AGENTVM_DEADMAN_ALLOWANCE=177', 'AGENTVM_CA_FILE=/etc/agentvm/gateway-ca.pem', 'MIIB';
set('gateway_ca_file', '');
unlike(boot(), qr/CERTIFICATE/, 'and no authority when there is none');

# how long a VM is looked for whose launch was never answered
set('lease', '1s');
set('launch_settle', '1h');
$faults->set(mode => 'drop', action => 'RunInstances');
$session = launch($node, 'acme');
await($node, "SELECT retries > 0 FROM agentvm.session WHERE session_id = '$session'", 't', name => 'a launch without an answer');
sql("SELECT agentvm.terminate('$session')");
hurry_until($node, "SELECT count(*) >= 3 FROM agentvm.session_event WHERE session_id = '$session'", 't', name => 'its end begins');
for (1 .. 5) { sql("UPDATE agentvm.session SET next_check_at = now() WHERE session_id = '$session' AND lease IS NULL; SELECT agentvm.wake()"); sleep 0.1; }
like(state_of($node, $session), qr/^terminating/, 'and does not come for an hour');
set('launch_settle', '1s');
hurry_to($node, $session, 'terminated');

is(dispatcher('pid'), $pid, 'all this in one dispatcher');
done_testing();
