# Secrets of every kind are planted, used, and then looked for wherever somebody might read them, with the server at its most talkative.
# Each place has a decoy in it, too: a search that does not find that one proves nothing.
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Process;
use AgentVM::Test;
use Digest::SHA qw(hmac_sha256);
use File::Find;
use JSON::PP;
use MIME::Base64;
use POSIX qw(strftime);
use PostgreSQL::Test::Utils;
use Test::More;

my ($node, $faults, $moto) = ec2_node('main', start => 0, preload => [ 'pg_stat_statements', 'auto_explain' ]);
my $wordy = <<'CONF';
agentvm.gateway_url = 'https://decoy-in-memory.example'
log_min_messages = debug5
log_error_verbosity = verbose
log_statement = all
log_duration = on
log_min_duration_statement = 0
log_parameter_max_length = -1
log_parameter_max_length_on_error = -1
log_lock_waits = on
log_temp_files = 0
debug_print_parse = on
debug_print_rewritten = on
debug_print_plan = on
deadlock_timeout = 100ms
pg_stat_statements.track = all
pg_stat_statements.track_utility = on
auto_explain.log_min_duration = 0
auto_explain.log_nested_statements = on
auto_explain.log_verbose = on
auto_explain.log_analyze = on
CONF

# As README says, for a session that brings secrets in its own statements
our $quiet = join(' ', map { "SET $_;" } 'log_statement = none', 'log_duration = off', 'log_min_duration_statement = -1', 'log_parameter_max_length = 0', 'log_parameter_max_length_on_error = 0',
	map({ "debug_print_$_ = off" } qw(parse rewritten plan)), 'auto_explain.log_min_duration = -1');
# the server's defaults, which log a statement that fails
my $default = $quiet =~ s/SET log_parameter_max_length\w* = 0;//gr;

# ---- plant ----
$moto->run('call', 'iam', 'create_role', encode_json({ RoleName => 'worker',
	AssumeRolePolicyDocument => '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}]}' }));
$moto->run('call', 'iam', 'put_role_policy', encode_json({ RoleName => 'worker', PolicyName => 'all',
	PolicyDocument => '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": ["ec2:*", "sts:*"], "Resource": "*"}]}' }));
my $temporary = $moto->run('call', 'sts', 'assume_role', '{"RoleArn": "arn:aws:iam::123456789012:role/worker", "RoleSessionName": "test"}')->{Credentials};
my $master = slurp_file($node->basedir . '/keys') =~ s/^k1:|\n//gr;
my %planted = (
	'access key' => $temporary->{AccessKeyId}, 'secret key' => $temporary->{SecretAccessKey}, 'session token' => $temporary->{SessionToken},
	'wrong key' => 'wJalrXUtnFEMI-planted-and-wrong', 'env secret' => 'env-planted-4711', 'repository token' => 'ghp-planted-0815', 'token of a runtime' => 'runtime-token-planted',
	'master key' => $master, 'bytes of the master key' => decode_base64($master));
$node->start;
create_extension($node);
$node->safe_psql('postgres', q{CREATE EXTENSION pg_stat_statements; SELECT agentvm.create_profile('plain', 'ec2', runtime => false); SELECT agentvm.create_profile('full', 'ec2', runtime => true);
	SELECT agentvm.create_team('acme', 'ec2'); SELECT agentvm.create_team('other', 'ec2')});
make_role($node, 'decoy_in_argv', login => 1);

$node->append_conf('postgresql.conf', $wordy);
$node->reload;
await($node, 'SHOW auto_explain.log_analyze', 'on');
$node->safe_psql('postgres', q{COMMENT ON ROLE decoy_in_argv IS 'decoy-in-catalog'; SELECT 'decoy-in-log'});
my $decoy = IPC::Run::start([ 'psql', '-XAtq', '-U', 'decoy_in_argv', '-d', $node->connstr('postgres') ], '<', \my $decoy_in, '>', \my $decoy_out);
$decoy_in .= "SELECT 'decoy-in-activity';\n";
$decoy->pump until $decoy_out =~ /decoy/;

