"""The main job: echo and POST, through a real ExaBGP, seen as UPDATEs by a real BGP peer."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import StartTrio
from lab import LabError, Process, Trio, Upstream, clean_environment, free_port, wait_for

IPV6 = "[bgp]\nnext_hop_ipv6 = 100::1\n"
MANY = "[safety]\nmax_routes = 1000\n"


def curl(trio: Trio, body: str, *options: str) -> tuple[int, Any]:
    """What the documented curl call prints, and the status."""
    command = ["curl", "-sS", "-X", "POST", f"http://127.0.0.1:{trio.port}/", "-H", f"X-Auth-Token: {trio.token}"]
    command += ["-d", body, "-w", "\n%{http_code}", *options]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    text, _, status = answer.rpartition("\n")
    return int(status), json.loads(text)


def post(trio: Trio, body: str) -> tuple[int, Any]:
    """The same by the standard library, where there is no curl."""
    if shutil.which("curl"):
        return curl(trio, body)
    connection = http.client.HTTPConnection("127.0.0.1", trio.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/", body, {"X-Auth-Token": trio.token})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def held(upstream: Upstream, *prefixes: str) -> bool:
    return set(upstream.table()) == set(prefixes)


def test_echo_reaches_the_upstream(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp, IPV6)
    trio.echo("announce 192.0.2.100/32")
    wait_for("the announce", lambda: held(upstream, "192.0.2.100/32"))
    event = upstream.table()["192.0.2.100/32"]
    assert event.communities == ("65535:666",)
    assert event.large_communities == ()
    assert event.next_hop == "127.0.0.2"

    trio.echo("announce 192.0.2.101", "ANNOUNCE 2001:db8::1", "announce 192.0.2.102/32 for a test")
    everything = ("192.0.2.100/32", "192.0.2.101/32", "192.0.2.102/32", "2001:db8::1/128")
    wait_for("three more", lambda: held(upstream, *everything))
    assert upstream.table()["2001:db8::1/128"].next_hop == "100::1"
    wait_for("the state", lambda: {route["prefix"] for route in trio.state()["routes"]} == set(everything))

    trio.echo("withdraw 192.0.2.100/32")
    wait_for("the withdraw", lambda: held(upstream, *everything[1:]))
    trio.echo("withdraw-all")
    wait_for("all withdrawn", lambda: held(upstream))
    trio.wait_for_log(" WITHDRAW 2001:db8::1/128\n")
    log = trio.log_text()
    for message in (f"FIFO ready at {trio.pipe}", "RTBH controller started", "ANNOUNCE 192.0.2.100/32"):
        assert f" {message}\n" in log
    assert " WITHDRAW 192.0.2.100/32\n" in log
    assert "ERROR" not in log


def test_post_reaches_the_upstream(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp)
    answer = post(trio, '{"action": "announce", "target_ip": "192.0.2.100", "withdraw_after": 3600}')
    assert answer == (200, {"status": "ok", "prefix": "192.0.2.100/32", "withdraw_after": 3600})
    wait_for("the announce", lambda: held(upstream, "192.0.2.100/32"))
    assert upstream.table()["192.0.2.100/32"].communities == ("65535:666",)
    (route,) = wait_for("the state", lambda: trio.state()["routes"])
    assert route["source"] == "webhook"
    assert post(trio, '{"action": "withdraw", "target_ip": "192.0.2.100"}')[0] == 200
    wait_for("the withdraw", lambda: held(upstream))
    trio.wait_for_log("WEBHOOK WITHDRAW 192.0.2.100/32\n", "webhook.log")
    log = trio.log_text("webhook.log")
    assert f"Webhook receiver listening on port {trio.port}\n" in log
    assert "WEBHOOK ANNOUNCE 192.0.2.100/32 (auto-withdraw in 3600s)\n" in log


def test_a_post_waits_for_the_upstream_and_the_status_shows_it(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp, "[neighbor 127.0.0.1]\ncommunity = 174:666\n")
    status, answer = post(trio, '{"target_ip": "192.0.2.100", "wait": 5, "reason": "SYN flood"}')
    assert (status, answer["delivered"], answer["neighbors"]) == (200, True, {"127.0.0.1": "advertised"})
    wait_for("the announce", lambda: held(upstream, "192.0.2.100/32"))
    with urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{trio.port}/status", headers={"X-Auth-Token": trio.token}), timeout=9
    ) as response:
        (route,) = json.load(response)["routes"]
    assert (route["source"], route["reason"], route["neighbors"]) == ("webhook", "SYN flood", answer["neighbors"])
    _, dry = post(trio, '{"target_ip": "192.0.2.101", "dry_run": true}')
    command = "neighbor 127.0.0.1 announce route 192.0.2.101/32 next-hop self community [174:666]"
    assert dry == {"status": "dry-run", "prefix": "192.0.2.101/32", "withdraw_after": 3600, "command": command}
    status, answer = post(trio, '{"action": "withdraw", "target_ip": "192.0.2.100", "wait": 5}')
    assert (status, answer["delivered"]) == (200, True)
    wait_for("the withdraw", lambda: held(upstream))
    assert "ERROR" not in trio.log_text() + trio.log_text("webhook.log")


def test_a_post_ends_by_itself(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp)
    begin = time.time()
    assert post(trio, '{"target_ip": "192.0.2.100", "withdraw_after": 2}')[0] == 200
    wait_for("the announce", lambda: held(upstream, "192.0.2.100/32"))
    wait_for("its end", lambda: held(upstream), 4)
    _, withdrawn = (event.time for event in upstream.events if event.prefix)
    assert 2.0 <= withdrawn - begin < 3.0
    trio.wait_for_log("AUTO-WITHDRAW 192.0.2.100/32 after 2s timeout\n", "webhook.log")


def test_a_receiver_that_is_gone_leaves_no_blackhole(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(newest_exabgp)
    assert post(trio, '{"target_ip": "192.0.2.100", "withdraw_after": 1}')[0] == 200
    wait_for("the announce", lambda: held(upstream, "192.0.2.100/32"))
    assert trio.receiver is not None
    trio.receiver.popen.kill()
    wait_for("the controller's own withdraw", lambda: held(upstream))
    trio.wait_for_log("OVERDUE 192.0.2.100/32")


def test_a_settings_file_with_other_attributes(exabgp: str, start_trio: StartTrio) -> None:
    bgp = "[bgp]\ncommunity = 65535:666 174:666\nlarge_community = 65001:666:0\nnext_hop = 198.18.0.66\n"
    trio, upstream = start_trio(exabgp, bgp)
    trio.echo("announce 192.0.2.100")
    event = wait_for("the announce", lambda: upstream.table().get("192.0.2.100/32"))
    assert sorted(event.communities) == ["174:666", "65535:666"]
    assert event.large_communities == ("65001:666:0",)
    assert event.next_hop == "198.18.0.66"


BAD_LINES = (
    "announce 192.0.2.1/33",
    "announce 192.0.2.1/24",
    "announce 0.0.0.0/0",
    "announce 198.51.100.7",
    "announce 198.51.0.0/16",
    "announce fe80::1%eth0",
    "announce ١٩٢.0.2.1",
    "announce",
    "announce 192.0.2.9;withdraw-all",
    "withdraw-all 192.0.2.50",
    "blackhole 192.0.2.1",
    "announce route 192.0.2.7/33 next-hop self",
    "json shutdown",
    "x" * 5000,
)


def test_bad_lines_are_logged_and_change_nothing(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp)
    trio.echo("announce 192.0.2.50", *BAD_LINES, "announce 192.0.2.51")
    wait_for("the lines around them", lambda: held(upstream, "192.0.2.50/32", "192.0.2.51/32"))
    assert len([event for event in upstream.events if event.prefix]) == 2
    trio.wait_for_log("ANNOUNCE 192.0.2.51/32")
    complaints = [line[20:] for line in trio.log_text().splitlines()]
    complaints = [text for text in complaints if text.startswith(("INVALID command", "UNKNOWN action", "REFUSED"))]
    assert len(complaints) == len(BAD_LINES)


BAD_TARGETS = (
    "192.0.2.1\nannounce 192.0.2.2",
    "192.0.2.1 192.0.2.2",
    "192.0.2.1/33",
    "192.0.2.1/24",
    "2001:db8::1%a b\n",
    "١٩٢.0.2.1",
    "0.0.0.0/0",
    "198.51.0.0/16",
    "198.51.100.7",
)


def test_bad_posts_are_answered_and_change_nothing(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp)
    for target in BAD_TARGETS:
        status, answer = post(trio, json.dumps({"target_ip": target}))
        assert status in (400, 403)
        assert answer["error"].startswith(("target_ip: ", "IP is whitelisted", "Prefix too short"))
    for body in ("", "{", "[]", '{"target_ip": "192.0.2.1", "withdraw_after": "soon"}'):
        assert post(trio, body)[0] == 400
    assert post(trio, '{"target_ip": "192.0.2.50"}')[0] == 200
    wait_for("the good one", lambda: held(upstream, "192.0.2.50/32"))
    assert [event.prefix for event in upstream.events if event.prefix] == ["192.0.2.50/32"]


def test_twenty_thousand_commands_leave_the_session_up(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp, MANY, hold_time=9)
    order = random.Random(1)
    model: set[str] = set()
    lines = []
    for _ in range(20_000):
        prefix = f"10.0.0.{order.randrange(40)}/32"
        verb = order.choice(("announce", "withdraw"))
        lines.append(f"{verb} {prefix}")
        (model.add if verb == "announce" else model.discard)(prefix)
    writer = threading.Thread(target=trio.echo, args=lines)  # a full pipe makes it wait
    writer.start()
    trio.echo()  # another writer comes and goes meanwhile
    wait_for("the pipe to be read", lambda: not writer.is_alive(), 60)
    trio.echo("announce 10.9.9.9/32")
    wait_for("the last line", lambda: "10.9.9.9/32" in upstream.table(), 60)
    assert set(upstream.table()) == model | {"10.9.9.9/32"}
    begin = trio.state()["heartbeat"]
    wait_for("a hold time more", lambda: trio.state()["heartbeat"] > begin + 10, 15)
    upstream.poll()
    assert [event.sign for event in upstream.events if not event.prefix] == ["up"]
    assert set(upstream.table()) == model | {"10.9.9.9/32"}


# ---------------------------------------------------------------- BIRD


class Bird:
    """BIRD 2 as the upstream, on loopback and a high port, without touching the kernel's routes."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.socket = directory / "bird.ctl"
        (directory / "bird.conf").write_text(f"""\
log "{directory}/bird.log" all;
router id 127.0.0.1;
protocol device {{ }}
protocol bgp exabgp {{
  local 127.0.0.1 port {self.port} as 65000;
  neighbor 127.0.0.2 as 65001;
  multihop;
  passive on;
  ipv4 {{
    import filter {{ if (65535, 666) ~ bgp_community then {{ dest = RTD_BLACKHOLE; accept; }} reject; }};
    export none;
  }};
}}
""")
        command = [bird(), "-f", "-c", str(directory / "bird.conf"), "-s", str(self.socket)]
        self.process = Process("BIRD", command, directory / "bird.out", clean_environment())
        wait_for("BIRD's control socket", self.socket.exists)

    def routes(self) -> str:
        """The lines of `birdc show route all`."""
        command = [bird("birdc"), "-s", str(self.socket), "show", "route", "all"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout


def bird(program: str = "bird") -> str:
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"{program} is missing: install the package bird2")
    return found


