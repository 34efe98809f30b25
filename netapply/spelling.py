"""How single values of a plan are spelled: one reader a kind, for plan files and importers alike. Pure.

A reader takes what YAML, JSON or TOML yields, or a piece of a command line, and returns the typed value. It raises
`RefusedError` whose text is the accepted form in plain words; the caller knows the place and the value.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from netapply.plan import Cgroup, IdRange, Mark
from netapply.ruleset import Cidr, PortRange
from netapply.sockets import socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from netapply.lookups import Lookups

NAME = r"[A-Za-z_][A-Za-z0-9_.-]{0,30}\$?"  # useradd(8), and the dots that many sites allow
#: dev_valid_name() of net/core/dev.c, less what quoting in rule listings cannot carry; `+` only as a wildcard's end.
_IFACE_CHARACTER = r"[!#-&(),\-.0-9;-\[\]-~]"
INTERFACE = rf"(?!\.{{1,2}}$)(?=.{{1,15}}$){_IFACE_CHARACTER}*\+?"
LOG_PREFIX = r"[ !#-\[\]-~]{1,29}"
#: At most 511 bytes: XT_CGROUP_PATH_BUF of linux/netfilter/xt_cgroup.h.
CGROUP = r"(?!.*(?:^|/)\.{0,2}(?:/|$))[!-~]{1,511}"
PORT = r"[1-9][0-9]{0,4}"
NUMBER = r"(?:0|[1-9][0-9]{0,9})"
MARK_NUMBER = r"(?:0[xX][0-9a-fA-F]{1,8}|0|[1-9][0-9]{0,9})"

ID_MAX = 0xFFFFFFFE  # (uid_t)-1 is "no id"
_MAPPED = b"\0" * 10 + b"\xff\xff"
# By the bits of the family: prefix lengths by their text, and the host bits that they leave.
_LENGTHS = {bits: {str(prefix): prefix for prefix in range(bits + 1)} for bits in (32, 128)}
_HOST_BITS = {bits: [((1 << bits) - 1) >> prefix for prefix in range(bits + 1)] for bits in (32, 128)}

_ports = re.compile(rf"({PORT})(?:-({PORT}))?")
_ids = re.compile(rf"({NUMBER})(?:-({NUMBER}))?")
_name = re.compile(NAME)
_mark = re.compile(rf"({MARK_NUMBER})(?:/({MARK_NUMBER}))?")
_interface = re.compile(INTERFACE)
_log_prefix = re.compile(LOG_PREFIX)
_cgroup = re.compile(CGROUP)


class RefusedError(ValueError):
    """The value is not accepted; the text says what is."""


def read_number(value: object, low: int, high: int, accepted: str) -> int:
    """A whole number low..high, as a number or in decimal digits."""
    if isinstance(value, str) and len(value) < 12 and value.isascii() and value.isdigit() and str(int(value)) == value:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RefusedError(accepted)
    return value


def read_port(value: object) -> int:
    """A port: 8080 or "8080"."""
    return read_number(value, 1, 65535, "a port is a number from 1 to 65535")


def read_port_range(value: object) -> PortRange:
    """A port or a range: 8080, "8080" or "8000-8100"."""
    if isinstance(value, str) and (found := _ports.fullmatch(value)):
        first, last = int(found[1]), int(found[2] or found[1])
    else:
        first = last = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if not 1 <= first <= last <= 65535:
        raise RefusedError("write a port from 1 to 65535, or a range such as 8000-8100")
    return PortRange(first, last)


def write_range(value: PortRange | IdRange) -> int | str:
    """8080 or "8000-8100"; ids likewise."""
    return value.first if value.first == value.last else f"{value.first}-{value.last}"


def read_id_range(value: object, lookup: Callable[[str], int | None], what: str) -> IdRange:
    """Ids or a name: 1000, "1000", "2000-2999" or "envoy". `what` is "user" or "group"."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RefusedError(f"write a {what} id, a range such as 2000-2999, or a {what}'s name")
    if found := _ids.fullmatch(value):
        first, last = int(found[1]), int(found[2] or found[1])
        if first > last or last > ID_MAX:
            raise RefusedError(f"{what} ids are 0 to {ID_MAX}, the smaller one first")
        return IdRange(first, last)
    known = lookup(value) if _name.fullmatch(value) else None
    if known is None:
        raise RefusedError(f"write a {what} id, a range such as 2000-2999, or the name of a {what} that exists here")
    return IdRange(known, known)


def read_uid_range(value: object, lookups: Lookups) -> IdRange:
    """User ids or a user's name."""
    return read_id_range(value, lookups.uid, "user")


def read_gid_range(value: object, lookups: Lookups) -> IdRange:
    """Group ids or a group's name."""
    return read_id_range(value, lookups.gid, "group")


