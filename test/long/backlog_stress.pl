# test/t/034_backlog.pl with 100,000 due launches
use strict;
use warnings;

$ENV{AGENTVM_BACKLOG} //= 100_000;
do './test/t/034_backlog.pl' or die $@ || $!;
