"""How much healing one namespace may have, so that one that is fought over starves nobody. Pure: time is given."""

from __future__ import annotations

from collections import deque

from netapply.agent.model import Budget


class Account:
    """The heals and failures of one namespace. All times are monotonic seconds."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._heals: deque[float] = deque()
        self._rest = 0.0
        self._rested_until = 0.0
        self._backoff = 0.0

    def healed(self, now: float) -> float:
        """A heal was spent: 0, or the seconds of quarantine that it costs."""
        self._backoff = 0.0
        heals, budget = self._heals, self._budget
        heals.append(now)
        while heals[0] <= now - budget.window:
            heals.popleft()
        if len(heals) <= budget.heals:
            return 0.0
        heals.clear()
        again = self._rest and now - self._rested_until < 10 * budget.window
        self._rest = min(2 * self._rest if again else budget.quarantine, budget.longest)
        self._rested_until = now + self._rest
        return self._rest

    def failed(self) -> float:
        """An attempt failed: the seconds until the next."""
        self._backoff = min(2 * self._backoff or self._budget.backoff, self._budget.longest)
        return self._backoff

    def succeeded(self) -> None:
        """The namespace holds its plan: the next failure is a first one."""
        self._backoff = 0.0
