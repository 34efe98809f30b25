"""Closes netlink sockets a moment later, where nobody waits for it.

Closing a netfilter socket while its namespace has nftables objects waiting to be freed makes the kernel wait for
an RCU grace period inside close(2): 8 ms and more right after a delete, nothing once the objects are gone
(nf_tables_api.c: the NETLINK_URELEASE notifier flushes the destroy work). So they are closed 30 ms late, by a daemon
thread. A process that ends earlier loses nothing: the kernel closes what is open.
"""

from __future__ import annotations

import os
import time
from _queue import Empty, SimpleQueue  # queue imports heapq for other kinds of queues
from _thread import allocate_lock, start_new_thread

#: Seconds from `close_later` to close(2). A kept socket keeps its namespace alive for as long.
DELAY = 0.03
#: Sockets that may wait at a time; one more is closed at once, so that a burst cannot exhaust the descriptors.
LIMIT = 256

_pending: SimpleQueue[tuple[float, int]] = SimpleQueue()
_start = allocate_lock()
_thread: int | None = None


def close_later(fd: int) -> None:
    """Close `fd`, which is the caller's to give away, in DELAY seconds."""
    if _pending.qsize() >= LIMIT:
        os.close(fd)
        return
    _pending.put((time.monotonic() + DELAY, fd))
    if _thread is None:
        _start_thread()


def _start_thread() -> None:
    global _thread  # noqa: PLW0603 - one reaper for the process, started by the first socket
    with _start:
        if _thread is None:
            # Without `threading`, which waits until the new thread runs, and on a busy machine that takes milliseconds.
            _thread = start_new_thread(_reap, ())


def _reap() -> None:
    while True:
        due, fd = _pending.get()  # in the order of their time, as the delay is the same for all
        wait = due - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        os.close(fd)


def _after_fork() -> None:
    """A forked child has the descriptors, but not the thread: close its copies, and start anew."""
    global _thread, _start
    _thread, _start = None, allocate_lock()
    while True:
        try:
            os.close(_pending.get_nowait()[1])
        except Empty:
            return


os.register_at_fork(after_in_child=_after_fork)
