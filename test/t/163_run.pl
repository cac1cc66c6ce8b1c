# CALL agentvm.run(): a VM for one command, which is gone afterwards whatever happens
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Control;
use AgentVM::Runtime;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);

# nothing but a wake-up ends a session here
my $node = new_node('main', conf => "agentvm.sweep_interval = '1h'\n");
$node->safe_psql('postgres', q{SELECT agentvm.create_team('acme'); SELECT agentvm.create_profile('vm', 'noop', options => '{"runtime": true}', runtime => true)});
make_role($node, 'alice', teams => ['acme']);
my $control = AgentVM::Control->new($node);
my $dir = $control->dir;

# The session of a run() that has just begun: it boots, and the gateway has it
sub boot
{
	my (%opt) = @_;
	my $new = q{SELECT session_id FROM agentvm.session WHERE state = 'provisioning' AND bound_pid IS NOT NULL};
	$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM ($new AND running) s") or die 'no session';
	my $session = $node->safe_psql('postgres', $new);
	return $session if $opt{asleep};
	bootstrap($node, $session);
	$control->attach($session);
	return $session;
}
sub ended { my ($session, $like, $name) = @_; await_state($node, $session, 'terminated'); return like(state_of($node, $session), $like, $name); }
sub command_begins { my ($session) = @_; my $end = time + 60; sleep 0.02 until $control->calls($session, 'start') || time > $end; return; }

# ---- all goes well ----
my $client = AgentVM::Client->new($node);
$client->send("SET ROLE alice; CALL agentvm.run('acme', 'echo out; echo err >&2; exit 3', 'vm')");
my $session = boot();
is($client->answer, "3|out\n|err\n", 'exit code and output');
ended($session, qr/^terminated requested agentvm.run\(\) has finished$/, 'the session has ended');
is($node->safe_psql('postgres', "SELECT created_by, bound_pid = " . $client->pid . " FROM agentvm.session WHERE session_id = '$session'"), 'alice|t', 'it was bound to its backend');
$client->run('RESET ROLE');
$client->send("CALL agentvm.run('acme', 'sleep 60', 'vm', timeout => '1 s')");
$session = boot();
like($client->answer, qr/^124\|/, 'a timeout is of the command');
ended($session, qr/has finished/, 'and ends the session as well');
$client->send("DO \$\$ DECLARE c int; o text; e text; BEGIN CALL agentvm.run('acme', 'printf done', 'vm', exit_code => c, stdout => o, stderr => e); RAISE NOTICE '% % %', c, o, e; END \$\$");
$session = boot();
$client->answer;
like($client->error, qr/NOTICE:.* 0 done/, 'from PL/pgSQL, outside of a transaction block');
ended($session, qr/has finished/, 'the same');

# ---- no snapshot is held while it waits ----
$client->run("SET default_transaction_isolation = 'serializable'");
my $waits = q{SELECT backend_xmin IS NULL FROM pg_stat_activity WHERE state = 'active' AND wait_event_type = 'Extension' AND pid = } . $client->pid;
$client->send("CALL agentvm.run('acme', 'until [ -e $dir/go ]; do sleep 0.1; done; echo waited', 'vm')");
$session = boot(asleep => 1);
await($node, $waits, 't', name => 'none until the VM is ready');
bootstrap($node, $session);
$control->attach($session);
command_begins($session);
await($node, $waits, 't', name => 'none while the command runs');
is($node->safe_psql('postgres', "SELECT agentvm.sweep(), state FROM agentvm.session WHERE session_id = '$session'"), '0|ready', 'a sweep leaves it alone');
append_to_file("$dir/go", '');
is($client->answer, "0|waited\n|", 'nor is it in its way');
ended($session, qr/has finished/, 'to the end');
$client->run('RESET default_transaction_isolation');

# ---- errors ----
$control->faults({ op => 'start', do => 429, times => 10 });
$client->send("CALL agentvm.run('acme', 'true', 'vm')");
$session = boot();
$client->answer;
like($client->error, qr/AV012.*too many calls/, 'an error is raised');
ended($session, qr/has f/, 'once the session has been ended');
$control->faults;
is($client->run('SELECT 1'), 1, 'the connection is as good as before');
$client->send("CALL agentvm.run('acme', 'true', 'vm')");
$session = boot(asleep => 1);
$node->safe_psql('postgres', "SELECT agentvm.terminate('$session', 'not today')");
$client->answer;
like($client->error, qr/AV006.*(is ending|has ended): requested.*not today/s, 'a session that somebody ends before it is ready');
$node->safe_psql('postgres', q{SELECT agentvm.create_profile('none', 'noop', options => '{"runtime": true, "fail": "capacity"}', runtime => true)});
$client->send("CALL agentvm.run('acme', 'true', 'none')");
$client->answer;
like($client->error, qr/AV002/, 'a VM that is not to be had');
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL AND state <> 'terminating'"), 0, 'nothing is left');

