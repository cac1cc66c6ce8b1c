# infra/ami/install from the first line to the last in a chroot, with the files that are pinned: programs run in their versions, the
# distribution's python3 stays what it was, and nothing that must not be in an image is left. Debian in place of Ubuntu; python 3.13, which
# no package registry has, is a stand-in. The root of the chroot is that of a user namespace
use strict;
use warnings;
use Cwd qw(abs_path);
use Digest::SHA;
use File::Basename qw(dirname);
use File::Copy qw(copy);
use File::Path qw(make_path);
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'no user namespaces for such as us' unless IPC::Run::run([qw(unshare --map-root-user --mount true)], '2>', \my $refused);
my $root = abs_path(dirname(__FILE__) . '/../..');
my $dir = PostgreSQL::Test::Utils::tempdir('ami');
my ($served, $here) = ("$dir/served", "$dir/here");
make_path($served, $here, "$dir/npm", "$dir/python/bin");
my %pin = map { /^(\w+) (\S+) (\S+) (\S+)$/ ? ($1 => { version => $2, sha256 => $3, url => $4, file => (split m{/}, $4)[-1] }) : () } split /\n/, slurp_file("$root/infra/ami/pins");

sub done { my ($name, @command) = @_; my $out = ''; my $good = IPC::Run::run(\@command, '<', \undef, '>', \$out, '2>&1'); ok($good, $name) or diag($out); return $out; }

# ---- what is pinned, by the clients of its registries ----

local $ENV{npm_config_cache} = "$dir/npm";
foreach my $name (qw(node npm bun))
{
	my ($package) = $pin{$name}{url} =~ m{^https://[^/]+/(.*)/-/};
	done("$name is there", 'npm', 'pack', '--silent', "--pack-destination=$served", "$package\@$pin{$name}{version}");
	my ($file) = glob("$served/" . ($package =~ s/^@//r =~ s{/}{-}r) . '-*.tgz');
	rename $file, "$served/$pin{$name}{file}" or die "$file: $!";
}
done('uv is there', "$ENV{AGENTVM_VENV}/bin/pip", 'download', '-q', '--no-deps', '--only-binary=:all:', '--platform', 'manylinux2014_x86_64', '-d', $served, "uv==$pin{uv}{version}");
is(Digest::SHA->new(256)->addfile("$served/$pin{$_}{file}")->hexdigest, $pin{$_}{sha256}, "$_ has the SHA-256 that is pinned") for qw(node npm bun uv);

append_to_file("$dir/python/bin/python3.13", "#!/bin/sh\necho Python $pin{python}{version}\n");
chmod 0755, "$dir/python/bin/python3.13";
done('a stand-in for python', 'tar', '-C', $dir, '-czf', "$served/$pin{python}{file}", 'python');
$pin{python}{sha256} = Digest::SHA->new(256)->addfile("$served/$pin{python}{file}")->hexdigest;

# ---- the script ----

my ($port, $log) = ('', '');
my $server = IPC::Run::start([ "$ENV{AGENTVM_VENV}/bin/python", '-u', '-m', 'http.server', '0', '--bind', '127.0.0.1', '--directory', $served ], '<', \undef, '>', \$port, '2>', \$log);
$server->pump until $port =~ /port (\d+)/;
append_to_file("$here/pins", join '', map { "$_ $pin{$_}{version} $pin{$_}{sha256} http://127.0.0.1:$1/" . $pin{$_}{file} =~ s/%/%25/gr . "\n" } grep { $_ ne 'ubuntu' } sort keys %pin);
copy("$root/$_", $here) or die "$_: $!" for qw(infra/ami/install src/runtime/agentvm-runtime infra/systemd/agentvm-runtime.service infra/microvm/agentvm-boot infra/microvm/agentvm-boot.service);
append_to_file("$here/look", <<'END');
exec 2>&1
for program in node npm bun uv python3.13; do echo "$program: $($program --version)"; done
python3 -c 'import sys; print("python3:", sys.version_info[:2])'
apt-get check && echo 'apt: ok'
cat /etc/agentvm-image
systemctl is-enabled agentvm-runtime.service agentvm-boot.service apt-daily.timer
echo "machine-id: $(wc -c </etc/machine-id)"
ls -A /root/.ssh /etc/ssh/ssh_host_rsa_key
END
done('a Debian', 'mmdebstrap', '--quiet', '--mode=fakechroot', '--variant=minbase', '--include=systemd,curl,ca-certificates,python3', '--format=tar', 'bookworm', "$dir/tree.tar");
mkdir "$dir/tree";
done('unpacked', 'tar', '-C', "$dir/tree", '--exclude=./dev/*', '-xf', "$dir/tree.tar");
make_path("$dir/tree/tmp/agentvm", "$dir/tree/root/.ssh", "$dir/tree/etc/ssh");
copy($_, "$dir/tree/tmp/agentvm") or die "$_: $!" for glob("$here/*");
append_to_file("$dir/tree/etc/ssh/ssh_host_rsa_key", 'secret');
# of all users there is only root
append_to_file("$dir/tree/etc/apt/apt.conf.d/99root", "APT::Sandbox::User \"root\";\n");
copy('/etc/resolv.conf', "$dir/tree/etc/resolv.conf");
sub inside
{
	return ('unshare', '--map-root-user', '--mount', 'sh', '-c', 'tree=$1; shift; mount --rbind /dev "$tree/dev" && mount --rbind /proc "$tree/proc" && exec env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/tmp chroot "$tree" bash "$@"',
		'sh', "$dir/tree", @_);
}
done('the script makes an image', inside('/tmp/agentvm/install', '--any-distribution'));
done('and forgets', inside('/tmp/agentvm/install', '--forget'));
my $out = done('the image', inside('-c', 'bash /tmp/agentvm/look || true'));
$server->kill_kill;

like($out, qr/^\Q$_->[0]\E: (?:\D*\s)?v?\Q$pin{$_->[1]}{version}\E\b/m, "$_->[0] runs") for [qw(node node)], [qw(npm npm)], [qw(bun bun)], [qw(uv uv)], [qw(python3.13 python)];
like($out, qr/^python3: \(3, 11\)$/m, "python3 is the distribution's");
like($out, qr/^apt: ok$/m, 'apt works');
like($out, qr/^node \Q$pin{node}{version} $pin{node}{sha256}\E/m, 'the image says what is in it');
like($out, qr/^gh \S+ dpkg$/m, "the distribution's packages, too");
like($out, qr/^enabled\nenabled\nmasked$/m, 'the runtime and the boot hook begin with it, nothing upgrades itself');
like($out, qr/^machine-id: 0$/m, 'it is nobody yet');
like($out, qr/cannot access '$_'/, "$_ is not in it") for qw(/root/.ssh /etc/ssh/ssh_host_rsa_key);
done_testing();
