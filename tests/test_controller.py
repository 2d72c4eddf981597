"""The controller as a process: signals, the pipe's file, the log, the state, and a second controller."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import StartTrio
from lab import ROOT, Trio, Upstream, clean_environment, wait_for
from rtbh_controller import Publisher, read_state

CONTROLLER = [sys.executable, str(ROOT / "rtbh_controller.py")]


def holds(upstream: Upstream, *prefixes: str) -> bool:
    return set(upstream.table()) == set(prefixes)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The controller as a command that ends by itself."""
    return subprocess.run(
        [*CONTROLLER, *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        stdin=subprocess.DEVNULL,
        env=clean_environment(**environment),
        check=False,
    )


def test_sigterm_withdraws_everything_and_exabgp_starts_it_anew(exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(exabgp)
    trio.echo(*(f"announce 192.0.2.{n}" for n in range(1, 31)))
    wait_for("30 routes", lambda: len(upstream.table()) == 30)
    first = trio.state()["pid"]
    os.kill(first, signal.SIGTERM)
    wait_for("all withdrawn", lambda: holds(upstream))
    trio.wait_for_log("Received signal 15, withdrawing all routes\n")
    wait_for("a new controller", lambda: trio.state()["pid"] != first)
    trio.echo("announce 192.0.2.99")
    wait_for("it to work", lambda: holds(upstream, "192.0.2.99/32"))
    assert [event.sign for event in upstream.events if not event.prefix] == ["up"]


def test_it_ends_when_exabgp_is_killed(exabgp: str, start_trio: StartTrio) -> None:
    trio, _ = start_trio(exabgp)
    controller = trio.state()["pid"]
    assert trio.daemon is not None
    trio.daemon.popen.kill()
    wait_for("the controller to end", lambda: not Path(f"/proc/{controller}").exists())
    assert "ExaBGP has gone" in trio.log_text()


def test_sighup_puts_new_settings_in_force_whole_or_not_at_all(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(newest_exabgp)
    controller = trio.state()["pid"]
    trio.echo("announce 192.0.2.1", "announce 192.0.2.2")
    wait_for("two routes", lambda: len(upstream.table()) == 2)

    trio.write_settings("[safety]\nwhitelist = 192.0.2.1\nmax_routes = lots\n")
    os.kill(controller, signal.SIGHUP)
    wait_for("the complaint", lambda: "[safety] max_routes: must be a whole number" in trio.log_text())
    trio.write_settings("[safety]\nwhitelist = 192.0.2.1\n[bgp]\ncommunity = 65535:666 174:666\n")
    os.kill(controller, signal.SIGHUP)
    wait_for("one route", lambda: holds(upstream, "192.0.2.2/32"))
    both = ["174:666", "65535:666"]
    wait_for("the new community", lambda: sorted(upstream.table()["192.0.2.2/32"].communities) == both)
    trio.echo("withdraw 192.0.2.2")
    wait_for("the withdraw with it", lambda: holds(upstream))
    assert trio.state()["pid"] == controller


def test_a_typo_and_then_a_death_leave_the_last_good_settings_in_force(
    newest_exabgp: str, start_trio: StartTrio
) -> None:
    trio, upstream = start_trio(newest_exabgp, "[safety]\nwhitelist = 192.0.2.1\n")
    trio.echo("announce 192.0.2.2")
    wait_for("the route", lambda: holds(upstream, "192.0.2.2/32"))
    first = trio.state()["pid"]
    trio.write_settings("[safety]\nwhitelist = 192.0.2.1/8\n")
    os.kill(first, signal.SIGKILL)
    wait_for("its successor", lambda: trio.state()["pid"] != first)
    trio.wait_for_log("the last good ones are in force: ")
    trio.echo("announce 192.0.2.1", "announce 192.0.2.3")
    wait_for("the route", lambda: holds(upstream, "192.0.2.2/32", "192.0.2.3/32"))
    trio.wait_for_log("REFUSED 192.0.2.1/32: whitelist")


def test_a_plain_file_in_the_pipes_place_is_moved_aside_and_never_executed(
    newest_exabgp: str, start_trio: StartTrio
) -> None:
    trio, upstream = start_trio(newest_exabgp)
    trio.pipe.unlink()
    trio.pipe.write_text("announce 192.0.2.66\n")  # root's echo while there was no pipe
    wait_for("a pipe again", trio.pipe.is_fifo)
    trio.echo("announce 192.0.2.1")
    wait_for("the line in the new pipe", lambda: holds(upstream, "192.0.2.1/32"))
    (aside,) = trio.directory.glob("rtbh.pipe.not-a-fifo-*")
    assert aside.read_text() == "announce 192.0.2.66\n"
    trio.wait_for_log("ANNOUNCE 192.0.2.1/32")
    log = trio.log_text()
    assert f"was no FIFO; moved to {aside}" in log
    assert log.count(f"FIFO ready at {trio.pipe}\n") == 2


def test_what_it_makes_is_for_its_group_and_nobody_else(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, _ = start_trio(newest_exabgp)
    wait_for("the log", lambda: (trio.directory / "rtbh-controller.log").exists())
    assert stat.S_IMODE(trio.pipe.stat().st_mode) == 0o660
    for name in ("rtbh-controller.log", "state.json"):
        assert stat.S_IMODE((trio.directory / name).stat().st_mode) & 0o137 == 0


def test_a_log_that_cannot_be_written_stops_nothing(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(newest_exabgp)
    log = trio.directory / "rtbh-controller.log"
    wait_for("the log", log.exists)
    log.rename(trio.directory / "rotated.log")
    log.symlink_to("/dev/full")
    trio.echo("announce 192.0.2.1")
    wait_for("the route", lambda: holds(upstream, "192.0.2.1/32"))
    wait_for("the complaint", lambda: "ERROR: cannot write" in (trio.directory / "exabgp.log").read_text())
    log.unlink()
    trio.echo("announce 192.0.2.2")
    wait_for("the log again", lambda: "ANNOUNCE 192.0.2.2/32" in trio.log_text())


def test_a_state_that_shrinks_on_a_full_disk_is_whole(directory: Path) -> None:
    path = directory / "state.json"
    publish = Publisher(str(path), lambda text: None)
    for routes in (["192.0.2.1/32"] * 2000, [], ["192.0.2.2/32"] * 100):
        state = {"heartbeat": 1.0, "routes": routes}
        publish(bytearray(json.dumps(state).encode()))
        wait_for("the state", lambda state=state: read_state(str(path)) == state)  # type: ignore[misc]
        if not path.with_name("state.json.new").is_symlink():
            path.with_name("state.json.new").symlink_to("/dev/full")


def test_a_second_controller_waits_for_the_first(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(newest_exabgp)
    with Second(trio) as second:
        wait_for("it to wait", lambda: f"Waiting: another controller reads {trio.pipe}" in trio.log_text())
        trio.echo(*(f"announce 192.0.2.{n}" for n in range(1, 41)))
        wait_for("every line with the first", lambda: len(upstream.table()) == 40)
        assert second.commands() == b"\nversion\n"
        assert trio.state()["pid"] != second.popen.pid
        trio.stop()
        wait_for("the second to take over", lambda: trio.state()["pid"] == second.popen.pid)
        trio.echo("announce 192.0.2.50")
        wait_for("its first command", lambda: b"announce route 192.0.2.50/32" in second.commands())


class Second:
    """Another controller on the trio's pipe, with this test at its stdin and stdout."""

    def __init__(self, trio: Trio) -> None:
        self.output = trio.directory / "second.out"
        with self.output.open("wb") as output:
            self.popen = subprocess.Popen(
                [*CONTROLLER, "--config", str(trio.config)], stdin=subprocess.PIPE, stdout=output
            )

    def commands(self) -> bytes:
        return self.output.read_bytes()

    def __enter__(self) -> Second:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.close()  # end of file ends it
        assert self.popen.wait(10) == 0


def test_many_writers_at_once(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(newest_exabgp, "[safety]\nmax_routes = 1000\n")

    def write(worker: int) -> None:
        for n in range(20):
            trio.echo(f"announce 10.0.{worker}.{n}", f"announce 10.1.{worker}.{n}")

    writers = [threading.Thread(target=write, args=(worker,)) for worker in range(20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    wait_for("800 routes", lambda: len(upstream.table()) == 800)
    wait_for("800 lines of log", lambda: trio.log_text().count(" ANNOUNCE ") == 800)
    assert "INVALID" not in trio.log_text()


def test_a_line_without_a_newline_is_refused_and_not_glued_to_the_next(
    newest_exabgp: str, start_trio: StartTrio
) -> None:
    trio, upstream = start_trio(newest_exabgp)
    with trio.pipe.open("w") as pipe:
        pipe.write("announce 192.0.2.1")
    wait_for("the complaint", lambda: "INVALID command: announce 192.0.2.1 (no newline at its end)" in trio.log_text())
    trio.echo("announce 192.0.2.2")
    wait_for("the next line", lambda: holds(upstream, "192.0.2.2/32"))


def test_an_idle_controller_sleeps(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, _ = start_trio(newest_exabgp)
    trio.echo("announce 192.0.2.1")  # a FIFO opened for reading alone would spin after this
    controller = trio.state()["pid"]

    def cpu() -> float:
        times = Path(f"/proc/{controller}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

    used, begin = cpu(), time.monotonic()
    wait_for("three heartbeats", lambda: time.monotonic() > begin + 3)
    assert cpu() - used < 0.3


# ---------------------------------------------------------------- commands


@pytest.fixture
def config(directory: Path) -> Path:
    path = directory / "rtbh.conf"
    path.write_text(f"[paths]\nstate_dir = {directory}\n")
    return path


def test_check_prints_what_is_in_force_and_never_the_token(config: Path) -> None:
    config.write_text("[webhook]\ntoken = hunter2\n[safety]\nmax_routes = 7\nallowed = 192.0.2.0/24\n")
    result = run("--config", str(config), "--check")
    assert (result.returncode, result.stderr) == (0, "")
    assert "max_routes = 7\n" in result.stdout
    assert "hunter2" not in result.stdout


def test_check_names_every_fault(config: Path) -> None:
    config.write_text("[safety]\nmax_routes = x\nwhitlist = 10.0.0.0/8\n[webhook]\nlisten = y\n")
    result = run("--check", RTBH_CONFIG=str(config))
    assert result.returncode == os.EX_CONFIG
    for fault in ("[safety] max_routes", "[safety] whitlist", "[webhook] listen"):
        assert fault in result.stderr
    assert "Traceback" not in result.stderr


def test_unusable_settings_end_it_with_their_section_and_key(config: Path) -> None:
    config.write_text("[bgp]\ncommunity = 1:2:3\n")
    result = run("--config", str(config))
    assert result.returncode == os.EX_CONFIG
    assert f"{config}: [bgp] community: 1:2:3 is not a community" in result.stderr
    missing = run("--config", str(config.with_name("none")))
    assert (missing.returncode, missing.stderr) == (
        os.EX_CONFIG,
        f"rtbh-controller: {config.with_name('none')}: no such file\n",
    )


def test_status_without_a_controller_says_so(config: Path) -> None:
    result = run("--config", str(config), "--status")
    assert result.returncode == 1
    assert "no published state" in result.stderr
    assert "Traceback" not in result.stderr


def test_status_is_for_a_person(newest_exabgp: str, start_trio: StartTrio) -> None:
    trio, upstream = start_trio(newest_exabgp)
    trio.echo("announce 192.0.2.1 until=1900000000 id=x source=webhook reason=SYN%20flood", "announce 198.51.100.1")
    wait_for("the route", lambda: holds(upstream, "192.0.2.1/32"))
    result = wait_for("the state", lambda: (r := run("--config", str(trio.config), "--status")).returncode == 0 and r)
    assert "neighbor 127.0.0.1 up since " in result.stdout
    assert "1 blackholes (limit 50)" in result.stdout
    assert "by webhook (SYN flood)" in result.stdout
    assert "REFUSED 198.51.100.1/32: whitelist" in result.stdout


def test_importing_does_nothing(directory: Path) -> None:
    code = "import rtbh_controller, webhook_receiver, threading; print(threading.active_count())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=directory)
    assert result.stdout == "1\n"
    assert list(directory.iterdir()) == []
