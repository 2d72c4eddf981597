"""The receiver's decisions: bodies, guards, the rate limit and the timers, without a socket or a clock."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtbh_controller import Now, Settings, parse_line, parse_prefix, parse_settings, printable
from webhook_receiver import (
    Decision,
    Desk,
    Rejected,
    Request,
    RequestReader,
    View,
    delivery,
    parse_body,
    read_orders,
)

NOW = Now(1_800_000_000.0, 1000.0)


def settings(text: str = "") -> Settings:
    found, faults = parse_settings(text)
    assert not faults
    return found


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        ('{"target_ip": "192.0.2.100"}', Request("announce", parse_prefix("192.0.2.100"))),
        (
            '{"action": "announce", "target_ip": "192.0.2.100", "withdraw_after": 60}',
            Request("announce", parse_prefix("192.0.2.100"), 60),
        ),
        (
            '{"target_ip": "2001:db8::1", "withdraw_after": 60.0, "dry_run": true, "wait": 2.5, "reason": "SYN flood"}',
            Request("announce", parse_prefix("2001:db8::1"), 60, True, 2.5, "SYN flood"),
        ),
        ('{"action": "withdraw", "target_ip": "192.0.2.1/32"}', Request("withdraw", parse_prefix("192.0.2.1"))),
        ('{"action": "withdraw-all"}', Request("withdraw-all", None)),
        ('{"target_ip": "192.0.2.1", "severity": {"any": ["thing"]}}', Request("announce", parse_prefix("192.0.2.1"))),
    ],
)
def test_bodies(body: str, request_: Request) -> None:
    assert parse_body(body.encode()) == request_


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "body: not JSON"),
        (b"{", "body: not JSON"),
        (b"[]", "body: must be a JSON object"),
        (b'"x"', "body: must be a JSON object"),
        (b"null", "body: must be a JSON object"),
        (b"\xff\xfe", "body: not UTF-8"),
        (b"[" * 60000, "body: n"),
        (b'{"target_ip": "192.0.2.1", "target_ip": "192.0.2.2"}', "body: not JSON: a key stands twice"),
        (b'{"target_ip": "192.0.2.1"} x', "body: not JSON"),
        (b"{}", "target_ip: must be given"),
        (b'{"target_ip": null}', "target_ip: must be given"),
        (b'{"target_ip": 3221225985}', "target_ip: not a string"),
        (b'{"target_ip": ["192.0.2.1"]}', "target_ip: not a string"),
        (b'{"target_ip": ""}', "target_ip: not an IPv4 or IPv6"),
        (b'{"target_ip": "192.0.2.1\\nwithdraw-all"}', "target_ip: not an IPv4 or IPv6"),
        (b'{"target_ip": "192.0.2.1 192.0.2.2"}', "target_ip: not an IPv4 or IPv6"),
        (b'{"target_ip": "192.0.2.1/33"}', "target_ip: not a prefix"),
        (b'{"target_ip": "192.0.2.1/24"}', "target_ip: not a prefix"),
        (b'{"target_ip": "2001:db8::1%eth0"}', "target_ip: not an IPv4 or IPv6"),
        (b'{"target_ip": "2001:db8::1/"}', "target_ip: not a prefix length"),
        ('{"target_ip": "١٩٢.0.2.1"}'.encode(), "target_ip: not an IPv4 or IPv6"),
        (b'{"target_ip": "\\ud800"}', "target_ip: not an IPv4 or IPv6"),
        (b'{"action": "nonsense", "target_ip": "192.0.2.1"}', "action: must be"),
        (b'{"action": null, "target_ip": "192.0.2.1"}', "action: must be"),
        (b'{"action": [], "target_ip": "192.0.2.1"}', "action: must be"),
        (b'{"action": "withdraw"}', "target_ip: must be given"),
        (b'{"action": "withdraw-all", "target_ip": "192.0.2.1"}', "target_ip: has no place"),
        (b'{"target_ip": "192.0.2.1", "withdraw_after": "soon"}', "withdraw_after: must be"),
        (b'{"target_ip": "192.0.2.1", "withdraw_after": null}', "withdraw_after: must be"),
        (b'{"target_ip": "192.0.2.1", "withdraw_after": true}', "withdraw_after: must be"),
        (b'{"target_ip": "192.0.2.1", "withdraw_after": 1.5}', "withdraw_after: must be"),
        (b'{"target_ip": "192.0.2.1", "withdraw_after": 1e999}', "withdraw_after: must be"),
        (b'{"target_ip": "192.0.2.1", "withdraw_after": NaN}', "withdraw_after: must be"),
        (b'{"target_ip": "192.0.2.1", "withdraw_after": [60]}', "withdraw_after: must be"),
        (b'{"target_ip": "192.0.2.1", "dry_run": "yes"}', "dry_run: must be"),
        (b'{"target_ip": "192.0.2.1", "reason": 7}', "reason: must be"),
        (b'{"target_ip": "192.0.2.1", "reason": "a\\nb"}', "reason: must be"),
        (json.dumps({"target_ip": "192.0.2.1", "reason": "x" * 201}).encode(), "reason: must be"),
    ],
)
def test_a_bad_body_is_a_400_that_names_the_field(body: bytes, error: str) -> None:
    with pytest.raises(Rejected) as rejected:
        parse_body(body)
    assert rejected.value.status == 400
    assert rejected.value.error.startswith(error)
    assert printable(rejected.value.error, 1000) == rejected.value.error


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "action": st.sampled_from(["announce", "withdraw", "withdraw-all"]) | json_values,
        "target_ip": st.ip_addresses().map(str) | json_values,
        "withdraw_after": st.integers(-10, 10**6) | json_values,
        "reason": st.text(max_size=210),
        "dry_run": st.booleans(),
    },
)


@given(fields | json_values)
def test_whatever_is_posted_only_canonical_commands_reach_the_pipe(content: Any) -> None:
    desk = Desk(settings())
    try:
        decision = desk.decide(parse_body(json.dumps(content).encode()), "ab12", view(settings()), NOW)
    except Rejected as rejected:
        assert 400 <= rejected.status < 500
        return
    assert "\n" not in decision.line
    assert len(decision.line.encode("ascii")) < 4096
    command = parse_line(decision.line)
    assert command is not None
    if command.prefix is not None:
        assert decision.line.split()[1] == str(command.prefix)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_400(body: bytes) -> None:
    try:
        parse_body(body)
    except Rejected as rejected:
        assert rejected.status == 400


UP = {"127.0.0.1": {"state": "up", "since": 1.0}}


def view(of: Settings, *routes: dict[str, Any], after: float = 0.0, refused: tuple[str, ...] = ()) -> View:
    """A published state with one session up."""
    state: dict[str, Any] = {"heartbeat": NOW.wall + after, "neighbors": UP, "routes": list(routes), "refused_ids": []}
    state["refused_ids"] = [] if "ended" in refused else list(refused)
    state["ended_ids"] = list(refused) if "ended" in refused else []
    return View(of, state | {"routers": ["192.0.2.254"]})


def route(identity: str, until: float | None = 1.0, announced_at: float = NOW.wall, **more: Any) -> dict[str, Any]:
    held: dict[str, Any] = {"prefix": "192.0.2.1/32", "id": identity, "until": until, "source": "webhook", "reason": ""}
    held |= {"announced_at": announced_at, "attributes": {"": "x"}, "neighbors": {"127.0.0.1": "advertised"}}
    return held | more


class Office(Desk):
    """A desk beside a controller that lives and shows all that it was told."""

    def __init__(self, text: str = "") -> None:
        super().__init__(settings(text))
        self.view = view(self.settings)

    def announce(self, target: str, now: Now, length: int | None = None) -> Decision:
        request = Request("announce", parse_prefix(target), length)
        self.view.heartbeat = now.wall
        decision = self.decide(request, "id1", self.view, now)
        self.commit(decision, request, self.view, now)
        return decision

    def rejection(self, target: str, now: Now, length: int | None = None) -> Rejected:
        before = (list(self.accepted), dict(self.orders))
        with pytest.raises(Rejected) as rejected:
            self.announce(target, now, length)
        assert (list(self.accepted), dict(self.orders)) == before
        return rejected.value


def test_an_announcement_and_its_end() -> None:
    desk = Office()
    decision = desk.announce("192.0.2.1", NOW, 60)
    assert decision.line == "announce 192.0.2.1/32 until=1800000060.000 id=id1 source=webhook"
    assert decision.answer == {"status": "ok", "prefix": "192.0.2.1/32", "withdraw_after": 60}
    assert decision.log == "WEBHOOK ANNOUNCE 192.0.2.1/32 (auto-withdraw in 60s)"
    assert desk.next_due() == NOW.mono + 60
    assert desk.overdue(desk.view, Now(NOW.wall, NOW.mono + 59.9)) == []
    (end,) = desk.overdue(desk.view, Now(NOW.wall - 86400, NOW.mono + 60))  # whatever the wall clock says
    assert (end.action, end.line, end.length) == ("withdraw", "withdraw 192.0.2.1/32 id=id1", 60)


def test_a_newer_announcement_replaces_the_timer_and_a_withdraw_cancels_it() -> None:
    desk = Office()
    desk.announce("192.0.2.1", NOW, 60)
    desk.announce("192.0.2.1", NOW, 600)
    assert desk.next_due() == NOW.mono + 600
    request = Request("withdraw", parse_prefix("192.0.2.1"))
    desk.commit(desk.decide(request, "x", desk.view, NOW), request, desk.view, NOW)
    assert desk.next_due() == float("inf")


@pytest.mark.parametrize(
    ("target", "status", "error"),
    [
        ("198.51.100.7", 403, "IP is whitelisted"),
        ("198.51.0.0/16", 403, "IP is whitelisted"),
        ("203.0.113.10", 403, "IP is whitelisted"),
        ("192.0.2.254", 403, "IP is whitelisted"),  # a router
        ("192.0.2.0/28", 403, "Prefix too short"),
        ("0.0.0.0/0", 403, "Prefix too short"),
        ("::/0", 403, "Prefix too short"),
        ("2001:db8::1", 409, "No IPv6 next hop is set: see next_hop_ipv6 in [bgp]"),
        ("192.0.2.66", 409, "Announced by exabgp.conf already"),
    ],
)
def test_guards_refuse_an_announce_and_never_a_withdraw(target: str, status: int, error: str) -> None:
    desk = Office()
    desk.view = view(desk.settings, route("", None, prefix="192.0.2.66/32", source="other"))
    rejected = desk.rejection(target, NOW)
    assert (rejected.status, rejected.error) == (status, error)
    desk.decide(Request("withdraw", parse_prefix(target)), "x", desk.view, NOW)


def test_only_own_prefixes_when_they_are_listed() -> None:
    desk = Office("[safety]\nallowed = 192.0.2.0/24")
    assert desk.rejection("10.0.0.1", NOW).error == "Not in allowed prefixes"
    desk.announce("192.0.2.1", NOW)


@pytest.mark.parametrize("length", [0, -1, 604801, 10**30])
def test_an_end_out_of_range_is_refused(length: int) -> None:
    assert "withdraw_after" in Office().rejection("192.0.2.1", NOW, length).error


def test_ten_announcements_in_any_minute_renewals_not_counted() -> None:
    desk = Office()
    for n in range(10):
        desk.announce(f"192.0.2.{n}", Now(NOW.wall, NOW.mono + n))
        desk.announce("192.0.2.0", Now(NOW.wall, NOW.mono + n))
    refused = desk.rejection("192.0.2.99", Now(NOW.wall, NOW.mono + 59.5))
    assert (refused.status, refused.error) == (429, "Rate limit exceeded")
    assert refused.retry_after == pytest.approx(0.5)
    desk.announce("192.0.2.99", Now(NOW.wall - 86400, NOW.mono + 60))  # whatever the wall clock does
    assert desk.rejection("192.0.2.98", Now(NOW.wall, NOW.mono + 60)).status == 429


@given(st.lists(st.floats(0, 40), max_size=80))
def test_no_sixty_seconds_hold_more_than_ten(pauses: list[float]) -> None:
    desk = Office("[webhook]\nmax_routes = 1000\n[safety]\nmax_routes = 1000")
    accepted: list[float] = []
    at = NOW.mono
    for n, pause in enumerate(pauses):
        at += pause
        recent = [t for t in accepted if t > at - 60]
        try:
            desk.announce(f"10.0.0.{n}", Now(NOW.wall, at), 604800)
            accepted.append(at)
            assert len(recent) < 10
        except Rejected:
            assert len(recent) == 10


def test_a_prefix_that_is_held_already_is_not_charged() -> None:
    """A detector that goes on about what an operator has pinned must not use up what new victims need."""
    desk = Office("[safety]\nmax_routes = 1")
    desk.view = view(desk.settings, route("", None, source="pipe"))
    for second in range(20):
        desk.announce("192.0.2.1", Now(NOW.wall + second, NOW.mono + second))
        desk.orders.clear()  # overtaken
    assert not desk.accepted


def test_announcing_again_what_was_just_withdrawn_is_charged() -> None:
    desk = Office()
    desk.view = view(desk.settings, route("id1"))  # still shown
    request = Request("withdraw", parse_prefix("192.0.2.1"))
    for _ in range(10):
        desk.commit(desk.decide(request, "", desk.view, NOW), request, desk.view, NOW)
        desk.announce("192.0.2.1", NOW)
    desk.commit(desk.decide(request, "", desk.view, NOW), request, desk.view, NOW)
    assert desk.rejection("192.0.2.1", NOW).status == 429


def test_limits_of_routes_count_what_is_published_and_what_is_on_its_way() -> None:
    desk = Office("[webhook]\nmax_routes = 2\n[safety]\nmax_routes = 4")
    desk.view = view(desk.settings, route("x", prefix="10.0.0.1/32", source="pipe"))
    desk.announce("192.0.2.1", NOW)
    desk.announce("192.0.2.2", NOW)
    refused = desk.rejection("192.0.2.3", NOW)
    assert (refused.status, refused.error) == (409, "Route limit reached")
    assert "2 routes of this receiver" in refused.log
    desk.announce("192.0.2.2", NOW)  # a renewal
    others = [route("x", prefix=f"10.0.0.{n}/32", source="pipe") for n in range(4)]
    desk = Office("[webhook]\nmax_routes = 2\n[safety]\nmax_routes = 4")
    desk.view = view(desk.settings, *others)
    assert "4 routes are held" in desk.rejection("192.0.2.3", NOW).log


def test_a_controller_without_a_heartbeat_is_a_503_for_all_but_what_is_refused_anyway() -> None:
    desk = Desk(settings())
    stale = view(desk.settings, after=-3.1)
    for action in ("announce", "withdraw"):
        with pytest.raises(Rejected) as rejected:
            desk.decide(Request(action, parse_prefix("192.0.2.1")), "x", stale, NOW)
        assert (rejected.value.status, rejected.value.retry_after) == (503, 1.0)
    with pytest.raises(Rejected) as rejected:
        desk.decide(Request("announce", parse_prefix("198.51.100.1")), "x", stale, NOW)
    assert rejected.value.status == 403


def test_warnings() -> None:
    desk = Office()
    desk.view = view(desk.settings, route("", None, source="pipe"))
    assert "pinned" in desk.announce("192.0.2.1", NOW).answer["warning"]
    desk.view.neighbors = {"127.0.0.1": {"state": "down", "since": 1.0}}
    assert "no BGP session is up" in desk.announce("192.0.2.2", NOW).answer["warning"]


# ---------------------------------------------------------------- orders, until they are done

LATER = Now(NOW.wall + 2, NOW.mono + 2)


@pytest.mark.parametrize(
    ("action", "after", "routes", "refused", "again", "open_"),
    [
        ("announce", -9, [], (), False, True),  # the controller is away: nothing is known
        ("announce", 0.1, [], (), False, True),  # published before it can have been read
        ("announce", 2, [], (), True, True),
        ("announce", 2, [route("id1")], (), False, True),  # its end is still to come
        ("announce", 2, [route("older", 1.0, NOW.wall - 1)], (), True, True),
        ("announce", 2, [route("newer", 1.0, NOW.wall + 1)], (), False, False),  # another receiver's, since
        ("announce", 2, [route("", None)], (), False, False),  # pinned by an operator
        ("announce", 2, [], ("id1",), False, False),
        ("announce", 2, [], ("ended", "id1"), False, False),  # an operator was quicker than the heartbeat
        ("withdraw", 2, [], (), False, False),
        ("withdraw", 2, [route("id1")], (), True, True),
        ("withdraw", 2, [route("", None, NOW.wall + 1)], (), False, False),  # announced again since
    ],
)
def test_a_line_is_written_again_until_the_state_shows_it(
    action: str, after: float, routes: list[dict[str, Any]], refused: tuple[str, ...], again: bool, open_: bool
) -> None:
    desk = Office()
    request = Request(action, parse_prefix("192.0.2.1"))
    desk.commit(desk.decide(request, "id1", desk.view, NOW), request, desk.view, NOW)
    seen = view(desk.settings, *routes, after=after, refused=refused)
    desk.review(seen, LATER)
    assert len(desk.overdue(seen, LATER)) == again
    assert ("192.0.2.1/32" in desk.orders) == open_


def test_a_timer_is_over_when_its_route_has_gone_or_is_another_ones() -> None:
    for routes in ((), (route("", None),), (route("other", 9e9, NOW.wall + 1),)):
        desk = Office()
        desk.announce("192.0.2.1", NOW, 60)
        desk.review(view(desk.settings, route("id1"), after=1), LATER)
        assert desk.orders["192.0.2.1/32"].shown
        records, _ = desk.review(view(desk.settings, *routes, after=2), LATER)
        assert records == ['{"over": "192.0.2.1/32"}']
        assert desk.next_due() == float("inf")


def test_what_a_controller_shows_that_stops_ends_no_timer() -> None:
    """With `restore = always` its successor holds the route again, and the receiver must end it."""
    desk = Office()
    desk.announce("192.0.2.1", NOW, 60)
    desk.review(view(desk.settings, route("id1"), after=1), LATER)
    stopping = View(desk.settings, {"heartbeat": LATER.wall, "neighbors": UP, "routes": [], "stopping": True})
    assert not stopping.fresh(LATER)
    assert desk.review(stopping, LATER) == ([], [])
    assert desk.next_due() == NOW.mono + 60


def test_an_end_is_pursued_until_the_route_has_gone() -> None:
    desk = Office()
    desk.announce("192.0.2.1", NOW, 1)
    (end,) = desk.overdue(desk.view, LATER)
    desk.orders[end.prefix] = end
    still = view(desk.settings, route("id1"), after=3.5)
    at = Now(NOW.wall + 4, NOW.mono + 4)
    assert desk.review(still, at) == ([], [])
    assert [order.line for order in desk.overdue(still, at)] == ["withdraw 192.0.2.1/32 id=id1"]
    desk.review(view(desk.settings, after=3.5), at)
    assert desk.orders == {}


def test_nothing_is_written_again_while_lines_wait_in_the_pipe() -> None:
    """The first copy may be among them, and behind it a line of somebody who was quicker than our second."""
    desk = Office()
    request = Request("withdraw", parse_prefix("192.0.2.1"))
    desk.commit(desk.decide(request, "id1", desk.view, NOW), request, desk.view, NOW)
    held = route("", None, NOW.wall - 9)  # what it withdraws
    late = Now(NOW.wall + 9, NOW.mono + 9)
    desk.unread_at = late.wall
    seen = view(desk.settings, held, after=9)
    assert desk.review(seen, late) == ([], [])
    assert desk.overdue(seen, late) == []
    desk.unread_at = late.wall - 1
    assert len(desk.overdue(seen, late)) == 1


def test_a_withdraw_is_delivered_when_exabgp_has_answered() -> None:
    desk = Office()
    request = Request("withdraw", parse_prefix("192.0.2.1"))
    (order,) = desk.commit(desk.decide(request, "", desk.view, NOW), request, desk.view, NOW)
    state = {"heartbeat": NOW.wall + 1, "neighbors": UP, "routes": []}
    told = {"127.0.0.1": "advertised"}
    assert delivery(order, View(desk.settings, state)) == (True, told)
    assert not delivery(order, View(desk.settings, state | {"withdrawing": ["192.0.2.1/32"]}))[0]
    assert not delivery(order, View(desk.settings, state | {"heartbeat": NOW.wall - 1}))[0]


def test_a_clock_that_was_set_back_holds_nothing_up() -> None:
    desk = Office()
    desk.announce("192.0.2.1", NOW)
    back = Now(NOW.wall - 3600, NOW.mono + 2)
    desk.unread_at = NOW.wall
    seen = view(desk.settings, after=-3600)
    desk.review(seen, back)
    assert len(desk.overdue(seen, back)) == 1


@given(st.integers(0, 999_999), st.integers(-(10**6), 10**6), st.integers(0, 400), st.booleans())
def test_orders_come_back_from_disk_and_last_no_longer_than_they_were_to(
    length: int, step: int, cut: int, ended: bool
) -> None:
    desk = Office("[webhook]\nmax_withdraw_after = 1000000")
    records = []
    for n in (1, 2):
        request = Request("announce", parse_prefix(f"192.0.2.{n}"), length + 1)
        orders = desk.commit(desk.decide(request, f"id{n}", desk.view, NOW), request, desk.view, NOW)
        records += [order.record() for order in orders]
    records += ['{"over": "192.0.2.1/32"}'] if ended else []
    text = "".join(f"{record}\n" for record in records)
    now = Now(NOW.wall + step, 5.0)
    found = read_orders(text, now)
    assert found.keys() == {"192.0.2.2/32"} | (set() if ended else {"192.0.2.1/32"})
    for order in found.values():
        assert order.due - now.mono == pytest.approx(min(length + 1 - step, length + 1), abs=0.01)
    assert read_orders("".join(order.record() + "\n" for order in found.values()), now) == found
    torn = read_orders(text[:cut], now)
    assert torn.keys() <= {"192.0.2.1/32", "192.0.2.2/32"}


# ---------------------------------------------------------------- HTTP

GOOD = b"POST / HTTP/1.1\r\nHost: x\r\nX-Auth-Token: t\r\nContent-Length: 2\r\n\r\n{}"


@given(st.lists(st.integers(1, 60), max_size=12))
def test_requests_are_the_same_however_the_bytes_arrive(cuts: list[int]) -> None:
    data = GOOD + b"\r\n" + GOOD.replace(b"\r\n", b"\n") + b"GET /health HTTP/1.0\r\n\r\n"
    reader, found, at = RequestReader(), [], 0
    for cut in [*cuts, len(data)]:
        reader.feed(data[at : at + cut])
        at += cut
        while request := reader.next():
            found.append((request.method, request.path, request.body, request.keep_alive))
    assert found == [("POST", "/", b"{}", True)] * 2 + [("GET", "/health", b"", False)]
    assert not reader.buffer


@given(st.binary(max_size=300), st.integers(0, 99))
def test_any_bytes_are_a_request_or_an_error(noise: bytes, at: int) -> None:
    for data in (noise, GOOD[:at] + noise + GOOD[at:]):
        reader = RequestReader()
        reader.feed(data)
        try:
            for _ in range(10):
                reader.next()
        except Rejected as rejected:
            assert 400 <= rejected.status < 506
