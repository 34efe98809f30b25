"""Random rule sets of the split dialect, made of what iptables-nft can say in each table, in canonical order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hypothesis import strategies as st

from netapply.ruleset import (
    FAMILIES,
    Accept,
    AddressMatch,
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
from netapply_iptables_nft.builtin import BUILT_IN, TABLES

SIZE = {"ip": 4, "ip6": 16}
HOOKS = {"raw": ["PREROUTING", "OUTPUT"], "mangle": ["PREROUTING", "OUTPUT"], "filter": ["OUTPUT"]}
HOOKS["nat"] = ["PREROUTING", "OUTPUT"]
NAMES = ["lo", "eth0", "eth+", "br-1", "a" * 15]

words = st.integers(0, 0xFFFFFFFF)
#: Not the ends: iptables 1.8.9 restores `! --dport 0:5` as `--dport 6:65535`, which means the same.
ports = st.integers(1, 65534)
spans = st.tuples(ports, ports).map(lambda p: PortRange(min(p), max(p)))
singles = ports.map(lambda p: PortRange(p, p))


@st.composite
def cidrs(draw: st.DrawFn, family: Family, shortest: int = 1) -> Cidr:
    size = SIZE[family]
    prefix = draw(st.integers(shortest, size * 8))
    host = size * 8 - prefix
    return Cidr((draw(st.integers(0, (1 << prefix) - 1)) << host).to_bytes(size), prefix)


def disjoint(ranges: Sequence[PortRange]) -> tuple[PortRange, ...]:
    kept: list[PortRange] = []
    for each in sorted(ranges):
        if not kept or each.first > kept[-1].last + 1:
            kept.append(each)
    return tuple(kept)


def slots(ranges: Sequence[PortRange]) -> int:
    return sum(1 + (first != last) for first, last in ranges)


several = st.lists(singles | spans, min_size=1, max_size=15).map(disjoint).filter(lambda r: slots(r) <= 15)
states = st.sets(st.sampled_from(["established", "invalid", "new", "related", "untracked"]), min_size=1)


def named_set(family: Family, elements: Sequence[Cidr]) -> NamedSet:
    content = tuple(sorted(set(elements)))
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:10]
    return NamedSet(f"netapply-{'4' if family == 'ip' else '6'}-{digest}", family, content)


@st.composite
def header_matches(draw: st.DrawFn, family: Family, hook: str) -> list[Match]:
    """Interface, addresses and protocol: at most one of each."""
    found: list[Match] = []
    if draw(st.booleans()):
        found.append(
            IfaceMatch("in" if hook == "PREROUTING" else "out", draw(st.sampled_from(NAMES)), draw(st.booleans()))
        )
    sides = [side for side in ("src", "dst") if draw(st.integers(0, 3)) == 0]
    return [*found, *(AddressMatch(side, draw(cidrs(family)), draw(st.booleans())) for side in sides)]


@st.composite
def other_matches(draw: st.DrawFn, hook: str, table: str, protocol: int, sets: Sequence[NamedSet]) -> list[Match]:
    """Extensions, in canonical order."""
    found: list[Match] = []
    flags = st.booleans()
    if protocol in (6, 17) and draw(flags):
        found.append(PortMatch(draw(st.sampled_from(["src", "dst"])), draw(several), draw(flags)))
    elif protocol == 6 and draw(flags):
        found.append(SynMatch())
    if sets and draw(flags):
        found.append(SetMatch(draw(st.sampled_from(["src", "dst"])), draw(st.sampled_from(sets)).name, draw(flags)))
    if hook == "OUTPUT" and draw(flags):
        first, last = sorted(draw(st.tuples(st.integers(0, 0xFFFFFFFE), st.integers(0, 0xFFFFFFFE))))
        found.append(OwnerMatch(draw(st.sampled_from(["uid", "gid"])), first, last, draw(flags)))
    if draw(st.integers(0, 4)) == 0:
        found.append(MarkMatch(draw(words), draw(words), draw(flags)))
    if draw(st.integers(0, 4)) == 0:
        found.append(ConnmarkMatch(draw(words), draw(words), draw(flags)))
    if draw(st.integers(0, 4)) == 0:
        found.append(StateMatch(tuple(sorted(draw(states)))))
    if hook == "PREROUTING" and table == "mangle" and protocol in (6, 17) and draw(flags):
        found.append(SocketMatch())
    if draw(st.integers(0, 4)) == 0:
        found.append(LimitMatch(draw(st.sampled_from([1, 7, 60, 600])), draw(st.integers(1, 100))))
    return found


def statements(table: str, hook: str, family: Family, protocol: int) -> st.SearchStrategy[Statement]:
    """What may stand in this table, for this protocol."""
    marks = st.builds(SetMark, words, words) | st.builds(SetConnmark, words, words)
    found = st.sampled_from([Return(), Accept()]) | st.builds(Log, st.text("abc \"'", max_size=29))
    if table == "nat" and protocol in (6, 17):
        address = st.integers(1, (1 << 8 * SIZE[family]) - 1).map(lambda n: n.to_bytes(SIZE[family]))
        found |= st.builds(Redirect, st.integers(1, 65535)) | st.builds(Dnat, address, st.integers(1, 65535))
    if table in ("raw", "filter", "mangle"):
        found |= st.just(Drop())
    if table == "mangle":
        found |= marks | st.sampled_from([SaveMark(), RestoreMark()])
    if table == "mangle" and hook == "PREROUTING" and protocol in (6, 17):
        found |= st.builds(TProxy, st.integers(1, 65535), words, words)
    if table == "raw":
        found |= st.builds(SetZone, st.integers(1, 65535))
    return found


comments = st.just("") | st.text("abcXYZ019 .-_\"'", min_size=1, max_size=100)


@st.composite
def rules(
    draw: st.DrawFn, family: Family, table: str, hook: str, sets: Sequence[NamedSet], jumps: Sequence[str]
) -> Rule:
    protocol = draw(st.sampled_from([0, 6, 17, 1]))
    header = draw(header_matches(family, hook)) + ([ProtocolMatch(protocol)] if protocol else [])
    others = draw(other_matches(hook, table, protocol, sets))
    kinds = statements(table, hook, family, protocol)
    statement = draw(kinds | st.sampled_from(jumps).map(Jump) if jumps else kinds)
    return Rule((*header, *others), statement, comment=draw(comments))


@st.composite
def tables(draw: st.DrawFn, family: Family, name: str, sets: Sequence[NamedSet]) -> Table:
    """Built-in chains in the order of their hooks, then ours; each of ours is reached from one hook only."""
    built_in: list[Chain] = []
    own: list[Chain] = []
    for hook in draw(st.lists(st.sampled_from(HOOKS[name]), min_size=1, unique=True)):
        count = draw(st.integers(1, 3))
        chains = [f"NETAPPLY_{hook}_{n}" for n in range(count)]
        for at, chain in enumerate(chains):
            some = st.lists(rules(family, name, hook, sets, chains[at + 1 :]), max_size=4)
            own.append(Chain(chain, tuple(draw(some))))
        ways = st.lists(st.sampled_from(chains).map(lambda c: Rule((), Jump(c))), max_size=2).map(tuple)
        head, rest = draw(ways), draw(ways)
        if head or rest:
            built_in.append(Chain(hook, rest, BUILT_IN[name][hook], head))
    built_in.sort(key=lambda chain: list(BUILT_IN[name]).index(chain.name))
    return Table(family, name, (*built_in, *own))


@st.composite
def rulesets(draw: st.DrawFn) -> Ruleset:
    sets = {  # not halves: ipset keeps everything as two halves, and so reads two halves as everything
        family: [named_set(family, draw(st.lists(cidrs(family, 2), min_size=1, max_size=3)))]
        if draw(st.booleans())
        else []
        for family in FAMILIES
    }
    chosen = draw(st.sets(st.sampled_from(TABLES), min_size=1, max_size=4))
    found = tuple(draw(tables(*key, sets[key[0]])) for key in TABLES if key in chosen)
    used = {m.set for t in found for c in t.chains for r in c.rules for m in r.matches if isinstance(m, SetMatch)}
    return Ruleset(found, tuple(s for family in FAMILIES for s in sets[family] if s.name in used))
