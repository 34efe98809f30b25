"""iptables-nft: every rule that can be written is read back, by us and by iptables-nft itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings

from netapply.errors import DecodeError, UnsupportedError
from netapply.namespace import Namespace
from netapply.ruleset import (
    AddressMatch,
    Chain,
    Cidr,
    Family,
    IfaceMatch,
    Jump,
    LimitMatch,
    MarkMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Return,
    Rule,
    Ruleset,
    SynMatch,
    Table,
)
from netapply_iptables_nft import BACKEND
from netapply_iptables_nft.builtin import BUILT_IN
from netapply_iptables_nft.decode import decode_rule
from netapply_iptables_nft.dumped import without_state
from netapply_iptables_nft.encode import encode_rule
from netapply_iptables_nft.tables import read_tables
from netapply_wire.expressions import (
    NFT_CMP_EQ,
    NFT_CMP_LTE,
    NFT_CMP_NEQ,
    NFT_GOTO,
    NFT_META_L4PROTO,
    NFT_META_OIFNAME,
    NFT_RETURN,
    bitwise,
    cmp,
    counter,
    expression,
    meta,
    payload,
    target,
    verdict,
)
from netapply_wire.nfnetlink import u32, u64
from tests import netns as namespaces
from tests.iptables_nft_rules import rulesets
from tests.netns import Netns

SAVE: dict[Family, str] = {"ip": "iptables-nft-save", "ip6": "ip6tables-nft-save"}
RESTORE: dict[Family, str] = {"ip": "iptables-nft-restore", "ip6": "ip6tables-nft-restore"}
LIVE = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def opened() -> Iterator[tuple[Netns, Namespace]]:
    netns = namespaces.make()
    with Namespace.open(netns.path) as kernel:
        yield netns, kernel
    netns.close()


@pytest.fixture(scope="module")
def worn() -> Iterator[tuple[Netns, Namespace]]:
    """A namespace that one example leaves to the next, so that every apply but the first is an update."""
    yield from opened()


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Netns, Namespace]]:
    """Another one, in which the stock tools work too: they restore tables as theirs."""
    yield from opened()


def apply(kernel: Namespace, ruleset: Ruleset | None) -> None:
    for step in BACKEND.encode(BACKEND.read(kernel), ruleset):
        BACKEND.commit(kernel, step)


def by_chain(text: str) -> dict[tuple[str, str], list[str]]:
    """The rules of each chain that has any, by table and chain."""
    found: dict[tuple[str, str], list[str]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A"):
            found.setdefault((table, line.split()[1]), []).append(line)
    return found


def section(text: str, family: Family) -> str:
    """One family's part of what `render` gives."""
    start, name = "# ip6tables-restore\n" if family == "ip6" else "# iptables-restore\n", "# ip6tables-restore\n"
    after = text.partition(start)[2]
    return after if family == "ip6" else after.partition(name)[0]


def expressions_in(kernel: Namespace) -> dict[tuple[object, str], list[bytes]]:
    """The bytes of all rules, counters apart, by table and chain."""
    return {
        (key, name): [without_state(rule.expressions) for rule in chain.rules]
        for key, table in read_tables(kernel).items()
        for name, chain in table.chains.items()
        if chain.rules
    }


@LIVE
@given(rulesets())
def test_what_is_applied_is_read_back(worn: tuple[Netns, Namespace], ruleset: Ruleset) -> None:
    """The kernel holds exactly the rule set, whatever stood there before, and there is nothing left to do."""
    _, kernel = worn
    apply(kernel, ruleset)
    after = BACKEND.read(kernel)
    assert after.ruleset == ruleset
    assert BACKEND.encode(after, ruleset) == ()
    assert after.foreign == ()


@settings(LIVE, max_examples=25)
@given(rulesets())
def test_iptables_nft_save_prints_what_we_render(shared: tuple[Netns, Namespace], ruleset: Ruleset) -> None:
    """The stock tool sees the same rules, in the same order, in every chain; restoring its save changes nothing."""
    netns, kernel = shared
    apply(kernel, ruleset)
    for family in ("ip", "ip6"):
        saved = netns.run(SAVE[family])
        assert by_chain(saved) == by_chain(section(BACKEND.render(ruleset), family))
        netns.run(RESTORE[family], stdin=saved)
        assert by_chain(netns.run(SAVE[family])) == by_chain(saved)


