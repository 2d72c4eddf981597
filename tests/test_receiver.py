"""The receiver as a process: HTTP as clients really speak it, the pipe, signals and settings."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import ROOT, Process, clean_environment, wait_for
from rtbh_controller import Blackholes, Neighbor, Now, load_settings, parse_prefix, publication

RECEIVER = [sys.executable, str(ROOT / "webhook_receiver.py")]
TOKEN = "s3cret"


class Controller(threading.Thread):
    """The controller's own decisions and publication, in a thread, with every BGP session as it is told."""

    def __init__(self, receiver: Receiver) -> None:
        super().__init__(daemon=True)
        if not receiver.pipe.exists():
            os.mkfifo(receiver.pipe)
        self.pipe = os.open(receiver.pipe, os.O_RDWR | os.O_NONBLOCK)
        self.state_file = receiver.directory / "state.json"
        self.blackholes = Blackholes(load_settings(str(receiver.config), ignore="webhook")[0])
        self.lines: list[str] = []
        self.reads = True
        self.stopping = threading.Event()
        self.lock = threading.Lock()  # held while what was read is carried out
        self.sessions({"127.0.0.1": "up"})
        self.publish()
        self.start()

    def sessions(self, states: dict[str, str]) -> None:
        self.blackholes.neighbors = {address: Neighbor(state, 1.0, True) for address, state in states.items()}
        self.blackholes.routers = {parse_prefix(address) for address in states}

    def publish(self) -> None:
        new = self.state_file.with_suffix(".new")
        new.write_bytes(publication(self.blackholes, "5.0.15", Now(time.time(), time.monotonic())))
        new.replace(self.state_file)

    def run(self) -> None:
        while not self.stopping.wait(0.05):
            with self.lock, contextlib.suppress(BlockingIOError):
                for line in os.read(self.pipe, 1 << 20).decode().splitlines() if self.reads else []:
                    self.lines.append(line)
                    self.blackholes.line(line, Now(time.time(), time.monotonic()))
                    self.blackholes.unanswered.clear()
            self.publish()

    def close(self) -> None:
        self.stopping.set()
        self.join()
        os.close(self.pipe)


class Receiver:
    """A receiver, and a controller beside it or none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "rtbh.conf"
        self.pipe = directory / "rtbh.pipe"
        self.log = directory / "webhook.log"
        self.controller: Controller | None = None
        self.port = 0
        self.process: Process | None = None
        self.environment: dict[str, str] = {}

    def configure(self, webhook: str = f"token = {TOKEN}", rest: str = "", listen: str = "127.0.0.1:0") -> None:
        self.config.write_text(
            f"[paths]\nfifo = {self.pipe}\nwebhook_log = {self.log}\nstate_dir = {self.directory}\n"
            f"[webhook]\nlisten = {listen}\n{webhook}\n{rest}\n"
        )

    def start(self) -> None:
        out = self.directory / "receiver.out"
        out.unlink(missing_ok=True)
        self.process = process = Process(
            "the receiver", [*RECEIVER, "--config", str(self.config)], out, clean_environment(**self.environment)
        )

        def ready() -> str:
            process.check()
            return out.read_text().partition("Listening on ")[2]

        address = str(wait_for("the receiver", ready)).split()[0]
        self.port = int(address.rpartition(":")[2])

    def start_controller(self, like: Controller | None = None) -> None:
        """A controller that knows nothing, or what the one before it knew."""
        self.controller = Controller(self)
        if like:
            self.controller.blackholes = like.blackholes

    def stop_controller(self) -> Controller | None:
        was, self.controller = self.controller, None
        if was:
            was.close()
        return was

    def lines(self) -> list[str]:
        """What the controller has read since the last call, when the pipe is empty."""
        assert self.controller
        poll = select.poll()
        poll.register(self.controller.pipe, select.POLLIN)
        wait_for("the pipe to be read", lambda: not poll.poll(0))
        with self.controller.lock:
            found, self.controller.lines = self.controller.lines, []
        return found

    def get(self, path: str, token: str = TOKEN) -> tuple[int, Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request("GET", path, headers={"X-Auth-Token": token})
            return read(connection.getresponse())

    def post(self, body: str | bytes, token: str = TOKEN, **headers: str) -> tuple[int, Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request("POST", "/", body, {"X-Auth-Token": token, **headers})
            return read(connection.getresponse())

    def raw(self, data: bytes) -> bytes:
        """Send bytes, then read until the receiver closes."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as client:
            client.sendall(data)
            with contextlib.suppress(OSError):  # it may have closed already
                client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b""))

    def logged(self, text: str) -> bool:
        return self.log.exists() and text in self.log.read_text()


