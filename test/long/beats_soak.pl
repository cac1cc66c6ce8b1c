# A million sessions beat for 10 minutes, 20,000 times a second: every update is HOT, and autovacuum keeps the table from growing.
# AGENTVM_SOAK_SECONDS for another length
use strict;
use warnings;
use AgentVM::Test;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $live = 1_000_000;
my $seconds = $ENV{AGENTVM_SOAK_SECONDS} // 600;
my $node = new_node('main', conf => "log_statement = none\nautovacuum_naptime = '15s'\nshared_buffers = '512MB'\nmax_wal_size = '4GB'\n");
my $bench = 'test/bench';
sub sql { return $node->safe_psql('postgres', $_[0]); }
sub sizes { return sql("SELECT pg_table_size('agentvm.session_heartbeat') / 1048576, pg_indexes_size('agentvm.session_heartbeat') / 1048576, pg_table_size('agentvm.session') / 1048576"); }

# Beats for so long, as fast as asked for; batches a second
sub beats
{
	my ($for) = @_;
	my $out = '';
	run_log([ 'pgbench', '-n', '-M', 'prepared', '-c', 2, '-R', 20, '-T', $for, '-D', "live=$live", '-f', "$bench/beat.sql", $node->connstr('postgres') ], '>', \$out);
	return ($out =~ /^tps = ([\d.]+)/m)[0];
}

run_log([ 'psql', '-XqAt', '-v', "live=$live", '-f', "$bench/fleet.sql", $node->connstr('postgres') ]);
is(sql('SELECT count(*) FROM agentvm.session_heartbeat'), $live, 'a million sessions');
beats(60);    # every one has beaten
my $before = sizes();
sql('SELECT pg_stat_reset()');
my $started = time;
my $rate = beats($seconds);
my $after = sizes();
cmp_ok($rate, '>=', 19, "$rate batches of 1000 a second, of the 20 that are asked for");
await($node, "SELECT n_tup_upd >= 900 * $rate * $seconds FROM pg_stat_user_tables WHERE relname = 'session_heartbeat'");
my $updates = sql("SELECT n_tup_upd, n_tup_hot_upd, autovacuum_count, n_dead_tup FROM pg_stat_user_tables WHERE relname = 'session_heartbeat'");
my ($all, $hot) = split /\|/, $updates;
diag("heartbeats heap|index|session in MB: $before before, $after after $seconds s; updates|HOT|autovacuums|dead: $updates");
is($hot, $all, 'all updates are HOT');
my ($heap_before, $index_before) = split /\|/, $before;
my ($heap_after, $index_after) = split /\|/, $after;
cmp_ok($heap_after, '<=', 1.1 * $heap_before + 1, 'the table has not grown');
is($index_after, $index_before, 'nor has its index');

done_testing();
