#!/usr/bin/env python3
"""Webhook receiver: takes a detection system's POST and writes announce and withdraw to the pipe.

    POST / with the header X-Auth-Token and a JSON body:
    {"action": "announce", "target_ip": "192.0.2.100", "withdraw_after": 3600}

action is announce (the default), withdraw or withdraw-all; target_ip an address or a prefix;
withdraw_after the seconds until the blackhole ends by itself; "dry_run": true applies every
guard and changes nothing; reason is one line for the log. Answers are JSON.

Settings: section [webhook] of the file that the controller reads too (see rtbh_controller.py).
Signals: SIGHUP rereads the settings; SIGTERM and SIGINT stop the receiver.
Exit codes: 0 a clean end, 1 unusable settings or address, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hmac
import http
import http.server
import ipaddress
import json
import math
import os
import signal
import socket
import socketserver
import ssl
import stat
import sys
import threading
import time
import urllib.parse
import uuid
from collections import deque
from typing import Any, NamedTuple

from rtbh_controller import (
    DEFAULT_CONFIG,
    PLACEHOLDER_TOKEN,
    Logger,
    Now,
    Prefix,
    Settings,
    SettingsError,
    check_prefix,
    describe_settings,
    load_settings,
    parse_prefix,
    printable,
    read_state,
)

BODY_MAX = 64 * 1024  # bytes
CLIENTS_MAX = 200  # connections served at once
CLIENT_TIMEOUT = 10.0  # seconds a client may take to send, or stay idle
WINDOW = 60.0  # seconds over which announcements are counted
CONFIRM = 1.0  # seconds until a line must show in the published state, or is written again
RETRY = 1.0  # seconds until a withdrawal that could not be written is tried again

# ---------------------------------------------------------------- requests


class Rejected(Exception):
    """A request that is answered with an error; changes nothing."""

    def __init__(self, status: int, error: str, log: str = "", retry_after: float = 0.0) -> None:
        super().__init__(error)
        self.status, self.error, self.log, self.retry_after = status, error, log, retry_after


@dataclasses.dataclass(frozen=True)
class Request:
    """What a body asks for. `prefix` is None for withdraw-all; `withdraw_after` in seconds, None: the default."""

    action: str
    prefix: Prefix | None
    withdraw_after: int | None = None
    dry_run: bool = False
    reason: str = ""


def parse_body(body: bytes) -> Request:
    """Read a request. Raises Rejected (400) naming the field that is wrong."""
    try:
        data = json.loads(body.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        raise Rejected(400, "body: not UTF-8") from None
    except RecursionError:
        raise Rejected(400, "body: nested too deep") from None
    except ValueError as error:
        raise Rejected(400, f"body: not JSON: {printable(str(error))}") from None
    if not isinstance(data, dict):
        raise Rejected(400, "body: must be a JSON object")
    action = data.get("action", "announce")
    if action not in ("announce", "withdraw", "withdraw-all"):
        raise Rejected(400, "action: must be announce, withdraw or withdraw-all")
    dry_run = data.get("dry_run", False)
    if not isinstance(dry_run, bool):
        raise Rejected(400, "dry_run: must be true or false")
    reason = data.get("reason", "")
    if not isinstance(reason, str) or len(reason) > 200 or not reason.isprintable():
        raise Rejected(400, "reason: must be one line of at most 200 printable characters")
    if action == "withdraw-all":
        if "target_ip" in data:
            raise Rejected(400, "target_ip: has no place in withdraw-all; to end one blackhole use withdraw")
        return Request(action, None, None, dry_run, reason)
    return Request(action, read_target(data), read_withdraw_after(data), dry_run, reason)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def read_target(data: dict[str, Any]) -> Prefix:
    target = data.get("target_ip")
    if not isinstance(target, str):
        raise Rejected(400, "target_ip: must be given, as a string" if target is None else "target_ip: not a string")
    try:
        return parse_prefix(target)
    except ValueError as error:
        raise Rejected(400, f"target_ip: {error}") from None


def read_withdraw_after(data: dict[str, Any]) -> int | None:
    if "withdraw_after" not in data:
        return None
    value = data["withdraw_after"]
    if isinstance(value, float) and value.is_integer():  # some encoders write every number as 3600.0
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Rejected(400, "withdraw_after: must be a whole number of seconds")
    return value


# ---------------------------------------------------------------- decisions


class Timer(NamedTuple):
    """The end of a blackhole that this receiver announced: `due` on the monotonic clock, `length` in seconds."""

    due: float
    prefix: str
    id: str
    length: int


class Sent(NamedTuple):
    """A line in the pipe that the published state does not show yet; `id` empty: an explicit withdraw."""

    line: str
    id: str
    wall: float  # seconds since the epoch when it was first written
    again_at: float  # monotonic: when to look, and if need be to write it again


class Decision(NamedTuple):
    """What a request leads to: the line for the pipe, the timer if it announces, the answer and the log message."""

    line: str
    timer: Timer | None
    charged: bool
    answer: dict[str, Any]
    log: str


class Desk:
    """The announcements of the last minute and the timers of what is announced. No I/O, no clock."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.accepted: deque[float] = deque()  # monotonic times of the announcements that count
        self.timers: dict[str, Timer] = {}
        self.sent: dict[str, Sent] = {}  # by prefix: a controller may die with what it has read

    def decide(self, request: Request, identity: str, now: Now) -> Decision:
        """What to do about a request; nothing is changed yet. Raises Rejected."""
        if request.prefix is None:
            return Decision("withdraw-all", None, False, {"status": "ok"}, f"WEBHOOK WITHDRAW-ALL{because(request)}")
        prefix = str(request.prefix)
        answer: dict[str, Any] = {"status": "ok", "prefix": prefix}
        if request.action == "withdraw":
            return Decision(f"withdraw {prefix}", None, False, answer, f"WEBHOOK WITHDRAW {prefix}{because(request)}")
        limits = self.settings.webhook
        length = limits.withdraw_after if request.withdraw_after is None else request.withdraw_after
        if not 1 <= length <= limits.max_withdraw_after:
            raise Rejected(400, f"withdraw_after: must be from 1 to {limits.max_withdraw_after} seconds")
        self.check_guards(request.prefix)
        charged = prefix not in self.timers
        if charged:
            self.check_limits(prefix, now)
        timer = Timer(now.mono + length, prefix, identity, length)
        line = f"announce {prefix} until={now.wall + length:.3f} id={identity} source=webhook"
        line += f" reason={urllib.parse.quote(request.reason, safe='')}" if request.reason else ""
        answer["withdraw_after"] = length
        log = f"WEBHOOK ANNOUNCE {prefix} (auto-withdraw in {length}s){because(request)}"
        return Decision(line, timer, charged, answer, log)

    def check_guards(self, prefix: Prefix) -> None:
        refusal = check_prefix(prefix, self.settings.safety)
        if refusal is None:
            return
        shown = prefix.address if prefix.host else prefix.text
        if refusal.guard == "whitelist":
            raise Rejected(403, "IP is whitelisted", f"BLOCKED whitelisted IP {shown} ({refusal.why})")
        error = "Not in allowed prefixes" if refusal.guard == "allowed" else "Prefix too short"
        raise Rejected(403, error, f"BLOCKED {shown}: {refusal.guard}: {refusal.why}")

    def check_limits(self, prefix: str, now: Now) -> None:
        limits = self.settings.webhook
        held = len(self.timers)
        if held >= min(limits.max_routes, self.settings.safety.max_routes):
            raise Rejected(409, "Route limit reached", f"REFUSED {prefix}: max_routes: {held} routes are held")
        while self.accepted and self.accepted[0] <= now.mono - WINDOW:
            self.accepted.popleft()
        if len(self.accepted) >= limits.max_announcements_per_minute:
            wait = self.accepted[0] + WINDOW - now.mono if self.accepted else WINDOW
            raise Rejected(429, "Rate limit exceeded", f"RATE LIMITED announcement for {prefix}", wait)

    def commit(self, decision: Decision, request: Request, now: Now) -> None:
        """Record what a decision changes, once its line is in the pipe."""
        if request.prefix is None:
            for prefix in [*self.timers, *self.sent]:
                self.send(prefix, f"withdraw {prefix}", "", now)
            self.timers.clear()
        elif decision.timer is None:
            self.timers.pop(str(request.prefix), None)
            self.send(str(request.prefix), decision.line, "", now)
        else:
            self.timers[decision.timer.prefix] = decision.timer
            self.send(decision.timer.prefix, decision.line, decision.timer.id, now)
        if decision.charged:
            self.accepted.append(now.mono)

    def send(self, prefix: str, line: str, identity: str, now: Now) -> None:
        """Note that a line about the prefix was written."""
        self.sent[prefix] = Sent(line, identity, now.wall, now.mono + CONFIRM)

    def unconfirmed(self, state: dict[str, Any], now: Now) -> list[tuple[str, Sent]]:
        """The lines to be written again; forgets those that the published state shows carried out or refused."""
        again = []
        if not state or not -CONFIRM < now.wall - state["heartbeat"] < 3.0:
            return []  # the controller is away: what it does next is seen when it is back
        routes = {route["prefix"]: route for route in state["routes"]}
        for prefix, sent in list(self.sent.items()):
            if now.mono < sent.again_at or state["heartbeat"] < sent.wall + 0.2:
                continue
            if carried_out(sent, routes.get(prefix), state["refused_ids"]):
                del self.sent[prefix]
            else:
                again.append((prefix, sent))
        return again

    def next_timer(self) -> Timer | None:
        """The timer that ends first, if any."""
        return min(self.timers.values(), default=None)


