"""The same rules for a thousand namespaces, none of which was ever opened before: what a node agent does at its start.

Of each namespace the way in is counted (setns, sockets), the apply, and letting go of it. Blocks of namespaces take
turns, so that every way meets the same machine; each way has namespaces of its own, as what was done to one before
(tables of iptables-legacy stay) would help the next.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack

import netapply
from bench import places
from bench.measure import REST, clock
from bench.plans import RULES
from bench.recording import Cycle, record
from bench.replay import Sockets, play
from bench.subjects import bring
from netapply.backend import BUILT_IN, find_backend
from netapply.compiler import compile_plan
from netapply.namespace import Namespace

BLOCK = 50
WAYS = ("whole", "backend", "floor")


def measure(count: int) -> dict[tuple[str, str], float]:
    """(dialect, way) → seconds for all of `count` namespaces, which are at least BLOCK."""
    totals = {(backend, way): 0.0 for backend in BUILT_IN for way in WAYS}
    with ExitStack() as stack:
        spot = stack.enter_context(places.place()).fd
        state = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        cycles = {backend: record(spot, state, backend, RULES, RULES) for backend in BUILT_IN}
        blocks = count // BLOCK
        fds = {way: stack.enter_context(places.many(blocks * BLOCK)) for way in WAYS}
        for block in range(blocks):
            turn = block % len(WAYS)
            for backend, cycle in cycles.items():
                applies = _ways(state, backend, cycle)
                for way in WAYS[turn:] + WAYS[:turn]:
                    some = fds[way][block * BLOCK : (block + 1) * BLOCK]
                    apply = applies[way]
                    totals[backend, way] += clock(lambda: [apply(fd) for fd in some])  # noqa: B023 - called at once
                    _undo(some, cycle)
    return totals


def _ways(state: str, backend: str, cycle: Cycle) -> dict[str, Callable[[int], None]]:
    chosen = find_backend(backend)
    desired = compile_plan(RULES, chosen.dialect)

    def whole(fd: int) -> None:
        with netapply.open(fd, state_directory=state) as capture:
            capture.apply(RULES, backend=backend)

    def alone(fd: int) -> None:
        with Namespace.open(fd) as namespace:
            bring(chosen, namespace, desired)

    def floor(fd: int) -> None:
        sockets = places.visit(fd, lambda: Sockets(cycle.apply))
        play(sockets.calls(cycle.apply))
        sockets.close()

    return {"whole": whole, "backend": alone, "floor": floor}


def _undo(fds: list[int], cycle: Cycle) -> None:
    opened = [places.visit(fd, lambda: Sockets(cycle.clean)) for fd in fds]
    for sockets in opened:
        play(sockets.calls(cycle.clean))
    time.sleep(REST)  # closed at once, each would wait for what the kernel frees
    for sockets in opened:
        sockets.close()