# look at pg_stat_activity all the time, from the server's side
$node->safe_psql('postgres', <<'SQL');
CREATE UNLOGGED TABLE sample (line text PRIMARY KEY);
CREATE PROCEDURE watch() LANGUAGE plpgsql AS $$
BEGIN
	LOOP
		INSERT INTO sample SELECT DISTINCT regexp_replace(a::text, '"20[^"]*"', '', 'g') FROM pg_stat_activity a WHERE pid <> pg_backend_pid() ON CONFLICT DO NOTHING;
		COMMIT;
		PERFORM pg_sleep(0.003);
	END LOOP;
END
$$;
SQL
my $watcher = AgentVM::Client->new($node);
$watcher->run($quiet);
$watcher->run('SET log_min_messages = error');
$watcher->send('CALL watch()');

# with bind parameters, from a client that is used: nothing is in the statement
sub bound
{
	my ($sql, @values) = @_;
	my ($out, $error);
	my $code = 'import json, psycopg, sys; a = json.load(sys.stdin); c = psycopg.connect(a[0], autocommit=True); [c.execute(s) for s in a[1].split(";") if s.strip()]; print(c.execute(a[2], a[3]).fetchone())';
	IPC::Run::run([ "$ENV{AGENTVM_VENV}/bin/python", '-c', $code ], '<', \encode_json([ $node->connstr('postgres'), $quiet, $sql, \@values ]), '>', \$out, '2>', \$error) or return $error;
	return $out;
}
my $secrets = { access_key_id => $planted{'access key'}, secret_access_key => $planted{'secret key'}, session_token => $planted{'session token'} };
like(bound('SELECT agentvm.set_provider(%s, %s, %s, %s)', 'acme', 'ec2', encode_json($moto->options), encode_json($secrets)), qr/^\('',\)/, 'set_provider() with bind parameters');
my ($session) = bound("SELECT agentvm.provision('acme', profile => 'full', env => %s, repos => %s, tags => '{\"what\": \"decoy-in-table\"}')::text",
	encode_json({ TOKEN => $planted{'env secret'} }), encode_json([ { url => "https://x:$planted{'repository token'}\@git.example/a" } ])) =~ /^\('([0-9a-f-]{36})',\)/;
my $vm = await_vm($node, $session);
$planted{'bootstrap token'} = bootstrap_token($moto, $vm);
like(as_gateway($node, 'SELECT agentvm.bootstrap(' . bytea_hash($planted{'bootstrap token'}) . ', ' . bytea_hash($planted{'token of a runtime'}) . ", 'boot-1')"),
	qr/$planted{'env secret'}.*$planted{'repository token'}/, 'the runtime gets what was planted');
as_gateway($node, 'SELECT agentvm.heartbeat(' . bytea_hash($planted{'token of a runtime'}) . ')');
my @sessions = map { launch($node, 'acme') } 1 .. 3;
await_state($node, $_, 'ready') for @sessions;

$node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $watcher->pid . ')');
$watcher->answer;
$watcher->quit;

# what SigV4 derives from the secret key for a day
for my $day (map { strftime('%Y%m%d', gmtime(time + $_)) } -3600, 0)
{
	my @derived = hmac_sha256($day, "AWS4$planted{'secret key'}");
	push @derived, hmac_sha256($_, $derived[-1]) for 'us-east-1', 'ec2', 'aws4_request';
	@planted{ map { "signing key $_" } 1 .. 4 } = @derived;
}

# ---- how to look: a text, and the forms that a dump, a log or a request might have it in ----
my %named;    # form => what it is of

