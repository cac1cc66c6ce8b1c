# A server that answers a runtime with whatever a test says: for what the real gateway never does.
#
#	my $fake = AgentVM::FakeGateway->new(sub { my ($request) = @_; return (200, { Date => ... }, $body) });
#	$fake->url; $fake->requests;          # {method, path, at, headers => {...}, body} so far
# With 101 the body is an array of frames, sent once the WebSocket is open; it stays open.
# The sub runs in a process of its own; $request->{number} counts from 1 for each path.
package AgentVM::FakeGateway;

use strict;
use warnings;
use parent 'AgentVM::Process';
use Digest::SHA qw(sha1_base64);
use IO::Socket::INET;
use JSON::PP;
use POSIX qw(strftime);
use PostgreSQL::Test::Utils ();
use Time::HiRes qw(time);

sub new
{
	my ($class, $answer) = @_;
	my $self = $class->SUPER::new('fake');
	my $socket = IO::Socket::INET->new(Listen => 20, LocalAddr => '127.0.0.1', ReuseAddr => 1) or die "could not listen: $!";
	$self->{url} = 'http://127.0.0.1:' . $socket->sockport;
	$self->{pid} = fork // die "could not fork: $!";
	return $self if $self->{pid};
	$SIG{PIPE} = 'IGNORE';
	my (%count, @open);
	open(my $log, '>>', $self->{log}) or POSIX::_exit(1);
	$log->autoflush(1);
	while (my $client = $socket->accept)
	{
		my $request = read_request($client) or next;
		$request->{number} = ++$count{ $request->{path} };
		my ($status, $headers, $body) = eval { $answer->($request) };
		($status, $headers, $body) = (500, {}, "$@") unless $status;
		print {$log} encode_json($request) . "\n";
		if ($status == 101)
		{
			my $accept = sha1_base64("$request->{headers}{'sec-websocket-key'}258EAFA5-E914-47DA-95CA-C5AB0DC85B11") . '=';
			print {$client} "HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: $accept\r\nSec-WebSocket-Protocol: agentvm.v1\r\n\r\n",
			  map { pack('CCQ>', 0x81, 127, length($_)) . $_ } @$body;
			$client->flush;
			push @open, $client;
			next;
		}
		print {$client} "HTTP/1.1 $status Whatever\r\nContent-Length: " . length($body) . "\r\nConnection: close\r\n" . join('', map { "$_: $headers->{$_}\r\n" } keys %$headers) . "\r\n$body";
		close($client);
	}
	POSIX::_exit(0);
}

sub read_request
{
	my ($client) = @_;
	my $text = '';
	$text .= $_ // return while $text !~ /\r\n\r\n/ && defined($_ = <$client>);
	my ($method, $path) = $text =~ /^(\S+) (\S+)/ or return;
	my %headers = map { lc($_->[0]) => $_->[1] } map { [ /^([^:]+):\s*(.*?)\r?$/ ] } grep { /:/ } split(/\n/, $text);
	my $body = '';
	read($client, $body, $headers{'content-length'}) if $headers{'content-length'};
	return { method => $method, path => $path, headers => \%headers, body => $body, at => time };
}

sub url { return $_[0]{url}; }

sub requests
{
	my ($self, $path) = @_;
	return grep { !$path || $_->{path} eq $path } map { decode_json($_) } split(/\n/, $self->output);
}

# What a bootstrap is answered with, and times as the server writes them
sub boot_answer
{
	my (%changes) = @_;
	return encode_json({ session_id => '01a1f9d5-b6b5-7628-86e2-b0d9ba409b8e', heartbeat_interval_s => 1, deadline => iso(time + 3600), deadline_grace_s => 0,
			deadman_allowance_s => 600, env => {}, repos => [], files => [], channel => '/v1/channel', %changes });
}
sub iso { return strftime('%Y-%m-%dT%H:%M:%S', gmtime($_[0])) . '.500Z'; }
sub date { return (Date => strftime('%a, %d %b %Y %H:%M:%S GMT', gmtime($_[0]))); }

1;
