"""Whoever used iptables-legacy has closed its lock file: the only hint that there is of what it did, by inotify(7).

A hint, and no more: the file of a container is another one, and nothing says what was done, or where. So all namespaces
with iptables-legacy are looked at, and the looks that nobody asked for go on.
"""

from __future__ import annotations

import os

from netapply.agent.inotify import CLOSE_NOWRITE, CLOSE_WRITE, Inotify


class LockFile:
    """The lock file of the xtables tools on this machine, watched as soon as it is there."""

    def __init__(self) -> None:
        self._path = os.environ.get("XTABLES_LOCKFILE") or "/run/xtables.lock"
        self._inotify = Inotify(CLOSE_WRITE | CLOSE_NOWRITE)

    def fileno(self) -> int:
        """Readable when somebody has closed it."""
        return self._inotify.fileno()

    def watch(self) -> None:
        """Begin to, if need be. It may come and go."""
        if not self._inotify.watched:
            self._inotify.watch(self._path)

    def read(self) -> None:
        """Take note."""
        for _ in self._inotify.read():
            pass

    def close(self) -> None:
        """No more. Idempotent."""
        self._inotify.close()
