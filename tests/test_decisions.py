"""The controller's decisions: tables, and operations at random beside a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtbh_controller import (
    BACKSTOP_GRACE,
    ENDED_MAX,
    Answer,
    Blackholes,
    Dialogue,
    Effects,
    LastGood,
    Now,
    Settings,
    SettingsError,
    Tell,
    describe_settings,
    load_settings,
    parse_prefix,
    parse_settings,
    publication,
    read_journal,
    render,
    restore,
    snapshot,
    state_dir_of,
)

NOW = Now(1_800_000_000.0, 1000.0)
ATTRIBUTES = "next-hop self community [65535:666]"


def later(seconds: float) -> Now:
    return Now(NOW.wall + seconds, NOW.mono + seconds)


def settings(text: str = "") -> Settings:
    found, faults = parse_settings(text)
    assert not faults
    return found


def do(action: Callable[..., None], *arguments: Any) -> Effects:
    """What the action adds to the effects, which are as good as carried out."""
    blackholes: Blackholes = arguments[0] if action is restore else action.__self__  # type: ignore[attr-defined]
    effects, done = blackholes.effects, Effects()
    for kind in vars(done):
        getattr(effects, kind).clear()
    action(*arguments)
    for kind in vars(done):
        setattr(done, kind, list(getattr(effects, kind)))
    return done


def told(effects: Effects) -> list[str]:
    return [render([command]) for command in effects.commands]


def logged(effects: Effects) -> list[str]:
    return effects.messages


def test_the_plain_forms() -> None:
    blackholes = Blackholes(settings())
    effects = do(blackholes.line, "announce 192.0.2.100/32", NOW)
    assert told(effects) == ["announce route 192.0.2.100/32 next-hop self community [65535:666]"]
    assert logged(effects) == ["ANNOUNCE 192.0.2.100/32"]
    effects = do(blackholes.line, "withdraw 192.0.2.100/32", NOW)
    assert told(effects) == ["withdraw route 192.0.2.100/32 next-hop self community [65535:666]"]
    assert logged(effects) == ["WITHDRAW 192.0.2.100/32"]
    assert told(do(blackholes.line, "withdraw 192.0.2.100/32", NOW))  # passed on, held or not


@pytest.mark.parametrize(
    ("bgp", "prefix", "attributes"),
    [
        ("community = 65535:666 174:666", "192.0.2.1/32", "next-hop self community [65535:666 174:666]"),
        ("community =", "192.0.2.1/32", "next-hop self"),
        (
            "large_community = 65001:666:0",
            "192.0.2.1/32",
            "next-hop self community [65535:666] large-community [65001:666:0]",
        ),
        ("next_hop = 192.0.2.254", "192.0.2.1/32", "next-hop 192.0.2.254 community [65535:666]"),
        ("next_hop_ipv6 = 100::1", "2001:db8::1/128", "next-hop 100::1 community [65535:666]"),
        ("community_ipv6 = 6939:666", "2001:db8::1/128", "next-hop self community [6939:666]"),
        ("community_ipv6 = 6939:666", "192.0.2.1/32", "next-hop self community [65535:666]"),
        ("community_ipv6 =", "2001:db8::1/128", "next-hop self"),
    ],
)
def test_attributes_are_settings_for_announce_and_withdraw(bgp: str, prefix: str, attributes: str) -> None:
    blackholes = Blackholes(settings(f"[bgp]\n{bgp}\n"))
    for verb in ("announce", "withdraw"):
        assert told(do(blackholes.line, f"{verb} {prefix}", NOW)) == [f"{verb} route {prefix} {attributes}"]


def test_a_withdraw_carries_its_announces_attributes_whatever_the_settings_say_since() -> None:
    blackholes = Blackholes(settings("[bgp]\ncommunity = 1:1"))
    do(blackholes.line, "announce 192.0.2.1", NOW)
    blackholes.use(settings("[bgp]\ncommunity = 2:2"))
    assert told(do(blackholes.line, "withdraw 192.0.2.1", NOW)) == [
        "withdraw route 192.0.2.1/32 next-hop self community [1:1]"
    ]


def test_withdraw_all_ends_what_is_held_and_nothing_else() -> None:
    blackholes = Blackholes(settings())
    for line in ("announce 192.0.2.1", "announce 192.0.2.2", "withdraw 192.0.2.1", "announce 192.0.2.3"):
        do(blackholes.line, line, NOW)
    ended = told(do(blackholes.line, "withdraw-all", NOW))
    assert ended == [f"withdraw route 192.0.2.{n}/32 {ATTRIBUTES}" for n in (2, 3)]
    assert told(do(blackholes.line, "withdraw-all", NOW)) == []


@pytest.mark.parametrize(
    ("line", "log"),
    [
        ("announce 198.51.100.7", "REFUSED 198.51.100.7/32: whitelist: overlaps 198.51.100.0/24"),
        (
            "announce 198.51.0.0/16",
            "REFUSED 198.51.0.0/16: whitelist: overlaps 198.51.100.0/24",
        ),
        ("announce 0.0.0.0/0", "REFUSED 0.0.0.0/0: min_prefix_length: a default route is never blackholed"),
        (
            "announce 192.0.2.0/24",
            "REFUSED 192.0.2.0/24: min_prefix_length: prefix too short: /24, at least /32 is needed",
        ),
        ("announce 192.0.2.3", "REFUSED 192.0.2.3/32: max_routes: 2 routes are held"),
        ("announce 127.0.0.1", "REFUSED 127.0.0.1/32: whitelist: 127.0.0.1 is a BGP neighbor or ExaBGP's own address"),
        ("announce 192.0.2.1 until=1799999999", "REFUSED 192.0.2.1/32: until: its end has passed"),
        (
            "announce 2001:db8::1",
            "REFUSED 2001:db8::1/128: max_routes: 2 routes are held",
        ),
    ],
)
def test_a_refusal_is_logged_with_its_guard_and_changes_nothing(line: str, log: str) -> None:
    blackholes = Blackholes(settings("[safety]\nmax_routes = 2\nwhitelist = 198.51.100.0/24"))
    do(blackholes.session, "127.0.0.1", "up", "", NOW)
    do(blackholes.line, "announce 192.0.2.1", NOW)
    do(blackholes.line, "announce 192.0.2.2", NOW)
    before = dict(blackholes.routes)
    effects = do(blackholes.line, line, NOW)
    assert (logged(effects), effects.commands, effects.records) == ([log], [], [])
    assert blackholes.routes == before
    assert told(do(blackholes.line, line.replace("announce", "withdraw"), NOW))  # withdrawing is always allowed


def test_a_held_prefix_may_be_announced_again_when_the_table_is_full() -> None:
    blackholes = Blackholes(settings("[safety]\nmax_routes = 1"))
    assert told(do(blackholes.line, "announce 192.0.2.1", NOW)) == told(do(blackholes.line, "announce 192.0.2.1", NOW))


def test_ipv6_with_next_hop_self_is_refused_on_an_ipv4_session() -> None:
    blackholes = Blackholes(settings())
    do(blackholes.session, "127.0.0.1", "up", "", NOW)
    assert "next_hop_ipv6" in logged(do(blackholes.line, "announce 2001:db8::1", NOW))[0]
    blackholes = Blackholes(settings("[bgp]\nnext_hop_ipv6 = 100::1"))
    do(blackholes.session, "127.0.0.1", "up", "", NOW)
    assert told(do(blackholes.line, "announce 2001:db8::1", NOW))


def test_a_timed_withdraw_ends_only_its_own_announcement() -> None:
    blackholes = Blackholes(settings())
    end = NOW.wall + 60
    do(blackholes.line, f"announce 192.0.2.1 until={end} id=a source=webhook", NOW)
    do(blackholes.line, f"announce 192.0.2.1 until={end + 60} id=b source=webhook", NOW)
    assert told(do(blackholes.line, "withdraw 192.0.2.1 id=a", later(60))) == []
    assert told(do(blackholes.line, "withdraw 192.0.2.1 id=b", later(120)))
    assert not blackholes.routes


def test_an_announce_by_hand_is_pinned_until_an_explicit_withdraw() -> None:
    blackholes = Blackholes(settings())
    do(blackholes.line, f"announce 192.0.2.1 until={NOW.wall + 60} id=a", NOW)
    do(blackholes.line, "announce 192.0.2.1", later(1))
    assert "KEPT" in logged(do(blackholes.line, "withdraw 192.0.2.1 id=a", later(60)))[0]
    effects = do(blackholes.line, f"announce 192.0.2.1 until={NOW.wall + 90} id=b", later(61))
    assert "stays pinned" in logged(effects)[0]
    assert told(do(blackholes.line, "withdraw 192.0.2.1 id=b", later(90))) == []
    assert not do(blackholes.expire, later(10_000)).commands
    assert told(do(blackholes.line, "withdraw 192.0.2.1", later(10_001)))


def test_a_second_copy_of_an_announcement_that_is_over_is_not_carried_out() -> None:
    """The receiver writes a line again whose first copy it thinks lost; an operator may have withdrawn it since."""
    blackholes = Blackholes(settings())
    line = f"announce 192.0.2.1 until={NOW.wall + 60} id=a source=webhook"
    do(blackholes.line, line, NOW)
    do(blackholes.line, "withdraw 192.0.2.1", NOW)
    effects = do(blackholes.line, line, NOW)
    assert told(effects) == []
    assert logged(effects)[0].startswith("KEPT 192.0.2.1/32")
    assert told(do(blackholes.line, f"announce 192.0.2.1 until={NOW.wall + 61} id=a", NOW))  # its owner means it
    assert told(do(blackholes.line, "withdraw 192.0.2.1", NOW))
    assert told(do(blackholes.line, "announce 192.0.2.1", NOW))


def test_only_the_controller_calls_a_route_anothers() -> None:
    blackholes = Blackholes(settings())
    do(blackholes.line, "announce 192.0.2.1 source=other", NOW)
    assert json.loads(publication(blackholes, "", NOW))["routes"][0]["source"] == "pipe"


def test_a_withdraw_without_an_answer_is_published() -> None:
    blackholes = Blackholes(settings())
    accept(blackholes, do(blackholes.line, "announce 192.0.2.1", NOW))
    effects = do(blackholes.line, "withdraw 192.0.2.1", NOW)
    assert json.loads(publication(blackholes, "", NOW))["withdrawing"] == ["192.0.2.1/32"]
    accept(blackholes, effects)
    assert json.loads(publication(blackholes, "", NOW))["withdrawing"] == []


def test_a_withdraw_nobody_sends_comes_from_the_controller_a_little_later() -> None:
    blackholes = Blackholes(settings())
    do(blackholes.line, f"announce 192.0.2.1 until={NOW.wall + 60} id=a", NOW)
    assert not do(blackholes.expire, later(60 + BACKSTOP_GRACE - 0.1)).commands
    stepped = Now(NOW.wall - 86400, later(60 + BACKSTOP_GRACE).mono)  # the clock went back a day meanwhile
    effects = do(blackholes.expire, stepped)
    assert told(effects) == [f"withdraw route 192.0.2.1/32 {ATTRIBUTES}"]
    assert logged(effects)[0].startswith("OVERDUE 192.0.2.1/32")


def test_a_reload_ends_what_is_newly_protected_and_renews_attributes() -> None:
    blackholes = Blackholes(settings())
    for n in (1, 2):
        do(blackholes.line, f"announce 192.0.2.{n}", NOW)
    new = settings("[safety]\nwhitelist = 192.0.2.1\nallowed = 10.0.0.0/8\n[bgp]\ncommunity = 1:1")
    effects = do(blackholes.reload, new, NOW)
    assert told(effects) == [
        f"withdraw route 192.0.2.1/32 {ATTRIBUTES}",
        "announce route 192.0.2.2/32 next-hop self community [1:1]",
    ]
    assert any(text.startswith("WARNING: 192.0.2.2/32 stays blackholed: allowed") for text in logged(effects))


verbs = st.sampled_from(["announce", "withdraw", "withdraw-all", "announce-bad", "announce-timed", "time"])


@given(st.lists(st.tuples(verbs, st.integers(1, 6)), max_size=60))
def test_what_is_told_leads_a_router_to_what_is_held(operations: list[tuple[str, int]]) -> None:
    """Replaying the commands on a table gives the held routes, and every withdraw has its announce's attributes."""
    blackholes = Blackholes(settings("[safety]\nmax_routes = 4"))
    table: dict[str, str] = {}
    now = NOW
    for verb, n in operations:
        if verb == "time":
            now = Now(now.wall + n * 10, now.mono + n * 10)
            effects = do(blackholes.expire, now)
        else:
            text = {
                "withdraw-all": "withdraw-all",
                "announce-bad": f"announce 198.51.100.{n}",
                "announce-timed": f"announce 192.0.2.{n} until={now.wall + 15:.3f} id={n}",
            }
            effects = do(blackholes.line, text.get(verb, f"{verb} 192.0.2.{n}"), now)
        for command in told(effects):
            action, _, prefix, attributes = command.split(" ", 3)
            if action == "announce":
                table[prefix] = attributes
            else:
                assert table.pop(prefix, attributes) == attributes
        assert table == {prefix: route.attributes[""] for prefix, route in blackholes.routes.items()}
        assert len(table) <= 4
        assert all(r.deadline is None or r.deadline + BACKSTOP_GRACE > now.mono for r in blackholes.routes.values())


