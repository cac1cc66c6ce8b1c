"""The gateway, as VMs and operators see it: gateway.py CONNSTR KEYFILE GATEWAY DIR PART...

Plays the runtimes of noop sessions. Each part prints its name when all of it was so. The database is reached as the
superuser (to look) and by the gateway as role gw.
"""
import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import psycopg
import websockets

CONNSTR, KEYFILE, GATEWAY, DIR, *PARTS = sys.argv[1:]
KEY = base64.b64decode(open(KEYFILE, encoding="ascii").read().strip().split(":", 1)[1])
TIMEOUT = int(os.environ.get("PG_TEST_TIMEOUT_DEFAULT", "60"))


def db():
    return psycopg.connect(CONNSTR, autocommit=True)


def sql(query, *values):
    with db() as connection:
        cursor = connection.execute(query, values)
        return cursor.fetchall() if cursor.description else None


def value(query, *values):
    return sql(query, *values)[0][0]


def until(condition, what, timeout=None):
    end = time.time() + (timeout or TIMEOUT)
    while True:
        found = condition()
        if found:
            return found
        assert time.time() < end, f"never: {what}"
        time.sleep(0.02)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


class Gateway:
    """A running gateway on a port of its own; its log is a file."""

    def __init__(self, *options, name="gw1", port=None, wait=True, tls=None, environment=None):
        self.port = port or free_port()
        self.tls = tls
        self.log_path = os.path.join(DIR, f"gateway_{self.port}_{time.time_ns()}.log")
        self.log = open(self.log_path, "w+", encoding="utf-8")
        database = next((o.split("=", 1)[1] for o in options if o.startswith("--database=")), CONNSTR + " user=gw")
        options = [o for o in options if not o.startswith("--database=")]
        self.process = subprocess.Popen(
            [GATEWAY, f"--database={database}", f"--name={name}", f"--port={self.port}", *options],
            stderr=self.log, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})})
        until(lambda: self.knock() or self.process.poll() is not None, "the gateway listens")
        assert self.process.poll() is None, self.text()
        if wait:
            until(lambda: self.get("/readyz")[0] == 200, "the gateway has its database")

    def text(self):
        with open(self.log_path, encoding="utf-8") as log:
            return log.read()

    def knock(self):
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        except OSError:
            return False

    def connection(self):
        if self.tls:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def request(self, method, path, token=None, body=None, headers=None, connection=None):
        """(status, body or decoded JSON, headers)"""
        one = connection or self.connection()
        headers = dict(headers or {})
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        one.request(method, path, body=json.dumps(body) if isinstance(body, dict) else body, headers=headers)
        response = one.getresponse()
        text = response.read().decode()
        if connection is None:
            one.close()
        parsed = json.loads(text) if response.headers["content-type"] == "application/json" else text
        return response.status, parsed, response.headers

    def get(self, path):
        return self.request("GET", path)

    def beat(self, vm, **more):
        return self.request("POST", "/v1/heartbeat", vm.session_token, {}, **more)

    def metric(self, name):
        text = self.get("/metrics")[1]
        lines = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
        return sum(float(line) for line in lines)

    def channel(self, token):
        return websockets.connect(
            f"{'wss' if self.tls else 'ws'}://127.0.0.1:{self.port}/v1/channel", subprotocols=["agentvm.v1"], ssl=self.tls,
            additional_headers={"Authorization": f"Bearer {token}"}, ping_interval=None, proxy=None)

    def cpu(self):
        """Seconds that it has used."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as stat:
            return sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(TIMEOUT)
        self.log.close()
        return status

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class VM:
    """A session whose VM is us."""

    def __init__(self, gateway=None, boots=True, team="acme"):
        self.id = str(value("SELECT agentvm.provision(%s, profile => 'rt', env => '{\"A\": \"b\"}')", team))
        until(lambda: value("SELECT launched_at IS NOT NULL AND lease IS NULL FROM agentvm.session WHERE session_id = %s", self.id), "launched")
        self.bootstrap_token = hmac.new(KEY, f"{self.id}:1".encode(), hashlib.sha256).hexdigest()
        self.session_token = os.urandom(32).hex()
        if gateway and boots:
            status, answer, _ = self.bootstrap(gateway)
            assert status == 200, answer

    def bootstrap(self, gateway, token=None, boot_id="boot-1", session_token=None, again=True, **more):
        """As runtimes do: a 503, which one may get while a dispatcher has the row, is tried again, if not told otherwise"""
        def once():
            return gateway.request("POST", "/v1/bootstrap", token or self.bootstrap_token, {
                "session_token_sha256": sha256(session_token or self.session_token), "boot_id": boot_id,
                "runtime_version": "0", "hostname": "vm", **more})
        if not again:
            return once()
        return until(lambda: (lambda got: got[0] != 503 and got)(once()), "an answer")

    def state(self):
        return value("SELECT state FROM agentvm.session WHERE session_id = %s", self.id)

    def last_beat(self):
        return value("SELECT last_heartbeat_at FROM agentvm.session_heartbeat WHERE session_id = %s", self.id)

    def terminate(self):
        sql("SELECT agentvm.terminate(%s)", self.id)


def part_bootstrap():
    with Gateway() as gateway:
        vm = VM(gateway, boots=False)
        assert vm.bootstrap(gateway, token="0" * 64)[0] == 401
        assert vm.state() == "provisioning"
        status, answer, headers = vm.bootstrap(gateway)
        assert status == 200 and headers["cache-control"] == "no-store", (status, answer)
        assert answer["session_id"] == vm.id and answer["env"] == {"A": "b"} and answer["channel"] == "/v1/channel"
        assert vm.state() == "ready"
        assert value("SELECT boot_info FROM agentvm.session WHERE session_id = %s", vm.id) == {"runtime_version": "0", "hostname": "vm"}
        # a lost reply is no lockout; another runtime with the same token is turned away
        assert vm.bootstrap(gateway)[1] == answer
        assert vm.bootstrap(gateway, session_token="another" * 8)[0] == 401
        assert vm.bootstrap(gateway, boot_id="boot-2")[0] == 401
        assert vm.bootstrap(gateway, boot_id="b" * 128)[0] == 401 and vm.bootstrap(gateway, boot_id="b" * 129)[0] == 400
        for body in (b"", b"{", b"[]", b'{"boot_id": "b"}', b'{"boot_id": "", "session_token_sha256": "' + b"0" * 64 + b'"}',
                     b'{"boot_id": "b", "session_token_sha256": "zz"}', b'{"boot_id": "b", "session_token_sha256": "' + b"z" * 64 + b'"}',
                     b'{"boot_id": 5, "session_token_sha256": "' + b"0" * 64 + b'"}',
                     b'{"boot_id": "\\u0000", "session_token_sha256": "' + b"0" * 64 + b'"}', b'{"a": 1, "a": 2}', b"\xff\xfe"):
            assert gateway.request("POST", "/v1/bootstrap", vm.bootstrap_token, body)[0] == 400, body
        # somebody holds a session's row, and its VM does not let go: nobody else waits for that
        held, other = VM(gateway, boots=False), VM(gateway)
        with db() as connection, connection.transaction(force_rollback=True):
            connection.execute("SELECT agentvm.extend(%s, '1 s')", (held.id,))
            for _ in range(3):
                began = time.time()
                status, _, headers = held.bootstrap(gateway, again=False)
                assert status == 503 and headers["retry-after"], (status, headers)
                assert gateway.beat(other)[0] == 200
                assert time.time() - began < 5, "nobody waits for the lock's end, nor for a timeout"
            assert gateway.get("/readyz")[0] == 200, "the database is there"
        until(lambda: held.bootstrap(gateway)[0] == 200, "then it works")
        vm.terminate()
        assert vm.bootstrap(gateway)[0] == 410


def part_heartbeat():
    with Gateway() as gateway:
        vm = VM(gateway)
        before = vm.last_beat()
        took = []
        for _ in range(10):
            began = time.monotonic()
            assert gateway.beat(vm)[0] == 200
            took.append(time.monotonic() - began)
        assert min(took) < 0.1, took  # it is gathered, and not for long
        assert before is None and vm.last_beat() is not None, "it was committed before it was acknowledged"
        status, answer, _ = gateway.beat(vm)
        assert status == 200
        deadline = value("SELECT deadline_at FROM agentvm.session WHERE session_id = %s", vm.id)
        assert answer["deadline"] == deadline.astimezone().astimezone(tz=__import__("datetime").timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.") + f"{deadline.microsecond // 1000:03d}Z"
        sql("SELECT agentvm.extend(%s, '1 hour')", vm.id)
        assert gateway.beat(vm)[1]["deadline"] > answer["deadline"], "the deadline in force"
        assert gateway.request("POST", "/v1/heartbeat", "0" * 64, {})[0] == 401
        assert gateway.request("POST", "/v1/heartbeat", None, {})[0] == 401
        assert gateway.request("GET", "/v1/heartbeat", vm.session_token)[0] == 405
        assert gateway.request("POST", "/v1/nothing", vm.session_token, {})[0] == 404
        # the bootstrap token is no session token
        assert gateway.request("POST", "/v1/heartbeat", vm.bootstrap_token, {})[0] == 401
        # another gateway has never seen it, and asks
        with Gateway(name="gw2") as other:
            assert other.beat(vm)[0] == 200
        # many on one connection, and many at once: one statement for them all
        vms = [VM(gateway) for _ in range(20)]
        connections = [gateway.connection() for _ in vms]
        batches = gateway.metric("agentvm_gateway_batches_total")
        for connection, one in zip(connections, vms):
            connection.request("POST", "/v1/heartbeat", body="{}", headers={"Authorization": f"Bearer {one.session_token}"})
        assert [connection.getresponse().status for connection in connections] == [200] * 20
        assert gateway.metric("agentvm_gateway_batches_total") - batches <= 5
        vm.terminate()
        assert gateway.beat(vm)[0] == 410
        assert gateway.beat(vm)[0] == 410
        assert gateway.beat(vms[0])[0] == 200, "the others live"
        # an idle gateway says that it listens
        sql("INSERT INTO agentvm.gateway (gateway_id) VALUES ('gw1')")
        until(lambda: value("SELECT last_report_at FROM agentvm.gateway"), "an empty batch is reported")
        sql("DELETE FROM agentvm.gateway")


async def receive(channel):
    return json.loads(await asyncio.wait_for(channel.recv(), TIMEOUT))


async def closed(channel):
    try:
        while True:
            await asyncio.wait_for(channel.recv(), TIMEOUT)
    except websockets.ConnectionClosed as problem:
        return problem.rcvd.code if problem.rcvd else None


def part_channel():
    async def story(gateway):
        vm = VM(gateway)
        async with gateway.channel(vm.session_token) as channel:
            assert channel.subprotocol == "agentvm.v1"
            assert (await receive(channel))["type"] == "hello"
            await channel.send('{"type": "heartbeat"}')
            answer = await receive(channel)
            assert answer["type"] == "deadline" and answer["deadline"].endswith("Z"), answer
            assert vm.last_beat() is not None
            await channel.send('{"type": "of a later version", "x": [1]}')
            # a second channel of the same session takes over
            async with gateway.channel(vm.session_token) as second:
                assert (await receive(second))["type"] == "hello"
                assert await closed(channel) == 4409
                # the session ends: the channel is closed within a second of the commit, without a heartbeat
                vm.terminate()
                ended = time.time()
                assert (await receive(second))["type"] == "gone"
                assert await closed(second) == 4410
                assert time.time() - ended < 1, time.time() - ended
        for token, code in ((vm.session_token, 4410), ("0" * 64, 4401)):
            async with gateway.channel(token) as channel:
                assert await closed(channel) == code
        vm = VM(gateway)
        for bad in ("{", "[]", '{"type": 5}', "\x00"):
            async with gateway.channel(vm.session_token) as channel:
                await receive(channel)
                await channel.send(bad)
                assert await closed(channel) == 1007, bad
        async with gateway.channel(vm.session_token) as channel:
            await receive(channel)
            await channel.send('{"type": "x"' + " " * 499 + "}")
            await channel.send('{"type": "heartbeat"}')
            assert (await receive(channel))["type"] == "deadline", "512 bytes are not too many"
            await channel.send('{"type": "x"' + " " * 500 + "}")
            assert await closed(channel) == 1009, "513 are"
        async with gateway.channel(vm.session_token) as channel:
            await receive(channel)
            await channel.send("x" * 100000)
            assert await closed(channel) == 1009
        async with gateway.channel(vm.session_token) as channel:
            await receive(channel)
            for _ in range(200):
                await channel.send('{"type": "x"}')
            assert await closed(channel) == 1008, "a flood"
        try:
            async with websockets.connect(f"ws://127.0.0.1:{gateway.port}/v1/channel", subprotocols=["agentvm.v1"], proxy=None):
                assert False, "without a token"
        except websockets.InvalidStatus as problem:
            assert problem.response.status_code == 401
    with Gateway() as gateway:
        asyncio.run(story(gateway))
        until(lambda: gateway.metric("agentvm_gateway_channels") == 0, "no channel is left")


def part_database():
    """The database goes and comes: nothing that was acknowledged is lost, connections stay."""
    pg_ctl = os.environ["PG_CTL"].split()

    async def story(gateway):
        vm = VM(gateway)
        connection = gateway.connection()
        assert gateway.beat(vm, connection=connection)[0] == 200
        async with gateway.channel(vm.session_token) as channel:
            await receive(channel)
            subprocess.run([*pg_ctl, "stop", "-m", "fast"], check=True, stdout=subprocess.DEVNULL)
            status, _, headers = gateway.beat(vm, connection=connection)
            assert status == 503 and int(headers["retry-after"]) >= 1, status
            assert gateway.get("/readyz")[0] == 503 and gateway.get("/healthz")[0] == 200
            assert VM.bootstrap(vm, gateway, again=False)[0] == 503
            await channel.send('{"type": "heartbeat"}')
            subprocess.run([*pg_ctl, "start"], check=True, stdout=subprocess.DEVNULL)
            await asyncio.to_thread(until, lambda: gateway.get("/readyz")[0] == 200, "it connects again by itself")
            status, _, _ = gateway.beat(vm, connection=connection)
            assert status == 200, "on the same connection"
            acknowledged = vm.last_beat()
            assert acknowledged is not None
            await channel.send('{"type": "heartbeat"}')
            assert (await receive(channel))["type"] == "deadline", "and the channel has stayed"
            # killed in mid-flight: whatever was acknowledged is in the table
            subprocess.run([*pg_ctl, "stop", "-m", "immediate"], check=True, stdout=subprocess.DEVNULL)
            subprocess.run([*pg_ctl, "start"], check=True, stdout=subprocess.DEVNULL)
            assert vm.last_beat() >= acknowledged
        # ends are noticed also after a reconnect
        await asyncio.to_thread(until, lambda: gateway.get("/readyz")[0] == 200, "again")
        async with gateway.channel(vm.session_token) as channel:
            await receive(channel)
            await asyncio.to_thread(until, lambda: value("SELECT count(*) FROM agentvm.stat_dispatcher") > 0, "a dispatcher")
            vm.terminate()
            assert await closed(channel) == 4410
    with Gateway() as gateway:
        asyncio.run(story(gateway))
    # whatever is set for its role
    sql("CREATE SCHEMA trap; CREATE FUNCTION trap.cardinality(uuid[]) RETURNS int LANGUAGE sql AS 'SELECT 1/0'; GRANT USAGE ON SCHEMA trap TO PUBLIC")
    for name, what in (("search_path", "trap, pg_catalog"), ("default_transaction_read_only", "on"), ("statement_timeout", "1")):
        sql(f"ALTER ROLE gw RESET ALL; ALTER ROLE gw SET {name} = {what}")
        with Gateway() as gateway:
            vm = VM(gateway)
            assert [gateway.beat(vm)[0] for _ in range(10)] == [200] * 10, name
    sql("ALTER ROLE gw RESET ALL; DROP SCHEMA trap CASCADE")
    # it starts without a database, too
    with Gateway("--database=host=/nonexistent user=gw", wait=False) as gateway:
        assert gateway.get("/healthz")[0] == 200 and gateway.get("/readyz")[0] == 503
        assert gateway.request("POST", "/v1/heartbeat", "0" * 64, {})[0] == 503
        assert gateway.text().count("database is away") == 1, "said once"


class Proxy:
    """A way to the database that can hold back the end of a transaction, or be cut."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.conninfo = psycopg.conninfo.make_conninfo(CONNSTR, user="gw", host="127.0.0.1", port=self.listener.getsockname()[1], sslmode="disable", gssencmode="disable")
        self.holds = False
        self.deaf = False  # to notifications
        self.held = threading.Event()
        self.pair = ()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        known = psycopg.conninfo.conninfo_to_dict(CONNSTR)
        while True:
            front, _ = self.listener.accept()
            back = socket.socket(socket.AF_UNIX)
            back.connect(f"{known['host']}/.s.PGSQL.{known['port']}")
            self.pair = (front, back)
            threading.Thread(target=self.forward, args=(front, back), daemon=True).start()
            threading.Thread(target=self.answer, args=(back, front), daemon=True).start()

    def forward(self, source, target):
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        self.cut()

    def answer(self, source, target):
        data = b""
        try:
            while more := source.recv(65536):
                data += more
                while len(data) >= 5 and len(data) > int.from_bytes(data[1:5], "big"):
                    size = 1 + int.from_bytes(data[1:5], "big")
                    if data[:1] == b"Z" and self.holds:  # ReadyForQuery: committed
                        self.held.set()
                        until(lambda: not self.holds, "it may go on")
                    if not (self.deaf and data[:1] == b"A"):
                        target.sendall(data[:size])
                    data = data[size:]
        except OSError:
            pass

    def cut(self):
        for one in self.pair:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def part_committed():
    """The result of a statement comes before its commit does: it is acknowledged with the latter."""
    proxy = Proxy()
    with Gateway(f"--database={proxy.conninfo}") as gateway:
        vm = VM(gateway)
        # whoever has gone meanwhile gets no answer
        proxy.holds = True
        with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT) as one:
            one.sendall(b"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + b"0" * 64 + b"\r\nContent-Length: 2\r\n\r\n{}")
            assert proxy.held.wait(TIMEOUT)
        until(lambda: gateway.metric("agentvm_gateway_connections ") == 1, "it has gone")
        proxy.holds = False
        until(lambda: gateway.metric("agentvm_gateway_requests_waiting ") == 0, "it is over")
        assert gateway.metric('agentvm_gateway_http_responses_total{status="401"}') == 0
        for committed in (True, False):
            until(lambda: gateway.beat(vm)[0] == 200, "it has its database")
            proxy.held.clear()
            proxy.holds = True
            connection = gateway.connection()
            connection.request("POST", "/v1/heartbeat", body="{}", headers={"Authorization": f"Bearer {vm.session_token}"})
            assert proxy.held.wait(TIMEOUT)
            assert gateway.get("/healthz")[0] == 200
            assert not select.select([connection.sock], [], [], 0.3)[0], "not before it has committed"
            if not committed:
                proxy.cut()
                assert connection.getresponse().status == 503, "nobody knows"
            proxy.holds = False
            if committed:
                assert connection.getresponse().status == 200
        until(lambda: gateway.beat(vm)[0] == 200, "it goes on")
        # the statement works, the commit does not
        before = vm.last_beat()
        sql("CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not committed'; END$$")
        sql("CREATE CONSTRAINT TRIGGER fail AFTER INSERT OR UPDATE ON agentvm.session_heartbeat DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()")
        assert gateway.beat(vm)[0] == 503
        assert vm.last_beat() == before
        sql("DROP FUNCTION fail CASCADE")
        assert gateway.beat(vm)[0] == 200
        assert gateway.metric("agentvm_gateway_requests_waiting ") == 0


def raw(gateway, data, wait=15):
    """What comes until the other side hangs up, and after how many seconds it did."""
    began = time.time()
    answer = b""
    with socket.create_connection(("127.0.0.1", gateway.port), wait) as one:
        try:
            one.sendall(data)
            while chunk := one.recv(65536):
                answer += chunk
        except ConnectionError:
            pass
    return answer, time.time() - began


def upgrade(token):
    return (b"GET /v1/channel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
            b"Sec-WebSocket-Protocol: agentvm.v1\r\nAuthorization: Bearer " + token.encode() + b"\r\n\r\n")


class Clock:
    """Lets a gateway's time pass."""

    def __init__(self):
        self.file, library = os.path.join(DIR, f"clock_{time.time_ns()}"), os.path.join(DIR, "clock.so")
        self.skipped = 0
        self.skip(0)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-D_GNU_SOURCE", "-o", library, os.path.join(os.path.dirname(__file__), "clock.c")], check=True)
        self.environment = {"LD_PRELOAD": library, "CLOCK_FILE": self.file}

    def skip(self, seconds):
        self.skipped += seconds
        with open(self.file, "r+b" if os.path.exists(self.file) else "wb") as file:
            file.write((self.skipped * 1000).to_bytes(8, sys.byteorder))


def part_clock():
    """What is given so much time, and no more."""
    clock = Clock()

    def ends(one):
        one.settimeout(TIMEOUT)
        try:
            while one.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def opened(token):
        one = socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT)
        one.sendall(upgrade(token))
        got = b""
        while b"hello" not in got:
            got += one.recv(65536)
        return one
    with Gateway("--unauthenticated-rate=3", "--unauthenticated-lookups=0", environment=clock.environment) as gateway:
        vm, gone, other = VM(gateway), VM(gateway), VM(gateway)

        def passes(seconds):
            """Nothing is left at the database, which would have taken too long now, or it has been connected to anew."""
            clock.skip(seconds)
            until(lambda: gateway.beat(other)[0] == 200, "it has its database")

        # refused tokens are forgotten after a minute
        def refused(times):
            return [gateway.request("POST", "/v1/heartbeat", os.urandom(32).hex(), {})[0] for _ in range(times)]
        passes(61)
        assert refused(4) == [401] * 3 + [429]
        passes(30)
        assert refused(1) == [429]
        passes(31)
        assert refused(4) == [401] * 3 + [429]
        # a channel is pinged; one that says nothing to that is given up
        silent, idle = opened(gone.session_token), gateway.connection()
        assert gateway.beat(gone, connection=idle)[0] == 200

        async def story():
            async with gateway.channel(vm.session_token) as lively:
                assert (await receive(lively))["type"] == "hello"
                await asyncio.to_thread(passes, 31)
                assert await asyncio.to_thread(silent.recv, 2) == b"\x89\x00", "a ping"
                await lively.ping()
                await asyncio.to_thread(passes, 61)
                assert await asyncio.to_thread(ends, silent)
                await lively.send('{"type": "heartbeat"}')
                assert (await receive(lively))["type"] == "deadline", "who answers stays"
        asyncio.run(story())
        assert ends(idle.sock), "a connection without requests"
        # so is one that does not hang up when its session has ended
        silent = opened(gone.session_token)
        gone.terminate()
        until(lambda: b"\x11\x3a" in silent.recv(65536), "4410")
        clock.skip(4)
        assert ends(silent)
        # nobody has mentioned them for ten minutes
        assert gateway.metric("agentvm_gateway_sessions_known") == 3
        passes(601)
        until(lambda: gateway.metric("agentvm_gateway_sessions_known") == 1, "they are forgotten")
        assert gateway.beat(vm)[0] == 200, "and asked for again"
    # a database that hangs
    proxy = Proxy()
    with Gateway(f"--database={proxy.conninfo}", environment=clock.environment) as gateway:
        vm = VM(gateway)
        clock.skip(16)
        until(lambda: gateway.beat(vm)[0] == 200, "it has its database")
        proxy.holds = True
        connection = gateway.connection()
        connection.request("POST", "/v1/heartbeat", body="{}", headers={"Authorization": f"Bearer {vm.session_token}"})
        assert proxy.held.wait(TIMEOUT)
        clock.skip(16)
        assert connection.getresponse().status == 503
        assert "no answer to a query" in gateway.text()
        proxy.holds = False
        until(lambda: gateway.beat(vm)[0] == 200, "a new connection")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with Gateway(f"--database=host=127.0.0.1 port={listener.getsockname()[1]} user=gw", wait=False, environment=clock.environment) as gateway:
            mute = listener.accept()[0]
            mute.recv(1)
            clock.skip(11)
            until(lambda: "connecting takes long" in gateway.text(), "it says so")
            listener.settimeout(TIMEOUT)
            listener.accept()[0].close()  # libpq's clock is not ours: 10 s
            mute.close()


