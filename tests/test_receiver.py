"""The receiver as a process: HTTP as clients really speak it, the pipe, signals and settings."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import ROOT, Process, clean_environment, wait_for

RECEIVER = [sys.executable, str(ROOT / "webhook_receiver.py")]
TOKEN = "s3cret"


class Receiver:
    """A receiver whose pipe this test reads, or leaves unread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "rtbh.conf"
        self.pipe = directory / "rtbh.pipe"
        self.log = directory / "webhook.log"
        self.reader = -1
        self.port = 0
        self.process: Process | None = None

    def configure(self, webhook: str = f"token = {TOKEN}", rest: str = "", listen: str = "127.0.0.1:0") -> None:
        self.config.write_text(
            f"[paths]\nfifo = {self.pipe}\nwebhook_log = {self.log}\nstate_dir = {self.directory}\n"
            f"[webhook]\nlisten = {listen}\n{webhook}\n{rest}\n"
        )

    def start(self) -> None:
        out = self.directory / "receiver.out"
        self.process = process = Process(
            "the receiver", [*RECEIVER, "--config", str(self.config)], out, clean_environment()
        )

        def ready() -> str:
            process.check()
            return out.read_text().partition("Listening on ")[2]

        address = str(wait_for("the receiver", ready)).split()[0]
        self.port = int(address.rpartition(":")[2])

    def open_pipe(self) -> None:
        """Read the pipe as the controller does."""
        if not self.pipe.exists():
            os.mkfifo(self.pipe)
        self.reader = os.open(self.pipe, os.O_RDWR | os.O_NONBLOCK)

    def close_pipe(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def lines(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            return os.read(self.reader, 1 << 20).decode().splitlines()
        return []

    def post(self, body: str | bytes, token: str = TOKEN, **headers: str) -> tuple[int, Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request("POST", "/", body, {"X-Auth-Token": token, **headers})
            return read(connection.getresponse())

    def raw(self, data: bytes) -> bytes:
        """Send bytes, then read until the receiver closes."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as client:
            client.sendall(data)
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
    if receiver.reader >= 0:
        os.close(receiver.reader)


@pytest.fixture
def receiver(stopped: Receiver) -> Receiver:
    stopped.open_pipe()
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
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        targets = [f'{{"target_ip": "192.0.2.{n}"}}' for n in range(60)]
        answers = list(pool.map(receiver.post, targets))
    assert sorted(status for status, _ in answers) == [200] * 10 + [429] * 50
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
    answer = receiver.raw(request("HEAD / HTTP/1.1", b"\r\n"))
    assert answer.startswith(b"HTTP/1.1 405 ")
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
    stopped.open_pipe()
    assert [stopped.post(f'{{"target_ip": "192.0.2.{n}"}}')[0] for n in range(11)] == [200] * 10 + [429]
    assert len(stopped.lines()) == 10


def test_a_full_pipe_is_a_503_and_no_line_is_cut(receiver: Receiver) -> None:
    status, count = 200, 0
    while status == 200:
        status, _ = receiver.post('{"action": "withdraw", "target_ip": "192.0.2.1"}')
        count += status == 200
    assert status == 503
    assert receiver.lines() == ["withdraw 192.0.2.1/32"] * count
    assert receiver.post('{"target_ip": "192.0.2.1"}')[0] == 200


def test_a_withdrawal_that_cannot_be_written_is_tried_until_it_is(receiver: Receiver) -> None:
    assert receiver.post('{"target_ip": "192.0.2.1", "withdraw_after": 1}')[0] == 200
    (line,) = receiver.lines()
    identity = line.split("id=")[1].split()[0]
    receiver.close_pipe()
    receiver.pipe.unlink()
    wait_for("the complaint", lambda: receiver.logged("ERROR: cannot withdraw 192.0.2.1/32"))
    receiver.open_pipe()
    assert wait_for("the withdraw", receiver.lines) == [f"withdraw 192.0.2.1/32 id={identity}"]
    wait_for("the log", lambda: receiver.logged("AUTO-WITHDRAW 192.0.2.1/32 after 1s timeout\n"))


def test_what_a_dying_controller_has_not_read_waits_for_the_next(receiver: Receiver) -> None:
    assert receiver.post('{"target_ip": "192.0.2.1"}')[0] == 200
    receiver.close_pipe()
    receiver.open_pipe()
    assert len(receiver.lines()) == 1


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
    stopped.open_pipe()
    stopped.start()
    with contextlib.suppress(ConnectionResetError):
        assert stopped.raw(b"POST / HTTP/1.1\r\n\r\n") == b""  # no TLS, no answer
    trust = ssl.create_default_context(cafile=str(certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", stopped.port, timeout=10, context=trust)
    with contextlib.closing(connection):
        connection.request("POST", "/", BODY, {"X-Auth-Token": TOKEN})
        assert read(connection.getresponse())[0] == 200


def test_ipv6_loopback(stopped: Receiver) -> None:
    stopped.configure(listen="[::1]:0")
    stopped.start()
    with contextlib.closing(http.client.HTTPConnection("::1", stopped.port, timeout=10)) as connection:
        connection.request("GET", "/")
        assert read(connection.getresponse())[0] == 404


def refuses(receiver: Receiver) -> str:
    """What a receiver that can't start says."""
    result = subprocess.run(
        [*RECEIVER, "--config", str(receiver.config)], capture_output=True, text=True, timeout=20, check=False
    )
    assert result.returncode == 1
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
    stopped.open_pipe()
    stopped.start()
    assert stopped.post(BODY, token="your-secret-webhook-token")[0] == 200
    wait_for("the warning", lambda: stopped.logged("WARNING: [webhook] token is still the placeholder"))


def test_a_token_from_a_file(stopped: Receiver) -> None:
    (stopped.directory / "token").write_text("from-a-file\n")
    stopped.configure(f"token_file = {stopped.directory}/token")
    stopped.open_pipe()
    stopped.start()
    assert stopped.post(BODY, token="from-a-file")[0] == 200


def test_a_port_that_is_taken_is_named(receiver: Receiver) -> None:
    receiver.configure(listen=f"127.0.0.1:{receiver.port}")
    assert f"[webhook] cannot listen on 127.0.0.1:{receiver.port}: " in refuses(receiver)
