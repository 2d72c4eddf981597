"""From an alert to the packet that is dropped at the edge, and back; nobody else is touched."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable

import pytest

from lab import wait_for
from topology import BYSTANDER, BYSTANDER6, VICTIM, VICTIM6, Site, Stream

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


@pytest.mark.parametrize(("victim", "bystander", "bits"), [(VICTIM, BYSTANDER, 32), (VICTIM6, BYSTANDER6, 128)])
def test_a_post_ends_by_itself(site: Site, victim: str, bystander: str, bits: int) -> None:
    host = site.add_host()
    host.start()
    answer = host.post(f'{{"target_ip": "{victim}", "withdraw_after": 8, "wait": 2}}')
    assert answer["delivered"] is True
    check(site, victim, bystander, f"{victim}/{bits}", dropped=True)
    check(site, victim, bystander, f"{victim}/{bits}", dropped=False)


def test_how_long_from_the_alert_to_the_drop(site: Site, record_property: Callable[[str, object], None]) -> None:
    """Printed at the end, and not judged: see there. What is judged is that traffic stops and comes back each time."""
    host = site.add_host()
    host.webhook_settings = "max_announcements_per_minute = 1000\n"
    host.start()
    prefix = f"{VICTIM}/32"
    with (
        contextlib.closing(host.connect()) as detector,
        contextlib.closing(Stream(site.outside, site.lan, VICTIM)) as stream,
    ):

        def post() -> None:
            body = json.dumps({"target_ip": VICTIM, "withdraw_after": 600})
            detector.request("POST", "/", body, {"X-Auth-Token": host.token})

        def in_table(alert: Callable[[], None]) -> float:
            begin = time.monotonic()
            alert()
            site.wait_for_discards({prefix})
            return time.monotonic() - begin

        for name, alert in (("pipe", lambda: host.echo(f"announce {prefix}")), ("POST", post)):
            taken = []
            for _ in range(20):
                wait_for("the victim's traffic", stream.flows)
                if site.router.discards_in_kernel:
                    taken.append(1000 * stream.lost_after(alert))
                else:
                    taken.append(1000 * in_table(alert))
                if alert is post:
                    assert detector.getresponse().read()
                site.wait_for_discards({prefix})
                host.echo(f"withdraw {prefix}")
                site.wait_for_discards(set())
            end = "the first lost packet" if site.router.discards_in_kernel else "its table, by its command line"
            figures = f"median {statistics.median(taken):.1f} ms, {min(taken):.1f} to {max(taken):.1f}"
            record_property("measured", f"{site.router.name}: from {name} to {end}: {figures}")
    assert site.loss(BYSTANDER) == 0
