"""A command is killed at each of its system calls in turn, and the next one, `netapply recover`, makes it whole."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.faults import pictures
from tests.faults.outcome import Outcome
from tests.faults.pictures import Picture
from tests.faults.stage import Case, Stage
from tests.faults.tracing import CALLS, Call, Child, Fault, Kill

#: Calls that can change something that outlives the process. Between two of them, death at any point is the same.
_CHANGING = frozenset(
    CALLS[name]
    for name in ("write", "sendto", "sendmsg", "setsockopt", "flock", "fsync", "rename", "renameat", "mkdir", "link",
                 "linkat", "unlink", "unlinkat", "openat")
)  # fmt: skip
#: asm-generic/fcntl.h: O_WRONLY, O_RDWR or O_CREAT.
_TO_WRITE = 0o103
#: linux/netlink.h: NLM_F_ACK and NLM_F_DUMP; linux/netfilter/nfnetlink.h: NFNL_MSG_BATCH_BEGIN.
_ACK, _DUMP, _BATCH_BEGIN = 0x4, 0x300, 0x10
_REQUESTS = frozenset((CALLS["sendto"], CALLS["sendmsg"], CALLS["setsockopt"]))


class Operation(NamedTuple):
    """A command, and those that bring the namespace to where it begins, from wherever it is."""

    name: str
    command: str
    before: tuple[str, ...]
    #: The command that is killed first, to leave an interrupted run for this one to find.
    interrupted: str = ""


OPERATIONS = (
    Operation("apply", "apply a", ("clean",)),
    Operation("update", "apply b", ("apply a",)),
    Operation("clean", "clean", ("apply a",)),
    Operation("rollback", "rollback", ("apply b", "apply a")),
    Operation("recover after apply", "recover", ("clean",), "apply a"),
    Operation("recover after update", "recover", ("apply a",), "apply b"),
    Operation("recover after clean", "recover", ("apply a",), "clean"),
)
#: Of a case with a dialect to go to.
MIGRATE = Operation("migrate", "migrate b", ("clean", "apply a"))
RECOVER_MIGRATE = Operation("recover after migrate", "recover", ("clean", "apply a"), "migrate b")
PROBED = Operation("migrate with canary connections", "probed b", ("clean", "apply a"))


def changes(child: Child, call: Call) -> bool:
    """Whether the call changes something that outlives the process."""
    if call.number not in _CHANGING:
        return False
    match call.name:
        case "openat":
            return bool(call.arguments[2] & _TO_WRITE)
        case "write":
            return call.arguments[0] > 2
        case "setsockopt":
            return call.arguments[1] in (0, 41)  # IPPROTO_IP, IPPROTO_IPV6: the others are about the socket
        case "sendto":
            kind, flags = struct.unpack("=HH", child.memory(call.arguments[1] + 4, 4))
            return kind == _BATCH_BEGIN or (flags & _ACK != 0 and flags & _DUMP != _DUMP)
    return True


class _Watch(Fault):
    """Tells which calls there are, and which of them change something."""

    curious = True

    def __init__(self) -> None:
        self.changing: list[int] = []

    def entering(self, child: Child, call: Call) -> int:
        if changes(child, call):
            self.changing.append(call.place)
        return 0


class Interrupt(Fault):
    """Kills before the `at`th change of the kernel that is made while the journal says pending."""

    curious = True

    def __init__(self, stage: Stage, at: int) -> None:
        self._stage = stage
        self._at = at
        self.found = 0

    def entering(self, child: Child, call: Call) -> int:
        if call.number in _REQUESTS and changes(child, call) and self._stage.pending():
            if self.found == self._at:
                self.hit = True
                child.kill()
            self.found += 1
        return 0


def interruption(stage: Stage, before: tuple[str, ...], command: str) -> int:
    """Before which change an `Interrupt` leaves `command` halfway."""
    stage.reset(*before)
    watch = Interrupt(stage, 1 << 30)
    done = stage.fail(command, watch)
    if done.code or not watch.found:
        raise AssertionError(f"{stage.case}: {command} ended with {done.code}: {done.output}")
    return watch.found // 2


def kill_everywhere(case: Case, operation: Operation, *, stride: int) -> Iterator[Outcome]:
    """Every changing call, what comes after it, and each `stride`th of the others. An outcome for each kill."""

    def points(calls: _Watch) -> list[int]:
        wanted = {*calls.changing, *(place + 1 for place in calls.changing), *range(0, calls.calls, stride)}
        return sorted(wanted)

    return _kill(case, operation, points)


def kill_some(case: Case, operation: Operation, *, most: int) -> Iterator[Outcome]:
    """Up to `most` of the changing calls, evenly."""
    return _kill(case, operation, lambda calls: [calls.changing[at] for at in spread(len(calls.changing), most)])


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of range(count), evenly."""
    return sorted({at * count // min(count, most) for at in range(min(count, most))}) if count else []


def _kill(case: Case, operation: Operation, points: Callable[[_Watch], list[int]]) -> Iterator[Outcome]:
    stage = Stage(case)
    try:
        halfway = 0
        if operation.interrupted:
            halfway = interruption(stage, operation.before, operation.interrupted)
        old, new, calls = _rehearse(stage, operation, halfway)
        for at in points(calls):
            if at < calls.calls:
                _prepare(stage, operation, halfway)
                begun = stage.picture()
                fault = Kill(at)
                ended = stage.fail(operation.command, fault)
                if not fault.hit:
                    continue
                yield _judge(stage, operation, fault, ended.code, (begun, old, new))
    finally:
        stage.close()


def _rehearse(stage: Stage, operation: Operation, halfway: int) -> tuple[Picture, Picture, _Watch]:
    """The old state, the new one, and the calls that lie between."""
    old = stage.reset(*operation.before)
    if operation.interrupted:  # what it goes back to is not what it finds
        new = stage.reset(operation.interrupted)
    _prepare(stage, operation, halfway)
    watch = _Watch()
    done = stage.fail(operation.command, watch)
    if done.code:
        raise AssertionError(f"{stage.case}: {operation.command} ended with {done.code}: {done.output}")
    if not operation.interrupted:
        new = stage.picture()
    if old.state == new.state:
        raise AssertionError(f"{stage.case}: {operation.name} changes nothing, and so tells nothing")
    return old, new, watch


def _prepare(stage: Stage, operation: Operation, halfway: int) -> None:
    stage.reset(*operation.before)
    if operation.interrupted:
        stage.fail(operation.interrupted, Interrupt(stage, halfway))
        if not stage.pending():
            raise AssertionError(f"{stage.case}: {operation.interrupted} was not interrupted")


def _judge(stage: Stage, operation: Operation, fault: Fault, code: int, states: tuple[Picture, ...]) -> Outcome:
    begun, old, new = states
    at_once = stage.picture()
    recovered = stage.run("recover")
    then = stage.picture()
    faults: list[str] = []
    if code != -9:
        faults.append(f"ended with {code}")
    if recovered.code:
        faults.append(f"recover ended with {recovered.code}: {recovered.output}")
    if left := stage.pending():
        faults.append(f"still pending: {left}")
    faults += pictures.lost(stage.empty, then, legacy_counters=False, counters=operation != PROBED)
    counters = pictures.zeroed(begun, then)
    state = named(then, old, new)
    if not state:
        faults.append(f"neither old nor new: {pictures.difference(then, old)} | {pictures.difference(then, new)}")
    return Outcome(
        f"killed: {operation.name}",
        stage.case.backend,
        f"{stage.case}: {operation.name} at call {fault.calls} ({fault.killed_at})",
        named(at_once, old, new) or "between",
        state,
        tuple(faults),
        counters,
    )


def named(found: Picture, old: Picture, new: Picture) -> str:
    """Which of the two it is; "" for neither."""
    if found.state == new.state:
        return "new"
    return "old" if found.state == old.state else ""
