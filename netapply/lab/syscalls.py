"""The system calls that only the lab and the conformance suite need: new namespaces, mounts, groups, socket filters.

Every function raises OSError with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct

CLONE_NEWNET = 0x40000000  # linux/sched.h
MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 0x1000, 0x4000, 0x40000, 0x100000  # linux/mount.h
MNT_DETACH = 2  # sys/mount.h
#: setgroups(2) by machine. The C library's own would change the groups of every thread.
_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "ppc64le": 81, "s390x": 206}
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def unshare(flags: int) -> None:
    """Move the calling thread, and no other, into new namespaces (unshare(2))."""
    _checked(_libc.unshare(ctypes.c_int(flags)))


def mount(source: str, target: str, flags: int) -> None:
    """Mount without a file system (mount(2)): bind mounts and changes of propagation."""
    _checked(_libc.mount(os.fsencode(source), os.fsencode(target), b"none", ctypes.c_ulong(flags), None))


def unmount(target: str) -> None:
    """umount2(2), lazily: the name is gone at once, whoever still uses what it led to."""
    _checked(_libc.umount2(os.fsencode(target), ctypes.c_int(MNT_DETACH)))


def set_groups(groups: tuple[int, ...]) -> None:
    """The supplementary groups of the calling thread, and of no other. NotImplementedError on unknown machines."""
    number = _SETGROUPS.get(platform.machine())
    if number is None:
        raise NotImplementedError(f"setgroups(2) of one thread on {platform.machine()}")
    listed = (ctypes.c_uint32 * len(groups))(*groups)
    _checked(_libc.syscall(ctypes.c_long(number), ctypes.c_size_t(len(groups)), listed))


def deafen(sock: socket.socket) -> None:
    """Have the kernel throw away, without an answer, all that comes to `sock` (socket(7): SO_ATTACH_FILTER)."""
    program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)  # linux/filter.h: BPF_RET | BPF_K, 0
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(program)))


def undeafen(sock: socket.socket) -> None:
    """Undo `deafen`."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
