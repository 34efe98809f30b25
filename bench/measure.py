"""Times: taken in turns, so that what else the machine does meets every subject alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

#: Seconds that a subject's namespace rests before its turn: what the kernel frees in the background (one RCU grace
#: period after nftables objects were deleted, some 10 ms) is not waited for by the next one, as in a node agent's life.
REST = 0.03
#: Seconds before a turn that are spent awake.
AWAKE = 0.0005
#: Rounds that are not counted: imports, module loading, caches.
WARM_UP = 2


class Spread(NamedTuple):
    """Seconds: the median of so many `times`, and what one in ten was below (`low`) and above (`high`)."""

    median: float
    low: float
    high: float
    times: int

    def json(self) -> dict[str, float]:
        """In milliseconds."""
        return {
            **{name: round(getattr(self, name) * 1e3, 4) for name in ("median", "low", "high")},
            "times": self.times,
        }


def spread(times: Sequence[float]) -> Spread:
    """The spread of at least one time, in seconds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(last * 0.1)], ordered[round(last * 0.9)], len(ordered))


def clock(work: Callable[[], object]) -> float:
    """How long `work` takes, in seconds."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def rested(since: float) -> None:
    """Wait until REST after `since`, the last moments of it awake: a processor that slept is slow at first."""
    time.sleep(max(0.0, since + REST - time.perf_counter()))
    awake = time.perf_counter() + AWAKE
    while time.perf_counter() < awake:
        pass


def interleaved(
    stages: Sequence[Mapping[str, Callable[[], float]]], rounds: int, warm_up: int = WARM_UP
) -> dict[str, Spread]:
    """Go through the stages in every round; in each, everything gets a turn, and another one begins each time.

    A turn returns its time in seconds.
    """
    times: dict[str, list[float]] = {name: [] for stage in stages for name in stage}
    for number in range(-warm_up, rounds):
        for stage in stages:
            names = list(stage)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                took = stage[name]()
                if number >= 0:
                    times[name].append(took)
    return {name: spread(each) for name, each in times.items()}
