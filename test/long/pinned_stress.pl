# test/t/036_pinned.pl with a million live sessions, 100,000 of which are handled while a snapshot is held
use strict;
use warnings;
use AgentVM::EC2;    # before run time, for what it loads

$ENV{AGENTVM_LIVE} //= 1_000_000;
$ENV{AGENTVM_DRAINED} //= 100_000;
do './test/t/036_pinned.pl' or die $@ || $!;