def test_the_published_state_is_json_with_all_that_is_held() -> None:
    blackholes = Blackholes(settings())
    do(blackholes.session, "127.0.0.1", "up", "", NOW)
    do(blackholes.line, f"announce 192.0.2.1 until={NOW.wall + 60} id=a source=webhook reason=flood", NOW)
    state = json.loads(publication(blackholes, "5.0.15", NOW))
    assert state["heartbeat"] == NOW.wall
    assert state["neighbors"] == {"127.0.0.1": {"state": "up", "since": NOW.wall}}
    (route,) = state["routes"]
    assert route["prefix"] == "192.0.2.1/32"
    assert (route["until"], route["id"], route["source"], route["reason"]) == (NOW.wall + 60, "a", "webhook", "flood")


# ---------------------------------------------------------------- the dialogue with ExaBGP


def greeted() -> Dialogue:
    dialogue = Dialogue()
    assert dialogue.take() == b"\nversion\n"
    for line in ("done", "error", "error", "exabgp 5.0.15", "done"):  # the first two were for a predecessor
        assert dialogue.hear(line) is None
    assert dialogue.greeted
    assert not dialogue.unanswered
    return dialogue


def tell_thousand(dialogue: Dialogue) -> None:
    for n in range(1000):
        dialogue.waiting.append(Tell(f"announce {n:040}"))


