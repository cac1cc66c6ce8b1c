"""A gateway's control listener with the runtimes behind it, as backends see them: control.py SOCKET KEYFILE GATEWAY DIR

Speaks what protocol.h says of calls: checks tickets, runs commands on this machine, each once by its id, reads and
writes files.  DIR/log gets a line of JSON for each request, DIR/faults (a list, read anew each time) says what goes
wrong: {"op", "do", "times"}, the first that fits and has not been used up.  "do" is a status; "refuse": hang up unread;
"lose": do it, and hang up in place of an answer, as a gateway that ends; "cut": hang up as one that lives; "hang": never answer; {"raw": hex}: that body; {"change": {...}}: members
of the answer's header; {"wait_ms"}: that in place of what the header says.  With "session" only calls of that one.
"""
import base64
import hashlib
import hmac
import json
import os
import re
import select
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tarfile
import threading
import time

SOCKET, KEYFILE, GATEWAY, DIR = sys.argv[1:]
KEY_ID, KEY = open(KEYFILE, encoding="ascii").read().strip().split(":", 1)
CONTROL_KEY = hmac.new(base64.b64decode(KEY), b"agentvm control:" + GATEWAY.encode(), "sha256").digest()
MAX_CHUNK, MAX_PART = 1024 * 1024, 256 * 1024
MAX_HEADER = 96 * 1024
MAX_UNREAD = 512 * 1024  # input that a command has not read yet

STARTED = time.monotonic()
lock = threading.RLock()
commands = {}
uploads = {}
files = {}
used = {}


def log(**what):
    with lock, open(os.path.join(DIR, "log"), "a", encoding="utf-8") as file:
        file.write(json.dumps({"at": time.time(), **what}) + "\n")


def fault(session, op):
    try:
        with open(os.path.join(DIR, "faults"), encoding="utf-8") as file:
            faults = json.load(file)
            version = os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, ValueError):
        return None
    with lock:
        for i, one in enumerate(faults):
            key = (version, i)
            if one["op"] == op and one.get("session", session) == session and used.get(key, 0) < one.get("times", 1):
                used[key] = used.get(key, 0) + 1
                return one["do"]
    return None


class Failure(Exception):
    def __init__(self, error, message):
        super().__init__(message)
        self.error = error


