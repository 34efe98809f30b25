"""What the agent counts of itself, to be shown as `Metrics`."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from netapply.agent.model import STATES, Histogram, Metrics, State

#: Seconds: from what a native heal takes to what a person would call an outage.
BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

#: Heals are counted by so many names of processes, those that came first; the rest are OTHERS.
MOST_PROCESSES = 64
OTHERS = "others"


class Observed:
    """A histogram that grows."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def shown(self) -> Histogram:
        """As it is now."""
        return Histogram(BOUNDS, tuple(self._counts), self._total)


class Tally:
    """The counters of one agent; see `Metrics` for what each means."""

    def __init__(self) -> None:
        self.applies = 0
        self.failures = 0
        self._heals: Counter[str] = Counter()
        self.apply_seconds = Observed()
        self.heal_seconds = Observed()
        self.quarantines = 0
        self.lock_failures = 0
        self.recoveries = 0
        #: Of namespaces that are gone, or under no plan any more.
        self.fail_open_seconds = 0.0
        self.notifications = 0
        self.forged = 0
        self.overruns = 0
        self.ticked = 0.0

    def healed(self, process: str, seconds: float) -> None:
        """One heal more, because of a process of this name ("" where nobody knows), which gives itself the name."""
        known = process in self._heals or len(self._heals) < MOST_PROCESSES
        self._heals[process if known else OTHERS] += 1
        self.heal_seconds.observe(seconds)

    def shown(self, states: Iterable[State], *, fail_open: float, rejected_files: int, events_lost: int) -> Metrics:
        """All of it. `states` are the keepers', `fail_open` the seconds of those that are under a plan now."""
        return Metrics(
            {**dict.fromkeys(STATES, 0), **Counter(states)},
            self.applies,
            self.failures,
            dict(self._heals),
            self.apply_seconds.shown(),
            self.heal_seconds.shown(),
            self.quarantines,
            self.lock_failures,
            self.recoveries,
            self.fail_open_seconds + fail_open,
            self.notifications,
            self.forged,
            self.overruns,
            rejected_files,
            events_lost,
            self.ticked,
        )
