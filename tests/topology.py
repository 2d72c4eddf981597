"""A small network in namespaces: a host with the trio, a router, a victim and a bystander behind it, somebody outside.

    outside 203.0.113.50 --- 203.0.113.1 [router] 192.0.2.1 --- 192.0.2.100 victim, 192.0.2.101 bystander
    host 198.51.100.10   --- 198.51.100.1    |    198.51.101.1 --- 198.51.101.2 third router
                                                  2001:db8:3::1 -- 2001:db8:3::2

The routers run the files of etc/routers as shipped, and beside them a session for each family with
the third router, to which everything is exported that may be. Needs root; CannotRun says what is missing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import select
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guest import PATH, CannotRun, Namespace, needs
from lab import ROOT, LabError, Process, Trio, clean_environment, wait_for

VICTIM, BYSTANDER = "192.0.2.100", "192.0.2.101"
VICTIM6, BYSTANDER6 = "2001:db8:1::100", "2001:db8:1::101"
SETTINGS = """\
[bgp]
next_hop_ipv6 = 100::1
[safety]
allowed =
    192.0.2.0/24
    2001:db8::/32
"""
MARKER, MARKER6 = "198.18.77.0/24", "2001:db9::/48"  # what the third router gets: so its sessions work


class Router:
    """A BGP implementation with its shipped configuration. It is `passive`: the host connects."""

    name = ""
    discards_in_kernel = False
    refuses_one_too_many = False  # its prefix limit refuses the next prefix and keeps the session

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self.namespace = namespace
        self.directory = directory / f"{self.name}-{namespace.pid}"
        self.directory.mkdir()
        self.directory.chmod(0o755)
        directory.chmod(0o755)  # some daemons give up root before they open their files
        self.processes: list[Process] = []

    def launch(self, *command: str) -> Process:
        log = self.directory / f"{Path(command[0]).name}.log"
        environment = clean_environment(PATH=PATH)
        process = Process(self.name, self.namespace.inside(*command), log, environment)
        self.processes.append(process)
        return process

    def start(self) -> None:
        raise NotImplementedError

    def established(self) -> bool:
        raise NotImplementedError

    def discards(self) -> set[str]:
        """The prefixes that are dropped."""
        raise NotImplementedError

    def accepted(self) -> set[str]:
        """The prefixes in its own BGP table, dropped or not."""
        raise NotImplementedError

    def flap(self) -> None:
        """End the session with the host; it may come back."""
        raise NotImplementedError

    def warned(self) -> bool:
        """Whether it complained about one prefix too many."""
        return False

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.stop()
        self.processes.clear()

    def crash(self) -> None:
        """What speaks BGP dies at once."""
        for process in self.processes:
            process.popen.kill()
            process.popen.wait()
        self.processes.clear()

    def kernel_discards(self) -> set[str]:
        found: set[str] = set()
        for family, bits in (("-4", "/32"), ("-6", "/128")):
            text = self.namespace.run("ip", family, "-json", "route", "show", "type", "blackhole")
            # without a length: a host; `static`: the addresses that FRR's next hops lead to
            found |= {
                route["dst"] if "/" in route["dst"] else route["dst"] + bits
                for route in json.loads(text or "[]")
                if route.get("protocol") not in ("static", "196")
            }
        return found


class Bird(Router):
    """BIRD 2."""

    name = "BIRD"
    discards_in_kernel = True
    refuses_one_too_many = True
    beside = f"""
