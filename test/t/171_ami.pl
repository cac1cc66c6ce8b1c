# infra/ami: nothing gets into an image but what its pin says, the template is sound, old images can be removed
use strict;
use warnings;
use AgentVM::Moto;
use File::Basename qw(dirname);
use File::Copy qw(copy);
use File::Path qw(make_path);
use Digest::SHA qw(sha256_hex);
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

my $infra = dirname(__FILE__) . '/../../infra';
my $python = "$ENV{AGENTVM_VENV}/bin/python";
my $dir = PostgreSQL::Test::Utils::tempdir('ami');

# A program's exit code and output
sub run_it
{
	my (@command) = @_;
	my $out = '';
	IPC::Run::run(\@command, '<', \undef, '>', \$out, '2>&1');
	return ($? >> 8, $out);
}

# ---- pins ----

my @names = qw(node npm bun uv python);
my %pin;
foreach my $line (grep { !/^#/ } split /\n/, slurp_file("$infra/ami/pins"))
{
	my ($name, $version, $sha256, $url) = $line =~ /^(\w+) ([0-9A-Za-z.]+) ([0-9a-f]{64}|archive) (https:\/\/\S+)$/ or fail("a pin: $line") && next;
	ok(!$pin{$name}, "one pin for $name");
	$pin{$name} = { version => $version, sha256 => $sha256, url => $url };
	ok($sha256 eq 'archive' ? $name eq 'ubuntu' : index($url, $version) > 0, "$name: its URL has the version");
}
is(join(' ', sort keys %pin), join(' ', sort 'ubuntu', @names), 'pins for all that is downloaded');
like($pin{node}{version}, qr/^24\./, 'node 24');
like($pin{python}{version}, qr/^3\.13\./, 'python 3.13');
my ($wanted) = slurp_file("$infra/ami/install") =~ /^names=\((.*)\)$/m;
is($wanted, "@names", 'which is what the script downloads');
is(() = slurp_file("$infra/ami/install") =~ /\b(?:curl|wget|npm install|pip install|uv python install)\b.*(?=https?:)/g, 0, 'and it names no URL itself');

# ---- downloads ----

my $served = "$dir/served";
make_path($served, "$dir/here");
append_to_file("$served/$_", "this is $_\n") for @names;
my ($port, $log) = ('', '');
my $server = IPC::Run::start([ $python, '-u', '-m', 'http.server', '0', '--bind', '127.0.0.1', '--directory', $served ], '<', \undef, '>', \$port, '2>', \$log);
$server->pump until $port =~ /port (\d+)/;
my $base = "http://127.0.0.1:$1";
copy("$infra/ami/install", "$dir/here/install");

# Fetch with pins like the real ones, each changed by a function of (name, line)
my $n = 0;
sub fetch
{
	my ($change, @options) = @_;
	my $into = "$dir/into" . $n++;
	mkdir $into;
	unlink "$dir/here/pins";
	append_to_file("$dir/here/pins", join '', map { my $line = "$_ 1.0 " . sha256_hex("this is $_\n") . " $base/$_"; ($change ? $change->($_, $line) : $line) . "\n" } @names);
	my ($code, $out) = run_it('bash', "$dir/here/install", @options ? @options : '--any-distribution', '--fetch', $into);
	return ($code, $out, join ' ', map { s{.*/}{}r } sort glob("$into/*"));
}

my ($code, $out, $there) = fetch();
is("$code $there", '0 ' . join(' ', sort @names), 'files that are as pinned are taken') or diag($out);

# ... a file of another content
append_to_file("$served/uv", 'x');
($code, $out, $there) = fetch();
isnt($code, 0, 'a tampered file ends it');
like($out, qr/^install: uv 1\.0 from \S+ has SHA-256 [0-9a-f]{64}, and not [0-9a-f]{64}$/m, 'and it says which');
unlike($out, qr/^install: python/m, 'nothing is downloaded after it');
unlike($there, qr/\buv(?!\.part)\b|python/, 'and it is not taken');
unlink "$served/uv";
append_to_file("$served/uv", "this is uv\n");

# ... a pin that is not whole
my %broken = (
	'no line' => [ sub { $_[0] eq 'python' ? '' : $_[1] }, qr/has 0 lines for python/ ],
	'two lines' => [ sub { $_[0] eq 'python' ? "$_[1]\n$_[1]" : $_[1] }, qr/has 2 lines for python/ ],
	'no checksum' => [ sub { $_[1] =~ s/(python 1\.0) \S+/$1/r }, qr/not NAME VERSION SHA-256 URL/ ],
	'an empty checksum' => [ sub { $_[1] =~ s/(python 1\.0) \S+/$1 -/r }, qr/no SHA-256 for python/ ],
	'a word for a checksum' => [ sub { $_[1] =~ s/(python 1\.0) \S+/$1 archive/r }, qr/no SHA-256 for python/ ],
	'a short checksum' => [ sub { $_[1] =~ s/(python 1\.0 [0-9a-f]{63})./$1/r }, qr/no SHA-256 for python/ ],
	'more than a pin' => [ sub { $_[0] eq 'python' ? "$_[1] --insecure" : $_[1] }, qr/not NAME VERSION SHA-256 URL/ ],
	'a file: URL' => [ sub { $_[0] eq 'python' ? $_[1] =~ s{http://\S+}{file:///etc/passwd}r : $_[1] }, qr/not NAME VERSION SHA-256 URL/ ]);
foreach my $name (sort keys %broken)
{
	($code, $out, $there) = fetch($broken{$name}[0]);
	ok($code != 0 && $out =~ $broken{$name}[1] && $there eq '', "$name: it ends before anything is downloaded") or diag("$code $there $out");
}
($code, $out, $there) = fetch(sub { $_[1] =~ s{/bun$}{/nothing}r });
ok($code != 0 && $out =~ /bun 1\.0 cannot be had/ && $there !~ /bun/, 'a file that is not there: it ends') or diag($out);
($code, $out, $there) = fetch(undef, '--fetch');
ok($code != 0 && $there eq '', 'an image for use downloads by https only');
$server->kill_kill;

SKIP:
{
	skip 'somebody with all rights', 1 if $> == 0;
	($code, $out) = run_it('bash', "$dir/here/install");
	ok($code != 0 && $out =~ /has to be root/, 'nobody else makes an image');
}

# ---- the template ----

my $template = slurp_file("$infra/ami/agentvm.pkr.hcl");
unlike($template . slurp_file("$infra/ami/plugins.pkr.hcl"), qr/[^\x00-\x7f]/, 'the template is ASCII, its description, too');
my ($hcl, $error);
IPC::Run::run([ $python, '-c', 'import hcl2, json, sys; json.dump(hcl2.load(sys.stdin), sys.stdout)' ], '<', "$infra/ami/agentvm.pkr.hcl", '>', \$hcl, '2>', \$error) or die $error;
$hcl = decode_json($hcl);
my $source = $hcl->{source}[0]{'"amazon-ebs"'}{'"agentvm"'};
is($source->{metadata_options}[0]{http_tokens}, '"required"', 'it is built with IMDSv2 only');
is($source->{imds_support}, '"v2.0"', 'and so are the VMs of the image');
is($source->{ami_users}, '${var.ami_users}', 'it can be shared');
is($source->{encrypt_boot}, '${var.encrypt}', 'and encrypted');
is($source->{source_ami_filter}[0]{owners}[0], '"099720109477"', 'it is built upon an image of Canonical');
ok(!exists $source->{source_ami_filter}[0]{most_recent}, 'of a release that is named, not the latest');
is($source->{$_}, '${local.tags}', "$_ are ours") for qw(tags snapshot_tags run_volume_tags);
like($source->{run_tags}, qr/merge\(local\.tags/, 'run_tags, too');
my ($files) = slurp_file("$infra/ami/install") =~ /^from_here=\((.*)\)$/m;
my @uploaded = map { s/^"|"$//gr } map { @{ $_->{'"file"'}{sources} // [] } } grep { $_->{'"file"'} } @{ $hcl->{build}[0]{provisioner} };
is(join(' ', sort 'install', 'pins', split / /, $files), join(' ', sort 'agentvm-runtime', map { s{.*/}{}r } @uploaded), 'what the script wants beside it is uploaded');
ok(-s ("$infra/ami/" . s/^\$\{path\.root\}\///r), "$_ is there") for @uploaded;

SKIP:
{
	my ($packer) = grep { -x } map { "$_/packer" } split /:/, $ENV{PATH};
	skip 'no packer here', 1 unless $packer;
	local $ENV{CHECKPOINT_DISABLE} = 1;
	($code, $out) = run_it($packer, 'fmt', '-check', '-diff', "$infra/ami");
	is($code, 0, 'packer fmt') or diag($out);

	# 1.6 has the plugin for EC2 in it, an old one; later ones would have to download it
	($code, $out) = run_it($packer, 'version');
	skip 'packer without the plugin for EC2', 6 unless $out =~ /v1\.6\./;
	make_path("$dir/try/infra/ami", "$dir/try/infra/microvm", "$dir/try/infra/systemd", "$dir/try/src/runtime");
	copy("$infra/$_", "$dir/try/infra/$_") for qw(ami/install ami/pins microvm/agentvm-boot microvm/agentvm-boot.service systemd/agentvm-runtime.service);
	append_to_file("$dir/try/src/runtime/agentvm-runtime", '');
	append_to_file("$dir/try/infra/ami/agentvm.pkr.hcl", $template =~ s/^  metadata_options \{.*?^  \}\n//msr =~ s/^  imds_support .*\n//mr);
	my $validate = sub { my ($serial, $version, @more) = @_; return run_it($packer, 'validate', "-var=ubuntu_serial=$serial", "-var=version=$version", @more, "$dir/try/infra/ami") };
	my @region = ('-var=region=us-east-1');
	my @shared = ('-var=ami_users=["123456789012"]', '-var=ami_regions=["eu-west-1"]');
	($code, $out) = $validate->('20261101', '0.3', @region, @shared);
	is($code, 0, 'packer validate, without what its old plugin does not know') or diag($out);
	($code, $out) = $validate->('20261101', '0.3', @region, '-var=encrypt=true');
	is($code, 0, 'encrypted') or diag($out);
	isnt(($validate->('20261101', '0.3', @region, '-var=encrypt=true', @shared))[0], 0, 'encrypted with a key that is not to be shared and shared: refused');
	isnt(($validate->('20261101', "0.3\x{c3}\x{a4}", @region))[0], 0, 'a version that is not ASCII is refused');
	isnt(($validate->('latest', '0.3', @region))[0], 0, 'so is a release of Ubuntu that is no date');
	isnt(($validate->('20261101', '0.3'))[0], 0, 'and no region');
}

# ---- clean ----

my $moto = AgentVM::Moto->new;
my $cloud = $moto->cloud;
my @ours = ({ Key => 'agentvm-managed-by', Value => 'agentvm' }, { Key => 'agentvm-image', Value => 'build' });
sub tags { my ($type, @tags) = @_; return (TagSpecifications => [ { ResourceType => $type, Tags => \@tags } ]); }
my %launch = (ImageId => $cloud->{image_id}, InstanceType => 't3.micro', MinCount => 1, MaxCount => 1);
my ($instance, $other, $volume) = $moto->calls([ undef, 'ec2', 'run_instances', { %launch, tags('instance', @ours) } ], [ undef, 'ec2', 'run_instances', { %launch, tags('instance', $ours[0]) } ],
	[ undef, 'ec2', 'create_volume', { Size => 1, AvailabilityZone => 'us-east-1a', tags('volume', @ours) } ]);
($instance, $other) = map { $_->{Instances}[0]{InstanceId} } $instance, $other;
my @images;
foreach my $i (1 .. 4)
{
	my ($image) = $moto->calls([ undef, 'ec2', 'create_image', { InstanceId => $other, Name => "agentvm-$i", ($i < 4 ? tags('image', @ours) : ()) } ]);
	push @images, $image->{ImageId};
	# moto counts in seconds
	my $then = int(time);
	select undef, undef, undef, 0.05 while int(time) == $then;
}
my ($described) = $moto->calls([ undef, 'ec2', 'describe_images', { ImageIds => \@images } ]);
my %snapshot = map { $_->{ImageId} => $_->{BlockDeviceMappings}[0]{Ebs}{SnapshotId} } @{ $described->{Images} };
$moto->calls([ undef, 'ec2', 'create_tags', { Resources => [ map { $snapshot{$_} } @images[ 0 .. 2 ] ], Tags => \@ours } ]);

sub clean
{
	local @ENV{qw(AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_ENDPOINT_URL)} = (@{$cloud}{qw(access_key_id secret_access_key endpoint)});
	my ($code, $out) = run_it($python, "$infra/ami/clean", '--region', $cloud->{region}, @_);
	is($code, 0, "clean @_") or diag($out);
	return join ' ', sort $out =~ /\b(?:(?:ami|snap|i|vol)-\w+)/g;
}
sub left { my ($now) = $moto->calls([ undef, 'ec2', 'describe_images', { Owners => ['self'] } ]); return join ' ', sort map { $_->{Name} } @{ $now->{Images} }; }

is(clean(), join(' ', sort $images[0], $snapshot{ $images[0] }), 'the oldest of three images and its snapshot would go; a fresh machine not');
is(left(), 'agentvm-1 agentvm-2 agentvm-3 agentvm-4', 'but did not');
is(clean('--keep', 1, '--delete'), join(' ', sort @images[ 0, 1 ], @snapshot{ @images[ 0, 1 ] }), 'removed');
is(left(), 'agentvm-3 agentvm-4', 'the newest stays, and one that is not ours');
is(clean('--keep', 1, '--hours', 0, '--delete'), join(' ', sort $instance, $volume->{VolumeId}), 'what a build has left behind goes when it is old');
is(join(' ', map { $_->{id} } $moto->running), $other, 'and nothing that is not ours');
is(clean('--keep', 1, '--hours', 0), '', 'then there is nothing more');
done_testing();
