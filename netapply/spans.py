"""Spans of whole numbers: what ports, ids and address blocks have in common. Pure.

Lists of a plan are normalised with `merge` (ports, ids) and `collapse` (address blocks): sorted, nothing said twice.
`Spans` answers whether something lies in such a list, in logarithmic time.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, TypeVar

from netapply.plan import IdRange
from netapply.ruleset import Cidr, PortRange
from netapply.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Range = TypeVar("Range", PortRange, IdRange)

#: IPv6 addresses are counted from here, so that no IPv4 address is the neighbour of one.
_IP6_FROM = 1 << 40


class Span(NamedTuple):
    """Whole numbers first..last, both included."""

    first: int
    last: int


def span_of(cidr: Cidr) -> Span:
    """The addresses of a block as numbers; the two families do not meet."""
    bits = len(cidr.packed) * 8
    first = int.from_bytes(cidr.packed, "big") + (_IP6_FROM if bits == 128 else 0)
    return Span(first, first + (1 << (bits - cidr.prefix)) - 1)


class Spans:
    """A set of whole numbers, built from spans in any order."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in sorted(spans):
            if self._lasts and first <= self._lasts[-1] + 1:
                self._lasts[-1] = max(self._lasts[-1], last)
            else:
                self._firsts.append(first)
                self._lasts.append(last)

    @classmethod
    def of_blocks(cls, blocks: Iterable[Cidr]) -> Spans:
        """The addresses of all blocks."""
        return cls(map(span_of, blocks))

    def cover(self, first: int, last: int) -> bool:
        """Every number of first..last is in the set."""
        index = bisect_right(self._firsts, first) - 1
        return index >= 0 and last <= self._lasts[index]

    def touch(self, first: int, last: int) -> bool:
        """Some number of first..last is in the set."""
        index = bisect_right(self._firsts, last) - 1
        return index >= 0 and self._lasts[index] >= first


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Sorted and disjoint: ranges that overlap become one, neighbours stay as they are."""
    merged: list[Range] = []
    for each in sorted(ranges):
        if merged and each.first <= merged[-1].last:
            merged[-1] = merged[-1]._replace(last=max(each.last, merged[-1].last))
        else:
            merged.append(each)
    return tuple(merged)


def join(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """As `merge`, and neighbours become one, too."""
    joined: list[Range] = []
    for each in merge(ranges):
        if joined and each.first == joined[-1].last + 1:
            joined[-1] = joined[-1]._replace(last=each.last)
        else:
            joined.append(each)
    return tuple(joined)


def collapse(blocks: Iterable[Cidr]) -> tuple[Cidr, ...]:
    """Sorted, IPv4 first, without the blocks that lie in another one; siblings are not joined."""
    by_length: tuple[list[Cidr], list[Cidr]] = ([], [])
    for cidr in blocks:
        by_length[len(cidr[0]) == 16].append(cidr)
    return (*_collapse(by_length[0], 32), *_collapse(by_length[1], 128))


def _collapse(blocks: list[Cidr], bits: int) -> Iterator[Cidr]:
    # Sorted by address and prefix, a block comes right before those that lie in it.
    blocks.sort()
    ones, end = (1 << bits) - 1, -1
    for cidr in blocks:
        first = int.from_bytes(cidr[0], "big")
        if first > end:
            yield cidr
            end = first + (ones >> cidr[1])
