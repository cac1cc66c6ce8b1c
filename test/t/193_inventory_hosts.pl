# Truth on our own hosts: domains that no session has, sessions without a domain; by the runner, on libvirt's mock
use strict;
use warnings;
use AgentVM::Libvirt;
use AgentVM::Test;
use JSON::PP;
use Test::More;

my $libvirt = AgentVM::Libvirt->new;
my $node = new_node('main', conf => "agentvm.provider_libraries = 'agentvm_libvirt'\nagentvm.orphan_grace = '1s'\n");
sub sql { return $node->safe_psql('postgres', @_); }
sub drift { my ($session) = @_; return sql("SELECT string_agg(concat_ws(' ', kind, vm_state, session_state, team_id, region), ', ') FROM agentvm.drift WHERE vm_id = 'agentvm-$session'"); }
sub sweep { return sql('SELECT agentvm.sweep_inventory()'); }
sub aged { await($node, "SELECT bool_and(first_seen_at < clock_timestamp() - interval '1 s') FROM agentvm.drift", 't', name => 'the grace passes'); return; }

# The sessions of the domains that there are
sub domains { return join(' ', sort map { $_->{session} } @{ decode_json(sql("SELECT agentvm.check_provider('acme')"))->{hosts}{mock}{domains} }); }
sub sessions { return join(' ', sort @_); }
sub tombstone
{
	my ($session) = @_;
	sql("BEGIN; UPDATE agentvm.session SET state = 'terminating', end_reason = 'requested', next_check_at = 'infinity' WHERE session_id = '$session';
		UPDATE agentvm.session SET state = 'terminated', ended_at = clock_timestamp(), next_check_at = NULL WHERE session_id = '$session'; COMMIT");
	return;
}

sql("SELECT agentvm.create_team('acme', provider => 'libvirt'); SELECT agentvm.set_provider('acme', 'libvirt', '{\"kernel\": \"/srv/kernel\"}'); SELECT agentvm.create_profile('plain', 'libvirt', runtime => false)");
await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE kind = 'runner'", 1, name => 'a runner');
$libvirt->host($node, name => 'mock', uri => 'test:///default', accel => 'tcg', vcpus => 20);
my ($orphan, $unknown, $lost, $steady) = map { provision($node, 'acme', "profile => 'plain'") } 1 .. 4;
await_state($node, $_, 'ready') for $orphan, $unknown, $lost, $steady;
is(sweep(), 0, 'nothing differs');
is(sql("SELECT account, provider, region, vms, error FROM agentvm.inventory"), '|libvirt|mock|4|', 'the domains of a host are listed, but for one that is none of ours');

tombstone($orphan);
sql("DELETE FROM agentvm.session WHERE session_id = '$unknown'");
sql("UPDATE agentvm.session SET vm_id = 'agentvm-0', launched_at = now() - interval '1 h' WHERE session_id = '$lost'");
is(sweep(), 4, 'what differs');
is(drift($orphan), 'orphan running terminated acme mock', 'a domain whose session has ended');
is(drift($unknown), 'unknown running acme mock', 'one whose session is not there');
is(drift(0), 'missing not found ready acme mock', 'a session whose domain is not there');
is(drift($lost), 'orphan running ready acme mock', 'and the domain that it had');
fails_with($node, "SELECT agentvm.adopt_vm('agentvm-$unknown')", '55000', qr/on a host of ours/, 'such a one is not adopted');
is(domains(), sessions($orphan, $unknown, $lost, $steady), 'all are there');
aged();
sql("DELETE FROM agentvm.vm_drift WHERE vm_id = 'agentvm-$lost'");
sweep();
await_state($node, $lost, 'failed');
is(state_of($node, $lost), 'failed provider_lost the provider does not know the VM', 'a session has lost its VM by two lists');
is(domains(), sessions($steady), 'what no session has is ended');
is(sql("SELECT string_agg(reason, ' ' ORDER BY reason) FROM agentvm.session_event WHERE kind = 'inventory' AND session_id IN ('$orphan', '$unknown')"), 'orphan unknown', 'the log tells');
is(sweep(), 0, 'nothing is left');

# ---- another installation's ----
my $ours = sql('SELECT installation_id FROM agentvm.installation');
my $foreign = provision($node, 'acme', "profile => 'plain'");
await_state($node, $foreign, 'ready');
tombstone($foreign);
sql("UPDATE agentvm.session SET launched_at = now() WHERE session_id = '$steady'; UPDATE agentvm.installation SET installation_id = gen_random_uuid()");
is(sweep(), 0, 'with another uuid none is ours');
sql("UPDATE agentvm.installation SET installation_id = '$ours'");

# ---- the runner does it by itself ----
$node->append_conf('postgresql.conf', "agentvm.inventory_interval = '1s'\n");
$node->reload;
await($node, "SELECT ended_at IS NOT NULL FROM agentvm.drift WHERE vm_id = 'agentvm-$foreign'", 't', name => 'the runner finds it, and ends it');
await($node, 'SELECT count(*) FROM agentvm.drift', 0, name => 'and sees that');
is(domains(), sessions($steady), 'only what has a session is left');
is(sql("SELECT state FROM agentvm.sessions WHERE session_id = '$steady'"), 'ready', 'which goes on');
done_testing();
