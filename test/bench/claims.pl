# From the server log on standard input: what the dispatcher's claims read to find what is due
use strict;
use warnings;
use FindBin;
use lib "$FindBin::Bin/../lib";
use AgentVM::Claims;

my @claims = claims(do { local $/; <STDIN> }) or die "no claims in the log\n";
my @buffers = sort { $a <=> $b } map { $_->[0] } @claims;
my @ms = sort { $a <=> $b } map { $_->[1] } @claims;
printf "p50 %.2f ms, p99 %.2f ms, at most %d buffers, of %d claims", $ms[@ms / 2], $ms[0.99 * @ms], $buffers[-1], scalar @ms;
