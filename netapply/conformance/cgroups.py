"""Sockets of processes in cgroups v2, below a cgroup of the suite's own.

A thread cannot be in another cgroup than its process (cgroups(7), unless they are threaded), so these sockets are
opened by a fork of this process, which hands them over and ends. No program is started.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

from netapply.lab.namespaces import timeout_scale
from netapply.lookups import _cgroup_root as cgroup_root  # pyright: ignore[reportPrivateUsage]  # the loader's own

#: Below the root of cgroup v2, and this run's alone; the plans of cases name paths below it.
NAME = f"netapply-conformance-{os.getpid()}"
PATIENCE = int(10 * timeout_scale())  # seconds for the fork; then the kernel ends it
MOST = 200  # descriptors in one message (SCM_MAX_FD of net/scm.h is 253)


def directory(path: str = "") -> str:
    """The directory of a cgroup below ours."""
    return f"{cgroup_root()}/{NAME}/{path}".rstrip("/")


def create(path: str) -> None:
    """Make it be there. Raises OSError."""
    os.makedirs(directory(path), exist_ok=True)


def remove() -> None:
    """Take all of ours away; what somebody is in stays."""
    for place, _, _ in os.walk(directory(), topdown=False):
        with suppress(OSError):
            os.rmdir(place)


def opened_in(path: str, work: Callable[[], list[socket.socket]]) -> list[socket.socket]:
    """The sockets that `work` opens as a process in this cgroup. Raises OSError."""
    create(path)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = os.fork()
        if not child:
            _serve(theirs, f"{directory(path)}/cgroup.procs", work)
        theirs.close()
        ours.settimeout(PATIENCE)
        try:
            found: list[socket.socket] = []
            while True:
                said, fds, _, _ = socket.recv_fds(ours, 256, MOST)
                found += [socket.socket(fileno=fd) for fd in fds]
                if not fds:
                    break
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if said != b"done":
        raise OSError(f"a socket in cgroup {path}: {said.decode() or 'the fork ended'}")
    for each in found:
        each.settimeout(0)
    return found


def _serve(out: socket.socket, procs: str, work: Callable[[], list[socket.socket]]) -> None:
    """In the fork: never returns."""
    try:
        signal.alarm(PATIENCE)
        with open(procs, "w", encoding="ascii") as file:
            file.write("0")
        sockets = work()
        for at in range(0, len(sockets), MOST):
            socket.send_fds(out, [b"some"], [each.fileno() for each in sockets[at : at + MOST]])
        out.send(b"done")
    except BaseException as error:  # noqa: BLE001 - it is told, and the process ends here
        with suppress(OSError):
            out.send(f"{type(error).__name__}: {error}"[:250].encode())
    finally:
        os._exit(0)
