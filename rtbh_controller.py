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

Signals: SIGTERM and SIGINT withdraw every route and end the controller; SIGHUP (which --reload
sends to the running one) rereads the settings. End of file on stdin (ExaBGP is gone) ends it too.
Exit codes: 0 a clean end, 78 unusable settings (EX_CONFIG of sysexits.h), 2 wrong usage, 1 anything else.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import dataclasses
import errno
import fcntl
import functools
import ipaddress
import json
import os
import queue
import re
import select
import signal
import socket
import stat
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Callable, NamedTuple

DEFAULT_CONFIG = "/etc/exabgp/rtbh.conf"
PLACEHOLDER_TOKEN = "your-secret-webhook-token"
PROCESS = "rtbh-controller"  # our name in exabgp.conf
LINE_MAX = 4096  # bytes; a write of at most PIPE_BUF is atomic (POSIX), so a longer line may be torn
PIPE_SIZE = 64 * 1024  # bytes that a pipe holds
READ_SIZE = 8 * 1024  # bytes read at once, a part of a burst: while ExaBGP works on it the next is read
BACKSTOP_GRACE = 10.0  # seconds after a route's end in which its receiver may withdraw it itself
REMEMBER = 10.0  # seconds for which the published state names the ids that were refused
ENDED_MAX = 2000  # ids of announcements that are over before their time
ALIVE = 60.0  # seconds between two records in the journal that say that the host is alive
HEARTBEAT = 1.0  # seconds between two publications of an unchanged state
PUBLISH_PAUSE = 0.006  # seconds from a change to its publication: by then ExaBGP has sent the UPDATE

# ---------------------------------------------------------------- prefixes


LENGTHS = {str(length): length for length in range(129)}  # the one way to write each


class Prefix(NamedTuple):
    """An IPv4 or IPv6 prefix: its first and last address as integers, and its one canonical text."""

    version: int
    first: int
    last: int
    length: int
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def address(self) -> str:
        return self.text.partition("/")[0]

    @property
    def host(self) -> bool:
        return self.first == self.last

    def overlaps(self, other: Prefix) -> bool:
        return self.version == other.version and self.first <= other.last and other.first <= self.last

    def contains(self, other: Prefix) -> bool:
        return self.version == other.version and self.first <= other.first and other.last <= self.last


def parse_prefix(text: str) -> Prefix:
    """Read an address (then /32 or /128) or a prefix; only what this returns, printed, goes to ExaBGP.

    Raises ValueError, with a text for a person, for anything else: spaces, leading zeros, scopes
    (RFC 4007), host bits, IPv4-mapped addresses (RFC 4291), which would pass a whitelist of IPv4
    networks.
    """
    address, slash, digits = text.partition("/")
    version, bits = (6, 128) if ":" in address else (4, 32)
    try:
        first, address = read_ipv6(address) if version == 6 else read_ipv4(address)
    except (OSError, ValueError):
        raise ValueError(f"not an IPv4 or IPv6 address or prefix: {printable(text, 60)}") from None
    length = LENGTHS.get(digits) if slash else bits
    if length is None or length > bits:
        raise ValueError(f"not a prefix length: /{printable(digits, 20)}, at most /{bits} for IPv{version}")
    hosts = (1 << (bits - length)) - 1
    if first & hosts:
        raise ValueError(f"not a prefix: {address} has host bits set for /{length}")
    if version == 6 and first >> 32 == 0xFFFF:
        mapped = socket.inet_ntoa((first & 0xFFFFFFFF).to_bytes(4, "big"))
        raise ValueError(f"an IPv4-mapped address: write {mapped}")
    return Prefix(version, first, first | hosts, length, f"{address}/{length}")


def read_ipv4(text: str) -> tuple[int, str]:
    """The address as an integer, and in its one canonical form. Raises ValueError for any other form."""
    a, b, c, d = bytes(map(int, text.split(".")))
    if f"{a}.{b}.{c}.{d}" != text:
        raise ValueError(text)
    return a << 24 | b << 16 | c << 8 | d, text


def read_ipv6(text: str) -> tuple[int, str]:
    """The address as an integer, and in its canonical form (RFC 5952). Raises OSError or ValueError."""
    packed = socket.inet_pton(socket.AF_INET6, text)
    return int.from_bytes(packed, "big"), socket.inet_ntop(socket.AF_INET6, packed)


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
    def journal(self) -> str:
        """What the controller holds, for its successor."""
        return os.path.join(self.state_dir, "journal")

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
    whitelist: tuple[Prefix, ...] = (
        parse_prefix("198.51.100.0/24"),
        parse_prefix("203.0.113.10/32"),
    )
    allowed: tuple[Prefix, ...] = ()
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
    neighbors: Mapping[str, Bgp] = dataclasses.field(default_factory=dict)  # address: its own [neighbor ADDRESS]

    def bgp_of(self, neighbor: str) -> Bgp:
        return self.neighbors.get(neighbor, self.bgp)


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
        return text if prefix is None else prefix.address

    return read


def read_networks(text: str) -> tuple[Prefix, ...]:
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
    neighbors: dict[str, dict[str, Any]] = {}
    for section in parser.sections():
        keys, values = KEYS.get(section), found.get(section, {})
        if section.startswith("neighbor "):
            try:
                values = neighbors.setdefault(str(ipaddress.ip_address(section[9:].strip())), {})
                keys = KEYS["bgp"]
            except ValueError:
                faults.append(f"[{printable(section)}]: neighbor needs the address of a BGP neighbor")
                continue
        if keys is None:
            faults.append(f"[{printable(section)}]: unknown section (known: {', '.join(KEYS)}, neighbor ADDRESS)")
            continue
        for key, value in parser.items(section):
            if key not in keys:
                faults.append(f"[{section}] {printable(key)}: unknown key (known: {', '.join(keys)})")
                continue
            try:
                values[key] = keys[key](value.strip())
            except ValueError as error:
                faults.append(f"[{section}] {key}: {error}")
    webhook = Webhook(**found["webhook"])
    if webhook.token and webhook.token_file:
        faults.append("[webhook] token_file: give token or token_file, not both")
    if webhook.withdraw_after > webhook.max_withdraw_after:
        faults.append("[webhook] withdraw_after: is above max_withdraw_after")
    if bool(webhook.tls_certificate) != bool(webhook.tls_key):
        faults.append("[webhook] tls_key: tls_certificate and tls_key go together")
    bgp = Bgp(**found["bgp"])
    overrides = {address: dataclasses.replace(bgp, **values) for address, values in neighbors.items()}
    return Settings(Paths(**found["paths"]), bgp, Safety(**found["safety"]), webhook, overrides), faults


def config_path(path: str | None) -> str:
    return path or os.environ.get("RTBH_CONFIG") or DEFAULT_CONFIG


