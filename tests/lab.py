"""A lab on this machine: an upstream BGP peer, ExaBGP with the controller, and the webhook receiver.

    python tests/lab.py [--port PORT] [--directory DIR] [--exabgp PATH]

Runs as an ordinary user, on loopback alone, and needs nothing but this project installed. The
upstream is a second ExaBGP in passive mode; every route it receives or loses is printed.
Ctrl-C ends every process and removes the lab's directory. The tests use the same pieces.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import getpass
import json
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
START = 20.0  # seconds for a program to be ready
ACK = "true"  # whether ExaBGP answers commands


class LabError(Exception):
    """The lab can't run; the text says what is in the way."""


RESERVED: list[socket.socket] = []


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that the system says is free, and gives to nobody else while this process lives.

    The socket that keeps it is bound and does not listen: so a program that sets SO_REUSEADDR, as
    servers do, may listen there, while the system hands the number out no more.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind((host, 0))
    RESERVED.append(kept)
    return int(kept.getsockname()[1])


def wait_for(what: str, test: Callable[[], Any], seconds: float = START) -> Any:
    """What `test` returns once that is true. Raises LabError, naming `what`, after `seconds`."""
    end = time.monotonic() + seconds
    while not (result := test()):
        if time.monotonic() > end:
            raise LabError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.005)
    return result


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what steers an ExaBGP or a controller from elsewhere."""
    kept = {key: value for key, value in os.environ.items() if not foreign(key)}
    return kept | extra


def foreign(key: str) -> bool:
    return key.lower().startswith(("exabgp_", "exabgp.")) or key == "RTBH_CONFIG"


class Process:
    """A program with its output in a file; ended by its id, never by name."""

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.name, self.log = name, log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the lab, which ends them in order
            )

    def check(self) -> None:
        """Raises LabError, with the end of its output, when the program has ended."""
        if self.popen.poll() is not None:
            tail = "\n  ".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise LabError(f"{self.name} ended with exit code {self.popen.returncode}; its last words:\n  {tail}")

    def send(self, number: int) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 8.0) -> None:
        self.send(number)
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


@dataclasses.dataclass(frozen=True)
class Event:
    """One route as the upstream received (`+`) or lost (`-`) it; `time` in seconds since the epoch."""

    time: float
    sign: str
    prefix: str = ""
    next_hop: str = ""
    communities: tuple[str, ...] = ()
    large_communities: tuple[str, ...] = ()


def read_event_line(line: str) -> list[Event]:
    """The routes in one line of ExaBGP's JSON; a session that goes up or down is an event without a prefix."""
    message = json.loads(line)
    at = float(message["time"])
    if message["type"] == "state" and message["neighbor"]["state"] in ("up", "down"):
        return [Event(at, message["neighbor"]["state"])]
    if message["type"] != "update" or "update" not in message["neighbor"]["message"]:
        return []
    update = message["neighbor"]["message"]["update"]
    events = [Event(at, "-", gone["nlri"]) for family in update.get("withdraw", {}).values() for gone in family]
    attributes = update.get("attribute", {})
    communities = tuple(":".join(map(str, c)) for c in attributes.get("community", []))
    large = tuple(":".join(map(str, c)) for c in attributes.get("large-community", []))
    for family in update.get("announce", {}).values():
        for next_hop, routes in family.items():
            events += [Event(at, "+", new["nlri"], next_hop, communities, large) for new in routes]
    return events


