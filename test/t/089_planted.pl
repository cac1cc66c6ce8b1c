# What the owner of a database, who is no superuser, has planted there is not run when a superuser creates or updates the extension
use strict;
use warnings;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', extension => 0, databases => '');
$node->safe_psql('postgres', 'CREATE ROLE mallory LOGIN');

# They match better than PostgreSQL's own, do what those do, and make mallory a superuser if a superuser runs them
my %planted = (
	'format(text, text) RETURNS text' => 'pg_catalog.format($1, VARIADIC ARRAY[$2])',
	'format(text, text, text, text) RETURNS text' => 'pg_catalog.format($1, VARIADIC ARRAY[$2, $3, $4])',
	'same(oid, regnamespace) RETURNS bool' => '$1 OPERATOR(pg_catalog.=) $2::oid');
my $plant = 'GRANT USAGE, CREATE ON SCHEMA public TO mallory; SET ROLE mallory;'
  . join('', map { "CREATE FUNCTION public.$_ LANGUAGE plpgsql AS \$\$ BEGIN IF current_setting('is_superuser')::bool THEN ALTER ROLE mallory SUPERUSER; END IF; RETURN $planted{$_}; END \$\$;" } sort keys %planted)
  . 'CREATE OPERATOR public.= (FUNCTION = public.same, LEFTARG = oid, RIGHTARG = regnamespace)';
my $is_super = "SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'";

foreach my $database (qw(fresh updated))
{
	my $update = $database eq 'updated';
	my @db = (dbname => $database);
	$node->safe_psql('postgres', "CREATE DATABASE $database OWNER mallory");
	$node->safe_psql($database, "CREATE EXTENSION agentvm VERSION '0.1' CASCADE") if $update; # has the hole, and is released
	$node->safe_psql($database, $plant);
	psql_ok($node, $update ? 'ALTER EXTENSION agentvm UPDATE' : 'CREATE EXTENSION agentvm CASCADE', "$database: by a superuser", @db);
	is($node->safe_psql('postgres', $is_super), 'f', "$database: the owner of the database is none");
	foreach my $call ("format('%s'::text, 'x'::text)", "format('%s'::text, 'x'::text, 'x'::text, 'x'::text)", "'1'::oid = 'agentvm'::regnamespace")
	{
		is($node->safe_psql($database, "BEGIN; SELECT FROM (SELECT $call OFFSET 0) AS planted (x) WHERE x IS NOT NULL; $is_super; ROLLBACK") =~ s/^\n//r, 't', "$database: which $call makes him");
	}
}

done_testing();
