"""Rules of ours as the kernel dumps them, and back to what they mean.

Decoding is strict: an expression, register or flag that `encode_rule` would not write makes the rule "not one of ours".
The native spelling of protocol, port, SYN and mark is the exception: iptables from 1.8.8 on gives it to our rules when
somebody saves and restores them. They mean what they meant, and are told apart as `native`: 1.8.7 misreads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Literal, TypeAlias

from netapply.errors import DecodeError
from netapply.ruleset import (
    Accept,
    AddressMatch,
    Cidr,
    Drop,
    Family,
    IfaceMatch,
    Jump,
    LimitMatch,
    MarkMatch,
    Match,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Return,
    Rule,
    Statement,
    SynMatch,
)
from netapply.values import NamedTuple
from netapply_iptables_nft.dumped import verdict_of
from netapply_iptables_nft.encode import ADDRESS_OFFSET, NO_INTERFACE, prefix_mask
from netapply_wire.expressions import (
    NF_ACCEPT,
    NF_DROP,
    NFT_CMP_EQ,
    NFT_CMP_NEQ,
    NFT_JUMP,
    NFT_LIMIT_PKTS,
    NFT_META_IIFNAME,
    NFT_META_L4PROTO,
    NFT_META_MARK,
    NFT_META_OIFNAME,
    NFT_PAYLOAD_NETWORK_HEADER,
    NFT_PAYLOAD_TRANSPORT_HEADER,
    NFT_RETURN,
    NFTA_DATA_VALUE,
    NFTA_VERDICT_CHAIN,
    NFTA_VERDICT_CODE,
    TCP_FIRST_FLAGS,
    TCP_FLAGS_OFFSET,
    TCP_SYN,
    Expression,
    parse_expressions,
)
from netapply_wire.nfnetlink import number, parse_attributes, text
from netapply_wire.xtables import PER_MINUTE, Extension, decode_comment, decode_match, decode_target

#: Indices of sets, and their names.
SetNames: TypeAlias = tuple[tuple[int, str], ...]
Field: TypeAlias = Literal["in", "out", "src", "dst", "protocol", "mark", "sport", "dport", "flags"]

#: The canonical order of what lives in the ip header (`in` and `out`, addresses, protocol); the rest keeps its own.
_HEADER_ORDER: dict[Field, int] = {"in": 0, "out": 1, "src": 2, "dst": 3, "protocol": 4}
_TCP, _UDP = ProtocolMatch(6), ProtocolMatch(17)
#: What only packets of these protocols have.
_PROTOCOLS_OF: dict[type[Match], tuple[ProtocolMatch, ...]] = {PortMatch: (_TCP, _UDP), SynMatch: (_TCP,)}
_META: dict[int, Field] = {
    NFT_META_IIFNAME: "in",
    NFT_META_OIFNAME: "out",
    NFT_META_L4PROTO: "protocol",
    NFT_META_MARK: "mark",
}
_PAYLOAD: dict[tuple[Family, int, int], Field] = {
    **{(family, NFT_PAYLOAD_NETWORK_HEADER, offset): side for (family, side), offset in ADDRESS_OFFSET.items()},
    ("ip", NFT_PAYLOAD_NETWORK_HEADER, 9): "protocol",  # iptables 1.8.11
    ("ip", NFT_PAYLOAD_TRANSPORT_HEADER, 0): "sport",
    ("ip", NFT_PAYLOAD_TRANSPORT_HEADER, 2): "dport",
    ("ip6", NFT_PAYLOAD_TRANSPORT_HEADER, 0): "sport",
    ("ip6", NFT_PAYLOAD_TRANSPORT_HEADER, 2): "dport",
    ("ip", NFT_PAYLOAD_TRANSPORT_HEADER, TCP_FLAGS_OFFSET): "flags",
    ("ip6", NFT_PAYLOAD_TRANSPORT_HEADER, TCP_FLAGS_OFFSET): "flags",
}
_FIELD_SIZE: dict[Field, int] = {"protocol": 1, "sport": 2, "dport": 2, "mark": 4, "flags": 1}
_VERDICTS: dict[int, Statement] = {NFT_RETURN: Return(), NF_ACCEPT: Accept(), NF_DROP: Drop()}

_MARK = Struct("=I")


class Decoded(NamedTuple):
    """What a rule means, and whether a newer iptables wrote it otherwise than `encode_rule` does."""

    rule: Rule
    native: bool


class Load(NamedTuple):
    """What the register holds: a field of the packet, `size` bytes of it, ANDed with `mask` if that is not empty."""

    field: Field
    size: int
    mask: bytes = b""


@lru_cache(maxsize=16384)
def decode_rule(stateless: bytes, family: Family, sets: SetNames = ()) -> Decoded:
    """The rule that `without_state` left. Pure. Raises DecodeError for one that is not of our making."""
    reader = _Reader(family, dict(sets))
    for each in parse_expressions(stateless):
        reader.read(each)
    return reader.decoded()


class _Reader:
    """One walk over the expressions of a rule, with the register as the kernel would fill it."""

    def __init__(self, family: Family, sets: dict[int, str]) -> None:
        self._family: Family = family
        self._sets = sets
        self._load: Load | None = None
        self._header: dict[Field, Match] = {}
        self._matches: list[Match] = []
        self._comment = ""
        self._counted = False
        self._native = False
        self._statement: Statement | None = None

    def read(self, each: Expression) -> None:
        if each.name not in _COMPARISONS:
            self._loaded_only()
        reader = _READERS.get(each.name)
        if reader is None or self._statement is not None:
            raise _foreign(each)
        reader(self, each)

    def decoded(self) -> Decoded:
        if self._statement is None or self._load is not None or not self._counted:
            raise DecodeError("a rule without a counter and a statement: not one of ours")
        protocol = self._header.get("protocol")
        for each in self._matches:
            if protocol not in _PROTOCOLS_OF.get(type(each), (protocol,)):
                raise DecodeError("a match in a rule of another protocol: not one of ours")
        header = [self._header[field] for field in sorted(self._header, key=_HEADER_ORDER.__getitem__)]
        return Decoded(Rule((*header, *self._matches), self._statement, comment=self._comment), self._native)

    def _loaded_only(self) -> None:
        """Any interface will do (`+`) where its name is loaded and not compared."""
        load = self._load
        if load is None or load.field in self._header:
            return
        if load.field == "in":
            self._header["in"], self._load = IfaceMatch("in", "+"), None
        elif load.field == "out":
            self._header["out"], self._load = IfaceMatch("out", "+"), None

    def meta(self, each: Expression) -> None:
        field = _META.get(each.number(2))
        self._native |= field == "mark"
        self._set_load(each, None if field is None else Load(field, _FIELD_SIZE.get(field, 0)), register=1)

    def payload(self, each: Expression) -> None:
        field, size = _PAYLOAD.get((self._family, each.number(2), each.number(3))), each.number(4)
        self._native |= field not in ("src", "dst")
        wrong = field is None or _FIELD_SIZE.get(field, size) != size
        self._set_load(each, None if wrong or field is None else Load(field, size), register=1)

    def _set_load(self, each: Expression, load: Load | None, register: int) -> None:
        if load is None or self._load is not None or each.number(register) != 1:
            raise _foreign(each)
        self._load = load

    def bitwise(self, each: Expression) -> None:
        mask, flip, load = _value(each, 4), _value(each, 5), self._load
        masked = load is not None and load.field in ("src", "dst", "mark", "flags") and not load.mask
        if (
            load is None
            or not masked
            or len(mask) != load.size
            or any(flip)
            or each.number(6)
            or each.number(1) != 1
            or each.number(2) != 1
        ):
            raise _foreign(each)
        self._load = load._replace(mask=mask)

    def cmp(self, each: Expression) -> None:
        data = _value(each, 3)
        self._compare(each, data, data, negate=each.number(2) == NFT_CMP_NEQ)

    def range(self, each: Expression) -> None:
        if self._load is None or self._load.field not in ("sport", "dport"):
            raise _foreign(each)
        self._compare(each, _value(each, 3), _value(each, 4), negate=each.number(2) == NFT_CMP_NEQ)

    def _compare(self, each: Expression, first: bytes, last: bytes, *, negate: bool) -> None:
        load, self._load = self._load, None
        if load is None or each.number(1) != 1 or each.number(2) not in (NFT_CMP_EQ, NFT_CMP_NEQ):
            raise _foreign(each)
        if load.field in ("in", "out"):
            found: Match | None = _interface("in" if load.field == "in" else "out", first, negate=negate)
        elif len(first) != load.size or len(last) != load.size:
            found = None
        elif load.field in ("src", "dst"):
            found = _address("src" if load.field == "src" else "dst", load, self._family, first, negate=negate)
        elif load.field == "protocol":
            found = None if negate else ProtocolMatch(first[0])
        elif load.field == "flags":
            found = SynMatch() if (load.mask, first, negate) == (TCP_FIRST_FLAGS, TCP_SYN, False) else None
        elif load.field == "mark":
            mask = _MARK.unpack(load.mask)[0] if load.mask else 0xFFFFFFFF
            found = MarkMatch(_MARK.unpack(first)[0], mask, negate)
        else:
            ports = PortRange(number(first), number(last))
            found = PortMatch("src" if load.field == "sport" else "dst", (ports,), negate)
        if found is None or load.field in self._header:
            raise _foreign(each)
        if load.field in _HEADER_ORDER:
            self._header[load.field] = found
        else:
            self._matches.append(found)

    def match(self, each: Expression) -> None:
        extension = _extension(each)
        if extension.name == "comment" and not self._comment:
            self._comment = decode_comment(extension)
        elif self._comment:
            raise _foreign(each)  # ours stands last
        else:
            self._matches.append(decode_match(extension, self._sets))

    def limit(self, each: Expression) -> None:
        rate, unit = each.number(1), each.number(2)
        a_minute, rest = divmod(rate * 60, unit or 1)
        if rest or not unit or not 0 < a_minute <= PER_MINUTE or each.number(4) != NFT_LIMIT_PKTS or each.number(5):
            raise _foreign(each)
        self._matches.append(LimitMatch(a_minute, each.number(3)))

    def counter(self, each: Expression) -> None:
        if self._counted:
            raise _foreign(each)
        self._counted = True

    def immediate(self, each: Expression) -> None:
        found = verdict_of(each)
        if each.number(1) or NFTA_VERDICT_CODE not in found:  # register 0 is the verdict
            raise _foreign(each)
        code = int.from_bytes(found[NFTA_VERDICT_CODE], signed=True)
        jump = code == NFT_JUMP and NFTA_VERDICT_CHAIN in found
        self._statement = Jump(text(found[NFTA_VERDICT_CHAIN])) if jump else _VERDICTS.get(code)
        if self._statement is None:
            raise _foreign(each)

    def target(self, each: Expression) -> None:
        self._statement = decode_target(_extension(each), self._family)


_COMPARISONS = frozenset(("bitwise", "cmp", "range"))
_READERS: dict[str, Callable[[_Reader, Expression], None]] = {
    "meta": _Reader.meta,
    "payload": _Reader.payload,
    "bitwise": _Reader.bitwise,
    "cmp": _Reader.cmp,
    "range": _Reader.range,
    "match": _Reader.match,
    "limit": _Reader.limit,
    "counter": _Reader.counter,
    "immediate": _Reader.immediate,
    "target": _Reader.target,
}


def _interface(direction: Literal["in", "out"], name: bytes, *, negate: bool) -> IfaceMatch | None:
    if name == NO_INTERFACE:
        return None if negate else IfaceMatch(direction, "+", negate=True)
    plain = name.rstrip(b"\0")
    if not plain:
        return None
    return IfaceMatch(direction, text(plain) if plain != name else text(plain) + "+", negate)


def _address(
    side: Literal["src", "dst"], load: Load, family: Family, value: bytes, *, negate: bool
) -> AddressMatch | None:
    size = 4 if family == "ip" else 16
    mask = load.mask or b"\xff" * load.size
    prefix = int.from_bytes(mask).bit_count()
    if load.size > size or mask != prefix_mask(prefix, load.size) or int.from_bytes(value) & ~int.from_bytes(mask):
        return None
    return AddressMatch(side, Cidr(value.ljust(size, b"\0"), prefix), negate)


def _extension(each: Expression) -> Extension:
    return Extension(text(each.attributes.get(1, b"")), each.number(2), each.attributes.get(3, b""))


def _value(each: Expression, kind: int) -> bytes:
    return parse_attributes(each.attributes.get(kind, b"")).get(NFTA_DATA_VALUE, b"")


def _foreign(each: Expression) -> DecodeError:
    return DecodeError(f"expression {each.name}: not one of ours")
