"""Sessions flap, routers restart, ExaBGP dies: every blackhole is back at the edge, and none too many."""

from __future__ import annotations

import pytest

from lab import wait_for
from topology import VICTIM, VICTIM6, Site

pytestmark = pytest.mark.root

HELD = {f"{VICTIM}/32", f"{VICTIM6}/128"}


@pytest.fixture
def attacked(site: Site) -> Site:
    """A site on whose router both victims are blackholed."""
    host = site.add_host()
    host.start()
    host.echo(f"announce {VICTIM}", f"announce {VICTIM6}")
    site.wait_for_discards(HELD)
    return site


def test_the_session_flaps(attacked: Site) -> None:
    (host,) = attacked.hosts
    attacked.router.flap()
    host.wait_for_log("NEIGHBOR 198.51.100.1 down")
    host.echo("announce 192.0.2.77")  # while it is down
    wait_for("the session", attacked.router.established, 60)
    attacked.wait_for_discards(HELD | {"192.0.2.77/32"}, 60)
    host.echo("withdraw-all")
    attacked.wait_for_discards(set())


@pytest.mark.parametrize("how", ["in order", "by a crash"])
def test_the_router_restarts(attacked: Site, how: str) -> None:
    (host,) = attacked.hosts
    if how == "in order":
        attacked.router.stop()
    else:
        attacked.router.crash()
    host.wait_for_log("NEIGHBOR 198.51.100.1 down")
    host.echo(f"withdraw {VICTIM}")
    attacked.router.start()
    attacked.wait_for_discards(HELD - {f"{VICTIM}/32"}, 90)
    if attacked.router.discards_in_kernel:
        assert attacked.loss(VICTIM) == 0
        assert attacked.loss(VICTIM6) == 100


def test_exabgp_is_killed_and_comes_back(attacked: Site) -> None:
    (host,) = attacked.hosts
    assert host.daemon
    host.daemon.popen.kill()
    host.daemon.popen.wait()
    attacked.wait_for_discards(set())
    host.patience = 60
    host.start_exabgp()
    attacked.wait_for_discards(HELD, 60)