def read(response: http.client.HTTPResponse) -> tuple[int, Any]:
    """Status and JSON of an answer, whose head must be as promised."""
    data = response.read()
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Content-Length"] == str(len(data))
    return response.status, json.loads(data)


@pytest.fixture
def stopped(directory: Path) -> Iterator[Receiver]:
    receiver = Receiver(directory)
    receiver.configure()
    yield receiver
    if receiver.process:
        receiver.process.stop()
    receiver.stop_controller()


@pytest.fixture
def receiver(stopped: Receiver) -> Receiver:
    stopped.start_controller()
    stopped.start()
    return stopped


def test_the_answers_of_the_contract(receiver: Receiver) -> None:
    status, answer = receiver.post('{"target_ip": "192.0.2.100"}')
    assert (status, answer["status"], answer["prefix"]) == (200, "ok", "192.0.2.100/32")
    (line,) = receiver.lines()
    assert line.startswith("announce 192.0.2.100/32 until=")
    assert receiver.post('{"target_ip": "198.51.100.7"}') == (403, {"error": "IP is whitelisted"})
    assert receiver.post('{"target_ip": "192.0.2.1"}', token="wrong")[0] == 403
    assert receiver.post('{"target_ip": "192.0.2.1"}', token="")[0] == 403
    assert receiver.lines() == []
    wait_for("the log", lambda: receiver.logged("AUTH FAILED from 127.0.0.1\n"))
    wait_for("the log", lambda: receiver.logged("BLOCKED whitelisted IP 198.51.100.7"))
    assert not receiver.logged(TOKEN)


def test_the_eleventh_in_a_minute_is_refused_whoever_asks_and_however_fast(receiver: Receiver) -> None:
    start = threading.Barrier(100)

    def post(n: int) -> tuple[int, Any]:
        start.wait()
        return receiver.post(f'{{"target_ip": "192.0.2.{n}"}}')

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(post, range(100)))
    assert sorted(status for status, _ in answers) == [200] * 10 + [429] * 90
    assert (429, {"error": "Rate limit exceeded"}) in answers
    assert len(receiver.lines()) == 10
    assert receiver.post('{"action": "withdraw", "target_ip": "192.0.2.200"}')[0] == 200


def test_a_connection_serves_many_requests(receiver: Receiver) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=10)) as connection:
        connection.connect()
        first = connection.sock
        for n, body in enumerate(('{"target_ip": "192.0.2.1"}', "[]", '{"action": "withdraw-all"}')):
            connection.request("POST", f"/any/path/{n}", body, {"X-Auth-Token": TOKEN})
            assert read(connection.getresponse())[0] == (200, 400, 200)[n]
        assert connection.sock is first
    assert [line.split()[0] for line in receiver.lines()] == ["announce", "withdraw-all"]


def request(head: str, body: bytes = b"") -> bytes:
    return f"{head}\r\nHost: x\r\nX-Auth-Token: {TOKEN}\r\n".encode() + body


