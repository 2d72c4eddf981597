"""What counts as a prefix, what a line of the pipe means, and what the guards refuse."""

from __future__ import annotations

import ipaddress
from typing import Union

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rtbh_controller import (
    LINE_MAX,
    Command,
    LineReader,
    Safety,
    check_prefix,
    parse_line,
    parse_prefix,
    printable,
)

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
networks = st.one_of(
    st.builds(lambda a, n: ipaddress.ip_network((a, n), strict=False), st.ip_addresses(v=4), st.integers(0, 32)),
    st.builds(lambda a, n: ipaddress.ip_network((a, n), strict=False), st.ip_addresses(v=6), st.integers(0, 128)),
)


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("192.0.2.100", "192.0.2.100/32"),
        ("192.0.2.100/32", "192.0.2.100/32"),
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("2001:DB8:0:0::1/128", "2001:db8::1/128"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),  # a prefix; the guards refuse it
    ],
)
def test_a_prefix_is_printed_in_its_one_canonical_form(text: str, prefix: str) -> None:
    assert str(parse_prefix(text)) == prefix


NOT_AN_ADDRESS = "not an IPv4 or IPv6 address or prefix"
BAD_PREFIXES = {
    "": NOT_AN_ADDRESS,
    "192.0.2.1\n": NOT_AN_ADDRESS,
    "192.0.2.1\nannounce 192.0.2.2": NOT_AN_ADDRESS,
    "192.0.2.1 ": NOT_AN_ADDRESS,
    "192.0.2.1;": NOT_AN_ADDRESS,
    "192.0.2.1/33": "at most /32",
    "192.0.2.1/": "not a prefix length",
    "192.0.2.1/-1": "not a prefix length",
    "192.0.2.1/255.255.255.255": "not a prefix length",
    "192.0.2.1/24": "host bits",
    "192.0.2": NOT_AN_ADDRESS,
    "192.0.2.1.1": NOT_AN_ADDRESS,
    "192.0.2.256": NOT_AN_ADDRESS,
    "192.0.2.010": NOT_AN_ADDRESS,
    "192.0.2.1/032": "not a prefix length",
    "3221226084": NOT_AN_ADDRESS,
    "2001:db8::1/": "not a prefix length",
    "2001:db8::1/129": "at most /128",
    "2001:db8::1/64": "host bits",
    "2001:db8::1%eth0": NOT_AN_ADDRESS,
    "2001:db8::1%a b\n": NOT_AN_ADDRESS,
    "fe80::1%1/128": NOT_AN_ADDRESS,
    "::ffff:198.51.100.7": "IPv4-mapped",
    "::ffff:c633:6407": "IPv4-mapped",
    "١٩٢.0.2.1": NOT_AN_ADDRESS,
    "192.0.2.1\u200b": NOT_AN_ADDRESS,
    "\x00": NOT_AN_ADDRESS,
    "victim.example": NOT_AN_ADDRESS,
    "1" * 5000: NOT_AN_ADDRESS,
}


@pytest.mark.parametrize("text", BAD_PREFIXES, ids=ascii)
def test_what_is_not_a_prefix_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(ValueError, match=BAD_PREFIXES[text]) as refusal:
        parse_prefix(text)
    assert printable(str(refusal.value), 10_000) == str(refusal.value)


@given(st.text(max_size=60))
@example("2001:db8::1%a b\n")
def test_whatever_is_accepted_is_printed_back_as_a_prefix(text: str) -> None:
    try:
        prefix = parse_prefix(text)
    except ValueError:
        return
    assert parse_prefix(str(prefix)) == prefix
    assert ipaddress.ip_network(str(prefix)) == ipaddress.ip_network(text)