class Upstream:
    """An upstream router: ExaBGP in passive mode, its UPDATEs recorded in a file."""

    def __init__(self, directory: Path, exabgp: str, hold_time: int = 90, address: str = "127.0.0.1") -> None:
        self.directory, self.exabgp, self.hold_time, self.address = directory, exabgp, hold_time, address
        self.port = free_port(address)
        self.name = f"upstream-{address}"
        self.record = directory / f"{self.name}.jsonl"
        self.events: list[Event] = []
        self.file: IO[str] | None = None
        self.partial = ""

    def start(self) -> None:
        self.record.touch()
        self.file = self.file or self.record.open(encoding="utf-8")
        recorder = script(self.directory / f"{self.name}.sh", [sys.executable, __file__, "--record", str(self.record)])
        configuration = self.directory / f"{self.name}.conf"
        configuration.write_text(
            f"""\
process recorder {{ run /bin/sh {recorder}; encoder json; }}
neighbor 127.0.0.2 {{
  router-id {self.address}; local-address {self.address}; local-as 65000; peer-as 65001;
  hold-time {self.hold_time}; passive true;
  family {{ ipv4 unicast; ipv6 unicast; }}
  api {{ processes [ recorder ]; neighbor-changes; receive {{ parsed; update; }} }}
}}
"""
        )
        environment = exabgp_environment(exabgp_tcp_bind=self.address, exabgp_tcp_port=str(self.port))
        self.process = Process(
            "the upstream ExaBGP",
            [self.exabgp, str(configuration)],
            self.directory / f"{self.name}.log",
            environment,
        )

        def listening() -> bool:
            self.process.check()
            with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), 1):
                return True
            return False

        wait_for(f"the upstream to listen on {self.address}:{self.port}", listening)

    def stop(self) -> None:
        self.process.stop()
        if self.file:
            self.file.close()

    def restart(self) -> None:
        """Kill the upstream, as a router that reboots, and start it again."""
        self.process.popen.kill()
        self.process.popen.wait()
        self.poll()
        self.events.append(Event(time.time(), "down"))
        self.start()

    def poll(self) -> list[Event]:
        """The events since the last call; all of them stay in `events`."""
        assert self.file is not None
        *lines, self.partial = (self.partial + self.file.read()).split("\n")
        new = [event for line in lines for event in read_event_line(line)]
        self.events += new
        return new

    def table(self) -> dict[str, Event]:
        """The routes that the upstream holds now."""
        self.poll()
        held: dict[str, Event] = {}
        for event in self.events:
            if event.sign == "+":
                held[event.prefix] = event
            elif event.sign == "-":
                held.pop(event.prefix, None)
            elif event.sign == "down":
                held.clear()
        return held


def script(path: Path, command: list[str]) -> Path:
    """A shell script that runs the command: ExaBGP's `run` can't quote a path with spaces."""
    path.write_text(f"exec {shlex.join(command)}\n")
    return path


def exabgp_environment(**extra: str) -> dict[str, str]:
    """What makes an ExaBGP of ours keep to itself: no command pipes, and no change of user."""
    user = pwd.getpwuid(os.getuid()).pw_name
    return clean_environment(exabgp_daemon_user=user, exabgp_api_cli="false", exabgp_api_ack=ACK, **extra)


