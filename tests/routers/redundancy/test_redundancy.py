"""Two hosts with the trio, one router: what one announces stays when the other dies."""

from __future__ import annotations

import pytest

from conftest import MakeSite
from lab import wait_for
from topology import VICTIM, Bird

pytestmark = pytest.mark.root


class BirdForTwo(Bird):
    """BIRD with a session for each host."""

    def configuration(self) -> str:
        one = super().configuration()
        session = one[one.index("protocol bgp rtbh {") :]
        return one + session.replace("bgp rtbh {", "bgp rtbh2 {").replace("198.51.100.10", "198.51.100.11")


def test_one_host_dies_in_an_attack(make_site: MakeSite) -> None:
    site = make_site(BirdForTwo)
    hosts = [site.add_host("198.51.100.10"), site.add_host("198.51.100.11")]
    for host in hosts:
        host.start()
    for host in hosts:  # a detector tells both
        assert host.post(f'{{"target_ip": "{VICTIM}", "wait": 5}}')["delivered"] is True
    site.wait_for_discards({f"{VICTIM}/32"})
    assert hosts[0].daemon
    hosts[0].daemon.popen.kill()
    hosts[0].daemon.popen.wait()
    hosts[1].wait_for_log("ANNOUNCE")
    for _ in range(3):
        assert site.loss(VICTIM) == 100
    hosts[0].start_exabgp()  # it brings its blackholes back
    withdraw = f'{{"action": "withdraw", "target_ip": "{VICTIM}", "wait": 5}}'
    assert hosts[0].post(withdraw)["delivered"] is True
    assert site.loss(VICTIM) == 100  # the other still says so
    assert hosts[1].post(withdraw)["delivered"] is True
    wait_for("the victim to be back", lambda: site.loss(VICTIM) == 0)
    assert site.router.discards() == set()
