#!/usr/bin/env python3
"""RTBH controller: turns lines from a named pipe into ExaBGP announcements of blackholes.

ExaBGP runs it as its API process (text encoder): commands leave on stdout, answers and session
events come in on stdin. People and programs write one command a line into the pipe:

    announce 192.0.2.100/32       blackhole the prefix
    withdraw 192.0.2.100/32       end it
    withdraw-all                  end every blackhole

Words of the form key=value may follow a prefix: until=EPOCH (the end of the blackhole), id=ID
(a withdraw with an id ends only the announcement of that id), source=WORD, reason=TEXT (values
percent-encoded). Every other word is ignored. Background: RFC 5635, RFC 7999.

Signals: SIGTERM and SIGINT withdraw every route and end the controller; SIGHUP rereads the
settings. End of file on stdin (ExaBGP is gone) ends it too.
Exit codes: 0 a clean end, 1 unusable settings, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import dataclasses
import errno
import fcntl
import ipaddress
import json
import logging
import logging.handlers
import os
import queue
import re
import selectors
import signal
import stat
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Callable, NamedTuple, Union

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

DEFAULT_CONFIG = "/etc/exabgp/rtbh.conf"
PLACEHOLDER_TOKEN = "your-secret-webhook-token"
LINE_MAX = 4096  # bytes; a write of at most PIPE_BUF is atomic (POSIX), so a longer line may be torn
BACKSTOP_GRACE = 10.0  # seconds after a route's end in which its receiver may withdraw it itself
HEARTBEAT = 1.0  # seconds between two publications of an unchanged state
PUBLISH_PAUSE = 0.02  # seconds: the least time between two publications

# ---------------------------------------------------------------- prefixes


def parse_prefix(text: str) -> Network:
    """Read an address (then /32 or /128) or a prefix; only what this returns, printed, goes to ExaBGP.

    Raises ValueError, with a text for a person, for anything else: spaces, scopes (RFC 4007),
    host bits, IPv4-mapped addresses (RFC 4291), which would pass a whitelist of IPv4 networks.
    """
    if not re.fullmatch(r"[0-9A-Fa-f:.]{2,45}(/[0-9]{1,3})?", text):
        raise ValueError(f"not an IPv4 or IPv6 address or prefix: {printable(text, 60)}")
    if re.search(r"(^|[./])0[0-9]+(\.|/|$)", text):  # 010 is 8 to some programs: not left to chance
        raise ValueError(f"not a prefix: leading zeros in {text}")
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"not a prefix: {error}") from None
    if network.version == 6 and network.network_address.ipv4_mapped:
        raise ValueError(f"an IPv4-mapped address: write {network.network_address.ipv4_mapped}")
    return network


def printable(text: str, limit: int = 200) -> str:
    """The text with all that is not printable ASCII escaped, at most `limit` characters: safe in a log line."""
    shown = "".join(c if " " <= c <= "~" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return shown if len(shown) <= limit else shown[:limit] + "..."


# ---------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Paths:
    fifo: str = "/run/exabgp/rtbh.pipe"
    controller_log: str = "/var/log/exabgp/rtbh-controller.log"
    webhook_log: str = "/var/log/exabgp/webhook.log"
    state_dir: str = "/var/lib/exabgp"

    @property
    def state_file(self) -> str:
        """What the controller publishes: JSON, replaced as a whole."""
        return os.path.join(self.state_dir, "state.json")


@dataclasses.dataclass(frozen=True)
class Bgp:
    """Path attributes of a blackhole; the *_ipv6 communities are None where they are as for IPv4."""

    community: tuple[str, ...] = ("65535:666",)
    large_community: tuple[str, ...] = ()
    next_hop: str = "self"
    community_ipv6: tuple[str, ...] | None = None
    large_community_ipv6: tuple[str, ...] | None = None
    next_hop_ipv6: str = "self"

    def attributes(self, version: int) -> str:
        """The attributes as ExaBGP reads them behind a prefix of that IP version."""
        communities, large, next_hop = self.community, self.large_community, self.next_hop
        if version == 6:
            communities = communities if self.community_ipv6 is None else self.community_ipv6
            large = large if self.large_community_ipv6 is None else self.large_community_ipv6
            next_hop = self.next_hop_ipv6
        words = [f"next-hop {next_hop}"]
        words += [f"community [{' '.join(communities)}]"] if communities else []
        words += [f"large-community [{' '.join(large)}]"] if large else []
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Safety:
    whitelist: tuple[Network, ...] = (
        ipaddress.IPv4Network("198.51.100.0/24"),
        ipaddress.IPv4Network("203.0.113.10/32"),
    )
    allowed: tuple[Network, ...] = ()
    min_prefix_length: int = 32
    min_prefix_length_ipv6: int = 128
    max_routes: int = 50
    restore: str = "crash"
    restore_max_age: int = 3600


@dataclasses.dataclass(frozen=True)
class Webhook:
    listen: tuple[str, int] = ("127.0.0.1", 8099)
    token: str = dataclasses.field(default="", repr=False)
    token_file: str = ""
    max_announcements_per_minute: int = 10
    withdraw_after: int = 3600
    max_withdraw_after: int = 604800
    max_routes: int = 40
    tls_certificate: str = ""
    tls_key: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    paths: Paths = Paths()
    bgp: Bgp = Bgp()
    safety: Safety = Safety()
    webhook: Webhook = Webhook()


class SettingsError(Exception):
    """The settings can't be used; one text for each fault, naming section and key."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))


