# Odd surroundings: settings of the database that bend every SQL statement, other encodings, shadowing objects
use strict;
use warnings;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;

my @databases = qw(plain serializable readonly styles shadow timeouts latin1 ascii);
my $node = new_node('main', databases => join(',', @databases), extension => 0, conf => <<'CONF');
quote_all_identifiers = on
agentvm.dispatchers = 1
max_worker_processes = 40
CONF

# The whole life of a session: a profile, a team with limits and times, a session with a runtime but for it, sweeps, dispatch()
sub lives
{
	my ($db, %opt) = @_;
	my $write = $opt{write} // '';
	my ($team, $agent) = map { literal($_) } $opt{team} // 'acme', $opt{agent} // 'coder';
	my @db = (dbname => $db);

	psql_ok($node, "$write SELECT agentvm.create_team($team, limits => '{\"max_sessions\": 5, \"max_lifetime\": \"90 minutes\", \"min_lifetime\": \"1 minute\"}')", "$db: a team", @db);
	psql_ok($node, "$write SELECT agentvm.create_profile('small', 'noop', '{\"launch_delay\": \"0.1s\"}', vcpus => 1, heartbeat_timeout => '1:30:00', max_lifetime => '0-0 0 1:15:00')", "$db: a profile", @db);
	psql_ok($node, "$write SELECT agentvm.set_provider($team, 'ec2', '{\"region\": \"eu-west-1\"}', '{\"access_key_id\": \"AKIAEXAMPLE\"}')", "$db: a provider", @db);
	my $session = psql_ok($node, "$write SELECT agentvm.provision($team, $agent, 'small', tags => '{\"a\": \"b\"}')", "$db: provision()", @db);
	is(psql_ok($node, "SELECT agentvm.wait('$session')", "$db: wait()", @db), 'ready', "$db: ready");
	is(psql_ok($node, "SELECT extract(epoch FROM deadline_at - created_at), agent_id = $agent, team_id = $team FROM agentvm.status('$session')", "$db: status()", @db), '4500.000000|t|t', "$db: as asked for");
	psql_ok($node, "$write SELECT agentvm.extend('$session', '0:10:00')", "$db: extend()", @db);
	psql_ok($node, "$write SELECT agentvm.sweep()", "$db: sweep()", @db);
	psql_ok($node, "$write SELECT * FROM agentvm.health", "$db: health", @db);
	psql_ok($node, 'CALL agentvm.dispatch()', "$db: dispatch()", @db);
	my $runtime = psql_ok($node, "$write SELECT agentvm.provision($team, $agent, env => '{\"A\": \"b\"}', options => '{\"runtime\": true}')", "$db: a runtime", @db);
	await($node, "SELECT count(*) FROM agentvm.session_token WHERE session_id = '$runtime'", 1, name => "$db: launched", @db);
	like(psql_ok($node, "$write SELECT agentvm.bootstrap(token_sha256, sha256('x'), 'boot') FROM agentvm.session_token WHERE session_id = '$runtime'", "$db: bootstrap()", @db), qr/"A": "b"/, "$db: with env");
	psql_ok($node, "$write SELECT agentvm.heartbeat(sha256('x'))", "$db: heartbeat()", @db);
	is(psql_ok($node, "$write SELECT agentvm.heartbeat_batch('{$runtime}', '{2021-01-01}')", "$db: heartbeat_batch()", @db), '', "$db: nobody is gone");
	for my $id ($session, $runtime)
	{
		is(psql_ok($node, "$write SELECT agentvm.terminate('$id', 'done')", "$db: terminate()", @db), 't', "$db: begins the end");
		psql_ok($node, "CALL agentvm.await('$id', 'terminated')", "$db: await()", @db);
	}
	my $late = psql_ok($node, "$write SELECT agentvm.provision($team, options => '{\"launch_delay\": \"1h\"}')", "$db: another", @db);
	psql_ok($node, "$write UPDATE agentvm.session SET deadline_at = now() - interval '1 s', next_check_at = now() WHERE session_id = '$late'", "$db: its deadline passes", @db);
	is(psql_ok($node, "SELECT agentvm.wait('$late', 'terminated')", "$db: wait()", @db), 'terminated', "$db: the dispatcher has ended it");
	is(psql_ok($node, "SELECT string_agg(concat_ws(' ', state, end_reason, detail), ', ' ORDER BY session_id) FROM agentvm.sessions", "$db: sessions", @db), 'terminated requested done, terminated requested done, terminated max_lifetime', "$db: all ended");
	psql_ok($node, "$write SELECT agentvm.drop_team($team)", "$db: drop_team()", @db);
	return;
}

