"""A dumped rule, back to a `Rule`: exactly what `encode` writes, and DecodeError for anything else."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from netapply.errors import DecodeError
from netapply.ruleset import (
    Accept,
    AddressMatch,
    CgroupMatch,
    Cidr,
    ConnmarkMatch,
    Dnat,
    Drop,
    Family,
    IfaceMatch,
    Jump,
    LimitMatch,
    Log,
    MarkMatch,
    Match,
    OwnerMatch,
    PortMatch,
    PortRange,
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
    TProxy,
)
from netapply_nftables.encode import (
    ADDRESS_LENGTHS,
    ALL_BITS,
    IFNAMSIZ,
    STATE_BITS,
    UDATA_CGROUP_PATH,
)
from netapply_wire import expressions as nft
from netapply_wire.expressions import Expression
from netapply_wire.nfnetlink import NFPROTO, number, parse_attributes, text

#: Contents of the anonymous sets of a table, by the names that the kernel gave them.
PortSets = Mapping[str, tuple[PortRange, ...]]

_FAMILIES: dict[int, Family] = {NFPROTO[family]: family for family in ADDRESS_LENGTHS}
_DIRECTIONS: dict[int, Literal["in", "out"]] = {nft.NFT_META_IIFNAME: "in", nft.NFT_META_OIFNAME: "out"}
_OWNERS: dict[int, Literal["uid", "gid"]] = {nft.NFT_META_SKUID: "uid", nft.NFT_META_SKGID: "gid"}
_SIDES: dict[tuple[Family, int], Side] = {("ip", 12): "src", ("ip", 16): "dst", ("ip6", 8): "src", ("ip6", 24): "dst"}
_PORT_SIDES: dict[int, Side] = {0: "src", 2: "dst"}


class _Term(NamedTuple):
    """A value of the packet, and what it is compared with: the unit that a match is made of."""

    source: str  # meta, ct, payload, socket
    key: int  # NFT_<SOURCE>_*; for payload the header
    offset: int  # in the header; for socket the cgroup level
    length: int
    mask: bytes | None
    test: str  # cmp, range, lookup
    negate: bool
    first: bytes
    last: bytes
    set: str


def decode_rule(expressions: Sequence[Expression], userdata: bytes, port_sets: PortSets) -> Rule:
    """The rule that these expressions spell. Raises DecodeError."""
    data = nft.parse_userdata(userdata)
    names = [item.name for item in expressions]
    if "counter" not in names:
        raise DecodeError("the rule has no counter")
    at = names.index("counter")
    matches, family = _decode_matches(expressions[:at], data.get(UDATA_CGROUP_PATH, ""), port_sets)
    statement = _decode_statement(expressions[at + 1 :], family)
    return Rule(matches, statement, family, data.get(nft.NFTNL_UDATA_RULE_COMMENT, ""))


def is_fallback(expressions: Sequence[Expression], userdata: bytes, port_sets: PortSets, of: Rule) -> bool:
    """Whether these expressions are the second half of the TProxy rule `of`: its matches again, no counter, drop."""
    if not isinstance(of.statement, TProxy) or any(item.name == "counter" for item in expressions):
        return False
    data = nft.parse_userdata(userdata)
    try:
        statement = _decode_statement(expressions[-1:], of.family)
        matches, family = _decode_matches(expressions[:-1], data.get(UDATA_CGROUP_PATH, ""), port_sets)
    except DecodeError:
        return False
    comment = data.get(nft.NFTNL_UDATA_RULE_COMMENT, "")
    return (matches, family, statement, comment) == (of.matches, of.family, Drop(), of.comment)


# --- matches -------------------------------------------------------------------------------------------------


def _decode_matches(
    expressions: Sequence[Expression], cgroup: str, port_sets: PortSets
) -> tuple[tuple[Match, ...], Family | None]:
    matches: list[Match] = []
    family: Family | None = None
    at = 0
    while at < len(expressions):
        if expressions[at].name == "limit":
            matches.append(_decode_limit(expressions[at]))
            at += 1
            continue
        term, at = _read_term(expressions, at)
        if term.source == "meta" and term.key == nft.NFT_META_NFPROTO:
            family = _decode_guard(term)
        elif term.source == "socket" and term.key == nft.NFT_SOCKET_TRANSPARENT:
            other, at = _read_term(expressions, at)
            matches.append(_decode_socket(term, other))
        else:
            matches.append(_decode_match(term, family, cgroup, port_sets))
    return tuple(matches), family


def _read_term(expressions: Sequence[Expression], at: int) -> tuple[_Term, int]:
    """The term that begins at `at`, and where the next one begins."""
    try:
        load = expressions[at]
        source, key, offset, length = _read_load(load)
        at += 1
        mask = None
        if expressions[at].name == "bitwise":
            mask = _read_mask(expressions[at])
            at += 1
        if swapped := expressions[at].name == "byteorder":
            at += 1
        test = expressions[at]
    except IndexError as short:
        raise DecodeError("a rule ends inside a match") from short
    if swapped != (source == "meta" and key in _OWNERS and test.name == "range"):
        raise DecodeError("a comparison in another byte order")
    return _Term(source, key, offset, length, mask, *_read_test(test)), at + 1


def _read_load(item: Expression) -> tuple[str, int, int, int]:
    # Of meta, ct, payload and socket: the register is attribute 1 or, of meta, ct and payload, nothing else we make.
    name = item.name
    if name == "payload" and item.number(1) == 1:
        return name, item.number(2), item.number(3), item.number(4)
    if name == "meta" and item.number(1) == 1:
        return name, item.number(2), 0, 0
    if name == "ct" and item.number(1) == 1 and 3 not in item.attributes:  # NFTA_CT_DIRECTION
        return name, item.number(2), 0, 0
    if name == "socket" and item.number(2) == 1:
        return name, item.number(1), item.number(3), 0
    raise DecodeError(f"expression {name} where a match should begin")


def _read_mask(item: Expression) -> bytes:
    mask, flip = _data(item, 4), _data(item, 5)
    if any(flip) or item.number(6):  # NFTA_BITWISE_OP: a shift
        raise DecodeError("a match that changes bits")
    return mask


def _read_test(item: Expression) -> tuple[str, bool, bytes, bytes, str]:
    name, op = item.name, item.number(2)
    if name == "cmp" and op in (nft.NFT_CMP_EQ, nft.NFT_CMP_NEQ):
        data = _data(item, 3)
        return name, bool(op), data, data, ""
    if name == "range":
        return name, bool(op), _data(item, 3), _data(item, 4), ""
    if name == "lookup" and 3 not in item.attributes:  # NFTA_LOOKUP_DREG: a map
        return name, bool(item.number(5)), b"", b"", text(item.attributes.get(1, b""))
    raise DecodeError(f"expression {name} where a comparison should be")


def _data(item: Expression, kind: int) -> bytes:
    return parse_attributes(item.attributes.get(kind, b"")).get(nft.NFTA_DATA_VALUE, b"")


def _decode_guard(term: _Term) -> Family:
    family = _FAMILIES.get(number(term.first))
    if family is None or term.test != "cmp" or term.negate:
        raise DecodeError("a rule for a family that is not ip or ip6")
    return family


def _decode_match(term: _Term, family: Family | None, cgroup: str, port_sets: PortSets) -> Match:
    match term.source, term.key:
        case "payload", nft.NFT_PAYLOAD_NETWORK_HEADER:
            return _decode_address(term, family)
        case "payload", nft.NFT_PAYLOAD_TRANSPORT_HEADER:
            return _decode_port(term, port_sets)
        case "meta", nft.NFT_META_L4PROTO if term.test == "cmp" and not term.negate:
            return ProtocolMatch(number(term.first))
        case "meta", nft.NFT_META_IIFNAME | nft.NFT_META_OIFNAME if term.test == "cmp":
            return _decode_iface(term)
        case "meta", nft.NFT_META_SKUID | nft.NFT_META_SKGID if term.test != "lookup":
            order: Literal["little", "big"] = sys.byteorder if term.test == "cmp" else "big"
            first, last = int.from_bytes(term.first, order), int.from_bytes(term.last, order)
            return OwnerMatch(_OWNERS[term.key], first, last, term.negate)
        case "meta", nft.NFT_META_MARK if term.test == "cmp":
            return MarkMatch(_host(term.first), ALL_BITS if term.mask is None else _host(term.mask), term.negate)
        case "ct", nft.NFT_CT_MARK if term.test == "cmp":
            return ConnmarkMatch(_host(term.first), ALL_BITS if term.mask is None else _host(term.mask), term.negate)
        case "ct", nft.NFT_CT_STATE if term.mask is not None and term.negate and not any(term.first):
            bits = _host(term.mask)
            return StateMatch(tuple(sorted(state for state, bit in STATE_BITS.items() if bits & bit)))
        case "socket", nft.NFT_SOCKET_CGROUPV2 if (
            term.test == "cmp" and term.offset == cgroup.count("/") + 1 and cgroup
        ):
            return CgroupMatch(cgroup, _host(term.first), term.negate)
        case _:
            raise DecodeError(f"a match of {term.source} {term.key} that netapply does not make")


def _host(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def _decode_iface(term: _Term) -> IfaceMatch:
    data, direction = term.first, _DIRECTIONS[term.key]
    if len(data) < IFNAMSIZ:
        return IfaceMatch(direction, text(data) + "+", term.negate)
    if not any(data):
        return IfaceMatch(direction, "+", not term.negate)
    return IfaceMatch(direction, text(data), term.negate)


def _decode_address(term: _Term, family: Family | None) -> AddressMatch | SetMatch:
    side = _SIDES.get((family, term.offset)) if family else None
    if family is None or side is None or term.test == "range":
        raise DecodeError("a match of a network header's field that is no address")
    full = ADDRESS_LENGTHS[family]
    if term.test == "lookup":
        return SetMatch(side, term.set, term.negate)
    prefix = term.length * 8
    if term.mask is not None:
        mask = number(term.mask)
        prefix = mask.bit_count()
        if mask != ((1 << prefix) - 1) << (full * 8 - prefix):
            raise DecodeError("an address mask with holes")
    return AddressMatch(side, Cidr(term.first.ljust(full, b"\0"), prefix), term.negate)


def _decode_port(term: _Term, port_sets: PortSets) -> PortMatch:
    side = _PORT_SIDES.get(term.offset)
    if side is None or term.length != 2 or term.mask is not None:
        raise DecodeError("a match of a transport header's field that is no port")
    if term.test == "lookup":
        if term.set not in port_sets:
            raise DecodeError(f"ports of set {term.set}, which is not a list of ports")
        return PortMatch(side, port_sets[term.set], term.negate)
    return PortMatch(side, (PortRange(number(term.first), number(term.last)),), term.negate)


def _decode_socket(transparent: _Term, wildcard: _Term) -> SocketMatch:
    made = (transparent.first, transparent.negate, wildcard.source, wildcard.key, wildcard.first, wildcard.negate)
    if made != (b"\1", False, "socket", nft.NFT_SOCKET_WILDCARD, b"\0", False):
        raise DecodeError("a socket match that netapply does not make")
    return SocketMatch()


def _decode_limit(item: Expression) -> LimitMatch:
    if (item.number(2), item.number(4), item.number(5)) != (60, nft.NFT_LIMIT_PKTS, 0):
        raise DecodeError("a limit that is not of packets a minute")
    return LimitMatch(item.number(1), item.number(3))


# --- statements ----------------------------------------------------------------------------------------------


def _decode_statement(expressions: Sequence[Expression], family: Family | None) -> Statement:
    names = tuple(item.name for item in expressions)
    first = expressions[0] if expressions else Expression("", {})
    match names:
        case ("immediate",):
            return _decode_verdict(first)
        case ("immediate", "redir") if expressions[1].number(3) == nft.NF_NAT_RANGE_PROTO_SPECIFIED:
            return Redirect(number(_data(first, 2)))
        case ("immediate", "immediate", "nat"):
            return _decode_dnat(expressions)
        case ("immediate", "tproxy", *_, "immediate"):
            return _decode_tproxy(expressions, family)
        case ("immediate" | "meta" | "ct", *_, "meta" | "ct"):
            return _decode_marking(expressions)
        case ("log",) if 1 not in first.attributes and not first.number(6) and first.number(5, 4) == 4:
            return Log(text(first.attributes.get(2, b"")))  # NFTA_LOG_GROUP, _FLAGS, _LEVEL as the kernel fills them in
        case _:
            raise DecodeError(f"a statement that netapply does not make: {' '.join(names) or 'none'}")


def _decode_verdict(item: Expression) -> Statement:
    data = parse_attributes(parse_attributes(item.attributes.get(2, b"")).get(nft.NFTA_DATA_VERDICT, b""))
    code = int.from_bytes(data.get(nft.NFTA_VERDICT_CODE, b""), signed=True)
    if not data or item.number(1):
        raise DecodeError("a constant that nothing uses")
    if code == nft.NFT_JUMP:
        return Jump(text(data.get(nft.NFTA_VERDICT_CHAIN, b"")))
    plain: dict[int, Statement] = {nft.NFT_RETURN: Return(), nft.NF_ACCEPT: Accept(), nft.NF_DROP: Drop()}
    if code not in plain:
        raise DecodeError(f"verdict {code}")
    return plain[code]


def _decode_dnat(expressions: Sequence[Expression]) -> Dnat:
    address, port, nat = expressions
    packed = _data(address, 2)
    registers = (address.number(1), port.number(1), nat.number(3), nat.number(4, 1), nat.number(5), nat.number(6, 2))
    wanted = NFPROTO["ip" if len(packed) == 4 else "ip6"]
    if registers != (1, 2, 1, 1, 2, 2) or (nat.number(1), nat.number(2)) != (nft.NFT_NAT_DNAT, wanted):
        raise DecodeError("a nat statement that netapply does not make")
    if nat.number(7) & ~(nft.NF_NAT_RANGE_PROTO_SPECIFIED | 1):  # 1: the address is specified too
        raise DecodeError("a dnat statement with flags")
    return Dnat(packed, number(_data(port, 2)))


def _decode_tproxy(expressions: Sequence[Expression], family: Family | None) -> TProxy:
    port, assign, *marking, verdict = expressions
    mark = _decode_marking(marking)
    wanted = NFPROTO[family] if family else 0
    if assign.number(1) != wanted or 2 in assign.attributes or not isinstance(mark, SetMark):
        raise DecodeError("a tproxy statement that netapply does not make")
    if _decode_verdict(verdict) != Accept():
        raise DecodeError("a tproxy statement that does not accept")
    return TProxy(number(_data(port, 2)), mark.value, mark.mask)


def _decode_marking(expressions: Sequence[Expression]) -> Statement:
    """What loads a value, perhaps changes bits of it, and stores it as a mark or zone."""
    if len(expressions) not in (2, 3):
        raise DecodeError("a mark statement that netapply does not make")
    load, store = expressions[0], expressions[-1]
    stored, loaded = (store.name, store.number(2)), (load.name, load.number(2))
    packet, connection, zone = ("meta", nft.NFT_META_MARK), ("ct", nft.NFT_CT_MARK), ("ct", nft.NFT_CT_ZONE)
    if store.number(3 if store.name == "meta" else 4) != 1 or (store.name == "ct" and 3 in store.attributes):
        raise DecodeError("a mark statement that stores nothing")
    if load.name == "immediate" and len(expressions) == 2:
        value = _host(_data(load, 2))
        if stored == zone:
            return SetZone(value)
        mask = ALL_BITS
    elif len(expressions) == 2:
        if (loaded, stored) == (packet, connection):
            return SaveMark()
        if (loaded, stored) == (connection, packet):
            return RestoreMark()
        raise DecodeError("a mark statement that netapply does not make")
    else:
        change = expressions[1]
        if loaded != stored or change.name != "bitwise" or change.number(6):
            raise DecodeError("a mark statement that netapply does not make")
        value, mask = _host(_data(change, 5)), ~_host(_data(change, 4)) & ALL_BITS
    if stored not in (packet, connection):
        raise DecodeError("a statement that stores what is no mark")
    return SetMark(value, mask) if stored == packet else SetConnmark(value, mask)
