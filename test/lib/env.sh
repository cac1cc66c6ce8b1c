#!/usr/bin/env bash
# What test/run, test/bench/run, infra/demo and the Makefile share: packages, the Python environment, a private copy of
# the server, the unprivileged user, and cleaning up. Source it, or run one function: env.sh FUNCTION [ARGUMENT...]
set -euo pipefail
umask 022
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

say() { printf '%s\n' "$*" >&2; }

# The newest server, from 14 to 18, whose development files are installed; else the distribution's own
pg_version() {
	local pgxs
	pgxs=$(printf '%s\n' /usr/lib/postgresql/1[4-8]/lib/pgxs | sort -V | tail -1)
	if [[ -d $pgxs ]]; then basename "${pgxs%/lib/pgxs}"; else apt-cache depends postgresql | sed -n 's/.*Depends: postgresql-\([0-9]*\)$/\1/p'; fi
}

as_root() { if ((EUID)); then sudo "$@"; else "$@"; fi; }

# Install what is missing, starting no service and making no cluster: packages KIND..., KIND being build, gateway, runtime, libvirt, microvm, try, test or check
packages() {
	command -v dpkg-query >/dev/null || { say 'no dpkg here: taking for granted that everything needed is installed'; return; }
	local version names=() missing kind status log policy=/usr/sbin/policy-rc.d
	apt-cache show postgresql >/dev/null 2>&1 || as_root apt-get -qq update
	version=$(pg_version)
	for kind; do
		case $kind in
			build) names+=(make gcc libc6-dev pkg-config postgresql-"$version" postgresql-server-dev-"$version" libcurl4-openssl-dev libxml2-dev libssl-dev) ;;
			gateway) names+=(libwebsockets-dev libwebsockets-evlib-uv libuv1-dev libpq-dev libjansson-dev libssl-dev libsystemd-dev uthash-dev) ;;
			runtime) names+=(libwebsockets-dev libc-ares-dev libjansson-dev libssl-dev libcap-dev zlib1g-dev libarchive-dev libacl1-dev) ;;
			microvm) names+=(lz4 zstd mmdebstrap fakeroot fakechroot e2fsprogs qemu-utils) ;;
			libvirt) names+=(libvirt-dev libyajl-dev libvirt-daemon libvirt-clients libvirt-daemon-driver-qemu qemu-system-x86 qemu-utils busybox-static) ;;
			try) names+=(python3-venv) ;;
			check) names+=("$(apt-cache depends clang | sed -n 's/.*Depends: clang-\([0-9]*\)$/libclang-rt-\1-dev/p')" valgrind libc6-dbg) ;;
			test)
				names+=(clang clang-format cppcheck shellcheck libipc-run-perl nginx-light libnginx-mod-http-lua postgresql-"$version"-cron openssl ca-certificates busybox-static git prometheus qemu-system-x86 openssh-server openssh-client netcat-openbsd dnsmasq-base iproute2 faketime default-jdk-headless libpostgresql-jdbc-java)
				command -v npm >/dev/null || names+=(nodejs npm)
				# Debian 12 has the last free one
				if apt-cache show packer >/dev/null 2>&1; then names+=(packer); fi
				;;
		esac
	done
	missing=$(comm -23 <(printf '%s\n' "${names[@]}" | sort -u) <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p' | sort))
	[[ $missing ]] || return 0
	say "installing: ${missing//$'\n'/ }"
	as_root apt-get -qq update
	(
		if [[ ! -e $policy ]]; then
			trap 'as_root rm -f "$policy"' EXIT
			trap 'exit 130' INT TERM HUP
			printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
			as_root chmod +x "$policy"
		fi
		# shellcheck disable=SC2086
		log=$(as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600 install -y --no-install-recommends $missing 2>&1 </dev/null) || { status=$? && say "$log" && exit $status; }
	)
}

server_config() { printf '%s\n' "${PG_CONFIG:-/usr/lib/postgresql/$(pg_version)/bin/pg_config}"; }

# Where what is kept between runs lies
cache() { if ((EUID)); then printf '%s\n' "${XDG_CACHE_HOME:-$HOME/.cache}/agentvm"; else echo /var/cache/agentvm; fi; }

# Print where the Python environment of test/requirements.txt is, having made it if need be; it is kept between runs. Its
# share/node has what a test of a client in JavaScript needs, where there is npm
venv() {
	local cache dir
	cache=$(cache)
	dir=$cache/venv-$(sha256sum <"$root/test/requirements.txt" | cut -c1-12)
	mkdir -p "$cache"
	(
		flock 9
		if [[ ! -e $dir/complete ]]; then
			say 'making the Python environment (moto, boto3; once)'
			/usr/bin/python3 -m venv --clear "$dir" && "$dir/bin/pip" install -q -r "$root/test/requirements.txt" >&2 && touch "$dir/complete"
		fi
		if [[ ! -d $dir/share/node ]] && command -v npm >/dev/null; then
			npm install --silent --no-save --no-audit --no-fund --prefix "$dir/share/node.part" pg@8.13.1 >&2 && mv "$dir/share/node.part" "$dir/share/node"
		fi
	) 9>"$cache/lock" || return
	printf '%s\n' "$dir"
}