sub database
{
	my ($db, $options, @sql) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $db $options");
	create_extension($node, $db);
	$node->safe_psql('postgres', "ALTER DATABASE $db $_") for @sql;
	# its dispatcher has to begin with these settings
	$node->safe_psql($db, "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '$db' AND backend_type ~ 'agentvm'");
	await($node, "SELECT count(*) > 0 FROM agentvm.stat_dispatcher", 't', dbname => $db, name => "$db: a dispatcher serves it");
	return;
}

database('plain', '');
lives('plain', team => "te'am \"x\" \\ %s \$\$", agent => "ag;ent'");

database('serializable', '', "SET default_transaction_isolation = 'serializable'", 'SET default_transaction_deferrable = on');
lives('serializable');

database('readonly', '', 'SET default_transaction_read_only = on');
fails_with($node, "SELECT agentvm.provision('acme')", '42704', undef, 'read only: refused for other reasons first', dbname => 'readonly');
lives('readonly', write => 'SET transaction_read_only = off; SET default_transaction_read_only = off;');
fails_with($node, "SELECT agentvm.create_team('acme2')", '25006', undef, 'read only is honoured', dbname => 'readonly');

my $parallel = $node->safe_psql('postgres', "SELECT name FROM pg_settings WHERE name IN ('force_parallel_mode', 'debug_parallel_query')");
database('styles', '', "SET DateStyle = 'German, DMY'", "SET IntervalStyle = 'sql_standard'", "SET TimeZone = 'Asia/Kathmandu'", "SET bytea_output = 'escape'", "SET extra_float_digits = -15", "SET standard_conforming_strings = off",
	"SET escape_string_warning = off", "SET lc_messages = 'C'", "SET xmloption = 'document'", 'SET row_security = off', 'SET array_nulls = off', 'SET enable_seqscan = off', 'SET enable_indexscan = off', "SET plan_cache_mode = 'force_custom_plan'",
	'SET check_function_bodies = off', "SET default_table_access_method = 'heap'", "SET session_replication_role = 'origin'", 'SET transform_null_equals = on', 'SET quote_all_identifiers = on', 'SET lo_compat_privileges = on',
	"SET $parallel = on", 'SET jit_above_cost = 0');
lives('styles');

