"""xtables extensions: matches and targets as the bytes that x_tables and nft_compat take, and back.

Layouts are those of linux/netfilter/xt_*.h and linux/netfilter/nf_nat.h on a 64-bit machine, revisions those that
iptables 1.8.7 to 1.8.11 choose. An extension that iptables would write is written byte for byte as iptables does it.

Reading back, the kernel clears or fills what it keeps for itself behind the user's part (`PRIVATE`); decoding ignores
it. Decoding is strict: bytes are ours only if encoding what they mean gives the same bytes again.
"""

from __future__ import annotations

import struct
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, assert_never

from netapply.errors import DecodeError, UnsupportedError
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
from netapply.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Extension(NamedTuple):
    """A match or target: name, revision and its private structure, padded to a multiple of 8 bytes."""

    name: str
    revision: int
    info: bytes


#: Offset of the set's index (u16, host order) in the info of the match `set`: 0 until the set's index is known.
SET_INDEX_OFFSET = 0
SET_INDEX = struct.Struct("=H")

#: Names of the extensions whose info ends in kernel-private fields, and where these begin (`.usersize` of xt_*.c).
PRIVATE: Mapping[str, int] = {"limit": 8, "cgroup": 520, "CT": 64}

#: State bits of xt_conntrack.h: XT_CONNTRACK_STATE_BIT of ip_conntrack_info, INVALID and UNTRACKED.
STATE_BITS: Mapping[CtState, int] = {"established": 2, "invalid": 1, "new": 8, "related": 4, "untracked": 0x100}

LIMIT_SCALE = 10000  # XT_LIMIT_SCALE: a limit is kept as 1/10000 seconds from packet to packet
PER_MINUTE = 60 * LIMIT_SCALE
COMMENT_SIZE = 256  # XT_MAX_COMMENT_LEN
PATH_SIZE = 512  # of xt_cgroup_info_v2
ALL_BITS = 0xFFFFFFFF
ALL_PORTS = PortRange(0, 65535)
MULTIPORT_SLOTS = 15  # XT_MULTI_PORTS
#: Matches that the kernel takes in a rule of this protocol alone.
PROTOCOL_OF: Mapping[str, int] = {"tcp": 6, "udp": 17}

_TCP = struct.Struct("=4H3xB4x")  # xt_tcp: spts[2], dpts[2], option, flg_mask, flg_cmp, invflags
_UDP = struct.Struct("=4HB7x")  # xt_udp: spts[2], dpts[2], invflags
_MULTIPORT = struct.Struct("=BB15H15sB")  # xt_multiport_v1: flags, count, ports, pflags, invert
_OWNER = struct.Struct("=4IBB6x")  # xt_owner_match_info: uid_min, uid_max, gid_min, gid_max, match, invert
_CGROUP = struct.Struct("=BBBB512s12x")  # xt_cgroup_info_v2: has_path, has_classid, invert_path, invert_classid, path
_MARK = struct.Struct("=IIB7x")  # xt_mark_mtinfo1, xt_connmark_mtinfo1: mark, mask, invert
_CONNTRACK = struct.Struct("=146xHHH16x")  # xt_conntrack_mtinfo3: match_flags, invert_flags, state_mask
_LIMIT = struct.Struct("=II32x")  # xt_rateinfo: avg, burst
_SET = struct.Struct("=HBB44x")  # xt_set_info_match_v4: index, dim, flags
_REDIRECT = {"ip": struct.Struct("=II8xHH4x"), "ip6": struct.Struct("=I32xHH")}  # compat_multi_range; nf_nat_range
_DNAT = struct.Struct("=I16s16sHH8x")  # nf_nat_range2: flags, min_addr, max_addr, min_proto, max_proto
_TPROXY = struct.Struct("=II16xH6x")  # xt_tproxy_target_info_v1: mark_mask, mark_value, laddr, lport
_MARK_TARGET = struct.Struct("=II")  # xt_mark_tginfo2: mark, mask
_CONNMARK_TARGET = struct.Struct("=IIIBBBx")  # xt_connmark_tginfo2: ctmark, ctmask, nfmask, shift_dir, shift_bits, mode
_CT = struct.Struct("=HH68x")  # xt_ct_target_info_v1: flags, zone
_LOG = struct.Struct("=BB30s")  # xt_log_info: level, logflags, prefix

