# pg_dump and restore into another database of the cluster; what CREATE EXTENSION refuses; default privileges of the database
use strict;
use warnings;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main');

# ---- dump and restore ----
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme', limits => '{\"max_sessions\": 20}'); SELECT agentvm.create_team('gone'); SELECT agentvm.create_profile('p', 'noop', team_id => 'acme'); SELECT agentvm.create_profile('all', 'noop')");
make_role($node, 'alice', teams => ['acme', 'gone']);
$node->safe_psql('postgres', "SET log_statement = none; SELECT agentvm.set_provider('acme', 'ec2', '{\"region\": \"eu-west-1\"}', '{\"access_key_id\": \"AKIAEXAMPLE\", \"secret_access_key\": \"x\"}')");
my $live = provision($node, 'acme', "env => '{\"A\": \"b\"}'", "options => '{\"runtime\": true}'", "idempotency_key => 'k'");
my $ended = provision($node, 'gone');
await_state($node, $ended, 'ready');
$node->safe_psql('postgres', "SELECT agentvm.terminate('$ended')");
await_state($node, $ended, 'terminated');
$node->safe_psql('postgres', "SELECT agentvm.drop_team('gone'); INSERT INTO agentvm.gateway (gateway_id) VALUES ('g'); INSERT INTO agentvm.session_hydrating VALUES ('$live', 'infinity')");
await($node, "SELECT running FROM agentvm.session WHERE session_id = '$live'");
psql_ok($node, "SELECT agentvm.bootstrap(token_sha256, sha256('x'), 'boot') FROM agentvm.session_token WHERE session_id = '$live'", 'bootstrap');
await_state($node, $live, 'ready');

my @tables = qw(team team_member former_team provider_config provider_secret profile session session_heartbeat session_ending session_hydrating session_token session_event gateway);
my $all = join(' UNION ALL ', map { "SELECT '$_', count(*), md5(string_agg(t::text, E'\\n' ORDER BY t::text)) FROM agentvm.$_ t" } @tables);
is($node->safe_psql('postgres', "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relnamespace = 'agentvm'::regnamespace AND relkind IN ('r', 'S') "
	  . "AND NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'agentvm' AND pg_class.oid = ANY (extconfig))"), 'inventory sweep_hold vm_drift', 'every table and sequence goes into a dump, but for what is found anew');
