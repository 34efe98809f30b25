"""What is in the tables of a namespace: read, told apart into ours and foreign, ours decoded when somebody asks."""

from __future__ import annotations

from collections import Counter
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from netapply.backend import STRANGE
from netapply.errors import DecodeError
from netapply.ruleset import FAMILIES, Base, Chain, Jump, Rule, Ruleset, Table
from netapply.values import NamedTuple
from netapply_iptables_legacy.entries import ACCEPT, AT_THE_END, IN_FRONT, Block, Entry, entry_counters, plain_entry
from netapply_iptables_legacy.rules import decode_rule, encode_rule, set_indices
from netapply_iptables_legacy.sockopt import HOOKS, ORDER, table_names
from netapply_iptables_legacy.tables import Seen, read_table
from netapply_wire.claims import claim
from netapply_wire.ipset import Listed, Standing, list_sets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from netapply.backend import Counters, Owned
    from netapply.kernel import Kernel
    from netapply.ruleset import ChainType, Family, Hook
    from netapply_iptables_legacy.sockopt import Place
    from netapply_iptables_legacy.tables import KernelTable

#: Under this name a namespace remembers its last snapshot.
MEMORY = "iptables-legacy"

_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0}  # enum nf_ip_hook_priorities
_NAT_PRIORITIES = {"PREROUTING": -100, "INPUT": 100, "OUTPUT": -100, "POSTROUTING": 100}
_HOOKS: dict[str, Hook] = {
    "PREROUTING": "prerouting",
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
    "POSTROUTING": "postrouting",
}


#: Entries, each with its place in the table.
Numbered = tuple[tuple[int, "Entry"], ...]


class Part(NamedTuple):
    """A chain, told apart.

    `head` are ours before the first foreign one and before any that was put at the end, `rules` ours after these.
    """

    block: Block
    ours: bool = False
    head: Numbered = ()
    foreign: Numbered = ()
    rules: Numbered = ()

    @property
    def policy(self) -> tuple[int, Entry]:
        """The last entry: the policy of a built-in chain, or the RETURN at the end of another."""
        return self.block.first + len(self.block.entries) - 1, self.block.entries[-1]


class Content:
    """What the tables and our sets hold, whatever the rules have counted: the same object for the same content."""

    def __init__(self, owned: Owned, tables: tuple[KernelTable, ...], sets: tuple[Listed, ...]) -> None:
        self.owned = owned
        self.tables: Mapping[Place, KernelTable] = {(table.family, table.name): table for table in tables}
        self.sets = sets
        self.indices: Mapping[str, int] = {each.name: each.at for each in sets}

    def is_of(self, owned: Owned, tables: tuple[KernelTable, ...], sets: tuple[Listed, ...]) -> bool:
        """Whether it is the content of these."""
        return self.sets == sets and tuple(self.tables.values()) == tables and self.owned == owned

    @cached_property
    def parts(self) -> Mapping[Place, tuple[Part, ...]]:
        """Each table's chains, told apart."""
        return {key: self._tell_apart(table) for key, table in self.tables.items()}

    def _tell_apart(self, table: KernelTable) -> tuple[Part, ...]:
        prefixes, family = self.owned.prefixes, table.family
        found: list[Part] = []
        for block in table.blocks:
            numbered = tuple(enumerate(block.entries[:-1], block.first))
            if block.hook < 0:
                ours = block.name.startswith(prefixes)
                found.append(Part(block, ours, rules=numbered) if ours else Part(block, foreign=numbered))
                continue
            tags = [entry.tag(family) for _, entry in numbered]
            tagged = [
                tag in (IN_FRONT, AT_THE_END) or bool(entry.jump and entry.jump.startswith(prefixes))
                for tag, (_, entry) in zip(tags, numbered, strict=True)
            ]
            mine = claim(numbered, tagged, lambda each: each[1].tagged(family).key, self._lost(table, block.name))
            found.append(_shared(block, numbered, mine, tags))
        return tuple(found)

    def _lost(self, table: KernelTable, chain: str) -> list[tuple[bytes, str | None]]:
        """Rules of ours that may stand there untagged: where chains of ours do, in that table or in nat."""
        family, prefixes = table.family, self.owned.prefixes
        near = [table, *((nat,) if (nat := self.tables.get((family, "nat"))) else ())]
        if not self.owned.direct or not any(b.name.startswith(prefixes) for each in near for b in each.blocks):
            return []
        place = [family, table.name, chain]
        rules = [rule for *where, rule in self.owned.direct if where == place]
        return [encode_rule(rule, family, self.indices).tagged(family).key for rule in rules]

    @cached_property
    def standing(self) -> Standing:
        """Our sets, and how often our rules use each."""
        if not self.sets:
            return Standing((), {})
        return Standing(
            self.sets,
            Counter(
                index
                for (family, _), parts in self.parts.items()
                for part in parts
                for _, entry in part.head + part.rules
                for index in set_indices(entry, family)
            ),
        )

    @cached_property
    def ruleset(self) -> Ruleset | None:
        """Ours, decoded; a rule that is not one of ours is a jump to "<rule N>", the Nth entry of the table.

        Tables come as in ORDER, ip before ip6, built-in chains in the order of their hooks, then ours as they stand.
        """
        tables = tuple(
            Table(family, name, chains)
            for name in ORDER
            for family in FAMILIES
            if (family, name) in self.tables and (chains := self._chains(family, name))
        )
        sets = self.standing.ours
        return Ruleset(tables, tuple(each.decode() for each in sets)) if tables or sets else None

    def _chains(self, family: Family, name: str) -> tuple[Chain, ...]:
        names = {index: each for each, index in self.indices.items()}

        def decode(entries: Numbered) -> tuple[Rule, ...]:
            return tuple(_decoded(entry, family, names, at) for at, entry in entries)

        return tuple(
            Chain(part.block.name, decode(part.rules), base_of(name, part.block), decode(part.head))
            for part in self.parts[family, name]
            if part.ours or part.head or part.rules
        )

    @cached_property
    def foreign(self) -> object:
        """Every table with foreign rules or chains or a policy that is not ACCEPT: its chains' entries in order."""
        found: list[object] = []
        for key, parts in self.parts.items():
            plain = plain_entry(key[0], ACCEPT)
            theirs = [
                (part.block.name, part.policy[1], tuple(entry for _, entry in part.foreign))
                for part in parts
                if not part.ours
            ]
            if any(entries or part_policy != plain or name not in HOOKS for name, part_policy, entries in theirs):
                found.append((key, tuple(theirs)))
        return tuple(found)


