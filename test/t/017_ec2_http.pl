# check_provider() and inspect(); what the client refuses to do; and that a user can always stop waiting
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use IPC::Run qw(start finish);
use JSON::PP;
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node();
my $session = launch($node, 'acme', 'ready');
my $vm = column($node, $session, 'vm_id');
my %ask = (inspect => "SELECT agentvm.inspect('$session')", check => "SELECT agentvm.check_provider('acme')");
my %action = (inspect => 'DescribeInstances', check => 'GetCallerIdentity');

# ---- answers ----
my $answer = decode_json(psql_ok($node, $ask{inspect}, 'inspect()'));
is("$answer->{instance_id} $answer->{state} $answer->{lifecycle} $answer->{instance_type}", "$vm running spot t3.micro", 'says what the cloud says');
is($answer->{address}, column($node, $session, 'address'), 'the address is on the row, too');
$answer = decode_json(psql_ok($node, $ask{check}, 'check_provider()'));
ok($answer->{ok}, 'the credentials work');
like($answer->{arn}, qr{^arn:aws:iam::$answer->{account}:user/}, 'and belong to');
$moto->run('stop-instance', $vm);
is(decode_json($node->safe_psql('postgres', $ask{inspect}))->{state}, 'stopped', 'inspect() asks anew');
$faults->set(action => 'DescribeInstances', mode => 'error', code => 'InvalidInstanceID.NotFound', message => 'no such instance', n => 1);
is_deeply(decode_json($node->safe_psql('postgres', $ask{inspect})), { state => 'not_found' }, 'an instance that is not there is an answer');
$node->safe_psql('postgres', "UPDATE agentvm.session SET region = 'us-east-1.evil.example' WHERE session_id = '$session'");
fails_with($node, $ask{inspect}, 'AV004', qr/invalid AWS region/, 'what a row has as its region is not believed either');
$node->safe_psql('postgres', "UPDATE agentvm.session SET region = 'us-east-1' WHERE session_id = '$session'");
my $events = $node->safe_psql('postgres', 'SELECT count(*) FROM agentvm.session_event');
is($events, $node->safe_psql('postgres', "$ask{inspect}; SELECT count(*) FROM agentvm.session_event") =~ s/.*\n//sr, 'asking leaves no trace in the log of the session');

# ---- refusals ----
ec2_team($node, 'wrong', $moto, secrets => { %{ $moto->secrets }, secret_access_key => 'wrong' });
fails_with($node, "SELECT agentvm.check_provider('wrong')", 'AV001', qr/AuthFailure|SignatureDoesNotMatch|InvalidClientTokenId/, 'wrong keys: AV001');
ec2_team($node, 'half', $moto, secrets => { access_key_id => 'AKIAIOSFODNN7EXAMPLE' });
fails_with($node, "SELECT agentvm.check_provider('half')", 'AV001', qr/MissingCredentials/, 'half a key: AV001');
my $half = launch($node, 'half', 'failed');
like(state_of($node, $half), qr/^failed invalid_credentials MissingCredentials: /, 'and a session fails of it without a call');
foreach my $kind (qw(inspect check))
{
	my %expected = (throttle => 'AV004', 500 => 'AV004', html => 'AV004', auth => 'AV001', truncated => 'AV004', drop => 'AV004');
	foreach my $mode (sort keys %expected)
	{
		$faults->set(action => $action{$kind}, mode => $mode);
		fails_with($node, $ask{$kind}, $expected{$mode}, undef, "$kind, $mode: $expected{$mode}");
		$faults->clear;
	}
	$faults->set(action => $action{$kind}, mode => 'body', body => 'x' x 1024, repeat => 2048);
	fails_with($node, $ask{$kind}, 'AV004', qr/larger than 1 MiB/, "$kind: an answer of 2 MiB is not read to its end");
	$faults->clear;
	my $received = $faults->count($action{$kind});
	$faults->set(action => $action{$kind}, mode => 'body', status => 307, location => $faults->endpoint . '/');
	fails_with($node, $ask{$kind}, 'AV004', qr/HTTP 307/, "$kind: a redirect is an error");
	is($faults->count($action{$kind}), $received + 1, 'and is not followed');
	$faults->clear;
}

# ---- cancelled at once ----
sub cancelled
{
	my ($kind, $how) = @_;
	my ($error, $begun) = ('', time);
	my $received = $faults->count($action{$kind});
	my $timeout = $how eq 'statement_timeout' ? '500ms' : 0;
	my $psql = start([ 'psql', '-XAtq', '-v', 'VERBOSITY=verbose', '-d', $node->connstr('postgres'), '-c', "SET statement_timeout = '$timeout'", '-c', $ask{$kind} ],
		'<', \undef, '>', '/dev/null', '2>', \$error);
	sleep 0.02 while $faults->count($action{$kind}) == $received && time - $begun < 30;
	$node->safe_psql('postgres', "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query = " . literal($ask{$kind})) if !$timeout;
	finish($psql);
	like($error, qr/ERROR:  57014/, "$kind ends by $how");
	cmp_ok(time - $begun, '<', 7, 'at once');
	return;
}
$faults->set(action => $_, mode => 'slow', ms => 9000) for values %action;
foreach my $kind (qw(inspect check)) { cancelled($kind, $_) for qw(statement_timeout pg_cancel_backend); }
$faults->clear;

# ---- launches, too, follow no redirect, and go nowhere without TLS unless told so ----
$faults->set(action => 'RunInstances', mode => 'body', status => 307, location => $faults->endpoint . '/');
my $launches = $faults->count('RunInstances');
my $redirected = launch($node, 'acme', 'failed');
like(state_of($node, $redirected), qr/^failed provider_error HTTP 307: /, 'a redirected launch fails');
is($faults->count('RunInstances'), $launches + 1, 'with one call');
$faults->clear;

my $received = $faults->counts->{received};
$node->append_conf('postgresql.conf', 'agentvm.allow_insecure_endpoints = off');
$node->reload;
await($node, "SHOW agentvm.allow_insecure_endpoints", 'off');
my $plain = launch($node, 'acme');
await($node, "SELECT detail ~ 'without TLS' FROM agentvm.sessions WHERE session_id = '$plain'", 't', name => 'no plain http: the row says why');
fails_with($node, $ask{$_}, 'AV010', qr/without TLS/, "$_: AV010") for qw(inspect check);
is_deeply($faults->counts->{received}, $received, 'nothing was sent');
$node->append_conf('postgresql.conf', 'agentvm.allow_insecure_endpoints = on');
$node->reload;
await_state($node, $plain, 'ready');
done_testing();
