# The inside of a VM: the real runtime, as a process of this machine, with a session's boot payload. For noop sessions,
# where there is no VM.
#
#	my $vm = AgentVM::VM->new($gateway->url, bootstrap_token($node, $session), MORE => 'setting');   # without AGENTVM_
#	$vm->start;
#	my $vm = AgentVM::VM->boot($node, $gateway, $session, MORE => 'setting');   # both at once, when its launch is over; with its work directory
#	$vm->file('state/session.json');          # its content; file_mode() likewise
#	$vm->is_off;                              # whether it has been powered off: it would run a program of ours
package AgentVM::VM;

use strict;
use warnings;
use parent 'AgentVM::Process';
use AgentVM::Runtime qw(bootstrap_token);
use AgentVM::Test qw(await);
use File::Basename qw(dirname);
use PostgreSQL::Test::Utils ();
use Test::More;
use Time::HiRes qw(sleep time);

our $binary = dirname(__FILE__) . '/../../../src/runtime/agentvm-runtime';

sub new
{
	my ($class, $url, $token, %settings) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir('vm');
	my $self = $class->SUPER::new('runtime', $binary, "--config=$dir/runtime.env");
	$self->{dir} = $dir;
	PostgreSQL::Test::Utils::append_to_file("$dir/poweroff", "#!/bin/sh\necho off >> $dir/off\n");
	chmod(0700, "$dir/poweroff");
	$self->{settings} = {
		GATEWAY_URL => $url, BOOTSTRAP_TOKEN => $token, STATE_DIR => "$dir/state", WORK_DIR => "$dir/work", POWEROFF_COMMAND => "$dir/poweroff",
		BOOTSTRAP_INTERVAL => 0.2, BOOTSTRAP_TRIES => 1000, HTTP_TIMEOUT => 5, BACKOFF_MIN => 0.1, BACKOFF_MAX => 0.5, POWEROFF_RETRY => 1, LOG_LEVEL => 'debug', %settings
	};
	$self->write_settings;
	return $self;
}

sub boot
{
	my ($class, $node, $gateway, $session, %settings) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$session'", 't', name => 'a VM');
	my $self = $class->new($gateway->url, bootstrap_token($node, $session), %settings);
	mkdir $self->dir . '/work';
	return $self->start;
}

# runtime.env anew, as the boot script would write it; undefined settings are left out
sub write_settings
{
	my ($self, %changes) = @_;
	my $settings = { %{ $self->{settings} }, %changes };
	unlink "$self->{dir}/runtime.env";
	PostgreSQL::Test::Utils::append_to_file("$self->{dir}/runtime.env", join('', map { defined $settings->{$_} ? "AGENTVM_$_=$settings->{$_}\n" : () } sort keys %$settings));
	chmod(0600, "$self->{dir}/runtime.env");
	return $self;
}

sub dir { return $_[0]{dir}; }
sub file { return PostgreSQL::Test::Utils::slurp_file("$_[0]{dir}/$_[1]"); }
sub file_mode { return sprintf('%04o', (stat("$_[0]{dir}/$_[1]"))[2] & 07777); }
sub is_off { return -e "$_[0]{dir}/off"; }

# A check: waits until it powers off
sub goes_off
{
	my ($self, $name) = @_;
	my $end = time + AgentVM::Process::timeout();
	sleep 0.02 until $self->is_off || time > $end;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($self->is_off, $name) || diag($self->output);
}

1;
