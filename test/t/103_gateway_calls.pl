# Calls of backends through agentvm-gateway to runtimes: see test/clients/gateway_calls.py
use strict;
use warnings;
use AgentVM::Test;
use File::Basename qw(dirname);
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main');
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme'); SELECT agentvm.create_profile('rt', 'noop', runtime => true); CREATE ROLE gw LOGIN IN ROLE agentvm_gateway;
	INSERT INTO agentvm.gateway (gateway_id) VALUES ('gw1'), ('gw2')");
my $gateway = dirname(__FILE__) . '/../../src/gateway/agentvm-gateway';
local $ENV{PG_CTL} = 'pg_ctl -w -s -D ' . $node->data_dir . ' -l ' . $node->logfile;
local $ENV{SERVER_LOG} = $node->logfile;
my @parts = $ENV{AGENTVM_GATEWAY_PARTS} ? split(/ /, $ENV{AGENTVM_GATEWAY_PARTS}) : qw(functions rights call audit order refused tickets keys owned transfers ended restart hostile many bounds listeners tls drain memory cable messages locks);
for my $part (@parts)
{
	my $passed = IPC::Run::run([ "$ENV{AGENTVM_VENV}/bin/python", '-I', dirname(__FILE__) . '/../clients/gateway_calls.py', $node->connstr('postgres'), $node->basedir . '/keys', $gateway, PostgreSQL::Test::Utils::tempdir_short(), $part ],
		'<', \undef, '>', \my $out, '2>', \my $error);
	ok($passed && $out eq "$part\n", $part) or diag($error);
}
done_testing();
