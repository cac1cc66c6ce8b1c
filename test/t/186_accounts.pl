# Whose account an access key is of is learned from answers: teams that share one share what it grants, by sessions and by lists of VMs.
# A list that has to wait loses nothing, repeats nothing and is in nobody's way; one that is refused slows down, and goes on
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', conf => "agentvm.api_rate = 1\nagentvm.dispatchers = 1\n");
ec2_team($node, $_, $moto, secrets => $moto->user('ec2:*')) for qw(mate late);
ec2_team($node, 'far', $moto, $moto->account('222222222222'));
sub sql { return $node->safe_psql('postgres', $_[0]); }
my $cluster = sql('SELECT installation_id FROM agentvm.installation');

# When calls left, oldest first
sub left { my (@calls) = @_; return sort { $a <=> $b } map { $_->{at} - $_->{seconds} } @calls; }
sub launch_many { my ($team, $count) = @_; sql("SELECT agentvm.provision('$team', profile => 'plain') FROM generate_series(1, $count)"); return; }

sub slowed
{
	my ($expected, $name) = @_;
	return await($node, "SELECT detail ~ '$expected(;|\$)' FROM agentvm.health WHERE name = 'throttled'", 't', name => $name)
	  || diag(sql("SELECT detail FROM agentvm.health WHERE name = 'throttled'"));
}

sub set
{
	my ($name, $value) = @_;
	sql("ALTER SYSTEM SET agentvm.$name = '$value'; SELECT pg_reload_conf()");
	return await($node, "SHOW agentvm.$name", $value, name => "$name = $value");
}

# Have a team's list made by the dispatcher, and what its row says
sub list { my ($team) = @_; return sql("UPDATE agentvm.inventory SET next_at = now() WHERE account = '$team'"); }

sub await_list
{
	my ($team, $condition, $name) = @_;
	return await($node, "SELECT $condition FROM agentvm.inventory WHERE account = '$team'", 't', name => $name)
	  || diag(sql("SELECT * FROM agentvm.inventory WHERE account = '$team'"));
}

# A page that is not the cloud's, with one VM that no session has, and what it names as the next one
sub page
{
	my ($vm, $next) = @_;
	return '<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><reservationSet><item><ownerId>123456789012</ownerId><instancesSet><item>'
	  . sprintf('<instanceId>i-%017x</instanceId>', $vm)
	  . "<instanceState><code>16</code><name>running</name></instanceState><tagSet><item><key>agentvm-cluster</key><value>$cluster</value></item></tagSet>"
	  . '</item></instancesSet></item></reservationSet>' . ($next ? "<nextToken>$next</nextToken>" : '') . '</DescribeInstancesResponse>';
}

# ---- two keys, one account ----
is(scalar(grep { column($node, launch($node, $_, 'ready'), 'vm_id') } qw(acme mate far)), 3, 'one answer each');
my $since = time;
launch_many($_, 6) for qw(acme mate);
launch_many('far', 4);
await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 19, name => 'all are launched');
my @times = left(grep { $_->{at} >= $since } map { calls_for($faults, 'RunInstances', $_) } qw(acme mate));
is(scalar @times, 12, 'once each');
cmp_ok($times[11] - $times[0], '>', 2.8, 'two teams with a key each have what the account grants, together');
@times = left(grep { $_->{at} >= $since } calls_for($faults, 'RunInstances', 'far'));
cmp_ok($times[3] - $since, '<', 2.5, 'another account does not wait');
is(sql('SELECT sum(throttled) FROM agentvm.stat_provider'), 0, 'nobody was refused');

# ---- a key that has had no answer yet counts by itself; what was learned with it is the account's then ----
$faults->set(mode => 'throttle', action => 'RunInstances', n => 1);
launch_many('late', 1);
slowed('RunInstances us-east-1 key [0-9a-f]{12}: 50%', 'a refusal does not say whose account it is');
await($node, "SELECT count(*) FROM agentvm.sessions WHERE team_id = 'late' AND state = 'ready'", 1, name => 'the launch is repeated');
slowed('RunInstances us-east-1 123456789012: 55%', 'its answer does');
set('api_rate', 100);
launch_many('mate', 9);
slowed('no account is called more slowly than published', 'answers to others of the account bring it back');

