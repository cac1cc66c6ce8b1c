# What test/run, test/bench/run and infra/demo clean up with: it ends and removes what is theirs, and nothing else
use strict;
use warnings;
use File::Basename qw(dirname);
use File::Temp qw(tempdir);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep);

my $env = dirname(__FILE__) . '/../lib/env.sh';
my $base = tempdir(CLEANUP => 1);
my ($ours, $other) = map { "$base/agentvm-$_" } qw(demo.abcdef demo.abcdefg);
my (%process, %short);
for my $dir ($ours, $other)
{
	mkdir $dir or die $!;
	mkdir "$dir/in" or die $!;
	$process{$dir} = fork // die $!;
	if (!$process{$dir})
	{
		chdir "$dir/in" or die $!;
		exec 'sleep', 600 or die $!;
	}
	# one that is elsewhere, as libvirt's are, and a directory with a short name
	$process{"$dir elsewhere"} = fork // die $!;
	if (!$process{"$dir elsewhere"})
	{
		$ENV{TMPDIR} = "$dir/in";
		chdir '/' or die $!;
		exec 'sleep', 600 or die $!;
	}
	append_to_file(($short{$dir} = tempdir('/tmp/avXXXXXX', CLEANUP => 1)) . '/of', "$dir/in\n");
}
for my $pid (values %process) { sleep 0.01 until slurp_file("/proc/$pid/cmdline") =~ /^sleep/; }
symlink $ours, "$base/agentvm-demo.linked" or die $!;

sub sweep { return IPC::Run::run([ 'bash', $env, 'sweep', $_[0] ], '>', \my $out, '2>', \my $error); }

# the kernel's word for it: a zombie of ours does not run
sub runs { return -e "/proc/$_[0]/cwd" && defined readlink "/proc/$_[0]/cwd"; }

ok(!sweep($_), "refused: '$_'") for '', '/', $base, "$base/agentvm-demo.", "$base/agentvm-demo.nobody", "$base/agentvm-demo.linked", "$ours/in", 'agentvm-demo.abcdef';
ok(runs($process{$_}) && runs($process{"$_ elsewhere"}) && -d $_ && -e $short{$_}, "$_ is as it was") for $ours, $other;
ok(sweep($ours), 'a directory of ours');
ok(!runs($process{$ours}) && !-e $ours, 'is gone, with its processes');
ok(!runs($process{"$ours elsewhere"}) && !-e $short{$ours}, 'and what it has elsewhere');
ok(runs($process{$other}) && -d $other, 'the one with a longer name is not');
ok(runs($process{"$other elsewhere"}) && -e $short{$other}, 'with all that it has');
kill 'KILL', values %process;
waitpid $_, 0 for values %process;
done_testing();