BODY = b'{"target_ip": "192.0.2.1"}'
GOOD_HEAD = request("POST / HTTP/1.1", b"Content-Length: 26\r\n\r\n")
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("POST / HTTP/1.1", LENGTH + BODY), 200),
        (request("POST / HTTP/1.0", LENGTH + BODY), 200),
        (request("POST / HTTP/1.1", b"Content-Length: 0\r\n\r\n"), 400),
        (request("POST / HTTP/1.1", b"Content-Length: 99\r\n\r\n" + BODY), 400),
        (request("POST / HTTP/1.1", b"Content-Length: -5\r\n\r\n" + BODY), 400),
        (request("POST / HTTP/1.1", b"Content-Length: 26\r\n" + LENGTH + BODY), 400),
        (request("POST / HTTP/1.1", b"Content-Length: 1073741824\r\n\r\n" + BODY), 413),
        (request("POST / HTTP/1.1", b"Content-Length: 99999999999999999999\r\n\r\n"), 413),
        (request("POST / HTTP/1.1", b"\r\n" + BODY), 411),
        (request("POST / HTTP/1.1", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), 411),
        (request("GET / HTTP/1.1", b"\r\n"), 404),
        (request("PUT / HTTP/1.1", b"\r\n"), 405),
        (request("DELETE / HTTP/1.1", b"\r\n"), 405),
        (request("BREW / HTTP/1.1", b"\r\n"), 405),
        (request("POST / HTTP/3.0", LENGTH + BODY), 505),
        (request("POST / NONSENSE", LENGTH + BODY), 400),
        (request("POST /" + "x" * 70000 + " HTTP/1.1", LENGTH + BODY), 414),
        (request("POST / HTTP/1.1", b"X-Long: " + b"x" * 70000 + b"\r\n" + LENGTH + BODY), 431),
    ],
    ids=lambda value: str(value)[:70] if isinstance(value, bytes) else str(value),
)
def test_requests_as_they_come_are_answered_in_json(receiver: Receiver, data: bytes, status: int) -> None:
    head, _, body = receiver.raw(data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert b"\r\nContent-Length: %d" % len(body) in head
    assert ("error" in json.loads(body)) == (status != 200)
    assert len(receiver.lines()) == (1 if status == 200 else 0)


def test_a_head_has_no_body(receiver: Receiver) -> None:
    answer = receiver.raw(request("HEAD /health HTTP/1.1", b"\r\n"))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


def test_pipelined_requests_are_answered_in_order(receiver: Receiver) -> None:
    good = request("POST / HTTP/1.1", LENGTH + BODY)
    bad = request("POST / HTTP/1.1", b"Content-Length: 2\r\n\r\n[]")
    answers = receiver.raw(good + bad + good)
    assert [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]] == [200, 400, 200]


def test_dry_run_shows_the_command_and_changes_nothing(receiver: Receiver) -> None:
    for _ in range(20):
        status, answer = receiver.post('{"target_ip": "192.0.2.1", "dry_run": true}')
    assert (status, answer["status"], answer["prefix"]) == (200, "dry-run", "192.0.2.1/32")
    assert answer["command"] == "announce route 192.0.2.1/32 next-hop self community [65535:666]"
    assert receiver.post('{"target_ip": "198.51.100.1", "dry_run": true}')[0] == 403
    assert receiver.lines() == []


def test_without_a_controller_nothing_is_accepted_charged_or_scheduled(stopped: Receiver) -> None:
    stopped.start()
    for _ in range(15):
        status, answer = stopped.post('{"target_ip": "192.0.2.1", "withdraw_after": 1}')
        assert (status, answer) == (503, {"error": "The controller cannot take commands now"})
    os.mkfifo(stopped.pipe)  # a pipe that nobody reads
    assert stopped.post('{"target_ip": "192.0.2.1"}')[0] == 503
    stopped.pipe.unlink()
    stopped.pipe.write_text("")  # not a pipe
    assert stopped.post('{"target_ip": "192.0.2.1"}')[0] == 503
    assert stopped.pipe.read_text() == ""
    stopped.pipe.unlink()
    stopped.start_controller()
    assert [stopped.post(f'{{"target_ip": "192.0.2.{n}"}}')[0] for n in range(11)] == [200] * 10 + [429]
    assert len(stopped.lines()) == 10


