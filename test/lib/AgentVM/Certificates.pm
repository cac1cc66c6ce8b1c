# Certificates of a test's own, in a directory of its own.
#
#	my $ca = authority('ca');                                              # a file of PEM
#	my $pair = certificate('good', 'ca', 'IP:127.0.0.1, DNS:a.test');      # [certificate, key]; good for 10 days, or so many
#	fingerprint($pair->[0]);                                               # SHA-256, in hex with colons
#	certificate_directory();                                               # where they are: good.pem, good.key
package AgentVM::Certificates;

use strict;
use warnings;
use Exporter 'import';
use PostgreSQL::Test::Utils ();
use Test::More;

our @EXPORT = qw(authority certificate certificate_directory fingerprint);

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

sub fingerprint { my ($out) = openssl('x509', '-in', $_[0], '-noout', '-fingerprint', '-sha256'); return $out =~ /=([0-9A-F:]+)/ ? $1 : die $out; }

1;
