# The main job: one SQL call launches one EC2 instance over the wire, request signatures verified; it is taken away
use strict;
use warnings;
use AgentVM::Moto;
use AgentVM::Test;
use Test::More;

my $moto = AgentVM::Moto->new;
my $node = new_node('main', moto => $moto);

$node->safe_psql('postgres', "SELECT agentvm.create_team('acme', 'ec2')");
set_ec2($node, 'acme', $moto);
$node->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");

my $session = provision($node, 'acme', "agent_id => 'coder'", "profile => 'plain'");
await_state($node, $session, 'ready');
my @vms = $moto->for_session($session);
is(@vms, 1, 'one instance');
is($vms[0]{state}, 'running', 'it is running');
is($vms[0]{tags}{'agentvm-team-id'}, 'acme', 'and tagged with its team');
is($node->safe_psql('postgres', "SELECT vm_id FROM agentvm.sessions WHERE session_id = '$session'"), $vms[0]{id}, 'the row names it');

psql_ok($node, "SELECT agentvm.terminate('$session')", 'terminate');
await_state($node, $session, 'terminated');
is(($moto->for_session($session))[0]{state}, 'terminated', 'the instance is gone');
is(scalar $moto->running, 0, 'nothing runs');
log_lacks($node, $moto->secrets->{secret_access_key}, 'no secret key in the server log');

done_testing();
