# A session whose turn never ends (here an administrator's trigger): statement_timeout, which workers arm themselves, ends it
# after a minute, and it is put off. The others are served; it takes two or three minutes, since a worker first finds out whose
# fault it is.
use strict;
use warnings;
use AgentVM::Test;
use Test::More;

my $node = new_node('main', conf => "agentvm.sweep_interval = '1h'\n");
$node->safe_psql('postgres', <<'SQL');
SELECT agentvm.create_team('hung'), agentvm.create_team('noop');
CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(100000); RETURN NEW; END $$;
CREATE TRIGGER hang BEFORE UPDATE ON agentvm.session FOR EACH ROW WHEN (NEW.team_id = 'hung') EXECUTE FUNCTION hang();
BEGIN;
SELECT agentvm.provision('hung');
SELECT agentvm.provision('noop');
COMMIT;
SQL
my $pid = $node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher');
await($node, "SELECT state FROM agentvm.sessions WHERE team_id = 'noop'", 'ready', timeout => 240, name => 'the other session of the batch is served');
my $session = provision($node, 'noop');
await_state($node, $session, 'ready', timeout => 100);
is($node->safe_psql('postgres', "SELECT state FROM agentvm.sessions WHERE team_id = 'hung'"), 'provisioning', 'the one whose turn hangs is not');
is($node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher'), $pid, 'by the same worker');
like(log_text($node), qr/ERROR:  canceling statement due to statement timeout/, 'which has told why');

done_testing();
