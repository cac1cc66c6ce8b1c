# Copies of a database: nothing acts on them until they are adopted; a takeover goes on without a second VM, a fork leaves the VMs alone
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;

my ($node, $faults, $moto) = ec2_node('main', databases => 'postgres, copy, restored, parallel, ordered, second', conf => "agentvm.sweep_interval = '100ms'\n");
my $home = $node->basedir;
$node->safe_psql('postgres', 'CREATE ROLE boss IN ROLE agentvm_admin');

sub sql { my ($dbname, $sql) = @_; return $node->safe_psql($dbname, $sql); }
sub installation { my ($dbname, $columns) = @_; return sql($dbname, "SELECT $columns FROM agentvm.installation WHERE in_use"); }
sub calls { my $received = $faults->counts->{received}; return join ' ', map { "$_=$received->{$_}" } sort keys %$received; }
sub live_vms { return join ' ', sort map { $_->{id} } $moto->running; }
sub identity_of { my ($dbname, $n) = @_; return ($n // $node)->safe_psql($dbname, "SELECT ok, detail FROM agentvm.health WHERE name = 'identity'"); }

# Some more looks of the database's dispatcher, none of which makes a call
sub idles
{
	my ($dbname, $name, $n) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	await($n // $node, "SELECT count(*) FROM agentvm.stat_dispatcher", 1, dbname => $dbname, name => "$name: a dispatcher is there");
	my ($before, $passes) = (calls(), ($n // $node)->safe_psql($dbname, 'SELECT passes FROM agentvm.stat_dispatcher'));
	await($n // $node, "SELECT passes > $passes + 5 FROM agentvm.stat_dispatcher", 't', dbname => $dbname, name => "$name: it has looked several times");
	is(calls(), $before, "$name: no call was made");
	return is(($n // $node)->safe_psql($dbname, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'"), 'f', "$name: provision() is not promised anything");
}

# A database that a dispatcher waits in
sub make_database
{
	my ($dbname) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $dbname; SELECT pg_reload_conf()");
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname = '$dbname'", 1, name => "$dbname is served");
}

# ---- the original: a VM that runs, one that is to end, a launch that was sent and whose answer nobody has heard ----
my $uuid = installation('postgres', 'installation_id');
is(identity_of('postgres'), 't|the sessions are this database\'s own', 'the original is in order');
my $ready = launch($node, 'acme', 'ready');
my $ending = launch($node, 'acme', 'ready');
my ($vm, $ending_vm) = map { column($node, $_, 'vm_id') } $ready, $ending;
$faults->set(mode => 'slow', ms => 1000, action => 'RunInstances', n => 1);
my $sent = provision($node, 'acme', "profile => 'plain'");
await($node, "SELECT lease IS NOT NULL FROM agentvm.session WHERE session_id = '$sent'");
sub begun { return $faults->count('RunInstances') == $_[0]; }
{ my $end = time + 60; select undef, undef, undef, 0.02 until begun(3) || time > $end; }
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.databases = 'copy, restored, parallel, ordered, second'; SELECT pg_reload_conf()");
await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher'", 0, name => 'the original dies in mid-call');
{ my $end = time + 60; select undef, undef, undef, 0.05 until $moto->for_session($sent) || time > $end; }
is(scalar(my @unheard = $moto->for_session($sent)), 1, 'the cloud has launched what was sent');
$node->safe_psql('postgres', "SELECT agentvm.terminate('$ending')");
my $orphans = live_vms();

# ---- a copy made by CREATE DATABASE ... TEMPLATE ----
make_database($_) for qw(restored parallel ordered second);
$node->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE postgres; SELECT pg_reload_conf()');
idles('copy', 'template');
like(identity_of('copy'), qr/^f\|nothing acts before agentvm\.adopt_cluster.*: the database's OID is \d+, not \d+$/, 'health says what does not match, and what to do');
fails_with($node, 'CALL agentvm.dispatch()', '55000', qr/a copy that nobody has adopted.*DETAIL:.*OID.*HINT:.*adopt_cluster\('takeover'\)/s, 'dispatch() says so', dbname => 'copy');
fails_with($node, "SELECT agentvm.$_()", '55000', qr/cannot execute agentvm\.$_\(\)/, "$_() says so", dbname => 'copy') for qw(sweep sweep_lifetime sweep_heartbeat sweep_bootstrap);
my (undef, undef, $warning) = $node->psql('copy', "SELECT agentvm.provision('acme', profile => 'plain')");
like($warning, qr/WARNING:  no agentvm dispatcher serves this database/, 'provision() warns');
is(sql('copy', "SELECT agentvm.inspect('$ready')->>'state'"), 'running', 'questions are answered');
my $said = () = log_text($node) =~ /LOG:  agentvm: database "copy" is a copy that nobody has adopted: nothing is dispatched\n.*DETAIL:.*OID.*\n.*HINT:.*takeover/g;
is($said, 1, 'the log has told it once');

# ---- dump and restore while a dispatcher waits for it: in one go, in parallel, in the worst order ----
my $dump = "$home/dump";
command_ok([ 'pg_dump', '-Fd', '-f', $dump, '-d', $node->connstr('postgres') ], 'pg_dump');
command_ok([ 'pg_dump', '-f', "$dump.sql", '-d', $node->connstr('postgres') ], 'pg_dump as text');
my $before = calls();
command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-o', "$home/out", '-d', $node->connstr('restored'), '-f', "$dump.sql" ], 'restore by psql');
restore_in_parallel($node, 'parallel');
for my $dbname (qw(restored parallel))
{
	idles($dbname, $dbname);
	like(identity_of($dbname), qr/agentvm\.installation has 2 rows: a dump was restored here; the database's OID/, "$dbname: health says so");
	is(installation($dbname, 'installation_id'), $uuid, "$dbname: the row of the original stands beside the one of CREATE EXTENSION");
}
command_ok([ 'pg_restore', '-l', '-f', "$home/list", $dump ], 'pg_restore -l');
my @list = split /^/, slurp_file("$home/list");
append_to_file("$home/rest", join '', grep { !/TABLE DATA agentvm installation/ } @list);
append_to_file("$home/row", join '', grep { /TABLE DATA agentvm installation/ } @list);
command_ok([ 'pg_restore', '--exit-on-error', '-L', "$home/rest", '-d', $node->connstr('ordered'), $dump ], 'all but the row of the original');
idles('ordered', 'sessions before their installation');
like(identity_of('ordered'), qr/live sessions were brought into a database that was not in use/, 'health says so');
psql_ok($node, "SELECT agentvm.create_team('early')", 'even if somebody calls the API meanwhile', dbname => 'ordered');
idles('ordered', 'not in use by that');
command_ok([ 'pg_restore', '--exit-on-error', '-L', "$home/row", '-d', $node->connstr('ordered'), $dump ], 'and then the row');
idles('ordered', 'both');
is(calls(), $before, 'all that time no call was made') or diag(calls());

# The foreign keys are there before the data, which several processes bring in any order
sub restore_in_parallel
{
	my ($n, $dbname) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	command_ok([ 'pg_restore', @$_, '--exit-on-error', '-d', $n->connstr($dbname), $dump ], "pg_restore @$_ into $dbname") for [qw(--section=pre-data)], [qw(-a --disable-triggers -j4)], [qw(--section=post-data -j4)];
	return;
}

# another cluster
my $other = new_node('other', moto => $faults, extension => 0, conf => "agentvm.sweep_interval = '100ms'\nagentvm.key_file = '$home/keys'\n");
$other->safe_psql('postgres', 'CREATE ROLE boss');
restore_in_parallel($other, 'postgres');
idles('postgres', 'another cluster', $other);
like(identity_of('postgres', $other), qr/has 2 rows.*the cluster's system identifier is \d+, not \d+/, 'health says so');
$other->stop;

# ---- who may adopt, and how ----
fails_with($node, "SELECT agentvm.adopt_cluster('x')", '22023', qr/unknown mode "x".*takeover.*fork/s, undef, dbname => 'copy');
fails_with($node, 'SELECT agentvm.adopt_cluster(NULL)', '22023', qr/mode must not be null/, undef, dbname => 'copy');
fails_with($node, "CREATE ROLE alice IN ROLE agentvm_user; SET ROLE alice; SELECT agentvm.adopt_cluster('fork')", '42501', undef, undef, dbname => 'copy');
is(live_vms(), $orphans, 'all VMs are as they were');

# ---- takeover: one VM for what was sent, an end for what was to end; two who adopt at once are one after the other ----
my $first = AgentVM::Client->new($node, dbname => 'copy');
my $second = AgentVM::Client->new($node, dbname => 'copy');
$first->run("SET ROLE boss; BEGIN; SELECT agentvm.adopt_cluster('takeover')");
$second->send("SELECT agentvm.adopt_cluster('takeover')");
await($node, "SELECT wait_event_type FROM pg_stat_activity WHERE pid = " . $second->pid, 'Lock', name => 'the second one waits');
idles('copy', 'before the first one commits');
$first->run('COMMIT');
$second->answer;
like($second->error, qr/NOTICE:.*nothing to take over/, 'and then finds nothing to do');
is(installation('copy', 'installation_id, adopted_by'), "$uuid|boss", 'the uuid is kept');
is(sql('copy', 'SELECT count(*) FROM agentvm.installation i, agentvm.cluster_identity() c WHERE (i.system_identifier, i.database) = (c.system_identifier, c.database) AND i.restore_id IS NULL AND c.restore_id IS NULL'),
	1, 'the rest is this database\'s');
is(identity_of('copy'), 't|the sessions are this database\'s own', 'health is content');
await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$sent'", 'ready', dbname => 'copy', name => 'what was sent is launched');
hurry_copy($ending, 'terminated');
is(join(' ', map { $_->{id} } $moto->for_session($sent)), $unheard[0]{id}, 'it is the VM that the cloud had, by the same token');
is($faults->count('RunInstances', 'mismatched'), 0, 'with the same parameters');
ok(!grep({ $_->{id} eq $ending_vm } $moto->running), 'what was to end has ended');

# As hurry_to(), for the copy
sub hurry_copy
{
	my ($session, $state) = @_;
	my $end = time + 60;
	until (sql('copy', "SELECT state FROM agentvm.sessions WHERE session_id = '$session'") eq $state || time > $end)
	{
		sql('copy', "UPDATE agentvm.session SET next_check_at = now() WHERE next_check_at > now() AND lease IS NULL AND state = 'terminating'; SELECT agentvm.wake()");
		select undef, undef, undef, 0.05;
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(sql('copy', "SELECT state FROM agentvm.sessions WHERE session_id = '$session'"), $state, "session $session becomes $state");
}

# ---- takeover of a restored dump: the other row goes ----
psql_ok($node, "SELECT agentvm.adopt_cluster('takeover')", 'takeover', dbname => 'restored');
is(sql('restored', 'SELECT installation_id FROM agentvm.installation'), $uuid, 'one row is left');
$orphans = live_vms();
await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$sent'", 'ready', dbname => 'restored', name => 'it acts');
is(scalar(my @again = $moto->for_session($sent)), 1, 'and there is still one VM');
sql('restored', "SELECT agentvm.terminate('$ready', 'by the successor')");
{ my $end = time + 60; select undef, undef, undef, 0.05 while grep({ $_->{id} eq $vm } $moto->running) && time < $end; }
ok(!grep({ $_->{id} eq $vm } $moto->running), 'a VM of the original can be ended');
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.databases = 'parallel, ordered, second'; SELECT pg_reload_conf()");
await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' AND datname IN ('copy', 'restored')", 0, name => 'enough of these');

# ---- fork: the VMs are the original's; what is made from now on is ours ----
my $live = sql('parallel', 'SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL');
is($live, 3, 'three sessions live in the dump');
$before = calls();
$orphans = live_vms();
psql_ok($node, "SET ROLE boss; SELECT agentvm.adopt_cluster('fork')", 'fork', dbname => 'parallel');
isnt(my $forked = installation('parallel', 'installation_id'), $uuid, 'another uuid');
is(sql('parallel', 'SELECT count(*) FROM agentvm.installation'), 1, 'one row is left');
is(sql('parallel', "SELECT DISTINCT state, end_reason, detail FROM agentvm.sessions"), 'terminated|orphan|forked by boss: its VM, if any, is left to the installation that this database was copied from', 'all sessions are tombstones');
is(sql('parallel', 'SELECT count(*) FROM agentvm.session WHERE lease IS NOT NULL OR handle IS NOT NULL OR payload_enc IS NOT NULL OR next_check_at IS NOT NULL'), 0, 'of which nothing is left to do');
is(sql('parallel', "SELECT string_agg(concat_ws('>', old_state, new_state), ' ' ORDER BY event_id) FROM agentvm.session_event WHERE session_id = '$ready' AND kind = 'state'"),
	'provisioning provisioning>ready ready>terminating terminating>terminated', 'the log tells each change');
sql('parallel', "SELECT agentvm.set_provider('acme', 'noop', '{}'); SELECT agentvm.wake()");
await($node, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 't', dbname => 'parallel', name => 'it is served');
await($node, "SELECT passes > 0 FROM agentvm.stat_dispatcher", 't', dbname => 'parallel');
is(calls(), $before, 'no call was made');
my $new = sql('parallel', "SELECT agentvm.provision('acme', profile => 'plain')");
await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$new'", 'ready', dbname => 'parallel', name => 'a new session is launched');
my ($made) = $moto->for_session($new);
is($made->{tags}{'agentvm-cluster'}, $forked, 'under the new uuid');
sql('parallel', "SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE state = 'ready'");
{ my $end = time + 60; select undef, undef, undef, 0.05 while grep({ $_->{id} eq $made->{id} } $moto->running) && time < $end; }
is(live_vms(), $orphans, 'and ended, and no VM of the original was');

# ---- fork of a database in order, with a call in flight: its answer is recorded nowhere ----
$faults->set(mode => 'slow', ms => 1500, action => 'RunInstances', n => 1);
my $calls = $faults->count('RunInstances');
$new = sql('parallel', "SELECT agentvm.provision('acme', profile => 'plain')");
{ my $end = time + 60; select undef, undef, undef, 0.02 until begun($calls + 1) || time > $end; }
psql_ok($node, "SELECT agentvm.adopt_cluster('fork')", 'fork in mid-call', dbname => 'parallel');
await($node, 'SELECT stale_replies FROM agentvm.stat_dispatcher', 1, dbname => 'parallel', name => 'the answer is dropped');
is(sql('parallel', "SELECT concat_ws(' ', state, end_reason, coalesce(vm_id, 'no VM')) FROM agentvm.sessions WHERE session_id = '$new'"), 'terminated orphan no VM', 'the session is not revived');
is($faults->count('RunInstances'), $calls + 1, 'nor launched anew');

# ---- a database that is not in use yet ----
create_extension($node, 'second');
is(identity_of('second'), 't|not in use yet: the first create_team() or provision() begins', 'a fresh one is not in use');
is(sql('second', 'CALL agentvm.dispatch()'), 0, 'there is nothing to dispatch');
is(sql('second', 'SELECT agentvm.sweep()'), 0, 'or to sweep');
my $virgin = sql('second', 'SELECT installation_id FROM agentvm.installation');
sql('postgres', 'CREATE DATABASE twin TEMPLATE second');
command_ok([ 'pg_dump', '-Fc', '-f', "$home/empty", '-d', $node->connstr('second') ], 'a dump of it');
command_like([ 'pg_restore', '-f', '-', '-a', '-t', 'installation', "$home/empty" ], qr/^(?!.*\Q$virgin\E)/s, 'has no identity in it');
is(sql('second', "BEGIN; SELECT agentvm.create_team('x'); ROLLBACK; SELECT count(*) FROM agentvm.installation WHERE in_use"), "\n0", 'a rolled back call does not take it into use');
sql('twin', "SELECT agentvm.create_team('acme')");
isnt(installation('twin', 'installation_id'), $virgin, 'a copy of it becomes an installation of its own');
my ($code, $id, $errors) = $node->psql('second', "BEGIN; SELECT agentvm.create_team('y'); ROLLBACK; INSERT INTO agentvm.team (team_id) VALUES ('acme'); SELECT agentvm.provision('acme')");
is(installation('second', 'installation_id'), $virgin, 'provision() alone takes it into use');
unlike($errors, qr/WARNING/, 'without a warning');
await($node, 'SELECT state FROM agentvm.sessions', 'ready', dbname => 'second', name => 'and it is served at once');
fails_with($node, "INSERT INTO agentvm.installation (in_use) VALUES (true); SELECT agentvm.sweep()", '55000', qr/has 2 rows/, 'two installations in use', dbname => 'second');
fails_with($node, "SELECT agentvm.adopt_cluster('takeover')", '55000', qr/more than one installation was in use.*HINT:.*fork/s, 'which one to take over is not known', dbname => 'second');
psql_ok($node, "DELETE FROM agentvm.installation; SELECT agentvm.adopt_cluster('takeover')", 'none at all', dbname => 'second');
is(identity_of('second'), 't|the sessions are this database\'s own', 'is made good, too');

unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');
done_testing();
