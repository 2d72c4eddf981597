"""Hosts and networks for tests that need root: a real systemd in a guest, and network namespaces.

Nothing here touches this machine's own network, cgroups of others, or files: a guest sees a
copy-on-write view of the root file system, and each namespace is held by a process that is ended
by its id. What can't run here raises CannotRun, with the reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from lab import LabError, wait_for

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
CGROUPS = Path("/sys/fs/cgroup/unified") if Path("/sys/fs/cgroup/unified").exists() else Path("/sys/fs/cgroup")

# A socket belongs to the namespace in which it was made, whoever it is then handed to.
HAND_OVER = """\
import socket, sys
to, made = socket.socket(fileno=int(sys.argv[1])), socket.socket(type=int(sys.argv[2]))
socket.send_fds(to, [b"socket"], [made.fileno()])
"""

# Duplicate address detection keeps an interface's IPv6 silent for its first second or two.
NO_DAD = "for kind in all default; do echo 0 >/proc/sys/net/ipv6/conf/$kind/accept_dad; done"


class CannotRun(Exception):
    """This machine lacks something; the text says what."""


def needs(*programs: str) -> None:
    """Raises CannotRun unless this is root and all programs are installed."""
    if os.geteuid() != 0:
        raise CannotRun("root is needed, for namespaces")
    for program in programs:
        if shutil.which(program, path=PATH) is None:
            raise CannotRun(f"{program} is missing")


class Namespace:
    """A network namespace with its loopback up, held by a process."""

    def __init__(self) -> None:
        needs("ip", "nsenter", "unshare")
        self.holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", f"{NO_DAD}; ip link set lo up && echo up && exec sleep infinity"],
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        assert self.holder.stdout
        if self.holder.stdout.readline() != b"up\n":
            raise CannotRun("network namespaces can't be made")
        self.pid = self.holder.pid

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command in here."""
        return ["nsenter", "-t", str(self.pid), "-n", *command]

    def run(self, *command: str, check: bool = True) -> str:
        """What a command prints on stdout. Raises LabError, with what it says, when it fails."""
        return run(self.inside(*command), check)

    def socket(self, kind: socket.SocketKind) -> socket.socket:
        """An IPv4 socket that is in here, for this process to use."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            words = [sys.executable, "-c", HAND_OVER, str(theirs.fileno()), str(int(kind))]
            subprocess.run(self.inside(*words), check=True, pass_fds=[theirs.fileno()])
            _, descriptors, _, _ = socket.recv_fds(ours, 16, 1)
        return socket.socket(fileno=descriptors[0])

    def link(self, other: Namespace | Guest, mine: str, its: str, *addresses: str) -> None:
        """A cable to another namespace: the interface names at both ends, then my and its address for each subnet."""
        self.run("ip", "link", "add", mine, "type", "veth", "peer", "name", its, "netns", str(other.pid))
        for name, where, given in ((mine, self, addresses[::2]), (its, other, addresses[1::2])):
            for address in filter(None, given):
                nodad = ["nodad"] if ":" in address else []
                where.run("ip", "address", "add", address, "dev", name, *nodad)
            where.run("ip", "link", "set", name, "up")

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()
        assert self.holder.stdout
        self.holder.stdout.close()


class Guest:
    """A host with a systemd of its own. Its changes lie in `directory`, and are there again after a reboot."""

    def __init__(self, directory: Path, shown: dict[Path, str], like: Path | None = None) -> None:
        """`shown`: directories, and where it sees them; `like`: of a guest that was, whose changes it begins with."""
        needs("ip", "nsenter", "unshare", "pivot_root", "systemctl")
        if "overlay" not in Path("/proc/filesystems").read_text() or not (CGROUPS / "cgroup.procs").exists():
            raise CannotRun("overlay file systems and cgroup 2 are needed")
        self.directory, self.shown = directory, shown
        if like:
            subprocess.run(["cp", "-a", str(like / "changes"), str(directory)], check=True)
        self.cgroup = CGROUPS / directory.name
        self.pid = 0
        self.parent: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Start it; returns when all its services have been started. Raises CannotRun or LabError."""
        self.cgroup.mkdir(exist_ok=True)
        if not (self.cgroup / "cgroup.kill").exists():
            raise CannotRun("Linux 5.14 or newer is needed, for cgroup.kill")
        shown = [f"{source}:{target}" for source, target in self.shown.items()]
        script = str(Path(__file__).with_name("guest.sh"))
        with (self.directory / "console").open("ab") as console:
            namespaces = ["--mount", "--pid", "--fork", "--uts", "--ipc", "--net"]
            parent = self.parent = subprocess.Popen(
                ["unshare", *namespaces, script, "enter", str(self.cgroup), str(self.directory), *shown],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
            )
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")

        def up() -> bool:
            if parent.poll() is not None:
                raise CannotRun(f"a systemd can't be booted: {(self.directory / 'console').read_text()}")
            self.pid = int((children.read_text().split() or ["0"])[0])
            return Path(f"/proc/{self.pid}/root/run/systemd/private").exists()

        wait_for("systemd", up, 60)
        self.run("ip", "link", "set", "lo", "up")
        self.run("systemctl", "is-system-running", "--wait", check=False)

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a command prints on stdout, run in the guest as root."""
        return run(self.enter(*command), check, **environment)

    def enter(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-n", "-C", "-r", "-w", *command]

    def shell(self, text: str, check: bool = True) -> str:
        return self.run("bash", "-euo", "pipefail", "-c", text, check=check)

    def path(self, inside: str) -> Path:
        """A file of the guest, seen from here."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def power_off(self) -> None:
        """In order: every service is stopped."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGRTMIN + 4)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.parent:
                self.parent.wait(30)
        self.pull_the_plug()

    def pull_the_plug(self) -> None:
        """All at once."""
        with contextlib.suppress(FileNotFoundError):  # systemd removes it at its end
            (self.cgroup / "cgroup.kill").write_text("1")
        if self.parent:
            self.parent.wait(10)
        wait_for("the guest's end", self.removed)

    def removed(self) -> bool:
        for directory, _, _ in os.walk(self.cgroup, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        return not self.cgroup.exists()

    def close(self) -> None:
        if self.cgroup.exists():
            self.pull_the_plug()


def run(command: list[str], check: bool = True, **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False, env=ENVIRONMENT | environment
    )
    if check and result.returncode:
        raise LabError(f"{' '.join(command)}: {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout
