"""Answers of the kernel that are cut short, interrupted or forged, and other writers between a look and a change."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from tests.faults.kills import Operation, changes
from tests.faults.outcome import Outcome
from tests.faults.refusals import SPOILED, Numbered, spoil
from tests.faults.stage import Case, Stage
from tests.faults.tracing import CALLS, DONE, Call, Child

_HEADER = struct.Struct("=IHHII")
_ERROR = struct.Struct("=IHHIIi")
_MSG_PEEK, _DONTWAIT = 0x2, 0x40
_DUMP_INTR, _MSG_TRUNC, _BATCH_BEGIN, _BATCH_END, _SET_REPLACE = 0x10, 0x20, 0x10, 0x11, 64
_FLAGS_AT = 48  # struct msghdr on 64-bit machines
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438
_SO_PROTOCOL = 38
_libc = ctypes.CDLL(None, use_errno=True)


class _Nth(Numbered):
    """The `at`th answer, or from then on each."""

    def __init__(self, stage: Stage, at: int, *, always: bool = False) -> None:
        super().__init__(at)
        self.stage = stage
        self.always = always


class Short(_Nth):
    """Half of the bytes of an answer."""

    def leaving(self, child: Child, call: Call, result: int) -> int | None:
        if not _is_answer(call) or result <= 0:
            return None
        return result // 2 & ~3 if self.due() else None


class Truncated(_Nth):
    """An answer of which the kernel says that it did not fit."""

    def leaving(self, child: Child, call: Call, result: int) -> int | None:
        if call.number == CALLS["recvmsg"] and result > 0 and self.due():
            child.poke(call.arguments[1] + _FLAGS_AT, struct.pack("=i", _MSG_TRUNC))
        return None


class Interrupted(_Nth):
    """A dump that says of itself that it was interrupted."""

    def leaving(self, child: Child, call: Call, result: int) -> int | None:
        if not _is_answer(call) or result < _HEADER.size or not self.due():
            return None
        buffer, received = _received(child, call, result)
        data = bytearray(received)
        for at in _messages(received):
            length, kind, flags, sequence, port = _HEADER.unpack_from(data, at)
            if kind != 2:  # an error is not part of a dump
                _HEADER.pack_into(data, at, length, kind, flags | _DUMP_INTR, sequence, port)
        child.poke(buffer, bytes(data))
        return None


class Forged(_Nth):
    """Another process of the namespace sends messages as if they were the kernel's: an end, and an error."""

    def entering(self, child: Child, call: Call) -> int:
        if not _is_answer(call) or not self.due():
            return 0
        pidfd = _libc.syscall(_PIDFD_OPEN, child.pid, 0)
        fd = _libc.syscall(_PIDFD_GETFD, pidfd, int(call.arguments[0]), 0)
        os.close(pidfd)
        with socket.socket(fileno=fd) as theirs:
            port, protocol = theirs.getsockname()[0], theirs.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL)
        forger = self.stage.namespace.visit(partial(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, protocol))
        with forger, suppress(OSError):
            forger.bind((0, 0))
            for sequence in range(8):
                for kind, body in ((3, bytes(4)), (2, struct.pack("=i", -1) + bytes(16))):
                    forger.sendto(_HEADER.pack(16 + len(body), kind, 0, sequence, 0) + body, _DONTWAIT, (port, 0))
        return 0


class Answered(_Nth):
    """The kernel refuses a change by a number of ours: the request is spoiled on its way, and its answer mended.

    With 0 it says that it was done.
    """

    def __init__(self, stage: Stage, at: int, *, number: int, always: bool = False) -> None:
        super().__init__(stage, at, always=always)
        self._number = number
        self._spoiled: tuple[int, bytes] | None = None
        self._awaits = False

    def entering(self, child: Child, call: Call) -> int:
        if call.name not in ("sendto", "setsockopt") or not changes(child, call) or not self.due():
            return 0
        if call.name == "setsockopt":
            return self._number or DONE
        request, at, last = child.memory(call.arguments[1], call.arguments[2]), 0, 0
        while at < len(request):
            length, kind = struct.unpack_from("=IH", request, at)
            last = last if kind == _BATCH_END else at
            at += (length + 3) & ~3
        kind = call.arguments[1] + last + 4
        self._spoiled = kind, child.memory(kind, 1)
        child.poke(kind, b"\x7f")  # of each subsystem a message that it does not know
        return 0

    def leaving(self, child: Child, call: Call, result: int) -> int | None:
        if self._spoiled and call.name == "sendto":
            child.poke(*self._spoiled)
            self._spoiled, self._awaits = None, True
        elif self._awaits and _is_answer(call) and result > 0:
            buffer, data = _received(child, call, result)
            for at in _messages(data):
                _, kind, _, _, _, number = _ERROR.unpack_from(data, at) if len(data) - at >= _ERROR.size else (0,) * 6
                if kind == 2 and number:
                    child.poke(buffer + at + _HEADER.size, struct.pack("=i", -self._number))
                    self._awaits = False
        return None


def _is_answer(call: Call) -> bool:
    return call.name == "recvmsg" or (call.name == "recvfrom" and not call.arguments[3] & _MSG_PEEK)