def test_answers_to_a_predecessor_do_not_count() -> None:
    dialogue = greeted()
    dialogue.waiting.append(Tell("announce A"))
    assert dialogue.take() == b"announce A\n"
    assert dialogue.hear("done") == Answer([Tell("announce A")], True, [])
    assert not dialogue.unanswered


def test_a_refused_command_is_named_and_a_question_gets_its_lines() -> None:
    dialogue = greeted()
    for text in ("announce A", "show B", "announce C"):
        dialogue.waiting.append(Tell(text))
    dialogue.take()
    answers = [dialogue.hear(line) for line in ("error", "line 1", "line 2", "done", "done")]
    assert answers == [
        Answer([Tell("announce A")], False, []),
        None,
        None,
        Answer([Tell("show B")], True, ["line 1", "line 2"]),
        Answer([Tell("announce C")], True, []),
    ]


def test_no_more_goes_out_than_the_window_until_answers_come() -> None:
    dialogue = greeted()
    tell_thousand(dialogue)
    first = dialogue.take()
    assert Dialogue.WINDOW <= len(first) < Dialogue.WINDOW + 50
    assert dialogue.take() == b""
    out = first
    while dialogue.unanswered:
        dialogue.hear("done")
        out += dialogue.take()
    assert out == b"".join(b"announce %040d\n" % n for n in range(1000))
    assert dialogue.unanswered_bytes == 0


def test_a_command_that_is_never_answered_holds_nothing_up_and_is_named() -> None:
    dialogue = greeted()
    tell_thousand(dialogue)
    sent = dialogue.take().count(b"\n")
    for _ in range(sent - 10):  # ten get no answer
        dialogue.hear("done")
    out = dialogue.take()
    assert dialogue.silent() == ("", [])
    assert dialogue.take() == b"\n"  # an empty line makes it read and answer what is left
    dialogue.hear("error")
    _, left = dialogue.silent()
    assert len(left) == 9 + out.count(b"\n")
    assert not dialogue.unanswered
    assert dialogue.take()


