# Servers started from backups: they wait until adopted, database by database, across restarts; what a stopped copy can and cannot know
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my ($primary, $faults, $moto) = ec2_node('primary', databases => 'postgres, second', conf => "agentvm.sweep_interval = '100ms'\n", init => { allows_streaming => 1, has_archiving => 1 });
$primary->safe_psql('postgres', 'CREATE DATABASE second');
create_extension($primary, 'second');
$primary->safe_psql('second', "SELECT agentvm.create_team('acme'); SELECT agentvm.provision('acme')");
await($primary, 'SELECT state FROM agentvm.sessions', 'ready', dbname => 'second');
my $session = launch($primary, 'acme', 'ready');
my $uuid = $primary->safe_psql('postgres', 'SELECT installation_id FROM agentvm.installation');

# {received} calls of all kinds; the file; health's row
sub calls { my $received = $faults->counts->{received}; return join ' ', map { "$_=$received->{$_}" } sort keys %$received; }
sub file { return $_[0]->data_dir . '/agentvm.restored'; }
sub identity { my ($node, $dbname) = @_; return $node->safe_psql($dbname // 'postgres', "SELECT ok || ' ' || detail FROM agentvm.health WHERE name = 'identity'"); }
sub restored_id { my ($id) = slurp_file(file($_[0])) =~ /^([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\n\z/; return $id; }

# The dispatchers of a server look several times, and make no call
sub idles
{
	my ($node, $name, @dbnames) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $before = calls();
	for my $dbname (@dbnames ? @dbnames : qw(postgres second))
	{
		await($node, 'SELECT passes > 5 FROM agentvm.stat_dispatcher', 't', dbname => $dbname, name => "$name: the dispatcher of $dbname has looked several times");
		like(identity($node, $dbname), qr/^false nothing acts before agentvm.adopt_cluster.*: the server has been restored from a backup$/, "$name: health says why it idles");
	}
	is(calls(), $before, "$name: no call was made");
	return fails_with($node, 'CALL agentvm.dispatch()', '55000', qr/the server has been restored from a backup/, "$name: dispatch() does not act either", dbname => $dbnames[0] // 'postgres');
}
sub acts
{
	my ($node, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(identity($node), 'true the sessions are this database\'s own', "$name: in order");
	my $new = launch($node, 'acme', 'ready');
	is(scalar(my @vms = $moto->for_session($new)), 1, "$name: launches");
	return $new;
}
sub restore { my ($name, $backup, %opt) = @_; my $node = PostgreSQL::Test::Cluster->new($name); $node->init_from_backup($primary, $backup, %opt); return $node; }

# ---- point-in-time recovery ----
$primary->backup('backup');
my $unheard = launch($primary, 'acme');    # provisioned, perhaps not launched, when the clock stops
$primary->safe_psql('postgres', "SELECT pg_create_restore_point('here')");
my $later = launch($primary, 'acme', 'ready');
await_state($primary, $unheard, 'ready');
my $wal = $primary->safe_psql('postgres', 'SELECT pg_walfile_name(pg_current_wal_lsn())');
$primary->safe_psql('postgres', 'SELECT pg_switch_wal()');
await($primary, "SELECT last_archived_wal >= '$wal' FROM pg_stat_archiver", 't', name => 'the WAL is archived');
$primary->stop('immediate');
my $restored = restore('restored', 'backup', has_restoring => 1, standby => 0);
$restored->append_conf('postgresql.conf', "recovery_target_name = 'here'\nrecovery_target_action = 'promote'\n");
$restored->start;
$restored->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()') or die 'recovery does not end';
is($restored->safe_psql('postgres', "SELECT count(*) FROM agentvm.session WHERE session_id = '$later'"), 0, 'a time before the last session');
like(my $id = restored_id($restored), qr/^.{14}4/, 'the server has noted that it was restored');
is((stat file($restored))[2] & 07777, 0600, 'for itself');
idles($restored, 'recovered');
like(log_text($restored), qr/LOG:  agentvm: this server is started from a backup: nothing is dispatched until its databases are adopted/, 'the log says so');
my $said = () = log_text($restored) =~ /LOG:  agentvm: database "postgres" is a copy that nobody has adopted/g;
is($said, 1, 'and the dispatcher, once');
$restored->restart;
idles($restored, 'restarted');
$restored->stop('immediate');
$restored->start;
idles($restored, 'crashed');
is(restored_id($restored), $id, 'it is the same restore');
$restored->safe_psql('postgres', "SELECT agentvm.adopt_cluster('takeover')");
await_state($restored, $unheard, 'ready');
is(scalar(my @vms = $moto->for_session($unheard)), 1, 'a launch that the backup knew as not begun ends as one VM: its token is the same');
acts($restored, 'taken over');
is($restored->safe_psql('postgres', 'SELECT installation_id, restore_id FROM agentvm.installation'), "$uuid|$id", 'it is the same installation, after that restore');
idles($restored, 'the other database', 'second');
$restored->restart;
acts($restored, 'restarted after the takeover');
idles($restored, 'the other database still', 'second');
$restored->safe_psql('postgres', 'CREATE DATABASE third');
create_extension($restored, 'third');
is($restored->safe_psql('third', "SELECT agentvm.create_team('acme'); SELECT agentvm.sweep()"), "\n0", 'a database made later is in order');

# a standby of it is no further restore; a backup of it is
$restored->backup('again');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($restored, 'again', has_streaming => 1);
$standby->append_conf('postgresql.conf', "recovery_target_name = ''\n");
$standby->start;
$restored->wait_for_catchup($standby);
$restored->stop;
$standby->promote;
await($standby, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 't', name => 'its standby is promoted');
is(restored_id($standby), $id, 'and has the same restore');
acts($standby, 'a promoted standby of it');
$standby->stop;
my $copy = PostgreSQL::Test::Cluster->new('copy');
$copy->init_from_backup($restored, 'again');
$copy->start;
isnt(restored_id($copy), $id, 'a backup of it is another restore');
idles($copy, 'a restored backup of a restored server');

# ---- that one is forked: the VMs are left alone ----
my $running = join ' ', sort map { $_->{id} } $moto->running;
$copy->safe_psql('postgres', "SELECT agentvm.adopt_cluster('fork')");
is($copy->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL'), 0, 'a fork knows no live session');
my $own = acts($copy, 'forked');
$copy->safe_psql('postgres', "SELECT agentvm.terminate('$own')");
hurry_to($copy, $own, 'terminated requested');
is(join(' ', sort map { $_->{id} } $moto->running), $running, 'all VMs of the original are as they were');

# ---- what the file may be like ----
$copy->stop;
my $content = slurp_file(file($copy));
unlink file($copy) or die;
$copy->start;
like(identity($copy), qr/file "agentvm\.restored" with restore id \S+ is missing from the data directory/, 'a file that is missing is missed');
$copy->stop;
append_to_file(file($copy), "no id\n");
$copy->start;
like(identity($copy), qr/file "agentvm\.restored" in the data directory cannot be read: it does not hold a restore id/, 'garbage is not read');
fails_with($copy, "SELECT agentvm.adopt_cluster('$_')", '55000', qr/cannot be read: it does not hold a restore id.*HINT:/s, "nor adopted ($_)") for qw(takeover fork);
unlink file($copy) or die;
append_to_file(file($copy), $content);
is(identity($copy), 'true the sessions are this database\'s own', 'put back, it is read without a restart');
$copy->append_conf('postgresql.conf', "shared_preload_libraries = ''\n");
$copy->restart;
is($copy->safe_psql('postgres', 'CALL agentvm.dispatch()'), 0, 'without the library preloaded dispatch() reads it, too');
$copy->safe_psql('postgres', 'UPDATE agentvm.installation SET restore_id = NULL');
fails_with($copy, 'CALL agentvm.dispatch()', '55000', qr/the server has been restored from a backup/, 'and heeds it');
$copy->stop;

# ---- it cannot be written ----
my $full = restore('full', 'backup', has_restoring => 1, standby => 0);
mkdir file($full) or die;
append_to_file(file($full) . '/in_the_way', 'x');
$full->start;
$full->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()') or die 'recovery does not end';
like(log_text($full), qr/LOG:  agentvm: this server is started from a backup, which is not remembered beyond this run/, 'the log is loud about it');
idles($full, 'not remembered');
$full->restart;
like(identity($full), qr/^false .*cannot be read/, 'what is in the way still is at the next start');
$full->stop;

# ---- a copy of a stopped data directory cannot be told from the original: README says to start it without dispatchers, and to fork it ----
$restored->start;
my $kept = acts($restored, 'the original');
$restored->stop;
$restored->backup_fs_cold('cold');
my $clone = PostgreSQL::Test::Cluster->new('clone');
$clone->init_from_backup($restored, 'cold');
unlink $clone->data_dir . "/$_" for qw(backup_label postmaster.pid);
$clone->append_conf('postgresql.conf', "agentvm.databases = ''\n");
$running = join ' ', sort map { $_->{id} } $moto->running;
my $before = calls();
$clone->start;
is(identity($clone), 'true the sessions are this database\'s own', 'a clone takes itself for the original');
$clone->safe_psql('postgres', "SELECT agentvm.adopt_cluster('fork')");
$clone->append_conf('postgresql.conf', "agentvm.databases = 'postgres'\n");
$clone->reload;
await($clone, "SELECT ok FROM agentvm.health WHERE name = 'dispatcher'", 't', name => 'forked and served');
is($clone->safe_psql('postgres', "SELECT end_reason FROM agentvm.sessions WHERE session_id = '$kept'"), 'orphan', 'it has forgotten what lives');
is(calls(), $before, 'no call was made');
$own = acts($clone, 'the clone');
$clone->safe_psql('postgres', "SELECT agentvm.terminate('$own')");
hurry_to($clone, $own, 'terminated requested');
is(join(' ', sort map { $_->{id} } $moto->running), $running, 'and no VM of the original is touched');

unlike(log_text($_), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed') for $restored, $standby, $copy, $full, $clone;
done_testing();
