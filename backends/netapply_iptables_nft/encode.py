"""A rule as the nf_tables expressions that every iptables-nft from 1.8.7 to 1.8.11 reads back as what it is.

iptables 1.8.7 writes them in the same way, byte for byte. Later versions write some matches as native expressions
(ports, marks); 1.8.7 would misread those silently, so these stay xt matches, which all versions read.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias, assert_never

from netapply.errors import UnsupportedError
from netapply.ruleset import (
    Accept,
    AddressMatch,
    CgroupMatch,
    ConnmarkMatch,
    Dnat,
    Drop,
    Family,
    IfaceMatch,
    Jump,
    LimitMatch,
    Log,
    MarkMatch,
    OwnerMatch,
    PortMatch,
    ProtocolMatch,
    Redirect,
    RestoreMark,
    Return,
    Rule,
    SaveMark,
    SetConnmark,
    SetMark,
    SetMatch,
    SetZone,
    Side,
    SocketMatch,
    StateMatch,
    Statement,
    SynMatch,
    TProxy,
)
from netapply.values import NamedTuple
from netapply_wire.expressions import (
    NF_ACCEPT,
    NF_DROP,
    NFT_CMP_EQ,
    NFT_CMP_NEQ,
    NFT_JUMP,
    NFT_META_IIFNAME,
    NFT_META_L4PROTO,
    NFT_META_OIFNAME,
    NFT_PAYLOAD_NETWORK_HEADER,
    NFT_RETURN,
    NFTA_RULE_COMPAT,
    NFTA_RULE_EXPRESSIONS,
    bitwise,
    cmp,
    counter,
    limit,
    match,
    meta,
    payload,
    target,
    verdict,
)
from netapply_wire.nfnetlink import nested, u32
from netapply_wire.xtables import SET_INDEX_OFFSET, Extension, comment_extension, match_extension, target_extension

#: Offset of the source and the destination address in the network header.
ADDRESS_OFFSET: dict[tuple[Family, Side], int] = {
    ("ip", "src"): 12,
    ("ip", "dst"): 16,
    ("ip6", "src"): 8,
    ("ip6", "dst"): 24,
}
#: Matches that are not on the ip header: extensions to iptables.
Beyond: TypeAlias = (
    PortMatch
    | SynMatch
    | SetMatch
    | OwnerMatch
    | CgroupMatch
    | MarkMatch
    | ConnmarkMatch
    | StateMatch
    | SocketMatch
    | LimitMatch
)
#: The order in which iptables writes what lives in the ip header.
HEADER_ORDER = {"in": 0, "out": 1, "protocol": 2, "src": 3, "dst": 4}
PORT_PROTOCOLS = (6, 17)
INTERFACE_SIZE = 15  # IFNAMSIZ - 1
NO_INTERFACE = b"INVAL/D\0"  # of iptables' nft-shared.c

# enum nft_rule_compat_attributes: the protocol that xt extensions are checked against.
NFTA_RULE_COMPAT_PROTO, NFTA_RULE_COMPAT_FLAGS = 1, 2


class SetReference(NamedTuple):
    """Where in the encoded rule the kernel's index of a set belongs (u16, host order)."""

    offset: int
    set: str


class EncodedRule(NamedTuple):
    """The attributes NFTA_RULE_EXPRESSIONS and NFTA_RULE_COMPAT. Set indices are 0 until commit."""

    attributes: bytes
    sets: tuple[SetReference, ...]


@lru_cache(maxsize=16384)
def encode_rule(rule: Rule, family: Family) -> EncodedRule:
    """Spell one rule of an ip or ip6 table. Pure. Raises UnsupportedError for what iptables cannot say."""
    if rule.family not in (None, family):
        raise UnsupportedError(f"a rule for {rule.family} in a table of {family}")
    header: dict[str, bytes] = {}
    parts: list[bytes] = []
    sets: list[tuple[int, str]] = []
    protocol = next((m.protocol for m in rule.matches if m.kind == "protocol"), 0)
    for each in rule.matches:
        if isinstance(each, IfaceMatch | AddressMatch | ProtocolMatch):
            _add_header(header, each, family)
            continue
        if isinstance(each, SetMatch):
            sets.append((len(parts), each.set))
        parts.append(_match(each, protocol))
    front = [header[field] for field in sorted(header, key=HEADER_ORDER.__getitem__)]
    if rule.comment:
        parts.append(match(*comment_extension(rule.comment)))
    parts += (counter(), _statement(rule.statement, family))
    expressions = nested(NFTA_RULE_EXPRESSIONS, *front, *parts)
    compat = _compat(protocol) if protocol else b""
    if not sets:
        return EncodedRule(expressions + compat, ())
    start = 4 + sum(map(len, front))
    references = (SetReference(start + sum(map(len, parts[:at])) + _INDEX_IN_MATCH, name) for at, name in sets)
    return EncodedRule(expressions + compat, tuple(references))


