# What a runtime in a VM and a gateway would do, by SQL: for sessions with a runtime on noop, where there is no VM.
#
#	bootstrap($node, $session);          # report for duty with the session's bootstrap token
#	heartbeat($node, $session);
#	bootstrap(..., fails => 'AV006'), heartbeat(..., fails => 'AV006');      # a check that it is refused so
#	bootstrap_token($node, $session);    # what its boot payload would hold
#	report($node, 'gateway-1');          # a gateway says that it listens
package AgentVM::Runtime;

use strict;
use warnings;
use AgentVM::Test;
use Digest::SHA qw(hmac_sha256_hex sha256_hex);
use Exporter 'import';
use MIME::Base64 qw(decode_base64);
use PostgreSQL::Test::Utils;

our @EXPORT = qw(bootstrap bootstrap_token heartbeat report);

# HMAC-SHA256(master key, session id and attempt), as in src/secret/keyring.c
sub bootstrap_token
{
	my ($node, $session, $attempt) = @_;
	my ($key) = slurp_file($node->basedir . '/keys') =~ /^k1:(.*)$/m;
	return hmac_sha256_hex("$session:" . ($attempt // 1), decode_base64($key));
}

# Its hash as a literal
sub token_hash { return bytea(bootstrap_token(@_)); }

# The session token's hash: any random text would do
sub session_hash { return bytea("token of $_[0]"); }

sub bytea { return "'\\x" . sha256_hex($_[0]) . "'::bytea"; }

sub call
{
	my ($node, $sql, %opt) = @_;
	$sql = as_role('agentvm_gateway', $sql);
	local $Test::Builder::Level = $Test::Builder::Level + 2;
	return fails_with($node, $sql, $opt{fails}) ? 1 : 0 if $opt{fails};
	return $node->safe_psql('postgres', $sql);
}

sub bootstrap
{
	my ($node, $session, %opt) = @_;
	return call($node, 'SELECT agentvm.bootstrap(' . token_hash($node, $session, $opt{attempt}) . ', ' . session_hash($session) . ", 'boot-1')", %opt);
}

sub heartbeat
{
	my ($node, $session, %opt) = @_;
	return call($node, 'SELECT agentvm.heartbeat(' . session_hash($session) . ')', %opt);
}

sub report
{
	my ($node, $gateway) = @_;
	return call($node, "SET application_name = '$gateway'; SELECT agentvm.heartbeat_batch('{}', '{}')");
}

1;
