# Files in and out of VMs, as SQL has them
use strict;
use warnings;
use AgentVM::Client;
use AgentVM::Control;
use AgentVM::Test;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);

my $node = new_node('main', conf => "agentvm.max_file_size = '4MB'\n");
$node->safe_psql('postgres', "SELECT agentvm.create_team('acme')");
my $control = AgentVM::Control->new($node);
my $session = $control->session('acme');
my $dir = $control->dir;
$node->safe_psql('postgres', q{CREATE TABLE blob (kind text, b bytea); ALTER TABLE blob ALTER b SET STORAGE EXTERNAL;
	INSERT INTO blob SELECT 'apart', decode(string_agg(md5(i::text), ''), 'hex') FROM generate_series(1, 200000) i;
	ALTER TABLE blob ALTER b SET STORAGE EXTENDED; INSERT INTO blob SELECT 'compressed', convert_to(repeat('0123456789abcdef', 100000), 'UTF8');
	INSERT INTO blob VALUES ('short', '\x00ff0a'), ('empty', ''), ('a chunk', decode(repeat('ab', 262144), 'hex')), ('a chunk and a byte', decode(repeat('ab', 1048577), 'hex'))});

# ---- there and back ----
my $mark = $control->mark;
is($node->safe_psql('postgres', "SELECT kind, agentvm.upload('$session', 'there/' || kind, b) = length(b), agentvm.download('$session', 'there/' || kind) = b FROM blob ORDER BY kind"),
	join("\n", map { "$_|t|t" } sort('apart', 'compressed', 'short', 'empty', 'a chunk', 'a chunk and a byte')), 'files of all sizes, stored in all ways');
