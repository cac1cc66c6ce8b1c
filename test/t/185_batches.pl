# Ends of, and looks at, many instances of an account are few calls; each session has its own answer, one that is refused
# takes no other with it, and no restart loses any
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use List::Util qw(max);
use Test::More;
use Time::HiRes qw(sleep time);

# launches are many here, and not what this is about: their rate is limited from the first end on only
my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.api_rate = 0\nagentvm.dispatchers = 1\n");
ec2_team($node, 'twin', $moto);
ec2_team($node, 'other', $moto, secrets => $moto->user('ec2:*'));
sub sql { return $node->safe_psql('postgres', $_[0]); }

sub launch_many { my ($team, $count) = @_; return split /\n/, sql("SELECT agentvm.provision('$team', profile => 'plain') FROM generate_series(1, $count)"); }

sub in_state { my ($state, @sessions) = @_; return "SELECT count(*) FROM agentvm.sessions WHERE state = '$state' AND session_id IN (" . join(', ', map { "'$_'" } @sessions) . ')'; }

sub ready { return hurry_until($node, in_state('ready', @_), scalar @_, name => @_ . ' sessions are ready'); }

sub ended { return await($node, in_state('terminated', @_), scalar @_, name => @_ . ' sessions have ended'); }

sub vm { return map { column($node, $_, 'vm_id') } @_; }

sub end_all { return sql('SELECT count(agentvm.terminate(session_id)) FROM agentvm.session WHERE session_id IN (' . join(', ', map { "'$_'" } @_) . ')'); }

# The ids in each call of an action since a time
sub ids { my ($call) = @_; return map { $call->{args}{$_} } grep { /^InstanceId\./ } sort keys %{ $call->{args} }; }
sub calls_since { my ($action, $since) = @_; return grep { $_->{at} - $_->{seconds} >= $since } $faults->requests($action); }

# ---- looks ----
my $nothing = '<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><reservationSet/></DescribeInstancesResponse>';
$faults->set(action => 'DescribeInstances', mode => 'body', body => $nothing);
my @sessions = launch_many('acme', 100);
await($node, 'SELECT count(*) FROM agentvm.session WHERE vm_id IS NOT NULL', 100, name => 'a hundred VMs are launched');
$faults->clear;
sleep 0.2;
my $since = time;
sql('UPDATE agentvm.session SET next_check_at = now() WHERE lease IS NULL AND NOT running; SELECT agentvm.wake()');
await($node, in_state('ready', @sessions), 100, name => 'and found running');
my @calls = calls_since('DescribeInstances', $since);
cmp_ok(scalar @calls, '<=', 12, 'by a few looks');
cmp_ok(max(map { scalar ids($_) } @calls), '>=', 30, 'at many of them');
my @running = $moto->running;
is(join(' ', sort(vm(@sessions))), join(' ', sort map { $_->{id} } @running), 'each session has a VM of its own');
# two of moto's may have the same one
my %address = map { split / / } split /\n/, sql("SELECT vm_id || ' ' || address FROM agentvm.sessions");
is_deeply(\%address, { map { $_->{id} => $_->{address} } @running }, 'and the address of that one');

# ---- ends ----
sql("ALTER SYSTEM SET agentvm.api_rate = 1; SELECT pg_reload_conf()");
await($node, "SHOW agentvm.api_rate", 1);
my %vms = map { $_ => 1 } vm(@sessions);
$since = time;
is(end_all(@sessions), 100, 'all are to end');
ended(@sessions);
@calls = calls_since('TerminateInstances', $since);
cmp_ok(scalar @calls, '<=', 8, 'a hundred ends are a few calls');
my @named = map { ids($_) } @calls;
is(join(' ', sort @named), join(' ', sort keys %vms), 'that name each VM once');
is(scalar $moto->running, 0, 'nothing runs');
is(sql("SELECT calls FROM agentvm.stat_provider WHERE operation = 'TerminateInstances'"), scalar @calls, 'each call is counted once');
is(sql("SELECT count(*) FROM agentvm.session_event WHERE kind = 'provider_call' AND detail ->> 'operation' = 'TerminateInstances'"), 100, 'and is in the log of each session');
is(sql('SELECT sum(in_flight) FROM agentvm.stat_dispatcher'), 0, 'none counts any more');
sql("ALTER SYSTEM SET agentvm.api_rate = 0; SELECT pg_reload_conf()");