def _received(child: Child, call: Call, size: int) -> tuple[int, bytes]:
    """Where a datagram is, and what it says."""
    if call.name == "recvfrom":
        return call.arguments[1], child.memory(call.arguments[1], size)
    vector = struct.unpack("=Q", child.memory(call.arguments[1] + 16, 8))[0]
    buffer = struct.unpack("=Q", child.memory(vector, 8))[0]
    return buffer, child.memory(buffer, size)


def _messages(data: bytes) -> Iterator[int]:
    at = 0
    while at + _HEADER.size <= len(data):
        yield at
        at += max((struct.unpack_from("=I", data, at)[0] + 3) & ~3, _HEADER.size)


class Writer(_Nth):
    """Somebody adds a rule of their own between our look and our change. Theirs must be there in the end."""

    added = 0

    def entering(self, child: Child, call: Call) -> int:
        if self._is_change(child, call) and self.due():
            self.added += 1
            _ADD[self.stage.case.backend](self.stage, 20000 + self.added)
        return 0

    def _is_change(self, child: Child, call: Call) -> bool:
        if self.stage.case.backend == "iptables-legacy":
            is_level = call.number == CALLS["setsockopt"] and call.arguments[1] in (0, 41)
            return is_level and call.arguments[2] == _SET_REPLACE
        if call.number != CALLS["sendto"]:
            return False
        return bool(struct.unpack("=IH", child.memory(call.arguments[1], 6))[1] == _BATCH_BEGIN)


def _add_native(stage: Stage, port: int) -> None:
    stage.netns.run("nft", "add", "rule", "inet", "somebody", "input", "tcp", "dport", str(port), "drop")


def _add_xtables(tool: str, stage: Stage, port: int) -> None:
    # Another lock file: a writer that waits for ours would never come between.
    words = ["env", f"XTABLES_LOCKFILE={stage.directory}/hostile.lock", tool, "-t", "nat", "-A", "DOCKER"]
    stage.netns.run(*words, "-p", "tcp", "--dport", str(port), "-j", "RETURN")


_ADD: dict[str, Callable[[Stage, int], None]] = {
    "nftables": _add_native,
    "iptables-nft": partial(_add_xtables, "iptables-nft"),
    "iptables-legacy": partial(_add_xtables, "iptables-legacy"),
}

#: Seconds that a command waits for an answer.
_DEADLINE = 0.5
#: What the kernel may say to a change.
_SAID = ("EPERM", "ENOENT", "EEXIST", "EBUSY", "ENOMEM", "ENOBUFS", "EAGAIN", "EINTR")

ANSWERS: dict[str, Callable[[Stage, int], _Nth]] = {
    "a short answer": Short,
    "a truncated answer": Truncated,
    "an interrupted dump": Interrupted,
    "a dump that is always interrupted": partial(Interrupted, always=True),
    "a forged sender": Forged,
    "a forger that never ends": partial(Forged, always=True),
    **{f"the kernel says {name}": partial(Answered, number=getattr(errno, name)) for name in _SAID},
    "the kernel says done, and did nothing": partial(Answered, number=0),
    "the kernel says EPERM from then on": partial(Answered, number=errno.EPERM, always=True),
    "the kernel says EBUSY from then on": partial(Answered, number=errno.EBUSY, always=True),
}


def answer_everywhere(
    case: Case, name: str, *, most: int, operations: Sequence[Operation] = SPOILED
) -> Iterator[Outcome]:
    """Commands whose answers are spoiled, each in turn or, of many, `most`."""
    yield from spoil(case, name, ANSWERS[name], operations, most=most, deadline=_DEADLINE)


def writers(case: Case) -> Iterator[Outcome]:
    """Another writer, once between our look and our change, and each time (ERESTART, EAGAIN)."""
    for always in (False, True):
        stage = Stage(case)
        try:
            stage.reset("apply a")
            fault = Writer(stage, 0, always=always)
            ended = stage.fail("apply b", fault)
            # Theirs are part of both states, so these are looked at when they are there.
            there = stage.picture()
            old = stage.reset("apply a")
            new = stage.reset("apply b")
            wrong: tuple[str, ...] = (
                ()
                if _are_there(stage, fault.added)
                else (f"{fault.added} rules of theirs were added, and not all stand",)
            )
            state = "new" if there.state == new.state else "old" if there.state == old.state else ""
            if (ended.code == 0) != (state == "new") or ended.code not in (0, 1) or "Traceback" in ended.output:
                wrong += (f"ended with {ended.code}, {state or 'neither'}: {ended.output}",)
            often = "a writer who never ends" if always else "ERESTART, EAGAIN: another writer"
            yield Outcome(
                often, case.backend, f"{case}: {often}, {fault.added} times", state or "between", state, wrong
            )
        finally:
            stage.close()


def _are_there(stage: Stage, count: int) -> bool:
    tool = {
        "nftables": "nft list ruleset",
        "iptables-nft": "iptables-nft-save",
        "iptables-legacy": "iptables-legacy-save",
    }
    text = stage.netns.run(*tool[stage.case.backend].split())
    return all(f"dport {20000 + number} " in text for number in range(1, count + 1))
