"""Worker threads of one agent: kernel calls are synchronous, and none is left half-way by who is cancelled."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from netapply.aio import to_the_end

T = TypeVar("T")


class Workers:
    """A pool of threads; `close` waits for what runs."""

    def __init__(self, number: int) -> None:
        # Some more than there are processors, as one may wait for a lock that somebody holds.
        self._pool = ThreadPoolExecutor(number or 2 + (os.cpu_count() or 1), thread_name_prefix="netapply-agent")

    async def run(self, work: Callable[[], T], stop: threading.Event | None = None) -> T:
        """What `work` returns or raises. Who is cancelled sets `stop`, and waits all the same for the thread."""
        return await to_the_end(asyncio.get_running_loop().run_in_executor(self._pool, work), stop)

    def close(self) -> None:
        """No more work. Nobody waits here for long: all that was begun was awaited."""
        self._pool.shutdown(wait=True, cancel_futures=True)
