# test/t/034_backlog.pl with 100,000 due launches
use strict;
use warnings;
use AgentVM::EC2;    # before run time, for what it loads

$ENV{AGENTVM_BACKLOG} //= 100_000;
do './test/t/034_backlog.pl' or die $@ || $!;
