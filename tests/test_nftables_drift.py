"""What others do to our table is seen, and undone by the next apply or clean; reading it never fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netapply.errors import DecodeError, UnsupportedError
from netapply.namespace import Namespace
from netapply.ruleset import (
    AddressMatch,
    Base,
    CgroupMatch,
    Chain,
    Cidr,
    Dnat,
    IfaceMatch,
    Jump,
    LimitMatch,
    Log,
    MarkMatch,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Redirect,
    Return,
    Rule,
    Ruleset,
    SaveMark,
    SetMark,
    SetMatch,
    SetZone,
    SocketMatch,
    StateMatch,
    Table,
    TProxy,
)
from netapply_nftables import BACKEND
from netapply_nftables.sets import decode_port_set
from netapply_wire.nfnetlink import Message, attr, nested, u32, u64
from tests.netns import Netns
from tests.nftables_rulesets import named_set

TCP = ProtocolMatch(6)
SET = named_set("ip", [Cidr(b"\n\0\0\0", 8), Cidr(b"\xc0\xa8\0\0", 16)])
WANTED = Ruleset(
    (
        Table(
            "inet",
            "netapply",
            (
                Chain("nat-output", (Rule((TCP,), Jump("out")),), Base("nat", "output", -100)),
                Chain("mangle", (Rule((TCP,), TProxy(15006, 1)),), Base("filter", "prerouting", -150)),
                Chain(
                    "out",
                    (
                        Rule((IfaceMatch("out", "lo"), AddressMatch("dst", Cidr(b"\x7f\0\0\1", 32))), Return(), "ip"),
                        Rule((SetMatch("dst", SET.name),), Return(), "ip"),
                        Rule((TCP, PortMatch("dst", (PortRange(22, 22), PortRange(80, 90)))), Redirect(15001)),
                    ),
                ),
            ),
        ),
    ),
    (SET,),
)

DRIFTS = {
    "a rule of another kind": "add rule inet netapply out ip ttl 5 drop",
    "a rule that we could have made": "insert rule inet netapply out counter return",
    "a rule without a counter": "add rule inet netapply out drop",
    "a rule with a map": "add rule inet netapply out counter meta mark set tcp dport map { 1 : 5 }",
    "a zone of one direction": "add rule inet netapply out counter ct original zone set 5",
    "a log group": 'add rule inet netapply out counter log prefix "x" group 5',
    "a masked owner": "add rule inet netapply nat-output meta skuid & 7 == 3 counter return",
    "a verdict with goto": "add rule inet netapply nat-output counter goto out",
    "a chain": "add chain inet netapply theirs",
    "a base chain": "add chain inet netapply theirs { type filter hook forward priority 0; }",
    "an ingress chain": "add chain inet netapply theirs { type filter hook ingress device lo priority 0; }",
    "a set": "add set inet netapply theirs { type ipv4_addr; }",
    "a set that counts": "add set inet netapply theirs { type ipv4_addr; timeout 5s; elements = { 1.2.3.4 } }",
    "a map": "add map inet netapply theirs { type ipv4_addr : inet_service; elements = { 1.2.3.4 : 5 } }",
    "a verdict map": "add map inet netapply theirs { type inet_service : verdict; elements = { 5 : drop } }",
    "a counter": "add counter inet netapply theirs",
    "a flow table": "add flowtable inet netapply theirs { hook ingress priority 0; devices = { lo }; }",
    "a policy": "add chain inet netapply nat-output { policy drop; }",
    "a dormant table": "add table inet netapply { flags dormant; }",
    "a flushed chain": "flush chain inet netapply out",
    "a flushed table": "flush table inet netapply",
    "a table of theirs": "delete table inet netapply; add table inet netapply; add chain inet netapply nat-output",
}


@pytest.fixture
def kernel(netns: Netns) -> Iterator[Namespace]:
    with Namespace.open(netns.path) as namespace:
        put(namespace, WANTED)
        yield namespace


def put(kernel: Namespace, desired: Ruleset | None) -> None:
    for step in BACKEND.encode(BACKEND.read(kernel), desired):
        BACKEND.commit(kernel, step)


def meddle(netns: Netns, drift: str) -> None:
    try:
        netns.run("nft", DRIFTS[drift])
    except AssertionError as refused:
        if "No such file or directory" not in str(refused) or drift != "a flow table":
            raise
        pytest.skip("this kernel has no flow tables")


def test_without_drift_all_is_as_wanted(kernel: Namespace) -> None:
    assert BACKEND.read(kernel).ruleset == WANTED


@pytest.mark.parametrize("drift", DRIFTS)
def test_drift_is_seen_and_repaired_by_apply(kernel: Namespace, netns: Netns, drift: str) -> None:
    listing = netns.run("nft", "list", "ruleset")
    meddle(netns, drift)
    assert netns.run("nft", "list", "ruleset") != listing
    snapshot = BACKEND.read(kernel)
    assert snapshot.ruleset != WANTED
    assert isinstance(dict(snapshot.counters), dict)
    put(kernel, WANTED)
    assert BACKEND.read(kernel).ruleset == WANTED
    assert netns.run("nft", "list", "ruleset") == listing


@pytest.mark.parametrize("drift", DRIFTS)
def test_drift_does_not_stop_clean(kernel: Namespace, netns: Netns, drift: str) -> None:
    meddle(netns, drift)
    put(kernel, None)
    assert netns.run("nft", "list", "ruleset") == ""


def test_elements_of_our_set_cannot_be_changed_by_others(kernel: Namespace, netns: Netns) -> None:
    before = BACKEND.read(kernel).ruleset
    netns.run("nft", "add", "element", "inet", "netapply", SET.name, "{ 1.2.3.4 }", check=False)
    netns.run("nft", "flush", "set", "inet", "netapply", SET.name, check=False)
    assert BACKEND.read(kernel).ruleset == before


def test_a_set_of_our_name_with_another_content_is_replaced(kernel: Namespace, netns: Netns) -> None:
    put(kernel, None)
    netns.run(
        "nft",
        f"add table inet netapply; add set inet netapply {SET.name} "
        "{ type ipv4_addr; flags constant,interval; elements = { 1.0.0.0/8, 2.0.0.1-2.0.0.6 }; }",
    )
    assert len(BACKEND.read(kernel).ruleset.sets[0].elements) == 5
    put(kernel, WANTED)
    assert BACKEND.read(kernel).ruleset == WANTED


def test_the_order_of_chains_is_restored(kernel: Namespace) -> None:
    table = WANTED.tables[0]
    turned = WANTED._replace(tables=(table._replace(chains=table.chains[::-1]),))
    put(kernel, turned)
    assert BACKEND.read(kernel).ruleset == turned
    put(kernel, WANTED)
    assert BACKEND.read(kernel).ruleset == WANTED


def test_a_rule_that_is_not_ours_cannot_be_written_by_a_roll_back(kernel: Namespace, netns: Netns) -> None:
    netns.run("nft", "add rule inet netapply out ip ttl 5 drop")
    drifted = BACKEND.read(kernel)
    put(kernel, WANTED)
    with pytest.raises(UnsupportedError):
        BACKEND.encode(BACKEND.read(kernel), drifted.ruleset)


def test_a_lost_second_half_of_a_tproxy_rule_is_drift(kernel: Namespace, netns: Netns) -> None:
    text = netns.run("nft", "-a", "list", "chain", "inet", "netapply", "mangle")
    handle = next(line.rpartition(" ")[2] for line in text.splitlines() if " drop # handle" in line)
    netns.run("nft", "delete", "rule", "inet", "netapply", "mangle", "handle", handle)
    snapshot = BACKEND.read(kernel)
    assert snapshot.ruleset != WANTED
    put(kernel, WANTED)
    assert BACKEND.read(kernel).ruleset == WANTED


def test_the_path_of_a_cgroup_is_kept_beside_its_id(kernel: Namespace) -> None:
    rule = Rule((CgroupMatch("kubepods.slice/x.scope", 4711),), Return(), comment="why")
    wanted = Ruleset((Table("inet", "netapply", (Chain("c", (rule,), Base("filter", "output", 0)),)),))
    put(kernel, wanted)
    assert BACKEND.read(kernel).ruleset == wanted


HOOK_OUTPUT, HOOK_PREROUTING = Base("filter", "output", -300), Base("filter", "prerouting", -150)
BLOCK = Cidr(b"\n\0\0\0", 8)
ELSEWHERE = "counter tproxy ip to 1.1.1.1:5 meta mark set 1 accept"
#: A rule of ours, and one of nft's that says nearly the same.
NEARLY = [
    (Rule((), SetZone(5)), "counter ct original zone set 5"),
    (Rule((), Log("x")), 'counter log prefix "x" group 5'),
    (Rule((), Log("x")), 'counter log prefix "x" level info'),
    (Rule((), Log("x")), 'counter log prefix "x" flags all'),
    (Rule((OwnerMatch("uid", 3, 3),), Return()), "meta skuid & 7 == 3 counter return"),
    (Rule((OwnerMatch("uid", 3, 3),), Return()), "meta skuid >= 3 counter return"),
    (Rule((LimitMatch(10),), Return()), "limit rate over 10/minute counter return"),
    (Rule((LimitMatch(10),), Return()), "limit rate 10/hour counter return"),
    (Rule((LimitMatch(10),), Return()), "limit rate 10 bytes/minute burst 5 bytes counter return"),
    (Rule((TCP,), Redirect(1)), "meta l4proto tcp counter redirect to :1 random"),
    (Rule((TCP,), Redirect(1)), "meta l4proto tcp counter redirect to :1-2"),
    (Rule((TCP,), Dnat(b"\1\2\3\4", 5)), "meta l4proto tcp counter dnat ip to 1.2.3.4:5 persistent"),
    (Rule((TCP,), Dnat(b"\1\2\3\4", 5)), "meta l4proto tcp counter dnat ip to 1.2.3.4:5-6"),
    (Rule((TCP,), Dnat(b"\1\2\3\4", 5)), "meta l4proto tcp counter dnat ip to 1.2.3.4-1.2.3.5:5"),
    (Rule((TCP,), TProxy(5, 1)), "meta l4proto tcp counter tproxy to :5 accept"),
    (Rule((TCP,), TProxy(5, 1)), "meta l4proto tcp counter tproxy to :5 meta mark set 1"),
    (
        Rule((TCP,), TProxy(5, 1), "ip"),
        f"ip version 4 meta l4proto tcp {ELSEWHERE}",
    ),
    (Rule((TCP,), Return()), "meta l4proto != tcp counter return"),
    (Rule((IfaceMatch("out", "lo"),), Return()), "oif lo counter return"),
    (Rule((AddressMatch("dst", BLOCK),), Return(), "ip"), "ip daddr & 255.0.255.0 == 10.0.0.0 counter return"),
    (Rule((AddressMatch("dst", BLOCK),), Return(), "ip"), "ip daddr 10.0.0.0-10.255.255.255 counter return"),
    (Rule((MarkMatch(5),), Return()), "meta mark 5-6 counter return"),
    (Rule((MarkMatch(5),), Return()), "meta mark > 5 counter return"),
    (Rule((StateMatch(("new",)),), Return()), "ct state != new counter return"),
    (Rule((StateMatch(("new",)),), Return()), "ct status snat counter return"),
    (Rule((SocketMatch(),), Return()), "socket transparent 1 socket wildcard 0 counter return"),
    (Rule((SocketMatch(),), Return()), "socket wildcard 0 counter return"),
    (Rule((), SetMark(1)), "counter meta priority set 1"),
    (Rule((), SetMark(1)), "counter meta mark set meta mark << 1"),
    (Rule((), SaveMark()), "counter ct mark set ct mark"),
    (Rule((), Jump("other")), "counter goto other"),
    (Rule((TCP, PortMatch("dst", (PortRange(1, 9),))), Return()), "tcp flags syn counter return"),
    (Rule((TCP, PortMatch("dst", (PortRange(1, 9),))), Return()), "th dport & 7 == 1 counter return"),
]


@pytest.mark.parametrize(("rule", "nearly"), NEARLY, ids=[nearly for _, nearly in NEARLY])
def test_a_rule_that_is_nearly_ours_is_not_taken_for_it(netns: Netns, rule: Rule, nearly: str) -> None:
    kinds = {Redirect: Base("nat", "output", -100), Dnat: Base("nat", "output", -100), TProxy: HOOK_PREROUTING}
    socket_match = any(isinstance(match, SocketMatch) for match in rule.matches)
    base = HOOK_PREROUTING if socket_match else kinds.get(type(rule.statement), HOOK_OUTPUT)
    wanted = Ruleset((Table("inet", "netapply", (Chain("c", (rule,), base), Chain("other"))),))
    with Namespace.open(netns.path) as kernel:
        put(kernel, wanted)
        text = netns.run("nft", "-a", "list", "chain", "inet", "netapply", "c")
        handle = next(line.rpartition(" ")[2] for line in text.splitlines() if "counter" in line)
        netns.run("nft", f"replace rule inet netapply c handle {handle} {nearly}")
        assert BACKEND.read(kernel).ruleset != wanted
        put(kernel, wanted)
        assert BACKEND.read(kernel).ruleset == wanted


def test_a_chain_that_moves_can_be_jumped_to_by_one_that_stays(kernel: Namespace) -> None:
    base = Chain("base", (Rule((), Jump("out")),), Base("filter", "output", 0))
    put(kernel, Ruleset((Table("inet", "netapply", (base, Chain("x"), Chain("out"))),)))
    moved = Ruleset((Table("inet", "netapply", (base, Chain("out"), Chain("x"))),))
    put(kernel, moved)
    assert BACKEND.read(kernel).ruleset == moved


def dumped(*elements: bytes) -> Message:
    return Message(1, {3: b"".join(elements)})


def element(key: int, *more: bytes) -> bytes:
    return nested(1, nested(1, attr(1, key.to_bytes(2))), *more)


PORT_SET = Message(1, {2: b"__set0\0", 3: b"\0\0\0\7", 4: b"\0\0\0\x0d"})
END = u32(3, 1)


def test_an_interval_without_an_end_goes_to_the_next_one() -> None:
    found = decode_port_set(PORT_SET, [dumped(element(90, END), element(10), element(80)), dumped(element(0, END))])
    assert found == (PortRange(10, 79), PortRange(80, 89))


def test_an_element_with_a_timeout_is_not_one_of_ours() -> None:
    with pytest.raises(DecodeError):
        decode_port_set(PORT_SET, [dumped(element(10, u64(4, 5000)))])
