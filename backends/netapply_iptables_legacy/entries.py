"""Entries: the bytes of a table, cut into chains and rules without knowing what they mean, and put together again.

A rule that is not ours goes from the old table to the new one as it is; only the offset that it jumps to follows its
chain. So nothing of what a match or target of somebody else contains needs to be understood.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from netapply.errors import DecodeError, UnsupportedError
from netapply.values import NamedTuple
from netapply_iptables_legacy.sockopt import HOOKS, Blob, Info

if TYPE_CHECKING:
    from collections.abc import Sequence

    from netapply.ruleset import Family

ACCEPT, DROP, RETURN = -2, -1, -5  # verdicts of x_tables: -NF_ACCEPT - 1, -NF_DROP - 1, XT_RETURN
NAME_SIZE = 28  # longest name of a chain: iptables stores it in 29 bytes
NEXT = ""  # what an entry jumps to that has no target: the next one


#: What `nfcache` of our rules in built-in chains says, of `Chain.head` and of `Chain.rules`: by it they are known as
#: ours, and told apart while no foreign rule stands between them. The kernel keeps the field and never looks at it
#: (linux/netfilter_ipv4/ip_tables.h), and libiptc neither prints nor compares it.
IN_FRONT, AT_THE_END, NO_TAG = b"netA", b"netZ", bytes(4)


class Layout(NamedTuple):
    """struct ipt_entry or ip6t_entry: where its parts are, in bytes. What the kernel writes is `volatile`..`size`."""

    ip_size: int
    offsets: int  # u16 target_offset, u16 next_offset
    volatile: int  # u32 comefrom, then the counters
    size: int


LAYOUT: dict[Family, Layout] = {"ip": Layout(84, 88, 92, 112), "ip6": Layout(136, 140, 144, 168)}

_OFFSETS = struct.Struct("=HH")
_VERDICT = struct.Struct("=i")
_COUNTERS = struct.Struct("=QQ")
_HEADER = struct.Struct("=H29sB")  # xt_entry_match and xt_entry_target: size, name, revision
_STANDARD = struct.Struct("=H29sBi4x")  # xt_standard_target
_ERROR = struct.Struct("=H29sB30s2x")  # xt_error_target
TARGET_HEADER = _HEADER.size
_ERROR_NAME = b"ERROR\0"
_JUMP_TAIL = 8  # verdict and padding of a standard target, which is the last of its entry


class Entry(NamedTuple):
    """One entry, its counters, `comefrom` and jump offset cleared.

    `jump` is the name of the chain that its target jumps to, NEXT for an entry without a target, None for any other.
    `sets` are the places of set indices that are filled in at commit: (offset in `data`, name of the set).
    """

    data: bytes
    jump: str | None = None
    sets: tuple[tuple[int, str], ...] = ()

    def tagged(self, family: Family, tag: bytes = IN_FRONT) -> Entry:
        """The same, known as ours in a built-in chain too."""
        at = LAYOUT[family].ip_size
        return self._replace(data=self.data[:at] + tag + self.data[at + len(tag) :])

    def tag(self, family: Family) -> bytes:
        """Which of our tags it bears, or another."""
        at = LAYOUT[family].ip_size
        return self.data[at : at + len(NO_TAG)]

    @property
    def key(self) -> tuple[bytes, str | None]:
        """Equal for entries that do the same."""
        return self.data, self.jump


class Block(NamedTuple):
    """A chain as the table holds it. The last of `entries` is its policy, or the RETURN of a chain of one's own.

    `hook` is -1 unless built in; `first` is the place of its first entry among all entries of the table.
    """

    name: str
    hook: int
    first: int
    entries: tuple[Entry, ...]


def standard_target(verdict: int) -> bytes:
    return _STANDARD.pack(_STANDARD.size, b"", 0, verdict)


def extension(name: str, revision: int, info: bytes) -> bytes:
    """A struct xt_entry_match or xt_entry_target with its private part, which is padded to 8 bytes already."""
    return _HEADER.pack(_HEADER.size + len(info), name.encode(), revision) + info


def pack_entry(family: Family, ip: bytes, matches: bytes, target: bytes) -> bytes:
    """One entry's bytes: `ip` is struct ipt_ip or ip6t_ip."""
    layout = LAYOUT[family]
    at = layout.size + len(matches)
    offsets = _OFFSETS.pack(at, at + len(target))
    return b"".join((ip, NO_TAG, offsets, bytes(layout.size - layout.volatile), matches, target))


