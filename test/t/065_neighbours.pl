# Two databases of one cluster with the same cloud account, and what pg_upgrade makes of both
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Test;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', databases => 'postgres, second', conf => "agentvm.sweep_interval = '100ms'\nagentvm.launch_settle = '1s'\n");
$node->safe_psql('postgres', 'CREATE DATABASE second');
create_extension($node, 'second');
$node->safe_psql('second', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false); SELECT agentvm.create_team('acme', 'ec2'); SET log_statement = none; "
	  . "SELECT agentvm.set_provider('acme', 'ec2', " . json($moto->options) . ', ' . json($moto->secrets) . ')');
sub running_of { my ($cluster) = @_; return join ' ', sort map { $_->{id} } grep { ($_->{tags}{'agentvm-cluster'} // '') eq $cluster } $moto->running; }
my %uuid = map { $_ => $node->safe_psql($_, 'SELECT installation_id FROM agentvm.installation') } qw(postgres second);
isnt($uuid{postgres}, $uuid{second}, 'two installations');

# ---- the same team, key and calls in both ----
my %session;
for my $dbname (qw(postgres second))
{
	$session{$dbname} = [ split /\n/, $node->safe_psql($dbname, "SELECT agentvm.provision('acme', profile => 'plain', idempotency_key => 'key ' || i) FROM generate_series(1, 5) i") ];
}
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 5, dbname => $_, name => "five are ready in $_") for qw(postgres second);
for my $dbname (qw(postgres second))
{
	is(running_of($uuid{$dbname}), join(' ', sort split /\n/, $node->safe_psql($dbname, 'SELECT vm_id FROM agentvm.sessions')), "the VMs of $dbname are its own");
}
# one lets go of all; one ends all, also a launch of which only the cloud knows, which is looked for by its tag
my $others = running_of($uuid{second});
$faults->set(mode => 'lost', action => 'RunInstances', n => 1);
my $lost = provision($node, 'acme', "profile => 'plain'");
{ my $end = time + 60; sleep 0.02 while !$moto->for_session($lost) && time < $end; }
$node->safe_psql('postgres', "SELECT agentvm.terminate(session_id) FROM agentvm.sessions");
hurry_until($node, "SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL", 0);
is(running_of($uuid{postgres}), '', 'all VMs of one have ended');
is(running_of($uuid{second}), $others, 'none of the other');
is($node->safe_psql('second', "SELECT string_agg(DISTINCT state, ' ') FROM agentvm.sessions"), 'ready', 'whose sessions do not notice');
$node->safe_psql('postgres', "SELECT agentvm.adopt_cluster('fork'); SELECT * FROM agentvm.abandon()");
is(running_of($uuid{second}), $others, 'nor does it mind a fork');

# ---- pg_upgrade: another system identifier, so that both databases wait ----
my $hold = $node->safe_psql('second', "SELECT agentvm.provision('acme', profile => 'plain', options => '{\"spot\": false}')");
await($node, "SELECT state FROM agentvm.sessions WHERE session_id = '$hold'", 'ready', dbname => 'second');
$others = running_of($uuid{second});
$node->stop;
my $new = PostgreSQL::Test::Cluster->new('new');
$new->init;
my $bindir = $node->config_data('--bindir');
chdir $new->basedir or die;
command_ok([ 'pg_upgrade', '--no-sync', '-d', $node->data_dir, '-D', $new->data_dir, '-b', $bindir, '-B', $bindir, '-s', $new->host, '-p', $node->port, '-P', $new->port ], 'pg_upgrade')
  or map { diag("$_: " . slurp_file($_)) } glob($new->data_dir . '/pg_upgrade_output.d/*/log/*');
$new->append_conf('postgresql.conf', join '', grep { /^(?:shared_preload|max_worker|agentvm\.)/ } split /^/, slurp_file($node->data_dir . '/postgresql.conf'));
my $before = $faults->count('TerminateInstances') + $faults->count('RunInstances');
$new->start;
for my $dbname (qw(postgres second))
{
	await($new, 'SELECT passes > 5 FROM agentvm.stat_dispatcher', 't', dbname => $dbname, name => "$dbname: the dispatcher has looked");
	like($new->safe_psql($dbname, "SELECT detail FROM agentvm.health WHERE name = 'identity' AND NOT ok"), qr/: the cluster's system identifier is \d+, not \d+(?:; the database's OID is \d+, not \d+)?$/, "$dbname: and idles");
	fails_with($new, 'DROP EXTENSION agentvm', '55006', undef, 'the guard has moved, too', dbname => $dbname) if $dbname eq 'second';
	psql_ok($new, "SELECT agentvm.adopt_cluster('takeover')", "$dbname: takeover", dbname => $dbname);
}
is($faults->count('TerminateInstances') + $faults->count('RunInstances'), $before, 'no VM was made or ended');
is($new->safe_psql('second', 'SELECT installation_id FROM agentvm.installation'), $uuid{second}, 'the same installation');
$new->safe_psql('second', "SELECT agentvm.terminate('$hold')");
{ my $end = time + 60; sleep 0.05 while $moto->running == 6 && time < $end; }
is(scalar(my @left = $moto->running), 5, 'which goes on');

unlike(log_text($_), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed') for $node, $new;
done_testing();
