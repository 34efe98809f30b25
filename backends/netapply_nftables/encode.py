"""A rule as nf_tables expressions: what nft(8) itself would send for the text that `render` prints.

The guard `meta nfproto` of a rule that is for one family stands after its interface matches. Fewer expressions make
a faster commit (the kernel looks each one up by name), so a range is one `range`, not two comparisons.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import assert_never

from netapply.errors import UnsupportedError
from netapply.ruleset import (
    Accept,
    AddressMatch,
    CgroupMatch,
    ConnmarkMatch,
    CtState,
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
    SocketMatch,
    StateMatch,
    Statement,
    SynMatch,
    TProxy,
)
from netapply_wire import expressions as nft
from netapply_wire.nfnetlink import NFPROTO, attr, nested

ALL_BITS = 0xFFFFFFFF
#: NF_CT_STATE_BIT of linux/netfilter/nf_conntrack_common.h
STATE_BITS: dict[CtState, int] = {"invalid": 1, "established": 2, "related": 4, "new": 8, "untracked": 64}
#: Offset of source and destination address in the network header.
ADDRESS_OFFSETS: dict[Family, dict[str, int]] = {"ip": {"src": 12, "dst": 16}, "ip6": {"src": 8, "dst": 24}}
ADDRESS_LENGTHS: dict[Family, int] = {"ip": 4, "ip6": 16}
PORT_OFFSETS = {"src": 0, "dst": 2}
OWNER_KEYS = {"uid": nft.NFT_META_SKUID, "gid": nft.NFT_META_SKGID}
IFACE_KEYS = {"in": nft.NFT_META_IIFNAME, "out": nft.NFT_META_OIFNAME}
IFNAMSIZ = 16
#: User data of ours: the path of a cgroup match, as the kernel keeps only its id. nft skips types it does not know.
UDATA_CGROUP_PATH = 0x70

#: Makes an anonymous set of these port ranges in the same batch, and gives the set's id there.
PortSet = Callable[[tuple[PortRange, ...]], int]

_BE16 = Struct(">H")
_BE32 = Struct(">I")
_HOST16 = Struct("=H")
_HOST32 = Struct("=I")
_GUARDS: dict[Family, bytes] = {
    family: nft.meta(nft.NFT_META_NFPROTO) + nft.cmp(nft.NFT_CMP_EQ, bytes((NFPROTO[family],)))
    for family in ADDRESS_LENGTHS
}


def encode_rule(rule: Rule, port_set: PortSet) -> list[bytes]:
    """The rule's NFTA_RULE_EXPRESSIONS and NFTA_RULE_USERDATA: one kernel rule, or two for a TProxy.

    tproxy breaks off, and lets the packet pass, where nobody listens; the xt target drops it, and so does our
    second rule, which has the same matches and no counter. Raises UnsupportedError.
    """
    matches = _encode_matches(rule, port_set)
    data = _userdata(rule)
    first = nested(nft.NFTA_RULE_EXPRESSIONS, matches, nft.counter(), _encode_statement(rule.statement, rule.family))
    if not isinstance(rule.statement, TProxy):
        return [first + data]
    again = _encode_matches(rule, port_set)  # an anonymous set belongs to one rule
    return [first + data, nested(nft.NFTA_RULE_EXPRESSIONS, again, nft.verdict(nft.NF_DROP)) + data]


def _encode_matches(rule: Rule, port_set: PortSet) -> bytes:
    family = rule.family
    found: list[bytes] = []
    guarded = family is None
    for match in rule.matches:
        if not guarded and not isinstance(match, IfaceMatch):
            found.append(_guard(family))
            guarded = True
        if isinstance(match, PortMatch) and len(match.ranges) > 1:
            found.append(_load_port(match))
            found.append(nft.lookup("__set%d", port_set(match.ranges), negate=match.negate))
        else:
            found.append(_encode_match(match, family))
    if not guarded:
        found.append(_guard(family))
    return b"".join(found)


def _guard(family: Family | None) -> bytes:
    return _GUARDS[family] if family else b""


@lru_cache(4096)
def _encode_match(match: Match, family: Family | None) -> bytes:
    match match:
        case IfaceMatch():
            return nft.meta(IFACE_KEYS[match.direction]) + _iface(match)
        case AddressMatch():
            return _address(match, family)
        case SetMatch():
            if family is None:
                raise UnsupportedError(f"a match of set {match.set} needs a rule that is for one family")
            load = _load_address(match.side, family, ADDRESS_LENGTHS[family])
            return load + nft.lookup(match.set, negate=match.negate)
        case ProtocolMatch():
            return nft.meta(nft.NFT_META_L4PROTO) + nft.cmp(nft.NFT_CMP_EQ, bytes((match.protocol,)))
        case PortMatch():
            if not match.ranges:
                raise UnsupportedError("a match of no ports at all")
            first, last = match.ranges[0]
            return _load_port(match) + _within(_BE16.pack(first), _BE16.pack(last), negate=match.negate)
        case SynMatch():
            flags = nft.payload(nft.NFT_PAYLOAD_TRANSPORT_HEADER, nft.TCP_FLAGS_OFFSET, 1)
            return flags + nft.bitwise(nft.TCP_FIRST_FLAGS) + nft.cmp(nft.NFT_CMP_EQ, nft.TCP_SYN)
        case OwnerMatch():
            return _owner(match)
        case CgroupMatch():
            if not match.path:
                raise UnsupportedError("the root cgroup holds every process: a match of it says nothing")
            if match.negate:
                raise UnsupportedError(f"nft_socket cannot tell that a socket is not in cgroup {match.path}")
            level = nft.socket(nft.NFT_SOCKET_CGROUPV2, match.path.count("/") + 1)
            return level + nft.cmp(nft.NFT_CMP_EQ, match.id.to_bytes(8, sys.byteorder))
        case MarkMatch():
            return nft.meta(nft.NFT_META_MARK) + _masked(match)
        case ConnmarkMatch():
            return nft.ct(nft.NFT_CT_MARK) + _masked(match)
        case StateMatch():
            bits = _HOST32.pack(sum(STATE_BITS[state] for state in match.states))
            return nft.ct(nft.NFT_CT_STATE) + nft.bitwise(bits) + nft.cmp(nft.NFT_CMP_NEQ, bytes(4))
        case SocketMatch(transparent=False):
            raise UnsupportedError("native nftables is asked for transparent sockets alone")
        case SocketMatch():
            # Not `socket wildcard` too: nft_socket.c knows none of a connection whose handshake is not done.
            return nft.socket(nft.NFT_SOCKET_TRANSPARENT) + nft.cmp(nft.NFT_CMP_EQ, b"\1")
        case LimitMatch():
            if match.rate < 1 or match.burst < 1:
                raise UnsupportedError(f"a limit of {match.rate} a minute, burst {match.burst}, lets nothing through")
            return nft.limit(match.rate, match.burst)
        case _:
            assert_never(match)


def _iface(match: IfaceMatch) -> bytes:
    name = match.name.encode("utf-8", "surrogateescape")
    if len(name) >= IFNAMSIZ + name.endswith(b"+"):
        raise UnsupportedError(f"{match.name!r} is longer than an interface name can be")
    if name == b"+":  # any interface: the name is not empty
        return nft.cmp(int(not match.negate), bytes(IFNAMSIZ))
    return nft.cmp(int(match.negate), name[:-1] if name.endswith(b"+") else name.ljust(IFNAMSIZ, b"\0"))


def _address(match: AddressMatch, family: Family | None) -> bytes:
    packed, prefix = match.cidr
    if family is None or match.cidr.family != family:
        raise UnsupportedError(f"a match of {match.cidr} needs a rule of family {match.cidr.family}, not {family}")
    octets, bits = divmod(prefix, 8)
    if octets and not bits:  # whole bytes: load and compare only these
        return _load_address(match.side, family, octets) + nft.cmp(int(match.negate), packed[:octets])
    mask = (((1 << prefix) - 1) << (len(packed) * 8 - prefix)).to_bytes(len(packed))
    return _load_address(match.side, family, len(packed)) + nft.bitwise(mask) + nft.cmp(int(match.negate), packed)


def _load_address(side: str, family: Family, length: int) -> bytes:
    return nft.payload(nft.NFT_PAYLOAD_NETWORK_HEADER, ADDRESS_OFFSETS[family][side], length)


def _load_port(match: PortMatch) -> bytes:
    return nft.payload(nft.NFT_PAYLOAD_TRANSPORT_HEADER, PORT_OFFSETS[match.side], 2)


def _within(first: bytes, last: bytes, *, negate: bool) -> bytes:
    if first > last:
        raise UnsupportedError(
            f"a range whose first, {int.from_bytes(first)}, is beyond its last, {int.from_bytes(last)}"
        )
    return nft.cmp(int(negate), first) if first == last else nft.in_range(first, last, negate=negate)


def _owner(match: OwnerMatch) -> bytes:
    load = nft.meta(OWNER_KEYS[match.id])
    if match.first == match.last:
        return load + nft.cmp(int(match.negate), _HOST32.pack(match.first))
    return load + nft.hton(4) + _within(_BE32.pack(match.first), _BE32.pack(match.last), negate=match.negate)


def _masked(match: MarkMatch | ConnmarkMatch) -> bytes:
    mask = b"" if match.mask == ALL_BITS else nft.bitwise(_HOST32.pack(match.mask))
    return mask + nft.cmp(int(match.negate), _HOST32.pack(match.value))


@lru_cache(1024)
def _encode_statement(statement: Statement, family: Family | None) -> bytes:
    match statement:
        case Jump():
            return nft.verdict(nft.NFT_JUMP, statement.chain)
        case Return():
            return nft.verdict(nft.NFT_RETURN)
        case Accept():
            return nft.verdict(nft.NF_ACCEPT)
        case Drop():
            return nft.verdict(nft.NF_DROP)
        case Redirect():
            return nft.immediate(_BE16.pack(statement.port)) + nft.redirect()
        case Dnat():
            nfproto = NFPROTO["ip" if len(statement.address) == 4 else "ip6"]
            port = nft.immediate(_BE16.pack(statement.port), 2)
            return nft.immediate(statement.address) + port + nft.dnat(nfproto)
        case TProxy():
            assign = nft.immediate(_BE16.pack(statement.port)) + nft.tproxy(NFPROTO[family] if family else 0)
            mark = _set_bits(statement, nft.meta(nft.NFT_META_MARK), nft.set_meta(nft.NFT_META_MARK))
            return assign + mark + nft.verdict(nft.NF_ACCEPT)
        case SetMark():
            return _set_bits(statement, nft.meta(nft.NFT_META_MARK), nft.set_meta(nft.NFT_META_MARK))
        case SaveMark():
            return nft.meta(nft.NFT_META_MARK) + nft.set_ct(nft.NFT_CT_MARK)
        case RestoreMark():
            return nft.ct(nft.NFT_CT_MARK) + nft.set_meta(nft.NFT_META_MARK)
        case SetConnmark():
            return _set_bits(statement, nft.ct(nft.NFT_CT_MARK), nft.set_ct(nft.NFT_CT_MARK))
        case SetZone():
            return nft.immediate(_HOST16.pack(statement.zone)) + nft.set_ct(nft.NFT_CT_ZONE)
        case Log():
            return nft.log(statement.prefix)
        case _:
            assert_never(statement)


def _set_bits(statement: TProxy | SetMark | SetConnmark, load: bytes, store: bytes) -> bytes:
    """(mark & ~mask) ^ value, and no load where the mask leaves nothing of the old mark."""
    value = statement.mark if isinstance(statement, TProxy) else statement.value
    if statement.mask == ALL_BITS:
        return nft.immediate(_HOST32.pack(value)) + store
    return load + nft.bitwise(_HOST32.pack(~statement.mask & ALL_BITS), _HOST32.pack(value)) + store


def _userdata(rule: Rule) -> bytes:
    items = [(nft.NFTNL_UDATA_RULE_COMMENT, rule.comment)] if rule.comment else []
    items += [(UDATA_CGROUP_PATH, match.path) for match in rule.matches if isinstance(match, CgroupMatch)]
    if not items:
        return b""
    if (
        any(len(text.encode("utf-8", "surrogateescape")) > 254 for _, text in items)
        or len(data := nft.userdata(items)) > nft.NFT_USERDATA_MAXLEN
    ):
        raise UnsupportedError("a rule's comment and cgroup path are together longer than the kernel's 256 bytes")
    return attr(nft.NFTA_RULE_USERDATA, data)
