# agentvm-gateway as VMs and operators see it: see test/clients/gateway.py
use strict;
use warnings;
use AgentVM::Test;
use File::Basename qw(dirname);
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main');
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme'); SELECT agentvm.create_profile('rt', 'noop', runtime => true); CREATE ROLE gw LOGIN IN ROLE agentvm_gateway; CREATE ROLE stranger LOGIN");
my $gateway = dirname(__FILE__) . '/../../src/gateway/agentvm-gateway';
local $ENV{PG_CTL} = 'pg_ctl -w -s -D ' . $node->data_dir . ' -l ' . $node->logfile;
my @options = $ENV{AGENTVM_GATEWAY_PARTS} ? split(/ /, $ENV{AGENTVM_GATEWAY_PARTS}) : qw(bootstrap heartbeat channel limits bounds neighbours hostile log tls options drain clock committed database);
for my $part (@options)
{
	my $passed = IPC::Run::run([ "$ENV{AGENTVM_VENV}/bin/python", '-I', dirname(__FILE__) . '/../clients/gateway.py', $node->connstr('postgres'), $node->basedir . '/keys', $gateway, PostgreSQL::Test::Utils::tempdir(), $part ],
		'<', \undef, '>', \my $out, '2>', \my $error);
	ok($passed && $out eq "$part\n", $part) or diag($error);
}
done_testing();
