"""The socket options of ip_tables and ip6_tables: numbers and structures of linux/netfilter_ipv4/ip_tables.h,
linux/netfilter_ipv6/ip6_tables.h and linux/netfilter/x_tables.h, on a 64-bit machine.
"""

from __future__ import annotations

import errno
import struct
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from netapply.errors import ConflictError, DecodeError
from netapply.kernel import Scratch
from netapply.values import NamedTuple
from netapply_wire.refusals import refused

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from netapply.kernel import Kernel
    from netapply.ruleset import Family

    Place: TypeAlias = tuple[Family, str]  # family, name of a table

# The same in both families but for the revision queries.
SO_SET_REPLACE, SO_SET_ADD_COUNTERS = 64, 65
SO_GET_INFO, SO_GET_ENTRIES = 64, 65
SO_GET_REVISION_MATCH: dict[Family, int] = {"ip": 66, "ip6": 68}
SO_GET_REVISION_TARGET: dict[Family, int] = {"ip": 67, "ip6": 69}

HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")  # enum nf_inet_hooks
#: The tables that we write into, in the order in which they are put up: what captures comes last.
ORDER = ("raw", "mangle", "filter", "nat")
MODULES: dict[Family, str] = {"ip": "ip_tables", "ip6": "ip6_tables"}
NAMES_FILE: dict[Family, str] = {"ip": "net/ip_tables_names", "ip6": "net/ip6_tables_names"}

_INFO = struct.Struct("=32sI5I5III")  # ipt_getinfo
_GET_ENTRIES = struct.Struct("=32sI4x")  # ipt_get_entries
_REPLACE = struct.Struct("=32sIII5I5II8x")  # ipt_replace; the pointer to the counters' buffer comes last
_COUNTERS_INFO = struct.Struct("=32sI4x")  # xt_counters_info
_REVISION = struct.Struct("=29sB")  # xt_get_revision
_COUNTERS_POINTER = 88
COUNTERS_SIZE = 16  # xt_counters: packets, bytes
#: How often a table is read that others keep replacing under us. Each attempt takes microseconds.
READ_ATTEMPTS = 64
_LONGEST = 0xFFFF  # bytes of an entry, by its next_offset
_LARGEST = 512 << 20  # bytes of a table: XT_MAX_TABLE_SIZE of net/netfilter/x_tables.c


class Info(NamedTuple):
    """What GET_INFO says of a table. Offsets are by hook; those of hooks that are not in `valid_hooks` are 0."""

    valid_hooks: int
    hook_entry: tuple[int, ...]
    underflow: tuple[int, ...]
    entries: int
    size: int


class Blob(NamedTuple):
    """The entries of a whole table as the kernel takes and gives them, with the offset of each."""

    info: Info
    data: bytes
    offsets: tuple[int, ...]


def table_names(kernel: Kernel, family: Family) -> tuple[str, ...]:
    """The tables that the namespace has; () where the kernel has no such tables at all. Raises KernelError."""
    try:
        return tuple(kernel.read_file(NAMES_FILE[family]).split())
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise refused(f"read {NAMES_FILE[family]}", error) from error


def get_info(kernel: Kernel, family: Family, table: str) -> Info:
    """GET_INFO. It creates the table where there is none: ask `table_names` first. Raises OSError."""
    answer = kernel.getsockopt(family, SO_GET_INFO, table.encode().ljust(_INFO.size, b"\0"))
    if len(answer) != _INFO.size:
        raise DecodeError(f"what the kernel says of table {family} {table} has {len(answer)} bytes, not {_INFO.size}")
    _, valid_hooks, *offsets, entries, size = _INFO.unpack(answer)
    if size > min(entries * _LONGEST, _LARGEST):
        raise DecodeError(f"table {family} {table} is said to have {size} bytes, which no table has")
    # The kernel leaves -1 where there is no hook, and zeros in a table that it made itself.
    offsets = [offsets[hook] if valid_hooks >> hook % 5 & 1 else 0 for hook in range(10)]
    return Info(valid_hooks, tuple(offsets[:5]), tuple(offsets[5:]), entries, size)


