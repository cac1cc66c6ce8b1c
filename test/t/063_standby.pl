# A hot standby: silent and clear about it; promoted it goes on by itself, and a launch that was under way ends as one VM
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my ($primary, $faults, $moto) = ec2_node('primary', init => { allows_streaming => 1 });
$primary->safe_psql('postgres', "SELECT agentvm.create_team('limited', limits => '{\"max_sessions\": 3}')");
my $ready = launch($primary, 'acme', 'ready');
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;
$primary->wait_for_catchup($standby);

# ---- a standby ----
is($standby->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'agentvm%'"), 0, 'no worker runs');
my $hash = "sha256('x')";
for my $call ("SELECT agentvm.provision('acme', profile => 'plain')", "SELECT agentvm.provision('limited', provider => 'noop')", "SELECT agentvm.terminate('$ready')", "SELECT agentvm.extend('$ready', '1 s')",
	'CALL agentvm.dispatch()', map({ "SELECT agentvm.$_()" } qw(sweep sweep_heartbeat sweep_bootstrap sweep_lifetime sweep_inventory release_quarantine)), "SELECT agentvm.end_vm('i-1')", "SELECT agentvm.adopt_vm('i-1')", "SELECT agentvm.create_team('x')", "SELECT agentvm.alter_team('acme', limits => '{\"max_sessions\": 1}')",
	"SELECT agentvm.drop_team('acme')", "SELECT agentvm.add_member('acme', 'agentvm_user')", "SELECT agentvm.remove_member('acme', 'agentvm_user')", "SELECT agentvm.set_provider('acme', 'noop', '{}')",
	"SELECT agentvm.drop_provider('acme', 'ec2')", "SELECT agentvm.create_profile('p', 'noop')", "SELECT agentvm.drop_profile('plain')", "SELECT agentvm.rotate_keys()", "SELECT agentvm.seal_audit()", "SELECT agentvm.purge('1 day')",
	"SELECT agentvm.adopt_cluster('takeover')", "SELECT agentvm.adopt_cluster('fork')", 'SELECT * FROM agentvm.abandon()', "SELECT agentvm.heartbeat_batch(ARRAY['$ready'::uuid], ARRAY[now()])", 'DROP EXTENSION agentvm')
{
	fails_with($standby, $call, '25006', qr/(?:during recovery|read-only transaction)/, "25006: $call");
}
is($standby->safe_psql('postgres', "SELECT state FROM agentvm.status('$ready')"), 'ready', 'status() answers');
is($standby->safe_psql('postgres', "SELECT agentvm.wait('$ready')"), 'ready', 'wait() does');
is($standby->safe_psql('postgres', "SELECT agentvm.inspect('$ready')->>'state'"), 'running', 'inspect() does');
is($standby->safe_psql('postgres', "SELECT string_agg(name || ' ' || ok, ', ') FROM agentvm.health WHERE name IN ('dispatcher', 'identity')"), 'dispatcher true, identity true', 'health finds nothing amiss');
like($standby->safe_psql('postgres', "SELECT detail FROM agentvm.health WHERE name = 'dispatcher'"), qr/standby.*promotion/, 'and says when it begins');

# ---- the primary dies while the cloud launches a VM ----
$faults->set(mode => 'slow', ms => 2000, action => 'RunInstances', n => 1);
my $before = $faults->count('RunInstances');
my $sent = provision($primary, 'acme', "profile => 'plain'");
my $waiting = provision($primary, 'limited', "provider => 'noop'", "options => '{\"launch_delay\": \"20s\"}'");
{ my $end = time + 60; sleep 0.02 while $faults->count('RunInstances') == $before && time < $end; }
is($primary->safe_psql('postgres', "SELECT lease IS NOT NULL AND vm_id IS NULL FROM agentvm.session WHERE session_id = '$sent'"), 't', 'the call is under way');
# VMs that have not been heard for long; a gateway that is away keeps everybody from ending them, until its row goes
$primary->safe_psql('postgres', <<'SQL');
BEGIN;
INSERT INTO agentvm.session (session_id, team_id, provider, state, running, runtime, created_at, ready_at, next_check_at, deadline_at)
	SELECT ('00000000-0000-7000-8000-00000000000' || i)::uuid, 'acme', 'noop', 'ready', true, true, now() - interval '1 h', now() - interval '1 h', now() + interval '1 d', now() + interval '1 d' FROM generate_series(1, 8) i;
INSERT INTO agentvm.session_heartbeat (session_id, last_heartbeat_at, lost_after) SELECT session_id, ready_at, '4 s' FROM agentvm.session WHERE session_id < '00000000-0000-7000-9000-000000000000';
INSERT INTO agentvm.gateway (gateway_id) VALUES (gen_random_uuid());
COMMIT;
SQL
$primary->wait_for_catchup($standby);
$primary->stop('immediate');
await($standby, "SELECT now() > pg_postmaster_start_time() + interval '5 s'", 't', name => 'the standby has been there for longer than VMs may be silent');
my $promoted = $standby->safe_psql('postgres', 'SELECT now()');
$standby->promote;
$standby->safe_psql('postgres', 'DELETE FROM agentvm.gateway');
await($standby, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 't', name => 'the dispatcher of the promoted one starts by itself');
is($standby->safe_psql('postgres', "SELECT ok FROM agentvm.health WHERE name = 'identity'"), 't', 'it is the same installation');
ok(!-e $standby->data_dir . '/agentvm.restored', 'not a restored one');
await_state($standby, $sent, 'ready');
my @vms = $moto->for_session($sent);
is(scalar @vms, 1, 'the launch has ended as one VM');
is(column($standby, $sent, 'vm_id'), $vms[0]{id}, 'which the session knows');
cmp_ok($faults->count('RunInstances'), '>', $before + 1, 'the call was made twice');
is($faults->count('RunInstances', 'mismatched'), 0, 'with the same token and parameters');
await($standby, "SELECT count(*) FROM agentvm.sessions WHERE end_reason = 'heartbeat_timeout'", 8, name => 'VMs that say nothing afterwards are lost');
is($standby->safe_psql('postgres', "SELECT min(at) > timestamptz '$promoted' + interval '4 s' FROM agentvm.session_event WHERE reason = 'heartbeat_timeout'"), 't', 'but they have had their time, from the promotion on');
await_state($standby, $waiting, 'ready');
my $vm = column($standby, $ready, 'vm_id');
$standby->safe_psql('postgres', "SELECT agentvm.terminate('$_') FROM (SELECT) AS x") for $ready, $sent;
hurry_to($standby, $_, 'terminated requested') for $ready, $sent;
is(scalar(my @left = $moto->running), 0, 'the VMs of before can be ended');
is(column($standby, launch($standby, 'acme', 'ready'), 'state'), 'ready', 'and new ones launched');

unlike(log_text($_), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed') for $primary, $standby;
done_testing();
