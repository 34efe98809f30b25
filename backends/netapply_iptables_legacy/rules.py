"""Rules as entries: `Rule` to the bytes of ipt_entry or ip6t_entry, and back."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING

from netapply.errors import DecodeError, UnsupportedError
from netapply.ruleset import (
    Accept,
    AddressMatch,
    Cidr,
    Drop,
    IfaceMatch,
    Jump,
    ProtocolMatch,
    Return,
    Rule,
    SetMatch,
)
from netapply.values import NamedTuple
from netapply_iptables_legacy.entries import (
    ACCEPT,
    DROP,
    LAYOUT,
    NEXT,
    RETURN,
    TARGET_HEADER,
    Entry,
    extension,
    pack_entry,
    standard_target,
)
from netapply_wire import xtables
from netapply_wire.ipset import NO_INDEX
from netapply_wire.xtables import SET_INDEX, SET_INDEX_OFFSET, Extension

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from netapply.ruleset import Family, Match, Statement

#: Rules kept in both directions: an agent puts the same ones into many namespaces, and reads them back.
CACHED = 4096

# ipt_ip.invflags and ip6t_ip6.invflags
_INVERT_IN, _INVERT_OUT, _INVERT_SOURCE, _INVERT_DESTINATION = 1, 2, 8, 16
_IP6_PROTOCOL = 1  # IP6T_F_PROTO of ip6t_ip6.flags

#: ipt_ip, and ip6t_ip6: src, dst, smsk, dmsk, iniface, outiface, their masks, proto, (tos,) flags, invflags
_IP = {"ip": struct.Struct("=4s4s4s4s16s16s16s16sHBB"), "ip6": struct.Struct("=16s16s16s16s16s16s16s16sHxBB3x")}
_EXTENSION = struct.Struct("=H29sB")
_VERDICT = struct.Struct("=i")

_TARGETS = {"return": standard_target(RETURN), "accept": standard_target(ACCEPT), "drop": standard_target(DROP)}
_VERDICTS: dict[int, Statement] = {RETURN: Return(), ACCEPT: Accept(), DROP: Drop()}
_JUMP_TARGET = standard_target(0)


class _Part(NamedTuple):
    """One half of an address or interface test: its bytes and the mask over them."""

    value: bytes
    mask: bytes


_NO_IFACE = _Part(bytes(16), bytes(16))
_NO_ADDRESS: dict[Family, _Part] = {"ip": _Part(bytes(4), bytes(4)), "ip6": _Part(bytes(16), bytes(16))}
_INVERT = {"in": _INVERT_IN, "out": _INVERT_OUT, "src": _INVERT_SOURCE, "dst": _INVERT_DESTINATION}


# --- encode --------------------------------------------------------------------------------------------------


def encode_rule(rule: Rule, family: Family, indices: Mapping[str, int]) -> Entry:
    """The entry of a rule. `indices` are those of the sets that exist; of others it is NO_INDEX until the commit.

    Raises UnsupportedError for what an entry cannot hold: two tests of one part of the header, a long name, 0.0.0.0/0.
    """
    entry = _spell(rule, family)
    if not entry.sets:
        return entry
    data = bytearray(entry.data)
    for offset, name in entry.sets:
        SET_INDEX.pack_into(data, offset, indices.get(name, NO_INDEX))
    return entry._replace(data=bytes(data))


@lru_cache(maxsize=CACHED)
def _spell(rule: Rule, family: Family) -> Entry:
    ip, protocol = _encode_header(rule.matches, family)
    pieces: list[bytes] = []
    sets: list[tuple[int, str]] = []
    at = LAYOUT[family].size
    for match in rule.matches:
        ext = xtables.match_extension(match, protocol)
        if ext is None:
            continue
        if isinstance(match, SetMatch):
            sets.append((at + TARGET_HEADER + SET_INDEX_OFFSET, match.set))
        pieces.append(extension(*ext))
        at += len(pieces[-1])
    if rule.comment:
        pieces.append(extension(*xtables.comment_extension(rule.comment)))
    statement = rule.statement
    if isinstance(statement, Jump):
        return Entry(pack_entry(family, ip, b"".join(pieces), _JUMP_TARGET), statement.chain, tuple(sets))
    verdict = _TARGETS.get(statement.kind)
    if verdict is None:
        target = xtables.target_extension(statement, family)
        verdict = b"" if target is None else extension(*target)
    return Entry(pack_entry(family, ip, b"".join(pieces), verdict), None, tuple(sets))


def _encode_header(matches: tuple[Match, ...], family: Family) -> tuple[bytes, int]:
    none = _NO_ADDRESS[family]
    parts: dict[str, _Part] = {}
    protocol = invert = 0
    for match in matches:
        if isinstance(match, ProtocolMatch):
            if protocol:
                raise UnsupportedError("two protocols in one rule of iptables")
            protocol = match.protocol
            continue
        if isinstance(match, IfaceMatch):
            place = str(match.direction)
            part = _encode_iface(match.name)
        elif isinstance(match, AddressMatch):
            place = match.side
            part = _encode_address(match, family)
        else:
            continue
        if place in parts:
            raise UnsupportedError(f"two tests of one {match.kind} ({place}) in one rule of iptables")
        parts[place] = part
        if match.negate:
            invert |= _INVERT[place]
    source, destination = parts.get("src", none), parts.get("dst", none)
    inside, outside = parts.get("in", _NO_IFACE), parts.get("out", _NO_IFACE)
    flags = _IP6_PROTOCOL if protocol and family == "ip6" else 0
    fields = (source.value, destination.value, source.mask, destination.mask)
    names = (inside.value, outside.value, inside.mask, outside.mask)
    return _IP[family].pack(*fields, *names, protocol, flags, invert), protocol


def _encode_iface(name: str) -> _Part:
    """As xtables_parse_interface does: a wildcard keeps its `+`, out of the mask; another name compares its NUL too."""
    value = name.encode("utf-8", "surrogateescape")
    if not 0 < len(value) < 16:
        raise UnsupportedError(f"interface {name!r}: a name has 1 to 15 bytes")
    size = len(value) - 1 if value.endswith(b"+") else len(value) + 1
    return _Part(value.ljust(16, b"\0"), (b"\xff" * size).ljust(16, b"\0"))


def _encode_address(match: AddressMatch, family: Family) -> _Part:
    cidr = match.cidr
    size = len(cidr.packed)
    if cidr.family != family:
        raise UnsupportedError(f"address {cidr} in a table of family {family}")
    if not cidr.prefix and not match.negate:
        raise UnsupportedError(
            f"address {cidr}: an entry of iptables cannot tell it from no test of the address at all"
        )
    ones = (1 << cidr.prefix) - 1 << size * 8 - cidr.prefix
    return _Part(cidr.packed, ones.to_bytes(size))


# --- decode --------------------------------------------------------------------------------------------------


def decode_rule(entry: Entry, family: Family, names: Mapping[int, str]) -> Rule:
    """The rule that an entry of ours is. `names` are those of the sets, by index.

    Matches come in the order interface, address, protocol, then as they stand. Raises DecodeError where `encode_rule`
    does not write such an entry.
    """
    return _understand(entry, family, tuple(names.items()))


@lru_cache(maxsize=CACHED)
def _understand(entry: Entry, family: Family, names: tuple[tuple[int, str], ...]) -> Rule:
    matches = _decode_header(entry.data, family)
    comment = ""
    *extensions, target = _extensions(entry.data, family)
    for ext in extensions:
        if ext.name == "comment":
            comment = xtables.decode_comment(ext)
            continue
        wanted = xtables.PROTOCOL_OF.get(ext.name)
        if wanted is not None and ProtocolMatch(wanted) not in matches:
            raise DecodeError(f"match {ext.name} in a rule of another protocol: not one of ours")
        matches.append(xtables.decode_match(ext, dict(names)))
    rule = Rule(tuple(matches), _decode_target(entry, target, family), None, comment)
    try:
        header, _ = _encode_header(rule.matches, family)
    except (UnsupportedError, struct.error) as error:
        raise DecodeError("a rule of iptables is not one of ours") from error
    # The extensions were held against theirs one by one; flags and odd masks of the header are still to be.
    if not entry.data.startswith(header):
        raise DecodeError("a rule of iptables is not one of ours")
    return rule


def set_indices(entry: Entry, family: Family) -> list[int]:
    """The indices of the sets that an entry uses, once for each use."""
    if b"set\0" not in entry.data:
        return []
    return [SET_INDEX.unpack_from(ext.info)[0] for ext in _extensions(entry.data, family) if ext.name == "set"]


def _decode_header(data: bytes, family: Family) -> list[Match]:
    fields = _IP[family].unpack_from(data)
    source, destination, source_mask, destination_mask, inside, outside, _, _, protocol, _, invert = fields
    matches: list[Match] = []
    if any(inside):
        matches.append(IfaceMatch("in", _name(inside), bool(invert & _INVERT_IN)))
    if any(outside):
        matches.append(IfaceMatch("out", _name(outside), bool(invert & _INVERT_OUT)))
    if any(source_mask) or invert & _INVERT_SOURCE:
        matches.append(AddressMatch("src", _cidr(source, source_mask), bool(invert & _INVERT_SOURCE)))
    if any(destination_mask) or invert & _INVERT_DESTINATION:
        matches.append(AddressMatch("dst", _cidr(destination, destination_mask), bool(invert & _INVERT_DESTINATION)))
    if protocol:
        matches.append(ProtocolMatch(protocol))
    return matches


def _name(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _cidr(packed: bytes, mask: bytes) -> Cidr:
    return Cidr(packed, int.from_bytes(mask).bit_count())


def _extensions(data: bytes, family: Family) -> Iterator[Extension]:
    """The matches of an entry, and last its target."""
    at = LAYOUT[family].size
    while at < len(data):
        try:
            size, name, revision = _EXTENSION.unpack_from(data, at)
        except struct.error as error:
            raise DecodeError("an extension of iptables is cut off") from error
        if size < TARGET_HEADER or at + size > len(data):
            raise DecodeError(f"an extension of iptables of {size} bytes does not fit")
        yield Extension(_name(name), revision, data[at + TARGET_HEADER : at + size])
        at += size


def _decode_target(entry: Entry, target: Extension, family: Family) -> Statement:
    if entry.jump is not None:
        if entry.jump == NEXT:
            raise DecodeError("a rule of iptables without a target is not one of ours")
        return Jump(entry.jump)
    if target.name:
        return xtables.decode_target(target, family)
    (verdict,) = _VERDICT.unpack_from(target.info)
    if verdict not in _VERDICTS:
        raise DecodeError(f"a verdict of {verdict} is not one of ours")
    return _VERDICTS[verdict]