def load_settings(path: str | None, ignore: str = "") -> tuple[Settings, list[str]]:
    """Settings from `path`, else $RTBH_CONFIG, else the default path, which alone may be missing.

    Faults whose section is `ignore` are returned as warnings. Raises SettingsError for the others.
    """
    path = config_path(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        settings, faults = parse_settings(text)
    except FileNotFoundError:
        if path != DEFAULT_CONFIG:
            raise SettingsError([f"{path}: no such file"]) from None
        settings, faults = Settings(), []
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: cannot be read: {error}"]) from None
    warnings: list[str] = []
    if faults and ignore:
        settings, warnings, faults = ignore_section(text, ignore)
    if faults:
        raise SettingsError([f"{path}: {fault}" for fault in faults])
    if not settings.safety.allowed:
        warnings.append("[safety] allowed is empty: any prefix may be blackholed; list your own prefixes there")
    return settings, warnings


def ignore_section(text: str, section: str) -> tuple[Settings, list[str], list[str]]:
    """The settings without a section that holds the faults, these as warnings, and all faults if there are others.

    The section ends at the next header; should that one be damaged, its keys would be cut away with
    it, and with them a guard. So a line that does not belong to the section makes its faults count.
    """
    faults = parse_settings(text)[1]
    cut: list[str] = []

    def keep(found: re.Match[str]) -> str:
        cut.append(found[0])
        return ""

    rest = re.sub(rf"(?ms)^[ \t]*\[{section}\].*?(?=^[ \t]*\[|\Z)", keep, text)
    settings, others = parse_settings(rest)
    strange = [line for part in cut for line in part.splitlines()[1:] if not belongs(line, section)]
    if others or strange:
        return Settings(), [], list(dict.fromkeys([*others, *faults]))
    return settings, faults, []


def belongs(line: str, section: str) -> bool:
    """Whether a line can be one of the section, if a faulty one: blank, a comment, indented, or with a key of its."""
    if not line.strip() or line[0] in " \t#;":
        return "[" not in line  # a header that was commented out, by chance
    return line.partition("=")[0].strip() in ("", *KEYS[section])


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
    for address, bgp in settings.neighbors.items():
        lines += [f"[neighbor {address}]", f"# IPv4: {bgp.attributes(4)}", f"# IPv6: {bgp.attributes(6)}"]
    return "\n".join(lines)


# ---------------------------------------------------------------- guards


class Refusal(NamedTuple):
    """Why a prefix may not be blackholed: the guard (its key in `[safety]`) and a text for a person."""

    guard: str
    why: str


def check_prefix(prefix: Prefix, safety: Safety, routers: Iterable[Prefix] = ()) -> Refusal | None:
    """The first guard that refuses to blackhole `prefix`, or None. Withdrawing needs no guard."""
    if prefix.length == 0:
        return Refusal("min_prefix_length", "a default route is never blackholed")
    for network in safety.whitelist:
        if prefix.overlaps(network):
            return Refusal("whitelist", f"overlaps {network}")
    for router in routers:
        if prefix.overlaps(router):
            return Refusal("whitelist", f"{router.address} is a BGP neighbor or ExaBGP's own address")
    if safety.allowed and not any(network.contains(prefix) for network in safety.allowed):
        return Refusal("allowed", "not in allowed prefixes")
    key = "min_prefix_length" if prefix.version == 4 else "min_prefix_length_ipv6"
    if prefix.length < getattr(safety, key):
        return Refusal(key, f"prefix too short: /{prefix.length}, at least /{getattr(safety, key)} is needed")
    return None


# ---------------------------------------------------------------- lines of the pipe


class Command(NamedTuple):
    """One accepted line of the pipe. `until` is seconds since the epoch; None: no end."""

    action: str  # announce, withdraw or withdraw-all
    prefix: Prefix | None = None
    until: float | None = None
    id: str = ""
    source: str = "pipe"
    reason: str = ""


def parse_line(line: str) -> Command | None:
    """A Command, or None for a blank line or a comment. Raises ValueError with the message to log."""
    words = line.split()
    if not words or words[0][0] == "#":
        return None
    action = words[0].lower()
    if action == "withdraw-all":
        if len(words) > 1:
            raise invalid(line, "withdraw-all stands alone; to end one blackhole: withdraw PREFIX")
        return Command(action)
    if len(words) > 1 and words[1].lower() == "route":  # FastNetMon writes ExaBGP's own form
        del words[1]
    if len(words) < 2:
        raise invalid(line, "too few words")
    if action not in ("announce", "withdraw"):
        raise ValueError(f"UNKNOWN action: {printable(action)}")
    try:
        prefix = parse_prefix(words[1])
        until, said = None, {}
        for word in words[2:]:
            key, equals, value = word.partition("=")
            if equals and key == "until":
                until = read_until(value)
            elif equals and key in ("id", "source", "reason"):
                said[key] = read_word(value)
        if said.get("source") == "other":  # which is what the published state calls exabgp.conf
            del said["source"]
    except ValueError as error:
        raise invalid(line, str(error)) from None
    return Command(action, prefix, until, **said)


def invalid(line: str, why: str) -> ValueError:
    return ValueError(f"INVALID command: {printable(line.strip())} ({why})")


def read_until(text: str) -> float:
    seconds, _, fraction = text.partition(".")  # a cut or garbled end must not become no end
    if not (seconds + fraction).isdecimal() or not text.isascii() or len(seconds) > 11 or text.endswith("."):
        raise ValueError("until: seconds since the epoch are needed")
    return float(text)


def read_word(value: str) -> str:
    """A percent-encoded value, fit for a log line."""
    return value if value.isalnum() and value.isascii() else printable(urllib.parse.unquote(value))


class LineReader:
    """Cuts a byte stream into lines, whatever the pieces it comes in; over-long lines give an error, once."""

    def __init__(self) -> None:
        self.partial = ""
        self.skipping = False

    def feed(self, data: bytes) -> list[str | ValueError]:
        """The lines that `data` completes; a ValueError carries the message to log instead of a line."""
        complete = (self.partial + data.decode("ascii", "backslashreplace")).split("\n")
        self.partial = complete.pop()
        if self.skipping and complete:
            self.skipping = False
            del complete[0]
        lines = [line if len(line) < LINE_MAX else too_long(line) for line in complete]
        if len(self.partial) >= LINE_MAX:
            if not self.skipping:
                lines.append(too_long(self.partial))
            self.skipping, self.partial = True, ""
        return lines

    def give_up(self) -> ValueError | None:
        """Drop a line whose end never came: half of `192.0.2.100` is another address."""
        partial, self.partial, self.skipping = self.partial, "", False
        return invalid(partial, "no newline at its end") if partial.strip() else None


def too_long(line: str) -> str | ValueError:
    return ValueError(f"INVALID command: {printable(line[:40])}... (longer than {LINE_MAX - 1} bytes)")


# ---------------------------------------------------------------- decisions


class Tell(NamedTuple):
    """A command for ExaBGP. One about a route has a prefix; any other is the `verb` alone.

    `who`: the neighbors it is for (`neighbor A, neighbor B `), empty for all. `repair`: it mends
    what an audit found.
    """

    verb: str
    prefix: str = ""
    attributes: str = ""
    who: str = ""
    repair: bool = False

    def joins(self, other: Tell) -> bool:
        """Whether both may stand in one list: one list of one family with the same attributes keeps the order."""
        same = self.verb == other.verb and self.attributes == other.attributes and self.who == other.who
        return same and self.prefix != "" and (":" in self.prefix) == (":" in other.prefix)


def render(commands: Sequence[Tell]) -> str:
    """The line for ExaBGP: the plain form for one command, a list for several that may stand in one."""
    verb, prefix, attributes, who, _ = commands[0]
    if len(commands) > 1:
        return f"{who}{verb} attributes {attributes} nlri {' '.join(c.prefix for c in commands)}"
    return f"{who}{verb} route {prefix} {attributes}" if prefix else verb


class Effects:
    """What is to be done, each list in order: append the records (lines of JSON) to the journal, tell, then log."""

    def __init__(self) -> None:
        self.records: list[str] = []
        self.commands: list[Tell] = []
        self.messages: list[str] = []


class Now(NamedTuple):
    """One moment: `wall` in seconds since the epoch, for people; `mono` on the monotonic clock, for timers."""

    wall: float
    mono: float


class Attributes(dict[str, str]):
    """For each neighbor with a section of its own its attributes, and under "" those for all others."""

    @functools.cached_property
    def json(self) -> str:
        return json.dumps(self)


class Route(NamedTuple):
    """A blackhole that is held. Its attributes are kept so that its withdraw carries exactly the same."""

    prefix: str
    attributes: Attributes
    announced_at: float
    until: float | None = None  # seconds since the epoch; None: pinned, no timer ends it
    deadline: float | None = None  # the same end on the monotonic clock: a stepped clock moves nothing
    id: str = ""
    source: str = "pipe"
    reason: str = ""

    def json(self) -> str:
        """What the journal keeps and the state shows; a monotonic time means nothing after a restart of the host.

        Put together by hand: it stands between a line and its UPDATE, and json.dumps takes five times as long.
        """
        until = "null" if self.until is None else repr(self.until)
        return (
            f'{{"prefix": "{self.prefix}", "announced_at": {self.announced_at!r}, "until": {until}, '
            f'"id": {quote(self.id)}, "source": {quote(self.source)}, "reason": {quote(self.reason)}, '
            f'"attributes": {self.attributes.json}}}'
        )


@dataclasses.dataclass
class Neighbor:
    """What is known of a BGP neighbor; `audited`: its adj-RIB-out was compared since its session came up."""

    state: str = "unknown"  # up, down
    since: float = 0.0
    audited: bool = False
    flush: bool = False  # to be sent everything again: a flap in the middle of a burst loses routes


QUESTIONS = ("show neighbor configuration", "show neighbor summary", "show adj-rib out extensive")


class Blackholes:
    """Which prefixes are blackholed, what each neighbor was told, and what follows: the effects. No I/O, no clock.

    An audit asks ExaBGP for its neighbors and their adj-RIB-out, and repairs what differs from
    what is held: at start (what did a predecessor leave?), after a session comes up (a flap loses
    routes, a new neighbor has none), and after an answer that does not add up.
    """

    def __init__(self, settings: Settings) -> None:
        self.use(settings)
        self.effects = Effects()
        self.routes: dict[str, Route] = {}
        self.texts: dict[str, str] = {}  # what is published of each
        self.gone: dict[str, Attributes] = {}  # withdrawn, but perhaps still in ExaBGP's adj-RIB-out
        self.others: dict[str, list[str]] = {}  # in adj-RIB-out but not ours: prefix and neighbors
        self.neighbors: dict[str, Neighbor] = {}
        self.routers: set[Prefix] = set()  # the neighbors' addresses and ExaBGP's own: never blackholed
        self.unanswered: dict[str, int] = {}  # prefix: commands without an answer
        self.refused: set[str] = set()  # prefixes whose last announce ExaBGP refused
        self.refused_ids: deque[tuple[float, str]] = deque(maxlen=2000)  # of announces that a guard refused lately
        # Ids whose announcement is over before its time, and that time: a receiver that has not seen it held, or
        # was away, must not announce it again. Kept across restarts.
        self.ended: dict[str, float] = {}
        self.stopping = False
        self.audit_wanted, self.auditing = True, False
        self.introduced = False  # an audit was answered: neighbors and static routes are known
        self.touched: set[str] = set()  # prefixes changed since the audit in progress was asked for
        self.recent: deque[tuple[float, str]] = deque(maxlen=50)  # time, message

    def use(self, settings: Settings) -> None:
        self.settings = settings
        self.new_attributes: dict[int, Attributes] = {
            version: Attributes(
                {"": settings.bgp.attributes(version)},
                **{address: bgp.attributes(version) for address, bgp in settings.neighbors.items()},
            )
            for version in (4, 6)
        }

    # -- commands of the pipe

    def line(self, line: str | ValueError, now: Now) -> None:
        """What one line of the pipe does."""
        try:
            if isinstance(line, ValueError):
                raise line
            command = parse_line(line)
        except ValueError as error:
            self.note(now, str(error))
            return
        if command is None:
            return
        if command.prefix is None:
            self.withdraw_all(now)
        elif command.action == "withdraw":
            self.withdraw(command.prefix, now, command.id)
        else:
            self.announce(command.prefix, command, now)

    def announce(self, network: Prefix, command: Command, now: Now) -> None:
        prefix = network.text
        held = self.routes.get(prefix)
        if command.until is not None and self.ended.get(command.id) == command.until:
            self.note(now, f"KEPT {prefix}: the announcement of id {command.id} is over, and was written again")
            return
        refusal = self.refusal(network, held is not None)
        if refusal is None and command.until is not None and command.until <= now.wall:
            refusal = Refusal("until", "its end has passed")
        if refusal:
            self.refused_ids.append((now.mono, command.id))
            self.note(now, f"REFUSED {prefix}: {refusal.guard}: {refusal.why}")
            return
        if held and held.until is None and command.until is not None:
            self.end(command.id, command.until)
            self.note(now, f"ANNOUNCE {prefix} (stays pinned by an announce without an end)")
            self.tell("announce", prefix, held.attributes)
            return
        deadline = None if command.until is None else now.mono + command.until - now.wall
        route = Route(
            prefix, self.new_attributes[network.version], now.wall, command.until, deadline, command.id, command.source,
            command.reason,
        )  # fmt: skip
        if held and held.id != command.id:
            self.end(held.id, held.until)
        self.hold(route)
        self.note(now, f"ANNOUNCE {prefix}")
        self.tell("announce", prefix, route.attributes)

    def refusal(self, prefix: Prefix, held: bool) -> Refusal | None:
        """The guard that stops an announce of the prefix, if any."""
        refusal = check_prefix(prefix, self.settings.safety, self.routers)
        count = len(self.routes) + len(self.others)
        if refusal is None and prefix.text in self.others:
            refusal = Refusal("static", "exabgp.conf announces it: a later withdraw would end that")
        if refusal is None and not held and count >= self.settings.safety.max_routes:
            refusal = Refusal("max_routes", f"{count} routes are held")
        if refusal is None and prefix.version == 6:
            for neighbor in self.neighbors:
                if "." in neighbor and self.settings.bgp_of(neighbor).next_hop_ipv6 == "self":
                    why = f"self cannot work on the IPv4 session with {neighbor}: set an IPv6 address in [bgp]"
                    return Refusal("next_hop_ipv6", why)
        return refusal

    def withdraw(self, network: Prefix, now: Now, identity: str = "") -> None:
        """End a blackhole; with an `identity`, only the announcement of that id. Passed on, held or not."""
        prefix = network.text
        held = self.routes.get(prefix)
        if identity and (held.id != identity if held else prefix in self.others):
            by = f"announced again since by {held.source}" if held else "exabgp.conf announces it"
            self.note(now, f"KEPT {prefix}: {by}, id {identity} is over")
            return
        attributes = held.attributes if held else self.gone.get(prefix) or self.new_attributes[network.version]
        if held:
            self.release(prefix)
            self.end(held.id, held.until)
        self.audit_wanted = self.audit_wanted or prefix in self.others  # a static route is gone now
        self.note(now, f"WITHDRAW {prefix}")
        self.tell("withdraw", prefix, attributes)

    def withdraw_all(self, now: Now) -> None:
        self.note(now, f"WITHDRAW-ALL {len(self.routes)} routes")
        for prefix in list(self.routes):
            self.withdraw(parse_prefix(prefix), now)

    def expire(self, now: Now) -> None:
        """Withdraw what should long have been withdrawn: the backstop for a receiver that is gone."""
        while self.refused_ids and self.refused_ids[0][0] < now.mono - REMEMBER:
            self.refused_ids.popleft()
        for identity in [identity for identity, until in self.ended.items() if until <= now.wall]:
            del self.ended[identity]
        for prefix, route in list(self.routes.items()):
            if route.deadline is not None and now.mono >= route.deadline + BACKSTOP_GRACE:
                self.note(now, f"OVERDUE {prefix}: its end passed, nobody withdrew it")
                self.withdraw(parse_prefix(prefix), now)

    def reload(self, settings: Settings, now: Now) -> None:
        """Put new settings in force: end what is now protected, report the rest, renew attributes."""
        self.use(settings)
        for prefix, route in list(self.routes.items()):
            network = parse_prefix(prefix)
            refusal = check_prefix(network, settings.safety, self.routers)
            attributes = self.new_attributes[network.version]
            if refusal and refusal.guard == "whitelist":
                self.note(now, f"PROTECTED {prefix}: whitelist: {refusal.why}")
                self.withdraw(network, now)
                continue
            if refusal:
                self.note(now, f"WARNING: {prefix} stays blackholed: {refusal.guard}: {refusal.why}")
            if attributes != route.attributes:
                self.hold(route._replace(attributes=attributes))
                self.note(now, f"ANNOUNCE {prefix}")
                self.tell("announce", prefix, attributes)

    def stop(self, now: Now) -> None:
        """A clean end: the journal keeps what is held, for `restore = always`; the neighbors lose it."""
        self.stopping = True
        self.record({"do": "stop", "at": now.wall})
        for prefix, route in self.routes.items():
            self.note(now, f"WITHDRAW {prefix}")
            self.tell("withdraw", prefix, route.attributes)
        self.routes.clear()
        self.texts.clear()

    # -- what ExaBGP says

    def session(self, address: str, state: str, why: str, now: Now) -> None:
        """A BGP session came up or went down."""
        neighbor = self.neighbors.setdefault(address, Neighbor())
        self.routers.add(parse_prefix(address))
        up = state == "up"
        if state == neighbor.state == "down":
            return  # said again at every attempt to connect
        neighbor.state, neighbor.since, neighbor.audited = state, now.wall, False
        neighbor.flush = up and bool(self.routes or self.unanswered)  # nothing held, nothing lost
        self.audit_wanted = self.audit_wanted or up
        self.note(now, f"NEIGHBOR {address} {state}{': ' + printable(why) if why else ''}")

    def answered(self, command: Tell, accepted: bool, output: list[str], now: Now) -> None:
        """ExaBGP has answered a command."""
        if command.verb in QUESTIONS:
            self.introduced = self.introduced or command.verb == QUESTIONS[-1]
            if accepted:
                self.learn(command.verb, output, now)
            else:
                self.auditing = False
                self.note(now, "ERROR: ExaBGP does not say what it holds")
        prefix = command.prefix
        if not prefix:
            return
        last = self.count_answer(prefix)
        if last and accepted:
            self.forget(prefix)  # ExaBGP has carried out the last command, so a withdraw too
        if accepted:
            self.refused.discard(prefix)
            return
        self.refused.add(prefix)
        self.audit_wanted = self.audit_wanted or not command.repair
        self.note(now, f"ERROR: ExaBGP refused: {render([command])}")

    def count_answer(self, prefix: str) -> bool:
        """Whether no command about the prefix is without an answer any more."""
        left = self.unanswered.pop(prefix, 1) - 1
        if left > 0:
            self.unanswered[prefix] = left
        return left <= 0

    def never_answered(self, commands: Iterable[Tell], now: Now) -> None:
        """ExaBGP has left these commands without an answer: ask what became of them."""
        for command in commands:
            self.count_answer(command.prefix)
            self.audit_wanted = self.audit_wanted or not command.repair
            if command.verb in QUESTIONS:
                self.auditing, self.introduced = False, True  # don't wait for ever
        self.note(now, "ERROR: ExaBGP left commands unanswered; asking what it holds")

    def answered_late(self) -> None:
        """ExaBGP answers after all; what it made of the commands until now is to be seen in an audit."""
        self.unanswered.clear()
        self.audit_wanted = True

    # -- audits

    def ask(self) -> None:
        """Begin an audit if one is wanted and none is under way."""
        if self.audit_wanted and not self.auditing:
            self.audit_wanted, self.auditing = False, True
            self.touched.clear()
            self.effects.commands += [Tell(question) for question in QUESTIONS]

    def tell_again(self) -> None:
        """In place of an audit, where nothing answers: announce all that is held."""
        if self.audit_wanted:
            self.audit_wanted = False
            for prefix, route in self.routes.items():
                self.tell("announce", prefix, route.attributes)

    def learn(self, question: str, output: list[str], now: Now) -> None:
        if question == QUESTIONS[0]:
            self.learn_neighbors(output)
        elif question == QUESTIONS[1]:
            self.learn_sessions(output, now)
        else:
            self.auditing = False
            self.repair(parse_adj_rib_out(output), now)

    def learn_neighbors(self, output: list[str]) -> None:
        """The neighbors of exabgp.conf that the controller's announcements reach, and our own addresses."""
        found: dict[str, list[str]] = {}  # address: the processes that its `api` names
        address = ""
        for line in output:
            words = line.rstrip(";").split()
            if words[:1] == ["neighbor"] and len(words) > 1:
                address = words[1] if is_address(words[1]) else ""  # a range has no address until somebody connects
            elif not address:
                continue
            elif words[:1] == ["local-address"]:
                found.setdefault(address, [])
                self.routers.update(parse_prefix(word) for word in words[1:] if is_address(word))
            elif words[:1] == ["processes"]:
                found.setdefault(address, []).extend(word for word in words[1:] if word not in "[]")
        self.routers.update(map(parse_prefix, found))
        # The process may go by another name; where none has ours, each one's may be us.
        named = {address for address, processes in found.items() if PROCESS in processes}
        reached = named or {address for address, processes in found.items() if processes}
        # One that names no process may still be ours, by `processes-match`: then it has told us of its session.
        unnamed = {address for address, processes in found.items() if not processes}
        for known in set(self.neighbors) - reached - unnamed if found else ():
            del self.neighbors[known]
        for address in found:
            if address in reached:
                self.neighbors.setdefault(address, Neighbor())

    def learn_sessions(self, output: list[str], now: Now) -> None:
        """The sessions of neighbors from which no event has come; 4.2 lists the established ones alone."""
        established = {line.split()[0] for line in output if line.rstrip() and "established" in line.split()}
        wanted = self.audit_wanted
        for address, neighbor in self.neighbors.items():
            if neighbor.state == "unknown":
                self.session(address, "up" if address in established else "down", "", now)
                neighbor.flush = False
        self.audit_wanted = wanted  # what has long been up is part of the audit under way

    def repair(self, table: dict[str, dict[str, str]], now: Now) -> None:
        """Compare adj-RIB-out with what is held and mend the difference, but for what changed meanwhile."""
        missing: dict[str, list[str]] = {}
        self.refused &= self.touched  # what it refused is seen now: it is there, or announced again below
        for address in self.neighbors:
            has = table.get(address, {})
            for prefix, route in self.routes.items():
                wanted = communities_of(route.attributes.get(address, route.attributes[""]))
                if has.get(prefix) != wanted and prefix not in self.touched:
                    missing.setdefault(prefix, []).append(address)
        for prefix, addresses in missing.items():
            self.note(now, f"REPAIR announce {prefix} to {' '.join(addresses)}")
            self.tell("announce", prefix, self.routes[prefix].attributes, addresses, repair=True)
        self.others = {}
        for address in table.keys() & self.neighbors.keys():
            for prefix in table[address].keys() - self.routes.keys() - self.touched:
                if prefix in self.gone:
                    self.note(now, f"REPAIR withdraw {prefix} from {address}")
                    self.tell("withdraw", prefix, self.gone[prefix], [address], repair=True)
                else:
                    self.others.setdefault(prefix, []).append(address)
        listed = {prefix for has in table.values() for prefix in has}
        for prefix in self.gone.keys() - listed - self.touched - self.unanswered.keys():
            self.forget(prefix)
        for address, neighbor in self.neighbors.items():
            neighbor.audited = True
            if neighbor.flush:
                neighbor.flush = False
                self.effects.commands.append(Tell(f"neighbor {address} flush adj-rib out"))

    # -- what every change has in common

    def hold(self, route: Route) -> None:
        prefix, text = route.prefix, route.json()
        self.routes[prefix], self.texts[prefix] = route, text
        self.gone.pop(prefix, None)
        self.effects.records.append(f'{{"do": "announce", "route": {text}}}')

    def release(self, prefix: str) -> None:
        self.gone[prefix] = self.routes.pop(prefix).attributes
        del self.texts[prefix]
        self.record({"do": "withdraw", "prefix": prefix})

    def forget(self, prefix: str) -> None:
        """What was withdrawn has left adj-RIB-out; should it stand there again, it is none of ours."""
        if self.gone.pop(prefix, None) is not None:
            self.record({"do": "forget", "prefix": prefix})

    def end(self, identity: str, until: float | None) -> None:
        """Remember that the announcement of that id is over."""
        if identity and until is not None:
            self.ended[identity] = until
            self.record({"do": "end", "id": identity, "until": until})
            if len(self.ended) > ENDED_MAX:
                del self.ended[next(iter(self.ended))]

    def record(self, record: dict[str, Any]) -> None:
        self.effects.records.append(json.dumps(record))

    def tell(
        self, verb: str, prefix: str, attributes: Attributes, only: list[str] | None = None, repair: bool = False
    ) -> None:
        """The commands for a prefix: one for all neighbors, or one for each set of attributes."""
        if self.auditing and not repair:
            self.touched.add(prefix)
        commands = self.effects.commands
        addresses = self.neighbors if only is None else only
        if (len(attributes) == 1 and len(addresses) == len(self.neighbors)) or not addresses:
            commands.append(Tell(verb, prefix, attributes[""], "", repair))
            self.unanswered[prefix] = self.unanswered.get(prefix, 0) + 1
            return
        groups: dict[str, list[str]] = {}
        for address in addresses:
            groups.setdefault(attributes.get(address, attributes[""]), []).append(f"neighbor {address}")
        commands += [Tell(verb, prefix, text, f"{', '.join(who)} ", repair) for text, who in groups.items()]
        self.unanswered[prefix] = self.unanswered.get(prefix, 0) + len(groups)

    def delivery(self, prefix: str) -> dict[str, str]:
        """For each neighbor: advertised, pending, down or unknown."""
        refused, waits = prefix in self.refused, prefix in self.unanswered

        def status(neighbor: Neighbor) -> str:
            if neighbor.state != "up":
                return neighbor.state
            if refused:
                return "unknown"
            return "pending" if waits or not neighbor.audited else "advertised"

        return {address: status(neighbor) for address, neighbor in self.neighbors.items()}

    def note(self, now: Now, text: str) -> None:
        """Log it, and remember it for the status."""
        self.recent.append((now.wall, text))
        self.effects.messages.append(text)


def is_address(text: str) -> bool:
    try:
        return parse_prefix(text).host and "/" not in text
    except ValueError:
        return False


NAMES = {  # of well-known communities (RFC 1997, 3765, 7999), as ExaBGP prints them
    "no-export": "65535:65281",
    "no-advertise": "65535:65282",
    "no-export-subconfed": "65535:65283",
    "no-peer": "65535:65284",
    "blackhole": "65535:666",
}


def communities_of(attributes: str) -> str:
    """Communities and large communities of a command, or of a line of adj-RIB-out, in one comparable form.

    The next hop is left out: `self` is shown as an address there.
    """
    words = [NAMES.get(word, word) for word in re.sub(r"[\[\]]", " ", attributes).split()]
    return " ".join(sorted(word for word in words if re.fullmatch(r"\d+:\d+(:\d+)?", word)))


def parse_adj_rib_out(output: list[str]) -> dict[str, dict[str, str]]:
    """The answer to `show adj-rib out extensive`: for each neighbor its prefixes and their communities."""
    table: dict[str, dict[str, str]] = {}
    for line in output:
        found = re.match(r"neighbor (\S+) .*? ipv[46] unicast (\S+) (next-hop .*)", line)
        if found:
            table.setdefault(found[1], {})[found[2]] = communities_of(found[3].partition(" ")[2].partition(" ")[2])
    return table


# ---------------------------------------------------------------- the journal: what survives


class Journal(NamedTuple):
    """What a journal holds. `exabgp` names the ExaBGP process it was written under."""

    routes: dict[str, Route]
    gone: dict[str, Attributes]
    ended: dict[str, float]
    exabgp: str
    stopped: bool
    at: float  # seconds since the epoch: the last time in it


def read_journal(text: str) -> Journal:
    """Read a journal, one JSON record a line; a torn line (the host died) is skipped."""
    routes: dict[str, Route] = {}
    gone: dict[str, Attributes] = {}
    ended: dict[str, float] = {}
    exabgp, stopped, at = "", False, 0.0
    for line in text.splitlines():
        try:
            record = json.loads(line)
            at = max(at, float(record.get("route", record).get("announced_at", 0.0)), float(record.get("at", 0.0)))
            if record["do"] == "announce":
                fields = record["route"]
                route = Route(**{**fields, "attributes": Attributes(fields["attributes"])})
                check_record(route)
                routes[route.prefix] = route
                gone.pop(route.prefix, None)
            elif record["do"] == "withdraw":
                held = routes.pop(record["prefix"], None)
                if held:
                    gone[held.prefix] = held.attributes
            elif record["do"] == "forget":
                gone.pop(record["prefix"], None)
            elif record["do"] == "end":
                ended[record["id"]] = float(record["until"])
            elif record["do"] == "start":
                exabgp, stopped = record["exabgp"], False
            elif record["do"] == "stop":
                stopped = True
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return Journal(routes, gone, ended, exabgp, stopped, at)


def check_record(route: Route) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError for a route that no controller has written."""
    texts = [route.id, route.source, route.reason, route.attributes[""], *route.attributes.values()]
    whole = all(isinstance(text, str) for text in texts) and parse_prefix(route.prefix).text == route.prefix
    if not whole or not all(isinstance(at, (int, float)) for at in (route.announced_at, route.until or 0.0)):
        raise ValueError(route.prefix)


def restore(blackholes: Blackholes, journal: Journal, exabgp: str, now: Now) -> None:
    """Take over what a predecessor held, as `[safety] restore` says.

    The same ExaBGP: the controller died alone, its routes are still announced, they stay ours.
    Another one: ExaBGP or the host died, or was stopped; its routes are gone from the routers.
    """
    safety = blackholes.settings.safety
    same = journal.exabgp == exabgp
    why = ""
    if journal.stopped and safety.restore != "always":
        why = "after a clean stop"
    elif not same and safety.restore == "never":
        why = "restore = never"
    elif not same and now.wall - journal.at > safety.restore_max_age:
        why = f"last seen {now.wall - journal.at:.0f} s ago, above restore_max_age"
    blackholes.record({"do": "start", "at": now.wall, "exabgp": exabgp})
    blackholes.ended = dict(journal.ended)
    if same:
        blackholes.gone = dict(journal.gone)
    for route in journal.routes.values():
        over = not same and route.until is not None and route.until <= now.wall
        if why or over:
            blackholes.record({"do": "withdraw", "prefix": route.prefix})
            blackholes.end(route.id, route.until)
            if same:
                blackholes.gone[route.prefix] = route.attributes
            continue
        deadline = None
        if route.until is not None:  # the clock may have been stepped: never longer than it was to last
            deadline = now.mono + min(route.until - now.wall, route.until - route.announced_at)
        blackholes.hold(route._replace(deadline=deadline))
    if journal.routes:
        kept = len(blackholes.routes)
        forgotten = f", {len(journal.routes) - kept} not: {why or 'their time is over'}"
        blackholes.note(now, f"RESTORED {kept} blackholes{forgotten if kept < len(journal.routes) else ''}")
    blackholes.reload(blackholes.settings, now)


def snapshot(blackholes: Blackholes, exabgp: str, now: Now) -> list[str]:
    """The lines that say the same as a journal that has grown long."""
    lines = [json.dumps({"do": "start", "at": now.wall, "exabgp": exabgp})]
    for prefix, attributes in blackholes.gone.items():
        lines.append(f'{{"do": "announce", "route": {Route(prefix, attributes, 0.0).json()}}}')
        lines.append(f'{{"do": "withdraw", "prefix": "{prefix}"}}')
    lines += [json.dumps({"do": "end", "id": identity, "until": until}) for identity, until in blackholes.ended.items()]
    return lines + [f'{{"do": "announce", "route": {text}}}' for text in blackholes.texts.values()]


def publication(blackholes: Blackholes, version: str, now: Now) -> bytearray:
    """The published state as JSON; all times in seconds since the epoch.

    Most routes of a large table are as they were: their text is kept, and only put together here.
    """
    neighbors = {address: {"state": n.state, "since": n.since} for address, n in blackholes.neighbors.items()}
    head = json.dumps(
        {"heartbeat": now.wall, "pid": os.getpid(), "exabgp": version, "neighbors": neighbors}
        | {"refused_ids": [identity for _, identity in blackholes.refused_ids if identity]}
        | {"ended_ids": list(blackholes.ended), "stopping": blackholes.stopping}
        | {"withdrawing": [prefix for prefix in blackholes.unanswered if prefix not in blackholes.routes]}
        | {"recent": list(blackholes.recent)}
        | {"routers": [router.address for router in blackholes.routers]}
        | {"limits": {"max_routes": blackholes.settings.safety.max_routes}}
    )
    usual = json.dumps(blackholes.delivery(""))
    special = blackholes.unanswered.keys() | blackholes.refused
    text = bytearray(f'{head[:-1]}, "routes": ['.encode("ascii"))
    between = ""
    for prefix in blackholes.routes:
        delivery = json.dumps(blackholes.delivery(prefix)) if prefix in special else usual
        text += f'{between}{blackholes.texts[prefix][:-1]}, "neighbors": {delivery}}}'.encode("ascii")
        between = ", "
    for prefix, addresses in blackholes.others.items():
        route: dict[str, Any] = {
            "prefix": prefix,
            "source": "other",
            "announced_at": None,
            "until": None,
            "id": "",
            "reason": "",
        }
        route |= {"neighbors": dict.fromkeys(addresses, "advertised")}
        text += f"{between}{json.dumps(route)}".encode("ascii")
        between = ", "
    text += b"]}"
    return text


# ---------------------------------------------------------------- what is said to ExaBGP, and answered


NUDGE = Tell("")


class Answer(NamedTuple):
    """ExaBGP's answer to what one line held, with the lines it printed for a question."""

    commands: list[Tell]
    accepted: bool
    output: list[str]


class Dialogue:
    """The commands given to ExaBGP and the answers to come. No I/O: lines in, bytes out.

    ExaBGP answers each command with `done` or `error`, but 4.2 answers some not at all and may
    leave the tail of a burst unread, and a process started anew finishes the line that its
    predecessor left and reads the answers meant for it. Hence: a bare newline and `version`
    first, and no answer counts before ours to `version`; at most WINDOW bytes unanswered; after
    a second of silence a newline, whose answer is `error`.
    """

    WINDOW = 12 * 1024  # bytes
    LIST = 100  # prefixes in one line, when so many wait: ExaBGP takes twice as many a second that way
    SILENCE = 1.0  # seconds
    PATIENCE = 5  # silences before a greeting counts as never to be answered
    SETTLED = 0.25  # seconds without an answer after which none to a predecessor is still to come

    def __init__(self) -> None:
        self.version = ""  # ExaBGP's, once it has said it
        self.greeted = False
        self.answers = True  # False: nothing answers (acknowledgements are off), so nothing waits for answers
        self.silences = 0
        self.waiting: deque[Tell] = deque([NUDGE, Tell("version")])
        self.unanswered: deque[tuple[list[Tell], int]] = deque()  # what a line holds, and its bytes
        self.in_force: dict[tuple[str, bool], str] = {}  # neighbors and family: the attributes last told
        self.output: list[str] = []  # of a question, until its `done`
        self.unanswered_bytes = 0
        self.nudged = False
        self.last_heard = ""  # since a nudge

    def take(self) -> bytes:
        """The lines that may be written now."""
        out = []
        while self.waiting and (self.unanswered_bytes < self.WINDOW or not self.answers or self.waiting[0] is NUDGE):
            first = self.waiting[0]
            if first.prefix:  # ExaBGP sends each set of attributes by itself, in an order of its own: one at a time
                group = first.who, ":" in first.prefix
                if self.unanswered and self.in_force.get(group, first.attributes) != first.attributes:
                    break
                self.in_force[group] = first.attributes
            commands = [self.waiting.popleft()]
            while self.waiting and len(commands) < self.LIST and commands[0].joins(self.waiting[0]):
                commands.append(self.waiting.popleft())
            line = render(commands) + "\n"
            if self.answers:
                self.unanswered.append((commands, len(line)))
                self.unanswered_bytes += len(line)
            out.append(line)
        return "".join(out).encode("ascii")

    def hear(self, line: str) -> Answer | None:
        """Take one line that is not about a session; returns the answer that it completes, if any."""
        self.last_heard = line
        if line.startswith("exabgp "):
            self.version = line.split()[1]
        if not self.greeted:
            if self.version and line == "done":
                self.greeted = self.answers = True
                while self.unanswered and self.forget()[0].verb != "version":
                    pass
            return None
        if line not in ("done", "error"):
            self.output.append(line)
            return None
        output, self.output = self.output, []
        if not self.unanswered:
            return None
        commands = self.forget()
        self.nudged = self.nudged and commands[0] is not NUDGE
        return Answer(commands, line == "done", output)

    def forget(self) -> list[Tell]:
        commands, size = self.unanswered.popleft()
        self.unanswered_bytes -= size
        return commands

    def silent(self) -> tuple[str, list[Tell]]:
        """To be called after each SILENCE seconds without an answer.

        Returns what is to be logged, if anything, and the commands that will never be answered.
        """
        self.silences += 1
        if not self.greeted:
            if self.silences != self.PATIENCE:
                return "", []
            self.answers = False
            why = (
                "ERROR: ExaBGP answers nothing, so what it refuses or loses goes unseen: "
                "set ack = true in [exabgp.api] of exabgp.env"
            )
            return why, []
        if self.nudged and self.last_heard == "error":  # it has read all there was: what it left unanswered stays so
            left = [command for commands, _ in self.unanswered for command in commands if command is not NUDGE]
            self.unanswered.clear()
            self.unanswered_bytes, self.nudged, self.output = 0, False, []
            return "", left
        if self.unanswered and (self.last_heard or not self.nudged):  # else it is frozen: nothing since the last one
            self.nudged, self.last_heard = True, ""
            self.waiting.appendleft(NUDGE)
        return "", []


# ---------------------------------------------------------------- files: log, state, pipe


class Logger:
    """Writes A4's log lines from a thread of its own: a slow or dead disk never holds up its caller.

    The file is opened for each batch, so that it may be rotated or deleted at any time. What can't
    be written goes to stderr.
    """

    MANY = 10_000  # lines waiting for the disk above which more are dropped, and counted

    def __init__(self, path: str) -> None:
        self.path = path
        self.queue: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        self.lost = 0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def __call__(self, text: str) -> None:
        if self.queue.qsize() >= self.MANY:
            self.lost += 1
        else:
            self.queue.put((time.time(), text))

    def run(self) -> None:
        running = True
        while running:
            batch = [self.queue.get()]
            while self.queue.qsize():
                batch.append(self.queue.get())
            if self.lost:
                batch.insert(-1, (time.time(), f"ERROR: {self.lost} log lines were lost"))
                self.lost = 0
            running = None not in batch
            self.write("".join(f"{clock(entry[0])} {entry[1]}\n" for entry in batch if entry))

    def write(self, text: str) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"ERROR: cannot write {self.path}: {error.strerror}\n{text}")

    def close(self) -> None:
        """Write what is queued, for a second at most."""
        self.queue.put(None)
        self.thread.join(1.0)


