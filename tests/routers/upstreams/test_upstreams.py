"""Two upstreams, each with a community of its own."""

from __future__ import annotations

import pytest

from conftest import MakeSite
from topology import SETTINGS, VICTIM, Bird, SecondBird

pytestmark = pytest.mark.root


def test_each_sees_its_own_community(make_site: MakeSite) -> None:
    site = make_site(Bird)
    host = site.add_host()
    second = site.namespace()
    second.link(host.namespace, "eth0", "eth1", "203.0.113.1/24", "203.0.113.10/24")
    other = SecondBird(second, site.directory)
    site.stack.callback(other.stop)
    other.start()
    host.second_upstream = True
    host.settings = SETTINGS + "[neighbor 203.0.113.1]\ncommunity = 65535:666 3356:9999\n"
    host.start()
    host.echo(f"announce {VICTIM}")
    first = site.router
    assert isinstance(first, Bird)
    for router in (first, other):
        site.router = router
        site.wait_for_discards({f"{VICTIM}/32"})
    assert "(3356,9999)" in other.communities(f"{VICTIM}/32")
    assert "(3356,9999)" not in first.communities(f"{VICTIM}/32")
    host.echo(f"withdraw {VICTIM}")
    for router in (first, other):
        site.router = router
        site.wait_for_discards(set())