def read_uid(value: object, lookups: Lookups) -> int:
    """One user id, or a user's name."""
    return _single(read_uid_range(value, lookups), "user")


def read_gid(value: object, lookups: Lookups) -> int:
    """One group id, or a group's name."""
    return _single(read_gid_range(value, lookups), "group")


def _single(ids: IdRange, what: str) -> int:
    if ids.first != ids.last:
        raise RefusedError(f"write one {what} id or name an entry; a range is not possible here")
    return ids.first


def read_cgroup(value: object, lookups: Lookups) -> Cgroup:
    """A cgroup v2 path below the root, "system.slice/envoy.service"."""
    if not isinstance(value, str) or not _cgroup.fullmatch(value):
        raise RefusedError("write a cgroup v2 path below its root, such as system.slice/envoy.service")
    return Cgroup(value, lookups.cgroup(value))


def read_mark(value: object) -> Mark:
    """A packet mark: 1337, "0x539" or "0x539/0xfff"."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    found = _mark.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise RefusedError("write a mark as a number, or as value/mask such as 0x539/0xfff")
    number, mask = int(found[1], 0), int(found[2] or "0xffffffff", 0)
    if not 0 < mask <= 0xFFFFFFFF or number & ~mask:
        raise RefusedError("the mask is 1 to 0xffffffff, and the value has no bits outside of it")
    if not number:
        raise RefusedError("write a value other than 0, which every unmarked packet carries")
    return Mark(number, mask)


def write_mark(mark: Mark) -> str:
    """Hexadecimal: "0x539", or "0x539/0xfff" where the mask is not all ones."""
    return hex(mark.value) if mark.mask == 0xFFFFFFFF else f"{mark.value:#x}/{mark.mask:#x}"


def read_cidr(value: object) -> Cidr:
    """An address block without host bits: "10.0.0.0/8", "fd00::/8", "10.0.0.1" (a /32), "::1" (a /128)."""
    if not isinstance(value, str):
        raise RefusedError("write an address or a block, such as 10.0.0.0/8 or fd00::/8")
    address, slash, length = value.partition("/")
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except (OSError, ValueError):  # ValueError: a NUL or a lone surrogate
        zone = "without a zone id" if "%" in address else "such as 10.0.0.0/8 or fd00::/8"
        raise RefusedError(f"write an address or a block, {zone}") from None
    bits = len(packed) * 8
    prefix = _LENGTHS[bits].get(length) if slash else bits
    if prefix is None:
        raise RefusedError(f"the length of the prefix is 0 to {bits}")
    if bits == 128 and prefix >= 96 and packed[:12] == _MAPPED:
        raise RefusedError("write an IPv4-mapped address as plain IPv4")
    number = int.from_bytes(packed, "big")
    if host := number & _HOST_BITS[bits][prefix]:
        network = Cidr((number - host).to_bytes(len(packed), "big"), prefix)
        raise RefusedError(f"a block has no host bits: {network}, or the address alone")
    return Cidr(packed, prefix)


def write_cidr(cidr: Cidr) -> str:
    """As in "10.0.0.0/8"; a single address without its length."""
    kind = socket.AF_INET if len(cidr.packed) == 4 else socket.AF_INET6
    address = socket.inet_ntop(kind, cidr.packed)
    return address if cidr.prefix == len(cidr.packed) * 8 else f"{address}/{cidr.prefix}"


def read_loopback(value: object) -> Cidr:
    """A block of 127.0.0.0/8, or ::1."""
    cidr = read_cidr(value)
    if cidr.family == "ip":
        inside = cidr.packed[0] == 127 and cidr.prefix >= 8
    else:
        inside = cidr == Cidr(b"\0" * 15 + b"\1", 128)
    if not inside:
        raise RefusedError("write a block inside 127.0.0.0/8, or ::1")
    return cidr


def read_address(value: object) -> bytes:
    """One address, packed."""
    cidr = read_cidr(value)
    if isinstance(value, str) and "/" in value:
        raise RefusedError("write a single address, without a prefix length")
    return cidr.packed


def write_address(packed: bytes) -> str:
    """The address as text."""
    return write_cidr(Cidr(packed, len(packed) * 8))


def read_interface(value: object) -> str:
    """An interface name, or a prefix of names with a trailing `+`."""
    if not isinstance(value, str) or not _interface.fullmatch(value):
        raise RefusedError("write an interface name of at most 15 characters; a trailing + is a wildcard")
    return value


def read_log_prefix(value: object) -> str:
    """At most 29 printable ASCII characters, without a double quote or a backslash."""
    if not isinstance(value, str) or not _log_prefix.fullmatch(value):
        raise RefusedError("write 1 to 29 printable ASCII characters, without quotes or backslashes")
    return value
