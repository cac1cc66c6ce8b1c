# Whether another team's session, team, profile, provider or key exists shows in no answer: byte by byte the same as for what does not
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Runtime;
use AgentVM::Test;
use Test::More;

my $node = new_node('main');
my $nothing = '01234567-89ab-7def-8123-456789abcdef';

# ---- the other team: sessions in every condition; the spy's own; a team that is no more ----
$node->safe_psql('postgres', q{SELECT agentvm.create_team(t) FROM unnest('{mine,globex,former,changing}'::text[]) t;
	SELECT agentvm.create_profile('shape', 'noop', team_id => 'globex'); CREATE ROLE other});
make_role($node, 'spy', teams => ['mine']);
make_role($node, 'victim', teams => ['globex']);
my $runtime = q{options => '{"runtime": true}'};
my %session = (live => provision($node, 'globex', $runtime, "idempotency_key => 'k-used'"), locked => provision($node, 'globex'), stuck => provision($node, 'globex', q{options => '{"terminate_delay": "1h"}'}),
	map({ $_ => provision($node, $_ eq 'former' ? $_ : 'globex', $runtime) } qw(ended former gone)));
for my $ended (qw(ended former gone stuck))
{
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$session{$ended}'");
	bootstrap($node, $session{$ended}) if $ended eq 'ended';
	$node->safe_psql('postgres', "SELECT agentvm.terminate('$session{$ended}')");
	await_state($node, $session{$ended}, $ended eq 'stuck' ? 'terminating' : 'terminated');
}
await($node, "SELECT running FROM agentvm.session WHERE session_id = '$session{live}'");
bootstrap($node, $session{live});
$node->safe_psql('postgres', "SELECT agentvm.drop_team('former'); DELETE FROM agentvm.session WHERE session_id = '$session{gone}'");

# what the spy may not even begin to wait for: a row locked, one not yet committed, a team being made, one being changed, a key in use
my @held = map { AgentVM::Client->new($node) } 1 .. 2;
$_->run('BEGIN') for @held;
$held[0]->run("SELECT FROM agentvm.session WHERE session_id = '$session{locked}' FOR UPDATE");
$session{uncommitted} = $held[0]->run(q{SELECT agentvm.provision('globex', idempotency_key => 'k-now')});
$held[1]->run(q{SELECT agentvm.create_team('coming'); SELECT agentvm.alter_team('changing', limits => '{"max_sessions": 100}')});

my $least = 'debug5';

# All that a statement answers to the spy, with names replaced: rows, notices down to the least, error with all its fields
sub answer
{
	my ($sql, %replace) = @_;
	my ($code, $out, $error) = $node->psql('postgres', "\\set VERBOSITY verbose\n\\set SHOW_CONTEXT always\nSET statement_timeout = '60s';\nSET ROLE spy;\nSET client_min_messages = $least;\n$sql");
	my $answer = "$code\n$out\n$error";
	$answer =~ s/\Q$_\E/$replace{$_}/g for keys %replace;
	$answer =~ s/[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}/NEW/g;
	$answer =~ s/^psql:<stdin>:\d+: //mg;
	$answer =~ s/xid\/subid\/cid: [1-9]\d*/xid: some/g;
	return $answer =~ s/^LINE 1: .*\n *\^\n//mgr;
}

# The same answer for each of several names as for the first, which does not exist; NAME in the statement
sub same
{
	my ($sql, $like, @names) = @_;
	my ($none, @answers) = map { answer($sql =~ s/NAME/$_/gr, $_ => 'NAME') } @names;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	like($none, $like, "$sql: " . substr($names[0], 0, 8));
	is($answers[ $_ - 1 ], $none, "$sql: $names[$_] is no different") for 1 .. $#names;
	return;
}

# ---- sessions ----
my @sessions = ($nothing, map { $session{$_} } sort keys %session);
my $no_session = qr/ERROR:  AV005: session NAME does not exist\n.*HINT/;
same("SELECT agentvm.$_", $no_session, @sessions)
  for q{terminate('NAME')}, q{terminate('NAME', 'why')}, q{wait('NAME')}, q{wait('NAME', 'terminated', '1 s')}, q{status('NAME')}, q{inspect('NAME')}, q{extend('NAME', '1 s')}, q{extend('NAME', '300 days')};
same("SELECT agentvm.$_", $no_session, @sessions)
  for q{exec('NAME', 'true')}, q{exec('NAME', 'true', env => '{"A": "b"}')}, q{exec_bytes('NAME', 'true', timeout => '1 s')}, q{exec_start('NAME', 'true', stdin => 'x')}, map({ "$_('NAME', 'cccccccc-0000-4000-8000-000000000000')" } qw(exec_output exec_wait exec_kill)),
  q{upload('NAME', 'f', 'x')}, q{download('NAME', 'f')}, q{download('NAME', 'f', 0, 1)}, q{upload_tar('NAME', '/f', 'x')}, q{download_tar('NAME', '/f')};
same("SELECT session_id, sqlstate, error FROM agentvm.exec_many('{NAME}', 'true')", qr/^0\nNAME\|AV005\|session NAME does not exist\n(?!.*ERROR)/s, @sessions);
same("SELECT * FROM agentvm.command WHERE session_id = 'NAME'", qr/^0\n\n(?!.*ERROR)/s, @sessions);
same("CALL agentvm.await('NAME', 'terminated', '1 s')", $no_session, @sessions);
same("SELECT * FROM agentvm.$_ WHERE session_id = 'NAME'", qr/^0\n\n(?!.*ERROR)/s, @sessions) for qw(sessions session_event);
same("SELECT * FROM agentvm.$_ WHERE session_id = 'NAME' FOR KEY SHARE", qr/42501/, @sessions) for qw(sessions session_event session session_heartbeat);

