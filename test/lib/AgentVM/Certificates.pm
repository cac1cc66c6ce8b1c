# Certificates of a test's own, in a directory of its own.
#
#	my $ca = authority('ca');                                              # a file of PEM
#	my $pair = certificate('good', 'ca', 'IP:127.0.0.1, DNS:a.test');      # [certificate, key]; good for 10 days, or so many
#	fingerprint($pair->[0]);                                               # SHA-256, in hex with colons
#	start_trusting($node, 'ca');                                           # start it where this one stands for all public authorities; false: not here
#	certificate_directory();                                               # where they are: good.pem, good.key
package AgentVM::Certificates;

use strict;
use warnings;
use Exporter 'import';
use File::Basename qw(basename dirname);
use PostgreSQL::Test::Utils ();
use Test::More;

our @EXPORT = qw(authority certificate certificate_directory fingerprint start_trusting);

my @new_key = qw(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes);
my $dir;

sub openssl { my (@arguments) = @_; return PostgreSQL::Test::Utils::run_command([ 'openssl', @arguments ]); }

sub certificate_directory { return $dir //= PostgreSQL::Test::Utils::tempdir('certificates'); }

sub authority
{
	my ($name) = @_;
	my $file = certificate_directory() . "/$name";
	openssl('req', '-x509', @new_key, '-subj', "/CN=$name", '-days', 10, '-keyout', "$file.key", '-out', "$file.pem");
	return "$file.pem";
}

sub certificate
{
	my ($name, $authority, $names, $days) = @_;
	my $file = certificate_directory() . "/$name";
	PostgreSQL::Test::Utils::append_to_file("$file.ext", "subjectAltName = $names\n");
	openssl('req', @new_key, '-subj', "/CN=$name", '-keyout', "$file.key", '-out', "$file.csr");
	openssl('x509', '-req', '-in', "$file.csr", '-CA', "$dir/$authority.pem", '-CAkey', "$dir/$authority.key", '-CAcreateserial', '-extfile', "$file.ext", '-out', "$file.pem", '-days', $days // 10);
	ok(-s "$file.pem", "certificate $name");
	return [ "$file.pem", "$file.key" ];
}

# In a mount namespace it stands in for all that libcurl trusts by itself, be that a file or a directory
sub start_trusting
{
	my ($node, $authority) = @_;
	my @namespace = ('unshare', '--user', '--map-root-user', '--mount');
	chomp(my $bundle = `curl-config --ca`);
	return if !-e $bundle || PostgreSQL::Test::Utils::system_log(@namespace, 'mount', '--bind', '/dev/null', $bundle);

	my $public = certificate_directory() . '/public';
	my ($hash) = openssl('x509', '-in', "$dir/$authority.pem", '-noout', '-hash');
	mkdir $public;
	symlink("$dir/$authority.pem", "$public/$_") or die "could not link: $!" for basename($bundle), "$hash.0";

	# the server is the user that it is outside
	mkdir "$dir/bin";
	chomp(my $pg_ctl = `which pg_ctl`);
	my ($uid, $gid) = ($>, $) + 0);
	my $where = dirname($bundle);
	PostgreSQL::Test::Utils::append_to_file("$dir/bin/pg_ctl", <<"SH");
#!/bin/sh
exec @namespace sh -c 'mount --bind "$public" "$where" && exec unshare --user --map-user=$uid --map-group=$gid "\$@"' sh "$pg_ctl" "\$@"
SH
	chmod 0755, "$dir/bin/pg_ctl";
	local $ENV{PATH} = "$dir/bin:$ENV{PATH}";
	return $node->start;
}

sub fingerprint { my ($out) = openssl('x509', '-in', $_[0], '-noout', '-fingerprint', '-sha256'); return $out =~ /=([0-9A-F:]+)/ ? $1 : die $out; }

1;