my @puts = grep { $_->{path} eq 'there/apart' } $control->calls($session, 'put', $mark);
cmp_ok(scalar(@puts), '>=', 4, 'in chunks');
is($puts[0]{offset}, 0, 'from the beginning');
my $end = 0;
$end = $_->{offset} == $end ? $end + $_->{length} : 'a gap' for sort { $a->{offset} <=> $b->{offset} } @puts;
is($end, 3_200_000, 'none missing, and none twice');
is(scalar(grep { $_->{last} } @puts), 1, 'the last of which is called so');
ok($puts[-1]{last} && $puts[0]{audit} && !$puts[1]{audit} && $puts[0]{owned}, 'and the first tells the log');
my $me = $node->safe_psql('postgres', 'SELECT current_user');
is_deeply($puts[0]{audit}, { kind => 'upload', role => $me, path => 'there/apart', size => 3_200_000 }, 'of whom and what');
for my $kind (qw(short empty apart))
{
	my @gets = grep { $_->{path} eq "there/$kind" } $control->calls($session, 'get', $mark);
	ok($gets[0]{audit}{kind} eq 'download' && !grep({ $_->{audit} } @gets[ 1 .. $#gets ]) && $gets[-1]{last} && grep({ $_->{last} } @gets) == 1, "$kind: so does a download");
}
is(sprintf('%o', (stat "$dir/there/short")[2] & 07777), '644', 'mode 0644');
is($node->safe_psql('postgres', "SELECT agentvm.upload('$session', '$dir/there/short', 'x', '4750')"), 1, 'a file that is there is replaced');
is(sprintf('%o', (stat "$dir/there/short")[2] & 07777) . slurp_file("$dir/there/short"), '4750x', 'with another mode');

# ---- pages ----
is($node->safe_psql('postgres', "SELECT agentvm.download('$session', 'there/apart', $_->[0], $_->[1]) = substr(b, $_->[0] + 1, $_->[1]) FROM blob WHERE kind = 'apart'"), 't', "$_->[1] bytes from $_->[0]")
  for [ 0, 10 ], [ 0, 0 ], [ 100, 262_144 ], [ 1, 262_145 ], [ 3_199_990, 100 ], [ 3_000_000, 1_000_000 ];
is($node->safe_psql('postgres', "SELECT length(agentvm.download('$session', 'there/apart', 4000000, 10)), length(agentvm.download('$session', 'there/apart', 3200000, 1000000))"), '0|0', 'nothing beyond the end');
$mark = $control->mark;
$node->safe_psql('postgres', "SELECT agentvm.download('$session', 'there/apart', 7, 10)");
is(scalar($control->calls($session, 'get', $mark)), 1, 'a page is one call');

# ---- limits ----
fails_with($node, "SELECT agentvm.upload('$session', 'large', decode(repeat('00', 4194305), 'hex'))", 'AV012', qr/"content" has 4194305 bytes, but at most 4194304/, 'too large a file');
is(scalar(grep { $_->{path} eq 'large' } $control->calls($session, 'put')), 0, 'nothing of it was sent');
truncate_file("$dir/huge", 5_000_000_000);
fails_with($node, "SELECT agentvm.download('$session', 'huge')", 'AV012', qr/"huge" has 5000000000 bytes, but at most 4194304.*HINT.*offset, length/s, 'one in the VM');
my @gets = grep { $_->{path} eq 'huge' } $control->calls($session, 'get');
ok(@gets == 2 && $gets[1]{last} && $gets[1]{length} == 0, 'whose transfer is ended for the log, too');
is($node->safe_psql('postgres', "SELECT length(agentvm.download('$session', 'huge', 4999999000, 2000))"), 1000, 'is read in parts');
fails_with($node, "SELECT agentvm.download('$session', 'huge', 0, 4194305)", 'AV012', qr/length is 4194305/, 'which are not too large, either');
sub truncate_file { my ($file, $size) = @_; open(my $out, '>', $file) or die $!; truncate($out, $size) or die $!; return; }

# ---- errors of the VM ----
fails_with($node, "SELECT agentvm.download('$session', 'nowhere')", '58P01', qr/could not download "nowhere": open nowhere: No such file/, 'no such file');
fails_with($node, "SELECT agentvm.download('$session', 'there')", '42809', qr/Is a directory/, 'a directory');
fails_with($node, "SELECT agentvm.upload('$session', 'there', 'x')", '42809', qr/could not upload "there": /, 'a directory in the way');

# ---- a file that changes while it is read ----
for my $times (2, 100)
{
	$control->faults(map({ { op => 'get', do => { change => { version => "v$_" } } } } 1 .. $times));
	my $sql = "SELECT agentvm.download('$session', 'there/apart') = b FROM blob WHERE kind = 'apart'";
	if ($times == 2) { is($node->safe_psql('postgres', $sql), 't', 'is begun anew'); next; }
	fails_with($node, $sql, '55000', qr/changes while it is read.*HINT.*copy/s, 'but not without end');
}
$control->faults;

# ---- several chunks under way ----
sub upload_again
{
	my ($name, @faults) = @_;
	$control->faults(@faults);
	my $from = $control->mark;
	is($node->safe_psql('postgres', "SELECT agentvm.upload('$session', 'again', b), agentvm.download('$session', 'again') = b FROM blob WHERE kind = 'apart'"), '3200000|t', $name);
	$control->faults;
	return map { $_->{offset} } $control->calls($session, 'put', $from);
}
my $pass = { op => 'put', do => { change => {} } }; # the first one, which is alone
my @offsets = upload_again('an upload of which a chunk is refused', $pass, { op => 'put', do => 503 });
ok(scalar(grep { $offsets[$_] < $offsets[ $_ - 1 ] } 1 .. $#offsets) > 0, 'others pass it');
is($offsets[-1], (sort { $b <=> $a } @offsets)[0], 'but not the last');
@offsets = upload_again('an upload to a runtime that takes chunks in their order', map { { op => 'put', do => $_ } } { change => { any_order => undef } }, 503, ({ change => { any_order => undef } }) x 9);
is(scalar(grep { $offsets[$_] < $offsets[ $_ - 1 ] } 1 .. $#offsets), 0, 'none passes one that is refused');
is(scalar(grep { $offsets[$_] == $offsets[ $_ - 1 ] } 1 .. $#offsets), 1, 'which is sent again');
$control->faults($pass, { op => 'put', do => { change => { written => 5 } } });
fails_with($node, "SELECT agentvm.upload('$session', 'again', b) FROM blob WHERE kind = 'apart'", '58000', qr/makes no sense/, 'more of one written than there is');
$control->faults;

# ---- cancel ----
my $client = AgentVM::Client->new($node);
$control->faults({ op => 'put', do => 'hang' });
$mark = $control->mark;
$client->send("SELECT agentvm.upload('$session', 'never', b) FROM blob WHERE kind = 'apart'");
sleep 0.02 until $control->calls($session, 'put', $mark);
my $since = time;
$node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $client->pid . ')');
sleep 0.02 while time < $since + 20 && !grep { $_->{event} eq 'close' } $control->logged($mark);
cmp_ok(time - $since, '<', 1, 'a transfer that is cancelled: its connection is closed');
$client->answer;
like($client->error, qr/57014/, 'at once');
ok(!-e "$dir/never", 'no file');
# where the memory of a function outlives its error
for my $call ("agentvm.upload('$session', 'never', 'x')", "agentvm.exec_start('$session', 'true')")
{
	$control->faults(map { { op => $_, do => 'hang' } } qw(put start));
	$mark = $control->mark;
	$client->send("DO \$\$ DECLARE t text; BEGIN t := $call; EXCEPTION WHEN query_canceled THEN PERFORM pg_sleep(3); END \$\$");
	sleep 0.02 until $control->calls($session, undef, $mark);
	$since = time;
	$node->safe_psql('postgres', 'SELECT pg_cancel_backend(' . $client->pid . ')');
	sleep 0.02 while time < $since + 20 && !grep { $_->{event} eq 'close' } $control->logged($mark);
	cmp_ok(time - $since, '<', 1, "the same where the error is caught: $call");
	$client->answer;
}
$control->faults;

# ---- directories ----
system("mkdir $dir/few && cp '$dir/there/apart' '$dir/there/short' $dir/few") == 0 or die;
my $tar = $node->safe_psql('postgres', "SELECT length(agentvm.download_tar('$session', '$dir/few'))");
cmp_ok($tar, '>', 3_200_000, 'a directory as an archive');
is(join(',', glob '/tmp/.agentvm-*.tar'), '', 'which does not stay in the VM');
is($node->safe_psql('postgres', "SELECT agentvm.upload_tar('$session', '$dir/here/and', agentvm.download_tar('$session', '$dir/few'))"), $tar, 'and back');
is(slurp_file("$dir/here/and/apart"), slurp_file("$dir/few/apart"), 'it is the same');
is(join(',', glob '/tmp/.agentvm-*.tar'), '', 'nothing stays');
my ($start) = grep { $_->{tar}{extract} } $control->calls($session, 'start');
like($start->{tar}{file}, qr{^/tmp/\.agentvm-[0-9a-f-]{36}\.tar$}, 'where it was meanwhile');
is_deeply([ $start->{tar}{extract}, $start->{audit}{kind}, $start->{audit}{tar}, $start->{owned} ], [ "$dir/here/and", 'exec', 'extract', JSON::PP::true ], 'what unpacks it is a command, and hangs on us');
my $evil = `cd $dir && mkdir -p evil && echo x > evil/x && tar --transform='s,^,../,' -P -cf - evil/x | od -An -v -tx1 | tr -d ' \n'`;
fails_with($node, "SELECT agentvm.upload_tar('$session', '$dir/safe', '\\x$evil')", '22023', qr/could not unpack into "$dir\/safe".*DETAIL.*leads out/s, 'an archive that leads out');
fails_with($node, "SELECT agentvm.upload_tar('$session', '$dir/safe', 'no archive')", '22023', qr/DETAIL.*no archive.*\[31m/s, 'one that is none');
fails_with($node, "SELECT agentvm.download_tar('$session', '$dir/nowhere')", '58P01', qr/could not pack "$dir\/nowhere".*DETAIL.*no directory/s, 'no directory');
fails_with($node, "SELECT agentvm.upload_tar('$session', 'relative', '')", '22023', qr/must begin with/, 'a directory is named from / on');
$control->faults({ op => 'start', do => { change => { exit_code => $_->[0] } } }), fails_with($node, "SELECT agentvm.upload_tar('$session', '$dir/safe', 'x')", $_->[1], undef, "exit code $_->[0]")
  for [ 1, '58030' ], [ 2, '58P01' ], [ 3, '22023' ], [ 4, '22023' ], [ 5, '53100' ], [ 137, '58030' ];
$control->faults;
system("head -c 5000000 /dev/zero > $dir/few/zero") == 0 or die;
fails_with($node, "SELECT agentvm.download_tar('$session', '$dir/few')", 'AV012', qr/"$dir\/few" has \d+ bytes.*DETAIL.*size of its archive/s, 'too large an archive');
is(join(',', glob '/tmp/.agentvm-*.tar'), '', 'does not stay');

done_testing();
