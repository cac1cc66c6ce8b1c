# The mux of the cable between a VM and a gateway, alone: see test/fuzz/mux.c
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;

my $program = PostgreSQL::Test::Utils::tempdir() . '/mux';
my $sources = join(' ', map { "$ENV{TESTDIR}/$_" } 'test/fuzz/mux.c', 'src/common/mux.c');
is(system("cc -g -O1 -DSTANDALONE -fsanitize=address,undefined -fno-sanitize-recover=all -o $program $sources"), 0, 'built with AddressSanitizer and UBSan');
my ($out, $error) = run_command([ $program, 1, 1500 ]);
is($out, '1500 rounds from seed 1', 'no byte is lost, doubled or in the wrong stream, whatever happens') or diag($error);
done_testing();
