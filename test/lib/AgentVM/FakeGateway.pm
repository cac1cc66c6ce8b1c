# A server that answers a runtime with whatever a test says: for what the real gateway never does.
#
#	my $fake = AgentVM::FakeGateway->new(sub { my ($request) = @_; return (200, { Date => ... }, $body) });
#	$fake->url; $fake->requests;          # {method, path, at, headers => {...}, body} so far
# With 101 the body is an array of frames, sent once the WebSocket is open; it stays open.
# The sub runs in a process of its own; $request->{number} counts from 1 for each path.
#
# What goes over the channel, of a VM that has come on duty:
#	my $fake = AgentVM::FakeGateway->on_duty(env => {...});       # answers bootstraps, and says hello; see boot_answer()
#	my ($answer, $bytes) = $fake->call({ op => 'start', ... }, $bytes);
#	my $pending = $fake->send({ ... }, $bytes);                   # a call whose answer is asked for later:
#	my ($answer, $bytes) = $fake->answer($pending);               # an empty list when the channel was lost
#	$fake->frames('ended');               # the text frames of that type so far, with their time "at"
#	$fake->does('note', 0);               # no "noted" for those that come from now on
#	$fake->does('say', $text);            # a text frame; raw: a frame's header and bytes as they are
#	$fake->does('drop');                  # the channel is lost
package AgentVM::FakeGateway;

use strict;
use warnings;
use parent 'AgentVM::Process';
use Digest::SHA qw(sha1_base64);
use IO::Select;
use IO::Socket::INET;
use JSON::PP;
use POSIX qw(strftime);
use PostgreSQL::Test::Utils ();
use Time::HiRes qw(sleep time);

my $ten_minutes = 600;

sub new
{
	my ($class, $answer, %opt) = @_;
	my $self = $class->SUPER::new('fake');
	my ($socket, $control) = map { IO::Socket::INET->new(Listen => 300, LocalAddr => '127.0.0.1', ReuseAddr => 1) or die "could not listen: $!" } 1, 2;
	$self->{url} = 'http://127.0.0.1:' . $socket->sockport;
	$self->{control} = $control->sockport;
	$self->{pid} = fork // die "could not fork: $!";
	return $self if $self->{pid};
	eval { serve($socket, $control, $self->{log}, $answer, %opt); };
	warn $@;
	POSIX::_exit(1);
}

sub on_duty
{
	my ($class, %boot) = @_;
	return $class->new(sub {
		my ($request) = @_;
		return (200, {}, boot_answer(%boot)) if $request->{path} eq '/v1/bootstrap';
		return (200, {}, encode_json({ deadline => iso(time + 3600) })) if $request->{path} eq '/v1/heartbeat';
		return (101, {}, ['{"type": "hello"}']);
	}, acknowledges => 1);
}

# ---- the process ----

sub serve
{
	my ($socket, $control, $file, $answer, %opt) = @_;
	my (%count, @opened, $channel, %waiting, $notes);
	my $number = 0;
	my $in = IO::Select->new($socket, $control);
	$SIG{PIPE} = 'IGNORE';
	$notes = $opt{acknowledges};
	open(my $log, '>>', $file) or die "$file: $!";
	$log->autoflush(1);
	my $lose = sub {
		close($_) for values %waiting;
		%waiting = ();
		$in->remove($channel->{client});
		close($channel->{client});
		$channel = undef;
	};
	while (my @ready = $in->can_read)
	{
		foreach my $client (@ready)
		{
			if ($client == $socket)
			{
				my $peer = $socket->accept or next;
				my $request = read_request($peer) or next;
				$request->{number} = ++$count{ $request->{path} };
				my ($status, $headers, $body) = eval { $answer->($request) };
				($status, $headers, $body) = (500, {}, "$@") unless $status;
				print {$log} encode_json($request) . "\n";
				if ($status == 101)
				{
					my $accept = sha1_base64("$request->{headers}{'sec-websocket-key'}258EAFA5-E914-47DA-95CA-C5AB0DC85B11") . '=';
					print {$peer} "HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: $accept\r\nSec-WebSocket-Protocol: agentvm.v1\r\n\r\n",
					  map { frame(1, $_) } @$body;
					$peer->flush;
					push @opened, $channel if $channel;    # it stays open
					$channel = { client => $peer, buffer => '' };
					$in->add($peer);
					next;
				}
				print {$peer} "HTTP/1.1 $status Whatever\r\nContent-Length: " . length($body) . "\r\nConnection: close\r\n" . join('', map { "$_: $headers->{$_}\r\n" } keys %$headers) . "\r\n$body";
				close($peer);
			}
			elsif ($client == $control)
			{
				my $asker = $control->accept or next;
				my ($does, $value) = @{ decode_json(receive_length($asker)) };
				my $bytes = receive_length($asker);
				if (!$channel && $does ne 'note') { close($asker); next }
				if ($does eq 'call')
				{
					$waiting{ ++$number } = $asker;
					put($channel->{client}, frame(2, pack('N', $number) . $bytes)) or $lose->();
					next;
				}
				$notes = $value if $does eq 'note';
				put($channel->{client}, frame(1, $bytes)) if $does eq 'say';
				put($channel->{client}, $bytes) if $does eq 'raw';
				$lose->() if $does eq 'drop';
				put($asker, pack('N/a', ''));
				close($asker);
			}
			elsif ($channel && $client == $channel->{client})
			{
				if (!sysread($client, $channel->{buffer}, 1 << 20, length $channel->{buffer})) { $lose->(); next }
				while (my ($kind, $bytes) = take_frame(\$channel->{buffer}))
				{
					if ($kind == 2)
					{
						my $call = delete $waiting{ unpack('N', $bytes) } or next;
						put($call, pack('N/a', substr($bytes, 4)));
						close($call);
					}
					put($client, frame(10, $bytes)) if $kind == 9;
					if ($kind == 8) { $lose->(); last }
					next if $kind != 1;
					my $said = decode_json($bytes);
					print {$log} encode_json({ path => '', frame => { %$said, at => time } }) . "\n";
					put($client, frame(1, encode_json({ type => 'deadline', deadline => iso(time + 3600) }))) if $said->{type} eq 'heartbeat' && $opt{acknowledges};
					put($client, frame(1, encode_json({ type => 'noted', command => $said->{command} }))) if $said->{type} eq 'ended' && $notes;
				}
			}
		}
	}
	return;
}

