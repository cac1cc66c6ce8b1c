# Rows are inserted below SQL where that is the same as SQL: what an administrator adds to the tables is honoured all the same
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Test;
use Test::More;

my $node = new_node('main', conf => "agentvm.dispatchers = 0\nwal_level = logical\n");
my $client = AgentVM::Client->new($node);    # one backend for all, which has looked everything up before it changes
my $session;

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub provisioned { return $session = $client->run("SET client_min_messages = error; SELECT agentvm.provision('acme')"); }
sub dispatched { return $client->run('CALL agentvm.dispatch()'); }
sub column { my ($table, $column) = @_; return sql("SELECT string_agg(($column)::text, ' ' ORDER BY $column) FROM agentvm.$table WHERE session_id = '$session'"); }

$client->run("SELECT agentvm.create_team('acme')");
sql("SELECT pg_create_logical_replication_slot('changes', 'test_decoding')");
provisioned();
dispatched();
is(column('session', "concat_ws(' ', state, attempt, retries, running, next_check_at = deadline_at, tags, created_by)"), 'ready 1 0 t t {} postgres', 'defaults are filled in');
is(column('session_event', "concat_ws('>', old_state, new_state)"), 'provisioning provisioning>ready', 'events of the function and of the trigger');
my $changes = sql("SELECT string_agg(data, E'\n') FROM pg_logical_slot_get_changes('changes', NULL, NULL)");
like($changes, qr/table agentvm\.session: INSERT: session_id\[uuid\]:'$session'/, 'the session is decoded');
like($changes, qr/table agentvm\.session_event: INSERT:.*'$session'.*new_state\[text\]:'ready'/, 'and its events');
sql("SELECT pg_drop_replication_slot('changes')");

# columns that come and go under a backend that knows the table
sql(q(CREATE SEQUENCE public.numbers; ALTER TABLE agentvm.session ADD gone int DEFAULT 7, ADD fixed text DEFAULT 'fixed', ADD number int DEFAULT nextval('public.numbers'),
	ADD doubled int GENERATED ALWAYS AS (2 * attempt) STORED; ALTER TABLE agentvm.session DROP gone; ALTER TABLE agentvm.session_event ADD fixed int DEFAULT 11));
my $last = sql('SELECT last_value FROM public.numbers');
provisioned();
is(column('session', "concat_ws(' ', fixed, number - $last, doubled)"), 'fixed 1 2', 'new columns get their defaults');
is(column('session_event', 'fixed'), '11', 'in the log, too');
sql('ALTER TABLE agentvm.session DROP fixed, DROP number, DROP doubled; ALTER TABLE agentvm.session_event DROP fixed');

# constraints and indexes
sql(q(ALTER TABLE agentvm.session ADD CONSTRAINT few CHECK (team_id <> 'acme') NOT VALID));
fails_with($node, "SELECT agentvm.provision('acme')", '23514', qr/"few"/, 'a constraint holds');
$client->send("SELECT agentvm.provision('acme')");
$client->answer;
like($client->error, qr/23514/, 'for a backend that knew the table without it');
sql('ALTER TABLE agentvm.session DROP CONSTRAINT few; CREATE UNIQUE INDEX one ON agentvm.session ((lower(team_id))) WHERE ended_at IS NULL AND agent_id IS NOT NULL');
$client->run("SELECT agentvm.provision('acme', 'x')");
fails_with($node, "SELECT agentvm.provision('acme', 'y')", '23505', qr/"one"/, 'an index, too');
sql('DROP INDEX agentvm.one');

# triggers and rules
sql(<<'SQL');
CREATE TABLE public.seen (session_id uuid, what text);
CREATE FUNCTION public.before() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.detail := 'changed'; RETURN NEW; END $$;
CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (NEW.session_id, TG_ARGV[0]); RETURN NULL; END $$;
CREATE FUNCTION public.note_all() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen SELECT session_id, TG_ARGV[0] FROM news; RETURN NULL; END $$;
CREATE TRIGGER before BEFORE INSERT ON agentvm.session FOR EACH ROW EXECUTE FUNCTION public.before();
SQL
provisioned();
is(column('session', 'detail'), 'changed', 'a BEFORE trigger');
sql(q(DROP TRIGGER before ON agentvm.session; CREATE TRIGGER after AFTER INSERT ON agentvm.session_event FOR EACH ROW EXECUTE FUNCTION public.note('event');
	CREATE TRIGGER statement AFTER INSERT ON agentvm.session REFERENCING NEW TABLE AS news FOR EACH STATEMENT EXECUTE FUNCTION public.note_all('session')));
provisioned();
dispatched();
is(sql("SELECT string_agg(what, ' ' ORDER BY what) FROM public.seen WHERE session_id = '$session'"), 'event event session', 'AFTER triggers, of rows and of statements');
sql('DROP TRIGGER after ON agentvm.session_event; DROP TRIGGER statement ON agentvm.session');
sql(q(CREATE RULE also AS ON INSERT TO agentvm.session_event DO ALSO INSERT INTO public.seen VALUES (NEW.session_id, 'rule')));
provisioned();
is(sql("SELECT what FROM public.seen WHERE session_id = '$session'"), 'rule', 'a rule');
sql('DROP RULE also ON agentvm.session_event');

# where nothing may be written, and at other levels of isolation
fails_with($node, "BEGIN READ ONLY; SELECT agentvm.provision('acme')", '25006', qr/INSERT in a read-only/, 'a transaction that is read-only');
$session = sql("SET client_min_messages = error; BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT agentvm.provision('acme'); COMMIT");
is(column('session_event', 'new_state'), 'provisioning', 'a serializable one');
$client->run("BEGIN; SELECT agentvm.provision('acme'); SAVEPOINT a; SELECT agentvm.provision('acme'); ROLLBACK TO a; COMMIT");
is(sql('SELECT count(*) FROM agentvm.session_event e WHERE NOT EXISTS (SELECT FROM agentvm.session s WHERE s.session_id = e.session_id)'), 0, 'a savepoint takes both rows back');

# another extension of the same name
sql('DELETE FROM agentvm.session; DROP EXTENSION agentvm CASCADE; CREATE EXTENSION agentvm');
$client->run("SELECT agentvm.create_team('acme')");
provisioned();
is(column('session_event', 'new_state'), 'provisioning', 'the backend finds the new tables');

done_testing();
