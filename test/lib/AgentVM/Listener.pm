# A client that LISTENs, and what it hears.
#
#	my $listener = AgentVM::Listener->new($node, $node->safe_psql('postgres', "SELECT agentvm.channel('acme')"));
#	$listener->until($session, 'ready');     # wait for that notice; dies after 60 s
#	$listener->heard;                        # all notices so far, {channel, payload, session_id, old, new, reason, at}
#	$listener->of($session);                 # those of one session
package AgentVM::Listener;

use strict;
use warnings;
use parent 'AgentVM::Client';
use JSON::PP;
use Time::HiRes qw(sleep time);

sub new
{
	my ($class, $node, @channels) = @_;
	my $self = AgentVM::Client::new($class, $node);
	$self->{heard} = [];
	$self->listen(@channels);
	return $self;
}

sub listen { my ($self, @channels) = @_; $self->run("LISTEN \"$_\"") for @channels; return; }

sub heard
{
	my ($self) = @_;
	my $output = $self->run('SELECT 1');    # psql shows notices after an answer
	while ($output =~ /^Asynchronous notification "(.*?)" with payload "(.*)" received from server process with PID \d+\.$/mg)
	{
		push @{ $self->{heard} }, { channel => $1, payload => $2, %{ decode_json($2) } };
	}
	return @{ $self->{heard} };
}

sub of { my ($self, $session) = @_; return grep { $_->{session_id} eq $session } $self->heard; }

sub until
{
	my ($self, $session, $state) = @_;
	my $end = time + 60;
	until (grep { $_->{new} eq $state } $self->of($session))
	{
		die "no notice of $session $state" if time > $end;
		sleep 0.01;
	}
	return;
}

1;
