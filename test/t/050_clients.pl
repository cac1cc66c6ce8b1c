# The two Python libraries that applications use most: inside and outside of transactions, errors by SQLSTATE
use strict;
use warnings;
use AgentVM::Test;
use File::Basename qw(dirname);
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main');
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
make_role($node, 'app', login => 1, teams => ['acme']);
$node->safe_psql('postgres', 'GRANT CREATE ON SCHEMA public TO app');

my $host = $node->host =~ s/([^A-Za-z0-9])/sprintf('%%%02x', ord($1))/ger;
my %address = (
	psycopg => [ $node->connstr('postgres') . ' user=app', qw(transaction savepoint autocommit errors isolation) ],
	sqlalchemy => [ "postgresql+psycopg://app@/postgres?host=$host&port=" . $node->port, qw(orm many procedures errors) ]);
for my $client (sort keys %address)
{
	my ($address, @parts) = @{ $address{$client} };
	my $passed = IPC::Run::run([ "$ENV{AGENTVM_VENV}/bin/python", '-I', '-W', 'error', dirname(__FILE__) . "/../clients/with_$client.py", $address ], '<', \undef, '>', \my $out, '2>', \my $error);
	ok($passed, "$client") or diag($error);
	is($out, join('', map { "$_\n" } @parts), "$client: " . join(', ', @parts));
}

done_testing();
