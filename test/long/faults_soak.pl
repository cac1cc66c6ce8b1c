# 300 sessions amid faults of the cloud on every call, killed workers, restarts and a failover; AGENTVM_SEED and AGENTVM_SOAK_SESSIONS for others
use strict;
use warnings;
use AgentVM::FaultsSoak;
use Test::More;

faults_soak(sessions => $ENV{AGENTVM_SOAK_SESSIONS} // 300, seed => $ENV{AGENTVM_SEED} // 6, rounds => 5, figures => 1);

done_testing();
