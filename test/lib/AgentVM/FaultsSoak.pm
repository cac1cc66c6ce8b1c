# Sessions come and go on EC2 while everything fails: the cloud in every way and on every call, workers, the server, the primary.
# In the end there is one VM for each session that lives, and none beside.
#
#	faults_soak(sessions => 60, seed => 1);                # its checks; what is left to chance follows from the seed, but for timing
#	faults_soak(sessions => 300, seed => 2, rounds => 5, figures => 1);    # so many times of each trouble
#
# A standby that holds every commit is promoted half way through.
package AgentVM::FaultsSoak;

use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Exporter 'import';
use List::Util qw(shuffle);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

our @EXPORT = qw(faults_soak);

# Kinds of sessions: team, what else provision() is told, whether their user ends them, and how they may end; those that may not end live.
# Team "lone" has but one place to launch in, so that it may find no room there; what team "bold" has of the spot market is of persistent requests.
my $room = 'failed capacity';
my @kinds = (
	{ name => 'lives', team => 'acme', ends_as => [] },
	{ name => 'lives elsewhere', team => 'bold', ends_as => [] },
	{ name => 'is ended', team => 'acme', user => 1, ends_as => ['terminated requested'] },
	{ name => 'is ended elsewhere', team => 'bold', user => 1, ends_as => ['terminated requested'] },
	{ name => 'grows old', team => 'bold', arguments => "max_lifetime => '3 s'", ends_as => ['terminated max_lifetime'] },
	{ name => 'never reports', team => 'acme', arguments => "profile => 'mute'", ends_as => [ 'failed bootstrap_timeout', 'failed provider_error' ] },
	{ name => 'has one place', team => 'lone', ends_as => [$room], may_live => 1 },
	{ name => 'has one place and is ended', team => 'lone', user => 1, ends_as => [ 'terminated requested', $room ] });

my @operations = qw(RunInstances DescribeInstances CancelSpotInstanceRequests TerminateInstances);
my %faults = (
	capacity => { only => 'RunInstances', chance => 12 },
	throttle => { chance => 4 },
	500 => { chance => 5 },
	html => { chance => 2 },
	slow => { chance => 12, ms => 1200 },
	drop => { chance => 6 },
	truncated => { chance => 3 },
	lost => { chance => 8 });

# What goes wrong on our side, by turns; the failover is one of them, once
my %troubles = (
	'a worker is told to go' => sub { my ($self) = @_; kill 'TERM', $self->worker; },
	'a worker is killed' => sub { my ($self) = @_; kill 'KILL', $self->worker; },
	'the server stops at once' => sub { my ($self) = @_; $self->{node}->stop('immediate'); $self->{node}->start; },
	'the standby takes over' => sub { my ($self) = @_; $self->fail_over; });

sub faults_soak
{
	my (%opt) = @_;
	my $self = bless { %opt, made => [], troubles => {} }, __PACKAGE__;
	my $began = time;

	srand($opt{seed});
	$self->say("AGENTVM_SEED=$opt{seed}, $opt{sessions} sessions");
	$self->begin;
	$self->storm;
	my $calm = time;
	$self->calm_down;
	$self->compare;
	$self->figures($calm - $began, time - $calm);
	$self->finish;
	return;
}

sub say { my ($self, $text) = @_; $self->{figures} ? diag($text) : note($text); return; }