def part_hostile():
    """Requests that libwebsockets lets through, or trips over."""
    with Gateway("--request-timeout=120") as gateway:
        vm = VM(gateway)
        auth = f"Authorization: Bearer {vm.session_token}\r\n".encode()
        beat = b"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\n" + auth

        def ends(data, statuses, what):
            """That many answers and a prompt end, without a time limit's help; the others are served on."""
            answer, took = raw(gateway, data, wait=30)
            got = [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.")]
            assert got in statuses, (what, got)
            assert took < 20, (what, took)
            assert gateway.get("/healthz")[0] == 200, what

        whole = beat + b"Content-Length: 2\r\n\r\n{}"
        used = gateway.cpu()
        ends(whole + whole, ([], [200]), "two requests at once")
        ends(whole + b"x", ([], [200]), "more than its body")
        ends(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + whole, ([], [200]), "two requests at once, the first without a body")
        ends(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", ([], [404], [404, 200]), "two requests at once, both without one")
        # of what was read ahead nothing is taken for headers: libwebsockets would take them for a body, too, and read them when they are freed
        more = beat + b"Content-Length: 1000\r\n\r\n{}"
        ends(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + more, ([200],), "a request without a body, and half of one with a body")
        for length in (b"0", b"0000000000"):
            ends(beat + b"Content-Length: " + length + b"\r\n\r\n" + more, ([200],), f"a request with an empty body, {length}, and half of one with a body")
        ends(whole + more, ([], [200]), "a request with a body, and half of another one")
        ends(beat + b"Content-Length: 2\r\nConnection: keep-alive\r\n\r\n{}" + more, ([], [200]), "which would like more")
        ends(b"GET /healthz HTTP/1.0\r\n\r\n", ([200],), "HTTP/1.0")
        ends(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", ([200],), "Connection: close")
        ends(beat + b"\r\n", ([411],), "no length")
        ends(beat + b"Transfer-Encoding: chunked\r\n\r\n", ([400],), "chunks")
        ends(beat + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", ([400],), "a length, and chunks")
        for length in (b"-1", b"+2", b"2x", b"0x2", b"2\r\nContent-Length: 2", b"2, 2", b""):
            ends(beat + b"Content-Length: " + length + b"\r\n\r\n", ([400], [411], []), length)
        ends(b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n{", ([404],), "what is refused is not read on")
        ends(b"PUT /v1/heartbeat HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{", ([405],), "nor of another method")
        # upgrades: to nothing but a channel, since all else would escape the limits
        channel = b"GET /v1/channel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n" + auth
        ends(channel + b"Upgrade: websocket\r\n\r\n", ([400],), "a WebSocket of no subprotocol")
        ends(channel + b"Upgrade: websocket\r\nSec-WebSocket-Protocol: http\r\n\r\n", ([400],), "of another one")
        ends(channel.replace(b"/v1/channel", b"/v1/channels") + b"Upgrade: websocket\r\nSec-WebSocket-Protocol: agentvm.v1\r\n\r\n", ([404],), "one of another path")
        ends(channel + b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", ([],), "HTTP/2")
        ends(channel + b"Upgrade: other\r\n\r\n", ([403], []), "something else")
        ends(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", ([], [403]), "CONNECT")
        ends(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ([], [403]), "HTTP/2 at once")
        assert gateway.cpu() - used < 5, "it does not run in circles"
        # a request that waits for the database does not keep it busy, either
        with socket.create_connection(("127.0.0.1", gateway.port), 20) as one:
            one.sendall(whole)
            assert one.recv(65536).startswith(b"HTTP/1.1 200"), "one at a time is served"
        # whoever may notify can say anything
        for payload in ("a", "-", "", "00" * 16, "x" * 36, "0" * 7999):
            sql("SELECT pg_notify(agentvm.gateway_channel(), %s)", payload)
        assert gateway.beat(vm)[0] == 200
        until(lambda: gateway.metric("agentvm_gateway_connections ") == 1, "nobody is left")
    # what comes while a request without a body waits for the database
    proxy = Proxy()
    with Gateway(f"--database={proxy.conninfo}") as gateway:
        vm = VM(gateway)
        gateway.beat(vm)
        proxy.held.clear()
        proxy.holds = True
        with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT) as one:
            one.sendall(f"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {vm.session_token}\r\nContent-Length: 0\r\n\r\n".encode())
            assert proxy.held.wait(TIMEOUT)
            one.sendall(b"x")
            used = gateway.cpu()
            time.sleep(2)  # for so long it could run in circles
            used = gateway.cpu() - used
            proxy.holds = False
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
        assert used < 0.5, f"it runs in circles: {used} s"


def part_limits():
    with Gateway("--request-timeout=1", "--max-per-address=40", "--unauthenticated-rate=30", "--unauthenticated-lookups=0") as gateway:
        vm = VM(gateway)
        auth = f"Authorization: Bearer {vm.session_token}\r\n".encode()
        head = b"POST /v1/heartbeat HTTP/1.1\r\nHost: x\r\n" + auth
        assert b" 413 " in raw(gateway, head + b"Content-Length: 16385\r\n\r\n")[0].split(b"\r\n")[0]
        assert b" 200 " in raw(gateway, head + b"Connection: close\r\nContent-Length: 16384\r\n\r\n" + b"x" * 16384)[0].split(b"\r\n")[0]
        assert b" 413 " in raw(gateway, head + b"Content-Length: 999999\r\n\r\n")[0].split(b"\r\n")[0]
        assert b" 200 " in raw(gateway, head + b"Content-Length: 0\r\nConnection: close\r\nFoo: " + b"x" * 6000 + b"\r\n\r\n")[0].split(b"\r\n")[0]
        for name in (b"Foo", b"Cookie"):
            assert b" 200 " not in raw(gateway, head + b"Content-Length: 0\r\n" + name + b": " + b"x" * 20000 + b"\r\n\r\n")[0].split(b"\r\n")[0]
        assert b" 200 " not in raw(gateway, head + b"Content-Length: 0\r\n" + b"Foo: x\r\n" * 4000 + b"\r\n")[0].split(b"\r\n")[0]
        # slow headers, a slow body, an answer that nobody reads: all end in time
        for slow in (b"POST /v1/heart", head, head + b"Content-Length: 100\r\n\r\n{"):
            began = time.time()
            with socket.create_connection(("127.0.0.1", gateway.port), 20) as one:
                one.sendall(slow)
                while one.recv(4096):
                    pass
            assert time.time() - began < 10, slow
        # nor does it help to send a byte now and then
        for slow in (b"POST /v1/heartbeat HTTP/1.1\r\nFoo: ", head + b"Foo: ", head + b"Content-Length: 1000\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", gateway.port), 20) as one:
                one.sendall(slow)
                until(lambda: not drips(one), slow, 10)
        until(lambda: gateway.metric("agentvm_gateway_connections ") == 1, "they are gone")
        # guessing tokens
        statuses = [gateway.request("POST", "/v1/heartbeat", os.urandom(32).hex(), {})[0] for _ in range(40)]
        assert statuses.count(401) == 30 and statuses[-1] == 429, statuses
        assert gateway.metric("agentvm_gateway_http_responses_total{status=\"429\"}") == 10
        assert asyncio.run(refused_channel(gateway, os.urandom(32).hex())) == 429, "channels, too"
        # garbage
        for garbage in (b"\x00" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", os.urandom(5000)):
            raw(gateway, garbage)
        assert gateway.get("/healthz")[0] == 200
        assert gateway.process.poll() is None
        log = gateway.text()
        for secret in (vm.session_token, vm.bootstrap_token):
            assert secret not in log


def drips(connection):
    """Send one more byte; whether the connection is still there."""
    try:
        connection.sendall(b"x")
        return not select.select([connection], [], [], 0.2)[0] or connection.recv(4096) != b""
    except OSError:
        return False


async def refused_channel(gateway, token):
    """The status that an upgrade is refused with, or the code that its channel is closed with."""
    try:
        async with gateway.channel(token) as channel:
            return await closed(channel)
    except websockets.InvalidStatus as problem:
        return problem.response.status_code


def part_bounds():
    """One limit at a time, with nothing else near its own."""
    # each way to show a token that is none counts
    for show in (lambda gateway, _: gateway.request("POST", "/v1/heartbeat", os.urandom(32).hex(), {})[0],
                 lambda gateway, _: gateway.request("POST", "/v1/heartbeat", "short", {})[0],
                 lambda gateway, vm: vm.bootstrap(gateway, token=os.urandom(32).hex())[0],
                 lambda gateway, _: asyncio.run(refused_channel(gateway, os.urandom(32).hex())),
                 lambda gateway, _: asyncio.run(refused_channel(gateway, "short"))):
        with Gateway("--unauthenticated-rate=3", "--unauthenticated-lookups=0") as gateway:
            vm = VM(gateway)
            assert [show(gateway, vm) % 4000 for _ in range(5)] == [401] * 3 + [429] * 2, show(gateway, vm)
            assert gateway.beat(vm)[0] == 200, "one that is known is good at any time"
    # connections: of one address, and in all; a slot comes free again
    for option in ("--max-per-address=20", "--max-connections=20"):
        with Gateway(option) as gateway:
            vm = VM(gateway)
            many = [socket.create_connection(("127.0.0.1", gateway.port), 10) for _ in range(30)]
            until(lambda: refused_total(many) == 10, option)
            assert turned_away(gateway, vm), "whoever it is"
            for one in many:
                one.close()
            until(lambda: gateway.knock() and gateway.metric("agentvm_gateway_connections ") == 1, "they are gone", 120)
            assert gateway.metric("agentvm_gateway_connections_refused_total ") >= 10
            assert gateway.beat(vm)[0] == 200


def turned_away(gateway, vm):
    try:
        return not gateway.beat(vm)
    except (OSError, http.client.HTTPException):
        return True


def part_neighbours():
    """VMs behind one address, one of which invents tokens: those that are known do not pay for it."""
    with Gateway("--unauthenticated-rate=3", "--unauthenticated-lookups=0") as gateway, Gateway(name="gw2") as other:
        known, ended, unknown, new = VM(gateway), VM(gateway), VM(other), VM(boots=False)
        ended.terminate()
        assert gateway.beat(ended)[0] == 410
        assert [gateway.request("POST", "/v1/heartbeat", os.urandom(32).hex(), {})[0] for _ in range(5)] == [401] * 3 + [429] * 2
        for _ in range(5):
            assert gateway.beat(known)[0] == 200
            assert gateway.beat(ended)[0] == 410
            assert gateway.request("POST", "/v1/heartbeat", os.urandom(32).hex(), {})[0] == 429, "which is no amends"

        async def story():
            async with gateway.channel(known.session_token) as channel:
                assert (await receive(channel))["type"] == "hello"
        asyncio.run(story())
        # nobody learns whether another token would be good, nor gets to the database
        answers = []
        for path in ("/v1/heartbeat", "/v1/bootstrap"):
            tokens = [os.urandom(32).hex(), "short", None, unknown.session_token, unknown.bootstrap_token, new.bootstrap_token]
            for token in tokens + [known.session_token] * (path == "/v1/bootstrap"):
                status, body, headers = gateway.request("POST", path, token, {"session_token_sha256": "0" * 64, "boot_id": "b"})
                assert int(headers["retry-after"]) > 0
                answers.append((status, body, sorted({name.lower() for name in headers} - {"connection"})))
        assert answers == [answers[0]] * 13 and answers[0][0] == 429, answers
        for token in (os.urandom(32).hex(), unknown.session_token):
            assert asyncio.run(refused_channel(gateway, token)) == 429
        assert other.beat(unknown)[0] == 200 and new.bootstrap(other)[0] == 200


def refused_total(sockets):
    count = 0
    for one in sockets:
        one.setblocking(False)
        try:
            count += one.recv(1) == b""
        except (BlockingIOError, OSError) as problem:
            count += not isinstance(problem, BlockingIOError)
    return count


def part_log():
    with Gateway("--log-level=debug") as gateway:
        vm = VM(gateway)
        gateway.beat(vm)
        gateway.request("POST", "/v1/heartbeat", 'abc" level=error msg="forged 0123456789', {})
        log = gateway.text()
        assert f"{vm.session_token[:4]}...{vm.session_token[-4:]}" in log
        assert vm.session_token not in log and vm.bootstrap_token not in log
        assert "level=error" not in log
        assert all(line.startswith("time=20") and " level=" in line and " msg=" in line for line in log.splitlines()), log
        metrics = gateway.get("/metrics")
        assert metrics[2]["content-type"].startswith("text/plain; version=0.0.4")
        names = [line.split()[2] for line in metrics[1].splitlines() if line.startswith("# TYPE")]
        assert len(names) == len(set(names)) and "agentvm_gateway_heartbeats_total" in names
        assert gateway.metric("agentvm_gateway_heartbeats_total") == 1
        arguments = open(f"/proc/{gateway.process.pid}/cmdline", "rb").read()
        assert vm.session_token.encode() not in arguments


def certificate(name):
    files = os.path.join(DIR, name + ".crt"), os.path.join(DIR, name + ".key")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", files[1], "-out", files[0]], check=True, stderr=subprocess.DEVNULL)
    return files


def part_tls():
    cert, key = certificate("one")
    context = ssl.create_default_context(cafile=cert)
    options = (f"--tls-cert={cert}", f"--tls-key={key}")
    with Gateway(*options, tls=context) as gateway:
        vm = VM(gateway)
        assert gateway.beat(vm)[0] == 200

        async def story():
            async with gateway.channel(vm.session_token) as channel:
                assert (await receive(channel))["type"] == "hello"
        asyncio.run(story())
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(cert)
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        try:
            http.client.HTTPSConnection("127.0.0.1", gateway.port, timeout=5, context=old).request("GET", "/healthz")
            assert False, "TLS 1.1"
        except (ssl.SSLError, OSError):
            pass
        assert b"HTTP/1.1 200" not in subprocess.run(["curl", "-si", "-m", "5", f"http://127.0.0.1:{gateway.port}/healthz"], capture_output=True, check=False).stdout
        # a new certificate is read on SIGHUP; a broken one leaves the old one in place
        replacement = certificate("two")
        for source, target in zip(replacement, (cert, key)):
            os.replace(source, target)
        gateway.process.send_signal(signal.SIGHUP)
        gateway.tls = ssl.create_default_context(cafile=cert)

        def works():
            try:
                return gateway.beat(vm)[0] == 200
            except ssl.SSLError:
                return False
        until(works, "the new certificate")
        with open(cert, "w", encoding="ascii") as broken:
            broken.write("no certificate\n")
        gateway.process.send_signal(signal.SIGHUP)
        until(lambda: "certificate not read" in gateway.text(), "a broken one is refused")
        assert works()
        os.replace(certificate("three")[0], cert)
        gateway.process.send_signal(signal.SIGHUP)
        until(lambda: gateway.text().count("certificate not read") == 2, "so is one without its key")
        assert works()


def part_options():
    def run(*arguments, environment=None):
        done = subprocess.run([GATEWAY, "--max-connections=100", *arguments], capture_output=True, text=True, check=False, timeout=TIMEOUT, env={**os.environ, **(environment or {})})
        return done.returncode, done.stdout + done.stderr
    status, text = run("--help")
    assert status == 0 and all(f"--{o}" in text for o in ("database", "name", "listen", "port", "tls-cert", "tls-key", "allow-plaintext",
        "max-connections", "max-per-address", "request-timeout", "unauthenticated-rate", "unauthenticated-lookups", "metrics-from", "vm-sockets", "control", "max-call-memory", "drain", "log-level", "check"))
    good = f"--database={CONNSTR} user=gw"
    assert run(good, "--check") == (0, "ok\n"), run(good, "--check")
    assert run("--check", environment={"AGENTVM_GATEWAY_DATABASE": f"{CONNSTR} user=gw"}) == (0, "ok\n")
    sql("INSERT INTO agentvm.gateway (gateway_id) VALUES ('checked')")
    assert run(good, "--check", "--name=checked") == (0, "ok\n")
    assert value("SELECT last_report_at FROM agentvm.gateway WHERE gateway_id = 'checked'") is None, "who only looks does not listen"
    sql("DELETE FROM agentvm.gateway")
    for bad, why in ((("--port=0",), "from 1 to 65535"), (("--port=x",), "from 1"), (("--nonsense",), "Try --help"), (("word",), "not an option"),
                     (("--listen=localhost",), "not an IP address"), (("--listen=0.0.0.0",), "without TLS"), (("--tls-cert=/x",), "together"),
                     (("--tls-cert=/nonexistent", "--tls-key=/nonexistent"), "--tls-cert=/nonexistent"), (("--log-level=loud",), "debug, info")):
        status, text = run(good, "--check", *bad)
        assert status == 2 and why in text, (bad, status, text)
    status, text = run(f"--database={CONNSTR} user=nobody_there", "--check")
    assert status == 1 and "nobody_there" in text
    status, text = run(f"--database={CONNSTR} user=stranger", "--check")
    assert status == 1 and "agentvm_gateway" in text, text
    # it listens where it was told to, and nowhere else; a taken port is an error
    with Gateway() as gateway:
        with socket.socket() as elsewhere:
            assert elsewhere.connect_ex(("127.0.0.2", gateway.port)) != 0
        assert run(good, f"--port={gateway.port}")[0] == 1


def part_drain():
    proxy = Proxy()
    with Gateway(f"--database={proxy.conninfo}", "--drain=600") as gateway:
        vm = VM(gateway)
        opened, upgrades = gateway.connection(), gateway.connection()
        opened.connect()
        upgrades.connect()
        kept_beat = gateway.connection()
        assert gateway.beat(vm, connection=kept_beat)[0] == 200
        proxy.holds = True
        waits = gateway.connection()
        waits.request("POST", "/v1/heartbeat", body="{}", headers={"Authorization": f"Bearer {vm.session_token}"})
        assert proxy.held.wait(TIMEOUT)
        gateway.process.send_signal(signal.SIGTERM)
        until(lambda: "msg=draining" in gateway.text(), "it drains")
        assert gateway.request("GET", "/readyz", connection=opened)[0] == 503
        upgrades.sock.sendall(upgrade(vm.session_token))
        assert b" 503 " in upgrades.sock.recv(65536).split(b"\r\n")[0]
        status, _, headers = gateway.beat(vm, connection=kept_beat)
        assert status == 503 and headers["connection"] == "close" and int(headers["retry-after"]) > 0
        with socket.create_connection(("127.0.0.1", gateway.port), 5) as late:
            try:
                assert late.recv(1) == b"", "nobody new"
            except ConnectionError:
                pass
        time.sleep(0.5)
        assert gateway.process.poll() is None, "it waits for what is under way"
        proxy.holds = False
        assert waits.getresponse().status == 200, "which is answered"
        assert gateway.process.wait(TIMEOUT) == 0, "and then ends, long before its time is up"
    # but not for ever
    proxy = Proxy()
    with Gateway(f"--database={proxy.conninfo}", "--drain=1") as gateway:
        vm = VM(gateway)
        proxy.holds = True
        waits = gateway.connection()
        waits.request("POST", "/v1/heartbeat", body="{}", headers={"Authorization": f"Bearer {vm.session_token}"})
        assert proxy.held.wait(TIMEOUT)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(10) == 0
        proxy.holds = False
    with Gateway("--drain=600") as gateway:
        async def story():
            async with gateway.channel(vm.session_token) as channel:
                await receive(channel)
                gateway.process.send_signal(signal.SIGTERM)
                assert await closed(channel) == 4503
        asyncio.run(story())
        assert gateway.process.wait(TIMEOUT) == 0
        assert "msg=ended" in gateway.text()
    # a gateway that dies loses nothing: the next one takes over
    with Gateway() as gateway:
        port = gateway.port
        gateway.end(signal.SIGKILL)
        with Gateway(port=port) as next_one:
            assert next_one.beat(vm)[0] == 200


if __name__ == "__main__":
    for part in PARTS:
        globals()[f"part_{part}"]()
        print(part, flush=True)
