"""Throwaway namespaces: a few with a thread in each, or a thousand as bare descriptors. None has a route out."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import subprocess
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from netapply.lab import Place
from netapply.lab.namespaces import lab_names
from netapply.lab.syscalls import CLONE_NEWNET, unshare
from netapply.syscalls import setns

T = TypeVar("T")

ADDRESS = "10.200.0.1"
_DEVICE = f"""
link add bench0 type veth peer name bench1
link set bench0 up
link set bench1 up
addr add {ADDRESS}/24 dev bench0
route add default via 10.200.0.2 dev bench0
"""
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h
_IFREQ = struct.Struct("16sh22x")  # struct ifreq: name, flags


@contextmanager
def place(role: str = "bench") -> Generator[Place]:
    """One namespace with a thread that lives in it, `lo` up."""
    with Place(lab_names((role,))[0]) as made:
        made.inside(raise_lo)
        yield made


@contextmanager
def many(count: int) -> Generator[list[int]]:
    """Descriptors of `count` namespaces, `lo` up in each."""

    def make() -> int:
        unshare(CLONE_NEWNET)
        raise_lo()
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    fds: list[int] = []
    _allow_descriptors(20 * count)
    try:
        with ThreadPoolExecutor(1) as thread:  # it moves on into each new one, and ends in the last
            fds.extend(thread.submit(make).result() for _ in range(count))
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def visit(fd: int, work: Callable[[], T]) -> T:
    """Run short `work` in the calling thread while that is in the namespace behind `fd`."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd)
        try:
            return work()
        finally:
            setns(home)
    finally:
        os.close(home)


def raise_lo() -> None:
    """Bring up `lo` in the calling thread's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", _IFF_UP))


def wire() -> None:
    """Give the calling thread's namespace a device with an address, and a default route that leads nowhere."""
    subprocess.run(["ip", "-batch", "-"], input=_DEVICE.encode(), check=True, timeout=5)


def _allow_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