# base64 of these bytes at any place of a longer text, without the characters at its ends that others have part in
sub base64_within
{
	my ($bytes) = @_;
	return grep { length > 8 } encode_base64($bytes, '') =~ s/.=+$|.{2}$//r, map { my $shift = $_; substr(encode_base64(('x' x $shift) . $bytes, ''), $shift + 1) =~ s/.=+$|.{2}$//r } 1, 2;
}
sub name_forms
{
	my ($what, $text) = @_;
	my @forms = ($text, unpack('H*', $text), uc unpack('H*', $text), base64_within($text), $text =~ s/([^A-Za-z0-9_.~-])/sprintf('%%%02X', ord $1)/ger);
	push @forms, map { base64_within($_) } base64_within($text) if $what eq 'bootstrap token';    # as user data in a request
	push @forms, join(' ', map { ord } split //, $text);                                          # as debug_print_plan shows a constant
	# of bytes that are no text, the longest part that can be on a line
	$named{ (sort { length $b <=> length $a } split /[\n\0]/)[0] } = $what for @forms;
	return;
}
name_forms($_, $planted{$_}) for keys %planted;
my ($patterns, $searched) = map { "$PostgreSQL::Test::Utils::tmp_check/093_$_" } qw(patterns searched);
append_to_file($patterns, join('', map { "$_\n" } 'decoy', grep { length >= 8 } sort keys %named));

# What of the planted is in the files, names joined; 'decoy' if that is, too
sub found_in
{
	my (@files) = @_;
	local $ENV{LC_ALL} = 'C';
	IPC::Run::run([ 'grep', '-haoF', '-f', $patterns, '--', @files ], '<', \undef, '>', \my $out, '2>', \my $error);
	my %found = map { $_ eq 'decoy' ? () : ($named{$_} => 1) } split /\n/, $out;
	return join ', ', ($out =~ /^decoy$/m ? 'decoy' : ()), sort keys %found;
}
sub found
{
	my ($text) = @_;
	open(my $file, '>:raw', $searched) or die "$searched: $!";
	print $file $text;
	close $file;
	return found_in($searched);
}
sub only_decoy
{
	my ($text, $place) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(found($text), 'decoy', "$place: nothing but the decoy");
}
is(found("decoy $planted{'env secret'} " . unpack('H*', $planted{'bytes of the master key'}) . encode_base64('a' . encode_base64("bc$planted{'bootstrap token'}d", ''), '')),
	'decoy, bootstrap token, bytes of the master key, env secret', 'the search finds what there is');

like($node->safe_psql('postgres', 'SELECT count(*) FROM sample'), qr/^\d{2,}$/, 'pg_stat_activity was watched');
only_decoy($node->safe_psql('postgres', "$quiet SELECT line FROM sample"), 'pg_stat_activity, all the time');

# ---- statements of a caller that fails, at the server's defaults ----
my $key = literal($planted{'wrong key'});
my $options = json($moto->options);
my $errors = '';
sub fail_to_set
{
	my ($what, $like, $statement, $before) = @_;
	my ($code, $out, $error) = $node->psql('postgres', "\\set VERBOSITY verbose\n\\set SHOW_CONTEXT always\n$default" . ($before // '') . "\n$statement");
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	like($error, $like, "set_provider() fails: $what");
	$errors .= $error =~ s/^LINE 1: .*//mgr;
	return;
}
sub set { my ($secrets, $team, $options_) = @_; return 'SELECT agentvm.set_provider(' . join(', ', literal($team // 'acme'), "'ec2'", $options_ // $options, $secrets) . ')'; }
my $good = "jsonb_build_object('secret_access_key', $key)";
fail_to_set('an unknown field', qr/AV010/, set("jsonb_build_object('secret_key', $key)"));
fail_to_set('an unknown option', qr/AV010/, set($good, undef, q{'{"none": 1}'}));
fail_to_set('a bad option', qr/AV010/, set($good, undef, q{'{"region": 1}'}));
fail_to_set('no such provider', qr/AV010/, set($good) =~ s/'ec2'/'ec3'/r);
fail_to_set('a value of the wrong type', qr/AV010/, set("jsonb_build_object('secret_access_key', jsonb_build_array($key))"));
fail_to_set('a value of an object', qr/AV010/, set("jsonb_build_object('secret_access_key', jsonb_build_object('a', $key))"));
fail_to_set('a control character', qr/AV010/, set("jsonb_build_object('secret_access_key', $key || E'\\n')"));
fail_to_set('too long', qr/AV010/, set("jsonb_build_object('secret_access_key', repeat($key, 1000))"));
fail_to_set('no object', qr/22023/, set("to_jsonb($key\::text)"));
fail_to_set('a list', qr/22023/, set("jsonb_build_array($key)"));
fail_to_set('no such team', qr/42704/, set($good, 'nobody'));
fail_to_set('no name of a team', qr/22023/, set($good, ''));
fail_to_set('read-only', qr/25006/, set($good), 'SET default_transaction_read_only = on;');
$node->safe_psql('postgres', 'CREATE ROLE executor; GRANT USAGE ON SCHEMA agentvm TO executor; GRANT EXECUTE ON FUNCTION agentvm.set_provider TO executor');
fail_to_set('no administrator', qr/42501/, set($good), 'SET ROLE executor;');
fail_to_set('inside PL/pgSQL', qr/AV010/, "DO \$\$ BEGIN PERFORM agentvm.set_provider('acme', 'ec2', '{}', jsonb_build_object('secret_key', $key)); END \$\$");
fail_to_set('inside EXECUTE', qr/AV010/, "DO \$\$ BEGIN EXECUTE 'SELECT agentvm.set_provider(''acme'', ''ec2'', ''{}'', jsonb_build_object(''secret_key'', '$key'))'; END \$\$");
fail_to_set('a prepared statement', qr/AV010/, "PREPARE p(jsonb) AS SELECT agentvm.set_provider('acme', 'ec2', '{}', \$1);\nEXECUTE p(jsonb_build_object('secret_key', $key))", 'SET log_parameter_max_length_on_error = -1;');
$node->safe_psql('postgres', 'ALTER TABLE agentvm.provider_secret ADD CONSTRAINT none CHECK (false) NOT VALID');
fail_to_set('a constraint', qr/23514/, set($good));
$node->safe_psql('postgres', 'ALTER TABLE agentvm.provider_secret DROP CONSTRAINT none');
rename $node->basedir . '/keys', $node->basedir . '/keys.away';
fail_to_set('no key file', qr/AV010.*key file/, set($good));
rename $node->basedir . '/keys.away', $node->basedir . '/keys';
my $error = bound('SELECT agentvm.set_provider(%s, %s, %s, %s)', 'acme', 'ec2', '{}', encode_json({ secret_key => $planted{'wrong key'} })) =~ s/.*\n(?=psycopg)//sr;
like($error, qr/unknown secret/, 'set_provider() fails: with bind parameters');
$errors .= $error;
{
	my $holder = AgentVM::Client->new($node);
	$holder->run("BEGIN; LOCK agentvm.provider_secret");
	fail_to_set('a lock timeout', qr/55P03/, set($good), "SET lock_timeout = '300ms';");
	fail_to_set('a statement timeout', qr/57014/, set($good), "SET statement_timeout = '300ms';");

	# meanwhile, and afterwards, others see what it calls itself
	my $setter = AgentVM::Client->new($node);
	my $shown = 'SELECT query FROM pg_stat_activity WHERE pid = ' . $setter->pid;
	$setter->run($default);
	$setter->send("BEGIN; LOCK pg_catalog.pg_description; " . set($good));
	await($node, 'SELECT wait_event_type FROM pg_stat_activity WHERE pid = ' . $setter->pid, 'Lock');
	like($node->safe_psql('postgres', $shown), qr/^agentvm.set_provider\(\): the statement is not shown/, 'a set_provider() under way does not show its statement');
	# a deadlock is reported with the statements of both
	$holder->send('COMMENT ON TABLE agentvm.provider_secret IS NULL');
	$setter->answer; $holder->answer;
	like($setter->error . $holder->error, qr/40P01/, 'set_provider() fails: a deadlock');
	$errors .= $setter->error;
	$setter->run('ROLLBACK');
	$holder->run('ROLLBACK');
	$setter->run(set('NULL', 'other') . "; " . set($good, 'other'));
	like($node->safe_psql('postgres', $shown), qr/^agentvm.set_provider\(\): the statement is not shown/, 'nor does one that is done');
	$_->quit for $setter, $holder;
}

# answers of ours that tell of providers and sessions
$errors .= $node->safe_psql('postgres', "SELECT agentvm.check_provider('acme'), agentvm.inspect('$session'), agentvm.status('$session'); SELECT * FROM agentvm.health");
only_decoy("decoy $errors", 'errors and answers');
{
	local $quiet = '';
	like(bound('SELECT %s::text', 'decoy as a parameter'), qr/decoy/, 'one more decoy');
}

# ---- in the server ----
like($node->safe_psql('postgres', 'SELECT query FROM pg_stat_statements'), qr/agentvm\.set_provider/, 'pg_stat_statements has seen set_provider()');
$node->safe_psql('postgres', "$quiet ANALYZE");
my @relations = split /\n/, $node->safe_psql('postgres', q{SELECT c.oid::regclass FROM pg_class c WHERE relkind IN ('r', 'v', 'm') AND (relnamespace IN ('agentvm'::regnamespace, 'pg_catalog'::regnamespace) OR relname ~ '^pg_stat_statements')});
cmp_ok(scalar @relations, '>', 130, 'tables and views of agentvm and of the catalog');
my %seen;
{
	my @parts = split /^<<(\S+)>>\n/m, $node->safe_psql('postgres', "$quiet SET log_min_messages = error;\n" . join("\n", map { "SELECT '<<$_>>'; SELECT t::text FROM $_ t;" } @relations));
	shift @parts;
	while (my ($relation, $text) = splice @parts, 0, 2) { push @{ $seen{ found($text) } }, $relation; }
}
is(join('; ', map { "$_: @{ $seen{$_} }" } grep { !/^(?:decoy)?$/ } keys %seen), '', 'tables and views: none has what was planted');
my $with_decoy = " @{ $seen{decoy} } ";
like($with_decoy, qr/ \Q$_\E /, "$_ has its decoy") for qw(agentvm.session agentvm.sessions pg_shdescription pg_stat_activity pg_stat_statements pg_settings);
my $dump = $node->basedir . '/dump.sql';
$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-f', $dump ], 'pg_dump');
only_decoy(slurp_file($dump), 'pg_dump');

# ---- on disk ----
# What is in a file; nothing when it has gone
sub bytes_of { my ($path) = @_; open(my $file, '<:raw', $path) or return ''; local $/; return scalar(<$file>) // ''; }
$node->safe_psql('postgres', 'CHECKPOINT');
my %files;
find({ no_chdir => 1, wanted => sub { -f && -s && push @{ $files{ m{/pgdata/(base|pg_wal)/} ? $1 : 'others' } }, $_ } }, $node->data_dir);
for my $kind (sort keys %files)
{
	is(found_in(@{ $files{$kind} }), 'decoy', 'files, ' . @{ $files{$kind} } . " of $kind: nothing but the decoy");
}

# ---- of the processes: arguments, environment, memory ----
my ($postmaster) = slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/;
my @processes = ($postmaster, split /\n/, $node->safe_psql('postgres', 'SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()'));
for my $what (qw(cmdline environ))
{
	my $all = join "\n", map { bytes_of("/proc/$_/$what") } @processes;
	is(found($all), $what eq 'environ' ? '' : 'decoy', "$what of the server's processes");
}

SKIP:
{
	skip 'this kernel does not show the memory of other processes', 3 unless defined AgentVM::Process::memory_of($postmaster, 'p');
	my %workers = reverse map { split /\|/ } split /\n/, $node->safe_psql('postgres', q{SELECT pid, backend_type FROM pg_stat_activity WHERE backend_type ~ '^agentvm'});
	is(scalar keys %workers, 2, 'a launcher and a dispatcher');
	for my $worker (sort keys %workers)
	{
		# connections that are not used hold keys for some seconds
		my $end = time + $PostgreSQL::Test::Utils::timeout_default;
		my $found;
		while (($found = found(AgentVM::Process::memory_of($workers{$worker}, 'p'))) ne 'decoy' && time < $end) { sleep 1; }
		is($found, 'decoy', "memory of the idle $worker: nothing but the decoy");
	}
	only_decoy(AgentVM::Process::memory_of($postmaster, 's'), 'shared memory');
}

# ---- in the log ----
$decoy->finish;
$node->stop('fast');
my $log = log_text($node);
ok($log =~ $_, "the log is at its wordiest: $_") for qr/DEBUG:  /, qr/parse tree:/, qr/rewritten parse tree:/, qr/\bplan:\s*\n.*PLANNEDSTMT/, qr/Query Text: INSERT INTO agentvm/, qr/parameters: \$1 = /, qr/LOCATION:  /;
only_decoy($log, 'the log');
ok($log !~ /STATEMENT:.*agentvm\.set_provider\(/, 'it has no statement of a set_provider() that failed');
done_testing();