sub frame { my ($kind, $bytes) = @_; return ($kind > 7 ? pack('CC', 0x80 | $kind, length($bytes)) : pack('CCQ>', 0x80 | $kind, 127, length($bytes))) . $bytes; }

# The first frame of what has come, if it is whole: its opcode and what it says
sub take_frame
{
	my ($buffer) = @_;
	return if length $$buffer < 2;
	my ($kind, $len) = unpack('CC', $$buffer);
	my $at = 2;
	$len &= 127;
	if ($len >= 126)
	{
		my $wide = $len == 127 ? 8 : 2;
		return if length $$buffer < $at + $wide;
		$len = unpack($wide == 8 ? 'Q>' : 'n', substr($$buffer, $at, $wide));
		$at += $wide;
	}
	return if length $$buffer < $at + 4 + $len;
	my $mask = substr($$buffer, $at, 4);
	my $bytes = substr($$buffer, $at + 4, $len) ^ substr($mask x ($len / 4 + 1), 0, $len);
	substr($$buffer, 0, $at + 4 + $len) = '';
	return ($kind & 15, $bytes);
}

sub put
{
	my ($client, $bytes) = @_;
	my $done = 0;
	while ($done < length $bytes)
	{
		my $n = syswrite($client, $bytes, length($bytes) - $done, $done) or return 0;
		$done += $n;
	}
	return 1;
}

sub receive
{
	my ($client, $len) = @_;
	my $bytes = '';
	while (length $bytes < $len)
	{
		sysread($client, $bytes, $len - length $bytes, length $bytes) or return undef;
	}
	return $bytes;
}

# A string that follows its length
sub receive_length
{
	my ($client) = @_;
	my $len = receive($client, 4) // return undef;
	return receive($client, unpack('N', $len));
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

# ---- the test's side ----

sub url { return $_[0]{url}; }

sub told { my ($self) = @_; return map { decode_json($_) } split(/\n/, $self->output); }

sub requests
{
	my ($self, $path) = @_;
	return grep { !$_->{frame} && (!$path || $_->{path} eq $path) } $self->told;
}

sub frames
{
	my ($self, $type) = @_;
	return grep { !$type || $_->{type} eq $type } map { $_->{frame} // () } $self->told;
}

sub ask
{
	my ($self, $words, $bytes) = @_;
	my $client = IO::Socket::INET->new(PeerAddr => "127.0.0.1:$self->{control}") or die "could not connect: $!";
	put($client, pack('N/a N/a', encode_json($words), $bytes // ''));
	return $client;
}

sub does { my ($self, $what, $value) = @_; return defined receive_length($self->ask([ $what, $value ], $value)); }

sub send { my ($self, $header, $bytes) = @_; return $self->ask(['call'], pack('N/a', encode_json($header)) . ($bytes // '')); }

sub answer
{
	my ($self, $client) = @_;
	local $SIG{ALRM} = sub { die 'a call is not answered' };
	alarm($ten_minutes);
	my $message = receive_length($client);
	alarm(0);
	return unless defined $message;
	my ($header, $bytes) = unpack('N/a a*', $message);
	return (decode_json($header), $bytes);
}

sub call { my ($self, @call) = @_; return $self->answer($self->send(@call)); }

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
