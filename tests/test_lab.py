"""The lab as a newcomer runs it, and the files under etc/ as an operator gets them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import ROOT, Process, clean_environment, free_port, wait_for
from rtbh_controller import Settings, load_settings

LAB = [sys.executable, str(ROOT / "tests" / "lab.py")]


@pytest.fixture
def lab(directory: Path, exabgp: str) -> Iterator[Process]:
    """A running lab in a directory `lab` of its own, its output in `out`."""
    command = [*LAB, "--exabgp", exabgp, "--directory", str(directory / "lab")]
    process = Process("the lab", command, directory / "out", clean_environment(PYTHONUNBUFFERED="1"))

    def introduced() -> bool:
        process.check()
        return "Ctrl-C ends everything" in process.log.read_text()

    wait_for("the introduction", introduced)
    yield process
    process.stop(signal.SIGINT)


def family(pid: int) -> list[int]:
    """The ids of all processes below this one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [grandchild for child in children for grandchild in family(int(child))]


def shell(command: str) -> str:
    return subprocess.run(["/bin/sh", "-c", command], check=True, capture_output=True, text=True, timeout=20).stdout


def test_what_the_lab_says_to_type_works_and_ctrl_c_leaves_nothing(lab: Process, directory: Path) -> None:
    def output() -> str:
        return lab.log.read_text()

    assert "BGP session up" in wait_for("the session", lambda: "session up" in output() and output())
    typed = re.sub(r"\\\n\s*", " ", output())
    announce, withdraw, withdraw_all = re.findall(r'^  (echo ".*)$', typed, re.MULTILINE)
    post, post_withdraw = re.findall(r"^  (curl .*)$", typed, re.MULTILINE)
    (status,) = re.findall(r"^  (.* --status)$", typed, re.MULTILINE)
    line = r"\d\d:\d\d:\d\d  \{} 192\.0\.2\.100/32 .* \d+\.\d ms\n"

    def seen(sign: str) -> int:
        return len(re.findall(line.format(sign), output()))

    shell(announce)
    wait_for("the announce", lambda: seen("+") == 1)
    assert "next hop 127.0.0.2  community 65535:666" in output()
    assert "192.0.2.100/32" in shell(status)
    shell(withdraw)
    wait_for("the withdraw", lambda: seen("-") == 1)
    shell(announce)
    wait_for("the announce", lambda: seen("+") == 2)
    shell(withdraw_all)
    wait_for("the withdraw", lambda: seen("-") == 2)
    assert '"status": "ok"' in shell(post.replace("60}", "2}"))
    wait_for("the announce", lambda: seen("+") == 3)
    wait_for("its end", lambda: seen("-") == 3, 5)
    shell(post)
    wait_for("the announce", lambda: seen("+") == 4)
    assert '"status": "ok"' in shell(post_withdraw)
    wait_for("the withdraw", lambda: seen("-") == 4)

    processes = family(lab.popen.pid)
    assert len(processes) >= 5
    lab.send(signal.SIGINT)
    assert lab.popen.wait(20) == 0
    wait_for("every process to end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    assert sorted(path.name for path in directory.iterdir()) == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_lab_interrupted_while_it_starts_leaves_nothing(
    newest_exabgp: str, directory: Path, number: signal.Signals
) -> None:
    home = directory / "lab"
    command = [*LAB, "--exabgp", newest_exabgp, "--directory", str(home)]
    lab = Process("the lab", command, directory / "out", clean_environment())
    wait_for("the upstream's settings", (home / "upstream-127.0.0.1.conf").exists)
    processes = family(lab.popen.pid)
    lab.send(number)
    assert lab.popen.wait(20) == 0
    wait_for("every process to end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    assert not home.exists()


def refusal(*arguments: str, **environment: str) -> str:
    """What a lab that can't run says."""
    result = subprocess.run(
        [*LAB, *arguments], capture_output=True, text=True, timeout=60, env=os.environ | environment, check=False
    )
    assert result.returncode == 1, result
    assert "Traceback" not in result.stderr
    return result.stderr


def test_the_lab_says_what_is_in_the_way(newest_exabgp: str, directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port} is taken" in refusal("--exabgp", newest_exabgp, "--port", str(port))
    assert f"{directory} is there already" in refusal("--exabgp", newest_exabgp, "--directory", str(directory))
    assert "no ExaBGP at /none" in refusal("--exabgp", "/none")
    assert "path with spaces" in refusal("--exabgp", newest_exabgp, "--directory", f"{directory}/a b")
    broken = directory / "exabgp"
    broken.write_text("#!/bin/sh\necho out of order; exit 3\n")
    broken.chmod(0o755)
    said = refusal("--exabgp", str(broken))
    assert "the upstream ExaBGP ended with exit code 3" in said
    assert "out of order" in said


def test_a_port_is_given_to_one_alone() -> None:
    """Of two labs with one port the second would talk to the first one's upstream."""
    port = free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    socket.create_server(("127.0.0.1", port)).close()  # which says SO_REUSEADDR, as ExaBGP and BIRD do


def test_each_test_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text()))
    there = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (\w+)", file.read_text())
    }
    assert named
    assert named <= there


# ---------------------------------------------------------------- etc/


def validate(exabgp: str, path: Path) -> None:
    """ExaBGP's own check of a configuration, in the form of its version."""
    form = "--validate" if "exabgp-4" in exabgp else "validate"
    result = subprocess.run(
        [exabgp, form, str(path)], capture_output=True, text=True, timeout=30, env=clean_environment(), check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_example_configuration_is_valid_with_everything_enabled(exabgp: str, directory: Path) -> None:
    text = (ROOT / "etc" / "exabgp.conf").read_text()
    assert "run /etc/exabgp/rtbh-controller.py;" in text
    text = text.replace("/etc/exabgp/rtbh-controller.py", sys.executable)  # ExaBGP wants the program to be there
    path = directory / "exabgp.conf"
    path.write_text(text)
    validate(exabgp, path)
    # all that is commented out and looks like configuration
    first, neighbor, second = text.partition("#neighbor")
    enabled = first + neighbor[1:] + re.sub("^#", "", second, flags=re.MULTILINE)
    enabled = re.sub("^( +)# (md5-password|ipv6 unicast|route)", r"\1\2", enabled, flags=re.MULTILINE)
    for piece in ("\nneighbor 203.0.113.1 {", "\n        route 192.0.2.66/32", "\n        ipv6 unicast;"):
        assert piece in enabled
    path.write_text(enabled)
    validate(exabgp, path)


def test_the_example_settings_are_the_defaults_and_name_every_key() -> None:
    path = ROOT / "etc" / "rtbh.conf"
    settings, _ = load_settings(str(path))
    default = Settings()
    assert (settings.paths, settings.bgp, settings.safety) == (default.paths, default.bgp, default.safety)
    text = path.read_text()
    for section in ("paths", "bgp", "safety", "webhook"):
        body = text.partition(f"[{section}]")[2]
        for key in vars(getattr(default, section)):
            assert re.search(rf"^#?{key} =", body, re.MULTILINE), key


def test_commented_settings_are_valid_too(directory: Path) -> None:
    text = (ROOT / "etc" / "rtbh.conf").read_text()
    text = re.sub(r"^#(\w+ =|    |\[neighbor)", r"\1", text, flags=re.MULTILINE)
    text = text.replace("token = your", "#token = your")
    path = directory / "rtbh.conf"
    path.write_text(text)
    settings, warnings = load_settings(str(path))
    assert settings.safety.allowed
    assert settings.bgp_of("203.0.113.1").community == ("65535:666", "3356:9999")
    assert not warnings
