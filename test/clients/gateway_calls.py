"""Calls through the gateway, as backends and runtimes see them: gateway_calls.py CONNSTR KEYFILE GATEWAY DIR PART...

Plays the backends and the runtimes of noop sessions. Each part prints its name when all of it was so.
"""
import concurrent.futures
import http.client
import itertools
import json
import os
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import uuid

import psycopg
import websockets
import websockets.sync.client

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from gateway import *  # noqa: E402,F403  what the gateway's other tests use
from gateway import CONNSTR, DIR, GATEWAY, KEY, KEYFILE, PARTS, TIMEOUT, Gateway, Proxy, VM, base64, certificate, db, free_port, hashlib, hmac, sql, until, value  # noqa: E402

MAX_HEADER, MAX_CHUNK = 96 * 1024, 1024 * 1024
paths = itertools.count()


def command_id():
    return str(uuid.uuid4())


def pack(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text + data


def unpack(message):
    size = struct.unpack(">I", message[:4])[0]
    return json.loads(message[4:4 + size]), message[4 + size:]


def control_key(gateway="gw1", key=KEY):
    return hmac.new(key, f"agentvm control:{gateway}".encode(), hashlib.sha256).digest()


def ticket(session, command, body, key=None, key_id="k1", expires=None):
    expires = int(time.time()) + 30 if expires is None else expires
    text = f"agentvm call\n{session}\n{command}\n{expires}\n{hashlib.sha256(body).hexdigest()}"
    return f"Ticket {key_id}:{expires}:{hmac.new(key or control_key(), text.encode(), hashlib.sha256).hexdigest()}"


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("gateway", timeout=TIMEOUT)
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.close()

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self.path)


class Calling(Gateway):
    """A gateway with a control listener, and what a backend does with it."""

    def __init__(self, *options, control=None, name="gw1", **more):
        self.path = control or os.path.join(DIR, f"c{next(paths)}")
        self.name = name
        super().__init__(f"--control=unix:{self.path}", *options, name=name, **more)

    def backend(self):
        return UnixConnection(self.path)

    def send(self, session, header, data=b"", connection=None, **ticket_of):
        """Begin a call; the connection, of which getresponse() is its answer"""
        connection = connection or self.backend()
        body = pack(header, data)
        command = header["command"] if isinstance(header, dict) else ""
        ticket_of.setdefault("key", control_key(self.name))
        connection.request("POST", f"/v1/sessions/{session}/calls", body, {"Authorization": ticket(session, command, body, **ticket_of)})
        return connection

    def call(self, session, header, data=b"", connection=None, **ticket_of):
        """(status, header of the answer, its bytes)"""
        one = self.send(session, header, data, connection, **ticket_of)
        result = answer_of(one)
        if connection is None:
            one.close()
        return result


def answer_of(connection):
    response = connection.getresponse()
    body = response.read()
    if response.status == 200:
        assert response.headers["content-type"] == "application/octet-stream"
        return 200, *unpack(body)
    return response.status, json.loads(body), b""


def echo(_runtime, _number, header, data):
    return {"op": header["op"], "running": False, "exit_code": 0, "took": sorted(header)}, data


class Runtime:
    """The channel of a VM; "handler" makes the answers, or None for none."""

    def __init__(self, gateway, vm, handler=echo, cable=None):
        self.handler, self.calls, self.texts, self.code, self.cable = handler, [], [], None, cable
        self.connection = websockets.sync.client.connect(
            f"{'wss' if gateway.tls else 'ws'}://127.0.0.1:{gateway.port}/v1/channel", subprotocols=["agentvm.v1"], ssl=gateway.tls, max_size=None, sock=cable and cable.open(),
            additional_headers={"Authorization": f"Bearer {vm.session_token}"}, proxy=None, ping_interval=None, compression=None)
        self.channel = self.connection.__enter__()
        assert json.loads(self.channel.recv(TIMEOUT))["type"] == "hello"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        if cable:
            cable.take = self.take
            self.channel.send('{"type": "cable"}')

    def take(self, frame):
        number = struct.unpack(">I", frame[:4])[0]
        header, data = unpack(frame[4:])
        self.calls.append((number, header, data))
        answer = self.handler(self, number, header, data)
        if answer is not None:
            self.answer(number, *answer)

    def serve(self):
        try:
            for frame in self.channel:
                if isinstance(frame, str):
                    self.texts.append(json.loads(frame))
                else:
                    assert not self.cable, "a call does not come this way"
                    self.take(frame)
        except websockets.ConnectionClosed:
            pass
        self.code = self.channel.close_code

    def answer(self, number, header, data=b""):
        (self.cable.message if self.cable else self.channel.send)(struct.pack(">I", number) + pack(header, data))

    def tell_end(self, command, **more):
        self.channel.send(json.dumps({"type": "ended", "command": command, "exit_code": 0, "duration_ms": 5, "stdout_bytes": 1, "stderr_bytes": 2, "timed_out": False, **more}))

    def noted(self):
        return [text["command"] for text in self.texts if text["type"] == "noted"]

    def closed(self):
        """The code with which the channel was closed"""
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive(), "the channel is open"
        return self.code

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.channel.close()
        self.thread.join(TIMEOUT)


class Cable(threading.Thread):
    """A VM without a network: its virtio port is a socket that the gateway connects to (see common/mux.h)."""

    HELLO, OPEN, DATA, CREDIT, CLOSE, MESSAGE = range(1, 7)
    PIECE = 131072

    def __init__(self, directory, name):
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(os.path.join(directory, name + ".sock"))
        self.listener.listen(1)
        self.lock, self.streams, self.stream, self.take, self.cuts, self.wanted, self.filling = threading.RLock(), 0, None, None, 0, None, None
        self.plug()
        self.start()

    def plug(self):
        """The gateway connects, and both know each other."""
        while True:
            self.cable = self.listener.accept()[0]
            try:
                return self.greet()
            except OSError:
                self.cable.close()

    def greet(self, filling=0):
        """A guest that begins anew, with what fills up a piece that the one before has left unfinished"""
        self.streams = 0
        self.own, self.rest, self.coming, self.whole = os.urandom(8).replace(b"\xc0", b"x"), b"", b"", 0
        self.put(self.HELLO, 3, b"agentvm:" + self.own + bytes(8), b"\xc0" * (1 + filling))
        while True:
            frames = [frame for frame in self.frames() if frame[0] == self.HELLO]
            if frames:
                assert frames[-1][1:10] == b"\x03agentvm:"
                self.peer = frames[-1][10:18]
                self.put(self.HELLO, 3, b"agentvm:" + self.own + self.peer)
                if frames[-1][18:] == self.own:
                    return

    def open(self):
        """A stream to the gateway, in place of the one before: our end of it"""
        end, self.wanted = socket.socketpair()
        return end

    def begin_anew(self, filling):
        """The guest is replaced: see greet()"""
        self.filling = filling
        until(lambda: self.filling is None, "it is another one")

    def leave_stream(self):
        if self.stream:
            self.stream.close()
        self.stream = None

    def put(self, kind, number, data=b"", before=b""):
        frame = bytes([kind, number]) + data
        with self.lock:
            self.cable.sendall(before + frame.replace(b"\xdb", b"\xdb\xdd").replace(b"\xc0", b"\xdb\xdc") + b"\xc0")

    def message(self, data, nonce=None):
        for at in range(0, len(data), self.PIECE):
            self.piece(data[at:at + self.PIECE], 0 if at else len(data), nonce)

    def piece(self, data, whole, nonce=None):
        digits = [len(data) >> 14, len(data) >> 7 & 127, len(data) & 127] + [whole >> by & 127 for by in (21, 14, 7, 0)]
        with self.lock:
            self.cable.sendall(bytes([self.MESSAGE] + digits) + data + (nonce or self.peer))

    def frames(self):
        data = self.cable.recv(65536)
        if not data:
            raise OSError("it is cut")
        self.rest += data
        found = []
        while self.rest:
            if self.rest[0] == self.MESSAGE:
                digits = self.rest[1:8]
                size = (digits[0] << 14 | digits[1] << 7 | digits[2]) + 16 if len(digits) == 7 else len(self.rest) + 1
                if size > len(self.rest):
                    break
                whole = digits[3] << 21 | digits[4] << 14 | digits[5] << 7 | digits[6]
                assert (whole == 0) == (self.coming != b"") and self.rest[size - 8:size] == self.own
                self.whole = whole or self.whole
                self.coming += self.rest[8:size - 8]
                assert size - 16 == self.PIECE or len(self.coming) == self.whole
                if len(self.coming) == self.whole:
                    found.append(bytes([self.MESSAGE]) + self.coming)
                    self.coming = b""
                self.rest = self.rest[size:]
                continue
            frame, end, rest = self.rest.partition(b"\xc0")
            if not end:
                break
            self.rest = rest.lstrip(b"\xc0")
            if frame:
                found.append(frame.replace(b"\xdb\xdc", b"\xc0").replace(b"\xdb\xdd", b"\xdb"))
        return found

    def run(self):
        """Carry what comes on either side to the other one, as much of it as may go."""
        while True:
            if self.filling is not None:
                with self.lock:
                    self.leave_stream()
                    self.greet(self.filling)
                self.filling = None
            if self.wanted:
                self.number, self.credit, self.taken, self.stream, self.wanted = self.streams % 16, 256 * 1024, 0, self.wanted, None
                self.streams += 1
                self.put(self.OPEN, self.number)
            stream = self.stream
            ready = select.select([self.cable] + ([stream] if stream and self.credit else []), [], [], 0.02)[0]
            if stream in ready:
                data = stream.recv(min(4096, self.credit))
                self.credit -= len(data)
                try:
                    self.put(self.DATA if data else self.CLOSE, self.number, data)
                except OSError:
                    pass  # it is cut
                if not data:
                    self.leave_stream()
            if self.cable not in ready:
                continue
            try:
                frames = self.frames()
            except OSError:
                with self.lock:
                    self.leave_stream()
                    self.cuts += 1
                    self.plug()
                continue
            for frame in frames:
                if frame[0] == self.MESSAGE:
                    self.take(frame[1:])
                elif self.stream is None or frame[1] != self.number:
                    continue
                elif frame[0] == self.CREDIT:
                    self.credit += int.from_bytes(frame[2:], "big")
                elif frame[0] == self.CLOSE:
                    stream.shutdown(socket.SHUT_WR)
                elif frame[0] == self.DATA:
                    try:
                        stream.sendall(frame[2:])
                    except OSError:
                        pass  # nobody reads it any more
                    self.taken += len(frame) - 2
                    if self.taken >= 8192:
                        self.put(self.CREDIT, self.number, self.taken.to_bytes(4, "big"))
                        self.taken = 0


