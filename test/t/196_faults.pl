# test/long/faults_soak.pl with 60 sessions: whatever fails, there is one VM for each live session in the end, and none beside
use strict;
use warnings;
use AgentVM::FaultsSoak;
use Test::More;

faults_soak(sessions => 60, seed => $ENV{AGENTVM_SEED} // 1, rounds => 2);

done_testing();
