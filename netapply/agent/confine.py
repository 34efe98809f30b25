"""What a service gives up for good when it starts: to run another program.

systemd's SystemCallFilter= must leave execve(2) to the start of the service itself, so the rest is done here: a seccomp
filter (seccomp(2), linux/seccomp.h, linux/filter.h) that all later threads and children inherit.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38  # linux/prctl.h
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW, _RET_ERRNO, _RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
#: BPF_LD | BPF_W | BPF_ABS; BPF_JMP | BPF_JEQ | BPF_K; BPF_JMP | BPF_JGE | BPF_K; BPF_RET | BPF_K.
_LOAD, _EQUALS, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_X32 = 0x40000000  # numbers of x86-64's 32-bit pointers, where execve is another; others have none so high
#: By machine: AUDIT_ARCH of linux/audit.h, and the numbers of execve and execveat.
_MACHINES = {
    "x86_64": (0xC000003E, 59, 322),
    "aarch64": (0xC00000B7, 221, 281),
    "riscv64": (0xC00000F3, 221, 281),
    "ppc64le": (0xC0000015, 11, 362),
    "s390x": (0x80000016, 11, 354),
}


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def deny_programs() -> str:
    """Let this thread, and all that it starts from now on, run no program: execve(2) fails with EPERM.

    Returns "", or why that is not possible here. To be called before there are other threads. It gives up gaining
    privileges through setuid programs, too, without which the kernel takes no filter.
    """
    machine = os.uname().machine
    if machine not in _MACHINES:
        return f"no system call numbers are known for {machine}"
    filters = _filters(*_MACHINES[machine])
    program = _Program(len(filters) // 8, filters)
    libc = ctypes.CDLL(None, use_errno=True)
    for words in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*words, 0, 0):
            return f"prctl({words[0]}): {os.strerror(ctypes.get_errno())}"
    return ""


def _filters(architecture: int, execve: int, execveat: int) -> bytes:
    """Of struct sock_filter: code, how many to skip if true and if false, and the constant."""
    refused = _RET_ERRNO | errno.EPERM
    words = (
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUALS, 1, 0, architecture),
        (_RETURN, 0, 0, _RET_KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 2, 0, _X32),
        (_EQUALS, 1, 0, execve),
        (_EQUALS, 0, 1, execveat),
        (_RETURN, 0, 0, refused),
        (_RETURN, 0, 0, _RET_ALLOW),
    )
    return b"".join(struct.pack("=HBBI", *word) for word in words)
