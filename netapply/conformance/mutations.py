"""Mistakes that a backend may make, each a small change of the rules, the routing or the behaviour. Pure.

A mistake that a suite does not notice is a case that it lacks: see `netapply.conformance.proof`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

from netapply.ruleset import (
    Accept,
    Chain,
    Cidr,
    Drop,
    Match,
    PortRange,
    Return,
    Routing,
    Rule,
    Ruleset,
    Statement,
    Table,
    TableFamily,
)
from netapply.values import NamedTuple

OnRules: TypeAlias = Callable[[Ruleset], Ruleset]
OnRouting: TypeAlias = Callable[[Routing], Routing]
#: What a backend does wrong beside its rules; see `netapply.conformance.proof`.
Habit: TypeAlias = Literal[
    "", "leaves a chain", "takes foreign rules along", "always changes", "loses the last step", "keeps old rules",
    "counts nothing",
]  # fmt: skip


class Mutation(NamedTuple):
    """One mistake."""

    name: str
    rules: OnRules | None = None
    routing: OnRouting | None = None
    habit: Habit = ""


# --- how rule sets are changed ---------------------------------------------------------------------------------


def _tables(change: Callable[[Table], Table | None]) -> OnRules:
    def work(ruleset: Ruleset) -> Ruleset:
        changed = (change(table) for table in ruleset.tables)
        return ruleset._replace(tables=tuple(table for table in changed if table is not None))

    return work


def _chains(change: Callable[[Table, Chain], Chain]) -> OnRules:
    return _tables(lambda table: table._replace(chains=tuple(change(table, chain) for chain in table.chains)))


def _rules(change: Callable[[Rule], Rule | None]) -> OnRules:
    """Each rule, without those that become None."""

    def of(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(changed for rule in rules if (changed := change(rule)) is not None)

    return _chains(lambda _, chain: chain._replace(head=of(chain.head), rules=of(chain.rules)))


def _matches(kind: str, change: Callable[[Any], Match | None], **only: object) -> OnRules:
    """Each match of the kind with these values, without those that become None."""

    def of(match: Match) -> Match | None:
        wanted = match.kind == kind and all(getattr(match, name) == value for name, value in only.items())
        return change(match) if wanted else match

    def on(rule: Rule) -> Rule:
        return rule._replace(matches=tuple(changed for match in rule.matches if (changed := of(match)) is not None))

    return _rules(on)


def _without(kind: str, **only: object) -> OnRules:
    return _matches(kind, lambda _: None, **only)


def _turned(kind: str, **only: object) -> OnRules:
    return _matches(kind, lambda match: match._replace(negate=not match.negate), **only)


def _statements(kind: str, change: Callable[[Any], Statement | None]) -> OnRules:
    def on(rule: Rule) -> Rule | None:
        if rule.statement.kind != kind:
            return rule
        statement = change(rule.statement)
        return None if statement is None else rule._replace(statement=statement)

    return _rules(on)


def _own_chains(change: Callable[[tuple[Rule, ...]], tuple[Rule, ...]]) -> OnRules:
    """The rules of the chains that are not built in."""
    return _chains(lambda _, chain: chain if chain.base else chain._replace(rules=change(chain.rules)))


def _built_in(hook: str, kinds: tuple[str, ...], change: Callable[[Chain], Chain]) -> OnRules:
    """Chains of this hook, of nat or of another type."""

    def on(_: Table, chain: Chain) -> Chain:
        wanted = chain.base is not None and chain.base.hook == hook and chain.base.type in kinds
        return change(chain) if wanted else chain

    return _chains(on)


def _empty(chain: Chain) -> Chain:
    return chain._replace(head=(), rules=())


def _only(family: TableFamily) -> OnRules:
    """Of one family alone."""

    def on(rule: Rule) -> Rule | None:
        return rule._replace(family=family) if rule.family in (None, family) else None  # type: ignore[arg-type]

    def work(ruleset: Ruleset) -> Ruleset:
        if any(table.family == "inet" for table in ruleset.tables):
            return _rules(on)(ruleset)
        return _tables(lambda table: table if table.family == family else None)(ruleset)

    return work


def _later(kinds: tuple[str, ...], hook: str, by: int) -> OnRules:
    """Base chains with another priority; no other dialect than the native one can do that."""

    def on(table: Table, chain: Chain) -> Chain:
        wanted = table.family == "inet" and chain.base and (chain.base.type, chain.base.hook) == (kinds[0], hook)
        early = len(kinds) == 1 or (chain.base is not None and (chain.base.priority <= -290) == (kinds[1] == "raw"))
        if not (wanted and early and chain.base):
            return chain
        return chain._replace(base=chain.base._replace(priority=chain.base.priority + by))

    return _chains(on)


def _prefix(by: int) -> Callable[[Any], Match]:
    def change(match: Any) -> Match:
        bits = len(match.cidr.packed) * 8
        prefix = min(max(match.cidr.prefix + by, 0), bits)
        number = int.from_bytes(match.cidr.packed) >> (bits - prefix) << (bits - prefix)
        changed: Match = match._replace(cidr=Cidr(number.to_bytes(bits // 8), prefix))
        return changed

    return change


def _ranges(change: Callable[[PortRange], PortRange]) -> Callable[[Any], Match]:
    def on(match: Any) -> Match:
        changed: Match = match._replace(ranges=tuple(sorted(set(map(change, match.ranges)))))
        return changed

    return on


def _wide(change: Callable[[PortRange], PortRange]) -> OnRules:
    """Ranges of more than one port."""
    return _matches("port", _ranges(lambda each: change(each) if each.first < each.last else each))


def _elements(change: Callable[[tuple[Cidr, ...]], tuple[Cidr, ...]]) -> OnRules:
    return lambda ruleset: ruleset._replace(
        sets=tuple(each._replace(elements=change(each.elements)) for each in ruleset.sets)
    )


def _list(change: Callable[[tuple[PortRange, ...]], tuple[PortRange, ...]]) -> OnRules:
    """Lists of more than one range."""
    return _matches("port", lambda m: m._replace(ranges=change(m.ranges)) if len(m.ranges) > 1 else m)


def _next(packed: bytes) -> bytes:
    return packed[:-1] + bytes([packed[-1] ^ 3])


def _swap(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (*rules[1:2], *rules[:1], *rules[2:])


def _named(of: Callable[[str], str]) -> Callable[[Any], Match]:
    def change(match: Any) -> Match:
        changed: Match = match._replace(name=of(match.name))
        return changed

    return change


# --- the mistakes ----------------------------------------------------------------------------------------------


def mutations() -> Iterator[Mutation]:
    """Every mistake. Names are unique."""
    for name, rules in _of_rules():
        yield Mutation(name, rules)
    for name, change in _OF_ROUTING.items():
        yield Mutation(name, routing=change)
    for habit in Habit.__args__:  # type: ignore[attr-defined]  # of a Literal
        if habit:
            yield Mutation(f"the backend {habit}", habit=habit)


def _of_rules() -> Iterator[tuple[str, OnRules]]:
    yield from _LOST.items()
    yield from _CHANGED.items()
    yield from _STATEMENTS.items()
    yield from _ORDER.items()


_LOST: dict[str, OnRules] = {
    "lost: in-interface": _without("iface", direction="in"),
    "lost: out-interface": _without("iface", direction="out"),
    "lost: source address": _without("address", side="src"),
    "lost: destination address": _without("address", side="dst"),
    "lost: set": _without("set"),
    "lost: destination port": _without("port", side="dst"),
    "lost: source port": _without("port", side="src"),
    "lost: uid": _without("owner", id="uid"),
    "lost: gid": _without("owner", id="gid"),
    "lost: cgroup": _without("cgroup"),
    "lost: mark": _without("mark"),
    "lost: connection mark": _without("connmark"),
    "lost: state": _without("state"),
    "lost: SYN": _without("syn"),
    "lost: inversion of an address": _turned("address", negate=True),
    "lost: inversion of a port": _turned("port", negate=True),
    "lost: inversion of an owner": _turned("owner", negate=True),
    "gained: inversion of an interface": _turned("iface", direction="in"),
    "gained: inversion of an address": _turned("address", negate=False),
    "gained: inversion of a set": _turned("set"),
    "gained: inversion of a port": _turned("port", negate=False),
    "gained: inversion of an owner": _turned("owner", negate=False),
    "gained: inversion of a mark": _turned("mark"),
    "lost: the first entry of a port list": _list(lambda ranges: ranges[1:]),
    "lost: the last entry of a port list": _list(lambda ranges: ranges[:-1]),
    "lost: a set's first element": _elements(lambda elements: elements[1:]),
    "lost: a set's last element": _elements(lambda elements: elements[:-1]),
    "lost: all rules for IPv6": _only("ip"),
    "lost: all rules for IPv4": _only("ip6"),
}
_CHANGED: dict[str, OnRules] = {
    "an address block is half as large": _matches("address", _prefix(1)),
    "an address block is twice as large": _matches("address", _prefix(-1)),
    "an address block is one address": _matches("address", _prefix(128)),
    "an element of a set is twice as large": _elements(lambda e: tuple(_prefix(-1)(_Held(c)).cidr for c in e)),  # type: ignore[union-attr]
    "source taken for destination": _matches("address", lambda m: m._replace(side="src"), side="dst"),
    "destination taken for source": _matches("address", lambda m: m._replace(side="dst"), side="src"),
    "a set's sides are exchanged": _matches("set", lambda m: m._replace(side="src" if m.side == "dst" else "dst")),
    "a port range begins one later": _wide(lambda r: r._replace(first=r.first + 1)),
    "a port range ends one earlier": _wide(lambda r: r._replace(last=r.last - 1)),
    "a port range ends one later": _wide(lambda r: r._replace(last=min(r.last + 1, 65535))),
    "a port range is its first port": _wide(lambda r: r._replace(last=r.first)),
    "a port is the next one": _matches(
        "port", _ranges(lambda r: PortRange(r.first + 1, r.last + 1) if r[1] < 65535 else r)
    ),
    "a port's bytes are exchanged": _matches(
        "port", _ranges(lambda r: PortRange(*[_swapped(r.first)] * 2) if r[0] == r[1] else r)
    ),
    "destination port taken for source port": _matches("port", lambda m: m._replace(side="src"), side="dst"),
    "source port taken for destination port": _matches("port", lambda m: m._replace(side="dst"), side="src"),
    "TCP taken for UDP": _rules(lambda rule: _protocol(rule, 6, 17)),
    "UDP taken for TCP": _rules(lambda rule: _protocol(rule, 17, 6)),
    "an id range begins one later": _matches("owner", lambda m: m._replace(first=m.first + (m.first < m.last))),
    "an id range ends one earlier": _matches("owner", lambda m: m._replace(last=m.last - (m.first < m.last))),
    "an id is the next one": _matches("owner", lambda m: m._replace(first=m.first + 1, last=m.last + 1)),
    "gid taken for uid": _matches("owner", lambda m: m._replace(id="uid"), id="gid"),
    "uid taken for gid": _matches("owner", lambda m: m._replace(id="gid"), id="uid"),
    "a wildcard interface is a name": _matches("iface", _named(lambda name: name.replace("+", "0"))),
    "an interface is a wildcard": _matches(
        "iface", _named(lambda name: name if name.endswith("+") else name[:2] + "+")
    ),
    "a mark's mask is all bits": _matches("mark", lambda m: m._replace(mask=0xFFFFFFFF)),
    "a mark is the next one": _matches("mark", lambda m: m._replace(value=m.value ^ 1)),
    "a connection mark is the next one": _matches("connmark", lambda m: m._replace(value=m.value ^ 1)),
    "state invalid taken for untracked": _matches(
        "state", lambda m: m._replace(states=("untracked",)), states=("invalid",)
    ),
    "state new taken for established": _matches(
        "state", lambda m: m._replace(states=("established",)), states=("new",)
    ),
    "a cgroup is its parent": _matches("cgroup", lambda m: m._replace(path=m.path.rpartition("/")[0] or m.path)),
}
_STATEMENTS: dict[str, OnRules] = {
    "redirect to the next port": _statements("redirect", lambda s: s._replace(port=s.port + 1)),
    "redirect to port 15001 always": _statements("redirect", lambda s: s._replace(port=15001)),
    "redirect returns": _statements("redirect", lambda _: Return()),
    "dnat to the next port": _statements("dnat", lambda s: s._replace(port=s.port + 1)),
    "dnat to another address": _statements("dnat", lambda s: s._replace(address=_next(s.address))),
    "tproxy to the next port": _statements("tproxy", lambda s: s._replace(port=s.port + 1)),
    "tproxy with another mark": _statements("tproxy", lambda s: s._replace(mark=s.mark ^ 2)),
    "tproxy without a mark": _statements("tproxy", lambda s: s._replace(mark=0, mask=0)),
    "tproxy returns": _statements("tproxy", lambda _: Return()),
    "a mark is set to another": _statements("set-mark", lambda s: s._replace(value=s.value ^ 2)),
    "a mark is not set": _statements("set-mark", lambda _: None),
    "a connection mark is set to another": _statements("set-connmark", lambda s: s._replace(value=s.value ^ 2)),
    "a connection mark is not set": _statements("set-connmark", lambda _: None),
    "a zone is another": _statements("set-zone", lambda s: s._replace(zone=3 - s.zone)),
    "a zone is not set": _statements("set-zone", lambda _: None),
    "drop accepts": _statements("drop", lambda _: Accept()),
    "drop is missing": _statements("drop", lambda _: None),
    "return drops": _statements("return", lambda _: Drop()),
    "return is missing": _statements("return", lambda _: None),
    "jump is missing": _statements("jump", lambda _: None),
}
_ORDER: dict[str, OnRules] = {
    "the first two rules are exchanged": _own_chains(_swap),
    "rules stand in reverse order": _own_chains(lambda rules: rules[::-1]),
    "the first rule is missing": _own_chains(lambda rules: rules[1:]),
    "the last rule is missing": _own_chains(lambda rules: rules[:-1]),
    "hook prerouting has no nat": _built_in("prerouting", ("nat",), _empty),
    "hook output has no nat": _built_in("output", ("nat",), _empty),
    "hook prerouting has nothing but nat": _built_in("prerouting", ("filter",), _empty),
    "hook output has no marks": _built_in("output", ("route",), _empty),
    "hook output has no zones": _built_in("output", ("filter",), _empty),
    "our first rules stand last": _chains(lambda _, c: c._replace(head=(), rules=c.head + c.rules)),
    "our last rules stand first": _chains(
        lambda t, c: c._replace(head=c.head + c.rules, rules=()) if c.base and t.family != "inet" else c
    ),
    "zones are set after tracking": _later(("filter", "raw"), "output", 200),
    "zones of what comes in are set after tracking": _later(("filter", "raw"), "prerouting", 200),
    "invalid is looked at before tracking": _later(("filter", "mangle"), "prerouting", -130),
}
_OF_ROUTING: dict[str, OnRouting] = {
    "no policy rule": lambda routing: routing._replace(rules=()),
    "no route": lambda routing: routing._replace(routes=()),
    "no routing for IPv6": lambda routing: routing._replace(
        rules=routing.rules[:1], routes=routing.routes[:1], addresses=()
    ),
    "no address on lo": lambda routing: routing._replace(addresses=()),
    "a policy rule for another mark": lambda routing: routing._replace(
        rules=tuple(rule._replace(mark=rule.mark ^ 2) for rule in routing.rules)
    ),
    "a policy rule with all bits of the mask": lambda routing: routing._replace(
        rules=tuple(rule._replace(mask=0xFFFFFFFF) for rule in routing.rules)
    ),
    "a policy rule to another table": lambda routing: routing._replace(
        rules=tuple(rule._replace(table=rule.table + 1) for rule in routing.rules)
    ),
    "a route in another table": lambda routing: routing._replace(
        routes=tuple(route._replace(table=route.table + 1) for route in routing.routes)
    ),
}


class _Held(NamedTuple):
    cidr: Cidr


def _swapped(port: int) -> int:
    return (port & 0xFF) << 8 | port >> 8


def _protocol(rule: Rule, one: int, other: int) -> Rule:
    return rule._replace(
        matches=tuple(
            match._replace(protocol=other) if match.kind == "protocol" and match.protocol == one else match
            for match in rule.matches
        )
    )