def silent(_runtime, _number, _header, _data):
    return None


def audit(kind="exec", **more):
    return {"kind": kind, "role": "alice", **more}


def events(session, kind=None):
    """[(kind, detail)] of the log, but for changes of state"""
    return sql("SELECT kind, detail FROM agentvm.session_event WHERE session_id = %s AND kind LIKE %s AND kind ~ '_(started|ended)$' ORDER BY event_id", session, kind or "%")


def under_way(session):
    return [str(row[0]) for row in sql("SELECT command_id FROM agentvm.command WHERE session_id = %s", session)]


def as_gateway(query, *values, name="gw1"):
    with psycopg.connect(CONNSTR, autocommit=True, application_name=name) as connection:
        connection.execute("SET ROLE agentvm_gateway")
        cursor = connection.execute(query, values)
        return cursor.fetchall() if cursor.description else None


def refused(query, *values, **more):
    """The SQLSTATE"""
    try:
        as_gateway(query, *values, **more)
    except psycopg.Error as problem:
        return problem.sqlstate
    return None


def part_functions():
    """What the gateway calls in the database, without one."""
    with Gateway() as gateway:
        vm, other = VM(gateway), VM(gateway)
    command = command_id()
    start = "SELECT agentvm.command_started(%s, %s, 'exec', %s)"
    assert as_gateway(start, vm.id, command, json.dumps({"role": "alice", "sha256": "abc"}))[0][0] is True
    assert events(vm.id) == [("exec_started", {"role": "alice", "sha256": "abc", "command": command})]
    row = sql("SELECT team_id, kind, role, session_id::text FROM agentvm.command WHERE command_id = %s", command)
    assert row == [("acme", "exec", "alice", vm.id)], row
    assert as_gateway(start, vm.id, command, json.dumps({"role": "bob"}))[0][0] is False, "once is enough"
    # the end of another session's command is not this one's to tell
    assert as_gateway("SELECT agentvm.command_ended(%s, %s, '{}')", other.id, command)[0][0] is False
    assert as_gateway("SELECT agentvm.command_ended(%s, %s, %s)", vm.id, command, json.dumps({"exit_code": 3, "duration_ms": 7}))[0][0] is True
    assert events(vm.id)[1:] == [("exec_ended", {"exit_code": 3, "duration_ms": 7, "role": "alice", "command": command})]
    assert as_gateway("SELECT agentvm.command_ended(%s, %s, '{}')", vm.id, command)[0][0] is False
    # asked again after its end
    assert as_gateway(start, vm.id, command, json.dumps({"role": "alice", "repeated": True}))[0][0] is False
    assert len(events(vm.id)) == 2 and under_way(vm.id) == []
    # how long it took is told where the runtime does not
    upload = command_id()
    as_gateway("SELECT agentvm.command_started(%s, %s, 'upload', %s)", vm.id, upload, json.dumps({"role": "alice"}))
    as_gateway("SELECT agentvm.command_ended(%s, %s, '{\"bytes\": 5}')", vm.id, upload)
    kind, detail = events(vm.id)[-1]
    assert kind == "upload_ended" and detail["bytes"] == 5 and 0 <= detail["duration_ms"] < 60000, detail
    for bad, state in (((vm.id, command, "other", '{"role": "a"}'), "22023"), ((vm.id, command, "exec", "{}"), "22023"), ((vm.id, command, "exec", '{"role": ""}'), "22023"),
                       ((vm.id, command, "exec", json.dumps({"role": "r" * 64})), "22023"), ((vm.id, command, "exec", "[]"), "22023"),
                       ((vm.id, command, "exec", json.dumps({"role": "a", "x": "y" * 70000})), "AV012"), ((vm.id, None, "exec", '{"role": "a"}'), "22004"),
                       ((command_id(), command, "exec", '{"role": "a"}'), "AV005")):
        assert refused("SELECT agentvm.command_started(%s, %s, %s, %s)", *bad) == state, bad
    # what is left when a session ends is unknown; nothing begins in it any more, nor before it is ready
    left, early = command_id(), VM(boots=False)
    as_gateway(start, vm.id, left, json.dumps({"role": "alice"}))
    assert refused(start, early.id, command_id(), '{"role": "a"}') == "AV007"
    vm.terminate()
    assert refused(start, vm.id, command_id(), '{"role": "a"}') == "AV006"
    until(lambda: vm.state() == "terminated", "its end")
    assert events(vm.id)[-1] == ("exec_ended", {"outcome": "unknown", "command": left, "role": "alice"})
    assert under_way(vm.id) == []
    # one that is locked by somebody then, or begins beside the end, is the next sweep's
    late = command_id()
    as_gateway(start, other.id, late, json.dumps({"role": "alice"}))
    with db() as connection, connection.transaction(force_rollback=True):
        connection.execute("SELECT FROM agentvm.command WHERE command_id = %s FOR UPDATE", (late,))
        other.terminate()
        until(lambda: other.state() == "terminated", "its end, for which nobody waits")
        assert under_way(other.id) == [late]
    sql("SELECT agentvm.sweep()")
    assert under_way(other.id) == [] and events(other.id)[-1] == ("exec_ended", {"outcome": "unknown", "command": late, "role": "alice"})
    # where a session is to be found
    vms = [VM(boots=False) for _ in range(3)]
    with Gateway() as gateway:
        assert all(vm.bootstrap(gateway)[0] == 200 for vm in vms)
    where = "SELECT coalesce(gateway_id, '') FROM agentvm.session_heartbeat WHERE session_id = ANY (%s) ORDER BY session_id"
    ids = [vm.id for vm in vms]
    as_gateway("SELECT agentvm.attach(%s)", [ids[2], ids[0], command_id(), ids[0]])
    assert sorted(row[0] for row in sql(where, ids)) == ["", "gw1", "gw1"]
    before = sql("SELECT ctid::text FROM agentvm.session_heartbeat WHERE session_id = ANY (%s) ORDER BY session_id", ids)
    as_gateway("SELECT agentvm.attach(%s)", [ids[2], ids[0]])
    assert sql("SELECT ctid::text FROM agentvm.session_heartbeat WHERE session_id = ANY (%s) ORDER BY session_id", ids) == before, "what is known is not written"
    as_gateway("SELECT agentvm.attach(%s)", ids, name="gw2")
    assert sorted(row[0] for row in sql(where, ids)) == ["gw2"] * 3
    assert refused("SELECT agentvm.attach(NULL)") == "22004" and refused("SELECT agentvm.attach(array_fill(gen_random_uuid(), ARRAY[10001]))") == "AV012"
    # keys: of each gateway another one, and only of one that is registered
    assert as_gateway("SELECT key_id, key FROM agentvm.control_key()") == [("k1", control_key())]
    assert as_gateway("SELECT key_id, key FROM agentvm.control_key('k1')", name="gw2") == [("k1", control_key("gw2"))]
    assert control_key() != control_key("gw2")
    assert refused("SELECT agentvm.control_key('k9')") == "AV010" and refused("SELECT agentvm.control_key()", name="nobody") == "42501"
    for vm in vms:
        vm.terminate()


