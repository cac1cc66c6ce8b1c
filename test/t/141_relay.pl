# Real VMs (of the micro_image) whose only way out is the cable to the gateway
use strict;
use warnings;
use AgentVM::Gateway;
use AgentVM::Guest;
use AgentVM::Runtime;
use AgentVM::Test;
use HTTP::Tiny;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_node('main', conf => "agentvm.heartbeat_interval = 1\nagentvm.heartbeat_timeout = 600\nagentvm.bootstrap_timeout = 600\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $dir = PostgreSQL::Test::Utils::tempdir_short();
my $gateway = AgentVM::Gateway->new($node, options => [ '--vm-sockets', $dir ]);

sub launched
{
	my (@arguments) = @_;
	my $id = provision($node, 'acme', 'options => \'{"runtime": true}\'', @arguments);
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$id'", 't', name => 'a session with a runtime');
	return $id;
}
sub beats_again
{
	my ($id, $name) = @_;
	my $last = $node->safe_psql('postgres', "SELECT coalesce(last_heartbeat_at, '-infinity') FROM agentvm.sessions WHERE session_id = '$id'");
	return await($node, "SELECT last_heartbeat_at > '$last' FROM agentvm.sessions WHERE session_id = '$id'", 't', name => $name);
}
sub metric
{
	my ($name) = @_;
	return HTTP::Tiny->new->get($gateway->url . '/metrics')->{content} =~ /^agentvm_gateway_$name (\S+)$/m ? $1 : undef;
}
sub metric_becomes
{
	my ($name, $value, $what) = @_;
	my $end = time + AgentVM::Process::timeout();
	sleep 0.1 while (metric($name) // '') ne $value && time < $end;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(metric($name), $value, $what);
}

# ---- three VMs; what the first one has of a network ----
my $look = <<'SH';
echo "interfaces:" $(ls /sys/class/net)
echo "routes:" $(cat /proc/net/route | tail -n +2 | wc -l) $(grep -v ' lo$' /proc/net/ipv6_route 2>/dev/null | wc -l)
for to in 127.0.0.1:%d 10.0.2.2:%d 8.8.8.8:53; do
	nc -w 2 ${to%%:*} ${to##*:} </dev/null && echo "reaches $to" || echo "does not reach $to"
done
SH
my $size = 'until [ -s /run/agentvm/env.json ]; do sleep 1; done; echo "env.json:" $(wc -c </run/agentvm/env.json)';
my @jumps = (undef, '2040-01-01', '1999-01-01');    # of the wall clock, once there is a session
my @ids = (launched('env => ' . json({ BIG => 'x' x 60000 })), launched(), launched());
my @guests = map {
	AgentVM::Guest->new($dir, $ids[$_], ($_ == 0 ? sprintf($look, $gateway->port, $gateway->port) . "($size) &\n" : "(until [ -s /run/agentvm/env.json ]; do sleep 1; done; date -s $jumps[$_]) &\n") .
		  AgentVM::Guest::settings(GATEWAY_URL => 'http://gateway.test', BOOTSTRAP_TOKEN => bootstrap_token($node, $ids[$_]), SESSION_ID => $ids[$_], STATE_DIR => '/run/agentvm'))->start
} 0 .. 2;
await_state($node, $_, 'ready', name => 'a VM without a network reports for duty') for @ids;
$guests[0]->says(qr/^interfaces: lo\r?$/m, 'it has no interface but lo');
$guests[0]->says(qr/^routes: 0 0\r?$/m, 'and no route');
$guests[0]->says(qr/does not reach $_/, "it does not reach $_") for '127.0.0.1', '10.0.2.2', '8.8.8.8';
$guests[0]->says(qr/first heartbeat acknowledged.*by=channel/, 'its channel is open, and carries the heartbeats');
$guests[0]->says(qr/^env.json: 60\d{3}\r?$/m, 'an answer of 60 kB has come');
$guests[1]->says(qr/ 00:00:00 UTC 2040/, "one's wall clock jumps forth");
$guests[2]->says(qr/ 00:00:00 UTC 1999/, "another's back");
beats_again($_, 'it beats') for @ids, @ids;
is(metric('vms'), 3, 'metrics: three VMs');
cmp_ok(metric('vm_streams'), '>=', 3, 'and their streams');
is(metric('vm_resets_total'), 0, 'and no trouble');

# ---- the gateway dies; another one takes its place ----
$gateway->stop('KILL');
$guests[0]->says(qr/no way to the gateway.*nobody/, 'the VM sees that nobody is there');
$gateway->start;
beats_again($_, 'the same VM goes on with another gateway') for @ids;
$guests[0]->says(qr/gateway is connected.*gateway is connected.*channel is open/s, 'with a new channel');

# the other is there before the first one dies: it waits for its turn
my $second = AgentVM::Gateway->new($node, options => [ '--vm-sockets', $dir ]);
beats_again($_, 'with two gateways the first one serves') for @ids;
$gateway->stop('KILL');
beats_again($_, 'and the second one when the first one has gone') for @ids;
$gateway = $second;
metric_becomes('vms', 3, 'it has all VMs');

# ---- stopped in its tracks ----
$gateway->signal('STOP');
$guests[0]->says(qr/channel is open.*channel is open.*channel is open.*heartbeat was not taken.*heartbeat was not taken/s, 'a gateway that stands still is noticed, again and again');
$gateway->signal('CONT');
beats_again($_, 'and goes on where it was') for @ids;

# ---- a VM that floods the gateway as fast as it can ----
my $flood = <<'SH';
for port in /sys/class/virtio-ports/*; do [ "$(cat $port/name)" = org.agentvm.gateway ] && break; done
echo "floods ${port##*/}"
while :; do cat /dev/urandom >/dev/${port##*/}; done
SH
my ($before) = slurp_file('/proc/' . $gateway->pid . '/status') =~ /VmRSS:\s+(\d+) kB/;
my $hostile = AgentVM::Guest->new($dir, 'hostile', $flood)->start;
# what the gateway has read so far
sub has_read { return slurp_file('/proc/' . $gateway->pid . '/io') =~ /^rchar: (\d+)/m ? $1 : die; }
my $from = has_read();
$hostile->says(qr/floods vport/, 'a VM that floods the gateway');
my $end = time + AgentVM::Process::timeout();
sleep 0.1 until has_read() - $from > 12 * 1024 * 1024 || time > $end;
cmp_ok(has_read() - $from, '>', 12 * 1024 * 1024, 'for longer than it may without being slowed down');
beats_again($_, 'others are served') for @ids, @ids;
my ($after) = slurp_file('/proc/' . $gateway->pid . '/status') =~ /VmRSS:\s+(\d+) kB/;
cmp_ok($after - $before, '<', 2048, 'memory is bounded: ' . ($after - $before) . ' kB more');
$hostile->stop('KILL');

# ---- TLS ----
my $tls = PostgreSQL::Test::Utils::tempdir('tls');
for my $name ('good', 'other')
{
	run_command([ 'openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-subj', "/CN=$name", '-addext', 'subjectAltName=DNS:gateway.test', '-days', 10, '-keyout', "$tls/$name.key", '-out', "$tls/$name.pem" ]);
}
my $tls_dir = PostgreSQL::Test::Utils::tempdir_short();
my $tls_gateway = AgentVM::Gateway->new($node, tls => [ "$tls/good.pem", "$tls/good.key" ], options => [ '--vm-sockets', $tls_dir ]);
sub over_tls
{
	my ($id, $authority) = @_;
	return AgentVM::Guest->new($tls_dir, $id, "mkdir -p /etc/agentvm\ncat >/etc/agentvm/ca.pem <<'END'\n" . slurp_file("$tls/$authority.pem") . "END\n" .
		  AgentVM::Guest::settings(GATEWAY_URL => 'https://gateway.test:8443', CA_FILE => '/etc/agentvm/ca.pem', BOOTSTRAP_TOKEN => bootstrap_token($node, $id), SESSION_ID => $id))->start;
}
my $secure = launched();
my $secure_guest = over_tls($secure, 'good');
await_state($node, $secure, 'ready', name => 'over TLS a VM reports for duty');
$secure_guest->says(qr/first heartbeat acknowledged.*by=channel/, 'and has its channel');
beats_again($secure, 'it beats');
my $betrayed = launched();
my $betrayed_guest = over_tls($betrayed, 'other');
$betrayed_guest->says(qr/certificate is refused/, 'a gateway of another authority is refused');
unlike($tls_gateway->output, qr/msg=token token=@{[ substr(bootstrap_token($node, $betrayed), 0, 4) ]}/, 'before any token is sent');
$_->stop('KILL') for $secure_guest, $betrayed_guest;
$tls_gateway->stop;

# ---- the end ----
psql_ok($node, "SELECT agentvm.terminate('$ids[0]')");
is($guests[0]->code(AgentVM::Process::timeout()), 0, 'the VM of a session that has ended powers off') || diag($guests[0]->output);
metric_becomes('vms', 2, 'and is not counted any more');
beats_again($_, 'the others go on') for @ids[ 1, 2 ];

done_testing();