class Trio:
    """ExaBGP with the controller, and the receiver, in a directory of their own."""

    def __init__(self, directory: Path, exabgp: str, upstream_port: int, settings: str = "", port: int = 0) -> None:
        self.directory, self.exabgp = directory, exabgp
        self.upstreams = {"127.0.0.1": upstream_port}
        self.pipe = directory / "rtbh.pipe"
        self.config = directory / "rtbh.conf"
        self.state_file = directory / "state.json"
        self.token = secrets.token_hex(16)
        self.hold_time = 90
        self.inside: list[str] = []  # what runs a command where the trio is to be, such as a namespace
        self.static = ""
        self.patience = START
        self.port = port
        self.webhook_settings = ""
        self.settings = settings or "[bgp]\nnext_hop_ipv6 = 100::1\n"
        self.receiver: Process | None = None
        self.daemon: Process | None = None

    def write_settings(self, settings: str) -> None:
        """Write rtbh.conf: paths, address and token of this lab around the given sections."""
        d = self.directory
        self.config.write_text(
            f"[paths]\nfifo = {self.pipe}\nstate_dir = {d}\n"
            f"controller_log = {d}/rtbh-controller.log\nwebhook_log = {d}/webhook.log\n"
            f"[webhook]\nlisten = 127.0.0.1:{self.port}\ntoken = {self.token}\n{self.webhook_settings}\n{settings}"
        )

    def start(self) -> None:
        self.start_exabgp()
        self.start_receiver()

    def start_exabgp(self) -> None:
        self.write_settings(self.settings)
        command = [sys.executable, str(ROOT / "rtbh_controller.py"), "--config", str(self.config)]
        controller = self.controller = script(self.directory / "controller.sh", command)
        self.write_configuration(controller)
        self.run_exabgp()
        begin = time.time()

        def up() -> bool:
            assert self.daemon is not None
            self.daemon.check()
            state = self.state()
            sessions = [neighbor["state"] for neighbor in state.get("neighbors", {}).values()]
            return state.get("heartbeat", 0) > begin and "up" in sessions

        try:
            wait_for("the BGP session to come up", up, self.patience)
        except LabError as error:
            raise LabError(f"{error}\n  {self.words('exabgp.log')}\n  {self.words('rtbh-controller.log')}") from None

    def run_exabgp(self) -> None:
        self.daemon = Process(
            "ExaBGP",
            [*self.inside, self.exabgp, str(self.directory / "exabgp.conf")],
            self.directory / "exabgp.log",
            exabgp_environment(),
        )

    def write_configuration(self, controller: Path) -> None:
        """Write exabgp.conf with a neighbor for each upstream."""
        neighbors = [
            f"""\
neighbor {address} {{
  router-id 127.0.0.2; local-address 127.0.0.2; local-as 65001; peer-as 65000;
  hold-time {self.hold_time}; connect {port}; group-updates false;
  family {{ ipv4 unicast; ipv6 unicast; }}
  api {{ processes [ rtbh-controller ]; neighbor-changes; }}
  static {{ {self.static} }}
}}
"""
            for address, port in self.upstreams.items()
        ]
        process = f"process rtbh-controller {{ run /bin/sh {controller}; encoder text; }}\n"
        (self.directory / "exabgp.conf").write_text(process + "".join(neighbors))

    def start_receiver(self) -> None:
        log = self.directory / "receiver.out"
        log.unlink(missing_ok=True)  # what one before it said
        command = [*self.inside, sys.executable, str(ROOT / "webhook_receiver.py"), "--config", str(self.config)]
        self.receiver = receiver = Process("the webhook receiver", command, log, clean_environment())

        def ready() -> str:
            receiver.check()
            lines = [line for line in log.read_text().splitlines() if line.startswith("Listening on ")]
            return lines[-1] if lines else ""

        self.port = int(str(wait_for("the webhook receiver to listen", ready)).rpartition(":")[2])

    def stop(self) -> None:
        for process in (self.receiver, self.daemon):
            if process:
                process.stop()

    def state(self) -> dict[str, Any]:
        """The state that the controller has published; empty before the first time."""
        with contextlib.suppress(FileNotFoundError):
            found = json.loads(self.state_file.read_text())
            return found if isinstance(found, dict) else {}
        return {}

    def words(self, log: str) -> str:
        """The end of a log file, for a message."""
        with contextlib.suppress(FileNotFoundError):
            return "\n  ".join((self.directory / log).read_text(errors="replace").splitlines()[-8:])
        return f"{log}: not written"

    def log_text(self, log: str = "rtbh-controller.log") -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / log).read_text()
        return ""

    def wait_for_log(self, text: str, log: str = "rtbh-controller.log") -> None:
        """Wait until a log holds the text: it is written a little after the deed, from a thread of its own."""
        wait_for(f"{text!r} in {log}", lambda: text in self.log_text(log))

    def echo(self, *lines: str) -> None:
        """What `echo LINE > PIPE` does."""
        with self.pipe.open("w") as pipe:
            pipe.write("".join(f"{line}\n" for line in lines))


@contextlib.contextmanager
def lab_directory(wanted: str | None) -> Iterator[Path]:
    """The lab's directory, made for it and removed at the end."""
    if wanted is None:
        directory = Path(tempfile.mkdtemp(prefix="rtbh-lab-"))
    else:
        directory = Path(wanted).resolve()
        try:
            directory.mkdir()
        except FileExistsError:
            raise LabError(f"{directory} is there already: another lab's pipe? Name a directory to be made") from None
        except OSError as error:
            raise LabError(f"cannot make {directory}: {error.strerror}") from None
    if any(c.isspace() for c in str(directory)):
        directory.rmdir()
        raise LabError(f"ExaBGP cannot run from a path with spaces: {directory}; choose one with --directory")
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def find_exabgp(wanted: str | None) -> str:
    path = Path(wanted) if wanted else Path(sys.executable).parent / "exabgp"
    if not os.access(path, os.X_OK):
        raise LabError(f"no ExaBGP at {path}; install the project first: {sys.executable} -m pip install .")
    return str(path)


