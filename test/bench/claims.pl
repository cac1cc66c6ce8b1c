# From the server log on standard input: what the dispatcher's claims read to find what is due, a line of medians and maxima
use strict;
use warnings;

my (%buffers, %ms);
local $/;
foreach my $entry (split /^(?=\d{4}-\d\d-\d\d )/m, <STDIN>)
{
	next unless $entry =~ /^\S+ \S+ \S+ \[\d+\] agentvm dispatcher (\S+) LOG:  duration: ([\d.]+) ms .*Query Text: SELECT (?:session_id, team_id, )?next_check_at(?:, n)? FROM/s;
	my ($claim, $ms) = ($1, $2);
	my ($hit, $read) = $entry =~ /Buffers: shared(?: hit=(\d+))?(?: read=(\d+))?/;
	$buffers{$claim} += ($hit // 0) + ($read // 0);
	$ms{$claim} += $ms;
}
my @buffers = sort { $a <=> $b } values %buffers or die "no claims in the log\n";
my @ms = sort { $a <=> $b } values %ms;
printf "p50 %.2f ms, p99 %.2f ms, at most %d buffers, of %d claims", $ms[@ms / 2], $ms[0.99 * @ms], $buffers[-1], scalar @ms;