def carried_out(sent: Sent, route: dict[str, Any] | None, refused: list[str]) -> bool:
    """Whether the published state shows what the line asked for, or that it was refused or overtaken."""
    if sent.line.startswith("announce"):
        if route is None or sent.id in refused:
            return sent.id in refused
        return bool(route["until"] is None or route["id"] == sent.id or route["announced_at"] > sent.wall)
    if route is None or route["source"] == "other":
        return True
    return bool(route["id"] != sent.id if sent.id else route["announced_at"] > sent.wall)


def because(request: Request) -> str:
    return f": {printable(request.reason, 800)}" if request.reason else ""


# ---------------------------------------------------------------- the pipe


class Pipe:
    """Writes whole lines to the controller's FIFO and never waits.

    The descriptor stays open: what a dying controller has not read then waits for the next one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = -1

    def write(self, line: str) -> None:
        """Write one line, of at most PIPE_BUF bytes, whole. Raises OSError when the controller can't take it."""
        self.open()
        data = f"{line}\n".encode("ascii")
        if os.write(self.descriptor, data) != len(data):
            raise OSError("the line was cut")

    def open(self) -> None:
        """Open the FIFO, anew when another has taken its place. ENXIO: nobody reads it."""
        found = os.stat(self.path)
        if not stat.S_ISFIFO(found.st_mode):
            raise OSError(f"{self.path} is not a FIFO")
        if self.descriptor >= 0:
            opened = os.fstat(self.descriptor)
            if (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino):
                return
            os.close(self.descriptor)
            self.descriptor = -1
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)


