"""Print what apply, an unchanged one, an update and clean take in this process, in each dialect. Run in a namespace."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import netapply
from netapply.backend import BUILT_IN
from netapply.plan import CapturePlan, Outbound, OutboundCidrs
from netapply.ruleset import Cidr

ROUNDS = 40
PAUSE = 0.03  # seconds: what the kernel frees later must not be waited for by the next round
FIRST = CapturePlan()
SECOND = CapturePlan(outbound=Outbound(cidrs=OutboundCidrs(exclude=(Cidr(b"\x0a\0\0\0", 8),))))


def main() -> None:
    """Interleave the dialects and operations, and print a table of medians."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    took: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as state, netapply.open(state_directory=state) as capture:
        os.environ["XTABLES_LOCKFILE"] = f"{state}/lock"
        for _ in range(ROUNDS):
            for backend in BUILT_IN:
                for name, work in _operations(capture, backend):
                    time.sleep(PAUSE)
                    begun = time.perf_counter()
                    work()
                    took.setdefault((backend, name), []).append(time.perf_counter() - begun)
    names = [name for backend, name in took if backend == "nftables"]
    print(f"{'ms, median (min)':18}" + "".join(f"{name:>18}" for name in names))
    for backend in BUILT_IN:
        cells = (took[backend, name] for name in names)
        print(f"{backend:18}" + "".join(f"{statistics.median(c) * 1e3:>11.2f} ({min(c) * 1e3:.2f})" for c in cells))


def _operations(capture: netapply.Capture, backend: str) -> tuple[tuple[str, Callable[[], object]], ...]:
    return (
        ("apply", lambda: capture.apply(FIRST, backend=backend)),
        ("unchanged", lambda: capture.apply(FIRST)),
        ("update", lambda: capture.apply(SECOND)),
        ("clean", capture.clean),
    )


if __name__ == "__main__":
    main()