def part_rights():
    """A gateway registers itself, and cannot aim the server's backends at anything."""
    as_gateway("INSERT INTO agentvm.gateway (gateway_id) VALUES ('gw3')")
    for query in ("INSERT INTO agentvm.gateway (gateway_id, control_address) VALUES ('gw4', 'unix:/x')", "UPDATE agentvm.gateway SET control_address = 'unix:/x'",
                  "UPDATE agentvm.gateway SET last_report_at = now()", "DELETE FROM agentvm.gateway",
                  "INSERT INTO agentvm.gateway (gateway_id) VALUES ('gw3') ON CONFLICT (gateway_id) DO UPDATE SET control_address = 'unix:/x'"):
        assert refused(query) == "42501", query
    for good in ("unix:/run/agentvm-gateway/control", "https://gw1.internal:9443", "https://10.0.0.1:1", "https://[fd00::1]:65535", "http://127.0.0.1:8080", None):
        sql("UPDATE agentvm.gateway SET control_address = %s WHERE gateway_id = 'gw3'", good)
    for bad in ("", "unix:relative", "unix:/" + "x" * 100, "unix:/a b", "/run/x", "https://gw1", "https://gw1:0", "https://user@gw1:1", "https://gw1:1/path", "ftp://gw1:1", "https://-:1", "https://gw1:123456", "https://gw1:1\n"):
        try:
            sql("UPDATE agentvm.gateway SET control_address = %s WHERE gateway_id = 'gw3'", bad)
            assert False, bad
        except psycopg.errors.CheckViolation:
            pass
    sql("DELETE FROM agentvm.gateway WHERE gateway_id = 'gw3'")


def part_call():
    """Round trips."""
    with Calling() as gateway:
        vm = VM(gateway)
        with Runtime(gateway, vm) as runtime:
            command = command_id()
            assert gateway.call(vm.id, {"op": "output", "command": command, "wait_ms": 100}, b"x" * 10) == (
                200, {"op": "output", "running": False, "exit_code": 0, "took": ["command", "op", "wait_ms"]}, b"x" * 10)
            # many on one connection; all sizes; what is for the gateway stays there, and the rest is as it was
            connection = gateway.backend()
            for size in (0, 1, 1000, 4096, 65536, 65537, MAX_CHUNK):
                data = os.urandom(size)
                status, header, same = gateway.call(vm.id, {"op": "output", "command": command, "owned": False, "last": False, "x": {"y": [1, "é", None]}}, data, connection)
                assert status == 200 and same == data and header["took"] == ["command", "op", "x"], (size, status, header)
                assert runtime.calls[-1][1]["x"] == {"y": [1, "é", None]}
            numbers = [number for number, _, _ in runtime.calls]
            assert len(set(numbers)) == len(numbers), "each has another number"
            header = {"op": "output", "command": command}
            header["pad"] = "x" * (MAX_HEADER - len(json.dumps({**header, "pad": ""})))
            assert len(json.dumps(header)) == MAX_HEADER
            assert gateway.call(vm.id, header, b"z" * MAX_CHUNK, connection)[0] == 200
            connection.close()
            # the largest of answers; in pieces, and with something in between
            runtime.handler = lambda _r, _n, _h, _d: ({"pad": "p" * (MAX_HEADER - 11)}, b"y" * MAX_CHUNK)
            status, header, data = gateway.call(vm.id, {"op": "get", "command": command_id()})
            assert status == 200 and len(data) == MAX_CHUNK and len(header["pad"]) == MAX_HEADER - 11

            def in_pieces(runtime, number, _header, _data):
                frame = struct.pack(">I", number) + pack({"a": 1}, b"y" * 100000)
                runtime.channel.ping()
                runtime.channel.send(frame[i:i + 1000] for i in range(0, len(frame), 1000))
            runtime.handler = in_pieces
            assert gateway.call(vm.id, {"op": "get", "command": command_id()}) == (200, {"a": 1}, b"y" * 100000)
            # heartbeats go on beside all that
            runtime.channel.send('{"type": "heartbeat"}')
            until(lambda: any(text["type"] == "deadline" for text in runtime.texts), "a heartbeat's answer")
            assert gateway.metric("agentvm_gateway_calls_total{status=\"200\"}") == len(runtime.calls)
            assert gateway.metric("agentvm_gateway_calls_under_way") == 0 and gateway.metric("agentvm_gateway_call_memory_bytes") == 0
            assert gateway.metric("agentvm_gateway_call_bytes_down_total") > MAX_CHUNK and gateway.metric("agentvm_gateway_call_bytes_up_total") > MAX_CHUNK
        where = value("SELECT gateway_id FROM agentvm.session_heartbeat WHERE session_id = %s", vm.id)
        assert where == "gw1", where
        # the channel comes to another gateway: so does the session
        with Calling(name="gw2") as second, Runtime(second, vm):
            until(lambda: value("SELECT gateway_id FROM agentvm.session_heartbeat WHERE session_id = %s", vm.id) == "gw2", "it is found there")
            assert second.call(vm.id, {"op": "output", "command": command_id()})[0] == 200
            assert gateway.call(vm.id, {"op": "output", "command": command_id()})[0] == 404
        vm.terminate()


def part_audit():
    """What is to be logged is committed before the runtime sees the call."""
    with Calling() as gateway:
        vm = VM(gateway)
        seen = []

        def look(_runtime, _number, header, _data):
            seen.append(events(vm.id, "%_started"))
            return {"running": True}, b""
        with Runtime(gateway, vm, look) as runtime:
            command = command_id()
            status, header, _ = gateway.call(vm.id, {"op": "start", "command": command, "command_len": 4, "audit": audit(sha256="abc", bytes=4)}, b"true")
            assert status == 200 and header == {"running": True}
            assert seen == [[("exec_started", {"role": "alice", "sha256": "abc", "bytes": 4, "command": command})]], seen
            assert "audit" not in runtime.calls[0][1] and runtime.calls[0][2] == b"true"
            # a caller's transaction has nothing to do with it: nothing is open, and he cannot take it back
            assert under_way(vm.id) == [command]
            # the same again is passed, and logged once; also when it has ended
            assert gateway.call(vm.id, {"op": "start", "command": command, "age_ms": 50, "command_len": 4, "audit": audit()}, b"true")[0] == 200
            assert len(events(vm.id)) == 1
            runtime.tell_end(command, exit_code=7)
            until(lambda: command in runtime.noted(), "the end is noted")
            assert events(vm.id)[1] == ("exec_ended", {"exit_code": 7, "duration_ms": 5, "stdout_bytes": 1, "stderr_bytes": 2, "timed_out": False, "role": "alice", "command": command})
            assert gateway.call(vm.id, {"op": "start", "command": command, "age_ms": 50, "command_len": 4, "audit": audit()}, b"true")[0] == 200
            assert len(events(vm.id)) == 2 and under_way(vm.id) == []
            # a start that the runtime refuses has ended, and one that it does not know is unknown
            for error, logged in (("busy", {"error": "busy"}), ("of a later version", {"error": "failed"}), ("forgotten", {"outcome": "unknown"})):
                runtime.handler = lambda _r, _n, _h, _d, error=error: ({"error": error, "message": "secret"}, b"")
                assert gateway.call(vm.id, {"op": "start", "command": command_id(), "audit": audit()})[1]["error"] == error
                until(lambda: under_way(vm.id) == [], "its end")
                kind, detail = events(vm.id)[-1]
                assert kind == "exec_ended" and {k: v for k, v in detail.items() if k in ("error", "outcome")} == logged, detail
                assert "secret" not in json.dumps(detail)
            calls = len(runtime.calls)
            for bad in ("x", {}, {"kind": "other", "role": "a"}, {"kind": "exec"}, {"kind": "exec", "role": 5}, {"kind": "exec", "role": ""}, {"kind": "exec", "role": "r" * 64},
                        {"kind": "exec", "role": "a", "x": "y" * 70000}):
                assert gateway.call(vm.id, {"op": "start", "command": command_id(), "audit": bad})[0] == 400, bad
            assert len(runtime.calls) == calls and under_way(vm.id) == []
        # no database, no call that is to be logged; others pass
    proxy = Proxy()
    with Calling(f"--database={proxy.conninfo}") as gateway:
        with Runtime(gateway, vm) as runtime:
            proxy.holds = True
            waits = gateway.send(vm.id, {"op": "start", "command": command_id(), "audit": audit()})
            assert proxy.held.wait(TIMEOUT)
            assert gateway.call(vm.id, {"op": "output", "command": command_id()})[0] == 200
            assert [header["op"] for _, header, _ in runtime.calls] == ["output"], "it is not passed on before its commit"
            proxy.holds = False
            assert answer_of(waits)[0] == 200 and [header["op"] for _, header, _ in runtime.calls] == ["output", "start"]
            # its client goes while the database is asked: it is not passed on, and the log says so
            proxy.held.clear()
            proxy.holds = True
            command = command_id()
            waits = gateway.send(vm.id, {"op": "start", "command": command, "audit": audit()})
            assert proxy.held.wait(TIMEOUT)
            waits.close()
            until(lambda: gateway.metric("agentvm_gateway_calls_total{status=\"499\"}") == 1, "it is noticed")
            proxy.holds = False
            until(lambda: [d for k, d in events(vm.id, "exec_ended") if d["command"] == command], "it has ended")
            assert [d["outcome"] for k, d in events(vm.id, "exec_ended") if d["command"] == command] == ["abandoned"]
            assert [header["op"] for _, header, _ in runtime.calls] == ["output", "start"]
            # its channel goes: 404, once that has been logged
            proxy.held.clear()
            proxy.holds = True
            command = command_id()
            waits = gateway.send(vm.id, {"op": "start", "command": command, "audit": audit()})
            assert proxy.held.wait(TIMEOUT)
            runtime.channel.close()
            until(lambda: gateway.metric("agentvm_gateway_channels") == 0, "it is noticed")
            proxy.holds = False
            assert answer_of(waits)[0] == 404
            assert [d["outcome"] for k, d in events(vm.id, "exec_ended") if d["command"] == command] == ["not passed on"]
    vm.terminate()