def check_port(port: int) -> None:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise LabError(
            f"port {port} is taken ({error.strerror}): choose another with --port, or leave it out"
        ) from None


def describe(event: Event, trio: Trio) -> str:
    """One line for a person, with the milliseconds since the controller read the command."""
    at = time.strftime("%H:%M:%S", time.localtime(event.time))
    if not event.prefix:
        return f"{at}  BGP session {event.sign}"
    word = "ANNOUNCE" if event.sign == "+" else "WITHDRAW"
    with contextlib.suppress(LabError):
        taken = wait_for("the published state", lambda: latency(event, word, trio), 0.5)
        took = f"{taken:.1f} ms"
        if event.sign == "-":
            return f"{at}  - {event.prefix}  {took}"
        communities = " ".join(event.communities + event.large_communities) or "none"
        return f"{at}  + {event.prefix}  next hop {event.next_hop}  community {communities}  {took}"
    return f"{at}  {event.sign} {event.prefix}"


def latency(event: Event, word: str, trio: Trio) -> float | None:
    notes = reversed(trio.state().get("recent", []))
    return next((1000 * (event.time - at) for at, text in notes if text == f"{word} {event.prefix}"), None)


def run_lab(options: argparse.Namespace) -> None:
    exabgp = find_exabgp(options.exabgp)
    ignored = sorted(filter(foreign, os.environ))
    if ignored:
        print(f"Left out of the lab's environment: {', '.join(ignored)}")
    if options.port:
        check_port(options.port)
    with lab_directory(options.directory) as directory, contextlib.ExitStack() as stack:
        upstream = Upstream(directory, exabgp)
        trio = Trio(directory, exabgp, upstream.port, port=options.port)
        upstream.start()
        stack.callback(upstream.stop)
        stack.callback(trio.stop)
        trio.start()
        print(introduction(trio, upstream.port), flush=True)
        while True:
            for event in upstream.poll():
                print(describe(event, trio), flush=True)
            for process in (upstream.process, trio.daemon, trio.receiver):
                assert process is not None
                process.check()
            time.sleep(0.02)


def introduction(trio: Trio, upstream_port: int) -> str:
    status = shlex.join([sys.executable, str(ROOT / "rtbh_controller.py"), "--config", str(trio.config), "--status"])
    return f"""\
The lab runs: ExaBGP {trio.state()["exabgp"]} (AS 65001) with an upstream (AS 65000) on 127.0.0.1:{upstream_port}.
In another terminal, as {getpass.getuser()}, type:

  echo "announce 192.0.2.100/32" > {trio.pipe}
  echo "withdraw 192.0.2.100/32" > {trio.pipe}
  echo "withdraw-all" > {trio.pipe}

  curl -X POST http://127.0.0.1:{trio.port}/ -H "X-Auth-Token: {trio.token}" \\
    -d '{{"action": "announce", "target_ip": "192.0.2.100", "withdraw_after": 60}}'
  curl -X POST http://127.0.0.1:{trio.port}/ -H "X-Auth-Token: {trio.token}" \\
    -d '{{"action": "withdraw", "target_ip": "192.0.2.100"}}'

  {status}

What the upstream receives (+) and loses (-), and how long after the controller read the command.
Logs are in {trio.directory}. Ctrl-C ends everything.
"""


def record(path: str) -> None:
    """Copy what ExaBGP says on stdin to a file: the upstream's API process."""
    with open(path, "a", encoding="utf-8") as file:
        for line in sys.stdin:
            file.write(line)
            file.flush()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="the webhook's port (default: a free one)")
    parser.add_argument("--directory", help="where pipe, settings and logs go (default: a temporary one)")
    parser.add_argument("--exabgp", help="the ExaBGP to run (default: the one installed beside this Python)")
    parser.add_argument("--record", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        run_lab(options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe lab has ended.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