protocol static {{ ipv4; route {MARKER} blackhole; }}
protocol static {{ ipv6; route {MARKER6} blackhole; }}
protocol bgp third {{
  local 198.51.101.1 as 65000; neighbor 198.51.101.2 as 65010;
  ipv4 {{ import none; export all; }};
}}
protocol bgp third6 {{
  local 2001:db8:3::1 as 65000; neighbor 2001:db8:3::2 as 65010;
  ipv6 {{ import none; export all; next hop self; }};
}}
"""

    def start(self) -> None:
        needs("bird", "birdc")
        text = self.configuration()
        (self.directory / "bird.conf").write_text(text + self.beside)
        self.launch("bird", "-f", "-c", str(self.directory / "bird.conf"), "-s", str(self.directory / "ctl"))

    def configuration(self) -> str:
        return (ROOT / "etc/routers/bird.conf").read_text()

    def client(self, *words: str) -> str:
        return self.namespace.run("birdc", "-s", str(self.directory / "ctl"), *words, check=False)

    def established(self) -> bool:
        return "Established" in self.client("show", "protocols", "rtbh")

    def discards(self) -> set[str]:
        return self.kernel_discards()

    def flap(self) -> None:
        self.client("restart", "rtbh")

    def communities(self, prefix: str) -> str:
        found = re.search(r"BGP.community: (.*)", self.client("show", "route", prefix, "all"))
        return found[1] if found else ""

    def routes(self) -> set[str]:
        """What its own tables hold."""
        return set(re.findall(r"(?m)^([0-9a-f.:]+/\d+) ", self.client("show", "route")))

    def accepted(self) -> set[str]:
        return self.routes() - {MARKER, MARKER6}


class SecondBird(Bird):
    """The second upstream of etc/exabgp.conf."""

    beside = ""

    def configuration(self) -> str:
        text = super().configuration().replace("198.51.100.1;", "203.0.113.1;")
        return text.replace("198.51.100.1 as 65000", "203.0.113.1 as 65002").replace("198.51.100.10", "203.0.113.10")


class Frr(Router):
    """FRRouting: zebra, staticd and bgpd."""

    name = "FRR"
    discards_in_kernel = True
    beside = f"""
ip route {MARKER} blackhole
ipv6 route {MARKER6} blackhole
route-map ALL permit 10
exit
router bgp 65000
 no bgp network import-check
 neighbor 198.51.101.2 remote-as 65010
 neighbor 2001:db8:3::2 remote-as 65010
 address-family ipv4 unicast
  network {MARKER}
  neighbor 198.51.101.2 activate
  neighbor 198.51.101.2 route-map ALL out
  neighbor 198.51.101.2 route-map NOTHING in
 exit-address-family
 address-family ipv6 unicast
  network {MARKER6}
  neighbor 2001:db8:3::2 activate
  neighbor 2001:db8:3::2 route-map ALL out
  neighbor 2001:db8:3::2 route-map NOTHING in
 exit-address-family
exit
"""

    def start(self) -> None:
        if not Path("/usr/lib/frr/bgpd").exists():
            raise CannotRun("FRR is missing")
        needs("vtysh")
        run = self.directory
        shutil.chown(run, "frr", "frr")
        (run / "frr.conf").write_text((ROOT / "etc/routers/frr.conf").read_text() + self.beside)
        (run / "vtysh.conf").touch()
        for daemon in ("zebra", "staticd", "bgpd")[len(self.processes) :]:
            (run / f"{daemon}.vty").unlink(missing_ok=True)
            options = [
                "-z",
                f"{run}/zserv.api",
                "--vty_socket",
                str(run),
                "-i",
                f"{run}/{daemon}.pid",
                "-A",
                "127.0.0.1",
            ]
            log = ["-f", "/dev/null", "--log", "stdout", "--log-level", "informational"]
            self.launch(f"/usr/lib/frr/{daemon}", "-u", "frr", "-g", "frr", *options, *log)
            wait_for(daemon, lambda d=daemon: (run / f"{d}.vty").exists())  # type: ignore[misc]
        self.client("-f", str(run / "frr.conf"))

    def crash(self) -> None:
        """bgpd alone: what a killed zebra has put into the kernel stays there (etc/routers/README.md)."""
        bgpd = self.processes.pop()
        bgpd.popen.kill()
        bgpd.popen.wait()

    def client(self, *words: str) -> str:
        run = str(self.directory)
        return self.namespace.run("vtysh", "--vty_socket", run, "--config_dir", run, *words, check=False)

    def established(self) -> bool:
        found = json.loads(self.client("-c", "show bgp neighbors 198.51.100.10 json") or "{}")
        return bool(found.get("198.51.100.10", {}).get("bgpState") == "Established")

    def discards(self) -> set[str]:
        return self.kernel_discards() - {MARKER, MARKER6}

    def accepted(self) -> set[str]:
        tables = [json.loads(self.client("-c", f"show bgp {family} unicast json")) for family in ("ipv4", "ipv6")]
        return {prefix for table in tables for prefix in table["routes"]} - {MARKER, MARKER6}

    def flap(self) -> None:
        self.client("-c", "clear bgp 198.51.100.10")

    def warned(self) -> bool:
        return "MAXPFX" in (self.directory / "bgpd.log").read_text()


class Gobgp(Router):
    """GoBGP, which by itself forwards nothing: what it would drop stands in its table."""

    name = "GoBGP"
    beside = f"""
