# Odd surroundings, beside 052: settings of cluster, database and role that would bend a worker or a caller's session, owners
# of all kinds, and the cloud from databases in other encodings. Each goes through the whole life of a session in the cloud
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use Digest::SHA qw(sha256_hex);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $faults = AgentVM::Faults->new;
my $node = new_node('main', moto => $faults, databases => 'postgres, latin1, ascii, installed', conf => "agentvm.sweep_interval = '200ms'\n");
$node->safe_psql('postgres', 'CREATE ROLE alice LOGIN IN ROLE agentvm_user; CREATE ROLE nobody');

my $lives = 0;

# The dispatchers have to begin with the settings. (One that is terminated comes back too slowly for so many cases)
my $as = 'SET statement_timeout = 0; SET default_transaction_read_only = off; SET default_transaction_deferrable = off; SET ROLE NONE; SET exit_on_error = off;';
sub new_dispatcher
{
	my ($db) = @_;
	foreach my $count (0, 1)
	{
		$node->safe_psql('postgres', "$as ALTER SYSTEM SET agentvm.dispatchers = $count");
		$node->reload;
		await($node, "$as SELECT count(*) FROM agentvm.stat_dispatcher", $count, dbname => $db, name => $count ? 'a new dispatcher' : 'the old one ends');
	}
	return;
}