def part_order():
    """Answers come in the order of the VM's choice, each to whoever has asked."""
    with Calling() as gateway:
        vm, other = VM(gateway), VM(gateway)
        with Runtime(gateway, vm, silent) as runtime, Runtime(gateway, other) as second:
            waiting = [gateway.send(vm.id, {"op": "output", "command": command_id(), "wait_ms": 20000, "i": i}) for i in range(5)]
            until(lambda: len(runtime.calls) == 5, "all have arrived")
            assert gateway.metric("agentvm_gateway_calls_under_way") == 5
            assert gateway.call(other.id, {"op": "output", "command": command_id()})[0] == 200, "others do not wait"
            assert len(second.calls) == 1 and second.calls[0][0] in (1, runtime.calls[0][0]), "numbers are of a channel"
            for number, header, _ in reversed(runtime.calls):
                runtime.answer(number, {"i": header["i"]}, b"%d" % header["i"])
            for i, connection in enumerate(waiting):
                assert answer_of(connection) == (200, {"i": i}, b"%d" % i)
            # one that asks before the answer is hung up on
            one = gateway.send(vm.id, {"op": "output", "command": command_id()})
            until(lambda: len(runtime.calls) == 6, "it has arrived")
            one.sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert one.sock.recv(100) == b""
            until(lambda: gateway.metric("agentvm_gateway_calls_under_way") == 0, "it is given up")
        vm.terminate()
        other.terminate()


def part_refused():
    with Calling("--request-timeout=2") as gateway:
        vm = VM(gateway)
        ask = {"op": "output", "command": command_id()}
        assert gateway.call(vm.id, ask)[0] == 404, "no channel"
        assert gateway.call(command_id(), ask)[0] == 404, "no session"
        with Runtime(gateway, vm) as runtime:
            for bad in (b"", b"{}", b"[]", b"{", b"\xff", b'{"op": "output"}', json.dumps({"command": ask["command"]}).encode(), json.dumps({**ask, "op": 5}).encode(),
                        json.dumps({**ask, "command": ask["command"].upper()}).encode(), json.dumps({**ask, "command": "x"}).encode(), json.dumps({**ask, "wait_ms": -1}).encode(),
                        json.dumps({**ask, "wait_ms": 20001}).encode(), json.dumps({**ask, "wait_ms": "1"}).encode(), json.dumps({**ask, "owned": 1}).encode(), json.dumps({**ask, "last": "x"}).encode(),
                        json.dumps(ask).encode()[:-1] + b', "op": "kill"}', json.dumps({**ask, "x": "\0"}).encode()):
                assert gateway.call(vm.id, bad)[0] == 400, bad
            assert gateway.call(vm.id, ask, b"x" * (MAX_CHUNK + 1))[0] == 400

            def raw(body, headers=None, method="POST", path=None, length=None):
                connection = gateway.backend()
                connection.putrequest(method, path or f"/v1/sessions/{vm.id}/calls")
                connection.putheader("Authorization", ticket(vm.id, ask["command"], body))
                for name, text in (headers or {}).items():
                    connection.putheader(name, text)
                if length is not None:
                    connection.putheader("Content-Length", str(length))
                connection.endheaders(body)
                status = answer_of(connection)[0]
                connection.close()
                return status
            good = pack(ask)
            for body in (b"", b"\0\0\0", struct.pack(">I", len(good)) + good[4:], struct.pack(">I", 2**32 - 1) + good[4:], struct.pack(">I", 0) + good[4:], pack(json.dumps({**ask, "x": "y" * MAX_HEADER}).encode())):
                assert raw(body, length=len(body)) == 400, body[:40]
            assert raw(good, length=len(good)) == 200
            assert raw(b"", length=4 + MAX_HEADER + MAX_CHUNK + 1) == 413
            assert raw(b"", {"Transfer-Encoding": "chunked"}) == 400 and raw(b"") == 411
            assert raw(good[:-1], length=len(good)) == 408, "it does not come"
            assert raw(b"", method="GET") == 405
            assert raw(good, path=f"/v1/sessions/{vm.id.upper()}/calls", length=len(good)) == 404
            assert len(runtime.calls) == 1
            calls = gateway.metric("agentvm_gateway_calls_total")
            assert calls > 30
        vm.terminate()
        until(lambda: gateway.call(vm.id, ask)[0] == 410, "it has ended")
    # what only the database knows: not ready, or ended
    proxy = Proxy()
    with Calling(f"--database={proxy.conninfo}") as gateway:
        vm = VM(gateway)
        start = {"op": "start", "command": command_id(), "audit": audit()}
        with Runtime(gateway, vm) as runtime:
            sql("UPDATE agentvm.session SET state = 'pausing' WHERE session_id = %s", vm.id)
            assert gateway.call(vm.id, start)[0] == 409
            sql("UPDATE agentvm.session SET state = 'ready' WHERE session_id = %s", vm.id)
            assert gateway.call(vm.id, start)[0] == 200 and len(runtime.calls) == 1
            proxy.deaf = True
            vm.terminate()
            assert gateway.call(vm.id, {**start, "command": command_id()})[0] == 410
            assert len(runtime.calls) == 1 and runtime.code is None


def part_tickets():
    with Calling() as gateway:
        vm, other = VM(gateway), VM(gateway)
        ask = {"op": "output", "command": command_id()}
        body = pack(ask)

        def status(header, path=vm.id, sent=body):
            connection = gateway.backend()
            headers = {} if header is None else {"Authorization": header}
            connection.request("POST", f"/v1/sessions/{path}/calls", sent, headers)
            response = connection.getresponse()
            response.read()
            connection.close()
            return response.status
        now = int(value("SELECT extract(epoch FROM clock_timestamp())"))
        with Runtime(gateway, vm) as runtime, Runtime(gateway, other):
            good = ticket(vm.id, ask["command"], body)
            assert status(good) == 200 and status(good.replace("Ticket", "ticket")) == 200
            calls = len(runtime.calls)
            assert status(ticket(vm.id, ask["command"], body, expires=now + 50)) == 200
            for why, bad in {
                    "none": None, "another scheme": good.replace("Ticket", "Bearer"), "cut": good[:-1], "longer": good + "0", "not hex": good[:-1] + "g", "no parts": "Ticket x", "empty": "Ticket ::",
                    "expired": ticket(vm.id, ask["command"], body, expires=now - 2), "far ahead": ticket(vm.id, ask["command"], body, expires=now + 90), "huge": ticket(vm.id, ask["command"], body, expires=10**18),
                    "negative": ticket(vm.id, ask["command"], body, expires=-1), "wrong key": ticket(vm.id, ask["command"], body, key=os.urandom(32)), "master key": ticket(vm.id, ask["command"], body, key=KEY),
                    "another gateway's": ticket(vm.id, ask["command"], body, key=control_key("gw2")), "other session": ticket(other.id, ask["command"], body), "other command": ticket(vm.id, command_id(), body),
                    "other body": ticket(vm.id, ask["command"], body + b"x"), "later": good.replace(good.split(":")[1], str(int(good.split(":")[1]) + 1)), "key id": good.replace("k1", "../k1"),
                    "long key id": good.replace("k1", "k" * 65), "flipped": good[:-1] + ("0" if good[-1] != "0" else "1")}.items():
                assert status(bad) == 401, why
            assert status(good, other.id) == 401 and status(good, sent=body + b"x") == 401 and status(good, sent=pack({**ask, "x": 1})) == 401
            assert len(runtime.calls) == calls + 1, "none of them was passed on"
            assert gateway.metric("agentvm_gateway_bad_tickets_total") == gateway.metric("agentvm_gateway_calls_total{status=\"401\"}") > 20
        log = gateway.text()
        assert 1 <= log.count('msg="bad ticket"') < 20 and good.split(":")[2] not in log and good not in log, log
        vm.terminate()
        other.terminate()


