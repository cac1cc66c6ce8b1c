"""Commands and files in real VMs, against floors of the same run: exec.py DSN CONTROL KEYFILE IMAGE DIR ACCEL ROUNDS MIB

With "native" for ACCEL, IMAGE is the runtime's program, which runs on this machine in place of a VM, and DIR/url has the
gateway's address.  Prints the lines that test/bench/run reads: NAME VALUE...
"""
import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import pathlib
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import uuid

import psycopg

DSN, CONTROL, KEYFILE, IMAGE, DIR, ACCEL, ROUNDS, MIB = sys.argv[1:]
ROUNDS, SIZE = int(ROUNDS), int(MIB) * 1024 * 1024
MASTER = base64.b64decode(pathlib.Path(KEYFILE).read_text(encoding="ascii").strip().split(":", 1)[1])
KEY = hmac.new(MASTER, b"agentvm control:gw", hashlib.sha256).digest()


def connect():
    return psycopg.connect(DSN, autocommit=True)


db = connect()


def value(query, *values):
    return db.execute(query, values).fetchone()[0]


def timed(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Bare(http.client.HTTPConnection):
    """HTTP to the runtime in a VM, without SQL, log or command: it is asked for a command that it does not know."""

    def __init__(self, vm):
        super().__init__("gateway")
        self.vm = vm

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(CONTROL)

    def ask(self):
        command = str(uuid.uuid4())
        header = json.dumps({"op": "output", "command": command, "stdout": 0, "stderr": 0, "wait_ms": 0}).encode()
        message = struct.pack(">I", len(header)) + header
        expires = int(time.time()) + 30
        signed = f"agentvm call\n{self.vm}\n{command}\n{expires}\n{hashlib.sha256(message).hexdigest()}"
        mac = hmac.new(KEY, signed.encode(), hashlib.sha256).hexdigest()
        self.request("POST", f"/v1/sessions/{self.vm}/calls", message, {"Authorization": f"Ticket k1:{expires}:{mac}"})
        response = self.getresponse()
        body = response.read()
        assert response.status == 200 and b"no_command" in body, (response.status, body)


def percentiles(name, seconds):
    cuts = statistics.quantiles(seconds, n=100)
    print(name, f"{cuts[49] * 1000:.3f} {cuts[98] * 1000:.3f}")


def round_trips(vm):
    bare = Bare(vm)
    run = {"exec": lambda: value("SELECT exit_code FROM agentvm.exec(%s, 'true')", vm), "bare": bare.ask}
    seconds = {name: [] for name in run}
    for turn in range(ROUNDS + 10):
        for name, call in run.items():
            took = timed(call)
            if turn >= 10:
                seconds[name].append(took)
    for name in run:
        percentiles(name, seconds[name])
    # what the command itself takes there
    alone = db.execute("SELECT extract(epoch FROM duration) FROM agentvm.exec(%s, 's=$(command -v bash || echo sh); n=0; while [ $n -lt 100 ]; do $s -lc true; n=$((n+1)); done')", (vm,)).fetchone()[0]
    print(f"shell {float(alone) * 10:.3f}")


# the same link, a virtio port, with nothing on it but bytes that a program reads and writes, as scp does; 64 KiB were quickest
RAW_BOOT = f"""#!/bin/sh
for port in /sys/class/virtio-ports/*; do
	[ "$(cat $port/name)" != raw ] || device=/dev/${{port##*/}}
done
while :; do
	dd if=$device of=/tmp/raw bs=64k iflag=fullblock count={SIZE // 65536} 2>/dev/null
	[ "$(stat -c %s /tmp/raw)" != {SIZE} ] || break
done
echo raw in
dd if=/tmp/raw of=$device bs=64k 2>/dev/null
while :; do sleep 1000; done
"""


def raw_native():
    """Through a TCP connection of this machine into a file, and back: [seconds] of each way"""
    taken = []

    def one_way(send, take):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def come():
                with listener.accept()[0] as connection:
                    take(connection)

            taker = threading.Thread(target=come)
            taker.start()
            began = time.perf_counter()
            with socket.create_connection(listener.getsockname()) as link:
                send(link)
            taker.join()
            taken.append(time.perf_counter() - began)

    block, path = os.urandom(1024 * 1024), pathlib.Path(DIR, "raw")

    def to_file(connection):
        with open(path, "wb", buffering=0) as file:
            while data := connection.recv(len(block)):
                file.write(data)

    def to_memory(connection):
        content, at = memoryview(bytearray(SIZE)), 0
        while at < SIZE:
            at += connection.recv_into(content[at:])

    def from_file(link):
        with open(path, "rb", buffering=0) as file:
            while data := file.read(len(block)):
                link.sendall(data)

    one_way(lambda link: [link.sendall(block) for _ in range(SIZE // len(block))], to_file)
    one_way(from_file, to_memory)
    return taken


def raw_copy():
    if ACCEL == "native":
        return raw_native()
    boot = pathlib.Path(DIR, "raw-boot")
    boot.write_bytes(RAW_BOOT.encode().ljust(4096, b"\0"))
    path = f"{DIR}/raw.sock"
    pathlib.Path(path).unlink(missing_ok=True)
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", f"q35,accel={ACCEL}", "-cpu", "host" if ACCEL == "kvm" else "max,-erms", "-m", "1024",
               "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", f"{IMAGE}/kernel", "-initrd", f"{IMAGE}/initrd", "-append", "console=ttyS0 quiet panic=-1",
               "-drive", f"if=none,id=boot,file={boot},format=raw,readonly=on", "-device", "virtio-blk-pci,drive=boot,serial=agentvm-boot",
               "-device", "virtio-serial-pci", "-chardev", f"socket,id=raw,path={path},server=on,wait=off", "-device", "virtserialport,chardev=raw,name=raw"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as machine, contextlib.ExitStack() as at_end:
        at_end.callback(machine.kill)
        while not os.path.exists(path):
            time.sleep(0.01)
        link = socket.socket(socket.AF_UNIX)
        link.connect(path)
        block = os.urandom(1024 * 1024)
        # the first block waits for the guest, which is booting
        link.sendall(block)
        time_first = [0.0]

        def send():
            for _ in range(SIZE // len(block) - 1):
                link.sendall(block)
                time_first[0] = time_first[0] or time.perf_counter()

        sender = threading.Thread(target=send)
        sender.start()
        while b"raw in" not in (line := machine.stdout.readline()):
            assert line
        into = time.perf_counter() - time_first[0]
        sender.join()
        left = SIZE
        began = 0.0
        while left:
            left -= len(link.recv(1024 * 1024))
            began = began or time.perf_counter()
        out = time.perf_counter() - began
    return into, out


def transfers(vm):
    """Files of SIZE bytes that are in the database, or get there: what a client's library does with so many is not in it"""
    content = os.urandom(SIZE)
    path = f"{DIR}/copy" if ACCEL == "native" else "/tmp/copy"
    db.execute("CREATE TABLE file (content bytea)")
    db.execute("ALTER TABLE file ALTER content SET STORAGE EXTERNAL")
    db.execute("INSERT INTO file VALUES (%b)", (content,))
    for turn in range(5):
        into, out = raw_copy()
        up = timed(lambda: value("SELECT agentvm.upload(%s, %s, content) FROM file", vm, path))
        down = timed(lambda: value("SELECT length(agentvm.download(%s, %s))", vm, path))
        print(f"upload {SIZE / up / 1048576:.1f} {SIZE / into / 1048576:.1f}")
        print(f"download {SIZE / down / 1048576:.1f} {SIZE / out / 1048576:.1f}")
    assert value("SELECT agentvm.download(%s, %s)", vm, path) == content


def many(vms):
    """50 statements at once, each with a command in each of four VMs"""
    answers = []

    def ask(number):
        with connect() as own:
            answers.extend(own.execute("SELECT session_id, exit_code, stdout FROM agentvm.exec_many(%s, %s)", (vms, f"sleep 1; echo {number}")).fetchall())

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(50)]
    took = timed(lambda: ([t.start() for t in threads], [t.join() for t in threads]))
    right = {(vm, 0, f"{n}\n") for vm in vms for n in range(50)}
    assert len(answers) == 200 and set(answers) == right, f"{len(answers)} answers, {len(right - set(answers))} are missing"
    print(f"many {len(answers)} {took:.1f}")


def native():
    """A session on noop, and this machine's runtime in place of its VM"""
    home = pathlib.Path(DIR, "runtime")
    home.mkdir()
    (home / "work").mkdir()
    session = value("SELECT agentvm.provision('acme', profile => 'native')")
    until = time.monotonic() + 30
    while not value("SELECT running FROM agentvm.session WHERE session_id = %s", session):
        assert time.monotonic() < until
        time.sleep(0.05)
    token = hmac.new(MASTER, f"{session}:1".encode(), hashlib.sha256).hexdigest()
    settings = home / "runtime.env"
    settings.touch(0o600)
    settings.write_text(f"AGENTVM_GATEWAY_URL={pathlib.Path(DIR, 'url').read_text().strip()}\nAGENTVM_BOOTSTRAP_TOKEN={token}\nAGENTVM_ALLOW_INSECURE=1\n"
                        f"AGENTVM_STATE_DIR={home}/state\nAGENTVM_WORK_DIR={home}/work\nAGENTVM_POWEROFF_COMMAND=/bin/true\n")
    with open(home / "log", "wb") as log:
        runtime = subprocess.Popen([IMAGE, f"--config={settings}"], stdin=subprocess.DEVNULL, stderr=log)
    try:
        db.execute("CALL agentvm.await(%s)", (session,))
        round_trips(session)
        transfers(session)
        value("SELECT agentvm.terminate(%s)", session)
        db.execute("CALL agentvm.await(%s, 'terminated')", (session,))
    finally:
        runtime.terminate()
        runtime.wait()


if ACCEL == "native":
    native()
    sys.exit()
sessions = [value("SELECT agentvm.provision('acme', profile => %s)", profile) for profile in ("big", "micro", "micro", "micro")]
for session in sessions:
    db.execute("CALL agentvm.await(%s)", (session,))
round_trips(sessions[0])
many(sessions)
for session in sessions[1:]:
    value("SELECT agentvm.terminate(%s)", session)
transfers(sessions[0])
value("SELECT agentvm.terminate(%s)", sessions[0])
db.execute("CALL agentvm.await(%s, 'terminated')", (sessions[0],))
