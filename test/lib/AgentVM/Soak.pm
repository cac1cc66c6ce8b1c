# A day in minutes: sessions of every kind come and go on noop, with timeouts scaled down; what the workers use is sampled.
#
#	soak(seconds => 600, rate => 34);                      # its checks, then done_testing()
package AgentVM::Soak;

use strict;
use warnings;
use AgentVM::Test;
use Exporter 'import';
use List::Util qw(max);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

our @EXPORT = qw(soak private_kb fds);

# Kinds of sessions: profile, options of noop, lifetime, when their user ends them, and how they are to end
my $kinds = <<'SQL';
INSERT INTO public.kind (name, profile, options, lifetime, ends_after, ends_as) VALUES
	('plain', NULL, '{}', NULL, '3 s', 'terminated requested'),
	('slow', NULL, '{"launch_delay": "1s", "terminate_delay": "1s"}', NULL, '4 s', 'terminated requested'),
	('hasty', NULL, '{"launch_delay": "1min"}', NULL, '1 s', 'terminated requested'),
	('old', NULL, '{}', '2 s', NULL, 'terminated max_lifetime'),
	('credentials', NULL, '{"fail": "credentials"}', NULL, NULL, 'failed invalid_credentials'),
	('capacity', NULL, '{"fail": "capacity"}', NULL, NULL, 'failed capacity'),
	('quota', NULL, '{"fail": "quota"}', NULL, NULL, 'failed quota'),
	('permanent', NULL, '{"fail": "permanent"}', NULL, NULL, 'failed provider_error'),
	('lost', NULL, '{"fail": "lost"}', NULL, NULL, 'failed provider_lost'),
	('throttled', NULL, '{"fail": "throttled", "fail_times": 2}', NULL, '8 s', 'terminated requested'),
	('throttled long', NULL, '{"fail": "throttled"}', '6 s', NULL, 'terminated max_lifetime'),
	('transient', NULL, '{"fail": "transient", "fail_times": 2}', NULL, '8 s', 'terminated requested'),
	('transient long', 'hasty', '{"fail": "transient"}', NULL, NULL, 'failed provider_error'),
	('mute', 'hasty', '{"runtime": true}', NULL, NULL, 'failed bootstrap_timeout'),
	('silent', 'silent', '{"runtime": true}', NULL, NULL, 'terminated heartbeat_timeout'),
	('alive', 'alive', '{"runtime": true}', NULL, '6 s', 'terminated requested'),
	('alive and lost', 'alive', '{"runtime": true, "terminate_delay": "2s"}', '5 s', NULL, 'terminated max_lifetime');
SQL

# One second of the day: so many come, runtimes report and beat, users end theirs. Variables: count, key (base64)
my $tick = <<'SQL';
SET client_min_messages = error;
INSERT INTO public.made SELECT agentvm.provision('team' || n % 7, k.name, profile => k.profile, options => k.options, max_lifetime => k.lifetime)
	FROM (SELECT nextval('public.number') AS n FROM generate_series(1, :count)) s JOIN public.kind k ON k.id = n % (SELECT count(*) FROM public.kind);
SELECT count(agentvm.bootstrap(digest(encode(hmac(convert_to(s.session_id || ':' || s.attempt, 'utf8'), decode(:'key', 'base64'), 'sha256'), 'hex'), 'sha256'),
		digest(s.session_id::text, 'sha256'), 'boot'))
	FROM (SELECT s.* FROM agentvm.session s JOIN public.made USING (session_id) WHERE s.agent_id IN ('silent', 'alive', 'alive and lost') AND s.state = 'provisioning' AND s.running
		AND s.deadline_at > clock_timestamp() + '1 s' FOR UPDATE OF s SKIP LOCKED) s;
SELECT count(*) FROM agentvm.heartbeat_batch(
	(SELECT coalesce(array_agg(session_id), '{}') FROM agentvm.session JOIN public.made USING (session_id) WHERE state = 'ready' AND agent_id LIKE 'alive%'),
	(SELECT coalesce(array_agg(now()), '{}') FROM agentvm.session JOIN public.made USING (session_id) WHERE state = 'ready' AND agent_id LIKE 'alive%'));
SELECT count(agentvm.terminate(session_id)) FROM agentvm.session JOIN public.made USING (session_id) JOIN public.kind k ON k.name = agent_id
	WHERE ended_at IS NULL AND state <> 'terminating' AND created_at + k.ends_after < clock_timestamp();
DELETE FROM public.made m USING agentvm.session s WHERE s.session_id = m.session_id AND s.ended_at IS NOT NULL;
SQL