def get_entries(kernel: Kernel, family: Family, table: str, size: int) -> bytes:
    """GET_ENTRIES. Raises OSError: EAGAIN where the table's size is another one by now."""
    return kernel.getsockopt(family, SO_GET_ENTRIES, _question(table, size))[_GET_ENTRIES.size :]


@lru_cache(32)
def _question(table: str, size: int) -> bytes:
    return _GET_ENTRIES.pack(table.encode(), size) + bytes(size)


def read_info(kernel: Kernel, family: Family, table: str) -> Info:
    """What GET_INFO says of a table that exists. Raises KernelError."""
    try:
        return get_info(kernel, family, table)
    except OSError as error:
        raise refused(f"read table {family} {table}", error) from error


def read_entries(kernel: Kernel, family: Family, table: str) -> tuple[Info, bytes]:
    """Both, of one moment, of a table that exists. Raises KernelError, ConflictError where it never holds still."""
    for _ in range(READ_ATTEMPTS):
        try:
            info = get_info(kernel, family, table)
            return info, get_entries(kernel, family, table, info.size)
        except BlockingIOError:
            continue  # EAGAIN: it was replaced between the two
        except OSError as error:
            raise refused(f"read table {family} {table}", error) from error
    raise ConflictError(f"somebody keeps changing table {family} {table} while it is read")


def replacement(table: str, info: Info, data: bytes, before: int) -> bytes:
    """What `replace` sends to put these entries in the place of `before` ones; they are its end. Pure."""
    head = _REPLACE.pack(
        table.encode(), info.valid_hooks, info.entries, info.size, *info.hook_entry, *info.underflow, before
    )
    return head + data


def replace(kernel: Kernel, family: Family, request: bytes, before: int) -> bytes:
    """SET_REPLACE a table that has `before` entries; returns their counters, up to the moment of the exchange.

    Raises OSError: EAGAIN where the number of entries is another one by now.
    """
    return kernel.setsockopt(family, SO_SET_REPLACE, request, Scratch(_COUNTERS_POINTER, before * COUNTERS_SIZE))


def add_counters(kernel: Kernel, family: Family, table: str, counters: Sequence[bytes]) -> None:
    """SET_ADD_COUNTERS: add to each entry's packets and bytes. Raises OSError."""
    head = _COUNTERS_INFO.pack(table.encode(), len(counters))
    kernel.setsockopt(family, SO_SET_ADD_COUNTERS, head + b"".join(counters))


def _load(module: str) -> None:
    """Have the kernel load a module, as it does for the name of an interface that it does not know.

    net/core/dev_ioctl.c, dev_load: it takes CAP_SYS_MODULE. Other modules come when a socket option or message asks for
    what they have; these two register the socket options, and the tools of iptables start modprobe for them.
    """
    from socket import if_nametoindex

    with suppress(OSError):  # there is no such interface; whether there is a module shows when asked again
        if_nametoindex(module)


def has_extension(kernel: Kernel, family: Family, option: dict[Family, int], name: str, revision: int) -> bool:
    """Whether the kernel has a match or target in this revision. It may load a module. Raises KernelError."""
    question = _REVISION.pack(name.encode(), revision)
    try:
        try:
            kernel.getsockopt(family, option[family], question)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:  # ip_tables or ip6_tables itself is not loaded
                raise
            kernel.inside(partial(_load, MODULES[family]))
            kernel.getsockopt(family, option[family], question)
    except OSError as error:
        # ENOENT: no such extension; EPROTONOSUPPORT: not in this revision
        if error.errno in (errno.ENOENT, errno.EPROTONOSUPPORT):
            return False
        raise refused(f"look for {name} revision {revision}", error) from error
    return True
