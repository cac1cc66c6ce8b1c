# Where VMs of placed providers go: never more than a host can hold, whatever happens at once
use strict;
use warnings;
use AgentVM::Blocking;
use AgentVM::Client;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => AgentVM::Blocking::conf());
my $blocking = AgentVM::Blocking->new($node);
my $dir = $blocking->dir;
sub sql { return $node->safe_psql('postgres', @_); }
sub placed { my ($team, %options) = @_; return sql("SELECT agentvm.provision('$team', provider => 'placed', options => " . json({%options}) . ')'); }
sub settled { local $Test::Builder::Level = $Test::Builder::Level + 1; return await($node, "SELECT count(*) FROM agentvm.sessions WHERE state IN ('provisioning', 'terminating')", 0, name => $_[0], timeout => 120); }
sub states { return sql("SELECT coalesce(string_agg(n || ' ' || state, ', ' ORDER BY state), '') FROM (SELECT state, count(*) AS n FROM agentvm.sessions GROUP BY 1) s"); }
sub used { return sql("SELECT coalesce(string_agg(host || ' ' || n || ' ' || vcpus || ' ' || memory, ', ' ORDER BY host), '') FROM (SELECT host, count(*) AS n, sum(vcpus) AS vcpus, sum(memory_mib) AS memory FROM agentvm.placement GROUP BY 1) s"); }
sub forget { sql('SELECT count(*) FROM agentvm.abandon(); DELETE FROM agentvm.session'); unlink glob "$dir/*.vm"; return; }

sql("SELECT agentvm.create_team('acme'); SELECT agentvm.create_team('globex')");
$blocking->await_runner('pid > 0', 'a runner serves the database');

# A witness of each transaction that places: what is placed and committed, or placed by itself, fits
sql(<<'SQL');
CREATE FUNCTION public.witness() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF EXISTS (SELECT FROM agentvm.host h WHERE h.name = NEW.host AND (h.vcpus < (SELECT sum(vcpus) FROM agentvm.placement WHERE host = h.name)
		OR h.memory_mib < (SELECT sum(memory_mib) FROM agentvm.placement WHERE host = h.name))) THEN
		INSERT INTO public.overcommitted VALUES (NEW.host);
	END IF;
	RETURN NULL;
END
$$;
CREATE TABLE public.overcommitted (host text);
CREATE TRIGGER witness AFTER INSERT ON agentvm.placement FOR EACH ROW EXECUTE FUNCTION public.witness();
SQL

# ---- 32 callers at once, room for 10 ----
sql("INSERT INTO agentvm.host (name, directory, vcpus, memory_mib) VALUES ('one', '$dir', 100, 5120)");
append_to_file("$dir/one.sql", "SELECT agentvm.provision('acme', provider => 'placed', options => '{\"sleep_ms\": 50}')\\;COMMIT;\n");
my ($out, $error) = run_command([ 'pgbench', '-n', '-c', 32, '-j', 2, '-t', 1, '-f', "$dir/one.sql", $node->connstr('postgres') ]);
like($out, qr{actually processed: 32/32}, '32 callers at once') or diag($error);
settled('all are told');
is(states(), '22 failed, 10 ready', 'exactly those have VMs for which there is room');
is(sql("SELECT DISTINCT end_reason || ' ' || (detail ~ 'the largest room is 90 vCPUs and 0 MiB, on host one') FROM agentvm.sessions WHERE state = 'failed'"), 'capacity true', 'the others are told that there is none');
is(used(), 'one 10 10 5120', 'the host is full');
is($blocking->vms, 10, 'and has as many VMs');

# ---- what ends makes room; a failed launch leaves none behind ----
sql("SELECT agentvm.terminate(session_id) FROM (SELECT session_id FROM agentvm.sessions WHERE state = 'ready' LIMIT 3) s");
settled('three end');
is(used(), 'one 7 7 3584', 'and make room');
my $failed = placed('acme', fail => 'permanent');
await_state($node, $failed, 'failed');
is(used(), 'one 7 7 3584', 'a launch that fails takes none');
await_state($node, placed('globex'), 'ready', name => 'there is room for another one');