@settings(LIVE, max_examples=25)
@given(rulesets())
def test_what_iptables_nft_restores_is_ours_still(shared: tuple[Netns, Namespace], ruleset: Ruleset) -> None:
    """Native ports and marks, as iptables 1.8.8 and later write them on a restore, mean what our xt matches meant.

    The next apply writes them as xt matches again.
    """
    netns, kernel = shared
    apply(kernel, ruleset)
    for family in ("ip", "ip6"):
        netns.run(RESTORE[family], stdin=netns.run(SAVE[family]))
    assert rules_of(BACKEND.read(kernel).ruleset) == rules_of(ruleset)
    apply(kernel, ruleset)
    views = BACKEND.read(kernel).views.values()
    chains = (
        chain for view in views for chain in (*view.own.values(), *(sum(each, ()) for each in view.placed.values()))
    )
    assert not any(rule.native for chain in chains for rule in chain)


def rules_of(ruleset: Ruleset | None) -> dict[tuple[str, str, str, int], Rule]:
    """Every rule by its place, whatever the order of tables and chains: a save sorts them."""
    walk = (ruleset or Ruleset()).walk()
    return {(table.family, table.name, chain.name, index): rule for table, chain, index, rule in walk}


def is_written_alike(rule: Rule) -> bool:
    """Neither what iptables 1.8.9 writes as a native expression, unlike 1.8.7 and us, nor a limit per second."""
    return not any(
        isinstance(match, MarkMatch | SynMatch)
        or (isinstance(match, PortMatch) and len(match.ranges) == 1)
        or (isinstance(match, LimitMatch) and match.rate >= 60)
        for match in rule.matches
    )


@settings(LIVE, max_examples=25)
@given(rulesets())
def test_bytes_are_those_of_iptables(shared: tuple[Netns, Namespace], ruleset: Ruleset) -> None:
    """Where iptables 1.8.9 writes xt matches too, the kernel holds the same bytes for its rules as for ours."""
    netns, kernel = shared
    plain = Ruleset(
        tuple(
            table._replace(
                chains=tuple(
                    chain._replace(rules=tuple(rule for rule in chain.rules if is_written_alike(rule)))
                    for chain in table.chains
                )
            )
            for table in ruleset.tables
        ),
        ruleset.sets,
    )
    apply(kernel, plain)
    ours = expressions_in(kernel)
    for family in ("ip", "ip6"):
        netns.run(RESTORE[family], stdin=section(BACKEND.render(plain), family))
    assert expressions_in(kernel) == ours


@settings(LIVE, max_examples=8)
@given(rulesets())
def test_iptables_nft_finds_every_rule(shared: tuple[Netns, Namespace], ruleset: Ruleset) -> None:
    """`iptables-nft -C` succeeds for each rule as we render it."""
    netns, kernel = shared
    apply(kernel, ruleset)
    for table, chain, _, rule in ruleset.walk():
        # Within double quotes the shell takes no backslash before a single quote, and iptables-restore does.
        words = shlex.split(BACKEND.render_rule(table, chain, rule).replace("\\'", "'"))
        tool = "iptables-nft" if table.family == "ip" else "ip6tables-nft"
        netns.run(tool, "-t", table.name, "-C", *words[1:])


def test_clean_leaves_nothing(worn: tuple[Netns, Namespace]) -> None:
    """However many rule sets came and went, nothing of them stays."""
    netns, kernel = worn
    apply(kernel, None)
    assert netns.run("nft", "list", "ruleset") == ""
    assert BACKEND.read(kernel).ruleset is None


TCP = ProtocolMatch(6)


@pytest.mark.parametrize(
    "matches",
    [
        (AddressMatch("src", Cidr(b"\n\0\0\0", 8)), AddressMatch("src", Cidr(b"\n\1\0\0", 16))),
        (IfaceMatch("out", "lo"), IfaceMatch("out", "eth0")),
        (TCP, ProtocolMatch(17)),
        (AddressMatch("src", Cidr(bytes(16), 8)),),
        (IfaceMatch("in", "a" * 16),),
        (PortMatch("dst", (PortRange(1, 1),)),),
    ],
    ids=["two sources", "two interfaces", "two protocols", "other family", "long name", "no protocol"],
)
def test_what_iptables_cannot_say_is_refused(matches: tuple[object, ...]) -> None:
    """A rule that iptables would misread is refused before the kernel is touched."""
    with pytest.raises(UnsupportedError):
        encode_rule(Rule(matches, Return()), "ip")


