"""Apply, update and clean, in each dialect, by each way; and what an update does not wait for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from bench import places
from bench.measure import Spread, clock, interleaved, rested, spread
from bench.plans import RULES, updated
from bench.recording import record
from bench.subjects import OPERATIONS, BackendAlone, Entered, Exec, Floor, Operation, Subject, Whole, exec_texts
from netapply.backend import BUILT_IN
from netapply.kernel import NETLINK_NETFILTER
from netapply.lab import Place
from netapply.netlink import open_netlink
from netapply.plan import CapturePlan

UPDATES: tuple[Operation, Operation] = ("update", "apply")  # of rules that stand, `apply` is one as well
WAYS = ("whole", "entered", "backend", "floor", "exec")


def name(backend: str, operation: str, way: str) -> str:
    """The name of a figure."""
    return f"{backend} {operation} {way}"


def measure(plan: CapturePlan, rounds: int) -> dict[str, Spread]:
    """The times of everything, by `name`. A round does one operation everywhere before the next one."""
    with ExitStack() as stack:
        subjects = {
            (backend, way): Rested(subject)
            for backend in BUILT_IN
            for way, subject in subjects_of(stack, backend, plan)[1].items()
        }
        stages: list[dict[str, Callable[[], float]]] = [
            {
                name(backend, operation, way): partial(subject.turn, operation)
                for (backend, way), subject in subjects.items()
            }
            for operation in OPERATIONS
        ]
        return interleaved(stages, rounds)


def subjects_of(
    stack: ExitStack, backend: str, first: CapturePlan, ways: tuple[str, ...] = WAYS
) -> tuple[dict[str, Place], dict[str, Subject]]:
    """A namespace for each of these ways of one dialect, and the ways at work there; all are gone with the stack."""
    second = updated(first)
    state = stack.enter_context(_state())
    cycle = record(stack.enter_context(places.place()).fd, state, backend, first, second)
    makers: dict[str, Callable[[Place], Subject]] = {
        "whole": lambda spot: Whole(spot, state, backend, first, second),
        "entered": lambda spot: Entered(spot, backend, first, second),
        "backend": lambda spot: BackendAlone(spot, backend, first, second),
        "floor": lambda spot: Floor(spot, cycle),
        "exec": lambda spot: Exec(spot, backend, exec_texts(backend, first, second)),
    }
    spots = {way: stack.enter_context(places.place()) for way in ways}
    subjects = {way: makers[way](spot) for way, spot in spots.items()}
    for subject in subjects.values():
        stack.callback(subject.close)
    return spots, subjects


class Rested:
    """Turns of one subject, whose namespace rests before each."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._since = 0.0

    def turn(self, operation: Operation) -> float:
        """Do it, and say how long it took without the rest, in seconds."""
        rested(self._since)
        took = self._subject.do(operation)
        self._since = time.perf_counter()
        return took


def waits(rounds: int) -> dict[str, Spread]:
    """The kernel's wait of one RCU grace period, provoked, beside updates that follow one another without a rest."""
    with ExitStack() as stack:
        found = {"grace period": _grace(stack, rounds)}
        for backend in BUILT_IN:
            subject = subjects_of(stack, backend, RULES, ("whole",))[1]["whole"]
            subject.do("apply")  # and from there to the other plan and back
            times = [subject.do(operation) for _ in range(rounds) for operation in UPDATES]
            found[name(backend, "back to back", "whole")] = spread(times)
    return found


def _grace(stack: ExitStack, rounds: int) -> Spread:
    """Closing a netfilter socket right after objects of its namespace were deleted (see netapply/reaper.py)."""
    spot = stack.enter_context(places.place())
    floor = Floor(spot, record(spot.fd, stack.enter_context(_state()), "nftables", RULES, updated(RULES)))
    stack.callback(floor.close)
    times: list[float] = []
    for _ in range(rounds):
        rested(time.perf_counter())
        idle = spot.inside(lambda: open_netlink(NETLINK_NETFILTER))
        floor.do("apply")
        floor.do("clean")
        times.append(clock(idle.close))
    return spread(times)


def _state() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir="/dev/shm")