# ---- several hosts: the one with the most room, until none has any ----
sql("INSERT INTO agentvm.host (name, directory, vcpus, memory_mib) VALUES ('two', '$dir', 3, 4096), ('three', '$dir', 100, 2048)");
await_state($node, placed('globex'), 'ready') for 1 .. 9;
is(used(), 'one 10 10 5120, three 4 4 2048, two 3 3 1536', 'filled in order of their memory, as far as their vCPUs go');
await_state($node, placed('globex'), 'failed', name => 'then it is over');

# ---- disabled: nothing new, and what is there goes on ----
my $there = sql("SELECT session_id FROM agentvm.placement WHERE host = 'two' LIMIT 1");
sql("UPDATE agentvm.host SET enabled = false WHERE name = 'two'");
is(sql("SELECT agentvm.inspect('$there') ->> 'host'"), 'two', 'a VM on a host that is not enabled any more can be asked about');
sql("SELECT agentvm.terminate('$there')");
await_state($node, $there, 'terminated', name => 'and ended');
await_state($node, placed('globex'), 'failed', name => 'its room is nobody\'s');
is(sql("SELECT agentvm.check_provider('acme', 'placed') -> 'hosts' ? 'two'"), 'f', 'check_provider() does not ask it');
fails_with($node, "DELETE FROM agentvm.host WHERE name = 'two'", '23503', undef, 'it cannot be deleted as long as VMs are there');
sql("SELECT agentvm.terminate(session_id) FROM agentvm.placement WHERE host = 'two'");
settled('they end');
psql_ok($node, "DELETE FROM agentvm.host WHERE name = 'two'", 'then it can');

# ---- a smaller host than what is on it ----
sql("UPDATE agentvm.host SET memory_mib = 1024 WHERE name = 'one'");
$failed = placed('acme');
await_state($node, $failed, 'failed');
like(state_of($node, $failed), qr/the largest room is 96 vCPUs and 0 MiB, on host three/, 'no room is below none');
forget();
is(used(), '', 'abandon() frees all');

