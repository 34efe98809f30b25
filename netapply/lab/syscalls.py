"""The system calls that only the lab needs: new namespaces, and mounts.

Every function raises OSError with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNET = 0x40000000  # linux/sched.h
MS_BIND, MS_REC, MS_SHARED = 0x1000, 0x4000, 0x100000  # linux/mount.h
MNT_DETACH = 2  # sys/mount.h

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