# A copy of the server that DIR/bin-relative look-ups make self-contained: an extension can be installed into it
# (make install DESTDIR=DIR) without touching the machine. With it, a key file and the setting that names it.
tree() { # DIR PG_CONFIG
	local dir=$1 config=$2 stamp bin share lib
	stamp=$("$config" --version) bin=$("$config" --bindir) share=$("$config" --sharedir) lib=$("$config" --pkglibdir)
	[[ $(cat "$dir/version" 2>/dev/null) != "$stamp" ]] || return 0
	rm -rf "$dir"
	mkdir -p "$dir"
	tar -C / --exclude=bitcode --exclude=pgxs --exclude=man -cf - "${bin#/}" "${share#/}" "${lib#/}" | tar -C "$dir" -xf -
	key_file "$dir/keys"
	printf "agentvm.key_file = '%s/keys'\n" "$dir" >"$dir/keys.conf"
	printf '%s\n' "$stamp" >"$dir/version"
}

# Make the server of such a tree run under a checker: "valgrind", or the library that is AddressSanitizer's runtime.
# What it finds goes to DIR/findings.*
# shellcheck disable=SC2016
checked() { # DIR PG_CONFIG CHECKER
	local dir=$1 server first
	server=$dir$("$2" --bindir)/postgres
	first=$dir/first.so
	[[ -e $server.bin ]] || mv "$server" "$server.bin"
	case $3 in
		valgrind)
			# the programs of initdb load no extension
			printf '%s\n' '#!/bin/sh' 'case $1 in --boot | --single | --check | -V | -C) exec "$0.bin" "$@" ;; esac' \
				"exec valgrind -q --trace-children=yes --leak-check=no --error-limit=no --suppressions='$root/test/sanitize/valgrind.supp' \\" \
				"	--gen-suppressions=all --log-file='$dir/findings.%p' \"\$0.bin\" \"\$@\""
			;;
		*)
			gcc -shared -fPIC -Wl,-z,initfirst -o "$first" "$root/test/sanitize/first.c"
			# libvirt's XDR, too, which the runtime intercepts as it begins or never;
			# by the name of the wrapper, since pg_ctl restart calls what the server says it is
			printf '%s\n' '#!/bin/bash' "LD_PRELOAD='$3 $first $(ldconfig -p | awk '/libtirpc\.so\.3 / { print $NF; exit }')'" \
				"ASAN_OPTIONS='detect_leaks=0 quarantine_size_mb=16 log_path=$dir/findings'" "UBSAN_OPTIONS='print_stacktrace=1 log_path=$dir/findings'" \
				'export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS' 'exec -a "$0" "$0.bin" "$@"'
			;;
	esac >"$server"
	chmod 755 "$server"
}

key_file() { (umask 077 && printf 'k1:%s\n' "$(head -c 32 /dev/urandom | base64 -w0)" >"$1"); }

# Copy the sources to DIR, readable by the unprivileged user, who builds and runs there
stage() { # DIR
	mkdir -p "$1"
	tar -C "$root" --exclude-vcs --exclude='./tmp_*' --exclude='./output_iso' --exclude='./results' --exclude='*.o' --exclude='*.d' --exclude='*.so' --exclude=agentvm-gateway --exclude=agentvm-runtime \
		--warning=no-file-changed -cf - . | tar -C "$1" --no-same-owner -xf -
	((EUID)) || chown -R postgres: "$1"
}

# Run a command as somebody whom initdb accepts
unprivileged() {
	if ((EUID)); then "$@"; else setpriv --reuid=postgres --regid=postgres --init-groups env HOME="${HOME_DIR:-/tmp}" USER=postgres LOGNAME=postgres "$@"; fi
}

# End every process that works in a directory below DIR, or has its home there as libvirt and its VMs do, and remove it
sweep() { # DIR
	local signal dir tries pids
	if [[ ! -d $1 || -L $1 || ! $1 =~ ^/.*/agentvm-[a-z]+\.[A-Za-z0-9]{6}$ ]] || ! dir=$(readlink -f "$1") || [[ ! $dir ]]; then say "no directory of ours: $1" && return 1; fi
	cd /
	unset TMPDIR HOME_DIR # or we would find ourselves
	for signal in QUIT KILL; do
		for ((tries = 0; tries < 30; tries++)); do
			pids=$({
				find /proc/[0-9]*/cwd -maxdepth 0 \( -lname "$dir" -o -lname "$dir/*" -o -lname "$dir (deleted)" \) -printf '%h\n'
				grep -lzE "^(XDG_(RUNTIME_DIR|CACHE_HOME)|TMPDIR)=$dir/" /proc/[0-9]*/environ
			} 2>/dev/null | cut -d/ -f3 | sort -u || true)
			[[ $pids ]] || break 2
			# shellcheck disable=SC2086
			((tries)) || kill -$signal $pids 2>/dev/null || true
			sleep 0.1
		done
	done
	# AgentVM::Libvirt's, whose paths have to be short
	grep -lsE "^$dir/" /tmp/av??????/of | xargs -r dirname | xargs -r rm -rf || true
	rm -rf "$dir"
}

# A private cluster below DIR out of the tree in TREE, on a socket in DIR; the rest are lines of configuration
cluster() { # DIR TREE PG_CONFIG LINE...
	local dir=$1 bin
	bin=$2$("$3" --bindir)
	shift 3
	"$bin/initdb" -D "$dir/data" -A trust -U postgres -N >"$dir/initdb.log" || { cat "$dir/initdb.log"; return 1; }
	printf '%s\n' "listen_addresses = ''" "unix_socket_directories = '$dir'" "unix_socket_permissions = 0700" "shared_preload_libraries = 'agentvm'" \
		"max_worker_processes = 16" "$@" >>"$dir/data/postgresql.conf"
	(cd "$dir" && "$bin/pg_ctl" -D "$dir/data" -l "$dir/server.log" -s -w start) || { cat "$dir/server.log"; return 1; }
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || "$@"