# The life of a session: whoever is in the surroundings calls all that a caller may; prelude is what he has to set to be let write
sub lives
{
	my ($name, %opt) = @_;
	my $db = $opt{db} // 'postgres';
	my $prelude = $opt{prelude} // '';
	my $id = ($opt{team} // 'acme') . ++$lives;
	my ($team, $agent, $env) = map { literal($_) } $id, $opt{agent} // 'coder', "{\"A\": \"" . ($opt{env} // 'b') . '"}';
	my $ok = sub {
		my ($sql, $what, @user) = @_;
		my ($code, $out, $error) = $node->psql($db, (@user ? '' : 'SET log_statement = none; ') . "$prelude\n$sql", on_error_stop => 1, @user ? (extra_params => [ '-U', @user ]) : ());
		local $Test::Builder::Level = $Test::Builder::Level + 1;
		ok($code == 0, "$name: $what") or diag($error);
		return $out;
	};
	my $awaits = sub {
		my ($query, $what) = @_;
		local $Test::Builder::Level = $Test::Builder::Level + 1;
		return await($node, "$prelude SET search_path = pg_catalog; $query", 't', dbname => $db, name => "$name: $what", timeout => 30);
	};
	my $hash = sha256_hex($id);
	my ($options, $secrets) = map { json($_) } $faults->options, $faults->secrets;
	utf8::downgrade($_) for $options, $secrets;    # or Perl would take the names' bytes for letters
	$faults->reset;
	note($name);

	$ok->("SELECT agentvm.create_team($team, 'ec2', '{\"max_sessions\": 5}'), agentvm.add_member($team, 'alice'), agentvm.create_profile('vm', 'ec2', runtime => true, heartbeat_timeout => '2 s'), agentvm.create_profile('plain', 'ec2', runtime => false)", 'a team');
	$ok->("SELECT agentvm.set_provider($team, 'ec2', $options, $secrets)", 'its secrets');
	my $session = $ok->("SELECT agentvm.provision($team, $agent, 'vm', tags => '{\"a\": 1}', env => $env)", 'provision()', 'alice');
	return if !$session;
	$awaits->("SELECT count(*) = 1 FROM agentvm.session_token t JOIN agentvm.session s USING (session_id) WHERE session_id = '$session' AND vm_id IS NOT NULL", 'launched');
	my ($launch) = grep { grep { $_ eq $session } values %{ $_->{args} } } $faults->requests('RunInstances');
	my %args = map { $_ => 1 } values %{ $launch->{args} };
	ok($args{$id}, "$name: with the team's name as a tag, in UTF-8");
	my $payload = $ok->("SELECT agentvm.bootstrap(token_sha256, decode('$hash', 'hex'), 'boot') ->> 'env' FROM agentvm.session_token WHERE session_id = '$session'", 'bootstrap()');
	is($payload, "{\"A\": \"" . ($opt{env} // 'b') . '"}', "$name: what was given comes out");
	is($ok->("SELECT agentvm.wait('$session', timeout => '30 s')", 'wait()', 'alice'), 'ready', "$name: ready");
	$ok->("SELECT agentvm.heartbeat(decode('$hash', 'hex'))", 'heartbeat()');
	$awaits->("SELECT state = 'terminated' AND end_reason = 'heartbeat_timeout' AND detail ~ 'last heartbeat' FROM agentvm.session WHERE session_id = '$session'", 'swept when it fell silent');
	my $other = $ok->("SELECT agentvm.provision($team, profile => 'plain')", 'another', 'alice');
	$ok->("CALL agentvm.await('$other', timeout => '30 s')", 'await()', 'alice');
	$ok->("SELECT agentvm.inspect('$other'), agentvm.extend('$other', '1 minute')", 'inspect(), extend()', 'alice');
	$ok->("SELECT agentvm.terminate('$other')", 'terminate()', 'alice');
	$awaits->("SELECT state = 'terminated' AND next_check_at IS NULL AND handle IS NULL FROM agentvm.session WHERE session_id = '$other'", 'a tombstone');
	is($ok->("SELECT string_agg(new_state, ' ' ORDER BY event_id) FROM agentvm.session_event WHERE session_id = '$other' AND kind = 'state'", 'its log'), 'provisioning ready terminating terminated', "$name: every state is logged");
	$ok->('CALL agentvm.dispatch(); SELECT agentvm.sweep()', 'dispatch()');
	$ok->("SELECT agentvm.drop_team($team); SELECT agentvm.drop_profile('vm'), agentvm.drop_profile('plain')", 'drop_team()');
	return;
}

# The same under settings of the cluster, the database, the bootstrap superuser (whom workers are) and the caller, all at once
sub under
{
	my ($name, $settings, %opt) = @_;
	my @names = map { /^(\S+)/ } @$settings;
	my @where = ('SYSTEM', 'DATABASE postgres', 'ROLE postgres', 'ROLE alice');
	@where = @{ $opt{where} } if $opt{where};
	my $all = sub { my ($how) = @_; return join("\n", $as, map({ my $where = $_; map { "ALTER $where $how $_;" } $how eq 'SET' ? @$settings : @names } @where), 'SELECT pg_reload_conf()'); };
	$node->safe_psql('postgres', $all->('SET'));
	new_dispatcher('postgres');
	lives($name, %opt);
	$node->safe_psql('postgres', $all->('RESET'));
	return;
}

lives('plainly');
my @everywhere = grep { $node->safe_psql('postgres', "SELECT count(*) FROM pg_settings WHERE name = '" . (/^(\S+)/)[0] . "'") } "transaction_timeout = '50ms'";
under('tiny timeouts', [ "statement_timeout = '50ms'", "lock_timeout = '1ms'", "idle_in_transaction_session_timeout = '1ms'", "idle_session_timeout = '50ms'", @everywhere ],
	prelude => 'SET statement_timeout = 0; SET lock_timeout = 0; SET idle_session_timeout = 0; SET idle_in_transaction_session_timeout = 0;' . (@everywhere ? 'SET transaction_timeout = 0;' : ''));
under('serializable, read-only, deferrable', [ "default_transaction_isolation = 'serializable'", 'default_transaction_read_only = on', 'default_transaction_deferrable = on' ],
	prelude => 'SET default_transaction_read_only = off;');
under('planner', [ map({ "$_ = off" } grep { !/partition|memoize|gather|distinct|self_join/ } split /\n/, $node->safe_psql('postgres', "SELECT name FROM pg_settings WHERE name ~ '^enable_'")),
		'jit = on', 'jit_above_cost = 0', 'jit_inline_above_cost = -1', "plan_cache_mode = 'force_generic_plan'", 'from_collapse_limit = 1', 'join_collapse_limit = 1' ]);
under('styles', [ "DateStyle = 'SQL, DMY'", "IntervalStyle = 'postgres_verbose'", "TimeZone = 'America/St_Johns'", "bytea_output = 'escape'", 'extra_float_digits = -15', 'standard_conforming_strings = off', 'backslash_quote = on', "xmlbinary = 'hex'",
		"search_path = ''", 'transform_null_equals = on' ], prelude => "SET bytea_output = 'escape';");
under('no replication triggers', [ "session_replication_role = 'replica'" ], where => [ 'DATABASE postgres', 'ROLE postgres' ]);
under('row_security', ['row_security = off'], where => [ 'SYSTEM', 'ROLE postgres', 'ROLE alice' ]);

# ---- what only a worker has to bear ----
sub sql { return $node->safe_psql('postgres', "SET ROLE NONE; $_[0]"); }
sql("ALTER ROLE postgres SET role = 'nobody'; ALTER ROLE postgres SET exit_on_error = on");
new_dispatcher('postgres');
my $pid = $node->safe_psql('postgres', "$as SELECT pid FROM agentvm.stat_dispatcher");
$node->safe_psql('postgres', <<"SQL");
$as
SELECT agentvm.create_team('cursed'), agentvm.create_team('blessed');
CREATE FUNCTION curse() RETURNS trigger LANGUAGE plpgsql AS \$\$ BEGIN RAISE 'cursed'; END \$\$;
CREATE TRIGGER curse BEFORE UPDATE ON agentvm.session FOR EACH ROW WHEN (NEW.team_id = 'cursed') EXECUTE FUNCTION curse();
CREATE TABLE role_seen (role text);
CREATE FUNCTION see_role() RETURNS trigger LANGUAGE plpgsql AS \$\$ BEGIN INSERT INTO public.role_seen VALUES (current_setting('role')); RETURN NULL; END \$\$;
CREATE TRIGGER see_role AFTER UPDATE ON agentvm.session FOR EACH ROW WHEN (NEW.team_id = 'blessed') EXECUTE FUNCTION see_role();
SELECT agentvm.provision('cursed');
SELECT agentvm.provision('blessed');
SQL
await($node, "$as SELECT state FROM agentvm.sessions WHERE team_id = 'blessed'", 'ready', name => 'serves');
is($node->safe_psql('postgres', "$as SELECT pid FROM agentvm.stat_dispatcher"), $pid, 'and survives an error');
is($node->safe_psql('postgres', "$as SELECT DISTINCT role FROM role_seen"), 'none', 'in no role but its own');
$node->safe_psql('postgres', "$as ALTER ROLE postgres RESET ALL; DROP TRIGGER curse ON agentvm.session; DROP TRIGGER see_role ON agentvm.session");

# a launcher that would wait for a safe snapshot, with somebody writing
sql("ALTER SYSTEM SET default_transaction_isolation = 'serializable'; ALTER SYSTEM SET default_transaction_read_only = on; ALTER SYSTEM SET default_transaction_deferrable = on; SELECT pg_reload_conf()");
my $writer = AgentVM::Client->new($node);
$writer->run('BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE; CREATE TEMP TABLE x (y int)');
$node->safe_psql('postgres', "SET default_transaction_deferrable = off; SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type ~ 'agentvm'");
await($node, "SET default_transaction_deferrable = off; SELECT count(*) FROM agentvm.stat_dispatcher", 1, name => 'launcher and dispatcher begin while somebody writes', timeout => 20);
$writer->quit;
$node->safe_psql('postgres', "SET default_transaction_read_only = off; SET default_transaction_deferrable = off; ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()");
await($node, 'SHOW default_transaction_read_only', 'off');

# ---- a caller with tables of his own before everything ----
{
	my $alice = AgentVM::Client->new($node);
	$alice->run("SELECT agentvm.add_member('blessed', 'alice'); SET SESSION AUTHORIZATION alice");
	$alice->run("CREATE TEMP TABLE $_ (team_id text, session_id uuid, state text)") for qw(session team team_member profile session_event pg_class pg_proc pg_extension pg_roles pg_auth_members);
	$alice->run("CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (false); CREATE DOMAIN pg_temp.uuid AS pg_catalog.uuid CHECK (false); CREATE DOMAIN pg_temp.timestamptz AS pg_catalog.timestamptz CHECK (false)");
	$alice->run('SET search_path = pg_temp, pg_catalog');
	my $session = $alice->run("SELECT agentvm.provision('blessed')");
	is($alice->run("SELECT agentvm.wait('$session')"), 'ready', 'temporary tables and types of a caller are not taken for ours');
	is($alice->run("SELECT agentvm.terminate('$session')"), 't', 'nor at the end');
	is($alice->run('SELECT count(*) FROM pg_temp.session'), 0, 'and nothing is written to them');
}

# ---- owners of the extension ----
$node->safe_psql('postgres', 'CREATE DATABASE installed; CREATE ROLE installer SUPERUSER LOGIN');
$node->psql('installed', 'CREATE EXTENSION agentvm CASCADE', extra_params => [ '-U', 'installer' ]);
is($node->safe_psql('installed', "SELECT extowner::regrole FROM pg_extension WHERE extname = 'agentvm'"), 'installer', 'another superuser owns the extension');
lives('another superuser', db => 'installed');
$node->safe_psql('postgres', 'ALTER ROLE installer NOSUPERUSER');
new_dispatcher('installed');
lives('who is none any more', db => 'installed');
{
	# what he may not see of pg_stat_activity does not make a living worker dead
	$faults->set(mode => 'canned', ms => 2000, action => 'RunInstances');
	$node->safe_psql('installed', "SELECT agentvm.create_team('acme', 'ec2'), agentvm.create_profile('plain', 'ec2', runtime => false); SET log_statement = none; SELECT agentvm.set_provider('acme', 'ec2', " . json($faults->options) . ', ' . json($faults->secrets) . ')');
	my $session = $node->safe_psql('installed', "SELECT agentvm.provision('acme', profile => 'plain')");
	await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$session'", 'ready', dbname => 'installed');
	is(scalar calls_for($faults, 'RunInstances', $session), 1, 'and his leases are kept');
	$faults->reset;
}

# ---- other encodings ----
foreach my $encoding (qw(latin1 ascii))
{
	$node->safe_psql('postgres', "CREATE DATABASE $encoding ENCODING '" . ($encoding eq 'ascii' ? 'SQL_ASCII' : 'LATIN1') . "' LOCALE 'C' TEMPLATE template0");
	create_extension($node, $encoding);
	await($node, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 't', dbname => $encoding);
	local $ENV{PGCLIENTENCODING} = $encoding eq 'ascii' ? 'SQL_ASCII' : 'UTF8';
	lives($encoding, db => $encoding, team => "\xc3\xa4cme", agent => "c\xc3\xb6der", env => "\xc3\xbc");

	# what the cloud says in letters that the database has not
	$node->safe_psql($encoding, "SELECT agentvm.create_team('acme', 'ec2'), agentvm.create_profile('plain', 'ec2', runtime => false); SET log_statement = none; SELECT agentvm.set_provider('acme', 'ec2', " . json($faults->options) . ', ' . json($faults->secrets) . ')');
	$faults->set(mode => 'error', code => 'InvalidParameterValue', message => "caf\xc3\xa9 \xe2\x82\xac \xe6\xbc\xa2");
	my $session = $node->safe_psql($encoding, "SELECT agentvm.provision('acme', profile => 'plain')");
	await($node, "SELECT state || ' ' || detail FROM agentvm.sessions WHERE session_id = '$session'", 'failed InvalidParameterValue: caf?? ??? ???', dbname => $encoding, name => "$encoding: messages of the provider are kept, as far as can be");
	fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV004', qr/refused: InvalidParameterValue.*caf\?\? /s, "$encoding: and told", dbname => $encoding);
	$faults->reset;
}
{
	local $ENV{PGCLIENTENCODING} = 'UTF8';
	fails_with($node, "SELECT agentvm.create_team('\xe2\x82\xac')", '22P05', qr/has no equivalent in encoding "LATIN1"/, 'latin1: what it cannot hold is refused', dbname => 'latin1');
	fails_with($node, "SELECT agentvm.provision('acme', env => '{\"A\": \"\\u20ac\"}')", '22P05', undef, 'latin1: also in JSON', dbname => 'latin1');
}
{
	# bytes that are no text anywhere: the cloud cannot be told, which ends that session and nothing else
	local $ENV{PGCLIENTENCODING} = 'SQL_ASCII';
	my $session = $node->safe_psql('ascii', "SELECT agentvm.provision('acme', E'\\377\\376', profile => 'plain')");
	await($node, "SELECT concat_ws(' ', state, detail ~ 'StepFailed: invalid byte sequence') FROM agentvm.sessions WHERE session_id = '$session'", 'failed t', dbname => 'ascii', name => 'ascii: bytes that are no UTF-8 end a session, with the reason');
}
unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
