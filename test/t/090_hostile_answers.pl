# Answers meant to do harm: each is an error of its class, takes bounded memory and time, and delays nobody else
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Test;
use Compress::Zlib qw(memGzip);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $faults = AgentVM::Faults->new;
my $node = new_node('main', moto => $faults);
$node->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");
ec2_team($node, $_, $faults) for qw(hostile healthy);
my $dispatcher = dispatcher();
launch($node, 'healthy', 'ready');

sub dispatcher { return $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'agentvm dispatcher'"); }

# MiB of memory that the dispatcher has now (VmRSS), or has had at most since the last forget_peak() (VmHWM)
sub memory      { return slurp_file("/proc/$dispatcher/status") =~ /^$_[0]:\s+(\d+) kB$/m ? $1 / 1024 : die "no $_[0]"; }
sub forget_peak { open(my $refs, '>', "/proc/$dispatcher/clear_refs") or die $!; print $refs 5; close($refs) or die $!; return; }

# Sessions launched meanwhile (default 1) get the answer; it is an error of that class and text, and does no harm
sub harmless
{
	my ($name, $class, $error, %answer) = @_;
	my $sessions = delete $answer{sessions} // 1;
	my $allowed = 32 + 5 * $sessions;
	forget_peak();
	my $before = memory('VmRSS');
	my $errors = q{FROM agentvm.session_event WHERE detail ? 'error' AND event_id > } . $node->safe_psql('postgres', 'SELECT max(event_id) FROM agentvm.session_event');
	$faults->set(mode => 'raw', action => 'RunInstances', match => 'hostile', %answer);
	$node->safe_psql('postgres', "SELECT agentvm.provision('hostile', profile => 'plain') FROM generate_series(1, $sessions)");
	await($node, "SELECT count(DISTINCT session_id) $errors", $sessions, name => "$name: answered");
	my $begun = time;
	launch($node, 'healthy', 'ready');
	cmp_ok(time - $begun, '<', 15, "$name: others are served at once");
	like($node->safe_psql('postgres', "SELECT DISTINCT (detail->>'error_class') || ' ' || (detail->>'error') $errors"), qr/^(?:$class $error(?:\n|$))+$/, "$name: is $class");
	my $taken = memory('VmHWM') - $before;
	cmp_ok($taken, '<', $allowed, "$name: takes less than $allowed MiB") and note("it took $taken");
	is(dispatcher(), $dispatcher, "$name: the dispatcher lives");
	$faults->clear;
	hurry_until($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'provisioning'", 0, name => "$name: what can be tried again works in the end");
	return;
}

my $ok = "HTTP/1.1 200 OK\r\nConnection: close\r\n";
my $xml = "${ok}Content-Type: text/xml\r\n\r\n";
my $malformed = "MalformedReply: AWS's answer is not what this call answers";
my $id = '<instancesSet><item><instanceId>i-0123456789abcdef0</instanceId></item></instancesSet>';

# ---- size ----
harmless('100 MB', 'transient', 'NoReply: reply is larger than 1 MiB',
	head => "${ok}Content-Length: 104857600\r\n\r\n", piece => 'x' x 1024, repeat => 102400, sessions => 16);
harmless('chunks without end', 'transient', 'NoReply: reply is larger than 1 MiB',
	head => "${ok}Transfer-Encoding: chunked\r\n\r\n", piece => "400\r\n" . 'x' x 1024 . "\r\n", repeat => 'endless');
harmless('headers without end', 'transient', 'NoReply: reply headers are larger than 256 KiB', head => $ok, piece => "X-%n%: x\r\n", repeat => 'endless');
harmless('a header without end', 'transient', 'NoReply: (Out of memory|A value or data field grew larger than allowed)', head => "${ok}X: ", piece => 'x' x 1024, repeat => 'endless');
harmless('promises without end', 'transient', 'NoReply: reply headers are larger than 256 KiB', piece => "HTTP/1.1 100 Continue\r\n\r\n", repeat => 'endless');
harmless('a zip bomb', 'transient', $malformed, head => "${ok}Content-Encoding: gzip\r\n\r\n", piece => memGzip("\0" x (64 * 1024 * 1024)));
harmless('a zip bomb in transfer', 'transient', 'NoReply: (reply is larger than 1 MiB|.*Transfer-Encoding)',
	head => "${ok}Transfer-Encoding: gzip\r\n\r\n", piece => memGzip("\0" x (64 * 1024 * 1024)));

# ---- time ----
$node->append_conf('postgresql.conf', "agentvm.lease = '3s'");
$node->reload;
harmless('a byte at a time', 'transient', 'NoReply: Operation timed out after 2\d\d\d milliseconds with \d+ bytes received', head => $xml, piece => 'x', repeat => 'endless', ms => 900,
	sessions => 40);    # more than a team may have in flight
$node->append_conf('postgresql.conf', "agentvm.lease = '60s'");
$node->reload;

# ---- XML ----
harmless('a hundred thousand attributes', 'transient', $malformed, head => "$xml<RunInstancesResponse", piece => " a%n%=''", repeat => 100_000, tail => ">$id</RunInstancesResponse>", sessions => 4);
harmless('a quarter million of elements', 'transient', $malformed, head => "$xml<RunInstancesResponse>", piece => '<a/>', repeat => 262_000,
	tail => "$id</RunInstancesResponse>", sessions => 32);
harmless('depth', 'transient', $malformed, head => "$xml<RunInstancesResponse>", piece => '<a>', repeat => 349_000, sessions => 4);
harmless('a text of 1 MB', 'permanent', 'Odd: ' . 'x' x 492 . '...', head => "HTTP/1.1 400 Bad\r\nConnection: close\r\n\r\n<Error><Code>Odd</Code><Message>", piece => 'x', repeat => 1_000_000,
	tail => '</Message></Error>', sessions => 32);
my $bomb = join '', map { "<!ENTITY a$_ \"" . ("&a" . ($_ - 1) . ';') x 10 . '">' } 1 .. 9;
harmless('entities of entities', 'transient', $malformed, head => "$xml<!DOCTYPE x [<!ENTITY a0 \"aaaaaaaaaa\">$bomb]>",
	piece => "<RunInstancesResponse>&a9;$id</RunInstancesResponse>");
my $elsewhere = $faults->endpoint . '/?Action=Elsewhere';
foreach my $entity ("<!ENTITY e SYSTEM \"$elsewhere\">", "<!ENTITY % e SYSTEM \"$elsewhere\">%e;", '<!ENTITY e SYSTEM "file:///etc/passwd">')
{
	harmless('an external entity', 'transient', $malformed, piece => "$xml<!DOCTYPE x [$entity]><RunInstancesResponse>$id&e;</RunInstancesResponse>");
}
harmless('an external DTD', 'transient', $malformed, piece => "$xml<!DOCTYPE x SYSTEM \"$elsewhere\"><RunInstancesResponse>$id</RunInstancesResponse>");
my $utf16 = join '', map { "$_\0" } split //, "<RunInstancesResponse>$id</RunInstancesResponse>";
harmless('UTF-16', 'transient', $malformed, piece => "$xml\xff\xfe$utf16");
harmless('bytes that are no text', 'transient', $malformed, piece => "$xml<RunInstancesResponse>\xc0\xaf\xed\xa0\x80\xff$id</RunInstancesResponse>");

# ---- HTTP ----
harmless('deep JSON', 'transient', $malformed, head => "${ok}Content-Type: application/json\r\n\r\n", piece => '[', repeat => 1_000_000);
my $refusal = "HTTP/1.1 400 Bad\r\nConnection: close\r\nContent-Type: application/json\r\n\r\n";
harmless('a refusal in JSON', 'credentials', 'AuthFailure: ', piece => qq($refusal\{"__type": "com.amazonaws#AuthFailure"}));
harmless('a refusal in deep JSON', 'permanent', 'HTTP 400: the endpoint answered with HTTP status 400 and no AWS error', head => qq($refusal\{"__type": ), piece => '[', repeat => 500_000);
harmless('a refusal in long JSON', 'credentials', 'AuthFailure: x{400,490}\.\.\.', head => qq($refusal\{"__type": "AuthFailure", "message": "), piece => 'x', repeat => 900_000, tail => '"}');
harmless('a refusal in JSON that is no text', 'credentials', 'AuthFailure: [ ?]+', piece => qq($refusal\{"__type": "AuthFailure", "message": "\xc0\xaf\xff\\u0001"}));
harmless('a refusal in JSON that is none', 'permanent', 'HTTP 400: the endpoint answered with HTTP status 400 and no AWS error', piece => qq($refusal\{"__type": "AuthFailure", "message": "\\u0000", }));
harmless('a picture', 'transient', $malformed, piece => "${ok}Content-Type: image/png\r\n\r\n\x89PNG\r\n\x1a\n\0\0\0\rIHDR");
harmless('no HTTP at all', 'transient', 'NoReply: (Unsupported protocol|Received HTTP/0.9 when not allowed)', piece => "SSH-2.0-OpenSSH_9.2\r\n");
harmless('an impossible status', 'transient', 'NoReply: (reply has no status|Unsupported .*|Weird server reply)', piece => "HTTP/21703\r\nConnection: close\r\n\r\n");
harmless('less than promised', 'transient', 'NoReply: Transferred a partial file', piece => "${ok}Content-Length: 1000\r\n\r\n<RunInstancesResponse>$id");

is($faults->count('Elsewhere'), 0, 'no entity was looked for');
unlike(log_text($node), qr/root:|PANIC|terminated by signal/, 'nor did it show a file, and nothing fell over');
done_testing();