#: Where the info of a match `set` begins in its encoded expression, plus the index in it.
_INDEX_IN_MATCH = match("set", 4, b"\xff" * 8).index(b"\xff" * 8) + SET_INDEX_OFFSET


@lru_cache(maxsize=32)
def _compat(protocol: int) -> bytes:
    return nested(NFTA_RULE_COMPAT, u32(NFTA_RULE_COMPAT_PROTO, protocol), u32(NFTA_RULE_COMPAT_FLAGS, 0))


def _add_header(header: dict[str, bytes], each: IfaceMatch | AddressMatch | ProtocolMatch, family: Family) -> None:
    # iptables has one field for each of these: a second match on it would silently take the place of the first.
    field: str
    match each:
        case IfaceMatch():
            field, encoded = each.direction, _interface(each)
        case AddressMatch():
            field, encoded = each.side, _address(each, family)
        case ProtocolMatch():
            field, encoded = "protocol", _protocol(each.protocol)
        case _:
            assert_never(each)
    if field in header:
        raise UnsupportedError(f"two matches on {field} in one rule; iptables has one field for it")
    header[field] = encoded


@lru_cache(maxsize=256)
def _protocol(protocol: int) -> bytes:
    return meta(NFT_META_L4PROTO) + cmp(NFT_CMP_EQ, bytes([protocol]))


@lru_cache(maxsize=256)
def _interface(each: IfaceMatch) -> bytes:
    name = each.name.encode("utf-8", "surrogateescape")
    if not 0 < len(name) <= INTERFACE_SIZE:
        raise UnsupportedError(f"interface {each.name!r}: a name has 1 to {INTERFACE_SIZE} bytes")
    key = NFT_META_IIFNAME if each.direction == "in" else NFT_META_OIFNAME
    if name == b"+":  # every interface: loaded and not compared. No interface: compared with a name that none has.
        return meta(key) + (cmp(NFT_CMP_EQ, NO_INTERFACE) if each.negate else b"")
    # A wildcard compares the letters before the plus; a name its ending NUL too.
    compared = name[:-1] if name.endswith(b"+") else name + b"\0"
    return meta(key) + cmp(NFT_CMP_NEQ if each.negate else NFT_CMP_EQ, compared)


def _address(each: AddressMatch, family: Family) -> bytes:
    packed, prefix = each.cidr
    if each.cidr.family != family:
        raise UnsupportedError(f"{each.cidr} in a rule of family {family}")
    offset, size = ADDRESS_OFFSET[family, each.side], len(packed)
    compare = NFT_CMP_NEQ if each.negate else NFT_CMP_EQ
    whole, odd = divmod(prefix, 8)
    if whole and not odd:  # since 1.8.6 iptables loads only the bytes that count
        return payload(NFT_PAYLOAD_NETWORK_HEADER, offset, whole) + cmp(compare, packed[:whole])
    load = payload(NFT_PAYLOAD_NETWORK_HEADER, offset, size)
    return load + bitwise(prefix_mask(prefix, size)) + cmp(compare, packed)


def prefix_mask(prefix: int, size: int) -> bytes:
    """The netmask of `prefix` bits, `size` bytes long."""
    return ((1 << size * 8) - (1 << size * 8 - prefix)).to_bytes(size)


def _match(each: Beyond, protocol: int) -> bytes:
    match each:
        case LimitMatch():
            return limit(each.rate, each.burst)  # every version writes and reads this one as a native expression
        case PortMatch() if protocol not in PORT_PROTOCOLS:
            raise UnsupportedError("a port without the protocol tcp or udp")
        case (
            PortMatch() | SynMatch() | SetMatch() | OwnerMatch() | CgroupMatch() | MarkMatch() | ConnmarkMatch()
            | StateMatch() | SocketMatch()
        ):  # fmt: skip
            return match(*_needed(match_extension(each, protocol)))
        case _:
            assert_never(each)


@lru_cache(maxsize=256)
def _statement(statement: Statement, family: Family) -> bytes:
    match statement:
        case Jump():
            return verdict(NFT_JUMP, statement.chain)
        case Return():
            return verdict(NFT_RETURN)
        case Accept():
            return verdict(NF_ACCEPT)
        case Drop():
            return verdict(NF_DROP)
        case (
            Redirect() | Dnat() | TProxy() | SetMark() | SaveMark() | RestoreMark() | SetConnmark() | SetZone() | Log()
        ):
            return target(*_needed(target_extension(statement, family)))
        case _:
            assert_never(statement)


def _needed(extension: Extension | None) -> Extension:
    assert extension is not None
    return extension
