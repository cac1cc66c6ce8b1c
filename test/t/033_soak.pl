# The day of test/long/soak.pl in 20 seconds: every kind of session ends as it should, and nothing is left over
use strict;
use warnings;
use AgentVM::Soak;
use Test::More;

soak(seconds => 20, rate => 34);

done_testing();
