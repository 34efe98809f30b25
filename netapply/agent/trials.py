"""Applies that wait to be confirmed: what comes back, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from netapply.agent.held import Wanted
from netapply.values import NamedTuple


class Before(NamedTuple):
    """What comes back: a wish; or, where there was none, what stood so many states before."""

    wanted: Wanted | None
    back: int = 0


class Trial(NamedTuple):
    """What was before, and the timer that brings it back.

    `meant` is what `confirm` puts in the place of what is on trial, if that is something else.
    """

    before: Before
    timer: asyncio.TimerHandle
    meant: Wanted | None


class Trials:
    """Those of one agent, by the keys of their namespaces. `over` is called with what waited for too long."""

    def __init__(self, over: Callable[[str, Before], None]) -> None:
        self._over = over
        self._waiting: dict[str, Trial] = {}
        #: Those that nobody confirmed, until they have gone back.
        self._over_time: dict[str, Before] = {}

    def begin(self, key: str, before: Before, seconds: float, meant: Wanted | None = None) -> None:
        """Wait for so long. An apply upon an apply that was never confirmed goes back to before both."""
        earlier = self.end(key)
        if earlier is not None:
            before = earlier.before._replace(back=earlier.before.back + before.back)
        self._wait(key, before, meant, _now() + seconds)

    def of(self, key: str) -> Trial | None:
        """What waits; None where nothing does."""
        return self._waiting.get(key)

    def extend(self, key: str, seconds: float) -> bool:
        """Wait for so long from now; False where nothing waits."""
        trial = self.end(key)
        if trial is not None:
            self._wait(key, trial.before, trial.meant, _now() + seconds)
        return trial is not None

    def resume(self, key: str, trial: Trial) -> None:
        """Wait again for what `end` gave, until the same time; unless something else waits by now."""
        if key in self._waiting:
            return
        self._wait(key, trial.before, trial.meant, trial.timer.when())

    def end(self, key: str) -> Trial | None:
        """Wait no more; None where nothing waits."""
        self._over_time.pop(key, None)
        trial = self._waiting.pop(key, None)
        if trial is not None:
            trial.timer.cancel()
        return trial

    @property
    def before(self) -> Mapping[str, Before]:
        """What is to come back, by key, unless it is confirmed."""
        return self._over_time | {key: trial.before for key, trial in self._waiting.items()}

    def close(self) -> None:
        """Wait for nothing."""
        for key in list(self._waiting):
            self.end(key)

    def _wait(self, key: str, before: Before, meant: Wanted | None, until: float) -> None:
        timer = asyncio.get_running_loop().call_at(until, self._expire, key)
        self._waiting[key] = Trial(before, timer, meant)

    def _expire(self, key: str) -> None:
        trial = self.end(key)
        if trial is not None:
            self.go_back(key, trial.before)

    def go_back(self, key: str, before: Before) -> None:
        """Nobody confirmed it, now or before the agent's last end."""
        self._over_time[key] = before
        self._over(key, before)


def _now() -> float:
    return asyncio.get_running_loop().time()
