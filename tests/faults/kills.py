"""A command is killed at each of its system calls in turn, and the next one, `netapply recover`, makes it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.faults import pictures
from tests.faults.outcome import Outcome
from tests.faults.pictures import Picture
from tests.faults.stage import Case, Stage
from tests.faults.tracing import CALLS, Call, Child, Fault, Kill

#: Calls that can change anything that outlives the process. Between two of them, death at any point is the same.
_CHANGING = frozenset(
    CALLS[name]
    for name in ("write", "sendto", "sendmsg", "setsockopt", "flock", "fsync", "rename", "renameat", "mkdir", "link",
                 "linkat", "unlink", "unlinkat", "setns", "openat")
)  # fmt: skip


class Operation(NamedTuple):
    """A command, and those that bring the namespace to where it begins, from wherever it is."""

    name: str
    command: str
    before: tuple[str, ...]
    #: A fault that leaves an interrupted run for the command to find: the share of the calls that are made.
    interrupted: float = 0


OPERATIONS = (
    Operation("apply", "apply a", ("clean",)),
    Operation("update", "apply b", ("apply a",)),
    Operation("clean", "clean", ("apply a",)),
    Operation("rollback", "rollback", ("apply b", "apply a")),
    Operation("recover", "recover", ("apply a",), 1),
)


class _Watch(Fault):
    """Tells which calls there are, and which of them change something."""

    curious = True

    def __init__(self) -> None:
        self.changing: list[int] = []

    def entering(self, child: Child, call: Call) -> int:
        if call.number in _CHANGING:
            self.changing.append(call.place)
        return 0


class Interrupt(Fault):
    """Kills when the rules were committed, or a first table of them, and the journal still says pending."""

    curious = True

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._sent = 0

    def entering(self, child: Child, call: Call) -> int:
        if self._stage.pending() and call.number in (CALLS["sendto"], CALLS["sendmsg"], CALLS["setsockopt"]):
            self._sent += 1
            if self._sent == 4:
                self.hit = True
                child.kill()
        return 0


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
        old, new, calls = _rehearse(stage, operation)
        for at in points(calls):
            if at < calls.calls:
                _prepare(stage, operation)
                begun = stage.picture()
                fault = Kill(at)
                ended = stage.fail(operation.command, fault)
                if not fault.hit:
                    continue
                yield _judge(stage, operation, fault, ended.code, (begun, old, new))
    finally:
        stage.close()


def _rehearse(stage: Stage, operation: Operation) -> tuple[Picture, Picture, _Watch]:
    """The old state, the new one, and the calls that lie between."""
    _prepare(stage, operation)
    old = stage.picture()
    watch = _Watch()
    done = stage.fail(operation.command, watch)
    if done.code:
        raise AssertionError(f"{stage.case}: {operation.command} ended with {done.code}: {done.output}")
    new = stage.picture()
    if operation.interrupted:  # what it goes back to is not what it finds
        old = stage.reset(*operation.before)
        new = stage.reset("apply b")
    return old, new, watch


def _prepare(stage: Stage, operation: Operation) -> None:
    stage.reset(*operation.before)
    if operation.interrupted:
        stage.fail("apply b", Interrupt(stage))


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
    faults += pictures.lost(stage.empty, then, counters=False)
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