@given(st.lists(st.tuples(st.sampled_from(["announce", "withdraw"]), st.integers(1, 9), st.booleans()), max_size=300))
def test_lists_say_the_same_as_single_commands_in_the_same_order(operations: list[tuple[str, int, bool]]) -> None:
    dialogue = greeted()
    singles = []
    for verb, n, six in operations:
        prefix = f"2001:db8::{n}/128" if six else f"192.0.2.{n}/32"
        singles.append((verb, prefix))
        dialogue.waiting.append(Tell(verb, prefix, ATTRIBUTES))
    said = []
    for line in dialogue.take().decode().splitlines():
        verb, form, rest = line.split(" ", 2)
        prefixes = rest.split(" nlri ")[1].split() if form == "attributes" else [rest.split()[0]]
        assert ATTRIBUTES in rest
        assert len({":" in prefix for prefix in prefixes}) == 1  # one family
        said += [(verb, prefix) for prefix in prefixes]
        answer = dialogue.hear("done")
        assert answer is not None
        assert [command.prefix for command in answer.commands] == prefixes
    assert said == singles


def test_without_any_answer_commands_go_out_all_the_same_and_the_log_says_why() -> None:
    dialogue = Dialogue()
    tell_thousand(dialogue)
    dialogue.take()
    messages = [dialogue.silent()[0] for _ in range(10)]
    assert ["ack = true" in message for message in messages].count(True) == 1
    assert dialogue.take().endswith(b"announce %040d\n" % 999)


def test_a_greeting_that_comes_late_counts() -> None:
    dialogue = Dialogue()
    dialogue.take()
    for _ in range(Dialogue.PATIENCE):
        assert dialogue.answers
        dialogue.silent()
    assert not dialogue.answers
    for line in ("error", "exabgp 5.0.15", "done"):
        dialogue.hear(line)
    assert dialogue.answers
    dialogue.waiting.append(Tell("announce A"))
    dialogue.take()
    assert dialogue.hear("done") == Answer([Tell("announce A")], True, [])


def test_a_pause_in_the_middle_of_an_answer_is_no_end() -> None:
    """ExaBGP prints a large table for seconds, and may be stopped at any moment."""
    dialogue = greeted()
    dialogue.waiting += [Tell("show A"), Tell("show B")]
    dialogue.take()
    dialogue.silent()
    assert dialogue.take() == b"\n"
    answers = []
    for line in ("a 1", "done", "b 1", "done", "error"):
        answers.append(dialogue.hear(line))
        if line != "error":
            assert dialogue.silent() == ("", [])
    said = [answer.output for answer in answers if answer]
    assert said[:2] == [["a 1"], ["b 1"]]
    _, left = dialogue.silent()
    assert left == []


@pytest.mark.parametrize("busy", [True, False])
def test_one_answer_that_never_comes_does_not_keep_it_asking(busy: bool) -> None:
    dialogue = greeted()
    dialogue.waiting += [Tell("announce A"), Tell("announce B")]
    dialogue.take()
    dialogue.hear("done")  # of one of them
    for _ in range(5):
        dialogue.silent()
        dialogue.waiting += [Tell("announce C")] * busy
        for line in dialogue.take().splitlines():
            dialogue.hear("done" if line else "error")
    for _ in range(3):
        dialogue.silent()
        for _ in dialogue.take().splitlines():
            dialogue.hear("error")
    assert not dialogue.unanswered
    assert dialogue.silent() == ("", [])
    assert dialogue.take() == b""


def test_a_frozen_exabgp_is_not_nudged_for_ever() -> None:
    dialogue = greeted()
    dialogue.waiting.append(Tell("announce A"))
    dialogue.take()
    for _ in range(100):
        dialogue.silent()
    assert dialogue.take() == b"\n"


def test_where_nothing_answers_what_is_held_is_announced_again_after_each_change_of_a_session() -> None:
    blackholes = Blackholes(settings())
    do(blackholes.line, "announce 192.0.2.1", NOW)
    again = [f"announce route 192.0.2.1/32 {ATTRIBUTES}"]
    assert told(do(blackholes.tell_again)) == again
    assert told(do(blackholes.tell_again)) == []
    do(blackholes.session, "127.0.0.1", "up", "", NOW)
    assert told(do(blackholes.tell_again)) == again


# ---------------------------------------------------------------- audits

CONFIGURATION = """neighbor 10.9.9.1 {
  local-address 10.9.9.254;
  api {
    processes [ rtbh-controller ];
  }
}
neighbor 10.9.9.2 {
  local-address 10.9.8.254;
  api {
    processes [ rtbh-controller ];
  }
}
neighbor 10.9.9.3 {
  local-address 10.9.8.254;
  api {
    processes [ ];
  }
}""".splitlines()


def rib(address: str, prefix: str, communities: str = "community blackhole") -> str:
    head = f"neighbor {address} local-ip 10.9.9.254 local-as 65001 peer-as 65000 router-id 10.9.9.254"
    return f"{head} family-allowed in-open ipv4 unicast {prefix} next-hop 10.9.9.254 {communities}"


def audit(blackholes: Blackholes, *table: str) -> Effects:
    """One whole audit whose answers are these lines of adj-RIB-out."""
    questions = do(blackholes.ask).commands
    outputs = (CONFIGURATION, ["10.9.9.1  65000  0:00:05 established 7 2"], list(table))
    return [do(blackholes.answered, q, True, output, NOW) for q, output in zip(questions, outputs)][-1]


