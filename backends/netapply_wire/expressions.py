"""nf_tables expressions: what the rules of both nft dialects are made of.

Each function gives one encoded element of NFTA_RULE_EXPRESSIONS; `parse_expressions` is the way back for dumped
rules. Registers are NFT_REG_1 unless said otherwise. Numbers are those of linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from struct import Struct

from netapply.values import NamedTuple
from netapply_wire.nfnetlink import attr, iter_attributes, nested, number, parse_attributes, string, text, u32, u64

# Attributes of rules (NFTA_RULE_*), expressions (NFTA_EXPR_*), lists and data.
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_HANDLE, NFTA_RULE_EXPRESSIONS = 1, 2, 3, 4
NFTA_RULE_COMPAT, NFTA_RULE_POSITION, NFTA_RULE_USERDATA = 5, 6, 7
NFTA_LIST_ELEM, NFTA_EXPR_NAME, NFTA_EXPR_DATA = 1, 1, 2
NFTA_DATA_VALUE, NFTA_DATA_VERDICT = 1, 2
NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN = 1, 2

# Verdicts of linux/netfilter.h and nf_tables.h.
NF_DROP, NF_ACCEPT, NFT_JUMP, NFT_GOTO, NFT_RETURN = 0, 1, -3, -4, -5

# Where values are loaded from.
NFT_META_MARK, NFT_META_IIFNAME, NFT_META_OIFNAME = 3, 6, 7
NFT_META_SKUID, NFT_META_SKGID, NFT_META_NFPROTO, NFT_META_L4PROTO = 10, 11, 15, 16
NFT_CT_STATE, NFT_CT_MARK, NFT_CT_ZONE = 0, 3, 17
NFT_SOCKET_TRANSPARENT, NFT_SOCKET_CGROUPV2 = 0, 3
NFT_PAYLOAD_NETWORK_HEADER, NFT_PAYLOAD_TRANSPORT_HEADER = 1, 2

#: Where the flags stand in TCP's header; FIN, SYN, RST and ACK, and SYN alone (linux/tcp.h).
TCP_FLAGS_OFFSET, TCP_FIRST_FLAGS, TCP_SYN = 13, b"\x17", b"\x02"

# Comparisons: NFT_CMP_* and NFT_RANGE_* begin alike.
NFT_CMP_EQ, NFT_CMP_NEQ, NFT_CMP_LTE, NFT_CMP_GTE = 0, 1, 3, 5
NFT_BYTEORDER_NTOH, NFT_BYTEORDER_HTON = 0, 1
NFT_LOOKUP_F_INV = 1
NFT_NAT_DNAT, NF_NAT_RANGE_PROTO_SPECIFIED = 1, 2
NFT_LIMIT_PKTS = 0

NFTNL_UDATA_RULE_COMMENT = 0  # libnftnl/udata.h; a list of {u8 type, u8 length, value}
NFT_USERDATA_MAXLEN = 256


class Expression(NamedTuple):
    """One expression of a dumped rule: its name, and its NFTA_<NAME>_* attributes by number."""

    name: str
    attributes: dict[int, bytes]

    def number(self, kind: int, default: int = 0) -> int:
        """The value of a numeric attribute; `default` where it is absent."""
        data = self.attributes.get(kind)
        return default if data is None else number(data)


def expression(name: str, *attributes: bytes) -> bytes:
    """Any expression by its name and encoded attributes."""
    return nested(NFTA_LIST_ELEM, string(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, *attributes))


def parse_expressions(data: bytes) -> list[Expression]:
    """The expressions of a dumped rule, in order, from the payload of its NFTA_RULE_EXPRESSIONS. Raises DecodeError."""
    found: list[Expression] = []
    for _, element in iter_attributes(data):
        attributes = parse_attributes(element)
        name = text(attributes.get(NFTA_EXPR_NAME, b""))
        found.append(Expression(name, parse_attributes(attributes.get(NFTA_EXPR_DATA, b""))))
    return found


_COUNTED = Struct(">4xQ4xQ")  # NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS
#: A counter at zero as the kernel dumps it: without the flags of nested attributes.
_DUMPED_COUNTER = attr(NFTA_LIST_ELEM, string(NFTA_EXPR_NAME, "counter") + attr(NFTA_EXPR_DATA, u64(1, 0) + u64(2, 0)))
_COUNTER_HEAD = _DUMPED_COUNTER[:-24]


def split_counter(data: bytes) -> tuple[bytes, int, int]:
    """The payload of a dumped NFTA_RULE_EXPRESSIONS with its counter at zero, then the packets and bytes counted.

    The first counter is meant; without one the payload is as it was, and nothing was counted.
    """
    at = data.find(_COUNTER_HEAD)
    if 0 <= at <= len(data) - len(_DUMPED_COUNTER):  # the quick way, by the shape that all kernels have dumped so far
        octets, packets = _COUNTED.unpack_from(data, at + len(_COUNTER_HEAD))
        return data[:at] + _DUMPED_COUNTER + data[at + len(_DUMPED_COUNTER) :], packets, octets
    for item in parse_expressions(data):
        if item.name == "counter":
            return data, item.number(2), item.number(1)
    return data, 0, 0


# --- loads ---------------------------------------------------------------------------------------------------


@cache
def meta(key: int) -> bytes:
    """Load NFT_META_* of the packet; marks and ids are in host order, names 16 bytes."""
    return expression("meta", u32(2, key), u32(1, 1))


@cache
def ct(key: int) -> bytes:
    """Load NFT_CT_* of the connection, in host order."""
    return expression("ct", u32(2, key), u32(1, 1))


@cache
def payload(base: int, offset: int, length: int) -> bytes:
    """Load `length` bytes at `offset` of a header (NFT_PAYLOAD_*)."""
    return expression("payload", u32(1, 1), u32(2, base), u32(3, offset), u32(4, length))


@cache
def socket(key: int, level: int | None = None) -> bytes:
    """Load NFT_SOCKET_* of the packet's socket: one byte, or 8 of the id of its cgroup's ancestor at `level`."""
    depth = b"" if level is None else u32(3, level)
    return expression("socket", u32(1, key), u32(2, 1), depth)


# --- changes and comparisons of a loaded value ---------------------------------------------------------------


def bitwise(mask: bytes, xor: bytes | None = None) -> bytes:
    """The register becomes (register & mask) ^ xor; xor is 0 by default."""
    flip = bytes(len(mask)) if xor is None else xor
    data = nested(4, attr(NFTA_DATA_VALUE, mask)), nested(5, attr(NFTA_DATA_VALUE, flip))
    return expression("bitwise", u32(1, 1), u32(2, 1), u32(3, len(mask)), *data)


@cache
def hton(length: int) -> bytes:
    """To network order, so that a range compares numbers."""
    return expression("byteorder", u32(1, 1), u32(2, 1), u32(3, NFT_BYTEORDER_HTON), u32(4, length), u32(5, length))


def cmp(op: int, data: bytes) -> bytes:
    """Go on when the register is equal (NFT_CMP_EQ) to `data`, or another NFT_CMP_*."""
    return expression("cmp", u32(1, 1), u32(2, op), nested(3, attr(NFTA_DATA_VALUE, data)))


def in_range(first: bytes, last: bytes, *, negate: bool = False) -> bytes:
    """Go on when the register lies in first..last, compared as bytes."""
    data = nested(3, attr(NFTA_DATA_VALUE, first)), nested(4, attr(NFTA_DATA_VALUE, last))
    return expression("range", u32(1, 1), u32(2, int(negate)), *data)


def lookup(name: str, set_id: int | None = None, *, negate: bool = False) -> bytes:
    """Go on when the register is in the set; `set_id` where the set is new in the same batch and has no name yet."""
    optional = b"" if set_id is None else u32(4, set_id)
    flags = u32(5, NFT_LOOKUP_F_INV) if negate else b""
    return expression("lookup", u32(2, 1), string(1, name), optional, flags)


def limit(rate: int, burst: int) -> bytes:
    """Go on for at most `rate` packets a minute, with a burst of `burst`."""
    return expression("limit", u64(1, rate), u64(2, 60), u32(3, burst), u32(4, NFT_LIMIT_PKTS), u32(5, 0))


# --- statements ----------------------------------------------------------------------------------------------


@cache
def counter(packets: int = 0, octets: int = 0) -> bytes:
    """Count packets and bytes, beginning with these."""
    return expression("counter", u64(1, octets), u64(2, packets))


def immediate(data: bytes, register: int = 1) -> bytes:
    """Load a constant."""
    return expression("immediate", u32(1, register), nested(2, attr(NFTA_DATA_VALUE, data)))


@cache
def verdict(code: int, chain: str = "") -> bytes:
    """End the rule: NF_ACCEPT, NF_DROP, NFT_RETURN, or NFT_JUMP to `chain`."""
    target = string(NFTA_VERDICT_CHAIN, chain) if chain else b""
    return expression(
        "immediate", u32(1, 0), nested(2, nested(NFTA_DATA_VERDICT, u32(NFTA_VERDICT_CODE, code), target))
    )


@cache
def set_meta(key: int) -> bytes:
    """Packet's NFT_META_* = register."""
    return expression("meta", u32(2, key), u32(3, 1))


