"""One epoll(7) of our own for all that is watched, beneath the event loop's.

The loop has one descriptor to wait on instead of thousands, and worker threads add and arm theirs without the loop.
Each is armed for one event at a time: whoever works it off arms it again, so nothing is told of while that goes on.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from contextlib import suppress

_ARMED, _DISARMED = select.EPOLLIN | select.EPOLLONESHOT, select.EPOLLONESHOT
_MANY = 256


class Watchers:
    """Descriptors, each with what is to be called in the event loop. `add`, `arm` and `remove` serve any thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}

    def fileno(self) -> int:
        """Readable when `dispatch` has something to do."""
        return self._epoll.fileno()

    def add(self, fd: int, call: Callable[[], None]) -> None:
        """Call `call` once when `fd` is readable, from when it is armed."""
        self._calls[fd] = call
        self._epoll.register(fd, _DISARMED)

    def arm(self, fd: int) -> None:
        """Once, or once more; at once if it is readable."""
        self._epoll.modify(fd, _ARMED)

    def remove(self, fd: int) -> None:
        """Watch it no more. To be called before it is closed."""
        if self._calls.pop(fd, None) is not None:
            with suppress(OSError, ValueError):
                self._epoll.unregister(fd)

    def dispatch(self) -> None:
        """Call for all that is readable."""
        for fd, _ in self._epoll.poll(0, _MANY):
            call = self._calls.get(fd)
            if call is not None:
                call()

    def close(self) -> None:
        """No more. Idempotent."""
        self._epoll.close()
