# synchronous_commit = off, and a crash while a launch is under way: what was committed before the call is still there
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;

# the WAL writer is slow, so that what nobody waits for is not on disk soon
my ($node, $faults, $moto) = ec2_node('main', conf => "synchronous_commit = off\nwal_writer_delay = '10s'\n");
$node->safe_psql('postgres', 'CHECKPOINT');
$faults->set(mode => 'slow', ms => 10000, action => 'RunInstances', n => 1);
my $session = launch($node, 'acme');
await($node, "SELECT lease IS NOT NULL FROM agentvm.session WHERE session_id = '$session'", 't', name => 'the call is under way');
my $tries = 0;
select undef, undef, undef, 0.05 until $faults->count('RunInstances') || ++$tries > 1000;
$node->stop('immediate');
$node->start;
is($node->safe_psql('postgres', "SELECT handle IS NOT NULL FROM agentvm.session WHERE session_id = '$session'"), 't', 'after a crash the session is there, and its launch');
hurry_to($node, $session, 'ready');
is(scalar vms_of($moto, $session), 1, 'it has one VM');
done_testing();
