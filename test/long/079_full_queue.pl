# The server's queue of notices is full (a listener who never ends his transaction, others who notify): hints are lost, nothing else.
# Before 17 the queue is 8 GB, which is written to disk here.
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Listener;
use AgentVM::Test;
use Test::More;

my $node = new_node('main');
if ($node->safe_psql('postgres', 'SHOW server_version_num') >= 170000)
{
	$node->append_conf('postgresql.conf', "max_notify_queue_pages = 64\n");
	$node->restart;
}
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
await_state($node, provision($node, 'acme'), 'ready');
my $channel = $node->safe_psql('postgres', "SELECT agentvm.channel('acme')");
my $listener = AgentVM::Listener->new($node, $channel);
my $idle = AgentVM::Client->new($node);
$idle->run('LISTEN other');
$idle->run('BEGIN');
$idle->run('SELECT 1');

# ---- fill it ----
my ($code, undef, $error) = $node->psql('postgres', <<'SQL', timeout => 1800);
SET log_statement = none;
DO $$
BEGIN
	FOR i IN 1 .. 1100000 LOOP
		PERFORM pg_notify('other', lpad(i::text, 7990, 'x'));
		IF i % 100 = 0 THEN COMMIT; END IF;
	END LOOP;
END
$$
SQL
like($error, qr/ERROR:  too many notifications in the NOTIFY queue/, 'the queue is full');

# ---- the engine goes on ----
my @sessions = split /\n/, $node->safe_psql('postgres', "SELECT agentvm.provision('acme') FROM generate_series(1, 200)");
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 201, name => 'sessions are launched');
$node->safe_psql('postgres', 'SELECT agentvm.terminate(session_id) FROM agentvm.sessions');
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'terminated'", 201, name => 'and ended');
is(scalar $listener->heard, 0, 'nobody hears of them');
like(log_text($node), qr/LOG:  agentvm: changes of state are not announced: too many notifications in the NOTIFY queue/, 'the log says so');
is($node->safe_psql('postgres', "SELECT string_agg(name, ' ') FROM agentvm.health WHERE NOT ok") // '', '', 'nothing else is wrong');

# ---- until there is room again ----
# (he is ended: to read it all would take him long)
$node->safe_psql('postgres', 'SELECT pg_terminate_backend(' . $idle->pid . ')');
my ($session, $tries) = ('', 0);
do { $session = provision($node, 'acme'); await_state($node, $session, 'ready'); sleep 1 } until $listener->of($session) || ++$tries > 60;
ok(scalar $listener->of($session), 'then changes are announced again');
is(scalar(map { $listener->of($_) } @sessions), 0, 'those that were lost are not');
done_testing();