def part_keys():
    """A new master key is used at once; one that is gone from the file is good no longer than a minute."""
    new = os.urandom(32)
    before = open(KEYFILE, encoding="ascii").read()

    def write(text):
        with open(KEYFILE, "w", encoding="ascii") as keys:
            keys.write(text)

    def queries():
        with open(os.environ["SERVER_LOG"], encoding="utf-8", errors="replace") as log:
            return log.read().count("agentvm.control_key(")
    with Calling() as gateway:
        vm = VM(gateway)
        ask = {"op": "output", "command": command_id()}
        with Runtime(gateway, vm):
            assert gateway.call(vm.id, ask)[0] == 200
            assert gateway.call(vm.id, ask, key=control_key(key=new), key_id="k2")[0] == 401
            write(f"k2:{base64.b64encode(new).decode()}\n{before}")
            until(lambda: gateway.call(vm.id, ask, key=control_key(key=new), key_id="k2")[0] == 200, "the new key")
            assert gateway.call(vm.id, ask)[0] == 200, "the one before is still good"
            # names are not guessed at the database's expense
            began, before_these = time.time(), queries()
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                assert set(pool.map(lambda i: gateway.call(vm.id, ask, key_id=f"guess{i}")[0], range(100))) == {401}
            assert queries() - before_these <= 2 * (time.time() - began) + 2
            assert gateway.call(vm.id, ask)[0] == 200 and gateway.get("/readyz")[0] == 200
        vm.terminate()
    write(before)
    # a gateway that nobody has registered says why no call is good
    with Calling(name="stranger") as gateway:
        vm = VM(gateway)
        with Runtime(gateway, vm):
            assert gateway.call(vm.id, ask)[0] == 503
            assert 'gateway \\"stranger\\" is not registered' in gateway.text(), gateway.text()
            sql("INSERT INTO agentvm.gateway (gateway_id) VALUES ('stranger')")
            until(lambda: gateway.call(vm.id, ask)[0] == 200, "it is registered")
        vm.terminate()
    sql("DELETE FROM agentvm.gateway WHERE gateway_id = 'stranger'")


def kills(runtime):
    return [(header["command"], header["signal"]) for _, header, _ in runtime.calls if header["op"] == "kill"]


def part_owned():
    """A command ends with the connection that has asked for it last."""
    def running(_runtime, _number, header, _data):
        return None if header.get("wait_ms") else ({"running": True} if header["op"] != "kill" else {}, b"")
    with Calling() as gateway:
        vm = VM(gateway)
        with Runtime(gateway, vm, running) as runtime:
            command = command_id()
            start = {"op": "start", "command": command, "owned": True, "audit": audit()}
            connection = gateway.backend()
            assert gateway.call(vm.id, start, connection=connection)[0] == 200
            gateway.send(vm.id, {"op": "output", "command": command, "owned": True, "wait_ms": 20000}, connection=connection)
            until(lambda: len(runtime.calls) == 2, "it waits")
            began = time.time()
            connection.close()
            until(lambda: kills(runtime) == [(command, 9)], "it is killed")
            assert time.time() - began < 1
            # the answer that nobody waits for any more is no offence, nor is the kill's
            number = runtime.calls[1][0]
            runtime.answer(number, {"running": False})
            runtime.tell_end(command, exit_code=137)
            until(lambda: command in runtime.noted(), "its end is logged")
            # one that is not owned, or has ended, or that another connection has taken over, is left alone
            left, ended, taken = command_id(), command_id(), command_id()
            connection, other = gateway.backend(), gateway.backend()
            assert gateway.call(vm.id, {**start, "command": left, "owned": False}, connection=connection)[0] == 200
            assert gateway.call(vm.id, {**start, "command": taken}, connection=connection)[0] == 200
            assert gateway.call(vm.id, {"op": "output", "command": taken, "owned": True}, connection=other)[0] == 200
            assert gateway.call(vm.id, {**start, "command": ended}, connection=connection)[0] == 200
            runtime.handler = echo
            assert gateway.call(vm.id, {"op": "output", "command": ended, "owned": True}, connection=connection)[0] == 200
            connection.close()
            runtime.handler = running
            assert gateway.call(vm.id, {"op": "output", "command": left})[0] == 200
            until(lambda: gateway.metric("agentvm_gateway_control_connections") == 1, "it has gone")
            assert gateway.call(vm.id, {"op": "output", "command": left})[0] == 200
            assert kills(runtime) == [(command, 9)], kills(runtime)
            other.close()
            until(lambda: kills(runtime) == [(command, 9), (taken, 9)], "the one who took it has gone")
            # several at once; by a process that is killed; when the channel is another one by then
            mine = [command_id() for _ in range(20)]
            connection = gateway.backend()
            for one in mine:
                assert gateway.call(vm.id, {**start, "command": one}, connection=connection)[0] == 200
            with Runtime(gateway, vm, running) as second:
                assert runtime.closed() == 4409
                connection.close()
                until(lambda: len(kills(second)) == 20, "all of them")
                assert {one for one, _ in kills(second)} == set(mine)
                # the backend dies
                command = command_id()
                body = pack({**start, "command": command})
                script = f"""import socket, sys, time
s = socket.socket(socket.AF_UNIX); s.connect({gateway.path!r})
s.sendall(sys.stdin.buffer.read()); s.recv(1000); print('started', flush=True); time.sleep(600)"""
                backend = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                backend.stdin.write(f"POST /v1/sessions/{vm.id}/calls HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nAuthorization: {ticket(vm.id, command, body)}\r\n\r\n".encode() + body)
                backend.stdin.close()
                assert backend.stdout.readline() == b"started\n"
                backend.kill()
                backend.wait()
                until(lambda: (command, 9) in kills(second), "it is killed", 1)
        vm.terminate()


def part_transfers():
    """Uploads and downloads: their ends are the gateway's to tell."""
    def files(_runtime, _number, header, data):
        if header["op"] == "put":
            return {"written": header["offset"] + len(data)}, b""
        return ({"size": 300000, "version": "v"}, b"f" * min(header["length"], 300000 - header["offset"]))
    with Calling() as gateway:
        vm = VM(gateway)
        with Runtime(gateway, vm, files) as runtime:
            connection = gateway.backend()
            command = command_id()
            for offset in (0, 1000):
                assert gateway.call(vm.id, {"op": "put", "command": command, "path": "/a", "offset": offset, "size": 1500, "owned": True, "last": offset == 1000,
                                            **({"audit": audit("upload", path="/a")} if offset == 0 else {})}, b"u" * (1000 if offset == 0 else 500), connection)[0] == 200
            until(lambda: under_way(vm.id) == [], "it has ended")
            assert [kind for kind, _ in events(vm.id)] == ["upload_started", "upload_ended"]
            assert events(vm.id)[1][1]["bytes"] == 1500 and events(vm.id)[0][1]["path"] == "/a" and events(vm.id)[1][1]["duration_ms"] >= 0
            command = command_id()
            for offset in (0, 200000):
                assert gateway.call(vm.id, {"op": "get", "command": command, "path": "/a", "offset": offset, "length": 200000, "owned": True, "last": offset > 0,
                                            **({"audit": audit("download")} if offset == 0 else {})}, connection=connection)[0] == 200
            until(lambda: under_way(vm.id) == [], "it has ended")
            assert events(vm.id)[3][0] == "download_ended" and events(vm.id)[3][1]["bytes"] == 300000
            # an error ends it
            runtime.handler = lambda _r, _n, _h, _d: ({"error": "no_file"}, b"")
            assert gateway.call(vm.id, {"op": "get", "command": command_id(), "owned": True, "audit": audit("download")}, connection=connection)[0] == 200
            until(lambda: under_way(vm.id) == [], "it has ended")
            assert events(vm.id)[-1][1]["error"] == "no_file"
            # the client goes half-way
            runtime.handler = files
            command = command_id()
            assert gateway.call(vm.id, {"op": "put", "command": command, "path": "/a", "offset": 0, "size": 1500, "owned": True, "audit": audit("upload")}, b"u", connection)[0] == 200
            assert under_way(vm.id) == [command]
            connection.close()
            until(lambda: under_way(vm.id) == [], "it has ended")
            assert events(vm.id)[-1][0] == "upload_ended" and events(vm.id)[-1][1]["outcome"] == "abandoned"
            assert kills(runtime) == [], "there is nothing to kill"
        vm.terminate()


