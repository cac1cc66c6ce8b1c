# pg_upgrade: its servers run no workers, and what was in the old cluster is in the new one
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $faults = AgentVM::Faults->new;
my $old = new_node('old', moto => $faults);
$old->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false), agentvm.create_profile('runtime', 'ec2', runtime => true)");
ec2_team($old, 'acme', $faults);
make_role($old, 'alice', teams => ['acme']);
my $ready = launch($old, 'acme', 'ready');
my $runtime = launch($old, 'acme', undef, "profile => 'runtime'", q(env => '{"A": "b"}'));
await_vm($old, $runtime);
my $ended = launch($old, 'acme', 'ready');
$old->safe_psql('postgres', "SELECT agentvm.terminate('$ended')");
await_state($old, $ended, 'terminated');
my %tables = map { $_ => 1 } split /\n/, $old->safe_psql('postgres', "SELECT c.oid::regclass FROM pg_extension, unnest(extconfig) t JOIN pg_class c ON c.oid = t WHERE extname = 'agentvm' AND relkind = 'r'");
sub rows { my ($node) = @_; return join "\n", map { "$_: " . $node->safe_psql('postgres', "SELECT count(*), md5(string_agg(md5(t::text), ',' ORDER BY md5(t::text))) FROM $_ t") } sort keys %tables; }

# ---- what pg_upgrade makes of a server: no launcher, nobody who acts, though a session is due ----
$old->stop;
my @binary = ('pg_ctl', '-w', '-D', $old->data_dir, '-l', $old->logfile, '-o', '-b', 'start');
system_or_bail(@binary);
is($old->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL'), 2, 'postgres -b serves');
my $calls = () = $faults->requests;
my $due = launch($old, 'acme');
sleep 2;
is($old->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE backend_type ~ 'agentvm'"), 0, 'without workers');
is(scalar(() = $faults->requests), $calls, 'and nobody calls the cloud');
is($old->safe_psql('postgres', "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'"), 'f', 'which health says');
my $before = rows($old);
my $secrets = $old->safe_psql('postgres', 'SELECT count(*) FROM agentvm.provider_secret');
cmp_ok($secrets, '>', 0, 'there are secrets');
system_or_bail('pg_ctl', '-w', '-D', $old->data_dir, 'stop');

# ---- pg_upgrade, to a cluster of the same version ----
my $new = PostgreSQL::Test::Cluster->new('new');
$new->init;
my $conf = slurp_file($old->data_dir . '/postgresql.conf');
$new->append_conf('postgresql.conf', join("\n", grep { /^(shared_preload_libraries|max_worker_processes|agentvm\.)/ } split /\n/, $conf) . "\n");
my $dir = PostgreSQL::Test::Utils::tempdir('upgrade');
chdir $dir;
my ($bindir) = grep { -x "$_/pg_upgrade" } split /:/, $ENV{PATH};
my @upgrade = ('pg_upgrade', '--no-sync', '-d', $old->data_dir, '-D', $new->data_dir, '-b', $bindir, '-B', $bindir, '-s', $new->host, '-p', $old->port, '-P', $new->port, '-U', 'postgres');
command_ok([ @upgrade, '--check' ], 'pg_upgrade --check');
command_ok(\@upgrade, 'pg_upgrade');
$new->append_conf('postgresql.conf', "agentvm.dispatchers = 0\n");
$new->start;
is(rows($new), $before, 'every row of every table is there');
is($new->safe_psql('postgres', "SELECT count(*) FROM agentvm.provider_secret"), $secrets, 'the secrets, too');
is($new->safe_psql('postgres', "SET ROLE alice; SELECT string_agg(session_id::text, ' ' ORDER BY session_id) FROM agentvm.sessions"), join(' ', sort $ready, $runtime, $ended, $due), 'a member sees them');
$new->append_conf('postgresql.conf', "agentvm.dispatchers = 1\n");
$new->reload;
await($new, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher'", 1, name => 'a dispatcher begins');
is($new->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL"), 3, 'all sessions live');
is($new->safe_psql('postgres', "SELECT count(*) FROM agentvm.health WHERE name = 'key_file' AND ok"), 1, 'and the secrets can be read');
unlike(log_text($_), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed') for $old, $new;

done_testing();
