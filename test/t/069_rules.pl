# Rules about the sources that only reading can hold, and test/RULES.md: every test that it names is there
use strict;
use warnings;
use Digest::SHA qw(sha256_hex);
use File::Basename qw(dirname);
use PostgreSQL::Test::Utils;
use Test::More;

my $root = dirname(__FILE__) . '/../..';
my %source = map { (s{^\Q$root\E/}{}r => slurp_file($_)) } glob("$root/src/*.[ch] $root/src/*/*.[ch]");
delete @source{ grep { m{^src/(gateway|runtime|common)/} } keys %source };    # other programs
my $string = qr/"(?:[^"\\]|\\.)*"/s;
my $parens;
$parens = qr/\((?:[^()"]|$string|(??{ $parens }))*\)/s;

# The sources without comments, lines kept
my %code = map { my $text = $source{$_}; $text =~ s{($string)|/\*.*?\*/}{ my $kept = $1; $kept // ($& =~ s/[^\n]//gr) }gse; ($_ => $text) } keys %source;

# Where in the code something is that should not be
sub nowhere
{
	my ($name, $pattern, %opt) = @_;
	my @found;
	foreach my $file (sort keys %code)
	{
		next if $opt{except} && $file =~ $opt{except} || $opt{only} && $file !~ $opt{only};
		while ($code{$file} =~ /$pattern/g) { push @found, "$file:" . (1 + (substr($code{$file}, 0, $-[0]) =~ tr/\n//)) . ": $&"; }
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(join("\n", @found), '', $name);
}

# ---- messages ----
my @wrong;
foreach my $file (sort keys %code)
{
	while ($code{$file} =~ /\bereport($parens)/g)
	{
		my $where = "$file:" . (1 + (substr($code{$file}, 0, $-[0]) =~ tr/\n//));
		my $call = $1;
		my ($level) = $call =~ /^\(\s*(.*?),/s;
		my $text = sub { return map { join('', map { s/^"|"$//gr } /$string/g) } $call =~ /\b$_[0]\(\s*((?:$string\s*)+)/g; };
		push @wrong, "$where: no errcode" if $call !~ /errcode/ && $level !~ /^(LOG|NOTICE|DEBUG\d)$/;
		push @wrong, map { "$where: $_" } grep { /\.$|^[A-Z][a-z]/ } $text->('errmsg(?:_internal)?');
		push @wrong, map { "$where: $_" } grep { $_ ne '%s' && !/^[A-Z%].*[.?]$/s } $text->('err(?:detail|hint)');
	}
}
is(join("\n", @wrong), '', 'each error has a code, a message without a period, and whole sentences as detail and hint');

# ---- versions of PostgreSQL ----
nowhere('only compat.h knows of versions of PostgreSQL', qr/\bPG_VERSION_NUM\b/, except => qr/compat\.h$/);

# ---- waiting ----
nowhere('every wait is on the latch of the process', qr/\bWaitLatch(?:OrSocket)?\(\s*+(?!MyLatch\b)/);
nowhere('and ends when the postmaster dies', qr/\bWaitLatch(?:OrSocket)?\((?!(?:[^;]*WL_EXIT_ON_PM_DEATH|\s*MyLatch, events,))/);
nowhere('no latch of our own', qr/\b(?:Init|Own|Disown|InitShared)Latch\b|\bpg_usleep\b/);
is(join(' ', grep { $code{$_} =~ /\bWaitLatch/ && $code{$_} !~ /\bCHECK_FOR_INTERRUPTS\(\)/ } sort keys %code), '', 'who waits looks for interrupts');
nowhere('no process is killed', qr/\bSIGKILL\b/);

# ---- libraries ----
my $callbacks = join('|', qw(on_socket on_timer on_open on_send on_body on_header secret_free secret_realloc));
foreach my $callback (split /\|/, $callbacks)
{
	my $file = $callback =~ /^secret/ ? 'src/secret/secret.c' : 'src/net/http.c';
	my ($body) = $code{$file} =~ /^$callback\(.*?^\{(.*?)^\}/ms;
	isnt($body // '', '', "$file has $callback()");
	unlike($body // '', qr/\b(?:ereport|elog|palloc\w*|pfree|CHECK_FOR_INTERRUPTS|MemoryContext\w*)\b/, 'in which nothing raises');
}
my @set = $code{'src/net/http.c'} =~ /CURL(?:M?OPT_\w*FUNCTION), (\w+)\)/g;
is(join(' ', grep { !/^($callbacks)$/ } @set), '', 'and no other callbacks');
my ($threads) = $source{'src/engine/threads.c'} =~ m{/\* ---- threads; no PostgreSQL here ---- \*/(.*?)/\* ---- the main thread ---- \*/}s;
unlike($threads // 'ereport', qr/\b(?:ereport|elog|palloc\w*|pstrdup|psprintf|pfree|CHECK_FOR_INTERRUPTS|MemoryContext\w*|LWLock\w*|SetLatch)\b/, 'what runs on threads calls nothing of PostgreSQL');
my @included = map { my $file = $_; map { "$file: $_" } $source{$file} =~ /^#include "(.*)"/mg } grep { m{/(?:libvirt_\w+\.[ch]|libvirt\.h|blocking\.h|error_class\.h|signals\.h)$} } sort keys %source;
is(join(' ', grep { !m{: (?:providers/(?:libvirt\w*|blocking|error_class)|signals)\.h$} } @included), '', 'nor does that side of the provider libvirt know anything of it');
nowhere('libcurl is set up in one place', qr/\bcurl_global_init\w*/, except => qr/^src\/net\/http\.c$/);
like($code{'src/net/http.c'}, qr/CURLOPT_$_\)?, \w/, "CURLOPT_$_ is set") for qw(NOSIGNAL FOLLOWLOCATION);
nowhere('callbacks of transactions are registered when the library is loaded', qr/\bRegister(?:Sub)?XactCallback\b/, except => qr{^src/(?:engine/wake|engine/database_hook|secret/keyring)\.c$});

# ---- scripts ----
foreach my $script (glob("$root/sql/*.sql"))
{
	my $name = $script =~ s{.*/}{}r;
	next if $name =~ /--.*--/;    # an upgrade has to
	my $text = slurp_file($script) =~ s/--[^\n]*//gr;
	unlike($text, qr/CREATE OR REPLACE|IF NOT EXISTS|DROP \w+ IF EXISTS/i, "$name takes over nothing that is there");
}
my %released = (
	'agentvm--0.1.sql' => '4e27cfb6e50331c8bee25afa3a26b32eefbafe6685064f30283711ecd88a9632',
	'agentvm--0.1--0.2.sql' => '89772985dc50e3911d8e56db3943858f4d982246a8c649ef7710a26a27de4add',
	'agentvm--0.2.sql' => '0df6576c8f05123d2fffbb45cb85040e98fefa290ff40eadbfa03d0983619c98');
is(sha256_hex(slurp_file("$root/sql/$_")), $released{$_}, "$_ is as it was released") for sort keys %released;

# ---- test/RULES.md ----
my $rules = slurp_file("$root/test/RULES.md");
foreach my $line (split /\n/, $rules)
{
	my ($rule, $tests) = $line =~ /^- (.*): ((?:`\w+`(?:, )?)+)$/ or ($line !~ /^- / or fail("a rule names its tests: $line")) && next;
	is(join(' ', grep { my $test = $_; $test ne 'lint' && !grep { -e "$root/test/$_" } "t/$test.pl", "long/$test.pl", "sql/$test.sql", "specs/$test.spec" } $tests =~ /`(\w+)`/g), '', $rule);
}

done_testing();