class Stream:
    """What a command has written: head and tail of it."""

    def __init__(self, room):
        self.room, self.total, self.head, self.tail = room, 0, b"", b""

    def add(self, data):
        self.total += len(data)
        take = max(0, self.room - self.room // 2 - len(self.head))
        self.head += data[:take]
        self.tail = (self.tail + data[take:])[-(self.room // 2):] if self.room > 1 else b""

    def find(self, offset, room):
        begin = self.total - len(self.tail)
        if offset < len(self.head):
            data, start = self.head[offset:offset + room], offset
        else:
            start = max(offset, begin)
            data = self.tail[start - begin:start - begin + room]
        return {"total": self.total, "from": min(start, self.total), "len": len(data),
                "lost": self.total - len(self.head) - len(self.tail)}, data


class Command:
    def __init__(self, header, data):
        text = data[:header["command_len"]].decode()
        self.input, self.total, self.taken = b"", header["input_len"], 0
        self.streams = [Stream(header["max_output"]), Stream(header["max_output"])]
        self.started, self.ended = time.monotonic(), None
        self.timed_out = self.killed = False
        self.owner = None
        self.changed = threading.Condition()
        self.process = None
        if "tar" in header:
            self.exit_code, message = tar(header["tar"])
            self.streams[1].add(message.encode())
            self.ended = time.monotonic()
            return
        self.process = subprocess.Popen(
            ["bash", "-lc", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            cwd=header["cwd"] or DIR, env={"PATH": os.environ["PATH"], "HOME": DIR, "LANG": "C.UTF-8", **(header.get("env") or {})})
        self.feed(data[header["command_len"]:])
        self.readers = [threading.Thread(target=self.read, args=(i, f), daemon=True)
                        for i, f in enumerate((self.process.stdout, self.process.stderr))]
        for thread in self.readers:
            thread.start()
        threading.Thread(target=self.write, daemon=True).start()
        threading.Thread(target=self.watch, args=(header["timeout_ms"] / 1000,), daemon=True).start()

    def feed(self, data):
        with self.changed:
            room = MAX_UNREAD - len(self.input) if self.ended is None else len(data)
            self.input += data[:room]
            self.taken += len(data[:room])
            self.changed.notify_all()

    def write(self):
        sent = 0
        while True:
            with self.changed:
                while not self.input and sent < self.total and self.ended is None:
                    self.changed.wait()
                data, self.input = self.input[:65536], self.input[65536:]
                self.changed.notify_all()
            try:
                self.process.stdin.write(data)
                self.process.stdin.flush()
                sent += len(data)
                if sent < self.total and self.ended is None:
                    continue
                self.process.stdin.close()
            except (BrokenPipeError, ValueError):
                pass
            with self.changed:
                self.input, self.taken = b"", self.total
                self.changed.notify_all()
            return

    def read(self, which, file):
        while data := os.read(file.fileno(), 65536):
            with self.changed:
                self.streams[which].add(data)
                self.changed.notify_all()

    def watch(self, timeout):
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.timed_out = True
            self.signal(signal.SIGKILL)
            self.process.wait()
        for thread in self.readers:
            thread.join(30)
        with self.changed:
            code = self.process.returncode
            self.exit_code = 124 if self.timed_out else code if code >= 0 else 128 - code
            self.ended = time.monotonic()
            self.changed.notify_all()

    def signal(self, number):
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, AttributeError):
            pass

    def answer(self, header):
        room = MAX_PART if header.get("part") or self.ended is not None else 0
        streams, data = [], b""
        for name, stream in zip(("stdout", "stderr"), self.streams):
            told, some = stream.find(header.get(name, 0), room - len(data))
            streams.append(told)
            data += some
        running = self.ended is None
        return {"running": running, "exit_code": None if running else self.exit_code, "timed_out": self.timed_out,
                "killed": self.killed, "duration_ms": int(((self.ended or time.monotonic()) - self.started) * 1000),
                "stdout": streams[0], "stderr": streams[1]}, data


def tar(what):
    """What the runtime's program for archives does."""
    try:
        if "create" in what:
            if not os.path.isdir(what["create"]):
                return 2, f"{what['create']}: no directory"
            with tarfile.open(what["file"], "w", format=tarfile.GNU_FORMAT) as archive:
                for name in sorted(os.listdir(what["create"])):
                    archive.add(os.path.join(what["create"], name), name)
            return 0, ""
        with tarfile.open(what["file"]) as archive:
            for member in archive:
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    return 3, f"{member.name}: leads out of the directory\n"
            os.makedirs(what["extract"], exist_ok=True)
            archive.extractall(what["extract"])
        return 0, ""
    except tarfile.TarError as error:
        return 4, f"no archive: {error}\x1b[31m\n"
    except OSError as error:
        return 1, str(error)
    finally:
        if "extract" in what:
            os.unlink(what["file"])


def put(header, data):
    path, offset = os.path.join(DIR, header["path"]), header["offset"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(path):
        raise Failure("wrong_file", f"write {header['path']}: Is a directory")
    answer = {"written": offset + len(data), "any_order": True}, b""
    if header["command"] in files:
        return answer
    with lock:
        content = uploads.setdefault(header["command"], bytearray())
        content.extend(bytes(max(0, offset - len(content))))
        content[offset:offset + len(data)] = data
    if offset + len(data) == header["size"]:
        with open(path + ".part", "wb") as file:
            file.write(content)
        os.chmod(path + ".part", int(header["mode"], 8))
        os.rename(path + ".part", path)
        del uploads[header["command"]]
        files[header["command"]] = None
    return answer


def get(header):
    path = os.path.join(DIR, header["path"])
    try:
        file = files.get(header["command"]) or open(path, "rb")
        status = os.fstat(file.fileno())
        file.seek(header["offset"])
        data = file.read(header["length"])
    except FileNotFoundError as error:
        raise Failure("no_file", f"open {header['path']}: No such file or directory") from error
    except PermissionError as error:
        raise Failure("denied", f"open {header['path']}: Permission denied") from error
    except IsADirectoryError as error:
        raise Failure("wrong_file", f"open {header['path']}: Is a directory") from error
    if header.get("remove") and header["command"] not in files:
        os.unlink(path)
        files[header["command"]] = file
    return {"size": status.st_size, "version": f"{status.st_ino}-{status.st_mtime_ns}"}, data


class Handler(socketserver.BaseRequestHandler):
    def setup(self):
        self.buffer = b""
        self.goes = False  # as with a gateway that ends: nobody kills what depends on us
        log(event="open", connection=id(self))

    def finish(self):
        log(event="close", connection=id(self))
        with lock:
            for command in commands.values():
                if command.owner is self and command.ended is None and not self.goes:
                    command.killed = True
                    command.signal(signal.SIGKILL)

    def receive(self):
        data = self.request.recv(1 << 20)
        self.buffer += data
        return bool(data)

    def gone(self):
        """Whether the other side has hung up while we have nothing to say."""
        poll = select.poll()
        poll.register(self.request, select.POLLIN)
        return bool(poll.poll(0)) and not self.request.recv(1, socket.MSG_PEEK)

    def handle(self):
        while True:
            while b"\r\n\r\n" not in self.buffer:
                if not self.receive():
                    return
            head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
            lines = head.decode().split("\r\n")
            fields = dict(line.lower().split(": ", 1) if not line.lower().startswith("authorization") else ("authorization", line.split(": ", 1)[1]) for line in lines[1:])
            length = int(fields.get("content-length", 0))
            while len(self.buffer) < length:
                if not self.receive():
                    return
            body, self.buffer = self.buffer[:length], self.buffer[length:]
            answer = self.request_answer(lines[0], fields, body)
            if answer is None:
                return
            status, content = answer
            self.request.sendall(f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)

    def ticket_is_good(self, session, command, ticket, body):
        match = re.fullmatch(r"Ticket ([^:]+):(\d+):([0-9a-f]{64})", ticket or "")
        if not match or match[1] != KEY_ID or not time.time() < int(match[2]) <= time.time() + 65:
            return False
        text = f"agentvm call\n{session}\n{command}\n{match[2]}\n{hashlib.sha256(body).hexdigest()}"
        return hmac.compare_digest(hmac.new(CONTROL_KEY, text.encode(), "sha256").hexdigest(), match[3])

    def request_answer(self, line, fields, body):
        match = re.fullmatch(r"POST /v1/sessions/([0-9a-f-]{36})/calls HTTP/1.1", line)
        assert match, line
        length, = struct.unpack(">I", body[:4])
        assert length <= MAX_HEADER and len(body) - 4 - length <= MAX_CHUNK, (length, len(body))
        header, data = json.loads(body[4:4 + length]), body[4 + length:]
        if not self.ticket_is_good(match[1], header["command"], fields.get("authorization"), body):
            log(event="ticket", session=match[1])
            return 401, b""
        log(event="call", session=match[1], connection=id(self), header=header, bytes=len(data))
        wrong = fault(match[1], header["op"])
        if wrong in ("refuse", "lose"):
            self.goes = True
        if wrong == "refuse":
            return None
        if wrong == "hang":
            while not self.gone():
                time.sleep(0.01)
            return None
        if isinstance(wrong, int):
            return wrong, b"{}"
        if isinstance(wrong, dict) and "raw" in wrong:
            return 200, bytes.fromhex(wrong["raw"])
        if isinstance(wrong, dict) and "wait_ms" in wrong:
            header["wait_ms"] = wrong["wait_ms"]
        try:
            outcome = self.call(header, data)
        except Failure as failure:
            outcome = {"error": failure.error, "message": str(failure)}, b""
        if outcome is None or wrong in ("lose", "cut"):
            return None
        answer, data = outcome
        if isinstance(wrong, dict) and "change" in wrong:
            answer.update(wrong["change"])
        text = json.dumps(answer).encode()
        return 200, struct.pack(">I", len(text)) + text + data

    def call(self, header, data):
        op = header["op"]
        if op == "put":
            return put(header, data)
        if op == "get":
            return get(header)
        with lock:
            command = commands.get(header["command"])
            if command is None and op == "start" and header["age_ms"] > (time.monotonic() - STARTED) * 1000:
                raise Failure("forgotten", "it may have run before")
            if command is None and op == "start":
                command = commands[header["command"]] = Command(header, data)
            if command is None:
                raise Failure("no_command", "there is no such command")
            if header.get("owned"):
                command.owner = self
        if op == "kill":
            command.killed = command.ended is None
            command.signal(header["signal"])
            return {}, b""
        if op == "input":
            return self.input(command, header, data)
        end = time.monotonic() + header.get("wait_ms", 0) / 1000
        while not self.done(command, header) and time.monotonic() < end:
            if self.gone():
                return None
            with command.changed:
                if not self.done(command, header):
                    command.changed.wait(max(0, min(0.1, end - time.monotonic())))
        with command.changed:
            return command.answer(header)

    @staticmethod
    def done(command, header):
        if command.ended is not None:
            return True
        return bool(header.get("part")) and any(
            s.total > header.get(n, 0) for n, s in zip(("stdout", "stderr"), command.streams))

    def input(self, command, header, data):
        end = time.monotonic() + header.get("wait_ms", 0) / 1000
        while True:
            with command.changed:
                known = command.taken - header["offset"]
                before = command.taken
                if 0 <= known < len(data):
                    command.feed(data[known:])
                if command.taken > before or known >= len(data) or time.monotonic() >= end:
                    return {"taken": command.taken}, b""
                command.changed.wait(0.1)
            if self.gone():
                return None


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (BrokenPipeError, ConnectionResetError)):
            super().handle_error(request, client_address)


if os.path.exists(SOCKET):
    os.unlink(SOCKET)
with Server(SOCKET, Handler) as server:
    print("ready", flush=True)
    server.serve_forever()