@pytest.fixture
def bird_peer(directory: Path) -> Iterator[Bird]:
    bird()
    peer = Bird(directory)
    yield peer
    peer.process.stop()


def test_the_same_with_bird(exabgp: str, bird_peer: Bird, directory: Path) -> None:
    trio = Trio(directory, exabgp, bird_peer.port)
    try:
        trio.start()
        trio.echo("announce 192.0.2.100/32")
        routes = wait_for("the announce", lambda: "192.0.2.100/32" in bird_peer.routes() and bird_peer.routes())
        assert "192.0.2.100/32       blackhole" in routes
        assert "BGP.community: (65535,666)" in routes
        assert "BGP.next_hop: 127.0.0.2" in routes
        trio.echo("withdraw 192.0.2.100/32")
        wait_for("the withdraw", lambda: "192.0.2.100/32" not in bird_peer.routes())
        trio.echo("announce 192.0.2.101", "announce 192.0.2.102")
        wait_for("two", lambda: bird_peer.routes().count("blackhole") == 2)
        trio.echo("withdraw-all")
        wait_for("none", lambda: "blackhole" not in bird_peer.routes())
        assert post(trio, '{"target_ip": "192.0.2.100", "withdraw_after": 2}')[0] == 200
        wait_for("the POST's announce", lambda: "192.0.2.100/32" in bird_peer.routes())
        assert post(trio, '{"action": "withdraw", "target_ip": "192.0.2.100"}')[0] == 200
        wait_for("the POST's withdraw", lambda: "192.0.2.100/32" not in bird_peer.routes())
    except LabError as error:
        pytest.fail(f"{error}\n{trio.log_text()}\n{trio.words('exabgp.log')}\n{trio.words('bird.log')}")
    finally:
        trio.stop()