@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("negate", [False, True])
def test_every_interface_and_none_are_spelled_as_iptables_does(
    worn: tuple[Netns, Namespace], direction: Literal["in", "out"], negate: bool
) -> None:
    """`+` is loaded and not compared; `! +` is a name that no interface can have."""
    netns, kernel = worn
    hook = "PREROUTING" if direction == "in" else "OUTPUT"
    rule = Rule((IfaceMatch(direction, "+", negate), ProtocolMatch(6)), Return())
    jump = Chain(hook, base=BUILT_IN["raw"][hook], head=(Rule((), Jump("NETAPPLY_X")),))
    ruleset = Ruleset((Table("ip", "raw", (jump, Chain("NETAPPLY_X", (rule,)))),))
    apply(kernel, ruleset)
    assert BACKEND.read(kernel).ruleset == ruleset
    assert BACKEND.render_rule(ruleset.tables[0], ruleset.tables[0].chains[1], rule) in netns.run(SAVE["ip"])
    words = [*(["!"] * negate), f"-{direction[0]}", "+", "-p", "tcp", "-j", "RETURN"]
    netns.run("iptables-nft", "-t", "raw", "-A", "NETAPPLY_X", *words)
    ours, theirs = expressions_in(kernel)[("ip", "raw"), "NETAPPLY_X"]
    assert ours == theirs
    apply(kernel, None)


OIF = meta(NFT_META_OIFNAME) + cmp(NFT_CMP_EQ, b"lo\0")
DADDR = payload(1, 16, 4)
PROTOCOL = meta(NFT_META_L4PROTO)
RETURN = verdict(NFT_RETURN)


@pytest.mark.parametrize(
    "expressions",
    [
        OIF + RETURN,
        counter() + counter() + RETURN,
        OIF + counter(),
        counter() + RETURN + OIF,
        OIF + OIF + counter() + RETURN,
        DADDR + counter() + RETURN,
        DADDR + meta(NFT_META_OIFNAME) + cmp(NFT_CMP_EQ, b"lo\0") + counter() + RETURN,
        OIF + meta(NFT_META_OIFNAME) + counter() + RETURN,
        meta(NFT_META_OIFNAME) + cmp(NFT_CMP_NEQ, b"INVAL/D\0") + counter() + RETURN,
        DADDR + bitwise(b"\xff\0\0\0", b"\1\0\0\0") + cmp(NFT_CMP_EQ, b"\n\0\0\0") + counter() + RETURN,
        DADDR + bitwise(b"\xff\0\xff\0") + cmp(NFT_CMP_EQ, b"\n\0\0\0") + counter() + RETURN,
        DADDR + cmp(NFT_CMP_LTE, b"\n\0\0\0") + counter() + RETURN,
        payload(1, 8, 1) + cmp(NFT_CMP_EQ, b"\5") + counter() + RETURN,
        expression("limit", u64(1, 5), u64(2, 60), u32(3, 5), u32(4, 1), u32(5, 0)) + counter() + RETURN,
        expression("limit", u64(1, 5), u64(2, 60), u32(3, 5), u32(4, 0), u32(5, 1)) + counter() + RETURN,
        expression("limit", u64(1, 600_001), u64(2, 60), u32(3, 5), u32(4, 0), u32(5, 0)) + counter() + RETURN,
        payload(2, 2, 2) + cmp(NFT_CMP_EQ, b"\0\x50") + counter() + RETURN,
        PROTOCOL + cmp(NFT_CMP_EQ, b"\x3a") + payload(2, 2, 2) + cmp(NFT_CMP_EQ, b"\0\x50") + counter() + RETURN,
        counter() + verdict(NFT_GOTO, "NETAPPLY_OUTPUT"),
        counter() + target("REDIRECT", 1, bytes(24)),
    ],
    ids=[
        "no counter", "two counters", "no statement", "match after statement", "a field twice", "load without compare",
        "load over a load", "two interfaces", "not no interface", "xor", "a mask with holes", "less than",
        "another field", "bytes a minute", "over a limit", "a limit that iptables cannot say", "ports of no protocol",
        "ports of icmpv6", "goto", "another revision",
    ],
)  # fmt: skip
def test_what_we_would_not_write_is_not_read_as_ours(expressions: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_rule(without_state(expressions), "ip")


def test_bytes_that_are_no_expressions_are_a_decode_error() -> None:
    with pytest.raises(DecodeError):
        without_state(b"\xff\0\1\0")