def test_a_full_pipe_is_a_503_and_no_line_is_cut(receiver: Receiver) -> None:
    assert receiver.controller
    receiver.controller.reads = False  # its heartbeat goes on
    status, count = 200, 0
    while status == 200:
        status, _ = receiver.post('{"action": "withdraw", "target_ip": "192.0.2.1"}')
        count += status == 200
    assert status == 503
    receiver.controller.reads = True
    lines = receiver.lines()
    assert len(lines) >= count
    assert set(lines) == {"withdraw 192.0.2.1/32"}
    assert receiver.post('{"target_ip": "192.0.2.1"}')[0] == 200


def test_a_controller_that_is_stuck_is_a_503(receiver: Receiver) -> None:
    assert receiver.controller
    receiver.controller.stopping.set()  # the pipe is open, but nobody reads it or publishes
    wait_for("the heartbeat to grow old", lambda: receiver.get("/health")[0] == 503)
    for body in (BODY, b'{"action": "withdraw", "target_ip": "192.0.2.1"}', b'{"action": "withdraw-all"}'):
        begin = time.monotonic()
        assert receiver.post(body)[0] == 503
        assert time.monotonic() - begin < 1
    assert receiver.get("/status")[1]["controller"] == "away"


def test_an_end_that_cannot_be_written_is_tried_until_it_is(receiver: Receiver) -> None:
    assert receiver.post('{"target_ip": "192.0.2.1", "withdraw_after": 1}')[0] == 200
    (line,) = receiver.lines()
    identity = line.split("id=")[1].split()[0]
    was = receiver.stop_controller()
    receiver.pipe.unlink()
    wait_for("the complaint", lambda: receiver.logged("trying until it works: No such file"))
    receiver.start_controller(was)
    assert wait_for("the withdraw", receiver.lines)[0] == f"withdraw 192.0.2.1/32 id={identity}"
    wait_for("the log", lambda: receiver.logged("AUTO-WITHDRAW 192.0.2.1/32 after 1s timeout\n"))


def test_what_a_dying_controller_has_not_read_waits_for_the_next(receiver: Receiver) -> None:
    assert receiver.controller
    receiver.controller.reads = False
    assert receiver.post('{"target_ip": "192.0.2.1"}')[0] == 200
    receiver.stop_controller()
    receiver.start_controller()
    assert wait_for("the line", receiver.lines)[0].startswith("announce 192.0.2.1/32 ")


# ---------------------------------------------------------------- life and death


def kill(receiver: Receiver) -> None:
    assert receiver.process
    receiver.process.popen.kill()
    receiver.process.popen.wait()


def test_a_timer_survives_the_receivers_death(receiver: Receiver) -> None:
    assert receiver.post('{"target_ip": "192.0.2.1", "withdraw_after": 2}')[0] == 200
    assert receiver.post('{"target_ip": "192.0.2.2", "withdraw_after": 600}')[0] == 200
    begin = time.monotonic()
    one, _ = receiver.lines()
    kill(receiver)
    receiver.start()
    (end,) = wait_for("the end", receiver.lines, 5)
    assert 1.5 < time.monotonic() - begin < 3
    assert end == f"withdraw 192.0.2.1/32 {one.split()[3]}"
    assert receiver.post('{"target_ip": "192.0.2.2", "withdraw_after": 1}')[0] == 200  # a renewal: it is known
    wait_for("its end", lambda: [line for line in receiver.lines() if line.startswith("withdraw")])


def test_what_is_overdue_at_the_start_is_withdrawn_then(receiver: Receiver) -> None:
    assert receiver.post('{"target_ip": "192.0.2.1", "withdraw_after": 1}')[0] == 200
    receiver.lines()
    kill(receiver)
    end = time.time() + 1.1
    wait_for("its time to pass", lambda: time.time() > end)
    receiver.start()
    (line,) = wait_for("the end", receiver.lines, 1)
    assert line.startswith("withdraw 192.0.2.1/32 id=")
    wait_for("the log", lambda: receiver.logged("AUTO-WITHDRAW 192.0.2.1/32 after 1s timeout"))


