"""What the agent counts of itself, to be shown as `Metrics`."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from netapply.agent.model import Histogram

#: Seconds: from what a native heal takes to what a person would call an outage.
BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


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
        self.heals: Counter[str] = Counter()
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
        self.rejected_files = 0
        self.ticked = 0.0