@given(networks)
def test_every_canonical_prefix_is_accepted(network: Network) -> None:
    if network.version == 6 and network.network_address.ipv4_mapped:
        return
    prefix = parse_prefix(str(network))
    assert ipaddress.ip_network(str(prefix)) == network
    assert (prefix.first, prefix.last) == (int(network[0]), int(network[-1]))
    assert (prefix.version, prefix.length) == (network.version, network.prefixlen)


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("", None),
        ("   ", None),
        ("# announce 192.0.2.1", None),
        ("announce 192.0.2.1/32", Command("announce", parse_prefix("192.0.2.1"))),
        ("  ANNOUNCE\t192.0.2.1  ", Command("announce", parse_prefix("192.0.2.1"))),
        ("Withdraw 2001:db8::1", Command("withdraw", parse_prefix("2001:db8::1"))),
        ("announce 192.0.2.1/32 please now", Command("announce", parse_prefix("192.0.2.1"))),
        ("withdraw-all", Command("withdraw-all")),
        ("WITHDRAW-ALL", Command("withdraw-all")),
        (
            "announce route 192.0.2.1/32 next-hop 10.0.0.1 community 1:2",
            Command("announce", parse_prefix("192.0.2.1")),
        ),
        ("withdraw route 192.0.2.1/32 next-hop 10.0.0.1", Command("withdraw", parse_prefix("192.0.2.1"))),
        (
            "announce 192.0.2.1 until=1900000000.5 id=a1 source=webhook reason=too%20much%0A new=1",
            Command("announce", parse_prefix("192.0.2.1"), 1900000000.5, "a1", "webhook", "too much\\n"),
        ),
    ],
)
def test_lines_of_the_pipe(line: str, command: Command | None) -> None:
    assert parse_line(line) == command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("announce", r"^INVALID command: announce \(too few words\)"),
        ("192.0.2.1", r"^INVALID command: 192\.0\.2\.1 \(too few words\)"),
        ("announce route", "^INVALID command: announce route"),
        ("announce x", r"^INVALID command: announce x \(not an IPv4"),
        ("announce 192.0.2.1/33", "^INVALID command: "),
        ("withdraw-all 192.0.2.1", r"^INVALID command: withdraw-all 192\.0\.2\.1 \(withdraw-all stands alone"),
        ("block 192.0.2.1", "^UNKNOWN action: block"),
        ("bl\x1bock 192.0.2.1", r"^UNKNOWN action: bl\\x1bock"),
        ("announce 192.0.2.1 until=soon", "until"),
        ("announce 192.0.2.1 until=", "until"),
        ("announce 192.0.2.1 until=inf", "until"),
        ("announce 192.0.2.1 until=-5", "until"),
    ],
)
def test_bad_lines_say_why(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_line(line)


@given(st.text(st.characters(codec="utf-8"), max_size=80))
def test_any_line_is_a_command_or_one_printable_message(line: str) -> None:
    try:
        parse_line(line)
    except ValueError as error:
        assert all(" " <= c <= "~" for c in str(error))


def test_lines_are_the_same_however_the_bytes_arrive() -> None:
    data = b"announce 192.0.2.1/32\n\xff\xfe\x00\n\n" + b"x" * 5000 + b"\nwithdraw-all\n" + b"y" * LINE_MAX + b"\nz"
    whole = [str(line) for line in LineReader().feed(data)]
    assert whole[0] == "announce 192.0.2.1/32"
    assert whole[1] == "\\xff\\xfe\x00"
    assert "longer than 4095 bytes" in whole[3]
    assert whole[4] == "withdraw-all"
    assert len(whole) == 6
    for size in (1, 2, 7, 4095, 4096, 4097):
        reader = LineReader()
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        assert [str(line) for piece in pieces for line in reader.feed(piece)] == whole
        assert reader.partial == "z"


def test_a_line_without_its_end_is_not_carried_out() -> None:
    reader = LineReader()
    assert reader.feed(b"announce 192.0.2.1") == []
    assert "no newline" in str(reader.give_up())
    assert reader.feed(b"withdraw-all\n") == ["withdraw-all"]
    assert reader.give_up() is None


SAFETY = Safety(
    whitelist=(parse_prefix("198.51.100.0/24"), parse_prefix("2001:db8:1::/48")),
    allowed=(parse_prefix("192.0.2.0/24"), parse_prefix("198.51.0.0/16"), parse_prefix("2001:db8::/32")),
    min_prefix_length=25,
    min_prefix_length_ipv6=64,
)


@pytest.mark.parametrize(
    ("prefix", "guard"),
    [
        ("192.0.2.1/32", None),
        ("192.0.2.0/25", None),
        ("192.0.2.0/24", "min_prefix_length"),
        ("0.0.0.0/0", "min_prefix_length"),
        ("::/0", "min_prefix_length"),
        ("198.51.100.7/32", "whitelist"),
        ("198.51.100.0/24", "whitelist"),
        ("198.51.0.0/16", "whitelist"),  # wider than the whitelisted network
        ("198.51.101.1/32", None),
        ("203.0.113.1/32", "allowed"),
        ("192.0.0.0/16", "allowed"),  # wider than the allowed one
        ("2001:db8:1::1/128", "whitelist"),
        ("2001:db8::/32", "whitelist"),
        ("2001:db8:2::1/128", None),
        ("2001:db8:2::/63", "min_prefix_length_ipv6"),
        ("2001:db9::1/128", "allowed"),
        ("10.9.9.9/32", "whitelist"),  # a BGP neighbor's address
    ],
)
def test_guards(prefix: str, guard: str | None) -> None:
    refusal = check_prefix(parse_prefix(prefix), SAFETY, [parse_prefix("10.9.9.9"), parse_prefix("2001:db8::9")])
    assert (refusal and refusal.guard) == guard


@given(networks, networks)
def test_no_prefix_that_overlaps_the_whitelist_passes(network: Network, protected: Network) -> None:
    if any(n.version == 6 and n.network_address.ipv4_mapped for n in (network, protected)):
        return
    safety = Safety(whitelist=(parse_prefix(str(protected)),), min_prefix_length=1, min_prefix_length_ipv6=1)
    overlaps = network.version == protected.version and network.overlaps(protected)
    refused = check_prefix(parse_prefix(str(network)), safety) is not None
    assert refused == (overlaps or network.prefixlen == 0)
