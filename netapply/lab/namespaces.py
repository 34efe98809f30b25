"""Throwaway network namespaces, each with a thread that lives in it. Nothing is forked, no program is started.

A namespace is visible as /run/netns/NAME where that can be had, for `ip netns` and nsenter; where it cannot (no mount
allowed, read-only /run), its `path` leads through this process, and everything else works the same.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

from netapply.errors import NamespaceError, NetapplyError
from netapply.lab import syscalls

T = TypeVar("T")

NETNS_DIR = "/run/netns"  # iproute2's NETNS_RUN_DIR


def timeout_scale() -> float:
    """By how much all waits are longer: NETAPPLY_TIMEOUT_SCALE, for emulated machines. Raises NetapplyError."""
    text = os.environ.get("NETAPPLY_TIMEOUT_SCALE") or "1"
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 1 <= scale <= 1000:
        raise NetapplyError(f"NETAPPLY_TIMEOUT_SCALE is {text!r}", next_step="write a number from 1 to 1000")
    return scale


PATIENCE = 5.0 * timeout_scale()  # seconds for what a namespace's thread is asked to do; it takes microseconds
_OURS = re.compile(r"netapply-lab-(?P<pid>[1-9][0-9]*)-[0-9a-f]+-[a-z]+")


def lab_names(roles: tuple[str, ...], *, keep: bool = False) -> tuple[str, ...]:
    """Unique names, alike but for the role. Those to keep carry no process id, so that no sweep takes them."""
    origin = "kept" if keep else f"lab-{os.getpid()}"
    random = secrets.token_hex(4)
    return tuple(f"netapply-{origin}-{random}-{role}" for role in roles)


class Place:
    """One throwaway namespace. `path` opens it from outside, `fd` is an open descriptor of it.

    Without `publish` it has no name under /run/netns, and is gone with the process however that ends.
    Raises NamespaceError when it cannot be created. Close it, or use it as a context manager: the namespace goes when
    its thread, its name and the sockets opened in it are gone.
    """

    def __init__(self, name: str, *, keep: bool = False, publish: bool = True) -> None:
        self.name = name
        self.keep = keep
        self._thread = ThreadPoolExecutor(1, name)
        self.fd = -1
        self.path = ""
        try:
            self.fd = self.inside(_enter_new)
            published = self.inside(lambda: _publish(name)) if publish else ""
            self.path = published or f"/proc/{os.getpid()}/fd/{self.fd}"
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise NamespaceError(f"a network namespace for the lab: {error}", next_step="run it as root") from error
            raise

    @property
    def named(self) -> bool:
        """Whether other programs find it by its name."""
        return self.path.startswith(NETNS_DIR)

    def inside(self, work: Callable[[], T]) -> T:
        """Run `work` in the namespace's own thread; it must be short. Raises what it raises; TimeoutError after 5 s."""
        return self._thread.submit(work).result(PATIENCE)

    def close(self) -> None:
        """End the thread and, unless it is to be kept, remove the name. Twice is once."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self.named and not self.keep:
            remove(self.name)
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.path = -1, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def sweep() -> tuple[str, ...]:
    """Remove the namespaces of labs whose process was killed; returns their names.

    Stale is what nobody holds a lock on and whose process id is not in use: the lock alone would not protect a name
    that is just being made, the id alone would not protect a lab of another pid namespace that shares /run.
    """
    try:
        names = [entry.name for entry in Path(NETNS_DIR).iterdir()]
    except FileNotFoundError:
        return ()
    stale = [name for name in names if (found := _OURS.fullmatch(name)) and _dead(int(found["pid"]), name)]
    try:
        for name in stale:
            remove(name)
    except PermissionError:  # then a lab cannot be created either, which says so itself
        return ()
    return tuple(stale)


def remove(name: str) -> None:
    """Take /run/netns/NAME away, as `ip netns del` does. Not an error where it is gone already."""
    path = f"{NETNS_DIR}/{name}"
    with suppress(OSError):  # EINVAL: a file that nothing was mounted on, left by a process killed in between
        syscalls.unmount(path)
    Path(path).unlink(missing_ok=True)


def _enter_new() -> int:
    syscalls.unshare(syscalls.CLONE_NEWNET)
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # held for the life of the lab; `sweep` looks for it
    return fd


def _publish(name: str) -> str:
    """Bind the thread's namespace to /run/netns/NAME; returns that path, or "" where mounting is not possible."""
    path = f"{NETNS_DIR}/{name}"
    try:
        Path(NETNS_DIR).mkdir(mode=0o755, parents=True, exist_ok=True)
        with _directory_locked():
            _share_directory()
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
        syscalls.mount("/proc/thread-self/ns/net", path, syscalls.MS_BIND)
    except OSError:
        remove(name)
        return ""
    return path


def _share_directory() -> None:
    """Make /run/netns a shared mount, as `ip netns add` does: a name removed here goes from every mount namespace."""
    try:
        syscalls.mount("", NETNS_DIR, syscalls.MS_SHARED | syscalls.MS_REC)
    except OSError:  # EINVAL: it is not a mount point yet
        syscalls.mount(NETNS_DIR, NETNS_DIR, syscalls.MS_BIND | syscalls.MS_REC)
        syscalls.mount("", NETNS_DIR, syscalls.MS_SHARED | syscalls.MS_REC)


@contextmanager
def _directory_locked() -> Generator[None]:
    """The lock that keeps concurrent `ip netns add` from mounting the directory twice; waits a second at most."""
    fd = os.open(NETNS_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + 1.0
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def _dead(pid: int, name: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    else:
        return False
    try:
        fd = os.open(f"{NETNS_DIR}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)
