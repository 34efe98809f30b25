"""What a run has outside of its namespaces: a directory for lock and journals, and cgroups.

Nothing of it is left behind. A fork of this process waits for its end, and takes them away even when it is killed. No
program is started.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from contextlib import contextmanager

from netapply.conformance import cgroups

#: Read by iptables and by us; without it the machine's own lock would be taken.
LOCK = "XTABLES_LOCKFILE"


@contextmanager
def belongings() -> Generator[str]:
    """A private directory for as long as this lasts, with the xtables lock in it; yields its path."""
    directory = tempfile.mkdtemp(prefix=f"netapply-conformance-{os.getpid()}-")
    alive, end = os.pipe()
    watcher = os.fork()
    if not watcher:
        _watch(alive, directory)
    os.close(alive)
    before = os.environ.get(LOCK)
    os.environ[LOCK] = f"{directory}/xtables.lock"
    try:
        yield directory
    finally:
        if before is None:
            del os.environ[LOCK]
        else:
            os.environ[LOCK] = before
        os.close(end)
        os.waitpid(watcher, 0)


def _watch(alive: int, directory: str) -> None:
    """In the fork: wait until nobody holds the other end of the pipe, and tidy up. Never returns."""
    try:
        os.setsid()  # so that what ends a process group does not end this
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        os.closerange(3, alive)
        os.closerange(alive + 1, 1 << 16)
        os.read(alive, 1)
        shutil.rmtree(directory, ignore_errors=True)
        cgroups.remove()
    finally:
        os._exit(0)
