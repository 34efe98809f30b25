"""What happened to one namespace: told as events, counted, logged, and summed up for its status."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from netapply.agent.events import (
    Appeared,
    Applied,
    Cause,
    Dormant,
    Drifted,
    Event,
    Failed,
    Healed,
    Listening,
    Quarantined,
    Recovered,
    Removed,
    Vanished,
)
from netapply.agent.held import Brought, Held, Wanted
from netapply.agent.listening import proxy_ports
from netapply.agent.tally import Tally
from netapply.errors import LockError
from netapply.results import Result

_log = structlog.stdlib.get_logger("netapply.agent")


class Chronicle:
    """One namespace's. Times that are given are monotonic; what it tells has the wall clock's."""

    def __init__(self, name: str, tally: Tally, tell: Callable[[Event], None]) -> None:
        self._name = name
        self._tally = tally
        self._tell = tell
        self.last_apply = 0.0
        self.heals = 0
        self.last_cause: Cause | None = None
        self.error = ""
        self._open_since = 0.0
        self._open_seconds = 0.0
        self._dormant_since = 0.0

    # --- for how long capture was wanted and not in force ----------------------------------------------------

    @property
    def open_seconds(self) -> float:
        """All such moments together."""
        return self._open_seconds + (time.monotonic() - self._open_since if self._open_since else 0.0)

    def is_open(self) -> None:
        """From now on, if not already."""
        self._open_since = self._open_since or time.monotonic()

    def is_closed(self) -> None:
        """Capture is in force, or not wanted."""
        if self._open_since:
            self._open_seconds += time.monotonic() - self._open_since
            self._open_since = 0.0

    # --- what happened ---------------------------------------------------------------------------------------

    def read(self, held: Held) -> None:
        """Count what was read of the kernel's news."""
        news = held.counted()
        self._tally.notifications += news.messages
        self._tally.forged += news.forged
        self._tally.overruns += news.overrun

    def appeared(self, path: str, inode: int) -> None:
        """The namespace was opened."""
        self._tell(Appeared(self._name, time.time(), path, inode))

    def vanished(self) -> None:
        """It was let go, as its name leads to it no more."""
        self._tell(Vanished(self._name, time.time()))

    def applied(self, wanted: Wanted, result: Result) -> None:
        """A plan is in force that was not before."""
        self._recovered(result)
        self.last_apply = time.time()
        self._tally.applies += 1
        self._tally.apply_seconds.observe(result.duration)
        _, backend, _, steps, degraded = result[:5]
        event = Applied(
            self._name,
            time.time(),
            wanted.fingerprint,
            backend,
            result.changed,
            result.duration,
            steps,
            degraded,
        )
        self._tell(event)

    def healed(self, brought: Brought, since: float) -> None:
        """It had drifted, which was known at `since`, and holds its plan again."""
        cause, seconds = brought.cause, max(0.0, brought.proven - since)
        self._recovered(brought.result)
        self._tally.healed(cause.process if cause else "", seconds)
        self.heals += 1
        self.last_cause = cause or self.last_cause
        self.last_apply = at = time.time() - (time.monotonic() - brought.proven)
        self._tell(Drifted(self._name, at - seconds, brought.changes, cause))
        self._tell(Healed(self._name, at, cause, seconds, brought.result.steps))

    def removed(self, result: Result) -> None:
        """All that was ours was taken down."""
        self._tell(Removed(self._name, time.time(), result.steps))

    def failed(self, error: Exception, wait: float) -> None:
        """An attempt failed, and there will be another in `wait` seconds."""
        self.error = str(error)
        self._tally.failures += 1
        self._tally.lock_failures += isinstance(error, LockError)
        step = getattr(error, "next_step", "")
        self._tell(Failed(self._name, time.time(), self.error, step, time.time() + wait))
        _log.warning("failed", namespace=self._name, error=self.error, next_step=step, again_in=wait)

    def quarantined(self, rest: float, heals: int, window: float) -> None:
        """It was healed more often than `heals` times in `window` seconds."""
        cause = self.last_cause
        who = f", last because of {cause.process} ({cause.pid})" if cause else ""
        reason = f"healed more than {heals} times in {window:g} s{who}"
        self._tally.quarantines += 1
        self._tell(Quarantined(self._name, time.time(), time.time() + rest, reason))
        _log.warning("quarantined", namespace=self._name, seconds=rest, reason=reason)

    def dormant(self, wanted: Wanted) -> None:
        """Capture is down until the proxy listens."""
        self._dormant_since = time.monotonic()
        ports = ", ".join(map(str, sorted(proxy_ports(wanted.plan))))
        self._tell(Dormant(self._name, time.time(), f"nobody listens on all of {ports}"))

    def dormant_seconds(self) -> float:
        """For how long it has been so."""
        return time.monotonic() - self._dormant_since if self._dormant_since else 0.0

    def listening(self, wanted: Wanted) -> None:
        """The proxy listens; told where capture was dormant."""
        if self._dormant_since:
            seconds, self._dormant_since = self.dormant_seconds(), 0.0
            self._tell(Listening(self._name, time.time(), wanted.plan.proxy.outbound_port, seconds))

    def _recovered(self, result: Result) -> None:
        for note in result.notes:
            if "interrupted run" in note:
                self._tally.recoveries += 1
                self._tell(Recovered(self._name, time.time(), note))
