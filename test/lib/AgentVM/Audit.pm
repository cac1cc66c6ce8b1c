# Questions about the log and its seals, for the tests of both.
#
#	await($node, $unsealed, 0);    await($node, $settled);
#	sealed_well($node, 'acme', 'globex');
#	is(recomputed($node, 'acme', 1), seal_hash($node, 'acme', 1));
package AgentVM::Audit;

use strict;
use warnings;
use Exporter 'import';
use AgentVM::Test;
use Cwd ();
use Digest::SHA qw(sha256_hex);
use File::Basename qw(dirname);
use IPC::Run;
use PostgreSQL::Test::Utils qw(slurp_file append_to_file);
use Test::More;

our @EXPORT = qw($unsealed $settled sealed_well recomputed seal_hash problems);

our $unsealed = 'SELECT count(*) FROM agentvm.session_event WHERE event_id NOT IN (SELECT unnest(event_ids) FROM agentvm.event_seal)';
# all is sealed, and the mark has come to the end
our $settled = 'SELECT sealed_below = (SELECT max(event_id) FROM agentvm.session_event) FROM agentvm.event_seal_mark';

# What verify_audit() finds, one "seal event problem" a line
sub problems
{
	my ($node, $team, %opt) = @_;
	return $node->safe_psql($opt{dbname} // 'postgres', "SELECT concat_ws(' ', coalesce(seal_id::text, '-'), coalesce(event_id::text, '-'), problem) FROM agentvm.verify_audit('$team')");
}

# Nothing is sealed twice, each seal is of events of its team, no number is left out, and verify_audit() agrees
sub sealed_well
{
	my ($node, @teams) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($node->safe_psql('postgres', 'SELECT count(*) - count(DISTINCT i) FROM agentvm.event_seal, unnest(event_ids) i'), 0, 'nothing is sealed twice');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.event_seal s, unnest(event_ids) i JOIN agentvm.session_event e ON e.event_id = i WHERE e.team_id <> s.team_id'), 0, 'nor with another team');
	is($node->safe_psql('postgres', 'SELECT bool_and(n = seal_id) FROM (SELECT seal_id, row_number() OVER (PARTITION BY team_id ORDER BY seal_id) AS n FROM agentvm.event_seal) s'), 't', 'seals are numbered from 1');
	is(problems($node, $_), '', "$_ is in order") for @teams;
	return;
}

# A seal's hash as the README tells outsiders to compute it: its own SQL, psql and a SHA-256
sub recomputed
{
	my ($node, $team, $seal, %opt) = @_;
	my $readme = slurp_file(dirname(Cwd::abs_path(__FILE__)) . '/../../../README.md');
	my ($sql) = $readme =~ /^```sql\n(-- check\.sql.*?)^```$/ms or die 'README.md has no check.sql';
	my $file = $node->basedir . '/check.sql';
	my $lines;

	append_to_file($file, $sql) unless -e $file;
	local $ENV{PGOPTIONS} = $opt{options} // '';
	local $ENV{PGCLIENTENCODING} = $opt{encoding} if $opt{encoding};
	IPC::Run::run([ 'psql', '-XAtq', '-v', "team=$team", '-v', "seal=$seal", '-f', $file, '-d', $node->connstr($opt{dbname} // 'postgres') ], '>', \$lines) or die 'psql failed';
	return sha256_hex($lines);
}

sub seal_hash
{
	my ($node, $team, $seal, %opt) = @_;
	return $node->safe_psql($opt{dbname} // 'postgres', "SELECT encode(sha256, 'hex') FROM agentvm.event_seal WHERE team_id = '$team' AND seal_id = $seal");
}

1;