def accept(blackholes: Blackholes, effects: Effects) -> None:
    for command in effects.commands:
        do(blackholes.answered, command, True, [], NOW)


def test_an_audit_learns_the_neighbors_and_mends_what_differs() -> None:
    blackholes = Blackholes(settings())
    accept(blackholes, do(blackholes.line, "announce 192.0.2.1", NOW))
    accept(blackholes, do(blackholes.line, "announce 192.0.2.2", NOW))
    one = rib("10.9.9.1", "192.0.2.1/32"), rib("10.9.9.2", "192.0.2.1/32", "community 174:666")
    effects = audit(blackholes, *one, rib("10.9.9.2", "192.0.2.2/32"), rib("10.9.9.2", "192.0.2.66/32"))
    assert sorted(told(effects)) == [
        f"neighbor 10.9.9.1 announce route 192.0.2.2/32 {ATTRIBUTES}",
        f"neighbor 10.9.9.2 announce route 192.0.2.1/32 {ATTRIBUTES}",
    ]
    assert {address: n.state for address, n in blackholes.neighbors.items()} == {"10.9.9.1": "up", "10.9.9.2": "down"}
    assert blackholes.others == {"192.0.2.66/32": ["10.9.9.2"]}
    for address in ("10.9.9.1", "10.9.8.254"):
        assert "whitelist" in logged(do(blackholes.line, f"announce {address}", NOW))[0]
    assert "REFUSED 192.0.2.66/32: static" in logged(do(blackholes.line, "announce 192.0.2.66", NOW))[0]
    assert not do(blackholes.ask).commands


@pytest.mark.parametrize("community", ["65281", "65282", "65283", "65284", "666"])
def test_communities_that_exabgp_prints_by_name_need_no_repair(community: str) -> None:
    names = {"65281": "no-export", "65282": "no-advertise", "65283": "no-export-subconfed", "65284": "no-peer"}
    blackholes = Blackholes(settings(f"[bgp]\ncommunity = 174:666 65535:{community}"))
    accept(blackholes, do(blackholes.line, "announce 192.0.2.1", NOW))
    shown = f"community [ 174:666 {names.get(community, 'blackhole')} ]"
    table = [rib(address, "192.0.2.1/32", shown) for address in ("10.9.9.1", "10.9.9.2")]
    assert told(audit(blackholes, *table)) == []


@pytest.mark.parametrize(
    ("apis", "ours"),
    [
        ("rtbh-controller", {"10.9.9.1"}),
        ("healthcheck rtbh-controller", {"10.9.9.1"}),
        ("mine", {"10.9.9.1", "10.9.9.2"}),  # by no name that we know: it may be either
    ],
)
def test_the_neighbors_are_those_that_name_us(apis: str, ours: set[str]) -> None:
    """Each process of a neighbor stands on a line of its own; a range of neighbors has no address."""
    blackholes = Blackholes(settings())
    output = ["neighbor 10.8.0.0/24 {", "  local-address 10.9.9.254;", "processes [ rtbh-controller ];", "}"]
    for address, processes in (("10.9.9.1", apis.split()), ("10.9.9.2", ["other"])):
        output += [f"neighbor {address} {{", "  local-address 10.9.9.254;"]
        output += [f"    processes [ {process} ];" for process in processes]
    output += output[:4]
    blackholes.learn_neighbors(output)
    assert blackholes.neighbors.keys() == ours
    assert {router.address for router in blackholes.routers} == {"10.9.9.1", "10.9.9.2", "10.9.9.254"}


def test_a_neighbor_that_names_no_process_stays_once_it_has_told_of_its_session() -> None:
    """ExaBGP does not print `processes-match`."""
    blackholes = Blackholes(settings())
    do(blackholes.session, "10.9.9.3", "up", "", NOW)
    do(blackholes.session, "10.9.9.4", "up", "", NOW)  # no longer configured
    audit(blackholes)
    assert blackholes.neighbors.keys() == {"10.9.9.1", "10.9.9.2", "10.9.9.3"}


def test_what_changes_during_an_audit_is_left_alone() -> None:
    blackholes = Blackholes(settings())
    audit(blackholes)
    for n in (1, 2):
        accept(blackholes, do(blackholes.line, f"announce 192.0.2.{n}", NOW))
    blackholes.audit_wanted = True
    questions = do(blackholes.ask).commands
    do(blackholes.line, "withdraw 192.0.2.1", NOW)
    do(blackholes.line, "announce 192.0.2.3", NOW)
    table = [rib(a, f"192.0.2.{n}/32") for a in ("10.9.9.1", "10.9.9.2") for n in (1, 2)]
    assert told(do(blackholes.answered, questions[2], True, table, NOW)) == []
    assert blackholes.others == {}


def test_a_session_that_comes_up_is_audited_and_sent_everything_again() -> None:
    blackholes = Blackholes(settings())
    accept(blackholes, audit(blackholes))
    accept(blackholes, do(blackholes.line, "announce 192.0.2.1", NOW))
    assert blackholes.delivery("192.0.2.1/32") == {"10.9.9.1": "advertised", "10.9.9.2": "down"}
    do(blackholes.session, "10.9.9.2", "up", "", NOW)
    assert blackholes.delivery("192.0.2.1/32")["10.9.9.2"] == "pending"
    table = [rib(a, "192.0.2.1/32") for a in ("10.9.9.1", "10.9.9.2")]
    assert told(audit(blackholes, *table)) == ["neighbor 10.9.9.2 flush adj-rib out"]
    assert blackholes.delivery("192.0.2.1/32")["10.9.9.2"] == "advertised"


