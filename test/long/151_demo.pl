# infra/demo: it comes to its end, and leaves nothing behind, also when it is interrupted while a VM runs
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use POSIX ();
use Time::HiRes qw(sleep time);

my $log = PostgreSQL::Test::Utils::tempdir('demo') . '/log';
sub output { return -e $log ? slurp_file($log) : ''; }
sub demo
{
	unlink $log;
	my $pid = fork // die;
	return $pid if $pid;
	setpgrp;
	open(STDOUT, '>', $log) and open(STDERR, '>&', \*STDOUT);
	exec "$ENV{TESTDIR}/infra/demo" or POSIX::_exit(127);
}
sub content { open(my $file, '<', $_[0]) or return ''; local $/; return <$file> // ''; }
# Processes that have its directory in their arguments or environment
sub left { return scalar grep { my $file = $_; index(content($file), $_[0]) >= 0 } glob('/proc/[0-9]*/cmdline'), glob('/proc/[0-9]*/environ'); }

my $pid = demo();
my $end = time + 400;
sleep 0.2 until output() =~ /heart beats/ || time > $end || waitpid($pid, 1) == $pid;
my ($dir) = output() =~ m{(/tmp/agentvm-demo\.\w+)};
ok($dir && left($dir) > 3, 'it runs, and a VM with it') || BAIL_OUT(output());
kill 'TERM', -$pid;
waitpid($pid, 0);
is($? >> 8, 130, 'interrupted');
ok(!-e $dir, 'its directory is gone');
is(left($dir), 0, 'and so is every process: no server, no libvirt, no VM');

$pid = demo();
waitpid($pid, 0);
is($?, 0, 'it comes to its end') || diag(output());
like(output(), qr/\bkill -STOP.*heartbeat_timeout.*\ndemo: ok\n\z/s, 'and says so');
($dir) = output() =~ m{(/tmp/agentvm-demo\.\w+)};
ok(!-e $dir, 'its directory is gone');
is(left($dir), 0, 'and so is every process');

done_testing();
