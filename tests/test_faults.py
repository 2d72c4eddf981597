"""Whatever dies in the middle of a burst: afterwards peer, published state and what was asked for agree."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import StartTrio
from lab import LabError, Trio, Upstream, wait_for

PREFIXES = [f"192.0.2.{n}/32" for n in range(40)]
FAULTS = ("controller", "exabgp", "upstream", "reload", "none")


class Faults:
    """A trio, the lines that were written to its pipe, and what they must lead to."""

    def __init__(self, trio: Trio, upstream: Upstream, seed: int) -> None:
        self.trio, self.upstream, self.random = trio, upstream, random.Random(seed)
        self.model: set[str] = set()
        self.pipe = os.open(trio.pipe, os.O_RDWR)  # as the receiver's: what is unread outlives a controller
        self.history: list[str] = []

    def burst(self, size: int) -> list[str]:
        lines = []
        for _ in range(size):
            verb, prefix = self.random.choice(("announce", "withdraw")), self.random.choice(PREFIXES)
            lines.append(f"{verb} {prefix}")
        return lines

    def write(self, lines: list[str]) -> None:
        for start in range(0, len(lines), 100):
            os.write(self.pipe, "".join(f"{line}\n" for line in lines[start : start + 100]).encode())
        for line in lines:
            verb, prefix = line.split()
            (self.model.add if verb == "announce" else self.model.discard)(prefix)

    def strike(self, fault: str) -> None:
        self.history.append(fault)
        if fault == "controller":
            os.kill(self.trio.state()["pid"], signal.SIGKILL)
        elif fault == "exabgp":
            assert self.trio.daemon is not None
            self.trio.daemon.popen.kill()
            self.trio.daemon.popen.wait()
            self.upstream.poll()
            self.trio.start_exabgp()
        elif fault == "upstream":
            self.upstream.restart()
        elif fault == "reload":
            assert self.trio.daemon is not None
            self.trio.daemon.send(signal.SIGUSR1)

    def published(self) -> set[str]:
        """What a living controller says every neighbor was told; it waits for its heartbeat to go on."""
        state = self.trio.state()
        routes = state.get("routes", [])
        if any(status != "advertised" for route in routes for status in route["neighbors"].values()):
            return {"not yet"}
        return {route["prefix"] for route in routes}

    def agree(self) -> None:
        """Wait until peer, state and model are the same."""
        try:
            wait_for("agreement", lambda: self.upstream.table().keys() == self.published() == self.model, 30)
        except LabError:
            table = set(self.upstream.table())
            pytest.fail(
                f"{self.history}: peer lacks {self.model - table}, has {table - self.model} too much; "
                f"state differs by {self.published() ^ self.model}\n{self.trio.log_text()[-3000:]}"
            )

    def round(self, fault: str) -> None:
        before = set(self.model)
        first, second = self.burst(self.random.randrange(150)), self.burst(self.random.randrange(150))
        self.write(first)
        self.strike(fault)
        self.write(second)
        if fault in ("controller", "exabgp"):
            # What it had read and not yet recorded died with it: all lines are written again, as the
            # receiver does; what they don't name must be as it was.
            named = {line.split()[1] for line in first + second}
            wait_for("a session", lambda: "up" in str(self.trio.state().get("neighbors")))
            wait_for("the rest", lambda: self.published() - named == before - named, 30)
            self.write(first + second)
        self.agree()


@pytest.fixture
def faults(start_trio: StartTrio, exabgp: str, request: pytest.FixtureRequest) -> Iterator[Faults]:
    trio, upstream = start_trio(exabgp)
    harness = Faults(trio, upstream, request.param)
    yield harness
    os.close(harness.pipe)


@pytest.mark.parametrize("faults", [1, 2], indirect=True)
def test_nothing_is_lost_or_left_over_whatever_dies(faults: Faults) -> None:
    for fault in FAULTS:
        faults.round(fault)


@pytest.mark.slow
@pytest.mark.parametrize("faults", range(10, 14), indirect=True)
def test_fifty_rounds(faults: Faults) -> None:
    for _ in range(15):
        faults.round(faults.random.choice(FAULTS))


def test_a_full_disk_stops_nothing(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(newest_exabgp)
    journal: Path = trio.directory / "journal"
    os.kill(trio.state()["pid"], signal.SIGKILL)
    journal.unlink()
    journal.with_name("journal.new").symlink_to("/dev/full")
    trio.wait_for_log("cannot write the journal")
    trio.echo("announce 192.0.2.1")
    wait_for("the route", lambda: set(upstream.table()) == {"192.0.2.1/32"})
    journal.with_name("journal.new").unlink()
    trio.wait_for_log("The journal is written again")