def test_each_neighbor_gets_its_own_attributes() -> None:
    blackholes = Blackholes(settings("[neighbor 10.9.9.2]\ncommunity = 174:666\n"))
    audit(blackholes)
    own = "next-hop self community [174:666]"
    for verb in ("announce", "withdraw"):
        effects = do(blackholes.line, f"{verb} 192.0.2.1", NOW)
        assert told(effects) == [
            f"neighbor 10.9.9.1 {verb} route 192.0.2.1/32 {ATTRIBUTES}",
            f"neighbor 10.9.9.2 {verb} route 192.0.2.1/32 {own}",
        ]


def ended_ids(blackholes: Blackholes) -> list[str]:
    found: list[str] = json.loads(publication(blackholes, "", NOW))["ended_ids"]
    return found


TIMED = f"announce 192.0.2.1 until={NOW.wall + 60} id=a"


@pytest.mark.parametrize(
    ("lines", "ended"),
    [
        ((TIMED,), []),
        ((TIMED, TIMED), []),
        ((TIMED, "withdraw 192.0.2.1"), ["a"]),
        ((TIMED, "withdraw-all"), ["a"]),
        ((TIMED, f"announce 192.0.2.1 until={NOW.wall + 60} id=b"), ["a"]),
        ((TIMED, "announce 192.0.2.1"), ["a"]),  # pinned by hand
        (("announce 192.0.2.1", TIMED), ["a"]),  # was pinned, and stays so
        (("announce 192.0.2.1", "withdraw 192.0.2.1"), []),
    ],
)
def test_an_announcement_that_is_over_is_remembered_until_its_time(lines: tuple[str, ...], ended: list[str]) -> None:
    """Or else a receiver that was away meanwhile, and never saw it held, would announce it again."""
    blackholes = Blackholes(settings())
    for line in lines:
        do(blackholes.line, line, NOW)
    assert ended_ids(blackholes) == ended
    successor = Blackholes(settings())
    do(restore, successor, read_journal(journal_of(*lines)), "B", later(1))
    third = Blackholes(settings())
    do(restore, third, read_journal("\n".join(snapshot(successor, "B", later(1)))), "C", later(2))
    for one in (blackholes, successor, third):
        assert ended_ids(one) == ended
        do(one.expire, later(59))
        assert ended_ids(one) == ended
        do(one.expire, later(61))
        assert ended_ids(one) == []


def test_what_is_not_restored_is_over() -> None:
    blackholes = Blackholes(settings())
    do(restore, blackholes, read_journal(journal_of(TIMED, "STOP")), "B", later(1))
    assert (blackholes.routes, ended_ids(blackholes)) == ({}, ["a"])


def test_no_more_ended_announcements_are_remembered_than_are_useful() -> None:
    blackholes = Blackholes(settings())
    for number in range(ENDED_MAX + 10):
        do(blackholes.line, f"announce 192.0.2.1 until={NOW.wall + 60} id=n{number}", NOW)
    assert len(blackholes.ended) == ENDED_MAX
    assert "n0" not in blackholes.ended
    assert f"n{ENDED_MAX + 8}" in blackholes.ended


def test_a_controller_that_stops_says_so() -> None:
    blackholes = Blackholes(settings())
    do(blackholes.line, TIMED, NOW)
    do(blackholes.stop, NOW)
    state = json.loads(publication(blackholes, "", NOW))
    assert (state["stopping"], state["routes"]) == (True, [])


# ---------------------------------------------------------------- the journal


def journal_of(*lines: str, text: str = "", exabgp: str = "A") -> str:
    """The journal of a controller that reads these lines."""
    blackholes = Blackholes(settings(text))
    records = [json.dumps({"do": "start", "at": NOW.wall, "exabgp": exabgp})]
    for line in lines:
        records += (do(blackholes.stop, NOW) if line == "STOP" else do(blackholes.line, line, NOW)).records
    return "".join(f"{record}\n" for record in records)


LINES = (
    "announce 192.0.2.1",
    f"announce 192.0.2.2 until={NOW.wall + 60} id=x",
    "announce 192.0.2.3",
    "withdraw 192.0.2.3",
)
BOTH = {"192.0.2.1/32", "192.0.2.2/32"}


@pytest.mark.parametrize(
    ("policy", "lines", "exabgp", "after", "held"),
    [
        ("crash", LINES, "A", 1.0, BOTH),  # the controller died alone
        ("never", LINES, "A", 1.0, BOTH),
        ("crash", LINES, "B", 1.0, BOTH),  # ExaBGP died
        ("always", LINES, "B", 1.0, BOTH),
        ("never", LINES, "B", 1.0, set()),
        ("crash", LINES, "B", 61.0, {"192.0.2.1/32"}),  # the second one's time is over
        ("crash", LINES, "B", 3601.0, set()),  # older than restore_max_age
        ("always", LINES, "B", 3601.0, set()),
        ("crash", LINES, "A", 3601.0, BOTH),
        ("crash", (*LINES, "STOP"), "B", 1.0, set()),
        ("crash", (*LINES, "STOP"), "A", 1.0, set()),
        ("never", (*LINES, "STOP"), "B", 1.0, set()),
        ("always", (*LINES, "STOP"), "B", 1.0, BOTH),
        ("always", (*LINES, "STOP"), "A", 1.0, BOTH),
    ],
)
def test_restore(policy: str, lines: tuple[str, ...], exabgp: str, after: float, held: set[str]) -> None:
    blackholes = Blackholes(settings(f"[safety]\nrestore = {policy}"))
    journal = read_journal(journal_of(*lines))
    effects = do(restore, blackholes, journal, exabgp, later(after))
    assert set(blackholes.routes) == held
    assert told(effects) == []  # the audit announces what is missing
    leftovers = {"192.0.2.3/32"} | (BOTH - held) if exabgp == "A" else set()
    assert set(blackholes.gone) == leftovers
    again = "\n".join(snapshot(blackholes, exabgp, later(after)))
    assert read_journal(again).routes.keys() == held
    assert read_journal(again).gone.keys() == leftovers


