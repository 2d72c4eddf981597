"""From an alert to the packet that is dropped at the edge, and back; nobody else is touched."""

from __future__ import annotations

import pytest

from topology import BYSTANDER, BYSTANDER6, VICTIM, VICTIM6, Site

pytestmark = pytest.mark.root


def check(site: Site, victim: str, bystander: str, prefix: str, dropped: bool) -> None:
    """What the router drops, what gets through, and that nobody beyond it hears of it."""
    site.wait_for_discards({prefix} if dropped else set())
    if site.router.discards_in_kernel:
        assert site.loss(victim) == (100 if dropped else 0)
    assert site.loss(bystander) == 0
    assert prefix not in site.exported()


@pytest.mark.parametrize(("victim", "bystander", "bits"), [(VICTIM, BYSTANDER, 32), (VICTIM6, BYSTANDER6, 128)])
def test_announce_and_withdraw(site: Site, victim: str, bystander: str, bits: int) -> None:
    host = site.add_host()
    host.start()
    prefix = f"{victim}/{bits}"
    check(site, victim, bystander, prefix, dropped=False)
    host.echo(f"announce {prefix}")
    check(site, victim, bystander, prefix, dropped=True)
    host.echo(f"withdraw {prefix}")
    check(site, victim, bystander, prefix, dropped=False)


def test_a_post_ends_by_itself(site: Site) -> None:
    host = site.add_host()
    host.start()
    for victim in (VICTIM, VICTIM6):
        answer = host.post(f'{{"target_ip": "{victim}", "withdraw_after": 3, "wait": 2}}')
        assert answer["delivered"] is True
    site.wait_for_discards({f"{VICTIM}/32", f"{VICTIM6}/128"})
    site.wait_for_discards(set())
    assert site.loss(VICTIM) == site.loss(VICTIM6) == 0
