"""Worker threads of one agent: kernel calls are synchronous, and none is left half-way by who is cancelled."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Job(asyncio.Future[T], Generic[T]):
    """What a thread works at. Cancelled, it asks the thread to stop; but it is done when the thread is, as always."""

    def __init__(self, work: Callable[[], T], stop: threading.Event | None, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.work = work
        self._stop = stop

    def cancel(self, msg: Any = None) -> bool:  # noqa: ARG002 - as asyncio has it
        if self._stop is not None:
            self._stop.set()
        return False


class Workers:
    """Some threads; `close` waits for what runs.

    What they finish while the event loop is elsewhere it is told all at once: to wake it takes as long as a look at a
    namespace.
    """

    def __init__(self, number: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._finished: deque[tuple[_Job[Any], Any, BaseException | None]] = deque()
        self._told = False
        # Some more than there are processors, as one may wait for a lock that somebody holds.
        self._threads = [
            threading.Thread(target=self._run, name=f"netapply-agent-{index}")
            for index in range(number or 2 + (os.cpu_count() or 1))
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, work: Callable[[], T], stop: threading.Event | None = None) -> T:
        """What `work` returns or raises. Who is cancelled sets `stop`, and waits all the same for the thread."""
        job = _Job(work, stop, self._loop)
        self._waiting.put(job)
        try:
            return await job
        except asyncio.CancelledError as cancelled:
            raise cancelled from job.exception()

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None:
            result, failure = None, None
            try:
                result = job.work()
            except BaseException as error:  # noqa: BLE001 - handed to who waits, whatever it is
                failure = error
            self._finished.append((job, result, failure))
            if not self._told:  # set anew before the loop looks: so nothing is left behind
                self._told = True
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._told = False
        while self._finished:
            job, result, failure = self._finished.popleft()
            if failure is None:
                job.set_result(result)
            else:
                job.set_exception(failure)

    def close(self) -> None:
        """No more work. Nobody waits here for long: all that was begun was awaited."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
