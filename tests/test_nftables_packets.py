"""What native rules do to packets, where nft and xtables differ and the rule set says which way it is."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from netapply.namespace import Namespace
from netapply.ruleset import (
    Accept,
    Base,
    Chain,
    Drop,
    IfaceMatch,
    MarkMatch,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Return,
    Rule,
    Ruleset,
    SetMark,
    Table,
    TProxy,
)
from netapply_nftables import BACKEND
from tests.netns import Netns

TCP = ProtocolMatch(6)
APP = PortMatch("dst", (PortRange(9000, 9000),))
MANGLE_PREROUTING = Base("filter", "prerouting", -150)
FILTER_OUTPUT = Base("filter", "output", 0)


@pytest.fixture
def kernel(netns: Netns) -> Iterator[Namespace]:
    with Namespace.open(netns.path) as namespace:
        yield namespace


def put(kernel: Namespace, *chains: Chain) -> None:
    for step in BACKEND.encode(BACKEND.read(kernel), Ruleset((Table("inet", "netapply", chains),))):
        BACKEND.commit(kernel, step)


def listen(port: int, *, transparent: bool = False) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if transparent:
        sock.setsockopt(socket.SOL_IP, 19, 1)  # IP_TRANSPARENT
    sock.bind(("0.0.0.0", port))
    sock.listen()
    return sock


def answers(sock: socket.socket) -> bool:
    """Whether a connection to port 9000 is made, and by this listener."""
    sock.settimeout(0.5)
    with socket.socket() as client:
        client.settimeout(0.5)
        try:
            client.connect(("127.0.0.1", 9000))
            sock.accept()[0].close()
        except TimeoutError:
            return False
    return True


def test_tproxy_hands_connections_to_the_transparent_listener(kernel: Namespace, netns: Netns) -> None:
    put(kernel, Chain("c", (Rule((TCP, APP), TProxy(15006, 0x539)),), MANGLE_PREROUTING))

    def connect() -> bool:
        with listen(9000), listen(15006, transparent=True) as proxy:
            return answers(proxy)

    assert netns.enter(connect)


def test_tproxy_without_a_listener_drops_instead_of_passing_on_to_the_application(
    kernel: Namespace, netns: Netns
) -> None:
    def connect() -> bool:
        with listen(9000) as application:
            return answers(application)

    assert netns.enter(connect)
    put(kernel, Chain("c", (Rule((TCP, APP), TProxy(15006, 0x539)),), MANGLE_PREROUTING))
    assert not netns.enter(connect)


def test_tproxy_counts_a_packet_once(kernel: Namespace, netns: Netns) -> None:
    put(kernel, Chain("c", (Rule((TCP, APP), TProxy(15006, 1)), Rule((TCP, APP), Return())), MANGLE_PREROUTING))

    def connect() -> None:
        with socket.socket() as client:
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.connect(("127.0.0.1", 9000))

    netns.enter(connect)
    counters = BACKEND.read(kernel).counters
    assert counters["inet", "netapply", "c", 0][0] == 1
    assert counters["inet", "netapply", "c", 1] == (0, 0)


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        (0xFFFF, SetMark(0x539, 0xFFF), 0xF539),
        (0xF0F0, SetMark(0x00FF, 0), 0xF00F),
        (0xABCD, SetMark(0x1), 0x1),
        (0xFF, SetMark(0, 0xF), 0xF0),
        (0x3, SetMark(0x6, 0x4), 0x5),
    ],
)
def test_a_mark_is_cleared_by_the_mask_and_flipped_by_the_value(
    kernel: Namespace, netns: Netns, before: int, change: SetMark, after: int
) -> None:
    rules = (Rule((), SetMark(before)), Rule((), change), Rule((MarkMatch(after),), Accept()), Rule((), Drop()))
    put(kernel, Chain("c", rules, FILTER_OUTPUT))
    netns.enter(send_datagram)
    assert BACKEND.read(kernel).counters["inet", "netapply", "c", 2][0] == 1


@pytest.mark.parametrize(
    ("match", "packets"),
    [
        (OwnerMatch("uid", 0, 0), 1),
        (OwnerMatch("uid", 0, 0, negate=True), 0),
        (OwnerMatch("gid", 0, 255), 1),
        (OwnerMatch("gid", 1, 1 << 30), 0),
        (OwnerMatch("uid", 1, 1 << 30, negate=True), 1),
        (IfaceMatch("out", "lo"), 1),
        (IfaceMatch("out", "l+"), 1),
        (IfaceMatch("out", "lo+", negate=True), 0),
        (IfaceMatch("out", "+"), 1),
        (IfaceMatch("out", "l"), 0),
    ],
    ids=str,
)
def test_owners_and_interfaces_match_as_in_xtables(
    kernel: Namespace, netns: Netns, match: OwnerMatch | IfaceMatch, packets: int
) -> None:
    put(kernel, Chain("c", (Rule((match,), Accept()),), FILTER_OUTPUT))
    netns.enter(send_datagram)
    assert BACKEND.read(kernel).counters["inet", "netapply", "c", 0][0] == packets


def send_datagram() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.sendto(b"x", sock.getsockname())