@cache
def set_ct(key: int) -> bytes:
    """Connection's NFT_CT_* = register."""
    return expression("ct", u32(2, key), u32(4, 1))


def redirect() -> bytes:
    """DNAT to this host at the port in the register."""
    return expression("redir", u32(1, 1), u32(3, NF_NAT_RANGE_PROTO_SPECIFIED))


def dnat(nfproto: int) -> bytes:
    """DNAT to the address in NFT_REG_1 and the port in NFT_REG_2; packets of other families go on."""
    return expression("nat", u32(1, NFT_NAT_DNAT), u32(2, nfproto), u32(3, 1), u32(5, 2))


def tproxy(nfproto: int) -> bytes:
    """Assign the transparent socket at the port in the register, and go on; break off where there is none."""
    return expression("tproxy", u32(1, nfproto), u32(3, 1))


def log(prefix: str) -> bytes:
    """Log with a prefix at level warning."""
    return expression("log", string(2, prefix))


# --- xt extensions, for iptables-nft -------------------------------------------------------------------------


def match(name: str, revision: int, info: bytes) -> bytes:
    """An xt match; `info` is padded to 8."""
    return expression("match", string(1, name), u32(2, revision), attr(3, info))


def target(name: str, revision: int, info: bytes) -> bytes:
    """An xt target; `info` is padded to 8."""
    return expression("target", string(1, name), u32(2, revision), attr(3, info))


# --- user data -----------------------------------------------------------------------------------------------


def userdata(items: Iterable[tuple[int, str]]) -> bytes:
    """User data as libnftnl has it: {u8 type, u8 length, NUL-terminated text}, the form in which nft keeps comments."""
    found = b""
    for kind, value in items:
        data = value.encode("utf-8", "surrogateescape") + b"\0"
        found += bytes((kind, len(data))) + data
    return found


def parse_userdata(data: bytes) -> dict[int, str]:
    """The texts of user data by type; what does not fit is left out."""
    found: dict[int, str] = {}
    offset = 0
    while offset + 2 <= len(data):
        kind, size = data[offset], data[offset + 1]
        found[kind] = text(data[offset + 2 : offset + 2 + size])
        offset += 2 + size
    return found