def test_a_line_that_died_with_both_daemons_is_written_again(receiver: Receiver) -> None:
    assert receiver.post(BODY)[0] == 200
    (line,) = receiver.lines()
    kill(receiver)
    receiver.stop_controller()
    receiver.start_controller()  # it knows nothing
    receiver.start()
    assert wait_for("the line", receiver.lines, 5) == [line]


def test_a_full_disk_is_warned_about_and_stops_nothing(receiver: Receiver) -> None:
    orders = receiver.directory / "webhook-orders"
    kill(receiver)
    orders.unlink()
    orders.with_name("webhook-orders.new").symlink_to("/dev/full")
    receiver.start()
    status, answer = receiver.post(BODY)
    assert (status, "disk" in answer["warning"]) == (200, True)
    assert len(receiver.lines()) == 1
    orders.with_name("webhook-orders.new").unlink()
    wait_for("the disk", lambda: orders.exists() and "192.0.2.1/32" in orders.read_text())


def test_a_disk_that_takes_the_bytes_and_loses_them_is_warned_about(receiver: Receiver) -> None:
    orders = receiver.directory / "webhook-orders"
    kill(receiver)
    orders.with_name("webhook-orders.new").symlink_to("/dev/null")  # fdatasync fails there, write does not
    receiver.start()
    status, answer = receiver.post(BODY)
    assert (status, "disk" in answer["warning"]) == (200, True)
    assert wait_for("a good file", lambda: "192.0.2.1/32" in orders.read_text())
    assert "warning" not in receiver.post(BODY)[1]
    assert receiver.logged("cannot write the journal")


def test_a_mistake_of_ours_ends_one_request_alone(receiver: Receiver) -> None:
    receiver.stop_controller()
    state = receiver.directory / "state.json"
    found = json.loads(state.read_text())
    found["neighbors"]["127.0.0.1"]["since"] = "noon"  # of another version, say
    state.write_text(json.dumps(found))
    wait_for("it to be read", lambda: receiver.get("/status")[0] == 500)
    assert "log" in receiver.get("/status")[1]["error"]
    wait_for("the log", lambda: receiver.logged("a request of 127.0.0.1 failed"))
    assert not receiver.logged("Traceback")
    assert receiver.get("/nothing")[0] == 404


def test_systemd_is_told(stopped: Receiver) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(stopped.directory / "notify"))
        systemd.settimeout(10)
        stopped.environment = {"NOTIFY_SOCKET": str(stopped.directory / "notify"), "WATCHDOG_USEC": "300000"}
        stopped.start()
        said = {systemd.recv(100)}
        while len(said) < 2:
            said.add(systemd.recv(100))
        assert said == {b"READY=1", b"WATCHDOG=1"}
        assert stopped.process
        stopped.process.send(signal.SIGTERM)
        wait_for("its word", lambda: systemd.recv(100) == b"STOPPING=1")


# ---------------------------------------------------------------- waiting, looking


def test_wait_answers_when_the_routers_were_told(receiver: Receiver) -> None:
    assert receiver.controller
    receiver.controller.sessions({"127.0.0.1": "up", "127.0.0.3": "down"})
    status, answer = receiver.post('{"target_ip": "192.0.2.1", "wait": 5}')
    told = {"127.0.0.1": "advertised", "127.0.0.3": "down"}
    assert (status, answer["delivered"], answer["neighbors"]) == (200, True, told)
    assert receiver.post('{"action": "withdraw", "target_ip": "192.0.2.1", "wait": 5}')[1]["delivered"]
    receiver.controller.reads = False
    begin = time.monotonic()
    answer = receiver.post('{"target_ip": "192.0.2.1", "wait": 0.5}')[1]
    assert 0.5 <= time.monotonic() - begin < 2
    assert (answer["delivered"], answer["neighbors"]["127.0.0.1"]) == (False, "pending")
    receiver.controller.reads = True
    receiver.controller.sessions({"127.0.0.1": "down"})
    wait_for("the news", lambda: receiver.get("/health")[0] == 503)
    begin = time.monotonic()
    answer = receiver.post('{"target_ip": "192.0.2.9", "wait": 5}')[1]
    assert time.monotonic() - begin < 1
    assert answer["delivered"] is False
    assert "no BGP session is up" in answer["warning"]