def plain_entry(family: Family, verdict: int) -> Entry:
    """An entry that takes every packet: the policy of a chain."""
    return Entry(pack_entry(family, bytes(LAYOUT[family].ip_size), b"", standard_target(verdict)))


def chain_header(family: Family, name: str) -> bytes:
    """The ERROR entry that begins a chain of one's own, or ends the table."""
    target = _ERROR.pack(_ERROR.size, b"ERROR", 0, name.encode("utf-8", "surrogateescape"))
    return pack_entry(family, bytes(LAYOUT[family].ip_size), b"", target)


def empty_table(family: Family, hooks: Sequence[str]) -> tuple[Block, ...]:
    """What the kernel creates at the first look: built-in chains that accept."""
    policy = plain_entry(family, ACCEPT)
    return tuple(Block(name, HOOKS.index(name), place, (policy,)) for place, name in enumerate(hooks))


# --- bytes to chains -----------------------------------------------------------------------------------------


class _Raw(NamedTuple):
    at: int
    end: int
    target: int
    verdict: int | None  # of a standard target
    opens: str | None  # the chain that this ERROR entry begins


def parse(family: Family, info: Info, data: bytes) -> tuple[Block, ...]:
    """Cut a table into its chains. Raises DecodeError for one that no iptables has written."""
    raw = _walk(LAYOUT[family], data)
    hooks = {info.hook_entry[hook]: hook for hook in range(5) if info.valid_hooks >> hook & 1}
    starts = {at: HOOKS[hook] for at, hook in hooks.items()}
    starts.update({each.end: each.opens for each in raw if each.opens is not None})
    blocks: list[Block] = []
    name, hook, first = "", -1, 0
    entries: list[Entry] = []
    for place, each in enumerate(raw):
        if each.opens is not None or each.at in hooks:
            if entries:
                blocks.append(Block(name, hook, first, tuple(entries)))
                entries = []
            if each.opens is not None:
                name, hook, first = each.opens, -1, place + 1
                continue
            hook = hooks[each.at]
            name, first = HOOKS[hook], place
        entries.append(_entry(LAYOUT[family], data, each, starts))
    if entries or not blocks:
        raise DecodeError("a table of iptables does not end in its ERROR entry")
    return tuple(blocks)


def _walk(layout: Layout, data: bytes) -> list[_Raw]:
    found: list[_Raw] = []
    at, size = 0, len(data)
    while at < size:
        try:
            target, following = _OFFSETS.unpack_from(data, at + layout.offsets)
            verdict = opens = None
            kind = at + target + 2  # where the name of the target is
            if data[kind] == 0:
                (verdict,) = _VERDICT.unpack_from(data, at + target + TARGET_HEADER)
            elif data.startswith(_ERROR_NAME, kind):
                opens = data[at + target + TARGET_HEADER :].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        except (struct.error, IndexError) as error:
            raise DecodeError(f"an entry at {at} of {size} bytes does not fit") from error
        if target < layout.size or following <= target or at + following > size:
            raise DecodeError(f"an entry at {at} of {size} bytes has impossible offsets {target}, {following}")
        found.append(_Raw(at, at + following, at + target, verdict, opens))
        at += following
    return found


