# The engine reads and writes sessions below SQL where that is the same as SQL: what an administrator adds to the table is honoured
# all the same, and what users change meanwhile stays
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Test;
use IPC::Run qw(start);
use PostgreSQL::Test::Utils qw(slurp_file);
use Test::More;

my $node = new_node('main', conf => "agentvm.dispatchers = 0\nwal_level = logical\n");
my $client = AgentVM::Client->new($node);    # one backend for all, which has looked everything up before it changes
my $session;

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub provisioned { return $session = sql("SET client_min_messages = error; SELECT agentvm.provision('acme', options => '{\"launch_delay\": \"0\"}')"); }
sub dispatched { return $client->run('CALL agentvm.dispatch()'); }
sub launched { provisioned(); dispatched(); return column('session', 'state'); }
sub column { my ($table, $column) = @_; return sql("SELECT string_agg(($column)::text, ' ' ORDER BY $column) FROM agentvm.$table WHERE session_id = '$session'"); }
sub seen { return sql("SELECT string_agg(what, ' ' ORDER BY what) FROM public.seen WHERE session_id = '$session'"); }

$client->run("SET client_min_messages = error; SELECT agentvm.create_team('acme')");
sql("SELECT pg_create_logical_replication_slot('changes', 'test_decoding')");
is(launched(), 'ready', 'launched');
my $changes = sql("SELECT string_agg(data, E'\n') FROM pg_logical_slot_get_changes('changes', NULL, NULL)");
like($changes, qr/table agentvm\.session: UPDATE:.*session_id\[uuid\]:'$session'.*state\[text\]:'ready'/, 'what the engine changes is decoded');
sql("SELECT pg_drop_replication_slot('changes')");
is(column('session_event', "concat_ws('>', old_state, new_state)"), 'provisioning provisioning>ready', 'the trigger has logged it');

# columns that come and go under a backend that knows the table; what the engine knows nothing of stays
sql(q(ALTER TABLE agentvm.session ADD gone int DEFAULT 7, ADD fixed text DEFAULT 'fixed', ADD doubled int GENERATED ALWAYS AS (2 * attempt + CASE WHEN state = 'ready' THEN 1 ELSE 0 END) STORED;
	ALTER TABLE agentvm.session DROP gone; CREATE INDEX place ON agentvm.session ((vm_id || '!')) WHERE state = 'ready'));
provisioned();
sql("UPDATE agentvm.session SET fixed = repeat('long', 3000), tags = '{\"a\": 1}', payload_enc = repeat('x', 9000)::bytea WHERE session_id = '$session'");
dispatched();
is(column('session', "concat_ws(' ', state, md5(fixed) = md5(repeat('long', 3000)), doubled, tags, length(payload_enc))"), 'ready t 3 {"a": 1} 9000', 'generated columns follow, others stay');
my $vm = column('session', 'vm_id');
is(sql("SET enable_seqscan = off; SELECT session_id FROM agentvm.session WHERE vm_id || '!' = '$vm!' AND state = 'ready'"), $session, 'a new index is served');
sql('ALTER TABLE agentvm.session DROP fixed, DROP doubled; DROP INDEX agentvm.place');
sql("SELECT agentvm.terminate('$session')");
dispatched();
is(column('session', "concat_ws(' ', state, payload_enc IS NULL, handle IS NULL, next_check_at IS NULL)"), 'terminated t t t', 'a tombstone keeps nothing that only a live VM needs');

# constraints and triggers refuse what the engine writes, whose session is put off as it was
sql(q(ALTER TABLE agentvm.session ADD CONSTRAINT few CHECK (state <> 'ready') NOT VALID));
is(launched(), 'provisioning', 'a constraint holds');
like(slurp_file($node->logfile), qr/session $session is put off: .*"few"/, 'which is told');
sql('ALTER TABLE agentvm.session DROP CONSTRAINT few');
sql(<<'SQL');
CREATE TABLE public.seen (session_id uuid, what text);
CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not %', NEW.state; END $$;
CREATE FUNCTION public.before() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.detail := 'changed'; RETURN NEW; END $$;
CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (NEW.session_id, concat_ws('>', TG_ARGV[0], OLD.state, NEW.state)); RETURN NULL; END $$;
CREATE FUNCTION public.note_all() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen SELECT session_id, TG_ARGV[0] FROM news WHERE state = 'ready'; RETURN NULL; END $$;
CREATE FUNCTION public.again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE agentvm.session SET tags = tags || '{"again": 1}' WHERE session_id = NEW.session_id; RETURN NULL; END $$;
CREATE TRIGGER refuse AFTER UPDATE ON agentvm.session FOR EACH ROW WHEN (OLD.state = 'provisioning' AND NEW.state = 'ready') EXECUTE FUNCTION public.refuse();
SQL
is(launched(), 'provisioning', 'a trigger refuses');
is(column('session_event', "concat_ws('>', old_state, new_state)"), 'provisioning', 'and nothing is logged');
sql('DROP TRIGGER refuse ON agentvm.session');
sql("DELETE FROM agentvm.session WHERE state = 'provisioning'");