_SOCKETS = {  # xt_socket_mtinfo3: flags XT_SOCKET_TRANSPARENT, or none
    transparent: Extension("socket", 3, bytes([transparent]) + bytes(7)) for transparent in (True, False)
}
_SYN = Extension("tcp", 0, struct.pack("=4HxBB5x", 0, 65535, 0, 65535, 0x17, 0x02))  # of FIN, SYN, RST, ACK: SYN
_SAVE_MARK = Extension("CONNMARK", 2, _CONNMARK_TARGET.pack(0, ALL_BITS, ALL_BITS, 0, 0, 1))
_RESTORE_MARK = Extension("CONNMARK", 2, _CONNMARK_TARGET.pack(0, ALL_BITS, ALL_BITS, 0, 0, 2))
_CONNTRACK_STATE = 1  # XT_CONNTRACK_STATE
_RANGE_PORT = 2  # NF_NAT_RANGE_PROTO_SPECIFIED
_RANGE_ADDRESS = 1  # NF_NAT_RANGE_MAP_IPS
_LOG_WARNING = 4  # the level that iptables logs with by default

# --- matches -------------------------------------------------------------------------------------------------


def match_extension(match: Match, protocol: int) -> Extension | None:
    """The extension of a match; None for what lives in the ip header (interface, address, protocol).

    `protocol` is the rule's, 6 or 17, for ports. A SetMatch has index 0 (see `SET_INDEX_OFFSET`).
    Raises UnsupportedError for what xtables cannot store.
    """
    match match:
        case IfaceMatch() | AddressMatch() | ProtocolMatch():
            return None
        case PortMatch():
            return _port_extension(match, protocol)
        case SynMatch():
            return _SYN
        case SetMatch():
            return Extension("set", 4, _SET.pack(0, 1, (2 if match.side == "src" else 0) | match.negate))
        case OwnerMatch(first=first, last=last):
            uid = match.id == "uid"
            bit, span = (1, (first, last, 0, 0)) if uid else (2, (0, 0, first, last))
            return Extension("owner", 1, _OWNER.pack(*span, bit, bit if match.negate else 0))
        case CgroupMatch():
            path = match.path.encode()
            if len(path) >= PATH_SIZE:
                raise UnsupportedError(f"a cgroup path of {len(path)} bytes; xt_cgroup stores {PATH_SIZE - 1}")
            return Extension("cgroup", 2, _CGROUP.pack(1, 0, match.negate, 0, path))
        case MarkMatch():
            return Extension("mark", 1, _MARK.pack(match.value, match.mask, match.negate))
        case ConnmarkMatch():
            return Extension("connmark", 1, _MARK.pack(match.value, match.mask, match.negate))
        case StateMatch():
            bits = sum(STATE_BITS[state] for state in match.states)
            return Extension("conntrack", 3, _CONNTRACK.pack(_CONNTRACK_STATE, 0, bits))
        case SocketMatch():
            return _SOCKETS[match.transparent]
        case LimitMatch():
            return _limit_extension(match)
        case _:
            assert_never(match)


@lru_cache(maxsize=2048)
def _port_extension(match: PortMatch, protocol: int) -> Extension:
    ranges, source = match.ranges, match.side == "src"
    # A full range in xt_tcp says nothing of its side, so that one is written as multiport too.
    if len(ranges) == 1 and ranges[0] != ALL_PORTS:
        pairs = (*ranges[0], *ALL_PORTS) if source else (*ALL_PORTS, *ranges[0])
        invert = (1 if source else 2) if match.negate else 0
        if protocol == 6:
            return Extension("tcp", 0, _TCP.pack(*pairs, invert))
        return Extension("udp", 0, _UDP.pack(*pairs, invert))
    ports: list[int] = []
    continues = bytearray(MULTIPORT_SLOTS)  # pflags: 1 where a range begins
    for first, last in ranges:
        if first != last:
            continues[len(ports) : len(ports) + 1] = b"\1"
            ports.append(first)
        ports.append(last)
    if not 0 < len(ports) <= MULTIPORT_SLOTS:
        raise UnsupportedError(f"{len(ports)} port slots in one match; multiport has 1 to {MULTIPORT_SLOTS}")
    padded = ports + [0] * (MULTIPORT_SLOTS - len(ports))
    info = _MULTIPORT.pack(0 if source else 1, len(ports), *padded, bytes(continues), match.negate)
    return Extension("multiport", 1, info)