def part_ended():
    """The runtime tells of ends until it hears that they have been committed."""
    with Calling() as gateway:
        vm = VM(gateway)
        with Runtime(gateway, vm, lambda *_: ({"running": True}, b"")) as runtime:
            commands = [command_id() for _ in range(300)]
            for command in commands[:100]:
                assert gateway.call(vm.id, {"op": "start", "command": command, "audit": audit()})[0] == 200
            # many at once, twice, unknown ones among them: all are noted, and each is logged once
            for command in commands + commands:
                runtime.tell_end(command)
            until(lambda: set(runtime.noted()) == set(commands), "all are noted")
            assert under_way(vm.id) == []
            assert len(events(vm.id, "exec_ended")) == 100
            # numbers are a VM's: within bounds, and only those that are known
            command = command_id()
            assert gateway.call(vm.id, {"op": "start", "command": command, "audit": audit()})[0] == 200
            runtime.channel.send(json.dumps({"type": "ended", "command": command, "exit_code": 10**12, "duration_ms": -5, "stdout_bytes": 2**62, "stderr_bytes": "many", "timed_out": "x", "role": "root", "more": ["x"]}))
            until(lambda: command in runtime.noted(), "it is noted")
            assert events(vm.id)[-1][1] == {"exit_code": 255, "duration_ms": 0, "stdout_bytes": 10**15, "role": "alice", "command": command}
            for bad in ('{"type": "ended"}', '{"type": "ended", "command": 5}', '{"type": "ended", "command": "x"}', json.dumps({"type": "ended", "command": command.upper()})):
                with Runtime(gateway, vm) as other:
                    other.channel.send(bad)
                    assert other.closed() == 1007, bad
        # a VM that tells of ends that there are none of
        with Runtime(gateway, vm) as runtime:
            for _ in range(2000):
                try:
                    runtime.tell_end(command_id())
                except websockets.ConnectionClosed:
                    break
            assert runtime.closed() == 1008
        vm.terminate()


def part_restart():
    """The gateway is killed: ends are told again to the next one, and no command is lost sight of."""
    with Calling() as gateway:
        vm = VM(gateway)
        command, waiting = command_id(), command_id()
        with Runtime(gateway, vm, lambda _r, _n, header, _d: None if header["op"] == "output" else ({"running": True}, b"")) as runtime:
            for one in (command, waiting):
                assert gateway.call(vm.id, {"op": "start", "command": one, "owned": True, "audit": audit()})[0] == 200
            waits = gateway.send(vm.id, {"op": "output", "command": waiting, "wait_ms": 20000})
            until(lambda: len([c for c in runtime.calls if c[1]["op"] == "output"]) == 1, "it waits")
            gateway.end(signal.SIGKILL)
            assert runtime.closed() is not None
            try:
                waits.getresponse()
                assert False, "nobody knows"
            except (http.client.HTTPException, OSError):
                pass
        assert set(under_way(vm.id)) == {command, waiting}
        # on the same path, where the dead one's socket is
        with Calling(control=gateway.path) as second:
            with Runtime(second, vm) as runtime:
                for one in (command, waiting):
                    runtime.tell_end(one, exit_code=4)
                until(lambda: set(runtime.noted()) == {command, waiting}, "they are noted")
                assert under_way(vm.id) == [] and [detail["exit_code"] for _, detail in events(vm.id, "exec_ended")] == [4, 4]
                assert second.call(vm.id, {"op": "output", "command": command})[0] == 200
            assert second.end() == 0
        assert not os.path.exists(gateway.path), "its socket goes with it"
    # while the database is away they wait, and are noted when it is back
    proxy = Proxy()
    with Calling(f"--database={proxy.conninfo}") as gateway, Runtime(gateway, vm, lambda *_: ({"running": True}, b"")) as runtime:
        command = command_id()
        assert gateway.call(vm.id, {"op": "start", "command": command, "audit": audit()})[0] == 200
        proxy.holds = True
        runtime.tell_end(command)
        assert proxy.held.wait(TIMEOUT)
        assert runtime.noted() == [], "it has not heard of a commit"
        proxy.holds = False
        until(lambda: runtime.noted() == [command], "it is noted")
    vm.terminate()


def part_hostile():
    """What a VM sends that nobody has asked for costs it its channel, and nobody else anything."""
    with Calling() as gateway:
        vm, other = VM(gateway), VM(gateway)
        ask = {"op": "output", "command": command_id()}

        def offends(send, code, asked=True):
            """The VM does that, with a call under way or none; it loses its channel, and the call is lost"""
            with Runtime(gateway, vm, silent) as runtime:
                if asked:
                    waits = gateway.send(vm.id, ask)
                    until(lambda: runtime.calls, "it has arrived")
                try:
                    send(runtime)
                except websockets.ConnectionClosed:
                    pass
                assert runtime.closed() == code, (runtime.code, code)
                if asked:
                    assert answer_of(waits)[0] == 502
            until(lambda: gateway.metric("agentvm_gateway_channels") == 1, "it is gone")
            assert gateway.metric("agentvm_gateway_call_memory_bytes") == 0
            assert gateway.call(other.id, ask)[0] == 200
        with Runtime(gateway, other):
            frame = struct.pack(">I", 1) + pack({"a": 1})
            offends(lambda r: r.channel.send(frame), 1008, asked=False)
            offends(lambda r: r.channel.send(b"x"), 1008)
            offends(lambda r: r.channel.send(b""), 1008)
            offends(lambda r: r.answer(r.calls[0][0] + 1, {}), 1008)
            for bad in (b"", b"\0\0\0", struct.pack(">I", 100) + b"{}", struct.pack(">I", 2**31) + b"{}", pack(b"[]"), pack(b"{"), pack(b"\xff"), pack(b'{"a": 1, "a": 2}'), pack(b'"x"')):
                offends(lambda r, bad=bad: r.channel.send(struct.pack(">I", r.calls[0][0]) + bad), 1007)
            offends(lambda r: r.answer(r.calls[0][0], {}, b"x" * (MAX_HEADER + MAX_CHUNK + 100)), 1009)
            offends(lambda r: r.channel.send(b"x" * 1000 for _ in range(10000)), 1009)
            # fragments without an end
            offends(lambda r: r.channel.send(itertools.repeat(b"", 100000)), 1009)
            offends(lambda r: r.channel.send(itertools.repeat(b"x", 100000)), 1009)
            # an answer twice
            with Runtime(gateway, vm, silent) as runtime:
                waits = gateway.send(vm.id, ask)
                until(lambda: runtime.calls, "it has arrived")
                runtime.answer(runtime.calls[0][0], {})
                assert answer_of(waits)[0] == 200
                runtime.answer(runtime.calls[0][0], {})
                assert runtime.closed() == 1008
            # no frame at all for a call: 504, and an answer that comes too late harms nobody
            with Runtime(gateway, vm, silent) as runtime:
                began = time.time()
                waits = gateway.send(vm.id, {**ask, "wait_ms": 500})
                assert answer_of(waits)[0] == 504 and 10 < time.time() - began < 13
                runtime.answer(runtime.calls[0][0], {})
                runtime.handler = echo
                assert gateway.call(vm.id, ask)[0] == 200
                # a new channel takes over: what the old one had under way is lost
                runtime.handler = silent
                waits = gateway.send(vm.id, ask)
                until(lambda: len(runtime.calls) == 3, "it has arrived")
                with Runtime(gateway, vm):
                    assert answer_of(waits)[0] == 502 and gateway.call(vm.id, ask)[0] == 200
            # the session ends with a call under way
            with Runtime(gateway, vm, silent) as runtime:
                waits = gateway.send(vm.id, ask)
                until(lambda: runtime.calls, "it has arrived")
                vm.terminate()
                assert answer_of(waits)[0] == 502 and runtime.closed() == 4410
        other.terminate()


def part_many():
    with Calling() as gateway:
        vms = [VM(gateway) for _ in range(4)]
        runtimes = [Runtime(gateway, vm) for vm in vms]
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            def one(i):
                data = os.urandom(i * 37)
                command = command_id()
                answer = gateway.call(vms[i % 4].id, {"op": "start", "command": command, "command_len": 1, "audit": audit(i=i)}, data)
                runtimes[i % 4].tell_end(command)
                return answer[0] == 200 and answer[2] == data
            assert all(pool.map(one, range(200)))
        until(lambda: all(under_way(vm.id) == [] for vm in vms), "all have ended")
        for vm, runtime in zip(vms, runtimes):
            assert len(events(vm.id, "exec_started")) == 50 == len(events(vm.id, "exec_ended"))
            with runtime:
                pass
            vm.terminate()
        assert gateway.metric("agentvm_gateway_call_memory_bytes") == 0


