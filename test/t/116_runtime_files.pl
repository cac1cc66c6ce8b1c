# Files of a VM: what the runtime makes of the calls "put" and "get" (see test/clients/transfer.c), and directories as tar archives
use strict;
use warnings;
use AgentVM::VM;
use Cwd ();
use File::Find;
use File::Path qw(remove_tree);
use Fcntl qw(:mode);
use IPC::Open2;
use JSON::PP;
use POSIX ();
use PostgreSQL::Test::Utils;
use Socket;
use Test::More;
use Time::HiRes ();

my $root = $ENV{TESTDIR};
my $binary = Cwd::abs_path($AgentVM::VM::binary);
my $base = PostgreSQL::Test::Utils::tempdir('files');
umask 022;

# ---- the program that calls ----
my $program = "$base/transfer";
my $sources = join(' ', map { "$root/$_" } qw(test/clients/transfer.c src/runtime/transfer.c src/runtime/files.c src/common/log.c));
is(system("cc -std=gnu11 -D_GNU_SOURCE -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -o $program $sources -ljansson"), 0, 'built with AddressSanitizer and UBSan');
my $work = "$base/work";
mkdir $work;

# A runtime that has just begun; and a call of it
my @callers;
sub runtime
{
	my (@command) = @_;
	my $pid = open2(my $out, my $in, @command, $program, $work);
	push @callers, my $caller = { pid => $pid, in => $in, out => $out };
	return $caller;
}
my $runtime = runtime();
my $json = JSON::PP->new->canonical->allow_nonref;
sub call
{
	my ($op, %header) = @_;
	my $caller = delete $header{runtime} // $runtime;
	$header{hex} = unpack('H*', delete $header{bytes}) if exists $header{bytes};
	print { $caller->{in} } $json->encode({ op => $op, %header }) . "\n";
	$caller->{in}->flush;
	my $line = readline($caller->{out}) // die 'the program that calls has ended';
	my $answer = $json->decode($line);
	$answer->{bytes} = pack('H*', delete $answer->{hex}) if exists $answer->{hex};
	return $answer;
}
my $ids = 0;
sub id { return sprintf('01890000-0000-7000-8000-%012x', ++$ids); }
# A part of a file, or all of it; and what should come of it
sub put
{
	my ($path, $bytes, %more) = @_;
	return call('put', command => $more{command} // id(), path => $path, mode => '0644', size => length($bytes), offset => 0, bytes => $bytes, %more);
}
sub written { my ($bytes) = @_; return { written => $bytes, any_order => JSON::PP::true }; }
sub get { my ($path, %more) = @_; return call('get', command => id(), path => $path, offset => 0, length => 262144, %more); }
sub refused
{
	my ($answer, $code, $message, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return subtest $name => sub { is($answer->{error}, $code, 'code'); like($answer->{message} // '', $message, 'message'); };
}
sub content { my ($path) = @_; return -e $path ? slurp_file($path) : undef; }
sub mode { my ($path) = @_; return sprintf('%04o', S_IMODE((lstat($path))[2])); }
sub names { my ($dir) = @_; my @names; find({ wanted => sub { push @names, substr($_, length($dir) + 1) if $_ ne $dir }, no_chdir => 1 }, $dir) if -e $dir; return join(' ', sort @names); }

# ---- put ----
is_deeply(put("$work/one", 'first'), written(5), 'a file in one part');
is(content("$work/one") . ' ' . mode("$work/one"), 'first 0644', 'its content and mode');
is_deeply(put('in/a/new place/two', 'x', mode => '0750'), written(1), 'a path that is not absolute, in a directory that is not there');
is(content("$work/in/a/new place/two"), 'x', 'is in the work directory');
is(join(' ', map { mode("$work/$_") } 'in', 'in/a', 'in/a/new place', 'in/a/new place/two'), '0755 0755 0755 0750', 'modes of what has been made');
is_deeply(put('empty', ''), written(0), 'a file of no bytes');
is(-s "$work/empty", 0, 'is there');
for my $mode ('7', '644', '0600', '4755', '02710')
{
	put('moded', '', mode => $mode);
	is(mode("$work/moded"), sprintf('%04o', oct($mode)), "mode $mode, whatever the umask");
}
unlink "$work/moded";

my $command = id();
my @parts = ('a' x 262144, "\0\xff\n" x 50000, 'end');
my $all = join('', @parts);
my $part = sub { my ($i, %more) = @_; return put('one', $parts[$i], command => $command, size => length($all), offset => length(join('', @parts[ 0 .. $i - 1 ])), mode => '0600', %more); };
is_deeply($part->(0), written(262144), 'the first part of three');
is(content("$work/one"), 'first', 'the file is as it was');
is(mode("$work/.agentvm-$command"), '0600', 'what there is of the new one is beside it, and for nobody to read');
is_deeply($part->(0), written(262144), 'the first part again');
is_deeply($part->(1), written(412144), 'the second');
is_deeply($part->($_), written($_ ? 412144 : 262144), "part $_, once more") for 0, 1;
is(content("$work/one"), 'first', 'still the old file');
is_deeply($part->(2), written(length($all)), 'the last part');
ok(content("$work/one") eq $all, 'now it is the new file');
is_deeply($part->(2), written(length($all)), 'the last part again');
put('one', 'another');
is_deeply($part->($_), written([ 262144, 412144, length($all) ]->[$_]), "part $_ once more, much later") for 0 .. 2;
is(content("$work/one"), 'another', 'does not bring the file back');
is(names($work), 'empty in in/a in/a/new place in/a/new place/two one', 'and nothing else is left');

$command = id();
$part->(0);
$runtime = runtime();
is_deeply($part->(1), written(412144), 'a runtime that has been restarted goes on');
is_deeply($part->(2), written(length($all)), 'to the end');
ok(content("$work/one") eq $all, 'with all that was there');

# order, and what does not fit
$command = id();
my @shuffled = map { $_ x 1000 } 'a' .. 'e';
my $shuffle = sub { my ($i) = @_; return put('shuffled', $shuffled[$i], command => $command, size => 5000, offset => 1000 * $i); };
is_deeply($shuffle->($_), written(1000 * ($_ + 1)), "part $_ of five that come in another order") for 0, 3, 1, 3, 2;
ok(!-e "$work/shuffled", 'nothing is there without the last');
is_deeply($shuffle->(4), written(5000), 'which comes last');
is(content("$work/shuffled"), join('', @shuffled), 'all are in their places');
unlink "$work/shuffled";
$command = id();
refused($part->(1), 'failed', qr/^write one: its beginning is not here any more$/, 'no part before it');
$part->(0);
refused($part->(2), 'invalid', qr/before byte 412144 is missing/, 'a part is missing');
ok(!-e "$work/.agentvm-$command", 'of a transfer that fails nothing is left');
for my $case ([ size => -1 ], [ size => 2 ], [ offset => -1 ], [ offset => 1 ], [ offset => '0' ], [ size => undef ], [ mode => '888' ], [ mode => '' ], [ mode => '10000' ], [ mode => undef ], [ mode => 644 ],
	[ command => 'x' ], [ command => '../../../../../../../../../../etc/x1' ], [ command => undef ], [ path => '' ], [ path => undef ], [ path => "a\0b" ], [ path => 'x' x 4096 ], [ path => 'x/' x 2047 ], [ bytes => 'x' x 1048577, size => 1048577 ])
{
	my (%change) = @$case;
	refused(put('three', 'abc', %change), 'invalid', qr/./, 'refused: ' . join(' ', map { ref ? 'x' : substr($_ // 'null', 0, 20) } map { s/\0/NUL/r } map { $_ // 'null' } %change));
}
refused(put('n' x 256, 'x'), 'failed', qr/File name too long/, 'a name that is too long');
ok(!-e "$work/three", 'and nothing has been made');

# what is not to be replaced
mkdir "$work/directory";
symlink('nowhere/../one', "$work/through");
symlink('one', "$work/link");
symlink('link', "$work/links");
symlink('made', "$work/dangling");
symlink('loop', "$work/loop");
symlink("$work/directory", "$work/to_directory");
POSIX::mkfifo("$work/pipe", 0600);
refused(put($_, 'x'), 'wrong_file', qr/^\Q$_\E is a directory$/, "$_ is a directory") for 'directory', 'directory/', '.', 'new/..', '/', 'to_directory';
refused(put('pipe', 'x'), 'wrong_file', qr/^pipe is no regular file$/, 'a pipe');
refused(put('one/x', 'x'), 'no_file', qr/^\w.*one\/x: Not a directory$/, 'a file on the way');
refused(put('loop', 'x'), 'failed', qr/^write loop: Too many levels/, 'links that lead in a circle');
is_deeply(put('links', 'linked'), written(6), 'a link to a link');
is(content("$work/one") . readlink("$work/link") . readlink("$work/links"), 'linkedonelink', 'the file that it leads to is replaced');
is_deeply(put('dangling', 'new', mode => '0640'), written(3), 'a link to what is not there');
is(content("$work/made") . readlink("$work/dangling"), 'newmade', 'it is made there');
is_deeply(put('to_directory/inner', 'x'), written(1), 'a link on the way');
is(content("$work/directory/inner"), 'x', 'is followed');
$command = id();
symlink("$work/one", "$work/.agentvm-$command");
refused(put('victim', 'x', command => $command), 'failed', qr/Too many levels/, 'a link where the parts would go');
is(content("$work/one"), 'linked', 'is not followed');
$command = id();
link("$work/one", "$work/.agentvm-$command");
refused(put('victim', 'x', command => $command), 'denied', qr/./, 'nor is a file of another name written to');
is(content("$work/one"), 'linked', 'which is as it was');
$command = id();
put('directory/late', 'x', command => $command, size => 2);
mkdir "$work/directory/late";
refused(put('directory/late', 'x', command => $command, size => 2, offset => 1), 'wrong_file', qr/is a directory/, 'a directory that came meanwhile');
ok(-d "$work/directory/late", 'is not replaced');
SKIP:
{
	skip 'root may do anything, and would lose what is asked for here if a rule were broken', 4 if $> == 0;
	refused(put('/dev/null', 'x'), 'wrong_file', qr/is no regular file$/, 'a device');
	chmod 0555, "$work/directory";
	refused(put('directory/x', 'x'), 'denied', qr/^write directory\/x: Permission denied$/, 'no right to write there');
	chmod 0755, "$work/directory";
	refused(put('/proc/new/file', 'x'), 'no_file', qr/proc\/new\/file/, 'no directory can be made there');
	refused(get('/etc/shadow'), 'denied', qr/^open \/etc\/shadow: Permission denied$/, 'no right to read');
}
is(join(' ', grep { /^\.agentvm/ } split(/ /, names($work))), '', 'no part of a file is left');

# a reader sees the one or the other, and so do two writers of one path
my $reader = fork // die 'no process can be made';
if (!$reader)
{
	my $reads = 0;
	while (!-e "$base/enough" || $reads < 100)
	{
		my $seen = content("$work/both") // next;
		POSIX::_exit(1) unless $seen eq 'a' x 400000 || $seen eq 'b' x 300000;
		$reads++;
	}
	POSIX::_exit(0);
}
for (1 .. 15)
{
	my ($a, $b) = (id(), id());
	put('both', 'a' x 200000, command => $a, size => 400000);
	put('both', 'b' x 200000, command => $b, size => 300000);
	put('both', 'a' x 200000, command => $a, size => 400000, offset => 200000);
	put('both', 'b' x 100000, command => $b, size => 300000, offset => 200000);
}
append_to_file("$base/enough", 'x');
waitpid($reader, 0);
is($?, 0, 'no reader has seen a mixture, or a part');
ok(content("$work/both") eq 'b' x 300000, 'it is as the last one wrote it');

# idle ones, and too many
my @old = map { id() } 1 .. 255;
put("many/$_", 'x', command => $_, size => 2) for @old;
call('pass', ms => 300_000);
my $young = id();
put('many/young', 'x', command => $young, size => 2);
refused(put('many/more', 'x', size => 2), 'busy', qr/too many files/, 'the 257th file under way is refused');
is_deeply(put('many/young', 'x', command => $young, size => 2), written(1), 'those that are under way go on');
call('pass', ms => 290_000);
is(scalar(split(/ /, names("$work/many"))), 256, 'until just before 10 minutes all are kept');
call('pass', ms => 80_000);
is(names("$work/many"), ".agentvm-$young", 'those of which nothing came for 10 minutes are gone');
is_deeply(put('many/young', 'y', command => $young, size => 2, offset => 1), written(2), 'the other one ends well');
is_deeply(put('many/more', 'x'), written(1), 'and there is place again');

# a full disk
SKIP:
{
	my $small = "$base/small";
	mkdir $small;
	my @alone = ($> == 0 ? ('unshare', '-m') : ('unshare', '-rm'));
	skip 'no file system can be mounted', 8 if system(@alone, 'mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', $small) != 0;
	my $inside = runtime(@alone, 'sh', '-c', "mount -t tmpfs -o size=1m none $small && exec \"\$@\"", 'sh');
	my @in = (runtime => $inside);
	refused(put("$small/big", 'x', size => 2_000_000, @in), 'no_space', qr/^write \S+big: No space left on device$/, 'a file that does not fit is refused with its first part');
	my ($a, $b) = (id(), id());
	my $chunk = 'x' x 262144;
	for my $i (0 .. 1)
	{
		put("$small/$_->[0]", $chunk, command => $_->[1], size => 700_000, offset => $i * 262144, @in) for [ 'a', $a ], [ 'b', $b ];
	}
	my $last = 'x' x (700_000 - 2 * 262144);
	refused(put("$small/a", $last, command => $a, size => 700_000, offset => 2 * 262144, @in), 'no_space', qr/No space left/, 'the disk is full on the way');
	is_deeply(put("$small/b", $last, command => $b, size => 700_000, offset => 2 * 262144, @in), written(700_000), 'what it took is free again, so that another file goes on to its end');
	is(get("$small/a", @in)->{error}, 'no_file', 'and there is nothing of the first');
	is(get("$small/.agentvm-$a", @in)->{error}, 'no_file', 'not even its parts');
	my $c = id();
	refused(put("$small/c", $last, command => $c, size => 400_000, @in), 'no_space', qr/No space/, 'nor does another fit');
	put("$small/b", '', @in);
	put("$small/c", $last, command => $c, size => 900000, @in);
	is_deeply(put("$small/c", $last, command => $c, size => 900000, @in), written(length($last)), 'the first part again needs no more than it has');
}

# ---- get ----
my $text = join('', map { "line $_\n" } 1 .. 100_000);
append_to_file("$work/text", $text);
my ($got, @versions) = ('');
while (1)
{
	my $answer = get('text', offset => length($got));
	is($answer->{size}, length($text), 'the size is told with each part');
	push @versions, $answer->{version};
	$got .= $answer->{bytes};
	last if length($got) >= $answer->{size};
}
ok($got eq $text, 'a file in parts');
is(scalar(keys %{ { map { $_ => 1 } @versions } }), 1, 'all of one version');
is_deeply(get('text', offset => 5, length => 10), { size => length($text), version => $versions[0], bytes => substr($text, 5, 10) }, 'a part of it');
is_deeply(get('text', offset => length($text) - 3, length => 10), { size => length($text), version => $versions[0], bytes => substr($text, -3) }, 'fewer bytes at its end');
is_deeply(get('text', offset => length($text) + $_), { size => length($text), version => $versions[0], bytes => '' }, 'none behind it') for 0, 5;
is_deeply(get('text', length => 0), { size => length($text), version => $versions[0], bytes => '' }, 'none where none are asked for');
is_deeply([ @{ get('empty') }{qw(size bytes)} ], [ 0, '' ], 'an empty file');
is(get('links')->{bytes}, 'linked', 'links are followed');
append_to_file("$work/text", 'x');
isnt(get('text', length => 1)->{version}, $versions[0], 'a file that has changed has another version');
put('again', 'x');
utime(1_000_000_000, 1_000_000_000, "$work/again");
my $version = get('again', length => 1)->{version};
put('again', 'y');
utime(1_000_000_000, 1_000_000_000, "$work/again");
isnt(get('again', length => 1)->{version}, $version, 'so has another file of the same name, size and time');

my $status = get('/proc/self/status');
like($status->{bytes}, qr/^Name:\s+transfer\n.*\nPid:/s, 'a file that the kernel makes up is read though it has no size');
is($status->{size}, length($status->{bytes}), 'and its size is what was there');
my $start = get('/proc/self/status', length => 10);
is(length($start->{bytes}) . ' ' . $start->{size}, '10 11', 'while more is there, it is more');
is(get('/proc/self/status', offset => length($status->{bytes}))->{bytes}, '', 'and nothing behind');
my $page = get('/sys/kernel/mm/transparent_hugepage/enabled');
SKIP:
{
	skip 'no such file here', 1 if $page->{error};
	is($page->{size}, length($page->{bytes}), 'a file that is told to have a page has the size of what is in it');
}

refused(get('nothing'), 'no_file', qr/^open nothing: No such file or directory$/, 'no such file');
refused(get('one/x'), 'no_file', qr/Not a directory/, 'nor a directory');
refused(get('directory'), 'wrong_file', qr/^directory is a directory$/, 'a directory');
refused(get($_), 'wrong_file', qr/^\Q$_\E is no regular file$/, "not waited for: $_") for 'pipe', '/dev/zero';
for my $case ([ offset => -1 ], [ offset => undef ], [ offset => 9223372036854775807 ], [ length => -1 ], [ length => 1048577 ], [ length => '1' ], [ command => undef ], [ path => undef ], [ path => '' ], [ path => "one\0" ])
{
	refused(get('one', @$case), 'invalid', qr/./, 'refused: ' . join(' ', map { defined ? s/\0/NUL/r : 'null' } @$case));
}

$command = id();
put('removed', 'abcdef');
is(get('removed', command => $command, length => 3)->{bytes}, 'abc', 'a file that is not needed much longer');
ok(-e "$work/removed", 'is there until that is said');
is(get('removed', command => $command, offset => 3, length => 3, remove => JSON::PP::true)->{bytes}, 'def', 'the last part of it');
ok(!-e "$work/removed", 'and it is gone');
is(get('removed', command => $command, offset => 3, length => 3, remove => JSON::PP::true)->{bytes}, 'def', 'the same call has the same answer');
is(get('removed')->{error}, 'no_file', 'to others it is gone');
call('pass', ms => 700_000);
is(get('removed', command => $command, offset => 3, length => 3, remove => JSON::PP::true)->{error}, 'no_file', 'and after a while to that one, too');
is(get('directory', remove => JSON::PP::true)->{error}, 'wrong_file', 'what cannot be read');
ok(-d "$work/directory", 'is not removed');
my @kept = map { my $id = id(); put("kept$_", $_); get("kept$_", command => $id, remove => JSON::PP::true); $id } 1 .. 20;
my ($files) = map { scalar(my @found = glob("/proc/$_->{pid}/fd/*")) } $callers[1];
cmp_ok($files, '<', 30, 'and no more than a few are kept open');
is(get('kept20', command => $kept[-1])->{bytes}, '20', 'of which the last is one');
is(get('kept1', command => $kept[0])->{error}, 'no_file', 'but not the first');

for my $caller (@callers)
{
	close $caller->{in};
	waitpid($caller->{pid}, 0);
	is($?, 0, 'no error in memory');
}

# ---- directories as archives ----
# What there is below a directory: names, types, modes, times, contents, and which are the same file
sub described
{
	my ($dir, %opt) = @_;
	my (%seen, @lines);
	my @names;
	find({ wanted => sub { push @names, '.' . substr($_, length($dir)) if $_ ne $dir }, no_chdir => 1 }, $dir) if -d $dir;
	foreach my $name (sort @names)
	{
		my @status = lstat("$dir/$name");
		my $is_link = S_ISLNK($status[2]);
		my $first = !S_ISDIR($status[2]) && $status[3] > 1 ? ($seen{ $status[1] } //= $name) : $name;
		my $what = $is_link ? readlink("$dir/$name") : S_ISREG($status[2]) ? $status[7] . ' ' . unpack('%32C*', slurp_file("$dir/$name")) : S_ISDIR($status[2]) ? 'directory' : 'other';
		push @lines, join(' ', $name, $is_link ? '-' : sprintf('%04o %s', S_IMODE($status[2]) & ($opt{mask} // 07777), $opt{no_times} ? '-' : $status[9]), $what, $first eq $name ? () : "= $first");
	}
	return join("\n", @lines);
}
sub same_tree
{
	my ($got, $expected, $name, %opt) = @_;
	s/^(\.[^\0]*? \d{4}) \d+ directory$/$1 - directory/mg for $opt{no_directory_times} ? ($got, $expected) : ();
	my %got = map { $_ => 1 } split(/\n(?=\.)/, $got);
	my %expected = map { $_ => 1 } split(/\n(?=\.)/, $expected);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(join("\n", grep { !$expected{$_} } sort keys %got), join("\n", grep { !$got{$_} } sort keys %expected), $name);
}
# The program, and what it says; its exit code
my $said;
sub tar
{
	my (@arguments) = @_;
	my $pid = open(my $out, '-|') // die 'no process can be made';
	if (!$pid) { open(STDERR, '>&', \*STDOUT); exec($binary, @arguments) or POSIX::_exit(126); }
	local $/;
	$said = readline($out) // '';
	close $out;
	return $? >> 8;
}
my $made = 0;
sub archive { my ($bytes) = @_; my $file = "$base/archive" . ++$made; append_to_file($file, $bytes); return $file; }

# a tree of all that there may be
my $tree = "$base/tree";
my $long = join('/', ('x' x 90) . 'y', 'z' x 200, 'w' x 255);
for my $dir ('', qw(empty deep deep/er), (map { my @all = split('/', $long); join('/', @all[ 0 .. $_ ]) } 0, 1), "\xe6\x97\xa5\xe6\x9c\xac")
{
	mkdir "$tree/$dir";
}
my %content = (nothing => '', small => "a\nb", large => join('', map { pack('N', $_ * 2654435761 % 2**32) } 1 .. 1_250_000), 'deep/er/file' => 'deep', $long => 'long', 'x' x 99 => 99, 'x' x 100 => 100, 'x' x 101 => 101,
	"\xe6\x97\xa5\xe6\x9c\xac/\xc3\xbcber" => 'utf-8', "no utf-8 \xff\xfe" => 'bytes', "a\nnewline" => 'newline', '-dash' => 'dash', ' space ' => 'space', "deep/..." => 'dots', '*' => 'star');
while (my ($name, $bytes) = each %content) { append_to_file("$tree/$name", $bytes); }
symlink($$_[0], "$tree/$$_[1]") for [ 'small', 'link' ], [ '../small', 'deep/up' ], [ '../..', 'deep/er/root' ], [ 'nowhere', 'dangling' ], [ "\xe6\x97\xa5\xe6\x9c\xac/\xc3\xbcber", 'utf' ], [ $long, 'long_target' ];
link("$tree/small", "$tree/deep/hard");
link("$tree/deep/up", "$tree/empty/up_too");
chmod($$_[0], "$tree/$$_[1]") for [ 0600, 'nothing' ], [ 04755, 'small' ], [ 01777, 'empty' ], [ 02750, 'deep' ], [ 0444, 'large' ], [ 0000, 'x' x 99 ], [ 0711, 'deep/er' ];
chmod 0400, "$tree/" . 'x' x 99;
my $time = 1_200_000_000;
find({ wanted => sub { utime($time, $time++, $_) if !-l $_ }, no_chdir => 1, bydepth => 1 }, $tree);
my $described = described($tree);

is(tar('--tar-create', $tree, "$base/tree.tar"), 0, 'an archive of a directory');
is($said, '', 'nothing to be said');
is(mode("$base/tree.tar"), '0600', 'it is for nobody else to read');
my $bytes = slurp_file("$base/tree.tar");
is(tar('--tar-create', $tree, "$base/tree.tar"), 1, 'a file that is there');
like($said, qr/tree\.tar: File exists/, 'is told');
ok(slurp_file("$base/tree.tar") eq $bytes, 'and kept');
is(tar('--tar-extract', "$base/new/there", "$base/tree.tar"), 0, 'unpacked into a directory that was not there');
is($said, '', 'nothing to be said');
same_tree(described("$base/new/there"), $described, 'the same tree');
ok(!-e "$base/tree.tar", 'the archive is gone');
is(tar('--tar-extract', "$base/new/there", archive($bytes)), 0, 'over what is there');
same_tree(described("$base/new/there"), $described, 'the same tree again', no_directory_times => 1);
is(tar('--tar-create', "$base/new/there", "$base/second.tar"), 0, 'archived again');
is(-s "$base/second.tar", length($bytes), 'of the same size');

mkdir "$base/nothing";
is(tar('--tar-create', "$base/nothing", "$base/nothing.tar") . tar('--tar-extract', "$base/nothing2", "$base/nothing.tar"), '00', 'an empty directory');
ok(-d "$base/nothing2", 'is one again');

# other programs read it, and write what can be read
mkdir "$base/other$_" for 'gnu', 'busybox', 'python';
my $file = archive($bytes);
is(system('tar', '-C', "$base/othergnu", '-xpf', $file), 0, 'GNU tar reads it');
same_tree(described("$base/othergnu"), $described, 'as the same tree');
is(system("cd $base/otherbusybox && umask 0 && busybox tar -xpf $file"), 0, 'busybox reads it');
same_tree(described("$base/otherbusybox", mask => 0777), described($tree, mask => 0777), 'as the same tree, but for set-user-ID', no_directory_times => 1);
is(system('python3', '-c', 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])', $file, "$base/otherpython"), 0, 'Python reads it');
same_tree(described("$base/otherpython"), $described =~ s{ = \./deep/up$}{}mr, 'as the same tree, but for hard links to links');
unlink $file;
# which formats have no long names, and which hard links to links not
my %short = map { $_ => 1 } qw(v7 ustar);
for my $format (qw(v7 ustar oldgnu gnu pax))
{
	my @except = $short{$format} ? ('--exclude=x*', '--exclude=long_target') : ();
	is(system("tar -C $tree --format=$format @except -cf $base/other.tar ."), 0, "an archive of GNU tar, format $format");
	is(tar('--tar-extract', "$base/$format", "$base/other.tar"), 0, 'is unpacked') or diag($said);
	same_tree(described("$base/$format"), join("\n", grep { !$short{$format} || !m{^\./(?:x|long_target)} } split(/\n(?=\.)/, $described)), 'to the same tree');
}
is(system("cd $tree && busybox tar -cf $base/other.tar ."), 0, 'an archive of busybox');
is(tar('--tar-extract', "$base/busybox", "$base/other.tar"), 0, 'is unpacked') or diag($said);
same_tree(described("$base/busybox"), $described, 'to the same tree');
for my $format (qw(GNU PAX))
{
	is(system('python3', '-c', "import sys, tarfile; t = tarfile.open(sys.argv[2], 'w', format = tarfile.${format}_FORMAT); t.add(sys.argv[1], arcname = '.'); t.close()", $tree, "$base/other.tar"), 0, "an archive of Python, $format");
	is(tar('--tar-extract', "$base/python$format", "$base/other.tar"), 0, 'is unpacked') or diag($said);
	same_tree(described("$base/python$format"), $described =~ s{ = \./deep/up$}{}mr, 'to the same tree, but for hard links to links');
}
is(tar('--tar-extract', "$base/gzip", archive(scalar(`tar -C $tree -czf - .`))), 0, 'one in gzip');
same_tree(described("$base/gzip"), $described, 'is the same tree');
mkdir "$base/holes";
is(system("truncate -s 5M $base/holes/sparse && printf x | dd of=$base/holes/sparse bs=1 seek=3000000 conv=notrunc status=none"), 0, 'a file with holes');
for my $options ('--format=gnu', map { "--format=pax --sparse-version=$_" } '0.0', '0.1', '1.0')
{
	is(tar('--tar-extract', "$base/sparse", archive(scalar(`tar -C $base/holes -S $options -cf - .`))), 0, "in an archive of holes, $options");
	same_tree(described("$base/sparse"), described("$base/holes"), 'is the same file');
	cmp_ok((stat("$base/sparse/sparse"))[12] * 512, '<', 200_000, 'with holes');
}
is(tar('--tar-create', "$base/holes", "$base/holes.tar") . tar('--tar-extract', "$base/filled", "$base/holes.tar"), '00', 'in an archive of ours');
same_tree(described("$base/filled"), described("$base/holes"), 'it is the same without holes');

# ---- archives that lead out ----
my $outside = "$base/outside";
mkdir $outside;
append_to_file("$outside/file", 'outside');
link("$outside/file", "$outside/second");
my $area = "$base/area";    # of which the directory "in" is

# An entry; with pax => {...}, or longname or longlink of GNU, before it
sub entry
{
	my ($name, %entry) = @_;
	my ($type, $bytes) = ($entry{type} // '0', $entry{bytes} // '');
	my $before = '';
	$before .= entry('././@LongLink', type => 'L', bytes => "$entry{longname}\0") if exists $entry{longname};
	$before .= entry('././@LongLink', type => 'K', bytes => "$entry{longlink}\0") if exists $entry{longlink};
	if ($entry{pax})
	{
		my $records = '';
		foreach my $key (sort keys %{ $entry{pax} })
		{
			my $rest = " $key=$entry{pax}{$key}\n";
			my $size = length($rest) + 1;
			$size++ while length("$size$rest") != $size;
			$records .= "$size$rest";
		}
		$before .= entry('pax', type => 'x', bytes => $records);
	}
	my $header = pack('a100 a8 a8 a8 a12 a12 a8 a1 a100 a8 a32 a32 a8 a8 a155 a12', $name, $entry{mode} // '0000644', sprintf('%07o', $>), '0000000', sprintf('%011o', $entry{size} // length($bytes)), '11111111111', ' ' x 8, $type,
		$entry{link} // '', $entry{magic} // "ustar\00000", '', '', sprintf('%07o', 1), sprintf('%07o', 3), $entry{prefix} // '', '');
	substr($header, 148, 8) = sprintf("%06o\0 ", unpack('%32C*', $header));
	return $before . $header . $bytes . "\0" x (-length($bytes) % 512);
}
my $end = "\0" x 1024;
my @good = (entry('first', bytes => 'first'), entry('d/', type => 5, mode => '0000755'), entry('d/file', bytes => 'x'));

# Unpack these over what a shell makes in "in"; the code, with nothing outside changed, and nothing inside if refused
sub unpack_entries
{
	my ($prepare, @entries) = @_;
	remove_tree($area);
	mkdir $area;
	system_or_bail('sh', '-c', "mkdir $area/in && cd $area/in && $prepare") if $prepare ne '';
	my ($before, $before_outside) = (described($area), described($outside));
	my $code = tar('--tar-extract', "$area/in", archive(join('', @entries, $end)));
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(described($outside), $before_outside, 'outside, all is as it was');
	is(join(' ', map { m{([^/]+)$} } glob("$area/*")), $prepare ne '' || $code == 0 ? 'in' : '', 'nothing beside the directory');
	ok(!-e "$base/archive$made", 'the archive is gone');
	is(described($area), $before, 'nothing has been unpacked') if $code == 3 || $code == 4;
	return $code;
}
for my $case (
	[ 'an absolute name', qr{/x: is absolute}, entry("$outside/x") ],
	[ '..', qr/leads out/, entry('..', type => 5) ],
	[ 'a name that goes up', qr{\Q../outside/x: leads out\E}, entry('../outside/x') ],
	[ 'from below', qr/leads out/, entry('d/../../outside/x') ],
	[ 'and down again', qr/leads out/, entry('d/../x') ],
	[ 'behind a dot', qr/leads out/, entry('./../outside/x') ],
	[ 'at the end', qr/leads out/, entry('d/..', type => 5) ],
	[ 'in the prefix', qr/leads out/, entry('x', prefix => '../outside') ],
	[ 'in a pax header', qr/leads out/, entry('x', pax => { path => '../outside/x' }) ],
	[ 'absolute, in a pax header', qr/is absolute/, entry('x', pax => { path => "$outside/x" }) ],
	[ 'in the name of a file with holes', qr/leads out/, entry('x', pax => { 'GNU.sparse.name' => '../outside/x', path => 'x' }) ],
	[ 'in a long name', qr/leads out/, entry('x', longname => '../outside/x') ],
	[ 'no name', qr/place of the directory/, entry('', bytes => 'x') ],
	[ 'the directory as a file', qr/place of the directory/, entry('.', bytes => 'x') ],
	[ 'the directory as a link', qr/place of the directory/, entry('./', type => 2, link => 'd') ],
	[ 'the directory as a hard link', qr/place of the directory/, entry('.', type => 1, link => 'first') ],
	[ 'a link to an absolute path', qr/absolute path/, entry('l', type => 2, link => $outside) ],
	[ 'a link to it in a pax header', qr/absolute path/, entry('l', type => 2, link => 'd', pax => { linkpath => $outside }) ],
	[ 'a link to it in a long link', qr/absolute path/, entry('l', type => 2, link => 'd', longlink => $outside) ],
	[ 'a link that goes up', qr/or may lead, out/, entry('l', type => 2, link => '../outside') ],
	[ 'too far', qr/or may lead, out/, entry('d/l', type => 2, link => '../../outside') ],
	[ 'after a dot', qr/or may lead, out/, entry('d/l', type => 2, link => './.././../outside') ],
	[ 'after it has gone down', qr/or may lead, out/, entry('d/l', type => 2, link => 'e/../..') ],
	[ 'a link to nothing', qr/to nothing/, entry('l', type => 2) ],
	[ 'links that go up together', qr/or may lead, out/, entry('d/e/', type => 5), entry('d/e/b', type => 2, link => '../..'), entry('d/e/a', type => 2, link => 'b/..'), ],
	[ 'a file through a link', qr{l/x: passes through}, entry('l', type => 2, link => 'd'), entry('l/x') ],
	[ 'through a link with dots', qr/passes through/, entry('./l', type => 2, link => 'd'), entry('.//l/./x') ],
	[ 'a directory through a link', qr/passes through/, entry('l', type => 2, link => 'd'), entry('l/x/', type => 5) ],
	[ 'through two links', qr/passes through/, entry('d/l', type => 2, link => '..'), entry('d/l/d/x') ],
	[ 'a link through a link', qr/passes through/, entry('l', type => 2, link => 'd/e/f'), entry('l/l', type => 2, link => '../..') ],
	[ 'a hard link to outside', qr/is absolute/, entry('h', type => 1, link => "$outside/file") ],
	[ 'a hard link that goes up', qr/leads out/, entry('h', type => 1, link => '../outside/file') ],
	[ 'a hard link to it in a pax header', qr/is absolute/, entry('h', type => 1, link => 'first', pax => { linkpath => "$outside/file" }) ],
	[ 'a hard link through a link', qr/passes through/, entry('l', type => 2, link => 'd'), entry('h', type => 1, link => 'l/file') ],
	[ 'a hard link to a link, from further up', qr/or may lead, out/, entry('d/l', type => 2, link => '../first'), entry('h', type => 1, link => 'd/l') ],
	[ 'a file through a hard link to a link', qr/passes through/, entry('l', type => 2, link => 'd'), entry('h', type => 1, link => 'l'), entry('h/x') ],
	(map { [ "a device or pipe: $_", qr/device, a pipe or a socket/, entry('node', type => $_) ] } 3, 4, 6))
{
	my ($name, $like, @entries) = @$case;
	subtest "refused: $name" => sub {
		is(unpack_entries('', @good, @entries, entry('last')), 3, 'the exit code');
		like($said, $like, 'why');
		is(unpack_entries('mkdir d; echo old > first', @good, @entries, entry('last')), 3, 'in a directory that is there');
		is(unpack_entries('', @entries, @good), 3, 'at the beginning of the archive');
	};
}
for my $case (
	[ 'through it', "ln -s $outside out", entry('out/x') ],
	[ 'through it, to what is inside', 'mkdir e; ln -s e out', entry('out/x') ],
	[ 'a hard link to it', "ln -s $outside/file out", entry('h', type => 1, link => 'out') ],
	[ 'a hard link through it', "ln -s $outside out", entry('h', type => 1, link => 'out/file') ])
{
	my ($name, $prepare, @entries) = @$case;
	subtest "a link that is there: $name" => sub { is(unpack_entries($prepare, @good, @entries), 3, 'refused'); };
}
for my $case (
	[ 'a file in place of a link', "ln -s $outside/file l", 'in/l 0644 1', entry('l', bytes => 'x') ],
	[ 'a directory in place of a link', "ln -s $outside l", 'in/l/x 0644 1', entry('l/', type => 5, mode => '0000755'), entry('l/x', bytes => 'x') ],
	[ 'a link in place of a link', "ln -s $outside l", 'in/l - d', entry('l', type => 2, link => 'd') ],
	[ 'a file in place of one that has another name outside', "ln $outside/second first", 'in/first 0644 5' ],
	[ 'a directory in place of a link of the archive', '', 'in/l/x 0644 1', entry('l', type => 2, link => 'e'), entry('l/', type => 5, mode => '0000755'), entry('l/x', bytes => 'x') ],
	[ 'a link up to the directory', '', 'in/d/l - ..', entry('d/l', type => 2, link => '..') ],
	[ 'a link with dots', '', 'in/d/e/l - ./../..//first', entry('d/e/l', type => 2, link => './../..//first') ],
	[ 'a hard link to a link', '', 'in/h - first', entry('l', type => 2, link => 'first'), entry('h', type => 1, link => 'l') ],
	[ 'a hard link with content', '', 'in/h 0644 3', entry('h', type => 1, link => 'first', pax => { size => 3 }, bytes => 'abc') ],
	[ 'a name with a NUL in it', '', 'in/nul 0644 1', entry('x', pax => { path => "nul\0/../../outside/x" }, bytes => 'x') ],
	[ 'dots that are none', '', 'in/... 0644 0', entry('...'), entry('d/..x'), entry('x..') ],
	[ 'the directory itself', '', 'in 0755', entry('./', type => 5, mode => '0000700') ],
	[ 'a directory that nobody may write to', '', 'in/e/x 0644 1', entry('e/', type => 5, mode => '0000555'), entry('e/x', bytes => 'x') ],
	[ 'a directory that is not named', '', 'in/e/f 0755', entry('e/f/x') ])
{
	my ($name, $prepare, $line, @entries) = @$case;
	subtest "taken: $name" => sub {
		is(unpack_entries($prepare, @good, @entries), 0, 'the exit code') or diag($said);
		like(described($area, no_times => 1), qr/^\.\/\Q@{[ $line =~ s{(0\d+)}{$1 -}r ]}\E/m, 'what comes of it');
	};
}

# ---- what is no archive ----
my $whole = join('', @good, $end);
for my $case (
	[ 'nothing', '' ], [ 'text', "hello\n" x 1000 ], [ 'noise', join('', map { chr($_ * 7919 % 251) } 1 .. 5000) ], [ 'a header cut short', substr($whole, 0, 300) ], [ 'a second one', substr($whole, 0, 1024 + 100) ],
	[ 'content cut short', join('', @good, entry('big', bytes => 'x' x 100_000, size => 200_000)) ], [ 'a bad checksum', $good[0] . ($good[1] =~ s/^d/e/r) . $good[2] . $end ],
	[ 'a bad checksum at first', $whole =~ s/^f/g/r ], [ 'gzip, cut short', substr(`tar -C $tree -czf - .`, 0, 10_000) ], [ 'gzip of text', scalar(`echo text | gzip`) ], [ 'xz', "\xfd7zXZ\0" . 'x' x 1000 ],
	[ 'zip', "PK\3\4" . "\0" x 1000 ], [ 'a pax header of nothing', $good[0] . entry('x', type => 'x', size => 3, bytes => '99999 path=x') . 'x' x 100 ])
{
	my ($name, $bytes) = @$case;
	subtest "no archive: $name" => sub {
		is(tar('--tar-extract', "$base/none", archive($bytes)), 4, 'the exit code');
		like($said, qr/^agentvm-runtime: .+: .+\n$/, 'why');
		ok(!-e "$base/none", 'nothing has been unpacked');
		ok(!-e "$base/archive$made", 'the archive is gone');
	};
}
is(tar('--tar-extract', "$base/none", archive(entry("x\e[2Jy/../\n"))), 3, 'a name with what a terminal would obey');
is($said, "agentvm-runtime: x?[2Jy/../?: leads out of the directory\n", 'is told without');

# ---- other ends ----
append_to_file("$base/file", 'x');
is(tar('--tar-extract', "$base/file", archive($whole)), 2, 'unpack into a file');
ok(!-e "$base/archive$made", 'the archive is gone');
is(tar('--tar-extract', "$base/none", "$base/no_archive"), 1, 'an archive that is not there');
is(tar('--tar-create', "$base/$_", "$base/none.tar"), 2, "create of $_, which is no directory") for 'file', 'none';
is(tar('--tar-create', $tree, "$base/none/none.tar"), 1, 'create where there is no directory');
is(tar('--tar-create', $tree), 2, 'without a file');
is(tar('--tar-extract', $tree, 'a', 'b'), 2, 'with too many');
ok(!-e "$base/none.tar", 'no file is left');
my $odd = "$base/odd";
mkdir $odd;
POSIX::mkfifo("$odd/pipe", 0600);
append_to_file("$odd/file", 'x');
my ($socket, $huge);
socket($socket, PF_UNIX, SOCK_STREAM, 0) && bind($socket, pack_sockaddr_un("$odd/socket")) or die "no socket: $!";
is(tar('--tar-create', $odd, "$odd/own.tar"), 0, 'an archive in the very directory, with a pipe and a socket');
like($said, qr/^agentvm-runtime: pipe: is left out.*\nagentvm-runtime: socket: is left out.*\n$/, 'of which this is told');
is(scalar(`tar -tf $odd/own.tar`), "file\n", 'they are left out, and so is the archive');
SKIP:
{
	skip 'root may do anything', 4 if $> == 0;
	chmod 0000, "$odd/file";
	is(tar('--tar-create', $odd, "$base/none.tar"), 1, 'a file that cannot be read');
	like($said, qr/^agentvm-runtime: file: Permission denied$/m, 'is told');
	ok(!-e "$base/none.tar", 'and no archive is left without it');
	is(tar('--tar-extract', '/proc/x', archive($whole)), 1, 'where nothing can be made');
}
unlink("$odd/file") && open($huge, '>', "$odd/huge") && truncate($huge, 2**36) or die "no huge file: $!";
my $pid = fork // die 'no process can be made';
if (!$pid) { exec($binary, '--tar-create', $odd, "$base/huge.tar") or POSIX::_exit(126); }
my $ended = 0;
Time::HiRes::sleep(0.01) until -s "$base/huge.tar" || ($ended = waitpid($pid, POSIX::WNOHANG()));
kill('TERM', $pid) if !$ended;
waitpid($pid, 0) if !$ended;
is($ended, 0, 'ended before it was done');
ok(!-e "$base/huge.tar", 'no part of an archive is left');
SKIP:
{
	my $small = "$base/small";
	my $alone = $> == 0 ? 'unshare -m' : 'unshare -rm';
	skip 'no file system can be mounted', 1 if system("$alone mount -t tmpfs -o size=1m none $small") != 0;
	my $file = archive($bytes);
	my $out = `$alone sh -c 'mount -t tmpfs -o size=1m none $small && cd $small && $binary --tar-create $tree a.tar 2>&1; echo \$? \$(ls -A)
		$binary --tar-extract $small/x $file 2>&1; echo \$? \$(ls -A)'`;
	like($out, qr/\Aagentvm-runtime: large: No space left on device\n5\nagentvm-runtime: \S+: No space left on device\n5\n\z/, 'a full disk');
}
system_or_bail('chmod', '-R', 'u+rwx', $base);

done_testing();
