"""What the router refuses by itself, whatever the host may send."""

from __future__ import annotations

import pytest

from lab import wait_for
from topology import SETTINGS, Site

pytestmark = pytest.mark.root

BAD = """
        route 192.0.2.0/24 next-hop self community [65535:666];
        route 192.0.2.7/32 next-hop self;
        route 198.18.5.5/32 next-hop self community [65535:666];
        route 2001:db8:1::/64 next-hop 100::1 community [65535:666];
        route 2001:db8:1::7/128 next-hop 100::1;
        route 2001:db9::7/128 next-hop 100::1 community [65535:666];
"""


def test_short_ones_others_and_those_without_the_community(site: Site) -> None:
    host = site.add_host()
    host.static = BAD
    host.start()
    host.echo("announce 192.0.2.9", "announce 2001:db8:1::9")  # behind them all on the wire
    site.wait_for_discards({"192.0.2.9/32", "2001:db8:1::9/128"})
    assert site.router.accepted() == {"192.0.2.9/32", "2001:db8:1::9/128"}
    assert site.exported() == set()


def test_one_prefix_too_many(site: Site) -> None:
    """A router that can refuses the 51st; one that can't is spared by our own limit. No session ends."""
    host = site.add_host()
    limit = 50
    if site.router.refuses_one_too_many or site.router.discards_in_kernel:
        host.settings = SETTINGS + "max_routes = 60\n"
        limit = 50 if site.router.refuses_one_too_many else 51
    host.start()
    host.echo(*[f"announce 192.0.2.{n}" for n in range(1, 51)])
    fifty = {f"192.0.2.{n}/32" for n in range(1, 51)}
    site.wait_for_discards(fifty)
    host.echo("announce 192.0.2.51")
    if limit == 51:
        site.wait_for_discards(fifty | {"192.0.2.51/32"})
        wait_for("a warning", site.router.warned)
    host.echo("withdraw 192.0.2.1", "announce 2001:db8:1::9")
    gone = {"192.0.2.1/32"}
    site.wait_for_discards((fifty | ({"192.0.2.51/32"} if limit == 51 else set())) - gone | {"2001:db8:1::9/128"})
    assert site.router.established()
    assert host.log_text().count("NEIGHBOR 198.51.100.1 up") == 1