def part_bounds():
    """256 calls of a session, and so much memory, are under way at once."""
    with Calling("--max-call-memory=6", "--request-timeout=3") as gateway:
        vm, other = VM(gateway), VM(gateway)
        ask = {"op": "output", "command": command_id(), "wait_ms": 20000}
        with Runtime(gateway, vm, silent) as runtime, Runtime(gateway, other):
            waiting = [gateway.send(vm.id, ask) for _ in range(256)]
            until(lambda: len(runtime.calls) == 256, "as many as may be")
            connection = gateway.send(vm.id, ask)
            response = connection.getresponse()
            assert response.status == 429 and response.headers["retry-after"]
            response.read()
            assert gateway.call(vm.id, {**ask, "op": "start", "audit": audit()}, connection=connection)[0] == 429
            assert gateway.call(other.id, ask)[0] == 200
            runtime.answer(runtime.calls[0][0], {})
            assert answer_of(waiting[0])[0] == 200 and gateway.send(vm.id, ask, connection=connection)
            until(lambda: len(runtime.calls) == 257, "there is room again")
            for one in (*waiting, connection):
                one.close()
            until(lambda: gateway.metric("agentvm_gateway_calls_under_way") == 0, "all have gone")
            # those who have gone are not counted, but no channel leaves more than 1024 unanswered
            for i in range(768):
                one = gateway.send(vm.id, ask)
                until(lambda i=i: len(runtime.calls) == 258 + i, "it has arrived")
                one.close()
            until(lambda: gateway.metric("agentvm_gateway_calls_under_way") == 0, "all have gone")
            assert gateway.call(vm.id, ask)[0] == 404
            assert runtime.closed() == 1008
        with Runtime(gateway, vm, silent) as runtime:
            # bodies that are on their way take memory, until they are too slow
            large = ticket(vm.id, ask["command"], pack(ask))
            slow = [gateway.backend() for _ in range(5)]
            for one in slow:
                one.putrequest("POST", f"/v1/sessions/{vm.id}/calls")
                one.putheader("Authorization", large)
                one.putheader("Content-Length", str(4 + MAX_HEADER + MAX_CHUNK))
                one.endheaders(b"x")
            until(lambda: gateway.metric("agentvm_gateway_call_memory_bytes") > 5 * (MAX_HEADER + MAX_CHUNK), "all have begun")
            assert gateway.call(vm.id, {**ask, "pad": "p" * 60000}, b"x" * MAX_CHUNK)[0] == 503
            assert {answer_of(one)[0] for one in slow} == {408}
            assert gateway.metric("agentvm_gateway_call_memory_bytes") == 0
            runtime.handler = echo
            assert gateway.call(vm.id, ask, b"x" * MAX_CHUNK)[0] == 200
        vm.terminate()
        other.terminate()