# ---------------------------------------------------------------- service


class Service:
    """The desk, the pipe and the timers behind one lock: decide, write, record and schedule are one step."""

    def __init__(self, settings: Settings, log: Logger) -> None:
        self.settings, self.log = settings, log
        self.desk = Desk(settings)
        self.pipe = Pipe(settings.paths.fifo)
        self.changed = threading.Condition()
        self.write_failed = False
        threading.Thread(target=self.run_timers, daemon=True).start()

    def handle(self, body: bytes, token: str, client: str) -> dict[str, Any]:
        """Answer one POST. Raises Rejected."""
        expected = self.settings.webhook.token
        if not hmac.compare_digest(token.encode("utf-8", "surrogateescape"), expected.encode()):
            raise Rejected(403, "Wrong or missing token in X-Auth-Token", f"AUTH FAILED from {client}")
        request = parse_body(body)
        identity = uuid.uuid4().hex
        with self.changed:
            now = Now(time.time(), time.monotonic())
            decision = self.desk.decide(request, identity, now)
            if request.dry_run:
                return decision.answer | {"status": "dry-run", "command": self.dry_run(request)}
            try:
                self.pipe.write(decision.line)
            except OSError as error:
                problem = f"ERROR: cannot write to {self.pipe.path}: {error.strerror or error}"
                raise Rejected(503, "The controller cannot take commands now", problem, RETRY) from None
            self.desk.commit(decision, request, now)
            self.changed.notify()
        self.log(decision.log)
        return decision.answer

    def dry_run(self, request: Request) -> str:
        """The ExaBGP command that the request would lead to, were nothing held."""
        if request.prefix is None:
            return "withdraw route of every held prefix"
        attributes = self.settings.bgp.attributes(request.prefix.version)
        return f"{request.action} route {request.prefix} {attributes}"

    def reload(self, settings: Settings) -> None:
        with self.changed:
            self.settings = self.desk.settings = settings

    def send_again(self) -> None:
        """Write again what the published state does not show: it died with a controller that had read it."""
        now = Now(time.time(), time.monotonic())
        if all(now.mono < sent.again_at for sent in self.desk.sent.values()):
            return
        for prefix, sent in self.desk.unconfirmed(read_state(self.settings.paths.state_file), now):
            with contextlib.suppress(OSError):
                self.pipe.write(sent.line)
                self.log(f"SENT AGAIN {sent.line.split(' until=')[0]}: the controller does not show it")
            self.desk.sent[prefix] = sent._replace(again_at=now.mono + CONFIRM)

    def run_timers(self) -> None:
        """Withdraw each blackhole at its time; a withdrawal that can't be written is tried until it is."""
        with self.changed:
            while True:
                self.send_again()
                timer = self.desk.next_timer()
                left = math.inf if timer is None else timer.due - time.monotonic()
                if timer is None or left > 0:
                    self.changed.wait(min(left, CONFIRM if self.desk.sent else 3600.0))
                    continue
                try:
                    self.pipe.write(f"withdraw {timer.prefix} id={timer.id}")
                except OSError as error:
                    if not self.write_failed:
                        self.log(f"ERROR: cannot withdraw {timer.prefix}, trying until it works: {error.strerror}")
                    self.write_failed = True
                    self.changed.wait(RETRY)
                    continue
                self.write_failed = False
                del self.desk.timers[timer.prefix]
                now = Now(time.time(), time.monotonic())
                self.desk.send(timer.prefix, f"withdraw {timer.prefix} id={timer.id}", timer.id, now)
                self.log(f"AUTO-WITHDRAW {timer.prefix} after {timer.length}s timeout")