# ---- whose credentials are the same, and only those ----
my @teams = map { [ launch_many($_, 8) ] } qw(acme twin other);
ready(@$_) for @teams;
my %team = map { my $team = $_; map { $_ => $team == 2 ? 'other' : 'acme' } vm(@{ $teams[$team] }) } 0 .. 2;
$since = time;
end_all(map { @$_ } @teams);
ended(map { @$_ } @teams);
@calls = calls_since('TerminateInstances', $since);
is(scalar(grep { my %accounts = map { $team{$_} => 1 } ids($_); keys %accounts != 1 } @calls), 0, 'no call is for two accounts');
cmp_ok(scalar @calls, '<=', 6, 'teams with the same keys are in the same call');

# ---- one unknown id: EC2 names it, and ends none ----
@sessions = launch_many('acme', 40);
ready(@sessions);
my $unknown = pop @sessions;
my ($real) = vm($unknown);
sql("UPDATE agentvm.session SET vm_id = 'i-0123456789abcdef0' WHERE session_id = '$unknown'");
$since = time;
end_all(@sessions, $unknown);
ended(@sessions);
@calls = calls_since('TerminateInstances', $since);
cmp_ok(scalar @calls, '<=', 9, 'the others are asked for again, together');
is(scalar(grep { grep { $_ eq 'i-0123456789abcdef0' } ids($_) } @calls), 1, 'the unknown one is not');
is(sql("SELECT count(*) FROM agentvm.session_event WHERE kind = 'provider_call' AND detail ->> 'operation' = 'TerminateInstances' AND detail ->> 'error' IS NOT NULL AND session_id <> '$unknown'"),
	0, 'nobody else has an error on record');
hurry_to($node, $unknown, 'terminated');
cmp_ok(scalar(grep { grep { $_ eq 'i-0123456789abcdef0' } ids($_) } calls_since('DescribeInstances', $since)), '>=', 3, 'it is called gone after looks of its own');
$moto->terminate($real);

# ---- one that is refused without being named: halves ----
@sessions = launch_many('acme', 33);
ready(@sessions);
my $forbidden = pop @sessions;
my ($protected) = vm($forbidden);
$faults->set(action => 'TerminateInstances', mode => 'error', status => 403, code => 'UnauthorizedOperation', message => 'You are not authorized to perform this operation.', match => $protected);
$since = time;
end_all(@sessions, $forbidden);
ended(@sessions);
@calls = calls_since('TerminateInstances', $since);
cmp_ok(scalar @calls, '<=', 24, 'the others end by ever smaller calls');
await($node, "SELECT retries > 0 FROM agentvm.session WHERE session_id = '$forbidden'", 't', name => 'the refusal is that of one session');
ok((grep { $_->{error} && $_->{error} =~ /^UnauthorizedOperation: / } events($node, $forbidden)), 'which has it on record');
is(state_of($node, $forbidden), 'terminating requested', 'and is not called ended');
$faults->clear;
hurry_to($node, $forbidden, 'terminated');

# ---- bad answers are everybody's ----
@sessions = launch_many('acme', 20);
ready(@sessions);
$faults->set(action => 'TerminateInstances', mode => $_, n => 1) for qw(throttle lost truncated 500 drop);
end_all(@sessions);
hurry_until($node, in_state('terminated', @sessions), 20, name => 'no bad answer to many is taken for an end');
$faults->clear;

# ---- a restart in the middle of a call ----
@sessions = launch_many('acme', 30);
ready(@sessions);
$faults->set(action => 'TerminateInstances', mode => 'slow', ms => 20000);
my $before = $faults->count('TerminateInstances');
end_all(@sessions);
my $end = time + 30;
sleep 0.02 while $faults->count('TerminateInstances') == $before && time < $end;
$node->stop('immediate');
$faults->clear;
$node->start;
ended(@sessions);
is(scalar $moto->running, 0, 'nothing runs');

done_testing();
