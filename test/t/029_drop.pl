# Letting go: of the extension, of a database, while idle and in mid-call
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(time);

my $faults = AgentVM::Faults->new;
my $node = new_node('main', moto => $faults, databases => 'postgres, served', conf => "agentvm.sweep_interval = '1h'\n");

# SQL that must be done within so many seconds
sub prompt
{
	my ($sql, $seconds, $name) = @_;
	my $started = time;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	psql_ok($node, $sql, $name);
	return cmp_ok(time - $started, '<', $seconds, "within $seconds s");
}

# A launch whose answer takes 3 s, on its way
sub call_in_flight
{
	my ($dbname) = @_;
	my $before = $faults->count('RunInstances');
	$node->safe_psql($dbname, "SELECT agentvm.provision('acme', profile => 'plain')");
	my $end = time + 30;
	Time::HiRes::sleep(0.01) while $faults->count('RunInstances') == $before && time < $end;
	return;
}
sub set_up
{
	my ($dbname) = @_;
	$node->safe_psql($dbname, "SELECT agentvm.create_team('acme', 'ec2'); SELECT agentvm.create_profile('plain', 'ec2', runtime => false); "
		  . "SET log_statement = none; SELECT agentvm.set_provider('acme', 'ec2', " . json($faults->options) . ', ' . json($faults->secrets) . ')');
	return;
}
sub serves
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$node->safe_psql('postgres', "SELECT agentvm.create_team('noop')");
	my $session = provision($node, 'noop');
	return is($node->safe_psql('postgres', "SELECT agentvm.wait('$session', timeout => '5 s')"), 'ready', $name);
}

# The extension goes while idle, and comes back: the dispatcher that has waited for it serves again
serves('it serves');
my $pid = $node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher');
fails_with($node, 'DROP EXTENSION agentvm', '55006', undef, 'DROP EXTENSION while a VM lives is refused');
prompt('SELECT * FROM agentvm.abandon(); DROP EXTENSION agentvm', 2, 'DROP EXTENSION while idle');
my $now = $node->safe_psql('postgres', 'SELECT clock_timestamp() FROM pg_reload_conf()');
await($node, "SELECT state_change > '$now' AND state = 'idle' FROM pg_stat_activity WHERE pid = $pid", 't', name => 'the dispatcher has seen that it is gone');
prompt('CREATE EXTENSION agentvm', 5, 'CREATE EXTENSION');
await($node, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 't', name => 'and that it is back');
serves('it serves again');
is($node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher'), $pid, 'the same dispatcher');

# The same in mid-call
$faults->set(mode => 'canned', ms => 3000, action => 'RunInstances');
set_up('postgres');
call_in_flight('postgres');
fails_with($node, 'DROP EXTENSION agentvm', '55006', undef, 'DROP EXTENSION in mid-call is refused');
prompt('SELECT * FROM agentvm.abandon(); DROP EXTENSION agentvm', 2, 'with abandon() it works');
prompt('CREATE EXTENSION agentvm', 5, 'CREATE EXTENSION');
serves('it serves again');
is($node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher'), $pid, 'still the same dispatcher');
await($node, 'SELECT sum(in_flight) FROM agentvm.stat_dispatcher', 0, name => 'which lets the answer to the call go by');

# A dispatcher that comes along while it is being dropped waits for the end of that, and does not stumble
my $dropper = AgentVM::Client->new($node);
$dropper->run('BEGIN; SELECT * FROM agentvm.abandon()');
$dropper->run('DROP EXTENSION agentvm');
my $from = -s $node->logfile;
$node->safe_psql('postgres', 'SELECT agentvm.wake()');
await($node, "SELECT locktype FROM pg_locks WHERE pid = $pid AND NOT granted", 'object', name => 'a DROP EXTENSION that has not committed is waited for');
$dropper->run('COMMIT');
await($node, "SELECT count(*) FROM pg_locks WHERE pid = $pid", 0, name => 'and seen');
unlike(PostgreSQL::Test::Utils::slurp_file($node->logfile, $from), qr/ERROR:.*relation|ERROR:.*cache lookup/, 'without an error');
prompt('CREATE EXTENSION agentvm', 5, 'CREATE EXTENSION');
serves('it serves again');

# A rolled back DROP changes nothing
psql_ok($node, "BEGIN; SELECT * FROM agentvm.abandon(); DROP EXTENSION agentvm; ROLLBACK; SELECT agentvm.provision('noop')", 'DROP EXTENSION, rolled back');
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 2);

# Other people's databases, with a call in flight in ours
set_up('postgres');
$node->safe_psql('postgres', 'CREATE DATABASE other');
call_in_flight('postgres');
prompt('DROP DATABASE other', 1, 'DROP DATABASE of another database in mid-call');
is($node->safe_psql('postgres', 'SELECT sum(in_flight) FROM agentvm.stat_dispatcher'), 1, 'the call is still in flight');

# A database that is served, with a call in flight in it
$node->safe_psql('postgres', 'CREATE DATABASE served');
create_extension($node, 'served');
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 1, dbname => 'served');
set_up('served');
call_in_flight('served');
prompt('ALTER DATABASE served RENAME TO renamed', 2, 'RENAME of a served database in mid-call');
prompt('ALTER DATABASE renamed RENAME TO served', 2, 'and back');
# without being told at COMMIT the launcher would see the name only after its tick of 10 s
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 1, dbname => 'served', timeout => 5, name => 'its dispatcher comes back at once');
await($node, "SELECT state FROM agentvm.sessions", 'ready', dbname => 'served', name => 'and goes on');
call_in_flight('served');
prompt('DROP DATABASE served', 2, 'DROP DATABASE in mid-call');
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.stat_dispatcher'), 1, 'the other database is served as before');

# An extension of another version is left alone, which is said once
my $offset = -s $node->logfile;
my $version = sub { $node->safe_psql('postgres', "SET allow_system_table_mods = on; UPDATE pg_extension SET extversion = '$_[0]' WHERE extname = 'agentvm'; SELECT agentvm.wake()") };
$version->('0.0');
await($node, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 'f', name => 'another version is not served');
like($node->safe_psql('postgres', "SELECT detail FROM agentvm.health WHERE name = 'version'"), qr/extension is of version 0\.0, the library of version 0\.3: run ALTER EXTENSION agentvm UPDATE/, 'which health tells');
fails_with($node, "SELECT agentvm.provision('noop')", '55000', qr/ALTER EXTENSION agentvm UPDATE/, 'and so does each call');
$node->safe_psql('postgres', 'SELECT agentvm.wake()') for 1 .. 3;
my $said = () = PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset) =~ /LOG:  agentvm: the extension's version is 0\.0, the library's 0\.3: nothing is dispatched/g;
is($said, 1, 'which the log says once');
$version->('0.3');
await($node, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 't', name => 'the right one is');
unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