# ---- teams, and what may come with them ----
my @teams = qw(nobody globex former coming changing);
same("SELECT agentvm.provision('NAME'$_)", qr/ERROR:  42704: team "NAME" does not exist\n.*DETAIL.*\n.*HINT/, @teams)
  for '', q{, profile => 'shape'}, q{, profile => 'none'}, q{, provider => 'noop'}, q{, provider => 'ec2'}, q{, provider => 'none'}, q{, idempotency_key => 'k-used'}, q{, idempotency_key => 'k-used', agent_id => 'x'},
  q{, idempotency_key => 'k-now'}, q{, options => '{"no": 1}'}, q{, env => '{"A": "b"}'}, q{, max_lifetime => '300 days'};
same("CALL agentvm.run('NAME', 'true'$_)", qr/ERROR:  42704: team "NAME" does not exist\n.*DETAIL.*\n.*HINT/, @teams) for '', q{, profile => 'shape'}, q{, timeout => '1 s'};
same("SELECT agentvm.$_('NAME')", qr/ERROR:  42704: team "NAME" does not exist\n.*DETAIL.*\n.*HINT/, @teams) for qw(channel verify_audit);
same("SELECT * FROM agentvm.$_ WHERE team_id = 'NAME'", qr/^0\n\n(?!.*ERROR)/s, @teams) for qw(sessions fleet team team_member provider_config profile session_event event_seal);
same("SELECT agentvm.provision('mine', profile => 'NAME')", qr/42704: profile "NAME" does not exist for team "mine"/, 'none', 'shape');
my $unset = answer(q{SELECT agentvm.provision('mine', provider => 'ec2')});
like($unset, qr/AV010/, 'a provider that nobody has set up');
$node->safe_psql('postgres', q{SET log_statement = none; SELECT agentvm.set_provider('globex', 'ec2', '{"region": "eu-west-1", "image_id": "ami-12345678"}', '{"access_key_id": "AKIAEXAMPLE", "secret_access_key": "x"}')});
is(answer(q{SELECT agentvm.provision('mine', provider => 'ec2')}), $unset, 'is no different once another team has');
same("SELECT agentvm.provision('mine', idempotency_key => 'NAME')", qr/^0\nNEW\n(?!.*ERROR)/s, 'k-none', 'k-used', 'k-now');
same("SELECT agentvm.provision('mine', idempotency_key => 'NAME')", qr/^0\nNEW\n(?!.*ERROR)/s, 'k-none', 'k-used', 'k-now');
is($node->safe_psql('postgres', q{SELECT count(*) FROM agentvm.session WHERE team_id = 'mine'}), 3, 'a key is of its own team, and was not waited for');

# ---- what is for administrators, also where EXECUTE has been given away ----
my @administration = (q{create_team('NAME')}, q{alter_team('NAME')}, q{drop_team('NAME')}, q{add_member('NAME', 'other')}, q{remove_member('NAME', 'other')}, q{set_provider('NAME', 'noop', '{}')},
	q{check_provider('NAME')}, q{drop_provider('NAME', 'ec2')}, q{create_profile('shape', 'noop', team_id => 'NAME')}, q{drop_profile('shape', 'NAME')});
my @members = (q{add_member('mine', 'NAME')}, q{remove_member('mine', 'NAME')});
for my $given (0, 1)
{
	$node->safe_psql('postgres', 'GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA agentvm TO spy') if $given;
	same("SELECT agentvm.$_", qr/ERROR:  42501: permission denied/, @teams) for @administration;
	same("SELECT agentvm.$_", qr/ERROR:  42501: permission denied/, 'none', 'victim', 'other') for @members;
	same("SELECT agentvm.drop_profile('NAME', 'globex')", qr/ERROR:  42501: permission denied/, 'none', 'shape');
}
$node->safe_psql('postgres', 'REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA agentvm FROM spy; GRANT agentvm_gateway TO spy');

# ---- tokens, as a gateway sees them: what does not open anything is unknown, whatever it is ----
my %hash = (unknown => AgentVM::Runtime::bytea('unknown'), map { ("bootstrap $_" => AgentVM::Runtime::token_hash($node, $session{$_}, 1), "session $_" => AgentVM::Runtime::session_hash($session{$_})) } qw(live locked gone));
$least = 'log';    # a row of a session is locked in between
my @unknown = map { $hash{$_} } 'unknown', 'session gone', 'bootstrap gone', 'bootstrap live', 'session locked';
same('SELECT agentvm.authenticate(NAME)', qr/^0\n\n(?!.*ERROR)/s, @unknown);
same('SELECT agentvm.heartbeat(NAME)', qr/^0\n\n(?!.*ERROR)/s, @unknown);
same("SELECT agentvm.bootstrap(NAME, sha256('x'), 'boot-of-another')", qr/^0\n\n(?!.*ERROR)/s, @unknown, $hash{'session live'});
same("SELECT agentvm.heartbeat_batch('{NAME}', ARRAY[now()])", qr/^0\nNAME\n(?!.*ERROR)/s, $nothing, @session{qw(ended former gone stuck)});

$_->quit for @held;
done_testing();
