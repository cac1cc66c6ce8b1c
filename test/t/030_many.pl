# 200 sessions, four dispatchers, four callers of dispatch(): each VM is launched once and ended once
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use IPC::Run qw(start);
use JSON::PP;
use List::Util qw(sum);
use PostgreSQL::Test::Utils;
use Test::More;

my $sessions = 200;
my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.dispatchers = 4\n");
ec2_team($node, "team$_", $moto) for 1 .. 4;
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 4);

my $stop = $node->basedir . '/stop';
my $loop = 'until [ -e "$1" ]; do psql -XAtq -d "$2" -c "CALL agentvm.dispatch()"; done';
my @outputs = my @errors = ('') x 4;
my @callers = map { start([ 'bash', '-c', $loop, 'loop', $stop, $node->connstr('postgres') ], '<', \undef, '>', \$outputs[$_], '2>', \$errors[$_]) } 0 .. 3;

$node->safe_psql('postgres', "SELECT agentvm.provision('team' || (n % 4 + 1), profile => 'plain') FROM generate_series(1, $sessions) n");
await($node, q{SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'}, $sessions);
my @vms = $moto->running;
is(scalar @vms, $sessions, 'that many instances run');
$node->safe_psql('postgres', 'SELECT agentvm.terminate(session_id) FROM agentvm.sessions');
await($node, q{SELECT count(*) FROM agentvm.sessions WHERE state = 'terminated'}, $sessions);
append_to_file($stop, '');
$_->finish for @callers;

# Under load the cloud itself fails now and then; then, and only then, is a call made again
my @failed = map { decode_json($_) } split /\n/, $node->safe_psql('postgres', q{SELECT detail FROM agentvm.session_event WHERE kind = 'provider_call' AND detail ? 'error_class'});
diag(encode_json($_)) for @failed;
is(scalar(grep { $_->{error_class} ne 'transient' } @failed), 0, 'no call has failed for a reason of its own');
my $failed = sub { my ($operation) = @_; return scalar grep { $_->{operation} eq $operation } @failed; };

my (%launches, %ends, %tags);
$launches{ $_->{args}{ClientToken} }++ for $faults->requests('RunInstances');
$ends{$_}++ for map { my $args = $_->{args}; map { $args->{$_} } grep { /^InstanceId\./ } keys %$args } $faults->requests('TerminateInstances');
$tags{ $_->{tags}{'agentvm-session-id'} }++ for $moto->instances;
is(scalar keys %launches, $sessions, 'a token for each session');
is(sum(values %launches), $sessions + $failed->('RunInstances'), 'and each was used once');
is(scalar keys %tags, $sessions, 'an instance for each session, in any state');
is(scalar(grep { $_ != 1 } values %tags), 0, 'and one only');
is(join(' ', sort keys %ends), join(' ', sort map { $_->{id} } @vms), 'each instance was ended');
is(sum(values %ends), $sessions + $failed->('TerminateInstances'), 'once');
is(scalar $moto->running, 0, 'nothing runs');
is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.sessions WHERE purchase = $$spot$$ AND attempt = 1'), $sessions, 'at the first attempt');
my $handled = 0;
$handled += $_ for map { /^(\d+)$/mg } @outputs;
cmp_ok($handled, '>', 0, 'callers of dispatch() took part');
is(join('', @errors), '', 'without errors');
cmp_ok($node->safe_psql('postgres', 'SELECT count(*) FILTER (WHERE claimed > 0) FROM agentvm.stat_dispatcher'), '>=', 2, 'as did several dispatchers');
cmp_ok($node->safe_psql('postgres', q{SELECT sum(credentials + capacity + throttled + quota + not_found + transient + permanent) FROM agentvm.stat_provider}), '<=', scalar @failed, 'no other call has failed');
done_testing();
