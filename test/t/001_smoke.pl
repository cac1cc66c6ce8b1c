# The shortest life of a session: noop, by the background worker and by dispatch()
use strict;
use warnings;
use AgentVM::Test;
use Test::More;

my $node = new_node('main');

$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $session = provision($node, 'acme', "agent_id => 'coder'");
is($node->safe_psql('postgres', "SELECT agentvm.wait('$session')"), 'ready', 'ready');
psql_ok($node, "SELECT agentvm.terminate('$session')", 'terminate');
is($node->safe_psql('postgres', "SELECT agentvm.wait('$session', 'terminated')"), 'terminated', 'terminated');
is(state_of($node, $session) =~ s/ \{.*//r, 'terminated requested', 'for the reason given');

done_testing();
