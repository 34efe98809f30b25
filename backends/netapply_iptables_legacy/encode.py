"""From what is there to what should be: one replacement for each table that changes. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netapply.errors import ConflictError, UnsupportedError
from netapply.remembered import remembered
from netapply.ruleset import FAMILIES, Ruleset
from netapply.values import NamedTuple
from netapply_iptables_legacy.entries import (
    AT_THE_END,
    IN_FRONT,
    NAME_SIZE,
    NO_TAG,
    RETURN,
    Block,
    Entry,
    assemble,
    empty_table,
    plain_entry,
)
from netapply_iptables_legacy.rules import encode_rule
from netapply_iptables_legacy.snapshot import LegacySnapshot, Part
from netapply_iptables_legacy.sockopt import ORDER, replacement
from netapply_iptables_legacy.tables import known_table
from netapply_wire.ipset import CreateSet, DestroySet
from netapply_wire.iptables_save import BUILT_IN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from netapply.backend import Snapshot
    from netapply.ruleset import Chain, Family, Rule, Table
    from netapply_iptables_legacy.snapshot import Content
    from netapply_iptables_legacy.sockopt import Place
    from netapply_iptables_legacy.tables import KernelTable

NEW = -1


class ReplaceTable(NamedTuple):
    """One table exchanged.

    `before` is what it was computed from, `created` says that there was no such table. `request` is what is sent for
    `after`. `carry` has for each entry of that the place of the old entry whose counters it takes over, or NEW. `sets`
    are the places in it where the index of a set goes: (offset, name).
    """

    before: KernelTable
    created: bool
    after: KernelTable
    request: bytes
    carry: tuple[int, ...]
    sets: tuple[tuple[int, str], ...]

    @property
    def label(self) -> str:
        """Which it is, for people: "ip nat"."""
        return f"{self.before.family} {self.before.name}"


class ReplaceTables(NamedTuple):
    """The step that exchanges tables, one right after the other; where one is refused, those before go back.

    Who is killed between two leaves the first new and the second old: the journal knows what was and what should be.
    """

    tables: tuple[ReplaceTable, ...]

    @property
    def name(self) -> str:
        labels = ", ".join(each.label for each in self.tables)
        return f"replace table{'s' if len(self.tables) > 1 else ''} {labels}"


LegacyStep = ReplaceTables | CreateSet | DestroySet


class _Numbered(NamedTuple):
    """An entry of the new table and the place of the old one that it is, or NEW."""

    entry: Entry
    origin: int


def encode_steps(snapshot: Snapshot, desired: Ruleset | None) -> tuple[LegacyStep, ...]:
    """Sets first, then the tables as in ORDER, then the sets that nobody uses any more; for a clean, capture first.

    Raises UnsupportedError for what iptables cannot express, ConflictError where a foreign rule jumps to our chains.
    """
    if not isinstance(snapshot, LegacySnapshot):
        raise TypeError(f"a snapshot of iptables-legacy is needed, not {type(snapshot).__name__}")
    return _encode(snapshot.content, desired)


@remembered(16)
def _encode(current: Content, desired: Ruleset | None) -> tuple[LegacyStep, ...]:
    wanted = desired or Ruleset()
    tables = {(table.family, table.name): table for table in wanted.tables}
    for family, name in tables:
        if family == "inet" or name not in ORDER:
            raise UnsupportedError(f"iptables has no table {family} {name}")
    creates, destroys = current.standing.steps(wanted.sets)
    order = ORDER if desired is not None else ORDER[::-1]
    places: list[Place] = [(family, name) for name in order for family in FAMILIES]
    changed = tuple(found for place in places if (found := _replace(current, place, tables.get(place))) is not None)
    return (*creates, *((ReplaceTables(changed),) if changed else ()), *destroys)


def _replace(current: Content, place: Place, wanted: Table | None) -> ReplaceTable | None:
    family, name = place
    table = current.tables.get(place)
    if table is None:
        if wanted is None or not any(chain.rules or chain.head or chain.base is None for chain in wanted.chains):
            return None
        before = _missing(family, name)
        parts = tuple(Part(block) for block in before.blocks)
    else:
        before, parts = table, current.parts[place]
    chains = {chain.name: chain for chain in wanted.chains} if wanted else {}
    new = _Builder(family, current.indices, parts).build(chains)
    if _same(before.blocks, new):
        return None
    _refuse_foreign_jumps(place, parts)
    blocks = [Block(chain.name, chain.hook, 0, tuple(each.entry for each in chain.entries)) for chain in new]
    blob = assemble(family, blocks)
    after = known_table(family, name, blob.info, blob.data)
    request = replacement(name, blob.info, blob.data, before.info.entries)
    return ReplaceTable(before, table is None, after, request, *_counters_and_sets(new, after))


class _NewChain(NamedTuple):
    name: str
    hook: int
    entries: tuple[_Numbered, ...]


class _Builder:
    """Puts the chains of one table together from what stands there and what is wanted."""

    def __init__(self, family: Family, indices: Mapping[str, int], parts: tuple[Part, ...]) -> None:
        self._family: Family = family
        self._indices = indices
        self._parts = parts

    def build(self, wanted: Mapping[str, Chain]) -> tuple[_NewChain, ...]:
        """Built-in chains, then foreign ones as they stood, then ours as wanted."""
        theirs = [part for part in self._parts if not part.ours]
        names = {part.block.name for part in theirs}
        ours = {part.block.name: part for part in self._parts if part.ours}
        found = [self._shared(part, wanted.get(part.block.name)) for part in theirs]
        for name, chain in wanted.items():
            if name not in names:
                if chain.base is not None:
                    raise UnsupportedError(f"the table has no built-in chain {name}")
                found.append(self._own(chain, ours.get(name)))
        return tuple(found)

    def _shared(self, part: Part, wanted: Chain | None) -> _NewChain:
        name, hook = part.block.name, part.block.hook
        foreign = [_Numbered(entry, origin) for origin, entry in part.foreign]
        policy = _Numbered(part.policy[1], part.policy[0])
        if wanted is None:
            return _NewChain(name, hook, (*foreign, policy))
        if hook < 0:
            raise ConflictError(f"a chain {name} stands there that is not ours")
        pool = _Pool(part.head + part.rules)
        head = tuple(self._rules(wanted.head, pool, IN_FRONT))
        rules = tuple(self._rules(wanted.rules, pool, AT_THE_END))
        if [each.entry.key for each in rules] == [entry.key for _, entry in part.rules]:
            # Right as they are, so each stays where it stands among foreign ones.
            return _NewChain(name, hook, (*head, *sorted((*foreign, *rules), key=_origin), policy))
        at = self._place(part)
        return _NewChain(name, hook, (*head, *foreign[:at], *rules, *foreign[at:], policy))

    def _place(self, part: Part) -> int:
        """How many foreign rules stand before those of ours that were put at the end of a chain; all where none were.

        One that has lost its tag counts, too.
        """
        standing = (place for place, entry in part.rules + part.head if entry.tag(self._family) != IN_FRONT)
        first = next(standing, None)
        return sum(first is None or place < first for place, _ in part.foreign)

    def _own(self, wanted: Chain, standing: Part | None) -> _NewChain:
        if len(wanted.name.encode("utf-8", "surrogateescape")) > NAME_SIZE:
            raise UnsupportedError(f"chain {wanted.name}: a name has at most {NAME_SIZE} bytes")
        pool = _Pool(standing.rules if standing else ())
        end = _Numbered(plain_entry(self._family, RETURN), standing.policy[0] if standing else NEW)
        return _NewChain(wanted.name, -1, (*self._rules(wanted.head + wanted.rules, pool), end))

    def _rules(self, rules: Sequence[Rule], pool: _Pool, tag: bytes = NO_TAG) -> Iterator[_Numbered]:
        for rule in rules:
            entry = encode_rule(rule, self._family, self._indices)
            entry = entry.tagged(self._family, tag) if tag != NO_TAG else entry
            yield _Numbered(entry, pool.take(entry))


def _origin(each: _Numbered) -> int:
    return each.origin


class _Pool:
    """The places of the entries that stand in a chain of ours, each to be given to one new entry that is the same."""

    def __init__(self, entries: Sequence[tuple[int, Entry]]) -> None:
        self._places: dict[tuple[bytes, str | None], list[int]] = {}
        for place, entry in reversed(entries):
            self._places.setdefault(entry.key, []).append(place)

    def take(self, entry: Entry) -> int:
        places = self._places.get(entry.key)
        return places.pop() if places else NEW


def _missing(family: Family, name: str) -> KernelTable:
    """A table that is not there, as the kernel will create it."""
    blob = assemble(family, empty_table(family, BUILT_IN[name]))
    return known_table(family, name, blob.info, blob.data)


def _same(before: Sequence[Block], after: Sequence[_NewChain]) -> bool:
    """Whether each chain would hold what it holds. The order of chains means nothing, and iptables changes it."""
    if len(before) != len(after):
        return False
    standing = {block.name: block.entries for block in before}
    for chain in after:
        entries = standing.get(chain.name)
        if entries is None or len(entries) != len(chain.entries):
            return False
        if any(old.key != new.entry.key for old, new in zip(entries, chain.entries, strict=True)):
            return False
    return True


def _refuse_foreign_jumps(place: tuple[Family, str], parts: Sequence[Part]) -> None:
    ours = {part.block.name for part in parts if part.ours}
    for part in parts:
        for _, entry in part.foreign:
            if entry.jump in ours:
                raise ConflictError(
                    f"table {place[0]} {place[1]}: chain {part.block.name}, which is not ours, jumps to {entry.jump}",
                    next_step="remove that rule, or rename the chain that it jumps to",
                )


def _counters_and_sets(
    chains: Sequence[_NewChain], after: KernelTable
) -> tuple[tuple[int, ...], tuple[tuple[int, str], ...]]:
    carry: list[int] = []
    sets: list[tuple[int, str]] = []
    for chain in chains:
        if chain.hook < 0:
            carry.append(NEW)  # the header
        for entry, origin in chain.entries:
            sets += [(after.offsets[len(carry)] + offset, name) for offset, name in entry.sets]
            carry.append(origin)
    return (*carry, NEW), tuple(sets)
