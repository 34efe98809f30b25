"""Who listens to events: each with a bounded queue of its own, so that one who lags holds up nobody."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator

from netapply.agent.events import Event, Lost


class _Subscriber:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting: deque[Event] = deque()
        self.lost = 0
        self.closed = False
        self.wake = asyncio.Event()


class Subscribers:
    """All of one agent."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._all: set[_Subscriber] = set()
        #: Events that somebody did not get.
        self.lost = 0

    def tell(self, event: Event) -> None:
        """Give an event to all."""
        for each in self._all:
            if len(each.waiting) >= each.limit:
                each.waiting.popleft()  # what is new matters more
                each.lost += 1
                self.lost += 1
            each.waiting.append(event)
            each.wake.set()

    def subscribe(self) -> AsyncIterator[Event]:
        """All events from now on; it ends with the agent. Who leaves it early should close it (aclose)."""
        subscriber = _Subscriber(self._limit)
        self._all.add(subscriber)
        return self._events(subscriber)

    async def _events(self, subscriber: _Subscriber) -> AsyncIterator[Event]:
        try:
            while True:
                if subscriber.lost:
                    count, subscriber.lost = subscriber.lost, 0
                    yield Lost(time.time(), count)
                if subscriber.waiting:
                    yield subscriber.waiting.popleft()
                elif subscriber.closed:
                    return
                else:
                    subscriber.wake.clear()
                    await subscriber.wake.wait()
        finally:
            self._all.discard(subscriber)

    def close(self) -> None:
        """No more events: who listens gets what is waiting, and then the end."""
        for each in self._all:
            each.closed = True
            each.wake.set()