# ---- where VMs are cannot be changed under them ----
mkdir "$dir/second" or die "could not make $dir/second: $!";
sql("UPDATE agentvm.host SET enabled = name = 'one', memory_mib = 5120");
my $vm = placed('acme');
await_state($node, $vm, 'ready');
foreach my $change ("directory = '$dir/second'", "uri = 'qemu:///system'", "name = 'moved'")
{
	my ($sqlstate, $message) = $change =~ /^name/ ? ('23503', qr/placement/) : ('55006', qr/host "one" has VMs, which would not be found.*as another host/s);
	fails_with($node, "SET ROLE agentvm_admin; UPDATE agentvm.host SET $change WHERE name = 'one'", $sqlstate, $message, "a host with a VM: no other " . $change =~ s/ .*//r);
}
psql_ok($node, "SET ROLE agentvm_admin; UPDATE agentvm.host SET vcpus = 99, accel = 'tcg' WHERE name = 'one'", 'but all else');
psql_ok($node, "UPDATE agentvm.host SET directory = '$dir/second' WHERE name = 'three'", 'and a host without VMs');
sql("SELECT agentvm.terminate('$vm')");
await_state($node, $vm, 'terminated');
my $admin = AgentVM::Client->new($node);
$admin->run('BEGIN');
$admin->run("UPDATE agentvm.host SET directory = '$dir/second' WHERE name = 'one'");
$vm = placed('acme');
await($node, "SELECT detail ~ 'HostLocked' OR state <> 'provisioning' FROM agentvm.sessions WHERE session_id = '$vm'", 't', name => 'when it is over it can; meanwhile nothing is placed there');
$admin->run('COMMIT');
await_state($node, $vm, 'ready', timeout => 120);
ok(-e "$dir/second/$vm.vm", 'the next VM is at the new place');
sql("SELECT agentvm.terminate('$vm')");
await_state($node, $vm, 'terminated');
ok(!-e "$dir/second/$vm.vm", 'and found there');

# ---- nor under a session that is placed, but has nothing there yet: a launch waits for a change, and a change for a launch ----
$vm = placed('acme', fail => 'away');
await($node, "SELECT detail ~ 'NotSent' FROM agentvm.sessions WHERE session_id = '$vm'", 't', name => 'a launch that could not be sent');
is(used(), 'one 1 1 512', 'it has its place');
$admin->run('BEGIN');
$admin->run("UPDATE agentvm.host SET directory = '$dir' WHERE name = 'one'");
append_to_file("$dir/second/go", '');
await($node, "SELECT detail ~ 'HostLocked' OR state <> 'provisioning' FROM agentvm.sessions WHERE session_id = '$vm'", 't', name => 'its host is being changed');
$admin->run('COMMIT');
await($node, "SELECT detail ~ 'NotSent' FROM agentvm.sessions WHERE session_id = '$vm'", 't', name => 'so it is not launched at the old place, but tried at the new one', timeout => 120);
sql(<<'SQL');
CREATE FUNCTION public.pause() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END';
CREATE TRIGGER pause AFTER UPDATE ON agentvm.session FOR EACH ROW WHEN (NEW.handle ? 'host_used') EXECUTE FUNCTION public.pause();
SQL
my $holder = AgentVM::Client->new($node);
$holder->run('SELECT pg_advisory_lock(1)');
await($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm runner' AND wait_event = 'advisory'", 1, name => 'the next launch is about to be committed', timeout => 120);
$admin->send("UPDATE agentvm.host SET directory = '$dir/second' WHERE name = 'one'");
await($node, "SELECT wait_event_type FROM pg_stat_activity WHERE pid = " . $admin->pid, 'Lock', name => 'a change waits for that', timeout => 20);
$blocking->release;
$holder->run('SELECT pg_advisory_unlock(1)');
$admin->answer;
like($admin->error, qr/ERROR:  55006: host "one" has VMs/, 'and is refused');
await_state($node, $vm, 'ready', timeout => 120);
ok(-e "$dir/$vm.vm", 'the VM is where its host is said to be');
$blocking->hang_again;
sql("DROP TRIGGER pause ON agentvm.session; SELECT agentvm.terminate('$vm')");
await_state($node, $vm, 'terminated');
sql("UPDATE agentvm.host SET vcpus = 100, enabled = true");
forget();

# ---- a host is deleted, disabled and locked by others while sessions come and go ----
sql("UPDATE agentvm.host SET memory_mib = 5120 WHERE name = 'one'; DELETE FROM agentvm.host WHERE name = 'three'; INSERT INTO agentvm.host (name, directory, vcpus, memory_mib) VALUES ('four', '$dir', 6, 8192)");
append_to_file("$dir/churn.sql", <<'SQL');
\set what random(1, 10)
\if :what <= 5
	SELECT agentvm.provision('acme', provider => 'placed', options => '{"sleep_ms": 20}');
\elif :what <= 8
	SELECT agentvm.terminate(session_id) FROM (SELECT session_id FROM agentvm.sessions WHERE ended_at IS NULL ORDER BY random() LIMIT 1) s;
\elif :what = 9
	UPDATE agentvm.host SET enabled = NOT enabled WHERE name = 'four';
\else
	BEGIN;
	SELECT FROM agentvm.host WHERE name = 'one' FOR UPDATE;
	\sleep 30 ms
	COMMIT;
\endif
SQL
($out, $error) = run_command([ 'pgbench', '-n', '-c', 8, '-j', 2, '-t', 60, '-f', "$dir/churn.sql", $node->connstr('postgres') ]);
like($out, qr{actually processed: 480/480}, 'sessions come and go while hosts are changed') or diag($error);
settled('all is settled');
is(sql('SELECT count(*) FROM public.overcommitted'), 0, 'no host ever held more than it could');
is(sql("SELECT count(*) FROM agentvm.session s FULL JOIN agentvm.placement p USING (session_id) WHERE (s.ended_at IS NULL) <> (p.host IS NOT NULL) OR s.region IS DISTINCT FROM p.host AND s.ended_at IS NULL"), 0, 'what lives is placed, what has ended is not');
is($blocking->vms, sql('SELECT count(*) FROM agentvm.placement'), 'there are as many VMs as placements');
unlike(log_text($node), qr/deadlock|could not serialize/, 'without deadlocks');
like(sql("SELECT count(*) > 0 FROM agentvm.session_event WHERE detail ->> 'error' LIKE 'HostLocked%'"), qr/[tf]/, 'locked hosts were passed by');

# ---- a session that is purged, a copy that is a fork ----
sql("UPDATE agentvm.host SET enabled = true");
forget();
my $live = placed('acme');
await_state($node, $live, 'ready');
is(used(), 'four 1 1 512', 'one is placed');
sql("SELECT agentvm.adopt_cluster('fork')");
is(used(), '', 'a fork frees what was placed: the VMs are the original\'s');
is(sql('SELECT count(*) FROM public.overcommitted'), 0, 'and nothing was ever too much');
sql("INSERT INTO agentvm.placement SELECT session_id, 'one', 1, 1 FROM agentvm.session WHERE session_id = '$live'; DELETE FROM agentvm.session WHERE session_id = '$live'");
is(used(), '', 'a placement goes with its session at the latest');
# ---- a uri connects, and does nothing else: libvirt would run programs and read files as the server's user ----
sub host_at { return "INSERT INTO agentvm.host (name, uri, directory, vcpus, memory_mib) VALUES ('at', " . literal($_[0]) . ", '/', 1, 1)"; }
foreach my $uri ('qemu:///system', 'qemu+unix:///session?socket=/run/agentvm-vm/libvirt/libvirt-sock', 'qemu+ssh://vm@host/system', 'qemu://host.example:16514/system?pkipath=/etc/pki/vm',
	'qemu+tls://[fe80::1]/system', 'qemu+libssh2://vm@10.0.0.1:2222/session?keyfile=/etc/vm/id_ed25519&known_hosts=/etc/vm/known_hosts&sshauth=privkey&no_tty=1',
	'qemu+libssh://a/system?mode=direct&proxy=native', 'test:///default')
{
	psql_ok($node, 'BEGIN; SET ROLE agentvm_admin; ' . host_at($uri), $uri);
}
foreach my $uri ('qemu+ext:///session?command=/tmp/x.sh', 'qemu+ssh://h/system?command=/tmp/x.sh', 'qemu+ssh://h/system?%63ommand=/tmp/x.sh', 'qemu+ssh://h/system?keyfile=/k&command=/tmp/x.sh',
	'qemu+ssh://h/system?keyfile=/k;command=/tmp/x.sh', 'qemu+ssh://h/system?COMMAND=/tmp/x.sh', 'qemu+ssh://h/system?netcat=/tmp/x.sh', 'qemu+ssh://h/system?proxy=netcat', 'qemu+ssh://h/system?keyfile=-oProxyCommand=x',
	'qemu+ssh://-oProxyCommand=x/system', 'qemu+ssh://-l@h/system', 'qemu+ssh://%2doProxyCommand=x/system', 'qemu+tls://h/system?no_verify=1', 'qemu+ssh://h/system?no_verify=1', 'qemu://h/system?tls_priority=NONE',
	'qemu+ssh://h/system?no_sanity=1', 'qemu+libssh://h/system?known_hosts_verify=ignore', 'qemu://h/system?name=qemu%2bext', 'qemu+tcp://h/system', 'test:///etc/passwd', 'qemu:///embed?root=/tmp', 'xen:///system', 'nonsense:///x',
	'qemu:///system#x', "qemu:///system\n", "x\nqemu:///system", '', 'QEMU+EXT:///session', 'remote+ext:///?command=/tmp/x.sh', 'qemu+unix://h/system')
{
	fails_with($node, 'SET ROLE agentvm_admin; ' . host_at($uri), '22023', qr/uri of host is not allowed.*HINT:.*transports/s, 'refused: ' . $uri =~ s/\n/\\n/r);
}
fails_with($node, "SET ROLE agentvm_admin; UPDATE agentvm.host SET uri = 'qemu+ext:///session?command=/tmp/x.sh'", '22023', qr/not allowed/, 'nor by an UPDATE');
fails_with($node, host_at(undef) =~ s/'at', [^,]*/'at', NULL/r, '23502', undef, 'none at all');

done_testing();