def test_a_restored_end_is_never_further_away_than_it_was_long() -> None:
    blackholes = Blackholes(settings())
    stepped = Now(NOW.wall - 86400, 5.0)
    do(restore, blackholes, read_journal(journal_of(*LINES)), "B", stepped)
    assert blackholes.routes["192.0.2.2/32"].deadline == 65.0


def test_a_restored_route_that_is_protected_by_now_is_withdrawn() -> None:
    blackholes = Blackholes(settings("[safety]\nwhitelist = 192.0.2.1"))
    effects = do(restore, blackholes, read_journal(journal_of(*LINES)), "A", later(1))
    assert told(effects) == [f"withdraw route 192.0.2.1/32 {ATTRIBUTES}"]


def test_what_was_withdrawn_and_is_static_by_now_is_none_of_a_successors() -> None:
    blackholes = Blackholes(settings())
    effects = do(blackholes.line, "announce 192.0.2.1", NOW)
    records = effects.records
    accept(blackholes, effects)
    effects = do(blackholes.line, "withdraw 192.0.2.1", NOW)
    records += effects.records + do(blackholes.answered, effects.commands[0], True, [], NOW).records
    journal = read_journal("\n".join([json.dumps({"do": "start", "exabgp": "A"}), *records]))
    successor = Blackholes(settings())
    do(restore, successor, journal, "A", later(60))
    static = [rib(address, "192.0.2.1/32") for address in ("10.9.9.1", "10.9.9.2")]
    assert told(audit(successor, *static)) == []
    assert successor.others.keys() == {"192.0.2.1/32"}


def test_a_host_that_was_alive_to_the_end_has_not_been_away() -> None:
    text = journal_of("announce 192.0.2.1") + json.dumps({"do": "alive", "at": NOW.wall + 7200}) + "\n"
    for after, held in ((7260, 1), (7200 + 3601, 0)):
        blackholes = Blackholes(settings())
        do(restore, blackholes, read_journal(text), "B", later(after))
        assert len(blackholes.routes) == held


@pytest.mark.parametrize(
    "change",
    [
        {"prefix": "x"},
        {"prefix": "192.0.2.1"},
        {"until": "soon"},
        {"attributes": {}},
        {"announced_at": None},
        {"id": 1},
    ],
)
def test_a_record_that_no_controller_wrote_is_left_out(change: dict[str, Any]) -> None:
    start, line = journal_of("announce 192.0.2.1").splitlines()
    record = json.loads(line)
    record["route"] |= change
    assert read_journal(f"{start}\n{json.dumps(record)}").routes == {}


@given(st.integers(0, 600), st.binary(max_size=20))
def test_a_torn_journal_gives_what_was_whole(cut: int, noise: bytes) -> None:
    text = journal_of(*LINES)
    whole = [line for line in text[:cut].splitlines(keepends=True) if line.endswith("\n")]
    torn = read_journal(text[:cut] + noise.decode("latin-1").replace("\n", ""))
    assert torn.routes.keys() >= read_journal("".join(whole)).routes.keys() - {"192.0.2.3/32"}


# ---------------------------------------------------------------- settings


def test_the_defaults_are_the_documented_ones() -> None:
    default = settings()
    assert default.paths.fifo == "/run/exabgp/rtbh.pipe"
    assert default.paths.controller_log == "/var/log/exabgp/rtbh-controller.log"
    assert default.paths.webhook_log == "/var/log/exabgp/webhook.log"
    assert default.bgp.attributes(4) == default.bgp.attributes(6) == ATTRIBUTES
    assert default.safety.whitelist == (parse_prefix("198.51.100.0/24"), parse_prefix("203.0.113.10/32"))
    assert (default.safety.max_routes, default.webhook.max_routes) == (50, 40)
    assert default.webhook.listen == ("127.0.0.1", 8099)
    assert (default.webhook.max_announcements_per_minute, default.webhook.withdraw_after) == (10, 3600)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[safty]\nwhitelist=", r"\[safty\]: unknown section"),
        ("[DEFAULT]\nwhitelist=", r"\[DEFAULT\]: unknown section"),
        ("[safety]\nwitelist = 10.0.0.0/8", r"\[safety\] witelist: unknown key"),
        ("[safety]\nwhitelist = 10.0.0.1/8", r"\[safety\] whitelist: .*host bits"),
        ("[safety]\nmax_routes = many", r"\[safety\] max_routes: must be a whole number"),
        ("[safety]\nmax_routes = -1", r"\[safety\] max_routes"),
        ("[safety]\nmin_prefix_length = 0", r"\[safety\] min_prefix_length"),
        ("[safety]\nrestore = sometimes", r"\[safety\] restore: must be"),
        ("[bgp]\ncommunity = 65536:1", r"\[bgp\] community: 65536:1 is not a community"),
        ("[bgp]\ncommunity = blackhole", r"\[bgp\] community"),
        ("[bgp]\ncommunity = 1:1]; x", r"\[bgp\] community"),
        ("[bgp]\nlarge_community = 1:2", r"\[bgp\] large_community"),
        ("[bgp]\nnext_hop = 100::1", r"\[bgp\] next_hop: must be self or an IPv4 address"),
        ("[bgp]\nnext_hop_ipv6 = 192.0.2.1", r"\[bgp\] next_hop_ipv6"),
        ("[bgp]\nnext_hop = 192.0.2.1/32", r"\[bgp\] next_hop"),
        ("[paths]\nfifo = rtbh.pipe", r"\[paths\] fifo: must be an absolute path"),
        ("[webhook]\nlisten = 8099", r"\[webhook\] listen"),
        ("[webhook]\nlisten = localhost:8099", r"\[webhook\] listen"),
        ("[webhook]\nlisten = 127.0.0.1:99999", r"\[webhook\] listen"),
        ("[webhook]\ntoken = a b", r"\[webhook\] token"),
        ("[webhook]\ntoken = a\ntoken_file = /x", r"\[webhook\] token_file: give token or token_file"),
        ("[webhook]\ntls_key = /x", r"\[webhook\] tls_key"),
        ("[webhook]\nwithdraw_after = 60\nmax_withdraw_after = 59", r"\[webhook\] withdraw_after"),
        ("[safety]\nmax_routes = 1\nmax_routes = 2", "max_routes"),
        ("[safety]\n[safety]", "safety"),
        ("whitelist = 10.0.0.0/8", "section"),
        ("[safety", ""),
    ],
)
def test_a_fault_is_named_with_its_section_and_key(text: str, fault: str) -> None:
    _, faults = parse_settings(text)
    assert len(faults) == 1
    assert re.search(fault, faults[0])


