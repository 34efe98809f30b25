"""The steps from what is there to what should be: sets, one batch for every table of both families, sets.

Chains that are right already are left alone, counters and all. What is foreign is not even mentioned: its rules
are never rewritten, so their order, handles and counters stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from netapply.errors import ConflictError, UnsupportedError
from netapply.remembered import remembered
from netapply.ruleset import FAMILIES, Chain, Family, Rule, Ruleset, Table
from netapply.values import NamedTuple
from netapply_iptables_nft.builtin import BUILT_IN, HOOKS, TABLES
from netapply_iptables_nft.dumped import jump_to_ours
from netapply_iptables_nft.encode import encode_rule
from netapply_iptables_nft.operations import Change, TableOperations
from netapply_iptables_nft.snapshot import Contents, Placed, Rules, Snapshot, View
from netapply_iptables_nft.tables import AT_THE_END, IN_FRONT, Hooked, TableKey, TableState
from netapply_wire import nfnetlink
from netapply_wire.ipset import CreateSet, DestroySet


class Batch(NamedTuple):
    """The step that changes all tables at once, if the kernel is still at `generation`."""

    name: str
    changes: tuple[Change, ...]
    generation: int


Steps: TypeAlias = tuple[CreateSet | Batch | DestroySet, ...]


def encode_steps(current: Snapshot, desired: Ruleset | None) -> Steps:
    """The steps to `desired`, None for clean; () where nothing is to do. Pure.

    Raises UnsupportedError, and ConflictError where somebody else's rules or chains are in the way.
    """
    steps = _steps(current.contents, desired)
    return tuple(each._replace(generation=current.generation) if isinstance(each, Batch) else each for each in steps)


@remembered(16)
def _steps(current: Contents, desired: Ruleset | None) -> Steps:
    wanted = desired or Ruleset()
    tables = {_key(table): table for table in wanted.tables}
    changes: list[Change] = []
    touched: set[Family] = set()
    for key in TABLES:
        if (key in tables or key in current.tables) and (found := _Update(current, key, tables.get(key)).changes()):
            changes += found
            touched.add(key[0])
    name = f"batch {', '.join(family for family in FAMILIES if family in touched)}"
    batch = (Batch(name, tuple(changes), 0),) if changes else ()
    creates, destroys = current.standing.steps(wanted.sets)
    return (*creates, *batch, *destroys)


@remembered(16)
def encoded(changes: tuple[Change, ...]) -> nfnetlink.Batch:
    """The bytes of changes in which no set is named."""
    return nfnetlink.encode_batch([each.operation for each in changes])


def _key(table: Table) -> TableKey:
    if table.family == "inet" or table.name not in BUILT_IN:
        known = ", ".join(BUILT_IN)
        raise UnsupportedError(f"table {table.family} {table.name}: iptables has {known} of ip and ip6")
    for chain in table.chains:
        if chain.base is not None and BUILT_IN[table.name].get(chain.name) != chain.base:
            raise UnsupportedError(f"chain {chain.name} of table {table.name}: iptables has no such built-in chain")
    return table.family, table.name


_ABSENT = View(TableState(use=0, ours=True, chains={}), {}, {}, {})


class _Update:
    """From one table as it stands to the same table as it is wanted."""

    def __init__(self, current: Contents, key: TableKey, table: Table | None) -> None:
        chains = table.chains if table else ()
        self._key = key
        self._prefixes = current.owned.prefixes
        self._exists = key in current.tables
        self._view = current.views.get(key, _ABSENT)
        self._own: Mapping[str, Chain] = {each.name: each for each in chains if each.base is None}
        self._placed: Mapping[str, Chain] = {each.name: each for each in chains if each.base and each.head + each.rules}

    def changes(self) -> list[Change]:
        own = self._view.own
        kept = [name for name in own if name in self._own]
        # The kernel lists chains in the order of their creation: where that is to change, all are made anew.
        if [*kept, *(name for name in self._own if name not in own)] != list(self._own):
            kept = []
        right = {name for name in kept if self._same(own[name], self._own[name].rules)}
        moved = [name for name in self._built_in() if not (self._is_right(name) and (kept or not own))]
        gone = [name for name in own if name not in kept]
        refilled = [name for name in self._own if name not in right]
        unused = self._unused()
        dissolved = self._exists and not (self._own or self._placed) and self._dissolves(len(gone) + len(unused))
        if not (gone or refilled or moved or unused or dissolved):
            return []
        self._refuse_conflicts()
        op = TableOperations(self._key)
        changes = [op.flush(name) for name in own if name not in right and own[name]]
        changes += (op.delete_rule(name, rule.handle) for name in moved for rule in self._standing(name))
        changes += (op.delete_chain(name) for name in (*gone, *unused))
        changes += (op.delete_table(),) if dissolved else self._additions(op, moved, kept, refilled)
        return changes

    def _additions(
        self, op: TableOperations, moved: list[str], kept: list[str], refilled: list[str]
    ) -> Iterator[Change]:
        if not self._exists:
            yield op.add_table()
        for name, chain in self._placed.items():
            if chain.base is not None and name not in self._view.state.chains:
                yield op.add_base_chain(name, chain.base)
        yield from (op.add_chain(name) for name in self._own if name not in kept)
        for name in refilled:
            yield from (op.append(name, at, rule) for at, rule in enumerate(self._own[name].rules, 1))
        for name in moved:
            _, rules, _, head = self._placed.get(name, Chain(name))
            # Each goes before all others, so the last comes first.
            yield from (op.insert(name, at, head[at - 1]) for at in range(len(head), 0, -1))
            yield from (op.append(name, at, rule, at_the_end=True) for at, rule in enumerate(rules, len(head) + 1))

    def _built_in(self) -> list[str]:
        return list(dict.fromkeys((*self._view.placed, *self._placed)))

    def _standing(self, name: str) -> Rules:
        placed = self._view.placed.get(name)
        return placed.head + placed.rules if placed else ()

    def _is_right(self, name: str) -> bool:
        placed, wanted = self._view.placed.get(name, Placed((), ())), self._placed.get(name, Chain(name))
        tagged = all(rule.tag == IN_FRONT for rule in placed.head) and all(r.tag == AT_THE_END for r in placed.rules)
        return tagged and self._same(placed.head, wanted.head) and self._same(placed.rules, wanted.rules)

    def _same(self, standing: Rules, wanted: tuple[Rule, ...]) -> bool:
        """Whether the rules are as we write them; what is encoded alike is alike, as cgroups are by their path."""
        family = self._key[0]
        return len(standing) == len(wanted) and all(
            one.rule is not None
            and not one.native
            and (one.rule == other or encode_rule(one.rule, family) == encode_rule(other, family))
            for one, other in zip(standing, wanted, strict=True)
        )

    def _unused(self) -> list[str]:
        """Built-in chains that we made and nobody needs any more."""
        state, foreign = self._view.state, self._view.foreign
        return [
            name
            for name, chain in state.chains.items()
            if chain.ours and chain.base and not (name in self._placed or foreign.get(name) or chain.altered)
        ]

    def _dissolves(self, deleted: int) -> bool:
        """Whether the table is one that we made, and nothing is left in it: neither chains nor sets nor objects."""
        return self._view.state.ours and self._view.state.use == deleted

    def _refuse_conflicts(self) -> None:
        where = " ".join(self._key)
        for name, chain in self._placed.items():
            found = self._view.state.chains.get(name)
            if (
                found
                and chain.base
                and found.base != Hooked(chain.base.type, HOOKS[chain.base.hook], chain.base.priority)
            ):
                raise ConflictError(f"chain {where} {name} is not the built-in chain of iptables: {found.base}")
        for name, rules in self._view.foreign.items():
            if name in self._own:
                raise ConflictError(f"chain {where} {name} is somebody else's")
            if name in BUILT_IN[self._key[1]]:
                continue
            for rule in rules:
                target = jump_to_ours(rule.expressions, self._prefixes)
                if target is not None:
                    raise ConflictError(
                        f"rule handle {rule.handle} of chain {where} {name} jumps to {target}",
                        next_step="delete that rule: chains of netapply are not to be used by others",
                    )
