"""The same for asyncio: each call runs in a worker thread, and a cancelled one rolls back before it lets go.

    async with netapply.aio.open_capture("pod-1") as capture:
        await capture.apply(plan)

A call that is cancelled waits for its thread: no second call meets the namespace half-way. What the thread raised is
the cause of the CancelledError, so a roll-back that did not hold is not lost.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from netapply import api
from netapply.plan import CapturePlan
from netapply.results import Detection, Diff, Result, RuleCounter

T = TypeVar("T")


class AsyncCapture:
    """One namespace, awaited. Opened by entering it, or by the first call."""

    def __init__(self, opener: Callable[[], api.CaptureLike]) -> None:
        self._opener = opener
        self._capture: api.CaptureLike | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        try:
            async with self._turn:
                await self._opened()
        except BaseException:
            await self.close()  # cancelled: the thread may have opened it all the same, and nobody will leave it
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def apply(self, plan: CapturePlan, *, backend: str = "auto", layout: str = "netapply") -> Result:
        """Make the namespace hold `plan`.

        Cancelled while there are steps to come, the namespace is as it was before CancelledError is raised, from an
        ApplyError that says so. Cancelled later than that, the plan stands, and the CancelledError has no cause.
        """
        stop = threading.Event()
        return await self._run(
            lambda capture: capture.apply(plan, backend=backend, layout=layout, cancelled=stop.is_set), stop
        )

    async def diff(self, plan: CapturePlan, *, backend: str = "auto", layout: str = "netapply") -> Diff:
        """What `apply` would change."""
        return await self._run(lambda capture: capture.diff(plan, backend=backend, layout=layout))

    async def verify(self, plan: CapturePlan | None = None) -> Diff:
        """Whether the namespace still holds `plan`, or what was last applied."""
        return await self._run(lambda capture: capture.verify(plan))

    async def clean(self) -> Result:
        """Remove all that is ours."""
        return await self._run(lambda capture: capture.clean())

    async def show(self) -> tuple[RuleCounter, ...]:
        """Our live rules with their counters."""
        return await self._run(lambda capture: capture.show())

    async def detect(self) -> Detection:
        """Which backends work here."""
        return await self._run(lambda capture: capture.detect())

    async def close(self) -> None:
        """Let go of the namespace. Idempotent."""
        async with self._turn:
            capture, self._capture = self._capture, None
            if capture is not None:
                await to_the_end(_in_thread(capture.close))

    async def _opened(self) -> api.CaptureLike:
        if self._capture is not None:
            return self._capture

        def open_it() -> api.CaptureLike:
            self._capture = self._opener()  # here, as a cancelled caller would lose what the thread returns
            return self._capture

        return await to_the_end(_in_thread(open_it))

    async def _run(self, work: Callable[[api.CaptureLike], T], stop: threading.Event | None = None) -> T:
        async with self._turn:
            capture = await self._opened()
            return await to_the_end(_in_thread(lambda: work(capture)), stop)


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    return asyncio.ensure_future(asyncio.to_thread(work))


async def to_the_end(task: asyncio.Future[T], stop: threading.Event | None = None) -> T:
    """What a thread returns. When cancelled, `stop` asks it to, and it is waited for: it cannot be left half-way."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError as cancelled:
        if stop is not None:
            stop.set()
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise cancelled from (None if task.cancelled() else task.exception())


def open_capture(
    spec: str | int | None = None,
    *,
    host: bool = False,
    lock_timeout: float = 10.0,
    state_directory: str | None = None,
) -> AsyncCapture:
    """As `netapply.open`, for `async with`. Nothing is opened before it is entered."""
    return AsyncCapture(
        lambda: api.open_capture(spec, host=host, lock_timeout=lock_timeout, state_directory=state_directory)
    )
