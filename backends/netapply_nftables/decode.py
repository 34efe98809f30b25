"""A dumped rule, back to a `Rule`: exactly what `encode` writes, and DecodeError for anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from netapply.errors import DecodeError
from netapply.ruleset import (
    AddressMatch,
    CgroupMatch,
    Cidr,
    ConnmarkMatch,
    Drop,
    Family,
    IfaceMatch,
    LimitMatch,
    MarkMatch,
    Match,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Rule,
    SetMatch,
    Side,
    SocketMatch,
    StateMatch,
    SynMatch,
    TProxy,
)
from netapply_nftables.decode_statement import decode_statement, host_number
from netapply_nftables.encode import (
    ADDRESS_LENGTHS,
    ALL_BITS,
    IFNAMSIZ,
    STATE_BITS,
    UDATA_CGROUP_PATH,
)
from netapply_nftables.terms import Term, read_term
from netapply_wire import expressions as nft
from netapply_wire.expressions import Expression
from netapply_wire.nfnetlink import NFPROTO, number, text

#: Contents of the anonymous sets that a rule may look up, with the names that the kernel gave them.
PortSets = tuple[tuple[str, tuple[PortRange, ...]], ...]
#: How the kernel names anonymous sets.
ANONYMOUS_SET = b"__set"

_FAMILIES: dict[int, Family] = {NFPROTO[family]: family for family in ADDRESS_LENGTHS}
_DIRECTIONS: dict[int, Literal["in", "out"]] = {nft.NFT_META_IIFNAME: "in", nft.NFT_META_OIFNAME: "out"}
_OWNERS: dict[int, Literal["uid", "gid"]] = {nft.NFT_META_SKUID: "uid", nft.NFT_META_SKGID: "gid"}
_SIDES: dict[tuple[Family, int], Side] = {("ip", 12): "src", ("ip", 16): "dst", ("ip6", 8): "src", ("ip6", 24): "dst"}
_ALL_STATES = sum(STATE_BITS.values())
_PORT_SIDES: dict[int, Side] = {0: "src", 2: "dst"}


def decode_rule(dumped: bytes, userdata: bytes, port_sets: PortSets) -> Rule:
    """The rule of a dumped NFTA_RULE_EXPRESSIONS and NFTA_RULE_USERDATA, whatever it counted. Raises DecodeError."""
    expressions = nft.parse_expressions(dumped)
    data = nft.parse_userdata(userdata)
    names = [item.name for item in expressions]
    if "counter" not in names:
        raise DecodeError("the rule has no counter")
    at = names.index("counter")
    matches, family = _decode_matches(expressions[:at], data.get(UDATA_CGROUP_PATH, ""), dict(port_sets))
    statement = decode_statement(expressions[at + 1 :], family)
    return Rule(matches, statement, family, data.get(nft.NFTNL_UDATA_RULE_COMMENT, ""))


def is_fallback(dumped: bytes, userdata: bytes, port_sets: PortSets, of: Rule) -> bool:
    """Whether this is the second half of the TProxy rule `of`: its matches again, no counter, drop."""
    if not isinstance(of.statement, TProxy):
        return False
    data = nft.parse_userdata(userdata)
    try:
        expressions = nft.parse_expressions(dumped)
        statement = decode_statement(expressions[-1:], of.family)
        matches, family = _decode_matches(expressions[:-1], data.get(UDATA_CGROUP_PATH, ""), dict(port_sets))
    except DecodeError:
        return False
    comment = data.get(nft.NFTNL_UDATA_RULE_COMMENT, "")
    return (matches, family, statement, comment) == (of.matches, of.family, Drop(), of.comment)


# --- matches -------------------------------------------------------------------------------------------------


def _decode_matches(
    expressions: Sequence[Expression], cgroup: str, port_sets: Mapping[str, tuple[PortRange, ...]]
) -> tuple[tuple[Match, ...], Family | None]:
    matches: list[Match] = []
    family: Family | None = None
    at = 0
    while at < len(expressions):
        if expressions[at].name == "limit":
            matches.append(_decode_limit(expressions[at]))
            at += 1
            continue
        term, at = read_term(expressions, at)
        if term.source == "meta" and term.key == nft.NFT_META_NFPROTO:
            family = _decode_guard(term)
        elif term.source == "socket" and term.key == nft.NFT_SOCKET_TRANSPARENT:
            matches.append(_decode_socket(term))
        else:
            matches.append(_decode_match(term, family, cgroup, port_sets))
    return tuple(matches), family


def _decode_guard(term: Term) -> Family:
    family = _FAMILIES.get(number(term.first))
    if family is None or term.mask is not None or term.test != "cmp" or term.negate:
        raise DecodeError("a rule for a family that is not ip or ip6")
    return family


def _decode_match(
    term: Term, family: Family | None, cgroup: str, port_sets: Mapping[str, tuple[PortRange, ...]]
) -> Match:
    value = host_number(term.first)
    mask = ALL_BITS if term.mask is None else host_number(term.mask)
    plain = term.mask is None and term.test == "cmp"
    match term.source, term.key:
        case "payload", nft.NFT_PAYLOAD_NETWORK_HEADER:
            return _decode_address(term, family)
        case "payload", nft.NFT_PAYLOAD_TRANSPORT_HEADER if term.offset == nft.TCP_FLAGS_OFFSET:
            return _decode_syn(term)
        case "payload", nft.NFT_PAYLOAD_TRANSPORT_HEADER if term.mask is None:
            return _decode_port(term, port_sets)
        case "meta", nft.NFT_META_L4PROTO if plain and not term.negate:
            return ProtocolMatch(number(term.first))
        case "meta", nft.NFT_META_IIFNAME | nft.NFT_META_OIFNAME if plain:
            return _decode_iface(term)
        case "meta", nft.NFT_META_SKUID | nft.NFT_META_SKGID if plain:
            return OwnerMatch(_OWNERS[term.key], value, value, term.negate)
        case "meta", nft.NFT_META_SKUID | nft.NFT_META_SKGID if term.mask is None and term.test == "range":
            return OwnerMatch(_OWNERS[term.key], number(term.first), number(term.last), term.negate)
        case "meta", nft.NFT_META_MARK if term.test == "cmp":
            return MarkMatch(value, mask, term.negate)
        case "ct", nft.NFT_CT_MARK if term.test == "cmp":
            return ConnmarkMatch(value, mask, term.negate)
        case "ct", nft.NFT_CT_STATE if (term.test, term.negate, value) == ("cmp", True, 0) and 0 < mask <= _ALL_STATES:
            return StateMatch(tuple(sorted(state for state, bit in STATE_BITS.items() if mask & bit)))
        case "socket", nft.NFT_SOCKET_CGROUPV2 if (
            plain and not term.negate and cgroup and term.offset == cgroup.count("/") + 1
        ):
            return CgroupMatch(cgroup, value)
        case _:
            raise DecodeError(f"a match of {term.source} {term.key} that netapply does not make")


def _decode_iface(term: Term) -> IfaceMatch:
    data, direction = term.first, _DIRECTIONS[term.key]
    if len(data) < IFNAMSIZ:
        return IfaceMatch(direction, text(data) + "+", term.negate)
    if not any(data):
        return IfaceMatch(direction, "+", not term.negate)
    return IfaceMatch(direction, text(data), term.negate)


def _decode_address(term: Term, family: Family | None) -> AddressMatch | SetMatch:
    side = _SIDES.get((family, term.offset)) if family else None
    if family is None or side is None or term.test == "range":
        raise DecodeError("a match of a network header's field that is no address")
    full = ADDRESS_LENGTHS[family]
    if term.test == "lookup":
        if term.mask is not None or term.width != full:
            raise DecodeError("a look-up of part of an address")
        return SetMatch(side, term.set, term.negate)
    prefix = term.width * 8
    if term.mask is not None and term.width == full:
        mask = number(term.mask)
        prefix = mask.bit_count()
        if mask != ((1 << prefix) - 1) << (full * 8 - prefix):
            raise DecodeError("an address mask with holes")
    return AddressMatch(side, Cidr(term.first.ljust(full, b"\0"), prefix), term.negate)


def _decode_port(term: Term, port_sets: Mapping[str, tuple[PortRange, ...]]) -> PortMatch:
    side = _PORT_SIDES.get(term.offset)
    if side is None or term.width != 2:
        raise DecodeError("a match of a transport header's field that is no port")
    if term.test == "lookup":
        if term.set not in port_sets:
            raise DecodeError(f"ports of set {term.set}, which is not a list of ports")
        return PortMatch(side, port_sets[term.set], term.negate)
    return PortMatch(side, (PortRange(number(term.first), number(term.last)),), term.negate)


def _decode_syn(term: Term) -> SynMatch:
    if (term.test, term.mask, term.negate, term.first) != ("cmp", nft.TCP_FIRST_FLAGS, False, nft.TCP_SYN):
        raise DecodeError("a match of TCP flags that netapply does not make")
    return SynMatch()


def _decode_socket(term: Term) -> SocketMatch:
    if term.first != b"\1" or term.negate or term.mask:
        raise DecodeError("a socket match that netapply does not make")
    return SocketMatch()


def _decode_limit(item: Expression) -> LimitMatch:
    if (item.number(2), item.number(4), item.number(5)) != (60, nft.NFT_LIMIT_PKTS, 0) or not item.number(1):
        raise DecodeError("a limit that is not of packets a minute")
    return LimitMatch(item.number(1), item.number(3))
