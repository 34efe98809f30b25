"""Random rule sets for the native dialect: every match and statement where the kernel takes it, in canonical order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hypothesis import strategies as st

from netapply.ruleset import (
    Accept,
    AddressMatch,
    Base,
    CgroupMatch,
    Chain,
    Cidr,
    ConnmarkMatch,
    Dnat,
    Drop,
    Family,
    IfaceMatch,
    Jump,
    LimitMatch,
    Log,
    MarkMatch,
    Match,
    NamedSet,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Redirect,
    RestoreMark,
    Return,
    Rule,
    Ruleset,
    SaveMark,
    SetConnmark,
    SetMark,
    SetMatch,
    SetZone,
    SocketMatch,
    StateMatch,
    Statement,
    SynMatch,
    Table,
    TProxy,
)

CHAINS = {
    "nat-prerouting": Base("nat", "prerouting", -100),
    "nat-output": Base("nat", "output", -100),
    "mangle-prerouting": Base("filter", "prerouting", -150),
    "mangle-output": Base("route", "output", -150),
    "raw-prerouting": Base("filter", "prerouting", -300),
    "raw-output": Base("filter", "output", -300),
    "filter-input": Base("filter", "input", 3),
}
FULL = 0xFFFFFFFF
flags = st.booleans()
words = st.integers(0, FULL)
masks = st.sampled_from([FULL, 0xFFF, 0x100, 0, 0xFFFF0000]) | words
ports = st.integers(1, 65535)
names = st.sampled_from(["lo", "eth0", "eth+", "+", "abcdefghijklmno", "a.b-c_d"])
families: st.SearchStrategy[Family] = st.sampled_from(["ip", "ip6"])
sides = st.sampled_from(["src", "dst"])
comments = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='"\\'), max_size=100)


def block(family: Family, number: int, prefix: int) -> Cidr:
    """The block of this prefix length that holds an address, given as a number."""
    length = 4 if family == "ip" else 16
    bits = length * 8
    prefix = min(prefix, bits)
    return Cidr((number % (1 << bits) >> (bits - prefix) << (bits - prefix)).to_bytes(length), prefix)


def blocks(family: Family) -> st.SearchStrategy[Cidr]:
    return st.builds(block, st.just(family), st.integers(0, (1 << 128) - 1), st.integers(0, 128))


def named_set(family: Family, cidrs: Sequence[Cidr]) -> NamedSet:
    """Sorted, without overlaps, and named after its content."""
    kept: list[Cidr] = []
    for cidr in sorted(cidrs):
        if not kept or block(family, int.from_bytes(cidr.packed), kept[-1].prefix) != kept[-1]:
            kept.append(cidr)
    digest = hashlib.sha256(b"".join(cidr.packed + bytes([cidr.prefix]) for cidr in kept)).hexdigest()
    return NamedSet(f"netapply-{4 if family == 'ip' else 6}-{digest[:10]}", family, tuple(kept))


def port_ranges(numbers: Sequence[int], *, single: bool) -> tuple[PortRange, ...]:
    """Sorted and disjoint, no two neighbours."""
    if single:
        return tuple(PortRange(number, number) for number in sorted(set(numbers))[::2])
    ordered = sorted(set(numbers))
    pairs = zip(ordered[::2], ordered[1::2] or ordered, strict=False)
    return tuple(PortRange(first, last) for first, last in pairs)


range_lists = st.builds(port_ranges, st.lists(ports, min_size=1, max_size=12), single=flags).filter(bool)


def marks(kind: type[MarkMatch | ConnmarkMatch]) -> st.SearchStrategy[Match]:
    # A value outside of its mask never matches; nft prints some of these another way, and no plan asks for them.
    return st.builds(lambda v, m, n: kind(v & m, m, n), words, masks, flags)


@st.composite
def optional(draw: st.DrawFn, strategy: st.SearchStrategy[Match]) -> list[Match]:
    return [draw(strategy)] if draw(st.integers(0, 3)) == 0 else []


@st.composite
def rules(draw: st.DrawFn, base: Base, targets: Sequence[str], sets: Sequence[NamedSet]) -> Rule:
    """A rule that the kernel takes in a chain of this base."""
    family = draw(st.none() | families)
    outbound = base.hook == "output"
    matches: list[Match] = []
    direction = "out" if outbound else "in"
    matches += draw(optional(st.builds(IfaceMatch, st.just(direction), names, flags)))
    if family:
        for side in ("src", "dst"):
            matches += draw(optional(st.builds(AddressMatch, st.just(side), blocks(family), flags)))
    statement = draw(statements(base, targets, family))
    ported = isinstance(statement, Redirect | Dnat | TProxy) or draw(flags)
    matches += [ProtocolMatch(draw(st.sampled_from([6, 17])))] if ported else []
    if ported:
        for side in ("src", "dst"):
            matches += draw(optional(st.builds(PortMatch, st.just(side), range_lists, flags)))
        matches += draw(optional(st.just(SynMatch()))) if ProtocolMatch(6) in matches else []
    else:
        matches += draw(optional(st.builds(ProtocolMatch, st.sampled_from([1, 6, 17, 58, 132, 200]))))
    fitting = [named.name for named in sets if named.family == family]
    if fitting:
        matches += draw(optional(st.builds(SetMatch, sides, st.sampled_from(fitting), flags)))
    if outbound:
        matches += draw(optional(st.builds(owner, st.sampled_from(["uid", "gid"]), words, words, flags)))
        paths = st.sampled_from(["a", "system.slice/envoy.service", "/".join(["x" * 20] * 5)])
        matches += draw(optional(st.builds(CgroupMatch, paths, st.integers(1, (1 << 64) - 1), st.just(False))))
    matches += draw(optional(marks(MarkMatch)))
    matches += draw(optional(marks(ConnmarkMatch)))
    states = st.sets(st.sampled_from(["new", "established", "related", "invalid", "untracked"]), min_size=1)
    matches += draw(optional(st.builds(StateMatch, states.map(lambda found: tuple(sorted(found))))))
    if base.hook == "prerouting":
        matches += draw(optional(st.just(SocketMatch())))
    matches += draw(optional(st.builds(LimitMatch, st.integers(1, 10000), st.integers(1, 1000))))
    return Rule(tuple(matches), statement, family, draw(st.just("") | comments))


def owner(kind: str, first: int, last: int, negate: bool) -> OwnerMatch:
    return OwnerMatch(kind, min(first, last), max(first, last), negate)


def statements(base: Base, targets: Sequence[str], family: Family | None) -> st.SearchStrategy[Statement]:
    everywhere: list[st.SearchStrategy[Statement]] = [
        st.sampled_from([Return(), Accept()]),
        st.builds(SetMark, words, masks),
        st.builds(SetConnmark, words, masks),
        st.sampled_from([SaveMark(), RestoreMark()]),
        st.builds(Log, st.sampled_from(["netapply ", "x", "a" * 29])),
    ]
    if targets:
        everywhere.append(st.builds(Jump, st.sampled_from(list(targets))))
    if base.type == "nat":
        length = {"ip": 4, "ip6": 16, None: 4}[family]
        everywhere += [
            st.builds(Redirect, ports),
            st.builds(Dnat, st.binary(min_size=length, max_size=length), ports),
        ]
    else:
        everywhere.append(st.just(Drop()))
    if base.priority == -300:
        everywhere.append(st.builds(SetZone, st.integers(0, 65535)))
    if base == CHAINS["mangle-prerouting"]:
        everywhere.append(st.builds(TProxy, ports, words, masks))
    return st.one_of(everywhere)


@st.composite
def rulesets(draw: st.DrawFn) -> Ruleset:
    """Base chains first, each with a chain of its own to jump to."""
    sets = {
        named.name: named
        for family in draw(st.lists(families, max_size=3))
        if (named := named_set(family, draw(st.lists(blocks(family), min_size=1, max_size=8))))
    }
    bases = draw(st.lists(st.sampled_from(sorted(CHAINS)), min_size=1, max_size=3, unique=True))
    found: list[Chain] = []
    for name in bases:
        inner = rules(CHAINS[name], [], list(sets.values()))
        outer = rules(CHAINS[name], [f"own-{name}"], list(sets.values()))
        found.append(Chain(name, tuple(draw(st.lists(outer, max_size=3))), CHAINS[name]))
        found.append(Chain(f"own-{name}", tuple(draw(st.lists(inner, max_size=3)))))
    found.sort(key=lambda chain: chain.base is None)
    return Ruleset((Table("inet", "netapply", tuple(found)),), tuple(sorted(sets.values())))