my $storage = "SELECT string_agg(oid::regclass || ' ' || reloptions::text, E'\n' ORDER BY 1) FROM pg_class WHERE relnamespace = 'agentvm'::regnamespace AND relkind = 'r'";
like($node->safe_psql('postgres', $storage), qr/agentvm\.session \{fillfactor=85,autovacuum_vacuum_scale_factor=0\.05\}/, 'autovacuum looks after the sessions');
for my $format (qw(plain custom inserts))
{
	my $db = "restored_$format";
	my $file = $node->basedir . "/$format";
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	command_ok([ 'pg_dump', '-f', $file, $format eq 'custom' ? '-Fc' : $format eq 'inserts' ? '--inserts' : '-Fp', '-d', $node->connstr('postgres') ], "$format: pg_dump");
	command_ok($format eq 'custom' ? [ 'pg_restore', '--exit-on-error', '-d', $node->connstr($db), $file ] : [ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-o', $node->basedir . '/out', '-d', $node->connstr($db), '-f', $file ], "$format: restore");
	is($node->safe_psql($db, $all), $node->safe_psql('postgres', $all), "$format: every row of every table is there");
	is($node->safe_psql($db, $storage), $node->safe_psql('postgres', $storage), "$format: tables are stored as before");

	# nothing in it acts: nobody serves this database, and its rows are as they were
	like(fails_or_warns($db, "SELECT agentvm.provision('acme', idempotency_key => 'new')"), qr/WARNING:  no agentvm dispatcher serves this database/, "$format: provision() works, and warns");
	is($node->safe_psql($db, "SELECT count(*) FROM agentvm.session"), 3, "$format: a new row");
	psql_ok($node, "INSERT INTO agentvm.session_event (session_id, team_id, kind) VALUES ('$live', 'acme', 'test')", "$format: the sequence goes on", dbname => $db);
	is($node->safe_psql($db, "SELECT max(event_id) - (SELECT event_id FROM agentvm.session_event WHERE kind = 'test') FROM agentvm.session_event"), 0, "$format: after all events");
	is($node->safe_psql($db, "SELECT agentvm.provision('acme', env => '{\"A\": \"b\"}', options => '{\"runtime\": true}', idempotency_key => 'k')"), $live, "$format: keys are still known");
	is($node->safe_psql($db, "SET ROLE alice; SELECT agentvm.visible_teams()"), '{acme}', "$format: members, too");
	fails_with($node, "UPDATE agentvm.session SET state = 'ready', ended_at = NULL, end_reason = NULL WHERE session_id = '$ended'", '23000', undef, "$format: the state machine holds", dbname => $db);
	fails_with($node, 'DELETE FROM agentvm.session_event', '42501', undef, "$format: the log, too", dbname => $db);
}
# a dump of the restored one, and of the first one with the log in it, is no different
command_ok([ 'pg_dump', '-Fc', '-f', $node->basedir . '/again', '-d', $node->connstr('restored_plain') ], 'a dump of what was restored');

# another cluster, where alice and everybody else has another number: members are the roles of the same names
{
	my $elsewhere = new_node('elsewhere', extension => 0, databases => '');
	my $numbers = "SELECT string_agg(oid::text, ',' ORDER BY rolname) FROM pg_roles WHERE rolname IN ('alice', 'stranger')";
	$node->safe_psql('postgres', "CREATE ROLE stranger; SELECT agentvm.add_member('acme', 'stranger')");
	my ($alice, $stranger) = split(/,/, $node->safe_psql('postgres', $numbers));
	$node->safe_psql('postgres', 'DROP ROLE stranger');
	$elsewhere->safe_psql('postgres', "SET allow_system_table_mods = on; CREATE ROLE agentvm_user; CREATE ROLE mallory1; CREATE ROLE mallory2; CREATE ROLE alice");
	$elsewhere->safe_psql('postgres', "SET allow_system_table_mods = on; UPDATE pg_authid SET oid = CASE rolname WHEN 'mallory1' THEN $alice ELSE $stranger END WHERE rolname IN ('mallory1', 'mallory2')");
	command_ok([ 'pg_dump', '-f', $node->basedir . '/members', '-d', $node->connstr('postgres') ], 'pg_dump with a member that is gone');
	command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-o', $node->basedir . '/out', '-d', $elsewhere->connstr('postgres'), '-f', $node->basedir . '/members' ], 'restore into another cluster');
	is($elsewhere->safe_psql('postgres', "SELECT team_id, role FROM agentvm.team_member"), 'acme|alice', 'the member is the one of that name');
	is($elsewhere->safe_psql('postgres', "GRANT agentvm_user TO mallory1, mallory2; SET ROLE $_; SELECT agentvm.visible_teams()"), '{}', "$_, who has the number of a member, is none") for qw(mallory1 mallory2);
	$elsewhere->stop;
}

sub fails_or_warns
{
	my ($db, $sql) = @_;
	my ($out, $error);
	$node->psql($db, $sql, stdout => \$out, stderr => \$error);
	return $error;
}

# ---- CREATE EXTENSION: a schema of somebody else's, or with something in it ----
$node->safe_psql('postgres', 'CREATE DATABASE fresh; CREATE ROLE mallory; CREATE ROLE other SUPERUSER LOGIN; CREATE ROLE reader; CREATE ROLE writer');
$node->safe_psql('fresh', 'CREATE EXTENSION pgcrypto; GRANT CREATE ON DATABASE fresh TO mallory');
for my $sql ('CREATE SCHEMA agentvm AUTHORIZATION mallory', 'CREATE SCHEMA agentvm AUTHORIZATION other', 'CREATE SCHEMA agentvm; CREATE TABLE agentvm.x ()', 'CREATE SCHEMA agentvm; CREATE VIEW agentvm.x AS SELECT 1',
	'CREATE SCHEMA agentvm; CREATE FUNCTION agentvm.x() RETURNS int LANGUAGE sql AS $$ SELECT 1 $$', 'CREATE SCHEMA agentvm; CREATE TYPE agentvm.x AS ENUM ()', 'CREATE SCHEMA agentvm; CREATE DOMAIN agentvm.x AS int',
	'CREATE SCHEMA agentvm; CREATE SEQUENCE agentvm.x', 'CREATE SCHEMA agentvm; CREATE OPERATOR agentvm.= (FUNCTION = texteq, LEFTARG = text, RIGHTARG = text)',
	'CREATE SCHEMA agentvm; CREATE COLLATION agentvm.x FROM "C"', 'CREATE SCHEMA agentvm; CREATE OPERATOR FAMILY agentvm.x USING btree')
{
	fails_with($node, "BEGIN; $sql; CREATE EXTENSION agentvm; ", '42P06', qr/belongs to another role or is not empty/, "refused: $sql", dbname => 'fresh');
}
is($node->safe_psql('fresh', "SELECT count(*) FROM pg_namespace WHERE nspname = 'agentvm'"), 0, 'nothing is left');
fails_with($node, 'CREATE EXTENSION agentvm', '42704', qr/required extension "pgcrypto"/, 'without CASCADE pgcrypto has to be there', dbname => 'template1');

# ---- default privileges of the database give nobody any right ----
$node->safe_psql('fresh', <<'SQL');
ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO reader;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO writer;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO writer, PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO writer;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC;
CREATE EXTENSION agentvm;
SQL
is($node->safe_psql('fresh', <<'SQL'), '', 'rights are those of the agentvm roles only');
SELECT o.what, a.grantee, a.privilege_type FROM (
	SELECT nspname::text AS what, nspowner AS owner, nspacl AS acl FROM pg_namespace WHERE nspname = 'agentvm'
	UNION ALL SELECT oid::regclass::text, relowner, relacl FROM pg_class WHERE relnamespace = 'agentvm'::regnamespace
	UNION ALL SELECT oid::regprocedure::text, proowner, proacl FROM pg_proc WHERE pronamespace = 'agentvm'::regnamespace) o, aclexplode(o.acl) a
WHERE a.grantee <> o.owner AND (a.grantee = 0 OR a.grantee::regrole::text !~ '^agentvm_')
SQL
is($node->safe_psql('fresh', 'SELECT bool_and(proacl IS NOT NULL) FROM pg_proc WHERE pronamespace = \'agentvm\'::regnamespace'), 't', 'and PUBLIC has lost what it has by default');
psql_ok($node, 'DROP EXTENSION agentvm; CREATE EXTENSION agentvm', 'it can be dropped and created again', dbname => 'fresh');

# ---- roles of our names that may do too much ----
$node->stop;
my $other = new_node('roles', extension => 0);
for my $role ('agentvm_admin SUPERUSER', 'agentvm_user LOGIN', 'agentvm_gateway SUPERUSER LOGIN', 'agentvm_monitor LOGIN')
{
	fails_with($other, "BEGIN; CREATE ROLE $role; CREATE EXTENSION agentvm CASCADE", '42710', qr/role "agentvm_\w+" exists and is a superuser or may log in/, "refused: $role");
}
is($other->safe_psql('postgres', "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'agentvm%'"), 0, 'no role is left');
psql_ok($other, 'CREATE ROLE agentvm_admin; CREATE ROLE agentvm_user NOLOGIN; CREATE EXTENSION agentvm CASCADE', 'harmless ones are taken');
my $warns = sub { my ($error) = ($other->psql($_[0], 'CREATE EXTENSION agentvm CASCADE'))[2]; return $error; };
$other->safe_psql('postgres', 'CREATE ROLE boss SUPERUSER; CREATE ROLE ann; GRANT agentvm_user TO ann; GRANT agentvm_admin TO boss WITH ADMIN OPTION; CREATE DATABASE second; CREATE DATABASE third');
unlike($warns->('second'), qr/WARNING/, 'members are no surprise');
$other->safe_psql('postgres', 'CREATE ROLE mallory CREATEROLE; GRANT agentvm_admin TO mallory WITH ADMIN OPTION');
like($warns->('third'), qr/WARNING:  role "mallory", which is no superuser, may grant role "agentvm_admin".*\nHINT:.* REVOKE agentvm_admin FROM mallory/, 'but who may make members and is no superuser is named');

done_testing();
