# Who may do what: every role x every object of schema agentvm x every action is what README's table says, no more and no less
use strict;
use warnings;
use AgentVM::Audit;
use AgentVM::Control;
use AgentVM::Runtime;
use AgentVM::Test;
use FindBin;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

# ---- the README's table: object => { user, admin, gateway, monitor => 'own', 'read all', ... } ----
my %readme;
{
	my ($table) = slurp_file("$FindBin::RealBin/../../README.md") =~ /^### Who may do what\n(.*?)^##/ms or die 'no table in README.md';
	while ($table =~ /^\| `(\w+)(?:\(\))?` \|(.*)\|$/mg)
	{
		my ($object, @cells) = ($1, map { s/^\s+|\s+$//gr } split(/\|/, $2, -1));
		die "two rows for $object" if $readme{$object};
		@{ $readme{$object} }{qw(user admin gateway monitor)} = @cells;
	}
}

# ---- two teams, both with everything, and one that is no more ----
my $node = new_node('main');
$node->safe_psql('postgres', 'CREATE ROLE crew');
my %session;
for my $team (qw(acme globex initech))
{
	$node->safe_psql('postgres', "SELECT agentvm.create_team('$team')");
	$session{$team} = provision($node, $team, "options => '{\"runtime\": true}'");
	await($node, "SELECT running FROM agentvm.session WHERE session_id = '$session{$team}'");
	bootstrap($node, $session{$team});
	next if $team eq 'initech';
	$node->safe_psql('postgres', "SET log_statement = none; SELECT agentvm.set_provider('$team', 'ec2', '{\"region\": \"eu-west-1\"}', '{\"access_key_id\": \"AKIAEXAMPLE\"}');
		SELECT agentvm.create_profile('shape', 'noop', team_id => '$team'); SELECT agentvm.create_team('empty_$team')");
}
$node->safe_psql('postgres', "SELECT agentvm.terminate('$session{initech}')");
await_state($node, $session{initech}, 'terminated');
$node->safe_psql('postgres', q{SELECT agentvm.drop_team('initech'); INSERT INTO agentvm.gateway (gateway_id) VALUES (current_setting('application_name')); INSERT INTO agentvm.sweep_hold (sweep, would_end) VALUES ('heartbeat', 0);
	INSERT INTO agentvm.host (name, directory, vcpus, memory_mib) VALUES ('here', '/tmp', 1, 512)});
my $ending = provision($node, 'acme', q{options => '{"runtime": true, "terminate_delay": "1 day"}'});
await($node, "SELECT running FROM agentvm.session WHERE session_id = '$ending'");
bootstrap($node, $ending);
$node->safe_psql('postgres', "SELECT agentvm.terminate('$ending')");
$node->safe_psql('postgres', "INSERT INTO agentvm.command (command_id, session_id, team_id, kind, role) VALUES (gen_random_uuid(), '$session{$_}', '$_', 'exec', 'somebody')") for qw(acme globex);
$node->safe_psql('postgres', "INSERT INTO agentvm.placement VALUES ('$session{acme}', 'here', 1, 512); INSERT INTO agentvm.session_hydrating VALUES ('$session{acme}', 'infinity')");

$node->safe_psql('postgres', "INSERT INTO agentvm.inventory (account, provider, region, next_at) VALUES ('$_', 'ec2', 'eu-west-1', 'infinity');
	INSERT INTO agentvm.vm_drift (account, provider, region, vm_id, kind, team_id, session_id, vm_state) VALUES ('$_', 'ec2', 'eu-west-1', 'i-$_', 'unknown', '$_', gen_random_uuid(), 'running')") for qw(acme globex);

my $control = AgentVM::Control->new($node);
$control->attach(@session{qw(acme globex)});
mkdir $control->dir . '/d' or die;
append_to_file($control->dir . '/f', 'x');
my %command = map { $_ => $node->safe_psql('postgres', "SELECT agentvm.exec_start('$session{$_}', 'true')") } qw(acme globex);

await($node, $settled, 't', name => 'their history is sealed');

# ---- the roles: the README's column, and the teams it acts for ----
my $admin = { column => 'admin', teams => [qw(acme globex)] };
my %role = (
	superuser => { name => $node->safe_psql('postgres', 'SELECT current_user') },
	admin => { %$admin, sql => 'CREATE ROLE admin IN ROLE agentvm_admin' },
	'a role of an administrator' => { %$admin, name => 'vice', sql => 'CREATE ROLE vice IN ROLE admin' },
	member => { column => 'user', teams => ['acme'], sql => q{CREATE ROLE member IN ROLE agentvm_user; SELECT agentvm.add_member('acme', 'member')} },
	'member of the other team' => { name => 'other', column => 'user', teams => ['globex'], sql => q{CREATE ROLE other IN ROLE agentvm_user; SELECT agentvm.add_member('globex', 'other')} },
	'member by way of a group' => { name => 'grouped', column => 'user', teams => ['acme'], sql => q{CREATE ROLE grouped IN ROLE agentvm_user, crew; SELECT agentvm.add_member('acme', 'crew')} },
	'member of before' => { name => 'former', column => 'user', teams => [], sql => q{CREATE ROLE former IN ROLE agentvm_user; SELECT agentvm.add_member('acme', 'former'); SELECT agentvm.remove_member('acme', 'former')} },
	'member that was dropped and made anew' => { name => 'again', column => 'user', teams => [],
		sql => q{CREATE ROLE again IN ROLE agentvm_user; SELECT agentvm.add_member('acme', 'again'); DROP ROLE again; CREATE ROLE again IN ROLE agentvm_user} },
	'agentvm_user itself' => { name => 'agentvm_user', column => 'user', teams => [] },
	'member that inherits nothing' => { name => 'noinherit', sql => q{CREATE ROLE noinherit NOINHERIT IN ROLE agentvm_user; SELECT agentvm.add_member('acme', 'noinherit')} },
	'member that is no agentvm_user' => { name => 'unable', sql => q{CREATE ROLE unable; SELECT agentvm.add_member('acme', 'unable')} },
	gateway => { column => 'gateway', teams => [qw(acme globex)], sql => 'CREATE ROLE gateway IN ROLE agentvm_gateway' },
	monitor => { column => 'monitor', teams => [qw(acme globex)], sql => 'CREATE ROLE monitor IN ROLE agentvm_monitor' },
	public => { name => 'anybody', sql => 'CREATE ROLE anybody' });
$node->safe_psql('postgres', $role{$_}{sql}) for grep { $role{$_}{sql} } sort { ($a =~ /of an/) <=> ($b =~ /of an/) } keys %role;
$node->safe_psql('postgres', q{GRANT CREATE ON SCHEMA public TO PUBLIC; CREATE ROLE newcomer});

# ---- the objects: those of the catalog, each with a call that works where it may, of the team in place of TEAM ----
my %hash = map { $_ => { token => AgentVM::Runtime::token_hash($node, $session{$_}, 1), session => AgentVM::Runtime::session_hash($session{$_}) } } qw(acme globex);
my %call = (
	provision => q{provision('TEAM')}, provision_warm => q{provision_warm('TEAM')}, terminate => q{terminate('SESSION')}, wait => q{wait('SESSION', 'ready', '1 s')}, await => q{await('SESSION', 'ready', '1 s')},
	status => q{status('SESSION')}, inspect => q{inspect('SESSION')}, extend => q{extend('SESSION', '1 s')}, pause => q{pause('SESSION')}, resume => q{resume('SESSION')}, channel => q{channel('TEAM')},
	map({ $_ => "$_('SESSION', 'true')" } qw(exec exec_bytes exec_start)), map({ $_ => "$_('SESSION', 'COMMAND')" } qw(exec_output exec_wait exec_kill)),
	# its own errors are in its rows
	exec_many => q{SELECT public.raised(m.sqlstate, m.error) FROM agentvm.exec_many('{SESSION}', 'true') m}, run => q{run('TEAM', 'true')},
	upload => q{upload('SESSION', 'f', 'x')}, download => q{download('SESSION', 'f')}, upload_tar => q{upload_tar('SESSION', 'DIR/d', decode(repeat('00', 10240), 'hex'))}, download_tar => q{download_tar('SESSION', 'DIR/d')},
	create_team => q{create_team('new')}, alter_team => q{alter_team('TEAM', limits => '{"max_sessions": 1}')}, drop_team => q{drop_team('empty_TEAM')},
	add_member => q{add_member('TEAM', 'newcomer')}, remove_member => q{remove_member('TEAM', 'member')},
	set_provider => q{set_provider('TEAM', 'ec2', '{"region": "us-east-1"}')}, check_provider => q{check_provider('TEAM', 'noop')}, drop_provider => q{drop_provider('TEAM', 'ec2')},
	create_profile => q{create_profile('new', 'noop', team_id => 'TEAM')}, drop_profile => q{drop_profile('shape', 'TEAM')},
	dispatch => 'dispatch(1)', wake => 'wake()', rotate_keys => 'rotate_keys()', verify_audit => q{verify_audit('TEAM')}, seal_audit => 'seal_audit()', purge => q{purge('100 years')}, sweep_inventory => q{sweep_inventory('TEAM')}, end_vm => q{end_vm('i-TEAM')}, adopt_vm => q{adopt_vm('i-TEAM')}, release_quarantine => 'release_quarantine()', map({ $_ => "$_(1)" } qw(sweep sweep_bootstrap sweep_heartbeat sweep_lifetime)),
	bootstrap => q{bootstrap(TOKEN, HASH, 'boot-1')}, hydrate => 'hydrate(HASH)', authenticate => 'authenticate(HASH)', heartbeat => 'heartbeat(HASH)', heartbeat_batch => q{heartbeat_batch('{SESSION}', ARRAY[now()])}, attach => q{attach('{SESSION}')}, control_key => 'control_key()',
	command_started => q{command_started('SESSION', 'cccccccc-0000-7000-8000-000000000000', 'exec', '{"role": "somebody"}')}, command_ended => q{command_ended('SESSION', 'cccccccc-0000-7000-8000-000000000000', '{}')},
	deadlines => q{deadlines('{SESSION}')}, gateway_channel => 'gateway_channel()',
	adopt_cluster => q{adopt_cluster('takeover')}, abandon => 'abandon()',
	session_is_sound => q{session_is_sound('ready', NULL, NULL, NULL, now())},
	map { $_ => "$_()" } qw(visible_teams sees_all stat_provider_get stat_dispatcher_get health_get cluster_identity session_transition event_is_append_only host_changed guard_drop));
my (%routine, %relation, %number);    # kind, kind, oid
sub catalog { my ($kind, $query) = @_; for (split /\n/, $node->safe_psql('postgres', $query)) { my @row = split /\|/; ($kind->{ $row[0] }, $number{ $row[0] }) = @row[ 1, 2 ]; } return; }
catalog(\%routine, q{SELECT proname, prokind, oid FROM pg_proc WHERE pronamespace = 'agentvm'::regnamespace});
catalog(\%relation, q{SELECT relname, relkind, oid FROM pg_class WHERE relnamespace = 'agentvm'::regnamespace AND relkind NOT IN ('i', 'I', 'c', 't')});
is_deeply([ sort keys %readme ], [ sort(keys %routine, keys %relation) ], "README's table has a row for every function, procedure, table, view and sequence, and no other");
is_deeply([ sort keys %call ], [ sort keys %routine ], 'and this test calls every routine');
# those of whole lists, also up to "..."
my %arguments;
push @{ $arguments{ $_->[0] } }, $_->[1] // '' for map { [ split /\|/ ] } split /\n/, $node->safe_psql('postgres', q{SELECT proname, (SELECT string_agg(name, ', ' ORDER BY n) FROM unnest(proargnames, proargmodes) WITH ORDINALITY a (name, mode, n)
	WHERE coalesce(mode, 'i') IN ('i', 'b')) FROM pg_proc WHERE pronamespace = 'agentvm'::regnamespace});
my ($functions) = slurp_file("$FindBin::RealBin/../../README.md") =~ /^## SQL functions\n(.*?)^## /ms or die 'no functions in README.md';
my @told = $functions =~ /`(?:CALL )?(\w+\([^)`]*\))/g;
cmp_ok(scalar(@told), '>', 50, "README's tables of functions");
is(join(' ', grep { my ($name, $list, $more) = /^(\w+)\((.*?)(,? ?\.\.\.)?\)$/; $list ne '' && !grep { $_ eq $list || ($more && index($_, $list) == 0) } @{ $arguments{$name} // [] } } @told), '', 'have the names of their arguments');
is($node->safe_psql('postgres', q{SELECT proname, count(*), count(DISTINCT proacl::text) FROM pg_proc WHERE pronamespace = 'agentvm'::regnamespace GROUP BY 1 HAVING count(*) > 1}), 'download|2|1', 'no two of them have the same name, but for download(), where both forms have the same rights');
is($node->safe_psql('postgres', q{SELECT string_agg(pg_describe_object(classid, objid, 0), ', ') FROM pg_depend WHERE refclassid = 'pg_extension'::regclass AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'agentvm')
	AND classid NOT IN ('pg_proc'::regclass, 'pg_class'::regclass, 'pg_namespace'::regclass, 'pg_type'::regclass)}), 'event trigger agentvm_guard_drop', 'nor has the extension objects of another kind, but for the one that guards it');

# ---- what really happens ----
# What a statement comes to, undone at once: 'works', or the SQLSTATE and message
$node->safe_psql('postgres', <<'SQL');
CREATE FUNCTION public.try(statement text, OUT outcome text) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE statement;
	RAISE EXCEPTION USING ERRCODE = 'ZZ000';
EXCEPTION WHEN OTHERS THEN
	outcome := CASE SQLSTATE WHEN 'ZZ000' THEN 'works' ELSE SQLSTATE || ' ' || SQLERRM END;
END
$$;
CREATE FUNCTION public.raised(sqlstate text, error text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	IF sqlstate IS NOT NULL THEN RAISE EXCEPTION USING ERRCODE = sqlstate, MESSAGE = error; END IF;
END
$$;
CREATE FUNCTION public.look(relation text, OUT seen text) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('SELECT coalesce(jsonb_agg(t::text), ''[]'') FROM agentvm.%I t', relation) INTO seen;
EXCEPTION WHEN OTHERS THEN
	seen := SQLSTATE || ' ' || SQLERRM;
END
$$;
SQL

sub filled
{
	my ($team, $call) = @_;
	my %value = (TEAM => $team, SESSION => $session{$team}, TOKEN => $hash{$team}{token}, HASH => $hash{$team}{session}, COMMAND => $command{$team}, DIR => $control->dir);
	return $call =~ s/(TEAM|SESSION|TOKEN|HASH|COMMAND|DIR)/$value{$1}/gr;
}

# The answers of one role to many questions; a question is SQL with one column
sub answers
{
	my ($role, @questions) = @_;
	my $json = $node->safe_psql('postgres', "SET client_min_messages = error; SET SESSION AUTHORIZATION $role; SELECT to_json(ARRAY[" . join(",\n", map { "($_)::text" } @questions) . "])");
	return @{ decode_json($json) };
}

# 'works'; 'denied': not allowed to at all; 'no such': as if it did not exist; else the error
sub outcome
{
	my ($answer) = @_;
	return 'works' if $answer eq 'works' || $answer =~ /^55000 agentvm\.run\(\) needs/;    # a VM of noop, which has no runtime
	return 'denied' if $answer =~ /^42501 permission denied/;
	return 'no such' if $answer =~ /^AV005 session \S+ does not exist$|^42704 team "\w+" does not exist$/;
	return $answer;
}

sub groups_of { my ($n, @list) = @_; return map { [ @list[ $_ * $n .. $_ * $n + $n - 1 ] ] } 0 .. @list / $n - 1; }

my @tables = grep { $relation{$_} eq 'r' } sort keys %relation;
my @readable = grep { $relation{$_} ne 'S' } sort keys %relation;
my @functions = grep { $routine{$_} eq 'f' } sort keys %routine;
my @privileges = qw(SELECT INSERT UPDATE DELETE TRUNCATE REFERENCES TRIGGER);
push @privileges, 'MAINTAIN' if $node->safe_psql('postgres', 'SHOW server_version_num') >= 170000;
my %column = map { split /\|/ } split /\n/, $node->safe_psql('postgres', q{SELECT DISTINCT ON (relname) relname, attname FROM pg_class c JOIN pg_attribute a ON attrelid = c.oid AND attnum > 0 AND NOT attisdropped WHERE relnamespace = 'agentvm'::regnamespace AND relkind = 'r' ORDER BY relname, attnum DESC});
my %everything;    # relation => how many rows the superuser sees there, of which teams

# role => { object => what it may do }
sub found
{
	my ($role) = @_;
	my %found;

	# routines: as called for either team
	my @answers = answers($role, map { my $f = $_; map { 'public.try(' . literal(($call{$f} =~ /^SELECT/ ? '' : 'SELECT agentvm.') . filled($_, $call{$f})) . ')' } qw(acme globex) } @functions);
	@found{@functions} = map { join ', ', map { outcome($_) } @$_ } groups_of(2, @answers);
	for my $procedure (grep { $routine{$_} eq 'p' } sort keys %routine)
	{
		$found{$procedure} = join ', ', map {
			my ($code, $out, $error) = $node->psql('postgres', "\\set VERBOSITY verbose\nSET SESSION AUTHORIZATION $role;\nCALL agentvm." . filled($_, $call{$procedure}));
			outcome($error =~ /ERROR:  (\w+): (.*)/ ? "$1 $2" : $code ? $error : 'works');
		} qw(acme globex);
	}

	@answers = answers($role, map { "has_function_privilege($number{$_}, 'EXECUTE')" } sort keys %routine);
	$found{$_} .= shift @answers eq 'true' ? ' EXECUTE' : '' for sort keys %routine;

	# relations: whose rows are seen, and which rights there are
	@answers = answers($role, map { "public.look('$_')" } @readable);
	my @has = groups_of(scalar @privileges, answers($role, map { my $r = $number{$_}; map { (/^(?:SELECT|INSERT|UPDATE|REFERENCES)$/ ? 'has_any_column_privilege' : 'has_table_privilege') . "($r, '$_')" } @privileges } @readable));
	for my $i (0 .. $#readable)
	{
		my $relation = $readable[$i];
		my @rights = map { $has[$i][$_] eq 'true' ? $privileges[$_] : () } 0 .. $#privileges;
		my $rows = $answers[$i] =~ /^\[/ ? decode_json($answers[$i]) : undef;
		my @of = $rows ? grep { my $team = $_; grep { /\b\Q$team\E\b|\Q$session{$team}\E/ } @$rows } sort keys %session : ();
		$everything{$relation} //= $rows && { rows => scalar @$rows, teams => \@of };
		my $seen = !$rows ? outcome($answers[$i]) : @{ $everything{$relation}{teams} } ? "rows of @of" : @$rows == $everything{$relation}{rows} ? 'all rows' : scalar(@$rows) . ' rows';
		$found{$relation} = join ' ', $seen, @rights;
	}

	# tables: what these rights come to
	my @writes = ('INSERT INTO agentvm.%s DEFAULT VALUES', 'UPDATE agentvm.%s SET %s = DEFAULT', 'DELETE FROM agentvm.%s', 'TRUNCATE agentvm.%s');
	no warnings 'redundant';
	my @writers = groups_of(scalar @writes, answers($role, map { my $t = $_; map { 'public.try(' . literal(sprintf($_, $t, $column{$t})) . ')' } @writes } @tables));
	$found{ $tables[$_] } .= ': ' . join ' ', map { outcome($_) eq 'denied' ? 0 : 1 } @{ $writers[$_] } for 0 .. $#tables;

	# the sequence, the schema
	my @sequences = grep { $relation{$_} eq 'S' } sort keys %relation;
	$found{$_} = join ' ', map { outcome($_) } answers($role, map { 'public.try(' . literal($_) . ')' } "SELECT nextval('agentvm.$_')", "SELECT setval('agentvm.$_', 1000000)", "SELECT last_value FROM agentvm.$_") for @sequences;
	$found{'(schema)'} = join ' ', map { outcome($_) } answers($role, map { 'public.try(' . literal($_) . ')' } 'CREATE TABLE agentvm.mine ()', 'CREATE FUNCTION agentvm.mine() RETURNS int LANGUAGE sql AS $$ SELECT 1 $$');
	return \%found;
}

# The same, from README's words
sub expected
{
	my ($role) = @_;
	my %expected;
	my $super = !$role->{column} && !$role->{sql};
	my %mine = map { $_ => 1 } $super ? qw(acme globex) : @{ $role->{teams} // [] };
	foreach my $object (keys %readme)
	{
		my $cell = $super ? 'all' : $role->{column} ? $readme{$object}{ $role->{column} } // die "no cell for $object" : '';
		if ($routine{$object})
		{
			$expected{$object} = join(', ', map { $cell eq '' ? 'denied' : $cell eq 'own' ? ($mine{$_} ? 'works' : 'no such') : $cell =~ /^(?:all|yes)$/ ? 'works' : "README says \"$cell\"" } qw(acme globex)) . ($cell eq '' ? '' : ' EXECUTE');
			next;
		}
		if ($relation{$object} eq 'S')
		{
			$expected{$object} = $super ? 'works works works' : 'denied denied denied';
			next;
		}
		my ($right, $whose) = $cell =~ /^(?:(read|write|add) )?(own|all)$/;
		die "README says \"$cell\" of $object" if $cell ne '' && !$whose;
		my @all = @{ $everything{$object}{teams} };
		my @teams = grep { $whose && ($whose eq 'all' || $mine{$_}) } @all;
		my @rights = $super ? @privileges : !$right ? () : $right eq 'read' ? ('SELECT') : $right eq 'add' ? qw(SELECT INSERT) : qw(SELECT INSERT UPDATE DELETE);
		$expected{$object} = join ' ', !@rights ? 'denied' : @all ? "rows of @teams" : 'all rows', @rights;
		$expected{$object} .= ': ' . ($super ? '1 1 1 1' : @rights == 4 ? '1 1 1 0' : @rights == 2 ? '1 0 0 0' : '0 0 0 0') if $relation{$object} eq 'r';
	}
	$expected{'(schema)'} = $super ? 'works works' : 'denied denied';
	return \%expected;
}

for my $role (sort { ($b eq 'superuser') <=> ($a eq 'superuser') || $a cmp $b } keys %role)
{
	my $found = found($role{$role}{name} // $role);
	my $expected = expected($role{$role});
	if ($role eq 'superuser')
	{
		# the triggers' functions may be called, and decline
		like(delete $found->{session_transition}, qr/^39P01 .* is a trigger/, 'a trigger function called by hand');
		like(delete $found->{event_is_append_only}, qr/^39P01 .* is a trigger/, 'another one');
		like(delete $found->{host_changed}, qr/^39P01 .* is a trigger/, 'a third one');
		like(delete $found->{guard_drop}, qr/^39P01 .* is an event trigger/, 'a fourth one');
		delete @$expected{qw(session_transition event_is_append_only host_changed guard_drop)};
		is(join(' ', grep { !$everything{$_}{rows} && $_ ne 'stat_provider' } @readable), '', 'every table and view has rows to be seen');
	}
	is(join("\n", map { ($found->{$_} // 'nothing') eq ($expected->{$_} // 'nothing') ? () : "$_: $found->{$_} (README: $expected->{$_})" } sort(keys %$expected)), '', "$role: exactly what README's table says");
}
done_testing();
