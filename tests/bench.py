"""What it costs: milliseconds to the UPDATE, routes a second, and memory, each beside a floor of the same run.

    python tests/bench.py [--json] [--quick] [--exabgp PATH]

The floor is the same ExaBGP with the same configuration and a process that merely copies lines.
Ways are tried in random order, with the same idle time between events. Machines are noisy: the
ratios are what counts. BIRD and GoBGP stand beside when they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bgp_peer import Peer
from lab import LabError, Process, Trio, clean_environment, find_exabgp, free_port, script, wait_for

ATTRIBUTES = "next-hop self community [65535:666]"
SETTINGS = "[safety]\nmax_routes = 50000\n[bgp]\nnext_hop = self\n"  # room for the bursts
WEBHOOK = "max_announcements_per_minute = 1000000\nmax_routes = 50000\n"
FLOOR = """\
import os, sys, threading
threading.Thread(target=lambda: [None for _ in sys.stdin.buffer], daemon=True).start()
pipe = os.open(sys.argv[1], os.O_RDWR)
while True:
    data = os.read(pipe, 65536)
    while data:
        data = data[os.write(1, data):]
"""


HTTP_FLOOR = """\
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = sys.argv[2]
    wbufsize = -1  # the answer in one segment
    disable_nagle_algorithm = True
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        os.write(pipe, f"announce {body['target_ip']}/32\\n".encode())
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
    def log_message(self, *args): pass
