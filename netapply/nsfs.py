"""Names of network namespaces, and what tells one from another.

A namespace is named by nothing (the one that the command runs in), by a name of ip-netns(8), by a path, by
"pid:1234", or by an inherited descriptor, "fd:5". Each leads to an open file of nsfs, the kernel's file system of
namespaces, and the file to an identity.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct

from netapply.errors import NamespaceError
from netapply.paths import open_path
from netapply.sockets import socket
from netapply.syscalls import CLONE_NEWNET, filesystem_magic
from netapply.values import NamedTuple

#: The namespace of the calling thread, which setns(2) may have made another than the process's.
CURRENT = "/proc/thread-self/ns/net"
#: Where ip-netns(8) keeps its names.
NAMED = "/run/netns/"

_NSFS_MAGIC = 0x6E736673  # linux/magic.h
_NS_GET_NSTYPE = 0xB703  # linux/nsfs.h, since Linux 4.11
_NET_NS_INIT_INO = 0xEFFFFFF9  # linux/nsfs.h, since Linux 6.18
_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, since Linux 5.14
_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_OTHERS = _FIRST | frozenset("._-")
# O_NONBLOCK and O_NOCTTY: a path may lead to a FIFO or a terminal, and opening it must do nothing.
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_COOKIE = struct.Struct("=Q")


class NamespaceId(NamedTuple):
    """What a network namespace is, whatever it is called.

    `device` and `inode` are those of its nsfs file. The kernel gives an inode number to another namespace once this
    one is gone; the cookie (SO_NETNS_COOKIE) is never used twice until the machine starts anew. It is 0 before
    Linux 5.14, which does not tell it.
    """

    device: int
    inode: int
    cookie: int


class Source(NamedTuple):
    """An open nsfs file, and how it was found. `path` can be looked up again; "" for the others."""

    fd: int
    label: str
    path: str = ""


def open_source(spec: str | int | None) -> Source:
    """Open the namespace that `spec` names; the descriptor is the caller's to close. Raises NamespaceError."""
    label = _label(spec)
    try:
        source = _find(spec, label)
    except OSError as error:
        why = {2: "does not exist", 3: "does not exist", 9: "is not an open descriptor", 13: "may not be opened by us"}
        step = "run as root, or with CAP_SYS_PTRACE for another process's namespace" if error.errno == 13 else ""
        reason = why.get(error.errno or 0, f"cannot be opened: {error.strerror}")
        raise NamespaceError(f"{label} {reason}", next_step=step or "see `ip netns list` and `lsns -t net`") from error
    try:
        _check_kind(source)
    except BaseException:
        os.close(source.fd)
        raise
    return source


def _label(spec: str | int | None) -> str:
    if spec is None:
        return "the network namespace of this process"
    if isinstance(spec, int):
        return f"network namespace fd:{spec}"
    return f"network namespace {spec}"


def _find(spec: str | int | None, label: str) -> Source:
    if spec is None:
        return Source(os.open(CURRENT, _OPEN), label)
    if isinstance(spec, int):
        return Source(fcntl.fcntl(spec, fcntl.F_DUPFD_CLOEXEC, 3), label)
    scheme, colon, number = spec.partition(":")
    if colon and scheme in ("pid", "fd"):
        if not (number.isascii() and number.isdigit() and len(number) <= 10):
            raise NamespaceError(f"{label}: {number!r} is not a number", next_step="write pid:1234 or fd:5")
        if scheme == "pid":
            return Source(_open_pid(int(number)), label)
        return Source(fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 3), label)
    if "\0" in spec:
        raise NamespaceError(f"{spec!r} cannot name a network namespace", next_step="leave the zero byte out")
    if "/" in spec:
        place = os.path.abspath(spec)
        return Source(open_path(place, _OPEN), label, place)
    if not (spec and spec[0] in _FIRST and _OTHERS.issuperset(spec)):
        raise NamespaceError(
            f"{spec!r} cannot name a network namespace",
            next_step="use a name of letters, digits, dots, dashes and underscores, a path, pid:N or fd:N",
        )
    return Source(open_path(NAMED + spec, _OPEN), label, NAMED + spec)


def _open_pid(pid: int) -> int:
    """The namespace of the process that has this pid now: the pidfd proves that it still had it after we looked."""
    try:
        process = os.pidfd_open(pid)
    except OverflowError:  # of a C int
        raise ProcessLookupError(3, os.strerror(3)) from None
    try:
        fd = os.open(f"/proc/{pid}/ns/net", _OPEN)
        ended = select.poll()
        ended.register(process, select.POLLIN)  # readable once the process has ended (pidfd_open(2))
        if ended.poll(0):
            os.close(fd)
            raise ProcessLookupError(3, os.strerror(3))
        return fd
    finally:
        os.close(process)


def _check_kind(source: Source) -> None:
    # The file system first: an ioctl number means something else to every other kind of file.
    if filesystem_magic(source.fd) != _NSFS_MAGIC:
        step = "the file may be left over from before a restart; see `ip netns list`" if source.path else ""
        raise NamespaceError(f"{source.label} is no namespace", next_step=step)
    if fcntl.ioctl(source.fd, _NS_GET_NSTYPE) != CLONE_NEWNET:
        raise NamespaceError(f"{source.label} is a namespace of another kind", next_step="use .../ns/net")


def cookie_of(sock: socket.socket) -> int:
    """The cookie of the namespace that `sock` belongs to; 0 where the kernel is older than 5.14."""
    try:
        return int(_COOKIE.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])
    except OSError:
        return 0


def is_initial(identity: NamespaceId, *, reserved: bool = False) -> bool:
    """Whether this is the machine's initial namespace. The calling thread must be in it.

    /proc/1/ns/net cannot tell: reading it takes CAP_SYS_PTRACE, and in a container it is the container's own. Any of:
    - the inode number that the kernel reserves for it, since Linux 6.18; `reserved` is what `reserves_inode` said;
    - the first cookie ever given, which it has from 5.14 to 6.17 (later other initial namespaces may be first, but
      never a network namespace that was made after the start);
    - net.core.netdev_max_backlog, which all versions register for it alone (net/core/sysctl_net_core.c). That is
      the one signal that 5.10 has. Looking for it takes some 80 µs in a new namespace.
    """
    if identity.inode == _NET_NS_INIT_INO or identity.cookie == 1:
        return True
    return not reserved and os.access("/proc/sys/net/core/netdev_max_backlog", os.F_OK)


def reserves_inode() -> bool:
    """Whether this kernel reserves the inode number, as a thread's own namespace showed once by having it."""
    if not _reserves and os.stat(CURRENT).st_ino == _NET_NS_INIT_INO:
        _reserves.append(True)
    return bool(_reserves)


#: Not empty since this process saw that it does.
_reserves: list[bool] = []
