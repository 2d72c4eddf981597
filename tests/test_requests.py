"""The receiver's decisions: bodies, guards, the rate limit and the timers, without a socket or a clock."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtbh_controller import Now, Settings, parse_line, parse_prefix, parse_settings, printable
from webhook_receiver import Decision, Desk, Rejected, Request, parse_body

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
            '{"target_ip": "2001:db8::1", "withdraw_after": 60.0, "dry_run": true, "reason": "SYN flood"}',
            Request("announce", parse_prefix("2001:db8::1"), 60, True, "SYN flood"),
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
        decision = desk.decide(parse_body(json.dumps(content).encode()), "ab12", NOW)
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


def announce(desk: Desk, target: str, now: Now, length: int | None = None) -> Decision:
    request = Request("announce", parse_prefix(target), length)
    decision = desk.decide(request, "id1", now)
    desk.commit(decision, request, now)
    return decision


def rejection(desk: Desk, target: str, now: Now, length: int | None = None) -> Rejected:
    before = (list(desk.accepted), dict(desk.timers))
    with pytest.raises(Rejected) as rejected:
        announce(desk, target, now, length)
    assert (list(desk.accepted), dict(desk.timers)) == before
    return rejected.value


def test_an_announcement_and_its_end() -> None:
    desk = Desk(settings())
    decision = announce(desk, "192.0.2.1", NOW, 60)
    assert decision.line == "announce 192.0.2.1/32 until=1800000060.000 id=id1 source=webhook"
    assert decision.answer == {"status": "ok", "prefix": "192.0.2.1/32", "withdraw_after": 60}
    assert decision.log == "WEBHOOK ANNOUNCE 192.0.2.1/32 (auto-withdraw in 60s)"
    timer = desk.next_timer()
    assert timer is not None
    assert (timer.prefix, timer.due) == ("192.0.2.1/32", NOW.mono + 60)


def test_a_newer_announcement_replaces_the_timer_and_a_withdraw_cancels_it() -> None:
    desk = Desk(settings())
    announce(desk, "192.0.2.1", NOW, 60)
    announce(desk, "192.0.2.1", NOW, 600)
    timer = desk.next_timer()
    assert timer is not None
    assert timer.due == NOW.mono + 600
    request = Request("withdraw", parse_prefix("192.0.2.1"))
    desk.commit(desk.decide(request, "x", NOW), request, NOW)
    assert desk.next_timer() is None


@pytest.mark.parametrize(
    ("target", "status", "error"),
    [
        ("198.51.100.7", 403, "IP is whitelisted"),
        ("198.51.0.0/16", 403, "IP is whitelisted"),
        ("203.0.113.10", 403, "IP is whitelisted"),
        ("192.0.2.0/24", 403, "Prefix too short"),
        ("0.0.0.0/0", 403, "Prefix too short"),
        ("::/0", 403, "Prefix too short"),
    ],
)
def test_guards_refuse_an_announce_and_never_a_withdraw(target: str, status: int, error: str) -> None:
    desk = Desk(settings())
    rejected = rejection(desk, target, NOW)
    assert (rejected.status, rejected.error) == (status, error)
    desk.decide(Request("withdraw", parse_prefix(target)), "x", NOW)


def test_only_own_prefixes_when_they_are_listed() -> None:
    desk = Desk(settings("[safety]\nallowed = 192.0.2.0/24"))
    assert rejection(desk, "10.0.0.1", NOW).error == "Not in allowed prefixes"
    announce(desk, "192.0.2.1", NOW)


@pytest.mark.parametrize("length", [0, -1, 604801, 10**30])
def test_an_end_out_of_range_is_refused(length: int) -> None:
    assert "withdraw_after" in rejection(Desk(settings()), "192.0.2.1", NOW, length).error


def test_ten_announcements_in_any_minute_renewals_not_counted() -> None:
    desk = Desk(settings())
    for n in range(10):
        announce(desk, f"192.0.2.{n}", Now(NOW.wall, NOW.mono + n))
        announce(desk, "192.0.2.0", Now(NOW.wall, NOW.mono + n))
    refused = rejection(desk, "192.0.2.99", Now(NOW.wall, NOW.mono + 59.5))
    assert (refused.status, refused.error) == (429, "Rate limit exceeded")
    assert refused.retry_after == pytest.approx(0.5)
    announce(desk, "192.0.2.99", Now(NOW.wall - 86400, NOW.mono + 60))  # whatever the wall clock does
    assert rejection(desk, "192.0.2.98", Now(NOW.wall, NOW.mono + 60)).status == 429


@given(st.lists(st.floats(0, 40), max_size=80))
def test_no_sixty_seconds_hold_more_than_ten(pauses: list[float]) -> None:
    desk = Desk(settings("[webhook]\nmax_routes = 1000\n[safety]\nmax_routes = 1000"))
    accepted: list[float] = []
    at = NOW.mono
    for n, pause in enumerate(pauses):
        at += pause
        recent = [t for t in accepted if t > at - 60]
        try:
            announce(desk, f"10.0.0.{n}", Now(NOW.wall, at), 604800)
            accepted.append(at)
            assert len(recent) < 10
        except Rejected:
            assert len(recent) == 10


def state(after: float, *routes: dict[str, Any], refused: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"heartbeat": NOW.wall + after, "routes": list(routes), "refused_ids": list(refused)}


def route(identity: str, until: float | None = 1.0, announced_at: float = NOW.wall) -> dict[str, Any]:
    held = {"prefix": "192.0.2.1/32", "id": identity, "until": until, "source": "webhook"}
    return held | {"announced_at": announced_at}


@pytest.mark.parametrize(
    ("action", "published", "again"),
    [
        ("announce", {}, False),  # the controller is away: nothing is known
        ("announce", state(-9), False),
        ("announce", state(0.1), False),  # published before it can have been read
        ("announce", state(2), True),
        ("announce", state(2, route("id1")), False),
        ("announce", state(2, route("older", 1.0, NOW.wall - 1)), True),
        ("announce", state(2, route("newer", 1.0, NOW.wall + 1)), False),  # another receiver's, since
        ("announce", state(2, route("", None)), False),  # pinned by an operator
        ("announce", state(2, refused=("id1",)), False),
        ("withdraw", state(2), False),
        ("withdraw", state(2, route("id1")), True),
        ("withdraw", state(2, route("", None, NOW.wall + 1)), False),  # announced again since
    ],
)
def test_a_line_is_written_again_until_the_state_shows_it(action: str, published: dict[str, Any], again: bool) -> None:
    desk = Desk(settings())
    asked = Request(action, parse_prefix("192.0.2.1"))
    desk.commit(desk.decide(asked, "id1", NOW), asked, NOW)
    later = Now(NOW.wall + 2, NOW.mono + 2)
    assert len(desk.unconfirmed(published, later)) == again
    seen = bool(published) and published["heartbeat"] > NOW.wall + 1
    assert ("192.0.2.1/32" in desk.sent) == (again or not seen)


def test_a_limit_of_routes() -> None:
    desk = Desk(settings("[webhook]\nmax_routes = 2"))
    announce(desk, "192.0.2.1", NOW)
    announce(desk, "192.0.2.2", NOW)
    refused = rejection(desk, "192.0.2.3", NOW)
    assert (refused.status, refused.error) == (409, "Route limit reached")
    announce(desk, "192.0.2.2", NOW)
