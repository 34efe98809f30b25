"""The tables of a namespace as bytes: read each time, and known again where nothing but counters has changed."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from netapply.errors import DecodeError
from netapply.values import NamedTuple
from netapply_iptables_legacy.entries import AT_THE_END, IN_FRONT, entry_offsets, parse, stable, without_counters
from netapply_iptables_legacy.sockopt import get_entries, read_entries

if TYPE_CHECKING:
    from netapply.kernel import Kernel
    from netapply.ruleset import Family
    from netapply_iptables_legacy.entries import Block
    from netapply_iptables_legacy.sockopt import Info


#: The hooks that each table has, 1 << hook: `valid_hooks` of its struct xt_table (iptable_nat.c and so on).
_VALID_HOOKS = {"raw": 0b01001, "mangle": 0b11111, "nat": 0b11011, "filter": 0b01110}


class KernelTable:
    """The content of one table, whatever it has counted: the same object for the same content, while it is known.

    `data` are its entries without what the kernel writes into them, `offsets` where each begins, `blocks` the chains.
    `uses_sets`: a rule in it, whoever's, may match a set.
    """

    def __init__(self, family: Family, name: str, info: Info, data: bytes) -> None:
        """Raises DecodeError for a table that no iptables has written."""
        if info.valid_hooks & ~_VALID_HOOKS.get(name, 0b11111):
            raise DecodeError(f"table {name} has hooks {info.valid_hooks:#07b}, and not those of its kind")
        self.family: Family = family
        self.name = name
        self.info = info
        self.data = data
        self.offsets = entry_offsets(family, data)
        self.blocks = parse(family, info, data)
        self.uses_sets = b"set\0" in data

    def is_like(self, other: KernelTable) -> bool:
        """Whether both are one table with one content."""
        return self is other or self._content() == other._content()

    def mentions(self, prefixes: tuple[str, ...]) -> bool:
        """Whether our tags or names that begin so are anywhere in it: without them nothing of ours is."""
        return any(mark in self.data for mark in (IN_FRONT, AT_THE_END, *map(str.encode, prefixes)))

    def _content(self) -> tuple[object, ...]:
        return self.family, self.name, self.info, self.data


class Seen(NamedTuple):
    """A table as it was read: `raw` are its bytes, counters and all."""

    table: KernelTable
    raw: bytes

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its chains."""
        return self.table.blocks


#: Tables that are kept in mind.
REMEMBERED = 32

#: Pure, so what it knows needs no proof: an agent meets the same few tables in one namespace after another.
known_table = lru_cache(maxsize=REMEMBERED)(KernelTable)


#: Tables by their very bytes, counters and all: most have counted nothing yet. Pure as well.
_seen: dict[tuple[Family, str, bytes], Seen] = {}


def read_table(kernel: Kernel, family: Family, name: str, before: Seen | None = None) -> Seen:
    """Read a table that exists (one that does not is created by looking). Raises KernelError, DecodeError.

    `before` is how it looked the last time: where it still does, nothing has to be taken apart. The kernel notes in
    each entry which hooks lead to it, so where the bytes are the same the hooks are.
    """
    if before is not None and (raw := _same_size(kernel, before.table)):
        if raw == before.raw:
            return before
        if known := _seen.get((family, name, raw)):
            return known
        if before.raw and all_but_counters(before.table, raw) == all_but_counters(before.table, before.raw):
            return Seen(before.table, raw)
    return see(family, name, *read_entries(kernel, family, name))


def see(family: Family, name: str, info: Info, raw: bytes) -> Seen:
    """What these bytes are. Raises DecodeError."""
    known = _seen.get((family, name, raw))
    if known is None or known.table.info != info:
        table = known_table(family, name, info, stable(family, raw, entry_offsets(family, raw)))
        if len(_seen) >= REMEMBERED:
            _seen.clear()
        known = _seen[family, name, raw] = Seen(table, raw)
    return known


def _same_size(kernel: Kernel, table: KernelTable) -> bytes:
    """The table's entries as they are now; b"" where they take more or less room than these, or cannot be read."""
    try:
        return get_entries(kernel, table.family, table.name, table.info.size)
    except OSError:
        return b""  # who reads it from the beginning meets the same error, if it is one


def all_but_counters(table: KernelTable, raw: bytes) -> bytes:
    """Bytes of this table's size, without its counters."""
    return without_counters(table.family, raw, table.offsets)
