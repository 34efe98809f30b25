"""What is in the tables of a namespace: read, told apart into ours and foreign, ours decoded when somebody asks."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from netapply.backend import STRANGE
from netapply.errors import DecodeError
from netapply.ruleset import FAMILIES, Base, Chain, Jump, Rule, Ruleset, Table
from netapply_iptables_legacy.entries import ACCEPT, Block, Entry, entry_counters, entry_offsets, parse, plain_entry
from netapply_iptables_legacy.rules import decode_rule, encode_rule, set_indices
from netapply_iptables_legacy.sockopt import HOOKS, Info, read_entries, table_names
from netapply_wire.claims import claim
from netapply_wire.ipset import Listed, Standing, list_sets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from netapply.backend import Counters, Owned
    from netapply.kernel import Kernel
    from netapply.ruleset import ChainType, Family, Hook

#: Tables in the order in which they are put up: what captures comes last.
ORDER = ("raw", "mangle", "filter", "nat")
_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0}  # enum nf_ip_hook_priorities
_NAT_PRIORITIES = {"PREROUTING": -100, "INPUT": 100, "OUTPUT": -100, "POSTROUTING": 100}
_HOOKS: dict[str, Hook] = {
    "PREROUTING": "prerouting",
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
    "POSTROUTING": "postrouting",
}


class KernelTable(NamedTuple):
    """One table as it was read: its bytes, and the same cut into chains."""

    family: Family
    name: str
    info: Info
    data: bytes
    blocks: tuple[Block, ...]


class Part(NamedTuple):
    """A chain, told apart. Each entry comes with its place in the table.

    `head` are ours before the first foreign one, `rules` ours after it; where there is no foreign one all are `head`.
    """

    block: Block
    ours: bool = False
    head: tuple[tuple[int, Entry], ...] = ()
    foreign: tuple[tuple[int, Entry], ...] = ()
    rules: tuple[tuple[int, Entry], ...] = ()

    @property
    def policy(self) -> tuple[int, Entry]:
        """The last entry: the policy of a built-in chain, or the RETURN at the end of another."""
        return self.block.first + len(self.block.entries) - 1, self.block.entries[-1]


def read_table(kernel: Kernel, family: Family, name: str) -> KernelTable:
    """Read a table that exists (one that does not is created by looking). Raises KernelError, DecodeError."""
    info, data = read_entries(kernel, family, name)
    return KernelTable(family, name, info, data, parse(family, info, data))


class LegacySnapshot:
    """The tables of a namespace at one moment, and our sets. See `netapply.backend.Snapshot`."""

    def __init__(self, owned: Owned, tables: tuple[KernelTable, ...], sets: tuple[Listed, ...]) -> None:
        self.owned = owned
        self.tables: Mapping[tuple[Family, str], KernelTable] = {(table.family, table.name): table for table in tables}
        self.sets = sets
        self.indices: Mapping[str, int] = {each.name: each.at for each in sets}

    @classmethod
    def read(cls, kernel: Kernel, owned: Owned) -> LegacySnapshot:
        """Read every table that there is. Creates none."""
        tables = tuple(
            read_table(kernel, family, name)
            for family in FAMILIES
            for name in table_names(kernel, family)
            if name in ORDER
        )
        return cls(owned, tables, list_sets(kernel, owned.sets))

    @cached_property
    def parts(self) -> Mapping[tuple[Family, str], tuple[Part, ...]]:
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
            tagged = [
                entry.is_tagged(family) or bool(entry.jump and entry.jump.startswith(prefixes)) for _, entry in numbered
            ]
            mine = claim(numbered, tagged, lambda each: each[1].tagged(family).key, self._lost(table, block.name))
            first = mine.index(False) if False in mine else len(mine)
            foreign = tuple(each for each, is_mine in zip(numbered, mine, strict=True) if not is_mine)
            rules = tuple(each for each, is_mine in zip(numbered[first:], mine[first:], strict=True) if is_mine)
            found.append(Part(block, head=numbered[:first], foreign=foreign, rules=rules))
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

    @property
    def ruleset(self) -> Ruleset | None:
        """Ours, decoded; a rule that is not one of ours is a jump to "<rule N>", the Nth entry of the table.

        Tables come as in ORDER, ip before ip6, built-in chains in the order of their hooks, then ours as they stand.
        In a built-in chain without foreign rules, where first and last are the same, ours are its `head`.
        """
        return self._ruleset

    @cached_property
    def _ruleset(self) -> Ruleset | None:
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

        def decode(entries: tuple[tuple[int, Entry], ...]) -> tuple[Rule, ...]:
            return tuple(_decoded(entry, family, names, at) for at, entry in entries)

        return tuple(
            Chain(part.block.name, decode(part.rules), base_of(name, part.block), decode(part.head))
            for part in self.parts[family, name]
            if part.ours or part.head or part.rules
        )

    @property
    def counters(self) -> Counters:
        """Packets and bytes of each of our rules."""
        return self._counters

    @cached_property
    def _counters(self) -> Counters:
        found: dict[tuple[str, str, str, int], tuple[int, int]] = {}
        for (family, name), table in self.tables.items():
            counted = entry_counters(family, entry_offsets(family, table.data), table.data)
            for part in self.parts[family, name]:
                for index, (place, _) in enumerate(part.head + part.rules):
                    found[family, name, part.block.name, index] = counted[place]
        return found

    @property
    def foreign(self) -> object:
        """Every table with foreign rules or chains or a policy that is not ACCEPT: its chains' entries in order."""
        return self._foreign

    @cached_property
    def _foreign(self) -> object:
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
