# What the dispatcher's own claims have read to find what is due: from a server log with its plans, as auto_explain writes them.
#
#	my $node = new_node('main', preload => ['auto_explain'], conf => $claims_conf);
#	my @claims = claims(slurp_file($node->logfile, $offset));          # of each: [buffers, milliseconds]
package AgentVM::Claims;

use strict;
use warnings;
use Exporter 'import';

our @EXPORT = qw($claims_conf claims);

our $claims_conf = <<'CONF';
log_statement = none
log_line_prefix = '%m [%p] %b %v '
auto_explain.log_min_duration = -1
auto_explain.log_analyze = on
auto_explain.log_buffers = on
auto_explain.log_timing = off
CONF

sub claims
{
	my ($log) = @_;
	my %claims;
	foreach my $entry (split /^(?=\d{4}-\d\d-\d\d )/m, $log)
	{
		next unless $entry =~ /^\S+ \S+ \S+ \[\d+\] agentvm dispatcher (\S+) LOG:  duration: ([\d.]+) ms .*Query Text: SELECT (?:session_id, team_id, )?next_check_at(?:, n)? FROM/s;
		my ($transaction, $ms) = ($1, $2);
		my ($hit, $read) = $entry =~ /Buffers: shared(?: hit=(\d+))?(?: read=(\d+))?/;
		$claims{$transaction}[0] += ($hit // 0) + ($read // 0);
		$claims{$transaction}[1] += $ms;
	}
	return values %claims;
}

1;