# ---- cancel, SIGTERM, a client that goes, a crash: before the VM is ready, and while the command runs ----
for my $when ('before it is ready', 'while the command runs')
{
	my %how = (
		cancel => sub { $node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $_[0]->pid . ')') },
		SIGTERM => sub { $node->safe_psql('postgres', 'SELECT pg_terminate_backend(' . $_[0]->pid . ')') },
		'a client that goes' => sub { $_[0]{psql}->kill_kill(grace => 0); delete $_[0]{psql} });
	for my $how (sort keys %how)
	{
		next if $how eq 'a client that goes' && $when =~ /before/;    # wait() hears of that from PostgreSQL, or not
		my $victim = AgentVM::Client->new($node);
		$victim->send("CALL agentvm.run('acme', 'exec sleep 600', 'vm')");
		$session = boot(asleep => $when =~ /before/);
		command_begins($session) unless $when =~ /before/;
		my $mark = $control->mark;
		my $since = time;
		$how{$how}->($victim);
		await($node, "SELECT state <> 'ready' AND state <> 'provisioning' FROM agentvm.session WHERE session_id = '$session'", 't', name => "$how $when: the session ends");
		cmp_ok(time - $since, '<', 3, "$how $when: soon");
		if ($when !~ /before/)
		{
			my $patience = time + 10;
			sleep 0.02 until (grep { $_->{event} eq 'close' } $control->logged($mark)) || time > $patience;
			ok(scalar(grep { $_->{event} eq 'close' } $control->logged($mark)), "$how $when: the gateway hears of it");
		}
		ended($session, $how eq 'cancel' ? qr/requested agentvm.run\(\) has failed/ : qr/requested the backend that it was for needs it no more/, "$how $when: the log says why");
		next unless $how eq 'cancel';
		$victim->answer;
		like($victim->error, qr/57014/, "$how $when: raised again");
		is($victim->run('SELECT 1'), 1, "$how $when: the backend lives");
	}
}

# ---- an end that cannot be committed by the backend itself ----
$node->safe_psql('postgres', q{CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.detail LIKE 'agentvm.run%' THEN RAISE 'not now'; END IF; RETURN NEW; END $$;
	CREATE TRIGGER refuse BEFORE UPDATE ON agentvm.session FOR EACH ROW EXECUTE FUNCTION refuse()});
$client->send("CALL agentvm.run('acme', 'true', 'vm')");
$session = boot();
$client->answer;
like($client->error, qr/not now/, 'an end that cannot be written is an error');
ended($session, qr/needs it no more/, 'and the dispatchers end the session');
$node->safe_psql('postgres', 'DROP TRIGGER refuse ON agentvm.session');

# ---- a crash of the server ----
my $victim = AgentVM::Client->new($node);
$victim->send("CALL agentvm.run('acme', 'exec sleep 600', 'vm')");
$session = boot();
command_begins($session);
$node->stop('immediate');
$node->start;
ended($session, qr/needs it no more/, 'a crash of the server');
eval { $victim->quit };

# ---- two at once; and the same by hand ----
my @clients = map { AgentVM::Client->new($node) } 1 .. 2;
$_->send("CALL agentvm.run('acme', 'sleep 600', 'vm')") for @clients;
$node->poll_query_until('postgres', q{SELECT count(*) = 2 FROM agentvm.session WHERE bound_pid IS NOT NULL AND state = 'provisioning' AND running}) or die;
my ($stays) = $node->safe_psql('postgres', 'SELECT session_id FROM agentvm.session WHERE ended_at IS NULL AND bound_pid = ' . $clients[0]->pid);
my ($goes) = $node->safe_psql('postgres', 'SELECT session_id FROM agentvm.session WHERE ended_at IS NULL AND bound_pid = ' . $clients[1]->pid);
$node->safe_psql('postgres', 'SELECT pg_terminate_backend(' . $clients[1]->pid . ')');
ended($goes, qr/needs it no more/, 'one goes');
like(state_of($node, $stays), qr/^provisioning/, 'the other one stays');
$node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $clients[0]->pid . ')');
ended($stays, qr/has failed/, 'until its own end');

done_testing();