# ---------------------------------------------------------------- HTTP


class Handler(http.server.BaseHTTPRequestHandler):
    """HTTP around Service.handle: lengths, methods, and answers that are always JSON."""

    protocol_version = default_request_version = "HTTP/1.1"  # an answer always has a head
    timeout = CLIENT_TIMEOUT
    wbufsize = -1  # head and body leave in one segment
    disable_nagle_algorithm = True
    server: Server

    def version_string(self) -> str:
        """The Server header: no version for an attacker to look up."""
        return "rtbh-webhook"

    def do_POST(self) -> None:
        try:
            body = self.read_body()
            token = self.headers.get("X-Auth-Token", "")
            self.answer(200, self.server.service.handle(body, token, self.client_address[0]))
        except Rejected as rejected:
            if rejected.log:
                self.server.service.log(rejected.log)
            self.answer(rejected.status, {"error": rejected.error}, rejected.retry_after)

    def do_GET(self) -> None:
        self.close_connection = True
        self.answer(404, {"error": "Nothing here: POST announces and withdraws"})

    def read_body(self) -> bytes:
        """The body, of a declared length up to BODY_MAX. Raises Rejected, and then the connection is closed."""
        self.close_connection, keep = True, not self.close_connection
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or not lengths:
            raise Rejected(411, "Content-Length is needed")
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
            raise Rejected(400, "Content-Length: must be one whole number")
        if len(lengths[0]) > 9 or int(lengths[0]) > BODY_MAX:
            raise Rejected(413, f"body: longer than {BODY_MAX} bytes")
        body = self.rfile.read(int(lengths[0]))
        if len(body) < int(lengths[0]):
            raise Rejected(400, "body: shorter than Content-Length")
        self.close_connection = not keep
        return body

    def answer(self, status: int, content: dict[str, Any], retry_after: float = 0.0) -> None:
        data = json.dumps(content, separators=(",", ":") if "error" in content else None).encode("ascii")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry_after:
            self.send_header("Retry-After", str(math.ceil(retry_after)))
        if status == 405:
            self.send_header("Allow", "POST, GET")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request, as JSON too."""
        self.close_connection = True
        if code == 501:  # its answer to a method it has no do_... for
            code, message = 405, "Method not allowed"
        self.answer(code, {"error": printable(message or http.HTTPStatus(code).phrase)})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: only what Service logs is worth a line."""


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """One thread a client, at most CLIENTS_MAX of them; TLS when a certificate is set."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, settings: Settings, service: Service) -> None:
        self.service = service
        self.slots = threading.BoundedSemaphore(CLIENTS_MAX)
        self.tls = load_tls(settings)
        host, port = settings.webhook.listen
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(CLIENT_TIMEOUT)
        with self.tls.wrap_socket(request, server_side=True) as wrapped:
            super().finish_request(wrapped, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that went away is no news
            self.service.log(f"ERROR: request from {client_address[0]} failed: {printable(repr(error))}")


def load_tls(settings: Settings) -> ssl.SSLContext | None:
    """The server's TLS context, None without a certificate. Raises OSError when the files can't be used."""
    if not settings.webhook.tls_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.webhook.tls_certificate, settings.webhook.tls_key)
    return context


# ---------------------------------------------------------------- commands


def load_webhook_settings(path: str | None) -> tuple[Settings, list[str]]:
    """The settings with the token read from its file. Raises SettingsError, too when no token is usable."""
    settings, warnings = load_settings(path)
    webhook = settings.webhook
    if webhook.token_file:
        try:
            with open(webhook.token_file, encoding="ascii") as file:
                webhook = dataclasses.replace(webhook, token=file.read().strip())
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError([f"[webhook] token_file: {error}"]) from None
    if not webhook.token:
        raise SettingsError(["[webhook] token: no token is set; set token or token_file"])
    if webhook.token == PLACEHOLDER_TOKEN:
        if not ipaddress.ip_address(webhook.listen[0]).is_loopback:
            raise SettingsError(
                ["[webhook] token: is still the placeholder; set a secret one to listen beyond loopback"]
            )
        warnings.append("[webhook] token is still the placeholder: everyone knows it")
    return dataclasses.replace(settings, webhook=webhook), warnings


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="rtbh-webhook", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="PATH", help=f"settings (default: $RTBH_CONFIG, else {DEFAULT_CONFIG})")
    parser.add_argument("--check", action="store_true", help="validate the settings, print what is in force, exit")
    options = parser.parse_args()
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread starts: main() alone takes them
    try:
        settings, warnings = load_webhook_settings(options.config)
    except SettingsError as error:
        print(f"rtbh-webhook: {error}", file=sys.stderr)
        return 1
    if options.check:
        print(describe_settings(settings))
        print("".join(f"warning: {warning}\n" for warning in warnings), end="", file=sys.stderr)
        return 0
    log = Logger(settings.paths.webhook_log)
    host, port = settings.webhook.listen
    try:
        server = Server(settings, Service(settings, log))
    except OSError as error:
        print(f"rtbh-webhook: [webhook] cannot listen on {host}:{port}: {error}", file=sys.stderr)
        return 1
    port = server.server_address[1]
    for warning in warnings:
        log(f"WARNING: {warning}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    log(f"Webhook receiver listening on port {port}")
    print(f"Listening on {f'[{host}]' if ':' in host else host}:{port}", flush=True)
    while signal.sigwait(signals) == signal.SIGHUP:
        reload(server.service, options.config)
    server.shutdown()
    log("Webhook receiver stopped")
    log.close()
    return 0


def reload(service: Service, config: str | None) -> None:
    try:
        settings, warnings = load_webhook_settings(config)
    except SettingsError as error:
        service.log(f"ERROR: settings not reloaded, the old ones stay: {error}")
        return
    service.reload(settings)
    service.log("Settings reloaded (listen, paths and TLS change at the next start)")
    for warning in warnings:
        service.log(f"WARNING: {warning}")


if __name__ == "__main__":
    sys.exit(main())
