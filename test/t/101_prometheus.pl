# A real Prometheus scrapes the gateway, and its own checker has nothing to say about what it gets
use strict;
use warnings;
use AgentVM::Gateway;
use AgentVM::Process;
use AgentVM::Runtime;
use AgentVM::Test;
use Digest::SHA qw(sha256_hex);
use HTTP::Tiny;
use JSON::PP qw(decode_json);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_node('main');
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $gateway = AgentVM::Gateway->new($node);
my $http = HTTP::Tiny->new(timeout => AgentVM::Process::timeout());

my $dir = PostgreSQL::Test::Utils::tempdir('prometheus');
my $address = '127.0.0.1:' . PostgreSQL::Test::Cluster::get_free_port();
my $target = '127.0.0.1:' . $gateway->port;
append_to_file("$dir/config.yml", "global: {scrape_interval: 500ms, scrape_timeout: 500ms}\nscrape_configs: [{job_name: gateway, static_configs: [{targets: ['$target']}]}]\n");
my $prometheus = AgentVM::Process->new('prometheus', 'prometheus', "--config.file=$dir/config.yml", "--storage.tsdb.path=$dir/data", "--web.listen-address=$address");
$prometheus->start;

# A check: the value of an expression becomes that
sub becomes
{
	my ($expression, $expected, $name) = @_;
	my ($end, $value) = time + AgentVM::Process::timeout();
	while (($value // '') ne $expected && time < $end)
	{
		my $answer = $http->get("http://$address/api/v1/query?query=" . $expression =~ s/([^\w.])/sprintf('%%%02X', ord $1)/ger);
		$value = $answer->{success} ? decode_json($answer->{content})->{data}{result}[0]{value}[1] : "$answer->{status} $answer->{content}";
		sleep 0.1;
	}
	return is($value, $expected, $name) || diag($prometheus->output);
}

becomes('up{job="gateway"}', 1, 'it is scraped');
becomes('agentvm_gateway_database_up', 1, 'and has its database');
becomes('agentvm_gateway_heartbeats_total', 0, 'nobody has beaten yet');

my $id = provision($node, 'acme', 'options => \'{"runtime": true}\'');
await($node, "SELECT running FROM agentvm.session WHERE session_id = '$id'", 't', name => 'a session');
my $answer = $http->post($gateway->url . '/v1/bootstrap', {
	headers => { authorization => 'Bearer ' . bootstrap_token($node, $id) },
	content => '{"boot_id": "b", "session_token_sha256": "' . sha256_hex('0123456789abcdef') . '"}' });
is($answer->{status}, 200, 'bootstrap');
for (1 .. 5)
{
	$answer = $http->post($gateway->url . '/v1/heartbeat', { headers => { authorization => 'Bearer 0123456789abcdef' }, content => '{}' });
	is($answer->{status}, 200, 'a heartbeat');
}
is($http->post($gateway->url . '/v1/heartbeat', { headers => { authorization => 'Bearer none' }, content => '{}' })->{status}, 401, 'one without a token') for 1 .. 3;
becomes('agentvm_gateway_bootstraps_total', 1, 'the bootstrap is counted');
becomes('agentvm_gateway_heartbeats_total', 5, 'the heartbeats are counted');
becomes('agentvm_gateway_http_responses_total{status="401"}', 3, 'so are refusals');

my $text = $http->get($gateway->url . '/metrics')->{content};
my $passed = IPC::Run::run([qw(promtool check metrics)], '<', \$text, '>', \my $out, '2>', \my $error);
ok($passed, 'promtool check metrics passes');
is($out . $error, '', 'without a complaint');

is($gateway->stop, 0, 'the gateway ends');
becomes('up{job="gateway"}', 0, 'and is missed');
is($prometheus->stop, 0, 'and so does Prometheus');
done_testing();