def part_listeners():
    """What one listener serves, the other does not, whatever is asked of it."""
    with Calling() as gateway:
        vm = VM(gateway)
        ask = {"op": "output", "command": command_id()}
        body = pack(ask)
        mode = os.stat(gateway.path).st_mode
        assert mode & 0o7777 == 0o660, oct(mode)
        with Runtime(gateway, vm) as runtime:
            for host in ("gateway", "default", "control", "calls", "localhost", "", f"127.0.0.1:{gateway.port}"):
                headers = {"Host": host, "Authorization": ticket(vm.id, ask["command"], body)}
                public = gateway.connection()
                public.request("POST", f"/v1/sessions/{vm.id}/calls", body, headers)
                assert public.getresponse().status == 404, host
                for method, path in (("POST", "/v1/heartbeat"), ("POST", "/v1/bootstrap"), ("GET", "/v1/channel"), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/"),
                                     ("POST", "/v1/sessions"), ("POST", f"/v1/sessions/{vm.id}/calls/"), ("POST", f"/v1/sessions/{vm.id}/call")):
                    with socket.socket(socket.AF_UNIX) as raw:
                        raw.settimeout(TIMEOUT)
                        raw.connect(gateway.path)
                        raw.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {vm.session_token}\r\n".encode() + (b"Content-Length: 2\r\n\r\n{}" if method == "POST" else b"\r\n"))
                        assert raw.recv(1000).startswith(b"HTTP/1.1 404 "), (host, path)
                control = gateway.backend()
                control.request("POST", f"/v1/sessions/{vm.id}/calls", body, headers)
                assert control.getresponse().status == 200, host
            assert all(header["op"] == "output" for _, header, _ in runtime.calls)
            # no WebSocket, and no HTTP/2
            for upgrade in ("websocket", "h2c"):
                with socket.socket(socket.AF_UNIX) as raw:
                    raw.connect(gateway.path)
                    raw.settimeout(TIMEOUT)
                    raw.sendall(f"GET /v1/channel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
                                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Protocol: agentvm.v1\r\n"
                                f"Authorization: Bearer {vm.session_token}\r\n\r\n".encode())
                    assert b" 101 " not in raw.recv(1000)
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(gateway.path)
                raw.settimeout(TIMEOUT)
                raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                assert b" 200 " not in raw.recv(1000)
            assert gateway.metric("agentvm_gateway_channels") == 1
        vm.terminate()
        # a path that somebody listens on, or that is no socket, is left alone
        done = subprocess.run([GATEWAY, f"--database={CONNSTR} user=gw", f"--port={free_port()}", f"--control=unix:{gateway.path}"], capture_output=True, text=True, check=False, timeout=TIMEOUT)
        assert done.returncode == 1 and "cannot listen" in done.stderr and os.path.exists(gateway.path)
    plain = os.path.join(DIR, "plain")
    with open(plain, "w", encoding="ascii"):
        pass
    done = subprocess.run([GATEWAY, f"--database={CONNSTR} user=gw", f"--port={free_port()}", f"--control=unix:{plain}"], capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert done.returncode == 1 and os.path.isfile(plain)
    for bad in ("unix:relative", "unix:/" + "x" * 100, "localhost:80", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:", "x", "", "10.0.0.1:80", "[::]:80"):
        done = subprocess.run([GATEWAY, "--check", f"--database={CONNSTR} user=gw", f"--control={bad}"], capture_output=True, text=True, check=False, timeout=TIMEOUT)
        assert done.returncode == 2 and "--control=" in done.stderr, (bad, done)
    done = subprocess.run([GATEWAY, "--check", f"--database={CONNSTR} user=gw", "--max-connections=100", "--control=127.0.0.1:80"], capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert done.returncode == 0, done


def part_tls():
    cert, key = certificate("calls")
    context = ssl.create_default_context(cafile=cert)
    port = free_port()
    with Gateway(f"--tls-cert={cert}", f"--tls-key={key}", f"--control=127.0.0.1:{port}", tls=context) as gateway:
        vm = VM(gateway)
        with Runtime(gateway, vm) as runtime:
            def call(data, connection, header=None):
                header = header or {"op": "output", "command": command_id()}
                body = pack(header, data)
                connection.request("POST", f"/v1/sessions/{vm.id}/calls", body, {"Authorization": ticket(vm.id, header["command"], body)})
                return answer_of(connection)
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT, context=context)
            for size in (0, 1000, MAX_CHUNK):
                data = os.urandom(size)
                assert call(data, connection)[::2] == (200, data)
            # it is the control listener alone that takes calls, also when the name says otherwise
            for name in ("control", "default", "calls"):
                for target, path, expected in ((port, "/healthz", 404), (gateway.port, f"/v1/sessions/{vm.id}/calls", 404)):
                    raw = ssl.create_default_context(cafile=cert)
                    raw.check_hostname = False
                    with raw.wrap_socket(socket.create_connection(("127.0.0.1", target)), server_hostname=name) as tls:
                        tls.sendall(f"GET {path} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
                        assert f" {expected} ".encode() in tls.recv(1000).split(b"\r\n")[0]
            plain = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                assert call(b"", plain)[0] != 200, "without TLS"
            except (http.client.HTTPException, OSError):
                pass
            # an owner that goes
            runtime.handler = lambda *_: ({"running": True}, b"")
            command = command_id()
            assert call(b"", connection, {"op": "start", "command": command, "owned": True, "audit": audit()})[0] == 200
            connection.close()
            until(lambda: kills(runtime) == [(command, 9)], "it is killed", 1)
            # a new certificate is both listeners'
            runtime.handler = echo
            for source, target in zip(certificate("renewed"), (cert, key)):
                os.replace(source, target)
            gateway.process.send_signal(signal.SIGHUP)
            until(lambda: "certificate read" in gateway.text(), "it is read")
            renewed = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT, context=ssl.create_default_context(cafile=cert))
            assert call(b"x", renewed)[0] == 200
        vm.terminate()


def part_drain():
    with Calling("--drain=600") as gateway:
        vm, idle = VM(gateway), VM(gateway)
        answer = lambda _r, _n, header, _d: None if header["op"] == "output" else ({"running": True}, b"")  # noqa: E731
        with Runtime(gateway, vm, answer) as runtime, Runtime(gateway, idle) as second:
            owner = gateway.backend()
            command = command_id()
            assert gateway.call(vm.id, {"op": "start", "command": command, "owned": True, "audit": audit()}, connection=owner)[0] == 200
            waits = gateway.send(vm.id, {"op": "output", "command": command, "wait_ms": 20000})
            kept = gateway.backend()
            assert gateway.call(idle.id, {"op": "start", "command": command_id()}, connection=kept)[0] == 200
            until(lambda: len(runtime.calls) == 2, "it waits")
            gateway.process.send_signal(signal.SIGTERM)
            assert second.closed() == 4503, "a channel without calls goes at once"
            for connection in (kept, owner):
                assert gateway.call(vm.id, {"op": "output", "command": command, "owned": True}, connection=connection)[0] == 503
            assert gateway.process.poll() is None and runtime.code is None
            runtime.answer(runtime.calls[1][0], {"running": True})
            assert answer_of(waits)[0] == 200, "what is under way is answered"
            assert runtime.closed() == 4503
            assert gateway.process.wait(TIMEOUT) == 0
            assert kills(runtime) == [], "its command goes on: whoever asks for it elsewhere has it"
        vm.terminate()
        idle.terminate()


def part_memory():
    """Calls cost an idle channel nothing: what it has taken is given back."""
    with Calling() as gateway:
        vm = VM(gateway)

        def resident():
            with open(f"/proc/{gateway.process.pid}/statm", encoding="ascii") as statm:
                return int(statm.read().split()[1]) * 4096
        with Runtime(gateway, vm):
            before = resident()
            for _ in range(3):
                with concurrent.futures.ThreadPoolExecutor(16) as pool:
                    assert set(pool.map(lambda _: gateway.call(vm.id, {"op": "output", "command": command_id()}, b"x" * MAX_CHUNK)[0], range(200))) == {200}
            assert gateway.metric("agentvm_gateway_call_memory_bytes") == 0
            until(lambda: gateway.metric("agentvm_gateway_control_connections") == 0, "all have gone")
            assert resident() - before < 64 * 1024 * 1024, (before, resident())
        vm.terminate()


def part_cable():
    """What a VM without a network is asked for is not bound to the rate of what it says by itself."""
    directory = os.path.join(DIR, "vms")
    os.mkdir(directory)
    with Calling(f"--vm-sockets={directory}") as gateway:
        vm = VM(gateway)
        cable = Cable(directory, "vm")
        data = os.urandom(MAX_CHUNK)
        with Runtime(gateway, vm, lambda _r, _n, header, _d: ({}, data if header["op"] == "get" else b""), cable=cable):
            for op, sent, got in (("get", b"", data), ("put", data, b"")):
                def one(_, op=op, sent=sent, got=got):
                    with UnixConnection(gateway.path) as connection:
                        return all(gateway.call(vm.id, {"op": op, "command": command_id()}, sent, connection) == (200, {}, got) for _ in range(20))
                with concurrent.futures.ThreadPoolExecutor(4) as pool:
                    assert all(pool.map(one, range(4)))
            assert gateway.metric("agentvm_gateway_vm_pauses_total") == 0, "20 MB each way"
            # what it says by itself is bound
            for _ in range(4000):
                cable.cable.sendall(b"\xc0" * 262144)
                if gateway.metric("agentvm_gateway_vm_pauses_total") > 0:
                    break
            assert gateway.metric("agentvm_gateway_vm_pauses_total") > 0
        vm.terminate()


def part_messages():
    """Messages of the cable: what makes no sense costs a VM its channel or its cable, and nobody else anything."""
    directory = os.path.join(DIR, "vms")
    os.mkdir(directory)
    with Calling(f"--vm-sockets={directory}") as gateway:
        vm, other = VM(gateway), VM(gateway)
        cable, neighbour = Cable(directory, "vm"), Cable(directory, "neighbour")
        ask = {"op": "output", "command": command_id()}

        def offends(send, code=None, asked=True):
            """The VM does that, with a call under way or none; it loses its channel, and without a code its cable, and the call is lost"""
            nonlocal cable
            cuts = cable.cuts
            with Runtime(gateway, vm, silent if asked else echo, cable=cable) as runtime:
                if asked:
                    waits = gateway.send(vm.id, ask)
                    until(lambda: runtime.calls, "it has arrived")
                else:
                    assert gateway.call(vm.id, ask)[0] == 200, "so that it is known how it takes calls"
                send(runtime)
                assert runtime.closed() == (code or 1006), (runtime.code, code)
                if asked:
                    assert answer_of(waits)[0] == 502
            until(lambda: cable.cuts == cuts + (code is None), "its cable")
            if code is None:
                cable = Cable(directory, f"vm-{next(paths)}")  # that one is left alone for a while
            until(lambda: gateway.metric("agentvm_gateway_channels") == 1, "it is gone")
            assert gateway.metric("agentvm_gateway_call_memory_bytes") == 0
            assert gateway.call(other.id, ask)[0] == 200

        def number(runtime):
            return struct.pack(">I", runtime.calls[0][0])

        with Runtime(gateway, other, cable=neighbour):
            good = pack({"a": 1})
            offends(lambda r: cable.message(struct.pack(">I", 1) + good), 1008, asked=False)
            offends(lambda r: cable.message(b"x"), 1008)
            offends(lambda r: cable.message(struct.pack(">I", r.calls[0][0] + 1) + good), 1008)
            for bad in (b"", b"\0\0\0", struct.pack(">I", 2**31) + b"{}", pack(b"[]"), pack(b"{")):
                offends(lambda r, bad=bad: cable.message(number(r) + bad), 1007)
            offends(lambda r: cable.message(number(r) + pack({}, b"x" * (MAX_HEADER + MAX_CHUNK + 100))), 1009)
            offends(lambda r: cable.piece(b"x", 2**28 - 1), 1009)
            offends(lambda r: cable.piece(b"x", 100))  # while the rest of that is still to come
            offends(lambda r: r.channel.send(number(r) + good), 1008)  # not this way
            # pieces
            offends(lambda r: cable.piece(b"x" * 100, 0))
            offends(lambda r: cable.piece(b"", 100))
            offends(lambda r: cable.piece(b"x" * 101, 100))
            offends(lambda r: cable.piece(b"x" * (Cable.PIECE + 1), 200000))
            offends(lambda r: (cable.piece(b"x" * 100, 1000), cable.piece(b"x" * 100, 1000)))
            offends(lambda r: (cable.piece(b"x" * 100, 150), cable.piece(b"x" * 51, 0)))
            offends(lambda r: cable.message(number(r) + good, nonce=cable.own))
            # another VM's call is not its to answer
            with Runtime(gateway, vm, silent, cable=cable) as runtime:
                mine = gateway.send(vm.id, ask)
                until(lambda: runtime.calls, "it has arrived")
                neighbour.message(number(runtime) + pack({"whose": "neighbour"}))
                until(lambda: gateway.metric("agentvm_gateway_channels") == 1, "the neighbour's channel is closed")
                runtime.answer(runtime.calls[0][0], {"whose": "mine"})
                assert answer_of(mine)[:2] == (200, {"whose": "mine"})
        with Runtime(gateway, other, cable=neighbour):
            # nothing is passed on before the runtime says how
            assert gateway.call(vm.id, ask)[0] == 404
            # what is unfinished when the guest begins anew is no answer, and no reason to leave it
            cuts = cable.cuts
            for filling in (Cable.PIECE + 8, 0):
                with Runtime(gateway, vm, silent, cable=cable) as runtime:
                    waits = gateway.send(vm.id, ask)
                    until(lambda: runtime.calls, "it has arrived")
                    message = number(runtime) + pack({"a": 1}, b"x" * 200000)
                    cable.piece(message[:Cable.PIECE], len(message))
                    if filling:
                        rest = message[Cable.PIECE:]
                        with cable.lock:
                            cable.cable.sendall(bytes([Cable.MESSAGE, len(rest) >> 14, len(rest) >> 7 & 127, len(rest) & 127, 0, 0, 0, 0]) + rest[:1000])
                    cable.begin_anew(filling)
                    assert answer_of(waits)[0] == 502
                    assert runtime.closed() == 1006
                with Runtime(gateway, vm, cable=cable):
                    assert gateway.call(vm.id, ask, b"y" * MAX_CHUNK)[2] == b"y" * MAX_CHUNK
            assert cable.cuts == cuts
        vm.terminate()
        other.terminate()


def part_locks():
    """Somebody holds a session's row, and its VM's log goes on."""
    with Calling() as gateway:
        vm = VM(gateway)
        with db() as holder, holder.transaction(force_rollback=True):
            holder.execute("SELECT agentvm.extend(%s, '1 s')", (vm.id,))
            began = time.time()
            with Runtime(gateway, vm) as runtime:
                command = command_id()
                assert gateway.call(vm.id, {"op": "start", "command": command, "audit": audit()})[0] == 200
                runtime.tell_end(command)
                until(lambda: command in runtime.noted(), "it is noted")
                until(lambda: value("SELECT gateway_id FROM agentvm.session_heartbeat WHERE session_id = %s", vm.id) == "gw1", "it is found")
                assert gateway.call(vm.id, {"op": "output", "command": command})[0] == 200
            assert time.time() - began < 3, time.time() - began
        vm.terminate()


for part in PARTS:
    globals()[f"part_{part}"]()
    print(part, flush=True)
