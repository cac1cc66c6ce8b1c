# A cluster with agentvm in it, and the things every TAP test does with one.
#
#	my $node = new_node('main');                      # running, extension created in database postgres
#	my $node = new_node('main', moto => $moto, conf => "agentvm.dispatchers = 4\n");
#	my $session = provision($node, 'acme');           # as the superuser; the uuid
#	await($node, "SELECT count(*) FROM agentvm.sessions WHERE state = 'ready'", 10);
#	psql_ok($node, $sql, 'what it shows');            # output, having checked that it worked
#	fails_with($node, $sql, 'AV003', qr/limit/, 'what it shows');
package AgentVM::Test;

use strict;
use warnings;
use Exporter 'import';
use File::Basename 'dirname';
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

our @EXPORT = qw(new_node create_extension await await_that await_state psql_ok fails_with as_role make_role provision state_of
  set_ec2 literal json log_text log_lacks threads unblocked);

# Options: conf (more lines), preload (libraries beside agentvm, or undef for none at all), databases, moto (or faults: any
# object with endpoint), extension => 0, start => 0, init => {...} for Cluster's init
sub new_node
{
	my ($name, %opt) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);
	my $preload = exists $opt{preload} ? $opt{preload} : [];
	my $keys = $node->basedir . '/keys';
	my $libraries = $preload ? join(',', 'agentvm', @$preload) : '';
	my $databases = $opt{databases} // 'postgres';
	my $images = join(', ', '/srv', '/nonexistent', $ENV{AGENTVM_IMAGES} // (), map { defined $ENV{$_} ? dirname($ENV{$_}) : () } qw(AGENTVM_MICRO AGENTVM_DEBIAN));
	my $endpoint = $opt{moto} ? $opt{moto}->endpoint : '';

	$node->init(%{ $opt{init} // {} });
	write_key_file($keys);
	$node->append_conf('postgresql.conf', <<"CONF");
shared_preload_libraries = '$libraries'
max_connections = 100
max_worker_processes = 24
agentvm.databases = '$databases'
agentvm.key_file = '$keys'
agentvm.image_directories = '$images'
agentvm.sweep_interval = '1s'
agentvm.inventory_interval = 0
agentvm.gateway_url = 'https://gateway.example'
agentvm.aws_endpoint_url = '$endpoint'
agentvm.allow_insecure_endpoints = on
# what real accounts grant would slow all tests down: those that are about it set this to 1
agentvm.api_rate = 0
CONF
	$node->append_conf('postgresql.conf', $opt{conf}) if $opt{conf};
	return $node if exists $opt{start} && !$opt{start};
	$node->start;
	create_extension($node) unless exists $opt{extension} && !$opt{extension};
	return $node;
}

# CREATE EXTENSION agentvm with what it requires
sub create_extension
{
	my ($node, $dbname) = @_;
	$node->safe_psql($dbname // 'postgres', 'CREATE EXTENSION agentvm CASCADE');
	return;
}

# A key file with one fresh key, k1, as agentvm.key_file wants it
sub write_key_file
{
	my ($path) = @_;
	open(my $random, '<:raw', '/dev/urandom') or die "could not open /dev/urandom: $!";
	read($random, my $key, 32) == 32 or die 'could not read /dev/urandom';
	require MIME::Base64;
	append_to_file($path, 'k1:' . MIME::Base64::encode_base64($key, '') . "\n");
	chmod(0600, $path) or die "could not chmod $path: $!";
	return;
}

# Look every 0.05 s whether a condition is true, for so many seconds at most; whether it has become so
sub poll
{
	my ($condition, $seconds) = @_;
	my $end = time + $seconds;
	my $true;

	sleep 0.05 until ($true = $condition->()) || time > $end;
	return $true;
}

# Wait until the query's answer is the expected one (default t), for 60 s. One more check, as is()
sub await
{
	my ($node, $query, $expected, %opt) = @_;
	my $dbname = $opt{dbname} // 'postgres';
	my ($answer, $error);
	local $ENV{PGOPTIONS} = '-c log_statement=none';    # keep the polling out of the log

	$expected //= 't';
	my $found = poll(
		sub {
			# psql does not read the query where a server that has just crashed refuses it
			eval { $node->psql($dbname, $query, stdout => \$answer, stderr => \$error); 1 } or ($answer, $error) = ('', $@);
			return ($answer // '') eq $expected;
		},
		$opt{timeout} // 60);
	diag($error) if $error && !$found;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is($answer, $expected, $opt{name} // "await: $query");
}

# The same with a condition in Perl, for 30 s
sub await_that
{
	my ($condition, $name, %opt) = @_;
	my $true = poll($condition, $opt{timeout} // 30);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($true, $name);
}

# Wait until a session is in a state (or one of them: 'terminated|failed')
sub await_state
{
	my ($node, $session, $state, %opt) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return await($node, "SELECT state ~ '^($state)\$' FROM agentvm.sessions WHERE session_id = '$session'", 't',
		name => "session $session becomes $state", %opt)
	  || diag('it is ' . state_of($node, $session));
}

# 'state end_reason detail' of a session, for is() and for diagnosis
sub state_of
{
	my ($node, $session) = @_;
	return $node->safe_psql('postgres',
		"SELECT concat_ws(' ', state, end_reason, detail) FROM agentvm.sessions WHERE session_id = '$session'");
}

# Run SQL that must work; its output
sub psql_ok
{
	my ($node, $sql, $name, %opt) = @_;
	my ($code, $out, $error) = $node->psql($opt{dbname} // 'postgres', $sql, on_error_stop => 1);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	ok($code == 0, $name // "works: $sql") or diag($error);
	return $out;
}

# Run SQL that must fail with this SQLSTATE, and if given with a message, detail or hint like this
sub fails_with
{
	my ($node, $sql, $sqlstate, $like, $name, %opt) = @_;
	my ($code, $out, $error) = $node->psql($opt{dbname} // 'postgres', "\\set VERBOSITY verbose\n$sql", on_error_stop => 1);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$name //= "$sqlstate: $sql";
	my $passed = $code != 0 && $error =~ /(?:ERROR|FATAL):  \Q$sqlstate\E:/ && (!$like || $error =~ $like);
	ok($passed, $name) or diag("exit code $code, expected $sqlstate, got: $error");
	return $error;
}

# The SQL, run under a role
sub as_role
{
	my ($role, $sql) = @_;
	return "SET ROLE $role;\n$sql";
}

# A role without login that may use agentvm, as a member of the teams given: make_role($node, 'alice', teams => ['acme']).
# grants: other roles than agentvm_user; login => 1 for one that connects by itself
sub make_role
{
	my ($node, $role, %opt) = @_;
	my $grants = join(', ', @{ $opt{grants} // ['agentvm_user'] });
	my $sql = "CREATE ROLE $role" . ($opt{login} ? ' LOGIN' : '') . ";\n";
	$sql .= "GRANT $grants TO $role;\n" if $grants;
	$sql .= "SELECT agentvm.add_member('$_', '$role');\n" for @{ $opt{teams} // [] };
	$node->safe_psql($opt{dbname} // 'postgres', $sql);
	return $role;
}

# provision() with named arguments as SQL text: provision($node, 'acme', "options => '{\"launch_delay\": \"1s\"}'")
sub provision
{
	my ($node, $team, @arguments) = @_;
	return $node->safe_psql('postgres', 'SELECT agentvm.provision(' . join(', ', literal($team), @arguments) . ')');
}

# Give a team the test cloud as its EC2 account: options override those of the cloud. As the README advises, with the
# logging of statements off, since the server logs a caller's own statement
sub set_ec2
{
	my ($node, $team, $moto, %opt) = @_;
	my %options = (%{ $moto->options }, %{ $opt{options} // {} });
	$node->safe_psql('postgres', 'SET log_statement = none; SELECT agentvm.set_provider('
		  . join(', ', literal($team), "'ec2'", json(\%options), json($opt{secrets} // $moto->secrets)) . ')');
	return;
}

# SQL literals of a string and of a Perl structure
sub literal
{
	my ($value) = @_;
	return 'NULL' unless defined $value;
	$value =~ s/'/''/g;
	return "'$value'";
}
sub json { return literal(JSON::PP->new->canonical->allow_nonref->encode($_[0])) . '::jsonb'; }

# The threads of a process beside its main one, and which signals that mean something to PostgreSQL such a thread might get
sub threads { my ($pid) = @_; return grep { !m{/$pid$} } glob("/proc/$pid/task/*"); }

sub unblocked
{
	my ($thread) = @_;
	my ($mask) = slurp_file("$thread/status") =~ /^SigBlk:\s*([0-9a-f]+)$/m;
	my %signals = (HUP => 1, INT => 2, QUIT => 3, USR1 => 10, USR2 => 12, PIPE => 13, ALRM => 14, TERM => 15, CHLD => 17, URG => 23);
	return grep { !(hex($mask) >> ($signals{$_} - 1) & 1) } sort keys %signals;
}

# The server log, and that a text is nowhere in it
sub log_text { return slurp_file($_[0]->logfile); }

sub log_lacks
{
	my ($node, $text, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok(index(log_text($node), $text) < 0, $name // 'not in the server log');
}

1;
