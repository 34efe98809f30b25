"""Long lists: 1,000 and 10,000 exclusions, blocks and ports, put into a namespace without ours.

`whole` and `backend` are given a list that they have not seen before, one element further each time: compiling and
encoding are in the time of the first, encoding in that of the second, as reading the text is in the tools'. Printing
that text is in nobody's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count

from bench import places
from bench.measure import Spread, interleaved
from bench.operations import Rested
from bench.plans import excluding_cidrs, excluding_ports
from bench.recording import record
from bench.subjects import BackendAlone, Exec, Floor, Subject, Whole, exec_texts
from netapply.backend import BUILT_IN
from netapply.lab import Place
from netapply.plan import CapturePlan

KINDS: dict[str, Callable[[int, int], CapturePlan]] = {"CIDRs": excluding_cidrs, "ports": excluding_ports}
#: The tool is given the best text there is: sets where the dialect has them and the tool for them is there, and rules.
TOOLS = ("exec", "exec linear")
WAYS = ("whole", "backend", "floor", *TOOLS)


def name(backend: str, count: int, kind: str, way: str) -> str:
    """The name of a figure."""
    return f"{backend} {count} {kind} {way}"


def measure(counts: tuple[int, ...], rounds: int) -> dict[str, Spread]:
    """The times of an apply, by `name`."""
    found: dict[str, Spread] = {}
    for size in counts:
        for kind, plan_of in KINDS.items():
            found.update(_measured(size, kind, partial(plan_of, size), rounds))
    return found


def _measured(size: int, kind: str, make: Callable[[int], CapturePlan], rounds: int) -> dict[str, Spread]:
    with ExitStack() as stack:
        turns: dict[str, Callable[[], float]] = {}
        for backend in BUILT_IN:
            for way, subject in _subjects(stack, backend, make(0)).items():
                turns[name(backend, size, kind, way)] = _apply(subject, make)
        return interleaved([turns], rounds, warm_up=1)


def _apply(subject: Subject, make: Callable[[int], CapturePlan]) -> Callable[[], float]:
    rested, turns = Rested(subject), count(1)

    def turn() -> float:
        if isinstance(subject, BackendAlone | Whole):
            subject.take(make(next(turns)))
        took = rested.turn("apply")
        rested.turn("clean")
        return took

    return turn


def _subjects(stack: ExitStack, backend: str, plan: CapturePlan) -> dict[str, Subject]:
    state = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
    cycle = record(stack.enter_context(places.place()).fd, state, backend, plan, plan)
    makers: dict[str, Callable[[Place], Subject]] = {
        "whole": lambda spot: Whole(spot, state, backend, plan, plan),
        "backend": lambda spot: BackendAlone(spot, backend, plan, plan),
        "floor": lambda spot: Floor(spot, cycle),
    }
    with_sets = exec_texts(backend, plan, plan)
    if backend == "nftables" or shutil.which("ipset") or "# ipset" not in with_sets["apply"]:
        makers["exec"] = lambda spot: Exec(spot, backend, with_sets)
    if backend != "nftables" and "# ipset" in with_sets["apply"]:
        makers["exec linear"] = lambda spot: Exec(spot, backend, exec_texts(backend, plan, plan, linear=True))
    made: dict[str, Subject] = {}
    for way, make in makers.items():
        made[way] = make(stack.enter_context(places.place()))
        stack.callback(made[way].close)
    return made
