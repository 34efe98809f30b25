"""Worker threads of one agent: kernel calls are synchronous, and none is left half-way by who is cancelled.

One thread works at a time as a rule: more of them would only take the interpreter from each other, and four cost twice
as much. Where the one at work is held up, by a lock that somebody holds or by the kernel, another goes on.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: Seconds after which who waits is not kept waiting any longer by work that does not end: that of four namespaces.
_HELD_UP = 0.005


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
    """A thread, and more of them up to `number` while it is held up; `close` waits for what runs.

    The event loop is told when nothing more waits; else it comes to see, and so is told of many at once: to wake it
    takes as long as a look at a namespace.
    """

    def __init__(self, number: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._finished: deque[tuple[_Job[Any], Any, BaseException | None]] = deque()
        self._told = False
        # Some more than there are processors, as one may wait for a lock that somebody holds.
        self._most = number or 2 + (os.cpu_count() or 1)
        self._guard = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._asked, self._done, self._done_before = 0, 0, 0
        self._look: asyncio.TimerHandle | None = None
        self._newest: threading.Thread
        self._begin()

    async def run(self, work: Callable[[], T], stop: threading.Event | None = None) -> T:
        """What `work` returns or raises. Who is cancelled sets `stop`, and waits all the same for the thread."""
        job = _Job(work, stop, self._loop)
        self._asked += 1
        self._waiting.put(job)
        if self._look is None and self._asked > 1:
            self._look_later()
        try:
            return await job
        except asyncio.CancelledError as cancelled:
            raise cancelled from job.exception()

    def _begin(self) -> None:
        thread = threading.Thread(target=self._run, name=f"netapply-agent-{len(self._threads)}")
        self._threads.add(thread)
        self._newest = thread
        thread.start()

    def _look_later(self) -> None:
        self._done_before = self._done
        self._look = self._loop.call_later(_HELD_UP, self._look_after)

    def _look_after(self) -> None:
        """Take what is finished; have one more thread where work waits, and none was done since the last look."""
        self._look = None
        self._tell()
        if self._asked > 1:
            with self._guard:
                if self._done == self._done_before and len(self._threads) < self._most and not self._waiting.empty():
                    self._begin()
            self._look_later()

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None:
            result, failure = None, None
            try:
                result = job.work()
            except BaseException as error:  # noqa: BLE001 - handed to who waits, whatever it is
                failure = error
            self._finished.append((job, result, failure))
            self._done += 1
            # Set anew before the loop looks: so nothing is left behind.
            if not self._told and self._waiting.empty():
                self._told = True
                self._loop.call_soon_threadsafe(self._tell)
            if self._newest is not threading.current_thread():  # which went on while this one was held up
                with self._guard:
                    if not self._closed:
                        self._threads.remove(threading.current_thread())
                        return

    def _tell(self) -> None:
        self._told = False
        while self._finished:
            job, result, failure = self._finished.popleft()
            self._asked -= 1
            if failure is None:
                job.set_result(result)
            else:
                job.set_exception(failure)

    def close(self) -> None:
        """No more work. Nobody waits here for long: all that was begun was awaited."""
        if self._look is not None:
            self._look.cancel()
        with self._guard:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._waiting.put(None)
        for thread in threads:
            thread.join()
        self._tell()
