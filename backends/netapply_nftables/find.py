"""Whether our table is there, which is asked before each change, also of another dialect's rules."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from netapply.backend import Counters
from netapply.kernel import Kernel
from netapply.values import NamedTuple
from netapply_wire.nfnetlink import NFPROTO_INET, NFT_MSG_GETTABLE, look, message, number, parse_message, string

if TYPE_CHECKING:
    from netapply.ruleset import Ruleset
    from netapply_nftables.snapshot import Contents

# linux/netfilter/nf_tables.h
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS, NFTA_TABLE_OWNER = 1, 2, 7
#: NFT_TABLE_F_OWNER and NFT_TABLE_F_PERSIST; when its owner goes, the kernel leaves such a table the second alone.
OWNED, ORPHANED = 0x2 | 0x4, 0x4
#: The name under which a kernel's memory has the last Snapshot.
MEMORY = "nftables"


class Snapshot(NamedTuple):
    """Our table at one generation; `contents` is None where there is none.

    `exclusive`: it is to have an owner, where it is made. `orphan`: it has had one, which is gone.
    """

    table: str
    generation: int
    contents: Contents | None
    exclusive: bool = False
    orphan: bool = False

    @property
    def ruleset(self) -> Ruleset | None:
        """Ours, decoded. Two snapshots of the same contents give the same object."""
        return self.contents.ruleset if self.contents else None

    @property
    def counters(self) -> Counters:
        """Packets and bytes of each of our rules."""
        return self.contents.counters if self.contents else {}

    @property
    def foreign(self) -> object:
        """Always (): the table is ours alone, and others are never touched."""
        return ()


def look_for_table(kernel: Kernel, table: str) -> tuple[int, bytes | None, Snapshot | None]:
    """The generation, our table for `parse_message`, and what stands where that is clear without reading it.

    It is where there is no such table, and where the last that was read is of this generation: nothing but a counter
    changes without raising that. Raises KernelError.
    """
    at, found = look(kernel, _request(table))
    if found is None:
        return at, None, Snapshot(table, at, None)
    known = kernel.memory.get(MEMORY)
    if isinstance(known, Snapshot) and (known.table, known.generation) == (table, at):
        if known.contents and known.contents.flags:  # its owner may go, and nothing but this tells of it
            known = known._replace(orphan=is_orphan(found))
        return at, found, known
    return at, found, None


def is_orphan(table: bytes) -> bool:
    """Whether a table has outlived its owner, and is anybody's to change or to adopt."""
    return number(parse_message(table).attributes.get(NFTA_TABLE_FLAGS, b"")) == ORPHANED


@cache
def _request(table: str) -> bytes:
    return message(NFT_MSG_GETTABLE, NFPROTO_INET, string(NFTA_TABLE_NAME, table), sequence=2)
