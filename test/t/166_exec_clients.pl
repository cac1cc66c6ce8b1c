# The libraries that applications use: each provisions a real VM, runs commands in it, moves files, and ends it, in and out
# of transactions
use strict;
use warnings;
use AgentVM::Stack;
use AgentVM::Test;
use File::Basename qw(dirname);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

# JDBC knows no Unix sockets
my $stack = AgentVM::Stack->new(conf => "listen_addresses = '127.0.0.1'\n");
my $node = $stack->node;
make_role($node, 'app', login => 1, teams => ['acme']);

my $clients = dirname(__FILE__) . '/../clients';
my @python = ("$ENV{AGENTVM_VENV}/bin/python", '-I', '-W', 'error');
my %command = (
	psycopg => [ @python, "$clients/vm_psycopg.py", $node->host ],
	sqlalchemy => [ @python, "$clients/vm_sqlalchemy.py", $node->host ],
	django => [ @python, "$clients/vm_django.py", $node->host ],
	node => [ 'node', "$clients/vm_node.js", $node->host ],
	jdbc => [ 'java', '-cp', '/usr/share/java/postgresql.jar', "$clients/VmJdbc.java", '127.0.0.1' ]);
for my $client (sort keys %command)
{
	local $ENV{NODE_PATH} = "$ENV{AGENTVM_VENV}/share/node/node_modules";
	my $passed = IPC::Run::run([ @{ $command{$client} }, $node->port ], '<', \undef, '>', \my $out, '2>', \my $error, IPC::Run::timeout($AgentVM::Stack::patience));
	ok($passed, "$client") or diag($error);
	is($out, "outside\ninside\nerrors\n", "$client: outside and inside of transactions, errors by SQLSTATE");
}
is($node->safe_psql('postgres', 'SELECT count(DISTINCT session_id) FROM agentvm.sessions'), scalar(keys %command), 'a VM each, and none for what was rolled back');
$stack->ended($_, 'requested') for split /\n/, $node->safe_psql('postgres', 'SELECT session_id FROM agentvm.sessions');

done_testing();