def test_status_health_and_metrics(receiver: Receiver) -> None:
    assert receiver.post('{"target_ip": "192.0.2.1", "reason": "SYN flood"}')[0] == 200
    receiver.lines()
    wait_for("the route", lambda: receiver.get("/status")[1]["routes"])
    status, answer = receiver.get("/status")
    assert status == 200
    (route,) = answer["routes"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", route["announced_at"])
    assert route["expires_at"] > route["announced_at"]
    assert (route["prefix"], route["source"], route["reason"]) == ("192.0.2.1/32", "webhook", "SYN flood")
    assert route["neighbors"] == {"127.0.0.1": "advertised"}
    assert answer["neighbors"]["127.0.0.1"] == {"state": "up", "since": "1970-01-01T00:00:01.000Z"}
    assert receiver.get("/status", token="wrong")[0] == 403
    assert receiver.get("/health", token="") == (200, {"status": "ok"})
    metrics = receiver.raw(b"GET /metrics HTTP/1.0\r\n\r\n").decode().partition("\r\n\r\n")[2]
    for line in ('rtbh_routes{source="webhook"} 1', 'rtbh_neighbors{state="up"} 1', "rtbh_auth_failures_total 1"):
        assert f"\n{line}\n" in metrics
    assert "192.0.2.1" not in metrics
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "metrics"], input=metrics, text=True, check=True, timeout=20)
    else:
        pytest.skip("promtool is missing: install the package prometheus")


# ---------------------------------------------------------------- the corpus

CORPUS = [json.loads(line) for line in (Path(__file__).parent / "corpus" / "bodies.jsonl").read_text().splitlines()]


def test_each_body_of_the_corpus_gets_its_answer(stopped: Receiver) -> None:
    """An `error` is given up to the field it names; other keys as they are. Lines in the pipe are canonical."""
    plenty = "max_announcements_per_minute = 1000\nmax_routes = 1000"
    stopped.configure(f"token = {TOKEN}\n{plenty}", "[safety]\nmax_routes = 1000\n[bgp]\nnext_hop_ipv6 = 100::1\n")
    stopped.start_controller()
    stopped.start()
    assert len(CORPUS) >= 120
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", stopped.port, timeout=10)) as connection:
        for case in CORPUS:
            text, codec = (case["latin1"], "latin-1") if "latin1" in case else (case["body"], "utf-8")
            body = text.encode(codec)
            connection.request("POST", "/", body, {"X-Auth-Token": TOKEN})
            status, answer = read(connection.getresponse())
            assert status == case["status"], (case, answer)
            for key, value in case["expect"].items():
                assert answer[key].startswith(value) if key == "error" else answer[key] == value, (case, answer)
            for line in stopped.lines() if status == 200 else []:
                words = line.split()
                assert words[0] == "withdraw-all" or str(parse_prefix(words[1])) == words[1]
                assert words[0] in ("announce", "withdraw", "withdraw-all")
    assert stopped.lines() == []


# ---------------------------------------------------------------- those who mean harm


def test_five_hundred_slow_clients_leave_others_served(receiver: Receiver) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(500):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", receiver.port), 10))
            client.sendall(GOOD_HEAD[: n % len(GOOD_HEAD)])
        for n in range(10):
            assert receiver.post(f'{{"target_ip": "192.0.2.{n}"}}')[0] == 200


