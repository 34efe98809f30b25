"""Rules as bytes of iptables-legacy and back, on random rules; `rulesets` gives whole rule sets that a kernel takes."""

from __future__ import annotations

import os
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netapply.errors import DecodeError, UnsupportedError
from netapply.ruleset import (
    FAMILIES,
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
    SynMatch,
    Table,
    TProxy,
)
from netapply_iptables_legacy.entries import Entry
from netapply_iptables_legacy.rules import decode_rule, encode_rule

SETS: dict[Family, str] = {"ip": "netapply-4-0011223344", "ip6": "netapply-6-0011223344"}
INDICES = {SETS["ip"]: 3, SETS["ip6"]: 7}
NAMES: Mapping[int, str] = {3: SETS["ip"], 7: SETS["ip6"]}
PRINTABLE = st.characters(min_codepoint=0x20, max_codepoint=0x7E)
STATES = ("related", "established", "new", "invalid", "untracked")

CGROUPS = "netapply-tables-"


@contextmanager
def temporary_cgroup() -> Iterator[str]:
    """A cgroup v2 that rules may name, or "" where none can be made. Removes those of test runs that were killed."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
    name = f"{CGROUPS}{os.getpid()}"
    try:
        if root is None:
            raise FileNotFoundError
        (root / name).mkdir(exist_ok=True)
    except OSError:
        yield ""
        return
    for left in root.glob(CGROUPS + "*"):
        if not Path("/proc", left.name.removeprefix(CGROUPS)).exists():
            with suppress(OSError):
                left.rmdir()
    try:
        yield name
    finally:
        with suppress(OSError):
            (root / name).rmdir()


u32 = st.integers(0, 0xFFFFFFFF) | st.sampled_from([0, 1, 0x539, 0xFFFFFFFF])
masks = st.just(0xFFFFFFFF) | u32
port = st.integers(1, 65535)
id32 = st.integers(0, 0xFFFFFFFE)


def block(packed: bytes, prefix: int) -> Cidr:
    bits = len(packed) * 8
    return Cidr((int.from_bytes(packed) >> bits - prefix << bits - prefix).to_bytes(len(packed)), prefix)


@cache
def addresses(family: Family) -> st.SearchStrategy[bytes]:
    size = 4 if family == "ip" else 16
    return st.binary(min_size=size, max_size=size)


@cache
def cidrs(family: Family) -> st.SearchStrategy[Cidr]:
    return st.builds(block, addresses(family), st.integers(1, 32 if family == "ip" else 128))


@st.composite
def port_matches(draw: st.DrawFn) -> PortMatch:
    """Sorted, disjoint, at most 15 slots. A single range that is not all ports becomes xt tcp or udp."""
    cuts = sorted(draw(st.lists(st.integers(0, 65535), min_size=2, max_size=14, unique=True)))
    ranges = tuple(PortRange(first, last) for first, last in zip(cuts[::2], cuts[1::2], strict=False))
    kind = draw(st.sampled_from(["ranges", "singles", "one", "port", "all"]))
    chosen = {
        "ranges": ranges,
        "singles": tuple(PortRange(cut, cut) for cut in cuts),
        "one": ranges[:1],
        "port": (PortRange(cuts[0], cuts[0]),),
        "all": (PortRange(0, 65535),),
    }[kind]
    return PortMatch(draw(st.sampled_from(["src", "dst"])), chosen, draw(st.booleans()))


def maybe(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.just(()) | strategy.map(lambda each: (each,))


@cache
def match_parts(
    family: Family, hook: str, protocol: int, cgroup: str
) -> tuple[st.SearchStrategy[tuple[object, ...]], ...]:
    """Each match or none, in the canonical order."""
    names = st.text(string.ascii_lowercase + string.digits + "-_.", min_size=1, max_size=14)
    sides = st.sampled_from(["src", "dst"])
    owner = st.builds(
        lambda kind, a, b, n: OwnerMatch(kind, min(a, b), max(a, b), n),
        st.sampled_from(["uid", "gid"]),
        id32,
        id32,
        st.booleans(),
    )
    states = st.lists(st.sampled_from(STATES), min_size=1, unique=True).map(lambda s: StateMatch(tuple(sorted(s))))
    return (
        maybe(st.builds(IfaceMatch, st.just("in"), names | names.map(lambda n: n + "+"), st.booleans())),
        maybe(st.builds(IfaceMatch, st.just("out"), names | st.just("lo"), st.booleans())),
        maybe(st.builds(AddressMatch, st.just("src"), cidrs(family), st.booleans())),
        maybe(st.builds(AddressMatch, st.just("dst"), cidrs(family), st.booleans())),
        st.just((ProtocolMatch(protocol),) if protocol else ()),
        maybe(port_matches() | st.just(SynMatch()) if protocol == 6 else port_matches())
        if protocol in (6, 17)
        else st.just(()),
        maybe(st.builds(SetMatch, sides, st.just(SETS[family]), st.booleans())),
        maybe(owner) if hook == "output" else st.just(()),
        maybe(st.builds(CgroupMatch, st.just(cgroup), st.just(0), st.booleans())) if cgroup else st.just(()),
        maybe(st.builds(MarkMatch, u32, masks, st.booleans())),
        maybe(st.builds(ConnmarkMatch, u32, masks, st.booleans())),
        maybe(states),
        maybe(st.just(SocketMatch())) if hook == "prerouting" else st.just(()),
        maybe(st.builds(LimitMatch, st.integers(1, 700), st.integers(1, 50))),
    )


@cache
def statements(
    family: Family, table: str, hook: str, protocol: int, jumps: tuple[str, ...]
) -> st.SearchStrategy[object]:
    options: list[st.SearchStrategy[object]] = [
        st.sampled_from([Return(), Accept(), SaveMark(), RestoreMark(), *map(Jump, jumps)]),
        st.builds(SetMark, u32, masks),
        st.builds(SetConnmark, u32, masks),
        st.builds(Log, st.text(PRINTABLE, min_size=1, max_size=29)),
    ]
    if table != "nat":
        options.append(st.just(Drop()))
    if table == "nat" and protocol in (6, 17):
        options += [st.builds(Redirect, port), st.builds(Dnat, addresses(family).filter(any), port)]
    if table == "raw":
        options.append(st.builds(SetZone, st.integers(0, 65535)))
    if (table, hook) == ("mangle", "prerouting") and protocol in (6, 17):
        options.append(st.builds(TProxy, port, u32, masks))
    return st.one_of(options)


comments = st.just("") | st.text(PRINTABLE, min_size=1, max_size=60).map(str.strip)


@st.composite
def rules(
    draw: st.DrawFn, family: Family, table: str, hook: str, jumps: tuple[str, ...] = (), cgroup: str = ""
) -> Rule:
    """A rule that is legal in a chain which this hook of this table reaches; `cgroup` has to exist."""
    protocol = draw(st.sampled_from([0, 6, 17, 132]))
    parts = match_parts(family, hook, protocol, cgroup if hook == "output" else "")
    matches = tuple(match for part in parts for match in draw(part))
    return Rule(matches, draw(statements(family, table, hook, protocol, jumps)), None, draw(comments))


PLACES = [
    ("raw", "prerouting"),
    ("raw", "output"),
    ("mangle", "prerouting"),
    ("mangle", "output"),
    ("filter", "input"),
    ("filter", "output"),
    ("nat", "prerouting"),
    ("nat", "output"),
]
PRIORITY = {"raw": -300, "mangle": -150, "filter": 0, "nat": -100}


@st.composite
def tables(draw: st.DrawFn, family: Family, name: str, cgroup: str = "") -> Table:
    """Chains of ours hang from a jump in the built-in chain of one hook each, and jump only to later ones."""
    built_in: list[Chain] = []
    own: list[Chain] = []
    for hook in [hook for table, hook in PLACES if table == name and draw(st.booleans())]:
        kind = "nat" if name == "nat" else "route" if (name, hook) == ("mangle", "output") else "filter"
        base = Base(kind, hook, PRIORITY[name] if (name, hook) != ("nat", "input") else 100)
        names = [f"NETAPPLY_{hook.upper()}_{number}" for number in range(draw(st.integers(1, 3)))]
        for place, chain in enumerate(names):
            later = tuple(names[place + 1 :])
            own.append(Chain(chain, tuple(draw(st.lists(rules(family, name, hook, later, cgroup), max_size=5)))))
        condition = draw(maybe(st.builds(AddressMatch, st.just("src"), cidrs(family))))
        built_in.append(Chain(hook.upper(), base=base, head=(Rule(condition, Jump(names[0])),)))
    order = ("PREROUTING", "INPUT", "OUTPUT")
    # iptables keeps chains of one's own in the order of their names.
    return Table(family, name, (*sorted(built_in, key=lambda c: order.index(c.name)), *sorted(own)))


@st.composite
def rulesets(draw: st.DrawFn, cgroup: str = "") -> Ruleset:
    """Tables in the order in which reading gives them, and the sets, which stand whether used or not."""
    made = [draw(tables(family, name, cgroup)) for name in ("raw", "mangle", "filter", "nat") for family in FAMILIES]
    sets = tuple(
        NamedSet(SETS[family], family, tuple(sorted(draw(st.sets(cidrs(family), min_size=1, max_size=3)))))
        for family in FAMILIES
    )
    return Ruleset(tuple(table for table in made if table.chains), sets)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("table", "hook"), PLACES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decoding_gives_the_rule_that_was_encoded(family: Family, table: str, hook: str, data: st.DataObject) -> None:
    rule = data.draw(rules(family, table, hook, ("NETAPPLY_X",), "system.slice/envoy.service"))
    assert decode_rule(encode_rule(rule, family, INDICES), family, NAMES) == rule


@settings(max_examples=200, deadline=None)
@given(rule=rules("ip", "nat", "output", (), "system.slice"), place=st.integers(0), value=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_means_what_it_says(rule: Rule, place: int, value: int) -> None:
    """Decoding never invents: whatever it accepts encodes to the same entry, kernel-private fields apart."""
    entry = encode_rule(rule, "ip", INDICES)
    data = bytearray(entry.data)
    data[place % len(data)] ^= value
    changed = Entry(bytes(data), entry.jump)
    try:
        found = decode_rule(changed, "ip", NAMES)
    except DecodeError:
        return
    again = encode_rule(found, "ip", INDICES).data
    different = [at for at, (one, other) in enumerate(zip(again, changed.data, strict=True)) if one != other]
    assert len(different) <= 1


@pytest.mark.parametrize(
    "rule",
    [
        Rule((AddressMatch("src", Cidr(b"\1\2\3\4", 32)), AddressMatch("src", Cidr(b"\1\2\3\5", 32))), Accept()),
        Rule((IfaceMatch("in", "eth0"), IfaceMatch("in", "eth1")), Accept()),
        Rule((ProtocolMatch(6), ProtocolMatch(17)), Accept()),
        Rule((IfaceMatch("in", "a" * 16),), Accept()),
        Rule((AddressMatch("src", Cidr(bytes(16), 64)),), Accept()),
        Rule((ProtocolMatch(6), PortMatch("dst", tuple(PortRange(p, p) for p in range(1, 17)))), Accept()),
        Rule((LimitMatch(10007),), Accept()),
        Rule((), Log("x" * 30)),
        Rule((), Accept(), None, "x" * 256),
        Rule((), Dnat(bytes(16), 1)),
    ],
)
def test_what_an_entry_cannot_hold_is_refused(rule: Rule) -> None:
    with pytest.raises(UnsupportedError):
        encode_rule(rule, "ip", {})
