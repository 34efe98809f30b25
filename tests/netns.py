"""Throwaway network namespaces for tests.

A namespace here is a descriptor and no name, so that it is gone with the process, however that ends. Where a test
needs a name, it carries the process id, and the next session removes what a killed one left.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
NAMED = Path("/run/netns")
PREFIX = "netapply-test-"
PATIENCE = 30  # seconds that a tool may take

_libc = ctypes.CDLL(None, use_errno=True)


def in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends with it, as it may leave the thread in another namespace."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the test
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    if failure:
        raise failure[0]
    return outcome[0]


def _unshare() -> int:
    if _libc.unshare(CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Netns:
    """One namespace. `path` opens it from any process; `run` runs a tool in it and returns its output."""

    def __init__(self, fd: int, name: str = "") -> None:
        self.fd = fd
        self.name = name
        self.path = f"/proc/{os.getpid()}/fd/{fd}"

    @property
    def inode(self) -> int:
        return os.fstat(self.fd).st_ino

    def run(self, *command: str, stdin: str | None = None, check: bool = True) -> str:
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", *command],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["nsenter", f"--net={self.path}", *command])

    def enter(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread that is in the namespace."""

        def run() -> T:
            if _libc.setns(self.fd, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            return work()

        return in_thread(run)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def make(*, lo: bool = True) -> Netns:
    """A new namespace, with `lo` up unless told otherwise; the caller closes it. Raises PermissionError."""
    netns = Netns(in_thread(_unshare))
    if lo:
        netns.run("ip", "link", "set", "lo", "up")
    return netns


@contextmanager
def named(name: str = "") -> Iterator[Netns]:
    """A new namespace that `ip netns` knows, under a unique name of ours unless one is given."""
    name = name or f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    _ip("add", name)
    netns = Netns(os.open(NAMED / name, os.O_RDONLY | os.O_CLOEXEC), name)
    try:
        yield netns
    finally:
        netns.close()
        with suppress(subprocess.CalledProcessError):
            _ip("delete", name)


def delete(name: str) -> None:
    _ip("delete", name)


def sweep() -> None:
    """Remove the names that killed test sessions left."""
    for path in NAMED.glob(PREFIX + "*") if NAMED.is_dir() else ():
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with suppress(subprocess.CalledProcessError):
                _ip("delete", path.name)


def _ip(verb: str, name: str) -> None:
    subprocess.run(["ip", "netns", verb, name], check=True, capture_output=True, timeout=PATIENCE)
