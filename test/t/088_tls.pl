# Whom the server believes that it is the cloud: the authority, the name and the dates of a certificate are checked, by workers and backends
use strict;
use warnings;
use AgentVM::Certificates;
use AgentVM::EC2;
use AgentVM::Faults;
use AgentVM::Process;
use AgentVM::Test;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $dir = certificate_directory();
authority($_) for qw(trusted other);
certificate('good', 'trusted', 'IP:127.0.0.1');
certificate('named', 'trusted', 'DNS:elsewhere.test');
certificate('expired', 'trusted', 'IP:127.0.0.1', -1);
certificate('stranger', 'other', 'IP:127.0.0.1');

# Servers that answer everything with 418, and say what they have heard
my %port = map { $_ => PostgreSQL::Test::Cluster::get_free_port() } qw(good named expired stranger);
my $cloud = AgentVM::Process->new('cloud', "$ENV{AGENTVM_VENV}/bin/python", '-I', '-u', '-c', <<'PYTHON', $dir, %port);
import http.server, ssl, sys, threading

directory, *ports = sys.argv[1:]
for name, port in zip(ports[::2], ports[1::2]):
    class Handler(http.server.BaseHTTPRequestHandler):
        which = name

        def do_POST(self):
            print("heard by", self.which)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(418)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{directory}/{name}.pem", f"{directory}/{name}.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever).start()
print("all listen")
PYTHON
$cloud->start->says(qr/all listen/, 'servers with certificates');

my $node = new_node('main', start => 0, conf => "agentvm.allow_insecure_endpoints = off\n");
start_trusting($node, 'trusted') or plan skip_all => 'no user namespaces, or no file of authorities';
create_extension($node);
$node->safe_psql('postgres', "SELECT agentvm.create_profile('plain', 'ec2', runtime => false)");
ec2_team($node, 'acme', AgentVM::Faults->new);

sub endpoint
{
	my ($url) = @_;
	$node->append_conf('postgresql.conf', "agentvm.aws_endpoint_url = '$url'\n");
	$node->reload;
	return await($node, 'SHOW agentvm.aws_endpoint_url', $url);
}
endpoint("https://127.0.0.1:$port{good}");
my $session = launch($node, 'acme', 'failed');
like(state_of($node, $session), qr/HTTP 418/, 'a cloud with a good certificate is believed');
fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV004', qr/HTTP 418/, 'by a backend, too');
is(scalar(() = $cloud->output =~ /heard by good/g), 2, 'it has heard both');
my %why = (named => 'a certificate of another name', expired => 'one that has expired', stranger => 'one of an authority that is not trusted');
foreach my $which (sort keys %why)
{
	endpoint("https://127.0.0.1:$port{$which}");
	$session = launch($node, 'acme');
	await($node, "SELECT detail ~ '^NoReply: ' AND detail ~* 'ssl|tls|certificate' FROM agentvm.sessions WHERE session_id = '$session'", 't', name => "$why{$which} is refused by the dispatcher") || diag(state_of($node, $session));
	fails_with($node, "SELECT agentvm.check_provider('acme')", 'AV004', qr/ssl|tls|certificate/i, 'and by a backend');
	note(state_of($node, $session));
}
is(scalar(() = $cloud->output =~ /heard by (?!good)/g), 0, 'none of these has heard a word');
done_testing();
