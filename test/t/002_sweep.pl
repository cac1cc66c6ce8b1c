# What test/run, test/bench/run and infra/demo clean up with: it ends and removes what is theirs, and nothing else
use strict;
use warnings;
use File::Basename qw(dirname);
use File::Temp qw(tempdir);
use PostgreSQL::Test::Utils;
use Test::More;

my $env = dirname(__FILE__) . '/../lib/env.sh';
my $base = tempdir(CLEANUP => 1);
my ($ours, $other) = map { "$base/agentvm-$_" } qw(demo.abcdef demo.abcdefg);
my %process;
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
}
symlink $ours, "$base/agentvm-demo.linked" or die $!;

sub sweep { return IPC::Run::run([ 'bash', $env, 'sweep', $_[0] ], '>', \my $out, '2>', \my $error); }

# the kernel's word for it: a zombie of ours does not run
sub runs { return -e "/proc/$_[0]/cwd" && defined readlink "/proc/$_[0]/cwd"; }

ok(!sweep($_), "refused: '$_'") for '', '/', $base, "$base/agentvm-demo.", "$base/agentvm-demo.nobody", "$base/agentvm-demo.linked", "$ours/in", 'agentvm-demo.abcdef';
ok(runs($process{$_}) && -d $_, "$_ is as it was") for $ours, $other;
ok(sweep($ours), 'a directory of ours');
ok(!runs($process{$ours}) && !-e $ours, 'is gone, with its processes');
ok(runs($process{$other}) && -d $other, 'the one with a longer name is not');
kill 'KILL', $process{$other};
waitpid $_, 0 for values %process;
done_testing();
