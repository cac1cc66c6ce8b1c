# A cluster whose team "acme" has the test cloud as its EC2 account, with the fault proxy in between.
#
#	my ($node, $faults, $moto) = ec2_node();                  # options as new_node's; runs as profile "plain", no runtime
#	my $session = launch($node, 'acme', 'ready');             # provisioned and, if a state is given, in it
#	my @calls = calls_for($faults, 'RunInstances', $session);
package AgentVM::EC2;

use strict;
use warnings;
use AgentVM::Faults;
use AgentVM::Moto;
use AgentVM::Test;
use Digest::SHA qw(sha256_hex);
use Exporter 'import';
use JSON::PP;
use Test::More;
use Time::HiRes qw(sleep time);

our @EXPORT = qw(ec2_node ec2_team launch column calls_for vms_of events hurry_until hurry_to await_vm bootstrap_token bytea_hash as_gateway);

sub ec2_node
{
	my ($name, %opt) = @_;
	my $moto = AgentVM::Moto->new;
	my $faults = AgentVM::Faults->new($moto);
	my $node = new_node($name // 'main', moto => $faults, %opt);
	return ($node, $faults, $moto) if exists $opt{start} && !$opt{start};
	$node->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");
	ec2_team($node, 'acme', $moto);
	return ($node, $faults, $moto);
}

# One more team with the cloud as its account; options and secrets as set_ec2's
sub ec2_team
{
	my ($node, $team, $moto, %opt) = @_;
	$node->safe_psql('postgres', "SELECT agentvm.create_team('$team', 'ec2')");
	set_ec2($node, $team, $moto, %opt);
	return;
}

# provision() without a runtime, unless the arguments name a profile; then wait for a state, if given
sub launch
{
	my ($node, $team, $state, @arguments) = @_;
	push @arguments, "profile => 'plain'" unless grep { /^profile/ } @arguments;
	my $session = provision($node, $team, @arguments);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	await_state($node, $session, $state) if $state;
	return $session;
}

# A column (or expression) of a session's row
sub column
{
	my ($node, $session, $column) = @_;
	return $node->safe_psql('postgres', "SELECT $column FROM agentvm.sessions WHERE session_id = '$session'");
}

# The calls that carry the session's tag, or that name its VM (or look for its tag)
sub calls_for
{
	my ($faults, $action, $session, $vm) = @_;
	return grep { my $args = $_->{args}; grep { ($args->{$_} // '') eq $session || ($vm && ($args->{$_} // '') eq $vm) } keys %$args }
	  $faults->requests($action);
}

# Instances of a session, in any state, from the cloud's own list
sub vms_of { my ($moto, @sessions) = @_; my %wanted = map { $_ => 1 } @sessions; return grep { $wanted{ $_->{tags}{'agentvm-session-id'} // '' } } $moto->instances; }

# Details of a session's provider calls, oldest first: {operation, http_status, error_class, error, ms, request_id}
sub events
{
	my ($node, $session) = @_;
	return map { decode_json($_) } split /\n/, $node->safe_psql('postgres',
		"SELECT detail FROM agentvm.session_event WHERE session_id = '$session' AND kind = 'provider_call' ORDER BY event_id");
}

# As await(), for answers that depend on retries and repeated looks at the cloud: makes these due at once, again and again
sub hurry_until
{
	my ($node, $query, $expected, %opt) = @_;
	my $end = time + ($opt{timeout} // 60);
	$expected //= 't';
	while ($node->safe_psql('postgres', $query) ne $expected && time < $end)
	{
		$node->safe_psql('postgres', 'UPDATE agentvm.session SET next_check_at = now() WHERE next_check_at > now() AND lease IS NULL '
			  . "AND (state IN ('terminating', 'pausing', 'resuming') OR state = 'provisioning' AND NOT running); SELECT agentvm.wake()");
		sleep 0.05;
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return await($node, $query, $expected, timeout => 0, %opt);
}

# Hurry a session into a state, given as state_of() has it
sub hurry_to
{
	my ($node, $session, $state) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return hurry_until($node, "SELECT concat_ws(' ', state, end_reason, detail) ~ '^$state' FROM agentvm.sessions WHERE session_id = '$session'", 't',
		name => "session $session becomes $state") || diag('it is ' . state_of($node, $session));
}

# Wait for a session's VM to have been launched; its id
sub await_vm
{
	my ($node, $session) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	await($node, "SELECT vm_id IS NOT NULL FROM agentvm.sessions WHERE session_id = '$session'", 't', name => "session $session has a VM");
	return column($node, $session, 'vm_id');
}

# The bootstrap token in the user data of an instance
sub bootstrap_token
{
	my ($moto, $vm) = @_;
	my ($token) = $moto->files($vm)->{'/etc/agentvm/runtime.env'} =~ /^AGENTVM_BOOTSTRAP_TOKEN=([0-9a-f]{64})$/m;
	return $token;
}

# The hash of a token as a bytea literal, as the gateway would send it
sub bytea_hash { return "'\\x" . sha256_hex($_[0]) . "'::bytea"; }

# SQL as role agentvm_gateway; its output
sub as_gateway
{
	my ($node, $sql) = @_;
	return $node->safe_psql('postgres', "SET ROLE agentvm_gateway; $sql");
}

1;