def _limit_extension(match: LimitMatch) -> Extension:
    interval = PER_MINUTE // match.rate
    if not interval or PER_MINUTE // interval != match.rate:
        raise UnsupportedError(f"a limit of {match.rate} a minute; xt_limit cannot tell it from its neighbours")
    return Extension("limit", 0, _LIMIT.pack(interval, match.burst))


def decode_match(ext: Extension, sets: Mapping[int, str] = {}) -> Match:
    """What an extension of a rule of ours matches. `sets` names the sets by their kernel index.

    Raises DecodeError for an extension that `match_extension` does not write.
    """
    return _decode(ext, sets) if ext.name == "set" else _known(ext)


def _decode(ext: Extension, sets: Mapping[int, str] = {}) -> Match:
    try:
        found = _parse_match(ext, sets)
        again = None if found is None else match_extension(found, PROTOCOL_OF.get(ext.name, 6))
    except (struct.error, IndexError, UnicodeDecodeError, ArithmeticError, UnsupportedError):
        found = again = None
    if found is None or again is None or not _same(ext, again):
        raise DecodeError(f"match {ext.name} revision {ext.revision}: not one of ours")
    return found


#: The same tests come in both families, and again in each read-back.
_known = lru_cache(maxsize=2048)(_decode)


def _parse_match(ext: Extension, sets: Mapping[int, str]) -> Match | None:
    name, _, info = ext
    if ext == _SYN:
        return SynMatch()
    if name in PROTOCOL_OF:
        first_s, last_s, first_d, last_d, invert = (_TCP if name == "tcp" else _UDP).unpack(info)
        if (first_d, last_d) == ALL_PORTS:
            return PortMatch("src", (PortRange(first_s, last_s),), bool(invert))
        return PortMatch("dst", (PortRange(first_d, last_d),), bool(invert))
    if name == "multiport":
        return _parse_multiport(info)
    if name == "set":
        index, _, flags = _SET.unpack(info)
        return SetMatch("src" if flags & 2 else "dst", sets[index], bool(flags & 1)) if index in sets else None
    if name == "owner":
        first_u, last_u, first_g, last_g, bit, invert = _OWNER.unpack(info)
        return (
            OwnerMatch("uid", first_u, last_u, bool(invert))
            if bit == 1
            else OwnerMatch("gid", first_g, last_g, bool(invert))
        )
    if name == "cgroup":
        _, _, invert, _, path = _CGROUP.unpack(info)
        return CgroupMatch(_text(path), 0, bool(invert))
    if name in ("mark", "connmark"):
        value, mask, invert = _MARK.unpack(info)
        return MarkMatch(value, mask, bool(invert)) if name == "mark" else ConnmarkMatch(value, mask, bool(invert))
    if name == "conntrack":
        _, _, bits = _CONNTRACK.unpack(info)
        return StateMatch(tuple(state for state, bit in STATE_BITS.items() if bits & bit))
    if name == "socket":
        return SocketMatch(transparent=info[0] == 1)
    if name == "limit":
        interval, burst = _LIMIT.unpack(info)
        return LimitMatch(PER_MINUTE // interval, burst)
    return None


def _parse_multiport(info: bytes) -> PortMatch | None:
    side, count, *ports, pflags, invert = _MULTIPORT.unpack(info)
    if count > MULTIPORT_SLOTS:
        return None
    ranges: list[PortRange] = []
    slot = 0
    while slot < count:
        last = slot + 1 if pflags[slot] and slot + 1 < count else slot
        ranges.append(PortRange(ports[slot], ports[last]))
        slot = last + 1
    return PortMatch("dst" if side else "src", tuple(ranges), bool(invert))


def comment_extension(comment: str) -> Extension:
    """A rule's comment, as the match `comment`. iptables writes it wherever it stood; we write it last."""
    text = comment.encode()
    if len(text) >= COMMENT_SIZE:
        raise UnsupportedError(f"a comment of {len(text)} bytes; xt_comment stores {COMMENT_SIZE - 1}")
    return Extension("comment", 0, text.ljust(COMMENT_SIZE, b"\0"))


def decode_comment(ext: Extension) -> str:
    """The text of a `comment` match. Raises DecodeError."""
    try:
        return _text(ext.info)
    except UnicodeDecodeError as error:
        raise DecodeError("match comment: the text is not UTF-8") from error


# --- targets -------------------------------------------------------------------------------------------------


def target_extension(statement: Statement, family: Family) -> Extension | None:
    """The extension of a statement; None for a standard verdict or jump. Raises UnsupportedError."""
    match statement:
        case Jump() | Return() | Accept() | Drop():
            return None
        case Redirect():
            port = _swap(statement.port)
            before = (1, _RANGE_PORT) if family == "ip" else (_RANGE_PORT,)  # v4 has a count of ranges: 1
            return Extension("REDIRECT", 0, _REDIRECT[family].pack(*before, port, port))
        case Dnat(address=address):
            if len(address) != (4 if family == "ip" else 16):
                raise UnsupportedError(f"DNAT to an address of {len(address)} bytes in family {family}")
            port = _swap(statement.port)
            return Extension("DNAT", 2, _DNAT.pack(_RANGE_ADDRESS | _RANGE_PORT, address, address, port, port))
        case TProxy():
            return Extension("TPROXY", 1, _TPROXY.pack(statement.mask, statement.mark, _swap(statement.port)))
        case SetMark():
            return Extension("MARK", 2, _MARK_TARGET.pack(statement.value, statement.mask))
        case SaveMark():
            return _SAVE_MARK
        case RestoreMark():
            return _RESTORE_MARK
        case SetConnmark():
            return Extension("CONNMARK", 2, _CONNMARK_TARGET.pack(statement.value, statement.mask, ALL_BITS, 0, 0, 0))
        case SetZone():
            return Extension("CT", 2, _CT.pack(0, statement.zone))
        case Log():
            prefix = statement.prefix.encode()
            if len(prefix) > 29:
                raise UnsupportedError(f"a log prefix of {len(prefix)} bytes; xt_LOG stores 29")
            return Extension("LOG", 0, _LOG.pack(_LOG_WARNING, 0, prefix))
        case _:
            assert_never(statement)


def decode_target(ext: Extension, family: Family) -> Statement:
    """What a target of a rule of ours does. Raises DecodeError for one that `target_extension` does not write."""
    try:
        found = _parse_target(ext, family)
        again = None if found is None else target_extension(found, family)
    except (struct.error, UnicodeDecodeError, UnsupportedError):
        found = again = None
    if found is None or again is None or not _same(ext, again):
        raise DecodeError(f"target {ext.name} revision {ext.revision}: not one of ours")
    return found


def _parse_target(ext: Extension, family: Family) -> Statement | None:
    name, _, info = ext
    if name == "REDIRECT":
        return Redirect(_swap(_REDIRECT[family].unpack(info)[-1]))
    if name == "DNAT":
        _, address, _, port, _ = _DNAT.unpack(info)
        return Dnat(address[: 4 if family == "ip" else 16], _swap(port))
    if name == "TPROXY":
        mask, value, port = _TPROXY.unpack(info)
        return TProxy(_swap(port), value, mask)
    if name == "MARK":
        return SetMark(*_MARK_TARGET.unpack(info))
    if name == "CONNMARK":
        value, mask, *_, mode = _CONNMARK_TARGET.unpack(info)
        return SetConnmark(value, mask) if mode == 0 else SaveMark() if mode == 1 else RestoreMark()
    if name == "CT":
        return SetZone(_CT.unpack(info)[1])
    if name == "LOG":
        return Log(_text(_LOG.unpack(info)[2]))
    return None


# --- bytes ---------------------------------------------------------------------------------------------------


def _same(ext: Extension, again: Extension) -> bool:
    """Whether both are one extension, apart from what the kernel keeps for itself and a set's index."""
    start = SET_INDEX.size if ext.name == "set" else 0
    end = PRIVATE.get(ext.name, len(ext.info))
    return ext[:2] == again[:2] and len(ext.info) == len(again.info) and ext.info[start:end] == again.info[start:end]


def _swap(port: int) -> int:
    """A port between host order and the network order of NAT ranges, on a machine of either order."""
    return int.from_bytes(port.to_bytes(2, "big"), sys.byteorder)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode()