def read_tables(kernel: Kernel, before: Mapping[Place, Seen]) -> dict[Place, Seen]:
    """Every table that there is, ip before ip6. Creates none. Raises KernelError, DecodeError."""
    return {
        (family, name): read_table(kernel, family, name, before.get((family, name)))
        for family in FAMILIES
        for name in table_names(kernel, family)
        if name in ORDER
    }


#: Pure, and so without a proof. What is in it is compared by identity, but for what is ours.
_content = lru_cache(maxsize=8)(Content)


class LegacySnapshot:
    """The tables of a namespace at one moment, and our sets. See `netapply.backend.Snapshot`."""

    def __init__(self, content: Content, seen: Mapping[Place, Seen]) -> None:
        self.content = content
        self.seen = seen

    @classmethod
    def read(cls, kernel: Kernel, owned: Owned, seen: Mapping[Place, Seen] | None = None) -> LegacySnapshot:
        """Read every table that there is, unless that was done just now. Creates none. Raises KernelError, DecodeError.

        Where all is as it was the last time it is the last time's snapshot, and what was made of it is known still.
        Sets are not looked for again where there were none, we made none since, and no rule uses one.
        """
        last = cls.last(kernel)
        seen = read_tables(kernel, last.seen if last else {}) if seen is None else seen
        tables = tuple(each.table for each in seen.values())
        unused = last and not last.content.sets and not any(table.uses_sets for table in tables)
        sets = () if unused else list_sets(kernel, owned.sets)
        if last and last.content.is_of(owned, tables, sets):
            if last.seen == seen:
                return last
            content = last.content
        else:
            content = _content(owned, tables, sets)
        kernel.memory[MEMORY] = snapshot = cls(content, seen)
        return snapshot

    @classmethod
    def last(cls, kernel: Kernel) -> LegacySnapshot | None:
        """What was read in this namespace before, as far as it is remembered."""
        found = kernel.memory.get(MEMORY)
        return found if isinstance(found, cls) else None

    @classmethod
    def forget(cls, kernel: Kernel) -> None:
        """Look for everything anew the next time, sets too."""
        kernel.memory.pop(MEMORY, None)

    def expect(self, kernel: Kernel, tables: tuple[KernelTable, ...]) -> None:
        """Remember that after this one these are to be found: how large they are, and nothing that is believed."""
        found: dict[Place, Seen] = {(table.family, table.name): Seen(table, b"") for table in tables}
        kernel.memory[MEMORY] = LegacySnapshot(self.content, {**self.seen, **found})

    @property
    def ruleset(self) -> Ruleset | None:
        """Ours, decoded; see `Content.ruleset`."""
        return self.content.ruleset

    @property
    def foreign(self) -> object:
        """What is not ours; see `Content.foreign`."""
        return self.content.foreign

    @property
    def counters(self) -> Counters:
        """Packets and bytes of each of our rules."""
        found: dict[tuple[str, str, str, int], tuple[int, int]] = {}
        for (family, name), (table, raw) in self.seen.items():
            counted = entry_counters(family, table.offsets, raw)
            for part in self.content.parts[family, name]:
                for index, (place, _) in enumerate(part.head + part.rules):
                    found[family, name, part.block.name, index] = counted[place]
        return found


def _shared(block: Block, numbered: Numbered, mine: Sequence[bool], tags: Sequence[bytes]) -> Part:
    """A built-in chain, told apart by which of its entries are ours and the tags of all."""
    head: list[tuple[int, Entry]] = []
    rules: list[tuple[int, Entry]] = []
    foreign: list[tuple[int, Entry]] = []
    for each, is_mine, tag in zip(numbered, mine, tags, strict=True):
        if not is_mine:
            foreign.append(each)
        elif foreign or rules or tag == AT_THE_END:
            rules.append(each)
        else:
            head.append(each)
    return Part(block, False, tuple(head), tuple(foreign), tuple(rules))


def base_of(table: str, block: Block) -> Base | None:
    """What a built-in chain is to the kernel; None for another."""
    if block.hook < 0:
        return None
    if table == "nat":
        return Base("nat", _HOOKS[block.name], _NAT_PRIORITIES[block.name])
    kind: ChainType = "route" if (table, block.name) == ("mangle", "OUTPUT") else "filter"
    return Base(kind, _HOOKS[block.name], _PRIORITIES[table])


def _decoded(entry: Entry, family: Family, sets: Mapping[int, str], at: int) -> Rule:
    try:
        return decode_rule(entry, family, sets)
    except DecodeError:
        return Rule((), Jump(f"{STRANGE}rule {at}>"))
