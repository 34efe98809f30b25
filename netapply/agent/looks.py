"""When each namespace is looked at though nobody told of anything: evenly over the time, so that no heal waits for it.

Where the kernel tells of every change, seldom: in case that it did not. Where it tells nothing (iptables-legacy has no
events, settings have none), every `poll` seconds; but `most` looks a second are enough, whatever the number of these
namespaces: of so many that this is less than one look each in `poll` seconds, each is looked at less often. A hint that
something has happened somewhere has all of them looked at, twice in `poll` seconds at most.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from itertools import count
from typing import Protocol

from netapply.agent.held import Held
from netapply.agent.workers import Workers

#: Seconds between looks where the kernel tells of every change.
SELDOM = 60.0
#: Of the time, looks at all because of a hint take no more than one part in so many.
_SHARE = 5
#: Looks that one worker does in a row: some milliseconds.
_CHUNK = 64


class Looked(Protocol):
    """What is looked at; `look_at` is when (monotonic seconds), and belongs to `Looks`."""

    held: Held | None
    look_at: float
    silent: bool

    @property
    def busy(self) -> bool:
        """Whether something is being done there or waits to be."""
        ...

    @property
    def working(self) -> bool:
        """Whether something is being done at this moment, which may have looked already."""
        ...

    def wake(self, *, deep: bool = False, since: float = 0.0) -> None:
        """It does not hold its plan."""
        ...


class Looks:
    """All looks that are due some time. `add` is for the event loop, in which `run` is a task."""

    def __init__(self, poll: float, most: float, workers: Workers) -> None:
        self._poll = poll
        self._most = most
        self._workers = workers
        self._heap: list[tuple[float, int, Looked]] = []
        self._numbers = count()
        self._sooner = asyncio.Event()
        self._silent: set[Looked] = set()
        self._hinted, self._not_before = False, 0.0

    def interval(self, *, silent: bool) -> float:
        """Seconds between two looks at one namespace."""
        return max(self._poll, len(self._silent) / self._most) if silent else SELDOM

    def _moment(self, *, silent: bool) -> float:
        """What is due within so many seconds is looked at together, as to begin takes as long as some looks."""
        return max(self._poll / 10, self.interval(silent=True) / 50) if silent else self._poll

    def hint(self) -> None:
        """Something may have happened where the kernel tells nothing."""
        self._hinted = True
        self._sooner.set()

    def add(self, one: Looked) -> None:
        """Look at it from now on, and as often as it is `silent` now; for the first time at some moment by then."""
        (self._silent.add if one.silent else self._silent.discard)(one)
        interval = self.interval(silent=one.silent)
        self._put(one, time.monotonic() + interval * random.random())  # noqa: S311 - to spread them

    def spread(self) -> None:
        """All that there are at the start are known by now: look at them evenly over the time that is right for all."""
        heap, self._heap = self._heap, []
        for at, _, one in heap:
            if one.look_at == at:
                self.add(one)

    def remove(self, one: Looked) -> None:
        """Look at it no more."""
        self._silent.discard(one)
        one.look_at = 0.0

    def _put(self, one: Looked, at: float) -> None:
        one.look_at = at - at % self._moment(silent=one.silent)
        heapq.heappush(self._heap, (one.look_at, next(self._numbers), one))
        if self._heap[0][2] is one:
            self._sooner.set()

    async def run(self) -> None:
        """Look, as long as the loop runs."""
        while True:
            now = time.monotonic()
            sweeps = self._hinted and now >= self._not_before
            due = list(self._silent) if sweeps else self._due(now)
            if sweeps:
                self._hinted = False
            took = [await self._look(due[first : first + _CHUNK]) for first in range(0, len(due), _CHUNK)]
            if sweeps:
                self._not_before = now + max(self._poll / 2, _SHARE * sum(took))
            for one in due:
                if one.look_at:
                    self._put(
                        one, now + (self._moment(silent=True) if one.working else self.interval(silent=one.silent))
                    )
            await self._rest()

    def _due(self, now: float) -> list[Looked]:
        found: list[Looked] = []
        while self._heap and self._heap[0][0] <= now:
            at, _, one = heapq.heappop(self._heap)
            if one.look_at == at and one.held is not None:
                found.append(one)
        return found

    async def _look(self, some: list[Looked]) -> float:
        """Wake those that do not hold. The seconds that the looks took, without those of heals in between."""
        begun = time.monotonic()
        held = [(one, one.held) for one in some if one.held is not None and not one.busy]

        def look() -> tuple[list[Looked], float]:
            since = time.monotonic()
            return [one for one, each in held if not _holds(each)], time.monotonic() - since

        lost, took = await self._workers.run(look)
        for one in lost:
            one.wake(deep=True, since=begun)
        return took

    async def _rest(self) -> None:
        """Until something is due."""
        self._sooner.clear()
        loop = asyncio.get_running_loop()
        due = self._heap[0][0] if self._heap else time.monotonic() + SELDOM
        if self._hinted:
            due = min(due, self._not_before)
        timer = loop.call_later(max(due - time.monotonic(), 0.0), self._sooner.set)
        try:
            await self._sooner.wait()
        finally:
            timer.cancel()


def _holds(held: Held) -> bool:
    """Whether it holds; where that cannot be seen, somebody has to look closer."""
    try:
        return held.holds()
    except Exception:  # noqa: BLE001 - whoever looks closer tells what it is; all the others are looked at still
        return False
