"""What the tests share: the two ExaBGP versions, a running trio, and the rule about skips."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest import CannotRun
from lab import Trio, Upstream
from topology import ROUTERS, Router, Site

EXABGP_VERSIONS = ("5.0.15", "4.2.25")


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "exabgp-rtbh"


def install_exabgp(version: str) -> str:
    """The path of that ExaBGP, in a virtual environment made once for all runs and workers."""
    python = f"py{sys.version_info[0]}.{sys.version_info[1]}"
    home = cache_directory() / f"exabgp-{version}-{python}"
    home.parent.mkdir(parents=True, exist_ok=True)
    ready = home / "ready"
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", f"exabgp=={version}"]
            if sys.version_info >= (3, 12):
                pip.append("setuptools")  # ExaBGP 4.2 takes pkg_resources from it, which no longer comes along
            subprocess.run(pip, check=True)
            ready.touch()
    return str(home / "bin" / "exabgp")


@pytest.fixture(scope="session", params=EXABGP_VERSIONS)
def exabgp(request: pytest.FixtureRequest) -> str:
    """ExaBGP, once of each version that the project supports."""
    return install_exabgp(request.param)


@pytest.fixture(scope="session")
def newest_exabgp() -> str:
    """ExaBGP of the newest supported version, for tests that no version changes."""
    return install_exabgp(EXABGP_VERSIONS[0])


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: ExaBGP can't run from any path, and sockets have short ones."""
    with tempfile.TemporaryDirectory(prefix="rtbh-test-") as path:
        yield Path(path)


StartTrio = Callable[..., tuple[Trio, Upstream]]


@pytest.fixture
def start_trio(directory: Path) -> Iterator[StartTrio]:
    """A function that starts an upstream and a trio with these settings and ends them after the test."""
    with contextlib.ExitStack() as stack:

        def start(
            exabgp: str, settings: str = "", webhook: str = "", hold_time: int = 90, second: Upstream | None = None
        ) -> tuple[Trio, Upstream]:
            upstream = Upstream(directory, exabgp, hold_time)
            trio = Trio(directory, exabgp, upstream.port, settings)
            trio.webhook_settings, trio.hold_time = webhook, hold_time
            for router in filter(None, (upstream, second)):
                stack.callback(router.stop)
                router.start()
                trio.upstreams[router.address] = router.port
            stack.callback(trio.stop)
            trio.start()
            return trio, upstream

        yield start


MakeSite = Callable[..., Site]


@pytest.fixture
def make_site(directory: Path, newest_exabgp: str) -> Iterator[MakeSite]:
    """A function that builds the network around a router of that kind; with the newest ExaBGP, or another one."""
    with contextlib.ExitStack() as stack:

        def make(kind: type[Router], exabgp: str = newest_exabgp) -> Site:
            try:
                return Site(directory, exabgp, kind, stack)
            except CannotRun as error:
                pytest.skip(str(error))

        yield make


@pytest.fixture(params=ROUTERS, ids=lambda kind: kind.name)
def site(request: pytest.FixtureRequest, make_site: MakeSite) -> Site:
    """The network, once around each router."""
    return make_site(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs root is skipped without it; with RTBH_NO_SKIPS it is left out here, and run as root elsewhere."""
    if os.geteuid() == 0:
        return
    needing = [item for item in items if item.get_closest_marker("root")]
    if os.environ.get("RTBH_NO_SKIPS"):
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
    for item in needing:
        item.add_marker(pytest.mark.skip(reason="root is needed: sudo .venv/bin/pytest -m root"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was measured, and what was not run."""
    passed = terminalreporter.stats.get("passed", [])
    for line in sorted(str(value) for report in passed for name, value in report.user_properties if name == "measured"):
        terminalreporter.write_line(line)
    if config.option.markexpr == "not slow and not root":
        terminalreporter.write_line("Left out: real routers and a real systemd (sudo .venv/bin/pytest -m root -n 2),")
        terminalreporter.write_line("          and what takes minutes (.venv/bin/pytest -m slow).")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With RTBH_NO_SKIPS set, where everything is installed, a skipped test is a failure of the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("RTBH_NO_SKIPS") and reporter and reporter.stats.get("skipped"):
        reporter.write_line("skipped tests are failures here (RTBH_NO_SKIPS)", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