# other triggers
sql(q(CREATE TRIGGER after AFTER UPDATE ON agentvm.session FOR EACH ROW WHEN (OLD.state <> NEW.state) EXECUTE FUNCTION public.note('row')));
launched();
is(seen(), 'row>provisioning>ready', 'a trigger after each row sees both');
sql("SELECT agentvm.terminate('$session')");
dispatched();
is(seen(), 'row>provisioning>ready row>ready>terminating row>terminating>terminated', 'also of an end');
sql(q(DROP TRIGGER after ON agentvm.session; CREATE TRIGGER again AFTER UPDATE ON agentvm.session FOR EACH ROW WHEN (OLD.state <> NEW.state) EXECUTE FUNCTION public.again()));
provisioned();
sql("SELECT agentvm.terminate('$session')");
dispatched();
is(column('session', "concat_ws(' ', state, tags)"), 'terminated {"again": 1}', 'one that changes the row anew, between two changes of one transaction');
sql(q(DROP TRIGGER again ON agentvm.session; CREATE TRIGGER of AFTER UPDATE OF state ON agentvm.session FOR EACH ROW EXECUTE FUNCTION public.note('of')));
launched();
is(seen(), 'of>provisioning>ready', 'one that asks for columns');
sql(q(DROP TRIGGER of ON agentvm.session; CREATE TRIGGER statement AFTER UPDATE ON agentvm.session REFERENCING NEW TABLE AS news FOR EACH STATEMENT EXECUTE FUNCTION public.note_all('all')));
launched();
is(seen(), 'all', 'one for each statement');
sql(q(DROP TRIGGER statement ON agentvm.session; CREATE TRIGGER before BEFORE UPDATE ON agentvm.session FOR EACH ROW EXECUTE FUNCTION public.before()));
is(launched() . ' ' . column('session', 'detail'), 'ready changed', 'one before each row');
sql('DROP TRIGGER before ON agentvm.session');

# what others change at the same time: nothing is lost, nobody is put off
provisioned();
my $log = -s $node->logfile;
sql("CREATE PROCEDURE public.count_up(id uuid) LANGUAGE plpgsql AS \$\$ BEGIN FOR i IN 1 .. 500 LOOP
	UPDATE agentvm.session SET vcpus = coalesce(vcpus, 0) + 1, next_check_at = now() - interval '1 s' WHERE session_id = id; COMMIT; END LOOP; END \$\$");
my @calls = (("CALL public.count_up('$session');\n") x 2, ("CALL agentvm.dispatch();\n" x 200) x 2);
my @outputs = map { '' } @calls;
my @clients = map { start([ 'psql', '-XqAt', '-v', 'ON_ERROR_STOP=1', '-o', '/dev/null', '-d', $node->connstr('postgres') ], '<', \$calls[$_], '>&', \$outputs[$_]) } 0 .. $#calls;
ok((!grep { !$_->finish } @clients), 'users and two engines at the same row') or diag(@outputs);
is(column('session', "concat_ws(' ', state, vcpus)"), 'ready 1000', 'each change has been kept');
unlike(slurp_file($node->logfile, $log), qr/put off|concurrently/, 'no turn has failed');

# where transactions read as of their first statement, others' changes are serialization failures
my $snapshot = AgentVM::Client->new($node);
$snapshot->run('BEGIN ISOLATION LEVEL REPEATABLE READ');
$snapshot->run('SELECT 1');
sql("UPDATE agentvm.session SET tags = '{\"b\": 2}' WHERE session_id = '$session'");
$snapshot->send("SELECT agentvm.abandon()");
$snapshot->answer;
like($snapshot->error, qr/could not serialize/, 'abandon() above READ COMMITTED');

done_testing();