[[defined-sets.prefix-sets]]
prefix-set-name = "marker"
[[defined-sets.prefix-sets.prefix-list]]
ip-prefix = "{MARKER}"
[[defined-sets.prefix-sets]]
prefix-set-name = "marker6"
[[defined-sets.prefix-sets.prefix-list]]
ip-prefix = "{MARKER6}"
[[policy-definitions]]
name = "marker"
[[policy-definitions.statements]]
name = "marker4"
[policy-definitions.statements.conditions.match-prefix-set]
prefix-set = "marker"
[policy-definitions.statements.actions]
route-disposition = "accept-route"
[[policy-definitions.statements]]
name = "marker6"
[policy-definitions.statements.conditions.match-prefix-set]
prefix-set = "marker6"
[policy-definitions.statements.actions]
route-disposition = "accept-route"
[[neighbors]]
[neighbors.config]
neighbor-address = "198.51.101.2"
peer-as = 65010
[neighbors.transport.config]
passive-mode = true
[[neighbors.afi-safis]]
[neighbors.afi-safis.config]
afi-safi-name = "ipv4-unicast"
[[neighbors]]
[neighbors.config]
neighbor-address = "2001:db8:3::2"
peer-as = 65010
[neighbors.transport.config]
passive-mode = true
[[neighbors.afi-safis]]
[neighbors.afi-safis.config]
afi-safi-name = "ipv6-unicast"
"""

    def start(self) -> None:
        needs("gobgpd", "gobgp")
        text = (ROOT / "etc/routers/gobgpd.toml").read_text()
        text = text.replace('["198.51.100.1"]', '["198.51.100.1", "198.51.101.1", "2001:db8:3::1"]')
        text = text.replace('["rtbh-in"]', '["rtbh-in", "marker"]')
        text = text.replace('export-policy = "reject-route"', 'export-policy = "accept-route"') + self.beside
        (self.directory / "gobgpd.toml").write_text(text)
        self.launch(
            "gobgpd", "-f", str(self.directory / "gobgpd.toml"), "--api-hosts", "127.0.0.1:50051", "--pprof-disable"
        )
        wait_for("GoBGP", lambda: "2001:db8:3::2" in self.client("neighbor"))
        self.client("global", "rib", "add", MARKER)
        self.client("global", "rib", "add", "-a", "ipv6", MARKER6)

    def client(self, *words: str) -> str:
        return self.namespace.run("gobgp", *words, check=False)

    def established(self) -> bool:
        return bool(re.search(r"(?m)^ *198\.51\.100\.10 .* Establ", self.client("neighbor")))

    def flap(self) -> None:
        self.client("neighbor", "198.51.100.10", "reset")

    def tables(self) -> list[dict[str, object]]:
        return [json.loads(self.client("global", "rib", "-a", family, "-j") or "{}") for family in ("ipv4", "ipv6")]

    def discards(self) -> set[str]:
        found = set()
        for table, next_hop in zip(self.tables(), ("198.18.0.66", "100::66")):
            found |= {prefix for prefix, paths in table.items() if f'"{next_hop}"' in json.dumps(paths)}
        return found

    def accepted(self) -> set[str]:
        return {prefix for table in self.tables() for prefix in table} - {MARKER, MARKER6}


class Openbgpd(Router):
    """OpenBGPD, whose Linux version does not write the kernel's table: what it would drop stands in its own."""

    name = "OpenBGPD"
    beside = f"""
network {MARKER}
network {MARKER6}
neighbor 198.51.101.2 {{
	remote-as 65010
	announce IPv4 unicast
}}
neighbor 2001:db8:3::2 {{
	remote-as 65010
	announce IPv6 unicast
}}
allow to {{ 198.51.101.2, 2001:db8:3::2 }}
"""

    def start(self) -> None:
        needs("bgpctl")
        if not Path("/usr/sbin/bgpd").exists():
            raise CannotRun("OpenBGPD is missing")
        text = (ROOT / "etc/routers/openbgpd.conf").read_text().replace("listen on", "fib-update no\nlisten on")
        text = text.replace(
            "listen on 198.51.100.1\n", "listen on 198.51.100.1\nlisten on 198.51.101.1\nlisten on 2001:db8:3::1\n"
        )
        configuration = self.directory / "bgpd.conf"
        configuration.write_text(text + f'\nsocket "{self.directory}/control"\n' + self.beside)
        configuration.chmod(0o600)
        # It wants an empty directory to change its root to, which its service makes in /run: here in a /run of its own.
        script = 'mount -t tmpfs tmpfs /run && mkdir /run/openbgpd && exec /usr/sbin/bgpd -d -f "$0"'
        self.launch("unshare", "--mount", "sh", "-c", script, str(configuration))

    def client(self, *words: str) -> str:
        return self.namespace.run("bgpctl", "-j", "-s", f"{self.directory}/control", *words, check=False)

    def established(self) -> bool:
        found = json.loads(self.client("show", "neighbor", "198.51.100.10") or "{}")
        return any(neighbor.get("state") == "Established" for neighbor in found.get("neighbors", []))

    def flap(self) -> None:
        self.client("neighbor", "198.51.100.10", "clear")

    def table(self) -> list[dict[str, Any]]:
        found = json.loads(self.client("show", "rib", "detail", "neighbor", "198.51.100.10") or "{}")
        routes: list[dict[str, Any]] = found.get("rib", [])
        return routes

    def discards(self) -> set[str]:
        # The second community is its own, set by the rule that sets the discard too.
        marks = {"BLACKHOLE", "NO_ADVERTISE"}
        return {route["prefix"] for route in self.table() if marks <= set(route.get("communities", []))}

    def accepted(self) -> set[str]:
        return {route["prefix"] for route in self.table()}