@pytest.mark.slow
def test_a_request_that_takes_too_long_is_a_408(receiver: Receiver) -> None:
    with socket.create_connection(("127.0.0.1", receiver.port), 20) as client:
        client.sendall(GOOD_HEAD)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_above_the_cap_the_slowest_makes_room(receiver: Receiver) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", receiver.port), 10)) for _ in range(720)]
        assert receiver.post(BODY)[0] == 200
        with contextlib.suppress(ConnectionResetError):
            assert clients[0].recv(1) == b""


def test_a_client_that_waits_for_100_continue_gets_it(receiver: Receiver) -> None:
    with socket.create_connection(("127.0.0.1", receiver.port), 10) as client:
        client.sendall(request("POST / HTTP/1.1", b"Expect: 100-continue\r\n" + LENGTH))
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(BODY)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_one_that_leaves_before_its_answer_harms_nobody(receiver: Receiver) -> None:
    for cut in (10, 60, 200):
        with socket.create_connection(("127.0.0.1", receiver.port), 10) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST at close
            client.sendall(request("POST / HTTP/1.1", LENGTH + BODY)[:cut])
    assert receiver.post(BODY)[0] == 200
    assert not receiver.logged("ERROR")


def test_nothing_that_is_sent_reaches_the_log_unescaped(receiver: Receiver) -> None:
    receiver.post('{"target_ip": "192.0.2.1", "reason": "caf\\u00e9 \\ud83d\\udd25"}')
    receiver.post('{"target_ip": "192.0.2.1\\n2026-01-01 00:00:00 WITHDRAW 192.0.2.2/32"}')
    receiver.post(BODY, token="wrong")
    receiver.raw(request("POST / HTTP/1.1", b"X-Evil: \x1b[31m\r\n" + LENGTH + BODY))
    receiver.raw(request("BREW\x1b[31m / HTTP/1.1", b"\r\n"))
    wait_for("the log", lambda: receiver.logged("AUTH FAILED"))
    assert all(" " <= c <= "~" or c == "\n" for c in receiver.log.read_text())
    assert not receiver.logged(TOKEN)


def test_sighup_puts_new_settings_in_force_or_keeps_the_old(receiver: Receiver) -> None:
    assert receiver.process is not None
    receiver.configure("token = new\nlisten = x")
    receiver.process.send(signal.SIGHUP)
    wait_for("the complaint", lambda: receiver.logged("ERROR: settings not reloaded"))
    assert receiver.post('{"target_ip": "192.0.2.1"}')[0] == 200
    receiver.configure("token = new", "[safety]\nwhitelist = 192.0.2.0/24\n")
    receiver.process.send(signal.SIGHUP)
    wait_for("the new token", lambda: receiver.post("{}", token="new")[0] == 400)
    assert receiver.post('{"target_ip": "192.0.2.1"}', token="new") == (403, {"error": "IP is whitelisted"})
    assert receiver.post('{"target_ip": "192.0.2.1"}')[0] == 403


def test_sigterm_stops_it_at_once_even_with_a_client_connected(receiver: Receiver) -> None:
    assert receiver.process is not None
    with socket.create_connection(("127.0.0.1", receiver.port)):
        receiver.process.send(signal.SIGTERM)
        assert receiver.process.popen.wait(2) == 0
    assert receiver.logged("Webhook receiver stopped")