# KiB of memory that only this process has, without shared memory that only it has touched yet; and how many descriptors, but for the tables' files, which the server opens and closes as it likes
sub private_kb
{
	my ($pid) = @_;
	my ($kb, $own) = (0, 0);
	foreach (split /\n/, slurp_file("/proc/$pid/smaps"))
	{
		$own = $1 eq 'p' if /^[0-9a-f]+-[0-9a-f]+ \S*([ps]) /;
		$kb += $1 if $own && /^Private_\w+: +(\d+) kB/;
	}
	return $kb;
}
sub fds { my ($pid) = @_; opendir(my $dir, "/proc/$pid/fd") or die "/proc/$pid/fd: $!"; return scalar grep { !/^\./ && (readlink("/proc/$pid/fd/$_") // '') !~ m{/pgdata/} } readdir($dir); }

sub soak
{
	my (%opt) = @_;
	my $node = new_node('main', conf => "agentvm.dispatchers = 2\nagentvm.sweep_interval = '500ms'\nlog_statement = none\nlog_min_messages = error\nsynchronous_commit = off\n");
	my ($key) = slurp_file($node->basedir . '/keys') =~ /^k1:(.*)$/m;
	my $query = sub { return $node->safe_psql('postgres', $_[0]); };
	my $clients = q(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend');
	my $workers = q(SELECT pid, backend_type FROM pg_stat_activity WHERE backend_type LIKE 'agentvm%' ORDER BY backend_type, pid);
	my (@samples, $started, $next_sample);

	$query->(<<"SQL");
CREATE TABLE public.kind (id int GENERATED ALWAYS AS IDENTITY (MINVALUE 0), name text, profile text, options jsonb, lifetime interval, ends_after interval, ends_as text);
CREATE TABLE public.made (session_id uuid PRIMARY KEY);
CREATE SEQUENCE public.number;
$kinds
SELECT agentvm.create_team('team' || i) FROM generate_series(0, 6) i;
SELECT agentvm.create_profile('hasty', 'noop', bootstrap_timeout => '2 s');
SELECT agentvm.create_profile('silent', 'noop', bootstrap_timeout => '5 min', heartbeat_timeout => '2 s');
SELECT agentvm.create_profile('alive', 'noop', bootstrap_timeout => '5 min', heartbeat_timeout => '5 min');
SQL
	await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 2);
	my $pids = $query->($workers);
	is(scalar split(/\n/, $pids), 3, 'the launcher and two dispatchers');

	$started = time;
	for (my $second = 1; time < $started + $opt{seconds}; $second++)
	{
		my $error = '';
		$node->psql('postgres', $tick, stderr => \$error, on_error_stop => 1, extra_params => [ '-v', "count=$opt{rate}", '-v', "key=$key" ]);
		if ($error) { fail('a second of the day'); diag($error); last; }
		if (time >= ($next_sample // 0))
		{
			push @samples, { map { my ($pid) = split /\|/; ($pid => [ private_kb($pid), fds($pid) ]) } split /\n/, $pids };
			$next_sample = time + $opt{seconds} / 40;
		}
		sleep max(0, $started + $second - time);
	}
	# those that are left come to their end, too
	my $end = time + 120;
	while (time < $end && $query->('SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL'))
	{
		$node->psql('postgres', $tick, extra_params => [ '-v', 'count=0', '-v', "key=$key" ]);
		sleep 0.3;
	}
	is($query->('SELECT count(*) FROM agentvm.session WHERE ended_at IS NULL'), 0, 'none is stuck');
	my $sessions = $query->('SELECT count(*) FROM agentvm.session');
	cmp_ok($sessions, '>=', 0.9 * $opt{seconds} * $opt{rate}, "$sessions sessions have come and gone");
	is($query->("SELECT string_agg(DISTINCT k.name || ': ' || concat_ws(' ', state, end_reason, detail), '; ') FROM agentvm.session s JOIN public.kind k ON k.name = agent_id WHERE concat_ws(' ', state, end_reason) <> ends_as"),
		'', 'each as it should');
	is($query->('SELECT count(DISTINCT agent_id) = (SELECT count(*) FROM public.kind) FROM agentvm.session'), 't', 'some of every kind');
	is($query->('SELECT count(*) FROM agentvm.session_heartbeat'), 0, 'no heartbeat row is left');
	is($query->("SELECT string_agg(name, ' ') FROM agentvm.health WHERE NOT ok"), '', 'all is well');
	is($query->($workers), $pids, 'the same processes as at the start');
	is($query->($clients), 1, 'and no connection but ours');

	# from when all have warmed up to the end: the last quarter against the second
	my $quarter = int(@samples / 4);
	foreach my $worker (split /\n/, $pids)
	{
		my ($pid, $name) = split /\|/, $worker;
		my @kb = map { $_->{$pid}[0] } @samples;
		my @fds = map { $_->{$pid}[1] } @samples;
		my ($before, $after) = (max(@kb[ $quarter .. 2 * $quarter ]), max(@kb[ -$quarter .. -1 ]));
		note("$name: KiB @kb; files @fds");
		diag("$name: $kb[0] KiB at the start, $before KiB after a quarter, $after KiB at the end") if $opt{figures};
		cmp_ok($after, '<=', 1.05 * $before + 512, "$name: its memory is flat ($before, $after KiB)");
		cmp_ok(max(@fds[ -$quarter .. -1 ]), '<=', max(@fds[ $quarter .. 2 * $quarter ]) + 2, "$name: and so are its open files ($fds[-1])");
	}
	$node->stop;
	return;
}

1;
