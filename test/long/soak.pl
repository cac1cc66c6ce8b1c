# 24 hours in 10 minutes: 20,000 sessions come and go; AGENTVM_SOAK_SECONDS for another length
use strict;
use warnings;
use AgentVM::Soak;
use Test::More;

soak(seconds => $ENV{AGENTVM_SOAK_SECONDS} // 600, rate => 34, figures => 1);

done_testing();
