"""System calls that fail: refused before they are made, or made and said to have failed; once, or from then on."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from netapply import netlink
from tests.faults import pictures
from tests.faults.kills import OPERATIONS, Operation, named, spread
from tests.faults.outcome import Outcome
from tests.faults.pictures import Picture
from tests.faults.stage import Case, Stage
from tests.faults.tracing import CALLS, Call, Child, Ended, Fault

_SEND = ("sendto", "sendmsg")
_RECEIVE = ("recvfrom", "recvmsg")
_DISK = ("write", "fsync", "rename", "renameat", "link", "linkat", "openat", "unlink", "unlinkat", "mkdir")
#: asm-generic/fcntl.h: what openat(2) is asked for when a file is to be written.
_CREATES = 0o100
#: A kernel without IPv6 has no such file: ENOENT is an answer here, and IPv6 is left out, and told.
_IPV6 = b"/proc/sys/net/ipv6/conf/lo/disable_ipv6"


NEVER = 1 << 30
#: What faults befall but kills, which befall more.
SPOILED = OPERATIONS[:3]


class Refusal(NamedTuple):
    """What a call is made to say."""

    name: str
    errno: int
    calls: tuple[str, ...]
    #: The call is made all the same, and its answer is what is lost.
    after: bool = False
    #: Not once, but from then on.
    always: bool = False
    #: Give poll(2) no patience, so that a deadline has passed at once.
    hasty: bool = False


REFUSALS = (
    Refusal("ENOBUFS: the answer is lost", errno.ENOBUFS, _RECEIVE),
    Refusal("ENOBUFS: the request is refused", errno.ENOBUFS, _SEND),
    Refusal("EAGAIN", errno.EAGAIN, (*_SEND, *_RECEIVE, "setsockopt", "flock")),
    Refusal("EINTR", errno.EINTR, (*_SEND, *_RECEIVE, "setsockopt", "openat", "read", "flock", "fsync")),
    Refusal("EPERM", errno.EPERM, (*_SEND, "setsockopt", "getsockopt", "setns", "socket")),
    Refusal("ENOENT", errno.ENOENT, (*_SEND, "setsockopt", "openat", "newfstatat", "renameat", "rename")),
    Refusal("EBUSY", errno.EBUSY, (*_SEND, "setsockopt", "rename", "renameat")),
    Refusal("ENOMEM", errno.ENOMEM, (*_SEND, *_RECEIVE, "setsockopt", "openat")),
    Refusal("done, and said to have failed", errno.EINTR, ("setsockopt",), after=True),
    Refusal("done, and said to have failed", errno.ENOBUFS, _SEND, after=True),
    Refusal("an I/O error", errno.EIO, _DISK),
    Refusal("a full disk", errno.ENOSPC, _DISK, always=True),
    Refusal("a deadline passed", errno.EAGAIN, _RECEIVE, always=True, hasty=True),
)


class Numbered(Fault):
    """A fault that happens at the `at`th occasion for it."""

    curious = True
    #: Whether it happens from then on.
    always = False

    def __init__(self, at: int) -> None:
        self._left = at
        #: How many occasions there were.
        self.found = 0

    def due(self) -> bool:
        self.found += 1
        self._left -= 1
        if self._left == -1 or (self.hit and self.always):
            self.hit = True
            return True
        return False


class Refused(Numbered):
    """The `at`th of the calls that a refusal is about."""

    def __init__(self, refusal: Refusal, at: int) -> None:
        super().__init__(at)
        self.always = refusal.always
        self._refusal = refusal
        self._numbers = frozenset(CALLS[name] for name in refusal.calls)

    def entering(self, child: Child, call: Call) -> int:
        if self._refusal.after or not self._is_meant(child, call):
            return 0
        return self._refusal.errno if self.due() else 0

    def leaving(self, child: Child, call: Call, result: int) -> int | None:
        if self.hit and self._refusal.hasty and call.number == CALLS["poll"]:
            return 0
        if not self._refusal.after or not self._is_meant(child, call) or result < 0:
            return None
        return -self._refusal.errno if self.due() else None

    def _is_meant(self, child: Child, call: Call) -> bool:
        if call.number not in self._numbers:
            return False
        if call.number == CALLS["write"]:
            return call.arguments[0] > 2  # the terminal's is another matter
        if call.number == CALLS["newfstatat"] and child.memory(call.arguments[1], 1) == b"\0":
            return False  # of a descriptor: it is there
        if call.number == CALLS["openat"] and _IPV6 in child.memory(call.arguments[1], len(_IPV6)):
            return False
        if call.number == CALLS["openat"] and self._refusal.errno in (errno.ENOSPC, errno.EIO):
            return bool(call.arguments[2] & _CREATES)
        return True


def refuse_everywhere(
    case: Case, refusal: Refusal, *, most: int, operations: Sequence[Operation] = SPOILED
) -> Iterator[Outcome]:
    """Commands whose calls fail, each in turn or, of many, `most`."""
    deadline = 0.2 if refusal.always else netlink.DEADLINE
    yield from spoil(case, refusal.name, lambda _, at: Refused(refusal, at), operations, most=most, deadline=deadline)


def spoil(
    case: Case,
    name: str,
    make: Callable[[Stage, int], Numbered],
    operations: Sequence[Operation],
    *,
    most: int,
    deadline: float,
) -> Iterator[Outcome]:
    """Each of the operations with each fault that `make` makes of a number, `most` of them in all, evenly."""
    stage = Stage(case)
    try:
        for operation in operations:
            old = stage.reset(*operation.before)
            counted = make(stage, NEVER)
            stage.fail(operation.command, counted)
            new = stage.picture()
            for at in spread(counted.found, max(1, most // len(operations))):
                stage.reset(*operation.before)
                fault = make(stage, at)
                ended = stage.fail(operation.command, fault, deadline=deadline)
                if fault.hit:
                    where = f"{case}: {name}, {operation.name} at {fault.killed_at} {at}"
                    yield judge(stage, name, where, ended, old, new)
    finally:
        stage.close()


def judge(stage: Stage, fault: str, where: str, ended: Ended, old: Picture, new: Picture) -> Outcome:
    """What a command that failed, or did not, says of itself, held against what stands; and after the next command."""
    at_once = stage.picture()
    is_now = named(at_once, old, new)
    wrong: list[str] = []
    if ended.code == 0 and is_now != "new":
        wrong.append(f"said to be done, and is {is_now or pictures.difference(at_once, new)}")
    if ended.code == 1 and is_now != "old" and "could NOT be restored" not in ended.output:
        wrong.append(f"{is_now or 'between'} stands after: {ended.output}")
    # A thread that cannot leave a namespace ends the process, as all after it would be done in the wrong place.
    aborted = ended.code == -signal.SIGABRT and "cannot come back" in ended.output
    if (ended.code not in (0, 1) and not aborted) or "Traceback" in ended.output:
        wrong.append(f"ended with {ended.code}: {ended.output}")
    if ended.code and "netapply: " not in ended.output:
        wrong.append(f"no error was told: {ended.output!r}")
    if ended.seconds > 20:
        wrong.append(f"took {ended.seconds:.0f} s")
    return resolved(stage, Outcome(fault, stage.case.backend, where, is_now or "between", "", tuple(wrong)), old, new)


def resolved(stage: Stage, so_far: Outcome, old: Picture, new: Picture) -> Outcome:
    """The outcome after `netapply recover`."""
    wrong = list(so_far.wrong)
    recovered = stage.run("recover")
    if recovered.code:
        wrong.append(f"recover ended with {recovered.code}: {recovered.output}")
    then = stage.picture()
    state = named(then, old, new)
    if not state:
        wrong.append(f"neither old nor new: {pictures.difference(then, old)} | {pictures.difference(then, new)}")
    if stage.pending():
        wrong.append("the journal still says pending")
    wrong += pictures.lost(stage.empty, then, legacy_counters=False)
    return so_far._replace(state=state, wrong=tuple(wrong))
