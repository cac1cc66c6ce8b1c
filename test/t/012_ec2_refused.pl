# Bad credentials: one call, nothing launched, the session failed within seconds, and code and message on the row
use strict;
use warnings;
use AgentVM::EC2;
use AgentVM::Test;
use Test::More;
use Time::HiRes qw(time);

my ($node, $faults, $moto) = ec2_node();
my $secret = $moto->secrets->{secret_access_key};

# provision() fails; its detail on the row is like this
sub refused
{
	my ($team, $detail, $name) = @_;
	my $begun = time;
	my $session = launch($node, $team, 'failed');
	cmp_ok(time - $begun, '<', 10, "$name: failed within seconds");
	like(state_of($node, $session), qr/^failed invalid_credentials $detail$/, "$name: the row has code and message, no more");
	is(scalar calls_for($faults, 'RunInstances', $session), 1, "$name: exactly one call");
	is(column($node, $session, 'vm_id IS NULL'), 't', "$name: there is no VM");
	fails_with($node, "SELECT agentvm.wait('$session', timeout => '9 seconds')", 'AV001', qr/invalid_credentials.*DETAIL:  $detail$/ms, "$name: wait() says AV001");
	return $session;
}

# the cloud itself verifies the signature, and policies
ec2_team($node, 'wrongkey', $moto, secrets => { %{ $moto->secrets }, secret_access_key => 'x' . $secret });
refused('wrongkey', 'AuthFailure: [^\n]{1,200}', 'wrong secret key');
ec2_team($node, 'nokey', $moto, secrets => { %{ $moto->secrets }, access_key_id => 'AKIAIOSFODNN7EXAMPLE' });
refused('nokey', 'AuthFailure: [^\n]{1,200}', 'unknown access key');
ec2_team($node, 'reader', $moto, secrets => $moto->user('ec2:DescribeInstances'));
refused('reader', 'AccessDenied: [^\n]{1,500}', 'user who may not launch');

foreach my $code (qw(AuthFailure InvalidClientTokenId SignatureDoesNotMatch IncompleteSignature MissingAuthenticationToken UnrecognizedClientException
	InvalidSignatureException UnauthorizedOperation AccessDenied AccessDeniedException OptInRequired Blocked PendingVerification RequestExpired ExpiredToken))
{
	$faults->set(mode => 'error', status => $code =~ /^(Auth|Sig)/ ? 401 : 403, code => $code, message => 'no entry', action => 'RunInstances');
	refused('acme', "$code: no entry", $code);
	$faults->clear;
}

# whatever else AWS refuses is not tried again either
$faults->set(mode => 'error', status => 400, code => 'InvalidAMIID.NotFound', message => 'no such image', action => 'RunInstances');
my $session = launch($node, 'acme', 'failed');
is(state_of($node, $session), 'failed provider_error InvalidAMIID.NotFound: no such image', 'a request that can never work fails');
is(scalar calls_for($faults, 'RunInstances', $session), 1, 'after one call');
fails_with($node, "SELECT agentvm.wait('$session', timeout => '9 seconds')", 'AV004', qr/no such image/, 'wait() says AV004');
$faults->clear;

# what AWS says is bounded, printable, and shows no secret even if it came from there
$faults->set(mode => 'error', status => 400, code => 'Long', message => "&#10;your&#10;&#9;$secret " . 'x' x 5000, action => 'RunInstances');
$session = launch($node, 'acme', 'failed');
my $detail = column($node, $session, 'detail');
cmp_ok(length $detail, '<=', 520, 'a long message is cut');
like($detail, qr/^Long: your  \*\*\* xxx/, 'and holds no secret and no control character');
$faults->clear;

is(scalar $moto->instances, 0, 'no instance was ever launched');
log_lacks($node, $secret);
done_testing();
