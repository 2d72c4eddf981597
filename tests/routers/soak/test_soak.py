"""Hours of an operator's and a detector's life in minutes, at random, beside a model of what must be dropped.

RTBH_SOAK_SECONDS says how long (default 60), RTBH_SOAK_SEED repeats a run: the order of what
happens is the seed's, the moments are the machine's.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import MakeSite
from lab import LabError, wait_for
from topology import BYSTANDER, SETTINGS, Bird, Host, Site

pytestmark = [pytest.mark.root, pytest.mark.slow]

SECONDS = float(os.environ.get("RTBH_SOAK_SECONDS", "60"))
SEED = int(os.environ.get("RTBH_SOAK_SEED", "0")) or random.randrange(1, 1 << 32)
PREFIXES = [f"192.0.2.{n}/32" for n in range(110, 135)] + [f"2001:db8:1::{n:x}/128" for n in range(0x110, 0x11A)]
NEVER = [  # the pipe refuses these; the model does not know them
    "announce 192.0.2.0/24",
    "announce 198.51.100.1",
    "announce 203.0.113.10",
    "announce 2001:db8:1::/64",
    "announce 192.0.2.140/32; withdraw-all",
    "announce",
    "\x00\xff",
]
LATE = 5.0  # seconds that a timer's end may take to reach the router, with a receiver that was just killed


class Soak:
    """What is done at random, and the model: for each prefix that must be dropped when that ends; None: never."""

    def __init__(self, site: Site, host: Host, chance: random.Random) -> None:
        self.site, self.host, self.chance = site, host, chance
        self.model: dict[str, float | None] = {}
        self.did: Counter[str] = Counter()
        self.unsettled = False  # lines in the pipe that a dying controller would take with it
        self.away = False  # the controller was ended since the last check
        self.dead = 0  # the process id of the last one killed
        self.killed: list[float] = []  # monotonic: when
        self.settings = host.settings
        self.protected = ""  # a prefix that the whitelist holds, for a while

    # -- what people and detectors do

    def announce(self) -> None:
        prefix = self.chance.choice(PREFIXES)
        self.echo(f"announce {prefix}")
        if prefix != self.protected:
            self.model[prefix] = None

    def withdraw(self) -> None:
        prefix = self.chance.choice(PREFIXES)
        self.echo(f"withdraw {prefix}")
        self.model.pop(prefix, None)

    def withdraw_all(self) -> None:
        self.echo("withdraw-all")
        self.model.clear()

    def nonsense(self) -> None:
        self.echo(self.chance.choice(NEVER))

    def post(self) -> None:
        """A new blackhole, or the renewal of one; one pinned by hand stays pinned."""
        prefix, length = self.chance.choice(PREFIXES), self.chance.randint(1, 20)
        if self.posted(f'{{"target_ip": "{prefix}", "withdraw_after": {length}}}', prefix == self.protected):
            pinned = self.model.get(prefix, 0.0) is None
            self.model[prefix] = None if pinned else time.time() + length

    def post_withdraw(self) -> None:
        prefix = self.chance.choice(PREFIXES)
        if self.posted(f'{{"action": "withdraw", "target_ip": "{prefix}"}}'):
            self.model.pop(prefix, None)

    def posted(self, body: str, protected: bool = False) -> bool:
        """Whether it was taken; a 503 says that nothing was done."""
        answer = self.host.post(body)
        if protected:
            assert answer == {"error": "IP is whitelisted"}
            return False
        away = answer == {"error": "The controller cannot take commands now"}
        assert away or answer.get("status") == "ok", answer
        self.did["POST while the controller was away"] += away
        return not away

    def echo(self, line: str) -> None:
        if self.away:  # a line lost with the controller is sent again by the receiver: not into the middle of ours
            self.settle()
        self.host.echo(line)
        self.unsettled = True

    # -- what goes wrong

    def kill_controller(self) -> None:
        self.killed = [at for at in self.killed if at > time.monotonic() - 130]
        if len(self.killed) == 3:  # ExaBGP gives up after five in a minute
            self.did["kill_controller"] -= 1
            return
        self.killed.append(time.monotonic())
        self.before_an_end()
        self.dead = self.host.state()["pid"]
        os.kill(self.dead, signal.SIGKILL)

    def kill_exabgp(self) -> None:
        self.before_an_end()
        assert self.host.daemon
        self.host.daemon.popen.kill()
        self.host.daemon.popen.wait()
        self.host.start_exabgp()

    def restart_exabgp(self) -> None:
        self.before_an_end()
        assert self.host.daemon
        self.host.daemon.stop()
        self.host.start_exabgp()

    def kill_receiver(self) -> None:
        assert self.host.receiver
        self.host.receiver.popen.kill()
        self.host.receiver.popen.wait()
        self.host.start_receiver()

    def reload(self) -> None:
        """Protect another prefix, or none: its blackhole ends, and it can't be blackholed until the next reload."""
        self.settle()
        self.protected = self.chance.choice(["", *PREFIXES])
        self.host.settings = f"{self.settings}whitelist = {self.protected}\n"
        self.host.write_settings(self.host.settings)
        logs = ("rtbh-controller.log", "webhook.log")
        before = [self.host.log_text(log).count("Settings reloaded") for log in logs]
        assert self.host.receiver
        self.host.receiver.send(signal.SIGHUP)
        os.kill(self.host.state()["pid"], signal.SIGHUP)
        for log, count in zip(logs, before):
            wait_for(
                f"{log} to tell of the reload",
                lambda log=log, count=count: self.host.log_text(log).count("Settings reloaded") > count,  # type: ignore[misc]
            )
        self.model.pop(self.protected, None)

    def reload_exabgp(self) -> None:
        assert self.host.daemon
        self.host.daemon.send(signal.SIGUSR1)

    def flap(self) -> None:
        self.site.router.flap()

    def restart_router(self) -> None:
        self.site.router.stop()
        self.site.router.start()

    # -- checks

    def before_an_end(self) -> None:
        if self.unsettled or self.away:
            self.settle()
        self.away = True

    def settle(self) -> None:
        """Wait until the controller has read all lines, also those that change nothing, and holds what the model says.

        A new controller does not read the pipe at once: a reload, or death, could else overtake a line.
        """
        wait_for("the pipe to be read", lambda: unread(self.host.pipe) == 0, 60)
        self.wait("held by the controller", self.held)
        self.unsettled = self.away = False

    def held(self) -> set[str]:
        state = self.host.state()
        fresh = state["heartbeat"] > time.time() - 2 and state["pid"] != self.dead
        return {route["prefix"] for route in state["routes"] if route["source"] != "other"} if fresh else {"away"}

    def check(self) -> None:
        """Wait until the router drops what the model says."""
        self.settle()
        self.wait("dropped by the router", self.site.router.discards)

    def wait(self, what: str, actual: Callable[[], set[str]]) -> None:
        try:
            wait_for(what, lambda: self.agree(actual()), 60)
        except LabError:
            wrong = sorted(actual() ^ set(self.model))
            logs = [self.host.log_text(name).splitlines() for name in ("rtbh-controller.log", "webhook.log")]
            told = [line for log in logs for line in log if any(prefix in line for prefix in wrong)]
            text = "\n".join([*told[-40:], "the controller's last words:", *logs[0][-40:]])
            pytest.fail(f"seed {SEED}, after {dict(self.did)}: not as {what}: {wrong}; the model: {self.model}\n{text}")

    def agree(self, actual: set[str]) -> bool:
        now = time.time()
        for prefix in [prefix for prefix, end in self.model.items() if end and end < now - LATE]:
            del self.model[prefix]
        ending = {prefix for prefix, end in self.model.items() if end and end < now + 0.5}
        return actual | ending == set(self.model)

    def run(self, seconds: float) -> None:
        ways: dict[Callable[[], None], int] = {
            self.announce: 30,
            self.withdraw: 40,
            self.post: 60,
            self.post_withdraw: 15,
            self.withdraw_all: 1,
            self.nonsense: 5,
            self.kill_controller: 2,
            self.kill_exabgp: 1,
            self.restart_exabgp: 1,
            self.kill_receiver: 2,
            self.reload: 3,
            self.reload_exabgp: 1,
            self.flap: 1,
            self.restart_router: 1,
            self.check: 5,
        }
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            (way,) = self.chance.choices(list(ways), list(ways.values()))
            self.did[way.__name__] += 1
            way()
        self.check()
        never = [way.__name__ for way in ways if not self.did[way.__name__]]
        assert not never or seconds < 300
        assert self.did["POST while the controller was away"] < self.did["post"] / 4


def unread(pipe: Path) -> int:
    """The bytes that wait in a pipe."""
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)
    finally:
        os.close(descriptor)


def test_the_table_is_the_models(
    make_site: MakeSite, exabgp: str, record_property: Callable[[str, object], None]
) -> None:
    print(f"RTBH_SOAK_SEED={SEED}")  # shown if it fails
    site = make_site(Bird, exabgp)
    host = site.add_host()
    host.settings = SETTINGS + "restore = always\n"
    host.webhook_settings = "max_announcements_per_minute = 1000000\nmax_routes = 45\n"
    host.patience = 60
    host.start()
    soak = Soak(site, host, random.Random(SEED))
    soak.run(SECONDS)
    did = ", ".join(f"{count} {name}" for name, count in sorted(soak.did.items()))
    record_property("measured", f"soak of {SECONDS:.0f} s, seed {SEED}: {did}")
    assert site.loss(BYSTANDER) == 0
    assert site.exported() == set()
    for log in ("rtbh-controller.log", "webhook.log", "exabgp.log"):
        assert "Traceback" not in host.log_text(log)
        assert "please report it" not in host.log_text(log)
    host.echo("withdraw-all")
    site.wait_for_discards(set())