def test_tls(stopped: Receiver) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    certificate, key = stopped.directory / "crt.pem", stopped.directory / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 "
        f"-keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    stopped.configure(f"token = {TOKEN}\ntls_certificate = {certificate}\ntls_key = {key}")
    stopped.start_controller()
    stopped.start()
    with contextlib.suppress(ConnectionResetError):
        assert stopped.raw(b"POST / HTTP/1.1\r\n\r\n") == b""  # no TLS, no answer
    silent = socket.create_connection(("127.0.0.1", stopped.port), 10)  # never begins with TLS: holds up nobody
    trust = ssl.create_default_context(cafile=str(certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", stopped.port, timeout=10, context=trust)
    with contextlib.closing(connection):
        for length in (0, 30_000):  # the second in several records
            body = json.dumps({"target_ip": "192.0.2.1"}) + " " * length
            connection.request("POST", "/", body, {"X-Auth-Token": TOKEN})
            assert read(connection.getresponse())[0] == 200
        metrics = f"GET /metrics HTTP/1.1\r\nX-Auth-Token: {TOKEN}\r\n\r\n".encode()
        connection.sock.sendall(metrics * 300 + b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        answers = b"".join(iter(lambda: connection.sock.recv(65536), b""))
        assert answers.count(b"HTTP/1.1 200") == 300
        assert b"HTTP/1.1 404" in answers
    silent.close()


def test_a_client_that_asks_much_and_reads_late_gets_all_of_it(receiver: Receiver) -> None:
    count = 2000  # some 6 MB of answers: more than the sockets' buffers
    with socket.create_connection(("127.0.0.1", receiver.port), 10) as client:
        client.settimeout(20)
        asked = threading.Thread(
            target=client.sendall, args=(b"GET /metrics HTTP/1.1\r\n\r\n" * count + b"GET / HTTP/1.0\r\n\r\n",)
        )
        asked.start()
        assert receiver.post(BODY)[0] == 200  # others are served meanwhile
        answers = b"".join(iter(lambda: client.recv(65536), b""))
        asked.join()
    assert answers.count(b"HTTP/1.1 200") == count
    assert answers.count(b"HTTP/1.1 404") == 1


def test_ipv6_loopback(stopped: Receiver) -> None:
    stopped.configure(listen="[::1]:0")
    stopped.start()
    with contextlib.closing(http.client.HTTPConnection("::1", stopped.port, timeout=10)) as connection:
        connection.request("GET", "/")
        assert read(connection.getresponse())[0] == 404


def refuses(receiver: Receiver, code: int = os.EX_CONFIG) -> str:
    """What a receiver that can't start says."""
    result = subprocess.run(
        [*RECEIVER, "--config", str(receiver.config)], capture_output=True, text=True, timeout=20, check=False
    )
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    return result.stderr


def test_it_refuses_to_start_without_a_token_of_its_own(stopped: Receiver) -> None:
    stopped.configure("")
    assert "[webhook] token: no token is set" in refuses(stopped)
    stopped.configure("token = your-secret-webhook-token", listen="0.0.0.0:0")
    assert "[webhook] token: is still the placeholder" in refuses(stopped)
    stopped.configure(f"token_file = {stopped.directory}/token")
    assert "[webhook] token_file: " in refuses(stopped)
    stopped.configure(f"token = x\ntls_certificate = {stopped.directory}/c\ntls_key = {stopped.directory}/k")
    assert "cannot listen" in refuses(stopped) or "tls" in refuses(stopped)


def test_on_loopback_the_placeholder_works_and_is_warned_about(stopped: Receiver) -> None:
    stopped.configure("token = your-secret-webhook-token")
    stopped.start_controller()
    stopped.start()
    assert stopped.post(BODY, token="your-secret-webhook-token")[0] == 200
    wait_for("the warning", lambda: stopped.logged("WARNING: [webhook] token is still the placeholder"))


def test_a_token_from_a_file(stopped: Receiver) -> None:
    (stopped.directory / "token").write_text("from-a-file\n")
    stopped.configure(f"token_file = {stopped.directory}/token")
    stopped.start_controller()
    stopped.start()
    assert stopped.post(BODY, token="from-a-file")[0] == 200


def test_a_second_receiver_does_not_write_the_first_ones_orders(receiver: Receiver) -> None:
    receiver.configure()
    assert f"[paths] another receiver uses {receiver.directory}" in refuses(receiver, code=1)


def test_a_port_that_is_taken_is_named(receiver: Receiver) -> None:
    receiver.configure(listen=f"127.0.0.1:{receiver.port}")
    assert f"[webhook] cannot listen on 127.0.0.1:{receiver.port}: " in refuses(receiver, code=1)
