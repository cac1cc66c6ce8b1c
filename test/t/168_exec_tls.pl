# Backends and a control listener that is reached by TCP: the server believes a certificate of its authority, of that name and in date,
# and sends nobody else anything
use strict;
use warnings;
use AgentVM::Certificates;
use AgentVM::Client;
use AgentVM::Gateway;
use AgentVM::Test;
use AgentVM::VM;
use File::Copy qw(copy);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my %authority = map { $_ => authority($_) } qw(ours theirs);
my $good = certificate('good', 'ours', 'IP:127.0.0.1');
my $expired = certificate('expired', 'ours', 'IP:127.0.0.1', -1);
my $stranger = certificate('stranger', 'theirs', 'IP:127.0.0.1');
# the gateway's own, and what the server trusts, which change
my $trusted = certificate_directory() . '/trusted.pem';
sub trust { my ($name) = @_; copy($authority{$name}, $trusted) or die "could not copy: $!"; return; }
trust('ours');
my $pair = [ map { certificate_directory() . "/gateway.$_" } qw(pem key) ];
sub take { my ($from) = @_; copy($from->[$_], $pair->[$_]) or die "could not copy: $!" for 0, 1; return; }
take($good);

my $port = PostgreSQL::Test::Cluster::get_free_port();
my $node = new_node('main', start => 0, conf => "agentvm.heartbeat_interval = 1\nagentvm.allow_insecure_endpoints = off\nagentvm.gateway_url = 'https://gateway.test'\nagentvm.gateway_ca_file = '$trusted'\n");
# to the server, theirs is a public one
my $is_public = start_trusting($node, 'theirs') or $node->start;
create_extension($node);
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme'); INSERT INTO agentvm.gateway (gateway_id, control_address) VALUES ('gw1', 'https://127.0.0.1:$port')");
my $gateway = AgentVM::Gateway->new($node, tls => $pair, options => [ '--name', 'gw1', '--control', "127.0.0.1:$port" ]);
my $session = provision($node, 'acme', q{options => '{"runtime": true}'});
my $vm = AgentVM::VM->boot($node, $gateway, $session, CA_FILE => $authority{ours});
await_state($node, $session, 'ready');
my $ran = $vm->dir . '/work/ran';

sub set { my ($name, $value) = @_; $node->safe_psql('postgres', $_) for "ALTER SYSTEM SET $name = '$value'", 'SELECT pg_reload_conf()'; return await($node, "SHOW $name", $value, name => "$name = $value"); }
sub address { my ($address) = @_; return $node->safe_psql('postgres', "UPDATE agentvm.gateway SET control_address = '$address'"); }
# a new certificate for the gateway, without a restart
sub renew
{
	my ($from) = @_;
	my $before = () = $gateway->output =~ /certificate read/g;
	take($from);
	$gateway->signal('HUP');
	my $end = time + AgentVM::Process::timeout();
	sleep(0.02) until (() = $gateway->output =~ /certificate read/g) > $before || time > $end;
	return;
}
sub refused
{
	my ($name, $why) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	fails_with($node, "SELECT agentvm.exec('$session', 'touch ran', timeout => '1 s')", 'AV009', qr/AV009: gateway "gw1" cannot be reached\nDETAIL: +No answer to a call: $why/, $name);
	return ok(!-e $ran, "$name: and nothing has run");
}

# ---- the right one ----
my $client = AgentVM::Client->new($node);
is($client->run("SELECT exit_code, stdout FROM agentvm.exec('$session', 'cat; echo by TLS', stdin => 'in ')"), "0|in by TLS\n", 'a private authority: a command');
is($client->run("SELECT agentvm.upload('$session', 'big', convert_to(repeat('0123456789abcdef', 100000), 'UTF8')), sha256(agentvm.download('$session', 'big')) = sha256(convert_to(repeat('0123456789abcdef', 100000), 'UTF8'))"), '1600000|t', 'files, in many pieces');
$client->send("SELECT agentvm.exec('$session', 'exec sleep 87654')");
my $end = time + AgentVM::Process::timeout();
sleep(0.02) until AgentVM::Process::pids(cmdline => qr/^sleep\0+87654/) || time > $end;
ok($client->busy, 'a command is under way');
my $since = time();
$node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $client->pid . ')');
sleep(0.02) while AgentVM::Process::pids(cmdline => qr/^sleep\0+87654/) && time < $end;
cmp_ok(time() - $since, '<', 1, 'and gone within a second of its cancel');
$client->answer;

# ---- wrong ones ----
address("https://localhost:$port");
refused('another name', qr/SSL: .*'localhost'/);
address("https://127.0.0.1:$port");
renew($expired);
refused('one that has expired', qr/SSL certificate problem: certificate has expired/);
renew($stranger);
refused('one of another authority, public or not', qr/SSL certificate problem: unable to get local issuer certificate/);
SKIP:
{
	skip 'no authority of ours can stand for the public ones here', 2 unless $is_public;
	set('agentvm.gateway_ca_file', '');
	is($node->safe_psql('postgres', "SELECT stdout FROM agentvm.exec('$session', 'echo public')"), "public\n", 'with no authority set it would have been good enough');
}
set('agentvm.gateway_ca_file', $authority{theirs});
is($node->safe_psql('postgres', "SELECT stdout FROM agentvm.exec('$session', 'echo theirs')"), "theirs\n", 'until that one is trusted');
renew($good);
refused('nor is the old authority any more', qr/SSL certificate problem: unable to get local issuer certificate/);
# the connection that the backend has kept was opened when the authority was another one
$client->send("SELECT agentvm.exec('$session', 'touch ran', timeout => '1 s')");
$client->answer;
like($client->error, qr/AV009: gateway "gw1" cannot be reached/, 'not even by a connection that is there already');
ok(!-e $ran, 'nothing has run by that one, either');
set('agentvm.gateway_ca_file', '');
refused('one of our authority, where only public ones are trusted', qr/SSL certificate problem: unable to get local issuer certificate/);
set('agentvm.gateway_ca_file', certificate_directory() . '/nowhere.pem');
refused('a file of authorities that is not there', qr/error setting certificate file/);

# ---- without TLS ----
fails_with($node, "UPDATE agentvm.gateway SET control_address = 'http://127.0.0.1:$port'; SELECT agentvm.exec('$session', 'touch ran')", 'AV010', qr/neither unix:.path nor https/, 'without TLS nothing is sent');
address("https://127.0.0.1:$port");

# ---- and the right one again ----
set('agentvm.gateway_ca_file', $trusted);
is($client->run("SELECT stdout FROM agentvm.exec('$session', 'echo again')"), "again\n", 'the same backend, the same gateway');
trust('theirs');
renew($stranger);
$gateway->stop('KILL');
$vm->stop;
$vm->write_settings(CA_FILE => $authority{theirs});
$gateway->start;
$vm->start->says(qr/channel is open/, 'the VM is back');
is($client->run("SELECT stdout FROM agentvm.exec('$session', 'echo new')"), "new\n", 'also when all are new, and the file of the authority has the same name');
await($node, "SELECT count(*) FROM agentvm.command", 0, name => 'nothing is under way any more');
is($node->safe_psql('postgres', q{SELECT count(*) FROM agentvm.session_event WHERE kind = 'exec_started'}), $is_public ? 6 : 5, 'the log has only those that got through');

done_testing();