def _entry(layout: Layout, data: bytes, raw: _Raw, starts: dict[int, str]) -> Entry:
    at, end, _, verdict, _ = raw
    clear = bytes(layout.size - layout.volatile)
    if verdict is None or verdict < 0:
        return Entry(data[at : at + layout.volatile] + clear + data[at + layout.size : end])
    jump = NEXT if verdict == end else starts.get(verdict)
    if jump is None:
        raise DecodeError(f"an entry at {at} jumps to {verdict}, where no chain begins")
    head, tail = data[at : at + layout.volatile], data[at + layout.size : end - _JUMP_TAIL]
    return Entry(head + clear + tail + bytes(_JUMP_TAIL), jump)


def entry_counters(family: Family, offsets: Sequence[int], data: bytes) -> list[tuple[int, int]]:
    """Packets and bytes of each entry."""
    at = LAYOUT[family].size - _COUNTERS.size
    return [_COUNTERS.unpack_from(data, offset + at) for offset in offsets]


def entry_offsets(family: Family, data: bytes) -> tuple[int, ...]:
    """Where each entry of a table begins. Raises DecodeError."""
    layout = LAYOUT[family]
    found: list[int] = []
    at, size = 0, len(data)
    while at < size:
        if at + layout.size > size:
            raise DecodeError(f"an entry at {at} of {size} bytes does not fit")
        found.append(at)
        _, following = _OFFSETS.unpack_from(data, at + layout.offsets)
        if following < layout.size:
            raise DecodeError(f"an entry at {at} of {size} bytes has an impossible length of {following}")
        at += following
    return tuple(found)


# --- chains to bytes -----------------------------------------------------------------------------------------


def assemble(family: Family, blocks: Sequence[Block]) -> Blob:
    """Put a table together. Raises UnsupportedError for a jump to a chain that it does not have."""
    pieces: list[bytes] = []
    offsets: list[int] = []
    hook_entry, underflow = [0] * 5, [0] * 5
    starts: dict[str, int] = {}
    jumps: list[tuple[int, str, str]] = []
    valid_hooks = at = 0
    for block in blocks:
        if block.hook < 0:
            header = chain_header(family, block.name)
            pieces.append(header)
            offsets.append(at)
            at += len(header)
        starts[block.name] = at
        for entry in block.entries:
            if entry.jump is not None:
                jumps.append((len(pieces), block.name, entry.jump))
            pieces.append(entry.data)
            offsets.append(at)
            at += len(entry.data)
        if block.hook >= 0:
            valid_hooks |= 1 << block.hook
            hook_entry[block.hook] = starts[block.name]
            underflow[block.hook] = offsets[-1]
    offsets.append(at)
    pieces.append(chain_header(family, "ERROR"))
    at += len(pieces[-1])
    for place, chain, jump in jumps:
        target = offsets[place + 1] if jump == NEXT else starts.get(jump)
        if target is None:
            raise UnsupportedError(f"chain {chain} jumps to {jump}, which is not a chain of the table")
        pieces[place] = pieces[place][:-_JUMP_TAIL] + _VERDICT.pack(target) + bytes(4)
    info = Info(valid_hooks, tuple(hook_entry), tuple(underflow), len(offsets), at)
    return Blob(info, b"".join(pieces), tuple(offsets))


def stable(family: Family, data: bytes, offsets: Sequence[int]) -> bytes:
    """A table's bytes without what the kernel writes into it: equal as long as nobody has changed a rule."""
    layout = LAYOUT[family]
    return _cleared(data, offsets, layout.volatile, layout.size)


def without_counters(family: Family, data: bytes, offsets: Sequence[int]) -> bytes:
    """A table's bytes without its counters."""
    size = LAYOUT[family].size
    return _cleared(data, offsets, size - _COUNTERS.size, size)


def _cleared(data: bytes, offsets: Sequence[int], first: int, last: int) -> bytes:
    found, clear = bytearray(data), bytes(last - first)
    for at in offsets:
        found[at + first : at + last] = clear
    return bytes(found)
