"""Load for the gateway: gateway.py PORT PID COUNT ROUNDS [CAFILE] < session tokens and ids, one pair a line

Opens COUNT channels, then sends a heartbeat on each, ROUNDS times over, and waits for every acknowledgement. Then ends some of the
sessions, one after the other, and waits for the close of their channels. Prints the gateway's CPU microseconds per heartbeat, heartbeats
per CPU-second, its memory per channel in bytes, heartbeats per second, and the milliseconds from the call of terminate() to the close:
p50 and p99.
"""
import asyncio
import os
import resource
import ssl
import sys
import time

import psycopg

port, pid, count, rounds = map(int, sys.argv[1:5])
context = ssl.create_default_context(cafile=sys.argv[5]) if len(sys.argv) > 5 else None
sessions = [sys.stdin.readline().split() for _ in range(count)]
REVOKED = 400
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
BEAT = b'{"type": "heartbeat"}'
FRAME = bytes([0x81, 0x80 | len(BEAT)]) + b"\0\0\0\0" + BEAT  # masked with zeros


def cpu():
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory():
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as smaps:
        return sum(int(line.split()[1]) for line in smaps if line.startswith("Private_")) * 1024


class Channel(asyncio.Protocol):
    """One channel; counts frames that come."""
    open = 0
    acknowledged = 0

    def __init__(self, token):
        self.token = token
        self.buffer = b""
        self.upgraded = False
        self.closed = None  # a future, once we want it to be

    def connection_made(self, transport):
        self.transport = transport
        transport.write(f"GET /v1/channel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                        f"Sec-WebSocket-Protocol: agentvm.v1\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nAuthorization: Bearer {self.token}\r\n\r\n".encode())

    def data_received(self, data):
        self.buffer += data
        if not self.upgraded:
            head, found, rest = self.buffer.partition(b"\r\n\r\n")
            if not found:
                return
            assert head.startswith(b"HTTP/1.1 101"), head
            self.upgraded, self.buffer = True, rest
        while len(self.buffer) >= 2 and len(self.buffer) >= 2 + self.buffer[1]:
            if self.buffer[0] != 0x81:  # a ping wants no answer from a load generator, a close ends it
                if self.buffer[0] == 0x88:
                    if self.closed is None:
                        sys.exit(f"closed: {self.buffer!r}")
                    self.closed.set_result(time.monotonic())
            elif b"hello" in self.buffer[:2 + self.buffer[1]]:
                Channel.open += 1
            else:
                Channel.acknowledged += 1
            self.buffer = self.buffer[2 + self.buffer[1]:]


async def reached(what, goal):
    while getattr(Channel, what) < goal:
        await asyncio.sleep(0.005)


async def main():
    before = memory()
    channels = []
    loop = asyncio.get_running_loop()
    for token, _ in sessions:
        _, channel = await loop.create_connection(lambda token=token: Channel(token), "127.0.0.1", port, ssl=context)
        channels.append(channel)
    await reached("open", count)
    per_channel = (memory() - before) / count
    used, began = cpu(), time.time()
    for n in range(1, rounds + 1):
        for channel in channels:
            channel.transport.write(FRAME)
        await reached("acknowledged", n * count)
    used = cpu() - used
    rate = rounds * count / (time.time() - began)
    delays = []
    with psycopg.connect("", autocommit=True) as connection:
        for i in range(0, count, max(1, count // REVOKED)):
            channels[i].closed = loop.create_future()
            began = time.monotonic()
            connection.execute("SELECT agentvm.terminate(%s)", (sessions[i][1],))
            delays.append(await asyncio.wait_for(channels[i].closed, 60) - began)
    delays.sort()
    beats = rounds * count
    print(f"{used * 1e6 / beats:.1f} {beats / used:.0f} {per_channel:.0f} {rate:.0f}",
          *(f"{delays[int(len(delays) * part)] * 1e3:.1f}" for part in (0.5, 0.99)))

asyncio.run(main())