# SQL that gets through in the end, whatever becomes of the server meanwhile
sub sql
{
	my ($self, $sql) = @_;
	my $end = time + 60;
	my ($out, $error);
	while (1)
	{
		my $code = eval { $self->{node}->psql('postgres', $sql, stdout => \$out, stderr => \$error, on_error_stop => 1) };
		return $out if defined $code && $code == 0;
		$error = $@ unless defined $code;
		# an error of the statement's own
		die "$sql: $error" if time > $end || (($code // 2) == 3 && $error !~ /terminating connection|server closed the connection|connection to server was lost/);
		sleep 0.1;
	}
}

sub worker
{
	my ($self) = @_;
	my $end = time + 60;
	my @pids;
	until (@pids = split /\n/, $self->sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher' ORDER BY pid"))
	{
		die 'no worker comes' if time > $end;
		sleep 0.1;
	}
	return $pids[ rand @pids ];
}

sub begin
{
	my ($self) = @_;
	my ($node, $faults, $moto) = ec2_node('primary', init => { allows_streaming => 1 }, conf => <<'CONF');
agentvm.dispatchers = 2
agentvm.lease = '4s'
agentvm.launch_settle = '2s'
agentvm.sweep_interval = '500ms'
wal_retrieve_retry_interval = '100ms'
restart_after_crash = on
CONF
	@$self{qw(node faults moto)} = ($node, $faults, $moto);
	my @subnets = @{ $moto->options->{subnet_ids} };
	my %rest = %{ $moto->options };
	delete $rest{instance_type};
	$node->safe_psql('postgres', "SELECT agentvm.create_profile('mute', 'ec2', runtime => true, bootstrap_timeout => '6 s'),
		agentvm.create_profile('patient', 'ec2', runtime => false, bootstrap_timeout => '1 h')");
	ec2_team($node, $_, $moto) for qw(bold lone);
	my %options = (
		acme => { %rest, instance_types => [qw(t3.micro t3.small)] },
		bold => { %rest, subnet_ids => [ @subnets[ 0, 1 ] ], instance_types => [qw(t3.small t3.micro t3.medium)], spot_persistent => JSON::PP::true },
		lone => { %rest, subnet_ids => [ $subnets[2] ], instance_type => 't3.micro', spot => JSON::PP::false });
	$node->safe_psql('postgres', "SELECT agentvm.set_provider('$_', 'ec2', " . json($options{$_}) . ')') for sort keys %options;

	$node->backup('backup');
	my $standby = $self->{standby} = PostgreSQL::Test::Cluster->new('standby');
	$standby->init_from_backup($node, 'backup', has_streaming => 1);
	$standby->start;
	$node->safe_psql('postgres', "ALTER SYSTEM SET synchronous_standby_names = '*'");
	$node->reload;
	await($node, 'SELECT sync_state FROM pg_stat_replication', 'sync', name => 'a standby that every commit waits for');

	# each fault on each operation it can happen to at least twice, the rest by chance
	my @by_chance;
	$faults->seed($self->{seed});
	foreach my $mode (shuffle sort keys %faults)
	{
		my %fault = %{ $faults{$mode} };
		my $only = delete $fault{only};
		foreach my $operation (grep { !$only || $_ eq $only } @operations)
		{
			$faults->set(mode => $mode, action => $operation, %fault, chance => 100, n => 2, skip => int(rand 10));
			push @by_chance, { mode => $mode, action => $operation, %fault };
		}
	}
	$faults->set(%$_) for @by_chance;
	return;
}

# One more session; asked for again until it is certain that it is there
sub provision_one
{
	my ($self, $n) = @_;
	my $kind = $kinds[ $n % @kinds ];
	my @arguments = ("idempotency_key => 'soak $n'", $kind->{arguments} // ());
	push @arguments, "profile => 'patient'" unless grep { /^profile/ } @arguments;
	my $id = $self->sql("SELECT agentvm.provision('$kind->{team}', " . join(', ', @arguments) . ')');
	push @{ $self->{made} }, { id => $id, kind => $kind };
	return;
}

sub end_one
{
	my ($self, $session) = @_;
	$self->sql("SELECT agentvm.terminate('$session->{id}')");
	$session->{ended} = 1;
	return;
}

# What waits for its next try need not wait as long as it would
sub hurry
{
	my ($self) = @_;
	$self->sql(q{UPDATE agentvm.session SET next_check_at = now() WHERE session_id IN (SELECT session_id FROM agentvm.session WHERE next_check_at > now() AND lease IS NULL
		AND (state = 'terminating' OR state = 'provisioning' AND NOT running) FOR UPDATE SKIP LOCKED); SELECT agentvm.wake()});
	return;
}

sub fail_over
{
	my ($self) = @_;
	$self->{node}->stop('immediate');
	$self->{standby}->promote;
	@$self{qw(old node)} = @$self{qw(node standby)};
	return;
}

sub storm
{
	my ($self) = @_;
	my $n = $self->{sessions};
	# when which trouble comes, by how many sessions there are
	my @names = shuffle((sort grep { !/standby/ } keys %troubles) x ($self->{rounds} // 1));
	splice @names, int(@names / 2), 0, 'the standby takes over';
	my @troubles = map { { at => int($n * ($_ + 0.5 + rand(0.5)) / @names), name => $names[$_] } } 0 .. $#names;

	for (my $made = 0; $made < $n || @troubles;)
	{
		for (1 .. 1 + int(rand(3))) { $self->provision_one($made++) if $made < $n; }
		my @users = shuffle grep { $_->{kind}{user} && !$_->{ended} } @{ $self->{made} };
		$self->end_one($_) for grep { rand() < 0.25 } @users;
		$self->hurry if rand() < 0.5;
		if (@troubles && $troubles[0]{at} <= $made)
		{
			my $trouble = shift @troubles;
			note(sprintf 'after %d sessions: %s', $made, $trouble->{name});
			$self->{troubles}{ $trouble->{name} }++;
			$troubles{ $trouble->{name} }->($self);
		}
		sleep rand(0.8);
	}
	return;
}

# No more faults: each session comes to what it is to come to
sub calm_down
{
	my ($self) = @_;
	my $faults = $self->{faults};
	$self->end_one($_) for grep { $_->{kind}{user} && !$_->{ended} } @{ $self->{made} };
	is(scalar(grep { !$self->{troubles}{$_} } keys %troubles), 0, 'a worker was told to go and one was killed, the server stopped, the standby took over');
	$faults->clear;

	my $end = time + 90;
	my $left = q{SELECT count(*) FROM agentvm.session WHERE NOT (ended_at IS NOT NULL OR state = 'ready' AND running AND deadline_at > now() + interval '1 min')};
	while ($self->sql($left) && time < $end) { $self->hurry; sleep 0.1; }
	is($self->sql($left), 0, 'no session is stuck') || diag($self->sql("SELECT string_agg(concat_ws(' ', session_id, state, end_reason, detail, handle - 'form' - 'env'), E'\\n') FROM agentvm.session WHERE ended_at IS NULL AND state <> 'ready'"));
	return;
}

# The sessions against the cloud's own list
sub compare
{
	my ($self) = @_;
	my %row = map { my ($id, $state, $reason, $vm) = split /\|/; ($id => { state => $state, as => $reason ? "$state $reason" : $state, vm => $vm }) } split /\n/,
	  $self->sql('SELECT session_id, state, end_reason, vm_id FROM agentvm.sessions');
	my (@wrong, %vms);

	is(scalar keys %row, $self->{sessions}, 'no session was lost, and none made twice');
	foreach my $session (@{ $self->{made} })
	{
		my ($kind, $row) = ($session->{kind}, $row{ $session->{id} });
		my @may = @{ $kind->{ends_as} };
		push @may, 'ready' if !@may || $kind->{may_live};
		push @wrong, "$session->{id}, which $kind->{name}: " . ($row ? $row->{as} : 'not there') unless $row && grep { $_ eq $row->{as} } @may;
	}
	is(join("\n", @wrong), '', 'each session has come to what it may come to');

	my @all = $self->{moto}->instances;
	my @running = grep { $_->{state} ne 'terminated' } @all;
	push @{ $vms{ $_->{tags}{'agentvm-session-id'} // 'none' } }, $_ for @all;
	my @live = grep { $row{$_}{state} eq 'ready' } sort keys %row;
	is(join("\n", sort map { "$_->{tags}{'agentvm-session-id'} $_->{id} $_->{state}" } @running), join("\n", sort map { "$_ $row{$_}{vm} running" } @live), 'running instances are those of live sessions, one each');
	is(scalar(grep { !$row{ $_->{tags}{'agentvm-session-id'} // '' } } @all), 0, 'launches without a session: none');
	is(join("\n", map { my $id = $_; "$id: " . join(', ', map { "$_->{id} $_->{state} $_->{type} $_->{subnet} $_->{market}" } @{ $vms{$id} }) } grep { @{ $vms{$_} } > 1 } sort keys %vms), '', 'duplicates: none, neither now nor before');
	cmp_ok(scalar @live, '>=', @{ $self->{made} } / 8, 'some live');

	# as the cloud counts: a token launches once
	my ($faults, %tokens, %bodies) = $self->{faults};
	foreach my $call (map { $_->{args} } $faults->requests('RunInstances'))
	{
		$tokens{ $call->{ClientToken} }++;
		$bodies{ join '&', map { "$_=$call->{$_}" } sort keys %$call }++;
	}
	is(scalar keys %bodies, scalar keys %tokens, 'each token came with the same bytes each time');
	is($faults->count('RunInstances', 'launched'), scalar @all, 'the cloud has launched an instance for each token that it did not refuse, and no more');
	is($faults->count('RunInstances', 'mismatched'), 0, 'and was asked for nothing else by any token');
	cmp_ok($faults->count('RunInstances', 'replayed'), '>=', 2, 'some came more than once');
	my %seen;
	$seen{"$_->{outcome} of $_->{action}"}++ for $faults->requests;
	my @missing = grep { !$seen{$_} } map { my $mode = $_; map { "$mode of $_" } $faults{$mode}{only} // @operations } sort keys %faults;
	is(join(', ', @missing), '', 'every fault has happened to every operation');
	is($self->sql("SELECT string_agg(name, ' ') FROM agentvm.health WHERE NOT ok"), '', 'health finds nothing amiss');
	$self->{tokens} = scalar keys %tokens;
	return;
}

sub figures
{
	my ($self, $storm, $calm) = @_;
	my %counts = %{ $self->{faults}->counts };
	my %ends;
	$ends{$_}++ for split /\n/, $self->sql("SELECT concat_ws(' ', state, end_reason) FROM agentvm.sessions");
	$self->say(sprintf '%d s of storm, %d s until all was well; %s; %d tokens, %d launched, %d replayed', $storm, $calm, join(', ', map { "$ends{$_} $_" } sort keys %ends),
		$self->{tokens}, map { $counts{$_}{RunInstances} // 0 } qw(launched replayed));
	$self->say(join ', ', map { "$_: $counts{received}{$_} calls, $counts{faulted}{$_} faults" } @operations);
	return;
}

# Those that live can be ended, and nothing is left
sub finish
{
	my ($self) = @_;
	$self->sql('SELECT count(agentvm.terminate(session_id)) FROM agentvm.sessions WHERE ended_at IS NULL');
	my $end = time + 60;
	while ($self->sql('SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL') && time < $end) { $self->hurry; sleep 0.1; }
	is($self->sql('SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL OR lease IS NOT NULL OR next_check_at IS NOT NULL OR handle IS NOT NULL'), 0, 'all can be ended, and nothing is left to do');
	is(scalar $self->{moto}->running, 0, 'and nothing runs');
	unlike(log_text($_), qr/PANIC|TRAP:|terminated by signal (?:6|11)/, 'no process crashed by itself') for grep { defined } @$self{qw(old node)};
	return;
}

1;
