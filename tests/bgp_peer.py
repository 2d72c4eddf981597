"""A passive BGP speaker that notes when each prefix came and went: the meter of the benchmark.

It reads UPDATEs for IPv4 unicast (RFC 4271) and answers OPEN and KEEPALIVE; nothing else. The
tests use real routers; this one exists to cost next to nothing beside what is measured.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time

MARKER = b"\xff" * 16
OPEN, UPDATE, KEEPALIVE = 1, 2, 4


def message(kind: int, body: bytes = b"") -> bytes:
    return MARKER + struct.pack("!HB", 19 + len(body), kind) + body


def read_prefixes(data: bytes) -> list[str]:
    """Prefixes in the form of RFC 4271, section 4.3: a length in bits, then as many bytes as it takes."""
    found, at = [], 0
    while at < len(data):
        size = (data[at] + 7) // 8
        address = data[at + 1 : at + 1 + size].ljust(4, b"\0")
        found.append(f"{socket.inet_ntoa(address)}/{data[at]}")
        at += 1 + size
    return found


class Peer:
    """One session at a time on 127.0.0.1 and a port that the system gives; times are monotonic seconds."""

    def __init__(self, hold_time: int = 90) -> None:
        self.hold_time = hold_time
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.server.getsockname()[1])
        self.routes: dict[str, float] = {}
        self.changed = threading.Condition()
        self.sessions = 0
        self.stopping = False
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while not self.stopping:
            if not select.select([self.server], [], [], 0.2)[0]:
                continue
            connection, _ = self.server.accept()
            with connection, contextlib.suppress(OSError):
                self.session(connection)
            with self.changed:
                self.routes.clear()
                self.changed.notify_all()
        self.server.close()

    def session(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data, alive_at = b"", time.monotonic()
        while not self.stopping:
            if time.monotonic() - alive_at > self.hold_time / 3:
                connection.sendall(message(KEEPALIVE))
                alive_at = time.monotonic()
            if not select.select([connection], [], [], 0.2)[0]:
                continue
            received = connection.recv(1 << 16)
            now = time.monotonic()
            if not received:
                return
            data += received
            while len(data) >= 19 and len(data) >= (size := struct.unpack("!H", data[16:18])[0]):
                kind, body, data = data[18], data[19:size], data[size:]
                if kind == OPEN:
                    capabilities = bytes([2, 6, 1, 4, 0, 1, 0, 1])  # RFC 5492, IPv4 unicast
                    body = struct.pack("!BHH4sB", 4, 65000, self.hold_time, b"\x7f\0\0\1", len(capabilities))
                    connection.sendall(message(OPEN, body + capabilities) + message(KEEPALIVE))
                    self.sessions += 1
                elif kind == UPDATE:
                    self.update(body, now)

    def update(self, body: bytes, now: float) -> None:
        withdrawn = 2 + struct.unpack("!H", body[:2])[0]
        attributes = withdrawn + 2 + struct.unpack("!H", body[withdrawn : withdrawn + 2])[0]
        with self.changed:
            for prefix in read_prefixes(body[2:withdrawn]):
                self.routes.pop(prefix, None)
            for prefix in read_prefixes(body[attributes:]):
                self.routes[prefix] = now
            self.changed.notify_all()

    def wait_for_route(self, prefix: str, seconds: float = 30.0) -> float:
        """When the prefix came. Raises TimeoutError."""
        with self.changed:
            if not self.changed.wait_for(lambda: prefix in self.routes, seconds):
                raise TimeoutError(f"{prefix} did not reach the peer")
            return self.routes[prefix]

    def wait_for_count(self, count: int, seconds: float = 120.0) -> float:
        """The moment at which so many routes are there. Raises TimeoutError."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.routes) == count, seconds):
                raise TimeoutError(f"{len(self.routes)} routes instead of {count}")
            return time.monotonic()

    def close(self) -> None:
        self.stopping = True
        self.thread.join()
