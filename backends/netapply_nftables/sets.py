"""Sets: address blocks as interval sets with names, and port lists as anonymous sets of one rule."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from netapply.errors import DecodeError
from netapply.ruleset import Cidr, Family, NamedSet, PortRange
from netapply_wire.nfnetlink import (
    NFPROTO_INET,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
    NLM_F_CREATE,
    Message,
    Operation,
    attr,
    iter_attributes,
    nested,
    number,
    parse_attributes,
    string,
    text,
    u32,
)

# linux/netfilter/nf_tables.h: NFTA_SET_*, NFTA_SET_ELEM_LIST_*, NFTA_SET_ELEM_*
NFTA_SET_TABLE, NFTA_SET_NAME, NFTA_SET_FLAGS, NFTA_SET_KEY_TYPE, NFTA_SET_KEY_LEN = 1, 2, 3, 4, 5
NFTA_SET_DESC, NFTA_SET_ID, NFTA_SET_DESC_SIZE = 9, 10, 1
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_LIST_SET_ID = 1, 2, 3, 4
NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_FLAGS, NFTA_DATA_VALUE = 1, 1, 3, 1
NFTA_SET_ELEM_PAD, NFTA_SET_ELEM_USERDATA = 6, 8
NFT_SET_ANONYMOUS, NFT_SET_CONSTANT, NFT_SET_INTERVAL = 1, 2, 4
NFT_SET_ELEM_INTERVAL_END = 1

#: enum datatypes of nft's datatype.h: how nft prints the keys.
KEY_TYPES: dict[Family, int] = {"ip": 7, "ip6": 8}
KEY_LENGTHS: dict[Family, int] = {"ip": 4, "ip6": 16}
TYPE_INET_SERVICE = 13
_FAMILIES: dict[int, Family] = {kind: family for family, kind in KEY_TYPES.items()}

#: Bytes of elements in one message: the length of an attribute is 16 bits.
CHUNK = 60_000

#: From so many single ports on a port set is one of intervals. The kernel keeps others of 2-byte keys as a bitmap, and
#: to add to that looks through all that is there: 32,768 ports took 4 s, and take 0.08 s as intervals (Linux 6.18).
MANY_PORTS = 512

#: [first, after) of a set's intervals; after is one past the end, and may be 1 << bits.
Interval = tuple[int, int]


def add_named_set(table: str, named: NamedSet) -> list[Operation]:
    """Create a set of address blocks and fill it. Constant: once a rule uses it the kernel lets nobody change it."""
    bits = KEY_LENGTHS[named.family] * 8
    intervals = [_interval(cidr, bits) for cidr in named.elements]
    flags = NFT_SET_CONSTANT | NFT_SET_INTERVAL
    return _add_set(table, named.name, 0, KEY_TYPES[named.family], bits, flags, intervals)


def add_port_set(table: str, set_id: int, ranges: tuple[PortRange, ...]) -> list[Operation]:
    """Create the anonymous set of the rule that follows in the batch and looks it up by `set_id`."""
    plain = len(ranges) < MANY_PORTS and all(first == last for first, last in ranges)
    interval = 0 if plain else NFT_SET_INTERVAL
    flags = NFT_SET_ANONYMOUS | NFT_SET_CONSTANT | interval
    intervals = [(first, last + 1) for first, last in ranges]
    return _add_set(table, "__set%d", set_id, TYPE_INET_SERVICE, 16, flags, intervals)


def _interval(cidr: Cidr, bits: int) -> Interval:
    first = int.from_bytes(cidr.packed)
    return first, first + (1 << (bits - cidr.prefix))


def _add_set(
    table: str, name: str, set_id: int, key_type: int, bits: int, flags: int, intervals: Sequence[Interval]
) -> list[Operation]:
    elements = list(_encode_elements(intervals, bits, ends=bool(flags & NFT_SET_INTERVAL)))
    length = bits // 8
    label = f"set inet {table} {'of ports' if flags & NFT_SET_ANONYMOUS else name}"
    where = string(NFTA_SET_TABLE, table) + string(NFTA_SET_NAME, name)
    key = u32(NFTA_SET_FLAGS, flags) + u32(NFTA_SET_KEY_TYPE, key_type) + u32(NFTA_SET_KEY_LEN, length)
    size = nested(NFTA_SET_DESC, u32(NFTA_SET_DESC_SIZE, len(elements)))
    body = where + key + u32(NFTA_SET_ID, set_id) + size
    operations = [Operation(NFT_MSG_NEWSET, NFPROTO_INET, body, NLM_F_CREATE, f"add {label}")]
    by_id = u32(NFTA_SET_ELEM_LIST_SET_ID, set_id)
    step = CHUNK // (length + 24)
    for start in range(0, len(elements), step):
        chunk = nested(NFTA_SET_ELEM_LIST_ELEMENTS, *elements[start : start + step])
        added = f"add elements to {label}"
        operations.append(Operation(NFT_MSG_NEWSETELEM, NFPROTO_INET, where + by_id + chunk, NLM_F_CREATE, added))
    return operations


def _encode_elements(intervals: Iterable[Interval], bits: int, *, ends: bool) -> Iterable[bytes]:
    """One element for the first key of each interval and, in interval sets, one for the key after its last."""
    length, full = bits // 8, 1 << bits
    template = nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attr(NFTA_DATA_VALUE, bytes(length))))
    head, pad = template[:12], template[12 + length :]
    ending = nested(
        NFTA_LIST_ELEM,
        nested(NFTA_SET_ELEM_KEY, attr(NFTA_DATA_VALUE, bytes(length))),
        u32(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END),
    )
    end_head, end_flags = ending[:12], ending[12 + length :]
    for first, after in intervals:
        yield head + first.to_bytes(length) + pad
        if ends and after < full:
            yield end_head + after.to_bytes(length) + end_flags


# --- the way back --------------------------------------------------------------------------------------------


def decode_named_set(message: Message, elements: Sequence[Message]) -> NamedSet:
    """A dumped set and its dumped elements. Raises DecodeError for any other kind than add_named_set makes."""
    attributes = message.attributes
    name = text(attributes[NFTA_SET_NAME])
    key_type = number(attributes.get(NFTA_SET_KEY_TYPE, b""))
    family = _FAMILIES.get(key_type)
    if family is None or set_flags(message) != NFT_SET_CONSTANT | NFT_SET_INTERVAL:
        raise DecodeError(f"set {name} is not a constant set of address blocks")
    return NamedSet(name, family, _decode_blocks(_lists(elements), KEY_LENGTHS[family] * 8))


def decode_port_set(message: Message, elements: Sequence[Message]) -> tuple[PortRange, ...]:
    """A dumped anonymous set of ports and its elements. Raises DecodeError for any other kind."""
    flags = set_flags(message)
    key_type = number(message.attributes.get(NFTA_SET_KEY_TYPE, b""))
    if key_type != TYPE_INET_SERVICE or flags & ~NFT_SET_INTERVAL != NFT_SET_ANONYMOUS | NFT_SET_CONSTANT:
        raise DecodeError("an anonymous set is not one of ports")
    return _decode_ports(_lists(elements), ends=bool(flags & NFT_SET_INTERVAL))


def set_flags(message: Message) -> int:
    """NFT_SET_* of a dumped set."""
    return number(message.attributes.get(NFTA_SET_FLAGS, b""))


def _lists(elements: Sequence[Message]) -> tuple[bytes, ...]:
    return tuple(message.attributes.get(NFTA_SET_ELEM_LIST_ELEMENTS, b"") for message in elements)


# The same sets stand in many namespaces, and are read again and again: decoded once. Few, as each may be large.


@lru_cache(32)
def _decode_blocks(lists: tuple[bytes, ...], bits: int) -> tuple[Cidr, ...]:
    return tuple(cidr for pair in _intervals(lists, bits, ends=True) for cidr in _blocks(*pair, bits))


@lru_cache(32)
def _decode_ports(lists: tuple[bytes, ...], *, ends: bool) -> tuple[PortRange, ...]:
    return tuple(PortRange(first, after - 1) for first, after in _intervals(lists, 16, ends=ends))


def _intervals(lists: Iterable[bytes], bits: int, *, ends: bool) -> list[Interval]:
    """The intervals in ascending order, whatever order and chunks the kernel dumps its elements in."""
    starts: list[int] = []
    stops: list[int] = []
    for data in lists:
        _read_elements(data, bits // 8, starts, stops)
    starts.sort()
    if not ends:
        return [(key, key + 1) for key in starts]
    # An end at 0 closes nothing: nft writes one at the front of every interval set.
    stops = sorted(stop for stop in stops if stop)
    stops.append(1 << bits)
    found: list[Interval] = []
    at = 0
    for start, following in zip(starts, (*starts[1:], 1 << bits), strict=False):  # none where none starts
        while stops[at] <= start:
            at += 1
        found.append((start, min(stops[at], following)))
    return found


def _read_elements(data: bytes, length: int, starts: list[int], stops: list[int]) -> None:
    """Add the keys of a dumped list of elements: those that begin an interval, and those that end one.

    The two usual shapes are told by their first bytes, which is ten times as fast as to parse them.
    """
    start, stop = _shape(length), _shape(length, u32(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END))
    head, end_head, tail = start[:12], stop[:12], stop[12 + length :]
    offset = 0
    while offset < len(data):
        key = offset + 12
        if data.startswith(head, offset):
            starts.append(int.from_bytes(data[key : key + length]))
            offset += len(start)
        elif data.startswith(end_head, offset) and data.startswith(tail, key + length):
            stops.append(int.from_bytes(data[key : key + length]))
            offset += len(stop)
        else:
            size = (int.from_bytes(data[offset : offset + 2], sys.byteorder) + 3) & ~3
            for _, element in iter_attributes(data[offset : offset + max(size, 4)]):
                value, end = _decode_element(element, length)
                (stops if end else starts).append(value)
            offset += max(size, 4)


def _shape(length: int, *more: bytes) -> bytes:
    """An element as the kernel dumps it, its key zero."""
    key = attr(NFTA_SET_ELEM_KEY, attr(NFTA_DATA_VALUE, bytes(length)))
    return attr(NFTA_LIST_ELEM, b"".join((key, *more)))


def _decode_element(element: bytes, length: int) -> tuple[int, bool]:
    """(key, whether it ends an interval). Raises DecodeError for elements with more to them, as a timeout."""
    attributes = parse_attributes(element)
    key = parse_attributes(attributes.pop(NFTA_SET_ELEM_KEY, b"")).get(NFTA_DATA_VALUE, b"")
    flags = number(attributes.pop(NFTA_SET_ELEM_FLAGS, b""))
    attributes.pop(NFTA_SET_ELEM_PAD, None)
    attributes.pop(NFTA_SET_ELEM_USERDATA, None)
    if attributes or len(key) != length or flags & ~NFT_SET_ELEM_INTERVAL_END:
        raise DecodeError("a set holds an element that is more than a key")
    return int.from_bytes(key), bool(flags)


def _blocks(first: int, after: int, bits: int) -> Iterator[Cidr]:
    """The fewest address blocks that cover [first, after): just one where the interval was a block."""
    length = bits // 8
    while first < after:
        width = (first & -first).bit_length() - 1 if first else bits
        width = min(width, (after - first).bit_length() - 1)
        yield Cidr(first.to_bytes(length), bits - width)
        first += 1 << width
