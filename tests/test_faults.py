"""Whatever dies in the middle of a burst: afterwards peer, published state and what was asked for agree."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import StartTrio
from lab import Event, LabError, Trio, Upstream, wait_for
from test_end_to_end import post

PREFIXES = [f"192.0.2.{n}/32" for n in range(40)]
MARK = "10.0.0.1/32"
FAULTS = ("controller", "exabgp", "upstream", "reload", "settings", "none")
SECOND = "[neighbor 127.0.0.3]\ncommunity = 65535:666 174:666\n"  # an upstream with needs of its own
COMMUNITIES = ("65535:666", "65535:666 64500:1")  # what `settings` changes to and fro


class Faults:
    """A trio with two upstreams, the lines that were written to its pipe, and what they must lead to."""

    def __init__(self, trio: Trio, upstreams: tuple[Upstream, Upstream], seed: int) -> None:
        self.trio, self.upstreams, self.random = trio, upstreams, random.Random(seed)
        self.model: set[str] = set()
        self.community = COMMUNITIES[0]
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
        assert self.trio.daemon is not None
        if fault == "controller":
            os.kill(self.trio.state()["pid"], signal.SIGKILL)
        elif fault == "exabgp":
            self.trio.daemon.popen.kill()
            self.trio.daemon.popen.wait()
            for upstream in self.upstreams:
                upstream.poll()
            self.trio.start_exabgp()
        elif fault == "upstream":
            self.random.choice(self.upstreams).restart()
        elif fault == "reload":
            self.trio.daemon.send(signal.SIGUSR1)
        elif fault == "settings":
            self.community = COMMUNITIES[self.community == COMMUNITIES[0]]
            self.trio.settings = f"[bgp]\ncommunity = {self.community}\n{SECOND}"
            self.trio.write_settings(self.trio.settings)
            os.kill(self.trio.state()["pid"], signal.SIGHUP)

    def published(self) -> set[str]:
        """What a living controller says every neighbor was told; it waits for its heartbeat to go on."""
        state = self.trio.state()
        routes = state.get("routes", [])
        if any(status != "advertised" for route in routes for status in route["neighbors"].values()):
            return {"not yet"}
        return {route["prefix"] for route in routes}

    def tables(self) -> list[set[tuple[str, str]]]:
        """What each upstream holds: prefix and communities."""
        return [{(p, " ".join(sorted(e.communities))) for p, e in u.table().items()} for u in self.upstreams]

    def wanted(self) -> list[set[tuple[str, str]]]:
        own = " ".join(sorted(self.community.split()))
        return [{(prefix, text) for prefix in self.model} for text in (own, "174:666 65535:666")]

    def agree(self) -> None:
        """Wait until peers, state and model are the same."""
        try:
            wait_for("agreement", lambda: self.tables() == self.wanted() and self.published() == self.model, 30)
        except LabError:
            differs = [table ^ wanted for table, wanted in zip(self.tables(), self.wanted())]
            pytest.fail(
                f"{self.history}: peers differ by {differs}; state by {self.published() ^ self.model}\n"
                f"{self.trio.log_text()[-3000:]}"
            )

    def round(self, fault: str) -> None:
        before, seen = set(self.model), [len(upstream.events) for upstream in self.upstreams]
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
        if set(self.history) == {"none"}:  # whatever dies has everything sent again, at any later moment
            self.mark()
            for upstream, start in zip(self.upstreams, seen):
                check_order(first + second, [event for event in upstream.events[start:] if event.prefix in PREFIXES])

    def mark(self) -> None:
        """Wait for a route that comes and goes: what was said before it has been sent, twice or in vain too."""
        for line, there in ((f"announce {MARK}", True), (f"withdraw {MARK}", False)):
            os.write(self.pipe, f"{line}\n".encode())
            wait_for(line, lambda there=there: all((MARK in u.table()) == there for u in self.upstreams))  # type: ignore[misc]


def check_order(lines: list[str], events: list[Event]) -> None:
    """Each prefix came and went at the peer in the order of the pipe; ExaBGP may leave out what was overtaken."""
    rest = {prefix: iter([line.split()[0] for line in lines if line.endswith(f" {prefix}")]) for prefix in PREFIXES}
    for event in events:
        verb = "announce" if event.sign == "+" else "withdraw"
        assert verb in rest[event.prefix], f"{event.prefix}: {verb} came out of order"


@pytest.fixture
def faults(start_trio: StartTrio, exabgp: str, directory: Path, request: pytest.FixtureRequest) -> Iterator[Faults]:
    second = Upstream(directory, exabgp, address="127.0.0.3")
    trio, upstream = start_trio(exabgp, SECOND, second=second)
    wait_for("both sessions", lambda: str(trio.state().get("neighbors")).count("'up'") == 2)
    harness = Faults(trio, (upstream, second), request.param)
    yield harness
    os.close(harness.pipe)


@pytest.mark.parametrize("faults", [1], indirect=True)
def test_nothing_is_lost_or_left_over_whatever_dies(faults: Faults) -> None:
    for fault in FAULTS:
        faults.round(fault)


@pytest.mark.slow
@pytest.mark.parametrize("faults", range(10, 14), indirect=True)
def test_fifty_rounds(faults: Faults) -> None:
    for _ in range(15):
        faults.round(faults.random.choice(FAULTS))


@pytest.mark.parametrize(
    ("faults", "rounds"), [(2, 20), pytest.param(3, 200, marks=pytest.mark.slow)], indirect=["faults"]
)
def test_the_order_at_each_peer_is_the_order_in_the_pipe(faults: Faults, rounds: int) -> None:
    for _ in range(rounds):
        faults.round("none")


def test_a_post_that_was_answered_200_survives_the_controllers_death(exabgp: str, start_trio: StartTrio) -> None:
    webhook = "max_announcements_per_minute = 1000\nmax_routes = 1000\n"
    trio, upstream = start_trio(exabgp, "[safety]\nmax_routes = 1000\n", webhook)
    order = random.Random(7)
    model: set[str] = set()
    for _ in range(3):
        controller = trio.state()["pid"]
        for count in range(40):
            prefix = order.choice(PREFIXES)
            action = order.choice(("announce", "withdraw"))
            status, _ = post(trio, json.dumps({"action": action, "target_ip": prefix}))
            if status == 200:
                (model.add if action == "announce" else model.discard)(prefix)
            if count == 20:
                os.kill(controller, signal.SIGKILL)
        wait_for("its successor", lambda pid=controller: trio.state()["pid"] != pid)  # type: ignore[misc]
        wait_for("all that was answered 200", lambda: upstream.table().keys() == advertised(trio) == model, 30)


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 6))])
def test_a_post_never_outlives_its_end_whichever_daemon_dies(
    newest_exabgp: str, start_trio: StartTrio, seed: int
) -> None:
    webhook = "max_announcements_per_minute = 1000\nmax_routes = 1000\n"
    trio, upstream = start_trio(newest_exabgp, "[safety]\nmax_routes = 1000\n", webhook)
    order = random.Random(seed)
    ends: dict[str, float] = {}
    for _ in range(4):
        for _ in range(order.randrange(5, 30)):
            prefix, length = order.choice(PREFIXES), order.choice((1, 2, 3, 600))
            body = {"target_ip": prefix, "withdraw_after": length}
            if post(trio, json.dumps(body))[0] == 200:
                ends[prefix] = time.time() + length
        for victim in order.sample(("receiver", "controller"), order.randrange(1, 3)):
            if victim == "controller":
                os.kill(trio.state()["pid"], signal.SIGKILL)
                continue
            assert trio.receiver is not None
            trio.receiver.popen.kill()
            trio.receiver.popen.wait()
            trio.start_receiver()
        wait_for("a living controller", lambda: time.time() - trio.state()["heartbeat"] < 0.5)

    def due() -> set[str]:
        return {prefix for prefix, end in ends.items() if end > time.time()}

    last = max([end for end in ends.values() if end < time.time() + 10], default=0)
    wait_for("all that ends soon", lambda: time.time() > last)
    wait_for("what lasts, and nothing else", lambda: upstream.table().keys() == advertised(trio) == due())


@pytest.mark.slow
def test_fifty_thousand_random_bodies(newest_exabgp: str, start_trio: StartTrio) -> None:
    """None gets a 5xx, and whatever reaches the pipe is a canonical command of an address that was posted."""
    webhook = "max_announcements_per_minute = 1000000\nmax_routes = 5000\n"
    trio, _ = start_trio(newest_exabgp, "[safety]\nmax_routes = 5000\n", webhook)
    order = random.Random(50)
    corpus = Path(__file__).parent / "corpus" / "bodies.jsonl"
    bodies = [
        case.get("body", case.get("latin1")).encode() for case in map(json.loads, corpus.read_text().splitlines())
    ]
    bodies = [body for body in bodies if len(body) < 5000]
    statuses = dict.fromkeys(range(600), 0)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", trio.port, timeout=20)) as connection:
        for _ in range(50_000):
            body = bytearray(order.choice(bodies))
            for _ in range(order.choice((0, 1, 1, 2, 8))):
                at = order.randrange(len(body) + 1)
                body[at : at + order.randrange(3)] = order.randbytes(order.randrange(3))
            connection.request("POST", "/", bytes(body), {"X-Auth-Token": trio.token})
            response = connection.getresponse()
            json.loads(response.read())
            statuses[response.status] += 1
    assert sum(statuses[n] for n in range(200, 500)) == 50_000
    assert statuses[200] > 1000
    log = trio.log_text("webhook.log")
    assert "failed" not in log
    assert "ERROR" not in log
    wait_for("the last line", lambda: all("'pending'" not in str(r) for r in trio.state()["routes"]))
    assert "INVALID" not in trio.log_text()
    assert "UNKNOWN" not in trio.log_text()


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


@pytest.mark.parametrize("file", ["rtbh-controller.log", "state.json.new"])
@pytest.mark.parametrize("trouble", ["full", "unwritable"])
def test_a_log_or_state_that_cannot_be_written_stops_nothing(
    newest_exabgp: str, start_trio: StartTrio, file: str, trouble: str
) -> None:
    trio, upstream = start_trio(newest_exabgp)
    trio.wait_for_log("RTBH controller started")
    path = trio.directory / file
    path.unlink(missing_ok=True)
    if trouble == "full":
        path.symlink_to("/dev/full")
    else:
        path.mkdir()
    trio.echo("announce 192.0.2.1", "announce 192.0.2.2", "withdraw 192.0.2.1")
    wait_for("the route", lambda: set(upstream.table()) == {"192.0.2.2/32"})
    log, error = ("exabgp.log", "cannot write") if "log" in file else ("rtbh-controller.log", "cannot write the state")
    trio.wait_for_log(error, log)
    assert post(trio, '{"target_ip": "192.0.2.4", "wait": 5}')[1].get("delivered") is True
    assert post(trio, '{"action": "withdraw", "target_ip": "192.0.2.4"}')[0] == 200
    if trouble == "full":
        path.unlink()
    else:
        path.rmdir()
    trio.echo("announce 192.0.2.3")
    wait_for("the state to be published again", lambda: len(advertised(trio)) == 2)
    trio.wait_for_log("ANNOUNCE 192.0.2.3/32")


# ---------------------------------------------------------------- life and death


def restart_exabgp(trio: Trio, number: signal.Signals) -> None:
    assert trio.daemon is not None
    trio.daemon.stop(number)
    trio.start_exabgp()


def advertised(trio: Trio) -> set[str]:
    return {r["prefix"] for r in trio.state()["routes"] if set(r["neighbors"].values()) == {"advertised"}}


@pytest.mark.parametrize(
    ("restore", "number", "back"),
    [
        ("crash", signal.SIGKILL, True),
        ("crash", signal.SIGTERM, False),
        pytest.param("always", signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param("never", signal.SIGKILL, False, marks=pytest.mark.slow),
    ],
)
def test_restore(exabgp: str, start_trio: StartTrio, restore: str, number: signal.Signals, back: bool) -> None:
    trio, upstream = start_trio(exabgp, f"[safety]\nrestore = {restore}\n")
    soon, later = time.time() + 1, time.time() + 600
    trio.echo(
        "announce 192.0.2.1", f"announce 192.0.2.2 until={later:.3f} id=b", f"announce 192.0.2.3 until={soon:.3f} id=c"
    )
    wait_for("three", lambda: len(upstream.table()) == 3)
    assert trio.daemon is not None
    trio.daemon.stop(number)
    wait_for("the router to lose them", lambda: not upstream.table())
    wait_for("the third one's end", lambda: time.time() > soon)
    trio.start_exabgp()
    expected = {"192.0.2.1/32", "192.0.2.2/32"} if back else set()
    wait_for("what comes back", lambda: advertised(trio) == expected == set(upstream.table()))
    trio.echo("announce 192.0.2.9")
    wait_for("the next", lambda: set(upstream.table()) == expected | {"192.0.2.9/32"})
    trio.echo("withdraw-all")  # what came back is owned again
    wait_for("nothing", lambda: not upstream.table())


def test_a_neighbor_added_by_a_reload_gets_what_is_held_with_its_own_attributes(
    exabgp: str, start_trio: StartTrio
) -> None:
    trio, first = start_trio(exabgp, "[neighbor 127.0.0.3]\ncommunity = 65535:666 174:666\n")
    trio.echo("announce 192.0.2.1", "announce 192.0.2.2")
    wait_for("two", lambda: len(first.table()) == 2)
    second = Upstream(trio.directory, exabgp, address="127.0.0.3")
    second.start()
    try:
        trio.upstreams["127.0.0.3"] = second.port
        trio.write_configuration(trio.controller)
        assert trio.daemon is not None
        trio.daemon.send(signal.SIGUSR1)
        wait_for("both at the new one", lambda: second.table().keys() == {"192.0.2.1/32", "192.0.2.2/32"})
        trio.echo("announce 192.0.2.3", "withdraw 192.0.2.1")
        both = {"192.0.2.2/32", "192.0.2.3/32"}
        wait_for("the same at both", lambda: first.table().keys() == second.table().keys() == both)
        assert {event.communities for event in first.table().values()} == {("65535:666",)}
        own = {tuple(sorted(event.communities)) for event in second.table().values()}
        assert own == {("174:666", "65535:666")}
        wait_for("the state", lambda: advertised(trio) == {"192.0.2.2/32", "192.0.2.3/32"})
        second.restart()
        wait_for("all again", lambda: second.table().keys() == {"192.0.2.2/32", "192.0.2.3/32"}, 30)
        trio.echo("withdraw-all")
        wait_for("none at both", lambda: not first.table() and not second.table())
    finally:
        second.stop()


def test_static_routes_are_counted_and_left_alone(exabgp: str, directory: Path) -> None:
    upstream = Upstream(directory, exabgp)
    trio = Trio(directory, exabgp, upstream.port, "[safety]\nmax_routes = 2\n")
    trio.static = "route 192.0.2.66/32 next-hop self community [65535:666];"
    upstream.start()
    try:
        trio.start_exabgp()
        wait_for("the static one", lambda: "192.0.2.66/32" in str(trio.state()["routes"]))
        assert trio.state()["routes"][0]["source"] == "other"
        trio.echo("announce 192.0.2.66", "announce 192.0.2.1", "announce 192.0.2.2")
        trio.wait_for_log("REFUSED 192.0.2.66/32: static")
        trio.wait_for_log("REFUSED 192.0.2.2/32: max_routes: 2 routes are held")
        wait_for("one more", lambda: upstream.table().keys() == {"192.0.2.1/32", "192.0.2.66/32"})
        trio.echo("withdraw-all")
        wait_for("the static one alone", lambda: upstream.table().keys() == {"192.0.2.66/32"})
        trio.static = trio.static.replace("192.0.2.66", "192.0.2.67")
        trio.write_configuration(trio.controller)
        assert trio.daemon
        trio.daemon.send(signal.SIGUSR1)
        os.kill(trio.state()["pid"], signal.SIGHUP)  # as `systemctl reload` does

        def static() -> set[str]:
            return {route["prefix"] for route in trio.state()["routes"] if route["source"] == "other"}

        wait_for("the new static one", lambda: "192.0.2.67/32" in static())
        trio.echo("announce 192.0.2.67")
        trio.wait_for_log("REFUSED 192.0.2.67/32: static")
        trio.echo("withdraw 192.0.2.66")  # ExaBGP 5.0 still announces it
        wait_for("the old one's end", lambda: static() == upstream.table().keys() == {"192.0.2.67/32"})
        trio.echo("announce 192.0.2.66")
        wait_for("both", lambda: upstream.table().keys() == {"192.0.2.66/32", "192.0.2.67/32"})
    finally:
        trio.stop()
        upstream.stop()


def test_exabgp_frozen_for_longer_than_the_hold_time(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp, hold_time=3)
    trio.echo("announce 192.0.2.1", "announce 192.0.2.2")
    wait_for("two", lambda: len(upstream.table()) == 2)
    assert trio.daemon is not None
    trio.daemon.send(signal.SIGSTOP)
    try:
        trio.echo("withdraw 192.0.2.1", *(f"announce 192.0.2.{n}" for n in range(3, 30)))
        wait_for("the router to give up", lambda: not upstream.table(), 30)
    finally:
        trio.daemon.send(signal.SIGCONT)
    everything = {f"192.0.2.{n}/32" for n in range(2, 30)}
    wait_for("all of it", lambda: advertised(trio) == everything == set(upstream.table()), 40)


def test_a_crash_of_exabgp_is_no_clean_stop_even_if_systemd_ends_the_rest(
    newest_exabgp: str, start_trio: StartTrio
) -> None:
    trio, upstream = start_trio(newest_exabgp)
    trio.echo("announce 192.0.2.1")
    wait_for("the route", lambda: set(upstream.table()) == {"192.0.2.1/32"})
    controller = trio.state()["pid"]
    assert trio.daemon
    os.kill(controller, signal.SIGSTOP)  # so that it learns both at once
    trio.daemon.popen.kill()
    trio.daemon.popen.wait()
    os.kill(controller, signal.SIGTERM)
    os.kill(controller, signal.SIGCONT)
    wait_for("its end", lambda: not Path(f"/proc/{controller}").exists())
    trio.start_exabgp()
    wait_for("the route again", lambda: advertised(trio) == set(upstream.table()) == {"192.0.2.1/32"})


@pytest.mark.slow
def test_a_controller_whose_exabgp_is_slow_to_answer_is_not_deaf_afterwards(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp)
    trio.echo("announce 192.0.2.1")
    wait_for("the route", lambda: set(upstream.table()) == {"192.0.2.1/32"})
    old = trio.state()["pid"]
    assert trio.daemon
    pid = trio.daemon.popen.pid
    os.kill(old, signal.SIGKILL)
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for("its successor", lambda: set(children.read_text().split()) - {str(old)})
    trio.daemon.send(signal.SIGSTOP)
    try:
        trio.wait_for_log("ExaBGP answers nothing")
    finally:
        trio.daemon.send(signal.SIGCONT)
    trio.echo("announce 192.0.2.2", "withdraw 192.0.2.1")
    wait_for("what was asked for", lambda: advertised(trio) == set(upstream.table()) == {"192.0.2.2/32"})


@pytest.mark.slow
def test_what_is_held_comes_back_even_if_exabgp_answers_nothing(
    newest_exabgp: str, start_trio: StartTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.ACK", "false")
    trio, upstream = start_trio(newest_exabgp)
    trio.wait_for_log("ExaBGP answers nothing")
    trio.echo("announce 192.0.2.1")
    wait_for("the route", lambda: set(upstream.table()) == {"192.0.2.1/32"})
    restart_exabgp(trio, signal.SIGKILL)
    wait_for("the route again", lambda: set(upstream.table()) == {"192.0.2.1/32"})
    trio.echo("withdraw-all")
    wait_for("its end", lambda: not upstream.table())


def test_a_pipe_that_cannot_be_made_is_waited_for(newest_exabgp: str, directory: Path) -> None:
    upstream = Upstream(directory, newest_exabgp)
    trio = Trio(directory, newest_exabgp, upstream.port)
    trio.pipe = directory / "run" / "rtbh.pipe"
    upstream.start()
    try:
        with pytest.raises(LabError):
            wait_for_start(trio)
        trio.wait_for_log(f"ERROR: cannot open the pipe {trio.pipe}: No such file or directory")
        trio.pipe.parent.mkdir()
        wait_for("the pipe", trio.pipe.is_fifo)
        trio.echo("announce 192.0.2.1")
        wait_for("the route", lambda: upstream.table().keys() == {"192.0.2.1/32"})
    finally:
        trio.stop()
        upstream.stop()


@pytest.mark.parametrize("mode", [0o000, 0o440])
def test_a_pipe_with_the_wrong_permissions_is_mended(newest_exabgp: str, directory: Path, mode: int) -> None:
    upstream = Upstream(directory, newest_exabgp)
    trio = Trio(directory, newest_exabgp, upstream.port)
    upstream.start()
    os.mkfifo(trio.pipe, mode)
    try:
        trio.start_exabgp()
        if os.geteuid():  # root may do anything
            trio.wait_for_log("had the wrong permissions; set to 0660")
        trio.echo("announce 192.0.2.1")
        wait_for("the route", lambda: upstream.table().keys() == {"192.0.2.1/32"})
    finally:
        trio.stop()
        upstream.stop()


def wait_for_start(trio: Trio) -> None:
    trio.patience = 2.0
    trio.start_exabgp()


def test_writers_wait_while_exabgp_does_not_read(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(newest_exabgp, "[safety]\nmax_routes = 100000\n")
    trio.echo("announce 192.0.2.1")
    wait_for("the first", lambda: set(upstream.table()) == {"192.0.2.1/32"})
    assert trio.daemon is not None
    trio.daemon.send(signal.SIGSTOP)
    written, stuck_since = 0, time.monotonic()
    pipe = os.open(trio.pipe, os.O_WRONLY | os.O_NONBLOCK)
    try:
        while time.monotonic() < stuck_since + 1:
            try:
                os.write(pipe, f"announce 10.0.{written >> 8}.{written & 255}\n".encode())
                written, stuck_since = written + 1, time.monotonic()
            except BlockingIOError:
                continue
        status = Path(f"/proc/{trio.state()['pid']}/status").read_text()
    finally:
        os.close(pipe)
        trio.daemon.send(signal.SIGCONT)
    assert 5_000 < written < 15_000  # what waits in the controller and in the pipe, and no more
    assert int(status.partition("VmHWM:")[2].split()[0]) < 40 * 1024  # kB
    wait_for("every line that was taken", lambda: len(upstream.table()) == written + 1, 30)
