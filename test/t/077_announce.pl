# Each team hears of its sessions' changes on a channel whose name only its members know: each change once, in order
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Listener;
use AgentVM::Test;
use List::Util qw(sum);
use PostgreSQL::Test::Utils;
use Test::More;

# nothing is due to the look of every sweep_interval; a format of times that nobody can parse
my $node = new_node('main', init => { allows_streaming => 1 }, conf => <<'CONF');
agentvm.sweep_interval = '1h'
max_prepared_transactions = 10
datestyle = 'SQL, DMY'
timezone = 'Asia/Kathmandu'
CONF
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme'); SELECT agentvm.create_team('globex')");
make_role($node, 'alice', teams => ['acme', 'globex']);
make_role($node, 'bob', teams => ['acme']);
make_role($node, 'monitor', grants => ['agentvm_monitor']);
make_role($node, 'gateway', grants => ['agentvm_gateway']);
await_state($node, provision($node, 'acme'), 'ready');    # the dispatcher has begun

sub channel { return $node->safe_psql('postgres', "SELECT agentvm.channel('$_[0]')"); }
sub terminate { my ($session, $reason) = @_; return $node->safe_psql('postgres', "SELECT agentvm.terminate('$session', " . literal($reason // 'requested') . ')'); }

# A session that comes and goes; whoever hears of its end has heard of all that was before
sub marker
{
	my ($listener, $team) = @_;
	my $session = provision($node, $team // 'acme');
	$listener->until($session, 'ready');
	return $session;
}

# What the log has of these sessions, as the notices should be
sub logged
{
	my (@sessions) = @_;
	my $ids = join(', ', map { "'$_'" } @sessions);
	return split /\n/, $node->safe_psql('postgres', "SELECT concat_ws(' ', session_id, coalesce(old_state, '-'), new_state, coalesce(reason, '-'), to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))
		FROM agentvm.session_event WHERE kind = 'state' AND session_id IN ($ids) ORDER BY session_id, event_id");
}
sub said { return map { join ' ', $_->{session_id}, $_->{old} // '-', $_->{new}, $_->{reason} // '-', $_->{at} } @_; }

# ---- the channel ----
my ($acme, $globex) = map { channel($_) } qw(acme globex);
like($acme, qr/^agentvm_[0-9a-f]{48}$/, 'a channel with 192 random bits in its name');
isnt($acme, $globex, 'every team has its own');
is($node->safe_psql('postgres', as_role('bob', "SELECT agentvm.channel('acme')")), $acme, 'members are told');
fails_with($node, as_role('bob', "SELECT agentvm.channel('$_')"), '42704', qr/team "$_" does not exist/, "$_: as if it did not exist") for qw(globex nobody);
for my $role (qw(monitor gateway))
{
	fails_with($node, as_role($role, "SELECT agentvm.channel('acme')"), '42501', qr/permission denied/, "role $role is not told");
	fails_with($node, as_role($role, 'SELECT channel FROM agentvm.team'), '42501', qr/permission denied/, 'nor can it read it');
}
fails_with($node, 'SELECT agentvm.channel(NULL)', '22004');

# ---- a life ----
my $listener = AgentVM::Listener->new($node, $acme);
my $others = AgentVM::Listener->new($node, $globex);
my $hostile = q<"}', "new": "x\\" \u0000 $$ %s>;
my $session = provision($node, 'acme', 'agent_id => ' . literal($hostile), 'tags => ' . json({ $hostile => $hostile }));
$listener->until($session, 'ready');
terminate($session, $hostile);
$listener->until($session, 'terminated');
my @life = $listener->of($session);
is(join(', ', map { join ' ', $_->{old} // '-', $_->{new}, $_->{reason} // '-' } @life), '- provisioning -, provisioning ready -, ready terminating requested, terminating terminated requested', 'each change is heard');
is_deeply([ said(@life) ], [ logged($session) ], 'as the log has it, times in UTC to the microsecond');
is(join(' ', sort keys %{ JSON::PP::decode_json($_->{payload}) }), 'at new old reason session_id', 'five members') for $life[0], $life[3];
is(scalar(grep { !exists $_->{old} || !exists $_->{reason} } @life), 0, 'null where there is nothing to tell');
marker($others, 'globex');
is(scalar $others->of($session), 0, 'nothing of it on the channel of another team');
is(scalar(grep { $_->{channel} ne $globex } $others->heard), 0, 'nor anything else');

# ---- rolled back; committed in another order than begun ----
my ($slow, $fast) = map { AgentVM::Client->new($node) } 1, 2;
my @undone = ($slow->run("BEGIN; SELECT agentvm.provision('acme')"), $slow->run("SAVEPOINT s; SELECT agentvm.provision('acme')"));
$slow->run('ROLLBACK');
my $late = $slow->run("BEGIN; SELECT agentvm.provision('acme')");
push @undone, $slow->run("SAVEPOINT s; SELECT agentvm.provision('acme')");
my @late = ($late, $slow->run("ROLLBACK TO s; SELECT agentvm.provision('acme')"));
my @early = map { marker($listener) } 1 .. 3;
is(scalar $listener->of($late), 0, 'what is not committed is not announced');
$slow->run('COMMIT');
$listener->until($_, 'ready') for @late;
marker($listener);
is_deeply([ sort(map { said($listener->of($_)) } @early, @late) ], [ sort(logged(@early, @late)) ], 'then it is, though what came after it has been already');
is(scalar(map { $listener->of($_) } @undone), 0, 'what was rolled back never is');

# prepared: nobody is told of COMMIT PREPARED, the next look finds it
my $prepared = $slow->run("BEGIN; SELECT agentvm.provision('acme')");
$slow->run("PREPARE TRANSACTION 'p'");
marker($listener);
$slow->run("COMMIT PREPARED 'p'");
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.sweep_interval = '1s'");
$node->reload;
$listener->until($prepared, 'ready');
is_deeply([ said($listener->of($prepared)) ], [ logged($prepared) ], 'a prepared transaction');

# ---- a member goes: the channel is another one ----
$slow->run("BEGIN; SELECT agentvm.remove_member('acme', 'bob')");
$slow->run('ROLLBACK');
is(channel('acme'), $acme, 'a removal that is rolled back changes nothing');
$node->safe_psql('postgres', "SELECT agentvm.add_member('acme', 'bob')");
is(channel('acme'), $acme, 'nor does a member who comes');
$node->safe_psql('postgres', "SELECT agentvm.remove_member('acme', 'bob')");
my $new = channel('acme');
isnt($new, $acme, 'one who goes does');
my $before = $listener->heard;
my $members = AgentVM::Listener->new($node, $new);
my $unheard = marker($members);
terminate($unheard);
$members->until($unheard, 'terminated');
is(scalar $listener->heard, $before, 'the old channel falls silent');
is_deeply([ said($members->of($unheard)) ], [ logged($unheard) ], 'the new one has it all');
is(channel('globex'), $globex, 'the channel of another team is what it was');
$node->safe_psql('postgres', "CREATE ROLE carol; SELECT agentvm.add_member('acme', 'carol'); DROP ROLE carol");
is(channel('acme'), $new, 'a role that is dropped');
$node->safe_psql('postgres', "SELECT agentvm.add_member('acme', 'bob')");
isnt(channel('acme'), $new, 'is a member who goes, once that is noticed');
$node->safe_psql('postgres', "SELECT agentvm.create_team('short'); SELECT agentvm.drop_team('short')");
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.team WHERE team_id = 'short'"), 0, 'a team that goes takes its channel along');

# ---- many, with two dispatchers, callers that roll back, and a transaction that stays open ----
$listener->listen(channel('acme'));
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.dispatchers = 2");
$node->reload;
await($node, "SELECT detail FROM agentvm.health WHERE name = 'dispatcher'", '2 of 2 dispatchers serve this database');
marker($listener);
my $held = $slow->run("BEGIN; SELECT agentvm.provision('acme')");
$fast->send(join '', map { my $end = $_ % 5 ? 'COMMIT' : 'ROLLBACK'; "BEGIN; SELECT agentvm.provision('acme'), agentvm.provision('globex'); $end;\n" } 1 .. 125);
my @many = split /\s+/, $node->safe_psql('postgres', join '', map { "SELECT agentvm.provision('acme'); SELECT agentvm.provision('globex');\n" } 1 .. 150);
my @fast = split /[\s|]+/, $fast->answer;
$slow->run('COMMIT');
my $live = "SELECT count(*) FROM agentvm.sessions WHERE state <> 'ready' AND ended_at IS NULL";
await($node, $live, 0);
is($node->safe_psql('postgres', "SELECT count(*) FROM agentvm.sessions WHERE session_id IN (" . join(', ', map { "'$_'" } @many, @fast, $held) . ')'), 501, '501 sessions are ready');
$node->safe_psql('postgres', 'SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE ended_at IS NULL');
await($node, "SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL", 0);
marker($_->[0], $_->[1]) for [ $listener, 'acme' ], [ $others, 'globex' ];
my %heard;
push @{ $heard{ $_->{session_id} } }, $_ for $listener->heard, $others->heard;
my @expected = logged(@many, @fast, $held);
is(scalar @expected, 501 * 4, 'four changes each');
is_deeply([ said(map { @{ $heard{$_} // [] } } sort grep { exists $heard{$_} } @many, @fast, $held) ], \@expected, 'each is heard once, in order');
is($node->safe_psql('postgres', 'SELECT count(*) FILTER (WHERE claimed > 0) FROM agentvm.stat_dispatcher'), 2, 'both dispatchers had part in it');

# ---- one of them ends, then the other: somebody always announces ----
for my $index (0, 1)
{
	my $pid = $node->safe_psql('postgres', "SELECT pid FROM agentvm.stat_dispatcher WHERE dispatcher = $index");
	$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
	await($node, "SELECT count(*) FROM agentvm.stat_dispatcher WHERE pid <> $pid", 2, name => "dispatcher $index is another one");
	my $tries = 0;
	my $session;
	do { $session = provision($node, 'acme'); await_state($node, $session, 'ready'); sleep 1 } until $listener->of($session) || ++$tries > 60;
	ok(scalar $listener->of($session), 'and changes are announced');
}

# ---- somebody holds the lock that NOTIFY takes: hints wait, the engine does not ----
$node->safe_psql('postgres', "ALTER SYSTEM SET agentvm.dispatchers = 1");
$node->append_conf('postgresql.conf', "synchronous_commit = local\nsynchronous_standby_names = 'nobody'\n");
$node->reload;
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 1);
await($node, 'SHOW synchronous_standby_names', 'nobody');
$slow->send("SET synchronous_commit = on; BEGIN; CREATE TABLE written (); NOTIFY other; COMMIT");
await($node, 'SELECT wait_event FROM pg_stat_activity WHERE pid = ' . $slow->pid, 'SyncRep');
my @silent;
for (1 .. 3)
{
	push @silent, provision($node, 'acme');
	await_state($node, $silent[-1], 'ready');
}
is(scalar(map { $listener->of($_) } @silent), 0, 'sessions are ready, but cannot be announced');
$node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $slow->pid . ')');
$slow->answer;
$listener->until($_, 'ready') for @silent;
is_deeply([ map { said($listener->of($_)) } sort @silent ], [ logged(@silent) ], 'until NOTIFY works again');

# ---- an error loses hints, and is told once ----
$node->safe_psql('postgres', 'ALTER TABLE agentvm.team RENAME channel TO gone');
my @lost = map { provision($node, 'globex') } 1 .. 3;
await_state($node, $_, 'ready') for @lost;
my $complaint = qr/LOG:  agentvm: changes of state are not announced: column t\.channel does not exist/;
my $tries = 0;
sleep 1 until log_text($node) =~ $complaint || ++$tries > 60;
my $told = () = log_text($node) =~ /$complaint/g;
is($told, 1, 'an error in announcing is told once');
my $dispatcher = $node->safe_psql('postgres', 'SELECT pid FROM agentvm.stat_dispatcher');

# How much memory the dispatcher uses, once it has failed so many more times
sub used_after
{
	my ($errors) = @_;
	my $failed = "SELECT xact_rollback FROM pg_stat_database WHERE datname = 'postgres'";
	await($node, "SELECT xact_rollback >= $errors + " . $node->safe_psql('postgres', $failed) . substr($failed, length 'SELECT xact_rollback'), 't', name => "$errors more errors");
	my $from = -s $node->logfile;
	$node->safe_psql('postgres', "SELECT pg_log_backend_memory_contexts($dispatcher)");
	$node->wait_for_log(qr/Grand total: /, $from);
	# not of caches, which come and go
	return sum(slurp_file($node->logfile, $from) =~ /level: \d+; (?:TopMemoryContext|agentvm engine): .* (\d+) used/g);
}
my $used = used_after(3);
my $more = used_after(5) - $used;
cmp_ok($more, '<', 1000, 'and leaves no memory behind');
$node->safe_psql('postgres', 'ALTER TABLE agentvm.team RENAME gone TO channel');
$tries = 0;
do { $session = provision($node, 'globex'); await_state($node, $session, 'ready'); sleep 1 } until $others->of($session) || ++$tries > 60;
ok(scalar $others->of($session), 'afterwards it goes on');
is(scalar(map { $others->of($_) } @lost), 0, 'without what was lost');
done_testing();
