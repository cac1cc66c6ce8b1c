# Commands that need a database for themselves, with provider calls in flight that take longer than any of them: of the
# database that is served and of others; those that fail, and those who may not
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $faults = AgentVM::Faults->new;
my $node = new_node('main', moto => $faults, databases => 'postgres, served', conf => "agentvm.sweep_interval = '1h'\nlog_min_messages = log\n");
my $space = PostgreSQL::Test::Utils::tempdir('space');
$node->safe_psql('postgres', "CREATE TABLESPACE space LOCATION '$space'");
$node->safe_psql('postgres', "CREATE DATABASE $_") for qw(served other);
$faults->set(mode => 'canned', ms => 25000, action => 'RunInstances');
$faults->set(mode => 'canned', ms => 25000, action => 'GetCallerIdentity');

sub sql { return $node->safe_psql('postgres', $_[0]); }
sub pid_of { return sql("SELECT string_agg(pid::text, ' ') FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = '$_[0]'"); }
sub runs
{
	my ($dbname, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	# without being told the launcher would look only at its tick of 10 s
	return await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = '$dbname'", 1, name => $name, timeout => 8);
}

# Wait until the cloud has been asked again
sub asked
{
	my ($before, $name) = @_;
	my $end = time + 8;
	sleep 0.02 while $faults->count('RunInstances') <= $before && time < $end;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return cmp_ok($faults->count('RunInstances'), '>', $before, $name);
}
sub prompt
{
	my ($sql, $seconds, $sqlstate, $name) = @_;
	my $started = time;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$name //= $sql;
	if ($sqlstate) { fails_with($node, $sql, $sqlstate, undef, "$sqlstate: $name"); }
	else           { psql_ok($node, $sql, $name); }
	return cmp_ok(time - $started, '<', $seconds, "within $seconds s");
}

# A command on the served database, in mid-call: done or refused in time, and the next dispatcher repeats the call
sub of_served
{
	my ($sql, $sqlstate, $seconds) = @_;
	my $before = $faults->count('RunInstances');
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	prompt($sql, $seconds // 5, $sqlstate);
	return asked($before, 'its dispatcher comes back, and goes on');
}

foreach my $db (qw(postgres served))
{
	create_extension($node, $db) if $db ne 'postgres';
	$node->safe_psql($db, "SELECT agentvm.create_team('acme', 'ec2'); SELECT agentvm.create_profile('plain', 'ec2', runtime => false); "
		  . "SET log_statement = none; SELECT agentvm.set_provider('acme', 'ec2', " . json($faults->options) . ', ' . json($faults->secrets) . ')');
	my $before = $faults->count('RunInstances');
	$node->safe_psql($db, "SELECT agentvm.provision('acme', profile => 'plain')");
	asked($before, "a call is in flight in $db");
}

# ---- the served database: done ----
of_served('ALTER DATABASE served SET TABLESPACE space');
of_served('CREATE DATABASE copy TEMPLATE served');
prompt('DROP DATABASE copy', 5);

# ---- the served database: failed ----
of_served('ALTER DATABASE served RENAME TO other', '42P04');
of_served('ALTER DATABASE served SET TABLESPACE nowhere', '42704');
of_served('CREATE DATABASE other TEMPLATE served', '42P04');
of_served('BEGIN; DROP DATABASE served', '25001');
{
	my $user = AgentVM::Client->new($node, dbname => 'served');
	# PostgreSQL itself waits for five seconds for the user to go
	of_served('DROP DATABASE served', '55006', 15);
}

# a failure that its transaction outlives
my $admin = AgentVM::Client->new($node);
my $before = $faults->count('RunInstances');
$admin->run('BEGIN');
$admin->run('SAVEPOINT a');
$admin->send('ALTER DATABASE served RENAME TO other');
$admin->answer;
like($admin->error, qr/42P04/, 'in a subtransaction');
$admin->run('ROLLBACK TO a');
asked($before, 'it brings the dispatcher back, too');
$before = $faults->count('RunInstances');
$admin->run('SAVEPOINT b');
$admin->run('ALTER DATABASE served RENAME TO another');
$admin->run('RELEASE b');
sleep 1.5;
is(pid_of('served'), '', 'a subtransaction that is released does not');
$admin->run('ROLLBACK');
asked($before, 'until its transaction is rolled back');

# ---- who may not command disturbs nobody ----
sql('CREATE ROLE maker LOGIN CREATEDB; CREATE ROLE owner LOGIN; CREATE ROLE nobody LOGIN');
my $pid = pid_of('served');
my $refused = sub {
	my ($role, $sql, $sqlstate) = @_;
	my ($code, undef, $error) = $node->psql('postgres', "\\set VERBOSITY verbose\n$sql", extra_params => [ '-U', $role ]);
	like($error, qr/ERROR:  42501/, "$role may not: $sql");
	return is(pid_of('served'), $pid, 'and stops nobody');
};
foreach my $role (qw(nobody maker))
{
	$refused->($role, $_)
	  for 'DROP DATABASE served', 'DROP DATABASE served WITH (FORCE)', 'ALTER DATABASE served RENAME TO mine', 'ALTER DATABASE served SET TABLESPACE pg_default', 'CREATE DATABASE mine TEMPLATE served',
	  'ALTER DATABASE served ALLOW_CONNECTIONS false';
}
sql('ALTER DATABASE served OWNER TO owner');
$refused->('owner', 'CREATE DATABASE mine TEMPLATE served');
$refused->('owner', 'ALTER DATABASE served RENAME TO mine');
sql('ALTER DATABASE served OWNER TO postgres');

# ---- other databases: calls are in flight in dispatchers, and in backends of all kinds ----
my $session = sql("SELECT agentvm.create_team('slow'); SET client_min_messages = error; SELECT agentvm.provision('slow', options => '{\"launch_delay\": \"1h\"}')") =~ s/\s//gr;
my %under_way = map { $_ => AgentVM::Client->new($node) } "SELECT agentvm.check_provider('acme')", "SELECT agentvm.wait('$session')", "CALL agentvm.await('$session')";
$before = $faults->count('RunInstances');
$under_way{$_}->send($_) for keys %under_way;
my $calls = time + 10;
sleep 0.02 until $faults->count('GetCallerIdentity') || time > $calls;
my $dispatchers = sub { return join(' ', map { pid_of($_) } qw(postgres served)) };
my $pids = $dispatchers->();
prompt('ALTER DATABASE other RENAME TO renamed', 2);
prompt('ALTER DATABASE renamed SET TABLESPACE space', 2);
prompt('CREATE DATABASE copy TEMPLATE renamed', 4);
prompt('DROP DATABASE copy WITH (FORCE)', 2);
prompt('DROP DATABASE renamed', 2);
is($dispatchers->(), $pids, 'the dispatchers have not been disturbed');
foreach my $statement (sort keys %under_way)
{
	ok($under_way{$statement}->busy, "nor has: $statement");
	sql('SELECT pg_cancel_backend(' . $under_way{$statement}->pid . ')');
	$under_way{$statement}->answer;
}

# ---- a database that takes no connections ----
prompt('ALTER DATABASE served CONNECTION LIMIT 0', 2);
sql('SELECT pg_terminate_backend(' . pid_of('served') . ', 10000)');
runs('served', 'a limit of none is for users');
foreach my $change ([ 'ALLOW_CONNECTIONS false', 'ALLOW_CONNECTIONS true' ], [ 'IS_TEMPLATE true', 'IS_TEMPLATE false' ])
{
	prompt("ALTER DATABASE served $change->[0]", 2);
	await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = 'served'", 0, name => 'is left at once', timeout => 8);
	$before = $faults->count('RunInstances');
	prompt("ALTER DATABASE served $change->[1]", 2);
	asked($before, 'and served again at once');
}

# ---- the end: by force, with a user inside whose call is in flight, too; then one whose DROP was interrupted ----
my $inside = AgentVM::Client->new($node, dbname => 'served');
$before = $faults->count('GetCallerIdentity');
$inside->send("SELECT agentvm.check_provider('acme')");
$calls = time + 10;
sleep 0.02 until $faults->count('GetCallerIdentity') > $before || time > $calls;
prompt('DROP DATABASE served WITH (FORCE)', 5);
is(sql("SELECT count(*) FROM agentvm.stat_dispatcher"), 1, 'the other database is served as before');
prompt('CREATE DATABASE served', 5);
runs('served', 'a new one of that name is served at once');
my $offset = -s $node->logfile;
sql("UPDATE pg_database SET datconnlimit = -2 WHERE datname = 'served'; SELECT pg_reload_conf()");
await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = 'served'", 0, name => 'one that is invalid is left');
sql("SELECT pg_reload_conf()") for 1 .. 3;
prompt('DROP DATABASE served', 5);
unlike(slurp_file($node->logfile, $offset), qr/FATAL:.*database/, 'nobody has tried to connect to it');
unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
