# pg_upgrade: everything comes over, and waits until it is adopted; then the VMs of before are looked after as ever
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use File::Basename qw(dirname);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($old, $faults, $moto) = ec2_node('old');
make_role($old, 'alice', teams => ['acme']);
my $session = launch($old, 'acme', 'ready', q{idempotency_key => 'the one'}, q{tags => '{"a": "b"}'});
my $ended = launch($old, 'acme', 'ready');
$old->safe_psql('postgres', "SELECT agentvm.terminate('$ended')");
await_state($old, $ended, 'terminated');
$old->safe_psql('postgres', "SELECT agentvm.seal_audit()");
my ($vm) = map { $_->{id} } $moto->for_session($session);

# The workers of before must be gone, or they would write while they are compared
$old->stop;
$old->append_conf('postgresql.conf', "agentvm.databases = ''\n");
$old->start;
sub rows
{
	my ($node) = @_;
	my ($out, $error) = run_command([ 'pg_dump', '--data-only', '--inserts', '-n', 'agentvm', '-d', $node->connstr('postgres') ]);
	return $out =~ s/^\\(?:un)?restrict .*\n//mgr;    # a word that is another each time
}
my $rows = rows($old);
like($rows, qr/\Q$session\E.*\Q$ended\E/s, 'a dump has both sessions');
$old->stop;

my $new = PostgreSQL::Test::Cluster->new('new');
$new->init;
$new->append_conf('postgresql.conf', join "\n", grep { /^(?:shared_preload|max_|agentvm\.)/ } split /\n/, slurp_file($old->data_dir . '/postgresql.conf'));
my $bin = dirname(`which pg_ctl`);
my $here = PostgreSQL::Test::Utils::tempdir('upgrade');
my @upgrade = ('pg_upgrade', '--no-sync', '-d', $old->data_dir, '-D', $new->data_dir, '-b', $bin, '-B', $bin, '-p', $old->port, '-P', $new->port, '-s', $new->host);
command_ok([ 'bash', '-c', 'cd "$0" && exec "$@"', $here, @upgrade ], 'pg_upgrade works');
$new->start;
is(rows($new), $rows, 'every row has come over');

my $received = $faults->counts->{received};
$new->append_conf('postgresql.conf', "agentvm.databases = 'postgres'\n");
$new->restart;
await($new, 'SELECT passes > 5 FROM agentvm.stat_dispatcher', 't', name => 'the dispatcher looks several times');
like($new->safe_psql('postgres', "SELECT detail FROM agentvm.health WHERE name = 'identity' AND NOT ok"), qr/adopt_cluster/, 'health says that it waits to be adopted');
is_deeply($faults->counts->{received}, $received, 'it makes no call');

$new->safe_psql('postgres', "SELECT agentvm.adopt_cluster('takeover')");
is($new->safe_psql('postgres', as_role('alice', "SELECT session_id FROM agentvm.sessions WHERE state = 'ready'")), $session, 'a member is still one, and sees its session');
is($new->safe_psql('postgres', as_role('alice', q{SELECT agentvm.provision('acme', profile => 'plain', idempotency_key => 'the one', tags => '{"a": "b"}')})), $session, 'its idempotency key is known');
is($new->safe_psql('postgres', "SELECT count(*) FROM agentvm.verify_audit('acme')"), 0, 'the seals of before are whole');
$new->safe_psql('postgres', as_role('alice', "SELECT agentvm.terminate('$session')"));
await_state($new, $session, 'terminated');
is_deeply([ map { $_->{id} } $moto->running ], [], "its VM $vm is ended, with the credentials of before");
launch($new, 'acme', 'ready');
done_testing();
