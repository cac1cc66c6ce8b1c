# A team's role: assumed with the external id that we have made, for one kind of operation, once for all sessions, and again when it has expired
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::EC2;
use AgentVM::Process;
use AgentVM::Test;
use JSON::PP;
use POSIX qw(strftime);
use Test::More;
use Time::HiRes qw(sleep time);

my ($node, $faults, $moto) = ec2_node('main', start => 0);
my @all = qw(ec2:* ssm:*);
my $arn = $moto->role('agentvm', @all);
my $base = $moto->user('sts:*');    # may do nothing but assume roles

# the server's environment has keys, too, which count only where they may
local $ENV{AWS_ACCESS_KEY_ID} = $base->{access_key_id};
local $ENV{AWS_SECRET_ACCESS_KEY} = $base->{secret_access_key};
$node->start;
create_extension($node);
$node->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");

sub one { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub external_id { my ($team) = @_; return one("SELECT external_id FROM agentvm.team WHERE team_id = '$team'"); }
sub check { my ($team) = @_; return decode_json(one("SELECT agentvm.check_provider('$team')")); }
sub assumed { my ($team) = @_; my $id = external_id($team); return grep { $_->{args}{ExternalId} eq $id } $faults->requests('AssumeRole'); }
sub actions { my ($call) = @_; return sort map { @{ $_->{Action} } } @{ decode_json($call->{args}{Policy})->{Statement} }; }
sub finish { my (@sessions) = @_; one("SELECT agentvm.terminate('$_')") for @sessions; hurry_to($node, $_, 'terminated') for @sessions; return; }

# A team with a role; without secrets: the server's keys
sub team
{
	my ($team, %opt) = @_;
	one("SELECT agentvm.create_team('$team', 'ec2')");
	set_ec2($node, $team, $moto, options => { role_arn => $opt{arn} // $arn }, secrets => $opt{secrets} // $base);
	return;
}

# ---- the external id ----
team('acme');
my $id = external_id('acme');
like($id, qr/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/, 'a team has an external id');
one("SELECT agentvm.create_team('other')");
isnt(external_id('other'), $id, 'each its own');
one("SELECT agentvm.drop_team('other'); SELECT agentvm.create_team('other')");
my $before = external_id('other');
one("SELECT agentvm.set_provider('other', 'ec2', '{}'); SELECT agentvm.drop_provider('other', 'ec2')");
is(external_id('other'), $before, "what becomes of a provider's configuration does not matter to it");
one("SELECT agentvm.drop_team('other'); SELECT agentvm.create_team('other')");
isnt(external_id('other'), $before, 'a new team of the same name has another one');
fails_with($node, q{SELECT agentvm.set_provider('other', 'ec2', '{"external_id": "mine"}')}, 'AV010', qr/external_id/, 'nobody chooses it');
fails_with($node, qq{SELECT agentvm.set_provider('other', 'ec2', '{"role_arn": "$_"}')}, 'AV010', qr/role_arn/, "no ARN of a role: $_")
  for 'agentvm', 'arn:aws:iam::123456789012:user/x', 'arn:aws:iam::1234:role/x', 'arn:aws:iam::123456789012:role/', 'arn:aws:iam::123456789012:role/a b';
psql_ok($node, qq{SELECT agentvm.set_provider('other', 'ec2', '{"role_arn": "$_"}')}, "an ARN of a role: $_") for 'arn:aws-cn:iam::123456789012:role/x', 'arn:aws:iam::123456789012:role/path/to/A_b+c=,.@-';
fails_with($node, qq{SELECT agentvm.create_profile('bad', 'ec2', options => '{"role_arn": "$arn"}')}, 'AV010', qr/set_provider/, "a profile has no role: it would be another team's");
fails_with($node, qq{SELECT agentvm.provision('acme', profile => 'plain', options => '{"role_arn": "$arn"}')}, 'AV010', qr/role_arn/, 'nor has a caller');

# ---- check_provider ----
my $answer = check('acme');
is_deeply([ @$answer{qw(ok account external_id)} ], [ JSON::PP::true, '123456789012', $id ], 'check_provider(): the account, the external id');
like($answer->{arn}, qr{:assumed-role/agentvm/check$}, 'and the role');
is_deeply([ sort @{ $answer->{allowed} } ], [ 'ec2:DescribeInstances', 'ec2:RunInstances', 'sts:GetCallerIdentity' ], 'what is allowed');
is_deeply($answer->{not_checked}, [ map { "ec2:$_" } qw(TerminateInstances StopInstances StartInstances CancelSpotInstanceRequests) ], 'what could not be asked');
my ($call) = assumed('acme');
is_deeply([ @{ $call->{args} }{qw(RoleArn ExternalId DurationSeconds)} ], [ $arn, $id, 900 ], 'the role was assumed with it, for a short while');
is(scalar $moto->instances, 0, 'nothing has been launched');
check('acme');
is(scalar assumed('acme'), 2, 'whoever checks again sees how it is now');

# ---- one call for many sessions ----
my $cluster = one('SELECT installation_id FROM agentvm.installation');
$faults->set(action => 'AssumeRole', mode => 'slow', ms => 1500);
my @sessions = map { provision($node, 'acme', "profile => 'plain'") } 1 .. 20;
await($node, "SELECT count(*) FROM agentvm.sessions WHERE team_id = 'acme' AND state = 'ready'", 20);
my @calls = (assumed('acme'))[ 2 .. 99 ];
@calls = grep { $_ } @calls;
is(scalar @calls, 1, 'twenty sessions: assumed once');
my %args = %{ $calls[0]{args} };
ok((grep { $_ eq $args{RoleSessionName} } @sessions), "the name of the role's session is the session that asked first");
is($args{DurationSeconds}, 3600, 'for an hour');
is_deeply([ actions($calls[0]) ], [ sort qw(ec2:DescribeInstances ec2:RunInstances ec2:CreateTags iam:PassRole iam:CreateServiceLinkedRole kms:*) ], 'for a launch');
cmp_ok(length $args{Policy}, '<=', 2048, 'the policy is short enough');
is(scalar(grep { $_->{state} eq 'running' } vms_of($moto, @sessions)), 20, 'one VM each');
finish(@sessions);
@calls = (assumed('acme'))[ 3 .. 99 ];
@calls = grep { $_ } @calls;
is(scalar @calls, 1, 'and once for all their ends');
is_deeply([ actions($calls[0]) ], [ sort qw(ec2:DescribeInstances ec2:TerminateInstances ec2:CancelSpotInstanceRequests) ], 'which allows nothing else');
my ($terminate) = grep { $_->{Action}[0] eq 'ec2:TerminateInstances' } @{ decode_json($calls[0]{args}{Policy})->{Statement} };
is_deeply($terminate->{Condition}, { StringEquals => { 'ec2:ResourceTag/agentvm-cluster' => $cluster } }, 'and of no VMs but ours');
is(scalar $moto->running, 0, 'nothing runs');
$faults->clear;

# in a backend
my $session = launch($node, 'acme', 'ready');
my $client = AgentVM::Client->new($node);
my $seen = () = assumed('acme');
like($client->run("SELECT agentvm.inspect('$session') ->> 'state'"), qr/running/, 'inspect()');
$client->run("SELECT agentvm.inspect('$session')");
@calls = (assumed('acme'))[ $seen .. 99 ];
@calls = grep { $_ } @calls;
is(scalar @calls, 1, 'a session of the database assumes it once, too');
is_deeply([ $calls[0]{args}{RoleSessionName}, actions($calls[0]) ], [ $session, 'ec2:DescribeInstances' ], 'just to look at a VM');

# ---- a pause ----
one("SELECT agentvm.create_profile('steady', 'ec2', runtime => false, options => '{\"spot\": false}')");
my $steady = launch($node, 'acme', 'ready', "profile => 'steady'");
$seen = () = assumed('acme');
one("SELECT agentvm.pause('$steady')");
hurry_to($node, $steady, 'paused');
one("SELECT agentvm.resume('$steady')");
hurry_to($node, $steady, 'ready');
@calls = (assumed('acme'))[ $seen .. 99 ];
@calls = grep { $_ } @calls;
is(scalar @calls, 1, 'both ways with what was assumed once');
is_deeply([ actions($calls[0]) ], [ sort qw(ec2:DescribeInstances ec2:StartInstances ec2:StopInstances kms:*) ], 'which allows nothing else');
my ($stop) = grep { $_->{Action}[0] eq 'ec2:StopInstances' } @{ decode_json($calls[0]{args}{Policy})->{Statement} };
is_deeply($stop->{Condition}, { StringEquals => { 'ec2:ResourceTag/agentvm-cluster' => $cluster } }, 'and of no VMs but ours');
finish($steady);

# ---- what is missing ----
my $poor = $moto->role('poor', 'ec2:DescribeInstances');
team('poor', arn => $poor);
$answer = check('poor');
ok(!$answer->{ok}, 'a role that may not launch: not ok');
is_deeply([ map { $_->{action} } @{ $answer->{missing} } ], ['ec2:RunInstances'], 'what is missing');
like($answer->{missing}[0]{hint}, qr{Allow \S+assumed-role/poor/check ec2:RunInstances}, 'and what to do');
is_deeply([ sort @{ $answer->{allowed} } ], [ 'ec2:DescribeInstances', 'sts:GetCallerIdentity' ], 'what it may');
my $failed = launch($node, 'poor', 'failed');
like(state_of($node, $failed), qr/^failed invalid_credentials AccessDenied.*ec2:RunInstances/, 'a launch: refused');
my $message = 'You are not authorized to perform this operation. Encoded authorization failure message: c0DedMEssAge';
$faults->set(action => 'RunInstances', mode => 'error', status => 403, code => 'UnauthorizedOperation', message => $message);
my $decoded = encode_json({ allowed => JSON::PP::false, context => { principal => { id => 'x' }, action => 'iam:PassRole', resource => 'arn:aws:iam::123456789012:role/vm' } });
$faults->set(action => 'DecodeAuthorizationMessage', mode => 'body',
	body => '<DecodeAuthorizationMessageResponse><DecodedMessage>' . $decoded =~ s/"/&quot;/gr . '</DecodedMessage></DecodeAuthorizationMessageResponse>');
$answer = check('acme');
is_deeply([ map { $_->{action}, $_->{resource} } @{ $answer->{missing} } ], [ 'iam:PassRole', 'arn:aws:iam::123456789012:role/vm' ], 'what AWS says in code is decoded');
is(($faults->requests('DecodeAuthorizationMessage'))[0]{args}{EncodedMessage}, 'c0DedMEssAge', 'by AWS');
$faults->clear;
$faults->set(action => 'RunInstances', mode => 'error', status => 403, code => 'UnauthorizedOperation', message => $message);
$faults->set(action => 'DecodeAuthorizationMessage', mode => 'error', status => 403, code => 'AccessDenied');
$answer = check('acme');
is_deeply([ map { $_->{action}, $_->{decoding} } @{ $answer->{missing} } ], [ 'ec2:RunInstances', 'AccessDenied' ], 'or that may be missing, too');
unlike(encode_json($answer), qr/c0Ded/, 'the code itself helps nobody');
$faults->clear;
set_ec2($node, 'poor', $moto, options => { role_arn => $arn }, secrets => $base);
$faults->set(action => 'RunInstances', mode => 'error', status => 400, code => 'InvalidAMIID.NotFound', message => 'The image id does not exist');
$answer = check('poor');
$faults->clear;
is_deeply([ map { $_->{error}, $_->{hint} } @{ $answer->{problems} } ], [ 'InvalidAMIID.NotFound', 'Look at option "image_id".' ], 'a wrong option is no lack of rights');
psql_ok($node, "SELECT agentvm.set_provider('poor', 'ec2', " . json({ region => 'us-east-1', role_arn => $arn }) . ')');
$answer = check('poor');
is_deeply([ map { $_->{option} } @{ $answer->{problems} } ], ['image_id'], 'nothing to boot');
psql_ok($node, "SELECT agentvm.create_profile('booting', 'ec2', options => " . json({ image_id => $moto->options->{image_id} }) . ')');
ok(check('poor')->{ok}, 'a profile may say what');

# ---- a role that cannot be assumed ----
team('refused');
$faults->set(action => 'AssumeRole', mode => 'error', status => 403, code => 'AccessDenied', message => 'not authorized to perform: sts:AssumeRole');
fails_with($node, "SELECT agentvm.check_provider('refused')", 'AV001', qr/AccessDenied.*sts:AssumeRole.*HINT:.*sts:ExternalId = "\Q${\ external_id('refused')}\E"/s, 'check_provider() says what the role has to trust');
@sessions = map { provision($node, 'refused', "profile => 'plain'") } 1 .. 5;
await_state($node, $_, 'failed') for @sessions;
like(state_of($node, $sessions[0]), qr/^failed invalid_credentials AccessDenied: not authorized/, 'sessions fail at once');
cmp_ok(scalar assumed('refused'), '<=', 3, 'with a call for all of them');
is((events($node, $sessions[0]))[-1]{operation}, 'AssumeRole', 'the event says at what');
$faults->clear;
ok(check('refused')->{ok}, 'once it may be assumed it is, right away');

# what may pass: no answer, throttling, an answer that is none
team('shaky');
for my $fault ({ mode => 'drop' }, { mode => 'lost' }, { mode => '500' }, { mode => 'throttle' }, { mode => 'truncated' }, { mode => 'html' }, { mode => 'body', body => '<AssumeRoleResponse/>' },
	{ mode => 'body', body => '<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>A</AccessKeyId><SecretAccessKey><b>x</b></SecretAccessKey><SessionToken> </SessionToken></Credentials></AssumeRoleResult></AssumeRoleResponse>' })
{
	set_ec2($node, 'shaky', $moto, options => { role_arn => $moto->role("shaky-$fault->{mode}-" . time =~ s/\D//gr, @all) }, secrets => $base);
	$faults->set(action => 'AssumeRole', n => $fault->{mode} =~ /drop|lost/ ? 6 : 1, %$fault);
	my $shaky = provision($node, 'shaky', "profile => 'plain'");
	hurry_to($node, $shaky, 'ready');
	$faults->clear;
	is(scalar vms_of($moto, $shaky), 1, "$fault->{mode}: launched all the same, once");
}

# ---- expiry ----
team('brief');
# the answer of AssumeRole with an expiry of our choice, and keys that the cloud knows
sub canned
{
	my ($lives) = @_;
	my $keys = $moto->run('call', 'sts', 'assume_role', encode_json({ RoleArn => $arn, RoleSessionName => 'canned' }))->{Credentials};
	$faults->set(action => 'AssumeRole', mode => 'body', body => '<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>'
		  . "<AccessKeyId>$keys->{AccessKeyId}</AccessKeyId><SecretAccessKey>$keys->{SecretAccessKey}</SecretAccessKey><SessionToken>$keys->{SessionToken}</SessionToken><Expiration>"
		  . strftime('%Y-%m-%dT%H:%M:%SZ', gmtime(time + $lives)) . '</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>');
	return $keys;
}
my $keys = canned(300 + 15);
my @brief = launch($node, 'brief', 'ready');
my $begun = time;
push @brief, launch($node, 'brief', 'ready') while !@brief || (assumed('brief') == 1 && time < $begun + 60);
cmp_ok(scalar @brief, '>=', 3, 'used as long as it is not near its end');
is(scalar assumed('brief'), 2, 'and assumed again five minutes before that');
cmp_ok(time - $begun, '>', 10, 'not earlier');
$faults->clear;
# clocks that differ: what has expired already is used all the same, once
canned(-3600);
set_ec2($node, 'brief', $moto, options => { role_arn => $moto->role('brief', @all) }, secrets => $base);
push @brief, launch($node, 'brief', 'ready');
$faults->clear;
finish(@brief);

# AWS says that it has expired: assumed again, once
for my $code (qw(ExpiredToken RequestExpired ExpiredTokenException))
{
	my $team = lc "expired$code";
	team($team);
	$faults->set(action => 'RunInstances', mode => 'error', status => 400, code => $code, message => 'too old', n => 1);
	my $expired = launch($node, $team, 'ready');
	is(scalar assumed($team), 2, "$code: assumed once more");
	is(scalar vms_of($moto, $expired), 1, 'and launched');
	is((events($node, $expired))[0]{error_class}, 'credentials', 'the event says why');
	$faults->set(action => 'TerminateInstances', mode => 'error', status => 400, code => $code, n => 1);
	one("SELECT agentvm.terminate('$expired')");
	await_state($node, $expired, 'terminated');
	is(scalar assumed($team), 4, 'at the end, too');
}
team('stale');
$faults->set(action => 'RunInstances', mode => 'error', status => 400, code => 'ExpiredToken', message => 'too old', n => 2);
my $stale = launch($node, 'stale', 'failed');
like(state_of($node, $stale), qr/^failed invalid_credentials ExpiredToken/, 'a second time it is over');
is(scalar assumed('stale'), 2, 'without another try');
team('many');
launch($node, 'many', 'ready');
$faults->set(action => 'RunInstances', mode => 'error', status => 400, code => 'ExpiredToken', message => 'too old', n => 10);
@sessions = split /\n/, one("SELECT agentvm.provision('many', profile => 'plain') FROM generate_series(1, 10)");
await($node, "SELECT count(*) FROM agentvm.sessions WHERE team_id = 'many' AND state = 'ready'", 11);
cmp_ok(scalar assumed('many'), '<=', 4, 'those who hear of it at the same time share the new one');
$faults->clear;
$faults->set(action => 'DescribeInstances', mode => 'error', status => 400, code => 'ExpiredToken', n => 1);
like(one("SELECT agentvm.inspect('$sessions[0]') ->> 'state'"), qr/running/, 'inspect() assumes again, too');
$faults->set(action => 'GetCallerIdentity', mode => 'error', status => 400, code => 'ExpiredToken', n => 2);
fails_with($node, "SELECT agentvm.check_provider('many')", 'AV001', qr/ExpiredToken/, 'a check once only');
$faults->clear;

# a VM that has ended loses its tags, so that a policy with conditions refuses to end it: that is no reason to go on for ever
my $gone = launch($node, 'many', 'ready');
$moto->terminate((vms_of($moto, $gone))[0]{id});
$faults->set(action => 'TerminateInstances', mode => 'error', status => 403, code => 'UnauthorizedOperation', match => (vms_of($moto, $gone))[0]{id});
my $alive = launch($node, 'many', 'ready');
one("SELECT agentvm.terminate('$gone')");
await_state($node, $gone, 'terminated');
$faults->set(action => 'TerminateInstances', mode => 'error', status => 403, code => 'UnauthorizedOperation', match => (vms_of($moto, $alive))[0]{id});
one("SELECT agentvm.terminate('$alive')");
await($node, "SELECT count(*) > 0 FROM agentvm.session_event WHERE session_id = '$alive' AND detail ->> 'error' ~ 'UnauthorizedOperation'");
is(column($node, $alive, 'state'), 'terminating', 'but one that is alive is not taken for ended');
$faults->clear;
finish($alive);

# ---- in the middle of it ----
team('crash');
$faults->set(action => 'AssumeRole', mode => 'slow', ms => 3000);
my $crash = provision($node, 'crash', "profile => 'plain'");
await($node, "SELECT lease IS NOT NULL FROM agentvm.session WHERE session_id = '$crash'");
one("SELECT pg_terminate_backend(pid) FROM agentvm.stat_dispatcher");
$faults->clear;
await_state($node, $crash, 'ready');
is(scalar vms_of($moto, $crash), 1, 'a dispatcher that ends while it waits leaves one VM');
team('ended');
$faults->set(action => 'AssumeRole', mode => 'slow', ms => 1500);
my $ended = provision($node, 'ended', "profile => 'plain'");
await($node, "SELECT lease IS NOT NULL FROM agentvm.session WHERE session_id = '$ended'");
one("SELECT agentvm.terminate('$ended')");
await_state($node, $ended, 'terminated');
is(scalar vms_of($moto, $ended), 0, 'a session that is ended while its launch waits launches nothing');
$faults->clear;

# ---- the role of now ----
team('moved');
my $moved = launch($node, 'moved', 'ready');
my $next = $moto->role('next', @all);
set_ec2($node, 'moved', $moto, options => { role_arn => $next }, secrets => $base);
finish($moved);
is((assumed('moved'))[-1]{args}{RoleArn}, $next, "a session's end takes the role that the team has then");

# ---- CALL dispatch() ----
$node->append_conf('postgresql.conf', "agentvm.dispatchers = 0\n");
$node->reload;
await($node, 'SELECT count(*) FROM agentvm.stat_dispatcher', 0);
team('called');
@sessions = map { provision($node, 'called', "profile => 'plain'") } 1 .. 5;
one("SET client_min_messages = error; CALL agentvm.dispatch()");
is(one("SELECT count(*) FROM agentvm.sessions WHERE team_id = 'called' AND vm_id IS NOT NULL"), 5, 'dispatch() in a backend');
is(scalar assumed('called'), 1, 'assumes it once');
$faults->set(action => 'AssumeRole', mode => 'slow', ms => 20_000);
set_ec2($node, 'called', $moto, options => { role_arn => $next }, secrets => $base);
my $waits = provision($node, 'called', "profile => 'plain'");
$client->run("SET statement_timeout = '1 s'");
$client->send("CALL agentvm.dispatch()");
$client->answer;
like($client->error, qr/57014/, 'and can be cancelled');
$faults->clear;
one("UPDATE agentvm.session SET lease = NULL, lease_pid = NULL, lease_start = NULL, next_check_at = now() WHERE session_id = '$waits'");
$client->run("SET statement_timeout = '60 s'; CALL agentvm.dispatch()");
ok(column($node, $waits, 'vm_id'), 'the same backend goes on afterwards');
$client->quit;
$node->append_conf('postgresql.conf', "agentvm.dispatchers = 1\n");
$node->reload;

# ---- the server's own keys as the base ----
one("SELECT agentvm.create_team('none', 'ec2'); SELECT agentvm.set_provider('none', 'ec2', " . json({ %{ $moto->options }, role_arn => $arn }) . ')');
fails_with($node, "SELECT agentvm.provision('none', profile => 'plain')", 'AV010', qr/no credentials/, "without keys of the team's own: refused");
fails_with($node, "SELECT agentvm.check_provider('none')", 'AV001', qr/MissingCredentials/, 'and so is a check');
$node->append_conf('postgresql.conf', "agentvm.environment_credentials = on\n");
$node->reload;
await($node, 'SHOW agentvm.environment_credentials', 'on');
my $none = launch($node, 'none', 'ready');
is(scalar vms_of($moto, $none), 1, 'where it may, the server assumes the role');
like(check('none')->{arn}, qr{assumed-role/agentvm/check}, 'as check_provider() shows');

# ---- secrets ----
like(one('SELECT detail FROM agentvm.session_event'), qr/AssumeRole/, 'events tell of it');
for my $secret ($keys->{SecretAccessKey}, $keys->{SessionToken}, $base->{secret_access_key})
{
	log_lacks($node, $secret, 'no secret in the log');
	unlike(one("SELECT string_agg(s::text, ' ') || (SELECT string_agg(e::text, ' ') FROM agentvm.session_event e) FROM agentvm.session s"), qr/\Q$secret\E/, 'nor in a table');
}
# what is known is in the dispatcher's memory, and nowhere; what has expired is wiped
SKIP:
{
	my $dispatcher = one('SELECT pid FROM agentvm.stat_dispatcher');
	skip 'this kernel does not show the memory of other processes', 3 unless defined AgentVM::Process::memory_of($dispatcher, 'p');
	my $known = sub { my ($secret) = @_; return index(AgentVM::Process::memory_of($dispatcher, 'p'), $secret) >= 0; };
	my $brief = canned(300 + 20);
	team('memory', arn => $moto->role('memory', @all));
	launch($node, 'memory', 'ready');
	ok($known->($brief->{SessionToken}), 'a login is in memory as long as it is good');
	# connections that are not used hold keys for some seconds, too
	my $end = time + 60;
	sleep 0.5 while ($known->($brief->{SessionToken}) || $known->($brief->{SecretAccessKey})) && time < $end;
	ok(!$known->($brief->{$_}), "and wiped afterwards: its $_") for qw(SecretAccessKey SessionToken);
	$faults->clear;
}

one("SELECT agentvm.terminate(session_id) FROM agentvm.sessions WHERE ended_at IS NULL");
hurry_until($node, 'SELECT count(*) FROM agentvm.sessions WHERE ended_at IS NULL', 0);
is(scalar $moto->running, 0, 'nothing runs');
done_testing();
