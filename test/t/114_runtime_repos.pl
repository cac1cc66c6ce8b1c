# agentvm-runtime and the session's repositories: lists and places that make no sense, and a git that floods it
use strict;
use warnings;
use AgentVM::FakeGateway;
use AgentVM::VM;
use PostgreSQL::Test::Utils;
use Test::More;

my $source = PostgreSQL::Test::Utils::tempdir('repos');
for my $name ('a/one', 'b/one')
{
	system_or_bail('sh', '-c', "git init -q $source/$name && cd $source/$name && git config user.email a\@b && git config user.name a && echo $name > file && git add file && git commit -qm first");
}
my $one = "file://$source/a/one";

# A VM whose session has these repositories
sub vm
{
	my (@repos) = @_;
	my $fake = AgentVM::FakeGateway->new(sub {
		my ($request) = @_;
		return $request->{path} eq '/v1/bootstrap' ? (200, {}, AgentVM::FakeGateway::boot_answer(repos => \@repos)) : (404, {}, '');
	});
	my $vm = AgentVM::VM->new($fake->url, 'f' x 64);
	$vm->{fake} = $fake;
	mkdir $vm->dir . '/work';
	return $vm;
}
sub ends
{
	my ($vm, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($vm->stop, 0, $name // 'it lives until it is told to end');
	$vm->{fake}->stop('KILL');
}
sub count { my ($vm, $like) = @_; return scalar(() = $vm->output(from_start => 1) =~ /$like/g); }

# ---- places that are none ----
my $vm = vm({ url => 'https://x/y.git', path => '/' }, { url => 'https://x/y.git', path => '///' }, { url => 'file:///' }, { url => $one, path => 'x' x 5000 },
	{ url => $one, path => '/' . 'x' x 4080 }, { url => $one, path => "last//" });
$vm->start->says(qr/repository is there" url=\S+ path=\S+\/last\n/, 'the last one has had its turn', while_running => 1);
is(count($vm, qr/was not cloned" url=\S+ reason="it names no directory"/), 3, 'a path without a name, or a URL that gives none, is told');
is(count($vm, qr/was not cloned" url=\S+ reason="its path is too long"/), 2, 'so is one that is too long');
is($vm->file('work/last/file'), "a/one\n", 'slashes behind a path do not matter');
is($vm->stop, 0, 'it lives');
$vm->start->says(qr/repository is there" url=\S+ path=\S+\/last\n/, 'started again, with the same list');
ends($vm, 'it lives');

# ---- more than its stack would hold ----
my $many = 2500;
$vm = vm((map { { url => 'a', ref => '-' } } 1 .. $many), { url => $one });
$vm->start->says(qr/repository is there" url=\S+ path=\S+\/one\n/, 'the last of many', while_running => 1);
is(count($vm, qr/its ref begins with a dash/), $many, 'each of the others was refused');
ends($vm);
$vm = vm((map { { url => 'a', path => 'there' } } 1 .. $many), { url => $one });
mkdir $vm->dir . '/work/there';
$vm->start->says(qr/repository is there" url=\S+ path=\S+\/one\n/, 'the last of many whose path is there', while_running => 1);
ends($vm);

# ---- a place that is taken ----
my @repos = ({ url => "file://$source/nothing", path => 'one' }, { url => $one }, { url => "file://$source/b/one" }, { url => "file://$source/b/one", path => './/one/' }, { url => $one, path => 'image' },
	{ url => $one, path => 'file' }, { url => $one, path => 'link' }, { url => $one, path => 'kept' }, { url => $one, path => 'end' });
$vm = vm(@repos);
my $work = $vm->dir . '/work';
mkdir "$work/image";
append_to_file("$work/file", 'of the image');
symlink("$work/nowhere", "$work/link");
system_or_bail('git', 'clone', '-q', "file://$source/b/one", "$work/kept");
for my $time ('first', 'second')
{
	$vm->start->says(qr/repository is there" url=\S+ path=\S+\/end\n/, "the $time time: the end of the list");
	my @said = map { /(?:was not cloned|is there)" url=\S+(?: reason="([^"]*)")?(?: git="[^"]*")? path=$work\/(\S+)$/ ? $2 . ($1 ? ": $1" : '') : () } split(/\n/, $vm->output(from_start => 1));
	my $earlier = 'an earlier one has its path';
	my $none = 'its path exists and is no repository';
	# what could not be cloned has taken nothing
	my @first = $time eq 'first' ? ("one: git clone failed", 'one') : ('one', "one: $earlier");
	is_deeply(\@said, [ @first, "one: $earlier", ".//one: $earlier", "image: $none", "file: $none", "link: $none", 'kept', 'end' ], 'what is there, and what is not, and why')
	  or diag($vm->output(from_start => 1));
	is($vm->stop, 0);
}
is($vm->file('work/one/file') . $vm->file('work/kept/file') . $vm->file('work/file'), "a/one\nb/one\nof the image", 'nothing has been replaced');
$vm->{fake}->stop('KILL');

# ---- what git prints ----
$vm = vm({ url => 'https://x/flood' });
mkdir $vm->dir . '/bin';
append_to_file($vm->dir . '/bin/git', <<'END');
#!/bin/sh
exec 2>&1
yes "$(printf %4000s | tr ' ' x)" | head -c 50000000
printf '\nthe last line, file of %s bytes\n\n' "$(stat -Lc %s /proc/self/fd/2)"
exit 1
END
chmod 0700, $vm->dir . '/bin/git';
$vm->start(PATH => $vm->dir . "/bin:$ENV{PATH}");
$vm->says(qr/was not cloned" url=\S+flood reason="git clone failed" git="the last line, file of \d+ bytes"/, 'the end of 50 MB is told');
like($vm->output, qr/file of 0 bytes/, 'and nothing of them is kept');
my $long = 'y' x 600;
append_to_file($vm->dir . '/bin/git2', "#!/bin/sh\nprintf %s $long\nprintf '%s' 'no line end'\nexit 1\n");
$vm->stop;
rename($vm->dir . '/bin/git2', $vm->dir . '/bin/git');
chmod 0700, $vm->dir . '/bin/git';
$vm->start(PATH => $vm->dir . "/bin:$ENV{PATH}")->says(qr/git="y{500}no line end"/, 'of a long line without an end it is the end, too');
ends($vm);

done_testing();