pipe = os.open(sys.argv[1], os.O_WRONLY)
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("Listening on", server.server_port, flush=True)
server.serve_forever()
"""
PLAIN = """\
import http.server, ipaddress, json, sys, threading, time
whitelist = [ipaddress.ip_network("198.51.100.0/24"), ipaddress.ip_network("203.0.113.10/32")]
timers, recent = {}, []
def send(line):
    with open(sys.argv[1], "w") as pipe:
        pipe.write(line + "\\n")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        address = ipaddress.ip_address(body["target_ip"])
        assert self.headers["X-Auth-Token"] and not any(address in network for network in whitelist)
        recent[:] = [at for at in recent if at > time.time() - 60] + [time.time()]
        send(f"announce {address}/32")
        if address in timers:
            timers[address].cancel()
        timers[address] = threading.Timer(3600, send, [f"withdraw {address}/32"])
        timers[address].daemon = True
        timers[address].start()
        with open(sys.argv[1] + ".log", "a") as log:
            log.write(time.strftime("%Y-%m-%d %H:%M:%S") + f" WEBHOOK ANNOUNCE {address}/32\\n")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"status": "ok", "prefix": f"{address}/32"}).encode())
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("Listening on", server.server_port, flush=True)
server.serve_forever()
"""


def routes(count: int, network: int = 10) -> list[str]:
    return [f"{network}.{n >> 16}.{n >> 8 & 255}.{n & 255}/32" for n in range(count)]


class Chain:
    """A peer, ExaBGP, and the process under test behind a pipe."""

    def __init__(self, directory: Path, exabgp: str, hold_time: int = 90) -> None:
        directory.mkdir()
        self.peer = Peer(hold_time)
        self.trio = Trio(directory, exabgp, self.peer.port, SETTINGS)
        self.trio.webhook_settings, self.trio.hold_time = WEBHOOK, hold_time
        self.fd = -1

    def write(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self.fd, data) :]

    def announce(self, prefix: str) -> None:
        self.write(f"announce {prefix}\n")

    def withdraw(self, prefix: str) -> None:
        self.write(f"withdraw {prefix}\n")

    def start(self) -> None:
        self.trio.start_exabgp()
        self.fd = os.open(self.trio.pipe, os.O_WRONLY)

    def memory(self) -> float:
        """The controller's largest resident size so far, in MB."""
        status = Path(f"/proc/{self.trio.state()['pid']}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def stop(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.trio.stop()
        self.peer.close()


class Floor(Chain):
    """The same, with a process that merely copies."""

    def start(self) -> None:
        directory = self.trio.directory
        (directory / "floor.py").write_text(FLOOR)
        os.mkfifo(self.trio.pipe)
        command = [sys.executable, str(directory / "floor.py"), str(self.trio.pipe)]
        self.trio.write_configuration(script(directory / "controller.sh", command))
        self.trio.run_exabgp()
        self.fd = os.open(self.trio.pipe, os.O_RDWR)
        wait_for("the session", lambda: self.peer.sessions)

    def announce(self, prefix: str) -> None:
        self.write(f"announce route {prefix} {ATTRIBUTES}\n")

    def withdraw(self, prefix: str) -> None:
        self.write(f"withdraw route {prefix} {ATTRIBUTES}\n")


class Bench:
    def __init__(self, exabgp: str, quick: bool, home: Path) -> None:
        self.exabgp, self.quick, self.home = exabgp, quick, home
        self.random = random.Random(1)
        self.results: dict[str, Any] = {}
        self.count = 0

    @contextlib.contextmanager
    def chain(self, kind: type[Chain], hold_time: int = 90) -> Iterator[Chain]:
        self.count += 1
        chain = kind(self.home / str(self.count), self.exabgp, hold_time)
        try:
            chain.start()
            chain.announce("10.99.0.9/32")  # past the first moments, when a controller listens for its predecessor
            chain.peer.wait_for_route("10.99.0.9/32")
            chain.withdraw("10.99.0.9/32")
            chain.peer.wait_for_count(0)
            yield chain
        finally:
            chain.stop()
            shutil.rmtree(chain.trio.directory)

    def note(self, name: str, value: Any, unit: str, beside: str = "") -> None:
        self.results[name] = value
        if not options.json:
            shown = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
            print(f"  {name:<58}{shown:>12} {unit:<10}{beside}", flush=True)

    @contextlib.contextmanager
    def http_floor(
        self, trio: Trio, version: str, text: str = HTTP_FLOOR
    ) -> Iterator[Callable[[], http.client.HTTPConnection]]:
        """A bare http.server handler that writes the line to the same controller; yields a way to connect."""
        program, log = trio.directory / "http_floor.py", trio.directory / f"http_floor-{len(text)}-{version[-1]}.out"
        program.write_text(text)
        command = [sys.executable, str(program), str(trio.pipe), version]
        process = Process("the HTTP floor", command, log, clean_environment())
        try:
            port = int(str(wait_for("the HTTP floor", lambda: log.read_text().partition("on ")[2].strip())))
            yield lambda: http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        finally:
            process.stop()

    def latency(self) -> None:
        """One event at a time, in random order, with an idle pause before each."""
        with contextlib.ExitStack() as stack:
            trio, floor = stack.enter_context(self.chain(Chain)), stack.enter_context(self.chain(Floor))
            trio.trio.start_receiver()
            bare = stack.enter_context(self.http_floor(trio.trio, "HTTP/1.1"))
            bare_new = stack.enter_context(self.http_floor(trio.trio, "HTTP/1.0"))
            connect = functools.partial(http.client.HTTPConnection, "127.0.0.1", trio.trio.port, timeout=30)
            kept, bare_kept = connect(), bare()
            stack.callback(kept.close)
            stack.callback(bare_kept.close)

            def post(connection: http.client.HTTPConnection, prefix: str) -> None:
                body = json.dumps({"target_ip": prefix.partition("/")[0]})
                connection.request("POST", "/", body, {"X-Auth-Token": trio.trio.token})
                connection.getresponse().read()

            def post_new(new: Callable[[], http.client.HTTPConnection], prefix: str) -> None:
                with contextlib.closing(new()) as connection:
                    post(connection, prefix)

            ways: dict[str, tuple[Chain, Callable[[str], None]]] = {
                "floor": (floor, floor.announce),
                "pipe to UPDATE": (trio, trio.announce),
                "HTTP floor, kept connection": (trio, functools.partial(post, bare_kept)),
                "POST to UPDATE, kept connection": (trio, functools.partial(post, kept)),
                "HTTP floor, new connection": (trio, functools.partial(post_new, bare_new)),
                "POST to UPDATE, new connection": (trio, functools.partial(post_new, connect)),
            }
            times = self.measure(ways, 40 if self.quick else 400)
        medians = {way: statistics.median(taken) for way, taken in times.items()}
        for way, taken in times.items():
            floor_of = way.replace("POST to UPDATE", "HTTP floor") if "POST" in way else "floor"
            beside = f"{medians[way] / medians[floor_of]:.2f} x {floor_of}"
            self.note(f"{way}, median", medians[way], "ms", beside)
            self.note(f"{way}, p99", statistics.quantiles(taken, n=100)[98], "ms")

    def posts(self) -> None:
        """Many POSTs: is any lost, how many a second, what do slow clients cost the others, does memory grow?"""
        count = 200 if self.quick else 1000
        with self.chain(Chain) as chain:
            chain.trio.start_receiver()
            ours = functools.partial(http.client.HTTPConnection, "127.0.0.1", chain.trio.port, timeout=30)
            with (
                self.http_floor(chain.trio, "HTTP/1.0", PLAIN) as plain,
                self.http_floor(chain.trio, "HTTP/1.0") as bare,
            ):
                rates: dict[str, list[float]] = {}
                all_lost = {plain: 0, bare: 0, ours: 0}
                for turn in range(1 if self.quick else 3):
                    for name, connect, keep in (
                        (f"{count} POSTs in a row, plain receiver with a timer each", plain, False),
                        (f"{count} POSTs in a row, bare handler", bare, False),
                        (f"{count} POSTs in a row, new connections", ours, False),
                        (f"{count} POSTs in a row, kept connection", ours, True),
                    ):
                        taken, lost = self.post_row(chain, connect, routes(count, 20 + turn), keep)
                        rates.setdefault(name, []).append(count / taken)
                        all_lost[connect] += lost
            self.note("  lost of all these", all_lost[ours], "", f"{all_lost[plain]} by the plain receiver")
            best = {name: statistics.median(rate) for name, rate in rates.items()}
            base = next(iter(best.values()))
            for name, rate in best.items():
                self.note(name, rate, "POSTs/s", f"{rate / base:.2f} x plain")
            begin = time.monotonic()
            prefixes = routes(count, 30)
            clients = [
                threading.Thread(target=self.post_row, args=(chain, ours, prefixes[n::50], False, False))
                for n in range(50)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            self.note(f"{count} POSTs from 50 clients", count / (time.monotonic() - begin), "POSTs/s")
            chain.peer.wait_for_count(count)
            chain.write("withdraw-all\n")
            chain.peer.wait_for_count(0)
            self.slow_clients(chain, ours)
            self.receiver_memory(chain, ours)

    def post_row(
        self,
        chain: Chain,
        connect: Callable[[], http.client.HTTPConnection],
        prefixes: list[str],
        keep: bool,
        clear: bool = True,
    ) -> tuple[float, int]:
        """Seconds for one POST after the other, and how many did not reach the peer."""
        begin = time.monotonic()
        connection = connect()
        for prefix in prefixes:
            body = json.dumps({"target_ip": prefix.partition("/")[0]})
            connection.request("POST", "/", body, {"X-Auth-Token": chain.trio.token})
            connection.getresponse().read()
            if not keep:
                connection.close()
        connection.close()
        taken = time.monotonic() - begin
        if not clear:
            return taken, 0
        with contextlib.suppress(TimeoutError):
            chain.peer.wait_for_count(len(prefixes), 20)
        lost = len(prefixes) - len(chain.peer.routes)
        chain.write("withdraw-all\n")
        chain.peer.wait_for_count(0)
        wait_for("quiet", lambda: not chain.trio.state()["routes"])
        return taken, lost

    def slow_clients(self, chain: Chain, connect: Callable[[], http.client.HTTPConnection]) -> None:
        """What others wait while 500 clients send half a request."""
        times = []
        with contextlib.ExitStack() as stack:
            for _ in range(500):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", chain.trio.port), 10))
                client.sendall(b"POST / HTTP/1.1\r\nX-")
            for prefix in routes(100 if self.quick else 500, 12):
                begin = time.monotonic()
                self.post_row(chain, connect, [prefix], False, False)
                times.append(1000 * (time.monotonic() - begin))
        self.note("others' answer while 500 slow clients hang on, p99", statistics.quantiles(times, n=100)[98], "ms")
        chain.write("withdraw-all\n")
        chain.peer.wait_for_count(0)

    def receiver_memory(self, chain: Chain, connect: Callable[[], http.client.HTTPConnection]) -> None:
        """Memory after the first and after the last tenth of many requests."""
        assert chain.trio.receiver is not None
        status = Path(f"/proc/{chain.trio.receiver.popen.pid}/status")
        count = 5_000 if self.quick else 100_000
        bodies = ['{"target_ip": "10.1.2.3"}', '{"action": "withdraw", "target_ip": "10.1.2.3"}', "[]", '{"x": 1}']
        connection, sizes = connect(), []
        for n in range(count):
            connection.request("POST", "/", bodies[n % 4], {"X-Auth-Token": chain.trio.token})
            connection.getresponse().read()
            if n + 1 in (count // 10, count):
                sizes.append(int(status.read_text().partition("VmRSS:")[2].split()[0]) / 1024)
        connection.close()
        self.note(f"receiver's memory after {count // 10} requests", sizes[0], "MB")
        self.note(f"receiver's memory after {count} requests", sizes[1], "MB", f"{sizes[1] / sizes[0]:.2f} x")

    def measure(self, ways: dict[str, tuple[Chain, Callable[[str], None]]], count: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {way: [] for way in ways}
        for prefix in routes(count, 11):
            for way in self.random.sample(list(ways), len(ways)):
                chain, send = ways[way]
                time.sleep(0.012)  # idle, as between alerts
                begin = time.monotonic()
                send(prefix)
                times[way].append(1000 * (chain.peer.wait_for_route(prefix) - begin))
                chain.withdraw(prefix)
                wait_for("the withdraw", lambda c=chain, p=prefix: p not in c.peer.routes)  # type: ignore[misc]
        return times

    def bursts(self) -> None:
        """As many routes as a carpet attack takes, as fast as each way can."""
        prefixes = routes(1000 if self.quick else 10_000)
        lists = [prefixes[i : i + 100] for i in range(0, len(prefixes), 100)]
        texts: dict[str, tuple[type[Chain], str]] = {
            "burst by the pipe": (Chain, "".join(f"announce {p}\n" for p in prefixes)),
            "burst, ExaBGP's fastest form": (
                Floor,
                "".join(f"announce attributes {ATTRIBUTES} nlri {' '.join(some)}\n" for some in lists),
            ),
            "burst, one command each": (Floor, "".join(f"announce route {p} {ATTRIBUTES}\n" for p in prefixes)),
        }
        rates: dict[str, list[float]] = {way: [] for way in texts}
        for _ in range(1 if self.quick else 3):
            for way in self.random.sample(list(texts), len(texts)):
                kind, text = texts[way]
                with self.chain(kind) as chain:
                    begin = time.monotonic()
                    threading.Thread(target=chain.write, args=(text,), daemon=True).start()
                    rates[way].append(len(prefixes) / (chain.peer.wait_for_count(len(prefixes)) - begin))
        best = {way: statistics.median(rate) for way, rate in rates.items()}
        ours = best["burst by the pipe"]
        for way, rate in best.items():
            self.note(way, rate, "routes/s", f"the pipe is {ours / rate:.2f} x this")

    def held(self) -> None:
        """One more announce while many routes are held, the memory that takes, and their return after a crash."""
        base = 0.0
        for count in (10, 1000) if self.quick else (10, 1000, 10_000):
            with self.chain(Chain) as chain:
                chain.write("".join(f"announce {p}\n" for p in routes(count)))
                chain.peer.wait_for_count(count)
                wait_for("quiet", lambda c=chain, n=count: settled(c, n), 60)  # type: ignore[misc]
                times = self.measure({"one": (chain, chain.announce)}, 20 if self.quick else 100)["one"]
                median = statistics.median(times)
                base = base or median
                self.note(f"announce with {count} held, median", median, "ms", f"{median / base:.2f} x with 10")
                self.note(f"controller's memory with {count} held", chain.memory(), "MB")
                assert chain.trio.daemon is not None
                chain.trio.daemon.popen.kill()
                chain.trio.daemon.popen.wait()
                begin = time.monotonic()
                chain.peer.wait_for_count(0)
                chain.trio.start_exabgp()
                self.note(f"return of {count} after ExaBGP was killed", chain.peer.wait_for_count(count) - begin, "s")

    def many(self, commands: int) -> None:
        """Announces and withdraws without end: does the session stay up, does memory stay flat?"""
        prefixes = routes(100)
        with self.chain(Chain, hold_time=9) as chain:
            begin = time.monotonic()
            for _ in range(0, commands, 1000):
                batch = [f"{self.random.choice(('announce', 'withdraw'))} {p}\n" for p in prefixes * 10]
                chain.write("".join(batch))
            chain.announce("10.99.0.1/32")
            chain.peer.wait_for_route("10.99.0.1/32", 600)
            taken = time.monotonic() - begin
            self.note(f"{commands} commands", commands / taken, "commands/s")
            self.note("  sessions lost meanwhile", chain.peer.sessions - 1, "")
            self.note("  controller's memory after them", chain.memory(), "MB")

    def beside(self) -> None:
        """The same single announce by BIRD and by GoBGP."""
        for name, kind in (("birdc configure", BirdSpeaker), ("gobgp global rib add", GobgpSpeaker)):
            try:
                speaker = kind(self.home)
            except FileNotFoundError as error:
                self.results[name] = f"not installed: {error}"
                continue
            try:
                wait_for("the session", lambda s=speaker: s.peer.sessions, 60)  # type: ignore[misc]
                time.sleep(1)  # let it settle: neither says when it is ready
                times = []
                for prefix in routes(10 if self.quick else 50, 12):
                    begin = time.monotonic()
                    speaker.announce(prefix)
                    times.append(1000 * (speaker.peer.wait_for_route(prefix) - begin))
                self.note(f"{name} to UPDATE, median", statistics.median(times), "ms")
            finally:
                speaker.stop()


def settled(chain: Chain, count: int) -> bool:
    found = chain.trio.state()["routes"]
    return len(found) == count and all("pending" not in str(route["neighbors"]) for route in found)


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(name)
    return found


class BirdSpeaker:
    """BIRD announcing what stands in an included file."""

    def __init__(self, home: Path) -> None:
        self.client, self.peer = program("birdc"), Peer()
        self.include, self.socket = home / "static.conf", home / "bird.ctl"
        self.prefixes: list[str] = []
        self.include.write_text("")
        (home / "bird.conf").write_text(f"""\
router id 127.0.0.2;
protocol device {{ }}
protocol static {{
  ipv4;
include "{self.include}";
}}
protocol bgp peer {{
  local 127.0.0.2 port {free_port("127.0.0.2")} as 65001; neighbor 127.0.0.1 port {self.peer.port} as 65000; multihop;
  connect delay time 1;
  ipv4 {{ import none; export all; next hop self; }};
}}
""")
        command = [program("bird"), "-f", "-c", str(home / "bird.conf"), "-s", str(self.socket)]
        self.process = Process("BIRD", command, home / "bird.log", clean_environment())

    def announce(self, prefix: str) -> None:
        self.prefixes.append(prefix)
        lines = "".join(f"route {p} blackhole {{ bgp_community.add((65535,666)); }};\n" for p in self.prefixes)
        self.include.write_text(lines)
        subprocess.run([self.client, "-s", str(self.socket), "configure"], check=True, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        self.process.stop()
        self.peer.close()


class GobgpSpeaker:
    """GoBGP, told by its command line."""

    def __init__(self, home: Path) -> None:
        self.client, self.peer = program("gobgp"), Peer()
        self.api = free_port()
        (home / "gobgp.toml").write_text(f"""\
[global.config]
as = 65001
router-id = "127.0.0.2"
port = -1
[[neighbors]]
[neighbors.config]
neighbor-address = "127.0.0.1"
peer-as = 65000
[neighbors.transport.config]
remote-port = {self.peer.port}
local-address = "127.0.0.2"
[neighbors.timers.config]
connect-retry = 1
idle-hold-time-after-reset = 1
""")
        command = [program("gobgpd"), "-f", str(home / "gobgp.toml"), "--api-hosts", f"127.0.0.1:{self.api}"]
        self.process = Process("GoBGP", [*command, "--pprof-disable"], home / "gobgp.log", clean_environment())

    def announce(self, prefix: str) -> None:
        command = [self.client, "-p", str(self.api), "global", "rib", "add", prefix, "community", "65535:666"]
        subprocess.run([*command, "-a", "ipv4"], check=True, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        self.process.stop()
        self.peer.close()


def main() -> int:
    try:
        exabgp = find_exabgp(options.exabgp)
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="rtbh-bench-") as home:
        bench = Bench(exabgp, options.quick, Path(home))
        bench.latency()
        bench.posts()
        bench.bursts()
        bench.held()
        bench.many(20_000 if options.quick else options.commands)
        bench.beside()
    if options.json:
        print(json.dumps(bench.results, indent=2))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    parser.add_argument("--exabgp", help="the ExaBGP to run (default: the one installed beside this Python)")
    parser.add_argument("--commands", type=int, default=1_000_000, help="how many in the long run (default: a million)")
    options = parser.parse_args()
    sys.exit(main())
