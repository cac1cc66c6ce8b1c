# An account is called no more often than it grants, by operation: a burst, then a steady rate, half of it after a refusal.
# Who waits holds nothing, keeps his place, and is in the way of no other operation and no other account
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Test;
use List::Util qw(max);
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.api_rate = 1\n");
ec2_team($node, 'other', $moto, $moto->account('222222222222'));
sub sql { return $node->safe_psql('postgres', $_[0]); }

# When each launch of a team left, oldest first
sub launches
{
	my ($team, $since) = @_;
	return sort { $a <=> $b } grep { $_ >= ($since // 0) } map { $_->{at} - $_->{seconds} } calls_for($faults, 'RunInstances', $team);
}

sub launch_many { my ($team, $count) = @_; return split /\n/, sql("SELECT agentvm.provision('$team', profile => 'plain') FROM generate_series(1, $count)"); }

sub ready { my ($team, $count) = @_; return await($node, "SELECT count(*) FROM agentvm.sessions WHERE team_id = '$team' AND state = 'ready'", $count, name => "$count sessions of team $team are ready"); }

# Seconds until a call of an action that has the value has left
sub seconds_until
{
	my ($action, $value) = @_;
	my $started = time;
	my @calls;
	sleep 0.02 until (@calls = calls_for($faults, $action, $value)) || time > $started + 30;
	return @calls ? $calls[0]{at} - $calls[0]{seconds} - $started : 30;
}

sub set
{
	my ($name, $value) = @_;
	sql("ALTER SYSTEM SET agentvm.$name = '$value'; SELECT pg_reload_conf()");
	return await($node, "SELECT setting FROM pg_settings WHERE name = 'agentvm.$name'", $value, name => "$name = $value");
}

# ---- 5 at once, then 2 a second; the others wait and hold nothing ----
my @sessions = launch_many('acme', 12);
await($node, "SELECT count(*) FROM agentvm.session WHERE detail = 'RunInstances waits for what the account grants' AND lease IS NULL", 7, name => 'who is beyond the burst waits without a lease');
is(sql("SELECT count(*) FROM agentvm.session WHERE handle::text ~ 'sent_at' AND lease IS NULL"), 0, 'and nothing says that its launch has been sent');
# who waits is held up until a token is there, for which another one comes first
my $client = AgentVM::Client->new($node);
$client->run("BEGIN; SELECT count(*) FROM (SELECT FROM agentvm.session WHERE detail ~ 'waits' FOR UPDATE) s");
await($node, "SELECT min(next_check_at) < clock_timestamp() FROM agentvm.session WHERE detail ~ 'waits'", 't', name => 'the first one could have its token');
my ($late) = launch_many('acme', 1);
await($node, "SELECT detail ~ 'waits' FROM agentvm.session WHERE session_id = '$late'", 't', name => 'who comes later waits, too, though there is a token');
$client->run('COMMIT');
sql('SELECT agentvm.wake()');
my ($elsewhere) = launch_many('other', 1);
cmp_ok(seconds_until('RunInstances', $elsewhere), '<', 2, 'another account does not wait');
my $ready = sql("SELECT session_id FROM agentvm.sessions WHERE team_id = 'acme' AND vm_id IS NOT NULL LIMIT 1");
my $vm = column($node, $ready, 'vm_id');
sql("SELECT agentvm.terminate('$ready')");
cmp_ok(seconds_until('TerminateInstances', $vm), '<', 2, 'nor does another operation');
ready('acme', 12);
my @times = launches('acme');
is(scalar @times, 13, 'each is launched once');
cmp_ok($times[4] - $times[0],  '<', 2, 'the burst leaves at once');
cmp_ok($times[5] - $times[0],  '>', 0.3, 'and no more than that');
cmp_ok($times[12] - $times[0], '>', 3.8, 'the others at the steady rate');
cmp_ok($times[12] - $times[0], '<', 12, 'and not much slower');
my ($last) = sort { $b->{at} - $b->{seconds} <=> $a->{at} - $a->{seconds} } calls_for($faults, 'RunInstances', 'acme');
ok((grep { ($_ // '') eq $late } values %{ $last->{args} }), 'who came last is launched last');
is(sql('SELECT sum(throttled) FROM agentvm.stat_provider'), 0, 'nobody was refused');
is(sql("SELECT ok || ' ' || detail FROM agentvm.health WHERE name = 'throttled'"), 'true no account is called more slowly than published', 'health has nothing to say');

# ---- a refusal halves the rate, of that operation only ----
$faults->set(mode => 'throttle', action => 'RunInstances', n => 1);
my ($refused) = launch_many('acme', 1);
await($node, "SELECT ok || ' ' || detail FROM agentvm.health WHERE name = 'throttled'",
	'true called more slowly than published: RunInstances us-east-1 123456789012: 50%', name => 'health tells which account');
my $since = time;
launch_many('acme', 6);
($elsewhere) = launch_many('other', 1);
cmp_ok(seconds_until('RunInstances', $elsewhere), '<', 2, 'another account does not notice');
$vm = column($node, $sessions[-1], 'vm_id');
sql("SELECT agentvm.terminate('$sessions[-1]')");
cmp_ok(seconds_until('TerminateInstances', $vm), '<', 2, 'nor does an end in this one');
ready('acme', 18);
@times = launches('acme', $since);
is(scalar @times, 7, 'each is launched once more, the refused one, too');
cmp_ok($times[6] - $times[0], '>', 4.2, 'at about half the rate');

# ---- which answers bring back, and a setting multiplies ----
set('api_rate', 100);
launch_many('acme', 10);
ready('acme', 28);
await($node, "SELECT detail FROM agentvm.health WHERE name = 'throttled'", 'no account is called more slowly than published', name => 'the rate has recovered');

# ---- refused again and again: slower each time, and seen; ends are not in its way ----
$faults->set(mode => 'throttle', action => 'RunInstances');
my @stuck = launch_many('acme', 3);
hurry_until($node, "SELECT ok FROM agentvm.health WHERE name = 'throttled'", 'f');
my @vms = split /\n/, sql("SELECT vm_id FROM agentvm.sessions WHERE team_id = 'acme' AND state = 'ready'");
sql("SELECT count(agentvm.terminate(session_id)) FROM agentvm.sessions WHERE team_id = 'acme' AND state = 'ready'");
cmp_ok(max(map { seconds_until('TerminateInstances', $_) } @vms), '<', 2, 'all ends leave at once');
sql("SELECT agentvm.terminate('$_')") for @stuck;
await_state($node, $_, 'terminated') for @stuck;
is(scalar(map { calls_for($faults, 'DescribeInstances', $_) } @stuck), 0, 'a launch that was not sent, or refused, needs no looks');
$faults->clear;

# ---- without limits ----
set('api_rate', 0);
$since = time;
launch_many('acme', 12);
ready('acme', 12);
@times = launches('acme', $since);
cmp_ok($times[-1] - $times[0], '<', 3, 'with api_rate = 0 all go at once');

done_testing();
