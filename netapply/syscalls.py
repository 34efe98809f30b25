"""System calls that CPython 3.11 has no function for, through ctypes, which releases the GIL around each.

Every function raises OSError with the kernel's errno. They know nothing of netfilter.
"""

from __future__ import annotations

import ctypes
import os
import struct

from netapply.kernel import Scratch

CLONE_NEWNET = 0x40000000  # linux/sched.h

_libc = ctypes.CDLL(None, use_errno=True)
#: setns(2) bare: returns 0, or -1 and raises nothing. For the way back, which must not be interrupted.
raw_setns = _libc.setns
raw_setns.argtypes = (ctypes.c_int, ctypes.c_int)
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_getsockopt = _libc.getsockopt
_getsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_setsockopt = _libc.setsockopt
_setsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)

_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_POINTER = struct.Struct("P")
_OPENAT2 = 437  # asm-generic/unistd.h: the same number on every machine; since Linux 5.6
_AT_FDCWD = -100  # linux/fcntl.h
_RESOLVE_NO_SYMLINKS = 0x04  # linux/openat2.h
_OPEN_HOW = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def setns(fd: int, kind: int = CLONE_NEWNET) -> None:
    """Move the calling thread, and no other, into the namespace that `fd` refers to (setns(2))."""
    _checked(raw_setns(fd, kind))


def filesystem_magic(fd: int) -> int:
    """The `f_type` of the file system that `fd` lies on (fstatfs(2), linux/magic.h)."""
    # struct statfs is 120 bytes on 64-bit machines; f_type comes first. The magics fit in 32 bits, and the word's
    # upper half, where it has one, is zero.
    found = (ctypes.c_ulong * 32)()
    _checked(_fstatfs(fd, found))
    return int(found[0]) & 0xFFFFFFFF


def open_without_links(path: str, flags: int) -> int:
    """Open a path of which no part is a symbolic link, by openat2(2). Raises OSError: ELOOP where one is.

    ENOSYS before Linux 5.6; below a filter of system calls that does not know it, that or EPERM.
    """
    how = _OPEN_HOW.pack(flags, 0, _RESOLVE_NO_SYMLINKS)
    call = ctypes.c_long(_OPENAT2), ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(os.fsencode(path)), ctypes.c_char_p(how)
    fd = int(_syscall(*call, ctypes.c_size_t(len(how))))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return fd


def getsockopt(fd: int, level: int, option: int, buffer: bytes) -> bytes:
    """Get an option (man 2 getsockopt), `buffer` being input and output; returns what the kernel left of it."""
    size = len(buffer)
    value, length = (ctypes.c_char * size).from_buffer_copy(buffer), ctypes.c_uint(size)
    if _getsockopt(fd, level, option, value, ctypes.byref(length)):
        _checked(-1)
    return value.raw if length.value == size else value.raw[: length.value]


def setsockopt(fd: int, level: int, option: int, blob: bytes) -> None:
    """Set an option (man 2 setsockopt) to `blob`."""
    _checked(_setsockopt(fd, level, option, blob, len(blob)))


def setsockopt_scratch(fd: int, level: int, option: int, blob: bytes, scratch: Scratch) -> bytes:
    """Set an option to `blob` with the address of a scratch buffer put into it; returns what the kernel wrote there."""
    size = len(blob)
    value, written = (ctypes.c_char * size).from_buffer_copy(blob), (ctypes.c_char * scratch.size)()
    _POINTER.pack_into(value, scratch.offset, ctypes.addressof(written))
    if _setsockopt(fd, level, option, value, size):
        _checked(-1)
    return written.raw


def set_filesystem_ids(uid: int, gid: int) -> None:
    """setfsuid(2), setfsgid(2) of the calling thread: what the files that it opens, sockets too, are owned by.

    That is what the owner matches of netfilter look at (xt_owner.c, nft_meta.c: `f_cred->fsuid`). The C library does
    not carry these two over to other threads, and capabilities that are not about files stay. Raises
    PermissionError without CAP_SETUID and CAP_SETGID.
    """
    _libc.setfsgid(ctypes.c_uint(gid))
    _libc.setfsuid(ctypes.c_uint(uid))
    nobody = ctypes.c_uint(0xFFFFFFFF)  # an invalid id: both calls change nothing and return the present one
    if (_libc.setfsuid(nobody) & 0xFFFFFFFF, _libc.setfsgid(nobody) & 0xFFFFFFFF) != (uid, gid):
        raise PermissionError(1, f"setting the file system ids {uid}:{gid}")
