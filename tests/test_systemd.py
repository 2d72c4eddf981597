"""Installed on a host with a real systemd, with BIRD as the router at the other end of a cable."""

from __future__ import annotations

import fcntl
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import cache_directory
from guest import CannotRun, Guest, Namespace, needs
from lab import ROOT, LabError, Process, clean_environment
from lab import wait_for as wait

pytestmark = pytest.mark.root

wait_for = functools.partial(wait, seconds=60)  # services are started again after 5 s, and guests share processors
SOURCE = "/opt/source"  # where a guest sees the checkout
WHEELS = "/opt/wheels"
PIPE = "/run/exabgp/rtbh.pipe"
PREFIX = "192.0.2.100/32"
BIRD = """\
router id 198.51.100.1;
protocol device {}
protocol kernel { ipv4 { export all; }; }
protocol bgp host {
  local 198.51.100.1 as 65000;
  neighbor 198.51.100.10 as 65001;
  passive;
  ipv4 {
    import filter { if (65535, 666) ~ bgp_community then { dest = RTD_BLACKHOLE; accept; } reject; };
    export none;
  };
}
"""


class Router:
    """BIRD in a namespace of its own; what it blackholes stands in its kernel's table."""

    def __init__(self, directory: Path) -> None:
        needs("bird", "birdc")
        self.namespace = Namespace()
        (directory / "bird.conf").write_text(BIRD)
        command = ["bird", "-f", "-c", str(directory / "bird.conf"), "-s", str(directory / "bird.ctl")]
        self.process = Process("BIRD", self.namespace.inside(*command), directory / "bird.log", clean_environment())

    def connect(self, guest: Guest) -> None:
        self.namespace.link(guest, "eth0", "eth0", "198.51.100.1/24", "198.51.100.10/24")

    def blackholes(self) -> set[str]:
        """The host routes that the kernel discards."""
        found = self.namespace.run("ip", "-json", "route", "show", "type", "blackhole")
        return {f"{route['dst']}/32" for route in json.loads(found or "[]")}

    def close(self) -> None:
        self.process.stop()
        self.namespace.close()


class Host:
    """A guest with the trio installed, and its router."""

    def __init__(self, guest: Guest, router: Router) -> None:
        self.guest, self.router = guest, router
        self.run, self.shell = guest.run, guest.shell

    def boot(self) -> None:
        self.guest.boot()
        self.router.connect(self.guest)

    def start(self) -> None:
        self.run("systemctl", "start", "exabgp", "exabgp-webhook")
        wait_for("the session", lambda: "neighbor 198.51.100.1 up" in self.status())

    def status(self) -> str:
        return self.run("rtbh-controller", "--status", check=False)

    def announce(self, prefix: str = PREFIX) -> None:
        self.shell(f"echo announce {prefix} > {PIPE}")
        self.wait_for(self.router.blackholes() | {prefix})

    def post(self, body: str) -> dict[str, object]:
        token = '"X-Auth-Token: $(cat /etc/exabgp/webhook-token)"'
        answer = self.shell(f"curl -sS -X POST http://127.0.0.1:8099/ -H {token} -d '{body}'")
        found: dict[str, object] = json.loads(answer)
        return found

    def wait_for(self, prefixes: set[str], seconds: float = 30.0) -> None:
        wait_for(
            f"{prefixes or 'nothing'} at the router", lambda: self.router.blackholes() == prefixes, seconds=seconds
        )

    def main_pid(self, unit: str) -> int:
        return int(self.run("systemctl", "show", "--property=MainPID", "--value", unit))

    def set(self, key: str, value: str) -> None:
        """Put a key of rtbh.conf in force, whose line in the file as installed begins with # or not."""
        file = self.guest.path("/etc/exabgp/rtbh.conf")
        text, count = re.subn(rf"(?m)^#?{key} =.*", f"{key} = {value}", file.read_text())
        assert count == 1
        file.write_text(text)