# A schema that comes before pg_catalog and holds traps of every kind, owned by somebody who would like to be called
database('shadow', '');
$node->safe_psql('shadow', <<'SQL');
CREATE ROLE mallory IN ROLE agentvm_user;
CREATE SCHEMA traps AUTHORIZATION mallory;
SET ROLE mallory;
CREATE TABLE traps.sprung (what text);
CREATE FUNCTION traps.spring(what text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trap %: % as %', what, current_query(), current_user; END $$;
DO $do$
DECLARE
	f record;
BEGIN
	FOR f IN SELECT * FROM (VALUES ('now', '', 'timestamptz'), ('clock_timestamp', '', 'timestamptz'), ('count', 'bigint', 'bigint'), ('greatest', 'timestamptz, timestamptz', 'timestamptz'), ('unnest', 'uuid[], timestamptz[]', 'uuid'),
			('make_interval', 'int', 'interval'), ('gen_random_uuid', '', 'uuid'), ('pg_has_role', 'oid, oid, text', 'boolean'), ('jsonb_build_object', 'text, text', 'jsonb'), ('current_setting', 'text', 'text'),
			('pg_stat_get_activity', 'int', 'int'), ('round', 'numeric', 'numeric'), ('pg_postmaster_start_time', '', 'timestamptz'), ('visible_teams', '', 'text[]'), ('sees_all', '', 'boolean'), ('sha256', 'text', 'bytea'),
			('pgp_sym_encrypt_bytea', 'bytea, text, text', 'bytea'), ('pgp_sym_decrypt_bytea', 'bytea, text', 'bytea'), ('extract', 'text, interval', 'numeric'), ('session_transition', '', 'int')) v (name, args, result) LOOP
		EXECUTE format('CREATE FUNCTION traps.%I(%s) RETURNS %s LANGUAGE plpgsql AS $$ BEGIN PERFORM traps.spring(%L); RETURN NULL; END $$', f.name, f.args, f.result, f.name);
	END LOOP;
	FOR f IN SELECT * FROM (VALUES ('=', 'text', 'text'), ('=', 'uuid', 'uuid'), ('<', 'timestamptz', 'timestamptz'), ('<=', 'timestamptz', 'timestamptz'), ('>', 'timestamptz', 'timestamptz'), ('+', 'timestamptz', 'interval'),
			('-', 'timestamptz', 'interval'), ('*', 'integer', 'interval'), ('||', 'text', 'text'), ('||', 'jsonb', 'jsonb'), ('=', 'oid', 'oid'), ('=', 'name', 'name'), ('<>', 'text', 'text'), ('=', 'boolean', 'boolean')) v (name, l, r) LOOP
		EXECUTE format('CREATE FUNCTION traps.%I(a %s, b %s) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RETURN traps.spring(%L); END $$', 'op ' || f.name || f.l, f.l, f.r, f.name || ' ' || f.l);
		EXECUTE format('CREATE OPERATOR traps.%s (FUNCTION = traps.%I, LEFTARG = %s, RIGHTARG = %s)', f.name, 'op ' || f.name || f.l, f.l, f.r);
	END LOOP;
	FOR f IN SELECT unnest('{session, sessions, team, team_member, profile, provider_config, session_event, session_heartbeat, session_token, gateway, installation, pg_class, pg_proc, pg_type, pg_roles, pg_authid, pg_extension, pg_stat_activity, sweep_hold}'::text[]) AS name LOOP
		EXECUTE format('CREATE VIEW traps.%I AS SELECT traps.spring(%L) AS session_id', f.name, f.name);
	END LOOP;
END
$do$;
CREATE DOMAIN traps.text AS pg_catalog.text CHECK (traps.spring('text'));
CREATE DOMAIN traps.interval AS pg_catalog.interval CHECK (traps.spring('interval'));
CREATE DOMAIN traps.jsonb AS pg_catalog.jsonb CHECK (traps.spring('jsonb'));
GRANT USAGE ON SCHEMA traps TO PUBLIC;
RESET ROLE;
ALTER DATABASE shadow SET search_path = traps, pg_catalog, agentvm, public;
SQL
$node->safe_psql('postgres', "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = 'shadow' AND backend_type ~ 'agentvm'");
{
	# our own test statements use operators, too: they put the traps behind pg_catalog, the calls do not
	my %shadow = (dbname => 'shadow');
	psql_ok($node, "SELECT agentvm.create_team('acme', 'noop', '{\"max_sessions\": 5}'), agentvm.create_profile('p', 'noop', vcpus => 1, max_lifetime => '1 hour'), agentvm.add_member('acme', 'mallory')", 'traps: a team', %shadow);
	psql_ok($node, "SELECT agentvm.set_provider('acme', 'ec2', '{\"region\": \"eu-west-1\"}', '{\"access_key_id\": \"AKIAEXAMPLE\"}')", 'traps: a provider', %shadow);
	my $session = psql_ok($node, "SELECT agentvm.provision('acme', 'coder', 'p', idempotency_key => 'k', env => '{\"A\": \"b\"}', options => '{\"runtime\": true}')", 'traps: provision()', %shadow);
	psql_ok($node, "SELECT agentvm.provision('acme', 'coder', 'p', idempotency_key => 'k', env => '{\"A\": \"b\"}', options => '{\"runtime\": true}')", 'traps: again', %shadow);
	await($node, "SET search_path = pg_catalog; SELECT count(*) FROM agentvm.session_token WHERE session_id = '$session'", 1, name => 'traps: launched', %shadow);
	my $hash = psql_ok($node, 'SET search_path = pg_catalog; SELECT token_sha256 FROM agentvm.session_token', 'its token', %shadow);
	like(psql_ok($node, "SELECT agentvm.bootstrap('$hash', '\\x" . 'ab' x 32 . "', 'boot')", 'traps: bootstrap()', %shadow), qr/"A": "b"/, 'traps: with env');
	psql_ok($node, "SELECT agentvm.heartbeat('\\x" . 'ab' x 32 . "')", 'traps: heartbeat()', %shadow);
	psql_ok($node, "SELECT agentvm.heartbeat_batch('{$session}', '{2021-01-01}')", 'traps: heartbeat_batch()', %shadow);
	is(psql_ok($node, "SELECT agentvm.wait('$session')", 'traps: wait()', %shadow), 'ready', 'traps: ready');
	psql_ok($node, "SELECT (agentvm.status('$session')).state", 'traps: status()', %shadow);
	psql_ok($node, "SELECT agentvm.inspect('$session'), agentvm.extend('$session', '1 minute'), agentvm.check_provider('acme', 'noop')", 'traps: inspect(), extend(), check_provider()', %shadow);
	psql_ok($node, "SELECT agentvm.$_()", "traps: $_()", %shadow) for qw(sweep sweep_bootstrap sweep_heartbeat sweep_lifetime visible_teams sees_all);
	psql_ok($node, "SELECT * FROM agentvm.$_", "traps: $_", %shadow) for qw(sessions fleet health stat_provider stat_dispatcher team profile session_event);
	psql_ok($node, "SET ROLE mallory; SELECT * FROM agentvm.$_", "traps: $_ as a member", %shadow) for qw(sessions fleet team team_member profile provider_config session_event);
	psql_ok($node, 'CALL agentvm.dispatch()', 'traps: dispatch()', %shadow);
	psql_ok($node, "SELECT agentvm.terminate('$session')", 'traps: terminate()', %shadow);
	psql_ok($node, "CALL agentvm.await('$session', 'terminated')", 'traps: await()', %shadow);
	psql_ok($node, "UPDATE agentvm.session SET detail = 'x', state = state", 'traps: the trigger', %shadow);
	psql_ok($node, "SELECT agentvm.remove_member('acme', 'mallory'), agentvm.drop_profile('p'), agentvm.drop_provider('acme', 'ec2'), agentvm.drop_team('acme')", 'traps: drop_team()', %shadow);
	unlike(log_text($node), qr/trap [^%]/, 'no trap was sprung');
}

# Settings of the cluster that end what takes long
$node->append_conf('postgresql.conf', "statement_timeout = 1500\nlock_timeout = 1000\nidle_session_timeout = 1500\nidle_in_transaction_session_timeout = 1000\ntcp_user_timeout = 1000\n");
$node->restart;
database('timeouts', '');
lives('timeouts');
{
	my $pid = psql_ok($node, 'SELECT pid FROM agentvm.stat_dispatcher', 'the dispatcher', dbname => 'timeouts');
	my $session = psql_ok($node, "SELECT agentvm.create_team('acme2'); SELECT agentvm.provision('acme2', options => '{\"launch_delay\": \"5s\"}')", 'a launch longer than any timeout', dbname => 'timeouts') =~ s/\s//gr;
	fails_with($node, "SELECT agentvm.wait('$session')", '57014', undef, 'wait() honours statement_timeout', dbname => 'timeouts');
	fails_with($node, "CALL agentvm.await('$session')", '57014', undef, 'await() does, too', dbname => 'timeouts');
	is(psql_ok($node, "SET statement_timeout = 0; SELECT agentvm.wait('$session')", 'without', dbname => 'timeouts'), 'ready', 'the dispatcher is not disturbed');
	is(psql_ok($node, 'SELECT pid FROM agentvm.stat_dispatcher', 'the dispatcher', dbname => 'timeouts'), $pid, 'nor restarted');
}

# Other encodings
database('latin1', "ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
{
	local $ENV{PGCLIENTENCODING} = 'UTF8';
	lives('latin1', team => "\xc3\xa4cme", agent => "c\xc3\xb6der");
	fails_with($node, "SELECT agentvm.create_team('acme'); SELECT agentvm.provision('acme', env => '{\"\xc3\xa4\": \"x\"}')", '22023', qr/Names of environment variables/, 'letters of variables are those of ASCII', dbname => 'latin1');
}
database('ascii', "ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0");
lives('ascii', team => "\xff\xfe", agent => "\xc3");
fails_with($node, "SELECT agentvm.create_team(E'a\\u0085b')", '22023', qr/control characters/, 'C1 control characters', dbname => 'plain');

done_testing();
