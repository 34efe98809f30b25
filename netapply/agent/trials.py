"""Applies that wait to be confirmed: what comes back, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from netapply.agent.held import Wanted
from netapply.values import NamedTuple


class Before(NamedTuple):
    """What comes back: a wish; or, where there was none, what stood, where the apply changed that."""

    wanted: Wanted | None
    changed: bool


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

    def begin(self, key: str, before: Before, seconds: float, meant: Wanted | None = None) -> None:
        """Wait for so long. An apply upon an apply that was never confirmed goes back to before both."""
        earlier = self.end(key)
        self._wait(key, earlier.before if earlier else before, meant, _now() + seconds)

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
        """Wait again for what `end` gave, until the same time."""
        self._wait(key, trial.before, trial.meant, trial.timer.when())

    def end(self, key: str) -> Trial | None:
        """Wait no more; None where nothing waits."""
        trial = self._waiting.pop(key, None)
        if trial is not None:
            trial.timer.cancel()
        return trial

    @property
    def before(self) -> Mapping[str, Wanted | None]:
        """What was wanted before, by key."""
        return {key: trial.before.wanted for key, trial in self._waiting.items()}

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
            self._over(key, trial.before)


def _now() -> float:
    return asyncio.get_running_loop().time()
