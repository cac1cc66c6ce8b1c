# The one-liners of README's gallery "Commands and files", word for word but for places, with real runtimes: 20 VMs and what is in them
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Gateway;
use AgentVM::Test;
use AgentVM::VM;
use File::Basename qw(dirname);
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "agentvm.heartbeat_interval = 1\n");
my $control = PostgreSQL::Test::Utils::tempdir_short() . '/control';
$node->safe_psql('postgres', "INSERT INTO agentvm.gateway (gateway_id, control_address) VALUES ('gw1', 'unix:$control')");
my $gateway = AgentVM::Gateway->new($node, options => [ '--name', 'gw1', '--control', "unix:$control" ]);
$node->safe_psql('postgres', <<'SQL');
SELECT agentvm.create_team('acme');
SELECT agentvm.create_profile('micro', 'noop', options => '{"runtime": true}', runtime => true);
CREATE TABLE task (task_id int PRIMARY KEY, session_id uuid, batch int);
CREATE TABLE report (task_id int, html bytea);
CREATE TABLE script (name text, source text);
CREATE TABLE agent (name text, session_id uuid, home bytea);
INSERT INTO script VALUES ('check', E'#!/bin/sh\necho checked "$@"\n');
SQL

# 20 VMs, and one that has ended
$node->safe_psql('postgres', "INSERT INTO task SELECT i, agentvm.provision('acme', profile => 'micro'), 7 FROM generate_series(1, 21) i");
$node->safe_psql('postgres', "INSERT INTO agent SELECT 'coder', session_id FROM task WHERE task_id = 2");
my @sessions = split(/\n/, $node->safe_psql('postgres', 'SELECT session_id FROM task ORDER BY task_id'));
$node->safe_psql('postgres', "SELECT agentvm.terminate('$sessions[20]')");
my @vms = map { AgentVM::VM->boot($node, $gateway, $_) } @sessions[ 0 .. 19 ];
await_state($node, $_, 'ready') for @sessions[ 0 .. 19 ];
await_state($node, $sessions[20], 'terminated');

# what is in them
my $dir = $vms[0]->dir . '/work';
sub file { my ($name, $content, $mode) = @_; my $parent = dirname($name); system('mkdir', '-p', $parent); append_to_file($name, $content); chmod($mode // 0644, $name); return; }
file("$dir/app/Makefile", "test:\n\t\@echo 12 passed, CI=\$\$CI\n");
file("$dir/app/coverage/index.html", '<p>all of it</p>');
file("$dir/results.csv", "a,passed,1\nb,failed,2\nc,failed,3\n");
file("$dir/train.sh", "#!/bin/sh\necho epoch 1\nexit 3\n", 0755);
file("$dir/home/notes", 'remember');
file($_->dir . '/work/check', "#!/bin/sh\necho \"{\\\"of\\\": \\\"\$(basename \"\$(dirname \"\$PWD\")\")\\\"}\"\n", 0755) for @vms;
my $repository = PostgreSQL::Test::Utils::tempdir() . '/app';
file("$repository/Makefile", "test:\n\t\@echo tested once\n");
system_or_bail('git', '-C', $repository, @$_) for [ 'init', '-q' ], [ 'add', '.' ], [ '-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'a' ];

# ---- each of them, by its remark ----
my %answer = (
	'a test suite, and what came of it' => qr/^0\|12 passed, CI=1\n\z/,
	'collect a report' => qr/^b,failed,2\nc,failed,3\z/,
	'a script and its input' => qr/^42\n\n\d+\z/,
	'fan out over 20 VMs, and join with your own table; rows that failed say why' => qr/^(?:\d+\|0\|\{"of": "[^"]+"\}\n\|\|\n?|21\|\|\|AV006\|session $sessions[20] has ended: requested\n?){21}\z/,
	'a long command: begin it, look at it now and then, from any connection' => qr/^(?:t\|(?:\|0|epoch 1\n\|8)|f\|epoch 1\n\|8)\n3\nf\z/,
	'back up a directory, and put it into another VM' => qr/^\d{3,}\z/,
	'a VM for one command' => qr/^0\|(?:.*\n)*tested once\n/);
my ($gallery) = slurp_file(dirname(__FILE__) . '/../../README.md') =~ /^## Commands and files\n.*?^```sql\n(.*?)^```/ms or die 'no gallery in README.md';
my $client = AgentVM::Client->new($node);
$client->run("\\set session_id $sessions[0]");
for my $example (split /\n\n+/, $gallery)
{
	my ($remark, $sql) = $example =~ /^-- (.*?)\n(.*)/s;
	my $expected = delete $answer{$remark} or fail("\"$remark\" has no answer here"), next;
	$sql =~ s{/workspace|/home(?=/agent)}{$dir}g;
	$sql =~ s{$dir/agent}{$dir/home}g;
	$sql =~ s{https://git\.example/app}{$repository};
	$client->send($sql);
	my $vm;
	if ($sql =~ /CALL agentvm.run/)
	{
		my $new = q{SELECT session_id FROM agentvm.session WHERE bound_pid IS NOT NULL};
		await($node, "SELECT count(*) FROM ($new) s", 1, name => 'its session');
		$vm = AgentVM::VM->boot($node, $gateway, $node->safe_psql('postgres', $new));
	}
	like($client->answer, $expected, $remark) or diag($client->error);
	is($client->error, '', 'without a word of the server\'s') unless $vm;
}
is(join(' ', sort keys %answer), '', 'the README has them all');

# ---- what has come of them ----
is($node->safe_psql('postgres', q{SELECT task_id, convert_from(html, 'UTF8') FROM report}), '42|<p>all of it</p>', 'the report is in the table');
is($node->safe_psql('postgres', q{SELECT length(home) > 1024 FROM agent}), 't', 'the directory is in the table');
is(slurp_file("$dir/bin/check"), "#!/bin/sh\necho checked \"\$@\"\n", 'the script is in the VM');
ok(-x "$dir/bin/check", 'and may be run');
await($node, 'SELECT count(*) FROM agentvm.command', 0, name => 'nothing is under way any more');

done_testing();