class Third(Bird):
    """A router beyond ours, which must never hear of a blackhole."""

    name = "third"

    def configuration(self) -> str:
        return """\
router id 198.51.101.2;
protocol device {}
protocol bgp upstream {
  local 198.51.101.2 as 65010; neighbor 198.51.101.1 as 65000;
  connect retry time 1; connect delay time 1; error wait time 1, 2;
  ipv4 { import all; export none; };
}
protocol bgp upstream6 {
  local 2001:db8:3::2 as 65010; neighbor 2001:db8:3::1 as 65000;
  connect retry time 1; connect delay time 1; error wait time 1, 2;
  ipv6 { import all; export none; };
}
"""

    beside = ""


class Host(Trio):
    """The trio in a namespace, with etc/exabgp.conf as shipped but for where the controller is."""

    def __init__(self, directory: Path, exabgp: str, namespace: Namespace, address: str = "198.51.100.10") -> None:
        super().__init__(directory, exabgp, 179, SETTINGS)
        self.namespace, self.address = namespace, address
        self.inside = namespace.inside()
        self.second_upstream = False

    def write_configuration(self, controller: Path) -> None:
        text = (ROOT / "etc/exabgp.conf").read_text()
        text = text.replace("run /etc/exabgp/rtbh-controller.py;", f"run /bin/sh {controller};")
        text = text.replace("# ipv6 unicast;", "ipv6 unicast;").replace("198.51.100.10;", f"{self.address};")
        if self.second_upstream:
            head, mark, tail = text.partition("#neighbor 203.0.113.1 {")
            text = head + re.sub("(?m)^#", "", mark + tail)
        assert "static {" in text
        (self.directory / "exabgp.conf").write_text(text.replace("static {", f"static {{{self.static}"))

    def connect(self) -> http.client.HTTPConnection:
        """A detector's connection to the receiver, which stays open."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.sock = self.namespace.socket(socket.SOCK_STREAM)
        connection.sock.connect(("127.0.0.1", self.port))
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def post(self, body: str) -> dict[str, object]:
        command = ["curl", "-sS", "-H", f"X-Auth-Token: {self.token}", "-d", body, f"http://127.0.0.1:{self.port}/"]
        found: dict[str, object] = json.loads(self.namespace.run(*command))
        return found


class Stream:
    """Numbered datagrams from outside to an address behind the router, and which of them arrive."""

    PAUSE = 0.0005  # seconds between two

    def __init__(self, outside: Namespace, behind: Namespace, address: str) -> None:
        self.receiver, self.sender = behind.socket(socket.SOCK_DGRAM), outside.socket(socket.SOCK_DGRAM)
        self.receiver.bind((address, 0))
        self.sender.connect(self.receiver.getsockname())

    def pause(self) -> int:
        """Wait for the next moment to send; the highest number that has arrived, or -1."""
        if select.select([self.receiver], [], [], self.PAUSE)[0]:
            return int.from_bytes(self.receiver.recv(8), "big")
        return -1

    def flows(self) -> bool:
        """Whether a datagram gets through."""
        self.sender.send((0).to_bytes(8, "big"))
        return bool(select.select([self.receiver], [], [], 0.1)[0]) and self.receiver.recv(8) is not None

    def lost_after(self, alert: Callable[[], object]) -> float:
        """Seconds from the alert to the first datagram that does not arrive, nor any after it."""
        sent = [time.monotonic()]
        alert()
        first_lost = 1
        while first_lost == len(sent) or time.monotonic() < sent[first_lost] + 0.1:
            if time.monotonic() > sent[0] + 30:
                raise LabError("nothing was dropped in 30 s")
            self.sender.send(len(sent).to_bytes(8, "big"))
            sent.append(time.monotonic())
            first_lost = max(first_lost, self.pause() + 1)
        return sent[first_lost] - sent[0]

    def close(self) -> None:
        self.receiver.close()
        self.sender.close()


class Site:
    """All of it."""

    def __init__(self, directory: Path, exabgp: str, kind: type[Router], stack: contextlib.ExitStack) -> None:
        needs("ip", "ping", "curl", "bird", "birdc")
        self.directory, self.exabgp, self.stack = directory, exabgp, stack
        self.inner = self.namespace()
        self.outside, self.lan = self.namespace(), self.namespace()
        self.inner.link(self.outside, "outside", "eth0", "203.0.113.1/24", "203.0.113.50/24")
        addresses = ["192.0.2.1/24", f"{VICTIM}/24", "2001:db8:1::1/64", f"{VICTIM6}/64"]
        self.inner.link(self.lan, "lan", "eth0", *addresses)
        for address in (f"{BYSTANDER}/24", f"{BYSTANDER6}/64"):
            nodad = ["nodad"] if ":" in address else []
            self.lan.run("ip", "address", "add", address, "dev", "eth0", *nodad)
        self.inner.run("ip", "address", "add", "2001:db8:f::1/64", "dev", "outside", "nodad")
        self.outside.run("ip", "address", "add", "2001:db8:f::50/64", "dev", "eth0", "nodad")
        for namespace, gateway, gateway6 in (
            (self.outside, "203.0.113.1", "2001:db8:f::1"),
            (self.lan, "192.0.2.1", "2001:db8:1::1"),
        ):
            namespace.run("ip", "route", "add", "default", "via", gateway)
            namespace.run("ip", "-6", "route", "add", "default", "via", gateway6)
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"
        self.inner.run("sh", "-c", forward)
        beyond = self.namespace()
        addresses = ["198.51.101.1/24", "198.51.101.2/24", "2001:db8:3::1/64", "2001:db8:3::2/64"]
        self.inner.link(beyond, "third", "eth0", *addresses)
        self.inner.run("ip", "link", "add", "hosts", "type", "bridge")
        self.inner.run("ip", "address", "add", "198.51.100.1/24", "dev", "hosts")
        self.inner.run("ip", "link", "set", "hosts", "up")
        self.router = kind(self.inner, directory)
        stack.callback(self.router.stop)
        self.third = Third(beyond, directory)
        stack.callback(self.third.stop)
        self.router.start()
        self.third.start()
        self.hosts: list[Host] = []

    def namespace(self) -> Namespace:
        made = Namespace()
        self.stack.callback(made.close)
        return made

    def add_host(self, address: str = "198.51.100.10") -> Host:
        """A host with the trio, its cable plugged in; not started."""
        namespace, number = self.namespace(), len(self.hosts)
        self.inner.link(namespace, f"host{number}", "eth0", "", f"{address}/24")
        self.inner.run("ip", "link", "set", f"host{number}", "master", "hosts")
        directory = self.directory / f"host{number}"
        directory.mkdir()
        host = Host(directory, self.exabgp, namespace, address)
        self.stack.callback(host.stop)
        self.hosts.append(host)
        return host

    def loss(self, address: str) -> int:
        """The share of pings from outside that get no answer, in percent."""
        words = ["ping", "-n", "-q", "-c", "4", "-i", "0.05", "-W", "1", address]
        found = re.search(r"(\d+)(\.\d+)?% packet loss", self.outside.run(*words, check=False))
        assert found
        return int(found[1])

    def wait_for_discards(self, prefixes: set[str], seconds: float = 30.0) -> None:
        wait_for(
            f"{prefixes or 'nothing'} to be dropped by {self.router.name}",
            lambda: self.router.discards() == prefixes,
            seconds,
        )

    def exported(self) -> set[str]:
        """What the third router has, but for the markers, without which it would prove nothing."""
        wait_for("the third router's sessions", lambda: {MARKER, MARKER6} <= self.third.routes(), 60)
        return self.third.accepted()


ROUTERS: tuple[type[Router], ...] = (Bird, Frr, Gobgp, Openbgpd)
