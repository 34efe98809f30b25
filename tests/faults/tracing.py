"""A child process under ptrace(2): stopped at the entry and the exit of each of its system calls.

`trace` forks and runs `work` in the child. A `Fault` is asked at each entry, where it may kill the child or have the
call fail without being made, and at each exit, where it may give another result. Threads of the child are followed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

#: linux/ptrace.h
_TRACEME, _GETREGS, _SETREGS, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 12, 13, 24, 0x4200, 0x420E
_SYSGOOD, _CLONE, _EXITKILL = 0x1, 0x8, 0x100000
_WALL = 0x40000000
_INFO = struct.Struct("=B3xIQQ7Q")  # struct ptrace_syscall_info, at an entry
_REGISTERS = 27  # struct user_regs_struct of x86-64, of which these are the places of two
_RAX, _ORIG_RAX = 10, 15
_MACHINE = os.uname().machine

#: asm/unistd_64.h: the calls that faults are about, and a name for each that a report may mention.
CALLS = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "ioctl": 16, "pread64": 17, "socket": 41, "sendto": 44,
    "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "bind": 49, "getsockname": 51, "setsockopt": 54, "getsockopt": 55,
    "flock": 73, "fsync": 74, "rename": 82, "mkdir": 83, "link": 86, "unlink": 87, "openat": 257, "newfstatat": 262,
    "unlinkat": 263, "renameat": 264, "linkat": 265, "setns": 308, "openat2": 437,
}  # fmt: skip
NAMES = {number: name for name, number in CALLS.items()}

#: In place of an errno: the call is not made, and said to have been.
DONE = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


class Call(NamedTuple):
    """One system call: the place that it has in the run, its number and arguments, and the thread that makes it."""

    place: int
    number: int
    arguments: tuple[int, ...]
    thread: int

    @property
    def name(self) -> str:
        return NAMES.get(self.number, str(self.number))


class Fault:
    """What happens to a run. This one lets it be, and counts the system calls."""

    #: Whether the numbers and arguments of calls are wanted: they cost a call each.
    curious = False
    #: Whether it has happened.
    hit = False
    calls = 0
    killed_at = ""

    def entering(self, child: Child, call: Call) -> int:
        """Asked before a call is made: an errno to give in its place, or `DONE`, or 0."""
        return 0

    def leaving(self, child: Child, call: Call, result: int) -> int | None:
        """Asked when a call was made: another result, negative for an errno, or None."""
        return None


class Kill(Fault):
    """SIGKILL when the child is about to make its system call number `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def entering(self, child: Child, call: Call) -> int:
        if call.place >= self.at:
            self.hit = True
            child.kill()
        return 0


class Ended(NamedTuple):
    """How a run ended: the exit code, negative for a signal, and what it wrote."""

    code: int
    output: str
    #: Seconds; a run that would not end was killed, and its code is None.
    seconds: float


class Child:
    """A traced process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def memory(self, address: int, size: int) -> bytes:
        """Bytes of its memory."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, address)

    def poke(self, address: int, data: bytes) -> None:
        """Write its memory."""
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), data, address)


def ptrace(request: int, pid: int, address: object = None, data: object = None) -> int:
    """ptrace(2). Raises OSError."""
    ctypes.set_errno(0)
    result = int(_libc.ptrace(request, pid, address, data))
    if result == -1 and (number := ctypes.get_errno()):
        raise OSError(number, os.strerror(number))
    return result


def require() -> None:
    """Skip the test where nothing can be traced, or calls cannot be changed."""
    if _MACHINE != "x86_64":
        pytest.skip("the rig knows the registers of x86-64 alone")


def fork(work: Callable[[], int], *, traced: bool) -> tuple[int, int]:
    """Run `work` in a child; returns its id and the descriptor of a file that it writes to in place of a terminal."""
    output = os.memfd_create("output")
    pid = os.fork()
    if pid:
        return pid, output
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has others in their place
        if traced:
            _libc.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # noqa: BLE001 - a child that forked never goes back to its parent's work
        os.write(2, f"Traceback: {error!r}\n".encode())
    finally:
        os._exit(code)


def run(work: Callable[[], int], patience: float = 30) -> Ended:
    """Run `work` in a child that nobody disturbs."""
    begun = time.monotonic()
    pid, output = fork(work, traced=False)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return Ended(os.waitstatus_to_exitcode(status), _written(output), time.monotonic() - begun)
        if time.monotonic() - begun > patience:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)


def trace(work: Callable[[], int], fault: Fault, patience: float = 30) -> Ended:
    """Run `work` in a child, with `fault`. It is killed when it does not end within `patience` seconds."""
    begun = time.monotonic()
    pid, output = fork(work, traced=True)
    child = Child(pid)
    os.waitpid(pid, _WALL)
    ptrace(_SETOPTIONS, pid, None, _SYSGOOD | _CLONE | _EXITKILL)
    ptrace(_SYSCALL, pid)
    made: dict[int, tuple[Call, int]] = {}
    while True:
        thread, status = os.waitpid(-1, _WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread == pid:
                return Ended(os.waitstatus_to_exitcode(status), _written(output), time.monotonic() - begun)
            continue
        if time.monotonic() - begun > patience:
            child.kill()
        number = os.WSTOPSIG(status)
        deliver = 0
        try:
            if number == signal.SIGTRAP | 0x80:
                _at_call(child, thread, fault, made)
            elif number not in (signal.SIGTRAP, signal.SIGSTOP):
                deliver = number
            ptrace(_SYSCALL, thread, None, deliver)
        except ProcessLookupError:
            continue  # killed


def _at_call(child: Child, thread: int, fault: Fault, made: dict[int, tuple[Call, int]]) -> None:
    if thread in made:
        call, refused = made.pop(thread)
        if refused:
            _set(thread, _RAX, 0 if refused == DONE else -refused)
        elif fault.curious:
            result = _get(thread, _RAX)
            other = fault.leaving(child, call, result)
            if other is not None:
                _set(thread, _RAX, other)
        return
    call = _call(thread, fault.calls) if fault.curious else Call(fault.calls, -1, (), thread)
    fault.calls += 1
    refused = fault.entering(child, call)
    if refused:
        _set(thread, _ORIG_RAX, -1)
    if fault.hit and not fault.killed_at:
        fault.killed_at = (call if fault.curious else _call(thread, 0)).name
    made[thread] = (call, refused)


def _call(thread: int, index: int) -> Call:
    info = ctypes.create_string_buffer(_INFO.size)
    ptrace(_GET_SYSCALL_INFO, thread, _INFO.size, info)
    _, _, _, _, number, *arguments = _INFO.unpack(info.raw)
    return Call(index, number, tuple(arguments), thread)


def _registers(thread: int) -> ctypes.Array[ctypes.c_ulonglong]:
    found = (ctypes.c_ulonglong * _REGISTERS)()
    ptrace(_GETREGS, thread, None, found)
    return found


def _get(thread: int, place: int) -> int:
    value = int(_registers(thread)[place])
    return value - (1 << 64) if value >> 63 else value


def _set(thread: int, place: int, value: int) -> None:
    registers = _registers(thread)
    registers[place] = value & 0xFFFFFFFFFFFFFFFF
    ptrace(_SETREGS, thread, None, registers)


def _written(output: int) -> str:
    try:
        return os.pread(output, 1 << 20, 0).decode(errors="replace")
    finally:
        os.close(output)
