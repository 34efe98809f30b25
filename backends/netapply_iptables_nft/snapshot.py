"""One reading of a namespace: what is ours and what is not, told apart and decoded when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import TypeAlias

from netapply.backend import STRANGE, Counters, Owned
from netapply.errors import DecodeError
from netapply.ruleset import Chain, Jump, Rule, Ruleset, Table
from netapply.values import NamedTuple
from netapply_iptables_nft.builtin import BUILT_IN, TABLES
from netapply_iptables_nft.decode import SetNames, decode_rule
from netapply_iptables_nft.dumped import counters_of, jump_to_ours, set_indices, without_state
from netapply_iptables_nft.tables import (
    AT_THE_END,
    IN_FRONT,
    ChainState,
    Dumped,
    RuleState,
    TableKey,
    TableState,
    tables_of,
)
from netapply_wire.claims import claim
from netapply_wire.ipset import Listed, Standing


class OurRule(NamedTuple):
    """A rule of ours as it stands. `rule` is None where somebody put something there that we cannot read.

    `native` rules were written by a newer iptables: see `netapply_iptables_nft.decode`.
    """

    handle: int
    rule: Rule | None
    native: bool
    expressions: bytes
    tag: bytes


Rules: TypeAlias = tuple[OurRule, ...]


class Placed(NamedTuple):
    """Our rules in a built-in chain: those before everybody else's, and the others."""

    head: Rules
    rules: Rules


class View(NamedTuple):
    """A table told apart: our chains in the kernel's order, our rules in the built-in ones, and foreign rules."""

    state: TableState
    own: Mapping[str, Rules]
    placed: Mapping[str, Placed]
    foreign: Mapping[str, tuple[RuleState, ...]]


class Contents:
    """What a namespace holds. `sets` are those of our names."""

    def __init__(self, tables: Mapping[TableKey, TableState], sets: tuple[Listed, ...], owned: Owned) -> None:
        self.tables = tables
        self.sets = sets
        self.names: SetNames = tuple((each.at, each.name) for each in sets)
        self.owned = owned

    @cached_property
    def views(self) -> Mapping[TableKey, View]:
        """Each table that there is, told apart."""
        return {key: _tell_apart(self, key) for key in TABLES if key in self.tables}

    @cached_property
    def ruleset(self) -> Ruleset | None:
        """Ours, decoded; None when nothing of ours is there.

        Tables are in the order of `TABLES`; built-in chains come first, in the order of their hooks, then ours in
        the kernel's order; sets by name. A rule that we cannot read is a jump to "<rule HANDLE>", which no chain is
        called, so it equals nothing that we write.
        """
        tables = [Table(*key, chains) for key, view in self.views.items() if (chains := tuple(_chains(key, view)))]
        sets = self.standing.ours
        return Ruleset(tuple(tables), tuple(each.decode() for each in sets)) if tables or sets else None

    @cached_property
    def standing(self) -> Standing:
        """Our sets, and how often our rules use each."""
        if not self.sets:
            return Standing((), {})
        ours = (rule for view in self.views.values() for _, rules in _all_rules(view) for rule in rules)
        return Standing(self.sets, Counter(index for rule in ours for index in set_indices(rule.expressions)))

    @property
    def counters(self) -> Counters:
        """Packets and bytes of each of our rules."""
        return {
            (*key, chain, index): counters_of(rule.expressions)
            for key, view in self.views.items()
            for chain, rules in _all_rules(view)
            for index, rule in enumerate(rules)
        }

    @property
    def foreign(self) -> object:
        """Tables, chains, policies and rules that are not ours, with the counters left out."""
        told = ((*key, not view.state.ours, tuple(_foreign(view))) for key, view in self.views.items())
        return tuple(each for each in told if each[2] or each[3])


@lru_cache(8)
def contents_of(dumped: Dumped, sets: tuple[Listed, ...], owned: Owned) -> Contents:
    """What such a dump says, told apart and decoded once for all namespaces that hold the same."""
    return Contents(tables_of(dumped), sets, owned)