def read_path(text: str) -> str:
    if not text.startswith("/") or not text.isprintable():
        raise ValueError("must be an absolute path")
    return os.path.normpath(text)


def read_communities(text: str, parts: int, limit: int, form: str) -> tuple[str, ...]:
    for word in text.split():
        numbers = word.split(":")
        if len(numbers) != parts or not all(re.fullmatch("[0-9]{1,10}", n) and int(n) <= limit for n in numbers):
            raise ValueError(f"{printable(word)} is not {form}")
    return tuple(":".join(str(int(n)) for n in word.split(":")) for word in text.split())


def read_community(text: str) -> tuple[str, ...]:
    """Communities of RFC 1997."""
    return read_communities(text, 2, 65535, "a community such as 65535:666 (two numbers up to 65535)")


def read_large_community(text: str) -> tuple[str, ...]:
    """Communities of RFC 8092."""
    return read_communities(text, 3, 2**32 - 1, "a large community such as 65001:666:0 (three numbers)")


def read_next_hop(version: int) -> Callable[[str], str]:
    def read(text: str) -> str:
        try:
            prefix = parse_prefix(text) if "/" not in text else None
        except ValueError:
            prefix = None
        if text != "self" and (prefix is None or prefix.version != version):
            raise ValueError(f"must be self or an IPv{version} address")
        return text if prefix is None else str(prefix.network_address)

    return read


def read_networks(text: str) -> tuple[Network, ...]:
    words = [word for line in text.splitlines() for word in line.split("#")[0].replace(",", " ").split()]
    return tuple(parse_prefix(word) for word in words)