@functools.lru_cache(maxsize=2)
def clock_second(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


def clock(seconds: float) -> str:
    """Local time, as people read it."""
    return clock_second(int(seconds))


def newest(waiting: queue.SimpleQueue[Any]) -> Any:
    """Wait for something in the queue, and take all there is; the last counts."""
    found = waiting.get()
    while waiting.qsize():
        found = waiting.get()
    return found


SPARE = 8 * 1024  # bytes of blanks, from one to two times as many, behind the state: room for what is to come


class Publisher:
    """Replaces the state file from a thread of its own, always with the newest text."""

    def __init__(self, path: str, log: Callable[[str], None]) -> None:
        self.path, self.log = path, log
        self.texts: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self.failed = ""
        threading.Thread(target=self.write, daemon=True).start()

    def __call__(self, text: bytearray) -> None:
        self.texts.put(text)

    def write(self) -> None:
        while True:
            text = newest(self.texts)
            text += b" " * (2 * SPARE - len(text) % SPARE)
            try:
                descriptor = os.open(f"{self.path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
                with open(descriptor, "wb") as file:
                    file.write(text)
                os.replace(f"{self.path}.new", self.path)
                failed = ""
            except OSError as error:
                failed = f"ERROR: cannot write the state: {error}"
                # A full disk takes it in the place of the old one, which has room to spare.
                with contextlib.suppress(OSError), open(self.path, "r+b") as file:
                    file.write(text)
                    file.truncate()
            if failed and failed != self.failed:
                self.log(failed)
            self.failed = failed


class JournalFile:
    """Appends records to the journal at once, and makes them durable from a thread of its own.

    An append waits for the page cache alone (some 15 microseconds). What can't be written stops
    nothing; as soon as the disk takes it again, the whole is written anew.
    """

    SPARE = 256 * 1024  # bytes that a journal may grow beyond twice its last snapshot

    def __init__(
        self, path: str, log: Callable[[str], None], durable: Callable[[int], None] = lambda request: None
    ) -> None:
        """`durable` is called in the thread, with the number of the last request that it has carried out."""
        self.path, self.log, self.on_durable = path, log, durable
        self.request = 0
        self.descriptor = -1
        self.size, self.limit = 0, 0  # a limit of 0: write a snapshot first
        self.failed = ""
        self.durable = 0  # bytes of the size, when last the thread was asked
        self.wanted: queue.SimpleQueue[int] = queue.SimpleQueue()  # requests
        self.lost: OSError | None = None  # what the thread met: the disk took the bytes, and did not keep them
        threading.Thread(target=self.run, daemon=True).start()

    def read(self) -> str:
        """The journal as it is; empty when there is none."""
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.fail(error)
            return ""

    def append(self, records: list[str]) -> None:
        if self.descriptor < 0:  # it could not be written: all of it is, soon
            return
        data = "\n".join([*records, ""]).encode("ascii")
        try:
            if os.write(self.descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.size += len(data)
        except OSError as error:
            self.fail(error)

    def full(self) -> bool:
        """Whether a snapshot is due: the journal has grown long, or could not be written."""
        return self.check() or self.size > self.limit

    def check(self) -> bool:
        """Whether the last that was appended is not on disk, and can't be."""
        if self.lost:
            self.fail(self.lost)
            self.lost = None
        return bool(self.failed)

    def rewrite(self, records: list[str]) -> None:
        """Begin a new journal that holds these records, and put it in the place of the old one."""
        self.close()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            self.descriptor = os.open(f"{self.path}.new", flags, 0o640)
            self.append(records)
            if self.descriptor < 0:
                return
            os.replace(f"{self.path}.new", self.path)
        except OSError as error:
            self.fail(error)
            return
        self.limit = 2 * self.size + self.SPARE
        if self.failed:
            self.log(f"The journal is written again: {self.path}")
        self.failed = ""
        self.synchronize()

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self.size, self.durable = -1, 0, 0

    def fail(self, error: OSError) -> None:
        text = f"ERROR: cannot write the journal {self.path}: {error.strerror}"
        if text != self.failed:
            self.log(f"{text}; what is announced or withdrawn now may be undone by a crash")
        self.failed = text
        self.close()

    def synchronize(self) -> int:
        """Have the thread make durable what was appended; returns the number of the request."""
        if self.size != self.durable:
            self.durable = self.size
            self.request += 1
            self.wanted.put(self.request)
        return self.request

    def run(self) -> None:
        while True:
            request = newest(self.wanted)
            try:
                os.fdatasync(self.descriptor)
            except ValueError:  # closed under us, for a new one
                pass
            except OSError as error:
                if error.errno != errno.EBADF:  # the same
                    self.lost = error
            self.on_durable(request)


def parent_process() -> str:
    """A name for the ExaBGP that runs us, which no other process on this host ever has."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat", encoding="ascii", errors="replace") as file:
            started = file.read().rpartition(")")[2].split()[19]
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{parent} {started} {file.read().strip()}"
    except (OSError, IndexError):
        return f"{parent} {time.time()}"


def read_state(path: str) -> dict[str, Any]:
    """The published state; empty when there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError):
        return {}
    whole = isinstance(state, dict) and isinstance(state.get("heartbeat"), (int, float))
    return state if whole else {}


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
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except PermissionError:
        os.chmod(path, 0o660)  # a PermissionError again when it is not ours
        log(f"ERROR: {path} had the wrong permissions; set to 0660")
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


class Watch:
    """Waits for descriptors, and has the handler of each that is ready called."""

    def __init__(self) -> None:
        self.poll = select.poll()
        self.handlers: dict[int, Callable[[], None]] = {}  # by descriptor

    def watch(self, descriptor: int, handler: Callable[[], None], event: int = select.POLLIN) -> None:
        self.handlers[descriptor] = handler
        self.poll.register(descriptor, event)

    def unwatch(self, descriptor: int) -> None:
        if self.handlers.pop(descriptor, None):
            self.poll.unregister(descriptor)

    def wait(self, seconds: float) -> None:
        for descriptor, _ in self.poll.poll(1000 * seconds):
            if descriptor in self.handlers:  # not ended by the one before
                self.handlers[descriptor]()


class Loop(Watch):
    """Moves bytes between the pipe, ExaBGP and the decisions; the only place that waits, and never for long."""

    QUEUE = 5_000  # commands waiting for ExaBGP above which the pipe is not read: its writers wait
    STOP = 1.5  # seconds for the last withdrawals; ExaBGP 5.0 kills its process after 2

    def __init__(self, settings: Settings, config: str | None, log: Logger) -> None:
        super().__init__()
        self.settings, self.config, self.log = settings, config, log
        self.blackholes = Blackholes(settings)
        self.effects = self.blackholes.effects
        self.journal = JournalFile(settings.paths.journal, log)
        self.exabgp = parent_process()
        self.dialogue = Dialogue()
        self.publish = Publisher(settings.paths.state_file, log)
        self.lines = LineReader()
        self.pipe = -1
        self.pipe_trouble = ""
        self.settled = False  # answers to a predecessor are over: from now on each one is ours
        self.out = b""  # taken from the dialogue, not yet written
        self.heard = b""  # the start of a line from ExaBGP
        self.stop_at: float | None = None
        self.running = True
        self.changed = True
        self.started = False
        # monotonic times: last publication, last answer, last bytes in the pipe, last look at the pipe's path
        self.published_at = self.answered_at = self.pipe_at = self.looked_at = self.expired_at = 0.0
        self.alive_at = self.follow_up_at = 0.0
        self.silent_since = time.monotonic()  # ExaBGP has left something unanswered

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
        self.watch(0, self.read_exabgp)
        self.watch(wake_read, lambda: self.read_signals(wake_read))
        while self.running:
            self.write_exabgp()  # first of all: everything else can wait until ExaBGP has its command
            self.housekeeping()
            self.write_exabgp()
            self.follow_up()
            self.wait(self.pause())
        self.journal.append(self.effects.records)  # read, but too late to be told: for the successor
        self.write_log()
        self.log("RTBH controller stopped")
        return 0

    def follow_up(self) -> None:
        """Log, publish and make durable, a moment after the deed: ExaBGP has the processor first.

        Once a second there is a heartbeat in any case; only the controller that has the pipe publishes.
        """
        now = self.now()
        if now.mono < self.follow_up_at:
            return
        self.write_log()
        self.journal.synchronize()
        if self.pipe >= 0 and (self.changed or now.mono >= self.published_at + HEARTBEAT):
            self.publish(publication(self.blackholes, self.dialogue.version, now))
            self.published_at, self.changed = now.mono, False
        # a large table takes long to print: spend at most a twentieth of the time on it
        self.follow_up_at = now.mono + max(PUBLISH_PAUSE, 20 * (time.monotonic() - now.mono))

    def write_log(self) -> None:
        for message in self.effects.messages:
            self.log(message)
        self.effects.messages.clear()

    def now(self) -> Now:
        return Now(time.time(), time.monotonic())

    def pause(self) -> float:
        if self.stop_at is not None or not self.settled:
            return 0.05
        if self.pipe < 0:
            return 0.1
        return max(0.001, self.follow_up_at - time.monotonic()) if self.changed else 0.25

    def housekeeping(self) -> None:
        now = self.now()
        if self.stop_at is not None:
            idle = not (self.out or self.dialogue.waiting or self.dialogue.unanswered)
            self.running = self.running and not idle and now.mono < self.stop_at
            return
        if now.mono - self.looked_at >= (0.1 if self.pipe < 0 else HEARTBEAT):
            self.looked_at = now.mono
            self.look_after_pipe()
            if self.started and self.journal.full():
                self.journal.rewrite(snapshot(self.blackholes, self.exabgp, now))
                self.effects.records.clear()  # the snapshot says it all
        if self.lines.partial and now.mono - self.pipe_at > 1.0:
            torn = self.lines.give_up()
            if torn:
                self.blackholes.line(torn, now)
        if not self.dialogue.unanswered:
            self.silent_since = now.mono
        if now.mono - max(self.answered_at, self.silent_since) >= Dialogue.SILENCE:
            self.silent_since = now.mono
            message, left = self.dialogue.silent()
            if message:
                self.blackholes.note(now, message)
            if left:
                self.blackholes.never_answered(left, now)
        if now.mono - self.expired_at >= 0.25:
            self.expired_at = now.mono
            self.blackholes.expire(now)
        if now.mono - self.alive_at >= ALIVE and self.blackholes.routes:
            self.alive_at = now.mono
            self.blackholes.record({"do": "alive", "at": now.wall})
        quiet = self.dialogue.greeted and now.mono - self.answered_at >= Dialogue.SETTLED
        self.settled = self.settled or quiet or not self.dialogue.answers
        if self.started and self.settled and self.dialogue.answers:
            self.blackholes.ask()
        elif self.started and self.settled:
            self.blackholes.tell_again()
        ready = self.settled and (self.blackholes.introduced or not self.dialogue.answers)
        full = len(self.dialogue.waiting) > self.QUEUE or not ready
        if full:
            self.pipe_at = now.mono  # the rest of a partial line waits in the pipe: it is not late, we are
            self.unwatch(self.pipe)
        elif self.pipe >= 0 and self.pipe not in self.handlers:
            self.watch(self.pipe, self.read_pipe)

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
                for _ in range(PIPE_SIZE // READ_SIZE):  # what was written before is not lost
                    self.read_pipe()
                self.unwatch(self.pipe)
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
                self.take_over()
                self.log("RTBH controller started")
        if trouble and trouble != self.pipe_trouble:
            self.log(trouble)
        self.pipe_trouble = trouble

    def take_over(self) -> None:
        """Learn what a predecessor held, and begin a journal of our own."""
        now = self.now()
        LastGood(self.settings.paths.state_dir, self.exabgp).write(self.config)
        journal = read_journal(self.journal.read())
        alive_at = read_state(self.settings.paths.state_file).get("heartbeat", 0.0)
        restore(self.blackholes, journal._replace(at=max(journal.at, alive_at)), self.exabgp, now)
        self.journal.rewrite(snapshot(self.blackholes, self.exabgp, now))
        self.effects.records.clear()  # the snapshot says it all

    def read_pipe(self) -> None:
        try:
            data = os.read(self.pipe, READ_SIZE)
        except BlockingIOError:
            return
        now = self.now()
        self.pipe_at = now.mono
        for line in self.lines.feed(data):
            self.blackholes.line(line, now)

    def read_exabgp(self) -> None:
        data = os.read(0, 65536)
        if not data:
            self.log("ExaBGP has gone (end of file on stdin)")
            self.running = False
            self.unwatch(self.pipe)  # what is in it is for the successor
        *lines, self.heard = (self.heard + data).split(b"\n")
        now = self.now()
        for raw in lines:
            line = raw.decode("utf-8", "replace").strip()
            words = line.split(maxsplit=3)
            if words[:1] == ["shutdown"]:
                self.stop(now, "ExaBGP is stopping")
            elif len(words) >= 3 and words[0] == "neighbor" and words[2] in ("up", "down") and is_address(words[1]):
                why = words[3].lstrip("- ") if len(words) > 3 else ""
                self.blackholes.session(words[1], words[2], why, now)
            elif line:
                self.answered_at = now.mono
                answered = self.dialogue.answers
                answer = self.dialogue.hear(line)
                if self.dialogue.answers and not answered:  # it was only late
                    self.settled = False  # answers to what was told meanwhile are still to come, and mean nothing
                    self.blackholes.answered_late()
                if answer:
                    self.changed = True
                    for command in answer.commands:
                        self.blackholes.answered(command, answer.accepted, answer.output, now)

    def write_exabgp(self) -> None:
        effects = self.effects
        if effects.records:
            self.journal.append(effects.records)
            effects.records.clear()
        if effects.commands:
            self.dialogue.waiting.extend(effects.commands)
            effects.commands.clear()
        try:
            while self.running:
                self.out = self.out or self.dialogue.take()
                if not self.out:
                    break
                self.out = self.out[os.write(1, self.out) :]
                os.sched_yield()  # Linux wakes a pipe's reader on the writer's processor, where it would wait for us
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.log("ExaBGP has gone (stdout is closed)")
            self.running = False
        if self.out:
            self.watch(1, lambda: None, select.POLLOUT)
        else:
            self.unwatch(1)
        if effects.messages and not self.changed:
            self.changed = True
            self.follow_up_at = max(self.follow_up_at, time.monotonic() + PUBLISH_PAUSE)

    def read_signals(self, descriptor: int) -> None:
        now = self.now()
        for number in os.read(descriptor, 64):
            if number == signal.SIGHUP:
                self.reload(now)
            else:
                self.stop(now, f"Received signal {number}, withdrawing all routes")

    def stop(self, now: Now, why: str) -> None:
        """A clean end: withdraw everything, wait for the answers, but not for long."""
        if not self.running:  # ExaBGP died first, and systemd ends the rest: that is no clean end
            return
        self.effects.messages.append(why)
        if self.stop_at is not None:
            return
        self.stop_at = now.mono + self.STOP
        if self.started:
            self.blackholes.stop(now)
        self.unwatch(self.pipe)

    def reload(self, now: Now) -> None:
        try:
            settings, warnings = load_settings(self.config, ignore="webhook")
        except SettingsError as error:
            self.blackholes.note(now, f"ERROR: settings not reloaded, the old ones stay: {error}")
            return
        if settings.paths != self.settings.paths:
            warnings.append("[paths] changes take effect when ExaBGP is restarted")
            settings = dataclasses.replace(settings, paths=self.settings.paths)
        self.settings = settings
        LastGood(settings.paths.state_dir, self.exabgp).write(self.config)
        self.log("Settings reloaded")
        for warning in warnings:
            self.log(f"WARNING: {warning}")
        self.blackholes.reload(settings, now)
        self.blackholes.audit_wanted = True  # exabgp.conf may have other static routes by now


# ---------------------------------------------------------------- commands


def print_status(path: str) -> int:
    """Print the published state for a person; 1 when the controller is away or no session is up."""
    state = read_state(path)
    if not state:
        print(f"no published state in {path}: is ExaBGP running? Its controller writes it.", file=sys.stderr)
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
        if route["source"] == "other":
            print(f"  {route['prefix']}  static in exabgp.conf")
            continue
        left = "pinned" if route["until"] is None else f"{max(0.0, route['until'] - time.time()):.0f} s left"
        reason = f" ({route['reason']})" if route["reason"] else ""
        print(f"  {route['prefix']}  since {clock(route['announced_at'])}  {left}  by {route['source']}{reason}")
        late = [f"{status} at {a}" for a, status in route["neighbors"].items() if status != "advertised"]
        if late:
            print(f"    {', '.join(late)}")
    refusals = [(at, text) for at, text in state["recent"] if re.match("INVALID|UNKNOWN|REFUSED|ERROR", text)]
    for at, text in refusals[-10:]:
        print(f"refused {clock(at)} {text}")
    return 0 if alive and any(n["state"] == "up" for n in state["neighbors"].values()) else 1


def reload_running(path: str) -> int:
    """Have the controller that publishes this state reread its settings; 1 when there is none."""
    state = read_state(path)
    if not -3 <= time.time() - state.get("heartbeat", 0.0) <= 3:
        print(f"no controller runs: {path} is old or missing", file=sys.stderr)
        return 1
    try:
        os.kill(state["pid"], signal.SIGHUP)
    except OSError as error:
        print(f"the controller, process {state['pid']}, can't be signalled: {error.strerror}", file=sys.stderr)
        return 1
    return 0


class LastGood:
    """The settings that this ExaBGP's controllers have run with, kept for the next one."""

    def __init__(self, state_dir: str, exabgp: str) -> None:
        self.path, self.head = os.path.join(state_dir, "last-good.conf"), f"# {exabgp}\n"

    def read(self) -> Settings | None:
        """The settings, None when there are none or when they are from before ExaBGP's start."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            with open(self.path, encoding="utf-8") as file:
                text = file.read()
            if text.startswith(self.head):
                settings, faults = parse_settings(text)
                if faults:
                    settings, _, faults = ignore_section(text, "webhook")
                return None if faults else settings
        return None

    def write(self, config: str | None) -> None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            with open(config_path(config), encoding="utf-8") as file:
                text = file.read()
            descriptor = os.open(f"{self.path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(self.head + text)
            os.replace(f"{self.path}.new", self.path)


def state_dir_of(text: str) -> str:
    """The state_dir that a file names, whatever else is wrong with it."""
    named = re.findall(r"(?m)^[ \t]*state_dir[ \t]*=[ \t]*(/.*?)[ \t]*$", text)
    return os.path.normpath(named[-1]) if named else Paths().state_dir


def last_good_settings(config: str | None) -> Settings | None:
    """What a controller that is started again by its ExaBGP falls back on, when the file can't be used now."""
    try:
        with open(config_path(config), encoding="utf-8") as file:
            state_dir = state_dir_of(file.read())
    except (OSError, UnicodeDecodeError):
        state_dir = Paths().state_dir
    return LastGood(state_dir, parent_process()).read()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="rtbh-controller", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="PATH", help=f"settings (default: $RTBH_CONFIG, else {DEFAULT_CONFIG})")
    parser.add_argument("--check", action="store_true", help="validate the settings, print what is in force, exit")
    parser.add_argument("--status", action="store_true", help="print what is blackholed, and the BGP sessions, exit")
    parser.add_argument("--reload", action="store_true", help="have the running controller reread the settings, exit")
    options = parser.parse_args()
    asks = options.check or options.status or options.reload
    try:
        settings, warnings = load_settings(options.config, ignore="webhook")
    except SettingsError as error:
        print(f"rtbh-controller: {error}", file=sys.stderr)
        last_good = None if asks else last_good_settings(options.config)
        if last_good is None:
            return os.EX_CONFIG
        settings, warnings = last_good, [f"the settings can't be used, the last good ones are in force: {error}"]
    if options.status:
        return print_status(settings.paths.state_file)
    if options.reload:
        return reload_running(settings.paths.state_file)
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
