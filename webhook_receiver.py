#!/usr/bin/env python3
"""Webhook receiver: takes a detection system's POST and writes announce and withdraw to the pipe.

    POST / with the header X-Auth-Token and a JSON body:
    {"action": "announce", "target_ip": "192.0.2.100", "withdraw_after": 3600}

action is announce (the default), withdraw or withdraw-all; target_ip an address or a prefix;
withdraw_after the seconds until the blackhole ends by itself; reason one line for the log;
"dry_run": true applies every guard and changes nothing; "wait": SECONDS answers when every router
was told, or at that time. GET /status (with the token), /health and /metrics. Answers are JSON.

Settings: section [webhook] of the file that the controller reads too (see rtbh_controller.py).
Signals: SIGHUP rereads the settings; SIGTERM and SIGINT stop the receiver.
Exit codes: 0 a clean end, 78 unusable settings (EX_CONFIG of sysexits.h), 2 wrong usage, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import email.utils
import errno
import fcntl
import functools
import hmac
import http
import ipaddress
import json
import math
import os
import re
import select
import signal
import socket
import ssl
import stat
import sys
import termios
import time
import traceback
import urllib.parse
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from rtbh_controller import (
    DEFAULT_CONFIG,
    PLACEHOLDER_TOKEN,
    Attributes,
    Blackholes,
    JournalFile,
    Logger,
    Neighbor,
    Now,
    Prefix,
    Refusal,
    Route,
    Settings,
    SettingsError,
    Watch,
    check_prefix,
    describe_settings,
    load_settings,
    parse_prefix,
    printable,
    render,
)

HEAD_MAX = 16 * 1024  # bytes of request line and headers
BODY_MAX = 64 * 1024  # bytes
READ_SIZE = 64 * 1024  # bytes read from a client at once
CLIENTS_MAX = 700  # connections; above, the one that has kept us waiting longest makes room
REQUEST_TIMEOUT = 10.0  # seconds from the first byte of a request to its last
IDLE_TIMEOUT = 60.0  # seconds without a request on a kept connection
LINGER = 1.0  # seconds in which what a refused client still sends is read, so that it gets its answer
WINDOW = 60.0  # seconds over which announcements are counted
STALE = 3.0  # seconds without a heartbeat after which the controller counts as away
TICK = 0.25  # seconds between two looks at the published state and the pipe
CONFIRM = 1.0  # seconds until a line must show in the published state, or is written again
RETRY = 1.0  # seconds until a line that could not be written is tried again
WAIT_MAX = 10.0  # seconds that a client may ask to wait for the routers
DURABLE_MAX = 1.0  # seconds that an answer waits for a slow disk
SAY_PAUSE = 0.006  # seconds from a deed to its line in the log
DRAIN = 1.5  # seconds for the last answers when the receiver stops

# ---------------------------------------------------------------- what a body asks for


class Rejected(Exception):
    """A request that is answered with an error; changes nothing. `retry_after` in seconds."""

    def __init__(self, status: int, error: str, log: str = "", retry_after: float = 0.0) -> None:
        super().__init__(error)
        self.status, self.error, self.log, self.retry_after = status, error, log, retry_after


class Request(NamedTuple):
    """What a body asks for. `prefix` is None for withdraw-all; times in seconds, None: the default."""

    action: str
    prefix: Prefix | None
    withdraw_after: int | None = None
    dry_run: bool = False
    wait: float = 0.0
    reason: str = ""


def parse_body(body: bytes) -> Request:
    """Read a request. Raises Rejected (400) naming the field that is wrong."""
    try:
        data = DECODER.decode(body.decode("utf-8"))
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
    wait = data.get("wait", 0)
    if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait <= WAIT_MAX:
        raise Rejected(400, f"wait: must be a number of seconds from 0 to {WAIT_MAX:.0f}")
    reason = data.get("reason", "")
    if not isinstance(reason, str) or len(reason) > 200 or not reason.isprintable():
        raise Rejected(400, "reason: must be one line of at most 200 printable characters")
    if action == "withdraw-all":
        if "target_ip" in data:
            raise Rejected(400, "target_ip: has no place in withdraw-all; to end one blackhole use withdraw")
        return Request(action, None, None, dry_run, wait, reason)
    return Request(action, read_target(data), read_withdraw_after(data), dry_run, wait, reason)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


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


# ---------------------------------------------------------------- what the controller publishes


class View:
    """The published state as the guards need it. `mirror` is the controller's own decision code, fed from it."""

    def __init__(self, settings: Settings, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError when it is no published state."""
        # What a controller shows that stops is not what it will hold when it is back: it is away already.
        self.heartbeat = 0.0 if state.get("stopping") else float(state.get("heartbeat", 0.0))
        self.neighbors: dict[str, dict[str, Any]] = state.get("neighbors", {})
        self.routes: dict[str, dict[str, Any]] = {route["prefix"]: route for route in state.get("routes", [])}
        self.refused_ids = set(state.get("refused_ids", []))
        self.ended_ids = set(state.get("ended_ids", []))
        self.withdrawing = set(state.get("withdrawing", []))  # told to ExaBGP, which has not answered
        self.exabgp = str(state.get("exabgp", ""))
        self.mirror = mirror = Blackholes(settings)
        mirror.routers = {parse_prefix(address) for address in state.get("routers", [])}
        mirror.neighbors = {address: Neighbor(n["state"], n["since"]) for address, n in self.neighbors.items()}
        for prefix, route in self.routes.items():
            if route["source"] == "other":
                mirror.others[prefix] = list(route["neighbors"])
            else:
                attributes = Attributes(route["attributes"])
                mirror.routes[prefix] = Route(prefix, attributes, route["announced_at"], source=route["source"])
        self.ours = {prefix for prefix, route in self.routes.items() if route["source"] == "webhook"}

    def fresh(self, now: Now) -> bool:
        """Whether the controller lives; a heartbeat from the future is one from before the clock was set back."""
        return -STALE < now.wall - self.heartbeat < STALE

    def any_up(self) -> bool:
        return any(neighbor["state"] == "up" for neighbor in self.neighbors.values())

    def warning(self, prefix: str) -> dict[str, str]:
        """What the one who announces the prefix should know."""
        route = self.routes.get(prefix)
        if not self.any_up():
            return {"warning": "no BGP session is up: the route goes out when one is"}
        if route and route["until"] is None:
            return {"warning": "an operator has pinned the route: it stays until it is withdrawn"}
        return {}

    def expect(self, order: Order) -> None:
        """Count a route that the controller has been told to hold, until it says so itself."""
        attributes = self.mirror.new_attributes[6 if ":" in order.prefix else 4]
        route = Route(order.prefix, attributes, order.sent_at, source="webhook")
        self.mirror.routes.setdefault(order.prefix, route)
        self.ours.add(order.prefix)


# ---------------------------------------------------------------- decisions


class Order(NamedTuple):
    """What this receiver last asked of the controller about a prefix, until that is done.

    An announce stays until its route is gone: at its end it becomes a withdraw with its id. An
    explicit withdraw has no id. Times: `sent_at` and `until` in seconds since the epoch; `due` and
    `again_at` (when to look, and if need be to write the line again) on the monotonic clock.
    """

    prefix: str
    action: str
    id: str
    line: str
    sent_at: float
    length: int = 0
    until: float = math.inf
    due: float = math.inf
    again_at: float = 0.0
    shown: bool = False  # the published state has shown the route

    def record(self) -> str:
        """For the disk: nothing that is of this process or boot alone."""
        kept = {key: value for key, value in self._asdict().items() if key not in ("due", "again_at")}
        kept["until"] = None if self.until == math.inf else self.until
        return json.dumps({"order": kept})


def read_orders(text: str, now: Now) -> dict[str, Order]:
    """Orders from their file. What is left of a timer is at most its length, whatever the clock says."""
    orders: dict[str, Order] = {}
    for line in text.splitlines():
        try:
            record = json.loads(line)
            if "over" in record:
                orders.pop(record["over"], None)
                continue
            if "shown" in record:
                orders[record["shown"]] = orders[record["shown"]]._replace(shown=True)
                continue
            order = Order(**record["order"])
            orders[order.prefix] = order
        except (ValueError, KeyError, TypeError):
            continue  # torn when the host died
    for prefix, order in orders.items():
        until = math.inf if order.until is None else order.until
        due = now.mono + min(until - now.wall, order.length) if order.action == "announce" else math.inf
        orders[prefix] = order._replace(until=until, due=due, again_at=now.mono)
    return orders


class Decision(NamedTuple):
    """What a request leads to: the line for the pipe, the answer, and the log message; `length` in seconds."""

    line: str
    answer: dict[str, Any]
    log: str
    id: str = ""
    length: int = 0
    charged: bool = False


class Desk:
    """The announcements of the last minute, and the orders that are not done. No I/O, no clock."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.accepted: deque[float] = deque()  # monotonic times of the announcements that count
        self.orders: dict[str, Order] = {}
        self.unread_at = 0.0  # seconds since the epoch: when lines were last seen to wait in the pipe

    def decide(self, request: Request, identity: str, view: View, now: Now) -> Decision:
        """What to do about a request; nothing is changed yet. Raises Rejected."""
        because = f": {printable(request.reason, 800)}" if request.reason else ""
        if request.action != "announce" and not request.dry_run and not view.fresh(now):
            raise controller_away("no heartbeat in the published state")
        if request.prefix is None:
            return Decision("withdraw-all", {"status": "ok"}, f"WEBHOOK WITHDRAW-ALL{because}")
        prefix = request.prefix.text
        answer: dict[str, Any] = {"status": "ok", "prefix": prefix}
        if request.action == "withdraw":
            return Decision(f"withdraw {prefix}", answer, f"WEBHOOK WITHDRAW {prefix}{because}")
        limits = self.settings.webhook
        length = limits.withdraw_after if request.withdraw_after is None else request.withdraw_after
        if not 1 <= length <= limits.max_withdraw_after:
            raise Rejected(400, f"withdraw_after: must be from 1 to {limits.max_withdraw_after} seconds")
        own = self.orders.get(prefix)
        charged = own.action == "withdraw" if own else prefix not in view.mirror.routes
        self.check_guards(request.prefix, charged, view, now)
        if charged:
            self.check_rate(prefix, now)
        line = f"announce {prefix} until={now.wall + length:.3f} id={identity} source=webhook"
        line += f" reason={urllib.parse.quote(request.reason, safe='')}" if request.reason else ""
        answer["withdraw_after"] = length
        answer |= view.warning(prefix)
        log = f"WEBHOOK ANNOUNCE {prefix} (auto-withdraw in {length}s){because}"
        return Decision(line, answer, log, identity, length, charged)

    def order(self, prefix: str, action: str, identity: str, line: str, now: Now) -> Order:
        return Order(prefix, action, identity, line, now.wall, again_at=now.mono + CONFIRM)

    def check_guards(self, prefix: Prefix, new: bool, view: View, now: Now) -> None:
        """The controller's own guards, so that nothing is accepted here that it refuses. Raises Rejected."""
        shown = prefix.address if prefix.host else prefix.text
        if view.fresh(now):
            refusal = view.mirror.refusal(prefix, not new)
        else:
            refusal = check_prefix(prefix, self.settings.safety, view.mirror.routers)
            if refusal is None:
                raise controller_away("no heartbeat in the published state")
        if refusal is None and new and len(view.ours) >= self.settings.webhook.max_routes:
            refusal = Refusal("max_routes", f"{len(view.ours)} routes of this receiver are held")
        if refusal is None:
            return
        status, error = REFUSALS.get(refusal.guard, (403, "Prefix too short"))
        what = f"BLOCKED whitelisted IP {shown}" if refusal.guard == "whitelist" else f"BLOCKED {shown}"
        raise Rejected(status, error, f"{what}: {refusal.guard}: {refusal.why}")

    def check_rate(self, prefix: str, now: Now) -> None:
        limit = self.settings.webhook.max_announcements_per_minute
        while self.accepted and self.accepted[0] <= now.mono - WINDOW:
            self.accepted.popleft()
        if len(self.accepted) >= limit:
            wait = self.accepted[-limit] + WINDOW - now.mono if limit else WINDOW
            raise Rejected(429, "Rate limit exceeded", f"RATE LIMITED announcement for {prefix}", wait)

    def commit(self, decision: Decision, request: Request, view: View, now: Now) -> list[Order]:
        """Record what a decision changes, once its line is in the pipe; returns the orders, which are to be kept."""
        if request.prefix is None:
            held = {**dict.fromkeys(view.mirror.routes), **self.orders}
            orders = [self.order(prefix, "withdraw", "", f"withdraw {prefix}", now) for prefix in held]
        else:
            order = self.order(request.prefix.text, request.action, decision.id, decision.line, now)
            if request.action == "announce":
                length = decision.length
                order = order._replace(length=length, until=now.wall + length, due=now.mono + length)
                view.expect(order)
            orders = [order]
        for order in orders:
            self.orders[order.prefix] = order
        if decision.charged:
            self.accepted.append(now.mono)
        return orders

    # -- orders, until they are done

    def review(self, view: View, now: Now) -> tuple[list[str], list[str]]:
        """Compare the orders with the published state; returns records for the disk and messages for the log."""
        records, messages = [], []
        for prefix, order in list(self.orders.items()):
            if order.sent_at > now.wall:  # the clock was set back
                order = self.orders[prefix] = order._replace(sent_at=now.wall - 0.2)
            fate = fate_of(order, view.routes.get(prefix), view) if view.fresh(now) else "open"
            if fate == "shown" and not order.shown:
                self.orders[prefix] = order._replace(shown=True)
                records.append(json.dumps({"shown": prefix}))
            elif fate not in ("shown", "open") and self.seen(order, view, now):
                del self.orders[prefix]
                records.append(json.dumps({"over": prefix}))
                if fate == "refused":
                    messages.append(f"ERROR: the controller refused to announce {prefix}: see its log")
        return records, messages

    def overdue(self, view: View, now: Now) -> list[Order]:
        """The orders whose lines are to be written now: ends that have come, and lines that were lost."""
        found = []
        for order in self.orders.values():
            if order.action == "announce" and now.mono >= order.due:
                end = self.order(order.prefix, "withdraw", order.id, f"withdraw {order.prefix} id={order.id}", now)
                found.append(end._replace(length=order.length))
            elif now.mono >= order.again_at and not order.shown and self.seen(order, view, now):
                found.append(order)
        return found

    def seen(self, order: Order, view: View, now: Now) -> bool:
        """Whether a living controller has published since it got the order, so that what it shows counts.

        While lines wait in the pipe the order's may be among them, and behind it an operator's, which
        a second copy of ours would undo.
        """
        unread_at = self.unread_at if self.unread_at <= now.wall else 0.0  # the clock was set back
        got = max(order.sent_at + 0.2, unread_at + TICK + 0.2)
        return view.fresh(now) and view.heartbeat >= got

    def next_due(self) -> float:
        """The monotonic time of the next end."""
        return min((order.due for order in self.orders.values()), default=math.inf)


REFUSALS = {
    "whitelist": (403, "IP is whitelisted"),
    "allowed": (403, "Not in allowed prefixes"),
    "max_routes": (409, "Route limit reached"),
    "static": (409, "Announced by exabgp.conf already"),
    "next_hop_ipv6": (409, "No IPv6 next hop is set: see next_hop_ipv6 in [bgp]"),
}


def controller_away(why: str) -> Rejected:
    return Rejected(503, "The controller cannot take commands now", f"ERROR: controller away: {why}", RETRY)


def fate_of(order: Order, route: dict[str, Any] | None, view: View) -> str:
    """What a published state says of an order: shown, open, done, refused or overtaken by another's command."""
    if order.action == "announce":
        if order.id in view.refused_ids:
            return "refused"
        if route is None:  # never held, so the line was lost; or held and ended by someone
            return "done" if order.shown or order.id in view.ended_ids else "open"
        if route["id"] == order.id:
            return "shown"
        if order.shown or route["until"] is None or route["announced_at"] > order.sent_at:
            return "overtaken"
        return "open"
    if route is None or route["source"] == "other":
        return "done"
    overtaken = route["id"] != order.id if order.id else route["announced_at"] > order.sent_at
    return "overtaken" if overtaken else "open"


def delivery(order: Order, view: View) -> tuple[bool, dict[str, str]]:
    """Whether every router with a session was told of the order, and what each was."""
    route = view.routes.get(order.prefix)
    states = {address: str(neighbor["state"]) for address, neighbor in view.neighbors.items()}
    if order.action == "announce":
        here = route is not None and (route["id"] == order.id or route["until"] is None)
    else:
        gone = route is None or route["source"] == "other"
        here = gone and order.prefix not in view.withdrawing and view.heartbeat >= order.sent_at
        route = None
    told = {address: "pending" if state == "up" else state for address, state in states.items()}
    if here:
        told = {a: "advertised" if state == "up" else state for a, state in states.items()}
        told.update(route["neighbors"] if route else {})
    up = [told[address] for address, state in states.items() if state == "up"]
    return bool(up) and all(status == "advertised" for status in up), told


# ---------------------------------------------------------------- the pipe


class Pipe:
    """Writes whole lines to the controller's FIFO and never waits.

    The descriptor stays open: what a dying controller has not read then waits for the next one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = -1
        self.identity = (0, 0)  # device and inode of the descriptor

    def write(self, line: str) -> None:
        """Write one line, of at most PIPE_BUF bytes, whole. Raises OSError when the controller can't take it."""
        if self.descriptor < 0:
            self.open()
        data = f"{line}\n".encode("ascii")
        if os.write(self.descriptor, data) != len(data):
            raise OSError("the line was cut")
        os.sched_yield()  # Linux wakes a pipe's reader on the writer's processor, where it would wait for us

    def open(self) -> None:
        """Raises OSError; ENXIO: nobody reads it."""
        found = os.stat(self.path)
        if not stat.S_ISFIFO(found.st_mode):
            raise OSError(f"{self.path} is not a FIFO")
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        self.identity = (found.st_dev, found.st_ino)

    def unread(self) -> int:
        """The bytes that the controller has not read yet, whoever wrote them."""
        if self.descriptor < 0:
            try:
                self.open()
            except OSError:
                return 0
        return int.from_bytes(fcntl.ioctl(self.descriptor, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)

    def look(self) -> None:
        """Let go of a FIFO in whose place another has come; the controller reads the old one to its end."""
        if self.descriptor >= 0:
            try:
                found = os.stat(self.path)
                replaced = (found.st_dev, found.st_ino) != self.identity
            except OSError:
                replaced = True
            if replaced:
                os.close(self.descriptor)
                self.descriptor = -1


# ---------------------------------------------------------------- HTTP/1.1 (RFC 9112)


class HttpRequest(NamedTuple):
    """One request; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    keep_alive: bool


REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~]{1,8192}) HTTP/([0-9])\.([0-9])")
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}):[ \t]*([ \t!-~\x80-\xff]*)")
HEAD_END = re.compile(rb"\r?\n\r?\n")
ONCE = ("content-length", "host", "x-auth-token")  # two of one: someone between us may read it the other way


class RequestReader:
    """Cuts a byte stream into requests, whatever the pieces it comes in. No I/O."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.head: HttpRequest | None = None  # read, its body is to come
        self.length = 0
        self.wants_continue = False  # the client waits for `100 Continue` before it sends the body

    def feed(self, data: bytes) -> None:
        self.buffer += data

    def pending(self) -> bool:
        """Whether some of a request has come."""
        return bool(self.buffer) or self.head is not None

    def next(self) -> HttpRequest | None:
        """The next whole request. Raises Rejected, and then nothing after it can be understood."""
        self.head = self.head or self.read_head()
        if self.head is None or len(self.buffer) < self.length:
            return None
        body = bytes(self.buffer[: self.length])
        del self.buffer[: self.length]
        request, self.head, self.wants_continue = self.head._replace(body=body), None, False
        return request

    def read_head(self) -> HttpRequest | None:
        if self.buffer.startswith(b"\r\n"):  # one empty line before a request is to be ignored
            del self.buffer[:2]
        end = HEAD_END.search(self.buffer)
        if end is None or end.end() > HEAD_MAX:
            if len(self.buffer) > HEAD_MAX:
                what = (431, "headers") if b"\n" in self.buffer[:HEAD_MAX] else (414, "path")
                raise Rejected(what[0], f"{what[1]}: longer than {HEAD_MAX} bytes")
            return None
        first, *lines = self.buffer[: end.start()].decode("latin-1").split("\n")
        del self.buffer[: end.end()]
        asked = REQUEST_LINE.fullmatch(first.rstrip("\r"))
        if asked is None:
            raise Rejected(400, "request line: must be METHOD PATH HTTP/1.1")
        if asked[3] != "1":
            raise Rejected(505, "request line: only HTTP/1.1 is spoken here")
        headers: dict[str, str] = {}
        for line in lines:
            found = HEADER.fullmatch(line.rstrip("\r"))
            if found is None:
                raise Rejected(400, "headers: each must be NAME: VALUE on a line of its own")
            name = found[1].lower()
            if name in headers and name in ONCE:
                raise Rejected(400, f"{found[1]}: must be given once")
            headers[name] = found[2].strip()
        self.length = body_length(asked[1], headers)
        self.wants_continue = headers.get("expect", "").lower() == "100-continue" and self.length > len(self.buffer)
        connection = [word.strip() for word in headers.get("connection", "").lower().split(",")]
        keep_alive = "close" not in connection and (asked[4] != "0" or "keep-alive" in connection)
        return HttpRequest(asked[1], asked[2].partition("?")[0], headers, b"", keep_alive)


def body_length(method: str, headers: dict[str, str]) -> int:
    """The declared length of the body in bytes, up to BODY_MAX. Raises Rejected."""
    length = headers.get("content-length")
    if "transfer-encoding" in headers or (length is None and method == "POST"):
        raise Rejected(411, "Content-Length: is needed")
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit()):
        raise Rejected(400, "Content-Length: must be one whole number")
    if len(length) > 9 or int(length) > BODY_MAX:
        raise Rejected(413, f"body: longer than {BODY_MAX} bytes")
    return int(length)


class Answer(NamedTuple):
    """What a client gets: JSON, or text as it is; `retry_after` in seconds."""

    status: int
    content: dict[str, Any] | str
    retry_after: float = 0.0


def render_answer(answer: Answer, method: str, keep_alive: bool) -> bytes:
    """The bytes of an answer."""
    if isinstance(answer.content, str):
        body, kind = answer.content.encode("ascii"), "text/plain; version=0.0.4"
    else:
        tight = (",", ":") if "error" in answer.content else None
        body, kind = json.dumps(answer.content, separators=tight).encode("ascii"), "application/json"
    try:
        phrase = http.HTTPStatus(answer.status).phrase
    except ValueError:
        phrase = ""
    lines = [
        f"HTTP/1.1 {answer.status} {phrase}",
        f"Date: {http_date(int(time.time()))}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
    ]
    lines += [f"Retry-After: {math.ceil(answer.retry_after)}"] if answer.retry_after else []
    lines += ["Allow: POST, GET, HEAD"] if answer.status == 405 else []
    lines += [] if keep_alive else ["Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + (b"" if method == "HEAD" else body)


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


class Connection:
    """One client: bytes in, requests one after another, answers out. Its socket never blocks."""

    def __init__(self, service: Service, client: socket.socket, peer: str) -> None:
        self.service, self.socket, self.peer = service, client, peer
        self.reader = RequestReader()
        self.request: HttpRequest | None = None  # being answered
        self.out = b""  # of answers, what the client has not taken yet
        self.closing = self.ended = False  # ended: the client has said all
        self.since = time.monotonic()  # when it began to keep us waiting
        self.events = 0  # that the loop waits for
        self.handshake_writes = False  # TLS cannot go on before it has written

    def ready(self) -> None:
        """The client has sent something, has gone, or takes more of its answer."""
        try:
            if self.out:
                self.flush()
            data = None if self.out or self.ended else self.receive()
        except OSError:
            self.drop()
            return
        if data == b"":
            self.ended = True  # it may still listen
        elif data and not self.closing:
            if not self.reader.pending():
                self.since = time.monotonic()
            self.reader.feed(data)
        if self.ended and not self.out and (self.closing or not (self.request or self.reader.pending())):
            self.drop()
            return
        self.advance()
        self.watch()

    def receive(self) -> bytes | None:
        """What has come; None when nothing has, nothing in it when the client has said all. Raises OSError."""
        self.handshake_writes = False
        try:
            data = self.socket.recv(READ_SIZE)
            while isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
                data += self.socket.recv(READ_SIZE)
            return data
        except ssl.SSLWantWriteError:
            self.handshake_writes = True
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        return None

    def watch(self) -> None:
        """Wait for what may come next; one that sends faster than it is answered is not read meanwhile."""
        behind = self.request is not None and len(self.reader.buffer) > HEAD_MAX + BODY_MAX
        events = 0 if self.ended or self.out or behind else select.POLLIN
        events |= select.POLLOUT if self.out or self.handshake_writes else 0
        if events == self.events or self not in self.service.connections:
            return
        self.events = events
        if events:
            self.service.watch(self.socket.fileno(), self.ready, events)
        else:
            self.service.unwatch(self.socket.fileno())

    def advance(self) -> None:
        """Serve the requests that are here, up to one whose answer takes a while, or is not taken."""
        while self.request is None and not self.closing and not self.out:
            if not self.reader.pending():
                if self.ended:
                    self.close()
                return
            try:
                self.request = self.reader.next()
                if self.request is None:
                    if self.reader.wants_continue:
                        self.reader.wants_continue = False
                        self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    if not self.ended:
                        return
                    raise Rejected(400, "body: shorter than Content-Length, or the headers were cut")
                answer = self.service.serve(self.request, self)
            except Rejected as rejected:
                if rejected.log:
                    self.service.say(rejected.log)
                answer = Answer(rejected.status, {"error": rejected.error}, rejected.retry_after)
            except Exception as error:  # a fault of ours: this request alone fails, the timers go on
                where = traceback.extract_tb(error.__traceback__)[-1]
                self.service.say(
                    f"ERROR: a request of {self.peer} failed, please report it: "
                    f"{type(error).__name__} at {os.path.basename(where.filename)}:{where.lineno}: {error}"
                )
                answer = Answer(500, {"error": "The receiver made a mistake; its log says which"})
            if answer:
                self.send(answer)

    def respond(self, answer: Answer) -> None:
        """The answer to a request that had to wait."""
        self.send(answer)
        self.advance()
        self.watch()

    def send(self, answer: Answer) -> None:
        method = self.request.method if self.request else ""
        keep_alive = self.request is not None and self.request.keep_alive and not self.service.stopping
        self.service.counts[answer.status] += 1
        self.request, self.since = None, time.monotonic()
        if self.closing:
            return
        self.write(render_answer(answer, method, keep_alive))
        if not keep_alive:
            self.close()

    def write(self, data: bytes) -> None:
        self.out += data
        self.flush()

    def flush(self) -> None:
        try:
            self.out = self.out[self.socket.send(self.out) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError:
            self.drop()
        if self.closing and not self.out:
            self.close()

    def close(self) -> None:
        """End it so that the answer arrives: what the client still sends is read for a moment."""
        self.closing = True
        if self.out:
            return
        try:
            if isinstance(self.socket, ssl.SSLSocket):
                with contextlib.suppress(ssl.SSLError, ValueError):
                    self.socket.unwrap()  # says goodbye, does not wait for the client's
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:  # it has gone already
            self.drop()
        if self.ended:
            self.drop()

    def drop(self) -> None:
        """Forget it."""
        self.closing, self.out = True, b""
        if self in self.service.connections:
            self.service.connections.discard(self)
            self.service.unwatch(self.socket.fileno())
            self.socket.close()

    def check_time(self, now: float) -> None:
        """End it when it keeps us waiting too long."""
        waits = now - self.since
        if self.closing or self.out:
            if waits > (REQUEST_TIMEOUT if self.out else LINGER):
                self.drop()  # does not read its answer
        elif self.request is None and self.reader.pending() and waits > REQUEST_TIMEOUT:
            self.respond(Answer(408, {"error": f"request: not complete after {REQUEST_TIMEOUT:.0f} seconds"}))
        elif self.request is None and waits > (REQUEST_TIMEOUT if self.handshaking() else IDLE_TIMEOUT):
            self.drop()

    def handshaking(self) -> bool:
        return isinstance(self.socket, ssl.SSLSocket) and self.socket.version() is None


# ---------------------------------------------------------------- the service


class Waiting(NamedTuple):
    """An answer that is held back: until the disk has its timer, and as long as the client wants to wait."""

    connection: Connection
    orders: list[Order]
    answer: dict[str, Any]
    request: int  # of the journal
    patience: float  # monotonic: to wait for the disk
    until: float  # monotonic: to wait for the routers; 0: not at all


class Service(Watch):
    """The desk, the pipe, the orders' file and the clients, all in one thread: no step of it is ever half done."""

    def __init__(self, settings: Settings, log: Logger, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        super().__init__()
        self.settings, self.log, self.listener, self.tls = settings, log, listener, tls
        self.desk = Desk(settings)
        self.pipe = Pipe(settings.paths.fifo)
        self.view = View(settings, {})
        self.looked_at: tuple[int, ...] = ()
        self.connections: set[Connection] = set()
        self.waiting: list[Waiting] = []
        self.counts: Counter[int] = Counter()  # answers by status
        self.auth_failures = self.announced = 0
        self.durable = 0
        self.stopping = False
        self.stop_at = math.inf  # monotonic: the last moment for an answer, when it is to stop
        self.tick_at = self.say_at = 0.0  # monotonic
        self.messages: list[str] = []
        self.pipe_trouble = ""
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)
        path = os.path.join(settings.paths.state_dir, "webhook-orders")
        self.file = JournalFile(path, log, self.durable_up_to)
        now = self.now()
        self.desk.orders = read_orders(self.file.read(), now)
        self.file.rewrite([order.record() for order in self.desk.orders.values()])
        if self.desk.orders:
            log(f"Took up {len(self.desk.orders)} orders of before")

    def now(self) -> Now:
        return Now(time.time(), time.monotonic())

    def say(self, message: str) -> None:
        """For the log, a moment later: ExaBGP and the client have the processor first."""
        if not self.messages:
            self.say_at = time.monotonic() + SAY_PAUSE
        self.messages.append(message)

    # -- the loop

    def run(self, config: str | None) -> None:
        """Serve until a signal, and let the clients that wait have their answers."""
        signal.set_wakeup_fd(self.wake_write)  # the handlers do nothing: the loop reads the numbers
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self.watch(self.wake_read, lambda: self.wake(config))
        self.watch(self.listener.fileno(), self.accept)
        while not self.stopping or (self.unanswered() and time.monotonic() < self.stop_at):
            now = time.monotonic()
            if now >= self.tick_at:
                self.tick()
            if self.messages and now >= self.say_at:
                self.write_log()
            due = min(self.tick_at, self.say_at if self.messages else math.inf)
            if self.waiting:
                if any(held.until for held in self.waiting):  # for the routers: look often
                    self.look()
                    due = min(due, now + 0.01)
                while self.settle():
                    pass
            self.wait(max(0.0, due - time.monotonic()))
        self.write_log()
        for connection in list(self.connections):
            connection.drop()

    def unanswered(self) -> bool:
        return bool(self.waiting) or any(connection.out for connection in self.connections)

    def wake(self, config: str | None) -> None:
        """A signal has come, or (0) the disk has what was appended."""
        for number in os.read(self.wake_read, 64):
            if number == signal.SIGHUP:
                self.reload(config)
            elif number:
                self.stop()

    def accept(self) -> None:
        """Take a client; above CLIENTS_MAX the one that has kept us waiting longest goes."""
        if len(self.connections) >= CLIENTS_MAX:
            idle = [one for one in self.connections if one.request is None]
            if idle:
                min(idle, key=lambda one: one.since).drop()
        try:
            client, address = self.listener.accept()
            client.setblocking(False)
            if self.tls:
                client = self.tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        except OSError as error:  # most often it has gone again
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.say(f"ERROR: cannot take a client: {error.strerror}")
                self.unwatch(self.listener.fileno())  # until the next tick
            return
        connection = Connection(self, client, str(address[0]))
        self.connections.add(connection)
        connection.ready()  # its request is often here already

    def write_log(self) -> None:
        for message in self.messages:
            self.log(message)
        self.messages.clear()

    # -- requests

    def serve(self, request: HttpRequest, connection: Connection) -> Answer | None:
        """The answer to a request; None when it comes later. Raises Rejected."""
        if request.method == "POST":
            return self.post(request, connection)
        if request.method not in ("GET", "HEAD"):
            raise Rejected(405, "Method not allowed")
        if request.path == "/status":
            self.check_token(request, connection)
            return Answer(200, self.status())
        if request.path == "/health":
            why = self.ailment()
            return Answer(503, {"error": why}, RETRY) if why else Answer(200, {"status": "ok"})
        if request.path == "/metrics":
            return Answer(200, self.metrics())
        raise Rejected(404, "Nothing here: POST announces and withdraws; GET /status, /health or /metrics")

    def check_token(self, request: HttpRequest, connection: Connection) -> None:
        given = request.headers.get("x-auth-token", "").encode("latin-1")
        if not hmac.compare_digest(given, self.settings.webhook.token.encode()):
            self.auth_failures += 1
            raise Rejected(403, "Wrong or missing token in X-Auth-Token", f"AUTH FAILED from {connection.peer}")

    def post(self, http_request: HttpRequest, connection: Connection) -> Answer | None:
        self.check_token(http_request, connection)
        request = parse_body(http_request.body)
        now = self.now()
        if not self.view.fresh(now):
            self.look()
        decision = self.desk.decide(request, os.urandom(8).hex(), self.view, now)
        if request.dry_run:
            return Answer(200, decision.answer | {"status": "dry-run", "command": self.dry_run(request)})
        try:
            self.pipe.write(decision.line)
        except OSError as error:
            raise controller_away(f"cannot write to {self.pipe.path}: {error.strerror or error}") from None
        orders = self.desk.commit(decision, request, self.view, now)
        self.file.append([order.record() for order in orders])
        number = self.file.synchronize()
        self.announced += decision.charged
        self.log(decision.log)
        until = now.mono + request.wait if request.wait else 0.0
        patience = now.mono + DURABLE_MAX
        self.waiting.append(Waiting(connection, orders, decision.answer, number, patience, until))
        if self.file.failed:
            self.durable = number
        return None

    def dry_run(self, request: Request) -> str:
        """The ExaBGP commands that the request would lead to, a line each."""
        mirror = self.view.mirror
        prefixes = list(mirror.routes) if request.prefix is None else [request.prefix.text]
        verb = "announce" if request.action == "announce" else "withdraw"
        for prefix in prefixes:
            attributes = mirror.new_attributes[6 if ":" in prefix else 4]
            if verb == "withdraw" and prefix in mirror.routes:
                attributes = mirror.routes[prefix].attributes
            mirror.tell(verb, prefix, attributes)
        commands = [render([command]) for command in mirror.effects.commands]
        mirror.effects.commands.clear()
        return "\n".join(commands)

    # -- answers that wait

    def durable_up_to(self, request: int) -> None:
        """Called in the file's thread."""
        self.durable = request
        with contextlib.suppress(BlockingIOError):  # full: the loop is about to look anyhow
            os.write(self.wake_write, b"\0")

    def settle(self) -> bool:
        """Give the answers that need wait no longer; whether there was any."""
        now = time.monotonic()
        waiting, self.waiting = self.waiting, []
        answered = False
        for held in waiting:
            answer = held.answer
            if held.request > self.durable and now < held.patience:
                self.waiting.append(held)
                continue
            if self.file.check() or held.request > self.durable:
                answer.setdefault("warning", "the timer could not be written to disk")
            if held.until:
                delivered, told = self.delivered(held)
                if not delivered and now < held.until and self.view.any_up() and not self.stopping:
                    self.waiting.append(held)
                    continue
                answer = answer | {"delivered": delivered, "neighbors": told}
            held.connection.respond(Answer(200, answer))
            answered = True
        return answered

    def delivered(self, held: Waiting) -> tuple[bool, dict[str, str]]:
        """Whether every router with a session was told of all of it, and what each was (of the last)."""
        done = self.view.any_up()
        told: dict[str, str] = {}
        for order in held.orders:
            delivered, told = delivery(order, self.view)
            done = done and delivered
        return done, told

    # -- the state, the orders, the clock

    def look(self) -> None:
        """Read the published state when it has changed."""
        try:
            found = os.stat(self.settings.paths.state_file)
            identity = (found.st_mtime_ns, found.st_ino, found.st_size)
            if identity == self.looked_at:
                return
            with open(self.settings.paths.state_file, encoding="utf-8") as file:
                view = View(self.settings, json.load(file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # what was read before grows old by itself
        self.looked_at, self.view = identity, view
        for order in self.desk.orders.values():
            if order.action == "announce" and not order.shown:
                view.expect(order)

    def tick(self) -> None:
        """What time and the published state make necessary; again at the next end, or soon."""
        self.look()
        self.pipe.look()
        if self.pipe.unread():
            self.desk.unread_at = time.time()
        self.work(self.now())
        self.tick_at = time.monotonic() + min(TICK, max(0.005, self.desk.next_due() - time.monotonic()))

    def work(self, now: Now) -> None:
        records, messages = self.desk.review(self.view, now)
        for message in messages:
            self.log(message)
        for order in self.desk.overdue(self.view, now):
            records += self.write(order, now)
        if records:
            self.file.append(records)
            self.file.synchronize()
        if self.file.full():
            self.file.rewrite([order.record() for order in self.desk.orders.values()])
        for connection in list(self.connections):
            connection.check_time(now.mono)
        if not self.stopping:
            self.watch(self.listener.fileno(), self.accept)
        notify.watchdog(now.mono)

    def write(self, order: Order, now: Now) -> list[str]:
        """Write an order's line: a blackhole's end, or what was lost. Returns the records for the disk."""
        before = self.desk.orders[order.prefix]
        try:
            self.pipe.write(order.line)
        except OSError as error:
            trouble = f"ERROR: cannot write to {self.pipe.path}, trying until it works: {error.strerror or error}"
            if trouble != self.pipe_trouble:
                self.log(trouble)
            self.pipe_trouble = trouble
            due = before.due if before.line == order.line else now.mono + RETRY
            self.desk.orders[order.prefix] = before._replace(due=due, again_at=now.mono + RETRY)
            return []
        self.pipe_trouble = ""
        if before.line == order.line:
            self.log(f"SENT AGAIN {order.action} {order.prefix}: the controller does not show it")
        else:
            self.log(f"AUTO-WITHDRAW {order.prefix} after {order.length}s timeout")
        self.desk.orders[order.prefix] = order._replace(again_at=now.mono + CONFIRM)
        return [order.record()]

    # -- GET

    def status(self) -> dict[str, Any]:
        limits, safety = self.settings.webhook, self.settings.safety
        routes = [
            {
                "prefix": prefix,
                "announced_at": moment(route["announced_at"]),
                "expires_at": moment(route["until"]),
                "source": source_of(route),
                "reason": route["reason"],
                "neighbors": route["neighbors"],
            }
            for prefix, route in self.view.routes.items()
        ]
        return {
            "controller": "running" if self.view.fresh(self.now()) else "away",
            "heartbeat": moment(self.view.heartbeat or None),
            "neighbors": {
                address: {"state": n["state"], "since": moment(n["since"])}
                for address, n in self.view.neighbors.items()
            },
            "routes": routes,
            "limits": {
                "max_routes": safety.max_routes,
                "webhook_max_routes": limits.max_routes,
                "max_announcements_per_minute": limits.max_announcements_per_minute,
            },
        }

    def ailment(self) -> str:
        """Why a blackhole would not reach a router now; empty when it would."""
        if not self.view.fresh(self.now()):
            return "The controller is away: its last heartbeat is old or missing"
        return "" if self.view.any_up() else "No BGP session is up"

    def metrics(self) -> str:
        """Prometheus text format 0.0.4; no prefix in it."""
        up = sum(n["state"] == "up" for n in self.view.neighbors.values())
        routes = dict.fromkeys(("pipe", "webhook", "other"), 0)
        for route in self.view.routes.values():
            routes[source_of(route)] += 1
        figures: list[tuple[str, str, str, dict[str, float]]] = [
            ("controller_up", "gauge", "1 while its heartbeat is fresh", {"": int(self.view.fresh(self.now()))}),
            ("heartbeat_timestamp_seconds", "gauge", "The controller's last heartbeat", {"": self.view.heartbeat}),
            ("neighbors", "gauge", "BGP neighbors", label("state", {"up": up, "down": len(self.view.neighbors) - up})),
            ("routes", "gauge", "Blackholes held", label("source", routes)),
            ("route_limit", "gauge", "Blackholes that may be held", {"": self.settings.safety.max_routes}),
            ("open_orders", "gauge", "Announces and withdraws not yet over", {"": len(self.desk.orders)}),
            ("clients", "gauge", "Connections open", {"": len(self.connections)}),
            ("announcements_total", "counter", "Announcements accepted, without renewals", {"": self.announced}),
            ("auth_failures_total", "counter", "Requests with a wrong or no token", {"": self.auth_failures}),
            ("http_answers_total", "counter", "HTTP answers", label("code", self.counts)),
        ]
        lines = []
        for name, kind, meaning, samples in figures:
            lines += [f"# HELP rtbh_{name} {meaning}", f"# TYPE rtbh_{name} {kind}"]
            lines += [f"rtbh_{name}{labels} {value}" for labels, value in samples.items()]
        return "\n".join([*lines, ""])

    # -- life

    def reload(self, config: str | None) -> None:
        try:
            settings, warnings = load_webhook_settings(config)
        except SettingsError as error:
            self.log(f"ERROR: settings not reloaded, the old ones stay: {error}")
            notify(f"STATUS=settings not reloaded: {error}")
            return
        notify("STATUS=")
        settings = dataclasses.replace(settings, paths=self.settings.paths)
        self.settings = self.desk.settings = settings
        self.looked_at = ()  # the guards of the view are made anew
        self.look()
        self.log("Settings reloaded (listen, paths and TLS change at the next start)")
        for warning in warnings:
            self.log(f"WARNING: {warning}")

    def stop(self) -> None:
        """Take no more clients; those who wait have their answers, for a moment."""
        self.stopping, self.stop_at = True, time.monotonic() + DRAIN
        notify("STOPPING=1")
        self.unwatch(self.listener.fileno())
        self.listener.close()


def label(name: str, samples: Mapping[Any, float]) -> dict[str, float]:
    return {f'{{{name}="{key}"}}': value for key, value in samples.items()}


def source_of(route: dict[str, Any]) -> str:
    """Where a route came from: webhook, other (exabgp.conf) or pipe, whatever its writer calls itself."""
    return str(route["source"]) if route["source"] in ("webhook", "other") else "pipe"


def moment(seconds: float | None) -> str | None:
    """Seconds since the epoch as RFC 3339 in UTC; None stays None."""
    if seconds is None:
        return None
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


class Notify:
    """sd_notify(3): tells systemd how we are, when it asks."""

    def __init__(self) -> None:
        self.address = os.environ.get("NOTIFY_SOCKET", "")
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        limit = os.environ.get("WATCHDOG_USEC", "") if mine else ""
        self.pause = int(limit) / 3e6 if limit.isdigit() else math.inf  # seconds: a third of what it allows
        self.last = -math.inf

    def __call__(self, message: str) -> None:
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.setblocking(False)
            to.sendto(message.encode(), address)

    def watchdog(self, now: float) -> None:
        if now - self.last >= self.pause:
            self.last = now
            self("WATCHDOG=1")


notify = Notify()

# ---------------------------------------------------------------- commands


def load_tls(settings: Settings) -> ssl.SSLContext | None:
    """The server's TLS context, None without a certificate. Raises OSError when the files can't be used."""
    if not settings.webhook.tls_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.webhook.tls_certificate, settings.webhook.tls_key)
    return context


def load_webhook_settings(path: str | None, needs_token: bool = True) -> tuple[Settings, list[str]]:
    """The settings with the token read from its file. Raises SettingsError, too when no token is usable.

    Without token and token_file the systemd credential `rtbh-token` is taken, when there is one;
    without `needs_token` there may be none.
    """
    settings, warnings = load_settings(path)
    webhook = settings.webhook
    token_file = webhook.token_file
    if not webhook.token and not token_file and os.environ.get("CREDENTIALS_DIRECTORY"):
        credential = os.path.join(os.environ["CREDENTIALS_DIRECTORY"], "rtbh-token")
        token_file = credential if os.path.exists(credential) else ""
    if token_file:
        try:
            with open(token_file, encoding="ascii") as file:
                token = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError([f"[webhook] token_file: {error}"]) from None
        if not re.fullmatch("[!-~]{1,512}", token):
            raise SettingsError([f"[webhook] token_file: {token_file} must hold one line of printable ASCII"])
        webhook = dataclasses.replace(webhook, token=token)
    if not webhook.token and needs_token:
        raise SettingsError(["[webhook] token: no token is set; set token or token_file"])
    if webhook.token == PLACEHOLDER_TOKEN:
        if not ipaddress.ip_address(webhook.listen[0]).is_loopback:
            raise SettingsError(
                ["[webhook] token: is still the placeholder; set a secret one to listen beyond loopback"]
            )
        warnings.append("[webhook] token is still the placeholder: everyone knows it")
    return dataclasses.replace(settings, webhook=webhook), warnings


def lock_state(directory: str) -> int:
    """The descriptor of the lock on the orders' file, which must have one writer; -1 when the disk is at fault.

    Raises BlockingIOError while another receiver holds it.
    """
    try:
        lock = os.open(os.path.join(directory, "webhook-lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError:
        return -1  # the log says so when the orders can't be written
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def serve(settings: Settings, config: str | None, warnings: list[str], log: Logger) -> int:
    """Serve until a signal; returns the exit code."""
    host, port = settings.webhook.listen
    try:
        tls = load_tls(settings)
    except OSError as error:
        print(f"rtbh-webhook: [webhook] tls_certificate, tls_key: {error}", file=sys.stderr)
        return os.EX_CONFIG
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        print(f"rtbh-webhook: [webhook] cannot listen on {host}:{port}: {error.strerror or error}", file=sys.stderr)
        return 1
    try:
        lock = lock_state(settings.paths.state_dir)
    except BlockingIOError:
        print(f"rtbh-webhook: [paths] another receiver uses {settings.paths.state_dir}", file=sys.stderr)
        return 1
    listener.setblocking(False)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its clients' sockets inherit it
    service = Service(settings, log, listener, tls)
    for warning in warnings:
        log(f"WARNING: {warning}")
    port = listener.getsockname()[1]
    log(f"Webhook receiver listening on port {port}")
    print(f"Listening on {f'[{host}]' if ':' in host else host}:{port}", flush=True)
    notify("READY=1")
    service.run(config)
    log("Webhook receiver stopped")
    if lock >= 0:
        os.close(lock)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="rtbh-webhook", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="PATH", help=f"settings (default: $RTBH_CONFIG, else {DEFAULT_CONFIG})")
    parser.add_argument("--check", action="store_true", help="validate the settings, print what is in force, exit")
    parser.add_argument("--reload", metavar="PID", type=int, help="validate, then have that receiver reread them, exit")
    options = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the loop is there
    try:
        # systemd passes the token to the service alone, not to a command that reloads it
        settings, warnings = load_webhook_settings(options.config, needs_token=options.reload is None)
    except SettingsError as error:
        print(f"rtbh-webhook: {error}", file=sys.stderr)
        return os.EX_CONFIG  # its unit does not try again
    if options.reload is not None:
        os.kill(options.reload, signal.SIGHUP)
        return 0
    if options.check:
        print(describe_settings(settings))
        print("".join(f"warning: {warning}\n" for warning in warnings), end="", file=sys.stderr)
        return 0
    log = Logger(settings.paths.webhook_log)
    try:
        return serve(settings, options.config, warnings, log)
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main())