@pytest.fixture(scope="session")
def wheels() -> Path:
    """What an installation without the network needs, as pip finds it."""
    home = cache_directory() / "wheels"
    home.mkdir(parents=True, exist_ok=True)
    with (cache_directory() / "wheels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "ready").exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(home)]
            for wanted in (["exabgp==5.0.15", "hatchling>=1.18"], ["--no-deps", "exabgp==4.2.25", "setuptools"]):
                subprocess.run(pip + wanted, check=True)
            (home / "ready").touch()
    return home


def new_guest(directory: Path, wheels: Path, like: Path | None = None) -> Guest:
    try:
        needs("bird", "birdc", "curl", "logrotate")
        return Guest(directory, {ROOT: SOURCE, wheels: WHEELS}, like)
    except CannotRun as error:
        pytest.skip(str(error))


def install(guest: Guest, *options: str, check: bool = True, **environment: str) -> str:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": WHEELS} | environment
    return guest.run(f"{SOURCE}/systemd/install.sh", *options, check=check, **offline)


@pytest.fixture(scope="session")
def installed(wheels: Path) -> Iterator[Path]:
    """Where a host lies on which the trio was installed, and which was then switched off."""
    with tempfile.TemporaryDirectory(prefix="rtbh-test-") as path:
        guest = new_guest(Path(path), wheels)
        try:
            boot(guest)
            install(guest, "--allowed", "192.0.2.0/24, 2001:db8::/32")
            guest.power_off()
        finally:
            guest.close()
        yield Path(path)


def boot(guest: Guest) -> None:
    try:
        guest.boot()
    except CannotRun as error:
        pytest.skip(str(error))


@pytest.fixture
def router(directory: Path) -> Iterator[Router]:
    try:
        router = Router(directory)
    except CannotRun as error:
        pytest.skip(str(error))
    yield router
    router.close()


@pytest.fixture
def bare(directory: Path, router: Router, wheels: Path) -> Iterator[Host]:
    """A host on which nothing is installed."""
    guest = new_guest(directory, wheels)
    try:
        boot(guest)
        router.connect(guest)
        yield Host(guest, router)
    finally:
        guest.close()


@pytest.fixture
def host(directory: Path, router: Router, installed: Path, wheels: Path) -> Iterator[Host]:
    """A host with the trio installed, which has been started with it."""
    guest = new_guest(directory, wheels, installed)
    host = Host(guest, router)
    try:
        host.boot()
        yield host
    finally:
        guest.close()


def readme(heading: str) -> str:
    """The first block of commands under a heading of the README."""
    section = (ROOT / "README.md").read_text().partition(f"\n## {heading}\n")[2]
    return section.partition("```sh\n")[2].partition("```")[0]


def test_install_start_announce_in_one_paste(bare: Host) -> None:
    paste = readme("Install")
    assert "systemctl start" in paste
    # root's umask may be a strict one: what is installed is for the services' user all the same
    bare.shell(f"umask 077; export PIP_NO_INDEX=1 PIP_FIND_LINKS={WHEELS}; cd {SOURCE}; {paste}")
    bare.wait_for({PREFIX})


def test_pipe_and_post_and_a_clean_stop(host: Host) -> None:
    host.start()
    host.announce()
    assert host.post('{"action": "announce", "target_ip": "192.0.2.101", "withdraw_after": 3600}')["status"] == "ok"
    assert host.post('{"target_ip": "192.0.2.102", "withdraw_after": 1}')["status"] == "ok"
    host.wait_for({PREFIX, "192.0.2.101/32"})  # the third has come and gone
    assert host.post('{"target_ip": "203.0.113.7"}') == {"error": "Not in allowed prefixes"}
    begin = time.monotonic()
    host.run("systemctl", "stop", "exabgp")
    host.wait_for(set(), 5)
    assert time.monotonic() - begin < 5
    for unit in ("exabgp", "exabgp-webhook"):
        assert host.run("systemctl", "is-active", unit, check=False) == "inactive\n"
        assert host.run("journalctl", "--quiet", "--unit", unit, "--grep", "Started|Stopped")
        assert "Traceback" not in host.run("journalctl", "--unit", unit)
    assert not host.guest.path("/run/exabgp").exists()  # an echo now gets an error, and makes no plain file
    host.run("systemctl", "start", "exabgp")
    wait_for("the receiver", lambda: host.run("systemctl", "is-active", "exabgp-webhook", check=False) == "active\n")
    wait_for("the session", lambda: "neighbor 198.51.100.1 up" in host.status())
    assert "\n0 blackholes" in host.status()


def test_reload_puts_both_files_in_force_or_harms_nothing(host: Host) -> None:
    host.start()
    for prefix in (PREFIX, "192.0.2.101/32"):
        host.announce(prefix)
    pids = [host.main_pid(unit) for unit in ("exabgp", "exabgp-webhook")]
    settings, bgp = (host.guest.path(f"/etc/exabgp/{name}") for name in ("rtbh.conf", "exabgp.conf"))
    good, good_bgp = settings.read_text(), bgp.read_text()
    for file, broken in ((bgp, good_bgp.replace("hold-time 90;", "hold-time 90")), (settings, good + "[bgp]\nx = 1\n")):
        before = file.read_text()
        file.write_text(broken)
        with pytest.raises(LabError, match=r"Job for exabgp\.service failed"):
            host.run("systemctl", "reload", "exabgp")
        file.write_text(before)
    with pytest.raises(LabError, match="failed"):
        host.shell("echo 'x = 1' >> /etc/exabgp/rtbh.conf; systemctl reload exabgp-webhook")
    assert host.router.blackholes() == {PREFIX, "192.0.2.101/32"}
    settings.write_text(good.replace("    203.0.113.10/32", "    192.0.2.101\n    203.0.113.10/32"))
    bgp.write_text(good_bgp.replace("# route 192.0.2.66/32", "route 192.0.2.66/32"))
    host.run("systemctl", "reload", "exabgp", "exabgp-webhook")
    host.wait_for({PREFIX, "192.0.2.66/32"})
    assert host.post('{"target_ip": "192.0.2.101"}') == {"error": "IP is whitelisted"}
    wait_for(
        "the static route to be known",
        lambda: host.post('{"target_ip": "192.0.2.66"}') == {"error": "Announced by exabgp.conf already"},
    )
    assert pids == [host.main_pid(unit) for unit in ("exabgp", "exabgp-webhook")]


@pytest.mark.parametrize(("restore", "back"), [("crash", set()), ("always", {PREFIX})])
def test_restart_and_reboot_forget_or_bring_back(host: Host, restore: str, back: set[str]) -> None:
    host.set("restore", restore)
    host.start()
    host.announce()
    host.run("systemctl", "restart", "exabgp")
    wait_for("the session", lambda: "neighbor 198.51.100.1 up" in host.status())
    host.wait_for(back)
    host.announce()
    host.guest.power_off()
    host.wait_for(set())
    host.boot()  # enabled units start by themselves
    wait_for("the session", lambda: "neighbor 198.51.100.1 up" in host.status())
    host.wait_for(back)


def test_after_a_power_failure_every_blackhole_is_back_with_its_end(host: Host) -> None:
    host.start()
    host.announce()
    assert host.post('{"target_ip": "192.0.2.101"}')["status"] == "ok"
    assert host.post('{"target_ip": "192.0.2.102", "withdraw_after": 3}')["status"] == "ok"
    host.wait_for({PREFIX, "192.0.2.101/32", "192.0.2.102/32"})
    host.guest.pull_the_plug()
    host.wait_for(set(), 120)
    end = time.monotonic() + 3
    wait_for("the third's end", lambda: time.monotonic() > end)
    host.boot()
    host.wait_for({PREFIX, "192.0.2.101/32"}, 60)
    status = host.shell('curl -sS http://127.0.0.1:8099/status -H "X-Auth-Token: $(cat /etc/exabgp/webhook-token)"')
    ends = {route["prefix"]: route["expires_at"] for route in json.loads(status)["routes"]}
    assert ends[PREFIX] is None
    assert ends["192.0.2.101/32"]


def test_whatever_is_killed_comes_back_by_itself_with_every_blackhole(host: Host) -> None:
    host.start()
    host.announce()
    assert host.post('{"target_ip": "192.0.2.101"}')["status"] == "ok"
    all_of_them = {PREFIX, "192.0.2.101/32"}
    host.wait_for(all_of_them)

    def controller() -> int:
        state = json.loads(host.guest.path("/var/lib/exabgp/state.json").read_text())
        return int(state["pid"])

    was = controller()
    host.run("kill", "-KILL", str(was))
    wait_for("another controller", lambda: controller() != was)
    assert host.router.blackholes() == all_of_them
    for unit in ("exabgp-webhook", "exabgp"):
        old = host.main_pid(unit)
        host.run("kill", "-KILL", str(old))
        wait_for(f"another {unit}", lambda u=unit, o=old: host.main_pid(u) not in (0, o))  # type: ignore[misc]
    host.wait_for(all_of_them)
    wait_for("the receiver", lambda: host.shell("curl -sS 127.0.0.1:8099/health", check=False) == '{"status": "ok"}')
    assert host.post('{"action": "withdraw", "target_ip": "192.0.2.101"}')["status"] == "ok"
    host.wait_for({PREFIX})


def test_a_receiver_that_hangs_is_started_again(host: Host) -> None:
    host.shell("mkdir -p /run/systemd/system/exabgp-webhook.service.d")
    host.guest.path("/run/systemd/system/exabgp-webhook.service.d/test.conf").write_text("[Service]\nWatchdogSec=2\n")
    host.run("systemctl", "daemon-reload")
    host.start()
    old = host.main_pid("exabgp-webhook")
    host.run("kill", "-STOP", str(old))
    wait_for("another receiver", lambda: host.main_pid("exabgp-webhook") not in (0, old))
    assert host.run("journalctl", "--quiet", "--unit", "exabgp-webhook", "--grep", "Watchdog timeout")


def test_a_mistake_in_a_file_is_named_in_the_status(host: Host) -> None:
    host.start()
    file, bgp = (host.guest.path(f"/etc/exabgp/{name}") for name in ("rtbh.conf", "exabgp.conf"))
    for path, good, bad, unit, named in (
        (file, "[safety]", "[safety2]", "exabgp", "[safety2]: unknown section"),
        (file, "#max_routes = 50", "max_routes = many", "exabgp", "[safety] max_routes: "),
        (bgp, "hold-time 90;", "hold-time 90", "exabgp", "exabgp.conf is not a valid config file"),
        (file, "#listen = 127.0.0.1:8099", "listen = here", "exabgp-webhook", "[webhook] listen: "),
    ):
        before = path.read_text()
        assert good in before
        path.write_text(before.replace(good, bad))
        with pytest.raises(LabError, match="Job for exabgp"):
            host.run("systemctl", "restart", unit)
        words = ["systemctl", "status", "--no-pager", unit]
        wait_for("the end of the attempt", lambda: "Active: failed" in host.run(*words, check=False))  # noqa: B023
        assert named in host.run(*words, check=False)
        path.write_text(before)
        host.run("systemctl", "start", unit)
    wait_for("the receiver", lambda: host.run("systemctl", "is-active", "exabgp-webhook", check=False) == "active\n")


def test_a_crash_while_a_file_is_half_edited_is_tried_until_it_is_whole(host: Host) -> None:
    host.start()
    host.announce()
    for name in ("rtbh.conf", "exabgp.conf"):
        file = host.guest.path(f"/etc/exabgp/{name}")
        before = file.read_text()
        file.write_text(before + "\n[half")
        host.run("kill", "-KILL", str(host.main_pid("exabgp")))
        failed = "systemctl show --property=NRestarts --value exabgp"
        wait_for("a second attempt", lambda: int(host.shell(failed)) > 1)  # noqa: B023
        file.write_text(before)
        host.wait_for({PREFIX})
        wait_for("the session", lambda: "neighbor 198.51.100.1 up" in host.status())
        host.run("systemctl", "restart", "exabgp")  # it counts anew
        wait_for("the session", lambda: "neighbor 198.51.100.1 up" in host.status())
        host.announce()


def test_a_fault_that_may_pass_is_tried_again(host: Host) -> None:
    host.start()
    host.run("systemctl", "stop", "exabgp-webhook")
    take = "import socket; s = socket.create_server(('127.0.0.1', 8099)); print(flush=True); input()"
    with subprocess.Popen(
        host.guest.enter("python3", "-c", take), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(LabError, match="the control process exited with error code"):
            host.run("systemctl", "start", "exabgp-webhook")
        other.stdin.close()
    wait_for("the receiver", lambda: host.run("systemctl", "is-active", "exabgp-webhook", check=False) == "active\n")


def test_a_full_disk_stops_nothing(host: Host) -> None:
    disk = "mount -t tmpfs -o size=300k,mode=750,uid=$(id -u exabgp),gid=$(id -g exabgp) tmpfs /var/lib/exabgp"
    host.run("systemctl", "stop", "exabgp")  # it was started when the host was
    host.shell(disk)
    host.start()
    host.announce()
    host.shell("head -c 1M /dev/zero > /var/lib/exabgp/filler", check=False)
    more = {f"192.0.2.{n}/32" for n in range(101, 121)}
    host.shell(f"printf 'announce %s\\n' {' '.join(more)} > {PIPE}")
    host.wait_for({PREFIX} | more)
    assert host.post('{"target_ip": "192.0.2.121", "wait": 5}')["delivered"] is True
    host.run("systemctl", "reload", "exabgp")
    assert "controller running" in host.status()
    host.shell("rm /var/lib/exabgp/filler")
    journal = host.guest.path("/var/lib/exabgp/journal")
    wait_for("the journal", lambda: all(f'"{prefix}"' in journal.read_text() for prefix in more))
    host.run("kill", "-KILL", str(host.main_pid("exabgp")))
    host.wait_for(set())
    host.wait_for({PREFIX, "192.0.2.121/32"} | more)


def test_who_may_write_the_pipe_and_read_the_token(host: Host) -> None:
    host.start()
    assert host.post('{"target_ip": "192.0.2.101"}')["status"] == "ok"
    modes = host.run(
        "stat", "-c", "%a %U:%G %n", "/run/exabgp", PIPE, "/run/exabgp/exabgp.in", "/etc/exabgp/webhook-token",
        "/etc/exabgp/rtbh.conf", "/etc/exabgp/exabgp.conf", "/etc/exabgp/exabgp.env",
        "/var/lib/exabgp", "/var/lib/exabgp/journal",
        "/var/lib/exabgp/webhook-orders", "/var/log/exabgp", "/var/log/exabgp/webhook.log",
        "/var/log/exabgp/rtbh-controller.log",
    )  # fmt: skip
    assert modes.splitlines() == [
        "750 exabgp:exabgp /run/exabgp",
        f"660 exabgp:exabgp {PIPE}",
        "600 exabgp:exabgp /run/exabgp/exabgp.in",
        "600 root:root /etc/exabgp/webhook-token",
        "640 root:exabgp /etc/exabgp/rtbh.conf",
        "640 root:exabgp /etc/exabgp/exabgp.conf",
        "640 root:exabgp /etc/exabgp/exabgp.env",
        "750 exabgp:exabgp /var/lib/exabgp",
        "640 exabgp:exabgp /var/lib/exabgp/journal",
        "640 exabgp:exabgp /var/lib/exabgp/webhook-orders",
        "750 exabgp:exabgp /var/log/exabgp",
        "640 exabgp:exabgp /var/log/exabgp/webhook.log",
        "640 exabgp:exabgp /var/log/exabgp/rtbh-controller.log",
    ]
    nobody = "setpriv --reuid=nobody --regid=nogroup --clear-groups"
    operator = "setpriv --reuid=nobody --regid=nogroup --groups=exabgp"
    for refused in (f"echo announce {PREFIX} > {PIPE}", "cat /etc/exabgp/webhook-token", "cat /etc/exabgp/rtbh.conf"):
        with pytest.raises(LabError, match="Permission denied"):
            host.shell(f"{nobody} bash -c '{refused}'")
    token = host.guest.path("/etc/exabgp/webhook-token").read_text().strip()
    assert len(token) == 32
    assert token not in host.shell("ps -ef; cat /proc/*/environ; journalctl; cat /var/log/exabgp/*; systemctl show '*'")
    host.shell(f"{operator} bash -c 'echo announce {PREFIX} > {PIPE}'")
    host.wait_for({PREFIX, "192.0.2.101/32"})


def test_exabgps_own_settings_are_in_force(host: Host) -> None:
    file = host.guest.path("/etc/exabgp/exabgp.env")
    file.write_text(file.read_text().replace("level = INFO", "level = DEBUG"))
    host.run("systemctl", "restart", "exabgp")
    words = ["journalctl", "--quiet", "--unit", "exabgp", "--grep", "local-as"]
    wait_for("a line that only DEBUG writes", lambda: host.run(*words, check=False))


def test_exabgps_own_command_line_works(host: Host) -> None:
    host.start()
    assert "198.51.100.1" in host.shell("exabgp cli show neighbor summary || exabgp cli 'show neighbor summary'")
    host.announce()  # and the controller does not mind


def test_the_units_are_sound_and_hardened(host: Host, record_property: Callable[[str, object], None]) -> None:
    for unit in ("exabgp.service", "exabgp-webhook.service"):
        said = host.shell(f"systemd-analyze verify /etc/systemd/system/{unit} 2>&1")
        assert said == ""
        found = host.run("systemd-analyze", "security", "--threshold=12", "--no-pager", unit)  # exposure at most 1.2
        record_property("measured", found.strip().splitlines()[-1])


def test_logs_survive_rotation(host: Host) -> None:
    host.start()
    host.announce()
    log = host.guest.path("/var/log/exabgp/rtbh-controller.log")
    wait_for("the log", lambda: f"ANNOUNCE {PREFIX}" in log.read_text())
    host.run("logrotate", "--force", "/etc/logrotate.d/exabgp-rtbh")
    host.announce("192.0.2.101/32")
    wait_for("the new log", lambda: log.exists() and "ANNOUNCE 192.0.2.101/32" in log.read_text())
    assert f"ANNOUNCE {PREFIX}" in log.with_name("rtbh-controller.log.1").read_text()


def test_an_upgrade_restarts_nothing_while_blackholes_are_held(host: Host) -> None:
    token = host.guest.path("/etc/exabgp/webhook-token").read_text()
    host.set("restore_max_age", "7")
    before = host.shell("cd /etc/exabgp; sha256sum *.conf *.env")
    host.start()
    host.announce()
    pid = host.main_pid("exabgp")
    running = host.shell("readlink -f /opt/exabgp-rtbh/current").strip()
    for _ in range(2):
        assert "nothing was restarted, since 1 blackholes are held" in install(host.guest)
    assert host.main_pid("exabgp") == pid
    assert host.guest.path(running).exists()  # what the running daemons may still load from
    with pytest.raises(LabError, match=r"rtbh\.conf is there already, and stays as it is"):
        install(host.guest, "--allowed", "192.0.2.0/25")
    config = host.guest.path("/etc/exabgp/rtbh.conf")
    good, new = config.read_text(), host.shell("readlink -f /opt/exabgp-rtbh/current")
    config.write_text(good + "\n[bgp]\ncommunity = here\n")
    with pytest.raises(LabError, match=r"nothing was changed: .*bgp"):
        install(host.guest, "--restart")
    assert host.shell("readlink -f /opt/exabgp-rtbh/current") == new
    config.write_text(good)
    assert host.router.blackholes() == {PREFIX}
    host.shell(f"echo withdraw {PREFIX} > {PIPE}")
    host.wait_for(set())
    host.run("systemctl", "disable", "exabgp-webhook")
    assert "restarting both services" in install(host.guest)
    assert host.run("systemctl", "is-enabled", "exabgp-webhook", check=False) == "disabled\n"
    assert not host.guest.path(running).exists()
    assert host.main_pid("exabgp") != pid
    assert host.shell("cd /etc/exabgp; sha256sum *.conf *.env") == before
    assert host.guest.path("/etc/exabgp/webhook-token").read_text() == token
    wait_for("the session", lambda: "neighbor 198.51.100.1 up" in host.status())
    host.announce()
    install(host.guest, "--restart")
    host.wait_for(set())
    install(host.guest, "--uninstall")
    left = host.shell("ls -d /etc/systemd/system/exabgp* /opt/exabgp-rtbh /usr/local/bin/*rtbh* /usr/local/bin/exabgp "
                      "/etc/exabgp/*.py 2>/dev/null", check=False)  # fmt: skip
    assert left == ""
    assert host.guest.path("/etc/exabgp/rtbh.conf").exists()
    assert "exabgp" not in host.run("systemctl", "list-unit-files", "exabgp*", check=False)


def test_the_installer_says_what_is_in_the_way_and_changes_nothing(bare: Host) -> None:
    for options, complaint in (
        ([], "name your own prefixes"),
        (["--allowed", "192.0.2.1/24"], "host bits"),
        (["--allowed", "here"], r"\[safety\] allowed"),
        (["--allowed", " , "], "no prefix was named"),
        (["--allowed", "any", "--python", "/root/python"], "no Python at /root/python"),
        (["--what"], "unknown option --what"),
    ):
        with pytest.raises(LabError, match=complaint):
            install(bare.guest, *options)
    for theirs in ("/usr/local/bin/exabgp", "/etc/systemd/system/exabgp.service", "/etc/exabgp/rtbh-controller.py"):
        bare.shell(f"mkdir -p $(dirname {theirs}); touch {theirs}")
        with pytest.raises(LabError, match=f"{theirs} is there already"):
            install(bare.guest, "--allowed", "any")
        install(bare.guest, "--uninstall")
        bare.shell(f"rm {theirs}")  # it is still there
    bare.shell("chown nobody /etc/exabgp")
    with pytest.raises(LabError, match="/etc/exabgp belongs to nobody"):
        install(bare.guest, "--allowed", "any")
    assert bare.shell("ls /etc/exabgp") == ""
    assert bare.shell("ls /opt/exabgp-rtbh 2>/dev/null", check=False) == ""


def test_on_a_terminal_the_installer_asks_for_the_prefixes(bare: Host) -> None:
    offline = f"PIP_NO_INDEX=1 PIP_FIND_LINKS={WHEELS}"
    said = bare.shell(f"echo 192.0.2.0/24, 2001:db8::/32 | {offline} script -qec {SOURCE}/systemd/install.sh /dev/null")
    assert "Your own prefixes" in said
    assert "\nallowed = 2001:db8::/32 192.0.2.0/24\n" in bare.run("rtbh-controller", "--check")


def test_packagers_get_the_files_alone(bare: Host) -> None:
    install(bare.guest, DESTDIR="/tmp/stage")
    files = bare.shell("cd /tmp/stage; find . -not -path './opt/*/*/*' \\( -type f -o -type l \\) | sort").split()
    assert files == [
        "./etc/exabgp/exabgp.conf",
        "./etc/exabgp/exabgp.env",
        "./etc/exabgp/rtbh-controller.py",
        "./etc/exabgp/rtbh.conf",
        "./etc/exabgp/webhook-receiver.py",
        "./etc/logrotate.d/exabgp-rtbh",
        "./etc/systemd/system/exabgp-webhook.service",
        "./etc/systemd/system/exabgp.service",
        "./etc/sysusers.d/exabgp-rtbh.conf",
        "./etc/tmpfiles.d/exabgp-rtbh.conf",
        "./opt/exabgp-rtbh/current",
        "./usr/local/bin/exabgp",
        "./usr/local/bin/rtbh-controller",
        "./usr/local/bin/rtbh-webhook",
    ]
    assert bare.shell("grep -rlI /tmp/stage /tmp/stage/opt/*/*/bin /tmp/stage/etc", check=False) == ""
    bare.shell("cp -a /tmp/stage/* /; rtbh-controller --check")
    assert not bare.guest.path("/etc/exabgp/webhook-token").exists()


def test_with_exabgp_4(bare: Host) -> None:
    bare.guest.path("/root/constraint").write_text("exabgp==4.2.25\n")
    install(bare.guest, "--allowed", "192.0.2.0/24", PIP_CONSTRAINT="/root/constraint")
    bare.start()
    assert "ExaBGP 4.2.25" in bare.status()
    bare.announce()
    bare.run("systemctl", "reload", "exabgp")
    bare.announce("192.0.2.101/32")
    bare.shell("sed -i 's/hold-time 90;/hold-time 90/' /etc/exabgp/exabgp.conf")
    with pytest.raises(LabError):
        bare.run("systemctl", "reload", "exabgp")
    bare.announce("192.0.2.102/32")
    bare.run("systemctl", "stop", "exabgp")
    bare.wait_for(set(), 5)


def test_beside_the_distributions_exabgp(bare: Host) -> None:
    """Debian's package has a unit of the same name, and an exabgp.env of its own."""
    package = cache_directory() / "debian"
    package.mkdir(parents=True, exist_ok=True)
    if not list(package.glob("*.deb")):
        result = subprocess.run(
            ["apt-get", "download", "exabgp", "python3-exabgp"],
            cwd=package,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            pytest.skip(f"the distribution's ExaBGP can't be had: {result.stderr}")
    for deb in package.glob("*.deb"):
        bare.guest.path(f"/root/{deb.name}").write_bytes(deb.read_bytes())
    bare.shell("dpkg --force-depends -i /root/*.deb")
    assert "/lib/systemd/system/exabgp.service" in bare.run("systemctl", "show", "--property=FragmentPath", "exabgp")
    theirs = bare.guest.path("/etc/exabgp/exabgp.env").read_text()
    install(bare.guest, "--allowed", "192.0.2.0/24")
    assert bare.guest.path("/etc/exabgp/exabgp.env").read_text() == theirs
    bare.start()
    assert "ExaBGP 5.0.15" in bare.status()
    bare.announce()
