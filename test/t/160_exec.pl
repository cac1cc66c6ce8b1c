# Commands in VMs, as SQL has them
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Control;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);

my $node = new_node('main');
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $control = AgentVM::Control->new($node);
my $session = $control->session('acme');

is($node->safe_psql('postgres', "SELECT exit_code, stdout, stderr, duration < '10 s', timed_out, truncated FROM agentvm.exec('$session', 'echo hello; echo oops >&2; exit 3')"), "3|hello\n|oops\n|t|f|f", 'a command');
done_testing();