def read_number(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return read


def read_restore(text: str) -> str:
    if text not in ("crash", "always", "never"):
        raise ValueError("must be crash, always or never")
    return text


def read_listen(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        raise ValueError("must be ADDRESS:PORT, such as 127.0.0.1:8099 or [::1]:8099") from None
    return str(address), read_number(0, 65535)(port)


def read_token(text: str) -> str:
    if not re.fullmatch("[!-~]{1,512}", text):
        raise ValueError("must be printable ASCII without spaces, 1 to 512 characters")
    return text


# One table says what a key of the file may hold; its defaults stand in the classes above.
KEYS: dict[str, dict[str, Callable[[str], Any]]] = {
    "paths": dict.fromkeys(("fifo", "controller_log", "webhook_log", "state_dir"), read_path),
    "bgp": {
        "community": read_community,
        "large_community": read_large_community,
        "next_hop": read_next_hop(4),
        "community_ipv6": read_community,
        "large_community_ipv6": read_large_community,
        "next_hop_ipv6": read_next_hop(6),
    },
    "safety": {
        "whitelist": read_networks,
        "allowed": read_networks,
        "min_prefix_length": read_number(1, 32),
        "min_prefix_length_ipv6": read_number(1, 128),
        "max_routes": read_number(0, 1_000_000),
        "restore": read_restore,
        "restore_max_age": read_number(0, 10**9),
    },
    "webhook": {
        "listen": read_listen,
        "token": read_token,
        "token_file": read_path,
        "max_announcements_per_minute": read_number(0, 1_000_000),
        "withdraw_after": read_number(1, 10**9),
        "max_withdraw_after": read_number(1, 10**9),
        "max_routes": read_number(0, 1_000_000),
        "tls_certificate": read_path,
        "tls_key": read_path,
    },
}


def parse_settings(text: str) -> tuple[Settings, list[str]]:
    """Settings from the INI text, and its faults, each as `[section] key: what is wrong`."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="\0")
    try:
        parser.read_string(text)
    except configparser.Error as error:
        return Settings(), [printable(str(error).replace("<string>", "the file"))]
    faults: list[str] = []
    found: dict[str, dict[str, Any]] = {section: {} for section in KEYS}
    for section in parser.sections():
        if section not in KEYS:
            faults.append(f"[{printable(section)}]: unknown section (known: {', '.join(KEYS)})")
            continue
        for key, value in parser.items(section):
            if key not in KEYS[section]:
                faults.append(f"[{section}] {printable(key)}: unknown key (known: {', '.join(KEYS[section])})")
                continue
            try:
                found[section][key] = KEYS[section][key](value.strip())
            except ValueError as error:
                faults.append(f"[{section}] {key}: {error}")
    webhook = Webhook(**found["webhook"])
    if webhook.token and webhook.token_file:
        faults.append("[webhook] token_file: give token or token_file, not both")
    if webhook.withdraw_after > webhook.max_withdraw_after:
        faults.append("[webhook] withdraw_after: is above max_withdraw_after")
    if bool(webhook.tls_certificate) != bool(webhook.tls_key):
        faults.append("[webhook] tls_key: tls_certificate and tls_key go together")
    return Settings(Paths(**found["paths"]), Bgp(**found["bgp"]), Safety(**found["safety"]), webhook), faults


def load_settings(path: str | None, ignore: str = "") -> tuple[Settings, list[str]]:
    """Settings from `path`, else $RTBH_CONFIG, else the default path, which alone may be missing.

    Faults whose section is `ignore` are returned as warnings. Raises SettingsError for the others.
    """
    path = path or os.environ.get("RTBH_CONFIG") or DEFAULT_CONFIG
    try:
        with open(path, encoding="utf-8") as file:
            settings, faults = parse_settings(file.read())
    except FileNotFoundError:
        if path != DEFAULT_CONFIG:
            raise SettingsError([f"{path}: no such file"]) from None
        settings, faults = Settings(), []
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: cannot be read: {error}"]) from None
    warnings = [fault for fault in faults if ignore and fault.startswith(f"[{ignore}]")]
    fatal = [f"{path}: {fault}" for fault in faults if fault not in warnings]
    if fatal:
        raise SettingsError(fatal)
    if not settings.safety.allowed:
        warnings.append("[safety] allowed is empty: any prefix may be blackholed; list your own prefixes there")
    return settings, warnings


def describe_settings(settings: Settings) -> str:
    """The settings in force in the form of the file, for `--check`; never the token."""
    lines = []
    for section in KEYS:
        lines.append(f"[{section}]")
        for key, value in vars(getattr(settings, section)).items():
            if key == "token":
                value = "(set)" if value else "(not set)"
            elif key == "listen":
                value = f"[{value[0]}]:{value[1]}" if ":" in value[0] else f"{value[0]}:{value[1]}"
            elif value is None:
                value = "(as for IPv4)"
            elif isinstance(value, tuple):
                value = " ".join(map(str, value))
            lines.append(f"{key} = {value}".rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------- guards


class Refusal(NamedTuple):
    """Why a prefix may not be blackholed: the guard (its key in `[safety]`) and a text for a person."""

    guard: str
    why: str


def check_prefix(prefix: Network, safety: Safety, neighbors: Iterable[str] = ()) -> Refusal | None:
    """The first guard that refuses to blackhole `prefix`, or None. Withdrawing needs no guard."""
    if prefix.prefixlen == 0:
        return Refusal("min_prefix_length", "a default route is never blackholed")
    for network in safety.whitelist:
        if prefix.overlaps(network):
            return Refusal("whitelist", f"overlaps {network}")
    for neighbor in neighbors:
        if prefix.overlaps(ipaddress.ip_network(neighbor)):
            return Refusal("whitelist", f"{neighbor} is a BGP neighbor")
    if safety.allowed and not any(contains(network, prefix) for network in safety.allowed):
        return Refusal("allowed", "not in allowed prefixes")
    key = "min_prefix_length" if prefix.version == 4 else "min_prefix_length_ipv6"
    if prefix.prefixlen < getattr(safety, key):
        return Refusal(key, f"prefix too short: /{prefix.prefixlen}, at least /{getattr(safety, key)} is needed")
    return None


def contains(network: Network, prefix: Network) -> bool:
    return network.overlaps(prefix) and network.prefixlen <= prefix.prefixlen


# ---------------------------------------------------------------- lines of the pipe


@dataclasses.dataclass(frozen=True)
class Command:
    """One accepted line of the pipe. `until` is seconds since the epoch; None: no end."""

    action: str  # announce, withdraw or withdraw-all
    prefix: Network | None = None
    until: float | None = None
    id: str = ""
    source: str = "pipe"
    reason: str = ""


def parse_line(line: str) -> Command | None:
    """A Command, or None for a blank line or a comment. Raises ValueError with the message to log."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    invalid = f"INVALID command: {printable(line.strip())}"
    action = words.pop(0).lower()
    if action == "withdraw-all":
        if words:
            raise ValueError(f"{invalid} (withdraw-all stands alone; to end one blackhole: withdraw PREFIX)")
        return Command(action)
    if action not in ("announce", "withdraw"):
        raise ValueError(f"UNKNOWN action: {printable(action)}" if words else f"{invalid} (too few words)")
    if words and words[0].lower() == "route":  # FastNetMon writes ExaBGP's own form
        words.pop(0)
    if not words:
        raise ValueError(f"{invalid} (too few words)")
    try:
        prefix = parse_prefix(words.pop(0))
        extra = dict(word.split("=", 1) for word in words if "=" in word)
        until = read_until(extra["until"]) if "until" in extra else None
    except ValueError as error:
        raise ValueError(f"{invalid} ({error})") from None
    said = {key: printable(urllib.parse.unquote(extra[key])) for key in ("id", "source", "reason") if key in extra}
    return Command(action, prefix, until, **said)


def read_until(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,11}(\.[0-9]{1,9})?", text):  # a cut or garbled end must not become no end
        raise ValueError("until: seconds since the epoch are needed")
    return float(text)


class LineReader:
    """Cuts a byte stream into lines, whatever the pieces it comes in; over-long lines give an error, once."""

    def __init__(self) -> None:
        self.partial = b""
        self.skipping = False

    def feed(self, data: bytes) -> list[str | ValueError]:
        """The lines that `data` completes; a ValueError carries the message to log instead of a line."""
        *complete, self.partial = (self.partial + data).split(b"\n")
        lines: list[str | ValueError] = []
        for raw in complete:
            if self.skipping:
                self.skipping = False
            elif len(raw) >= LINE_MAX:
                lines.append(too_long(raw))
            else:
                lines.append(raw.decode("ascii", "backslashreplace"))
        if len(self.partial) >= LINE_MAX:
            if not self.skipping:
                lines.append(too_long(self.partial))
            self.skipping, self.partial = True, b""
        return lines

    def give_up(self) -> ValueError | None:
        """Drop a line whose end never came: half of `192.0.2.100` is another address."""
        partial, self.partial, self.skipping = self.partial, b"", False
        if not partial.strip():
            return None
        text = printable(partial.decode("ascii", "backslashreplace"))
        return ValueError(f"INVALID command: {text} (no newline at its end)")


def too_long(raw: bytes) -> ValueError:
    start = printable(raw[:40].decode("ascii", "backslashreplace"))
    return ValueError(f"INVALID command: {start}... (longer than {LINE_MAX - 1} bytes)")


# ---------------------------------------------------------------- decisions


class Log(NamedTuple):
    """Effect: write this message to the log."""

    text: str


class Tell(NamedTuple):
    """Effect: give this command to ExaBGP."""

    text: str


Effect = Union[Log, Tell]


class Now(NamedTuple):
    """One moment: `wall` in seconds since the epoch, for people; `mono` on the monotonic clock, for timers."""

    wall: float
    mono: float


@dataclasses.dataclass(frozen=True)
class Route:
    """A blackhole that is held. Its attributes are kept so that its withdraw carries exactly the same."""

    prefix: str
    attributes: str
    announced_at: float
    until: float | None = None  # seconds since the epoch; None: pinned, no timer ends it
    deadline: float | None = None  # the same end on the monotonic clock: a stepped clock moves nothing
    id: str = ""
    source: str = "pipe"
    reason: str = ""


class Blackholes:
    """Which prefixes are blackholed, and what every command does to that. No I/O, no clock."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.routes: dict[str, Route] = {}
        self.neighbors: dict[str, tuple[str, float]] = {}  # address: up or down, since when
        self.recent: deque[tuple[float, str]] = deque(maxlen=50)  # time, message

    def line(self, line: str | ValueError, now: Now) -> list[Effect]:
        """What one line of the pipe does."""
        try:
            if isinstance(line, ValueError):
                raise line
            command = parse_line(line)
        except ValueError as error:
            return [self.note(now, str(error))]
        if command is None:
            return []
        if command.prefix is None:
            return self.withdraw_all(now)
        if command.action == "withdraw":
            return self.withdraw(command.prefix, now, command.id)
        return self.announce(command.prefix, command, now)

    def announce(self, network: Network, command: Command, now: Now) -> list[Effect]:
        prefix = str(network)
        held = self.routes.get(prefix)
        refusal = self.refusal(network, held is not None)
        if refusal is None and command.until is not None and command.until <= now.wall:
            refusal = Refusal("until", "its end has passed")
        if refusal:
            return [self.note(now, f"REFUSED {prefix}: {refusal.guard}: {refusal.why}")]
        until, pinned = command.until, ""
        if held and held.until is None and until is not None:
            until, pinned = None, " (stays pinned by an announce without an end)"
        deadline = None if until is None else now.mono + until - now.wall
        attributes = self.settings.bgp.attributes(network.version)
        identity = held.id if pinned and held else command.id
        route = Route(prefix, attributes, now.wall, until, deadline, identity, command.source, command.reason)
        self.routes[prefix] = route
        return [self.note(now, f"ANNOUNCE {prefix}{pinned}"), Tell(f"announce route {prefix} {attributes}")]

    def refusal(self, prefix: Network, held: bool) -> Refusal | None:
        """The guard that stops an announce of the prefix, if any."""
        refusal = check_prefix(prefix, self.settings.safety, self.neighbors)
        if refusal is None and not held and len(self.routes) >= self.settings.safety.max_routes:
            refusal = Refusal("max_routes", f"{len(self.routes)} routes are held")
        impossible = prefix.version == 6 and self.settings.bgp.next_hop_ipv6 == "self"
        if refusal is None and impossible and any("." in neighbor for neighbor in self.neighbors):
            refusal = Refusal("next_hop_ipv6", "self cannot work on an IPv4 session: set an IPv6 address in [bgp]")
        return refusal

    def withdraw(self, network: Network, now: Now, identity: str = "") -> list[Effect]:
        """End a blackhole; with an `identity`, only the announcement of that id. Passed on, held or not."""
        prefix = str(network)
        held = self.routes.get(prefix)
        if held and identity and held.id != identity:
            return [self.note(now, f"KEPT {prefix}: announced again since by {held.source}, id {identity} is over")]
        attributes = held.attributes if held else self.settings.bgp.attributes(network.version)
        self.routes.pop(prefix, None)
        return [self.note(now, f"WITHDRAW {prefix}"), Tell(f"withdraw route {prefix} {attributes}")]

    def withdraw_all(self, now: Now) -> list[Effect]:
        effects: list[Effect] = [self.note(now, f"WITHDRAW-ALL {len(self.routes)} routes")]
        for prefix in list(self.routes):
            effects += self.withdraw(ipaddress.ip_network(prefix), now)
        return effects

    def expire(self, now: Now) -> list[Effect]:
        """Withdraw what should long have been withdrawn: the backstop for a receiver that is gone."""
        effects: list[Effect] = []
        for prefix, route in list(self.routes.items()):
            if route.deadline is not None and now.mono >= route.deadline + BACKSTOP_GRACE:
                effects.append(self.note(now, f"OVERDUE {prefix}: its end passed, nobody withdrew it"))
                effects += self.withdraw(ipaddress.ip_network(prefix), now)
        return effects

    def reload(self, settings: Settings, now: Now) -> list[Effect]:
        """Put new settings in force: end what is now protected, report the rest, renew attributes."""
        self.settings = settings
        effects: list[Effect] = []
        for prefix, route in list(self.routes.items()):
            network = ipaddress.ip_network(prefix)
            refusal = check_prefix(network, settings.safety, self.neighbors)
            attributes = settings.bgp.attributes(network.version)
            if refusal and refusal.guard == "whitelist":
                effects.append(self.note(now, f"PROTECTED {prefix}: whitelist: {refusal.why}"))
                effects += self.withdraw(network, now)
                continue
            if refusal:
                effects.append(self.note(now, f"WARNING: {prefix} stays blackholed: {refusal.guard}: {refusal.why}"))
            if attributes != route.attributes:
                self.routes[prefix] = dataclasses.replace(route, attributes=attributes)
                effects += [self.note(now, f"ANNOUNCE {prefix}"), Tell(f"announce route {prefix} {attributes}")]
        return effects

    def session(self, address: str, state: str, why: str, now: Now) -> list[Effect]:
        """A BGP session came up or went down."""
        self.neighbors[address] = (state, now.wall)
        return [self.note(now, f"NEIGHBOR {address} {state}{': ' + printable(why) if why else ''}")]

    def note(self, now: Now, text: str) -> Log:
        self.recent.append((now.wall, text))
        return Log(text)


def publication(blackholes: Blackholes, version: str, now: Now) -> str:
    """The published state as JSON; all times in seconds since the epoch."""
    routes = [
        {"prefix": r.prefix, "announced_at": r.announced_at, "until": r.until, "id": r.id}
        | {"source": r.source, "reason": r.reason, "attributes": r.attributes}
        for r in blackholes.routes.values()
    ]
    neighbors = {address: {"state": state, "since": t} for address, (state, t) in blackholes.neighbors.items()}
    safety = blackholes.settings.safety
    return json.dumps(
        {"heartbeat": now.wall, "pid": os.getpid(), "exabgp": version, "neighbors": neighbors, "routes": routes}
        | {"recent": list(blackholes.recent), "limits": {"max_routes": safety.max_routes}}
    )


# ---------------------------------------------------------------- what is said to ExaBGP, and answered


class Dialogue:
    """The commands given to ExaBGP and the answers to come. No I/O: lines in, bytes out.

    ExaBGP answers each command with `done` or `error`, but 4.2 answers some not at all and may
    leave the tail of a burst unread, and a process started anew finishes the line that its
    predecessor left and reads the answers meant for it. Hence: a bare newline and `version`
    first, and no answer counts before ours to `version`; at most WINDOW bytes unanswered; after
    a second of silence a newline, whose answer is `error`.
    """

    WINDOW = 12 * 1024  # bytes
    SILENCE = 1.0  # seconds
    PATIENCE = 5  # silences before a greeting counts as never to be answered

    def __init__(self) -> None:
        self.version = ""  # ExaBGP's, once it has said it
        self.greeted = False
        self.answers = True  # False: nothing answers (acknowledgements are off), so nothing waits for answers
        self.silences = 0
        self.waiting: deque[str] = deque(["", "version"])
        self.waiting_bytes = len("\nversion\n")
        self.unanswered: deque[str] = deque()
        self.unanswered_bytes = 0
        self.nudged = self.heard_since_nudge = False

    def tell(self, command: str) -> None:
        self.waiting.append(command)
        self.waiting_bytes += len(command) + 1

    def take(self) -> bytes:
        """The commands that may be written now."""
        out = []
        while self.waiting and (self.unanswered_bytes < self.WINDOW or not self.answers or not self.waiting[0]):
            command = self.waiting.popleft()
            self.waiting_bytes -= len(command) + 1
            if self.answers:
                self.unanswered.append(command)
                self.unanswered_bytes += len(command) + 1
            out.append(command + "\n")
        return "".join(out).encode("ascii")

    def hear(self, line: str) -> str:
        """Take one line of answer; returns the command that ExaBGP refused, or an empty text."""
        self.heard_since_nudge = True
        if line.startswith("exabgp "):
            self.version = line.split()[1]
        if line not in ("done", "error"):
            return ""
        if not self.greeted:
            if self.version and line == "done":
                self.greeted = self.answers = True
                while self.unanswered and self.forget() != "version":
                    pass
            return ""
        command = self.forget() if self.unanswered else ""
        self.nudged = self.nudged and command != ""
        return command if line == "error" else ""

    def forget(self) -> str:
        command = self.unanswered.popleft()
        self.unanswered_bytes -= len(command) + 1
        return command

    def silent(self) -> str:
        """To be called after each SILENCE seconds without an answer; returns what is to be logged, if anything."""
        self.silences += 1
        if not self.greeted:
            if self.silences != self.PATIENCE:
                return ""
            self.answers = False
            return "ERROR: ExaBGP answers nothing, so refusals go unseen: set ack = true in [exabgp.api] of exabgp.env"
        if self.nudged and self.heard_since_nudge:  # it has read all there was: what it left unanswered stays so
            self.unanswered.clear()
            self.unanswered_bytes, self.nudged = 0, False
        elif self.unanswered and not self.nudged:
            self.nudged, self.heard_since_nudge = True, False
            self.waiting.appendleft("")
            self.waiting_bytes += 1
        return ""


# ---------------------------------------------------------------- files: log, state, pipe


class LogFile(logging.handlers.WatchedFileHandler):
    """The log file, opened anew after a rotation; what can't be written goes to stderr and stops nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.stream = None  # the next record tries to open it again
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"ERROR: cannot write {self.baseFilename}: {sys.exc_info()[1]}\n{record.getMessage()}\n")


class Logger:
    """Writes A4's log lines from a thread of its own: a slow or dead disk never holds up its caller."""

    def __init__(self, path: str) -> None:
        self.queue: queue.Queue[Any] = queue.Queue(maxsize=10_000)
        self.lost = 0
        file = LogFile(path, encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.thread = threading.Thread(target=self.write, args=(file,), daemon=True)
        self.thread.start()

    def __call__(self, text: str) -> None:
        try:
            if self.lost:
                self.queue.put_nowait(logging.makeLogRecord({"msg": f"ERROR: {self.lost} log lines were lost"}))
                self.lost = 0
            self.queue.put_nowait(logging.makeLogRecord({"msg": text}))
        except queue.Full:
            self.lost += 1

    def write(self, file: LogFile) -> None:
        for record in iter(self.queue.get, None):
            file.handle(record)

    def close(self) -> None:
        """Write what is queued, for a second at most."""
        try:
            self.queue.put_nowait(None)
        except queue.Full:
            return
        self.thread.join(1.0)


class Publisher:
    """Replaces the state file from a thread of its own, always with the newest text."""

    def __init__(self, path: str, log: Callable[[str], None]) -> None:
        self.path, self.log = path, log
        self.text: str | None = None
        self.changed = threading.Event()
        self.failed = ""
        threading.Thread(target=self.write, daemon=True).start()

    def __call__(self, text: str) -> None:
        self.text = text
        self.changed.set()

    def write(self) -> None:
        while self.changed.wait():
            self.changed.clear()
            try:
                descriptor = os.open(f"{self.path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(self.text or "")
                os.replace(f"{self.path}.new", self.path)
                failed = ""
            except OSError as error:
                failed = f"ERROR: cannot write the state: {error}"
            if failed and failed != self.failed:
                self.log(failed)
            self.failed = failed


class PipeBusy(Exception):
    """Another controller reads this pipe."""


def open_pipe(path: str, log: Callable[[str], None]) -> int:
    """A descriptor of the FIFO, locked for this process, made if missing.

    Opened for reading and writing: with no reader's end of file it never spins when writers leave.
    Raises PipeBusy while another controller holds it, OSError when it can't be made or opened.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        mode = 0
    if mode and not stat.S_ISFIFO(mode):
        aside = f"{path}.not-a-fifo-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        os.rename(path, aside)
        log(f"ERROR: {path} was no FIFO; moved to {aside}, nothing in it was executed")
        mode = 0
    if not mode:
        os.mkfifo(path)
        os.chmod(path, 0o660)  # the umask that ExaBGP leaves us (0137) would lock the group out
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise PipeBusy(path) from None
        raise
    return descriptor


# ---------------------------------------------------------------- the loop


class Loop:
    """Moves bytes between the pipe, ExaBGP and the decisions; the only place that waits, and never for long."""

    QUEUE = 256 * 1024  # bytes of commands waiting for ExaBGP above which the pipe is not read: its writers wait
    STOP = 1.5  # seconds for the last withdrawals; ExaBGP 5.0 kills its process after 2

    def __init__(self, settings: Settings, config: str | None, log: Logger) -> None:
        self.settings, self.config, self.log = settings, config, log
        self.blackholes = Blackholes(settings)
        self.dialogue = Dialogue()
        self.publish = Publisher(settings.paths.state_file, log)
        self.selector = selectors.DefaultSelector()
        self.lines = LineReader()
        self.pipe = -1
        self.pipe_trouble = ""
        self.out = b""  # taken from the dialogue, not yet written
        self.heard = b""  # the start of a line from ExaBGP
        self.stop_at: float | None = None
        self.running = True
        self.changed = True
        self.started = False
        # monotonic times: last publication, last answer, last bytes in the pipe, last look at the pipe's path
        self.published_at = self.answered_at = self.pipe_at = self.looked_at = 0.0
        self.publish_pause = PUBLISH_PAUSE

    def run(self) -> int:
        """Serve until a signal or the end of ExaBGP; returns the exit code."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)  # the handlers do nothing: the loop reads the numbers here
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        if not os.isatty(1):  # a terminal's flags are shared with the shell
            os.set_blocking(1, False)
        self.selector.register(0, selectors.EVENT_READ, self.read_exabgp)
        self.selector.register(wake_read, selectors.EVENT_READ, lambda: self.read_signals(wake_read))
        while self.running:
            self.housekeeping()
            self.write_exabgp()
            self.publish_state()
            for key, _ in self.selector.select(self.pause()):
                key.data()
                if not self.running:
                    break
        self.log("RTBH controller stopped")
        return 0

    def now(self) -> Now:
        return Now(time.time(), time.monotonic())

    def pause(self) -> float:
        if self.stop_at is not None:
            return 0.05
        if self.pipe < 0:
            return 0.1
        return max(0.0, self.published_at + self.publish_pause - time.monotonic()) if self.changed else 0.25

    def apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.changed = True
            if isinstance(effect, Tell):
                self.dialogue.tell(effect.text)
            else:
                self.log(effect.text)

    def housekeeping(self) -> None:
        now = self.now()
        if self.stop_at is not None:
            idle = not (self.out or self.dialogue.waiting or self.dialogue.unanswered)
            self.running = self.running and not idle and now.mono < self.stop_at
            return
        if now.mono - self.looked_at >= (0.1 if self.pipe < 0 else HEARTBEAT):
            self.looked_at = now.mono
            self.look_after_pipe()
        if self.lines.partial and now.mono - self.pipe_at > 1.0:
            torn = self.lines.give_up()
            self.apply(self.blackholes.line(torn, now) if torn else [])
        if now.mono - self.answered_at >= Dialogue.SILENCE:
            self.answered_at = now.mono
            message = self.dialogue.silent()
            if message:
                self.apply([self.blackholes.note(now, message)])
        self.apply(self.blackholes.expire(now))
        full = self.dialogue.waiting_bytes > self.QUEUE
        listening = self.pipe >= 0 and self.pipe in self.selector.get_map()
        if listening and full:
            self.selector.unregister(self.pipe)
        elif self.pipe >= 0 and not listening and not full:
            self.selector.register(self.pipe, selectors.EVENT_READ, self.read_pipe)

    def look_after_pipe(self) -> None:
        """Open the pipe; open it anew when someone has deleted or replaced it."""
        path = self.settings.paths.fifo
        try:
            if self.pipe >= 0:
                opened = os.fstat(self.pipe)
                try:
                    found = os.lstat(path)
                    if (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino):
                        return
                except FileNotFoundError:
                    pass
                self.log(f"ERROR: {path} was deleted or replaced; opening it anew")
                self.read_pipe()
                if self.pipe in self.selector.get_map():
                    self.selector.unregister(self.pipe)
                os.close(self.pipe)
                self.pipe = -1
            self.pipe = open_pipe(path, self.log)
        except PipeBusy:
            trouble = f"Waiting: another controller reads {path}"
        except OSError as error:
            trouble = f"ERROR: cannot open the pipe {path}: {error.strerror}; trying again until it works"
        else:
            trouble = ""
            self.log(f"FIFO ready at {path}")
            if not self.started:
                self.started = True
                self.log("RTBH controller started")
        if trouble and trouble != self.pipe_trouble:
            self.log(trouble)
        self.pipe_trouble = trouble

    def read_pipe(self) -> None:
        try:
            data = os.read(self.pipe, 65536)
        except BlockingIOError:
            return
        now = self.now()
        self.pipe_at = now.mono
        for line in self.lines.feed(data):
            self.apply(self.blackholes.line(line, now))

    def read_exabgp(self) -> None:
        data = os.read(0, 65536)
        if not data:
            self.log("ExaBGP has gone (end of file on stdin)")
            self.running = False
        *lines, self.heard = (self.heard + data).split(b"\n")
        now = self.now()
        for raw in lines:
            line = raw.decode("utf-8", "replace").strip()
            words = line.split(maxsplit=3)
            if len(words) >= 3 and words[0] == "neighbor" and words[2] in ("up", "down"):
                why = words[3].lstrip("- ") if len(words) > 3 else ""
                self.apply(self.blackholes.session(words[1], words[2], why, now))
            elif line:
                self.answered_at = now.mono
                refused = self.dialogue.hear(line)
                if refused:
                    self.apply([self.blackholes.note(now, f"ERROR: ExaBGP refused: {refused}")])

    def write_exabgp(self) -> None:
        try:
            while self.running:
                self.out = self.out or self.dialogue.take()
                if not self.out:
                    break
                self.out = self.out[os.write(1, self.out) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.log("ExaBGP has gone (stdout is closed)")
            self.running = False
        waiting = 1 in self.selector.get_map()
        if self.out and not waiting:
            self.selector.register(1, selectors.EVENT_WRITE, lambda: None)
        elif waiting and not self.out:
            self.selector.unregister(1)

    def read_signals(self, descriptor: int) -> None:
        now = self.now()
        for number in os.read(descriptor, 64):
            if number == signal.SIGHUP:
                self.reload(now)
            elif self.stop_at is None:
                self.stop_at = now.mono + self.STOP
                self.log(f"Received signal {number}, withdrawing all routes")
                self.apply(self.blackholes.withdraw_all(now))
                if self.pipe in self.selector.get_map():
                    self.selector.unregister(self.pipe)

    def reload(self, now: Now) -> None:
        try:
            settings, warnings = load_settings(self.config, ignore="webhook")
        except SettingsError as error:
            self.apply([self.blackholes.note(now, f"ERROR: settings not reloaded, the old ones stay: {error}")])
            return
        if settings.paths != self.settings.paths:
            warnings.append("[paths] changes take effect when ExaBGP is restarted")
            settings = dataclasses.replace(settings, paths=self.settings.paths)
        self.settings = settings
        self.log("Settings reloaded")
        for warning in warnings:
            self.log(f"WARNING: {warning}")
        self.apply(self.blackholes.reload(settings, now))

    def publish_state(self) -> None:
        """Publish what changed, and a heartbeat; only the controller that has the pipe may speak."""
        now = self.now()
        due = self.publish_pause if self.changed else HEARTBEAT
        if self.pipe >= 0 and now.mono - self.published_at >= due:
            self.publish(publication(self.blackholes, self.dialogue.version, now))
            self.published_at, self.changed = now.mono, False
            # a large table takes long to print: spend at most a twentieth of the time on it
            self.publish_pause = max(PUBLISH_PAUSE, 20 * (time.monotonic() - now.mono))


# ---------------------------------------------------------------- commands


def print_status(path: str) -> int:
    """Print the published state for a person; 1 when the controller is away or no session is up."""
    try:
        with open(path, encoding="utf-8") as file:
            state: Mapping[str, Any] = json.load(file)
    except (OSError, ValueError) as error:
        print(f"no published state: {error}\nIs ExaBGP running? Its controller writes this file.", file=sys.stderr)
        return 1
    age = time.time() - state["heartbeat"]
    alive = -3 <= age <= 3
    word = "running" if alive else f"AWAY (last heartbeat {age:.0f} s ago: what follows is old)"
    print(f"controller {word}, ExaBGP {state['exabgp'] or 'silent'}")
    for address, neighbor in state["neighbors"].items():
        print(f"neighbor {address} {neighbor['state']} since {clock(neighbor['since'])}")
    if not state["neighbors"]:
        print("no BGP session has come up yet")
    print(f"{len(state['routes'])} blackholes (limit {state['limits']['max_routes']})")
    for route in state["routes"]:
        left = "pinned" if route["until"] is None else f"{max(0.0, route['until'] - time.time()):.0f} s left"
        reason = f" ({route['reason']})" if route["reason"] else ""
        print(f"  {route['prefix']}  since {clock(route['announced_at'])}  {left}  by {route['source']}{reason}")
    refusals = [(at, text) for at, text in state["recent"] if re.match("INVALID|UNKNOWN|REFUSED|ERROR", text)]
    for at, text in refusals[-10:]:
        print(f"refused {clock(at)} {text}")
    return 0 if alive and any(n["state"] == "up" for n in state["neighbors"].values()) else 1


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="rtbh-controller", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="PATH", help=f"settings (default: $RTBH_CONFIG, else {DEFAULT_CONFIG})")
    parser.add_argument("--check", action="store_true", help="validate the settings, print what is in force, exit")
    parser.add_argument("--status", action="store_true", help="print what is blackholed, and the BGP sessions, exit")
    options = parser.parse_args()
    try:
        settings, warnings = load_settings(options.config, ignore="" if options.check else "webhook")
    except SettingsError as error:
        print(f"rtbh-controller: {error}", file=sys.stderr)
        return 1
    if options.status:
        return print_status(settings.paths.state_file)
    if options.check:
        print(describe_settings(settings))
        print("".join(f"warning: {warning}\n" for warning in warnings), end="", file=sys.stderr)
        return 0
    log = Logger(settings.paths.controller_log)
    for warning in warnings:
        log(f"WARNING: {warning}")
    try:
        return Loop(settings, options.config, log).run()
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main())
