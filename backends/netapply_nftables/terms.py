"""Terms: a value of the packet, and what it is compared with. The unit that dumped matches are made of."""

from __future__ import annotations

from collections.abc import Sequence

from netapply.errors import DecodeError
from netapply.values import NamedTuple
from netapply_nftables.encode import IFNAMSIZ, OWNER_KEYS
from netapply_wire import expressions as nft
from netapply_wire.expressions import Expression
from netapply_wire.nfnetlink import parse_attributes, text

NFTA_BITWISE_OP, NFTA_CT_DIRECTION, NFTA_LOOKUP_DREG = 6, 3, 3

#: Bytes that the kernel loads for each key, payload apart.
_WIDTHS = {
    ("meta", nft.NFT_META_NFPROTO): 1,
    ("meta", nft.NFT_META_L4PROTO): 1,
    ("meta", nft.NFT_META_IIFNAME): IFNAMSIZ,
    ("meta", nft.NFT_META_OIFNAME): IFNAMSIZ,
    ("meta", nft.NFT_META_SKUID): 4,
    ("meta", nft.NFT_META_SKGID): 4,
    ("meta", nft.NFT_META_MARK): 4,
    ("ct", nft.NFT_CT_MARK): 4,
    ("ct", nft.NFT_CT_STATE): 4,
    ("socket", nft.NFT_SOCKET_TRANSPARENT): 1,
    ("socket", nft.NFT_SOCKET_CGROUPV2): 8,
}


class Term(NamedTuple):
    """`source` is meta, ct, payload or socket, and `test` is cmp, range or lookup.

    `key` is NFT_<SOURCE>_*, for payload the header; `offset` is in the header, for socket the cgroup level. `mask` is
    applied before the comparison. cmp has `first` and `last` alike; lookup has none, but the name of a `set`.
    """

    source: str
    key: int
    offset: int
    width: int
    mask: bytes | None
    test: str
    negate: bool
    first: bytes
    last: bytes
    set: str


def read_term(expressions: Sequence[Expression], at: int) -> tuple[Term, int]:
    """The term that begins at `at`, and where the next one begins. Raises DecodeError."""
    try:
        source, key, offset, width = _read_load(expressions[at])
        at += 1
        mask = None
        if expressions[at].name == "bitwise":
            mask = _read_mask(expressions[at])
            at += 1
        if swapped := expressions[at].name == "byteorder":
            at += 1
        tested = _read_test(expressions[at : at + 2])
    except IndexError as short:
        raise DecodeError("a rule ends inside a match") from short
    term = Term(source, key, offset, width, mask, *tested)
    if swapped != (source == "meta" and key in OWNER_KEYS.values() and term.test == "range"):
        raise DecodeError("a comparison in another byte order")
    if not _has_width(term):
        raise DecodeError(f"a comparison of {source} {key} with data of another width")
    return term, at + (2 if term.test == "range" and expressions[at].name == "cmp" else 1)


def data_of(item: Expression, kind: int) -> bytes:
    """The constant in an expression's attribute; b"" where it holds none."""
    return parse_attributes(item.attributes.get(kind, b"")).get(nft.NFTA_DATA_VALUE, b"")


def _read_load(item: Expression) -> tuple[str, int, int, int]:
    name = item.name
    if name == "payload" and item.number(1) == 1:
        return name, item.number(2), item.number(3), item.number(4)
    if name in ("meta", "ct") and item.number(1) == 1:
        return name, item.number(2), 0, _WIDTHS.get((name, item.number(2)), 0)
    if name == "socket" and item.number(2) == 1:
        return name, item.number(1), item.number(3), _WIDTHS.get((name, item.number(1)), 0)
    raise DecodeError(f"expression {name} where a match should begin")


def _read_mask(item: Expression) -> bytes:
    if any(data_of(item, 5)) or item.number(NFTA_BITWISE_OP):
        raise DecodeError("a match that changes bits")
    return data_of(item, 4)


def _read_test(items: Sequence[Expression]) -> tuple[str, bool, bytes, bytes, str]:
    """The first of these two, or both: nft before 1.1 writes a range that is not negated as two comparisons."""
    item = items[0]
    name, op = item.name, item.number(2)
    ops = [each.number(2) for each in items if each.name == "cmp"]
    if ops == [nft.NFT_CMP_GTE, nft.NFT_CMP_LTE]:
        return "range", False, data_of(item, 3), data_of(items[1], 3), ""
    if name == "cmp" and op in (nft.NFT_CMP_EQ, nft.NFT_CMP_NEQ):
        data = data_of(item, 3)
        return name, bool(op), data, data, ""
    if name == "range":
        return name, bool(op), data_of(item, 3), data_of(item, 4), ""
    if name == "lookup" and NFTA_LOOKUP_DREG not in item.attributes:
        return name, bool(item.number(5)), b"", b"", text(item.attributes.get(1, b""))
    raise DecodeError(f"expression {name} where a comparison should be")


def _has_width(term: Term) -> bool:
    if term.mask is not None and len(term.mask) != term.width:
        return False
    if term.test == "lookup":
        return True
    if term.width == IFNAMSIZ and term.source == "meta":  # a prefix of a name is shorter
        return 0 < len(term.first) <= IFNAMSIZ and term.test == "cmp"
    return len(term.first) == len(term.last) == term.width