class Snapshot(NamedTuple):
    """What was in the namespace at one generation; a `netapply.backend.Snapshot`."""

    generation: int
    contents: Contents

    @property
    def views(self) -> Mapping[TableKey, View]:
        """Each table that there is, told apart."""
        return self.contents.views

    @property
    def ruleset(self) -> Ruleset | None:
        """Ours, decoded. Two snapshots of the same contents give the same object."""
        return self.contents.ruleset

    @property
    def counters(self) -> Counters:
        """Packets and bytes of each of our rules."""
        return self.contents.counters

    @property
    def foreign(self) -> object:
        """What is not ours, with the counters left out."""
        return self.contents.foreign


def _all_rules(view: View) -> Iterator[tuple[str, Rules]]:
    yield from ((chain, placed.head + placed.rules) for chain, placed in view.placed.items())
    yield from view.own.items()


def _tell_apart(contents: Contents, key: TableKey) -> View:
    state, prefixes = contents.tables[key], contents.owned.prefixes
    own: dict[str, Rules] = {}
    placed: dict[str, Placed] = {}
    foreign: dict[str, tuple[RuleState, ...]] = {}
    built_in = [name for name in BUILT_IN[key[1]] if name in state.chains]
    for name in (*built_in, *(name for name in state.chains if name not in built_in)):
        chain = state.chains[name]
        if name in built_in:
            placed[name], foreign[name] = _tell_rules_apart(contents, key, chain)
        elif name.startswith(prefixes) and chain.base is None:
            own[name] = tuple(_our_rule(contents, key, rule) for rule in chain.rules)
        else:
            foreign[name] = chain.rules
    return View(state, own, {name: each for name, each in placed.items() if any(each)}, foreign)


def _tell_rules_apart(contents: Contents, key: TableKey, chain: ChainState) -> tuple[Placed, tuple[RuleState, ...]]:
    lost = _lost(contents, key, chain.name)
    tagged = [_is_tagged(each, contents.owned) for each in chain.rules]
    mine = claim(chain.rules, tagged, lambda each: _our_rule(contents, key, each).rule, lost)
    head: list[OurRule] = []
    rules: list[OurRule] = []
    foreign: list[RuleState] = []
    for each, is_mine in zip(chain.rules, mine, strict=True):
        if not is_mine:
            foreign.append(each)
        elif foreign or rules or each.userdata == AT_THE_END:
            rules.append(_our_rule(contents, key, each))
        else:
            head.append(_our_rule(contents, key, each))
    return Placed(tuple(head), tuple(rules)), tuple(foreign)


def _is_tagged(rule: RuleState, owned: Owned) -> bool:
    return rule.userdata in (IN_FRONT, AT_THE_END) or jump_to_ours(rule.expressions, owned.prefixes) is not None


def _lost(contents: Contents, key: TableKey, chain: str) -> list[Rule]:
    """Rules of ours that may stand there untagged: where chains of ours do, in that table or in nat."""
    family, table = key
    prefixes = contents.owned.prefixes
    places: tuple[TableKey, ...] = (key, (family, "nat"))
    near = [state for place in places if (state := contents.tables.get(place))]
    if not contents.owned.direct or not any(name.startswith(prefixes) for state in near for name in state.chains):
        return []
    return [rule for *where, rule in contents.owned.direct if where == [family, table, chain]]


def _our_rule(contents: Contents, key: TableKey, state: RuleState) -> OurRule:
    rule, native = None, False
    with suppress(DecodeError):
        rule, native = decode_rule(without_state(state.expressions), key[0], contents.names)
    return OurRule(state.handle, rule, native, state.expressions, state.userdata)


def _chains(key: TableKey, view: View) -> Iterator[Chain]:
    for name, (head, rules) in view.placed.items():
        yield Chain(name, _readable(rules), BUILT_IN[key[1]][name], _readable(head))
    for name, found in view.own.items():
        yield Chain(name, _readable(found))


def _readable(rules: Rules) -> tuple[Rule, ...]:
    return tuple(each.rule or Rule((), Jump(f"{STRANGE}rule {each.handle}>")) for each in rules)


def _foreign(view: View) -> Iterator[object]:
    for name, rules in view.foreign.items():
        chain = view.state.chains[name]
        if rules or chain.altered or not chain.ours:
            bytes_of = tuple((without_state(each.expressions), each.userdata) for each in rules)
            yield name, not chain.ours, chain.base, chain.policy, bytes_of
