"""The xtables lock: what keeps two writers of iptables-legacy tables apart.

The kernel takes a replacement table as long as the number of old entries is right, whatever they are. Everybody who
changes these tables therefore holds flock(2) on one file, as iptables(8) does: $XTABLES_LOCKFILE or /run/xtables.lock.
It is shared by all namespaces of the machine, so it is held for as short as possible.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING, Self

from netapply.errors import LockError

if TYPE_CHECKING:
    from types import TracebackType

DEFAULT_PATH = "/run/xtables.lock"  # XT_LOCK_NAME of iptables

#: Seconds between attempts. iptables itself waits a second; its own changes take some milliseconds.
PAUSE = 0.002
_AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB


class XtablesLock:
    """The lock, as a context manager. `timeout` is in seconds; entering raises LockError, which names the holder."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._path = os.environ.get("XTABLES_LOCKFILE") or DEFAULT_PATH
        self._fd = -1

    def __enter__(self) -> Self:
        self._fd = _open(self._path)
        try:
            try:
                fcntl.flock(self._fd, _AT_ONCE)
            except OSError:
                self._wait()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _wait(self) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                fcntl.flock(self._fd, _AT_ONCE)
            except OSError as failure:
                if failure.errno not in (errno.EAGAIN, errno.EINTR):
                    raise LockError(f"xtables lock {self._path}: {failure.strerror}") from failure
            else:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise LockError(
                    f"xtables lock {self._path}: {_holder(self._fd)} still holds it after {self._timeout:g} s",
                    next_step="wait for that process, or raise --lock-timeout",
                )
            time.sleep(min(PAUSE, left))

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)  # closing gives the lock back


def _open(path: str) -> int:
    flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO would wait for a writer
    try:
        return os.open(path, flags, 0o600)
    except OSError as failure:
        why = {errno.ELOOP: "it is a symbolic link", errno.EISDIR: "it is a directory"}
        reason = why.get(failure.errno or 0, failure.strerror)
        raise LockError(
            f"xtables lock {path} cannot be opened: {reason}",
            next_step="mount the file of the host there, or name another one in XTABLES_LOCKFILE",
        ) from failure


def _holder(fd: int) -> str:
    """Who holds the lock, from proc_locks(5): "iptables (4711)", or the best that can be said."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        rows = [line.split() for line in _read("/proc/locks").splitlines()]
        # "1: FLOCK  ADVISORY  WRITE 4711 00:1a:42 0 EOF"; who waits has "->" in the second place.
        pid = next(row[4] for row in rows if row[1] == "FLOCK" and row[5] == device)
        return f"{_read(f'/proc/{pid}/comm').strip()} ({pid})"
    except (OSError, StopIteration, IndexError):
        return "a process that cannot be seen from here"


def _read(path: str) -> str:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC), encoding="utf-8", errors="replace") as file:
        return file.read()
