# What a hostile or careless command does to a real VM, at length: the runtime lives on, and stays small
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Stack;
use AgentVM::Test;
use Test::More;

my $stack = AgentVM::Stack->new;
my $node = $stack->node;
my $vm = $stack->ready;

sub in_vm { my ($command, @more) = @_; return join(', ', "agentvm.exec('$vm'", literal($command), @more) . ')'; }
# What a command has said, without the end of its last line
sub said { return $node->safe_psql('postgres', "SELECT rtrim(stdout, E'\\n') FROM " . in_vm(@_)); }
sub memory_kb { return said(q(awk '/^VmRSS/ { print $2 }' /proc/1/status)); }
sub files { return said('ls /proc/1/fd | wc -l'); }

is(said('cat /proc/1/comm'), 'agentvm-runtime', 'the runtime is PID 1');
psql_ok($node, 'SELECT 1 FROM ' . in_vm('true')) for 1 .. 3;
my ($memory, $files) = (memory_kb(), files());

# ---- ten thousand short commands ----
my $began = time;
my @clients = map { AgentVM::Client->new($node) } 1 .. 4;
$_->send("SELECT count(*), sum(e.exit_code), min(e.stdout), max(e.stdout) FROM generate_series(1, 2500) i, LATERAL agentvm.exec('$vm', 'echo \$((' || i || ' % 7)); exit \$((' || i || ' % 3))') e") for @clients;
my $end = time + 3600;
for my $client (@clients)
{
	my $answer;
	until (defined($answer = $client->answer) || time > $end) { }    # which gives up after a minute
	is($answer, "2500|2500|0\n|6\n", '2500 commands, each with its own output and exit code') or diag($client->error);
}
note(sprintf '10,000 commands in %.0f s', time - $began);
await($node, 'SELECT count(*) FROM agentvm.command', 0, name => 'none is under way any more');
is($node->safe_psql('postgres', "SELECT count(*) FILTER (WHERE kind = 'exec_started') > 10000, count(*) FILTER (WHERE kind = 'exec_started') - count(*) FILTER (WHERE kind = 'exec_ended') FROM agentvm.session_event"), 't|0', 'all are in the log, with their ends')
  or diag($node->safe_psql('postgres', 'SELECT kind, count(*) FROM agentvm.session_event GROUP BY 1'));
cmp_ok(files(), '<=', $files + 2, 'no file of the runtime is left open');
my $now = memory_kb();
cmp_ok($now, '<', $memory + 6 * 1024, "nor has it grown by more than what it remembers of them: $now of $memory kB");

# ---- a gigabyte of output ----
is($node->safe_psql('postgres', 'SELECT exit_code, truncated, length(stdout) BETWEEN 16000000 AND 16777216 FROM ' . in_vm('head -c 1000000000 /dev/zero', "timeout => '20 minutes'")), '0|t|t', 'a gigabyte of output');
$stack->beats($vm, 'beside which the heart beats');
$now = memory_kb();
cmp_ok($now, '<', $memory + 70 * 1024, "the runtime keeps no more of it than it may: $now kB");

# ---- a full disk, which here is memory ----
is($node->safe_psql('postgres', 'SELECT exit_code <> 0 FROM ' . in_vm('mkdir -p /full && mount -t tmpfs -o size=4m none /full && dd if=/dev/zero of=/full/it bs=64k')), 't', 'a disk is full');
fails_with($node, "SELECT agentvm.upload('$vm', '/full/more', convert_to(repeat('x', 100000), 'UTF8'))", '53100', undef, 'an upload is told so');
is(said('rm /full/it; ls -A /full; echo room'), 'room', 'and leaves nothing');
psql_ok($node, "SELECT agentvm.upload('$vm', '/full/more', convert_to(repeat('x', 100000), 'UTF8'))");

# ---- what else commands do ----
is($node->safe_psql('postgres', 'SELECT exit_code, timed_out FROM ' . in_vm('exec <&- >&- 2>&-; sleep 1; exit 4')), '4|f', 'one closes its files');
is($node->safe_psql('postgres', 'SELECT exit_code, timed_out FROM ' . in_vm("trap '' TERM HUP INT; while :; do :; done", "timeout => '2 s'")), '124|t', 'one ignores TERM, and spins');
like(said('kill -9 1; kill -TERM -1; echo tried', "timeout => '20 s'"), qr/^(?:tried)?\z/, 'one kills whatever it can');
$stack->beats($vm, 'the runtime lives on');
psql_ok($node, 'SELECT 1 FROM ' . in_vm(':() { : | : & }; :', "timeout => '20 s'"), 'a fork bomb');
await($node, 'SELECT exit_code FROM ' . in_vm('true'), 0, timeout => 180, name => 'is over');
$stack->beats($vm, 'and the runtime lives on');
psql_ok($node, "SELECT agentvm.terminate('$vm')");
$stack->ended($vm, 'requested');

done_testing();
