#!/usr/bin/env bash
# Inside the machine of 153_units.pl, as root, under its systemd: does what the comments of the units say, and looks at what
# has come of it. A line "units: ok - ..." or "units: not ok - ..." on the console is a check of the test.
set -u -o pipefail
exec >/dev/console 2>&1 </dev/null
images=/var/cache/agentvm/images/micro
bin=$(echo /usr/lib/postgresql/*/bin)
version=$(basename "${bin%/bin}")
server=postgresql@$version-main.service
export PATH=$bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8

say() { printf 'units: %s\n' "$@"; }

# A check: what the command says, within so many seconds
says() { # SECONDS WANTED NAME COMMAND...
	local end=$((SECONDS + $1)) wanted=$2 name=$3 said
	shift 3
	until said=$("$@" 2>&1) && [[ $said == "$wanted" ]]; do
		if ((SECONDS >= end)); then
			say "not ok - $name" "  at $SECONDS s, wanted: $wanted" "  have: ${said//$'\n'/$'\n'units: }"
			return 1
		fi
		sleep 0.2
	done
	say "ok - $name" "  at $SECONDS s"
}
is() { says 0 "$@"; }
works() { is '' "$@"; }

sql() { runuser -u postgres -- psql -XAtq -v ON_ERROR_STOP=1 -d app <<<"$1"; }
told() { sed -n 's/^#   //p' "/etc/systemd/system/$1"; } # what a unit's comment says to do
property() { systemctl show --value -p "$2" "$1"; }
process() { property "$1" MainPID; }
exit_of() { echo "$(property "$1" ExecMainCode) $(property "$1" ExecMainStatus)"; } # 1: it has exited
group() { sed -n 's/^0:://p' "/proc/$1/cgroup"; }
qemu() { pgrep -f "^/[a-z/]*bin/qemu-system-x86_64 -name guest=agentvm-$1"; }
session() { sql "SELECT $2 FROM agentvm.sessions WHERE session_id = '$1'"; }
host() { sql "SELECT agentvm.check_provider('acme') -> 'hosts' -> '$1' $2"; }
provision() { sql "SELECT agentvm.provision('acme', profile => 'micro')"; }
free() { ! grep " 03 .*/var/lib/agentvm/vms/$1.sock$" /proc/net/unix; }
ended() { [[ ! -e /proc/$1 ]]; }
files() { ls -A "$1"; }
# connections to the VM's socket that its QEMU has taken
connections() { grep -c " 03 .*/var/lib/agentvm/vms/$1.sock$" /proc/net/unix; }
certificate() { # FILE NAME OWNER
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=$2" -addext "subjectAltName=DNS:$2" -out "$1.crt" -keyout "$1.key" 2>/dev/null
	chown "$3" "$1.key"
}
fingerprint() { openssl x509 -noout -fingerprint -in "$1"; }
served() { openssl s_client -connect 127.0.0.1:8443 </dev/null 2>/dev/null | openssl x509 -noout -fingerprint; }

prepare() {
	mkdir -p /etc/agentvm
	groupadd --system kvm # which comes with udev
	told agentvm-gateway.service | grep -v ^AGENTVM_ | bash -eux
	told agentvm-libvirtd.service | sed '/^INSERT/,$d' | bash -eux
	# the settings as they stand there, without the remarks behind
	told agentvm-gateway.service | sed -n '/^AGENTVM_/s/   .*//; /^AGENTVM_/p' >/etc/agentvm/gateway.env
	install -o agentvm-gateway -m 600 /dev/stdin /etc/agentvm/gateway.pass <<<'*:*:*:gw1:secret'
	certificate /etc/agentvm/first gateway.internal agentvm-gateway
	certificate /etc/agentvm/second gateway.internal agentvm-gateway
	certificate /etc/postgresql/server db.internal postgres
	cp /etc/postgresql/server.crt /etc/agentvm/database-ca.crt
	echo '127.0.0.1 db.internal gateway.internal' >>/etc/hosts
	install -o postgres -m 600 /dev/stdin /etc/postgresql/agentvm.keys <<<"k1:$(openssl rand -base64 32)"

	pg_createcluster "$version" main
	cat >"/etc/postgresql/$version/main/conf.d/agentvm.conf" <<-'END'
		shared_preload_libraries = 'agentvm'
		agentvm.databases = 'app'
		agentvm.key_file = '/etc/postgresql/agentvm.keys'
		agentvm.provider_libraries = 'agentvm_libvirt'
		agentvm.gateway_url = 'https://gateway.internal:8443'
		agentvm.gateway_ca_file = '/etc/agentvm/second.crt'
		agentvm.bootstrap_timeout = '30min'
		ssl = on
		ssl_cert_file = '/etc/postgresql/server.crt'
		ssl_key_file = '/etc/postgresql/server.key'
	END
	systemctl daemon-reload
	systemctl start postgresql
	runuser -u postgres -- createdb app
	sql "CREATE EXTENSION agentvm CASCADE;
		CREATE ROLE gw1 LOGIN IN ROLE agentvm_gateway PASSWORD 'secret';
		INSERT INTO agentvm.gateway (gateway_id) VALUES ('gw1');
		SELECT FROM agentvm.create_team('acme', provider => 'libvirt');
		SELECT FROM agentvm.set_provider('acme', 'libvirt', options => '{\"kernel\": \"$images/kernel\", \"initrd\": \"$images/initrd\"}');
		SELECT FROM agentvm.create_profile('micro', 'libvirt', memory_mib => 256);"
	sql "$(told agentvm-libvirtd.service | sed -n '/^INSERT/,$p')"
}

gateway() {
	local pid
	ln -s first.crt /etc/agentvm/gateway.crt
	ln -s first.key /etc/agentvm/gateway.key
	works 'agentvm-gateway starts: it has said that it is ready' systemctl --quiet enable --now agentvm-gateway
	pid=$(process agentvm-gateway)
	says 60 '' 'and has its database' curl -sSkfo /dev/null https://127.0.0.1:8443/readyz
	is "$(fingerprint /etc/agentvm/first.crt)" 'its certificate' served
	ln -sf second.crt /etc/agentvm/gateway.crt
	ln -sf second.key /etc/agentvm/gateway.key
	works 'systemctl reload' systemctl reload agentvm-gateway
	says 30 "$(fingerprint /etc/agentvm/second.crt)" 'has it read another one' served
	is "$pid" 'in the same process' process agentvm-gateway
}

# Commands through the control socket, to the runtime of a VM that only pretends: the machine that it is in is this one
runtime() {
	local id key token pid
	is 'agentvm-gateway postgres 660' "the control socket is for PostgreSQL's group, also after a reload" stat -c '%U %G %a' /run/agentvm-gateway/control
	sql "UPDATE agentvm.gateway SET control_address = 'unix:/run/agentvm-gateway/control';
		SELECT FROM agentvm.create_team('here'), agentvm.create_profile('here', 'noop', options => '{\"runtime\": true}', runtime => true)"
	id=$(sql "SELECT agentvm.provision('here', profile => 'here')")
	says 60 t 'a session with a runtime' sql "SELECT running FROM agentvm.session WHERE session_id = '$id'"
	key=$(sed -n 's/^k1://p' /etc/postgresql/agentvm.keys | base64 -d | od -An -v -tx1 | tr -d ' \n')
	token=$(printf '%s:1' "$id" | openssl dgst -sha256 -mac HMAC -macopt "hexkey:$key" -r | cut -d' ' -f1)
	mkdir -p /workspace
	install -m 600 /dev/stdin /etc/agentvm/runtime.env <<-END
		AGENTVM_GATEWAY_URL=https://gateway.internal:8443
		AGENTVM_CA_FILE=/etc/agentvm/second.crt
		AGENTVM_BOOTSTRAP_TOKEN=$token
		AGENTVM_PIDS_LIMIT=77
	END
	works 'agentvm-runtime starts' systemctl --quiet enable --now agentvm-runtime
	says 60 ready 'and its session is ready' session "$id" state
	pid=$(process agentvm-runtime)
	is /system.slice/agentvm-runtime.service/runtime 'it has moved into a group below its own' group "$pid"
	says 60 /system.slice/agentvm-runtime.service/commands 'a command, asked for by its socket, has one beside it' \
		sql "SELECT substring(stdout FROM '^0::(.*)/[0-9a-f-]{36}') FROM agentvm.exec('$id', 'cat /proc/self/cgroup')"
	is 77 'with a bound of processes' cat /sys/fs/cgroup/system.slice/agentvm-runtime.service/commands/pids.max
	is t 'a file goes in and out' sql "SELECT agentvm.upload('$id', '/root/file', 'content') = 7 AND agentvm.download('$id', '/root/file') = 'content'"
	kill -KILL "$pid"
	says 60 '' 'it is killed' ended "$pid"
	says 60 active 'and started anew' property agentvm-runtime ActiveState
	says 60 /system.slice/agentvm-runtime.service/commands 'with commands as before' \
		sql "SELECT substring(stdout FROM '^0::(.*)/[0-9a-f-]{36}') FROM agentvm.exec('$id', 'cat /proc/self/cgroup')"
	is t 'terminate()' sql "SELECT agentvm.terminate('$id')"
	says 60 inactive 'ends it' property agentvm-runtime ActiveState
	is '1 0' 'by itself, with 0' exit_of agentvm-runtime
}

outside() {
	local id vm libvirtd postmaster
	works 'agentvm-libvirtd starts' systemctl --quiet enable --now agentvm-libvirtd
	says 60 true 'check_provider() has nothing to say against the host' host here "->> 'ok'"
	is '[]' 'no warning either' host here "->> 'warnings'"
	id=$(provision)
	# emulated on an emulated processor, its kernel takes minutes to boot: nobody waits for its runtime here
	says 120 t 'a VM runs' session "$id" 'vm_id IS NOT NULL'
	says 30 1 'agentvm-gateway has connected to its socket' connections "$id"
	vm=$(qemu "$id")
	is agentvm-vm "its QEMU is not the server's user" stat -c %U "/proc/$vm"
	is "/agentvm.slice/agentvm-libvirtd.service" "and in the service of libvirtd" group "$vm"
	postmaster=$(process "$server")
	is "/system.slice/system-postgresql.slice/$server" 'while the server is in its own' group "$postmaster"
	is 0 'without its OOM score' cat "/proc/$vm/oom_score_adj"

	works 'systemctl restart postgresql' systemctl restart postgresql
	[[ $(process "$server") != "$postmaster" ]] || say "not ok - the server has not been restarted"
	is "$vm" 'the VM has outlived it' qemu "$id"
	says 60 running 'and is known again' sql "SELECT agentvm.inspect('$id') ->> 'state'"
	is t 'its session goes on' session "$id" "state IN ('provisioning', 'ready')"

	libvirtd=$(process agentvm-libvirtd)
	works 'systemctl restart agentvm-libvirtd' systemctl restart agentvm-libvirtd
	ended "$libvirtd" || say "not ok - libvirtd has not been restarted"
	is "$vm" 'the VM has outlived that, too' qemu "$id"
	says 60 running 'and is known again' sql "SELECT agentvm.inspect('$id') ->> 'state'"

	works 'systemctl stop agentvm-gateway' systemctl stop agentvm-gateway
	is '1 0' 'it has exited by itself, with 0' exit_of agentvm-gateway
	says 30 '' 'the VM is free' free "$id"
	works 'and starts again' systemctl start agentvm-gateway
	says 30 1 'and has connected to the VM that is there' connections "$id"

	is t 'terminate()' sql "SELECT agentvm.terminate('$id')"
	says 60 terminated 'ends it' session "$id" state
	works 'its process is gone' ended "$vm"
	works 'and its files' files /var/lib/agentvm/vms
}

# What the unit is for: with the libvirtd that the server starts by itself
inside() {
	local id vm
	works 'systemctl stop agentvm-libvirtd' systemctl stop agentvm-libvirtd
	install -d -o postgres -m 700 /var/lib/postgresql/vms
	sql "UPDATE agentvm.host SET enabled = false; INSERT INTO agentvm.host (name, directory, vcpus, memory_mib) VALUES ('inside', '/var/lib/postgresql/vms', 1, 256)"
	says 60 cgroup 'check_provider() warns of a libvirtd in the server'\''s service' host inside "#>> '{warnings,0,what}'"
	id=$(provision)
	says 120 t 'a VM there' session "$id" 'vm_id IS NOT NULL'
	vm=$(qemu "$id")
	is "$(group "$(process "$server")")" 'is in the service, too' group "$vm"
	systemctl restart postgresql
	works 'and ends with it' ended "$vm"
}

finish() {
	journalctl --no-pager -o cat -p warning | tail -30
	tail -n 5 /var/cache/agentvm-vm/libvirt/qemu/log/*.log /var/lib/postgresql/.cache/libvirt/qemu/log/*.log
	say end
	systemctl --force --force poweroff
}
trap finish EXIT
prepare
gateway
runtime
outside
inside
is '' 'no unit has failed' systemctl --failed --plain --no-legend