# ---- lists ----
$faults->set(mode => 'lost', action => 'RunInstances', n => 1);
$faults->set(mode => 'throttle', action => 'RunInstances');
my $lost = launch($node, 'acme');
await($node, "SELECT handle ? 'sent_at' AND lease IS NULL AND vm_id IS NULL FROM agentvm.session WHERE session_id = '$lost'", 't', name => 'a launch is not answered');
set('inventory_interval', '3s');    # until they are known
await($node, "SELECT count(*) FROM agentvm.inventory WHERE account IN ('acme', 'mate', 'far') AND listed_at IS NOT NULL", 3, name => 'there are lists');
set('inventory_interval', '1h');
await($node, 'SELECT count(*) FROM agentvm.inventory WHERE lease IS NOT NULL', 0, name => 'which are over');
sql("UPDATE agentvm.inventory SET next_at = now() + interval '1 d', listed_at = NULL");
my $pages = 6;
$faults->set(mode => 'throttle', action => 'DescribeInstances', match => 'page' . ($pages - 1), n => 1);
$faults->set(mode => 'body', action => 'DescribeInstances', match => $_ == 1 ? $cluster : "page$_", n => 1, body => page($_, $_ < $pages ? 'page' . ($_ + 1) : undef)) for 1 .. $pages;
set('api_rate', 0.03);    # lists, and looks by tag: 3 at once, then 3 in 5 s
list('acme');
my @pages;
await_that(sub { (@pages = grep { $_->{args}{NextToken} } $faults->requests('DescribeInstances')) >= 2 }, 'a list is at its third page', timeout => 90);
my $asked = time;
sql("SELECT agentvm.terminate('$lost')");
list($_) for qw(mate late far);
await($node, "SELECT count(*) > 0 FROM agentvm.inventory WHERE account IN ('mate', 'late') AND lease IS NULL AND failures = 0 AND listed_at IS NULL AND next_at > clock_timestamp() AND next_at < clock_timestamp() + interval '1 min'",
	't', name => 'lists of other teams wait, and nobody has them');
await_list('far', 'listed_at IS NOT NULL', "another account's does not");
my @looks;
await_that(sub { @looks = calls_for($faults, 'DescribeInstances', $lost) }, 'a session looks for its VM');
cmp_ok($looks[0]{at} - $asked, '<', 7, 'nor do sessions wait for the whole list');
await_list('acme', "listed_at IS NOT NULL AND lease IS NULL AND failures = 0 AND error IS NULL AND vms = $pages", 'it comes to its end');
await_list($_, 'listed_at IS NOT NULL AND lease IS NULL AND failures = 0', "and so does that of $_") for qw(mate late);
is(sql("SELECT count(*) FROM agentvm.drift WHERE kind = 'unknown' AND vm_id ~ '^i-00000000000000'"), $pages, 'with all its pages');
my %asked;
$asked{ $_->{args}{NextToken} }++ for @pages = grep { $_->{args}{NextToken} } $faults->requests('DescribeInstances');
is(join(' ', map { $asked{"page$_"} // 0 } 2 .. $pages), join(' ', map { $_ == $pages - 1 ? 2 : 1 } 2 .. $pages), 'each was asked for once, the refused one twice');
@times = left(@pages);
cmp_ok($times[-1] - $times[0], '>', 5, 'as slowly as the account grants');
cmp_ok($times[-1], '>', $looks[0]{at}, 'and the last one after the look of the session');
slowed('DescribeInstances by filter us-east-1 123456789012: [56][05]%', 'the refusal has halved that, and answers bring it back');

# ---- refused again and again: it fails, as any list, and is slow ----
set('api_rate', 100);
$faults->set(mode => 'throttle', action => 'DescribeInstances', match => $cluster);
sub lists { return scalar grep { ($_->{args}{'Filter.1.Name'} // '') eq 'tag:agentvm-cluster' } $faults->requests('DescribeInstances'); }
my $before = lists();
sql("UPDATE agentvm.inventory SET failures = 20 WHERE account = 'far'");    # so that it is not soon made again
list('far');
await_list('far', "failures = 21 AND error ~ '^RequestLimitExceeded' AND lease IS NULL", 'a list that is refused each time has failed');
is(lists() - $before, 9, 'after so many calls');
slowed('DescribeInstances by filter us-east-1 222222222222: 3%', 'and its account is called slowly');
$faults->clear;
list('far');
await_list('far', 'failures = 0 AND error IS NULL', 'until it is no more');
unlike(log_text($node), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');
done_testing();
