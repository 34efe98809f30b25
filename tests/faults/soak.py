"""Namespaces made, applied to, changed, cleaned and deleted, in one process: `python -m tests.faults.soak [--count N]`.

Nothing may grow: descriptors, memory of the process, the namespaces that the kernel still has, and what its slab holds
that cannot be reclaimed. That is the whole machine's, and so has some room.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import os
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import netapply
from netapply.backend import BUILT_IN
from netapply.plan import CapturePlan, Dns, Inbound
from tests.faults import report
from tests.netns import make

_SIOCSIFFLAGS, _UP = 0x8914, 0x1
_FIRST = CapturePlan()
_SECOND = CapturePlan(inbound=Inbound(mode="redirect"), dns=Dns("all"), ipv6="skip")
#: Kilobytes that the process may grow by between the first tenth and the end.
MAY_GROW = 4096
#: Kilobytes of slab for each of the namespaces, of 16,000 at least. One that is kept alive holds some hundred.
SLAB_MAY_GROW = 4


class Look(NamedTuple):
    """What is held after so many namespaces."""

    namespaces: int
    descriptors: int
    resident: int
    #: Namespaces in the kernel that began since; those just deleted are freed a moment later.
    alive: int
    slab: int


def look(count: int) -> Look:
    """Once all is settled. Sizes are in KiB."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    slab = int(meminfo["SUnreclaim"].split()[0])
    return Look(count, len(os.listdir("/proc/self/fd")), resident, _alive(), slab)


def _alive() -> int:
    """Objects of the slab cache net_namespace that are in use; 0 where it cannot be read."""
    try:
        lines = Path("/proc/slabinfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("net_namespace ")), 0)


def once(number: int) -> None:
    """One namespace, from its beginning to its end."""
    place = make(lo=False)
    try:
        place.enter(_raise_loopback)
        with netapply.open(place.path) as capture:
            backend = tuple(BUILT_IN)[number % len(BUILT_IN)]
            assert capture.apply(_FIRST, backend=backend).changed
            assert capture.apply(_SECOND).changed
            assert capture.clean().changed
    finally:
        place.close()


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _UP))


def soak(count: int) -> list[Look]:
    """A look after each tenth, the first of them when everything has been used once."""
    looks: list[Look] = []
    for number in range(count):
        once(number)
        if (number + 1) % max(1, count // 10) == 0:
            time.sleep(0.2)  # the sockets that are closed later
            looks.append(look(number + 1))
            print(looks[-1], flush=True)
    return looks


def faults(looks: list[Look]) -> list[str]:
    """What grew."""
    first, last = looks[0], looks[-1]
    found = []
    if last.descriptors > first.descriptors:
        found.append(f"descriptors: {first.descriptors}, then {last.descriptors}")
    if last.resident - first.resident > MAY_GROW:
        found.append(f"memory: {first.resident} KiB, then {last.resident}")
    grown = last.slab - first.slab
    if grown > SLAB_MAY_GROW * max(16_000, last.namespaces - first.namespaces):
        found.append(f"slab: {first.slab} KiB, then {last.slab}")
    return found


def _said(looks: list[Look], seconds: float) -> str:
    first, last = looks[0], looks[-1]
    return (
        f"Between namespace {first.namespaces} and namespace {last.namespaces}: descriptors {first.descriptors}, then "
        f"{last.descriptors};\nmemory {first.resident} KiB, then {last.resident}; slab of the whole machine "
        f"{first.slab // 1024} MiB, then {last.slab // 1024};\nnamespaces that the kernel knows {first.alive}, then "
        f"{last.alive}. {report.conditions('make soak', seconds)}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--write", type=Path, help="put the figures into this document")
    arguments = parser.parse_args()
    count = arguments.count
    with tempfile.TemporaryDirectory(prefix="netapply-soak-") as name:
        os.environ["XTABLES_LOCKFILE"] = f"{name}/xtables.lock"
        os.environ["NETAPPLY_STATE_DIR"] = f"{name}/state"
        before, begun = _alive(), time.monotonic()
        looks = soak(count)
        found = faults(looks)
        left = sorted(path.name for path in Path(name, "state").iterdir())
        if left not in ([], ["history"], ["history", "history.1"]):
            found.append(f"files: {left[:5]}")
        for _ in range(300):  # the kernel frees namespaces behind our back, in batches
            if _alive() <= before + 50:
                break
            time.sleep(0.1)
        else:
            found.append(f"namespaces alive: {before}, then {_alive()}")
        seconds = time.monotonic() - begun
        print(f"{count} namespaces in {seconds:.0f} s; {'; '.join(found) or 'nothing grew'}")
        if arguments.write:
            report.put(arguments.write, "soak", _said(looks, seconds))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