def test_networks_may_stand_one_a_line_with_comments() -> None:
    text = "[safety]\nwhitelist =\n  10.0.0.0/8   # office\n# all of it\n\n  2001:db8::/32, 192.0.2.1\n"
    assert settings(text).safety.whitelist == tuple(map(parse_prefix, ("10.0.0.0/8", "2001:db8::/32", "192.0.2.1")))


def test_a_token_may_hold_any_sign() -> None:
    assert settings("[webhook]\ntoken = a%(b)s#;c=:d").webhook.token == "a%(b)s#;c=:d"


def test_what_is_in_force_includes_each_neighbors_own() -> None:
    shown = describe_settings(settings("[neighbor 10.0.0.1]\ncommunity = 174:666\n"))
    assert "[neighbor 10.0.0.1]\n# IPv4: next-hop self community [174:666]\n" in shown


def test_the_token_is_never_shown() -> None:
    found = settings("[webhook]\ntoken = hunter2")
    assert "hunter2" not in describe_settings(found) + repr(found)


@given(st.text(max_size=200))
def test_no_text_breaks_the_settings(text: str) -> None:
    for section in ("", "[safety]\n", "[bgp]\ncommunity = "):
        _, faults = parse_settings(section + text)
        assert all(fault.isprintable() for fault in faults)


@pytest.mark.parametrize("fault", ["listen = nowhere", "token = a\ntoken = b", "token", "= x"])
def test_no_fault_in_the_webhook_section_stops_the_controller(directory: object, fault: str) -> None:
    path = f"{directory}/rtbh.conf"
    with open(path, "w") as file:
        file.write(f"[safety]\nmax_routes = 7\n[webhook]\n{fault}\n[bgp]\nnext_hop = 192.0.2.1\n")
    found, warnings = load_settings(path, ignore="webhook")
    assert (found.safety.max_routes, found.bgp.next_hop) == (7, "192.0.2.1")
    assert len(warnings) == 2  # and that `allowed` is empty
    with pytest.raises(SettingsError):
        load_settings(path)
    with open(path, "a") as file:
        file.write("next_hop = 192.0.2.1\n")
    with pytest.raises(SettingsError, match="next_hop"):
        load_settings(path, ignore="webhook")


@pytest.mark.parametrize("header", ["safety]", "[safety", "#[safety]", "# [safety]"])
@pytest.mark.parametrize("fault", ["listen = nowhere", "token", ""])
def test_a_damaged_header_never_takes_the_guards_behind_it_along(directory: object, header: str, fault: str) -> None:
    path = f"{directory}/rtbh.conf"
    with open(path, "w") as file:
        file.write(f"[webhook]\n{fault}\n{header}\nwhitelist = 10.0.0.0/8\nallowed = 192.0.2.0/24\n")
    with pytest.raises(SettingsError):
        load_settings(path, ignore="webhook")


def test_the_last_good_settings_are_whole_though_the_webhooks_had_a_fault(directory: object) -> None:
    path = f"{directory}/rtbh.conf"
    text = f"[webhook]\ntoken = a\ntoken = b\n[safety]\nmax_routes = 7\n[paths]\nstate_dir = {directory}\n"
    with open(path, "w") as file:
        file.write(text)
    last_good = LastGood(str(directory), "A")
    last_good.write(path)
    found = last_good.read()
    assert found
    assert found.safety.max_routes == 7
    assert LastGood(str(directory), "B").read() is None
    assert state_dir_of(text + "x") == str(directory)
    assert state_dir_of("[paths") == "/var/lib/exabgp"


def test_a_fault_in_the_webhook_section_does_not_stop_the_controller(directory: object) -> None:
    path = f"{directory}/rtbh.conf"
    with open(path, "w") as file:
        file.write("[webhook]\nlisten = nowhere\n")
    _, warnings = load_settings(path, ignore="webhook")
    assert any("[webhook] listen" in warning for warning in warnings)
    with pytest.raises(SettingsError, match=r"\[webhook\] listen"):
        load_settings(path)
    with pytest.raises(SettingsError, match="no such file"):
        load_settings(f"{directory}/absent.conf")
